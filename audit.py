"""Who did what that others may ask about later: tokens made and revoked, nodes drained, other people's jobs cancelled,
refused logins. Rows are only ever added; the database itself refuses to change or delete one.

May import `clock`, `models`, `database`.
"""

from __future__ import annotations

import getpass
from typing import Any

from sqlalchemy import Row, insert, select

import clock
from database import Database, Transaction
from models import audit_log

TOKEN_CREATED = "token_created"  # noqa: S105  # the name of an action
TOKEN_REVOKED = "token_revoked"  # noqa: S105  # the name of an action
NODE_DRAINED = "node_drained"
NODE_RESUMED = "node_resumed"
JOB_CANCELLED = "job_cancelled"
LOGIN_REFUSED = "login_refused"
DETAIL_MOST = 500


def shell_actor() -> str:
    """How someone at a shell of the server is named."""
    return f"shell:{getpass.getuser()}"


def record(
    transaction: Transaction,
    actor: str,
    action: str,
    subject: str,
    *,
    detail: str | None = None,
    address: str | None = None,
    request_id: str | None = None,
) -> None:
    """Add a row in the same transaction as what it tells of."""
    transaction.connection.execute(
        insert(audit_log),
        {
            "at": clock.now_us(),
            "actor": actor,
            "action": action,
            "subject": subject,
            "detail": detail[:DETAIL_MOST] if detail is not None else None,
            "address": address,
            "request_id": request_id,
        },
    )


def page(database: Database, *, before_id: int | None, limit: int) -> list[Row[Any]]:
    """The newest rows with an id below `before_id`, newest first."""
    statement = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit)
    if before_id is not None:
        statement = statement.where(audit_log.c.id < before_id)
    with database.reading() as connection:
        return list(connection.execute(statement))


def entry(row: Row[Any]) -> dict[str, Any]:
    """A row as it is shown."""
    return {
        "time": clock.iso(row.at),
        "actor": row.actor,
        "action": row.action,
        "subject": row.subject,
        "detail": row.detail,
        "address": row.address,
        "request_id": row.request_id,
    }
