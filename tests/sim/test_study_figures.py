"""A study's figures: what they show is right, whoever draws it, and there is none where there are no data."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sim.charts import COLOURS, DARK, LIGHT
from sim.study import drawing, figures, mosaics, pictures
from sim.study.content import Content, Damage
from sim.study.curves import all_plots, curve_plots
from sim.study.drawing import draw
from sim.study.figures import write_figures
from sim.study.reading import read_study
from sim.study.series import Plot, axis_plots, ceiling_plot
from sim.study.statistics import entries
from tests.sim.made_up_study import made_up_study

NAMES = ["<script>", "$\\frac{", "a\nb", "a very long name of a value that cannot fit"]


def content(folder: Path, axes: Sequence[str], rows: Sequence[tuple[Sequence[object], int, str, float]]) -> Content:
    """A study of rows: setting, seed, method, accuracy. A point is named by its setting's place and its seed."""
    folder.mkdir(exist_ok=True)
    places = list(dict.fromkeys(tuple(setting) for setting, *_ in rows))
    lines = [
        [f"{places.index(tuple(setting))}-{seed}", *setting, seed, "finished", method, accuracy] for setting, seed, method, accuracy in rows
    ]
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["point", *axes, "seed", "status", "method", "accuracy"], *lines])
    return read_study(folder)


def metrics(folder: Path, point: str, lines: Sequence[dict[str, object]]) -> None:
    path = folder / "points" / point / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def by_axis(study: Content) -> dict[str, Plot]:
    return {plot.across: plot for plot in axis_plots(study, entries(study))}


def test_a_line_is_the_mean_over_seeds_with_their_deviation(tmp_path: Path) -> None:
    rows = [((alpha,), seed, "a", value) for alpha, values in ((1.0, (0.5, 0.7)), (0.1, (0.25, 0.25))) for seed, value in enumerate(values)]
    (plot,) = axis_plots(study := content(tmp_path, ["alpha"], rows), entries(study))
    # Of 0.5 and 0.7 the mean is 0.6, and the deviation sqrt(2 * 0.1^2 / 1). The line runs from left to right, whatever comes first.
    assert plot.panels[0].lines["a"] == [(0.1, 25.0, 0.0), (1.0, pytest.approx(60.0), pytest.approx(10 * math.sqrt(2)))]
    assert plot.kind == "lines" and plot.marks == ((0.1, "0.1"), (1.0, "1.0"))
    assert not plot.log  # one decade is not more than one
    assert plot.heights[0] <= 25.0 and plot.heights[-1] >= 60 + 10 * math.sqrt(2)


def test_an_axis_over_more_than_a_decade_is_logarithmic_unless_it_holds_zero(tmp_path: Path) -> None:
    for values, log in (((0.05, 1.0), True), ((0.0, 1.0), False), ((1, 10), False), ((2, 3), False)):
        study = content(tmp_path, ["x"], [((value,), 0, "a", 0.5) for value in values])
        assert by_axis(study)["x"].log == log


def test_other_axes_are_panels_and_an_axis_without_numbers_has_dots(tmp_path: Path) -> None:
    rows = [((alpha, kind, 3), 0, "a", 0.5) for alpha in (0.1, 1.0) for kind in ("x", "y")]
    plots = by_axis(content(tmp_path, ["alpha", "kind", "clients"], rows))
    assert plots.keys() == {"alpha", "kind"}  # clients has one value
    assert [panel.title for panel in plots["alpha"].panels] == ["kind x", "kind y"] and plots["alpha"].kind == "lines"
    assert [panel.title for panel in plots["kind"].panels] == ["alpha 0.1", "alpha 1.0"] and plots["kind"].kind == "dots"
    assert plots["kind"].marks == ((0.0, "x"), (1.0, "y"))


def test_an_axis_may_be_called_as_a_column_is(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "s", {"clients": [5, 20]}, (0,), pictures=False)
    assert [value for value, _ in by_axis(read_study(folder))["clients"].marks] == [5, 20]


def test_of_many_panels_a_dozen_is_drawn_and_the_rest_counted(tmp_path: Path) -> None:
    plot = by_axis(content(tmp_path, ["x", "y"], [((x, y), 0, "a", 0.5) for x in (1, 2) for y in range(20)]))["x"]
    assert (len(plot.panels), plot.hidden) == (12, 8)
    assert draw(plot).count('<svg viewBox="0 0 360') == 12 and "8 more are not drawn" in draw(plot)


def rounds(folder: Path, point: str, method: str, accuracies: Sequence[float], megabytes: float = 1, seconds: float | None = None) -> None:
    lines: list[dict[str, object]] = []
    for number, accuracy in enumerate(accuracies, 1):
        lines.append({"stage": "candidate", "round": number, "method": method, "test_accuracy": accuracy})
        lines.append({"stage": "round", "round": number, "bytes_down": 3e6 * megabytes, "bytes_up": 1e6 * megabytes})
        lines[-1] |= {} if seconds is None else {"simulated_seconds": seconds * number}
    metrics(folder, point, lines)


