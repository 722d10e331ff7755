"""The client `gpuq.py`, as a program and as a module, against real servers."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

import gpuq
from gpuq import AsyncClient, Client, Config, LogPiece, NotConfigured, Refused, Unreachable
from tests.held_jobs import HOLD, WAIT_FOR_RELEASE, release
from tests.server import PROJECT, Server, clean_environment, free_port, wait_until

BOTH = """
import os, sys, json
os.mkfifo('go')
print('first ä', flush=True)
print('to stderr', file=sys.stderr, flush=True)
open('go').read()
print('last', flush=True)
open(os.environ['RESULTS_FILE'], 'w').write(json.dumps({'score': 0.5}) + '\\n')
"""


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("GPUQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GPUQ_CONFIG", str(tmp_path / "gpuq.toml"))


def environment(server: Server, user: str | None) -> dict[str, str]:
    token = {"GPUQ_TOKEN": server.token(user)} if user is not None else {}
    return clean_environment({"GPUQ_URL": server.url, "PYTHONUNBUFFERED": "1", **token})


def start(server: Server, user: str, *words: str, **options: Any) -> subprocess.Popen[str]:
    """The command line, left running."""
    return subprocess.Popen(
        # A test run started in the background by a shell without job control ignores
        # SIGINT, and so would every child: Ctrl-C would reach nobody.
        ["env", "--default-signal=INT", sys.executable, str(PROJECT / "gpuq.py"), *words],
        env=environment(server, user),
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    )


def call(
    server: Server, user: str | None, *words: str, code: int = 0, given: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line to its end, with this exit code."""
    done = subprocess.run(
        [sys.executable, str(PROJECT / "gpuq.py"), *words],
        env=environment(server, user),
        input=given if given is not None else "",
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def client_of(server: Server, user: str, **options: Any) -> Client:
    return Client(server.url, server.token(user), **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "work.py"
    path.write_text("import json, os\nopen(os.environ['RESULTS_FILE'], 'w').write('{\"n\": 1}\\n')\nprint('hello')\n")
    return path


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that a test may stop, with the limits of the default."""
    with Server({"NUM_GPU_NODES": "2"}) as running:
        yield running


# -- the commands --------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_how_to_install_it() -> None:
    bare = [sys.executable, "-I", "-S", str(PROJECT / "gpuq.py"), "jobs"]  # without what is installed
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpuq needs the package httpx: pip3 install -r requirements-client.txt\n"


def test_help_names_every_command_and_setting(server: Server) -> None:
    shown = " ".join(call(server, None, "--help").stdout.split())
    for word in ("submit", "run", "status", "logs", "results", "jobs", "cancel", "nodes", "queue", "top", "login"):
        assert word in shown
    assert "GPUQ_TOKEN" in shown
    assert "--wait-for-slot" in call(server, None, "submit", "--help").stdout


def test_login_keeps_the_token_for_this_user_only_and_wins_nothing_over_the_environment(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "gpuq.toml"
    words = ("--config", str(path))
    shown = call(server, None, *words, "login", given=f"{server.token('cli1')}\n").stdout
    assert "You are cli1" in shown
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(call(server, None, *words, "whoami", "--json").stdout)["user_id"] == "cli1"
    assert call(server, "cli2", *words, "whoami").stdout.startswith("cli2 at ")
    before = path.read_text()
    assert "unknown" in call(server, None, *words, "login", given="not_a_token\n", code=77).stderr
    assert path.read_text() == before
    path.chmod(0o644)
    assert "chmod 600" in call(server, None, *words, "whoami").stderr


def test_submit_answers_at_once_and_every_other_command_shows_the_job(server: Server, file: Path) -> None:
    job = json.loads(call(server, "cli3", "submit", str(file), "-c", "comp-x", "-p", "mine", "--json").stdout)
    assert (job["competition_id"], job["project_id"], job["expected_time"]) == ("comp-x", "mine", 600)
    ended = server.wait_for(job["job_id"], "cli3")
    assert ended["status"] == "completed"
    shown = call(server, "cli3", "status").stdout  # the newest job
    assert job["job_id"] in shown
    assert "completed" in shown
    assert json.loads(call(server, "cli3", "status", job["job_id"], "--json").stdout) == ended
    assert call(server, "cli3", "logs").stdout == "hello\n"
    assert json.loads(call(server, "cli3", "logs", "--json").stdout) == {"stdout": "hello\n", "stderr": ""}
    assert call(server, "cli3", "results").stdout == '{"n": 1}\n'
    assert json.loads(call(server, "cli3", "results", "--json").stdout)["results"] == [{"n": 1}]
    target = file.parent / "out.jsonl"
    call(server, "cli3", "results", job["job_id"], "-o", str(target))
    assert target.read_text() == '{"n": 1}\n'
    assert job["job_id"] in call(server, "cli3", "jobs").stdout
    assert json.loads(call(server, "cli3", "jobs", "--status", "failed", "--json").stdout) == []
    events = json.loads(call(server, "cli3", "events", "--json").stdout)
    assert [event["event"] for event in events] == ["submitted", "claimed", "started", "completed"]
    assert "claimed" in call(server, "cli3", "events").stdout


def test_nodes_queue_and_top_show_the_cluster(server: Server) -> None:
    assert "local-8" in call(server, None, "nodes").stdout
    assert len(json.loads(call(server, None, "nodes", "--json").stdout)["nodes"]) == 8
    job_id = server.submit("cli4", HOLD)
    server.wait_for_output(job_id, "cli4", "held")
    shown = call(server, "cli4", "queue").stdout
    assert job_id in shown
    assert "running" in shown
    queue = json.loads(call(server, "cli4", "queue", "--json").stdout)
    assert [job["job_id"] for job in queue["active_jobs"]] == [job_id]
    shown = call(server, "cli4", "top").stdout
    assert "local-8" in shown
    assert job_id in shown
    assert json.loads(call(server, "cli4", "top", "--json").stdout)["active_jobs"][0]["job_id"] == job_id
    assert "cancelled" in call(server, "cli4", "cancel", job_id).stdout
    assert json.loads(call(server, "cli4", "cancel", job_id, "--json").stdout)["status"] == "cancelled"


def test_top_on_a_terminal_goes_on_until_ctrl_c(server: Server) -> None:
    with Terminal(server, "cli4t", "top", "-i", "0.5") as terminal:
        terminal.expect("local-8")
        server.run_job("cli4t")
        seen = len(terminal.shown)
        wait_until(lambda: "local-8" in terminal.shown[seen:], 20, "the table to be drawn again")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(20) == 0


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("print('fine')", 0),
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("raise ValueError('mine')", 1),
    ],
)
def test_run_and_wait_exit_as_the_job_did(server: Server, tmp_path: Path, code: str, exit_code: int) -> None:
    (tmp_path / "a.py").write_text(code)
    user = f"cli5-{exit_code}"
    done = call(server, user, "run", str(tmp_path / "a.py"), "-c", "comp", code=exit_code)
    assert ("fine" in done.stdout) == (exit_code == 0)
    assert ("ValueError: mine" in done.stderr) == (exit_code == 1)
    waited = call(server, user, "submit", str(tmp_path / "a.py"), "-c", "comp", "--wait", "--json", code=exit_code)
    assert json.loads(waited.stdout)["status"] == ("completed" if exit_code == 0 else "failed")


def test_a_job_over_its_time_exits_with_124(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import time; time.sleep(60)")
    done = call(server, "cli6", "submit", str(tmp_path / "a.py"), "-c", "comp", "-t", "1", "--wait", code=124)
    assert "failed" in done.stderr


def test_errors_are_sentences_with_exit_codes_of_their_own(server: Server, file: Path, tmp_path: Path) -> None:
    assert "No token" in call(server, None, "jobs", code=78).stderr
    assert "Which competition?" in call(server, "cli7", "submit", str(file), code=78).stderr
    refused = call(server, "cli7", "submit", str(file), "-c", "not valid!", code=65).stderr
    assert "competition_id" in refused
    assert "no job" in call(server, "cli7", "status", "0b8e2a52-8c1e-4a3e-9a53-0e6f7f2f6c11", code=66).stderr
    others = server.run_job("cli8")["job_id"]
    assert "another user" in call(server, "cli7", "logs", others, code=77).stderr
    assert "already" in call(server, "cli8", "cancel", others, code=65).stderr
    away = f"http://127.0.0.1:{free_port()}"
    shown = call(server, "cli7", "--url", away, "--patience", "1", "nodes", code=69).stderr
    assert "cannot be reached" in shown
    assert "must look like" in call(server, "cli7", "--url", "gpu-server", "nodes", code=78).stderr
    (tmp_path / "bad.toml").write_text("tokn = 'x'\n")
    assert "no setting tokn" in call(server, None, "--config", str(tmp_path / "bad.toml"), "jobs", code=78).stderr
    assert "Traceback" not in shown
    call(server, "cli7", "submit", "no-such-file.py", "-c", "comp", code=2)


# -- following -----------------------------------------------------------------------------------------------------


def test_logs_follow_through_a_restart_of_the_server_and_keep_the_streams_apart(own: Server) -> None:
    job_id = own.submit("alice", BOTH)
    own.wait_for_output(job_id, "alice", "first")
    process = start(own, "alice", "logs", "-f", job_id)
    assert process.stdout is not None
    assert process.stdout.readline() == "first ä\n"
    own.kill()
    own.start()
    release(own, None, job_id)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert stdout == "last\n"
    assert [line for line in stderr.splitlines() if not line.startswith("gpuq: ")] == ["to stderr"]


IN_TURN = """
import sys
for n in range(3):
    for stream in (sys.stdout, sys.stderr):
        print(n, stream.name, file=stream, flush=True)
        while any(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"    "))[0] for pipe in (1, 2)):
            pass  # until it has been read: then it is certain which came first
