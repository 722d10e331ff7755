"""A private fleet of SSH nodes on this machine, for tests and for trying the server.

    with Fleet(8) as fleet:
        os.environ.update(fleet.settings())

Every node is a real OpenSSH server on a loopback port with its own host key, home directory, Python
environment and stand-in GPU (`fake_nvidia_smi.py`). Nothing of the machine's own SSH set-up is read or
changed. `python3 -m tests.fleet` runs a fleet until Ctrl-C.

As root, each node logs in as a user of its own, taken from the accounts `gpufleet1`, `gpufleet2`, … which
are made when first needed and stay (`python3 -m tests.fleet --remove-users` removes them). A lock per account
keeps fleets that run at once apart, so whatever runs as that user belongs to this node. Without root, sshd
serves only the own user: nodes then share it, `HOME` differs, and a session starts in the real home.

Standard library only; imports nothing of this project.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import json
import os
import pwd
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

NODE_PYTHON = "gpuq-python"
"""The interpreter's name on every node's PATH; each has its own link to it, so one node can lose it."""

ACCOUNT = "gpufleet"
ACCOUNT_COMMENT = "GPU job server test node"  # an account without it is somebody else's: never touched
ACCOUNT_HOMES = Path("/home")
LOCKS = Path("/run/lock/gpufleet")
MAX_ACCOUNTS = 256
START_TIMEOUT = 15.0
DEATH_TIMEOUT = 10.0


class FleetError(Exception):
    """The fleet cannot do what was asked; the message says why and what to do."""


# ---- Processes -----------------------------------------------------------------------------------------


class Process(NamedTuple):
    """One line of /proc. `start` (clock ticks since boot) tells a process from a later one with its pid."""

    pid: int
    parent: int
    start: int
    name: str
    state: str


def read_process(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name_end = text.rindex(")")  # the name may itself contain spaces and brackets
    rest = text[name_end + 2 :].split()
    return Process(pid, int(rest[1]), int(rest[19]), text[text.index("(") + 1 : name_end], rest[0])


def processes() -> list[Process]:
    """Everything that lives on this machine; zombies do not."""
    found = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return [p for p in found if p is not None and p.state not in "ZX"]


def descendants(root: int) -> list[Process]:
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [root]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child.pid)
    return found


def is_alive(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.start == process.start and now.state not in "ZX"


def send(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process: a pidfd cannot come to mean another one, and the start time is checked."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            if is_alive(process):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise FleetError(f"Waited {timeout:g} s in vain: {what}.")
        time.sleep(0.005)


def end_all(find: Callable[[], Iterable[Process]], what: str) -> None:
    """Kill what `find` finds until it finds nothing. Stopping first keeps a fork bomb from outrunning us."""

    def none_left() -> bool:
        victims = list(find())
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in victims:
                send(process, number)
        return not victims

    wait_until(none_left, DEATH_TIMEOUT, f"{what} will not die")


def suspend(pid: int) -> None:
    """Stop a process and wait until it stands still."""
    os.kill(pid, signal.SIGSTOP)

    def stands() -> bool:
        process = read_process(pid)
        return process is None or process.state in "TZX"

    wait_until(stands, DEATH_TIMEOUT, f"process {pid} stops")


def real_user(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    match = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    return int(match[1]) if match else None


def remove_tree(path: Path) -> None:
    """Remove a folder, including folders inside that a job has made unreadable."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except PermissionError:
        path.chmod(0o700)
        for folder, names, _ in os.walk(path):
            for inner in (os.path.join(folder, name) for name in names):
                if not os.path.islink(inner):
                    os.chmod(inner, 0o700)
        shutil.rmtree(path)


# ---- Accounts ------------------------------------------------------------------------------------------


