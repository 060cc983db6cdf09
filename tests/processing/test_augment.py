"""Jitter: what it may change, and that chance comes from the sample alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from infimed.contracts import UserError
from infimed.processing.augment import Jitter, stream

ALL = Jitter(brightness=0.2, contrast=0.3, shift=0.1)
SEEDS = (0, 1, 2**32, 2**64 - 1)


def _picture(height: int = 20, width: int = 30, *, layout: str = "interleaved") -> torch.Tensor:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(40, 200, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)
    return pixels.contiguous() if layout == "planar" else pixels


def _changed(change: Jitter, *, seed: int = 1, number: int = 0, **picture: object) -> torch.Tensor:
    return change(_picture(**picture), stream(seed, number))


@pytest.mark.parametrize("change", [Jitter(brightness=1.0), Jitter(contrast=1.0), Jitter(shift=0.5), ALL])
@pytest.mark.parametrize(("height", "width"), [(20, 30), (1, 7), (1, 1)])
@pytest.mark.parametrize("layout", ["interleaved", "planar"])
def test_size_and_type_are_kept_and_the_picture_itself_is_left_alone(change, height, width, layout):
    picture = _picture(height, width, layout=layout)
    before = picture.clone()
    for seed in range(20):
        changed = change(picture, stream(seed, 0))
        assert (changed.shape, changed.dtype) == (picture.shape, torch.uint8)
    assert torch.equal(picture, before)


def test_zeros_and_p_0_change_nothing():
    for change in (Jitter(), Jitter(brightness=1.0, contrast=1.0, shift=0.5, p=0.0)):
        assert all(torch.equal(_changed(change, seed=seed), _picture()) for seed in range(20))


def test_the_same_seed_gives_the_same_bytes_whatever_came_before():
    cases = [(seed, number) for seed in SEEDS for number in range(3)]
    first = {case: _changed(ALL, seed=case[0], number=case[1]) for case in cases}
    for case in reversed(cases):
        np.random.random()  # nobody's generator counts
        torch.rand(1)
        assert torch.equal(_changed(ALL, seed=case[0], number=case[1]), first[case])
    assert len({changed.numpy().tobytes() for changed in first.values()}) == len(cases)  # each seed and each image its own


def test_another_process_draws_the_same():
    program = f"from infimed.processing.augment import stream; print([stream(seed, 1).random() for seed in {SEEDS}])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([stream(seed, 1).random() for seed in SEEDS])


def test_p_is_the_share_of_pictures_that_change():
    change = Jitter(brightness=0.5, p=0.3)
    count = sum(not torch.equal(_changed(change, seed=seed, height=4, width=4), _picture(4, 4)) for seed in range(1000))
    assert 250 < count < 350  # measured: 290; a brightness that rounds to none is rare


def test_brightness_adds_within_its_limit_and_is_the_same_for_every_value():
    added = [(_changed(Jitter(brightness=0.1), seed=seed).int() - _picture().int()).unique().tolist() for seed in range(200)]
    assert all(len(values) == 1 for values in added)
    assert (min(added)[0], max(added)[0]) == (-25, 25)  # of 255, a tenth


def test_contrast_keeps_the_mean_and_stretches_around_it():
    spreads = []
    for seed in range(200):
        changed, picture = _changed(Jitter(contrast=0.3), seed=seed).double(), _picture().double()
        assert abs(changed.mean() - picture.mean()) < 0.5
        spreads.append(float(changed.std() / picture.std()))
    assert 0.7 <= min(spreads) < 0.72 < 1.28 < max(spreads) <= 1.3 + 1e-2


def test_values_stop_at_black_and_white_and_keep_their_order():
    order, seen = _picture().flatten().argsort(), []
    for seed in range(50):
        seen.append(_changed(Jitter(brightness=1.0, contrast=1.0), seed=seed))
        assert (seen[-1].flatten()[order].int().diff() >= 0).all()
    assert (torch.stack(seen).min(), torch.stack(seen).max()) == (0, 255)


def test_a_shift_moves_and_draws_out_the_edge_but_never_mirrors():
    height, width = 20, 30
    picture = (torch.arange(height)[:, None] * 7 + torch.arange(width) * 4).to(torch.uint8).expand(3, -1, -1)

    def moved(down: int, right: int) -> torch.Tensor:
        rows, columns = ((torch.arange(side) - by).clamp(0, side - 1) for side, by in ((height, down), (width, right)))
        return picture[:, rows][:, :, columns]

    places = {(down, right): moved(down, right) for down in range(-2, 3) for right in range(-3, 4)}  # a tenth of each side
    seen = set()
    for seed in range(300):
        changed = Jitter(shift=0.1)(picture, stream(seed, 0))
        found = [place for place, expected in places.items() if torch.equal(changed, expected)]
        assert len(found) == 1, seed
        seen.update(found)
    assert {down for down, _ in seen} == set(range(-2, 3))
    assert {right for _, right in seen} == set(range(-3, 4))


def test_everything_wrong_is_said_at_once():
    with pytest.raises(UserError) as caught:
        Jitter(brightness=-0.1, contrast=float("nan"), shift=0.6, p=True)
    lines = str(caught.value).splitlines()
    assert [line.split("=")[0] for line in lines] == ["- augment.brightness", "- augment.contrast", "- augment.shift", "- augment.p"]
    assert lines[2] == "- augment.shift=0.6: expected a number from 0 to 0.5"
    Jitter(brightness=1, contrast=1, shift=0.5, p=1)  # limits are allowed, whole numbers too
