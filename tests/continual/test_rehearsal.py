"""The loss of a model that learns a task and remembers what was before: every term by its own arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fedimpr.continual.rehearsal import Memory, Rehearsal, anchors, named_anchors
from fedimpr.errors import ConfigError
from fedimpr.models import build, final_layer
from fedimpr.views import Views

OFF = {
    "own": "all", "distil_own": 0.0, "replay_labels": 0.0, "replay_distil": 0.0, "features": 0.0, "head": 0.0, "anchors": 0.0,
    "radius": 0.0, "embeddings": None, "temperature": 2.0, "batch_size": 6,
    "views": Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False),
}  # fmt: skip
IMAGES, LABELS = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 3, 3, 2, 2])
TASK = torch.tensor([2, 3])
ORDER = (3, 0, 4, 1, 2)  # the classes' own numbers, as they arrive; the last one is not known yet
MEMORY = Memory(torch.randint(256, (9, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 2)


def network(classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, classes))


MODEL, PREVIOUS = network(4, 0), network(2, 1)


def loss(memory: Memory | None = MEMORY, previous: nn.Module | None = PREVIOUS, **weights) -> Tensor:
    lesson = Rehearsal(**(OFF | weights)).bound(TASK, previous, memory, seed=0, order=ORDER)
    value, logits = lesson(MODEL, IMAGES, LABELS, torch.Generator().manual_seed(5))
    torch.testing.assert_close(logits, MODEL(IMAGES))  # of the client's own images, whatever is remembered
    return value


def remembered() -> tuple[Tensor, Tensor]:
    """The six that the same generator draws."""
    places = torch.randint(9, (6,), generator=torch.Generator().manual_seed(5))
    return MEMORY.images[places].float() / 255, MEMORY.labels[places]


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(previous || model) at temperature 2 among the two classes that the previous model knew, times 4, by its definition."""
    p, q = (wanted / 2).softmax(1), (logits[:, :2] / 2).softmax(1)
    return 4 * (p * (p.log() - q.log())).sum(1).mean()


PLAIN = F.cross_entropy(MODEL(IMAGES), LABELS)


def test_without_weights_it_is_the_cross_entropy_and_asks_for_nothing() -> None:
    torch.testing.assert_close(loss(), PLAIN)
    assert not Rehearsal(**OFF).needs_memory and not Rehearsal(**OFF).needs_previous


def test_own_images_may_be_told_apart_among_the_task_s_classes_alone() -> None:
    torch.testing.assert_close(loss(own="task"), F.cross_entropy(MODEL(IMAGES)[:, 2:], LABELS - 2))


def test_lwf_distils_the_previous_answers_to_own_images() -> None:
    torch.testing.assert_close(loss(distil_own=3.0), PLAIN + 3 * divergence(MODEL(IMAGES), PREVIOUS(IMAGES)))


def test_remembered_images_are_learnt_by_their_labels() -> None:
    images, labels = remembered()
    torch.testing.assert_close(loss(replay_labels=0.5), PLAIN + 0.5 * F.cross_entropy(MODEL(images), labels))


def test_remembered_images_are_moved_and_own_ones_are_not() -> None:
    """The task's own were moved before the lesson; the views draw from the generator that has drawn the remembered images."""
    views, random = Views(shift=0.5, scale=(1.0, 1.0), rotation=0.0, flip=True), torch.Generator().manual_seed(5)
    places = torch.randint(9, (6,), generator=random)
    images = views(MEMORY.images[places].float() / 255, random)
    assert not torch.equal(images, remembered()[0])
    wanted = PLAIN + F.cross_entropy(MODEL(images), MEMORY.labels[places])
    torch.testing.assert_close(loss(replay_labels=1.0, views=views), wanted)


def test_target_distils_the_previous_answers_to_remembered_images() -> None:
    images, _ = remembered()
    torch.testing.assert_close(loss(replay_distil=25.0), PLAIN + 25 * divergence(MODEL(images), PREVIOUS(images)))


def test_mfcl_looks_at_features_through_the_previous_head_and_finetunes_the_head_alone() -> None:
    images, labels = remembered()
    both, names = torch.cat([IMAGES, images]), torch.cat([LABELS, labels])
    deep = [nn.Sequential(*list(model)[:3])(both) for model in (MODEL, PREVIOUS)]
    gap = (deep[0] - deep[1]) @ final_layer(PREVIOUS).weight.T
    torch.testing.assert_close(loss(features=2.0), PLAIN + 2 * gap.square().mean())
    torch.testing.assert_close(loss(head=1.0), PLAIN + F.cross_entropy(MODEL(both), names))
    MODEL.zero_grad()
    (loss(head=1.0) - loss()).backward()
    assert float(MODEL[1].weight.grad.abs().max()) < 1e-6 < float(MODEL[3].weight.grad.abs().max())


def test_lander_pulls_features_to_the_edge_of_the_ball_around_their_anchor() -> None:
    images, labels = remembered()
    features, centres = nn.Sequential(*list(MODEL)[:3])(IMAGES), anchors(4, 3, 0)[LABELS]
    distance = (features - centres).square().mean(1).sqrt()
    torch.testing.assert_close(loss(memory=None, anchors=2.0, radius=0.4), PLAIN + 2 * (distance - 0.4).clamp_min(0).mean())
    torch.testing.assert_close(loss(memory=None, anchors=2.0, radius=100.0), PLAIN)


