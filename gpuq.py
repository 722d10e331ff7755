#!/usr/bin/env python3
"""The client: `Client` and `AsyncClient` for programs and notebooks, and the command line `python3 gpuq.py`.

One file that can be copied anywhere; it needs requirements-client.txt and nothing of the server. All logic is in
`AsyncClient`; `Client` runs one on an event loop in a thread, so it works where a loop runs already.
May import nothing of the project.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import ssl
import sys
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Generic, Literal, NamedTuple, NoReturn, TypedDict, TypeVar, cast
from urllib.parse import quote

try:
    import httpx
    import tomli
    import typer
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"gpuq needs the package {missing.name}: pip3 install -r requirements-client.txt")

__version__ = "1.0.0"
__all__ = ["AsyncClient", "Client", "Config", "GpuqError", "Job", "LogPiece", "Refused", "Results", "Unreachable"]

ACTIVE = ("pending", "running")
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")
PATIENCE = 90.0  # seconds; more than the minute that a rate limit may ask for
PAUSE_MOST = 2.0  # seconds between two tries where the server named none
SILENCE_MOST = 45.0  # seconds; a healthy stream says something every 15
INTERRUPTED = 130
T = TypeVar("T")
Stream = Literal["stdout", "stderr"]
OnInterrupt = Literal["ask", "detach", "cancel"]
JobState = Literal["pending", "running", "completed", "failed", "cancelled"]


# -- errors --------------------------------------------------------------------------------------------------------


class GpuqError(Exception):
    """What went wrong, in a sentence; `exit_code` is that of the command line."""

    exit_code = 1


class NotConfigured(GpuqError):
    """An address, token or setting is missing or wrong."""

    exit_code = 78


class Unreachable(GpuqError):
    """The server did not answer, or the connection was lost, for longer than the client's patience."""

    exit_code = 69


class Refused(GpuqError):
    """The server said no: `status` is HTTP's, `retry_after` in seconds, `errors` a list of {field, message}."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        retry_after: float | None = None,
        errors: Sequence[dict[str, str]] = (),
        request_id: str = "",
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after
        self.errors = list(errors)
        self.request_id = request_id

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """65 wrong input, 66 not there, 69 unavailable, 70 a defect, 75 try later, 77 not allowed."""
        codes = {401: 77, 403: 77, 404: 66, 409: 75, 429: 75, 502: 69, 503: 69, 504: 69}
        return codes.get(self.status, 70 if self.status >= 500 else 65)

    @property
    def no_slot(self) -> bool:
        """The user has as many active jobs as allowed."""
        return self.status == 429 and self.detail.startswith("Queue limit exceeded")

    @property
    def lacks_merged(self) -> bool:
        """The server is too old to know the stream `merged`."""
        return self.status == 422 and any(error.get("field") == "stream" for error in self.errors)

    @property
    def temporary(self) -> bool:
        """The same call may succeed in a moment."""
        return self.status in (429, 502, 503, 504) and not self.no_slot


# -- what the server answers ---------------------------------------------------------------------------------------


class Job(TypedDict):
    """A job's status. The server may add fields; times are ISO 8601 in UTC, durations seconds."""

    job_id: str
    user_id: str
    competition_id: str
    project_id: str
    status: JobState
    node_id: str | None
    node_reachable: bool | None
    queue_position: int | None
    estimated_start: str | None
    estimated_finish: str | None
    expected_time: float
    created_at: str
    started_at: str | None
    completed_at: str | None
    cancel_requested_at: str | None
    attempt: int
    exit_code: int | None
    signal: int | None
    failure_reason: str | None
    message: str


class Results(Job):
    """An ended job with what it printed and its records."""

    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    result_file: str | None
    result_sha256: str | None
    results: list[dict[str, Any]]


class Event(TypedDict):
    """One step of a job's life."""

    time: str
    event: str
    from_status: JobState | None
    to_status: JobState | None
    actor: str
    node_id: str | None
    attempt: int
    reason: str | None
    message: str | None
    request_id: str | None


class Node(TypedDict):
    """One node; memory in MiB, utilisation in percent, temperature in °C. Admins get more fields."""

    node_id: str
    status: Literal["online", "busy", "offline", "draining", "quarantined"]
    is_busy: bool
    since: str
    jobs_completed: int
    jobs_failed: int
    jobs_cancelled: int
    gpu_model: str | None
    gpu_memory_total_mib: int | None
    gpu_memory_used_mib: int | None
    gpu_utilization: int | None
    gpu_temperature: int | None


class QueueInformation(TypedDict):
    """The queue as a whole; `expected_wait` of a new job in seconds, None when no node takes jobs."""

    queue_length: int
    running_jobs: int
    expected_wait: float | None


class Nodes(QueueInformation):
    """All nodes and the queue before them."""

    nodes: list[Node]


class Queue(QueueInformation):
    """The queue and your own active jobs in it (an admin: everybody's)."""

    active_jobs: list[Job]


class Identity(TypedDict):
    """Whose token this is."""

    user_id: str
    is_admin: bool


class _Dashboard(Identity):
    """What is used of `/api/dashboard`."""

    queue_information: QueueInformation
    active_jobs: list[Job]


class _JobPage(TypedDict):
    jobs: list[Job]
    next_cursor: str | None


class _JobEvents(TypedDict):
    events: list[Event]


