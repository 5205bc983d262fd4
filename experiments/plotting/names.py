"""What a result file's name says.

Names read from the right, since a data set's name may hold anything, underscores included:

    <dataset>_main[_backend-<backend>].json
    <dataset>_<method>[_<mode>][_backend-<backend>].json
    ablation_<window_size|n_sink>[_backend-<backend>].json
    <stem of a main file>.<method>.nll.npz
"""

import re
from dataclasses import dataclass

from .style import METHODS, MODE_LABELS

# Names by which files know a method: those of today, and those of older files.
METHOD_KEYS = {**{key: key for key in METHODS}, "ours": "streaming"}
ABLATION_TYPES = ("window_size", "n_sink")

_BACKEND = r"(?:_backend-(?P<backend>[A-Za-z0-9]+))?"
_METHODS = "|".join(METHOD_KEYS)
_MODES = "|".join(MODE_LABELS)
_ABLATION = re.compile(rf"ablation_(?P<ablation>{'|'.join(ABLATION_TYPES)}){_BACKEND}")
_MAIN = re.compile(rf"(?P<dataset>.+)_main{_BACKEND}")
_SINGLE = re.compile(rf"(?P<dataset>.+)_(?P<method>{_METHODS})(?:_(?P<mode>{_MODES}))?{_BACKEND}")
_NLL = re.compile(rf"(?P<dataset>.+)_main{_BACKEND}\.(?P<method>{_METHODS})\.nll")


@dataclass(frozen=True)
class FileName:
    """A result file's name, taken apart. Fields that the name does not state are None."""

    kind: str  # "main" | "single" | "ablation" | "nll"
    dataset: str | None = None
    method: str | None = None
    mode: str | None = None
    backend: str | None = None
    ablation: str | None = None


_PATTERNS = (("nll", _NLL), ("ablation", _ABLATION), ("main", _MAIN), ("single", _SINGLE))


def parse_name(stem: str) -> FileName | None:
    """Take a file's name without its last suffix apart; None where it is not the name of a result file."""
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(stem)
        if match:
            fields = match.groupdict()
            if fields.get("method"):
                fields["method"] = METHOD_KEYS[fields["method"]]
            return FileName(kind, **fields)
    return None
