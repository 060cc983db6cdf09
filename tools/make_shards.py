"""Make shards from a messages JSONL, a LLaVA / ShareGPT JSON(L) and a folder of images.

python tools/make_shards.py INPUT.jsonl --images DIR --out DIR --tokenizer samples/tokenizer --licence CC-BY-4.0 --source mydata

A record: {"messages": [{"role": "user", "text": "<image> Which plane?"}, {"role": "assistant", "text": "Axial."}], "images": ["a/b.png"]},
or {"id": ..., "image": "b.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]},
with any field of a Sample beside it (task, modality, organ, answer_type, patient, licence, provenance, ...).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import pydicom

from infimed.contracts import DataFault, Sample, UserError
from infimed.data.index import sample_from_json
from infimed.data.shards import write_shards
from infimed.processing.chat import render
from infimed.processing.dicom import is_dicom, read_image_file
from infimed.processing.tokenizer import Tokenizer

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when every record was written, 1 when some were left out (--skip-bad), 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder that image paths are relative to")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="folder that holds tokenizer.json")
    parser.add_argument("--licence", help="licence of records that name none; a record without one is refused")
    parser.add_argument("--source", help="source of records that name none (default: the input's name)")
    parser.add_argument("--prefix", default="shard")
    parser.add_argument("--max-samples", type=int, default=1000, help="samples a shard")
    parser.add_argument("--skip-bad", action="store_true", help="leave out records with a fault instead of stopping")
    args = parser.parse_args(argv)
    defaults = {"source": args.source or args.input.stem} | ({"licence": args.licence} if args.licence else {})
    faults: list[str] = []
    try:
        tokenizer = Tokenizer.load(args.tokenizer)
        samples = list(read_samples(args.input, images=args.images, tokenizer=tokenizer, defaults=defaults, faults=faults))
        if faults and not args.skip_bad:
            raise UserError("\n".join([f"{len(faults)} records have faults; mend them or leave them out with --skip-bad", *faults[:20]]))
        loaded = ((sample, [path.read_bytes() for path in paths]) for sample, paths in samples)
        if not samples:
            raise UserError(f"input={args.input}: no record to write")
        if args.max_samples < 1:
            raise UserError(f"--max-samples {args.max_samples}: expected at least 1")
        if not args.images.is_dir():
            raise UserError(f"--images {args.images} is not a folder")
        shards = write_shards(loaded, args.out, prefix=args.prefix, max_samples=args.max_samples, tokenizer=tokenizer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {args.out}: {error.strerror}; name another folder, or free some space", file=sys.stderr)
        return 2
    print(f"{len(samples)} samples in {len(shards)} shards under {args.out}; {len(faults)} left out")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def read_samples(
    path: Path, *, images: Path, tokenizer: Tokenizer, defaults: Mapping[str, str], faults: list[str]
) -> Iterator[tuple[Sample, list[Path]]]:
    """Yield every sound record as a Sample and its image files; what is wrong with the others goes to `faults`."""
    for number, record in enumerate(_records(path)):
        try:
            sample, paths = _convert(record, number, images, defaults)
            for file in paths:
                _check_picture(file.read_bytes())
            render(sample.messages, tokenizer, visual_tokens=[1] * len(paths))
        except DataFault as fault:
            faults.append(f"{path.name}: record {number}: {fault}")
        else:
            yield sample, paths


def _check_picture(data: bytes) -> None:
    """Raise DataFault unless a picture can be decoded and, a DICOM file, says that its patient's identity was removed."""
    read_image_file(data)
    if is_dicom(data):
        removed = pydicom.dcmread(BytesIO(data), stop_before_pixels=True).get("PatientIdentityRemoved", "")
        if str(removed).upper() != "YES":
            raise DataFault("not_deidentified", "a DICOM file without PatientIdentityRemoved=YES; de-identify it, or convert it to PNG")


def _records(path: Path) -> Iterator[object]:
    """Yield the records of a JSON list or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"input={path}: cannot be read ({error})") from None
    where = ""
    try:
        if text.lstrip().startswith("["):
            yield from json.loads(text)
            return
        for number, line in enumerate(text.splitlines(), start=1):
            where = f" line {number}"
            if line.strip():
                yield json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"input={path}:{where} is not JSON ({error}); expected one record a line, or a list of records") from None


def _convert(record: object, number: int, folder: Path, defaults: Mapping[str, str]) -> tuple[Sample, list[Path]]:
    """Read one record of any accepted layout. Raises: DataFault."""
    if not isinstance(record, dict):
        raise DataFault("schema", "not an object")
    fields = {**defaults, **record}
    turns = fields.pop("messages", None) or fields.pop("conversations", None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataFault("schema", "neither messages nor conversations is a list of turns")
    fields["messages"] = [{"role": _role(turn), "text": _first(turn, "text", "content", "value")} for turn in turns]
    names = fields.pop("images", None) or fields.pop("image", None) or []
    paths = [_inside(folder, name) for name in ([names] if isinstance(names, str) else names)]
    fields["images"] = [f"{i}.{path.suffix.lstrip('.').lower() or 'bin'}" for i, path in enumerate(paths)]
    if fields.get("licence") in (None, "", "unknown"):
        raise DataFault("no_licence", "no licence in the record and no --licence")
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", str(fields.pop("key", fields.pop("id", "")))).strip("_")[:64]
    fields.pop("id", None)
    return sample_from_json(key or f"{number:08d}", json.dumps(fields).encode()), paths


def _role(turn: Mapping[str, object]) -> object:
    role = _first(turn, "role", "from")
    return ROLES.get(role, role) if isinstance(role, str) else role


def _first(turn: Mapping[str, object], *names: str) -> object:
    return next((turn[name] for name in names if name in turn), None)


def _inside(folder: Path, name: object) -> Path:
    """Return an image's path, which must be a file inside the folder."""
    root = folder.resolve()
    path = (root / name).resolve() if isinstance(name, str) else root
    if not path.is_relative_to(root) or not path.is_file():
        raise DataFault("missing_image", f"{name!r} is no file inside {folder}")
    return path


if __name__ == "__main__":
    sys.exit(main())