"""


def test_logs_come_in_the_order_in_which_they_were_printed(server: Server) -> None:
    job_id = server.run_job("cli20", f"import fcntl, struct, termios\n{IN_TURN}")["job_id"]
    lines = [f"{n} <{stream}>" for n in range(3) for stream in ("stdout", "stderr")]
    for words in (("logs",), ("logs", "-f", "--collapse")):
        shown, _ = start(server, "cli20", *words, job_id, stderr=subprocess.STDOUT).communicate(timeout=60)
        assert shown.splitlines() == lines
    ends = call(server, "cli20", "logs", job_id, "--tail", "21")
    assert (ends.stdout, ends.stderr) == (" <stdout>\n", "2 <stderr>\n")


class OlderServer(BaseHTTPRequestHandler):
    """Passes calls on to a server and does not know the stream `merged`, as those of before."""

    behind: Server

    def do_GET(self) -> None:
        """As the server behind answers."""
        url = self.behind.url + self.path.replace("stream=merged", "stream=unknown")
        names = ("Authorization", "Accept")
        answer = requests.get(url, headers={name: self.headers[name] for name in names}, timeout=30)
        self.send_response(answer.status_code)
        for name in ("Content-Type", "X-Log-Size", "X-Log-Next-Offset"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *words: Any) -> None:
        """Nothing."""


def test_logs_of_an_older_server_come_stream_by_stream(server: Server) -> None:
    job_id = server.run_job("cli21", "import sys; print('out'); print('err', file=sys.stderr)")["job_id"]
    handler = type("Handler", (OlderServer,), {"behind": server})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as older:
        threading.Thread(target=older.serve_forever, daemon=True).start()
        try:
            with Client(f"http://127.0.0.1:{older.server_port}", server.token("cli21")) as client:
                assert client.printed(job_id) == [LogPiece("stdout", "out\n", 4), LogPiece("stderr", "err\n", 4)]
                followed = sorted(client.follow(job_id), reverse=True)
                assert followed == [LogPiece("stdout", "out\n", 4), LogPiece("stderr", "err\n", 4)]
        finally:
            older.shutdown()


def test_run_survives_a_restart_of_the_server_and_exits_as_the_job(own: Server, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(BOTH + "raise SystemExit(5)\n")
    process = start(own, "alice", "run", str(tmp_path / "a.py"), "-c", "comp")
    assert process.stdout is not None
    assert process.stdout.readline() == "first ä\n"
    own.terminate()
    own.start()
    (job,) = own.get("/api/jobs", "alice").json()["jobs"]
    release(own, None, job["job_id"])
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (5, "last\n")
    assert stderr.count("to stderr\n") == 1


def test_a_submission_while_the_server_is_away_becomes_one_job(own: Server, file: Path) -> None:
    own.token("alice")
    own.terminate()
    process = start(own, "alice", "submit", str(file), "-c", "comp", "--wait", "--json")
    assert process.stderr is not None
    assert "cannot be reached" in process.stderr.readline()
    own.start()
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(stdout)["results"] == [{"n": 1}]
    assert len(own.get("/api/jobs", "alice").json()["jobs"]) == 1


def test_one_key_is_one_job(server: Server) -> None:
    with client_of(server, "cli9") as client:
        first = client.submit(code="print(1)", competition="comp", key="k")
        client.wait(first["job_id"])
        assert client.submit(code="print(1)", competition="comp", key="k")["job_id"] == first["job_id"]
        assert client.submit(code="print(1)", competition="comp")["job_id"] != first["job_id"]


# -- limits --------------------------------------------------------------------------------------------------------


def test_a_second_job_is_refused_or_waits_for_the_slot(own: Server, file: Path) -> None:
    held = own.submit("alice", HOLD)
    own.wait_for_output(held, "alice", "held")
    refused = call(own, "alice", "submit", str(file), "-c", "comp", code=75)
    assert "Queue limit exceeded" in refused.stderr
    assert "--wait-for-slot" in refused.stderr
    process = start(own, "alice", "submit", str(file), "-c", "comp", "--wait-for-slot", "--wait")
    assert process.stderr is not None
    assert held in process.stderr.readline()
    release(own, None, held)
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, '{"n": 1}\n')


@pytest.mark.slow
def test_a_rate_limit_is_waited_out_as_the_server_says() -> None:
    with Server({"SUBMITS_PER_MINUTE": "1"}) as server:
        server.run_job("alice")
        said: list[str] = []
        with client_of(server, "alice", patience=0, on_wait=said.append) as client:
            with pytest.raises(Refused) as caught:
                client.submit(code="print(1)", competition="comp")
            assert (caught.value.status, caught.value.exit_code) == (429, 75)
            assert caught.value.retry_after is not None
            wait = caught.value.retry_after
        assert 1 <= wait <= 60
        assert said == []
        with client_of(server, "alice", on_wait=said.append) as client:
            began = time.monotonic()
            client.submit(code="print(1)", competition="comp")
            assert time.monotonic() - began >= wait - 5
        assert len(said) == 1
        assert "Rate limit exceeded" in said[0]


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


class Terminal:
    """The command line on a terminal of its own; `shown` is what it has printed there."""

    def __init__(self, server: Server, user: str, *words: str) -> None:
        self._main, inner = pty.openpty()
        self.process = start(server, user, *words, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
        os.close(inner)
        self.shown = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._main, 65536)
            except OSError:  # the other end is closed
                return
            self.shown += data.decode("utf-8", "replace")

    def expect(self, text: str) -> None:
        wait_until(lambda: text in self.shown, 30, f"{text!r} in {self.shown!r}")

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C, as the terminal sends it."""
        self.process.send_signal(signal.SIGINT)
        self.expect(text)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(10)
        os.close(self._main)


