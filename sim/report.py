"""One page that shows everything in a result folder: a single file without scripts, to be opened offline or sent to a colleague."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedimpr.errors import FedimprError
from sim.charts import COLOURS, charts
from sim.curves import write_curves
from sim.results import MEASURED, NEIGHBOURS, read_metrics, replace_file

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2330; --soft: #5b6472; --line: #dfe3e9; --bar: #d6e4f7; --good: #1a7f4b; --bad: #b3261e;
  --c0: #2463b8; --c1: #d9730d; --c2: #1a8a5a; --c3: #b3348a; --c4: #8060d0; --c5: #a0522d; --c6: #0f8f9e; --c7: #77808c;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #12161c; --card: #1b212a; --text: #e4e8ee; --soft: #9aa5b4; --line: #333c49; --bar: #24415f; --good: #5ccf93; --bad: #ff8a80;
  --c0: #6ea8f5; --c1: #f5a254; --c2: #58c994; --c3: #ea7fc6; --c4: #b39cf5; --c5: #d79a72; --c6: #56c8d6; --c7: #a6afbb;
} }
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .75rem; font-size: 1.15rem; }
section, header { margin-bottom: 1.25rem; }
section { padding: 1.1rem 1.25rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
p { margin: .3rem 0; }
.soft, figcaption, .legend { color: var(--soft); font-size: .9rem; }
.status { font-weight: 600; } .finished { color: var(--good); } .failed, .interrupted { color: var(--bad); }
.error { padding: .6rem .8rem; border-left: 4px solid var(--bad); background: var(--card); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-size: .85rem; line-height: 1.3; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; }
th:first-child { padding-left: 0; text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
td.bar {
  min-width: 8rem;
  background: linear-gradient(var(--bar) 0 0) no-repeat 0 50% / calc((100% - 4.2rem) * var(--part)) 65%;
}
table.counts { width: auto; margin-top: .75rem; font-size: .85rem; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: .4rem; }
.pictures img { min-width: 36rem; }
.charts { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
svg path, svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
.legend span { margin-right: .9rem; white-space: nowrap; }
.legend span::before {
  content: ""; display: inline-block; width: .9rem; height: .25rem; margin-right: .35rem; vertical-align: middle; background: var(--c);
}
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.25rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details + details { margin-top: .75rem; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: .5rem 0 0; overflow-x: auto; font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 40rem) {
  body { padding: 1rem .6rem 2rem; } section { padding: .9rem .8rem; } table { font-size: .9rem; } th, td { padding: .4rem .4rem; }
  td.bar { min-width: 0; background: none; } tbody th { white-space: normal; }
}
@media print { body { max-width: none; background: none; } section { break-inside: avoid; } }
"""
STYLE += "".join(
    f".c{n} {{ --c: var(--c{n}); stroke: var(--c); }} circle.c{n} {{ fill: var(--c); stroke: none; }}\n" for n in range(COLOURS)
)

COSTS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "images": ("impressions", lambda value: f"{value:,}"),
    "mining_seconds": ("mining (seconds)", lambda value: f"{value:,.1f}"),
    "mining_passes": ("teacher passes for mining (images)", lambda value: f"{value:,}"),
    "teacher_passes": ("teacher passes in all (images)", lambda value: f"{value:,}"),
    "steps": ("student steps", lambda value: f"{value:,}"),
    "batch": ("batch", lambda value: f"{value:,}"),
    "peak_memory_mb": ("peak memory (MiB)", lambda value: f"{value:,.0f}"),
    "clients": ("clients", str),
    "excluded": ("excluded", str),
    "bytes_down": ("to clients (MB)", lambda value: f"{value / 1e6:,.2f}"),
    "bytes_up": ("from clients (MB)", lambda value: f"{value / 1e6:,.2f}"),
    "simulated_seconds": ("virtual clock (seconds)", lambda value: f"{value:,.1f}"),
}


class Measure(NamedTuple):
    """How a measure of impressions is shown."""

    name: str
    form: Callable[[Any], str]
    meaning: str


