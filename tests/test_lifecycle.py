"""The life of one job, from the submission to its results: the same on this machine and on SSH nodes."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fleet import Fleet
from tests.held_jobs import HOLD, WAIT_FOR_RELEASE, make_tokens, pids_with, release
from tests.server import FINAL, PROJECT, Server, clean_environment, wait_until

SETTINGS = {"SUBMITS_PER_MINUTE": "10000", "KILL_GRACE": "1", "SERVER_SECRET_OF_THE_TEST": "never-for-a-job"}
NDJSON = "application/x-ndjson"
USERS = ("alice", "bob", "carol")
DONE = "completed"

# Stays alive for long and does not mind SIGTERM; its last argument is how it is recognised from outside.
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def two_nodes(fleet: Fleet) -> dict[str, str]:
    """The settings of a server that uses the fleet's first two nodes."""
    settings = fleet.settings()
    return {**settings, "GPU_NODES": json.dumps(json.loads(settings["GPU_NODES"])[:2])}


@pytest.fixture(scope="module")
def embedded() -> Iterator[Server]:
    """A server with two slots on this machine."""
    with Server({**SETTINGS, "NUM_GPU_NODES": "2"}) as running:
        make_tokens(running, USERS, admin="admin")
        yield running


@pytest.fixture(scope="module")
def over_ssh(fleet: Fleet) -> Iterator[Server]:
    """A server with two SSH nodes."""
    with Server({**SETTINGS, **two_nodes(fleet)}) as running:
        make_tokens(running, USERS, admin="admin")
        yield running


@pytest.fixture(scope="module", params=["embedded", "over_ssh"])
def either(request: pytest.FixtureRequest) -> Server:
    """One after the other."""
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def server(either: Server) -> Iterator[Server]:
    """A server on which nothing runs; what a test left running is cancelled."""
    yield either
    for state in ("pending", "running"):
        for job in either.get(f"/api/jobs?status={state}", "admin").json()["jobs"]:
            either.cancel(job["job_id"], "admin")


@pytest.fixture
def nodes(either: Server, request: pytest.FixtureRequest) -> Fleet | None:
    """Where held jobs are released: the fleet, or None for this machine."""
    if "GPU_NODES" not in either.settings:
        return None
    found: Fleet = request.getfixturevalue("fleet")
    return found


# -- small things --------------------------------------------------------------------------------------------------


def strict(line: bytes | str) -> dict[str, Any]:
    """A line that must be one JSON object in the strict sense."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    value = json.loads(line, parse_constant=refuse, object_pairs_hook=unique)
    assert isinstance(value, dict)
    return value


def seconds(stamp: str) -> float:
    """Seconds since the epoch of a time in an answer."""
    assert stamp.endswith("Z")
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def published(server: Server, answer: dict[str, Any]) -> bytes:
    """The bytes of the job's file in `jobs/results`."""
    return (server.jobs_dir / "results" / str(answer["result_file"])).read_bytes()


def on_disk(server: Server, answer: dict[str, Any], name: str) -> bytes:
    """The bytes of a file in the job's folder."""
    return (server.jobs_dir / str(answer["job_id"]) / name).read_bytes()


def sandboxed(server: Server) -> bool:
    """Whether jobs run under bubblewrap there."""
    found = {node["sandbox"] for node in server.get("/api/nodes", "admin").json()["nodes"]}
    assert len(found) == 1
    return bool(found.pop())


def start_held(server: Server, user_id: str = "alice", code: str = HOLD, **fields: Any) -> str:
    """Submit a job and wait until it has said `held`."""
    job_id = server.submit(user_id, code, **fields)
    server.wait_for_output(job_id, user_id, "held\n")
    return job_id


def ended(server: Server, job_id: str, user_id: str = "alice") -> dict[str, Any]:
    """The job's results, once it has ended."""
    server.wait_for(job_id, user_id)
    return server.results(job_id, user_id)


def marker() -> str:
    """A word that no other process has among its arguments."""
    return f"marker-{uuid.uuid4()}"


# -- the same everywhere -------------------------------------------------------------------------------------------


def test_same_code_gives_the_same_answer_and_the_same_files_on_both(embedded: Server, over_ssh: Server) -> None:
    code = (
        "import json, os, sys\n"
        "print('epoch 1 äö')\n"
        "print('careful', file=sys.stderr)\n"
        "with open(os.environ['RESULTS_FILE'], 'w') as file:\n"
        "    for n in range(3):\n"
        "        file.write(json.dumps({'n': n, 'text': 'ü'}) + '\\n')\n"
    )
    own = ("job_id", "node_id", "created_at", "started_at", "completed_at", "result_file")
    answers, listings, files = [], [], []
    for server in (embedded, over_ssh):
        answer = server.run_job("alice", code)
        assert answer == server.results(answer["job_id"], "alice")
        folder = server.jobs_dir / answer["job_id"]
        listings.append(sorted(path.name for path in folder.iterdir()))
        files.append(
            {name: (folder / name).read_bytes() for name in ("solution.py", "config.json", "stdout", "stderr")}
        )
        files[-1]["published"] = published(server, answer)
        assert server.token("alice") not in "".join(path.read_text() for path in folder.iterdir())
        answers.append({name: value for name, value in answer.items() if name not in own})
    assert answers[0] == answers[1]
    assert listings[0] == listings[1]
    assert files[0] == files[1]
    assert answers[0]["status"] == DONE
    assert answers[0]["results"] == [{"n": n, "text": "ü"} for n in range(3)]
    assert files[0]["solution.py"] == code.encode()
    assert files[0]["stdout"] == "epoch 1 äö\n".encode()
    assert files[0]["stderr"] == b"careful\n"
    assert strict(files[0]["config.json"]) == {
        "competition_id": "comp",
        "project_id": "proj",
        "user_id": "alice",
        "expected_time": 60.0,
    }


