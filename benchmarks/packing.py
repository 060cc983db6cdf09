"""How full rows are, how even ranks are and what planning costs, for lengths of your own or for the assumed mixes of `mixes.py`.

    python benchmarks/packing.py --lengths lengths.npz --max-tokens 8192 --ranks 64 --packs-per-rank 4
    python benchmarks/packing.py --suite

`lengths.npz` holds one number a sample: `len` tokens, and as far as there are any `vis` image tokens among them, `vsq` the sum over
images of their squares, `nimg` images. One epoch is planned and one JSON line printed:

    utilisation             tokens / slots of the rows that hold anything, the last row included
    packs, empty_rows       rows that hold something; those that do not, at the end of the last step
    cost_max_over_mean      dearest rank / mean rank, the mean over full steps; `p99` of it; `arrival_...`: the same rows in the order
                            in which they are made, `packs_per_rank` to a rank
    image_share_std         standard deviation, over full steps, of the image tokens' share; `arrival_...`: rows by next fit in the same
                            order of arrival, as many a step
    seconds, ms_per_step    CPU time of planning and dealing
    samples, overlong       planned; longer than a row and therefore left out
    state_bytes             of the JSON that is saved, at its largest

Full steps: those without empty rows, or all there are when there is none. The cost of a row is modelled, not measured: forward FLOPs of
7.2e9 len + 294,912 len ** 2 for a decoder of 3.6 billion weights, 3.2e9 vis + 1.99e6 vsq for a tower of 0.4 billion.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infimed.contracts import Pack, UserError
from infimed.data.catalogue import Table
from infimed.data.packing import Price
from infimed.data.plan import Plan

# An image token stands for four patches of the tower.
PRICE = Price(token=7.2e9, pair=294_912, patch=3.2e9 / 4, patch_pair=1.99e6 / 16)


@dataclass(frozen=True)
class Seen:
    """What there is to say of a step."""

    packs: int  # that hold anything
    slots: int
    tokens: int
    image_share: float  # of its tokens
    uneven: float  # cost of the dearest rank / of the mean one
    uneven_undealt: float  # the same with the packs in the order in which they were made


def load(path: Path) -> dict[str, np.ndarray]:
    """Read int64[N] `len`, `vis`, `vsq` and `nimg`. Raises: UserError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            given = {name: file[name] for name in ("len", "vis", "vsq", "nimg") if name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an npz file of plain numbers ({type(error).__name__}: {error})".replace("\n", " ")) from None
    if "len" not in given:
        raise UserError(f"{path}: no array `len`; expected len and, as far as there are any, vis, vsq, nimg")
    found = {name: _whole(path, name, values, least=1 if name == "len" else 0) for name, values in given.items()}
    if len({len(values) for values in found.values()}) > 1:
        raise UserError(
            f"{path}: {', '.join(f'{name} has {len(values)}' for name, values in found.items())} numbers; expected one a sample"
        )
    if not len(found["len"]):
        raise UserError(f"{path}: `len` is empty; expected one number a sample")
    found.setdefault("vis", np.zeros_like(found["len"]))
    found.setdefault("nimg", (found["vis"] > 0).astype(np.int64))
    found.setdefault("vsq", found["vis"] ** 2 // np.maximum(1, found["nimg"]))  # as if its images were of one size
    return found


def _whole(path: Path, name: str, values: np.ndarray, *, least: int) -> np.ndarray:
    """Return one array as int64[N]."""
    plain = values.ndim == 1 and values.dtype.kind in "iufb"
    if not plain or not ((values >= least) & (values <= 2**50) & (values == np.floor(values))).all():
        what = f"{values.dtype}{list(values.shape)}" + (f" from {values.min()} to {values.max()}" if plain and values.size else "")
        raise UserError(f"{path}: `{name}` is {what}; expected a list of whole numbers, {least} to 2 ** 50")
    return values.astype(np.int64)


def measure(given: dict[str, np.ndarray], *, max_tokens: int, ranks: int, each: int, **settings: object) -> dict[str, float]:
    """Plan one epoch and say what the module's docstring lists."""
    lengths, visual = given["len"], given["vis"]
    table = Table(lengths, patches=4 * visual, patch_pairs=16 * given["vsq"], visual=visual)
    fits = lengths <= max_tokens
    result = {"samples": int(fits.sum()), "overlong": int((~fits).sum()), "max_tokens": max_tokens, "ranks": ranks, "packs_per_rank": each}
    if not fits.any():
        return {**dict.fromkeys(("utilisation", "packs", "image_share_std", "seconds"), 0), "cost_max_over_mean": 1.0, **result}
    costs = PRICE.of(table.measure(np.arange(len(lengths))))
    plan = {"max_tokens": max_tokens, "world_size": ranks, "packs_per_batch": each}
    steps, seconds, state_bytes = _steps(table, given, costs, **plan, **settings)
    arrival, _, _ = _steps(table, given, costs, packing="sequential", **plan)
    assert sum(step.tokens for step in steps) == lengths[fits].sum()
    packs, whole = sum(step.packs for step in steps), _full(steps)
    uneven = np.array([step.uneven for step in whole])
    return result | {
        "utilisation": float(lengths[fits].sum() / (packs * max_tokens)),
        "packs": packs,
        "cost_max_over_mean": float(uneven.mean()),
        "cost_max_over_mean_p99": float(np.percentile(uneven, 99)),
        "arrival_cost_max_over_mean": float(np.mean([step.uneven_undealt for step in whole])),
        "image_share_std": float(np.std([step.image_share for step in whole])),
        "arrival_image_share_std": float(np.std([step.image_share for step in _full(arrival)])),
        "steps": len(steps),
        "empty_rows": len(steps) * ranks * each - packs,
        "seconds": seconds,
        "ms_per_step": 1000 * seconds / len(steps),
        "state_bytes": state_bytes,
    }


def _steps(table: Table, given: dict[str, np.ndarray], costs: np.ndarray, **settings: object) -> tuple[list[Seen], float, int]:
    """Plan all steps. Returns what there is to say of each, the CPU seconds that they took and the bytes of the largest state.

    No step is kept: a heap that grows would lengthen the work of the garbage collector, which no training run has.
    """
    plan = Plan(table, **{"epochs": 1, "price": PRICE, **settings})
    seen, seconds, state = list[Seen](), 0.0, 0
    while True:
        start = time.process_time()
        step = next(plan, None)
        seconds += time.process_time() - start
        if step is None:
            return seen, seconds, state
        seen.append(_look(step.hands, given, costs))
        if len(seen) % 16 == 1:
            state = max(state, len(json.dumps(plan.state_dict())))


def _look(hands: tuple[tuple[Pack, ...], ...], given: dict[str, np.ndarray], costs: np.ndarray) -> Seen:
    """Say what there is to say of a step."""
    dealt = np.array([[costs[list(pack.rows)].sum() for pack in hand] for hand in hands])
    made = np.argsort([pack.number for hand in hands for pack in hand], kind="stable")
    rows = [row for hand in hands for pack in hand for row in pack.rows]
    tokens = int(given["len"][rows].sum())
    return Seen(
        packs=sum(bool(pack.rows) for hand in hands for pack in hand),
        slots=dealt.size,
        tokens=tokens,
        image_share=float(given["vis"][rows].sum() / tokens),
        uneven=_unevenness(dealt),
        uneven_undealt=_unevenness(dealt.ravel()[made].reshape(dealt.shape)),
    )


def _unevenness(costs: np.ndarray) -> float:
    """Return max / mean over ranks. costs: float64[ranks, packs of each]."""
    loads = costs.sum(axis=1)
    return float(loads.max() / loads.mean())


def _full(steps: list[Seen]) -> list[Seen]:
    """Return the steps without empty rows; all when there is none."""
    return [step for step in steps if step.packs == step.slots] or steps


def main() -> int:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--lengths", type=Path, help="npz file with len and, if there are images, vis, vsq, nimg")
    way.add_argument("--suite", action="store_true", help="all tables of the README, beside other packers")
    for name, usual in (("max-tokens", 8192), ("ranks", 8), ("packs-per-rank", 4)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--buffer", type=int, help="samples that wait at least (default: the plan's)")
    parser.add_argument("--samples", type=int, default=200_000, help="of each mix of the suite")
    args = parser.parse_args()
    if args.suite:
        import packing_suite

        packing_suite.run(samples=args.samples)
        return 0
    try:
        if min(args.max_tokens, args.ranks, args.packs_per_rank, args.buffer or 1) < 1:
            raise UserError("--max-tokens, --ranks, --packs-per-rank, --buffer: expected numbers of 1 and more")
        settings = {} if args.buffer is None else {"buffer": args.buffer}
        found = measure(load(args.lengths), max_tokens=args.max_tokens, ranks=args.ranks, each=args.packs_per_rank, **settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
