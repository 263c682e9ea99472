"""Stages 4 to 6 as data: gated layers, decode steps and the time to the first token, which `bench.whole_model` measures.

This package must not import the model and the server; the process of a measurement imports `bench.whole_model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kernels.bench.sizes import Sizes
from kernels.bench.task import Task

LAYER, STEP, FIRST_TOKEN = "4 gated layer", "5 decode step", "6 first token"
MEASURES = "bench.whole_model"
GATES = ("gates folded", "gates separate")
REPLAYED, WRITTEN, PROJECTED = "replayed", "written and replayed", "media projected at every step"
CACHED = (
    "nothing cached",
    "visual tokens cached",
    "visual tokens and pages cached",
    "all but a new image cached",
)


def tasks(sizes: Sizes) -> Iterator[Task]:
    yield from _layers(sizes)
    yield from _steps(sizes)
    yield from _first_tokens(sizes)


def _layers(sizes: Sizes) -> Iterator[Task]:
    shapes = [(n, 1) for n in sizes.decode] + [(n, sizes.shot_tokens) for n in sizes.prefill]
    for spec in sizes.models:
        for num_tokens, run in shapes:
            for name in GATES:
                yield Task(
                    stage=LAYER,
                    case=f"{spec.name}, {num_tokens} tokens",
                    name=name,
                    function=f"{MEASURES}:measure_layer",
                    arguments={"spec": spec.name, "num_tokens": num_tokens, "run": run, "name": name},
                )


def _steps(sizes: Sizes) -> Iterator[Task]:
    task = partial(Task, stage=STEP, function=f"{MEASURES}:measure_step")
    for spec in sizes.models:
        for num_sequences in sizes.step:
            for is_shared in (True, False):
                case = (
                    f"{spec.name}, {num_sequences} of {sizes.context} tokens{', one support set' if is_shared else ''}"
                )
                names = [REPLAYED, WRITTEN] if is_shared else [REPLAYED]
                if is_shared and num_sequences == sizes.step[-1]:
                    names.append(PROJECTED)
                for name in names:
                    arguments = {"spec": spec.name, "sequences": num_sequences, "is_shared": is_shared, "name": name}
                    yield task(case=case, name=name, arguments=arguments)


def _first_tokens(sizes: Sizes) -> Iterator[Task]:
    for spec in sizes.models:
        for name in CACHED:
            yield Task(
                stage=FIRST_TOKEN,
                case=f"{spec.name}, {sizes.images} images, {sizes.context} tokens",
                name=name,
                function=f"{MEASURES}:measure_first_token",
                arguments={"spec": spec.name, "name": name},
            )
