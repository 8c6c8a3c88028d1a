"""Two runs compared: what counts as a difference and what does not, where it begins, and what is said of damaged files."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sim import client_app, server_app
from sim.compare import main
from sim.config import Settings
from sim.curves import partings
from sim.grid import LocalGrid
from sim.local import run_local
from sim.weights import weights_hash
from tests.sim.tiny import tiny


@functools.lru_cache  # composing takes longer than running
def base(*more: str) -> Settings:
    return tiny(Path("unused"), *more, methods=["di"])


def ran(folder: Path, *more: str) -> Path:
    run_local(replace(base(*more), output=str(folder)))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round of data-free distillation."""
    return ran(tmp_path_factory.mktemp("compare") / "one")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of FedAvg."""
    return ran(tmp_path_factory.mktemp("compare") / "averaged", "strategy=fedavg", "rounds=2")


@pytest.fixture
def copy(one: Path, tmp_path: Path) -> Path:
    shutil.copytree(one, tmp_path / "copy")
    return tmp_path / "copy"


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0].strip()


def cells(text: str, first: str) -> list[list[str]]:
    """The cells of each table row that begins with this text."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == first]


def said(capsys: pytest.CaptureFixture[str], one: Path, two: Path, status: int) -> str:
    """What the command prints, where it ends with this status and without a complaint."""
    capsys.readouterr()  # what the runs have said
    assert main([str(one), str(two)]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --- what is the same ---


def test_a_run_that_is_repeated_has_the_same_results(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, one, ran(tmp_path / "two"), 0)
    assert text.splitlines()[0] == "same weights"
    for title in ("Settings", "Settings that decide no result", "Versions and machine", "Partition"):
        assert section(text, title) == "The same."
    assert [row[3] for name in ("student-by-di", "uniform-ensemble") for row in cells(section(text, "Weights"), name)] == ["0", "0"]
    assert cells(section(text, "Results"), "student by DI")[0][3] == "0"
    assert section(text, "Curves").endswith("are the same.")


def test_order_time_and_what_a_resumed_run_told_twice_are_no_difference(one: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    later = [{**line, "time": line["time"] + 100, **({"seconds": 9.0} if "seconds" in line else {})} for line in lines]
    twice = [*later, *(line for line in later if "step" in line)]
    random.Random(0).shuffle(twice)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in twice))
    assert said(capsys, one, copy, 0).splitlines()[0] == "same weights"


def test_settings_that_decide_nothing_stand_apart_and_count_for_nothing(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, one, ran(tmp_path / "two", "save_seconds=7"), 0)
    assert section(text, "Settings") == "The same."
    assert cells(section(text, "Settings that decide no result"), "save_seconds") == [["save_seconds", "300.0", "7.0"]]


# --- what differs ---


