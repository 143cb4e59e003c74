"""The tables. Times are Unix times in seconds. An answer is named by its response's id and its choice's index.

verdicts   one row for each answer that was judged, with the probability with which it was drawn for an audit
contents   texts and states of an answer, where the operator keeps them; they go with age, or when forgotten
thumbs     feedback of clients, one for each answer: never a sample, since whoever sends it chose himself
labels     what reviewers said, one for each answer and reviewer

Where several replicas share the database (`candor.app.store.together`):

wanted     by which bundle all replicas answer under a name
replicas   which of them live, and by which bundle each answers
rates      what is left of each key's rate
used       the tokens of each key and day
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

wanted = Table(
    "wanted",
    metadata,
    Column("name", Text, primary_key=True, comment="of the bundles"),
    Column("over", Text, nullable=False, comment="digest of the configured bundle that it was promoted over"),
    Column("digest", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("previous_digest", Text, comment="what a rollback goes back to"),
    Column("previous_path", Text),
    Column("proposed_digest", Text, comment="what all are to make ready"),
    Column("proposed_path", Text),
    Column("proposed_by", Text, comment="replica"),
)

replicas = Table(
    "replicas",
    metadata,
    Column("replica", Text, primary_key=True),
    Column("name", Text, primary_key=True, comment="of its bundle"),
    Column("seen", Double, nullable=False, comment="by the database's clock"),
    Column("serves", Text, nullable=False, comment="digest"),
    Column("prepared", Text, comment="digest of the proposed bundle, once it could answer at once"),
    Column("fault", Text, comment="why it cannot answer by what is proposed or wanted"),
)

rates = Table(
    "rates",
    metadata,
    Column("name", Text, primary_key=True, comment="of the key"),
    Column("unit", Text, primary_key=True, comment="what is counted"),
    Column("left", Double, nullable=False),
    Column("time", Double, nullable=False, comment="when that was left, by the database's clock"),
)

used = Table(
    "used",
    metadata,
    Column("name", Text, primary_key=True, comment="of the key"),
    Column("day", BigInteger, primary_key=True, comment="since 1970, UTC"),
    Column("tokens", BigInteger, nullable=False),
)
