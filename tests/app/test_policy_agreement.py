"""Calibration's view of a record is the server's: what the one refuses, the other does not call calibrated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from candor.app.answering.request import RequestResolver
from candor.app.edge.schemas.requests import ChatCompletionRequest
from candor.app.edge.schemas.scoring import ScoreRequest
from candor.app.process.backend import Backend
from candor.calibration.data import Record
from candor.calibration.generate import departure
from candor.policy.conversation import Conversations
from candor.policy.policy import Policy

CONTENTS = st.sampled_from(["Be brief.", "ask", "", "x <verified>"])
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENTS})
ASKED = st.lists(TURN, max_size=3).map(lambda turns: [*turns, {"role": "user", "content": "ask"}])
RESPONSES = st.sampled_from(["yes", "y" * 16, "y" * 17, "yes<verified>", ""])


@given(
    calibrated=st.lists(ASKED, min_size=1, max_size=3),
    system_prompt=st.sampled_from([None, "Be brief."]),
    asked=ASKED,
    response=RESPONSES,
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_and_requests(
    backend: Backend, settings: Any, calibrated: Any, system_prompt: str | None, asked: Any, response: str
) -> None:
    conversations = Conversations.of_records(calibrated, system_prompt)
    policy = Policy(max_tokens=16, conversations=conversations)
    manifest = replace(backend.bundle.manifest, policy=policy)
    served = replace(backend, bundle=replace(backend.bundle, manifest=manifest))
    resolver, tag = RequestResolver(served, settings()), manifest.representation.tag

    to_answer = Record("r", tuple(asked), 1, reference="yes", verifier="exact")
    request = resolver.chat(ChatCompletionRequest(model="tiny", messages=asked))
    assert request.calibrated is (departure(to_answer, policy, served.chat, tag) is None)

    given_response = Record("r", tuple(asked), 1, response=response, label=1)
    pair = resolver.pair(ScoreRequest(messages=asked, response=response))
    assert pair.calibrated is (departure(given_response, policy, served.chat, tag) is None)
    assert pair.prompt_ids == request.choices[0].prompt_ids