def test_anchors_have_size_one_and_do_not_move_when_classes_arrive() -> None:
    torch.testing.assert_close(anchors(3, 50, 0).square().mean(1), torch.ones(3))
    assert torch.equal(anchors(3, 50, 0), anchors(5, 50, 0)[:3]) and not torch.equal(anchors(3, 50, 0), anchors(3, 50, 1))


def test_anchors_of_names_keep_the_angles_between_them() -> None:
    """In F numbers a cosine is off by about 1 / sqrt(F), here 0.016."""
    names = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    made = named_anchors(names, 4000, seed=0)
    torch.testing.assert_close(made.square().mean(1), torch.ones(4))
    kept, wanted = (F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T for rows in (made, names))
    assert float((kept - wanted).abs().max()) < 0.05
    torch.testing.assert_close(named_anchors(names[:2], 4000, seed=0), made[:2])  # the same when classes arrive


def test_lander_s_anchors_are_those_of_names_where_a_file_has_them(tmp_path: Path) -> None:
    """Rows in the data set's order, without what all have in common; class k is the k-th to arrive."""
    names, file = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)) + 3, tmp_path / "names.safetensors"
    save_file({"embeddings": names}, file)
    own = names - names.sum(0) / 5
    centres = named_anchors(torch.stack([own[3], own[0], own[4], own[1]]), 3, seed=0)[LABELS]
    distance = (nn.Sequential(*list(MODEL)[:3])(IMAGES) - centres).square().mean(1).sqrt()
    found = loss(memory=None, anchors=2.0, radius=0.4, embeddings=str(file))
    torch.testing.assert_close(found, PLAIN + 2 * (distance - 0.4).clamp_min(0).mean())


def test_in_the_first_step_there_is_nothing_to_remember() -> None:
    everything = {"distil_own": 1.0, "replay_labels": 1.0, "replay_distil": 1.0, "features": 1.0, "head": 1.0}
    torch.testing.assert_close(loss(memory=None, previous=None, **everything), PLAIN)


def test_names_are_refused_where_nobody_looks_at_them(tmp_path: Path) -> None:
    save_file({"embeddings": torch.randn(5, 7)}, file := tmp_path / "names.safetensors")
    with pytest.raises(ConfigError, match=r"'embeddings' is '.*'; allowed: null where nothing is drawn to anchors \(anchors: 0\)"):
        Rehearsal(**(OFF | {"embeddings": str(file)}))
    with pytest.raises(ConfigError, match="'embeddings' is 'nowhere'; allowed: null, or a safetensors file"):
        Rehearsal(**(OFF | {"embeddings": "nowhere", "anchors": 1.0}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("own", "new"), ("distil_own", -1.0), ("radius", -0.1), ("temperature", 0.0), ("batch_size", 0)],
)
def test_what_is_out_of_range_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"config key '{key}' is"):
        Rehearsal(**(OFF | {key: value}))


def test_a_model_that_knows_turns_learns_each_turn_of_a_class_as_a_class_of_its_own() -> None:
    """Own and remembered images upright and in one more turn, which the generator draws; class k turned by q quarters is output 4 k + q."""
    settings = {"shape": (1, 8, 8), "mean": [0.5], "std": [0.25], "batch_norm": False, "turned": True}
    model, previous = (build("lenet5", classes=k, seed=k, **settings).eval() for k in (4, 2))
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    memory = Memory(torch.randint(256, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(8)), torch.arange(9) % 2)
    lesson = Rehearsal(**(OFF | {"own": "task", "replay_labels": 0.5, "replay_distil": 3.0})).bound(
        TASK, previous, memory, seed=0, order=ORDER
    )
    value, logits = lesson(model, images, LABELS, torch.Generator().manual_seed(5))

    random = torch.Generator().manual_seed(5)
    own = torch.randint(1, 4, (5,), generator=random)
    places = torch.randint(9, (6,), generator=random)
    past = torch.randint(1, 4, (6,), generator=random)
    remembered = memory.images[places].float() / 255
    first = torch.cat([images, *(torch.rot90(x[None], int(q), (2, 3)) for x, q in zip(images, own, strict=True))])
    second = torch.cat([remembered, *(torch.rot90(x[None], int(q), (2, 3)) for x, q in zip(remembered, past, strict=True))])
    on_own, on_past, wanted = (
        model.network((first - 0.5) / 0.25),
        model.network((second - 0.5) / 0.25),
        previous.network((second - 0.5) / 0.25),
    )
    among_new = F.cross_entropy(on_own[:, 8:], torch.cat([4 * LABELS, 4 * LABELS + own]) - 8)
    labels = F.cross_entropy(on_past, torch.cat([4 * memory.labels[places], 4 * memory.labels[places] + past]))
    p, q = (wanted / 2).softmax(1), (on_past[:, :8] / 2).softmax(1)
    torch.testing.assert_close(value, among_new + 0.5 * labels + 3 * 4 * (p * (p.log() - q.log())).sum(1).mean())
    torch.testing.assert_close(logits, on_own[:5, ::4])  # of the images as they are
