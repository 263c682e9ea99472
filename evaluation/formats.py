"""Print how weight formats, and media pages of 8 bits, change a model's predictions.

`python -m evaluation.formats [FOLDER ...]` computes a fixed text, alone and after a picture, in each format. On a CPU, the
references of the kernels compute it from the same packed weights that a GPU would have; the row "int4 on this CPU" comes
from the products that a server uses here for steps of few tokens. Each row is compared with bfloat16: by the
log-probabilities of the text's tokens, the divergence of the distributions, and how often both have the same most likely
token. The row float32 shows the effect of bfloat16 itself. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.media_attention import dequantise_pages, quantise_pages
from model.batch import MediaPages
from model.config import FlamingoConfig
from model.cpu import use_fast_formats
from model.flamingo import Flamingo
from model.folder import load_folder
from model.footprint import Footprint
from model.media import MediaLimits, load_image, resize
from model.prompt import PromptTokenizer
from model.quantised import KINDS, WeightFormat
from model.reference import encode, log_probs
from model.vision import normalise
from model.zoo.default import prepare

Name = Literal["bfloat16", "float32", "fp8", "int8", "int4", "int4 on this CPU", "pages of 8 bits"]
BASE: Name = "bfloat16"
ON_CPU: Name = "int4 on this CPU"
PAGES: Name = "pages of 8 bits"
NAMES: tuple[Name, ...] = (BASE, "float32", *KINDS, ON_CPU, PAGES)
ROOT = Path(__file__).resolve().parents[1]
TEXT = Path(__file__).with_name("perplexity_text.txt")
PICTURE = ROOT / "docs" / "examples" / "noto-elephant.png"
COLUMNS = ("passage", "format", "GiB", "perplexity", "mean difference", "largest", "divergence", "same token")


class Passage(NamedTuple):
    """Tokens, and the media item that each reads; the first `num_given` are not predicted."""

    name: str
    token_ids: list[int]
    media_index: list[int]
    num_given: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """A format's predictions of a passage, compared with those in bfloat16."""

    passage: str
    name: Name
    gib: float  # of the weights of decoder and gated layers
    perplexity: float
    mean_difference: float  # of the tokens' log-probabilities, absolute
    largest_difference: float
    divergence: float  # of the distributions, per token, in nats
    same_token: float

    def cells(self) -> tuple[str, ...]:
        numbers = (self.mean_difference, self.largest_difference, self.divergence)
        first = (self.passage, self.name, f"{self.gib:.3f}", f"{self.perplexity:.3f}")
        return (*first, *(f"{number:.4f}" for number in numbers), f"{self.same_token:.3f}")


def passages(tokenizer: PromptTokenizer, num_tokens: int) -> list[Passage]:
    ids = tokenizer.encode_plain(TEXT.read_text(encoding="utf-8"))[:num_tokens]
    after = [tokenizer.media_token_id, *ids]
    return [Passage("text", ids, [-1] * len(ids)), Passage("text after a picture", after, [0] * len(after), 2)]


def load(folder: Path, name: Name) -> Flamingo:
    """Load a model in a format, with its gates folded as on the server."""
    weight_format: WeightFormat | None = name if name in KINDS else None
    dtype = torch.float32 if name in ("float32", ON_CPU) else torch.bfloat16
    model = load_folder(folder, "cpu", dtype, weight_format=weight_format)
    model.fold_gates()
    if name == ON_CPU:
        use_fast_formats(model, ("int4",))
    return model


def media_pages(model: Flamingo, name: Name) -> MediaPages:
    """Return the page of the picture, rounded to 8 bits for the format `PAGES`."""
    square = resize(load_image(PICTURE.read_bytes(), MediaLimits()), model.config.vision)
    pixels = normalise(torch.from_numpy(square.copy())[None], model.config.vision)
    with torch.inference_mode():
        if name == ON_CPU:  # its encoder stays float32
            return model.fresh_media(model.encode_media(pixels[None]).to(torch.bfloat16))
        media = encode(model, [pixels])
        if name != PAGES:
            return media
        return replace(media, pages=dequantise_pages(*quantise_pages(media.pages)).to(media.pages.dtype))


def predict(model: Flamingo, media: MediaPages, passage: Passage) -> Tensor:
    """Return the log-probabilities [T, V] with which each token after the given ones was predicted."""
    return log_probs(model, passage.token_ids, passage.media_index, media)[passage.num_given - 1 : -1]


def compare(passage: Passage, name: Name, gib: float, rows: Tensor, base: Tensor) -> Row:
    targets = torch.tensor(passage.token_ids[passage.num_given :])[:, None]
    chosen, expected = (of.gather(1, targets).double() for of in (rows, base))
    difference = (chosen - expected).abs()
    return Row(
        passage.name,
        name,
        gib,
        perplexity=float(chosen.mean().neg().exp()),
        mean_difference=float(difference.mean()),
        largest_difference=float(difference.max()),
        divergence=float((base.exp() * (base - rows)).sum(-1).mean()),
        same_token=float((rows.argmax(-1) == base.argmax(-1)).float().mean()),
    )


def weights_gib(config: FlamingoConfig, name: Name) -> float:
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    weight_format = "int4" if name == ON_CPU else name if name in KINDS else None
    weights = Footprint.of(config, dtype, weight_format=weight_format).weights
    return (weights["language_model"] + weights["gated"]) / 2**30


def measure(folder: Path, names: Sequence[Name], num_tokens: int) -> Iterator[Row]:
    """Yield the rows of a model folder; bfloat16 comes first."""
    base: dict[str, Tensor] = {}
    for name in dict.fromkeys((BASE, *names)):
        model = load(folder, name)
        media = media_pages(model, name)
        gib = weights_gib(model.config, name)
        for passage in passages(PromptTokenizer.load(folder, model.config.prompt), num_tokens):
            if name == PAGES and not max(passage.media_index) >= 0:
                continue  # no token reads a page
            rows = predict(model, media, passage)
            yield compare(passage, name, gib, rows, base.setdefault(passage.name, rows))


def table(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: row.passage)
    cells = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in ordered)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _num_tokens(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{number} is less than 2: the first token of a text is not predicted")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.formats", description=__doc__)
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="model folders (default: the default one)"
    )
    parser.add_argument("--formats", nargs="+", choices=NAMES, default=NAMES, help="the rows (default: all)")
    parser.add_argument("--tokens", type=_num_tokens, default=1024, help="tokens of the text (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    results = {}
    for folder in parsed.folders or [prepare()]:
        rows = list(measure(folder, parsed.formats, parsed.tokens))
        results[str(folder)] = rows
        print(f"{folder}\n\n{table(rows)}\n", flush=True)
    print(json.dumps({name: [asdict(row) for row in rows] for name, rows in results.items()}))


if __name__ == "__main__":
    main()
