"""Progress bars, where a person watches: a cell's tokens with the running perplexity."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from experiments.progress import LossDisplay


@contextmanager
def progress_bar(title: str, decode_steps: int, wanted: bool, show_perplexity: bool) -> Iterator[LossDisplay]:
    """A bar on standard error for one cell; the display that it gives shows nothing where nobody watches."""
    visible = wanted and sys.stderr.isatty()
    with tqdm(desc=title, total=decode_steps, unit=" tokens", leave=False, disable=not visible) as bar:

        def show(steps: int, perplexity: float | None) -> None:
            if show_perplexity and perplexity is not None:
                bar.set_postfix_str(f"perplexity {perplexity:.2f}", refresh=False)
            bar.update(steps)

        yield LossDisplay(show) if visible else LossDisplay.silent()
