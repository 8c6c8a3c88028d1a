"""``flwr run``, with a toy app: which code runs, what is shown, what the exit status says, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from fedimpr.errors import ConfigError, FedimprError
from sim import flower, processes

ROOT = Path(flower.__file__).resolve().parents[1]

PYPROJECT = """
[project]
name = "toy"
version = "0.1.0"
description = "a toy"
license = "Apache-2.0"
dependencies = ["a-package-that-nobody-has"]
[tool.flwr.app]
publisher = "toy"
fab-include = ["toy/**"]
[tool.flwr.app.components]
serverapp = "toy.apps:server"
clientapp = "toy.apps:client"
[tool.flwr.app.config]
overrides = "[]"
"""

APPS = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from toy.origin import ORIGIN

client = ClientApp()
server = ServerApp()

@client.query()
def tell(message, context):
    return Message(RecordDict({"it": ConfigRecord({"origin": ORIGIN, **context.node_config})}), reply_to=message)

@server.main()
def main(grid, context):
    print("server from", ORIGIN, "with", context.run_config["overrides"])
    if context.run_config["overrides"] == '["raise"]':
        raise ValueError("client 3, round 1, training: loss is nan")
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.05)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes], timeout=60)
    for reply in sorted(replies, key=lambda reply: reply.content["it"]["partition-id"]):
        print("client", reply.content["it"]["partition-id"], "from", reply.content["it"]["origin"])
    if context.run_config["overrides"] == '["wait"]':
        print("waiting")
        time.sleep(600)
"""


def toy(folder: Path, origin: str) -> Path:
    (folder / "toy").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "toy" / "__init__.py").write_text("")
    (folder / "toy" / "origin.py").write_text(f"ORIGIN = {origin!r}\n")
    (folder / "toy" / "apps.py").write_text(APPS)
    return folder


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A word in the environment of everything that a test starts."""
    word = f"mark-{uuid.uuid4().hex}"
    monkeypatch.setenv("FEDIMPR_TEST_MARK", word)
    return word


@pytest.fixture
def remaining(mark: str) -> Callable[[], list[str | int]]:
    """What the test started that has not ended or was not waited for; what Ray left of an earlier test does not count."""
    before = zombies_of_ours()
    return lambda: [*left_behind(mark), *(zombies_of_ours() - before)]


def left_behind(word: str) -> list[str]:
    """The command lines of all other processes, zombies included, that carry the word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and word.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def zombies_of_ours() -> set[int]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if state == "Z" and int(parent) == os.getpid():
                found.add(int(process.name))
    return found


def temporary() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("fedimpr-")}


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
@pytest.mark.slow
@pytest.mark.ray
def test_server_and_clients_run_the_code_of_the_tree_that_was_named(
    tmp_path: Path, remaining: Callable[[], list[str | int]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toy(tmp_path / "other", "the wrong tree"))
    project, before = toy(tmp_path / "right_one", "the right tree"), temporary()
    overrides = ["experiment=demo", "note='say \"hé\"'"]
    assert flower.run(overrides, nodes=2, project=project, timeout=120) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        'server from the right tree with ["experiment=demo", "note=\'say \\"h\\u00e9\\"\'"]',
        "client 0 from the right tree",
        "client 1 from the right tree",
    ]
    assert err == ""
    assert (project / "pyproject.toml").read_text() == PYPROJECT
    assert sorted(p.name for p in project.iterdir()) == ["pyproject.toml", "toy"]
    assert remaining() == [] and temporary() == before


