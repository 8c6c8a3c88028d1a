"""What a study asks: axes, seeds and what to compare; and the runs that follow from it.

A study is a yaml of ``configs/study/``. Its axes are settings with several values each, as ``-m`` takes them on Hydra's command line; every
combination of them with every seed is a run, with a command of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedimpr.errors import ConfigError
from sim.config import CONFIGS, Settings, call, composed, in_one_line, quoted

LONGEST = 120  # letters of a folder's name


@dataclass(frozen=True)
class Point:
    """One run of a study.

    Attributes:
        values: by axis, as they are shown; the last one is the seed.
        overrides: the run's settings beside its result folder.
    """

    values: Mapping[str, str]
    overrides: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """Names the run's folder: its values, e.g. ``partition.alpha=0.1,seed=2``."""
        plain = ",".join(f"{key}={value}" for key, value in self.values.items())
        safe = re.sub(r"[^A-Za-z0-9=.,+_-]+", "_", plain)
        if safe == plain and len(safe) <= LONGEST:
            return safe
        return f"{safe[: LONGEST - 9]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"

    @property
    def command(self) -> str:
        """Runs it alone."""
        return f"python -m sim {shlex.join(self.overrides)}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The keys of ``configs/study.yaml``, which says what they mean.

    Attributes:
        axes: by name. Of an axis that is named like a setting the values are this setting's; any other has a mapping from what a value is
            called to the overrides that make it.
    """

    name: str
    question: str
    base: tuple[str, ...]
    axes: Mapping[str, Any]
    seeds: tuple[int, ...]
    compare: tuple[str, ...]
    baseline: str | None
    output: str | None
    workers: int | None
    per_gpu: int
    address: str | None
    minutes: float | None
    memory_mb: float | None
    retry: bool

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ConfigError("name", self.name, "letters, digits, _, - and . only: it names a folder")
        for name, values in {**self.axes, "seeds": self.seeds}.items():
            key = name if name == "seeds" else f"axes.{name}"
            if not isinstance(values, Mapping | list | tuple) or not values:
                raise ConfigError(key, values, "a list of one value or more" if name == "seeds" else "values, one or more")
            if isinstance(values, Mapping) and not all(isinstance(part, list | tuple) for part in values.values()):
                raise ConfigError(key, values, "a list of values, or for every value's name a list of overrides")
            told = [str(value) if isinstance(value, str) else text_of(value) for value in values]
            if twice := next((value for value in told if told.count(value) > 1), None):
                raise ConfigError(key, twice, "values that differ: this one is there twice")
        if "seed" in self.axes:
            raise ConfigError("axes.seed", self.axes["seed"], "under seeds")
        if self.compare and self.baseline is not None and self.baseline not in self.compare:
            raise ConfigError("baseline", self.baseline, f"one of compare: {', '.join(self.compare)}")
        for key in ("workers", "per_gpu", "minutes", "memory_mb"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(key, value, "null or a number > 0" if key != "per_gpu" else "an integer > 0")

    @property
    def folder(self) -> Path:
        """The study's result folder."""
        return Path(self.output or Path("results") / "studies" / self.name)

    def points(self) -> Iterator[Point]:
        """The runs: axes in their order, the last one varies fastest, seeds faster still."""
        axes = {name: list(_choices(name, values)) for name, values in {**self.axes, "seed": self.seeds}.items()}
        for chosen in itertools.product(*axes.values()):
            values = {name: label for name, (label, _) in zip(axes, chosen, strict=True)}
            yield Point(values, (*self.base, *(override for _, overrides in chosen for override in overrides)))

    def asked(self) -> dict[str, Any]:
        """What decides the runs and how they are shown, in what JSON knows."""
        keys = ("name", "question", "base", "axes", "seeds", "compare", "baseline")
        found: dict[str, Any] = json.loads(json.dumps({key: getattr(self, key) for key in keys}))
        return found


