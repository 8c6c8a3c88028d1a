"""One page that shows everything in a result folder: a single file without scripts, to be opened offline or sent to a colleague."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedimpr.errors import FedimprError
from sim.by_task import FILE, PICTURE
from sim.charts import charts
from sim.curves import write_curves
from sim.html import details, document, duration, missing, pre, read, section, table, words
from sim.results import MEASURED, NEIGHBOURS, read_metrics, replace_file

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
    run, manifest, rows = (read(folder / name, json.loads) for name in ("run.json", "manifest.json", "summary.json"))
    config = read(folder / "config.yaml", yaml.safe_load)
    run, manifest, config = (part if isinstance(part, dict) else {} for part in (run, manifest, config))
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    title = str(config.get("name") or folder.name)
    body = [
        _header(title, config, manifest, run),
        section("Results", _results(rows)),
        section("Results by task", _by_task(folder)),
        section("Impressions", _impressions(folder)),
        section("Who holds what", _picture(folder / "partition.png", "A heat map of images per class and client")),
        section("Costs", _costs(rows)),
        section("What the impressions carry over", _transfer(rows)),
        section("Excluded clients", _excluded(run)),
        section("Training", _training(folder / "metrics.jsonl")),
        section("The run", _facts(run)),
        section("Settings", details("Configuration", pre(folder / "config.yaml")) + details("Partition", _manifest(manifest))),
    ]
    path = folder / "report.html"
    replace_file(path, document(title, "".join(body)))
    return path


def conclude(folder: Path, error: str | None = None) -> None:
    """Close the record of a run that could not do so itself, and show in its report what was finished.

    Args:
        folder: its result folder.
        error: why it has failed; without one, a run that was still at work was killed, and is interrupted.
    """
    run = read(folder / "run.json", json.loads)
    run = run if isinstance(run, dict) else {}
    if error is not None or run.get("status") == "running":
        ending = {"status": "interrupted"} if error is None else {"status": "failed", "error": error}
        replace_file(folder / "run.json", (json.dumps({**run, **ending}, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))
        write_report(folder)
        with suppress(FedimprError):  # of damaged metrics: the report says so
            write_curves(folder)


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
    said = " · ".join(f"{escape(key)} <b>{escape(words(value))}</b>" for key, value in facts.items() if value is not None)
    status = str(run.get("status", "unknown"))
    note = " (still going on, or killed)" if status == "running" else ""
    if isinstance(run.get("wall_seconds"), int | float):
        note = f" after {duration(run['wall_seconds'])}"
    error = f'<p class="error">{escape(str(run["error"]))}</p>' if run.get("error") else ""
    line = f'<p><span class="status {escape(status)}">{escape(status)}</span>{escape(note)}</p>'
    return f"<header>\n<h1>{escape(title)}</h1>\n<p>{said}</p>\n{line}{error}\n</header>\n"


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return missing("No method has finished.")
    head = ("method", "accuracy (%)", "ratio to the ensemble", "seconds")
    lines = []
    for row in rows:
        accuracy, ratio, seconds = (row.get(key) for key in ("accuracy", "ratio", "seconds"))
        bar = "<td>–</td>" if accuracy is None else f'<td class="bar" style="--part: {accuracy:.4f}">{100 * accuracy:.2f}</td>'
        rest = f"<td>{'–' if ratio is None else format(ratio, '.3f')}</td><td>{'–' if seconds is None else format(seconds, ',.1f')}</td>"
        lines.append(f'<tr><th scope="row">{escape(str(row.get("method")))}</th>{bar}{rest}</tr>')
    return table(head, lines)


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in COSTS if any(row.get(key) is not None for row in rows)]
    lines = [
        f'<tr><th scope="row">{escape(str(row.get("method")))}</th>'
        + "".join(f"<td>{'–' if row.get(key) is None else escape(COSTS[key][1](row[key]))}</td>" for key in keys)
        + "</tr>"
        for row in rows
    ]
    return table(("method", *(COSTS[key][0] for key in keys)), lines) if keys else ""


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
    notes = [f"<li>{escape(str(row.get('method')))}: {escape(words(note))}</li>" for row in rows for note in row.get("notes") or ()]
    meanings = [f"<dt>{escape(MEASURES[key].name)}</dt><dd>{escape(MEASURES[key].meaning)}</dd>" for key in keys if key in MEASURES]
    return (
        (table(("method", *names), lines) if lines else "")
        + (f"<ul>{''.join(notes)}</ul>" if notes else "")
        + (f'<p class="soft">{escape(MEASURED_HOW)}</p><dl class="soft">{"".join(meanings)}</dl>' if meanings else "")
    )


def _measures(row: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on a row's impressions, and what mining one of them cost."""
    costs = {key: row[key] / row["images"] for key in ("mining_seconds", "mining_passes") if row.get("images") and row.get(key) is not None}
    return {**(row.get("transfer") or {}), **costs}


