"""What the scripts that also run alone share: a server to check, a line per check, and the command line.

python3 run_basic_tests.py                                 against a server that the script starts and ends
python3 run_basic_tests.py --url URL --user U --token T    against one that runs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import requests as requests
except ModuleNotFoundError:
    sys.exit("requests is not installed. Run: pip3 install requests")

from tests.server import FINAL, Server

HELLO = "print('hello')\n"
SLEEPER = "import time\nprint('on', flush=True)\ntime.sleep(600)\n"
JOB_SECONDS = 120.0
SUBMIT_SECONDS = 90.0  # longer than the minute of the rate limit
POLL = 0.1


class CheckFailed(Exception):
    """What was expected is not so; the message says what is."""


def expect(condition: object, text: str) -> None:
    """Raise CheckFailed with this text unless the condition holds."""
    if not condition:
        raise CheckFailed(text)


def expect_status(response: requests.Response, *statuses: int) -> None:
    """Raise CheckFailed unless the answer has one of these statuses; a refusal must be a problem document."""
    wanted = " or ".join(map(str, statuses))
    expect(response.status_code in statuses, f"{wanted} expected, got {response.status_code}: {response.text[:300]}")
    if response.status_code >= 400:
        expect(isinstance(response.json().get("detail"), str), f"no sentence in the refusal: {response.text[:300]}")
        expect(response.headers.get("X-Request-ID"), "no X-Request-ID in the refusal")


@dataclass
class User:
    """Someone with a token."""

    user_id: str
    token: str

    @property
    def bearer(self) -> dict[str, str]:
        """The Authorization header."""
        return {"Authorization": f"Bearer {self.token}"}


@dataclass
class Target:
    """The server under check and who may use it. `server` only where the script started it."""

    url: str
    user: User
    admin: User | None = None
    server: Server | None = None

    @property
    def own_server(self) -> Server:
        """The server that this script started."""
        assert self.server is not None
        return self.server

    @property
    def administrator(self) -> User:
        """The admin, who is there when the script asked for one."""
        assert self.admin is not None
        return self.admin

    def get(self, path: str, user: User | None = None, **options: Any) -> requests.Response:
        """GET, as a user or as nobody."""
        headers = {**(user.bearer if user else {}), **options.pop("headers", {})}
        return requests.get(f"{self.url}{path}", headers=headers, timeout=60, **options)

    def post(self, path: str, user: User | None = None, **options: Any) -> requests.Response:
        """POST, as a user or as nobody."""
        headers = {**(user.bearer if user else {}), **options.pop("headers", {})}
        return requests.post(f"{self.url}{path}", headers=headers, timeout=60, **options)

    def config(self, user: User, **fields: Any) -> dict[str, Any]:
        """A good config of the user with these fields instead; None removes one."""
        config = {
            "competition_id": "script-checks",
            "project_id": "checks",
            "user_id": user.user_id,
            "expected_time": 60,
            "token": user.token,
            **fields,
        }
        return {name: value for name, value in config.items() if value is not None}

    def send(self, code: str | bytes, config: dict[str, Any] | str | bytes, **options: Any) -> requests.Response:
        """POST /api/submit once."""
        text = json.dumps(config) if isinstance(config, dict) else config
        files = {
            "code": ("solution.py", code, "text/x-python"),
            "config_file": ("config.json", text, "application/json"),
        }
        return self.post("/api/submit", files=files, **options)

    def submit(self, user: User, code: str = HELLO, **fields: Any) -> str:
        """Submit a job that must be taken; waits while the user's limit of submissions per minute asks for it."""
        deadline = time.monotonic() + SUBMIT_SECONDS
        while True:
            response = self.send(code, self.config(user, **fields))
            limited = response.status_code == 429 and "X-RateLimit-Reset" in response.headers
            if not limited or time.monotonic() > deadline:
                expect_status(response, 200)
                return str(response.json()["job_id"])
            wait = int(response.headers["Retry-After"])
            print(f"      ({user.user_id} has submitted enough for this minute: waiting {wait} s)", flush=True)
            time.sleep(wait)

    def status(self, job_id: str, user: User) -> dict[str, Any]:
        """GET /api/status."""
        response = self.get(f"/api/status/{job_id}", user)
        expect_status(response, 200)
        answer: dict[str, Any] = response.json()
        return answer

    def wait(self, job_id: str, user: User, states: Sequence[str] = FINAL) -> dict[str, Any]:
        """The job's status once it is in one of these states."""
        deadline = time.monotonic() + JOB_SECONDS
        while True:
            status = self.status(job_id, user)
            if status["status"] in states:
                return status
            expect(status["status"] not in FINAL, f"the job is {status['status']} already: {status.get('message')}")
            expect(time.monotonic() < deadline, f"the job is still {status['status']} after {JOB_SECONDS:g} s")
            time.sleep(POLL)

    def results(self, job_id: str, user: User) -> dict[str, Any]:
        """Wait for the end; GET /api/results."""
        self.wait(job_id, user)
        response = self.get(f"/api/results/{job_id}", user)
        expect_status(response, 200)
        answer: dict[str, Any] = response.json()
        return answer

    def cancel(self, job_id: str, user: User) -> None:
        """Cancel and wait for the end."""
        expect_status(self.post(f"/api/cancel/{job_id}", user), 200, 202)
        self.wait(job_id, user)


