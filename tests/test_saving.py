"""Saved streams go on with the same bits, in this process and another; files that do not fit are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU, make_ids, make_neox
from family_models import HERE, VOCAB, make_family
from safetensors.torch import load_file, safe_open, save_file
from streams import decode

from streaming_llm import StreamingDecoder, StreamingKVCache, StreamingLLMWrapper
from streaming_llm.saving import read, read_metadata

S, W = 4, 28
CAPACITY = S + W + 1


def same_after_saving(model, cache, path: Path, ids: torch.Tensor, load_from=None) -> None:
    """The cache and its saved copy give the same bits for ``ids``, token by token and, in the wrapper, in a block."""
    cache.save(path)
    copy = StreamingKVCache.load(path, model if load_from is None else load_from)
    assert copy.get_seq_length() == cache.get_seq_length()
    assert copy.nbytes == cache.nbytes
    assert torch.equal(decode(model, copy, ids), decode(model, cache, ids))
    if hasattr(model.config, "_attn_implementation") and model.config._attn_implementation.startswith("streaming"):
        with torch.no_grad():
            logits = [model(ids, past_key_values=c, use_cache=True).logits for c in (copy, cache)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("n_sink", [0, 1, S])
@pytest.mark.parametrize("seen", [1, 20, CAPACITY - 1, CAPACITY, CAPACITY + 1, 7 * CAPACITY + 5])
def test_goes_on_with_the_same_bits_on_an_unmodified_model(tmp_path, n_sink, seen):
    model, ids = make_neox(), make_ids(seen + 80)
    cache = StreamingKVCache(model.config, n_sink, CAPACITY - 1 - n_sink)
    decode(model, cache, ids[:, :seen])
    same_after_saving(model, cache, tmp_path / "stream.safetensors", ids[:, seen:], model.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seen", [20, 300])
def test_in_the_wrapper_in_blocks_and_after_a_move(tmp_path, dtype, seen):
    model, ids = make_neox(dtype), make_ids(seen + 50, batch=2)  # frequencies rounded with the weights, too
    with StreamingLLMWrapper(model, S, W) as stream:
        cache = stream.new_cache()
        stream.prefill(ids[:, :seen], cache)
        same_after_saving(model, cache, tmp_path / "stream.safetensors", ids[:, seen:])
        cache.move_to(10_000_000)
        same_after_saving(model, cache, tmp_path / "stream.safetensors", ids[:, seen:])


@pytest.mark.parametrize("seen", [20, 100])
def test_after_batch_operations_and_crop(tmp_path, seen):
    model, ids = make_neox(), make_ids(seen + 60, batch=3)
    cache = StreamingKVCache(model.config, S, W)
    decode(model, cache, ids[:, :seen])
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    if seen < CAPACITY:
        cache.crop(10)
    same_after_saving(model, cache, tmp_path / "stream.safetensors", ids[[1, 1, 0, 0], seen:])


@pytest.mark.parametrize("case", HERE)
def test_streams_of_every_family(tmp_path, case):
    model, ids = make_family(case), make_ids(150, vocab=VOCAB)
    with StreamingLLMWrapper(model, S, W) as stream:
        cache = stream.new_cache()
        stream.prefill(ids[:, :100], cache)
        same_after_saving(model, cache, tmp_path / "stream.safetensors", ids[:, 100:])


def test_the_model_may_be_wrapped(tmp_path):
    class Around(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    model, ids = make_neox(), make_ids(150)
    with StreamingLLMWrapper(model, S, W) as stream:
        cache = stream.new_cache()
        stream.prefill(ids[:, :100], cache)
        same_after_saving(model, cache, tmp_path / "stream.safetensors", ids[:, 100:], load_from=Around(model))


def test_a_stream_of_growing_buffers_allocates_as_before(tmp_path):
    model, ids = make_neox(), make_ids(400)
    cache = StreamingKVCache(model.config, 4, 10_000)
    decode(model, cache, ids[:, :300])
    cache.save(tmp_path / "stream.safetensors")
    copy = StreamingKVCache.load(tmp_path / "stream.safetensors", model)
    assert [layer.keys.stride() for layer in copy.layers] == [layer.keys.stride() for layer in cache.layers]
    assert (tmp_path / "stream.safetensors").stat().st_size < cache.nbytes + 4000, "only what is stored is written"
    assert torch.equal(decode(model, copy, ids[:, 300:]), decode(model, cache, ids[:, 300:]))


def test_an_empty_stream(tmp_path):
    model = make_neox()
    used = StreamingKVCache(model.config, S, W)
    decode(model, used, make_ids(50))
    used.reset()
    for cache in (StreamingKVCache(model.config, S, W), used):
        cache.move_to(77)
        same_after_saving(model, cache, tmp_path / "stream.safetensors", make_ids(60))


def test_saving_changes_nothing_and_is_no_view(tmp_path):
    model, ids = make_neox(), make_ids(200)
    cache, untouched = (StreamingKVCache(model.config, S, W) for _ in range(2))
    logits = []
    for at in range(0, 200, 10):
        logits.append(decode(model, cache, ids[:, at : at + 10]))
        cache.save(tmp_path / f"{at}.safetensors")
    assert torch.equal(torch.cat(logits, dim=1), decode(model, untouched, ids))
    copy = StreamingKVCache.load(tmp_path / "90.safetensors", model)
    copy.save(tmp_path / "again.safetensors")
    again, first = (read(tmp_path / f"{name}.safetensors") for name in ("again", "90"))
    assert again.facts == first.facts
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert torch.equal(decode(model, copy, ids[:, 100:110]), logits[10])


def test_into_a_cache_that_is_there_its_buffers_stay(tmp_path):
    model, ids = make_neox(), make_ids(200)
    path = tmp_path / "stream.safetensors"
    with StreamingDecoder(model, S, W) as decoder:
        decoder.prefill(ids[:, :120])
        decoder.cache.save(path)
        expected = decode(model, decoder.cache, ids[:, 120:])
        where = [layer.keys.data_ptr() for layer in decoder.cache.layers]
        decoder.restore(read(path))
        assert [layer.keys.data_ptr() for layer in decoder.cache.layers] == where
        assert torch.equal(decode(model, decoder.cache, ids[:, 120:]), expected)
        other = StreamingKVCache(model.config, S, W + 1)
        decode(model, other, ids[:, :50])
        before = read(path).facts["n_seen"]
        with pytest.raises(ValueError, match="window_size: 28 there, 29 here"):
            other.restore(read(path), device="cpu")
        assert (other.get_seq_length(), before) == (50, 120), "refused, and unchanged"


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import make_ids, make_neox
from streams import decode
from streaming_llm import StreamingKVCache
from streaming_llm.saving import read_metadata
model = make_neox()
cache = StreamingKVCache.load({path!r}, model)
ids = make_ids(200)[:, int(read_metadata({path!r})["next"]):]
torch.save(decode(model, cache, ids), {out!r})
"""


