"""One command line, checked: the model loaded, the texts read once, all that could be wrong found."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_setup import config_of, load_wrapped

from experiments.config import SetupError, at_least, settings_for
from experiments.environment import what_matters
from experiments.models import LoadedModel, ModelSource, find_model
from experiments.results import hash_of
from experiments.session import Machine, resolve_machine
from experiments.texts import RANDOM_TOKENS
from streaming_llm import StreamingConfig
from streaming_llm.engines.blocks import default_block_size

from .documents import Corpus, Survey, open_corpus
from .tokens import DocumentTokenizer, RandomStream, TokenStream


@dataclass(frozen=True)
class Job:
    """What is to be done, and everything that it is done with. `tail_start`: ids that begin a fresh stream."""

    options: argparse.Namespace
    source: ModelSource
    loaded: LoadedModel
    machine: Machine
    streaming: StreamingConfig
    block_size: int
    dataset: str
    survey: Survey
    stream: TokenStream | RandomStream
    tail_start: list[int]

    @property
    def backend(self) -> str:
        return self.machine.backends[0]

    @property
    def output(self) -> Path:
        return self.options.output

    @property
    def work(self) -> Path:
        """Holds checkpoint and losses until there is a result."""
        return self.output.with_name(f"{self.output.name}.resume")

    @property
    def token_nll_path(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.streaming.nll.npz")

    def identity(self) -> dict[str, Any]:
        """Everything that could change a figure; a checkpoint and a result with another identity are not used."""
        value = {
            "model": self.source.fingerprint,
            "data_sha256": self.survey.sha256,
            "documents": self.survey.documents,
            "max_tokens": self.options.max_tokens,
            "bos_per_document": self.options.bos_per_document,
            "fresh_tail": self.options.fresh_tail,
            "n_sink": self.streaming.n_sink,
            "window_size": self.streaming.window_size,
            "block_size": self.block_size,
            "backend": self.backend,
            "dtype": self.machine.dtype_name,
            "seed": self.options.seed,
            **what_matters(self.machine.device),
            "script_sources": _script_sources(),
        }
        return json.loads(json.dumps(value))  # plain values: torch's version is a class of its own

    @property
    def config_hash(self) -> str:
        return hash_of(self.identity())


def prepare(options: argparse.Namespace) -> Job:
    """Check a command line and load what it names.

    Raises:
        SetupError: something is wrong with an argument, a text or the model.
    """
    _check_numbers(options)
    _check_output(options.output)
    config = config_of(options)
    machine = resolve_machine(config)
    source = find_model(options.model, options.seed)
    is_random = source.weights == "random"
    _check_random(options, is_random)
    corpus = None if is_random else open_corpus(options.datasets or ["demo_encyclopaedia"])
    loaded = load_wrapped(source, machine)
    settings = settings_for(config, loaded.context_length, source.is_demo)
    stream, tail_start = _stream(options, loaded, corpus)
    return Job(
        options=options,
        source=source,
        loaded=loaded,
        machine=machine,
        streaming=StreamingConfig(settings.n_sink, settings.window_size),
        block_size=options.block_size or default_block_size(settings.window_size, loaded.model),
        dataset=RANDOM_TOKENS if corpus is None else corpus.name,
        survey=Survey(hashlib.sha256(b"").hexdigest(), 0, 1) if corpus is None else corpus.survey,
        stream=stream,
        tail_start=tail_start,
    )


def _check_numbers(options: argparse.Namespace) -> None:
    for name, low in {"max_tokens": 2, "block_size": 1, "seed": 0}.items():
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), low)
    if options.fresh_tail is not None and not 0 < options.fresh_tail < 1:
        raise SetupError(f"--fresh-tail must be above 0 and below 1, got {options.fresh_tail}")
    if not 0 <= options.checkpoint_every < math.inf:
        raise SetupError(f"--checkpoint-every must be 0 or more seconds, got {options.checkpoint_every}")


def _check_output(output: Path) -> None:
    if output.suffix != ".json":
        raise SetupError(f"--output {output}: the name must end in .json")
    if output.is_dir():
        raise SetupError(f"--output {output}: is a folder; name a file")


def _check_random(options: argparse.Namespace, is_random: bool) -> None:
    if not is_random:
        return
    if options.max_tokens is None:
        raise SetupError(f"model {options.model!r}: random tokens have no end, give --max-tokens")
    if options.datasets not in (None, [RANDOM_TOKENS]):
        raise SetupError(f"model {options.model!r} has no tokenizer: only --datasets {RANDOM_TOKENS}")
    for name in ("fresh_tail", "save_token_nll", "bos_per_document"):
        if getattr(options, name):
            raise SetupError(f"--{name.replace('_', '-')} says nothing about random weights")


def _stream(
    options: argparse.Namespace, loaded: LoadedModel, corpus: Corpus | None
) -> tuple[TokenStream | RandomStream, list[int]]:
    if corpus is None:
        return RandomStream(loaded.vocab_size, options.max_tokens, options.seed), []
    tokenizer = DocumentTokenizer(loaded.tokenizer)
    if options.fresh_tail is not None and tokenizer.start is None:
        raise SetupError("--fresh-tail: the tokenizer has no token that a fresh stream could begin with")
    return TokenStream(corpus, tokenizer, options.max_tokens, options.bos_per_document), tokenizer.start or []


def _script_sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hash_of({path.name: path.read_text(encoding="utf-8") for path in files})
