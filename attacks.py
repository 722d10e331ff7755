"""The table of attacks: what hostile or broken jobs try, as programmes that are safe to run on one's own nodes.

Each has the numbers of the rows in documentation/SECURITY.md it stands for, the code of a job, and a pure function that
says from the job's end, and from what a look at the node found afterwards, whether the job was contained. Everything is
bounded: a few hundred small processes, 64 MB of disk, 640 MB of memory, nothing is sent anywhere but to the node
itself, and nothing that was there before is changed. `drill` runs them; so do the tests. May import nothing of the
project.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MARK = "gpu-server-drill-mark"  # name of every file and argument of every process that an attack leaves behind
WORD = "DRILL "  # before the one line in which a programme says what it could do
READY = "DRILL-READY"  # printed by a programme that waits to be cancelled

CONTAINED, NOT_CONTAINED, NOT_APPLICABLE = "contained", "NOT CONTAINED", "not applicable"

MEGABYTE = 1 << 20
# Limits that some attacks run into (`Attack.limits`). A server that is to be tried through its API needs all of them.
SMALL_LIMITS = {"output_bytes": MEGABYTE >> 2, "processes": 256, "file_bytes": 64 * MEGABYTE}
SMALL_LIMITS["job_memory"] = 512 * MEGABYTE
OUTPUT, PROCESSES = ("output_bytes",), ("processes",)
MOST_PROCESSES = 600
LATE = 20.0  # seconds after which a job that does nothing was held up

USE_SANDBOX = (
    "Install bubblewrap on the node, set SANDBOX=required, and see that `python3 main.py check` finds it working."
)
NO_NETWORK = f"Set JOB_NETWORK=none. {USE_SANDBOX}"
USE_ORDINARY_LOGIN = (
    "Let the server log in to the node as an ordinary user (GPU_NODE_USER): MAX_PROCESSES binds no root."
)
USE_FILTER = f"Install libseccomp on the node (Debian: libseccomp2). {USE_SANDBOX}"
SMALLER_FILES = "Set MAX_FILE_BYTES to what the node's disk can bear."
REPORT_IT = "This should hold everywhere: drain the node and report it, see documentation/SECURITY.md."


@dataclass(frozen=True)
class Answer:
    """How a job ended, as `/api/results` tells it. `survivors` is known only to who asks the node itself."""

    status: str
    failure_reason: str | None
    exit_code: int | None
    message: str
    stdout: str = ""
    stderr: str = ""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    results: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    survivors: int = 0

    @property
    def report(self) -> dict[str, Any]:
        """What the programme itself said last; empty when it said nothing."""
        for line in reversed(self.stdout.splitlines()):
            if line.startswith(WORD):
                try:
                    found = json.loads(line[len(WORD) :])
                except ValueError:
                    return {}
                return found if isinstance(found, dict) else {}
        return {}

    @property
    def end(self) -> str:
        """The end in a few words."""
        return f"{self.status}{f' ({self.failure_reason})' if self.failure_reason else ''}"


@dataclass(frozen=True)
class Judgement:
    """CONTAINED, NOT_CONTAINED or NOT_APPLICABLE, and what was seen."""

    outcome: str
    seen: str


Judge = Callable[[Answer, dict[str, Any]], Judgement]


@dataclass(frozen=True)
class Attack:
    """One attack. `judge` gets the job's end and the report of LOOK, run on the same node right afterwards."""

    rows: tuple[int, ...]
    name: str
    code: str
    judge: Judge
    expected_time: float = 30.0  # seconds, as a user would declare them; the limit is twice that
    remedy: str = REPORT_IT
    needs_sandbox: bool = False  # nothing but the sandbox holds it
    needs_ordinary_login: bool = False  # not held for a node whose login is root
    needs_results: bool = False  # the job's command names its results file
    cancel: bool = False  # ended from outside once it has printed READY
    may_end_supervisor: bool = False  # without a sandbox it takes its own supervisor with it and is tried again
    uses_gpu: bool = False
    limits: tuple[str, ...] = ()  # those of SMALL_LIMITS that it is meant to run into

    def program(self, port: int | None = None) -> str:
        """The job's code. `port`: one on the node's loopback at which something listens."""
        return f"PORT = {port!r}\n{PRELUDE}{self.code}"


