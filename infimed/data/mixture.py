"""Which rows are trained on, and how often an epoch shows each: pure functions, nothing remembered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np

from infimed.contracts import UserError
from infimed.data.index import FACETS, Row
from infimed.data.order import hash64

DEFAULT = "*"
"""The weight of every source that is not named."""


def keep_rows(rows: Sequence[Row], select: Mapping[str, Sequence[str]], *, strict: bool = True) -> list[int]:
    """List the rows whose facets all have an allowed value, such as {"task": ["plane", "level"]}.

    Raises: UserError for an unknown facet, for nothing selected and, when strict, for a value that no row has.
    """
    problems = []
    wanted = {facet: [allowed] if isinstance(allowed, str) else list(allowed) for facet, allowed in select.items()}
    for facet, allowed in wanted.items():
        if facet not in FACETS:
            problems.append(f"select.{facet}: no such field{_near(facet, FACETS)}")
            continue
        known = sorted({getattr(row, facet) for row in rows})
        problems += [f"select.{facet}={value}: no sample has it{_near(value, known)}" for value in allowed if strict and value not in known]
    if problems:
        raise UserError("\n".join(problems))
    kept = [number for number, row in enumerate(rows) if all(getattr(row, facet) in allowed for facet, allowed in wanted.items())]
    if not kept:
        raise UserError(f"select={wanted}: none of {len(rows)} samples matches all of it; widen it")
    return kept


def _near(name: str, known: Sequence[str]) -> str:
    """Say which known names come nearest."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]}?" if near else ";") + f" Expected one of {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"


def row_weights(sources: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    """Return how many times an epoch shows each row, float64[rows]; 1 where nothing is said.

    sources: the source of each row. Raises: UserError for an unknown source, a weight that is no number >= 0, or nothing left to show.
    """
    known = sorted(set(sources))
    problems = [f"mixture.{name}={value}: expected a number >= 0" for name, value in weights.items() if not 0 <= value < math.inf]
    problems += [f"mixture.{name}: no such source{_near(name, known)}" for name in weights.keys() - {DEFAULT, *known}]
    table = {name: float(weights.get(name, weights.get(DEFAULT, 1.0))) for name in known}
    if known and not problems and not any(table.values()):
        problems.append("mixture: every source has weight 0, so nothing is left to train on; give one a weight above 0")
    if problems:
        raise UserError("\n".join(sorted(problems)))
    return np.array([table[source] for source in sources], dtype=np.float64)


def epoch_rows(weights: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """List the rows of one epoch, int64[n], unshuffled: weight 2.3 shows a row twice, and a third time in about 3 of 10 epochs.

    weights: float64[rows] from `row_weights`.
    """
    rows = np.arange(len(weights))
    chance = (hash64(rows, seed=seed, epoch=epoch, stream=1) >> np.uint64(11)) * 2.0**-53  # float64 in [0, 1)
    whole = np.floor(weights)
    return np.repeat(rows, (whole + (chance < weights - whole)).astype(np.int64))