def test_in_another_process(tmp_path):
    model, ids = make_neox(), make_ids(200)
    cache = StreamingKVCache(model.config, S, W)
    decode(model, cache, ids[:, :110])
    path, out = tmp_path / "stream.safetensors", tmp_path / "logits.pt"
    cache.save(path, {"next": "110"})
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path), out=str(out))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert torch.equal(torch.load(out), decode(model, cache, ids[:, 110:]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_and_from_device_to_device(tmp_path, dtype):
    model, ids = make_neox(dtype).to(GPU), make_ids(300).to(GPU)
    path = tmp_path / "stream.safetensors"
    with StreamingLLMWrapper(model, S, W) as stream:
        cache = stream.new_cache()
        stream.prefill(ids[:, :150], cache)
        same_after_saving(model, cache, path, ids[:, 150:200])
        cache.save(path)
        on_gpu = decode(model, cache, ids[:, 200:])
    model.to("cpu")
    with StreamingLLMWrapper(model, S, W):
        on_cpu = decode(model, StreamingKVCache.load(path, model), ids[:, 200:].cpu())
    assert (on_gpu.cpu() - on_cpu).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("seen", [20, 150])
@pytest.mark.parametrize("engine", ["eager", "graph", "fused", "fused-triton"])
def test_every_engine_goes_on_with_the_same_bits(tmp_path, engine, seen):
    model, ids = make_neox(hidden_size=256, intermediate_size=512).to(GPU), make_ids(seen + 100).to(GPU)
    path = tmp_path / "stream.safetensors"

    def steps(decoder) -> torch.Tensor:
        return torch.stack([decoder.step(token).clone() for token in ids[:, seen:].unbind(1)])

    with StreamingDecoder(model, S, W, engine) as decoder:
        decoder.prefill(ids[:, :10])
        for token in ids[:, 10:seen].unbind(1):
            decoder.step(token)
        decoder.cache.save(path)
        expected = steps(decoder)
        decoder.restore(read(path))
        assert torch.equal(steps(decoder), expected), "the decoder that was there"
    with StreamingDecoder(model, S, W, engine) as decoder:
        decoder.restore(read(path))
        assert torch.equal(steps(decoder), expected), "a new one"


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def saved(tmp_path) -> Path:
    model = make_neox()
    cache = StreamingKVCache(model.config, S, W)
    decode(model, cache, make_ids(100))
    cache.save(tmp_path / "stream.safetensors", {"who": "a test"})
    return tmp_path / "stream.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers: 4 there, 3 here"),
        ({"num_attention_heads": 2}, "num_attention_heads: 4 there, 2 here"),
        ({"hidden_size": 32}, "hidden_size: 64 there, 32 here"),
        ({"rotary_pct": 0.25}, "inv_freq of the rotation in layer 0: 4 there, 2 here"),
        ({"rotary_emb_base": 20000}, "inv_freq of the rotation in layer 0: number 1 is 0.1.* there, 0.0"),
        ({"dtype": torch.bfloat16}, "inv_freq of the rotation"),
    ],
)
def test_a_stream_of_another_model_is_refused(saved, changes, message):
    model = make_neox(**changes)
    if "dtype" not in changes:
        with pytest.raises(ValueError, match=message):
            StreamingKVCache.load(saved, model.config)
    with pytest.raises(ValueError, match=message):
        StreamingKVCache.load(saved, model, dtype=model.dtype)


