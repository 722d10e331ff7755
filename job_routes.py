"""The routes of jobs: submit, read, follow, cancel. State is changed through `queue_manager` only.

Handlers are coroutines: reads are short and indexed and run inline, writes go to the database's one writer.
May import everything but `main`, `worker` and the concrete executors.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import sys
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

import answers
import downloads
import live
import problems
import schemas
import states
from auth import Caller
from config import Settings
from errors import Conflict, FieldError, Forbidden, InvalidRequest, NotFound, Unauthenticated, Unavailable
from failpoints import reach
from logs import about
from problems import described
from queue_manager import CANCELLED_NOW, JobRow, NewJob
from services import (
    BEARER,
    CallerParam,
    CursorParam,
    JobIdParam,
    Services,
    ServicesParam,
    bearer,
    make_cursor,
    read_cursor,
)
from storage import OutputPart
from submission import JobConfig, Upload, parse_config, read_upload, validate_config

log = logging.getLogger("api")
LOG_BLOCK_MOST = 8 << 20
CANCEL_WAIT_EXTRA = 3.0
router = APIRouter()


# -- submitting ----------------------------------------------------------------------------------------------------

_SUBMIT: dict[str, Any] = {
    "security": [{"Bearer": []}, {}],
    "parameters": [
        {
            "name": "Prefer",
            "in": "header",
            "description": "`wait=SECONDS` (RFC 7240), as the parameter `wait`, which outweighs it.",
            "schema": {"type": "string"},
            "example": "wait=30",
        },
        {
            "name": "Idempotency-Key",
            "in": "header",
            "description": "A repeat of the same submission with the same key gets the first answer, not a second job.",
            "schema": {"type": "string", "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
            "example": "5e0b6b5c-6a5e-4a4e-8a0e-2f7f8f6c1d11",
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["code", "config_file"],
                    "properties": {
                        "code": {
                            "type": "string",
                            "format": "binary",
                            "description": "The Python file.",
                            "example": "print('hello')\n",
                        },
                        "config_file": {"$ref": "#/components/schemas/JobConfig"},
                    },
                },
                "encoding": {"config_file": {"contentType": "application/json"}},
            }
        },
    },
}
# What can be asked of the job that a submission made; each operation's id is FastAPI's own.
_LINKS = {
    name: {
        "operationId": f"{name}_api_{name}__job_id__{method}",
        "parameters": {"job_id": "$response.body#/job_id"},
        "description": description,
    }
    for name, method, description in (
        ("status", "get", "How the job stands."),
        ("results", "get", "What came of it, once it has ended."),
        ("logs", "get", "What it has printed so far."),
        ("events", "get", "Its story."),
        ("code", "get", "What was submitted."),
        ("cancel", "post", "End it."),
    )
}
_WAIT_DESCRIPTION = "`true`, `false` or seconds: hold the answer until the job ends or the time is up."
_WAIT_PATTERN = r"^(true|false|[0-9]{1,9}(\.[0-9]{1,6})?)$"
_WAIT = re.compile(_WAIT_PATTERN.replace("$", r"\Z"))


@router.post(
    "/api/submit",
    tags=["jobs"],
    response_model=None,
    openapi_extra=_SUBMIT,
    responses={
        200: {
            "model": schemas.SubmitAnswer,
            "description": "Queued (or, with `wait`, ended).",
            "headers": {"Location": {"schema": {"type": "string"}, "description": "The job's status."}},
            "links": _LINKS,
        },
        **described(400, 401, 403, 408, 413, 422, 429, 503),
    },
)
async def submit(
    request: Request,
    services: ServicesParam,
    wait: Annotated[
        str | None,
        Query(description=_WAIT_DESCRIPTION, examples=["30"], json_schema_extra={"pattern": _WAIT_PATTERN}),
    ] = None,
) -> Response:
    """Queue a Python file as a job. Headers: `Prefer: wait=SECONDS` (RFC 7240), `Idempotency-Key`."""
    settings = services.settings
    seconds, preference_applied = _wait_seconds(request, wait, settings)
    key = _idempotency_key(request)
    upload = await read_upload(
        request.receive,
        request.headers.get("content-type", ""),
        request.headers.get("content-length"),
        settings,
    )
    config, caller = _authorised(request, services, upload)
    if settings.check_syntax:
        await _check_syntax(upload.code)
    new = NewJob(
        user_id=config.user_id,
        competition_id=config.competition_id,
        project_id=config.project_id,
        expected_time=config.expected_time,
        time_limit=config.expected_time * settings.max_job_timeout_multiplier,
        config=config.kept,
        code=upload.code,
        request_digest=_digest(config, upload) if key is not None else b"",
        request_id=problems.request_id(request),
        idempotency_key=key,
    )
    request.state.user_id = caller.user_id
    row, headers = await _queue(request, services, new)
    headers["Location"] = f"/api/status/{row.job_id}"
    if preference_applied:
        headers["Preference-Applied"] = f"wait={seconds:g}"
    row = await services.wait_for_end(request, row, seconds)
    if row.state in states.FINAL and seconds > 0:
        return await downloads.results_response(services.storage, row.job_id, services.results_head(row), headers)
    answer = services.status_of(row)
    if row.state == states.PENDING and not answer["message"]:
        answer["message"] = "Queued."
    return JSONResponse(answer, headers=headers)


def _wait_seconds(request: Request, wait: str | None, settings: Settings) -> tuple[float, bool]:
    """(seconds to wait, whether `Prefer` decided). The parameter outweighs the header, the header the default."""
    most = settings.submit_max_wait
    if wait is not None:
        text = wait.strip().lower()
        if text in ("true", "false"):
            return (most, False) if text == "true" else (0.0, False)
        if _WAIT.match(text) is None:
            raise InvalidRequest(
                "The parameter wait must be true, false or a number of seconds.",
                errors=[FieldError("wait", "must be true, false or a number of seconds")],
            )
        return min(float(text), most), False
    for header in request.headers.getlist("prefer"):
        for preference in header.split(","):
            name, _, value = preference.split(";")[0].partition("=")
            digits = value.strip().strip('"')
            if name.strip().lower() == "wait" and digits.isascii() and digits.isdigit():
                return min(float(digits), most), True
    return settings.submit_default_wait, False


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidRequest("The Idempotency-Key must have 1 to 255 printable ASCII characters.")
    return key


def _authorised(request: Request, services: Services, upload: Upload) -> tuple[JobConfig, Caller]:
    """The valid config and the caller who may submit it: 400 before 401 before 403."""
    header_token, refused = None, None
    try:
        header_token = bearer(request)
    except Unauthenticated as error:
        refused = error
    config = validate_config(
        parse_config(upload.config_file),
        services.settings,
        token_optional=header_token is not None or refused is not None,
        header_token=header_token,
    )
    if refused is not None:
        raise refused
    caller = services.authenticate(request, header_token or config.token or "")
    if caller.user_id != config.user_id:
        raise Forbidden("The token belongs to another user than the user_id of the config.")
    return config, caller


def _digest(config: JobConfig, upload: Upload) -> bytes:
    """What makes two submissions the same one, for Idempotency-Key; the token may have been renewed in between."""
    return hashlib.sha256(json.dumps(config.kept, sort_keys=True).encode() + b"\0" + upload.code).digest()


async def _check_syntax(code: bytes) -> None:
    """Raise InvalidRequest with line and column. In a process of its own: compiling can crash an interpreter."""
    program = (
        "import sys, json\n"
        "try: compile(sys.stdin.buffer.read(), 'solution.py', 'exec', dont_inherit=True)\n"
        "except SyntaxError as e: print(json.dumps([e.msg, e.lineno, e.offset]))\n"
        "except ValueError as e: print(json.dumps([str(e), None, None]))\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-W", "ignore", "-c", program),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(code), 10)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()
        text = "could not be checked for syntax errors within 10 seconds"
        raise InvalidRequest(f"The code {text}.", errors=[FieldError("code", text)]) from None
    if process.returncode != 0:
        text = "cannot be compiled: it is nested too deep"
        raise InvalidRequest(f"The code {text}.", errors=[FieldError("code", text)])
    if out.strip():
        message, line, column = json.loads(out)
        where = f" (line {line}, column {column})" if line is not None else ""
        raise InvalidRequest(
            f"The code has a syntax error: {message}{where}.", errors=[FieldError("code", f"{message}{where}")]
        )


async def _queue(request: Request, services: Services, new: NewJob) -> tuple[JobRow, dict[str, str]]:
    """Queue the job, or find the one that this idempotency key made before. (row, headers)."""
    if new.idempotency_key is None:
        return await _admit(request, services, new)
    # Repeats of one key wait for the first, so that they get its answer and not a limit's.
    place = (new.user_id, new.idempotency_key)
    lock = services.key_locks.setdefault(place, asyncio.Lock())
    try:
        async with lock:
            known = services.queue.job_by_key(new.user_id, new.idempotency_key)
            if known is not None:
                # The write checks that it is the same submission, and adds nothing.
                row, _ = await services.submissions.write(new)
                return row, {"Idempotency-Replayed": "true"}
            return await _admit(request, services, new)
    finally:
        if not lock.locked():
            services.key_locks.pop(place, None)


async def _admit(request: Request, services: Services, new: NewJob) -> tuple[JobRow, dict[str, str]]:
    headers = await services.submit_limiter.admit(request)
    try:
        services.refuse_when_full()
    except Unavailable:
        services.queue.refuse_at_limit(new.user_id)  # a limit of the user's own is the earlier answer
        raise
    row, _ = await services.submissions.write(new)
    reach("submit_committed")
    about(job_id=row.job_id)
    log.info("request %s: job %s of %s queued", new.request_id, row.job_id, new.user_id)
    return row, headers


# -- reading -------------------------------------------------------------------------------------------------------

# As OpenAPI before 3.2 has it, the schema of an event stream is that of one event.
_STATUS_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "`transition` with a step of the job's life, whose id is the number to go on after; `status` or, at "
    "last, `end`, both with the job's status.",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["transition", "status", "end"]},
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "data": {"type": "string", "description": "The step, or the job's status, as JSON."},
    },
}
_STATUS_EVENT_EXAMPLE = {"event": "status", "data": '{"job_id": "0b8e2a52", "status": "running"}'}


@router.get(
    "/api/status/{job_id}",
    tags=["jobs"],
    response_model=None,
    openapi_extra=BEARER,
    responses={
        200: {
            "model": schemas.JobStatus,
            "description": "How the job stands; with `follow=true` also every change until it has ended.",
            "content": {live.EVENT_STREAM: {"schema": _STATUS_EVENT, "example": _STATUS_EVENT_EXAMPLE}},
        },
        **described(401, 403, 404, 422, 429),
    },
)
async def status(
    request: Request,
    job_id: JobIdParam,
    caller: CallerParam,
    services: ServicesParam,
    follow: Annotated[bool, Query(description="Go on until the job has ended.", examples=[False])] = False,
) -> Response:
    """State, node, queue position, estimated start and finish.

    With `follow=true` server-sent events until the job has ended: `status` at once and at each change, at last `end`;
    before it `transition` for each step that led to it, from the first one or from that after `Last-Event-ID`.
    """
    row = services.job_for(caller, job_id)
    if not follow:
        return JSONResponse(services.status_of(row))

    def current() -> dict[str, Any] | None:
        found = services.queue.job(row.job_id)
        return services.status_of(found) if found is not None else None

    def trail(after: int) -> list[tuple[int, dict[str, Any]]]:
        events = services.queue.events(row.seq, after)
        return [(event.id, answers.transition(row.job_id, event, caller)) for event in events]

    after = _last_event_id(request) or 0
    return live.StatusStream(row.job_id, services.queue.watch, current, trail, lambda: services.stopping, after)


def _last_event_id(request: Request) -> int | None:
    """The number that a client names which connects again."""
    text = request.headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


_RESULTS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": schemas.JobResults,
        "description": "The ended job.",
        "content": {downloads.NDJSON: {"schema": {"type": "string"}, "example": '{"score": 0.93}\n'}},
    },
    206: {
        "description": "The part of the raw file that was asked for.",
        "content": {downloads.NDJSON: {"schema": {"type": "string"}, "example": '"score": 0.9'}},
    },
    304: {"description": "The raw file is the one you have."},
    **described(401, 403, 404, 409, 416, 422, 429),
}


_HEAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": answer["description"]} for status, answer in _RESULTS_RESPONSES.items()
}
_HEAD_RESPONSES[200]["content"] = {"application/json": {}, downloads.NDJSON: {}}
FormatParam = Annotated[
    Literal["json", "jsonl"] | None,
    Query(description="`jsonl` gives the raw file, as `Accept` does.", examples=["jsonl"]),
]


def _ended_job(services: Services, caller: Caller, job_id: str) -> JobRow:
    row = services.job_for(caller, job_id)
    if row.state not in states.FINAL:
        raise Conflict(f"The job is still {row.state}; its results come when it has ended.", retry_after=1)
    return row


def _wants_raw(request: Request, format: str | None) -> bool:
    return format == "jsonl" or (format is None and downloads.NDJSON in request.headers.get("accept", ""))


def _raw_results(request: Request, services: Services, row: JobRow) -> Response:
    if row.result_sha256 is None:
        raise NotFound(f"The job left no results file: it is {row.state}. {row.message or ''}".strip())
    path, name = services.storage.results_path(row.job_id), row.result_file or f"{row.job_id}.jsonl"
    try:
        return downloads.raw_file(request, path, row.result_sha256, name)
    except FileNotFoundError:
        raise NotFound("The job's files are not kept any more.") from None


@router.get(
    "/api/results/{job_id}",
    tags=["jobs"],
    response_model=None,
    openapi_extra=BEARER,
    responses=_RESULTS_RESPONSES,
)
async def results(
    request: Request,
    job_id: JobIdParam,
    caller: CallerParam,
    services: ServicesParam,
    format: FormatParam = None,
) -> Response:
    """Output, exit code and records of an ended job; or the raw results file with Range and ETag."""
    row = _ended_job(services, caller, job_id)
    if _wants_raw(request, format):
        return _raw_results(request, services, row)
    return await downloads.results_response(services.storage, row.job_id, services.results_head(row), {})


@router.head(
    "/api/results/{job_id}",
    tags=["jobs"],
    response_model=None,
    openapi_extra=BEARER,
    responses=_HEAD_RESPONSES,
)
async def results_head(
    request: Request, job_id: JobIdParam, caller: CallerParam, services: ServicesParam, format: FormatParam = None
) -> Response:
    """What `GET` says before its body: of the raw file size, ETag and digest."""
    row = _ended_job(services, caller, job_id)
    if _wants_raw(request, format):
        return _raw_results(request, services, row)
    response = Response(media_type="application/json")
    del response.headers["content-length"]  # that of the JSON, which is not made for this
    return response


_LOG_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "`output` (of merged output `stdout` or `stderr`) with a JSON string, whose id is the offset to go "
    "on from; `skipped`, `restarted`, `end`.",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["output", "stdout", "stderr", "skipped", "restarted", "end"]},
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "data": {"type": "string", "description": "JSON."},
    },
}
_LOG_EVENT_EXAMPLE = {"event": "output", "id": "19", "data": '"epoch 1: loss 0.71\\n"'}


@router.get(
    "/api/logs/{job_id}",
    tags=["jobs"],
    response_model=None,
    response_class=Response,
    openapi_extra=BEARER,
    responses={
        200: {
            "description": "The output so far; with `follow=true` also what is still to come.",
            "content": {
                "text/plain": {"schema": {"type": "string"}, "example": "epoch 1: loss 0.71\n"},
                live.EVENT_STREAM: {"schema": _LOG_EVENT, "example": _LOG_EVENT_EXAMPLE},
            },
            "headers": {
                "X-Log-Size": {"schema": {"type": "integer"}, "description": "Bytes of the stream so far."},
                "X-Log-Next-Offset": {"schema": {"type": "integer"}, "description": "Where to go on."},
                "X-Log-Truncated": {
                    "schema": {"type": "string", "enum": ["true"]},
                    "description": "The job has ended and printed more than is kept; the rest was dropped.",
                },
                "X-Log-Order": {
                    "schema": {"type": "string", "enum": ["coarse"]},
                    "description": "Of merged output: it changed so often between stdout and stderr that from some "
                    "place on the order is only about that in which it was printed.",
                },
            },
        },
        **described(401, 403, 404, 422, 429),
    },
)
async def logs(
    request: Request,
    job_id: JobIdParam,
    caller: CallerParam,
    services: ServicesParam,
    stream: Annotated[
        Literal["stdout", "stderr", "merged"],
        Query(description="Which output; `merged` is both in the order in which they came.", examples=["stdout"]),
    ] = "stdout",
    offset: Annotated[int, Query(ge=0, le=1 << 50, description="Byte to start at.", examples=[0])] = 0,
    tail: Annotated[
        int | None, Query(ge=0, le=1 << 50, description="Only that many last bytes.", examples=[4096])
    ] = None,
    follow: Annotated[bool, Query(description="Go on until the job has ended.", examples=[False])] = False,
    collapse: Annotated[
        bool, Query(description="Of each line only what its carriage returns leave visible.", examples=[False])
    ] = False,
) -> Response:
    """Raw bytes of the output so far, at most 8 MiB a call; `X-Log-Next-Offset` says where to go on.

    With `follow=true` a stream until the job has ended: server-sent events (`output` with a JSON string, whose id is
    the offset to go on from; `skipped`, `restarted`, `end`), or plain text when `Accept` asks for `text/plain`.
    Of `stream=merged`, whose offsets are its own, events are `stdout` or `stderr` instead of `output`.
    Without `follow` the same events come when `Accept` asks for `text/event-stream`.
    With `collapse=true` progress bars are reduced to what is visible of them.
    """
    row = services.job_for(caller, job_id)
    if row.state in states.FINAL:
        downloads.refuse_when_gone(services.storage, row.job_id, started=row.started_at is not None)
    log = _Log(services, row, stream)
    last = _last_event_id(request) if follow else None
    if last is not None:
        offset, tail = last, None
    if tail is not None:
        offset = max(offset, log.size() - tail)
    filter = log.collapse(offset, seen=tail is None) if collapse else None
    accept = request.headers.get("accept", "")
    if follow:
        encoding = live.encoding_of(stream, plain="text/plain" in accept)
        return live.LogStream(
            lambda waiter: services.channels.join(row.job_id, stream, lambda: log, waiter),
            lambda waiter: services.channels.leave(row.job_id, stream, waiter),
            lambda: services.stopping,
            *(offset, encoding, filter, log.headers()),
        )
    part = log.read(offset, LOG_BLOCK_MOST)
    start = min(offset, part.size)
    next_offset = start + sum(len(data) for _, data in part.pieces)
    encoding = live.encoding_of(stream, plain=live.EVENT_STREAM not in accept)
    if filter is not None:
        shown = live.Collapsed(encoding, filter)
        data = shown.feed(part) + shown.finish()
        next_offset = filter.position if part.pieces else start
    else:
        data, next_offset = live.encode(encoding, part, start, last=next_offset == part.size)
    headers = {"X-Log-Size": str(part.size), "X-Log-Next-Offset": str(next_offset), "X-Job-Status": row.state}
    return Response(data, media_type=encoding.media_type, headers={**log.headers(), **headers})


class _Log:
    """One output of one job, as it stands on disk."""

    def __init__(self, services: Services, row: JobRow, stream: str) -> None:
        self._services = services
        self._row = row
        self._stream = stream

    def read(self, offset: int, most: int = live.BLOCK) -> OutputPart:
        """See `storage.read_output`."""
        return self._services.storage.read_output(self._row.job_id, self._stream, offset, most)

    def size(self) -> int:
        """Bytes so far."""
        return self.read(0, 0).size

    def collapse(self, start: int, *, seen: bool) -> live.Collapse:
        """A filter from `start`; `seen`: the reader has what is before it."""
        pieces = self.read(start - 1, 1).pieces if seen and start else []
        return live.Collapse(start, before=pieces[0][1] if pieces else b"")

    def headers(self) -> dict[str, str]:
        """What is to be known of the whole output."""
        headers = {"X-Log-Truncated": "true"} if _is_truncated(self._row, self._stream) else {}
        return headers if self.read(0, 0).exact else {**headers, "X-Log-Order": "coarse"}

    def ended(self) -> dict[str, Any] | None:
        """The job's status once it is final."""
        row = self._services.queue.job(self._row.job_id)
        if row is None or row.state not in states.FINAL:
            return None
        return {**self._services.status_of(row), "truncated": _is_truncated(row, self._stream)}


