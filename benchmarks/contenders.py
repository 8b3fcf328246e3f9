"""Vision-language models side by side for `ssm-bench prefill` and `decode`: how each is built, prefilled and stepped.

All have random weights, and run their encoders by the same code (`model.vit`). Ours run as `generate` runs them:
prompts packed and in pieces, steps by `Decoder`. The Transformers' language models are those of `transformers` at
their best ordinary settings: SDPA, logits of the last token alone, and `StaticCache`, since `DynamicCache` copies all
that it holds at each step (93 ms a step against 19, at 32,768 tokens of the small size on a CPU). On a GPU their step
is captured in a CUDA graph like ours. Their prompt runs whole where it fits, since attention is then causal without a
mask and faster; else in pieces of the same size as ours.

Shapes that are not ours, from the published files on the Hugging Face Hub:

- TinyLLaVA: `tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B`, config.json: Phi-2 (width 2560, 32 layers, 32 heads, MLP 10240,
  rotary share 0.4, vocabulary 51200), SigLIP so400m at 384 pixels, connector `mlp2x_gelu`, 729 tokens an image.
- MobileVLM v2: `mtgv/MobileVLM_V2-3B`, config.json: MobileLLaMA-2.7B (width 2560, 32 layers, 32 heads, MLP 6912,
  vocabulary 32000, head not tied), CLIP ViT-L/14 at 336 pixels, projector `ldpnetv2` (2402.03766, section 3), 144
  tokens an image.
- The Transformers of the same size: a Llama of MobileLLaMA's width, layers and heads, with our vocabulary and tied
  head, and an MLP as wide as makes its language model as large as ours; LLaVA-1.5's connector (two layers, GELU).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..connectors import ConnectorConfig, build_connector
from ..model import PRESETS, VLM, LMConfig, ViTConfig, VLMConfig
from ..model.config import VisionConfig
from ..model.formats.language import PUBLISHED
from ..model.formats.vision import VISION_ENCODERS
from ..model.generation.config import GenerationConfig
from ..model.generation.cuda_graph import capture, has_graphs, warm_up
from ..model.generation.decoding import Decoder, state_bytes
from ..model.generation.prefill import prefill
from ..model.image import ImageProcessor
from ..model.inspect import flops_a_token
from ..model.vlm import VisionTower
from .options import Size

CHUNK = GenerationConfig().prefill_chunk
"""Tokens of a prompt that are run at once."""


@dataclass(frozen=True)
class TransformerConfig:
    """A language model of `transformers`, by its shape."""

    kind: Literal["llama", "phi"]
    width: int
    layers: int
    heads: int
    mlp_width: int
    vocab_size: int
    tied: bool
    rotary: float = 1.0
    """Share of a head's width that is rotated by its place; of phi."""

    def parts(self, max_tokens: int) -> tuple[type, object]:
        """The class and its config, for sequences of at most `max_tokens`."""
        import transformers

        shape = {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "intermediate_size": self.mlp_width, "vocab_size": self.vocab_size, "tie_word_embeddings": self.tied,
            "max_position_embeddings": max_tokens, "attn_implementation": "sdpa",
        }  # fmt: skip
        if self.kind == "llama":
            return transformers.LlamaForCausalLM, transformers.LlamaConfig(**shape)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": self.rotary}
        return transformers.PhiForCausalLM, transformers.PhiConfig(**shape, rope_parameters=rope)


