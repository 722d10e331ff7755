"""What the dashboard is made of: its page and files, who is calling, the queue, the past, the users, the stream."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import requests

import clock
import pages
import schemas
import states
from answers import QueuePage
from auth import Caller
from database import Database
from history import KEEP_SECONDS, History
from live import HEARTBEAT
from nodes import NodeRecord, NodeRegistry
from queue_manager import NewJob, Outcome, QueueManager
from stream import MAIL_MOST, ROWS_MOST, Board, BoardStream, Sources
from tests.held_jobs import HOLD, release
from tests.records import make_users, rows
from tests.server import Server, wait_until

SECOND = 1_000_000
SECRET = "print('the-secret-output', flush=True)\n"
USERS = ("alice", "bob", "carol", "dave", "eve")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One node, so that the second job waits."""
    with Server({"NUM_GPU_NODES": "1", "SUBMITS_PER_MINUTE": "1000", "KILL_GRACE": "1"}) as running:
        yield make_users(running, *USERS, admin="root")


@pytest.fixture
def busy(server: Server) -> Iterator[dict[str, str]]:
    """bob's job runs, carol's and alice's wait behind it."""
    found = {user_id: server.submit(user_id, SECRET + HOLD, competition_id=f"{user_id}-comp") for user_id in ("bob",)}
    server.wait_for(found["bob"], "bob", ("running",))
    for user_id in ("carol", "alice"):
        found[user_id] = server.submit(user_id, SECRET + HOLD, competition_id=f"{user_id}-comp")
    yield found
    for user_id in ("alice", "carol", "bob"):
        server.cancel(found[user_id], user_id)
        server.wait_for(found[user_id], user_id)


class Watching:
    """A client of the stream; its events are collected by a thread of its own."""

    def __init__(self, server: Server, user_id: str) -> None:
        self.events: list[tuple[str, Any]] = []
        self.text = ""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/api/stream", headers=server.bearer(user_id))
        assert connection.sock is not None
        self._socket = connection.sock
        self._response = connection.getresponse()
        assert self._response.status == 200
        assert self._response.headers["Content-Type"] == "text/event-stream"
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        name = ""
        with contextlib.suppress(OSError, http.client.HTTPException):  # closed here
            while line := self._response.readline().decode():
                self.text += line
                if line.startswith("event: "):
                    name = line.removeprefix("event: ").strip()
                elif line.startswith("data: "):
                    self.events.append((name, json.loads(line.removeprefix("data: "))))

    def of(self, name: str) -> list[Any]:
        return [data for found, data in self.events if found == name]

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        return wait_until(condition, 40, f"{what}; there were {self.events[-5:]}")

    def until_begun(self) -> None:
        self.until(lambda: len(self.events) >= 3, "the first events")

    def until_job(self, job_id: str, *wanted: str) -> None:
        def reached() -> bool:
            return any(job["job_id"] == job_id and job["status"] in wanted for job in self.of("job"))

        self.until(reached, f"job {job_id} to be {wanted}")

    def until_over(self) -> None:
        self.thread.join(40)
        assert not self.thread.is_alive(), "the stream goes on"

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the server was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self.until_over()
        self._socket.close()


@pytest.fixture
def watch(server: Server) -> Iterator[Callable[[str], Watching]]:
    """Watch as a user, until the end of the test."""
    open_ones: list[Watching] = []

    def start(user_id: str) -> Watching:
        open_ones.append(Watching(server, user_id))
        open_ones[-1].until_begun()
        return open_ones[-1]

    yield start
    for watching in open_ones:
        watching.close()


# -- the page ------------------------------------------------------------------------------------------------------

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_a_browser_gets_the_page_and_everyone_else_json(server: Server) -> None:
    page = server.get("/", headers=BROWSER)
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert page.text.lstrip().lower().startswith("<!doctype html>")
    assert "Accept" in page.headers["Vary"]
    for accept in ("*/*", "application/json", "text/html;q=0, */*", ""):
        answer = server.get("/", headers={"Accept": accept})
        assert answer.json()["endpoints"]["stream"] == "GET /api/stream", accept
        assert "Accept" in answer.headers["Vary"]


def test_the_page_forbids_the_browser_everything_that_it_does_not_need(server: Server) -> None:
    page = server.get("/", headers=BROWSER)
    policy = dict(part.strip().split(" ", 1) for part in page.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert "http" not in page.headers["Content-Security-Policy"]
    # So nothing may be inline, and nothing from another host.
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", page.text)
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page.text)


