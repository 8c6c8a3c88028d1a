"""Re-estimation of batch-norm statistics on target images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedimpr.adaptation import reestimate, restore, statistics_of
from fedimpr.errors import ConfigError, FedimprError, TeacherError
from tests.makers import SHAPE, small_ensemble, small_model


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


SMALL = (2, 3, 3)


def pixels() -> nn.Module:
    """Batch norm of the pixels of small images, which remembers means 5 and variances 9; logits are their sum and minus it."""
    layer = nn.BatchNorm2d(2)
    layer.running_mean.fill_(5.0)
    layer.running_var.fill_(9.0)
    last = nn.Linear(18, 2, bias=False)
    last.weight.data = torch.tensor([[1.0], [-1.0]]).expand(2, 18).clone()
    return nn.Sequential(layer, nn.Flatten(), last).eval()


def tables(*batches: torch.Tensor) -> list[np.ndarray]:
    """Each batch as (values, channels)."""
    return [batch.movedim(1, -1).flatten(0, -2).numpy() for batch in batches]


def test_one_batch_leaves_its_own_mean_and_unbiased_variance() -> None:
    model, batch = pixels(), images(4, shape=SMALL)
    reestimate(model, [batch], momentum=None)
    (values,) = tables(batch)
    assert model[0].running_mean.tolist() == pytest.approx(values.mean(0).tolist(), rel=1e-5)
    assert model[0].running_var.tolist() == pytest.approx(values.var(0, ddof=1).tolist(), rel=1e-5)


def test_all_images_count_alike_in_batches_of_unlike_sizes() -> None:
    """Batches of 6 and of 2: three quarters and one."""
    model, batches = pixels(), [images(6, shape=SMALL), 3 * images(2, 1, shape=SMALL)]
    reestimate(model, batches, momentum=None)
    (large, small), found = tables(*batches), model[0]
    assert found.running_mean.tolist() == pytest.approx((0.75 * large.mean(0) + 0.25 * small.mean(0)).tolist(), rel=1e-5)
    expected = 0.75 * large.var(0, ddof=1) + 0.25 * small.var(0, ddof=1)
    assert found.running_var.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_equal_batches_give_pytorchs_cumulative_mean() -> None:
    model, batches = small_model(), [images(8, seed) for seed in range(3)]
    expected = copy.deepcopy(model)
    for layer in expected.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            layer.reset_running_stats()
            layer.momentum = None
    expected.train()
    with torch.no_grad():
        for batch in batches:
            expected(batch)
    reestimate(model, batches, momentum=None)
    for key, value in statistics_of(model).items():
        assert torch.allclose(value, expected.state_dict()[key], rtol=1e-5), key


def test_with_a_momentum_the_statistics_move_from_the_sources() -> None:
    """A tenth of the way from 5 and 9."""
    model, batch = pixels(), images(4, shape=SMALL)
    reestimate(model, [batch], momentum=0.1)
    (values,) = tables(batch)
    assert model[0].running_mean.tolist() == pytest.approx((4.5 + 0.1 * values.mean(0)).tolist(), rel=1e-5)
    assert model[0].running_var.tolist() == pytest.approx((8.1 + 0.1 * values.var(0, ddof=1)).tolist(), rel=1e-5)


def test_a_shifted_domain_is_answered_as_the_one_that_was_known() -> None:
    """A linear change of the pixels is what batch norm undoes."""
    model, known = pixels(), images(16, shape=SMALL)
    reestimate(model, [known], momentum=None)
    expected = model(known)
    shifted = 0.5 * known + 0.3
    assert not torch.allclose(model(shifted), expected, atol=0.1)
    reestimate(model, [shifted], momentum=None)
    assert torch.allclose(model(shifted), expected, atol=1e-2)


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_the_statistics_changes_and_they_can_be_restored(momentum: float | None, training: bool) -> None:
    model = small_model().train(training)
    model.network.register_parameter("frozen", nn.Parameter(torch.zeros(1), requires_grad=False))
    before, batches = copy.deepcopy(model), [images(8), images(8, 1)]
    momenta = [layer.momentum for layer in model.modules() if hasattr(layer, "momentum")]
    kept = reestimate(model, batches, momentum=momentum)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert changed == set(kept) == set(statistics_of(model)) and len(changed) > 0
    assert [part.training for part in model.modules()] == [part.training for part in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert [layer.momentum for layer in model.modules() if hasattr(layer, "momentum")] == momenta
    restore(model, kept)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())


def test_dropout_is_off() -> None:
    """Or two passes over the same images would differ."""
    layers = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
    found = []
    for _ in range(2):
        reestimate(layers, [images(8)], momentum=None)
        found.append(layers[1].running_mean.clone())
    assert torch.equal(*found)


class TwoHeads(nn.Module):
    """A network whose second head is left out outside of training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.unused = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        self.unused.running_mean.fill_(7.0)
        self.layer = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(x).flatten(1))


def test_a_layer_that_no_image_reaches_keeps_what_it_has() -> None:
    model = TwoHeads()
    reestimate(model, [images(4)], momentum=None)
    assert model.unused.running_mean.item() == 7 and model.norm.running_mean.item() == pytest.approx(0.5, abs=0.05)


# Bad input


@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        ([], "there are no images .* Give at least one batch"),
        ([images(4), images(4, shape=(2, 5, 5))], r"cannot take a batch \(4, 2, 5, 5\)"),
        ([torch.full((4, *SHAPE), torch.nan)], "statistics are not finite"),
    ],
    ids=["none", "shape", "nan"],
)
def test_after_an_error_the_model_is_as_it_was(batches: list[torch.Tensor], problem: str) -> None:
    model = small_model()
    before = copy.deepcopy(model)
    with pytest.raises(FedimprError, match=f"batch-norm re-estimation: .*{problem}"):
        reestimate(model, batches, momentum=None)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())
    assert not any(part.training for part in model.modules())


def test_a_batch_of_one_image_that_leaves_nothing_to_average_is_refused_with_a_remedy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2))
    with pytest.raises(TeacherError, match=r"cannot take a batch \(1, 1, 8, 8\).*Use batches of two images or more"):
        reestimate(model, [images(1)], momentum=None)


def test_models_without_statistics_of_their_own_are_refused() -> None:
    with pytest.raises(TeacherError, match="no batch-norm layer with running statistics"):
        reestimate(small_model(batch_norm=False), [images(4)], momentum=None)
    with pytest.raises(TeacherError, match="Re-estimate each member"):
        reestimate(small_ensemble(2), [images(4)], momentum=None)


@pytest.mark.parametrize("momentum", [0.0, 1.5])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ConfigError, match="momentum"):
        reestimate(small_model(), [images(4)], momentum=momentum)


def test_statistics_of_another_network_are_refused_and_change_nothing() -> None:
    model = small_model()
    before = statistics_of(model)
    with pytest.raises(FedimprError, match="of another network"):
        restore(model, statistics_of(pixels()))
    assert all(torch.equal(value, before[key]) for key, value in statistics_of(model).items())
