"""NVIDIA kvpress as an optional method: whether it can run here, which presses there are, and how it is imported.

Importing kvpress replaces Transformers' attention functions for the whole process. Here it is imported only when
its method runs, and its replacements are in force only while that method does: the other methods run, and are
timed, with Transformers' own functions whether kvpress is among the methods or not.
"""

import importlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

_PACKAGE = "kvpress"
_DECISIVE = ("transformers", "torch")
_OLDEST = "0.5"
_PREFILL_ONLY = "it scores a whole prompt at once and cannot run in the decode loop"
_MANY_QUERIES = "it scores with many recent queries; with compression at every step there is one"
_OTHER_KIND = "it is no ScorerPress, and kvpress's decode loop takes no other"


@dataclass(frozen=True)
class PressEntry:
    """A press of kvpress: its class, the keyword under which it takes the number of sinks, what it needs.

    `cannot` says why it cannot run in the decode loop ("" if it can). `needs_queries`: it recomputes the query from
    separate, fully rotary projections, which not every model family has.
    """

    class_name: str
    sink_keyword: str = ""
    needs_queries: bool = False
    cannot: str = ""


PRESSES: dict[str, PressEntry] = {
    "streaming_llm": PressEntry("StreamingLLMPress", sink_keyword="n_sink"),
    "knorm": PressEntry("KnormPress"),
    "keydiff": PressEntry("KeyDiffPress"),
    "random": PressEntry("RandomPress"),
    "lagkv": PressEntry("LagKVPress", sink_keyword="n_sink"),
    "cur": PressEntry("CURPress", sink_keyword="num_sinks"),
    "tova": PressEntry("TOVAPress", needs_queries=True),
    "snapkv": PressEntry("SnapKVPress", cannot=_MANY_QUERIES),
    "pyramidkv": PressEntry("PyramidKVPress", cannot=_MANY_QUERIES),
    "expected_attention": PressEntry("ExpectedAttentionPress", sink_keyword="n_sink", needs_queries=True),
    "cap": PressEntry("CapPress", needs_queries=True),
    "non_causal_attention": PressEntry("NonCausalAttnPress", cannot=_PREFILL_ONLY),
    "leverage": PressEntry("LeverageScorePress", cannot=_PREFILL_ONLY),
    "compactor": PressEntry("CompactorPress", cannot=_PREFILL_ONLY),
    "observed_attention": PressEntry("ObservedAttentionPress", cannot="it needs attention weights over all queries"),
    "think": PressEntry("ThinKPress", cannot=_OTHER_KIND),
    "simlayerkv": PressEntry("SimLayerKVPress", cannot=_OTHER_KIND),
    "duo_attention": PressEntry("DuoAttentionPress", cannot=_OTHER_KIND),
    "finch": PressEntry("FinchPress", cannot=_OTHER_KIND),
    "kvzip": PressEntry("KVzipPress", cannot=_OTHER_KIND),
}


def kvpress_version() -> str | None:
    """The installed version of kvpress, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def kvpress_unavailable() -> str | None:
    """Why kvpress cannot run in this environment, from package metadata alone; None if it can."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    version = kvpress_version()
    if version is None:
        return "the package kvpress is not installed (pip install kvpress)"
    if Version(version) < Version(_OLDEST):
        return f"kvpress {version} is installed; {_OLDEST} or newer is needed"
    for requirement in map(Requirement, importlib.metadata.requires(_PACKAGE) or ()):
        if requirement.name in _DECISIVE:  # with other versions of the rest it runs
            installed = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(installed, prereleases=True):
                return f"kvpress {version} needs {requirement.name}{requirement.specifier}; {installed} is installed"
    return None


_patched: dict[str, object] = {}  # Transformers' attention functions as importing kvpress leaves them


def import_adapter() -> ModuleType:
    """`experiments.kvpress_neox`, importing kvpress with it but keeping Transformers' attention functions in force."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        return importlib.import_module("experiments.kvpress_neox")
    finally:
        after = {name: f for name, f in ALL_ATTENTION_FUNCTIONS.items() if before.get(name) is not f}
        if after:
            for name, function in after.items():
                # Functions that others registered pass the work on to Transformers' own, with other arguments.
                if (getattr(before.get(name), "__module__", None) or "").startswith("transformers."):
                    _patched[name] = function
            _put_back(before, after)


@contextmanager
def kvpress_attention_functions() -> Iterator[None]:
    """Within it, Transformers uses the attention functions that kvpress installs when it is imported."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    for name, function in _patched.items():
        ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        _put_back(before, _patched)


def _put_back(before: dict, changed: dict) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in changed:
        # Dropping this instance's entry uncovers Transformers' shared one, so that later registrations are seen.
        del ALL_ATTENTION_FUNCTIONS[name]
        if name in before and ALL_ATTENTION_FUNCTIONS.get(name) is not before[name]:
            ALL_ATTENTION_FUNCTIONS[name] = before[name]
