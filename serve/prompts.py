"""Prompts of requests: tokens, preprocessed images, and digests that name each prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..model.batch import Sample
from ..model.image import ImageLike
from ..model.lm import MambaLM
from ..model.prompt import IGNORE, PromptTemplate, Turn
from ..model.tokenizer import require_tokenizer
from ..model.vlm import VLM


class ImageSpan(NamedTuple):
    """Tokens of one image within a prompt."""

    start: int
    end: int
    digest: bytes
    """Hash of the image's content."""


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt with its images."""

    sample: Sample
    images: tuple[ImageSpan, ...] = ()
    """One for each image of the sample, in their order."""
    salt: bytes = field(default=b"", repr=False)
    """Secret of the user. Prefixes of two users have different digests, even where their tokens are the same."""

    @property
    def ids(self) -> list[int]:
        """Tokens; `IMAGE_TOKEN` at the positions of image features."""
        return self.sample.input_ids

    def digests(self, tokens: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Compute names of prefixes, which depend on nothing but the salt, the tokens and the images in them.

        Args:
            tokens: the prompt's tokens, or these followed by generated ones.
            lengths: of the prefixes, ascending; none ends within an image.

        Returns:
            A SHA-256 digest of each prefix.
        """
        data = np.asarray(tokens, dtype="<i8").tobytes()
        # No part that precedes the tokens can be taken for another one: all have a fixed length.
        hashed = hashlib.sha256(hashlib.sha256(self.salt).digest())
        spans, names, at = iter(self.images), [], 0
        span = next(spans, None)
        for length in lengths:
            # The content of an image follows its first position, whose negative token announces it.
            while span is not None and span.start < length:
                hashed.update(data[8 * at : 8 * (span.start + 1)])
                hashed.update(span.digest)
                at, span = span.start + 1, next(spans, None)
            hashed.update(data[8 * at : 8 * length])
            at = length
            names.append(hashed.copy().digest())
        return names


def chat_prompt(
    model: VLM | MambaLM,
    template: PromptTemplate,
    turns: Sequence[Turn],
    images: Sequence[ImageLike],
    salt: bytes = b"",
) -> Prompt:
    """Convert a conversation to a prompt.

    Args:
        model: with a tokenizer.
        template: the model's own, or that of a language model's conversations.
        turns: user and assistant alternating, from the user's to the user's, with marks at the places of images.
        images: pictures, in the order of their marks.
        salt: secret of the user.

    Returns:
        The prompt.

    Raises:
        ValueError: turns that do not alternate, images for a language model, or not a mark for each image.
    """
    if not isinstance(model, VLM):
        if images:
            raise ValueError("the model is a language model and takes no image")
        ids, labels = template.encode(require_tokenizer(model), turns)
        return Prompt(Sample(ids, labels), salt=salt)
    sample = model.prepare(turns, [replace(model.preprocess(image), salt=salt) for image in images])
    digests = [image.digest for image in sample.images]
    spans = [ImageSpan(*span, digest) for span, digest in zip(sample.image_spans(), digests, strict=True)]
    return Prompt(sample, tuple(spans), salt)


def text_prompt(model: VLM | MambaLM, text: str | Sequence[int], salt: bytes = b"") -> Prompt:
    """Convert a text, or tokens, to a prompt that is continued as it is.

    Args:
        model: with a tokenizer.
        text: the text, or its tokens. An empty one is the end-of-text token, which starts a document.
        salt: secret of the user.

    Returns:
        The prompt.

    Raises:
        ValueError: the text cannot be tokenized, or a token is outside the vocabulary.
    """
    tokenizer = require_tokenizer(model)
    ids = (tokenizer.encode(text) if isinstance(text, str) else list(text)) or [tokenizer.eos_id]
    # Rows of the embedding beyond the tokenizer's have no text.
    if not isinstance(text, str) and (min(ids) < 0 or max(ids) >= tokenizer.vocab_size):
        raise ValueError(f"tokens must be in [0, {tokenizer.vocab_size}), got values from {min(ids)} to {max(ids)}")
    return Prompt(Sample(ids, [IGNORE] * len(ids)), salt=salt)
