"""Reads vLLM's options under their own names with vLLM's parser, and checks each.

Most options pass through. Three lists name the exceptions: `OURS` are set elsewhere, `CHANGES_H` belong to the
model's identity, and with `CAPTURE_WRONG` hidden states or evidence would be wrong or are not shown to be right.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "CANDOR_VLLM"
"""Environment variable with further options in command-line form; options of the command override it."""

_TOKENS = "tokens are the model directory's and part of the bundle's identity; change the model's own files"
_ANSWERS = "how answers are drawn is the bundle's policy; calibrate with another policy"
_ADAPTERS = "adapters come with their bundles; give --adapter DIR=BUNDLE (serve) or --adapter DIR"
_WORKERS = "Candor's own worker and scheduler take the hidden states; leave it out"
_MODEL = "the model is a local directory, known by its content; give that with --model"
_TEXT = "Candor serves models that generate text, and text alone; leave it out"

OURS: Mapping[str, str] = {
    "model": _MODEL,
    "revision": _MODEL,
    "code_revision": _MODEL,
    "hf_config_path": _MODEL,
    "tokenizer": _TOKENS,
    "tokenizer_mode": _TOKENS,
    "tokenizer_revision": _TOKENS,
    "skip_tokenizer_init": _TOKENS,
    "generation_config": _ANSWERS,
    "override_generation_config": _ANSWERS,
    "logits_processors": _ANSWERS,
    "logprobs_mode": _ANSWERS,
    "watermark_config": _ANSWERS,
    "dtype": "the bundle decides it; choose it with `candor calibrate --dtype`",
    "max_model_len": "Candor's own limits follow from it; give --max-model-len or CANDOR_MAX_MODEL_LEN",
    "served_model_name": "give --served-model-name or CANDOR_SERVED_MODEL_NAME of `candor serve`",
    "worker_cls": _WORKERS,
    "worker_extension_cls": _WORKERS,
    "scheduler_cls": _WORKERS,
    "enable_lora": _ADAPTERS,
    "max_loras": _ADAPTERS,
    "max_lora_rank": _ADAPTERS,
    "default_mm_loras": _ADAPTERS,
    "runner": _TEXT,
    "convert": _TEXT,
    "pooler_config": _TEXT,
    "language_model_only": "texts alone are served; for images too give --limit-mm-per-prompt '{\"image\": 2}'",
    "mm_encoder_only": _TEXT,
    "trust_remote_code": "Candor runs no code of a model's directory; use a model that vLLM itself implements",
}
"""Option -> the reason it cannot be given, and what to do instead."""

CHANGES_H = (
    "quantization",
    "quantization_config",
    "kv_cache_dtype",
    "kv_cache_dtype_skip_layers",
    "hf_overrides",
    "model_impl",
    "model_class_overrides",
    "config_format",
    "lora_dtype",
    "mamba_cache_dtype",
    "mamba_ssm_cache_dtype",
    "additional_config",
)
"""Options under which the same weights have other states, beyond rounding. Options that only choose kernels, sizes or
devices are not included: the batch changes the rounding too."""

_SPECULATION = (
    "states under a draft model have not been shown to be right; use n-grams (--speculative-config)"
)
_BLOCKS = (
    "no sums come with KV blocks that were computed elsewhere; leave it out, the local prefix cache stays"
)
_CONTEXT = "each rank would count its own positions alone; use --tensor-parallel-size"

CAPTURE_WRONG: Mapping[str, str] = {
    "spec_method": _SPECULATION,
    "spec_model": _SPECULATION,
    "spec_tokens": _SPECULATION,
    "diffusion_config": "an answer's states are those of tokens written one after the other; leave it out",
    "decode_context_parallel_size": _CONTEXT,
    "prefill_context_parallel_size": _CONTEXT,
    "enable_hc_sp": "each rank would hold the states of its own tokens alone; leave it out",
    "enable_dbo": "a step's tokens come in two halves of which one would be counted; leave it out",
    "ubatch_size": "a step's tokens come in pieces of which one would be counted; leave it out",
    "enable_batch_sharded_sampling": "each rank would measure the evidence of its own rows alone; leave it out",
    "kv_sharing_fast_prefill": "the last layers skip the prompt, whose states h needs; leave it out",
    "enable_mm_embeds": "an image that comes embedded cannot be looked at again; leave it out",
    "kv_transfer_config": _BLOCKS,
    "ec_transfer_config": _BLOCKS,
    "kv_offloading_size": _BLOCKS,
    "nnodes": "other nodes would need a server of their own; use --distributed-executor-backend ray",
}
"""Option -> the reason it is refused, and what to do instead."""

FRONTEND = frozenset(
    [
        "tool_call_parser",
        "enable_auto_tool_choice",
        "tool_parser_plugin",
        "tool_strict_level",
        "exclude_tools_when_tool_choice_none",
        "chat_template_content_format",
        "return_tokens_as_token_ids",
        "enable_prompt_tokens_details",
        "enable_force_include_usage",
    ]
)
"""Options of vLLM's server, not its engine, that its request handlers take here."""

_HARMLESS = {"None", "False", "1"}
"""Values of these options, as text, that request the default."""

_SHORT = {
    "-dcp": "decode_context_parallel_size",
    "-sc": "speculative_config",
}


class OptionError(ValueError):
    """An option that vLLM does not know or that Candor cannot serve with."""


