"""lm-evaluation-harness with a model that streams (Xiao et al., 2024): any of its tasks, at any length.

    python scripts/lm_eval_streaming.py --model_args pretrained=demo,n_sink=4,window_size=252 --tasks wikitext

Takes what `lm_eval` takes; `--model` is `streaming` where none is named. Of a model: pretrained=, n_sink=,
window_size=, attn_backend=, engine=, dtype=, device_map=, tokenizer=, and of lm-eval's `hf` logits_cache=,
max_length=, add_bos_token=, prefix_token_id=, think_end_token=, enable_thinking=, chat_template_args=. Tasks that
make their texts themselves (RULER) need a tokenizer that they can load: tokenizer=FOLDER_OR_HUB_NAME.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file, perhaps from a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.cli import guarded
from experiments.config import SetupError


def main() -> int:
    """Run lm-eval's own command line; returns the exit code."""
    return guarded(_run)


def _run() -> int:
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        needed = f"lm-evaluation-harness cannot be imported ({error}): pip install -e '.[lm-eval]' in the checkout"
        if {"-h", "--help"} & {*sys.argv[1:]}:
            print(__doc__, needed, sep="\n")
            return 0
        raise SetupError(needed) from None
    import torch

    from experiments.lm_eval_model import NAME

    setup_logging()
    harness = HarnessCLI()
    arguments = harness.parse_args()
    if arguments.command == "run":
        arguments.model = arguments.model or NAME
        if arguments.device is None and not torch.cuda.is_available():
            arguments.device = "cpu"  # lm-eval's default is cuda:0
    harness.execute(arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
