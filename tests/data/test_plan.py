"""The global plan: exactly once, equal steps, and the same continuation from any position."""

import json
import random
from collections import Counter
from itertools import islice

import pytest

from infimed.contracts import UserError
from infimed.data.mixture import epoch_rows, row_weights
from infimed.data.plan import Plan, Step

Args = dict[str, object]


def lengths_of(count: int, seed: int = 0, longest: int = 60) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(count)]


def make_plan(lengths: list[int], **changes: object) -> Plan:
    settings: Args = {"sources": ["a"] * len(lengths), "max_tokens": 64, "epochs": 1, "buffer": 16, "fingerprint": "f", "seed": 1}
    return Plan(lengths, **{**settings, **changes})


def shown(steps: list[Step]) -> Counter[int]:
    return Counter(row for step in steps for hand in step.hands for pack in hand for row in pack.rows)


def test_each_sample_comes_as_often_as_its_mixture_says_on_any_ranks_packs_and_epochs():
    for trial in range(60):
        draw = random.Random(trial)
        count, ranks, packs, epochs = draw.randint(1, 150), draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 3)
        sources = [draw.choice("ab") for _ in range(count)]
        weights = row_weights(sources, {sources[0]: draw.choice([1, 1, 2, 1.5]), "*": draw.choice([1, 0.5])})
        lengths = lengths_of(count, seed=trial)
        plan = make_plan(
            lengths,
            sources=sources,
            weights=weights,
            world_size=ranks,
            packs_per_batch=packs,
            epochs=epochs,
            seed=trial,
            packing=draw.choice(["packed", "first_fit", "unpacked"]),
        )
        steps = list(plan)
        assert len(plan) == len(steps)
        due = Counter(row for epoch in range(epochs) for row in epoch_rows(weights, seed=trial, epoch=epoch).tolist())
        assert shown(steps) == due
        for number, step in enumerate(steps):
            assert step.number == number
            assert [len(hand) for hand in step.hands] == [packs] * ranks
            for pack in (pack for hand in step.hands for pack in hand):
                assert pack.tokens == sum(lengths[row] for row in pack.rows) <= 64


def test_a_plan_continues_identically_from_the_state_of_any_step():
    def build() -> Plan:
        return make_plan(lengths_of(90), epochs=2, world_size=2, packs_per_batch=2)

    whole = list(build())
    for stop in range(len(whole) + 1):
        first, second = build(), build()
        assert list(islice(first, stop)) == whole[:stop]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert len(second) == len(whole)
        assert list(second) == whole[stop:]


def test_chained_resumes_on_other_world_sizes_still_show_each_sample_once():
    for trial in range(20):
        draw, state, seen = random.Random(trial), None, Counter[int]()
        while True:
            plan = make_plan(lengths_of(120), epochs=2, world_size=draw.randint(1, 4), packs_per_batch=draw.randint(1, 3))
            if state:
                plan.load_state_dict(state)
            steps = list(islice(plan, draw.randint(1, 5)))
            if not steps:
                break
            seen += shown(steps)
            state = plan.state_dict()
        assert seen == Counter(dict.fromkeys(range(120), 2))


def test_the_state_is_small_plain_and_free_of_the_world_size():
    draw = random.Random(0)
    lengths = [draw.randint(64, 6000) for _ in range(5000)]
    states = []
    for ranks in (1, 4):
        plan = make_plan(lengths, max_tokens=8192, buffer=128, world_size=ranks, packs_per_batch=8 // ranks)
        list(islice(plan, 40))
        states.append(json.dumps(plan.state_dict()))
    assert states[0] == states[1]
    short = make_plan([20] * 5000, max_tokens=8192)
    next(short)
    assert len(states[0]) < len(json.dumps(short.state_dict())) < 10_000


def test_steps_of_equal_global_size_hold_the_same_samples_on_any_world_size():
    one, four = (list(make_plan(lengths_of(100), world_size=ranks, packs_per_batch=4 // ranks)) for ranks in (1, 4))
    assert [shown([step]) for step in one] == [shown([step]) for step in four]


def test_epochs_run_into_each_other_without_a_flush_and_differ():
    steps = list(make_plan([16] * 102, epochs=3))  # four fill a row: 25.5 rows an epoch
    rows = [row for step in steps for hand in step.hands for pack in hand for row in pack.rows]
    assert len(steps) == 77 < 3 * len(make_plan([16] * 102, epochs=1))
    assert len({tuple(rows[start : start + 102]) for start in (0, 102, 204)}) == 3


def test_exact_fill_uses_97_percent_of_a_realistic_mix():
    draw = random.Random(0)
    kinds = [(0.4, lambda: draw.randint(128, 1129)), (0.35, lambda: draw.randint(100, 800)), (0.25, lambda: draw.randint(1000, 6000))]
    lengths = [draw.choices([kind for _, kind in kinds], [share for share, _ in kinds])[0]() for _ in range(3000)]
    use = {}
    for packing in ("packed", "first_fit", "unpacked"):
        packs = [p for step in make_plan(lengths, max_tokens=8192, buffer=128, packing=packing) for hand in step.hands for p in hand]
        use[packing] = sum(lengths) / (len(packs) * 8192)
    assert use["packed"] > 0.99
    assert use["packed"] > use["first_fit"] > 0.9 > 0.2 > use["unpacked"]


def test_too_long_samples_are_counted_by_source_and_never_planned():
    plan = make_plan([10, 65, 64, 200], sources=["a", "b", "a", "b"])
    assert plan.overlong == {"b": 2}
    assert shown(list(plan)) == {0: 1, 2: 1}
    with pytest.raises(UserError, match=r"2 samples exceed max_tokens=64 \(longest 200; b: 2\)"):
        make_plan([10, 65, 64, 200], sources=["a", "b", "a", "b"], on_overflow="error")
    with pytest.raises(UserError, match="none of 1 samples"):
        make_plan([65])


def test_a_shorter_row_after_a_resume_leaves_out_what_no_longer_fits_and_nothing_else():
    lengths = lengths_of(100)
    first, second = make_plan(lengths), make_plan(lengths, max_tokens=40)
    seen = shown(list(islice(first, 10)))
    second.load_state_dict(first.state_dict())
    rest = shown(list(second))
    assert not seen & rest
    assert seen | rest == Counter(row for row in range(100) if row in seen or lengths[row] <= 40)


def test_steps_end_an_endless_plan_and_its_length_is_known():
    plan = make_plan(lengths_of(20), epochs=None, steps=50)
    assert len(plan) == 50 == len(list(plan))
    assert len(make_plan(lengths_of(20), epochs=1, steps=3)) == 3
    with pytest.raises(TypeError):
        len(make_plan(lengths_of(20), epochs=None))


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"seed": 9}])
def test_the_state_of_other_data_is_refused(change):
    plan = make_plan([10, 20])
    with pytest.raises(UserError, match=next(iter(change))):
        make_plan([10, 20], **change).load_state_dict(plan.state_dict())


def test_unshuffled_rows_come_in_order():
    plan = make_plan([64] * 10, shuffle=False)
    assert [step.hands[0][0].rows for step in plan] == [(n,) for n in range(10)]
