"""What is counted and timed as it happens, for Prometheus. What can be read at any moment is in `gauges`.

Label sets are bounded by the settings and the code: nodes, states, reasons, route templates; never users, jobs or
paths. Counts live in this process's memory and start at 0 with it, as Prometheus expects.
May import `states`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

import states

EVENTS = CollectorRegistry()
ProcessCollector(registry=EVENTS)
PlatformCollector(registry=EVENTS)

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 30, 60, 300, 900, 1800, 3600, 7200, 14400, 43200, 86400)
_RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5)

SUBMITTED = Counter("gpujobs_jobs_submitted", "Jobs that were queued.", registry=EVENTS)
ENDED = Counter(
    "gpujobs_jobs_ended", "Jobs that reached a final state; reason is empty but for failed.", ["state", "reason"],
    registry=EVENTS,
)  # fmt: skip
RETRIES = Counter(
    "gpujobs_job_retries", "Jobs queued again after an infrastructure failure.", ["reason"], registry=EVENTS
)
WAITED = Histogram(
    "gpujobs_job_wait_seconds", "From submission to the first start.", buckets=_LONG, registry=EVENTS
)  # fmt: skip
RAN = Histogram(
    "gpujobs_job_run_seconds", "From the last start to the end.", ["state"], buckets=_LONG, registry=EVENTS
)  # fmt: skip
RUN_RATIO = Histogram(
    "gpujobs_job_run_ratio",
    "True run time over expected_time, of jobs that ended by themselves or by their limit.",
    buckets=_RATIOS,
    registry=EVENTS,
)
LAUNCH = Histogram(
    "gpujobs_launch_seconds",
    "From a launch being sent to a node to its word that the job runs.",
    buckets=_FAST,
    registry=EVENTS,
)
NODE_CONNECTIONS = Counter(
    "gpujobs_node_connections", "Connections made to a node; the first is not a reconnect.", ["node"], registry=EVENTS
)
NODE_CONNECTION_FAILURES = Counter(
    "gpujobs_node_connection_failures", "Connections to a node that failed or broke.", ["node"], registry=EVENTS
)
LOG_BYTES = Counter("gpujobs_log_received_bytes", "Bytes of output received from nodes.", registry=EVENTS)
WATCHERS = Gauge("gpujobs_stream_watchers", "Streams that are being followed now.", ["stream"], registry=EVENTS)
LIMIT_HITS = Counter("gpujobs_limit_hits", "Requests refused with 429, by the limit.", ["limit"], registry=EVENTS)
HTTP_REQUESTS = Counter(
    "gpujobs_http_requests", "HTTP requests answered, by route template.", ["method", "route", "status"],
    registry=EVENTS,
)  # fmt: skip
HTTP_SECONDS = Histogram(
    "gpujobs_http_request_duration_seconds",
    "From a request's head to the begin of its answer; a submission that waits for its job waits in here.",
    ["method", "route"],
    buckets=_FAST,
    registry=EVENTS,
)
COMMIT_SECONDS = Histogram(
    "gpujobs_database_commit_seconds", "A group of writes to the database, durable.", buckets=_FAST, registry=EVENTS
)
WRITES = Counter("gpujobs_database_writes", "Writes that were handed to the database's writer.", registry=EVENTS)
WRITE_FAILURES = Counter("gpujobs_database_write_failures", "Groups of writes that failed as a whole.", registry=EVENTS)

# Exported with 0 before the first one: a rate over a series that begins with 1 misses that one.
for _state in states.FINAL:
    for _reason in states.FAILURE_REASONS if _state == states.FAILED else ("",):
        ENDED.labels(_state, _reason)
    RAN.labels(_state)
for _reason in states.INFRASTRUCTURE_FAILURES:
    RETRIES.labels(_reason)
for _stream in ("log", "status", "dashboard"):
    WATCHERS.labels(_stream)
for _limit in ("active_jobs", "login", "submit_rate"):
    LIMIT_HITS.labels(_limit)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def http_answered(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    """Count an answer by its route's template; whatever matched none is one route, however many paths are tried."""
    method = scope["method"] if scope["method"] in _METHODS else "other"
    template = getattr(scope.get("route"), "path", None)
    route = template or ("/static" if scope["path"].startswith("/static/") and status < 400 else "unmatched")
    counter, histogram = _answers_of(method, route, status)
    counter.inc()
    histogram.observe(seconds)


@lru_cache(maxsize=1024)  # what `labels` does for a look-up costs more than the counting
def _answers_of(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    return HTTP_REQUESTS.labels(method, route, str(status)), HTTP_SECONDS.labels(method, route)


def job_event(event: str, to_state: str, reason: str | None, row: Any) -> None:
    """Count a durable step of a job that was queued; `row` is the job's as it is after the step, its instants in
    microseconds."""
    if event == "started" and not row.infra_failures:
        WAITED.observe((row.started_at - row.created_at) / 1e6)
    elif event == "requeued":
        RETRIES.labels(reason or "").inc()
    elif to_state in states.FINAL:
        ENDED.labels(to_state, (reason or "") if to_state == states.FAILED else "").inc()
        if row.started_at is not None:
            seconds = max(0.0, (row.completed_at - row.started_at) / 1e6)
            RAN.labels(to_state).observe(seconds)
            if to_state != states.CANCELLED and reason not in states.INFRASTRUCTURE_FAILURES:
                RUN_RATIO.observe(seconds / row.expected_time)
