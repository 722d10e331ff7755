"""A whole job that does nothing: from sending the submission to having its results, in one request."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.measure import OURS, Findings, Goal, compare, interleaved, skipped, timed
from benchmarks.servers import Missing, Run, User
from benchmarks.starts import Bare
from tests.server import Server

ORDER = 2
TITLE = "A whole no-op job"
ABOUT = """
`POST /api/submit?wait=true` with a file that says `pass`, until the results are in the answer: the submission, the
claim and the end are each committed to disk (`synchronous=FULL`), the results file is published. The interpreter waits
already where the node had 20 ms since the last job. Beside `subprocess.run` of the same interpreter on the same file.
"""


def measure(run: Run) -> Findings:
    """On a slot of this machine and on an SSH node; without and with sandbox."""
    findings = Findings()
    with run.server({"SANDBOX": "off"}) as server, Bare.of_this_machine() as bare:
        figure(findings, run, "slot on this machine", server, bare, Goal(at_most=3))
    try:
        fleet = run.fleet(1)
    except Missing as missing:
        findings.rows.append(skipped("SSH node", "ms", "bare start", str(missing)))
        return findings
    with Bare.of_fleet(fleet) as bare:
        with run.server({"SANDBOX": "off", **fleet.settings()}) as server:
            figure(findings, run, "SSH node", server, bare, Goal(at_most=3))
        if bare.bubblewrap():
            with run.server({"SANDBOX": "required", **fleet.settings()}) as server:
                figure(findings, run, "SSH node, in the sandbox", server, bare, None)
    return findings


def figure(findings: Findings, run: Run, name: str, server: Server, bare: Bare, goal: Goal | None) -> None:
    """One row."""
    values = interleaved({OURS: whole(server), "bare start": bare.whole}, rounds=run.rounds, seconds=run.seconds)
    findings.rows += compare(name, "ms", values, {"bare start": goal} if goal else {})


def whole(server: Server) -> Callable[[], float]:
    """A side: milliseconds of one job."""
    user = User(server, "alice")
    request = user.submission(wait=True)
    return lambda: timed(lambda: user.run(request))
