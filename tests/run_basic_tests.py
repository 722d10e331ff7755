#!/usr/bin/env python3
"""The basics through the eyes of a client: submit, status, results, logs, list of jobs, cancel.

python3 run_basic_tests.py
python3 run_basic_tests.py --url http://localhost:8001 --user alice --token alice_token
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.scripts_support import HELLO, SLEEPER, Target, expect, expect_status, main, requests


def the_service_answers(target: Target) -> None:
    """The service says what it offers, and that it is alive and ready."""
    endpoints = target.get("/").json()["endpoints"]
    expect("POST /api/submit" in endpoints.values(), f"endpoints: {endpoints}")
    expect(target.get("/healthz").json()["status"] == "ok", "/healthz is not ok")
    expect_status(target.get("/readyz"), 200)


def a_job_runs(target: Target) -> None:
    """A file is submitted with requests, runs, and its output comes back."""
    code = "import sys\nprint('to stdout')\nprint('to stderr', file=sys.stderr)\n"
    config = target.config(target.user)
    files = {
        'code': ('solution.py', code, 'text/x-python'),
        'config_file': ('config.json', json.dumps(config), 'application/json'),
    }  # fmt: skip
    response = requests.post(f"{target.url}/api/submit", files=files, timeout=60)
    if response.status_code == 429:  # this minute's submissions are used up: wait, as the answer asks
        job_id = target.submit(target.user, code)
    else:
        expect_status(response, 200)
        answer = response.json()
        job_id = answer["job_id"]
        wanted = {"job_id", "status", "node_id", "queue_position", "estimated_start", "created_at", "message"}
        expect(wanted <= set(answer), f"the answer lacks {wanted - set(answer)}")
        expect(response.headers["Location"] == f"/api/status/{job_id}", "no Location of the status")
    results = target.results(job_id, target.user)
    expect(results["status"] == "completed", f"the job is {results['status']}: {results['message']}")
    expect(results["exit_code"] == 0, f"exit code {results['exit_code']}")
    expect(results["stdout"] == "to stdout\n", f"stdout {results['stdout']!r}")
    expect(results["stderr"] == "to stderr\n", f"stderr {results['stderr']!r}")
    expect(results["results"] == [{"output": "to stdout"}], f"results {results['results']}")


def the_status_follows(target: Target) -> None:
    """The status goes from pending over running to its end, with the times of each."""
    job_id = target.submit(target.user, SLEEPER)
    try:
        running = target.wait(job_id, target.user, ("running",))
        expect(running["node_id"], "a running job without a node")
        expect(running["created_at"].endswith("Z"), f"created_at {running['created_at']}")
        response = target.get(f"/api/results/{job_id}", target.user)
        expect_status(response, 409)
    finally:
        target.cancel(job_id, target.user)
    ended = target.status(job_id, target.user)
    expect(ended["status"] == "cancelled", f"the cancelled job is {ended['status']}")
    expect(ended["completed_at"], "no completed_at")


def a_failing_job_fails(target: Target) -> None:
    """A job whose code fails is failed, with its exit code and its traceback."""
    results = target.results(target.submit(target.user, "raise SystemExit(3)\n"), target.user)
    expect((results["status"], results["exit_code"]) == ("failed", 3), f"{results['status']}, {results['exit_code']}")
    expect(results["failure_reason"] == "exit_code", f"failure_reason {results['failure_reason']}")
    results = target.results(target.submit(target.user, "1 / 0\n"), target.user)
    expect("ZeroDivisionError" in results["stderr"], f"stderr {results['stderr']!r}")


def the_results_file_comes_back(target: Target) -> None:
    """What a job writes to RESULTS_FILE comes back as records and as the raw file."""
    code = (
        "import json, os\n"
        "with open(os.environ['RESULTS_FILE'], 'w') as file:\n"
        "    for step in range(3):\n"
        "        file.write(json.dumps({'step': step, 'name': 'ünï'}) + '\\n')\n"
    )
    job_id = target.submit(target.user, code)
    results = target.results(job_id, target.user)
    records = [{"step": step, "name": "ünï"} for step in range(3)]
    expect(results["results"] == records, f"results {results['results']}")
    raw = target.get(f"/api/results/{job_id}?format=jsonl", target.user)
    expect_status(raw, 200)
    expect([json.loads(line) for line in raw.content.splitlines()] == records, f"raw {raw.content!r}")


def the_logs_come_back(target: Target) -> None:
    """The logs hold what the job printed, while it runs and afterwards, from any offset."""
    job_id = target.submit(target.user, "for n in range(100): print(f'line {n}')\n")
    target.wait(job_id, target.user)
    whole = target.get(f"/api/logs/{job_id}", target.user)
    expect_status(whole, 200)
    expect(whole.text == "".join(f"line {n}\n" for n in range(100)), f"logs {whole.text[:100]!r}")
    rest = target.get(f"/api/logs/{job_id}?offset=10", target.user)
    expect(rest.content == whole.content[10:], "the offset is not kept")
    tail = target.get(f"/api/logs/{job_id}?tail=8", target.user)
    expect(tail.content == whole.content[-8:], "the tail is not the end")


def jobs_are_listed(target: Target) -> None:
    """The list of jobs holds the user's own, newest first."""
    job_id = target.submit(target.user, HELLO)
    target.wait(job_id, target.user)
    jobs = target.get("/api/jobs?limit=2", target.user).json()["jobs"]
    expect(jobs[0]["job_id"] == job_id, "the newest job is not the first")
    expect({job["user_id"] for job in jobs} == {target.user.user_id}, "jobs of others are listed")
    expect(jobs[0]["created_at"] >= jobs[-1]["created_at"], "not newest first")


def cancelling_ends_a_job(target: Target) -> None:
    """A running job is ended by cancelling it; one that has ended says already."""
    job_id = target.submit(target.user, SLEEPER)
    target.wait(job_id, target.user, ("running",))
    target.cancel(job_id, target.user)
    expect(target.status(job_id, target.user)["status"] == "cancelled", "not cancelled")
    again = target.post(f"/api/cancel/{job_id}", target.user)
    expect_status(again, 400)
    expect("already" in again.json()["detail"], again.text)


def one_job_at_a_time(target: Target) -> None:
    """A second job of the same user is refused while the first is active."""
    job_id = target.submit(target.user, SLEEPER)
    try:
        second = target.send(HELLO, target.config(target.user))
        expect_status(second, 429)
        expect(int(second.headers["Retry-After"]) >= 1, "no Retry-After")
    finally:
        target.cancel(job_id, target.user)


def nodes_and_dashboard(target: Target) -> None:
    """The nodes are public, the dashboard is for those with a token."""
    nodes = target.get("/api/nodes").json()
    expect(nodes["nodes"], "there are no nodes")
    expect({"node_id", "status", "is_busy"} <= set(nodes["nodes"][0]), f"{nodes['nodes'][0]}")
    expect_status(target.get("/api/dashboard"), 401)
    summary = target.get("/api/dashboard", target.user).json()
    expect(summary["user_id"] == target.user.user_id, f"the dashboard is that of {summary['user_id']}")


CHECKS = (
    the_service_answers,
    a_job_runs,
    the_status_follows,
    a_failing_job_fails,
    the_results_file_comes_back,
    the_logs_come_back,
    jobs_are_listed,
    cancelling_ends_a_job,
    one_job_at_a_time,
    nodes_and_dashboard,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, CHECKS))
