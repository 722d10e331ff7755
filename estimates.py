"""How long jobs really take beside what was declared, and what a waiting or running job is told from that.

Learned per user and competition, in memory, from jobs that ended by themselves or by their limit; looked up without a
question to the database. May import `forecast`.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from forecast import remaining_seconds, start_times

SAMPLES = 20  # last jobs of a user in a competition that count
ENOUGH = 3  # jobs from which on something is known
KEYS_MOST = 20_000


class Range(NamedTuple):
    """Seconds (or ratios): hardly less than `low`, hardly more than `high`."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True)
class Outlook:
    """Of a pending or running job, in seconds from now; None where nothing can be said. `why` says why it waits."""

    position: int | None
    start: Range | None
    finish: Range | None
    why: str = ""


class RunTimes:
    """True run time over declared time: of the last jobs of a user in a competition, else of the user's last jobs.

    One thread learns, any may ask. Memory is bounded: who has not been heard of for longest is forgotten.
    """

    def __init__(self) -> None:
        self._samples: OrderedDict[tuple[str, str | None], deque[float]] = OrderedDict()
        self._ranges: dict[tuple[str, str | None], Range] = {}

    def learn(self, user_id: str, competition_id: str, ratio: float) -> None:
        """Note how long a job took: true over declared time."""
        for key in ((user_id, competition_id), (user_id, None)):
            samples = self._samples.setdefault(key, deque(maxlen=SAMPLES))
            self._samples.move_to_end(key)
            samples.append(ratio)
            if len(samples) >= ENOUGH:
                self._ranges[key] = _range_of(sorted(samples))
        while len(self._samples) > KEYS_MOST:
            oldest, _ = self._samples.popitem(last=False)
            self._ranges.pop(oldest, None)

    def seconds(self, user_id: str, competition_id: str, expected_time: float, time_limit: float) -> Range:
        """The run time of a job. Where nothing is known: from 0 to the limit, likely what was declared."""
        known = self._ranges.get((user_id, competition_id)) or self._ranges.get((user_id, None))
        if known is None:
            return Range(0.0, expected_time, time_limit)
        low, likely, high = known
        return Range(
            min(time_limit, low * expected_time),
            min(time_limit, likely * expected_time),
            min(time_limit, high * expected_time),
        )


def _range_of(ratios: Sequence[float]) -> Range:
    """Of at least one sorted ratio: between the tenth and the ninetieth percentile."""
    last = len(ratios) - 1
    return Range(ratios[math.floor(last * 0.1)], ratios[last // 2], ratios[math.ceil(last * 0.9)])


def remaining(run: Range, time_limit: float, running_for: float) -> Range:
    """Seconds a running job holds its node still. One that outlived all experience may end now or at its limit."""
    until_limit = max(0.0, time_limit - running_for)
    return Range(
        max(0.0, run.low - running_for),
        remaining_seconds(run.likely, time_limit, running_for),
        run.high - running_for if running_for < run.high else until_limit,
    )


class Line:
    """The pending jobs in the order in which they will be taken, and when each starts, by three forecasts: if all jobs
    before it were short, as they usually are, and long.

    A further job is added, and a job's place is found, without going through the others: thousands may wait. `free_in`:
    until each usable node is free. Keys rise.
    """

    def __init__(self, free_in: Iterable[Range], pending: Sequence[tuple[int, Range]] = ()) -> None:
        nodes = list(free_in)
        self._heaps = [list(column) for column in zip(*nodes, strict=True)]
        for heap in self._heaps:
            heapq.heapify(heap)
        self._keys = [key for key, _ in pending]
        runs = zip(*(run for _, run in pending), strict=True) if pending else ((), (), ())
        self._starts = [start_times(run, heap) for run, heap in zip(runs, self._heaps, strict=bool(nodes))]

    def add(self, key: int, run: Range) -> None:
        """One more job at the end; one that is there already, or was, is not added."""
        if self._keys and key <= self._keys[-1]:
            return
        for starts, seconds, heap in zip(self._starts, run, self._heaps, strict=False):
            starts += start_times((seconds,), heap)
        self._keys.append(key)

    def __len__(self) -> int:
        return len(self._keys)

    def place(self, key: int) -> tuple[int, Range | None]:
        """The job's position (1 is next) and start, None when no node is in use; that of a newcomer if it is not
        known here."""
        index = bisect_left(self._keys, key)
        if index == len(self._keys) or self._keys[index] != key:
            return len(self._keys) + 1, self.newcomer
        return index + 1, Range(*(starts[index] for starts in self._starts)) if self._starts else None

    @property
    def newcomer(self) -> Range | None:
        """When a job that came now would start, None when no node is in use."""
        return Range(*(heap[0] for heap in self._heaps)) if self._heaps else None


def why_pending(
    position: int,
    start: Range | None,
    first_free: tuple[str, float] | None,
    aside: str,
    *,
    retry_in: float = 0.0,
    avoid_node: str | None = None,
) -> str:
    """One sentence: who is ahead, which node is free first and when, what keeps nodes away; names no user and no job.

    `first_free`: a node and the seconds until it is free; `aside`: which nodes take no work, empty when all do.
    """
    if start is None or first_free is None:
        return f"Waiting: no node takes jobs at the moment{f' ({aside})' if aside else ''}."
    node_id, seconds = first_free
    parts = ["next" if position == 1 else f"{position - 1} ahead"]
    parts.append(f"{node_id} is free first, in about {_text(seconds)}" if seconds >= 0.5 else f"{node_id} is free")
    if retry_in > 0:
        parts.append(f"it is tried again in about {_text(retry_in)}")
    if avoid_node is not None:
        parts.append(f"not on {avoid_node} if another node is there, because it failed there")
    if aside:
        parts.append(aside)
    between = f" ({_text(start.low)} to {_text(start.high)})" if _text(start.low) != _text(start.high) else ""
    parts.append(f"expected to start in about {_text(start.likely)}{between}")
    return f"Waiting for a node: {'; '.join(parts)}."


def _text(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
