"""The exception tree. Every message says what happened, to which thing, and what to do next.

    JobServerError
    ├── ConfigurationError        the start is stopped, the sentence names the setting
    ├── DatabaseError
    │   ├── DatabaseInUse         another server holds this SQLite file
    │   └── SchemaTooNew          the file was written by a newer version
    ├── RequestError              becomes a problem document with `status`
    │   ├── PayloadTooLarge 413 · InvalidRequest 400 · Unprocessable 422 · Unauthenticated 401
    │   ├── Forbidden 403 · NotFound 404 · Conflict 409
    │   └── TooManyRequests 429 · Unavailable 503 (both carry `retry_after`, seconds)
    └── NodeError                 something between server and node, never the user's fault
        ├── NodeUnreachable       no connection, or it was lost
        ├── NodeRefused           reached, but it must not be used: host key, login, Python, sandbox
        └── AgentError            the node's agent answered with an error `code`

May import nothing of the project.
"""

from __future__ import annotations

from dataclasses import dataclass


class JobServerError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigurationError(JobServerError):
    """A setting is wrong; the message names it."""


class DatabaseError(JobServerError):
    """The database cannot be used as it is."""


class DatabaseInUse(DatabaseError):
    """Another server process works on this SQLite file."""


class SchemaTooNew(DatabaseError):
    """The database was written by a newer version of this software."""


@dataclass(frozen=True)
class FieldError:
    """One wrong field of a request: its name and a sentence."""

    field: str
    message: str


class RequestError(JobServerError):
    """An answer other than success; `status` is the HTTP status code."""

    status = 400
    title = "Bad request"

    def __init__(
        self,
        detail: str,
        *,
        errors: list[FieldError] | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors or []
        self.retry_after = retry_after
        self.headers = headers or {}


class InvalidRequest(RequestError):
    """400: the config or a parameter is wrong."""


class Unauthenticated(RequestError):
    """401: no token, or one that is unknown, expired or revoked."""

    status = 401
    title = "Not authenticated"


class Forbidden(RequestError):
    """403: a valid token, but not for this."""

    status = 403
    title = "Forbidden"


class NotFound(RequestError):
    """404: no such job, node or page."""

    status = 404
    title = "Not found"


class RequestTimeout(RequestError):
    """408: the request's body did not arrive in time."""

    status = 408
    title = "Request timeout"


class Conflict(RequestError):
    """409: the thing is not in a state that allows it."""

    status = 409
    title = "Conflict"


class PayloadTooLarge(RequestError):
    """413: a part or the whole request is over its limit."""

    status = 413
    title = "Too large"


class RangeNotSatisfiable(RequestError):
    """416: the Range asked for lies beyond the file."""

    status = 416
    title = "Range not satisfiable"


class Unprocessable(RequestError):
    """422: a part of the request is missing, or it contradicts an earlier one."""

    status = 422
    title = "Unprocessable request"


class TooManyRequests(RequestError):
    """429: over a limit (`active_jobs`, `submit_rate`, `login`); `retry_after` says when to come back."""

    status = 429
    title = "Too many requests"

    def __init__(
        self, detail: str, *, limit: str, retry_after: float | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail, retry_after=retry_after, headers=headers)
        self.limit = limit


class Unavailable(RequestError):
    """503: the server takes no submissions now."""

    status = 503
    title = "Unavailable"


class NodeError(JobServerError):
    """Something between server and node went wrong; no job is failed because of it alone."""


class NodeUnreachable(NodeError):
    """The node could not be reached, or the connection to it was lost."""


class NodeRefused(NodeError):
    """The node was reached but must not be used; an operator has to act on the message."""


class AgentError(NodeError):
    """The agent refused a request; `code` is its machine-readable reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
