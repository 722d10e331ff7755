"""When will a pending job start? A small simulation over run times. Pure; may import nothing of the project.

Jobs are taken in order; each goes to the node that is free first and holds it for its run time. That is what the
workers do, so the forecast is as exact as those times; `estimates` says what is known of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def remaining_seconds(expected_time: float, time_limit: float, running_for: float) -> float:
    """Seconds a running job is expected to hold its node still.

    A job past its declared time is expected to take half of what its limit leaves: it ends somewhere in between.
    """
    if running_for < expected_time:
        return expected_time - running_for
    return max(0.0, (time_limit - running_for) / 2)


def start_times(run_times: Iterable[float], heap: list[float]) -> list[float]:
    """Seconds until each job starts, in the order in which they will be taken.

    `heap` holds the seconds until each usable node is free, of at least one node (0 for an idle one), as `heapq` keeps
    them; afterwards it is as these jobs leave it, so its first is when one more job would start.
    """
    found = []
    for run_time in run_times:
        start = heap[0]
        heapq.heapreplace(heap, start + run_time)
        found.append(start)
    return found
