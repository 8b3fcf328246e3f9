"""Training samples: records prepared for a model on access."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..model.batch import Sample
from ..model.prompt import IGNORE, Turn, strip_image_tag
from ..model.vlm import VLM
from .errors import ChangedDataError
from .records import Record, Records
from .sources import Member, read_image


class Conversations:
    """Records, tokenized and with their images processed when they are accessed.

    Args:
        records: conversations, in the order of the samples.
        model: its tokenizer, prompt template and image processors are used. It is not stored.
        keep_samples: cache prepared samples in memory, for small datasets with many epochs; samples of the same image
            share it. Each worker has a cache of its own.
        max_tokens: longest text of a sample, in tokens; longer ones are truncated, as in LLaVA and ML-Mamba. The tokens
            of an image are not counted. None truncates nothing.

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
        self.processors, self.image_tokens = model.processors, model.image_tokens
        self.keep_samples = keep_samples
        self._samples: dict[int, Sample] = {}
        self._processed: dict[Path | Member, tuple[Tensor, ...]] = {}

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
        n_image_tokens = 0 if record.image is None else self.image_tokens
        # Image tokens come first. Labels are IGNORE outside of answers.
        ids, labels = self.template.encode(self.tokenizer, self._truncated(record.turns), n_image_tokens)
        if self.max_tokens is not None:
            ids, labels = (tokens[: n_image_tokens + self.max_tokens] for tokens in (ids, labels))
        if all(label == IGNORE for label in labels[1:]):  # the first token is never a target
            raise ValueError(f"there is no target token within max_tokens = {self.max_tokens}")
        return Sample(ids, labels, () if record.image is None else self._images(record.image))

    def _truncated(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Cut the text that is beyond `max_tokens` for any tokenization, so that it is not tokenized in vain."""
        if self.max_tokens is None:
            return turns
        # No token is longer than longest_token characters, so text beyond this many cannot be within max_tokens.
        left, truncated = self.max_tokens * self.tokenizer.longest_token, []
        for i, turn in enumerate(turns):
            text = strip_image_tag(turn.text)[:left]
            truncated.append(Turn(turn.role, text))
            is_answer = turn.role == "assistant"
            left -= len(self.template.answer(text) if is_answer else self.template.user(text, i == 0))
            if left <= 0:
                break
        return truncated

    def _images(self, source: Path | Member) -> tuple[Tensor, ...]:
        """The image for each encoder, each (3, height, width)."""
        if source in self._processed:
            return self._processed[source]
        image = read_image(source)
        processed = tuple(processor(image) for processor in self.processors)
        if self.keep_samples:
            self._processed[source] = processed
        return processed
