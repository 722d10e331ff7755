"""From the answer to a submission to the first line of user code on a warm SSH node."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from benchmarks.measure import OURS, Findings, Goal, compare, interleaved, skipped
from benchmarks.servers import Missing, Run, User, delayed, wait_seconds
from benchmarks.starts import FIRST_LINE, Bare
from tests.fleet import Fleet
from tests.server import Server, wait_until

ORDER = 1
TITLE = "Dispatch"
ABOUT = """
From the moment the client has the answer "queued" to the first line of the job's code, on an idle node whose
connection is warm, beside starting the same interpreter with the same options by `subprocess` on this machine. The
job notes the moment itself, on the machine's monotonic clock. With a wire: the node's SSH port behind a relay that
delays each byte by half a round trip of 100 ms each way; the limit is 1.2 round trips more than the limit without.
In the sandbox: what bubblewrap costs by itself is added to the limit. The answer itself is sent after the job is
committed to disk; the node may then already be at work. On an idle node the job's interpreter waits already, in its
sandbox (`PRESTART`); a job that comes within 20 ms of the last one's end starts its own.
"""
ROUND_TRIP = 0.1
WITHIN = 1.5


def measure(run: Run) -> Findings:
    """Three figures: plain, over a wire, in the sandbox."""
    findings = Findings()
    try:
        fleet = run.fleet(1)
    except Missing as missing:
        findings.rows.append(skipped("ack to first line", "ms", "bare start", str(missing)))
        return findings
    with Bare.of_fleet(fleet) as bare:
        with run.server({"SANDBOX": "off", **fleet.settings()}) as server:
            values = interleaved(
                {OURS: dispatch(server), "bare start": bare.to_first_line}, rounds=run.rounds, seconds=run.seconds
            )
            findings.rows += compare("ack to first line", "ms", values, {"bare start": Goal(at_most=WITHIN)})
        with (
            delayed(fleet.node(1).port, ROUND_TRIP) as port,
            run.server({"SANDBOX": "off", **behind(fleet, port)}) as server,
        ):
            values = interleaved(
                {OURS: dispatch(server), "bare start": bare.to_first_line}, rounds=run.rounds, seconds=run.seconds
            )
            limit = [1.2 * ROUND_TRIP * 1000 + WITHIN * start for start in values["bare start"]]
            name = f"1.2 round trips + {WITHIN} bare starts"
            findings.rows += compare(
                "the same, 100 ms round trip", "ms", {OURS: values[OURS], name: limit}, {name: Goal(at_most=1)}
            )
        box = bare.bubblewrap()
        if not box:
            findings.rows.append(skipped("the same, in the sandbox", "ms", "bubblewrap", "bubblewrap is not installed"))
            return findings
        with run.server({"SANDBOX": "required", **fleet.settings()}) as server:
            values = interleaved(
                {
                    OURS: dispatch(server),
                    "bare start": bare.to_first_line,
                    "in bubblewrap": lambda: bare.to_first_line(box),
                },
                rounds=run.rounds,
                seconds=run.seconds,
            )
            name = f"{WITHIN} bare starts + bubblewrap's own cost"
            pairs = zip(values["bare start"], values["in bubblewrap"], strict=True)
            limit = [WITHIN * start + max(0.0, boxed - start) for start, boxed in pairs]
            findings.rows += compare(
                "the same, in the sandbox", "ms", {OURS: values[OURS], name: limit}, {name: Goal(at_most=1)}
            )
    return findings


def behind(fleet: Fleet, port: int) -> dict[str, str]:
    """The fleet's settings with its node's SSH port behind another one."""
    settings = fleet.settings()
    node = json.loads(settings["GPU_NODES"])[0]
    known = fleet.known_hosts.with_name(f"known_hosts_{port}")
    known.write_text(fleet.known_hosts.read_text().replace(f"]:{node['port']} ", f"]:{port} "))
    return {**settings, "GPU_NODES": json.dumps([{**node, "port": port}]), "SSH_KNOWN_HOSTS": str(known)}


def dispatch(server: Server) -> Callable[[], float]:
    """A side: milliseconds from the answer to the first line."""
    user = User(server, "alice")
    request = user.submission(FIRST_LINE)

    def once() -> float:
        status, body = user.client.exchange(request)
        answered = time.monotonic()
        if status != 200:
            raise RuntimeError(f"not accepted: {status} {body!r}")
        wait_seconds(0.05)  # asking at once would take the processor from what is measured
        answer = wait_until(lambda: ended(user, json.loads(body)["job_id"]), 30, "the job to end")
        return (float(answer["stdout"]) - answered) * 1000

    return once


def ended(user: User, job_id: str) -> dict[str, str] | None:
    """The results, once they are there."""
    status, body = user.client.get(f"/api/results/{job_id}")
    return json.loads(body) if status == 200 else None