def test_published_file_is_named_after_user_competition_and_end_and_is_whole(server: Server) -> None:
    answer = server.run_job("alice", "print('a')\nprint('{\"b\": 1}')\n", competition_id="comp-1.final_A")
    match = re.fullmatch(r"alice_comp-1\.final_A_(\d{8}_\d{6})(_\d+)?\.jsonl", answer["result_file"])
    assert match is not None, answer["result_file"]
    assert match[1] == answer["completed_at"][:19].replace("-", "").replace(":", "").replace("T", "_")
    content = published(server, answer)
    assert content.endswith(b"\n")
    assert [strict(line) for line in content.splitlines()] == [{"output": "a"}, {"b": 1}] == answer["results"]
    assert hashlib.sha256(content).hexdigest() == answer["result_sha256"]
    assert not list((server.jobs_dir / "results").glob("*tmp*"))


ENVIRONMENT_CODE = (
    "import json, os\n"
    "print(json.dumps({'env': dict(os.environ), 'cwd': os.getcwd(), 'files': os.listdir('.'),\n"
    "                  'open': sorted(os.listdir('/proc/self/fd'))[:3], 'argv': __import__('sys').argv}))\n"
)


def test_job_sees_the_promised_environment_and_nothing_of_the_server(server: Server) -> None:
    answer = server.run_job("alice", ENVIRONMENT_CODE, competition_id="comp-7", project_id="proj.x")
    seen = answer["results"][0]
    environment = seen["env"]
    assert seen["files"] == ["solution.py"]
    assert seen["argv"] == ["solution.py"]
    assert environment["HOME"] == seen["cwd"]
    assert environment["RESULTS_FILE"] == f"{seen['cwd']}/results.jsonl"
    promised = {"USER_ID": "alice", "COMPETITION_ID": "comp-7", "PROJECT_ID": "proj.x", "JOB_ID": answer["job_id"]}
    assert promised.items() <= environment.items()
    assert "CUDA_VISIBLE_DEVICES" in environment
    shown = json.dumps(environment)
    assert server.token("alice") not in shown
    assert SETTINGS["SERVER_SECRET_OF_THE_TEST"] not in shown
    assert str(server.folder) not in shown or not sandboxed(server)  # without one, the cwd itself lies there
    known = {"HOME", "PWD", "PATH", "LANG", "TMPDIR", "RESULTS_FILE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"}
    assert set(environment) == {*known, *promised}


def test_environment_is_the_same_on_both(embedded: Server, over_ssh: Server) -> None:
    first, second = (server.run_job("alice", ENVIRONMENT_CODE)["results"][0]["env"] for server in (embedded, over_ssh))
    assert set(first) == set(second)
    if sandboxed(embedded) != sandboxed(over_ssh):
        pytest.skip("only one of the two has a sandbox, so the job's folder differs")
    assert second["CUDA_VISIBLE_DEVICES"] == "0"
    for environment in (first, second):
        del environment["JOB_ID"], environment["CUDA_VISIBLE_DEVICES"]
    if sandboxed(embedded):
        assert first == second


# -- how it ended --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1, 3, 126, 127, 128, 145, 160, 255])
def test_exit_code_is_the_true_one(server: Server, code: int) -> None:
    answer = server.run_job("alice", f"import os\nprint('last words', flush=True)\nos._exit({code})\n")
    assert (answer["status"], answer["failure_reason"]) == ("failed", "exit_code")
    assert (answer["exit_code"], answer["signal"]) == (code, None)
    assert str(code) in answer["message"]
    assert answer["stdout"] == "last words\n"
    assert answer["attempt"] == 1
    assert answer["result_file"] is None


@pytest.mark.parametrize("number", [6, 9, 11, 15])
def test_signal_to_itself_is_told_as_that_signal(server: Server, number: int) -> None:
    answer = server.run_job("alice", f"import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(30)\n")
    assert (answer["status"], answer["failure_reason"]) == ("failed", "signal")
    assert (answer["exit_code"], answer["signal"]) == (None, number)
    assert "memory" not in answer["message"]


@pytest.mark.parametrize("code", [129, 137, 159])
def test_exit_code_of_a_fatal_signal_reads_as_that_signal_only_under_the_sandbox(server: Server, code: int) -> None:
    # bubblewrap reports a death by signal n as exit code 128+n, so the two cannot be told apart there.
    answer = server.run_job("alice", f"import os\nos._exit({code})\n")
    assert answer["status"] == "failed"
    if sandboxed(server):
        assert (answer["failure_reason"], answer["signal"], answer["exit_code"]) == ("signal", code - 128, None)
    else:
        assert (answer["failure_reason"], answer["signal"], answer["exit_code"]) == ("exit_code", None, code)


def test_exit_without_any_clean_up_is_a_success(server: Server) -> None:
    answer = server.run_job("alice", "import os\nprint('done')\nos._exit(0)\n")
    assert (answer["status"], answer["exit_code"], answer["failure_reason"]) == (DONE, 0, None)
    assert answer["results"] == [{"output": "done"}]


