"""Errors as RFC 9457 problem documents, and their OpenAPI descriptions. May import `errors`, `metrics`, `schemas`."""

from __future__ import annotations

import http
import json
import logging
import math
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

import metrics
from errors import DatabaseError, FieldError, RequestError, TooManyRequests, Unavailable
from schemas import Problem

log = logging.getLogger("api")
MEDIA_TYPE = "application/problem+json"


def request_id(request: Request) -> str:
    """The id of this request, as given by the outermost middleware."""
    return str(request.scope.get("request_id", ""))


def problem(request: Request, error: RequestError) -> Response:
    """The error as a response."""
    if isinstance(error, TooManyRequests):
        metrics.LIMIT_HITS.labels(error.limit).inc()
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "request_id": request_id(request),
    }
    if error.errors:
        body["errors"] = [{"field": wrong.field, "message": wrong.message} for wrong in error.errors]
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return Response(json.dumps(body), status_code=error.status, headers=headers, media_type=MEDIA_TYPE)


def _from_http_exception(error: HTTPException) -> RequestError:
    phrase = http.HTTPStatus(error.status_code).phrase
    detail = {
        404: "There is nothing at this address; GET / lists what there is.",
        405: "This address does not take this method.",
    }.get(error.status_code, str(error.detail or phrase))
    answer = RequestError(detail, headers=dict(error.headers or {}))
    answer.status, answer.title = error.status_code, phrase
    return answer


def _from_validation(error: RequestValidationError) -> RequestError:
    errors = []
    for wrong in error.errors():
        place = [str(part) for part in wrong["loc"]]
        errors.append(FieldError(".".join(place[1:]) or place[0], str(wrong["msg"])))
    text = "; ".join(f"{wrong.field}: {wrong.message}" for wrong in errors)
    answer = RequestError(f"The request's parameters are not valid: {text}.", errors=errors)
    answer.status, answer.title = 422, "Unprocessable request"
    return answer


def _from_database(request: Request, error: Exception) -> RequestError:
    log.error("request %s: the database failed: %s", request_id(request), getattr(error, "orig", None) or error)
    detail = "The database cannot be used right now; nothing was changed. Try again in a moment."
    return Unavailable(detail, retry_after=5)


def answer(request: Request, error: Exception) -> Response | None:
    """The answer to an error that is expected to happen, None for any other."""
    if isinstance(error, RequestError):
        return problem(request, error)
    if isinstance(error, (DBAPIError, DatabaseError)):
        return problem(request, _from_database(request, error))
    return None


def unexpected(request: Request) -> Response:
    """The answer to an error that nobody thought of; whoever caught it raises it again, so that it is logged."""
    answer = RequestError(f"An internal error; an operator finds it in the log under {request_id(request)}.")
    answer.status, answer.title = 500, "Internal server error"
    return problem(request, answer)


def install(app: FastAPI) -> None:
    """Make every error of the app a problem document."""

    async def _expected(request: Request, error: Exception) -> Response:
        found = answer(request, error)
        assert found is not None
        return found

    for kind in (RequestError, DBAPIError, DatabaseError):
        app.add_exception_handler(kind, _expected)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        return problem(request, _from_http_exception(error))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        return problem(request, _from_validation(error))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        return unexpected(request)


EXAMPLES: dict[int, str] = {
    400: "The config is not valid: expected_time must be a number of seconds from 1 to 86400.",
    401: "The token is unknown.",
    403: "This job belongs to another user.",
    404: "There is no job 0b8e2a52-8c1e-4a3e-9a53-0e6f7f2f6c11.",
    408: "The request's body did not arrive within 30 seconds.",
    409: "The job is still running; its results come when it has ended.",
    413: "The code is larger than 10485760 bytes.",
    416: "The file has 120 bytes.",
    422: "The request lacks the part code.",
    429: "Queue limit exceeded: you already have a pending or running job. Wait until it ends, or cancel it.",
    503: "The server is stopping; submit again in a moment.",
}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"description": "The challenge of RFC 6750.", "schema": {"type": "string"}}},
    429: {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}},
    503: {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}},
}


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these error statuses, each with an example."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        title = http.HTTPStatus(status).phrase
        example = {
            "type": "about:blank",
            "title": title,
            "status": status,
            "detail": EXAMPLES[status],
            "request_id": "5f0c9f7d2a4b4f0e",
        }
        found[status] = {
            "description": title,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}},
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
        }
    return found


def components() -> dict[str, Any]:
    """The schemas that `described` refers to."""
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), "Problem": schema}
