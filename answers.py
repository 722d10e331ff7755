"""Rows and records as the dicts that are sent. Pure.

May import `clock`, `states`, `estimates`, `auth`, `nodes`, `queue_manager`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import clock
import states
from auth import Caller
from estimates import Outlook, Range
from nodes import NodeRecord, NodeRegistry
from queue_manager import MICROSECONDS, JobRow, QueueView


def _in_seconds(now: int, seconds: float) -> str | None:
    return clock.iso(now + int(seconds * MICROSECONDS))


def _estimate(answer: dict[str, Any], name: str, found: Range | None, now: int) -> None:
    """`name`, and `name_range` beside it."""
    if found is not None:
        answer[name] = _in_seconds(now, found.likely)
        answer[f"{name}_range"] = {"earliest": _in_seconds(now, found.low), "latest": _in_seconds(now, found.high)}


def job_status(row: JobRow, registry: NodeRegistry, outlook: Outlook | None, now: int) -> dict[str, Any]:
    """`schemas.JobStatus`. `outlook` is None for an ended job."""
    answer: dict[str, Any] = {
        "job_id": row.job_id,
        "user_id": row.user_id,
        "competition_id": row.competition_id,
        "project_id": row.project_id,
        "status": row.state,
        "node_id": row.node_id,
        "node_reachable": None,
        "queue_position": None,
        "estimated_start": None,
        "estimated_start_range": None,
        "estimated_finish": None,
        "estimated_finish_range": None,
        "expected_time": row.expected_time,
        "created_at": clock.iso(row.created_at),
        "started_at": clock.iso(row.started_at),
        "completed_at": clock.iso(row.completed_at),
        "cancel_requested_at": clock.iso(row.cancel_requested_at),
        "attempt": row.attempt,
        "exit_code": row.exit_code,
        "signal": row.signal,
        "failure_reason": row.failure_reason,
        "message": row.message or "",
    }
    if outlook is None:
        return answer
    _estimate(answer, "estimated_start", outlook.start, now)
    _estimate(answer, "estimated_finish", outlook.finish, now)
    if row.state == states.PENDING:
        _pending(answer, row, outlook)
    else:
        _running(answer, row, registry)
    return answer


def _pending(answer: dict[str, Any], row: JobRow, found: Outlook) -> None:
    answer["queue_position"] = found.position
    answer["message"] = f"{row.message} {found.why}" if row.message else found.why


def _running(answer: dict[str, Any], row: JobRow, registry: NodeRegistry) -> None:
    record = registry.get(row.node_id)
    reachable = record is not None and record.connected
    answer["node_reachable"] = reachable
    if row.cancel_requested_at is not None:
        answer["message"] = "Being cancelled." if reachable else "Will be cancelled when its node is back."
    elif not reachable:
        reason = f": {record.reason}" if record is not None and record.reason else ""
        answer["message"] = f"The node is out of reach; the job goes on there{reason}"
    elif row.started_at is None:
        answer["message"] = f"Starting on {row.node_id}."
    else:
        answer["message"] = f"Running on {row.node_id}."


def job_event(row: Any, caller: Caller) -> dict[str, Any]:
    """`schemas.JobEvent`; of other people, admins among them, only admins learn the names."""
    role, _, name = row.actor.partition(":")
    named = caller.is_admin or role not in ("user", "admin") or name == caller.user_id
    return {
        "time": clock.iso(row.at),
        "event": row.event,
        "from_status": row.from_state,
        "to_status": row.to_state,
        "actor": row.actor if named else role,
        "node_id": row.node_id,
        "attempt": row.attempt,
        "epoch": row.epoch,
        "reason": row.reason,
        "message": row.message,
        "request_id": row.request_id,
    }


def user_entry(token: Any, found: dict[str, Any], now: int) -> dict[str, Any]:
    """`schemas.UserEntry`. `token` is the row that counts, `found` what `QueueManager.jobs_of` says of the user."""
    counts = {state: found.get("counts", {}).get(state, 0) for state in states.JOB_STATES}
    state = "active" if token.expires_at > now else "expired"
    return {
        "user_id": token.user_id,
        "is_admin": bool(token.is_admin),
        "token_state": state if token.revoked_at is None else "revoked",
        "token_created_at": clock.iso(token.created_at),
        "token_expires_at": clock.iso(token.expires_at),
        "token_last_used_at": clock.iso(token.last_used_at),
        "active_jobs": counts[states.PENDING] + counts[states.RUNNING],
        "jobs_total": sum(counts.values()),
        "jobs": counts,
        "last_job_at": clock.iso(found.get("last")),
    }


def transition(job_id: str, row: Any, caller: Caller) -> dict[str, Any]:
    """A step of a job's life for who follows its status: `schemas.JobEvent`, the job, and its new status if any."""
    status = {"status": row.to_state} if row.to_state is not None else {}
    return {"job_id": job_id, **status, **job_event(row, caller)}