class Account:
    """A login user held by one fleet: as root one of the pool's, otherwise the own user."""

    def __init__(self, name: str, home: Path, lock: int | None) -> None:
        entry = pwd.getpwnam(name)
        self.name, self.uid, self.gid = name, entry.pw_uid, entry.pw_gid
        self.home = home
        self.lock = lock

    @property
    def pooled(self) -> bool:
        return self.lock is not None

    def run(self, argv: Sequence[str], timeout: float = 20) -> subprocess.CompletedProcess[str]:
        """Run a command as this user, with next to no environment."""
        identity: dict[str, Any] = {"user": self.uid, "group": self.gid, "extra_groups": []} if self.pooled else {}
        environment = {"PATH": os.defpath, "HOME": str(self.home), "LANG": "C.UTF-8"}
        return subprocess.run(
            argv, cwd="/", env=environment, capture_output=True, text=True, timeout=timeout, **identity
        )

    def processes(self) -> list[Process]:
        """What runs on the node that uses this account."""
        if self.pooled:
            return [p for p in processes() if real_user(p.pid) == self.uid]
        # The own user runs much else; a node's processes keep the HOME they were started with.
        mark = f"\0HOME={self.home}".encode()
        found = []
        for process in processes():
            with contextlib.suppress(OSError):
                environment = b"\0" + Path(f"/proc/{process.pid}/environ").read_bytes()
                if mark + b"\0" in environment or mark + b"/" in environment:
                    found.append(process)
        return found

    def note(self, listener: Process | None, folder: Path) -> None:
        """Leave word in the lock file, so that the next holder can clear up after a killed fleet."""
        if self.lock is not None:
            known = {"pid": listener.pid, "start": listener.start} if listener else {}
            os.ftruncate(self.lock, 0)
            os.pwrite(self.lock, json.dumps({"listener": known, "folder": str(folder)}).encode(), 0)

    def clear_up(self) -> None:
        """End and remove everything of this account's node, also of a fleet that was killed."""
        left: dict[str, Any] = {}
        if self.lock is not None:
            with contextlib.suppress(ValueError):
                left = json.loads(os.pread(self.lock, 4096, 0))
            listener = read_process(left["listener"]["pid"]) if left.get("listener") else None
            if listener is not None and listener.start == left["listener"]["start"]:
                family = [*descendants(listener.pid), listener]
                end_all(lambda: filter(is_alive, family), f"the left-over SSH server of {self.name}")
        end_all(self.processes, f"a process of {self.name}")
        remove_tree(self.home)
        if self.lock is not None:
            os.ftruncate(self.lock, 0)
            folder = Path(left.get("folder") or "/nonexistent")
            if folder.name.startswith(f"{ACCOUNT}-"):
                remove_tree(folder)

    def release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def pool_account() -> Account:
    """The first free account of the pool, made if it does not exist yet."""
    LOCKS.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(1, MAX_ACCOUNTS + 1):
        name = f"{ACCOUNT}{number}"
        lock = os.open(LOCKS / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        home = ACCOUNT_HOMES / name
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            make_account(name, home)
            entry = pwd.getpwnam(name)
        if entry.pw_gecos == ACCOUNT_COMMENT and entry.pw_uid != 0 and entry.pw_dir == str(home):
            account = Account(name, home, lock)
            account.clear_up()
            return account
        os.close(lock)
    raise FleetError(f"All {MAX_ACCOUNTS} accounts {ACCOUNT}1 … are in use: end another fleet first.")


def make_account(name: str, home: Path) -> None:
    if shutil.which("useradd") is None:
        raise FleetError("useradd not found: install your system's `passwd` package, or run without root.")
    # "*" is a password nobody has, on an account that is not locked: sshd without PAM refuses locked ones.
    command = [
        "useradd",
        "-M",
        "-U",
        "-d",
        str(home),
        "-s",
        "/bin/sh",
        "-p",
        "*",
        "-c",
        ACCOUNT_COMMENT,
        name,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 9):  # 9: it exists by now
        raise FleetError(f"Could not make the user {name}: {done.stderr.strip()}")


def remove_accounts() -> list[str]:
    """Remove the pool's accounts that no fleet holds; their names."""
    removed = []
    for entry in pwd.getpwall():
        ours = re.fullmatch(rf"{ACCOUNT}\d+", entry.pw_name) and entry.pw_gecos == ACCOUNT_COMMENT
        if not ours or entry.pw_uid == 0:
            continue
        LOCKS.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(LOCKS / entry.pw_name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Account(entry.pw_name, Path(entry.pw_dir), lock).clear_up()
            subprocess.run(["userdel", entry.pw_name], check=True, capture_output=True)
            (LOCKS / entry.pw_name).unlink()
            removed.append(entry.pw_name)
        os.close(lock)
    return removed


# ---- The fleet -----------------------------------------------------------------------------------------


@dataclass
class FleetNode:
    """One node: an SSH server and everything that belongs to it. Number 0 is the jump host."""

    number: int
    port: int
    user: str
    home: Path
    folder: Path
    """Configuration, host key, log, programs and GPU values; owned by whoever started the fleet."""
    host: str = "127.0.0.1"
    _account: Account = field(repr=False, kw_only=True)
    _held: socket.socket = field(repr=False, kw_only=True)
    _server: subprocess.Popen[bytes] | None = field(default=None, repr=False, kw_only=True)
    _server_start: int = field(default=0, repr=False, kw_only=True)

    @property
    def pid(self) -> int | None:
        """Of the listening SSH server; None while the node is stopped."""
        return self._server.pid if self._server else None

    @property
    def host_key_path(self) -> Path:
        return self.folder / "host_key"

    @property
    def log_path(self) -> Path:
        return self.folder / "sshd.log"

    @property
    def gpu_path(self) -> Path:
        """The values its `nvidia-smi` shows."""
        return self.folder / "gpu.json"

    @property
    def name(self) -> str:
        """In the fleet's `ssh_config`."""
        return f"node{self.number}" if self.number else "jump"

    @property
    def address(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


def missing_tools() -> str | None:
    """What keeps a fleet from starting here, as a sentence; None if nothing does."""
    if not hasattr(os, "pidfd_open") or not Path("/proc/self/stat").exists():
        return "The fleet needs Linux."
    for program, package in (("sshd", "openssh-server"), ("ssh-keygen", "openssh-client")):
        if find_program(program) is None:
            return f"{program} not found: install it, on Debian and Ubuntu with `apt-get install {package}`."
    return None


def find_program(name: str) -> str | None:
    # sshd lies in sbin, which is not on an ordinary user's PATH; and it must be called by its full path.
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def openssh_version() -> tuple[int, int]:
    ssh = find_program("ssh")
    text = subprocess.run([ssh, "-V"], capture_output=True, text=True).stderr if ssh else ""
    match = re.search(r"OpenSSH_(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


class Fleet:
    """`n` nodes, numbered from 1, and with `jump` a host they are reached through.

    Use it as a context manager, or call `open()` and `close()`. Closing ends every server, session and
    process of the nodes and removes their folders. Methods that take a node number act on that node.
    """

    def __init__(self, n: int = 8, jump: bool = False) -> None:
        self.size = n
        self.with_jump = jump
        self.nodes: list[FleetNode] = []
        """Node i is `nodes[i - 1]`."""
        self.jump: FleetNode | None = None
        self.folder = Path()
        self._owner = os.getpid()
        self.python = ""
        """The interpreter behind every node's `NODE_PYTHON`."""

    # -- coming and going

    def __enter__(self) -> Fleet:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Fleet:
        problem = missing_tools()
        if problem:
            raise FleetError(problem)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)  # where sshd confines its sessions
        # A root's TMPDIR may be closed to the nodes' users.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{ACCOUNT}-", dir="/tmp" if os.geteuid() == 0 else None))
        atexit.register(self.close)
        try:
            self.folder.chmod(0o755)
            for number in range(0 if self.with_jump else 1, self.size + 1):
                self._make_node(number)
            self._make_keys()
            for node in self._all():
                self._launch(node)
            for node in self._all():
                self._await_listening(node)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End and remove everything. Safe to call twice; a forked child of the fleet's process may not."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.close)
        for node in self._all():
            self._stop(node)
        for node in self._all():
            node._account.clear_up()
            node._account.release()
            node._held.close()
        self.nodes, self.jump = [], None
        if self.folder != Path():
            remove_tree(self.folder)
            self.folder = Path()

    # -- what a client needs

    @property
    def key_file(self) -> Path:
        """The private key that opens every node."""
        return self.folder / "client_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        """For OpenSSH's `ssh -F`: the hosts `node1` … and `jump`."""
        return self.folder / "ssh_config"

    def settings(self) -> dict[str, str]:
        """The server's settings, by the names of its environment variables."""
        entries = []
        for node in self.nodes:
            entry = {"host": node.host, "port": node.port, "user": node.user, "key_file": str(self.key_file)}
            jump = {"jump": self.jump.address} if self.jump else {}
            entries.append({**entry, "gpus": [0], **jump})
        return {
            "GPU_NODES": json.dumps(entries),
            "SSH_KEY_FILE": str(self.key_file),
            "SSH_KNOWN_HOSTS": str(self.known_hosts),
            "NODE_PYTHON": NODE_PYTHON,
        }

    def ssh(self, number: int, command: str, timeout: float = 20) -> subprocess.CompletedProcess[str]:
        """Run a shell command on the node with the ordinary OpenSSH client."""
        argv = [find_program("ssh") or "ssh", "-F", str(self.ssh_config), self.node(number).name, command]
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )

    def node(self, number: int) -> FleetNode:
        for node in self._all():
            if node.number == number:
                return node
        raise FleetError(f"There is no node {number} in a fleet of {self.size}; node 0 is the jump host, if any.")

    # -- faults

    def stop(self, number: int) -> None:
        """The node is gone from the network: connections break, new ones are refused. Its jobs live on."""
        self._stop(self.node(number))

    def start(self, number: int) -> None:
        """Bring a stopped node back, with the same port and host key."""
        node = self.node(number)
        if node._server is None:
            self._launch(node)
            self._await_listening(node)

    def restart(self, number: int) -> None:
        self.stop(number)
        self.start(number)

    def sessions(self, number: int) -> list[Process]:
        """The SSH server's processes that serve a connection."""
        node = self.node(number)
        if node.pid is None:
            return []
        return [p for p in descendants(node.pid) if p.name.startswith("sshd")]

    def kill_sessions(self, number: int) -> None:
        """Break every connection to the node at once; the server goes on listening."""
        victims = self.sessions(number)
        for process in victims:
            send(process, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, victims)), DEATH_TIMEOUT, "the sessions end")

    def freeze(self, number: int) -> None:
        """The node falls silent: connections stay open and nothing answers, as when packets are dropped."""
        node = self.node(number)
        if node.pid is not None:
            suspend(node.pid)  # first, or it would make new sessions meanwhile
            for process in self.sessions(number):
                send(process, signal.SIGSTOP)

    def thaw(self, number: int) -> None:
        node = self.node(number)
        for process in self.sessions(number):
            send(process, signal.SIGCONT)
        if node.pid is not None:
            os.kill(node.pid, signal.SIGCONT)

    def processes(self, number: int) -> list[Process]:
        """What runs on the node besides its SSH server: agents, supervisors, jobs."""
        return [p for p in self.node(number)._account.processes() if not p.name.startswith("sshd")]

    def kill_processes(self, number: int) -> None:
        """Kill everything on the node but its SSH server; with `stop` before, that is a power cut."""
        end_all(lambda: self.processes(number), f"a process on node {number}")

    def change_host_key(self, number: int, known: bool = False) -> None:
        """Give the node another host key; `known_hosts` learns it only if `known`."""
        self.stop(number)
        node = self.node(number)
        make_key(node.host_key_path)
        if known:
            self._write_known_hosts()
        self.start(number)

    def break_python(self, number: int) -> None:
        """From now on `NODE_PYTHON` is not found on the node; what runs already is not touched."""
        programs = self._environment(self.node(number)) / "bin"
        if programs.exists():
            programs.rename(programs.with_name("bin.away"))

    def mend_python(self, number: int) -> None:
        programs = self._environment(self.node(number)) / "bin"
        if not programs.exists():
            programs.with_name("bin.away").rename(programs)

    def set_gpu(self, number: int, **values: Any) -> None:
        """Change what the node's `nvidia-smi` shows.

        `memory_used`, `memory_total` (MiB), `utilization` (%), `temperature` (°C), `name`, `uuid`: of its
        GPU; None prints as `[N/A]`. `processes`: a list of `{pid, name, memory}` on that GPU. `error`,
        `exit_code`: the tool fails with that text; `delay`: it answers so many seconds late. `gpus`: the
        whole list anew.
        """
        node = self.node(number)
        state = json.loads(node.gpu_path.read_text())
        for key, value in values.items():
            if key == "processes":
                state["processes"] = [{"gpu": 0, "name": "python3", "memory": 0, **process} for process in value]
            elif key in ("error", "exit_code", "delay", "driver", "gpus"):
                state[key] = value
            elif key in ("memory_used", "memory_total", "utilization", "temperature", "name", "uuid"):
                state["gpus"][0][key] = value
            else:
                raise FleetError(f"set_gpu knows no {key!r}.")
        write_whole(node.gpu_path, json.dumps(state, indent=1))

    # -- where nodes are; tests/netns.py puts them elsewhere

    def host_of(self, number: int) -> str:
        """The address at which the node's SSH server listens."""
        return "127.0.0.1"

    def command_prefix(self, number: int) -> list[str]:
        """Words before the command of the node's SSH server; they must become it, not start it."""
        return []

    # -- making nodes

    def _all(self) -> list[FleetNode]:
        return ([self.jump] if self.jump else []) + self.nodes

    def _make_node(self, number: int) -> None:
        folder = self.folder / (f"node{number}" if number else "jump")
        (folder / "bin").mkdir(parents=True)
        if os.geteuid() == 0:
            account = pool_account()
        else:
            account = Account(pwd.getpwuid(os.getuid()).pw_name, folder / "home", None)
        account.note(None, self.folder)
        port, held = free_port()
        host = self.host_of(number)
        node = FleetNode(number, port, account.name, account.home, folder, host, _account=account, _held=held)
        if number:
            self.nodes.append(node)
        else:
            self.jump = node
        account.home.mkdir(mode=0o700, parents=True)
        os.chown(account.home, account.uid, account.gid)
        self.python = self.python or usable_python(account)
        self._make_environment(node)
        self._install_gpu(node)

    def _environment(self, node: FleetNode) -> Path:
        return node.home / "env"

    def _make_environment(self, node: FleetNode) -> None:
        """A virtual environment by hand: real `sys.prefix` of its own, no cost at start, made in no time."""
        environment = self._environment(node)
        (environment / "bin").mkdir(parents=True)
        for name in (NODE_PYTHON, "python", "python3"):
            (environment / "bin" / name).symlink_to(self.python)
        home = Path(self.python).parent
        write_whole(environment / "pyvenv.cfg", f"home = {home}\ninclude-system-site-packages = false\n")

    def _install_gpu(self, node: FleetNode) -> None:
        source = (Path(__file__).parent / "fake_nvidia_smi.py").read_text()
        tool = node.folder / "bin" / "nvidia-smi"
        # The interpreter itself, not the node's link to it: a node without Python still has a GPU tool.
        write_whole(tool, f"#!{self.python} -IS\n" + source.split("\n", 1)[1], 0o755)
        gpu = {
            "index": 0,
            "uuid": f"GPU-00000000-0000-4000-8000-{node.number:012d}",
            "name": "Stand-in GPU",
            "memory_total": 40960,
            "memory_used": 3,
            "utilization": 0,
            "temperature": 31,
        }
        state = {"driver": "550.54.15", "gpus": [gpu], "processes": [], "error": None, "delay": 0}
        write_whole(node.gpu_path, json.dumps(state, indent=1))

    def _make_keys(self) -> None:
        with contextlib.ExitStack() as running:  # all at once: most of it is starting programs
            for path in [self.key_file, *(node.host_key_path for node in self._all())]:
                running.enter_context(making_key(path))
        authorized = self.key_file.with_suffix(".pub").read_text()
        version = openssh_version()
        for node in self._all():
            write_whole(node.folder / "authorized_keys", authorized)
            write_whole(node.folder / "sshd_config", self._sshd_config(node, version))
        self._write_known_hosts()
        write_whole(self.ssh_config, self._client_config())

    def _sshd_config(self, node: FleetNode, version: tuple[int, int]) -> str:
        path = [self._environment(node) / "bin", node.folder / "bin", "/usr/local/bin", "/usr/bin", "/bin"]
        lines = [
            f"Port {node.port}",
            f"ListenAddress {node.host}",
            f"HostKey {node.host_key_path}",
            "PidFile none",
            f"AuthorizedKeysFile {node.folder}/authorized_keys",
            f"AllowUsers {node.user}",
            "AuthenticationMethods publickey",
            "UsePAM no",
            "StrictModes no",
            "UseDNS no",
            "PrintMotd no",
            "X11Forwarding no",
            f"AllowTcpForwarding {'no' if node.number else 'yes'}",
            "MaxStartups 100",
            "MaxSessions 64",
            "Subsystem sftp internal-sftp",
            f'SetEnv "HOME={node.home}" "PATH={os.pathsep.join(map(str, path))}"',
        ]
        if version >= (9, 8):
            lines.append("PerSourcePenalties no")  # all clients share one address; a test's failed logins are meant
        return "\n".join(lines) + "\n"

    def _client_config(self) -> str:
        blocks = []
        for node in self._all():
            lines = [
                f"Host {node.name}",
                f"HostName {node.host}",
                f"Port {node.port}",
                f"User {node.user}",
                f"IdentityFile {self.key_file}",
                "IdentitiesOnly yes",
                f"UserKnownHostsFile {self.known_hosts}",
                "GlobalKnownHostsFile none",
                "StrictHostKeyChecking yes",
                "BatchMode yes",
            ]
            if self.jump and node is not self.jump:
                lines.append(f"ProxyJump {self.jump.name}")
            blocks.append("\n    ".join(lines))
        return "\n\n".join(blocks) + "\n"

    def _write_known_hosts(self) -> None:
        lines = []
        for node in self._all():
            kind, key = node.host_key_path.with_suffix(".pub").read_text().split()[:2]
            lines.append(f"[{node.host}]:{node.port} {kind} {key}\n")
        write_whole(self.known_hosts, "".join(lines))

    # -- servers

    def _launch(self, node: FleetNode) -> None:
        node.log_path.write_text("")
        # Absolute paths: with relative ones sshd listens and then resets every connection.
        argv = [
            *self.command_prefix(node.number),
            find_program("sshd") or "sshd",
            "-D",
            "-f",
            f"{node.folder}/sshd_config",
            "-E",
            str(node.log_path),
        ]
        node._server = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the fleet, which then ends its servers
        )
        process = read_process(node._server.pid)
        node._account.note(process, self.folder)

    def _await_listening(self, node: FleetNode) -> None:
        def listening() -> bool:
            log = node.log_path.read_text(errors="replace")
            if node._server is None or node._server.poll() is not None:
                node._server = None
                raise FleetError(f"The SSH server of node {node.number} did not start:\n{log.strip()}")
            return f"Server listening on {node.host} port {node.port}" in log

        wait_until(listening, START_TIMEOUT, f"the SSH server of node {node.number} listens")

    def _stop(self, node: FleetNode) -> None:
        server = node._server
        if server is None:
            return
        suspend(server.pid)  # so that no session is born while they are counted
        victims = [p for p in descendants(server.pid) if p.name.startswith("sshd")]
        server.kill()
        server.wait()
        node._server = None
        for process in victims:
            send(process, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, victims)), DEATH_TIMEOUT, "the sessions end")


