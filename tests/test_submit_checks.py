"""POST /api/submit: each check and its answer, the order of the checks, and hostile ids, code, configs and clients.

Every refusal here is a problem document with a sentence, carries the request's id, and leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

import clock
from auth import TokenDigest
from database import Database
from tests.scripts_support import files_with
from tests.server import Server, wait_until
from token_manager import TokenManager

CODE_MOST = 2_000_000
CONFIG_MOST = 1 << 16
HONEST = "print('hello')\n"
SYNTAX_ERROR = "x = 1\nif x\n    pass\n"
UNKNOWN = "no-such-token-at-all"


class OpenServer(Server):
    """Also counts as started when its disk is below the floor."""

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()[-4000:]
        try:
            return requests.get(f"{self.url}/readyz", timeout=5).status_code in (200, 503)
        except requests.ConnectionError:
            return False


def token_manager(server: Server) -> tuple[Database, TokenManager]:
    """What the command line works with; it takes a second for each call."""
    database = Database(f"sqlite:///{server.folder / 'database.db'}")
    return database, TokenManager(database, TokenDigest.from_file(server.folder / "token.key"))


def add_users(server: Server, *users: str) -> None:
    """Tokens for these users, and for root, an admin."""
    database, manager = token_manager(server)
    for user_id in ("root", *users):
        server.tokens[user_id] = f"token-of-{user_id}-{os.urandom(8).hex()}"
        manager.create(user_id, server.tokens[user_id], is_admin=user_id == "root")
    database.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server whose limits in time are out of the way."""
    settings = {
        "SUBMITS_PER_MINUTE": "100000",
        "LOGIN_FAILURES_PER_MINUTE": "100000",
        "MAX_CODE_BYTES": str(CODE_MOST),
    }
    with Server(settings) as running:
        add_users(running, "alice", "bob", "a", "a_b")
        yield running


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    """A server that checks the syntax, takes three submissions a minute and waits two seconds for a body."""
    settings = {
        "CHECK_SYNTAX": "true",
        "SUBMITS_PER_MINUTE": "3",
        "LOGIN_FAILURES_PER_MINUTE": "100000",
        "REQUEST_BODY_TIMEOUT": "2",
        "MAX_CODE_BYTES": str(CODE_MOST),
    }
    with OpenServer(settings) as running:
        add_users(running, "syn", "good", "fast", "slow", "busy", "gone")
        yield running


# -- what a refusal must look like ---------------------------------------------------------------------------------


def all_jobs(server: Server) -> list[str]:
    """The ids of the newest jobs of all users, newest first."""
    jobs = server.get("/api/jobs?limit=500", "root").json()["jobs"]
    return [str(job["job_id"]) for job in jobs]


def strangers(server: Server, jobs: list[str]) -> set[str]:
    """What lies in the folder of jobs and belongs neither to a job nor to the nodes."""
    found = {path.name for path in server.jobs_dir.iterdir() if path.name not in {*jobs, "results", ".nodes"}}
    results = {path.name for path in (server.jobs_dir / "results").iterdir()}
    return found | {
        name for name in results if re.fullmatch(r"\.?[\w.-]+_[\w.-]+_\d{8}_\d{6}(_\d+)?\.jsonl", name) is None
    }


