"""States on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedimpr.states import write


def test_a_state_is_written_as_safetensors_reads_it_whatever_its_tensors_lie_in(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "counts": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
        "convolution": torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 2, generator=generator, dtype=torch.float64).T,
        "half": torch.randn(3, generator=generator).bfloat16(),
        "none": torch.zeros(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    write(tmp_path / "it.safetensors", state, {"kind": "seven tensors"})
    back = load_file(tmp_path / "it.safetensors")
    assert {name: tensor.dtype for name, tensor in back.items()} == {name: tensor.dtype for name, tensor in state.items()}
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    with safe_open(tmp_path / "it.safetensors", framework="pt") as file:
        assert file.metadata() == {"kind": "seven tensors"}
