"""What happens to a job as it happens: its output and its status, to any number of watchers.

Output comes as server-sent events or as plain bytes. A watcher costs an event and an offset; what it is sent is read
from the job's file, so a slow one holds nothing in memory and a fast job is not slowed. One that falls far behind skips
ahead and is told how much it missed.
May import `metrics`, `states`, `wakeups`.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import metrics
import states
from wakeups import JobWatch

BLOCK = 1 << 16
BEHIND_MOST = 16 << 20  # bytes a watcher of a running job may lag before it skips ahead
SKIP_TO = 1 << 16  # where it lands before the end
HEARTBEAT = 15.0  # seconds; keeps proxies from closing a quiet stream
QUEUE_TICK = 3.0  # seconds after which a pending job's place is looked at again
LINE_MOST = 1 << 16  # bytes of an unfinished line that `Collapse` holds back
EVENT_STREAM = "text/event-stream"


class Encoding(Protocol):
    """How pieces of output look on the wire."""

    media_type: str

    def piece(self, data: bytes, end: int) -> bytes:
        """Output up to byte `end` of the stream."""

    def skipped(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` are left out."""

    def restarted(self) -> bytes:
        """The job runs again, on another node; what follows is its new output from the beginning."""

    def heartbeat(self) -> bytes:
        """Nothing happened."""

    def last(self, status: dict[str, Any]) -> bytes:
        """The job has ended and everything was sent."""


class PlainText:
    """The bytes as they are, for `curl -N`."""

    media_type = "text/plain; charset=utf-8"

    def piece(self, data: bytes, end: int) -> bytes:
        """The bytes."""
        return data

    def skipped(self, start: int, end: int) -> bytes:
        """A line that says so."""
        return f"\n[{end - start} bytes skipped]\n".encode()

    def restarted(self) -> bytes:
        """A line that says so."""
        return b"\n[the job runs again from its beginning]\n"

    def heartbeat(self) -> bytes:
        """Plain text has none."""
        return b""

    def last(self, status: dict[str, Any]) -> bytes:
        """The end of the body says it."""
        return b""


class ServerSentEvents:
    """Events whose id is the byte offset to go on from, so that `Last-Event-ID` resumes.

    `output` holds a JSON string (output may hold carriage returns, which end a line for SSE); a character that is cut
    by the end of a piece goes with the next one. `skipped` holds {"from", "to"}, `end` the job's status.
    """

    media_type = EVENT_STREAM

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def piece(self, data: bytes, end: int) -> bytes:
        """An `output` event."""
        text = self._decoder.decode(data)
        kept = len(self._decoder.getstate()[0])
        return f"event: output\nid: {end - kept}\ndata: {json.dumps(text)}\n\n".encode() if text else b""

    def skipped(self, start: int, end: int) -> bytes:
        """A `skipped` event."""
        self._decoder.reset()
        return f"event: skipped\nid: {end}\ndata: {json.dumps({'from': start, 'to': end})}\n\n".encode()

    def restarted(self) -> bytes:
        """A `restarted` event."""
        self._decoder.reset()
        return b"event: restarted\nid: 0\ndata: {}\n\n"

    def heartbeat(self) -> bytes:
        """A comment."""
        return b": still here\n\n"

    def last(self, status: dict[str, Any]) -> bytes:
        """What the cut character left, and the `end` event."""
        text = self._decoder.decode(b"", True)
        rest = f"event: output\ndata: {json.dumps(text)}\n\n" if text else ""
        return rest.encode() + _event("end", status)


