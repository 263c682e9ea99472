"""A prepared model keeps its files in memory only if it reads most of them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kernels.integer_product import instructions_for
from model.cpu import FastLinear
from model.folder import WEIGHTS, load_folder, save_folder
from model.inference import prepare_for_inference
from model.mapped_weights import release
from model.products import Format, IntegerProduct
from model.reference import encode, log_probs
from tests.tiny_models import CONFIGS, KIN_CONFIG, byte_tokenizer, tiny_model

CONFIG = CONFIGS["idefics"]
TOKENS, INDEX = [5, 9, 11, 7], [0, 0, 0, 0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(tmp_path / "model", CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    return tmp_path / "model"


def is_mapped(file: Path) -> bool:
    gc.collect()
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("formats", "stays"), [(("bfloat16",), False), ((), True)])
def test_a_file_is_unmapped_when_most_of_it_was_copied(folder: Path, formats: Sequence[Format], stays: bool) -> None:
    model = load_folder(folder, "cpu", torch.float32)
    assert is_mapped(folder / WEIGHTS)
    prepared = prepare_for_inference(model, formats)
    assert is_mapped(folder / WEIGHTS) == stays
    assert prepared.flamingo is model


def test_buffers_that_were_copied_do_not_keep_a_file_mapped(tmp_path: Path) -> None:
    """The classifier behind kin is the only part of the default model that stays as loaded, and consists of buffers."""
    save_folder(tmp_path, KIN_CONFIG, tiny_model(KIN_CONFIG).state_dict().items(), byte_tokenizer().to_str())
    prepared = prepare_for_inference(load_folder(tmp_path, "cpu", torch.float32), ("bfloat16",))
    assert prepared.flamingo.vision.kin is not None
    assert not is_mapped(tmp_path / WEIGHTS)


@pytest.mark.skipif(instructions_for(4) is None, reason="the processor has no instructions")
def test_weights_that_a_kernel_reads_by_their_address_stay_in_place() -> None:
    """An allocator may put packed weights where a loaded tensor was."""
    linear = FastLinear(torch.randn(32, 64), None, ("int4",))
    product = linear.products["int4"]
    assert isinstance(product, IntegerProduct)
    address = product.weights.packed.data_ptr()
    release(torch.nn.Sequential(linear), {address: product.weights.packed.nbytes, 1: 1 << 30})  # type: ignore[arg-type]
    assert product.weights.packed.data_ptr() == address == product.weights.layout[0]


def test_an_unmapped_model_does_not_read_its_file(folder: Path) -> None:
    models = [load_folder(folder, "cpu", torch.float32) for _ in range(2)]
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = log_probs(models[0], TOKENS, INDEX, encode(models[0], [pixels]))
    flamingo = prepare_for_inference(models[1], ("bfloat16",)).flamingo
    with (folder / WEIGHTS).open("r+b") as file:  # a shared mapping shows what is written here
        file.seek(4096)
        file.write(bytes(b ^ 0xFF for b in (folder / WEIGHTS).read_bytes()[4096:]))
    media = flamingo.fresh_media(flamingo.encode_media(pixels[None]).to(torch.bfloat16))
    actual = log_probs(flamingo, TOKENS, INDEX, media)
    assert float((expected.exp() * (expected - actual)).sum(-1).max()) < 0.01