Check = Callable[[Target], None]


def run_checks(target: Target, checks: Sequence[Check]) -> int:
    """Run every check, print a line for each and one at the end; the exit code."""
    passed = failed = 0
    for check in checks:
        name = (check.__doc__ or check.__name__).strip().splitlines()[0].rstrip(".")
        try:
            check(target)
        except Exception as error:  # whatever goes wrong is this check's failure, and the others still run
            failed += 1
            text = str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"
            print(f"FAIL  {name}: {text}", flush=True)
        else:
            passed += 1
            print(f"ok    {name}", flush=True)
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


def _owner(url: str, token: str) -> str:
    """The user whose token it is, as the server says."""
    response = requests.get(f"{url}/api/dashboard", headers={"Authorization": f"Bearer {token}"}, timeout=60)
    try:
        return str(response.json().get("user_id", "unknown"))
    except ValueError:
        return "unknown"


def main(
    description: str,
    checks: Sequence[Check],
    *,
    alone: Sequence[Check] = (),
    admin: bool = False,
    settings: dict[str, str] | None = None,
) -> int:
    """The command line of a script: `checks` against any server, `alone` only against one that it starts itself.

    `admin`: the checks need an administrator too. Returns the exit code: 0 all passed, 1 one failed, 2 usage.
    """
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--url", help="a running server, such as http://localhost:8001; without it one is started")
    parser.add_argument("--token", help="a user's token there; the user must have no job pending or running")
    parser.add_argument("--user", help="whose token it is; left out, the server is asked")
    parser.add_argument("--admin-token", help="the token of an administrator there" if admin else argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.url is None:
        if arguments.token or arguments.user or arguments.admin_token:
            parser.error("--token, --user and --admin-token go with --url")
        return _against_own_server([*checks, *alone], settings or {})
    missing = ["--token"] if arguments.token is None else []
    if admin and arguments.admin_token is None:
        missing.append("--admin-token")
    if missing:
        parser.error(f"with --url this also needs {' and '.join(missing)} (python3 token_manager.py create …)")
    url = arguments.url.rstrip("/")
    try:
        user = User(arguments.user or _owner(url, arguments.token), arguments.token)
        administrator = (
            User(_owner(url, arguments.admin_token), arguments.admin_token) if arguments.admin_token else None
        )
    except requests.RequestException as error:
        print(f"FAIL  no server answers at {url}: {error}\n0 passed, 1 failed")
        return 1
    if alone:
        print(f"({len(alone)} further checks need the server's files and run without --url)", flush=True)
    return run_checks(Target(url, user, administrator), checks)


def _against_own_server(checks: Sequence[Check], settings: dict[str, str]) -> int:
    limits = {"SUBMITS_PER_MINUTE": "10000", "LOGIN_FAILURES_PER_MINUTE": "10000"}
    with Server({**limits, **settings}) as server:
        user = User("script-user", server.token("script-user"))
        administrator = User("script-admin", server.token("script-admin", admin=True))
        return run_checks(Target(server.url, user, administrator, server), checks)


def files_with(folder: Path, secret: str) -> list[str]:
    """The files below the folder that hold this text."""
    found = []
    for place, _, names in os.walk(folder):  # what goes away meanwhile is passed over
        for path in (Path(place) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes():
                    found.append(str(path.relative_to(folder)))
    return found


def temporary_marker() -> Path:
    """A path that no file has; what an attack would make there shows that it worked."""
    return Path(tempfile.gettempdir()) / f"attack-{os.getpid()}-{time.monotonic_ns()}"
