"""A model that is divided between ranks computes what it computes in one process."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from model.config import ConfigError, FlamingoConfig
from model.folder import CheckpointError, SafetensorsFiles, load_folder, save_folder
from model.parallel import Group, join
from model.ranks import ALONE, Part, Parts, Rank, rank_config, sizes_of
from model.reference import encode, generate, log_probs
from tests.ranks import gloo, in_ranks
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

IDEFICS, OPENFLAMINGO, FLAMINGO = (CONFIGS[name] for name in ("idefics", "openflamingo", "flamingo"))
NUM_TOKENS, FIRST_MEDIA = 40, 3
TOKENS = [int(token) for token in torch.randint(1, 250, (NUM_TOKENS,), generator=torch.Generator().manual_seed(3))]
INDEX = [-1] * FIRST_MEDIA + [0] * 17 + [1] * (NUM_TOKENS - FIRST_MEDIA - 17)
PIXELS = list(torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
# of one shot after a prefix, and of a query
SPAN_STARTS = [0, FIRST_MEDIA, FIRST_MEDIA + 17, NUM_TOKENS]


def with_text(config: FlamingoConfig, **values: object) -> FlamingoConfig:
    gated = replace(config.gated, num_heads=4)
    return replace(config, gated=gated, language_model=replace(config.language_model, **values))  # type: ignore[arg-type]


MODELS = {
    "openflamingo": with_text(OPENFLAMINGO),
    "idefics": with_text(IDEFICS),
    "flamingo": with_text(FLAMINGO),
    "gpt_neox": with_text(
        IDEFICS, family="gpt_neox", num_kv_heads=4, norm="layer_norm", norm_bias=True, activation="gelu",
        gated_ffn=False, rotary_dim=4, qkv_bias=True, output_bias=True, ffn_bias=True, parallel_residual=True,
    ),
    "opt": with_text(
        OPENFLAMINGO, family="opt", norm_bias=True, activation="relu", position="learned", position_offset=2,
        qkv_bias=True, output_bias=True, ffn_bias=True,
    ),
    "mpt_1b": with_text(OPENFLAMINGO, qk_norm=True),
    "norms_of_rms_over_all_heads": with_text(IDEFICS, qk_norm=True),
    "norm_over_one_head_for_all": with_text(OPENFLAMINGO, qk_norm=True, norm_bias=True, num_kv_heads=1, tied_head=False),
    "slopes_of_12_heads": with_text(OPENFLAMINGO, num_heads=12, num_kv_heads=12),
}  # fmt: skip


def saved(folder: Path, config: FlamingoConfig) -> Path:
    save_folder(folder, config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    return folder


def answers(folder: Path, rank: Rank = ALONE, group: Group | None = None) -> tuple[Tensor, Tensor, list[int]]:
    """Return log-probabilities of a prompt, those of it with shots that attend alone, and a greedy answer.

    They are computed in float64, except for what norms always compute in float32. In float32, the rounding of the whole
    model is larger than the difference that is permitted.
    """
    model = load_folder(folder, "cpu", torch.float32, rank).double()
    if group is not None:
        join(model, group)
    pixels = [frames.double() for frames in PIXELS]
    media = encode(model, pixels)
    answer = generate(model, TOKENS, INDEX, pixels, max_tokens=8)
    return (
        log_probs(model, TOKENS, INDEX, media),
        log_probs(model, TOKENS, INDEX, media, SPAN_STARTS),
        answer.token_ids,
    )


def in_a_process(size: int, store: Path, folders: list[Path], number: int) -> list[tuple[Tensor, Tensor, list[int]]]:
    torch.set_num_threads(1)
    rank = Rank(number, size)
    group = gloo(dist.FileStore(str(store), size), rank)  # type: ignore[attr-defined]
    return [answers(folder, rank, group) for folder in folders]


def assert_equal(actual: tuple[Tensor, Tensor, list[int]], expected: tuple[Tensor, Tensor, list[int]]) -> None:
    for ours, whole in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)
    assert actual[2] == expected[2]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_divided_model_gives_the_log_probabilities_and_tokens_of_the_whole(
    name: str, size: int, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", MODELS[name])
    results = in_ranks(size, partial(answers, folder))
    for result in results:
        assert_equal(result, answers(folder))
        assert torch.equal(result[0], results[0][0])  # the ranks agree bit for bit: each could continue from its own


def test_a_group_of_one_gives_the_same_bits(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", MODELS["idefics"])
    (in_one,) = in_ranks(1, partial(answers, folder))
    assert torch.equal(in_one[0], answers(folder)[0])


@pytest.mark.parametrize("size", [2, 4])
def test_processes_of_a_divided_model_give_the_same(size: int, tmp_path: Path) -> None:
    folders = [saved(tmp_path / name, MODELS[name]) for name in ("openflamingo", "idefics", "flamingo")]
    with ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn")) as processes:
        run = partial(in_a_process, size, tmp_path / "store", folders)
        for results in processes.map(run, range(size)):
            for folder, result in zip(folders, results, strict=True):
                assert_equal(result, answers(folder))


def test_the_parts_of_all_ranks_are_the_tensors(tmp_path: Path) -> None:
    config = MODELS["gpt_neox"]
    folder = saved(tmp_path / "model", config)
    whole = load_folder(folder, "cpu", torch.float32).state_dict()
    ranks = [load_folder(folder, "cpu", torch.float32, Rank(n, 2)).state_dict() for n in range(2)]
    parts = Parts(config, Rank(0, 2))
    for name, tensor in whole.items():
        part = parts.get(name)
        if part is None:
            assert torch.equal(ranks[0][name], tensor)
        else:
            assert ranks[0][name].numel() == ranks[1][name].numel() == tensor.numel() // 2
            both = torch.cat([rank[name] for rank in ranks], part.axis)
            assert torch.equal(both.sort(part.axis).values, tensor.sort(part.axis).values)


def test_all_matrices_of_decoder_and_gated_layers_are_divided() -> None:
    names = {name for name, tensor in tiny_model(MODELS["gpt_neox"]).state_dict().items() if tensor.ndim > 1}
    parts = Parts(MODELS["gpt_neox"], Rank(1, 2))
    whole = {re.sub(r"\d+", "N", name) for name in names if parts.get(name) is None}
    assert {name for name in whole if name.startswith(("language_model", "gated"))} == {
        "language_model.embed.weight",
        "language_model.embed.new_rows",
        "language_model.head.weight",
        "language_model.head.new_rows",
    }


def test_only_a_part_of_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(4096.0)[:, None].repeat(1, 2048)}, file)  # 32 MiB
    files = SafetensorsFiles([file])
    part = files.part("weight", Part(0, (range(1024, 1280), range(2048, 2304))))
    assert part[:, 0].tolist() == [*range(1024, 1280), *range(2048, 2304)]
    assert resident_bytes(file) < file.stat().st_size // 2


def resident_bytes(file: Path) -> int:
    """Return the bytes of a file's mapping that this process has touched."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    sizes = [re.findall(r"^Rss:\s+(\d+) kB", mapping, re.MULTILINE) for mapping in mappings if str(file) in mapping]
    assert sizes
    return sum(int(size) for (size,) in sizes) * 1024


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (IDEFICS, 3, "tiny-idefics cannot be divided by 3: language_model.num_heads is 4"),
        (IDEFICS, 4, "tiny-idefics cannot be divided by 4: gated.num_heads is 2"),
        (with_text(IDEFICS, ffn_dim=49), 2, "tiny-idefics cannot be divided by 2: language_model.ffn_dim is 49"),
        (replace(IDEFICS, gated=replace(IDEFICS.gated, ffn_dim=49)), 2, "gated.ffn_dim is 49"),
        (with_text(IDEFICS, num_heads=12, num_kv_heads=6, ffn_dim=48), 4, "num_kv_heads is 6, neither a multiple"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_by_name(config: FlamingoConfig, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        rank_config(config, Rank(0, size))


def test_the_sizes_by_which_a_model_can_be_divided() -> None:
    assert sizes_of(MODELS["slopes_of_12_heads"]) == [1, 2, 4]
    assert sizes_of(IDEFICS) == [1, 2]


def test_a_checkpoint_is_checked_against_the_whole_model(tmp_path: Path) -> None:
    config = MODELS["idefics"]
    folder = saved(tmp_path / "model", config)
    rank = Rank(1, 2)
    (folder / "config.json").write_text(rank_config(config, rank).to_json())
    with pytest.raises(CheckpointError, match=r"attention\.qkv\.weight: found \[64, 32\], expected \[32, 32\]"):
        load_folder(folder, "cpu", torch.float32, rank)


def test_a_rank_is_one_of_its_group() -> None:
    with pytest.raises(ValueError, match="rank 2 is not below the number of ranks, 2"):
        Rank(2, 2)
