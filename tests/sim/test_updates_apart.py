"""Past a bound a round's updates lie in files, one each, and the server's memory does not grow with the clients."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedimpr.devices import placed
from fedimpr.errors import ConfigError
from fedimpr.models import build
from sim.checkpoint import States
from sim.config import Settings
from sim.local import run_local
from strategies.federation import loaded
from strategies.keep import UPDATES, Nowhere, Received, answered, put_away, taken_out, weights_part
from tests.sim.test_flower import linux
from tests.sim.test_resume import Stopped, stopping
from tests.sim.tiny import assert_same, tiny

CPU = torch.device("cpu")


def network() -> torch.nn.Module:
    return build(name="lenet5", shape=(3, 8, 8), classes=4, mean=[0.5] * 3, std=[0.5] * 3, seed=1, batch_norm=True)


@functools.lru_cache
def base(*more: str) -> Settings:
    return tiny(Path("unused"), "save_seconds=0", *more, methods=["di"])


def apart(folder: Path, *, resume: bool = False) -> Settings:
    settings = base("strategy.updates_in_memory_mb=0")
    return replace(settings, output=str(folder), resume=str(folder) if resume else None)


@contextmanager
def files_seen(states: Path) -> Iterator[set[str]]:
    """The names of all files of parts that are written inside the block."""
    write, seen = States._write, set[str]()

    def noting(self: States, path: Path, *rest: object) -> None:
        seen.add(str(path.relative_to(states)))
        write(self, path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(States, "_write", noting)
        yield seen


# --- the weights of one client ---


def test_what_is_put_away_is_the_same_tensors_and_lies_in_a_file(tmp_path: Path) -> None:
    states, weights = States(tmp_path, 0.0), network().state_dict()
    away = put_away(states, 2, 5, weights)
    assert (tmp_path / "state/round-00002/weights-5.safetensors").is_file()
    for found in (away, taken_out(states, 2, 5)):
        assert found.keys() == weights.keys() and all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@linux
def test_a_model_of_what_was_put_away_is_pages_of_the_file_and_stays_so_when_it_is_placed(tmp_path: Path) -> None:
    states, weights = States(tmp_path, 0.0), network().state_dict()
    model = placed(loaded(network(), put_away(states, 1, 0, weights), shared=True), CPU)
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if "weights-0" in line and " rw-p " in line]
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    elsewhere = [name for name, tensor in model.state_dict().items() if not first <= tensor.data_ptr() < last]
    assert elsewhere == []
    convolutions = [tensor for tensor in model.state_dict().values() if tensor.dim() == 4]
    assert convolutions and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in convolutions)
    shutil.rmtree(tmp_path / "state")  # as when the round is over
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_who_keeps_nothing_holds_copies_in_memory() -> None:
    weights = {"w": torch.ones(2, 1, 3, 3)}
    away = put_away(Nowhere(), 1, 0, weights)
    weights["w"].zero_()  # whoever sent it may take its memory back
    assert torch.equal(away["w"], torch.ones(2, 1, 3, 3))


def test_a_round_is_answered_only_with_the_weights_of_all(tmp_path: Path) -> None:
    states = States(tmp_path, 0.0)
    facts = [{"partition": partition, "round": 1, "examples": 3, "metrics": {}} for partition in (0, 2)]
    received = Received.from_state_dict(
        {**Received([], [], 1.0, {}, True).state_dict(), "note": _note(facts)}, apart=lambda partition: {"w": torch.zeros(1)}
    )
    put_away(states, 1, 0, {"w": torch.zeros(1)})
    states.save(1, UPDATES, received.state_dict())
    assert not answered(states, 1)
    put_away(states, 1, 2, {"w": torch.zeros(1)})
    assert answered(states, 1) and not answered(states, 2)
    path = states._part(1, weights_part(0))
    path.write_bytes(path.read_bytes()[:-1])
    assert not answered(states, 1)


def _note(facts: list[dict]) -> torch.Tensor:
    from fedimpr.states import to_note

    return to_note({"updates": facts, "apart": True, "excluded": [], "seconds": 1.0, "sent": []})


# --- runs ---


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    with files_seen(folder / "state") as seen:
        run_local(apart(folder))
    assert {f"round-00001/weights-{partition}.safetensors" for partition in range(3)} <= seen
    return folder


def test_a_run_below_the_bound_has_the_same_models_and_no_such_files(tmp_path: Path, straight: Path) -> None:
    """The student's last bits may differ: apart, members compute in turn, and so few pixels are otherwise computed in one batch."""
    with files_seen(tmp_path / "state") as seen:
        run_local(replace(base(), output=str(tmp_path)))
    assert not any("weights" in name for name in seen)
    for name in ("uniform-ensemble", "one-shot-fedavg"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path, straight))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# Savings: three updates, what was answered, two portions, four steps and the end of the student.
@pytest.mark.parametrize("savings", [2, 4, 6])
def test_stopped_while_updates_come_or_later_it_goes_on_to_the_same_weights(tmp_path: Path, straight: Path, savings: int) -> None:
    with stopping(savings), pytest.raises(Stopped):
        run_local(apart(tmp_path))
    run_local(apart(tmp_path, resume=True))
    assert_same(tmp_path, straight)


def test_a_half_written_update_is_not_taken(tmp_path: Path, straight: Path) -> None:
    with stopping(6), pytest.raises(Stopped):
        run_local(apart(tmp_path))
    path = tmp_path / "state/round-00001/weights-1.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run_local(apart(tmp_path, resume=True))
    assert_same(tmp_path, straight)


def test_a_bound_below_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'strategy.updates_in_memory_mb' is -1.0; allowed: a number >= 0"):
        run_local(replace(base("strategy.updates_in_memory_mb=-1"), output=str(tmp_path)))