def _is_truncated(row: JobRow, stream: str) -> bool:
    flags = {"stdout": row.stdout_truncated, "stderr": row.stderr_truncated}
    return bool(flags[stream] if stream in flags else any(flags.values()))


@router.get(
    "/api/events/{job_id}",
    tags=["jobs"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.JobEvents}, **described(401, 403, 404, 422, 429)},
)
async def events(job_id: JobIdParam, caller: CallerParam, services: ServicesParam) -> Response:
    """The job's story: each transition with time, actor, node, attempt and reason."""
    row = services.job_for(caller, job_id)
    found = [answers.job_event(event, caller) for event in services.queue.events(row.seq)]
    if not found:  # every job has one: it was forgotten since the line above
        raise NotFound(f"There is no job {row.job_id}.")
    return JSONResponse({"job_id": row.job_id, "events": found})


@router.get(
    "/api/code/{job_id}",
    tags=["jobs"],
    response_model=None,
    response_class=Response,
    openapi_extra=BEARER,
    responses={
        200: {
            "description": "The Python file, byte for byte.",
            "content": {"text/x-python": {"schema": {"type": "string"}, "example": "print('hello')\n"}},
        },
        **described(401, 403, 404, 422, 429),
    },
)
async def code(job_id: JobIdParam, caller: CallerParam, services: ServicesParam) -> Response:
    """The Python file as it was submitted, to look at or to submit again."""
    row = services.job_for(caller, job_id)
    found = services.queue.code(row.seq)
    if found is None:  # forgotten since the line above
        raise NotFound(f"There is no job {row.job_id}.")
    # Never shown as a page of this server's, whatever is in it.
    headers = {"Content-Disposition": 'attachment; filename="solution.py"', "Cache-Control": "no-store"}
    return Response(found, media_type="text/x-python", headers=headers)


