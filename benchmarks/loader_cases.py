"""What `loader.py` compares: ours and the plain way. A case is a generator of (samples, bytes) a step, over each sample once."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from infimed.contracts import Message, Sample
from infimed.data.datamodule import ShardDataModule
from infimed.data.handover import Buffers, Parcel
from infimed.data.shards import ShardSet, open_shards, write_shards
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[1] / "samples" / "tokenizer"
BATCH, WORKERS, PIXELS = 32, 2, 378
RESOLUTION = Resolution(patch_size=14, image_size=PIXELS, visual_grid=27)
MOTIFS = 256  # distinct pictures; each sample still has its own bytes on the disk

Case = Callable[[Path], Iterator[tuple[int, int]]]


def picture(number: int, *, side: int) -> bytes:
    """Draw smooth noise with some grain: at 448 pixels a JPEG of about 56 KB."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = draw.normal(scale=5.4, size=(side, side, 1)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
    return file.getvalue()


def samples(count: int, *, side: int) -> Iterator[tuple[Sample, list[bytes]]]:
    """Make captioned pictures with about 0.4 KB of text."""
    motifs = [picture(number, side=side) for number in range(min(MOTIFS, count))]
    for number in range(count):
        words = " ".join(f"finding {(number * 7 + place) % 97}" for place in range(20))
        messages = (Message("user", "<image>What is shown?"), Message("assistant", words))
        yield Sample(f"s{number:08d}", messages, ("0.jpg",), source="noise", licence="CC0-1.0"), [motifs[number % len(motifs)]]


def make(folder: Path, *, shards: int, rows: int, side: int) -> list[Path]:
    """Write tars of ours with their indexes."""
    return write_shards(samples(shards * rows, side=side), folder, max_samples=rows, tokenizer=Tokenizer.load(TOKENIZER))


def urls(folder: Path) -> list[str]:
    """List the tars."""
    return [str(tar) for tar in sorted(folder.glob("*.tar"))]


# --- without decoding ------------------------------------------------------------------------------------------------


def ours(folder: Path) -> Iterator[tuple[int, int]]:
    """Read in random order: records and pictures as bytes, checked against their CRC."""
    shards = open_shards([folder])
    for rows in shuffled(shards):
        found = shards.read_raw(rows)
        yield len(found), sum(len(image) for _, *images in found for image in images)


def ours_parsed(folder: Path) -> Iterator[tuple[int, int]]:
    """Read in random order as the loader does: checked, and the records parsed into samples."""
    shards = open_shards([folder])
    for rows in shuffled(shards):
        found = shards.read_many(rows)
        yield len(found), sum(len(image) for _, images in found for image in images)


def webdataset(folder: Path) -> Iterator[tuple[int, int]]:
    """Stream the tars: bytes, not parsed."""
    import webdataset as wds

    for sample in wds.WebDataset(urls(folder), shardshuffle=False):
        yield 1, len(sample["0.jpg"])


def webdataset_shuffled(folder: Path) -> Iterator[tuple[int, int]]:
    """Stream the tars through a buffer of 1000."""
    import webdataset as wds

    for sample in wds.WebDataset(urls(folder), shardshuffle=100).shuffle(1000):
        yield 1, len(sample["0.jpg"])


def shuffled(shards: ShardSet) -> list[list[int]]:
    """Deal all rows into batches."""
    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


@dataclass(frozen=True)
class Blob:
    """The bytes of a batch, as our workers hand over everything: one tensor, and where in it things begin and end."""

    data: torch.Tensor  # uint8[bytes]
    sizes: torch.Tensor  # int64[samples, members]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Blob:
        """Put both tensors through `change`."""
        return Blob(change(self.data), change(self.sizes))


class Blobs(IterableDataset):
    """Batches of bytes, in random order."""

    def __init__(self, folder: Path) -> None:
        """Open the shards; make what batches are handed over in, two in waiting, one in use and one being filled a worker."""
        self.shards = open_shards([folder])
        self.buffers = Buffers(workers=WORKERS, each=4, size=2**24)

    def __iter__(self) -> Iterator[Blob | Parcel]:
        """Yield this worker's batches."""
        worker = get_worker_info()
        for rows in shuffled(self.shards)[worker.id :: worker.num_workers]:
            found = self.shards.read_raw(rows)
            data = torch.frombuffer(bytearray().join(chain.from_iterable(found)), dtype=torch.uint8)
            sizes = torch.tensor([[len(member) for member in members] for members in found])
            yield self.buffers.pack(Blob(data, sizes), worker=worker.id)


def ours_workers(folder: Path) -> Iterator[tuple[int, int]]:
    """Read in random order in workers; records and pictures come back unparsed, a tensor a batch."""
    for blob in DataLoader(Blobs(folder), batch_size=None, num_workers=WORKERS):
        yield len(blob.sizes), int(blob.sizes[:, 1:].sum())


def webdataset_workers(folder: Path) -> Iterator[tuple[int, int]]:
    """Stream the tars in workers; dictionaries of bytes come back."""
    import webdataset as wds

    data = wds.WebDataset(urls(folder), shardshuffle=False)
    for batch in DataLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=list):
        yield len(batch), sum(len(sample["0.jpg"]) for sample in batch)


# --- decoded and resized ---------------------------------------------------------------------------------------------


def module(folder: Path, *, epochs: int = 1, workers: int = WORKERS) -> ShardDataModule:
    """Build the data module of training, with rows of 8192 tokens and four of them a batch."""
    return ShardDataModule(
        train=[folder],
        tokenizer=TOKENIZER,
        resolution=RESOLUTION,
        max_tokens=8192,
        packs_per_batch=4,
        epochs=epochs,
        num_workers=workers,
    )


def ours_decoded(folder: Path) -> Iterator[tuple[int, int]]:
    """Run the loader of training: planned, packed, rendered, tokenised, decoded, resized, cut into patches."""
    data = module(folder)
    for batch in data.train_dataloader():
        data.consumed(batch)
        yield len(batch.keys), batch.images.patches.numel()


def to_array(sample: dict[str, bytes]) -> tuple[np.ndarray, dict]:
    """Decode with Pillow and resize."""
    image = Image.open(io.BytesIO(sample["0.jpg"])).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    return np.array(image), json.loads(sample["json"])


def pillow_decoded(folder: Path) -> Iterator[tuple[int, int]]:
    """Stream the tars; Pillow decodes and resizes; lists of arrays come back."""
    import webdataset as wds

    data = wds.WebDataset(urls(folder), shardshuffle=False).map(to_array)
    for batch in DataLoader(data, batch_size=BATCH, num_workers=WORKERS, collate_fn=list):
        yield len(batch), sum(array.size for array, _ in batch)


READING: dict[str, Case] = {
    "webdataset": webdataset,
    "webdataset, shuffle 1000": webdataset_shuffled,
    "ours": ours,
    "ours, parsed": ours_parsed,
}
IN_WORKERS: dict[str, Case] = {"webdataset": webdataset_workers, "ours": ours_workers}
DECODED: dict[str, Case] = {"webdataset + Pillow, lists of arrays": pillow_decoded, "ours": ours_decoded}
