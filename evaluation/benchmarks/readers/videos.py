"""Readers of the files of video benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from evaluation.benchmarks.items import (
    DataError,
    MediaNames,
    Record,
    Row,
    read_json,
    read_object,
    read_table,
    read_text,
    records,
)
from evaluation.benchmarks.readers.files import Files


def read_video_qa(files: Files) -> Iterator[Row]:
    """Read `[{"id", "video_id", "question", "answer"}]` of MSVD-QA and MSRVTT-QA, or the same columns of a CSV file.

    The JSON files are those of github.com/xudejing/video-question-answering, whose videos have names with a number; the
    CSV files those of just-ask's `preproc_msvdqa.py`. MSVD's `youtube_mapping.txt` gives the original names.
    """
    path, original = files.require("questions"), _mapping(files)
    columns = ("id", "video_id", "question", "answer")
    table = path.suffix == ".csv"
    for record in read_table(path, columns[1:]) if table else records(read_json(path), path):
        video = record.text("video_id")
        name = files.media_name.format(video) if video.isdecimal() else video
        yield Row(
            id=record.text("id") if record.has("id") else record.where.rpartition(" ")[2],
            where=record.where,
            media=MediaNames([name, *([original[name]] if name in original else [])]),
            question=record.text("question"),
            answers=(record.text("answer"),) if record.has("answer") else (),
        )


def _mapping(files: Files) -> dict[str, str]:
    """Return the original names by number of youtube_mapping.txt, whose lines have the original name first."""
    if (path := files.find("mapping")) is None:
        return {}
    pairs = [line.split() for line in read_text(path).splitlines() if line.strip()]
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def read_ivqa(files: Files) -> Iterator[Row]:
    """Read the columns video_id, question and answer1 to answer5 of iVQA, as just-ask does (`VideoQADataset`).

    With the columns start and end, the question is about this segment.
    """
    path = files.require("questions")
    for number, record in enumerate(read_table(path, ("video_id", "question")), 1):
        video = record.text("video_id")
        yield Row(
            id=f"{video}-{number}",
            where=record.where,
            media=_media(record, video, "start", "end"),
            question=record.text("question"),
            answers=tuple(record.text(name) for i in range(1, 6) if record.has(name := f"answer{i}")),
        )


def _media(record: Record, video: str, start: str, end: str, *clips: str) -> MediaNames:
    """Return the names of a video, and the segment of it between two fields of a row, if the row has them."""
    if not record.has(start, end):
        return MediaNames(_video_names(video))
    return _segment(record, video, start, end, *clips)


def _video_names(video: str) -> list[str]:
    return [video, f"v_{video}"]


def _segment(record: Record, video: str, start: str, end: str, *clips: str) -> MediaNames:
    first, last = record.number(start), record.number(end)
    if not 0 <= first < last:
        raise DataError(f"{record.where}: the segment from {first} to {last} s is empty")
    times = [(f"{first:06.0f}", f"{last:06.0f}"), (f"{first:g}", f"{last:g}"), (str(first), str(last))]
    return MediaNames(_video_names(video), (first, last), [*clips, *(f"{video}_{a}_{b}" for a, b in times)])


def read_nextqa(files: Files) -> Iterator[Row]:
    """Read the columns video, question, answer, qid and type of NExT-QA's open-ended questions (NExT-OE, `eval_oe.py`).

    `add_reference_answer_*.json` has a second answer by video and question. `map_vid_vidorID.json` of NExT-QA has the
    paths of the videos. NExT-QA's tables of multiple choices, whose answers are numbers, are refused.
    """
    additional, paths = (_by_video(files.find(role)) for role in ("additional", "mapping"))
    stop_words = files.find("stop_words")
    words = () if stop_words is None else tuple(read_text(stop_words).split())
    for record in read_table(files.require("questions"), ("video", "question", "qid", "type")):
        if record.has("a0"):
            raise DataError(
                f"{record.where}: a multiple choice of NExT-QA; the open-ended questions are those of NExT-OE"
            )
        video, number = record.text("video"), record.text("qid")
        answers = [record.text("answer")] if record.has("answer") else []
        second = record.values.get("additional_ref_answer") or _second_answer(additional, video, number)
        yield Row(
            id=f"{video}-{number}",
            where=record.where,
            media=MediaNames([*([paths.text(video)] if paths.has(video) else []), video]),
            question=record.text("question"),
            answers=(*answers, *([second] if answers and second else [])),
            facts={"type": record.text("type"), "stop_words": words},
        )


def _by_video(path: Path | None) -> Record:
    """Return a file with an entry per video; it has none if there is no file."""
    return Record({}, "") if path is None else Record(read_object(path), str(path))


def _second_answer(additional: Record, video: str, number: str) -> str:
    """Return the second answer of a question, "" if there is none."""
    answers = Record(additional.get(video, dict) if additional.has(video) else {}, f"{additional.where}, video {video}")
    return answers.text(number) if answers.has(number) else ""


def read_vatex(files: Files) -> Iterator[Row]:
    """Read `[{"videoID": "YouTubeID_start_end", "enCap": [caption]}]`, the format of VATEX's download page."""
    path = files.require("captions")
    for record in records(read_json(path), path):
        name = record.text("videoID")
        match = re.fullmatch(r"(?P<video>.+)_(?P<start>\d+)_(?P<end>\d+)", name)
        times = Record(match.groupdict() if match else {}, record.where)
        media = _media(times, times.text("video"), "start", "end", name) if match else MediaNames([name])
        answers = record.texts("enCap") if record.has("enCap") else ()
        yield Row(id=name, where=record.where, media=media, answers=answers)


