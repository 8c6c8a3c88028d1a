"""The one door to torchvision."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_it_opens_beside_any_pytorch_and_again() -> None:
    code = (
        "from fedimpr._torchvision import torchvision as t; a = t(); import torchvision; "
        "print(a is torchvision is t(), a.models.resnet18().fc.out_features)"
    )
    assert run(code) == "True 1000"


def test_beside_a_matching_pair_nothing_is_declared() -> None:
    """A torchvision that imports at once, as a matching pair does, is returned as it is."""
    code = (
        "import sys, types; sys.modules['torchvision'] = types.ModuleType('torchvision'); import fedimpr._torchvision as door; "
        "print(door.torchvision() is sys.modules['torchvision'], door._declared)"
    )
    assert run(code) == "True None"
