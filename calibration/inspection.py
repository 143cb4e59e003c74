"""What `candor data check` says of labelled data, before any model starts.

Of each file: what it is, prompts and twins among them, labels, lengths, languages roughly. Of all together: prompts
that stand in two of them, and whether a region and a certificate can be hoped for with so many records.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from candor.calibration.certificate import Claim
from candor.calibration.data import Loaded, Record
from candor.calibration.early import certificate_needs, records_needed
from candor.calibration.intervals import Share, binomial_tails
from candor.calibration.verifiers import normalise

NEAR = 0.6
"""Share of word triples, of those that either of two prompts has, from which on they are called near twins."""
_COMMON = 0.05
"""Word triples in more prompts than this share belong to the instruction, and tell nothing."""
_MOST = 20_000
"""Prompts among which near twins are sought."""
_ANSWERED = 1 / 3
"""The share answered that a certificate is reckoned with, where nothing is known yet."""

_STOP_WORDS = {
    "English": "the of and to is in that it for what which with are was",
    "German": "der die das und ist nicht ein eine zu den von mit wie auf",
    "French": "le la les et est une des pour que dans qui sur pas du",
    "Spanish": "el los las y es una que para del por con como qué su",
    "Italian": "il di che è una per del della sono con come gli nel",
    "Portuguese": "o os as é uma que para do da não com em por dos",
    "Dutch": "de het een en van is niet dat op te zijn voor met wat",
}
_WORDS = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}


@dataclass(frozen=True)
class Lengths:
    """In characters: the middle one, that which one in twenty exceeds, the longest, and where it stands."""

    median: int
    long: int
    longest: int
    place: str

    @classmethod
    def of(cls, texts: Sequence[tuple[str, str]]) -> Lengths:
        """texts: (text, its place)."""
        sizes = sorted((len(text), place) for text, place in texts)
        n = len(sizes)
        return cls(sizes[n // 2][0], sizes[min(n - 1, n * 95 // 100)][0], sizes[-1][0], sizes[-1][1])

    def __str__(self) -> str:
        return f"{self.median} characters, one in twenty over {self.long}, the longest {self.longest} ({self.place})"


@dataclass(frozen=True)
class FileCheck:
    """One file. right: share of right ones among given labels. verifiers: records by verifier. commonest: the
    commonest reference and its share. twins: pairs of places whose prompts differ in case alone, or little."""

    read: str
    records: int
    prompts: int
    right: Share | None
    verifiers: dict[str, int]
    commonest: tuple[str, float] | None
    prompt_lengths: Lengths
    answer_lengths: Lengths | None
    languages: dict[str, float]
    case_twins: list[tuple[str, str]]
    near_twins: list[tuple[str, str]]

    def lines(self) -> list[str]:
        said = [self.read]
        repeated = self.records - self.prompts
        said.append(
            f"prompts: {self.prompts} different"
            + (f", {repeated} records repeat one of them (each prompt counts once)" if repeated else "")
        )
        if self.right is not None and self.right.value is not None:
            said.append(
                f"labels: {self.right.of} given, {self.right.value:.1%} right "
                f"[{self.right.low:.1%}, {self.right.high:.1%}]"
            )
        for name, count in self.verifiers.items():
            said.append(f"verifier {name}: {count} records")
        if self.commonest is not None and self.commonest[1] >= 0.1:
            name, share = self.commonest
            said.append(
                f"{share:.0%} of the references are {name!r}: whoever always says so is right as often"
            )
        said.append(f"prompt lengths: {self.prompt_lengths}")
        if self.answer_lengths is not None:
            said.append(f"answer lengths: {self.answer_lengths}")
        said.append("languages, roughly: " + ", ".join(f"{n} {s:.0%}" for n, s in self.languages.items()))
        for what, pairs in (("in case alone", self.case_twins), ("little", self.near_twins)):
            if pairs:
                shown = "; ".join(" and ".join(pair) for pair in pairs[:3])
                said.append(
                    f"{len(pairs)} pairs of prompts differ {what}, for example {shown}: they may be dealt apart"
                )
        return said


@dataclass(frozen=True)
class DataCheck:
    """files: by name. shared: prompts in two files. near: pairs of near twins in two files. hopes: a line for each
    alpha and for the certificate. possible: whether there can be a region at some alpha."""

    files: dict[str, FileCheck]
    shared: dict[str, int]
    near: dict[str, int]
    hopes: list[str]
    possible: bool

    @property
    def fine(self) -> bool:
        return self.possible and not self.shared

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fine": self.fine}

    def __str__(self) -> str:
        parts = [
            [lines[0], *(f"  {line}" for line in lines[1:])]
            for lines in (f.lines() for f in self.files.values())
        ]
        between = [
            f"{count} prompts stand in both {pair}: remove them from one"
            for pair, count in self.shared.items()
        ]
        between += [
            f"{count} prompts are near twins in {pair}: figures would flatter"
            for pair, count in self.near.items()
        ]
        parts += [between] if between else []
        return "\n\n".join("\n".join(lines) for lines in [*parts, self.hopes])


def check_data(
    files: Sequence[Loaded], alphas: Sequence[float], claim: Claim | None, share: float, held_out: float
) -> DataCheck:
    """files: the first is to be fitted on, the others only report. share: of the prompts, set aside to certify on.
    held_out: share of the rest that only reports where there is one file."""
    checks = {str(one.source): check_file(one) for one in files}
    shared, near = {}, {}
    for one, other in combinations(files, 2):
        pair = f"{one.source} and {other.source}"
        both = {r.prompt_digest for r in one.records} & {r.prompt_digest for r in other.records}
        if both:
            shared[pair] = len(both)
        close = near_twins([*_marked(one, "1", both), *_marked(other, "2", both)])
        if apart := [(a, b) for a, b in close if a[0] != b[0]]:
            near[pair] = len(apart)
    first = checks[str(files[0].source)]
    held_out = held_out if len(files) == 1 else 0
    hopes, possible = hopes_of(first, alphas, claim, share, held_out)
    return DataCheck(checks, shared, near, hopes, possible)


def check_file(loaded: Loaded) -> FileCheck:
    records = loaded.records
    labelled = [record.label for record in records if record.label is not None]
    references = Counter(
        _shown(record.reference)
        for record in records
        if record.label is None and record.reference is not None
    )
    name, count = references.most_common(1)[0] if references else ("", 0)
    answers = [(text, r.place) for r in records if isinstance(text := r.response or r.reference, str)]
    firsts = {record.prompt_digest: record for record in reversed(records)}
    different = list(reversed(firsts.values()))
    return FileCheck(
        read=loaded.summary(),
        records=len(records),
        prompts=len(firsts),
        right=Share.from_counts(sum(labelled), len(labelled)) if labelled else None,
        verifiers=dict(Counter(r.verifier for r in records if r.label is None and r.verifier is not None)),
        commonest=(name, count / references.total()) if count > 1 else None,
        prompt_lengths=Lengths.of([(record.prompt, record.place) for record in records]),
        answer_lengths=Lengths.of(answers) if answers else None,
        languages=languages(record.messages[-1]["content"] for record in records),
        case_twins=case_twins(different),
        near_twins=near_twins([(record.place, record.prompt) for record in different]),
    )


def hopes_of(
    check: FileCheck, alphas: Sequence[float], claim: Claim | None, share: float, held_out: float
) -> tuple[list[str], bool]:
    """Returns a line for each alpha, one for the certificate, and whether any region is possible."""
    share = share if claim is not None else 0
    said, possible = [], False
    rarer, basis = 0.5, "if half of the answers are right"
    if check.right is not None and check.right.value is not None and check.right.of == check.records:
        rarer = min(check.right.value, 1 - check.right.value)
        basis = f"with {rarer:.0%} of the rarer label"
    for alpha in alphas:
        if rarer == 0:
            said.append(f"region at alpha {alpha}: not possible (all labels are the same)")
            continue
        needed = round(records_needed(alpha, share, held_out) * 0.5 / rarer)
        enough = check.prompts >= needed
        possible |= enough
        answer = "possible" if enough else "not possible"
        said.append(f"region at alpha {alpha}: {answer} ({check.prompts} prompts, at least {needed} {basis})")
    if claim is not None:
        said.append(certificate_line(int(check.prompts * share), claim))
    return said, possible


def certificate_line(apart: int, claim: Claim) -> str:
    """What a certificate takes of so many prompts set aside, if a third of them is answered."""
    answered = int(apart * _ANSWERED)
    least = certificate_needs(claim.accuracy, claim.delta)
    what = f"certificate of {claim.accuracy} at delta {claim.delta}"
    if apart < least:
        return f"{what}: not possible ({apart} prompts set aside, and {least} answers without an error are the least)"
    if answered < least:
        return f"{what}: possible, if {least} of {apart} prompts set aside are answered, all of them right"
    tails = binomial_tails(answered, claim.accuracy)  # P(X >= k) at k
    errors = sum(float(tails[answered - wrong]) <= claim.delta for wrong in range(answered)) - 1
    return (
        f"{what}: possible ({apart} prompts set aside; if a third is answered, {answered}, at most {errors} of them "
        "may be wrong)"
    )


def case_twins(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Pairs of places of prompts that differ in case alone."""
    first: dict[str, Record] = {}
    pairs = []
    for record in records:
        other = first.setdefault(normalise(record.prompt), record)
        if other is not record:
            pairs.append((other.place, record.place))
    return pairs


