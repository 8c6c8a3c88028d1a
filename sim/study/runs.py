"""Behind every number: the settings of a study with their pictures, and each run with its command, its settings and its results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from sim.html import duration, missing
from sim.study.content import Content, Damage, Result
from sim.study.pictures import first_points, impressions, partition

PICTURED = 40  # settings with pictures, at most
OPEN = 12  # settings that are unfolded from the start, where there are no more than these

# Columns of results.csv and costs.csv that a run's own table shows, where they hold something.
COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "accuracy": ("accuracy (%)", 100, ".2f"),
    "ratio": ("ratio to the ensemble", 1, ".3f"),
    "images": ("impressions", 1, ",.0f"),
    "steps": ("student steps", 1, ",.0f"),
    "teacher_passes": ("teacher passes (images)", 1, ",.0f"),
    "clients": ("clients", 1, ".0f"),
    "excluded": ("excluded", 1, ".0f"),
    "bytes_down": ("down (MB)", 1e-6, ",.2f"),
    "bytes_up": ("up (MB)", 1e-6, ",.2f"),
    "simulated_seconds": ("simulated seconds", 1, ",.1f"),
    "seconds": ("seconds", 1, ",.1f"),
    "mining_seconds": ("mining (seconds)", 1, ",.1f"),
}
# Settings that say where a run stood on somebody's disk: nobody else's business, and a page is made to be sent around.
PLACES = ("output", "resume", "dataset.folder", "dataset.cache")
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it


def anchor(point: str) -> str:
    """The place of a run on the page."""
    return "run-" + re.sub(r"[^A-Za-z0-9_-]", lambda found: f".{ord(found[0]):x}", point)


def settings(content: Content, damage: Damage) -> str:
    """Every setting with its pictures and runs, folded where there are many; what all runs share stands once."""
    runs = content.runs
    if not runs:
        return ""
    flat = _configs(content.folder, runs, damage)
    first = next(iter(flat.values()), {})
    shared = {key: text for key, text in first.items() if all(tree.get(key) == text for tree in flat.values())}
    shown = first_points(content)
    pictured = list(shown)[:PICTURED]
    by_setting: dict[tuple[str, ...], list[str]] = {}
    for point, lines in runs.items():
        by_setting.setdefault(lines[0].setting, []).append(point)
    unfolded = " open" if len(by_setting) <= OPEN else ""
    parts = []
    for number, (setting, points) in enumerate(by_setting.items()):
        folder = content.folder / "points" / shown[setting]
        look = _look(folder, content, runs[shown[setting]][0], len(pictured), damage) if setting in pictured else ""
        told = "".join(_run(content, point, runs[point], flat.get(point), shared) for point in points)
        label = escape(content.label(setting) or "all runs")
        parts.append(f'<details class="setting"{unfolded}><summary>{label}</summary><div id="s{number}">{look}{told}</div></details>\n')
    more = missing(f"Pictures are shown for {PICTURED} of {len(by_setting):,} settings.") if len(by_setting) > PICTURED else ""
    together = (
        f'<details class="shared"><summary>Settings that all runs share</summary><pre>{escape(_lines(shared))}</pre></details>\n'
        if shared
        else ""
    )
    return together + more + "".join(parts)


def _look(folder: Path, content: Content, result: Result, sheets: int, damage: Damage) -> str:
    """Who holds what, and what was mined."""
    pictures = {"Who holds what": partition(folder, damage), "Impressions": impressions(folder, sheets, damage)}
    figures = "".join(
        f'<figure class="wide"><figcaption>{name}, seed {escape(result.seed)}</figcaption>{picture}</figure>'
        for name, picture in pictures.items()
        if picture
    )
    return f'<div class="look">{figures}</div>' if figures else ""


def _run(content: Content, point: str, lines: Sequence[Result], tree: Mapping[str, str] | None, shared: Mapping[str, str]) -> str:
    """One run: what it came to, and how to do it again."""
    first = lines[0]
    folder = content.folder / "points" / point
    links = " · ".join(
        f'<a href="points/{quote(point, safe="")}/{name}">{name}</a>' for name in ("report.html", "config.yaml") if (folder / name).exists()
    )
    own = {key: text for key, text in (tree or {}).items() if key not in shared}
    facts = {
        "command": f"<code>{escape(first.values['command'])}</code>" if first.values.get("command") else "",
        "config hash": f"<code>{escape(first.values['config_hash'])}</code>" if first.values.get("config_hash") else "",
        "took": _took(content, point, lines),
        "files": links,
        "settings of its own": f"<pre>{escape(_lines(own))}</pre>"
        if own
        else ""
        if tree is not None
        else "config.yaml is missing or damaged",
    }
    said = "".join(f"<dt>{key}</dt><dd>{text}</dd>" for key, text in facts.items() if text)
    cause = f'<p class="error">{escape(first.cause)}</p>' if first.cause else ""
    status = escape(first.status or "of unknown status")
    return (
        f'<details class="run"><summary>seed {escape(first.seed or "–")}, <span class="{status}">{status}</span></summary>'
        f'<div id="{anchor(point)}">{cause}{_numbers(content, lines)}<dl>{said}</dl></div></details>\n'
    )


def _numbers(content: Content, lines: Sequence[Result]) -> str:
    """What a run's methods came to and cost; of their weights the beginning of the hash, the rest of which is in results.csv."""
    told = [(line, {**content.costs.get((line.point, line.method), {}), **_own(line)}) for line in lines if line.method]
    keys = [key for key in COLUMNS if any(key in found for _, found in told)]
    weights = any(line.values.get("weights") for line, _ in told)
    head = ["method", *(COLUMNS[key][0] for key in keys), *(["weights"] if weights else [])]
    rows = []
    for line, found in told:
        cells = [format(found[key] * COLUMNS[key][1], COLUMNS[key][2]) if key in found else "–" for key in keys]
        cells += [f"<code>{escape(line.values.get('weights', '')[:12]) or '–'}</code>"] if weights else []
        rows.append(f'<tr><th scope="row">{escape(line.method)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _own(line: Result) -> dict[str, float]:
    return {key: value for key in COLUMNS if (value := line.number(key)) is not None}


def _took(content: Content, point: str, lines: Sequence[Result]) -> str:
    costs = [content.costs.get((point, line.method), {}) for line in lines]
    wall = max((cost["wall_seconds"] for cost in costs if "wall_seconds" in cost), default=None)
    memory = max((cost["peak_memory_mb"] for cost in costs if "peak_memory_mb" in cost), default=None)
    return ", ".join(([duration(wall)] if wall is not None else []) + ([f"{memory:,.0f} MiB at most"] if memory is not None else []))


def _configs(folder: Path, points: Mapping[str, Any], damage: Damage) -> dict[str, dict[str, str]]:
    """Every point's settings by dotted key but :data:`PLACES`, as far as their files are there."""
    found = {}
    for point in points:
        path = folder / "points" / point / "config.yaml"
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
            if not isinstance(tree, dict):
                raise ValueError
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            damage.add("config.yaml", f"that of point {point} cannot be read")
            continue
        found[point] = {key: text for key, text in _flat(tree, "") if key not in PLACES}
    return found


def _flat(tree: Mapping[Any, Any], path: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{name}.")
        else:
            pairs.append((name, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)))
    return pairs


def _lines(tree: Mapping[str, str]) -> str:
    return "\n".join(f"{key}: {text}" for key, text in tree.items())
