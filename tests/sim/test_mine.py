"""A long synthesis on disk: stopped anywhere and resumed, by however many workers, it ends in the same images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file

from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Impressions
from fedimpr.models import rebuild
from fedimpr.synthesis import silent
from fedimpr.synthesis.streams import Job
from sim import parts
from sim.config import CONFIGS, call
from sim.mine import Settings, run
from sim.mining import Task, mine
from sim.parts import PartsFolder
from sim.results import replace_file
from tests.makers import CLASSES, SHAPE, needs_a_compiler, small_ensemble, small_model
from tests.sim.tiny import SMALL, tiny

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def node(method: str) -> dict:
    return json.loads(json.dumps(tiny(Path("unused"), methods=[method]).synthesis[method]["synthesizer"]))


def task_of(teacher: Path, method: str = "cmi", **changed) -> Task:
    """Parts of 8, 8, 8, 8 and 4 images on two streams: parts 0, 2 and 4, and parts 1 and 3."""
    facts = {
        "student": None,
        "shape": SHAPE,
        "device": "cpu",
        "threads": 1,
        "compile": False,
        "synthesizer": node(method),
        "method": method,
    }
    return Task(**{"job": Job(count=36, part_size=8, streams=2, seed=0), "teacher": teacher, **facts, **changed})


def mined(task: Task, folder: Path, workers: int = 1) -> Impressions:
    return mine(task, folder, workers=workers, progress=silent)[0]


def same(one: Impressions, two: Impressions) -> bool:
    tensors = [(getattr(one, key), getattr(two, key)) for key in ("images", "targets", "labels")]
    return all(torch.equal(a, b) for a, b in tensors) and one.teacher_passes == two.teacher_passes


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "parts").iterdir())}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "ensemble.safetensors"
    small_ensemble(2).save(path)
    return path


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Impressions]:
    """A straight run: its folder, which tests copy, and its images."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, mined(task_of(teacher), folder)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def part(folder: Path, number: int) -> Path:
    return folder / "parts" / f"part-{number:05d}.safetensors"


def state(folder: Path, stream: int, following: int) -> Path:
    return folder / "state" / f"stream-{stream:03d}-{following:05d}.safetensors"


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda f: [part(f, 4).unlink(), part(f, 3).unlink(), state(f, 0, 6).unlink(), state(f, 1, 5).unlink()], {0, 1, 2}),
        (lambda f: [part(f, 4).unlink(), state(f, 0, 6).unlink(), state(f, 0, 4).unlink()], {1, 3}),
        (lambda f: cut(part(f, 3)), {0, 1, 2, 4}),
        (lambda f: cut(part(f, 0)), {1, 2, 3, 4}),
        (lambda f: [cut(part(f, 4)), cut(state(f, 0, 4))], {1, 3}),
        (lambda f: [cut(part(f, 4)), part(f, 1).write_bytes(b""), shutil.rmtree(f / "state")], {3}),
        (lambda f: part(f, 2).with_name("part-00002.safetensors.partial").write_bytes(b"half"), {0, 1, 2, 3, 4}),
    ],
    ids=["stopped early", "no state", "cut part", "cut first part", "cut part and state", "much", "half written"],
)
def test_what_is_lost_is_mined_again_and_comes_out_the_same(
    teacher: Path, finished: tuple[Path, Impressions], tmp_path: Path, damage: Callable[[Path], object], kept: set[int]
) -> None:
    straight, images = finished
    folder = tmp_path / "job"
    shutil.copytree(straight, folder)
    damage(folder)
    before = times(folder)
    assert same(mined(task_of(teacher), folder), images)
    after = times(folder)
    assert {number for number in range(5) if before.get(part(folder, number).name) == after[part(folder, number).name]} == kept


def test_a_finished_job_is_read_and_not_mined(teacher: Path, finished: tuple[Path, Impressions]) -> None:
    folder, images = finished
    before = times(folder)
    assert same(mined(task_of(teacher), folder), images) and times(folder) == before
    assert len(images) == 36 and images.images.dtype == torch.float32


