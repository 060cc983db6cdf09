from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from infimed.data.handover import Buffers, Parcel


@dataclass(frozen=True)
class Pair:
    pixels: torch.Tensor
    ids: torch.Tensor
    name: str = ""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Pair:
        return Pair(change(self.pixels), change(self.ids), self.name)


def pair(number: int, *, rows: int = 100) -> Pair:
    return Pair(torch.full((rows, 3), number % 256, dtype=torch.uint8), torch.arange(number, number + 5).view(1, 5), f"n{number}")


def is_pair(found: Pair, number: int, *, rows: int = 100) -> bool:
    same = torch.equal(found.pixels, pair(number, rows=rows).pixels) and torch.equal(found.ids, pair(number).ids)
    return same and found.name == f"n{number}" and found.ids.dtype == torch.int64


class Pairs(IterableDataset):
    def __init__(self, buffers: Buffers, count: int) -> None:
        self.buffers, self.count = buffers, count

    def __iter__(self) -> Iterator[Pair | Parcel]:
        worker = get_worker_info()
        for number in range(worker.id, self.count, worker.num_workers):
            yield self.buffers.pack(pair(number), worker=worker.id)


def sent(buffers: Buffers, batch: Pair, *, worker: int = 0) -> Pair:
    """Send a batch to this very process."""
    parcel = buffers.pack(batch, worker=worker)
    if isinstance(parcel, Pair):
        return parcel
    become, contents = parcel.__reduce__()
    return become(*contents)


def is_in_buffer(buffers: Buffers, tensor: torch.Tensor) -> bool:
    return any(0 <= tensor.data_ptr() - memory.data_ptr() < len(memory) for memory in buffers._memory)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_of_workers_arrive_as_they_were(context):
    buffers = Buffers(workers=2, each=3, size=4096)
    loader = DataLoader(Pairs(buffers, 12), batch_size=None, num_workers=2, multiprocessing_context=context)
    in_buffers = []
    for number, found in enumerate(loader):
        assert is_pair(found, number)
        in_buffers.append(is_in_buffer(buffers, found.pixels) and is_in_buffer(buffers, found.ids))
    assert all(in_buffers)


def test_batches_that_are_kept_are_never_written_over():
    buffers = Buffers(workers=2, each=2, size=4096)
    kept = list(DataLoader(Pairs(buffers, 40), batch_size=None, num_workers=2))
    assert all(is_pair(found, number) for number, found in enumerate(kept))
    assert sum(is_in_buffer(buffers, found.pixels) for found in kept) == 4  # the rest went torch's way


def test_a_buffer_is_used_again_when_the_last_view_of_its_batch_is_gone():
    buffers = Buffers(workers=1, each=1, size=4096)
    found = sent(buffers, pair(1))
    view = found.ids.view(-1)[2:3]
    del found
    gc.collect()
    assert not is_in_buffer(buffers, sent(buffers, pair(2)).ids)
    assert view.item() == 3
    del view
    assert is_in_buffer(buffers, sent(buffers, pair(2)).ids)


def test_workers_keep_to_their_own_buffers():
    buffers = Buffers(workers=2, each=1, size=4096)
    second, first = sent(buffers, pair(2), worker=1), sent(buffers, pair(1), worker=0)
    assert [found.pixels.data_ptr() for found in (first, second)] == [memory.data_ptr() for memory in buffers._memory]
    assert is_pair(first, 1) and is_pair(second, 2)
    assert not is_in_buffer(buffers, sent(buffers, pair(3), worker=1).pixels)


def test_a_batch_larger_than_a_buffer_and_one_of_empty_tensors_arrive():
    buffers = Buffers(workers=1, each=2, size=4096)
    assert is_pair(sent(buffers, pair(5, rows=5000)), 5, rows=5000)
    empty = sent(buffers, Pair(torch.empty(0, 3, dtype=torch.uint8), torch.empty(1, 0, dtype=torch.int64)))
    assert empty.pixels.shape == (0, 3) and empty.ids.shape == (1, 0)


def test_every_tensor_begins_at_a_cache_line():
    found = sent(Buffers(workers=1, each=1, size=4096), pair(1, rows=7))
    assert found.pixels.data_ptr() % 64 == found.ids.data_ptr() % 64 == 0


def test_a_fork_of_the_receiver_does_not_free_what_the_receiver_still_holds():
    buffers = Buffers(workers=1, each=1, size=4096)
    found = [sent(buffers, pair(1))]
    if (child := os.fork()) == 0:
        found.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert not is_in_buffer(buffers, sent(buffers, pair(2)).ids)
    assert is_pair(found[0], 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_memory_is_taken_only_as_far_as_it_is_filled():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    buffers = Buffers(workers=4, each=4, size=2**26)
    sent(buffers, pair(1))
    assert resident() - before < 2**24  # of 2 ** 30; seen: 2 ** 16
