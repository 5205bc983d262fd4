"""What the scripts do with a model before they run it."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from pathlib import Path

import torch
from torch import nn

from experiments.config import ExperimentConfig, SetupError, settings_for
from experiments.environment import environment
from experiments.methods import head_dim
from experiments.models import LoadedModel, ModelSource, find_model
from experiments.results import now
from experiments.session import Machine, resolve_machine
from experiments.storage import write_json
from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import check_backend_available
from streaming_llm import StreamingConfig, StreamingDecoder


def config_of(options: argparse.Namespace) -> ExperimentConfig:
    """The settings of a script's command line that are the evaluation's too."""
    names = ("model", "dtype", "device", "n_sink", "window_size", "decode_engine", "seed")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return ExperimentConfig(attn_backend_list=options.attn_backend, **given)


def load_trained(options: argparse.Namespace) -> tuple[Machine, LoadedModel, StreamingConfig]:
    """Where to measure, a model whose text means something, and the sizes of its stream.

    Raises:
        SetupError: something is wrong with an option or the model, or its weights are random.
    """
    config = config_of(options)
    machine, source = resolve_machine(config), find_model(options.model)
    if source.weights == "random":
        raise SetupError(f"--model {options.model}: random weights have no text")
    loaded = load_wrapped(source, machine)
    settings = settings_for(config, loaded.context_length, source.is_demo)
    return machine, loaded, StreamingConfig(settings.n_sink, settings.window_size)


def keep_result(path: Path | None, value: dict, machine: Machine, script: str, argv: list[str], seed: int) -> None:
    """Write what was measured, with what is needed to measure it again; nothing without a path."""
    if path is None:
        return
    command = shlex.join(["python", f"scripts/{script}", *argv])
    where = environment(machine.device, command, seed, kvpress_imported=False)
    write_json(path, value | {"environment": where, "timestamp": now()})
    print(f"wrote: {path}")


def load_wrapped(source: ModelSource, machine: Machine) -> LoadedModel:
    """Load a model, with its attention wrapped for the machine's first backend.

    Raises:
        SetupError: it cannot be loaded, or the backend cannot run it.
    """
    loaded = source.load(machine.dtype, machine.device)
    wrap_loaded(loaded, source, machine, machine.backends[0])
    return loaded


def wrap_loaded(loaded: LoadedModel, source: ModelSource, machine: Machine, backend: str) -> None:
    """Wrap the attention of a loaded model for one backend.

    Raises:
        SetupError: the backend cannot run it.
    """
    available = check_backend_available(backend, machine.dtype, machine.device, head_dim(loaded.model.config))
    if not available:
        raise SetupError(f"attention backend {backend!r} cannot run {source.name!r}: {available.reason}")
    try:
        wrap_attention(loaded.model, backend)
    except ValueError as error:
        raise SetupError(f"model {source.name!r} cannot be used: {error}") from None


def make_decoder(loaded: LoadedModel, config: StreamingConfig, engine: str) -> StreamingDecoder:
    """A decoder of a loaded model.

    Raises:
        SetupError: the model cannot stream so, or the engine cannot run it.
    """
    try:
        return StreamingDecoder(loaded.model, engine=engine, config=config)
    except ValueError as error:
        raise SetupError(str(error)) from None


def weights_fingerprint(model: nn.Module) -> str:
    """Tells models of the same sizes apart, wherever they were loaded from: a hash of the first numbers of each
    parameter, in the dtype that it has."""
    heads = [parameter.detach().flatten()[:16].to("cpu", torch.float64) for parameter in model.parameters()]
    return hashlib.sha256(torch.cat(heads).numpy().tobytes()).hexdigest()
