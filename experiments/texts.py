"""The texts of every command: bundled ones, files and folders of any kind the `datasets` library reads, hub data sets.

A text is a sequence of documents: the records of a file, what the character U+001C separates in a .txt file, the
files of a folder. It is read anew whenever it is needed, a document at a time, and identified by the SHA-256 of its
documents. Names say where it came from: a key of the table `DATASETS`, a file's stem, a hub name.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from experiments.config import SetupError, first_line, unknown_name
from experiments.hub import datasets_library, hub_rows

ASSETS = Path(__file__).resolve().parent / "assets" / "texts"
RANDOM_TOKENS = "random_tokens"
DOCUMENT_SEPARATOR = "\x1c"
"""The file separator character ends a document within a .txt file; it is itself no part of the text."""

_RECORDS: dict[str, tuple[str, dict]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""Suffix -> the reader of `datasets` and its options. Not .txt: that reader rewrites line ends."""
FILE_TYPES = (".txt", *_RECORDS)
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
_READABLE = f"{', '.join(FILE_TYPES)}, nor one of these compressed ({', '.join(COMPRESSIONS)})"
_READ_NBYTES = 1 << 20

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Text:
    """One text.

    `key` names files, `experiment` is for the eye, `dataset` says where it is from. `documents` reads it from its
    beginning; it is None for `random_tokens`, which are only for models with random weights. `sha256`: of the UTF-8
    bytes, with the separator character between documents. `skipped`: files of its folder that are no texts.
    """

    key: str
    experiment: str
    dataset: str
    documents: Documents | None
    sha256: str = ""
    num_characters: int = 0
    num_documents: int = 0
    skipped: tuple[Path, ...] = ()

    @property
    def warning(self) -> str:
        """Which files were not read; "" where all were."""
        if not self.skipped:
            return ""
        names, left = ", ".join(map(str, self.skipped[:5])), len(self.skipped) - 5
        more = f" and {left} more" if left > 0 else ""
        return f"data set {self.dataset}: not read, for they are no texts: {names}{more}"


def _bundled(key: str, experiment: str) -> Text:
    return Text(key, experiment, key, lambda: _text_file(ASSETS / f"{key}.txt"))


def _joined(key: str, experiment: str, dataset: str, *where: str | None) -> Text:
    """A hub data set whose rows make one document, joined as the usual perplexity evaluations join WikiText's."""
    rows, _ = hub_rows(dataset, *where)
    text = "\n\n".join(rows["text"])
    return Text(key, experiment, dataset, lambda: iter([text]))


_WIKITEXT = ("wikitext:wikitext-103-v1", "Salesforce/wikitext", "wikitext-103-v1", "test")
DATASETS: dict[str, Callable[[], Text]] = {
    "demo_encyclopaedia": lambda: _bundled("demo_encyclopaedia", "Demo encyclopaedia"),
    "demo_narrative": lambda: _bundled("demo_narrative", "Demo narrative"),
    "wikitext": lambda: _joined("wikitext", "WikiText-103", *_WIKITEXT),
    "pg19": lambda: _joined("pg19", "PG19", "pg19:test", "emozilla/pg19-test", None, "test"),
    RANDOM_TOKENS: lambda: Text(RANDOM_TOKENS, "Random tokens", RANDOM_TOKENS, None, hashlib.sha256(b"").hexdigest()),
}


def default_datasets(has_tokenizer: bool) -> tuple[str, ...]:
    """The bundled texts; random tokens for a model with random weights, which has no tokenizer."""
    return ("demo_encyclopaedia", "demo_narrative") if has_tokenizer else (RANDOM_TOKENS,)


def load_texts(names: Sequence[str], text_key: str = "text") -> list[Text]:
    """Find each data set and read it once; raises SetupError for what cannot be read.

    `names`: keys of `DATASETS`, files, folders, hub names (`owner/name[:config][@split]`).
    `text_key`: the key or column that holds the text of a record. Texts with equal keys (two files of one stem, or
    a file that is called as a data set is) get 8 hex digits of their hash behind the stem.
    """
    texts = [_surveyed(_find(name, text_key)) for name in names]
    stems = [text.key for text in texts]
    return [
        replace(text, key=f"{text.key}-{text.sha256[:8]}")
        if name not in DATASETS and (text.key in DATASETS or stems.count(text.key) > 1)
        else text
        for name, text in zip(names, texts, strict=True)
    ]


def load_as_one(names: Sequence[str], text_key: str = "text") -> Text:
    """Several data sets as one text: their documents in order. Raises SetupError as `load_texts` does."""
    texts = [_find(name, text_key) for name in names]
    for text in texts:
        if text.documents is None:
            raise SetupError(f"data set {text.dataset} is for models with random weights (random:<size>) only")
    label = " + ".join(text.dataset for text in texts)
    skipped = tuple(path for text in texts for path in text.skipped)

    def documents() -> Iterator[str]:
        return chain.from_iterable(text.documents() for text in texts)

    return _surveyed(Text(texts[0].key, label, label, documents, skipped=skipped))


def _surveyed(text: Text) -> Text:
    """The text with its hash and sizes: all of it has been read once, and is text."""
    if text.documents is None:
        return text
    digest, num_characters, num_documents, is_blank = hashlib.sha256(), 0, 0, True
    for document in text.documents():
        if "\x00" in document:
            raise SetupError(f"data set {text.dataset}: not a text (it holds NUL characters)")
        try:
            digest.update((DOCUMENT_SEPARATOR if num_documents else "").encode() + document.encode("utf-8"))
        except UnicodeEncodeError:
            raise SetupError(f"data set {text.dataset}: holds characters that are no text (surrogates)") from None
        num_characters += len(document)
        num_documents += 1
        is_blank = is_blank and (not document or document.isspace())
    if is_blank:
        raise SetupError(f"data set {text.dataset}: the text is empty")
    return replace(text, sha256=digest.hexdigest(), num_characters=num_characters, num_documents=num_documents)


