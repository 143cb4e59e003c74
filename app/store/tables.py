"""The tables. Times are Unix times in seconds. An answer is named by its response's id and its choice's index.

verdicts   one row for each answer that was judged, with the probability with which it was drawn for an audit
contents   texts and states of an answer, where the operator keeps them; they go with age, or when forgotten
thumbs     feedback of clients, one for each answer: never a sample, since whoever sends it chose himself
labels     what reviewers said, one for each answer and reviewer
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

DISPUTES = "disputes"
"""Entries that flag a verdict; no table of their own."""

_Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts rows up in INTEGER alone

verdicts = Table(
    "verdicts",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True, comment="in the order of writing"),
    Column("id", Text, nullable=False),
    Column("choice", BigInteger, nullable=False),
    Column("time", Double, nullable=False),
    Column(
        "kind",
        Text,
        nullable=False,
        comment="answer, escalated (another model answered), or pair (the client brought it)",
    ),
    Column("model", Text, nullable=False),
    Column("bundle", Text, nullable=False, comment="digest"),
    Column("rule", Text, nullable=False, comment="two-gates or sdm"),
    Column("estimator", Text, comment="of the region's certificate: lower or plain"),
    Column("alpha", Double, nullable=False),
    Column("region", Text, nullable=False),
    Column("reason", Text, comment="null: let through"),
    Column("abstained", Boolean, nullable=False),
    Column("calibrated", Boolean, nullable=False),
    Column("covered", Boolean, nullable=False, comment="by a certificate"),
    Column("accuracy", Double, comment="certified"),
    Column("confidence", Double, comment="of the certificate"),
    Column("probability", Double),
    Column("score", Double, comment="S"),
    Column("prompt_p_value", Double, comment="of the prompt's gate"),
    Column("prediction", Integer),
    Column("sdm_probability", Double, comment="SDM(z') of the prediction"),
    Column("similarity", Integer, comment="q"),
    Column("rescaled_similarity", Double, comment="q'"),
    Column("distance_quantile", Double, comment="d"),
    Column("caller", Text, comment="name of the key; null: forgotten"),
    Column("audit_probability", Double, nullable=False, comment="pi, with which it was drawn"),
    Column("audit_least", Double, nullable=False, comment="least pi that it could have had"),
    Column("drawn", Boolean, nullable=False),
    Column("disputed_by", Text, comment="digest of a shadowing bundle that decides otherwise"),
    UniqueConstraint("id", "choice", name="one_verdict"),
    Index("drawn_verdicts", "drawn", "covered", "number"),
    sqlite_autoincrement=True,
)

contents = Table(
    "contents",
    metadata,
    Column("id", Text, primary_key=True),
    Column("choice", BigInteger, primary_key=True),
    Column("time", Double, nullable=False, index=True),
    Column("conversation", Text, comment="JSON: turns as the client sent them, or a plain prompt"),
    Column("answer", Text),
    Column("h", LargeBinary, comment="(D,) float32, little-endian"),
    Column("prompt_states", LargeBinary, comment="(P,) float32, little-endian"),
)

thumbs = Table(
    "thumbs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("choice", BigInteger, primary_key=True),
    Column("time", Double, nullable=False),
    Column("correct", Boolean, nullable=False),
    Column("comment", Text),
    Column("caller", Text, nullable=False),
)

labels = Table(
    "labels",
    metadata,
    Column("id", Text, primary_key=True),
    Column("choice", BigInteger, primary_key=True),
    Column("reviewer", Text, primary_key=True),
    Column("time", Double, nullable=False),
    Column("correct", Boolean, comment="null: the reviewer cannot tell"),
    Column("comment", Text),
    Column("answer", Text, comment="what the reviewer answers in its place"),
)
