"""Several answers, beams and grammars: each conforms to its definition and does not affect its neighbours."""

from __future__ import annotations

import json
import re
from collections import Counter
from threading import Event

import msgspec
import pytest

from server.engine import sequence
from server.engine.caches import blocks
from server.grammar import TrialUnavailable
from server.grammar.compiler import Grammars
from server.grammar.matcher import Matcher
from server.wire import Abort, Finished, Grammar, Sampling
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    MODELS,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
)
from tests.tiny_models import prompt_tokenizer

NUM_IDS = MODELS["flamingo"].config.language_model.num_token_ids


def test_n_answers_share_the_prompt() -> None:
    answer = client("flamingo")
    hot = Sampling(max_tokens=6, temperature=1.0, seed=7, ignore_eos=True, n=3)
    answer.engine.add(FEW_SHOT.request("a", hot))
    most_shared = 0
    while answer.engine.has_work():
        answer.step()
        used = {block for sequence in answer.engine.scheduler.running for block in sequence.block_table}
        most_shared = max(most_shared, sum(answer.engine.blocks._references[block] == 3 for block in used))
    assert most_shared == (len(FEW_SHOT.request("x").prompt.token_ids) - 1) // CONFIG.block_size
    by_index = {i: [t.token_id for t in answer.tokens["a"] if t.index == i] for i in range(3)}
    assert all(len(tokens) == 6 for tokens in by_index.values())
    assert len({tuple(tokens) for tokens in by_index.values()}) > 1
    single = client("flamingo")
    single.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=6, temperature=1.0, seed=7, ignore_eos=True)))
    single.run()
    assert by_index[0] == single.ids("a")
    assert_all_released(answer.engine)


def test_a_negative_seed_is_another_seed() -> None:
    answer, seeds = client("flamingo"), (7, -7)
    for seed in seeds:
        hot = Sampling(max_tokens=6, temperature=2.0, seed=seed, ignore_eos=True)
        answer.engine.add(FEW_SHOT.request(str(seed), hot))
    answer.run()
    assert answer.ids("7") != answer.ids("-7")


def test_the_blocks_of_a_prompt_are_hashed_once_for_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 15 more answers to a prompt of 8,000 tokens took 0.13 seconds of one step."""
    answer, hashed = client("flamingo"), Counter[tuple[bytes, tuple[int, ...]]]()

    def block_hash(parent: bytes, token_ids: list[int], keys: list[bytes]) -> bytes:
        hashed[parent, tuple(token_ids)] += 1
        return blocks.block_hash(parent, token_ids, keys)

    monkeypatch.setattr(sequence, "block_hash", block_hash)
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=1, temperature=1.0, seed=7, n=5)))
    answer.run()
    assert len(answer.tokens["a"]) == 5
    assert set(hashed.values()) == {1}


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("index", [0, 1])
def test_an_aborted_answer_ends_and_the_others_continue(index: int, num_tokens: int) -> None:
    whole, cut = client("flamingo"), client("flamingo")
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=7, ignore_eos=True, n=3)
    for answer in (whole, cut):
        answer.engine.add(FEW_SHOT.request("a", sampling))
        while sum(token.index == index for token in answer.tokens.get("a", [])) < num_tokens:
            answer.step()
        if answer is cut:
            for _ in range(2):  # the second abort has no effect
                answer.engine.abort(Abort("a", index))
        answer.run()
    for other in {0, 1, 2} - {index}:
        assert [t for t in cut.tokens["a"] if t.index == other] == [t for t in whole.tokens["a"] if t.index == other]
    assert cut.finished["a"] == Finished(request_id="a", index=index, finish_reason="abort")
    assert sum(t.index == index for t in cut.tokens["a"]) == num_tokens
    assert_all_released(cut.engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_an_answer_without_a_token_is_not_aborted(num_steps: int) -> None:
    """The prompt is computed for all answers, and the first one reports its log-probabilities."""
    whole, kept = client("flamingo"), client("flamingo")
    sampling = Sampling(max_tokens=3, temperature=1.0, seed=7, ignore_eos=True, n=2, prompt_logprobs=0)
    for answer in (whole, kept):
        answer.engine.add(FEW_SHOT.request("a", sampling))
        for _ in range(num_steps):
            answer.step()
        if answer is kept:
            answer.engine.abort(Abort("a", 0))
        answer.run()
    assert kept.tokens == whole.tokens
    assert kept.scores == whole.scores
    assert_all_released(kept.engine)


@pytest.mark.parametrize("beam_width", [0, 3])
def test_with_max_tokens_0_every_answer_ends_after_the_prompt(beam_width: int) -> None:
    engine = client("flamingo").engine
    engine.add(Prompt(((-1, 5),)).request("a", Sampling(max_tokens=0, beam_width=beam_width, n=2, prompt_logprobs=1)))
    events = [event for _ in range(4) for event in engine.step()]
    ended = [Finished(request_id="a", index=index, finish_reason="length") for index in range(2)]
    assert [event for event in events if isinstance(event, Finished)] == ended
    assert_all_released(engine)


def test_aborting_the_last_answer_ends_the_request() -> None:
    answer = client("flamingo")
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=9, ignore_eos=True, n=2)))
    while len(answer.tokens.get("a", [])) < 2:
        answer.step()
    for index in (1, 0, 5):
        answer.engine.abort(Abort("a", index))
    answer.run(2)
    assert_all_released(answer.engine)


@pytest.mark.parametrize(
    ("grammar", "form"),
    [
        (Grammar(kind="choice", choices=("cat", "dog", "a dog")), r"cat|dog|a dog"),
        (Grammar(kind="regex", text=r"[0-9]{3}-[a-c]+x"), r"[0-9]{3}-[a-c]+x"),
        (Grammar(kind="json", text='{"type": "integer", "minimum": 10, "maximum": 99}'), r"[1-9][0-9]"),
    ],
)
def test_answers_match_their_grammar(grammar: Grammar, form: str) -> None:
    answer = client("flamingo")
    free = Sampling(max_tokens=40, temperature=2.0, seed=1, grammar=grammar, n=2)
    answer.engine.add(FEW_SHOT.request("a", free))
    answer.engine.add(FEW_SHOT.request("neighbour"))
    answer.run()
    tokenizer = prompt_tokenizer()
    for index in range(2):
        text = tokenizer.decode([t.token_id for t in answer.tokens["a"] if t.index == index])
        assert re.fullmatch(form, text), text
    assert_equals_reference("flamingo", FEW_SHOT, answer, "neighbour")
    assert_all_released(answer.engine)


def test_json_is_whole_within_max_tokens() -> None:
    """The tiny model's strings have no reason to end; the tokens of the last one may be all that `max_tokens` permits."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
        "required": ["a", "b"],
    }
    answer = client("flamingo")
    grammar = Grammar(kind="json", text=json.dumps(schema))
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=60, temperature=2.0, seed=1, grammar=grammar, n=3)))
    answer.run()
    for index in range(3):
        token_ids = [t.token_id for t in answer.tokens["a"] if t.index == index]
        text = json.loads(prompt_tokenizer().decode(token_ids))
        assert text.keys() == {"a", "b"}
        assert len(text["a"]) + len(text["b"]) > 5
    assert answer.finished["a"].finish_reason == "stop"


