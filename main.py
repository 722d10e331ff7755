#!/usr/bin/env python3
"""The GPU job server: puts everything together.

    python3 main.py             serve
    python3 main.py check       look at every node: reachable, GPU, Python, sandbox, disk; exit 1 if one is not fit
    python3 main.py drill   run the attacks of documentation/SECURITY.md on the nodes; exit 1 if one is not contained
    python3 main.py drain NODE · resume NODE · backup PATH · restore PATH
    python3 main.py --help

The only module that names concrete executors; nothing imports it.
"""

from __future__ import annotations

import gc
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - for whoever starts it with an older one
    sys.exit(f"main.py: Python 3.10 or newer is needed; this is {sys.version.split()[0]}.")
try:
    gc.disable()  # while modules are loaded nothing becomes garbage, and looking for it takes a sixth of the start
    import uvicorn
    from fastapi import FastAPI
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ModuleNotFoundError as missing:
    sys.exit(f"main.py: {missing.name} is not installed. Run: pip3 install -r requirements.txt")

import argparse
import asyncio
import contextlib
import errno
import json
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attacks
import audit
import backup
import config
import drill
import logs
from api import RequestContext, make_app
from auth import Authenticator, TokenDigest
from config import Settings
from dashboard_routes import connect_board
from database import Database, sqlite_version_warning
from errors import ConfigurationError, JobServerError, NodeError, NodeRefused
from executor import Executor, NodeConnection, Probe, check_probe, probe_request
from history import History
from local_executor import LocalExecutor
from maintenance import Maintenance
from nodes import NodeRecord, NodeRegistry
from queue_manager import QueueManager
from services import Services
from ssh_executor import SshExecutor, load_ssh_config, nodes_of
from storage import Storage
from worker import LEASE_MARGIN, PROBE_TIMEOUT, Worker

gc.enable()
log = logging.getLogger("main")
OPEN_FILES = 1 << 16  # that we want to be allowed
# Seconds that a busy thread keeps the interpreter from the event loop, each time that one comes back from the system: a
# call does so several times, and with Python's 5 ms it would be slow while a node's thread works on much output.
SWITCH_INTERVAL = 0.0005
STOP_WITHIN = 4.0  # seconds from the signal for the workers to say farewell
REQUEST_HEAD_MOST = 1 << 16  # bytes of a request's address and headers
HEAD_TOO_LARGE = "Request Header Fields Too Large"
REQUEST_HEAD_TIMEOUT = 5.0  # seconds for a request's head, on top of REQUEST_BODY_TIMEOUT for its body


@dataclass
class RemovedNode:
    """A node that has a job but is no longer in the settings: never reached, its job runs elsewhere in time."""

    node_id: str
    address: str = "no longer in the settings"
    remote: bool = True

    def connect(self) -> NodeConnection:
        """Refuse."""
        raise NodeRefused(f"{self.node_id} has a running job but is no longer in the settings. Put it back to keep it.")

    def python(self) -> str:
        """Never asked."""
        return ""

    def gpus(self) -> list[int] | None:
        """None of its GPUs is ours any more."""
        return []


def make_executors(settings: Settings, instance: str) -> list[Executor]:
    """The nodes of the settings: SSH nodes, or slots on this machine. Raises ConfigurationError."""
    named = nodes_of(settings)
    if not named:
        return [LocalExecutor(number, settings, instance) for number in range(1, settings.num_gpu_nodes + 1)]
    ssh_config = load_ssh_config(settings.ssh_config_file)
    return [SshExecutor(number, node, settings, instance, ssh_config) for number, node in enumerate(named, start=1)]


def removed_executors(settings: Settings, instance: str, present: set[str], running: list[str]) -> list[Executor]:
    """Executors for nodes that still have a running job but left the settings. Slots on this machine are still
    reachable, so their jobs are brought to their end."""
    found: list[Executor] = []
    for node_id in running:
        if node_id in present:
            continue
        kind, _, number = node_id.partition("-")
        if kind == "local" and number.isdigit():
            found.append(LocalExecutor(int(number), settings, instance))
        else:
            found.append(RemovedNode(node_id))
    return found


