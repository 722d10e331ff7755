"""Jobs on a node over SSH: one warm Paramiko connection with one exec channel to the node's agent.

`~/.ssh/config` is honoured (HostName, Port, User, IdentityFile, ProxyJump); host keys are always verified.
May import `errors`, `config`, `executor`, `node_agent`.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import random
import shlex
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import paramiko

from config import NodeConfig, Settings
from errors import ConfigurationError, NodeRefused, NodeUnreachable
from executor import LAST_WORDS, RECEIVE_SIZE, NodeConnection
from node_agent import AGENT_SOURCE, AGENT_VERSION

log = logging.getLogger("ssh")
# Paramiko logs tracebacks of failures that we report in a sentence.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

# aes128-gcm carries 1.8 times what Paramiko's own first choice does, but Paramiko ranks it last.
SLOWER_CIPHERS = [
    *("aes128-ctr", "aes192-ctr", "aes256-ctr", "aes128-cbc", "aes192-cbc", "aes256-cbc", "3des-cbc"),
]
MARK = "gpu-job-server-agent"
NOISE_MOST = 1 << 16  # what a login script may print before the agent speaks
MAX_JUMPS = 4
SOCKET_LOOK = 2.0  # seconds between Paramiko's looks whether a silent connection is to end; its own 0.1 never rests

# Runs on the node under `python -I -S -c`: keep one copy of each version of the agent, then become it. It reads
# stdin unbuffered, because what follows the source is for the agent.
BOOTSTRAP = f"""
import os, sys
folder, version = os.path.join(os.path.expanduser("~"), sys.argv[1]), sys.argv[2]
path = os.path.join(folder, "agent", version + ".py")
say = lambda text: os.write(1, ("\\n{MARK} " + text + "\\n").encode())  # login scripts may leave a line unfinished
if sys.version_info < (3, 8):
    say("old " + sys.version.split()[0]); sys.exit(1)
try:
    os.makedirs(os.path.join(folder, "agent"), 0o700, exist_ok=True)
    have = os.path.exists(path) and os.path.getsize(path) == int(sys.argv[3])
except OSError as error:
    say("error " + str(error)); sys.exit(1)
say("have" if have else "need")
if not have:
    size, parts = int(sys.argv[3]), []
    while size:
        part = os.read(0, min(size, 65536))
        if not part: sys.exit(1)
        parts.append(part); size -= len(part)
    try:
        with open(path + "." + str(os.getpid()), "wb") as handle: handle.write(b"".join(parts))
        os.rename(handle.name, path)
    except OSError as error:
        say("error " + str(error)); sys.exit(1)
    say("have")
