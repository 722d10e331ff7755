#!/usr/bin/env python3
"""Hostile input: ids, paths, configs, headers; and that no token is ever told or kept.

    python3 test_security.py
    python3 test_security.py --url http://localhost:8001 --user alice --token T

Runs by itself; in the test suite `test_scripts.py` runs it. pytest alone finds nothing to run here.
"""

from __future__ import annotations

import http.client
import sys
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.scripts_support import (
    HELLO,
    SLEEPER,
    Target,
    expect,
    expect_status,
    files_with,
    main,
    temporary_marker,
)

IDS = (
    "../../x",
    "/etc/passwd",
    "..",
    ".hidden",
    "-rf",
    "a/b",
    "a\\b",
    "a\nb",
    "a\n",
    "a'b",
    'a"b',
    "$(id)",
    "`id`",
    "a; id",
    "x'; DROP TABLE jobs; --",
    "%2e%2e%2f",
    "",
    " ",
    "a\0b",
    "a" * 65,
    "a" * 10_000,
    "\u0430lice",
    "\uff41lice",
    "al\u200bice",
)


def hostile_ids(target: Target) -> None:
    """Ids that are paths, commands, SQL or look-alikes are 400 and name the field."""
    for name in ("user_id", "competition_id", "project_id"):
        for value in IDS:
            response = target.send(HELLO, target.config(target.user, **{name: value}))
            expect_status(response, 400)
            named = [error["field"] for error in response.json()["errors"]]
            expect(named == [name], f"{name} {value[:20]!r}: {named} are named")


def raw_get(target: Target, path: str) -> tuple[int, str]:
    """GET with the path exactly as given."""
    parts = urlsplit(target.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=60)
    try:
        connection.putrequest("GET", path, skip_accept_encoding=True)
        connection.putheader("Authorization", f"Bearer {target.user.token}")
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    finally:
        connection.close()


def traversal(target: Target) -> None:
    """No path leads out of the folders that are served, nor to a file by a job's id."""
    ups = (
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "....//....//etc/passwd",
    )
    own = ("../main.py", "..%2fmain.py", "%2e%2e%2ftoken.key", "swagger-ui/../../config.py", "//etc/passwd", "%00")
    for base in ("/static/", "/api/status/", "/api/results/", "/api/logs/", "/api/events/", "/"):
        for end in (*ups, *own):
            status, text = raw_get(target, base + end)
            expect(status in (400, 404, 405), f"{base}{end}: {status}")
            expect("root:" not in text and "import " not in text, f"{base}{end} shows a file")


def hostile_job_ids(target: Target) -> None:
    """A job's id that is SQL or a pattern finds nothing."""
    for job_id in ("' OR '1'='1", "%25", "*", "x' UNION SELECT * FROM tokens --", "0;DROP TABLE jobs", "a" * 5000):
        expect_status(target.get(f"/api/status/{job_id}", target.user), 404)
    for value in ("' OR '1'='1", "%", "_", "x' --"):
        response = target.get("/api/jobs", target.user, params={"competition_id": value})
        expect_status(response, 200)
        expect(response.json()["jobs"] == [], f"the filter {value!r} finds jobs")
    expect_status(target.get("/api/jobs", target.user), 200)


def hostile_yaml(target: Target) -> None:
    """YAML that makes objects, grows without end or names a key twice is 400 and does nothing."""
    marker = temporary_marker()
    good = f"competition_id: c\nproject_id: p\nuser_id: {target.user.user_id}\nexpected_time: 60\n"
    good += f"token: {target.user.token}\n"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(97 + n)}: &{chr(97 + n)} [{', '.join([f'*{chr(96 + n)}'] * 9)}]\n" for n in range(1, 9)
    )
    configs = (
        good + f"x: !!python/object/apply:os.system ['touch {marker}']\n",
        good + f"x: !!python/object/new:subprocess.Popen [['touch', '{marker}']]\n",
        good + "x: !!python/name:os.system\n",
        good + "x: !something else\n",
        good + bomb,
        good + "x: &x [*x]\n",
        good + "user_id: root\n",
        good + "x: " + "[" * 5000,
        good + "x: " + "y" * 1_000_000,
        "[]",
        "",
        "\0",
    )
    for config in configs:
        response = target.send(HELLO, config)
        expect_status(response, 400)
        expect(target.user.token not in response.text, "the refusal tells the token")
    expect(not marker.exists(), "the config ran a command")


def hostile_numbers(target: Target) -> None:
    """An expected_time that is no number of seconds in bounds is 400."""
    for value in (0, -1, 0.5, 1e308, float("nan"), float("inf"), True, None, [60], {"s": 60}, "", "soon", "1e400"):
        config = {**target.config(target.user), "expected_time": value}
        expect_status(target.send(HELLO, config), 400)