def test_exception_is_a_failure_with_its_traceback(server: Server) -> None:
    answer = server.run_job("alice", "print('before')\nraise ValueError('the very reason')\n")
    assert (answer["status"], answer["failure_reason"], answer["exit_code"]) == ("failed", "exit_code", 1)
    assert answer["stdout"] == "before\n"
    assert "ValueError: the very reason" in answer["stderr"]
    assert "line 2" in answer["stderr"]


def test_syntax_error_is_the_users_result(server: Server) -> None:
    answer = server.run_job("alice", "print('never')\ndef broken(:\n")
    assert (answer["status"], answer["failure_reason"], answer["exit_code"]) == ("failed", "exit_code", 1)
    assert "SyntaxError" in answer["stderr"]
    assert answer["stdout"] == ""


# -- output --------------------------------------------------------------------------------------------------------


def test_code_comes_back_to_the_byte_and_only_to_its_owner(embedded: Server) -> None:
    code = b"print('hello')\r\n# \xff\x00 <script>\n"
    job_id = embedded.submit("alice", code)
    answer = embedded.get(f"/api/code/{job_id}", "alice")
    assert answer.content == code
    assert answer.headers["Content-Type"].startswith("text/x-python")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="solution.py"'
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    refused = embedded.get(f"/api/code/{job_id}", "bob")
    assert refused.status_code == 403
    assert "hello" not in refused.text


def test_binary_output_is_kept_to_the_byte(server: Server) -> None:
    code = (
        "import sys\n"
        "sys.stdout.buffer.write(bytes(range(256)) * 300)\n"
        "sys.stderr.buffer.write(b'\\xff\\0\\r\\n\\x1b[31m')\n"
    )
    answer = server.run_job("alice", code)
    expected = {"stdout": bytes(range(256)) * 300, "stderr": b"\xff\0\r\n\x1b[31m"}
    for stream, content in expected.items():
        assert server.get(f"/api/logs/{answer['job_id']}?stream={stream}", "alice").content == content
        assert on_disk(server, answer, stream) == content
        assert answer[stream] == content.decode("utf-8", "replace")
    assert answer["status"] == DONE
    assert all(strict(line) for line in published(server, answer).splitlines())


def test_three_megabytes_on_stderr_do_not_hold_the_job_up(server: Server) -> None:
    code = "import sys\nfor n in range(30000):\n    sys.stderr.write(f'{n:099d}\\n')\nprint('through')\n"
    answer = server.run_job("alice", code)
    expected = "".join(f"{n:099d}\n" for n in range(30000))
    assert len(expected) == 3_000_000
    assert answer["status"] == DONE
    assert answer["stderr"] == expected
    assert answer["stderr_truncated"] is False
    assert on_disk(server, answer, "stderr") == expected.encode()
    assert answer["results"] == [{"output": "through"}]


def test_no_output_is_an_empty_result(server: Server) -> None:
    answer = server.run_job("alice", "pass\n")
    assert (answer["status"], answer["stdout"], answer["stderr"], answer["results"]) == (DONE, "", "", [])
    assert published(server, answer) == b""
    assert answer["result_sha256"] == hashlib.sha256(b"").hexdigest()


def test_stdout_lines_become_records(server: Server) -> None:
    lines = [
        ('{"score": 0.5}', {"score": 0.5}),
        ("plain text", {"output": "plain text"}),
        ("", {"output": ""}),
        ("[1, 2]", {"output": "[1, 2]"}),
        ('{"bad": NaN}', {"output": '{"bad": NaN}'}),
        ('{"a": 1, "a": 2}', {"output": '{"a": 1, "a": 2}'}),
        ("{broken", {"output": "{broken"}),
        ('  {"indented": true}', {"indented": True}),
    ]
    code = f"import sys\nsys.stdout.write({chr(10).join(text for text, _ in lines)!r} + '\\nno end of line')\n"
    answer = server.run_job("alice", code)
    expected = [*(record for _, record in lines), {"output": "no end of line"}]
    assert answer["status"] == DONE
    assert answer["results"] == expected
    assert [strict(line) for line in published(server, answer).splitlines()] == expected


# -- results -------------------------------------------------------------------------------------------------------


def writes(content: bytes) -> str:
    """Code that leaves these bytes as its results file, and prints something that is not among them."""
    return f"import os\nopen(os.environ['RESULTS_FILE'], 'wb').write({content!r})\nprint('not a record')\n"


def test_lines_of_the_results_file_are_the_records(server: Server) -> None:
    answer = server.run_job("alice", writes(b'{"a": 1}\n\n  {"b": [1, {"c": null}]}  \r\n{"last": "no newline"}'))
    assert answer["status"] == DONE
    assert answer["results"] == [{"a": 1}, {"b": [1, {"c": None}]}, {"last": "no newline"}]
    assert answer["stdout"] == "not a record\n"
    assert [strict(line) for line in published(server, answer).splitlines()] == answer["results"]


def test_one_pretty_printed_object_is_one_record(server: Server) -> None:
    record = {"metrics": {"accuracy": 0.93, "name": "ß"}, "folds": [1, 2, 3]}
    answer = server.run_job("alice", writes(json.dumps(record, indent=4, ensure_ascii=False).encode()))
    assert (answer["status"], answer["results"]) == (DONE, [record])
    assert published(server, answer).count(b"\n") == 1


