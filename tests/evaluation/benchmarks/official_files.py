"""Small files in the official formats of all benchmarks, with tiny images and videos, in the layouts of their releases."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
from PIL import Image

SIZE = 16
COLOURS = ("red", "blue", "green", "yellow")


def write_image(path: Path, number: int) -> None:
    """Write a small image whose colours depend on a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (SIZE, SIZE), COLOURS[number % len(COLOURS)])
    image.putpixel((number % SIZE, 0), (number % 256, 0, 0))
    image.save(path)


def write_video(path: Path, seconds: int = 2, number: int = 0) -> None:
    """Write a video that shows another colour each second, in the container that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for second in range(seconds):
            frame = av.VideoFrame.from_image(Image.new("RGB", (SIZE, SIZE), COLOURS[(number + second) % len(COLOURS)]))
            for _ in range(4):
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def coco(folder: Path) -> None:
    images = []
    for number, split in enumerate(("train", "restval", "test", "test", "val")):
        name = f"COCO_val2014_{number:012d}.jpg"
        write_image(folder / "val2014" / name, number)
        sentences = [{"raw": f"A {COLOURS[number % 4]} thing {n}.", "tokens": [], "sentid": n} for n in range(2)]
        images.append(
            {
                "filepath": "val2014",
                "filename": name,
                "split": split,
                "cocoid": number,
                "imgid": number,
                "sentences": sentences,
            }
        )
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def flickr30k(folder: Path) -> None:
    images = []
    for number, split in enumerate(("train", "train", "test", "test")):
        write_image(folder / "flickr30k-images" / f"{100 + number}.jpg", number)
        sentences = [{"raw": f"A {COLOURS[number]} thing ."}]
        images.append({"filename": f"{100 + number}.jpg", "split": split, "imgid": number, "sentences": sentences})
    write_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def _vqa(folder: Path, questions: str, annotations: str, subtype: str, stemmed: bool = False) -> None:
    questions_list, annotation_list = [], []
    for number in range(3):
        write_image(folder / subtype / f"COCO_{subtype}_{number:012d}.jpg", number)
        identity = {"image_id": number, "question_id": 10 * number + 1}
        questions_list.append({**identity, "question": "What colour is it?"})
        people = [{"answer_id": n + 1, "answer": COLOURS[number], "answer_confidence": "yes"} for n in range(10)]
        if stemmed:
            people = [{**person, "raw_answer": f"{COLOURS[number]}s"} for person in people]
        annotation_list.append({**identity, "answers": people, "question_type": "what", "answer_type": "other"})
    common = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subtype}
    write_json(folder / questions, {**common, "task_type": "Open-Ended", "questions": questions_list})
    write_json(folder / annotations, {**common, "annotations": annotation_list})


def vqav2(folder: Path) -> None:
    for split in ("train", "val"):
        questions, annotations = (
            f"v2_OpenEnded_mscoco_{split}2014_questions.json",
            f"v2_mscoco_{split}2014_annotations.json",
        )
        _vqa(folder, questions, annotations, f"{split}2014")
    write_image(folder / "test2015" / "COCO_test2015_000000000007.jpg", 7)
    question = {"image_id": 7, "question": "How many?", "question_id": 71}
    name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    write_json(folder / name, {"data_subtype": "test-dev2015", "questions": [question]})


def okvqa(folder: Path) -> None:
    for split in ("train", "val"):
        questions, annotations = f"OpenEnded_mscoco_{split}2014_questions.json", f"mscoco_{split}2014_annotations.json"
        _vqa(folder, questions, annotations, f"{split}2014", stemmed=True)


def textvqa(folder: Path) -> None:
    for split, first in (("train", 0), ("val", 10), ("test", 20)):
        rows: list[dict[str, Any]] = []
        for number in range(first, first + 2):
            write_image(folder / ("test_images" if split == "test" else "train_images") / f"{number:016x}.jpg", number)
            answers = {} if split == "test" else {"answers": ["stop"] * 6 + ["halt"] * 4}
            rows.append(
                {
                    "question": "What does it say?",
                    "image_id": f"{number:016x}",
                    "question_id": number,
                    "set_name": split,
                }
                | answers
            )
        write_json(
            folder / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "dataset_version": "0.5.1", "data": rows}
        )


def vizwiz(folder: Path) -> None:
    for split in ("train", "val", "test"):
        rows: list[dict[str, Any]] = []
        for number in range(2):
            name = f"VizWiz_{split}_{number:08d}.jpg"
            write_image(folder / split / name, number)
            people = [{"answer": COLOURS[number], "answer_confidence": "yes"}] * 10
            answers = {} if split == "test" else {"answers": people, "answer_type": "other", "answerable": 1}
            rows.append({"image": name, "question": "What colour is it?"} | answers)
        write_json(folder / "Annotations" / f"{split}.json", rows)


def _video_qa(folder: Path, name: str, suffix: str) -> None:
    for split, first in (("train", 1), ("val", 3), ("test", 5)):
        rows = []
        for number in (first, first + 1):
            write_video(folder / "video" / f"{name}{number}{suffix}", number=number)
            rows.append({"id": number, "video_id": number, "question": "what is it?", "answer": COLOURS[number % 4]})
        write_json(folder / f"{split}_qa.json", rows)


def msvdqa(folder: Path) -> None:
    _video_qa(folder, "vid", ".avi")


def msrvttqa(folder: Path) -> None:
    _video_qa(folder, "video", ".mp4")
    # a dead video, which the whole benchmark lacks some of
    rows = json.loads((folder / "test_qa.json").read_text())
    write_json(folder / "test_qa.json", [*rows, {"id": 9, "video_id": 9, "question": "where is it?", "answer": "red"}])


def ivqa(folder: Path) -> None:
    columns = ("video_id", "start", "end", "question", *(f"answer{n}" for n in range(1, 6)))
    for split in ("train", "test"):
        write_video(folder / "videos" / f"{split}-whole.webm", seconds=4)
        write_video(folder / "videos" / f"{split}-cut_0_2.mp4")
        people = ("pan", "pan", "pot", "spoon", "bowl")
        rows = [(f"{split}-whole", 1, 3, "what is it?", *people), (f"{split}-cut", 0, 2, "what is it?", *people)]
        write_csv(folder / f"{split}.csv", columns, rows)


def nextqa(folder: Path) -> None:
    columns = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type")
    for split, video in (("train", "4010069381"), ("test", "5772591393")):
        write_video(folder / "NExTVideo" / "1164" / f"{video}.mp4")
        questions = [("why does it move", "it plays", 0, "CW"), ("how many are there", "two", 1, "DC")]
        write_csv(folder / f"{split}.csv", columns, [(video, 8, 16, 16, *question) for question in questions])
        write_json(folder / f"add_reference_answer_{split}.json", {video: {"0": "playing", "1": "two"}})
    write_json(folder / "map_vid_vidorID.json", {video: f"1164/{video}" for video in ("4010069381", "5772591393")})
    (folder / "stopwords.txt").write_text("the\nit\na\n", encoding="utf-8")


def vatex(folder: Path) -> None:
    names = ("vatex_training_v1.0.json", "vatex_public_test_english_v1.1.json")
    for number, name in enumerate(names):
        write_video(folder / "clips" / f"_a-b{number}_000001_000003.mkv", number=number)
        write_video(folder / "whole" / f"whole{number}.mp4", seconds=4, number=number)
        videos = (f"_a-b{number}_000001_000003", f"whole{number}_000001_000003")
        rows = [{"videoID": video, "enCap": [f"A {COLOURS[number]} film.", "A film."]} for video in videos]
        write_json(folder / name, rows)


def youcook2(folder: Path) -> None:
    database = {}
    for number, subset in enumerate(("training", "validation")):
        write_video(folder / "raw_videos" / subset / "105" / f"cook{number}.mp4", seconds=4, number=number)
        segments = [{"segment": [n, n + 2], "id": n, "sentence": f"add the {COLOURS[n]} one"} for n in (0, 1)]
        database[f"cook{number}"] = {"subset": subset, "duration": 4.0, "recipe_type": "105", "annotations": segments}
    write_json(folder / "youcookii_annotations_trainval.json", {"database": database})


def star(folder: Path) -> None:
    for split, video in (("train", "AAAAA"), ("val", "BBBBB")):
        write_video(folder / "Charades_v1_480" / f"{video}.mp4", seconds=3)
        choices = [{"choice_id": n, "choice": f"The {c} one.", "choice_program": []} for n, c in enumerate(COLOURS)]
        rows = [
            {
                "question_id": f"Interaction_T1_{n}",
                "video_id": video,
                "start": 0.5,
                "end": 2.5,
                "question": "Which one?",
            }
            | {"answer": "The blue one.", "choices": choices, "situations": {}}
            for n in range(2)
        ]
        write_json(folder / f"STAR_{split}.json", rows)


def visdial(folder: Path) -> None:
    texts = {"questions": ["what colour is it", "is it big"], "answers": ["yes", "no", "red", "blue"]}
    for split, image in (("train", 5), ("val", 6)):
        name = f"VisualDialog_val2018_{image:012d}.jpg" if split == "val" else f"COCO_train2014_{image:012d}.jpg"
        write_image(folder / "images" / name, image)
        rounds = [
            {"question": n % 2, "answer": n % 4, "answer_options": [0, 1, 2, 3], "gt_index": n % 4} for n in range(10)
        ]
        dialogs = [{"image_id": image, "caption": "a thing", "dialog": rounds}]
        write_json(
            folder / f"visdial_1.0_{split}.json",
            {"split": split, "version": "1.0", "data": {"dialogs": dialogs, **texts}},
        )
    dense = [{"image_id": 6, "round_id": 3, "gt_relevance": [0.0, 0.5, 1.0, 0.0]}]
    write_json(folder / "visdial_1.0_val_dense_annotations.json", dense)


def hateful_memes(folder: Path) -> None:
    for split, first in (("train", 0), ("dev_seen", 10), ("test_seen", 20)):
        lines = []
        for number in range(first, first + 4):
            write_image(folder / "img" / f"{number:05d}.png", number)
            lines.append({"id": number, "img": f"img/{number:05d}.png", "label": number % 2, "text": 'so "nice"'})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def rareact(folder: Path) -> None:
    columns = ("id", "video_id", "start", "end", "class_id", "verb", "noun", "annotation")
    for video in ("one", "two"):
        write_video(folder / "videos" / f"{video}.mp4", seconds=3)
    rows = [
        (0, "one", 0, 2, 0, "drill", "phone", 1),
        (1, "two", 0, 2, 0, "drill", "phone", 0),
        (2, "two", 1, 3, 1, "wash", "phone", 1),
        (3, "one", 1, 3, 1, "wash", "phone", 3),
    ]
    write_csv(folder / "rareact.csv", columns, rows)


def imagenet(folder: Path) -> None:
    for number, synset in enumerate(("n01440764", "n01443537")):
        write_image(folder / "train" / synset / f"{synset}_1.JPEG", number)
        write_image(folder / "val" / synset / f"ILSVRC2012_val_{number:08d}.JPEG", number)
        (folder / "val" / synset / f"._ILSVRC2012_val_{number:08d}.JPEG").write_bytes(bytes(32))  # as macOS does


def kinetics700(folder: Path) -> None:
    columns = ("label", "youtube_id", "time_start", "time_end", "split")
    for split in ("train", "val"):
        write_video(folder / split / "abseiling" / f"{split}-video1_000001_000011.mp4")
        rows = [("abseiling", f"{split}-video1", 1, 11, split), ("air drumming", f"{split}-gone", 2, 12, split)]
        write_csv(folder / f"{split}.csv", columns, rows)


_WRITERS = (
    *(coco, flickr30k, hateful_memes, imagenet, ivqa, kinetics700, msrvttqa, msvdqa, nextqa),
    *(okvqa, rareact, star, textvqa, vatex, visdial, vizwiz, vqav2, youcook2),
)
WRITERS: Mapping[str, Callable[[Path], None]] = {writer.__name__: writer for writer in _WRITERS}