# -- programmes ----------------------------------------------------------------------------------------------------

PRELUDE = f"""\
import glob, json, os, signal, subprocess, sys, time
MARK, BOXED = {MARK!r}, os.getcwd() == "/job"
def report(**found):
    print({WORD!r} + json.dumps(found), flush=True)
def places():
    import pwd, site, sysconfig
    home = pwd.getpwuid(os.getuid()).pw_dir
    own = os.path.realpath(os.getcwd())
    yield from (place for place in (home, home + "/.ssh", home + "/.config", home + "/.config/systemd/user",
        site.getusersitepackages(), sysconfig.get_paths()["purelib"], "/etc/cron.d", "/var/spool/cron/crontabs",
        "/var/spool/cron/atjobs", "/tmp", "/var/tmp", "/dev/shm", own, os.environ.get("TMPDIR", "/tmp"))
        if os.path.isdir(place))
def leave_marks(folders):
    written = []
    for folder in folders:
        try:
            with open(os.path.join(folder, MARK), "w") as file:
                file.write("# harmless\\n")
            written.append(folder)
        except OSError:
            pass
    return written
def daemon(code, **options):
    return subprocess.Popen([sys.executable, "-c", code, MARK], start_new_session=True, **options)
"""

# What is left on the node, and an honest job at that. It clears away what it finds.
LOOK = f"""PORT = None
{PRELUDE}
marks, running = [], []
for place in dict.fromkeys(places()):
    path = os.path.join(place, MARK)
    if os.path.lexists(path) and os.lstat(path).st_uid == os.getuid():
        marks.append(place)
        os.unlink(path)
for entry in filter(str.isdigit, os.listdir("/proc")):
    try:
        # Another login's are no job's of this node, but of a drill on one that shares the machine.
        mine = os.stat(f"/proc/{{entry}}").st_uid == os.getuid()
        if mine and MARK.encode() in open(f"/proc/{{entry}}/cmdline", "rb").read().split(b"\\0"):
            running.append(int(entry))
            os.kill(int(entry), signal.SIGKILL)
    except OSError:
        pass
report(marks=marks, running=running, files=sorted(os.listdir(".")), honest=sum(range(1000)))
"""

_FORK_BOMB = f"""
forked, stopped = 0, None
while forked < {MOST_PROCESSES}:
    try:
        pid = os.fork()
    except OSError as error:
        stopped = error.strerror
        break
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    forked += 1
report(forked=forked, stopped=stopped)
"""

_FLOOD = """
block = b"all work and no play\\n" * 4096
while True:
    os.write({fd}, block)
"""

_ONE_LINE = """
block = b"x" * (1 << 20)
for _ in range(1024):
    left = memoryview(block)
    while left:
        left = left[os.write(1, left):]
"""

_SPARSE = """
with open("results.jsonl", "wb") as file:
    file.write(b'{"a": 1}\\n')
    for size in (1 << 40, 60 << 30, 60 << 20):
        try:
            file.truncate(size)
            break
        except OSError:
            pass
sys.exit(0)
"""

_FILL = """
written, stopped = 0, None
try:
    with open("fill", "wb", buffering=0) as file:
        while written < 300 << 20:
            written += file.write(bytes(1 << 20))
except OSError as error:
    stopped = error.strerror
report(written=written, stopped=stopped)
"""

_MANY_FILES = """
for folder in range(20):
    os.makedirs(f"deep/{folder}" + "/x" * 40)
    for number in range(100):
        open(f"deep/{folder}/{number}", "w").close()
os.chmod("deep/7", 0)
os.chmod("deep", 0)
report(made=2000)
"""