def assert_problem(response: requests.Response, status: int) -> dict[str, Any]:
    """The answer is a problem document with that status, a sentence and the request's id."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert isinstance(problem["detail"], str)
    assert problem["detail"].endswith(".")
    assert problem["title"]
    assert response.headers["X-Request-ID"] == problem["request_id"] != ""
    if status in (429, 503):
        assert int(response.headers["Retry-After"]) >= 1
    if status == 401:
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
    return problem


@dataclass
class Refusals:
    """Refusals of one server; at the end nothing may have been queued or written."""

    server: Server
    before: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.before = all_jobs(self.server)

    def __call__(self, response: requests.Response, status: int) -> dict[str, Any]:
        problem = assert_problem(response, status)
        assert all_jobs(self.server) == self.before, "a refused submission made a job"
        assert strangers(self.server, self.before) == set(), "a refused submission left files"
        return problem


@pytest.fixture
def refused(server: Server) -> Refusals:
    """Call it with a response and the status it must have."""
    return Refusals(server)


def fields(problem: dict[str, Any]) -> list[str]:
    """The names of the wrong fields."""
    return sorted(error["field"] for error in problem["errors"])


def config_of(server: Server, **values: Any) -> dict[str, Any]:
    """A good config of alice with these fields instead; None removes one."""
    config = {**server.config("alice"), **values}
    return {name: value for name, value in config.items() if value is not None}


def bearer(token: str) -> dict[str, str]:
    """The Authorization header."""
    return {"Authorization": f"Bearer {token}"}


def multipart(*parts: tuple[str, bytes], boundary: str = "B0undary", end: bool = True) -> bytes:
    """A multipart body of (name, content) parts."""
    body = b""
    for name, content in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + (f"--{boundary}--\r\n".encode() if end else b"")


def send(
    server: Server, body: bytes | Iterator[bytes], *, headers: dict[str, str] | None = None, **query: Any
) -> requests.Response:
    """POST the body as multipart/form-data; an iterator is sent in chunks, without a length."""
    return requests.post(
        f"{server.url}/api/submit",
        data=body,
        params=query or None,
        headers={"Content-Type": "multipart/form-data; boundary=B0undary", **(headers or {})},
        timeout=60,
    )


def chunks(body: bytes, size: int = 50_000) -> Iterator[bytes]:
    """The body in pieces."""
    for start in range(0, len(body), size):
        yield body[start : start + size]


# -- size: 413 -----------------------------------------------------------------------------------------------------


def test_too_much_code_is_413(server: Server, refused: Refusals) -> None:
    problem = refused(server.post(b"#" * (CODE_MOST + 1), server.config("alice")), 413)
    assert str(CODE_MOST) in problem["detail"]


def test_code_of_exactly_the_limit_is_taken(server: Server) -> None:
    code = HONEST.encode() + b"#" * (CODE_MOST - len(HONEST))
    assert server.run_job("alice", code)["stdout"] == "hello\n"


def test_too_much_code_without_a_content_length_is_413(server: Server, refused: Refusals) -> None:
    body = multipart(("code", b"#" * (CODE_MOST + 1)), ("config_file", json.dumps(server.config("alice")).encode()))
    refused(send(server, chunks(body)), 413)


def test_a_body_beyond_all_limits_without_a_content_length_is_413(server: Server, refused: Refusals) -> None:
    body = multipart(("code", b"pass\n"), ("something_else", b"#" * 8_000_000))
    refused(send(server, chunks(body)), 413)


def test_a_content_length_beyond_all_limits_is_413_before_the_body_is_sent(server: Server) -> None:
    before = all_jobs(server)
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(
            b"POST /api/submit HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
            b"Content-Length: 100000000\r\n\r\n"
        )
        head = client.recv(4096)
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in head
    assert b"x-request-id" in head.lower()
    assert all_jobs(server) == before


def test_a_client_that_sends_all_of_a_huge_body_still_gets_the_413(server: Server, refused: Refusals) -> None:
    refused(server.post(b"#" * 30_000_000, server.config("alice")), 413)


def test_size_comes_before_a_missing_part(server: Server, refused: Refusals) -> None:
    refused(server.post(b"#" * (CODE_MOST + 1), None), 413)


def test_size_comes_before_a_config_that_is_too_large(server: Server, refused: Refusals) -> None:
    refused(send(server, multipart(("config_file", b" " * 70_000), ("code", b"#" * (CODE_MOST + 1)))), 413)


# -- a part missing: 422 -------------------------------------------------------------------------------------------


def test_a_missing_part_is_422_and_named(server: Server, refused: Refusals) -> None:
    assert fields(refused(server.post(None, server.config("alice")), 422)) == ["code"]
    assert fields(refused(server.post(HONEST, None), 422)) == ["config_file"]
    assert fields(refused(send(server, multipart(("other", b"x"))), 422)) == ["code", "config_file"]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b'{"code": "x", "config_file": "y"}'),
        ("application/x-www-form-urlencoded", b"code=x&config_file=y"),
        ("multipart/form-data", b"no boundary is named"),
        ("", b""),
    ],
)
def test_a_body_that_is_no_multipart_form_lacks_both_parts(
    server: Server, refused: Refusals, content_type: str, body: bytes
) -> None:
    answer = requests.post(f"{server.url}/api/submit", data=body, headers={"Content-Type": content_type}, timeout=30)
    assert fields(refused(answer, 422)) == ["code", "config_file"]


def test_a_missing_part_comes_before_everything_that_can_be_wrong_with_the_config(
    server: Server, refused: Refusals
) -> None:
    assert fields(refused(server.post(None, "not: [a config"), 422)) == ["code"]
    assert fields(refused(server.post(None, config_of(server, user_id="../x", token=UNKNOWN)), 422)) == ["code"]
    assert fields(refused(server.post(None, b" " * (CONFIG_MOST + 1)), 422)) == ["code"]
    assert fields(refused(server.post(HONEST, None, headers={"Authorization": "nonsense"}), 422)) == ["config_file"]


@pytest.mark.parametrize(
    "body",
    [
        b"this is no multipart body at all",
        multipart(("code", b"pass\n"), end=False),
        multipart(("code", b"pass\n"), ("config_file", b"{}"))[:-6],
        multipart(*[("other", b"x")] * 100),
        multipart(("code", b"1"), ("code", b"2"), ("config_file", b"{}")),
        b'--B0undary\r\nContent-Disposition: form-data; name="code"\r\nX: '
        + b"y" * 20_000
        + b"\r\n\r\n1\r\n--B0undary--",
        b"--B0undary\r\n\x00\xff\r\n\r\n1\r\n--B0undary--",
    ],
    ids=["no-multipart", "cut", "cut-at-the-end", "many-parts", "twice", "long-part-header", "bad-part-header"],
)
def test_a_broken_multipart_body_is_refused(server: Server, refused: Refusals, body: bytes) -> None:
    refused(send(server, body), 400)


# -- config: 400, every bad field at once --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["competition_id", "project_id", "user_id", "expected_time", "token"])
def test_a_missing_field_is_400_and_named(server: Server, refused: Refusals, name: str) -> None:
    problem = refused(server.post(HONEST, config_of(server, **{name: None})), 400)
    assert fields(problem) == [name]
    assert name in problem["detail"]


def test_every_bad_field_is_named_at_once(server: Server, refused: Refusals) -> None:
    everything = ["competition_id", "expected_time", "project_id", "token", "user_id"]
    assert fields(refused(server.post(HONEST, "{}"), 400)) == everything
    bad = {"competition_id": "../x", "project_id": 7, "user_id": "", "expected_time": -1, "token": ["a"]}
    problem = refused(server.post(HONEST, bad), 400)
    assert fields(problem) == everything
    assert all(name in problem["detail"] for name in everything)


def test_two_tokens_that_disagree_are_named_along_with_the_other_bad_fields(server: Server, refused: Refusals) -> None:
    config = config_of(server, token=UNKNOWN, expected_time=0)
    problem = refused(server.post(HONEST, config, headers=server.bearer("alice")), 400)
    assert fields(problem) == ["expected_time", "token"]


def test_a_bad_config_comes_before_a_bad_token(server: Server, refused: Refusals) -> None:
    assert fields(refused(server.post(HONEST, config_of(server, token=UNKNOWN, expected_time=0)), 400)) == [
        "expected_time"
    ]
    others = config_of(server, token=server.token("bob"), project_id="..")
    assert fields(refused(server.post(HONEST, others), 400)) == ["project_id"]
    refused(server.post(HONEST, "- a list", headers=bearer(UNKNOWN)), 400)
    malformed = {"Authorization": "Basic YWxpY2U6eA=="}
    assert fields(refused(server.post(HONEST, config_of(server, user_id="-"), headers=malformed), 400)) == ["user_id"]


# -- token: 401, 403 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_tokens(server: Server) -> dict[str, str]:
    """A token of each kind that no longer works."""
    database, manager = token_manager(server)
    with pytest.MonkeyPatch.context() as patch:
        forty_days_ago = clock.now_us() - 40 * 86_400_000_000
        patch.setattr(clock, "now_us", lambda: forty_days_ago)
        manager.create("carol", "token-of-carol-expired")
    manager.create("dave", "token-of-dave-revoked")
    manager.revoke(token="token-of-dave-revoked")
    manager.create("erin", "token-of-erin-replaced")
    manager.create("erin", "token-of-erin-now")
    database.close()
    return {
        "carol": "token-of-carol-expired",
        "dave": "token-of-dave-revoked",
        "erin": "token-of-erin-replaced",
        "alice": UNKNOWN,
    }


@pytest.mark.parametrize(
    ("user_id", "reason"), [("alice", "unknown"), ("carol", "expired"), ("dave", "revoked"), ("erin", "revoked")]
)
def test_a_token_that_does_not_work_is_401_and_the_reason_is_told(
    server: Server, old_tokens: dict[str, str], refused: Refusals, user_id: str, reason: str
) -> None:
    config = config_of(server, user_id=user_id, token=old_tokens[user_id])
    assert reason in refused(server.post(HONEST, config), 401)["detail"]
    del config["token"]
    assert reason in refused(server.post(HONEST, config, headers=bearer(old_tokens[user_id])), 401)["detail"]


@pytest.mark.parametrize("header", ["nonsense", "Basic YWxpY2U6eA==", "Bearer", "Bearer ", "Token abc"])
def test_an_authorization_header_that_is_no_bearer_token_is_401(server: Server, refused: Refusals, header: str) -> None:
    refused(server.post(HONEST, server.config("alice"), headers={"Authorization": header}), 401)


def test_an_unknown_token_comes_before_the_question_whose_it_is(server: Server, refused: Refusals) -> None:
    refused(server.post(HONEST, server.config("bob", token=UNKNOWN)), 401)


def test_the_token_of_another_user_is_403_even_that_of_an_admin(server: Server, refused: Refusals) -> None:
    for other in ("bob", "root"):
        refused(server.post(HONEST, config_of(server, token=server.token(other))), 403)
        refused(server.post(HONEST, config_of(server, token=None), headers=server.bearer(other)), 403)


def test_the_token_may_stand_in_the_config_in_the_header_or_in_both(server: Server, refused: Refusals) -> None:
    token = server.token("alice")
    places: list[tuple[str | None, dict[str, str]]] = [
        (token, {}),
        (None, bearer(token)),
        (token, bearer(token)),
        (None, {"Authorization": f"bearer  {token} "}),
    ]
    for in_config, headers in places:
        answer = server.post(HONEST, config_of(server, token=in_config), headers=headers, wait=60)
        assert answer.status_code == 200, answer.text
    refused = Refusals(server)
    for in_config, in_header in ((token, server.token("bob")), (server.token("bob"), token), (token, UNKNOWN)):
        problem = refused(server.post(HONEST, config_of(server, token=in_config), headers=bearer(in_header)), 400)
        assert fields(problem) == ["token"]


# -- syntax --------------------------------------------------------------------------------------------------------


def test_code_with_a_syntax_error_runs_and_its_traceback_is_the_result(server: Server) -> None:
    answer = server.run_job("alice", SYNTAX_ERROR)
    assert (answer["status"], answer["failure_reason"], answer["exit_code"]) == ("failed", "exit_code", 1)
    assert "SyntaxError" in answer["stderr"]
    assert "line 2" in answer["stderr"]


def test_with_check_syntax_it_is_400_with_line_and_column(strict: Server) -> None:
    refused = Refusals(strict)
    for code, line in ((SYNTAX_ERROR, 2), ("print('open\n", 1), ("a = 1\nb = 2\n  c = 3\n", 3)):
        problem = refused(strict.post(code, strict.config("syn")), 400)
        assert fields(problem) == ["code"]
        assert re.search(rf"line {line}, column \d+", problem["detail"])
    for code_bytes in (b"x = 1\0\n", "x = 'ü'\n".encode("utf-16"), b"x = '\xff'\n", b"(" * 100_000, b"-" * 100_000):
        assert fields(refused(strict.post(code_bytes, strict.config("syn")), 400)) == ["code"]


def test_with_check_syntax_the_token_is_looked_at_first(strict: Server) -> None:
    refused = Refusals(strict)
    refused(strict.post(SYNTAX_ERROR, strict.config("syn", token=UNKNOWN)), 401)
    refused(strict.post(SYNTAX_ERROR, strict.config("syn", token=strict.token("root"))), 403)
    refused(strict.post(SYNTAX_ERROR, strict.config("syn", expected_time="soon")), 400)


def test_with_check_syntax_good_code_runs(strict: Server) -> None:
    assert strict.run_job("good", "import sys\nprint('hello')\n")["stdout"] == "hello\n"


# -- limits: 429 ---------------------------------------------------------------------------------------------------


def test_more_submissions_than_a_minute_allows_are_429_and_say_when_to_come_back(strict: Server) -> None:
    for _ in range(5):  # refused before the limit is looked at: they cost nothing
        assert strict.post(SYNTAX_ERROR, strict.config("fast")).status_code == 400
    began = time.time()
    left = []
    while (answer := strict.post(HONEST, strict.config("fast"), wait=60)).status_code == 200:
        left.append(answer.headers["X-RateLimit-Remaining"])
        assert len(left) < 20
    assert left[:3] == ["2", "1", "0"]  # more of them only where the first is a minute old by then
    refused = Refusals(strict)
    assert "Rate limit exceeded" in refused(answer, 429)["detail"]
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert answer.headers["X-RateLimit-Limit"] == "3"
    assert answer.headers["X-RateLimit-Remaining"] == "0"
    assert began < int(answer.headers["X-RateLimit-Reset"]) <= time.time() + 61
    # What comes earlier in the order is still answered first.
    refused(strict.post(SYNTAX_ERROR, strict.config("fast")), 400)
    refused(strict.post(HONEST, strict.config("fast", token=UNKNOWN)), 401)
    # And others are not concerned.
    assert strict.post(HONEST, strict.config("slow"), wait=60).status_code == 200


def test_a_second_active_job_is_429_and_the_rate_is_looked_at_first(strict: Server) -> None:
    job = strict.submit("busy", "import time\ntime.sleep(600)\n", expected_time=700)
    refused = Refusals(strict)
    for _ in range(2):
        answer = strict.post(HONEST, strict.config("busy"))
        assert refused(answer, 429)["detail"].startswith("Queue limit exceeded")
        assert 1 <= int(answer.headers["Retry-After"]) <= 3600
    assert refused(strict.post(HONEST, strict.config("busy")), 429)["detail"].startswith("Rate limit exceeded")
    assert strict.cancel(job, "busy").status_code == 200


def test_a_job_that_has_ended_makes_room(server: Server) -> None:
    job = server.submit("alice", "import time\ntime.sleep(600)\n")
    assert "Queue limit exceeded" in server.post(HONEST, server.config("alice")).json()["detail"]
    assert server.cancel(job, "alice").status_code == 200
    assert server.run_job("alice")["status"] == "completed"


# -- no room: 503 --------------------------------------------------------------------------------------------------


def test_a_disk_below_the_floor_is_503_after_every_other_check_and_running_jobs_go_on() -> None:
    with OpenServer({"SUBMITS_PER_MINUTE": "3", "MAX_CODE_BYTES": str(CODE_MOST), "CHECK_SYNTAX": "true"}) as server:
        add_users(server, "alice", "bob")
        job = server.submit("alice", "import pathlib, time\nprint('on', flush=True)\ntime.sleep(600)\n")
        server.wait_for_output(job, "alice", "on")
        server.terminate()
        server.settings["MIN_FREE_DISK"] = str(1 << 60)
        server.start()
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert "MIN_FREE_DISK" in " ".join(ready.json()["reasons"])

        refused = Refusals(server)
        # Earlier checks first: size, parts, config, token, owner, syntax, active job, rate.
        refused(server.post(b"#" * (CODE_MOST + 1), server.config("bob")), 413)
        refused(server.post(None, server.config("bob")), 422)
        refused(server.post(HONEST, "{}"), 400)
        refused(server.post(HONEST, server.config("bob", token=UNKNOWN)), 401)
        refused(server.post(HONEST, server.config("bob", token=server.token("alice"))), 403)
        refused(server.post(SYNTAX_ERROR, server.config("bob")), 400)
        problem = refused(server.post(HONEST, server.config("alice")), 429)
        assert problem["detail"].startswith("Queue limit exceeded")
        for _ in range(3):
            assert "disk" in refused(server.post(HONEST, server.config("bob")), 503)["detail"]
        assert refused(server.post(HONEST, server.config("bob")), 429)["detail"].startswith("Rate limit exceeded")

        assert server.status(job, "alice")["status"] == "running"
        assert server.cancel(job, "alice").status_code == 200


# -- hostile ids ---------------------------------------------------------------------------------------------------

HOSTILE_IDS = {
    "parent": "../../x",
    "absolute": "/etc/passwd",
    "slash": "a/b",
    "backslash": "a\\b",
    "dots": "..",
    "dot": ".",
    "leading-dot": ".alice",
    "leading-dash": "-alice",
    "dashes": "--help",
    "newline": "alice\nx",
    "newline-at-the-end": "alice\n",
    "carriage-return": "alice\r\n",
    "quote": "alice'x",
    "double-quote": 'alice"x',
    "shell": "$(touch /tmp/x)",
    "backticks": "`id`",
    "sql": "alice'; DROP TABLE jobs; --",
    "semicolon": "a;b",
    "space": "alice x",
    "space-around": " alice ",
    "empty": "",
    "nul": "alice\0",
    "percent": "%2e%2e%2f",
    "braces": "{job_id}",
    "long": "a" * 65,
    "10-kB": "a" * 10_000,
    "cyrillic": "\u0430lice",
    "fullwidth": "\uff41lice",
    "zero-width": "al\u200bice",
    "combining": "alice\u0301",
    "dotless-i": "al\u0131ce",
    "right-to-left": "\u202eecila",
    "arabic-digits": "\u0661\u0662",
    "lone-surrogate": "alice\ud800",
}


@pytest.mark.parametrize("value", list(HOSTILE_IDS.values()), ids=list(HOSTILE_IDS))
def test_a_hostile_id_is_400_and_nothing_is_written(server: Server, refused: Refusals, value: str) -> None:
    for name in ("user_id", "competition_id", "project_id"):
        assert fields(refused(server.post(HONEST, config_of(server, **{name: value})), 400)) == [name]


@pytest.mark.parametrize("value", ["a", "A.b-c_9", "_", "0", "a..b", "a--", "a" * 64])
def test_every_id_the_rule_allows_passes_it(server: Server, refused: Refusals, value: str) -> None:
    for name in ("user_id", "competition_id", "project_id"):
        # Refused for the next reason in the order: the token.
        refused(server.post(HONEST, config_of(server, token=UNKNOWN, **{name: value})), 401)


def test_ids_that_join_to_the_same_name_keep_two_result_files(server: Server) -> None:
    code = "import time\ntime.sleep(max(0, {until} - time.time()))\nprint('result of {who}')\n"
    for _ in range(8):
        until = int(time.time()) + 2.1  # both end in the same second, unless the machine is slow
        jobs = [
            (server.submit(user, code.format(until=until, who=user), competition_id=competition), user)
            for user, competition in (("a_b", "c"), ("a", "b_c"))
        ]
        for job, user in jobs:
            assert server.wait_for(job, user)["status"] == "completed"
        ended = [server.results(job, user) for job, user in jobs]
        names = [str(result["result_file"]) for result in ended]
        assert len(set(names)) == 2
        for result, (job, user) in zip(ended, jobs, strict=True):
            assert result["results"] == [{"output": f"result of {user}"}]
            lines = (server.jobs_dir / "results" / str(result["result_file"])).read_text().splitlines()
            assert [json.loads(line) for line in lines] == result["results"]
            raw = server.get(f"/api/results/{job}?format=jsonl", user)
            assert raw.text.splitlines() == lines
        stamps = {re.sub(r"(_2)?\.jsonl$", "", name) for name in names}
        assert all(re.fullmatch(r"a_b_c_\d{8}_\d{6}", stamp) for stamp in stamps)
        if len(stamps) == 1:
            assert sorted(name.endswith("_2.jsonl") for name in names) == [False, True]
            return
    pytest.fail("in eight tries the two jobs never ended in the same second")


# -- hostile code --------------------------------------------------------------------------------------------------

OK = ("completed", None)
BAD = ("failed", "exit_code")
CODES: dict[str, tuple[bytes, tuple[str, str | None], str]] = {
    # name: (code, (status, failure reason), part of stdout or stderr)
    "empty": (b"", OK, ""),
    "only-comments": (b"# nothing\n# at all", OK, ""),
    "only-blank-lines": (b"\n\n  \n\t\n", OK, ""),
    "byte-order-mark": (b"\xef\xbb\xbfprint('marked')\n", OK, "marked"),
    "windows-line-ends": (b"if True:\r\n    print('crlf')\r\n", OK, "crlf"),
    "no-newline-at-the-end": (b"print('last')", OK, "last"),
    "latin-1-declared": ("# -*- coding: latin-1 -*-\nprint(len('ü'))\n".encode("latin-1"), OK, "1"),
    "latin-1-undeclared": ("print('ü')\n".encode("latin-1"), BAD, "SyntaxError"),
    "utf-16": ("print('wide')\n".encode("utf-16"), BAD, "SyntaxError"),
    "binary": (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 16, BAD, ""),
    "random": (random.Random(38).randbytes(50_000), BAD, ""),
    "multipart-inside": (b"x = '''\r\n--B0undary--\r\n--x\r\n'''\nprint(len(x))\n", OK, ""),
    "deep": (b"(" * 5_000 + b")" * 5_000, BAD, "Error"),
}


@pytest.mark.parametrize("name", list(CODES))
def test_strange_code_has_a_defined_end(server: Server, name: str) -> None:
    code, expected, text = CODES[name]
    answer = server.run_job("alice", code)
    assert (answer["status"], answer["failure_reason"]) == expected, answer
    assert text in answer["stdout"] + answer["stderr"]
    if expected == BAD:
        assert answer["exit_code"] == 1
        assert answer["stderr"]
    assert (server.jobs_dir / answer["job_id"] / "solution.py").read_bytes() == code
    assert server.run_job("bob")["stdout"] == "hello\n"


def test_code_with_a_nul_inside_ends_as_python_ends_it(server: Server, tmp_path: Path) -> None:
    code = b"print('one')\nx = 'a\0b'\nprint('two')\n"
    (tmp_path / "solution.py").write_bytes(code)
    alone = subprocess.run([sys.executable, "solution.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    answer = server.run_job("alice", code)
    assert (answer["exit_code"], answer["stdout"]) == (alone.returncode, alone.stdout)
    assert answer["status"] == ("completed" if alone.returncode == 0 else "failed")
    assert server.run_job("bob")["stdout"] == "hello\n"


# -- hostile configs -----------------------------------------------------------------------------------------------


def _fields(**values: str) -> dict[str, str]:
    return {"competition_id": "c", "project_id": "p", "user_id": "alice", "expected_time": "60", **values}


def yaml_config(server: Server, **values: str) -> str:
    """A YAML config, its values as given; the token is good."""
    lines = [f"{name}: {value}" for name, value in _fields(**values).items()]
    return "\n".join([*lines, f"token: {server.token('alice')}"]) + "\n"


def json_config(server: Server, **values: str) -> str:
    """A JSON config whose values are JSON texts; the token is good."""
    texts = {"competition_id": '"c"', "project_id": '"p"', "user_id": '"alice"', "expected_time": "60", **values}
    inner = ", ".join(f'"{name}": {value}' for name, value in texts.items())
    return f'{{{inner}, "token": "{server.token("alice")}"}}'


BAD_TIMES = {
    "zero": "0",
    "negative": "-5",
    "small": "0.5",
    "large": "1e308",
    "too-large": "86401",
    "overflowing": "1e999",
    "4000-digits": "9" * 4000,
    "5000-digits": "9" * 5000,
    "true": "true",
    "false": "false",
    "null": "null",
    "list": "[60]",
    "mapping": '{"seconds": 60}',
    "word": '"soon"',
    "empty-text": '""',
    "text-with-unit": '"60s"',
    "text-nan": '"nan"',
    "text-inf": '"inf"',
    "text-zero": '"0"',
    "text-underscore": '"6_0"',
    "text-arabic-digits": '"\u0666\u0660"',
    "hex": '"0x3c"',
    "minutes": '"1:30"',
}


@pytest.mark.parametrize("value", list(BAD_TIMES.values()), ids=list(BAD_TIMES))
def test_a_bad_expected_time_is_400_in_json_and_in_yaml(server: Server, refused: Refusals, value: str) -> None:
    for config in (json_config(server, expected_time=value), yaml_config(server, expected_time=value)):
        problem = refused(server.post(HONEST, config.encode()), 400)
        assert fields(problem) in (["expected_time"], ["config_file"])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", ".nan", ".inf", "-.inf", "+.INF", ".NaN"])
def test_no_spelling_of_not_a_number_or_infinity_is_a_time(server: Server, refused: Refusals, value: str) -> None:
    for config in (json_config(server, expected_time=value), yaml_config(server, expected_time=value)):
        refused(server.post(HONEST, config), 400)


def bomb(levels: int) -> str:
    """Each level holds the one before nine times."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for level in range(1, levels):
        inside = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} [{inside}]")
    return "\n".join(lines) + "\n"


