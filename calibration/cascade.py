"""Certifies a cascade as one policy: the two-gate rule, and another model that answers what the rule withholds.

The certification records that the rule withholds at some alpha are put to the upstream as the server will put them
(`policy.upstream`), and its answers are judged by the records' own verifiers. Answers are kept as the model's are, so
none is paid for twice, and a stopped run goes on. With n records, of which the rule let a through and the upstream
answered u, r of the a + u rightly,

    P(right | answered) >= the exact lower bound of r in a + u
    P(withheld) <= the exact upper bound of n - a in n

The same records chose the rule's threshold, one of `thresholds` fixed beforehand, or none. So each bound is taken at
delta / (thresholds + 1), and holds with confidence 1 - delta whichever was chosen. What nobody can judge counts as
wrong, and what the upstream refuses to answer is not answered, as for a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from candor.calibration.agreement import Agreement
from candor.calibration.cache import AnswerCache, KeptReply, cache_key
from candor.calibration.data import Record
from candor.calibration.errors import CalibrationError, DataError
from candor.calibration.generate import close_verifiers
from candor.calibration.intervals import lower_bound
from candor.calibration.labels import ask_person, label
from candor.calibration.rule_certificate import CertifiedRule, RuleCertification
from candor.calibration.verifiers import Verdict
from candor.policy.cascade import CascadeCertificate, CascadeTerms
from candor.policy.policy import Policy
from candor.policy.upstream import Asked, Ended, Upstream, UpstreamError

if TYPE_CHECKING:
    import httpx

AT_ONCE = 8
"""The most questions in flight; providers limit their rate."""
_ONE_TRY_S = 300.0
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Escalating:
    """How the upstream is asked. cache, concurrency, relabel, person: as in `answering.AnsweringOptions`.

    patience_s: how long one that is away or busy is asked again.
    """

    upstream: Upstream
    cache: Path
    concurrency: int = AT_ONCE
    relabel: bool = False
    person: bool = False
    patience_s: float = 300.0


@dataclass(frozen=True)
class Cascade:
    """terms: what was certified. asked: prompts put to the upstream, of all alphas together; of these it answered
    `answered`, `right` of them rightly. prompt_tokens, completion_tokens: that it says it read and wrote."""

    terms: CascadeTerms
    asked: int
    answered: int
    right: int
    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        name = self.terms.model
        lines = [f"what is withheld, answered by {name}, as one policy:"]
        for one in self.terms.certificates:
            lines.append(
                f"alpha {one.alpha:g}: of {one.records} records {one.escalated} ({one.escalated / one.records:.1%}) "
                f"go to it, of all prompts at most {one.escalated_at_most:.1%}\n"
                f"  clients get {one.answered} answers, {one.right} right ({one.right / one.answered:.1%}): "
                f"certified at least {one.lower_bound:.4f}, with confidence {one.confidence:g}"
            )
        lines.append(
            f"  {name} alone, on the {self.asked} withheld: {self.right} right; it counts {self.prompt_tokens} "
            f"tokens read, {self.completion_tokens} written"
        )
        return "\n".join(lines)


def require_judged(records: Sequence[Record]) -> None:
    """Raises DataError for records whose label is of a given response: another model's answer needs a verifier."""
    given = [record for record in records if record.label is not None]
    if given:
        raise DataError(
            f'{given[0].place} (id "{given[0].id}") has the label of a given response, and --escalate-to asks for '
            "another: give a reference and a verifier, or name such records with --certify-data"
        )


def try_upstream(record: Record, policy: Policy, how: Escalating) -> None:
    """Asks for one answer, which is kept. Raises CalibrationError where it fails."""
    asyncio.run(_replies([record], policy, how))


def certify_cascade(
    rule: CertifiedRule,
    records: Mapping[str, Record],
    policy: Policy,
    how: Escalating,
    delta: float,
    agreement: Agreement | None = None,
) -> Cascade:
    """records: by id, those that the rule was certified on. agreement: of the verifier with people, by whose labels
    the accuracy then is. Raises CalibrationError; the answers until then are kept."""
    withheld = {id: records[id] for search in rule.searches for id in rule.withheld(search)}
    told = asyncio.run(_judged(list(withheld.values()), policy, how))
    certificates = []
    for search in rule.searches:
        if one := _certificate(search, [told[id] for id in rule.withheld(search)], delta, agreement):
            certificates.append(one)
    replies = [reply for reply, _ in told.values()]
    read = [one.prompt_tokens for one in replies if one.prompt_tokens is not None]
    written = [one.completion_tokens for one in replies if one.completion_tokens is not None]
    terms = CascadeTerms(
        how.upstream.model,
        policy.max_tokens,
        sum(read) / len(read) if read else None,
        sum(written) / len(written) if written else None,
        tuple(certificates),
    )
    answered = sum(one.text is not None for one in replies)
    right = sum(verdict is True for _, verdict in told.values())
    return Cascade(terms, len(replies), answered, right, sum(read), sum(written))


