"""The scripts that also run alone: each by itself, against a running server, and against what they must find wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.server import Server

TESTS = Path(__file__).resolve().parent
SCRIPTS = ("run_basic_tests.py", "test_authorization.py", "test_security.py", "test_token_management.py")
ADMIN_TOO = "test_authorization.py"
# Generous: four servers start at once on what may be a busy machine.
SECONDS = 400


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server whose limits in time are out of the way."""
    with Server({"SUBMITS_PER_MINUTE": "10000", "LOGIN_FAILURES_PER_MINUTE": "10000"}) as running:
        running.token("alice")
        running.token("root", admin=True)
        yield running


@dataclass
class Run:
    """One run of a script: its exit code and what it printed."""

    code: int
    printed: str

    @property
    def lines(self) -> list[str]:
        """What it printed, by lines."""
        return self.printed.splitlines()

    def count(self, start: str) -> int:
        """How many lines start so."""
        return sum(line.startswith(start) for line in self.lines)


def start(script: str, *words: str, output: Path) -> subprocess.Popen[bytes]:
    """`cd tests && python3 SCRIPT`, in the environment of this interpreter."""
    command = f"cd {TESTS.name} && python3 {script} {' '.join(words)}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with open(output, "wb") as file:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=TESTS.parent,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End what still runs, as Ctrl-C does: the script then ends its server."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(script: str, *words: str, folder: Path) -> Run:
    """Run it to its end."""
    output = folder / f"{script}.txt"
    process = start(script, *words, output=output)
    try:
        return Run(process.wait(SECONDS), output.read_text())
    finally:
        end(process)


def options(server: Server, script: str) -> tuple[str, ...]:
    """What a script needs to know of a running server."""
    known = ("--url", server.url, "--user", "alice", "--token", server.token("alice"))
    return (*known, "--admin-token", server.token("root")) if script == ADMIN_TOO else known


def assert_all_passed(done: Run) -> int:
    """Everything passed and was counted; how many checks there were."""
    assert done.code == 0, done.printed
    assert done.count("FAIL") == 0
    passed = done.count("ok    ")
    assert done.lines[-1] == f"{passed} passed, 0 failed"
    return passed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """All four, side by side, each against the server that it starts."""
    folder = tmp_path_factory.mktemp("scripts")
    running = {}
    for script in SCRIPTS:
        output = folder / f"{script}.txt"
        running[script] = (start(script, output=output), output)
    yield running
    for process, _ in running.values():
        end(process)


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_passes_alone(alone: dict[str, tuple[subprocess.Popen[bytes], Path]], script: str) -> None:
    process, output = alone[script]
    code = process.wait(SECONDS)
    assert assert_all_passed(Run(code, output.read_text())) >= 10


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_passes_against_a_running_server(server: Server, tmp_path: Path, script: str) -> None:
    done = run(script, *options(server, script), folder=tmp_path)
    assert assert_all_passed(done) >= 2
    assert server.token("alice") not in done.printed


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_given_a_wrong_token_fails(server: Server, tmp_path: Path, script: str) -> None:
    words = [word.replace(server.token("alice"), "no-such-token") for word in options(server, script)]
    done = run(script, *words, folder=tmp_path)
    assert done.code == 1, done.printed
    failed = done.count("FAIL  ")
    assert failed >= 1
    assert done.lines[-1] == f"{done.count('ok    ')} passed, {failed} failed"
    assert "Traceback" not in done.printed


def test_a_user_that_is_not_the_tokens_fails(server: Server, tmp_path: Path) -> None:
    words = ("--url", server.url, "--user", "bob", "--token", server.token("alice"))
    done = run("run_basic_tests.py", *words, folder=tmp_path)
    assert done.code == 1, done.printed
    assert "belongs to another user" in done.printed


class Yes(BaseHTTPRequestHandler):
    """A server that agrees to everything."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """200, whatever was asked."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"status": "completed", "job_id": "1", "detail": "yes"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def yes() -> Iterator[str]:
    """The address of a server that answers every call with 200."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join(30)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_check_passes_against_a_server_that_says_yes_to_everything(yes: str, tmp_path: Path, script: str) -> None:
    words = ("--url", yes, "--user", "alice", "--token", "t" * 20)
    done = run(script, *words, *(("--admin-token", "a" * 20) if script == ADMIN_TOO else ()), folder=tmp_path)
    assert done.code == 1, done.printed
    assert done.count("ok    ") == 0, done.printed
    assert re.fullmatch(r"0 passed, [1-9]\d* failed", done.lines[-1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_needs(tmp_path: Path, script: str) -> None:
    done = run(script, "--url", "http://127.0.0.1:9", folder=tmp_path)
    assert done.code == 2, done.printed
    assert "--token" in done.printed
    assert ("--admin-token" in done.lines[-1]) == (script == ADMIN_TOO)


def test_a_script_says_that_no_server_answers(tmp_path: Path) -> None:
    words = ("--url", "http://127.0.0.1:9", "--token", "some-token")
    done = run("run_basic_tests.py", *words, folder=tmp_path)
    assert done.code == 1, done.printed
    assert "no server answers at http://127.0.0.1:9" in done.printed
    assert done.lines[-1] == "0 passed, 1 failed"
