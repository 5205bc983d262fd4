"""GGUF files: weights, configuration, tokenizer and chat template in one file, as `--model` takes it."""

from __future__ import annotations

import shutil

import pytest
import torch
from evaluation_support import END, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from experiments.config import SetupError
from experiments.models import find_model

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
"""Transformers' names of tensors, and those in a file."""


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=260, tie_word_embeddings=False, **sizes, **heads)).eval()


def write_gguf(path, model: Qwen2ForCausalLM) -> None:
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    ids = {index: token for token, index in make_tokenizer().get_vocab().items()} | {
        257: "<|im_start|>",
        258: "Ġa",
        259: "Ġb",
    }
    kinds = {0: gguf.TokenType.CONTROL, 257: gguf.TokenType.CONTROL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([ids[index] for index in range(config.vocab_size)])
    writer.add_token_types([kinds.get(index, gguf.TokenType.NORMAL) for index in range(config.vocab_size)])
    writer.add_token_merges(["Ġ a", "Ġ b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        *before, part, kind = name.removeprefix("model.").split(".")
        block = f"blk.{before[1]}." if before else ""
        part = ".".join([*before[2:], part])
        writer.add_tensor(f"{block}{NAMES[part]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_gives_model_tokenizer_and_template(tmp_path, capsys):
    model, path = make_model(), tmp_path / "tiny.q8.gguf"
    write_gguf(path, model)
    source = find_model(str(path))
    assert (source.slug, source.weights) == ("tiny.q8", "trained")
    assert find_model(str(tmp_path)).fingerprint == source.fingerprint, "of a folder with one such file"
    loaded = source.load(torch.float32, CPU)
    ids = torch.tensor([loaded.tokenizer("Ärger? 42").input_ids])
    assert loaded.tokenizer.decode(ids[0]) == "Ärger? 42"
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert loaded.tokenizer.eos_token == END
    assert loaded.tokenizer.apply_chat_template([{"content": "a"}], tokenize=False) == "<|im_start|>a"
    assert len(loaded.tokenizer("<|im_start|>").input_ids) == 1
    assert capsys.readouterr().err == ""
    shutil.copy(path, tmp_path / "second.gguf")
    with pytest.raises(SetupError, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and then nothing")
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with pytest.raises(SetupError, match="pip install -U gguf"):
        find_model(str(path))
    monkeypatch.undo()
    pytest.importorskip("gguf")
    with pytest.raises(SetupError, match=r"broken\.gguf' could not be loaded"):
        find_model(str(path)).load(torch.float32, CPU)