HOSTILE_CONFIGS: dict[str, Callable[[Server], str | bytes]] = {
    "empty": lambda server: "",
    "blank": lambda server: " \n\t\n",
    "comment": lambda server: "# nothing",
    "list": lambda server: "[1, 2]",
    "text": lambda server: '"config"',
    "number": lambda server: "60",
    "null": lambda server: "null",
    "binary": lambda server: bytes(range(256)),
    "utf-16": lambda server: json_config(server).encode("utf-16"),
    "latin-1": lambda server: json_config(server, note='"\u00fc"').encode("latin-1"),
    "cut-json": lambda server: json_config(server)[:-20],
    "two-json": lambda server: json_config(server) * 2,
    "two-documents": lambda server: yaml_config(server) + "---\n" + yaml_config(server),
    "double-key-json": lambda server: json_config(server)[:-1] + ', "user_id": "root"}',
    "double-key-yaml": lambda server: yaml_config(server) + "user_id: root\n",
    "double-key-deep": lambda server: yaml_config(server) + "extra: {a: 1, a: 2}\n",
    "tag-python-apply": lambda server: (
        yaml_config(server) + "x: !!python/object/apply:os.system ['touch /tmp/pwned']\n"
    ),
    "tag-python-name": lambda server: yaml_config(server, expected_time="!!python/name:os.system"),
    "tag-plain": lambda server: yaml_config(server, user_id="!!str alice"),
    "tag-own": lambda server: yaml_config(server, user_id="!mine alice"),
    "tag-binary": lambda server: yaml_config(server, user_id="!!binary YWxpY2U="),
    "tag-directive": lambda server: (
        "%TAG ! tag:yaml.org,2002:python/\n---\n" + yaml_config(server) + "x: !name:os.system\n"
    ),
    "alias": lambda server: yaml_config(server, competition_id="&x c", project_id="*x"),
    "merge": lambda server: f"base: &b {{user_id: alice}}\n<<: *b\n{yaml_config(server)}",
    "alias-bomb": lambda server: bomb(9) + yaml_config(server),
    "alias-bomb-large": lambda server: bomb(60) + yaml_config(server),
    "alias-to-itself": lambda server: yaml_config(server) + "x: &x [*x]\n",
    "deep-json": lambda server: json_config(server)[:-1] + ', "x": ' + "[" * 30_000 + "]" * 30_000 + "}",
    "deep-yaml": lambda server: yaml_config(server) + "x: " + "[" * 3_000 + "]" * 3_000,
    "deep-yaml-blocks": lambda server: yaml_config(server) + "".join(f"{' ' * n}x:\n" for n in range(100)),
    "many-entries": lambda server: yaml_config(server) + "".join(f"k{n}: 1\n" for n in range(1_500)),
    "many-directives": lambda server: "%FOO a\n" * 9_000 + "---\n" + yaml_config(server),
    "1-MB-json": lambda server: json_config(server, note='"' + "x" * 1_000_000 + '"'),
    "1-MB-yaml": lambda server: yaml_config(server) + "note: " + "x" * 1_000_000,
    "64-kB-yaml": lambda server: yaml_config(server) + "note: " + "x " * 32_000,
    "complex-key": lambda server: yaml_config(server) + "? [a, b]\n: 1\n",
    "number-key": lambda server: json_config(server).replace('"user_id"', "7", 1),
    "tabs": lambda server: yaml_config(server) + "x:\n\t- 1\n",
    "number-as-id": lambda server: yaml_config(server, competition_id="2024"),
    "list-as-id": lambda server: json_config(server, competition_id='["c"]'),
    "null-as-id": lambda server: json_config(server, competition_id="null"),
    "true-as-id": lambda server: json_config(server, competition_id="true"),
    "mapping-as-id": lambda server: json_config(server, user_id='{"$ne": ""}'),
    "number-as-token": lambda server: json_config(server).replace(f'"{server.token("alice")}"', "12345678"),
    "long-token": lambda server: json_config(server).replace(server.token("alice"), "t" * 300),
    "empty-token": lambda server: json_config(server).replace(server.token("alice"), ""),
}


