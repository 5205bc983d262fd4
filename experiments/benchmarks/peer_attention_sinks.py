"""Run by `peer.py` in an environment with attention_sinks and transformers 4.34: times its decode steps.

Uses nothing of this project. Takes its order as JSON in the first argument and prints its figures as JSON.
"""

import json
import sys
import time


def main() -> None:
    order = json.loads(sys.argv[1])
    import torch

    device, dtype = torch.device(order["device"]), getattr(torch, order["dtype"])
    torch.manual_seed(order["seed"])
    model = build(order, device, dtype)
    cache_size = order["n_sink"] + order["window_size"]
    count = max(order["steps"], order["warmup_steps"])
    ids = torch.randint(order["config"]["vocab_size"], (order["batch_size"], cache_size + count), device=device)

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        past = model(ids[:, :cache_size], use_cache=True).past_key_values

        def run(steps: int) -> float:
            nonlocal past
            synchronise()
            start = time.perf_counter()
            for i in range(steps):
                token = ids[:, cache_size + i : cache_size + i + 1]
                past = model(token, past_key_values=past, use_cache=True).past_key_values
            synchronise()
            return time.perf_counter() - start

        run(order["warmup_steps"])
        probe = run(2) / 2
        steps = max(3, min(order["steps"], int(order["max_run_sec"] / probe)))
        seconds = run(steps)
    kept = sum(t.numel() * t.element_size() for layer in past for t in layer)
    print(
        json.dumps({"tpot_ms": 1e3 * seconds / steps, "steps": steps, "kv_cache_mb": kept / 1e6, "compile_sec": 0.0})
    )


def build(order, device, dtype):
    """A GPT-NeoX with random weights, set up as `attention_sinks` does with a model that it loads."""
    import torch
    from attention_sinks.inject_mixin import InjectAttentionSinksMixin
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**order["config"], max_position_embeddings=2048)).eval()
    sizes = {"attention_sink_size": order["n_sink"], "attention_sink_window_size": order["window_size"]}
    InjectAttentionSinksMixin._inject_pos_shift_attention(model)
    InjectAttentionSinksMixin._inject_attention_sink_kv_cache(model, **sizes)
    return model


if __name__ == "__main__":
    main()