_LINK = """
os.symlink("/etc/passwd", "results.jsonl")
report(linked=True)
"""

_LINKED_PARENT = """
here, other = os.getcwd(), os.path.join(os.environ["TMPDIR"], "elsewhere")
os.mkdir(other)
with open(os.path.join(other, "results.jsonl"), "w") as file:
    file.write('{"stolen": true}\\n')
try:
    os.rename(here, here + ".moved")
    os.symlink(other, here)
    report(replaced=True)
except OSError:
    report(replaced=False)
"""

_HARD_LINK = """
for path in ("/etc/shadow", "/etc/passwd"):
    try:
        os.link(path, "results.jsonl")
        break
    except OSError:
        pass
else:
    with open("own", "w") as file:
        file.write('{"stolen": true}\\n')
    os.link("own", "results.jsonl")
report(linked=True)
"""

_SPECIAL = """
import socket, stat
{make}
report(made=True)
"""

_REWRITE = """
def lines(generation):
    return b"".join(b'{"generation": "%07d", "line": "%05d"}\\n' % (generation, line) for line in range(5000))
with open("results.jsonl", "wb") as file:
    file.write(lines(0))
ready, go = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.write(go, b"x")
    generation = 0
    with open("results.jsonl", "r+b", buffering=0) as file:
        while True:
            generation += 1
            file.seek(0)
            file.write(lines(generation))
os.read(ready, 1)
report(rewriting=True)
os._exit(0)
"""

_OLDER_FILES = """
fresh = sorted(os.listdir("."))
# An interpreter kept below /tmp (a checkout there) is bound into the sandbox, with the empty folders that lead to it.
bound = [os.path.realpath(path) + "/" for path in (sys.prefix, sys.base_prefix, sys.executable)]
older = [path for place in (".", os.environ["HOME"], os.environ["TMPDIR"])
         for path in glob.glob(place + "/*") + glob.glob(place + "/.*")
         if os.path.basename(path) not in ("solution.py", "go")
         and not any(prefix.startswith(path + "/") for prefix in bound)]
report(files=fresh, older=older, marked=leave_marks([".", os.environ["TMPDIR"]]))
"""

_FAKES = r"""
fakes = b"".join([
    b'{"push": "exit", "job": "x", "attempt": 1, "record": {"exit_code": 0, "reason": null}}\n',
    b'{"re": 1, "ok": true, "clock": 0}\n', b'{"event": "exit", "record": {"exit_code": 0}}\n',
    b'{"exit-code": 0}\n', b"gpu-job-server-agent have\n", b"EXIT_CODE=0\n", b'{"score": 1e9}\n',
])
for fd in range(1, 64):
    try:
        os.write(fd, fakes)
    except OSError:
        pass
os._exit(3)
"""

_IGNORE = """
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
print("DRILL-READY", flush=True)
while True:
    time.sleep(600)
"""

_DAEMON = """
twice = '''
import os, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
time.sleep(600)
'''
null = subprocess.DEVNULL
daemon(twice, stdin=null, stdout=null, stderr=null).wait()
report(started=True)
"""

_HOLD_STDOUT = """
daemon("import time; time.sleep(600)")
report(started=True)
os._exit(0)
"""

_KILL_OTHERS = """
root = os.path.dirname(os.path.dirname(os.path.dirname(os.getcwd()))).encode()
tried, done, agents = 0, [], []
if BOXED:
    victims = [1, os.getppid()] + list(range(2, 400))
else:
    for entry in os.listdir("/proc"):
        try:
            words = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\\0") if entry.isdigit() else []
        except OSError:
            continue
        if b"--root" in words and words[words.index(b"--root") + 1].endswith(b"/".join(root.split(b"/")[-2:])):
            agents.append(int(entry))
    victims = [pid for pid in agents if pid != os.getppid()] + [os.getppid()]
for pid in victims:
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGKILL)
            done.append(pid)
        except OSError:
            pass
report(signalled=len(done))
"""

