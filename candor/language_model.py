"""A language model in this process: computes states of texts and gives the verdict on one answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

import torch

from candor.calibration.data import read_messages
from candor.engine.base import EVIDENCE, Representation
from candor.engine.factory import start_engine
from candor.engine.prompt import ChatFormat
from candor.engine.settings import EngineKind, EngineSettings
from candor.judging import judge
from candor.model_store.bundle import Bundle
from candor.model_store.identity import check_identity
from candor.policy.certificate import EstimatorKind, RuleKind
from candor.policy.conversation import Conversation, Turn
from candor.policy.decision import Verdict
from candor.policy.policy import Policy

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

T = TypeVar("T")
U = TypeVar("U")

Prompt = str | Sequence[Turn]
"""A prompt's text, or a conversation as a list of {"role", "content"} that ends with the user."""


def turns_of(prompt: Prompt) -> tuple[Turn, ...]:
    """Returns the prompt's turns. Raises ValueError, which says what is wrong."""
    return read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt))


class Model:
    """Computes the model's states for a prompt and its response. Use it in a `with` statement.

    directory: config.json, safetensors, tokenizer. bundle: one that was calibrated for the model; it then sets
    representation, policy and dtype. Without a bundle, representation None is mean, last and all evidence, and policy
    None is greedy answers to one user turn. engine: "transformers", or "vllm" as in the server, in separate
    processes. max_model_len: longest sequence in tokens.

    Raises EngineError if the directory holds no model, or not the bundle's.
    """

    def __init__(
        self,
        directory: str | Path,
        bundle: Bundle | None = None,
        *,
        representation: Representation | None = None,
        policy: Policy | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        engine: EngineKind = "transformers",
        max_model_len: int = 2048,
    ) -> None:
        self.bundle = bundle
        self.policy = policy or Policy()
        self.representation = representation or Representation(
            order=("mean", "last", "evidence"), evidence=EVIDENCE
        )
        if bundle is not None:
            self.policy, self.representation = bundle.policy, bundle.manifest.representation
            dtype = cast(Any, bundle.manifest.model.dtype)
        settings = EngineSettings(Path(directory), engine, self.representation, dtype, max_model_len)
        self.chat = ChatFormat.from_directory(settings.model)
        # The loop has its own thread, since notebooks already run a loop.
        self._loop = asyncio.new_event_loop()
        thread = Thread(target=self._loop.run_forever, name="candor-model", daemon=True)
        thread.start()
        with ExitStack() as started:  # ends in reverse order
            started.callback(self._loop.close)
            started.callback(thread.join)
            started.callback(self._loop.call_soon_threadsafe, self._loop.stop)
            self._engine = self._wait(start_engine(settings, self.chat))
            started.callback(delattr, self, "_engine")
            started.callback(lambda: self._wait(self._engine.close()))
            if bundle is not None:
                check_identity(self._engine, bundle)
            self._started = started.pop_all()
        self.identity = self._engine.identity

    def states(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[numpy.float32]:
        """Returns h (n, D) of n answers; a row is nan if the engine did not count every position.

        Raises PromptTooLong, EngineError, and ValueError if the chat template refuses a conversation.
        """
        if isinstance(prompts, str) or isinstance(responses, str) or len(prompts) != len(responses):
            raise ValueError("states takes a list of prompts and one of as many responses")
        pairs = [
            (self._conversation(prompt).encode(self.chat), self.chat.encode_response(response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        width = sum(self.representation.block_sizes(self.identity.hidden_size))
        h = torch.full((len(pairs), width), math.nan)
        for row, hidden in enumerate(self._wait(_all(lambda pair: self._engine.summarise(*pair), pairs))):
            if hidden.complete:
                h[row] = hidden.vector(self.representation)
        return cast("NDArray[numpy.float32]", h.numpy())

    def prompt_states(self, prompts: Sequence[Prompt]) -> NDArray[numpy.float32]:
        """Returns the states (n, 2 H) of n prompts at the end of prefill, mean and last; a row is nan if the engine
        did not count every position. Raises as `states`."""
        if isinstance(prompts, str):
            raise ValueError("prompt_states takes a list of prompts")
        ids = [self._conversation(prompt).encode(self.chat) for prompt in prompts]
        found = torch.full((len(ids), 2 * self.identity.hidden_size), math.nan)
        for row, states in enumerate(self._wait(_all(lambda one: self._engine.prompt_states(one), ids))):
            if states.complete:
                found[row] = states.vector()
        return cast("NDArray[numpy.float32]", found.numpy())

    def departure(self, prompt: Prompt, response: str) -> str | None:
        """Returns why the policy could not give this answer, which is then not calibrated; None if it could."""
        departure = self._conversation(prompt).departure
        ids = self.chat.encode_response(response)
        return departure or self.policy.given(response, ids, self.representation.tag)

    def judge(
        self,
        prompt: Prompt,
        response: str,
        *,
        rule: RuleKind | None = None,
        alpha: float | None = None,
        estimator: EstimatorKind = "lower",
        certified_only: bool = False,
    ) -> Verdict:
        """Returns the verdict on one answer, as `POST /v1/reliability` does; options as in `candor.judge`.

        Raises ValueError if the model was opened without a bundle, and what `states` and `candor.judge` raise.
        """
        if self.bundle is None:
            raise ValueError("a model judges by a bundle: open it with Model(directory, bundle)")
        [verdict] = judge(
            self.bundle,
            self.states([prompt], [response]),
            prompt_states=self.prompt_states([prompt]) if self.bundle.rule and rule != "sdm" else None,
            rule=rule,
            alpha=alpha,
            estimator=estimator,
            calibrated=self.departure(prompt, response) is None,
            certified_only=certified_only,
        )
        return verdict

    def close(self) -> None:
        """Stops the engine and frees its memory."""
        self._started.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _conversation(self, prompt: Prompt) -> Conversation:
        return self.policy.conversations.resolve(turns_of(prompt))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise ValueError("this model was closed; open it again")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            future.cancel()  # if the caller was interrupted


async def _all(ask: Callable[[U], Coroutine[Any, Any, T]], items: Sequence[U]) -> list[T]:
    async with asyncio.TaskGroup() as group:  # the first failure cancels the others
        tasks = [group.create_task(ask(item)) for item in items]
    return [task.result() for task in tasks]
