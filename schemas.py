"""What the HTTP interface takes and answers, as models for the OpenAPI description. May import `states`, `auth`.

Answers are built as plain dicts (see `answers`), because validating what we made ourselves costs time on every request;
tests and schemathesis hold them against these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

import states
from auth import ID_PATTERN, MAX_TOKEN_LENGTH

Time = Annotated[str, Field(description="ISO 8601 in UTC with Z", examples=["2026-11-23T12:00:00.000000Z"])]
JobId = Annotated[str, Field(examples=["0b8e2a52-8c1e-4a3e-9a53-0e6f7f2f6c11"])]
JobState = Literal["pending", "running", "completed", "failed", "cancelled"]
NodeState = Literal["online", "busy", "offline", "draining", "quarantined"]
FailureReason = Literal[
    "exit_code",
    "signal",
    "timeout",
    "memory_exceeded",
    "results_missing",
    "results_invalid",
    "results_too_large",
    "node_lost",
    "launch_failed",
    "node_disk_full",
    "gpu_fault",
]
assert set(FailureReason.__args__) == set(states.FAILURE_REASONS)  # type: ignore[attr-defined]
assert set(JobState.__args__) == set(states.JOB_STATES)  # type: ignore[attr-defined]
assert set(NodeState.__args__) == set(states.NODE_STATES)  # type: ignore[attr-defined]


_JOB_ID = "0b8e2a52-8c1e-4a3e-9a53-0e6f7f2f6c11"
_PENDING: dict[str, Any] = {
    "job_id": _JOB_ID,
    "user_id": "alice",
    "competition_id": "demo",
    "project_id": "baseline",
    "status": "pending",
    "node_id": None,
    "node_reachable": None,
    "queue_position": 1,
    "estimated_start": "2026-11-23T12:00:42.000000Z",
    "estimated_start_range": {"earliest": "2026-11-23T12:00:20.000000Z", "latest": "2026-11-23T12:01:05.000000Z"},
    "estimated_finish": "2026-11-23T12:01:42.000000Z",
    "estimated_finish_range": {"earliest": "2026-11-23T12:00:50.000000Z", "latest": "2026-11-23T12:02:15.000000Z"},
    "expected_time": 60.0,
    "created_at": "2026-11-23T12:00:00.000000Z",
    "started_at": None,
    "completed_at": None,
    "cancel_requested_at": None,
    "attempt": 0,
    "exit_code": None,
    "signal": None,
    "failure_reason": None,
    "message": "Waiting for a node: next; node-3 is free first, in about 42 s; of 8 nodes 1 drained; "
    "expected to start in about 42 s (20 s to 65 s).",
}
_RUNNING: dict[str, Any] = {
    **_PENDING,
    "status": "running",
    "node_id": "node-3",
    "node_reachable": True,
    "queue_position": None,
    "estimated_start": None,
    "estimated_start_range": None,
    "started_at": "2026-11-23T12:00:40.500000Z",
    "estimated_finish": "2026-11-23T12:01:40.500000Z",
    "attempt": 1,
    "message": "Running on node-3.",
}
_ENDED: dict[str, Any] = {
    **_RUNNING,
    "status": "completed",
    "node_reachable": None,
    "estimated_finish": None,
    "estimated_finish_range": None,
    "completed_at": "2026-11-23T12:01:12.250000Z",
    "exit_code": 0,
    "message": "Completed.",
}
_QUEUE: dict[str, Any] = {"queue_length": 1, "running_jobs": 1, "expected_wait": 32.5}
_GPU: dict[str, Any] = {
    "index": 0,
    "name": "NVIDIA A100-SXM4-80GB",
    "memory_total_mib": 81920,
    "memory_used_mib": 4096,
    "utilization": 97,
    "temperature": 61,
}
_NODE: dict[str, Any] = {
    "node_id": "node-3",
    "status": "busy",
    "is_busy": True,
    "since": "2026-11-23T12:00:40.450000Z",
    "jobs_completed": 128,
    "jobs_failed": 4,
    "jobs_cancelled": 1,
    "infra_failures": 0,
    "gpu_model": "NVIDIA A100-SXM4-80GB",
    "gpu_memory_total_mib": 81920,
    "gpu_memory_used_mib": 4096,
    "gpu_utilization": 97,
    "gpu_temperature": 61,
    "gpus": [_GPU],
}


def _example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="allow", json_schema_extra={"examples": [value]})


class JobConfig(BaseModel):
    """What `config_file` holds, as JSON or YAML. `submission` checks it; here it is only described."""

    model_config = _example(
        {
            "competition_id": "demo",
            "project_id": "baseline",
            "user_id": "alice",
            "expected_time": 60,
            "token": "alice_token",
        }
    )

    competition_id: Annotated[str, Field(pattern=ID_PATTERN)]
    project_id: Annotated[str, Field(pattern=ID_PATTERN)]
    user_id: Annotated[str, Field(pattern=ID_PATTERN, description="The user whom the token belongs to.")]
    expected_time: Annotated[float, Field(ge=1, le=86400, description="Seconds, at most MAX_EXPECTED_TIME.")]
    token: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=MAX_TOKEN_LENGTH,
            description="May be left out when the Authorization header has it; given twice, both must agree.",
        ),
    ] = None


class Answer(BaseModel):
    """Base of all answers: fields may be added in later versions, never renamed."""

    model_config = ConfigDict(extra="allow")


class Problem(Answer):
    """An error, as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] | None = None
    request_id: str