# ---- Small helpers -------------------------------------------------------------------------------------


def free_port() -> tuple[int, socket.socket]:
    """A port outside the range of outgoing connections, and the socket that holds it for the fleet's life.

    The holder is bound but does not listen: connections are refused while the node is stopped, and sshd,
    which like it sets SO_REUSEADDR, can listen there. In the outgoing range a client could take a stopped
    node's port.
    """
    try:
        first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first_outgoing = 32768
    ceiling = max(first_outgoing, 12000)
    for port in random.sample(range(10000, ceiling), min(500, ceiling - 10000)):
        with contextlib.suppress(OSError):
            with socket.socket() as probe:  # without SO_REUSEADDR: fails where another fleet holds the port
                probe.bind(("127.0.0.1", port))
            held = socket.socket()
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", port))
            return port, held
    raise FleetError("No free port found on 127.0.0.1.")


def usable_python(account: Account) -> str:
    """The path of an interpreter that the node's user can really run; ours may lie in a closed home."""
    candidates = [
        getattr(sys, "_base_executable", sys.executable),
        "/usr/bin/python3",
        "/usr/local/bin/python3",
    ]
    candidates += filter(None, (shutil.which(f"python3.{minor}") for minor in range(20, 7, -1)))
    test = "import sys, ctypes, fcntl, hashlib, json, select; sys.exit(sys.version_info < (3, 8))"
    for candidate in dict.fromkeys(os.path.realpath(c) for c in candidates if c):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if account.run([candidate, "-I", "-c", test]).returncode == 0:
                return candidate
    raise FleetError(
        f"No Python ≥ 3.8 that the user {account.name} can run. Install one for everybody, on Debian and "
        "Ubuntu with `apt-get install python3`."
    )


