"""The encoder fills the slots that it is handed and no others."""

from __future__ import annotations

import pytest
import torch

from model.batch import MediaPages
from model.inference import prepare_for_inference
from server.engine.media_cache import Encoding, MediaCache
from server.engine.runner import REBUILT_TOGETHER, Encoder
from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_media_item_from_host_memory_reaches_its_own_slot(family: Family) -> None:
    untouched, model = tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])
    num_media, config = REBUILT_TOGETHER + 3, model.config.resampler
    tokens = torch.randn(num_media, config.num_latents, config.dim)
    pages = MediaPages.zeros(model.config, num_media + 2, torch.float32, "cpu")
    encoder = Encoder(prepare_for_inference(model), pages, MediaCache(num_media + 2, 1 << 20, b""))
    slots = [(5 * n + 1) % (num_media + 2) for n in range(num_media)]
    encoder.run([Encoding(bytes([n]), slot, None, tokens[n]) for n, slot in enumerate(slots)])
    torch.testing.assert_close(pages.pages[slots], untouched.media_kv(tokens), atol=1e-5, rtol=1e-5)
    unused = sorted(set(range(num_media + 2)) - set(slots))
    assert len(unused) == 2
    assert not pages.pages[unused].any()
