"""Configuration: composed by Hydra, checked before anything starts, and turned into objects.

A node with ``_target_`` becomes a call of that class or function. Its signature is the schema: an unknown key, a missing one or a value
of another type is one line that names the dotted key, the value and what is allowed; what the class itself refuses gets the key's full
path.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import itertools
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fedimpr.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# The keys at the top that decide no result: where a run is written, run, kept and resumed from.
DECIDE_NOTHING = ("output", "resume", "runtime", "evaluate_clients", "evaluate_every", "save_seconds", "tracking")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys at the top of the configuration; groups are kept as plain mappings until they are built.

    Attributes:
        name: of the experiment; names the result folder.
        seed: of the run.
        clients: how many.
        client_threads: that a client's turn computes with, >= 1; they decide its weights to the last bit.
        clients_per_node: how many neighbouring partitions a node of the federation hosts; the last may host fewer.
        cohort: how many of them take part in a round, drawn anew each time; nothing means all.
        devices: kinds of devices that the clients have, see :mod:`strategies.devices`; nothing means that nobody knows how fast they are.
        deadline: seconds on the virtual clock after which a client's turn is given up, > 0; nothing means never.
        minimum: images that every client has at least.
        rounds: federated rounds.
        send_label_counts: whether clients consent to send how many images of each class they hold.
        output: the result folder; nothing means ``results/<name>/<time>`` (see :func:`placed`).
        resume: a result folder to go on from, or nothing.
        evaluate_clients: whether every client's model is evaluated, for the row "mean client".
        evaluate_every: global models are evaluated, and their weights written, after every so many rounds and after the last one.
        save_seconds: how old the state of a long server stage may become, >= 0, before it is saved again.
        tracking: libraries that are told every line of the metrics, see :mod:`sim.tracking`.
        device: ``cpu``, ``cuda`` or ``auto``.
        compile: whether the server's mining and distilling is compiled, see :func:`fedimpr.observation.compiled`.
        dataset: what :func:`fedimpr.data.load` takes, beside what models need to know of it.
        partition: a recipe.
        model: name and options of the global model.
        initial_weights: a file of weights that the global model starts from, see :func:`fedimpr.models.load_pretrained`; nothing means the
            seed's.
        client_models: models dealt to the partitions in turn; nothing means the global one for all.
        training: local training.
        synthesis: methods by name.
        distillation: how students learn.
        adaptation: ways to learn on images without labels, by name; for a strategy that adapts.
        faults: by client, what is wrong with its training images, see :mod:`fedimpr.data.faults`; an axis of experiments.
        strategy: a strategy.
        tasks: how the data set arrives, see :mod:`fedimpr.continual.course`; nothing: all of it is there from the start.
        runtime: the runner and its resources.
    """

    name: str
    seed: int
    clients: int
    client_threads: int
    clients_per_node: int
    cohort: int | None
    devices: Mapping[str, Any] | None
    deadline: float | None
    minimum: int
    rounds: int
    send_label_counts: bool
    output: str | None
    resume: str | None
    evaluate_clients: bool
    evaluate_every: int
    save_seconds: float
    tracking: tuple[Literal["tensorboard", "mlflow"], ...]
    device: Literal["auto", "cpu", "cuda"]
    compile: bool
    dataset: Mapping[str, Any]
    partition: Mapping[str, Any]
    model: Mapping[str, Any]
    initial_weights: str | None
    client_models: Sequence[Mapping[str, Any]] | None
    training: Mapping[str, Any]
    synthesis: Mapping[str, Any]
    distillation: Mapping[str, Any]
    adaptation: Mapping[str, Any]
    faults: Mapping[Any, Any]
    strategy: Mapping[str, Any]
    tasks: Mapping[str, Any] | None
    runtime: Mapping[str, Any]

    def __post_init__(self) -> None:
        for key in ("clients", "client_threads", "clients_per_node", "minimum", "rounds", "evaluate_every"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
        if self.cohort is not None and not 1 <= self.cohort <= self.clients:
            raise ConfigError("cohort", self.cohort, f"null or an integer in [1, clients = {self.clients}]")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigError("deadline", self.deadline, "null or a number > 0")
        if self.deadline is not None and self.devices is None:
            raise ConfigError("deadline", self.deadline, "null without devices: a virtual clock needs some, e.g. devices=phones")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "an integer >= 0")
        if not self.save_seconds >= 0:
            raise ConfigError("save_seconds", self.save_seconds, "a number >= 0")
        if self.client_models is not None and not self.client_models:
            raise ConfigError("client_models", [], "null, or a list of one model or more")
        if self.tasks is not None and self.rounds != 1:
            raise ConfigError("rounds", self.rounds, "1 with tasks: their rounds are tasks.rounds, of each task")
        if self.tasks is not None and self.client_models:
            raise ConfigError("client_models", len(self.client_models), "null with tasks: there is no average of unlike models")
        if (self.tasks is not None) != (self.strategy.get("_target_") == "strategies.Continual"):
            raise ConfigError("tasks", self.tasks and "some", "set with strategy=continual, and null with every other one")
        if self.client_models and self.rounds > 1:
            raise ConfigError("rounds", self.rounds, "1, where clients have models of their own (client_models)")

    @property
    def nodes(self) -> int:
        """How many nodes host the clients."""
        return -(-self.clients // self.clients_per_node)

    @property
    def folder(self) -> Path:
        """The result folder."""
        return Path(self.output or "results")

    def to_json(self) -> str:
        """The settings as JSON in the order of the configuration, which decides whose student leads; :func:`from_json` reads them."""
        return json.dumps({key: getattr(self, key) for key in self.__dataclass_fields__})

    def hash(self) -> str:
        """SHA-256 over all that decides a result: everything but :data:`DECIDE_NOTHING`."""
        tree = json.loads(self.to_json())
        for key in DECIDE_NOTHING:
            del tree[key]
        return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def quoted(text: str) -> str:
    """A text as a value on Hydra's command line, where a backslash means itself, but before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def flat(tree: object, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted key; lists are leaves."""
    if isinstance(tree, Mapping):
        return {key: value for name, part in tree.items() for key, value in flat(part, f"{path}.{name}" if path else str(name)).items()}
    return {path: tree}


def from_json(text: str) -> Settings:
    """Settings from what :meth:`Settings.to_json` gave, checked."""
    return from_tree(json.loads(text))


def from_tree(tree: Mapping[str, Any]) -> Settings:
    """Settings from a composed and resolved configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of a wrong type or out of range.
    """
    synthesis = tree.get("synthesis") or {}  # Hydra leaves nothing where no method is chosen
    if isinstance(synthesis, Mapping):  # an experiment may set numbers of methods that were then not chosen: those nodes have no class
        tree = {**tree, "synthesis": {name: node for name, node in synthesis.items() if "_target_" in (node.get("synthesizer") or ())}}
    if isinstance(adaptation := tree.get("adaptation"), Mapping):
        tree = {**tree, "adaptation": {name: node for name, node in adaptation.items() if "_target_" in (node or ())}}
    settings: Settings = call(Settings, tree, "")
    return settings


def composed(overrides: Sequence[str]) -> Settings:
    """Compose ``configs/config.yaml`` with Hydra overrides such as ``["experiment=demo", "seed=1"]``, outside of a Hydra main."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    return from_tree(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]


def placed(settings: Settings) -> Settings:
    """Settings with a result folder in which no run stands yet, unless it is the one to resume.

    Raises:
        ConfigError: the folder that was asked for holds a run.
    """
    if settings.output is None and settings.resume is not None:
        return replace(settings, output=str(Path(settings.resume).absolute()))
    if settings.output is None:
        base = Path.cwd() / "results" / settings.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        free = (base.with_name(base.name + (f"_{n}" if n else "")) for n in itertools.count())
        return replace(settings, output=str(next(folder for folder in free if not folder.exists())))
    if settings.resume is None and (settings.folder / "run.json").exists():
        raise ConfigError(
            "output", settings.output, "a folder without a run; in a sweep let it differ, e.g. output='results/${seed}'; or resume=<it>"
        )
    return settings


def construct(node: Mapping[str, Any], path: str, **given: Any) -> Any:
    """Build what a node with ``_target_`` describes.

    Args:
        node: the mapping; nested nodes with ``_target_`` are built first.
        path: its dotted key.
        **given: arguments that do not come from the configuration.

    Raises:
        ConfigError: as :func:`from_tree`.
    """
    target = node.get("_target_")
    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_", target, "the dotted name of a class or function")
    module, _, name = target.rpartition(".")
    try:
        callee = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}._target_", target, f"the dotted name of a class or function ({error})") from None
    return call(callee, {key: value for key, value in node.items() if key != "_target_"}, path, **given)


def call(callee: Any, values: Mapping[str, Any], path: str, **given: Any) -> Any:
    """Call ``callee`` with values checked against its signature; see :func:`construct`."""
    prefix = f"{path}." if path else ""
    parameters = inspect.signature(callee).parameters
    hints = get_type_hints(callee.__init__ if inspect.isclass(callee) else callee)
    for key in values:
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, 1)
            raise ConfigError(
                f"{prefix}{key}",
                values[key],
                f"one of {', '.join(p for p in parameters if p not in given)}" + (f"; did you mean {near[0]}?" if near else ""),
            )
    for key, parameter in parameters.items():
        if key not in values and key not in given and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise ConfigError(f"{prefix}{key}", None, f"a value ({_named(hints[key])}); it is missing")
    built = {key: _converted(value, hints[key], f"{prefix}{key}") for key, value in values.items()}
    try:
        return callee(**built, **given)
    except ConfigError as error:
        if not path or error.key.startswith(prefix) or "." in error.key or error.key not in values:
            raise  # it has its full key, or is about another one
        raise ConfigError(f"{prefix}{error.key}", error.value, error.allowed) from None


def _converted(value: Any, hint: Any, key: str) -> Any:
    """The value as the annotated type, or a ConfigError; YAML's lists become tuples where tuples are asked for."""
    origin, arguments = get_origin(hint), get_args(hint)
    wrong = ConfigError(key, value, _named(hint))
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for argument in arguments:
            try:
                return _converted(value, argument, key)
            except ConfigError:
                continue
        raise wrong
    if origin is Literal:
        if value not in arguments:
            raise wrong
        return value
    container = origin if inspect.isclass(origin) else hint
    if isinstance(value, Mapping) and inspect.isclass(container) and container not in (Mapping, dict):
        return construct(value, key)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise wrong
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(_converted(item, kind, f"{key}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise wrong
        return value
    if container is Any or not inspect.isclass(container):
        return value
    if not isinstance(value, container) or (isinstance(value, str) and container is not str):
        raise wrong
    return value


def _named(hint: Any) -> str:
    """A type in plain words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each {_named(arguments[0])}"
        return f"a list of {len(arguments)}: " + ", ".join(_named(argument) for argument in arguments)
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    if inspect.isclass(origin) and issubclass(origin, Mapping) or hint is dict:
        return "a mapping"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return "a list"
    return f"a {getattr(hint, '__name__', hint)} (a mapping with _target_)"


def in_one_line(error: Exception, arguments: Sequence[str], config: str) -> str:
    """What Hydra says of a wrong command line in several lines: the key, the value and what is allowed."""
    text = str(error)
    options = getattr(error, "options", None)
    if options is not None:
        group, _, choice = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
        return str(ConfigError(group or "config", choice, "one of " + ", ".join(sorted(options))))
    if found := re.search(r"Could not load '([^']+)/([^'/]+)'", text):  # a choice within a list of choices
        choices = sorted(path.stem for path in (CONFIGS / found[1]).glob("*.yaml"))
        return str(ConfigError(found[1], found[2], "one of " + ", ".join(choices)))
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found[1]
        value = next((a.partition("=")[2] for a in arguments if a.lstrip("+~").partition("=")[0] == key), None)
        near = difflib.get_close_matches(key, _keys(config), 3, cutoff=0.5)
        return str(
            ConfigError(key, value, "a key of the configuration" + (f"; did you mean {' or '.join(near)}?" if near else " (see --cfg job)"))
        )
    return " ".join(text.split())


def _keys(config: str) -> list[str]:
    """Every dotted key of the configuration without overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        tree = OmegaConf.to_container(compose(config), resolve=False)
    keys: list[str] = []
    waiting: list[tuple[str, Any]] = [("", tree)]
    for path, node in waiting:
        if isinstance(node, dict):
            waiting += [(f"{path}.{key}" if path else str(key), part) for key, part in node.items()]
        if path:
            keys.append(path)
    return keys
