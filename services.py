"""What every route works with: the services behind the handlers, who is calling, parameters that several routes share.

May import everything but `main`, `worker`, the concrete executors and the routes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi import Path as PathParameter

import answers
import audit
import clock
import problems
import states
from auth import Authenticator, Caller, is_id
from config import Settings
from database import Database, Together, Transaction
from errors import FieldError, Forbidden, InvalidRequest, NotFound, Unauthenticated, Unavailable
from history import History
from live import Channels
from nodes import NodeRegistry
from queue_manager import JobRow, NewJob, QueueManager
from rate_limiter import LoginLimiter, SubmitLimiter
from storage import Storage
from stream import Board

FREE_BYTES_KEPT = 0.05  # seconds; MIN_FREE_DISK leaves room for what comes in within them


@dataclass(frozen=True)
class Totals:
    """Numbers of jobs by state and, for admins, by user; `good_until` is monotonic."""

    by_state: dict[str, int]
    by_user: list[dict[str, Any]] | None = None
    good_until: float = 0.0


@dataclass
class Services:
    """What the handlers work with; made by `main`."""

    settings: Settings
    database: Database
    queue: QueueManager
    storage: Storage
    registry: NodeRegistry
    history: History
    authenticator: Authenticator
    wake_node: Callable[[str], None]
    board: Board = field(default_factory=Board)
    submit_limiter: SubmitLimiter = field(init=False)
    login_limiter: LoginLimiter = field(init=False)
    started: float = field(default_factory=time.monotonic)
    stopping: bool = False
    key_locks: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)
    channels: Channels = field(init=False)
    submissions: Together[NewJob, tuple[JobRow, bool]] = field(init=False)
    totals: Totals | None = None
    counting: asyncio.Lock = field(default_factory=asyncio.Lock)
    queue_page: answers.QueuePage | None = None
    _disk: tuple[float, int] | None = None  # when it was looked at (monotonic), bytes free

    def __post_init__(self) -> None:
        self.submit_limiter = SubmitLimiter(self.settings.submits_per_minute)
        self.login_limiter = LoginLimiter(self.settings.login_failures_per_minute)
        self.channels = Channels(self.queue.growth, self.queue.watch)
        self.submissions = Together(self.database, self.queue.submit_all)

    # -- answers ---------------------------------------------------------------------------------------------------

    def status_of(self, row: JobRow) -> dict[str, Any]:
        """`schemas.JobStatus` of a row."""
        return answers.job_status(row, self.registry, self.queue.outlook(row), clock.now_us())

    def results_head(self, row: JobRow) -> dict[str, Any]:
        """`schemas.JobResults` without the output and the records."""
        return {
            **self.status_of(row),
            "stdout_truncated": bool(row.stdout_truncated),
            "stderr_truncated": bool(row.stderr_truncated),
            "result_file": row.result_file,
            "result_sha256": row.result_sha256,
        }

    # -- who may ---------------------------------------------------------------------------------------------------

    def authenticate(self, request: Request, token: str) -> Caller:
        """The caller; refused tokens are counted per address. Raises Unauthenticated, TooManyRequests."""
        host = request.client.host if request.client is not None else "unknown"
        try:
            caller = self.authenticator.caller(token)
        except Unauthenticated:
            self.login_limiter.check(host, None)
            if self.login_limiter.failed(host):
                self._audit_refusal(host, problems.request_id(request))
            raise
        self.login_limiter.check(host, caller.token_id)
        return caller

    def _audit_refusal(self, host: str, request_id: str) -> None:
        def write(transaction: Transaction) -> None:
            audit.record(transaction, "unknown", audit.LOGIN_REFUSED, "token", address=host[:64], request_id=request_id)

        self.database.send(write)

    def job_for(self, caller: Caller, job_id: str) -> JobRow:
        """The job, if the caller may see it. Raises NotFound, Forbidden."""
        row = self.queue.job(job_id)
        if row is None:
            raise NotFound(f"There is no job {job_id[:80]}.")
        if not caller.may_see(row.user_id):
            raise Forbidden("This job belongs to another user.")
        return row

    def refuse_when_full(self) -> None:
        """Raise Unavailable when no submissions are taken."""
        if self.stopping:
            raise Unavailable("The server is stopping; submit again in a moment.", retry_after=10)
        now = time.monotonic()
        floor = self.settings.min_free_disk
        # Only a look that found room is kept: nobody is refused for a disk that was full a moment ago.
        if self._disk is None or now - self._disk[0] > FREE_BYTES_KEPT or self._disk[1] < floor:
            self._disk = (now, self.storage.free_bytes())
        if self._disk[1] < floor:
            raise Unavailable(
                "The server's disk is nearly full, so no new jobs are taken; running jobs go on. Tell an operator.",
                retry_after=60,
            )

    # -- waiting ---------------------------------------------------------------------------------------------------

    async def wait_for_end(self, request: Request, row: JobRow, seconds: float) -> JobRow:
        """The job's row once it has ended, the time is up, the client is gone or the server stops."""
        if seconds <= 0 or row.state in states.FINAL:
            return row
        changed = asyncio.Event()
        self.queue.ended.subscribe(row.job_id, changed)
        gone = asyncio.ensure_future(_disconnected(request, changed))
        deadline = time.monotonic() + seconds
        # A moment later than the deadline: a timer may come early by its resolution.
        alarm = asyncio.get_running_loop().call_later(seconds + 0.01, changed.set)
        try:
            while True:
                row = self.queue.job(row.job_id) or row
                over = time.monotonic() >= deadline
                if row.state in states.FINAL or over or self.stopping or gone.done():
                    return row
                await changed.wait()
                changed.clear()
        finally:
            alarm.cancel()
            gone.cancel()
            self.queue.ended.unsubscribe(row.job_id, changed)