@pytest.mark.parametrize(
    ("content", "line"),
    [
        pytest.param(b'{"ok": 1}\n{"loss": NaN}\n', 2, id="NaN"),
        pytest.param(b'{"ok": 1}\n{"loss": -Infinity}\n', 2, id="Infinity"),
        pytest.param(b'{"ok": 1}\n{"ok": 2}\n{"twice": 1, "twice": 2}\n', 3, id="key twice"),
        pytest.param(b'{"ok": 1}\n\n[1, 2]\n', 3, id="no object"),
        pytest.param(b'{"ok": 1}\n{"text": "\xff"}\n', 2, id="bad UTF-8"),
        pytest.param(b'{"ok": 1}\nloss 0.3\n', 2, id="no JSON"),
        pytest.param(b'{"deep": ' + b"[" * 20000 + b"]" * 20000 + b"}\n", 1, id="nested too deep"),
        pytest.param(b'{"cut": \n', 1, id="cut off"),
    ],
)
def test_invalid_results_fail_the_job_and_name_the_line(server: Server, content: bytes, line: int) -> None:
    before = os.listdir(server.jobs_dir / "results")
    answer = server.run_job("alice", writes(content))
    assert (answer["status"], answer["failure_reason"]) == ("failed", "results_invalid")
    assert answer["exit_code"] == 0
    assert re.search(rf"\bline {line}\b", answer["message"]), answer["message"]
    assert (answer["result_file"], answer["results"]) == (None, [])
    assert os.listdir(server.jobs_dir / "results") == before
    raw = server.get(f"/api/results/{answer['job_id']}?format=jsonl", "alice")
    assert raw.status_code == 404


def test_five_megabytes_of_results_arrive_whole(server: Server) -> None:
    code = (
        "import json, os\n"
        "with open(os.environ['RESULTS_FILE'], 'w') as file:\n"
        "    for n in range(5000):\n"
        "        file.write(json.dumps({'n': n, 'text': format(n, '01000d')}) + '\\n')\n"
    )
    answer = server.run_job("alice", code)
    expected = [{"n": n, "text": f"{n:01000d}"} for n in range(5000)]
    content = "".join(json.dumps(record) + "\n" for record in expected).encode()
    assert len(content) > 5_000_000
    assert answer["status"] == DONE
    assert published(server, answer) == content
    assert answer["result_sha256"] == hashlib.sha256(content).hexdigest()
    assert answer["results"] == expected
    assert server.get(f"/api/results/{answer['job_id']}?format=jsonl", "alice").content == content


# -- a deployment with a grader ------------------------------------------------------------------------------------

GRADER = """
import json, runpy, sys
_, code, competition, results = sys.argv
answer = runpy.run_path(code).get("answer")
if answer is not None:
    with open(results, "w") as file:
        json.dump({"words": sys.argv[1:], "competition": competition, "answer": answer}, file)
"""


@pytest.fixture(scope="module")
def grader() -> Iterator[Path]:
    """A grader's program, where every node can read it."""
    with tempfile.TemporaryDirectory(prefix="grader-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        program = folder / "grade_code.py"
        program.write_text(GRADER)
        program.chmod(0o644)
        yield program


@pytest.fixture(scope="module", params=["embedded", "over_ssh"])
def graded(request: pytest.FixtureRequest, grader: Path) -> Iterator[Server]:
    """A server whose command is a grader that names its results file."""
    nodes = two_nodes(request.getfixturevalue("fleet")) if request.param == "over_ssh" else {"NUM_GPU_NODES": "1"}
    command = f"{{python}} {grader} {{code}} {{competition_id}} {{results}}"
    binds = json.dumps([str(grader.parent)])
    with Server({**SETTINGS, **nodes, "JOB_COMMAND": command, "SANDBOX_BINDS": binds}) as running:
        make_tokens(running, USERS, admin="admin")
        yield running


def test_grader_gets_its_words_and_its_results_count(graded: Server) -> None:
    for competition in ("comp", "2024.comp-1_final", "a-b.c--d", "_x"):
        answer = graded.run_job("alice", "answer = 42\n", competition_id=competition)
        assert answer["status"] == DONE, answer
        words = ["solution.py", competition, "results.jsonl"]
        assert answer["results"] == [{"words": words, "competition": competition, "answer": 42}]


def test_grader_that_leaves_no_results_is_said_plainly(graded: Server) -> None:
    answer = graded.run_job("alice", "print('{\"score\": 1}')\n")
    assert (answer["status"], answer["failure_reason"], answer["exit_code"]) == ("failed", "results_missing", 0)
    assert "results file" in answer["message"]
    assert (answer["stdout"], answer["results"], answer["result_file"]) == ('{"score": 1}\n', [], None)


def test_failing_code_under_a_grader_is_an_exit_code_not_missing_results(graded: Server) -> None:
    answer = graded.run_job("alice", "raise SystemExit(4)\n")
    assert (answer["status"], answer["failure_reason"], answer["exit_code"]) == ("failed", "exit_code", 4)


# -- limits in time, and what a job leaves running -----------------------------------------------------------------


def test_time_limit_ends_the_job_with_a_plain_message(server: Server) -> None:
    answer = server.run_job("alice", "import time\nprint('begun', flush=True)\ntime.sleep(600)\n", expected_time=1)
    assert (answer["status"], answer["failure_reason"]) == ("failed", "timeout")
    assert "2 seconds" in answer["message"]
    assert "expected_time" in answer["message"]
    assert answer["stdout"] == "begun\n"
    lasted = seconds(answer["completed_at"]) - seconds(answer["started_at"])
    assert 1.5 < lasted < 20


def test_job_that_ignores_sigterm_is_killed_after_the_grace_time(server: Server) -> None:
    word = marker()
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, {word!r}])\n"
        "time.sleep(600)\n"
    )
    answer = server.run_job("alice", code, expected_time=1)
    assert pids_with(word) == []
    assert (answer["status"], answer["failure_reason"]) == ("failed", "timeout")
    assert "up" in answer["stdout"]
    lasted = seconds(answer["completed_at"]) - seconds(answer["started_at"])
    assert 1.5 < lasted < 25


