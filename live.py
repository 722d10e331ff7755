"""What happens to a job as it happens: its output and its status, to any number of watchers.

Output comes as server-sent events or as plain bytes. A watcher costs a place to wait and an offset; what it is sent is
read from the job's files, once for all who are at the same byte, so a slow one holds nothing in memory and a fast job
is not slowed. One that falls far behind skips ahead and is told how much it missed.
May import `metrics`, `states`, `storage`, `wakeups`.
"""

from __future__ import annotations

import asyncio
import codecs
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import metrics
import states
from storage import MERGED, OutputPart
from wakeups import JobWatch

BLOCK = 1 << 18  # bytes that are read and sent at once: each time costs the loop several waits for other threads
BEHIND_MOST = 16 << 20  # bytes a watcher of a running job may lag before it skips ahead
SKIP_TO = 1 << 16  # where it lands before the end
HEARTBEAT = 15.0  # seconds; keeps proxies from closing a quiet stream
QUEUE_TICK = 3.0  # seconds after which a pending job's place is looked at again
WOKEN_AT_ONCE = 64  # watchers of one stream; then others get their turn
LINE_MOST = 1 << 16  # bytes of an unfinished line that `Collapse` holds back
EVENT_STREAM = "text/event-stream"
CONTROL = bytes({*range(32)} - {10})  # ASCII that takes more than a backslash in JSON


class Encoding(Protocol):
    """How pieces of output look on the wire. It keeps nothing, so that what it makes can be sent to many."""

    media_type: str

    def piece(self, stream: str, data: bytes, end: int, *, last: bool) -> tuple[bytes, int]:
        """Output up to byte `end`, and how many of its bytes that is; the rest goes with what follows, unless this is
        the `last` of it."""

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

    def piece(self, stream: str, data: bytes, end: int, *, last: bool) -> tuple[bytes, int]:
        """The bytes."""
        return data, len(data)

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

    Output is a JSON string (it may hold carriage returns, which end a line for SSE) in an event of the given name, or
    of the name of its stream; a character that is cut by the end of a piece goes with the next one. `skipped` holds
    {"from", "to"}, `end` the job's status.
    """

    media_type = EVENT_STREAM

    def __init__(self, name: str | None) -> None:
        self._name = name

    def piece(self, stream: str, data: bytes, end: int, *, last: bool) -> tuple[bytes, int]:
        """An output event."""
        text, used = json_string(data, last=last)
        if not used:
            return b"", 0
        head = f"event: {self._name or stream}\nid: {end - len(data) + used}\ndata: ".encode()
        return b"".join((head, text, b"\n\n")), used

    def skipped(self, start: int, end: int) -> bytes:
        """A `skipped` event."""
        return f"event: skipped\nid: {end}\ndata: {json.dumps({'from': start, 'to': end})}\n\n".encode()

    def restarted(self) -> bytes:
        """A `restarted` event."""
        return b"event: restarted\nid: 0\ndata: {}\n\n"

    def heartbeat(self) -> bytes:
        """A comment."""
        return b": still here\n\n"

    def last(self, status: dict[str, Any]) -> bytes:
        """The `end` event."""
        return _event("end", status)


def json_string(data: bytes, *, last: bool) -> tuple[bytes, int]:
    """Output as a JSON string, in ASCII, and how many of its bytes that is: all, but for a cut character at the end
    that is not the `last` of the output. No characters that some take for ends of lines are left in it."""
    if data.isascii() and not any(map(data.__contains__, CONTROL)):  # nearly always, and four times as fast
        return b'"%b"' % data.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n"), len(data)
    text, used = codecs.utf_8_decode(data, "replace", last)
    return json.dumps(text).encode(), used


PLAIN_TEXT = PlainText()
OUTPUT_EVENTS = ServerSentEvents("output")
MERGED_EVENTS = ServerSentEvents(None)


def encoding_of(stream: str, *, plain: bool) -> Encoding:
    """Of one stream or of both merged; events of the latter tell of which stream their bytes are."""
    if plain:
        return PLAIN_TEXT
    return MERGED_EVENTS if stream == MERGED else OUTPUT_EVENTS


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


class Collapsed:
    """Output as it is sent when it goes through a filter first."""

    def __init__(self, encoding: Encoding, filter: Collapse) -> None:
        self._encoding = encoding
        self._filter = filter
        self._stream = ""  # of the last piece
        self._cut = b""  # the beginning of a character with which it ended

    def feed(self, part: OutputPart) -> bytes:
        """What is visible of the part. Where the other stream goes on, the line so far is, as on a terminal."""
        found = []
        for stream, data in part.pieces:
            if stream != self._stream and self._stream:
                found.append(self.finish())
            self._stream = stream
            found.append(self._visible(self._filter.feed(data), last=False))
        return b"".join(found)

    def finish(self) -> bytes:
        """What is visible of the unfinished line."""
        return self._visible(self._filter.finish(), last=True)

    def _visible(self, data: bytes, *, last: bool) -> bytes:
        data = self._cut + data
        sent, used = self._encoding.piece(self._stream, data, self._filter.position, last=last)
        self._cut = data[used:]
        return sent


class Source(Protocol):
    """A job whose output is followed."""

    def read(self, offset: int) -> OutputPart:
        """Output from `offset`."""

    def ended(self) -> dict[str, Any] | None:
        """The job's status once it is final."""


