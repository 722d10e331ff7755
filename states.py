"""Job states, failure reasons, node states, and what may follow what. May import nothing of the project."""

from __future__ import annotations

PENDING = "pending"
RUNNING = "running"
COMPLETED = "completed"
FAILED = "failed"
CANCELLED = "cancelled"

JOB_STATES = (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED)
ACTIVE = (PENDING, RUNNING)
FINAL = (COMPLETED, FAILED, CANCELLED)

# (from, to); `running -> running` is a change of owner (adoption), not of state.
TRANSITIONS = frozenset(
    {
        (None, PENDING),
        (PENDING, RUNNING),
        (PENDING, CANCELLED),
        (PENDING, FAILED),
        (RUNNING, PENDING),
        (RUNNING, COMPLETED),
        (RUNNING, FAILED),
        (RUNNING, CANCELLED),
    }
)

# The job's own doing: never retried.
EXIT_CODE = "exit_code"
SIGNAL = "signal"
TIMEOUT = "timeout"
MEMORY_EXCEEDED = "memory_exceeded"
RESULTS_MISSING = "results_missing"
RESULTS_INVALID = "results_invalid"
RESULTS_TOO_LARGE = "results_too_large"
# The infrastructure's doing: retried on another node, never charged to the user.
NODE_LOST = "node_lost"
LAUNCH_FAILED = "launch_failed"
NODE_DISK_FULL = "node_disk_full"
GPU_FAULT = "gpu_fault"

USER_FAILURES = (
    EXIT_CODE,
    SIGNAL,
    TIMEOUT,
    MEMORY_EXCEEDED,
    RESULTS_MISSING,
    RESULTS_INVALID,
    RESULTS_TOO_LARGE,
)
INFRASTRUCTURE_FAILURES = (NODE_LOST, LAUNCH_FAILED, NODE_DISK_FULL, GPU_FAULT)
FAILURE_REASONS = USER_FAILURES + INFRASTRUCTURE_FAILURES

NODE_ONLINE = "online"
NODE_BUSY = "busy"
NODE_OFFLINE = "offline"
NODE_DRAINING = "draining"
NODE_QUARANTINED = "quarantined"
NODE_STATES = (NODE_ONLINE, NODE_BUSY, NODE_OFFLINE, NODE_DRAINING, NODE_QUARANTINED)
