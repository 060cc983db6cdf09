"""Other loaders that `loader.py` compares with where they install: litdata, mosaicml-streaming, megatron-energon. None is a dependency.

    pip install --target PEERS litdata mosaicml-streaming megatron-energon

Each reads the same bytes from its own format, written here from the tars; batches of raw bytes come back from workers. It is a script of
its own (`PYTHONPATH=PEERS python loader_peers.py PEER TARS OUT WORKERS`): what is found in PEERS must not get in the way of ours.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader

MODULES = {"litdata": "litdata", "mosaicml-streaming": "streaming", "megatron-energon": "megatron.energon"}
BATCH, WORKERS = 32, 2


def missing(peer: str) -> str:
    """Say why a peer cannot be used; nothing when it can."""
    try:
        importlib.import_module(MODULES[peer])
    except Exception as error:  # a stub or a half-installed dependency fails in many ways
        return f"{type(error).__name__}: {error}"
    return ""


def samples(tars: list[Path]) -> Iterator[tuple[bytes, bytes]]:
    """Yield (record, picture) from tars."""
    for tar in tars:
        with tarfile.open(tar, "r:") as archive:
            blobs = (archive.extractfile(member).read() for member in archive)
            yield from zip(blobs, blobs, strict=True)


def write(peer: str, tars: list[Path], out: Path) -> None:
    """Write the samples in a peer's format; Energon reads the tars where they lie."""
    if peer == "litdata":
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(out), chunk_bytes="64MB")
        for number, (record, picture) in enumerate(samples(tars)):
            writer[number] = {"json": record, "jpg": picture}
        writer.done()
        writer.merge()
    elif peer == "mosaicml-streaming":
        from streaming import MDSWriter

        with MDSWriter(out=str(out), columns={"json": "bytes", "jpg": "bytes"}) as writer:
            for record, picture in samples(tars):
                writer.write({"json": record, "jpg": picture})
    else:
        _prepare_energon(out, tars)


def _prepare_energon(out: Path, tars: list[Path]) -> None:
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    out.mkdir()
    for tar in tars:
        (out / tar.name).hardlink_to(tar)
    WebdatasetPreparator.prepare_dataset(EPath(out), [tar.name for tar in tars], split_parts_ratio=[("train", 1.0)], workers=1)
    (out / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def read(peer: str, folder: Path, *, workers: int) -> Iterator[tuple[int, int]]:
    """Yield (samples, bytes) a step, over each sample once, in order."""
    if peer == "litdata":
        from litdata import StreamingDataLoader, StreamingDataset

        data = StreamingDataset(str(folder), shuffle=False)
        batches = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=list) if workers else zip(data, strict=True)
    elif peer == "mosaicml-streaming":
        from streaming import StreamingDataset

        data = StreamingDataset(local=str(folder), shuffle=False, batch_size=BATCH)
        batches = DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=list) if workers else zip(data, strict=True)
    else:
        batches = _energon(folder, workers)
    for batch in batches:
        yield len(batch), sum(len(sample["jpg"]) for sample in batch)


def _energon(folder: Path, workers: int) -> Iterator[list[dict[str, bytes]]]:
    from megatron.energon import Cooker, CrudeSample, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.task_encoder.base import stateless

    @stateless
    def keep(sample: CrudeSample) -> CrudeSample:
        return sample

    class Raw(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(keep),)

        def batch(self, samples: list) -> list[dict[str, bytes]]:
            return [{"jpg": sample["0.jpg"], "json": sample["json"]} for sample in samples]

    data = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Raw(),
        repeat=False,
    )
    yield from get_loader(data)


def cpu() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    """Measure one peer and print a JSON line."""
    peer, tars, out, workers = sys.argv[1], sorted(Path(sys.argv[2]).glob("*.tar")), Path(sys.argv[3]), int(sys.argv[4])
    if reason := missing(peer):
        print(json.dumps({"skipped": reason}))
        return
    if not out.exists():
        write(peer, tars, out)
    for found, _ in zip(read(peer, out, workers=0), range(8), strict=False):  # loads what is loaded late
        assert found
    wall, used, count, size = time.perf_counter(), cpu(), 0, 0
    for some, more in read(peer, out, workers=workers):
        count, size = count + some, size + more
    print(json.dumps({"samples": count, "bytes": size, "wall_s": time.perf_counter() - wall, "cpu_s": cpu() - used}))


if __name__ == "__main__":
    main()
