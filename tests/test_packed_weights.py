"""Weights that torchao has quantised: what kernels make of them, and what they refuse, by name."""

from __future__ import annotations

import pytest
import torch
from family_models import make_family
from packed_weights import KINDS, Int4Tensor, Int8Tensor, quantise_, quantised, unpacked, whole_groups
from torch import Tensor, nn

from streaming_llm.fused.family_recipes import recipe_of
from streaming_llm.fused.refusals import why_not
from streaming_llm.fused.weights import NotCoveredError, stored


def weight(rows: int = 6, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_quantised_weight_stands_for(kind):
    plain = weight(6, 256)
    given = quantised(plain, *KINDS[kind])
    packed = stored(given)
    torch.testing.assert_close(unpacked(packed), given.exact, atol=1e-12, rtol=0)
    assert (given.exact - plain).abs().max() < 0.25
    assert packed.shape == (6, 256)
    halves = packed.chunk(2)
    assert torch.equal(torch.cat([unpacked(half) for half in halves]), unpacked(packed))
    assert all(half.words.untyped_storage().data_ptr() == given.qdata.data_ptr() for half in halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_integer_that_stands_for_0(dtype):
    given = quantised(weight(), *KINDS["int8"])
    given.scale, given.zero_point = given.scale.to(dtype), torch.randint(-128, 128, (6, 1), dtype=torch.int8)
    exact = (given.qdata.double() - given.zero_point.double()) * given.scale.double()
    torch.testing.assert_close(unpacked(stored(given)), exact, atol=1e-6, rtol=0)
    given.zero_point = None
    assert not stored(given).zero.any()


def test_torchao_s_own_int8():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(128, 6)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    torch.testing.assert_close(unpacked(stored(layer.weight)), layer.weight.dequantize().double(), atol=1e-7, rtol=0)
    quantization.quantize_(dynamic := nn.Linear(128, 6), quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(NotCoveredError, match="quantise their input too"):
        stored(dynamic.weight)


def test_torchao_s_own_int4():
    quantization = pytest.importorskip("torchao.quantization")
    given = quantised(weight().bfloat16(), 4, 32)
    own = quantization.Int4Tensor(given.qdata, given.scale, given.zero_point, given.block_size, given.shape)
    assert torch.equal(unpacked(stored(nn.Parameter(own, requires_grad=False))), unpacked(stored(given)))


def changed(kind: type, **changes: object) -> Tensor:
    given = quantised(weight(), *KINDS["int8" if kind is Int8Tensor else "int4 by 32"])
    vars(given).update(changes)
    return given


class Int4TilePackedTo4dTensor(Int4Tensor):
    pass


REFUSED = {
    "class Int4TilePackedTo4dTensor, which no kernel reads": lambda: Int4TilePackedTo4dTensor(
        (6, 128), torch.float32, **vars(changed(Int4Tensor))
    ),
    r"share factors in blocks of \[1, 32\]": lambda: changed(Int8Tensor, block_size=[1, 32]),
    r"share factors in blocks of \[6, 128\]": lambda: changed(Int8Tensor, block_size=[6, 128]),
    r"share factors in blocks of \[2, 16\]": lambda: changed(Int4Tensor, block_size=[2, 16]),
    r"share factors in blocks of \[1, 16\]": lambda: quantised(weight(), 4, 16),
    "have factors of shape": lambda: changed(Int4Tensor, scale=torch.ones(6, 8)),
    "no whole words": lambda: quantised(weight(6, 126), *KINDS["int8"]),
    "no matrix of bytes": lambda: changed(Int4Tensor, qdata=torch.zeros(6, 16, dtype=torch.int32)),
    "hold": lambda: changed(Int4Tensor, qdata=torch.zeros(6, 128, dtype=torch.int8)),
    "act_pre_scale": lambda: changed(Int4Tensor, act_pre_scale=torch.ones(128)),
    "activation_dtype": lambda: changed(Int4Tensor, activation_dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_stored_in_another_way_is_refused_by_name(reason):
    with pytest.raises(NotCoveredError, match=reason):
        stored(REFUSED[reason]())


@pytest.mark.parametrize("kind", ["int8", "int4 by 32"])
def test_a_quantised_model_has_a_recipe(kind):
    model = make_family("llama", **whole_groups("llama"))
    quantise_(model, kind)
    assert why_not(model) is None
    assert {linear.bits for linear in recipe_of(model).linears} == {KINDS[kind][0]}


def test_int4_weights_that_kernels_cannot_read_are_refused():
    """Kernels read the factors of two rows at once, of halves of a matrix too."""
    model = make_family("phi3", intermediate_size=35)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith("down_proj"):  # which has no whole groups
            layer.weight = nn.Parameter(quantised(layer.weight, 4, 32), requires_grad=False)
    assert "odd numbers of rows" in why_not(model)

    of_one_group = quantised(weight(6, 32).bfloat16(), 4, 32)
    assert stored(of_one_group).is_aligned
    of_one_group.scale = torch.zeros(1, 7, dtype=torch.bfloat16)[:, 1:]
    assert of_one_group.scale.is_contiguous()
    assert not stored(of_one_group).is_aligned


def test_a_bias_of_only_gate_or_up_is_refused():
    model = make_family("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    assert why_not(model) == "only some of gate and up have a bias"


def test_models_that_are_quantised_in_part():
    model = make_family("llama")
    plain = quantise_(model, "int8")
    layer, of_plain = model.model.layers[0], plain.model.layers[0]
    layer.mlp.down_proj = of_plain.mlp.down_proj  # by itself
    model.lm_head = plain.lm_head
    assert why_not(model) is None
    layer.self_attn.k_proj = of_plain.self_attn.k_proj
    assert why_not(model) == "matrices that a kernel reads together are not stored alike"


def test_a_quantised_table_of_embeddings_is_refused():
    model = make_family("llama")
    table = quantised(model.model.embed_tokens.weight, *KINDS["int8"])
    model.model.embed_tokens.weight = nn.Parameter(table, requires_grad=False)
    assert why_not(model) == "its embeddings are of class Int8Tensor"
