"""Where images come from: one function a kind of source, each giving the undecoded rows of the part ``train`` or ``test``.

All have one signature: the part, the source's settings from the data set's yaml, the folder ``dataset.folder`` and the split seed. All
raise :class:`DataError` where the source is missing or damaged, and :class:`ConfigError` where its settings lack an entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedimpr._torchvision import torchvision
from fedimpr.data.decoding import Rows
from fedimpr.data.splits import hold_out
from fedimpr.errors import ConfigError, DataError

Part = Literal["train", "test"]
Settings = Mapping[str, Any]


def embedded(part: Part, settings: Settings, folder: Path, seed: int) -> Rows:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 and 17 shades; a stratified share is the test set."""
    from sklearn.datasets import load_digits

    if _get(settings, "embedded", "dataset") != "digits":
        raise ConfigError("dataset.sources.embedded.dataset", settings["dataset"], "digits")
    digits = load_digits()
    labels = torch.from_numpy(digits.target).long()
    places = hold_out(labels, _get(settings, "embedded", "test"), seed, key="dataset.sources.embedded.test")[part == "test"]
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Rows(
        origin="scikit-learn's digits",
        images=[Image.fromarray(pixels[i]) for i in places.tolist()],
        labels=labels[places],
        classes=tuple(map(str, digits.target_names)),
    )


def parquet(part: Part, settings: Settings, folder: Path, seed: int) -> Rows:
    """A parquet file with the columns ``image`` (Hugging Face's Image feature, with bytes), ``label`` and perhaps ``domain``."""
    import pyarrow
    import pyarrow.parquet

    path = _existing(folder, _get(settings, "parquet", part))
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        table = file.read([name for name in ("label", "domain") if name in columns])
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    if not {"image", "label"} <= set(columns):
        raise DataError("the columns image and label are needed", stage=f"reading {path.name}", value=columns)

    def images() -> Iterator[bytes | None]:
        try:
            for batch in file.iter_batches(batch_size=1024, columns=["image"]):
                for row in batch.column(0).to_pylist():
                    yield row["bytes"] if isinstance(row, dict) else row
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error

    features = _features(file.schema_arrow.metadata)
    domains = _integers(table, "domain", path) if "domain" in columns else None
    names = features.get("domain", {}).get("names") or range(0 if domains is None or not len(domains) else int(domains.max()) + 1)
    return Rows(
        origin=path.name,
        images=images(),
        labels=_integers(table, "label", path),
        classes=tuple(features.get("label", {}).get("names") or ()) or None,
        domains=domains,
        domain_names=tuple(map(str, names)),
        files=(path,),
    )


def image_folder(part: Part, settings: Settings, folder: Path, seed: int) -> Rows:
    """A folder with one folder of image files a class; the classes are those of the training part, in the order of their names."""
    root = _existing(folder, _get(settings, "folder", part))
    train = _existing(folder, _get(settings, "folder", "train"))
    classes, found = (sorted(path.name for path in place.iterdir() if path.is_dir()) for place in (train, root))
    if unknown := set(found) - set(classes):
        raise DataError(f"{root} has classes that {train} lacks", stage="reading image folders", value=sorted(unknown))
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).glob("*")) if path.is_file()]
    return Rows(
        origin=str(root),
        images=(path.read_bytes() for path, _ in files),
        labels=torch.tensor([label for _, label in files], dtype=torch.int64),
        classes=tuple(classes),
        files=tuple(path for path, _ in files),
    )


def from_torchvision(part: Part, settings: Settings, folder: Path, seed: int) -> Rows:
    """A class of ``torchvision.datasets`` called with ``root=folder`` and the part's own arguments."""
    name, arguments = _get(settings, "torchvision", "dataset"), _get(settings, "torchvision", part)
    make = getattr(torchvision().datasets, name, None)
    if make is None:
        raise ConfigError("dataset.sources.torchvision.dataset", name, "a data set of torchvision.datasets")
    try:
        pairs = list(make(root=str(folder), **arguments))
    except Exception as error:  # each of its data sets fails in its own way
        raise _no_download(f"torchvision's {name}", folder, error) from error
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return Rows(origin=f"torchvision's {name}", images=[image for image, _ in pairs], labels=labels, classes=None)


def huggingface(part: Part, settings: Settings, folder: Path, seed: int) -> Rows:
    """A data set of the Hugging Face hub, or a local folder that ``datasets.load_dataset`` reads; downloads go to ``folder``."""
    import datasets

    name, split, image, label = (_get(settings, "huggingface", key) for key in ("dataset", part, "image", "label"))
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, split=split, cache_dir=str(folder / "huggingface"))
        table = table.cast_column(image, datasets.Image(decode=False))
        labels = torch.tensor(table[label][:], dtype=torch.int64)
    except Exception as error:  # the hub, the network, the cache and the table each have their own errors
        raise _no_download(f"Hugging Face's {name}", folder, error) from error
    return Rows(
        origin=f"Hugging Face's {name}, {split}",
        images=(row[image]["bytes"] or Path(row[image]["path"]).read_bytes() for row in table.select_columns([image])),
        labels=labels,
        classes=tuple(getattr(table.features[label], "names", ())) or None,
        files=tuple(Path(entry["filename"]) for entry in table.cache_files),
    )


SOURCES: dict[str, Callable[[Part, Settings, Path, int], Rows]] = {
    "embedded": embedded,
    "parquet": parquet,
    "folder": image_folder,
    "torchvision": from_torchvision,
    "huggingface": huggingface,
}


def _get(settings: Settings, source: str, key: str) -> Any:
    if key not in settings:
        raise ConfigError(f"dataset.sources.{source}.{key}", None, "set")
    return settings[key]


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        problem = (
            f"config key 'dataset.folder' names a folder without {name}"
            if folder.is_dir()
            else "config key 'dataset.folder' names no folder"
        )
        remedy = "Set FEDIMPR_DATA or dataset.folder to where the files are, or choose another dataset.source."
        raise DataError(problem, value=str(folder), remedy=remedy)
    return path


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"the file is damaged: {str(error).splitlines()[0]}", stage=f"reading {path.name}", remedy="Copy or download it again."
    )


def _no_download(what: str, folder: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    remedy = f"Check the network or put the data into {folder} (dataset.folder), or choose another dataset.source."
    return DataError(f"cannot be had: {reason}", stage=f"reading {what}", remedy=remedy)


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    features: dict[str, Any] = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features


def _integers(table: Any, name: str, path: Path) -> Tensor:
    column = table.column(name)
    if column.null_count or not str(column.type).lstrip("u").startswith("int"):
        raise DataError(f"the column {name} must hold a whole number in every row", stage=f"reading {path.name}", value=str(column.type))
    return torch.from_numpy(column.to_numpy().astype(np.int64))
