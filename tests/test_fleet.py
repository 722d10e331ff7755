"""The test fleet itself: real sshd, real clients; each fault it offers does what it says and is undone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from tests import fleet as fleet_module
from tests.fleet import NODE_PYTHON, Fleet, FleetError, FleetNode, missing_tools

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))
ROOT = Path(__file__).parent.parent
QUERY = "nvidia-smi --query-gpu=uuid,memory.used,temperature.gpu --format=csv,noheader,nounits"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(3) as running:
        yield running


def connect(fleet: Fleet, number: int, through: paramiko.SSHClient | None = None) -> paramiko.SSHClient:
    """A client that accepts only the keys in the fleet's known_hosts."""
    node = fleet.node(number)
    client = paramiko.SSHClient()
    client.load_host_keys(str(fleet.known_hosts))
    channel = None
    if through is not None:
        transport = through.get_transport()
        assert transport is not None
        channel = transport.open_channel("direct-tcpip", (node.host, node.port), ("127.0.0.1", 0), timeout=10)
    client.connect(
        node.host,
        node.port,
        node.user,
        key_filename=str(fleet.key_file),
        sock=channel,
        allow_agent=False,
        look_for_keys=False,
        timeout=10,
        banner_timeout=10,
    )
    return client


def run(client: paramiko.SSHClient, command: str) -> list[str]:
    _, stdout, stderr = client.exec_command(command, timeout=20)
    lines = stdout.read().decode().splitlines()
    assert stdout.channel.recv_exit_status() == 0, stderr.read().decode()
    return lines


def eventually(condition: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.01)


def test_each_node_has_its_own_home_python_and_gpu(fleet: Fleet) -> None:
    uuids = set()
    for node in fleet.nodes:
        with connect(fleet, node.number) as client:
            home, there, prefix, gpu = run(
                client, f"echo $HOME; cd; pwd; {NODE_PYTHON} -c 'import sys; print(sys.prefix)'; {QUERY}"
            )
            assert home == there == str(node.home)
            assert prefix == f"{node.home}/env"
            uuids.add(gpu.split(",")[0])
            run(client, f"cd; echo {node.number} > mine")
            assert run(client, "cat ~/mine") == [str(node.number)]
    assert len(uuids) == len(fleet.nodes) == len({node.home for node in fleet.nodes})
    assert len({node.host_key_path.read_bytes() for node in fleet.nodes}) == len(fleet.nodes)


@pytest.mark.skipif(os.geteuid() != 0, reason="users of their own need root")
def test_as_root_a_node_starts_in_its_home_and_cannot_enter_anothers(fleet: Fleet) -> None:
    assert fleet.ssh(1, "pwd").stdout.strip() == str(fleet.node(1).home)
    assert fleet.ssh(1, "id -u").stdout.strip() not in ("0", fleet.ssh(2, "id -u").stdout.strip())
    assert fleet.ssh(1, f"ls {fleet.node(2).home}").returncode != 0
    assert fleet.ssh(1, f"cat {fleet.key_file} {fleet.node(2).host_key_path}").stdout == ""


def test_settings_name_every_node_and_what_opens_it(fleet: Fleet) -> None:
    settings = fleet.settings()
    nodes = json.loads(settings["GPU_NODES"])
    assert [(n["host"], n["port"], n["user"], n["gpus"]) for n in nodes] == [
        (n.host, n.port, n.user, [0]) for n in fleet.nodes
    ]
    assert Path(settings["SSH_KEY_FILE"]).exists()
    assert len(Path(settings["SSH_KNOWN_HOSTS"]).read_text().splitlines()) == 3
    assert fleet.ssh(1, f"{settings['NODE_PYTHON']} -I -S -c pass").returncode == 0


def test_sftp_works(fleet: Fleet) -> None:
    with connect(fleet, 1) as client, client.open_sftp() as sftp, sftp.open(f"{fleet.node(1).home}/f", "w") as f:
        f.write("x")
    assert (fleet.node(1).home / "f").read_text() == "x"


def test_many_channels_fit_into_one_connection(fleet: Fleet) -> None:
    with connect(fleet, 1) as client:
        transport = client.get_transport()
        assert transport is not None
        channels = [transport.open_session(timeout=10) for _ in range(40)]
        assert all(channel.active for channel in channels)


