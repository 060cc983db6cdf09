"""Samples that cannot be used: left out, written down, counted by source and reason, and fatal when they become many."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from infimed.contracts import Batch, DataFault, UserError
from infimed.data.index import Row
from infimed.data.page import printable
from infimed.data.remote import discreet

log = logging.getLogger(__name__)


class Quarantine:
    """`put` runs where samples are read (any worker); `count` runs in the main process, on consumed batches."""

    def __init__(self, path: str | Path | None, *, max_rate: float = 0.01, min_seen: int = 200, max_in_a_row: int = 20) -> None:
        """Tolerate a share of `max_rate` (judged from `min_seen` samples on) and fewer than `max_in_a_row` with no good one between.

        path: JSON lines file of the faults (shard, key, reason; never a sample's text), or None.
        """
        if not 0 <= max_rate <= 1:
            raise UserError(f"data.max_fault_rate={max_rate}: expected a share between 0 and 1")
        self.path = Path(path) if path is not None else None
        self.max_rate, self.min_seen, self.max_in_a_row = max_rate, min_seen, max_in_a_row
        self.seen = 0  # samples of this rank
        self.faults: Counter[str] = Counter()  # `source/reason` -> samples of this rank
        self.earlier_seen, self.earlier = 0, Counter[str]()  # the same of all ranks, before this run was resumed
        self._in_a_row = 0

    def resume(self, *, seen: int, faults: Mapping[str, int]) -> None:
        """Go on from what all ranks had counted when the run was saved."""
        self.earlier_seen, self.earlier = seen, Counter(faults)

    def put(self, row: Row, fault: DataFault, *, step: int) -> str:
        """Write one fault down and return the name that it is counted by."""
        shard = discreet(row.shard)
        log.warning("quarantined %s of %s: %s", printable(row.key), shard, fault.reason)
        if self.path is not None:
            record = {"shard": shard, "key": row.key, "source": row.source, "reason": fault.reason, "step": step}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, (json.dumps(record, sort_keys=True) + "\n").encode())  # one write: workers never mix their lines
            finally:
                os.close(handle)
        return f"{row.source}/{fault.reason}"

    def count(self, batch: Batch) -> None:
        """Add a consumed batch to the totals. Raises: UserError above the rate, or when nothing but faults comes."""
        bad = sum(batch.faults.values())
        self.faults.update(batch.faults)
        self.seen += len(batch.keys) + bad
        most = 0
        for place in range(len(batch.keys) + bad) if bad else ():
            self._in_a_row = self._in_a_row + 1 if place in batch.holes else 0
            most = max(most, self._in_a_row)
        self._in_a_row = self._in_a_row if bad else 0
        seen, total = self.seen + self.earlier_seen, self.faults.total() + self.earlier.total()
        if most >= self.max_in_a_row:
            self._stop(f"{most} samples in a row were all unusable (data.max_faults_in_a_row={self.max_in_a_row})")
        if seen >= self.min_seen and total > self.max_rate * seen:
            self._stop(f"{total} of {seen} samples are unusable, more than data.max_fault_rate={self.max_rate:g}")

    def _stop(self, what: str) -> None:
        counts = ", ".join(f"{name}: {count}" for name, count in (self.faults + self.earlier).most_common())
        where = f"see {self.path}" if self.path is not None else "set quarantine_path to list them"
        raise UserError(f"quarantine: {what} ({counts}); {where}, check the shards with tools/check_shards.py, or raise the limit")
