"""The faster pooling is the ordinary one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.models.pooling import MaxPool2x2


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.booleans(), st.integers(0, 99))
def test_it_gives_what_pytorchs_gives(n: int, c: int, height: int, width: int, last: bool, seed: int) -> None:
    images = torch.randn(n, c, height, width, generator=torch.Generator().manual_seed(seed))
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        pooled = MaxPool2x2()(images)
    torch.testing.assert_close(pooled, F.max_pool2d(images, 2), rtol=0, atol=0)
    if last:
        assert pooled.is_contiguous(memory_format=torch.channels_last), "the next convolution need not turn them around"
    with_gradient = images.clone().requires_grad_()
    torch.testing.assert_close(MaxPool2x2()(with_gradient), F.max_pool2d(images, 2), rtol=0, atol=0)


def test_a_nan_is_passed_on_and_gradients_go_to_the_maximum() -> None:
    images = torch.tensor([[[[1.0, float("nan")], [3.0, 2.0]]]])
    assert bool(MaxPool2x2()(images).isnan().all())
    images = torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]], requires_grad=True)
    MaxPool2x2()(images).sum().backward()
    assert images.grad is not None and images.grad.tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]


def test_members_batched_by_vmap_give_the_same() -> None:
    images = torch.randn(3, 2, 4, 6, 6)  # (M, N, C, H, W)
    batched = torch.func.vmap(MaxPool2x2())(images)
    torch.testing.assert_close(batched, torch.stack([F.max_pool2d(one, 2) for one in images]), rtol=0, atol=0)
