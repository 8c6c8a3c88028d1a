"""From settings to the parts of a federation; client and server build theirs from the same settings."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedimpr import models, seeds
from fedimpr.continual.course import Course, plan_course
from fedimpr.costs import TrainingCost, training_cost
from fedimpr.data import Dataset, Images, load
from fedimpr.data.faults import Fault
from fedimpr.data.partition import Partition, deal
from fedimpr.devices import placed
from fedimpr.errors import ConfigError
from fedimpr.observation import compiled
from fedimpr.states import size_of
from sim import tracking
from sim.config import Settings, call, construct
from sim.domains import domains_of
from strategies import Federation, Method, Nobody, Watch
from strategies.crew import Alone, Crew
from strategies.devices import Device, Fleet, Load, dealt
from strategies.keep import Keep, Nowhere
from strategies.rounds import Resumable

# What a data set's yaml says for models and views; the rest is for the loader.
FOR_MODELS = ("mean", "std", "flip")


def dataset_of(settings: Settings) -> Dataset:
    """The data set, read once per process."""
    return _dataset(_for_loader(settings))


def partition_of(settings: Settings) -> Partition:
    """Who holds which training images, dealt once per process; with tasks, over all of them."""
    if (course := course_of(settings)) is not None:
        shards = [torch.cat([shard.indices[client] for shard in course.shards]) for client in range(settings.clients)]
        return Partition(tuple(shards), course.manifest)
    keys = ("partition", "clients", "minimum", "seed")
    return _partition(json.dumps({"data": _for_loader(settings), **{key: getattr(settings, key) for key in keys}}))


def shard_of(settings: Settings, partition: int) -> Images:
    """The images that a partition trains on, with its fault if it has one."""
    held = dataset_of(settings).train.subset(partition_of(settings).indices[partition])
    fault = faults_of(settings).get(partition)
    return held if fault is None else fault(held, seeds.generator(settings.seed, "fault", 0, partition))


def faults_of(settings: Settings) -> dict[int, Fault]:
    """What is wrong with whose images, by partition."""
    found: dict[int, Fault] = {}
    for key, node in settings.faults.items():
        partition = int(key) if str(key).isdecimal() else -1
        if not 0 <= partition < settings.clients:
            raise ConfigError("faults", key, f"a client's number in [0, {settings.clients})")
        found[partition] = construct(node, f"faults.{key}")
    return found


def _for_loader(settings: Settings) -> str:
    return json.dumps({key: value for key, value in settings.dataset.items() if key not in FOR_MODELS})


@functools.lru_cache(maxsize=1)
def _dataset(text: str) -> Dataset:
    dataset: Dataset = call(load, json.loads(text), "dataset")
    return dataset


@functools.lru_cache(maxsize=1)
def _partition(text: str) -> Partition:
    tree = json.loads(text)
    recipe = construct(tree["partition"], "partition")
    data = _dataset(tree.pop("data"))
    return deal(recipe, data.train, clients=tree["clients"], minimum=tree["minimum"], seed=tree["seed"], dataset=data.name)


def course_of(settings: Settings) -> Course | None:
    """Which client works on which images when, planned once per process; ``None`` without tasks."""
    if settings.tasks is None:
        return None
    keys = ("partition", "clients", "minimum", "seed", "tasks")
    return _course(json.dumps({"data": _for_loader(settings), **{key: getattr(settings, key) for key in keys}}))


@functools.lru_cache(maxsize=1)
def _course(text: str) -> Course:
    tree = json.loads(text)
    recipe, given = construct(tree["partition"], "partition"), {key: tree[key] for key in ("clients", "minimum", "seed")}
    try:
        course: Course = call(plan_course, tree["tasks"], "tasks", data=_dataset(tree["data"]), recipe=recipe, **given)
    except ConfigError as error:  # it says which node it is of, and not where that stands
        key = error.key.removeprefix("partition.") if error.key.removeprefix("partition.") in given else error.key
        raise ConfigError(f"tasks.{key}" if key.startswith("scenario.") else key, error.value, error.allowed) from None
    return course


def rounds_of(settings: Settings) -> int:
    """How many rounds the run has."""
    course = course_of(settings)
    return settings.rounds if course is None else course.total


def initial_weights(settings: Settings) -> dict[str, Tensor]:
    """The weights that a run begins with, random or a file's; with tasks, those of a model that knows the classes of the first."""
    course = course_of(settings)
    model = models.build(**_architecture(settings, None, None if course is None else course.classes(0)))
    if settings.initial_weights is not None:
        models.load_pretrained(model, Path(settings.initial_weights).expanduser(), "initial_weights")
    return model.state_dict()


