"""The whole way through the house in a second or two."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from sim.config import CONFIGS, Settings, composed

# Any method's hyper-parameters of these names are brought down to these values; a method may have others, but these decide its cost.
SMALL = {
    "steps": 3, "batch_size": 8, "latent": 4, "width": 4, "hidden": 8, "projection": 8, "memory": 16, "negatives": 8,
    "embedding": 4, "shared": 3, "life": 2,
}  # fmt: skip
METHODS = sorted(path.stem for path in (CONFIGS / "synthesis").glob("*.yaml"))


def overrides(*more: str, methods: list[str] = METHODS) -> list[str]:
    """A federation of three clients on digits, with methods shrunk whatever they are."""
    base = [
        "clients=3",
        "dataset.shape=[1,8,8]",
        "dataset.resize=false",
        "training.epochs=1",
        "distillation.steps=4",
        "distillation.batch_size=8",
    ]
    return [f"synthesis=[{','.join(methods)}]", *base, *shrunk(tuple(methods)), *more]


@functools.cache
def shrunk(methods: tuple[str, ...]) -> list[str]:
    """What brings methods down."""
    found = composed([f"synthesis=[{','.join(methods)}]"]).synthesis
    small = [
        f"synthesis.{name}.synthesizer.{key}={value}"
        for name, node in found.items()
        for key, value in SMALL.items()
        if key in node["synthesizer"]
    ]
    portions = [
        f"synthesis.{name}.mining.{key}={value}"
        for name, node in found.items()
        for key, value in (("images", 24), ("before", min(8, node["mining"]["before"])), ("portions", 2), ("capacity", 30))
    ]
    return [*small, *portions]


def tiny(output: Path, *more: str, methods: list[str] = METHODS) -> Settings:
    """:func:`overrides` composed, into a result folder."""
    resume = next((one.removeprefix("resume=").strip("'") for one in more if one.startswith("resume=")), None)
    asked = tuple(one for one in more if not one.startswith("resume="))
    return replace(once_composed(asked, tuple(methods)), output=str(output), resume=resume)


@functools.cache
def once_composed(more: tuple[str, ...], methods: tuple[str, ...]) -> Settings:
    """Composing takes longer than running, and nobody changes what comes out."""
    return composed(overrides(*more, methods=list(methods)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run has written, by file and name."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and first
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