# Finding texts


def _find(name: str, text_key: str) -> Text:
    if name in DATASETS:
        return DATASETS[name]()
    path = Path(name)
    if path.is_dir():
        return _folder(path, text_key)
    if path.exists():
        if _kind(path) is None:
            raise SetupError(f"data set {path}: not one of {_READABLE}")
        stem = (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).stem
        return _named(stem, path.stem, path.name, lambda: _file(path, text_key))
    if _kind(path) is not None or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SetupError(f"data set {name}: no such file or folder")
    if "/" in name:
        return _hub(name, text_key)
    raise SetupError(f"{unknown_name('data set', name, DATASETS)}; or a file, a folder, a hub name (owner/name)")


def _named(stem: str, experiment: str, dataset: str, documents: Documents, skipped: Iterable[Path] = ()) -> Text:
    key = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem)
    return Text(key, experiment, dataset, documents, skipped=tuple(skipped))


def _folder(folder: Path, text_key: str) -> Text:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if _kind(path) is not None]
    if not texts:
        raise SetupError(f"data set {folder}: the folder holds no text: none of its {len(files)} files is {_READABLE}")
    skipped = (path.relative_to(folder) for path in files if _kind(path) is None)
    name = folder.resolve().name
    return _named(name, name, name, lambda: chain.from_iterable(_file(path, text_key) for path in texts), skipped)


def _hub(name: str, text_key: str) -> Text:
    """`owner/name[:config][@split]`; each row is a document."""
    where, _, wanted = name.partition("@")
    repo, _, config = where.partition(":")
    rows, split = hub_rows(name, repo, config or None, wanted or None)
    return _named(
        where.replace("/", "--"), where, f"{where}@{split}", lambda: filter(None, record_texts(rows, text_key, name))
    )


def _kind(path: Path) -> str | None:
    """A file's type: `book.txt.xz` is ".txt"; `book.xz` is taken for text. None if it is not read."""
    compressed = path.suffix.lower() in COMPRESSIONS
    kind = (path.with_suffix("") if compressed else path).suffix.lower()
    if compressed and not kind:
        return ".txt"
    return kind if kind in FILE_TYPES else None


# Reading files


def _file(path: Path, text_key: str) -> Iterator[str]:
    return _text_file(path) if _kind(path) == ".txt" else filter(None, _record_file(path, text_key))


def _text_file(path: Path) -> Iterator[str]:
    held: list[str] = []
    for part in _characters(path):
        *ended, rest = part.split(DOCUMENT_SEPARATOR)
        for end in ended:
            if document := "".join([*held, end]):
                yield document
            held = []
        held.append(rest)
    if document := "".join(held):
        yield document


def _characters(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in parts, as it stands there (line ends too), without a byte-order mark."""
    import fsspec

    decoder, n_read, block = codecs.getincrementaldecoder("utf-8-sig")(), 0, b"-"
    with _readable(path), fsspec.open(str(path), "rb", compression="infer") as file:
        while block:
            block = file.read(_READ_NBYTES)
            try:
                part = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                held = len(error.object) - len(block)  # bytes of an unfinished character come before the block
                raise SetupError(f"data set {path}: not UTF-8 text (byte {n_read + error.start - held})") from None
            n_read += len(block)
            yield part


def _record_file(path: Path, text_key: str) -> Iterator[str]:
    """The texts of a file's records, as `datasets` reads them."""
    datasets = datasets_library(str(path))
    if not path.stat().st_size:
        return
    reader, options = _RECORDS[_kind(path)]
    if reader == "csv":  # pandas would read "NA" as a missing value and "3" as a number
        options = {**options, "converters": {text_key: str}, "keep_default_na": False}
    with _readable(path, is_json_lines=_kind(path) in (".jsonl", ".ndjson")):
        rows = datasets.load_dataset(reader, data_files=[str(path)], split="train", streaming=True, **options)
        yield from record_texts(rows, text_key, str(path))


def record_texts(rows: Iterable[dict], text_key: str, source: str) -> Iterator[str]:
    """The text of each record; raises SetupError that names the first record that has none."""
    for number, row in enumerate(rows, start=1):
        value = row.get(text_key)
        if not isinstance(value, str):
            there = f"is {type(value).__name__}" if value is not None else "is missing"
            keys = ", ".join(key for key, item in row.items() if item is not None)
            raise SetupError(
                f"data set {source}: record {number}: the text under the key {text_key!r} {there} "
                f"(it has: {keys or 'nothing'}); --text-key names another key"
            )
        yield value


@contextmanager
def _readable(path: Path, is_json_lines: bool = False) -> Iterator[None]:
    """Turn what a reader raises (each has its own errors) into a SetupError that says where the file is wrong."""
    try:
        yield
    except SetupError:
        raise
    except Exception as error:
        where = _wrong_line(path) if is_json_lines else ""
        raise SetupError(f"data set {path}: cannot be read: {where or first_line(error)}") from None


def _wrong_line(path: Path) -> str:
    """The first line of a .jsonl file that is no JSON object; "" if there is none (or the file itself is broken)."""
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
    except ValueError as error:
        return f"line {number} is not valid JSON ({error})"
    except (OSError, EOFError):
        pass
    return ""
