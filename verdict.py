"""What became of a job, judged from the node's exit record and the results. Pure.

May import `states`.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import states

# Reasons in an exit record that are the infrastructure's doing, and what they are called in the interface.
INFRASTRUCTURE = {
    "launch_failed": states.LAUNCH_FAILED,
    "supervisor_lost": states.NODE_LOST,
    "supervisor_terminated": states.NODE_LOST,
    "lease_expired": states.NODE_LOST,
    "superseded": states.NODE_LOST,
}
_INFRASTRUCTURE_TEXT = {
    "launch_failed": "The job could not be started on {node}: {message}",
    "supervisor_lost": "{node} was restarted, or the job's supervisor there was killed, while the job ran.",
    "supervisor_terminated": "{node} was shut down while the job ran.",
    "lease_expired": "{node} heard nothing from the server for too long and ended the job.",
    "superseded": "The attempt on {node} was ended because a newer one had taken its place.",
}


@dataclass(frozen=True)
class Verdict:
    """`state` is final; `failure_reason` is set for `failed` only; `message` is one or two sentences."""

    state: str
    failure_reason: str | None
    message: str


def infrastructure_failure(record: dict[str, Any], node: str) -> tuple[str, str] | None:
    """(failure reason, sentence) when the exit record tells of an infrastructure failure, else None."""
    reason = record.get("reason")
    if reason not in INFRASTRUCTURE:
        return None
    text = _INFRASTRUCTURE_TEXT[reason].format(node=node, message=record.get("message") or "no reason given.")
    return INFRASTRUCTURE[reason], text


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; the number as text for one this system has no name for."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def judge(
    record: dict[str, Any],
    *,
    expected_time: float,
    time_limit: float,
    results_problem: tuple[str, str] | None = None,
) -> Verdict:
    """The verdict on a job that ran. `results_problem`: (failure reason, sentence) when its results are not usable.

    The first thing that went wrong is the reason: a job that failed by itself is not failed for its results.
    """
    reason = record.get("reason")
    if reason == "cancelled":
        return Verdict(states.CANCELLED, None, "Cancelled while it ran; everything it had started was ended.")
    if reason == "timeout":
        return Verdict(
            states.FAILED,
            states.TIMEOUT,
            f"Ended after {time_limit:g} seconds, the limit for an expected_time of {expected_time:g} seconds. "
            "Give a larger expected_time, or make the job faster.",
        )
    if reason == "memory_exceeded":
        return Verdict(states.FAILED, states.MEMORY_EXCEEDED, "Ended because it used more memory than a job may use.")
    number = record.get("signal")
    if number is not None:
        return Verdict(
            states.FAILED,
            states.SIGNAL,
            f"Ended by signal {number} ({signal_name(number)}), which did not come from this server; see stderr.",
        )
    exit_code = record.get("exit_code")
    if exit_code != 0:
        return Verdict(states.FAILED, states.EXIT_CODE, f"Your code ended with exit code {exit_code}; see stderr.")
    if results_problem is not None:
        failure_reason, text = results_problem
        return Verdict(states.FAILED, failure_reason, text)
    return Verdict(states.COMPLETED, None, "Completed.")
