"""A real server process for tests: own folder, own port, own database; started, killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

PROJECT = Path(__file__).resolve().parent.parent
FINAL = ("completed", "failed", "cancelled")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], Any], timeout: float = 20, what: str = "") -> Any:
    """The first true value of `condition`; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(0.02)


def clean_environment(extra: dict[str, str]) -> dict[str, str]:
    """This environment without settings of a server, plus `extra`."""
    from config import Settings

    names = {name.upper() for name in Settings.model_fields}
    return {**{name: value for name, value in os.environ.items() if name.upper() not in names}, **extra}


class Server:
    """`python3 main.py` in a folder of its own. `settings` are environment variables."""

    def __init__(self, settings: dict[str, str] | None = None, *, wait_for_nodes: bool = True) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-job-server-test-")
        self.folder = Path(self._folder.name)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.jobs_dir = self.folder / "jobs"
        self.log_path = self.folder / "server.log"
        self.wait_for_nodes = wait_for_nodes
        self.verify: bool | str = True  # the certificate, when the server has one of its own
        self.settings = {
            "SERVER_HOST": "127.0.0.1",
            "SERVER_PORT": str(self.port),
            "DATABASE_URL": f"sqlite:///{self.folder / 'database.db'}",
            "JOBS_DIR": str(self.jobs_dir),
            "TOKEN_KEY_FILE": str(self.folder / "token.key"),
            "MIN_FREE_DISK": "0",
            "SSH_CONFIG_FILE": str(self.folder / "no-ssh-config"),
            **(settings or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.tokens: dict[str, str] = {}

    # -- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:  # nobody else would end it
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"--- {self.log_path}\n{self.log()[-6000:]}")
        self.close()

    def environment(self) -> dict[str, str]:
        """The environment of the server and its command lines."""
        return clean_environment(self.settings)

    def start(self) -> None:
        """Start and wait until it is ready (and, unless told otherwise, until every node is connected)."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROJECT / "main.py")],
                cwd=self.folder,
                env=self.environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        wait_until(self._is_ready, 30, "the server to be ready")
        if self.wait_for_nodes:
            wait_until(self._all_connected, 30, "all nodes to be connected")

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log()[-4000:]}")
        try:
            return requests.get(f"{self.url}/readyz", timeout=5, verify=self.verify).status_code == 200
        except requests.ConnectionError:
            return False

    def _all_connected(self) -> bool:
        nodes = requests.get(f"{self.url}/api/nodes", timeout=5, verify=self.verify).json()["nodes"]
        return all(node["status"] != "offline" for node in nodes)

    def signal(self, number: int) -> int:
        """Send a signal, wait for the end, return the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(15)

    def kill(self) -> None:
        """`kill -9`."""
        self.signal(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        return self.signal(signal.SIGTERM)

    def close(self) -> None:
        """End the server and every job it left on this machine, and remove the folder."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.terminate()
            except subprocess.TimeoutExpired:
                self.kill()
        for path in self.jobs_dir.glob(".nodes/*/*/attempts/*/supervisor.json"):
            self._end_supervisor(json.loads(path.read_text())["pid"], path.parent)
        # Agents that have just heard of the server's end still clear up in it.
        wait_until(self._is_removed, 15, f"{self.folder} to be left alone")

    def _is_removed(self) -> bool:
        try:
            self._folder.cleanup()
        except OSError:
            return False
        return True

    @staticmethod
    def _end_supervisor(pid: int, attempt: Path) -> None:
        if (attempt / "exit.json").exists():
            return
        try:
            os.kill(pid, signal.SIGTERM)  # a supervisor ends its job first
        except ProcessLookupError:
            return
        wait_until((attempt / "exit.json").exists, 15, f"supervisor {pid} to end its job")

    def log(self) -> str:
        """Everything the server logged."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def run(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run one of the project's command lines with this server's settings."""
        result = subprocess.run(
            [sys.executable, str(PROJECT / words[0]), *words[1:]],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        if code is not None:
            assert result.returncode == code, f"{words}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    # -- users -----------------------------------------------------------------------------------------------------

    def token(self, user_id: str, *, admin: bool = False) -> str:
        """The user's token, made at first use."""
        if user_id not in self.tokens:
            words = ["token_manager.py", "create", user_id, *(["--admin"] if admin else [])]
            match = re.search(r"Token, shown only now: (\S+)", self.run(*words).stdout)
            assert match is not None
            self.tokens[user_id] = match.group(1)
        return self.tokens[user_id]

    def bearer(self, user_id: str) -> dict[str, str]:
        """The Authorization header of a user."""
        return {"Authorization": f"Bearer {self.token(user_id)}"}

    def config(self, user_id: str, **fields: Any) -> dict[str, Any]:
        """A valid config of a user; `fields` replace or, when None, remove."""
        config = {
            "competition_id": "comp",
            "project_id": "proj",
            "user_id": user_id,
            "expected_time": 60,
            "token": self.token(user_id),
            **fields,
        }
        return {name: value for name, value in config.items() if value is not None}

    # -- calls -----------------------------------------------------------------------------------------------------

    def post(
        self,
        code: str | bytes | None,
        config: dict[str, Any] | str | bytes | None,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
        **query: Any,
    ) -> requests.Response:
        """POST /api/submit with these parts, whatever they are."""
        files: dict[str, Any] = {}
        if code is not None:
            files["code"] = ("solution.py", code, "text/x-python")
        if config is not None:
            body = json.dumps(config) if isinstance(config, dict) else config
            files["config_file"] = ("config.json", body, "application/json")
        return requests.post(
            f"{self.url}/api/submit", files=files, headers=headers, params=query or None, timeout=timeout
        )

    def submit(self, user_id: str, code: str | bytes = "print('hello')\n", **fields: Any) -> str:
        """Submit a job that must be taken; its id."""
        response = self.post(code, self.config(user_id, **fields))
        assert response.status_code == 200, response.text
        return str(response.json()["job_id"])

    def run_job(self, user_id: str, code: str | bytes = "print('hello')\n", **fields: Any) -> dict[str, Any]:
        """Submit a job and wait for its results."""
        response = self.post(code, self.config(user_id, **fields), wait=60)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        assert answer["status"] in FINAL, answer
        return answer

    def get(self, path: str, user_id: str | None = None, **options: Any) -> requests.Response:
        """GET as a user."""
        headers = {**(self.bearer(user_id) if user_id else {}), **options.pop("headers", {})}
        return requests.get(f"{self.url}{path}", headers=headers, timeout=30, verify=self.verify, **options)

    def status(self, job_id: str, user_id: str) -> dict[str, Any]:
        """The job's status."""
        response = self.get(f"/api/status/{job_id}", user_id)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def results(self, job_id: str, user_id: str) -> dict[str, Any]:
        """The job's results."""
        response = self.get(f"/api/results/{job_id}", user_id)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def cancel(self, job_id: str, user_id: str) -> requests.Response:
        """Cancel a job."""
        return requests.post(f"{self.url}/api/cancel/{job_id}", headers=self.bearer(user_id), timeout=30)

    def events(self, job_id: str, user_id: str) -> list[dict[str, Any]]:
        """The job's events."""
        found: list[dict[str, Any]] = self.get(f"/api/events/{job_id}", user_id).json()["events"]
        return found

    def wait_for(self, job_id: str, user_id: str, wanted: Iterable[str] = FINAL, timeout: float = 30) -> dict[str, Any]:
        """The job's status once it is one of `wanted`."""
        states = tuple(wanted)

        def reached() -> dict[str, Any] | None:
            status = self.status(job_id, user_id)
            return status if status["status"] in states else None

        found: dict[str, Any] = wait_until(reached, timeout, f"job {job_id} to be {states}")
        return found

    def wait_for_output(
        self, job_id: str, user_id: str, text: str, stream: str = "stdout", timeout: float = 30
    ) -> None:
        """Wait until the job has printed `text`."""
        path = f"/api/logs/{job_id}?stream={stream}"
        wait_until(lambda: text in self.get(path, user_id).text, timeout, f"{text!r} in {stream}")
