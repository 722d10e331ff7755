"""The routes of nodes, of the whole queue and of the service's health.

May import everything but `main`, `worker` and the concrete executors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import answers
import audit
import clock
import problems
import schemas
import states
from auth import Caller
from database import sqlite_version_warning
from errors import NotFound
from gauges import Gauges
from logs import about
from problems import described
from services import (
    BEARER,
    OPTIONAL_BEARER,
    AdminParam,
    CallerParam,
    CursorParam,
    NodeIdParam,
    Services,
    ServicesParam,
    Totals,
    make_cursor,
    optional_caller,
    read_cursor,
)

log = logging.getLogger("api")
TOTALS_KEPT = 20  # times as long as counting takes
_SCRAPED = '# HELP gpujobs_nodes Nodes by state.\n# TYPE gpujobs_nodes gauge\ngpujobs_nodes{state="online"} 8.0\n'
router = APIRouter()


# -- nodes and summaries -------------------------------------------------------------------------------------------


@router.get(
    "/api/nodes",
    tags=["nodes"],
    response_model=None,
    openapi_extra=OPTIONAL_BEARER,
    responses={200: {"model": schemas.NodeList}, **described(401, 429)},
)
async def nodes(services: ServicesParam, caller: Annotated[Caller | None, Depends(optional_caller)]) -> Response:
    """Every node and the length of the queue; an admin's token adds addresses, jobs and users."""
    return JSONResponse(nodes_body(services, for_admin=caller is not None and caller.is_admin))


def nodes_body(services: Services, *, for_admin: bool) -> dict[str, Any]:
    """`schemas.NodeList`."""
    records = services.registry.all()
    running = [record.job_id for record in records if record.job_id is not None] if for_admin else []
    owners = services.queue.owners(running) if running else {}
    listed = [
        answers.node_info(record, for_admin=for_admin, user_id=owners.get(record.job_id or "")) for record in records
    ]
    return {"nodes": listed, **answers.queue_information(services.queue.view())}


async def _set_drained(request: Request, services: Services, node_id: str, caller: Caller, drained: bool) -> Response:
    record = services.registry.get(node_id)
    if record is None:
        raise NotFound(f"There is no node {node_id[:80]}; GET /api/nodes lists them.")
    write = services.queue.set_drained(node_id, drained, caller.actor, problems.request_id(request))
    await services.database.write_async(write)
    services.registry.update(node_id, drained_by=caller.actor if drained else None)
    services.queue.nodes_changed()
    services.wake_node(node_id)
    about(node=node_id)
    log.info("%s %s %s", caller.actor, "drains" if drained else "resumes", node_id)
    if not drained:
        message = "The node takes jobs again."
    elif record.job_id is not None:
        message = "The node takes no further job; the running one finishes."
    else:
        message = "The node takes no further job."
    return JSONResponse({"node_id": node_id, "status": record.status, "message": message})


_NODE_CHANGE: dict[int | str, dict[str, Any]] = {
    200: {"model": schemas.NodeChange},
    **described(401, 403, 404, 422, 429, 503),
}


@router.post(
    "/api/admin/nodes/{node_id}/drain",
    tags=["nodes"],
    response_model=None,
    openapi_extra=BEARER,
    responses=_NODE_CHANGE,
)
async def drain(request: Request, node_id: NodeIdParam, caller: AdminParam, services: ServicesParam) -> Response:
    """Stop giving the node work; its running job finishes."""
    return await _set_drained(request, services, node_id, caller, True)


@router.post(
    "/api/admin/nodes/{node_id}/resume",
    tags=["nodes"],
    response_model=None,
    openapi_extra=BEARER,
    responses=_NODE_CHANGE,
)
async def resume(request: Request, node_id: NodeIdParam, caller: AdminParam, services: ServicesParam) -> Response:
    """Give the node work again."""
    return await _set_drained(request, services, node_id, caller, False)


@router.get(
    "/api/admin/audit",
    tags=["nodes"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.AuditPage}, **described(400, 401, 403, 422, 429)},
)
async def audit_log(
    caller: AdminParam,
    services: ServicesParam,
    limit: Annotated[int, Query(ge=1, le=500, examples=[50])] = 50,
    cursor: CursorParam = None,
) -> Response:
    """Who made and revoked tokens, drained nodes, cancelled other people's jobs, and was refused; newest first."""
    rows = audit.page(services.database, before_id=read_cursor(cursor), limit=limit + 1)
    more = len(rows) > limit
    entries = [audit.entry(row) for row in rows[:limit]]
    return JSONResponse({"entries": entries, "next_cursor": make_cursor(rows[limit - 1].id) if more else None})


def _node_statistics(services: Services) -> dict[str, int]:
    found = dict.fromkeys(states.NODE_STATES, 0)
    for record in services.registry.all():
        found[record.status] += 1
    return {"total": sum(found.values()), **found}


