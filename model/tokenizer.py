"""Tokenizer on the `tokenizers` library and its `tokenizer.json` format."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .text_files import read_json

END_OF_TEXT = "<|endoftext|>"
CONFIG = "tokenizer_config.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Character in the place of bytes that are none."""
MAX_NEW = 16
"""Tokens without a complete character that a stream decodes again; beyond, the first of them are settled."""
KEPT = 4
"""Tokens that settle nothing: a character has at most four bytes, and a token at least one."""
MAX_REMEMBERED = 1 << 16
"""Texts of up to three tokens that are remembered."""


class Tokenizer:
    """A tokenizer with an end-of-text token, which also serves as padding (as in GPT-NeoX).

    >>> tokenizer = Tokenizer.train(["a red circle", "a blue circle"], vocab_size=300)
    >>> tokenizer.decode(tokenizer.encode("a red circle"))
    'a red circle'

    Args:
        inner: tokenizer of the `tokenizers` library.
        eos: its end-of-text token.
    """

    def __init__(self, inner: tokenizers.Tokenizer, eos: str = END_OF_TEXT):
        self.inner = inner
        self.eos = eos
        eos_id = inner.token_to_id(eos)
        if eos_id is None:
            raise ValueError(f"the tokenizer has no token {eos!r}")
        self.eos_id: int = eos_id
        self._remembered: dict[tuple[int, ...], str] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`. A `tokenizer_config.json` beside it may name another end-of-text token.

        Args:
            path: of the file.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a tokenizer, or has no end-of-text token.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {e}") from e
        return cls(inner, _end_of_text(Path(path).with_name(CONFIG)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE tokenizer, which can encode any text.

        Args:
            texts: training corpus.
            vocab_size: most tokens.

        Returns:
            The tokenizer.
        """
        inner = tokenizers.Tokenizer(models.BPE())
        # Bytes as the alphabet, so that no text is unknown.
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, and the `tokenizer_config.json` with which `transformers` reads it.

        Args:
            path: of the `tokenizer.json`.
        """
        self.inner.save(str(path))
        self.save_settings(Path(path).with_name(CONFIG))

    def save_settings(self, path: Path) -> None:
        """Write a `tokenizer_config.json`.

        Args:
            path: of the file.
        """
        # Prompts are padded on the left, so that generated tokens follow them.
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "pad_token": self.eos,
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
        }
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @functools.cached_property
    def vocab_size(self) -> int:
        """Largest id plus one. Ids may have gaps where tokens were added."""
        return 1 + max(self.inner.get_vocab().values())

    @functools.cached_property
    def longest_token(self) -> int:
        """Most characters of a token's text."""
        return max(map(len, self.inner.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Encode a text. Nothing is added; `<|endoftext|>` in the text is the only special token.

        Args:
            text: any text.

        Returns:
            Token ids.

        Raises:
            ValueError: the text has half a surrogate pair, which is no character; or the tokenizer cannot encode it.
        """
        try:
            return self.inner.encode(text, add_special_tokens=False).ids
        except Exception as e:  # the library raises bare Exception, and TypeError for halves of surrogate pairs
            raise ValueError(f"the text cannot be tokenized: {text[:40]!a}: {e}") from e

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out."""
        return frozenset(i for i, token in self.inner.get_added_tokens_decoder().items() if token.special)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode tokens, leaving out special ones.

        Args:
            ids: token ids.

        Returns:
            The text.
        """
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def decode_window(self, ids: tuple[int, ...]) -> str:
        """Decode some tokens of a text, as `decode` does. Texts of a few tokens are remembered: they come again.

        Args:
            ids: token ids.

        Returns:
            The text.
        """
        if len(ids) > 3:
            return self.decode(ids)
        text = self._remembered.get(ids)
        if text is None:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            text = self._remembered[ids] = self.decode(ids)
        return text


def _end_of_text(config: Path) -> str:
    """Read the end-of-text token of a `tokenizer_config.json`, which may be absent."""
    if not config.exists():
        return END_OF_TEXT
    try:
        eos = read_json(config).get("eos_token")
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{config} is not a tokenizer's config: {e}") from e
    if isinstance(eos, dict):  # an AddedToken with its flags
        eos = eos.get("content")
    return eos or END_OF_TEXT


class HasTokenizer(Protocol):
    """A model that may have a tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...


def require_tokenizer(model: HasTokenizer) -> Tokenizer:
    """Return the model's tokenizer.

    Raises:
        ValueError: the model has none.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: set model.tokenizer")
    return model.tokenizer


class TextStream:
    """Incremental decoding: text of tokens as they arrive, without bytes of an incomplete character.

    Only the last tokens are decoded again, so that a token costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.text = ""
        """Text so far."""
        # Text of a token may depend on the one before: a decoder may drop the first space.
        self._known: tuple[int, ...] = ()
        """Last tokens whose text is complete."""
        self._new: tuple[int, ...] = ()
        """Tokens after them, of which a later token may change the text."""
        self._known_text = ""
        """Text of `_known` alone."""
        self._n_complete = 0
        """Length of the given text of all tokens before `_new`."""
        self._withheld = ""
        """Text after it of tokens before `_new`: replacement characters, which are given where a character follows."""
        self._is_settled = False
        """Whether `_known` are the first invalid bytes of several, and not a complete text."""

    def push(self, token: int) -> str:
        """Append a token and return the new text that no later token can change."""
        if token in self.tokenizer.special_ids:  # without a text
            return ""
        self._new += (token,)
        text = self.tokenizer.decode_window(self._known + self._new)
        new = self._advance(self._after_complete(text).rstrip(REPLACEMENT))
        if not text.endswith(REPLACEMENT) and len(text) > len(self._known_text):
            self._known, self._new, self._withheld, self._is_settled = self._new, (), "", False
            self._known_text, self._n_complete = self.tokenizer.decode_window(self._known), len(self.text)
        elif len(self._new) > MAX_NEW:
            self._settle(text)
        return new

    def finish(self) -> str:
        """Return the text of the withheld bytes."""
        return self._advance(self._after_complete(self.tokenizer.decode_window(self._known + self._new)))

    def _after_complete(self, text: str) -> str:
        """Return the text that follows the first `_n_complete` characters, from the text of `_known` and `_new`."""
        return self._withheld + text[len(self._known_text) :]

    def _advance(self, after: str) -> str:
        n, whole = len(self.text), self.text[: self._n_complete] + after
        # Text that was given is not taken back.
        self.text = max(whole, self.text, key=len)
        return self.text[n:]

    def _settle(self, text: str) -> None:
        """Take all but the last of `_new` as complete: invalid bytes, of which no later token makes a character.

        Nothing changes where the rest of the text would be another one without them. The next token tries again.

        Args:
            text: of `_known` and `_new`.
        """
        rest = self._new[-KEPT:]
        before = self.tokenizer.decode(self._known + self._new[:-KEPT])
        # Some decoders give up all bytes of a run for its first ones.
        known = self._known if self._is_settled else self._new[:KEPT]
        known_text = self.tokenizer.decode(known)
        if text != before + self.tokenizer.decode(known + rest).removeprefix(known_text):
            return
        complete = self.text[: self._n_complete] + self._after_complete(before)
        self._n_complete = min(len(complete), len(self.text))
        self._withheld = complete[self._n_complete :]
        self._known, self._known_text, self._new, self._is_settled = known, known_text, rest, True
