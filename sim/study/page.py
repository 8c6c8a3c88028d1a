"""A study on one page: a single file that asks for nothing, to be opened offline or sent to a colleague."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from sim.html import document, missing, section
from sim.results import replace_file
from sim.study.browser import SCRIPT, STUDY_STYLE
from sim.study.content import FINISHED, Content, Damage, Result, finite
from sim.study.curves import all_plots
from sim.study.drawing import draw
from sim.study.reading import read_study
from sim.study.runs import anchor, settings
from sim.study.statistics import Entry, entries, explained, remarks

LONG = 30  # lines of a table that scrolls in itself
FAILURES = 50  # told at the top of the page


def write_page(folder: Path) -> Path:
    """Write ``study.html`` from what the folder holds; whatever is missing or damaged is said, and the rest is shown.

    Raises:
        FedimprError: the page cannot be written.
    """
    content, damage = read_study(folder), Damage()
    table = entries(content)
    figures = "".join(map(draw, all_plots(content, table, damage)))
    runs = settings(content, damage)
    body = [
        _header(content, [*content.notices, *damage.lines()]),
        section("Results", _results(content, table)),
        section("Figures", f'<div class="figures">{figures}</div>' if figures else ""),
        section("Settings and runs", runs),
    ]
    path = folder / "study.html"
    replace_file(path, document(content.study.name, "".join(body), style=STUDY_STYLE, script=SCRIPT))
    return path


def _header(content: Content, notices: Sequence[str]) -> str:
    study, runs = content.study, {point: lines[0] for point, lines in content.runs.items()}
    status = Counter(line.status or "of unknown status" for line in runs.values())
    total = max(len(runs), study.points)
    rest = [f"{count:,} {escape(name)}" for name, count in status.items() if name != FINISHED]
    unknown = total - len(runs)
    rest += [f"{unknown:,} of which nothing is known yet"] if unknown else []
    state = f'<b class="{FINISHED if status[FINISHED] == total else "unfinished"}">{status[FINISHED]:,} of {total:,} runs finished</b>'
    facts = {
        "seeds": ", ".join(study.seeds),
        "baseline": study.baseline or "",
        "base": " ".join(study.base),
        **{axis: ", ".join(values) for axis, values in study.axes.items()},
    }
    said = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)
    command = f"<dt>command</dt><dd><code>{escape(study.command)}</code></dd>" if study.command else ""
    told = "".join(f"<li>{escape(notice)}</li>" for notice in notices)
    return (
        f"<header>\n<h1>{escape(study.name)}</h1>\n"
        + (f'<p class="question">{escape(study.question)}</p>\n' if study.question else "")
        + f"<p>{', '.join([state, *rest])}</p>\n"
        + (f'<ul class="notices" aria-label="Files that are missing or damaged">{told}</ul>\n' if told else "")
        + f"</header>\n{section('The study', f'<dl>{said}{command}</dl>' if said or command else '')}"
        + section("Runs that failed or were stopped", _failures(runs.values()))
    )


def _failures(runs: Iterable[Result]) -> str:
    ended = [run for run in runs if run.status in ("failed", "interrupted")]
    lines = [
        f'<dt><a href="#{anchor(run.point)}">{escape(run.point)}</a> <span class="{escape(run.status)}">{escape(run.status)}</span></dt>'
        f"<dd>{escape(run.cause or 'no cause is known')}</dd>"
        for run in ended[:FAILURES]
    ]
    more = missing(f"{len(ended) - FAILURES:,} more stand below, at their settings.") if len(ended) > FAILURES else ""
    return f"<dl>{''.join(lines)}</dl>{more}" if lines else ""


def _results(content: Content, table: Sequence[Entry]) -> str:
    if not table:
        return missing("No run has finished.")
    seconds = _seconds(content)
    paired, known = any(entry.pairs for entry in table), any(entry.ratio is not None for entry in table)
    head = [*content.axes, "method", "accuracy (%)", "deviation", "n"]
    head += ["difference (points)", "95 % interval", "pairs"] if paired else []
    head += ["ratio to the ensemble"] if known else []
    head += ["seconds"] if seconds else []
    texts = len(content.axes) + 1
    cells = "".join(f'<th scope="col"{" class=text" if place < texts else ""}>{_breakable(name)}</th>' for place, name in enumerate(head))
    places = {setting: number for number, setting in enumerate(content.settings)}
    lines = []
    for entry in table:
        interval = "–" if entry.low is None else f"{_percent(entry.low, '+')} to {_percent(entry.high, '+')}"
        parts = [_text(value) for value in entry.setting]
        parts.append(f'<th scope="row">{escape(entry.method)}</th>')
        mean = f'<a href="#s{places[entry.setting]}">{100 * entry.mean:.2f}</a>'
        parts += [_number(entry.mean, mean), _number(entry.deviation, _percent(entry.deviation)), _number(entry.n, f"{entry.n}")]
        if paired:
            parts += [_number(entry.difference, _percent(entry.difference, "+")), _number(entry.low, interval)]
            parts.append(_number(entry.pairs or None, str(entry.pairs or "–")))
        if known:
            parts.append(_number(entry.ratio, "–" if entry.ratio is None else f"{entry.ratio:.3f}"))
        if seconds:
            cost = seconds.get((entry.setting, entry.method))
            parts.append(_number(cost, "–" if cost is None else f"{cost:,.1f}" if cost >= 1 else f"{cost:.2g}"))
        lines.append(f"<tr>{''.join(parts)}</tr>")
    said = [explained(content, table), "Every mean leads to its runs.", *remarks(content, table)]
    kind = "wide long" if len(lines) > LONG else "wide"
    return (
        f"{_controls(content, table)}"
        f'<div class="{kind}" tabindex="0" role="region" aria-label="Table of results"><table class="results">\n'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
        f'<p class="soft">{escape(" ".join(said))}</p>'
    )


def _controls(content: Content, table: Sequence[Entry]) -> str:
    """What filters the table; the script shows it, since without one it would do nothing."""
    columns = [(content.axes[place], place, [entry.setting[place] for entry in table]) for place in content.varying]
    columns.append(("method", len(content.axes), [entry.method for entry in table]))
    choices = "".join(
        f'<label>{escape(name)}<select data-column="{place}"><option value="">all</option>'
        + "".join(f"<option>{escape(value or '–')}</option>" for value in dict.fromkeys(values))
        + "</select></label>"
        for name, place, values in columns
    )
    text = '<label>text<input type="search" autocomplete="off" spellcheck="false"></label>'
    count = '<output aria-live="polite"></output>'
    return f'<div class="controls" role="search" aria-label="Filter the table" hidden>{text}{choices}{count}</div>\n'


def _seconds(content: Content) -> Mapping[tuple[tuple[str, ...], str], float]:
    """The mean of what a method took in a setting's finished runs, where that is known."""
    found: dict[tuple[tuple[str, ...], str], list[float]] = {}
    for result in content.finished:
        if (value := content.costs.get((result.point, result.method), {}).get("seconds")) is not None:
            found.setdefault((result.setting, result.method), []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def _text(value: str) -> str:
    number = finite(value)
    known = f' data-v="{number:g}"' if number is not None else ""
    return f'<td class="text"{known}>{escape(value or "–")}</td>'


def _number(value: float | None, shown: str) -> str:
    return f'<td data-v="{"" if value is None else f"{value:.6g}"}">{shown}</td>'


def _percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{100 * value:{sign}.2f}".replace("-", "−")


def _breakable(name: str) -> str:
    """A dotted key that may go on in the next line after a dot."""
    return escape(name).replace(".", ".<wbr>")
