"""What holds for every method: found by walking ``configs/synthesis``, so that a new method is tested by having a yaml."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sim.config import call
from sim.federation import methods_of
from sim.local import run_local
from strategies import Method
from tests.makers import CLASSES, SHAPE, small_ensemble, small_model
from tests.sim.tiny import METHODS, overrides, tiny

COUNT = 20

pytestmark = pytest.mark.parametrize("name", METHODS)


def synthesizer(name: str):
    """A fresh one, shrunk."""
    return methods_of(tiny(Path("unused"), methods=[name]))[name].synthesizer


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mine(name: str, seed: int = 0, **parts):
    return synthesizer(name).synthesize(
        parts.get("teacher") or small_ensemble(), COUNT, generator(seed), shape=SHAPE, student=parts.get("student", small_model(7))
    )


@pytest.mark.parametrize("batch_norm", [True, False])
def test_impressions_have_their_shapes_and_ranges(name: str, batch_norm: bool) -> None:
    for teacher in (small_model(batch_norm=batch_norm), small_ensemble(batch_norm=batch_norm)):
        made = mine(name, teacher=teacher)
        assert made.images.shape == (COUNT, *SHAPE) and made.images.dtype == torch.float32
        assert made.targets.shape == (COUNT, CLASSES) and made.labels.shape == (COUNT,)
        assert float(made.images.min()) >= 0 and float(made.images.max()) <= 1 and float(made.images.std()) > 0
        torch.testing.assert_close(made.targets.sum(1), torch.ones(COUNT))
        assert set(made.labels.tolist()) <= set(range(CLASSES)) and made.teacher_passes >= COUNT
        assert not made.images.requires_grad and not made.targets.requires_grad


def test_same_seed_same_images_and_another_seed_others(name: str) -> None:
    one, two, other = mine(name, 0), mine(name, 0), mine(name, 1)
    assert torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets) and torch.equal(one.labels, two.labels)
    assert not torch.equal(one.images, other.images)


def test_the_global_random_state_neither_matters_nor_moves(name: str) -> None:
    torch.rand(3)
    before = torch.get_rng_state()
    one = mine(name)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(one.images, mine(name).images)


@pytest.mark.parametrize("training", [True, False])
def test_teacher_and_student_are_left_as_they_were_found(name: str, training: bool) -> None:
    teacher, student = small_model(0).train(training), small_model(7).train(not training)
    next(teacher.parameters()).requires_grad_(False)
    before = [picture(model) for model in (teacher, student)]
    mine(name, teacher=teacher, student=student)
    assert [picture(model) for model in (teacher, student)] == before


def picture(model: torch.nn.Module) -> list:
    """Everything about a module that a method might leave changed."""
    return [
        [hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for t in (*model.parameters(), *model.buffers())],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    ]


def test_state_goes_out_and_in(name: str) -> None:
    teacher, student = small_ensemble(), small_model(7)
    straight, source = synthesizer(name), generator(0)
    for _ in range(2):
        expected = straight.synthesize(teacher, COUNT, source, shape=SHAPE, student=student)
    before, after, source = synthesizer(name), synthesizer(name), generator(0)
    before.synthesize(teacher, COUNT, source, shape=SHAPE, student=student)
    state = copy.deepcopy(before.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    after.load_state_dict(state)
    assert torch.equal(after.synthesize(teacher, COUNT, source, shape=SHAPE, student=student).images, expected.images)


def test_progress_reaches_its_end_and_the_student_may_be_missing(name: str) -> None:
    ticks: list[tuple[int, int]] = []
    synthesizer(name).synthesize(
        small_model(), COUNT, generator(0), shape=SHAPE, progress=lambda stage, done, total, **info: ticks.append((done, total))
    )
    assert ticks[-1][0] == ticks[-1][1] == len(ticks)


def test_a_yaml_holds_every_setting_and_no_default_stands_in_code(name: str) -> None:
    """Leaving out any one key is an error."""
    node = tiny(Path("unused"), methods=[name]).synthesis[name]
    for key in node["synthesizer"]:
        lacking = {"mining": node["mining"], "synthesizer": {k: v for k, v in node["synthesizer"].items() if k != key}}
        with pytest.raises(Exception, match=key):
            call(Method, lacking, "synthesis")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the students' weights."""
    files = sorted(folder.glob("student-*.safetensors"))
    return {f.name: hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(load_file(f).items()))).hexdigest() for f in files}


def test_a_resumed_run_equals_the_straight_one(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_local(tiny(folder, "rounds=2", methods=[name]))
    straight = hashes(folder)
    assert straight != {}
    # Forget the second round and everything it wrote, as a kill after the first would have.
    (folder / "state/round-00002.safetensors").unlink()
    for file in straight:
        (folder / file).unlink()
    run_local(tiny(folder, "rounds=2", f"resume='{folder}'", methods=[name]))
    assert hashes(folder) == straight


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two rounds with all methods and batch norm, through ``flwr run`` and in process: starting Flower takes far longer than they do."""
    from sim.flower import run_experiment

    folder, asked = tmp_path_factory.mktemp("both_ways"), ("rounds=2", "model=lenet5_batch_norm")
    through_flower = tiny(folder / "flower", *asked, "runtime=flower")
    assert run_experiment(through_flower, [*overrides(*asked), "runtime=flower", f"output='{folder / 'flower'}'"]) == 0
    run_local(tiny(folder / "local", *asked))
    return folder / "flower", folder / "local"


@pytest.mark.ray
@pytest.mark.slow
def test_two_rounds_through_flwr_run_end_in_the_weights_of_the_run_in_process(name: str, both_ways: tuple[Path, Path]) -> None:
    one, two = (hashes(folder)[f"student-by-{name}.safetensors"] for folder in both_ways)
    assert one == two