def near_twins(prompts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of places of prompts that share most word triples, those of the instruction aside.

    prompts: (place, text).
    """
    triples = []
    for _, text in prompts[:_MOST]:
        words = re.findall(r"\w+", normalise(text))
        triples.append(set(zip(words, words[1:], words[2:], strict=False)))
    spread = Counter(triple for some in triples for triple in some)
    most = max(2, _COMMON * len(triples))
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    pairs = []
    for index, some in enumerate(triples):
        own = {triple for triple in some if spread[triple] <= most}
        triples[index] = own
        shared = Counter(other for triple in own for other in holders[triple])
        near = [o for o, n in shared.items() if n >= NEAR * (len(own) + len(triples[o]) - n) and n > 1]
        if near:
            pairs.append((prompts[min(near)][0], prompts[index][0]))
        for triple in own:
            holders[triple].append(index)
    return pairs


def _shown(reference: Any) -> str:
    """Of a choice, the right one."""
    return str(reference.get("answer", reference) if isinstance(reference, Mapping) else reference)


def _marked(loaded: Loaded, mark: str, but: Set[str]) -> list[tuple[str, str]]:
    return [(f"{mark} {one.place}", one.prompt) for one in loaded.records if one.prompt_digest not in but]


def languages(texts: Iterable[str]) -> dict[str, float]:
    """Shares of texts by language, a rough guess: by script, and in Latin script by the commonest words."""
    found = Counter(map(_language, texts))
    return {name: count / found.total() for name, count in found.most_common(6)}


def _language(text: str) -> str:
    letters = [
        unicodedata.name(sign, "").split(" ")[0].split("-")[0] for sign in text[:2000] if sign.isalpha()
    ]
    if not letters:
        return "no letters"
    scripts = Counter(letters)
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * len(letters):
        return "Japanese"
    script = scripts.most_common(1)[0][0]
    if script != "LATIN":
        return {"CJK": "Chinese", "HANGUL": "Korean"}.get(script, f"{script.capitalize()} script")
    words = re.findall(r"\w+", text[:2000].casefold())
    hits = {name: sum(word in known for word in words) for name, known in _WORDS.items()}
    best = max(hits, key=hits.__getitem__)
    return best if hits[best] > 0 else "Latin script"
