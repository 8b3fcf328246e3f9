"""The vision-language model: encoders, a connector, and a Mamba language model that reads images as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels.context_parallel import current_sharding

from ..connectors import build_connector
from .batch import Batch, Sample, collate, image_places
from .config import VLMConfig
from .formats import detect_format
from .formats import vlm as released
from .formats.vlm import merged
from .generation.config import GenerationConfig
from .generation.generate import Completion, generate_packed, stream_text
from .generation.prefill import EmbedFn, check_tokens
from .hub import TOKENIZER, HubModel
from .image import ImageLike, as_rgb
from .lm import MambaLM, neox_tokenizer
from .presets import get_preset
from .prompt import IGNORE, Turn, get_template
from .score import BATCH_SIZE, Score, batches, score_packed
from .tokenizer import Tokenizer, require_tokenizer
from .vit import ViT
from .weights import DeviceMap, Weights, check_placement, load_into


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

    `from_pretrained` reads this library's own format and the released models `huangwenjun1994/ML-Mamba` and
    `han1997/cobra`, whose encoders it gets from `timm`'s repositories. `from_preset` puts a new model together from
    pretrained parts.

    The language model runs packed: samples of unequal length lie one after the other and none is padded.
    """

    config_class = VLMConfig

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.always_encodes = False
        """Encode a blank image where a batch has none. Ranks that share their weights must all run the same parts."""
        self.template = get_template(config.template)
        self.processors = [v.processor for v in config.vision]
        self.vision = VisionTower(config)
        self.connector = build_connector(config.connector, self.vision.width, config.language.d_model)
        self.language_model = MambaLM(config.language)

    def forward(self, batch: Batch) -> VLMOutput:
        """The loss of predicting the learned tokens of a batch.

        Within `context_parallel` every rank is given the whole batch, encodes its images, and computes the loss of the
        learned tokens in its part: 0 where it has none.

        Raises:
            ValueError: no token of the batch is learned.
        """
        targets = batch.next_tokens()
        if (targets == IGNORE).all():
            raise ValueError("the batch has no token to learn: every label is IGNORE")
        sharding = current_sharding()
        begin, end = (0, batch.n_tokens) if sharding is None else sharding.span
        logits_at = (targets[begin:end] != IGNORE).nonzero().flatten()
        embeds = self._embedder(batch)(begin, end)
        out = self.language_model(inputs_embeds=embeds, cu_seqlens=batch.cu_seqlens, logits_at=logits_at)
        if not len(logits_at):
            return VLMOutput(out.logits.sum(), 0)
        return VLMOutput(F.cross_entropy(out.logits[0], targets[begin:end][logits_at]), len(logits_at))

    def embed(self, batch: Batch) -> Tensor:
        """Tokens and images of a batch as vectors, (1, T, D).

        Raises:
            ValueError: the places for image features are not as many as the features.
        """
        return self._embedder(batch)(0, batch.n_tokens)

    def _embedder(self, batch: Batch) -> EmbedFn:
        """What gives the vectors of a batch piece by piece. Images are encoded here, once."""
        places = image_places(batch.input_ids)
        n_places = int(places.sum())
        features = None
        images = batch.images
        if not images and self.always_encodes:
            sizes = [v.encoder.image_size for v in self.config.vision]
            images = tuple(torch.zeros(1, 3, size, size, device=places.device) for size in sizes)
        if images:
            features = self.connector(self.vision(images)).flatten(0, 1)
            if batch.images and len(features) != n_places:
                raise ValueError(f"the images give {len(features)} features, but input_ids has {n_places} places")
        if n_places and not batch.images:
            raise ValueError(f"input_ids has {n_places} places for image features, but there is no image")

        def embed(begin: int, end: int) -> Tensor:
            here = places[begin:end]
            embeds = self.language_model.embed(batch.input_ids[begin:end].masked_fill(here, 0))
            if features is not None:
                before = int(places[:begin].sum()) if begin else 0
                embeds = embeds.masked_scatter(here[:, None], features[before:].to(embeds))
            return embeds.unsqueeze(0)

        return embed

    @property
    def image_tokens(self) -> int:
        """Tokens that an image takes."""
        height, width = self.config.grid
        return height * width

    def prepare(self, turns: Sequence[Turn], image: ImageLike | None = None) -> Sample:
        """A conversation, about an image or none, as tokens for training or as a prompt.

        Raises:
            ValueError: the model has no tokenizer, or the turns are malformed.
            FileNotFoundError, TypeError, ValueError: as `image.as_rgb`.
        """
        tokenizer = require_tokenizer(self)
        rgb = None if image is None else as_rgb(image)
        images = () if rgb is None else tuple(p(rgb) for p in self.processors)
        n_image_tokens = self.image_tokens if images else 0
        ids, labels = self.template.encode(tokenizer, turns, n_image_tokens)
        return Sample(ids, labels, images)

    def generate(
        self,
        conversations: Sequence[Sequence[Turn] | str],
        images: Sequence[ImageLike | None],
        config: GenerationConfig | None = None,
    ) -> list[str]:
        """Answer several conversations together. Each answer is the one it would get alone.

        Args:
            conversations: questions, or turns that end with the user's.
            images: one for each, or None.

        Raises:
            ValueError, FileNotFoundError: as `prepare`; or there are not as many images as conversations.
        """
        *_, answers = self._answers(conversations, images, config or GenerationConfig())
        return [a.text for a in answers]

    def stream(
        self, conversation: Sequence[Turn] | str, image: ImageLike | None = None, config: GenerationConfig | None = None
    ) -> Iterator[str]:
        """Answer one conversation, giving the text piece by piece."""
        return stream_text(self._answers([conversation], [image], config or GenerationConfig()))

    def score(
        self,
        conversations: Sequence[Sequence[Turn] | str],
        images: Sequence[ImageLike | None],
        answers: Sequence[Sequence[str]],
        batch_size: int = BATCH_SIZE,
    ) -> list[list[Score]]:
        """How likely given answers are, the end of the answer included. A prompt is run once for all its answers.

        So `greedy` says whether `generate` would give exactly this answer; and of a choice between answers, `pick`
        takes the one that the model would give most often.

        Args:
            conversations, images: as in `generate`.
            answers: for each conversation, one or more.
            batch_size: answers that are run together.

        Raises:
            ValueError, FileNotFoundError: as `generate`; or there are not as many lists of answers as conversations.
        """
        if len(answers) != len(conversations):
            raise ValueError(
                f"answers must have one list a conversation ({len(conversations)}), got {len(answers)} of them"
            )
        for i, texts in enumerate(answers):
            if isinstance(texts, str):
                raise ValueError(f"answers[{i}] must be a list of texts, got the text {texts!r}")
        samples = self._prompts(conversations, images)
        check_tokens(self.language_model, [s.input_ids for s in samples])
        tokenizer = require_tokenizer(self)
        tokens = [[self.template.encode_answer(tokenizer, a) for a in texts] for texts in answers]
        scores: list[list[Score]] = []
        for chosen in batches([len(texts) for texts in tokens], batch_size):
            embed, bounds = self.packed(samples[chosen])
            scores += score_packed(self.language_model, embed, bounds, tokens[chosen], batch_size)
        return scores

    def _answers(self, conversations, images, config: GenerationConfig) -> Iterator[list[Completion]]:
        samples = self._prompts(conversations, images)
        if not samples:
            return iter([[]])
        embed, bounds = self.packed(samples)
        return generate_packed(
            self.language_model, embed, bounds, [s.input_ids for s in samples], require_tokenizer(self), config
        )

    def _prompts(self, conversations, images) -> list[Sample]:
        if len(conversations) != len(images):
            raise ValueError(f"images must have one entry a conversation ({len(conversations)}), got {len(images)}")
        return [
            self.prepare([Turn("user", c)] if isinstance(c, str) else c, image)
            for c, image in zip(conversations, images, strict=True)
        ]

    @torch.no_grad()
    def packed(self, samples: Sequence[Sample]) -> tuple[EmbedFn, Tensor]:
        """What embeds samples one after the other, and their bounds."""
        batch = collate(samples)
        encoder = next(self.vision.parameters())
        images = tuple(i.to(encoder.device, encoder.dtype) for i in batch.images)
        batch = replace(batch.to(self.language_model.backbone.embedding.weight.device), images=images)
        return self._embedder(batch), batch.cu_seqlens

    @classmethod
    def open_checkpoint(cls, folder: Path, **hub: Any) -> tuple[VLMConfig, Weights]:
        if detect_format(folder) in ("ml-mamba", "cobra"):
            return released.read(folder, **hub)
        return super().open_checkpoint(folder, **hub)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device_map: DeviceMap = "cpu",
    ) -> VLM:
        """A pretrained language model and pretrained encoders, joined by a connector that is still to be trained.

        >>> vlm = VLM.from_preset("vl-mamba-2.8b", dtype=torch.bfloat16, device_map="auto")  # doctest: +SKIP

        Args:
            name: one of `presets.PRESETS`.
            seed: of the connector's weights.
            cache_dir, token, force_download, local_files_only, dtype, device_map: see `HubModel.from_pretrained`.

        Raises:
            ValueError: no such preset; the nearest is named. Or as `from_pretrained`.
            FileNotFoundError, PermissionError, ConnectionError: see `fetch`.
        """
        preset = get_preset(name)
        hub = {
            "cache_dir": cache_dir,
            "token": token,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        check_placement(dtype, device_map)
        config, pretrained = preset.open(**hub)
        with torch.device("meta"):
            vlm = cls(config, neox_tokenizer(**hub))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            connector = build_connector(config.connector, vlm.vision.width, config.language.d_model)
        fresh = Weights.of(connector.state_dict())
        load_into(vlm, merged({"": pretrained, "connector.": fresh}), f"preset {name}", dtype, device_map)
        return vlm.eval()

    def save_extras(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER)

    def load_extras(self, folder: Path, **hub: Any) -> None:
        if (folder / TOKENIZER).exists():
            self.tokenizer = Tokenizer.from_file(folder / TOKENIZER)
        elif detect_format(folder) in ("ml-mamba", "cobra"):
            self.tokenizer = neox_tokenizer(**hub)
