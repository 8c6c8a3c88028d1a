"""Run an experiment through ``flwr run``: the same apps on Flower's own engine.

Left alone, ``flwr run`` starts a daemon that nothing stops, installs the app's dependencies by itself, may import client code from the
tree of an earlier run, and exits 0 when the app fails. Here every run gets a SuperLink of its own, from an empty folder, on a snapshot of
this tree, and leaves nothing behind: no process, no file but the experiment's output, and a log where it failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fedimpr.errors import ConfigError, FedimprError
from sim.config import Settings, quoted
from sim.environment import QUIET
from sim.processes import Family, orphans_adopted
from sim.report import conclude
from sim.signals import signals_raise, signals_wait
from sim.tracking import tracking_uri

PROJECT = Path(__file__).resolve().parents[1]  # a checkout, or the site-packages folder that a wheel was installed into
START_SECONDS = 60.0

NOISE = re.compile(
    r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:"  # Flower's logger
    r"|\(.*\bpid=\d+.*\)"  # what Ray forwards from its workers
    r"|\d{4}-\d\d-\d\d [\d:,.]+\s+(INFO|WARNING|ERROR)|\[[\d-]+ [\d:,]+ . \d+ \d+\]"  # Ray's loggers
    r"|.*FutureWarning: Tip|\s+warnings\.warn\(|Using SuperLink|Successfully (started|installed)"
    r"|The above exception was|During handling of the above|An unhandled exception occurred when|For more information, visit: <https://flower"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def run(
    overrides: Sequence[str],
    *,
    nodes: int,
    project: Path = PROJECT,
    cpus_per_client: int = 1,
    gpus_per_client: float = 0.0,
    timeout: float | None = None,
) -> int:
    """Run the Flower app of a tree to its end, showing its lines as they come.

    Args:
        overrides: Hydra overrides, handed to the apps as the run config's ``overrides``.
        nodes: the number of SuperNodes.
        project: the tree: a folder with pyproject.toml, or one that a wheel of it was installed into.
        cpus_per_client: whole CPUs that Ray sets aside for a client's turn.
        gpus_per_client: the share of a GPU that it sets aside.
        timeout: seconds after which the run is given up; ``None`` waits for ever.

    Returns:
        0 where the run completed; 1 where the server app raised, or Flower or Ray did; 124 after the timeout.

    Raises:
        ConfigError: a number is out of range.
        FedimprError: Flower is not installed, or its SuperLink does not start.
    """
    if nodes < 1:
        raise ConfigError("nodes", nodes, "an integer >= 1")
    if cpus_per_client < 1 or cpus_per_client != int(cpus_per_client):
        raise ConfigError("cpus_per_client", cpus_per_client, "an integer >= 1: Flower gives whole CPUs to clients")
    if gpus_per_client < 0:
        raise ConfigError("gpus_per_client", gpus_per_client, "a number >= 0")
    folder = Path(tempfile.mkdtemp(prefix="fedimpr-"))
    descriptor, log_name = tempfile.mkstemp(prefix="fedimpr-flower-", suffix=".log")
    failed = True
    with signals_raise(), orphans_adopted(), os.fdopen(descriptor, "w", encoding="utf-8") as log:
        family = Family()
        try:
            app = _snapshot(project, folder / "app")
            (folder / "run.toml").write_text(
                f"overrides = {json.dumps(json.dumps(list(overrides)), ensure_ascii=False)}\n", encoding="utf-8"
            )
            resources = f"client-resources-num-cpus={int(cpus_per_client)} client-resources-num-gpus={float(gpus_per_client)}"
            flower = _Flower(folder, family, log)
            command = ["run", str(app), "--stream", "-c", str(folder / "run.toml")]
            ended = flower.stream([*command, "--federation-config", f"num-supernodes={nodes} {resources}"], timeout)
            if not ended:
                print(f"flwr run: given up after {timeout:g} s", file=sys.stderr)
                return 124
            problem = flower.problem()
            if problem:
                print(f"flwr run: {problem}", file=sys.stderr)
                return 1
            failed = False
            return 0
        finally:
            with signals_wait():
                family.kill()
                shutil.rmtree(folder, ignore_errors=True)
                if failed:
                    print(f"flwr run: the full log is {log_name}", file=sys.stderr)
                else:
                    os.unlink(log_name)


def _snapshot(project: Path, app: Path) -> Path:
    """Copy what the Flower app of a tree consists of: server and clients run the same code whatever happens to the tree meanwhile."""
    places = [project / "sim" / "pyproject.toml", project / "pyproject.toml"]  # a wheel keeps it with this file
    description = next((place for place in places if place.is_file()), None)
    if description is None:
        raise FedimprError("there is no pyproject.toml", stage="flwr run", value=str(project))
    app.mkdir()
    shutil.copyfile(description, app / "pyproject.toml")
    with description.open("rb") as file:
        patterns = tomllib.load(file)["tool"]["flwr"]["app"]["fab-include"]
    for name in [pattern.removesuffix("/**") for pattern in patterns]:
        shutil.copytree(project / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    return app


class _Flower:
    """Flower's commands against a SuperLink of our own, which starts here."""

    def __init__(self, folder: Path, family: Family, log: IO[str]) -> None:
        self.family, self.log, self.cwd = family, log, folder / "empty"
        self.exception = ""  # the first that the log tells of
        self.cwd.mkdir()
        home = folder / "home"
        home.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        (home / "config.toml").write_text(f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "{address}"\ninsecure = true\n')
        scripts = sysconfig.get_path("scripts")
        self.environment = {
            **QUIET,
            **os.environ,
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),  # the SuperLink starts its helpers by name
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": str(shutil.get_terminal_size().columns),
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        if len(str(folder)) <= 35:  # Ray's socket names are 70 characters longer, and 107 is all that the system takes
            self.environment["RAY_TMPDIR"] = str(folder)
        host, port = address.split(":")
        self.superlink = self._start("flower-superlink", ["--insecure", "--simulation", "--host", host, "--port", port], self.log)
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(address):
            if self.superlink.poll() is not None or time.monotonic() > deadline:
                raise FedimprError("Flower's SuperLink did not start", stage="flwr run", remedy=f"See {self.log.name or 'the log'}.")
            time.sleep(0.1)

    def _start(self, script: str, arguments: list[str], stdout: IO[str] | int) -> subprocess.Popen[str]:
        path = shutil.which(script, path=self.environment["PATH"])
        if path is None:
            raise FedimprError(f"there is no command {script}", stage="flwr run", remedy='Install it with: pip install "flwr[simulation]".')
        process = subprocess.Popen(
            [path, *arguments],
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
        )
        self.family.adopt(process)
        return process

    def stream(self, arguments: list[str], timeout: float | None) -> bool:
        """Run ``flwr`` with these arguments, its lines into the log and our own lines to the screen; False after the timeout."""
        deadline = None if timeout is None else time.monotonic() + timeout
        process = self._start("flwr", arguments, subprocess.PIPE)
        reader = self.family.reader = threading.Thread(target=self._show, args=(process.stdout,), daemon=True)
        reader.start()
        while process.poll() is None and self.superlink.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                return False
            self.family.members()  # learn new sessions while their ancestors live
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        reader.join(5)
        return True

    def _show(self, lines: IO[str]) -> None:
        in_traceback = hidden = False
        for line in iter(lines.readline, ""):
            self.log.write(line)
            self.log.flush()
            plain = COLOUR.sub("", line)
            if in_traceback and not plain[:1].isspace():
                in_traceback, hidden = False, True
                self.exception = self.exception or plain.strip()
                continue
            in_traceback = in_traceback or plain.startswith(("Traceback (most recent call last)", '  File "'))
            hidden = in_traceback or bool(NOISE.match(plain)) or (hidden and not plain.strip())
            if not hidden:
                sys.stdout.write(line)
                sys.stdout.flush()
        lines.close()

    def problem(self) -> str:
        """What went wrong with the one run of this SuperLink; empty where it completed."""
        if self.superlink.poll() is not None:
            return f"Flower's SuperLink ended with status {self.superlink.returncode}"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            listing = self._start("flwr", ["list", "--format", "json"], subprocess.PIPE).communicate(timeout=START_SECONDS)[0]
            try:
                runs = json.loads(listing[listing.index("{") :])["runs"]
            except (ValueError, KeyError):
                return f"`flwr list` cannot be understood: {listing.strip()[-200:]}"
            if not runs:
                return "no run was started"
            status, details = runs[0]["status"], runs[0].get("status-details", "")
            if status == "finished:completed":
                return ""
            if status.startswith("finished"):
                told = details.removeprefix("Simulation failed with exception: ") or status
                return told if told in self.exception or not self.exception else f"{told} The first error: {self.exception}"
            time.sleep(0.5)
        return f"the log ended, but the run is {status}"


def _healthy(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    try:
        return opener.open(f"http://{address}/health", timeout=2).status == 200
    except OSError:
        return False


def run_experiment(settings: Settings, overrides: Sequence[str]) -> int:
    """:func:`run` an experiment of this tree, with ``runtime=flower`` among its overrides; relative paths are meant from here."""
    paths = {key: getattr(settings, key) for key in ("output", "resume", "initial_weights")}
    paths |= {f"dataset.{key}": settings.dataset.get(key) for key in ("folder", "cache")}
    absolute = {key: quoted(os.path.abspath(os.path.expanduser(path))) for key, path in paths.items() if path is not None}
    if "mlflow" in settings.tracking:  # the folder of the server's app does not last
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
    try:
        return run(
            [*overrides, *(f"{key}={path}" for key, path in absolute.items())],
            nodes=settings.nodes,
            cpus_per_client=settings.runtime["cpus_per_client"],
            gpus_per_client=settings.runtime["gpus_per_client"],
        )
    finally:
        conclude(settings.folder)
