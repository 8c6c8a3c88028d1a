"""The one door to torchvision.

Its published wheels are built against a CUDA PyTorch. Beside a CPU build their compiled operators do not load, and the import then fails
while registering fake kernels for two operators that nobody defined. Only then are the two schemas declared and the import tried again:
beside a matching pair nothing is touched.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_declared: torch.library.Library | None = None  # the schemas live as long as this reference


def torchvision() -> ModuleType:
    """Import torchvision and return it, whichever build of PyTorch is installed.

    Raises:
        ImportError: torchvision is not installed.
    """
    global _declared
    try:
        import torchvision as module
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision as module
    found: ModuleType = module
    return found