_DELETE = """
import shutil
if BOXED:
    shutil.rmtree("/job", ignore_errors=True)
    shutil.rmtree("/tmp", ignore_errors=True)
elif os.path.exists("../supervisor.json"):
    shutil.rmtree(os.path.dirname(os.getcwd()), ignore_errors=True)
report(deleted=True)
"""

_PERSIST = """
import pwd
home = pwd.getpwuid(os.getuid()).pw_dir
changeable = [path for path in (".bashrc", ".profile", ".bash_profile", ".ssh/authorized_keys")
              if os.access(os.path.join(home, path), os.W_OK)]
lasting = [place for place in places() if not place.startswith(("/tmp", "/var/tmp", "/dev/shm"))]
report(changeable=changeable, written=leave_marks(lasting))
"""

_ENVIRON = r"""
import re
telling = re.compile(rb"(?i)^([A-Z0-9_]*(?:TOKEN|SECRET|PASSW|API_?KEY|PRIVATE_?KEY)[A-Z0-9_]*)=(?!/|$)")
address = re.compile(rb"^([A-Za-z0-9_]+)=\w+(?:\+\w+)?://[^/:@]+:[^/@]+@")
others, secrets = 0, set()
for entry in os.listdir("/proc"):
    if not entry.isdigit():
        continue
    try:
        content = open(f"/proc/{entry}/environ", "rb").read()
        open(f"/proc/{entry}/maps", "rb").read(1)
        words = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
    except OSError:
        continue
    others += int(entry) != os.getpid()
    for variable in content.split(b"\0"):
        found = telling.match(variable) or address.match(variable)
        if found:
            secrets.add(found.group(1).decode())  # the name, never the value
    given = [word for word in words if re.match(rb"--?(token|password)=.", word)]
    secrets |= {word.decode("utf-8", "replace").split("=")[0] for word in given}
report(others=others, secrets=sorted(secrets))
"""

_OTHERS_FILES = """
looked = ["../supervisor.json", "../spec.json", "../stdout", "../../*/*/solution.py", "../../../agent.log"]
for level in range(3, 9):
    looked += ["../" * level + name for name in ("database.db", "token.key", "results/*.jsonl", "*/solution.py")]
readable, own = [], os.path.realpath(".") + "/"
for pattern in looked:
    for path in glob.glob(pattern):
        if os.path.realpath(path).startswith(own):
            continue
        try:
            with open(path, "rb") as file:
                file.read(1)
            readable.append(pattern)
        except OSError:
            pass
report(readable=sorted(set(readable)))
"""

_LEAVE = """
import pwd
home = pwd.getpwuid(os.getuid()).pw_dir
report(written=leave_marks(["/tmp", "/var/tmp", "/dev/shm", home]))
"""

_UGLY = r"""
os.write(1, b"\x00\xff\xfe\xc3\x28\xed\xa0\x80\n\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b31m\n")
os.write(1, b"<script>alert(1)</script>\r\n")
os.write(2, bytes(range(256)))
report(printed=True)
"""

_BAD_RESULTS = """
with open("results.jsonl", "w") as file:
    file.write('{"fine": 1}\\n' + %s + '\\n')
"""

_GPU = """
holder = '''
import ctypes, time
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
for step in (lambda: cuda.cuInit(0), lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
             lambda: cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
             lambda: cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(64 << 20))):
    code = step()
    if code:
        raise SystemExit(f"CUDA error {code}")
print("held", flush=True)
time.sleep(600)
'''
process = daemon(holder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
line = process.stdout.readline().strip()
report(held=line == "held", why="" if line else process.stderr.read().strip().split("\\n")[-1][:200])
os._exit(0)
"""

_UNINTERRUPTIBLE = """
import ctypes
libc = ctypes.PyDLL(None)
os.write(1, b"DRILL-READY\\n")
if libc.vfork() == 0:  # the parent waits in state D for a child that never goes on
    libc.pause()
"""

