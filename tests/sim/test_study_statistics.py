"""A study's table: the numbers, what they leave out and say so, and files that are damaged."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from sim.study.reading import read_study
from sim.study.statistics import Entry, entries, interval, remarks, write_tables
from tests.sim.made_up_study import made_up_study

HEAD = ["point", "alpha", "seed", "status", "cause", "method", "accuracy", "ratio", "command"]


def study(folder: Path, rows: Sequence[Sequence[object]], **facts: object) -> Path:
    """Rows are alpha, seed, method, accuracy, and a status where it is not finished."""
    facts = {"name": "s", "axes": {"alpha": [0.1, 1]}, "seeds": [0, 1], "baseline": "base", **facts}
    (folder / "study.json").write_text(json.dumps(facts))
    lines = [
        [f"{alpha}-{seed}", alpha, seed, *(status or ["finished"]), "", method, accuracy, "", "run"]
        for alpha, seed, method, accuracy, *status in rows
    ]
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEAD, *lines])
    return folder


def table(folder: Path) -> dict[tuple[str, str], Entry]:
    return {(entry.setting[0], entry.method): entry for entry in entries(read_study(folder))}


def test_mean_deviation_and_paired_difference_are_those_of_hand_arithmetic(tmp_path: Path) -> None:
    accuracies = {"base": (0.5, 0.6, 0.7), "mine": (0.6, 0.8, 0.7)}
    study(tmp_path, [(0.1, seed, method, values[seed]) for method, values in accuracies.items() for seed in range(3)], seeds=[0, 1, 2])
    base, mine = table(tmp_path)["0.1", "base"], table(tmp_path)["0.1", "mine"]
    # Squares of (-0.1, 0, 0.1) and (-0.1, 0.1, 0) sum to 0.02; over n - 1 = 2 that is a variance of 0.01.
    assert (base.n, base.mean, base.deviation) == (3, pytest.approx(0.6), pytest.approx(0.1))
    assert (mine.n, mine.mean, mine.deviation) == (3, pytest.approx(0.7), pytest.approx(0.1))
    # Differences 0.1, 0.2, 0.0: mean 0.1, deviation 0.1. Student's t for two degrees of freedom and 95 % is 4.302653.
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (mine.difference, mine.low, mine.high) == tuple(pytest.approx(value, abs=1e-6) for value in (0.1, 0.1 - half, 0.1 + half))
    assert (mine.pairs, mine.unpaired, mine.missing) == (3, 0, 0)
    assert (base.difference, base.low, base.pairs, base.unpaired) == (None, None, 0, None)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_the_interval_is_that_of_scipys_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    mine, base = np.array(pairs).T
    if np.ptp(mine - base) > 1e-6:  # below that both sides are rounding
        expected = ttest_rel(mine, base).confidence_interval(0.95)
        assert interval((mine - base).tolist()) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_equal_differences_have_an_interval_without_width() -> None:
    assert interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def test_one_seed_has_no_deviation_and_no_interval_and_that_is_said(tmp_path: Path) -> None:
    study(tmp_path, [(0.1, 0, "base", 0.5), (0.1, 0, "mine", 0.75)], seeds=[0])
    mine = table(tmp_path)["0.1", "mine"]
    assert (mine.n, mine.deviation, mine.difference, mine.low, mine.high, mine.pairs) == (1, None, 0.25, None, None, 1)
    content = read_study(tmp_path)
    assert remarks(content, entries(content)) == ["2 of 2 lines rest on one seed only, so no deviation and no interval."]


def test_missing_partners_are_left_out_of_the_pairs_and_counted(tmp_path: Path) -> None:
    rows = [(0.1, seed, "base", 0.5) for seed in (0, 1, 3)] + [
        (0.1, seed, "mine", value) for seed, value in ((0, 0.5), (1, 0.75), (2, 1.0))
    ]
    study(tmp_path, rows, seeds=[0, 1, 2, 3])
    mine = table(tmp_path)["0.1", "mine"]
    # Pairs are seeds 0 and 1, with differences 0 and 0.25; seed 2 has no base and seed 3 no mine. The mean is over all three of mine.
    assert (mine.difference, mine.pairs, mine.unpaired) == (0.125, 2, 2)
    assert (mine.n, mine.mean, mine.missing) == (3, 0.75, 1)
    content = read_study(tmp_path)
    assert remarks(content, entries(content)) == [
        "2 of 2 lines rest on fewer seeds than the study has.",
        "2 results have no partner of the same seed and setting, and stay out of the differences.",
    ]


def test_pairs_never_cross_settings_and_a_setting_without_the_baseline_has_no_differences(tmp_path: Path) -> None:
    study(tmp_path, [(0.1, seed, "base", 0.5) for seed in (0, 1)] + [(1, seed, "mine", 0.75) for seed in (0, 1)])
    mine = table(tmp_path)["1", "mine"]
    assert (mine.difference, mine.pairs, mine.unpaired) == (None, 0, None)
    content = read_study(tmp_path)
    assert "1 of 2 settings have no result of the baseline, so no differences." in remarks(content, entries(content))


@pytest.mark.parametrize("status", ["failed", "interrupted", "running", "waiting"])
def test_what_a_run_says_before_it_is_finished_does_not_count_and_that_is_said(status: str, tmp_path: Path) -> None:
    study(tmp_path, [(0.1, 0, "base", 0.5), (0.1, 1, "base", 0.9, status)])
    assert (table(tmp_path)["0.1", "base"].mean, table(tmp_path)["0.1", "base"].missing) == (0.5, 1)
    content = read_study(tmp_path)
    assert f"Runs that are not finished do not count: 1 {status}." in remarks(content, entries(content))


def test_the_study_says_which_methods_are_shown_and_in_which_order(tmp_path: Path) -> None:
    rows = [(0.1, 0, method, 0.5) for method in ("a", "b", "c")]
    assert [entry.method for entry in entries(read_study(study(tmp_path, rows)))] == ["a", "b", "c"]
    assert [entry.method for entry in entries(read_study(study(tmp_path, rows, compare=["c", "nobody", "a"])))] == ["c", "a"]


def test_differences_are_taken_from_a_baseline_that_is_not_shown(tmp_path: Path) -> None:
    rows = [(0.1, seed, method, value) for seed in (0, 1) for method, value in (("base", 0.5), ("mine", 0.75))]
    assert table(study(tmp_path, rows, compare=["mine"]))["0.1", "mine"].difference == 0.25


def test_both_tables_hold_every_entry(tmp_path: Path) -> None:
    rows = [(0.1, seed, method, value) for seed in (0, 1) for method, value in (("base", 0.5), ("a | b", 0.75 + seed / 8))]
    paths = write_tables(study(tmp_path, rows, question="Which one?", command="python -m sim.study"))
    assert [path.name for path in paths] == ["table.csv", "table.md"]
    lines = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert [(line["alpha"], line["method"], line["n"], line["mean"]) for line in lines] == [
        ("0.1", "base", "2", "0.500000"),
        ("0.1", "a | b", "2", "0.812500"),
    ]
    # Differences 0.25 and 0.375: mean 0.3125, deviation 0.125 / sqrt(2), half an interval 12.706205 * 0.125 / 2 = 0.794138.
    assert [lines[1][name] for name in ("difference", "low", "high", "pairs")] == ["0.312500", "-0.481638", "1.106638", "2"]
    assert [lines[0][name] for name in ("difference", "low", "high", "unpaired")] == ["", "", "", ""]
    text = paths[1].read_text()
    assert "| 0.1 | a \\| b | 81.25 (8.84) | 2 | +31.25 | -48.16 to +110.66 | 2 |" in text
    assert "| 0.1 | base | 50.00 (0.00) | 2 | – | – | – |" in text
    for said in ("# s\n", "Which one?", "`python -m sim.study`", "from base, in points, paired by seed"):
        assert said in text


def test_a_cut_off_table_costs_its_last_line_and_says_so(tmp_path: Path) -> None:
    study(tmp_path, [(0.1, seed, "base", 0.5) for seed in (0, 1)])
    path = tmp_path / "results.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    content = read_study(tmp_path)
    assert [result.seed for result in content.results] == ["0"]
    assert content.notices == ("results.csv: line 3 is cut off and left out",)
    assert "Damaged: results.csv: line 3 is cut off" in write_tables(tmp_path)[1].read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0.1-5,0.1,5", "line 3 has 3 fields where the head has 9, and is left out"),
        ("0.1-5,0.1,5,finished,,base,ninety,,run", "line 3 has an accuracy of 'ninety' where a number in [0, 1] belongs, and is left out"),
        ("0.1-5,0.1,5,finished,,base,90.5,,run", "line 3 has an accuracy of '90.5' where a number in [0, 1] belongs, and is left out"),
        ("0.1-5,0.1,5,finished,,base,nan,,run", "line 3 has an accuracy of 'nan' where a number in [0, 1] belongs, and is left out"),
        ("../../etc,0.1,5,finished,,base,0.5,,run", "line 3 names no point ('../../etc'), and is left out"),
        ("0.1-0,0.1,0,finished,,base,0.5,,run", "line 3 says again what 0.1-0 has of base, and is left out"),
    ],
)
def test_a_damaged_line_is_named_and_the_rest_is_read(line: str, said: str, tmp_path: Path) -> None:
    study(tmp_path, [(0.1, seed, "base", 0.5) for seed in (0, 1)])
    path = tmp_path / "results.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    content = read_study(tmp_path)
    assert [result.seed for result in content.results] == ["0", "1"]
    assert content.notices == (f"results.csv: {said}",)


def test_many_damaged_lines_are_one_notice(tmp_path: Path) -> None:
    study(tmp_path, [(0.1, seed, "base", 2.0) for seed in range(1000)])
    (notice,) = read_study(tmp_path).notices
    assert notice.endswith("and 999 more like it") and "line 2 has an accuracy of '2.0'" in notice


# A study need not have costs yet, and what it does not say of itself is not known.
HARMLESS = [("costs.csv", None), ("study.json", b'{"axes": 3, "seeds": {}}\n')]


@pytest.mark.parametrize("file", ["study.json", "results.csv", "costs.csv"])
@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1, 2]\n", b"null\n", b"\xff\xfe\x00", b'"', b"a,b\n1,2\n", b'{"axes": 3, "seeds": {}}\n']
)
def test_no_file_can_stop_the_tables(file: str, content: bytes | None, tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "s", {"partition.alpha": [0.05]}, (0, 1), pictures=False)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert all(path.exists() for path in write_tables(folder))
    notices = read_study(folder).notices
    assert len(notices) == (0 if (file, content) in HARMLESS else 1)
    assert all(notice.startswith(file) and "\n" not in notice for notice in notices)


def test_an_empty_folder_has_empty_tables(tmp_path: Path) -> None:
    assert write_tables(tmp_path)[0].read_text().startswith("method,n,missing,mean")
    assert [notice.split(":")[0] for notice in read_study(tmp_path).notices] == ["study.json", "results.csv"]