@pytest.fixture
def held(tmp_path: Path) -> Path:
    path = tmp_path / "held.py"
    path.write_text(HOLD + "print('released', flush=True)\n")
    return path


def newest(server: Server, user: str) -> dict[str, Any]:
    job: dict[str, Any] = server.get("/api/jobs?limit=1", user).json()["jobs"][0]
    return job


def test_ctrl_c_asks_and_cancels(server: Server, held: Path) -> None:
    with Terminal(server, "int1", "run", str(held), "-c", "comp") as terminal:
        terminal.expect("held\r\n")
        terminal.interrupt_until("[w]atch on?")
        terminal.type("c\n")
        assert terminal.process.wait(30) == 130
    assert newest(server, "int1")["status"] == "cancelled"


def test_ctrl_c_asks_and_detaches(server: Server, held: Path) -> None:
    with Terminal(server, "int2", "submit", str(held), "-c", "comp", "--wait") as terminal:
        server_job = wait_until(lambda: server.get("/api/jobs?limit=1", "int2").json()["jobs"])[0]
        server.wait_for(server_job["job_id"], "int2", ["running"])
        terminal.expect("Running")
        terminal.interrupt_until("[w]atch on?")
        terminal.type("d\n")
        assert terminal.process.wait(30) == 130
        terminal.expect("goes on")
    assert newest(server, "int2")["status"] == "running"
    server.cancel(server_job["job_id"], "int2")


