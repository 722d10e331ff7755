#!/usr/bin/env python3
"""Tokens: made, listed, renewed and revoked on the command line, and what the server makes of each.

    python3 test_token_management.py
    python3 test_token_management.py --url http://localhost:8001 --user alice --token T

Against a server that runs elsewhere only what HTTP shows is checked: the command line works on the server's own files.
Runs by itself; in the test suite `test_scripts.py` runs it. pytest alone finds nothing to run here.
"""

from __future__ import annotations

import json
import re
import sqlite3
import stat
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.scripts_support import HELLO, SLEEPER, Target, User, expect, expect_status, files_with, main


def works(target: Target, token: str) -> bool:
    """Whether the server takes the token at this moment."""
    return target.get("/api/jobs", User("", token)).status_code == 200


def cli(target: Target, *words: str, code: int = 0) -> str:
    """Run token_manager.py; what it printed, on both streams."""
    done = target.own_server.run("token_manager.py", *words, code=None)
    printed = done.stdout + done.stderr
    expect(done.returncode == code, f"{words}: exit code {done.returncode}, not {code}: {printed}")
    expect("Traceback" not in printed, f"{words}: {printed}")
    return printed


def listed(target: Target, user_id: str) -> list[dict[str, Any]]:
    """The user's tokens as `list --json` has them, newest first."""
    rows = [json.loads(line) for line in cli(target, "list", "--json").splitlines()]
    return [row for row in rows if row["user_id"] == user_id]


def tokens_decide_who_is_asking(target: Target) -> None:
    """A good token is taken in the header and in the config; a wrong one is 401 with a challenge."""
    expect_status(target.get("/api/jobs", target.user), 200)
    response = target.get("/api/jobs", User("", "not-a-token-of-anybody"))
    expect_status(response, 401)
    expect(response.headers["WWW-Authenticate"].startswith("Bearer"), "no challenge")
    expect_status(target.send(HELLO, target.config(target.user, token="not-a-token-of-anybody")), 401)
    target.wait(target.submit(target.user), target.user)
    by_header = target.send("pass\n", target.config(target.user, token=None), headers=target.user.bearer)
    expect_status(by_header, 200)
    target.wait(by_header.json()["job_id"], target.user)


def tokens_are_exact(target: Target) -> None:
    """A token with a character more, less or in the other case is another token."""
    token = target.user.token
    for other in (token + "x", token[:-1], token.swapcase(), f"{token[:4]} {token[4:]}"):
        expect_status(target.get("/api/jobs", User("", other)), 401)


def a_chosen_token(target: Target) -> None:
    """A token of one's choice works at once, without a restart."""
    printed = cli(target, "create", "amy", "amy_token_chosen")
    expect("amy" in printed and "expires" in printed, printed)
    expect(works(target, "amy_token_chosen"), "it does not work")
    expect("guessed" in cli(target, "create", "kim", "kim_t"), "no warning that a short token can be guessed")


def a_made_token(target: Target) -> None:
    """Left out, a strong token is made and shown once."""
    found = re.search(r"Token, shown only now: (\S+)", cli(target, "create", "ben"))
    expect(found is not None, "it is not shown")
    assert found is not None
    expect(len(found[1]) >= 32, f"it has {len(found[1])} characters only")
    expect(works(target, found[1]), "it does not work")
    expect(found[1] not in cli(target, "list"), "the list shows it")


def the_list_shows_no_token(target: Target) -> None:
    """The list has user, role, times and state of each token, never the token."""
    cli(target, "create", "cleo", "cleo_token_in_list", "--admin", "--days", "3")
    printed = cli(target, "list")
    expect("cleo" in printed, "the user is missing")
    row = listed(target, "cleo")[0]
    expect("cleo_token" not in printed + json.dumps(row), "the token is shown")
    wanted = {"user_id", "role", "created_at", "expires_at", "state", "last_used_at"}
    expect(wanted <= set(row), f"the row lacks {wanted - set(row)}")
    expect((row["role"], row["state"]) == ("admin", "active"), f"{row}")


def thirty_days_at_most(target: Target) -> None:
    """A token lives thirty days at most: more is refused with a sentence that says so."""
    for days in ("31", "0"):
        expect("30" in cli(target, "create", "dora", "dora_token", "--days", days, code=1), "the limit is not named")
    expect(not works(target, "dora_token"), "a refused token works")
    cli(target, "create", "dora", "dora_token", "--days", "30")
    rows = listed(target, "dora")
    expect(len(rows) == 1, "a refused token is there")
    life = datetime.fromisoformat(rows[0]["expires_at"][:19]) - datetime.fromisoformat(rows[0]["created_at"][:19])
    expect(life == timedelta(days=30), f"it lives {life}")
    expect(works(target, "dora_token"), "a token of thirty days does not work")


def one_active_token_per_user(target: Target) -> None:
    """A user's new token revokes the former one, at once."""
    cli(target, "create", "eli", "eli_token_one")
    expect(works(target, "eli_token_one"), "the first does not work")
    expect("revoked" in cli(target, "create", "eli", "eli_token_two"), "it is not said that the former is revoked")
    expect(not works(target, "eli_token_one"), "the former still works")
    expect(works(target, "eli_token_two"), "the new one does not work")
    states = [row["state"] for row in listed(target, "eli")]
    expect(states == ["active", "replaced"], f"{states}")


