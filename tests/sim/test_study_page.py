"""A study's page: all that the folder holds, one file, and a real browser that clicks, types and asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.study.page import write_page
from tests.sim.browser import Browser
from tests.sim.made_up_study import FAILED, made_up_study
from tests.sim.parsed import Page

ALPHAS = [0.05, 0.1, 0.3, 1.0]
STATUSES = {4: "failed", 11: "running"}
HOSTILE = "<script>alert('x')</script>\"&"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four settings, three seeds, five methods; a run has failed and one is going on."""
    folder = made_up_study(tmp_path_factory.mktemp("study") / "one shot #1", {"partition.alpha": ALPHAS}, statuses=STATUSES)
    write_page(folder)
    return folder


def test_the_page_tells_the_question_the_state_the_table_and_what_failed(study: Path) -> None:
    page = Page(study / "study.html")
    for text in ("How do one-shot methods fare", "10 of 12 runs finished", "1 failed", "1 running", FAILED, "experiment=mnist"):
        assert text in page.text
    # 4 settings of 5 methods: the failed run and the one that goes on cost their settings a seed, not a line.
    body = re.search(r'<table class="results">.*?<tbody>(.*?)</tbody>', page.source, re.DOTALL)
    assert body and body[1].count("<tr>") == 20
    assert page.source.count('<figure class="plot single">') == 2  # by alpha, and students beside their ensemble
    assert "Runs that are not finished do not count: 1 failed, 1 running." in page.text


def test_behind_every_number_stand_its_commands_and_settings(study: Path) -> None:
    page = Page(study / "study.html")
    ids = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    inside = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a" and str(attributes["href"]).startswith("#")]
    assert len(inside) == 20 + 1 and {link[1:] for link in inside} <= ids  # every mean, and the run that failed
    for point, alpha, seed in ((0, 0.05, 0), (7, 0.3, 1)):
        assert f"python -m sim experiment=mnist partition.alpha={alpha} seed={seed} output=points/{point:04d}" in page.text
        assert f"{point:064x}" in page.text
        assert f"seed: {seed}\npartition.alpha: {alpha}" in page.text  # and not where it stood on a disk
    assert page.text.count("training.lr: 0.02") == 1  # what all runs share stands once
    files = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a" and not str(attributes["href"]).startswith("#")]
    assert len(files) == 2 * 10 and all((study / link).exists() for link in files)


def test_one_file_asks_for_nothing_and_names_its_script_and_style_by_their_hashes(study: Path) -> None:
    page = Page(study / "study.html")
    policy = next(str(attributes["content"]) for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-\S+='; script-src 'sha256-\S+='; base-uri 'none'; form-action 'none'", policy
    )
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in page.tags].count("style") == 1
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "form"}
    assert not [attributes for _, attributes in page.tags if "style" in attributes or any(key.startswith("on") for key in attributes)]
    assert not re.search(r"https?:|url\(|@import", page.source)
    pictures = [str(attributes.get("src") or attributes.get("href")) for tag, attributes in page.tags if tag in ("img", "image")]
    assert len(pictures) == 8 and all(re.match(r"data:image/(png|webp);base64,", picture) for picture in pictures)
    assert all(
        attributes["role"] == "img" and attributes["aria-label"]
        for tag, attributes in page.tags
        if tag == "svg" and "aria-hidden" not in attributes
    )


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    folder = made_up_study(
        tmp_path / "s",
        {"a": [HOSTILE, "plain"]},
        (0, 1),
        methods={f"student by {HOSTILE}": 0.0, "uniform ensemble": 0.0},
        statuses={0: "failed"},
    )
    facts = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**facts, **dict.fromkeys(("name", "question", "command"), HOSTILE), "seeds": [HOSTILE]}))
    (folder / "results.csv").write_text((folder / "results.csv").read_text().replace(FAILED, "<img src=x onerror=alert(1)>"))
    (folder / "points" / "0001" / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    page = Page(write_page(folder))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img" and not str(attributes["src"]).startswith("data:")] == []
    assert page.text.count("<script>alert('x')</script>") > 8


def test_an_empty_folder_has_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path))
    assert "No run has finished." in page.text
    assert "study.json: it is missing" in page.text and "results.csv: it is missing" in page.text


def test_a_study_that_has_just_begun_says_how_far_it_is(tmp_path: Path) -> None:
    folder = made_up_study(
        tmp_path / "s", {"partition.alpha": [0.1, 1.0]}, (0, 1), statuses={0: "running", 1: "waiting", 2: "waiting", 3: "waiting"}
    )
    page = Page(write_page(folder))
    assert "0 of 4 runs finished, 1 running, 3 waiting" in page.text and "No run has finished." in page.text
    (folder / "results.csv").unlink()
    assert "0 of 4 runs finished, 4 of which nothing is known yet" in Page(write_page(folder)).text


