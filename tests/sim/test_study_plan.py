"""What a study asks for becomes runs, and what it cannot ask for is one clear line."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import ConfigError
from sim.config import CONFIGS, call, composed
from sim.study.collect import Collected, begin
from sim.study.plan import Study, checked, study_of, text_of


def study(**changes: Any) -> Study:
    keys: dict[str, Any] = {
        "name": "it", "question": "?", "base": ["experiment=demo"], "axes": {}, "seeds": [0], "compare": [], "baseline": None,
        "output": None, "workers": None, "per_gpu": 1, "address": None, "minutes": None, "memory_mb": None, "retry": False,
    }  # fmt: skip
    made: Study = call(Study, {**keys, **changes}, "")
    return made


def test_every_combination_with_every_seed_is_a_run_with_a_command_of_its_own() -> None:
    points = list(study(axes={"partition.alpha": [0.1, 1], "strategy": ["fedavg", "data_free"]}, seeds=[3, 4]).points())
    assert [tuple(point.values.values()) for point in points] == [
        (alpha, strategy, seed) for alpha in ("0.1", "1") for strategy in ("fedavg", "data_free") for seed in ("3", "4")
    ]
    assert points[0].command == "python -m sim experiment=demo partition.alpha=0.1 strategy=fedavg seed=3"
    assert points[0].name == "partition.alpha=0.1,strategy=fedavg,seed=3"
    assert len({point.name for point in points}) == len(points)


def test_an_axis_with_a_name_of_its_own_stands_for_several_settings() -> None:
    axes = {"federation": {"one-shot": ["rounds=1"], "ten rounds": ["strategy=fedavg", "rounds=10"]}}
    one, ten = study(axes=axes).points()
    assert one.overrides == ("experiment=demo", "rounds=1", "seed=0")
    assert ten.overrides == ("experiment=demo", "strategy=fedavg", "rounds=10", "seed=0") and ten.values["federation"] == "ten rounds"
    assert ten.name.startswith("federation=ten_rounds,seed=0-")  # a folder's name has no blanks; eight digits keep it apart from others


def test_names_of_folders_are_short_and_differ() -> None:
    long = [[f"method_{i}_{j}" for j in range(30)] for i in range(3)]
    names = [point.name for point in study(axes={"synthesis": long}).points()]
    assert len(set(names)) == 3 and max(map(len, names)) <= 120


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab c',=[]{}:\\$", max_size=6)
)


@given(st.recursive(plain, lambda parts: st.lists(parts, max_size=3), max_leaves=6))
def test_values_come_back_from_hydras_grammar_as_they_were(value: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={text_of(value)}"])
    told = override.value()
    assert _plain(told) == value


def _plain(told: Any) -> Any:
    return [_plain(part) for part in told] if isinstance(told, list) else str(told) if isinstance(told, QuotedString) else told


def test_the_command_line_pins_axes_adds_some_and_changes_the_study() -> None:
    made = study_of(
        ["study=demo", "partition.alpha=0.3", "training.lr=0.1,0.01", "seed=5,6", "clients=4", "study.minutes=2", "study.retry=true"]
    )
    assert {key: list(values) for key, values in made.axes.items()} == {"partition.alpha": ["0.3"], "training.lr": ["0.1", "0.01"]}
    assert made.seeds == (5, 6) and "clients=4" in made.base and made.minutes == 2 and made.retry
    assert study_of(["study=demo", "partition.alpha=range(1,4)"]).axes["partition.alpha"] == ("1", "2", "3")
    assert study_of(["study=demo", "~experiment"]).base == ("runtime.threads=1",)
    assert [part for part in study_of(["study=demo", "experiment=mnist"]).base if part.startswith("experiment")] == ["experiment=mnist"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["study=none_such"], "config key 'study' is 'none_such'; allowed: one of .*demo"),
        ([], "study"),
        (["study=demo", "study.minuts=3"], "'minuts' is '3'.*did you mean minutes"),
        (["study=demo", "study.minutes=-1"], "'minutes' is -1.0; allowed: null or a number > 0"),
        (["study=demo", "study.workers=two"], "'workers' is 'two'"),
        (["study=demo", "study.axes={}"], "'study.axes' is '{}'; allowed: settings themselves"),
        (["study=demo", "study.baseline=me"], "'baseline' is 'me'; allowed: one of compare"),
        (["study=demo", "seed=0,0"], "'seeds' is '0'; allowed: values that differ"),
        (["study=demo", "seed=a"], "'seed' is 'a'; allowed: integers >= 0"),
        (["study=demo", "partition.alpha=0.1,0.1"], "'axes.partition.alpha' is '0.1'; allowed: values that differ"),
        (["study=demo", "partition.alpha=glob(*)"], "'partition.alpha' is 'glob"),
        (["study=demo", "a b"], "a b"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        study_of(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"axes": {"partition.alpha": []}}, r"'axes.partition.alpha' is \[\]; allowed: values, one or more"),
        ({"axes": {"partition.alpha": 3}}, "'axes.partition.alpha' is 3"),
        ({"axes": {"how": {"one": "rounds=1"}}}, "'axes.how'.*a list of overrides"),
        ({"axes": {"seed": [1]}}, "'axes.seed'.*under seeds"),
        ({"seeds": []}, "'seeds'.*one value or more"),
        ({"name": "../x"}, "'name' is '../x'"),
    ],
)
def test_a_wrong_study_is_one_clear_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        study(**changes)


def test_an_axis_that_does_not_exist_or_has_a_wrong_value_is_found_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="'partition.alhpa' is '0.1'; allowed: a key of the configuration; did you mean partition.alpha"):
        checked(study(axes={"partition.alhpa": [0.1]}))
    with pytest.raises(ConfigError, match="'partition' is 'nope'; allowed: one of by_domain"):
        checked(study(axes={"partition": ["iid", "nope"]}))
    with pytest.raises(ConfigError, match="'clients' is 0; allowed: an integer >= 1"):
        checked(study(axes={"clients": [5, 0]}))


def test_two_values_that_make_the_same_run_are_found() -> None:
    with pytest.raises(ConfigError, match="'axes.how' is 'b'; allowed: values that make runs of their own: a makes the same"):
        checked(study(axes={"how": {"a": ["rounds=2"], "b": ["rounds=2"], "c": ["rounds=3"]}}))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml")))
def test_every_shipped_study_can_be_composed(name: str) -> None:
    made = study_of([f"study={name}"])
    assert (
        checked(made).hash() == composed(next(iter(made.points())).overrides).hash() and made.name == name and made.question.endswith("?")
    )


def test_a_folder_of_another_study_is_left_alone(tmp_path: Path) -> None:
    first = study(output=str(tmp_path), axes={"partition.alpha": [0.1]})
    begin(first, first.points(), "a command", "configs")
    begin(replace(first, seeds=(0, 1)), first.points(), "a command", "configs")  # more seeds: the same study
    told = (tmp_path / "study.json").read_bytes()
    for other in (replace(first, base=("experiment=mnist",)), replace(first, name="other"), replace(first, axes={"clients": [3]})):
        with pytest.raises(ConfigError, match="'study.output'.*a folder of the same study; here '(base|name|axes)' was "):
            begin(other, other.points(), "a command", "configs")
    assert (tmp_path / "study.json").read_bytes() == told
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ConfigError, match="whose study.json is whole; delete that file"):
        begin(first, first.points(), "a command", "configs")


def test_a_run_is_not_taken_for_a_study(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="'study.output'.*this one holds a run"):
        begin(study(output=str(tmp_path)), [], "a command", "configs")


def test_runs_that_finished_under_another_configuration_are_found(tmp_path: Path) -> None:
    it = study(output=str(tmp_path))
    (point,) = it.points()
    begin(it, [point], "a command", "before")
    folder = tmp_path / "points" / point.name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "config_hash": composed(point.overrides).hash()}))
    begin(it, [point], "a command", "now")  # something has changed, but nothing of this run
    (folder / "run.json").write_text(json.dumps({"status": "finished", "config_hash": "of before"}))
    with pytest.raises(ConfigError, match="the configuration has changed since seed=0 finished"):
        begin(it, [point], "a command", "later")


def test_results_are_rows_in_the_order_of_the_runs_whatever_axes_are_called(tmp_path: Path) -> None:
    """``clients`` is an axis here, and also a column of results: how many updates were good."""
    it = study(output=str(tmp_path), axes={"clients": [3, 5]})
    first, second = points = list(it.points())
    rows = [{"method": "FedAvg", "accuracy": 0.5, "clients": 2, "seconds": 1.5}, {"method": "uniform ensemble", "accuracy": 0.75}]
    for point, run, summary in (
        (first, {"status": "finished", "wall_seconds": 9.0}, rows),
        (second, {"status": "failed", "error": "no"}, rows),
    ):
        folder = tmp_path / "points" / point.name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "summary.json").write_text(json.dumps(summary))
    Collected(it).write(points)
    head, *lines = csv.reader((tmp_path / "results.csv").read_text().splitlines())
    assert head[:7] == ["point", "clients", "seed", "status", "cause", "method", "accuracy"] and head.count("clients") == 2
    assert [line[1:7] for line in lines] == [
        ["3", "0", "finished", "", "FedAvg", "0.5"],
        ["3", "0", "finished", "", "uniform ensemble", "0.75"],
        ["5", "0", "failed", "no", "", ""],  # what it had found so far depends on when it stopped
    ]
    assert lines[0][head.index("clients", 2)] == "2" and lines[0][-1] == first.command
    costs = list(csv.reader((tmp_path / "costs.csv").read_text().splitlines()))[1:]
    assert costs == [
        [first.name, "FedAvg", "1.5", "", "", ""],
        [first.name, "uniform ensemble", "", "", "", ""],
        [first.name, "", "", "", "", "9.0"],
    ]
