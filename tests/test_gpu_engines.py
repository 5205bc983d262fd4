"""Every engine and backend on a CUDA device against float64: exact, for as long as one likes, and in constant memory.

One small model in three dtypes serves all tests, since each new shape costs the compilation of some kernels.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, make_ids, make_rounded
from family_models import VOCAB, available, make_family
from family_reference import family_reference_logits
from reference import reference_logits
from streams import nothing_waits, padded
from torch.nn.attention import SDPBackend, sdpa_kernel

from personal_adapters.neox_flash import unwrap_attention, wrap_attention
from personal_adapters.sdpa import check_backend_available
from streaming_llm import StreamingDecoder, resolve_block_engine, resolve_engine, score_stream
from streaming_llm.engines.recorder import WARM_UP, Recording

if torch.cuda.is_available():
    from streaming_llm.fused.step import StepForward

pytestmark = pytest.mark.gpu

DEVICE = GPU
S, W = 4, 60
LENGTH = 300  # the ring turns more than four times
MANY = 10_000
HALF = [torch.bfloat16, torch.float16]
BACKENDS = ["math", "flash", "cudnn"]
SIZES = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 3}  # heads of 40, of which 20 rotate

VARIANTS = ["eager", "graph", "fused", "fused-triton"]
"""Engines."""
RECORDED = VARIANTS[1:]


@functools.cache
def exact_model(dtype: torch.dtype):
    """The float64 twin, on the CPU, of the model in ``dtype``."""
    return make_rounded(dtype, **SIZES)[1]


@functools.cache
def _model(dtype: torch.dtype):
    return make_rounded(dtype, **SIZES)[0].to(DEVICE)


def model_with(dtype: torch.dtype, backend: str = "math"):
    """The model in ``dtype``; tests share it."""
    model = _model(dtype)
    wrap_attention(model, backend)
    return model


@functools.cache
def exact_logits(dtype: torch.dtype, batch: int, n_sink: int) -> torch.Tensor:
    return reference_logits(exact_model(dtype), make_ids(LENGTH, batch), n_sink, W)


@functools.cache
def exact_losses(dtype: torch.dtype, length: int = MANY) -> torch.Tensor:
    """Losses of tokens 1 to ``length - 1`` in float64, block-parallel on the CPU."""
    return score_stream(exact_model(dtype), make_ids(length), S, W)[0]


def backends(dtype: torch.dtype) -> list[str]:
    return [name for name in BACKENDS if check_backend_available(name, dtype, DEVICE, head_dim=40)]


def decoder_of(model, variant: str, n_sink: int = S) -> StreamingDecoder:
    return StreamingDecoder(model, n_sink, W, variant)


def stepped(decoder: StreamingDecoder, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits ``[batch, length - prompt + 1, vocab]``: after the prompt, and after each token that follows it."""
    ids = ids.to(DEVICE)
    logits = [decoder.prefill(ids[:, :prompt]), *(decoder.step(token) for token in ids[:, prompt:].unbind(1))]
    return torch.stack(logits, dim=1).cpu()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def mean_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().mean().item()


# ------------------------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("batch", "n_sink", "prompt"), [(1, 4, 2), (1, 0, 30), (3, 4, 30), (3, 0, 100), (8, 4, 100)]
)  # prompts shorter than the sinks, than the cache, and longer
def test_float32_is_exact(variant, batch, n_sink, prompt):
    with decoder_of(model_with(torch.float32), variant, n_sink) as decoder:
        logits = stepped(decoder, make_ids(LENGTH, batch), prompt)
        assert decoder.engine == variant
        assert (decoder.compile_sec > 0) == (variant in RECORDED)
        assert decoder.cache.get_seq_length() == LENGTH
    assert far(logits, exact_logits(torch.float32, batch, n_sink)[:, prompt - 1 :]) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_costs_no_more_than_the_plain_call_with_math(dtype, batch):
    ids, exact, errors = make_ids(LENGTH, batch), exact_logits(dtype, batch, S)[:, 9:], {}
    for backend in backends(dtype):
        for variant in VARIANTS:
            with decoder_of(model_with(dtype, backend), variant) as decoder:
                errors[variant, backend] = mean_error(stepped(decoder, ids, 10), exact)
    assert ("fused", "flash") in errors
    assert max(errors.values()) < 1.1 * errors["eager", "math"], errors


