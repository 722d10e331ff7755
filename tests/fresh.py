"""A fresh copy of this project in a folder of its own, as someone who has just cloned it has it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import TracebackType

from tests.fleet import Process, processes, send
from tests.server import PROJECT, clean_environment, free_port, wait_until

# What git would not list, for a tree without git.
_LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "__pycache__", ".*_cache", ".env", "token.key", ".quickstart_token", "*.db*", ".server.pid"),
    *("server.log", "[0-9a-f]*-*-*-*-*", "results", ".nodes"),
)


def copy_project(target: Path) -> None:
    """Every file that is tracked by git, or would be."""
    git = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-coz", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        check=False,
    )
    if git.returncode != 0:
        shutil.copytree(PROJECT, target, ignore=_LEFT_OUT, dirs_exist_ok=True)
        return
    for name in filter(None, git.stdout.decode().split("\0")):
        source = PROJECT / name
        if source.is_file():  # another may have been deleted a moment ago
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(source, target / name)


class FreshCopy:
    """A copy with a port of its own. `close` ends what was left running in it and removes it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-job-server-copy-")
        self.folder = Path(self._folder.name).resolve()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        copy_project(self.folder)

    def __enter__(self) -> FreshCopy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (self.folder / "server.log").exists():
            print(f"--- server.log\n{(self.folder / 'server.log').read_text(errors='replace')[-4000:]}")
        self.close()

    def make_environment(self) -> None:
        """A `.venv` that finds this interpreter's packages: installing the pins into it needs no network."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder / ".venv")], check=True)
        (packages,) = (self.folder / ".venv" / "lib").glob("python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def environment(self, **extra: str) -> dict[str, str]:
        """For commands run in the copy: this interpreter first on PATH, and no setting of another server."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return clean_environment({"PATH": path, "SERVER_HOST": "127.0.0.1", "MIN_FREE_DISK": "0", **extra})

    def run(self, *argv: str, timeout: float = 100, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy; `extra` are environment variables."""
        return subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment(**extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def left_running(self) -> list[Process]:
        """Processes that were started from the copy: its path is in their command line, or they stand in it."""
        found = []
        for process in processes():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                here = os.readlink(f"/proc/{process.pid}/cwd")
                if str(self.folder).encode() in line or Path(here).is_relative_to(self.folder):
                    found.append(process)
        return found

    def close(self) -> None:
        """End what is left, then remove the folder."""

        def gone() -> bool:
            left = self.left_running()
            for process in left:
                send(process, signal.SIGKILL)
            return not left

        wait_until(gone, 30, f"everything in {self.folder} to end")
        self._folder.cleanup()
