"""Embeddings of the names of classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedimpr.embeddings import of_outputs, read_embeddings
from fedimpr.errors import ConfigError

NAMES = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])


def test_each_output_has_the_row_of_its_class() -> None:
    assert of_outputs(NAMES, (2, 0), 1).tolist() == [[9, 10, 11, 12], [1, 2, 3, 4]]


def test_a_class_in_another_turn_has_the_same_numbers_moved_on_by_a_quarter() -> None:
    assert of_outputs(NAMES, (1,), 4).tolist() == [[5, 6, 7, 8], [8, 5, 6, 7], [7, 8, 5, 6], [6, 7, 8, 5]]
    upright, *others = of_outputs(NAMES, (0, 1), 4).unflatten(0, (2, 4)).unbind(1)
    for rows in others:
        assert rows[0] @ rows[1] == upright[0] @ upright[1]  # what two names have in common stays


def test_a_file_is_read_or_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "names.safetensors"
    save_file({"embeddings": NAMES.half()}, file)
    assert torch.equal(read_embeddings(str(file)), NAMES)
    for wrong, said in ((torch.zeros(3), r"\(3,\)"), (NAMES / 0, r"\(3, 4\)")):
        save_file({"embeddings": wrong}, file)
        with pytest.raises(ConfigError, match=f"'embeddings' is '.*names.safetensors'; allowed: .*they are {said}"):
            read_embeddings(str(file))
    file.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="a safetensors file with a tensor 'embeddings'"):
        read_embeddings(str(file))