async def _disconnected(request: Request, changed: asyncio.Event) -> None:
    try:
        while (await request.receive())["type"] != "http.disconnect":
            pass
    finally:
        changed.set()


# Coroutines all: FastAPI sends what is none through a thread.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def bearer(request: Request) -> str | None:
    """The token of the Authorization header, or None when there is no such header. Raises Unauthenticated."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Authenticator.refusal("The Authorization header must be: Bearer TOKEN.")
    return token.strip()


CursorParam = Annotated[
    str | None, Query(max_length=200, description="`next_cursor` of the page before.", examples=["c2VxOjQ3MTE"])
]
ServicesParam = Annotated[Services, Depends(_services)]


async def _caller(request: Request, services: ServicesParam) -> Caller:
    token = bearer(request)
    if token is None:
        raise Authenticator.refusal("A token is needed: send it as Authorization: Bearer TOKEN.")
    return services.authenticate(request, token)


async def optional_caller(request: Request, services: ServicesParam) -> Caller | None:
    token = bearer(request)
    return services.authenticate(request, token) if token is not None else None


async def _admin(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    if not caller.is_admin:
        raise Forbidden("Only administrators may do this.")
    return caller


CallerParam = Annotated[Caller, Depends(_caller)]
AdminParam = Annotated[Caller, Depends(_admin)]
JobIdParam = Annotated[str, PathParameter(examples=["0b8e2a52-8c1e-4a3e-9a53-0e6f7f2f6c11"])]
NodeIdParam = Annotated[str, PathParameter(examples=["node-3"])]
BEARER: dict[str, Any] = {"security": [{"Bearer": []}]}
OPTIONAL_BEARER: dict[str, Any] = {"security": [{"Bearer": []}, {}]}


def make_cursor(seq: int) -> str:
    return base64.urlsafe_b64encode(f"seq:{seq}".encode()).decode().rstrip("=")


def read_cursor(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    name, _, number = _cursor_text(cursor).partition(":")
    if name == "seq" and number.isdigit() and int(number) < 1 << 62:
        return int(number)
    raise _wrong_cursor()


def make_user_cursor(user_id: str) -> str:
    return base64.urlsafe_b64encode(f"user:{user_id}".encode()).decode().rstrip("=")


def read_user_cursor(cursor: str | None) -> str | None:
    if cursor is None:
        return None
    name, _, user_id = _cursor_text(cursor).partition(":")
    if name == "user" and is_id(user_id):
        return user_id
    raise _wrong_cursor()


def _cursor_text(cursor: str) -> str:
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        raise _wrong_cursor() from None


def _wrong_cursor() -> InvalidRequest:
    return InvalidRequest(
        "The cursor is not one that this server gave; leave it out to start at the first page.",
        errors=[FieldError("cursor", "is not a cursor of this server")],
    )