def test_json_that_is_whole_with_its_last_token_has_stopped() -> None:
    answer = client("flamingo")
    grammar = Grammar(kind="json", text='{"enum": ["cat"]}')
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=len('"cat"'), grammar=grammar)))
    answer.run()
    assert [token.finish_reason for token in answer.tokens["a"]] == [None] * 5
    assert answer.finished["a"].finish_reason == "stop"


@pytest.mark.parametrize("min_tokens", [2, 3])
def test_a_grammar_that_ends_before_min_tokens_fails_the_request(min_tokens: int) -> None:
    answer = client("flamingo")
    grammar = Grammar(kind="choice", choices=("ab",), field="structured_outputs.choice")
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=8, min_tokens=min_tokens, n=2, grammar=grammar)))
    answer.run()
    end = answer.finished["a"]
    if min_tokens == 2:
        assert (end.finish_reason, end.error) == ("stop", "")
    else:
        assert (end.finish_reason, end.param) == ("error", grammar.field)
        assert "is complete after 2 tokens, before min_tokens" in end.error
    assert_all_released(answer.engine)


def test_an_invalid_grammar_fails_its_request_and_the_error_names_its_field() -> None:
    answer = client("flamingo")
    grammar = Grammar(kind="regex", text="((", field="tools")
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=4, grammar=grammar)))
    answer.run()
    finished = answer.finished["a"]
    assert (finished.finish_reason, finished.param) == ("error", "tools")
    assert finished.error.startswith("tools: ")
    assert "invalid regular expression" in finished.error
    assert_all_released(answer.engine)


def test_a_grammar_that_cannot_be_checked_now_fails_its_request_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, grammars = with_slow_grammars(monkeypatch)
    monkeypatch.setattr(grammars, "_matcher", _refuse_for_a_while)
    answer.engine.add(FEW_SHOT.request("a", CAT))
    answer.run(20_000)
    finished = answer.finished["a"]
    assert (finished.error, finished.param, finished.is_temporary) == ("not now", "", True)
    assert_all_released(answer.engine)


def _refuse_for_a_while(grammar: Grammar) -> Matcher:
    raise TrialUnavailable("not now")


class SlowGrammars(Grammars):
    """Grammars that are compiled once `may_compile` is set, and counted."""

    def __init__(self) -> None:
        super().__init__(prompt_tokenizer())
        self.may_compile = Event()
        self.num_compiled = 0

    def _matcher(self, grammar: Grammar) -> Matcher:
        assert self.may_compile.wait(60)
        self.num_compiled += 1
        return super()._matcher(grammar)


