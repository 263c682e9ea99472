"""Builds the task of each kind of request from the parts of the engine that it works with."""

from __future__ import annotations

from itertools import count

from model.prompt import PromptTokenizer
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Order
from server.engine.tasks.answers import Answers
from server.engine.tasks.beams import BeamAnswers
from server.engine.tasks.embedding import MediaEmbedding, TextEmbedding
from server.engine.tasks.inspection import Inspection
from server.engine.tasks.scoring import Scoring
from server.engine.tasks.task import SequenceTask, SideTask
from server.grammar import Grammars
from server.wire import Embed, EmbedText, Generate, Inspect, Request, Score


class TaskFactory:
    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: PromptTokenizer, grammars: Grammars) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._eos_ids = frozenset(tokenizer.eos_ids)
        self._grammars = grammars
        self._numbers = count()

    def create(self, request: Request) -> SequenceTask | SideTask:
        """Return the task of a request. Raises `RequestError` for a request that could never run."""
        scheduler, media, number = self._scheduler, self._scheduler.media, next(self._numbers)
        match request:
            case Generate():
                kind = BeamAnswers if request.sampling.beam_width else Answers
                order = Order(request.priority, request.arrived, number, request.client)
                return kind(request, order, scheduler, self._eos_ids, self._grammars)
            case Score():
                return Scoring(request, Order(request.priority, request.arrived, number, request.client), scheduler)
            case Embed():
                return MediaEmbedding(request, media)
            case EmbedText():
                return TextEmbedding(request, self._runner)
            case Inspect():
                return Inspection(request, self._runner, media)
