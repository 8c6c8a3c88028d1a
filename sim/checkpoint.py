"""The state of a run on disk: a run that was stopped, at whatever moment, goes on where it was and ends in the same weights.

In the folder ``state/`` of the results:

* ``round-00003.safetensors``: global weights and the strategy's state after round 3; the last two are kept.
* ``round-00004/``: the parts of a round that is not over, see :class:`strategies.keep.Keep`: the updates of its clients, in one file or,
  where they are many, the weights in one file each, and one file a student, finished or not. It goes when the round is over.
* ``clients/``: what clients keep from turn to turn, see :mod:`sim.client_states`.
* ``lock``: held by the process that is at work.

A file appears whole or not at all. One that is damaged all the same is passed over: without its state a student begins anew, from the
updates; without the updates the round does; and without the state of a round the one before it is the last.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedimpr.errors import ConfigError, FedimprError
from sim.config import DECIDE_NOTHING, Settings, flat
from sim.federation import rounds_of
from sim.locks import locked
from strategies.keep import answered
from strategies.rounds import Resumable

log = logging.getLogger(__name__)

KEPT = 2  # states of rounds: a damaged last one must not cost the whole run


class States:
    """The files of one run's state; a :class:`strategies.keep.Keep`.

    Args:
        results: the result folder.
        save_seconds: how old the state of a part may become.
    """

    def __init__(self, results: Path, save_seconds: float) -> None:
        self.results, self.folder, self.save_seconds = results, results / "state", save_seconds
        self.saved = time.monotonic()

    def newest(self) -> tuple[int, dict[str, Tensor]]:
        """The last round with a whole state, and that state; round 0 without one."""
        for path in sorted(self.folder.glob("round-*.safetensors"), reverse=True):
            if state := _read(path):
                return _number(path), state
        return 0, {}

    def after_round(self, round: int, weights: Mapping[str, Tensor], strategy: Resumable) -> None:
        """Keep the global weights and the strategy's state after a round; its parts go, and so does all before the round before it.

        Raises:
            FedimprError: a file cannot be written.
        """
        tensors = {f"global/{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"strategy/{name}": tensor for name, tensor in strategy.state_dict().items()}
        self._write(self.folder / f"round-{round:05d}.safetensors", tensors, round, "saving the state")
        for old in sorted(self.folder.glob("round-*.safetensors"))[:-KEPT]:
            old.unlink()
        self.forget_parts(but=round + 1)

    def forget_parts(self, but: int) -> None:
        """Remove the parts of all rounds but one, and those of this one, too, if it has no whole updates, which all others rest on."""
        for folder in self.folder.glob("round-*/"):
            if _number(folder) != but or not answered(self, but):
                shutil.rmtree(folder)

    def holds(self, round: int, part: str) -> bool:
        """Whether the part is there, and whole."""
        try:
            with safe_open(str(self._part(round, part)), framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False

    def load(self, round: int, part: str) -> Mapping[str, Tensor]:
        """What was saved last of the part; empty where there is nothing, or nothing whole."""
        return _read(self._part(round, part))

    def mapped(self, round: int, part: str) -> Mapping[str, Tensor]:
        """As :meth:`load`, but tensors are pages of the file; they stay readable when it is replaced or removed."""
        _give_back()
        return _read(self._part(round, part), apart=False)

    def due(self) -> bool:
        """Whether what was saved last, of any part, is ``save_seconds`` old."""
        return time.monotonic() - self.saved >= self.save_seconds

    def save(self, round: int, part: str, state: Mapping[str, Tensor]) -> None:
        """Replace what was saved of the part.

        Raises:
            FedimprError: the file cannot be written; what was saved before is still there.
        """
        self._write(self._part(round, part), state, round, f"saving the state ({part})")

    def journal(self, round: int, part: str) -> Path:
        """Where a worker that is at the part writes how far it is; it goes with the parts."""
        return self._part(round, part).with_suffix(".jsonl")

    def _part(self, round: int, part: str) -> Path:
        return self.folder / f"round-{round:05d}" / f"{part.replace(' ', '-')}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], round: int, stage: str) -> None:
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(_apart(tensors), partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # of a full disk safetensors makes an error of its own
            with suppress(OSError):
                partial.unlink()
            reason = getattr(error, "strerror", None) or str(error)
            remedy = f"Free some space, then go on with resume={self.results}: what was saved before is whole."
            raise FedimprError(f"cannot write {path}: {reason}", round=round, stage=stage, remedy=remedy) from error
        self.saved = time.monotonic()


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[States, int, dict[str, Tensor]]]:
    """Own the result folder for the length of a block: its states, the last finished round (0 without one), and the state after it.

    Where another folder is resumed, its states are copied first. What cannot be resumed stays as it is.

    Raises:
        ConfigError: another process is at work in one of the folders, or the one to resume holds no run, one of another configuration
            (the differing keys are named), or one that is finished.
    """
    states = States(settings.folder, settings.save_seconds)
    source = None if settings.resume is None else States(Path(settings.resume), settings.save_seconds)
    with ExitStack() as stack:
        if source is not None:
            _check_resumable(source, settings)
            stack.enter_context(locked(source.folder / "lock", "resume", source.results, "run"))
        if source is None or source.results.resolve() != settings.folder.resolve():
            stack.enter_context(locked(states.folder / "lock", "output", settings.folder, "run"))
            _begin(states, source)
        done, state = states.newest()
        states.forget_parts(but=done + 1)
        yield states, done, state


def _check_resumable(source: States, settings: Settings) -> None:
    folder = str(source.results)
    run, before = (_parsed(source.results / name) for name in ("run.json", "config.yaml"))
    if not run:
        raise ConfigError("resume", folder, "the result folder of a run; this one has no readable run.json")
    now = json.loads(settings.to_json())  # also stands for a config.yaml that the run did not live to write
    old, new = ({key: value for key, value in tree.items() if key not in DECIDE_NOTHING} for tree in (before or now, now))
    if json.dumps(old) != json.dumps(new):
        difference = _difference(old, new) or "the order of its keys"
        raise ConfigError("resume", folder, f"a run of the same configuration; this one differs in {difference}")
    if run.get("status") == "finished" and source.newest()[0] >= rounds_of(settings):
        raise ConfigError("resume", folder, f"a run with rounds left; all {rounds_of(settings)} of this one are done")


def _parsed(path: Path) -> dict[str, object]:
    """The mapping in a JSON or YAML file; empty where it is missing or damaged."""
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _difference(before: object, now: object) -> str:
    old, new = flat(before), flat(now)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return "; ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in keys)


def _begin(states: States, source: States | None) -> None:
    """Clear what an earlier run left, and copy the states to go on from."""
    try:
        for path in states.folder.glob("round-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if (clients := states.folder / "clients").exists():
            shutil.rmtree(clients)
        if source is not None:
            shutil.copytree(source.folder, states.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))
    except OSError as error:
        remedy = "Free some space, or choose another folder with output=<folder>."
        raise FedimprError(f"cannot fill {states.folder}: {error}", stage="saving the state", remedy=remedy) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, and each with memory of its own, as safetensors wants them; copied only where they are not."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if address in taken else plain
        taken.add(address)
    return apart


def _give_back() -> None:
    """Return what was freed to the system. glibc keeps the holes that one model leaves and fills them badly, so they grow with each."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def _read(path: Path, *, apart: bool = True) -> dict[str, Tensor]:
    """The tensors of a file, ``apart`` from it or mapped into memory; none where it is missing or damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            return {name: tensor.clone() for name, tensor in mapped.items()} if apart else mapped
    except FileNotFoundError:
        return {}
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged and passed over: %s", path, error)
        return {}