class Channel:
    """One stream of one job as its watchers share it: what one of them has read and encoded serves all at that byte."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._watchers: dict[Waiter, None] = {}
        self._unwoken: dict[Waiter, None] = {}
        self._quiet = self._loop.call_later(HEARTBEAT, self._beat)
        self.over = _Flag(self._changed)
        self._read: tuple[int, OutputPart] | None = None
        self._encoded: dict[Encoding, tuple[int, bytes, int]] = {}
        self._status: dict[str, Any] | None = None
        self._asked = False

    def set(self) -> None:
        """There is more output."""
        self._read = None
        self._encoded.clear()
        self._quiet.cancel()
        self._quiet = self._loop.call_later(HEARTBEAT, self._beat)
        waking = bool(self._unwoken)
        self._unwoken.update(self._watchers)  # those left from before keep their place in front
        if not waking:
            self._wake_some()

    def _wake_some(self) -> None:
        for watcher in list(itertools.islice(self._unwoken, WOKEN_AT_ONCE)):
            del self._unwoken[watcher]
            watcher.set()
        if self._unwoken:
            self._loop.call_soon(self._wake_some)

    def _beat(self) -> None:
        for watcher in self._watchers:
            watcher.beat()
        self._quiet = self._loop.call_later(HEARTBEAT, self._beat)

    def add(self, watcher: Waiter) -> None:
        """Set it at every growth or change from now on."""
        self._watchers[watcher] = None

    def remove(self, watcher: Waiter) -> bool:
        """Do so no more; whether that was the last one, which ends the channel."""
        self._watchers.pop(watcher, None)
        self._unwoken.pop(watcher, None)
        if not self._watchers:
            self._quiet.cancel()
        return not self._watchers

    def _changed(self) -> None:
        self._asked = False
        self.set()

    def ended(self) -> dict[str, Any] | None:
        """The job's status once it is final; asked again only after a change."""
        if not self._asked:
            self._asked = True
            self._status = self._source.ended()
        return self._status

    def read(self, offset: int) -> OutputPart:
        """Output from `offset`."""
        if self._read is None or self._read[0] != offset:
            self._read = offset, self._source.read(offset)
        return self._read[1]

    def encoded(self, part: OutputPart, offset: int, encoding: Encoding) -> tuple[bytes, int]:
        """A part from `offset`, read while the job may go on, as it is sent, and the offset after it."""
        known = self._encoded.get(encoding)
        if known is None or known[0] != offset or self._read is None or self._read[1] is not part:
            known = self._encoded[encoding] = (offset, *encode(encoding, part, offset, last=False))
        return known[1:]