def test_daemon_is_dead_when_the_job_has_ended(server: Server, nodes: Fleet | None) -> None:
    word = marker()
    code = (
        "import os, sys\n"
        "os.mkfifo('go')\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.dup2(os.open('/dev/null', os.O_RDWR), 0)\n"
        f"        os.execv(sys.executable, [sys.executable, '-c', {STUBBORN!r}, {word!r}])\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print('held', flush=True)\n" + WAIT_FOR_RELEASE
    )
    job_id = start_held(server, code=code)
    server.wait_for_output(job_id, "alice", "up\n")
    assert len(pids_with(word)) == 1
    release(server, nodes, job_id)
    answer = ended(server, job_id)
    assert pids_with(word) == []
    assert answer["status"] == DONE
    # It held stdout open; that delays nobody.
    assert seconds(answer["completed_at"]) - seconds(answer["started_at"]) < 60


# -- cancelling ----------------------------------------------------------------------------------------------------


def test_pending_job_is_cancelled_at_once(server: Server, nodes: Fleet | None) -> None:
    blockers = {user: start_held(server, user) for user in ("bob", "carol")}
    job_id = server.submit("alice", "print('never')\n")
    assert server.status(job_id, "alice")["status"] == "pending"
    response = server.cancel(job_id, "alice")
    assert response.status_code == 200
    answer = response.json()
    assert (answer["status"], answer["attempt"], answer["node_id"]) == ("cancelled", 0, None)
    assert answer["completed_at"] is not None
    assert (answer["queue_position"], answer["estimated_start"]) == (None, None)
    again = server.cancel(job_id, "alice")
    assert again.status_code == 400
    assert "already" in again.json()["detail"]
    release(server, nodes, *blockers.values())
    for user, blocker in blockers.items():
        assert server.wait_for(blocker, user)["status"] == DONE
    # The place in the queue and the user's own limit are free again, and the cancelled job never runs.
    assert server.run_job("alice")["status"] == DONE
    found = server.results(job_id, "alice")
    assert (found["status"], found["stdout"], found["results"]) == ("cancelled", "", [])
    events = [(event["event"], event["actor"]) for event in server.events(job_id, "alice")]
    assert events == [("submitted", "user:alice"), ("cancelled", "user:alice")]


def test_running_job_is_cancelled_with_everything_it_started(server: Server) -> None:
    word = marker()
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, {word!r}], start_new_session=True)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    job_id = start_held(server, code=code)
    server.wait_for_output(job_id, "alice", "up\n")
    assert len(pids_with(word)) == 1
    response = server.cancel(job_id, "alice")
    assert pids_with(word) == []
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["status"], answer["failure_reason"]) == ("cancelled", None)
    assert answer["cancel_requested_at"] <= answer["completed_at"]
    found = server.results(job_id, "alice")
    assert found["status"] == "cancelled"
    assert sorted(found["stdout"].splitlines()) == ["held", "up"]
    story = server.events(job_id, "alice")
    assert [event["event"] for event in story] == ["submitted", "claimed", "started", "cancel_requested", "cancelled"]
    assert story[-1]["actor"] == story[-2]["actor"] == "user:alice"
    assert story[-2]["request_id"] == response.headers["X-Request-ID"]
    assert server.run_job("alice")["status"] == DONE


def test_ended_job_cannot_be_cancelled(server: Server) -> None:
    for code, status in (("pass\n", DONE), ("raise SystemExit(1)\n", "failed")):
        answer = server.run_job("alice", code)
        response = server.cancel(answer["job_id"], "alice")
        assert response.status_code == 400
        assert "already" in response.json()["detail"]
        assert server.status(answer["job_id"], "alice")["status"] == status


def test_cancelling_twice_ends_the_job_once(server: Server) -> None:
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    job_id = start_held(server, code=code)
    with ThreadPoolExecutor(2) as pool:  # both within the second that the job still has
        responses = list(pool.map(lambda _: server.cancel(job_id, "alice"), range(2)))
    assert [response.status_code for response in responses] == [200, 200]
    assert {response.json()["status"] for response in responses} == {"cancelled"}
    late = server.cancel(job_id, "alice")
    assert late.status_code == 400
    assert "already" in late.json()["detail"]
    events = [event["event"] for event in server.events(job_id, "alice")]
    assert events.count("cancelled") == events.count("cancel_requested") == 1


def test_admin_cancels_a_users_job_and_is_named_to_admins(server: Server) -> None:
    job_id = start_held(server)
    assert server.cancel(job_id, "bob").status_code == 403
    assert server.cancel(job_id, "admin").status_code == 200
    assert server.status(job_id, "alice")["status"] == "cancelled"
    assert server.events(job_id, "admin")[-1]["actor"] == "admin:admin"
    assert server.events(job_id, "alice")[-1]["actor"] == "admin"
    steps = requests.get(
        f"{server.url}/api/status/{job_id}?follow=true", headers=server.bearer("alice"), timeout=30
    ).text
    assert '"actor": "admin"' in steps
    assert "admin:admin" not in steps


# -- the story -----------------------------------------------------------------------------------------------------


