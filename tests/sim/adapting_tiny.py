"""Domain adaptation in a second: scikit-learn's digits in three domains, each of them a client, one of them without labels."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from sim.config import CONFIGS, Settings, composed
from tests.sim.tiny import overrides

WAYS = sorted(path.stem for path in (CONFIGS / "adaptation").glob("*.yaml"))
DOMAINS = "{plain:{change:none},negative:{change:invert},mixed:{change:blend,cells:3}}"
SHIFTED = f"+dataset.sources.shifted={{of:{{source:embedded,dataset:digits,test:0.2}},domains:{DOMAINS}}}"


@functools.lru_cache
def adapting_overrides(*more: str, ways: tuple[str, ...] = tuple(WAYS), methods: tuple[str, ...] = ("di",)) -> list[str]:
    """Sources plain and mixed, target negative; every method shrunk, and faster than its yaml has it, so that something happens."""
    found = composed([f"adaptation=[{','.join(ways)}]"]).adaptation
    small = [f"adaptation.{way}.{key}={value}" for way in ways for key, value in (("steps", 3), ("batch_size", 8)) if key in found[way]]
    base = ["strategy=adapting", "partition=by_domain", "model.options.batch_norm=true", "rounds=3", "evaluate_clients=false"]
    data = ["dataset.source=shifted", SHIFTED, "strategy.targets=[negative]", "strategy.survey_batch=64"]
    return overrides(f"adaptation=[{','.join(ways)}]", *base, *data, *small, *more, methods=list(methods))


@functools.lru_cache
def _composed(*more: str, ways: tuple[str, ...], methods: tuple[str, ...]) -> Settings:
    return composed(adapting_overrides(*more, ways=ways, methods=methods))


def adapting(
    folder: Path, *more: str, ways: tuple[str, ...] = tuple(WAYS), methods: tuple[str, ...] = ("di",), resume: Path | None = None
) -> Settings:
    """These settings with a result folder."""
    settings = _composed(*more, ways=ways, methods=methods)
    return replace(settings, output=str(folder), resume=None if resume is None else str(resume))
