"""A flag on verdicts that a shadowing bundle decides otherwise on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "digest of a shadowing bundle that decides otherwise"
    op.add_column("verdicts", sa.Column("disputed_by", sa.Text, comment=comment))
