"""The texts that are evaluated: bundled ones, public data sets, files; and their tokens.

A text is loaded whole and identified by the SHA-256 of its UTF-8 bytes. Names say where a text came from: a key of
the table `DATASETS`, or a file's stem.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.config import SetupError, unknown_name
from experiments.hub import hub_dataset_column

ASSETS = Path(__file__).resolve().parent / "assets" / "texts"
RANDOM_TOKENS = "random_tokens"
FILE_TYPES = (".txt", ".json", ".jsonl")

# Tokenising a prefix gives the first tokens of the whole text only up to where the prefix was cut: see `tokenise`.
_WHOLE_TEXT_CHARS = 1_000_000
_CHARS_PER_TOKEN = 8
_CUT_MARGIN_TOKENS = 64


@dataclass(frozen=True)
class Text:
    """One text: its key (file names), display name, where it is from, and what it says.

    `text` is None for `random_tokens`, which has no text and is only for models with random weights.
    """

    key: str
    experiment: str
    dataset: str
    text: str | None
    sha256: str


def _bundled(key: str, experiment: str) -> Text:
    path = ASSETS / f"{key}.txt"
    if not path.is_file():
        raise SetupError(f"the bundled text {key} is missing: no file {path.name} in experiments/assets/texts")
    return _named(key, experiment, key, read_text_file(path))


def _wikitext() -> Text:
    # Joined as the usual perplexity evaluations of WikiText do.
    text = "\n\n".join(hub_dataset_column("Salesforce/wikitext", "wikitext-103-v1", "test", "text"))
    return _named("wikitext", "WikiText-103", "wikitext:wikitext-103-v1", text)


def _pg19() -> Text:
    text = "\n\n".join(hub_dataset_column("emozilla/pg19-test", None, "test", "text"))
    return _named("pg19", "PG19", "pg19:test", text)


def _random_tokens() -> Text:
    return Text(RANDOM_TOKENS, "Random tokens", RANDOM_TOKENS, None, hashlib.sha256(b"").hexdigest())


DATASETS: dict[str, Callable[[], Text]] = {
    "demo_encyclopaedia": lambda: _bundled("demo_encyclopaedia", "Demo encyclopaedia"),
    "demo_narrative": lambda: _bundled("demo_narrative", "Demo narrative"),
    "wikitext": _wikitext,
    "pg19": _pg19,
    RANDOM_TOKENS: _random_tokens,
}


def default_datasets(has_tokenizer: bool) -> tuple[str, ...]:
    """The bundled texts; random tokens for a model with random weights, which has no tokenizer."""
    return ("demo_encyclopaedia", "demo_narrative") if has_tokenizer else (RANDOM_TOKENS,)


def load_texts(names: Sequence[str]) -> list[Text]:
    """Load each data set by its key or its file's path; raises SetupError for what cannot be read.

    Texts with equal keys (two files of one stem, or a file that is called as a data set is) get 8 hex digits of
    their hash behind the stem.
    """
    texts = [_load(name) for name in names]
    from_table = [name in DATASETS for name in names]
    stems = [text.key for text in texts]
    return [
        replace(text, key=f"{text.key}-{text.sha256[:8]}")
        if not table and (text.key in DATASETS or stems.count(text.key) > 1)
        else text
        for text, table in zip(texts, from_table, strict=True)
    ]


def _load(name: str) -> Text:
    if name in DATASETS:
        return DATASETS[name]()
    path = Path(name)
    looks_like_a_path = path.suffix or "/" in name or path.exists()
    if not looks_like_a_path:
        error = unknown_name("data set", name, DATASETS)
        raise SetupError(f"{error}; or the path of a {', '.join(FILE_TYPES)} file")
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem)
    return _named(stem, path.stem, path.name, read_text_file(path))


def _named(key: str, experiment: str, dataset: str, text: str) -> Text:
    if not text.strip():
        raise SetupError(f"data set {dataset}: the text is empty")
    try:
        sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError:
        raise SetupError(f"data set {dataset}: holds characters that are no text (lone surrogates)") from None
    return Text(key, experiment, dataset, text, sha256)


def read_text_file(path: Path) -> str:
    """The text of a .txt file (UTF-8), or the `text` values of a .json or .jsonl file, joined by blank lines."""
    if path.suffix.lower() not in FILE_TYPES:
        raise SetupError(f"data set {path}: not one of {', '.join(FILE_TYPES)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SetupError(f"data set {path}: cannot be read ({error.strerror})") from None
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SetupError(f"data set {path}: not UTF-8 text (byte {error.start})") from None
    if "\x00" in content:
        raise SetupError(f"data set {path}: not a text file (it holds NUL bytes)")
    readers = {".txt": lambda: content, ".json": lambda: _json_text(path, content)}
    text = readers.get(path.suffix.lower(), lambda: _jsonl_text(path, content))()
    if not text.strip():
        raise SetupError(f"data set {path}: the file is empty")
    return text


def _json_text(path: Path, content: str) -> str:
    try:
        records = json.loads(content) if content.strip() else []
    except json.JSONDecodeError as error:
        raise SetupError(f"data set {path}: not valid JSON ({error})") from None
    return _join_records(path, records if isinstance(records, list) else [records])


def _jsonl_text(path: Path, content: str) -> str:
    records = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SetupError(f"data set {path}: line {number} is not valid JSON ({error})") from None
    return _join_records(path, records)


def _join_records(path: Path, records: list) -> str:
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise SetupError(f"data set {path}: each record must be an object with a string under the key 'text'")
    return "\n\n".join(record["text"] for record in records)


def tokenise(text: Text, tokenizer, limit: int) -> torch.Tensor:
    """The first `limit` tokens of the text, as the tokenizer itself makes them: int64 [1, n], n <= limit.

    The tokenizer's own special tokens (a token in front, say) are there if it puts them there. A long text is not
    tokenised whole: its first characters are, and twice as many once more; tokens well before the cut that agree
    are those of the whole text. Raises SetupError for a text of fewer than two tokens, special ones not counted.
    """
    if not any(_has_two_tokens(part, tokenizer) for part in (text.text[:1_000], text.text)):
        raise SetupError(f"data set {text.dataset}: the text has fewer than two tokens, there is nothing to predict")

    def ids_of(chars: int) -> list[int]:
        return tokenizer(text.text[:chars], verbose=False).input_ids

    chars = max(_WHOLE_TEXT_CHARS, limit * _CHARS_PER_TOKEN)
    ids = ids_of(chars)
    while chars < len(text.text):
        wanted, longer = ids[:limit], ids_of(2 * chars)
        if len(ids) >= limit + _CUT_MARGIN_TOKENS and longer[:limit] == wanted:
            break
        chars, ids = 2 * chars, longer
    return torch.tensor([ids[:limit]], dtype=torch.int64)


def _has_two_tokens(text: str, tokenizer) -> bool:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) >= 2


def random_tokens(text: Text, vocab_size: int, limit: int, seed: int) -> torch.Tensor:
    """Token ids in place of a text, for a model without a tokenizer: int64 [1, limit], a function of seed and text."""
    mixed = hashlib.sha256(f"{seed}:{text.sha256}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(mixed[:15], 16))
    return torch.randint(vocab_size, (1, limit), generator=generator, dtype=torch.int64)