def test_ctrl_c_can_be_answered_with_watching_on_and_loses_no_output(server: Server, held: Path) -> None:
    with Terminal(server, "int3", "run", str(held), "-c", "comp") as terminal:
        terminal.expect("held\r\n")
        terminal.interrupt_until("[w]atch on?")
        terminal.type("w\n")
        release(server, None, newest(server, "int3")["job_id"])
        terminal.expect("released\r\n")
        assert terminal.process.wait(30) == 0
        assert terminal.shown.count("held\r\n") == 1


@pytest.mark.parametrize(("choice", "left"), [("ask", "running"), ("cancel", "cancelled")])
def test_an_interrupt_without_a_terminal_detaches_or_does_as_told(
    server: Server, held: Path, choice: str, left: str
) -> None:
    user = f"int4-{choice}"
    process = start(server, user, "run", str(held), "-c", "comp", "--on-interrupt", choice)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    job = newest(server, user)
    assert job["status"] == left
    if left == "running":
        assert job["job_id"] in stderr
        server.cancel(job["job_id"], user)


# -- the module ----------------------------------------------------------------------------------------------------


def test_the_module_has_the_same_calls(server: Server, tmp_path: Path) -> None:
    with client_of(server, "mod1") as client:
        assert client.whoami() == {"user_id": "mod1", "is_admin": False}
        job = client.submit(code=f"print('a'); {HOLD.replace(chr(10), ';')}print('b')", competition="comp")
        states = client.watch(job["job_id"])
        assert next(job for job in states if job["status"] == "running")["job_id"] == job["job_id"]
        pieces = client.follow(job["job_id"], ["stdout"])
        text = ""
        while "held\n" not in text:
            piece = next(pieces)
            text += piece.text
        assert piece == LogPiece("stdout", piece.text, len(text.encode()))
        with pytest.raises(TimeoutError):
            client.wait(job["job_id"], timeout=0.2)
        release(server, None, job["job_id"])
        assert text + "".join(piece.text for piece in pieces) == "a\nheld\nb\n"
        assert [job["status"] for job in states][-1] == "completed"
        assert client.wait(job["job_id"])["status"] == "completed"
        assert client.logs(job["job_id"], tail=2) == b"b\n"
        assert client.logs(job["job_id"], offset=2) == b"held\nb\n"
        assert client.results(job["job_id"])["results"][0] == {"output": "a"}
        saved = client.download(job["job_id"], tmp_path / "r.jsonl")
        assert saved.read_text().count("\n") == 3
        assert [event["event"] for event in client.events(job["job_id"])][-1] == "completed"
        for _ in range(2):
            client.wait(client.submit(code="print(1)", competition="other")["job_id"])
        assert len(client.jobs(limit=2)) == 2
        assert [job["competition_id"] for job in client.jobs(competition="comp")] == ["comp"]
        assert client.nodes()["queue_length"] == 0
        assert client.queue()["active_jobs"] == []
        with pytest.raises(Refused, match="already"):
            client.cancel(job["job_id"])