def test_another_dtype_is_refused_or_converted_on_demand(saved):
    model = make_neox()
    inv_freq = model.gpt_neox.rotary_emb.inv_freq.clone()
    model.to(torch.float64).gpt_neox.rotary_emb.inv_freq.copy_(inv_freq)
    with pytest.raises(ValueError, match=r"dtype: float32 there, float64 here; pass dtype=torch\.float64"):
        StreamingKVCache.load(saved, model)
    cache = StreamingKVCache.load(saved, model, dtype=torch.float64)
    assert cache.layers[0].keys.dtype == torch.float64
    more = make_ids(150)[:, 100:]
    reference = decode(make_neox(), StreamingKVCache.load(saved, make_neox()), more)
    assert (decode(model, cache, more) - reference).abs().max() < 1e-4


def test_another_family_is_refused(saved):
    facts = json.loads(safe_open(saved, "pt").metadata()["facts"])
    facts["model"]["model_type"] = "llama"
    rewrite(saved, facts=json.dumps(facts))
    with pytest.raises(ValueError, match="model_type: llama there, gpt_neox here"):
        StreamingKVCache.load(saved, make_neox())


def rewrite(path: Path, drop: str | None = None, **header: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(tensors, path, {**metadata, **header})


def changed_facts(path: Path, **changes) -> str:
    with safe_open(path, "pt") as file:
        return json.dumps(json.loads(file.metadata()["facts"]) | changes)


def test_files_that_are_no_stream_or_not_whole(saved, tmp_path):
    model, content, short = make_neox(), saved.read_bytes(), changed_facts(saved, slots=[17])

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            StreamingKVCache.load(saved, model)
        assert str(saved) in str(caught.value)

    for size in (0, 7, 300, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        refused("not a saved stream, or cut short")
    saved.write_text("once upon a time")
    refused("not a saved stream, or cut short")
    save_file({"0.keys": torch.zeros(3)}, saved)
    refused("a safetensors file, but not a saved stream")
    for header, message in (
        ({"version": "99"}, "version 99"),
        ({"facts": "{"}, "not a whole"),
        ({"facts": "{}"}, "n"),
        ({"facts": short}, "layers in slots: 1 there, 4 here"),
    ):
        saved.write_bytes(content)
        rewrite(saved, **header)
        refused(message)
    for name in ("2.values", "0.sink_keys"):
        saved.write_bytes(content)
        rewrite(saved, drop=name)
        refused(f"layer {name[0]} is not whole")
    with pytest.raises(FileNotFoundError):
        StreamingKVCache.load(tmp_path / "nowhere.safetensors", model)


def test_a_broken_forward_is_not_saved(tmp_path):
    model = make_neox()
    cache = StreamingKVCache(model.config, S, W)
    decode(model, cache, make_ids(5))
    cache.update(*torch.zeros(2, 1, 4, 1, 16), 0)  # the other layers have not had their turn
    with pytest.raises(RuntimeError, match="before its last layer"):
        cache.save(tmp_path / "stream.safetensors")


def test_a_failed_save_leaves_the_file_as_it_was(saved, monkeypatch):
    content = saved.read_bytes()
    assert read_metadata(saved) == {"who": "a test"}
    model = make_neox()
    cache = StreamingKVCache(model.config, S, W)
    decode(model, cache, make_ids(70))

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            cache.save(saved)
    assert saved.read_bytes() == content
    with pytest.raises(OSError, match="nowhere"):
        cache.save(saved.parent / "nowhere" / "stream.safetensors")
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
