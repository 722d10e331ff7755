"""What the server costs while nothing happens, and how soon it is there again."""

from __future__ import annotations

import contextlib
import json
import time

from benchmarks.measure import Findings, bounded, skipped
from benchmarks.population import filled
from benchmarks.servers import Client, MeasuredServer, Missing, Run, cpu_seconds, resident_bytes, wait_seconds
from tests.server import wait_until

ORDER = 7
TITLE = "Idle, and started again"
ABOUT = """
Eight SSH nodes are connected and no job is there: the processor time and the memory of the server's process. Then, with
a million ended jobs in the database, from the start of the process to the first answer of `/readyz`. Then eight jobs
run on the nodes, the server is ended by `kill -9` and started: from the start of the process to all eight being
followed on their nodes again.
"""
NODES = 8
SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(100000)\n"


def measure(run: Run) -> Findings:
    """Five figures."""
    findings = Findings()
    try:
        fleet = run.fleet(NODES)
    except Missing as missing:
        findings.rows.append(skipped("idle", "% of a core", "", str(missing)))
        return findings
    with run.server({"SANDBOX": "off", **fleet.settings()}) as server:
        wait_seconds(run.scaled(0, 3, 10))  # what connecting to the nodes leaves to be done
        shares = [busy_share(server.pid, run.scaled(1, 10, 60)) for _ in range(run.scaled(1, 1, 3))]
        findings.rows.append(bounded("idle with eight nodes", "% of a core", shares, at_most=1))
        memory = resident_bytes(server.pid) / 1e6
        findings.rows.append(bounded("memory with eight nodes", "MB", [memory], at_most=120))
    ended = run.scaled(3000, 1_000_000, 1_000_000)
    with filled(run, ended=ended, busy=False, settings=fleet.settings()) as server:
        starts = [started(server) for _ in range(run.scaled(1, 3, 15))]
        findings.rows.append(bounded(f"start to ready, {ended:,} jobs", "s", starts, at_most=1.5))
        memory = resident_bytes(server.pid) / 1e6
        findings.rows.append(bounded(f"memory, {ended:,} jobs", "MB", [memory], at_most=120))

        jobs = {
            f"user-{number}": server.submit(f"user-{number}", SLEEPER, expected_time=86400)
            for number in range(len(fleet.nodes))
        }
        for user, job in jobs.items():
            server.wait_for_output(job, user, "up", timeout=60)
        times = [recovered(server, jobs) for _ in range(run.scaled(1, 3, 15))]
        findings.rows.append(bounded("eight jobs followed again after kill -9", "s", times, at_most=2))
        for user, job in jobs.items():
            server.cancel(job, user)
    return findings


def busy_share(pid: int, seconds: float) -> float:
    """Percent of a core that the process uses."""
    before, began = cpu_seconds(pid), time.monotonic()
    wait_seconds(seconds)
    return 100 * (cpu_seconds(pid) - before) / (time.monotonic() - began)


def started(server: MeasuredServer) -> float:
    """Stop the server; seconds from its start to its being ready."""
    server.terminate()
    server.wait_for_nodes = False
    began = time.monotonic()
    server.start()
    return time.monotonic() - began


def recovered(server: MeasuredServer, jobs: dict[str, str]) -> float:
    """Kill the server; seconds from its start to its following every job on its node."""
    server.kill()
    server.wait_for_nodes = False
    began = time.monotonic()
    server.start()
    with contextlib.ExitStack() as things:
        for user, job in jobs.items():
            client = things.enter_context(Client(server.port, server.token(user)))

            def followed(client: Client = client, job: str = job) -> bool:
                status, body = client.get(f"/api/status/{job}")
                answer = json.loads(body)
                if status != 200 or answer["status"] != "running":
                    raise RuntimeError(f"a job that should run on: {status} {answer}")
                return bool(answer["node_reachable"])

            wait_until(followed, 60, "the node to be reached")
    return time.monotonic() - began