class FieldProblem(BaseModel):
    """One wrong field."""

    field: str
    message: str


class TimeRange(Answer):
    """When something will hardly be earlier, and hardly later."""

    earliest: Time
    latest: Time


class JobStatus(Answer):
    """State of a job. `queue_position` and `estimated_start` are set while it waits."""

    model_config = _example(_RUNNING)

    job_id: JobId
    user_id: str
    competition_id: str
    project_id: str
    status: JobState
    node_id: str | None
    node_reachable: bool | None
    queue_position: int | None
    estimated_start: Time | None
    estimated_start_range: TimeRange | None
    estimated_finish: Time | None
    estimated_finish_range: TimeRange | None
    expected_time: float
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    cancel_requested_at: Time | None
    attempt: int
    exit_code: int | None
    signal: int | None
    failure_reason: FailureReason | None
    message: str


class JobResults(JobStatus):
    """An ended job with everything it printed and the records it wrote."""

    model_config = _example(
        {
            **_ENDED,
            "stdout": "epoch 1: loss 0.71\n",
            "stderr": "",
            "stdout_truncated": False,
            "stderr_truncated": False,
            "result_file": "alice_demo_20261123_120112.jsonl",
            "result_sha256": "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0",
            "results": [{"score": 0.93}],
        }
    )

    stdout: str
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    result_file: str | None
    result_sha256: str | None
    results: list[dict[str, Any]]


class SubmitAnswer(JobStatus):
    """The job just queued; with `wait`, once it has ended, also what `/api/results` gives."""

    model_config = _example(_PENDING)

    stdout: str | None = None
    stderr: str | None = None
    results: list[dict[str, Any]] | None = None


class JobPage(Answer):
    """Jobs, newest first; `next_cursor` is null on the last page."""

    model_config = _example({"jobs": [_RUNNING], "next_cursor": "c2VxOjQ3MTE"})

    jobs: list[JobStatus]
    next_cursor: str | None


class JobEvent(Answer):
    """One step of a job's life."""

    time: Time
    event: str
    from_status: JobState | None
    to_status: JobState | None
    actor: str
    node_id: str | None
    attempt: int
    epoch: int
    reason: str | None
    message: str | None
    request_id: str | None


class JobEvents(Answer):
    """The audit trail of a job, oldest first."""

    model_config = _example(
        {
            "job_id": _JOB_ID,
            "events": [
                {
                    "time": "2026-11-23T12:00:00.000000Z",
                    "event": "submitted",
                    "from_status": None,
                    "to_status": "pending",
                    "actor": "user:alice",
                    "node_id": None,
                    "attempt": 0,
                    "epoch": 0,
                    "reason": None,
                    "message": None,
                    "request_id": "5f0c9f7d2a4b4f0e",
                }
            ],
        }
    )

    job_id: JobId
    events: list[JobEvent]


class GpuInfo(Answer):
    """One GPU; memory in MiB, utilisation in percent, temperature in °C."""

    index: int
    name: str | None
    memory_total_mib: int | None
    memory_used_mib: int | None
    utilization: int | None
    temperature: int | None


