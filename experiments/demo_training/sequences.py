"""From a text to training sequences: documents, tokenizer, windows."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from experiments.config import SetupError, first_line
from experiments.texts import DOCUMENT_SEPARATOR, load_as_one

END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 0
ENCODED_AT_ONCE = 16  # documents: bounds the memory that encoding takes


def read_text(path: Path) -> str:
    """The text of a file or folder, as every command reads it; raises SetupError (a ValueError)."""
    return DOCUMENT_SEPARATOR.join(load_as_one([str(path)]).documents()).replace("\r\n", "\n")


def read_documents(data: str, min_characters: int) -> list[str]:
    """The documents of `--data`, none of which a training sequence will leave.

    Short neighbours (the rows of a line-by-line data set) are joined until each has `min_characters`, but for the
    last.

    Raises:
        SetupError: there is no text to train on.
    """
    if data.startswith("hf:"):
        name, config, split, column = [*data.removeprefix("hf:").split(":"), "", "", "", ""][:4]
        try:
            texts = list(datasets.load_dataset(name, config or None, split=split or "train")[column or "text"])
        except Exception as error:  # the library raises dozens of kinds; all mean that there is no text to train on
            what = f"{type(error).__name__}: {first_line(error)}"
            raise SetupError(f"--data {data}: could not be loaded ({what})") from error
    else:
        texts = read_text(Path(data)).split(DOCUMENT_SEPARATOR)
    documents = [""]
    for text in filter(str.strip, texts):
        if len(documents[-1]) >= min_characters:
            documents.append(text)
        else:
            documents[-1] += f"\n\n{text}" if documents[-1] else text
    if not documents[0]:
        raise SetupError(f"--data {data}: its rows hold no text")
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts `<|endoftext|>`, the model's sink, in front of every text by itself."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise SetupError(f"the text is too small for --vocab-size {vocab_size}: it yields {size} entries")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1",
        special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        # Without this, Transformers 4.x returns token_type_ids, which GPT-NeoX's generate() refuses.
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads, in Transformers 4.56 to 5.x."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # Transformers 5 writes a class name here that 4.x does not know; this one both know.
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[np.ndarray]:
    """The token ids of each document, without special tokens, uint16 `[tokens]`."""
    encoded: list[np.ndarray] = []
    for start in tqdm(range(0, len(documents), ENCODED_AT_ONCE), desc="encoding", disable=None):
        some = documents[start : start + ENCODED_AT_ONCE]
        rows = tokenizer(some, add_special_tokens=False, verbose=False).input_ids
        encoded += [np.asarray(row, dtype=np.uint16) for row in rows]
    return encoded


class Windows(Dataset):
    """The sequences of a run: sequence i is `<|endoftext|>` and a window of one document, by the seed and i alone.

    Without that first token in training no attention sink forms (section 3.3 of the StreamingLLM paper). In every
    epoch each document is cut into windows anew, from a random offset, and the windows of all documents are shuffled.

    Args:
        documents: token ids of each, uint16 `[tokens]`; those too short for a window are left out.
        count: sequences of the whole run.
    """

    def __init__(self, documents: list[np.ndarray], context_length: int, count: int, seed: int) -> None:
        self.width, self.count, self.seed = context_length - 1, count, seed
        lengths = np.array([len(document) for document in documents])
        # One window fewer than would fit, so that the first can begin anywhere in the first `width` tokens.
        self.windows = np.where(lengths >= self.width, np.maximum(lengths // self.width - 1, 1), 0)
        self.per_epoch = int(self.windows.sum())
        if self.per_epoch == 0:
            raise SetupError(
                f"the text is too small: no document has {self.width} tokens (the longest has {lengths.max()}), "
                f"which a training sequence of --context-length {context_length} needs"
            )
        self.slack = (lengths - self.windows * self.width).clip(0, self.width - 1)
        self.starts = np.cumsum(lengths) - lengths
        self.ids = np.concatenate(documents)
        self.begins = lru_cache(maxsize=2)(self._begins)  # of the present epoch and the next

    def _begins(self, epoch: int) -> np.ndarray:
        """Where every window of an epoch begins, shuffled: int64 `[per_epoch]`."""
        random = np.random.default_rng([self.seed, epoch])
        first = self.starts + random.integers(0, self.slack + 1)  # of each document
        number = np.arange(self.per_epoch) - np.repeat(np.cumsum(self.windows) - self.windows, self.windows)
        return random.permutation(np.repeat(first, self.windows) + self.width * number)

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch: int64 `[batch_size, context_length]` ids, and labels that leave out the first token."""
        begins = [self.begins(i // self.per_epoch)[i % self.per_epoch] for i in indices]
        windows = self.ids[np.array(begins)[:, None] + np.arange(self.width)].astype(np.int64)
        ids = torch.nn.functional.pad(torch.from_numpy(windows), (1, 0), value=END_OF_TEXT_ID)
        return {"input_ids": ids, "labels": ids.index_fill(1, torch.tensor([0]), -100)}
