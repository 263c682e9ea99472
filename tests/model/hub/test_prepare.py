"""A model's name becomes a folder that answers: every published name, from a hub on this machine, through the importers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import constants
from transformers import IdeficsForVisionText2Text

from model.cache import is_ready
from model.checkpoint.__main__ import main
from model.config import load_config
from model.folder import load_folder, save_folder
from model.hub import prepare as prepare_module
from model.hub.job import Job, Origin, Part, read_origin
from model.hub.prepare import prepare
from model.hub.published import CLIP_VIT_L_14, IDEFICS, OPENFLAMINGO
from model.hub.sources import HubUnreachable, ModelNameError
from model.prompt import PromptTokenizer
from model.reference import encode as encode_media
from model.reference import log_probs
from tests.model.checkpoint.test_idefics import SQUARE, TOLERANCE, Pair, Prompt, make_processor
from tests.model.checkpoint.test_openflamingo import GOLDENS, Imported, arguments
from tests.model.hub.repositories import CHECKPOINTS, LLAMA, REDPAJAMA
from tests.model.hub.stand_in import StandIn
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

CASE = "several_shots"


@torch.no_grad()
def published_golden(golden: str, folder: Path, layers: tuple[int, ...]) -> Imported:
    """Import a stored checkpoint by its files, and close the gates of the layers that the published one lacks."""
    assert main(arguments(golden, folder)) == 0
    imported = Imported.of(golden, folder)
    for layer, gated in imported.model.gated_layers().items():
        if layer not in layers:
            for gate in (gated.attn_gate, gated.ffw_gate):
                assert gate is not None
                gate.zero_()
    return imported


@pytest.mark.parametrize("name", [name for name, experts in OPENFLAMINGO.items() if experts.language_model])
@torch.no_grad()
def test_a_published_openflamingo_answers_like_the_library(
    name: str, published: StandIn, cache: Path, tmp_path: Path
) -> None:
    golden, layers = CHECKPOINTS[name]
    folder = prepare(name, cache)
    assert load_config(folder).name == name
    assert load_config(folder).gated_layers == layers
    expected, ours = published_golden(golden, tmp_path / "golden", layers), Imported.of(golden, folder)
    prompt, pixels = ours.prompt(CASE), ours.pixels(CASE)
    theirs, answers = (
        log_probs(model, prompt.token_ids, prompt.media_index, encode_media(model, pixels))
        for model in (expected.model, ours.model)
    )
    assert float((theirs - answers).abs().max()) <= TOLERANCE
    if set(layers) >= set(expected.model.gated_layers()):
        assert float((answers - ours.log_probs[CASE]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", IDEFICS)
@torch.no_grad()
def test_a_published_idefics_answers_like_transformers(name: str, hub: StandIn, idefics: Path, cache: Path) -> None:
    hub.publish(name, idefics)
    folder = prepare(name, cache)
    config = load_config(folder)
    assert config.name == name
    theirs = IdeficsForVisionText2Text.from_pretrained(idefics)
    tokenizer = PromptTokenizer.load(folder, config.prompt)
    pair = Pair(theirs, make_processor(), load_folder(folder, "cpu", torch.float32), tokenizer)
    parts: Prompt = [SQUARE, "a red square"]
    prompt = pair.prompt(parts)
    expected = theirs(**pair.processor(text=[list(parts)])).logits[0].log_softmax(-1)
    ours = log_probs(pair.ours, prompt.token_ids, prompt.media_index, encode_media(pair.ours, pair.pixels(parts)))
    assert float((ours - expected).abs().max()) <= TOLERANCE


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder of this server, made of a published model, as its owner uploads it."""
    folder, config = tmp_path / "uploaded", CONFIGS["flamingo"]
    origin = Origin(revision="main", parts=(Part("language model", "them/lm", "a" * 40, "apache-2.0"),))
    files = {"SOURCE.json": origin.to_json(), "README.md": "---\nlicense: cc-by-4.0\n---\n", "notes.txt": "not needed"}
    tensors = tiny_model(config).state_dict().items()
    save_folder(folder, config, tensors, byte_tokenizer().to_str(), files=files, shard_bytes=20_000)
    return folder


def test_a_published_model_folder_is_linked_and_names_all_its_sources(
    hub: StandIn, model_folder: Path, cache: Path
) -> None:
    commit = hub.publish("me/flamingo", model_folder)
    folder = prepare("me/flamingo", cache)
    load_folder(folder, "cpu", torch.float32)
    downloaded = Path(constants.HF_HUB_CACHE) / "models--me--flamingo" / "snapshots" / commit
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(weights) > 1
    assert all((folder / name).samefile(downloaded / name) for name in weights)
    assert not (folder / "notes.txt").exists()
    assert [(part.repository, part.commit, part.license) for part in read_origin(folder).parts] == [
        ("me/flamingo", commit, "cc-by-4.0"),
        ("them/lm", "a" * 40, "apache-2.0"),
    ]