@pytest.mark.parametrize(
    ("variant", "backend", "begins"),
    [
        ("graph", "math", 1),
        ("graph", "flash", S + W),
        ("fused", "math", 1),
        ("fused", "flash", S + W),
        ("fused-triton", "math", 1),
    ],
)  # the very first token makes the cache
def test_where_recording_begins(variant, backend, begins):
    with decoder_of(model_with(torch.bfloat16, backend), variant) as decoder:
        for count, token in enumerate(make_ids(S + W + 1).to(DEVICE).unbind(1)):
            decoder.step(token)
            assert (decoder.compile_sec > 0) == (count >= begins), count


@pytest.mark.parametrize("n_sink", [4, 0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_not_equally_far(variant, n_sink):
    """A prompt shorter than the sinks, one shorter than the cache, and one after which the ring has turned."""
    lengths, rows, ids = torch.tensor([1, 30, 100]), torch.arange(3), make_ids(LENGTH, 3)
    exact = exact_logits(torch.float32, 3, n_sink)
    prompts, mask = padded([row[None, :n] for row, n in zip(ids, lengths.tolist(), strict=True)], "left")
    with decoder_of(model_with(torch.float32), variant, n_sink) as decoder:
        decoder.prefill(prompts.to(DEVICE), attention_mask=mask.to(DEVICE))
        for t in range(150):
            at = lengths + t
            logits = decoder.step(ids[rows, at].to(DEVICE)).cpu()
            assert far(logits, exact[rows, at]) < 1e-4, t
        assert (decoder.compile_sec > 0) == (variant in RECORDED)


@pytest.mark.parametrize("variant", RECORDED)
def test_scores_and_samples_from_the_beginning_of_a_stream(variant):
    """The step of a cache that is not full gives way to that of a full one in the middle of both."""
    ids, tokens = make_ids(LENGTH, 3), {}
    exact = F.cross_entropy(exact_logits(torch.float32, 3, S)[:, 2:-1].mT, ids[:, 3:], reduction="none")
    for name in ("eager", variant):
        with decoder_of(model_with(torch.float32), name) as decoder:
            decoder.prefill(ids[:, :3].to(DEVICE))
            assert far(decoder.score(ids[:, 3:].to(DEVICE)).cpu(), exact) < 1e-4
            decoder.reset()
            decoder.prefill(ids[:, :3].to(DEVICE))
            generated = decoder.generate(150, temperature=0, eos_token_id=[5, 17])
            tokens[name] = generated.tolist(), decoder.cache.progress.of_rows(3)
    assert tokens["eager"] == tokens[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_thousand_steps_in_float32(variant):
    ids = make_ids(MANY).to(DEVICE)
    with decoder_of(model_with(torch.float32), variant) as decoder:
        decoder.prefill(ids[:, :30])
        losses = decoder.score(ids[:, 30:])[0].cpu()
    assert far(losses, exact_losses(torch.float32)[29:]) < 1e-4


@pytest.mark.parametrize(("backend", "joins"), [(SDPBackend.FLASH_ATTENTION, True), (SDPBackend.MATH, False)])
def test_large_models_ask_for_a_kernel_for_their_head_dim(backend, joins):
    """Not for one for all heads together, which no kernel but math takes."""
    attention = SimpleNamespace(module=torch.nn.Identity(), head_dim=128)
    inner = torch.zeros(1, 16384, dtype=torch.bfloat16, device=DEVICE)
    step = SimpleNamespace(recipe=SimpleNamespace(hidden_size=4096), own_attention=False, inner=inner)
    with sdpa_kernel(backend):
        assert StepForward.mlp_joins(step, attention) is joins


@pytest.mark.parametrize("variant", ["fused", "fused-triton"])
def test_ten_thousand_steps_in_the_schedule_of_large_models(monkeypatch, variant):
    monkeypatch.setattr(StepForward, "mlp_joins", lambda self, attention: True)
    test_ten_thousand_steps_in_float32(variant)


@pytest.mark.parametrize("dtype", HALF)
def test_ten_thousand_steps_in_half_precision(dtype):
    """Rounding does not add up: the last thousand tokens are no further off than the plain call's first ones."""
    ids, exact, errors = make_ids(MANY).to(DEVICE), exact_losses(dtype)[29:], {}
    for variant, n in (("eager", 2000), *((name, MANY) for name in RECORDED)):
        with decoder_of(model_with(dtype, "math" if variant == "eager" else "flash"), variant) as decoder:
            decoder.prefill(ids[:, :30])
            losses = decoder.score(ids[:, 30:n])[0].cpu()
        errors[variant] = mean_error(losses, exact[: n - 30]), mean_error(losses[-1000:], exact[n - 1030 : n - 30])
    for variant in RECORDED:
        assert max(errors[variant]) < 1.1 * max(errors["eager"]), errors


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("batch", "block_size"), [(1, None), (2, 100), (1, 37)])
def test_blocks_of_fused_kernels(dtype, batch, block_size):
    """In half precision over many tokens: the mean error of a few hundred varies by more than the margin."""
    ids = make_ids(LENGTH if dtype == torch.float32 else 2000, batch)
    for n_sink in (4, 0):
        if dtype == torch.float32:
            logits = exact_logits(dtype, batch, n_sink)
            exact = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        else:
            exact = score_stream(exact_model(dtype), ids, n_sink, W)
        errors = {}
        for backend in backends(dtype):
            model = model_with(dtype, backend)
            assert resolve_block_engine(model) == "fused"
            for engine in ("eager", "fused", resolve_block_engine(model, "fused-triton")):
                nll = score_stream(model, ids, n_sink, W, block_size, engine=engine)
                assert nll.device.type == "cpu"
                errors[engine, backend] = mean_error(nll, exact)
                assert far(nll, exact) < 1e-4 or dtype != torch.float32
        assert max(errors.values()) < max(1.1 * errors["eager", "math"], 1e-6), errors


@pytest.mark.parametrize("case", ["llama", "gemma3", "gptj", "falcon", "phi", "qwen3"])
def test_other_families_are_recorded(case):
    if not available(case):
        pytest.skip("not in the installed Transformers")
    model, ids = make_family(case), torch.randint(VOCAB, (2, 200), generator=torch.Generator().manual_seed(1))
    exact = family_reference_logits(model, ids, 4, 48)[:, 29:]
    model = model.to(DEVICE)
    wrap_attention(model, "math")
    with StreamingDecoder(model, 4, 48, "graph") as decoder:
        assert far(stepped(decoder, ids, 30), exact) < 1e-4
        assert decoder.engine == "graph"
        assert decoder.compile_sec > 0


@pytest.mark.slow  # the compiler takes its time
def test_the_compiled_graph_is_exact():
    with StreamingDecoder(model_with(torch.float32), S, W, "graph+compile") as decoder:
        logits = stepped(decoder, make_ids(LENGTH), 30)
        assert decoder.engine == "graph+compile"
    assert far(logits, exact_logits(torch.float32, 1, S)[:, 29:]) < 1e-4


def test_the_fastest_engine_is_found():
    model = model_with(torch.bfloat16)
    assert resolve_engine(model) == "fused"  # its adapters name a kernel
    unwrap_attention(model)
    assert resolve_engine(model) == resolve_block_engine(model) == "fused-triton"
    assert resolve_block_engine(model_with(torch.float32), "fused-triton") == "fused"


# ------------------------------------------------------------------------------------------ recordings and the stream


@pytest.mark.parametrize("variant", RECORDED)
def test_a_second_stream_uses_the_recordings_of_the_first(variant):
    ids = make_ids(LENGTH, 3).to(DEVICE)
    with decoder_of(model_with(torch.float32), variant) as decoder:

        def stream() -> tuple[torch.Tensor, ...]:
            decoder.reset()
            first = stepped(decoder, ids[:, :150], 20)
            return first, decoder.score(ids[:, 150:]), decoder.generate(50, seed=0)

        outputs, compile_sec = stream(), decoder.compile_sec
        for _ in range(2):
            for before, now in zip(outputs, stream(), strict=True):
                assert torch.equal(before, now)
        assert decoder.compile_sec == compile_sec > 0


@pytest.mark.parametrize("variant", RECORDED)
def test_blocks_and_steps_take_turns(variant):
    ids, exact = make_ids(LENGTH, 3), exact_logits(torch.float32, 3, S)
    on_device, compile_sec = ids.to(DEVICE), 0.0
    with decoder_of(model_with(torch.float32), variant) as decoder:
        decoder.prefill(on_device[:, :70])
        for start in range(70, LENGTH - 46, 46):
            for t in range(start, start + 23):
                assert far(decoder.step(on_device[:, t]).cpu(), exact[:, t]) < 1e-4
            compile_sec = compile_sec or decoder.compile_sec
            block = on_device[:, start + 23 : start + 46]
            assert far(decoder.prefill(block, block_size=11).cpu(), exact[:, start + 45]) < 1e-4
            assert decoder.cache.get_seq_length() == start + 46
        assert decoder.compile_sec == compile_sec > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_that_is_taken_back_leaves_nothing(variant):
    ids = make_ids(LENGTH)
    with decoder_of(model_with(torch.float32), variant) as decoder:
        stepped(decoder, ids[:, :200].to(DEVICE), prompt=50)
        decoder.step(torch.tensor([7], device=DEVICE))
        decoder.cache.crop(-1)
        logits = [decoder.step(ids[:, 200].to(DEVICE)), decoder.prefill(ids[:, 201:250].to(DEVICE))]
        logits += [decoder.step(token.to(DEVICE)) for token in ids[:, 250:].unbind(1)]
    expected = exact_logits(torch.float32, 1, S)[0][[200, *range(249, LENGTH)]]
    assert far(torch.cat(logits).cpu(), expected) < 1e-4


@pytest.mark.parametrize("filled", [30, 200])
@pytest.mark.parametrize("variant", RECORDED)
def test_far_into_a_stream(variant, filled):
    ids, exact = make_ids(LENGTH).to(DEVICE), exact_logits(torch.float32, 1, S)
    with decoder_of(model_with(torch.float32), variant) as decoder:
        decoder.prefill(ids[:, : filled - 10])
        for t in range(filled - 10, filled):
            decoder.step(ids[:, t])
        decoder.move_to(10_000_000)
        logits = torch.stack([decoder.step(token) for token in ids[:, filled:].unbind(1)], dim=1).cpu()
        assert decoder.cache.get_seq_length() == 10_000_000 + LENGTH - filled
    assert far(logits, exact[:, filled:]) < 1e-4


@pytest.mark.parametrize("variant", ["graph", "fused"])
def test_another_backend_is_recorded_anew(variant):
    ids, outputs = make_ids(LENGTH).to(DEVICE), {}
    with decoder_of(model_with(torch.bfloat16, "math"), variant) as decoder:
        for backend in ("math", "flash", "math"):
            wrap_attention(decoder.model, backend)
            compile_sec = decoder.compile_sec
            decoder.reset()
            logits = stepped(decoder, ids, 100)
            assert decoder.compile_sec > compile_sec
            assert torch.equal(outputs.setdefault(backend, logits), logits)
    assert not torch.equal(outputs["math"], outputs["flash"])
    with decoder_of(model_with(torch.bfloat16, "flash"), variant) as fresh:
        assert torch.equal(stepped(fresh, ids, 100), outputs["flash"])


@pytest.mark.parametrize("variant", RECORDED)
def test_another_batch_size_after_a_reset_and_none_before(variant):
    with decoder_of(model_with(torch.float32), variant) as decoder:
        for batch in (3, 1):
            decoder.reset()
            logits = stepped(decoder, make_ids(LENGTH, batch), 100)
            assert far(logits, exact_logits(torch.float32, batch, S)[:, 99:]) < 1e-4
        for call in (decoder.step, lambda ids: decoder.score(ids[:, None])):
            with pytest.raises((ValueError, RuntimeError)):
                call(torch.tensor([1, 2], device=DEVICE))
        decoder.reset()
        stepped(decoder, make_ids(LENGTH, 3), 100)
        for call in (decoder.step, lambda ids: decoder.score(ids[:, None])):
            with pytest.raises((ValueError, RuntimeError)):  # one token for three streams
                call(torch.tensor([1], device=DEVICE))


def test_two_decoders_of_one_model_take_turns():
    ids, exact = make_ids(LENGTH).to(DEVICE), exact_logits(torch.float32, 1, S)
    model = model_with(torch.float32)
    with decoder_of(model, "fused") as one, decoder_of(model, "fused-triton") as other:
        one.prefill(ids[:, :100])
        other.prefill(ids[:, :80])
        for t in range(100, 160):
            first, second = one.step(ids[:, t]), other.step(ids[:, t - 20])
            assert far(first[0].cpu(), exact[0, t]) < 1e-4
            assert far(second[0].cpu(), exact[0, t - 20]) < 1e-4


@pytest.mark.parametrize("variant", RECORDED)
def test_a_stream_begun_in_inference_mode_goes_on_outside(variant):
    ids, exact = make_ids(LENGTH).to(DEVICE), exact_logits(torch.float32, 1, S)
    with decoder_of(model_with(torch.float32), variant) as decoder:
        with torch.inference_mode():
            decoder.prefill(ids[:, :100])
            decoder.step(ids[:, 100])
        for t in range(101, 130):
            assert far(decoder.step(ids[:, t])[0].cpu(), exact[0, t]) < 1e-4


# ----------------------------------------------------------------------------------------------- samples and memory


@pytest.mark.parametrize("variant", RECORDED)
def test_a_seed_gives_the_same_tokens_again(variant):
    prompt = make_ids(100, 3).to(DEVICE)
    with decoder_of(model_with(torch.float32), variant) as decoder:

        def generated(*seeds: int | None, **controls) -> torch.Tensor:
            decoder.reset()
            decoder.prefill(prompt)
            return torch.cat([decoder.generate(40, seed=seed, **controls) for seed in seeds], dim=1)

        for controls in ({}, {"top_k": 5, "temperature": 0.8}, {"top_p": 0.7}):
            first = generated(1, None, **controls)  # recorded here, replayed below
            assert torch.equal(generated(1, None, **controls), first)
            assert not torch.equal(generated(2, None, **controls), first)
            assert not torch.equal(generated(1, 1, **controls), first)
            assert first.unique().numel() > 5
            assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("variant", RECORDED)
def test_in_half_precision_one_recording_serves_all_settings(variant):
    prompt = make_ids(100, 3).to(DEVICE)
    with decoder_of(model_with(torch.bfloat16, "flash"), variant) as decoder:

        def generated(**controls) -> torch.Tensor:
            decoder.reset()
            decoder.prefill(prompt)
            return decoder.generate(40, seed=0, **controls)

        free, compile_sec = generated(), decoder.compile_sec
        few = [generated(temperature=0.7, top_k=1), generated(top_p=1e-6)]
        assert torch.equal(generated(), free)
        assert decoder.compile_sec == compile_sec > 0
        greedy = generated(temperature=0)
        assert all(torch.equal(tokens, greedy) for tokens in few)
        assert not torch.equal(free, greedy)


def test_greedy_tokens_are_those_of_every_engine():
    prompt, tokens = make_ids(30, 3).to(DEVICE), {}
    for variant in VARIANTS:
        with decoder_of(model_with(torch.float32), variant) as decoder:
            decoder.prefill(prompt)
            tokens[variant] = decoder.generate(200, temperature=0)
    for variant in RECORDED:
        assert torch.equal(tokens[variant], tokens["eager"]), variant


@pytest.mark.parametrize("variant", RECORDED)
def test_what_is_drawn_in_a_recording_has_the_model_s_probabilities(variant):
    model, prompt = model_with(torch.float32), make_ids(100, 8).to(DEVICE)
    with decoder_of(model, variant) as decoder:
        decoder.prefill(prompt)
        free = decoder.generate(1500, seed=0)
        few = decoder.generate(500, seed=0, top_k=3)
    ids = torch.cat([prompt, free, few], dim=1)
    _, hidden = score_stream(model, ids, S, W, engine="eager", return_hidden=True)
    log_p = model.get_output_embeddings()(hidden[:, 99:-1].to(DEVICE)).double().log_softmax(-1)
    drawn = log_p.gather(-1, ids[:, 100:, None])[..., 0]
    surplus = drawn[:, :1500] + torch.special.entr(log_p[:, :1500].exp()).sum(-1)  # 0 on average
    assert surplus.mean().abs() < 4.5 * surplus.std() / surplus.numel() ** 0.5
    third = log_p[:, 1500:].topk(3).values[..., -1]
    assert (drawn[:, 1500:] > third - 1e-3).all()
    assert (drawn[:, 1500:] < log_p[:, 1500:].amax(-1) - 1e-3).any()


@pytest.mark.parametrize("variant", RECORDED)
def test_memory_is_constant_to_the_byte(variant):
    ids = make_ids(1200).to(DEVICE)
    with decoder_of(model_with(torch.bfloat16, "flash"), variant) as decoder:
        decoder.prefill(ids[:, :100])

        def use() -> int:
            for token in ids[:, :200].unbind(1):
                decoder.step(token)
            decoder.score(ids)
            decoder.generate(600, seed=0)
            torch.cuda.synchronize(GPU)
            return torch.cuda.memory_allocated(GPU)

        use()
        warm = use()
        assert [use(), use()] == [warm, warm]  # 2,000 steps each


def test_no_garbage_is_collected_while_a_graph_is_recorded():
    seen = []

    def call() -> None:
        seen.append((torch.cuda.is_current_stream_capturing(), gc.isenabled()))
        torch.zeros(1, device=DEVICE)

    Recording(call, torch.empty(0, device=DEVICE).device)
    assert seen == [(False, True)] * WARM_UP + [(True, False)]
    assert gc.isenabled()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_comes_back_as_soon_as_a_decoder_goes(variant, batch):
    gc.disable()
    try:
        decoder = decoder_of(model_with(torch.bfloat16, "flash"), variant)
        decoder.prefill(make_ids(100, batch).to(DEVICE))
        decoder.score(make_ids(5, batch).to(DEVICE))
        decoder.generate(3)
        cache = weakref.ref(decoder.cache)
        decoder.close()
        del decoder
        assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", RECORDED)
def test_nothing_recorded_waits_for_the_device(variant):
    ids = make_ids(400).to(DEVICE)
    with decoder_of(model_with(torch.bfloat16, "flash"), variant) as decoder:
        decoder.prefill(ids[:, :100])

        def use() -> None:
            for token in ids[:, :20].unbind(1):
                decoder.step(token)
            decoder.score(ids)
            decoder.generate(50)

        use()
        with nothing_waits():
            use()


@pytest.mark.parametrize("variant", RECORDED)
def test_nothing_recorded_before_the_cache_is_full_waits_for_the_device(variant):
    ids = make_ids(60).to(DEVICE)
    with decoder_of(model_with(torch.bfloat16, "math"), variant) as decoder:

        def use() -> None:
            for token in ids[:, 20:30].unbind(1):
                decoder.step(token)
            decoder.score(ids[:, 30:40])
            decoder.generate(10)

        for watched in (contextlib.nullcontext, nothing_waits):
            decoder.reset()
            decoder.prefill(ids[:, :19])
            decoder.step(ids[:, 19])
            with watched():
                use()
        assert not decoder.cache.is_full
