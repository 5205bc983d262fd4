"""StreamingLLM as a way of decoding of ``model.generate``: nothing but one import is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from .config import StreamingConfig
from .generate_arguments import refuse_arguments, take_prompt
from .kv_cache import StreamingKVCache
from .model import StreamingLLMWrapper


@torch.no_grad()
def streaming_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    n_sink: int = 4,
    window_size: int = 1020,
    config: StreamingConfig | None = None,
    engine: str = "auto",
    **model_kwargs: Any,
) -> Any:
    """For Transformers' hook, in constant memory and exact::

        model.generate(**inputs, custom_generate=streaming_generate, n_sink=4, window_size=1020)

    Takes sampling, beams, padded prompts, processors and criteria. What an engine records is recorded anew in each
    call; :class:`~streaming_llm.StreamingLLMWrapper` keeps it. Transformers hands a function neither ``streamer`` nor
    ``assistant_model`` (seen in 5.2), and a streamer would then wait for ever: these too need the wrapper.

    Args:
        n_sink, window_size, config, engine: see :class:`~streaming_llm.StreamingLLMWrapper`.
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer: given by
            Transformers.

    Returns:
        What ``model.generate`` returns.

    Raises:
        ValueError: the model cannot stream, or an argument would not stream exactly.
    """
    rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    given = {name: model_kwargs.get(name) for name in ("inputs_embeds", "attention_mask")}
    given = {name: x[::rows] for name, x in {"input_ids": input_ids, **given}.items() if x is not None}
    decode = _way_of_decoding(model, generation_config)
    its_cache = model_kwargs.pop("past_key_values", None)  # an empty one that generate() has made
    if isinstance(its_cache, StreamingKVCache) or (its_cache is not None and its_cache.get_seq_length()):
        raise ValueError("past_key_values: a stream that is to be continued needs StreamingLLMWrapper.generate")
    settings = {"generation_config": generation_config, "use_cache": model_kwargs.get("use_cache")}
    with StreamingLLMWrapper(model, n_sink, window_size, engine, config=config) as stream:
        cache = stream.new_cache()
        refuse_arguments(model, cache, False, settings)
        prompt = take_prompt(None, given, cache, False)
        return stream.run_generation(
            lambda view: decode(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **(model_kwargs | {"past_key_values": view, "use_cache": True}),
            ),
            cache,
            prompt,
            rows,
            settings,
        )


def _way_of_decoding(model: Any, generation_config: GenerationConfig) -> Any:
    """The model's method for what is asked for.

    Raises:
        ValueError: it is none that a stream is decoded with here.
    """
    mode = generation_config.get_generation_mode()
    if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return model._sample
    if mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE):
        return model._beam_search
    raise ValueError(
        f"custom_generate=streaming_generate decodes greedily, by sampling or with beams, and {mode.value} was asked "
        "for: use StreamingLLMWrapper.generate, which says what it takes"
    )
