"""The ways that users of Transformers take to `generate`: its own hook, the hub's layout, pipelines, chat, threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from conftest import make_ids, make_neox
from reference import reference_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, TextIteratorStreamer, pipeline

import streaming_llm
from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper, streaming_generate

DEMO = Path(__file__).resolve().parents[1] / "experiments" / "assets" / "demo_model"
HUB = Path(streaming_llm.__file__).parent / "hub"
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SIZES = {"n_sink": 4, "window_size": 30}


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(DEMO).eval(), AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("prompt", [1, 20, 200])
@pytest.mark.parametrize("custom", [streaming_generate, str(HUB)], ids=["function", "folder"])
def test_transformers_own_hook(custom, prompt):
    model, ids = make_neox(), make_ids(prompt, batch=2)
    trust = {"trust_remote_code": True} if isinstance(custom, str) else {}
    out = model.generate(ids, custom_generate=custom, max_new_tokens=60, **SIZES, **trust, **GREEDY)
    assert torch.equal(out[:, prompt:], reference_logits(model, out, 4, 30).argmax(-1)[:, prompt - 1 : -1])
    assert "forward" not in vars(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 3},
        {"return_dict_in_generate": True, "output_logits": True, "output_scores": True},
    ],
    ids=str,
)
def test_the_hook_does_what_the_wrapper_does(asked):
    model, ids = make_neox(), make_ids(50, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    asked = {**GREEDY, "max_new_tokens": 40, "attention_mask": mask, **asked}
    torch.manual_seed(0)
    by_hook = model.generate(ids, custom_generate=streaming_generate, **SIZES, **asked)
    torch.manual_seed(0)
    with StreamingLLMWrapper(model, 4, 30) as stream:
        by_wrapper = stream.generate(ids, **asked)
    if "output_logits" in asked:
        assert isinstance(by_hook.past_key_values, StreamingKVCache)
        assert all(map(torch.equal, by_hook.logits, by_wrapper.logits))
        by_hook, by_wrapper = by_hook.sequences, by_wrapper.sequences
    assert torch.equal(by_hook, by_wrapper)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"use_cache": False}, "use_cache"),
        ({"attention_mask": torch.ones(1, 60)}, "attention_mask covers 60 tokens"),
    ],
    ids=lambda asked: next(iter(asked)) if isinstance(asked, dict) else "",
)
def test_the_hook_refuses_what_it_would_not_do(asked, says):
    model = make_neox()
    with pytest.raises(ValueError, match=says):
        model.generate(make_ids(50), custom_generate=streaming_generate, max_new_tokens=5, **SIZES, **GREEDY, **asked)
    assert model.config._attn_implementation == "sdpa"


def test_the_hook_refuses_a_stream_to_go_on_with():
    model = make_neox()
    with StreamingLLMWrapper(model, 4, 30) as stream:
        asked = {"past_key_values": stream.new_cache(), "max_new_tokens": 5, **SIZES, **GREEDY}
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(make_ids(50), custom_generate=streaming_generate, **asked)


def test_a_text_generation_pipeline(demo):
    model, tokenizer = demo
    prompts = ["The lighthouse", "In the middle of the night, when nobody was awake,"]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    asked = {"do_sample": False, "max_new_tokens": 30, "custom_generate": streaming_generate, **SIZES}
    together = generator(prompts, batch_size=2, **asked)
    for (given,), prompt in zip(together, prompts, strict=True):
        assert given["generated_text"] == generator(prompt, **asked)[0]["generated_text"]
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with StreamingDecoder(model, 4, 30) as decoder:
            decoder.prefill(ids)
            tokens = decoder.generate(30, temperature=0, eos_token_id=model.generation_config.eos_token_id)
        assert given["generated_text"].startswith(prompt)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True) in given["generated_text"]


def test_a_chat_template_and_a_streamer_in_a_thread(demo):
    model, tokenizer = demo
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": "Where is the lighthouse?"}]
    inputs = tokenizer.apply_chat_template(chat, chat_template=template, return_tensors="pt", return_dict=True)
    streamer, said = TextIteratorStreamer(tokenizer, skip_prompt=True), []
    with StreamingLLMWrapper(model, 4, 30) as stream:
        expected = stream.generate(**inputs, max_new_tokens=40, do_sample=False)
        thread = threading.Thread(
            target=stream.generate, kwargs={**inputs, "max_new_tokens": 40, "do_sample": False, "streamer": streamer}
        )
        thread.start()
        said = list(streamer)
        thread.join()
    assert len(said) > 10
    assert "".join(said) == tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])


class Suppressed(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(50, device=scores.device), -torch.inf)


def test_what_only_the_models_call_gives_says_so():
    model, ids, seen = make_neox(), make_ids(40), []
    with StreamingLLMWrapper(model, 4, 30) as stream:
        stream.generate(ids, max_new_tokens=5, **GREEDY)
        assert (stream.engine_of_last_generate, stream.why_eager) == (stream.engine, None)
        out = stream.generate(ids, max_new_tokens=5, output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
        assert "output_hidden_states" in stream.why_eager
        assert len(out.hidden_states) == 5
        hook = model.gpt_neox.layers[0].register_forward_hook(lambda *args: seen.append(1))
        stream.generate(ids, max_new_tokens=5, **GREEDY)
        hook.remove()
        assert "hooks" in stream.why_eager
        assert len(seen) == 5
        out = stream.generate(ids, max_new_tokens=5, logits_processor=[Suppressed()], **GREEDY)
        assert stream.why_eager is None
        assert (out[:, 40:] >= 50).all()
