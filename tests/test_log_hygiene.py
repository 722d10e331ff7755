"""What a server tells its operators and its callers holds no secret: a real server at LOG_LEVEL=debug, sent tokens and
hostile characters through every route, and everything it logged, counted and answered read afterwards."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.server import PROJECT, Server, wait_until

FORMATS = ("text", "json")
HOSTILE = "MARK\n2026-01-01T00:00:00 ERROR   api: forged\r\x1b[31m\x9b31m\x1b]0;title\x07\x00\u2028"
# What no line may hold: the config's words, what the job printed or wrote, and what was sent where nothing belongs.
COMPETITION, PROJECT_ID, EXTRA = "Competition-of-Alice", "Project-of-Alice", "extra-field-of-alice"
PRINTED, WRITTEN, SOURCE, GUESS = "printed-by-the-job", "written-by-the-job", "source_of_the_job", "guessed-token-"
CODE = f"""import sys  # {SOURCE}
print({PRINTED!r}, {HOSTILE!r})
print({PRINTED!r}, {HOSTILE!r}, file=sys.stderr)
open("results.jsonl", "w").write('{{"{WRITTEN}": NaN, "a": 1}}')
"""


class Told:
    """A server, every answer it gave, and the secrets it was given."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.session = requests.Session()
        self.answers: list[requests.Response] = []
        self.secrets = [server.token("alice"), server.token("the-admin", admin=True)]

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        answer = self.session.request(method, f"{self.server.url}{path}", timeout=60, **options)
        self.answers.append(answer)
        return answer

    def submit(self, config: Any, **options: Any) -> requests.Response:
        body = json.dumps(config) if isinstance(config, dict) else config
        files = {"code": (options.pop("name", "solution.py"), CODE), "config_file": ("c.json", body)}
        return self.call("POST", "/api/submit", files=files, **options)

    def headers(self, token: str) -> Iterator[dict[str, str]]:
        """The token in every place in which a client may put it."""
        yield {"Authorization": f"Bearer {token}", "X-Request-ID": f"<{token}>", "Accept": token, "Range": token}
        yield {"Authorization": f"Basic {token}", "X-Token": token, "Cookie": f"token={token}", "User-Agent": token}


def go_through_everything(told: Told) -> str:
    """Every route with good, bad and misplaced tokens and hostile text; the id of the job that was run."""
    server = told.server
    config = server.config("alice", competition_id=COMPETITION, project_id=PROJECT_ID, remark=EXTRA)
    ended = told.submit(config, params={"wait": "60"}, name=f"{HOSTILE}.py").json()
    assert (ended["status"], ended["failure_reason"]) == ("failed", "results_invalid"), ended
    job_id = str(ended["job_id"])
    document = server.get("/openapi.json").json()
    tokens = [*told.secrets, *(f"{GUESS}{number}" for number in range(3))]
    told.secrets += [GUESS, COMPETITION, PROJECT_ID, EXTRA, PRINTED, WRITTEN, SOURCE]
    for path, methods in document["paths"].items():
        for method in methods:
            if path in ("/api/submit", "/api/stream"):  # the one comes below, the other never ends
                continue
            for word in (job_id, quote(HOSTILE, safe="")):
                place = path.replace("{job_id}", word).replace("{node_id}", word)
                for token in tokens[:3] if word == job_id else tokens[:1]:
                    for headers in told.headers(token):
                        told.call(method.upper(), place, headers=headers, params={"token": token, "q": HOSTILE})
    for name in config:
        told.submit({**config, name: HOSTILE})
        told.submit({**config, name: {"deep": [COMPETITION, tokens[0]]}})
    told.submit({**config, HOSTILE: HOSTILE, "token": tokens[-1]})
    told.submit({**config, "user_id": "bob"})
    told.call("POST", "/api/submit", files={"code": (HOSTILE, CODE)})
    told.call("DELETE", "/api/jobs")
    told.submit(json.dumps(config)[:-1] + HOSTILE)
    told.submit(f"token: &a {tokens[0]}\ncompetition_id: !!python/object:{COMPETITION} *a\n")
    told.submit(config, headers={"Idempotency-Key": f"{tokens[0]}\x07"})
    told.submit(config, headers={"Content-Type": f"multipart/form-data; boundary={tokens[0]}"})
    for words in (
        f"GET /{tokens[0]} SMTP/9\r\n\r\n",
        f"GET / HTTP/1.1\r\n{tokens[0]}\x1b[31m\r\n\r\n",
        f"{HOSTILE}\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(words.encode())
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass
    # Something was logged of it, and the debug level was really on.
    wait_until(lambda: job_id in server.log() and "is failed" in server.log())
    return job_id


@pytest.fixture(scope="module", params=FORMATS)
def told(request: pytest.FixtureRequest) -> Iterator[Told]:
    """A server of one LOG_FORMAT, after all of that."""
    settings = {
        "LOG_LEVEL": "debug",
        "LOG_FORMAT": request.param,
        "NUM_GPU_NODES": "1",
        "SUBMITS_PER_MINUTE": "1000",
        "LOGIN_FAILURES_PER_MINUTE": "60",
    }
    with Server(settings) as server:
        told = Told(server)
        go_through_everything(told)
        yield told


def test_no_line_of_the_log_holds_a_secret(told: Told) -> None:
    lines = told.server.log().splitlines()
    assert len(lines) > 10
    for secret in told.secrets:
        assert [line for line in lines if secret in line] == []


def test_every_line_of_the_log_is_the_servers_own(told: Told) -> None:
    raw = told.server.log_path.read_bytes()
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]", raw)
    for line in raw.decode().splitlines():
        assert "forged" not in line
        if told.server.settings["LOG_FORMAT"] == "json":
            assert {"time", "level", "logger", "message"} <= json.loads(line).keys()
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) +[\w.]+: ", line), line
    assert "Traceback" not in raw.decode()


def test_no_error_tells_a_secret_a_path_or_a_version(told: Told) -> None:
    refused = [answer for answer in told.answers if answer.status_code >= 400]
    assert {400, 401, 403, 404, 405, 422} <= {answer.status_code for answer in refused}
    inner = [str(PROJECT), str(told.server.folder), "Traceback", ".py", "/usr/", "uvicorn", "starlette", "sqlite"]
    tokens = told.secrets[:2]
    for answer in refused:
        head = "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
        for word in [*inner, *tokens, GUESS, EXTRA, PRINTED, SOURCE]:
            assert word not in answer.text + head, (answer.request.method, answer.request.path_url, answer.text)
        if answer.text != "Invalid HTTP request received.":  # what is no request has no route and no id
            assert answer.headers["Content-Type"] == "application/problem+json"
        assert not re.search(r"\d+\.\d+\.\d+", answer.text.replace("127.0.0.1", "")), answer.text


def test_metrics_name_nobody(told: Told) -> None:
    text = told.server.get("/metrics").text
    assert "gpu" in text
    for secret in [*told.secrets, "alice", "the-admin", "MARK", str(told.server.folder), str(PROJECT)]:
        assert secret not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