class LogPiece(NamedTuple):
    """Something of a job's output: `offset` is the byte of `stream` after it, or of both streams merged.

    `kind` is `output`, or for a note in `text`: `skipped` (the reader was too slow), `restarted` (the job runs again
    after a failure of its node; its output begins anew) or `truncated` (it printed more than is kept).
    """

    stream: Stream | Literal["merged"]
    text: str
    offset: int
    kind: Literal["output", "skipped", "restarted", "truncated"] = "output"


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Where the server is and who asks; and what `submit` uses where nothing is said."""

    url: str = "http://localhost:8001"
    token: str = ""
    ca: str = ""  # a file of certificates to trust, for a server with its own
    competition: str = ""
    project: str = "default"
    expected_time: float = 600  # seconds

    @staticmethod
    def default_path() -> Path:
        """`$GPUQ_CONFIG`, or `~/.config/gpuq.toml`."""
        return Path(os.environ.get("GPUQ_CONFIG") or "~/.config/gpuq.toml").expanduser()

    @classmethod
    def load(cls, path: Path | None = None, **given: Any) -> Config:
        """What is given (and not None) before `GPUQ_…` in the environment before the file. Raises NotConfigured."""
        names = [field.name for field in dataclasses.fields(cls)]
        found = cls._read(path or cls.default_path(), names)
        found |= {name: value for name in names if (value := os.environ.get(f"GPUQ_{name.upper()}"))}
        found |= {name: value for name, value in given.items() if value is not None}
        try:
            found["expected_time"] = float(found.get("expected_time", cls.expected_time))
        except ValueError:
            raise NotConfigured(f"expected_time must be a number of seconds, not {found['expected_time']!r}.") from None
        config = cls(**found)
        config._check()
        return config

    @staticmethod
    def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
        try:
            found = tomli.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
            raise NotConfigured(f"{path} cannot be read: {error}") from None
        for name, value in found.items():
            if name not in names:
                raise NotConfigured(f"{path}: there is no setting {name}; there are {', '.join(names)}.")
            if not isinstance(value, (int, float) if name == "expected_time" else str):
                raise NotConfigured(f"{path}: {name} must be a {'number' if name == 'expected_time' else 'string'}.")
        return found

    def _check(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise NotConfigured(f"The address {self.url!r} is not valid: {error}.") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise NotConfigured(f"The address {self.url!r} must look like http://host:8001.")
        if not (self.token.isascii() and self.token.isprintable()):
            raise NotConfigured("The token has characters that no token has; was it copied whole?")

    def save(self, path: Path) -> None:
        """Write what differs from the defaults, readable for this user only. Raises NotConfigured."""
        values = dataclasses.asdict(self)
        lines = [
            f"{field.name} = {json.dumps(values[field.name], ensure_ascii=False)}\n"
            for field in dataclasses.fields(self)
            if values[field.name] != field.default
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _whole_file(path) as file:
                file.write("".join(lines).encode())
        except OSError as error:
            raise NotConfigured(f"{path} cannot be written: {error}") from None


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Any]:
    """A new file (mode 0600) that takes the place of `path` when the block ends well."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


# -- the asynchronous client ---------------------------------------------------------------------------------------


class _ServerEvent(NamedTuple):
    """One server-sent event."""

    name: str
    id: str | None
    data: Any


