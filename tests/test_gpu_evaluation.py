"""The evaluation on a GPU: the fast engine without being asked, and on a device that is not the current one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation_support import World

from experiments.methods import METHODS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_collection")]
ALL = [name for name, cls in METHODS.items() if cls.unavailable() is None]


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_streaming_is_faster_than_recomputation_without_options(tmp_path, backend):
    world = World(tmp_path)
    sizes = {"n_sink": 4, "window_size": 2044, "max_eval_tokens": 2112}
    options = {"model": "random:pythia-70m", "datasets": None, "device": None, "methods": ALL, "warmup_steps": 4}
    assert world.run(**options, **sizes, attn_backend_list=[backend], repeats=3).exit_code == 0
    path = world.output / "random-pythia-70m" / "final" / f"random_tokens_main_backend-{backend}.json"
    value = json.loads(path.read_text())
    engines = {name: value[name]["engine"] for name in ALL}
    assert engines["streaming"] == engines["window"] == engines["baseline"] != "eager"
    assert set(value["baselines"]) == set(engines.values())
    for name in ALL:
        own = value["baselines"][engines[name]]
        assert value[name]["speedup"] == own["runtime_sec"] / value[name]["runtime_sec"]
    assert value["streaming"]["speedup"] > 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("engine", ["auto", "eager", "graph"])
def test_the_second_device_gives_what_the_first_does(tmp_path, engine):
    perplexities = {}
    for device in ("cuda:1", "cuda:0"):
        world = World(tmp_path / device.replace(":", "-"))
        options = {"device": device, "dtype": "bfloat16", "methods": ALL, "engine": engine, "max_eval_tokens": 100}
        assert world.run(**options, attn_backend_list=["math", "flash"]).exit_code == 0
        values = [json.loads(path.read_text()) for path in sorted((world.root / "final").glob("*.json"))]
        perplexities[device] = [value[name]["perplexity"] for value in values for name in ALL]
    np.testing.assert_allclose(perplexities["cuda:1"], perplexities["cuda:0"], rtol=0.02)
