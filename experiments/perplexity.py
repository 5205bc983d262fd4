"""The one measured loop: perplexity and speed of a method on a text, token by token, teacher-forced.

The first P = min(S + W, N) tokens are the prompt. Nothing is evicted in it, so the losses of its tokens are the same
for every method: they come from one dense forward that is not timed. The timed part is the prefill, which returns
the last token's logits only, and then one step per token: the prefill's logits give the loss of token P, feeding
token P gives that of token P + 1, and so on. Token P - 1 is never fed twice.

Nothing waits for the device inside a step; clocks are read after a synchronisation, around the prefill, after the
first step, and at the end. Losses stay on the device, in float32 or better, and come to the host once.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.costs import measured, seconds, synchronise
from experiments.method_base import Method
from experiments.progress import LossDisplay
from streaming_llm.attachment import maskless_attention
from streaming_llm.families import text_config

_LOGITS_NBYTES = 512 * 2**20  # float32 logits of the prompt that are held at a time
_CAPTURING_STEPS = 4  # within which an engine that captures or compiles has done so
NO_DECODE = "the text is not longer than the prompt: there is no decode step"
NOT_TIMED = "with a decode sample of 0 nothing is timed"


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run. Times in seconds unless the name says otherwise; None with a reason.

    `runtime_sec` = `prefill_sec` + `decode_sec`; `first_token_latency_sec` is the first decode step and `ttft_sec`
    the prefill and that step.
    """

    perplexity: float | None
    runtime_sec: float | None
    prefill_sec: float | None
    first_token_latency_sec: float | None
    ttft_sec: float | None
    decode_sec: float | None
    decode_tokens: int
    decode_toks_per_sec: float | None
    tpot_ms: float | None
    peak_memory_mb: float | None
    kv_cache_mb: float
    kv_bytes_per_token: int


@dataclass(frozen=True)
class PerplexityResult(RunFigures):
    """Perplexity and speed of one run; `nll` holds the losses in nats of the tokens at `position` in the stream."""

    peak_memory_kind: str
    engine: str
    prompt_tokens: int
    scoring: str
    scoring_sec: float | None = None
    scored_tokens: int | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # figure that is None -> why
    details: dict = field(default_factory=dict)
    nll: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), repr=False, compare=False)
    position: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False, compare=False)


