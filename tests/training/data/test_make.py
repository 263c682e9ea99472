"""Tests of the command that builds shards from a folder or a JSONL file, whose shards the training stream reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import VISION, prompt_tokenizer
from tests.training.toy import COLOURS, png
from training.config import SetConfig
from training.data.shards import read_shard
from training.data.stream import ShardStream, find_shards

ROOT = Path(__file__).resolve().parents[3]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training.data.make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_folder_of_images_with_texts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for i, (name, colour) in enumerate(COLOURS.items()):
        file = (source / "deep" if i % 2 else source) / f"{name}.png"
        file.write_bytes(png(colour))
        file.with_suffix(".txt").write_text(name)
    (source / "unnamed.png").write_bytes(png((1, 2, 3)))
    finished = make(str(source), "--out", str(tmp_path / "shards"), "--per-shard", "3")
    assert (finished.returncode, finished.stdout) == (0, f"4 records in {tmp_path / 'shards'}\n")
    shards = sorted((tmp_path / "shards").iterdir())
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar"]
    texts = {record.files["txt"].decode() for shard in shards for record in read_shard(shard)}
    assert texts == set(COLOURS)


def test_a_jsonl_of_documents_is_read_back_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    lines = tmp_path / "source.jsonl"
    lines.write_text(json.dumps({"texts": ["see", None, "red"], "images": [None, "a.png", None]}) + "\n")
    assert make(str(lines), "--out", str(tmp_path / "shards")).returncode == 0
    config = SetConfig(name="d", kind="documents", shards=str(tmp_path / "shards/*.tar"))
    prepared = ShardStream(find_shards(config.shards), config, prompt_tokenizer(), VISION, seed=0).take()
    assert prompt_tokenizer().decode(prepared.tokens.token_ids, skip_special_tokens=False) == (
        "see<|endofchunk|><image>red<|endofchunk|></s>"
    )
    assert len(prepared.media) == 1


def test_an_invalid_line_is_named_in_the_error(tmp_path: Path) -> None:
    lines = tmp_path / "source.jsonl"
    lines.write_text('{"image": "absent.png", "text": "x"}\n')
    finished = make(str(lines), "--out", str(tmp_path / "shards"))
    assert finished.returncode == 1
    assert "source.jsonl, line 1" in finished.stderr
