"""Where the server meets the outside: HTTPS without a proxy, and whose X-Forwarded-For is believed."""

from __future__ import annotations

import shutil
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