@torch.inference_mode()
def compute_perplexity(
    model,
    input_ids: Tensor,
    method: Method,
    *,
    scoring: str = "decode",
    decode_sample: int | None = None,
    warmup_steps: int = 4,
    progress: LossDisplay | None = None,
) -> PerplexityResult:
    """Measure `method` on the stream `input_ids`, int64 [1, N] with N >= 2.

    `scoring` "decode": the losses come from the measured loop over the whole text. "parallel": they come from
    `method.score` over the whole text, and the loop, for the speed, stops after `decode_sample` steps; the
    perplexity of a method without parallel scoring is then None. A sample of 0 steps: nothing is timed, and others
    may use the device meanwhile. `warmup_steps` steps and their prefill run before the clock starts (as many as
    capturing needs, where the engine captures: `compile_sec` in the details says how long that took). The model is
    as it was afterwards.

    Raises ValueError for a stream of fewer than two tokens, RuntimeError for losses that are not finite and for an
    engine that does not stop capturing.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [1, N] with N >= 2, got {list(input_ids.shape)}")
    if scoring not in ("decode", "parallel"):
        raise ValueError(f"scoring must be 'decode' or 'parallel', got {scoring!r}")
    ids = input_ids.to(model.get_input_embeddings().weight.device)
    n_tokens = ids.shape[1]
    prompt = min(method.settings.cache_size, n_tokens)
    steps = decode_steps(n_tokens, prompt, scoring, decode_sample)
    progress = progress or LossDisplay()

    prompt_nll = prompt_losses(model, ids[:, :prompt]) if scoring == "decode" else None
    scored = scoring_sec = None
    if scoring == "parallel" and method.parallel:
        found: list[Tensor] = []
        scoring_sec = seconds(lambda: found.append(method.score(ids)[0]), ids.device)
        scored = found[0]
    with method:
        if method.engine != "eager":
            warmup_steps = max(warmup_steps, _CAPTURING_STEPS)
        _decode(method, ids[:, : min(n_tokens, prompt + warmup_steps + 1)], prompt, LossDisplay())
        stream = ids[:, : prompt + steps + 1]
        decoded, peak = measured(method, lambda: _decode(method, stream, prompt, progress), devices_of(model))
        held = {
            "kv_cache_mb": method.kv_cache_nbytes / 1e6,
            "kv_bytes_per_token": method.kv_bytes_per_token,
            "engine": method.engine,
            "details": method.details | ({} if method.engine == "eager" else {"compile_sec": method.compile_sec}),
        }
    (figures, reasons), nll = decoded
    if scoring == "decode":
        nll[: prompt - 1] = prompt_nll
        scored = nll
    if scoring == "parallel" and decode_sample == 0:
        timed = [name for name in (*figures, "scoring_sec") if name != "decode_tokens"]
        figures |= dict.fromkeys(timed[:-1])
        reasons |= dict.fromkeys(timed, NOT_TIMED)
        scoring_sec = None
    if scored is None:
        reasons["perplexity"] = f"{method.name} has no parallel scoring: use scoring 'decode'"
    if peak.peak_mb is None:
        reasons["peak_memory_mb"] = peak.kind
    losses = np.zeros(0, np.float32) if scored is None else scored.cpu().numpy()
    return PerplexityResult(
        perplexity=None if scored is None else perplexity(losses),
        **figures,
        peak_memory_mb=peak.peak_mb,
        peak_memory_kind=peak.kind,
        prompt_tokens=prompt,
        scoring=scoring,
        scoring_sec=scoring_sec,
        scored_tokens=len(losses) if scoring == "parallel" and scored is not None else None,
        reasons=reasons,
        nll=losses,
        position=np.arange(1, len(losses) + 1),
        **held,
    )


def devices_of(model) -> list[torch.device]:
    """Where its weights are; the device of its inputs first."""
    places = (model.get_input_embeddings().weight.device, *(parameter.device for parameter in model.parameters()))
    return list(dict.fromkeys(places))


def decode_steps(num_tokens: int, prompt: int, scoring: str, decode_sample: int | None) -> int:
    """Decode steps of a run: one for each token after the prompt but the last; under "parallel", a sample of them."""
    steps = max(0, num_tokens - 1 - prompt)
    return steps if scoring == "decode" or decode_sample is None else min(steps, decode_sample)


def perplexity(nll: np.ndarray) -> float:
    """Of losses in nats; raises RuntimeError where they are not usable."""
    mean = float(np.mean(nll, dtype=np.float64))
    if not np.isfinite(nll).all() or mean > 700:  # exp overflows
        bad = int(np.count_nonzero(~np.isfinite(nll)))
        raise RuntimeError(f"the losses are not usable: {bad} of {len(nll)} are not finite, their mean is {mean}")
    return math.exp(mean)


def _decode(method: Method, ids: Tensor, prompt: int, progress: LossDisplay) -> tuple[tuple[dict, dict], Tensor]:
    """Prefill `prompt` tokens, then feed the others but the last: figures of time, reasons for those that there are
    none of, and losses [N - 1] of which those before P - 1 are 0.

    ids [1, N]. Every loss is that of the next token, in float32 (float64 for a float64 model).
    """
    n_tokens = ids.shape[1]
    dtype = torch.float64 if method.model.dtype == torch.float64 else torch.float32
    nll = torch.zeros(n_tokens - 1, dtype=dtype, device=ids.device)
    targets = ids[0]
    method.reset()
    synchronise(ids.device)

    start = time.perf_counter()
    logits = method.prefill(ids[:, :prompt])
    synchronise(ids.device)
    prefill = time.perf_counter() - start
    first = None
    if prompt < n_tokens:
        nll[prompt - 1] = F.cross_entropy(logits[0].to(nll), targets[prompt])
    for t in range(prompt, n_tokens - 1):
        logits = method.step(ids[:, t])
        nll[t] = F.cross_entropy(logits[0].to(nll), targets[t + 1])
        if first is None:
            synchronise(ids.device)
            first = time.perf_counter() - start
        progress.step(nll[prompt - 1 : t + 1])
    synchronise(ids.device)
    end = time.perf_counter() - start
    steps = max(0, n_tokens - 1 - prompt)
    end = end if steps else prefill
    figures = {
        "runtime_sec": end,
        "prefill_sec": prefill,
        "first_token_latency_sec": None if first is None else first - prefill,
        "ttft_sec": first,
        "decode_sec": end - prefill,
        "decode_tokens": steps,
        "decode_toks_per_sec": steps / (end - prefill) if steps else None,
        "tpot_ms": 1e3 * (end - prefill) / steps if steps else None,
    }
    return (figures, {name: NO_DECODE for name, value in figures.items() if value is None}), nll


@torch.inference_mode()
def token_losses(method: Method, ids: Tensor) -> Tensor:
    """Losses [N - 1] in nats of ids [1, N] by an attached method's own steps, without a clock."""
    prompt = min(method.settings.cache_size, ids.shape[1])
    nll = _decode(method, ids, prompt, LossDisplay())[1]
    nll[: prompt - 1] = prompt_losses(method.model, ids[:, :prompt])
    return nll


def prompt_losses(model, ids: Tensor) -> Tensor:
    """Losses of the tokens of a prompt but the first, from a dense causal forward: ids [1, P] -> [P - 1].

    Float32, or float64 for a float64 model. Logits are made for as many positions at a time as fit in a fixed
    amount of memory, with a forward for each part: a large vocabulary and a long prompt need several.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    n_losses = ids.shape[1] - 1
    part = max(1, _LOGITS_NBYTES // (text_config(model.config).vocab_size * dtype.itemsize))
    losses = torch.empty(n_losses, dtype=dtype, device=ids.device)
    with maskless_attention(model):
        for positions in torch.arange(n_losses, device=ids.device).split(part):
            logits = model(ids, use_cache=False, logits_to_keep=positions).logits[0]
            losses[positions] = F.cross_entropy(logits.to(losses), ids[0, positions + 1], reduction="none")
    return losses
