"""StreamingLLM as a model of lm-evaluation-harness: its tasks, on streams of any length, in constant memory.

A document is one exact stream instead of windows that are cut from it, and a context is never truncated. How texts
become tokens, chat templates, request caches and result files are lm-eval's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from experiments.config import ExperimentConfig, SetupError, unknown_name
from experiments.measuring import resolve_machine
from experiments.models import find_model
from experiments.plan import model_settings
from experiments.stream_states import block_size_for, judged, states_at
from streaming_llm import StreamingConfig, StreamingLLMWrapper, resolve_block_engine, score_stream
from streaming_llm.engines.blocks import block_forward

NAME = "streaming"
OF_HFLM = (
    "logits_cache", "max_length", "add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking",
    "chat_template_args",
)  # fmt: skip
"""Arguments of lm-eval's Hugging Face model that mean the same here."""
OWN = ("n_sink", "window_size", "attn_backend", "engine", "dtype", "device_map", "tokenizer")
_UNLIMITED = 1 << 30

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The strings of a request, and its context and continuation as ids."""


@register_model(NAME)
class StreamingLM(HFLM):
    """A causal language model that streams: ``--model streaming --model_args pretrained=M,n_sink=4,window_size=1020``.

    Args:
        pretrained: a model as every command of this project takes it, or a loaded one (then with `tokenizer`).
        n_sink, window_size: of the stream; defaults suit the model, see `experiments.config.settings_for`.
        attn_backend, engine, dtype, device, device_map: how it is computed, as in `ExperimentConfig`.
        tokenizer: another than the model's own: an object, a folder or a hub name.
        batch_size: rows at a time, or "auto": as many as fit, at most `max_batch_size`.
        hf_arguments: those of `OF_HFLM`. `max_length` (default: none) truncates contexts from the left.

    Raises SetupError for whatever of these is wrong.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        n_sink: int | None = None,
        window_size: int | None = None,
        attn_backend: str | None = None,
        engine: str = "auto",
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        tokenizer: Any = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **hf_arguments,
    ) -> None:
        for name in hf_arguments:
            if name not in OF_HFLM:
                raise unknown_name("model argument", name, ("pretrained", *OWN, *OF_HFLM))
        if isinstance(pretrained, str):
            config = ExperimentConfig(
                model=pretrained,
                n_sink=n_sink,
                window_size=window_size,
                attn_backend_list=attn_backend,
                engine=engine,
                dtype=None if dtype == "auto" else dtype,
                device=device,
                device_map=device_map,
            )
            model, tokenizer, config, self._source = _loaded(config, tokenizer)
        else:
            model, self._source = pretrained, {}
            config = StreamingConfig(4 if n_sink is None else n_sink, 1020 if window_size is None else window_size)
        super().__init__(
            model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size or 64,
            **hf_arguments,
        )
        try:
            self._stream = StreamingLLMWrapper(model, engine=engine, config=config)
            self._block_engine = resolve_block_engine(model, engine)
            self._block = block_forward(model, self._block_engine)
        except ValueError as error:
            raise SetupError(f"model {pretrained!r} cannot stream: {error}") from None
        self.streaming_config = config

    @property
    def max_length(self) -> int:
        """Tokens of a context before it is truncated: none are, where no other number was asked for."""
        return self._max_length or _UNLIMITED

    def get_model_info(self) -> dict:
        """What lm-eval's result file says of the model."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": self.revision,
            "n_sink": self.streaming_config.n_sink,
            "window_size": self.streaming_config.window_size,
            "engine": self._stream.engine,
            "block_engine": self._block_engine,
            **self._source,
        }

    # Requests

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents in nats, each one stream behind the prefix token."""
        rows = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        batch_size = self._detect_batch_size() if self.batch_size == "auto" else self.batch_size
        found: dict[int, float] = {}
        with tqdm(total=len(rows), desc="Running loglikelihood_rolling requests", disable=disable_tqdm) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                for index, value in zip(batch, self._whole([rows[index] for index in batch]), strict=True):
                    found[index] = value
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, value)
                bar.update(len(batch))
        return [found[index] for index in range(len(rows))]

    def _whole(self, rows: list[list[int]]) -> list[float]:
        """Log-likelihoods of all tokens of rows but the first; the longest row comes first."""
        if len(rows[-1]) < 2:  # the shortest: an empty document has none to predict
            return [*(self._whole(rows[:-1]) if len(rows) > 1 else []), 0.0]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        ids = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
        totals = torch.zeros(len(rows), dtype=torch.float64, device=lengths.device)

        def add(start: int, nll: Tensor, hidden: Tensor) -> None:
            inside = torch.arange(start, start + nll.shape[1], device=nll.device) < lengths[:, None]
            totals.add_(torch.where(inside, nll, 0.0).sum(1, dtype=torch.float64).to(totals.device))

        size, engine = block_size_for(len(rows), self.streaming_config, self.model), self._stream.engine
        score_stream(self.model, ids, config=self.streaming_config, block_size=size, engine=engine, on_block=add)
        return (-totals).tolist()

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether it is what is most likely.

        Requests that differ in their last token alone share a forward.
        """
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), request[1] + request[2]),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        self.batch_sizes = {}
        auto = self.batch_size == "auto"
        chunks = order.get_batched(
            n=0 if auto else self.batch_size, batch_fn=self._batch_scheduler if auto and requests else None
        )
        answers = []
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for chunk in chunks:
                rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in chunk]
                states = self._predicting(rows, [len(continuation) for *_, continuation in chunk])
                for (strings, context, continuation), hidden in zip(chunk, states, strict=True):
                    alike = order.get_cache(strings, context, continuation, hidden[None])
                    for of_request, tokens, hidden_states in alike:
                        losses, greedy = judged(self.model, hidden_states[0, -len(tokens) :], tokens)
                        answers.append((-float(losses.sum(dtype=torch.float64)), bool(greedy.all())))
                        if of_request is not None:
                            self.cache_hook.add_partial("loglikelihood", of_request, answers[-1])
                        bar.update()
        return order.get_original(answers)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs) -> Tensor:
        """Ids ``[batch, length + new]`` behind prompts ``[batch, length]`` that are padded on the left."""
        if not kwargs.get("do_sample"):
            kwargs.pop("temperature", None)
        criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        with self._stream as stream:
            return stream.generate(
                context,
                max_length=max_length,
                stopping_criteria=criteria,
                pad_token_id=self.tokenizer.pad_token_id,
                **kwargs,
            )

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """The most rows that fit on the device: of a request's length, or of one that fills the cache."""
        length = self.streaming_config.cache_size + 2
        if requests:
            length = len(requests[pos][1]) + len(requests[pos][2])

        @find_executable_batch_size(starting_batch_size=self.max_batch_size)
        def fits(batch_size: int) -> int:
            self._predicting([[self.prefix_token_id] * length] * batch_size, [1] * batch_size)
            return batch_size

        return fits()

    def _predicting(self, rows: list[list[int]], n_last: list[int]) -> list[Tensor]:
        """Final hidden states ``[n_last, hidden]`` that predict the last tokens of each row."""
        inputs = [row[:-1] for row in rows]
        wanted = [range(len(row) - n, len(row)) for row, n in zip(inputs, n_last, strict=True)]
        return states_at(self.model, self._block, self.streaming_config, inputs, wanted)


def _loaded(config: ExperimentConfig, tokenizer: Any) -> tuple[PreTrainedModel, Any, StreamingConfig, dict]:
    """The configured model with its attention by the configured kernel, its tokenizer, sizes, and what it is."""
    source = find_model(config.model[0])
    info = source.info()
    if tokenizer is None and info.tokenizer is None:
        raise SetupError(f"model {source.name!r} has no tokenizer: give one with tokenizer=")
    settings = model_settings(config, source, info)
    machine = resolve_machine(config)
    loaded = machine.load(source, config.device_map)
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    facts = {"attn_backend": machine.backends[0], "model_fingerprint": source.fingerprint, "weights": source.weights}
    sizes = StreamingConfig(settings.n_sink, settings.window_size)
    return loaded.model, tokenizer or loaded.tokenizer, sizes, facts