def test_a_local_model_folder_is_served_where_it_lies(model_folder: Path, tmp_path: Path) -> None:
    assert prepare(str(model_folder), tmp_path / "cache") == model_folder
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("config", [None, "{}", '{"num_patches": 4}', '{"format_version": 1}'])
def test_a_local_folder_that_is_no_model_is_refused(config: str | None, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(ModelNameError, match=r"folder is not a model that is supported \("):
        prepare(str(folder), cache)


def test_a_type_that_is_no_text_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ["idefics"]}')
    with pytest.raises(ModelNameError, match=r"is a model of the type \['idefics'\], which is not supported"):
        prepare(str(tmp_path), cache)


def test_a_downloaded_idefics_is_imported_and_again_after_a_change(idefics: Path, cache: Path, tmp_path: Path) -> None:
    downloaded = shutil.copytree(idefics, tmp_path / "idefics-9b")
    folder = prepare(str(downloaded), cache)
    assert load_config(folder).name == "idefics-9b"
    assert read_origin(folder).parts == (Part("model", "idefics-9b", "", "other"),)
    assert prepare(str(downloaded), cache) == folder
    (downloaded / "generation_config.json").write_text("{}")
    assert prepare(str(downloaded), cache) != folder


@pytest.mark.parametrize(
    "path", ["OpenFlamingo-4B-vitl-rpj3b", f"models--{REDPAJAMA.replace('/', '--')}/snapshots/abc"]
)
def test_a_downloaded_openflamingo_is_known_by_its_folder(
    path: str, published: StandIn, openflamingo: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    downloaded = shutil.copytree(openflamingo[REDPAJAMA], tmp_path / path)
    folder = prepare(str(downloaded), cache)
    assert [part.repository for part in read_origin(folder).parts][1:] == [
        "togethercomputer/RedPajama-INCITE-Base-3B-v1",
        CLIP_VIT_L_14,
    ]


def test_the_frozen_models_can_be_named(published: StandIn, tmp_path: Path) -> None:
    """Import the first release, whose language model each user has to have."""
    language_model = GOLDENS / "llama" / "language_model"
    changes: dict[str, Any] = {"checkpoint": LLAMA, "language_model": language_model, "vision_model": CLIP_VIT_L_14}
    assert main(arguments("llama", tmp_path / "out", **changes)) == 0
    golden = Imported.of("llama", tmp_path / "out")
    prompt, pixels = golden.prompt(CASE), golden.pixels(CASE)
    ours = log_probs(golden.model, prompt.token_ids, prompt.media_index, encode_media(golden.model, pixels))
    assert float((ours - golden.log_probs[CASE]).abs().max()) <= TOLERANCE
    commits = [(part.part, part.commit) for part in read_origin(tmp_path / "out").parts]
    assert commits == [
        ("checkpoint", published.repositories[LLAMA].revisions["main"]),
        ("language model", ""),
        ("vision model", published.repositories[CLIP_VIT_L_14].revisions["main"]),
    ]


def test_idefics_can_be_named_where_a_folder_was(hub: StandIn, idefics: Path, tmp_path: Path) -> None:
    commit = hub.publish("me/idefics", idefics)
    assert main(["import", "idefics", "--from", "me/idefics", "--out", str(tmp_path / "out")]) == 0
    assert read_origin(tmp_path / "out") == Origin("main", (Part("model", "me/idefics", commit, "other"),))


def test_a_cache_that_cannot_be_written_is_one_line_before_the_download(
    published: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for cache in (file, file / "cache"):
        assert main(["import", "--cache", str(cache), REDPAJAMA]) == 2
        reason = f"{file} is not a folder that can be written"
        assert capsys.readouterr().err == f"error: the cache {cache} cannot be used: {reason}\n"
    assert not any(name.endswith((".pt", ".bin", ".safetensors")) for name in published.files())


def test_a_format_that_is_misspelt_is_refused_with_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "idefic", "--from", "a", "--out", "b"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        "unrecognized arguments: --from a --out b; "
        "import openflamingo and import idefics have other options than import NAME"
    )


def test_the_help_of_import_has_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "--help"], "flamboyance")
    assert capsys.readouterr().out.startswith(
        "usage: flamboyance import [-h] NAME [--cache DIR]\n       flamboyance import {openflamingo,idefics} ...\n\n"
    )