root = os.path.join(folder, sys.argv[4])
os.execv(sys.executable, [sys.executable, "-I", "-S", path, "serve", "--root", root, "--tag", version])
"""


@dataclass(frozen=True)
class Target:
    """Where an SSH connection goes; `jumps` are passed through first, in order."""

    host: str
    port: int
    user: str
    key_files: tuple[str, ...]
    jumps: tuple[Target, ...] = ()

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


def load_ssh_config(path: str) -> paramiko.SSHConfig | None:
    """`~/.ssh/config`, or None when there is none. Raises ConfigurationError when it cannot be read."""
    file = Path(path)
    if not path or not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        if any(line.strip().lower().startswith("include ") for line in text.splitlines()):
            log.warning("%s uses Include, which is not followed; put the nodes' entries into the file itself", path)
        return paramiko.SSHConfig.from_text(text)
    except Exception as error:  # Paramiko raises its own, and plain ValueError
        raise ConfigurationError(f"SSH_CONFIG_FILE: {path} cannot be read: {error}.") from None


def resolve(node: NodeConfig, settings: Settings, config: paramiko.SSHConfig | None, depth: int = 0) -> Target:
    """What to connect to: the settings first, then `~/.ssh/config`, then the usual defaults."""
    found = config.lookup(node.host) if config is not None else {"hostname": node.host}
    key_file = node.key_file or settings.ssh_key_file
    if key_file:
        key_files = [str(Path(key_file).expanduser())]
    else:
        key_files = [str(Path(name).expanduser()) for name in found.get("identityfile", [])]
    jumps: list[Target] = []
    jump = node.jump if node.jump is not None else found.get("proxyjump", "")
    if jump and jump.lower() != "none":
        if depth >= MAX_JUMPS:
            raise ConfigurationError(f"{node.host}: more than {MAX_JUMPS} jump hosts, or a circle of them.")
        for hop in str(jump).split(","):
            # As with OpenSSH the first is reached as its own entry says, each further one through those before it.
            own = None if not jumps else "none"
            target = resolve(parse_hop(hop.strip(), key_file, own), settings, config, depth + 1)
            jumps += [*target.jumps, target]
    port = found.get("port", "22")
    if node.port is None and not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise ConfigurationError(f"SSH_CONFIG_FILE: {node.host} has the Port {port!r}, which is none.")
    return Target(
        host=found.get("hostname", node.host),
        port=node.port or int(port),
        # GPU_NODE_USER is the login on the nodes; a jump host's own entry comes first.
        user=node.user
        or (depth and found.get("user"))
        or settings.gpu_node_user
        or found.get("user")
        or getpass.getuser(),
        key_files=tuple(key_files),
        jumps=tuple(jumps),
    )


def parse_hop(hop: str, key_file: str, jump: str | None = "none") -> NodeConfig:
    """`user@host:port`, as ProxyJump has it; `jump` is how that host is reached itself. Raises ConfigurationError."""
    user, _, place = hop.rpartition("@")
    host, port = place, None
    if place.startswith("[") and "]" in place:
        host, _, rest = place[1:].partition("]")
        port = rest.removeprefix(":") or None
    elif place.count(":") == 1:
        host, _, port = place.partition(":")
    try:
        if "[" in host or "]" in host:
            raise ValueError
        return NodeConfig(
            host=host,
            port=int(port) if port is not None else None,
            user=user or None,
            key_file=key_file or None,
            jump=jump,
        )
    except ValueError:  # pydantic's errors are ValueErrors, too
        raise ConfigurationError(f"The jump host {hop[:80]!r} is not understood; it must be user@host:port.") from None


class ChannelStream:
    """The stdin and stdout of an agent behind an exec channel."""

    def __init__(self, channel: paramiko.Channel, clients: list[paramiko.SSHClient]) -> None:
        self._channel = channel
        self._clients = clients
        self._fileno = channel.fileno()
        self._words = b""

    def fileno(self) -> int:
        """A pipe that Paramiko makes readable when data is there."""
        return self._fileno

    def ready(self) -> bool:
        """Whether bytes are there, or the end."""
        self._take_stderr()  # what lies there would keep the descriptor readable
        return self._channel.recv_ready() or bool(self._channel.eof_received) or self._channel.closed

    def send(self, data: bytes) -> None:
        """Write all; the channel's time-out bounds a peer that does not read."""
        try:
            self._channel.sendall(data)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise NodeUnreachable(f"The connection to the node was lost: {_text(error)}.") from None

    def receive(self) -> bytes:
        """What the agent has written."""
        try:
            return self._channel.recv(RECEIVE_SIZE)
        except TimeoutError:
            raise NodeUnreachable("The node did not send what it announced.") from None

    def last_words(self) -> str:
        """The end of stderr: what the shell or Python said."""
        self._take_stderr()
        return self._words.decode("utf-8", "replace").strip()[-LAST_WORDS:]

    def _take_stderr(self) -> None:
        with contextlib.suppress(TimeoutError, OSError):
            while self._channel.recv_stderr_ready():
                data = self._channel.recv_stderr(4096)
                if not data:
                    return
                self._words = (self._words + data)[-4096:]

    def close(self) -> None:
        """Close the channel and all connections below it.

        What is still on its way is dropped: on a slow link it would take the line from the connection that follows.
        Whatever must arrive is acknowledged by the agent before.
        """
        self._channel.close()
        for client in reversed(self._clients):
            _hang_up(client)


def _hang_up(client: paramiko.SSHClient) -> None:
    transport = client.get_transport()
    if transport is not None and isinstance(transport.sock, socket.socket):
        with contextlib.suppress(OSError):
            transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Paramiko's thread waits on the socket, and as long as it does the kernel keeps it open.
            transport.sock.shutdown(socket.SHUT_RD)
    client.close()


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


