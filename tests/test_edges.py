"""Where the server meets the outside: HTTPS without a proxy, and whose X-Forwarded-For is believed."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import requests

from tests.server import Server, wait_until


def refusal_addresses(server: Server, forwarded: str) -> set[str]:
    """Which addresses the audit log names after a refused token that came with X-Forwarded-For."""
    server.token("auditor", admin=True)
    headers = {"Authorization": "Bearer nonsense", "X-Forwarded-For": forwarded}
    assert server.get("/api/jobs", headers=headers).status_code == 401

    def found() -> set[str]:
        entries = server.get("/api/admin/audit", "auditor").json()["entries"]
        return {entry["address"] for entry in entries if entry["action"] == "login_refused"}

    addresses: set[str] = wait_until(found)
    return addresses


def test_nobodys_forwarded_address_is_believed_by_default() -> None:
    with Server({"NUM_GPU_NODES": "1"}) as server:
        assert refusal_addresses(server, "203.0.113.7") == {"127.0.0.1"}


def test_a_trusted_proxys_forwarded_address_is_believed() -> None:
    with Server({"NUM_GPU_NODES": "1", "TRUSTED_PROXIES": '["127.0.0.0/8"]'}) as server:
        assert refusal_addresses(server, "203.0.113.7") == {"203.0.113.7"}


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_https_is_served_with_the_files_of_the_settings(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server = Server({"NUM_GPU_NODES": "1", "TLS_CERT_FILE": str(cert), "TLS_KEY_FILE": str(key)})
    server.verify = str(cert)
    server.url = server.url.replace("http:", "https:")
    with server:
        assert server.get("/healthz").json() == {"status": "ok"}
        with pytest.raises(requests.ConnectionError):
            requests.get(server.url.replace("https:", "http:") + "/healthz", timeout=5)


def test_half_of_the_tls_settings_stops_the_start(certificate: tuple[Path, Path]) -> None:
    server = Server({"TLS_CERT_FILE": str(certificate[0])})
    assert "TLS_CERT_FILE and TLS_KEY_FILE" in server.run("main.py", code=1).stderr
    server.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 5_000_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(20_000)) + b"\r\n",
        b"GET /healthz?" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /api/submit HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Trailer: "
        + b"a" * 5_000_000,
    ],
    ids=["one long header", "many headers", "a long address", "a trailer without end"],
)
def test_a_head_beyond_its_limit_is_refused_while_it_comes_in(server: Server, head: bytes) -> None:
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        try:
            client.sendall(head)
            while data := client.recv(1 << 16):
                answer += data
        except ConnectionError:  # closed while this side still sent
            pass
    if answer:
        # A request that was refused for its body before may have had that answer first.
        assert b"HTTP/1.1 431 " in answer or answer.startswith(b"HTTP/1.1 4")
    assert server.get("/healthz").status_code == 200


def test_a_head_within_its_limit_is_taken(server: Server) -> None:
    assert server.get("/healthz", headers={f"X-{number}": "a" * 5_000 for number in range(12)}).status_code == 200
    assert server.get("/healthz", headers={"X-Long": "a" * 66_000}).status_code == 431
