"""Weights of a user's own: every tensor that fits is taken, a head of other classes stays fresh, and no network is loaded by half."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedimpr._torchvision import torchvision
from fedimpr.errors import ConfigError
from fedimpr.models import Classifier, build, final_layer, load_pretrained


def small(classes: int, seed: int = 0) -> Classifier:
    return build("resnet8", shape=(3, 16, 16), classes=classes, mean=[0.5] * 3, std=[0.25] * 3, seed=seed, width=16, stride=1)


def head(model: Classifier) -> set[str]:
    layer = final_layer(model)
    return {name for name, tensor in model.named_parameters() if tensor is layer.weight or tensor is layer.bias}


def differing(one: Classifier, other: Classifier) -> set[str]:
    theirs = other.state_dict()
    return {
        name for name, tensor in one.state_dict().items() if tensor.shape != theirs[name].shape or not torch.equal(tensor, theirs[name])
    }


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("bare", [True, False])
def test_all_is_taken_under_the_names_of_the_network_or_of_its_wrapper(kind: str, bare: bool, tmp_path: Path) -> None:
    theirs, mine = small(10, seed=1), small(10)
    state = (theirs.network if bare else theirs).state_dict()
    path = tmp_path / f"weights.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    assert differing(mine, theirs)
    load_pretrained(mine, path)
    assert differing(mine, theirs) == set()


def test_a_head_of_another_number_of_classes_stays_as_it_is(tmp_path: Path) -> None:
    theirs, mine, untouched = small(1000, seed=1), small(7), small(7)
    torch.save(theirs.network.state_dict(), tmp_path / "weights.pth")
    load_pretrained(mine, tmp_path / "weights.pth")
    assert differing(mine, theirs) == head(mine)
    assert head(mine).isdisjoint(differing(mine, untouched))


def test_what_torchvision_writes_is_taken(tmp_path: Path) -> None:
    """Its files are state dicts of the bare network; those of its first years count no batches."""
    published = torchvision().models.resnet18(num_classes=1000).state_dict()
    old = {name: tensor for name, tensor in published.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "resnet18-00000000.pth")
    mine = build("torchvision/resnet18", shape=(3, 64, 64), classes=7, mean=[0.5] * 3, std=[0.25] * 3, seed=0)
    load_pretrained(mine, tmp_path / "resnet18-00000000.pth")
    held = mine.network.state_dict()
    assert {name for name in old if not torch.equal(held[name], old[name])} == {"fc.weight", "fc.bias"}


def test_half_precision_becomes_the_models_own(tmp_path: Path) -> None:
    theirs, mine = small(10, seed=1), small(10)
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in theirs.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    load_pretrained(mine, tmp_path / "w.safetensors")
    assert {tensor.dtype for tensor in mine.parameters()} == {torch.float32}
    assert all(torch.equal(held, tensor.half().float()) for held, tensor in zip(mine.parameters(), theirs.parameters(), strict=True))


def wrong(kind: str, folder: Path) -> Path:
    state = small(10).network.state_dict()
    first = next(iter(state))
    path = folder / ("weights.safetensors" if kind == "no tensors" else "weights.pth")
    held: dict[str, object] = {
        "lacks one": {name: tensor for name, tensor in state.items() if name != first},
        "one more": {**state, "extra.weight": torch.zeros(2)},
        "another shape": {**state, first: torch.zeros(1)},
        "NaN": {**state, first: torch.full_like(state[first], torch.nan)},
        "a checkpoint": {"epoch": 3, "state_dict": state},
        "a list": [1, 2],
        "a model": small(10),
    }
    if kind in held:
        torch.save(held[kind], path)
    elif kind != "missing":
        path.write_bytes(b"\x00" * 20)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "there is none"),
        ("damaged", "a file of weights"),
        ("no tensors", "a file of weights"),
        ("a checkpoint", "holds entries epoch, state_dict"),
        ("a list", "holds list"),
        ("a model", "a file of weights"),
        ("lacks one", r"is \[16, 3, 3, 3\] in the network and missing in the file"),
        ("one more", r"extra.weight is missing in the network and \[2\] in the file"),
        ("another shape", r"is \[16, 3, 3, 3\] in the network and \[1\] in the file"),
        ("NaN", "weights without NaN"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays_as_it_was(kind: str, said: str, tmp_path: Path) -> None:
    mine, untouched = small(10, seed=2), small(10, seed=2)
    with pytest.raises(ConfigError, match=f"'initial_weights'.*{said}"):
        load_pretrained(mine, wrong(kind, tmp_path), "initial_weights")
    assert differing(mine, untouched) == set()


def test_another_network_is_never_taken_by_half(tmp_path: Path) -> None:
    """A ResNet-34 has every tensor of a ResNet-18, and more."""
    torch.save(torchvision().models.resnet34().state_dict(), tmp_path / "weights.pth")
    mine = build("torchvision/resnet18", shape=(3, 64, 64), classes=7, mean=[0.5] * 3, std=[0.25] * 3, seed=0)
    with pytest.raises(ConfigError, match="weights of torchvision/resnet18 .*is missing in the network"):
        load_pretrained(mine, tmp_path / "weights.pth")