def test_another_seed_deals_and_trains_anew(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ran(tmp_path / "two", "seed=1")
    text = said(capsys, one, two, 1)
    assert text.splitlines()[0] == "weights differ from round 1 on"
    assert cells(section(text, "Settings"), "seed") == [["seed", "0", "1"]]
    hashes = [json.loads((folder / "manifest.json").read_text())["sha256"] for folder in (one, two)]
    assert cells(section(text, "Partition"), "sha256") == [["sha256", *(f'"{digest}"' for digest in hashes)]]
    accuracies = [json.loads((folder / "summary.json").read_text())[0]["accuracy"] for folder in (one, two)]
    points = f"{100 * (accuracies[1] - accuracies[0]):+.2f}"
    assert cells(section(text, "Results"), "mean client")[0][1:] == [*(f"{100 * accuracy:.2f}" for accuracy in accuracies), points]


def test_one_key_is_one_line_and_each_tensor_has_its_largest_difference(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ran(tmp_path / "two", "training.lr=0.02")
    text = said(capsys, one, two, 1)
    assert section(text, "Settings").splitlines()[2:] == ["| training.lr | 0.01 | 0.02 |"]
    assert section(text, "Partition") == "The same."
    a, b = (load_file(folder / "one-shot-fedavg.safetensors") for folder in (one, two))
    expected = {name: f"{(a[name].numpy().astype(float) - b[name].numpy()).__abs__().max():.3g}" for name in a}
    assert {row[1]: row[2] for row in cells(section(text, "Weights"), "one-shot-fedavg") if len(row) == 3} == expected
    # The first client's loss is the first thing that can differ, in the first round.
    assert section(text, "Curves").splitlines()[4].startswith("| client: loss (client 0) ")


def test_more_rounds_are_the_same_up_to_where_the_shorter_run_ends(
    averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ran(tmp_path / "two", "strategy=fedavg", "rounds=3")
    text = said(capsys, averaged, longer, 1)
    assert text.splitlines()[0] == "same weights up to round 2, where A ends"
    (row,) = cells(section(text, "Curves"), "client: loss (client 0)")
    assert row[1:3] == ["round 3", "-"]
    assert said(capsys, longer, averaged, 1).splitlines()[0] == "same weights up to round 2, where B ends"


def test_a_client_that_fails_in_the_second_round_parts_the_runs_there(
    averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = ClientApp()
    app.query()(client_app.who)
    turns: list[int] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        turns.append(1)
        if len(turns) == 5:  # client 1, of three, in round 2
            raise OSError("the disk is full")
        return client_app.train(message, context)

    settings = base("strategy=fedavg", "rounds=2", "strategy.minimum_updates=2")
    server_app.run(replace(settings, output=str(tmp_path / "two")), LocalGrid(app, 3, {}))
    text = said(capsys, averaged, tmp_path / "two", 1)
    assert text.splitlines()[0] == "weights differ from round 2 on"
    (row,) = cells(section(text, "Curves"), "client: loss (client 1)")
    assert (row[1], row[3]) == ("round 2", "-")
    assert cells(section(text, "Curves"), "candidate: test_loss (FedAvg)")[0][1] == "round 2"
    assert cells(section(text, "Curves"), "client: loss (client 0)") == []  # it trains from the same weights in both rounds


def test_another_method_is_there_in_one_run_only(one: Path, averaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, one, averaged, 1)
    assert cells(section(text, "Results"), "FedAvg")[0][1] == "-" and cells(section(text, "Results"), "student by DI")[0][2] == "-"
    assert cells(section(text, "Weights"), "student-by-di")[0][2:] == ["-", "-"]


# --- what cannot be compared ---


def test_what_is_no_run_is_one_line_and_status_2(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for other, problem in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "there is no run in")):
        assert main([str(one), str(other)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == f"error: comparing: {problem} {other}. Give the folder that a run names at its end.\n"


DAMAGE = {
    "config.yaml": ("is damaged", "Settings"),
    "manifest.json": ("is damaged", "Partition"),
    "run.json": ("is damaged", "Versions and machine"),
    "summary.json": ("is damaged", "Results"),
    "student-by-di.safetensors": ("is damaged", None),
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_is_named_and_the_rest_is_compared(file: str, one: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = b"{a: [" if file == "config.yaml" else (copy / file).read_bytes()[:-9]
    (copy / file).write_bytes(content)
    problem, title = DAMAGE[file]
    assert main([str(one), str(copy)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"error: {copy / file} {problem}") and line.endswith("; the rest is compared")
    assert title is None or section(out, title) == "Not compared."
    assert section(out, "Curves").endswith("are the same.")
    assert cells(section(out, "Weights"), "uniform-ensemble")[0][3] == "0"


@pytest.mark.parametrize(
    ("cut", "problem"),
    [
        (lambda content: content[:-9], "is cut off in its last line"),
        (lambda content: content.replace(b'"stage"', b'"stage', 1), "line 1 is not a JSON object"),
        (None, "is missing"),
    ],
)
def test_damaged_metrics_are_named_and_the_weights_are_compared(
    cut, problem: str, one: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "metrics.jsonl"
    path.write_bytes(cut(path.read_bytes())) if cut else path.unlink()
    assert main([str(copy), str(one)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert str(path) in line and problem in line
    assert out.splitlines()[0] == "same weights"


def test_the_module_ends_with_the_status(one: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for other, status in ((one, 0), (one / "nowhere", 2)):
        monkeypatch.setattr(sys, "argv", ["compare", str(one), str(other)])
        monkeypatch.delitem(sys.modules, "sim.compare", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("sim.compare", run_name="__main__")
        assert ended.value.code == status


def test_a_reader_that_stops_reading_changes_nothing(one: Path) -> None:
    """As under ``| head``: the pipe is closed before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sim.compare", str(one), str(one)]
    with os.fdopen(writing, "wb") as closed:
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, b"")


# --- curves ---

CURVES = st.dictionaries(st.integers(0, 6), st.sampled_from([0.0, 1.0, math.nan]), max_size=7)


@given(one=CURVES, two=CURVES)
def test_curves_part_where_values_differ_first_or_else_where_one_has_none(one: dict[int, float], two: dict[int, float]) -> None:
    curve = ("client", "client 0", "loss")
    found = partings(
        {curve: {(round, 0): value for round, value in one.items()}}, {curve: {(round, 0): value for round, value in two.items()}}
    )
    differing = [round for round in range(7) if round in one and round in two and repr(one[round]) != repr(two[round])]
    lonely = [round for round in range(7) if (round in one) != (round in two)]
    expected = (differing or lonely)[:1]
    assert [(parting.curve, parting.place) for parting in found] == [(curve, (round, 0)) for round in expected]
    assert all(repr(parting.one) == repr(one.get(round)) for parting, round in zip(found, expected, strict=True))


# --- the hash ---


def test_a_row_has_the_hash_of_its_file(one: Path) -> None:
    rows = {row["method"]: row["weights"] for row in json.loads((one / "summary.json").read_text())}
    assert rows.pop("mean client") is None
    files = {"one-shot FedAvg": "one-shot-fedavg", "uniform ensemble": "uniform-ensemble", "student by DI": "student-by-di"}
    assert rows == {method: weights_hash(load_file(one / f"{file}.safetensors")) for method, file in files.items()}
    told = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert rows == {line["method"]: line["weights"] for line in told if line["stage"] == "candidate"}


def test_the_hash_is_that_of_names_types_shapes_and_bytes() -> None:
    tensors = {"b": torch.tensor([[1, 2]], dtype=torch.int16), "a": torch.tensor(True)}
    # Little-endian: True is 01; 1 and 2 in 16 bits are 01 00 02 00.
    expected = b'["a", "torch.bool", []]\n' + b"\x01" + b'["b", "torch.int16", [1, 2]]\n' + b"\x01\x00\x02\x00"
    assert weights_hash(tensors) == hashlib.sha256(expected).hexdigest()


def test_the_hash_does_not_see_layout_or_order_and_sees_everything_else() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": tensor, "b": torch.zeros(0)}
    digest = weights_hash(tensors)
    assert weights_hash({"b": torch.zeros(0), "a": tensor.T.contiguous().T}) == digest
    others = [
        {"a": tensor},
        {"a": tensor, "c": torch.zeros(0)},
        {"a": tensor.reshape(3, 2), "b": torch.zeros(0)},
        {"a": tensor.view(torch.int32), "b": torch.zeros(0)},
        {"a": tensor + torch.eye(2, 3) * 1e-6, "b": torch.zeros(0)},
        {"a": tensor, "b": torch.zeros(0, 1)},
    ]
    assert len({digest, *map(weights_hash, others)}) == 1 + len(others)
