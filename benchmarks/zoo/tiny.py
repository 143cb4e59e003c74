"""Makes a model directory in a second: random weights of any architecture, with a new tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CORPUS = [
    "The children ran home before the storm began, and the old man walked slowly by the sea.",
    "user assistant system 0 1 2 3 4 5 6 7 8 9 Tell me of the harbor, the wind and the boats.",
    "<verified> <sentence> </sentence> [INST] [/INST] <|user|> <|end|> yes no It was a long winter.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
"""Ids 0 to 6 of every tokenizer made here."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(vocab_size: int = 512, template: str | None = TEMPLATE) -> Any:
    """Byte-level BPE, as most models have it; "</s>" ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )
    wrapped.chat_template = template
    return wrapped


def sentencepiece(template: str = TEMPLATE, *, first_alone: bool = False, strips: bool = False) -> Any:
    """A tokenizer like Llama 2's: spaces are "▁", one is put before a text, other bytes are tokens of their own.

    first_alone: the space is only before the whole text, as in newer ones; else also after each control token.
    strips: control tokens remove the white space after them, as Phi-3's do.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = [*SPECIAL, "<unk>"]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    learnt = json.loads(made.to_str())["model"]
    for byte in range(256):
        learnt["vocab"].setdefault(f"<0x{byte:02X}>", len(learnt["vocab"]))
    merges = [tuple(pair) for pair in learnt["merges"]]
    made = Tokenizer(
        models.BPE(learnt["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.add_special_tokens([AddedToken(text, rstrip=strips, normalized=False) for text in specials])
    if first_alone:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    wrapped.chat_template = template
    return wrapped


def save(directory: Path, config: Any, architecture: str, chat: Any = None, end: Any = 2) -> Path:
    """Saves a model of transformers' class `architecture`, float32, with the same weights each time.

    chat: its tokenizer. end: generation_config's eos_token_id.
    """
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # else they would be exactly ones and zeros
                weight += 0.1 * torch.randn_like(weight)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # DeepSeek V3 chooses its experts by it
                buffer += 0.1 * torch.randn_like(buffer)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 1, end
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    (chat or tokenizer()).save_pretrained(directory)
    return directory


VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
SEEING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def seeing(directory: Path) -> Path:
    """Saves a model like Qwen 2.5 VL, which looks at images. Needs torchvision."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2_5_VLTextConfig,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    chat = tokenizer(template=SEEING_TEMPLATE)
    chat.add_special_tokens({"additional_special_tokens": list(VISION)})
    start, image, end, video = chat.convert_tokens_to_ids(list(VISION))
    positions = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = Qwen2_5_VLTextConfig(**small(vocab_size=len(chat), rope_parameters=positions))
    config = Qwen2_5_VLConfig(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    save(directory, config, "Qwen2_5_VLForConditionalGeneration", chat, end=[2, 6])
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    processor = Qwen2_5_VLProcessor(images, chat, Qwen2VLVideoProcessor(), chat_template=SEEING_TEMPLATE)
    processor.save_pretrained(directory)
    return directory


def small(**changes: Any) -> dict[str, Any]:
    """Sizes, under the names of most configurations."""
    return {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