def _measured(key: str, value: Any) -> str:
    if value is None or key not in MEASURES:
        return words(value)
    return MEASURES[key].form(value).removesuffix("%")  # the unit is in the head


def _by_task(folder: Path) -> str:
    """The accuracy matrices of a continual run and their measures; nothing of another."""
    told = read(folder / FILE, json.loads)
    if not isinstance(told, dict):
        return ""
    methods = told["methods"]
    names = list(dict.fromkeys(name for found in methods.values() for name in found["measures"]))
    rows = []
    for name in names:  # one that has not ended as many tasks as another has fewer measures
        values = [found["measures"].get(name) for found in methods.values()]
        cells = "".join(f"<td>{'' if value is None else f'{100 * value:.2f}'}</td>" for value in values)
        rows.append(f"<tr><td>{escape(name.replace('_', ' '))}</td>{cells}</tr>")
    picture = _picture(folder / PICTURE, "The accuracy on every task after every task")
    return table(("measure (%)", *methods), rows) + picture + details("Matrices", pre(folder / FILE))


def _impressions(folder: Path) -> str:
    """The picture of the methods' impressions, or one for each task."""
    alt = "A grid of impressions: one block per method, one column per class"
    by_task = sorted(folder.glob("impressions-task-*.png"))
    return "".join(_picture(path, alt) for path in by_task) or _picture(folder / "impressions.png", alt)


def _picture(path: Path, alt: str) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return missing(f"{path.name} is missing: it was not drawn.")
    return f'<figure class="pictures wide"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def _excluded(run: Mapping[str, Any]) -> str:
    told = run.get("excluded")
    if not isinstance(told, list):
        return ""
    return "<ul>" + "".join(f"<li>{escape(words(line))}</li>" for line in told) + "</ul>" if told else missing("None.")


def _training(path: Path) -> str:
    try:
        figures = charts(read_metrics(path))
    except FedimprError as error:
        return missing(str(error))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _facts(run: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for key, value in run.items():
        if key not in ("status", "error", "excluded") and value is not None:
            flat |= {str(k): v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    if not flat:
        return missing("run.json is missing.")
    for key, name, form in (("wall_seconds", "wall time", duration), ("peak_memory_mb", "peak memory", "{:,.0f} MiB".format)):
        if isinstance(flat.get(key), int | float):
            flat[name] = form(flat.pop(key))
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(words(value))}</dd>" for key, value in flat.items())
        + "</dl>"
    )


def _manifest(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return missing("manifest.json is missing.")
    rest = {key: value for key, value in manifest.items() if key not in ("counts", "sizes", "classes")}
    text = f"<pre>{escape(json.dumps(rest, indent=1, ensure_ascii=False))}</pre>"
    counts = manifest.get("counts") or []
    names = manifest.get("classes") or [f"class {k}" for k in range(len(counts[0]) if counts else 0)]
    lines = [
        f'<tr><th scope="row">{client}</th>' + "".join(f"<td>{count:,}</td>" for count in (*row, sum(row))) + "</tr>"
        for client, row in enumerate(counts)
    ]
    return text + table(("client", *map(str, names), "all"), lines, ' class="counts"')
