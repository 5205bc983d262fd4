"""Writes full sets of result files by the schema, with figures that look like real ones.

Everything follows from the arguments (no random state is shared), so a test can say what a figure must hold.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

METHODS = ("baseline", "streaming", "kvpress", "window", "dense")
DATASETS = ("demo_encyclopaedia", "demo_narrative", "pg19", "wikitext", "clue-of-the-twisted-candle")
BACKENDS = ("math", "flash", "cudnn")

_PPL = {"baseline": 30.0, "streaming": 30.6, "kvpress": 30.6, "window": 47.0, "dense": 310.0, "mit": 30.7}
_DECODE = {"baseline": 40.0, "streaming": 5.0, "kvpress": 11.0, "window": 4.8, "dense": 6.5, "mit": 8.0}
_KERNEL = {"math": 1.0, "flash": 0.62, "cudnn": 0.5}


def block(
    method: str, backend: str, dataset_index: int = 0, repeats: int = 3, time_scale: float = 1.0, random: bool = False
) -> dict:
    """A method's block."""
    rng = np.random.default_rng([len(method), len(backend), dataset_index])
    decode = _DECODE[method] * (0.5 + 0.5 * _KERNEL[backend]) * (1 + 0.1 * dataset_index) * time_scale
    prefill = 0.8 * _KERNEL[backend] * (1 + 0.05 * dataset_index) * time_scale
    runs = []
    for noise in 1 + 0.05 * rng.standard_normal((repeats, 2)):
        p, d = prefill * noise[0], decode * noise[1]
        first = d / 500
        run = {"runtime_sec": p + d, "prefill_sec": p, "first_token_latency_sec": first, "ttft_sec": p + first}
        runs.append(run | {"decode_sec": d, "decode_toks_per_sec": 512 / d, "tpot_ms": 1e3 * d / 512})
    medians = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
    ppl = None if random else _PPL[method] * (1 + 0.15 * dataset_index)
    out = {
        "status": "ok",
        "perplexity": ppl,
        **medians,
        "decode_tokens": 512,
        "peak_memory_mb": 90.0 + 30 * (method == "dense"),
        "kv_cache_mb": {"baseline": 0.0, "dense": 4096 * 0.016384}.get(method, 257 * 0.016384),
        "kv_bytes_per_token": 16384,
        "engine": "eager",
        "runs": runs if repeats > 1 else [],
    }
    if random:
        out["perplexity_reason"] = "random weights"
    return out


def header(dataset: str, backend: str, **changes: object) -> dict:
    """The part of a file that is not a method's."""
    return {
        "schema_version": 1, "experiment": dataset, "model": "demo", "dataset": dataset, "backend": backend,
        "dtype": "float32", "device": "cpu", "num_tokens": 4096, "max_eval_tokens": 4096,
        "streaming_llm": {"n_sink": 4, "window_size": 252, "max_cache_size": 256}, "weights": "trained",
        "environment": {
            "torch": "2.13.0", "transformers": "5.2.0", "gpu": None, "cpu": "Synthetic CPU", "commit": "0" * 7,
        },
        "config_hash": "c" * 16, "data_sha256": "d" * 64, "status": "ok", "timestamp": "2026-01-01T00:00:00Z",
        **changes,
    }  # fmt: skip