def test_curves_run_over_rounds_cumulated_traffic_and_simulated_time(tmp_path: Path) -> None:
    study = content(tmp_path, ["alpha"], [((0.1,), seed, "FedAvg", 0.75) for seed in (0, 1)])
    rounds(tmp_path, "0-0", "FedAvg", (0.5, 0.75), megabytes=1, seconds=30)
    rounds(tmp_path, "0-1", "FedAvg", (0.25, 0.75), megabytes=2, seconds=90)
    plots = {plot.name: plot for plot in curve_plots(study, Damage())}
    # Means of 0.5 and 0.25, of 4 and 8 MB after one round and 8 and 16 MB after two, of 30 and 90 and of 60 and 180 seconds.
    spread = pytest.approx(100 * math.sqrt(2 * 0.125**2))
    expected = {"round": (1, 2), "traffic": (6, 12), "simulated-time": (1, 2)}
    for name, (first, second) in expected.items():
        assert plots[f"accuracy-by-{name}"].panels[0].lines["FedAvg"] == [(first, 37.5, spread), (second, 75.0, 0.0)]
    assert [plot.across for plot in plots.values()] == ["round", "traffic (MB)", "simulated time (minutes)"]


def test_traffic_is_unknown_where_a_round_does_not_tell_it(tmp_path: Path) -> None:
    study = content(tmp_path, ["alpha"], [((0.1,), 0, "FedAvg", 0.75)])
    candidates = [{"stage": "candidate", "round": number, "method": "FedAvg", "test_accuracy": 0.5} for number in (1, 2, 3)]
    metrics(tmp_path, "0-0", [*candidates, *({"stage": "round", "round": number, "bytes_down": 1, "bytes_up": 1} for number in (1, 3))])
    assert [plot.name for plot in curve_plots(study, Damage())] == ["accuracy-by-round"]


def test_one_round_makes_no_curve(tmp_path: Path) -> None:
    study = content(tmp_path, ["alpha"], [((alpha,), 0, "a", 0.75) for alpha in (0.1, 1.0)])
    for point, size in (("0-0", 1), ("1-0", 2)):
        rounds(tmp_path, point, "a", (0.75,), megabytes=size, seconds=3)
    assert curve_plots(study, Damage()) == []


def test_an_axis_without_numbers_becomes_lines_of_one_panel_while_there_are_colours(tmp_path: Path) -> None:
    for strategies, lines, panels in (
        ("ab", ["FedAvg, a", "FedAvg, b"], [""]),
        ("abcdefghi", ["FedAvg"], [f"strategy {name}" for name in "abcdefghi"]),
    ):
        study = content(tmp_path / strategies, ["strategy"], [((name,), 0, "FedAvg", 0.75) for name in strategies])
        for place in range(len(strategies)):
            rounds(study.folder, f"{place}-0", "FedAvg", (0.5, 0.75))
        plot = curve_plots(study, Damage())[0]
        assert list(plot.panels[0].lines) == lines and [panel.title for panel in plot.panels] == panels


def test_students_stand_beside_the_ensemble_of_their_own_run(tmp_path: Path) -> None:
    rows = [
        ((0.1,), seed, method, value)
        for seed in (0, 1)
        for method, value in (("uniform ensemble", 0.75 + seed / 8), ("student by DI", 0.5))
    ]
    (plot,) = ceiling_plot(content(tmp_path, ["alpha"], [*rows, ((0.1,), 2, "student by DI", 0.25)]))
    assert plot.panels[0].lines == {"student by DI": [(75.0, 50.0, 0.0), (87.5, 50.0, 0.0)]}  # seed 2 has no ensemble
    assert plot.heights == tuple(mark for mark, _ in plot.marks)
    assert ceiling_plot(content(tmp_path, ["alpha"], [row for row in rows if row[2] != "student by DI"])) == []


def test_marks_stand_where_arithmetic_puts_them(tmp_path: Path) -> None:
    study = content(tmp_path, ["alpha"], [((alpha,), 0, "a", value) for alpha, value in ((0.01, 0.0), (0.1, 0.5), (1.0, 1.0))])
    marks = re.findall(r'<path class="mark c0" d="M([\d.]+) ([\d.]+)m', draw(by_axis(study)["alpha"]))[1:]  # the first is the legend's
    # The plotting area lies between x = 38 + 16 and 360 - 14 - 16, and between y = 12 and 236 - 38; 0.1 is the middle on a log scale.
    assert marks == [("54.0", "198.0"), ("192.0", "105.0"), ("330.0", "12.0")]


@pytest.mark.parametrize("plots", ["axis", "rounds"])
def test_both_ways_of_drawing_stand_any_names(plots: str, tmp_path: Path) -> None:
    study = content(tmp_path, ["<b>", "$x_"], [((name, other), 0, method, 0.5) for name in NAMES for other in (1, 2) for method in NAMES])
    rounds(tmp_path, "0-0", NAMES[0], (0.1, 0.2))
    for plot in axis_plots(study, entries(study)) if plots == "axis" else curve_plots(study, Damage()):
        assert "<script>" not in draw(plot) and "<b>:" not in draw(plot)
        figures.save(figures.draw(plot), tmp_path / "a.png", 50)
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width > 100