def test_the_page_is_revalidated_and_its_files_are_kept_for_ever_by_their_version(server: Server) -> None:
    page = server.get("/", headers=BROWSER)
    assert page.headers["Cache-Control"] == "no-cache"
    again = server.get("/", headers={**BROWSER, "If-None-Match": page.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    for address in re.findall(r'"(/static/dashboard/[^"]+\?v=[^"]+)"', page.text):
        file = server.get(address)
        assert file.status_code == 200, address
        assert "immutable" in file.headers["Cache-Control"]
        old = server.get(address.partition("?")[0] + "?v=old")
        assert old.headers["Cache-Control"] == "no-cache"
        assert server.get(address, headers={"If-None-Match": file.headers["ETag"]}).status_code == 304


def test_files_are_versioned_compressed_and_read_anew(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<script src="/static/dashboard/a.js"></script><link href="/static/x.css">')
    (tmp_path / "a.js").write_text("let a = 1;\n" * 100)
    files = pages.Files(tmp_path)
    script, index = files.get("a.js"), files.index()
    assert script is not None
    assert index is not None
    assert script.media_type == "text/javascript; charset=utf-8"
    assert script.compressed is not None
    assert gzip.decompress(script.compressed) == script.body
    assert f'"/static/dashboard/a.js?v={script.digest}"'.encode() in index.body
    assert b'"/static/x.css"' in index.body
    (tmp_path / "a.js").write_text("let a = 2;\n")
    changed, page = files.get("a.js"), files.index()
    assert changed is not None
    assert page is not None
    assert changed.digest != script.digest
    assert f"?v={changed.digest}".encode() in page.body
    (tmp_path / "index.html").unlink()
    assert files.index() is None


@pytest.mark.parametrize(
    "name", ["", "/", "../swagger-ui/LICENSE", "a/../../api.py", ".hidden", "a/.hidden", "/etc/passwd", "nothing.js"]
)
def test_no_file_beside_the_folder_is_served(server: Server, name: str) -> None:
    assert pages.Files().get(name) is None
    escaped = name.replace("/", "%2f")
    answer = requests.get(f"{server.url}/static/dashboard/{escaped}", timeout=30)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_file_can_be_asked_about_but_not_written(server: Server) -> None:
    address = f"{server.url}/static/dashboard/index.html"
    head = requests.head(address, timeout=30)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["Content-Length"]) > 0
    assert "Content-Security-Policy" in head.headers
    assert requests.post(address, timeout=30).status_code == 405


# -- who is calling ------------------------------------------------------------------------------------------------


def test_whoami_tells_the_role_the_end_of_the_token_and_the_limits(server: Server) -> None:
    for user_id in ("alice", "root"):
        body = server.get("/api/whoami", user_id).json()
        schemas.Whoami.model_validate(body, strict=True)
        assert (body["user_id"], body["is_admin"]) == (user_id, user_id == "root")
        (token,) = rows(server, "SELECT expires_at FROM tokens WHERE user_id = ?", user_id)
        assert body["token_expires_at"] == clock.iso(token["expires_at"])
        assert body["limits"]["submissions_per_minute"] == 1000
        assert body["max_active_jobs"] == 1


@pytest.mark.parametrize("path", ["/api/whoami", "/api/queue", "/api/history", "/api/stream", "/api/admin/users"])
def test_nothing_of_it_is_told_without_a_token(server: Server, path: str) -> None:
    assert server.get(path).status_code == 401
    assert server.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401


# -- the queue -----------------------------------------------------------------------------------------------------

HIDDEN = ("job_id", "user_id", "competition_id", "created_at", "expected_time")


def test_a_user_sees_only_place_and_time_of_other_peoples_jobs(server: Server, busy: dict[str, str]) -> None:
    answer = server.get("/api/queue", "alice")
    body = answer.json()
    schemas.QueueList.model_validate_json(answer.content, strict=True)
    assert (body["queue_length"], body["running"]) == (2, 1)
    assert body["expected_wait_seconds"] > 0
    carols, own = body["entries"]
    assert (carols["position"], carols["mine"], own["position"], own["mine"]) == (1, False, 2, True)
    assert [carols[name] for name in HIDDEN] == [None] * len(HIDDEN)
    assert carols["estimated_start"] < own["estimated_start"]
    assert (own["job_id"], own["user_id"], own["competition_id"]) == (busy["alice"], "alice", "alice-comp")
    assert own["expected_time"] == 60
    assert own["estimated_start_range"]["earliest"] <= own["estimated_start"]
    for stranger in (answer.text, server.get("/api/queue", "eve").text):
        assert not [word for word in ("carol", "bob", busy["carol"], busy["bob"]) if word in stranger]
    status = server.status(busy["alice"], "alice")
    assert status["queue_position"] == 2


def test_an_admin_sees_whose_the_jobs_are(server: Server, busy: dict[str, str]) -> None:
    entries = server.get("/api/queue", "root").json()["entries"]
    assert [(entry["job_id"], entry["user_id"]) for entry in entries] == [
        (busy["carol"], "carol"),
        (busy["alice"], "alice"),
    ]
    assert not any(entry["mine"] for entry in entries)
    first = server.get("/api/queue?limit=1", "root").json()
    assert (len(first["entries"]), first["queue_length"]) == (1, 2)
    for limit in ("0", "501", "x"):
        assert server.get(f"/api/queue?limit={limit}", "root").status_code == 422


# -- users ---------------------------------------------------------------------------------------------------------


def test_an_admin_reads_the_users_in_pages_without_any_token(server: Server) -> None:
    server.run_job("eve")
    make_users(server, "gone")
    server.run("token_manager.py", "revoke", "--user", "gone")
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        answer = server.get(f"/api/admin/users?limit=2{cursor}", "root")
        schemas.UserPage.model_validate_json(answer.content, strict=True)
        assert not [token for token in server.tokens.values() if token in answer.text]
        assert "digest" not in answer.text
        body = answer.json()
        found += body["users"]
        if body["next_cursor"] is None:
            break
        assert len(body["users"]) == 2
        cursor = f"&cursor={body['next_cursor']}"
    users = {user["user_id"]: user for user in found}
    assert [user["user_id"] for user in found] == sorted(users)
    assert set(users) >= {*USERS, "root", "gone"}
    assert users["root"]["is_admin"]
    assert users["gone"]["token_state"] == "revoked"
    assert users["eve"]["token_state"] == "active"
    assert users["eve"]["jobs_total"] >= users["eve"]["jobs"]["completed"] >= 1
    assert users["eve"]["last_job_at"] is not None
    assert users["eve"]["token_last_used_at"] is not None
    assert users["gone"]["jobs_total"] == 0
    # A new token counts, though the revoked one is older and still there.
    make_users(server, "gone")
    again = server.get("/api/admin/users?limit=500", "root").json()["users"]
    assert next(user for user in again if user["user_id"] == "gone")["token_state"] == "active"


def test_only_an_admin_reads_the_users(server: Server) -> None:
    assert server.get("/api/admin/users", "alice").status_code == 403
    assert server.get("/api/admin/users?cursor=c2VxOjQ3MTE", "root").status_code == 400
    assert server.get("/api/admin/users?cursor=%00", "root").status_code == 400


# -- the past ------------------------------------------------------------------------------------------------------


class Past:
    """A queue and its history on a database of their own, at a time that the test sets."""

    def __init__(self, folder: Path) -> None:
        self.now = 1_700_000_100 * SECOND  # the begin of a row
        self.database = Database(f"sqlite:///{folder / 'database.db'}", server=True)
        self.queue = QueueManager(self.database, max_active_jobs=64, now=lambda: self.now)
        self.queue.usable_nodes = lambda: ["node-1"]
        self.registry = NodeRegistry()
        for number in (1, 2):
            self.registry.add(NodeRecord(f"node-{number}", "x", connected=True, job_id="j" if number == 1 else None))
        self.history = self.start()

    def start(self) -> History:
        return History(self.queue, self.registry, now=lambda: self.now)

    def submit(self) -> None:
        new = NewJob("alice", "comp", "proj", 60, 120, {}, b"", b"d" * 32, "req")
        self.database.write(self.queue.submit(new))

    def run(self, *, wait: float, state: str) -> None:
        """A job that waits so many seconds, and ends at once."""
        self.submit()
        self.now += int(wait * SECOND)
        claim = self.queue.claim("node-1", "x")
        assert claim is not None
        self.queue.launched(claim, "boot")
        self.database.write(lambda transaction: None)
        reason = states.EXIT_CODE if state == states.FAILED else None
        assert self.queue.finish(claim, Outcome(state, "ended", self.now, failure_reason=reason))

    def chart(self, window: str = "day") -> dict[str, dict[int, Any]]:
        """Of each series what is known, by time."""
        raw = self.history.charts(window)
        schemas.History.model_validate_json(raw, strict=True)
        body = json.loads(raw)
        series = {name: values for name, values in body.items() if isinstance(values, list) and name != "at"}
        assert {len(values) for values in series.values()} == {len(body["at"])}
        assert {b - a for a, b in zip(body["at"], body["at"][1:], strict=False)} == {body["step_seconds"]}
        return {
            name: {at: value for at, value in zip(body["at"], values, strict=True) if value is not None}
            for name, values in series.items()
        }


@pytest.fixture
def past(tmp_path: Path) -> Iterator[Past]:
    made = Past(tmp_path)
    made.database.start()
    yield made
    made.database.close()


def test_ends_and_waits_are_counted_once_in_their_step_and_a_restart_loses_none(past: Past) -> None:
    begin = past.now // SECOND
    for wait, state in ((1, states.COMPLETED), (2, states.FAILED), (40, states.COMPLETED)):
        past.run(wait=wait, state=state)
    past.history.sample()
    past.history.sample()
    past.run(wait=3, state=states.CANCELLED)  # after the last sample; then the server is killed
    past.now += 600 * SECOND
    past.history = past.start()
    past.submit()
    past.history.sample()
    found = past.chart()
    assert found["completed"] == {begin: 2, begin + 600: 0}
    assert (found["failed"][begin], found["cancelled"][begin]) == (1, 1)
    assert found["wait_seconds"] == {begin: pytest.approx(2, rel=0.06)}
    assert found["queue_depth"] == {begin: 0, begin + 600: 1}
    assert found["utilization"] == {begin: 0.5, begin + 600: 0.5}
    assert found["gpu_utilization"] == {}
    week = past.chart("week")
    step = begin // 1800 * 1800
    assert sum(week["completed"].values()) == 2
    assert week["queue_depth"][step] == pytest.approx(1 / 3, abs=0.001)  # of three samples


def test_a_database_with_a_past_begins_with_now_and_old_rows_go(past: Path | Past, tmp_path: Path) -> None:
    assert isinstance(past, Past)
    past.run(wait=1, state=states.COMPLETED)
    past.history = past.start()  # as after an upgrade: nothing was sampled yet
    past.history.sample()
    assert sum(past.chart()["completed"].values()) == 0
    past.now += (KEEP_SECONDS + 600) * SECOND
    past.history.sample()
    assert len(rows(tmp_path / "database.db", "SELECT * FROM history")) == 1


def test_counting_goes_on_when_the_newest_events_were_deleted_with_their_jobs(past: Past) -> None:
    past.run(wait=1, state=states.COMPLETED)
    past.history.sample()
    past.queue.forget([row.seq for row in past.queue.oldest_ended_before(past.now + 1, 10)])
    past.history.sample()
    past.run(wait=1, state=states.COMPLETED)
    past.history.sample()
    assert sum(past.chart()["completed"].values()) == 2


def test_the_server_samples_and_names_nobody(server: Server) -> None:
    server.run_job("eve")
    wait_until(lambda: rows(server, "SELECT * FROM history"), 30, "a sample")
    for window, count in (("day", 289), ("week", 337)):
        answer = server.get(f"/api/history?window={window}", "alice")
        schemas.History.model_validate_json(answer.content, strict=True)
        assert len(answer.json()["at"]) == count
        assert "eve" not in answer.text
    assert server.get("/api/history?window=year", "alice").status_code == 422


# -- the stream ----------------------------------------------------------------------------------------------------


def test_all_comes_at_once_as_the_calls_give_it(server: Server, watch: Callable[[str], Watching]) -> None:
    for user_id in ("eve", "root"):
        watching = watch(user_id)
        first = dict(watching.events[:3])
        assert list(first) == ["nodes", "queue", "health"]
        schemas.NodeList.model_validate(first["nodes"], strict=True)
        schemas.QueueList.model_validate(first["queue"], strict=True)
        assert first["nodes"] == server.get("/api/nodes", user_id).json()
        assert first["queue"] == server.get("/api/queue", user_id).json()
        ready = server.get("/readyz").json()
        assert first["health"] == (ready if user_id == "root" else {"ready": True, "reasons": []})


def test_an_own_job_is_told_as_it_goes(server: Server, watch: Callable[[str], Watching]) -> None:
    watching = watch("alice")
    job_id = server.submit("alice", HOLD)
    watching.until_job(job_id, "running")
    watching.until(lambda: watching.of("nodes")[-1]["nodes"][0]["is_busy"], "the node to be busy")
    watching.until(lambda: watching.of("queue")[-1]["running"] == 1, "the queue to say that it runs")
    release(server, None, job_id)
    watching.until_job(job_id, "completed")
    for job in watching.of("job"):
        schemas.JobStatus.model_validate(job, strict=True)
    watching.until(lambda: watching.of("nodes")[-1]["nodes"][0]["jobs_completed"] > 0, "the node's counter")


def test_a_user_is_told_nothing_of_other_peoples_jobs_and_an_admin_everything(
    server: Server, watch: Callable[[str], Watching]
) -> None:
    eve, root = watch("eve"), watch("root")
    bobs = server.submit("bob", SECRET + HOLD, competition_id="bobs-comp", project_id="bobs-proj")
    root.until_job(bobs, "running")
    carols = server.submit("carol", SECRET, competition_id="carols-comp")
    root.until_job(carols, "pending")
    eve.until(lambda: eve.of("queue")[-1]["queue_length"] == 1, "the queue to grow")
    assert eve.of("queue")[-1]["entries"][0]["mine"] is False
    root.until(lambda: root.of("queue")[-1]["queue_length"] == 1, "the admin's queue to grow")
    assert root.of("queue")[-1]["entries"][0]["user_id"] == "carol"
    server.cancel(bobs, "bob")
    root.until_job(bobs, "cancelled")
    root.until_job(carols, "completed")
    own = server.run_job("eve")["job_id"]
    eve.until_job(own, "completed")  # what came before has come
    assert {job["job_id"] for job in eve.of("job")} == {own}
    for word in (bobs, carols, "bob", "carol", "secret"):
        assert word not in eve.text, word
    assert any(node.get("job_id") == bobs for nodes in root.of("nodes") for node in nodes["nodes"])
    assert "secret" not in root.text  # output comes by /api/logs alone


def test_a_stream_ends_when_its_token_is_revoked_or_loses_its_role(
    server: Server, watch: Callable[[str], Watching]
) -> None:
    make_users(server, "leaving", admin="fallen")
    leaving, fallen, stays = watch("leaving"), watch("fallen"), watch("dave")
    server.run("token_manager.py", "revoke", "--user", "leaving")
    server.run("token_manager.py", "create", "fallen", server.tokens["fallen"])
    job_id = server.run_job("bob")["job_id"]  # something to tell
    leaving.until_over()
    fallen.until_over()
    assert job_id not in fallen.text
    own = server.run_job("dave")["job_id"]
    stays.until_job(own, "completed")


def test_a_stream_ends_when_the_server_stops() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        make_users(server, "alice")
        watching = Watching(server, "alice")
        watching.until_begun()
        assert server.terminate() == 0
        watching.close()


# -- the board, without a server -----------------------------------------------------------------------------------


class Told:
    """A board whose sources are counted, and watchers of it whose other side is here."""

    def __init__(self) -> None:
        self.looks = 0
        self.utilization = 0
        self.stopping = False
        self.valid_tokens = {1: False, 2: False, 9: True}
        self.board = Board()
        self.board.sources = Sources(
            nodes=self._nodes,
            queue=lambda: QueuePage(NoQueue(), [], clock.now_us()),  # type: ignore[arg-type]
            health=lambda: {"ready": True, "reasons": [], "warnings": ["for admins"]},
            status=lambda row: {"job_id": row.job_id, "status": row.state},
            valid=self._valid,
            stopping=lambda: self.stopping,
        )

    def _nodes(self, for_admin: bool) -> dict[str, Any]:
        self.looks += 1
        return {"nodes": [{"gpu_utilization": self.utilization}], "expected_wait": time.monotonic()}

    def _valid(self, wanted: Collection[int]) -> dict[int, bool]:
        return {token: role for token, role in self.valid_tokens.items() if token in wanted}

    def stream(self, token_id: int, *, seconds: float = 600) -> BoardStream:
        role = self.valid_tokens[token_id]
        return BoardStream(
            self.board, Caller(token_id, f"user{token_id}", role, clock.now_us() + int(seconds * SECOND))
        )


class NoQueue:
    """As much of a view of an empty queue as a page needs."""

    pending = running = 0
    newcomer_wait = 0.0

    def __init__(self) -> None:
        self.taken = time.monotonic()


class Row:
    """As much of a job's row as the board looks at."""

    def __init__(self, job_id: str, user_id: str, state: str = "running") -> None:
        self.job_id, self.user_id, self.state = job_id, user_id, state


class Client:
    """The other side of a stream: takes what is sent when `reads` is set."""

    def __init__(self, stream: BoardStream) -> None:
        self.sent: list[bytes] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._more = asyncio.Event()
        self.task = asyncio.ensure_future(stream({"type": "http"}, self._receive, self._send))

    async def _receive(self) -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message.get("body", b""))
        self._more.set()

    @property
    def text(self) -> str:
        return b"".join(self.sent).decode()

    async def until(self, word: str) -> None:
        async def look() -> None:
            while word not in self.text:
                self._more.clear()
                await self._more.wait()

        await asyncio.wait_for(look(), 20)


def played(play: Callable[[Told], Awaitable[None]]) -> None:
    """Run `play` with a board that is bound to the loop."""

    async def run() -> None:
        told = Told()
        told.board.bind(asyncio.get_running_loop())
        await play(told)

    asyncio.run(run())


def test_without_watchers_nothing_is_looked_at_and_nothing_kept() -> None:
    async def play(told: Told) -> None:
        for number in range(1000):
            told.board.job_changed(Row(f"job{number}", "user1"))  # type: ignore[arg-type]
        client = Client(told.stream(1))
        await client.until("event: health")
        assert told.looks == 1
        client.task.cancel()
        await asyncio.wait({client.task})
        assert told.board.count() == 0
        assert "event: job" not in client.text

    played(play)


def test_a_thousand_hints_at_once_are_two_looks_at_most_and_watchers_share_what_is_sent() -> None:
    async def play(told: Told) -> None:
        clients = [Client(told.stream(token_id)) for token_id in (1, 1, 2)]
        for client in clients:
            await client.until("event: health")
        told.utilization = 77
        for _ in range(1000):
            told.board.touch()
        for client in clients:
            await client.until('"gpu_utilization": 77')
            assert client.text.count("event: nodes") == 2
            assert client.text.count("event: health") == 1
            assert client.sent[-1] is not None
        assert told.looks == 2
        bodies = {id(told.board.queue_event(Caller(n, f"user{n}", False, 0))) for n in range(5)}
        assert len(bodies) == 1
        told.stopping = True
        told.board.wake_all()
        await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), 20)

    played(play)