class Server:
    """Everything that runs while the server serves."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url, server=True)
        self.queue = QueueManager(
            self.database, max_active_jobs=settings.max_active_jobs, max_infra_retries=settings.max_infra_retries
        )
        self.storage = Storage(settings.jobs_dir)
        self.registry = NodeRegistry()
        self.queue.usable_nodes = self.registry.usable
        self.queue.nodes_aside = self.registry.aside
        self.queue.cancel_hint = self.wake_node
        self.workers: dict[str, Worker] = {}
        instance = self.database.instance_id
        executors = make_executors(settings, instance)
        removed = removed_executors(
            settings, instance, {executor.node_id for executor in executors}, self.queue.running_nodes()
        )
        stored = self.queue.node_rows()
        for executor in [*executors, *removed]:
            record = self.registry.add(NodeRecord(executor.node_id, executor.address))
            row = stored.get(executor.node_id)
            if row is not None:
                for name in (
                    *("jobs_completed", "jobs_failed", "jobs_cancelled", "infra_failures"),
                    *("consecutive_infra_failures", "consecutive_failed_jobs"),
                ):
                    setattr(record, name, getattr(row, name))
                record.drained_by = row.drained_by
            self.workers[executor.node_id] = Worker(
                executor,
                self.queue,
                self.storage,
                self.registry,
                settings,
                takes_jobs=executor not in removed,
            )
        fence = self.database.fence()
        if fence is not None:
            log.warning(
                "restored from a backup of %s: no job is started before every node was asked what it runs", fence
            )
            # A server that was stopped on purpose left its jobs to their own time limits, whatever those were.
            longest = settings.max_expected_time * settings.max_job_timeout_multiplier
            lease = max(settings.node_lost_after, longest) + settings.kill_grace + LEASE_MARGIN
            self.registry.fence(time.monotonic() + lease)
        history = History(self.queue, self.registry)
        self.maintenance = Maintenance(self.queue, self.storage, self.registry, history, settings, self.wake_node)
        self.services = Services(
            settings=settings,
            database=self.database,
            queue=self.queue,
            storage=self.storage,
            registry=self.registry,
            history=history,
            authenticator=Authenticator(self.database, TokenDigest.from_file(settings.token_key_file)),
            wake_node=self.wake_node,
        )
        connect_board(self.services)

    def wake_node(self, node_id: str) -> None:
        """Wake the worker of a node."""
        worker = self.workers.get(node_id)
        if worker is not None:
            worker.wake()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start the writer and the workers, and stop them in the other order."""
        for watch in (self.queue.watch, self.queue.ended, self.queue.growth):
            watch.bind(asyncio.get_running_loop())
        self.services.board.bind(asyncio.get_running_loop())
        self.database.start()
        for worker in self.workers.values():
            worker.start()
        self.maintenance.start()
        app.state.services = self.services
        yield
        self.begin_stop()
        await asyncio.to_thread(self._join_workers)

    def begin_stop(self) -> None:
        """Take no more submissions, end the waiting answers, let the workers go; running jobs stay where they run."""
        if not self.services.stopping:
            self._stop_by = time.monotonic() + STOP_WITHIN
        self.services.stopping = True
        self.maintenance.stop()
        for worker in self.workers.values():
            worker.stop()
        for watch in (self.queue.watch, self.queue.ended):
            watch.wake_all()
        self.services.board.wake_all()

    def _join_workers(self) -> None:
        for thread in (*self.workers.values(), self.maintenance):
            thread.join(max(0.0, self._stop_by - time.monotonic()))

    def close(self) -> None:
        """Close the database."""
        self.database.close()


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol, told apart in two things: a connection whose next request has not arrived whole within
    `seconds` of its first byte (or of the connection) is closed, even when that request was answered long before;
    and a request whose address and headers (trailers too) have more than REQUEST_HEAD_MOST bytes is refused with 431
    while they come in. Without that they are kept whole, and joined again with each piece that arrives."""

    seconds = 30.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._arriving = True
        self._head_size = 0
        self._untold = 0  # bytes since the parser last told of something: of a header that has not ended
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio."""
        self._arriving = False
        self._watch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio."""
        self._untold += len(data)
        super().data_received(data)
        if self._untold > REQUEST_HEAD_MOST and not self.transport.is_closing():
            self._head_size = self._untold
            self.send_400_response("")
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """uvicorn, for what it cannot read; 431 where that is its size."""
        if self._head_size <= REQUEST_HEAD_MOST:
            return super().send_400_response(msg)
        detail = f"The request's address and headers have more than {REQUEST_HEAD_MOST} bytes."
        body = json.dumps({"type": "about:blank", "title": HEAD_TOO_LARGE, "status": 431, "detail": detail})
        head = f"HTTP/1.1 431 {HEAD_TOO_LARGE}\r\ncontent-type: application/problem+json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode())
        self.transport.close()

    def on_message_begin(self) -> None:
        """httptools."""
        self._arriving = True
        self._head_size = self._untold = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """httptools."""
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools."""
        self._grow(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _grow(self, size: int) -> None:
        self._untold = 0
        self._head_size += size
        if self._head_size > REQUEST_HEAD_MOST:
            raise ValueError("too large")  # makes the parser stop, and uvicorn answer

    def on_body(self, body: bytes) -> None:
        """httptools."""
        self._untold = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """httptools."""
        self._arriving = False
        self._untold = 0
        super().on_message_complete()

    def _watch(self) -> None:
        if self._arriving and self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self._late)
        elif not self._arriving and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self.flow.read_paused:  # it is we who do not read
            self._watch()
        elif not self.transport.is_closing():
            self.transport.close()


