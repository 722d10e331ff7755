"""The routes of the dashboard: who is calling, the queue, the past day or week, the users, and what changes, live.

A regular user learns of the jobs of others only that they wait and run: not whose they are, which, or what they print.
May import everything but `main`, `worker` and the concrete executors.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

import answers
import clock
import live
import schemas
import stream
from cluster_routes import nodes_body, readiness
from problems import described
from services import (
    BEARER,
    AdminParam,
    CallerParam,
    Services,
    ServicesParam,
    make_user_cursor,
    read_user_cursor,
)

QUEUE_SHOWN = 100  # entries of the queue in the stream, and by default
UserCursorParam = Annotated[
    str | None, Query(max_length=200, description="`next_cursor` of the page before.", examples=["dXNlcjphbGljZQ"])
]
router = APIRouter()


@router.get(
    "/api/whoami",
    tags=["dashboard"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.Whoami}, **described(401, 429)},
)
async def whoami(caller: CallerParam, services: ServicesParam) -> Response:
    """Whose token this is, until when it is valid, and the limits that hold."""
    settings = services.settings
    body = {
        "user_id": caller.user_id,
        "is_admin": caller.is_admin,
        "token_expires_at": clock.iso(caller.expires_at),
        "max_active_jobs": settings.max_active_jobs,
        "limits": {
            "submissions_per_minute": settings.submits_per_minute,
            "max_code_bytes": settings.max_code_bytes,
            "max_expected_time": settings.max_expected_time,
        },
    }
    return JSONResponse(body)


@router.get(
    "/api/queue",
    tags=["dashboard"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.QueueList}, **described(401, 422, 429)},
)
async def queue(
    caller: CallerParam,
    services: ServicesParam,
    limit: Annotated[int, Query(ge=1, le=500, description="Most entries.", examples=[100])] = QUEUE_SHOWN,
) -> Response:
    """The pending jobs in the order in which they will start; of others' jobs only their place and time."""
    page = _queue_page(services, limit)
    return Response(page.body(caller.user_id, is_admin=caller.is_admin), media_type="application/json")


def _queue_page(services: Services, limit: int) -> answers.QueuePage:
    """The page made last, with what it has made for others, while nothing has changed."""
    view, rows = services.queue.view(), services.queue.first_pending(limit)
    page = services.queue_page
    if page is None or not page.is_of(view, rows):
        page = services.queue_page = answers.QueuePage(view, rows, clock.now_us())
    return page


@router.get(
    "/api/history",
    tags=["dashboard"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.History}, **described(401, 422, 429)},
)
async def past(
    caller: CallerParam,
    services: ServicesParam,
    window: Annotated[Literal["day", "week"], Query(description="How far back.", examples=["day"])] = "day",
) -> Response:
    """The past day or week for charts: queue, use of nodes and GPUs, waits, and how many jobs ended how."""
    body = await asyncio.to_thread(services.history.charts, window)
    return Response(body, media_type="application/json")


@router.get(
    "/api/admin/users",
    tags=["dashboard"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.UserPage}, **described(400, 401, 403, 422, 429)},
)
async def users(
    caller: AdminParam,
    services: ServicesParam,
    limit: Annotated[int, Query(ge=1, le=500, examples=[50])] = 50,
    cursor: UserCursorParam = None,
) -> Response:
    """The users with their tokens' states and their jobs' numbers; never a token."""
    rows = services.authenticator.users_page(read_user_cursor(cursor), limit + 1)
    shown = rows[:limit]
    found = await asyncio.to_thread(services.queue.jobs_of, [row.user_id for row in shown])
    now = clock.now_us()
    body = {
        "users": [answers.user_entry(row, found.get(row.user_id, {}), now) for row in shown],
        "next_cursor": make_user_cursor(shown[-1].user_id) if len(rows) > limit else None,
    }
    return JSONResponse(body)


# -- live ----------------------------------------------------------------------------------------------------------

# As OpenAPI before 3.2 has it, the schema of an event stream is that of one event.
_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "`nodes`, `queue`, `job`, `health` or `missed`, with JSON.",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["nodes", "queue", "job", "health", "missed"]},
        "data": {"type": "string", "description": "What the call of that name gives this caller, as JSON."},
    },
}
_EVENT_EXAMPLE = {"event": "health", "data": '{"ready": true, "reasons": []}'}


def connect_board(services: Services) -> None:
    """Tell the board where to look, and the queue and the nodes whom to tell of changes. Before anything runs."""
    services.board.sources = stream.Sources(
        nodes=lambda for_admin: nodes_body(services, for_admin=for_admin),
        queue=lambda: _queue_page(services, QUEUE_SHOWN),
        health=lambda: readiness(services),
        status=services.status_of,
        valid=services.authenticator.valid,
        stopping=lambda: services.stopping,
    )
    services.queue.job_changed = services.board.job_changed
    services.registry.changed = services.board.touch


@router.get(
    "/api/stream",
    tags=["dashboard"],
    response_model=None,
    response_class=Response,
    openapi_extra=BEARER,
    responses={
        200: {
            "description": "Server-sent events until the token is no longer valid or the server stops.",
            "content": {live.EVENT_STREAM: {"schema": _EVENT, "example": _EVENT_EXAMPLE}},
        },
        **described(401, 429),
    },
)
async def follow(caller: CallerParam, services: ServicesParam) -> Response:
    """Nodes, queue and health at once and whenever they change, and each own job that changes, as server-sent events.

    `nodes` and `queue` hold what `GET /api/nodes` and `GET /api/queue` give this caller, at most once a second each;
    `job` the status of one of the caller's jobs (for an admin: of any job); `health` what `GET /readyz` says, its
    warnings for admins only; `missed` says that more jobs changed than could be told: list them anew.
    """
    return stream.BoardStream(services.board, caller)
