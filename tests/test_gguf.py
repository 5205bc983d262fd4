"""Models in GGUF files: the same weights and tokens, and one line for every file that is none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from evaluation_support import World, make_tokenizer

pytest.importorskip("gguf")

import gguf
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from experiments import gguf_files
from experiments.config import SetupError
from experiments.models import DEMO_FOLDER, find_model
from experiments.run_final_experiments import main

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=10000.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, model: Qwen2ForCausalLM, architecture: str = "qwen2") -> Path:
    """A GGUF file of a model with the demo's tokenizer."""
    config, tokenizer = model.config, json.loads((DEMO_FOLDER / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    writer.add_token_merges(pairs)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny-q.gguf", make_model())


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_gguf_file_is_the_model_it_was_written_from(file, by):
    source = find_model(str(file if by == "file" else file.parent))
    assert source.slug == "tiny-q"
    assert source.fingerprint == f"gguf:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    loaded, model = source.load(torch.float32, torch.device("cpu")), make_model()
    ids = torch.arange(5, 90)[None]
    assert (loaded.model(ids).logits - model(ids).logits).abs().max() < 1e-4
    text = "The lamp was lit, and the keeper of the light went down the stairs."
    assert loaded.tokenizer.tokenize(text) == AutoTokenizer.from_pretrained(DEMO_FOLDER).tokenize(text)
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.context_length == 128


def test_a_file_s_long_header_is_read_once_for_each_of_configuration_tokenizer_and_weights(file, monkeypatch):
    opened, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path, *rest: opened.append(path) or reader(path, *rest))
    source = find_model(str(file))
    source.info()
    source.info()
    source.load(torch.float32, torch.device("cpu"))
    assert len(opened) == 3


@pytest.mark.usefixtures("no_collection")
def test_the_evaluation_runs_on_a_gguf_file(file, tmp_path):
    world = World(tmp_path / "world")
    summary = world.run(model=str(file))
    assert summary.exit_code == 0
    result = json.loads((world.output / "tiny-q" / "final" / "one_main_backend-math.json").read_text())
    assert result["model"] == str(file)
    assert result["streaming"]["perplexity"] > 1


def test_a_file_that_changes_is_another_model(file):
    source = find_model(str(file))
    with file.open("ab") as there:
        there.write(b"\0")
    assert find_model(str(file)).fingerprint != source.fingerprint
    with pytest.raises(SetupError, match="are not those of the model"):
        source.info()
    file.unlink()
    with pytest.raises(SetupError, match=r"no file tiny-q.gguf in"):
        source.info()


def broken(path: Path, kind: str) -> Path:
    whole = write_gguf(path / "whole.gguf", make_model()).read_bytes()
    file = path / f"{kind}.gguf"
    file.write_bytes({"empty": b"", "text": b"no model at all", "header": whole[:700], "tensors": whole[:-9000]}[kind])
    return file


@pytest.mark.parametrize("kind", ["empty", "text", "header", "tensors"])
def test_a_broken_file_is_one_line(tmp_path, kind, capsys):
    file = broken(tmp_path, kind)
    assert main(["--model", str(file), "--dry-run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: model '{file}' could not be loaded")


def test_a_tokenizer_of_single_characters_is_refused(file, monkeypatch):
    gguf_files.read_gguf.cache_clear()
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: make_tokenizer())
    with pytest.raises(SetupError, match=r"makes \d+ tokens of \d+ characters of English"):
        find_model(str(file)).info()


@pytest.mark.parametrize("architecture", ["gpt2", "nosuchmodel"])
def test_an_architecture_that_cannot_stream_is_refused(tmp_path, architecture):
    file = write_gguf(tmp_path / "other.gguf", make_model(), architecture)
    with pytest.raises(SetupError, match=r"could not be loaded: ValueError: .*(gpt2|GPT2|nosuchmodel)"):
        find_model(str(file)).info()


def test_several_files_in_a_folder_and_a_missing_package_are_named(file, monkeypatch):
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install -e '\.\[gguf\]' in the checkout"):
        find_model(str(file))
    file.with_name("second.gguf").write_bytes(b"")
    with pytest.raises(SetupError, match=r"several GGUF files \(second.gguf, tiny-q.gguf\): name one of them"):
        find_model(str(file.parent))
