"""A bundle in memory: manifest, estimator, the exemplars' texts and the calibration report.

    {estimator.safetensors, exemplars.jsonl, report.json, manifest.json and its seal}  <->  Bundle

The digests show that the files are the published ones, but not that they fit together. Loading therefore also
checks that the adaptor's input has the representation's width, that each support row has an exemplar, and that the
regions are at the manifest's alphas.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from candor.model_store import formats, layout, strict_json
from candor.model_store.directory import read_directory
from candor.model_store.errors import ContentError, Difference
from candor.model_store.manifest import (
    ESTIMATOR,
    EXEMPLARS,
    MANIFEST,
    REPORT,
    SEAL,
    FileEntry,
    Manifest,
    seal,
)
from candor.policy.certificate import Certificate
from candor.policy.conversation import shown
from candor.policy.judging import TwoGates
from candor.policy.policy import Policy
from candor.sdm.conventions import DEFAULT, Conventions
from candor.sdm.estimator import SDMEstimator
from candor.sdm.region import Region
from candor.sdm.rule import AnswerRule

_MOST_LINES = 10  # maximum faulty lines that a message lists


@dataclass(frozen=True)
class Exemplar:
    """The record behind one support row. label: -1 unlabelled, -99 out of distribution, else a class.

    messages: the conversation as the record had it, {"role", "content"} each.
    """

    id: str
    label: int
    prediction: int
    messages: tuple[dict[str, str], ...]
    response: str

    def __post_init__(self) -> None:
        if not self.messages or any(turn.keys() != {"role", "content"} for turn in self.messages):
            raise ValueError('its messages are no list of {"role", "content"}')

    @property
    def prompt(self) -> str:
        """The conversation as one readable text."""
        return shown(self.messages)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded bundle. exemplars: one per support row, in order. digest: SHA-256 of manifest.json, hexadecimal.

    rule: the two-gate rule; None if the bundle has the papers' regions only.
    """

    manifest: Manifest
    estimator: SDMEstimator
    exemplars: tuple[Exemplar, ...]
    report: dict[str, Any]
    digest: str
    rule: TwoGates | None = None

    @property
    def regions(self) -> Mapping[float, Region]:
        """The regions by alpha."""
        return self.estimator.regions

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """The certificates of the answers let through; at most one for each alpha and estimator."""
        return self.manifest.certificates

    @property
    def policy(self) -> Policy:
        """How calibration made its answers. Answers made differently are not calibrated."""
        return self.manifest.policy


