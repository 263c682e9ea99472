"""An engine on a divided model: it gives the answers of the whole, and every rank holds its heads of all caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.batch import whole_sequences
from model.folder import save_folder
from server.engine.config import EngineConfig
from server.engine.device.runner import Runner
from server.engine.ranks.messages import CopyBlocks, FillPages, Followers, Forward, Table, decode
from server.wire import Abort, EmbedText, Inspect, Sampling
from tests.divided_engine import divided_engine
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGES,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
)
from tests.tiny_models import CONFIGS, FAMILIES, Family, byte_tokenizer, tiny_model

SPANS = Prompt(((-1, 3), (0, 5), (1, 4), (3, 2)), shots_attend="alone", step=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tensors = tiny_model(CONFIGS[family]).state_dict().items()
        save_folder(folders / family, CONFIGS[family], tensors, byte_tokenizer().to_str())
    return folders


@contextmanager
def divided(folder: Path, config: EngineConfig = CONFIG) -> Iterator[tuple[Client, list[Runner]]]:
    with divided_engine(folder, config) as (engine, runners):
        yield Client(engine, dict(IMAGES)), runners


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_holds_its_heads_of_what_the_whole_model_holds(family: Family, folders: Path) -> None:
    whole = client(family)
    with divided(folders / family) as (answer, runners):
        for either in (whole, answer):
            either.engine.add(FEW_SHOT.request("a"))
            either.engine.add(SPANS.request("spans"))
            either.run()
        ranks = [answer.engine.runner, *runners]
        blocks = torch.cat([runner._kv.blocks for runner in ranks], 3)  # [L, N, 2, G, B, K]
        pages = torch.cat([runner._media.pages for runner in ranks], 2)  # [M, X, H, 2, R, K]
        torch.testing.assert_close(blocks, whole.engine.runner._kv.blocks, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pages, whole.engine.runner._media.pages, atol=1e-5, rtol=1e-5)
        for name, prompt in (("a", FEW_SHOT), ("spans", SPANS)):
            assert_equals_reference(family, prompt, answer, name)
        assert_all_released(answer.engine)


prompts = st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 12)), min_size=1, max_size=6).map(
    lambda shots: Prompt(tuple(shots))
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_requests(family: Family, data: st.DataObject, folders: Path) -> None:
    """Random prompts that share media, tiny pools that force preemption and eviction, small steps, arrivals, aborts."""
    config = replace(
        CONFIG,
        num_blocks=32,
        num_media_slots=data.draw(st.integers(2, 5)),
        max_tokens_per_step=data.draw(st.integers(8, 40)),
        max_sequences=data.draw(st.integers(1, 8)),
        host_media_bytes=data.draw(st.sampled_from([0, 600, 1 << 20])),
    )
    requested = data.draw(st.lists(prompts, min_size=1, max_size=5))
    aborted = data.draw(st.sets(st.integers(0, len(requested) - 1), max_size=2))
    with divided(folders / family, config) as (answer, _):
        for i, prompt in enumerate(requested):
            answer.engine.add(prompt.request(str(i)))
            answer.step()
            if i in aborted:
                answer.engine.abort(Abort(str(i)))
        answer.run()
        for i, prompt in enumerate(requested):
            if i not in aborted:
                assert_equals_reference(family, prompt, answer, str(i))
        assert_all_released(answer.engine)


def test_beams_copy_the_blocks_of_every_rank(folders: Path) -> None:
    request, whole = FEW_SHOT.request("a", Sampling(max_tokens=8, beam_width=3, n=2)), client("idefics")
    whole.engine.add(request)
    whole.run()
    with divided(folders / "idefics") as (answer, _):
        answer.engine.add(request)
        answer.run()
        assert answer.ids("a") == whole.ids("a")
        assert len(answer.ids("a")) == 16
        assert_all_released(answer.engine)


def test_every_rank_computes_proposed_tokens(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    propose = "server.engine.scheduler.num_worthwhile"
    monkeypatch.setattr(propose, lambda hit_share, cost, limit: limit if hit_share else 0)
    sampling, whole = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True), client("idefics")
    requests = [FEW_SHOT.request("a", sampling), SPANS.request("spans", sampling)]
    with divided(folders / "idefics", replace(CONFIG, speculative_tokens=4)) as (answer, _):
        for either in (whole, answer):
            for request in requests:
                either.engine.add(request)
            either.run()
        assert answer.engine.gauges()["spec_decode_num_accepted_tokens"] > 0
        for request in requests:
            assert answer.ids(request.request_id) == whole.ids(request.request_id)
        assert_all_released(answer.engine)


def test_an_evicted_page_comes_back_in_every_rank(folders: Path) -> None:
    with divided(folders / "openflamingo", replace(CONFIG, num_media_slots=2)) as (answer, _):
        for name, images in (("first", (0, 1)), ("second", (2, 3)), ("again", (1, 0))):
            answer.engine.add(Prompt(tuple((image, 5) for image in images)).request(name))
            answer.run()
        assert answer.engine.media.num_host_hits > 0
        assert_equals_reference("openflamingo", Prompt(((1, 5), (0, 5))), answer, "again")


def test_texts_are_embedded_in_pieces_between_steps(folders: Path) -> None:
    config = replace(CONFIG, max_tokens_per_step=16)
    texts = EmbedText(request_id="texts", texts=[list(range(1, 60)), [5, 6], [7]])
    aborted = EmbedText(request_id="aborted", texts=[list(range(60, 1, -1))])
    whole = client("openflamingo", config)
    whole.engine.add(texts)
    whole.run()
    with divided(folders / "openflamingo", config) as (answer, _):
        for request in (texts, aborted, FEW_SHOT.request("a")):
            answer.engine.add(request)
        for _ in range(3):
            answer.step()
        answer.engine.abort(Abort("aborted"))
        answer.run()
        assert_equals_reference("openflamingo", FEW_SHOT, answer, "a")
        np.testing.assert_allclose(answer.embedded["texts"], whole.embedded["texts"], atol=1e-5)
        assert "aborted" not in answer.embedded


def test_an_inspection_is_refused(folders: Path) -> None:
    with divided(folders / "idefics") as (answer, _):
        answer.engine.add(Inspect(request_id="map", prompt=FEW_SHOT.request("a").prompt, token=5))
        answer.run()
        assert answer.finished["map"].error.startswith("attention cannot be inspected with tensor_parallel")


def test_messages_keep_tables_of_any_shape_and_type() -> None:
    sent: list[bytes] = []
    followers = Followers([sent.append])
    followers.copy_blocks([(1, 2), (3, 4)])
    followers.fill_pages([5], torch.ones(1, 4, 16, dtype=torch.bfloat16))
    assert decode(sent[0]) == CopyBlocks([(1, 2), (3, 4)])
    filled = decode(sent[1])
    assert isinstance(filled, FillPages)
    assert filled.slots == [5]
    assert torch.equal(filled.visual_tokens.tensor(), torch.ones(1, 4, 16))
    for table in (torch.zeros(0, dtype=torch.int64), torch.arange(6, dtype=torch.int32).view(2, 3)):
        read = Table.of(table).tensor()
        assert read.dtype == table.dtype
        assert torch.equal(read, table)
    followers.forward(replace(whole_sequences([[7, 8]], [[-1, -1]]), media_slot=None))
    forward = decode(sent[2])
    assert isinstance(forward, Forward)
    assert forward.batch().media_slot is None
    assert forward.batch().token_ids.tolist() == [7, 8]
