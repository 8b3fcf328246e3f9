"""Vision-language model: encoders, a connector, and a Mamba language model that reads images as tokens.

Letters: T tokens of a packed batch, S samples, D width of the language model, h and w the grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels.context_parallel import current_sharding

from ..connectors import build_connector
from .batch import Batch, Sample, collate, image_positions
from .config import TilesConfig, VLMConfig
from .feature_cache import FeatureCache
from .formats import detect_format
from .formats.vlm import merged, open_released
from .generation.config import GenerationConfig
from .generation.generate import Completion, generate_packed, stream_text
from .generation.interface import LMState
from .generation.prefill import EmbedFn, check_tokens
from .generation.speculative import Draft, DraftStats, check_draft
from .hub import TOKENIZER, HubModel
from .image import ImageLike
from .image_tokens import ImagePreprocessor, ProcessedImage
from .lm import MambaLM, neox_tokenizer
from .presets import get_preset
from .prompt import IGNORE, Turn, get_template
from .quantize import Quantization, check_devices, check_quantization
from .score import BATCH_SIZE, Score, batches, score_packed
from .tiles import TileGrid, merge_views
from .tokenizer import Tokenizer, require_tokenizer
from .transformers_files import save_tokenizer
from .video import Video
from .vit import ViT
from .weights import DeviceMap, Weights, check_placement, load_into

OneImage = ImageLike | Video | ProcessedImage
Images = OneImage | Sequence[OneImage] | None
"""The image or video of a conversation, or a list of them in the order of their marks, or none."""


class VLMOutput(NamedTuple):
    """Result of a training forward pass."""

    loss: Tensor
    """Mean cross-entropy over the targets, in nats."""
    n_targets: int
    """Number of targets."""
    state: LMState | None = None
    """State of the language model after each sample, with gradients; with `return_state` only."""


class VisionTower(nn.Module):
    """One or more encoders whose features of the same patch are concatenated.

    Args:
        config: its `vision` lists the encoders.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.encoders = nn.ModuleList(ViT(v.encoder) for v in config.vision)
        self.width = sum(v.encoder.width for v in config.vision)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Encode images.

        Args:
            images: for each encoder, (images, 3, height, width).

        Returns:
            (images, h, w, width).
        """
        if len(images) != len(self.encoders):
            raise ValueError(
                f"images must have one tensor for each of {len(self.encoders)} encoders, got {len(images)}"
            )
        features = [encoder(i) for encoder, i in zip(self.encoders, images, strict=True)]  # (images, h, w, ...) each
        return torch.cat(features, dim=-1)  # (images, h, w, width)


class VLM(HubModel, library_name="vl-mamba", pipeline_tag="image-text-to-text"):
    """VL-Mamba (arXiv 2403.13600) or ML-Mamba (2407.19832), depending on the configuration.

    `from_pretrained` reads this library's own format and the released models `huangwenjun1994/ML-Mamba` and
    `han1997/cobra`, whose encoders it gets from `timm`'s repositories. `from_preset` assembles a new model from
    pretrained parts.

    The language model runs packed: samples of unequal length follow each other without padding.

    Args:
        config: architecture.
        tokenizer: for text in and text out.
    """

    config_class = VLMConfig

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.always_encodes = False
        """Encode a blank image if a batch has none. Ranks with sharded weights must all run the same modules."""
        self.template = get_template(config.template)
        self.preprocess = ImagePreprocessor(config)
        self.vision = VisionTower(config)
        self.connector = new_connector(config)
        self.language_model = MambaLM(config.language)

    def forward(self, batch: Batch, state: LMState | None = None, return_state: bool = False) -> VLMOutput:
        """Compute the loss of a batch.

        Within `context_parallel`, every rank takes the entire batch, encodes its images, and computes the loss of the
        targets in its shard: 0 if it has none.

        Args:
            batch: packed samples.
            state: state of the language model before each sample: zeros by default, or that of an earlier call, whose
                samples these continue. Without `return_state` it is updated in place, without gradients.
            return_state: return the state after each sample too, with gradients, and leave `state` as it is.

        Returns:
            Mean loss over the targets, their number, and the final state or None.

        Raises:
            TypeError, ValueError: the batch has no target, or as `MambaLM.forward`.
        """
        targets = batch.next_tokens()  # (T,)
        if (targets == IGNORE).all():
            raise ValueError("the batch has no target: every label is IGNORE")
        # Tokens of this rank within context parallelism, else all.
        sharding = current_sharding()
        start, end = (0, batch.n_tokens) if sharding is None else sharding.span
        targets = targets[start:end]  # (T of this rank,)
        embeds = self._embedder(batch)(start, end)  # (1, T of this rank, D)
        # Only targets need logits, which are the largest tensor of the step.
        logits_at = (targets != IGNORE).nonzero().flatten()  # (targets,)
        out = self.language_model(
            inputs_embeds=embeds,
            state=state,
            cu_seqlens=batch.cu_seqlens,
            logits_at=logits_at,
            return_state=return_state,
        )
        if not len(logits_at):
            return VLMOutput(out.logits.sum(), 0, out.state)  # 0, with a graph for the backward pass
        return VLMOutput(F.cross_entropy(out.logits[0], targets[logits_at]), len(logits_at), out.state)

    def embed(self, batch: Batch) -> Tensor:
        """Embed the tokens and images of a batch.

        Args:
            batch: packed samples.

        Returns:
            (1, T, D).

        Raises:
            ValueError: the numbers of image features and of their positions differ.
        """
        return self._embedder(batch)(0, batch.n_tokens)

    def _embedder(self, batch: Batch) -> EmbedFn:
        """Return a function that embeds ranges of the batch. Images are encoded here, once."""
        return self._place(batch.input_ids, self._encode(batch.images, batch.layouts), bool(batch.images))

    def _encode(
        self,
        images: tuple[Tensor, ...],
        layouts: Sequence[tuple[int, TileGrid | None]],
        vision: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> Tensor | None:
        """Compute the features of images, (tokens, D), from their views for each encoder; None without images."""
        if not images:
            if not self.always_encodes:
                return None
            # Features of the blank image are used by no position.
            device, sizes = next(self.vision.parameters()).device, [v.encoder.image_size for v in self.config.vision]
            images = tuple(torch.zeros(1, 3, size, size, device=device) for size in sizes)
        layouts = layouts or ((1, None),) * len(images[0])
        return self._merge(self.connector((vision or self.vision)(images)), layouts)

    def _place(self, input_ids: Tensor, features: Tensor | None, has_images: bool) -> EmbedFn:
        """Return a function that embeds ranges of tokens, with the features at the positions of images."""
        positions = image_positions(input_ids)  # (T,)
        n_positions = int(positions.sum())
        if n_positions and not has_images:
            raise ValueError(f"input_ids has {n_positions} places for image features, but there is no image")
        if features is not None and has_images and len(features) != n_positions:
            raise ValueError(f"the images have {len(features)} features, but input_ids has {n_positions} places")

        def embed(start: int, end: int) -> Tensor:
            is_image = positions[start:end]  # (end - start,)
            embeds = self.language_model.embed(input_ids[start:end].masked_fill(is_image, 0))
            if features is not None:
                # Features of the images before this range are skipped.
                n_before = int(positions[:start].sum()) if start else 0
                embeds = embeds.masked_scatter(is_image[:, None], features[n_before:].to(embeds))
            return embeds.unsqueeze(0)  # (1, end - start, D)

        return embed

    def _merge(self, features: Tensor, layouts: Sequence[tuple[int, TileGrid | None]]) -> Tensor:
        """Join the features of views, (views, h * w, D), to those of images in the order of their tokens."""
        if self.config.tiles is None:
            return features.flatten(0, 1)
        views = features.unflatten(1, self.config.grid).split([n for n, _ in layouts])  # (views, h, w, D) each
        newline = self.connector.get_parameter("image_newline") if self.config.tiles.unpads else None
        return torch.cat([merge_views(v, grid, newline) for v, (_, grid) in zip(views, layouts, strict=True)])

    @property
    def image_tokens(self) -> int:
        """Number of tokens of a view: of an image without tiles."""
        height, width = self.config.grid
        return height * width

    def prepare(self, turns: Sequence[Turn], image: Images = None) -> Sample:
        """Convert a conversation to tokens, for training or as a prompt.

        Args:
            turns: user and assistant alternating, the user first. An image is at its mark `<image>`.
            image: the image that the conversation is about, or a list of as many as there are marks; preprocessed
                already where it is used again. An only image needs no mark.

        Returns:
            Tokens, labels and the preprocessed images.

        Raises:
            ValueError: the model has no tokenizer, the turns are malformed, or marks and images are not equally many.
            FileNotFoundError, TypeError, ValueError: see `as_rgb`.
        """
        tokenizer = require_tokenizer(self)
        images = tuple(i if isinstance(i, ProcessedImage) else self.preprocess(i) for i in as_list(image))
        ids, labels = self.template.encode(tokenizer, turns, [i.n_tokens for i in images])
        return Sample(ids, labels, images)

    def generate(
        self,
        conversations: Sequence[Sequence[Turn] | str],
        images: Sequence[Images],
        config: GenerationConfig | None = None,
        *,
        draft_model: VLM | None = None,
        draft_stats: DraftStats | None = None,
    ) -> list[str]:
        """Answer several conversations in one batch. Each answer is the one it would get alone.

        Args:
            conversations: questions, or turns that end with the user's.
            images: for each conversation its image, a list of images at the marks `<image>` of its turns, or None.
            config: generation settings; greedy by default.
            draft_model: smaller model with the same tokenizer, which sees the same images by its own encoders and
                proposes `config.draft_tokens` tokens a step; the distribution of the answers stays the same
                (arXiv 2211.17192).
            draft_stats: takes the counts of proposed and accepted tokens.

        Returns:
            The answers.

        Raises:
            ValueError, FileNotFoundError: see `prepare`; or the numbers of images and conversations differ, or
                `draft_model` does not fit.
        """
        *_, completions = self._complete(conversations, images, config or GenerationConfig(), draft_model, draft_stats)
        return [c.text for c in completions]

    def stream(
        self,
        conversation: Sequence[Turn] | str,
        image: Images = None,
        config: GenerationConfig | None = None,
        *,
        draft_model: VLM | None = None,
        draft_stats: DraftStats | None = None,
    ) -> Iterator[str]:
        """Answer one conversation, yielding new text as it is generated.

        Args:
            conversation: a question, or turns that end with the user's.
            image: its image, a list of images at the marks `<image>` of its turns, or None.
            config: generation settings; greedy by default.
            draft_model, draft_stats: as in `generate`.

        Yields:
            Parts of the answer.
        """
        steps = self._complete([conversation], [image], config or GenerationConfig(), draft_model, draft_stats)
        return stream_text(steps)

    def score(
        self,
        conversations: Sequence[Sequence[Turn] | str],
        images: Sequence[Images],
        answers: Sequence[Sequence[str]],
        batch_size: int = BATCH_SIZE,
        with_end: bool = True,
    ) -> list[list[Score]]:
        """Compute the likelihood of given answers.

        A prompt is run once for all its answers. `greedy` tells whether `generate` would give exactly this answer;
        `pick` chooses the answer that the model would give most often.

        Args:
            conversations: questions, or turns that end with the user's.
            images: for each conversation its image, a list of images at the marks `<image>` of its turns, or None.
            answers: for each conversation, one or more.
            batch_size: answers per batch.
            with_end: include the end-of-text token; False scores a beginning, after which more may follow.

        Returns:
            For each conversation, the scores of its answers.

        Raises:
            ValueError, FileNotFoundError: see `generate`; or the numbers of conversations and lists of answers differ.
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
        # The last token of an encoded answer is its end.
        end = None if with_end else -1
        tokens = [[self.template.encode_answer(tokenizer, a)[:end] for a in texts] for texts in answers]
        scores: list[list[Score]] = []
        for batch in batches([len(texts) for texts in tokens], batch_size):
            embed, bounds = self.packed(samples[batch])
            scores += score_packed(self.language_model, embed, bounds, tokens[batch], batch_size)
        return scores

    def _complete(
        self,
        conversations: Sequence[Sequence[Turn] | str],
        images: Sequence[Images],
        config: GenerationConfig,
        draft_model: VLM | None,
        draft_stats: DraftStats | None,
    ) -> Iterator[list[Completion]]:
        samples, tokenizer, draft = self._prompts(conversations, images), require_tokenizer(self), None
        if draft_model is not None:
            lm, tokenizers = draft_model.language_model, (tokenizer, require_tokenizer(draft_model))
            check_draft(self.language_model, lm, tokenizers, config)
            if any(isinstance(i, ProcessedImage) for given in images for i in as_list(given)):
                raise ValueError("images must not be preprocessed where there is a draft_model, which does so itself")
        if not samples:
            return iter([[]])
        vision = None
        if draft_model is not None:
            # Its own template and number of image tokens; only the texts must be the same.
            seen: Sequence[Images] = images
            if self._sees_as(draft_model):
                seen, vision = [s.images for s in samples], _encode_once(self.vision)
            prompts = draft_model._prompts(conversations, seen)
            stats = DraftStats() if draft_stats is None else draft_stats
            draft = Draft(draft_model.language_model, *draft_model.packed(prompts, vision=vision), stats)
        embed, bounds = self.packed(samples, vision=vision)
        prompt_ids = [s.input_ids for s in samples]
        return generate_packed(self.language_model, embed, bounds, prompt_ids, tokenizer, config, draft=draft)

    def share_encoders(self, draft_model: VLM) -> bool:
        """Let a draft model use this model's encoders in place of its own, where they are equal bit for bit.

        Their weights are then in memory once, and `generate` prepares and encodes an image once for both models.

        Args:
            draft_model: its `vision` is replaced.

        Returns:
            Whether the encoders are equal.
        """
        own, other = self.vision.state_dict(), draft_model.vision.state_dict()
        is_equal = self.config.vision == draft_model.config.vision and own.keys() == other.keys()
        # `equal` takes tensors of one device and dtype.
        for name, t in own.items() if is_equal else ():
            is_equal = is_equal and (t.device, t.dtype) == (other[name].device, other[name].dtype)
            is_equal = is_equal and torch.equal(t, other[name])
        # By identity `generate` knows that the encoders are the same.
        if is_equal:
            draft_model.vision = self.vision
        return is_equal

    def _sees_as(self, other: VLM) -> bool:
        """Whether another model has the same encoders, and turns an image into equally many tokens."""
        own, its = self.config, other.config
        same = (own.vision, own.tiles, own.grid) == (its.vision, its.tiles, its.grid)
        return self.vision is other.vision and same

    def _prompts(self, conversations: Sequence[Sequence[Turn] | str], images: Sequence[Images]) -> list[Sample]:
        if len(conversations) != len(images):
            raise ValueError(f"images must have one entry a conversation ({len(conversations)}), got {len(images)}")
        # A batch of many says which conversation is malformed.
        samples = []
        for i, (conversation, image) in enumerate(zip(conversations, images, strict=True)):
            turns = [Turn("user", conversation)] if isinstance(conversation, str) else conversation
            try:
                samples.append(self.prepare(turns, image))
            except ValueError as e:
                if len(conversations) == 1:
                    raise
                raise ValueError(f"conversation {i}: {e}") from e
        return samples

    @torch.no_grad()
    def packed(
        self,
        samples: Sequence[Sample],
        cache: FeatureCache | None = None,
        vision: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> tuple[EmbedFn, Tensor]:
        """Pack samples and encode their images.

        Args:
            samples: prompts.
            cache, vision: see `encode`.

        Returns:
            A function that embeds ranges of the packed tokens, and the bounds (S + 1,) of the samples.
        """
        text = collate([replace(sample, images=()) for sample in samples])
        device = self.language_model.input_device
        features = self.encode([image for sample in samples for image in sample.images], cache, vision)
        # (tokens of images, D)
        joined = torch.cat([f.to(device) for f in features]) if features else None
        return self._place(text.input_ids.to(device), joined, bool(features)), text.cu_seqlens

    @torch.no_grad()
    def encode(
        self,
        images: Sequence[ProcessedImage],
        cache: FeatureCache | None = None,
        vision: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> list[Tensor]:
        """Compute the features of images: the embeddings of their tokens. Images of equal content are encoded once.

        Args:
            images: results of `preprocess`.
            cache: features of images that were seen before; those of new ones are added.
            vision: computes what `VisionTower` does, which it is by default.

        Returns:
            For each image, (n_tokens, D).
        """
        found: dict[bytes, Tensor] = {}
        new: dict[bytes, ProcessedImage] = {}
        for image in images:
            if image.digest in found or image.digest in new:
                continue
            features = None if cache is None else cache.get(image.digest)
            if features is None:
                new[image.digest] = image
            else:
                found[image.digest] = features
        # Encoders may have another device and dtype than the language model.
        encoder = next(self.vision.parameters())
        pixels = (torch.cat(views) for views in zip(*(i.pixels for i in new.values()), strict=True))
        views = tuple(p.to(encoder.device, encoder.dtype) for p in pixels)  # (views, 3, height, width) each
        encoded = self._encode(views, [(i.n_views, i.grid) for i in new.values()], vision)
        if new and encoded is not None:
            for digest, features in zip(new, encoded.split([i.n_tokens for i in new.values()]), strict=True):
                found[digest] = features
                if cache is not None:
                    cache.put(digest, features)
        return [found[image.digest] for image in images]

    def quantizable(self) -> dict[str, int]:
        parts = {"language_model": self.language_model.quantizable()}
        for i, encoder in enumerate(self.vision.encoders):
            assert isinstance(encoder, ViT)
            parts[f"vision.encoders.{i}"] = encoder.quantizable()
        return {f"{part}.{name}": bits for part, least in parts.items() for name, bits in least.items()}

    @classmethod
    def open_checkpoint(cls, folder: Path, **hub: Any) -> tuple[VLMConfig, Weights]:
        """Open a checkpoint in any format that this class reads.

        Args:
            folder, hub: see `HubModel.open_checkpoint`.

        Returns:
            The config, and the weights under the names of this class, unread.
        """
        if detect_format(folder) in ("ml-mamba", "cobra"):
            return open_released(folder, **hub)
        return super().open_checkpoint(folder, **hub)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int = 0,
        tiles: TilesConfig | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device_map: DeviceMap = "cpu",
        quantize: Quantization | None = None,
    ) -> VLM:
        """Assemble a pretrained language model, pretrained encoders and a new connector.

        >>> vlm = VLM.from_preset("vl-mamba-2.8b", dtype=torch.bfloat16, device_map="auto")  # doctest: +SKIP

        Args:
            name: one of `presets.PRESETS`.
            seed: of the connector's initialization.
            tiles: tiles of each image; None is one view of it, as in the papers.
            cache_dir, token, force_download, local_files_only, dtype, device_map, quantize: see
                `HubModel.from_pretrained`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: no such preset; the closest name is suggested. Or as `from_pretrained`.
            FileNotFoundError, PermissionError, ConnectionError: see `fetch`.
        """
        preset = get_preset(name)
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "token": token,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        check_placement(dtype, device_map)
        check_quantization(quantize)
        config, pretrained = preset.open(**hub)
        config = replace(config, tiles=tiles)
        with torch.device("meta"):
            vlm = cls(config, neox_tokenizer(**hub))
        # The seed of the caller's generator is left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            connector = new_connector(config)
        new = Weights.from_tensors(connector.state_dict())
        weights = vlm.make_quantized(merged({"": pretrained, "connector.": new}), quantize, f"preset {name}")
        check_devices(vlm, device_map)
        load_into(vlm, weights, f"preset {name}", dtype, device_map)
        return vlm.eval()

    def save_extras(self, folder: Path) -> None:
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    def load_extras(self, folder: Path, **hub: Any) -> None:
        if (folder / TOKENIZER).exists():
            self.tokenizer = Tokenizer.from_file(folder / TOKENIZER)
        elif detect_format(folder) in ("ml-mamba", "cobra"):
            self.tokenizer = neox_tokenizer(**hub)


def new_connector(config: VLMConfig) -> nn.Module:
    """Build the connector of a model with new weights."""
    lm_width = config.language.d_model
    connector = build_connector(config.connector, sum(v.encoder.width for v in config.vision), lm_width)
    if config.tiles is not None and config.tiles.unpads:
        # Drawn as LLaVA's. A part of the connector, so that it is trained wherever the connector is.
        connector.image_newline = nn.Parameter(torch.randn(lm_width) * lm_width**-0.5)
    return connector


def _encode_once(vision: VisionTower) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function of a vision tower for two models that encode the same images, one after the other."""
    features: list[Tensor] = []

    def encode(images: Sequence[Tensor]) -> Tensor:
        if not features:
            features.append(vision(images))
        return features[0]

    return encode


def as_list(images: Images) -> list[OneImage]:
    """Return the images of a conversation as a list."""
    if images is None:
        return []
    # Not by `Sequence`: a path as text is one, too.
    if isinstance(images, OneImage):
        return [images]
    return list(images)