@pytest.mark.parametrize("name", list(HOSTILE_CONFIGS))
def test_a_hostile_config_is_400_in_bounded_time(server: Server, refused: Refusals, name: str) -> None:
    config = HOSTILE_CONFIGS[name](server)
    content = config if isinstance(config, bytes) else config.encode()
    asked = time.monotonic()
    answer = server.post(HONEST, content)
    assert time.monotonic() - asked < 10
    problem = refused(answer, 400)
    assert problem["errors"]
    assert server.token("alice") not in answer.text
    assert not Path("/tmp/pwned").exists()


def peak_memory(server: Server) -> int:
    """The most memory the server process had so far, in bytes."""
    assert server.process is not None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_hostile_configs_neither_fill_the_memory_nor_hold_up_others(server: Server) -> None:
    before = all_jobs(server)
    peak = peak_memory(server)
    configs = [config(server) for config in HOSTILE_CONFIGS.values()]
    bodies = [
        multipart(("code", b"pass\n"), ("config_file", c if isinstance(c, bytes) else c.encode())) for c in configs
    ]
    statuses: list[int] = []

    def attack() -> None:
        statuses.extend(send(server, body).status_code for body in bodies)

    attackers = [threading.Thread(target=attack) for _ in range(4)]
    for thread in attackers:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in attackers):
        asked = time.monotonic()
        assert server.get("/healthz").status_code == 200
        slowest = max(slowest, time.monotonic() - asked)
    assert statuses == [400] * len(bodies) * len(attackers)
    assert slowest < 5
    assert peak_memory(server) - peak < 64 << 20
    assert all_jobs(server) == before