class UvicornServer(uvicorn.Server):
    """uvicorn, told apart in two things: a signal first makes our own waiting answers end, and SIGTERM is not raised
    again after the stop, so that the database is closed and the exit code is 0."""

    def __init__(self, uvicorn_config: uvicorn.Config, server: Server) -> None:
        super().__init__(uvicorn_config)
        self._server = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM or Ctrl-C."""
        if not self.should_exit:
            # Later, from the loop: a signal interrupts its code anywhere, also where that holds a lock.
            asyncio.get_running_loop().call_soon_threadsafe(self._begin_stop)
        if sig == signal.SIGTERM:
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)

    def _begin_stop(self) -> None:
        log.info("stopping; running jobs go on and are taken up again at the next start")
        self._server.begin_stop()


def bind(settings: Settings) -> socket.socket:
    """The listening socket. Raises ConfigurationError with the remedy when the port is taken."""
    family = socket.AF_INET6 if ":" in settings.server_host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.server_host, settings.server_port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"SERVER_PORT: port {settings.server_port} is taken by another program. Stop that one, or choose "
                f"another port: SERVER_PORT={settings.server_port + 1} python3 main.py"
            ) from None
        raise ConfigurationError(
            f"SERVER_HOST, SERVER_PORT: cannot listen on {settings.server_host}:{settings.server_port}: "
            f"{error.strerror}."
        ) from None
    sock.listen(2048)
    return sock


def allow_many_files() -> None:
    """Each watcher of a stream takes an open file, and 1024 is a usual limit that programs may raise themselves."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    logs.set_up(settings.log_level, settings.log_format)
    allow_many_files()
    sys.setswitchinterval(SWITCH_INTERVAL)
    for sentence in config.unknown_names():
        log.warning("%s", sentence)
    sock = bind(settings)
    server = Server(settings)
    try:
        warning = sqlite_version_warning()
        if warning:
            log.warning("%s", warning)
        where = "this machine" if not nodes_of(settings) else "SSH nodes"
        log.info("%d nodes on %s; database %s", len(server.workers), where, server.database.path)
        host = "localhost" if settings.server_host in ("0.0.0.0", "::") else settings.server_host  # noqa: S104  # compared, not listened on
        scheme = "https" if settings.tls_cert_file else "http"
        log.info("listening on %s://%s:%d (docs at /docs)", scheme, host, settings.server_port)
        app = make_app(server.lifespan)
        gc.freeze()  # what is there now stays: a collection while requests wait need not look at it again
        BoundedHttp.seconds = settings.request_body_timeout + REQUEST_HEAD_TIMEOUT
        uvicorn_server = UvicornServer(
            uvicorn.Config(
                RequestContext(app),
                loop="uvloop",
                http=BoundedHttp,
                log_config=None,
                access_log=False,
                server_header=False,
                # uvicorn's own default believes whoever connects from this machine.
                proxy_headers=bool(settings.trusted_proxies),
                forwarded_allow_ips=settings.trusted_proxies,
                ssl_certfile=settings.tls_cert_file or None,
                ssl_keyfile=settings.tls_key_file or None,
                timeout_graceful_shutdown=3,
                timeout_keep_alive=75,
            ),
            server,
        )
        uvicorn_server.run(sockets=[sock])
    finally:
        server.close()
    return 0


# -- check ---------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """What `check` found at one node; `problem` is None when it is fit."""

    executor: Executor
    probe: Probe | None = None
    problem: str | None = None
    round_trip_ms: float | None = None


