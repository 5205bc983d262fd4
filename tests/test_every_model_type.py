"""Every model type of the installed Transformers: it streams exactly, or is refused for a true reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from every_model import model_types, tiny_config, tiny_model
from every_model_table import DOCUMENT, IDS, LENGTH, N_SINK, allowed_error, in_blocks, largest_errors, table, verdict
from streamed_reference import streamed_logits
from transformers.models.llama import modeling_llama

from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper, score_stream, supported_families
from streaming_llm.families import family_of_model
from streaming_llm.families.table import OUTER, STREAMING

HERE = set(model_types())
SPREAD = [
    "cohere2", "deepseek_v3", "falcon_h1", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss",
    "granitemoehybrid", "jamba", "lfm2", "nanochat", "qwen3_5_text", "qwen3_next",
]  # fmt: skip
"""Each with something that the others do not have."""

SPREAD = [name for name in SPREAD if name in HERE and name in supported_families()]
WITH_STATE = [name for name in SPREAD if name in ("falcon_h1", "granitemoehybrid", "jamba", "lfm2", "qwen3_next")]
MIXED = [name for name in SPREAD if name in ("cohere2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss")]


def reference_of(model) -> tuple[torch.Tensor, float]:
    """The reference for a model, and how far from it a path may be."""
    reference = streamed_logits(model, IDS, N_SINK, 16)
    return reference, allowed_error(model, reference, 16)


@pytest.mark.parametrize("model_type", SPREAD)
def test_a_spread_of_kinds_is_exact(model_type):
    errors, allowed = largest_errors(tiny_model(model_type).double(), 16)
    assert max(errors.values()) < allowed, errors


@pytest.mark.parametrize("model_type", MIXED)
def test_a_window_larger_than_the_models_own(model_type):
    errors, allowed = largest_errors(tiny_model(model_type).double(), 40)
    assert max(errors.values()) < allowed, errors


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(HERE))
def test_every_model_type(model_type):
    streams, about = verdict(model_type)
    assert about
    if model_type in OUTER:
        assert streams == "with it"
        assert about.split()[-1] in supported_families()
    else:
        assert streams == "yes" or model_type not in supported_families(), about


@pytest.mark.slow
def test_the_document_is_what_the_tests_find():
    written = DOCUMENT.read_text(encoding="utf-8")
    if f"Transformers {transformers.__version__} " not in written:
        pytest.skip("it is of another version of Transformers")
    verdicts = [[line.split("|")[1:3] for line in text.splitlines() if line[:1] == "|"] for text in (table(), written)]
    assert verdicts[0] == verdicts[1]


def test_the_known_families_are_those_of_the_document():
    rows = [line.split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    streaming = {row[0].removeprefix("| ") for row in rows if row[1] == "yes"}
    assert len(streaming) >= 60
    assert set(STREAMING) == streaming | set(OUTER)


@torch.no_grad()
@pytest.mark.parametrize("model_type", SPREAD)
def test_a_saved_stream_goes_on(model_type, tmp_path):
    model = tiny_model(model_type).double()
    (reference, allowed), path = reference_of(model), tmp_path / "stream.safetensors"
    with StreamingLLMWrapper(model, N_SINK, 16) as stream:
        cache = stream.new_cache()
        in_blocks(model, cache, (0, 60))
        cache.save(path)
        cache = StreamingKVCache.load(path, model)
        logits = in_blocks(model, cache, range(60, LENGTH + 1))
    assert (logits - reference[:, 60:]).abs().max() < allowed


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*WITH_STATE, *MIXED])
def test_rows_of_unequal_length_scores_and_the_decoder(model_type):
    model = tiny_model(model_type).double()
    reference, allowed = reference_of(model)
    ids, mask = IDS[:, :70].repeat(2, 1), torch.ones(2, 70, dtype=torch.int64)
    mask[1, 50:] = 0
    with StreamingDecoder(model, N_SINK, 16) as decoder:
        logits = decoder.prefill(ids, attention_mask=mask)
        assert (logits - reference[0, [69, 49]]).abs().max() < allowed
        for step in range(3):
            logits = decoder.step(IDS[0, [70 + step, 50 + step]])
            assert (logits - reference[0, [70 + step, 50 + step]]).abs().max() < allowed
        decoder.cache.reorder_cache(torch.tensor([1, 0]))
        logits = decoder.step(IDS[0, [53, 73]])
        assert (logits - reference[0, [53, 73]]).abs().max() < allowed
    nll = score_stream(model, IDS, N_SINK, 16, block_size=40)
    expected = torch.nn.functional.cross_entropy(reference[0, :-1], IDS[0, 1:], reduction="none")
    assert (nll[0] - expected).abs().max() < allowed


@torch.no_grad()
@pytest.mark.parametrize("model_type", WITH_STATE)
def test_a_prompt_shorter_than_a_convolution(model_type):
    model = tiny_model(model_type).double()
    reference, allowed = reference_of(model)
    for n, position in ((1, 0), (2, 0), (3, 0), (2, 1000)):
        with StreamingDecoder(model, N_SINK, 16) as decoder:
            decoder.move_to(position)
            decoder.prefill(IDS[:, :n])
            logits = [decoder.step(token) for token in IDS[:, n:12].unbind(1)]
        assert (torch.stack(logits, dim=1) - reference[:, n:12]).abs().max() < allowed


@torch.no_grad()
@pytest.mark.parametrize("model_type", WITH_STATE)
def test_beams_are_those_of_two_rows_alone(model_type):
    model = tiny_model(model_type).double()
    with StreamingLLMWrapper(model, N_SINK, 16) as stream:
        out = stream.generate(IDS[:, :30], max_new_tokens=12, num_beams=2, do_sample=False, eos_token_id=None,
                              return_dict_in_generate=True, output_scores=True)  # fmt: skip
    logits = streamed_logits(model, out.sequences, N_SINK, 16)[0, 29:-1].log_softmax(-1)
    allowed = reference_of(model)[1]
    score = logits.gather(1, out.sequences[0, 30:, None]).sum() / 12
    assert (score - out.sequences_scores[0]).abs() < allowed


@pytest.mark.parametrize("model_type", WITH_STATE[:1])
def test_what_a_state_cannot_do_is_refused(model_type):
    model = tiny_model(model_type)
    with pytest.raises(ValueError, match=r"recurrent layers.*StreamingLLMWrapper"):
        StreamingKVCache.from_model(model, 4, 16).begin(1)
    with StreamingLLMWrapper(model, 4, 16) as stream:
        with pytest.raises(ValueError, match="drafted tokens cannot be taken back"):
            stream.generate(IDS[:, :20], max_new_tokens=4, prompt_lookup_num_tokens=2)
        cache = stream.new_cache()
        stream.prefill(IDS[:, :20], cache)
        with pytest.raises(ValueError, match="cannot be taken back"):
            cache.crop(19)


@pytest.mark.parametrize("model_type", WITH_STATE)
def test_a_row_that_has_ended_stays_where_it_is(model_type):
    model = tiny_model(model_type).double()
    prompts = torch.stack((IDS[0, :30], IDS[0, 10:40]))
    with StreamingDecoder(model, N_SINK, 16) as decoder:
        decoder.prefill(prompts)
        ends = int(decoder.generate(4, temperature=0)[0, 1])
    with StreamingDecoder(model, N_SINK, 16) as decoder:
        decoder.prefill(prompts)
        tokens = decoder.generate(8, temperature=0, eos_token_id=ends)
        logits = decoder.step(IDS[0, [60, 60]])
    length = (tokens[0] == ends).nonzero()[0, 0] + 1
    allowed = reference_of(model)[1]
    alone = torch.cat((prompts[:1], tokens[:1, :length], IDS[:, 60:61]), dim=1)
    assert (logits[0] - streamed_logits(model, alone, N_SINK, 16)[0, -1]).abs().max() < allowed


# A family that lies


class LyingAttention(modeling_llama.LlamaAttention):
    """Turns keys and queries by other angles than its model's rotary module gives."""

    def forward(self, hidden_states, position_embeddings, *args, **kwargs):
        cos, sin = position_embeddings
        twice = 2 * cos**2 - 1, 2 * sin * cos
        return super().forward(hidden_states, twice, *args, **kwargs)