def write_json(path: Path, data: object) -> Path:
    """Write one file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1))
    return path


def write_set(
    root: Path,
    datasets: Sequence[str] = DATASETS[:2],
    methods: Sequence[str] = METHODS[:3],
    backends: Sequence[str] = BACKENDS[:2],
    *,
    repeats: int = 3,
    time_scale: float = 1.0,
    skip: Sequence[tuple[str, str, str]] = (),
    drop: Sequence[tuple[str, str, str]] = (),
    ablations: bool = True,
    losses: bool = True,
    **changes: object,
) -> Path:
    """A whole root: ``final/`` with main files, ablations and losses, and ``fixed_eval/``.

    ``skip`` and ``drop`` name cells (data set, method, backend) that have status ``skipped``, or no block and file.
    """
    random = changes.get("weights") == "random"
    for d, dataset in enumerate(datasets):
        for backend in backends:
            head = header(dataset, backend, **changes)
            blocks = {}
            for method in methods:
                cell = (dataset, method, backend)
                if cell in drop:
                    continue
                if cell in skip:
                    blocks[method] = {"status": "skipped", "reason": "kvpress is not installed"}
                else:
                    blocks[method] = block(method, backend, d, repeats, time_scale, random)
                own = {**head, "method": method, **blocks[method]}
                own["total_time"], own["prefill_time"] = own.get("runtime_sec"), own.get("prefill_sec")
                write_json(root / "fixed_eval" / f"{dataset}_{method}_backend-{backend}.json", own)
                if losses and cell not in skip and not random:
                    write_losses(root / "final" / f"{dataset}_main_backend-{backend}.{method}.nll.npz", method, d)
            write_json(root / "final" / f"{dataset}_main_backend-{backend}.json", {**head, **blocks})
    if ablations:
        for backend in backends:
            for kind in ("window_size", "n_sink"):
                write_ablation(root, kind, backend, dataset=datasets[0], time_scale=time_scale, random=random)
    return root


def write_ablation(
    root: Path, kind: str, backend: str, dataset: str, time_scale: float = 1.0, random: bool = False
) -> Path:
    """One ablation's file, the last setting evicting nothing."""
    settings = {"window_size": (32, 64, 128, 252, 512, 1024), "n_sink": (0, 1, 2, 4, 8, 16)}[kind]
    rows = []
    for value in settings:
        n_sink, window = (4, value) if kind == "window_size" else (value, 252)
        quality = 30 + 200 / window + (15 if n_sink == 0 else 2 / n_sink)
        row = block("streaming", backend, 0, 3, time_scale, random)
        ratio = max(0.0, 1 - (n_sink + window) / 900)
        row |= {"n_sink": n_sink, "window_size": window, "compression_ratio": ratio, "evicts": ratio > 0}
        if not random:
            row["perplexity"] = quality
        rows.append(row)
    data = header(dataset, backend) | {"ablation_type": kind, "results": rows}
    return write_json(root / "final" / f"ablation_{kind}_backend-{backend}.json", data)


def write_losses(path: Path, method: str, dataset_index: int = 0, length: int = 4096, cache: int = 256) -> Path:
    """Losses of a stream: dense climbs past the trained length, the window without sinks steps up."""
    rng = np.random.default_rng(dataset_index)  # the same text, the same surprises
    position = np.arange(1, length)
    nll = np.log(30.0 * (1 + 0.15 * dataset_index)) + 1.5 / np.sqrt(position)
    if method == "window":
        nll = nll + 0.6 * (position > cache)
    if method == "dense":
        nll = nll + 2.2 * np.log2(np.maximum(1, position / 600))
    nll = nll + {"streaming": 0.02, "kvpress": 0.021}.get(method, 0.0) + rng.gumbel(-0.5, 0.9, position.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, nll=nll.astype(np.float32), position=position.astype(np.int64))
    return path


def write_older(root: Path, prefixes: Sequence[str] = ("wikitext", "pg19_20k")) -> Path:
    """Files of the older form: no backend, ``ours`` and ``mit``, modes, blocks."""
    for d, prefix in enumerate(prefixes):
        for method, key in (("baseline", "baseline"), ("ours", "streaming"), ("kvpress", "kvpress"), ("mit", "mit")):
            data = block(key, "math", d)
            own = {"perplexity": data["perplexity"], "total_time": data["runtime_sec"]}
            own["prefill_time"] = data["prefill_sec"]
            write_json(root / f"{prefix}_{method}.json", own)
    base, ours = block("baseline", "math"), block("streaming", "math")
    small = [{k: b[k] for k in ("perplexity", "runtime_sec")} for b in (base, ours)]
    write_json(root / "wikitext_ours_decode_loop.json", {"baseline": small[0], "streaming": small[1]})
    write_json(root / "pg19_mit_chunked.json", {"baseline": small[0], "streaming": small[1]})
    write_json(
        root / "wikitext_ours_kvpress_official.json", {"perplexity": 31.0, "total_time": 9.0, "prefill_time": 0.5}
    )
    rows = [{"window_size": w, "n_sink": 4, "perplexity": 30 + 90 / w, "runtime_sec": 3.0} for w in (128, 256, 512)]
    write_json(root / "ablation_window_size.json", {"ablation_type": "window_size", "results": rows})
    return root