def tokens_in_odd_places(target: Target) -> None:
    """A token counts in the header and in the config, nowhere else; SQL in its place is 401."""
    token = target.user.token
    expect_status(target.get(f"/api/jobs?token={token}"), 401)
    expect_status(target.get(f"/api/jobs?access_token={token}"), 401)
    expect_status(target.get("/api/jobs", cookies={"token": token, "Authorization": f"Bearer {token}"}), 401)
    expect_status(target.get("/api/jobs", headers={"X-Token": token, "Authorization": f"Basic {token}"}), 401)
    for wrong in ("' OR '1'='1", token + "x", token[:-1], token.swapcase(), "x" * 5000):
        expect_status(target.get("/api/jobs", headers={"Authorization": f"Bearer {wrong}"}), 401)


def the_token_is_never_told(target: Target) -> None:
    """No answer holds the token, and the job does not see it."""
    code = "import os\nprint(dict(os.environ))\nprint(os.listdir('.'))\nprint(open('solution.py').read())\n"
    job_id = target.submit(target.user, code)
    results = target.results(job_id, target.user)
    expect(results["status"] == "completed", f"{results['status']}: {results['stderr']}")
    paths = [f"/api/{what}/{job_id}" for what in ("status", "results", "logs", "events")]
    for path in (*paths, "/api/jobs", "/api/dashboard", "/api/nodes", "/openapi.json"):
        response = target.get(path, target.user)
        expect_status(response, 200)
        expect(target.user.token not in response.text, f"{path} holds the token")
    for config in ({"token": target.user.token}, target.config(target.user, expected_time="x")):
        expect(target.user.token not in target.send(HELLO, config).text, "a refusal holds the token")
    secrets = [name for name in ("TOKEN", "DATABASE", "SSH", "SECRET", "KEY_FILE") if name in results["stdout"].upper()]
    expect(not secrets, f"the job's environment names {secrets}")


def headers_are_safe(target: Target) -> None:
    """Every answer has the security headers, and no header can be smuggled in."""
    for path in ("/", "/docs", "/api/nodes", "/api/jobs", "/nothing", "/static/swagger-ui/swagger-ui.css"):
        headers = target.get(path).headers
        expect(headers.get("X-Content-Type-Options") == "nosniff", f"{path}: no nosniff")
        expect(headers.get("X-Frame-Options") == "DENY", f"{path}: may be framed")
        expect(headers.get("Referrer-Policy") == "no-referrer", f"{path}: no Referrer-Policy")
        expect("Server" not in headers, f"{path}: tells the server software")
        expect("Access-Control-Allow-Origin" not in headers, f"{path}: other sites may read it")
    odd = target.get("/api/nodes", headers={"X-Request-ID": "a<b>c"}).headers["X-Request-ID"]
    expect("<" not in odd, f"the request's id is {odd!r}")
    response = target.get("/nothing%0d%0aX-Injected:%20yes")
    expect("X-Injected" not in response.headers, "a header was smuggled in")


def output_is_only_output(target: Target) -> None:
    """What a job prints is told as text: markup stays markup in JSON, never a page."""
    code = "print('<script>alert(1)</script>\\x1b[31m\\x00')\n"
    job_id = target.submit(target.user, code)
    results = target.results(job_id, target.user)
    expect(results["stdout"] == "<script>alert(1)</script>\x1b[31m\x00\n", f"stdout {results['stdout']!r}")
    for path in (f"/api/results/{job_id}", f"/api/logs/{job_id}", f"/api/results/{job_id}?format=jsonl"):
        kind = target.get(path, target.user).headers["Content-Type"]
        expect("html" not in kind, f"{path} is {kind}")


def no_files_hold_the_token(target: Target) -> None:
    """No file of the server holds the token, while a job runs and afterwards."""
    server = target.own_server
    job_id = target.submit(target.user, SLEEPER)
    target.wait(job_id, target.user, ("running",))
    running = files_with(server.folder, target.user.token)
    target.cancel(job_id, target.user)
    expect(not running, f"while a job ran: {running}")
    ended = files_with(server.folder, target.user.token)
    expect(not ended, f"after it: {ended}")


def nothing_was_written_beside_the_jobs(target: Target) -> None:
    """After all of this the folder of jobs holds jobs and results only."""
    server = target.own_server
    jobs = {job["job_id"] for job in target.get("/api/jobs?limit=500", target.administrator).json()["jobs"]}
    found = {path.name for path in server.jobs_dir.iterdir() if not path.name.startswith(".")}
    expect(found <= jobs | {"results"}, f"beside the jobs: {sorted(found - jobs)}")
    expect("Traceback" not in server.log(), "the server's log holds a traceback")


CHECKS = (
    hostile_ids,
    traversal,
    hostile_job_ids,
    hostile_yaml,
    hostile_numbers,
    tokens_in_odd_places,
    the_token_is_never_told,
    headers_are_safe,
    output_is_only_output,
)
ALONE = (no_files_hold_the_token, nothing_was_written_beside_the_jobs)

if __name__ == "__main__":
    sys.exit(main(__doc__, CHECKS, alone=ALONE))
