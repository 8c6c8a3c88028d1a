"""A long synthesis on disk: stopped anywhere and resumed, by however many workers, it ends in the same images."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import sim.parts
from fedimpr.ensemble import Ensemble
from fedimpr.errors import ConfigError, FedimprError
from fedimpr.impressions import Impressions
from fedimpr.synthesis import silent
from fedimpr.synthesis.streams import Job
from sim.config import CONFIGS, call
from sim.mine import Settings, run
from sim.mining import Task, mine
from sim.parts import PartsFolder
from sim.results import RunFolder
from sim.weights import read_model
from tests.makers import CLASSES, SHAPE, small_ensemble, small_model
from tests.sim.tiny import SMALL, tiny

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def node(method: str) -> dict:
    return json.loads(json.dumps(tiny(Path("unused"), methods=[method]).synthesis[method]["synthesizer"]))


def task_of(teacher: Path, method: str = "cmi", **changed) -> Task:
    """Parts of 8, 8, 8, 8 and 4 images on two streams: parts 0, 2 and 4, and parts 1 and 3."""
    facts = {"student": None, "shape": SHAPE, "device": "cpu", "threads": 1, "synthesizer": node(method), "method": method}
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


def stopped_before_part_2_was_noted(folder: Path) -> None:
    """Killed between a part and the state after it."""
    for path in (part(folder, 4), state(folder, 0, 4), state(folder, 0, 6)):
        path.unlink()
    # What the run had kept at that time: the state before part 2. It is what stream 0 of a job that ended there leaves.
    short = mine_shorter(folder)
    shutil.copy(state(short, 0, 2), state(folder, 0, 2))


def mine_shorter(folder: Path) -> Path:
    facts = json.loads((folder / "job.json").read_text())
    short = folder.with_name(f"{folder.name}-short")
    mined(task_of(Path(facts["from"]) if "from" in facts else TEACHER[0], job=Job(count=16, part_size=8, streams=2, seed=0)), short)
    return short


TEACHER: list[Path] = []


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
