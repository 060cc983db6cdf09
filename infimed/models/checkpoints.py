"""Our own checkpoints: found the ways people type them, read without running code, written again as a folder of safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import torch

from infimed.contracts import UserError

MODULE_PREFIX = "model."  # the LightningModule holds the model under this name
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the types in the safetensors format."""

HEADER_ROOM = 1 << 20  # bytes kept free for headers and the index, far above what they take


def find_checkpoint(path: str | Path) -> Path:
    """Resolve what a user types: a `.ckpt` file, the same without its ending, or a run folder that holds `last.ckpt`."""
    path = Path(path)
    for candidate in (path, Path(f"{path}.ckpt"), path / "last.ckpt", path / "checkpoints" / "last.ckpt"):
        if candidate.is_file():
            return candidate
        if (candidate / ".metadata").is_file():
            raise UserError(f"{candidate} is a sharded checkpoint (torch.distributed.checkpoint); expected one .ckpt file")
    found = sorted(path.glob("**/last.ckpt")) if path.is_dir() else sorted(Path("logs").glob("**/last.ckpt"))
    hint = f"; these exist: {', '.join(map(str, found[-5:]))}" if found else "; train one first: make demo"
    raise UserError(f"no checkpoint at {path}: expected a .ckpt file or a run folder that holds last.ckpt{hint}")


def read_checkpoint(file: Path, *, mmap: bool = False) -> dict:
    """Read one of our checkpoints: plain tensors and plain values only (`weights_only=True`).

    Args:
        mmap: leave the tensors on the disk until they are used.

    Raises:
        UserError: not a checkpoint of ours.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file fails in any way
        raise UserError(f"{file} is not a readable checkpoint ({type(error).__name__}): it may be truncated; take an older one") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or not isinstance(checkpoint.get("infimed"), dict):
        raise UserError(f"{file} was not written by this project: expected the weights and the configuration that it was trained with")
    return checkpoint


def state_of(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """Return the weights by the names that the model has for them: `vision.`, `projector.`, `language.`."""
    return {key.removeprefix(MODULE_PREFIX): value for key, value in checkpoint["state_dict"].items()}


def read_state(ckpt: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the weights of a checkpoint, memory-mapped, and the configuration that it was trained with; needs no GPU and next to no RAM."""
    checkpoint = read_checkpoint(find_checkpoint(ckpt), mmap=True)
    return state_of(checkpoint), checkpoint["infimed"].get("config", {})


def write_safetensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None, max_shard_bytes: int = 4 * 2**30
) -> None:
    """Write tensors as `model.safetensors`, or as numbered files with an index, one tensor in memory at a time.

    The folder appears whole or not at all; one that is there already keeps its other files.

    Args:
        folder: must not hold safetensors yet.
        tensors: may be lazy: each value is asked for twice, once for its shape. What shares memory is written once a name.
        dtype: what floating-point tensors are turned into; None: as they are.
        max_shard_bytes: of a file's tensors; a larger tensor has a file of its own.

    Raises:
        UserError: the folder holds weights, the disk is too small, or a tensor's type has no name in the format.
    """
    if any(folder.glob("model*.safetensors*")):
        raise UserError(f"{folder} holds safetensors already: name another folder, or remove model*.safetensors*")
    plan = {name: _entry(name, tensor, dtype) for name, tensor in tensors.items()}
    _check_disk(folder, sum(size for *_, size in plan.values()) + HEADER_ROOM)
    shards = _cut(plan, max_shard_bytes)
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    part = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}.tmp")
    try:
        part.mkdir(parents=True)
        for name, shard in zip(names, shards, strict=True):
            _write_file(part / name, {key: plan[key] for key in shard}, tensors)
        if count > 1:
            index = {
                "metadata": {"total_size": sum(size for *_, size in plan.values())},
                "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
            }
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


Entry = tuple[torch.dtype, list[int], int]  # type that is written, shape, bytes


def _entry(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> Entry:
    kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if kept not in DTYPES:
        raise UserError(f"{name} is {kept}, which cannot be written; expected one of {', '.join(map(str, DTYPES))}")
    return kept, list(tensor.shape), tensor.numel() * kept.itemsize


def _check_disk(folder: Path, needed: int) -> None:
    """Refuse before the first byte. Raises: UserError."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        fix = f"{free / 2**30:.2f} GiB are free at {there}: free some space or name another disk"
        raise UserError(f"writing {folder} needs {needed / 2**30:.2f} GiB, {fix}")


def _cut(plan: Mapping[str, Entry], limit: int) -> list[list[str]]:
    """Fill files in the order of the tensors; inside a file the widest types come first, so that all are aligned."""
    shards, filled = [[]], 0
    for name, (*_, size) in plan.items():
        if shards[-1] and filled + size > limit:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += size
    return [sorted(shard, key=lambda name: -plan[name][0].itemsize) for shard in shards]


def _write_file(path: Path, entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one file of the safetensors format: length of the header, header, bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape, _) in entries.items():
            _write_tensor(file, tensors[name], dtype, shape)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, tensor: torch.Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    assert list(tensor.shape) == shape  # a lazy mapping gives the same twice
    if tensor.numel():
        file.write(memoryview(tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy()))


def _publish(part: Path, folder: Path) -> None:
    """Give the finished files their names, the index last: without it nothing reads the others."""
    if not folder.exists():
        part.rename(folder)
        return
    for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".json"):
        file.rename(folder / file.name)