@linux
@pytest.mark.slow
@pytest.mark.ray
def test_a_failing_server_app_is_a_failure_with_one_line_and_a_log(
    tmp_path: Path, remaining: Callable[[], list[str | int]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert flower.run(["raise"], nodes=2, project=toy(tmp_path / "a", "here"), timeout=120) == 1
    out, err = capfd.readouterr()
    assert out == 'server from here with ["raise"]\n'
    line, place = err.splitlines()
    assert line == "flwr run: client 3, round 1, training: loss is nan"
    log = Path(place.removeprefix("flwr run: the full log is "))
    assert "Traceback" in log.read_text()
    log.unlink()
    assert remaining() == []


@linux
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_takes_everything_along(tmp_path: Path, mark: str, number: int, status: int) -> None:
    before = temporary()
    code = (
        "import sys; from pathlib import Path; from sim.flower import run\n"
        f"try: run(['wait'], nodes=2, project=Path({str(toy(tmp_path / 'a', 'here'))!r}))\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert any(line == "waiting\n" for line in process.stdout)
    assert len(left_behind(mark)) > 5
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert time.monotonic() - start < 15
    assert left_behind(mark) == []
    Path(err.splitlines()[-1].removeprefix("flwr run: the full log is ")).unlink()
    assert temporary() == before


def test_numbers_out_of_range_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="'nodes' is 0; allowed: an integer >= 1"):
        flower.run([], nodes=0)
    with pytest.raises(ConfigError, match="'cpus_per_client' is 0.5; allowed: an integer >= 1"):
        flower.run([], nodes=2, cpus_per_client=0.5)  # type: ignore[arg-type]


def test_a_folder_that_is_no_project_is_refused_and_cleaned_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = temporary()
    with pytest.raises(FedimprError, match="there is no pyproject.toml"):
        flower.run([], nodes=2, project=tmp_path)
    Path(capfd.readouterr().err.strip().removeprefix("flwr run: the full log is ")).unlink()
    assert temporary() == before


def test_the_snapshot_of_an_installed_wheel_is_that_of_a_checkout(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    for name in ("fedimpr", "strategies", "sim", "configs", "torch"):
        (site / name).mkdir(parents=True)
        (site / name / "a.py").write_text(name)
    (site / "sim" / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    app = flower._snapshot(site, tmp_path / "app")
    assert sorted(p.name for p in app.iterdir()) == ["configs", "fedimpr", "pyproject.toml", "sim", "strategies"]
    assert (app / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()


def test_the_screen_shows_our_lines_and_the_log_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "\x1b[92mINFO \x1b[0m:      Starting Flower Simulation\n",
        "round 1 of 2: 4 updates\n",
        "\x1b[36m(ClientAppActor pid=4167)\x1b[0m client says hi\n",
        "2026-11-21 02:45:35,123\tINFO worker.py:2013 -- Started a local Ray instance.\n",
        "\n",
        "┃ method ┃ accuracy ┃\n",
        "\n",
        "\x1b[91mERROR \x1b[0m:     Simulation raised an exception\n",
        "Traceback (most recent call last):\n",
        '  File "x.py", line 1, in f\n',
        "    f()\n",
        "ValueError: bad\n",
        "\n",
        "The above exception was the direct cause of the following exception:\n",
        "\n",
        "stopped: outputs/demo\n",
    ]
    # The filter needs no SuperLink, so the object is made without starting one.
    screen = object.__new__(flower._Flower)
    screen.log, screen.exception = io.StringIO(), ""
    screen._show(io.StringIO("".join(lines)))
    assert capsys.readouterr().out.split("\n") == ["round 1 of 2: 4 updates", "┃ method ┃ accuracy ┃", "", "stopped: outputs/demo", ""]
    assert screen.log.getvalue() == "".join(lines)
    assert screen.exception == "ValueError: bad"


@linux
def test_an_orphan_in_a_session_of_its_own_is_found_and_ended(
    mark: str, remaining: Callable[[], list[str | int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    code = "import subprocess, time; subprocess.Popen(['sh', '-c', 'sleep 60 & sleep 60'], start_new_session=True); time.sleep({})"
    family = processes.Family()
    with processes.orphans_adopted():
        parent = subprocess.Popen([sys.executable, "-c", code.format(1.0)], start_new_session=True, text=True)
        family.adopt(parent)
        deadline = time.monotonic() + 20
        while len(family.members()) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        parent.wait()
        assert len(left_behind(mark)) == 3
        family.kill()
    assert remaining() == []