def node_info(record: NodeRecord, *, for_admin: bool, user_id: str | None = None) -> dict[str, Any]:
    """`schemas.NodeInfo`; addresses, jobs and users are for admins only."""
    gpus = record.probe.gpus if record.probe is not None else []
    first = gpus[0] if gpus else None
    answer: dict[str, Any] = {
        "node_id": record.node_id,
        "status": record.status,
        "is_busy": record.job_id is not None,
        "since": clock.iso(record.since),
        "jobs_completed": record.jobs_completed,
        "jobs_failed": record.jobs_failed,
        "jobs_cancelled": record.jobs_cancelled,
        "infra_failures": record.infra_failures,
        "gpu_model": first.name if first else None,
        "gpu_memory_total_mib": first.memory_total_mib if first else None,
        "gpu_memory_used_mib": first.memory_used_mib if first else None,
        "gpu_utilization": first.utilization if first else None,
        "gpu_temperature": first.temperature if first else None,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "memory_total_mib": gpu.memory_total_mib,
                "memory_used_mib": gpu.memory_used_mib,
                "utilization": gpu.utilization,
                "temperature": gpu.temperature,
            }
            for gpu in gpus
        ],
    }
    if for_admin:
        answer["address"] = record.address
        answer["reason"] = record.why
        answer["job_id"] = record.job_id
        answer["user_id"] = user_id
        answer["sandbox"] = record.probe.sandbox_works if record.probe is not None else None
        answer["sandbox_start_ms"] = record.probe.sandbox_start_ms if record.probe is not None else None
        answer["seccomp"] = record.probe.seccomp_works if record.probe is not None else None
        answer["memory_limit"] = record.probe.memory_limit_works if record.probe is not None else None
        answer["foreign_processes"] = [
            {name: process.get(name) for name in ("pid", "name", "gpu_uuid", "memory_mib")}
            for process in record.foreign_processes
        ]
        answer["free_bytes"] = record.probe.free_bytes if record.probe is not None else None
    return answer


def queue_information(view: QueueView) -> dict[str, Any]:
    """`schemas.QueueInformation`."""
    wait = view.newcomer_wait
    return {
        "queue_length": view.pending,
        "running_jobs": view.running,
        "expected_wait": round(wait, 3) if wait is not None else None,
    }


class QueuePage:
    """`schemas.QueueList`: the first pending jobs, as each caller may see them.

    What is the same for all regular users is made once, however many ask. Whose a job is, its owner and admins see.
    """

    def __init__(self, view: QueueView, rows: Sequence[JobRow], now: int) -> None:
        self.rows = rows
        self.taken = view.taken
        # Jobs that came since the view was made are in the list already.
        self.pending = max(view.pending, len(rows))
        self.running = view.running
        self.wait = view.newcomer_wait
        self.starts = [view.start_of(row.seq) for row in rows]
        # The same moment for as long as the view is the same, so that nothing seems to move when nothing has changed.
        self._taken_at = now - int((time.monotonic() - view.taken) * MICROSECONDS)
        self._own: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            self._own.setdefault(row.user_id, []).append(index)
        self._shared: dict[bool, list[bytes]] = {}
        self._whole: dict[bool, bytes] = {}

    def owns(self, user_id: str) -> bool:
        """Whether the user has a job in the list."""
        return user_id in self._own

    def body(self, user_id: str, *, is_admin: bool) -> bytes:
        """The answer as JSON. Who has no job in the list shares one object with all others like him."""
        own = self._own.get(user_id, ())
        if is_admin not in self._whole:
            entries = [self._entry(index, mine=False, full=is_admin) for index in range(len(self.rows))]
            self._shared[is_admin] = entries
            self._whole[is_admin] = self._put_together(entries)
        if not own:
            return self._whole[is_admin]
        entries = list(self._shared[is_admin])
        for index in own:
            entries[index] = self._entry(index, mine=True, full=True)
        return self._put_together(entries)

    def is_of(self, view: QueueView, rows: Sequence[JobRow]) -> bool:
        """Whether a page made of these would be the same."""
        mine = (self.taken, self.pending, self.running, self.wait, [row.seq for row in self.rows])
        pending = max(view.pending, len(rows))
        return mine == (view.taken, pending, view.running, view.newcomer_wait, [row.seq for row in rows])

    def _entry(self, index: int, *, mine: bool, full: bool) -> bytes:
        row = self.rows[index]
        entry: dict[str, Any] = {
            "position": index + 1,
            "mine": mine,
            "estimated_start": None,
            "estimated_start_range": None,
            "expected_time": row.expected_time if full else None,
            "job_id": row.job_id if full else None,
            "user_id": row.user_id if full else None,
            "competition_id": row.competition_id if full else None,
            "created_at": clock.iso(row.created_at) if full else None,
        }
        _estimate(entry, "estimated_start", self.starts[index], self._taken_at)
        return json.dumps(entry, separators=(",", ":")).encode()

    def _put_together(self, entries: list[bytes]) -> bytes:
        head = {
            "queue_length": self.pending,
            "running": self.running,
            "expected_wait_seconds": round(self.wait, 3) if self.wait is not None else None,
        }
        start = json.dumps(head, separators=(",", ":"))[:-1]
        return b'%s,"entries":[%s]}' % (start.encode(), b",".join(entries))
