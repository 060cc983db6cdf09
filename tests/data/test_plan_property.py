"""Each sample as often as its quota says, none lost, equal steps: over random configurations, ranks, packings, mixtures and resumes."""

import json
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from infimed.data.catalogue import Table
from infimed.data.mixture import Mixing
from infimed.data.plan import Plan, Step

GLOBAL_BATCH = 12
LAYOUTS = [(ranks, packs) for ranks in (1, 2, 3, 4, 6, 12) for packs in (1, 2, 3, 4, 6, 12) if GLOBAL_BATCH % (ranks * packs) == 0]


@dataclass
class Case:
    """One random configuration."""

    number: int
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = draw = random.Random(self.number)
        count = draw.choice([1, 2, draw.randint(3, 40), draw.randint(40, 400)])
        names = [f"source {number}" for number in range(draw.randint(1, 4))]
        self.sources = [draw.choice(names) for _ in range(count)]
        self.max_tokens = draw.randint(16, 80)
        longest = draw.choice([self.max_tokens, self.max_tokens, self.max_tokens + 30])
        self.lengths = [self.max_tokens // 2, *(draw.randint(1, longest) for _ in range(count - 1))]
        shards = draw.randint(1, 12)
        self.table = Table(self.lengths, sources=self.sources, shards=[draw.randrange(shards) for _ in range(count)], fingerprint="f")
        weights = {name: draw.choice([0, 0.3, 1, 1, 1.5, 2]) for name in draw.sample(names, draw.randint(0, len(names)))}
        self.weights = {**weights, self.sources[0]: 1}
        self.epochs = draw.randint(1, 3)
        self.settings = {
            "seed": self.number,
            "mixing": Mixing(epochs_of={name: weight for name, weight in self.weights.items() if name in self.sources}),
            "packing": draw.choice(["packed", "packed", "unisolated", "sequential", "padded"]),
            "buffer": draw.choice([1, 8, 64]),
            "open_shards": draw.randint(1, 5),
            "global_batch": GLOBAL_BATCH,
        }

    def plan(self, **changes: object) -> Plan:
        ranks, packs = self.draw.choice(LAYOUTS)
        settings = {"max_tokens": self.max_tokens, "epochs": self.epochs, "world_size": ranks, "packs_per_batch": packs}
        return Plan(self.table, **{**settings, **self.settings, **changes})

    def due(self, source: str, epochs: int) -> int:
        return math.floor(Fraction(str(self.weights.get(source, 1))) * self.sources.count(source) * epochs)


CASES = [Case(number) for number in range(60)]


def shown(steps: list[Step]) -> Counter[int]:
    return Counter(row for step in steps for hand in step.hands for pack in hand for row in pack.rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_each_epoch_shows_each_sample_as_often_as_its_quota_says(case):
    before = Counter[int]()
    for epochs in range(1, case.epochs + 1):
        plan = case.plan(epochs=epochs)
        steps = list(plan)
        assert len(plan) == len(steps)
        so_far = shown(steps)
        for source in set(case.sources):
            rows = [row for row, name in enumerate(case.sources) if name == source]
            fitting = [row for row in rows if case.lengths[row] <= case.max_tokens]
            due = case.due(source, epochs)
            assert sum(so_far[row] for row in rows) + plan.overlong[source] == due
            assert {so_far[row] for row in fitting} <= {due // len(rows), -(-due // len(rows))}  # no row a second time before all came
            if case.weights.get(source, 1) in (1, 2):
                assert {so_far[row] - before[row] for row in fitting} <= {case.weights.get(source, 1)}
            assert not set(so_far) & set(rows) - set(fitting)
        assert before <= so_far
        before = so_far


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_every_rank_gets_as_many_packs_in_every_step_and_only_the_end_is_ragged(case):
    plan = case.plan()
    steps = list(plan)
    for number, step in enumerate(steps):
        assert step.number == number
        assert [len(hand) for hand in step.hands] == [plan.packs_per_batch] * plan.world_size
        packs = [pack for hand in step.hands for pack in hand]
        assert all(pack.rows for pack in packs) or number == len(steps) - 1
        assert any(pack.rows for pack in packs)
        assert all(pack.tokens == sum(case.lengths[row] for row in pack.rows) <= case.max_tokens for pack in packs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_optimizer_steps_hold_the_same_samples_on_any_ranks_after_any_resumes(case):
    def optimizer_steps(steps: list[Step]) -> list[Counter[int]]:
        each = GLOBAL_BATCH // max(1, sum(len(hand) for hand in steps[0].hands)) if steps else 1
        return [shown(steps[start : start + each]) for start in range(0, len(steps), each)]

    expected = optimizer_steps(list(case.plan(world_size=1, packs_per_batch=1)))
    assert optimizer_steps(list(case.plan())) == expected
    found, state = [], None
    while True:
        plan = case.plan()
        if state is not None:
            plan.load_state_dict(json.loads(state))
        micro_steps = GLOBAL_BATCH // (plan.world_size * plan.packs_per_batch)
        steps = list(islice(plan, case.draw.randint(1, 4) * micro_steps))
        if not steps:
            break
        found += optimizer_steps(steps)
        state = json.dumps(plan.state_dict())
        assert len(state) < 10_000
    assert found == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_longer_and_shorter_rows_on_the_way_lose_and_double_nothing(case):
    seen, state = Counter[int](), None
    while True:
        plan = case.plan(max_tokens=case.max_tokens + case.draw.choice([0, 10, -3]))
        if state is not None:
            plan.load_state_dict(json.loads(state))
        steps = list(islice(plan, case.draw.randint(1, 4) * GLOBAL_BATCH // (plan.world_size * plan.packs_per_batch)))
        if not steps:
            break
        seen += shown(steps)
        state = json.dumps(plan.state_dict())
    for source in set(case.sources):
        rows = [row for row, name in enumerate(case.sources) if name == source]
        due = case.due(source, case.epochs)
        assert sum(seen[row] for row in rows) + plan.overlong[source] == due
        assert max(seen[row] for row in rows) <= -(-due // len(rows))
        safe = [row for row in rows if case.lengths[row] <= case.max_tokens - 3]
        assert min((seen[row] for row in safe), default=0) >= (due // len(rows) if safe else 0)


@pytest.mark.parametrize("packing", ["packed", "sequential"])
def test_the_composition_of_steps_is_as_even_as_in_the_order_of_arrival(packing):
    random_numbers = np.random.default_rng(0)
    text = random_numbers.lognormal(5, 1, 40_000).astype(int).clip(16, 3000)
    visual = np.where(random_numbers.random(40_000) < 0.7, random_numbers.integers(64, 730, 40_000), 0)
    table = Table(text + visual, visual=visual, patches=4 * visual, patch_pairs=16 * visual**2)
    plan = Plan(table, max_tokens=8192, epochs=1, world_size=8, packs_per_batch=4, packing=packing)
    rows = [[row for hand in step.hands for pack in hand for row in pack.rows] for step in list(plan)[:-1]]
    shares = [visual[step].sum() / (text + visual)[step].sum() for step in rows]
    arrival = np.random.default_rng(1).permutation(40_000)[: 40_000 // len(rows[0]) * len(rows[0])].reshape(-1, len(rows[0]))
    expected = np.std(visual[arrival].sum(1) / (text + visual)[arrival].sum(1))
    assert np.std(shares) < 1.2 * expected
