"""Texts of any length as a stream of pieces: files, folders, compressed files, records, named data sets.

Nothing here holds a text whole, except a named data set and a .json file, which can be had no other way.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from experiments.config import SetupError
from experiments.texts import DATASETS, FILE_TYPES, RANDOM_TOKENS, load_texts

DOCUMENT_SEPARATOR = "\x1c"
"""The file separator character ends a document within a .txt file; it is itself no part of the text."""

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A part of a document; the last one says that it is."""

    text: str
    ends_document: bool


Pieces = Callable[[], Iterator[Piece]]
"""Reads a text from its beginning, as often as it is called."""


@dataclass(frozen=True)
class Survey:
    """What a text holds. `sha256`: of its UTF-8 bytes, with the separator character between documents."""

    sha256: str
    characters: int
    documents: int


@dataclass(frozen=True)
class Corpus:
    """The texts that were asked for, in order, as one stream of documents."""

    name: str
    pieces: Pieces
    survey: Survey


def open_corpus(names: Sequence[str]) -> Corpus:
    """Find the texts and read them once, so that whatever is wrong with them is found before anything is computed.

    Args:
        names: keys of `experiments.texts.DATASETS`, files, or folders of files (sorted by name).

    Raises:
        SetupError: a name leads nowhere, or a file cannot be read or holds no text.
    """
    sources = [_find(name) for name in names]

    def pieces() -> Iterator[Piece]:
        for source in sources:
            yield from source()

    survey = survey_of(pieces())
    label = " + ".join(name if name in DATASETS else Path(name).name for name in names)
    if not survey.characters:
        raise SetupError(f"data set {label}: the text is empty")
    return Corpus(label, pieces, survey)


def survey_of(pieces: Iterable[Piece]) -> Survey:
    """Read everything once: hash, sizes, and whether all of it can be read."""
    digest = hashlib.sha256()
    characters = documents = 0
    begins, any_text = True, False
    for piece in pieces:
        if piece.text:
            if begins and documents:
                digest.update(DOCUMENT_SEPARATOR.encode())
            documents += begins
            begins = False
            characters += len(piece.text)
            any_text = any_text or not piece.text.isspace()
            try:
                digest.update(piece.text.encode("utf-8"))
            except UnicodeEncodeError:
                raise SetupError("a text holds characters that are no text (lone surrogates)") from None
        begins = begins or piece.ends_document
    return Survey(digest.hexdigest(), characters if any_text else 0, documents)


def documents_of(pieces: Iterable[Piece]) -> Iterator[Iterator[str]]:
    """The documents one after the other, each as its pieces; each has to be read to its end before the next."""
    pieces = iter(pieces)
    for head in pieces:
        yield _document(head, pieces)


def _document(piece: Piece, following: Iterator[Piece]) -> Iterator[str]:
    yield piece.text
    while not piece.ends_document:
        piece = next(following)
        yield piece.text


# Finding texts


def _find(name: str) -> Pieces:
    path = Path(name)
    if name == RANDOM_TOKENS:
        raise SetupError(f"data set {name} is for models with random weights (random:<size>) only")
    if name not in DATASETS and path.is_dir():
        return _folder(path)
    if name not in DATASETS and path.exists():
        return _file(path)
    if name not in DATASETS and (path.suffix or "/" in name):
        raise SetupError(f"data set {name}: no such file or folder")
    text = load_texts([name])[0].text
    return lambda: iter([Piece(text, True)])


def _folder(folder: Path) -> Pieces:
    files = sorted(path for path in folder.iterdir() if path.is_file() and _kind(path)[0] in READERS)
    if not files:
        raise SetupError(f"data set {folder}: the folder holds no {', '.join(FILE_TYPES)} file (or one of these .xz)")
    readers = [_file(path) for path in files]

    def pieces() -> Iterator[Piece]:
        for reader in readers:
            yield from reader()

    return pieces


def _kind(path: Path) -> tuple[str, bool]:
    """A file's type, and whether it is compressed: `book.txt.xz` is (".txt", True); `book.xz` is taken for text."""
    compressed = path.suffix.lower() == ".xz"
    kind = (path.with_suffix("") if compressed else path).suffix.lower()
    return kind or (".txt" if compressed else ""), compressed


def _file(path: Path) -> Pieces:
    kind, compressed = _kind(path)
    if kind not in READERS:
        raise SetupError(f"data set {path}: not one of {', '.join(FILE_TYPES)}, nor one of these compressed as .xz")
    return lambda: READERS[kind](path, _characters(path, lzma.open if compressed else open))


# Reading files


def _characters(path: Path, opener: Callable[..., BinaryIO]) -> Iterator[str]:
    """The text of a file in parts, as it stands there (line ends too), without a byte-order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    n_read, block = 0, b"-"
    try:
        with opener(path, "rb") as file:
            while block:
                block = file.read(READ_BYTES)
                if b"\x00" in block:
                    raise SetupError(f"data set {path}: not a text file (it holds NUL bytes)")
                text = decoder.decode(block, final=not block)
                n_read += len(block)
                if text:
                    yield text
    except UnicodeDecodeError as error:
        held = len(error.object) - len(block)  # bytes of an unfinished character come before the block
        where = n_read + error.start - held
        raise SetupError(f"data set {path}: not UTF-8 text (byte {where})") from None
    except (lzma.LZMAError, EOFError) as error:
        raise SetupError(f"data set {path}: not a whole .xz file ({error})") from None
    except OSError as error:
        raise SetupError(f"data set {path}: cannot be read ({error.strerror or error})") from None


def _text_pieces(path: Path, characters: Iterator[str]) -> Iterator[Piece]:
    for part in characters:
        *ended, rest = part.split(DOCUMENT_SEPARATOR)
        for text in ended:
            yield Piece(text, True)
        yield Piece(rest, False)
    yield Piece("", True)


def _json_pieces(path: Path, characters: Iterator[str]) -> Iterator[Piece]:
    try:
        value = json.loads("".join(characters) or "[]")
    except json.JSONDecodeError as error:
        raise SetupError(f"data set {path}: not valid JSON ({error})") from None
    for record in value if isinstance(value, list) else [value]:
        yield _record_piece(path, record)


def _jsonl_pieces(path: Path, characters: Iterator[str]) -> Iterator[Piece]:
    for number, line in enumerate(_lines(characters), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SetupError(f"data set {path}: line {number} is not valid JSON ({error})") from None
        yield _record_piece(path, record)


def _lines(characters: Iterator[str]) -> Iterator[str]:
    held: list[str] = []
    for part in characters:
        *ended, rest = part.split("\n")
        for line in ended:
            yield "".join([*held, line])
            held = []
        held.append(rest)
    yield "".join(held)


def _record_piece(path: Path, record: object) -> Piece:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise SetupError(f"data set {path}: each record must be an object with a string under the key 'text'")
    return Piece(record["text"], True)


READERS: dict[str, Callable[[Path, Iterator[str]], Iterator[Piece]]] = {
    ".txt": _text_pieces,
    ".json": _json_pieces,
    ".jsonl": _jsonl_pieces,
}
