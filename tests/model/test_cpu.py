"""CPU weight formats: groups of four bits stay exact, and the fast model answers as the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend
from kernels.weight_only import GROUP, quantise_groups
from model import products
from model.config import FlamingoConfig
from model.cpu import (
    ENCODER_ROWS,
    MANY_ROWS,
    MAX_SECONDS,
    ROWS,
    FastLinear,
    FastTable,
    _replace,
    measure,
    use_fast_formats,
)
from model.flamingo import Flamingo
from model.layers import TokenTable
from model.products import (
    FLOAT32,
    FORMATS,
    PADDED_FROM,
    ROUNDED,
    Format,
    Int4,
    Int8,
    IntegerProduct,
    Product,
    Widened,
    formats_for,
)
from model.reference import encode, log_probs
from model.vision import VisionEncoder
from tests.tiny_models import CONFIGS, tiny_model
from tests.vision_configs import OPENAI_VIT_L_14

TOKENS = [5, 257, 9, 11, 257, 20, 21]
INDEX = [-1, 0, 0, 0, 1, 1, 1]


def q4_weights(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return weights in groups as in Q4_1, whose smallest and largest are 0 and 15, and their q."""
    q = torch.randint(0, 16, (rows, columns // GROUP, GROUP))
    q[..., 0], q[..., 1] = 0, 15
    scale, low = torch.rand(rows, columns // GROUP, 1) + 0.1, torch.randn(rows, columns // GROUP, 1)
    return (q * scale + low).flatten(-2), q.flatten(-2)


def test_groups_of_four_bits_keep_their_q() -> None:
    weight, q = q4_weights(16, 64)
    quantised, constants = quantise_groups(weight)
    assert torch.equal(quantised, q.to(torch.int32))
    scale, zero = constants.float().transpose(0, 1).unbind(-1)  # [N, K / 32]
    again = ((quantised.unflatten(-1, (-1, GROUP)) - 8) * scale[..., None] + zero[..., None]).flatten(-2)
    assert float((again - weight).abs().max()) < 2**-8 * float(weight.abs().max() + 8 * scale.max())


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("int4", 0.01), ("int8", 0.02), ("bfloat16", 0.01), ("float32", 1e-6), ("onednn", 1e-6)],
)
@pytest.mark.parametrize("rows", [1, 3, 8, 70])
@pytest.mark.parametrize("without", ["nothing", "instructions", "compiled kernels"])
def test_each_format_computes_the_product(
    name: Format, tolerance: float, rows: int, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without == "instructions":
        monkeypatch.setattr(products, "instructions_for", lambda bits: None)
    if without == "compiled kernels":
        monkeypatch.setattr(backend, "_requested", "reference")
    weight, _ = q4_weights(48, 64)
    bias = torch.randn(48)
    linear = FastLinear(weight, bias, (name,))
    x = torch.randn(rows, 64).to(linear.dtype)
    assert list(linear.products) == [name]
    assert without == "nothing" or not isinstance(linear.products[name], IntegerProduct)
    expected = x.float() @ weight.T + bias
    assert float((linear(x).float() - expected).norm() / expected.norm()) < tolerance


class RowCounts(TorchDispatchMode):
    """The numbers of rows for which oneDNN has compiled a product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.add(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_onednn_compiles_products_for_few_numbers_of_rows() -> None:
    weight = torch.randn(48, 64)
    linear = FastLinear(weight, None, ("onednn",))
    with RowCounts() as counts, torch.inference_mode():
        for rows in range(PADDED_FROM + 1, 129):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(linear(x), x @ weight.T)
    assert counts.seen == {48, 64, 80, 96, 112, 128}


@pytest.mark.parametrize("name", ["int4", "int8", "bfloat16"])
def test_inputs_may_have_three_dimensions(name: Format) -> None:
    linear = FastLinear(q4_weights(16, 32)[0], None, (name,))
    x = torch.randn(2, 3, 32).to(torch.bfloat16)
    assert torch.equal(linear(x).flatten(0, 1), linear(x.flatten(0, 1)))


def test_numbers_of_rows_between_two_take_the_smaller_ones_format() -> None:
    linear = FastLinear(q4_weights(16, 32)[0], None, ("int4", "bfloat16"))
    products = dict(linear.products)
    linear.choose({rows: "int4" if rows <= 4 else "bfloat16" for rows in ROWS})
    assert linear.product(7) is products["int4"]
    assert linear.product(8) is products["bfloat16"]


def test_only_many_rows_take_the_last_format_whatever_is_chosen() -> None:
    linear = FastLinear(q4_weights(16, 32)[0], None, ("int4", "bfloat16"))
    products = dict(linear.products)
    linear.choose(dict.fromkeys(ROWS, "int4"))
    assert linear.product(MANY_ROWS - 1) is products["int4"]
    assert linear.product(MANY_ROWS) is products["bfloat16"]
    assert linear.product(1000) is products["bfloat16"]


class NoisyTimer:
    """Returns the time of each format, ten times longer while other work keeps the machine busy."""

    def __init__(self, busy_from: int, busy_to: int) -> None:
        self.num_calls = 0
        self._busy = range(busy_from, busy_to)

    def __call__(self, products: Sequence[Product], x: Tensor) -> list[float]:
        self.num_calls += 1
        slowness = 10.0 if self.num_calls in self._busy else 1.0
        return [slowness * relative_time(product) for product in products]


def relative_time(product: Product) -> float:
    if isinstance(product, IntegerProduct):
        return 1.0 if product.weights.bits == 4 else 1.5
    return {Int4: 1.0, Int8: 1.5}.get(type(product), 2.0)


@pytest.mark.parametrize("busy_from", [1, 20, 38])
def test_other_work_on_the_machine_does_not_change_the_choice(busy_from: int) -> None:
    weight, _ = q4_weights(16, 64)
    linears = [FastLinear(weight, None, formats) for formats in (("int4", "bfloat16"), ("int8", "bfloat16"))]
    groups = {linear.key: [linear] for linear in linears}
    timer = NoisyTimer(busy_from, busy_from + 40)
    chosen = measure(groups, ROWS, timer)
    assert timer.num_calls == 100
    for linear, name in zip(linears, ("int4", "int8"), strict=True):
        assert chosen[linear.key] == dict.fromkeys(ROWS, name)


def test_other_work_between_all_products_does_not_change_the_choice() -> None:
    """On a machine that is never quiet every round has interruptions, each of which is as long as many products."""
    weight, _ = q4_weights(16, 64)
    linears = [FastLinear(weight, None, ("int4", "bfloat16")) for _ in range(30)]
    random = Random(1)

    def timer(products: Sequence[Product], x: Tensor) -> list[float]:
        interruptions = [40.0 * (random.random() < 0.6) for _ in products]
        return [1.0 + 0.2 * (relative_time(p) > 1) + extra for p, extra in zip(products, interruptions, strict=True)]

    assert measure({linears[0].key: linears}, ROWS, timer) == {linears[0].key: dict.fromkeys(ROWS, "int4")}


def test_a_measurement_on_a_slow_machine_ends_after_a_whole_round() -> None:
    weight, _ = q4_weights(16, 64)
    linear = FastLinear(weight, None, ("int4", "bfloat16"))
    timer = NoisyTimer(1, 1000)
    times = iter((0.0, MAX_SECONDS - 1, MAX_SECONDS + 1))
    assert measure({linear.key: [linear]}, ROWS, timer, lambda: next(times)) == {
        linear.key: dict.fromkeys(ROWS, "int4")
    }
    assert timer.num_calls == 2 * len(ROWS) * len(linear.products)


def test_a_known_choice_is_not_measured_and_only_its_formats_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = plain_and_fast()
    known = use_fast_formats(first, ("int4", "bfloat16"))
    for key, choice in known.items():
        if "bfloat16" in key:
            known[key] = dict.fromkeys(choice, "bfloat16")
    packed: list[Format] = []
    for name, product in FORMATS.items():
        monkeypatch.setitem(FORMATS, name, recorded(packed, name, product))
    _, second = plain_and_fast()
    assert use_fast_formats(second, ("int4", "bfloat16"), known=known) == known
    assert not {"int4", "int8"} & set(packed)
    partial = {key: choice for key, choice in known.items() if "bfloat16" in key}
    monkeypatch.undo()
    _, third = plain_and_fast()
    assert use_fast_formats(third, ("int4", "bfloat16"), known=partial).keys() == known.keys()


def recorded(
    packed: list[Format], name: Format, product: Callable[[Tensor, Tensor | None], Product]
) -> Callable[[Tensor, Tensor | None], Product]:
    def pack(weight: Tensor, bias: Tensor | None) -> Product:
        packed.append(name)
        return product(weight, bias)

    return pack


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_processor_without_bfloat16_multiplies_in_float32(
    rows: int, has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    weight, bias, x = torch.randn(32, 64), torch.randn(32), torch.randn(rows, 64).to(torch.bfloat16)
    product = FORMATS["bfloat16"](weight, bias)
    assert isinstance(product, Widened)
    y = product(x)
    assert y.dtype == torch.bfloat16
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=2**-8)


def test_a_shape_that_no_kernel_takes_stays_bfloat16() -> None:
    assert formats_for(torch.zeros(15, 64), ("int4", "int8", "bfloat16")) == ("bfloat16",)
    assert formats_for(torch.zeros(15, 64), ("int4",)) == ("bfloat16",)


def wide(config: FlamingoConfig) -> FlamingoConfig:
    """Return a configuration with widths that the kernels take."""
    lm = replace(config.language_model, dim=64, head_dim=16, rotary_dim=16, ffn_dim=64, vocab_size=256)
    return replace(config, language_model=lm, gated=replace(config.gated, ffn_dim=64))


def plain_and_fast() -> tuple[Flamingo, Flamingo]:
    plain = tiny_model(wide(CONFIGS["idefics"]))
    for layer in plain.language_model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                weight, _ = q4_weights(*module.weight.shape)
                module.weight.copy_((weight - weight.mean()) * 0.05)
    fast = tiny_model(wide(CONFIGS["idefics"]))
    fast.load_state_dict(plain.state_dict())
    fast.fold_gates()
    return plain, fast


def test_the_fast_model_answers_as_the_plain_one() -> None:
    plain, fast = plain_and_fast()
    chosen = use_fast_formats(fast, ("int4", "bfloat16"))
    assert any("int4/bfloat16" in shape for shape in chosen)
    pixels = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    expected = log_probs(plain, TOKENS, INDEX, encode(plain, pixels))
    media = fast.fresh_media(torch.cat([fast.encode_media(p[None]) for p in pixels]).to(torch.bfloat16))
    actual = log_probs(fast, TOKENS, INDEX, media)
    # bfloat16 activations through four layers: the distributions stay close, measured as divergence
    divergence = (expected.exp() * (expected - actual)).sum(-1)
    assert float(divergence.max()) < 0.01


def test_float32_stays_float32() -> None:
    plain, fast = tiny_model(CONFIGS["flamingo"]), tiny_model(CONFIGS["flamingo"])
    fast.fold_gates()
    chosen = use_fast_formats(fast, FLOAT32)
    assert all("float32" in shape for shape in chosen)
    pixels = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    expected = log_probs(plain, TOKENS, INDEX, encode(plain, pixels))
    torch.testing.assert_close(log_probs(fast, TOKENS, INDEX, encode(fast, pixels)), expected, atol=1e-4, rtol=0)


def test_a_rounded_encoder_keeps_its_features() -> None:
    encoder = VisionEncoder(replace(OPENAI_VIT_L_14, image_size=56, num_patches=16, num_layers=4))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = encoder(pixels)
        linears = _replace(encoder, ROUNDED)
        actual = encoder(pixels)
    assert {tuple(linear.products) for linear in linears} == {ROUNDED}
    assert actual.dtype == torch.float32
    error = float((actual - expected).norm() / expected.norm())
    assert 0 < error < 0.005


def test_an_encoders_matrices_have_one_format_for_any_number_of_rows() -> None:
    linear = FastLinear(torch.randn(256, 256), None, FLOAT32 + ROUNDED)
    assert set(linear.products) == {*FLOAT32, *ROUNDED}
    linear.choose({ENCODER_ROWS: "rounded"})
    assert list(linear.products) == ["rounded"]
    assert linear(torch.randn(3, 256)).dtype == linear(torch.randn(300, 256)).dtype == torch.float32


def test_a_small_matrix_is_never_rounded() -> None:
    assert formats_for(torch.zeros(64, 64), FLOAT32 + ROUNDED) == FLOAT32
    assert formats_for(torch.zeros(64, 64), ROUNDED) == ("float32",)


@pytest.mark.parametrize("formats", [FLOAT32, ("int8", "bfloat16")])
@torch.inference_mode()
def test_the_new_rows_of_a_table_are_looked_up_and_multiplied(formats: tuple[Format, ...]) -> None:
    table = TokenTable(37, 2, 64)
    fast, x, ids = FastTable(table, formats), torch.randn(3, 64), torch.tensor([0, 36, 37, 38])
    assert torch.equal(fast(ids), table(ids).to(fast.weight.dtype))
    actual, expected = fast.logits(x.to(fast.weight.dtype)).float(), table.logits(x)
    assert actual.shape == (3, 39)
    assert float((actual - expected).norm() / expected.norm()) < 0.02