def test_events_tell_the_story_in_order(server: Server) -> None:
    response = server.post("pass\n", server.config("alice"))
    job_id = response.json()["job_id"]
    assert response.headers["Location"] == f"/api/status/{job_id}"
    node_id = server.wait_for(job_id, "alice")["node_id"]
    story = server.events(job_id, "alice")
    assert [event["event"] for event in story] == ["submitted", "claimed", "started", DONE]
    steps = [(event["from_status"], event["to_status"]) for event in story]
    assert steps == [(None, "pending"), ("pending", "running"), ("running", "running"), ("running", DONE)]
    assert [event["actor"] for event in story] == ["user:alice", *[f"node:{node_id}"] * 3]
    assert [event["node_id"] for event in story] == [None, *[node_id] * 3]
    assert [event["attempt"] for event in story] == [0, 1, 1, 1]
    assert {event["request_id"] for event in story} == {response.headers["X-Request-ID"]}
    times = [seconds(event["time"]) for event in story]
    assert times == sorted(times)


def test_request_id_of_the_client_is_kept(server: Server) -> None:
    mine = f"client-{uuid.uuid4()}"
    response = server.post("pass\n", server.config("alice"), headers={"X-Request-ID": mine}, wait=60)
    assert response.headers["X-Request-ID"] == mine
    story = server.events(response.json()["job_id"], "alice")
    assert {event["request_id"] for event in story} == {mine}
    assert mine in server.log()


def test_failure_is_told_with_its_reason(server: Server) -> None:
    answer = server.run_job("alice", "raise SystemExit(3)\n")
    last = server.events(answer["job_id"], "alice")[-1]
    assert (last["event"], last["to_status"], last["reason"]) == ("failed", "failed", "exit_code")
    assert last["message"] == answer["message"]
    assert last["time"] == answer["completed_at"]


# -- logs ----------------------------------------------------------------------------------------------------------


def test_logs_can_be_read_while_the_job_runs_and_after(server: Server, nodes: Fleet | None) -> None:
    code = (
        "import os, sys\n"
        "os.mkfifo('go')\n"
        "print('0123456789')\n"
        "print('warning', file=sys.stderr, flush=True)\n"
        "print('held', flush=True)\n" + WAIT_FOR_RELEASE + "print('after')\n"
    )
    job_id = start_held(server, code=code)
    server.wait_for_output(job_id, "alice", "warning\n", stream="stderr")
    before, whole = b"0123456789\nheld\n", b"0123456789\nheld\nafter\n"

    def read(**query: Any) -> tuple[bytes, int, int, str]:
        response = server.get(f"/api/logs/{job_id}", "alice", params=query)
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        names = ("X-Log-Size", "X-Log-Next-Offset")
        size, following = (int(response.headers[name]) for name in names)
        return response.content, size, following, response.headers["X-Job-Status"]

    assert read() == (before, 16, 16, "running")
    assert read(stream="stderr") == (b"warning\n", 8, 8, "running")
    assert read(offset=11) == (b"held\n", 16, 16, "running")
    assert read(offset=16) == (b"", 16, 16, "running")
    assert read(tail=5) == (b"held\n", 16, 16, "running")
    assert server.status(job_id, "alice")["status"] == "running"
    release(server, nodes, job_id)
    server.wait_for(job_id, "alice")
    assert read(offset=16) == (b"after\n", 22, 22, DONE)
    assert read() == (whole, 22, 22, DONE)
    assert read(offset=3, stream="stdout") == (whole[3:], 22, 22, DONE)
    assert read(tail=0) == (b"", 22, 22, DONE)
    assert read(tail=10_000) == (whole, 22, 22, DONE)
    assert read(offset=10_000) == (b"", 22, 22, DONE)
    assert read(stream="stderr", tail=3) == (b"ng\n", 8, 8, DONE)
    for query in ({"stream": "stdin"}, {"offset": -1}, {"tail": "x"}):
        assert server.get(f"/api/logs/{job_id}", "alice", params=query).status_code == 422


def test_output_arrives_while_the_job_is_silent(server: Server, nodes: Fleet | None) -> None:
    # Two lines at nearly the same time, then silence until the test has seen both: no notice of growth may be lost.
    rounds = 40
    code = (
        "import os, sys, time\n"
        "os.mkfifo('go')\n"
        f"for n in range({rounds}):\n"
        "    os.write(1, b'out %d;' % n)\n"
        "    until = time.perf_counter() + n * 0.0001\n"
        "    while time.perf_counter() < until:\n"
        "        pass\n"
        "    os.write(2, b'err %d;' % n)\n"
        "    " + WAIT_FOR_RELEASE
    )
    job_id = server.submit("alice", code)
    for n in range(rounds):
        server.wait_for_output(job_id, "alice", f"out {n};", timeout=15)
        server.wait_for_output(job_id, "alice", f"err {n};", stream="stderr", timeout=15)
        release(server, nodes, job_id)
    answer = ended(server, job_id)
    assert answer["stdout"] == "".join(f"out {n};" for n in range(rounds))
    assert answer["stderr"] == "".join(f"err {n};" for n in range(rounds))


def test_logs_of_a_waiting_job_are_empty(server: Server) -> None:
    for user in ("bob", "carol"):
        start_held(server, user)
    job_id = server.submit("alice")
    response = server.get(f"/api/logs/{job_id}", "alice")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["X-Job-Status"] == "pending"


