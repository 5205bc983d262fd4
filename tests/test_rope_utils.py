"""Rotation of keys: composition, pairing, and angles far from the origin."""

from __future__ import annotations

import pytest
import torch
from conftest import make_neox

from streaming_llm.families import rotaries_from_config, rotaries_from_model
from streaming_llm.rope_utils import ExactRotaryEmbedding, Rotary, rotate

INV_FREQ = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_complex_product(interleaved):
    rotary = Rotary(INV_FREQ, interleaved)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    out = rotate(x, *rotary.cos_sin(17), rotary)
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    for frequency, (a, b) in zip(INV_FREQ, pairs, strict=True):
        expected = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * 17 * frequency)
        torch.testing.assert_close(torch.complex(out[..., a], out[..., b]), expected)
    assert torch.equal(out[..., 6:], x[..., 6:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_add_up(interleaved):
    rotary = Rotary(INV_FREQ, interleaved)
    x = torch.randn(4, 6, dtype=torch.float64)
    once = rotate(x, *rotary.cos_sin(12_345), rotary)
    twice = rotate(rotate(x, *rotary.cos_sin(12_000), rotary), *rotary.cos_sin(345), rotary)
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_float32(dtype):
    rotary = Rotary(INV_FREQ)
    x = torch.randn(64, 6).to(dtype)
    exact = rotate(x.double(), *rotary.cos_sin(1000), rotary)
    assert torch.equal(rotate(x, *rotary.cos_sin(1000), rotary), exact.to(dtype))


def test_config_and_model_agree():
    model = make_neox(rotary_pct=0.25)
    from_config, from_model = rotaries_from_config(model.config)[0], rotaries_from_model(model)[0]
    assert torch.equal(from_config.inv_freq, from_model.inv_freq)
    assert from_config.rotary_dim == 4
    assert from_config.inv_freq.dtype == torch.float64


def test_exact_module_matches_the_model_near_and_beats_it_far():
    module = make_neox().gpt_neox.rotary_emb
    exact = ExactRotaryEmbedding(module, Rotary(module.inv_freq.double()))
    x = torch.zeros(1, 1, dtype=torch.float64)
    near, far = torch.arange(100)[None], torch.arange(10_000_000, 10_000_100)[None]
    for ours, theirs in zip(exact(x, near), module(x, near), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    angles = far[0].double()[:, None] * module.inv_freq.double()  # [100, 4]
    torch.testing.assert_close(exact(x, far)[0][0, :, :4], angles.cos(), atol=1e-12, rtol=0)
    assert (module(x, far)[0][0, :, :4] - angles.cos()).abs().max() > 1e-2