class LyingModel(modeling_llama.LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = LyingAttention(config, index)


class LyingForCausalLM(modeling_llama.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = LyingModel(config)


def test_a_model_that_rotates_otherwise_than_its_module_says_is_refused():
    model = LyingForCausalLM(tiny_model("llama").config).eval()
    with pytest.raises(
        ValueError, match=r"layer 0 rotates its keys otherwise .* is off by [0-9.e+-]+ of a key's size"
    ):
        StreamingLLMWrapper(model, 4, 16)


def test_measuring_leaves_random_numbers_alone_and_is_done_once():
    model = tiny_model("llama", max_position_embeddings=777)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    family = family_of_model(model)
    assert torch.equal(torch.rand(3), expected)
    assert family_of_model(tiny_model("llama", max_position_embeddings=777)) is family


# Language models inside multimodal ones

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1}
VISION |= {"image_size": 28, "patch_size": 14, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
MULTIMODAL = {
    "qwen3_vl": (
        "qwen3_vl_text",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}, "head_dim": 8},
    ),
    "mistral3": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}),
}
"""Model type -> the type of its language model, and what its configuration needs."""
if transformers.__version__.startswith("4."):
    del MULTIMODAL["qwen2_5_vl"]  # whose positions of a second block end in an error there


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(MULTIMODAL))
def test_the_language_model_of_a_multimodal_one_streams_over_text(model_type):
    text_type, differences = MULTIMODAL[model_type]
    if text_type not in transformers.CONFIG_MAPPING:
        pytest.skip("this Transformers has no configuration of it")
    text = tiny_config(text_type, **differences)
    kind = transformers.CONFIG_MAPPING[model_type]
    config = kind(
        text_config=text.to_dict(), vision_config=VISION, tie_word_embeddings=False, vision_start_token_id=100
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval().double()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "language_model" in name:
            parameter.normal_(std=0.15)
    reference = streamed_logits(model, IDS, N_SINK, 16)
    with StreamingLLMWrapper(model, N_SINK, 16) as stream:
        logits = in_blocks(model, stream.new_cache(), (0, 33, 34, 35, 70, LENGTH))
        assert (logits - reference).abs().max() < 1e-6 * reference.abs().max().clamp(min=1)
        out = stream.generate(IDS[:, :40], max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(out[:, 40:], streamed_logits(model, out, N_SINK, 16)[:, 39:-1].argmax(-1))
        pixels = torch.zeros(1, 3, 28, 28)
        with pytest.raises(ValueError, match="a stream is of text, and pixel_values was given"):
            stream.generate(IDS[:, :40], pixel_values=pixels, max_new_tokens=1)
        with pytest.raises(ValueError, match="a stream is of text, and pixel_values was given"):
            model(input_ids=IDS[:, :40], pixel_values=pixels, past_key_values=stream.new_cache())
