"""What a teacher shows while images pass through it."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from fedimpr import observation
from fedimpr.ensemble import Ensemble
from fedimpr.errors import FedimprError, TeacherError
from fedimpr.observation import compiled, observe, observe_module, pass_of
from fedimpr.synthesis.priors import RunningStatistics
from tests.makers import SHAPE, needs_a_compiler, small_ensemble, small_model

IMAGES = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).view(2, 1, 1, 2)


def tiny() -> nn.Sequential:
    """Batch norm over all pixels that makes 2 x - 1 of x, batch norm over single pixels that changes nothing, and a linear layer."""
    net = nn.Sequential(nn.BatchNorm2d(1, eps=0.0), nn.Flatten(), nn.BatchNorm1d(2, eps=0.0), nn.Linear(2, 2, bias=False)).eval()
    net[0].running_mean.fill_(0.5)
    net[0].running_var.fill_(0.25)
    net[3].weight.data = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    return net


class Untidy(nn.Module):
    """Calls its layers in another order than it holds them in, and one of them not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.after, self.unused, self.before, self.last = nn.BatchNorm1d(2), nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.Linear(2, 2)
        self.unused.running_mean.fill_(7.0)
        self.unused.running_var.fill_(9.0)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.after(self.before(images).flatten(1) + 10))


