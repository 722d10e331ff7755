"""Every change of a job's state, and the questions about the queue.

Each change is one statement guarded by state and epoch, with its row in `job_events` in the same transaction; the
hints (wake a node, wake a waiter) go out after the commit. Nothing else writes to `jobs`, but for `backup.restore`,
which lifts all epochs of a database that no server works on.

May import `errors`, `states`, `clock`, `models`, `metrics`, `database`, `audit`, `wakeups`,
`estimates`.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

import audit
import clock
import metrics
import states
from database import Database, Prepared, Transaction
from errors import InvalidRequest, NotFound, TooManyRequests, Unprocessable
from estimates import Line, Outlook, Range, RunTimes, remaining, why_pending
from models import job_events, job_inputs, jobs, nodes
from wakeups import IdleNodes, JobWatch

log = logging.getLogger("queue")
LEASE_SECONDS = 60.0
MICROSECONDS = 1_000_000
RETRY_BACKOFF_BASE = 1.0
RETRY_BACKOFF_MOST = 60.0
CHEAP_VIEW = 0.002  # seconds of computing below which the queue is looked at anew after every change

LEARNED_AT_START = 5000  # last ended jobs that are looked at for how long jobs take

JobRow = Row[Any]


class NewJob(NamedTuple):
    """A submission that passed its checks. `expected_time` and `time_limit` in seconds."""

    user_id: str
    competition_id: str
    project_id: str
    expected_time: float
    time_limit: float
    config: dict[str, Any]
    code: bytes
    request_digest: bytes
    request_id: str
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Claim:
    """The right of one owner to run one attempt of a job; every later change must show its `epoch`."""

    seq: int
    job_id: str
    user_id: str
    competition_id: str
    project_id: str
    expected_time: float
    time_limit: float
    epoch: int
    attempt: int
    node_id: str
    config: dict[str, Any]
    code: bytes
    started_at: int | None = None
    node_address: str | None = None
    boot_id: str | None = None
    node_lease: float | None = None
    cancel_requested: bool = False
    infra_failures: int = 0


@dataclass(frozen=True)
class Renewal:
    """What became of a lease: `held` is False when the claim is void."""

    held: bool
    cancel_requested: bool


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `state` is final; for `failed` there is a `failure_reason`."""

    state: str
    message: str
    completed_at: int
    failure_reason: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    result_file: str | None = None
    result_bytes: int | None = None
    result_sha256: str | None = None


CANCELLED_BEFORE_START = "Cancelled before it started."
CANCELLED_NOW = "cancelled"
CANCEL_REQUESTED = "requested"


@dataclass(frozen=True)
class QueueView:
    """The queue at one moment (monotonic `taken`; `cost` is what it took to compute, both in seconds): the pending
    jobs, to which those that came since are added, how many run, the node that is free first and in how many seconds,
    and which nodes take no work."""

    taken: float
    cost: float
    line: Line
    running: int
    first_free: tuple[str, float] | None = None
    aside: str = ""

    def start_of(self, seq: int) -> Range | None:
        """Seconds from `taken` until the pending job starts, None when no node is in use."""
        return self.line.place(seq)[1]

    @property
    def pending(self) -> int:
        """How many wait."""
        return len(self.line)

    @property
    def newcomer_wait(self) -> float | None:
        """Seconds that a job that came now would probably wait; None when no node is in use."""
        start = self.line.newcomer
        return start.likely if start is not None else None


