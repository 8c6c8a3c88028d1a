"""Where modules live, and how they compute fastest there.

Convolutions get channels-last weights. On a CUDA device passes through networks run in bfloat16, while losses, statistics and parameters
stay float32. On a CPU everything is float32, unless the caller has put an autocast of its own around the call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first tensor; the CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def placed(module: Module, device: torch.device) -> Module:
    """The module moved to ``device``, its convolutions' weights channels-last: the layout in which they are fast."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def accelerated(device: torch.device) -> AbstractContextManager[None]:
    """A context inside which networks on a CUDA device that can do so compute in bfloat16; elsewhere nothing changes."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        # No cache: it would go on serving the casts of weights and latents that a step has moved since.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    return nullcontext()
