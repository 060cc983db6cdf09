"""Which source the next sample comes from: a pure function of how many each has given, so that there is no random state to save."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from typing import TypedDict

import numpy as np

from infimed.contracts import UserError
from infimed.data.catalogue import Catalogue
from infimed.data.order import hash64

DEFAULT = "*"
"""Stands for every source that is not named."""

_JITTER = 3  # a stream of `hash64` beside those of `order`
_ENDLESS = 2**62


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How sources are mixed: by how often an epoch shows each (`epochs_of`, the default: once), or by shares of the samples."""

    epochs_of: Mapping[str, float] = field(default_factory=dict)  # times that an epoch shows a source; option data.mixture
    shares: Mapping[str, float] | None = None  # share of the samples by source, of any sum
    temperature: float | None = None  # shares in proportion to rows ** (1 / temperature)
    max_passes: float | Mapping[str, float] | None = None  # a source is not shown more often than this; its share goes to the others
    curriculum: Sequence[tuple[int, Mapping[str, float]]] = ()  # (optimizer step, shares) from that step on

    @property
    def by_shares(self) -> bool:
        """Say whether shares rule, not epochs."""
        return self.shares is not None or self.temperature is not None or bool(self.curriculum)

    def fingerprint(self) -> str:
        """Identify the settings."""
        parts = [sorted(self.epochs_of.items()), self.shares and sorted(self.shares.items()), self.temperature]
        passes = sorted(self.max_passes.items()) if isinstance(self.max_passes, Mapping) else self.max_passes
        parts += [passes, [(step, sorted(shares.items())) for step, shares in self.curriculum]]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def problems(self, sources: Sequence[str]) -> list[str]:
        """List what is wrong with the settings for these sources."""
        found = []
        ways = [("mixture", self.epochs_of), ("shares", self.shares is not None), ("temperature", self.temperature is not None)]
        if len(given := [name for name, value in ways if value]) > 1:
            found.append(f"{', '.join(given)}: expected one of them; each says alone how much a source is shown")
        if self.epochs_of and self.curriculum:
            found.append("mixture, curriculum: a curriculum is of shares; give shares for its start instead of mixture")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            found.append(f"temperature={self.temperature}: expected a number > 0 (1: as many samples as rows, above: more even)")
        found += _wrong("mixture", self.epochs_of, sources)
        if self.shares is not None:
            found += wrong_shares("shares", self.shares, sources)
        if isinstance(self.max_passes, Mapping):
            found += _wrong("max_passes", self.max_passes, sources, positive=False)
        elif self.max_passes is not None and not (_is_weight(self.max_passes, False) and self.max_passes > 0):
            found.append(f"max_passes={self.max_passes}: expected a number > 0")
        steps = [step for step, _ in self.curriculum]
        if any(step < 0 for step in steps) or steps != sorted(set(steps)):
            found.append(f"curriculum: steps {', '.join(map(str, steps))}: expected optimizer steps >= 0, each above the one before")
        for step, shares in self.curriculum:
            found += wrong_shares(f"curriculum.{step}", shares, sources)
        return found

    def weight(self, source: str) -> Fraction:
        """Return how often an epoch shows a source; exact, so that ten epochs of 0.1 are one pass."""
        return Fraction(str(float(self.epochs_of.get(source, self.epochs_of.get(DEFAULT, 1.0)))))

    def limit(self, source: str, rows: int) -> int:
        """Return the samples after which a source is spent."""
        passes = self.max_passes.get(source, self.max_passes.get(DEFAULT)) if isinstance(self.max_passes, Mapping) else self.max_passes
        return _ENDLESS if passes is None or passes == math.inf else math.floor(Fraction(str(float(passes))) * rows)

    def rates(self, entry: int, sources: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Return the shares of a phase, float64[sources]: entry 0 at the start, entry k after the k-th change of the curriculum."""
        shares = self.curriculum[entry - 1][1] if entry else self.shares
        if shares is None:
            return np.where(rows > 0, np.maximum(rows, 1.0) ** (1.0 / (self.temperature or 1.0)), 0.0)
        return table(shares, sources)


def table(shares: Mapping[str, float], sources: Sequence[str]) -> np.ndarray:
    """Lay shares out, float64[sources]; `*` is the share of each that is not named."""
    return np.array([float(shares.get(source, shares.get(DEFAULT, 0.0))) for source in sources])


def wrong_shares(option: str, shares: Mapping[str, float], sources: Sequence[str]) -> list[str]:
    """List what is wrong with shares: a source without one would be left out unseen."""
    missing = [source for source in sources if source not in shares and DEFAULT not in shares]
    found = (
        [f"{option}: no share for {', '.join(missing)}; name each source (0 leaves it out), or {DEFAULT!r} for the others"]
        if missing
        else []
    )
    return found + _wrong(option, shares, sources)


def _wrong(option: str, given: Mapping[str, float], sources: Sequence[str], *, positive: bool = True) -> list[str]:
    """List numbers that are none, unknown sources, and zeros everywhere."""
    found = [f"{option}.{name}={value}: expected a number >= 0" for name, value in given.items() if not _is_weight(value, positive)]
    found += [f"{option}.{name}: no such source{_near(name, sources)}" for name in given if name not in (DEFAULT, *sources)]
    rest = given.get(DEFAULT, 1.0 if option == "mixture" else 0.0)
    if positive and sources and not found and not any(given.get(source, rest) for source in sources):
        found.append(f"{option}: every source has weight 0, so nothing is left to train on; give one a weight above 0")
    return sorted(found)


def _is_weight(value: object, finite: bool) -> bool:
    return isinstance(value, int | float) and value >= 0 and (not finite or value < math.inf)


def _near(name: str, known: Sequence[str]) -> str:
    """Say which known names come nearest."""
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return (f"; did you mean {near[0]}?" if near else ";") + f" Expected one of {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"


class Phase(TypedDict):
    """Shares that rule for a while."""

    entry: int  # changes of the curriculum so far
    base: list[int]  # `taken` when it began
    rates: list[float]  # by source


class MixerState(TypedDict):
    """Where a mixer stands."""

    epoch: int
    taken: list[int]  # samples by source
    phase: Phase | None  # None: epochs rule


class Mixer:
    """Deals out the sources of the coming samples.

    Within a phase, sample i of source s has the time (i + u) / rate, u a hash in [0, 1): samples come in the order of their times, so
    that sources are spread evenly and yet not regularly. In epoch mode a phase is an epoch, the rates are its quotas, and all are met
    at time 1. In share mode the rates are the shares; a source that is spent stops, and the others go on in their proportion.
    """

    def __init__(self, catalogue: Catalogue, counts: np.ndarray, *, mixing: Mixing, seed: int, epochs: int | None) -> None:
        """Mix from the start. counts: int64[sources, shards]. Raises: UserError that lists everything wrong with `mixing`."""
        if problems := mixing.problems(catalogue.sources):
            raise UserError("\n".join(problems))
        self.sources, self.mixing, self._seed, self._epochs = catalogue.sources, mixing, seed, epochs
        self.rows = counts.sum(axis=1)
        self._per_epoch = [mixing.weight(source) * int(rows) for source, rows in zip(self.sources, self.rows, strict=True)]
        limits = [mixing.limit(source, int(rows)) for source, rows in zip(self.sources, self.rows, strict=True)]
        self._limits = np.minimum(np.array(limits, np.int64), np.where(self.rows > 0, _ENDLESS, 0))
        self.taken = self.base = np.zeros(len(self.sources), np.int64)
        self.epoch = self.entry = 0
        self.rates: np.ndarray | None = mixing.rates(0, self.sources, self.rows) if mixing.by_shares else None
        # Shares know no epochs: one is as many samples as there are rows.
        self._total = _ENDLESS if epochs is None else epochs * int(self.rows.sum()) if mixing.by_shares else int(self._due(epochs).sum())

    def draw(self, count: int) -> np.ndarray:
        """Return the sources of the next samples, int64[n]: about `count` of them, none at the end. `take` moves past them."""
        if self.rates is None:
            self._begin_epoch()
            begin, end = self._due(self.epoch), self._due(self.epoch + 1)
            return self._merge((end - begin).astype(np.float64), begin, end, count)
        left = max(0, self._total - int(self.taken.sum()))
        return self._merge(self.rates, self.base, self._limits, count)[:left]

    def take(self, sources: np.ndarray) -> None:
        """Move past samples of these sources."""
        self.taken = self.taken + np.bincount(sources, minlength=len(self.sources))

    def change(self, rates: np.ndarray) -> None:
        """Mix by these shares from here on."""
        self.base, self.rates = self.taken, rates

    @property
    def endless(self) -> bool:
        """Say whether there is always a next sample: in each phase to come from some source that has no limit."""
        coming = range(self.entry + 1, len(self.mixing.curriculum) + 1)
        phases = [self._rates_now(), *(self.mixing.rates(entry, self.sources, self.rows) for entry in coming)]
        return self._epochs is None and all((rates[self._limits == _ENDLESS] > 0).any() for rates in phases)

    def ever(self, source: int) -> bool:
        """Say whether the settings show the source with this number at any time."""
        if not self.mixing.by_shares:
            return self._per_epoch[source] > 0
        return any(self.mixing.rates(entry, self.sources, self.rows)[source] > 0 for entry in range(len(self.mixing.curriculum) + 1))

    def asked(self) -> dict[str, float]:
        """Return the shares asked for now; 0 for a source that is spent."""
        rates = np.where(self.taken < self._limits, self._rates_now(), 0.0)
        return dict(zip(self.sources, (rates / (rates.sum() or 1.0)).tolist(), strict=True))

    def state_dict(self) -> MixerState:
        """Say where the mixer stands."""
        phase = None if self.rates is None else Phase(entry=self.entry, base=self.base.tolist(), rates=self.rates.tolist())
        return MixerState(epoch=self.epoch, taken=self.taken.tolist(), phase=phase)

    def load_state_dict(self, state: MixerState) -> None:
        """Stand where `state` was taken."""
        self.epoch, self.taken = state["epoch"], np.array(state["taken"], np.int64)
        self.rates, self.entry = None, 0
        if phase := state["phase"]:
            self.entry, self.base, self.rates = phase["entry"], np.array(phase["base"], np.int64), np.array(phase["rates"], np.float64)

    def _rates_now(self) -> np.ndarray:
        """Return in what proportion the sources come, float64[sources]."""
        return np.array([float(each) for each in self._per_epoch]) if self.rates is None else self.rates

    def _begin_epoch(self) -> None:
        """Go on to the first epoch that has samples left; to the end when there is none."""
        sources = zip(self._per_epoch, self.taken.tolist(), self._limits.tolist(), strict=True)
        # A source of weight w shows its sample number n in epoch ceil((n + 1) / w) - 1: found at once, however small w is.
        if due := [-(-(taken + 1) // each) - 1 for each, taken, limit in sources if each and taken < limit]:
            self.epoch = max(self.epoch, min(due) if self._epochs is None else min(*due, self._epochs))

    def _due(self, epochs: int) -> np.ndarray:
        """Return the samples of each source that so many whole epochs show, int64[sources]."""
        epochs = epochs if self._epochs is None else min(epochs, self._epochs)
        return np.minimum([math.floor(each * epochs) for each in self._per_epoch], self._limits)

    def _merge(self, rates: np.ndarray, base: np.ndarray, ends: np.ndarray, count: int) -> np.ndarray:
        """Return the sources of the next samples in the order of their times, int64[n] with n near `count`.

        rates: float64[sources]. base, ends: int64[sources], what is taken of each at the begin and at the end of the phase.
        """
        active = np.flatnonzero((rates > 0) & (self.taken < ends))
        if not len(active):
            return active
        rate, first = rates[active], (self.taken - base)[active]
        now = ((first + self._jitter(self.taken[active], active)) / rate).min()
        until = now + count / rate.sum()
        numbers = np.maximum(0, np.minimum((ends - base)[active], np.ceil(until * rate) + 1).astype(np.int64) - first)
        sources = np.repeat(active, numbers)
        places = np.arange(len(sources)) + np.repeat(first + numbers - np.cumsum(numbers), numbers)
        times = (places + self._jitter(places + base[sources], sources)) / rates[sources]
        return sources[np.argsort(times, kind="stable")[: np.count_nonzero(times <= until)]]

    def _jitter(self, numbers: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Return float64[n] in [0, 1) for the samples with these numbers of these sources."""
        return (hash64(numbers + (sources << 40), seed=self._seed, epoch=0, stream=_JITTER) >> np.uint64(11)) * 2.0**-53


class InOrder(Mixer):
    """Deals out the sources as the rows of the index have them, shard by shard, each row once an epoch: the order of validation."""

    def __init__(self, catalogue: Catalogue, counts: np.ndarray, *, epochs: int | None) -> None:
        """Start at the first row."""
        super().__init__(catalogue, counts, mixing=Mixing(), seed=0, epochs=epochs)
        self._catalogue, self._shard_ends = catalogue, np.cumsum(counts.sum(axis=0))

    def draw(self, count: int) -> np.ndarray:
        """Return the sources of the rest of the present shard, int64[n]; none at the end."""
        self._begin_epoch()
        place = int((self.taken - self._due(self.epoch)).sum())
        if not self.rows.any() or (self._epochs is not None and self.epoch >= self._epochs):
            return np.zeros(0, np.int64)
        shard = int(np.searchsorted(self._shard_ends, place, side="right"))
        rows = [self._catalogue.rows(source, shard) for source in range(len(self.sources))]
        sources = np.repeat(np.arange(len(rows)), [len(part) for part in rows])[np.argsort(np.concatenate(rows), kind="stable")]
        return sources[place - int(self._shard_ends[shard]) + len(sources) :]
