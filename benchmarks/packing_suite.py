"""The tables of `packing.py --suite`: our plan beside other packers on the assumed mixes, JSON lines as they come and tables last."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence

import mixes
import numpy as np
import packers
import packing

from infimed.data.catalogue import Measure
from infimed.data.mixture import Mixing
from infimed.data.plan import Plan

ROWS = (4096, 8192, 16_384)
RANKS = (8, 64, 512)
STEPS = 24
"""Full steps that a figure of balance is a mean over, at least."""

Found = dict[str, float | int | str]


def run(*, samples: int) -> None:
    """Measure everything and print the tables."""
    filled = [found for mix in mixes.MEDICAL for max_tokens in ROWS for found in fill(mix, max_tokens, samples)]
    balanced = [balance(mix, max_tokens, ranks, each) for mix in mixes.MEDICAL for max_tokens in ROWS for ranks in RANKS for each in (4, 8)]
    planned = [speed(mix, max_tokens) for mix in mixes.MEDICAL for max_tokens in ROWS]
    resumed = resume()
    _table_of_filling(filled)
    names = ("mix", "max_tokens", "ranks", "packs_per_rank", "cost_max_over_mean", "cost_max_over_mean_p99", "arrival_cost_max_over_mean")
    _table([*names, "image_share_std", "arrival_image_share_std", "ms_per_step", "steps"], balanced)
    _table(["mix", "max_tokens", "seconds per million", "ms_per_step", "state_bytes"], planned)
    _table(list(resumed), [resumed])


def fill(mix: str, max_tokens: int, samples: int) -> list[Found]:
    """Measure utilisation and CPU seconds of every packer on the same samples, each in the order of arrival."""
    given = mixes.medical(samples, mix=mix)
    fitting = given["len"][given["len"] <= max_tokens]
    where = {"mix": mix, "max_tokens": max_tokens, "overlong": 1 - len(fitting) / samples}
    least = math.ceil(fitting.sum() / max_tokens)
    found = [{"packer": "bound: tokens / slots", "utilisation": fitting.sum() / (least * max_tokens), "seconds per million": 0.0}]
    for name, packer in packers.packers().items():
        lengths = fitting[:20_000] if packer is packers.trl_bfd else fitting  # which makes whole arrays of tokens
        packer(lengths[:1000], max_tokens)  # imports
        start = time.process_time()
        rows = packer(lengths, max_tokens)
        seconds = time.process_time() - start
        use = lengths.sum() / (rows * max_tokens)
        found.append({"packer": name, "utilisation": use, "seconds per million": seconds / len(lengths) * 1e6})
    for buffer in (128, 192, 256):
        ours = packing.measure(given, max_tokens=max_tokens, ranks=1, each=1, buffer=buffer)
        seconds = ours["seconds"] / ours["samples"] * 1e6
        found.append({"packer": f"exact fill, {buffer} waiting", "utilisation": ours["utilisation"], "seconds per million": seconds})
    return [_say({**where, **one}) for one in found]


def balance(mix: str, max_tokens: int, ranks: int, each: int) -> Found:
    """Measure dealing over as many samples as it takes for some full steps."""
    mean = mixes.medical(10_000, mix=mix)["len"].clip(max=max_tokens).mean()
    samples = max(100_000, math.ceil((STEPS + 2) * ranks * each * max_tokens / mean))
    return _say({"mix": mix, **packing.measure(mixes.medical(samples, mix=mix), max_tokens=max_tokens, ranks=ranks, each=each)})


def speed(mix: str, max_tokens: int) -> Found:
    """Measure planning of a million samples for 512 ranks with 4 rows each."""
    found = packing.measure(mixes.medical(1_000_000, mix=mix), max_tokens=max_tokens, ranks=512, each=4)
    return _say({"mix": mix, **found, "seconds per million": found["seconds"] / (found["samples"] + found["overlong"]) * 1e6})


class Simulated:
    """A catalogue of ten million samples of eight sources in 10,000 shards, every source in every shard; nothing is stored a row."""

    sources = tuple(f"source {number}" for number in range(8))
    fingerprint = "simulated"
    shards, per_shard = 10_000, 1000

    def __init__(self) -> None:
        """Draw the lengths that repeat."""
        self._sizes = mixes.medical(100_000, mix="high")

    def counts(self) -> np.ndarray:
        """Return int64[8, 10000]."""
        return np.full((len(self.sources), self.shards), self.per_shard // len(self.sources))

    def rows(self, source: int, shard: int) -> np.ndarray:
        """Return every eighth row of the shard."""
        return np.arange(shard * self.per_shard + source, (shard + 1) * self.per_shard, len(self.sources))

    def measure(self, rows: np.ndarray) -> Measure:
        """Return the sizes that the rows repeat."""
        sizes = {name: values[rows % len(values)] for name, values in self._sizes.items()}
        return Measure(sizes["len"], patches=4 * sizes["vis"], patch_pairs=16 * sizes["vsq"], visual=sizes["vis"])

    def cuts(self, row: int) -> tuple[tuple[int, int], ...]:
        """Return nothing: no sample is split."""
        return ()


def resume() -> Found:
    """Measure a plan's way from nothing to the first step after sample 10,000,000, its state known; the shards' own part is not in it."""
    catalogue = Simulated()
    settings = {"max_tokens": 8192, "world_size": 64, "packs_per_batch": 4, "mixing": Mixing(temperature=2.0), "epochs": 2}
    state = Plan(catalogue, **settings).state_dict()
    share = 10_000_000 // len(catalogue.sources)
    waiting = catalogue.rows(0, 77)[:120].tolist() + catalogue.rows(3, 9876)[:120].tolist()
    state |= {"taken": [share] * len(catalogue.sources), "packs": 256 * 5000, "buffer": waiting}
    text = json.dumps(state)
    start, cpu = time.perf_counter(), time.process_time()
    plan = Plan(catalogue, **settings)
    plan.load_state_dict(json.loads(text))
    step = next(plan)
    wall = time.perf_counter() - start
    assert step.number == 5000
    return _say(
        {
            "sample": 10_000_000,
            "shards": catalogue.shards,
            "resume s (CPU)": time.process_time() - cpu,
            "resume s (wall)": wall,
            "state_bytes": len(text),
        }
    )


def _say(found: Found) -> Found:
    print(json.dumps(found), flush=True)
    return found


def _table_of_filling(found: Sequence[Found]) -> None:
    """Print a row a packer, a column a mix and length of rows."""
    columns = list(dict.fromkeys((one["mix"], one["max_tokens"]) for one in found))
    print("\n| packer | " + " | ".join(f"{mix} {max_tokens // 1024}k" for mix, max_tokens in columns) + " | s a million, high 8k |")
    print("|" + "---|" * (len(columns) + 2))
    for packer in dict.fromkeys(one["packer"] for one in found):
        cells = {(one["mix"], one["max_tokens"]): one for one in found if one["packer"] == packer}
        numbers = [f"{100 * cells[column]['utilisation']:.3f}" for column in columns]
        print(f"| {packer} | " + " | ".join([*numbers, f"{cells['high', 8192]['seconds per million']:.2f}"]) + " |")


def _table(names: Sequence[str], found: Sequence[Found]) -> None:
    """Print a row a measurement."""
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for one in found:
        print("| " + " | ".join(f"{one[name]:.4f}" if isinstance(one[name], float) else str(one[name]) for name in names) + " |")
