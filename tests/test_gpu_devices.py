"""Every path on every device: on the second GPU while the first is current, and on a model spread over both.

What a path gives there is what it gives on the CPU in float32, to what the dtype costs; or it is refused by name.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_models import VOCAB, make_family
from torch import nn

from personal_adapters.neox_flash import unwrap_attention, wrap_attention
from streaming_llm import (
    ENGINES,
    StreamingDecoder,
    StreamingKVCache,
    StreamingLLMWrapper,
    resolve_engine,
    score_stream,
)
from streaming_llm.engines import why_not_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

S, W, PROMPT, LENGTH = 4, 60, 100, 300
CASES = ["llama", "gpt_neox"]
BACKENDS = ["math", "flash", None]  # None: no adapter
PLACES = ["cuda:0", "cuda:1", "both"]
SIZES = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "hidden_act": "gelu"},
}


def ids(batch: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def new_model(case: str) -> nn.Module:
    """Random weights, larger than the other tests' so that every kernel takes them."""
    config = make_family(case).config
    for name, value in SIZES[case].items():
        setattr(config, name, value)
    if hasattr(config, "head_dim"):
        config.head_dim = 32
    torch.manual_seed(0)
    model = type(make_family(case))(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    return model


@functools.cache
def expected(case: str) -> dict[str, torch.Tensor]:
    """Losses and logits in float32 on the CPU, of the weights rounded to bfloat16."""
    model = new_model(case).bfloat16().float()
    model_ids = ids()
    with StreamingDecoder(model, S, W) as decoder:
        logits = [decoder.prefill(model_ids[:, :PROMPT])]
        logits += [decoder.step(token) for token in model_ids[:, PROMPT:].unbind(1)]
    return {"losses": score_stream(model, model_ids, S, W), "logits": torch.stack(logits, dim=1)}


@functools.cache
def placed(case: str, place: str) -> nn.Module:
    model = new_model(case)
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    frequencies = rotary.inv_freq.clone()
    model = model.bfloat16()
    rotary.inv_freq = frequencies
    if place != "both":
        return model.to(place)
    from accelerate import dispatch_model, infer_auto_device_map

    no_split = model._no_split_modules
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    device_map = infer_auto_device_map(
        model, max_memory={0: int(0.6 * size), 1: size}, no_split_module_classes=no_split
    )
    assert set(device_map.values()) == {0, 1}, device_map
    return dispatch_model(model, device_map)


@pytest.fixture(params=[(c, p, b) for c in CASES for p in PLACES for b in BACKENDS], ids=str)
def setting(request):
    case, place, backend = request.param
    model = placed(case, place)
    unwrap_attention(model)
    if backend is not None:
        wrap_attention(model, backend)
    torch.cuda.set_device(0)
    yield case, place, model
    assert torch.cuda.current_device() == 0
    unwrap_attention(model)


def home(place: str) -> torch.device:
    return torch.device("cuda:0" if place == "both" else place)


def close(given: torch.Tensor, case: str, what: str, part: slice = slice(None)) -> None:
    error = (given.float().cpu() - expected(case)[what][:, part]).abs()
    assert given.isfinite().all()
    assert error.mean() < 0.03, error.mean()
    assert error.max() < 0.5, error.max()


def engines_here(model: nn.Module) -> list[str]:
    """Those that run this model; the others are refused by name before anything is computed."""
    names = [name for name in ENGINES if name != "graph+compile"]
    here = [name for name in names if why_not_engine(model, name) is None]
    for name in set(names) - set(here):
        with pytest.raises(ValueError, match=f"engine '{name}' cannot run: "):
            StreamingDecoder(model, S, W, name)
    return here


def test_which_engines_run(setting):
    _, place, model = setting
    here = engines_here(model)
    if place == "both":
        assert here == ["eager"]
        assert resolve_engine(model) == "eager"
    else:
        assert {"eager", "graph"} <= set(here)
        assert resolve_engine(model) in here
        assert resolve_engine(model) != "eager"


def test_losses_in_blocks(setting):
    case, _, model = setting
    for engine in {"auto", "eager"}:
        for block_size in (None, 37):
            losses = score_stream(model, ids(), S, W, block_size, engine=engine)
            assert losses.device.type == "cpu"
            close(losses, case, "losses")


def test_the_decoder(setting):
    case, place, model = setting
    tokens = ids().to(home(place))
    for engine in engines_here(model):
        with StreamingDecoder(model, S, W, engine) as decoder:
            logits = [decoder.prefill(tokens[:, :PROMPT])]
            logits += [decoder.step(token) for token in tokens[:, PROMPT:200].unbind(1)]
            close(torch.stack(logits, dim=1), case, "logits", slice(0, 101))
            losses = decoder.score(tokens[:, 200:])
            close(losses, case, "losses", slice(199, None))
            generated = decoder.generate(20, temperature=0)
            assert generated.shape == (1, 20)
            assert decoder.cache.n_seen == LENGTH + 20


def test_generate_and_a_short_prompt(setting):
    _, place, model = setting
    for engine in engines_here(model):
        for prompt in (20, 150):
            with StreamingLLMWrapper(model, S, W, engine) as stream:
                asked = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
                given = ids()[:, :prompt].to(home(place))
                out = stream.generate(given, max_new_tokens=100, output_logits=True, **asked)
                assert stream.engine_of_last_generate == engine
            # The tokens may part where two are near each other; the logits of those fed are right.
            logits = torch.stack(out.logits, dim=1).float().cpu()
            with StreamingDecoder(model, S, W, "eager") as decoder:
                again = [decoder.prefill(out.sequences[:, :prompt])]
                again += [decoder.step(token) for token in out.sequences[:, prompt:-1].unbind(1)]
            assert (logits - torch.stack(again, dim=1).float().cpu()).abs().mean() < 0.03


def test_saved_on_one_device_and_gone_on_with_on_another(setting, tmp_path):
    case, place, model = setting
    tokens = ids().to(home(place))
    for engine in engines_here(model):
        path = tmp_path / f"{engine}.safetensors"
        with StreamingDecoder(model, S, W, engine) as decoder:
            decoder.prefill(tokens[:, :150])
            for token in tokens[:, 150:170].unbind(1):
                decoder.step(token)
            decoder.save(path)
            here = torch.stack([decoder.step(token) for token in tokens[:, 170:200].unbind(1)], dim=1)
        with StreamingDecoder.load(path, model, engine) as decoder:
            again = torch.stack([decoder.step(token) for token in tokens[:, 170:200].unbind(1)], dim=1)
            assert torch.equal(here, again)
        other = placed(case, "cuda:1" if place == "cuda:0" else "cuda:0")
        device = next(other.parameters()).device
        cache = StreamingKVCache.load(path, other)
        assert {layer.keys.device for layer in cache.layers} == {device}
        with StreamingDecoder.load(path, other, "eager") as decoder:
            there = torch.stack([decoder.step(token) for token in tokens[:, 170:200].to(device).unbind(1)], dim=1)
        close(there, case, "logits", slice(171 - PROMPT, 201 - PROMPT))


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_split_over_two_processes(case, tmp_path):
    new_model(case).save_pretrained(tmp_path)
    script = Path(__file__).with_name("tensor_parallel_checks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tensor parallel: right") == 2