def test_a_stopped_node_refuses_and_its_processes_live_on(fleet: Fleet) -> None:
    node = fleet.node(2)
    with connect(fleet, 2) as client:
        run(client, "nohup sleep 300 >/dev/null 2>&1 </dev/null &")
        port = node.port
        fleet.stop(2)
        assert node.pid is None
        transport = client.get_transport()
        assert transport is not None
        eventually(lambda: not transport.is_active())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((node.host, port), timeout=5)
    assert [p.name for p in fleet.processes(2)] == ["sleep"]
    fleet.start(2)
    fleet.start(2)  # starting what runs changes nothing
    assert node.port == port
    with connect(fleet, 2) as client:
        assert run(client, "echo back") == ["back"]
    fleet.kill_processes(2)
    assert fleet.processes(2) == []


def test_kill_sessions_breaks_connections_and_leaves_the_server(fleet: Fleet) -> None:
    pid = fleet.node(1).pid
    with connect(fleet, 1) as client, connect(fleet, 3) as bystander:
        assert fleet.sessions(1)
        fleet.kill_sessions(1)
        assert fleet.sessions(1) == []
        transport = client.get_transport()
        assert transport is not None
        eventually(lambda: not transport.is_active())
        assert run(bystander, "echo here") == ["here"]
    assert fleet.node(1).pid == pid
    assert fleet.ssh(1, "true").returncode == 0


def test_a_frozen_node_is_silent_until_thawed(fleet: Fleet) -> None:
    with connect(fleet, 1) as client:
        stdin, stdout, _ = client.exec_command("cat")
        fleet.freeze(1)
        try:
            stdin.write("hello\n")
            stdin.flush()
            stdout.channel.settimeout(0.3)
            with pytest.raises(TimeoutError):
                stdout.channel.recv(1)
        finally:
            fleet.thaw(1)
        stdout.channel.settimeout(10)
        assert stdout.channel.recv(6) == b"hello\n"


def test_a_changed_host_key_keeps_clients_out(fleet: Fleet) -> None:
    before = fleet.node(3).host_key_path.read_bytes()
    fleet.change_host_key(3)
    assert fleet.node(3).host_key_path.read_bytes() != before
    with pytest.raises(paramiko.BadHostKeyException):
        connect(fleet, 3)
    assert "host key" in fleet.ssh(3, "true").stderr.lower()
    fleet.change_host_key(3, known=True)
    connect(fleet, 3).close()


def test_python_can_be_broken_and_mended(fleet: Fleet) -> None:
    fleet.break_python(1)
    fleet.break_python(1)
    broken = fleet.ssh(1, f"{NODE_PYTHON} -c pass")
    assert broken.returncode == 127
    assert fleet.ssh(2, f"{NODE_PYTHON} -c pass").returncode == 0
    assert fleet.ssh(1, QUERY).returncode == 0
    fleet.mend_python(1)
    fleet.mend_python(1)
    assert fleet.ssh(1, f"{NODE_PYTHON} -c pass").returncode == 0


def test_the_gpu_shows_what_it_is_told(fleet: Fleet) -> None:
    fleet.set_gpu(1, memory_used=2048, temperature=None, processes=[{"pid": 77, "memory": 2000}])
    uuid = fleet.ssh(1, QUERY).stdout.split(",")[0]
    assert fleet.ssh(1, QUERY).stdout == f"{uuid}, 2048, [N/A]\n"
    apps = "nvidia-smi --query-compute-apps=pid,gpu_uuid,process_name,used_memory --format=csv,noheader,nounits"
    assert fleet.ssh(1, apps).stdout == f"77, {uuid}, python3, 2000\n"
    assert fleet.ssh(2, apps).stdout == ""
    fleet.set_gpu(1, error="Unable to determine the device handle: GPU is lost.", exit_code=15)
    failed = fleet.ssh(1, QUERY)
    assert (failed.returncode, failed.stdout) == (15, "Unable to determine the device handle: GPU is lost.\n")
    fleet.set_gpu(1, error=None, memory_used=3, temperature=31, processes=[])
    with pytest.raises(FleetError, match="colour"):
        fleet.set_gpu(1, colour="green")


def test_the_stand_in_prints_the_real_tools_csv(fleet: Fleet) -> None:
    assert fleet.ssh(1, "nvidia-smi --query-gpu=index,memory.total,utilization.gpu --format=csv").stdout == (
        "index, memory.total [MiB], utilization.gpu [%]\n0, 40960 MiB, 0 %\n"
    )
    assert fleet.ssh(1, "nvidia-smi --query-compute-apps=pid,used_memory --format=csv").stdout == (
        "pid, used_gpu_memory [MiB]\n"
    )
    assert fleet.ssh(1, "nvidia-smi --query-gpu=colour --format=csv").returncode == 2
    assert "stand-in" in fleet.ssh(1, "nvidia-smi --help").stdout


def test_a_node_that_does_not_exist_is_named(fleet: Fleet) -> None:
    with pytest.raises(FleetError, match="no node 9"):
        fleet.stop(9)


