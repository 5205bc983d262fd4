"""What the decoder layers of a model are made of, in numbers and weights: all that the kernels know of a model.

A recipe refers to the model's own weights, or to views of them. How it is read off a model of each family stands in
:mod:`.family_recipes`; what a recipe cannot say is refused there, by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..attention.math_kernel import Scores
from ..rope_utils import Rotary
from .weights import Packed


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm or RMSNorm of the last dimension.

    Args:
        weight: ``[n]``, or ``[heads, n]`` with one for each head; ``None``: ones.
        bias: like ``weight``; ``None``: zeros.
        centred: the mean is taken off first (LayerNorm).
        plus_one: what is multiplied with is ``1 + weight`` (Gemma).
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool = False
    plus_one: bool = False


@dataclass(frozen=True, eq=False)
class Linear:
    """``x @ weight.T + bias``.

    Args:
        weight: ``[rows, columns]``, each row contiguous and the rows one after the other.
        bias: ``[rows]`` or ``None``.
    """

    weight: Tensor | Packed
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    @property
    def bits(self) -> int:
        """Of a packed number; 0 for plain weights."""
        return self.weight.bits if isinstance(self.weight, Packed) else 0

    @property
    def group(self) -> int:
        """Columns that share a factor."""
        return self.weight.group if isinstance(self.weight, Packed) else self.columns

    def pointers(self, other: Tensor) -> tuple[Tensor, Tensor]:
        """What kernels read, the weight or the words that it is packed in, and the bias or else ``other``."""
        numbers = self.weight.words if isinstance(self.weight, Packed) else self.weight
        return numbers, other if self.bias is None else self.bias

    def factors(self, other: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and zeros of packed weights; ``other`` where there is nothing to point to."""
        return (self.weight.scale, self.weight.zero) if isinstance(self.weight, Packed) else (other, other)

    def halves(self) -> tuple[Linear, Linear]:
        """The first and the second half of the rows."""
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        first, second = self.weight.chunk(2)
        return Linear(first, biases[0]), Linear(second, biases[1])


@dataclass(frozen=True)
class HeadPlaces:
    """Where the heads lie in what the projections give, one after the other; in units of ``head_dim``.

    Query head ``j`` of KV head ``i`` lies at ``i * query_step + j``, the key of KV head ``i`` at
    ``key_start + i * key_step`` and its value at ``value_start + i * value_step``.
    """

    query_step: int
    key_start: int
    key_step: int
    value_start: int
    value_step: int

    @classmethod
    def separate(cls, num_heads: int, num_kv_heads: int) -> HeadPlaces:
        """All queries, all keys, all values."""
        return cls(num_heads // num_kv_heads, num_heads, 1, num_heads + num_kv_heads, 1)

    @classmethod
    def by_kv_head(cls, num_heads: int, num_kv_heads: int) -> HeadPlaces:
        """For each KV head its queries, its key and its value."""
        groups = num_heads // num_kv_heads
        return cls(groups + 2, groups, groups + 2, groups + 1, groups + 2)

    def split(self, x: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value ``[batch, length, heads, head_dim]`` of ``x`` with all heads; views if possible."""
        if self.key_step == 1:
            query, key, value = (x[:, :, start:] for start in (0, self.key_start, self.value_start))
            return query[:, :, : self.key_start], key[:, :, :num_kv_heads], value[:, :, :num_kv_heads]
        x = x.unflatten(2, (num_kv_heads, self.key_step))
        return x[:, :, :, : self.key_start].flatten(2, 3), x[:, :, :, self.key_start], x[:, :, :, self.value_start]


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention.

    Args:
        module: the model's attention layer, or the adapter around it, which may name a kernel.
        projections: one matrix for query, key and value, or three; their outputs follow each other.
        places: where the heads lie there.
        output: from ``[num_heads * head_dim]``.
        rotary: on the device of the weights; of no dimensions where the layer has no positions.
        clip: bound of what the projections give.
        query_norm, key_norm: of each head before it is rotated.
        norms_all_heads: these norms are of all heads at once.
        window: sliding window of the model's own in tokens, the current one included.
    """

    module: nn.Module
    projections: tuple[Linear, ...]
    places: HeadPlaces
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Rotary
    scores: Scores
    clip: float | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norms_all_heads: bool = False
    window: int | None = None

    @property
    def groups(self) -> int:
        """Query heads that share a key."""
        return self.num_heads // self.num_kv_heads

    @property
    def width(self) -> int:
        """Numbers that the projections give for a token."""
        return sum(linear.rows for linear in self.projections)


@dataclass(frozen=True, eq=False)
class MLP:
    """``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate.

    Args:
        activation: see :func:`.activations.activate`.
        gate_and_up: both as one matrix, where the model has them so.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    activation: str
    gate_and_up: Linear | None = None

    @property
    def first(self) -> tuple[Linear, ...]:
        """What the input goes through."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer: ``x + multiplier * attention_out_norm(attention(attention_norm(x)))``, then the MLP likewise.

    Args:
        parallel: attention and MLP both start from the layer's input, and both are added to it.
        attention_norm, mlp_norm: before attention and MLP; ``None``: none.
        attention_out_norm, mlp_out_norm: behind them.
    """

    attention: Attention
    mlp: MLP
    parallel: bool
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    multiplier: float = 1.0

    @property
    def norms_of_input(self) -> tuple[Norm | None, ...]:
        """The different norms of the layer's input: first attention's, last that of a parallel layer's MLP."""
        shared = not self.parallel or self.mlp_norm is self.attention_norm
        return (self.attention_norm,) if shared else (self.attention_norm, self.mlp_norm)


@dataclass(frozen=True, eq=False)
class Recipe:
    """A causal language model.

    Args:
        embedding: ``[vocab, hidden]``.
        embedding_scale: factor on a token's row.
        given_scale: factor on embeddings that are given in place of tokens.
        norm: of the final hidden states.
        output: the output layer; its weight may be ``embedding``.
        logit_scale: factor on what it gives.
        logit_cap: bound of that, as :attr:`.Scores.softcap`.
    """

    embedding: Tensor
    embedding_scale: float
    given_scale: float
    layers: tuple[Layer, ...]
    norm: Norm
    output: Linear
    logit_scale: float = 1.0
    logit_cap: float | None = None

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]

    @property
    def linears(self) -> list[Linear]:
        """Every matrix that a step goes through."""
        parts = [(layer.attention, layer.mlp) for layer in self.layers]
        of_layers = [x for a, mlp in parts for x in (*a.projections, a.output, *mlp.first, mlp.down)]
        return [*of_layers, self.output]
