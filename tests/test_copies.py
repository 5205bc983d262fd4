"""Copies in wide elements: the same bytes as PyTorch's own, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from streaming_llm.copies import copy, joined

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def strided(dtype: torch.dtype, head_dim: int, offset: int) -> torch.Tensor:
    """Heads ``[2, 3, 10, head_dim]`` as a projection leaves them, between others, ``offset`` elements further on."""
    flat = torch.randn(2 * 10 * 3 * 3 * head_dim + offset).to(dtype)[offset:]
    return flat.view(2, 10, 3, 3 * head_dim)[..., head_dim : 2 * head_dim].transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 6, 20, 80])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_copies_are_equal(dtype, head_dim, offset):
    a, b = strided(dtype, head_dim, offset), strided(dtype, head_dim, 0)
    a[0, 0, 0, 0] = torch.nan
    target = torch.zeros(2, 3, 12, head_dim, dtype=dtype)
    copy(target[:, :, 1:11], a)
    assert torch.equal(target[:, :, 1:11].isnan(), a.isnan())
    assert torch.equal(target[:, :, 1:11].nan_to_num(), a.nan_to_num())
    assert not target[:, :, [0, 11]].any()
    both = joined((a[:, :, 3:], b[:, :, :4]), dim=2)
    assert both.dtype == dtype
    assert both.is_contiguous()
    assert torch.equal(both, torch.cat((a[:, :, 3:], b[:, :, :4]), dim=2))


def test_other_dtypes_and_gradients_go_pytorch_s_way():
    a = torch.randn(1, 2, 3, 8)
    target = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    copy(target, a)
    assert torch.equal(target, a.double())
    a.requires_grad_()
    joined((a, a), dim=2).sum().backward()  # a view of another dtype would have no gradient
    assert torch.equal(a.grad, torch.full_like(a, 2))
