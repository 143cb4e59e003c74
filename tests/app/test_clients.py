"""Other people's clients, as they are installed from PyPI and npm, against a real server with a scripted engine.

    python -m venv V; V/bin/pip install -r clients/requirements.txt; (cd clients; npm install)
    CANDOR_CLIENTS_PYTHON=V/bin/python pytest tests/app/test_clients.py

Without that environment and without clients/node_modules they are skipped: these packages do not install beside
vLLM's. docs/clients.md says what was seen with more clients, and with vLLM behind them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
PYTHON = os.environ.get("CANDOR_CLIENTS_PYTHON")
REFUSAL = "I do not know this reliably enough to answer."

python = pytest.mark.skipif(PYTHON is None, reason="CANDOR_CLIENTS_PYTHON is not set")
node = pytest.mark.skipif(
    shutil.which("node") is None or not (CLIENTS / "node_modules").is_dir(), reason="no clients/node_modules"
)

BEGINNING = """
import asyncio, json, sys
url, ABSTAIN = sys.argv[1] + "/v1", json.loads(sys.argv[2])
def show(*what): print("SHOWN" + json.dumps(what))
"""

GLUE = {
    "langchain": """
from candor_langchain import ChatCandor
model = ChatCandor(base_url=url, api_key="none", model="tiny", extra_body=ABSTAIN)
def shown(message):
    [result] = message.response_metadata["reliability"]["results"]
    return message.content, message.additional_kwargs.get("refusal"), result["region"]
def joined(text):
    whole, *rest = model.stream(text, stream_usage=True)
    for piece in rest:
        whole += piece
    return shown(whole)
show(*(f(text) for text in ("ask", "far") for f in (lambda t: shown(model.invoke(t)), joined)))
""",
    "pydantic-ai": """
from candor_pydantic_ai import CandorModel
from pydantic_ai import Agent
from pydantic_ai.exceptions import ContentFilterError
from pydantic_ai.providers.openai import OpenAIProvider
agent = Agent(CandorModel("tiny", provider=OpenAIProvider(base_url=url, api_key="none")), retries=0,
              model_settings={"extra_body": ABSTAIN})
def shown(text, result):
    [found] = result.all_messages()[-1].provider_details["reliability"]["results"]
    return text, None, found["region"]
async def whole(text):
    try:
        result = await agent.run(text)
        return shown(result.output, result)
    except ContentFilterError as error:
        return str(error)
async def streamed(text):
    try:
        async with agent.run_stream(text) as result:
            return shown("".join([piece async for piece in result.stream_text(delta=True)]), result)
    except ContentFilterError as error:
        return str(error)
async def main():
    show(*[await f(text) for text in ("ask", "far") for f in (whole, streamed)])
asyncio.run(main())
""",
}

PLAIN = {  # (whole, streamed)
    "langchain": """
from langchain_openai import ChatOpenAI
model = ChatOpenAI(base_url=url, api_key="none", model="tiny", extra_body=ABSTAIN)
show(model.invoke("far").content, "".join(piece.content for piece in model.stream("far")))
""",
    "litellm": """
from litellm import completion
given = dict(model="openai/tiny", api_base=url, api_key="none", messages=[{"role": "user", "content": "far"}],
             extra_body=ABSTAIN)
pieces = completion(stream=True, **given)
show(completion(**given).choices[0].message.content,
     "".join(piece.choices[0].delta.content or "" for piece in pieces))
""",
    "haystack": """
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
pieces = []
def ask(**more):
    model = OpenAIChatGenerator(Secret.from_token("none"), "tiny", api_base_url=url,
                                generation_kwargs={"extra_body": ABSTAIN}, **more)
    return model.run([ChatMessage.from_user("far")])["replies"][0].text
show(ask(), ask(streaming_callback=lambda piece: pieces.append(piece.content)) and "".join(pieces))
""",
    "autogen": """
