"""Models whose weights torchao quantises once they are loaded: an optional extra, imported where it is used."""

from dataclasses import dataclass
from importlib.metadata import version

import torch

from experiments.config import SetupError
from experiments.models import LoadedModel, ModelSource

KINDS = {"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig"}
"""Name -> torchao's configuration, with its own defaults."""


@dataclass(frozen=True)
class QuantisedSource:
    """A model's source, and what its weights are quantised to: a name of `KINDS`."""

    source: ModelSource
    kind: str

    @property
    def name(self) -> str:
        return f"{self.source.name}, {self.kind}"

    @property
    def weights(self) -> str:
        return self.source.weights

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}, {self.kind} by torchao {version('torchao')}"

    def load(self, dtype: torch.dtype, device: torch.device) -> LoadedModel:
        """The model on a device; raises SetupError where it cannot be loaded or quantised."""
        quantization = torchao()
        loaded = self.source.load(dtype, device)
        try:
            quantization.quantize_(loaded.model, getattr(quantization, KINDS[self.kind])())
        except (ImportError, AssertionError) as error:  # int4 needs mslk
            raise SetupError(f"torchao cannot quantise {self.source.name} to {self.kind}: {error}") from None
        return loaded


def torchao():
    """torchao's module of that name; raises SetupError where it is not installed."""
    try:
        import torchao.quantization
    except ImportError as error:
        raise SetupError(f"--quantize needs torchao (pip install -e '.[quantize]'): {error}") from None
    return torchao.quantization
