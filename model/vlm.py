"""The vision-language model: encoders, a connector, and a Mamba language model that reads images as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..connectors import build_connector
from .batch import Batch, Sample, collate, image_places
from .config import VLMConfig
from .generate import Answer, GenerationConfig, generate_tokens
from .hub import HubModel
from .lm import MambaLM
from .prompt import IGNORE, Turn, get_template
from .tokenizer import Tokenizer
from .vit import ViT

Picture = Image.Image | str | Path


class VLMOutput(NamedTuple):
    loss: Tensor
    """Mean loss over the learned tokens."""
    n_targets: int
    """How many they are."""


class VisionTower(nn.Module):
    """Encoders side by side: their features of the same patch are concatenated."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.encoders = nn.ModuleList(ViT(v.encoder) for v in config.vision)
        self.width = sum(v.encoder.width for v in config.vision)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """One (images, 3, height, width) for each encoder -> (images, h, w, width)."""
        if len(images) != len(self.encoders):
            raise ValueError(
                f"images must have one tensor for each of {len(self.encoders)} encoders, got {len(images)}"
            )
        return torch.cat([encoder(i) for encoder, i in zip(self.encoders, images, strict=True)], dim=-1)


class VLM(HubModel, library_name="vl-mamba", pipeline_tag="image-text-to-text"):
    """VL-Mamba or ML-Mamba, by its configuration.

    The language model runs packed: samples of unequal length lie one after the other and none is padded.
    """

    config_class = VLMConfig

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.template = get_template(config.template)
        self.processors = [v.processor for v in config.vision]
        self.vision = VisionTower(config)
        self.connector = build_connector(config.connector, self.vision.width, config.language.d_model)
        self.language_model = MambaLM(config.language)

    def forward(self, batch: Batch) -> VLMOutput:
        """The loss of predicting the learned tokens of a batch."""
        targets = batch.next_tokens()
        at = (targets != IGNORE).nonzero().flatten()
        if not len(at):
            raise ValueError("the batch has no token to learn: every label is IGNORE")
        out = self.language_model(inputs_embeds=self.embed(batch), cu_seqlens=batch.cu_seqlens, at=at)
        return VLMOutput(F.cross_entropy(out.logits[0], targets[at]), len(at))

    def embed(self, batch: Batch) -> Tensor:
        """Tokens and images of a batch as vectors, (1, T, D).

        Raises:
            ValueError: the places for image features are not as many as the features.
        """
        places = image_places(batch.input_ids)
        embeds = self.language_model.embed(batch.input_ids.masked_fill(places, 0))
        if batch.images:
            features = self.connector(self.vision(batch.images)).flatten(0, 1).to(embeds.dtype)
            if len(features) != int(places.sum()):
                raise ValueError(
                    f"the images give {len(features)} features, but input_ids has {int(places.sum())} places"
                )
            embeds = embeds.masked_scatter(places[:, None], features)
        elif places.any():
            raise ValueError(f"input_ids has {int(places.sum())} places for image features, but there is no image")
        return embeds.unsqueeze(0)

    @property
    def image_tokens(self) -> int:
        """Tokens that an image takes."""
        height, width = self.config.grid
        return height * width

    def prepare(self, turns: Sequence[Turn], image: Picture | None = None) -> Sample:
        """A conversation, about an image or none, as tokens for training or as a prompt.

        Raises:
            ValueError: the model has no tokenizer, or the turns are malformed.
            FileNotFoundError, ValueError: the image cannot be read.
        """
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: set model.tokenizer")
        images = () if image is None else tuple(p(image) for p in self.processors)
        n_image_tokens = self.image_tokens if images else 0
        ids, labels = self.template.encode(self.tokenizer, turns, n_image_tokens)
        return Sample(ids, labels, images)

    def generate(
        self,
        conversations: Sequence[Sequence[Turn] | str],
        images: Sequence[Picture | None],
        config: GenerationConfig | None = None,
    ) -> list[str]:
        """Answer several conversations together. Each answer is the one it would get alone.

        Args:
            conversations: questions, or turns that end with the user's.
            images: one for each, or None.

        Raises:
            ValueError, FileNotFoundError: as `prepare`; or there are not as many images as conversations.
        """
        *_, answers = self._answer(conversations, images, config or GenerationConfig())
        return [a.text for a in answers]

    def stream(
        self, conversation: Sequence[Turn] | str, image: Picture | None = None, config: GenerationConfig | None = None
    ) -> Iterator[str]:
        """Answer one conversation, giving the text piece by piece."""
        given = ""
        for (answer,) in self._answer([conversation], [image], config or GenerationConfig()):
            piece, given = answer.text[len(given) :], answer.text
            if piece:
                yield piece

    def _answer(self, conversations, images, config: GenerationConfig) -> Iterator[list[Answer]]:
        if len(conversations) != len(images):
            raise ValueError(f"images must have one entry a conversation ({len(conversations)}), got {len(images)}")
        samples = [
            self.prepare([Turn("user", c)] if isinstance(c, str) else c, image)
            for c, image in zip(conversations, images, strict=True)
        ]
        answers = [Answer(self.tokenizer, config.stop) for _ in samples]
        if not samples:
            yield answers
            return
        with torch.no_grad():
            device = self.language_model.lm_head.weight.device
            batch = collate(samples).to(device)
            dtype = self.language_model.lm_head.weight.dtype
            batch = Batch(batch.input_ids, batch.labels, batch.cu_seqlens, tuple(i.to(dtype) for i in batch.images))
            embeds = self.embed(batch)
        steps = generate_tokens(
            self.language_model,
            embeds,
            batch.cu_seqlens,
            [s.input_ids for s in samples],
            config,
            self.tokenizer.vocab_size,
        )
        for tokens, _ in steps:
            for answer, token in zip(answers, tokens, strict=True):
                if not answer.done:
                    answer.push(token)
            yield answers
            if all(a.done for a in answers):
                return
        for answer in answers:
            answer.finish()
        yield answers

    def save_extras(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer.json")

    def load_extras(self, folder: Path, **hub: Any) -> None:
        if (folder / "tokenizer.json").exists():
            self.tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
