"""Text and images as a model of `transformers` takes them, by this library's prompt templates and image processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

from ..model.batch import Sample
from ..model.config import VLMConfig
from ..model.config_io import from_json_dict, to_json_dict
from ..model.image_tokens import ImagePreprocessor
from ..model.prompt import IGNORE, IMAGE_MARK, IMAGE_TOKEN, Turn, get_template, mark_images
from ..model.tokenizer import Tokenizer
from ..model.transformers_files import auto_map, write_code
from ..model.video import Video
from ..model.vlm import OneImage
from .configs import VLMambaConfig

_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_LAYOUT = 7
"""Entries of an image's layout: number of views, then the fields of `TileGrid`, zeros without tiles."""


class _Tokenizer(Tokenizer):
    """A tokenizer of `transformers`, with tokens that were added to it."""

    def __init__(self, outer: PreTrainedTokenizerBase):
        if outer.eos_token is None:
            raise ValueError("tokenizer must have an eos_token, got one without")
        super().__init__(outer.backend_tokenizer, outer.eos_token)  # pyright: ignore[reportAttributeAccessIssue]
        self.outer = outer

    def encode(self, text: str) -> list[int]:
        return self.outer.encode(text, add_special_tokens=False)


class VLMambaProcessor(ProcessorMixin):
    """Tokens and pixels of prompts and conversations.

    Args:
        tokenizer: fast tokenizer with an end-of-text token, `eos_token`.
        config: of the model, as its `config.json` has it; or a `VLMConfig`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Mapping[str, Any] | VLMConfig | None = None,
        chat_template: str | None = None,
    ):
        if config is None:
            raise ValueError("config must be that of the model, as its config.json has it; got None")
        super().__init__(tokenizer)
        own: VLMConfig = config if isinstance(config, VLMConfig) else from_json_dict(VLMConfig, dict(config))
        self.config: dict[str, Any] = to_json_dict(own)
        self.auto_map = auto_map(VLMambaConfig.model_type)
        self.image_token_id = own.language.vocab_size
        """Value in `input_ids` at the positions of image features."""
        self.preprocess = ImagePreprocessor(own)
        self.template = get_template(own.template)
        if chat_template is not None:
            raise ValueError(f"chat_template must be None: the model's template is {own.template!r} of its config")

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """Read the settings of a processor; a folder that has none of it has the model's config."""
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "config" not in settings:
            hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
            config = VLMambaConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            settings["config"] = to_json_dict(config.own)
        return settings, unused

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save tokenizer and settings as `ProcessorMixin.save_pretrained` does."""
        write_code(Path(save_directory))
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: a saved folder names this package, and has no copy of its code."""

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        return ["input_ids", "attention_mask", "pixel_values", "image_layouts"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert prompts, as they are, without a template: `apply_chat_template` takes conversations.

        Args:
            images: for one text an image or a list of them; for several texts a list for each, or all images in their
                order. Images are in any form that `vlmamba.model.as_rgb` takes, or a `Video`.
            text: a prompt or several, with a mark `<image>` for each image; an only image needs none.
            padding: True or `"longest"` pads to the longest sequence.
            padding_side: the tokenizer's own by default.
            return_tensors: `"pt"` for tensors of all; by default tokens are lists.
            kwargs: none is supported.

        Returns:
            `input_ids` and `attention_mask`, (B, L); with images `pixel_values` (B, views, 3 for each encoder, height,
            width) and `image_layouts` (B, images, 7), zeros where a sequence has fewer than another.

        Raises:
            ValueError: no text, an argument that is not supported, or not as many marks as images.
            FileNotFoundError, TypeError: see `as_rgb`.
        """
        _refuse(kwargs)
        if text is None:
            raise ValueError("text must be a prompt or a list of them, got None")
        texts = [text] if isinstance(text, str) else list(text)
        samples = []
        for prompt, own in zip(texts, _images_of(texts, images), strict=True):
            marked = mark_images([Turn("user", prompt)], len(own))[0].text
            pictures = tuple(self.preprocess(i) for i in own)
            start, *parts = marked.split(IMAGE_MARK)
            ids = self._tokenizer.encode(start)
            for picture, part in zip(pictures, parts, strict=True):
                ids += [IMAGE_TOKEN] * picture.n_tokens + self._tokenizer.encode(part)
            samples.append(Sample(ids, [IGNORE] * len(ids), pictures))
        return self._collate(samples, padding, padding_side, return_tensors)

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]  fewer arguments, refused by name
        self,
        conversation: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Convert conversations by the model's prompt template.

        Args:
            conversation: messages with `role` (`user` or `assistant`) and `content`, a text or a list of parts: `type`
                is `text`, `image` or `video`, with the text, or the picture as `image`, `path`, `url` or `base64`; or a
                list of conversations.
            add_generation_prompt: has no effect, since a prompt ends where the answer starts.
            continue_final_message: leave out the end of the last answer, so that it is continued.
            tokenize: return tokens and pixels in place of text.
            return_dict: return all that the model takes, as `__call__` does, and not only `input_ids`.
            return_tensors, padding, padding_side: as of `__call__`.
            return_assistant_tokens_mask: add `assistant_masks` (B, L), 1 at the tokens of answers, the targets.
            processor_kwargs: further arguments of `__call__`.
            kwargs: none is supported.

        Returns:
            The text or texts, the tokens, or a `BatchFeature`.

        Raises:
            ValueError: messages that do not alternate from the user's on, a part that is not known, or an argument that
                is not supported.
            FileNotFoundError, TypeError: see `__call__`.
        """
        options: dict[str, Any] = {"padding": padding, "padding_side": padding_side, "return_tensors": return_tensors}
        # Either place is taken, as other processors take it.
        given = dict(processor_kwargs or {})
        options |= {name: given.pop(name) for name in options if name in given}
        _refuse(kwargs | given)
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        texts, samples = [], []
        for messages in conversation if is_batch else [conversation]:
            turns, images = _read_messages(messages)
            if not tokenize:
                text = self.template.text(turns, len(images))
                texts.append(text.removesuffix(self._tokenizer.eos) if continue_final_message else text)
                continue
            pictures = tuple(self.preprocess(i) for i in images)
            ids, labels = self.template.encode(self._tokenizer, turns, [p.n_tokens for p in pictures])
            if continue_final_message and ids[-1] == self._tokenizer.eos_id:
                ids, labels = ids[:-1], labels[:-1]
            samples.append(Sample(ids, labels, pictures))
        if not tokenize:
            return texts if is_batch else texts[0]
        batch = self._collate(
            samples,
            options["padding"],
            options["padding_side"],
            options["return_tensors"],
            return_assistant_tokens_mask,
        )
        return batch if return_dict else batch["input_ids"]

    @property
    def _tokenizer(self) -> _Tokenizer:
        return _Tokenizer(self.tokenizer)

    def _collate(
        self,
        samples: Sequence[Sample],
        padding: bool | str,
        padding_side: str | None,
        return_tensors: str | None,
        with_targets: bool = False,
    ) -> BatchFeature:
        if padding not in (True, False, "longest", "do_not_pad"):
            raise ValueError(f"padding must be True, False, 'longest' or 'do_not_pad', got {padding!r}")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
        side = padding_side or self.tokenizer.padding_side
        lengths = [len(s.input_ids) for s in samples]
        longest = max(lengths, default=0)
        pads = padding in (True, "longest")
        if return_tensors and not pads and len(set(lengths)) > 1:
            raise ValueError(f"sequences of unequal length need padding=True, got the lengths {lengths}")

        def padded(values: list[int], fill: int) -> list[int]:
            border = [fill] * (longest - len(values)) if pads else []
            return values + border if side == "right" else border + values

        fill = self.tokenizer.pad_token_id
        pad_id = self._tokenizer.eos_id if fill is None else fill
        ids = [[self.image_token_id if t == IMAGE_TOKEN else t for t in s.input_ids] for s in samples]
        data: dict[str, Any] = {
            "input_ids": [padded(row, pad_id) for row in ids],
            "attention_mask": [padded([1] * n, 0) for n in lengths],
        }
        if with_targets:
            data["assistant_masks"] = [padded([int(t != IGNORE) for t in s.labels], 0) for s in samples]
        if return_tensors:
            data = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in data.items()}
        if any(s.images for s in samples):
            data["pixel_values"], data["image_layouts"] = _stack(samples)
        return BatchFeature(data)