class SshExecutor:
    """One node behind SSH. Number and GPUs come from the settings."""

    remote = True

    def __init__(
        self, number: int, node: NodeConfig, settings: Settings, instance: str, config: paramiko.SSHConfig | None
    ) -> None:
        self.node_id = f"node-{number}"
        self.target = resolve(node, settings, config)
        self.address = ",".join([str(jump) for jump in self.target.jumps] + [str(self.target)])
        self._gpus = node.gpus
        self._settings = settings
        self._instance = instance

    def python(self) -> str:
        """JOB_PYTHON or NODE_PYTHON."""
        return self._settings.job_python or self._settings.node_python

    def gpus(self) -> list[int] | None:
        """The GPUs named in the settings, or None for all."""
        return self._gpus

    def connect(self) -> NodeConnection:
        """Connect, verify the host key, bring the agent, and greet it."""
        settings = self._settings
        clients: list[paramiko.SSHClient] = []
        try:
            sock: socket.socket | paramiko.Channel | None = None
            for hop in self.target.jumps:
                client = self._connect_one(hop, sock)
                clients.append(client)
                following = [*self.target.jumps, self.target][len(clients)]
                sock = self._through(client, hop, following)
            client = self._connect_one(self.target, sock)
            clients.append(client)
            stream = self._start_agent(client, clients)
            connection = NodeConnection(stream, silence_limit=settings.node_ping_timeout)
            connection.greet(self._instance, timeout=settings.ssh_connect_timeout + settings.node_ping_timeout)
            return connection
        except BaseException:
            for client in reversed(clients):
                _hang_up(client)
            raise

    def _through(self, client: paramiko.SSHClient, hop: Target, target: Target) -> paramiko.Channel:
        transport = client.get_transport()
        assert transport is not None
        try:
            return transport.open_channel(
                "direct-tcpip", (target.host, target.port), ("127.0.0.1", 0), timeout=self._settings.ssh_connect_timeout
            )
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise NodeUnreachable(f"The jump host {hop} cannot reach {target}: {_text(error)}.") from None

    def _open_socket(self, target: Target) -> socket.socket:
        try:
            sock = socket.create_connection((target.host, target.port), timeout=self._settings.ssh_connect_timeout)
        except OSError as error:
            raise NodeUnreachable(f"{target} cannot be reached: {_text(error)}.") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it each exchange costs 45 ms
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Bytes that nobody acknowledges end the connection; keepalive of Paramiko alone never notices.
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._settings.node_ping_timeout * 1000))
        return sock

    def _connect_one(self, target: Target, sock: socket.socket | paramiko.Channel | None) -> paramiko.SSHClient:
        settings = self._settings
        client = paramiko.SSHClient()
        known_hosts = Path(settings.ssh_known_hosts)
        if known_hosts.is_file():
            try:
                client.load_host_keys(str(known_hosts))
            except (OSError, paramiko.SSHException) as error:
                raise NodeRefused(f"SSH_KNOWN_HOSTS: {known_hosts} cannot be read: {_text(error)}.") from None
        client.set_missing_host_key_policy(_ExplainAndReject(known_hosts, target))
        timeout = settings.ssh_connect_timeout
        sock = sock if sock is not None else self._open_socket(target)
        try:
            client.connect(
                target.host,
                port=target.port,
                username=target.user,
                key_filename=list(target.key_files) or None,  # type: ignore[arg-type]  # a list is documented
                look_for_keys=not target.key_files,
                allow_agent=not target.key_files,
                sock=sock,
                timeout=timeout,
                banner_timeout=timeout,
                auth_timeout=timeout,
                channel_timeout=timeout,
                disabled_algorithms={"ciphers": SLOWER_CIPHERS},
            )
        except NodeRefused:
            client.close()
            raise
        except paramiko.BadHostKeyException as error:
            client.close()
            raise NodeRefused(
                f"The host key of {target} has CHANGED: it shows {error.key.get_name()} {error.key.fingerprint}, but "
                f"{known_hosts} holds {error.expected_key.fingerprint}. Someone may be between you and the node. "
                "If the node was reinstalled, remove the old key with: "
                f"ssh-keygen -R '{_known_name(target)}' -f {known_hosts} and accept the new one."
            ) from None
        except (paramiko.AuthenticationException, paramiko.PasswordRequiredException) as error:
            client.close()
            keys = ", ".join(target.key_files) or "the SSH agent and the usual key files"
            raise NodeRefused(
                f"{target} refused the login ({_text(error)}); tried {keys}. "
                "Add the public key to ~/.ssh/authorized_keys there, or set SSH_KEY_FILE."
            ) from None
        except FileNotFoundError as error:
            client.close()
            raise NodeRefused(f"The key file {error.filename} does not exist. Set SSH_KEY_FILE.") from None
        except (paramiko.SSHException, OSError, EOFError) as error:
            client.close()
            raise NodeUnreachable(f"No SSH connection to {target}: {_text(error)}.") from None
        transport = client.get_transport()
        assert transport is not None
        transport.set_keepalive(30)
        transport.sock.settimeout(SOCKET_LOOK)
        return client

    def _start_agent(self, client: paramiko.SSHClient, clients: list[paramiko.SSHClient]) -> ChannelStream:
        settings = self._settings
        root = f"{self._instance}/{self.node_id}"
        words = [settings.node_python, "-I", "-S", "-c", BOOTSTRAP, settings.node_dir, AGENT_VERSION]
        command = " ".join(["exec", *(shlex.quote(word) for word in [*words, str(len(AGENT_SOURCE)), root])])
        transport = client.get_transport()
        assert transport is not None
        try:
            channel = transport.open_session(timeout=settings.ssh_connect_timeout)
            channel.settimeout(settings.ssh_connect_timeout + settings.node_ping_timeout)
            channel.exec_command(command)
            stream = ChannelStream(channel, clients)
            if _marked_line(channel, stream) == "need":
                channel.sendall(AGENT_SOURCE)
                _marked_line(channel, stream)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise NodeUnreachable(f"The agent cannot be started on {self.target}: {_text(error)}.") from None
        channel.settimeout(settings.node_ping_timeout)
        return stream