# -- the raw file --------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(server: Server) -> dict[str, Any]:
    """A job with a hundred records."""
    return server.run_job("alice", "for n in range(100):\n    print(f'{{\"n\": {n}}}')\n")


def test_raw_file_comes_by_parameter_or_by_accept_with_its_digest(server: Server, finished: dict[str, Any]) -> None:
    content = published(server, finished)
    digest = hashlib.sha256(content).digest()
    path = f"/api/results/{finished['job_id']}"
    for response in (
        server.get(f"{path}?format=jsonl", "alice"),
        server.get(path, "alice", headers={"Accept": NDJSON}),
    ):
        assert response.status_code == 200
        assert response.content == content
        assert response.headers["Content-Type"] == NDJSON
        assert response.headers["Content-Length"] == str(len(content))
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
        assert finished["result_file"] in response.headers["Content-Disposition"]
    assert finished["result_sha256"] == digest.hex()
    plain = server.get(f"{path}?format=json", "alice", headers={"Accept": NDJSON})
    assert plain.headers["Content-Type"] == "application/json"
    assert plain.json() == finished


def test_raw_file_is_given_in_parts(server: Server, finished: dict[str, Any]) -> None:
    content = published(server, finished)
    path = f"/api/results/{finished['job_id']}?format=jsonl"

    def part(asked: str, **headers: str) -> requests.Response:
        return server.get(path, "alice", headers={"Range": asked, **headers})

    for asked, start, end in (("bytes=0-9", 0, 10), ("bytes=100-", 100, len(content)), ("bytes=-7", -7, len(content))):
        response = part(asked)
        assert response.status_code == 206
        assert response.content == content[start:end]
        first = start % len(content)
        assert response.headers["Content-Range"] == f"bytes {first}-{end - 1}/{len(content)}"
    etag = server.get(path, "alice").headers["ETag"]
    assert part("bytes=0-9", **{"If-Range": etag}).status_code == 206
    changed = part("bytes=0-9", **{"If-Range": '"another"'})
    assert (changed.status_code, changed.content) == (200, content)


def test_range_beyond_the_raw_file_is_a_problem_that_tells_its_size(server: Server, finished: dict[str, Any]) -> None:
    size = len(published(server, finished))
    path = f"/api/results/{finished['job_id']}?format=jsonl"
    response = server.get(path, "alice", headers={"Range": f"bytes={size}-"})
    assert response.status_code == 416
    assert response.headers["Content-Range"] == f"bytes */{size}"
    assert response.headers["Content-Type"] == "application/problem+json"
    assert str(size) in response.json()["detail"]


@pytest.mark.parametrize("asked", ["bytes=abc", "bytes=9-2", "lines=0-1", "nonsense"])
def test_range_that_is_none_is_passed_over(server: Server, finished: dict[str, Any], asked: str) -> None:
    path = f"/api/results/{finished['job_id']}?format=jsonl"
    response = server.get(path, "alice", headers={"Range": asked})
    assert (response.status_code, response.content) == (200, published(server, finished))


def test_raw_file_is_not_sent_again_to_who_has_it(server: Server, finished: dict[str, Any]) -> None:
    path = f"/api/results/{finished['job_id']}?format=jsonl"
    etag = server.get(path, "alice").headers["ETag"]
    for known in (etag, f"W/{etag}", f'"another", {etag}', "*"):
        response = server.get(path, "alice", headers={"If-None-Match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["ETag"] == etag
    assert server.get(path, "alice", headers={"If-None-Match": '"another"'}).status_code == 200


def test_head_tells_the_raw_files_size_and_digest_without_sending_it(server: Server, finished: dict[str, Any]) -> None:
    url = f"{server.url}/api/results/{finished['job_id']}"
    got = server.get(f"/api/results/{finished['job_id']}?format=jsonl", "alice")
    for query, headers in (({"format": "jsonl"}, {}), ({}, {"Accept": NDJSON})):
        head = requests.head(url, params=query, headers={**server.bearer("alice"), **headers}, timeout=30)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("Content-Length", "Content-Type", "ETag", "Repr-Digest", "Accept-Ranges", "Content-Disposition"):
            assert head.headers[name] == got.headers[name]
    part = requests.head(
        url, params={"format": "jsonl"}, headers={**server.bearer("alice"), "Range": "bytes=0-9"}, timeout=30
    )
    assert (part.status_code, part.headers["Content-Length"], part.content) == (206, "10", b"")
    as_json = requests.head(url, headers=server.bearer("alice"), timeout=30)
    assert (as_json.status_code, as_json.content) == (200, b"")
    assert as_json.headers["Content-Type"] == "application/json"
    assert requests.head(url, timeout=30).status_code == 401
    assert requests.head(url, headers=server.bearer("bob"), timeout=30).status_code == 403


def test_results_of_a_running_job_are_not_there_yet(server: Server) -> None:
    job_id = start_held(server)
    for path in (f"/api/results/{job_id}", f"/api/results/{job_id}?format=jsonl"):
        response = server.get(path, "alice")
        assert response.status_code == 409
        assert "running" in response.json()["detail"]


# -- waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        pytest.param({"wait": "30"}, {}, id="wait=30"),
        pytest.param({"wait": "true"}, {}, id="wait=true"),
        pytest.param({}, {"Prefer": "wait=30"}, id="Prefer"),
        pytest.param({"wait": "30"}, {"Prefer": "wait=0"}, id="both"),
    ],
)
def test_waiting_answer_comes_with_the_end(server: Server, query: dict[str, Any], headers: dict[str, str]) -> None:
    response = server.post(
        "import time\ntime.sleep(0.5)\nprint('x')\n", server.config("alice"), headers=headers, **query
    )
    arrived = time.time()
    answer = response.json()
    assert (response.status_code, answer["status"]) == (200, DONE)
    assert arrived - seconds(answer["completed_at"]) < 1
    assert answer == server.results(answer["job_id"], "alice")
    assert answer["results"] == [{"output": "x"}]
    assert response.headers["Location"] == f"/api/status/{answer['job_id']}"
    if not query:
        assert response.headers["Preference-Applied"] == "wait=30"


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        pytest.param({}, {}, id="default"),
        pytest.param({"wait": "false"}, {}, id="wait=false"),
        pytest.param({"wait": "0"}, {}, id="wait=0"),
        pytest.param({"wait": "false"}, {"Prefer": "wait=30"}, id="parameter outweighs header"),
    ],
)
def test_answer_without_waiting_comes_while_the_job_is_active(
    server: Server, query: dict[str, Any], headers: dict[str, str]
) -> None:
    response = server.post(HOLD, server.config("alice"), headers=headers, **query)
    answer = response.json()
    assert (response.status_code, answer["status"]) == (200, "pending")
    assert answer["completed_at"] is None
    assert "results" not in answer


