"""The audit log: what it holds, who reads it, and that it cannot be changed."""

from __future__ import annotations

import json
import sqlite3

import pytest
import requests

from tests.server import Server, wait_until


def test_the_log_tells_who_did_what_and_only_admins_read_it(server: Server) -> None:
    server.token("auditor", admin=True)
    job_id = server.submit("victim", "import time; time.sleep(30)")
    assert server.cancel(job_id, "auditor").status_code == 200
    for verb in ("drain", "resume"):
        url = f"{server.url}/api/admin/nodes/local-8/{verb}"
        assert requests.post(url, headers=server.bearer("auditor"), timeout=10).status_code == 200
    server.run("token_manager.py", "create", "leaver", "a_token_of_leaver")
    server.run("token_manager.py", "revoke", "a_token_of_leaver")

    page = server.get("/api/admin/audit?limit=200", "auditor").json()
    found = {(entry["actor"].split(":")[0], entry["action"], entry["subject"]) for entry in page["entries"]}
    assert {
        ("admin", "job_cancelled", job_id),
        ("admin", "node_drained", "local-8"),
        ("admin", "node_resumed", "local-8"),
        ("shell", "token_created", "leaver"),
        ("shell", "token_revoked", "leaver"),
    } <= found
    assert "a_token_of_leaver" not in json.dumps(page)
    times = [entry["time"] for entry in page["entries"]]
    assert times == sorted(times, reverse=True)

    assert server.get("/api/admin/audit", "victim").status_code == 403
    assert server.get("/api/admin/audit").status_code == 401
    lines = server.run("token_manager.py", "audit", "--json", "--limit", "3").stdout.splitlines()
    assert json.loads(lines[0]) == page["entries"][0]
    assert "node_drained" in server.run("token_manager.py", "audit").stdout


def test_own_jobs_cancelled_are_nobody_elses_business(server: Server) -> None:
    server.token("auditor", admin=True)
    job_id = server.submit("auditor", "import time; time.sleep(30)")
    server.cancel(job_id, "auditor")
    entries = server.get("/api/admin/audit?limit=200", "auditor").json()["entries"]
    assert job_id not in {entry["subject"] for entry in entries}


def test_pages_of_the_log_hold_each_entry_once(server: Server) -> None:
    server.token("auditor", admin=True)
    for number in range(5):
        server.token(f"paged{number}")
    seen, cursor = [], ""
    while True:
        page = server.get(f"/api/admin/audit?limit=2{cursor}", "auditor").json()
        seen += page["entries"]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    whole = server.get("/api/admin/audit?limit=500", "auditor").json()["entries"]
    assert seen == whole


def test_guessing_is_told_in_few_lines() -> None:
    with Server({"NUM_GPU_NODES": "1", "LOGIN_FAILURES_PER_MINUTE": "10"}) as server:
        server.token("auditor", admin=True)
        server.get("/api/jobs", "auditor")  # from here the token is known to work
        for number in range(60):
            server.get("/api/jobs", headers={"Authorization": f"Bearer guess-{number}"})

        def refusals() -> list[dict[str, str]]:
            entries = server.get("/api/admin/audit", "auditor").json()["entries"]
            return [entry for entry in entries if entry["action"] == "login_refused"]

        found = wait_until(refusals)
        assert 1 <= len(found) <= 4
        assert found[0]["address"] == "127.0.0.1"
        assert "guess-" not in json.dumps(found)


def test_the_database_refuses_to_change_or_delete_an_entry(server: Server) -> None:
    server.token("someone")
    connection = sqlite3.connect(server.folder / "database.db", timeout=10)
    for statement in ("UPDATE audit_log SET actor = 'nobody'", "DELETE FROM audit_log"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()
