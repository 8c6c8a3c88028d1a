"""Image files small enough to be made on the fly."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from PIL import Image

CONFIGS = Path(__file__).parents[2] / "configs"


def png(pixels: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def grey(count: int, side: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def write_parquet(path: Path, images: list[bytes | None], labels: list[Any], names: list[str] | None = None, **columns: list[Any]) -> None:
    """As Hugging Face writes an image data set; ``columns`` come on top."""
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    table = pa.table({"image": [None if b is None else {"bytes": b, "path": None} for b in images], "label": labels, **columns})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def settings_of(name: str, cache: Path) -> dict[str, Any]:
    """The yaml of a data set, without what belongs to the model."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "dataset" / f"{name}.yaml"), resolve=True)
    assert isinstance(config, dict)
    return {**{str(key): value for key, value in config.items() if key not in ("mean", "std", "flip")}, "cache": cache}
