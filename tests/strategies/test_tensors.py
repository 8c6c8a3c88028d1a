"""Tensors in Flower's records: what comes out is what Flower's own arrays hold, whichever way they went."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from strategies.tensors import TensorArray, from_arrays, to_arrays

WEIGHTS = {
    "w": torch.arange(6.0).view(2, 3),
    "scalar": torch.tensor(7),
    "doubles": torch.ones(2, dtype=torch.float64),
    "none": torch.zeros(0, 3),
}


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor] = WEIGHTS) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) and got[k].dtype == wanted[k].dtype for k in wanted)


def test_in_a_process_nothing_is_copied() -> None:
    got = from_arrays(to_arrays(WEIGHTS))
    assert same(got) and all(got[name].data_ptr() == WEIGHTS[name].data_ptr() for name in WEIGHTS)


@given(hnp.arrays(hnp.floating_dtypes(endianness="=", sizes=(32, 64)), hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)))
def test_it_is_the_array_that_flower_would_make(values) -> None:
    tensor = torch.from_numpy(values)
    ours, flowers = TensorArray(tensor), Array(values)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (flowers.dtype, flowers.shape, flowers.stype, flowers.data)
    assert ours.deflate() == flowers.deflate() and ours.object_id == flowers.object_id


def test_flowers_own_reading_gets_a_copy() -> None:
    """An app that trains in place what it was sent must not change the server's weights."""
    weights = {"w": torch.zeros(3)}
    to_arrays(weights).to_torch_state_dict()["w"].add_(1)
    assert weights["w"].tolist() == [0, 0, 0]


def test_what_flower_wrote_can_be_read() -> None:
    assert same(from_arrays(ArrayRecord({name: Array(tensor) for name, tensor in WEIGHTS.items()})))


@given(
    hnp.arrays(hnp.floating_dtypes(endianness="=", sizes=(32, 64)), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    st.sampled_from("CF"),
)
def test_it_is_read_where_it_lies(values, order: str) -> None:
    written = Array(np.asarray(values, order=order))
    record = ArrayRecord()
    record["w"] = written
    got = from_arrays(record)["w"].numpy()
    np.testing.assert_array_equal(got, written.numpy(), strict=True)
    assert got.size == 0 or np.shares_memory(got, np.frombuffer(written.data, np.uint8))


def test_what_is_no_array_is_refused() -> None:
    for data in (b"", b"no array", Array(np.zeros(3)).data[:-8]):
        record = ArrayRecord()
        record["w"] = Array("float64", (3,), "numpy.ndarray", data)
        with pytest.raises(ValueError):
            from_arrays(record)


@pytest.mark.parametrize("apart", [False, True], ids=["in one piece", "buffers apart"])
def test_it_survives_a_pickle(apart: bool, recwarn: pytest.WarningsRecorder) -> None:
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(to_arrays(WEIGHTS), protocol=5, buffer_callback=buffers.append if apart else None)
    frozen = [buffer.raw().toreadonly() for buffer in buffers]
    assert same(from_arrays(pickle.loads(text, buffers=frozen))) and bool(buffers) == apart and not recwarn.list