def build_model(settings: Settings, partition: int | None, classes: int | None = None) -> nn.Module:
    """A fresh model of a partition's architecture; ``None`` asks for the global one. All start from the seed's weights.

    It has an output for each class of the data set, or for as many ``classes`` as are asked for.
    """
    return models.build(**_architecture(settings, partition, classes))


def warm_model(settings: Settings, partition: int | None, weights: Mapping[str, Tensor], classes: int | None = None) -> nn.Module:
    """The model that :func:`build_model` builds, with these weights and placed on the device, but built only once per process.

    It is in training mode and without gradients, as a fresh one.
    """
    model = _warm(json.dumps(_architecture(settings, partition, classes)), device_of(settings)).train()
    model.zero_grad(set_to_none=True)
    state = model.state_dict()
    torch._foreach_copy_(list(state.values()), [weights[name] for name in state])
    return model


def reference_of(settings: Settings, partition: int | None, classes: int | None = None) -> Mapping[str, Tensor]:
    """A state dict of the model that :func:`build_model` builds, built once per process."""
    return _reference(json.dumps(_architecture(settings, partition, classes)))


@functools.lru_cache(maxsize=16)
def _reference(text: str) -> Mapping[str, Tensor]:
    return models.build(**json.loads(text)).state_dict()


@functools.lru_cache(maxsize=1)
def _warm(text: str, device: torch.device) -> nn.Module:
    return placed(models.build(**json.loads(text)), device)


def _architecture(settings: Settings, partition: int | None, classes: int | None = None) -> dict[str, Any]:
    """The arguments of :func:`fedimpr.models.build`."""
    node, path = settings.model, "model"
    if partition is not None and settings.client_models:
        place = partition % len(settings.client_models)
        node, path = settings.client_models[place], f"client_models[{place}]"
    for key in ("name", "options"):
        if key not in node:
            raise ConfigError(f"{path}.{key}", None, "a value; it is missing")
    data = settings.dataset
    given = {"shape": tuple(data["shape"]), "classes": classes or data["classes"], "mean": data["mean"], "std": data["std"]}
    return {"name": node["name"], **given, "seed": seeds.derive(settings.seed, "model"), **node["options"]}


def methods_of(settings: Settings) -> dict[str, Method]:
    """The synthesis methods by name."""
    return {name: call(Method, node, f"synthesis.{name}") for name, node in settings.synthesis.items()}


def strategy_of(settings: Settings, watch: Watch, keep: Keep | None = None, crew: Crew | None = None) -> Resumable:
    """The strategy; those that mine get the methods and the distillation. Without ``keep`` a round that is stopped begins anew, and without
    ``crew`` the server works alone.
    """
    federation = Federation(
        clients=settings.clients,
        clients_per_node=settings.clients_per_node,
        cohort=settings.cohort,
        seed=settings.seed,
        settings=settings.to_json(),
        build=functools.partial(build_model, settings),
        reference=functools.partial(reference_of, settings),
        shape=tuple(settings.dataset["shape"]),
        device=device_of(settings),
        compile=settings.compile,
        watch=watch,
        keep=Nowhere() if keep is None else keep,
        crew=Alone() if crew is None else crew,
        fleet=fleet_of(settings),
    )
    given: dict[str, Any] = {"federation": federation}
    if settings.strategy.get("_target_") == "strategies.DataFree":
        given |= {"methods": methods_of(settings), "distillation": construct(settings.distillation, "distillation")}
    if settings.strategy.get("_target_") == "strategies.Continual":
        learning = construct(settings.distillation, "distillation")
        given |= {"course": course_of(settings), "methods": methods_of(settings), "distillation": learning}
    if settings.strategy.get("_target_") == "strategies.Adapting":
        ways = {name: construct(node, f"adaptation.{name}") for name, node in settings.adaptation.items()}
        domains = domains_of(dataset_of(settings).train, partition_of(settings))
        given |= {"methods": methods_of(settings), "adaptations": ways, "domains": domains, "rounds": settings.rounds}
    strategy: Resumable = construct(settings.strategy, "strategy", **given)
    return strategy