_CLOCK = """
try:
    time.clock_settime(time.CLOCK_REALTIME, time.time())
    report(clock="can be set")
except OSError:
    report(clock="refused")
while True:
    time.sleep(600)
"""

_MEMORY = """
import mmap
try:
    reserved = mmap.mmap(-1, 20 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    room = True
except (OSError, ValueError) as error:
    room = False
report(reserved=room)
block = b"x" * (640 << 20)
"""

_CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
keyctl, bpf, open_handle = {"x86_64": (250, 321, 304), "aarch64": (219, 280, 265)}[os.uname().machine]
calls = {"unshare": lambda: libc.unshare(0x10000000), "keyctl": lambda: libc.syscall(keyctl, 0, -3, 0),
    "bpf": lambda: libc.syscall(bpf, -1, 0, 0), "io_uring": lambda: libc.syscall(425, 1, 0),
    "open_by_handle_at": lambda: libc.syscall(open_handle, -1, 0, 0)}
allowed = []
for name, call in calls.items():
    if call() >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        allowed.append(name)
report(allowed=allowed)
"""

_CONNECT = """
import socket
try:
    names = [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]
except OSError:
    names = ["unknown"]
targets = [("127.0.0.1", PORT)] if PORT else []
if names == ["lo"]:  # only where nothing can leave: what answers there elsewhere is not ours to ask
    targets.append(("169.254.169.254", 80))
reached = []
for address in targets:
    try:
        socket.create_connection(address, timeout=2).close()
        reached.append("%s:%d" % address)
    except OSError:
        pass
report(interfaces=names, tried=len(targets), reached=reached)
"""


# -- judges --------------------------------------------------------------------------------------------------------


def _good(seen: str) -> Judgement:
    return Judgement(CONTAINED, seen)


def _bad(seen: str) -> Judgement:
    return Judgement(NOT_CONTAINED, seen)


def left_behind(answer: Answer, found: dict[str, Any]) -> str | None:
    """What of the job still ran, or None."""
    if answer.survivors:
        return f"{answer.survivors} of its processes could not be ended"
    if found.get("running"):
        return f"{len(found['running'])} of its processes outlived it"
    return None


def ends(status: str, reason: str | None = None, *, message: str = "", truncated: str = "") -> Judge:
    """Contained when the job's end is this one, `message` is part of what was said, and nothing runs on."""

    def judge(answer: Answer, found: dict[str, Any]) -> Judgement:
        problem = left_behind(answer, found)
        if problem:
            return _bad(problem)
        if (answer.status, answer.failure_reason) != (status, reason):
            return _bad(f"it ended as {answer.end}: {answer.message}")
        if message and message not in answer.message:
            return _bad(f"the message is: {answer.message}")
        for stream in filter(None, [truncated]):
            kept = len(getattr(answer, stream))
            if not getattr(answer, f"{stream}_truncated") or not 0 < kept <= SMALL_LIMITS["output_bytes"]:
                return _bad(f"{kept} characters of {stream} were kept and not flagged as cut")
            return _good(f"{answer.end}; {kept} bytes of {stream} kept, flagged as cut")
        return _good(answer.end)

    return judge


def _fork_bomb(answer: Answer, found: dict[str, Any]) -> Judgement:
    problem = left_behind(answer, found)
    if problem:
        return _bad(problem)
    said = answer.report
    if "forked" not in said and answer.status == "failed":
        return _good(f"it could not even begin: {answer.end}")
    if not said.get("stopped"):
        return _bad(f"{said.get('forked')} processes and no end")
    return _good(f"stopped at {said['forked']} processes: {said['stopped']}")


def _one_file(answer: Answer, found: dict[str, Any]) -> Judgement:
    said = answer.report
    if not said.get("stopped"):
        return _bad(f"{said.get('written')} bytes in one file, more than MAX_FILE_BYTES")
    return _good(f"stopped at {said['written'] >> 20} MiB: {said['stopped']}")


