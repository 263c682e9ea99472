"""The kernel benchmark at toy sizes: all stages run on a CPU, and no failure of a measurement loses another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels.backend import Launch
from kernels.bench import __main__ as main_module
from kernels.bench import task as task_module
from kernels.bench import tuning
from kernels.bench.__main__ import all_tasks, line, main, run, table
from kernels.bench.contenders import as_rows
from kernels.bench.correctness import compare
from kernels.bench.journal import Journal, JournalError, Row, source_digest
from kernels.bench.machine import Machine
from kernels.bench.measure import Result, Stopwatch
from kernels.bench.sizes import FULL, IDEFICS_9B, OF_3B, OF_9B, SIZES
from kernels.bench.task import Failure, Task
from kernels.bench.variants import VARIANTS
from kernels.launch_files import read_launches

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"device": "cpu", "sizes": "quick"}
CONTENDERS = "tests.kernels.failing_contenders"
# what a machine with torch and triton alone lacks
SERVER_PACKAGES = (
    "alembic", "av", "faiss", "fastapi", "gguf", "limits", "llguidance", "msgspec", "multipart", "prometheus_client",
    "pydantic", "pydantic_settings", "sklearn", "sqlalchemy", "starlette", "timm", "tokenizers", "uvicorn", "zmq",
)  # fmt: skip


def task(name: str, stage: str = "1 tests", **arguments: object) -> Task:
    return Task(stage=stage, case="a case", name=name, function=f"{CONTENDERS}:{name}", arguments=arguments)


def test_all_stages_run_and_the_table_is_printed_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.jsonl"
    assert main(["--quick", "--out", str(file), "--stage-seconds", "600"]) == 0
    about, *rows = map(json.loads, file.read_text().splitlines())
    assert about["about"]["sizes"] == "quick"
    assert [stage[0] for stage in dict.fromkeys(row["stage"] for row in rows)] == list("123456")
    assert [row for row in rows if "WRONG" in row["note"]] == []
    failed = {(row["stage"][0], row["name"]) for row in rows if row["failure"]}
    assert failed == {(stage, name) for stage in "23" for name in VARIANTS}
    assert {row["failure"] for row in rows if row["failure"]} == {
        "BackendError: the variants of the kernel run only on a GPU"
    }
    assert {row["value"] for row in rows if "bits of a row" in row["case"]} == {1.0}
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert "all but a new image cached" in last


def test_a_measurement_that_fails_in_any_way_is_a_row_and_the_run_goes_on(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    hanging = Task(
        stage="1 tests", case="a case", name="hang", function=f"{CONTENDERS}:hang",
        arguments={"pid_file": str(pid_file)}, max_seconds=8,
    )  # fmt: skip
    missing = Task(stage="1 tests", case="a case", name="missing", function="no.such.module:measure")
    tasks = [task("kill_itself"), hanging, task("fail"), task("leave"), missing, task("succeed")]
    file = tmp_path / "bench.jsonl"
    assert run(tasks, Journal(file, ABOUT), "quick", max_seconds=600) == 0
    _, *rows = map(json.loads, file.read_text().splitlines())
    assert [row["failure"] for row in rows] == [
        "killed by SIGSEGV",
        "out of time after 8 seconds",
        "CompilationError: at 3:7: out of registers",
        "ended with exit code 3",
        "ModuleNotFoundError: No module named 'no'",
        None,
    ]
    assert rows[-1]["value"] > 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_run_that_was_cut_off_is_continued_and_measures_nothing_twice(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "bench.jsonl"
    tasks = [task("succeed", stage, log=str(log)) for stage in ("1 a", "2 b", "3 c")]
    run([*tasks[:2], task("fail", "2 b")], Journal(file, ABOUT), "quick")
    whole = file.read_text()
    file.write_text(whole + '{"stage": "3 c", "ca')  # it was killed while it wrote
    run([*tasks, task("fail", "2 b")], Journal(file, ABOUT), "quick")
    assert log.read_text().splitlines() == ["measured"] * 3
    assert file.read_text().startswith(whole)
    assert [json.loads(row)["stage"] for row in file.read_text().splitlines()[1:]] == ["1 a", "2 b", "2 b", "3 c"]


def test_failures_are_measured_again_on_request(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    tasks = [task("succeed"), task("fail")]
    failed = Row.of(tasks[0], Failure("killed by SIGKILL"))
    journal = Journal(file, ABOUT)
    journal.add(failed)
    journal.add(Row.of(tasks[1], Result(value=5.0)))
    again = Journal(file, ABOUT)
    assert again.rows[tasks[0].key] == failed
    again.forget_failures()
    run(tasks, again, "quick")
    assert Journal(file, ABOUT).rows[tasks[0].key].failure is None
    assert again.rows[tasks[1].key].value == 5.0  # it had succeeded, and was not measured again


def test_a_stage_that_is_out_of_time_leaves_rows_to_the_next_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "bench.jsonl", ABOUT)
    tasks = [task("succeed", "1 a"), task("fail", "1 a")]
    assert run(tasks, journal, "quick", max_seconds=1e-9) == 2
    assert journal.rows == {}
    assert run(tasks, journal, "quick") == 0
    assert len(journal.rows) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"about": {"device": "NVIDIA H100", "sizes": "full"}}\n', "has device 'NVIDIA H100', and this run has 'cpu'"),
        ("[1, 2]\n", "is not a file of this benchmark"),
        ("nothing\n", "is not a file of this benchmark"),
        (json.dumps({"about": ABOUT}) + '\n{"a": 1}\n', "has a line that is not a row"),
        ('{"a": 1}', "is not a file of this benchmark"),
        ('{"about": 1}\n', "is not a file of this benchmark"),
        ('{"about": {"device": "NVIDIA H100"}}\n{"stage": "3', "has device 'NVIDIA H100'"),
        (json.dumps({"about": ABOUT}) + '\n{"a": 1}\n{"stage": "3', "has a line that is not a row"),
        (b"\xff\xd8\xff\xe0 a photograph", "is not a file of this benchmark"),
    ],
)
def test_a_file_of_another_machine_or_kind_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    file, before = tmp_path / "bench.jsonl", content.encode() if isinstance(content, str) else content
    file.write_bytes(before)
    with pytest.raises(JournalError, match=message):
        Journal(file, ABOUT)
    assert file.read_bytes() == before


def test_an_empty_file_becomes_that_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    file.touch()
    assert Journal(file, ABOUT).rows == {}
    assert json.loads(file.read_text()) == {"about": ABOUT}


def test_a_run_of_other_sources_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--quick", "--out", str(tmp_path / "bench.jsonl"), "--stages", "1", "--stage-seconds", "0"]
    assert main(call) == 0
    assert main(call) == 0
    monkeypatch.setattr(main_module, "source_digest", lambda root: "another")
    assert main(call) == 2
    assert "and this run has 'another'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed", ["kernels/rows.py", "model/text/layers.py", "server/engine/device/runner.py", "bench/whole_model.py"]
)
def test_the_digest_is_that_of_the_measured_sources(changed: str, tmp_path: Path) -> None:
    file = tmp_path / changed
    file.parent.mkdir(parents=True)
    file.write_text("a = 1\n")
    (tmp_path / "bench" / "load.py").parent.mkdir(exist_ok=True)
    (tmp_path / "bench" / "load.py").write_text("b = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "bench" / "load.py").write_text("b = 2\n")
    assert source_digest(tmp_path) == before
    file.write_text("a = 2\n")
    changed_digest = source_digest(tmp_path)
    file.rename(file.with_name("renamed.py"))
    assert len({before, changed_digest, source_digest(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "8"], "stage '8' is not one of 1, 2, 3, 4, 5, 6, 7"),
        (["--stages", ""], "stage '' is not one of"),
        (["--stage-seconds", "-1"], "-1 is not 0 or more"),
        (["--stage-seconds", "nan"], "nan is not 0 or more"),
        (["--stages", "1,7"], "stage 7 and --launches need a GPU"),
        (["--launches", "launches.json"], "stage 7 and --launches need a GPU"),
    ],
)
def test_an_option_is_honoured_or_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.jsonl"
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--out", str(file), *arguments])
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_stages_may_be_separated_by_spaces_and_no_time_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.jsonl"
    assert main(["--quick", "--out", str(file), "--stages", "1, 4", "--stage-seconds", "0"]) == 0
    num_tasks = len([each for each in all_tasks(SIZES["quick"], is_gpu=False) if each.stage[0] in "14"])
    assert f"left: {num_tasks} rows" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 1


def test_stages_are_compared_with_the_machine_of_an_earlier_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "1": Result(value=1000.0, unit="GB/s"),
        "2": Result(value=100.0, unit="TFLOP/s"),
        "3": Result(value=4.0, num_bytes=2e6),
    }
    tasks = [
        Task(stage="1 machine", case="read", name="1", function=""),
        Task(stage="1 machine", case="product", name="2", function=""),
        Task(stage="5 step", case="a case", name="3", function=""),
    ]
    monkeypatch.setattr(main_module, "all_tasks", lambda sizes, is_gpu: tasks)
    monkeypatch.setattr(task_module, "run", lambda each, sizes: rows[each.name])
    for stage in "15":
        assert main(["--out", str(tmp_path / "bench.jsonl"), "--stages", stage]) == 0
    assert "50% of the bound" in capsys.readouterr().out.splitlines()[-1]


def test_a_wrong_result_is_the_status_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_module, "all_tasks", lambda sizes, is_gpu: [task("succeed", "2 correctness")])
    wrong = compare(torch.ones(3), torch.zeros(3) + 2)
    monkeypatch.setattr(task_module, "run", lambda each, sizes: wrong)
    assert main(["--out", str(tmp_path / "bench.jsonl")]) == 1


class TestLaunchesOnAGPU:
    """Options and the file of launches, as on a machine with a GPU, whose measurements are made up."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shipped = Launch(16, 4, 2)
        monkeypatch.setattr(tuning, "launch_config", lambda *key: shipped)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(main_module, "describe", lambda: dict.fromkeys(("device", "torch", "triton"), "an H100"))
        monkeypatch.setattr(main_module, "architecture", lambda: "sm_90")
        monkeypatch.setattr(task_module, "run", self.outcome)

    def outcome(self, each: Task, sizes: str) -> Result:
        assert each.launch is not None
        return Result(value=5.0 if each.launch["num_stages"] == 3 else 10.0)

    def call(self, folder: Path, *options: str) -> int:
        return main(
            ["--quick", "--out", str(folder / "bench.jsonl"), "--launches", str(folder / "launches.json"), *options]
        )

    def test_faster_launches_are_written_once_all_are_tried(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "launches.json"
        file.write_text("of an earlier run\n")
        assert self.call(tmp_path, "--stages", "7", "--stage-seconds", "0") == 1
        assert "rows of stage 7 are left" in capsys.readouterr().err
        assert file.read_text() == "of an earlier run\n"
        assert self.call(tmp_path, "--stages", "7") == 0
        assert {launch.num_stages for launch in read_launches(file).values()} == {3}

    def test_they_are_refused_without_their_stage(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            self.call(tmp_path, "--stages", "1")
        assert "--launches needs stage 7" in capsys.readouterr().err
        assert not (tmp_path / "launches.json").exists()


def test_the_benchmark_needs_no_package_of_the_server() -> None:
    """Run steps in a process that cannot import them, and find the function of every task."""
    program = f"""
import sys
for name in {SERVER_PACKAGES!r}:
    sys.modules[name] = None
from importlib import import_module
from kernels.bench.__main__ import all_tasks
from kernels.bench.sizes import SIZES
from kernels.bench.task import _result
tasks = all_tasks(SIZES["quick"], is_gpu=False)
for task in tasks:
    module, name = task.function.split(":")
    assert callable(getattr(import_module(module), name)), task
chosen = {{(task.stage, task.name): task for task in tasks if task.stage[0] in "456"}}
for task in chosen.values():
    print(task.stage, _result(task, "quick").value)
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout.splitlines()) == 2 + 3 + 4


def test_every_task_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "launch_config", lambda *key: Launch(16, 4, 2))
    for sizes in SIZES.values():
        for is_gpu in (False, True):
            keys = [each.key for each in all_tasks(sizes, is_gpu=is_gpu)]
            assert len(keys) == len(set(keys))
    assert {stage for stage, _, _ in keys} >= {tuning.STAGE}


def test_a_faster_launch_must_be_faster_over_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "launch_config", lambda *key: Launch(16, 4, 2))
    tasks = [each for each in tuning.tasks(FULL) if each.launch and each.launch["operator"] == "paged_decode"]
    cases = list(dict.fromkeys(each.case for each in tasks))
    assert len(cases) == 3

    def found(**microseconds: tuple[float | None, ...]) -> list[dict[str, object]]:
        """Return what is found where launches, by their numbers of stages, take these times in the cases."""
        times = {f"16 rows, 4 warps, {name[1:]} stages": values for name, values in microseconds.items()}
        rows = [
            Row(stage=each.stage, case=each.case, name=each.name, value=times[each.name][cases.index(each.case)])
            for each in tasks
            if each.name in times
        ]
        return tuning.faster_launches(tasks, {row.key: row for row in rows}, "sm_90")

    row = {"operator": "paged_decode", "architecture": "sm_90", "head_dim": 128, "dtype": "bfloat16"}
    assert found(s2=(10, 10, 10), s3=(9, 9, 11), s4=(5, 5, None)) == [{**row, **asdict(Launch(16, 4, 3))}]
    assert found(s2=(10, 10, 10), s3=(9.9, 9.8, 9.8)) == []  # within the noise
    assert found(s2=(10, None, 10), s3=(1, 1, 1)) == []
    assert found() == []


def test_rows_state_the_share_of_what_the_machine_allows() -> None:
    row = partial(Row, name="name")
    rows = [
        row(stage="1 machine", case="read", unit="GB/s", value=1000.0),
        row(stage="1 machine", case="copy, bytes read and written", unit="GB/s", value=1.0),
        row(stage="1 machine", case="product of 64 x 64, bfloat16", unit="TFLOP/s", value=100.0),
        row(stage="3 media", case="decode", value=4.0, num_bytes=2e6),
        row(stage="3 media", case="prefill", failure="killed by SIGSEGV"),
    ]
    assert Machine.of(rows) == Machine(read=1e6, flops=1e8)
    printed = table(rows, Machine.of(rows))
    assert "50% of the bound" in printed.splitlines()[-2]
    assert printed.endswith("killed by SIGSEGV")
    assert "bound" not in line(rows[3], Machine.of(rows[1:]))  # the machine could not be measured


def test_an_outcome_becomes_a_row() -> None:
    succeeded = Row.of(task("succeed"), Result(value=2.0, num_bytes=3.0, note="graph"))
    assert (succeeded.value, succeeded.num_bytes, succeeded.failure) == (2.0, 3.0, None)
    assert Row.of(task("fail"), Failure("killed by SIGKILL")).failure == "killed by SIGKILL"


def test_a_timing_is_per_call() -> None:
    calls: list[int] = []
    timing = Stopwatch(torch.device("cpu"), replays=3).time([lambda: calls.append(0)] * 4)
    assert len(calls) == 4 + 2 * 3 * 4
    assert timing.method == "cpu"
    assert timing.microseconds > 0


def test_the_sizes_match_the_models() -> None:
    """A decode step reads these GB of weights; the text cache takes 192 and 512 KiB per token."""
    assert [round(2 * spec.step_params / 1e9, 2) for spec in (OF_3B, OF_9B, IDEFICS_9B)] == [4.33, 15.51, 15.92]
    assert (OF_3B.text_bytes, OF_9B.text_bytes) == (192 << 10, 512 << 10)
    assert (OF_3B.media_bytes, OF_9B.media_bytes, IDEFICS_9B.media_bytes) == (3 << 20, 1 << 20, 8 << 20)


def test_the_packed_contenders_read_the_pool_without_a_copy() -> None:
    pages = torch.randn(4, 3, 2, 8, 16)
    key, value = as_rows(pages)
    for page in range(4):
        rows = slice(2 * 3 * 8 * page, 2 * 3 * 8 * page + 8)
        assert torch.equal(key[rows].transpose(0, 1), pages[page, :, 0])
        assert torch.equal(value[rows].transpose(0, 1), pages[page, :, 1])
    assert key.data_ptr() == pages.data_ptr()
