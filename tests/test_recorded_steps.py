"""Recorded steps from the first token on, on a CPU: what would be recorded is called, and watched."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from called_recordings import Called, called  # noqa: F401 - a fixture
from conftest import make_ids
from every_model import model_types, tiny_model
from every_model_table import IDS, N_SINK, allowed_error
from family_models import VOCAB, available, make_family
from family_reference import family_reference_logits
from streamed_reference import streamed_logits
from streams import kernels_run, padded
from torch.nn.attention import SDPBackend, sdpa_kernel

from personal_adapters.neox_flash import unwrap_attention, wrap_attention
from streaming_llm import StreamingDecoder
from streaming_llm.attention.kernel_choice import kernels_in_force
from streaming_llm.engines import recorded
from streaming_llm.engines.model_call import ModelCall
from streaming_llm.engines.recorded import RecordedEngine

pytestmark = pytest.mark.usefixtures("called")
W, LENGTH = 20, 70  # the ring turns more than twice
WINDOWS = {"gemma3": (12, 40), "gemma2": (12, 40)}
"""Windows of the models' own: one full before the stream's ring, one after that has turned."""
CASES = [
    (case, window)
    for case in ("llama", "gpt_neox", "phi", "gptj", "gemma3", "gemma2")
    if available(case)
    for window in WINDOWS.get(case, (None,))
]


def tolerance(case: str, attention: str = "sdpa") -> float:
    """In float64; Transformers computes RMSNorms, and softmax where it is written out, in float32."""
    return 1e-10 if case in ("gpt_neox", "phi", "gptj") and attention == "sdpa" else 3e-6


def decoder_of(model, n_sink: int, window_size: int = W) -> StreamingDecoder:
    """A decoder whose engine is ``graph``, which is refused on a CPU."""
    decoder = StreamingDecoder(model, n_sink, window_size, "eager")
    decoder._engine = RecordedEngine(model, decoder.cache, "graph", ModelCall)
    return decoder


@functools.cache
def reference(case: str, n_sink: int, batch: int, window: int | None) -> torch.Tensor:
    return family_reference_logits(model_of(case, window), make_ids(LENGTH, batch, VOCAB), n_sink, W)


def model_of(case: str, window: int | None = None, attention: str = "sdpa"):
    changes = {} if window is None else {"sliding_window": window}
    return make_family(case, torch.float64, attention, **changes)


def model_and_reference(case: str, n_sink: int, batch: int, window: int | None = None, attention: str = "sdpa"):
    exact = reference(case, n_sink, batch, window)
    return model_of(case, window, attention), make_ids(LENGTH, batch, VOCAB), exact


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n_sink", [0, 4])
@pytest.mark.parametrize(("case", "window"), CASES)
def test_every_step_from_the_first_token_on_is_exact(case, window, n_sink, batch):
    model, ids, exact = model_and_reference(case, n_sink, batch, window)
    with decoder_of(model, n_sink) as decoder:
        for t, token in enumerate(ids.unbind(1)):
            assert (decoder.step(token) - exact[:, t]).abs().max() < tolerance(case), t
            assert (Called.made > 0) == (t > 0)  # the very first makes the cache
    assert Called.made == 2  # before the cache is full, and from there on


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("n_sink", [0, 4])
@pytest.mark.parametrize(("case", "window"), CASES)
def test_rows_that_are_not_equally_far(case, window, n_sink, attention):
    """A prompt shorter than the sinks, one shorter than the cache, and one after which the ring has turned."""
    model, ids, exact = model_and_reference(case, n_sink, 3, window, attention)
    lengths = (1, 12, 50)
    prompts = padded([row[None, :n] for row, n in zip(ids, lengths, strict=True)], "left")
    with decoder_of(model, n_sink) as decoder:
        decoder.prefill(prompts[0], attention_mask=prompts[1])
        for t in range(LENGTH - max(lengths)):
            at = torch.tensor(lengths) + t
            rows = torch.arange(3)
            error = (decoder.step(ids[rows, at]) - exact[rows, at]).abs().max()
            assert error < tolerance(case, attention), t
    assert Called.made >= 1


def test_an_engine_takes_over_from_the_plain_call_and_back():
    """What the recorded step leaves is what blocks, the plain call, cropping and saving go on with."""
    model, ids, exact = model_and_reference("gpt_neox", 4, 1)
    with decoder_of(model, 4) as decoder:
        decoder.prefill(ids[:, :2])
        for t in range(2, 10):
            decoder.step(ids[:, t])
        decoder.step(torch.tensor([3]))
        decoder.cache.crop(-1)
        assert (decoder.prefill(ids[:, 10:13]) - exact[:, 12]).abs().max() < 1e-10
        assert (decoder.step(ids[:, 13]) - exact[:, 13]).abs().max() < 1e-10
        other = StreamingDecoder(model, 4, W, "eager")
        other.restore(decoder.state())
        for t in range(14, LENGTH):
            assert (other.step(ids[:, t]) - exact[:, t]).abs().max() < 1e-10
            assert (decoder.step(ids[:, t]) - exact[:, t]).abs().max() < 1e-10
        other.close()


def test_what_an_earlier_stream_has_left_in_the_slots_is_not_seen():
    model, ids, exact = model_and_reference("gpt_neox", 4, 1)
    with decoder_of(model, 4) as decoder:
        for token in ids.unbind(1):
            decoder.step(token)
        for layer in decoder.cache.layers:
            for tensor in (layer.keys, layer.values, layer.sinks):
                tensor.fill_(torch.nan)
        decoder.reset()
        for t, token in enumerate(ids.unbind(1)):
            assert (decoder.step(token) - exact[:, t]).abs().max() < 1e-10
    assert Called.made == 2


@pytest.mark.parametrize("eos", [None, [5, 17, 40, 63]])
def test_scored_and_generated_tokens_are_those_of_the_plain_call(eos):
    """Also those in the middle of which the cache gets full, and rows that end before it is."""
    model, ids, _ = model_and_reference("gpt_neox", 4, 3)
    results = []
    for make in (lambda: StreamingDecoder(model, 4, W, "eager"), lambda: decoder_of(model, 4)):
        with make() as decoder:
            decoder.prefill(ids[:, :3])
            losses = decoder.score(ids[:, 3:12])
            tokens = decoder.generate(60, temperature=0, eos_token_id=eos)
            seen = decoder.cache.progress.of_rows(3)
            results.append((losses, tokens, decoder.score(ids[:, 12:50]), seen))
    (losses, tokens, after, seen), (own_losses, own_tokens, own_after, own_seen) = results
    assert (losses - own_losses).abs().max() < 1e-10
    assert torch.equal(tokens, own_tokens)
    assert seen == own_seen
    assert (after - own_after).abs().max() < 1e-10
    assert Called.made > 2


def test_a_kernel_without_a_mask_begins_when_the_cache_is_full():
    """It is the plain call until then, with the kernel that is named and no other."""
    model, ids, exact = model_and_reference("gpt_neox", 4, 1)
    wrap_attention(model, "flash")
    try:
        with decoder_of(model, 4) as decoder:
            for t, token in enumerate(ids.unbind(1)):
                assert (decoder.step(token) - exact[:, t]).abs().max() < 1e-10
                assert (Called.made > 0) == (t >= 4 + W)
    finally:
        unwrap_attention(model)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), decoder_of(model, 4) as decoder:
        decoder.step(ids[:, 0])
        decoder.step(ids[:, 1])
    assert Called.made == 1


def test_the_math_kernel_runs_from_the_first_token_on():
    model, ids, exact = model_and_reference("gpt_neox", 4, 1)
    wrap_attention(model, "math")
    try:
        with decoder_of(model, 4) as decoder:
            decoder.prefill(ids[:, :2])
            losses = []
            assert kernels_run(lambda: losses.append(decoder.score(ids[:, 2:40]))) == {"math"}
    finally:
        unwrap_attention(model)
    expected = torch.nn.functional.cross_entropy(exact[0, 1:39], ids[0, 2:40], reduction="none")
    assert (losses[0][0] - expected).abs().max() < 1e-10
    assert Called.made == 2


def test_adapters_that_come_and_go_in_the_middle_of_a_stream():
    """A recording holds the kernel that was allowed when it was made."""
    model, ids, exact = model_and_reference("gpt_neox", 4, 1)
    with decoder_of(model, 4) as decoder:
        decoder.prefill(ids[:, :40])
        logits = [decoder.step(ids[:, 40])]
        wrap_attention(model, "math")
        assert kernels_run(lambda: logits.append(decoder.step(ids[:, 41]))) == {"math"}
        unwrap_attention(model)
        assert kernels_run(lambda: logits.append(decoder.step(ids[:, 42]))) == {"flash"}
    assert (torch.stack(logits, dim=1) - exact[:, 40:43]).abs().max() < 1e-10
    assert Called.made == 3


def test_a_row_that_ended_in_a_chunk_does_not_go_back():
    """The padding behind its end has overwritten the oldest token of the window that would come back."""
    model, ids, _ = model_and_reference("gpt_neox", 4, 1)
    with decoder_of(model, 4) as decoder:
        decoder.prefill(ids[:, :40])
        tokens = decoder.generate(8, temperature=0)[0].tolist()
        decoder.reset()
        decoder.prefill(ids[:, :40])
        ended = decoder.generate(8, temperature=0, eos_token_id=tokens[2])
        assert ended.shape[1] < 8
        with pytest.raises(ValueError, match="evicted"):
            decoder.cache.crop(-1)


def test_sinks_that_came_in_recorded_steps_are_the_plain_call_s_too():
    """The first row gets its sinks while the other, far in its stream, sees its own turned."""
    model, ids, exact = model_and_reference("gpt_neox", 4, 2)
    lengths, rows = torch.tensor([1, 40]), torch.arange(2)
    prompts = padded([row[None, :n] for row, n in zip(ids, lengths, strict=True)], "left")
    with decoder_of(model, 4) as decoder:
        decoder.prefill(prompts[0], attention_mask=prompts[1])
        for t in range(10):
            at, kernel = lengths + t, SDPBackend.FLASH_ATTENTION if t in (0, 6, 7) else SDPBackend.MATH
            with sdpa_kernel(kernel):
                assert (decoder.step(ids[rows, at]) - exact[rows, at]).abs().max() < 1e-10, t


def test_a_criterion_met_before_a_row_s_end():
    """A row that has ended is fed padding, which overwrites a token that taking back brings into the window again."""
    model, ids, _ = model_and_reference("gpt_neox", 4, 1)
    losses = []
    for make in (lambda: StreamingDecoder(model, 4, W, "eager"), lambda: decoder_of(model, 4)):
        with make() as decoder:
            decoder.prefill(ids[:, :50])
            eos = int(decoder.generate(8, temperature=0)[0, 7])
            decoder.reset()
            decoder.prefill(ids[:, :50])
            how = {"eos_token_id": eos, "stopping_criteria": lambda ids, scores: ids.shape[1] >= 3}
            assert decoder.generate(12, temperature=0, **how).shape[1] == 3
            losses.append(decoder.score(ids[:, 10:40]))
    assert (losses[0] - losses[1]).abs().max() < 1e-10


def test_a_recording_keeps_its_generator(monkeypatch):
    """Another one at the address of one that is gone would be taken for it."""

    class Silent:
        def __init__(self, call, device, generator=None) -> None: ...

        def replay(self, times) -> None: ...

    monkeypatch.setattr(recorded, "Recording", Silent)
    model, ids, _ = model_and_reference("gpt_neox", 4, 1)
    with decoder_of(model, 4) as decoder:
        decoder.prefill(ids[:, :30])
        decoder.generate(1, seed=0)
        generator = weakref.ref(decoder._generator)
        decoder._generator = None
        assert generator() is not None
        for _ in range(recorded.MAX_RECORDINGS):
            decoder._generator = None
            decoder.generate(1, seed=0)
    assert generator() is None


def test_the_memory_of_a_stream_comes_back_as_soon_as_its_decoder_goes():
    gc.disable()
    try:
        decoder, ids = decoder_of(model_of("llama"), 4), make_ids(W + 8, 2, VOCAB)
        for token in ids.unbind(1):
            decoder.step(token)
        cache = weakref.ref(decoder.cache)
        decoder._engine._recordings.clear()  # they hold what they call, which CUDA graphs do not
        decoder.close()
        del decoder
        assert cache() is None
    finally:
        gc.enable()


def test_every_kernel_that_is_allowed_or_not_asks_for_a_recording_of_its_own():
    kernels = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    in_force = set()
    for kernel in kernels:
        with sdpa_kernel(kernel):
            in_force.add(kernels_in_force([]))
    with sdpa_kernel(kernels):
        in_force.add(kernels_in_force([]))
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        in_force.add(kernels_in_force([]))
    assert len(in_force) == 6


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma3n_text", "gpt_oss", "nanochat"])
def test_kinds_that_the_families_above_do_not_have(model_type, monkeypatch):
    """Narrow values, layers that attend to another's keys, learned logits. On a CPU, experts wait for their tokens."""
    if model_type not in model_types():
        pytest.skip("not in the installed Transformers")
    if model_type in ("deepseek_v3", "gpt_oss"):
        monkeypatch.setattr(Called, "watch", contextlib.nullcontext)
    model = tiny_model(model_type).double()
    exact = streamed_logits(model, IDS, N_SINK, 16)
    allowed, n = allowed_error(model, exact, 16), IDS.shape[1]
    with decoder_of(model, N_SINK, 16) as decoder:
        errors = [(decoder.step(IDS[:, t]) - exact[:, t]).abs().max() for t in range(n)]
    assert max(errors) < allowed
    assert Called.made >= 1