class NodeInfo(Answer):
    """One node. Admins also see `address`, `job_id`, `user_id`, `reason`, `foreign_processes` (on its GPUs), and how
    jobs are contained there: `sandbox`, `sandbox_start_ms`, `seccomp`, `memory_limit`."""

    node_id: str
    status: NodeState
    is_busy: bool
    since: Time
    jobs_completed: int
    jobs_failed: int
    jobs_cancelled: int
    gpu_model: str | None
    gpu_memory_total_mib: int | None
    gpu_memory_used_mib: int | None
    gpu_utilization: int | None
    gpu_temperature: int | None
    gpus: list[GpuInfo]


class NodeList(Answer):
    """All nodes and the queue before them; `expected_wait` in seconds, null when no node takes jobs."""

    model_config = _example({"nodes": [_NODE], **_QUEUE})

    nodes: list[NodeInfo]
    queue_length: int
    running_jobs: int
    expected_wait: float | None


class QueueInformation(Answer):
    """The queue as a whole."""

    queue_length: int
    running_jobs: int
    expected_wait: float | None


class Dashboard(Answer):
    """One summary; `user_statistics` for admins only."""

    model_config = _example(
        {
            "timestamp": "2026-11-23T12:01:00.000000Z",
            "user_id": "alice",
            "is_admin": False,
            "job_statistics": {"total": 7, "pending": 0, "running": 1, "completed": 5, "failed": 1, "cancelled": 0},
            "user_statistics": None,
            "node_statistics": {"total": 8, "online": 7, "busy": 1, "offline": 0, "draining": 0, "quarantined": 0},
            "queue_information": _QUEUE,
            "active_jobs": [_RUNNING],
            "recent_jobs": [_RUNNING],
            "health_metrics": {
                "uptime_seconds": 86400.5,
                "usable_nodes": 8,
                "success_rate": 0.8333,
                "accepts_submissions": True,
            },
        }
    )

    timestamp: Time
    user_id: str
    is_admin: bool
    job_statistics: dict[str, int]
    user_statistics: list[dict[str, Any]] | None
    node_statistics: dict[str, int]
    queue_information: QueueInformation
    active_jobs: list[JobStatus]
    recent_jobs: list[JobStatus]
    health_metrics: dict[str, Any]


class QueueEntry(Answer):
    """One pending job. What would tell whose it is, is null in jobs of others, but for admins."""

    position: int
    mine: bool
    estimated_start: Time | None
    estimated_start_range: TimeRange | None
    expected_time: float | None
    job_id: JobId | None
    user_id: str | None
    competition_id: str | None
    created_at: Time | None


class QueueList(Answer):
    """The pending jobs in the order in which they will start; `expected_wait_seconds` is that of a job queued now."""

    model_config = _example(
        {
            "queue_length": 2,
            "running": 8,
            "expected_wait_seconds": 63.5,
            "entries": [
                {
                    "position": 1,
                    "mine": False,
                    "estimated_start": "2026-11-23T12:00:12.000000Z",
                    "estimated_start_range": {
                        "earliest": "2026-11-23T12:00:02.000000Z",
                        "latest": "2026-11-23T12:00:40.000000Z",
                    },
                    **dict.fromkeys(("expected_time", "job_id", "user_id", "competition_id", "created_at")),
                },
                {
                    "position": 2,
                    "mine": True,
                    **{
                        name: _PENDING[name]
                        for name in (
                            *("estimated_start", "estimated_start_range", "expected_time"),
                            *("job_id", "user_id", "competition_id", "created_at"),
                        )
                    },
                },
            ],
        }
    )

    queue_length: int
    running: int
    expected_wait_seconds: float | None
    entries: list[QueueEntry]


class CallerLimits(Answer):
    """What one submission, and one minute of them, may hold: counts, bytes, seconds."""

    submissions_per_minute: int
    max_code_bytes: int
    max_expected_time: float


class Whoami(Answer):
    """Who is calling, until when the token is valid, and the limits."""

    model_config = _example(
        {
            "user_id": "alice",
            "is_admin": False,
            "token_expires_at": "2026-12-23T12:00:00.000000Z",
            "max_active_jobs": 1,
            "limits": {"submissions_per_minute": 5, "max_code_bytes": 10485760, "max_expected_time": 86400.0},
        }
    )

    user_id: str
    is_admin: bool
    token_expires_at: Time
    max_active_jobs: int
    limits: CallerLimits


