"""The CSV files of a run: they open in pandas and say what the JSON files say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas
import pytest

from fedimpr.errors import FedimprError
from sim.curves import Point, curves, points, write_curves
from sim.local import run_local
from sim.report import conclude
from sim.results import Row, RunFolder, read_metrics
from tests.sim.tiny import tiny

PLACES = {"time", "stage", "client", "method", "round", "step", "total"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_local(tiny(folder, "rounds=2", methods=["di"]))
    return folder


def test_the_table_is_the_same_in_both_files(folder: Path) -> None:
    rows, table = json.loads((folder / "summary.json").read_text()), pandas.read_csv(folder / "summary.csv", keep_default_na=False)
    assert list(table["method"]) == [row["method"] for row in rows]
    for n, row in enumerate(rows):
        flat = {key: value for key, value in row.items() if key not in ("transfer", "notes", "note")}
        flat |= {f"transfer.{name}": value for name, value in (row["transfer"] or {}).items()} | {"notes": "; ".join(row["notes"] or [])}
        for key in table.columns:
            value = flat.pop(key, None)
            assert str(table[key][n]) == "" if value is None else type(value)(table[key][n]) == value, key
        assert flat == {}  # everything has a column


def test_every_number_of_the_metrics_is_a_line_of_the_curves(folder: Path) -> None:
    table = pandas.read_csv(folder / "curves.csv")
    assert list(table.columns) == ["time", "stage", "series", "round", "step", "name", "value"]
    expected = [
        (line["time"], line["stage"], line.get("round"), line.get("step"), key, value)
        for line in read_metrics(folder / "metrics.jsonl")
        for key, value in line.items()
        if key not in PLACES and type(value) in (int, float)
    ]
    given = table[["time", "stage", "round", "step", "name", "value"]].astype(object).where(table.notna(), None)
    assert list(given.itertuples(index=False, name=None)) == expected and len(expected) > 100
    assert set(table["series"].dropna()) >= {"client 0", "client 2", "one-shot FedAvg", "FedAvg", "di"}
    assert table["round"].notna().all() and set(table["round"]) == {1, 2}


def test_what_was_not_finite_is_so_again() -> None:
    line = {
        "time": 1.5,
        "stage": "client",
        "client": 3,
        "round": 2,
        "loss": None,
        "norm": None,
        "gone": None,
        "note": "loss is nan; norm is -inf",
    }
    loss, norm = points(line)
    assert loss[:-1] == (1.5, "client", "client 3", 2, None, "loss") and math.isnan(loss.value)
    assert norm == Point(1.5, "client", "client 3", 2, None, "norm", -math.inf)


def test_texts_lists_and_truths_are_no_numbers() -> None:
    assert points({"time": 0.0, "stage": "mined", "notes": ["a"], "weights": "f00", "fine": True, "step": 3, "total": 9}) == []
    assert points({}) == []


def test_a_step_that_was_told_twice_counts_as_it_was_told_last() -> None:
    lines = [{"stage": "mining di", "round": 1, "step": 1, "total": 9, "loss": loss} for loss in (1.0, 2.0)]
    assert curves(lines) == {("mining di", "", "loss"): {(1, 1): 2.0}}


@pytest.mark.parametrize("error", [FedimprError("no"), KeyboardInterrupt()])
def test_a_run_that_fails_or_is_interrupted_leaves_them_too(tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("strategies.data_free.mine_and_distil", stops)
    with pytest.raises(type(error)):
        run_local(tiny(tmp_path, methods=["di"]))
    assert set(pandas.read_csv(tmp_path / "curves.csv")["stage"]) == {"client", "round", "candidate"}
    assert list(pandas.read_csv(tmp_path / "summary.csv")["method"]) == ["mean client", "one-shot FedAvg", "uniform ensemble"]


def test_a_run_that_was_killed_gets_its_curves_where_its_record_is_closed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, start=0.0)
    folder.metric("client", round=1, client=0, loss=0.5)
    conclude(tmp_path)
    assert list(pandas.read_csv(tmp_path / "curves.csv")["value"]) == [0.5]


def test_a_run_without_metrics_has_curves_without_lines(tmp_path: Path) -> None:
    assert write_curves(tmp_path).read_text() == "time,stage,series,round,step,name,value\n"


def test_commas_quotes_and_newlines_stay_in_their_cells(tmp_path: Path) -> None:
    notes = ['3 of 100, "blank"', "über\nzwei"]
    RunFolder(tmp_path, start=0.0).rows([Row("a, b", 0.5, None, 1.0, notes=notes), Row("c", float("nan"), None, 1.0)])
    table = pandas.read_csv(tmp_path / "summary.csv")
    assert list(table["method"]) == ["a, b", "c"] and table["notes"][0] == "; ".join(notes) and math.isnan(table["accuracy"][1])
