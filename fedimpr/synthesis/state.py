"""What outlives calls: a network with its optimiser, and the average of batch statistics. The memory of methods that go on learning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedimpr.errors import ConfigError
from fedimpr.observation import Observation
from fedimpr.synthesis.descent import Diverged

Module = TypeVar("Module", bound=nn.Module)
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Trained:
    """Holds a module with its optimiser, or only their state until a module of that form is there to take it."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.optimiser: torch.optim.Optimizer | None = None
        self._waiting: dict[str, Tensor] = {}

    def resumed(self, fresh: Module, make: Make) -> tuple[Module, torch.optim.Optimizer]:
        """The held module, or ``fresh`` with what was loaded; ``fresh`` as it is where the held one has another form.

        Args:
            fresh: a new module.
            make: makes its optimiser.
        """
        if self.module is not None and _form(self.module.state_dict()) == _form(fresh.state_dict()):
            assert self.optimiser is not None
            return self.module, self.optimiser  # type: ignore[return-value]
        self.module, self.optimiser = fresh, make(fresh.parameters())
        loaded = {key[7:]: value for key, value in self._waiting.items() if key.startswith("module.")}
        if _form(loaded) == _form(fresh.state_dict()):
            fresh.load_state_dict(loaded)
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in self._waiting.items():
                if key.startswith("optimiser."):
                    _, index, moment = key.split(".")
                    moments.setdefault(int(index), {})[moment] = value.clone()
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self._waiting = {}
        return fresh, self.optimiser

    @contextmanager
    def protected(self, steps: int) -> Iterator[None]:
        """Give module and optimiser back as they were where a block diverges, so that one bad batch does not spoil those after it.

        Args:
            steps: of the block; what breaks after the last loss is known is named with the last step.

        Raises:
            Diverged: the block raised it, or left a weight or moment that is not finite.
        """
        assert self.module is not None and self.optimiser is not None
        weights, moments = copy.deepcopy((self.module.state_dict(), self.optimiser.state_dict()))
        try:
            yield
            if not bool(torch.stack([tensor.isfinite().all().cpu() for tensor in self.state_dict().values()]).all()):
                raise Diverged("update", steps)
        except Diverged:
            self.module.load_state_dict(weights)
            self.optimiser.load_state_dict(moments)
            raise

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and moments, as copies; empty before there are any."""
        if self.module is None or self.optimiser is None:
            return {key: value.clone() for key, value in self._waiting.items()}
        state = {f"module.{name}": tensor.clone() for name, tensor in self.module.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{index}.{name}": tensor.clone() for name, tensor in moments.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave, once a module of that form is there."""
        self.module = self.optimiser = None
        self._waiting = {key: value.clone() for key, value in state.items()}


class MovingStatistics:
    """Batch statistics averaged over batches; those of the present batch are mixed with it before they are matched (FastDFKD).

    So single batches may differ from what the teacher remembers, as long as they match it together.

    Args:
        momentum: m in [0, 1), the share of the average in the mixture; 0 switches it off.
    """

    def __init__(self, momentum: float) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError("momentum", momentum, "a number in [0, 1)")
        self.momentum = momentum
        self._now: Tensor | None = None
        self._average: Tensor | None = None  # (2, S)

    def mixed(self, seen: Observation) -> Observation:
        """``seen`` with statistics ``(1 - m) * now + m * average``; as it is where there is no average of this form yet."""
        now = seen.statistics
        self._now = now.detach()
        if self._average is None or self._average.shape != now.shape:
            return seen
        return seen._replace(statistics=(1 - self.momentum) * now + self.momentum * self._average.to(now.device))

    def advance(self) -> None:
        """Take what was seen last, a finished batch's, into the average."""
        now, m = self._now, self.momentum
        if m == 0 or now is None or now.numel() == 0:
            return
        if self._average is None or self._average.shape != now.shape:
            self._average = now
        else:
            self._average = m * self._average.to(now.device) + (1 - m) * now

    def state_dict(self) -> dict[str, Tensor]:
        """The average; empty before there is one."""
        return {} if self._average is None else {"average": self._average.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._average = state["average"].clone() if "average" in state else None


def _form(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
