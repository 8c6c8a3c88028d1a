"""Domain adaptation from settings to parts: who is a target, what a client trains on, and what a target's turn is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.adaptation import Adaptation, Given, SourceImpressions, survey
from fedimpr.data import Images
from fedimpr.devices import placed
from fedimpr.errors import ConfigError
from fedimpr.states import under
from fedimpr.update import Update, weights_of
from sim.config import Settings, construct
from sim.domains import domains_of
from sim.federation import build_model, dataset_of, device_of, partition_of, shard_of, threads, warm_model
from strategies.adapting import SURVEY
from strategies.federation import loaded
from strategies.records import Instruction
from strategies.targets import targets_of


def evaluation_of(settings: Settings) -> tuple[Images, dict[str, Images]]:
    """What models are evaluated on, and the parts of it that are looked at by themselves.

    That is the test set; where there are targets, the test images of their domains, and each of these domains.

    Raises:
        ConfigError: a target's domain has no test image.
    """
    test = dataset_of(settings).test
    if settings.strategy.get("_target_") != "strategies.Adapting" or test.domains is None:
        return test, {}
    data, partition, asked = dataset_of(settings).train, partition_of(settings), settings.strategy
    assert data.domains is not None  # as the test set has some
    targets = targets_of(asked["targets"], asked["joins"], domains_of(data, partition), settings.clients)
    wanted = torch.cat([data.domains[partition.indices[client]] for client in targets]).unique()
    parts = {test.domain_names[domain]: test.subset((test.domains == domain).nonzero().flatten()) for domain in wanted.tolist()}
    if empty := [name for name, part in parts.items() if not len(part)]:
        raise ConfigError("strategy.targets", list(asked["targets"]), f"domains that have test images, and {empty[0]} has none")
    return test.subset(torch.isin(test.domains, wanted).nonzero().flatten()), parts


def turn(settings: Settings, partition: int, asked: Instruction) -> Update:
    """A target client's turn. Of its images it has the pixels; their labels stay where they are, but for an oracle.

    The number of threads is the settings': then clients give the same weights one after another as side by side.
    """
    start = time.perf_counter()
    with threads(settings.client_threads):
        held = shard_of(settings, partition)
        if asked.work == SURVEY:
            weights, metrics = _survey(settings, held.pixels, asked)
        else:
            adaptation: Adaptation = construct(settings.adaptation[asked.work], f"adaptation.{asked.work}")
            model = warm_model(settings, None, asked.weights)
            given = _given(settings, asked, held.labels if "labels" in adaptation.needs else None)
            generator = seeds.generator(settings.seed, f"adapting/{asked.work}", asked.round, partition)
            metrics = adaptation(model, held.pixels, given, generator)
            weights = weights_of(model)
    return Update(partition, asked.round, weights, len(held), {**metrics, "seconds": time.perf_counter() - start})


def _survey(settings: Settings, pixels: Tensor, asked: Instruction) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Batch-norm statistics of each source model, and what tells how useful it is."""
    found = survey(_sources(settings, asked.beside), pixels, batch_size=settings.strategy["survey_batch"])
    statistics = {f"{place}/{name}": tensor.cpu() for place, held in enumerate(found.statistics) for name, tensor in held.items()}
    metrics = {f"information/{place}": value for place, value in enumerate(found.information.tolist())}
    pairs = itertools.combinations(range(len(metrics)), 2)
    return statistics, metrics | {f"agreement/{one}/{two}": float(found.agreement[one, two]) for one, two in pairs}


def _given(settings: Settings, asked: Instruction, labels: Tensor | None) -> Given:
    held = under(asked.beside, "impressions/")
    return Given(
        weights=asked.beside.get("weights", torch.zeros(0)),
        impressions=SourceImpressions(**held) if held else None,
        sources=_sources(settings, asked.beside),
        labels=labels,
    )


def _sources(settings: Settings, beside: Mapping[str, Tensor]) -> list[nn.Module]:
    """The source models that came along."""
    held = under(beside, "sources/")
    count = len({name.partition("/")[0] for name in held})
    models = [loaded(build_model(settings, None), under(held, f"{place}/")) for place in range(count)]
    return [placed(model, device_of(settings)).requires_grad_(False) for model in models]
