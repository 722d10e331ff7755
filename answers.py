"""Rows and records as the dicts that are sent. Pure.

May import `clock`, `states`, `estimates`, `nodes`, `queue_manager`.
"""

from __future__ import annotations

from typing import Any

import clock
import states
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
        reason = f": {record.why}" if record is not None and record.why else ""
        answer["message"] = f"The node is out of reach; the job goes on there{reason}"
    elif row.started_at is None:
        answer["message"] = f"Starting on {row.node_id}."
    else:
        answer["message"] = f"Running on {row.node_id}."


def job_event(row: Any) -> dict[str, Any]:
    """`schemas.JobEvent`."""
    return {
        "time": clock.iso(row.at),
        "event": row.event,
        "from_status": row.from_state,
        "to_status": row.to_state,
        "actor": row.actor,
        "node_id": row.node_id,
        "attempt": row.attempt,
        "epoch": row.epoch,
        "reason": row.reason,
        "message": row.message,
        "request_id": row.request_id,
    }


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