def study_of(arguments: Sequence[str]) -> Study:
    """The study of a command line: ``study=<name>``, ``study.<key>=<value>`` and, as ``-m`` takes them, settings of the runs.

    A setting with several values becomes an axis, or takes the place of the axis of its name; with one value it holds for all runs.
    ``~key`` takes back what the study says of it.

    Raises:
        ConfigError: there is no such study, or one of its keys is wrong.
    """
    if not any(argument.startswith("study=") for argument in arguments):
        raise ConfigError("study", None, f"one of {', '.join(sorted(path.stem for path in (CONFIGS / 'study').glob('*.yaml')))}")
    own = [argument.removeprefix("study.") for argument in arguments if re.match(r"study[.=]", argument)]
    for argument in own:
        if argument.partition("=")[0] in ("axes", "base"):
            raise ConfigError(
                f"study.{argument.partition('=')[0]}", argument.partition("=")[2], "settings themselves, e.g. partition.alpha=0.1,1"
            )
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            tree: Any = OmegaConf.to_container(compose("study", overrides=own), resolve=True)
        overrides = OverridesParser.create().parse_overrides([a for a in arguments if not re.match(r"study[.=]", a)])
    except (HydraException, OmegaConfBaseException) as error:
        raise _wrong(error, own, "study") from None
    study: Study = call(Study, tree, "")
    for override in overrides:
        study = _changed(study, override)
    return study


def _changed(study: Study, override: Override) -> Study:
    """The study with a setting from the command line, of one value or several."""
    key, line = override.get_key_element(), override.input_line or ""
    several = override.is_sweep_override()
    try:
        values = [str(value) for value in override.sweep_string_iterator()] if several else [line.partition("=")[2]]
    except HydraException as error:  # glob(*)
        raise ConfigError(key, line.partition("=")[2], f"values ({' '.join(str(error).split())})") from None
    if key == "seed":
        if not all(value.isdigit() for value in values):
            raise ConfigError("seed", line.partition("=")[2], "integers >= 0")
        return replace(study, seeds=tuple(map(int, values)))
    if isinstance(named := study.axes.get(key), Mapping):
        for value in values:
            if value not in named:
                raise ConfigError(key, value, f"one of {', '.join(named)}")
        return replace(study, axes={**study.axes, key: {value: named[value] for value in values}})
    if several or key in study.axes:
        return replace(study, axes={**study.axes, key: tuple(Raw(value) for value in values)})
    kept = tuple(part for part in study.base if part.lstrip("+~").partition("=")[0] != key.lstrip("+~"))
    if override.is_delete() and len(kept) < len(study.base):
        return replace(study, base=kept)
    return replace(study, base=(*kept, line))


class Raw(str):
    """A value as Hydra's command line takes it."""


def text_of(value: Any) -> str:
    """A value of a yaml as Hydra's command line takes it."""
    if isinstance(value, Raw):
        return str(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{text_of(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(text_of, value))}]"
    if isinstance(value, str):
        simple = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf")
        return value if simple else quoted(value)
    return str(value)


def _choices(name: str, values: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What each value of an axis is called, and the overrides that make it."""
    for value in values:
        if isinstance(values, Mapping):
            yield str(value), tuple(map(str, values[value]))
        else:
            yield text_of(value).strip("'"), (f"{name}={text_of(value)}",)


def checked(study: Study) -> Settings:
    """Compose every value of every axis once, beside the first ones of the others; the first run's settings.

    Not every combination, at a sixth of a second each: one that cannot be composed is a failed run of the study, with its cause.

    Raises:
        ConfigError: a setting does not exist or has a wrong value, or two values of an axis make the same run.
    """
    points = list(study.points())
    first = points[0]
    settings = _composed(first.overrides)
    for name in first.values:
        seen: dict[str, str] = {}
        others = {key: value for key, value in first.values.items() if key != name}
        for point in points:
            if {key: value for key, value in point.values.items() if key != name} == others:
                value = point.values[name]
                # Seeds may be a thousand, and a whole number is a seed.
                run = value.lstrip("0") if name == "seed" and value.isdigit() else _composed(point.overrides).hash()
                twin = seen.setdefault(run, value)
                if twin != value:
                    raise ConfigError(f"axes.{name}", value, f"values that make runs of their own: {twin} makes the same")
    return settings


def _composed(overrides: Sequence[str]) -> Settings:
    try:
        return composed(overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # the last of these where a group is to be null
        raise _wrong(error, overrides, "config") from None


def _wrong(error: Exception, arguments: Sequence[str], config: str) -> ConfigError:
    """Hydra's complaint as an error of ours."""
    told = in_one_line(error, arguments, config)
    if found := re.match(r"config key '(.+?)' is (.+?); allowed: (.+)", told):
        wrong = ConfigError(found[1], None, found[3])
        wrong.args = (told,)
        return wrong
    wrong = ConfigError("study" if config == "study" else "base", list(arguments), told)
    wrong.args = (told,)
    return wrong