def test_both_ways_of_drawing_have_the_same_markers_and_never_the_same_look_twice() -> None:
    assert len(drawing.MARKERS) == len(figures.MARKERS) == len(set(figures.MARKERS))
    looks = [(number % COLOURS, drawing.marker(number)) for number in range(64)]
    assert len(set(looks)) == 64


def write(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in write_figures(folder)}


@pytest.mark.slow
def test_every_figure_is_written_where_its_data_are_and_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "s", {"partition.alpha": [0.05, 1.0], "strategy": ["x", "y"]}, (0, 1), rounds=3)
    drawn = write(folder)
    assert set(drawn) == {f"accuracy-by-{what}.png" for what in ("partition.alpha", "strategy", "round", "traffic", "simulated-time")} | {
        "student-by-ensemble.png",
        "partitions.png",
        "impressions.png",
    }
    assert write(folder) == drawn


def test_figures_that_have_no_data_any_more_are_removed(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "s", {"partition.alpha": [0.05]}, (0,), pictures=False, methods={"uniform ensemble": 0})
    (folder / "figures").mkdir()
    (folder / "figures" / "accuracy-by-old.png").touch()
    assert set(write(folder)) == {"partitions.png"} == {path.name for path in (folder / "figures").iterdir()}
    (folder / "results.csv").unlink()
    assert write_figures(folder) == [] and not list((folder / "figures").iterdir())


def test_settings_with_one_partition_share_a_panel_named_by_what_they_have_in_common(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "s", {"partition.alpha": [0.05, 1.0], "strategy": ["x", "y"]}, (0,), pictures=False)
    (folder / "points" / "0003" / "manifest.json").write_text("{")
    figure = mosaics.partitions(read_study(folder))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes[:-1]] == ["partition.alpha 0.05", "partition.alpha 1.0, strategy x"]


def test_a_partition_on_the_page_is_a_pixel_a_client_and_class_as_strong_as_there_are_images(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps({"counts": [[100, 0, 25], [0, 4, 0]], "classes": ["cat", "<dog>", "a bird of prey"]})
    )
    svg = pictures.partition(tmp_path, Damage())
    found = re.search(r"base64,([^\"]+)", svg)
    assert found
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))
    # Rows are classes, columns clients; the square root of 100, 25 and 4 over 100 is 1, 1/2 and 1/5 of 255.
    assert pixels[..., 3].tolist() == [[255, 0], [0, 51], [128, 0]]
    assert "cat" in svg and "&lt;dog&gt;" in svg and "a bird …" in svg and "at most 100 images" in svg
    for broken in ("{", "[]", '{"counts": [[1], [2, 3]]}', '{"counts": [[-1]]}', '{"counts": [["x"]]}', '{"counts": []}'):
        (tmp_path / "manifest.json").write_text(broken)
        assert pictures.partition(tmp_path, damage := Damage()) == ""
        assert damage.lines() == [f"manifest.json: that of point {tmp_path.name} cannot be read, so its partition is not drawn"]
    (tmp_path / "manifest.json").unlink()
    assert pictures.partition(tmp_path, damage := Damage()) == "" and damage.lines() == []


def test_forty_sheets_of_impressions_stay_within_the_pages_budget(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 640, 3), np.uint8)  # nothing is harder to compress
    Image.fromarray(noise).save(tmp_path / "impressions.png")
    sizes = {sheets: len(pictures.impressions(tmp_path, sheets, Damage())) for sheets in (1, 40)}
    assert 40 * sizes[40] <= 1.1 * pictures.BUDGET and sizes[1] > 3 * sizes[40]


def told_apart(colours: Sequence[str]) -> float:
    """The least distance between two colours, in CIELAB, for usual eyes and for those without one of the three receptors.

    Matrices: Machado, Oliveira and Fernandes, A physiologically-based model for simulation of color vision deficiency, 2009, severity 1.
    """
    sights = [
        np.eye(3),
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
        np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
    ]
    values = np.array([[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in colours])
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    least = math.inf
    for sight in sights:
        x, y, z = np.cbrt(np.clip(light @ sight.T, 0, 1) @ to_xyz.T / [0.95047, 1, 1.08883] + 1e-9).T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
        least = min(least, *(float(np.linalg.norm(one - two)) for one, two in itertools.combinations(lab, 2)))
    return least


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_apart_by_all_eyes(colours: Sequence[str]) -> None:
    assert told_apart(colours) > 12  # 2.3 is what one just sees
    assert told_apart(["#2463b8", "#8060d0"]) < 12  # a blue and a violet of before


def test_nothing_to_show_is_no_figure(tmp_path: Path) -> None:
    study = read_study(tmp_path)
    assert all_plots(study, [], Damage()) == [] and mosaics.partitions(study) is None and mosaics.impressions(study) is None
