"""What holds for every classifier, whichever network it wraps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fedimpr.errors import ConfigError, TeacherError
from fedimpr.models import Classifier, build, final_layer, names, rebuild

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
SMALL = {"mean": [0.5], "std": [0.25], "classes": 3}
# The smallest image that each network takes.
LEAST = {
    "lenet5": 4,
    "lenet5_half": 4,
    "cnn128": 18,
    "cnn_dropout": 6,
    "alexnet": 15,
    "alexnet_half": 15,
    "resnet8": 8,
    "resnet18": 8,
    "resnet34": 8,
    "vgg11": 16,
}


def small(name: str, side: int, seed: int = 0, **options: object) -> Classifier:
    needed = {"lenet5": {"batch_norm": False}, "lenet5_half": {"batch_norm": False}, "resnet8": {"width": 16, "stride": 1}}
    options = {**needed.get(name, {}), **options}
    return build(name, shape=(1, side, side), seed=seed, **SMALL, **options)


def images(side: int, count: int = 4) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("name", names())
def test_smallest_image_works_and_a_smaller_one_is_refused_by_name(name: str) -> None:
    side = LEAST.get(name, 4)
    assert small(name, side).eval()(images(side)).shape == (4, 3)
    with pytest.raises(ConfigError, match=rf"'dataset.shape'.*at least {side}x{side} pixels for {name}"):
        small(name, side - 1)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("side", [8, 16, 28, 32, 33])
def test_lenet5_takes_small_images(side: int, batch_norm: bool) -> None:
    assert small("lenet5", side, batch_norm=batch_norm)(images(side)).shape == (4, 3)


def test_height_and_width_may_differ() -> None:
    for name in ("lenet5_half", "cnn128", "alexnet_half"):
        options = {"batch_norm": True} if name.startswith("lenet5") else {}
        model = build(name, shape=(2, 20, 29), classes=5, mean=[0.5] * 2, std=[1] * 2, seed=0, **options)
        assert model(torch.zeros(3, 2, 20, 29)).shape == (3, 5)


def test_images_are_normalised_before_the_network() -> None:
    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    model = Classifier(Probe(), [0.5, 0.25], [0.25, 0.5], {})
    # (1 - 0.5) / 0.25 = 2 and (1 - 0.25) / 0.5 = 1.5
    assert model(torch.ones(1, 2, 4, 4)).tolist() == [[2.0, 1.5]]


def test_state_holds_the_network_alone_and_normalisation_follows_the_module() -> None:
    model = small("lenet5", 8)
    assert all(key.startswith("network.") for key in model.state_dict())
    assert model.double().mean.dtype == torch.float64


def test_same_seed_same_weights_and_the_global_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (small("wrn16_1", 8, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(final_layer(first).weight, final_layer(other).weight)


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_every_config_builds_and_its_spec_survives_json(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model = build(config["name"], shape=(3, 32, 32), classes=10, mean=[0.5] * 3, std=[0.2] * 3, seed=5, **config["options"])
    twin = rebuild(json.loads(json.dumps(model.spec)))
    assert twin.spec == model.spec
    twin.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [("lenet5", {"batch_norm": False}), ("lenet5", {"batch_norm": True}), ("alexnet_half", {}), ("wrn16_1", {})],
)
def test_batched_members_equal_the_loop(name: str, options: dict[str, bool]) -> None:
    members = [small(name, 16, seed, **options).eval() for seed in range(3)]
    x = images(16)
    parameters, buffers = stack_module_state(members)
    batched = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(batched, torch.stack([member(x) for member in members]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lenet5", "alexnet_half", "resnet18"])
def test_exported_program_equals_the_model_for_another_batch_size(name: str) -> None:
    model = small(name, 16).eval()
    program = torch.export.export(model, (images(16, 2),), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    torch.testing.assert_close(program(images(16, 5)), model(images(16, 5)))


def test_final_layer_makes_the_logits() -> None:
    model = small("alexnet_half", 16).eval()
    layer = final_layer(model)
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(images(16))
    hook.remove()
    assert torch.equal(seen[0], logits)


def test_a_model_without_linear_layer_has_no_final_layer() -> None:
    with pytest.raises(TeacherError, match="no linear layer .* 'Sequential'.*ends in torch.nn.Linear"):
        final_layer(nn.Sequential(nn.Conv2d(1, 3, 1)))


def test_grey_images_are_repeated_for_torchvision() -> None:
    grey = build("torchvision/resnet18", shape=(1, 32, 32), classes=10, mean=[0.5], std=[0.25], seed=0).eval()
    colour = build("torchvision/resnet18", shape=(3, 32, 32), classes=10, mean=[0.5] * 3, std=[0.25] * 3, seed=0).eval()
    x = images(32, 2)
    with torch.no_grad():
        torch.testing.assert_close(grey(x), colour(x.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "lenet6"}, "'model.name' is 'lenet6'; allowed: one of lenet5, "),
        ({"name": "torchvision/nothing"}, "'model.name' is 'torchvision/nothing'; .*resnet18"),
        ({"batch_norms": True}, "'model.options'.*the options of lenet5"),
        ({"batch_norm": "maybe"}, "'model.options.batch_norm' is 'maybe'; allowed: true or false"),
        ({"turned": 2}, "'model.options.turned' is 2; allowed: true or false"),
        ({"shape": (1, 8)}, "'dataset.shape'.*channels, height, width"),
        ({"shape": (0, 8, 8)}, "'dataset.shape'"),
        ({"classes": 1}, "'dataset.classes' is 1"),
        ({"mean": [0.5] * 3}, "'dataset.mean'.*1 numbers, one a channel"),
        ({"std": [0.0]}, "'dataset.std'.*> 0"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**{"name": "lenet5", "shape": (1, 8, 8), "seed": 0, "batch_norm": False, **SMALL, **change})


@pytest.mark.parametrize("value", ["wide", 0, -1, 1.5, True, None])
def test_a_network_is_some_whole_number_of_kernels_wide(value: object) -> None:
    with pytest.raises(ConfigError, match=f"'model.options.width' is {value!r}; allowed: a whole number >= 1"):
        build("resnet8", shape=(1, 8, 8), seed=0, width=value, stride=1, **SMALL)


@pytest.mark.parametrize(
    ("name", "channels", "options", "message"),
    [
        ("resnet18", 2, {}, "'dataset.shape'.*1 or 3 channels"),
        ("resnet18", 3, {"colour": 1}, "'model.options'.*colour"),
        ("alexnet", 3, {}, "'dataset.shape'.*63x63 pixels or more"),
        ("vit_b_16", 3, {}, "'dataset.shape'.*Wrong image height"),
        ("googlenet", 3, {"init_weights": False}, "'model.options'.*aux_logits: false"),
    ],
)
def test_wrong_settings_of_torchvision_are_named(name: str, channels: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(f"torchvision/{name}", shape=(channels, 32, 32), classes=3, mean=[0.5] * channels, std=[1] * channels, seed=0, **options)


def test_a_damaged_spec_is_named() -> None:
    with pytest.raises(ConfigError, match="'spec'"):
        rebuild({"name": "lenet5"})
