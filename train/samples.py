"""Training samples: records prepared for a model on access."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from ..model.batch import Sample
from ..model.image_tokens import ProcessedImage
from ..model.prompt import IGNORE, IMAGE_MARK, IMAGE_TOKEN, Turn, count_marks, cut_text, mark_images, split_first_images
from ..model.vlm import VLM
from .errors import ChangedDataError
from .records import Record, Records
from .sources import Clip, Member, read_visual


class Conversations:
    """Records, tokenized and with their images processed when they are accessed.

    Args:
        records: conversations, in the order of the samples.
        model: its tokenizer, prompt template and preprocessing of images are used. It is not stored.
        keep_samples: cache prepared samples in memory, for small datasets with many epochs; samples of the same image
            share it. Each worker has a cache of its own.
        max_tokens: longest text of a sample, in tokens; longer ones are truncated, as in LLaVA and ML-Mamba. The tokens
            of images are not counted; images after the text that is left are left out. None truncates nothing.

    Raises:
        ValueError, FileNotFoundError: on access: the image is missing or damaged, or there is no target token within
            `max_tokens`. The message names the record.
        ChangedDataError: on access: a data file has changed since it was read.
    """

    def __init__(
        self, records: Sequence[Record], model: VLM, keep_samples: bool = False, max_tokens: int | None = 2048
    ):
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {max_tokens}")
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer: set model.tokenizer")
        self.records, self.max_tokens = records, max_tokens
        # Not the model itself: workers have no use for the weights.
        self.tokenizer, self.template = model.tokenizer, model.template
        self.preprocess = model.preprocess
        self.keep_samples = keep_samples
        self._samples: dict[int, Sample] = {}
        self._processed: dict[Path | Member | Clip, ProcessedImage] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if index in self._samples:
            return self._samples[index]
        location = self.records.location(index) if isinstance(self.records, Records) else f"record {index}"
        try:
            sample = self._sample(self.records[index])
        except ChangedDataError:
            raise
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{location}: {e}") from e
        except ValueError as e:
            raise ValueError(f"{location}: {e}") from e
        if self.keep_samples:
            self._samples[index] = sample
        return sample

    def _sample(self, record: Record) -> Sample:
        turns = self._truncated(mark_images(record.turns, len(record.images)))
        images = [self._image(source) for source in record.images[: count_marks(turns)]]
        # Labels are IGNORE outside of answers.
        ids, labels = self.template.encode(self.tokenizer, turns, [i.n_tokens for i in images])
        if self.max_tokens is not None:
            end = _end_of_text(ids, self.max_tokens)
            ids, labels = ids[:end], labels[:end]
            # A sample may end before its last images, but not within one.
            bounds = itertools.accumulate((i.n_tokens for i in images), initial=0)
            images = images[: list(bounds).index(ids.count(IMAGE_TOKEN))]
        if all(label == IGNORE for label in labels[1:]):  # the first token is never a target
            raise ValueError(f"there is no target token within max_tokens = {self.max_tokens}")
        return Sample(ids, labels, tuple(images))

    def _truncated(self, turns: list[Turn]) -> list[Turn]:
        """Cut the text that is beyond `max_tokens` for any tokenization, so that it is not tokenized in vain."""
        if self.max_tokens is None:
            return turns
        # No token is longer than longest_token characters, so text beyond this many cannot be within max_tokens.
        left, truncated = self.max_tokens * self.tokenizer.longest_token, []
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                text = turn.text.replace(IMAGE_MARK, "").strip()[:left]
                left -= len(self.template.answer(text))
                marks = ""
            else:
                n_before, text = split_first_images(turn.text.strip()) if i == 0 else (0, turn.text.strip())
                text, marks = cut_text(text, left), IMAGE_MARK * n_before
                left -= len(self.template.user(text, i == 0).replace(IMAGE_MARK, ""))
            truncated.append(Turn(turn.role, marks + text))
            if left <= 0:
                break
        return truncated

    def _image(self, source: Path | Member | Clip) -> ProcessedImage:
        if source in self._processed:
            return self._processed[source]
        processed = self.preprocess(read_visual(source))
        if self.keep_samples:
            self._processed[source] = processed
        return processed


def _end_of_text(ids: list[int], max_tokens: int) -> int:
    """Position after the first `max_tokens` tokens of text; tokens of images are not counted."""
    if len(ids) - ids.count(IMAGE_TOKEN) < max_tokens:
        return len(ids)
    text = (position for position, token in enumerate(ids) if token != IMAGE_TOKEN)
    return 1 + next(itertools.islice(text, max_tokens - 1, None))