def renewing(target: Target) -> None:
    """The same token for the same user is renewed; the admin role is what the last command said."""
    cli(target, "create", "finn", "finn_token", "--days", "1")
    before = listed(target, "finn")[0]
    expect("renewed" in cli(target, "create", "finn", "finn_token", "--days", "20"), "it is not called renewed")
    after = listed(target, "finn")
    expect(len(after) == 1, f"{len(after)} tokens")
    expect(after[0]["expires_at"] > before["expires_at"], "it does not expire later")
    expect(works(target, "finn_token"), "it does not work")
    # One that was replaced is the user's own and may come back.
    cli(target, "create", "finn", "finn_token_other")
    cli(target, "create", "finn", "finn_token")
    expect(works(target, "finn_token") and not works(target, "finn_token_other"), "the wrong one works")
    me = User("finn", "finn_token")
    expect(target.get("/api/dashboard", me).json()["is_admin"] is False, "an administrator without --admin")
    cli(target, "create", "finn", "finn_token", "--admin")
    expect(target.get("/api/dashboard", me).json()["is_admin"] is True, "no administrator in spite of --admin")


def bound_for_ever(target: Target) -> None:
    """A token once used by one user never becomes another's, not even after it was revoked."""
    cli(target, "create", "gus", "gus_token_for_ever")
    expect("another user" in cli(target, "create", "hal", "gus_token_for_ever", code=1), "the reason is not said")
    cli(target, "revoke", "gus_token_for_ever")
    cli(target, "create", "hal", "gus_token_for_ever", code=1)
    expect(not listed(target, "hal"), "hal has a token")


def revoked_at_once_and_for_good(target: Target) -> None:
    """A revoked token is refused from the next request on and cannot be renewed; the user's job goes on."""
    cli(target, "create", "ida", "ida_token_revoked")
    ida = User("ida", "ida_token_revoked")
    job_id = target.submit(ida, SLEEPER)
    target.wait(job_id, ida, ("running",))
    expect("ida" in cli(target, "revoke", "ida_token_revoked"), "the user is not named")
    response = target.get(f"/api/status/{job_id}", ida)
    expect_status(response, 401)
    expect("revoked" in response.json()["detail"], response.text)
    expect_status(target.send(HELLO, target.config(ida)), 401)
    cli(target, "revoke", "ida_token_revoked", code=1)
    cli(target, "create", "ida", "ida_token_revoked", code=1)
    state = listed(target, "ida")[0]["state"]
    expect(state == "revoked", f"it is listed as {state}")
    expect(target.status(job_id, target.administrator)["status"] == "running", "the job did not go on")
    # With a new token the user has the job again.
    cli(target, "create", "ida", "ida_token_new")
    target.cancel(job_id, User("ida", "ida_token_new"))
    cli(target, "revoke", "--user", "ida")
    expect(not works(target, "ida_token_new"), "revoked by user, it still works")


def exit_codes(target: Target) -> None:
    """The command line ends with 0 for done, 1 for refused and 2 for wrong usage."""
    cli(target, "create", "jan", "jan_token_exit")
    refused = (("revoke", "no_such_token"), ("create", "../jan", "jan_token_two"), ("create", "jan", "a b c d"))
    for words in refused:
        cli(target, *words, code=1)
    for usage in (("make", "jan"), ("create",), ("create", "jan", "jan_token", "--days", "many")):
        expect("usage:" in cli(target, *usage, code=2), f"{usage}: no usage")
    expect(works(target, "jan_token_exit"), "a refused command changed something")


def only_digests_are_kept(target: Target) -> None:
    """The database holds a digest of 32 bytes for each token, and no file holds a token."""
    folder = target.own_server.folder
    cli(target, "create", "lea", "lea_token_secret")
    expect(works(target, "lea_token_secret"), "it does not work")
    database = sqlite3.connect(f"file:{folder / 'database.db'}?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT user_id, digest FROM tokens").fetchall()
    finally:
        database.close()
    expect("lea" in {row[0] for row in rows}, "the token is not in the database")
    expect(all(isinstance(digest, bytes) and len(digest) == 32 for _, digest in rows), "not all are digests")
    for token in ("lea_token_secret", target.user.token):
        expect(not files_with(folder, token), f"{files_with(folder, token)} hold a token")


def files_are_private(target: Target) -> None:
    """The key and the database can be read by their owner only."""
    folder = target.own_server.folder
    names = ["token.key", *(path.name for path in folder.glob("database.db*"))]
    expect("database.db" in names, "there is no database")
    for name in names:
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        expect(mode == 0o600, f"{name} has mode {mode:o}")
    expect(len((folder / "token.key").read_bytes().strip()) >= 32, "the key is short")


CHECKS = (tokens_decide_who_is_asking, tokens_are_exact)
ALONE = (
    a_chosen_token,
    a_made_token,
    the_list_shows_no_token,
    thirty_days_at_most,
    one_active_token_per_user,
    renewing,
    bound_for_ever,
    revoked_at_once_and_for_good,
    exit_codes,
    only_digests_are_kept,
    files_are_private,
)

if __name__ == "__main__":
    sys.exit(main(__doc__, CHECKS, alone=ALONE))
