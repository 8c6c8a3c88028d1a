"""NAYER: class embeddings and noisy layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fedimpr.errors import ConfigError
from fedimpr.impressions import Bank, Source
from fedimpr.synthesis import NoisyLayerGenerator
from fedimpr.synthesis.nayer import NoisyNetwork
from tests.makers import CLASSES, SHAPE, priors, small_model
from tests.synthesis.faulty import Faulty, still

BATCH = 8
SIZE = 5


def method(**changes) -> NoisyLayerGenerator:
    settings = {
        "priors": priors(target=0.5, batch_norm=10.0), "embeddings": None, "embedding": SIZE, "latent": 6, "width": 8, "shared": 100,
        "life": 50, "steps": 3, "lr": 0.01, "momentum": 0.9, "batch_size": BATCH, "temperature": 20.0, "views": still(),
    }  # fmt: skip
    return NoisyLayerGenerator(**{**settings, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(embeddings: torch.Tensor | None = None) -> NoisyNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NoisyNetwork(embeddings, CLASSES, SIZE, 6, 8, SHAPE)


@given(st.integers(2, 20), st.integers(1, 20))
def test_each_noisy_layer_takes_an_equal_share_of_the_images_in_their_order(n: int, layers: int) -> None:
    """By hand: the first ceil(n / layers) images through the first layer, the next through the second, and so on."""
    layers = min(layers, n)
    noisy = network()
    noisy.generator = nn.Identity()
    labels, weight, bias = torch.arange(n) % CLASSES, torch.randn(layers, SIZE, 6), torch.randn(layers, 1, 6)
    vectors = noisy.normalise(noisy.table[labels])
    by_hand = [part @ weight[i] + bias[i] for i, part in enumerate(vectors.split(-(-n // layers)))]
    torch.testing.assert_close(noisy(labels, weight, bias), torch.cat(by_hand))


def test_one_layer_makes_one_image_of_a_class_and_two_make_two() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    for layers, alike in ((1, True), (2, False)):
        images = network()(labels, torch.randn(layers, SIZE, 6, generator=generator()), torch.zeros(layers, 1, 6))
        assert bool(torch.isclose(images[:4], images[4:]).all()) == alike


@pytest.mark.parametrize("shared", [1, 3, 100])
def test_no_image_comes_twice_however_many_were_to_share_a_layer(shared: int) -> None:
    made = method(shared=shared).synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    apart = torch.cdist(made.images.flatten(1), made.images.flatten(1)) + torch.eye(BATCH)
    assert float(apart.min()) > 1e-4


def test_batches_are_balanced() -> None:
    """10 images of 4 classes: two classes three times, two classes twice; which ones is drawn."""
    made = method(batch_size=10, steps=1).synthesize(small_model(), 60, generator(), shape=SHAPE)
    counts = [torch.bincount(labels, minlength=CLASSES).tolist() for labels in made.labels.split(10)]
    assert all(sorted(count) == [2, 2, 3, 3] for count in counts) and len({tuple(count) for count in counts}) > 1


def test_everything_trained_starts_anew_after_its_life() -> None:
    """At a vanishing learning rate embeddings change only when they are drawn anew. Lives of two batches: 1 2 | 3 4 | 5."""
    nayer, source, tables = method(life=2, lr=1e-12), generator(), []
    for _ in range(5):
        nayer.synthesize(small_model(), BATCH, source, shape=SHAPE)
        tables.append(nayer.state_dict()["network.module.table"])
    same = [torch.allclose(tables[i], tables[i + 1]) for i in range(4)]
    assert same == [True, False, True, False] and int(nayer.state_dict()["age"]) == 1


def test_the_generator_gets_better_from_batch_to_batch() -> None:
    teacher, batches = small_model(), 30
    made = method(priors=priors(target=1.0), lr=0.01).synthesize(teacher, batches * BATCH, generator(), shape=SHAPE)
    with torch.no_grad():
        losses = F.cross_entropy(teacher(made.images), made.labels, reduction="none").view(batches, BATCH).mean(1)
    assert losses[-5:].mean() < losses[:5].mean() - 0.005


def test_a_batch_that_diverges_leaves_the_network_as_it_was() -> None:
    """Of two batches of 3 steps the second fails: answers 5 to 7, after one that counts the classes and 3 of the first batch."""
    straight, broken = method(), method()
    straight.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    made = broken.synthesize(Faulty(5, 7), 2 * BATCH, generator(), shape=SHAPE)
    assert len(made) == BATCH
    one, two = straight.state_dict(), broken.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one if key != "age")


def test_given_embeddings_are_used_and_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "names.safetensors"
    images = []
    for seed in (0, 1):
        save_file({"embeddings": torch.randn(CLASSES, SIZE, generator=generator(seed))}, file)
        nayer = method(embeddings=str(file))
        made = nayer.synthesize(small_model(), BATCH, generator(), shape=SHAPE)
        images.append(made.images)
        assert made.note == "class embeddings: from names.safetensors"
        assert "network.module.table" not in nayer.state_dict()
    assert not torch.equal(*images)


def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "names.safetensors"
    with pytest.raises(ConfigError, match=r"names\.safetensors"):
        method(embeddings=str(file))
    file.write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match="a safetensors file with a tensor 'embeddings'"):
        method(embeddings=str(file))
    save_file({"names": torch.zeros(CLASSES, SIZE)}, file)
    with pytest.raises(ConfigError, match="a safetensors file with a tensor 'embeddings'"):
        method(embeddings=str(file))
    save_file({"embeddings": torch.zeros(CLASSES, SIZE + 1)}, file)
    with pytest.raises(ConfigError, match=rf"\(classes, {SIZE}\); they are \({CLASSES}, {SIZE + 1}\)"):
        method(embeddings=str(file))
    save_file({"embeddings": torch.zeros(CLASSES + 1, SIZE)}, file)
    nayer = method(embeddings=str(file))
    with pytest.raises(ConfigError, match=f"a file with {CLASSES} rows, one a class; it has {CLASSES + 1}"):
        nayer.synthesize(small_model(), BATCH, generator(), shape=SHAPE)


def test_a_teacher_of_some_of_the_classes_has_their_embeddings(tmp_path: Path) -> None:
    """As in a stream, where classes arrive in another order; the same images as from a file of those rows."""
    rows, file = torch.randn(CLASSES + 2, SIZE, generator=generator(3)), tmp_path / "names.safetensors"
    chosen, made = [5, 0, 3, 1, 2, 4][:CLASSES], []
    for held in (rows, rows[chosen]):
        save_file({"embeddings": held}, file)
        nayer = method(embeddings=str(file))
        if len(held) > CLASSES:
            nayer.of(chosen, 1)
        made.append(nayer.synthesize(small_model(), BATCH, generator(), shape=SHAPE).images)
    assert torch.equal(*made)
    with pytest.raises(ConfigError, match=f"a file with a row for each class; it has {CLASSES}"):
        method(embeddings=str(file)).of([CLASSES], 1)


def test_learned_embeddings_are_of_whatever_classes_the_teacher_has() -> None:
    nayer = method()
    nayer.of([7, 9], 4)
    assert len(nayer.synthesize(small_model(), BATCH, generator(), shape=SHAPE)) == BATCH


def test_the_bank_remembers_what_is_noted() -> None:
    made = method().synthesize(small_model(), BATCH, generator(), shape=SHAPE)
    assert made.note == "class embeddings: learned"
    bank, other = Bank(20), Bank(1)
    for round in (1, 2):
        bank.add(made, Source("a model", "nayer", round, 0))
    assert bank.notes == ["class embeddings: learned"]
    state = bank.state_dict()
    other.load_state_dict(state)
    assert other.notes == bank.notes
    older = json.loads(bytes(state["note"].tolist()))
    del older["notes"]
    other.load_state_dict({**state, "note": torch.tensor(list(json.dumps(older).encode()), dtype=torch.uint8)})
    assert other.notes == []


@pytest.mark.parametrize(
    "change",
    [{"life": 0}, {"shared": 0}, {"embedding": 0}, {"momentum": -0.1}, {"batch_size": 1}],
    ids=lambda change: next(iter(change)),
)
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        method(**change)
