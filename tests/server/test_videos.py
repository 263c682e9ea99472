"""Videos over HTTP: one frame per second, all frames count, and videos may have more frames than in training."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from model import reference
from model.flamingo import Flamingo
from model.folder import save_folder
from model.media import resize
from model.prompt import EndOfChunk, Media, Segment, Text, encode
from model.vision import normalise
from tests.server.test_main import TOKENIZER, Server, running
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

TRAINED_FRAMES, LONG_FRAMES, VISUAL_TOKENS = 8, 30, 64
TINY = CONFIGS["openflamingo"]
CONFIG = replace(TINY, resampler=replace(TINY.resampler, num_frames=TRAINED_FRAMES, num_latents=VISUAL_TOKENS))
RATE = 4
TOLERANCE = 2e-3
WORDS = Text("What happens? It ")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    save_folder(folder / "tiny", CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    with running(folder / "tiny", folder / "log", "-m", "server") as server:
        yield server


def film(colours: Sequence[tuple[int, int, int]]) -> bytes:
    """Return a video with one second per colour, `RATE` frames per second; the first of each has a white corner."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(RATE * len(colours)):
            image = Image.new("RGB", (48, 32), colours[i // RATE])
            if i % RATE == 0:
                image.paste((255, 255, 255), (0, 0, 24, 16))
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def pixels(data: bytes) -> torch.Tensor:
    """Return each `RATE`th of the frames that FFmpeg decodes, [F, 3, h, w]."""
    with av.open(io.BytesIO(data), mode="r") as container:
        images = [frame.to_image() for frame in container.decode(video=0)][::RATE]
    frames = np.stack([resize(image, CONFIG.vision) for image in images])
    return normalise(torch.from_numpy(frames), CONFIG.vision)


def noise(seed: int, seconds: int) -> list[tuple[int, int, int]]:
    rows = np.random.default_rng(seed).integers(0, 256, (seconds, 3)).tolist()
    return [(red, green, blue) for red, green, blue in rows]


def part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def expected(model: Flamingo, segments: Sequence[Segment], media: Sequence[torch.Tensor]) -> list[float]:
    """Return the reference's log-probability of each prompt token but the first."""
    prompt = encode(segments, TOKENIZER)
    table = reference.log_probs(model, prompt.token_ids, prompt.media_index, reference.encode(model, media))
    return [float(row[token]) for row, token in zip(table[:-1], prompt.token_ids[1:], strict=True)]


def token_logprobs(server: Server, *parts: dict[str, Any]) -> list[float]:
    body = server.complete(prompt=list(parts), max_tokens=0, echo=True, logprobs=0)
    logprobs: list[float] = body["choices"][0]["logprobs"]["token_logprobs"]
    return logprobs[1:]


def test_all_frames_of_a_clip_affect_the_answer(server: Server) -> None:
    """Two clips begin with the same second and continue differently; a third one has only that second."""
    start = (200, 30, 30)
    rises, falls, stays = (
        film([start, (30, 200, 30), (30, 30, 200)]),
        film([start, (0, 0, 0), (250, 250, 0)]),
        film([start]),
    )
    model, logprobs = tiny_model(CONFIG), []
    for clip in (rises, falls, stays):
        logprobs.append(token_logprobs(server, part(clip), text_part(WORDS.text)))
        assert logprobs[-1] == pytest.approx(expected(model, [Media(b"a"), WORDS], [pixels(clip)]), abs=TOLERANCE)
    assert torch.equal(pixels(rises)[0], pixels(falls)[0])
    for first, second in combinations(logprobs, 2):
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 20 * TOLERANCE


def test_the_order_of_frames_affects_the_answer(server: Server) -> None:
    colours = noise(1, 4)
    forth, back = film(colours), film(colours[::-1])
    forth_logprobs, back_logprobs = (
        token_logprobs(server, part(clip), text_part(WORDS.text)) for clip in (forth, back)
    )
    assert forth_logprobs == pytest.approx(
        expected(tiny_model(CONFIG), [Media(b"a"), WORDS], [pixels(forth)]), abs=TOLERANCE
    )
    assert max(abs(a - b) for a, b in zip(forth_logprobs, back_logprobs, strict=True)) > 20 * TOLERANCE


def test_more_frames_than_in_training_have_interpolated_embeddings(server: Server) -> None:
    """The result equals the reference, and a model whose table of thirty embeddings numpy has interpolated."""
    clip = film(noise(2, LONG_FRAMES))
    assert pixels(clip).shape[0] == LONG_FRAMES
    logprobs = token_logprobs(server, part(clip), text_part(WORDS.text))
    model = tiny_model(CONFIG)
    segments: list[Segment] = [Media(b"a"), WORDS]
    assert model.encode_media(pixels(clip)[None]).shape == (1, VISUAL_TOKENS, CONFIG.resampler.dim)
    assert logprobs == pytest.approx(expected(model, segments, [pixels(clip)]), abs=TOLERANCE)

    trained = model.state_dict()["resampler.frame_embeddings"].numpy()
    positions = np.linspace(0, TRAINED_FRAMES - 1, LONG_FRAMES)
    times = np.stack([np.interp(positions, np.arange(TRAINED_FRAMES), column) for column in trained.T], axis=1)
    whole = tiny_model(replace(CONFIG, resampler=replace(CONFIG.resampler, num_frames=LONG_FRAMES)))
    whole.load_state_dict({**model.state_dict(), "resampler.frame_embeddings": torch.from_numpy(times).float()})
    assert logprobs == pytest.approx(expected(whole, segments, [pixels(clip)]), abs=TOLERANCE)
    # the answer differs if the embeddings are repeated or end with copies of the last one
    for wrong in (np.minimum(np.arange(LONG_FRAMES), TRAINED_FRAMES - 1), np.arange(LONG_FRAMES) % TRAINED_FRAMES):
        whole.load_state_dict({**model.state_dict(), "resampler.frame_embeddings": torch.from_numpy(trained[wrong])})
        other = expected(whole, segments, [pixels(clip)])
        assert max(abs(a - b) for a, b in zip(logprobs, other, strict=True)) > 5 * TOLERANCE


def test_a_prompt_may_have_clips_and_images(server: Server) -> None:
    """One shot has a clip and one an image; the query is the clip again, by the id of its upload."""
    clip, still = film(noise(3, 5)), io.BytesIO()
    Image.new("RGB", (20, 10), "orange").save(still, "PNG")
    image = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(still.getvalue()).decode()}"},
    }
    uploaded = server.http.post("/v1/images", content=clip, headers={"Content-Type": "video/mp4"}).json()
    assert (uploaded["frames"], uploaded["width"], uploaded["height"]) == (5, 48, 32)
    end, shot, query = {"type": "end_of_chunk"}, text_part("Output: a"), text_part("Output:")
    by_id = {"type": "video_id", "video_id": uploaded["id"]}
    logprobs = token_logprobs(server, part(clip), shot, end, image, shot, end, by_id, query)
    square = resize(Image.open(still), CONFIG.vision)
    frames = [pixels(clip), normalise(torch.from_numpy(square.copy())[None], CONFIG.vision), pixels(clip)]
    media = [Media(bytes([i])) for i in range(3)]
    answer: list[Segment] = [Text("Output: a"), EndOfChunk()]
    segments: list[Segment] = [media[0], *answer, media[1], *answer, media[2], Text("Output:")]
    assert logprobs == pytest.approx(expected(tiny_model(CONFIG), segments, frames), abs=TOLERANCE)


def test_a_clip_by_url_and_by_id_is_encoded_once(server: Server) -> None:
    clip = film(noise(4, 3))
    uploaded = server.http.post("/v1/images", json={"url": part(clip)["video_url"]["url"]}).json()
    by_id = {"type": "video_id", "video_id": uploaded["id"]}
    details = [
        server.complete(prompt=[clip_part, text_part("x")], max_tokens=1)["usage"]["fewshot_details"]
        for clip_part in (by_id, part(clip), by_id)
    ]
    assert [(detail["media_encoded"], detail["media_cached"]) for detail in details] == [(1, 0), (0, 1), (0, 1)]


def test_a_clip_over_a_limit_is_refused_with_both_numbers(server: Server) -> None:
    for response in (
        server.http.post("/v1/completions", json={"prompt": [part(film([(0, 0, 0)] * 66)), text_part("x")]}),
        server.http.post("/v1/images", content=film([(0, 0, 0)] * 66), headers={"Content-Type": "video/mp4"}),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "invalid_media")
        assert "more than 64 frames at 1.0 per second" in error["message"]
