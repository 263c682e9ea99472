"""Decoder layers for steps of few rows: one call, or a few, that equal the layer."""

from __future__ import annotations

import pytest
import torch

from kernels import decoder_layer, paged_attention_cpu
from kernels.compiled import OnDemand
from kernels.integer_product import instructions_for
from model.batch import Batch, KVCache
from model.config import FlamingoConfig
from model.cpu import ROWS, DecodeLayer, FastLinear, use_fast_formats
from model.products import FLOAT32, FORMATS
from tests.model.test_cpu import plain_and_fast
from tests.tiny_models import CONFIGS, Family, tiny_model


def batch_of(
    counts: tuple[int, ...], config: FlamingoConfig = CONFIGS["idefics"], dtype: torch.dtype = torch.float32
) -> tuple[Batch, KVCache]:
    """Return a batch of three sequences with this many new tokens each, and a cache filled with random numbers."""
    cache = KVCache.zeros(config, 8, 4, dtype, "cpu")
    cache.blocks.copy_(torch.randn(cache.blocks.shape))
    lengths, table = [7, 2, 12], [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    positions = [range(length - count, length) for length, count in zip(lengths, counts, strict=True)]
    slots = [blocks[at // 4] * 4 + at % 4 for blocks, new in zip(table, positions, strict=True) for at in new]
    batch = Batch(
        token_ids=torch.arange(5, 5 + sum(counts)),
        positions=torch.tensor([at for new in positions for at in new]),
        media_slot=None,
        query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
        last_token=torch.tensor(counts).cumsum(0) - 1,
        context_lengths=torch.tensor(lengths).int(),
        block_table=torch.tensor(table).int(),
        slot_mapping=torch.tensor(slots),
    )
    return batch, cache


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 2, 1)], ids=["decode", "few tokens"])
@torch.inference_mode()
def test_a_decode_layer_equals_the_layer(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = tiny_model(CONFIGS["idefics"]), tiny_model(CONFIGS["idefics"])
    fast.fold_gates()
    use_fast_formats(fast, FLOAT32)
    assert all(isinstance(layer, DecodeLayer) for layer in fast.language_model.layers)
    batch, cache = batch_of(counts)
    media = fast.fresh_media(torch.zeros(1, 4, 16))
    expected_blocks, blocks = cache.blocks.clone(), cache.blocks.clone()
    assert fast.language_model.step_context(batch, torch.float32, cache.layer(0)).decoding is not None
    actual = fast(batch, KVCache(blocks), media)
    monkeypatch.setattr(paged_attention_cpu, "use_compiled", lambda *_: False)
    expected = plain(batch, KVCache(expected_blocks), media)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(blocks, expected_blocks, atol=1e-4, rtol=0)


@pytest.mark.skipif(instructions_for(4) is None, reason="the processor has no instructions")
@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 2, 1), (7, 2, 12)], ids=["decode", "few tokens", "prompts"])
@torch.inference_mode()
def test_a_layer_of_integer_products_is_one_call_and_equals_its_parts(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fast = plain_and_fast()
    use_fast_formats(fast, ("int4",))
    batch, cache = batch_of(counts, fast.config, torch.bfloat16)
    expected_blocks, media = cache.blocks.clone(), fast.fresh_media(torch.zeros(1, 4, 16, dtype=torch.bfloat16))
    layers = [layer for layer in fast.language_model.layers if isinstance(layer, DecodeLayer)]
    assert layers
    assert all(layer.weights_of_whole(sum(counts)) is not None for layer in layers)
    monkeypatch.setattr(decoder_layer, "_decoder_layer", OnDemand(decoder_layer._decoder_layer._build))
    layers[0].compile_kernels(cache.layer(0), has_offsets=False)
    compiled = set(decoder_layer._decoder_layer)
    assert len(compiled) == 2, "of plain sequences, and of spans"
    actual = fast(batch, cache, media)
    assert set(decoder_layer._decoder_layer) == compiled, "a step compiled a kernel"
    monkeypatch.setattr(DecodeLayer, "weights_of_whole", lambda self, num_rows: None)
    expected = fast(batch, KVCache(expected_blocks), media)
    assert torch.equal(actual, expected)
    assert torch.equal(cache.blocks, expected_blocks)


@pytest.mark.skipif(instructions_for(8) is None, reason="the processor has no instructions")
def test_a_layer_of_other_products_is_several_calls() -> None:
    _, fast = plain_and_fast()
    use_fast_formats(fast, ("int4", "bfloat16"))
    layer = fast.language_model.layers[0]
    assert isinstance(layer, DecodeLayer)
    linears = [linear for linear in layer.layer.modules() if isinstance(linear, FastLinear)]
    for linear in linears:
        linear.products = {name: FORMATS[name](torch.zeros(*linear.shape), None) for name in ("int4", "bfloat16")}
        linear.choose({1: "int4", 4: "int4", 8: "bfloat16", 16: "bfloat16", 32: "bfloat16"})
    assert layer.weights_of_whole(7) is not None
    assert layer.weights_of_whole(8) is None
    linears[0].products["int8"] = FORMATS["int8"](torch.zeros(*linears[0].shape), None)
    linears[0].choose(dict.fromkeys(ROWS, "int8"))
    assert layer.weights_of_whole(1) is None


@pytest.mark.parametrize("family", ["openflamingo", "flamingo"])
def test_a_layer_that_is_not_llama_like_is_kept(family: Family) -> None:
    fast = tiny_model(CONFIGS[family])
    fast.fold_gates()
    use_fast_formats(fast, FLOAT32)
    assert not any(isinstance(layer, DecodeLayer) for layer in fast.language_model.layers)