class Channels:
    """The channels that have watchers."""

    def __init__(self, growth: JobWatch, changes: JobWatch) -> None:
        self._growth = growth
        self._changes = changes
        self._open: dict[tuple[str, str], Channel] = {}

    def join(self, job_id: str, stream: str, source: Callable[[], Source], watcher: Waiter) -> Channel:
        """Have `watcher` set at each growth and change of the job, until `leave`."""
        channel = self._open.get((job_id, stream))
        if channel is None:
            channel = self._open[job_id, stream] = Channel(source())
            self._growth.subscribe(job_id, channel)
            self._changes.subscribe(job_id, channel.over)
        channel.add(watcher)
        return channel

    def leave(self, job_id: str, stream: str, watcher: Waiter) -> None:
        """Undo `join`."""
        channel = self._open[job_id, stream]
        if channel.remove(watcher):
            del self._open[job_id, stream]
            self._growth.unsubscribe(job_id, channel)
            self._changes.unsubscribe(job_id, channel.over)


def encode(encoding: Encoding, part: OutputPart, offset: int, *, last: bool) -> tuple[bytes, int]:
    """A part from `offset` as it is sent, and the offset after it."""
    found = []
    for number, (stream, data) in enumerate(part.pieces, 1):
        # A character that is cut where the other stream goes on stays cut.
        sent, used = encoding.piece(stream, data, offset + len(data), last=last or number < len(part.pieces))
        found.append(sent)
        offset += used
    return b"".join(found), offset


class Waiter:
    """What one watcher waits on: set when something happened, or when the client has gone."""

    __slots__ = ("_future", "_is_set", "gone")

    def __init__(self) -> None:
        self._is_set = True
        self._future: asyncio.Future[bool] | None = None
        self.gone = False

    def set(self) -> None:
        """Something happened."""
        self._is_set = True
        self._settle(True)

    def leave(self) -> None:
        """The client has gone."""
        self.gone = True
        self.set()

    def clear(self) -> None:
        """What happened so far is dealt with next."""
        self._is_set = False

    def beat(self) -> None:
        """Nothing happened for a time."""
        self._settle(False)

    async def wait(self) -> bool:
        """Until something happened; False at a beat before it."""
        if self._is_set:
            return True
        self._future = asyncio.get_running_loop().create_future()
        try:
            return await self._future
        finally:
            self._future = None

    async def wait_for(self, seconds: float) -> bool:
        """The same, with a beat after so many seconds."""
        timer = asyncio.get_running_loop().call_later(seconds, self.beat)
        try:
            return await self.wait()
        finally:
            timer.cancel()

    def _settle(self, happened: bool) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(happened)


