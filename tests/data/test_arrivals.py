"""Samples that are too long: dropped, refused or split, and counted."""

import json
import random
from itertools import pairwise

import pytest

from infimed.contracts import UserError
from infimed.data.arrivals import joined, pieces_of
from infimed.data.catalogue import Table
from infimed.data.plan import Plan


def make_plan(lengths: list[int], *, sources: list[str] | None = None, cuts: dict | None = None, **changes: object) -> Plan:
    visual = [sum(stop - start for start, stop in (cuts or {}).get(row, ())) for row in range(len(lengths))]
    table = Table(lengths, sources=sources, cuts=cuts, visual=visual, patches=visual, patch_pairs=visual)
    return Plan(table, **{"max_tokens": 64, "epochs": 1, "seed": 1, **changes})


def packs(plan: Plan) -> list:
    return [pack for step in plan for hand in step.hands for pack in hand if pack.rows]


def test_pieces_follow_each_other_with_one_token_of_context():
    assert pieces_of(0, 25, 10, ()) == [(0, 10), (9, 19), (18, 25)]
    assert pieces_of(0, 10, 10, ()) == [(0, 10)]
    assert pieces_of(0, 11, 10, ()) == [(0, 10), (9, 11)]


def test_a_piece_ends_before_an_image_that_would_be_cut():
    assert pieces_of(0, 20, 10, [(6, 14)]) == [(0, 6), (6, 16), (15, 20)]
    assert pieces_of(0, 20, 10, [(6, 10)]) == [(0, 10), (10, 20)]  # the image ends the piece: no text to go on from
    assert pieces_of(0, 11, 10, [(6, 10)]) == [(0, 10)]  # one token after an image teaches nothing
    assert pieces_of(0, 12, 10, [(1, 11)]) == [(1, 11)]


def test_an_image_longer_than_a_row_makes_the_sample_too_long():
    assert pieces_of(0, 30, 10, [(5, 16)]) == []


def test_pieces_of_any_sample_cover_its_text_and_cut_no_image():
    draw = random.Random(0)
    for _ in range(500):
        most, length, images, place = draw.randint(4, 20), draw.randint(2, 120), [], 0
        while place + 8 < length:
            start = place + draw.randint(0, 6)
            place = start + draw.randint(1, most)
            if place <= length:
                images.append((start, place))
        pieces = pieces_of(0, length, most, images)
        learned = {token for start, stop in pieces for token in range(start + 1, stop)}
        assert all(2 <= stop - start <= most for start, stop in pieces)
        assert all(sum(start <= a and b <= stop for start, stop in pieces) <= 1 for a, b in images)
        for a, b in images:
            assert not any(start < a < stop < b or a < start < b for start, stop in pieces)
        # Not predicted are only the first token, tokens of images, and one that follows an image.
        assert set(range(1, length)) - learned <= {t for a, b in images for t in range(a, b + 1)}
        assert all(second[0] - first[1] in (0, -1) or any(a <= first[1] <= b for a, b in images) for first, second in pairwise(pieces))


def test_dropped_samples_are_counted_by_source_as_they_are_met():
    plan = make_plan([10, 65, 64, 200], sources=list("abab"), on_overflow="drop")
    assert plan.overlong == {}
    assert sorted(row for pack in packs(plan) for row in pack.rows) == [0, 2]
    assert plan.overlong == {"b": 2}
    assert plan.shown() == {"a": 2, "b": 0}


def test_an_error_names_how_many_how_long_and_of_what():
    with pytest.raises(UserError, match=r"2 samples exceed max_tokens=64 \(longest 200; b: 2\)"):
        make_plan([10, 65, 64, 200], sources=list("abab"), on_overflow="error")
    assert packs(make_plan([10, 64], on_overflow="error"))
    with pytest.raises(UserError, match="on_overflow='cut': expected one of drop, error, split"):
        make_plan([10], on_overflow="cut")


def test_nothing_that_fits_is_said_at_once_and_not_searched_for_for_ever():
    for lengths in ([65], [65, 100] * 5000, []):
        with pytest.raises(UserError, match=f"none of {len(lengths)} samples"):
            make_plan(lengths)
    with pytest.raises(UserError, match="none of the samples shown now fits"):
        packs(make_plan([65] * 9, on_overflow="split", cuts={row: [(0, 65)] for row in range(9)}, epochs=None, steps=3))


