"""The report: everything in the folder, one file, no request, no text that becomes markup."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sim.charts import charts, ticks
from sim.plots import draw_impressions, draw_partition
from sim.report import conclude, write_report
from sim.results import Row, RunFolder, Sheet
from tests.sim.parsed import Page

HOSTILE = "<script>alert('x')</script>\"&"


def filled(path: Path, name: str = "demo", word: str = "cat") -> RunFolder:
    folder = RunFolder(path, start=time.monotonic())
    folder.write_config(f"name: {name!r}\nrounds: 1\ndataset: {{name: digits}}\nmodel: {{name: lenet5}}\n")
    manifest = {"dataset": "digits", "recipe": "dirichlet_per_class", "parameters": {"alpha": 0.25}, "clients": 2, "seed": 3}
    folder.write_manifest({**manifest, "counts": [[1500, 0], [2, 7]], "classes": [word, "dog"], "sha256": "abc"})
    for client in range(2):
        folder.metric("client", round=1, client=client, loss=0.5 * client, accuracy=0.5)
    for step in range(20):
        folder.metric("distilling", step=step, loss=1 / (step + 1), method=word)
    draw_partition([[1500, 0], [2, 7]], [word, "dog"], path / "partition.png", name)
    draw_impressions({word: Sheet(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), [word, "dog"])}, path / "impressions.png")
    costs = {"images": 40000, "teacher_passes": 1060000, "steps": 2000, "batch": 256}
    folder.rows([Row("mean client", 0.25, 0.5, 3.25), Row(f"student by {word}", 0.4, 0.8, 1.0, transfer={word: 0.875}, **costs)])
    folder.finish("finished", seed=3, config_hash="f00", excluded=[f"client 4: {word}"])
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("complete")).path


def test_everything_in_the_folder_is_on_the_page(tmp_path: Path) -> None:
    filled(tmp_path)
    page = Page(write_report(tmp_path))
    header = page.text[: page.text.index("Results")]
    for fact in ("demo", "digits", "clients 2", "dirichlet_per_class", "alpha 0.25", "lenet5", "seed 3", "finished"):
        assert fact in header
    for text in ("25.00", "0.500", "3.2", "40.00", "0.800", "40,000", "1,060,000", "256", "0.875", "client 4: cat", "f00", "abc"):
        assert text in page.text
    assert "1,500" in page.text  # client 0: 1500 + 0
    assert "client: loss" in page.text and "distilling: loss" in page.text
    assert page.text.count("is missing") == 0


def test_pictures_are_inside_and_described_and_nothing_is_fetched(tmp_path: Path) -> None:
    filled(tmp_path)
    page = Page(write_report(tmp_path))
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2
    assert all(str(picture["src"]).startswith("data:image/png;base64,iVBOR") and picture["alt"] for picture in pictures)
    assert all(attributes["role"] == "img" and attributes["aria-label"] for tag, attributes in page.tags if tag == "svg")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert page.tags[0] == ("html", {"lang": "en"})
    assert "prefers-color-scheme: dark" in page.source and 'name="viewport"' in page.source


def test_measures_of_the_impressions_have_names_units_and_meanings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, start=time.monotonic())
    transfer = {"label_fidelity": 0.875, "effective_number": 123.456, "frechet_distance": None}
    mined = Row(
        "student by DI", 0.5, None, 9.0, images=40, mining_seconds=6.0, mining_passes=1000, transfer=transfer, notes=["3 are <blank>"]
    )
    folder.rows([Row("mean client", 0.5, None, 1.0), mined])
    page = Page(write_report(tmp_path))
    told = page.text[page.text.index("What the impressions carry over") :]
    head = ["label fidelity (%)", "effective number", "Fréchet distance", "seconds per image", "teacher passes per image"]
    # 0.875 in per cent; 6 / 40 seconds and 1000 / 40 passes an image; what is not known is a dash; who mined nothing has no line.
    assert "".join(head) in told and "student by DI87.50123.5–0.1525" in told and "mean client" not in told
    assert "student by DI: 3 are <blank>" in told
    for meaning in ("asked to show", "from 1, where all are alike", "choose nothing", "up to 2,000 impressions"):
        assert meaning in told
    assert "evaluation images that have one" not in told  # coverage was not measured
    costs = page.text[page.text.index("Costs") : page.text.index("What the impressions carry over")]
    assert "mining (seconds)" in costs and "student by DI406.01,000" in costs


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    filled(tmp_path, name="<script>alert(1)</script>", word=HOSTILE)
    page = Page(write_report(tmp_path))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert('x')</script>") >= 5  # table, costs, transfer, excluded, class name, ...
    plain = tmp_path / "plain"
    filled(plain)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(write_report(plain)).tags]


def test_an_empty_folder_has_a_report_that_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "No method has finished." in page.text
    for file in ("impressions.png", "partition.png", "config.yaml", "manifest.json", "run.json"):
        assert f"{file} is missing" in page.text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, start=time.monotonic() - 3725)
    assert "running (still going on, or killed)" in Page(write_report(tmp_path)).text
    folder.rows([Row("mean client", float("nan"), None, 1.0)])
    folder.finish("interrupted", error="signal 15 <now>")
    page = Page(write_report(tmp_path))
    assert "interrupted after 1 h 02 min" in page.text
    assert "signal 15 <now>" in page.text
    assert "mean client" in page.text and "nan" not in page.text


@pytest.mark.parametrize("file", ["run.json", "manifest.json", "summary.json", "config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]\n", b"null\n", b"\xff\xfe", b'"text"', b"{]\n{]\n"])
def test_a_damaged_file_does_not_stop_the_report(file: str, content: bytes, tmp_path: Path, complete: Path) -> None:
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(content)
    Page(write_report(tmp_path))


def test_clients_of_one_round_stand_side_by_side() -> None:
    metrics = [{"stage": "client", "round": 1, "client": client, "loss": loss} for client, loss in enumerate((0.0, 0.5, 1.0))]
    (figure,) = charts(metrics)
    # Heights on an axis from 0 to 1 between y = 186 (220 - 34) and y = 10.
    assert re.findall(r'cy="([\d.]+)"', figure) == ["186.0", "98.0", "10.0"]


def test_each_client_is_a_line_over_the_rounds() -> None:
    metrics = [{"stage": "client", "round": r, "client": c, "accuracy": c / 2, "examples": 9} for r in (1, 2, 3) for c in (0, 1)]
    (figure,) = charts(metrics)
    # Rounds 1 to 3 between x = 46 and x = 338 (360 - 22); the axis ends at 0.5.
    assert re.findall(r'points="([^"]+)"', figure) == ["46.0,186.0 192.0,186.0 338.0,186.0", "46.0,10.0 192.0,10.0 338.0,10.0"]
    assert "client 0" in figure and "client 1" in figure


def test_what_has_one_value_or_none_has_no_chart() -> None:
    assert charts([{"stage": "candidate", "round": 1, "method": "a", "test_accuracy": 0.5}]) == []
    assert charts([{"stage": "client", "client": c, "loss": None, "note": "loss is nan"} for c in range(3)]) == []
    assert charts([]) == []


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_with_a_few_round_numbers(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    assert marks[0] <= low + 1e-6 * max(1, span) and marks[-1] >= low + span - 1e-6 * max(1, span)
    assert 2 <= len(marks) <= 8


def test_a_killed_runs_record_is_closed_and_a_finished_one_left_alone(tmp_path: Path) -> None:
    for status, expected in (("running", "interrupted"), ("finished", "finished")):
        folder = tmp_path / status
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"status": status, "seed": 3}))
        conclude(folder)
        assert json.loads((folder / "run.json").read_text()) == {"status": expected, "seed": 3}
        assert (folder / "report.html").exists() == (status == "running")
    conclude(tmp_path / "nowhere")  # a run that never began has nothing to close
