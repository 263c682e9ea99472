"""The paper's models have exactly the parameters of its layers and widths, and are compared with its figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model.config import ConfigError
from model.describe import DOES_NOT_FOLLOW, PARTS, find, main, parameters, rows, table
from model.presets.paper import PRESETS

# timm states 438.36 M for its NFNet-F6, of which its classifier has 3,073,000
NFNET_F6 = 435_286_116
RESAMPLER_DIM, FEATURE_DIM = 1536, 3072
# width and depth of the language model, and which of its layers have a gated layer before them
SIZES = {
    "flamingo-3b": (2048, 24, list(range(24))),
    "flamingo-9b": (4096, 40, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]),
    "flamingo-80b": (8192, 80, [0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77]),
}
RATIOS = {
    "flamingo-3b": [0.91, 1.00, 0.96, 1.00, 0.97, 0.96],
    "flamingo-9b": [1.15, 1.00, 1.13, 1.00, 1.11, 1.14],
    "flamingo-80b": [0.92, 1.00, 0.84, 1.00, 0.85, 0.92],
}


def expected_parameters(dim: int, num_layers: int, num_gated: int) -> dict[str, int]:
    """Count by hand; the heads of all three language models are together as wide as the model."""
    attention, feed_forward = 4 * dim**2, 8 * dim**2
    media_attention = 2 * dim**2 + 2 * RESAMPLER_DIM * dim
    norms, media_norm, gates = 4 * dim, 2 * RESAMPLER_DIM, 2
    return {
        "language_model": 32_002 * dim + num_layers * (attention + feed_forward + 2 * dim) + dim,
        "vision": NFNET_F6,
        "gated": num_gated * (media_attention + feed_forward + norms + media_norm + gates),
        "resampler": expected_resampler(),
    }


def expected_resampler() -> int:
    dim, inner = RESAMPLER_DIM, 16 * 128
    layer = 4 * dim * inner + 8 * dim**2 + 3 * 2 * dim
    projection, frames, latents, norm = FEATURE_DIM * dim + dim, 8 * dim, 64 * dim, 2 * dim
    return projection + frames + latents + 6 * layer + norm


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_and_gated_layers_are_those_of_the_papers_table(name: str) -> None:
    dim, num_layers, gated = SIZES[name]
    assert list(PRESETS[name].gated_layers) == gated
    assert len(gated) == {"flamingo-3b": 24, "flamingo-9b": 10, "flamingo-80b": 12}[name]
    assert parameters(PRESETS[name]) == expected_parameters(dim, num_layers, len(gated))


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_figure_is_marked_if_and_only_if_it_is_more_than_a_tenth_off(name: str) -> None:
    ratios = [round(row.number / row.published, 2) for row in rows(PRESETS[name])]
    assert ratios == RATIOS[name]
    off = {row.name for row, ratio in zip(rows(PRESETS[name]), ratios, strict=True) if abs(ratio - 1) > 0.1}
    assert off == {part for marked, part in DOES_NOT_FOLLOW if marked == name}


@pytest.mark.parametrize("name", PRESETS)
def test_sums_are_those_of_the_parts(name: str) -> None:
    *parts, trainable, total = rows(PRESETS[name])
    assert [row.name for row in parts] == list(PARTS)
    assert total.number == sum(row.number for row in parts)
    assert trainable.number == sum(row.number for row in parts if row.weights == "trainable")


def test_the_table_has_shares_totals_and_marks() -> None:
    heading, *lines, first_note, second_note = table(PRESETS["flamingo-80b"]).splitlines()
    assert heading == "flamingo-80b: gated layers before [0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77]"
    assert [line.split() for line in lines[3:]] == [
        ["gated", "trainable", "8,355.5", "11.3%", "10,000", "*", "12.5%", "0.84"],
        ["resampler", "trainable", "193.6", "0.3%", "194", "0.2%", "1.00"],
        ["trainable", "8,549.1", "11.6%", "10,000", "#", "12.5%", "0.85"],
        ["total", "73,672.4", "100.0%", "80,000", "100.0%", "0.92"],
    ]
    assert first_note == "* does not follow from the paper's own layers and widths"
    assert second_note.startswith("# ")


def test_a_folder_is_compared_with_the_paper_only_if_it_is_one_of_its_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = PRESETS["flamingo-3b"]
    other = replace(preset, gated=replace(preset.gated, interval=2))
    for name, config in {"renamed": preset, "flamingo-3b": other}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(replace(config, name=name).to_json())
        assert main([str(tmp_path / name)]) == 0
        assert (" 3,200 " in capsys.readouterr().out) == (name == "renamed")


@pytest.mark.parametrize("name", ["default", "flamboyance-lite"])
def test_the_default_model_has_its_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 0
    assert capsys.readouterr().out.startswith("flamboyance-lite: gated layers before [0, 4,")


@pytest.mark.parametrize("memory", ["-1", "0", "nan", "inf", "1e300"])
def test_a_memory_that_no_device_has_is_refused(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["default", "--tensor-parallel", "1", "--device-memory", memory])
    assert "--device-memory is " in capsys.readouterr().err


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="flamingo-3b, flamingo-9b, flamingo-80b, openflamingo-9b"):
        find("flamingo-4b")