class AsyncClient:
    """Calls a GPU job server. What is not given comes from the environment and `~/.config/gpuq.toml`.

    Every call is tried again, for at most `patience` seconds and as `Retry-After` says, when the server cannot be
    reached, is unavailable or limits the rate; `on_wait` is told in a sentence. Raises GpuqError: Refused,
    Unreachable or NotConfigured.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        config: Config | None = None,
        patience: float = PATIENCE,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config or Config.load(url=url, token=token)
        self.patience = patience
        self._on_wait = on_wait
        self._identity: Identity | None = None
        headers = {"User-Agent": f"gpuq/{__version__}", "Accept": "application/json"}
        if self.config.token:
            headers["Authorization"] = f"Bearer {self.config.token}"
        self._http = httpx.AsyncClient(
            base_url=self.config.url, headers=headers, timeout=httpx.Timeout(60, connect=10), verify=self._trust()
        )

    def _trust(self) -> ssl.SSLContext | bool:
        if not self.config.ca:
            return True
        try:
            return ssl.create_default_context(cafile=Path(self.config.ca).expanduser())
        except OSError as error:
            raise NotConfigured(f"The certificates in {self.config.ca} cannot be read: {error}") from None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # -- calls ---------------------------------------------------------------------------------------------------

    async def whoami(self) -> Identity:
        """Whose token this is."""
        if self._identity is None:
            answer = await self._dashboard()
            self._identity = {"user_id": answer["user_id"], "is_admin": answer["is_admin"]}
        return self._identity

    async def submit(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        code: str | bytes | None = None,
        competition: str | None = None,
        project: str | None = None,
        expected_time: float | None = None,
        key: str | None = None,
        wait_for_slot: bool = False,
    ) -> Job:
        """Queue the Python file at `path`, or the text `code`; answers as soon as it is safely queued.

        `expected_time` is in seconds; a job that runs twice as long is ended. `key` is the Idempotency-Key: a repeat
        with the same key gives the first job; without one each call is a submission of its own, whose retries never
        make a second job. With `wait_for_slot` it first waits until an own active job has ended.
        """
        if (path is None) == (code is None):
            raise NotConfigured("Give either the path of a file or its code.")
        if path is not None:
            try:
                code = Path(path).read_bytes()
            except OSError as error:
                raise NotConfigured(f"{path} cannot be read: {error.strerror}.") from None
        competition = competition or self.config.competition
        if not competition:
            raise NotConfigured("Which competition? Say -c NAME (competition=…), or put it into the configuration.")
        fields = {
            "competition_id": competition,
            "project_id": project or self.config.project,
            "user_id": (await self.whoami())["user_id"],
            "expected_time": self.config.expected_time if expected_time is None else expected_time,
        }
        assert code is not None
        files = {
            "code": ("solution.py", code.encode() if isinstance(code, str) else code, "text/x-python"),
            "config_file": ("config.json", json.dumps(fields).encode(), "application/json"),
        }
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        while True:
            try:
                # A deployment may hold the answer by default; waiting is done by `wait`, which survives a restart.
                return await self._json(
                    Job, "POST", "/api/submit", params={"wait": "false"}, files=files, headers=headers
                )
            except Refused as refused:
                if not (wait_for_slot and refused.no_slot):
                    raise
                await self._slot()

    async def _slot(self) -> None:
        """Until one of the own active jobs has ended: the oldest."""
        user_id = (await self.whoami())["user_id"]
        active = [job for state in ACTIVE async for job in self._jobs(status=state, user=user_id)]
        if active:
            oldest = min(active, key=lambda job: job["created_at"])
            self._say(f"Job {oldest['job_id']} is {oldest['status']}; this one is submitted when it has ended.")
            await self.wait(oldest["job_id"])

    async def status(self, job_id: str) -> Job:
        """How the job stands."""
        return await self._json(Job, "GET", _place("status", job_id))

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job's status now and after each change, at last when it has ended. Survives lost connections."""
        async with aclosing(self._events(_place("status", job_id), {"follow": "true"})) as events:
            async for event in events:
                if event.name == "status":
                    yield event.data

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it has ended. Raises TimeoutError after `timeout` seconds."""

        async def end() -> Job:
            async with aclosing(self._events(_place("status", job_id), {"follow": "true"})) as events:
                async for event in events:
                    job: Job = event.data
            return job

        try:
            return await asyncio.wait_for(end(), timeout)
        except asyncio.TimeoutError:
            raise TimeoutError(f"The job {job_id} has not ended within {timeout:g} s.") from None

    async def logs(self, job_id: str, stream: Stream = "stdout", *, offset: int = 0, tail: int | None = None) -> bytes:
        """The output so far, from byte `offset` or only the last `tail` bytes."""
        parts = []
        params: dict[str, str | int] = {"stream": stream, "offset": offset}
        if tail is not None:
            params["tail"] = tail
        while True:
            response = await self._call("GET", _place("logs", job_id), params=params)
            parts.append(response.content)
            offset = int(response.headers["X-Log-Next-Offset"])
            if not response.content or offset >= int(response.headers["X-Log-Size"]):
                return b"".join(parts)
            params = {"stream": stream, "offset": offset}

    async def follow(
        self,
        job_id: str,
        streams: Iterable[Stream] = STREAMS,
        *,
        offset: int = 0,
        tail: int | None = None,
        collapse: bool = False,
    ) -> AsyncGenerator[LogPiece, None]:
        """The output as it appears, until the job has ended. A lost connection is taken up at its byte.

        Both streams come in the order in which they were printed; an older server sends each for itself.
        `offset` or `tail` are bytes of what is followed; `collapse` leaves of each line what carriage returns leave
        visible.
        """
        streams = list(streams)
        params: dict[str, str | int] = {"follow": "true", "offset": offset, "collapse": str(collapse).lower()}
        if tail is not None:
            params["tail"] = tail
        if set(streams) == set(STREAMS):
            try:
                async with aclosing(self._follow_one(job_id, "merged", params)) as both:
                    async for next_one in both:
                        yield next_one
                return
            except Refused as refused:
                if not refused.lacks_merged:
                    raise
        pieces: asyncio.Queue[LogPiece | Exception | None] = asyncio.Queue(64)

        async def pump(stream: Stream) -> None:
            try:
                async with aclosing(self._follow_one(job_id, stream, params)) as found:
                    async for piece in found:
                        await pieces.put(piece)
                await pieces.put(None)
            except Exception as error:
                await pieces.put(error)

        tasks = [asyncio.create_task(pump(stream)) for stream in streams]
        try:
            left = len(tasks)
            while left:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def printed(self, job_id: str, *, tail: int | None = None) -> list[LogPiece]:
        """The output so far, or only its last `tail` bytes, of both streams in the order in which they were printed.

        An older server knows no such order: then stdout comes first.
        """
        found = []
        params: dict[str, str | int] = {"stream": "merged"} if tail is None else {"stream": "merged", "tail": tail}
        while True:
            headers = {"Accept": "text/event-stream"}
            try:
                response = await self._call("GET", _place("logs", job_id), params=params, headers=headers)
            except Refused as refused:
                if not refused.lacks_merged:
                    raise
                apart = {stream: await self.logs(job_id, stream, tail=tail) for stream in STREAMS}
                return [LogPiece(name, data.decode("utf-8", "replace"), len(data)) for name, data in apart.items()]
            async for event in _parse_events(response.aiter_lines()):
                found.append(LogPiece(cast(Stream, event.name), event.data, int(event.id or 0)))
            offset = int(response.headers["X-Log-Next-Offset"])
            if not response.content or offset >= int(response.headers["X-Log-Size"]):
                return found
            params = {"stream": "merged", "offset": offset}

    async def _follow_one(
        self, job_id: str, stream: Stream | Literal["merged"], params: dict[str, str | int]
    ) -> AsyncGenerator[LogPiece, None]:
        at = 0
        what = "output" if stream == "merged" else stream
        async with aclosing(self._events(_place("logs", job_id), {**params, "stream": stream})) as events:
            async for event in events:
                at = int(event.id) if event.id is not None else at
                if event.name in ("output", *STREAMS):
                    yield LogPiece(stream if event.name == "output" else cast(Stream, event.name), event.data, at)
                elif event.name == "skipped":
                    left_out = event.data["to"] - event.data["from"]
                    yield LogPiece(stream, f"{left_out} bytes of {what} skipped", at, "skipped")
                elif event.name == "restarted":
                    yield LogPiece(stream, "the job runs again from its beginning", at, "restarted")
                elif event.name == "end" and event.data.get("truncated"):
                    yield LogPiece(stream, f"the job printed more on {what} than is kept", at, "truncated")

    async def results(self, job_id: str) -> Results:
        """Output, exit code and records of an ended job."""
        return await self._json(Results, "GET", _place("results", job_id))

    async def download(self, job_id: str, target: str | os.PathLike[str]) -> Path:
        """Save the results file (JSON lines) whole, with its digest checked; the path."""
        path = Path(target)

        async def attempt() -> Path:
            address, params = _place("results", job_id), {"format": "jsonl"}
            async with self._http.stream("GET", address, params=params) as response:
                await _raise_for(response)
                digest = hashlib.sha256()
                with _whole_file(path) as file:
                    async for block in response.aiter_bytes():
                        digest.update(block)
                        file.write(block)
                    if digest.hexdigest() != response.headers.get("X-Content-SHA256"):
                        raise GpuqError("The results file came with another digest than the server named; try again.")
            return path

        try:
            return await self._patiently(attempt)
        except OSError as error:
            raise GpuqError(f"{path} cannot be written: {error.strerror}.") from None

    async def jobs(
        self,
        *,
        status: JobState | None = None,
        competition: str | None = None,
        project: str | None = None,
        user: str | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Own jobs (an admin: everybody's), the newest `limit`, newest first."""
        found: list[Job] = []
        if limit > 0:
            async for job in self._jobs(status, competition, project, user, min(limit, 500)):
                found.append(job)
                if len(found) >= limit:
                    break
        return found

    async def _jobs(
        self,
        status: str | None = None,
        competition: str | None = None,
        project: str | None = None,
        user: str | None = None,
        page: int = 500,
    ) -> AsyncGenerator[Job, None]:
        filters = {"status": status, "competition_id": competition, "project_id": project, "user_id": user}
        params: dict[str, str | int] = {name: value for name, value in filters.items() if value is not None}
        params["limit"] = page
        while True:
            answer = await self._json(_JobPage, "GET", "/api/jobs", params=params)
            for job in answer["jobs"]:
                yield job
            if answer["next_cursor"] is None:
                return
            params["cursor"] = answer["next_cursor"]

    async def cancel(self, job_id: str) -> Job:
        """End the job; it is `cancelled`, or still `running` while its node cannot be reached.

        A job that is cancelled already stays so. Raises Refused (400) when it ended by itself before.
        """
        try:
            return await self._json(Job, "POST", _place("cancel", job_id))
        except Refused as refused:
            if refused.status == 400:  # also when the answer to a first try was lost
                job = await self.status(job_id)
                if job["status"] == "cancelled":
                    return job
            raise

    async def events(self, job_id: str) -> list[Event]:
        """The job's story, oldest first."""
        return (await self._json(_JobEvents, "GET", _place("events", job_id)))["events"]

    async def nodes(self) -> Nodes:
        """Every node, and the queue. Needs no token."""
        return await self._json(Nodes, "GET", "/api/nodes", public=True)

    async def queue(self) -> Queue:
        """The queue, and the own jobs in it."""
        answer = await self._dashboard()
        information = answer["queue_information"]
        return {
            "queue_length": information["queue_length"],
            "running_jobs": information["running_jobs"],
            "expected_wait": information["expected_wait"],
            "active_jobs": answer["active_jobs"],
        }

    async def _dashboard(self) -> _Dashboard:
        return await self._json(_Dashboard, "GET", "/api/dashboard")

    # -- transport -----------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if self._on_wait is not None:
            self._on_wait(text)

    async def _json(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        response = await self._call(method, path, **options)
        try:
            return cast(T, response.json())
        except ValueError:
            raise GpuqError(f"{self.config.url} does not answer like a GPU job server; is the address right?") from None

    async def _call(self, method: str, path: str, *, public: bool = False, **options: Any) -> httpx.Response:
        self._check_token(public)

        async def attempt() -> httpx.Response:
            response = await self._http.request(method, path, **options)
            await _raise_for(response)
            return response

        return await self._patiently(attempt)

    def _check_token(self, public: bool = False) -> None:
        if not (self.config.token or public):
            raise NotConfigured("No token: run `gpuq.py login`, or set GPUQ_TOKEN. An operator makes tokens.")

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + self.patience
        for tries in itertools.count():
            try:
                return await attempt()
            except (httpx.TransportError, Refused) as failure:
                error = self._worth_a_retry(failure)
            await self._pause(error, tries, deadline)
        raise AssertionError("count() has no end")

    def _worth_a_retry(self, failure: httpx.TransportError | Refused) -> GpuqError:
        """The error to raise when patience ends; raises at once what trying again would not mend."""
        if isinstance(failure, Refused):
            if not failure.temporary:
                raise failure
            return failure
        reason = str(failure) or type(failure).__name__
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise Unreachable(
                f"The certificate of {self.config.url} is not trusted ({reason}). "
                "If it is the server's own, name its file with --ca."
            ) from None
        return Unreachable(f"{self.config.url} cannot be reached: {reason}.")

    async def _pause(self, error: GpuqError, tries: int, deadline: float) -> None:
        """Before the next try; raises the error when there is no time left for one."""
        pause = min(PAUSE_MOST, 0.2 * 2 ** min(tries, 8)) * random.uniform(0.75, 1.25)  # noqa: S311  # jitter
        if isinstance(error, Refused) and error.retry_after is not None:
            pause = error.retry_after
        if time.monotonic() + pause > deadline:
            raise error
        if pause > 1 or tries == 2:
            self._say(f"{error} Trying again{f' in {pause:.0f} s' if pause > 1 else ''}.")
        await asyncio.sleep(pause)

    async def _events(self, path: str, params: dict[str, Any]) -> AsyncGenerator[_ServerEvent, None]:
        """The events of a stream up to its `end`, across as many connections as that takes."""
        self._check_token()
        headers = {"Accept": "text/event-stream"}
        timeout = httpx.Timeout(10, read=SILENCE_MOST)
        tries, deadline = 0, 0.0
        while True:
            try:
                async with self._http.stream("GET", path, params=params, headers=headers, timeout=timeout) as response:
                    await _raise_for(response)
                    tries = 0
                    async with aclosing(_parse_events(response.aiter_lines())) as events:
                        async for event in events:
                            if event.id is not None:
                                headers["Last-Event-ID"] = event.id
                            yield event
                            if event.name == "end":
                                return
                error: GpuqError = Unreachable(f"{self.config.url} ended the stream.")
            except (httpx.TransportError, Refused) as failure:
                error = self._worth_a_retry(failure)
            if tries == 0:
                deadline = time.monotonic() + self.patience
            await self._pause(error, tries, deadline)
            tries += 1


async def _raise_for(response: httpx.Response) -> None:
    """Raise Refused for anything but success."""
    if response.is_success:
        return
    body: Any = None
    with contextlib.suppress(ValueError):
        body = json.loads(await response.aread())
    problem = body if isinstance(body, dict) else {}
    fallback = f"The server answered {response.status_code} {response.reason_phrase}."
    after = response.headers.get("Retry-After", "")
    raise Refused(
        response.status_code,
        str(problem.get("detail") or fallback),
        retry_after=float(after) if after.isascii() and after.isdigit() else None,
        errors=problem.get("errors") or (),
        request_id=response.headers.get("X-Request-ID", ""),
    )


async def _parse_events(lines: AsyncIterator[str]) -> AsyncGenerator[_ServerEvent, None]:
    fields: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "event" in fields and "data" in fields:
            yield _ServerEvent(fields["event"], fields.get("id"), json.loads(fields["data"]))
            fields = {}
        else:  # a comment
            fields = {}


def _place(call: str, job_id: str) -> str:
    return f"/api/{call}/{quote(job_id, safe='')}"


# -- the synchronous client ----------------------------------------------------------------------------------------


class _Pull(Iterator[T], Generic[T]):
    """An asynchronous iterator read from another thread.

    An interrupt while it waits loses nothing: the next call goes on waiting for the same item.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, source: AsyncIterator[T]) -> None:
        self._loop = loop
        self._source = source
        self._pending: Future[T] | None = None

    def __next__(self) -> T:
        async def step() -> T:
            return await self._source.__anext__()

        if self._pending is None:
            self._pending = asyncio.run_coroutine_threadsafe(step(), self._loop)
        try:
            item = self._pending.result()
        except StopAsyncIteration:
            raise StopIteration from None
        self._pending = None
        return item


class Client:
    """`AsyncClient` for ordinary code and notebooks: the same calls, without `await`."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        config: Config | None = None,
        patience: float = PATIENCE,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self._async = AsyncClient(url, token, config=config, patience=patience, on_wait=on_wait)
        self.config = self._async.config
        self._sources: weakref.WeakSet[AsyncGenerator[Any, None]] = weakref.WeakSet()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gpuq", daemon=True)
        self._thread.start()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except (KeyboardInterrupt, CancelledError):
            future.cancel()
            raise

    def _pull(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        self._sources.add(source)
        return _Pull(self._loop, source)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; what still follows a job ends."""
        if self._loop.is_closed():
            return
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for source in list(self._sources):
            await source.aclose()
        await self._async.close()
        # The generators of httpx below a stream that broke off are closed by tasks that the loop makes for them.
        await asyncio.get_running_loop().shutdown_asyncgens()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    def whoami(self) -> Identity:
        """As `AsyncClient.whoami`."""
        return self._run(self._async.whoami())

    def submit(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        code: str | bytes | None = None,
        competition: str | None = None,
        project: str | None = None,
        expected_time: float | None = None,
        key: str | None = None,
        wait_for_slot: bool = False,
    ) -> Job:
        """As `AsyncClient.submit`."""
        call = self._async.submit(
            path,
            code=code,
            competition=competition,
            project=project,
            expected_time=expected_time,
            key=key,
            wait_for_slot=wait_for_slot,
        )
        return self._run(call)

    def status(self, job_id: str) -> Job:
        """As `AsyncClient.status`."""
        return self._run(self._async.status(job_id))

    def watch(self, job_id: str) -> Iterator[Job]:
        """As `AsyncClient.watch`."""
        return self._pull(self._async.watch(job_id))

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """As `AsyncClient.wait`."""
        return self._run(self._async.wait(job_id, timeout))

    def logs(self, job_id: str, stream: Stream = "stdout", *, offset: int = 0, tail: int | None = None) -> bytes:
        """As `AsyncClient.logs`."""
        return self._run(self._async.logs(job_id, stream, offset=offset, tail=tail))

    def printed(self, job_id: str, *, tail: int | None = None) -> list[LogPiece]:
        """As `AsyncClient.printed`."""
        return self._run(self._async.printed(job_id, tail=tail))

    def follow(
        self,
        job_id: str,
        streams: Iterable[Stream] = STREAMS,
        *,
        offset: int = 0,
        tail: int | None = None,
        collapse: bool = False,
    ) -> Iterator[LogPiece]:
        """As `AsyncClient.follow`."""
        return self._pull(self._async.follow(job_id, streams, offset=offset, tail=tail, collapse=collapse))

    def results(self, job_id: str) -> Results:
        """As `AsyncClient.results`."""
        return self._run(self._async.results(job_id))

    def download(self, job_id: str, target: str | os.PathLike[str]) -> Path:
        """As `AsyncClient.download`."""
        return self._run(self._async.download(job_id, target))

    def jobs(
        self,
        *,
        status: JobState | None = None,
        competition: str | None = None,
        project: str | None = None,
        user: str | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """As `AsyncClient.jobs`."""
        call = self._async.jobs(status=status, competition=competition, project=project, user=user, limit=limit)
        return self._run(call)

    def cancel(self, job_id: str) -> Job:
        """As `AsyncClient.cancel`."""
        return self._run(self._async.cancel(job_id))

    def events(self, job_id: str) -> list[Event]:
        """As `AsyncClient.events`."""
        return self._run(self._async.events(job_id))

    def nodes(self) -> Nodes:
        """As `AsyncClient.nodes`."""
        return self._run(self._async.nodes())

    def queue(self) -> Queue:
        """As `AsyncClient.queue`."""
        return self._run(self._async.queue())


# -- the command line ----------------------------------------------------------------------------------------------

app = typer.Typer(
    help="Send Python files to a GPU job server, watch them run, fetch their results.",
    epilog="Settings come from these options, the environment (GPUQ_URL, GPUQ_TOKEN, …) or ~/.config/gpuq.toml, "
    "in this order. Exit codes: the job's where a command waits for one; else 0 done, 2 usage, 65 wrong input, "
    "66 no such job, 69 server not reachable, 75 try later, 77 not allowed, 78 not configured, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
STATUS_TIMES = ("created_at", "started_at", "completed_at", "estimated_start", "estimated_finish")
STATUS_SHOWN = (
    *("competition_id", "project_id", "node_id", "queue_position", "exit_code", "failure_reason"),
    *STATUS_TIMES,
)
WIDE = 200  # columns of tables that go into a file or a pipe
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)
if not out.is_terminal:
    out.width = WIDE


@dataclass(frozen=True)
class Options:
    """The options before the command."""

    path: Path
    given: dict[str, str | None]
    patience: float

    def config(self) -> Config:
        """The settings; a token that others can read is remarked on."""
        config = Config.load(self.path, **self.given)
        with contextlib.suppress(OSError):
            if self.path.stat().st_mode & 0o077 and "token" in self.path.read_text(encoding="utf-8"):
                _note(f"{self.path} holds a token and others can read it; run: chmod 600 {self.path}")
        return config

    def client(self) -> Client:
        """A client that tells on stderr what it waits for."""
        return Client(config=self.config(), patience=self.patience, on_wait=_note)


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
JobArgument = Annotated[str | None, typer.Argument(metavar="[JOB]", help="The job's id; without one your newest job.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The Python file.", exists=True, dir_okay=False)]
CompetitionOption = Annotated[str | None, typer.Option("-c", "--competition", help="The competition's id.")]
ProjectOption = Annotated[str | None, typer.Option("-p", "--project", help="The project's id.")]
TimeOption = Annotated[
    float | None,
    typer.Option("-t", "--time", help="Expected seconds; a job that runs twice as long is ended.", min=1),
]
KeyOption = Annotated[
    str | None, typer.Option("--key", help="Idempotency key: the same one again gives the first job, not a second.")
]
SlotOption = Annotated[
    bool, typer.Option("--wait-for-slot", help="If you have an active job already, wait until it has ended.")
]
InterruptOption = Annotated[
    OnInterrupt, typer.Option(help="What Ctrl-C does to the job; without a terminal `ask` means detach.")
]


@app.callback()
def _options(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="The server, such as http://host:8001.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Your token; others may see it in the process list, so better log in.")
    ] = None,
    ca: Annotated[str | None, typer.Option(help="File of certificates to trust.")] = None,
    config: Annotated[Path | None, typer.Option(help="Another file than ~/.config/gpuq.toml.")] = None,
    patience: Annotated[
        float, typer.Option(help="Seconds to go on trying while the server is away or limits you.", min=0)
    ] = PATIENCE,
) -> None:
    given = {"url": url, "token": token, "ca": ca}
    context.obj = Options(config or Config.default_path(), given, patience)


def _options_of(context: typer.Context) -> Options:
    found = context.obj
    assert isinstance(found, Options)
    return found


def _plain(text: str) -> str:
    """Without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _note(text: str) -> None:
    err.print(f"gpuq: {_plain(text)}", soft_wrap=True)


def _print_json(value: Any, *, line: bool = False) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=None if line else 2), flush=True)


