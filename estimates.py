"""How long jobs really take beside what was declared, and what a waiting or running job is told from that.

Learned per user and competition, in memory, from jobs that ended by themselves or by their limit; looked up without a
question to the database. May import `forecast`.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forecast import Forecast, forecast, remaining_seconds, wait_for_newcomer

SAMPLES = 20  # last jobs of a user in a competition that count
ENOUGH = 3  # jobs from which on something is known
KEYS_MOST = 20_000


@dataclass(frozen=True)
class Range:
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
        low, likely, high = (min(time_limit, ratio * expected_time) for ratio in (known.low, known.likely, known.high))
        return Range(low, likely, high)


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


@dataclass(frozen=True)
class Starts:
    """When pending jobs start: forecasts with likely run times, and the range of each by its key."""

    forecasts: dict[int, Forecast]
    ranges: dict[int, Range]
    newcomer: Range | None


def starts(pending: Sequence[tuple[int, Range]], free_in: Iterable[Range]) -> Starts:
    """Three forecasts: if all jobs before were short, as they usually are, and long.

    `pending`: (key, run time) in the order in which they will be taken; `free_in`: until each usable node is free.
    """
    nodes = list(free_in)
    found, newcomers = [], []
    for name in ("low", "likely", "high"):
        queue = [(key, getattr(run, name)) for key, run in pending]
        free = [getattr(node, name) for node in nodes]
        found.append(forecast(queue, free))
        newcomers.append(wait_for_newcomer(queue, free))
    early, likely, late = found
    if not nodes:
        return Starts(likely, {}, None)
    ranges = {
        key: Range(early[key].starts_in or 0.0, likely[key].starts_in or 0.0, late[key].starts_in or 0.0)
        for key, _ in pending
    }
    return Starts(likely, ranges, Range(*(newcomer or 0.0 for newcomer in newcomers)))


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
