"""Compiled blocks: no graph break, and no new graph for a pack of another composition."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from infimed.contracts import Images, borders, bucket
from infimed.models.compile import compile_blocks
from tests.conftest import IMAGE_ID, noise

T = 64
PACKS = ((20, 30), (10, 11, 12, 13), (40,), (5,) * 8, (31, 17, 9), (7,) * 5, (25, 25), (3,) * 13)
GRIDS = (((4, 4),), ((4, 4),) * 3, ((4, 4),) * 2, ((4, 4),) * 5, ((4, 4),) * 4, ((4, 4),) * 7, ((4, 4),), ((4, 4),) * 6)


def pack(lengths: tuple[int, ...], images: Images) -> dict:
    """A row of T tokens whose first tokens are the images' (4 each): enough for counting graphs."""
    ids = torch.randint(0, IMAGE_ID, (1, T))
    ids[0, : 4 * len(images)] = IMAGE_ID
    segments = [*lengths, T - sum(lengths)]
    positions = torch.cat([torch.arange(length) for length in segments]).unsqueeze(0)
    labels = torch.where(ids == IMAGE_ID, -100, ids)
    labels[0, 0] = -100
    where = {"position_ids": positions, "cu_seqlens": borders(segments), "max_seqlen": min(bucket(max(segments)), T)}
    return {"input_ids": ids, "labels": labels, "images": images, **where}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_packs_of_any_composition_are_compiled_once_and_give_the_same_numbers(make_model):
    model, plain = make_model(), make_model()
    plain.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter)
    frames, worst = [], 0.0
    for lengths, grids in zip(PACKS, GRIDS, strict=True):
        batch = pack(lengths, noise(*grids))
        model(**batch).total.backward()
        frames.append(counter.frame_count)
        plain(**batch).total.backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            worst = max(worst, float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max().clamp(min=1e-3)))
    assert frames[0] == 2  # the decoder block and the tower block, whatever the number of layers
    assert frames[2] <= 6  # slots, patches and the bound on lengths turn symbolic when they change for the first time
    assert frames[2:] == [frames[2]] * (len(PACKS) - 2)
    assert worst < 1e-5  # seen: 0
    model(**pack((20, 30), noise())).total.backward()
    assert counter.frame_count == frames[-1]  # a row without images: ranks must not wait for one that compiles


def test_parameters_keep_their_names(make_model):
    model = make_model()
    names = set(model.state_dict())
    compile_blocks(model, backend="eager")
    assert set(model.state_dict()) == names
