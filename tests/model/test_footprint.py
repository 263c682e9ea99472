"""The memory that a model needs on each device is what a rank's weights and caches take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.batch import KVCache, MediaPages
from model.describe import main, memory_table, parameters
from model.folder import load_folder, save_folder
from model.footprint import Footprint, page_bytes, smallest_size, token_bytes
from model.presets.published import MODELS
from model.quantised import WeightFormat
from model.ranks import Rank, rank_config
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

GIB = 2**30
IDEFICS_9B, IDEFICS_80B = MODELS["idefics-9b"], MODELS["idefics-80b"]


@pytest.mark.parametrize("rank", [Rank(0, 1), Rank(1, 2)])
def test_weights_and_caches_of_a_rank_take_what_is_counted(rank: Rank, tmp_path: Path) -> None:
    config = CONFIGS["idefics"]
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    model = load_folder(tmp_path / "model", "cpu", torch.bfloat16, rank)
    footprint = Footprint.of(config, torch.bfloat16, rank)
    assert footprint.weights == {
        name: sum(weight.nbytes for weight in part.parameters()) for name, part in model.named_children()
    }
    divided = rank_config(config, rank)
    assert KVCache.zeros(divided, 3, 4, torch.bfloat16, "cpu").blocks.nbytes == 3 * 4 * footprint.token
    assert MediaPages.zeros(divided, 3, torch.bfloat16, "cpu").pages.nbytes == 3 * footprint.page


# by each model's card: the numbers of parameters of the gated layers, of the resampler and of all
@pytest.mark.parametrize(
    ("name", "gated", "resampler", "total"),
    [("idefics-9b", 1.43e9, 126.0e6, 8.9e9), ("idefics-80b", 13.9e9, 126.0e6, 80e9)],
)
def test_published_models_have_their_numbers_of_parameters(
    name: str, gated: float, resampler: float, total: float
) -> None:
    counted = parameters(MODELS[name])
    assert counted["gated"] == pytest.approx(gated, rel=0.005)
    assert counted["resampler"] == pytest.approx(resampler, rel=0.001)
    assert sum(counted.values()) == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize(("name", "mebibytes"), [("openflamingo-9b", 1), ("idefics-9b", 8), ("idefics-80b", 40)])
def test_media_pages_of_published_models(name: str, mebibytes: int) -> None:
    assert page_bytes(MODELS[name], torch.bfloat16) == mebibytes * 2**20


def test_eight_ranks_of_idefics_80b() -> None:
    text, dim = IDEFICS_80B.language_model, 8192
    matrices = text.num_layers * (4 * dim * dim + 3 * dim * text.ffn_dim)
    tables, norms = 2 * 32_002 * dim, (2 * text.num_layers + 1) * dim
    footprint = Footprint.of(IDEFICS_80B, torch.bfloat16, Rank(7, 8))
    assert footprint.weights["language_model"] == 2 * (matrices // 8 + tables + norms)
    assert footprint.token == token_bytes(IDEFICS_80B, torch.bfloat16) // 8 == 320 * 2**10
    assert footprint.page == 5 * 2**20


@pytest.mark.parametrize(("weight_format", "bits"), [("fp8", 8), ("int8", 8), ("int4", 5)])
def test_packed_weights_of_idefics_9b(weight_format: WeightFormat, bits: int) -> None:
    """By hand: 32 layers of 4 squares and 3 rectangles, and 8 gated ones, whose maps of media stay in bfloat16."""
    dim, ffn_dim, media_dim = 4096, 11008, 1280
    decoder, gated = 32 * (4 * dim * dim + 3 * dim * ffn_dim), 8 * (2 * dim * dim + 3 * dim * ffn_dim)
    # the queries, keys and values of a layer are one matrix, as the gate and the other half of a feed-forward are
    features = {"language_model": 32 * (5 * dim + 2 * ffn_dim), "gated": 8 * (3 * dim + 2 * ffn_dim)}
    scales = {part: 0 if weight_format == "int4" else 4 * count for part, count in features.items()}
    plain = Footprint.of(IDEFICS_9B, torch.bfloat16)
    packed = Footprint.of(IDEFICS_9B, torch.bfloat16, weight_format=weight_format)
    for part, weights in (("language_model", decoder), ("gated", gated)):
        assert plain.weights[part] - packed.weights[part] == 2 * weights - weights * bits // 8 - scales[part]
    assert packed.weights["gated"] > 8 * 2 * 2 * media_dim * dim
    assert {part: packed.weights[part] for part in ("vision", "resampler")} == {
        part: plain.weights[part] for part in ("vision", "resampler")
    }


def test_the_table_of_a_format_compares_it_with_bfloat16() -> None:
    heading, head, *lines, verdict = memory_table(IDEFICS_9B, 1, 24, "fp8").splitlines()
    assert heading == "idefics-9b: one device"
    assert head.split() == ["memory", "unit", "bfloat16", "fp8"]
    assert lines[0].split()[0] == "language_model"
    plain, packed = (float(number) for number in lines[0].split()[-2:])
    assert 0.5 < packed / plain < 0.54
    assert verdict == "fits into a device of 24 GiB"
    assert memory_table(IDEFICS_9B, 1, 8, "fp8").endswith("does not fit into a device of 8 GiB")


def test_the_fewest_devices_are_found() -> None:
    needed = {size: Footprint.of(IDEFICS_80B, torch.bfloat16, Rank(0, size)).needed / 0.9 for size in (2, 4, 8)}
    assert needed[2] > 80 * GIB > needed[4]
    assert smallest_size(IDEFICS_80B, torch.bfloat16, 80 * GIB) == 4
    assert smallest_size(IDEFICS_80B, torch.bfloat16, int(needed[8]) + 1) == 8
    assert smallest_size(IDEFICS_80B, torch.bfloat16, GIB) is None


def test_the_table_compares_the_whole_model_with_a_device() -> None:
    heading, head, *lines, verdict = memory_table(IDEFICS_80B, 2, 80).splitlines()
    assert heading == "idefics-80b: 2 devices, bfloat16"
    assert head.split() == ["memory", "unit", "whole", "per", "device"]
    assert [line.split()[-3:] for line in lines] == [
        ["GiB", "121.60", "61.29"],
        ["GiB", "1.17", "1.17"],
        ["GiB", "25.94", "12.97"],
        ["GiB", "0.23", "0.23"],
        ["GiB", "148.95", "75.67"],
        ["KiB", "2,560.00", "1,280.00"],
        ["MiB", "40.00", "20.00"],
        ["GiB", "155.24", "78.81"],
    ]
    assert verdict == "does not fit into devices of 80 GiB, of which 4 are the fewest"
    assert memory_table(IDEFICS_80B, 4, 1).endswith(
        "does not fit into devices of 1 GiB, of which not even 64 are enough"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel", "3", "idefics-9b"], "idefics-9b cannot be divided by 3: language_model.num_heads is 32"),
        (["--tensor-parallel", "0"], "--tensor-parallel is 0, must be at least 1"),
        (["--device-memory", "80"], "--device-memory needs --tensor-parallel or --weight-format"),
        (
            ["--tensor-parallel", "2", "--weight-format", "fp8", "idefics-9b"],
            "--weight-format fp8 is not supported with --tensor-parallel 2",
        ),
        (["--weight-format", "int3", "idefics-9b"], "argument --weight-format: invalid choice: 'int3'"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_prints_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tensor-parallel", "8", "openflamingo-9b", "idefics-9b"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [table.partition("\n")[0] for table in tables] == [
        "openflamingo-9b: 8 devices, bfloat16",
        "idefics-9b: 8 devices, bfloat16",
    ]


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert memory_table(IDEFICS_80B, 8, 80) in page
    assert memory_table(MODELS["idefics-9b"], 1, 16, "int4") in page
