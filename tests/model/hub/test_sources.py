"""A repository's files are downloaded as needed, and every name that gives no model is refused in one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from model.cache import is_ready
from model.checkpoint.__main__ import main
from model.hub.prepare import prepare
from model.hub.published import CLIP_VIT_L_14, IDEFICS
from model.hub.sources import ModelNameError, license_of, open_source
from tests.model.hub.repositories import LLAMA, REDPAJAMA
from tests.model.hub.stand_in import TOKEN, StandIn

# each list and each mapping stands for ten of the one before it
BOMB = "a0: &a0 [x]\nm0: &m0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\nm{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n"
    for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: idefics\n---\n", "idefics"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit, cc-by-4.0"),
        ("---\nlanguage: en\n---\n", "not stated"),
        ("---\nlicense: [\n---\n", "not stated"),
        ("---\nlicense: null\nlicense_name: idefics\n---\n", "idefics"),
        ("---\nlicense: {name: mit}\n---\n", "not stated"),
        ("---\n- license\n---\n", "not stated"),
        ("---\n[a]: [b]\nlicense: mit\n---\n", "mit"),
        pytest.param(f"---\n{BOMB}license: *a8\n---\n", "not stated", id="aliases"),
        pytest.param(f"---\n{BOMB}license: mit\nx: {{<<: [*m8]}}\n---\n", "mit", id="merged aliases"),
        pytest.param(f"---\nlicense: {'[' * 3000}\n---\n", "not stated", id="deep"),
        pytest.param(f"---\nlicense: {'x' * 300}\n---\n", "not stated", id="long"),
        ('---\nlicense: "mit\\nERROR a line"\n---\n', "not stated"),
        ('---\nlicense: ["mit", "\\ud800"]\n---\n', "not stated"),
        ("# no metadata\n", "not stated"),
        (None, "not stated"),
    ],
)
def test_the_licence_is_that_of_the_model_card(metadata: str | None, expected: str, tmp_path: Path) -> None:
    if metadata is not None:
        (tmp_path / "README.md").write_text(metadata)
    assert license_of(open_source(str(tmp_path))) == expected


def test_only_what_the_import_reads_is_downloaded(hub: StandIn, idefics: Path, cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(idefics, tmp_path / "with_more")
    for name in ("modeling_idefics.py", "pytorch_model.bin", "flax_model.msgpack", "optimizer.pt", "vocab.json"):
        (folder / name).write_text("not needed")
    hub.publish("me/idefics", folder)
    prepare("me/idefics", cache)
    assert sorted(hub.files()) == sorted(
        [
            "README.md",
            "config.json",
            "model.safetensors",
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )


def test_a_gated_repository_is_read_with_a_token(
    hub: StandIn, idefics: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("me/gated", idefics, is_gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert is_ready(prepare("me/gated", cache))


def test_a_cut_download_goes_on_where_it_ended(
    hub: StandIn, idefics: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("me/idefics", idefics)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16 * 1024)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cuts["model.safetensors"] = 40_000
    assert is_ready(prepare("me/idefics", cache))
    assert hub.ranges == [("model.safetensors", "bytes=32768-")]


def test_a_download_that_failed_is_finished_by_the_next_one(
    published: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    published.dead.add("model.safetensors")
    with pytest.raises(ModelNameError, match="Start again: finished files are kept"):
        prepare(REDPAJAMA, cache)
    assert not cache.exists()
    published.dead.clear()
    published.requests.clear()
    assert is_ready(prepare(REDPAJAMA, cache))
    assert published.files() == ["model.safetensors"]


OPENFLAMINGO_FILES = {"checkpoint.pt": "not read"}
IDEFICS_FILES = {"config.json": '{"model_type": "idefics"}', "tokenizer.json": "{}"}
# a repository's files, and the error
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    CLIP_VIT_L_14: (
        {"config.json": '{"model_type": "clip"}'},
        f"is a model of the type 'clip', which is not supported. Supported are .*{REDPAJAMA}.*{IDEFICS[0]}",
    ),
    "me/timm": (
        {"config.json": '{"architecture": "vit"}'},
        "not a model that is supported .*architecture.* Supported are",
    ),
    "me/empty": ({"README.md": "# empty"}, "not a model that is supported .*no config.json.* Supported are"),
    LLAMA: (
        OPENFLAMINGO_FILES,
        f"needs LLaMA-7B, which is not openly .*--checkpoint {LLAMA} .*--cross-attn-every-n-layers 4",
    ),
    "me/openflamingo": (
        OPENFLAMINGO_FILES,
        "frozen models are not known; specify them: .*--checkpoint me/openflamingo",
    ),
    "me/weightless": (IDEFICS_FILES, "holds no weights that can be read: none of model.safetensors or model.bin"),
    "me/partial": (
        {**IDEFICS_FILES, "model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}'},
        "model.safetensors.index.json lists files that are not in it",
    ),
    "me/no-tokenizer": ({"config.json": '{"model_type": "idefics"}'}, "has no tokenizer.json"),
    "me/broken": ({"config.json": "{"}, "config.json is not JSON"),
    "me/list": ({"config.json": "[]"}, "config.json does not hold a JSON object"),
    "me/source": ({**IDEFICS_FILES, "SOURCE.json": '{"parts": 1}'}, "SOURCE.json: Expected `array`"),
}


def refusal(name: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command; return its one line of error."""
    capsys.readouterr()
    assert main(["import", name, "--cache", str(cache)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not cache.exists()
    return line


@pytest.mark.parametrize("name", REFUSED)
def test_a_repository_that_cannot_be_imported_is_one_line(
    name: str, hub: StandIn, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, message = REFUSED[name]
    folder = tmp_path / "repository"
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(text)
    hub.publish(name, folder)
    assert re.search(f"error: {name}.* {message}", refusal(name, cache, capsys))
    assert not [file for file in hub.files() if file.endswith((".pt", ".safetensors"))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "me/absent",
            "is not a folder, and .* has no repository of that name, or a private one: check the name, or set HF_TOKEN",
        ),
        ("me/private", "is not a folder, and .* or a private one"),
        ("me/gated", "is gated: accept its conditions at http://.*/me/gated, and set HF_TOKEN"),
        (f"{REDPAJAMA}@v9", "has no branch, tag or commit 'v9'"),
        (f"{REDPAJAMA}@{'0' * 40}", "has no branch, tag or commit '0000"),
        ("a/b/c", "is neither a folder nor the name of a repository: expected OWNER/NAME or OWNER/NAME@REVISION"),
        ("/absent", "is no folder: expected a folder"),
        ("./absent", "is no folder: expected a folder"),
        ("x--/y", "is not a valid name of a repository"),
    ],
)
def test_a_name_that_cannot_be_read_is_one_line(
    name: str, message: str, published: StandIn, idefics: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.publish("me/private", idefics, is_private=True)
    published.publish("me/gated", idefics, is_gated=True)
    assert re.search(f"error: {name.partition('@')[0]} {message}", refusal(name, cache, capsys))


def test_a_refused_token_is_named(
    hub: StandIn, idefics: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("me/idefics", idefics)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "with status 401: check that HF_TOKEN is valid and may read it" in refusal("me/idefics", cache, capsys)


def test_offline_what_is_not_in_the_cache_is_one_line(
    hub: StandIn, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refusal("me/idefics", cache, capsys)
    assert (
        "me/idefics is not a folder and not completely in the cache, and HF_HUB_OFFLINE is set: unset it to download"
        in line
    )
    assert hub.requests == []


def test_without_a_network_the_error_names_the_hub(
    hub: StandIn, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refusal("me/idefics", cache, capsys)
    assert "http://127.0.0.1:9 cannot be reached: check the network and HF_ENDPOINT" in line
