"""Make shards from records in JSON (LLaVA, ShareGPT, messages), JSON lines, CSV or parquet, and a folder of images.

python tools/make_shards.py INPUT.jsonl --images DIR --out DIR --tokenizer samples/tokenizer --licence CC-BY-4.0 --source mydata

A record: {"messages": [{"role": "user", "text": "<image> Which plane?"}, {"role": "assistant", "text": "Axial."}], "images": ["a/b.png"]},
or {"id": ..., "image": "b.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]},
or question and answer, or caption, with any field of a Sample beside it (task, modality, organ, answer_type, patient, licence,
provenance, ...). A table has such fields as columns: several images are set apart by `;`, conversations are JSON text, and parquet may
hold the bytes of images. A conversation without any <image> shows its images first.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from infimed.contracts import DataFault, Sample, UserError
from infimed.data.page import printable
from infimed.data.record_files import load_sample, read_records
from infimed.data.records import ignored
from infimed.data.shards import write_shards
from infimed.processing.tokenizer import Tokenizer

FAULTS_SHOWN = 20


@dataclass
class Samples:
    """The sound records of some files; what was wrong with the others is counted while they are read."""

    inputs: Sequence[Path]
    images: Path | None
    tokenizer: Tokenizer
    layout: Mapping[str, str]
    skip_bad: bool
    keys: Counter[str] = field(default_factory=Counter)
    renamed: int = 0
    written: int = 0
    faults: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[tuple[Sample, list[bytes]]]:
        """Yield one at a time; after a fault, unless it may be skipped, only look for more of them."""
        records = ((path, place, record) for path in self.inputs for place, record in enumerate(read_records(path)))
        for number, (path, place, record) in enumerate(tqdm(records, unit="record", disable=None)):
            layout = {"source": path.stem, **self.layout}
            try:
                found = load_sample(record, number=number, folder=self.images, tokenizer=self.tokenizer, layout=layout)
            except DataFault as fault:
                self.faults.append(f"{path.name}: record {place}: {fault}")
                continue
            if self.faults and not self.skip_bad:
                continue
            self.unread.update(ignored(record))
            self.written += 1
            sample, images = found
            yield replace(sample, key=self._own(sample.key)), images
        if self.faults and not self.skip_bad:
            what = f"{len(self.faults)} records have faults; mend them or leave them out with --skip-bad"
            raise UserError("\n".join([what, *self.faults[:FAULTS_SHOWN]]))
        if not self.written:
            raise UserError(f"input={', '.join(map(str, self.inputs))}: no record to write")

    def _own(self, key: str) -> str:
        """Number a key that came before: LLaVA repeats the ids of images, and long or foreign ones are spelled alike."""
        own = key
        while own in self.keys:
            self.keys[key] += 1
            own = f"{key}-{self.keys[key]}"
        self.keys[own] = 1
        self.renamed += own != key
        return own


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when every record was written, 1 when some were left out (--skip-bad), 2 for a user's mistake."""
    args = _arguments(argv)
    try:
        samples, paths = _write(args)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except DataFault as fault:
        print(f"error: {fault}; mend the record", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {args.out}: {error.strerror}; name another folder, or free some space", file=sys.stderr)
        return 2
    print(f"{samples.written} samples in {len(paths)} shards under {args.out}; {len(samples.faults)} left out")
    if samples.renamed:
        print(f"{samples.renamed} keys came before and were given a number: id, id-2, id-3, ...")
    if samples.unread:
        print("fields that were not read: " + ", ".join(f"{name} ({count})" for name, count in samples.unread.most_common()))
    for fault in samples.faults:
        print(printable(fault))
    return 1 if samples.faults else 0


def _write(args: argparse.Namespace) -> tuple[Samples, list[Path]]:
    """Write the shards."""
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"--images {args.images} is not a folder")
    layout = {name: value for name in ("source", "licence", "prompt") if (value := getattr(args, name))}
    samples = Samples(args.inputs, args.images, Tokenizer.load(args.tokenizer), layout, args.skip_bad)
    paths = write_shards(samples, args.out, prefix=args.prefix, max_samples=args.max_samples, tokenizer=samples.tokenizer)
    return samples, paths


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help=".json, .jsonl, .csv, .tsv or .parquet")
    parser.add_argument("--images", type=Path, help="folder that image paths are relative to")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="folder that holds tokenizer.json")
    parser.add_argument("--licence", help="licence of records that name none; a record without one is refused")
    parser.add_argument("--source", help="source of records that name none (default: the input's name)")
    parser.add_argument("--prompt", help='what a caption answers (default: "Describe the image.")')
    parser.add_argument("--prefix", default="shard")
    parser.add_argument("--max-samples", type=int, default=1000, help="samples a shard")
    parser.add_argument("--skip-bad", action="store_true", help="leave out records with a fault instead of stopping")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
