"""Models back from disk: of both kinds, in any floating type, and never one that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedimpr.errors import ConfigError, FedimprError
from sim.config import composed
from sim.federation import check, initial_weights
from sim.results import RunFolder
from sim.weights import read_model, weights_hash
from tests.makers import CLASSES, SHAPE, small_ensemble, small_model
from tests.sim.tiny import tiny


def rewritten(path: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The file with its tensors changed and its description kept."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, to, metadata)
    return to


def halve(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})


def test_a_run_starts_from_the_weights_of_a_file(tmp_path: Path) -> None:
    """The global model is the student of an earlier run; a file that does not fit is refused before anything is written."""
    settings = tiny(tmp_path / "run", methods=["di"])
    other = initial_weights(replace(settings, seed=1))
    save_file(other, tmp_path / "mine.safetensors")
    start = replace(settings, initial_weights=str(tmp_path / "mine.safetensors"))
    check(start)
    assert weights_hash(initial_weights(start)) == weights_hash(other) != weights_hash(initial_weights(settings))
    another = composed(["model=cnn_dropout", f"initial_weights={tmp_path / 'mine.safetensors'}"])
    with pytest.raises(ConfigError, match="'initial_weights'.*weights of cnn_dropout"):
        check(another)


def student_file(folder: Path) -> Path:
    """A student as a run writes it."""
    model = small_model(7)
    return RunFolder(folder, start=0.0).weights("student-by-cmi", model.state_dict(), {"model": model.spec, "round": 1})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    path = tmp_path / "ensemble.safetensors"
    small_ensemble(2).save(path)
    return path


def test_models_of_both_kinds_come_back_as_they_were(teacher: Path, tmp_path: Path) -> None:
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    for path, original in ((teacher, small_ensemble(2)), (student_file(tmp_path / "run"), small_model(7))):
        model, classes = read_model(path, "teacher", SHAPE)
        assert classes == CLASSES and not model.training and torch.equal(model(images), original(images))


def test_half_precision_on_disk_is_computed_in_float32(teacher: Path, tmp_path: Path) -> None:
    for number, path in enumerate((teacher, student_file(tmp_path / "run"))):
        half = rewritten(path, tmp_path / f"{number}.safetensors", halve)
        model, _ = read_model(half, "teacher", SHAPE)
        written, held = load_file(half), model.state_dict()
        assert {tensor.dtype for tensor in written.values()} == {torch.float16, torch.int64}
        assert {tensor.dtype for tensor in held.values()} == {torch.float32, torch.int64}
        assert all(torch.equal(held[name], tensor.to(held[name].dtype)) for name, tensor in written.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(teacher: Path, tmp_path: Path, value: float) -> None:
    name = sorted(load_file(teacher))[5]
    broken = rewritten(teacher, tmp_path / "broken.safetensors", lambda tensors: tensors[name].view(-1)[0].fill_(value))
    with pytest.raises(FedimprError, match=f"^loading the teacher: tensor {name} of .*broken.safetensors is not finite"):
        read_model(broken, "teacher", SHAPE)


def test_files_that_hold_no_fitting_model_are_refused(teacher: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("not a model")
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.zeros(1)}, bare)
    torn = rewritten(student_file(tmp_path / "run"), tmp_path / "torn.safetensors", lambda tensors: tensors.popitem())
    for path, reason in (
        (tmp_path / "none.safetensors", "there is none"),
        (text, "header"),
        (bare, "it does not say what model it holds"),
        (torn, "its weights do not fit its own description: .*Missing key"),
    ):
        with pytest.raises(ConfigError, match=f"'teacher' is '{path}'; allowed: a file with a model.*{reason}") as caught:
            read_model(path, "teacher", SHAPE)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"'dataset.shape' is \[1, 16, 16\]; allowed: \[1, 8, 8\], the images that teacher="):
        read_model(teacher, "teacher", (1, 16, 16))
