"""One run, on the runner that its settings name."""

from __future__ import annotations

from collections.abc import Sequence

from fedimpr.errors import FedimprError
from sim.config import Settings


def run(settings: Settings, overrides: Sequence[str]) -> None:
    """Run a federation into its result folder.

    Args:
        settings: placed, see :func:`sim.config.placed`.
        overrides: that they were composed from; ``flwr run`` composes them again.

    Raises:
        FedimprError: whatever ended the run.
    """
    # PyTorch, Flower and Ray take seconds to import: whoever only asks for --help must not wait for them.
    if settings.runtime["name"] == "flower":
        from sim.federation import check
        from sim.flower import run_experiment

        check(settings)  # here, not a quarter of a minute later in Flower
        if status := run_experiment(settings, overrides):
            raise FedimprError(f"flwr run ended with status {status}")
    elif settings.runtime["name"] == "ray":
        from sim.on_ray import run_on_ray

        run_on_ray(settings)
    else:
        from sim.local import run_local

        run_local(settings)
