"""StreamingLLM as a way of decoding of ``model.generate``: nothing but one import is needed."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .config import StreamingConfig
from .generate_arguments import Prompt
from .model import StreamingLLMWrapper


@torch.no_grad()
def streaming_generate(
    model: PreTrainedModel,
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
    **model_kwargs,
):
    """For Transformers' hook, in constant memory and exact::

        model.generate(**inputs, custom_generate=streaming_generate, n_sink=4, window_size=1020)

    Takes everything else that ``model.generate`` takes: sampling, beams, streamers, padded prompts. What an engine
    records is recorded anew in each call; :class:`~streaming_llm.StreamingLLMWrapper` keeps it.

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
    name = "input_ids" if model_kwargs.get("inputs_embeds") is None else "inputs_embeds"
    tokens = (input_ids if name == "input_ids" else model_kwargs[name])[::rows]
    mask = model_kwargs.get("attention_mask")
    mask = None if mask is None or bool(mask.all()) else mask[::rows].bool()
    prompt = Prompt(name, tokens, mask, [0] * len(tokens))
    decode = model._beam_search if (generation_config.num_beams or 1) > 1 else model._sample
    model_kwargs.pop("past_key_values", None)
    with StreamingLLMWrapper(model, n_sink, window_size, engine, config=config) as stream:
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
            stream.new_cache(),
            prompt,
            rows,
            {"generation_config": generation_config},
        )
