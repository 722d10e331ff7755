"""Starting Python on this machine without a server: the least that any job costs. Shared by subjects.

Imports `tests.fleet` for the node's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers import program
from tests.fleet import NODE_PYTHON, Fleet

# The first line of user code notes the moment; one machine, so one monotonic clock.
FIRST_LINE = b"import time; print(time.monotonic(), flush=True)\n"


class Bare:
    """Starts of the interpreter that the nodes' jobs use, with the same options, in a folder of their own."""

    def __init__(self, python: str) -> None:
        self._python = python
        self._folder = tempfile.TemporaryDirectory(prefix="bare-")
        self.folder = Path(self._folder.name)
        self._environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder), "LANG": "C.UTF-8"}

    @classmethod
    def of_fleet(cls, fleet: Fleet) -> Bare:
        """With what the nodes' jobs start: the fleet's interpreter in a virtual environment."""
        bare = cls(sys.executable)
        environment = bare.folder / "env"
        (environment / "bin").mkdir(parents=True)
        (environment / "bin" / NODE_PYTHON).symlink_to(fleet.python)
        home = Path(fleet.python).parent
        (environment / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
        bare._python = str(environment / "bin" / NODE_PYTHON)
        return bare

    @classmethod
    def of_this_machine(cls) -> Bare:
        """With the interpreter that slots on this machine use."""
        return cls(sys.executable)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _run(self, code: bytes, before: list[str]) -> str:
        path = self.folder / "solution.py"
        path.write_bytes(code)
        words = [*before, self._python, "-u", str(path)]
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=self._environment,
            cwd=self.folder,
            text=True,
            check=True,
        )
        return done.stdout

    def whole(self) -> float:
        """Milliseconds of a no-op from start to end, its file written before."""
        began = time.monotonic()
        self._run(b"pass\n", [])
        return (time.monotonic() - began) * 1000

    def to_first_line(self, before: list[str] | None = None) -> float:
        """Milliseconds from before the start to the first line of user code."""
        began = time.monotonic()
        return (float(self._run(FIRST_LINE, before or [])) - began) * 1000

    def bubblewrap(self) -> list[str]:
        """The words before a command that contain it as the agent would; empty where bubblewrap is missing."""
        bwrap = program("bwrap")
        if bwrap is None:
            return []
        real = Path(os.path.realpath(self._python))
        prefixes = {str(real.parent.parent)} - {"/usr"}
        binds = [word for prefix in sorted(prefixes) for word in ("--ro-bind", prefix, prefix)]
        links = [word for name in ("bin", "sbin", "lib", "lib64") for word in ("--symlink", f"usr/{name}", f"/{name}")]
        return [
            *(bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
            *("--unshare-cgroup-try", "--die-with-parent", "--new-session", "--ro-bind", "/usr", "/usr", *links),
            *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc", "--dev", "/dev"),
            *("--tmpfs", "/tmp", *binds, "--bind", str(self.folder), str(self.folder), "--chdir", str(self.folder)),
        ]