class QueueManager:
    """The queue of one server process.

    `owner` is a fresh id per process start: a row owned by another one belongs to a process that has died.
    `now` gives wall-clock microseconds; tests pass their own.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_active_jobs: int = 1,
        max_infra_retries: int = 2,
        owner: str | None = None,
        now: Callable[[], int] = clock.now_us,
        rng: random.Random | None = None,
    ) -> None:
        self.database = database
        self.watch = JobWatch()
        self.ended = JobWatch()  # for who waits for nothing but the end
        self.growth = JobWatch()  # of output; told by whoever receives it
        self.idle = IdleNodes()
        self.owner = owner or uuid.uuid4().hex
        self._max_active_jobs = max_active_jobs
        self._max_infra_retries = max_infra_retries
        self._now = now
        self._random = rng or random.Random()  # noqa: S311  # spreads load, guards nothing
        self._view: QueueView | None = None
        self._view_stale = True
        self._view_lock = threading.Lock()
        self._newcomers: deque[JobRow] = deque()  # queued since the view was last asked for
        self._meanwhile: list[JobRow] | None = None  # those that came while a view is being computed in a thread
        self._run_times = RunTimes()
        self._learn_from_the_past()
        # Set by whoever knows the nodes: which take work, why others do not, how to tell a worker of a cancellation.
        self.usable_nodes: Callable[[], list[str]] = lambda: []
        self.nodes_aside: Callable[[], str] = lambda: ""
        self.cancel_hint: Callable[[str], None] = lambda node_id: None
        # Told of a job's row after each of its events, on the writer's thread; must be short.
        self.job_changed: Callable[[JobRow], None] = lambda row: None

    # -- transitions ----------------------------------------------------------------------------------------------

    def submit(self, new: NewJob) -> Callable[[Transaction], tuple[JobRow, bool]]:
        """A write that queues the job: (row, True), or (row, False) when the idempotency key is known already.

        Raises TooManyRequests when the user has MAX_ACTIVE_JOBS pending or running jobs, Unprocessable when the key
        was used for another submission.
        """
        write_all = self.submit_all([new])

        def write(transaction: Transaction) -> tuple[JobRow, bool]:
            (found,) = write_all(transaction)
            if isinstance(found, Exception):
                raise found
            return found

        return write

    def submit_all(self, news: Sequence[NewJob]) -> Callable[[Transaction], list[tuple[JobRow, bool] | Exception]]:
        """A write that queues the jobs, each as `submit` does: for each what that gives, or the error it raises."""
        job_ids = [str(uuid.uuid4()) for _ in news]

        def write(transaction: Transaction) -> list[tuple[JobRow, bool] | Exception]:
            created = self._now()
            wanted = [_given(new, job_id, created) for new, job_id in zip(news, job_ids, strict=True)]
            left = wanted
            for slot in range(self._max_active_jobs):
                # The unique index over (user, slot) is the limit; a taken place inserts nothing.
                for values in left:
                    values["slot"] = slot
                _insert_jobs(transaction.connection, left)
                left = [values for values in left if "seq" not in values]
                if not left:
                    break
            rows = [_NEW_JOB._replace(**values) if "seq" in values else None for values in wanted]
            came = [(new, row) for new, row in zip(news, rows, strict=True) if row is not None]
            inputs = [{"job_seq": row.seq, "config": json.dumps(new.config), "code": new.code} for new, row in came]
            _INSERT_INPUTS.run_rows(transaction.connection, inputs)
            _INSERT_EVENT.run_rows(transaction.connection, [_submitted(row) for _, row in came])
            transaction.after_commit(lambda: self._came([row for _, row in came]))
            return [
                (row, True) if row is not None else self._not_queued(transaction.connection, new, created)
                for new, row in zip(news, rows, strict=True)
            ]

        return write

    def _not_queued(self, connection: Connection, new: NewJob, now: int) -> tuple[JobRow, bool] | Exception:
        """What came of a submission that no place was free for."""
        if new.idempotency_key is not None:
            known = connection.execute(
                select(jobs).where(jobs.c.user_id == new.user_id, jobs.c.idempotency_key == new.idempotency_key)
            ).first()
            if known is not None and bytes(known.request_digest) == new.request_digest:
                return known, False
            if known is not None:
                return Unprocessable(
                    "This Idempotency-Key was used for another submission; use a new key for a new job."
                )
        return self._limit_reached(connection, new.user_id, now)

    def refuse_at_limit(self, user_id: str) -> None:
        """Raise TooManyRequests when the user has MAX_ACTIVE_JOBS active jobs. Only tells: `submit` holds the limit."""
        active = select(func.count()).where(jobs.c.user_id == user_id, jobs.c.state.in_(states.ACTIVE))
        with self.database.reading() as connection:
            if connection.execute(active).scalar_one() >= self._max_active_jobs:
                raise self._limit_reached(connection, user_id, self._now())

    def _limit_reached(self, connection: Connection, user_id: str, now: int) -> TooManyRequests:
        return TooManyRequests(
            f"Queue limit exceeded: you already have {self._active_text()}. Wait until it ends, or cancel it.",
            limit="active_jobs",
            retry_after=self._seconds_until_free(connection, user_id, now),
        )

    def _active_text(self) -> str:
        if self._max_active_jobs == 1:
            return "a pending or running job"
        return f"{self._max_active_jobs} pending or running jobs"

    @staticmethod
    def _seconds_until_free(connection: Connection, user_id: str, now: int) -> float:
        row = connection.execute(
            select(jobs.c.expected_time, jobs.c.started_at)
            .where(jobs.c.user_id == user_id, jobs.c.state.in_(states.ACTIVE))
            .order_by(jobs.c.seq)
        ).first()
        if row is None:
            return 1.0
        running_for = (now - row.started_at) / MICROSECONDS if row.started_at else 0.0
        return float(min(max(1.0, row.expected_time - running_for), 3600.0))

    def claim(self, node_id: str, node_address: str, *, take_avoided: bool = False) -> Claim | None:
        """Take the next pending job for the node, or None. The job is `running` and owned from here on.

        A job that an infrastructure failure drove from this node is left to others unless `take_avoided`.
        """

        def write(transaction: Transaction) -> Claim | None:
            now = self._now()
            row: JobRow | None = _CLAIM[take_avoided].first(
                transaction.connection,
                {
                    "now": now,
                    "the_node": node_id,
                    "the_address": node_address,
                    "the_owner": self.owner,
                    "until": now + int(LEASE_SECONDS * MICROSECONDS),
                },
            )
            if row is None:
                return None
            self._event(transaction, row, "claimed", states.PENDING, states.RUNNING, f"node:{node_id}", node_id=node_id)
            self._hint(transaction, row)
            return self._with_inputs(transaction, row)

        return self.database.write(write)

    def adopt(self, node_id: str) -> Claim | None:
        """Take over the job that runs on the node, or None. Whoever held it before, its epoch is void.

        Only the one worker of a node may call this.
        """

        def write(transaction: Transaction) -> Claim | None:
            row = transaction.connection.execute(
                update(jobs)
                .where(jobs.c.node_id == node_id, jobs.c.state == states.RUNNING)
                .values(
                    owner=self.owner,
                    epoch=jobs.c.epoch + 1,
                    lease_expires_at=self._now() + int(LEASE_SECONDS * MICROSECONDS),
                )
                .returning(jobs)
            ).first()
            if row is None:
                return None
            self._event(transaction, row, "adopted", states.RUNNING, states.RUNNING, f"node:{node_id}", node_id=node_id)
            return self._with_inputs(transaction, row)

        return self.database.write(write)

    def renew(self, claim: Claim) -> Renewal:
        """Extend the lease; says whether the claim still holds, and whether the end of the job was asked for."""

        def write(transaction: Transaction) -> Renewal:
            row = self._guarded_row(
                transaction, claim, {"lease_expires_at": self._now() + int(LEASE_SECONDS * MICROSECONDS)}
            )
            return Renewal(row is not None, row is not None and row.cancel_requested_at is not None)

        return self.database.write(write)

    def set_node_lease(self, claim: Claim, seconds: float | None) -> bool:
        """Record for how long the node will let the attempt live without a server. Durable before it is granted."""

        def write(transaction: Transaction) -> bool:
            return self._guarded_row(transaction, claim, {"node_lease": seconds}) is not None

        return self.database.write(write)

    def launched(self, claim: Claim, boot_id: str, ago: float = 0.0) -> None:
        """Record that the job's first process started so many seconds ago. Does not wait for the commit: it runs."""
        started = self._now() - int(ago * MICROSECONDS)
        self.database.send(lambda transaction: self._started(transaction, claim, boot_id, started))

    def _started(self, transaction: Transaction, claim: Claim, boot_id: str | None, started: int) -> None:
        row = self._guarded_row(transaction, claim, {"started_at": started, "boot_id": boot_id})
        if row is None:
            return
        self._event(
            transaction,
            row,
            "started",
            states.RUNNING,
            states.RUNNING,
            f"node:{claim.node_id}",
            node_id=claim.node_id,
            at=started,
        )
        self._hint(transaction, row)

    def finish(self, claim: Claim, outcome: Outcome, started_ago: float | None = None) -> bool:
        """Make the job final, once. False when the claim is void: then nothing was changed.

        `started_ago`: seconds since the start, where `launched` was not called for it.
        """
        started = None
        if started_ago is not None:
            started = min(self._now() - int(started_ago * MICROSECONDS), outcome.completed_at)

        def write(transaction: Transaction) -> bool:
            if started is not None:
                self._started(transaction, claim, claim.boot_id, started)
            row = self._guarded_row(
                transaction,
                claim,
                {
                    "state": outcome.state,
                    "lease_expires_at": None,
                    "completed_at": outcome.completed_at,
                    "failure_reason": outcome.failure_reason,
                    "exit_code": outcome.exit_code,
                    "signal": outcome.signal,
                    "message": outcome.message,
                    "stdout_bytes": outcome.stdout_bytes,
                    "stderr_bytes": outcome.stderr_bytes,
                    "stdout_truncated": outcome.stdout_truncated,
                    "stderr_truncated": outcome.stderr_truncated,
                    "result_file": outcome.result_file,
                    "result_bytes": outcome.result_bytes,
                    "result_sha256": outcome.result_sha256,
                },
            )
            if row is None:
                return False
            actor = f"node:{claim.node_id}"
            if outcome.state == states.CANCELLED and row.cancel_requested_by:
                actor = row.cancel_requested_by
            self._event(
                transaction,
                row,
                outcome.state,
                states.RUNNING,
                outcome.state,
                actor,
                node_id=claim.node_id,
                reason=outcome.failure_reason,
                message=outcome.message,
                at=outcome.completed_at,
            )
            self._count_on_node(transaction, claim.node_id, outcome)
            if outcome.state != states.CANCELLED and row.started_at is not None:
                transaction.after_commit(lambda: self._learn(row))
            self._hint(transaction, row)
            return True

        return self.database.write(write)

    def requeue(self, claim: Claim, reason: str, message: str) -> str | None:
        """After an infrastructure failure: back to `pending` for another node, or final when retries are used up.

        The caller must know that the attempt cannot be alive. Returns the new state, None when the claim is void.
        """
        backoff = self._random.uniform(0, 1)

        def write(transaction: Transaction) -> str | None:
            current = transaction.connection.execute(
                select(jobs.c.cancel_requested_at, jobs.c.cancel_requested_by, jobs.c.infra_failures).where(*_STILL),
                self._still(claim),
            ).first()
            if current is None:
                return None
            now = self._now()
            failures = current.infra_failures + 1
            values: dict[str, Any] = {"lease_expires_at": None, "infra_failures": failures, "avoid_node": claim.node_id}
            actor, why = f"node:{claim.node_id}", message
            if current.cancel_requested_at is not None:
                state, event, actor = states.CANCELLED, states.CANCELLED, current.cancel_requested_by
                why = f"Cancelled. {message}"
                values.update(completed_at=now)
            elif failures > self._max_infra_retries:
                state, event = states.FAILED, states.FAILED
                why = f"{message} Given up after {failures} attempts; this was not your code's fault. Submit it again."
                values.update(completed_at=now, failure_reason=reason)
            else:
                state, event = states.PENDING, "requeued"
                why = f"{message} The job will run again on another node."
                most = min(RETRY_BACKOFF_MOST, RETRY_BACKOFF_BASE * 2**failures)
                values.update(
                    owner=None, node_id=None, started_at=None, not_before=now + int(backoff * most * MICROSECONDS)
                )
            row = self._guarded_row(transaction, claim, {**values, "state": state, "message": why})
            assert row is not None  # read in this very transaction
            self._event(
                transaction, row, event, states.RUNNING, state, actor, node_id=claim.node_id, reason=reason, message=why
            )
            self._count_infra_failure(transaction, claim.node_id)
            self._hint(transaction, row)
            if state == states.PENDING:
                transaction.after_commit(lambda: self._offer_later(backoff * most))
            return state

        return self.database.write(write)

    def give_back(self, claim: Claim, message: str) -> bool:
        """Undo a claim whose launch was never sent: the job is pending again as if nothing had been.

        If its cancellation was asked for meanwhile, it is cancelled instead.
        """

        def write(transaction: Transaction) -> bool:
            asked = jobs.c.cancel_requested_at.is_not(None)
            statement = update(jobs).where(*_STILL).returning(jobs)
            statement = statement.values(
                state=case((asked, states.CANCELLED), else_=states.PENDING),
                completed_at=case((asked, self._now()), else_=None),
                message=case((asked, CANCELLED_BEFORE_START), else_=jobs.c.message),
                lease_expires_at=None,
                owner=None,
                node_id=None,
                started_at=None,
                avoid_node=claim.node_id,
            )
            row = transaction.connection.execute(statement, self._still(claim)).first()
            if row is None:
                return False
            cancelled = row.state == states.CANCELLED
            self._event(
                transaction,
                row,
                states.CANCELLED if cancelled else "given_back",
                states.RUNNING,
                row.state,
                row.cancel_requested_by if cancelled else f"node:{claim.node_id}",
                node_id=claim.node_id,
                message=message,
            )
            self._hint(transaction, row)
            if not cancelled:
                transaction.after_commit(self._job_available)
            return True

        return self.database.write(write)

    def cancel(self, job_id: str, actor: str, request_id: str) -> Callable[[Transaction], tuple[str, JobRow]]:
        """A write that cancels a pending job at once, or asks for the end of a running one.

        Gives (CANCELLED_NOW or CANCEL_REQUESTED, row). Raises InvalidRequest ("already …") when the job has ended.
        """

        def write(transaction: Transaction) -> tuple[str, JobRow]:
            now = self._now()
            row = transaction.connection.execute(
                update(jobs)
                .where(jobs.c.job_id == job_id, jobs.c.state.in_(states.ACTIVE))
                .values(
                    cancel_requested_at=func.coalesce(jobs.c.cancel_requested_at, now),
                    cancel_requested_by=func.coalesce(jobs.c.cancel_requested_by, actor),
                    state=case((jobs.c.state == states.PENDING, states.CANCELLED), else_=jobs.c.state),
                    completed_at=case((jobs.c.state == states.PENDING, now), else_=None),
                    message=case((jobs.c.state == states.PENDING, CANCELLED_BEFORE_START), else_=jobs.c.message),
                )
                .returning(jobs)
            ).first()
            if row is None:
                found = transaction.connection.execute(select(jobs.c.state).where(jobs.c.job_id == job_id)).first()
                if found is None:
                    raise NotFound(f"There is no job {job_id}.")
                raise InvalidRequest(f"The job has already ended: it is {found.state}.")
            if row.state == states.CANCELLED:
                self._event(
                    transaction,
                    row,
                    states.CANCELLED,
                    states.PENDING,
                    states.CANCELLED,
                    actor,
                    message=row.message,
                    request_id=request_id,
                )
            elif row.cancel_requested_at == now:
                self._event(
                    transaction,
                    row,
                    "cancel_requested",
                    states.RUNNING,
                    states.RUNNING,
                    actor,
                    node_id=row.node_id,
                    request_id=request_id,
                )
                transaction.after_commit(lambda: self.cancel_hint(row.node_id))
            if actor.partition(":")[2] != row.user_id and row.cancel_requested_at == now:
                detail = f"job of {row.user_id}"
                audit.record(transaction, actor, audit.JOB_CANCELLED, job_id, detail=detail, request_id=request_id)
            self._hint(transaction, row)
            return (CANCELLED_NOW if row.state == states.CANCELLED else CANCEL_REQUESTED), row

        return write

    def note(self, claim: Claim, event: str, message: str) -> None:
        """Add an event to the job's story that changes no state (`unreachable`, `reachable`, …)."""

        def write(transaction: Transaction) -> None:
            row = transaction.connection.execute(select(jobs).where(*_STILL), self._still(claim)).first()
            if row is not None:
                self._event(
                    transaction,
                    row,
                    event,
                    states.RUNNING,
                    states.RUNNING,
                    f"node:{claim.node_id}",
                    node_id=claim.node_id,
                    message=message,
                )
                self._hint(transaction, row)

        self.database.send(write)

    # -- pieces of the above ---------------------------------------------------------------------------------------

    def _still(self, claim: Claim) -> dict[str, Any]:
        """The parameters of `_STILL`."""
        return {"the_seq": claim.seq, "the_epoch": claim.epoch, "the_owner": self.owner}

    def _guarded_row(self, transaction: Transaction, claim: Claim, values: dict[str, Any]) -> JobRow | None:
        parameters = {f"new_{name}": value for name, value in values.items()} | self._still(claim)
        row: JobRow | None = _guarded_update(tuple(values)).first(transaction.connection, parameters)
        return row

    def _event(
        self,
        transaction: Transaction,
        row: JobRow,
        event: str,
        from_state: str | None,
        to_state: str,
        actor: str,
        *,
        node_id: str | None = None,
        reason: str | None = None,
        message: str | None = None,
        request_id: str | None = None,
        at: int | None = None,
    ) -> None:
        values = {
            "job_seq": row.seq,
            "at": at if at is not None else self._now(),
            "event": event,
            "from_state": from_state,
            "to_state": to_state,
            "actor": actor,
            "node_id": node_id,
            "attempt": row.attempt,
            "epoch": row.epoch,
            "reason": reason,
            "message": message,
            "request_id": request_id if request_id is not None else row.request_id,
        }
        _INSERT_EVENT.run(transaction.connection, values)
        transaction.after_commit(lambda: metrics.job_event(event, to_state, reason, row))
        transaction.after_commit(lambda: self._tell_of(row))

    def _with_inputs(self, transaction: Transaction, row: JobRow) -> Claim:
        inputs = _INPUTS.first(transaction.connection, {"the_seq": row.seq})
        return Claim(
            seq=row.seq,
            job_id=row.job_id,
            user_id=row.user_id,
            competition_id=row.competition_id,
            project_id=row.project_id,
            expected_time=row.expected_time,
            time_limit=row.time_limit,
            epoch=row.epoch,
            attempt=row.attempt,
            node_id=row.node_id,
            config=_kept_config(inputs.config),
            code=bytes(inputs.code),
            started_at=row.started_at,
            node_address=row.node_address,
            boot_id=row.boot_id,
            node_lease=row.node_lease,
            cancel_requested=row.cancel_requested_at is not None,
            infra_failures=row.infra_failures,
        )

    def _count_on_node(self, transaction: Transaction, node_id: str, outcome: Outcome) -> None:
        self._bump_node(transaction, node_id, _COUNT_ENDED[outcome.state], at=outcome.completed_at)

    def _count_infra_failure(self, transaction: Transaction, node_id: str) -> None:
        self._bump_node(transaction, node_id, _COUNT_INFRA_FAILURE)

    def _bump_node(self, transaction: Transaction, node_id: str, statement: Prepared, **parameters: Any) -> None:
        parameters["the_node"] = node_id
        if statement.run(transaction.connection, parameters).rowcount == 0:
            transaction.connection.execute(insert(nodes), {"node_id": node_id})
            statement.run(transaction.connection, parameters)

    def _tell_of(self, row: JobRow) -> None:
        self._view_stale = True
        self.job_changed(row)

    def _hint(self, transaction: Transaction, row: JobRow) -> None:
        def hint() -> None:
            self._view_stale = True
            self.watch.changed(row.job_id)
            if row.state in states.FINAL:
                self.ended.changed(row.job_id)

        transaction.after_commit(hint)

    def nodes_changed(self) -> None:
        """Tell that a node came, went or was freed: estimates are computed anew."""
        self._view_stale = True

    def _offer_later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._job_available)
        timer.daemon = True
        timer.start()

    def _came(self, rows: Sequence[JobRow]) -> None:
        self._newcomers.extend(rows)
        metrics.SUBMITTED.inc(len(rows))
        for row in rows:
            self.job_changed(row)
        for _ in rows:
            if not self.idle.offer():
                break

    def _job_available(self) -> None:
        self._view_stale = True
        self.idle.offer()

    def pass_on(self, node_id: str, claimed: bool) -> None:
        """After the node looked for work: wake another one for what it left over.

        A wake-up can reach a node that is about to take another job, or one that must not take the job at hand.
        """
        parameters: dict[str, Any] = {"now": self._now()} | ({} if claimed else {"the_node": node_id})
        with self.database.reading() as connection:
            left_over = _LEFT_OVER[claimed].first(connection, parameters) is not None
        if left_over:
            self.idle.offer(besides=node_id)

    # -- nodes' persistent side ------------------------------------------------------------------------------------

    def set_drained(
        self, node_id: str, drained: bool, actor: str, request_id: str | None = None
    ) -> Callable[[Transaction], None]:
        """A write that stops or restarts giving the node work."""

        def write(transaction: Transaction) -> None:
            action = audit.NODE_DRAINED if drained else audit.NODE_RESUMED
            audit.record(transaction, actor, action, node_id, request_id=request_id)
            at, by = (self._now(), actor) if drained else (None, None)
            self._bump_node(transaction, node_id, _DRAIN, at=at, by=by)

        return write

    def node_rows(self) -> dict[str, Row[Any]]:
        """What is stored of each node that ever was used or drained."""
        with self.database.reading() as connection:
            return {row.node_id: row for row in connection.execute(select(nodes))}

    # -- retention -------------------------------------------------------------------------------------------------

    def oldest_ended_before(self, cutoff: int, limit: int) -> list[JobRow]:
        """Of the `limit` oldest jobs, those that ended before `cutoff` (microseconds)."""
        first = select(jobs).order_by(jobs.c.seq).limit(limit)
        with self.database.reading() as connection:
            rows = list(connection.execute(first))
        return [row for row in rows if row.completed_at is not None and row.completed_at < cutoff]

    def forget(self, seqs: list[int]) -> int:
        """Delete ended jobs with their inputs and events; returns how many. An active job is never deleted."""

        def write(transaction: Transaction) -> int:
            statement = delete(jobs).where(jobs.c.seq.in_(seqs), jobs.c.state.in_(states.FINAL))
            return transaction.connection.execute(statement).rowcount

        return self.database.write(write)

    # -- questions -------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> JobRow | None:
        """The job's row, or None."""
        with self.database.reading() as connection:
            found: JobRow | None = _JOB_BY_ID.first(connection, {"wanted": job_id})
            return found

    def owners(self, job_ids: Collection[str]) -> dict[str, str]:
        """Whose these jobs are."""
        statement = select(jobs.c.job_id, jobs.c.user_id).where(jobs.c.job_id.in_(list(job_ids)))
        with self.database.reading() as connection:
            return {row.job_id: row.user_id for row in connection.execute(statement)}

    def job_by_key(self, user_id: str, key: str) -> JobRow | None:
        """The job that the user submitted with this idempotency key, or None."""
        with self.database.reading() as connection:
            return connection.execute(
                select(jobs).where(jobs.c.user_id == user_id, jobs.c.idempotency_key == key)
            ).first()

    def code(self, seq: int) -> bytes | None:
        """The code as it was submitted, or None when the job is forgotten."""
        with self.database.reading() as connection:
            found = connection.execute(select(job_inputs.c.code).where(job_inputs.c.job_seq == seq)).scalar()
            return bytes(found) if found is not None else None

    def events(self, seq: int, after: int = 0) -> list[Row[Any]]:
        """The job's events with an id above `after`, oldest first."""
        with self.database.reading() as connection:
            return list(connection.execute(_EVENTS, {"wanted": seq, "after": after}))

    def jobs_page(
        self, *, filters: dict[str, str], before_seq: int | None, limit: int, states_in: tuple[str, ...] = ()
    ) -> list[JobRow]:
        """Jobs that match, newest first, with `seq` below `before_seq`; at most `limit`."""
        # A user has few active jobs and maybe many others: sorting the few is less than passing by all others,
        # which SQLite would choose to do for the sake of the order. An expression has no index's order.
        few = "user_id" in filters and bool(states_in) and set(states_in) <= set(states.ACTIVE)
        newest_first = (jobs.c.seq + 0 if few else jobs.c.seq).desc()
        statement: Select[Any] = select(jobs).order_by(newest_first).limit(limit)
        for name, value in filters.items():
            statement = statement.where(jobs.c[name] == value)
        if states_in:
            statement = statement.where(jobs.c.state.in_(states_in))
        if before_seq is not None:
            statement = statement.where(jobs.c.seq < before_seq)
        with self.database.reading() as connection:
            return list(connection.execute(statement))

    def first_pending(self, limit: int) -> list[JobRow]:
        """The first `limit` pending jobs in the order in which they are taken: only what a list of the queue shows."""
        with self.database.reading() as connection:
            return list(connection.execute(_FIRST_PENDING, {"most": limit}))

    def running_nodes(self) -> list[str]:
        """Ids of the nodes that have a running job."""
        with self.database.reading() as connection:
            rows = connection.execute(select(jobs.c.node_id).where(jobs.c.state == states.RUNNING))
            return [row.node_id for row in rows]

    def pending_now(self) -> tuple[int, float | None]:
        """How many jobs wait, and the seconds until the first delayed one is due (None when none is delayed)."""
        now = self._now()
        with self.database.reading() as connection:
            row = connection.execute(
                select(
                    func.count().label("n"),
                    func.min(case((jobs.c.not_before > now, jobs.c.not_before))).label("due"),
                ).where(jobs.c.state == states.PENDING)
            ).one()
        return row.n, (row.due - now) / MICROSECONDS if row.due is not None else None

    def oldest_wait(self) -> float:
        """Seconds since the submission of the pending job that is taken next; 0 when none waits."""
        first = select(jobs.c.created_at).where(jobs.c.state == states.PENDING).order_by(jobs.c.seq).limit(1)
        with self.database.reading() as connection:
            created = connection.execute(first).scalar()
        return max(0.0, (self._now() - created) / MICROSECONDS) if created is not None else 0.0

    def counts(self, user_id: str | None = None) -> dict[str, int]:
        """Number of jobs by state, of one user or of all. Not for a hot path when of all."""
        statement = select(jobs.c.state, func.count().label("n")).group_by(jobs.c.state)
        if user_id is not None:
            statement = statement.where(jobs.c.user_id == user_id)
        with self.database.reading() as connection:
            found = {row.state: row.n for row in connection.execute(statement)}
        return {state: found.get(state, 0) for state in states.JOB_STATES}

    def jobs_of(self, user_ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """Of each of these users who has jobs: `counts` by state, and `last`, when the last one came (microseconds).

        Reads the index over all jobs of those users, so not on the event loop.
        """
        who = jobs.c.user_id.in_(list(user_ids))
        counted = select(jobs.c.user_id, jobs.c.state, func.count().label("n")).where(who)
        newest = select(func.max(jobs.c.seq)).where(who).group_by(jobs.c.user_id)
        found: dict[str, dict[str, Any]] = {}
        with self.database.reading() as connection:
            for row in connection.execute(counted.group_by(jobs.c.user_id, jobs.c.state)):
                found.setdefault(row.user_id, {"counts": {}, "last": None})["counts"][row.state] = row.n
            last = select(jobs.c.user_id, jobs.c.created_at).where(jobs.c.seq.in_(newest))
            for row in connection.execute(last):
                found.setdefault(row.user_id, {"counts": {}, "last": None})["last"] = row.created_at
        return found

    def users(self) -> list[dict[str, Any]]:
        """Per user: number of jobs, how many of them are active, when the last came."""
        active = func.sum(case((jobs.c.state.in_(states.ACTIVE), 1), else_=0))
        statement = (
            select(
                jobs.c.user_id,
                func.count().label("jobs"),
                active.label("active"),
                func.max(jobs.c.created_at).label("last"),
            )
            .group_by(jobs.c.user_id)
            .order_by(func.max(jobs.c.seq).desc())
            .limit(100)
        )
        with self.database.reading() as connection:
            return [
                {
                    "user_id": row.user_id,
                    "jobs": row.jobs,
                    "active_jobs": row.active,
                    "last_job_at": clock.iso(row.last),
                }
                for row in connection.execute(statement)
            ]

    def view(self) -> QueueView:
        """Positions and estimates of all pending jobs: computed again after a change or a second, while jobs that only
        came are added to what is there.

        A short queue costs less than the request that asks, and is always as it is now. A long one costs milliseconds:
        that is done in a thread, for at most a twentieth of the time, while what was known before is the answer.
        """
        with self._view_lock:
            view = self._view
            if view is not None:
                age = time.monotonic() - view.taken
                settled = 20 * view.cost if view.cost > CHEAP_VIEW else 0.0
                if not self._view_stale:
                    settled = max(1.0, settled)
                if age < settled or self._meanwhile is not None:
                    return self._joined(view)
            self._view_stale = False
            if view is None or view.cost <= CHEAP_VIEW:
                self._newcomers.clear()  # durable, so the database has them
                self._view = self._compute_view()
                return self._view
            self._meanwhile = []
            threading.Thread(target=self._renew_view, name="queue-view", daemon=True).start()
            return self._joined(view)

    def _joined(self, view: QueueView) -> QueueView:
        """The view, with those added that came since."""
        while self._newcomers:
            row = self._newcomers.popleft()
            if self._meanwhile is not None:
                self._meanwhile.append(row)
            view.line.add(row.seq, self._run_times.seconds(*_declared(row)))
        return view

    def _renew_view(self) -> None:
        view = None
        try:
            view = self._compute_view()
        except Exception:
            log.exception("the queue could not be looked at; the next one who asks tries again")
        with self._view_lock:
            came, self._meanwhile = self._meanwhile, None
            if view is None:
                self._view_stale = True
                return
            for row in came or ():
                view.line.add(row.seq, self._run_times.seconds(*_declared(row)))
            self._view = view

    def outlook(self, row: JobRow) -> Outlook | None:
        """What an active job can expect, None for an ended one. Asks the database nothing but what `view` does."""
        if row.state not in states.ACTIVE:
            return None
        now = self._now()
        run = self._run_times.seconds(row.user_id, row.competition_id, row.expected_time, row.time_limit)
        if row.state == states.RUNNING:
            if row.started_at is None:
                return Outlook(None, None, None)
            left = remaining(run, row.time_limit, (now - row.started_at) / MICROSECONDS)
            return Outlook(None, None, left)
        view = self.view()
        position, start = view.line.place(row.seq)
        finish = None
        if start is not None:
            finish = Range(start.low + run.low, start.likely + run.likely, start.high + run.high)
        why = why_pending(
            position,
            start,
            view.first_free,
            view.aside,
            retry_in=(row.not_before - now) / MICROSECONDS,
            avoid_node=row.avoid_node,
        )
        return Outlook(position, start, finish, why)

    def _learn(self, row: JobRow) -> None:
        seconds = max(0, row.completed_at - row.started_at) / MICROSECONDS
        self._run_times.learn(row.user_id, row.competition_id, seconds / row.expected_time)

    def _learn_from_the_past(self) -> None:
        with self.database.reading() as connection:
            for row in reversed(list(connection.execute(_LAST_ENDED))):
                self._learn(row)

    def _compute_view(self) -> QueueView:
        began = time.thread_time()  # of this thread alone: a busy machine must not make the queue look long
        now = self._now()
        usable = set(self.usable_nodes())
        with self.database.reading() as connection:
            seconds = self._run_times.seconds
            pending = [(seq, seconds(*declared)) for seq, *declared in _PENDING_IN_ORDER.run(connection, {})]
            running = list(connection.execute(_RUNNING_JOBS))
        free_in = dict.fromkeys(usable, Range(0.0, 0.0, 0.0))
        for row in running:
            if row.node_id in usable:
                running_for = (now - row.started_at) / MICROSECONDS if row.started_at is not None else 0.0
                run = self._run_times.seconds(row.user_id, row.competition_id, row.expected_time, row.time_limit)
                free_in[row.node_id] = remaining(run, row.time_limit, max(0.0, running_for))
        line = Line(free_in.values(), pending)
        first = min(((free.likely, node_id) for node_id, free in free_in.items()), default=None)
        return QueueView(
            time.monotonic(),
            time.thread_time() - began,
            line,
            len(running),
            (first[1], first[0]) if first is not None else None,
            self.nodes_aside(),
        )


def _kept_config(text: str) -> dict[str, Any]:
    """The stored config; it is only shown, so a row that was damaged by hand must not keep its job from running."""
    try:
        config = json.loads(text)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _given(new: NewJob, job_id: str, created: int) -> dict[str, Any]:
    """The columns of a new job that are given, but for its slot."""
    return {
        "job_id": job_id,
        "user_id": new.user_id,
        "competition_id": new.competition_id,
        "project_id": new.project_id,
        "expected_time": new.expected_time,
        "time_limit": new.time_limit,
        "state": states.PENDING,
        "created_at": created,
        "request_digest": new.request_digest,
        "request_id": new.request_id,
        "idempotency_key": new.idempotency_key,
    }


def _insert_jobs(connection: Connection, wanted: list[dict[str, Any]]) -> None:
    """Insert the jobs; those that no constraint stands against get their `seq`."""
    inserted, last = _INSERT_JOB.run_rows(connection, wanted)
    if inserted == len(wanted):  # then they are the last ones, in this order
        for seq, values in enumerate(wanted, last - inserted + 1):
            values["seq"] = seq
        return
    seqs = select(jobs.c.job_id, jobs.c.seq).where(jobs.c.job_id.in_([values["job_id"] for values in wanted]))
    found = {row.job_id: row.seq for row in connection.execute(seqs)}
    for values in wanted:
        if values["job_id"] in found:
            values["seq"] = found[values["job_id"]]


def _submitted(row: JobRow) -> dict[str, Any]:
    """The first event of a job."""
    return _NEW_EVENT | {
        "job_seq": row.seq,
        "at": row.created_at,
        "event": "submitted",
        "to_state": states.PENDING,
        "actor": f"user:{row.user_id}",
        "request_id": row.request_id,
    }


def _declared(row: JobRow) -> tuple[str, str, float, float]:
    return row.user_id, row.competition_id, row.expected_time, row.time_limit


# Statements that every job needs are built once: building one costs more than SQLite takes to run it.


def _claim_statement(take_avoided: bool) -> Prepared:
    drained = exists().where(nodes.c.node_id == bindparam("the_node"), nodes.c.drained_at.is_not(None))
    eligible = and_(jobs.c.state == states.PENDING, jobs.c.not_before <= bindparam("now"), ~drained)
    if not take_avoided:
        avoided = (jobs.c.avoid_node.is_(None)) | (jobs.c.avoid_node != bindparam("the_node"))
        eligible = and_(eligible, avoided)
    first = select(jobs.c.seq).where(eligible).order_by(jobs.c.seq).limit(1).scalar_subquery()
    return Prepared(
        update(jobs)
        .where(jobs.c.seq == first, jobs.c.state == states.PENDING)
        .values(
            state=states.RUNNING,
            node_id=bindparam("the_node"),
            node_address=bindparam("the_address"),
            boot_id=None,
            node_lease=None,
            owner=bindparam("the_owner"),
            epoch=jobs.c.epoch + 1,
            attempt=jobs.c.attempt + 1,
            lease_expires_at=bindparam("until"),
            started_at=None,
            message=None,
        )
        .returning(jobs)
    )


def _count_ended(state: str, column: Column[int]) -> Prepared:
    streak = nodes.c.consecutive_failed_jobs + 1 if state == states.FAILED else 0
    return Prepared(
        _ONE_NODE.values(
            {
                column.name: column + 1,
                "consecutive_infra_failures": 0,
                "consecutive_failed_jobs": streak,
                "last_job_at": bindparam("at"),
            }
        )
    )


@lru_cache(maxsize=32)
def _guarded_update(names: tuple[str, ...]) -> Prepared:
    """Give these columns of a claimed job the values `new_<name>`, while the claim holds."""
    values: dict[str, Any] = {name: bindparam(f"new_{name}") for name in names}
    return Prepared(update(jobs).where(*_STILL).values(values).returning(jobs))


_STILL = (
    jobs.c.seq == bindparam("the_seq"),
    jobs.c.epoch == bindparam("the_epoch"),
    jobs.c.owner == bindparam("the_owner"),
    jobs.c.state == states.RUNNING,
)
_CLAIM = {take_avoided: _claim_statement(take_avoided) for take_avoided in (False, True)}
_READY = select(jobs.c.seq).where(jobs.c.state == states.PENDING, jobs.c.not_before <= bindparam("now")).limit(1)
_LEFT_OVER = {True: Prepared(_READY), False: Prepared(_READY.where(jobs.c.avoid_node == bindparam("the_node")))}
_INPUTS = Prepared(select(job_inputs.c.config, job_inputs.c.code).where(job_inputs.c.job_seq == bindparam("the_seq")))
_ONE_NODE = update(nodes).where(nodes.c.node_id == bindparam("the_node"))
_COUNT_ENDED = {
    states.COMPLETED: _count_ended(states.COMPLETED, nodes.c.jobs_completed),
    states.FAILED: _count_ended(states.FAILED, nodes.c.jobs_failed),
    states.CANCELLED: _count_ended(states.CANCELLED, nodes.c.jobs_cancelled),
}
_COUNT_INFRA_FAILURE = Prepared(
    _ONE_NODE.values(
        infra_failures=nodes.c.infra_failures + 1,
        consecutive_infra_failures=nodes.c.consecutive_infra_failures + 1,
    )
)
_DRAIN = Prepared(_ONE_NODE.values(drained_at=bindparam("at"), drained_by=bindparam("by")))
_GIVEN = (
    *("job_id", "user_id", "competition_id", "project_id", "expected_time", "time_limit", "state", "slot"),
    *("created_at", "request_digest", "request_id", "idempotency_key"),
)
_INSERT_JOB = Prepared(sqlite_insert(jobs).on_conflict_do_nothing(), _GIVEN)
_INSERT_INPUTS = Prepared(insert(job_inputs), [column.name for column in job_inputs.c])
_INSERT_EVENT = Prepared(insert(job_events), [column.name for column in job_events.c if column.name != "id"])
_NEW_EVENT: dict[str, Any] = {column.name: None for column in job_events.c} | {"attempt": 0, "epoch": 0}
_EVENTS = (
    select(job_events)
    .where(job_events.c.job_seq == bindparam("wanted"), job_events.c.id > bindparam("after"))
    .order_by(job_events.c.id)
)
_JOB_BY_ID = Prepared(select(jobs).where(jobs.c.job_id == bindparam("wanted")))
# What the database puts into the columns of a new job that are not given; every default is 0.
_NEW_JOB = _JOB_BY_ID.row(*(None if column.server_default is None else 0 for column in jobs.c))
_DECLARED = (jobs.c.user_id, jobs.c.competition_id, jobs.c.expected_time, jobs.c.time_limit)
_PENDING_IN_ORDER = Prepared(
    select(jobs.c.seq, *_DECLARED).where(jobs.c.state == literal_column(f"'{states.PENDING}'")).order_by(jobs.c.seq)
)
_FIRST_PENDING = (
    select(*(jobs.c.seq, jobs.c.job_id, jobs.c.user_id, jobs.c.competition_id, jobs.c.created_at, jobs.c.expected_time))
    .where(jobs.c.state == states.PENDING)
    .order_by(jobs.c.seq)
    .limit(bindparam("most"))
)
_RUNNING_JOBS = select(jobs.c.node_id, jobs.c.started_at, *_DECLARED).where(jobs.c.state == states.RUNNING)
_LAST_ENDED = (
    select(jobs.c.started_at, jobs.c.completed_at, *_DECLARED)
    .where(
        jobs.c.state.in_((states.COMPLETED, states.FAILED)),
        jobs.c.started_at.is_not(None),
        jobs.c.failure_reason.is_(None) | jobs.c.failure_reason.in_(states.USER_FAILURES),
    )
    .order_by((jobs.c.seq).desc())
    .limit(LEARNED_AT_START)
)