MEASURES: Mapping[str, Measure] = {
    "label_fidelity": Measure("label fidelity (%)", "{:.2%}".format, "how many the teacher takes for the class they were asked to show"),
    "confidence": Measure("confidence (%)", "{:.2%}".format, "the teacher's largest class probability, on average"),
    "mean_distance": Measure(
        "mean distance", "{:.4g}".format, "between two of them, in units of the teacher's features; more is more varied"
    ),
    "effective_number": Measure(
        "effective number",
        "{:.4g}".format,
        "how many wholly unlike ones would be as varied (Vendi score): from 1, where all are alike, to the number measured",
    ),
    "coverage": Measure(
        "coverage (%)",
        "{:.2%}".format,
        f"evaluation images that have one of them no farther than their {NEIGHBOURS}th nearest evaluation image; more is better",
    ),
    "frechet_distance": Measure(
        "Fréchet distance", "{:.4g}".format, "from the evaluation images, in squared units of the teacher's features; less is better"
    ),
    "mining_seconds": Measure("seconds per image", "{:.3g}".format, "wall time of mining over impressions mined"),
    "mining_passes": Measure("teacher passes per image", "{:,.4g}".format, "images sent through the teacher to mine one impression"),
}
MEASURED_HOW = (
    f"Measured on up to {MEASURED:,} impressions and as many evaluation images, in the teacher's penultimate features. Distances compare "
    "methods of one run, not runs. Coverage and Fréchet distance look at evaluation images: they are for this page, and choose nothing."
)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from what the folder holds; whatever is missing is said to be missing.

    Raises:
        FedimprError: the page cannot be written.
    """
    run, manifest, rows = (_read(folder / name, json.loads) for name in ("run.json", "manifest.json", "summary.json"))
    config = _read(folder / "config.yaml", yaml.safe_load)
    run, manifest, config = (part if isinstance(part, dict) else {} for part in (run, manifest, config))
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    title = str(config.get("name") or folder.name)
    body = [
        _header(title, config, manifest, run),
        _section("Results", _results(rows)),
        _section("Impressions", _picture(folder / "impressions.png", "A grid of impressions: one block per method, one column per class")),
        _section("Who holds what", _picture(folder / "partition.png", "A heat map of images per class and client")),
        _section("Costs", _costs(rows)),
        _section("What the impressions carry over", _transfer(rows)),
        _section("Excluded clients", _excluded(run)),
        _section("Training", _training(folder / "metrics.jsonl")),
        _section("The run", _facts(run)),
        _section("Settings", _details("Configuration", _pre(folder / "config.yaml")) + _details("Partition", _manifest(manifest))),
    ]
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{"".join(body)}
</body>
</html>
"""
    path = folder / "report.html"
    replace_file(path, page.encode(errors="replace"))
    return path


