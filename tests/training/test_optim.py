from __future__ import annotations

import pytest

from infimed.contracts import UserError
from infimed.training.freezing import set_trainable
from infimed.training.optim import describe, parameter_groups, warmup_cosine
from infimed.training.run import accumulation


def test_every_trainable_parameter_is_in_one_group_with_its_components_rate(make_model):
    model = make_model()
    set_trainable(model, ["projector", "language"])
    groups = parameter_groups(model, lr=1e-4, component_lr={"projector": 3e-4}, weight_decay=0.1)
    chosen = [id(p) for g in groups for p in g["params"]]
    assert sorted(chosen) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {g["component"]: g["lr"] for g in groups} == {"projector": 3e-4, "language": 1e-4}
    assert all(g["weight_decay"] == (0.1 if g["params"][0].ndim >= 2 else 0.0) for g in groups)
    table = describe(model, groups)
    assert [line.split()[0] for line in table.splitlines()] == ["component", "vision", "projector", "language"]
    assert "frozen" in table.splitlines()[1]


def test_rates_that_reach_nothing_are_refused_together(make_model):
    model = make_model()
    set_trainable(model, ["projector"])
    with pytest.raises(UserError, match=r"names `tower`.*vision is frozen.*rate of projector is 0"):
        parameter_groups(model, lr=0.0, component_lr={"tower": 1e-4, "vision": 1e-4}, weight_decay=0.1)


@pytest.mark.parametrize("names", [[], ["tower"]])
def test_an_unknown_or_empty_choice_of_components_is_refused(make_model, names):
    with pytest.raises(UserError, match="expected one or more of vision, projector, language"):
        set_trainable(make_model(), names)


def test_the_schedule_rises_to_its_peak_and_falls_to_the_floor():
    factors = [warmup_cosine(step, warmup=10, total=100, floor=0.1) for step in range(101)]
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < factors[9] < 1
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.1)


def test_a_global_batch_that_cannot_be_shared_says_what_can():
    assert accumulation(global_batch=12, packs_per_batch=2, world_size=3) == 2
    with pytest.raises(UserError, match=r"global_batch=13 .* multiple of 6, e\.g\. global_batch=12"):
        accumulation(global_batch=13, packs_per_batch=2, world_size=3)