def _show(*lines: str) -> None:
    for line in lines:
        out.print(_plain(line), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column == "job")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(Text("-" if cell is None else _plain(str(cell))) for cell in cells))


def _time(iso: str) -> datetime:
    return datetime.fromisoformat(iso.replace("Z", "+00:00"))


def _local(iso: str | None) -> str | None:
    return _time(iso).astimezone().strftime("%Y-%m-%d %H:%M:%S") if iso else None


def _ran(job: Job) -> str | None:
    if not job["started_at"] or not job["completed_at"]:
        return None
    return f"{(_time(job['completed_at']) - _time(job['started_at'])).total_seconds():.1f} s"


def _id_of(client: Client, job_id: str | None) -> str:
    if job_id is not None:
        return job_id
    newest = client.jobs(user=client.whoami()["user_id"], limit=1)
    if not newest:
        raise NotConfigured("You have no job yet; `gpuq.py submit FILE -c COMPETITION` makes one.")
    return newest[0]["job_id"]


def exit_code_of(job: Job) -> int:
    """What a shell would say of the job: its own code, 128 + signal, 124 for its time limit, 130 when cancelled."""
    if job["status"] == "completed":
        return 0
    if job["status"] == "cancelled":
        return INTERRUPTED
    if job["failure_reason"] == "timeout":
        return 124
    if job["signal"]:
        return 128 + job["signal"]
    return job["exit_code"] or 1


