"""The training loop: AdamW, warm-up and cosine, bfloat16 on CUDA, resumable at any step."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .batches import Batches
from .byte_bpe import progress_interval
from .checkpoint import Progress, save_checkpoint
from .recipe import (
    PROBE_SKIP,
    PROBE_STEPS,
    Recipe,
    build_model,
    load_named_weights,
    named_weights,
    use_training_attention,
)

IGNORED_LABEL = -100
ADAM_BETAS = (0.9, 0.95)


class TrainingInterruptedError(Exception):
    """Training was stopped by a signal; the checkpoint is written."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.signal_number = signal_number


class StopRequest:
    """Turns the first SIGINT or SIGTERM inside the block into a flag; a second SIGINT acts as usual."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(number, self._previous[number])

    def __enter__(self) -> StopRequest:
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trainer:
    """One training run; `run()` starts it, or goes on after `restore()`.

    Args:
        identity: what the checkpoint must agree on; recipe and hashes of text and tokenizer.
        compile_model: None means on CUDA only. Where compiling fails, training goes on without, and says so.
    """

    def __init__(
        self,
        recipe: Recipe,
        batches: Batches,
        *,
        device: torch.device,
        checkpoint_path: Path,
        checkpoint_every_sec: float,
        identity: dict[str, object],
        compile_model: bool | None,
        say: Callable[[str], None] = tqdm.write,
    ) -> None:
        self.recipe, self.batches, self.device, self.say = recipe, batches, device, say
        self.checkpoint_path, self.checkpoint_every_sec = checkpoint_path, checkpoint_every_sec
        self.identity = identity
        self.progress = Progress(total_steps=None if recipe.max_minutes else recipe.steps)
        self.compiled = device.type == "cuda" if compile_model is None else compile_model
        self.log_every = max(1, min(50, recipe.steps // 20))
        self.model = build_model(recipe)
        use_training_attention(self.model)
        self.model.to(device).train()
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=ADAM_BETAS, fused=device.type == "cuda"
        )
        self._loss = self._eager_loss

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def run(self) -> dict[str, torch.Tensor]:
        """Train to the end; returns the weights, float32 on the CPU.

        Raises:
            TrainingInterruptedError: a signal came; the checkpoint holds the state.
            FloatingPointError: the loss is no longer finite.
        """
        if self.progress.step != self.progress.total_steps:
            self._compile()
            with StopRequest() as stop:
                self._train(stop)
        return {name: weight.detach().cpu() for name, weight in named_weights(self.model).items()}

    def restore(self, state: dict[str, object]) -> None:
        """Take up what `load_checkpoint` returned."""
        load_named_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])
        self.say(f"resuming after step {self.progress.step}")

    def _eager_loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss in nats, of int64 `[batch, length]`; the last position predicts nothing."""
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED_LABEL)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(input_ids=ids, use_cache=False).logits  # [batch, length, vocab]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL)

    def _compile(self) -> None:
        if not self.compiled:
            return
        begin = time.monotonic()
        compiled = torch.compile(self._eager_loss, dynamic=False)
        try:
            compiled(self.batches.batch(0)).backward()
        except Exception as error:  # the compiler's failures are of many kinds; the model itself is not at fault
            self.compiled = False
            reason = (str(error).splitlines() or [""])[0]
            self.say(f"torch.compile failed, going on without it ({type(error).__name__}: {reason})")
        else:
            self._loss = compiled
            self.say(f"compiled in {time.monotonic() - begin:.0f} s")
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self) -> None:
        progress, recipe = self.progress, self.recipe
        rate = recipe.learning_rate_at(progress.step, progress.total_steps or recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(self.batches.batch(progress.step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss.detach()
        progress.step += 1
        progress.loss_count += 1

    def _train(self, stop: StopRequest) -> None:
        progress = self.progress
        self._loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=self.device)
        self._begin = saved = time.monotonic()
        self._first_step, self._sec_before = progress.step, progress.train_sec
        probe = SpeedProbe(progress, self.recipe)
        with tqdm(
            total=progress.total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            mininterval=progress_interval(),
        ) as bar:
            while progress.step != progress.total_steps:
                self._step()
                bar.update()
                if probe.is_due():
                    self._settle()
                    probe.read(self.say)
                    bar.total = progress.total_steps
                last = progress.step == progress.total_steps
                if progress.step % self.log_every == 0 or last:
                    self._log(bar)
                stopping = stop.signal_number is not None and not last
                if last or stopping or time.monotonic() - saved > self.checkpoint_every_sec:
                    self._settle()
                    save_checkpoint(
                        self.checkpoint_path,
                        self.identity,
                        named_weights(self.model),
                        self.optimizer,
                        progress,
                    )
                    saved = time.monotonic()
                if stopping:
                    raise TrainingInterruptedError(stop.signal_number, progress.step)

    def _settle(self) -> None:
        """Wait for the device, book time and loss; the only place that synchronises."""
        self.progress.loss_sum = self._loss_sum.item()
        self.progress.train_sec = self._sec_before + time.monotonic() - self._begin
        if not math.isfinite(self.progress.loss_sum):
            raise FloatingPointError(
                f"the loss is no longer finite at step {self.progress.step}; lower --learning-rate"
            )

    def _log(self, bar: tqdm) -> None:
        """Close an entry of the loss curve and show it."""
        self._settle()
        progress = self.progress
        mean = progress.loss_sum / progress.loss_count
        progress.curve.append((progress.step, mean))
        progress.loss_sum, progress.loss_count = 0.0, 0
        self._loss_sum.zero_()
        tokens = (progress.step - self._first_step) * self.recipe.tokens_per_step
        speed = tokens / (progress.train_sec - self._sec_before)
        bar.set_postfix_str(f"loss {mean:.3f}, {speed:,.0f} tokens/s", refresh=False)


class SpeedProbe:
    """Measures the speed over some of a session's first steps, says how long the rest takes, and fixes the number
    of steps where --max-minutes leaves it open, which has to happen before warm-up ends."""

    def __init__(self, progress: Progress, recipe: Recipe) -> None:
        self.progress, self.recipe = progress, recipe
        self.end = progress.step + PROBE_STEPS
        if progress.total_steps is None:
            self.end = min(self.end, recipe.warmup_steps)
        self.begin = min(progress.step + PROBE_SKIP, self.end - 1)
        self.begin_sec = progress.train_sec

    def is_due(self) -> bool:
        return self.progress.step in (self.begin, self.end)

    def read(self, say: Callable[[str], None]) -> None:
        """Take a reading; `progress.train_sec` must be up to date."""
        progress, recipe = self.progress, self.recipe
        if progress.step == self.begin:
            self.begin_sec = progress.train_sec
            return
        step_sec = (progress.train_sec - self.begin_sec) / (self.end - self.begin)
        if progress.total_steps is None:
            fits = progress.step + int((recipe.max_minutes * 60 - progress.train_sec) / step_sec)
            progress.total_steps = max(recipe.warmup_steps + 1, min(recipe.steps, fits))
            say(f"--max-minutes {recipe.max_minutes:g}: {progress.total_steps} of {recipe.steps} steps")
        minutes = (progress.total_steps - progress.step) * step_sec / 60
        say(f"{1 / step_sec:.1f} steps/s, {minutes:.1f} minutes to go")
