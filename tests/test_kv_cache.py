"""StreamingKVCache on an unmodified GPT-NeoX, against the float64 token-by-token reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import make_ids, make_neox
from reference import reference_logits
from streams import CONFIGS, decode, forward_in_blocks

from streaming_llm import StreamingConfig, StreamingDecoder, StreamingKVCache, StreamingLLMWrapper
from streaming_llm.positions import Progress, StreamLayout
from streaming_llm.rope_utils import Rotary
from streaming_llm.sinks import MovingSinks, SinkRotation
from streaming_llm.speculative import OverwrittenSlots


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("n_sink", "window_size"), CONFIGS)
@pytest.mark.parametrize(("dtype", "spread", "tolerance"), [(torch.float32, 0.12, 5e-6), (torch.float64, 0.08, 1e-6)])
def test_token_by_token(dtype, spread, tolerance, n_sink, window_size, attention):
    # In float64, Transformers' float32 angles remain, which weigh more the larger the scores are.
    model, ids = make_neox(dtype, attention, initializer_range=spread), make_ids(300)
    logits = decode(model, StreamingKVCache(model.config, n_sink, window_size), ids)
    assert (logits - reference_logits(model, ids, n_sink, window_size)).abs().max() < tolerance


@pytest.mark.parametrize("parallel", [True, False])
def test_batch_partial_rotary_and_sequential_residual(parallel):
    model, ids = make_neox(rotary_pct=0.25, use_parallel_residual=parallel), make_ids(150, batch=3)
    logits = decode(model, StreamingKVCache(model.config, 4, 30), ids)
    assert (logits - reference_logits(model, ids, 4, 30)).abs().max() < 5e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ends", [(2,), (40,), (65,), (20, 65)])
def test_blocks_that_fit_are_exact(ends, attention):
    model, ids = make_neox(attention=attention), make_ids(200)
    cuts = (0, *ends, *range(ends[-1] + 1, 201))
    logits = forward_in_blocks(model, StreamingKVCache(model.config, 4, 60), ids, cuts)
    assert (logits - reference_logits(model, ids, 4, 60)).abs().max() < 5e-6


@pytest.mark.parametrize(("seen", "block"), [(0, 66), (64, 2), (65, 2), (100, 2)])
def test_a_block_that_evicts_is_refused_with_the_remedy(seen, block):
    model, ids = make_neox(), make_ids(200)
    cache = StreamingKVCache(model.config, 4, 60)
    if seen:
        decode(model, cache, ids[:, :seen])
    with pytest.raises(ValueError, match="StreamingLLMWrapper"):
        model(ids[:, seen : seen + block], past_key_values=cache, use_cache=True)


def test_memory_is_bounded_and_buffers_stay_in_place():
    model, ids = make_neox(), make_ids(300)
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, ids[:, :70])
    where, size = cache.layers[0].keys.data_ptr(), cache.nbytes
    decode(model, cache, ids[:, 70:])
    assert cache.layers[0].keys.data_ptr() == where
    assert cache.nbytes == size == 4 * 2 * (4 + 60 + 1) * 64 * 4  # layers, k and v, slots, hidden, bytes


def test_a_large_window_allocates_what_it_needs():
    model = make_neox()
    cache = StreamingKVCache(model.config, 4, 10**9)
    decode(model, cache, make_ids(300))
    assert cache.layers[0].keys.shape[2] <= 600


def test_reset_forgets_everything():
    model, ids = make_neox(), make_ids(150)
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, make_ids(150, seed=9))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(decode(model, cache, ids), decode(model, StreamingKVCache(model.config, 4, 60), ids))


@pytest.mark.parametrize("seen", [30, 120])
def test_batch_operations_keep_rows_apart(seen):
    model, ids = make_neox(), make_ids(200, batch=3)
    expected = decode(model, StreamingKVCache(model.config, 4, 60), ids)[:, seen:]

    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, ids[:, :seen])
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(decode(model, cache, ids[[2, 0, 1], seen:]), expected[[2, 0, 1]])

    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, ids[:, :seen])
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(decode(model, cache, ids[[1, 1], seen:]), expected[[1, 1]])


def test_another_batch_size_is_refused():
    model = make_neox()
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, make_ids(3))
    with pytest.raises(ValueError, match="1 streams"):
        decode(model, cache, make_ids(1, batch=2))


def test_crop_before_and_after_eviction():
    model, ids = make_neox(), make_ids(200)
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, ids[:, :50])
    cache.crop(40)
    logits = decode(model, cache, ids[:, 40:])
    assert (logits - reference_logits(model, ids, 4, 60)[:, 40:]).abs().max() < 5e-6
    for length in (150, -50, -2):
        with pytest.raises(ValueError, match="evicted"):
            cache.crop(length)


@pytest.mark.parametrize("seen", [64, 65, 66, 130])
@pytest.mark.parametrize("next_tokens", [1, 70])
def test_one_token_back_is_exact_after_any_number(seen, next_tokens):
    model, ids = make_neox(torch.float64), make_ids(200)
    wrong = make_ids(1, seed=7)
    with StreamingLLMWrapper(model, 4, 60) as stream:
        cache = stream.new_cache()
        forward_in_blocks(model, cache, ids, (0, seen))
        decode(model, cache, wrong)
        cache.crop(-1)
        logits = forward_in_blocks(model, cache, ids, (*range(seen, 200, next_tokens), 200))
    assert (logits - reference_logits(model, ids, 4, 60)[:, seen:]).abs().max() < 1e-11


@pytest.mark.parametrize("how", ["directly", "after selecting rows", "after saving", "after a move"])
def test_a_second_token_back_is_refused_until_one_has_been_fed(how, tmp_path):
    """One behind the other as well as both at once: the second would need a token that the first has overwritten."""
    model, ids = make_neox(), make_ids(80)
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, ids[:, :70])
    cache.crop(-1)
    if how == "after selecting rows":
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
    elif how == "after saving":
        cache.save(tmp_path / "stream.safetensors")
        cache = StreamingKVCache.load(tmp_path / "stream.safetensors", model.config)
    elif how == "after a move":
        cache.move_to(69)
    with pytest.raises(ValueError, match="evicted"):
        cache.crop(-1)
    decode(model, cache, ids[:, 69:72])
    cache.crop(-1)
    logits = decode(model, cache, ids[:, 71:])
    assert (logits - reference_logits(model, ids, 4, 60)[:, 71:]).abs().max() < 5e-6
    cache.reset()
    decode(model, cache, ids[:, :20])
    cache.crop(-9)
    cache.crop(-9)
    assert cache.get_seq_length() == 2


def test_padding_behind_an_end_counts_as_a_token_taken_back():
    model, ids = make_neox(), make_ids(80, batch=2)
    with StreamingDecoder(model, 4, 60) as decoder:
        decoder.prefill(ids)
        stop = lambda given, scores: torch.tensor([given.shape[1] >= n for n in (3, 5)])  # noqa: E731
        decoder.generate(9, temperature=0, stopping_criteria=stop, pad_token_id=0)
        decoder.cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match="evicted"):
            decoder.cache.crop(-1)


def test_crop_takes_a_length_or_a_number_to_remove():
    model = make_neox()
    cache = StreamingKVCache(model.config, 4, 60)
    decode(model, cache, make_ids(50))
    for argument, remaining in ((60, 50), (40, 40), (0, 40), (-10, 30)):
        cache.crop(argument)
        assert cache.get_seq_length() == remaining


def test_other_tokens_become_the_sinks_after_a_crop():
    model, ids = make_neox(), make_ids(200)
    reference = reference_logits(model, ids, 4, 60)
    with StreamingLLMWrapper(model, 4, 60) as stream, torch.no_grad():
        cache = stream.new_cache()
        other = torch.cat((ids[:, :2], make_ids(66, seed=7)), dim=1)  # two of the sinks are others
        model(other[:, :63], past_key_values=cache, use_cache=True)
        overwritten = OverwrittenSlots(cache, 5)
        model(other[:, 63:], past_key_values=cache, use_cache=True)  # evicts, so that the sinks are kept
        overwritten.take_back(cache, [5])
        cache.crop(2)
        logits = decode(model, cache, ids[:, 2:])
    assert (logits - reference[:, 2:]).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_that_move_together_move_as_each_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    slow, fast = (Rotary(base ** -(torch.arange(4, dtype=torch.float64) / 4)) for base in (10_000.0, 100.0))
    rotaries, one = [slow, slow, fast, slow], make_neox(num_hidden_layers=1).config
    cache = StreamingKVCache(make_neox().config, 4, 30, rotary=rotaries)
    alone = [StreamingKVCache(one, 4, 30, rotary=rotary) for rotary in rotaries]

    for change in (
        lambda cache: None,
        lambda cache: cache.move_to(1100),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reset(),
    ):
        for changed in (cache, *alone):
            change(changed)
        for _ in range(100):
            for index, single in enumerate(alone):
                keys, values = torch.randn(2, cache.batch_size or 2, 4, 1, 16, generator=generator).to(dtype)
                together = cache.update(keys, values, index)
                assert all(map(torch.equal, together, single.update(keys, values, 0)))


@dataclass
class Sinks:
    """A layer as far as its sinks are concerned."""

    layout: StreamLayout
    rotation: SinkRotation
    keys: torch.Tensor
    sinks: torch.Tensor


@pytest.mark.parametrize("rows", [(0,), (0, 7, 100_000)])  # of equal streams, or how far each row is before the first
def test_sinks_worked_out_ahead_are_those_of_each_position(rows):
    rotation = SinkRotation(Rotary(10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)))
    layout, generator = StreamLayout(StreamingConfig(4, 60)), torch.Generator().manual_seed(0)
    layers = [
        Sinks(layout, rotation, torch.zeros(3, 2, 65, 16), torch.randn(3, 2, 4, 16, generator=generator))
        for _ in range(3)
    ]
    together, progress, start = MovingSinks(layers), Progress(), 10_000_000  # where float32 angles are off
    for step in [*range(300), 298, 299, 1000, 5]:
        # Now and then another position of the first token, or other angles.
        offset, rotation.exact_angles = int(step % 50 == 0), step % 30 > 0
        progress.set([start + step - row for row in rows], [offset] * len(rows))
        together.move(progress)
        moved = [layer.keys.clone() for layer in layers]
        MovingSinks(layers).move(progress)
        assert all(map(torch.equal, moved, [layer.keys for layer in layers]))


def test_frequencies_cast_with_the_weights_are_noticed():
    model = make_neox().bfloat16()  # casts inv_freq as well
    cache, states = StreamingKVCache(model.config, 4, 60), torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)

    def feed(n_tokens: int) -> None:
        for t in range(n_tokens):
            cos, sin = model.gpt_neox.rotary_emb(states, torch.tensor([[t]]))
            for layer in range(4):
                cache.update(states, states, layer, {"cos": cos, "sin": sin})

    with pytest.raises(ValueError, match="half precision"):
        feed(400)


def test_the_wrapper_takes_the_frequencies_of_a_cast_model():
    model, ids = make_neox().bfloat16(), make_ids(300)
    with StreamingLLMWrapper(model, 4, 60) as stream:
        assert decode(model, stream.new_cache(), ids).isfinite().all()
    model.float()  # weights and frequencies stay as they were rounded
    with StreamingLLMWrapper(model, 4, 60) as stream:
        logits = decode(model, stream.new_cache(), ids)
    assert (logits - reference_logits(model, ids, 4, 60)).abs().max() < 5e-6


def test_scaling_that_depends_on_the_length_is_refused():
    model = make_neox()
    name = "rope_parameters" if hasattr(model.config, "rope_parameters") else "rope_scaling"  # newer, older name
    scaling = {**(getattr(model.config, name) or {}), "rope_type": "dynamic", "factor": 2.0}
    setattr(model.config, name, scaling)
    length = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"change beyond {length} tokens"):
        StreamingKVCache(model.config, 4, length - 4)


@pytest.mark.parametrize(("n_sink", "window_size"), [(-1, 60), (4, 0)])
def test_bad_numbers_are_refused(n_sink, window_size):
    with pytest.raises(ValueError, match=r"n_sink|window_size"):
        StreamingKVCache(make_neox().config, n_sink, window_size)
