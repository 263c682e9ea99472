"""The encoder fills the slots that it is handed and no others; blocks that rows share are not written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.batch import Batch, MediaPages
from model.inference import prepare_for_inference
from server.engine.caches.media import Encoding, MediaCache
from server.engine.device.encoder import REBUILT_TOGETHER, Encoder
from tests.engine_client import (
    CONFIG,
    Prompt,
    client,
)
from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_media_item_from_host_memory_reaches_its_own_slot(family: Family) -> None:
    untouched, model = tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])
    num_media, config = REBUILT_TOGETHER + 3, model.config.resampler
    tokens = torch.randn(num_media, config.num_latents, config.dim)
    pages = MediaPages.zeros(model.config, num_media + 2, torch.float32, "cpu")
    encoder = Encoder(prepare_for_inference(model), pages, MediaCache(num_media + 2, 1 << 20, b""))
    slots = [(5 * n + 1) % (num_media + 2) for n in range(num_media)]
    encodings = [Encoding(bytes([n]), visual_tokens=tokens[n], slot=slot) for n, slot in enumerate(slots)]
    encoder.encode([encoding.next_piece(0) for encoding in encodings])
    torch.testing.assert_close(pages.pages[slots], untouched.media_kv(tokens), atol=1e-5, rtol=1e-5)
    unused = sorted(set(range(num_media + 2)) - set(slots))
    assert len(unused) == 2
    assert not pages.pages[unused].any()


def test_blocks_that_rows_share_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("openflamingo", replace(CONFIG, num_blocks=256, max_tokens_per_step=64))
    forward, counts = answer.engine.runner._forward, set[tuple[int, int]]()

    def watched(batch: Batch) -> torch.Tensor:
        table, lengths = batch.block_table, batch.context_lengths
        assert table is not None
        assert lengths is not None
        assert batch.slot_mapping is not None
        is_shared = (table == table[:1]).all(0) & (torch.arange(table.shape[1]) < lengths.min() // CONFIG.block_size)
        if len(table) > 1:
            assert not torch.isin(batch.slot_mapping // CONFIG.block_size, table[0, is_shared]).any()
        counts.add((len(table), int(is_shared.sum())))
        return forward(batch)

    monkeypatch.setattr(answer.engine.runner, "_forward", watched)
    answer.engine.add(Prompt(((0, 11), (1, 7), (2, 4))).request("first"))
    answer.run()
    for number, tail in enumerate([((1, 7), (3, 6)), ((1, 7), (4, 6)), ((3, 5),)]):
        answer.engine.add(Prompt(((0, 11), *tail)).request(str(number)))
    answer.run()
    # the blocks of the first image and its text, not those that two of three prompts share after them
    assert max(count for rows, count in counts if rows == 3) == 12 // CONFIG.block_size