async def _totals(services: Services, caller: Caller) -> Totals:
    """Jobs by state, and for admins by user. Those take long with many jobs: they are counted in a thread, for at most
    a twentieth of the time, and what was counted last is the answer meanwhile."""
    if not caller.is_admin:
        return Totals(services.queue.counts(caller.user_id))
    async with services.counting:
        began = time.monotonic()
        if services.totals is None or began >= services.totals.good_until:
            found = await asyncio.to_thread(lambda: Totals(services.queue.counts(), services.queue.users()))
            now = time.monotonic()
            services.totals = replace(found, good_until=now + TOTALS_KEPT * (now - began))
        return services.totals


@router.get(
    "/api/dashboard",
    tags=["nodes"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.Dashboard}, **described(401, 429)},
)
async def dashboard(caller: CallerParam, services: ServicesParam) -> Response:
    """One summary of jobs, nodes and queue; an admin's covers all users."""
    own = {} if caller.is_admin else {"user_id": caller.user_id}
    active = services.queue.jobs_page(filters=own, before_seq=None, limit=100, states_in=states.ACTIVE)
    recent = services.queue.jobs_page(filters=own, before_seq=None, limit=10)
    totals = await _totals(services, caller)
    counts = totals.by_state
    ended = counts[states.COMPLETED] + counts[states.FAILED]
    body = {
        "timestamp": clock.iso(clock.now_us()),
        "user_id": caller.user_id,
        "is_admin": caller.is_admin,
        "job_statistics": {"total": sum(counts.values()), **counts},
        "user_statistics": totals.by_user,
        "node_statistics": _node_statistics(services),
        "queue_information": answers.queue_information(services.queue.view()),
        "active_jobs": [services.status_of(row) for row in active],
        "recent_jobs": [services.status_of(row) for row in recent],
        "health_metrics": {
            "uptime_seconds": round(time.monotonic() - services.started, 3),
            "usable_nodes": len(services.registry.usable()),
            "success_rate": round(counts[states.COMPLETED] / ended, 4) if ended else None,
            "accepts_submissions": not _reasons(services),
        },
    }
    return JSONResponse(body)


# -- the service's health -------------------------------------------------------------------------------------------


@router.get("/healthz", tags=["service"], response_model=None, responses={200: {"model": schemas.Health}})
async def healthz() -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


def _reasons(services: Services) -> list[str]:
    """Why submissions are not taken."""
    reasons = []
    if services.stopping:
        reasons.append("the server is stopping")
    if services.storage.free_bytes() < services.settings.min_free_disk:
        reasons.append("the disk of JOBS_DIR has less than MIN_FREE_DISK bytes free")
    return reasons


def _warnings(services: Services) -> list[str]:
    """What an operator should know, without addresses or users: this is public."""
    records = services.registry.all()
    warnings = []
    if services.registry.fenced():
        warnings.append(
            "restored from a backup: jobs wait until every node was asked what it runs; "
            "take a node that is gone for good out of the settings"
        )
    if not services.registry.usable():
        warnings.append("no node takes jobs at the moment; submissions wait")
    away = [record.node_id for record in records if not record.connected]
    if away:
        warnings.append(f"out of reach: {', '.join(away)}")
    bare = [record.node_id for record in records if record.probe is not None and not record.probe.sandbox_works]
    if services.settings.sandbox == "off":
        warnings.append("SANDBOX=off: jobs are not contained")
    elif bare:
        warnings.append(f"no sandbox on {', '.join(bare)}: jobs there are not contained")
    probes = [(record.node_id, record.probe) for record in records if record.probe is not None]
    unfiltered = [name for name, probe in probes if probe.sandbox_works and not probe.seccomp_works]
    if unfiltered and services.settings.sandbox != "off":
        warnings.append(f"no filter of system calls (seccomp) on {', '.join(unfiltered)}")
    unlimited = [name for name, probe in probes if not probe.memory_limit_works]
    if unlimited and services.settings.max_job_memory:
        warnings.append(f"memory limit not enforced on {', '.join(unlimited)}: MAX_JOB_MEMORY is not held there")
    sqlite = sqlite_version_warning()
    return [*warnings, sqlite] if sqlite else warnings


def readiness(services: Services) -> dict[str, Any]:
    """`schemas.Readiness`."""
    reasons = _reasons(services)
    return {"ready": not reasons, "reasons": reasons, "warnings": _warnings(services)}


@router.get(
    "/readyz",
    tags=["service"],
    response_model=None,
    responses={
        200: {"model": schemas.Readiness},
        503: {"model": schemas.Readiness, "description": "Submissions are not taken."},
    },
)
async def readyz(services: ServicesParam) -> Response:
    """Whether submissions are taken, with reasons; and warnings for operators."""
    body = readiness(services)
    return JSONResponse(body, status_code=200 if body["ready"] else 503)


@router.get(
    "/metrics",
    tags=["service"],
    response_model=None,
    response_class=PlainTextResponse,
    responses={
        200: {
            "description": "In the text format of Prometheus, or as OpenMetrics if the Accept header prefers that.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": _SCRAPED}},
        }
    },
)
async def scrape(request: Request, services: ServicesParam) -> Response:
    """What Prometheus scrapes: counts, times and gauges of jobs, nodes, requests and files; no users, no jobs."""
    gauges = Gauges(services.queue, services.registry, services.storage, services.settings)
    body, media_type = await asyncio.to_thread(gauges.exposition, request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": media_type})
