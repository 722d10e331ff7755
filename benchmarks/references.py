"""What the least of each would be: FastAPI saying hello, FastAPI taking a submission into one synced row, sendfile.

    python3 -m benchmarks.references PORT FOLDER        the two endpoints, on uvicorn as the server runs it
    python3 -m benchmarks.references PORT FILE          every request is answered with that file by sendfile

Imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile

PROJECT = Path(__file__).resolve().parent.parent
TABLE = "CREATE TABLE jobs (id INTEGER PRIMARY KEY, job_id TEXT, user_id TEXT, config TEXT, code BLOB)"


def serve_endpoints(port: int, folder: Path) -> None:
    """For ever."""
    app = FastAPI()
    connection = sqlite3.connect(folder / "reference.db", isolation_level=None, check_same_thread=False)
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", TABLE):
        connection.execute(statement)

    @app.get("/hello")
    async def hello() -> dict[str, str]:
        return {"message": "Hello World"}

    @app.post("/api/submit")
    async def submit(code: UploadFile, config_file: UploadFile) -> dict[str, str]:
        config: dict[str, Any] = json.loads(await config_file.read())
        job_id = str(uuid.uuid4())
        connection.execute(
            "INSERT INTO jobs (job_id, user_id, config, code) VALUES (?, ?, ?, ?)",
            (job_id, config["user_id"], json.dumps(config), await code.read()),
        )
        return {"job_id": job_id, "status": "pending"}

    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="warning")


def serve_file(port: int, path: Path) -> None:
    """For ever, one connection after the other."""
    with socket.create_server(("127.0.0.1", port)) as listening, open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            connection, _ = listening.accept()
            with connection:
                if b"\r\n\r\n" not in connection.recv(1 << 16):
                    continue  # somebody only looked whether we are there
                connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
                sent = 0
                while sent < size:
                    sent += os.sendfile(connection.fileno(), file.fileno(), sent, size - sent)


@contextlib.contextmanager
def reference(where: Path) -> Iterator[tuple[int, int]]:
    """(port, pid) of such a server in a process of its own: the endpoints for a folder, sendfile for a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    # A session of its own, as the measured server has: some kernels share processors out by session.
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.references", str(port), str(where)], cwd=PROJECT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the reference server does not come up") from None
                time.sleep(0.05)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    place = Path(sys.argv[2])
    (serve_endpoints if place.is_dir() else serve_file)(int(sys.argv[1]), place)
