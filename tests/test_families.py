"""Every rotary family: exact on the unmodified model, in the wrapper, in generate() and in block scoring."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from family_models import HERE, LENGTH, POSITIONS, VOCAB, make_family, takes_sdpa
from family_reference import family_reference_logits
from streams import forward_in_blocks
from torch.nn.attention import SDPBackend, sdpa_kernel

from personal_adapters.neox_flash import unwrap_attention, wrap_attention
from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper, score_stream
from streaming_llm.families import bare_length

WINDOW = 48
KERNELS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
ON_A_BARE_CACHE = [
    (case, attention)
    for case in HERE
    for attention in ("sdpa", "eager")
    if attention == "eager" or (takes_sdpa(case) and case != "gemma2")  # whose soft-capping sdpa leaves out
]
SOFT_CAPPED = {"gemma2"}
EXPERTS = {case for case in HERE if "moe" in case or case == "mixtral"}  # slow: experts one by one

IDS = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@functools.cache
def reference(case: str, n_sink: int) -> torch.Tensor:
    return family_reference_logits(make_family(case), IDS, n_sink, WINDOW)


@functools.cache
def allowed_error(case: str) -> float:
    """Five times what float32 costs the dense model on the same tokens, and never more than 2e-5."""
    length = POSITIONS if case == "gptj" else LENGTH
    with torch.no_grad():
        exact, rounded = (
            make_family(case, dtype, "eager")(IDS[:, :length]).logits for dtype in (torch.float64, torch.float32)
        )
    assert 0.5 < exact.std() < 2
    return min(5 * (exact - rounded).abs().max().item(), 2e-5)


@pytest.mark.parametrize("case", HERE)
def test_the_reference_is_the_architecture(case):
    model, ids = make_family(case, torch.float64, "eager"), IDS[:, : WINDOW + 4]
    with torch.no_grad():
        dense = model(ids).logits
    assert (
        family_reference_logits(model, ids, 4, WINDOW) - dense
    ).abs().max() < 1e-5  # norms of theirs are in float32


@pytest.mark.slow
@pytest.mark.parametrize("case", HERE)
def test_the_test_can_fail(case):
    """Sinks matter to these models, and so does one token of the window."""
    right = reference(case, 4)[:, -1]
    others = [reference(case, 0)[:, -1], family_reference_logits(make_family(case), IDS, 4, WINDOW - 1)[:, -1]]
    assert all((right - other).abs().max() > 1e-3 for other in others)


def bare_cases():
    """All of them, of which those are fast that show most: eager attention shows wrong masks."""
    for (case, attention), n_sink in itertools.product(ON_A_BARE_CACHE, (0, 4)):
        fast = case not in EXPERTS and n_sink == 4 and attention == "eager"
        yield pytest.param(case, attention, n_sink, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("case", "attention", "n_sink"), bare_cases())
def test_token_by_token_on_the_unmodified_model(case, attention, n_sink):
    model = make_family(case, attention=attention)
    length = bare_length(model.config) or LENGTH
    cuts = (0, 20, n_sink + WINDOW + 1, *range(n_sink + WINDOW + 2, length + 1))
    logits = forward_in_blocks(model, StreamingKVCache(model.config, n_sink, WINDOW), IDS, cuts)
    assert (logits - reference(case, n_sink)[:, :length]).abs().max() < allowed_error(case)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", HERE)
def test_blocks_and_tokens_in_the_wrapper(case, kernel):
    if kernel == "flash" and case in SOFT_CAPPED:
        pytest.skip("no kernel soft-caps scores")
    cuts = (0, 10, 40, 130, 131, 132, 133, 260, LENGTH)
    for n_sink, attention in ((4, "sdpa"), (0, "eager")):
        model = make_family(case, attention=attention)
        with StreamingLLMWrapper(model, n_sink, WINDOW) as stream, sdpa_kernel(KERNELS[kernel]):
            logits = forward_in_blocks(model, stream.new_cache(), IDS, cuts)
        assert (logits - reference(case, n_sink)).abs().max() < allowed_error(case)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block_size", [50, 77])
@pytest.mark.parametrize("case", HERE)
def test_score_stream(case, kernel, block_size):
    if kernel == "flash" and case in SOFT_CAPPED:
        pytest.skip("no kernel soft-caps scores")
    with sdpa_kernel(KERNELS[kernel]):
        nll = score_stream(make_family(case), IDS, 4, WINDOW, block_size=block_size)
    expected = F.cross_entropy(reference(case, 4)[0, :-1], IDS[0, 1:], reduction="none")
    assert (nll[0] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("case", HERE)
def test_generate_and_the_decoder(case):
    model = make_family(case)
    with StreamingLLMWrapper(model, 4, WINDOW) as stream:
        out = stream.generate(IDS[:, :90], max_new_tokens=30, do_sample=False)
    greedy = family_reference_logits(model, out, 4, WINDOW).argmax(-1)
    assert torch.equal(out[:, 90:], greedy[:, 89:-1])
    with StreamingDecoder(model, 4, WINDOW) as decoder:
        first = decoder.prefill(IDS[:, :150])
        decoder.move_to(10_000_000)
        steps = torch.stack([decoder.step(IDS[:, t]) for t in range(150, 160)], dim=1)
    got, expected = torch.cat((first[:, None], steps), dim=1), reference(case, 4)[:, 149:160]
    assert (got - expected).abs().max() < allowed_error(case)


@pytest.mark.parametrize("case", [case for case in HERE if case not in SOFT_CAPPED])
def test_generate_on_a_bare_cache(case):
    model = make_family(case)
    cache = StreamingKVCache(model.config, 4, WINDOW)
    out = model.generate(IDS[:, :20], past_key_values=cache, max_new_tokens=60, do_sample=False)
    greedy = family_reference_logits(model, out, 4, WINDOW).argmax(-1)
    assert torch.equal(out[:, 20:], greedy[:, 19:-1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [case for case in HERE if takes_sdpa(case) or case in ("gptj", *SOFT_CAPPED)])
def test_the_adapter_wraps_every_family(case, kernel):
    model = make_family(case)
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    if kernel == "flash" and case in SOFT_CAPPED:
        with pytest.raises(ValueError, match="soft-caps"):
            wrap_attention(model, kernel)
        return
    assert wrap_attention(model, kernel) == model.config.num_hidden_layers
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    with StreamingLLMWrapper(model, 4, WINDOW) as stream:
        logits = forward_in_blocks(model, stream.new_cache(), IDS, (0, 100, 101, 102, 130))
    assert (logits - reference(case, 4)[:, :130]).abs().max() < allowed_error(case)
    assert unwrap_attention(model) == model.config.num_hidden_layers


@pytest.mark.parametrize("case", HERE)
def test_a_plain_forward_in_the_wrapper_is_the_models_own(case):
    model, ids = make_family(case), IDS[:, :130]  # longer than the sliding windows
    eager = make_family(case, attention="eager")
    with torch.no_grad():
        expected = eager(ids).logits
        with StreamingLLMWrapper(model, 4, WINDOW):
            assert (
                model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits - expected
            ).abs().max() < allowed_error(case)
        after = (eager if case in SOFT_CAPPED else model)(ids).logits
    assert (after - expected).abs().max() < allowed_error(case)
