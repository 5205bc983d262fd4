"""Models with random weights of known sizes: for speed, where there are no trained ones.

The sizes are those of the published configurations; what only changes numbers, such as the base of the rotations, is
left at the family's default.
"""

import torch

Size = dict[str, object]
"""Keyword arguments of a configuration, with its `model_type`."""


_PYTHIA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_GROUPED = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip


def pythia(*numbers: int) -> Size:
    """The numbers in which the Pythia models differ (Biderman et al., 2023), as in `_PYTHIA`."""
    shared = {"model_type": "gpt_neox", "max_position_embeddings": 2048, "rotary_pct": 0.25, "hidden_act": "gelu"}
    return shared | dict(zip(_PYTHIA, numbers, strict=True), use_parallel_residual=True, tie_word_embeddings=False)


def _grouped(*values: object, **more: object) -> Size:
    """A model with grouped queries, by the values of `_GROUPED`."""
    return dict(zip(_GROUPED, values, strict=True), **more)


RANDOM_SIZES: dict[str, Size] = {
    "pythia-70m": pythia(512, 6, 8, 2048, 50304),
    "pythia-160m": pythia(768, 12, 12, 3072, 50304),
    "pythia-410m": pythia(1024, 24, 16, 4096, 50304),
    "pythia-1b": pythia(2048, 16, 8, 8192, 50304),
    "pythia-1.4b": pythia(2048, 24, 16, 8192, 50304),
    "pythia-2.8b": pythia(2560, 32, 32, 10240, 50304),
    "pythia-6.9b": pythia(4096, 32, 32, 16384, 50432),
    "pythia-12b": pythia(5120, 36, 40, 20480, 50688),
    "llama-3.2-1b": _grouped("llama", 2048, 16, 32, 8, 64, 8192, 128256, 131072, True),
    "llama-3.1-8b": _grouped("llama", 4096, 32, 32, 8, 128, 14336, 128256, 131072, False),
    "qwen2.5-0.5b": _grouped("qwen2", 896, 24, 14, 2, 64, 4864, 151936, 32768, True),
    "qwen3-0.6b": _grouped("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, 40960, True),
    "qwen3-4b": _grouped("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, 40960, True),
    "qwen3-8b": _grouped("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, 40960, False),
    "gemma-3-1b": _grouped("gemma3_text", 1152, 26, 4, 1, 256, 6912, 262144, 32768, True, sliding_window=512),
    "mistral-7b": _grouped("mistral", 4096, 32, 32, 8, 128, 14336, 32768, 32768, False, sliding_window=None),
}


def random_config(size: Size):
    """The configuration of a model of the given sizes."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**size)


def random_model(
    size: Size, seed: int, dtype: torch.dtype, device: torch.device, device_map: str | None = None
) -> torch.nn.Module:
    """A model of the given sizes with seeded random weights, made in place on the device, in the dtype."""
    from transformers import AutoModelForCausalLM

    made_on = torch.device("cpu") if device_map else device
    with torch.random.fork_rng(devices=[made_on] if made_on.type == "cuda" else []), made_on:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(random_config(size), dtype=dtype, attn_implementation="sdpa")
    if device_map:
        import accelerate

        places = accelerate.infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
        model = accelerate.dispatch_model(model, places)
    return model.eval().requires_grad_(False)
