"""How batches get from a worker to the process that trains: in shared memory that is used again.

What torch hands over lies in fresh pages every time, and a fresh page costs several times what it takes to fill one that is there already.
Here a batch is copied into one of a few buffers whose pages stay. A buffer is free again when the last tensor of its batch is gone, views
included; when none is free, because somebody keeps batches, a batch goes torch's way.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from itertools import count
from typing import Protocol, Self, TypeVar

import numpy as np
import torch

_ALIGN = 64  # bytes: a cache line
_numbers = count()
_known: weakref.WeakValueDictionary[int, Buffers] = weakref.WeakValueDictionary()


class Tensors(Protocol):
    """Something made of tensors, such as a batch."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Put every tensor through `change`, always in the same order."""


B = TypeVar("B", bound=Tensors)


class Buffers:
    """Shared memory of some workers. Made by the process that receives; workers get it by a fork or by pickling."""

    def __init__(self, *, workers: int, each: int, size: int) -> None:
        """`each` buffers of at most `size` bytes for every worker; memory is taken only as far as it is filled."""
        self._number, self._workers = next(_numbers), workers
        self._memory = [_shared(size) for _ in range(workers * each)]
        self._taken = _shared(len(self._memory)).zero_()  # uint8: 1 from when a worker fills a buffer until the receiver is done with it
        _known[self._number] = self

    def pack(self, batch: B, *, worker: int) -> B | Parcel:
        """Copy a batch into a free buffer of this worker, to be sent in its place; as it is when there is none, or none so large."""
        tensors: list[torch.Tensor] = []
        empty = batch.map(lambda tensor: tensors.append(tensor) or torch.empty_like(tensor, device="meta"))
        sizes = [-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors]
        mine = range(worker, len(self._memory), self._workers)
        number = next((number for number in mine if not self._taken[number]), None)
        if number is None or sum(sizes) > len(self._memory[number]):
            return batch
        self._taken[number] = 1
        for tensor, part in zip(tensors, self._memory[number][: sum(sizes)].split(sizes), strict=True):
            _view(part, tensor).copy_(tensor)
        return Parcel(self._number, number, sizes, empty)

    def unpack(self, number: int, sizes: list[int], empty: B) -> B:
        """Return the batch that lies in a buffer."""
        lease = self._memory[number].numpy()  # a new array each time, which lives as long as any tensor that is made of it
        weakref.finalize(lease, _release, self._taken.numpy(), number, process=os.getpid()).atexit = False
        parts = iter(torch.from_numpy(lease)[: sum(sizes)].split(sizes))
        return empty.map(lambda tensor: _view(next(parts), tensor))


class Parcel:
    """A batch on its way: pickled by a worker, it is unpickled as the batch."""

    def __init__(self, buffers: int, number: int, sizes: list[int], empty: Tensors) -> None:
        """`empty`: the batch with tensors without memory."""
        self._contents = (buffers, number, sizes, empty)

    def __reduce__(self) -> tuple[Callable[..., Tensors], tuple]:
        """Become a batch."""
        return _open, self._contents


def _open(buffers: int, number: int, sizes: list[int], empty: B) -> B:
    return _known[buffers].unpack(number, sizes, empty)


def _release(taken: np.ndarray, number: int, *, process: int) -> None:
    if os.getpid() == process:  # not in a fork, where another copy of the tensors went
        taken[number] = 0


def _view(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View the first bytes of uint8 memory as a tensor."""
    return memory[: like.nbytes].view(like.dtype).view(like.shape)


def _shared(size: int) -> torch.Tensor:
    """Return uint8[size] of shared memory that takes no pages before they are written to."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