def fleet_of(settings: Settings) -> Fleet | None:
    """The clients' devices, and what a turn asks of each.

    Raises:
        ConfigError: a number is out of range, or no device has the memory.
    """
    if settings.devices is None:
        return None
    nodes = settings.devices.get("kinds")
    if not isinstance(nodes, Mapping) or not nodes:
        raise ConfigError("devices.kinds", nodes, "a mapping of one kind or more, e.g. that of devices=phones")
    for name, node in nodes.items():
        if not isinstance(node, Mapping):
            raise ConfigError(f"devices.kinds.{name}", node, "a mapping, e.g. one of those of devices=phones")
    kinds = [call(Device, node, f"devices.kinds.{name}", name=name) for name, node in nodes.items()]
    training = construct(settings.training, "training")
    loads = []
    for partition, indices in enumerate(partition_of(settings).indices):
        cost = _cost(json.dumps(_architecture(settings, partition)), max(2, training.batch_size))
        counts = 8 * int(settings.dataset["classes"]) if settings.send_label_counts else 0
        down, up = (size_of(reference_of(settings, which)) for which in (None, partition))
        loads.append(Load(macs=cost.macs * training.epochs * len(indices), memory=cost.memory, down=down, up=up + counts))
    fleet: Fleet = call(
        Fleet,
        {key: value for key, value in settings.devices.items() if key != "kinds"},
        "devices",
        devices=dealt(kinds, settings.clients, settings.seed),
        loads=loads,
        deadline=settings.deadline,
        seed=settings.seed,
    )
    if not any(map(fleet.able, range(settings.clients))):
        most, least = max(device.memory_mb for device in fleet.devices), min(load.memory for load in loads)
        raise ConfigError("devices.kinds", f"memory_mb <= {most:g}", f"a kind with {least / 1e6:.4g} MB or more, which training takes")
    return fleet


@functools.lru_cache(maxsize=16)
def _cost(text: str, batch_size: int) -> TrainingCost:
    architecture = json.loads(text)
    return training_cost(models.build(**architecture), tuple(architecture["shape"]), batch_size)


def device_of(settings: Settings) -> torch.device:
    """The device that ``device`` names; ``auto`` is the first GPU, or the CPU without one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "cpu or auto on a machine without a CUDA device")
    name = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check(settings: Settings) -> None:
    """Build everything that a run would, so that nothing can be found wrong after it started.

    Raises:
        FedimprError: the first thing that is wrong.
    """
    if settings.evaluate_clients and settings.strategy.get("partial_sums"):
        raise ConfigError("evaluate_clients", True, "false with strategy.partial_sums=true: nobody sees a client's model then")
    training = construct(settings.training, "training")
    if settings.tasks is not None and settings.faults:
        raise ConfigError("faults", sorted(settings.faults), "none with tasks")
    if settings.tasks is not None and getattr(training, "momentum_kept", False):
        raise ConfigError("training.momentum_kept", True, "false with tasks: the head grows, and what was kept of it does not")
    for partition in (None, *range(len(settings.client_models or ()))):
        build_model(settings, partition)
        if _architecture(settings, partition).get("turned") and settings.tasks is None:
            raise ConfigError("model.options.turned", True, "false without tasks: nothing else teaches a model what turned images are")
    if settings.initial_weights is not None and settings.resume is None:  # a run that goes on has weights of its own
        initial_weights(settings)
    with compiled(settings.compile):
        pass  # there is a compiler
    tracking.check(settings.tracking)
    strategy_of(settings, Nobody())  # built and thrown away
    for partition in faults_of(settings):
        shard_of(settings, partition)
    partition_of(settings)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads inside the block: results depend on it, so it is a setting and not the machine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
