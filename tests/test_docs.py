"""The documentation: its Python runs, its commands compose, its links lead somewhere."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from fedimpr.errors import ConfigError
from sim.config import CONFIGS, call, composed, construct
from sim.federation import build_model, check, methods_of, threads
from sim.mine import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    return [(text[: match.start(2)].count("\n") + 1, match[2]) for match in FENCE.finditer(text) if match[1] == language]


def run_blocks(page: Path) -> dict[str, Any]:
    """Run the Python of a page from top to bottom in one namespace; a traceback shows the page's own line numbers."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    with threads(1):
        for line, code in blocks(page.read_text(encoding="utf-8"), "python"):
            exec(compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True), namespace)
    return namespace


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in ``sh`` blocks and in inline code."""
    lines = [line for _, code in blocks(text, "sh") for line in code.replace("\\\n", " ").splitlines()]
    lines += [
        span for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if re.match(r"(python -m sim|fedimpr|make|flwr run)\b", span)
    ]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words := list(itertools.dropwhile(re.compile(r"\w+=").match, words)):
            yield words


def overrides_of(words: list[str]) -> list[str] | None:
    """The Hydra overrides that a command hands over; ``None`` where it is no command of ours."""
    match words:
        case ["python", "-m", "sim", *rest] | ["fedimpr", *rest]:
            pass
        case ["make", "demo" | "flower" as target, *given]:
            rest = [f"{'runtime=flower' if target == 'flower' else 'experiment=demo'}"]
            rest += [word for argument in given if argument.startswith("ARGS=") for word in shlex.split(argument.removeprefix("ARGS="))]
        case ["flwr", "run", *_] if "-c" in words:
            rest = json.loads(tomllib.loads(words[words.index("-c") + 1])["overrides"])
        case _:
            return None
    return [word for word in rest if word not in ("-m", "--cfg", "job", "...")]


def points(overrides: list[str]) -> Iterator[list[str]]:
    """The runs of a sweep; one where there is none."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()] if one.is_sweep_override() else [str(one.input_line)]
        for one in parsed
    ]
    yield from map(list, itertools.product(*choices))


def rehearse(overrides: list[str]) -> None:
    """Compose the settings and build everything that a run would before it starts; data only where they need no files."""
    settings = composed(overrides)
    for group in ("partition", "training", "distillation"):
        construct(getattr(settings, group), group)
    methods_of(settings)
    build_model(settings, None)
    if settings.dataset["source"] == "embedded":
        check(settings)


def test_the_readme_teaches_a_student_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks(ROOT / "README.md")
    printed = re.fullmatch(r"test accuracy: teacher (0\.\d+), student (0\.\d+)\n", capsys.readouterr().out)
    assert printed
    assert float(printed[1]) > 0.9
    assert float(printed[2]) > 0.7  # one in ten would be chance
    assert namespace["student"] is not namespace["teacher"]


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if blocks(page.read_text(encoding="utf-8"), "python")], ids=lambda page: page.name
)
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_blocks(page).keys() > {"__name__"}


DOCUMENTED = {
    tuple(found) for page in PAGES for words in commands(page.read_text(encoding="utf-8")) if (found := overrides_of(words)) is not None
}


@pytest.mark.parametrize("overrides", sorted(DOCUMENTED), ids=" ".join)
def test_a_documented_command_composes(overrides: tuple[str, ...]) -> None:
    for point in points(list(overrides)):
        rehearse(point)


def mining_overrides() -> list[list[str]]:
    """The overrides of every documented long synthesis."""
    words = [words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    return [found[3:] for found in words if found[:3] == ["python", "-m", "sim.mine"] and "..." not in found]


@pytest.mark.parametrize("overrides", mining_overrides(), ids=" ".join)
def test_a_documented_long_synthesis_composes(overrides: list[str]) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = call(Settings, OmegaConf.to_container(compose("mine", overrides), resolve=True), "")
    for name, node in settings.synthesis.items():
        construct(node["synthesizer"], name)


def test_what_is_wrong_with_a_command_would_be_found() -> None:
    assert mining_overrides()
    assert ("experiment=demo", "partition.alpha=0.5", "seed=1") in DOCUMENTED
    assert len(DOCUMENTED) > 10
    assert list(points(["experiment=demo", "seed=0,1"])) == [["experiment=demo", "seed=0"], ["experiment=demo", "seed=1"]]
    line = "make flower ARGS='experiment=demo seed=1'  # a comment"
    assert [overrides_of(words) for words in commands(f"```sh\n{line}\n```\n")] == [["runtime=flower", "experiment=demo", "seed=1"]]
    line = """A=1 flwr run /a -c \\\n  "overrides='[\\"seed=1\\"]'" """
    assert [overrides_of(words) for words in commands(f"```sh\n{line}\n```\n")] == [["seed=1"]]
    with pytest.raises(ConfigError, match="partition.alpha"):
        rehearse(["experiment=demo", "partition.alpha=-1"])


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands(page.read_text(encoding="utf-8")) if words[0] == "make" and len(words) > 1}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"]({page.relative_to(ROOT).as_posix()})" not in readme] == []
