"""What was encoded is what is loaded, to the bit; everything else is a BundleError and nothing worse."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from candor.engine.base import Representation
from candor.model_store.bundle import Bundle, Exemplar, encode, load_bundle
from candor.model_store.errors import BundleDamaged, BundleError, ContentError
from candor.model_store.manifest import ESTIMATOR, EXEMPLARS, MANIFEST, NAMES, REPORT, FileEntry, Manifest
from candor.sdm.arithmetic import LARGEST
from candor.sdm.conventions import RECORDED
from candor.sdm.estimator import SDMEstimator
from candor.sdm.support import Support

Files = dict[str, bytes]
Write = Callable[[Path, Files], Path]
Vouch = Callable[..., Files]


def asked(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def _load(files: Files, write: Write) -> Bundle:
    with tempfile.TemporaryDirectory() as folder:
        return load_bundle(write(Path(folder), files))


def _faults(files: Files, write: Write) -> dict[str, tuple[str, str]]:
    with pytest.raises(ContentError) as caught:
        _load(files, write)
    return {one.where: (one.expected, one.actual) for one in caught.value.differences}


def _same_tensors(one: SDMEstimator, other: SDMEstimator) -> bool:
    a, b = one.state(), other.state()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].numpy().tobytes() == b[name].numpy().tobytes()
        for name in a
    )


def test_round_trip(
    files: Files, write: Write, manifest: Manifest, estimator: SDMEstimator, exemplars: tuple[Exemplar, ...]
) -> None:
    bundle = _load(files, write)
    assert replace(bundle.manifest, files={}) == manifest
    assert bundle.exemplars == exemplars
    assert bundle.report == {"accuracy": 0.975, "none_at": [0.99]}
    assert bundle.digest == FileEntry.of(files[MANIFEST]).sha256
    assert _same_tensors(bundle.estimator, estimator)
    assert encode(bundle.manifest, bundle.estimator, bundle.exemplars, bundle.report) == files


def test_a_loaded_estimator_judges_as_the_published_one(
    files: Files, write: Write, estimator: SDMEstimator
) -> None:
    h = torch.randn(50, 11, generator=torch.Generator().manual_seed(1)) + 3
    before, after = estimator.estimate(h, 0.9), _load(files, write).estimator.estimate(h, 0.9)
    assert torch.equal(before.sdm, after.sdm)
    assert torch.equal(before.q_prime_lower, after.q_prime_lower)
    assert torch.equal(before.admitted, after.admitted)


def test_an_infinite_threshold_comes_back(
    make_estimator: Callable[..., SDMEstimator],
    manifest: Manifest,
    exemplars: tuple[Exemplar, ...],
    write: Write,
) -> None:
    estimator = make_estimator(alphas=(1.0, 0.9))  # in whatever order they were asked for
    made = encode(replace(manifest, alphas=(0.9, 1.0)), estimator, exemplars, {})
    assert b"Infinity" not in b"".join(made[name] for name in NAMES - {ESTIMATOR})
    regions = _load(made, write).estimator.regions
    assert not regions[1.0].found
    assert regions[1.0].q_prime_min == float("inf")
    assert regions[0.9].found


def test_an_updated_support(
    estimator: SDMEstimator, manifest: Manifest, exemplars: tuple[Exemplar, ...], write: Write
) -> None:
    updated = estimator.updated(torch.tensor([-1, -99]), torch.tensor([0, 1]), torch.ones(2, 5))
    more = (*exemplars, Exemplar("x", -1, 0, asked("p"), "r"), Exemplar("y", -99, 1, asked("p"), "r"))
    assert _same_tensors(_load(encode(manifest, updated, more, {}), write).estimator, updated)


def test_tensors_that_share_memory(
    estimator: SDMEstimator, manifest: Manifest, exemplars: tuple[Exemplar, ...], write: Write
) -> None:
    labels = estimator.support.labels
    perfect = replace(estimator, support=Support(estimator.support.h_prime, labels, labels))
    right = tuple(replace(one, prediction=one.label) for one in exemplars)
    assert _same_tensors(_load(encode(manifest, perfect, right, {}), write).estimator, perfect)


def test_other_conventions_are_not_published(
    estimator: SDMEstimator, manifest: Manifest, exemplars: tuple[Exemplar, ...]
) -> None:
    with pytest.raises(ContentError, match="manifest's conventions"):
        encode(manifest, replace(estimator, conventions=RECORDED), exemplars, {})


def test_a_count_that_passes_over_invalid_rows_is_kept(
    estimator: SDMEstimator, manifest: Manifest, exemplars: tuple[Exemplar, ...], write: Write
) -> None:
    sturdy = replace(estimator, conventions=replace(estimator.conventions, passed_over=3))
    bundle = _load(encode(replace(manifest, passed_over=3), sturdy, exemplars, {}), write)
    assert bundle.estimator.conventions == sturdy.conventions
    with pytest.raises(ContentError, match="manifest's conventions"):
        encode(manifest, sturdy, exemplars, {})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), {1}, "\ud800"])
def test_a_report_that_is_no_json(
    estimator: SDMEstimator, manifest: Manifest, exemplars: tuple[Exemplar, ...], value: Any
) -> None:
    with pytest.raises(ContentError, match=r"report\.json: expected JSON.*\nWrite null"):
        encode(manifest, estimator, exemplars, {"x": value})


# What the digests vouch for, and yet does not fit together.


def test_alphas(files: Files, write: Write, vouch: Vouch) -> None:
    faults = _faults(vouch(files, alphas=(0.9, 0.99)), write)
    assert faults == {"regions.alpha": ("the manifest's (0.9, 0.99)", "(0.9, 0.95)")}
    assert "regions.alpha" in _faults(vouch(files, alphas=(0.9,)), write)


def test_a_certificate_looser_than_its_region(
    files: Files, write: Write, vouch: Vouch, manifest: Manifest
) -> None:
    region = load(files[ESTIMATOR])["regions.q_prime_min"][0].item()
    (certificate,) = manifest.certificates
    fitting = replace(certificate, rescaled_similarity_min=region)
    assert _load(vouch(files, certificates=(fitting,)), write).manifest.certificates == (fitting,)
    loose = replace(certificate, rescaled_similarity_min=region - 0.001)
    faults = _faults(vouch(files, certificates=(loose,)), write)
    assert list(faults) == ["certificates, lower at 0.9"]


def test_classes(files: Files, write: Write, vouch: Vouch) -> None:
    faults = _faults(vouch(files, class_names=("a", "b", "c")), write)
    assert faults["adaptor.head.bias"] == ("float32 (C), C = 3", "float32 (2)")


def test_width_of_h(files: Files, write: Write, vouch: Vouch) -> None:
    faults = _faults(vouch(files, representation=Representation()), write)
    assert faults["adaptor.mean"] == ("float32 (D), D = 8", "float32 (11)")
    assert "adaptor.exemplar.weight" in faults


def test_exemplars_are_the_support_s_rows(files: Files, write: Write, vouch: Vouch) -> None:
    lines = files[EXEMPLARS].splitlines(keepends=True)
    fewer = vouch({**files, EXEMPLARS: b"".join(lines[:-1])})
    assert _faults(fewer, write)["support.h_prime"] == ("float32 (N, M), N = 39, M = 5", "float32 (40, 5)")
    one = json.loads(lines[2])
    one["label"] = 1 - one["label"]
    changed = vouch(
        {**files, EXEMPLARS: b"".join([*lines[:2], json.dumps(one).encode() + b"\n", *lines[3:]])}
    )
    (fault,) = _faults(changed, write).items()
    assert fault[0] == "exemplars.jsonl line 3"
    assert "as in support row 2" in fault[1][0]


@pytest.mark.parametrize(
    ("line", "where"),
    [
        (b"{}", "exemplars.jsonl line 2.id"),
        (
            b'{"id":1,"label":0,"prediction":0,"messages":[{"role":"user","content":""}],"response":""}',
            "exemplars.jsonl line 2.id",
        ),
        (
            b'{"id":"","label":0.0,"prediction":0,"messages":[{"role":"user","content":""}],"response":""}',
            "exemplars.jsonl line 2.label",
        ),
        (
            b'{"id":"","id":"","label":0,"prediction":0,"messages":[{"role":"user","content":""}],"response":""}',
            "exemplars.jsonl line 2",
        ),
        (b'{"id":"","label":0,"prediction":0,"messages":[],"response":""}', "exemplars.jsonl line 2"),
        (
            b'{"id":"","label":0,"prediction":0,"messages":[{"role":"user"}],"response":""}',
            "exemplars.jsonl line 2",
        ),
        (b'{"id":"","label":0,"prediction":0,"prompt":"","response":""}', "exemplars.jsonl line 2.prompt"),
        (b"", "exemplars.jsonl line 2"),
        (b"[]", "exemplars.jsonl line 2"),
        (b'{"id":"\xff"}', "exemplars.jsonl line 2"),
    ],
)
def test_a_line_that_is_no_exemplar(
    files: Files, write: Write, vouch: Vouch, line: bytes, where: str
) -> None:
    first, _, *rest = files[EXEMPLARS].split(b"\n")
    line = line.replace(b"MESSAGES", b'[{"role":"user","content":""}]')
    assert where in _faults(vouch({**files, EXEMPLARS: b"\n".join([first, line, *rest])}), write)


def test_many_wrong_lines_are_cut(files: Files, write: Write, vouch: Vouch) -> None:
    assert len(_faults(vouch({**files, EXEMPLARS: b"{\n" * 1000}), write)) == 10


def test_the_last_line_ends(files: Files, write: Write, vouch: Vouch) -> None:
    assert _faults(vouch({**files, EXEMPLARS: files[EXEMPLARS][:-1]}), write) == {
        EXEMPLARS: ("a line feed at the end", "none")
    }


@pytest.mark.parametrize("data", [b"", b"[]", b'{"a":NaN}', b'{"a":1,"a":2}', b"{"])
def test_a_report_that_is_none(files: Files, write: Write, vouch: Vouch, data: bytes) -> None:
    assert set(_faults(vouch({**files, REPORT: data}), write)) == {REPORT}


def _safetensors(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


_ENTRY = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        struct.pack("<Q", 2**62) + b"{}",
        _safetensors(b"[]", b""),
        _safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        _safetensors(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', b"\0"),
        _safetensors(b"{" + _ENTRY + b"," + _ENTRY + b"}", b"\0"),  # safetensors takes the last of the two
    ],
)
def test_tensors_that_are_none(files: Files, write: Write, vouch: Vouch, data: bytes) -> None:
    faults = _faults(vouch({**files, ESTIMATOR: data}), write)
    assert set(faults) == {ESTIMATOR}
    assert faults[ESTIMATOR][0] == "tensors in safetensors"


def test_a_support_that_the_mathematics_refuses(files: Files, write: Write, vouch: Vouch) -> None:
    tensors = load(files[ESTIMATOR])
    tensors["support.h_prime"][0] = 3e38  # finite, but not to be squared
    assert set(_faults(vouch({**files, ESTIMATOR: save(tensors)}), write)) == {ESTIMATOR}


# Laws.


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_seen(data: st.DataObject, files: Files, write: Write) -> None:
    """One changed byte, a cut, an addition, a lost or an added file: each is a BundleDamaged."""
    changed = dict(files)
    name = data.draw(st.sampled_from(sorted(NAMES)))
    content = files[name]
    position = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["byte", "cut", "append", "lose", "add"])):
        case "byte":
            byte = content[position] ^ data.draw(st.integers(1, 255))
            changed[name] = content[:position] + bytes([byte]) + content[position + 1 :]
        case "cut":
            changed[name] = content[:position]
        case "append":
            changed[name] = content + data.draw(st.binary(min_size=1, max_size=20))
        case "lose":
            del changed[name]
        case "add":
            more = data.draw(st.text("abc.-_", min_size=1, max_size=20).filter(lambda one: one not in "..."))
            changed[more] = b""
    with pytest.raises(BundleDamaged):
        _load(changed, write)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damage_that_is_vouched_for_is_a_bundle_error_or_none(
    data: st.DataObject, files: Files, write: Write, vouch: Vouch
) -> None:
    """Whoever writes digests that fit can make a wrong bundle, but not make loading fail in other ways."""
    name = data.draw(st.sampled_from([ESTIMATOR, EXEMPLARS, REPORT]))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        # Half of them in the first bytes, where safetensors keeps its header.
        most = data.draw(st.sampled_from([min(1600, len(content)), len(content)]))
        content[data.draw(st.integers(0, most - 1))] = data.draw(st.integers(0, 255))
    try:
        _load(vouch({**files, name: bytes(content)}), write)
    except BundleError as error:
        str(error).encode()


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 6),
    width=st.integers(1, 4),
    exemplar_dim=st.integers(1, 4),
    classes=st.integers(2, 4),
    alphas=st.sets(st.floats(0.5, 1, exclude_min=True), min_size=1, max_size=3),
    texts=st.text(st.characters(codec="utf-8"), max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_any_estimator_comes_back_to_the_bit(
    seed: int,
    rows: int,
    width: int,
    exemplar_dim: int,
    classes: int,
    alphas: set[float],
    texts: str,
    manifest: Manifest,
    write: Write,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        scale = 10.0 ** torch.randint(-40, 15, shape, generator=generator)  # denormal numbers too
        return torch.randn(*shape, generator=generator) * scale

    def labels(n: int) -> torch.Tensor:
        return torch.randint(classes, (n,), generator=generator)

    distances = [
        numbers(int(n)).abs().sort().values for n in torch.randint(4, (classes,), generator=generator)
    ]
    state = {
        "adaptor.mean": numbers(2 * width),
        "adaptor.scale": numbers(2 * width).abs().clamp(min=1e-30),
        "adaptor.exemplar.weight": numbers(exemplar_dim, 2 * width),
        "adaptor.exemplar.bias": numbers(exemplar_dim),
        "adaptor.head.weight": numbers(classes, exemplar_dim),
        "adaptor.head.bias": numbers(classes),
        "support.h_prime": numbers(rows, exemplar_dim).clamp(-LARGEST, LARGEST),
        "support.labels": labels(rows),
        "support.predictions": labels(rows),
        "ecdf.values": torch.cat(distances),
        "ecdf.offsets": torch.tensor([0, *map(len, distances)]).cumsum(0),
        "calibration.sdm": torch.rand(rows, classes, generator=generator),
        "calibration.q_prime": numbers(rows).abs(),
        "calibration.labels": labels(rows),
        "regions.alpha": torch.tensor(sorted(alphas), dtype=torch.float64),
        "regions.q_prime_min": torch.full((len(alphas),), float("inf"), dtype=torch.float64),
        "regions.psi": torch.full((len(alphas), classes), float("inf")),
    }
    estimator = SDMEstimator.from_state(state)
    exemplars = [
        Exemplar(
            str(i),
            int(state["support.labels"][i]),
            int(state["support.predictions"][i]),
            asked(texts),
            texts,
        )
        for i in range(rows)
    ]
    described = replace(
        manifest,
        model=replace(manifest.model, hidden_size=width),
        representation=Representation(),
        alphas=tuple(sorted(alphas)),
        certificates=(),
        class_names=tuple("abcd"[:classes]),
    )
    bundle = _load(encode(described, estimator, exemplars, {"text": texts}), write)
    assert _same_tensors(bundle.estimator, estimator)
    assert bundle.exemplars == tuple(exemplars)
    assert bundle.report == {"text": texts}
    assert bundle.manifest.alphas == tuple(sorted(alphas))
