"""Weights in Flower's records without a detour through bytes.

Flower's ``Array`` writes a tensor into bytes as soon as it is made, and reads it from them each time it is looked at; for 10 MB of weights
that is most of what a client's turn costs. Here both happen only where the bytes travel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import numpy.lib.format as npy
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor


class TensorArray(Array):
    """A Flower array that stays a tensor until someone asks for its bytes.

    Whoever holds it shares the tensor's memory: do not change it in place. :meth:`numpy`, which Flower's own methods use, copies.
    """

    tensor: Tensor
    stype = "numpy.ndarray"

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__["tensor"] = tensor.detach().cpu()  # past the setter of Array, which looks for changes of bytes

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """As NumPy calls it."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes that ``Array`` would hold, written anew each time."""
        return self._written().data

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy."""
        return self.tensor.numpy().copy()

    def deflate(self) -> bytes:
        """What ``Array`` would send; the receiving side then has one."""
        return self._written().deflate()

    def __copy__(self) -> TensorArray:
        return self  # nothing about it can change

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (self.tensor.numpy(),)  # pickle can leave an array's buffer where it is

    def _written(self) -> Array:
        return Array(self.tensor.numpy())


def size_of(record: ArrayRecord) -> int:
    """The bytes of the tensors in a record, which need not be read for it."""
    sizes = (
        array.tensor.nbytes if isinstance(array, TensorArray) else math.prod(array.shape) * np.dtype(array.dtype).itemsize
        for array in record.values()
    )
    return sum(sizes)


def _read(array: np.ndarray[Any, Any]) -> TensorArray:
    return TensorArray(_tensor_of(array))


def _tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a shared buffer cannot be written to, and nobody does
        return torch.from_numpy(array)


def to_arrays(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """Weights as a record that shares their memory."""
    record = ArrayRecord()
    for name, tensor in weights.items():  # one by one: a dictionary's arrays would be written into bytes
        record[name] = TensorArray(tensor)
    return record


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The weights in a record, which share its memory; do not change them in place."""
    return {name: array.tensor if isinstance(array, TensorArray) else _in_place(array) for name, array in record.items()}


def _in_place(array: Array) -> Tensor:
    """The tensor that lies in the bytes of one of Flower's arrays; ``Array.numpy`` makes three copies of it on the way."""
    with BytesIO(array.data) as file:  # without a copy, as long as nobody writes
        version = npy.read_magic(file)
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        flat = np.frombuffer(array.data, dtype, math.prod(shape), offset=file.tell())
    return _tensor_of(flat.reshape(shape, order="F" if fortran else "C"))