def test_a_slow_reader_is_sent_the_newest_state_and_told_what_it_missed() -> None:
    async def play(told: Told) -> None:
        slow, admin = Client(told.stream(1)), Client(told.stream(9))
        for client in (slow, admin):
            await client.until("event: health")
        slow.reads.clear()
        for state in ("pending", "running", "completed"):
            for number in range(MAIL_MOST):
                told.board.job_changed(Row(f"job{number}", "user1", state))  # type: ignore[arg-type]
            await admin.until(state)
        slow.reads.set()
        await slow.until(f'"job{MAIL_MOST - 1}", "status": "completed"')
        jobs = [line for line in slow.text.splitlines() if '"job_id"' in line]
        assert len(jobs) <= 2 * MAIL_MOST  # the one that it was being sent, and the newest
        for number in range(ROWS_MOST + 1):
            told.board.job_changed(Row(f"many{number}", "user1"))  # type: ignore[arg-type]
        await slow.until("event: missed")
        await admin.until("event: missed")
        for client in (slow, admin):
            client.task.cancel()

    played(play)


def test_a_stream_ends_with_its_token_though_nothing_happens() -> None:
    async def play(told: Told) -> None:
        short = Client(told.stream(1, seconds=0.2))
        await short.until("event: health")
        await asyncio.wait_for(short.task, HEARTBEAT - 2)
        assert told.board.count() == 0

    played(play)


def test_a_job_of_another_user_wakes_nobody_else() -> None:
    async def play(told: Told) -> None:
        other, owner, admin = Client(told.stream(2)), Client(told.stream(1)), Client(told.stream(9))
        for client in (other, owner, admin):
            await client.until("event: health")
        assert "for admins" in admin.text
        assert "for admins" not in owner.text
        told.board.job_changed(Row("secret-job", "user1"))  # type: ignore[arg-type]
        await owner.until("secret-job")
        await admin.until("secret-job")
        told.board.job_changed(Row("own-job", "user2"))  # type: ignore[arg-type]
        await other.until("own-job")
        assert "secret-job" not in other.text
        assert "own-job" not in owner.text
        for client in (other, owner, admin):
            client.task.cancel()

    played(play)