@contextlib.contextmanager
def making_key(path: Path) -> Iterator[None]:
    """Start making a key pair; it is there when the context ends."""
    for old in (path, path.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    argv = [
        find_program("ssh-keygen") or "ssh-keygen",
        "-q",
        "-t",
        "ed25519",
        "-N",
        "",
        "-C",
        "gpufleet",
        "-f",
    ]
    process = subprocess.Popen([*argv, str(path)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        _, errors = process.communicate()
    if process.returncode:
        raise FleetError(f"ssh-keygen failed: {errors.strip()}")


def make_key(path: Path) -> None:
    with making_key(path):
        pass


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file that readers see whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_text(text)
    draft.chmod(mode)
    draft.replace(path)


# ---- Command line --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.fleet", description="Run a private fleet of SSH nodes until Ctrl-C."
    )
    parser.add_argument("-n", type=int, default=8, metavar="N", help="how many nodes (8)")
    parser.add_argument("--jump", action="store_true", help="reach the nodes through a jump host")
    parser.add_argument("--env-file", type=Path, help="write the settings there too, as lines to be sourced")
    parser.add_argument("--remove-users", action="store_true", help="remove the nodes' accounts and end")
    options = parser.parse_args(argv)

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    try:
        if options.remove_users:
            print("removed:", " ".join(remove_accounts()) or "none")
            return 0
        began = time.monotonic()
        with Fleet(options.n, options.jump) as fleet:
            lines = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in fleet.settings().items())
            settings_file = (options.env_file or fleet.folder / "fleet.env").absolute()
            write_whole(settings_file, lines, 0o600)
            print(f"{len(fleet.nodes)} nodes are up after {time.monotonic() - began:.1f} s:")
            for node in fleet._all():
                print(f"  {node.name:7} {node.address}  home {node.home}")
            print(f"\n{lines}\nThe same lines are in {settings_file}.")
            print("In another terminal, to serve with these nodes:\n")
            print(f"  . {shlex.quote(str(settings_file))} && .venv/bin/python main.py\n")
            print(f"A shell on a node: ssh -F {fleet.ssh_config} node1\nPress Ctrl-C to end.", flush=True)
            ended.wait()
            if options.env_file:
                settings_file.unlink(missing_ok=True)
    except FleetError as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 1
    print("The fleet has ended.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
