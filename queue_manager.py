"""Every change of a job's state, and the questions about the queue.

Each change is one statement guarded by state and epoch, with its row in `job_events` in the same transaction; the
hints (wake a node, wake a waiter) go out after the commit. Nothing else writes to `jobs`, but for `backup.restore`,
which lifts all epochs of a database that no server works on.

May import `errors`, `states`, `clock`, `models`, `metrics`, `database`, `audit`, `wakeups`, `forecast`,
`estimates`.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, bindparam, case, delete, exists, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

import audit
import clock
import metrics
import states
from database import Database, Transaction
from errors import InvalidRequest, NotFound, TooManyRequests, Unprocessable
from estimates import Outlook, Range, RunTimes, remaining, starts, why_pending
from forecast import Forecast
from models import job_events, job_inputs, jobs, nodes
from wakeups import IdleNodes, JobWatch

LEASE_SECONDS = 60.0
MICROSECONDS = 1_000_000
RETRY_BACKOFF_BASE = 1.0
RETRY_BACKOFF_MOST = 60.0
CHEAP_VIEW = 0.002  # seconds of computing below which the queue is looked at anew after every change

LEARNED_AT_START = 5000  # last ended jobs that are looked at for how long jobs take

JobRow = Row[Any]


@dataclass(frozen=True)
class NewJob:
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
    """The queue at one moment (monotonic `taken`; `cost` is what it took to compute, both in seconds): forecasts by
    `seq`, the wait of a newcomer, how many wait and run; the ranges of the starts, the node that is free first and in
    how many seconds, and which nodes take no work."""

    taken: float
    cost: float
    forecasts: dict[int, Forecast]
    newcomer_wait: float | None
    pending: int
    running: int
    ranges: dict[int, Range] = field(default_factory=dict)
    newcomer: Range | None = None
    first_free: tuple[str, float] | None = None
    aside: str = ""


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
        self.growth = JobWatch()  # of output; told by whoever receives it
        self.idle = IdleNodes()
        self.owner = owner or uuid.uuid4().hex
        self._max_active_jobs = max_active_jobs
        self._max_infra_retries = max_infra_retries
        self._now = now
        self._random = rng or random.Random()
        self._view: QueueView | None = None
        self._view_stale = True
        self._view_lock = threading.Lock()
        self._run_times = RunTimes()
        self._learn_from_the_past()
        # Set by whoever knows the nodes: which take work, why others do not, how to tell a worker of a cancellation.
        self.usable_nodes: Callable[[], list[str]] = lambda: []
        self.nodes_aside: Callable[[], str] = lambda: ""
        self.cancel_hint: Callable[[str], None] = lambda node_id: None

    # -- transitions ----------------------------------------------------------------------------------------------

    def submit(self, new: NewJob) -> Callable[[Transaction], tuple[JobRow, bool]]:
        """A write that queues the job: (row, True), or (row, False) when the idempotency key is known already.

        Raises TooManyRequests when the user has MAX_ACTIVE_JOBS pending or running jobs, Unprocessable when the key
        was used for another submission.
        """
        job_id = str(uuid.uuid4())

        def write(transaction: Transaction) -> tuple[JobRow, bool]:
            connection = transaction.connection
            if new.idempotency_key is not None:
                known = self._by_key(transaction, new)
                if known is not None:
                    return known, False
            created = self._now()
            values = {
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
            row = None
            for slot in range(self._max_active_jobs):
                # The unique index over (user, slot) is the limit; a taken place inserts nothing.
                row = connection.execute(_INSERT_JOB, {**values, "slot": slot}).first()
                if row is not None:
                    break
            if row is None:
                raise self._limit_reached(connection, new.user_id, created)
            connection.execute(
                insert(job_inputs), {"job_seq": row.seq, "config": json.dumps(new.config), "code": new.code}
            )
            self._event(
                transaction, row, "submitted", None, states.PENDING, f"user:{new.user_id}", request_id=new.request_id
            )
            transaction.after_commit(self._job_available)
            return row, True

        return write

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

    def _by_key(self, transaction: Transaction, new: NewJob) -> JobRow | None:
        row = transaction.connection.execute(
            select(jobs).where(jobs.c.user_id == new.user_id, jobs.c.idempotency_key == new.idempotency_key)
        ).first()
        if row is not None and bytes(row.request_digest) != new.request_digest:
            raise Unprocessable(
                "This Idempotency-Key was used for another submission; use a new key for a new job.",
            )
        return row

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
            drained = exists().where(nodes.c.node_id == node_id, nodes.c.drained_at.is_not(None))
            eligible = and_(jobs.c.state == states.PENDING, jobs.c.not_before <= now, ~drained)
            if not take_avoided:
                eligible = and_(eligible, (jobs.c.avoid_node.is_(None)) | (jobs.c.avoid_node != node_id))
            first = select(jobs.c.seq).where(eligible).order_by(jobs.c.seq).limit(1).scalar_subquery()
            row = transaction.connection.execute(
                update(jobs)
                .where(jobs.c.seq == first, jobs.c.state == states.PENDING)
                .values(
                    state=states.RUNNING,
                    node_id=node_id,
                    node_address=node_address,
                    boot_id=None,
                    node_lease=None,
                    owner=self.owner,
                    epoch=jobs.c.epoch + 1,
                    attempt=jobs.c.attempt + 1,
                    lease_expires_at=now + int(LEASE_SECONDS * MICROSECONDS),
                    started_at=None,
                    message=None,
                )
                .returning(jobs)
            ).first()
            if row is None:
                return None
            self._event(transaction, row, "claimed", states.PENDING, states.RUNNING, f"node:{node_id}", node_id=node_id)
            self._hint(transaction, row.job_id)
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

    def launched(self, claim: Claim, boot_id: str) -> None:
        """Record that the job's first process has started. Does not wait for the commit: the job runs already."""
        started = self._now()

        def write(transaction: Transaction) -> bool:
            row = self._guarded_row(transaction, claim, {"started_at": started, "boot_id": boot_id})
            if row is None:
                return False
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
            self._hint(transaction, claim.job_id)
            return True

        self.database.send(write)

    def finish(self, claim: Claim, outcome: Outcome) -> bool:
        """Make the job final, once. False when the claim is void: then nothing was changed."""

        def write(transaction: Transaction) -> bool:
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
            self._hint(transaction, claim.job_id)
            return True

        return self.database.write(write)

    def requeue(self, claim: Claim, reason: str, message: str) -> str | None:
        """After an infrastructure failure: back to `pending` for another node, or final when retries are used up.

        The caller must know that the attempt cannot be alive. Returns the new state, None when the claim is void.
        """
        backoff = self._random.uniform(0, 1)

        def write(transaction: Transaction) -> str | None:
            current = transaction.connection.execute(
                select(jobs.c.cancel_requested_at, jobs.c.cancel_requested_by, jobs.c.infra_failures).where(
                    *self._still(claim)
                )
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
            self._hint(transaction, claim.job_id)
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
            row = self._guarded_row(
                transaction,
                claim,
                {
                    "state": case((asked, states.CANCELLED), else_=states.PENDING),
                    "completed_at": case((asked, self._now()), else_=None),
                    "message": case((asked, CANCELLED_BEFORE_START), else_=jobs.c.message),
                    "lease_expires_at": None,
                    "owner": None,
                    "node_id": None,
                    "started_at": None,
                    "avoid_node": claim.node_id,
                },
            )
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
            self._hint(transaction, claim.job_id)
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
            self._hint(transaction, job_id)
            return (CANCELLED_NOW if row.state == states.CANCELLED else CANCEL_REQUESTED), row

        return write

    def note(self, claim: Claim, event: str, message: str) -> None:
        """Add an event to the job's story that changes no state (`unreachable`, `reachable`, …)."""

        def write(transaction: Transaction) -> None:
            row = transaction.connection.execute(select(jobs).where(*self._still(claim))).first()
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
                self._hint(transaction, claim.job_id)

        self.database.send(write)

    # -- pieces of the above ---------------------------------------------------------------------------------------

    def _still(self, claim: Claim) -> tuple[Any, ...]:
        return (
            jobs.c.seq == claim.seq,
            jobs.c.epoch == claim.epoch,
            jobs.c.owner == self.owner,
            jobs.c.state == states.RUNNING,
        )

    def _guarded_row(self, transaction: Transaction, claim: Claim, values: dict[str, Any]) -> JobRow | None:
        statement = update(jobs).where(*self._still(claim)).values(**values).returning(jobs)
        return transaction.connection.execute(statement).first()

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
        transaction.connection.execute(
            _INSERT_EVENT,
            {
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
            },
        )
        transaction.after_commit(lambda: metrics.job_event(event, to_state, reason, row))

    def _with_inputs(self, transaction: Transaction, row: JobRow) -> Claim:
        inputs = transaction.connection.execute(
            select(job_inputs.c.config, job_inputs.c.code).where(job_inputs.c.job_seq == row.seq)
        ).one()
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
        failed = outcome.state == states.FAILED
        column = {
            states.COMPLETED: nodes.c.jobs_completed,
            states.FAILED: nodes.c.jobs_failed,
            states.CANCELLED: nodes.c.jobs_cancelled,
        }[outcome.state]
        self._bump_node(
            transaction,
            node_id,
            {
                column.name: column + 1,
                "consecutive_infra_failures": 0,
                "consecutive_failed_jobs": nodes.c.consecutive_failed_jobs + 1 if failed else 0,
                "last_job_at": outcome.completed_at,
            },
        )

    def _count_infra_failure(self, transaction: Transaction, node_id: str) -> None:
        self._bump_node(
            transaction,
            node_id,
            {
                "infra_failures": nodes.c.infra_failures + 1,
                "consecutive_infra_failures": nodes.c.consecutive_infra_failures + 1,
            },
        )

    def _bump_node(self, transaction: Transaction, node_id: str, values: dict[str, Any]) -> None:
        statement = update(nodes).where(nodes.c.node_id == node_id).values(**values)
        if transaction.connection.execute(statement).rowcount == 0:
            transaction.connection.execute(insert(nodes), {"node_id": node_id})
            transaction.connection.execute(statement)

    def _hint(self, transaction: Transaction, job_id: str) -> None:
        def hint() -> None:
            self._view_stale = True
            self.watch.changed(job_id)

        transaction.after_commit(hint)

    def nodes_changed(self) -> None:
        """Tell that a node came, went or was freed: estimates are computed anew."""
        self._view_stale = True

    def _offer_later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._job_available)
        timer.daemon = True
        timer.start()

    def _job_available(self) -> None:
        self._view_stale = True
        self.idle.offer()

    def pass_on(self, node_id: str, claimed: bool) -> None:
        """After the node looked for work: wake another one for what it left over.

        A wake-up can reach a node that is about to take another job, or one that must not take the job at hand.
        """
        statement = select(jobs.c.seq).where(jobs.c.state == states.PENDING, jobs.c.not_before <= self._now()).limit(1)
        if not claimed:
            statement = statement.where(jobs.c.avoid_node == node_id)
        with self.database.reading() as connection:
            left_over = connection.execute(statement).first() is not None
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
            self._bump_node(
                transaction,
                node_id,
                {"drained_at": self._now() if drained else None, "drained_by": actor if drained else None},
            )

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
            return connection.execute(_JOB_BY_ID, {"wanted": job_id}).first()

    def job_by_key(self, user_id: str, key: str) -> JobRow | None:
        """The job that the user submitted with this idempotency key, or None."""
        with self.database.reading() as connection:
            return connection.execute(
                select(jobs).where(jobs.c.user_id == user_id, jobs.c.idempotency_key == key)
            ).first()

    def events(self, seq: int) -> list[Row[Any]]:
        """The job's events, oldest first."""
        with self.database.reading() as connection:
            statement = select(job_events).where(job_events.c.job_seq == seq).order_by(job_events.c.id)
            return list(connection.execute(statement))

    def jobs_page(
        self, *, filters: dict[str, str], before_seq: int | None, limit: int, states_in: tuple[str, ...] = ()
    ) -> list[JobRow]:
        """Jobs that match, newest first, with `seq` below `before_seq`; at most `limit`."""
        # A user has few active jobs and maybe many others: sorting the few is less than passing by all others, which
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
        """Positions and estimates of all pending jobs, computed again only after a change or a second.

        A long queue costs milliseconds to compute, so computing is kept below a twentieth of the time; a short one
        costs less than the request that asks, and is always as it is now.
        """
        with self._view_lock:
            view = self._view
            if view is not None:
                age = time.monotonic() - view.taken
                settled = 1.0 if not self._view_stale else 20 * view.cost if view.cost > CHEAP_VIEW else 0.0
                if age < settled:
                    return view
            self._view_stale = False
            self._view = self._compute_view()
            return self._view

    def place(self, row: JobRow) -> tuple[QueueView, Forecast]:
        """The view, and the place of a pending job in it: last when the view is older than the job."""
        view = self.view()
        found = view.forecasts.get(row.seq)
        return view, found or Forecast(view.pending + 1, view.newcomer_wait)

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
        view, found = self.place(row)
        start = view.ranges.get(row.seq, view.newcomer)
        finish = None
        if start is not None:
            finish = Range(start.low + run.low, start.likely + run.likely, start.high + run.high)
        why = why_pending(
            found.position,
            start,
            view.first_free,
            view.aside,
            retry_in=(row.not_before - now) / MICROSECONDS,
            avoid_node=row.avoid_node,
        )
        return Outlook(found.position, start, finish, why)

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
            pending = [(row.seq, self._run_times.seconds(*row[1:])) for row in connection.execute(_PENDING_IN_ORDER)]
            running = list(connection.execute(_RUNNING_JOBS))
        free_in = dict.fromkeys(usable, Range(0.0, 0.0, 0.0))
        for row in running:
            if row.node_id in usable:
                running_for = (now - row.started_at) / MICROSECONDS if row.started_at is not None else 0.0
                run = self._run_times.seconds(row.user_id, row.competition_id, row.expected_time, row.time_limit)
                free_in[row.node_id] = remaining(run, row.time_limit, max(0.0, running_for))
        found = starts(pending, free_in.values())
        first = min(((free.likely, node_id) for node_id, free in free_in.items()), default=None)
        return QueueView(
            time.monotonic(),
            time.thread_time() - began,
            found.forecasts,
            found.newcomer.likely if found.newcomer is not None else None,
            len(pending),
            len(running),
            found.ranges,
            found.newcomer,
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


_INSERT_JOB = sqlite_insert(jobs).on_conflict_do_nothing().returning(jobs)
_INSERT_EVENT = insert(job_events)
_JOB_BY_ID = select(jobs).where(jobs.c.job_id == bindparam("wanted"))
_DECLARED = (jobs.c.user_id, jobs.c.competition_id, jobs.c.expected_time, jobs.c.time_limit)
_PENDING_IN_ORDER = select(jobs.c.seq, *_DECLARED).where(jobs.c.state == states.PENDING).order_by(jobs.c.seq)
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