def _certificate(
    search: RuleCertification,
    told: Sequence[tuple[KeptReply, Verdict]],
    delta: float,
    agreement: Agreement | None,
) -> CascadeCertificate | None:
    """None where nothing is answered."""
    made, records = search.certificate, len(search.prompts)
    answered = (made.answered if made else 0) + sum(reply.text is not None for reply, _ in told)
    right = (made.right if made else 0) + sum(verdict is True for _, verdict in told)
    if not answered:
        return None
    each, trusted = delta / (search.thresholds + 1), 1.0
    accurate = each
    if agreement is not None:  # half of delta for the verifier's own errors, as for the rule's certificates
        accurate, trusted = each / 2, 1 - agreement.error_bound(delta / 2)
    return CascadeCertificate(
        alpha=search.alpha,
        confidence=1 - delta,
        records=records,
        escalated=len(told),
        escalated_at_most=1 - lower_bound(records - len(told), records, each),
        answered=answered,
        right=right,
        lower_bound=trusted * lower_bound(right, answered, accurate),
    )


async def _judged(
    records: Sequence[Record], policy: Policy, how: Escalating
) -> dict[str, tuple[KeptReply, Verdict]]:
    """By id: what the upstream said, and whether it is right; None also where it said nothing."""
    replies = await _replies(records, policy, how)
    with AnswerCache(how.cache) as cache:

        async def verdicts(relabel: bool) -> list[Verdict]:
            try:
                return await asyncio.gather(
                    *(
                        label(record, reply.text, cache, relabel) if reply.text is not None else _nothing()
                        for record, reply in zip(records, replies, strict=True)
                    )
                )
            finally:
                await close_verifiers(records)

        found = await verdicts(how.relabel)
        left = [
            (record, reply.text)
            for record, reply, verdict in zip(records, replies, found, strict=True)
            if reply.text is not None and verdict is None
        ]
        if how.person and left and ask_person(left, cache):
            found = await verdicts(False)
    return {record.id: told for record, *told in zip(records, replies, found, strict=True)}  # type: ignore[misc]


async def _nothing() -> Verdict:
    return None


async def _replies(records: Sequence[Record], policy: Policy, how: Escalating) -> list[KeptReply]:
    places = asyncio.Semaphore(min(how.concurrency, AT_ONCE))
    with (
        AnswerCache(how.cache) as cache,
        tqdm(total=len(records), desc="escalating", unit="answer", delay=1) as bar,
    ):
        async with how.upstream.client(AT_ONCE) as client:

            async def reply(record: Record) -> KeptReply:
                asked = policy.conversations.resolve(record.messages).turns
                key = cache_key(
                    url=how.upstream.url,
                    upstream=how.upstream.model,
                    asked=asked,
                    max_tokens=policy.max_tokens,
                )
                async with places:
                    found = cache.get_reply(key)
                    if found is None:
                        found = await _asked(client, record, asked, policy.max_tokens, how)
                        cache.put_reply(key, found)
                bar.update()
                return found

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(reply(record)) for record in records]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


async def _asked(
    client: httpx.AsyncClient, record: Record, asked: Asked, max_tokens: int, how: Escalating
) -> KeptReply:
    """Asks until it is answered, or `patience_s` is over. Raises CalibrationError."""
    loop = asyncio.get_running_loop()
    until, pause_s = loop.time() + how.patience_s, 0.5
    while True:
        try:
            said = how.upstream.ask(client, asked, max_tokens, loop.time() + _ONE_TRY_S, streamed=False)
            *text, ended = [one async for one in said]
            assert isinstance(ended, Ended)  # it is the last
            return KeptReply("".join(map(str, text)), ended.prompt_tokens, ended.completion_tokens)
        except UpstreamError as error:
            if error.failure == "withheld":
                return KeptReply(None, None, None)
            pause_s = max(pause_s, error.retry_after_s)
            if error.failure == "rejected" or loop.time() + pause_s > until:
                raise CalibrationError(
                    f"{how.upstream.model} at {how.upstream.url} gave no answer to {record.place} "
                    f'(id "{record.id}"): '
                    f"{error.failure}, {error}. Answers so far are kept: the same command goes on from here"
                ) from error
        await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))
        pause_s *= 2