class History(Answer):
    """Series of the same length as `at`, null where the server was not there; means over a step, and counts in it."""

    model_config = _example(
        {
            "window": "day",
            "step_seconds": 300,
            "at": [1795435200, 1795435500],
            "queue_depth": [None, 3.4],
            "running": [None, 8.0],
            "utilization": [None, 1.0],
            "gpu_utilization": [None, 91.25],
            "wait_seconds": [None, 41.8],
            "completed": [None, 12],
            "failed": [None, 1],
            "cancelled": [None, 0],
        }
    )

    window: Literal["day", "week"]
    step_seconds: int
    at: Annotated[list[int], Field(description="Begin of each step, seconds since 1970.")]
    queue_depth: list[float | None]
    running: list[float | None]
    utilization: Annotated[list[float | None], Field(description="Busy ones of the usable nodes, 0 to 1.")]
    gpu_utilization: Annotated[list[float | None], Field(description="Percent.")]
    wait_seconds: Annotated[list[float | None], Field(description="Median wait of the jobs that started.")]
    completed: list[int | None]
    failed: list[int | None]
    cancelled: list[int | None]


class UserEntry(Answer):
    """One user who has, or had, a token; times of the active token, else of the last one."""

    user_id: str
    is_admin: bool
    token_state: Literal["active", "expired", "revoked"]
    token_created_at: Time
    token_expires_at: Time
    token_last_used_at: Time | None
    active_jobs: int
    jobs_total: int
    jobs: dict[JobState, int]
    last_job_at: Time | None


class UserPage(Answer):
    """Users in the order of their ids; `next_cursor` is null on the last page. No token, nor its digest, is in it."""

    model_config = _example(
        {
            "users": [
                {
                    "user_id": "alice",
                    "is_admin": False,
                    "token_state": "active",
                    "token_created_at": "2026-11-23T12:00:00.000000Z",
                    "token_expires_at": "2026-12-23T12:00:00.000000Z",
                    "token_last_used_at": "2026-11-23T12:00:40.000000Z",
                    "active_jobs": 1,
                    "jobs_total": 7,
                    "jobs": {"pending": 0, "running": 1, "completed": 5, "failed": 1, "cancelled": 0},
                    "last_job_at": "2026-11-23T12:00:00.000000Z",
                }
            ],
            "next_cursor": "dXNlcjphbGljZQ",
        }
    )

    users: list[UserEntry]
    next_cursor: str | None


class Service(Answer):
    """What this is and what it offers."""

    model_config = _example(
        {"service": "GPU job server", "version": "1.0.0", "endpoints": {"submit": "POST /api/submit"}}
    )

    service: str
    version: str
    endpoints: dict[str, str]


class Health(Answer):
    """The process answers."""

    model_config = _example({"status": "ok"})

    status: Literal["ok"]


class Readiness(Answer):
    """Whether submissions are taken, and everything an operator should know."""

    model_config = _example({"ready": True, "reasons": [], "warnings": []})

    ready: bool
    reasons: list[str]
    warnings: list[str]


class NodeChange(Answer):
    """The node after a drain or a resume."""

    model_config = _example(
        {
            "node_id": "node-3",
            "status": "draining",
            "message": "The node takes no further job; the running one finishes.",
        }
    )

    node_id: str
    status: NodeState
    message: str


class AuditEntry(Answer):
    """One act that others may ask about later."""

    time: Time
    actor: str
    action: str
    subject: str
    detail: str | None
    address: str | None
    request_id: str | None


class AuditPage(Answer):
    """Entries of the audit log, newest first; `next_cursor` is null on the last page."""

    model_config = _example(
        {
            "entries": [
                {
                    "time": "2026-11-23T12:00:00.000000Z",
                    "actor": "admin:root",
                    "action": "node_drained",
                    "subject": "node:node-3",
                    "detail": None,
                    "address": None,
                    "request_id": "5f0c9f7d2a4b4f0e",
                }
            ],
            "next_cursor": None,
        }
    )

    entries: list[AuditEntry]
    next_cursor: str | None


Problem.model_rebuild()


def put_examples(components: dict[str, Any]) -> None:
    """Put the models' examples into their schemas once more: FastAPI drops every null in them."""
    for name, schema in components.items():
        extra = getattr(globals().get(name), "model_config", {}).get("json_schema_extra")
        if extra is not None:
            schema.update(extra)