def hooks_of(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


def test_statistics_by_hand() -> None:
    """Pixels 0, 1, 1/2, 1/2 have mean 1/2 and variance (1/4 + 1/4) / 4. The second layer sees (-1, 1) and (0, 0): means -1/2 and 1/2,
    variances 1/4 and 1/4.
    """
    seen = observe(tiny(), IMAGES, statistics=True)
    assert seen.statistics.tolist() == [[0.5, -0.5, 0.5], [0.125, 0.25, 0.25]]
    assert seen.logits.tolist() == [[-1.0, 3.0], [0.0, 0.0]]


def test_their_distance_to_what_is_remembered_by_hand() -> None:
    """|1/2 - 1/2| + |1/8 - 1/4| and |(-1/2, 1/2)| + |(1/4 - 1, 1/4 - 1)|: 1/8 + (1/2 + 3/4) * sqrt(2)."""
    net = tiny()
    distance = RunningStatistics(net).distance(observe(net, IMAGES, statistics=True).statistics)
    assert distance.item() == pytest.approx(1 / 8 + 5 / 4 * 2**0.5, abs=1e-5)


def test_statistics_are_of_the_first_images_alone_where_so_many_are_counted() -> None:
    """Pixels 0 and 1 have mean 1/2 and variance 1/4; one image alone does not vary. Logits and features are of all images."""
    seen = observe(tiny(), IMAGES, statistics=True, features="batch_norm", counted=1)
    assert seen.statistics.tolist() == [[0.5, -1.0, 1.0], [0.25, 0.0, 0.0]]
    whole = observe(tiny(), IMAGES, features="batch_norm")
    assert torch.equal(seen.logits, whole.logits) and torch.equal(seen.features, whole.features)
    one = observe(tiny(), IMAGES[:1], statistics=True)
    assert torch.equal(seen.statistics, one.statistics)


def test_features_by_hand() -> None:
    """Of the batch norms: the mean over the pixels of either image, then the second layer's inputs; penultimate: what the linear layer is
    given.
    """
    assert observe(tiny(), IMAGES, features="batch_norm").features.tolist() == [[0.5, -1.0, 1.0], [0.5, 0.0, 0.0]]
    assert observe(tiny(), IMAGES, features="penultimate").features.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_what_was_not_asked_for_is_empty() -> None:
    seen = observe(tiny(), IMAGES)
    assert seen.statistics.shape == (2, 0) and seen.features.shape == (2, 0)
    bare = small_model(batch_norm=False)
    assert observe(bare, torch.rand(3, *SHAPE), statistics=True).statistics.shape == (2, 0)


def test_layers_stand_in_module_order_whatever_the_order_of_calls() -> None:
    """The layer called last comes first. It sees pixels of about 10, the one called first sees pixels of 1/2."""
    seen = observe(Untidy(), IMAGES, statistics=True, features="batch_norm")
    assert seen.statistics[0].tolist() == pytest.approx([10.25, 10.75, 7.0, 0.5], abs=1e-3)
    assert seen.features[0].tolist() == pytest.approx([10.0, 11.0, 0.5], abs=1e-3)  # the layer in between was not called


def test_a_layer_that_is_not_called_shows_what_it_remembers() -> None:
    """So it adds nothing to the distance, and can be left out of the sum of the others: |mean| + |variance - 1| of either."""
    net = Untidy()
    statistics = observe(net, IMAGES, statistics=True).statistics
    assert statistics[:, 2].tolist() == [7.0, 9.0]
    means, variances = statistics
    others = means[:2].norm() + (variances[:2] - 1).norm() + means[3].abs() + (variances[3] - 1).abs()
    assert RunningStatistics(net).distance(statistics).item() == pytest.approx(others.item(), abs=1e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_the_members_of_an_ensemble_follow_each_other(batched: bool) -> None:
    members, x = [small_model(0), small_model(1)], torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    for features in ("batch_norm", "penultimate"):
        alone = [observe(member, x, statistics=True, features=features, counted=3) for member in members]
        seen = observe(Ensemble(members, batched=batched), x, statistics=True, features=features, counted=3)
        torch.testing.assert_close(seen.statistics, torch.cat([one.statistics for one in alone], 1))
        torch.testing.assert_close(seen.features, torch.cat([one.features for one in alone], 1))


@pytest.mark.parametrize("features", ["batch_norm", "penultimate"])
def test_no_hook_is_left_behind_even_when_the_module_raises(features) -> None:
    net = tiny()
    observe(net, IMAGES, statistics=True, features=features)
    assert hooks_of(net) == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|running_mean should contain"):
        observe(net, torch.zeros(2, 1, 1, 5), statistics=True, features=features)
    assert hooks_of(net) == 0


def test_no_hook_is_left_behind_where_there_is_no_final_layer() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval()
    with pytest.raises(TeacherError, match="no linear layer"):
        observe(net, IMAGES, statistics=True, features="penultimate")
    assert hooks_of(net) == 0


# --- compiled ---


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-3, atol=1e-5)


@needs_a_compiler
def test_passes_are_compiled_inside_of_a_block_and_nowhere_else() -> None:
    assert pass_of() is observe_module
    with compiled():
        fast = pass_of()
        with compiled(False):
            assert pass_of() is observe_module
        assert pass_of() is fast is not observe_module
    assert pass_of() is observe_module


def test_without_a_compiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with compiled(False):
        pass
    with pytest.raises(FedimprError, match="^compiling a network: there is no C.. compiler. Install g..,"), compiled():
        pass


@needs_a_compiler
def test_a_compiler_that_fails_is_one_line_and_other_errors_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(error: type[RuntimeError]):
        def fails(*_: object, **__: object) -> None:
            raise error("g++: no Python.h\nand more")

        return lambda: fails

    theirs = type("CppCompileError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    monkeypatch.setattr(observation, "_compiler", compiler(theirs))
    with compiled(), pytest.raises(FedimprError, match=r"PyTorch's compiler failed: g\+\+: no Python\.h\. Set compile=false"):
        observe(tiny(), IMAGES)
    monkeypatch.setattr(observation, "_compiler", compiler(RuntimeError))
    with compiled(), pytest.raises(RuntimeError, match="no Python.h\nand more"):
        observe(tiny(), IMAGES)


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("features", [None, "penultimate", "batch_norm"])
def test_compiled_passes_show_what_others_do_and_a_second_teacher_needs_no_compiler(features) -> None:
    """Values and gradients, in the logits, in the statistics and in the features."""

    def seen(teacher: nn.Module) -> list[torch.Tensor]:
        images = torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        found = observe(teacher, images, statistics=True, features=features, counted=8)
        (found.logits.square().sum() + found.statistics.square().sum() + found.features.square().sum()).backward()
        return [*found, images.grad]

    made = 0
    for seed in (0, 1):
        teacher = small_model(seed).requires_grad_(False)
        with compiled():
            fast = seen(teacher)
        assert all(map(close, fast, seen(teacher))) and hooks_of(teacher) == 0
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert seed == 0 or graphs == made
        made = graphs


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("members", [3, 17])
def test_members_of_an_ensemble_are_compiled_where_they_take_turns(members: int) -> None:
    """Seventeen recompute their activations on the way back."""
    teacher = small_ensemble(members, batched=False)

    def seen() -> list[torch.Tensor]:
        images = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        found = observe(teacher, images, statistics=True)
        (found.logits.square().sum() + found.statistics.square().sum()).backward()
        return [*found, images.grad]

    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with compiled():
        fast = seen()
    assert all(map(close, fast, seen())) and torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