def _stack(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Put images in tensors with the sequences first: (B, views, 3 E, height, width) and (B, images, 7)."""
    first = next(s.images[0] for s in samples if s.images)
    side = max(p.shape[-1] for p in first.pixels)
    n_views = max(sum(i.n_views for i in s.images) for s in samples)
    pixels = torch.zeros(len(samples), n_views, 3 * len(first.pixels), side, side)
    layouts = torch.zeros(len(samples), max(len(s.images) for s in samples), _LAYOUT, dtype=torch.int64)
    for b, sample in enumerate(samples):
        at = 0
        for i, image in enumerate(sample.images):
            layouts[b, i, 0] = image.n_views
            if image.grid is not None:
                layouts[b, i, 1:] = torch.tensor(image.grid)
            for e, views in enumerate(image.pixels):
                height, width = views.shape[2:]
                # Smaller encoders use the top left corner.
                pixels[b, at : at + image.n_views, 3 * e : 3 * e + 3, :height, :width] = views
            at += image.n_views
    return pixels, layouts


def _images_of(texts: Sequence[str], images: Any) -> list[list[OneImage]]:
    """Return the images of each text."""
    if images is None:
        return [[] for _ in texts]
    flat = [images] if isinstance(images, OneImage) else list(images)
    if all(isinstance(i, list | tuple) for i in flat):
        if len(flat) != len(texts):
            raise ValueError(f"images must have a list for each of {len(texts)} texts, got {len(flat)}")
        return [list(i) for i in flat]
    if len(texts) == 1:
        return [flat]
    counts = [text.count(IMAGE_MARK) for text in texts]
    # Texts without marks have an image each.
    if not any(counts) and len(flat) == len(texts):
        counts = [1] * len(texts)
    if sum(counts) != len(flat):
        raise ValueError(f"text must have a mark {IMAGE_MARK} for each image, got {sum(counts)} for {len(flat)} images")
    rest = iter(flat)
    return [[next(rest) for _ in range(n)] for n in counts]


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[OneImage]]:
    """Convert messages to turns with marks, and the images in their order."""
    turns: list[Turn] = []
    images: list[OneImage] = []
    for i, message in enumerate(messages):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            kind = part.get("type")
            if kind == "text":
                text += part["text"]
            elif kind in ("image", "image_url", "video"):
                images.append(_picture(part, f"message {i}"))
                text += IMAGE_MARK
            else:
                raise ValueError(f"message {i} has a part of type {kind!r}, which must be text, image or video")
        turns.append(Turn(message["role"], text))
    return turns, images


def _picture(part: Mapping[str, Any], where: str) -> OneImage:
    """Return the image or video of a part of a message."""
    names = [name for name in (part["type"], "image", "path", "url", "base64") if part.get(name) is not None]
    if not names:
        raise ValueError(f"{where} has an {part['type']} without a picture: give it as image, path, url or base64")
    value = part[names[0]]
    if part["type"] == "video":
        return value if isinstance(value, Video) else Video(value)
    if part["type"] == "image_url" and isinstance(value, Mapping):
        value = value["url"]
    # Of other sources this library's own reader takes care.
    is_remote = isinstance(value, str) and value.startswith(("http://", "https://", "data:"))
    return load_image(value) if is_remote or names[0] == "base64" else value


def _refuse(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of other processors that would be disregarded."""
    for name, value in kwargs.items():
        if value is not None and value is not False and value != {}:
            raise ValueError(f"{name} is not supported by VLMambaProcessor, got {value!r:.60}")