from autogen_core.models import UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
can = dict(vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True)
model = OpenAIChatCompletionClient(model="tiny", base_url=url, api_key="none", model_info=can)
async def main():
    given = dict(messages=[UserMessage(content="far", source="u")], extra_create_args={"extra_body": ABSTAIN})
    pieces = [piece async for piece in model.create_stream(**given)]
    show((await model.create(**given)).content, "".join(pieces[:-1]))
asyncio.run(main())
""",
    "smolagents": """
from smolagents import OpenAIServerModel
model = OpenAIServerModel(model_id="tiny", api_base=url, api_key="none", extra_body=ABSTAIN)
asked = [{"role": "user", "content": "far"}]
show(model.generate(asked).content, "".join(piece.content or "" for piece in model.generate_stream(asked)))
""",
    "openai-agents": """
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
set_tracing_disabled(True)
model = OpenAIChatCompletionsModel("tiny", AsyncOpenAI(base_url=url, api_key="none"))
agent = Agent(name="a", model=model, model_settings=ModelSettings(extra_body=ABSTAIN))
async def main():
    run = Runner.run_streamed(agent, "far")
    events = [event.data async for event in run.stream_events() if event.type == "raw_response_event"]
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    show((await Runner.run(agent, "far")).final_output, "".join(pieces))
asyncio.run(main())
""",
}

AI_SDK = """
import { generateText, streamText } from 'ai';
import { createCandor } from './candor-ai-sdk.mjs';
const candor = createCandor({ baseURL: process.argv[2] + '/v1', reliability: { mode: 'abstain' } });
const region = (metadata) => metadata.candor.reliability.results[0].region;
const shown = [];
for (const prompt of ['ask', 'far']) {
  const whole = await generateText({ model: candor('tiny'), prompt });
  const stream = streamText({ model: candor('tiny'), prompt });
  let text = '';
  for await (const piece of stream.textStream) text += piece;
  shown.push([whole.text, whole.finishReason, region(whole.providerMetadata)]);
  shown.push([text, await stream.finishReason, region(await stream.providerMetadata)]);
}
console.log('SHOWN' + JSON.stringify(shown));
"""


def run(command: list[Any], *, cwd: Path, **environment: str) -> Any:
    """Returns what a program shows in its last line."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(CLIENTS), "LITELLM_LOCAL_MODEL_COST_MAP": "True", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "SHOWN" in done.stdout, done.stdout + done.stderr
    return json.loads(done.stdout.rpartition("SHOWN")[2].splitlines()[0])


def ask(code: str, url: str, tmp_path: Path, **options: str) -> Any:
    abstain = {"reliability": {"mode": "abstain", **options}}
    return run([PYTHON, "-c", BEGINNING + code, url, json.dumps(abstain)], cwd=tmp_path)


@python
@pytest.mark.parametrize("client", GLUE)
def test_glue_shows_verdict_and_refusal(server: Any, tmp_path: Path, client: str) -> None:
    server.engine.script("far", state="far")
    whole, streamed, *refused = ask(GLUE[client], server.url, tmp_path)
    assert whole == streamed == ["The answer.", None, "high"]
    if client == "langchain":
        assert refused == [[REFUSAL, REFUSAL, "ood"]] * 2
    else:
        assert all(REFUSAL in error for error in refused)


@python
@pytest.mark.parametrize("client", PLAIN)
def test_a_replacement_as_content_is_seen_in_every_client(server: Any, tmp_path: Path, client: str) -> None:
    server.engine.script("far", state="far")
    assert ask(PLAIN[client], server.url, tmp_path, on_abstain="content") == [REFUSAL, REFUSAL]


@node
def test_the_ai_sdk_with_its_extractor(server: Any, tmp_path: Path) -> None:
    server.engine.script("far", state="far")
    shutil.copy(CLIENTS / "candor-ai-sdk.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    (tmp_path / "ask.mjs").write_text(AI_SDK, encoding="utf-8")
    assert run(["node", "ask.mjs", server.url], cwd=tmp_path) == [
        ["The answer.", "stop", "high"],
        ["The answer.", "stop", "high"],
        [REFUSAL, "content-filter", "ood"],
        [REFUSAL, "content-filter", "ood"],
    ]
