#!/usr/bin/env python3
"""Who may do what: nobody, the owner of a job, another user, an administrator.

    python3 test_authorization.py
    python3 test_authorization.py --url http://localhost:8001 --user alice --token T --admin-token T2

Runs by itself; in the test suite `test_scripts.py` runs it. pytest alone finds nothing to run here.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.scripts_support import HELLO, SLEEPER, Target, User, expect, expect_status, main

READINGS = ("status", "results", "logs", "events")
BOARD = ("/api/whoami", "/api/queue", "/api/history", "/api/stream")
ADMINS = ("/api/admin/audit", "/api/admin/users")
NOBODY = User("nobody", "not-a-token-of-anybody")


def nobody_reads(target: Target) -> None:
    """Without a token everything about a job is 401."""
    job_id = target.submit(target.user)
    target.wait(job_id, target.user)
    for what in READINGS:
        expect_status(target.get(f"/api/{what}/{job_id}"), 401)
    response = target.post(f"/api/cancel/{job_id}")
    expect_status(response, 401)
    expect(response.headers["WWW-Authenticate"].startswith("Bearer"), "no challenge")
    for path in (*BOARD, "/api/jobs", "/api/dashboard", *ADMINS):
        expect_status(target.get(path), 401)
    for change in ("drain", "resume"):
        expect_status(target.post(f"/api/admin/nodes/local-1/{change}"), 401)


def a_wrong_token_is_refused(target: Target) -> None:
    """With a wrong token everything is 401, submitting as well."""
    for path in (*BOARD, "/api/status/x", "/api/jobs", "/api/dashboard", "/api/nodes", *ADMINS):
        expect_status(target.get(path, NOBODY), 401)
    expect_status(target.send(HELLO, target.config(target.user, token=NOBODY.token)), 401)
    expect_status(target.send(HELLO, target.config(target.user, token=None), headers=NOBODY.bearer), 401)


def the_owner_may(target: Target) -> None:
    """The owner reads everything about a job and cancels it."""
    job_id = target.submit(target.user, SLEEPER)
    target.wait(job_id, target.user, ("running",))
    target.cancel(job_id, target.user)
    for what in READINGS:
        expect_status(target.get(f"/api/{what}/{job_id}", target.user), 200)


def others_may_not(target: Target) -> None:
    """Another user's job is 403, for reading and for cancelling, and goes on."""
    admin = target.administrator
    job_id = target.submit(admin, SLEEPER)
    try:
        target.wait(job_id, admin, ("running",))
        for what in READINGS:
            response = target.get(f"/api/{what}/{job_id}", target.user)
            expect_status(response, 403)
            expect(admin.user_id not in response.text, f"the refusal names the owner: {response.text}")
        expect_status(target.post(f"/api/cancel/{job_id}", target.user), 403)
        expect(target.status(job_id, admin)["status"] == "running", "the job did not go on")
    finally:
        target.cancel(job_id, admin)


def others_are_not_listed(target: Target) -> None:
    """The list of jobs and the dashboard hold own jobs only; asking for another's is 403."""
    admin = target.administrator
    job_id = target.submit(admin)
    target.wait(job_id, admin)
    expect(job_id not in target.get("/api/jobs?limit=500", target.user).text, "another's job is listed")
    expect_status(target.get(f"/api/jobs?user_id={admin.user_id}", target.user), 403)
    for path in ("/api/queue?limit=500", "/api/history"):
        text = target.get(path, target.user).text
        expect(job_id not in text and admin.user_id not in text, f"another's job is in {path}")
    dashboard = target.get("/api/dashboard", target.user)
    expect(job_id not in dashboard.text, "another's job is in the dashboard")
    expect(dashboard.json()["user_statistics"] is None, "a user sees the statistics of users")
    expect(dashboard.json()["is_admin"] is False, "the user of these checks is an administrator")


def nobody_submits_for_others(target: Target) -> None:
    """The token of one user submits for no other, not even an administrator's."""
    admin = target.administrator
    expect_status(target.send(HELLO, target.config(target.user, user_id=admin.user_id)), 403)
    expect_status(target.send(HELLO, target.config(admin, user_id=target.user.user_id)), 403)
    disagreeing = target.send(HELLO, target.config(target.user), headers=admin.bearer)
    expect_status(disagreeing, 400)


def an_admin_may(target: Target) -> None:
    """An administrator reads and cancels everybody's jobs."""
    admin = target.administrator
    job_id = target.submit(target.user, SLEEPER)
    target.wait(job_id, target.user, ("running",))
    for what in ("status", "logs", "events"):
        expect_status(target.get(f"/api/{what}/{job_id}", admin), 200)
    expect(job_id in target.get("/api/jobs?limit=500", admin).text, "the job is not listed")
    by_user = target.get(f"/api/jobs?user_id={target.user.user_id}&limit=1", admin).json()["jobs"]
    expect(by_user[0]["job_id"] == job_id, "the filter by user does not find it")
    target.cancel(job_id, admin)
    events = target.get(f"/api/events/{job_id}", target.user).json()["events"]
    expect(events[-1]["actor"] == "admin", f"the user is told that the last event is by {events[-1]['actor']}")
    events = target.get(f"/api/events/{job_id}", admin).json()["events"]
    expect(events[-1]["actor"] == f"admin:{admin.user_id}", f"the last event is by {events[-1]['actor']}")
    expect_status(target.get(f"/api/results/{job_id}", admin), 200)
    expect(target.get("/api/dashboard", admin).json()["is_admin"] is True, "not an administrator")
    for path in ADMINS:
        expect_status(target.get(path, admin), 200)


def only_admins_change_nodes(target: Target) -> None:
    """A user drains and resumes no node and reads neither the audit log nor who else there is."""
    node_id = target.get("/api/nodes").json()["nodes"][0]["node_id"]
    for change in ("drain", "resume"):
        expect_status(target.post(f"/api/admin/nodes/{node_id}/{change}", target.user), 403)
    for path in ADMINS:
        expect_status(target.get(path, target.user), 403)


def the_public_sees_no_names(target: Target) -> None:
    """The public list of nodes holds no job, user or address, an administrator's does."""
    admin = target.administrator
    job_id = target.submit(target.user, SLEEPER)
    try:
        target.wait(job_id, target.user, ("running",))
        for viewer in (None, target.user):
            text = target.get("/api/nodes", viewer).text
            expect(job_id not in text and target.user.user_id not in text, "the public sees whose job runs")
            expect('"address"' not in text, "the public sees addresses")
        text = target.get("/api/nodes", admin).text
        expect(job_id in text and '"address"' in text, "the administrator does not see it")
    finally:
        target.cancel(job_id, target.user)


def unknown_jobs(target: Target) -> None:
    """An unknown job is 404 for users and administrators alike."""
    for user in (target.user, target.administrator):
        for what in READINGS:
            expect_status(target.get(f"/api/{what}/no-such-job", user), 404)
        expect_status(target.post("/api/cancel/no-such-job", user), 404)


CHECKS = (
    nobody_reads,
    a_wrong_token_is_refused,
    the_owner_may,
    others_may_not,
    others_are_not_listed,
    nobody_submits_for_others,
    an_admin_may,
    only_admins_change_nodes,
    the_public_sees_no_names,
    unknown_jobs,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, CHECKS, admin=True))
