"""What cannot stream is refused with its reason; what is special about a family holds at its limits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from family_models import HERE, SLIDING, VOCAB, make_config, make_family
from family_reference import family_reference_logits
from streams import decode, forward_in_blocks
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from personal_adapters.neox_flash import unwrap_attention, wrap_attention
from streaming_llm import StreamingConfig, StreamingDecoder, StreamingKVCache, StreamingLLMWrapper, score_stream
from streaming_llm.attachment import maskless_attention
from streaming_llm.families import (
    bare_length,
    layer_windows,
    rotaries_from_config,
    rotaries_from_model,
)

IDS = torch.randint(VOCAB, (1, 200), generator=torch.Generator().manual_seed(1))
MIXED = [case for case in HERE if None in (windows := layer_windows(make_config(case))) and any(windows)]
SLIDING_CASES = [case for case in HERE if any(layer_windows(make_config(case)))]
IN_BLOCKS = (0, 70, 71, 72, 150, 151, 200)


def in_blocks(model, cache, cuts=IN_BLOCKS) -> torch.Tensor:
    return forward_in_blocks(model, cache, IDS, cuts)


# Refusals


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("bloom", "ALiBi"), ("mpt", "ALiBi"), ("gpt2", "learned absolute positions"), ("opt", "learned absolute"),
     ("mamba", "recurrent"), ("bert", "python -m streaming_llm")],
)  # fmt: skip
def test_models_that_cannot_stream_are_refused_with_the_reason(model_type, reason):
    with pytest.raises(ValueError, match=f"'{model_type}' cannot stream: .*{reason}"):
        StreamingKVCache(transformers.AutoConfig.for_model(model_type), 4, 60)


def test_falcon_with_alibi_is_refused():
    with pytest.raises(ValueError, match=r"'falcon' cannot stream: .*ALiBi"):
        StreamingLLMWrapper(make_family("falcon", alibi=True), 4, 60)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scaling_that_depends_on_the_length_is_refused_beyond_it(kind):
    config = make_config("phi3", sliding_window=None)
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"  # newer, older name
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 80}
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    setattr(config, name, {**(getattr(config, name) or {}), **scaling, **lists})
    StreamingKVCache(config, 4, 75)
    with pytest.raises(ValueError, match=r"change beyond 80 tokens.*use n_sink \+ window_size < 80"):
        StreamingKVCache(config, 4, 76)


@pytest.mark.parametrize(
    ("case", "setting", "value", "message"),
    [
        ("llama", "layer_types", ["full_attention", "chunked_attention"], "layers of type chunked_attention"),
        ("gemma3", "use_bidirectional_attention", True, "bidirectional"),
    ],
)
def test_attention_of_another_kind_is_refused(case, setting, value, message):
    config = make_config(case)
    setattr(config, setting, value)
    with pytest.raises(ValueError, match=message):
        StreamingKVCache(config, 4, 48)


# Sliding windows of the model's own


def everywhere(window_size: int) -> StreamingConfig:
    """The rule of the stream in every layer."""
    return StreamingConfig(4, window_size, sliding_layers="stream")


@pytest.mark.parametrize("case", SLIDING_CASES)
def test_a_window_larger_than_the_layers_own_is_refused(case):
    model, config = make_family(case), everywhere(SLIDING + 1)
    for make in (StreamingLLMWrapper, StreamingDecoder):
        with pytest.raises(ValueError, match=f"window_size {SLIDING + 1} .* sliding window {SLIDING}"):
            make(model, config=config)
    with pytest.raises(ValueError, match=f"window_size {SLIDING + 1} .* sliding window {SLIDING}"):
        StreamingKVCache(model.config, config=config)


@pytest.mark.parametrize("case", SLIDING_CASES)
def test_the_largest_window_in_the_wrapper(case):
    """Sinks and window together are more than a sliding layer sees: the stream's rule holds in every layer."""
    model, config = make_family(case), everywhere(SLIDING)
    reference = family_reference_logits(model, IDS, 4, SLIDING, keep=False)
    with StreamingLLMWrapper(model, config=config) as stream:
        assert (in_blocks(model, stream.new_cache()) - reference).abs().max() < 2e-5
        assert (decode(model, stream.new_cache(), IDS[:, :200]) - reference).abs().max() < 2e-5
    with pytest.raises(ValueError, match="StreamingLLMWrapper"):  # the model's own masks would hide the rest
        decode(model, StreamingKVCache(model.config, config=config), IDS[:, :1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", SLIDING_CASES)
def test_the_largest_window_on_a_bare_cache(case, attention):
    if case == "gemma2":
        attention = "eager"
    model = make_family(case, attention=attention)
    logits = decode(model, StreamingKVCache(model.config, config=everywhere(SLIDING - 5)), IDS[:, :150])
    assert (logits - family_reference_logits(model, IDS[:, :150], 4, SLIDING - 5, keep=False)).abs().max() < 2e-5
    with pytest.raises(ValueError, match="StreamingLLMWrapper"):
        decode(model, StreamingKVCache(model.config, config=everywhere(SLIDING - 4)), IDS[:, :1])


@pytest.mark.parametrize("window_size", [SLIDING - 30, SLIDING + 40])
@pytest.mark.parametrize("case", MIXED)
def test_layers_with_a_window_of_their_own_keep_it(case, window_size, tmp_path):
    """Whatever the stream's window is; blocks, tokens, a saved stream, and a bare cache."""
    attention = "eager" if case == "gemma2" else "sdpa"
    model = make_family(case, attention=attention)
    reference = family_reference_logits(model, IDS, 4, window_size)
    with StreamingLLMWrapper(model, 4, window_size) as stream:
        cache = stream.new_cache()
        assert (in_blocks(model, cache) - reference).abs().max() < 2e-5
        assert sorted({layer.keys.shape[2] for layer in cache.layers}) == sorted({SLIDING, 4 + window_size + 1})
        assert (score_stream(model, IDS, 4, window_size) - losses(reference)).abs().max() < 2e-5
        cache = stream.new_cache()
        decode(model, cache, IDS[:, :120])
        cache.save(tmp_path / "stream.safetensors")
        cache = StreamingKVCache.load(tmp_path / "stream.safetensors", model)
        logits = decode(model, cache, IDS[:, 120:])
        assert (logits - reference[:, 120:]).abs().max() < 2e-5
    bare, first = StreamingKVCache(model.config, 4, window_size), 4 + window_size
    # A first block longer than the model's own window, where the stream's allows for it.
    assert (in_blocks(model, bare, (0, *range(first, 201))) - reference).abs().max() < 2e-5


def losses(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, IDS[:, 1:], reduction="none")


@pytest.mark.parametrize("case", HERE)
def test_without_masks_a_dense_model_stays_itself(case):
    """Sliding windows, soft-capping and layers with attention of their own, with and without a dense cache."""
    model, ids = make_family(case), IDS[:, :150]
    cuts = (0, 100, 101, 102, 150)
    with torch.no_grad():
        expected = make_family(case, attention="eager")(ids).logits
        with maskless_attention(model):
            assert (model(ids, use_cache=False).logits - expected).abs().max() < 2e-5
            if case == "phi3-longrope":  # a block that ends within the original length has other frequencies
                return
            for cache in (DynamicCache(), DynamicCache(config=model.config)):
                assert (in_blocks(model, cache, cuts) - expected).abs().max() < 2e-5


# Rotations


@pytest.mark.parametrize("case", HERE)
def test_configuration_and_model_agree_on_the_rotation_of_each_layer(case):
    model = make_family(case)
    built, loaded = rotaries_from_config(model.config), rotaries_from_model(model)
    assert len(built) == len(loaded) == model.config.num_hidden_layers
    for a, b in zip(built, loaded, strict=True):
        assert torch.equal(a.inv_freq, b.inv_freq)
        assert (a.interleaved, a.scaling) == (b.interleaved, b.scaling)
    with StreamingLLMWrapper(model, 4, 48):
        for a, b in zip(loaded, rotaries_from_model(model), strict=True):
            assert torch.equal(a.inv_freq, b.inv_freq)


@pytest.mark.parametrize("case", [case for case in ("gemma3", "cohere2", "smollm3") if case in HERE])
def test_layers_that_rotate_differently(case):
    model = make_family(case)
    first, second = rotaries_from_model(model)
    assert not torch.equal(first.inv_freq, second.inv_freq) or first.scaling != second.scaling
    cache = StreamingKVCache(model.config, 4, 48)
    assert cache.layers[0].rotation is not cache.layers[1].rotation


def test_layers_that_rotate_alike_share_the_work():
    cache = StreamingKVCache(make_config("llama"), 4, 48)
    assert cache.layers[0].rotation is cache.layers[1].rotation


@pytest.mark.parametrize("case", [case for case in ("gptj", "phi3-longrope", "llama-dynamic") if case in HERE])
def test_a_rotation_that_ends_or_changes_does_so_for_a_bare_stream_alone(case):
    model = make_family(case)
    cache = StreamingKVCache(model.config, 4, 48)
    length = bare_length(model.config)
    decode(model, cache, IDS[:, :length])
    with pytest.raises((ValueError, RuntimeError), match=rf"beyond the {length} |out of bounds"):
        model(IDS[:, :1], past_key_values=cache, use_cache=True)
    with StreamingLLMWrapper(model, 4, 48) as stream:
        reference = family_reference_logits(model, IDS, 4, 48)
        assert (decode(model, stream.new_cache(), IDS[:, :200]) - reference).abs().max() < 1e-5


# Soft-capping


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_soft_capped_scores_are_written_out_or_refused(attention):
    model = make_family("gemma2", attention=attention)
    reference = family_reference_logits(model, IDS, 4, 48)
    with StreamingLLMWrapper(model, 4, 48) as stream:
        assert (in_blocks(model, stream.new_cache()) - reference).abs().max() < 1e-5
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match=r"soft-caps.*allow math"):
            score_stream(model, IDS, 4, 48)


def test_a_bare_cache_does_not_leave_soft_capping_out():
    model = make_family("gemma2")
    if model.config._attn_implementation != "sdpa":
        pytest.skip("this Transformers does not offer it")
    with pytest.raises(ValueError, match="leaves out the soft-capping"):
        decode(model, StreamingKVCache(model.config, 4, 48), IDS[:, :1])


# Models as they come


def test_gemma3_with_a_vision_tower_streams_text():
    inner = make_family("gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=make_config("gemma3").to_dict(), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(inner.model.state_dict())
    model.lm_head.load_state_dict(inner.lm_head.state_dict())
    text_ids = IDS % (VOCAB - 4)
    reference = family_reference_logits(inner, text_ids, 4, 48)
    implementations = {id(c): c._attn_implementation for c in (config, config.text_config, config.vision_config)}
    with StreamingLLMWrapper(model, 4, 48) as stream, torch.no_grad():
        logits = forward_in_blocks(model, stream.new_cache(), text_ids, IN_BLOCKS)
        assert (logits - reference).abs().max() < 1e-5
    assert {
        id(c): c._attn_implementation for c in (config, config.text_config, config.vision_config)
    } == implementations
    assert wrap_attention(model, "flash") == unwrap_attention(model) == 2


@pytest.mark.parametrize("case", ["gptj", "falcon", "stablelm"])
def test_layers_with_attention_of_their_own_are_put_back(case):
    model = make_family(case)
    before = [dict(module.__dict__) for module in model.modules()]
    with torch.no_grad():
        expected = model(IDS[:, :50]).logits
        with StreamingLLMWrapper(model, 4, 48), maskless_attention(model), StreamingLLMWrapper(model, 0, 10):
            model(IDS[:, :50], attention_mask=torch.ones(1, 50))
        assert torch.equal(model(IDS[:, :50]).logits, expected)
    assert [dict(module.__dict__) for module in model.modules()] == before


@pytest.mark.parametrize("case", ["gptj", "falcon", "stablelm"])
def test_padding_is_refused_by_layers_with_attention_of_their_own(case):
    model, mask = make_family(case), torch.ones(1, 50)
    mask[0, :3] = 0
    with StreamingLLMWrapper(model, 4, 48), pytest.raises(ValueError, match="attention_mask hides tokens"):
        model(IDS[:, :50], attention_mask=mask)


def test_the_adapter_gives_gptj_a_kernel():
    model = make_family("gptj")
    with torch.no_grad():
        expected = model(IDS[:, :50]).logits
        for kernel in ("math", "flash"):
            assert wrap_attention(model, kernel) == 2
            assert 0 < (model(IDS[:, :50]).logits - expected).abs().max() < 1e-5
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(copied(IDS[:, :50]).logits, model(IDS[:, :50]).logits)
        wrap_attention(model, "cudnn")
        with pytest.raises(RuntimeError, match=r"No (viable backend|available kernel)"):
            model(IDS[:, :50])
        unwrap_attention(model)
        assert torch.equal(model(IDS[:, :50]).logits, expected)


@pytest.mark.parametrize("case", ["gemma3", "gptj"])
def test_a_copied_cache_goes_on_alone(case):
    model = make_family(case)
    with StreamingLLMWrapper(model, 4, 48) as stream:
        cache = stream.new_cache()
        in_blocks(model, cache, (0, 100, 101))
        other = copy.deepcopy(cache)
        expected = in_blocks(model, cache, (101, 102, 110))
        assert torch.equal(in_blocks(model, other, (101, 102, 110)), expected)
