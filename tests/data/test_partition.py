"""How a training set is dealt to clients."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedimpr.data import Images
from fedimpr.data import partition as recipes
from fedimpr.data.partition import ByDomain, DirichletPerClass, DirichletPerClient, Iid, Partition, Quantity, Recipe, Shards, deal
from fedimpr.errors import ConfigError, PartitionError

CONFIGS = Path(__file__).parents[2] / "configs" / "partition"


def labelled(count: int, classes: int = 10, domains: int = 4) -> Images:
    """Images without content, with labels and domains in a fixed disorder."""
    rng = np.random.default_rng(count)
    labels = torch.from_numpy(rng.permutation(np.arange(count) % classes))
    places = torch.from_numpy(rng.permutation(np.arange(count) % domains))
    pixels = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    return Images(pixels, labels, tuple(map(str, range(classes))), places, tuple("abcd"[:domains]))


def dealt(recipe: Recipe, images: Images, clients: int, minimum: int = 1, seed: int = 0) -> Partition:
    return deal(recipe, images, clients=clients, minimum=minimum, seed=seed, dataset="toy")


def classes_per_client(partition: Partition) -> float:
    return float((np.array(partition.manifest["counts"]) > 0).sum(1).mean())


# --- Properties of every recipe ---

ALL: dict[str, Callable[[float], Recipe]] = {
    "iid": lambda alpha: Iid(),
    "dirichlet_per_class": lambda alpha: DirichletPerClass(alpha=alpha),
    "dirichlet_per_client": lambda alpha: DirichletPerClient(alpha=alpha),
    "shards": lambda alpha: Shards(per_client=2),
    "quantity": lambda alpha: Quantity(alpha=alpha),
    "by_domain": lambda alpha: ByDomain(),
}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=12)
@given(
    alpha=st.floats(1e-3, 1e3), clients=st.integers(1, 12), minimum=st.integers(1, 5), count=st.integers(1, 200), seed=st.integers(0, 2**62)
)
def test_disjoint_in_range_minimum_kept_and_repeatable(name: str, alpha: float, clients: int, minimum: int, count: int, seed: int) -> None:
    assume(clients * max(minimum, 2) <= count)
    images = labelled(count)
    try:
        first, again = (dealt(ALL[name](alpha), images, clients, minimum, seed) for _ in range(2))
    except PartitionError as error:
        assert name in str(error) and name not in ("iid", "dirichlet_per_client")
        return
    together = torch.cat(first.indices).tolist()
    assert len(first.indices) == clients
    assert len(set(together)) == len(together) and set(together) <= set(range(count))
    assert min(len(indices) for indices in first.indices) >= minimum
    assert first.manifest == again.manifest
    if name != "shards":  # which leaves the remainder of a division out
        assert len(together) == count


@pytest.mark.parametrize("name", ALL)
def test_manifest_says_what_was_dealt(name: str) -> None:
    recipe, images = ALL[name](0.5), labelled(400)
    partition = dealt(recipe, images, 6, 2, seed=3)
    manifest = json.loads(json.dumps(partition.manifest))
    assert manifest == partition.manifest
    expected = {"dataset": "toy", "recipe": name, "parameters": vars(recipe), "seed": 3, "minimum": 2, "clients": 6}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["sizes"] == [len(indices) for indices in partition.indices]
    assert manifest["counts"] == [images.subset(indices).counts().tolist() for indices in partition.indices]
    digest = hashlib.sha256()  # little-endian 64-bit: size, then indices in ascending order, client after client
    for indices in partition.indices:
        digest.update(struct.pack(f"<{len(indices) + 1}q", len(indices), *sorted(indices.tolist())))
    assert manifest["sha256"] == digest.hexdigest()
    others = [dealt(recipe, images, 6, 2, seed).manifest["sha256"] for seed in (4, 5)]
    assert manifest["sha256"] not in others


VARIANTS = {"dirichlet_per_client_half": "dirichlet_per_client"}  # configs of a recipe with other parameters


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_deals_under_its_own_name(path: Path) -> None:
    recipe = instantiate(yaml.safe_load(path.read_text()))
    assert dealt(recipe, labelled(600), 5).manifest["recipe"] == VARIANTS.get(path.stem, path.stem)


def test_every_recipe_has_a_config() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(ALL) | set(VARIANTS)


# --- What each recipe means ---


def test_iid_sizes_differ_by_at_most_one_and_classes_are_mixed_even_if_sorted() -> None:
    images = labelled(1000)
    order = images.labels.argsort()
    partition = dealt(Iid(), images.subset(order), 7)
    assert sorted(partition.manifest["sizes"]) == [142, 143, 143, 143, 143, 143, 143]  # 1000 = 7 * 142 + 6
    assert classes_per_client(partition) == 10


@pytest.mark.parametrize("recipe", [DirichletPerClass, DirichletPerClient])
def test_a_smaller_alpha_leaves_clients_fewer_classes(recipe: Callable[..., Recipe]) -> None:
    images = labelled(5000)
    counts = (np.array(dealt(recipe(alpha=alpha), images, 10).manifest["counts"]) for alpha in (0.05, 100.0))
    few, many = ((rows.max(1) / rows.sum(1)).mean() for rows in counts)  # the share of a client's largest class
    # Far from 1 even so: all images are dealt, and clients that prefer the same class soon have to take others.
    assert few > 0.35 and many < 0.2


def test_dirichlet_per_class_divides_a_class_by_proportions_from_a_dirichlet() -> None:
    # The first class, before the balancing of sizes sets in: of ten clients a share ~ Dir(1) has the variance (1/10)(9/10)/11.
    rows = [dealt(DirichletPerClass(alpha=1.0), labelled(2000), 10, seed=seed).manifest["counts"] for seed in range(8)]
    shares = np.array(rows)[:, :, 0] / 200
    assert shares.std() == pytest.approx(np.sqrt(0.1 * 0.9 / 11), rel=0.25)


def test_dirichlet_per_client_deals_equal_sizes_in_the_proportions_of_each_client() -> None:
    # With many images a class never runs out before the end, so a client's share of a class ~ Dir(1) over ten classes.
    images = labelled(20_000)
    partition = dealt(DirichletPerClient(alpha=1.0), images, 50)
    assert set(partition.manifest["sizes"]) == {400}
    shares = np.array(partition.manifest["counts"]) / 400
    assert shares.mean() == pytest.approx(0.1)
    assert shares.std() == pytest.approx(np.sqrt(0.1 * 0.9 / 11), rel=0.2)


def test_dirichlet_per_client_goes_on_when_a_clients_classes_have_run_out() -> None:
    partition = dealt(DirichletPerClient(alpha=1e-3), labelled(1003), 10, minimum=100)
    assert sorted(partition.manifest["sizes"]) == [100] * 7 + [101] * 3


def test_shards_give_a_client_as_many_classes_as_shards_at_most() -> None:
    # 100 images a class and 20 shards of 50: no shard crosses a class.
    partition = dealt(Shards(per_client=2), labelled(1000), 10)
    assert partition.manifest["sizes"] == [100] * 10
    assert all(set(row) <= {0, 50, 100} for row in partition.manifest["counts"])


def test_quantity_skews_sizes_but_not_labels() -> None:
    partition = dealt(Quantity(alpha=0.5), labelled(20_000), 5, minimum=200)
    sizes = np.array(partition.manifest["sizes"])
    assert sizes.max() > 2 * sizes.min()
    assert np.abs(np.array(partition.manifest["counts"]) / sizes[:, None] - 0.1).max() < 0.1


@pytest.mark.parametrize(("clients", "owned"), [(1, [4]), (3, [2, 1, 1]), (4, [1] * 4), (7, [1] * 7)])
def test_by_domain_deals_whole_domains_or_even_parts_of_one(clients: int, owned: list[int]) -> None:
    images = labelled(800)
    assert images.domains is not None
    partition = dealt(ByDomain(), images, clients)
    domains = [images.domains[indices].unique() for indices in partition.indices]
    assert [len(found) for found in domains] == owned
    if clients == 7:  # domains of 200; the first three are shared by two clients
        assert partition.manifest["sizes"] == [100, 100, 100, 200, 100, 100, 100]


# --- Limits ---


@pytest.mark.parametrize("clients", [0, -1, 21])
def test_clients_must_fit_the_images(clients: int) -> None:
    with pytest.raises(ConfigError, match=f"'clients' is {clients}; allowed: 1 to 20, as 100 images give 5 to each"):
        dealt(Iid(), labelled(100), clients, minimum=5)


def test_minimum_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="'minimum' is 0"):
        dealt(Iid(), labelled(100), 2, minimum=0)


@pytest.mark.parametrize("recipe", [DirichletPerClass, DirichletPerClient, Quantity])
@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(recipe: Callable[..., Recipe], alpha: float) -> None:
    with pytest.raises(ConfigError, match="'alpha'.*a number > 0"):
        recipe(alpha=alpha)


def test_shards_must_fit_the_images() -> None:
    with pytest.raises(ConfigError, match="'per_client' is 0"):
        Shards(per_client=0)
    with pytest.raises(ConfigError, match="'per_client' is 11; allowed: at most 10 for 10 clients and 100 images"):
        dealt(Shards(per_client=11), labelled(100), 10)


def test_data_without_domains_cannot_be_dealt_by_domain() -> None:
    images = labelled(20)
    plain = Images(images.pixels, images.labels, images.classes)
    with pytest.raises(PartitionError, match="no domains to deal by.*Choose another partition"):
        dealt(ByDomain(), plain, 2)


def test_a_recipe_that_deals_an_image_twice_is_caught() -> None:
    class Twice(recipes.Iid):
        def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> list[np.ndarray]:
            return [np.arange(5)] * clients

    with pytest.raises(PartitionError, match="twice dealt an image twice"):
        dealt(Twice(), labelled(20), 2)


@pytest.mark.parametrize("recipe", [DirichletPerClass(alpha=0.01), Quantity(alpha=0.01)])
def test_a_minimum_that_cannot_be_kept_is_an_error_within_seconds(recipe: Recipe) -> None:
    start = time.perf_counter()
    with pytest.raises(PartitionError, match="alpha 0.01: no draw gave each of 50 clients its minimum of 20 images. Raise alpha"):
        dealt(recipe, labelled(5000), 50, minimum=20)
    assert time.perf_counter() - start < 5


def test_60_000_images_are_dealt_to_100_clients_in_a_second_or_so() -> None:
    images = labelled(60_000)
    dealt(Iid(), labelled(10), 1)  # imports
    for recipe in (DirichletPerClass(alpha=0.5), DirichletPerClient(alpha=0.1), Shards(per_client=2), Iid()):
        start = time.process_time()
        dealt(recipe, images, 100, minimum=10)
        assert time.process_time() - start < 1.5