def _linked_parent(answer: Answer, found: dict[str, Any]) -> Judgement:
    if any("stolen" in record for record in answer.results):
        return _bad("a file from elsewhere was taken as its results")
    if answer.failure_reason == "results_invalid":
        return _good("refused as results_invalid")
    return _good("not permitted") if answer.report.get("replaced") is False else _bad(f"it ended as {answer.end}")


def _snapshot(answer: Answer, found: dict[str, Any]) -> Judgement:
    problem = left_behind(answer, found)
    if problem:
        return _bad(problem)
    if answer.status == "completed":
        return _good(f"one snapshot of {len(answer.results)} lines, length and digest agree")
    if answer.failure_reason == "results_invalid" and "changed" not in answer.message:
        return _good("one snapshot, in the middle of a line")
    return _bad(f"it ended as {answer.end}: {answer.message}")


def _older_files(answer: Answer, found: dict[str, Any]) -> Judgement:
    said = answer.report
    older = [name for name in said.get("older", ["?"]) if not name.endswith("/go")]
    if older or MARK in found.get("files", []):
        return _bad(f"found {older or MARK}")
    return _good("a fresh folder each")


def _fakes(answer: Answer, found: dict[str, Any]) -> Judgement:
    if (answer.status, answer.failure_reason, answer.exit_code) != ("failed", "exit_code", 3):
        return _bad(f"it ended as {answer.end}, exit code {answer.exit_code}")
    ok = answer.stdout.count("EXIT_CODE=0") >= 1 and "EXIT_CODE=0" in answer.stderr
    return _good("output and nothing more; exit code 3 told") if ok else _bad("its output was changed")


def _exit_code(code: int) -> Judge:
    def judge(answer: Answer, found: dict[str, Any]) -> Judgement:
        good = (answer.status, answer.failure_reason, answer.exit_code) == ("failed", "exit_code", code)
        return _good(f"exit code {code} told") if good else _bad(f"it ended as {answer.end}: {answer.message}")

    return judge


def _own_signal(answer: Answer, found: dict[str, Any]) -> Judgement:
    if answer.failure_reason != "signal" or "memory" in answer.message.lower():
        return _bad(f"it ended as {answer.end}: {answer.message}")
    return _good("told as its own signal")


def _in_time(answer: Answer, found: dict[str, Any]) -> Judgement:
    problem = left_behind(answer, found)
    if problem or answer.status != "completed":
        return _bad(problem or f"it ended as {answer.end}")
    if answer.seconds > LATE:
        return _bad(f"its end was held up for {answer.seconds:.0f} s")
    return _good(f"everything it started is dead, after {answer.seconds:.1f} s")


def _alone(answer: Answer, found: dict[str, Any]) -> Judgement:
    problem = left_behind(answer, found)
    if problem:
        return _bad(problem)
    if answer.status == "completed":
        return _good("not permitted")
    return _good(f"the job alone failed: {answer.end}")


def _persistence(answer: Answer, found: dict[str, Any]) -> Judgement:
    said = answer.report
    if found.get("marks") or said.get("changeable"):
        return _bad(f"files stay in {found.get('marks')}; it could change {said.get('changeable')}")
    return _good("nothing of it is there for the next job") if "written" in said else _bad(f"it ended as {answer.end}")


def _left_files(answer: Answer, found: dict[str, Any]) -> Judgement:
    if "written" not in answer.report:
        return _bad(f"it ended as {answer.end}")
    return _bad(f"files stay in {found['marks']}") if found.get("marks") else _good("gone for the next job")


def _secrets(answer: Answer, found: dict[str, Any]) -> Judgement:
    said = answer.report
    if said.get("secrets") != []:
        return _bad(f"it could read {said.get('secrets')}")
    return _good(f"nothing secret; it sees {said['others']} other processes")


def _others_files(answer: Answer, found: dict[str, Any]) -> Judgement:
    readable = answer.report.get("readable")
    return _good("denied") if readable == [] else _bad(f"it could read {readable}")