@app.command()
def login(context: typer.Context) -> None:
    """Ask for your token, try it, and keep it with the address (file mode 0600)."""
    options = _options_of(context)
    token = options.given["token"]
    if token is None:
        token = typer.prompt("Token", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()
    config = Config.load(options.path, **{**options.given, "token": token.strip()})
    with Client(config=config, patience=options.patience, on_wait=_note) as client:
        me = client.whoami()
    config.save(options.path)
    _show(f"You are {me['user_id']}{' (admin)' if me['is_admin'] else ''} at {config.url}; kept in {options.path}.")


@app.command()
def whoami(context: typer.Context, as_json: JsonOption = False) -> None:
    """Say whose token is in use, and where."""
    with _options_of(context).client() as client:
        me = client.whoami()
        if as_json:
            return _print_json({**me, "url": client.config.url})
        _show(f"{me['user_id']}{' (admin)' if me['is_admin'] else ''} at {client.config.url}")


@app.command()
def submit(
    context: typer.Context,
    file: FileArgument,
    competition: CompetitionOption = None,
    project: ProjectOption = None,
    expected: TimeOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, print the records, exit as the job.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the output as it appears, exit as the job.")
    ] = False,
    wait_for_slot: SlotOption = False,
    key: KeyOption = None,
    on_interrupt: InterruptOption = "ask",
    as_json: JsonOption = False,
) -> None:
    """Queue a Python file as a job. A retry after a lost answer never makes a second one."""
    with _options_of(context).client() as client:
        try:
            job = client.submit(
                file,
                competition=competition,
                project=project,
                expected_time=expected,
                key=key,
                wait_for_slot=wait_for_slot,
            )
        except KeyboardInterrupt:
            _note("Interrupted before the server's answer came; `gpuq.py jobs` shows whether it took the job.")
            raise typer.Exit(INTERRUPTED) from None
        except Refused as refused:
            if refused.no_slot:
                _note("--wait-for-slot submits as soon as it has ended.")
            raise
        attendant = _Attendant(client, job["job_id"], on_interrupt, as_json)
        if not (wait or follow):
            if as_json:
                return _print_json(job)
            _show(f"{job['job_id']}  {job['status']}  {job['message']}")
            return
        _note(f"Job {job['job_id']} is queued.")
        job = attendant.until_end(follow=follow)
        _finish(client, job, records=not follow, as_json=as_json, line=follow)


