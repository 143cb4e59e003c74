"""Every family: its configuration and model classes in transformers, and the settings of a tiny model.

Windows are shorter than the contract's prompts, so that they take effect; there are a few experts, more than one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo.tiny import save, sentencepiece, small, tokenizer

WINDOW = 48
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_MLA = {  # vLLM's kernels support only these widths
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 16,
    "long_factor": [3.0] * 16,
    "original_max_position_embeddings": 128,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 128,
}
_GDN = {
    "head_dim": 64,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def _alternating(layers: int = 4) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return {
        "num_hidden_layers": layers,
        "sliding_window": WINDOW,
        "layer_types": [kinds[i % 2] for i in range(layers)],
    }


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama 2": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "Llama 3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "Llama 4 (text)": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "intermediate_size_mlp": 256,
            "head_dim": 32,
            "attention_chunk_size": 64,
        },
    ),
    "SmolLM3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    "Qwen 2.5": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "Qwen 3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "Qwen 3 MoE": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 32, **_MOE}),
    "Qwen 3 Next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_GDN, "shared_expert_intermediate_size": 64, **_MOE},
    ),
    "Qwen 2 MoE": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"shared_expert_intermediate_size": 64, "num_key_value_heads": 4, **_MOE},
    ),
    "Mistral 7B v0.1 (a window on every layer)": (
        "MistralConfig",
        "MistralForCausalLM",
        {"sliding_window": WINDOW},
    ),
    "Mistral 7B v0.3": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "Mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Phi-2": ("PhiConfig", "PhiForCausalLM", {"num_key_value_heads": 4}),
    "Phi-3 (a window on every layer)": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": WINDOW}),
    "Phi-3.5 (longrope)": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "sliding_window": 4096,
            "original_max_position_embeddings": 128,
            "rope_parameters": _LONGROPE,
        },
    ),
    "Phi-4": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": None}),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 32}),
    "Gemma 2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 32, **_alternating()},
    ),
    "Gemma 3 (text)": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 32, **_alternating()},
    ),
    "GPT-OSS": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, **_alternating()},
    ),
    "DeepSeek V2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**_MLA, "topk_method": "greedy"}),
    "DeepSeek V2 (YaRN)": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_MLA, "topk_method": "greedy", "rope_parameters": _YARN},
    ),
    "DeepSeek V3 (YaRN, groups of experts)": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_MLA,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": 1,
            "rope_parameters": _YARN,
        },
    ),
    "Granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
        },
    ),
    "Granite 4 hybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "position_embedding_type": "rope",
        },
    ),
    "Falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    ),
    "Falcon-H1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {
            "head_dim": 32,
            "mamba_d_ssm": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "OLMo 2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "OLMo 3": ("Olmo3Config", "Olmo3ForCausalLM", _alternating()),
    "Command R": ("CohereConfig", "CohereForCausalLM", {}),
    "Command R7B (Cohere 2)": ("Cohere2Config", "Cohere2ForCausalLM", {"head_dim": 32, **_alternating()}),
    "LFM 2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 128,  # published configurations have both, and vLLM asks for them
            "block_dim": 128,
            "conv_L_cache": 3,
        },
    ),
    "Mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 16}),
    "BLOOM": ("BloomConfig", "BloomForCausalLM", {"n_layer": 3, "n_head": 4}),
    "GPT-2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 1024},
    ),
    "GPT-NeoX (Pythia)": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"num_key_value_heads": 4}),
    "GPT-J": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 1024, "rotary_dim": 16, "n_inner": 256},
    ),
    "StarCoder 2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": None}),
    "GLM 4": ("Glm4Config", "Glm4ForCausalLM", {"head_dim": 32}),
    "GLM 4.5 (MoE)": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
    ),
    "ERNIE 4.5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {"head_dim": 32}),
    "EXAONE 4": ("Exaone4Config", "Exaone4ForCausalLM", {"head_dim": 32, **_alternating()}),
    "OLMoE": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Nemotron": ("NemotronConfig", "NemotronForCausalLM", {"head_dim": 32}),
    "Jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "Phi-3.5 MoE": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "LFM 2 MoE": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 1,
            "conv_dim": 128,
            "conv_L_cache": 3,
            **_MOE,
        },
    ),
    "Gemma 4 (text)": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
            "num_kv_shared_layers": 0,
            **_alternating(),
        },
    ),
    "Gemma 3n (text)": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [256] * 4,
            **_alternating(),
        },
    ),
    "Qwen 3.5 (text)": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _GDN),
    "Apertus": ("ApertusConfig", "ApertusForCausalLM", {}),
    "OPT": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "OPT 350M (a narrower head, no last norm)": (
        "OPTConfig",
        "OPTForCausalLM",
        {"ffn_dim": 256, "word_embed_proj_dim": 64, "do_layer_norm_before": False},
    ),
    "StableLM": ("StableLmConfig", "StableLmForCausalLM", {}),
    "Gemma 3 (vision checkpoint)": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"text": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32, **_alternating()})},
    ),
    "Mistral Small 3 (vision checkpoint)": (
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {"text": ("MistralConfig", {"sliding_window": None, "head_dim": 32})},
    ),
    "Qwen 2.5 VL (vision checkpoint)": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {"text": ("Qwen2_5_VLTextConfig", {"rope_parameters": _MROPE})},
    ),
}

BFLOAT16 = ("Qwen 3 Next", "Qwen 3.5")
"""Families that vLLM's CPU build computes in bfloat16 alone (gated delta nets)."""


def _exact_gelu(model: Any) -> None:
    for layer in model.transformer.h:
        layer.mlp.gelu_impl = torch.nn.GELU()


AS_VLLM: dict[str, tuple[Callable[[Any], None], str]] = {
    "BLOOM": (
        _exact_gelu,
        "to transformers with the exact GELU; vLLM's `BloomMLP` takes that one, BLOOM was trained with tanh's",
    )
}
"""Families of which vLLM itself computes something else than their makers: what makes transformers' model compute
the same, and how that is said in the table."""

_SPACED = ("Llama 2", "Mistral", "Mixtral", "Phi-3")
"""Families with tokenizers that put a space before texts."""


def build(family: str, directory: Path) -> Path:
    """Builds the family's tiny model in `directory`."""
    import transformers

    chat = sentencepiece(strips="Phi" in family) if family.startswith(_SPACED) else tokenizer()
    config_name, architecture, changes = FAMILIES[family]
    config_class = getattr(transformers, config_name)
    if "text" in changes:
        name, text = changes["text"]
        vision = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 128,
        }
        inner = getattr(transformers, name)(**small(vocab_size=len(chat), **text))
        config = config_class(text_config=inner.to_dict(), vision_config=vision)
    else:
        config = config_class(**small(vocab_size=len(chat), **changes))
    return save(directory, config, architecture, chat, end=[2, 6])