def _ugly(answer: Answer, found: dict[str, Any]) -> Judgement:
    kept = "<script>alert(1)</script>" in answer.stdout and "\x1b[31mred" in answer.stdout
    if answer.status != "completed" or not kept or not answer.stderr:
        return _bad(f"it ended as {answer.end}, or its output was changed")
    return _good("kept as they are, in valid JSON")


def _gpu(answer: Answer, found: dict[str, Any]) -> Judgement:
    said = answer.report
    if not said.get("held"):
        return Judgement(NOT_APPLICABLE, f"no GPU memory could be taken: {said.get('why') or answer.end}")
    problem = left_behind(answer, found)
    if problem or found.get("gpu"):
        return _bad(problem or f"on the GPU still: {found['gpu']}")
    return _good("its memory is free with its processes")


def _memory(answer: Answer, found: dict[str, Any]) -> Judgement:
    if answer.failure_reason == "memory_exceeded":
        return _good("ended as memory_exceeded")
    if not answer.report.get("reserved"):
        return _bad("20 GB of addresses cannot be reserved, which CUDA does")
    return Judgement(NOT_APPLICABLE, "this node holds no memory limit; addresses can be reserved, as CUDA needs")


def _calls(answer: Answer, found: dict[str, Any]) -> Judgement:
    allowed = answer.report.get("allowed")
    if allowed is None:
        return _bad(f"it ended as {answer.end}: {answer.message}")
    return _bad(f"the kernel took {', '.join(allowed)}") if allowed else _good("each was refused")


def _network(answer: Answer, found: dict[str, Any]) -> Judgement:
    said = answer.report
    if "reached" not in said:
        return _bad(f"it ended as {answer.end}")
    if said["reached"]:
        return _bad(f"it reached {', '.join(said['reached'])}")
    if said["interfaces"] != ["lo"]:
        return _bad(f"it has the network interfaces {said['interfaces']}")
    return _good("nothing can be reached")


# -- the table -----------------------------------------------------------------------------------------------------


def _flood(rows: tuple[int, ...], name: str, stream: str) -> Attack:
    # Three seconds: on a busy node a job has printed only half a megabyte in its first one.
    code = _FLOOD.format(fd=("stdout", "stderr").index(stream) + 1)
    return Attack(rows, name, code, ends("failed", "timeout", truncated=stream), 3.0, limits=OUTPUT)


def _special(kind: str, make: str) -> Attack:
    return Attack((11,), f"makes its results {kind}", _SPECIAL.format(make=make), ends("failed", "results_invalid"))


def _bad_results(kind: str, line: str) -> Attack:
    judge = ends("failed", "results_invalid", message="line 2")
    return Attack((29,), f"writes {kind} as results", _BAD_RESULTS % line, judge)