def _marked_line(channel: paramiko.Channel, stream: ChannelStream) -> str:
    """The bootstrap's next word, byte by byte: what follows the line belongs to the protocol. Login scripts may print
    before it."""
    seen = bytearray()
    line = bytearray()
    while len(seen) < NOISE_MOST:
        byte = channel.recv(1)
        if not byte:
            time.sleep(0.05)  # stderr may come a moment after the end of stdout
            words = stream.last_words() or seen.decode("utf-8", "replace").strip()[-LAST_WORDS:] or "no message"
            raise NodeRefused(f"Python could not be started on the node: {words}. Set NODE_PYTHON to its path there.")
        seen += byte
        if byte != b"\n":
            line += byte
            continue
        text = line.decode("utf-8", "replace")
        line.clear()
        if not text.startswith(MARK + " "):
            continue
        word, _, rest = text.removeprefix(MARK + " ").partition(" ")
        if word == "old":
            raise NodeRefused(f"The node's Python is {rest}; the agent needs 3.8 or newer. Set NODE_PYTHON.")
        if word == "error":
            raise NodeRefused(f"The agent cannot be kept on the node: {rest}. See NODE_DIR.")
        return word
    raise NodeRefused("The node's login scripts print without end; nothing may be printed for non-interactive logins.")


def _known_name(target: Target) -> str:
    return target.host if target.port == 22 else f"[{target.host}]:{target.port}"


class _ExplainAndReject(paramiko.MissingHostKeyPolicy):
    """An unknown host key keeps the node out; the message says how to accept it."""

    def __init__(self, known_hosts: Path, target: Target) -> None:
        self._known_hosts = known_hosts
        self._target = target

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        target = self._target
        raise NodeRefused(
            f"The host key of {target} is not in {self._known_hosts}: it shows {key.get_name()} {key.fingerprint}. "
            f"Compare the fingerprint with the node's own (ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub there), then "
            f"accept it with: ssh-keyscan -p {target.port} {target.host} >> {self._known_hosts}"
        )


def nodes_of(settings: Settings) -> list[NodeConfig]:
    """The nodes that the settings name; empty when jobs run on this machine."""
    if settings.gpu_nodes:
        return list(settings.gpu_nodes)
    if not settings.gpu_node_host:
        return []
    numbered = range(1, settings.num_gpu_nodes + 1)
    if "{i}" in settings.gpu_node_host:
        return [NodeConfig(host=settings.gpu_node_host.replace("{i}", str(number))) for number in numbered]
    return [NodeConfig(host=settings.gpu_node_host, gpus=[number - 1]) for number in numbered]


def connect_jitter(attempt: int, most: float = 30.0) -> float:
    """Seconds before trying again: full jitter, so that many nodes do not knock at one sshd at once (MaxStartups)."""
    return random.uniform(0.1, min(most, 0.5 * 2 ** min(attempt, 10)))  # noqa: S311  # jitter
