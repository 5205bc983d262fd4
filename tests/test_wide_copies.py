"""Joining in wide elements: the same bytes as PyTorch's own, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from streaming_llm.attention.wide_copies import joined

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def strided(dtype: torch.dtype, head_dim: int, offset: int) -> torch.Tensor:
    """Heads ``[2, 3, 10, head_dim]`` as a projection leaves them, between others, ``offset`` elements further on."""
    flat = torch.randn(2 * 10 * 3 * 3 * head_dim + offset).to(dtype)[offset:]
    return flat.view(2, 10, 3, 3 * head_dim)[..., head_dim : 2 * head_dim].transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 6, 20, 80])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_joined_is_cat(dtype, head_dim, offset):
    a, b = strided(dtype, head_dim, offset), strided(dtype, head_dim, 0)
    a[0, 0, 5, 0] = torch.nan
    both, expected = joined((a[:, :, 3:], b[:, :, :4]), dim=2), torch.cat((a[:, :, 3:], b[:, :, :4]), dim=2)
    assert both.dtype == dtype
    assert both.is_contiguous()
    assert torch.equal(both.isnan(), expected.isnan())
    assert torch.equal(both.nan_to_num(), expected.nan_to_num())


def test_gradients_and_mixed_dtypes_go_pytorch_s_way():
    a = torch.randn(1, 2, 3, 8)
    assert joined((a, a.double()), dim=2).dtype == torch.float64
    a.requires_grad_()
    joined((a, a), dim=2).sum().backward()  # a view of another dtype would have no gradient
    assert torch.equal(a.grad, torch.full_like(a, 2))
