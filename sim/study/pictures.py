"""What a setting looks like, small enough for a page that shows forty of them: who holds what, and what was mined."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sim.charts import short
from sim.study.content import FINISHED, Content, Damage

BLUE = (0x24, 0x85, 0xDA)
WIDTH, CELL, LEFT, BOTTOM = 360, 14, 58, 32  # of a partition, in SVG units
MOST_WIDE = 1000  # pixels of a sheet of impressions
BUDGET = 2_000_000  # bytes that all sheets of a page may take together


def first_points(content: Content) -> dict[tuple[str, ...], str]:
    """The point that shows a setting: its first finished one, else its first."""
    chosen: dict[tuple[str, ...], str] = {}
    for only in (FINISHED, None):
        for result in content.results:
            if only is None or result.status == only:
                chosen.setdefault(result.setting, result.point)
    return {setting: chosen[setting] for setting in content.settings}


def read_counts(point: Path) -> NDArray[np.int64] | None:
    """Images by client and class from a point's ``manifest.json``; nothing where it is missing or damaged."""
    try:
        counts = np.asarray(json.loads((point / "manifest.json").read_bytes())["counts"], dtype=np.int64)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return counts if counts.ndim == 2 and counts.size and counts.min() >= 0 else None


def partition(point: Path, damage: Damage) -> str:
    """An SVG of who holds what. One pixel a client and class lies in it, as transparent as there are few images, so it fits any page."""
    counts = read_counts(point)
    if counts is None:
        if (point / "manifest.json").exists():
            damage.add("manifest.json", f"that of point {point.name} cannot be read, so its partition is not drawn")
        return ""
    clients, classes = counts.shape
    most = max(1, int(counts.max()))
    pixels = np.empty((classes, clients, 4), np.uint8)
    pixels[..., :3] = BLUE
    pixels[..., 3] = np.round(255 * np.sqrt(counts.T / most))
    width, height = WIDTH - LEFT - 8, min(CELL * classes, 220)
    names = _classes(point, classes)
    place = f'x="{LEFT}" y="2" width="{width}" height="{height}" preserveAspectRatio="none"'
    parts = [
        f'<image href="{_uri("png", Image.fromarray(pixels))}" {place}/>',
        f'<path class="grid" d="M{LEFT} 2h{width}v{height}h-{width}z"/>',
    ]
    step = -(-classes * 12 // height)
    for k in range(0, classes, step):
        y = 2 + height * (k + 0.5) / classes
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(short(names[k], 8))}</text>')
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if size * width / clients >= 22)
    for k in range(0, clients, step):
        parts.append(f'<text x="{LEFT + width * (k + 0.5) / clients:.1f}" y="{height + 15}" text-anchor="middle">{k}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{height + 29}" text-anchor="middle">client; at most {most:,} images of a class</text>')
    said = f"Images by class and client: {clients} clients, {classes} classes, at most {most:,} images of a class at a client"
    return f'<svg class="partition" viewBox="0 0 {WIDTH} {height + BOTTOM}" role="img" aria-label="{said}">{"".join(parts)}</svg>'


def impressions(point: Path, sheets: int, damage: Damage) -> str:
    """The point's picture of impressions, made small where ``sheets`` of them stand on the page."""
    path = point / "impressions.png"
    if not path.exists():
        return ""
    try:
        with Image.open(path) as image:
            sheet = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        damage.add("impressions.png", f"that of point {point.name} cannot be read ({type(error).__name__})")
        return ""
    alt = "Impressions: a block a method, a column a class"
    width = min(MOST_WIDE, sheet.width)
    while True:
        small = sheet.resize((width, max(1, round(sheet.height * width / sheet.width))), Image.Resampling.LANCZOS)
        uri = _uri("webp", small)
        if len(uri) <= BUDGET / max(sheets, 8) or width < 300:
            return f'<img alt="{alt}" width="{small.width}" height="{small.height}" src="{uri}">'
        width = round(width * 0.75)


def _classes(point: Path, number: int) -> list[str]:
    """The names of the classes; their numbers where the manifest has none."""
    names = json.loads((point / "manifest.json").read_bytes()).get("classes")
    return [str(name) for name in names] if isinstance(names, list) and len(names) == number else [str(k) for k in range(number)]


def _uri(kind: str, image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 80} if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
