"""The ensemble as a teacher."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedimpr.ensemble import MEMBERS_IN_MEMORY, Ensemble, class_vectors
from fedimpr.errors import FedimprError, TeacherError
from fedimpr.models import build
from fedimpr.observation import observe
from fedimpr.synthesis.priors import RunningStatistics
from tests.makers import SHAPE, Linear, small_ensemble, small_model


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def distance(teacher: torch.nn.Module) -> torch.Tensor:
    """How far the statistics of :func:`images` are from those that the teacher remembers."""
    return RunningStatistics(teacher).distance(observe(teacher, images(), statistics=True).statistics)


def test_logits_are_the_weighted_mean_of_the_members() -> None:
    one, two = Linear([[1.0, 0.0], [0.0, 1.0]]), Linear([[3.0, 0.0], [0.0, 5.0]])
    x = torch.tensor([[1.0, 1.0]]).view(1, 1, 1, 2)  # member logits (1, 1) and (3, 5)
    assert Ensemble([one, two])(x).tolist() == [[2.0, 3.0]]  # uniform
    assert Ensemble([one, two], torch.tensor([3, 1]))(x).tolist() == [[1.5, 2.0]]  # (3 * 1 + 3) / 4, (3 * 1 + 5) / 4
    counts = torch.tensor([[0, 0], [10, 0]])  # class 0 is known to member two alone, class 1 to nobody: uniform
    assert Ensemble([one, two], counts)(x).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("batched", [False, True])
def test_a_mean_of_probabilities_gives_each_member_one_vote_however_large_its_logits(batched: bool) -> None:
    one, two, three = Linear([[0.0, 0.0], [0.0, math.log(3)]]), Linear([[0.0, 0.0], [0.0, math.log(3)]]), Linear([[0.0, 900.0], [0.0, 0.0]])
    x = torch.tensor([[1.0, 1.0]]).view(1, 1, 1, 2)  # probabilities (1/4, 3/4) twice, and (1, 0)
    probabilities = Ensemble([one, two, three], batched=batched, mean="probabilities")(x).softmax(1)
    torch.testing.assert_close(probabilities, torch.tensor([[1 / 2, 1 / 2]]))  # (1/4 + 1/4 + 1) / 3
    weighted = Ensemble([one, two, three], torch.tensor([2, 1, 1]), batched=batched, mean="probabilities")(x).softmax(1)
    torch.testing.assert_close(weighted, torch.tensor([[7 / 16, 9 / 16]]))  # (2/4 + 1/4 + 1) / 4
    assert Ensemble([one, two, three], batched=batched)(x).argmax(1).item() == 0  # of logits the third decides alone
    sure = Ensemble([three, three], batched=batched, mean="probabilities")(x)
    assert bool(sure.isfinite().all()) and sure.argmax(1).item() == 0


def test_an_ensemble_keeps_what_it_is_the_mean_of(tmp_path: Path) -> None:
    ensemble = Ensemble([small_model(seed) for seed in range(2)], mean="probabilities")
    ensemble.save(tmp_path / "e.safetensors")
    again = Ensemble.load(tmp_path / "e.safetensors")
    assert again.mean == "probabilities" and torch.equal(again(images()), ensemble(images()))


def test_what_has_no_final_layer_or_no_meaning_is_refused() -> None:
    with pytest.raises(TeacherError, match="mean of probabilities has no final linear layer"):
        class_vectors(Ensemble([small_model(0), small_model(1)], mean="probabilities"))
    with pytest.raises(TeacherError, match="of logits or of probabilities.*votes"):
        Ensemble([small_model(0)], mean="votes")  # type: ignore[arg-type]


def test_the_final_layer_of_an_ensemble_lies_over_the_concatenated_features() -> None:
    models = [small_model(seed) for seed in range(3)]
    ensemble = Ensemble(models, torch.rand(3, 4, generator=torch.Generator().manual_seed(1)))
    features = observe(ensemble, images(), features="penultimate").features
    biases = sum(
        w * m.network.state_dict()[[k for k in m.network.state_dict() if k.endswith("bias")][-1]]
        for w, m in zip(ensemble.weights, models, strict=True)
    )
    torch.testing.assert_close(features @ class_vectors(ensemble).T + biases, ensemble(images()))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_batched_equals_in_turn(batch_norm: bool) -> None:
    x = images()
    in_turn, batched = (small_ensemble(batch_norm=batch_norm, batched=how) for how in (False, True))
    for features in ("penultimate", "batch_norm"):
        grads = []
        for ensemble in (in_turn, batched):
            leaf = x.clone().requires_grad_()
            seen = observe(ensemble, leaf, statistics=True, features=features, counted=4)
            (seen.logits.square().sum() + seen.statistics.square().sum() + seen.features.square().sum()).backward()
            grads.append((*(part.detach() for part in seen), leaf.grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(in_turn.member_logits(x), batched.member_logits(x))


def test_many_members_recompute_instead_of_remembering_and_give_the_same_gradient() -> None:
    ensemble = small_ensemble(MEMBERS_IN_MEMORY + 1, batched=False)
    leaf = images().requires_grad_()
    ensemble(leaf).square().sum().backward()
    expected = images().requires_grad_()
    torch.stack([member(expected) for member in ensemble.members]).mean(0).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_unlike_members_answer_in_turn() -> None:
    members = [small_model(0), small_model(1, name="lenet5_half"), small_model(2, name="lenet5_half")]
    expected = torch.stack([member(images()) for member in members]).mean(0)
    torch.testing.assert_close(Ensemble(members)(images()), expected)
    with pytest.raises(TeacherError, match="unlike architecture"):
        Ensemble(members, batched=True)


def test_saved_and_loaded_is_the_same_teacher(tmp_path) -> None:
    ensemble = Ensemble([small_model(0), small_model(1, name="lenet5_half")], torch.tensor([1.0, 2.0]))
    ensemble.save(tmp_path / "e.safetensors")
    assert torch.equal(Ensemble.load(tmp_path / "e.safetensors")(images()), ensemble(images()))
    with pytest.raises(FedimprError, match="saving the ensemble: cannot write .*nowhere"):
        ensemble.save(tmp_path / "nowhere" / "e.safetensors")
    (tmp_path / "e.safetensors").write_bytes(b"half a file")
    with pytest.raises(FedimprError, match="is no ensemble file"):
        Ensemble.load(tmp_path / "e.safetensors")


def test_exported_it_needs_no_fedimpr_and_takes_any_batch(tmp_path) -> None:
    ensemble = small_ensemble(2)
    ensemble.export(tmp_path / "e.pt2", SHAPE)
    program = torch.export.load(str(tmp_path / "e.pt2")).module()
    for count in (1, 5):
        torch.testing.assert_close(program(images(count)), ensemble(images(count)))


def test_what_cannot_be_an_ensemble_is_refused() -> None:
    with pytest.raises(TeacherError, match="at least one member"):
        Ensemble([])
    for weights in (torch.tensor([1.0]), torch.tensor([1.0, -1.0]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(TeacherError, match="weights must be finite"):
            Ensemble([small_model(0), small_model(1)], weights)


def test_batch_norm_distance_by_hand() -> None:
    """Per layer |mean - running mean|_2 + |variance - running variance|_2 of the layer's input."""
    model = build("lenet5", shape=SHAPE, classes=4, mean=[0.0], std=[1.0], seed=0, batch_norm=True).eval()
    inputs = []
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    model(images())
    for hook in hooks:
        hook.remove()
    # A fresh layer's running mean is 0 and its running variance 1.
    expected = sum((x.mean((0, 2, 3))).norm() + (x.var((0, 2, 3), unbiased=False) - 1).norm() for x in inputs)
    torch.testing.assert_close(distance(model), expected)
    ensemble = Ensemble([model, small_model(1)], batched=False)
    torch.testing.assert_close(distance(ensemble), sum(distance(member) for member in ensemble.members) / 2)
