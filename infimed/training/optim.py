"""AdamW with one learning rate a component, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from infimed.contracts import COMPONENTS, UserError


def parameter_groups(model: nn.Module, *, lr: float, component_lr: Mapping[str, float], weight_decay: float) -> list[dict]:
    """Group the trainable parameters by component, matrices with weight decay and vectors (norms, biases) without.

    Args:
        lr: peak learning rate of a component that `component_lr` does not name.

    Raises:
        UserError: a learning rate that is not positive, or is given to an unknown or a frozen component.
    """
    groups, problems = [], []
    for name in sorted(set(component_lr) - set(COMPONENTS)):
        problems.append(f"system.component_lr names `{name}`; expected one of {', '.join(COMPONENTS)}")
    for name in COMPONENTS:
        parameters = [p for p in getattr(model, name).parameters() if p.requires_grad]
        rate = component_lr.get(name, lr)
        if name in component_lr and not parameters:
            problems.append(f"system.component_lr.{name}={rate} but {name} is frozen; add it to system.trainable or drop the rate")
        if parameters and not rate > 0:
            problems.append(
                f"the learning rate of {name} is {rate}; expected a positive number (to freeze it, leave it out of system.trainable)"
            )
        for kind, decay in (("matrices", weight_decay), ("vectors", 0.0)):
            chosen = [p for p in parameters if (p.ndim >= 2) == (kind == "matrices")]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "name": f"{name}/{kind}", "component": name})
    if problems:
        raise UserError("; ".join(problems))
    return groups


def describe(model: nn.Module, groups: Sequence[Mapping]) -> str:
    """Draw the table of components: parameters, how many learn, learning rate, weight decay, type."""
    lines = [f"{'component':<11}{'parameters':>15}{'trainable':>15}{'lr':>10}{'decay':>8}  dtype"]
    for name in COMPONENTS:
        parameters = list(getattr(model, name).parameters())
        mine = [g for g in groups if g["component"] == name]
        learns = sum(p.numel() for p in parameters if p.requires_grad)
        rate = f"{mine[0]['lr']:.1e}" if mine else "frozen"
        decay = f"{max(g['weight_decay'] for g in mine):g}" if mine else "-"
        dtype = str(parameters[0].dtype).removeprefix("torch.")
        lines.append(f"{name:<11}{sum(p.numel() for p in parameters):>15,}{learns:>15,}{rate:>10}{decay:>8}  {dtype}")
    return "\n".join(lines)


def warmup_cosine(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Return the factor on the peak learning rate at a step: linear up to 1 over `warmup` steps, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(
    groups: list[dict], *, betas: tuple[float, float], total: int, warmup: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build the optimizer and its schedule; fused kernels on a GPU."""
    fused = groups[0]["params"][0].is_cuda
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup=warmup, total=total))
    return optimizer, schedule
