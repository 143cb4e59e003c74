"""`candor recalibrate`: the next bundle, from labels in the store. It starts no model."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from candor.app.store.records import Row
    from candor.calibration.generate import Labelled
    from candor.calibration.renew import Audited
    from candor.model_store.bundle import Bundle


def recalibrate(
    store: Annotated[
        str, typer.Option("--from", envvar="CANDOR_STORE", help="The store: SQLite file or PostgreSQL URL.")
    ],
    bundle: Annotated[Path, typer.Option(help="The bundle that judged the labelled answers.")],
    out: Annotated[Path, typer.Option(help="Directory for the new bundle; a free path.")],
    also: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another bundle of the same model and policy whose answers count too. May be repeated."
        ),
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="Only answers given from then on, UTC.")] = None,
    until: Annotated[
        datetime | None,
        typer.Option(help="Only answers given until then, UTC; by default until the last labelled audit."),
    ] = None,
    certify_share: Annotated[
        float, typer.Option(min=0.1, max=0.9, help="Share of the audits that certify; the others fit.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the lots that deal audits to their parts.")] = 0,
) -> None:
    """Make the next bundle from audited answers and their labels: exemplars added, gates and score fitted anew,
    certified on audits that nothing else was done with.

    Each run is a test of its own. Running it again on the same audits until a certificate comes makes that
    certificate worth less than it says.
    """
    from candor.app.commands.store import opened
    from candor.app.store import reading
    from candor.calibration.errors import CalibrationError
    from candor.calibration.renew import renew
    from candor.calibration.run import require_free
    from candor.model_store.bundle import load_bundle
    from candor.model_store.errors import BundleError
    from candor.model_store.store import publish

    try:
        require_free(out)
        old = load_bundle(bundle)
        judges = [old, *(require_same(old, load_bundle(path)) for path in also or ())]
        digests = [one.digest for one in judges]
        with opened(store) as database:
            rows = database.read(lambda connection: list(reading.usable(connection, digests)))
            counts = database.read(reading.labelled_by_bundle)
        audits, others = sorted_out(old, rows, counts, digests, _seconds(since), _seconds(until))
        made = renew(old, audits, others, certify_share=certify_share, seed=seed)
        digest = publish(out, made.manifest, made.estimator, made.exemplars, made.report, made.rule)
    except (CalibrationError, BundleError, OSError) as error:
        typer.echo(f"candor: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(made.said)
    typer.echo(f"{out}: {digest}. Let it shadow (`candor serve --shadow {out}`), then `candor promote`")


def require_same(old: Bundle, other: Bundle) -> Bundle:
    """Returns `other`. Raises CalibrationError unless it judged answers of the same model under the same policy."""
    from candor.calibration.errors import CalibrationError

    one, two = old.manifest, other.manifest
    if (one.model, one.adapter, one.representation) != (two.model, two.adapter, two.representation):
        raise CalibrationError(
            f"the bundle {other.digest[:12]} is of another model than {old.digest[:12]}: states of their answers "
            "cannot be compared"
        )
    if one.policy != two.policy:
        raise CalibrationError(
            f"the bundle {other.digest[:12]} has another policy than {old.digest[:12]}: answers that were made "
            "differently cannot be certified together"
        )
    return other


def sorted_out(
    old: Bundle,
    rows: Sequence[Row],
    labelled: dict[str, int],
    judges: Sequence[str],
    since: float | None = None,
    until: float | None = None,
) -> tuple[list[Audited], list[Labelled]]:
    """Returns the fresh audits, and the other labelled answers, of what `reading.usable` gives.

    labelled: answers with a label by the digest of their bundle. judges: digests that were asked for.
    Raises CalibrationError for rows that no bundle can be made from.
    """
    from candor.calibration.errors import CalibrationError
    from candor.calibration.renew import Audited

    if old.policy.resample > 1:
        raise CalibrationError(
            "the policy resamples, and the store keeps only the answer that was sent: calibrate anew from records"
        )
    if not any(labelled.get(digest) for digest in judges):
        elsewhere = ", ".join(f"{count} of {digest[:12]}" for digest, count in labelled.items()) or "none"
        raise CalibrationError(
            f"the store has no labelled answer that the bundle {old.digest[:12]} judged; it has {elsewhere}. Answers "
            "of another model are no use; those of another bundle for this model count with --also"
        )
    within = [
        one for one in rows if (since or 0.0) <= one["time"] <= (until or float("inf")) and one["calibrated"]
    ]
    kept = [one for one in within if one["h"] is not None or one["prompt_states"] is not None]
    if not any(one["correct"] is not None for one in kept):
        said = sum(one["correct"] is not None for one in within)
        raise CalibrationError(
            f"of {said} labelled answers within that time the states of none are kept: serve with "
            "CANDOR_KEEP_STATES=drawn (and CANDOR_KEEP_TEXTS=drawn, for exemplars), and label within "
            "CANDOR_KEEP_DAYS"
        )
    _require_widths(old, kept)
    made = datetime.fromisoformat(old.manifest.created).timestamp()
    drawn = [one for one in kept if _is_audit(one) and one["time"] > made]
    last = max((one["time"] for one in drawn if one["correct"] is not None), default=0.0)
    fresh = [one for one in drawn if until is not None or one["time"] <= last]
    known, names = {id(one) for one in fresh}, {one.id for one in old.exemplars}
    others = [one for one in kept if id(one) not in known and one["correct"] is not None]
    audits = [
        Audited(
            _labelled(old, one), one["audit_probability"], one["audit_least"], one["time"], _is_unwritten(one)
        )
        for one in fresh
    ]
    return audits, [one for one in (_labelled(old, row) for row in others) if one.id not in names]


def _is_audit(row: Row) -> bool:
    return bool(
        row["drawn"] and row["kind"] == "answer" and row["choice"] == 0 and row["audit_probability"] > 0
    )


def _is_unwritten(row: Row) -> bool:
    """Whether its prompt was refused before it was answered; an answer whose states were lost says so."""
    return row["h"] is None and row["reason"] != "scoring_unavailable"


def _require_widths(old: Bundle, rows: Iterable[Row]) -> None:
    from candor.calibration.errors import CalibrationError

    hidden = old.manifest.model.hidden_size
    widths = {"h": sum(old.manifest.representation.block_sizes(hidden)), "prompt_states": 2 * hidden}
    for row in rows:
        for name, width in widths.items():
            if row[name] is not None and len(row[name]) != 4 * width:
                raise CalibrationError(
                    f"the states of {row['id']} are {len(row[name]) // 4} numbers wide, expected {width}: they are "
                    "of another model"
                )


def _labelled(old: Bundle, row: Row) -> Labelled:
    import json

    import torch

    from candor.calibration.data import prompt_digest
    from candor.calibration.generate import Labelled

    name = f"{row['id']}:{row['choice']}"
    turns: Any = json.loads(row["conversation"]) if row["conversation"] is not None else None
    messages = turns if isinstance(turns, list) else []
    if (
        old.policy.conversations.system_prompt.kind == "fixed"
    ):  # records do not have it, though a client may send it
        messages = [turn for turn in messages if turn["role"] != "system"]
    h = _states(row["h"])
    whole = bool(h.numel()) and bool(h.isfinite().all())
    return Labelled(
        id=name,
        prompt_digest=prompt_digest(messages) if messages else name,
        messages=tuple(messages),
        response=row["answer"] or "",
        label=1 if row["correct"] else 0,
        h=h if whole else torch.empty(0),
        fault=None if whole else "incomplete",
        unknown=row["correct"] is None,
        prompt_states=_states(row["prompt_states"]),
    )


def _states(data: bytes | None) -> Any:
    import numpy as np
    import torch

    return torch.empty(0) if data is None else torch.from_numpy(np.frombuffer(data, "<f4").copy())


def _seconds(time: datetime | None) -> float | None:
    return None if time is None else time.replace(tzinfo=UTC).timestamp()
