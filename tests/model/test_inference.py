"""A prepared model answers as the loaded one does, in every format; one product gives the pages of all gated layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.flamingo import Flamingo
from model.inference import MediaProjection, prepare_for_inference
from model.products import FLOAT32, Format
from model.reference import encode, log_probs
from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model

FORMATS: dict[str, Sequence[Format]] = {"float32": FLOAT32, "bfloat16": ("int8", "bfloat16")}


class Products(TorchDispatchMode):
    """Counts the matrix products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "linear", "_linear_pointwise"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def visual_tokens(model: Flamingo, num_media: int) -> Tensor:
    config = model.config.resampler
    generator = torch.Generator().manual_seed(num_media)
    return torch.randn(num_media, config.num_latents, config.dim, generator=generator)


def two_equal(family: Family) -> tuple[Flamingo, Flamingo]:
    return tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert float((actual.float() - expected.float()).norm() / expected.float().norm()) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_one_product_gives_the_pages_of_all_layers(family: Family) -> None:
    untouched, model = two_equal(family)
    tokens = visual_tokens(model, 3)
    project = MediaProjection(model)
    with Products() as products:
        pages = project(tokens)
    assert products.counts.total() == 1
    assert_near(pages, untouched.media_kv(tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layers_map_is_a_view_of_the_matrix_and_keeps_its_function(family: Family) -> None:
    untouched, model = two_equal(family)
    tokens = visual_tokens(model, 2)
    expected = untouched.media_kv(tokens)
    MediaProjection(model)
    weights = [weight for name, weight in model.named_parameters() if name.endswith("key_value.weight")]
    stacked = [weight for weight in weights if weight.untyped_storage().nbytes() > weight.nbytes]
    assert len(stacked) == len(model.gated)
    assert len({weight.untyped_storage().data_ptr() for weight in stacked}) == 1
    assert_near(model.media_kv(tokens), expected)
    assert_near(MediaProjection(model)(tokens), expected)  # a second engine on the same model


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cpu_formats_keep_the_function(family: Family, formats: str) -> None:
    untouched, model = two_equal(family)
    is_rounded = formats == "bfloat16"
    tokens = visual_tokens(model, 16)  # no fewer rows than media items have
    project = prepare_for_inference(model, FORMATS[formats]).project_media
    inputs = tokens.bfloat16() if is_rounded else tokens
    with Products() as products:
        pages = project(inputs)
    assert products.counts.total() == 1
    for actual in (pages, model.media_kv(inputs), MediaProjection(model)(inputs)):
        assert actual.dtype == inputs.dtype
        assert_near(actual, untouched.media_kv(tokens), 2e-2 if is_rounded else 1e-5)


TOKENS, INDEX = [5, 257, 9, 11, 257, 20, 21], [-1, 0, 0, 0, 1, 1, 1]
PIXELS = list(torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_formats_only_gates_and_media_maps_change(family: Family) -> None:
    loaded, model = tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])
    prepared = prepare_for_inference(model)
    assert prepared.flamingo is model
    assert prepared.formats == {}
    assert all(gated.attn_gate is None for gated in model.gated_layers().values())
    unchanged = {name for name in loaded.state_dict() if not name.startswith("gated.")}
    assert all(torch.equal(model.state_dict()[name], loaded.state_dict()[name]) for name in unchanged)
    expected = log_probs(loaded, TOKENS, INDEX, encode(loaded, PIXELS))
    torch.testing.assert_close(log_probs(model, TOKENS, INDEX, encode(model, PIXELS)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_formats_and_prepared_twice(family: Family) -> None:
    loaded, model = tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])
    tokens = loaded.encode_media(torch.stack(PIXELS))
    first = prepare_for_inference(model, FLOAT32)
    assert first.formats
    second = prepare_for_inference(model)
    for prepared in (first, second):
        torch.testing.assert_close(prepared.project_media(tokens), loaded.media_kv(tokens), atol=1e-5, rtol=1e-5)
    expected = log_probs(loaded, TOKENS, INDEX, encode(loaded, PIXELS))
    torch.testing.assert_close(log_probs(model, TOKENS, INDEX, encode(model, PIXELS)), expected, atol=1e-4, rtol=0)
