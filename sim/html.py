"""What the pages have in common: their look, their frame, and the small pieces of markup. Whatever comes from a file is escaped here."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from sim import stages
from sim.charts import COLOURS, DARK, LIGHT

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2330; --soft: #5b6472; --line: #dfe3e9; --bar: #d6e4f7; --good: #1a7f4b; --bad: #b3261e;
  LIGHT
}
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #12161c; --card: #1b212a; --text: #e4e8ee; --soft: #9aa5b4; --line: #333c49; --bar: #24415f; --good: #5ccf93; --bad: #ff8a80;
  DARK
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
@media print { :root { color-scheme: light; } body { max-width: none; background: none; } section { break-inside: avoid; } }
"""
for _word, _colours in (("LIGHT", LIGHT), ("DARK", DARK)):
    STYLE = STYLE.replace(_word, " ".join(f"--c{n}: {colour};" for n, colour in enumerate(_colours)))
STYLE += "".join(
    f".c{n} {{ --c: var(--c{n}); stroke: var(--c); }} circle.c{n} {{ fill: var(--c); stroke: none; }}\n" for n in range(COLOURS)
)


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    """The file's content, or nothing where it is missing or damaged: a report of a broken run is better than none."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def section(title: str, content: str) -> str:
    """A card with a heading; nothing where there is no content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n" if content else ""


def missing(what: str) -> str:
    """A soft line that says what is not there."""
    return f'<p class="soft">{escape(what)}</p>'


def table(head: Sequence[str], lines: Sequence[str], kind: str = "") -> str:
    """A table that scrolls in itself where it is wider than the page; ``lines`` are rows of markup."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="wide"><table{kind}>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def details(title: str, content: str) -> str:
    """What is folded until somebody asks for it."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def pre(path: Path) -> str:
    """A file as it stands."""
    text = read(path, str)
    return missing(f"{path.name} is missing.") if text is None else f"<pre>{escape(text)}</pre>"


def words(value: object) -> str:
    """A value of a JSON file for people."""
    if isinstance(value, float):
        return format(value, ".4g") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(words, value))
    return "–" if value is None else str(value)


def duration(value: float) -> str:
    """Seconds as people say them."""
    return f"{value:.1f} s" if value < 60 else stages.duration(value)


def document(title: str, body: str, *, style: str = STYLE, script: str = "") -> bytes:
    """A whole page that asks for nothing: no file, no font, no server.

    Args:
        title: of the tab.
        body: markup.
        style: the one style sheet.
        script: the one script. With one the policy names it and the style sheet by their hashes, so nothing else in the page can run;
            elements then have no ``style`` of their own.
    """
    styles, scripts = ("'unsafe-inline'", "") if not script else (_hash(style), f"; script-src {_hash(script)}")
    policy = f"default-src 'none'; img-src data:; style-src {styles}{scripts}; base-uri 'none'; form-action 'none'"
    end = f"<script>{script}</script>\n" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
{end}</body>
</html>
""".encode(errors="replace")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