def test_a_split_sample_comes_whole_in_pieces_and_others_say_that_they_are_all_there():
    lengths = [20, 150, 40, 500, 30, 90]
    plan = make_plan(lengths, on_overflow="split", cuts={1: [(50, 80)], 3: [(100, 170)]}, sources=list("aabbab"))
    shown = packs(plan)
    spans = {row: [] for row in range(6)}
    for pack in shown:
        whole = [(0, lengths[row]) for row in pack.rows]
        assert sum(stop - start for start, stop in pack.spans or whole) == pack.tokens <= 64
        for row, span in zip(pack.rows, pack.spans or whole, strict=True):
            spans[row].append(span)
    assert {row: sorted(found) for row, found in spans.items()} == {
        0: [(0, 20)],
        1: [(0, 50), (50, 114), (113, 150)],
        2: [(0, 40)],
        3: [],  # an image of 70 tokens
        4: [(0, 30)],
        5: [(0, 64), (63, 90)],
    }
    assert plan.overlong == {"b": 1}


def test_positions_among_pieces_are_saved_and_go_on_identically():
    draw = random.Random(3)
    lengths = [draw.choice([draw.randint(2, 60), draw.randint(65, 400)]) for _ in range(60)]
    settings = {"on_overflow": "split", "buffer": 8, "packs_per_batch": 2, "epochs": 2}
    whole = list(make_plan(lengths, **settings))
    for stop in range(0, len(whole), 5):
        first, second = make_plan(lengths, **settings), make_plan(lengths, **settings)
        for _ in range(stop):
            next(first)
        second.load_state_dict(first.state_dict())
        assert list(second) == whole[stop:]


def test_a_piece_that_waits_is_split_again_for_shorter_rows():
    first = make_plan([100, 100, 100], on_overflow="split")
    shown = {row: set(range(100)) for row in range(3)}
    learned = {row: set() for row in range(3)}
    second = make_plan([100, 100, 100], on_overflow="split", max_tokens=16)
    step = next(first)
    second.load_state_dict(first.state_dict())
    for pack in [pack for hand in step.hands for pack in hand] + packs(second):
        for row, (start, stop) in zip(pack.rows, pack.spans, strict=True):
            assert not learned[row] & set(range(start + 1, stop))
            learned[row] |= set(range(start + 1, stop))
    assert learned == {row: tokens - {0} for row, tokens in shown.items()}


def test_images_cost_the_piece_that_they_are_in():
    table = Table([100], cuts={0: [(60, 100)]}, patches=[1000], patch_pairs=[10])
    arrivals = Plan(table, max_tokens=60, epochs=1, on_overflow="split")._arrivals
    entries, lengths, costs, _ = arrivals.admit([0])
    assert (entries, lengths) == ([(0, 0, 60), (0, 60, 100)], [60, 40])
    price = arrivals.price
    text, image = price.token * 60 + price.pair * 60**2, price.token * 40 + price.pair * 40**2
    assert costs == [text, image + price.patch * 1000 + price.patch_pair * 10]


def test_the_state_stays_small_with_samples_of_thousands_of_pieces_and_continues_identically():
    draw = random.Random(1)
    lengths = [draw.choice([30, 60_000, 150]) for _ in range(30)]
    cuts = {row: [(start, start + 40) for start in range(draw.randint(1, 90), length - 40, 117)] for row, length in enumerate(lengths)}
    plan = make_plan(lengths, cuts=cuts, on_overflow="split", max_tokens=64)
    for _ in range(60):
        next(plan)
        state = json.loads(json.dumps(plan.state_dict()))
        assert len(json.dumps(state)) < 10_000
    again = make_plan(lengths, cuts=cuts, on_overflow="split", max_tokens=64)
    again.load_state_dict(state)
    assert packs(again) == packs(plan)


def test_runs_are_joined_to_what_is_cut_into_the_same_pieces_again():
    draw, pieces, written = random.Random(2), 0, 0
    for _ in range(300):
        most, length = draw.randint(6, 20), draw.randint(30, 200)
        images = [(start, start + draw.randint(2, 6)) for start in range(draw.randint(0, 9), length - 6, draw.randint(7, 30))]
        left = [(7, *piece) for piece in pieces_of(0, length, most, images) if draw.random() < 0.8]
        runs = joined([3, *left, 4])
        assert [(7, *piece) for _, start, stop in runs[1:-1] for piece in pieces_of(start, stop, most, images)] == left
        assert runs[0] == 3
        assert runs[-1] == 4
        pieces, written = pieces + len(left), written + len(runs) - 2
    assert written < pieces / 2