def read(words: Sequence[str], engine: str = "vllm") -> dict[str, Any]:
    """Reads vLLM's options from `words` and the environment variable CANDOR_VLLM: name -> value, without defaults.

    `--config FILE` adds those of a YAML file, in vLLM's form. vLLM is imported only if there are options, and only
    after the check of their names. Raises OptionError with one sentence.
    """
    try:
        words = [*shlex.split(os.environ.get(VARIABLE, "")), *words]
    except ValueError as error:
        raise OptionError(f"{VARIABLE}: expected words as on a command line: {error}") from error
    if not words:
        return {}
    if engine != "vllm":
        raise OptionError(f"{words[0]} is no option of Candor's, and --engine {engine} takes none of vLLM's")
    named = _named(words)
    _refuse(named)
    _require_known(named)
    options = _parsed(words)
    _refuse(options)
    return options


GRAMMARS = "structured_outputs_config"
"""The option that decides what a grammar lets through. It changes answers that are held to one, and no others."""


def changing_h(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that belong to the served model's identity, in a fixed order, as JSON has them."""
    found = {name: options[name] for name in CHANGES_H if name in options}
    if (grammars := options.get(GRAMMARS)) is not None:
        given, usual = asdict(grammars), asdict(type(grammars)())
        if changed := {name: value for name, value in given.items() if value != usual[name]}:
            found[GRAMMARS] = changed
    return found


def images(options: Mapping[str, Any]) -> int:
    """The most images of a prompt; 0 where they are not asked for, and text alone is served."""
    return _most(options.get("limit_mm_per_prompt"), "image")


def _most(limits: Any, modality: str) -> int:
    most = (limits or {}).get(modality, 0) if isinstance(limits, Mapping) else 0
    return int(most.get("count", 0) if isinstance(most, Mapping) else most)


def as_typed(options: Mapping[str, Any]) -> str:
    """The options in command-line form; "none" if there are none."""
    words = [
        f"{_flag(name)} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    ]
    return " ".join(words) or "none"


def _refuse(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in OURS:
            raise OptionError(f"{_flag(name)} cannot be given: {OURS[name]}")
        if name in CAPTURE_WRONG and str(value) not in _HARMLESS:
            raise OptionError(f"{_flag(name)} is not served: {CAPTURE_WRONG[name]}")
    for modality in ("video", "audio"):
        if _most(options.get("limit_mm_per_prompt"), modality):
            raise OptionError(
                f"--limit-mm-per-prompt: {modality} is not served, of all but texts images alone are"
            )
    if options.get("load_format") == "dummy":
        raise OptionError("--load-format dummy is not served: the weights are made up; leave it out")
    if _speculation(options.get("speculative_config")) not in (None, "ngram"):
        raise OptionError(f"--speculative-config is not served: {_SPECULATION}")
    if options.get("speculative_config") and str(options.get("pipeline_parallel_size", 1)) != "1":
        raise OptionError(
            "--speculative-config with --pipeline-parallel-size is not served: vLLM's first stage does not start "
            "with it; use --tensor-parallel-size"
        )
    if options.get("distributed_executor_backend") == "external_launcher":
        raise OptionError("--distributed-executor-backend external_launcher is not served: use mp or ray")


def _speculation(given: Any) -> str | None:
    """The method in a mapping or its JSON; "draft_model" if it names none, None if that cannot be read."""
    try:
        config = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return None  # vLLM's parser says what is wrong
    return str(config.get("method", "draft_model")) if isinstance(config, Mapping) else None


def _require_known(names: Iterable[str]) -> None:
    """Raises OptionError for a name that vLLM's source does not hold; reading that takes no import."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        return
    source = Path(found.origin).with_name("engine").joinpath("arg_utils.py").read_text(encoding="utf-8")
    known = {
        "config",
        *(name.replace("_", "-") for name in FRONTEND),
        *re.findall(r'"--([a-z0-9-]+)"', source),
    }
    for name in names:
        flag = name.replace("_", "-")
        if flag.removeprefix("no-") not in known:
            near = [f"; did you mean --{one}?" for one in get_close_matches(flag, known, 1)]
            raise OptionError(f"neither Candor nor vLLM has an option --{flag}{''.join(near)}")


def _named(words: Sequence[str]) -> dict[str, str]:
    """Names and values, as text, as far as they can be read without vLLM; "True" for a switch."""
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--") or word in _SHORT:
            name, equals, value = word.partition("=")
            name = _SHORT.get(name) or re.split(r"\.", name[2:])[0].replace("-", "_")
            found[name] = value if equals else following if following[:1] not in ("", "-") else "True"
    return found


def _parsed(words: Sequence[str]) -> dict[str, Any]:
    """Parses the options with vLLM's parser; raises OptionError with vLLM's message."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    import candor.engine.vllm_engine  # noqa: F401  # sets what vLLM reads while it is imported

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise OptionError(f"vLLM's options: {_line(message)}")

    parser = AsyncEngineArgs.add_cli_args(
        FrontendArgs.add_cli_args(Parser(add_help=False, allow_abbrev=False))
    )
    words = [
        part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else (word,))
    ]
    try:
        given = vars(parser.parse_args(words))
    except OptionError:
        raise
    except Exception as error:  # an unreadable file or an invalid value: vLLM's message is passed on
        raise OptionError(f"vLLM's options: {_line(str(error) or repr(error))}") from error
    known = AsyncEngineArgs.__dataclass_fields__
    changed = {name: value for name, value in given.items() if value != parser.get_default(name)}
    if strange := sorted(changed.keys() - known.keys() - FRONTEND):
        raise OptionError(f"{_flag(strange[0])} is an option of vLLM's own server; Candor's is set otherwise")
    return changed


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _line(message: str) -> str:
    return " ".join(message.split())