def test_a_client_that_is_closed_in_the_middle_of_following_leaves_no_thread(server: Server) -> None:
    job_id = server.submit("mod2", HOLD)
    before = threading.active_count()
    client = client_of(server, "mod2")
    assert next(client.follow(job_id)).text.startswith("held")  # its newline may come in a piece of its own
    assert threading.active_count() > before
    client.close()
    client.close()
    assert threading.active_count() == before
    server.cancel(job_id, "mod2")


def test_long_logs_come_whole(server: Server) -> None:
    job_id = server.run_job("mod3", "print('x' * (20 << 20))")["job_id"]
    with client_of(server, "mod3") as client:
        assert client.logs(job_id) == b"x" * (20 << 20) + b"\n"
        followed = "".join(piece.text for piece in client.follow(job_id))
        assert len(followed) == (20 << 20) + 1


def test_the_asynchronous_client_does_many_things_at_once(server: Server) -> None:
    code = f"import os\nos.mkfifo('go')\nprint('ä', flush=True)\n{WAIT_FOR_RELEASE}"

    async def one(user: str) -> tuple[str, str]:
        async with AsyncClient(server.url, server.token(user)) as client:
            job = await client.submit(code=code, competition="comp")
            text = ""
            async for piece in client.follow(job["job_id"]):
                text += piece.text
                if piece.text.endswith("\n"):
                    await asyncio.to_thread(release, server, None, job["job_id"])
            seen = [job["status"] async for job in client.watch(job["job_id"])]
            assert (await client.results(job["job_id"]))["stdout"] == "ä\n"
            return text, seen[-1]

    async def all_of_them() -> list[tuple[str, str]]:
        return await asyncio.gather(*(one(f"many{number}") for number in range(4)))

    for number in range(4):
        server.token(f"many{number}")
    assert asyncio.run(all_of_them()) == [("ä\n", "completed")] * 4


