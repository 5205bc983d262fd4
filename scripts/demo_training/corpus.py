"""Reading the training text: where it comes from must not matter to anything after this module.

A source is a `.txt` file, a folder of them, an `.xz` of text, or a Hugging Face data set written as
`hf:<dataset>[:config[:split[:column]]]`. Whatever it is, the result is a tuple of documents. A training
sequence never spans two documents, so what belongs together has to arrive as one: the file separator
character (U+001C) splits a file into documents, and short neighbours (the rows of a line-by-line data set) are
joined.
"""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path

DOCUMENT_SEPARATOR = "\x1c"
HF_PREFIX = "hf:"
HF_FORM = "hf:<dataset>[:config[:split[:column]]]"


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and what identifies them.

    Attributes:
        name: the source without its folder, for the report.
        documents: the texts, none of them empty.
        sha256: hash over the documents and their boundaries.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))


def make_corpus(name: str, documents: list[str], min_characters: int) -> Corpus:
    """Drop empty documents, join those below `min_characters` with what follows, and hash the result."""
    joined = join_short_documents(documents, min_characters)
    if not joined:
        raise ValueError(f"--data {name}: holds no text (nothing but white space)")
    digest = hashlib.sha256()
    for document in joined:
        digest.update(document.encode("utf-8"))
        digest.update(DOCUMENT_SEPARATOR.encode())
    return Corpus(name, tuple(joined), digest.hexdigest())


def join_short_documents(documents: list[str], min_characters: int) -> list[str]:
    """Join neighbours until each document has `min_characters`; a short rest goes to the one before it."""
    joined: list[str] = []
    pending = ""
    for document in documents:
        if not document.strip():
            continue
        pending += document
        if len(pending) >= min_characters:
            joined.append(pending)
            pending = ""
        elif not pending.endswith("\n"):
            pending += "\n\n"
    if pending and joined:
        joined[-1] += ("" if joined[-1].endswith("\n") else "\n\n") + pending
    elif pending:
        joined.append(pending)
    return joined


def split_tail(corpus: Corpus, fraction: float = 0.1, max_characters: int = 100_000) -> tuple[Corpus, str]:
    """Cut the end of the last document off, to be kept out of training.

    Returns:
        the corpus without it, and the text that was cut off: `fraction` of the last document, at most
        `max_characters`.
    """
    last = corpus.documents[-1]
    cut = len(last) - min(int(len(last) * fraction), max_characters)
    kept = [*corpus.documents[:-1], last[:cut]]
    return make_corpus(corpus.name, kept, min_characters=0), last[cut:]


def read_corpus(spec: str, min_characters: int) -> Corpus:
    """Read the source `spec`; see the module's docstring for the forms it may take.

    Raises:
        ValueError: the source is missing, empty, not text, or cannot be loaded.
    """
    if spec.startswith(HF_PREFIX):
        return make_corpus(spec, _read_hf(spec), min_characters)
    path = Path(spec)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise ValueError(f"--data {spec}: the folder holds no .txt file")
        documents = [document for file in files for document in read_text(file).split(DOCUMENT_SEPARATOR)]
    else:
        documents = read_text(path).split(DOCUMENT_SEPARATOR)
    return make_corpus(path.name, documents, min_characters)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, unpacked where its name ends in `.xz`, with line ends as `\\n`.

    Raises:
        ValueError: missing, unreadable, empty, or not UTF-8 text.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file or folder") from None
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not raw.strip():
        raise ValueError(f"{path}: is empty")
    if b"\0" in raw:
        raise ValueError(f"{path}: is not text (zero byte at offset {raw.index(0)})")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start})") from None
    return text.replace("\r\n", "\n")


def _read_hf(spec: str) -> list[str]:
    """The rows of one text column of a Hugging Face data set, in order."""
    parts = spec.removeprefix(HF_PREFIX).split(":")
    if not parts[0] or len(parts) > 4:
        raise ValueError(f"--data {spec}: expected {HF_FORM}")
    name, config, split, column = [*parts, "", "", ""][:4]
    split, column = split or "train", column or "text"
    try:
        import datasets
    except ImportError:
        raise ValueError(f"--data {spec}: needs the package `datasets`, which is not installed") from None
    tried = f"data set {name!r}, configuration {config or 'default'!r}, split {split!r}"
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises dozens of kinds; all mean that there is no text to train on
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"--data {spec}: {tried} could not be loaded ({type(error).__name__}: {first_line}); "
            "without the hub, pass a local .txt, folder or .xz"
        ) from error
    if column not in rows.column_names:
        raise ValueError(f"--data {spec}: no column {column!r}; the columns are {', '.join(rows.column_names)}")
    texts = list(rows[column])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"--data {spec}: column {column!r} holds something other than text")
    return texts
