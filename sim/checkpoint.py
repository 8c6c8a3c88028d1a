"""State after each round, on disk: a run that was stopped goes on where it was and ends in the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedimpr.errors import ConfigError, FedimprError
from sim.config import Settings
from strategies.rounds import Resumable


def save(settings: Settings, strategy: Resumable, round: int, weights: dict[str, Tensor]) -> None:
    """Write global weights and the strategy's state after a round; the file appears whole or not at all, and replaces the one of the
    round before.
    """
    folder = settings.folder / "state"
    path = folder / f"round-{round:05d}.safetensors"
    tensors = {f"global/{name}": tensor for name, tensor in weights.items()} | {
        f"strategy/{k}": v for k, v in strategy.state_dict().items()
    }
    metadata = {"round": str(round), "config": settings.to_json(), "hash": settings.hash()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)
    except OSError as error:
        raise FedimprError(
            f"cannot write {path}: {error}", round=round, stage="saving the state", remedy="Free some space or choose another output."
        ) from error
    for old in sorted(folder.glob("round-*.safetensors"))[:-2]:
        old.unlink()


def newest(settings: Settings) -> tuple[int, dict[str, Tensor]]:
    """The last round with a whole state in ``settings.resume``, and that state; nothing is touched.

    Without ``resume`` it is round 0 without a state.

    Raises:
        ConfigError: the folder holds no state, its configuration differs (the differing keys are named), or no round is left to run.
    """
    if settings.resume is None:
        return 0, {}
    for path in sorted((Path(settings.resume) / "state").glob("round-*.safetensors"), reverse=True):
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata()
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        except (SafetensorError, OSError):
            continue  # half written or damaged: the one before is whole
        if metadata["hash"] != settings.hash():
            difference = _difference(metadata["config"], settings.to_json())
            raise ConfigError("resume", settings.resume, f"a run of the same configuration; this one differs in {difference}")
        if int(metadata["round"]) >= settings.rounds:
            raise ConfigError("resume", settings.resume, f"a run with rounds left; all {settings.rounds} of this one are done")
        return int(metadata["round"]), state
    raise ConfigError("resume", settings.resume, "a result folder with a finished round (state/round-*.safetensors)")


def _difference(before: str, now: str) -> str:
    old, new = _flat(json.loads(before)), _flat(json.loads(now))
    skip = ("output", "resume", "runtime")
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key.split(".")[0] not in skip)
    return "; ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in keys)


def _flat(tree: object, path: str = "") -> dict[str, object]:
    if isinstance(tree, dict):
        return {key: value for name, part in tree.items() for key, value in _flat(part, f"{path}.{name}" if path else name).items()}
    return {path: tree}