@dataclass(frozen=True)
class Spec:
    """One model: encoders, connector, language model."""

    vision: tuple[VisionConfig, ...]
    connector: ConnectorConfig | Literal["mlp", "ldp-v2"]
    language: LMConfig | TransformerConfig

    @property
    def is_ours(self) -> bool:
        return isinstance(self.language, LMConfig)

    @property
    def image_tokens(self) -> int:
        """Tokens that an image takes."""
        side = self.vision[0].encoder.grid_size
        return (side // 2) ** 2 if self.connector == "ldp-v2" else side**2

    @property
    def vocab_size(self) -> int:
        """Tokens that may be drawn."""
        return self.language.vocab_size

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """What a sequence of so many tokens leaves behind, by formula; a Transformer's keys and values."""
        lm, size = self.language, dtype.itemsize
        if isinstance(lm, TransformerConfig):
            return 2 * lm.layers * lm.width * tokens * size
        inner = lm.expand * lm.d_model
        channels = inner + (2 * lm.ngroups * lm.d_state if lm.layer == "mamba2" else 0)
        return lm.n_layer * (inner * lm.d_state * max(4, size) + channels * (lm.d_conv - 1) * size)

    def activation_bytes(self, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """About what is in memory at once while so many tokens of each sequence run through a layer, generously."""
        lm = self.language
        if isinstance(lm, TransformerConfig):
            return batch * tokens * (8 * lm.width + 3 * lm.mlp_width) * dtype.itemsize
        return batch * tokens * 12 * lm.expand * lm.d_model * max(4, dtype.itemsize)

    def prompt_work(self, tokens: int, batch: int) -> float:
        """Operations of a prompt, in proportion to which its time is predicted."""
        lm = self.language
        if isinstance(lm, TransformerConfig):
            matrices = 4 * lm.width + (3 if lm.kind == "llama" else 2) * lm.mlp_width
            return batch * tokens * 2.0 * lm.layers * lm.width * (matrices + tokens)
        return float(batch * tokens * flops_a_token(lm, prefill=True).total)

    def step_work(self, context: int, batch: int, dtype: torch.dtype, parameters: int) -> float:
        """Bytes that a step must read, in proportion to which its time is predicted."""
        return float(parameters * dtype.itemsize + batch * self.state_bytes(context, dtype))


def _vision(*encoders: ViTConfig) -> tuple[VisionConfig, ...]:
    return tuple(VisionConfig(e, ImageProcessor(e.image_size)) for e in encoders)


_SIGLIP = _vision(ViTConfig(112, 14, 192, 4, 4, 768))
_DINOV2 = _vision(ViTConfig(112, 14, 192, 4, 4, 768, class_token=True, register_tokens=4, layer_scale=True))
_CLIP = _vision(
    ViTConfig(
        112, 14, 192, 4, 4, 768, "quick_gelu", 1e-5,
        class_token=True, position_of_class=True, pre_norm=True, patch_bias=False,
    )
)  # fmt: skip
_MAMBA = LMConfig(256, 8, 8192)
_MAMBA2 = LMConfig(256, 8, 8192, "mamba2", d_state=128)
_ML_CONNECTOR = ConnectorConfig("mamba2-advanced", chunk_size=256)

_VL, _ML = PRESETS["vl-mamba-2.8b"].config, PRESETS["ml-mamba-3b"].config
_VOCABULARY = _ML.language.padded_vocab_size

SPECS: dict[Size, dict[str, Spec]] = {
    "published": {
        "vl-mamba": Spec(_VL.vision, _VL.connector, _VL.language),
        "transformer-siglip": Spec(
            _VL.vision, "mlp", TransformerConfig("llama", 2560, 32, 32, 7296, _VOCABULARY, True)
        ),
        "ml-mamba": Spec(_ML.vision, _ML.connector, _ML.language),
        "ml-mamba-on-mamba1": Spec(_ML.vision, _ML.connector, PUBLISHED["state-spaces/mamba-2.8b"].config),
        "transformer-dinov2-siglip": Spec(
            _ML.vision, "mlp", TransformerConfig("llama", 2560, 32, 32, 7040, _VOCABULARY, True)
        ),
        "tinyllava": Spec(_VL.vision, "mlp", TransformerConfig("phi", 2560, 32, 32, 10240, 51200, False, 0.4)),
        "mobilevlm-v2": Spec(
            (VISION_ENCODERS["openai/clip-vit-large-patch14-336"].config,),
            "ldp-v2", TransformerConfig("llama", 2560, 32, 32, 6912, 32000, False),
        ),
    },
    "small": {
        "vl-mamba": Spec(_SIGLIP, ConnectorConfig("vss-l2"), _MAMBA),
        "transformer-siglip": Spec(_SIGLIP, "mlp", TransformerConfig("llama", 256, 4, 4, 800, 8192, True)),
        "ml-mamba": Spec(_DINOV2 + _SIGLIP, _ML_CONNECTOR, _MAMBA2),
        "ml-mamba-on-mamba1": Spec(_DINOV2 + _SIGLIP, _ML_CONNECTOR, _MAMBA),
        "transformer-dinov2-siglip": Spec(
            _DINOV2 + _SIGLIP, "mlp", TransformerConfig("llama", 256, 4, 4, 864, 8192, True)
        ),
        "tinyllava": Spec(_SIGLIP, "mlp", TransformerConfig("phi", 256, 4, 4, 1024, 8192, False, 0.5)),
        "mobilevlm-v2": Spec(_CLIP, "ldp-v2", TransformerConfig("llama", 256, 4, 4, 704, 8192, False)),
    },
}  # fmt: skip
"""The contenders. The small ones have the published ones' proportions: two Mamba layers for one of a Transformer."""
SAME_SIZE = {
    "transformer-siglip": "vl-mamba",
    "transformer-dinov2-siglip": "ml-mamba",
    "ml-mamba-on-mamba1": "ml-mamba",
}
"""Whose language model is as large as whose, to 4 %; encoders are the same."""


def grid_tokens(size: Size) -> int:
    """Tokens that an image takes where they are not made fewer."""
    return SPECS[size]["vl-mamba"].image_tokens


def check_installed(spec: Spec) -> None:
    """Raises ModuleNotFoundError where a model needs `transformers` and it is not there."""
    if not spec.is_ours and importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers")


class LDPv2(nn.Module):
    """MobileVLM v2's projector (2402.03766, section 3): two pointwise layers, halving by average, and a depthwise
    convolution that adds positions."""

    def __init__(self, vision_width: int, lm_width: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_width, lm_width)
        self.fc2 = nn.Linear(lm_width, lm_width)
        self.position = nn.Conv2d(lm_width, lm_width, 3, padding=1, groups=lm_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, vision width) -> (B, h / 2 * w / 2, language width)."""
        x = self.fc2(F.gelu(self.fc1(x))).permute(0, 3, 1, 2)
        x = F.avg_pool2d(x, 2)
        return (x + self.position(x)).flatten(2).mT


Prompt = Callable[[int, int], Tensor]
"""Gives the vectors of each sequence from one place to another, (B, end - begin, D)."""


class Contender:
    """A model that can be asked: `encode`, `prefill`, `step`. Two kinds follow; each says what it remembers."""

    def __init__(self, spec: Spec, parts: dict[str, nn.Module]):
        self.spec, self.parts = spec, parts
        self.embedding = parts["language"].get_parameter(
            "backbone.embedding.weight" if spec.is_ours else "model.embed_tokens.weight"
        )

    @property
    def parameters(self) -> dict[str, int]:
        """Of each part; tied ones are counted once."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts.items()}

    def images(self, batch: int) -> list[Tensor]:
        """Random images as each encoder expects them."""
        sizes = [v.encoder.image_size for v in self.spec.vision]
        like = self.embedding
        return [torch.randn(batch, 3, size, size, device=like.device, dtype=like.dtype) for size in sizes]

    def encode(self, images: list[Tensor]) -> Tensor:
        """Images as vectors of the language model, (B, image tokens, D)."""
        return self.parts["connector"](self.parts["encoder"](images))

    def prompt(self, features: Tensor, text: Tensor) -> Prompt:
        """An image and a text (B, L) after it; the text is embedded piece by piece."""
        n = features.shape[1]

        def embed(begin: int, end: int) -> Tensor:
            words = F.embedding(text[:, max(begin - n, 0) : max(end - n, 0)], self.embedding)
            return torch.cat([features[:, begin:end], words], dim=1)

        return embed

    def start(self, batch: int, room: int) -> None:
        """Begin `batch` sequences, of at most `room` tokens each."""
        raise NotImplementedError

    def end(self) -> None:
        """Give back what `start` took."""
        raise NotImplementedError

    def fill(self, context: int) -> None:
        """Random values where `context` tokens would have left theirs: a step's time does not depend on them."""
        raise NotImplementedError

    def prefill(self, prompt: Prompt, length: int, chunk: int) -> Tensor:
        """Run prompts from the beginning, at most `chunk` tokens at once: logits after the last token, (B, V)."""
        raise NotImplementedError

    def step(self, tokens: Tensor) -> Tensor:
        """Advance each sequence by its token, (B,): logits (B, V)."""
        raise NotImplementedError

    def state_bytes(self, tokens: int) -> int:
        """What the sequences' tokens take in memory, counted from the tensors."""
        raise NotImplementedError


class Ours(Contender):
    def __init__(self, spec: Spec, vlm: VLM):
        super().__init__(
            spec, {"encoder": vlm.vision, "connector": vlm.connector, "language": vlm.language_model}
        )  # fmt: skip
        self.lm = vlm.language_model

    def start(self, batch: int, room: int) -> None:
        self.decoder = Decoder(self.lm, batch)

    def end(self) -> None:
        self.decoder = None

    def fill(self, context: int) -> None:
        for layer in self.decoder.state:
            for t in layer:
                t.normal_()

    def prefill(self, prompt: Prompt, length: int, chunk: int) -> Tensor:
        batch = self.decoder.batch
        self.decoder.reset()

        def packed(begin: int, end: int) -> Tensor:
            first, last = begin // length, (end - 1) // length
            rows = [
                prompt(max(begin - i * length, 0), min(end - i * length, length))[i : i + 1]
                for i in range(first, last + 1)
            ]
            return torch.cat(rows, dim=1)

        bounds = torch.arange(batch + 1, dtype=torch.int32) * length
        return prefill(self.lm, packed, bounds, self.decoder.state, chunk)

    def step(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens)

    def state_bytes(self, tokens: int) -> int:
        return state_bytes(self.decoder.state)


class Transformer(Contender):
    """A language model of `transformers`, its keys and values in a `StaticCache`."""

    def __init__(self, spec: Spec, parts: dict[str, nn.Module]):
        super().__init__(spec, parts)
        self.lm = parts["language"]

    def start(self, batch: int, room: int) -> None:
        from transformers import StaticCache

        like = self.embedding
        lm = self.spec.language
        self.cache = StaticCache(config=self.lm.config, max_cache_len=room)
        self.cache.early_initialization(batch, lm.heads, lm.width // lm.heads, like.dtype, like.device)
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=like.device)
        self.places = torch.arange(room, device=like.device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=like.device)
        self.steps, self.replay, self.logits = 0, None, None

    def end(self) -> None:
        self.cache = self.replay = self.logits = None

    def fill(self, context: int) -> None:
        for layer in self.cache.layers:
            for t in (layer.keys, layer.values):
                t[:, :, :context].normal_()
        self._at(context)

    def _at(self, context: int) -> None:
        self.position.fill_(context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(context)

    def prefill(self, prompt: Prompt, length: int, chunk: int) -> Tensor:
        self._at(0)
        logits = None
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            places = self.places[begin:end]
            # Without a mask the first piece is causal, by the fast path; the next ones see what was before them.
            mask = None if begin == 0 else (self.places <= places[:, None])[None, None]
            logits = self._run({"inputs_embeds": prompt(begin, end)}, mask, places[None])
        self.position.fill_(length)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens[:, 0].copy_(tokens)
        device = self.tokens.device
        if not has_graphs(device):
            return self._step()
        if self.replay is None and self.steps == Decoder.WARM_UP:
            self.replay, self.logits = capture(self._step, device)
        if self.replay is not None:
            self.replay()
            return self.logits
        self.steps += 1
        return warm_up(self._step, device)

    def _step(self) -> Tensor:
        mask = (self.places <= self.position)[None, None]  # (1, 1, 1, room)
        logits = self._run({"input_ids": self.tokens}, mask, self.position)
        self.position += 1
        return logits

    def _run(self, what: dict[str, Tensor], mask: Tensor | None, positions: Tensor) -> Tensor:
        out = self.lm(
            **what, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1].float()

    def state_bytes(self, tokens: int) -> int:
        kept = [t[:, :, :tokens] for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in kept)


def build(spec: Spec, dtype: torch.dtype, device: str, max_tokens: int, seed: int = 0) -> Contender:
    """A model with random weights, made where it is to run.

    Args:
        max_tokens: the longest sequence that it is to hold.

    Raises:
        ModuleNotFoundError: `transformers` is needed and not installed.
    """
    check_installed(spec)
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            contender = _build(spec, max_tokens)
    finally:
        torch.set_default_dtype(before)
    for part in contender.parts.values():
        part.to(dtype).eval().requires_grad_(False)
    return contender


def _build(spec: Spec, max_tokens: int) -> Contender:
    if spec.is_ours:
        return Ours(spec, VLM(VLMConfig(spec.language, spec.vision, spec.connector)))
    tower = VisionTower(VLMConfig(vision=spec.vision))
    make, config = spec.language.parts(max_tokens)
    width = spec.language.width
    connector = (
        LDPv2(tower.width, width)
        if spec.connector == "ldp-v2"
        else build_connector(ConnectorConfig(spec.connector), tower.width, width)
    )
    return Transformer(spec, {"encoder": tower, "connector": connector, "language": make(config)})
