"""Alembic's environment: the connection is given by `database.Database`, so an upgrade runs under its locks."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

import models

connection: Connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=models.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
