"""The only code that runs on a node, as bytes to be copied there. The server never imports `agent` itself.

`agent.py` uses the standard library only, runs on Python 3.8 and newer, and stays one file.
May import nothing of the project.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

AGENT_FILE = Path(__file__).resolve().parent / "agent.py"
AGENT_SOURCE = AGENT_FILE.read_bytes()
AGENT_VERSION = hashlib.sha256(AGENT_SOURCE).hexdigest()[:16]
PROTOCOL = 1
