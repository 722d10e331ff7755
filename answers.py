"""Rows and records as the dicts that are sent. Pure.

May import `clock`, `states`, `forecast`, `nodes`, `queue_manager`.
"""

from __future__ import annotations

from typing import Any

import clock
import states
from forecast import Forecast
from nodes import NodeRecord, NodeRegistry
from queue_manager import MICROSECONDS, JobRow, QueueView


def _in_seconds(now: int, seconds: float | None) -> str | None:
    return clock.iso(now + int(seconds * MICROSECONDS)) if seconds is not None else None


def job_status(row: JobRow, registry: NodeRegistry, place: Forecast | None, now: int) -> dict[str, Any]:
    """`schemas.JobStatus`. `place` is the forecast of a pending job."""
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
        "estimated_finish": None,
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
    if row.state == states.PENDING:
        _pending(answer, row, place, now)
    elif row.state == states.RUNNING:
        _running(answer, row, registry, now)
    return answer


def _pending(answer: dict[str, Any], row: JobRow, found: Forecast | None, now: int) -> None:
    if found is None:
        answer["message"] = row.message or "Waiting for a node."
        return
    answer["queue_position"] = found.position
    answer["estimated_start"] = _in_seconds(now, found.starts_in)
    if found.starts_in is not None:
        answer["estimated_finish"] = _in_seconds(now, found.starts_in + row.expected_time)
        ahead = "next" if found.position == 1 else f"{found.position - 1} ahead"
        text = f"Waiting for a node: {ahead}, expected to start in about {max(0, round(found.starts_in))} s."
    else:
        text = "Waiting: no node takes jobs at the moment."
    answer["message"] = f"{row.message} {text}" if row.message else text


def _running(answer: dict[str, Any], row: JobRow, registry: NodeRegistry, now: int) -> None:
    record = registry.get(row.node_id)
    reachable = record is not None and record.connected
    answer["node_reachable"] = reachable
    if row.started_at is not None:
        finish = row.started_at + int(row.expected_time * MICROSECONDS)
        if finish < now:
            finish = row.started_at + int(row.time_limit * MICROSECONDS)
        answer["estimated_finish"] = clock.iso(finish)
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