def _finish(client: Client, job: Job, *, records: bool, as_json: bool, line: bool) -> NoReturn:
    """Say what became of the job and exit as it did."""
    if as_json:
        _print_json(client.results(job["job_id"]), line=line)
    elif records:
        for record in client.results(job["job_id"])["results"]:
            _print_json(record, line=True)
    ran = _ran(job)
    _note(f"Job {job['job_id']} {job['status']}{f' after {ran}' if ran else ''}: {job['message']}")
    raise typer.Exit(exit_code_of(job))


@app.command()
def run(
    context: typer.Context,
    file: FileArgument,
    competition: CompetitionOption = None,
    project: ProjectOption = None,
    expected: TimeOption = None,
    wait_for_slot: SlotOption = False,
    key: KeyOption = None,
    on_interrupt: InterruptOption = "ask",
    as_json: JsonOption = False,
) -> None:
    """Run a Python file there as if it ran here: `submit --follow`."""
    submit(
        context,
        file,
        competition,
        project,
        expected,
        follow=True,
        wait_for_slot=wait_for_slot,
        key=key,
        on_interrupt=on_interrupt,
        as_json=as_json,
    )


class _Attendant:
    """Waits for a job's end, shows what happens meanwhile, and asks at Ctrl-C what is to become of it."""

    def __init__(self, client: Client, job_id: str, on_interrupt: OnInterrupt, as_json: bool) -> None:
        self._client = client
        self._job_id = job_id
        self._on_interrupt = on_interrupt
        self._as_json = as_json
        self._said = ""

    def until_end(self, *, follow: bool) -> Job:
        """The ended job. Raises typer.Exit when the user leaves."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("Waiting.", total=None)
            jobs = self._client.watch(self._job_id)

            def started(job: Job) -> bool:
                progress.update(task, description=_plain(job["message"]))
                if not err.is_terminal and job["message"] != self._said:
                    self._said = job["message"]
                    _note(self._said)
                return follow and job["status"] != "pending"

            self._attend(jobs, started, progress)
        if follow:
            pieces = self._client.follow(self._job_id)
            self._attend(pieces, lambda piece: _show_piece(piece, self._as_json))
        return self._client.wait(self._job_id)

    def _attend(
        self, source: Iterator[T], enough: Callable[[T], bool | None], progress: Progress | None = None
    ) -> None:
        """Until the source ends or has given enough."""
        while True:
            try:
                for item in source:
                    if enough(item):
                        return
                return
            except KeyboardInterrupt:
                if progress is not None:
                    progress.stop()
                self._interrupted()
                if progress is not None:
                    progress.start()

    def _interrupted(self) -> None:
        """Returns when the job is to be watched on; raises typer.Exit otherwise."""
        choice: str = self._on_interrupt
        if choice == "ask":
            choice = self._ask() if sys.stdin.isatty() and err.is_terminal else "detach"
        if choice == "cancel":
            try:
                job = self._client.cancel(self._job_id)
            except Refused as refused:
                if refused.status != 400:
                    raise
                return  # it ended by itself: its end is about to be shown
            _note(f"Job {self._job_id} is {job['status']}. {job['message']}")
            raise typer.Exit(INTERRUPTED)
        if choice == "detach":
            _note(
                f"Detached; job {self._job_id} goes on. "
                f"`gpuq.py logs -f {self._job_id}` shows it, `gpuq.py cancel {self._job_id}` ends it."
            )
            raise typer.Exit(INTERRUPTED)

    def _ask(self) -> str:
        choices = {"d": "detach", "c": "cancel", "w": "watch"}
        try:
            while True:
                answer = err.input(
                    "\nThe job still goes on: [d]etach from it, [c]ancel it, or [w]atch on? ", markup=False
                )
                if answer.strip()[:1].lower() in choices:
                    return choices[answer.strip()[:1].lower()]
        except (KeyboardInterrupt, EOFError):
            return "detach"


def _show_piece(piece: LogPiece, as_json: bool) -> None:
    if as_json:
        return _print_json(piece._asdict(), line=True)
    if piece.kind != "output":
        return _note(piece.text)
    target = sys.stdout if piece.stream == "stdout" else sys.stderr
    target.write(piece.text)
    target.flush()


@app.command()
def status(context: typer.Context, job_id: JobArgument = None, as_json: JsonOption = False) -> None:
    """Say how a job stands: node, place in the queue, estimates, exit code."""
    with _options_of(context).client() as client:
        job = client.status(_id_of(client, job_id))
    if as_json:
        return _print_json(job)
    _show(f"{job['job_id']}  {job['status']}", job["message"])
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in job.items():
        if name in STATUS_SHOWN and value is not None:
            _row(table, name.replace("_", " "), _local(str(value)) if name in STATUS_TIMES else value)
    out.print(table)


@app.command()
def logs(
    context: typer.Context,
    job_id: JobArgument = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    stdout: Annotated[bool, typer.Option("--stdout", help="Only stdout.")] = False,
    stderr: Annotated[bool, typer.Option("--stderr", help="Only stderr.")] = False,
    tail: Annotated[int | None, typer.Option(help="Begin that many bytes before the end.", min=0)] = None,
    collapse: Annotated[bool, typer.Option(help="With -f: of progress bars only what is visible.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a job printed, in the order in which it did: its stdout on stdout, its stderr on stderr."""
    if stdout and stderr:
        stdout = stderr = False
    streams: tuple[Stream, ...] = ("stdout",) if stdout else ("stderr",) if stderr else STREAMS
    with _options_of(context).client() as client:
        job_id = _id_of(client, job_id)
        if follow:
            for piece in client.follow(job_id, streams, tail=tail, collapse=collapse):
                _show_piece(piece, as_json)
            return
        if streams == STREAMS and not as_json:
            for piece in client.printed(job_id, tail=tail):
                _show_piece(piece, as_json=False)
            return
        found = {stream: client.logs(job_id, stream, tail=tail) for stream in streams}
    if as_json:
        return _print_json({stream: data.decode("utf-8", "replace") for stream, data in found.items()})
    for stream, data in found.items():
        target = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
        target.write(data)
        target.flush()