POINT_FILES = ("metrics.jsonl", "config.yaml", "manifest.json", "impressions.png")


@pytest.mark.parametrize("file", ["study.json", "results.csv", "costs.csv", *(f"points/0000/{name}" for name in POINT_FILES)])
@pytest.mark.parametrize("content", [b"{", b"[1, 2]\n", b"null\n", b"\xff\xfe\x00", b'"text"', b"{]\n{]\n"])
def test_a_damaged_file_is_one_line_and_the_rest_is_shown(file: str, content: bytes, tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "s", {"partition.alpha": [0.05, 1.0]}, (0, 1), pictures=False)
    (folder / file).write_bytes(content)
    page = Page(write_page(folder))
    told = [line for line in page.items if line.split(":")[0] in file]
    assert len(told) == 1
    assert file == "results.csv" or "class-aware ensemble" in page.text


def test_a_truncated_metrics_file_costs_one_line_and_says_so(tmp_path: Path) -> None:
    folder = made_up_study(tmp_path / "s", {"partition.alpha": [0.05]}, (0,), rounds=3, pictures=False)
    path = folder / "points" / "0000" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-20])
    page = Page(write_page(folder))
    assert f"metrics.jsonl: line {len(lines)} of point 0000 is cut off and left out" in page.text
    assert "Accuracy by round" in page.text


@pytest.mark.slow
def test_a_thousand_points_make_a_page_of_a_few_megabytes_in_seconds(tmp_path: Path) -> None:
    folder = made_up_study(
        tmp_path / "s", {"partition.alpha": [0.05, 0.1, 0.3, 1.0], "model": [f"m{k}" for k in range(25)]}, range(10), pictures=False
    )
    start = time.process_time()
    path = write_page(folder)
    assert time.process_time() - start < 20
    assert path.stat().st_size < 5_000_000
    assert "1,000 of 1,000 runs finished" in Page(path).text


