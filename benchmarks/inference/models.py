"""Vision-language models with random weights, ready to be prefilled and stepped.

All run their encoders by the same code (`model.vit`). This project's models run as `generate` runs them: prompts packed
and in prefill chunks, steps by `Decoder`. The Transformers' language models are those of `transformers` at their best
ordinary settings: SDPA, logits of the last token alone, and `StaticCache`, since `DynamicCache` copies its content at
each step (93 ms a step against 19, at 32,768 tokens of the small size on a CPU). On a GPU their step is captured in a
CUDA graph like ours. Their prompt runs unsplit where it fits, since attention is then causal without a mask and faster;
else in prefill chunks of the same size as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...connectors import ConnectorConfig, build_connector
from ...model import VLM, LMConfig, VLMConfig
from ...model.generation.config import GenerationConfig
from ...model.generation.cuda_graph import capture, has_graphs, warm_up
from ...model.generation.decoding import Decoder, state_bytes
from ...model.generation.prefill import prefill
from ...model.quantize import Quantization, count_weights
from ...model.vlm import VisionTower
from ...model.weights import Weights, load_into
from .specs import TransformerConfig, VLMSpec

PREFILL_CHUNK = GenerationConfig().prefill_chunk
"""Tokens of a prompt that run at once."""

Prompt = Callable[[int, int], Tensor]
"""Embeddings of each sequence from a start to an end position, (B, end - start, D)."""


def build(
    spec: VLMSpec,
    dtype: torch.dtype,
    device: str,
    max_tokens: int,
    seed: int = 0,
    *,
    quantize: Quantization | None = None,
) -> InferenceModel:
    """Build a model with random weights on its device.

    Args:
        max_tokens: length of the longest sequence.
        quantize: of one of this project's models; on the meta device without values.

    Raises:
        ModuleNotFoundError: `transformers` is needed and not installed.
    """
    spec.check_installed()
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = _build(spec, max_tokens)
    finally:
        torch.set_default_dtype(before)
    for part in model.parts.values():
        part.to(dtype).eval().requires_grad_(False)
    if quantize is not None:
        assert isinstance(model, MambaModel)
        model.quantize(quantize)
    return model


def _build(spec: VLMSpec, max_tokens: int) -> InferenceModel:
    lm = spec.language
    if isinstance(lm, LMConfig):
        assert isinstance(spec.connector, ConnectorConfig)
        return MambaModel(spec, VLM(VLMConfig(lm, spec.vision, spec.connector)))
    tower = VisionTower(VLMConfig(vision=spec.vision))
    if spec.connector == "ldp-v2":
        connector = LDPv2(tower.width, lm.width)
    else:
        connector = build_connector(ConnectorConfig("mlp"), tower.width, lm.width)
    return TransformerModel(spec, {"encoder": tower, "connector": connector, "language": lm.build(max_tokens)})


class _Model:
    """The parts of a model: random images, their embeddings, and prompts of them.

    Args:
        parts: the encoder, the connector and the language model, by name.
    """

    def __init__(self, spec: VLMSpec, parts: Mapping[str, nn.Module]):
        self.spec, self.parts = spec, parts

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part; tied ones count once."""
        return {
            name: sum(count_weights(part).get(id(p), p.numel()) for p in part.parameters())
            for name, part in self.parts.items()
        }

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the parameters of each part."""
        return {name: sum(p.numel() * p.element_size() for p in part.parameters()) for name, part in self.parts.items()}

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of activations."""
        return next(self.parts["connector"].parameters())

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens: (*shape, D)."""
        raise NotImplementedError

    def images(self, batch: int) -> list[Tensor]:
        """Random images, (B, 3, H, W) for each encoder."""
        sizes = [v.encoder.image_size for v in self.spec.vision]
        like = self.like
        return [torch.randn(batch, 3, size, size, device=like.device, dtype=like.dtype) for size in sizes]

    def encode(self, images: list[Tensor]) -> Tensor:
        """Embeddings of images for the language model, (B, image tokens, D)."""
        return self.parts["connector"](self.parts["encoder"](images))  # (B, h, w, vision width) -> (B, image tokens, D)

    def prompt(self, features: Tensor, text: Tensor) -> Prompt:
        """An image, (B, image tokens, D), with a text (B, L) after it, embedded chunk by chunk."""
        n = features.shape[1]

        def embed(start: int, end: int) -> Tensor:
            words = self.embed(text[:, max(start - n, 0) : max(end - n, 0)])
            return torch.cat([features[:, start:end], words], dim=1)  # (B, end - start, D)

        return embed


class MambaModel(_Model):
    """One of this project's models."""

    decoder: Decoder

    def __init__(self, spec: VLMSpec, vlm: VLM):
        super().__init__(spec, {"encoder": vlm.vision, "connector": vlm.connector, "language": vlm.language_model})
        self.vlm, self.lm = vlm, vlm.language_model

    def quantize(self, quantize: Quantization) -> None:
        """Quantize the weights in place."""
        weights = Weights.from_tensors(self.vlm.state_dict())
        weights = self.vlm.make_quantized(weights, quantize, "the model")
        device = self.vlm.language_model.backbone.norm_f.weight.device
        if device.type != "meta":
            load_into(self.vlm, weights, "the model", None, device)
        self.vlm.requires_grad_(False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens: (*shape, D)."""
        return self.lm.embed(tokens)

    def allocate(self, batch: int, capacity: int) -> None:
        """Allocate the state of `batch` sequences of at most `capacity` tokens each."""
        self.decoder = Decoder(self.lm, batch)

    def release(self) -> None:
        """Free the state."""
        vars(self).pop("decoder", None)

    def fill(self, context: int) -> None:
        """Fill the state of `context` tokens with random values: a step's time does not depend on them."""
        for layer in self.decoder.state:
            for t in layer:
                t.normal_()

    def prefill(self, prompt: Prompt, length: int, chunk: int) -> Tensor:
        """Run prompts from their start, at most `chunk` tokens at once: logits after the last token, (B, V)."""
        batch = self.decoder.batch
        self.decoder.reset()

        def packed(start: int, end: int) -> Tensor:
            first, last = start // length, (end - 1) // length  # sequences that the range covers
            rows = [
                prompt(max(start - i * length, 0), min(end - i * length, length))[i : i + 1]
                for i in range(first, last + 1)
            ]
            return torch.cat(rows, dim=1)  # (1, end - start, D)

        bounds = torch.arange(batch + 1, dtype=torch.int32) * length  # (B + 1,), as cu_seqlens
        return prefill(self.lm, packed, bounds, self.decoder.state, chunk)

    def step(self, tokens: Tensor) -> Tensor:
        """Advance each sequence by its token, (B,): logits (B, V)."""
        return self.decoder(tokens)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the state of sequences of `tokens` tokens, counted from the tensors."""
        return state_bytes(self.decoder.state)


class TransformerModel(_Model):
    """A model with a language model of `transformers`, whose keys and values are in a `StaticCache`.

    The methods are those of `MambaModel`.
    """

    cache: Any

    def __init__(self, spec: VLMSpec, parts: Mapping[str, nn.Module]):
        super().__init__(spec, parts)
        self.lm: Any = parts["language"]

    def embed(self, tokens: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(tokens)

    def allocate(self, batch: int, capacity: int) -> None:
        from transformers import StaticCache

        like, lm = self.like, self.spec.language
        assert isinstance(lm, TransformerConfig)
        self.cache = StaticCache(config=self.lm.config, max_cache_len=capacity)
        self.cache.early_initialization(batch, lm.heads, lm.width // lm.heads, like.dtype, like.device)
        # Filled in place at each step, so that a captured graph reads them.
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=like.device)
        self.positions = torch.arange(capacity, device=like.device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)
        self.steps = 0
        self.replay: Callable[[], None] | None = None
        self.logits: Tensor | None = None

    def release(self) -> None:
        vars(self).pop("cache", None)
        self.replay = self.logits = None

    def fill(self, context: int) -> None:
        for layer in self.cache.layers:
            for t in (layer.keys, layer.values):  # (B, heads, capacity, head width)
                t[:, :, :context].normal_()
        self._set_length(context)

    def _set_length(self, context: int) -> None:
        self.position.fill_(context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(context)

    def prefill(self, prompt: Prompt, length: int, chunk: int) -> Tensor:
        self._set_length(0)
        logits = torch.empty(0)
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            positions = self.positions[start:end]  # (end - start,)
            # Without a mask the first chunk is causal, by the fast path; the later ones attend to all before them.
            mask = None if start == 0 else (self.positions <= positions[:, None])[None, None]
            logits = self._run({"inputs_embeds": prompt(start, end)}, mask, positions[None])
        self.position.fill_(length)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens[:, 0].copy_(tokens)
        device = self.tokens.device
        if not has_graphs(device):
            return self._step()
        if self.replay is None and self.steps == Decoder.WARM_UP:
            self.replay, self.logits = capture(self._step, device)
        if self.replay is not None and self.logits is not None:
            self.replay()
            return self.logits
        self.steps += 1
        return warm_up(self._step, device)

    def _step(self) -> Tensor:
        mask = (self.positions <= self.position)[None, None]  # (1, 1, 1, capacity)
        logits = self._run({"input_ids": self.tokens}, mask, self.position)
        self.position += 1
        return logits

    def _run(self, inputs: dict[str, Tensor], mask: Tensor | None, positions: Tensor) -> Tensor:
        out = self.lm(
            **inputs, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1].float()  # (B, V)

    def state_bytes(self, tokens: int) -> int:
        states = [t[:, :, :tokens] for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in states)


InferenceModel = MambaModel | TransformerModel


class LDPv2(nn.Module):
    """MobileVLM v2's projector (2402.03766, section 3).

    Two pointwise layers, average pooling that halves both sides, and a depthwise convolution that adds positions.
    """

    def __init__(self, vision_width: int, lm_width: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_width, lm_width)
        self.fc2 = nn.Linear(lm_width, lm_width)
        self.position = nn.Conv2d(lm_width, lm_width, 3, padding=1, groups=lm_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, vision width) -> (B, h / 2 * w / 2, language width)."""
        x = self.fc2(F.gelu(self.fc1(x))).permute(0, 3, 1, 2)  # (B, D, h, w)
        x = F.avg_pool2d(x, 2)  # (B, D, h / 2, w / 2)
        return (x + self.position(x)).flatten(2).mT  # (B, h / 2 * w / 2, D)
