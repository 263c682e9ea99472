"""Readers of the files of image benchmarks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from evaluation.benchmarks.items import (
    IMAGES,
    DataError,
    MediaNames,
    Record,
    Row,
    read_json,
    read_lines,
    read_table,
    records,
)
from evaluation.benchmarks.readers.files import Files

COCO_FOLDERS = ("train2014", "val2014", "test2015")


def read_karpathy(files: Files) -> Iterator[Row]:
    """Read `{"images": [{"filename", "filepath", "split", "cocoid", "sentences": [{"raw"}]}]}`.

    The format of dataset_coco.json and dataset_flickr30k.json, read as by OpenFlamingo (`COCOFlickrDataset`) and
    neuraltalk2; Flickr30K's images have no `filepath` and no `cocoid`.
    """
    path = files.require("captions")
    for record in records(_part(read_json(path), "images", path), path, "images"):
        if record.get("split") not in files.subset:
            continue
        name, sentences = record.text("filename"), record.values.get("sentences") or []
        names = [f"{record.text('filepath')}/{name}"] if record.has("filepath") else []
        coco = record.get("cocoid", int) if record.has("cocoid") else None
        yield Row(
            id=Path(name).stem if coco is None else str(coco),
            where=record.where,
            media=MediaNames([*names, name, *([] if coco is None else [f"{coco:012d}"])]),
            answers=tuple(sentence.text("raw") for sentence in records(sentences, record.where)),
        )


def read_questions(files: Files) -> Iterator[Row]:
    """Read questions of the VQA API, of TextVQA or of VizWiz, whichever format the file has."""
    path = files.require("questions")
    values = read_json(path)
    if isinstance(values, list):
        yield from _vizwiz(values, path)
    elif isinstance(values, dict) and "data" in values:
        yield from _textvqa(values["data"], path)
    else:
        yield from _vqa(values, path, files)


def _vqa(values: Any, path: Path, files: Files) -> Iterator[Row]:
    """Read `{"questions": [{"question_id", "image_id", "question"}]}` and its annotations, as the VQA API does.

    The API is github.com/GT-Vision-Lab/VQA (`vqaTools/vqa.py`). OKVQA's files have the same format, with answers that are
    stemmed (`answer`) and as they were given (`raw_answer`).
    """
    questions = _part(values, "questions", path)
    source = files.require("annotations") if "annotations" in files.patterns else None
    people = {} if source is None else _annotations(source)
    subtype = str(values.get("data_subtype", ""))
    for record in records(questions, path, "questions"):
        number = record.text("question_id")
        if source is not None and number not in people:
            raise DataError(f"{record.where}: {source} has no annotation of the question {number}")
        yield Row(
            id=number,
            where=record.where,
            media=MediaNames(_image_names(record.get("image_id", (int, str)), subtype)),
            question=record.text("question"),
            answers=_texts(people.get(number, ()), "answer"),
            facts=_raw_answers(people.get(number, ())),
        )


def _annotations(path: Path) -> dict[str, list[Record]]:
    people: dict[str, list[Record]] = {}
    for record in records(_part(read_json(path), "annotations", path), path, "annotations"):
        question = record.text("question_id")
        if question in people:
            raise DataError(f"{record.where}: the annotation of the question {question} repeats")
        people[question] = _people(record)
    return people


def _people(record: Record) -> list[Record]:
    """Return the answers of all people, one record per person."""
    values = [{"answer": v} if isinstance(v, str) else v for v in record.get("answers", list)]
    return list(records(values, record.where))


def _texts(people: Sequence[Record], field: str) -> tuple[str, ...]:
    return tuple(str(person.get(field, (str, int))) for person in people)


def _raw_answers(people: Sequence[Record]) -> Mapping[str, Any]:
    """Return the facts that the metric of OKVQA reads: the text of each answer before stemming."""
    has_raw = any(person.has("raw_answer") for person in people)
    return {"raw_answers": _texts(people, "raw_answer")} if has_raw else {}


def _image_names(image: int | str, subtype: str) -> list[str]:
    if isinstance(image, str):
        return [image, *(_image_names(int(image), subtype) if image.isdecimal() else [])]
    return [*(f"COCO_{folder}_{image:012d}" for folder in (subtype, *COCO_FOLDERS)), f"{image:012d}", str(image)]


def _textvqa(values: Any, path: Path) -> Iterator[Row]:
    """Read `{"data": [{"question_id", "image_id", "question", "answers": [text]}]}`, as mmf's TextVQA dataset does."""
    for record in records(values, path, "data"):
        yield Row(
            id=record.text("question_id"),
            where=record.where,
            media=MediaNames([record.text("image_id")]),
            question=record.text("question"),
            answers=record.texts("answers") if record.has("answers") else (),
        )