class Collapse:
    """Leaves of each line what its carriage returns leave visible, for output with progress bars.

    Of the bytes between two newlines only those after the last carriage return pass; returns directly before the
    newline are part of it and pass as one. A line is held back until its newline, but never more than `most` bytes:
    those pass, and a later return in that line passes too, so that a terminal still shows the line right.
    `position` is the byte of the stream from which a new filter gives what this one has not given yet; `before` is
    the byte in front of `start` that the reader has seen, if any.
    """

    def __init__(self, start: int = 0, *, before: bytes = b"", most: int = LINE_MOST) -> None:
        self.position = start
        self._consumed = start
        self._most = most
        self._held = b""
        self._returns = 0
        self._line_begun = before not in (b"", b"\n", b"\r")  # the reader has some of this line

    def feed(self, data: bytes) -> bytes:
        """What passes of the next bytes."""
        passed: list[bytes] = []
        step = max(1, self._most // 2)  # so that a segment between two returns of one step is never too long to hold
        for at in range(0, len(data), step):
            self._step(data[at : at + step], passed)
        return b"".join(passed)

    def finish(self) -> bytes:
        """What is visible of the unfinished line; goes on at `position`."""
        passed, self._held = self._held, b""
        self.position = self._consumed - self._returns
        self._line_begun = self._line_begun or bool(passed)
        return passed

    def _step(self, data: bytes, passed: list[bytes]) -> None:
        whole = data.rfind(b"\n") + 1
        if whole and not self._returns and b"\r" not in data[:whole]:  # most output has no returns
            passed += (self._held, data[:whole])
            self._consumed += whole
            self._new_line()
            data = data[whole:]
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._part(line, passed)
            passed += (self._held, b"\r\n" if self._returns else b"\n")
            self._consumed += 1
            self._new_line()
        self._part(rest, passed)

    def _new_line(self) -> None:
        self._held, self._returns, self._line_begun = b"", 0, False
        self.position = self._consumed

    def _part(self, text: bytes, passed: list[bytes]) -> None:
        """A part of one line, without its newline."""
        visible = text.rstrip(b"\r")
        if visible:
            first, found, _ = visible.partition(b"\r")
            if first:
                self._extend(first, passed)
            if found:
                self._consumed += len(visible) - len(first)
                self._held = self._begin() + visible[visible.rfind(b"\r") + 1 :]
            self._returns = 0
        self._returns += len(text) - len(visible)
        self._consumed += len(text) - len(visible)

    def _extend(self, segment: bytes, passed: list[bytes]) -> None:
        self._consumed += len(segment)
        self._held = (self._begin() if self._returns else self._held) + segment
        self._returns = 0
        while len(self._held) > self._most:
            passed.append(self._held[: self._most])
            self._held, self._line_begun = self._held[self._most :], True
            self.position = self._consumed - len(self._held)

    def _begin(self) -> bytes:
        return b"\r" if self._line_begun else b""


@dataclass(frozen=True)
class Followed:
    """One job's stream: where it is, and how to learn of its growth and end.

    `ended` gives the job's status once it is final (or None), `stopping` whether the server is about to stop.
    """

    job_id: str
    path: Path
    growth: JobWatch
    changes: JobWatch
    ended: Callable[[], dict[str, Any] | None]
    stopping: Callable[[], bool]


class _Stream(Response, ABC):
    """A response that goes on while a job does, until the client is gone."""

    kind: str  # of stream, for the metrics

    def __init__(self, media_type: str, headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        # Not the base class's: it would add a length, and a charset where there is one.
        del self.headers["content-length"]
        self.headers["content-type"] = media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def emit(data: bytes, more: bool = True) -> None:
            if data or not more:
                await send({"type": "http.response.body", "body": data, "more_body": more})

        changed = _Changed(asyncio.Event())
        gone = asyncio.ensure_future(_disconnected(receive))
        self._listen(changed)
        try:
            with metrics.WATCHERS.labels(self.kind).track_inprogress():
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._follow(emit, changed, gone)
        finally:
            gone.cancel()
            self._leave(changed)

    @abstractmethod
    def _listen(self, changed: _Changed) -> None:
        """Have `changed` told of what happens to the job."""

    @abstractmethod
    def _leave(self, changed: _Changed) -> None:
        """Undo `_listen`."""

    @abstractmethod
    async def _follow(self, emit: Emit, changed: _Changed, gone: asyncio.Future[None]) -> None:
        """Send until there is no more to come."""


class StatusStream(_Stream):
    """The job's status at once and whenever it changes, as events `status`; at the last `end`, when it is final.

    A change comes as a hint; while the job waits its place in the queue is looked at every few seconds.
    """

    kind = "status"

    def __init__(
        self,
        job_id: str,
        changes: JobWatch,
        current: Callable[[], dict[str, Any] | None],
        stopping: Callable[[], bool],
    ) -> None:
        super().__init__(EVENT_STREAM, {})
        self._job_id = job_id
        self._changes = changes
        self._current = current
        self._stopping = stopping

    def _listen(self, changed: _Changed) -> None:
        self._changes.subscribe(self._job_id, changed)

    def _leave(self, changed: _Changed) -> None:
        self._changes.unsubscribe(self._job_id, changed)

    async def _follow(self, emit: Emit, changed: _Changed, gone: asyncio.Future[None]) -> None:
        known: dict[str, Any] | None = None
        quiet = 0.0
        while not gone.done():
            changed.event.clear()
            status = self._current()
            if status is None:  # the job was removed meanwhile
                await emit(b"", more=False)
                return
            if _essence(status) != known:
                known, quiet = _essence(status), 0.0
                await emit(_event("status", status))
            if status["status"] in states.FINAL or self._stopping():
                await emit(_event("end", status) if status["status"] in states.FINAL else b"", more=False)
                return
            pause = QUEUE_TICK if status["status"] == states.PENDING else HEARTBEAT
            if not await _wait(changed.event, gone, pause):
                quiet += pause
                if quiet >= HEARTBEAT:
                    quiet = 0.0
                    await emit(b": still here\n\n")


class LogStream(_Stream):
    """A response that follows one output stream from `offset` until the job has ended or the client is gone."""

    kind = "log"

    def __init__(
        self,
        followed: Followed,
        offset: int,
        encoding: Encoding,
        collapse: Collapse | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(encoding.media_type, headers or {})
        self.followed = followed
        self.offset = offset
        self.encoding = encoding
        self.collapse = collapse

    def _listen(self, changed: _Changed) -> None:
        self.followed.growth.subscribe(self.followed.job_id, changed.event)
        self.followed.changes.subscribe(self.followed.job_id, changed)

    def _leave(self, changed: _Changed) -> None:
        self.followed.growth.unsubscribe(self.followed.job_id, changed.event)
        self.followed.changes.unsubscribe(self.followed.job_id, changed)

    async def _follow(self, emit: Emit, changed: _Changed, gone: asyncio.Future[None]) -> None:
        status: dict[str, Any] | None = None
        while not gone.done():
            changed.event.clear()
            # Asked before the file is read: what a final job has printed is all there.
            if changed.flag:
                changed.flag = False
                status = self.followed.ended()
            await self._catch_up(emit, gone, running=status is None)
            if status is not None or self.followed.stopping():
                if status is not None and self.collapse is not None:
                    visible = self.collapse.finish()
                    await emit(self.encoding.piece(visible, self.collapse.position) if visible else b"")
                await emit(self.encoding.last(status) if status is not None else b"", more=False)
                return
            if not await _wait(changed.event, gone, HEARTBEAT):
                await emit(self.encoding.heartbeat())

    def _restart_at(self, offset: int) -> None:
        self.offset = offset
        if self.collapse is not None:
            self.collapse = Collapse(offset)

    def _piece(self, data: bytes) -> bytes:
        """The next bytes as they are sent, maybe none of them yet."""
        self.offset += len(data)
        if self.collapse is None:
            return self.encoding.piece(data, self.offset)
        visible = self.collapse.feed(data)
        return self.encoding.piece(visible, self.collapse.position) if visible else b""

    async def _catch_up(self, emit: Emit, gone: asyncio.Future[None], *, running: bool) -> None:
        while not gone.done():
            data, size = _read(self.followed.path, self.offset)
            if size < self.offset:  # the job was started again: another attempt, another output
                self._restart_at(0)
                await emit(self.encoding.restarted())
                continue
            if running and size - self.offset > BEHIND_MOST:
                start = self.offset
                self._restart_at(size - SKIP_TO)
                await emit(self.encoding.skipped(start, self.offset))
                continue
            if not data:
                return
            await emit(self._piece(data))
            # A reader as fast as this never makes `emit` wait; the others still get their turn.
            await asyncio.sleep(0)


class _Changed:
    """Sets an event and remembers that it was a change of the job's state: only then the database is asked."""

    def __init__(self, event: asyncio.Event) -> None:
        self.event = event
        self.flag = True

    def set(self) -> None:
        self.flag = True
        self.event.set()


class Emit(Protocol):
    """Sends a part of the body."""

    async def __call__(self, data: bytes, more: bool = True) -> None:
        """Nothing is sent for no bytes, unless they are the last."""


def _event(name: str, status: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(status)}\n\n".encode()


def _essence(status: dict[str, Any]) -> dict[str, Any]:
    """What makes a status another one: estimates move all the time."""
    moving = ("message", "estimated_start_range", "estimated_finish", "estimated_finish_range")
    return {**status, **dict.fromkeys(moving), "estimated_start": status["estimated_start"] is None}


def _read(path: Path, offset: int) -> tuple[bytes, int]:
    """(bytes at `offset`, size of the file); a file that is not there yet is empty."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b"", 0
    try:
        return os.pread(handle, BLOCK, offset), os.fstat(handle).st_size
    finally:
        os.close(handle)


async def _wait(event: asyncio.Event, gone: asyncio.Future[None], timeout: float) -> bool:
    """Until something happened or the client left; False after `timeout` seconds of nothing."""
    waiter: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
    try:
        done, _ = await asyncio.wait({waiter, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        waiter.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
