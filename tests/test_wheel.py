"""What a wheel installs works in an empty folder, without the clone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.tiny import overrides

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_folder(tmp_path: Path) -> None:
    built, site, empty = (tmp_path / name for name in ("built", "site", "empty"))
    empty.mkdir()
    quiet = {"check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(ROOT)], **quiet)
    (wheel,) = built.glob("fedimpr-*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)], **quiet)
    env = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run([sys.executable, "-c", "import sim; print(sim.__file__)"], cwd=empty, env=env, **quiet).stdout
    assert where.startswith(str(site))
    ended = subprocess.run([sys.executable, "-m", "sim", *overrides(methods=["di"])], cwd=empty, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (folder,) = (empty / "results" / "run").iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "finished" and str(folder) in ended.stdout
    assert [path.name for path in empty.iterdir()] == ["results"]  # nothing else was left behind
    assert (site / "bin" / "fedimpr").exists()
