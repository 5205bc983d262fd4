"""The demo's tokenizer: byte-level BPE that puts `<|endoftext|>` in front of every text by itself.

The model makes that first token its attention sink, so it must not depend on the caller remembering it: it is
part of the tokenizer's post-processor. Byte-level means that every text is encoded and comes back unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MIN_VOCAB_SIZE = 1 + 256  # the special token and every byte
MAX_VOCAB_SIZE = 65_536  # token ids are kept as uint16
PIECE_CHARACTERS = 32_768
PIECES_PER_CALL = 512  # about 17 MB of text: bounds the memory that the encodings take
TOKENIZER_FORMAT = 1  # part of the cache key: raise it when the tokenizer's construction changes


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with `vocab_size` entries: `<|endoftext|>`, the 256 bytes, merges by frequency."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in documents for piece in split_pieces(text)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text is too small for --vocab-size {vocab_size}: it yields {tokenizer.get_vocab_size()} entries"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1",
        special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)],
    )
    return tokenizer


def split_pieces(text: str, length: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of about `length` characters whose encodings, put together, are the text's.

    The pre-tokenizer's expression always ends a word before white space that follows something else, and
    looks at nothing to the left of a word: a cut is therefore made in front of a blank or a line end that
    follows a character which is no white space. A text without such a place stays whole.
    """
    start = 0
    while len(text) - start > length:
        cut = start + length
        while cut < len(text) and not (text[cut] in " \n" and not text[cut - 1].isspace()):
            cut += 1
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents on all cores, without special tokens.

    Args:
        total: characters in all documents, for the progress bar.

    Returns:
        token ids of all documents one after the other, uint16 `[tokens]`, and the number of tokens of each
        document, int64 `[documents]`.
    """
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    batch: list[str] = []
    owners: list[int] = []

    def flush() -> None:
        for owner, encoding in zip(owners, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            ids.append(np.asarray(encoding.ids, dtype=np.uint16))
            lengths[owner] += len(encoding.ids)
        bar.update(sum(map(len, batch)))
        batch.clear()
        owners.clear()

    with tqdm(total=total, desc="encoding", unit="char", unit_scale=True, mininterval=progress_interval()) as bar:
        for document, text in enumerate(documents):
            lengths.append(0)
            for piece in split_pieces(text):
                batch.append(piece)
                owners.append(document)
                if len(batch) == PIECES_PER_CALL:
                    flush()
        flush()
    return np.concatenate(ids), np.asarray(lengths, dtype=np.int64)


def cached_tokenizer(documents: tuple[str, ...], data_sha256: str, vocab_size: int, work_dir: Path) -> Tokenizer:
    """The tokenizer of this text, from `work_dir` where it was trained before."""
    key = _key(TOKENIZER_FORMAT, data_sha256, vocab_size)
    path = work_dir / f"tokenizer-{key}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(documents, vocab_size)
    with atomic_path(path) as temporary:
        tokenizer.save(str(temporary), pretty=False)
    return tokenizer


def cached_encoding(
    tokenizer: Tokenizer, documents: tuple[str, ...], data_sha256: str, work_dir: Path
) -> tuple[np.ndarray, np.ndarray]:
    """`encode_documents`, from `work_dir` where the same text was encoded with the same tokenizer before."""
    key = _key(tokenizer.to_str(), data_sha256)
    ids_path, lengths_path = work_dir / f"tokens-{key}.npy", work_dir / f"lengths-{key}.npy"
    if ids_path.exists() and lengths_path.exists():
        return np.load(ids_path), np.load(lengths_path)
    ids, lengths = encode_documents(tokenizer, documents, sum(map(len, documents)))
    for path, array in ((lengths_path, lengths), (ids_path, ids)):
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    return ids, lengths


def progress_interval() -> float:
    """Seconds between two states of a progress bar: short on a terminal, long in a log file."""
    return 0.5 if sys.stderr.isatty() else 15.0


class atomic_path:  # noqa: N801 - reads as the context manager it is
    """Give a temporary name beside `path`; the file takes its real name only when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with open(self.temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as Transformers uses it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        # Without this, 4.x returns token_type_ids, which GPT-NeoX's generate() refuses.
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads, in Transformers 4.56 to 5.x."""
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as temporary:
        as_transformers(tokenizer).save_pretrained(temporary)
        path = Path(temporary) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # Transformers 5 writes a class name here that 4.x does not know; this one both know.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("backend", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