def load_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Loads the bundle in a directory and verifies every byte of it.

    Raises BundleError: BundleNotFound, BundleDamaged, ManifestError or ContentError.
    """
    files = read_directory(Path(path))
    manifest = files.manifest
    version = manifest.format_version
    exemplars = _read_exemplars(files.data[EXEMPLARS], version)
    policy = formats.with_conversations(manifest.policy, version, [one.messages for one in exemplars])
    manifest = replace(manifest, policy=policy)
    report = _read_report(files.data[REPORT])
    tensors = _read_tensors(files.data[ESTIMATOR])
    _check(manifest, tensors, exemplars)
    gates = {
        name.removeprefix(layout.RULE): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(layout.RULE)
    }
    try:
        estimator = SDMEstimator.from_state(tensors, _conventions(manifest))
        rule = TwoGates(AnswerRule.from_state(gates), manifest.rule) if manifest.rule else None
    except ValueError as error:
        raise _inconsistent([Difference(ESTIMATOR, "an estimator", str(error))]) from None
    return Bundle(manifest, estimator, exemplars, report, files.digest, rule)


def encode(
    manifest: Manifest,
    estimator: SDMEstimator,
    exemplars: Sequence[Exemplar],
    report: dict[str, Any],
    rule: AnswerRule | None = None,
) -> dict[str, bytes]:
    """Returns the bytes of every file of a bundle and fills in `manifest.files`. rule: of `manifest.rule`.

    The same content gives the same bytes. Raises ContentError or ManifestError for values that no file can hold.
    Whether the parts fit together is checked on loading.
    """
    if estimator.conventions != (served := _conventions(manifest)):
        expected = Difference("conventions", str(served), str(estimator.conventions))
        raise ContentError("only an estimator of the manifest's conventions can be served", [expected])
    # These are copies, since safetensors refuses tensors that share memory.
    state = estimator.state() | {
        layout.RULE + name: value for name, value in (rule.state() if rule else {}).items()
    }
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    data = {
        ESTIMATOR: save(tensors),
        EXEMPLARS: b"".join(_dump(EXEMPLARS, asdict(one)) + b"\n" for one in exemplars),
        REPORT: _dump(REPORT, report, indent=2) + b"\n",
    }
    entries = {name: FileEntry.of(content) for name, content in data.items()}
    listed = replace(manifest, format_version=formats.LATEST, files=entries)
    manifest_bytes = listed.to_bytes()
    return {**data, MANIFEST: manifest_bytes, SEAL: seal(manifest_bytes)}


def _conventions(manifest: Manifest) -> Conventions:
    return replace(DEFAULT, passed_over=manifest.passed_over)


def _dump(name: str, value: dict[str, Any], indent: int | None = None) -> bytes:
    try:
        return strict_json.dump(value, indent=indent)
    except (ValueError, TypeError) as error:
        what = "JSON: strings, finite numbers, lists, objects"
        raise ContentError(
            "the bundle cannot be written",
            [Difference(name, what, str(error))],
            "Write null for what has no finite value.",
        ) from None


def _read_tensors(data: bytes) -> dict[str, Tensor]:
    try:
        tensors = load(data)
        # safetensors keeps the last of two tensors with one name.
        strict_json.parse(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:  # KeyError: unknown dtype
        raise _inconsistent([Difference(ESTIMATOR, "tensors in safetensors", str(error))]) from None
    return tensors


def _read_exemplars(data: bytes, version: int) -> tuple[Exemplar, ...]:
    faults: list[Difference] = []
    exemplars: list[Exemplar] = []
    *lines, rest = data.split(b"\n")  # not splitlines: U+2028 may stand unescaped in a string
    if rest:
        faults.append(Difference(EXEMPLARS, "a line feed at the end", "none"))
    for number, line in enumerate(lines, start=1):
        where = f"{EXEMPLARS} line {number}"
        try:
            value = formats.exemplar_as_latest(strict_json.parse(line), version)
            exemplars.append(strict_json.decode(Exemplar, value, where, faults))
        except ValueError as error:
            faults.append(Difference(where, "a JSON object", str(error)))
        if len(faults) >= _MOST_LINES:
            break
    if faults:
        raise _inconsistent(faults)
    return tuple(exemplars)


def _read_report(data: bytes) -> dict[str, Any]:
    try:
        report = strict_json.parse(data)
    except ValueError as error:
        raise _inconsistent([Difference(REPORT, "a JSON object", str(error))]) from None
    if not isinstance(report, dict):
        raise _inconsistent([Difference(REPORT, "a JSON object", strict_json.show(report))])
    return report


def _check(manifest: Manifest, tensors: dict[str, Tensor], exemplars: Sequence[Exemplar]) -> None:
    """Raises ContentError unless manifest, tensors and exemplars describe the same estimator."""
    width = sum(manifest.representation.block_sizes(manifest.model.hidden_size))
    faults = layout.check(
        tensors,
        d=width,
        c=len(manifest.class_names),
        a=len(manifest.alphas),
        n=len(exemplars),
        p=2 * manifest.model.hidden_size if manifest.rule else None,
        probe=manifest.rule is not None and manifest.rule.strangers > 0,
        forecast=manifest.rule is not None and manifest.rule.may_lose is not None,
    )
    if not faults:
        alphas = tuple(sorted(tensors["regions.alpha"].tolist()))
        if alphas != manifest.alphas:
            faults.append(Difference("regions.alpha", f"the manifest's {manifest.alphas}", str(alphas)))
        thresholds = dict(
            zip(tensors["regions.alpha"].tolist(), tensors["regions.q_prime_min"].tolist(), strict=True)
        )
        for certificate in manifest.certificates:
            least, region = certificate.rescaled_similarity_min, thresholds.get(certificate.alpha, inf)
            if least < region:
                where = f"certificates, {certificate.estimator} at {certificate.alpha}"
                faults.append(
                    Difference(where, f"rescaled_similarity_min from the region's {region}", str(least))
                )
        rows = zip(tensors["support.labels"].tolist(), tensors["support.predictions"].tolist(), strict=True)
        for number, (one, (label, prediction)) in enumerate(zip(exemplars, rows, strict=True), start=1):
            if (one.label, one.prediction) != (label, prediction):
                where = f"{EXEMPLARS} line {number}"
                expected = f"label {label}, prediction {prediction} as in support row {number - 1}"
                faults.append(Difference(where, expected, f"{one.label}, {one.prediction}"))
    if faults:
        raise _inconsistent(faults[:_MOST_LINES])


def _inconsistent(faults: Sequence[Difference]) -> ContentError:
    return ContentError(
        "the bundle's content does not fit together",
        faults,
        "Create the bundle anew with `candor calibrate`.",
    )
