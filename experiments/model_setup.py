"""What the scripts do with a model before they run it, and with what they measured of it."""

import hashlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments.config import ExperimentConfig, SetupError
from experiments.environment import device_name, environment
from experiments.measuring import Machine, resolve_machine
from experiments.models import LoadedModel, ModelSource, find_model
from experiments.plan import model_settings
from experiments.storage import now, write_json
from experiments.tokens import Beginning
from streaming_llm import StreamingConfig, StreamingDecoder


@dataclass(frozen=True)
class Subject:
    """A model that is loaded on its machine, with the sizes of its stream and what its texts begin with."""

    machine: Machine
    source: ModelSource
    loaded: LoadedModel
    streaming: StreamingConfig
    beginning: Beginning

    def facts(self) -> dict:
        """What every result says about the conditions of its figures."""
        sizes = {"n_sink": self.streaming.n_sink, "window_size": self.streaming.window_size}
        return {
            "model": self.source.name,
            "dtype": self.machine.dtype_name,
            "device": device_name(self.machine.device),
            "backend": self.machine.backends[0],
            "streaming_llm": sizes,
            "bos": self.beginning.record(),
        }


def set_up(config: ExperimentConfig) -> Subject:
    """Find and load the one model of a configuration; raises SetupError for what is wrong, random weights too."""
    machine, source = resolve_machine(config), find_model(config.model[0], config.seed)
    if source.weights == "random":
        raise SetupError(f"--model {source.name}: random weights have no text")
    loaded = machine.load(source)
    settings = model_settings(config, source, loaded)
    beginning = loaded.beginning(config.bos)
    if beginning.warning:
        print(f"warning: {beginning.warning}", file=sys.stderr)
    return Subject(machine, source, loaded, StreamingConfig(*settings.sizes), beginning)


def keep_result(path: Path | None, value: dict, machine: Machine, script: str, argv: list[str], seed: int) -> None:
    """Write what was measured, with what is needed to measure it again; nothing without a path."""
    if path is None:
        return
    command = shlex.join(["python", f"scripts/{script}", *argv])
    write_json(path, value | {"environment": environment(machine.device, command, seed), "timestamp": now()})
    print(f"wrote: {path}")


def make_decoder(loaded: LoadedModel, config: StreamingConfig, engine: str) -> StreamingDecoder:
    """A decoder of a loaded model; raises SetupError where the model cannot stream so, or the engine cannot run it."""
    sizes = (config.n_sink, config.window_size)
    try:
        return StreamingDecoder(loaded.model, *sizes, engine)
    except ValueError as error:
        raise SetupError(str(error)) from None


def weights_fingerprint(model: nn.Module) -> str:
    """Tells models of the same sizes apart, wherever they were loaded from: a hash of the first numbers of each
    parameter, in the dtype that it has."""
    heads = [parameter.detach().flatten()[:16].to("cpu", torch.float64) for parameter in model.parameters()]
    return hashlib.sha256(torch.cat(heads).numpy().tobytes()).hexdigest()
