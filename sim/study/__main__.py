"""The command line of studies: ``python -m sim.study study=<name> [key=value,value ...] [study.<key>=<value>] [--dry-run]``.

The same command goes on where it was stopped: runs that have finished are not made again, those that were under way resume.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence

from sim.environment import quiet

quiet()

from fedimpr.errors import ConfigError, FedimprError  # noqa: E402 - the environment must be set before Flower or PyTorch read it
from sim.__main__ import failed, failures, guarded  # noqa: E402
from sim.config import CONFIGS, Settings  # noqa: E402
from sim.html import read  # noqa: E402
from sim.locks import locked  # noqa: E402
from sim.progress import Progress  # noqa: E402
from sim.stages import duration  # noqa: E402
from sim.study.collect import Collected, begin  # noqa: E402
from sim.study.job import warm  # noqa: E402
from sim.study.plan import Point, Study, checked, study_of  # noqa: E402
from sim.study.running import cores_here, places, run_points, status_of  # noqa: E402

REFRESH_SECONDS = 30.0  # between two looks of the page while runs go on

HELP = """usage: python -m sim.study study=<name> [study.<key>=<value> ...] [key=value[,value ...] ...] [--dry-run]

Runs the study of configs/study/<name>.yaml and writes its results to study.output (results/studies/<name>).
The same command goes on where it was stopped.

  key=value            a setting of all its runs, as of python -m sim
  key=value,value      an axis, or other values for the axis of this name; seed=0,1,2 too
  study.<key>=<value>  a key of the study: output, workers, minutes, memory_mb, per_gpu, retry, compare, baseline
  --dry-run            the runs, and an estimate of the time from a short probe; nothing is run

studies: {studies}"""


def study_main() -> None:
    """One study; what keeps it from its results is told in one line."""
    try:
        if command(sys.argv[1:]):
            failures.append("a run has not finished")
    except (FedimprError, OSError) as error:
        failed(error)


def main() -> None:
    """The command: exit status 0 where every run has finished, 1 where one has not, 130 or 143 after an interruption."""
    guarded(study_main, "study")


def command(arguments: Sequence[str]) -> int:
    """What :func:`main` does; the exit status.

    Raises:
        FedimprError: the study cannot begin, or cannot write.
    """
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(HELP.format(studies=", ".join(sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml")))))
        return 0
    rest = [argument for argument in arguments if argument != "--dry-run"]
    if wrong := next((argument for argument in rest if argument.startswith("--")), None):
        raise ConfigError(wrong, wrong, "key=value, study.<key>=<value>, --dry-run or --help")
    study, dry = study_of(rest), len(rest) < len(arguments)
    if not dry and study.address is None:
        warm()  # beside the composing that follows
    settings = checked(study)
    points = list(study.points())
    if dry:
        show(study, settings, points)
        return 0
    typed = [argument for argument in rest if not argument.startswith("study.output=")]  # where it stands is nobody else's business
    return run(study, settings, points, f"python -m sim.study {shlex.join(typed)}")


def run(study: Study, settings: Settings, points: Sequence[Point], typed: str) -> int:
    """Run what has not ended, and write the results while it goes on."""
    from sim.study.figures import write_figures  # matplotlib takes a second
    from sim.study.page import write_page
    from sim.study.statistics import write_tables

    with locked(study.folder / "lock", "study.output", study.folder, "study"), Progress() as bar:
        begin(study, points, typed, _configs())
        before = {point.name: status_of(study.folder / "points" / point.name) for point in points}
        over = ("finished",) if study.retry else ("finished", "failed")
        left = [point for point in points if before[point.name] not in over]
        collected, began, ended, shown = Collected(study), time.monotonic(), 0, time.monotonic()
        where = f"{side(study, settings, left)} side by side" if study.address is None else f"on the cluster at {study.address}"
        print(f"{len(points)} runs, {len(left)} to do, {where}: {study.folder}")
        if kept := sum(status == "failed" for status in before.values()) * (not study.retry):
            print(f"{kept} of them failed before and stay so; study.retry=true tries them again")

        def one_ended(point: Point, active: int) -> None:
            nonlocal ended, shown
            ended += 1
            bar.console.print(_told(study, point), soft_wrap=True, highlight=False, markup=False)
            bar("study", ended, len(left), at_work=active)
            if time.monotonic() - shown > REFRESH_SECONDS:
                collected.write(points)
                write_page(study.folder)
                shown = time.monotonic()

        try:
            run_points(study, settings, left, one_ended)
        finally:
            collected.write(points)
            write_tables(study.folder)
            write_figures(study.folder)
            page = write_page(study.folder)
    status = [status_of(study.folder / "points" / point.name) for point in points]
    done = status.count("finished")
    print(f"{done} of {len(points)} runs finished in {duration(time.monotonic() - began)}: {page}")
    return 0 if done == len(points) else 1


def show(study: Study, settings: Settings, points: Sequence[Point]) -> None:
    """The runs, what has become of them, and how long the others will take."""
    from sim.study.probe import estimate

    status = [status_of(study.folder / "points" / point.name) for point in points]
    for point, found in zip(points, status, strict=True):
        print(f"{found:>11}  {point.command}")
    left = [point for point, found in zip(points, status, strict=True) if found not in ("finished", "failed")]
    if not left:
        print(f"{len(points)} runs; nothing is left to do")
        return
    parts = [estimate(point.overrides) for point in (left[0], *left[1:][-1:])]
    seconds = sum(sum(part.values()) for part in parts) / len(parts)
    print(f"{len(points)} runs, {len(left)} to do, {side(study, settings, left)} side by side")
    print(
        f"a run: about {duration(seconds)} ("
        + ", ".join(f"{name} {duration(spent)}" for name, spent in parts[0].items() if spent >= 0.5)
        + ")"
    )
    print(f"the study: about {duration(seconds * -(-len(left) // side(study, settings, left)))}")


def side(study: Study, settings: Settings, points: Sequence[Point]) -> int:
    """How many of the points will be at work side by side on this machine."""
    return min(len(points), places(study, settings, cores_here()))


def _told(study: Study, point: Point) -> str:
    run = read(study.folder / "points" / point.name / "run.json", json.loads) or {}
    took = f" after {duration(run['wall_seconds'])}" if isinstance(run.get("wall_seconds"), int | float) else ""
    return f"{point.name}: {run.get('status')}{took}" + (f": {run['error']}" if run.get("error") else "")


def _configs() -> str:
    """Tells whether a file under ``configs/`` has changed."""
    digest = hashlib.sha256()
    for path in sorted(CONFIGS.rglob("*.yaml")):
        digest.update(f"{path.relative_to(CONFIGS)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
