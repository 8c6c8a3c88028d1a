"""Dealing a training set to clients.

A recipe draws a partition; :func:`deal` checks it and writes its manifest. Recipes of the same alpha differ between papers and move results
by tens of points, so the manifest names the recipe.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from bisect import bisect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedimpr import seeds
from fedimpr.data.images import Images
from fedimpr.errors import ConfigError, PartitionError

ATTEMPTS = 5  # at a draw that gives every client the minimum; one of flwr-datasets' attempts is 11 draws

Dealt = list[NDArray[np.int64]]


class Recipe(Protocol):
    """A frozen dataclass whose fields are the recipe's parameters."""

    def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> Dealt:
        """For each client the indices of its images: at least ``minimum``, as far as another draw can help it.

        Raises:
            PartitionError: no draw gave every client its minimum, or the recipe needs what the images lack.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Every client gets as many images as the others, to within one, drawn at random."""

    def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> Dealt:
        """As :class:`Recipe`."""
        from flwr_datasets.partitioner import IidPartitioner

        # It cuts the table as it stands, so the table is shuffled first.
        return _by_flower(IidPartitioner(clients), images, np.random.default_rng(seed).permutation(len(images)), clients)


@dataclass(frozen=True, kw_only=True)
class DirichletPerClass:
    """Each class is divided among the clients in proportions ~ Dir(alpha); sizes differ.

    The label skew of NIID-Bench (Li et al., ICDE 2022), used by DENSE: a client that has its fair share already gets none of the classes
    that follow.

    Attributes:
        alpha: concentration, > 0; the smaller, the fewer classes a client has.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)

    def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> Dealt:
        """As :class:`Recipe`."""
        from flwr_datasets.partitioner import DirichletPartitioner

        settings: dict[str, Any] = {"alpha": float(self.alpha), "min_partition_size": minimum, "self_balancing": True, "shuffle": False}
        order = np.random.default_rng(seed).permutation(len(images))
        for attempt in range(ATTEMPTS):
            partitioner = DirichletPartitioner(clients, "label", **settings, seed=seeds.derive(seed, "attempt", attempt))
            # A ValueError: no draw was good. A FloatingPointError: all proportions of a class were rounded to zero.
            with suppress(ValueError, FloatingPointError):
                return _by_flower(partitioner, images, order, clients)
        raise _short(self, clients, minimum)


@dataclass(frozen=True, kw_only=True)
class DirichletPerClient:
    """Clients of equal size, to within one, each with class proportions ~ Dir(alpha) of its own.

    The recipe of FedDyn (Acar et al., ICLR 2021), used by Co-Boosting: clients take turns in random order, and each draws an image of a
    class by its proportions. A class that has run out is drawn no more; a client whose classes have all run out takes from what is left.

    Attributes:
        alpha: concentration, > 0; the smaller, the fewer classes a client has.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)

    def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> Dealt:
        """As :class:`Recipe`."""
        # Not flwr-datasets' InnerDirichletPartitioner (0.6.1): it fails with "Probabilities contain NaN" once a client's classes have all
        # run out, at alpha 0.01 in three seeds of four, and takes 1.2 to 1.8 s for 60,000 images.
        rng = np.random.default_rng(seed)
        labels, classes = images.labels.numpy(), len(images.classes)
        proportions = rng.dirichlet(np.full(classes, self.alpha), clients)
        left = [rng.permutation(np.flatnonzero(labels == k)).tolist() for k in range(classes)]
        turns = rng.permutation(np.arange(len(labels)) % clients).tolist()
        draws = rng.random(len(labels)).tolist()
        shards: list[list[int]] = [[] for _ in range(clients)]
        ladders = _ladders(proportions, left)
        for client, draw in zip(turns, draws, strict=True):
            ladder = ladders[client]
            k = bisect(ladder, draw * ladder[-1])
            shards[client].append(left[k].pop())
            if not left[k]:
                ladders = _ladders(proportions, left)
        return [np.array(shard, np.int64) for shard in shards]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Images sorted by class are cut into equal shards, and each client gets some at random (McMahan et al., AISTATS 2017).

    What the division leaves over is dealt to nobody.

    Attributes:
        per_client: how many shards a client gets, >= 1.
    """

    per_client: int

    def __post_init__(self) -> None:
        if self.per_client < 1:
            raise ConfigError("per_client", self.per_client, "a whole number >= 1")

    def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> Dealt:
        """As :class:`Recipe`."""
        from flwr_datasets.partitioner import ShardPartitioner

        if clients * self.per_client > len(images):
            raise ConfigError(
                "per_client", self.per_client, f"at most {len(images) // clients} for {clients} clients and {len(images)} images"
            )
        order = np.random.default_rng(seed).permutation(len(images))
        partitioner = ShardPartitioner(clients, "label", num_shards_per_partition=self.per_client, shuffle=False, seed=seed)
        return _by_flower(partitioner, images, order, clients)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Client sizes ~ Dir(alpha), labels drawn at random: the quantity skew of NIID-Bench (Li et al., ICDE 2022).

    Attributes:
        alpha: concentration, > 0; the smaller, the more unequal the sizes.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)

    def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> Dealt:
        """As :class:`Recipe`."""
        rng = np.random.default_rng(seed)
        for _ in range(11 * ATTEMPTS):
            cuts = np.rint(np.cumsum(rng.dirichlet(np.full(clients, self.alpha)))[:-1] * len(images)).astype(np.int64)
            if np.diff(cuts, prepend=0, append=len(images)).min() >= minimum:
                return np.split(rng.permutation(len(images)), cuts)
        raise _short(self, clients, minimum)


@dataclass(frozen=True, kw_only=True)
class ByDomain:
    """Clients get whole domains in turn; where there are more clients than domains, the clients of a domain share it evenly."""

    def __call__(self, images: Images, *, clients: int, minimum: int, seed: int) -> Dealt:
        """As :class:`Recipe`."""
        if images.domains is None:
            raise PartitionError("the data set has no domains to deal by", remedy="Choose another partition, or a data set such as pacs.")
        rng = np.random.default_rng(seed)
        members = [np.flatnonzero(images.domains.numpy() == domain) for domain in np.unique(images.domains.numpy())]
        if clients <= len(members):
            return [np.concatenate(members[client::clients]) for client in range(clients)]
        shards: Dealt = [np.empty(0, np.int64)] * clients
        for first, indices in enumerate(members):
            owners = range(first, clients, len(members))
            for owner, shard in zip(owners, np.array_split(rng.permutation(indices), len(owners)), strict=True):
                shards[owner] = shard
        return shards


@dataclass(frozen=True, eq=False)
class Partition:
    """Which images each client has.

    Attributes:
        indices: for each client the indices of its images, int64, ascending.
        manifest: JSON-able: what was dealt how (``dataset, recipe, parameters, seed, minimum, clients``) and what came of it: ``sizes``
            (clients), ``counts`` (clients x classes) and ``sha256`` over all sizes and indices.
    """

    indices: tuple[Tensor, ...]
    manifest: dict[str, Any]


def deal(recipe: Recipe, images: Images, *, clients: int, minimum: int, seed: int, dataset: str) -> Partition:
    """Deal images to clients; the same arguments give the same manifest.

    Args:
        recipe: how to draw.
        images: the training set.
        clients: how many, >= 1.
        minimum: of images that each client must have, >= 1.
        seed: of the partition.
        dataset: the name for the manifest.

    Raises:
        ConfigError: there are too many clients for the images, or a parameter is out of range.
        PartitionError: the recipe leaves a client short, or needs what the data set lacks.
    """
    if minimum < 1:
        raise ConfigError("minimum", minimum, "a whole number >= 1")
    if not 1 <= clients <= len(images) // minimum:
        raise ConfigError("clients", clients, f"1 to {len(images) // minimum}, as {len(images)} images give {minimum} to each")
    shards = recipe(images, clients=clients, minimum=minimum, seed=seeds.derive(seed, "partition"))
    if min(len(shard) for shard in shards) < minimum:
        raise _short(recipe, clients, minimum)
    indices = tuple(torch.from_numpy(np.sort(shard).astype(np.int64)) for shard in shards)
    together = np.concatenate(shards)
    if len(np.unique(together)) != len(together) or together.min() < 0 or together.max() >= len(images):
        raise PartitionError(f"{_name(recipe)} dealt an image twice or one that is not there")
    digest = hashlib.sha256()
    for shard in indices:
        digest.update(len(shard).to_bytes(8, "little") + shard.numpy().astype("<i8").tobytes())
    manifest = {
        **{"dataset": dataset, "recipe": _name(recipe), "parameters": dict(vars(recipe))},
        **{"seed": seed, "minimum": minimum, "clients": clients},
        "sizes": [len(shard) for shard in indices],
        "counts": [torch.bincount(images.labels[shard], minlength=len(images.classes)).tolist() for shard in indices],
        "sha256": digest.hexdigest(),
    }
    return Partition(indices, manifest)


def _by_flower(partitioner: Any, images: Images, order: NDArray[np.int64], clients: int) -> Dealt:
    """Let a partitioner of flwr-datasets cut a table of labels and indices in the given order; no images pass through it."""
    import datasets

    class Table(datasets.Dataset):  # type: ignore[misc]
        """A column is read at once: partitioners would go through it row by row, which takes most of their time."""

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            return found[:] if isinstance(key, str) else found

    table = Table.from_dict({"label": images.labels.numpy()[order], "index": order})
    with warnings.catch_warnings(), np.errstate(invalid="raise", divide="raise"):
        warnings.simplefilter("ignore")  # of remainders and redraws, which deal() looks after
        partitioner.dataset = table
        return [np.asarray(partitioner.load_partition(client)["index"][:], np.int64) for client in range(clients)]


def _ladders(proportions: NDArray[np.float64], left: list[list[int]]) -> list[list[float]]:
    """Cumulative proportions of each client over the classes that are not exhausted."""
    weights = proportions * [bool(pool) for pool in left]
    weights[~(weights.sum(1) > 0)] = [len(pool) for pool in left]
    ladders: list[list[float]] = weights.cumsum(1).tolist()
    return ladders


def _check_positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(key, value, "a number > 0")


def _short(recipe: Recipe, clients: int, minimum: int) -> PartitionError:
    parameters = "".join(f", {key} {value}" for key, value in vars(recipe).items())
    return PartitionError(
        f"no draw gave each of {clients} clients its minimum of {minimum} images",
        stage=f"dealing by {_name(recipe)}{parameters}",
        remedy="Raise alpha if there is one, lower the minimum, deal to fewer clients, or try another seed.",
    )


def _name(recipe: Recipe) -> str:
    """``dirichlet_per_class`` of ``DirichletPerClass``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(recipe).__name__).lower()