@app.command()
def results(
    context: typer.Context,
    job_id: JobArgument = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Save the results file (JSON lines).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a job's records as JSON lines, save them, or (--json) print all there is about its end."""
    with _options_of(context).client() as client:
        job_id = _id_of(client, job_id)
        if output is not None:
            path = client.download(job_id, output)
            if not as_json:
                _note(f"Saved {path}: {path.stat().st_size} bytes.")
                return
        found = client.results(job_id)
    if as_json:
        return _print_json(found)
    for record in found["results"]:
        _print_json(record, line=True)
    _note(f"Job {job_id} {found['status']}: {found['message']}")


def _jobs_table(found: Sequence[Job]) -> Table:
    table = _table("job", "status", "user", "competition", "project", "node", "place", "submitted", "ran")
    for job in found:
        _row(
            table,
            *(job["job_id"], job["status"], job["user_id"], job["competition_id"], job["project_id"]),
            *(job["node_id"], job["queue_position"], _local(job["created_at"]), _ran(job)),
        )
    return table


@app.command()
def jobs(
    context: typer.Context,
    status: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    competition: CompetitionOption = None,
    project: ProjectOption = None,
    user: Annotated[str | None, typer.Option(help="Admins: only this user's jobs.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", help="At most that many.", min=1)] = 20,
    as_json: JsonOption = False,
) -> None:
    """List your jobs, newest first (admins: everybody's)."""
    with _options_of(context).client() as client:
        found = client.jobs(status=status, competition=competition, project=project, user=user, limit=limit)
    if as_json:
        return _print_json(found)
    out.print(_jobs_table(found) if found else "No jobs.")


@app.command()
def cancel(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    as_json: JsonOption = False,
) -> None:
    """Cancel a job: one that waits at once, one that runs is ended on its node."""
    with _options_of(context).client() as client:
        job = client.cancel(job_id)
    if as_json:
        return _print_json(job)
    _show(f"{job['job_id']}  {job['status']}  {job['message']}")


@app.command()
def events(context: typer.Context, job_id: JobArgument = None, as_json: JsonOption = False) -> None:
    """Tell a job's story: each step with its time, node and reason."""
    with _options_of(context).client() as client:
        found = client.events(_id_of(client, job_id))
    if as_json:
        return _print_json(found)
    table = _table("time", "event", "state", "by", "node", "attempt", "reason")
    for event in found:
        reason = event["reason"] or event["message"]
        _row(
            table,
            *(_local(event["time"]), event["event"], event["to_status"]),
            *(event["actor"], event["node_id"], event["attempt"], reason),
        )
    out.print(table)


def _nodes_table(found: Nodes) -> Table:
    table = _table("node", "status", "since", "GPU", "load", "memory", "°C", "completed", "failed")
    for node in found["nodes"]:
        load, used, total = node["gpu_utilization"], node["gpu_memory_used_mib"], node["gpu_memory_total_mib"]
        _row(
            table,
            *(node["node_id"], node["status"], _local(node["since"]), node["gpu_model"]),
            f"{load} %" if load is not None else None,
            f"{used}/{total} MiB" if total is not None else None,
            *(node["gpu_temperature"], node["jobs_completed"], node["jobs_failed"]),
        )
    return table


def _queue_line(found: QueueInformation) -> str:
    wait = found["expected_wait"]
    expected = "no node takes jobs now" if wait is None else f"a new job would start in about {wait:.0f} s"
    return f"{found['queue_length']} waiting, {found['running_jobs']} running; {expected}."


@app.command()
def nodes(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show every node and its GPU."""
    with _options_of(context).client() as client:
        found = client.nodes()
    if as_json:
        return _print_json(found)
    out.print(_nodes_table(found))
    _show(_queue_line(found))


@app.command()
def queue(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show the queue, the expected wait, and your jobs in it."""
    with _options_of(context).client() as client:
        found = client.queue()
    if as_json:
        return _print_json(found)
    _show(_queue_line(found))
    if found["active_jobs"]:
        out.print(_jobs_table(found["active_jobs"]))


@app.command()
def top(
    context: typer.Context,
    interval: Annotated[float, typer.Option("-i", "--interval", help="Seconds between two looks.", min=0.5)] = 2,
    as_json: JsonOption = False,
) -> None:
    """Show nodes, queue and your jobs, again and again, until Ctrl-C; into a pipe, or as JSON, once."""
    with _options_of(context).client() as client:

        def look() -> RenderableType:
            everything, waiting = client.nodes(), client.queue()
            line = Text(f"{datetime.now():%H:%M:%S}  {_queue_line(waiting)}")
            return Group(line, Text(), _nodes_table(everything), Text(), _jobs_table(waiting["active_jobs"]))

        if as_json:
            return _print_json({**client.nodes(), **client.queue()})
        if not out.is_terminal:
            return out.print(look())
        with contextlib.suppress(KeyboardInterrupt), Live(look(), console=out, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(look(), refresh=True)


def main() -> None:
    """The command line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app(prog_name="gpuq.py")
    except GpuqError as error:
        _note(str(error))
        for wrong in error.errors if isinstance(error, Refused) else ():
            _note(f"  {wrong.get('field')}: {wrong.get('message')}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