def check_node(executor: Executor, settings: Settings) -> Finding:
    """Connect and look; never raises."""
    finding = Finding(executor)
    try:
        connection = executor.connect()
        try:
            asked = time.monotonic()
            connection.request("ping")
            finding.round_trip_ms = (time.monotonic() - asked) * 1000
            reply = connection.request("probe", timeout=PROBE_TIMEOUT, **probe_request(executor, settings))
            finding.probe = Probe.of(reply)
            check_probe(finding.probe, settings)
        finally:
            connection.close()
    except NodeError as error:
        finding.problem = str(error)
    return finding


def _gigabytes(size: int) -> str:
    return f"{size / (1 << 30):.0f} GB"


def describe(finding: Finding, settings: Settings) -> list[str]:
    """The lines `check` prints for a node."""
    executor, probe = finding.executor, finding.probe
    head = f"{executor.node_id:<9} {executor.address}"
    if finding.problem is not None:
        return [f"FAIL  {head}", f"      {finding.problem}"]
    assert probe is not None
    lines = [f"ok    {head}   ({finding.round_trip_ms:.1f} ms)"]
    lines.append(f"      Python {probe.python_version} at {probe.python}")
    for gpu in probe.gpus:
        used = f"{gpu.memory_used_mib} of {gpu.memory_total_mib} MiB used"
        lines.append(f"      GPU {gpu.index}: {gpu.name}, {used}, {gpu.utilization} %, {gpu.temperature} °C")
    for foreign in probe.foreign_gpu_processes:
        what = f"process {foreign.get('pid')} ({foreign.get('name')}) uses a GPU"
        lines.append(f"      note: {what}. Unless it is a running job of this server, it keeps work away.")
    if probe.gpu_error:
        lines.append(f"      note: nvidia-smi fails: {probe.gpu_error}")
    elif not probe.gpus:
        lines.append("      no GPU found (no nvidia-smi)")
    wanted = executor.gpus()
    absent = [index for index in wanted or [] if index not in [gpu.index for gpu in probe.gpus]]
    if absent and probe.gpus:
        lines.append(f"      note: GPU {absent} is not there; this node's jobs see no such GPU. See NUM_GPU_NODES.")
    lines.append(
        f"      disk {_gigabytes(probe.free_bytes)} free of {_gigabytes(probe.total_bytes)}, load {probe.load}"
    )
    if settings.sandbox == "off":
        lines.append("      sandbox: off (SANDBOX=off); jobs are not contained")
    elif probe.sandbox_works:
        cost = ""
        if probe.sandbox_start_ms is not None and probe.bare_start_ms is not None:
            cost = f"; a program starts in {probe.sandbox_start_ms:.1f} ms in it, {probe.bare_start_ms:.1f} ms without"
        lines.append(f"      sandbox: bubblewrap works{cost}")
        filtered = "works" if probe.seccomp_works else f"NONE: {probe.seccomp_reason}"
        lines.append(f"      filter of system calls (seccomp): {filtered}")
    else:
        lines.append(f"      sandbox: NONE, jobs are not contained: {probe.sandbox_reason}")
    group = "each job has one" if probe.memory_limit_works else f"NONE: {probe.memory_limit_reason}"
    lines.append(f"      control group: {group}")
    if settings.max_job_memory:
        held = "held by its control group" if probe.memory_limit_works else "NOT ENFORCED for want of a control group"
        lines.append(f"      memory of a job: {_gigabytes(settings.max_job_memory)}, {held}")
    else:
        lines.append("      memory of a job: no limit (MAX_JOB_MEMORY=0)")
    if probe.kill_user_processes:
        lines.append(
            "      note: logind has KillUserProcesses=yes; it ends jobs when the connection ends. Set it to no."
        )
    return lines


def check(settings: Settings) -> int:
    """Look at every node and say what was found; 1 if one is not fit."""
    logs.set_up("error")
    # A node of its own name space, so that the agents of a running server are left in peace.
    executors = make_executors(settings, "check")
    if not nodes_of(settings):
        executors = executors[:1]
        print(f"No SSH nodes are set (GPU_NODE_HOST, GPU_NODES): jobs run in {settings.num_gpu_nodes} slots here.")
    with ThreadPoolExecutor(max_workers=min(32, len(executors))) as pool:
        findings = list(pool.map(lambda executor: check_node(executor, settings), executors))
    for finding in findings:
        print("\n".join(describe(finding, settings)))
    bad = [finding.executor.node_id for finding in findings if finding.problem is not None]
    warning = sqlite_version_warning()
    if warning:
        print(f"note: {warning}")
    print(f"{len(findings) - len(bad)} of {len(findings)} fit" + (f"; not fit: {', '.join(bad)}" if bad else "."))
    return 1 if bad else 0


