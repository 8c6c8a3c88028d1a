"""Local training that gets its run into trouble, for studies, or tells what it computes with."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import numpy as np
import torch

from fedimpr.training import LocalTraining
from fedimpr.views import Views  # noqa: F401 - the settings are checked against the hints of the fields


@dataclass(frozen=True, kw_only=True)
class Hangs(LocalTraining):
    def __call__(self, *_: object) -> dict[str, float]:
        time.sleep(600)
        return {}


@dataclass(frozen=True, kw_only=True)
class TakesMemory(LocalTraining):
    def __call__(self, *_: object) -> dict[str, float]:
        held = [np.ones(2**27) for _ in range(2)]  # 2 GiB
        time.sleep(600)
        return {"held": float(len(held))}


@dataclass(frozen=True, kw_only=True)
class Dies(LocalTraining):
    def __call__(self, *_: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


@dataclass(frozen=True, kw_only=True)
class Raises(LocalTraining):
    def __call__(self, *_: object) -> dict[str, float]:
        raise ValueError("out of coffee")


@dataclass(frozen=True, kw_only=True)
class TellsThreads(LocalTraining):
    def __call__(self, *_: object) -> dict[str, float]:
        return {"threads": float(torch.get_num_threads())}
