"""In-process hints that something changed. A hint may be lost or come twice: the database alone is the truth.

`JobWatch` lets coroutines wait for a job to change; `IdleNodes` lets the best idle node be woken for a new job.
May import only `states`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

TURN_MOST = 0.1  # seconds that a thread lets the loop come first


class Settable(Protocol):
    """What a watch sets, on its loop's thread."""

    def set(self) -> None:
        """Something happened."""


class JobWatch:
    """Coroutines of one event loop waiting for changes of jobs; told from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, set[Settable]] = {}
        self._turns: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop whose coroutines wait."""
        self._loop = loop

    def subscribe(self, job_id: str, event: Settable) -> None:
        """Have the event set at each change of the job, until `unsubscribe`."""
        with self._lock:
            self._waiting.setdefault(job_id, set()).add(event)

    def unsubscribe(self, job_id: str, event: Settable) -> None:
        """Stop waiting with `event`."""
        with self._lock:
            events = self._waiting.get(job_id)
            if events is not None:
                events.discard(event)
                if not events:
                    del self._waiting[job_id]

    def changed(self, job_id: str) -> None:
        """Wake everyone who waits for the job. Any thread."""
        if job_id not in self._waiting:  # most jobs are not watched, and this comes for every piece of output
            return
        with self._lock:
            events = list(self._waiting.get(job_id, ()))
        self._set(events)

    def heard(self) -> None:
        """Wait until the loop has come to what it was told before this, at most TURN_MOST. Any thread but the loop's.

        Threads with more work than there is time for are so never more than a piece of it ahead, and the loop, which
        answers everybody, has its turn between two pieces: it lets one thread go on at a time.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        turn = threading.Event()
        with self._lock:
            self._turns.append(turn)
            if len(self._turns) == 1:
                loop.call_soon_threadsafe(self._end_turn)
        turn.wait(TURN_MOST)

    def _end_turn(self) -> None:
        with self._lock:
            self._turns.popleft().set()
            if self._turns and self._loop is not None:
                self._loop.call_soon(self._end_turn)

    def wake_all(self) -> None:
        """Wake every waiter: the server is stopping."""
        with self._lock:
            events = [event for group in self._waiting.values() for event in group]
        self._set(events)

    def waiting(self) -> int:
        """Number of waiters (for tests and metrics)."""
        with self._lock:
            return sum(len(group) for group in self._waiting.values())

    def _set(self, events: list[Settable]) -> None:
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[Settable]) -> None:
    for event in events:
        event.set()


@dataclass(order=True)
class _Idle:
    # What makes a node the better choice: no infrastructure failures in a row, no failed jobs in a row, idle longest.
    infra_failures: int
    failed_jobs: int
    idle_since: float
    node_id: str
    wake: Callable[[], None] = field(compare=False)


class IdleNodes:
    """The nodes that wait for work. `offer` wakes the healthiest, then the longest idle."""

    def __init__(self) -> None:
        self._idle: dict[str, _Idle] = {}
        self._lock = threading.Lock()

    def enter(
        self, node_id: str, infra_failures: int, failed_jobs: int, idle_since: float, wake: Callable[[], None]
    ) -> None:
        """The node waits for work from now on; `wake` must not block. `idle_since` is monotonic."""
        with self._lock:
            self._idle[node_id] = _Idle(infra_failures, failed_jobs, idle_since, node_id, wake)

    def leave(self, node_id: str) -> None:
        """The node no longer waits."""
        with self._lock:
            self._idle.pop(node_id, None)

    def offer(self, *, besides: str | None = None) -> bool:
        """Wake the best idle node once; it must `enter` again to be woken again. False when none is idle.

        `besides` names a node that is not to be woken.
        """
        with self._lock:
            choice = [idle for idle in self._idle.values() if idle.node_id != besides]
            if not choice:
                return False
            best = min(choice)
            del self._idle[best.node_id]
        best.wake()
        return True

    def waiting(self) -> list[str]:
        """Ids of the idle nodes, best first."""
        with self._lock:
            return [idle.node_id for idle in sorted(self._idle.values())]
