"""Loading a data set, from each source and with each fault."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_files import grey, png, settings_of, write_parquet

from fedimpr.data import Dataset, load
from fedimpr.errors import ConfigError, DataError, FedimprError

Loads = Callable[..., Dataset]


# --- What comes out ---


def test_parquet_gives_what_went_in(three: Path, loads: Loads) -> None:
    data = loads()
    assert np.array_equal(data.train.pixels.numpy()[:, 0], grey(12, seed=0))
    assert np.array_equal(data.test.pixels.numpy()[:, 0], grey(6, seed=1))
    assert data.train.labels.tolist() == [0, 1, 2] * 4
    assert data.train.classes == ("cat", "dog", "owl")
    assert data.train.domains is None


def test_colours_are_channels_first(tmp_path: Path, loads: Loads) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [png(p) for p in pixels], [0, 1, 2])
    data = loads(shape=[3, 4, 5])
    assert np.array_equal(data.train.pixels.numpy(), pixels.transpose(0, 3, 1, 2))
    assert data.train.classes == ("0", "1", "2")  # the file names none


def test_domains_come_along(tmp_path: Path, loads: Loads) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [png(p) for p in grey(4)], [0, 1, 2, 2], domain=[0, 0, 1, 1])
    data = loads()
    assert data.train.domains is not None and data.train.domains.tolist() == [0, 0, 1, 1]
    assert data.train.domain_names == ("0", "1")


def test_resize_converts_size_and_mode(three: Path, loads: Loads) -> None:
    data = loads(shape=[3, 8, 8], resize=True)
    expected = [Image.fromarray(p).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR) for p in grey(12, seed=0)]
    assert np.array_equal(data.train.pixels.numpy(), np.stack([np.asarray(image) for image in expected]).transpose(0, 3, 1, 2))


def test_validation_holds_out_of_every_class_and_leaves_the_test_set_unread(three: Path, loads: Loads) -> None:
    whole = loads().train
    (three / "test.parquet").unlink()
    data = loads(evaluate="validation", validation=0.25)
    assert data.train.counts().tolist() == [3, 3, 3]  # of four each
    assert data.test.counts().tolist() == [1, 1, 1]
    together = torch.cat([data.train.pixels, data.test.pixels]).flatten(1).tolist()
    assert sorted(together) == sorted(whole.pixels.flatten(1).tolist())
    again, other = (loads(evaluate="validation", split_seed=seed).test.pixels for seed in (0, 1))
    assert torch.equal(again, data.test.pixels) and not torch.equal(other, data.test.pixels)


def test_digits_need_nothing_and_are_split_by_class(tmp_path: Path) -> None:
    settings = settings_of("digits", tmp_path)
    data = load(**settings)
    assert (len(data.train) + len(data.test), data.train.pixels.shape[1:]) == (1797, (1, 16, 16))
    whole = data.train.counts() + data.test.counts()
    assert ((data.test.counts() - 0.2 * whole).abs() <= 0.5).all()
    native = load(**{**settings, "shape": [1, 8, 8], "resize": False})
    assert set(native.train.pixels.unique().tolist()) == {round(shade * 255 / 16) for shade in range(17)}
    assert torch.equal(native.train.labels, data.train.labels)


def test_image_folders_are_read_in_order_of_names(tmp_path: Path, loads: Loads) -> None:
    pixels = grey(6)
    for number, (part, name) in enumerate([(p, c) for p in ("train", "test") for c in ("b", "a", "c")]):
        (tmp_path / part / name).mkdir(parents=True)
        (tmp_path / part / name / "1.png").write_bytes(png(pixels[number]))
    sources = {"folder": {"train": "train", "test": "test"}}
    data = loads(source="folder", sources=sources)
    assert data.train.classes == ("a", "b", "c")
    assert np.array_equal(data.train.pixels.numpy()[:, 0], pixels[[1, 0, 2]])
    (tmp_path / "test" / "d").mkdir()
    with pytest.raises(DataError, match=r"classes that .*train lacks \(value \['d'\]\)"):
        loads(source="folder", sources=sources)


def test_torchvision_is_called_with_the_folder_and_the_arguments_of_the_part(tmp_path: Path, loads: Loads) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = grey(10, side=28)
    for part, count in (("train", 10), ("t10k", 10)):  # the format of the MNIST files: magic number, sizes, bytes
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + bytes(range(10)))
    data = loads(**{**settings_of("mnist", tmp_path / "cache"), "source": "torchvision", "folder": tmp_path})
    assert np.array_equal(data.train.pixels.numpy()[:, 0], pixels)
    assert data.test.labels.tolist() == list(range(10))


@pytest.mark.filterwarnings("ignore")  # of libraries below Hugging Face's
def test_huggingface_reads_what_load_dataset_reads(three: Path, loads: Loads, tmp_path_factory: pytest.TempPathFactory) -> None:
    # load_dataset tells the splits apart by words in the path, so the path must not say "test".
    hub = tmp_path_factory.mktemp("hub", numbered=False)
    for part in ("train", "test"):
        shutil.copy(three / f"{part}.parquet", hub)
    sources = {"huggingface": {"dataset": str(hub), "train": "train", "test": "test", "image": "image", "label": "label"}}
    data = loads(source="huggingface", sources=sources)
    assert np.array_equal(data.train.pixels.numpy()[:, 0], grey(12, seed=0))
    assert data.test.labels.tolist() == [0, 1, 2] * 2


# --- The cache ---


def test_cache_is_used_and_a_damaged_entry_is_rebuilt(three: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loads()
    entries = sorted((three / "cache").iterdir())
    assert [entry.suffix for entry in entries] == [".npy", ".npy"]  # and no draft
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda file: pytest.fail("decoded again"))
        assert torch.equal(loads().train.pixels, first.train.pixels)
    for damage in (b"", entries[0].read_bytes()[:-7], b"\x93NUMPY nonsense" * 9):
        for entry in entries:
            entry.unlink()
            entry.write_bytes(damage)
        assert torch.equal(loads().train.pixels, first.train.pixels)


def test_writing_to_mapped_pixels_does_not_reach_the_cache(three: Path, loads: Loads) -> None:
    loads()
    mapped = loads().train.pixels
    mapped.zero_()
    assert np.array_equal(loads().train.pixels.numpy()[:, 0], grey(12, seed=0))


def test_another_file_or_shape_is_another_entry(three: Path, loads: Loads) -> None:
    loads()
    assert loads(shape=[1, 2, 2], resize=True).train.pixels.shape == (12, 1, 2, 2)
    write_parquet(three / "train.parquet", [png(p) for p in grey(15, seed=2)], [0, 1, 2] * 5, ["cat", "dog", "owl"])
    assert np.array_equal(loads().train.pixels.numpy()[:, 0], grey(15, seed=2))


def test_a_cache_that_cannot_be_written_is_named(three: Path, loads: Loads) -> None:
    (three / "file").write_text("")
    with pytest.raises(ConfigError, match="'dataset.cache'.*a folder that can be written"):
        loads(cache=three / "file" / "cache")


# --- Faults ---


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_missing_files_name_the_key_the_value_and_the_remedy(tmp_path: Path, loads: Loads, folder: str) -> None:
    with pytest.raises(DataError, match=rf"'dataset.folder'.*\(value '{tmp_path / folder}'\)\. Set FEDIMPR_DATA or dataset.folder"):
        loads(folder=tmp_path / folder)


@pytest.mark.parametrize("keep", [0, 100, -20])
def test_truncated_parquet(three: Path, loads: Loads, keep: int) -> None:
    path = three / "train.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="reading train.parquet: the file is damaged.*download it again"):
        loads()


def test_parquet_with_a_damaged_page(three: Path, loads: Loads) -> None:
    path = three / "train.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56  # the head of the image column
    path.write_bytes(content)
    with pytest.raises(DataError, match="train.parquet"):
        loads()


GOOD: list[bytes | None] = [png(p) for p in grey(3)]


@pytest.mark.parametrize(
    ("images", "labels", "columns", "message"),
    [
        ([GOOD[0], b"no image", GOOD[2]], [0, 1, 2], {}, "reading train.parquet: the image in row 1 cannot be decoded"),
        ([GOOD[0], GOOD[1], GOOD[2][:-30]], [0, 1, 2], {}, "the image in row 2 cannot be decoded"),
        ([None, *GOOD[1:]], [0, 1, 2], {}, "the image in row 0 cannot be decoded: it is empty"),
        ([*GOOD[:2], png(grey(1, side=5)[0])], [0, 1, 2], {}, r"row 2 is L 5x5 instead of L 4x4\. Set dataset.resize=true"),
        ([*GOOD[:2], png(np.zeros((4, 4, 3), np.uint8))], [0, 1, 2], {}, "row 2 is RGB 4x4 instead of L 4x4"),
        (GOOD, [0, 3, 2], {}, r"the label in row 1 is not in \[0, 3\) \(value 3\)"),
        (GOOD, [0, 1, -1], {}, r"the label in row 2 is not in \[0, 3\) \(value -1\)"),
        (GOOD, [0, None, 2], {}, "the column label must hold a whole number in every row"),
        (GOOD, ["cat", "dog", "owl"], {}, "the column label must hold a whole number"),
        (GOOD, [0, 0, 2], {}, r"no training image of class 1 \(1\)"),
        (GOOD, [0, 1, 2], {"domain": [0, 0, -1]}, "the domain in row 2 is not in"),
        ([], [], {}, "there are no images"),
    ],
)
def test_faulty_rows_are_named(
    three: Path, loads: Loads, images: list[bytes | None], labels: list[object], columns: dict[str, list[object]], message: str
) -> None:
    if images:
        write_parquet(three / "train.parquet", images, labels, **columns)
    else:
        write_parquet(three / "train.parquet", [GOOD[0]], [0])
        pq.write_table(pq.read_table(three / "train.parquet").slice(0, 0), three / "train.parquet")
    with pytest.raises(DataError, match=message):
        loads()


def test_columns_that_are_missing_are_named(three: Path, loads: Loads) -> None:
    pq.write_table(pq.read_table(three / "train.parquet").drop_columns(["label"]), three / "train.parquet")
    with pytest.raises(DataError, match=r"the columns image and label are needed \(value \['image'\]\)"):
        loads()


def test_train_and_test_must_name_the_same_classes(three: Path, loads: Loads) -> None:
    write_parquet(three / "test.parquet", GOOD, [0, 1, 2], ["dog", "cat", "owl"])
    with pytest.raises(DataError, match="name their classes or domains differently"):
        loads()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "cloud"}, "'dataset.source' is 'cloud'; allowed: one of parquet for three"),
        ({"source": "torchvision"}, "'dataset.source' is 'torchvision'"),  # has no entry in sources
        ({"sources": {"parquet": {"train": "train.parquet"}}}, "'dataset.sources.parquet.test' is None"),
        ({"evaluate": "train"}, "'dataset.evaluate' is 'train'; allowed: test or validation"),
        ({"evaluate": "validation", "validation": 1.0}, r"'dataset.validation' is 1.0; allowed: a share in \(0, 1\)"),
        ({"shape": [2, 4, 4]}, "'dataset.shape'.*1 or 3 channels"),
        ({"shape": [4, 4]}, "'dataset.shape'"),
        ({"classes": 4}, "'dataset.classes' is 4; allowed: 3, as train.parquet names them"),
        ({"source": "torchvision", "sources": {"torchvision": {"dataset": "MNOST", "train": {}}}}, "torchvision.dataset' is 'MNOST'"),
        ({"source": "embedded", "sources": {"embedded": {"dataset": "iris", "test": 0.2}}}, "embedded.dataset' is 'iris'"),
    ],
)
def test_wrong_settings_are_named(three: Path, loads: Loads, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loads(**change)


def test_data_that_cannot_be_downloaded_are_named(tmp_path: Path, loads: Loads) -> None:
    settings = {**settings_of("mnist", tmp_path / "cache"), "source": "torchvision", "folder": tmp_path}
    settings["sources"]["torchvision"]["train"] = {"train": True, "download": False}
    with pytest.raises(DataError, match=r"reading torchvision's MNIST: cannot be had: Dataset not found.*dataset\.source"):
        loads(**settings)


@pytest.mark.filterwarnings("ignore")
def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="reading Hugging Face's ylecun/mnist: cannot be had: no route to the hub. Check the network"):
        loads(**{**settings_of("mnist", tmp_path), "source": "huggingface", "folder": tmp_path})


def test_the_large_libraries_are_not_imported_before_they_are_needed() -> None:
    code = "import sys, fedimpr.data.partition; print([m for m in ('datasets', 'flwr_datasets', 'sklearn', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


# --- Real data ---


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "first", "domains"),
    [
        ("mnist", 60_000, 10_000, (1, 28, 28), "0", 0),
        pytest.param("cifar10", 50_000, 10_000, (3, 32, 32), "airplane", 0, marks=pytest.mark.slow),
        ("pacs", 7_995, 1_996, (3, 64, 64), "dog", 4),
    ],
)
def test_real_data(
    tmp_path: Path, data_folder: Path, name: str, train: int, test: int, shape: tuple[int, int, int], first: str, domains: int
) -> None:
    data = load(**{**settings_of(name, tmp_path), "folder": data_folder})
    assert (len(data.train), len(data.test)) == (train, test)
    assert tuple(data.train.pixels.shape[1:]) == shape
    assert data.train.classes[0] == first and len(data.train.domain_names) == domains


def test_every_error_is_one_line(three: Path, loads: Loads) -> None:
    (three / "train.parquet").write_bytes(b"PAR1" + b"x" * 50 + b"PAR1")
    with pytest.raises(FedimprError) as raised:
        loads()
    assert "\n" not in str(raised.value)