# -- configs that are taken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected_time", ['"60"', "60.0", "1", "86400", '"1.5"', "6e1"])
def test_a_number_of_seconds_is_taken_however_it_is_written(server: Server, expected_time: str) -> None:
    for config in (json_config(server, expected_time=expected_time), yaml_config(server, expected_time=expected_time)):
        answer = server.post(HONEST, config, wait=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["expected_time"] == float(expected_time.strip('"'))


@pytest.mark.parametrize(
    "head",
    [
        'name="config_file"',
        'name="config_file"; filename=""',
        'name="config_file"; filename="config.yaml"\r\nContent-Type: application/yaml',
        'name="config_file"; filename="-"\r\nContent-Type: application/json',
        'name="config_file"; filename="a.exe"\r\nContent-Type: application/octet-stream',
        'name="config_file"; filename="../../x"\r\nContent-Type: text/html; charset=latin-1',
        "name=config_file\r\nContent-Type: text/plain\r\nX-Other: 1",
    ],
)
def test_the_config_is_taken_whatever_its_file_name_and_content_type(server: Server, head: str) -> None:
    for config in (json_config(server), yaml_config(server)):
        body = (
            multipart(("code", HONEST.encode()), end=False)
            + f"--B0undary\r\nContent-Disposition: form-data; {head}\r\n\r\n{config}\r\n--B0undary--\r\n".encode()
        )
        answer = send(server, body, wait=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["stdout"] == "hello\n"


@pytest.mark.parametrize("extra", ['"ünïcode"', "[1, {}]", "null"])
def test_fields_that_nobody_knows_and_a_byte_order_mark_are_no_fault(server: Server, extra: str) -> None:
    for config in (json_config(server, note=extra), yaml_config(server, note=extra)):
        answer = server.post(HONEST, b"\xef\xbb\xbf" + config.encode(), wait=60)
        assert answer.status_code == 200, answer.text


def test_yaml_words_that_look_like_other_types_stay_text(server: Server) -> None:
    answer = server.post(HONEST, yaml_config(server, competition_id="no", project_id="1.2.3"), wait=60)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["competition_id"], answer.json()["project_id"]) == ("no", "1.2.3")


def test_the_token_is_kept_in_no_file_of_the_job(server: Server) -> None:
    job = server.run_job("alice")["job_id"]
    assert json.loads((server.jobs_dir / job / "config.json").read_text())["user_id"] == "alice"
    assert files_with(server.folder, server.token("alice")) == []


CURL = """curl -sS -X POST "$URL/api/submit?wait=60" \\
    -F "code=@solution.py" -F 'config_file=@-;type=application/json' <<EOF
{"competition_id": "c", "project_id": "p", "user_id": "alice", "expected_time": 60, "token": "$TOKEN"}
EOF"""
CURL_YAML = """curl -sS -X POST "$URL/api/submit?wait=60" -F code=@solution.py -F config_file=@- <<EOF
# YAML this time
competition_id: c
project_id: p
user_id: alice
expected_time: 60
token: $TOKEN
EOF"""
CURL_FIELD = """curl -sS "$URL/api/submit?wait=60" -F code=@solution.py -H "Authorization: Bearer $TOKEN" \
    -F 'config_file={"competition_id": "c", "project_id": "p", "user_id": "alice", "expected_time": 60}'"""


@pytest.mark.parametrize("command", [CURL, CURL_YAML, CURL_FIELD], ids=["json", "yaml", "form-field"])
def test_curl_submits_with_the_config_from_its_standard_input(server: Server, tmp_path: Path, command: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "solution.py").write_text(HONEST)
    environment = {**os.environ, "URL": server.url, "TOKEN": server.token("alice")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["stdout"]) == ("completed", "hello\n"), answer


# -- the parameters beside the body --------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf", "1e3", "", "\u0661"])
def test_a_bad_wait_parameter_is_400(server: Server, refused: Refusals, wait: str) -> None:
    assert fields(refused(server.post(HONEST, server.config("alice"), wait=wait), 400)) == ["wait"]


@pytest.mark.parametrize("prefer", [b"wait=\xb2", b"wait=-1", b"wait=soon", b"respond-async", b"wait", b"\xff\xfe"])
def test_a_preference_that_is_not_understood_is_passed_over(server: Server, prefer: bytes) -> None:
    answer = server.post(HONEST, server.config("alice"), headers={"Prefer": prefer})  # type: ignore[dict-item]
    assert answer.status_code == 200, answer.text
    assert "Preference-Applied" not in answer.headers
    server.wait_for(answer.json()["job_id"], "alice")


@pytest.mark.parametrize("key", [b"", b"k" * 256, b"\xff\xfe", b"a\tb"])
def test_a_bad_idempotency_key_is_400(server: Server, refused: Refusals, key: bytes) -> None:
    headers = {"Idempotency-Key": key}
    refused(server.post(HONEST, server.config("alice"), headers=headers), 400)  # type: ignore[arg-type]


# -- slow and broken clients ---------------------------------------------------------------------------------------

SLOW_HEAD = b"POST /api/submit HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B0undary\r\n"
HALF = multipart(("code", b"print(1)\n"), end=False)
PART = HALF[:-2]  # ends inside the code


@dataclass
class SlowClient:
    """Sends `first`, then `drip` once a second, until the server closes the connection."""

    first: bytes
    drip: bytes
    answer: bytes = b""
    answered_after: float | None = None
    closed_after: float | None = None

    def run(self, port: int, patience: float) -> None:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), 30) as client:
            client.settimeout(1)
            client.sendall(self.first)
            while time.monotonic() - began < patience:
                try:
                    data = client.recv(1 << 16)
                    if not data:
                        break
                    self.answer += data
                    self.answered_after = self.answered_after or time.monotonic() - began
                except TimeoutError:
                    try:
                        client.sendall(self.drip)
                    except OSError:
                        break
                except ConnectionError:
                    break
            else:
                return
        self.closed_after = time.monotonic() - began


