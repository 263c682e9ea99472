"""Evaluate the default model with more shots than any training sequence had; the last line is JSON.

`python -m evaluation.paper.shots` shows held-out labels with novel words, and asks for the word of another image after each
number of shots. The results are stored for `python -m evaluation.paper`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from evaluation.binding import Binding, sample_episodes
from evaluation.counts import at_least
from evaluation.options import add_data_option
from model.folder import load_folder
from model.prompt import PromptTokenizer
from model.zoo.default import prepare
from training.default.catalogue import Catalogue
from training.few_shot.images import SHOTS
from training.stored_runs import write_run

FILE = Path(__file__).parent / "runs" / "shots.json"
WAYS = 4
SEED = 31


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.paper.shots", description=__doc__)
    parser.add_argument("--episodes", type=at_least(1), default=400, help="queries, each after every number of shots")
    add_data_option(parser)
    parser.add_argument("--threads", type=at_least(1), default=1, help="torch threads (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = prepare()
    model = load_folder(folder, "cpu", torch.float32)
    catalogue = Catalogue(options.data)
    binding = Binding(model, PromptTokenizer.load(folder, model.config.prompt), catalogue)
    episodes = sample_episodes(catalogue.held_out_labels, WAYS, max(SHOTS) // WAYS, options.episodes, SEED)
    answers = [(episode.answer, binding.answer_in_context(episode, SHOTS)) for episode in episodes]
    correct = {
        str(number): "".join(str(int(chosen[number] == answer)) for answer, chosen in answers) for number in SHOTS
    }
    settings = {"episodes": options.episodes, "ways": WAYS, "shots": SHOTS, "seed": SEED, "model": folder.name}
    write_run(FILE, settings, {"correct": correct})
    for shots, digits in correct.items():
        print(f"{shots} shots: {100 * digits.count('1') / len(digits):.1f}%")
    print(json.dumps(correct))


if __name__ == "__main__":
    main()