def test_nodes_behind_a_jump_host() -> None:
    with Fleet(1, jump=True) as fleet:
        assert fleet.jump is not None
        assert json.loads(fleet.settings()["GPU_NODES"])[0]["jump"] == fleet.jump.address
        with connect(fleet, 0) as jump, connect(fleet, 1, through=jump) as client:
            assert run(client, "echo $HOME") == [str(fleet.node(1).home)]
        assert fleet.ssh(1, "echo $HOME").stdout.strip() == str(fleet.node(1).home)
        fleet.stop(0)
        assert fleet.ssh(1, "true").returncode == 255


def test_eight_nodes_are_up_quickly() -> None:
    began = time.monotonic()
    with Fleet(8):
        assert time.monotonic() - began < 10  # 0.4 s on two idle cores; the bound only catches a hang


def leftovers(nodes: list[FleetNode], folder: Path) -> list[str]:
    homes = [str(node.home) for node in nodes if node.home.exists()]
    servers = [str(p) for p in fleet_module.processes() if p.pid in {node.pid for node in nodes}]
    running = [str(p) for node in nodes for p in node._account.processes()]
    return homes + servers + running + ([str(folder)] if folder.exists() else [])


def test_nothing_is_left_after_closing_even_with_hostile_jobs() -> None:
    with Fleet(2) as fleet:
        nodes, folder = list(fleet.nodes), fleet.folder
        first = nodes[0]
        daemon = "trap '' TERM HUP; cd /; while :; do sleep 1 & wait; done"
        fleet.ssh(1, f'setsid sh -c "{daemon}" >/dev/null 2>&1 </dev/null &')
        fleet.ssh(1, "cd; mkdir -p a/b; touch a/b/c; ln -s / root; chmod 000 a/b a; chmod 500 ~")
        fleet.stop(2)
        fleet.freeze(1)
        assert fleet.processes(1)
        pid = first.pid
        assert pid is not None
    assert leftovers(nodes, folder) == []
    assert fleet_module.read_process(pid) is None
    assert fleet.nodes == []
    fleet.close()


def test_two_fleets_at_once_stay_apart() -> None:
    with Fleet(2) as one, Fleet(2) as other:
        assert {n.port for n in one.nodes}.isdisjoint(n.port for n in other.nodes)
        assert {n.home for n in one.nodes}.isdisjoint(n.home for n in other.nodes)
        other.ssh(1, "nohup sleep 300 >/dev/null 2>&1 </dev/null &")
        one.close()
        assert [p.name for p in other.processes(1)] == ["sleep"]


def start_command_line(*options: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fleet", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if "Ctrl-C" in line:
            break
    return process, text


def test_the_command_line_prints_settings_and_cleans_up(tmp_path: Path) -> None:
    settings = tmp_path / "fleet.env"
    process, text = start_command_line("-n", "2", "--jump", "--env-file", str(settings))
    with process:
        assert settings.read_text() in text
        shown = subprocess.run(
            ["sh", "-c", f'. {settings}; printf %s "$GPU_NODES"'], capture_output=True, text=True, check=True
        )
        assert len(json.loads(shown.stdout)) == 2
        folder = Path(re.search(r"SSH_KEY_FILE=(\S+)", text)[1]).parent  # type: ignore[index]
        assert folder.exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert not folder.exists()
    assert not settings.exists()


def is_taken(user: str) -> bool:
    """Whether a fleet that lives has the account."""
    with open(fleet_module.LOCKS / user) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.skipif(os.geteuid() != 0, reason="only the pool's accounts can be cleared up after a kill")
def test_the_next_fleet_clears_up_after_one_that_was_killed() -> None:
    process, text = start_command_line("-n", "2")
    with process:
        folder = Path(re.search(r"SSH_KEY_FILE=(\S+)", text)[1]).parent  # type: ignore[index]
        users = re.findall(r"(gpufleet\d+)@127.0.0.1:(\d+)", text)
        process.kill()
        process.wait(30)
    assert folder.exists()
    with Fleet(2), contextlib.ExitStack() as held:
        # A fleet takes the first accounts that are free. Others on this machine may have ended since, or have
        # taken one of these; who takes it clears up.
        while not all(is_taken(user) for user, _ in users):
            held.callback(fleet_module.pool_account().release)
        eventually(lambda: not folder.exists())
        for _, port in users:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", int(port)), timeout=5)


def test_a_missing_ssh_server_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "find_program", lambda name: None)
    with pytest.raises(FleetError, match="apt-get install openssh-server"):
        Fleet(1).open()
