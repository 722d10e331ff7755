"""The past day and week for charts: sampled each minute, kept in five-minute rows, without users or jobs.

How jobs ended and how long they waited is counted from `job_events`, each event once, by where the last count ended;
so a restart loses nothing and nothing is scanned. May import `clock`, `database`, `models`, `nodes`,
`queue_manager`, `states`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, Select, bindparam, delete, func, insert, select, update

import clock
import states
from database import Transaction
from models import history, job_events, jobs
from nodes import NodeRegistry
from queue_manager import MICROSECONDS, QueueManager

ROW_SECONDS = 300
KEEP_SECONDS = 8 * 86400
WINDOWS = {"day": (86400, 300), "week": (7 * 86400, 1800)}  # name: seconds, seconds of a step
EVENTS_AT_ONCE = 5000
WAIT_BASE = 1.1  # waits are counted in classes each a tenth longer than the one before
WAIT_LEAST = 0.001  # seconds

_STARTED = "started"
_NEW_EVENTS: Select[Any] = (
    select(job_events.c.id, job_events.c.at, job_events.c.event, jobs.c.created_at, jobs.c.infra_failures)
    .join(jobs, jobs.c.seq == job_events.c.job_seq)
    .where(job_events.c.id > bindparam("last"), job_events.c.id <= bindparam("newest"))
    .where(job_events.c.event.in_((_STARTED, *states.FINAL)))
    .order_by(job_events.c.id)
    .limit(EVENTS_AT_ONCE)
)
_SUMS = ("samples", "pending", "running", "busy", "usable", "gpu_utilization", "gpu_samples", *states.FINAL)


@dataclass
class _Sums:
    """What is added to a row, or what rows come to."""

    values: Counter[str] = field(default_factory=Counter)
    waits: Counter[int] = field(default_factory=Counter)

    def add_row(self, row: Row[Any]) -> None:
        self.values.update({name: getattr(row, name) for name in _SUMS})
        self.waits.update({int(key): count for key, count in json.loads(row.waits).items()})


class History:
    """Takes samples (`sample`, from one thread) and draws from them (`charts`, from any)."""

    def __init__(
        self, queue: QueueManager, registry: NodeRegistry, *, now: Callable[[], int] = clock.now_us
    ) -> None:  # fmt: skip
        self._queue = queue
        self._registry = registry
        self._now = now
        self._kept: dict[str, tuple[int, int, bytes]] = {}
        self._version = 0
        with queue.database.reading() as connection:
            last = connection.execute(select(func.max(history.c.last_event))).scalar()
            # Without a past the count begins here, not with all jobs that ever were.
            self._last = int(last if last is not None else connection.execute(_NEWEST_EVENT).scalar() or 0)

    # -- taking samples --------------------------------------------------------------------------------------------

    def sample(self) -> None:
        """Add how things are now, and what has happened since the last call."""
        now = self._now() // MICROSECONDS
        added: dict[int, _Sums] = defaultdict(_Sums)
        newest = self._count_events(added, oldest=now - KEEP_SECONDS)
        added[_begin(now)].values.update(self._gauges())

        def write(transaction: Transaction) -> None:
            connection = transaction.connection
            for at, sums in added.items():
                row = connection.execute(select(history).where(history.c.at == at)).first()
                if row is not None:
                    sums = _Sums(Counter(sums.values), Counter(sums.waits))  # a write may run twice
                    sums.add_row(row)
                values: dict[str, Any] = {name: sums.values[name] for name in _SUMS}
                values |= {"waits": json.dumps(sums.waits), "last_event": newest}
                if row is None:
                    connection.execute(insert(history).values(at=at, **values))
                else:
                    connection.execute(update(history).where(history.c.at == at).values(**values))
            connection.execute(delete(history).where(history.c.at < now - KEEP_SECONDS))

        self._queue.database.write(write)
        self._last = newest
        self._version += 1

    def _count_events(self, added: dict[int, _Sums], *, oldest: int) -> int:
        """Count the events since the last sample in the rows of their time; returns the last one there is."""
        with self._queue.database.reading() as connection:
            newest = int(connection.execute(_NEWEST_EVENT).scalar() or 0)
            last = min(self._last, newest)  # the newest events were deleted with their jobs
            while last < newest:
                rows = list(connection.execute(_NEW_EVENTS, {"last": last, "newest": newest}))
                for row in rows:
                    sums = added[_begin(max(oldest, row.at // MICROSECONDS))]
                    if row.event != _STARTED:
                        sums.values[row.event] += 1
                    elif not row.infra_failures:
                        sums.waits[_wait_class((row.at - row.created_at) / MICROSECONDS)] += 1
                last = rows[-1].id if len(rows) == EVENTS_AT_ONCE else newest
        return newest

    def _gauges(self) -> dict[str, int]:
        pending, _ = self._queue.pending_now()  # not of the view, which may be of a moment ago when the queue is long
        records = self._registry.all()
        usable = [record for record in records if record.usable]
        loads = [
            gpu.utilization
            for record in records
            if record.connected and record.probe is not None
            for gpu in record.probe.gpus
            if gpu.utilization is not None
        ]
        return {
            "samples": 1,
            "pending": pending,
            "running": len(self._queue.running_nodes()),
            "busy": sum(record.job_id is not None for record in usable),
            "usable": len(usable),
            "gpu_utilization": sum(loads),
            "gpu_samples": len(loads),
        }

    # -- drawing ---------------------------------------------------------------------------------------------------

    def charts(self, window: str) -> bytes:
        """`schemas.History` as JSON; computed once for all who ask until there is a new sample."""
        seconds, step = WINDOWS[window]
        last = self._now() // MICROSECONDS // step * step
        version = self._version
        kept = self._kept.get(window)
        if kept is not None and kept[:2] == (version, last):
            return kept[2]
        first = last - seconds
        steps: dict[int, _Sums] = defaultdict(_Sums)
        with self._queue.database.reading() as connection:
            for row in connection.execute(select(history).where(history.c.at >= first)):
                steps[row.at // step * step].add_row(row)
        at = list(range(first, last + 1, step))
        body = {"window": window, "step_seconds": step, "at": at, **_series([steps.get(begin) for begin in at])}
        found = json.dumps(body, separators=(",", ":")).encode()
        self._kept[window] = version, last, found
        return found


_NEWEST_EVENT = select(func.max(job_events.c.id))


def _begin(seconds: int) -> int:
    return seconds // ROW_SECONDS * ROW_SECONDS


def _wait_class(seconds: float) -> int:
    return round(math.log(max(WAIT_LEAST, seconds), WAIT_BASE))


def _series(steps: list[_Sums | None]) -> dict[str, list[float | None]]:
    """The series by name; None where nothing is known: the server was not there."""
    found: dict[str, list[float | None]] = {
        "queue_depth": [_mean(sums, "pending", "samples") for sums in steps],
        "running": [_mean(sums, "running", "samples") for sums in steps],
        "utilization": [_mean(sums, "busy", "usable") for sums in steps],
        "gpu_utilization": [_mean(sums, "gpu_utilization", "gpu_samples") for sums in steps],
        "wait_seconds": [_median(sums.waits) if sums is not None else None for sums in steps],
    }
    for state in states.FINAL:
        found[state] = [sums.values[state] if sums is not None else None for sums in steps]
    return found


def _mean(sums: _Sums | None, what: str, of: str) -> float | None:
    if sums is None or not sums.values[of]:
        return None
    return round(sums.values[what] / sums.values[of], 4)


def _median(waits: Counter[int]) -> float | None:
    """Exact to a twentieth: the middle of the class in which the median lies."""
    half = (waits.total() + 1) // 2
    for key in sorted(waits):
        half -= waits[key]
        if half <= 0:
            seconds = WAIT_BASE**key
            return round(seconds, 3) if seconds < 10 else round(seconds, 1)
    return None