ATTACKS: tuple[Attack, ...] = (
    Attack(
        (1,),
        "fork bomb",
        _FORK_BOMB,
        _fork_bomb,
        remedy=USE_ORDINARY_LOGIN,
        needs_ordinary_login=True,
        limits=("processes",),
    ),
    _flood((2,), "prints for ever", "stdout"),
    _flood((3,), "prints for ever to stderr", "stderr"),
    Attack((4,), "prints one line of 1 GB", _ONE_LINE, ends("completed", truncated="stdout"), 60.0, limits=OUTPUT),
    Attack((5,), "sparse results file of 1 TB", _SPARSE, ends("failed", "results_too_large")),
    Attack((6,), "fills the disk with one file", _FILL, _one_file, remedy=SMALLER_FILES, limits=("file_bytes",)),
    Attack((7,), "thousands of files, some unreadable", _MANY_FILES, ends("completed")),
    Attack((8,), "makes its results a symbolic link", _LINK, ends("failed", "results_invalid")),
    Attack((9,), "puts a link in place of its folder", _LINKED_PARENT, _linked_parent),
    Attack((10,), "makes its results a hard link", _HARD_LINK, ends("failed", "results_invalid")),
    _special("a FIFO", 'os.mkfifo("results.jsonl")'),
    _special("a socket", 'socket.socket(socket.AF_UNIX).bind("results.jsonl")'),
    _special("a directory", 'os.mkdir("results.jsonl")'),
    Attack((12,), "rewrites its results while they are read", _REWRITE, _snapshot),
    Attack((13,), "leaves no results although it must", "", ends("failed", "results_missing"), needs_results=True),
    Attack((14,), "looks for an older job's files", _OLDER_FILES, _older_files),
    Attack((15,), "prints fake protocol messages", _FAKES, _fakes),
    Attack((16,), "os._exit(0) without results", "os._exit(0)\n", ends("completed")),
    Attack((17,), "ends with exit code 255", "sys.exit(255)\n", _exit_code(255)),
    Attack((18,), "kills itself with signal 9", "os.kill(os.getpid(), 9)\ntime.sleep(60)\n", _own_signal),
    Attack((19,), "ignores every signal", _IGNORE, ends("failed", "timeout"), 1.0),
    Attack((20,), "double-forks a daemon", _DAEMON, _in_time),
    Attack((21,), "leaves a daemon that holds stdout open", _HOLD_STDOUT, _in_time),
    Attack((22,), "kills its supervisor and the agent", _KILL_OTHERS, _alone, may_end_supervisor=True),
    Attack((23,), "deletes its folder and its supervisor's files", _DELETE, _alone, may_end_supervisor=True),
    Attack((24,), "leaves start-up files", _PERSIST, _persistence, remedy=USE_SANDBOX, needs_sandbox=True),
    Attack((25,), "reads /proc for secrets", _ENVIRON, _secrets, remedy=USE_SANDBOX),
    Attack((26,), "reads other people's files", _OTHERS_FILES, _others_files, remedy=USE_SANDBOX, needs_sandbox=True),
    Attack((27,), "writes /tmp, /dev/shm and home", _LEAVE, _left_files, remedy=USE_SANDBOX, needs_sandbox=True),
    Attack((28,), "prints invalid UTF-8, NUL, ANSI, <script>", _UGLY, _ugly),
    _bad_results("NaN", "'{\"a\": NaN}'"),
    _bad_results("Infinity", "'{\"a\": -Infinity}'"),
    _bad_results("duplicate keys", '\'{"a": 1, "a": 2}\''),
    _bad_results("10,000-deep JSON", "'{\"a\": ' + '[' * 10000 + ']' * 10000 + '}'"),
    Attack((30,), "holds GPU memory after its end", _GPU, _gpu, uses_gpu=True),
    Attack((31,), "hangs in uninterruptible sleep", _UNINTERRUPTIBLE, ends("failed", "timeout"), 1.0),
    Attack((32,), "sets the clock, sleeps past its limit", _CLOCK, ends("failed", "timeout"), 1.0),
    Attack((33,), "eats memory", _MEMORY, _memory, limits=("job_memory",)),
    Attack((34,), "connects to the node and beyond", _CONNECT, _network, remedy=NO_NETWORK, needs_sandbox=True),
    Attack((43,), "makes calls that no job needs", _CALLS, _calls, remedy=USE_FILTER, needs_sandbox=True),
    Attack((39,), "is cancelled and ignores it", _IGNORE, ends("cancelled"), 60.0, cancel=True),
)


def chosen(rows: set[int] | None) -> list[Attack]:
    """The attacks of these rows; all of them for None."""
    return [attack for attack in ATTACKS if rows is None or rows & set(attack.rows)]


def weigh(attack: Attack, answer: Answer, found: dict[str, Any]) -> Judgement:
    """The judgement on an attack, an honest job afterwards included: `found` is empty when that one failed."""
    if not found or found.get("honest") != 499500:
        return _bad("an honest job on the node failed afterwards")
    return attack.judge(answer, found)
