"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "verdicts",
        sa.Column("number", number, primary_key=True, autoincrement=True, comment="in the order of writing"),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("choice", sa.BigInteger, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column(
            "kind",
            sa.Text,
            nullable=False,
            comment="answer, escalated (another model answered), or pair (the client brought it)",
        ),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("bundle", sa.Text, nullable=False, comment="digest"),
        sa.Column("rule", sa.Text, nullable=False, comment="two-gates or sdm"),
        sa.Column("estimator", sa.Text, comment="of the region's certificate: lower or plain"),
        sa.Column("alpha", sa.Double, nullable=False),
        sa.Column("region", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, comment="null: let through"),
        sa.Column("abstained", sa.Boolean, nullable=False),
        sa.Column("calibrated", sa.Boolean, nullable=False),
        sa.Column("covered", sa.Boolean, nullable=False, comment="by a certificate"),
        sa.Column("accuracy", sa.Double, comment="certified"),
        sa.Column("confidence", sa.Double, comment="of the certificate"),
        sa.Column("probability", sa.Double),
        sa.Column("score", sa.Double, comment="S"),
        sa.Column("prompt_p_value", sa.Double, comment="of the prompt's gate"),
        sa.Column("prediction", sa.Integer),
        sa.Column("sdm_probability", sa.Double, comment="SDM(z') of the prediction"),
        sa.Column("similarity", sa.Integer, comment="q"),
        sa.Column("rescaled_similarity", sa.Double, comment="q'"),
        sa.Column("distance_quantile", sa.Double, comment="d"),
        sa.Column("caller", sa.Text, comment="name of the key; null: forgotten"),
        sa.Column("audit_probability", sa.Double, nullable=False, comment="pi, with which it was drawn"),
        sa.Column("audit_least", sa.Double, nullable=False, comment="least pi that it could have had"),
        sa.Column("drawn", sa.Boolean, nullable=False),
        sa.UniqueConstraint("id", "choice", name="one_verdict"),
        sqlite_autoincrement=True,
    )
    op.create_index("drawn_verdicts", "verdicts", ["drawn", "covered", "number"])
    op.create_table(
        "contents",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("choice", sa.BigInteger, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("conversation", sa.Text, comment="JSON: turns as the client sent them, or a plain prompt"),
        sa.Column("answer", sa.Text),
        sa.Column("h", sa.LargeBinary, comment="(D,) float32, little-endian"),
        sa.Column("prompt_states", sa.LargeBinary, comment="(P,) float32, little-endian"),
    )
    op.create_index("ix_contents_time", "contents", ["time"])
    op.create_table(
        "thumbs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("choice", sa.BigInteger, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("correct", sa.Boolean, nullable=False),
        sa.Column("comment", sa.Text),
        sa.Column("caller", sa.Text, nullable=False),
    )
    op.create_table(
        "labels",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("choice", sa.BigInteger, primary_key=True),
        sa.Column("reviewer", sa.Text, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("correct", sa.Boolean, comment="null: the reviewer cannot tell"),
        sa.Column("comment", sa.Text),
        sa.Column("answer", sa.Text, comment="what the reviewer answers in its place"),
    )
