"""quickstart.sh, run as a newcomer runs it: in a fresh copy of the project, from nothing to a result."""

from __future__ import annotations

import http.server
import json
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fresh import FreshCopy
from tests.server import free_port, wait_until

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="quickstart.sh needs curl")


@pytest.fixture(scope="module")
def copy() -> Iterator[FreshCopy]:
    with FreshCopy() as fresh:
        fresh.make_environment()
        yield fresh


def quickstart(copy: FreshCopy, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {"SERVER_PORT": str(copy.port), **extra}
    return copy.run("bash", "quickstart.sh", *words, timeout=100, **environment)


def result_of(output: str) -> dict[str, Any]:
    """The JSON that quickstart.sh shows."""
    decoded: dict[str, Any] = json.JSONDecoder().raw_decode(output[output.index("\n{") + 1 :])[0]
    return decoded


def assert_result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "status: completed" in done.stdout
    result = result_of(done.stdout)
    assert (result["status"], result["exit_code"], result["user_id"]) == ("completed", 0, "student")
    assert "the squares below 1,000 add up to 332,833,500" in result["stdout"]
    assert [record["n"] for record in result["results"]] == [1_000, 1_000_000]
    return result


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_fresh_clone_gets_to_a_result_again_and_again_and_stops_without_a_trace(copy: FreshCopy) -> None:
    subprocess.run(["git", "init", "-q"], cwd=copy.folder, check=True)
    subprocess.run(["git", "add", "."], cwd=copy.folder, check=True)

    first = quickstart(copy)
    result = assert_result(first)
    assert "Installing requirements.txt into .venv" in first.stdout
    assert f"Starting the server at {copy.url}" in first.stdout
    assert 'Made a token for the user "student"' in first.stdout
    assert (copy.folder / "jobs" / "results" / result["result_file"]).is_file()
    token_file = copy.folder / ".quickstart_token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert token_file.read_text().strip() not in first.stdout + first.stderr

    second = quickstart(copy)
    assert assert_result(second)["job_id"] != result["job_id"]
    assert "The server is already running" in second.stdout
    assert "Using the token in .quickstart_token" in second.stdout
    assert "Installing" not in second.stdout

    stopped = quickstart(copy, "--stop")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "has stopped" in stopped.stdout
    wait_until(lambda: not copy.left_running(), 30, "nothing to be left running")

    third = quickstart(copy)
    assert_result(third)
    assert "Using the token in .quickstart_token" in third.stdout, "the database of the first start is still there"
    assert quickstart(copy, "--stop").returncode == 0
    again = quickstart(copy, "--stop")
    assert (again.returncode, again.stdout.strip()) == (0, "No server of this script is running.")
    wait_until(lambda: not copy.left_running(), 30, "nothing to be left running")

    changed = subprocess.run(
        ["git", "diff-files", "--name-only"], cwd=copy.folder, capture_output=True, text=True, check=True
    ).stdout
    unknown = subprocess.run(
        ["git", "ls-files", "-o", "--exclude-standard"], cwd=copy.folder, capture_output=True, text=True, check=True
    ).stdout
    assert (changed, unknown) == ("", ""), "what quickstart.sh writes is listed in .gitignore"


def test_the_port_may_stand_in_the_env_file(copy: FreshCopy) -> None:
    port = free_port()
    (copy.folder / ".env").write_text(f"# a comment\nSERVER_PORT={port}  # and another\n")
    try:
        done = copy.run("bash", "quickstart.sh")
        assert_result(done)
        assert f"Starting the server at http://127.0.0.1:{port}" in done.stdout
        assert "has stopped" in copy.run("bash", "quickstart.sh", "--stop").stdout
    finally:
        (copy.folder / ".env").unlink()


class _Stranger(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_taken_port_is_said_with_the_remedy(copy: FreshCopy) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        port = stranger.server_address[1]
        done = quickstart(copy, SERVER_PORT=str(port))
        stranger.shutdown()
    assert done.returncode == 1
    assert f"Port {port} is in use by another program." in done.stderr
    assert "Take another one: SERVER_PORT=8002 bash quickstart.sh" in done.stderr
    assert not copy.left_running()


def test_a_wrong_setting_is_shown_from_the_log(copy: FreshCopy) -> None:
    done = quickstart(copy, SANDBOX="maybe")
    assert done.returncode == 1
    assert "SANDBOX: Input should be 'auto', 'required' or 'off'" in done.stderr
    assert "The server did not start: the reason is above." in done.stderr
    assert not (copy.folder / ".server.pid").exists()


def test_stop_does_not_end_a_stranger_that_has_the_number_of_a_former_server(copy: FreshCopy) -> None:
    with subprocess.Popen(["sleep", "100"]) as stranger:
        try:
            (copy.folder / ".server.pid").write_text(f"{stranger.pid}\n")
            done = quickstart(copy, "--stop")
            assert (done.returncode, done.stdout.strip()) == (0, "No server of this script is running.")
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_help_and_wrong_usage(copy: FreshCopy) -> None:
    shown = quickstart(copy, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: bash quickstart.sh")
    wrong = quickstart(copy, "--nonsense")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("usage: bash quickstart.sh")
