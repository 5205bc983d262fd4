"""Models with random weights of known sizes: for speed, where there are no trained ones."""

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class PythiaSize:
    """The sizes in which the Pythia models differ (Biderman et al., 2023)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int


RANDOM_SIZES = {
    "pythia-70m": PythiaSize(512, 6, 8, 2048, 50304),
    "pythia-160m": PythiaSize(768, 12, 12, 3072, 50304),
    "pythia-410m": PythiaSize(1024, 24, 16, 4096, 50304),
    "pythia-1b": PythiaSize(2048, 16, 8, 8192, 50304),
    "pythia-1.4b": PythiaSize(2048, 24, 16, 8192, 50304),
    "pythia-2.8b": PythiaSize(2560, 32, 32, 10240, 50304),
    "pythia-6.9b": PythiaSize(4096, 32, 32, 16384, 50432),
    "pythia-12b": PythiaSize(5120, 36, 40, 20480, 50688),
}


def random_config(size: PythiaSize):
    """The configuration of a model of the given sizes."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        **asdict(size),
        max_position_embeddings=2048,
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        hidden_act="gelu",
    )


def random_model(
    size: PythiaSize, seed: int, dtype: torch.dtype, device: torch.device, device_map: str | None = None
) -> torch.nn.Module:
    """A GPT-NeoX of the given sizes with seeded random weights, made in place on the device, in the dtype."""
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
