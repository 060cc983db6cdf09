"""Which rows of a set are wanted: by the values of their facets, or by name."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

from infimed.contracts import UserError
from infimed.data.index import FACETS
from infimed.data.remote import parted

if TYPE_CHECKING:
    from infimed.data.shards import ShardSet

log = logging.getLogger(__name__)


def matching(shards: ShardSet, wanted: Mapping[str, Sequence[str]], *, strict: bool) -> np.ndarray:
    """Return the rows whose facets all have a wanted value, int64[n], ascending.

    Raises: UserError for an unknown facet, for nothing that matches and, when strict, for a value that no row has.
    """
    allowed = {facet: {values} if isinstance(values, str) else set(values) for facet, values in wanted.items()}
    problems = [f"select.{facet}: no such field{_near(facet, FACETS)}" for facet in allowed if facet not in FACETS]
    if problems:
        raise UserError("\n".join(problems))
    known = defaultdict[str, set[str]](set)
    rows = np.sort(np.concatenate([np.empty(0, np.int64), *(_matching(shards, s, allowed, known) for s in range(len(shards.shards)))]))
    for facet, values in allowed.items() if strict else ():
        there = sorted(known[facet])
        problems += [f"select.{facet}={value}: no sample has it{_near(value, there)}" for value in sorted(values - known[facet])]
    if problems:
        raise UserError("\n".join(problems))
    if not len(rows):
        given = {facet: sorted(values) for facet, values in allowed.items()}
        raise UserError(f"select={given}: none of {len(shards)} samples matches all of it; widen it")
    return rows


def _matching(shards: ShardSet, shard: int, allowed: Mapping[str, Collection[str]], known: Mapping[str, set[str]]) -> np.ndarray:
    """Return the rows of a shard that match, and note the values that its rows have."""
    rows, local = shards.rows_of(shard)
    if not len(rows):
        return rows
    part, keep = shards.part(shard), np.ones(len(rows), dtype=bool)
    for facet, values in allowed.items():
        codes = part.facets[facet][local]
        names = {code: part.tables[facet][code] for code in np.unique(codes).tolist()}
        known[facet].update(names.values())
        keep &= np.isin(codes, [code for code, name in names.items() if name in values])
    return rows[keep]


def named(shards: ShardSet, keys: Collection[tuple[str, str]]) -> list[int]:
    """Return the rows of samples named by (tar file, key), ascending; of the file the name counts, not the folder.

    Raises: UserError when none of them is there.
    """
    wanted = defaultdict[str, set[str]](set)
    for tar, key in keys:
        wanted[os.path.basename(tar)].add(key)
    found = []
    for number, shard in enumerate(shards.shards):
        if asked := wanted.get(parted(shard.path)[1]):
            rows, local = shards.rows_of(number)
            there = shards.part(number).keys
            found += [row for row, place in zip(rows.tolist(), local.tolist(), strict=True) if there[place] in asked]
    if not found:
        raise UserError(f"only: none of the {len(keys)} samples asked for is among the {len(shards)} selected ones; give others, or none")
    if len(found) < len(keys):
        log.warning("only: %d of the %d samples asked for are here", len(found), len(keys))
    return sorted(found)


def _near(name: str, known: Sequence[str]) -> str:
    """Say which known names come nearest."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]}?" if near else ";") + f" Expected one of {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"
