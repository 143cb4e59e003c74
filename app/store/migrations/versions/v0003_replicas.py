"""What replicas that share the database tell each other."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "wanted",
        sa.Column("name", sa.Text, primary_key=True, comment="of the bundles"),
        sa.Column(
            "over",
            sa.Text,
            nullable=False,
            comment="digest of the configured bundle that it was promoted over",
        ),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("previous_digest", sa.Text, comment="what a rollback goes back to"),
        sa.Column("previous_path", sa.Text),
        sa.Column("proposed_digest", sa.Text, comment="what all are to make ready"),
        sa.Column("proposed_path", sa.Text),
        sa.Column("proposed_by", sa.Text, comment="replica"),
    )
    op.create_table(
        "replicas",
        sa.Column("replica", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True, comment="of its bundle"),
        sa.Column("seen", sa.Double, nullable=False, comment="by the database's clock"),
        sa.Column("serves", sa.Text, nullable=False, comment="digest"),
        sa.Column("prepared", sa.Text, comment="digest of the proposed bundle, once it could answer at once"),
        sa.Column("fault", sa.Text, comment="why it cannot answer by what is proposed or wanted"),
    )
    op.create_table(
        "rates",
        sa.Column("name", sa.Text, primary_key=True, comment="of the key"),
        sa.Column("unit", sa.Text, primary_key=True, comment="what is counted"),
        sa.Column("left", sa.Double, nullable=False),
        sa.Column("time", sa.Double, nullable=False, comment="when that was left, by the database's clock"),
    )
    op.create_table(
        "used",
        sa.Column("name", sa.Text, primary_key=True, comment="of the key"),
        sa.Column("day", sa.BigInteger, primary_key=True, comment="since 1970, UTC"),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
