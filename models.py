"""The tables, with the constraints and indexes that hold the invariants. No statements live here.

Instants are BIGINT microseconds since 1970 UTC (`clock.now_us`). Texts of state are literals from `states`.
The schema is made by `migrations/`; a test compares what the migrations build with what stands here.
May import only `states`.
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
    text,
)

import states

SCHEMA_REVISION = "0003"

# Every constraint has a name: Alembic's batch mode silently drops unnamed ones when it copies a table.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite gives only INTEGER PRIMARY KEY a rowid alias.
RowId = BigInteger().with_variant(Integer, "sqlite")


def _in(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


meta = Table(
    "meta",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("user_id", String(64), nullable=False),
    Column("is_admin", Boolean(create_constraint=False), nullable=False, server_default=text("0")),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Column("revoked_reason", String(16)),
    Column("last_used_at", BigInteger),
    CheckConstraint("expires_at > created_at", name="expires_later"),
    CheckConstraint("(revoked_at IS NULL) = (revoked_reason IS NULL)", name="revoked_has_reason"),
    # A digest is never removed, so a token string stays bound to its first user for ever.
    Index("uq_tokens_digest", "digest", unique=True),
    Index("ix_tokens_user", "user_id"),
    # One active token per user.
    Index(
        "uq_tokens_user_active",
        "user_id",
        unique=True,
        sqlite_where=text("revoked_at IS NULL"),
        postgresql_where=text("revoked_at IS NULL"),
    ),
)

_ACTIVE = _in("state", states.ACTIVE)
_RUNNING = f"state = '{states.RUNNING}'"
_PENDING = f"state = '{states.PENDING}'"

jobs = Table(
    "jobs",
    metadata,
    Column("seq", RowId, primary_key=True, autoincrement=True),
    Column("job_id", String(36), nullable=False),
    Column("user_id", String(64), nullable=False),
    Column("competition_id", String(64), nullable=False),
    Column("project_id", String(64), nullable=False),
    Column("expected_time", Float, nullable=False),
    Column("time_limit", Float, nullable=False),
    Column("state", String(16), nullable=False),
    # Which of the user's MAX_ACTIVE_JOBS places the job holds while it is pending or running.
    Column("slot", Integer, nullable=False),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("infra_failures", Integer, nullable=False, server_default=text("0")),
    Column("not_before", BigInteger, nullable=False, server_default=text("0")),
    Column("avoid_node", String(64)),
    Column("node_id", String(64)),
    Column("node_address", String(512)),
    Column("boot_id", String(64)),
    Column("owner", String(36)),
    Column("lease_expires_at", BigInteger),
    # Seconds for which the node lets the attempt live without hearing of a server; NULL: NODE_LOST_AFTER.
    Column("node_lease", Float),
    Column("cancel_requested_at", BigInteger),
    Column("cancel_requested_by", String(96)),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("exit_code", Integer),
    Column("signal", Integer),
    Column("failure_reason", String(32)),
    Column("message", Text),
    Column("stdout_bytes", BigInteger),
    Column("stderr_bytes", BigInteger),
    Column("stdout_truncated", Boolean(create_constraint=False)),
    Column("stderr_truncated", Boolean(create_constraint=False)),
    Column("result_file", String(255)),
    Column("result_bytes", BigInteger),
    Column("result_sha256", String(64)),
    Column("idempotency_key", String(255)),
    Column("request_digest", LargeBinary(32), nullable=False),
    Column("request_id", String(64), nullable=False),
    CheckConstraint(_in("state", states.JOB_STATES), name="state"),
    CheckConstraint(f"({_in('state', states.FINAL)}) = (completed_at IS NOT NULL)", name="ended_has_completed_at"),
    CheckConstraint(f"({_RUNNING}) = (lease_expires_at IS NOT NULL)", name="running_has_lease"),
    CheckConstraint(f"NOT ({_RUNNING}) OR (node_id IS NOT NULL AND owner IS NOT NULL)", name="running_has_node"),
    CheckConstraint(f"(state = '{states.FAILED}') = (failure_reason IS NOT NULL)", name="failed_has_reason"),
    CheckConstraint(
        f"failure_reason IS NULL OR {_in('failure_reason', states.FAILURE_REASONS)}", name="failure_reason"
    ),
    CheckConstraint("epoch >= attempt AND attempt >= 0 AND slot >= 0", name="counters"),
    Index("uq_jobs_job_id", "job_id", unique=True),
    Index(
        "uq_jobs_user_slot",
        "user_id",
        "slot",
        unique=True,
        sqlite_where=text(_ACTIVE),
        postgresql_where=text(_ACTIVE),
    ),
    Index("uq_jobs_node_running", "node_id", unique=True, sqlite_where=text(_RUNNING), postgresql_where=text(_RUNNING)),
    Index(
        "uq_jobs_idempotency",
        "user_id",
        "idempotency_key",
        unique=True,
        sqlite_where=text("idempotency_key IS NOT NULL"),
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index(
        "uq_jobs_result_file",
        "result_file",
        unique=True,
        sqlite_where=text("result_file IS NOT NULL"),
        postgresql_where=text("result_file IS NOT NULL"),
    ),
    Index("ix_jobs_pending", "seq", sqlite_where=text(_PENDING), postgresql_where=text(_PENDING)),
    Index("ix_jobs_running", "seq", sqlite_where=text(_RUNNING), postgresql_where=text(_RUNNING)),
    Index("ix_jobs_user_state", "user_id", "state", "seq"),
    Index("ix_jobs_user", "user_id", "seq"),
    Index("ix_jobs_state", "state", "seq"),
    Index("ix_jobs_competition", "competition_id", "seq"),
    Index("ix_jobs_project", "project_id", "seq"),
)

# The code and the config (without the token) of a job: beside the row, so that rows stay short to read, and in the
# same transaction, so that nothing can be orphaned. They become files when the job is dispatched.
job_inputs = Table(
    "job_inputs",
    metadata,
    Column("job_seq", RowId, ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True),
    Column("config", Text, nullable=False),
    Column("code", LargeBinary, nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("job_seq", RowId, ForeignKey("jobs.seq", ondelete="CASCADE"), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("event", String(32), nullable=False),
    Column("from_state", String(16)),
    Column("to_state", String(16)),
    Column("actor", String(96), nullable=False),
    Column("node_id", String(64)),
    Column("attempt", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("reason", String(32)),
    Column("message", Text),
    Column("request_id", String(64)),
    Index("ix_job_events_job", "job_seq", "id"),
)

# What must outlive a restart of what the server knows of a node.
nodes = Table(
    "nodes",
    metadata,
    Column("node_id", String(64), primary_key=True),
    Column("drained_at", BigInteger),
    Column("drained_by", String(96)),
    Column("jobs_completed", Integer, nullable=False, server_default=text("0")),
    Column("jobs_failed", Integer, nullable=False, server_default=text("0")),
    Column("jobs_cancelled", Integer, nullable=False, server_default=text("0")),
    Column("infra_failures", Integer, nullable=False, server_default=text("0")),
    Column("consecutive_infra_failures", Integer, nullable=False, server_default=text("0")),
    Column("consecutive_failed_jobs", Integer, nullable=False, server_default=text("0")),
    Column("last_job_at", BigInteger),
)

# The past for charts: a row for each five minutes in which the server ran, summed up as time passes; no user, no job.
# What is summed over `samples` looks, is divided by their number to be shown.
history = Table(
    "history",
    metadata,
    Column("at", BigInteger, primary_key=True, autoincrement=False),  # seconds since 1970 of the row's beginning
    Column("samples", Integer, nullable=False),
    Column("pending", BigInteger, nullable=False),
    Column("running", BigInteger, nullable=False),
    Column("busy", BigInteger, nullable=False),  # of the usable nodes
    Column("usable", BigInteger, nullable=False),
    Column("gpu_utilization", BigInteger, nullable=False),  # percent, of `gpu_samples` GPUs
    Column("gpu_samples", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("cancelled", BigInteger, nullable=False),
    Column("waits", Text, nullable=False),  # JSON: how many jobs waited how long, see `history`
    Column("last_event", BigInteger, nullable=False),  # the job_events that are counted in this row and those before
)

# Rows are only added: triggers, made by the migration, refuse UPDATE and DELETE.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(96), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(96), nullable=False),
    Column("detail", Text),
    Column("address", String(64)),
    Column("request_id", String(64)),
)
for _verb in ("UPDATE", "DELETE"):
    event.listen(
        audit_log,
        "after_create",
        DDL(  # type: ignore[no-untyped-call]
            f"CREATE TRIGGER audit_log_no_{_verb.lower()} BEFORE {_verb} ON audit_log "
            "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        ),
    )
