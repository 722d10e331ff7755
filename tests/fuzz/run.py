"""`python3 -m tests.fuzz.run TARGET [libFuzzer options]`: one target with atheris, until it fails or is stopped.

    python3 -m venv /tmp/fuzzing && /tmp/fuzzing/bin/pip install -r requirements.txt atheris
    /tmp/fuzzing/bin/python -m tests.fuzz.run config -max_total_time=300

atheris is no dependency of the project. What made the target fail is written to a file `crash-…` in this folder; run
the same command with that file's name to see it again, and add it to the target's SEEDS when it is mended.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    """The command."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print("atheris is not installed here; it is needed for this alone: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["submission", "executor", "results", "node_agent", "yaml", "json"]):
        from tests.fuzz.targets import SEEDS, TARGETS
    if len(argv) < 2 or argv[1] not in TARGETS:
        print(f"{__doc__}\nTargets: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    name = argv[1]
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as corpus:
        for number, seed in enumerate(SEEDS[name]):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        again = any(Path(word).is_file() for word in argv[2:])
        atheris.Setup([argv[0], *argv[2:], *([] if again else [corpus])], TARGETS[name])
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
