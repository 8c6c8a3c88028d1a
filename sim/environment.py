"""What a process of a run sets before it imports Flower, Ray, Hugging Face or PyTorch: environment variables, and how it holds memory."""

from __future__ import annotations

import ctypes
import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's own 15 lets clients stand still beside any other work on the machine, such as a second run
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


# glibc's mallopt: the parameter's number, and bytes. Smaller blocks do not get pages of their own, and as much stays at the heap's end.
HELD = {"MALLOC_MMAP_THRESHOLD_": (-3, 64 << 20), "MALLOC_TRIM_THRESHOLD_": (-1, 256 << 20)}


def quiet() -> None:
    """No telemetry, no update checks, no installation at run time, no log lines of others, and :func:`hold_memory`; what the user has set
    stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    hold_memory()


def hold_memory() -> None:
    """Keep memory that was freed for the next use, where the C library is glibc.

    It would go back to the system and come again page by page: of a model of 10 MB that is written and read anew at every client's turn,
    three quarters of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (parameter, size) in HELD.items():
        if mallopt is not None and name not in os.environ:
            mallopt(parameter, size)