def test_wait_shorter_than_the_job_answers_that_it_runs(server: Server, nodes: Fleet | None) -> None:
    began = time.monotonic()
    response = server.post(HOLD, server.config("alice"), wait=1)
    assert 1 <= time.monotonic() - began < 20
    answer = response.json()
    assert (response.status_code, answer["status"]) == (200, "running")
    assert answer["completed_at"] is None
    release(server, nodes, answer["job_id"])
    assert ended(server, answer["job_id"])["status"] == DONE


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf", ""])
def test_wait_that_is_no_time_is_refused_and_nothing_is_queued(server: Server, wait: str) -> None:
    before = server.get("/api/jobs?limit=1", "alice").json()["jobs"]
    response = server.post("pass\n", server.config("alice"), wait=wait)
    assert response.status_code == 400
    assert [error["field"] for error in response.json()["errors"]] == ["wait"]
    assert server.get("/api/jobs?limit=1", "alice").json()["jobs"] == before


def raw_submit(port: int, config: dict[str, Any], code: str) -> socket.socket:
    """Send a submission that waits for the job's end, and do not read the answer."""
    parts = [("code", code), ("config_file", json.dumps(config))]
    body = "".join(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in parts)
    body += "--b--\r\n"
    head = (
        "POST /api/submit?wait=60 HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body.encode())}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall((head + body).encode())
    return connection


def test_client_that_hangs_up_while_waiting_loses_nothing(server: Server, nodes: Fleet | None) -> None:
    def running() -> Any:
        return server.get("/api/jobs?status=running", "alice").json()["jobs"]

    with raw_submit(server.port, server.config("alice"), HOLD):
        job_id = wait_until(running, 30, "the job to run")[0]["job_id"]
        server.wait_for_output(job_id, "alice", "held\n")
    assert server.status(job_id, "alice")["status"] == "running"
    release(server, nodes, job_id)
    answer = ended(server, job_id)
    assert (answer["status"], answer["stdout"]) == (DONE, "held\n")


def test_client_that_hangs_up_leaves_no_waiter_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The only test that looks inside: the number of waiters is not to be seen from outside.
    import uvicorn

    import main
    from api import make_app
    from auth import TokenDigest
    from config import load
    from database import Database
    from token_manager import TokenManager

    for name in set(os.environ) - set(clean_environment({})):
        monkeypatch.delenv(name)
    settings = load(
        database_url=f"sqlite:///{tmp_path / 'database.db'}",
        jobs_dir=tmp_path / "jobs",
        token_key_file=tmp_path / "token.key",
        num_gpu_nodes=1,
        min_free_disk=0,
        _env_file=None,
    )
    database = Database(settings.database_url)
    TokenManager(database, TokenDigest.from_file(settings.token_key_file)).create("alice", "alice_token_of_this_test")
    database.close()
    config = {"competition_id": "c", "project_id": "p", "user_id": "alice", "expected_time": 60}
    config["token"] = "alice_token_of_this_test"
    inside = main.Server(settings)
    listening = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(
        uvicorn.Config(make_app(inside.lifespan), log_config=None, access_log=False, timeout_graceful_shutdown=3)
    )
    thread = threading.Thread(target=lambda: asyncio.run(http.serve(sockets=[listening])))
    thread.start()
    try:
        wait_until(lambda: http.started, 30, "the server to listen")
        port = listening.getsockname()[1]
        waiting = inside.queue.ended.waiting
        connections = [raw_submit(port, config, "import time\ntime.sleep(600)\n")]
        wait_until(lambda: waiting() == 1, 30, "the client to be waited for")
        connections[0].close()
        wait_until(lambda: waiting() == 0, 30, "the waiter to be gone")
        job = inside.queue.jobs_page(filters={}, before_seq=None, limit=1)[0]
        assert job.state not in FINAL
        headers = {"Authorization": f"Bearer {config['token']}"}
        url = f"http://127.0.0.1:{port}/api/cancel/{job.job_id}"
        assert requests.post(url, headers=headers, timeout=30).json()["status"] == "cancelled"
        assert waiting() == 0
    finally:
        http.should_exit = True
        thread.join(30)
        inside.close()
        listening.close()
    assert not thread.is_alive()
    assert PROJECT not in tmp_path.parents
