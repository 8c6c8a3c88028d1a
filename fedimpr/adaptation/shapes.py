"""What the losses of this room ask of the tensors that they are given."""

from __future__ import annotations

from torch import Tensor

from fedimpr.errors import FedimprError


def require_rows(tensor: Tensor, what: str, stage: str, *, columns: int | None = None, least: int = 1) -> None:
    """Check that a tensor is a table with enough rows, and with as many columns as its partner.

    Args:
        tensor: should be (N, D).
        what: names it in the error.
        stage: the method that asks.
        columns: D; ``None`` for any number >= 1.
        least: the smallest N.

    Raises:
        FedimprError: it is not; its shape is the value.
    """
    fits = tensor.dim() == 2 and len(tensor) >= least and tensor.shape[1] >= 1 and columns in (None, tensor.shape[1])
    if not fits:
        width = "D" if columns is None else columns
        raise FedimprError(f"{what} must be (N, {width}) with N >= {least}", stage=stage, value=tuple(tensor.shape))


def require_pair(source: Tensor, target: Tensor, what: str, stage: str, *, least: int = 1) -> None:
    """Check two tables (N, D) and (N', D), see :func:`require_rows`."""
    require_rows(source, f"source {what}", stage, least=least)
    require_rows(target, f"target {what}", stage, columns=source.shape[1], least=least)
