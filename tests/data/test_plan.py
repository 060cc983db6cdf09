"""The global plan: full rows, equal steps, and the same continuation from any position."""

import json
import pickle
import random
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest

from infimed.contracts import UserError
from infimed.data.catalogue import Table
from infimed.data.mixture import Mixing
from infimed.data.packing import Price
from infimed.data.plan import Plan, Step

Args = dict[str, object]


def lengths_of(count: int, seed: int = 0, longest: int = 60) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(count)]


def make_plan(lengths: list[int], *, sources: list[str] | None = None, fingerprint: str = "f", **changes: object) -> Plan:
    table = Table(lengths, sources=sources, shards=[row // 16 for row in range(len(lengths))], fingerprint=fingerprint)
    settings: Args = {"max_tokens": 64, "epochs": 1, "buffer": 16, "seed": 1, "open_shards": 2}
    return Plan(table, **{**settings, **changes})


def shown(steps: list[Step]) -> Counter[int]:
    return Counter(row for step in steps for hand in step.hands for pack in hand for row in pack.rows)


def saved(plan: Plan) -> dict:
    return json.loads(json.dumps(plan.state_dict()))


def test_a_plan_continues_identically_from_the_state_of_any_step():
    mixtures = [
        Mixing(epochs_of={"a": 1.5}),
        Mixing(shares={"a": 1, "b": 3}),
        Mixing(curriculum=[(0, {"a": 1, "b": 1}), (7, {"a": 0, "b": 1})]),
    ]
    for mixing in mixtures:

        def build(mixing: Mixing = mixing) -> Plan:
            return make_plan(lengths_of(90), sources=list("abb" * 30), mixing=mixing, epochs=2, world_size=2, packs_per_batch=2)

        whole, states, walker = list(build()), [], build()
        len(walker)
        for _ in whole:
            states.append(saved(walker))
            next(walker)
        for stop, state in enumerate(states):
            second = build()
            second.load_state_dict(state)
            assert saved(second) == state
            assert second.step == stop
            assert len(second) == len(whole)
            assert list(second) == whole[stop:]


def test_a_state_says_the_same_whoever_took_it_and_however_it_came_there():
    whole, resumed = make_plan(lengths_of(200)), make_plan(lengths_of(200))
    for _ in range(12):
        next(whole)
        again = make_plan(lengths_of(200))
        again.load_state_dict(saved(resumed))
        resumed = again
        next(resumed)
        assert saved(whole) == saved(resumed)
        assert whole.digest() == resumed.digest()


def test_copies_and_pickles_move_on_their_own():
    plan = make_plan(lengths_of(90))
    list(islice(plan, 5))
    before = saved(plan)
    rest = [list(plan.copy()), list(pickle.loads(pickle.dumps(plan)))]
    assert saved(plan) == before
    assert rest == [list(plan)] * 2


def test_the_state_is_small_plain_and_free_of_the_world_size():
    draw = random.Random(0)
    lengths = [draw.randint(64, 6000) for _ in range(5000)]
    states = []
    for ranks in (1, 4):
        plan = make_plan(lengths, max_tokens=8192, buffer=192, world_size=ranks, packs_per_batch=8 // ranks)
        list(islice(plan, 40))
        states.append(json.dumps(plan.state_dict()))
    assert states[0] == states[1]
    sources = [f"source-{row % 40}" for row in range(50_000)]
    short = make_plan([20] * 50_000, sources=sources, max_tokens=8192, mixing=Mixing(temperature=3.0))
    next(short)
    assert len(states[0]) < len(json.dumps(short.state_dict())) < 10_000
    assert len(short.state_dict()["buffer"]) <= 512


def test_the_digest_tells_positions_and_settings_apart():
    plans = [make_plan(lengths_of(50), **change) for change in ({}, {"max_tokens": 63}, {"world_size": 2}, {"buffer": 17}, {"seed": 2})]
    moved, repriced = make_plan(lengths_of(50)), make_plan(lengths_of(50))
    next(moved)
    repriced.reprice(Price(1, 2, 3, 4))
    digests = [plan.digest() for plan in (*plans, moved, repriced)]
    assert len(set(digests)) == len(digests)
    assert all(0 <= digest < 2**63 for digest in digests)
    counted = make_plan(lengths_of(50))
    len(counted)
    assert counted.digest() == digests[0]


def test_epochs_run_into_each_other_without_a_flush_and_differ():
    steps = list(make_plan([16] * 102, epochs=3))  # four fill a row: 25.5 rows an epoch
    rows = [row for step in steps for hand in step.hands for pack in hand for row in pack.rows]
    assert len(steps) == 77 < 3 * len(make_plan([16] * 102, epochs=1))
    assert len({tuple(rows[start : start + 102]) for start in (0, 102, 204)}) == 3


def test_packs_are_numbered_through_whatever_the_world_size():
    for ranks in (1, 2, 4):
        packs = [
            pack for step in make_plan(lengths_of(100), world_size=ranks, packs_per_batch=4 // ranks) for h in step.hands for pack in h
        ]
        numbers = sorted(pack.number for pack in packs if pack.rows)
        assert numbers == list(range(len(numbers)))


def test_packed_rows_are_fuller_than_sequential_ones_and_those_than_padded_ones():
    draw = random.Random(0)
    kinds = [(0.4, lambda: draw.randint(128, 1129)), (0.35, lambda: draw.randint(100, 800)), (0.25, lambda: draw.randint(1000, 6000))]
    lengths = [draw.choices([kind for _, kind in kinds], [share for share, _ in kinds])[0]() for _ in range(3000)]
    use = {}
    for packing in ("packed", "unisolated", "sequential", "padded"):
        packs = [p for step in make_plan(lengths, max_tokens=8192, buffer=128, packing=packing) for hand in step.hands for p in hand]
        use[packing] = sum(lengths) / (len(packs) * 8192)
    assert use["packed"] == use["unisolated"] > 0.99
    assert use["packed"] > use["sequential"] > 0.8 > 0.2 > use["padded"]


@pytest.mark.parametrize(("lengths", "max_tokens"), [([1] * 30_000, 4096), ([1, 2, 3] * 8000, 8192), ([20] * 30_000, 32_768)])
def test_rows_are_full_although_no_more_than_512_samples_wait(lengths, max_tokens):
    packs = [pack for step in make_plan(lengths, max_tokens=max_tokens, buffer=128) for hand in step.hands for pack in hand]
    assert len(packs) == -(-sum(lengths) // (max_tokens - max_tokens % min(lengths)))
    assert sum(pack.tokens for pack in packs) == sum(lengths)


def test_sequential_rows_hold_the_samples_in_their_order():
    plan = make_plan(lengths_of(300), packing="sequential", shuffle=False)
    packs = [step.hands[0][0] for step in plan]
    assert [row for pack in packs for row in pack.rows] == list(range(300))
    lengths = lengths_of(300)
    assert all(pack.tokens + lengths[pack.rows[-1] + 1] > 64 for pack in packs[:-1])


def test_a_shorter_row_after_a_resume_leaves_out_what_no_longer_fits_counts_it_and_nothing_else():
    lengths = lengths_of(100)
    first, second = make_plan(lengths), make_plan(lengths, max_tokens=40)
    seen = shown(list(islice(first, 10)))
    second.load_state_dict(first.state_dict())
    rest = shown(list(second))
    assert not seen & rest
    assert seen | rest == Counter(row for row in range(100) if row in seen or lengths[row] <= 40)
    assert second.overlong.total() == 100 - len(seen) - len(rest) > 0


def test_another_world_size_needs_a_position_between_optimizer_steps():
    first = make_plan(lengths_of(200), world_size=3)
    list(islice(first, 5))
    with pytest.raises(UserError, match="packs_per_batch=1 x 2 ranks does not divide the 15 packs"):
        make_plan(lengths_of(200), world_size=2).load_state_dict(first.state_dict())
    next(first)
    second = make_plan(lengths_of(200), world_size=2)
    second.load_state_dict(first.state_dict())
    assert next(second).number == 9
    list(first)  # at its end no step follows, so there is nothing to divide
    make_plan(lengths_of(200), world_size=64).load_state_dict(first.state_dict())


def test_steps_end_an_endless_plan_and_its_length_is_known():
    plan = make_plan(lengths_of(20), epochs=None, steps=50)
    assert len(plan) == 50 == len(list(plan))
    assert len(make_plan(lengths_of(20), epochs=1, steps=3)) == 3
    assert len(make_plan(lengths_of(20), epochs=1, steps=3000)) == len(make_plan(lengths_of(20)))
    ending = make_plan(lengths_of(20), epochs=None, steps=3000, mixing=Mixing(shares={"*": 1}, max_passes=2))
    assert len(ending) == len(list(ending)) < 3000
    with pytest.raises(TypeError):
        len(make_plan(lengths_of(20), epochs=None))


def test_a_known_length_is_not_simulated_again_but_under_other_settings():
    plan = make_plan(lengths_of(500), world_size=2)
    list(islice(plan, 6))
    unknown, length = saved(plan), len(plan)
    state = saved(plan)
    assert unknown["total"] is None
    state["total"]["packs"] = 1000  # a lie, to see who believes it
    believing, other = make_plan(lengths_of(500), world_size=4), make_plan(lengths_of(500), world_size=2, max_tokens=80)
    believing.load_state_dict(state)
    other.load_state_dict(state)
    assert len(believing) == 250
    assert len(other) == 6 + len(list(other)) < length


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"seed": 9}, {"mixing": Mixing(epochs_of={"*": 2})}, {"open_shards": 3}])
def test_the_state_of_other_data_is_refused(change):
    plan = make_plan([10, 20])
    with pytest.raises(UserError, match=r"data position: its (fingerprint|seed|mixing) is .*resume with the shards, selection, mixture"):
        make_plan([10, 20], **change).load_state_dict(plan.state_dict())


def test_the_state_of_an_older_version_says_so():
    with pytest.raises(UserError, match="its version is 1, this run has 2; resume with the version of InfiMed of the checkpoint"):
        make_plan([10, 20]).load_state_dict({"version": 1, "fingerprint": "f", "seed": 1, "position": 3})


def test_unshuffled_rows_come_in_order():
    plan = make_plan([64] * 40, sources=["ab"[row % 3 == 0] for row in range(40)], shuffle=False)
    assert [step.hands[0][0].rows for step in plan] == [(n,) for n in range(40)]


def test_a_curriculum_changes_shares_at_its_optimizer_step_on_any_world_size():
    shown_first = set()
    for ranks, packs in ((1, 1), (2, 2), (4, 1)):
        plan = make_plan(
            [64] * 400,
            sources=["ab"[row % 2] for row in range(400)],
            mixing=Mixing(shares={"a": 1, "b": 0}, curriculum=[(10, {"a": 0, "b": 1})]),
            buffer=1,
            world_size=ranks,
            packs_per_batch=packs,
            global_batch=4,
        )
        sources = [row % 2 for step in islice(plan, 80 // (ranks * packs)) for row in sorted(shown([step]), key=lambda row: row % 2)]
        assert sources == sorted(sources)
        shown_first.add(sources.count(0))
        assert plan.asked() == {"a": 0, "b": 1}
    assert len(shown_first) == 1
    assert 40 <= shown_first.pop() <= 40 + 16 + 2  # what waited at optimizer step 10 is shown before the others


def test_live_shares_hold_from_the_next_samples_on_and_survive_a_resume():
    def build() -> Plan:
        return make_plan([32] * 4000, sources=["ab"[row % 2] for row in range(4000)], epochs=None)

    plan = build()
    list(islice(plan, 100))
    plan.reweigh({"a": 9, "b": 1})
    before = plan.shown()
    second = build()
    second.load_state_dict(saved(plan))
    steps = list(islice(plan, 500))
    assert list(islice(second, 500)) == steps
    entered = {source: count - before[source] for source, count in plan.shown().items()}
    assert entered["a"] / sum(entered.values()) == pytest.approx(0.9, abs=0.001)
    assert plan.asked() == {"a": 0.9, "b": 0.1}
    with pytest.raises(UserError, match="shares: no share for b"):
        plan.reweigh({"a": 1})


def test_a_new_price_changes_who_gets_which_pack_and_nothing_else():
    def build() -> Plan:
        rows = 4000
        patches = np.random.default_rng(0).integers(0, 500, rows)
        table = Table(lengths_of(rows), patches=patches, patch_pairs=patches**2)
        return Plan(table, max_tokens=64, epochs=1, world_size=4, packs_per_batch=4)

    plain, changed = build(), build()
    next(plain), next(changed)
    changed.reprice(Price(token=0, pair=0, patch=1, patch_pair=0))
    resumed = build()
    resumed.load_state_dict(saved(changed))
    steps = [list(plan) for plan in (plain, changed, resumed)]
    assert steps[1] == steps[2] != steps[0]
    assert [shown([step]) for step in steps[0]] == [shown([step]) for step in steps[1]]

    def unevenness(steps: list[Step], plan: Plan) -> float:
        loads = [[plan.catalogue.measure(np.array([r for p in h for r in p.rows])).patches.sum() for h in s.hands] for s in steps[:-1]]
        return float(np.mean(np.max(loads, axis=1) / np.mean(loads, axis=1)))

    assert unevenness(steps[1], changed) < 1.01 < unevenness(steps[0], plain)  # measured 1.002 and 1.04


def test_the_length_is_right_where_shares_run_dry():
    mixing = Mixing(shares={"*": 1}, max_passes={"a": 1}, curriculum=((5, {"a": 1, "b": 0}),))
    make = partial(make_plan, lengths_of(400), sources=["a", "b"] * 200, max_tokens=128, epochs=None, steps=500)
    plan = make(mixing=mixing)
    assert len(plan) == len(list(plan)) < 500
    plan = make(mixing=Mixing(shares={"*": 1}, max_passes={"a": 1}))
    next(plan)
    plan.reweigh({"a": 1, "b": 0})
    assert len(plan) == 1 + len(list(plan)) < 500


@pytest.mark.parametrize("buffer", [0, 513])
def test_a_buffer_that_would_not_be_used_is_refused(buffer):
    with pytest.raises(UserError, match=f"data.buffer={buffer}: expected 1 to 512"):
        make_plan([1], buffer=buffer)
