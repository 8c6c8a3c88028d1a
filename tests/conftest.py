"""What all tests share: one thread, no telemetry, the folder with real data."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
}

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
# The same examples every time, whatever the machine is busy with; --hypothesis-profile=default looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_configure(config: pytest.Config) -> None:
    """Find the data where FEDIMPR_DATA does not name it: beside the repository, in shared/data."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    if "FEDIMPR_DATA" not in os.environ and beside.is_dir():
        os.environ["FEDIMPR_DATA"] = str(beside)


@pytest.fixture(scope="session", autouse=True)
def drawing() -> Iterator[dict[str, Callable[..., None]]]:
    """Runs in this process write pictures of one pixel, since drawing takes a third of a tiny run; the real functions by name."""
    from PIL import Image

    from sim import plots
    from sim.results import replace_file

    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "png")

    def draw_partition(counts: object, class_names: object, path: Path, title: str) -> None:
        replace_file(path, content.getvalue())

    def draw_impressions(sheets: object, path: Path) -> None:
        replace_file(path, content.getvalue())

    real = {"draw_partition": plots.draw_partition, "draw_impressions": plots.draw_impressions}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_partition", draw_partition)
        patch.setattr(plots, "draw_impressions", draw_impressions)
        yield real


@pytest.fixture
def real_pictures(drawing: dict[str, Callable[..., None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of this test's runs are drawn; ``tests/sim/test_plots.py`` says what is on them."""
    for name, draw in drawing.items():
        monkeypatch.setattr(f"sim.plots.{name}", draw)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the real data sets; a test that asks for it is marked ``data`` and is skipped where there is none."""
    folder = os.environ.get("FEDIMPR_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set FEDIMPR_DATA to the folder with the data sets")
    return Path(folder)
