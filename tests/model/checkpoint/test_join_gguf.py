"""A GGUF file is joined as a language model, with its markers, its log-probabilities and its licence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.batch import NO_CACHE, whole_sequences
from model.checkpoint.__main__ import main
from model.config import PromptConfig
from model.hub.job import read_origin
from model.prompt import PromptTokenizer
from model.reference import encode as encode_media
from tests.model.checkpoint import test_gguf as gguf
from tests.model.checkpoint.test_join import CLIP, NEW_TOKENS, join


@pytest.mark.parametrize("add_bos", ["yes", "no"])
@torch.inference_mode()
def test_a_gguf_file_is_a_language_model(add_bos: str, tmp_path: Path) -> None:
    llama = gguf.write(tmp_path / "tiny.gguf", gguf.tiny_llama(tied=True), add_bos=add_bos, license="apache-2.0")
    model = join(tmp_path / "out", tmp_path / "tiny.gguf")
    begin = "<|endoftext|>" if add_bos == "yes" else ""
    eos = ("<|endofchunk|>", "<|im_end|>")
    assert model.config.prompt == PromptConfig(
        media_token="<image>", begin=begin, end_of_chunk="<|endofchunk|>", eos=eos, suppressed=("<image>",)
    )
    assert model.config.language_model.num_new_tokens == 2
    tokenizer = PromptTokenizer.load(tmp_path / "out", model.config.prompt)
    assert [tokenizer.id_of(token) for token in NEW_TOKENS] == [len(gguf.TOKENS), len(gguf.TOKENS) + 1]
    token_ids = [*tokenizer.encode_plain("h the 42"), *tokenizer.encode_plain("the")]
    batch = whole_sequences([token_ids], [[-1] * len(token_ids)])
    ours = model(batch, NO_CACHE, encode_media(model, []))[:, : len(gguf.TOKENS)]
    torch.testing.assert_close(ours, llama(torch.tensor([token_ids])).logits[0], atol=1e-4, rtol=0)
    (part, _) = read_origin(tmp_path / "out").parts
    assert (part.part, part.repository, part.license) == ("language model", "tiny.gguf", "apache-2.0")


def test_a_file_that_is_not_gguf_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.bin").write_bytes(b"not a GGUF file at all, but long enough to be looked at")
    experts = ["--language-model", str(tmp_path / "model.bin"), "--vision-model", str(CLIP)]
    assert main(["join", *experts, "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.bin cannot be read as GGUF" in line
