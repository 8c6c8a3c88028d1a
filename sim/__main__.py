"""The command line: ``python -m sim experiment=<name> [group=choice] [key=value]``, also installed as ``fedimpr``; ``-m`` sweeps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from sim.environment import quiet

quiet()

import hydra  # noqa: E402 - the environment must be set before Hydra, Flower or PyTorch read it
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from fedimpr.errors import FedimprError  # noqa: E402
from sim.config import CONFIGS, from_tree, placed  # noqa: E402
from sim.runs import run  # noqa: E402
from sim.signals import exit_status, listening  # noqa: E402

failures: list[str] = []


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def hydra_main(config: DictConfig) -> None:
    """One run; of a sweep, one point. What fails is told in one line and does not keep the next point from running, unless one debugs."""
    debug = False
    try:
        settings = placed(from_tree(OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]
        debug = settings.runtime.get("debug") is True
        run(settings, HydraConfig.get().overrides.task)
    except (FedimprError, OmegaConfBaseException) as error:
        if debug:
            raise  # for its traceback, or the debugger
        failed(error)


def failed(error: Exception) -> None:
    """Tell a failure in one line, and remember it for the exit status."""
    failures.append(f"error: {' '.join(str(error).split())}")
    print(failures[-1], file=sys.stderr)


def main() -> None:
    """The command."""
    guarded(hydra_main, "config")


def guarded(command: Callable[[], None], config: str) -> NoReturn:
    """Run the Hydra main of a primary configuration; every expected failure is one line and exit status 1, an interruption 130 or 143."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through to here instead of printing them in four lines
    with listening():
        try:
            command()
        except BaseException as error:
            if status := exit_status():
                sys.exit(status)
            if isinstance(error, HydraException | OmegaConfBaseException):
                from sim.config import in_one_line

                sys.exit(f"error: {in_one_line(error, sys.argv[1:], config)}")
            raise
        sys.exit((exit_status() or 1) if failures else 0)


if __name__ == "__main__":
    main()