# --- In a browser -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no browser: install chromium and chromedriver (apt-get install chromium chromium-driver)")
    pytest.importorskip("selenium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.open(study / "study.html")
    yield browser
    browser.driver.quit()


@pytest.fixture
def fresh(browser: Browser) -> Browser:
    browser.look()
    browser.driver.refresh()
    return browser


@pytest.mark.slow
def test_a_click_on_a_head_sorts_numbers_as_numbers_up_and_then_down(fresh: Browser) -> None:
    means = list(map(float, fresh.column("accuracy (%)")))
    assert means != sorted(means)
    button = fresh.head("accuracy (%)").find_element("tag name", "button")
    button.click()
    assert list(map(float, fresh.column("accuracy (%)"))) == sorted(means)
    assert fresh.head("accuracy (%)").get_attribute("aria-sort") == "ascending"
    button.click()
    assert list(map(float, fresh.column("accuracy (%)"))) == sorted(means, reverse=True)
    assert fresh.head("accuracy (%)").get_attribute("aria-sort") == "descending"
    # As texts "+2.94" stands before "-0.94", and a dash anywhere: what is unknown stands last, either way.
    for sign in (1, -1):
        fresh.head("difference (points)").find_element("tag name", "button").click()
        told = fresh.column("difference (points)")
        numbers = [float(text.replace("−", "-")) for text in told if text != "–"]
        assert numbers == sorted(numbers, key=lambda number: sign * number) and min(numbers) < 0 < max(numbers)
        assert told[len(numbers) :] == ["–"] * 4
    assert fresh.head("accuracy (%)").get_attribute("aria-sort") is None


@pytest.mark.slow
def test_enter_on_a_focused_head_sorts_and_the_keyboard_gets_there(fresh: Browser) -> None:
    from selenium.webdriver import ActionChains, Keys

    fresh.js("document.querySelector('.controls select:last-of-type').focus()")
    for _ in range(20):
        ActionChains(fresh.driver).send_keys(Keys.TAB).perform()
        if fresh.js("return document.activeElement.textContent") == "method":
            break
    ActionChains(fresh.driver).send_keys(Keys.ENTER).perform()
    methods = fresh.column("method")
    assert methods == sorted(methods) and methods[0] != methods[-1]
    ActionChains(fresh.driver).send_keys(Keys.ENTER).perform()
    assert fresh.column("method") == sorted(methods, reverse=True)
    assert fresh.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.slow
def test_the_filter_leaves_the_right_lines_and_says_how_many(fresh: Browser) -> None:
    from selenium.webdriver.support.ui import Select

    count = fresh.driver.find_element("css selector", ".controls output")
    assert count.text == "20 of 20 lines"
    text = fresh.driver.find_element("css selector", ".controls input")
    text.send_keys("Student")
    assert set(fresh.column("method")) == {"student by DI", "student by CMI"} and count.text == "8 of 20 lines"
    alpha, method = (Select(element) for element in fresh.driver.find_elements("css selector", ".controls select"))
    assert [option.text for option in alpha.options] == ["all", *map(str, ALPHAS)]
    alpha.select_by_visible_text("0.1")
    assert fresh.column("partition.alpha") == ["0.1", "0.1"] and count.text == "2 of 20 lines"
    method.select_by_visible_text("student by CMI")
    assert fresh.column("method") == ["student by CMI"] and count.text == "1 of 20 lines"
    text.send_keys(" nothing like it")
    assert fresh.column("method") == [] and count.text == "0 of 20 lines"
    text.clear()
    alpha.select_by_visible_text("all")
    assert fresh.column("method") == ["student by CMI"] * 4


@pytest.mark.slow
def test_a_phone_never_scrolls_the_page_sideways(fresh: Browser) -> None:
    fresh.js("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    for width in (360, 1200):
        fresh.look(width=width)
        assert fresh.js("return innerWidth") == width  # a phone shows a page that is too wide smaller than it is
        assert fresh.js("return document.documentElement.scrollWidth") <= width
    fresh.look(width=360)
    inside = "return [...document.querySelectorAll('.wide')].every(one => one.getBoundingClientRect().right <= innerWidth)"
    assert fresh.js(inside)


@pytest.mark.slow
def test_dark_mode_changes_the_colours_and_keeps_them_readable(fresh: Browser) -> None:
    colours = (
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map(c => c.match(/\\d+/g).slice(0, 3).map(Number))"
    )
    text, page = fresh.js(colours)
    assert sum(text) < 200 < 600 < sum(page)
    line = "return getComputedStyle(document.querySelector('.plot path.mark.c0')).fill"
    before = fresh.js(line)
    fresh.look(dark=True)
    text, page = fresh.js(colours)
    assert sum(page) < 200 < 600 < sum(text)
    assert fresh.js(line) != before


@pytest.mark.slow
def test_on_paper_the_page_is_light_and_has_no_controls(fresh: Browser) -> None:
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    fresh.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": scheme})
    assert sum(fresh.js("return getComputedStyle(document.body).color.match(/\\d+/g).slice(0, 3).map(Number)")) < 200
    assert not fresh.driver.find_element("css selector", ".controls").is_displayed()
    fresh.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.slow
def test_a_number_leads_to_its_runs_and_details_open(fresh: Browser) -> None:
    fresh.js("document.querySelectorAll('details').forEach(one => { one.open = false; })")
    fresh.driver.find_element("css selector", "table.results a[href='#s2']").click()
    opened = "return [...document.querySelectorAll('details.setting')].map(one => one.open)"
    assert fresh.js(opened) == [False, False, True, False]
    run = fresh.driver.find_element("css selector", "#s2 details.run")
    assert "alpha=0.3 seed=0" not in run.text
    run.find_element("tag name", "summary").click()
    assert "python -m sim experiment=mnist partition.alpha=0.3 seed=0" in run.text and "partition.alpha: 0.3" in run.text
    fresh.driver.find_element("css selector", "a[href='#run-0004']").click()
    assert FAILED in fresh.driver.find_element("css selector", "#run-0004").text
    run.find_element("link text", "report.html").click()
    assert fresh.driver.title == "a run"
    fresh.driver.back()


@pytest.mark.slow
def test_without_its_script_the_page_is_whole(browser: Browser, study: Path) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(study / "study.html")
        heads = browser.driver.find_elements("css selector", "table.results th[scope=col]")
        assert [head.text for head in heads][:3] == ["partition.alpha", "method", "accuracy (%)"]
        assert not browser.driver.find_element("css selector", ".controls").is_displayed()
        assert len(browser.driver.find_elements("css selector", "table.results tbody tr")) == 20
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        browser.open(study / "study.html")


@pytest.mark.slow
def test_the_console_is_silent_and_nothing_was_asked_for(fresh: Browser, study: Path) -> None:
    fresh.js("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    deadline = time.monotonic() + 10
    while not fresh.js("return [...document.images].every(one => one.complete && one.naturalWidth)") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fresh.js("return document.images.length") == 4
    fresh.listen()
    assert fresh.errors == []
    asked = {url for url in fresh.requests if not url.startswith("data:")}
    own = study.as_uri()
    assert (study / "study.html").as_uri() in asked and all(url.startswith(f"{own}/") for url in asked)