@router.get(
    "/api/jobs",
    tags=["jobs"],
    response_model=None,
    openapi_extra=BEARER,
    responses={200: {"model": schemas.JobPage}, **described(400, 401, 403, 422, 429)},
)
async def jobs(
    caller: CallerParam,
    services: ServicesParam,
    user_id: Annotated[str | None, Query(max_length=64, examples=["alice"])] = None,
    status: Annotated[schemas.JobState | None, Query(examples=["completed"])] = None,
    competition_id: Annotated[str | None, Query(max_length=64, examples=["demo"])] = None,
    project_id: Annotated[str | None, Query(max_length=64, examples=["baseline"])] = None,
    limit: Annotated[int, Query(ge=1, le=500, examples=[50])] = 50,
    cursor: CursorParam = None,
) -> Response:
    """Own jobs, newest first; an admin sees all."""
    if not caller.is_admin:
        if user_id is not None and user_id != caller.user_id:
            raise Forbidden("Only administrators see the jobs of other users.")
        user_id = caller.user_id
    filters = {"user_id": user_id, "state": status, "competition_id": competition_id, "project_id": project_id}
    rows = services.queue.jobs_page(
        filters={name: value for name, value in filters.items() if value is not None},
        before_seq=read_cursor(cursor),
        limit=limit + 1,
    )
    more = len(rows) > limit
    page = [services.status_of(row) for row in rows[:limit]]
    return JSONResponse({"jobs": page, "next_cursor": make_cursor(rows[limit - 1].seq) if more else None})