def _vizwiz(values: Any, path: Path) -> Iterator[Row]:
    """Read `[{"image", "question", "answers": [{"answer"}]}]`, of vizwiz.org; the test split has no answers."""
    for record in records(values, path):
        yield Row(
            id=record.text("image"),
            where=record.where,
            media=MediaNames([record.text("image")]),
            question=record.text("question"),
            answers=_texts(_people(record), "answer") if record.has("answers") else (),
        )


def read_hateful_memes(files: Files) -> Iterator[Row]:
    """Read a line `{"id", "img", "label", "text"}` per meme, as mmf's Hateful Memes dataset does."""
    for record in read_lines(files.require("memes")):
        label = record.values.get("label")
        if label not in (None, 0, 1):
            raise DataError(f"{record.where}: the field 'label' is {label!r}, not 0 or 1")
        yield Row(
            id=record.text("id"),
            where=record.where,
            media=MediaNames([record.text("img")]),
            question=record.text("text"),
            answers=() if label is None else (("no", "yes")[int(label)],),  # pandas writes 1.0
            candidates=("no", "yes"),
        )


def read_visdial(files: Files) -> Iterator[Row]:
    """Read dialogs of VisDial v1.0, as the challenge's starter code does (`VisDialJsonReader`).

    With dense annotations (`image_id`, `round_id` from 1, `gt_relevance`), a row is an annotated round; without, the last
    round of a dialog.
    """
    path = files.require("dialogs")
    data = _part(read_json(path), "data", path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: the field 'data' is not an object")
    questions, answers = (Record(data, str(path)).texts(part) for part in ("questions", "answers"))
    relevance = _relevance(files.require("relevance")) if "relevance" in files.patterns else None
    for record in records(_part(data, "dialogs", path), path, "dialogs"):
        dialog = _Dialog(record, questions, answers)
        if relevance is None:
            yield dialog.row(len(dialog.rounds), ())
        elif dialog.image in relevance:
            yield dialog.row(*relevance[dialog.image])


def _relevance(path: Path) -> Mapping[int, tuple[int, tuple[float, ...]]]:
    """Return the annotated round of each image, and the relevance of its answer options."""
    rounds: dict[int, tuple[int, tuple[float, ...]]] = {}
    for record in records(read_json(path), path):
        if (image := _image_id(record)) in rounds:
            raise DataError(f"{record.where}: the annotation of the image {image} repeats")
        rounds[image] = record.get("round_id", int), _judgements(record)
    return rounds


def _judgements(record: Record) -> tuple[float, ...]:
    """Return numbers for which NDCG is defined; JSON can also have NaN and Infinity."""
    values = record.numbers("gt_relevance")
    if len(values) < 2:
        raise DataError(f"{record.where}: the field 'gt_relevance' has {len(values)} numbers, fewer than 2")
    if wrong := [value for value in values if not 0 <= value < math.inf]:
        raise DataError(f"{record.where}: the field 'gt_relevance' has {wrong[0]}, not a number from 0")
    return values


def _image_id(record: Record) -> int:
    """Return the number of an image, which may be a text of digits."""
    if not (text := record.text("image_id")).isdecimal():
        raise DataError(f"{record.where}: the field 'image_id' is {text!r:.60}, not a number")
    return int(text)


class _Dialog:
    def __init__(self, record: Record, questions: Sequence[str], answers: Sequence[str]) -> None:
        self.record, self.questions, self.answers = record, questions, answers
        self.image = _image_id(record)
        self.rounds = list(records(record.get("dialog", list), record.where))

    def row(self, round_id: int, relevance: tuple[float, ...]) -> Row:
        """Return a round after the caption and the rounds before it; rounds count from 1."""
        if not 1 <= round_id <= len(self.rounds):
            raise DataError(f"{self.record.where}: there is no round {round_id}, only {len(self.rounds)}")
        *earlier, last = self.rounds[:round_id]
        rounds = [f" Question: {self._question(r)} Answer: {self._answer(r)}" for r in earlier]
        options = last.get("answer_options", list) if relevance else []
        if len(options) != len(relevance):
            raise DataError(
                f"{last.where}: {len(options)} answer options, but {len(relevance)} judgements of relevance"
            )
        return Row(
            id=f"{self.image}-{round_id}",
            where=self.record.where,
            media=MediaNames([f"VisualDialog_val2018_{self.image:012d}", *_image_names(self.image, "")]),
            text=self.record.text("caption") + "".join(rounds),
            question=self._question(last),
            answers=(self._answer(last),),
            candidates=tuple(self._text(self.answers, option, last) for option in options),
            facts={"relevance": relevance},
        )

    def _question(self, record: Record) -> str:
        return self._text(self.questions, record.get("question", int), record)

    def _answer(self, record: Record) -> str:
        return self._text(self.answers, record.get("answer", int), record)

    def _text(self, texts: Sequence[str], index: int, record: Record) -> str:
        if not isinstance(index, int) or not 0 <= index < len(texts):
            raise DataError(f"{record.where}: there is no text {index!r}, only {len(texts)}")
        return texts[index].strip()


def read_imagenet(files: Files) -> Iterator[Row]:
    """Read images in a folder per synset, or in one folder with LOC_val_solution.csv (`ImageId`, `PredictionString`).

    The first is the layout of torchvision's ImageFolder, which OpenFlamingo reads; the second that of Kaggle's release.
    """
    labels = _synset_labels()
    candidates = tuple(labels.values())
    solution, folder = files.find("solution"), files.require("folder")
    synsets = sorted(path for path in folder.iterdir() if path.is_dir())
    if synsets:
        images = [(image.parent.name, image.name, str(image)) for image in _images_of(synsets)]
    elif solution is not None:
        rows = read_table(solution, ("ImageId", "PredictionString"))
        images = [(r.text("PredictionString").split()[0], r.text("ImageId"), r.where) for r in rows]
    else:
        raise DataError(f"{folder} has no folders of synsets, and there is no LOC_val_solution.csv")
    for synset, image, where in images:
        if synset not in labels:
            raise DataError(f"{where}: {synset!r} is not a synset of ImageNet-1k")
        names = MediaNames([f"{synset}/{image}" if synsets else image])
        yield Row(id=image, where=where, media=names, answers=(labels[synset],), candidates=candidates)


def _images_of(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the images of each folder in order, without the metadata files of macOS."""
    for folder in folders:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)
        yield from (file for file in files if not file.name.startswith("._"))


def _synset_labels() -> dict[str, str]:
    """Return the first name of each synset, all names where another one has it, and the gloss of the two cranes."""
    info = import_module("timm.data").ImageNetInfo()  # timm loads torch
    names = info.label_descriptions()
    first = [name.partition(",")[0] for name in names]
    forms = list(zip(first, names, info.label_descriptions(detailed=True), strict=True))
    counts = Counter(form for texts in forms for form in set(texts))
    return {
        synset: next(form for form in texts if counts[form] == 1)
        for synset, texts in zip(info.label_names(), forms, strict=True)
    }


def _part(values: Any, name: str, path: Path) -> Any:
    if not isinstance(values, dict) or name not in values:
        raise DataError(f"{path}: the field {name!r} is missing")
    return values[name]
