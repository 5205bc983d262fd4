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
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .recipe import PROBE_SKIP, PROBE_STEPS, Recipe, build_model, use_training_attention

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
    """One training run; `run()` starts it, or goes on where its checkpoint left it.

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

    def run(self) -> dict[str, torch.Tensor]:
        """Train to the end; returns the weights, float32 on the CPU.

        Raises:
            TrainingInterruptedError: a signal came; the checkpoint holds the state.
            ValueError: the checkpoint is another run's.
            FloatingPointError: the loss is no longer finite.
        """
        if self.checkpoint_path.exists():
            self._restore(load_checkpoint(self.checkpoint_path, self.identity))
        if self.progress.step != self.progress.total_steps:
            self._compile()
            with StopRequest() as stop:
                self._train(stop)
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def _restore(self, state: dict[str, object]) -> None:
        self.model.load_state_dict(state["model"])
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

    def _step(self) -> torch.Tensor:
        progress, recipe = self.progress, self.recipe
        rate = recipe.learning_rate_at(progress.step, progress.total_steps or recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(self.batches.batch(progress.step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.loss_count += 1
        return loss.detach().double()

    def _train(self, stop: StopRequest) -> None:
        progress, recipe = self.progress, self.recipe
        first_step, before = progress.step, progress.train_sec
        begin = saved = time.monotonic()
        pending = torch.tensor(progress.loss_sum, dtype=torch.float64, device=self.device)

        def settle() -> None:
            """Wait for the device, book time and loss; the only place that synchronises."""
            progress.loss_sum = pending.item()
            progress.train_sec = before + time.monotonic() - begin
            if not math.isfinite(progress.loss_sum):
                raise FloatingPointError(
                    f"the loss is no longer finite at step {progress.step}; lower --learning-rate"
                )

        probe_from = probe_end = None
        if progress.total_steps is None:
            probe_end = min(first_step + PROBE_STEPS, recipe.warmup_steps)
            probe_from = min(first_step + PROBE_SKIP, probe_end - 1)
        probe_sec = 0.0
        with tqdm(total=progress.total_steps, initial=first_step, desc="training", unit="step") as bar:
            while progress.step != progress.total_steps:
                pending += self._step()
                bar.update()
                if progress.step in (probe_from, probe_end):
                    settle()
                    if progress.step == probe_end:
                        self._decide_total((progress.train_sec - probe_sec) / (probe_end - probe_from))
                        bar.total = progress.total_steps
                    probe_sec = progress.train_sec
                last = progress.step == progress.total_steps
                if progress.step % self.log_every == 0 or last:
                    settle()
                    mean = progress.loss_sum / progress.loss_count
                    progress.curve.append((progress.step, mean))
                    progress.loss_sum, progress.loss_count = 0.0, 0
                    pending.zero_()
                    speed = (progress.step - first_step) * recipe.tokens_per_step / (time.monotonic() - begin)
                    bar.set_postfix_str(f"loss {mean:.3f}, {speed:,.0f} tokens/s")
                if last or stop.signal_number or time.monotonic() - saved > self.checkpoint_every_sec:
                    settle()
                    save_checkpoint(self.checkpoint_path, self.identity, self.model, self.optimizer, progress)
                    saved = time.monotonic()
                if stop.signal_number and not last:
                    raise TrainingInterruptedError(stop.signal_number, progress.step)

    def _decide_total(self, step_sec: float) -> None:
        """Fix the number of steps from the speed measured, for --max-minutes."""
        left = self.recipe.max_minutes * 60 - self.progress.train_sec
        fits = self.progress.step + int(left / step_sec)
        self.progress.total_steps = max(self.recipe.warmup_steps + 1, min(self.recipe.steps, fits))
        minutes = (self.progress.total_steps - self.progress.step) * step_sec / 60
        self.say(
            f"{1 / step_sec:.1f} steps/s: {self.progress.total_steps} of {self.recipe.steps} steps fit into "
            f"--max-minutes {self.recipe.max_minutes:g}; {minutes:.1f} minutes to go"
        )
