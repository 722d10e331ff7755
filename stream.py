"""The dashboard, live: nodes, queue, health and changed jobs as server-sent events, to any number of watchers.

`Board` holds the picture that all watchers share. Hints, from any thread, make it look again, at most once a second;
what is the same for many is made once. Each `BoardStream` sends what differs from what it sent last: one that reads
slowly is sent the newest state, not all states. A watcher is told of no job but his own; an admin of every job.
May import `answers`, `auth`, `clock`, `live`, `queue_manager`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import clock
from answers import QueuePage
from auth import Caller
from live import EVENT_STREAM, HEARTBEAT, Emit, Stream, Waiter
from queue_manager import MICROSECONDS, JobRow

ROUND_EVERY = 1.0  # seconds at least between two looks at nodes, queue and health
JOBS_EVERY = 0.1  # seconds at least between two deliveries of changed jobs
ROWS_MOST = 200  # changed jobs that wait for delivery
MAIL_MOST = 50  # changed jobs that wait for one watcher
CHECKED_FOR = 0.25  # seconds for which the watchers' tokens, once looked up, are taken for valid
WOKEN_AT_ONCE = 50  # watchers per turn of the event loop, so that requests get their turn among many watchers
BEATS = 15  # parts of the watchers, one of which sends a sign of life at a time
MISSED_EVERY = 1.0  # seconds at least between two `missed`: who is told so asks for whole lists
STARTS_MOVED = (
    2.0  # seconds by which an estimate moves, or a tenth of the wait if that is more, before it is sent again
)


@dataclass(frozen=True)
class Sources:
    """What the board shows; all called on the event loop's thread.

    `nodes` is the body of GET /api/nodes (for admins if True), `health` that of GET /readyz, `status` a job's status;
    `valid` says of each of these token ids that is valid now whether it is an admin's.
    """

    nodes: Callable[[bool], dict[str, Any]]
    queue: Callable[[], QueuePage]
    health: Callable[[], dict[str, Any]]
    status: Callable[[JobRow], dict[str, Any]]
    valid: Callable[[Collection[int]], dict[int, bool]]
    stopping: Callable[[], bool]


class Board:
    """The shared picture. Without watchers it costs nothing: hints are dropped and nothing is looked at."""

    sources: Sources  # set by whoever puts the server together, before anyone watches

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchers: dict[str, set[BoardStream]] = {}
        self._admins: set[BoardStream] = set()
        # Told from other threads, under the lock.
        self._lock = threading.Lock()
        self._rows: dict[str, JobRow] = {}
        self._rows_lost = False
        self._told = False
        self._dirtied = 0.0
        # The loop's alone.
        self._delivered = 0.0
        self._looked = 0.0
        self._round: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._beats = 0
        self._joined = 0
        self._known: dict[int, tuple[float, bool]] = {}  # tokens: when looked up, whether an admin's
        self._essence: dict[object, object] = {}
        self._page: QueuePage | None = None
        self._queue_events: dict[tuple[bool, str | None], bytes] = {}
        self.nodes: dict[bool, bytes] = {}
        self.health: dict[bool, bytes] = {}

    # -- hints, from any thread ------------------------------------------------------------------------------------

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop on which watchers live."""
        self._loop = loop

    def job_changed(self, row: JobRow) -> None:
        """A job has changed, durably; `row` is what it is now."""
        if not self._watchers:
            return
        if self._admins or row.user_id in self._watchers:
            with self._lock:
                self._rows.pop(row.job_id, None)
                self._rows[row.job_id] = row
                if len(self._rows) > ROWS_MOST:
                    del self._rows[next(iter(self._rows))]
                    self._rows_lost = True
        self.touch()

    def touch(self) -> None:
        """Something about nodes, queue or health may have changed."""
        if not self._watchers:
            return
        with self._lock:
            self._dirtied = time.monotonic()
            told, self._told = self._told, True
        if not told and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._heard)

    # -- watchers --------------------------------------------------------------------------------------------------

    def join(self, watcher: BoardStream) -> None:
        """From now on it is woken at every change; what it finds here is as it is now."""
        stale = not self._watchers or time.monotonic() - self._looked > HEARTBEAT
        self._joined += 1
        watcher.turn = self._joined % BEATS
        self._watchers.setdefault(watcher.caller.user_id, set()).add(watcher)
        if watcher.caller.is_admin:
            self._admins.add(watcher)
        if stale or watcher.caller.is_admin not in self.nodes:
            self._look()
        if self._beat is None and self._loop is not None:
            self._beat = self._loop.call_later(HEARTBEAT / BEATS, self._give_beat)

    def leave(self, watcher: BoardStream) -> None:
        """Undo `join`."""
        self._admins.discard(watcher)
        self._known.pop(watcher.caller.token_id, None)
        group = self._watchers.get(watcher.caller.user_id, set())
        group.discard(watcher)
        if not group:
            self._watchers.pop(watcher.caller.user_id, None)

    def count(self) -> int:
        """How many watch (for tests)."""
        return sum(map(len, self._watchers.values()))

    def wake_all(self) -> None:
        """Wake every watcher: the server is stopping. On the loop's thread."""
        self._wake([watcher for group in self._watchers.values() for watcher in group])

    def allows(self, caller: Caller) -> bool:
        """Whether the caller's token is still valid, and for the same role."""
        found = self._known.get(caller.token_id)
        if found is None or time.monotonic() - found[0] > CHECKED_FOR:
            self._check({caller.token_id})
            found = self._known.get(caller.token_id)
        return found is not None and found[1] == caller.is_admin and clock.now_us() < caller.expires_at

    def _check(self, tokens: set[int]) -> None:
        for token in tokens:
            self._known.pop(token, None)
        now = time.monotonic()
        self._known.update({token: (now, role) for token, role in self.sources.valid(tokens).items()})

    def queue_event(self, caller: Caller) -> bytes | None:
        """The queue as this caller may see it."""
        page = self._page
        if page is None:
            return None
        key = caller.is_admin, caller.user_id if page.owns(caller.user_id) else None
        if key not in self._queue_events:
            self._queue_events[key] = event("queue", page.body(caller.user_id, is_admin=caller.is_admin))
        return self._queue_events[key]

    # -- on the loop -----------------------------------------------------------------------------------------------

    def _give_beat(self) -> None:
        """Have a part of the watchers send a sign of life; all do within HEARTBEAT. Tokens are looked up together.

        It is also time to look for what changes without a hint: estimates, the room on the disk.
        """
        self._beat = None
        if not self._watchers or self._loop is None:
            return
        self._beat = self._loop.call_later(HEARTBEAT / BEATS, self._give_beat)
        self._beats = (self._beats + 1) % BEATS
        turn = [each for group in self._watchers.values() for each in group if each.turn == self._beats]
        for watcher in turn:
            watcher.beat = True
        self._wake(turn)
        if time.monotonic() - self._looked >= HEARTBEAT:
            self._look()

    def _heard(self) -> None:
        pause = self._delivered + JOBS_EVERY - time.monotonic()
        if pause > 0 and self._loop is not None:
            self._loop.call_later(pause, self._heard)
            return
        with self._lock:
            self._told = False
            rows, self._rows = self._rows, {}
            lost, self._rows_lost = self._rows_lost, False
        self._delivered = time.monotonic()
        self._deliver(rows, lost)
        self._look_soon()

    def _deliver(self, rows: dict[str, JobRow], lost: bool) -> None:
        concerned: dict[BoardStream, None] = {}
        for job_id, row in rows.items():
            watchers = self._admins | self._watchers.get(row.user_id, set())
            if watchers:
                data = event("job", json.dumps(self.sources.status(row)).encode())
                for watcher in watchers:
                    watcher.put(job_id, data)
                concerned.update(dict.fromkeys(watchers))
        if lost:
            everyone = [watcher for group in self._watchers.values() for watcher in group]
            for watcher in everyone:
                watcher.missed = True
            concerned.update(dict.fromkeys(everyone))
        self._wake(list(concerned))

    def _look_soon(self) -> None:
        if self._round is None and self._loop is not None and self._watchers:
            pause = max(0.0, self._looked + ROUND_EVERY - time.monotonic())
            self._round = self._loop.call_later(pause, self._look)

    def _look(self) -> None:
        if self._round is not None:
            self._round.cancel()
            self._round = None
        if not self._watchers:
            return
        self._looked = began = time.monotonic()
        changed = False
        health = self.sources.health()
        for for_admin in (False, True) if self._admins else (False,):
            nodes = self.sources.nodes(for_admin)
            # How long a newcomer waits moves all the time; it comes with the queue.
            if self._differs(("nodes", for_admin), {**nodes, "expected_wait": None}) or for_admin not in self.nodes:
                self.nodes[for_admin] = event("nodes", json.dumps(nodes).encode())
                changed = True
            seen = health if for_admin else {name: health[name] for name in ("ready", "reasons")}
            if self._differs(("health", for_admin), seen):
                self.health[for_admin] = event("health", json.dumps(seen).encode())
                changed = True
        if not self._admins:  # an admin who comes later gets what is true then
            for kept in (self.nodes, self.health):
                kept.pop(True, None)
            for what in ("nodes", "health"):
                self._essence.pop((what, True), None)
        page = self.sources.queue()
        if self._page is None or _moved(self._page, page):
            self._page, self._queue_events = page, {}
            changed = True
        if page.taken < min(self._dirtied, began):  # a long queue is not computed anew at each change
            self._look_soon()
        if changed:
            self.wake_all()

    def _differs(self, key: object, essence: object) -> bool:
        if self._essence.get(key) == essence:
            return False
        self._essence[key] = essence
        return True

    def _wake(self, watchers: list[BoardStream]) -> None:
        woken = watchers[:WOKEN_AT_ONCE]
        if len(woken) > 1:
            self._check({watcher.caller.token_id for watcher in woken})
        for watcher in woken:
            watcher.wake()
        if len(watchers) > WOKEN_AT_ONCE and self._loop is not None:
            self._loop.call_soon(self._wake, watchers[WOKEN_AT_ONCE:])