def conclude(folder: Path, error: str | None = None) -> None:
    """Close the record of a run that could not do so itself, and show in its report what was finished.

    Args:
        folder: its result folder.
        error: why it has failed; without one, a run that was still at work was killed, and is interrupted.
    """
    run = _read(folder / "run.json", json.loads)
    run = run if isinstance(run, dict) else {}
    if error is not None or run.get("status") == "running":
        ending = {"status": "interrupted"} if error is None else {"status": "failed", "error": error}
        replace_file(folder / "run.json", (json.dumps({**run, **ending}, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))
        write_report(folder)
        with suppress(FedimprError):  # of damaged metrics: the report says so
            write_curves(folder)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """The file's content, or nothing where it is missing or damaged: a report of a broken run is better than none."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n" if content else ""


def _missing(what: str) -> str:
    return f'<p class="soft">{escape(what)}</p>'


def _header(title: str, config: Mapping[str, Any], manifest: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    parameters = manifest.get("parameters")
    model, dataset = config.get("model"), config.get("dataset")
    facts = {
        "data set": manifest.get("dataset") or (dataset.get("name") if isinstance(dataset, dict) else dataset),
        "clients": manifest.get("clients") or config.get("clients"),
        "partition": manifest.get("recipe"),
        **(parameters if isinstance(parameters, dict) else {}),
        "model": model.get("name") if isinstance(model, dict) else model,
        "rounds": config.get("rounds"),
        "seed": run.get("seed", config.get("seed")),
        "evaluated on": dataset.get("evaluate") if isinstance(dataset, dict) else None,
    }
    said = " · ".join(f"{escape(key)} <b>{escape(_words(value))}</b>" for key, value in facts.items() if value is not None)
    status = str(run.get("status", "unknown"))
    note = " (still going on, or killed)" if status == "running" else ""
    if isinstance(run.get("wall_seconds"), int | float):
        note = f" after {_seconds(run['wall_seconds'])}"
    error = f'<p class="error">{escape(str(run["error"]))}</p>' if run.get("error") else ""
    line = f'<p><span class="status {escape(status)}">{escape(status)}</span>{escape(note)}</p>'
    return f"<header>\n<h1>{escape(title)}</h1>\n<p>{said}</p>\n{line}{error}\n</header>\n"


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return _missing("No method has finished.")
    head = ("method", "accuracy (%)", "ratio to the ensemble", "seconds")
    lines = []
    for row in rows:
        accuracy, ratio, seconds = (row.get(key) for key in ("accuracy", "ratio", "seconds"))
        bar = "<td>–</td>" if accuracy is None else f'<td class="bar" style="--part: {accuracy:.4f}">{100 * accuracy:.2f}</td>'
        rest = f"<td>{'–' if ratio is None else format(ratio, '.3f')}</td><td>{'–' if seconds is None else format(seconds, ',.1f')}</td>"
        lines.append(f'<tr><th scope="row">{escape(str(row.get("method")))}</th>{bar}{rest}</tr>')
    return _table(head, lines)


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in COSTS if any(row.get(key) is not None for row in rows)]
    lines = [
        f'<tr><th scope="row">{escape(str(row.get("method")))}</th>'
        + "".join(f"<td>{'–' if row.get(key) is None else escape(COSTS[key][1](row[key]))}</td>" for key in keys)
        + "</tr>"
        for row in rows
    ]
    return _table(("method", *(COSTS[key][0] for key in keys)), lines) if keys else ""


def _transfer(rows: Sequence[Mapping[str, Any]]) -> str:
    told = [(row, found) for row in rows if (found := _measures(row))]
    keys = list(dict.fromkeys(key for _, found in told for key in found))
    names = [MEASURES[key].name if key in MEASURES else key.replace("_", " ") for key in keys]
    lines = [
        f'<tr><th scope="row">{escape(str(row.get("method")))}</th>'
        + "".join(f"<td>{escape(_measured(key, found.get(key)))}</td>" for key in keys)
        + "</tr>"
        for row, found in told
    ]
    notes = [f"<li>{escape(str(row.get('method')))}: {escape(_words(note))}</li>" for row in rows for note in row.get("notes") or ()]
    meanings = [f"<dt>{escape(MEASURES[key].name)}</dt><dd>{escape(MEASURES[key].meaning)}</dd>" for key in keys if key in MEASURES]
    return (
        (_table(("method", *names), lines) if lines else "")
        + (f"<ul>{''.join(notes)}</ul>" if notes else "")
        + (f'<p class="soft">{escape(MEASURED_HOW)}</p><dl class="soft">{"".join(meanings)}</dl>' if meanings else "")
    )


def _measures(row: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on a row's impressions, and what mining one of them cost."""
    costs = {key: row[key] / row["images"] for key in ("mining_seconds", "mining_passes") if row.get("images") and row.get(key) is not None}
    return {**(row.get("transfer") or {}), **costs}


def _measured(key: str, value: Any) -> str:
    if value is None or key not in MEASURES:
        return _words(value)
    return MEASURES[key].form(value).removesuffix("%")  # the unit is in the head


def _table(head: Sequence[str], lines: Sequence[str], kind: str = "") -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="wide"><table{kind}>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def _picture(path: Path, alt: str) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return _missing(f"{path.name} is missing: it was not drawn.")
    return f'<figure class="pictures wide"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def _excluded(run: Mapping[str, Any]) -> str:
    told = run.get("excluded")
    if not isinstance(told, list):
        return ""
    return "<ul>" + "".join(f"<li>{escape(_words(line))}</li>" for line in told) + "</ul>" if told else _missing("None.")


def _training(path: Path) -> str:
    try:
        figures = charts(read_metrics(path))
    except FedimprError as error:
        return _missing(str(error))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _facts(run: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if key not in ("status", "error", "excluded") and value is not None:
            flat |= {str(k): v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    if not flat:
        return _missing("run.json is missing.")
    for key, name, form in (("wall_seconds", "wall time", _seconds), ("peak_memory_mb", "peak memory", "{:,.0f} MiB".format)):
        if isinstance(flat.get(key), int | float):
            flat[name] = form(flat.pop(key))
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_words(value))}</dd>" for key, value in flat.items())
        + "</dl>"
    )


def _manifest(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return _missing("manifest.json is missing.")
    rest = {key: value for key, value in manifest.items() if key not in ("counts", "sizes", "classes")}
    text = f"<pre>{escape(json.dumps(rest, indent=1, ensure_ascii=False))}</pre>"
    counts = manifest.get("counts") or []
    names = manifest.get("classes") or [f"class {k}" for k in range(len(counts[0]) if counts else 0)]
    lines = [
        f'<tr><th scope="row">{client}</th>' + "".join(f"<td>{count:,}</td>" for count in (*row, sum(row))) + "</tr>"
        for client, row in enumerate(counts)
    ]
    return text + _table(("client", *map(str, names), "all"), lines, ' class="counts"')


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _pre(path: Path) -> str:
    text = _read(path, str)
    return _missing(f"{path.name} is missing.") if text is None else f"<pre>{escape(text)}</pre>"


def _words(value: object) -> str:
    if isinstance(value, float):
        return format(value, ".4g") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return "–" if value is None else str(value)


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