class _Flag:
    """Calls a function when it is set."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.set = function


class Stream(Response, ABC):
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

        waiter = Waiter()
        gone = asyncio.ensure_future(_disconnected(receive, waiter))
        try:
            with metrics.WATCHERS.labels(self.kind).track_inprogress():
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._follow(emit, waiter)
        finally:
            gone.cancel()

    @abstractmethod
    async def _follow(self, emit: Emit, waiter: Waiter) -> None:
        """Send until there is no more to come."""


class StatusStream(Stream):
    """The job's status at once and whenever it changes, as events `status`; at the last `end`, when it is final.

    Every event of the job's trail comes before the status that it led to, as an event `transition` with its number as
    id; `after` is the last one that is known already. A change comes as a hint; while the job waits its place in the
    queue is looked at every few seconds.
    """

    kind = "status"

    def __init__(
        self,
        job_id: str,
        changes: JobWatch,
        current: Callable[[], dict[str, Any] | None],
        trail: Callable[[int], list[tuple[int, dict[str, Any]]]],
        stopping: Callable[[], bool],
        after: int = 0,
    ) -> None:
        super().__init__(EVENT_STREAM, {})
        self._job_id = job_id
        self._changes = changes
        self._current = current
        self._trail = trail
        self._stopping = stopping
        self._after = after

    async def _follow(self, emit: Emit, waiter: Waiter) -> None:
        self._changes.subscribe(self._job_id, waiter)
        try:
            await self._send_changes(emit, waiter)
        finally:
            self._changes.unsubscribe(self._job_id, waiter)

    async def _send_changes(self, emit: Emit, waiter: Waiter) -> None:
        known: dict[str, Any] | None = None
        quiet = 0.0
        while not waiter.gone:
            waiter.clear()
            news, status = self._look()
            if status is None:  # the job was removed meanwhile
                await emit(b"", more=False)
                return
            if _essence(status) != known:
                known, quiet = _essence(status), 0.0
                news += _event("status", status)
            await emit(news)
            if status["status"] in states.FINAL or self._stopping():
                await emit(_event("end", status) if status["status"] in states.FINAL else b"", more=False)
                return
            pause = QUEUE_TICK if status["status"] == states.PENDING else HEARTBEAT
            if not await waiter.wait_for(pause):
                quiet += pause
                if quiet >= HEARTBEAT:
                    quiet = 0.0
                    await emit(b": still here\n\n")

    def _look(self) -> tuple[bytes, dict[str, Any] | None]:
        """(new transitions, the status they led to)."""
        news = b""
        while True:
            status = self._current()  # before the trail: no transition of it is missing then
            found = self._trail(self._after)
            for number, event in found:
                news += f"id: {number}\n".encode() + _event("transition", event)
                self._after = number
            if not found:
                return news, status


class LogStream(Stream):
    """A response that follows output from `offset` until the job has ended or the client is gone."""

    kind = "log"

    def __init__(
        self,
        join: Callable[[Waiter], Channel],
        leave: Callable[[Waiter], None],
        stopping: Callable[[], bool],
        offset: int,
        encoding: Encoding,
        collapse: Collapse | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(encoding.media_type, headers or {})
        self._join = join
        self._leave = leave
        self._stopping = stopping
        self._origin = 0
        self.offset = offset
        self.encoding = encoding
        self.collapsed = Collapsed(encoding, collapse) if collapse is not None else None

    async def _follow(self, emit: Emit, waiter: Waiter) -> None:
        channel = self._join(waiter)
        try:
            while not waiter.gone:
                waiter.clear()
                # Asked before the files are read: what a final job has printed is all there.
                status = channel.ended()
                await self._catch_up(channel, emit, waiter, running=status is None)
                if status is not None or self._stopping():
                    if status is not None and self.collapsed is not None:
                        await emit(self.collapsed.finish())
                    await emit(self.encoding.last(status) if status is not None else b"", more=False)
                    return
                if not await waiter.wait():
                    await emit(self.encoding.heartbeat())
        finally:
            self._leave(waiter)

    async def _catch_up(self, channel: Channel, emit: Emit, waiter: Waiter, *, running: bool) -> None:
        while not waiter.gone:
            part = channel.read(self.offset)
            if not part.origin:  # nothing printed yet, or the next attempt is about to
                return
            if part.size < self.offset or part.origin != (self._origin or part.origin):
                self._restart_at(0)
                self._origin = part.origin
                await emit(self.encoding.restarted())
                continue
            self._origin = part.origin
            if running and part.size - self.offset > BEHIND_MOST:
                start = self.offset
                self._restart_at(part.size - SKIP_TO)
                await emit(self.encoding.skipped(start, self.offset))
                continue
            before = self.offset
            if self.collapsed is not None:
                data = self.collapsed.feed(part)
                self.offset += sum(len(piece) for _, piece in part.pieces)
            elif running:
                data, self.offset = channel.encoded(part, self.offset, self.encoding)
            else:
                data, self.offset = encode(self.encoding, part, self.offset, last=False)
                if self.offset == before:
                    data, self.offset = encode(self.encoding, part, self.offset, last=True)
            if self.offset == before:
                return
            await emit(data)
            if running and self.offset == part.size:
                return  # what has come meanwhile has set the waiter
            # A reader as fast as this never makes `emit` wait; the others still get their turn.
            await asyncio.sleep(0)

    def _restart_at(self, offset: int) -> None:
        self.offset = offset
        if self.collapsed is not None:
            self.collapsed = Collapsed(self.encoding, Collapse(offset))


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


async def _disconnected(receive: Receive, waiter: Waiter) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    waiter.leave()