def read_youcook2(files: Files) -> Iterator[Row]:
    """Read `{"database": {video: {"subset", "annotations": [{"id", "segment": [start, end], "sentence"}]}}}`.

    The format of youcookii_annotations_trainval.json, from YouCook2's download page; a row is a segment.
    """
    path = files.require("segments")
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("database"), dict):
        raise DataError(f"{path}: the field 'database' is missing")
    for video, fields in values["database"].items():
        if not isinstance(fields, dict) or "subset" not in fields:
            raise DataError(f"{path}, video {video}: the field 'subset' is missing")
        if fields["subset"] in files.subset:
            for record in records(fields.get("annotations"), path, f"video {video}"):
                yield _segment_row(record, video)


def _segment_row(record: Record, video: str) -> Row:
    times = record.get("segment", list)
    if len(times) != 2:
        raise DataError(f"{record.where}: the field 'segment' has {len(times)} numbers, not 2")
    number, segment = record.text("id"), Record({"start": times[0], "end": times[1]}, record.where)
    return Row(
        id=f"{video}-{number}",
        where=record.where,
        media=_media(segment, video, "start", "end", f"{video}_{number}"),
        answers=(record.text("sentence"),),
    )


def read_star(files: Files) -> Iterator[Row]:
    """Read `[{"question_id", "video_id", "start", "end", "question", "answer", "choices": [{"choice"}]}]` of STAR.

    The files are those of github.com/csbobby/STAR_Benchmark; the test split has no answers.
    """
    path = files.require("questions")
    for record in records(read_json(path), path):
        choices = list(records(record.get("choices", list), record.where))
        choices.sort(key=lambda choice: choice.get("choice_id", int) if choice.has("choice_id") else 0)
        candidates = tuple(choice.text("choice") for choice in choices)
        answers = (record.text("answer"),) if record.has("answer") else ()
        if not set(answers) <= set(candidates):
            raise DataError(f"{record.where}: the answer {record.text('answer')!r} is not one of the choices")
        yield Row(
            id=record.text("question_id"),
            where=record.where,
            media=_media(record, record.text("video_id"), "start", "end"),
            question=record.text("question"),
            answers=answers,
            candidates=candidates,
        )


def read_rareact(files: Files) -> Iterator[Row]:
    """Read rareact.csv (`id`, `video_id`, `start`, `end`, `class_id`, `verb`, `noun`, `annotation` from 0 to 4).

    The format of github.com/antoine77340/RareAct. The candidates of every clip are the actions of the whole file.
    """
    path = files.require("clips")
    names = ("id", "video_id", "start", "end", "class_id", "verb", "noun", "annotation")
    table = list(read_table(path, names))
    actions = {r.text("class_id"): f"{r.text('verb')} {r.text('noun')}" for r in table}
    candidates = tuple(dict.fromkeys(actions.values()))
    for record in table:
        if record.text("annotation") not in set("01234"):
            raise DataError(f"{record.where}: the field 'annotation' is {record.text('annotation')!r}, not 0 to 4")
        facts = {name: record.text(name) for name in ("video_id", "verb", "noun")}
        yield Row(
            id=record.text("id"),
            where=record.where,
            media=_media(record, record.text("video_id"), "start", "end"),
            candidates=candidates,
            answers=(f"{facts['verb']} {facts['noun']}",),
            facts={**facts, "annotation": int(record.text("annotation"))},
        )


def read_kinetics(files: Files) -> Iterator[Row]:
    """Read the columns label, youtube_id, time_start and time_end of Kinetics (github.com/cvdfoundation/kinetics-dataset).

    A video has the name YouTubeID_start_end with six digits per time. The candidates are the labels of the file.
    """
    table = list(read_table(files.require("clips"), ("label", "youtube_id", "time_start", "time_end")))
    candidates = tuple(sorted({record.text("label") for record in table}))
    for record in table:
        media = _segment(record, record.text("youtube_id"), "time_start", "time_end")
        answers = (record.text("label"),)
        yield Row(id=media.clips[0], where=record.where, media=media, answers=answers, candidates=candidates)