def test_stopped_at_any_write_it_goes_on_to_the_same_images(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C or worse just before each of the writes: job.json, and three parts each with the state after it."""
    task = task_of(teacher, job=Job(count=20, part_size=8, streams=1, seed=0))
    straight = mined(task, tmp_path / "straight")
    for writes in range(7):
        left = iter(range(writes))

        def until(path: Path, content: bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace_file(path, content)

        folder = tmp_path / str(writes)
        with monkeypatch.context() as patch:
            patch.setattr(parts, "replace_file", until)
            with pytest.raises(KeyboardInterrupt):
                mined(task, folder)
        assert len(times(folder)) == writes // 2  # the second write is the first part
        assert same(mined(task, folder), straight)


def test_a_part_that_cannot_be_mined_is_named_and_finished_ones_are_kept(
    teacher: Path, finished: tuple[Path, Impressions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.name == "part-00004.safetensors":
            raise OSError(28, "No space left on device")
        replace_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "replace_file", full)
        with pytest.raises(FedimprError, match=r"^mining cmi, stream 0, part 4: .*No space left on device\. Finished parts are kept\.$"):
            mined(task_of(teacher), tmp_path)
    assert sorted(times(tmp_path)) == ["part-00000.safetensors", "part-00002.safetensors"]
    assert same(mined(task_of(teacher), tmp_path), finished[1])


def test_progress_counts_images_and_goes_on_from_those_that_are_there(
    teacher: Path, finished: tuple[Path, Impressions], tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []

    def note(stage: str, done: int, total: int, **info: object) -> None:
        told.append((stage, done, total))

    folder = tmp_path / "job"
    shutil.copytree(finished[0], folder)
    part(folder, 3).unlink()
    mine(task_of(teacher), folder, workers=1, progress=note)
    assert told[0] == ("mining cmi", 28, 36) and told[-1] == ("mining cmi", 36, 36)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_another_job_is_refused_with_the_difference(teacher: Path, finished: tuple[Path, Impressions], tmp_path: Path) -> None:
    folder, _ = finished
    other = tmp_path / "other.safetensors"
    small_ensemble(3).save(other)
    before = times(folder)
    more = {**node("cmi"), "priors": {**node("cmi")["priors"], "batch_norm": 2.0}}
    for changed, difference in (
        ({"job": Job(count=36, part_size=8, streams=3, seed=0)}, "differs in job.streams: 2 then, 3 now"),
        ({"job": Job(count=36, part_size=9, streams=2, seed=1)}, "job.part_size: 8 then, 9 now; job.seed: 0 then, 1 now"),
        ({"synthesizer": more}, "synthesizer.priors.batch_norm: 1.0 then, 2.0 now"),
        ({"threads": 2}, "threads: 1 then, 2 now"),
        ({"teacher": other}, "teacher: '[0-9a-f]{64}' then, '[0-9a-f]{64}' now"),
        ({"student": other}, "student: None then, '[0-9a-f]{64}' now"),
    ):
        with pytest.raises(ConfigError, match=f"'output'.*{difference}$"):
            mined(dataclasses.replace(task_of(teacher), **changed), folder)
    assert times(folder) == before


def test_a_folder_of_unknown_origin_or_in_use_is_refused(teacher: Path, finished: tuple[Path, Impressions], tmp_path: Path) -> None:
    task = task_of(teacher)
    with PartsFolder(finished[0]).held(task.facts()), pytest.raises(ConfigError, match="no other process is mining into"):
        mined(task, finished[0])
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "part-00000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="this one has parts and no job.json"):
        mined(task, tmp_path)
    with pytest.raises(ConfigError, match=r"'output' is .*a folder that can be written to \((Not a directory|File exists)\)"):
        mined(task, teacher / "below")


def test_workers_are_1_to_the_number_of_streams(teacher: Path, tmp_path: Path) -> None:
    for workers, allowed in ((3, "at most streams=2"), (0, "an integer >= 1")):
        with pytest.raises(ConfigError, match=f"'workers' is {workers}; allowed: {allowed}"):
            mined(task_of(teacher), tmp_path / "out", workers)
    assert not (tmp_path / "out").exists()


def test_workers_take_the_gpus_in_turn(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(task_of(teacher, device="cuda").device_of(worker)) for worker in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(task_of(teacher).device_of(1)) == "cpu"


def test_a_teacher_in_half_precision_is_mined_as_its_float32_copy(tmp_path: Path) -> None:
    small_ensemble(2).half().save(tmp_path / "half")
    small_ensemble(2).half().float().save(tmp_path / "single")
    half, single = (mined(task_of(tmp_path / name, "di"), tmp_path / f"{name}-out") for name in ("half", "single"))
    assert same(half, single)


def test_models_that_cannot_be_used_are_refused_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    broken, five = small_ensemble(2), dict(small_model().spec) | {"classes": CLASSES + 1}
    broken.members[1].network[0].weight.data[0] = float("nan")
    broken.save(tmp_path / "broken")
    Ensemble([rebuild(five)]).save(tmp_path / "five")
    for changed, message in (
        ({"teacher": tmp_path / "broken"}, r"^loading the teacher: tensor members\.1\.network\.0\.weight of .* is not finite"),
        ({"student": tmp_path / "broken"}, "^loading the student: tensor"),
        ({"student": tmp_path / "five"}, "'student' is .*the teacher's 4 classes; this one has 5"),
        ({"shape": (1, 16, 16)}, r"'dataset.shape' is \[1, 16, 16\]; allowed: \[1, 8, 8\], the images that teacher="),
    ):
        with pytest.raises(FedimprError, match=message):
            mined(dataclasses.replace(task_of(teacher), **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command ---


def overrides(teacher: Path, output: Path, method: str, *more: str) -> list[str]:
    small = [f"synthesis.{method}.synthesizer.{key}={value}" for key, value in SMALL.items() if key in node(method)]
    job = ["count=20", "part_size=8", "streams=2", "dataset.shape=[1,8,8]"]
    return [f"teacher='{teacher}'", f"output='{output}'", f"synthesis=[{method}]", *job, *small, *more]


def settings(*arguments: str) -> Settings:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        tree = OmegaConf.to_container(compose("mine", overrides=list(arguments)), resolve=True)
    return call(Settings, tree, "")


@pytest.mark.parametrize("method", ["di", "cmi"])
def test_a_finished_job_leaves_its_products(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    student = tmp_path / "student.safetensors"
    small_ensemble(1).save(student)
    run(settings(*overrides(teacher, tmp_path, method, f"student='{student}'")))
    made = load_file(tmp_path / "impressions.safetensors")
    assert made["images"].shape == (20, *SHAPE) and made["targets"].shape == (20, CLASSES) and made["labels"].shape == (20,)
    by_part = [load_file(part(tmp_path, number))["images"] for number in range(3)]
    assert torch.equal(made["images"], torch.cat(by_part)) and [len(images) for images in by_part] == [8, 8, 4]
    found = json.loads((tmp_path / "measures.json").read_text())
    hits = sum(int(target.argmax() == label) for target, label in zip(made["targets"], made["labels"], strict=True))
    assert found["label_fidelity"] == hits / 20 and found["images"] == 20
    assert found["seconds"] == round(20 * found["seconds_per_image"], 3) > 0  # it is rounded to a millisecond, that of an image is not
    assert found["teacher_passes_per_image"] == found["teacher_passes"] / 20 >= 3  # three steps each
    assert (tmp_path / "impressions.png").read_bytes().startswith(b"\x89PNG")
    heading, _, row, last = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in row.split("|")[1:4]] == [method, "20", f"{100 * hits / 20:.2f}"]
    assert "label fidelity (%)" in heading and last == f"finished: {tmp_path}"


def test_wrong_settings_are_named(teacher: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ("teacher=null", "'teacher' is None; allowed: a file"),
        (f"teacher='{tmp_path}/none'", "'teacher' is '.*none'.*there is none"),
        ("output=null", "'output' is None; allowed: a folder"),
        ("synthesis=[di,cmi]", r"'synthesis' is \['di', 'cmi'\]; allowed: one method"),
        ("count=0", "'count' is 0; allowed: a number > 0"),
        ("part_size=many", "'part_size' is 'many'; allowed: an integer"),
        ("threads=0", "'threads' is 0"),
        ("workers=3", "'workers' is 3; allowed: at most streams=2"),
        ("dataset.shape=[8,8]", r"'dataset.shape' is \[8, 8\]; allowed: three integers"),
        ("dataset.shape=[1,9,9]", r"'dataset.shape' is \[1, 9, 9\]; allowed: \[1, 8, 8\]"),
        ("synthesis.di.synthesizer.lr=-1", "'synthesis.di.synthesizer.lr' is -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(settings(*overrides(teacher, tmp_path / "out", "di", wrong)))
    assert not (tmp_path / "out").exists()


def started(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sim.mine", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_failure_is_one_line_and_status_1(tmp_path: Path) -> None:
    process = started(f"teacher='{tmp_path}/none'", f"output='{tmp_path}/out'")
    out, err = process.communicate(timeout=60)
    (line,) = err.splitlines()
    assert process.returncode == 1 and out == "" and line.startswith("error: config key 'teacher' is ")


# --- processes ---


@pytest.mark.slow
def test_two_workers_mine_the_same_images_as_one(teacher: Path, finished: tuple[Path, Impressions], tmp_path: Path) -> None:
    assert same(mined(task_of(teacher), tmp_path, workers=2), finished[1])


@pytest.mark.slow
@needs_a_compiler
def test_compiled_it_mines_much_the_same_with_any_number_of_workers(teacher: Path, tmp_path: Path) -> None:
    task = task_of(teacher, "di", compile=True)
    one = mined(task, tmp_path / "one")
    assert same(one, mined(task, tmp_path / "two", workers=2))
    plain = mined(dataclasses.replace(task, compile=False), tmp_path / "plain")
    assert torch.allclose(one.images, plain.images, atol=1e-3)


@pytest.mark.slow
def test_a_worker_that_fails_stops_the_job_with_its_reason(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(FedimprError, match=r"^mining cmi, stream [01], part [01]: .*not finite.*Finished parts are kept\.$"):
        mined(task_of(teacher, synthesizer={**node("cmi"), "lr": 1e30}), tmp_path, workers=2)


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Its workers, not the helper that multiprocessing starts beside them."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def long(teacher: Path, output: Path) -> list[str]:
    """Ten parts that take a while each, so that a job can be stopped in its middle."""
    return overrides(teacher, output, "cmi", "count=80", "synthesis.cmi.synthesizer.steps=80")


@pytest.fixture(scope="module")
def long_straight(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """All that an undisturbed run of it makes."""
    folder = tmp_path_factory.mktemp("long")
    run(settings(*long(teacher, folder)))
    return load_file(folder / "impressions.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["kill the worker", "kill all", "interrupt"])
def test_whatever_stops_two_workers_the_job_goes_on_to_the_same_images(
    teacher: Path, long_straight: dict[str, torch.Tensor], tmp_path: Path, stop: str
) -> None:
    process = started(*long(teacher, tmp_path / "out"), "workers=2")
    until(lambda: len(list((tmp_path / "out" / "parts").glob("*.safetensors"))) >= 2, process)
    if stop == "kill the worker":
        os.kill(children(process.pid)[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if stop == "kill all" else signal.SIGINT)
    _, err = process.communicate(timeout=60)  # comes to its end only when the workers, who share stderr, have come to theirs
    assert process.returncode == {"kill the worker": 1, "kill all": -9, "interrupt": 130}[stop] and "Traceback" not in err
    if stop == "kill the worker":
        assert re.search(r"^error: mining cmi, stream [01], part \d+: the worker died \(signal 9\)\. Finished parts are kept\.$", err, re.M)
    if stop == "interrupt":
        assert "the same command goes on from there" in err
    done = len(list((tmp_path / "out" / "parts").glob("*.safetensors")))
    assert 2 <= done < 10
    run(settings(*long(teacher, tmp_path / "out")))
    made = load_file(tmp_path / "out" / "impressions.safetensors")
    assert made.keys() == long_straight.keys() and all(torch.equal(made[name], tensor) for name, tensor in long_straight.items())
