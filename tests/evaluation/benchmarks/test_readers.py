"""Readers of official formats: what they make of fabricated files, and how they refuse broken ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.benchmark import load, names
from evaluation.benchmarks.data import BenchmarkData, Queries, state
from evaluation.benchmarks.items import DataError
from tests.evaluation.benchmarks import official_files as official


def read(name: str, folder: Path, split: str | None = None) -> Queries:
    benchmark = load(name)
    return BenchmarkData(benchmark, folder).queries(split or benchmark.split, None, 0)


def written(name: str, folder: Path) -> Path:
    official.WRITERS[name](folder)
    return folder


@pytest.mark.parametrize("name", names())
def test_the_files_of_each_benchmark_are_read(name: str, tmp_path: Path) -> None:
    queries = read(name, written(name, tmp_path))
    benchmark = load(name)
    assert len({item.row.id for item in queries.items}) == len(queries.items) > 0
    for item in queries.items:
        assert item.media.is_file()
        assert item.row.answers
        assert bool(item.row.candidates) == (benchmark.task == "rank")
        assert (benchmark.metric in ("ndcg", "mwap")) or set(item.row.answers) <= set(
            item.row.candidates or item.row.answers
        )
    support = BenchmarkData(benchmark, tmp_path).support(None, 0)
    assert bool(support) == (benchmark.support_split is not None)
    assert not {item.media for item in support} & {item.media for item in queries.items}


@pytest.mark.parametrize("name", names())
def test_an_empty_folder_wants_data_and_says_which(name: str, tmp_path: Path) -> None:
    assert re.match(
        r"wants data: .* has no file .*\.(json|jsonl|csv)|wants data: .* has no file (val|train)",
        state(load(name), tmp_path),
    )
    written(name, tmp_path)
    assert re.match(r"\d+ queries of (val|test)", state(load(name), tmp_path))


def test_coco_has_all_captions_of_the_karpathy_split(tmp_path: Path) -> None:
    items = read("coco", written("coco", tmp_path)).items
    assert [item.row.id for item in items] == ["2", "3"]
    assert items[0].row.answers == ("A green thing 0.", "A green thing 1.")
    assert items[0].media == tmp_path / "val2014" / "COCO_val2014_000000000002.jpg"
    assert len(BenchmarkData(load("coco"), tmp_path).support(None, 0)) == 2  # train and restval


@pytest.mark.parametrize("name", ["images/{:012d}.jpg", "COCO_val2014_{:012d}.png", "a/b/COCO_val2014_{:012d}.jpeg"])
def test_images_of_coco_may_have_the_names_of_another_release(name: str, tmp_path: Path) -> None:
    written("coco", tmp_path)
    for number in range(5):
        (tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg").unlink()
        official.write_image(tmp_path / name.format(number), number)
    assert len(read("coco", tmp_path).items) == 2


def test_vqa_answers_are_those_of_the_question_and_okvqa_has_raw_ones_too(tmp_path: Path) -> None:
    (row, *_) = [item.row for item in read("vqav2", written("vqav2", tmp_path / "vqa")).items]
    assert (row.id, row.question, row.answers) == ("1", "What colour is it?", ("red",) * 10)
    assert row.facts == {}
    (row, *_) = [item.row for item in read("okvqa", written("okvqa", tmp_path / "ok")).items]
    assert row.answers == ("red",) * 10
    assert row.facts == {"raw_answers": ("reds",) * 10}


def test_okvqa_needs_all_raw_answers_of_a_question_or_none(tmp_path: Path) -> None:
    path = written("okvqa", tmp_path) / "mscoco_val2014_annotations.json"
    values = json.loads(path.read_text())
    del values["annotations"][0]["answers"][4]["raw_answer"]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="row 1, row 5: the field 'raw_answer' is missing"):
        read("okvqa", tmp_path)


def test_a_test_split_has_no_answers(tmp_path: Path) -> None:
    for name, split in (("vqav2", "test-dev"), ("vizwiz", "test-dev"), ("textvqa", "test")):
        queries = read(name, written(name, tmp_path / name), split)
        assert queries.items
        assert not any(item.row.answers for item in queries.items)


def test_openflamingos_files_of_textvqa_and_vizwiz_are_read(tmp_path: Path) -> None:
    for name, image in (("textvqa", "00a1"), ("vizwiz", "VizWiz_val_00000000.jpg")):
        folder = tmp_path / name
        official.write_image(folder / "val" / Path(image).with_suffix(".jpg").name, 1)
        question = {"question_id": 3, "image_id": image, "question": "What?"}
        people = [{"answer": "red", "answer_id": n} for n in range(10)]
        official.write_json(folder / "val_questions_vqa_format.json", {"questions": [question]})
        annotation = {"question_id": 3, "answers": people}
        official.write_json(folder / "val_annotations_vqa_format.json", {"annotations": [annotation]})
        assert read(name, folder).items[0].row.answers == ("red",) * 10


def test_a_round_of_visdial_comes_after_the_caption_and_earlier_rounds(tmp_path: Path) -> None:
    (row,) = [item.row for item in read("visdial", written("visdial", tmp_path)).items]
    assert row.text == ("a thing Question: what colour is it Answer: yes Question: is it big Answer: no")
    assert (row.question, row.answers, row.candidates) == ("what colour is it", ("red",), ("yes", "no", "red", "blue"))
    (shot,) = BenchmarkData(load("visdial"), tmp_path).support(None, 0)
    assert shot.row.text.count("Question:") == 9


def test_rows_whose_videos_are_gone_are_counted(tmp_path: Path) -> None:
    assert read("msrvttqa", written("msrvttqa", tmp_path / "a")).num_missing == 1
    assert read("kinetics700", written("kinetics700", tmp_path / "b")).num_missing == 1
    assert state(load("msrvttqa"), tmp_path / "a") == "2 queries of test, 1 without their media file"


Change = Callable[[Any], object]

DENSE = "visdial_1.0_val_dense_annotations.json"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
TEXTVQA = "TextVQA_0.5.1_val.json"
VATEX = "vatex_public_test_english_v1.1.json"
NEXTQA = "add_reference_answer_test.json"
BROKEN: list[tuple[str, str, Change, str]] = [
    ("coco", "dataset_coco.json", lambda v: v.pop("images"), "dataset_coco.json: the field 'images' is missing"),
    ("coco", "dataset_coco.json", lambda v: v["images"][2].pop("filename"), "row 3: the field 'filename' is missing"),
    ("coco", "dataset_coco.json", lambda v: v["images"].clear(), " has no rows of test"),
    ("coco", "dataset_coco.json", lambda v: v["images"].append(7), "images, row 6: an object is expected, not 7"),
    ("coco", "dataset_coco.json", lambda v: v["images"][3].update(cocoid=2), "row 4: the id '2' repeats"),
    (
        *("coco", "dataset_coco.json", lambda v: v["images"][2].update(filename="x.jpg", cocoid=77)),
        "row 3: the folder has no media file val2014/x.jpg",
    ),
    (
        *("vqav2", "v2_mscoco_val2014_annotations.json", lambda v: v["annotations"].pop()),
        "has no annotation of the question 21",
    ),
    (
        *("vqav2", QUESTIONS, lambda v: v["questions"][1].update(image_id=None)),
        "questions, row 2: the field 'image_id' is missing",
    ),
    (
        *("vqav2", ANNOTATIONS, lambda v: v["annotations"].append(v["annotations"][0])),
        "annotations, row 4: the annotation of the question 1 repeats",
    ),
    ("coco", "dataset_coco.json", lambda v: v["images"][2].update(cocoid="x"), "row 3: the field 'cocoid' is 'x'"),
    ("textvqa", TEXTVQA, lambda v: v["data"][1].update(answers="yes"), "row 2: the field 'answers' is 'yes'"),
    ("vatex", VATEX, lambda v: v[0].update(enCap="a cat"), "row 1: the field 'enCap' is 'a cat'"),
    ("nextqa", NEXTQA, lambda v: v.update({next(iter(v)): ["it plays"]}), f"{NEXTQA}: the field"),
    (
        "star",
        "STAR_val.json",
        lambda v: v[0]["choices"][1].update(choice_id="x"),
        "row 2: the field 'choice_id' is 'x'",
    ),
    ("visdial", DENSE, lambda v: v[0].update(gt_relevance=["x"] * 4), "row 1: the field 'gt_relevance' is 'x'"),
    ("vizwiz", "Annotations/val.json", lambda v: v[1].update(answers=[{}]), "the field 'answer' is missing"),
    ("star", "STAR_val.json", lambda v: v[1].pop("answer"), "row 2: there is no answer, but other rows have one"),
    ("star", "STAR_val.json", lambda v: v[0].update(answer="A."), "row 1: the answer 'A.' is not one of the choices"),
    ("star", "STAR_val.json", lambda v: v[0].update(start=9), "row 1: the segment from 9.0 to 2.5 s is empty"),
    ("visdial", DENSE, lambda v: v[0].update(round_id=11), "there is no round 11, only 10"),
    ("visdial", DENSE, lambda v: v[0].update(gt_relevance=[1.0, 0.5]), "4 answer options, but 2 judgements"),
    ("visdial", DENSE, lambda v: v[0].update(gt_relevance=[]), "row 1: the field 'gt_relevance' has 0 numbers"),
    (
        "visdial",
        DENSE,
        lambda v: v[0].update(gt_relevance=[0.5, math.nan, 1.0, 0.0]),
        "row 1: the field 'gt_relevance' has nan",
    ),
    (
        "visdial",
        DENSE,
        lambda v: v[0].update(gt_relevance=[0.5, math.inf, 1.0, 0.0]),
        "row 1: the field 'gt_relevance' has inf",
    ),
    (
        "visdial",
        DENSE,
        lambda v: v[0].update(gt_relevance=[0.5, -1.0, 1.0, 0.0]),
        "row 1: the field 'gt_relevance' has -1.0",
    ),
    ("visdial", DENSE, lambda v: v.append(v[0]), "row 2: the annotation of the image 6 repeats"),
    (
        "youcook2",
        "youcookii_annotations_trainval.json",
        lambda v: v["database"]["cook1"]["annotations"][0].update(segment=[1]),
        "video cook1, row 1: the field 'segment' has 1 numbers, not 2",
    ),
]


@pytest.mark.parametrize(("name", "file", "change", "message"), BROKEN)
def test_a_broken_row_is_refused_with_file_and_row(
    name: str, file: str, change: Change, message: str, tmp_path: Path
) -> None:
    path = written(name, tmp_path) / file
    values = json.loads(path.read_text())
    change(values)
    official.write_json(path, values)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(name, tmp_path)
    assert str(error.value).count(str(tmp_path)) == 1 + ("annotation of the question 21" in message)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("hateful_memes", "test_seen.jsonl", '"label": 1', '"label": 5', "row 2: the field 'label' is 5, not 0 or 1"),
        ("hateful_memes", "test_seen.jsonl", '{"id": 22', "{22", "row 3: "),
        ("hateful_memes", "test_seen.jsonl", "nice", "\udce9", "test_seen.jsonl: 'utf-8' codec"),
        ("msvdqa", "test_qa.json", "[", "(", "test_qa.json: "),
        ("msvdqa", "test_qa.json", "[", "[" * 100_000, "test_qa.json: maximum recursion depth"),
        ("hateful_memes", "test_seen.jsonl", "{", "[" * 100_000, "row 1: maximum recursion depth"),
        ("nextqa", "stopwords.txt", "the", "\udce9", "stopwords.txt: 'utf-8' codec"),
        ("ivqa", "test.csv", "what is it?", '"' + "word " * 40_000, "row 1: field larger than field limit"),
        ("rareact", "rareact.csv", "phone,3", "phone,9", "row 4: the field 'annotation' is '9', not 0 to 4"),
        ("rareact", "rareact.csv", "noun", "object", "the column 'noun' is missing"),
        ("ivqa", "test.csv", "whole,1,", "whole,one,", "row 1: the field 'start' is 'one', not a number"),
        ("kinetics700", "val.csv", "video1,1,11", "video1,,", "row 1: the field 'time_start' is '', not a number"),
        ("kinetics700", "val.csv", "abseiling,", ",", "row 1: the field 'label' is empty"),
        ("kinetics700", "val.csv", "abseiling,", "\udce9,", "val.csv: 'utf-8' codec"),
        ("nextqa", "test.csv", "it plays,0,CW", "it plays,0,CW,more", "row 1: more fields than columns"),
        ("nextqa", "test.csv", "frame_count", "a0", "row 1: a multiple choice of NExT-QA"),
    ],
)
def test_a_broken_line_is_refused_with_file_and_row(
    name: str, file: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = written(name, tmp_path) / file
    path.write_text(path.read_text().replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(name, tmp_path)
    assert file in str(error.value)


def test_a_list_of_names_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (written("msvdqa", tmp_path) / "youtube_mapping.txt").write_bytes(b"caf\xe9 vid5\n")
    with pytest.raises(DataError, match=r"youtube_mapping\.txt: 'utf-8' codec"):
        read("msvdqa", tmp_path)


@pytest.mark.parametrize("label", ["1.0", "true"])
def test_a_label_may_be_a_number_as_pandas_writes_it(label: str, tmp_path: Path) -> None:
    path = written("hateful_memes", tmp_path) / "test_seen.jsonl"
    path.write_text(path.read_text().replace('"label": 1', f'"label": {label}'))
    assert [item.row.answers for item in read("hateful_memes", tmp_path).items] == [("no",), ("yes",)] * 2


def test_an_id_may_be_a_number_in_one_file_and_a_text_in_another(tmp_path: Path) -> None:
    for name, file, part, key in (
        ("vqav2", ANNOTATIONS, "annotations", "question_id"),
        ("visdial", DENSE, None, "image_id"),
    ):
        path = written(name, tmp_path / name) / file
        values = json.loads(path.read_text())
        for record in values[part] if part else values:
            record[key] = str(record[key])
        official.write_json(path, values)
        assert read(name, tmp_path / name).items


def test_folders_may_be_symbolic_links_even_in_a_loop(tmp_path: Path) -> None:
    folder = written("coco", tmp_path / "data")
    (folder / "val2014").rename(tmp_path / "elsewhere")
    (folder / "val2014").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(folder)
    assert len(read("coco", folder).items) == 2


def test_metadata_files_of_macos_are_passed_over(tmp_path: Path) -> None:
    folder = written("kinetics700", tmp_path)
    (folder / "val.csv").rename(folder / "kinetics_val_2020.csv")
    (folder / "._kinetics_val_2020.csv").write_bytes(b"\0\5\xff")
    assert len(read("kinetics700", folder).items) == 1


def test_a_video_may_have_the_suffixes_of_two_containers(tmp_path: Path) -> None:
    """Downloaders of videos write such names."""
    folder = written("msrvttqa", tmp_path)
    (folder / "video" / "video5.mp4").rename(folder / "video" / "video5.mp4.webm")
    assert [item.media.name for item in read("msrvttqa", folder).items] == ["video5.mp4.webm", "video6.mp4"]


def test_a_limit_is_of_the_rows_that_have_their_videos(tmp_path: Path) -> None:
    data = BenchmarkData(load("msrvttqa"), written("msrvttqa", tmp_path))
    for seed in range(8):
        queries = data.queries("test", 2, seed)
        assert (len(queries.items), queries.num_missing) == (2, 1)


def test_a_folder_that_is_no_synset_is_refused(tmp_path: Path) -> None:
    written("imagenet", tmp_path)
    official.write_image(tmp_path / "val" / "cats" / "a.JPEG", 0)
    with pytest.raises(DataError, match="'cats' is not a synset"):
        read("imagenet", tmp_path)


def test_the_flat_release_of_imagenet_is_read_with_its_solution(tmp_path: Path) -> None:
    official.write_image(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    rows = [("ILSVRC2012_val_00000001", "n01440764 1 2 3 4")]
    official.write_csv(tmp_path / "LOC_val_solution.csv", ("ImageId", "PredictionString"), rows)
    (item,) = read("imagenet", tmp_path).items
    assert item.row.answers == ("tench",)
    assert len(set(item.row.candidates)) == 1000


def test_a_limit_is_a_sample_that_depends_on_the_seed(tmp_path: Path) -> None:
    data = BenchmarkData(load("hateful_memes"), written("hateful_memes", tmp_path))
    samples = {seed: [item.row.id for item in data.queries("test", 2, seed).items] for seed in range(8)}
    assert all(len(sample) == 2 and sample == sorted(sample) for sample in samples.values())
    assert len(set(map(tuple, samples.values()))) > 1
    assert samples[0] == [item.row.id for item in data.queries("test", 2, 0).items]


def test_examples_per_label_are_limited(tmp_path: Path) -> None:
    written("imagenet", tmp_path)
    for number in range(9):
        official.write_image(tmp_path / "train" / "n01440764" / f"more{number}.JPEG", number)
    labels = [item.row.answers[0] for item in BenchmarkData(load("imagenet"), tmp_path).support(None, 0)]
    assert sorted(labels) == ["goldfish"] + ["tench"] * 5


def test_of_several_files_of_a_name_the_one_of_the_split_is_taken(tmp_path: Path) -> None:
    written("imagenet", tmp_path)
    for split in ("a-copy", "train", "val", "zzz"):
        official.write_image(tmp_path / split / "n01440764" / "same.JPEG", 1)
    item = next(item for item in read("imagenet", tmp_path).items if item.row.id == "same.JPEG")
    assert item.media == tmp_path / "val" / "n01440764" / "same.JPEG"


def test_the_folders_of_imagenet_may_be_deep_in_the_release(tmp_path: Path) -> None:
    written("imagenet", tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    assert len(read("imagenet", tmp_path).items) == 2


def test_kaggles_release_of_imagenet_is_read(tmp_path: Path) -> None:
    """It has folders of the same names with bounding boxes, and no folders of synsets in `val`."""
    release, synset = tmp_path / "ILSVRC", "n01440764"
    images, boxes = (release / part / "CLS-LOC" for part in ("Data", "Annotations"))
    official.write_image(images / "train" / synset / f"{synset}_1.JPEG", 0)
    official.write_image(images / "val" / "ILSVRC2012_val_00000001.JPEG", 1)
    for box in (f"train/{synset}/{synset}_1.xml", "val/ILSVRC2012_val_00000001.xml"):
        official.write_json(boxes / box, {})
    (images / "train" / synset / ".DS_Store").touch()
    rows = [("ILSVRC2012_val_00000001", f"{synset} 1 2 3 4")]
    official.write_csv(tmp_path / "LOC_val_solution.csv", ("ImageId", "PredictionString"), rows)
    assert len(read("imagenet", tmp_path).items) == 1
    assert [item.row.answers for item in BenchmarkData(load("imagenet"), tmp_path).support(None, 0)] == [("tench",)]


def test_a_line_of_memes_may_contain_separators_of_unicode(tmp_path: Path) -> None:
    path = written("hateful_memes", tmp_path) / "test_seen.jsonl"
    path.write_text(path.read_text().replace("nice", "ni\u2028ce"), encoding="utf-8")
    assert {item.row.question for item in read("hateful_memes", tmp_path).items} == {'so "ni\u2028ce"'}


def test_a_shot_shows_the_first_answer_that_has_words(tmp_path: Path) -> None:
    path = written("textvqa", tmp_path) / "TextVQA_0.5.1_train.json"
    values = json.loads(path.read_text())
    values["data"][0]["answers"] = ["", "stop"]
    values["data"][1]["answers"] = [""]
    official.write_json(path, values)
    (example,) = BenchmarkData(load("textvqa"), tmp_path).support(None, 0)
    assert example.row.shown_answer == "stop"


def test_answers_of_vqa_may_be_texts_and_ids_texts_of_digits(tmp_path: Path) -> None:
    written("vqav2", tmp_path)
    for name, key in (
        ("v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
        ("v2_mscoco_val2014_annotations.json", "annotations"),
    ):
        values = json.loads((tmp_path / name).read_text())
        for row in values[key]:
            row["image_id"] = str(row["image_id"])
            row.update({"answers": ["red", "blue"]} if key == "annotations" else {})
        official.write_json(tmp_path / name, values)
    items = read("vqav2", tmp_path).items
    assert [item.row.answers for item in items] == [("red", "blue")] * 3
