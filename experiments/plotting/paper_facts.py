"""Figures that the paper reports: Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention
Sinks", ICLR 2024 (arXiv 2309.17453), by table and figure; they stand in `paper_facts.toml`.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reported:
    """What the paper reports for an experiment: in words, and as a table (`head` and `rows`), if it has one."""

    where: str
    text: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


_FACTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CITATION: str = _FACTS["citation"]
REPORTED = {name: Reported(**facts) for name, facts in _FACTS["reported"].items()}