def run_drill(settings: Settings, node_id: str | None, rows: set[int] | None) -> int:
    """Run the attacks on the nodes, or on one of them; 1 if something was not contained."""
    logs.set_up("error")
    executors = make_executors(settings, drill.INSTANCE)
    known = [executor.node_id for executor in executors]
    if node_id is not None and node_id not in known:
        raise ConfigurationError(f"There is no node {node_id}; the settings name {', '.join(known)}.")
    if node_id is not None:
        executors = [executor for executor in executors if executor.node_id == node_id]
    elif not nodes_of(settings):
        executors = executors[:1]  # all slots of this machine are alike
    chosen = attacks.chosen(rows)
    if not chosen:
        raise ConfigurationError("No attack has such a row; see documentation/SECURITY.md for them.")
    places = [
        (executor, executor.target.port if isinstance(executor, SshExecutor) else settings.server_port)
        for executor in executors
    ]
    return drill.run(places, settings, chosen)


def row_numbers(text: str) -> set[int]:
    """`1,2,34` as numbers; ValueError otherwise."""
    return {int(word) for word in text.split(",")}


# -- other commands ------------------------------------------------------------------------------------------------


def set_drained(settings: Settings, node_id: str, drained: bool) -> int:
    """Stop or restart giving a node work; a running server notices within seconds."""
    known = [executor.node_id for executor in make_executors(settings, "")]
    if node_id not in known:
        raise ConfigurationError(f"There is no node {node_id}; the settings name {', '.join(known)}.")
    database = Database(settings.database_url)
    try:
        database.write(QueueManager(database).set_drained(node_id, drained, audit.shell_actor()))
    finally:
        database.close()
    print(f"{node_id} gets no further job; a running one finishes." if drained else f"{node_id} gets jobs again.")
    return 0


def make_backup(settings: Settings, target: Path) -> int:
    """Back up the database and the token key."""
    manifest = backup.make(settings.database_path, settings.token_key_file, target)
    print(f"Backed up to {target}: {', '.join(manifest['files'])}, schema {manifest['schema']}; verified.")
    print(f"The files of jobs are not in it; copy them as well: {settings.jobs_dir}")
    return 0


def restore_backup(settings: Settings, source: Path) -> int:
    """Put a backup in the place of the present database."""
    aside = backup.restore(source, settings.database_path, settings.token_key_file)
    for path in aside:
        print(f"The present file was put aside as {path}.")
    print(f"Restored from {source}. After the start no job runs before every node was asked what it still runs.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="The GPU job server. Settings come from the environment or .env; see documentation/SETUP.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {config.VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="serve (the default)")
    commands.add_parser("check", help="look at every node; exit 1 if one is not fit")
    command = commands.add_parser(
        "drill",
        help="run attacks on the nodes; exit 1 if one is not contained",
        description="Runs the attacks of documentation/SECURITY.md as jobs on the nodes, in the containment that the "
        "settings ask for, and prints for each row whether it was contained. Takes about a minute. Nothing is left on "
        "a node. Drain the nodes first (python3 main.py drain NODE): a job that runs there meanwhile shares them with "
        "the attacks.",
    )
    command.add_argument("--node", metavar="NODE", help="only this node, such as node-3")
    command.add_argument("--rows", type=row_numbers, metavar="1,2,…", help="only the attacks of these rows")
    for name, text in (("drain", "stop giving a node work"), ("resume", "give a node work again")):
        command = commands.add_parser(name, help=f"{text}; works while the server runs")
        command.add_argument("node_id", metavar="NODE", help="such as node-3, or local-3")
    command = commands.add_parser("backup", help="copy the database and the token key, also while the server runs")
    command.add_argument("path", type=Path, metavar="PATH", help="a new folder")
    command = commands.add_parser("restore", help="put a backup in the place of the present database")
    command.add_argument("path", type=Path, metavar="PATH", help="a folder made by backup")
    arguments = parser.parse_args(argv)
    try:
        settings = config.settings()
        if arguments.command in ("drain", "resume"):
            return set_drained(settings, arguments.node_id, arguments.command == "drain")
        if arguments.command == "drill":
            return run_drill(settings, arguments.node, arguments.rows)
        if arguments.command == "backup":
            return make_backup(settings, arguments.path)
        if arguments.command == "restore":
            return restore_backup(settings, arguments.path)
        return check(settings) if arguments.command == "check" else serve(settings)
    except JobServerError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
