"""The kernels of packed weights against their references: products of few and of many rows, unpacking, and rows in fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from kernels import backend, weight_only
from kernels.fp8 import quantise_rows, quantise_rows_reference
from kernels.weight_only import (
    int4_linear,
    int8_linear,
    pack_int4,
    quantise_int8,
    unpack_int4_reference,
    unpack_int8_reference,
)
from kernels.weight_only_gpu import multiply_int4, unpack_int4, unpack_int8
from model.folder import load_folder, save_folder
from model.inference import prepare_for_inference
from model.reference import generate
from server.engine.engine import Engine
from tests.engine_client import CONFIG, GREEDY, IMAGE_TOKEN, IMAGES, Client, Prompt
from tests.recorded_steps import record_on_cpu
from tests.tiny_models import CONFIGS, byte_tokenizer, prompt_tokenizer, tiny_model, widened

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Check = Callable[..., None]
Linear = Callable[..., Tensor]
FORMATS: dict[str, tuple[Linear, Callable[[Tensor], tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "int8": (int8_linear, quantise_int8, unpack_int8_reference),
    "int4": (int4_linear, pack_int4, unpack_int4_reference),
}
# a tile of 16 rows, full and not; tiles of 64 rows; features beyond the last tile
SHAPES = [(1, 64, 64), (16, 80, 192), (17, 16, 128), (70, 144, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, shape: tuple[int, int, int], dtype: torch.dtype, close: Check) -> None:
    linear, pack, unpack = FORMATS[name]
    num_rows, num_features, width = shape
    packed = pack(torch.randn(num_features, width))
    x = torch.randn(num_rows, width).to(dtype)
    close(name, linear(x, *packed), x.float() @ unpack(*packed, dtype).float().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (80, 192), (16, 128)], ids=str)
def test_a_matrix_is_unpacked_to_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape)
    for pack, unpack, reference in (
        (quantise_int8, unpack_int8, unpack_int8_reference),
        (pack_int4, unpack_int4, unpack_int4_reference),
    ):
        packed = pack(weight)
        assert torch.equal(unpack(*packed, dtype), reference(*packed, dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_are_multiplied_by_the_unpacked_matrix(
    name: str, close: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_only, "MAX_ROWS", 20)
    linear, pack, unpack = FORMATS[name]
    packed, x = pack(torch.randn(80, 128)), torch.randn(21, 128).bfloat16()
    expected = x.float() @ unpack(*packed, x.dtype).float().T
    close("unpacked", linear(x, *packed), expected)
    close("in tiles", linear(x[:20], *packed), expected[:20])


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_have_no_products(name: str) -> None:
    linear, pack, _ = FORMATS[name]
    assert linear(torch.randn(0, 64), *pack(torch.randn(32, 64))).shape == (0, 32)


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_next_to_any_others(name: str) -> None:
    linear, pack, _ = FORMATS[name]
    packed, x = pack(torch.randn(64, 128)), torch.randn(16, 128).bfloat16()
    alone = torch.cat([linear(x[row : row + 1], *packed) for row in range(16)])
    x[3] = torch.nan
    together = linear(x, *packed)
    assert together[3].isnan().all()
    assert torch.equal(torch.cat([together[:3], together[4:]]), torch.cat([alone[:3], alone[4:]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 100])
def test_rows_in_fp8(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, width) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[2] = 0
    for rows in (x, torch.randn(5, 2 * width).to(dtype)[:, :width]):
        actual, expected = quantise_rows(rows), quantise_rows_reference(rows)
        assert torch.equal(actual[0].view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(actual[1], expected[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of infinity over infinity
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_in_fp8_that_is_not_finite_has_a_nan(value: float) -> None:
    x = torch.randn(3, 64)
    x[1, 7] = value
    rows, scale = quantise_rows(x)
    assert (rows.float() * scale).isnan().any(1).tolist() == [False, True, False]


@pytest.fixture
def selected() -> Iterator[None]:
    """Let a test choose the backend of the process."""
    yield
    backend.select("auto")


@pytest.mark.usefixtures("selected")
def test_recorded_steps_of_a_packed_model_equal_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = widened(CONFIGS["openflamingo"])
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    model, served = (load_folder(tmp_path / "model", "cpu", torch.float32, weight_format="int4") for _ in range(2))
    model.fold_gates()
    products: list[int] = []
    stock = multiply_int4

    def multiply(x: Tensor, *packed: Tensor) -> Tensor:
        products.append(len(x))
        return stock(x, *packed)

    monkeypatch.setattr(weight_only, "multiply_int4", multiply)
    monkeypatch.setattr(backend, "numba", None)
    limits = replace(CONFIG, max_sequences=1, max_model_len=24)
    engine = Engine(prepare_for_inference(served), prompt_tokenizer(), limits, record=record_on_cpu)
    # a recorded step is not run in Python again, but for the products of prompts
    assert set(products) == {1}
    answer, prompt = Client(engine, dict(IMAGES)), Prompt(((-1, 2), (0, 6), (1, 2)))
    request = prompt.request("a", msgspec.structs.replace(GREEDY, max_tokens=3))
    answer.engine.add(request)
    answer.run()
    backend.select("reference")
    expected = generate(
        model,
        request.prompt.token_ids,
        request.prompt.media_index,
        prompt.pixels(model),
        max_tokens=3,
        suppressed_ids=[IMAGE_TOKEN],
    )
    assert answer.ids("a") == expected.token_ids
