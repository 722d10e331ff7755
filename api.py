"""The HTTP interface put together: its routes, its description, and what every answer carries.

May import everything but `main`, `worker` and the concrete executors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

import cluster_routes
import dashboard_routes
import job_routes
import metrics
import pages
import problems
import schemas
from config import PROJECT_DIR, VERSION
from direct import Direct
from logs import about

SERVICE = "GPU job server"
SWAGGER_UI = "/static/swagger-ui"
router = APIRouter()
ROUTERS = (job_routes.router, cluster_routes.router, dashboard_routes.router, router)

ENDPOINTS = {
    "submit": "POST /api/submit",
    "status": "GET /api/status/{job_id}",
    "results": "GET /api/results/{job_id}",
    "logs": "GET /api/logs/{job_id}",
    "events": "GET /api/events/{job_id}",
    "code": "GET /api/code/{job_id}",
    "cancel": "POST /api/cancel/{job_id}",
    "jobs": "GET /api/jobs",
    "nodes": "GET /api/nodes",
    "dashboard": "GET /api/dashboard",
    "whoami": "GET /api/whoami",
    "queue": "GET /api/queue",
    "history": "GET /api/history",
    "stream": "GET /api/stream",
    "drain": "POST /api/admin/nodes/{node_id}/drain",
    "resume": "POST /api/admin/nodes/{node_id}/resume",
    "users": "GET /api/admin/users",
    "audit": "GET /api/admin/audit",
    "docs": "GET /docs",
    "openapi": "GET /openapi.json",
    "liveness": "GET /healthz",
    "readiness": "GET /readyz",
    "metrics": "GET /metrics",
}


_PAGE: dict[str, Any] = {"schema": {"type": "string"}, "example": "<!doctype html><title>GPU job server</title>"}


@router.get(
    "/",
    tags=["service"],
    response_model=None,
    responses={200: {"model": schemas.Service, "content": {"text/html": _PAGE}}},
)
async def root(request: Request) -> Response:
    """What this is and what it offers; a browser (`Accept: text/html`) gets the dashboard's page."""
    found = None
    if pages.wants_page(request.headers.get("accept", "")):
        found = pages.page(request.app.state.files, request.headers)
    return found or JSONResponse(
        {"service": SERVICE, "version": VERSION, "endpoints": ENDPOINTS}, headers={"Vary": "Accept"}
    )


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """The interface's description for people; its files are served from here, no other host is asked."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=SERVICE,
        swagger_js_url=f"{SWAGGER_UI}/swagger-ui-bundle.js",
        swagger_css_url=f"{SWAGGER_UI}/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )


# -- the app -------------------------------------------------------------------------------------------------------

DESCRIPTION = (
    "Send a Python file, get its output and results. Errors are problem documents (RFC 9457) with a plain sentence in "
    "`detail`. Every response carries `X-Request-ID`. Times are ISO 8601 UTC."
)


def make_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None) -> FastAPI:
    """The FastAPI app; whoever starts it puts `Services` into `app.state.services`."""
    app = FastAPI(
        title=SERVICE, version=VERSION, description=DESCRIPTION, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    problems.install(app)
    for part in ROUTERS:
        app.include_router(part)
    app.state.files = pages.Files()
    app.mount(pages.ADDRESS, app.state.files, name="dashboard")
    app.mount("/static", StaticFiles(directory=PROJECT_DIR / "static"), name="static")

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(problems.components())
            components["schemas"]["JobConfig"] = schemas.JobConfig.model_json_schema()
            schemas.put_examples(components["schemas"])
            components["securitySchemes"] = {"Bearer": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


SECURITY_HEADERS: Iterable[tuple[bytes, bytes]] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


class RequestContext:
    """The outermost layer: gives each request its id, sends it back, adds the security headers, and counts."""

    def __init__(self, app: FastAPI) -> None:
        self._app = Direct(app, [route for part in ROUTERS for route in part.routes])
        self._counter = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(scope)
        scope["request_id"] = request_id
        about(request_id=request_id)
        extra = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]

        began = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                metrics.http_answered(scope, message["status"], time.perf_counter() - began)
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _request_id(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"x-request-id" and 0 < len(value) <= 64 and value.replace(b"-", b"").isalnum():
                return str(value.decode("ascii"))
        self._counter += 1
        return f"{time.time_ns():x}-{self._counter:x}"