# -- cancelling ----------------------------------------------------------------------------------------------------


@router.post(
    "/api/cancel/{job_id}",
    tags=["jobs"],
    response_model=None,
    openapi_extra=BEARER,
    responses={
        200: {"model": schemas.JobStatus, "description": "Cancelled."},
        202: {"model": schemas.JobStatus, "description": "The end was asked for; it is not confirmed yet."},
        **described(400, 401, 403, 404, 422, 429, 503),
    },
)
async def cancel(request: Request, job_id: JobIdParam, caller: CallerParam, services: ServicesParam) -> Response:
    """Pending: cancelled at once. Running: ended on its node, then cancelled."""
    services.job_for(caller, job_id)
    about(job_id=job_id)
    write = services.queue.cancel(job_id, caller.actor, problems.request_id(request))
    done, row = await services.database.write_async(write)
    log.info("request %s: %s cancels job %s", problems.request_id(request), caller.actor, job_id)
    if done != CANCELLED_NOW:
        record = services.registry.get(row.node_id)
        if record is not None and record.connected:
            row = await services.wait_for_end(request, row, services.settings.kill_grace + CANCEL_WAIT_EXTRA)
    if row.state in (states.COMPLETED, states.FAILED):
        raise InvalidRequest(f"The job had already ended by itself: it is {row.state}.")
    return JSONResponse(services.status_of(row), status_code=200 if row.state == states.CANCELLED else 202)