def _moved(before: QueuePage, now: QueuePage) -> bool:
    """Whether the queue is another one, or estimates have moved by more than a trifle."""

    def shape(page: QueuePage) -> tuple[object, ...]:
        return page.pending, page.running, [row.seq for row in page.rows]

    def waits(page: QueuePage) -> list[float | None]:
        return [page.wait, *(start.likely if start is not None else None for start in page.starts)]

    if shape(before) != shape(now):
        return True
    shift = before.taken - now.taken
    for old, new in zip(waits(before), waits(now), strict=True):
        if old is None or new is None:
            if old is not new:
                return True
        # An estimate that is kept comes nearer by as much as time passes, but never below now.
        elif abs(max(0.0, old + shift) - new) > max(STARTS_MOVED, new / 10):
            return True
    return False


def event(name: str, data: bytes) -> bytes:
    """A server-sent event; JSON has no line breaks of its own."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


class BoardStream(Stream):
    """One watcher. It holds references to what was sent last and a few changed jobs; no session, no thread."""

    kind = "dashboard"

    def __init__(self, board: Board, caller: Caller) -> None:
        super().__init__(EVENT_STREAM, {})
        self.caller = caller
        self.missed = False
        self.turn = 0  # which part of the watchers it belongs to
        self.beat = False  # a sign of life is due
        self._board = board
        self._waiter: Waiter | None = None
        self._jobs: dict[str, bytes] = {}
        self._sent: dict[str, bytes] = {}
        self._missed_told = -MISSED_EVERY
        self._reminder: asyncio.TimerHandle | None = None

    def put(self, job_id: str, data: bytes) -> None:
        """A job has changed; a newer state takes the place of one that was not sent yet."""
        self._jobs.pop(job_id, None)
        self._jobs[job_id] = data
        if len(self._jobs) > MAIL_MOST:
            self._jobs.clear()
            self.missed = True

    def wake(self) -> None:
        """There is something to send, or the server is stopping."""
        if self._waiter is not None:
            self._waiter.set()

    async def _follow(self, emit: Emit, waiter: Waiter) -> None:
        self._waiter = waiter
        try:
            self._board.join(self)
            await self._send_news(emit, waiter)
        finally:
            self._waiter = None
            if self._reminder is not None:
                self._reminder.cancel()
            self._board.leave(self)

    async def _send_news(self, emit: Emit, waiter: Waiter) -> None:
        while not waiter.gone:
            waiter.clear()
            if self._board.sources.stopping() or not self._board.allows(self.caller):
                await emit(b"", more=False)
                return
            news = b"".join(self._news())
            if self.beat and not news:
                news = b": still here\n\n"
            self.beat = False
            await emit(news)
            # The board wakes it; the end of its token is its own.
            await waiter.wait_for((self.caller.expires_at - clock.now_us()) / MICROSECONDS)

    def _news(self) -> list[bytes]:
        """What is not yet sent."""
        news = []
        state = {
            "nodes": self._board.nodes.get(self.caller.is_admin),
            "queue": self._board.queue_event(self.caller),
            "health": self._board.health.get(self.caller.is_admin),
        }
        for name, data in state.items():
            if data is not None and self._sent.get(name) != data:
                self._sent[name] = data
                news.append(data)
        if self.missed:
            pause = self._missed_told + MISSED_EVERY - time.monotonic()
            if pause <= 0:
                self.missed, self._missed_told, self._reminder = False, time.monotonic(), None
                news.append(event("missed", b"{}"))
            elif self._reminder is None:
                self._reminder = asyncio.get_running_loop().call_later(pause, self.wake)
        jobs, self._jobs = self._jobs, {}
        return [*news, *jobs.values()]