def with_slow_grammars(monkeypatch: pytest.MonkeyPatch) -> tuple[Client, SlowGrammars]:
    grammars = SlowGrammars()
    monkeypatch.setattr("server.engine.engine.Grammars", lambda *_: grammars)
    return client("flamingo"), grammars


CAT = Sampling(max_tokens=9, n=4, grammar=Grammar(kind="regex", text="cats?"))


def test_a_grammar_that_is_compiled_delays_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, grammars = with_slow_grammars(monkeypatch)
    answer.engine.add(FEW_SHOT.request("a", CAT))
    answer.engine.add(FEW_SHOT.request("neighbour"))
    while "neighbour" not in answer.tokens or answer.tokens["neighbour"][-1].finish_reason is None:
        answer.step()
    assert_equals_reference("flamingo", FEW_SHOT, answer, "neighbour")
    assert "a" not in answer.tokens
    answer.step()
    assert not answer.engine.is_waiting_for_media()  # the worker must not wait for a message
    grammars.may_compile.set()
    answer.run(20_000)
    tokenizer = prompt_tokenizer()
    texts = [tokenizer.decode([t.token_id for t in answer.tokens["a"] if t.index == index]) for index in range(4)]
    assert all(re.fullmatch("cats?", text.removesuffix("</s>")) for text in texts), texts
    assert grammars.num_compiled == 1
    assert_all_released(answer.engine)


def test_a_request_may_be_aborted_while_its_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, grammars = with_slow_grammars(monkeypatch)
    answer.engine.add(FEW_SHOT.request("a", CAT))
    answer.step()
    answer.engine.abort(Abort("a", 1))
    answer.engine.abort(Abort("a"))
    answer.run()
    assert answer.finished["a"].finish_reason == "abort"
    assert_all_released(answer.engine)
    grammars.may_compile.set()
    answer.engine.add(FEW_SHOT.request("again", CAT))
    answer.run(20_000)
    assert answer.tokens["again"]
    assert_all_released(answer.engine)


def test_the_grammar_of_an_aborted_request_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, grammars = with_slow_grammars(monkeypatch)
    dogs = msgspec.structs.replace(CAT, grammar=Grammar(kind="regex", text="dogs?"))
    answer.engine.add(FEW_SHOT.request("first", CAT))
    answer.engine.add(FEW_SHOT.request("aborted", dogs))
    answer.engine.abort(Abort("aborted"))
    grammars.may_compile.set()
    answer.run(20_000)
    assert answer.tokens["first"]
    grammars.compile(Grammar(kind="regex", text="later")).result(60)
    assert grammars.num_compiled == 2


(S,) = prompt_tokenizer().encode_plain("s")
MANY = {f"k{i}": {"type": "string"} for i in range(600)}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        # after "cat", the grammar permits an "s" or the end, and min_tokens forbids both
        (
            Sampling(
                max_tokens=9,
                min_tokens=8,
                grammar=Grammar(kind="regex", text="cat(s*)", field="x"),
                stop_token_ids=(S,),
            ),
            "no next token is permitted",
        ),
        # found to be too complex after the first token
        (
            Sampling(max_tokens=9, grammar=Grammar(kind="json", text=json.dumps({"properties": MANY}), field="x")),
            "too many parts of the grammar may come next, the limit is 2000",
        ),
    ],
)
def test_an_answer_that_its_grammar_cannot_continue_fails_alone(sampling: Sampling, message: str) -> None:
    answer = client("flamingo")
    bias = dict.fromkeys(prompt_tokenizer().encode_plain("{"), 100.0)
    answer.engine.add(FEW_SHOT.request("a", msgspec.structs.replace(sampling, logit_bias=bias)))
    answer.engine.add(FEW_SHOT.request("neighbour"))
    answer.run()
    assert answer.finished["a"].param == "x"
    assert answer.finished["a"].error.startswith("x: ")
    assert message in answer.finished["a"].error
    assert_equals_reference("flamingo", FEW_SHOT, answer, "neighbour")
    assert_all_released(answer.engine)


def test_answers_whose_grammar_takes_too_long_fail_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.grammar.matcher.TOKEN_SECONDS", 0.0)
    monkeypatch.setattr("server.grammar.matcher.REQUEST_SECONDS", 1e-9)
    answer = client("flamingo")
    grammar = Grammar(kind="regex", text="[a-z]{8}", field="structured_outputs.regex")
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=8, n=2, grammar=grammar)))
    answer.engine.add(FEW_SHOT.request("neighbour"))
    answer.run()
    end = answer.finished["a"]
    assert (end.finish_reason, end.param) == ("error", grammar.field)
    assert end.error.endswith("the parts of the grammar that may come next take too long to find")
    assert_equals_reference("flamingo", FEW_SHOT, answer, "neighbour")
    assert_all_released(answer.engine)
