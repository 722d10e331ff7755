"""SSH nodes in network namespaces, whose links a test cuts, heals and slows down.

    with NetnsFleet(3) as fleet:            # this thread is now in the namespace of the servers, the "hub"
        with Server(fleet.settings()) as server:
            fleet.cut(1)                    # packets to and from node 1 vanish; nobody gets a FIN or RST
            fleet.heal(1)

Everything hangs on a router in the middle, and faults are its work: hub and nodes see nothing but packets that do not
come. A link set down would be another fault: its route goes with it, and packets leave by the default route.

The addresses exist inside these namespaces only, and no interface appears in the machine's own one, so any number of
runs do not see each other. `open` moves the calling thread into the hub, and what it starts with it; `close`, which
must be called by the same thread, moves it back. Root only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.fleet import Fleet, FleetError, FleetNode, missing_tools, read_process

NAMESPACES = Path("/run/netns")
PREFIX = "gpuq"
NET = "10.213"
HUB, HUB_LINK = f"{NET}.255.2", "hub"
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """What keeps namespaces from being made here, as a sentence; None if nothing does."""
    if os.geteuid() != 0:
        return "Network namespaces need root."
    reason = missing_tools()
    if reason is not None:
        return reason
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables"), ("nsenter", "util-linux")):
        if _find(program) is None:
            return f"{program} not found: install it, on Debian and Ubuntu with `apt-get install {package}`."
    name = f"{_own_prefix()}-try"
    try:
        _run("ip", "netns", "add", name)
        try:
            _nft(name, "table inet t {\nchain c {\nquota over 1 bytes counter drop\n}\n}\n")
        finally:
            _run("ip", "netns", "del", name)
    except FleetError as error:
        return f"Network namespaces do not work here: {error}"
    return None


class NetnsFleet(Fleet):
    """A fleet with a namespace per node. With `jump`, the nodes in `behind_jump` are reached through it only."""

    def __init__(self, n: int, *, jump: bool = False, behind_jump: Iterable[int] = ()) -> None:
        super().__init__(n, jump)
        self._behind_jump = frozenset(behind_jump)
        self._prefix = _own_prefix()
        self._namespaces: list[str] = []
        self._home: int | None = None
        self._relays: list[Relay] = []
        self._dropped_before: dict[int, int] = {}
        self._router = f"{self._prefix}-router"

    # -- coming and going

    def open(self) -> NetnsFleet:
        """Make the namespaces, enter the hub, start the nodes."""
        reason = why_not()
        if reason:
            raise FleetError(reason)
        _remove_stale()
        try:
            self._make_network()
            self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            _enter(NAMESPACES / f"{self._prefix}-{HUB_LINK}")
            super().open()
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> NetnsFleet:
        return self.open()

    def close(self) -> None:
        """End the nodes, leave the hub, remove the namespaces."""
        if os.getpid() != self._owner:
            return
        try:
            for relay in self._relays:
                relay.close()
            super().close()
        finally:
            if self._home is not None:
                _setns(self._home)
                os.close(self._home)
                self._home = None
            for name in self._namespaces:
                _run("ip", "netns", "del", name)
            self._namespaces = []

    # -- where nodes are

    def host_of(self, number: int) -> str:
        """The node's address."""
        return f"{NET}.{number}.2"

    def command_prefix(self, number: int) -> list[str]:
        """Into the node's namespace."""
        return [_find("nsenter") or "nsenter", f"--net={NAMESPACES / self._namespace(number)}"]

    def settings(self, *numbers: int, relays: Iterable[Relay] = ()) -> dict[str, str]:
        """Settings of a server with these nodes (all, if none is named), and with those behind relays."""
        settings = super().settings()
        entries: list[dict[str, Any]] = json.loads(settings["GPU_NODES"])
        for number, entry in enumerate(entries, 1):
            if number not in self._behind_jump:
                entry.pop("jump", None)
        relays = list(relays)
        chosen = [entries[number - 1] for number in numbers or ([] if relays else range(1, self.size + 1))]
        chosen += [{**entries[relay.number - 1], "host": "127.0.0.1", "port": relay.port} for relay in relays]
        return {**settings, "GPU_NODES": json.dumps(chosen)}

    # -- faults of links

    def cut(self, number: int) -> None:
        """From now on every packet from or to the node vanishes."""
        _nft(self._router, f"add rule inet gate n{number} counter name drops{number} drop")

    def cut_after(self, number: int, size: int) -> None:
        """The link is cut, for good, once it has carried `size` more bytes, both ways together."""
        _nft(self._router, f"add rule inet gate n{number} quota over {size} bytes counter name drops{number} drop")

    def drops(self, number: int) -> int:
        """Packets that vanished since the link was cut."""
        return self._dropped(number) - self._dropped_before.get(number, 0)

    def _dropped(self, number: int) -> int:
        text = _run(*_inside(self._router), "nft", "-j", "list", "counter", "inet", "gate", f"drops{number}")
        return int(json.loads(text)["nftables"][-1]["counter"]["packets"])

    def heal(self, number: int) -> None:
        """The link carries everything again."""
        _nft(self._router, f"flush chain inet gate n{number}")
        # Resetting the counter instead fails now and then, when the kernel finds the rules changed meanwhile (EINTR).
        self._dropped_before[number] = self._dropped(number)

    def throttle(self, number: int, rate: int) -> None:
        """From now on the link carries `rate` bytes a second, each way."""
        shape = ("root", "tbf", "rate", f"{rate * 8}bit", "burst", "64kb", "latency", "400ms")
        for namespace, link in ((self._router, f"n{number}"), (self._namespace(number), "eth0")):
            _run("tc", "-n", namespace, "qdisc", "add", "dev", link, *shape)

    def relay(self, number: int) -> Relay:
        """A way to the node, on 127.0.0.1 of the hub, that delays what it carries; `known_hosts` learns it."""
        node = self.node(number)
        relay = Relay(node)
        self._relays.append(relay)
        kind, key = node.host_key_path.with_suffix(".pub").read_text().split()[:2]
        with open(self.known_hosts, "a") as file:
            file.write(f"[127.0.0.1]:{relay.port} {kind} {key}\n")
        return relay

    # -- making the network

    def _namespace(self, number: int) -> str:
        return f"{self._prefix}-n{number}"

    def _make_network(self) -> None:
        numbers = range(0 if self.with_jump else 1, self.size + 1)
        self._add_namespace(self._router)
        self._attach(f"{self._prefix}-{HUB_LINK}", HUB_LINK, HUB)
        for number in numbers:
            self._attach(self._namespace(number), f"n{number}", self.host_of(number))
        with _visiting(self._router):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        lines = ["table inet gate {"]
        for number in numbers:
            lines += [f"counter drops{number} {{ }}", f"chain n{number} {{", "}"]
        lines += ["chain forward {", "type filter hook forward priority 0;"]
        for number in self._behind_jump:
            lines.append(f"ip saddr {HUB} ip daddr {self.host_of(number)} reject")
        for number in numbers:
            host = self.host_of(number)
            lines += [f"ip saddr {host} jump n{number}", f"ip daddr {host} jump n{number}"]
        _nft(self._router, "\n".join([*lines, "}", "}", ""]))

    def _attach(self, namespace: str, link: str, address: str) -> None:
        """A namespace with one link, to the router, which becomes its default route."""
        router_end = address.rsplit(".", 1)[0] + ".1"
        self._add_namespace(namespace)
        commands = f"link add {link} type veth peer name eth0 netns {namespace}\n"
        commands += f"addr add {router_end}/24 dev {link}\nlink set {link} up\n"
        _run("ip", "-n", self._router, "-batch", "-", text=commands)
        commands = f"addr add {address}/24 dev eth0\nlink set eth0 up\nroute add default via {router_end}\n"
        _run("ip", "-n", namespace, "-batch", "-", text=commands)

    def _add_namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._namespaces.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")


