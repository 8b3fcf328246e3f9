"""Records, tokenizers and tiny models that the tests of training share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlmamba.model import VLM, Tokenizer, Turn
from vlmamba.train.recipes import Family, tiny_config
from vlmamba.train.records import Record


def qa_record(question: str, answer: str, image: Path | None = None) -> Record:
    """Return a conversation of one question and its answer."""
    return Record((Turn("user", question), Turn("assistant", answer)), () if image is None else (image,))


def tokenizer_of(records: Iterable[Record], vocab_size: int = 280) -> Tokenizer:
    """Train a tokenizer on every turn of the records."""
    return Tokenizer.train([turn.text for record in records for turn in record.turns], vocab_size)


def tiny_vlm(family: Family, tokenizer: Tokenizer) -> VLM:
    """Build the demo's tiny model of a family with the tokenizer, its weights from the global generator."""
    return VLM(tiny_config(family, tokenizer.vocab_size), tokenizer)