def test_half_a_body_and_one_byte_a_second_are_ended_in_bounded_time_and_queue_nothing(strict: Server) -> None:
    refused = Refusals(strict)
    good = json.dumps(strict.config("slow")).encode()
    clients = {
        "half, then silence": SlowClient(SLOW_HEAD + b"Content-Length: 5000\r\n\r\n" + HALF, b""),
        "a byte a second": SlowClient(SLOW_HEAD + b"Content-Length: 5000\r\n\r\n" + HALF, b"x"),
        "a chunk a second": SlowClient(
            SLOW_HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(PART), PART), b"1\r\nx\r\n"
        ),
        "no body at all": SlowClient(SLOW_HEAD + b"Content-Length: 5000\r\n\r\n", b""),
        "all but the last byte": SlowClient(
            SLOW_HEAD
            + b"Content-Length: %d\r\n\r\n" % (len(multipart(("code", b"1"), ("config_file", good))))
            + multipart(("code", b"1"), ("config_file", good))[:-1],
            b"",
        ),
        "too large, a byte a second": SlowClient(SLOW_HEAD + b"Content-Length: 99999999\r\n\r\n", b"x"),
        "half a head": SlowClient(b"POST /api/submit HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"x"),
        "not a word": SlowClient(b"", b""),
        "a slow body where none is wanted": SlowClient(
            b"POST /api/cancel/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n", b"x"
        ),
    }
    threads = [threading.Thread(target=client.run, args=(strict.port, 40)) for client in clients.values()]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):  # meanwhile others are served
        assert strict.get("/healthz").status_code == 200
        time.sleep(0.2)
    for name, client in clients.items():
        assert client.closed_after is not None, f"{name}: the connection was never closed"
        assert client.closed_after < 30, f"{name}: {client.closed_after:.0f} s"
    late = ("half, then silence", "a byte a second", "a chunk a second", "no body at all", "all but the last byte")
    for name in late:
        assert clients[name].answer.startswith(b"HTTP/1.1 408 "), (name, clients[name].answer)
        assert b"did not arrive within 2 seconds" in clients[name].answer
    assert clients["too large, a byte a second"].answer.startswith(b"HTTP/1.1 413 ")
    refused(strict.post(HONEST, "{}"), 400)


def test_a_client_that_goes_away_in_the_middle_of_its_body_queues_nothing(strict: Server) -> None:
    refused = Refusals(strict)
    config = json.dumps(strict.config("gone")).encode()
    whole = multipart(("code", b"print(1)\n"), ("config_file", config))
    for length in (0, 40, len(whole) // 2, len(whole) - 1):
        with socket.create_connection(("127.0.0.1", strict.port), 30) as client:
            client.sendall(SLOW_HEAD + b"Content-Length: %d\r\n\r\n" % len(whole) + whole[:length])
    # The server has seen all of them go: it has no connection left but the one that asks.
    assert strict.process is not None
    wait_until(lambda: open_connections(strict) == 0, 30, "the server to close what its clients left")
    refused(strict.post(HONEST, "{}"), 400)
    assert "Traceback" not in strict.log()


def open_connections(server: Server) -> int:
    """TCP connections to the server's port that its side has not closed."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    port = f":{server.port:04X}"
    return sum(1 for line in lines if line.split()[1].endswith(port) and line.split()[3] in ("01", "08"))


def test_a_refused_submission_is_logged_by_no_more_than_its_reason(server: Server) -> None:
    assert "Traceback" not in server.log()
    assert server.token("alice") not in server.log()