class Relay:
    """Carries connections to a node and holds every byte back for `delay` seconds, each way.

    This kernel may have no netem. TCP ends in the relay, so only an established connection shows the delay: its
    hand-shake does not.
    """

    def __init__(self, node: FleetNode) -> None:
        self.number = node.number
        self.delay = 0.0
        self._target = (node.host, node.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        self._start(self._accept)

    def close(self) -> None:
        """End every connection and thread."""
        with self._lock:
            self._closed = True
            for sock in [self._listener, *self._sockets]:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, body: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=body, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                if self._closed:
                    near.close()
                    far.close()
                    return
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    on_the_way: queue.Queue[tuple[float, bytes]] = queue.Queue(4096)
                    self._start(self._take, source, on_the_way)
                    self._start(self._give, target, on_the_way)

    def _take(self, source: socket.socket, on_the_way: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            on_the_way.put((time.monotonic() + self.delay, data))

    def _give(self, target: socket.socket, on_the_way: queue.Queue[tuple[float, bytes]]) -> None:
        usable = True
        while True:
            due, data = on_the_way.get()
            if not data:
                break
            if usable:
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    target.sendall(data)
                except OSError:
                    usable = False  # go on taking, or the other thread would stand still for ever
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


# ---- Small helpers -------------------------------------------------------------------------------------


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def _run(program: str, *words: str, text: str = "") -> str:
    done = subprocess.run([_find(program) or program, *words], input=text, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise FleetError(f"{program} {' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _inside(namespace: str) -> tuple[str, str]:
    return "nsenter", f"--net={NAMESPACES / namespace}"


def _nft(namespace: str, rules: str) -> None:
    _run(*_inside(namespace), _find("nft") or "nft", "-f", "-", text=rules)


def _setns(descriptor: int) -> None:
    if LIBC.setns(descriptor, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


def _enter(namespace: Path) -> None:
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _visiting(namespace: str) -> Iterator[None]:
    """This thread is in that namespace meanwhile."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(NAMESPACES / namespace)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


_made = 0


def _own_prefix() -> str:
    """Begins the names of this process's namespaces; the start time tells it from a later one with its pid."""
    global _made
    _made += 1
    process = read_process(os.getpid())
    assert process is not None
    return f"{PREFIX}-{process.pid}-{process.start}-{_made}"


def _remove_stale() -> None:
    """Remove the namespaces of runs that were killed. Their nodes are ended by whoever takes their accounts next."""
    if not NAMESPACES.is_dir():
        return
    for path in NAMESPACES.iterdir():
        match = re.fullmatch(rf"{PREFIX}-(\d+)-(\d+)-.+", path.name)
        if match is None:
            continue
        process = read_process(int(match[1]))
        if process is None or process.start != int(match[2]):
            with contextlib.suppress(FleetError):  # another run was faster
                _run("ip", "netns", "del", path.name)
