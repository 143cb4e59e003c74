"""What capture asks of vLLM's scheduler and KV cache, on vLLM's own classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from candor.engine.vllm_scheduler import SchedulerCapture, full_attention_group, keep_whole_sequences

SIZES: dict[str, Any] = {"block_size": 4, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL, WINDOW = FullAttentionSpec(**SIZES), SlidingWindowSpec(**SIZES, sliding_window=6)
MAMBA = MambaSpec(block_size=4, shapes=((2, 2),), dtypes=(torch.float32,))

pytestmark = pytest.mark.model


def config(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer {number}"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


def test_windows_alone_are_kept_as_full_attention_with_that_window() -> None:
    kept = keep_whole_sequences({"a": WINDOW, "b": WINDOW, "c": MAMBA})
    assert kept == {"a": FullAttentionSpec(**SIZES, sliding_window=6), "b": kept["a"], "c": MAMBA}
    assert full_attention_group(config(kept["c"], kept["a"])) == 1


def test_windows_beside_full_attention_stay() -> None:
    specs = {"a": WINDOW, "b": FULL}
    assert keep_whole_sequences(specs) == specs
    assert full_attention_group(config(WINDOW, FULL)) == 1


def test_layers_of_several_sizes_count_as_what_they_are() -> None:
    wide = FullAttentionSpec(**{**SIZES, "num_kv_heads": 2})
    together = UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs={"a": FULL, "b": wide})
    assert full_attention_group(config(WINDOW, together)) == 1
    windows = UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs={"a": WINDOW, "b": WINDOW})
    with pytest.raises(ValueError, match="no full-attention layer"):
        full_attention_group(config(windows, MAMBA))


def test_blocks_are_noted_when_they_are_handed_out_but_not_from_the_prefix_cache() -> None:
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=4)
    scheduler = SimpleNamespace(_fresh=[])
    SchedulerCapture._watch_new_blocks(scheduler, pool)  # type: ignore[arg-type]
    first = pool.get_new_blocks(2)
    assert scheduler._fresh == [block.block_id for block in first]
    pool.free_blocks(first)
    pool.touch(first)  # what a prefix-cache hit does
    assert len(scheduler._fresh) == 2
    pool.get_new_blocks(1)
    assert len(scheduler._fresh) == 3