def test_a_notebook_s_running_loop_is_in_nobody_s_way(server: Server) -> None:
    server.token("nb")

    async def cell() -> str:
        with client_of(server, "nb") as client:
            return client.whoami()["user_id"]

    assert asyncio.run(cell()) == "nb"


def test_a_certificate_that_is_not_trusted_is_said_at_once_and_can_be_named(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    files = ["-keyout", str(key), "-out", str(certificate)]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files],
        check=True,
        capture_output=True,
    )
    server = Server({"TLS_CERT_FILE": str(certificate), "TLS_KEY_FILE": str(key)})
    server.url, server.verify = server.url.replace("http:", "https:"), str(certificate)
    with server:
        began = time.monotonic()
        with Client(server.url) as client, pytest.raises(Unreachable, match="--ca"):
            client.nodes()
        assert time.monotonic() - began < 10
        with Client(config=Config(url=server.url, ca=str(certificate))) as client:
            assert len(client.nodes()["nodes"]) == 8


# -- configuration -------------------------------------------------------------------------------------------------


def test_flags_outweigh_the_environment_and_that_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpuq.toml"
    Config(url="http://file:1", token='to"ken\\', competition="c", expected_time=30).save(path)
    assert Config.load() == Config(url="http://file:1", token='to"ken\\', competition="c", expected_time=30)
    monkeypatch.setenv("GPUQ_URL", "http://environment:2")
    monkeypatch.setenv("GPUQ_EXPECTED_TIME", "12.5")
    assert (Config.load().url, Config.load().expected_time) == ("http://environment:2", 12.5)
    assert Config.load(url="http://flag:3", token=None).url == "http://flag:3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("url = ", "cannot be read"),
        ("url = 5", "url must be a string"),
        ("expected_time = 'x'", "must be a number"),
        ("token = 'ä'", "token has characters"),
        ("url = 'ftp://host'", "must look like"),
        ("url = 'http://host:port'", "is not valid"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "gpuq.toml").write_text(text)
    with pytest.raises(NotConfigured, match=said):
        Config.load()


def test_the_client_is_as_old_as_the_server() -> None:
    import config

    assert gpuq.__version__ == config.VERSION
