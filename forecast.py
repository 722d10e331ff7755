"""When will a pending job start? A small simulation over declared times. Pure; may import nothing of the project.

Jobs are taken in order; each goes to the node that is free first and holds it for its `expected_time`. That is what
the workers do, so the forecast is exact when declared times are, and drifts with them otherwise.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """A pending job's place (1 is next) and the seconds until it starts; None when no node is in use."""

    position: int
    starts_in: float | None


def remaining_seconds(expected_time: float, time_limit: float, running_for: float) -> float:
    """Seconds a running job is expected to hold its node still.

    A job past its declared time is expected to take half of what its limit leaves: it ends somewhere in between.
    """
    if running_for < expected_time:
        return expected_time - running_for
    return max(0.0, (time_limit - running_for) / 2)


def forecast(pending: Sequence[tuple[int, float]], free_in: Iterable[float]) -> dict[int, Forecast]:
    """Forecast of every pending job.

    `pending`: (key, expected_time) in the order in which they will be taken.
    `free_in`: seconds until each usable node is free; 0 for an idle one.
    """
    heap = list(free_in)
    heapq.heapify(heap)
    result: dict[int, Forecast] = {}
    for position, (key, expected_time) in enumerate(pending, start=1):
        if not heap:
            result[key] = Forecast(position, None)
            continue
        start = heap[0]
        heapq.heapreplace(heap, start + expected_time)
        result[key] = Forecast(position, start)
    return result


def wait_for_newcomer(pending: Sequence[tuple[int, float]], free_in: Iterable[float]) -> float | None:
    """Seconds a job submitted now would wait; None when no node is in use."""
    newcomer = -1
    return forecast([*pending, (newcomer, 0.0)], free_in)[newcomer].starts_in