def test_licences_are_logged_before_anything_large_is_downloaded(
    published: StandIn, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = prepare(REDPAJAMA, cache)
    lines = [record.getMessage() for record in caplog.records if "licence" in record.getMessage()]
    commits = {name: published.repositories[name].revisions["main"][:12] for name in published.repositories}
    language_model = OPENFLAMINGO[REDPAJAMA].language_model
    assert lines == [
        f"checkpoint: {REDPAJAMA} at commit {commits[REDPAJAMA]}, licence: mit",
        f"language model: {language_model} at commit {commits[language_model]}, licence: not stated",
        f"vision model: {CLIP_VIT_L_14} at commit {commits[CLIP_VIT_L_14]}, licence: not stated",
    ]
    assert json.loads((folder / "SOURCE.json").read_text())["parts"][0]["license"] == "mit"
    large = [file for file in published.files() if file.endswith((".pt", ".bin", ".safetensors"))]
    assert published.files()[-len(large) :] == large


def never(job: Job) -> NoReturn:
    raise AssertionError("imported a second time")


def test_the_second_start_makes_one_request_or_none(
    published: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(REDPAJAMA, cache)
    monkeypatch.setattr(prepare_module, "_run", never)
    published.requests.clear()
    assert prepare(REDPAJAMA, cache) == folder
    assert published.requests == [f"GET /api/models/{REDPAJAMA}/revision/main"]
    published.requests.clear()
    assert prepare(f"{REDPAJAMA}@{published.repositories[REDPAJAMA].revisions['main']}", cache) == folder
    assert published.requests == []


def test_a_new_commit_gets_a_new_folder_and_the_old_one_can_be_named(
    hub: StandIn, idefics: Path, cache: Path, tmp_path: Path
) -> None:
    first = hub.publish("me/idefics", idefics)
    old = prepare("me/idefics", cache)
    changed = shutil.copytree(idefics, tmp_path / "changed")
    (changed / "README.md").write_text("---\nlicense: mit\n---\n")
    second = hub.publish("me/idefics", changed)
    hub.publish("me/idefics", idefics, branch="refs/pr/1")
    new = prepare("me/idefics", cache)
    assert (read_origin(old).parts[0].commit, read_origin(new).parts[0].commit) == (first, second)
    assert prepare(f"me/idefics@{first}", cache) == prepare("me/idefics@refs/pr/1", cache) == old


def test_without_a_network_the_downloaded_files_are_imported(
    published: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(REDPAJAMA, cache)
    shutil.rmtree(cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    published.requests.clear()
    assert prepare(REDPAJAMA, cache) == folder
    assert is_ready(folder)
    assert published.requests == []


@pytest.mark.parametrize("revision", ["", "@refs/pr/1"])
def test_without_a_hub_the_last_import_is_served(
    revision: str, hub: StandIn, idefics: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.publish("me/idefics", idefics, branch=revision.removeprefix("@") or "main")
    folder = prepare(f"me/idefics{revision}", cache)
    shutil.rmtree(tmp_path / "hf")
    hub.is_down = True
    assert prepare(f"me/idefics{revision}", cache) == folder
    assert f"The last imported version of me/idefics{revision} is served" in caplog.text
    with pytest.raises(HubUnreachable, match="cannot be reached: check the network and HF_ENDPOINT"):
        prepare("me/idefics@other", cache)


def test_without_a_hub_the_commit_is_served_to_which_a_branch_was_moved_back(
    hub: StandIn, idefics: Path, cache: Path, tmp_path: Path
) -> None:
    hub.publish("me/idefics", idefics)
    folder = prepare("me/idefics", cache)
    changed = shutil.copytree(idefics, tmp_path / "changed")
    (changed / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.publish("me/idefics", changed)
    assert prepare("me/idefics", cache) != folder
    hub.publish("me/idefics", idefics)
    assert prepare("me/idefics", cache) == folder
    shutil.rmtree(tmp_path / "hf")
    hub.is_down = True
    assert prepare("me/idefics", cache) == folder


def test_without_a_hub_a_commit_that_was_imported_by_its_tag_is_served_as_a_branch(
    hub: StandIn, idefics: Path, cache: Path, tmp_path: Path
) -> None:
    for branch in ("v1", "main"):
        hub.publish("me/idefics", idefics, branch=branch)
    folder = prepare("me/idefics@v1", cache)
    assert prepare("me/idefics", cache) == folder
    shutil.rmtree(tmp_path / "hf")
    hub.is_down = True
    assert prepare("me/idefics", cache) == prepare("me/idefics@v1", cache) == folder


def test_a_cache_that_cannot_be_written_serves_what_it_has(
    hub: StandIn, idefics: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.publish("me/idefics", idefics)
    folder = prepare("me/idefics", cache)
    (file,) = cache.glob(".me--idefics@*")
    file.unlink()
    file.mkdir()
    assert prepare("me/idefics", cache) == folder
    assert "a start without a hub may not find me/idefics" in caplog.text


def test_without_a_hub_no_other_repository_is_served(hub: StandIn, idefics: Path, cache: Path, tmp_path: Path) -> None:
    hub.publish("me/idefics", idefics)
    hub.publish("me/idefics-instruct", idefics)
    folder = prepare("me/idefics", cache)
    prepare("me/idefics-instruct", cache)
    shutil.rmtree(tmp_path / "hf")
    hub.is_down = True
    assert prepare("me/idefics", cache) == folder
    shutil.rmtree(folder)
    with pytest.raises(HubUnreachable):
        prepare("me/idefics", cache)


def test_an_import_runs_in_a_process_of_its_own_and_its_error_is_one_line(
    hub: StandIn, idefics: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(idefics, tmp_path / "misfit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 49}))
    hub.publish("me/misfit", folder)
    with pytest.raises(
        ModelNameError, match=r"^me/misfit cannot be imported: .* does not fit the model\. misshapen"
    ) as error:
        prepare("me/misfit", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
