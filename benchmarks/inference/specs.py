"""Shapes of the vision-language models that `ssm-bench prefill` and `decode` compare.

Shapes that are not this project's, from the published files on the Hugging Face Hub:

- TinyLLaVA: `tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B`, config.json: Phi-2 (width 2560, 32 layers, 32 heads, MLP 10240,
  partial rotary factor 0.4, vocabulary 51200), SigLIP so400m at 384 pixels, connector `mlp2x_gelu`, 729 tokens an
  image.
- MobileVLM v2: `mtgv/MobileVLM_V2-3B`, config.json: MobileLLaMA-2.7B (width 2560, 32 layers, 32 heads, MLP 6912,
  vocabulary 32000, untied head), CLIP ViT-L/14 at 336 pixels, projector `ldpnetv2` (2402.03766, section 3), 144 tokens
  an image.
- The Transformers of the same size: a Llama of MobileLLaMA's width, layers and heads, with this project's vocabulary
  and a tied head, and an MLP so wide that its language model is as large as ours; LLaVA-1.5's connector (two layers,
  GELU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from ...connectors import ConnectorConfig
from ...model import PRESETS, LMConfig, ViTConfig
from ...model.config import VisionConfig
from ...model.formats.language import PUBLISHED
from ...model.formats.vision import VISION_ENCODERS
from ...model.image import ImageProcessor
from ...model.inspect import flops_per_token
from ...model.quantize import Quantization
from ..options import Size
from ..peers import check_installed


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
    """Partial rotary factor of phi."""

    def build(self, max_tokens: int) -> Any:
        """Build the model with random weights, for sequences of at most `max_tokens`."""
        import transformers

        shape = {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "intermediate_size": self.mlp_width, "vocab_size": self.vocab_size, "tie_word_embeddings": self.tied,
            "max_position_embeddings": max_tokens, "attn_implementation": "sdpa",
        }  # fmt: skip
        if self.kind == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": self.rotary}
        return transformers.PhiForCausalLM(transformers.PhiConfig(**shape, rope_parameters=rope))


@dataclass(frozen=True)
class VLMSpec:
    """Shape of a vision-language model: encoders, connector, language model."""

    vision: tuple[VisionConfig, ...]
    connector: ConnectorConfig | Literal["mlp", "ldp-v2"]
    language: LMConfig | TransformerConfig

    @property
    def is_ours(self) -> bool:
        return isinstance(self.language, LMConfig)

    def check_installed(self) -> None:
        """Check that the package of the language model is installed.

        Raises:
            ModuleNotFoundError: it is not.
        """
        if not self.is_ours:
            check_installed("transformers")

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        side = self.vision[0].encoder.grid_size
        return (side // 2) ** 2 if self.connector == "ldp-v2" else side**2

    @property
    def vocab_size(self) -> int:
        """Tokens that a prompt may have."""
        return self.language.vocab_size

    def state_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of a sequence's state after `tokens` tokens, by formula; for a Transformer, of its keys and values."""
        lm, size = self.language, dtype.itemsize
        if isinstance(lm, TransformerConfig):
            return 2 * lm.layers * lm.width * tokens * size
        inner = lm.expand * lm.d_model
        # States (inner, N) in at least float32, and the convolution's last K - 1 inputs.
        channels = inner + (2 * lm.ngroups * lm.d_state if lm.layer == "mamba2" else 0)  # of the convolution
        return lm.n_layer * (inner * lm.d_state * max(4, size) + channels * (lm.d_conv - 1) * size)

    def activation_bytes(self, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """Upper estimate of the bytes of activations while `tokens` tokens of each sequence run through a layer."""
        lm = self.language
        if isinstance(lm, TransformerConfig):
            return batch * tokens * (8 * lm.width + 3 * lm.mlp_width) * dtype.itemsize
        return batch * tokens * 12 * lm.expand * lm.d_model * max(4, dtype.itemsize)

    def prompt_work(self, tokens: int, batch: int) -> float:
        """Operations of a prompt; its time is predicted in proportion to them."""
        lm = self.language
        if isinstance(lm, TransformerConfig):
            matrices = 4 * lm.width + (3 if lm.kind == "llama" else 2) * lm.mlp_width
            return batch * tokens * 2.0 * lm.layers * lm.width * (matrices + tokens)
        return float(batch * tokens * flops_per_token(lm, prefill=True).total)

    def step_work(self, context: int, batch: int, dtype: torch.dtype, parameters: int) -> float:
        """Bytes that a decoding step reads; its time is predicted in proportion to them."""
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

SPECS: dict[Size, dict[str, VLMSpec]] = {
    "published": {
        "vl-mamba": VLMSpec(_VL.vision, _VL.connector, _VL.language),
        "transformer-siglip": VLMSpec(
            _VL.vision, "mlp", TransformerConfig("llama", 2560, 32, 32, 7296, _VOCABULARY, True)
        ),
        "ml-mamba": VLMSpec(_ML.vision, _ML.connector, _ML.language),
        "ml-mamba-on-mamba1": VLMSpec(_ML.vision, _ML.connector, PUBLISHED["state-spaces/mamba-2.8b"].config),
        "transformer-dinov2-siglip": VLMSpec(
            _ML.vision, "mlp", TransformerConfig("llama", 2560, 32, 32, 7040, _VOCABULARY, True)
        ),
        "tinyllava": VLMSpec(_VL.vision, "mlp", TransformerConfig("phi", 2560, 32, 32, 10240, 51200, False, 0.4)),
        "mobilevlm-v2": VLMSpec(
            (VISION_ENCODERS["openai/clip-vit-large-patch14-336"].config,),
            "ldp-v2", TransformerConfig("llama", 2560, 32, 32, 6912, 32000, False),
        ),
    },
    "130m": {
        "vl-mamba": VLMSpec(
            _SIGLIP, ConnectorConfig("vss-l2"), PUBLISHED["state-spaces/mamba-130m"].config
        ),
        "transformer-siglip": VLMSpec(_SIGLIP, "mlp", TransformerConfig("llama", 768, 12, 12, 2248, 50280, True)),
        "ml-mamba": VLMSpec(_DINOV2 + _SIGLIP, _ML_CONNECTOR, PUBLISHED["state-spaces/mamba2-130m"].config),
        "ml-mamba-on-mamba1": VLMSpec(
            _DINOV2 + _SIGLIP, _ML_CONNECTOR, PUBLISHED["state-spaces/mamba-130m"].config
        ),
        "transformer-dinov2-siglip": VLMSpec(
            _DINOV2 + _SIGLIP, "mlp", TransformerConfig("llama", 768, 12, 12, 2248, 50280, True)
        ),
        "tinyllava": VLMSpec(_SIGLIP, "mlp", TransformerConfig("phi", 768, 12, 12, 3072, 50280, False, 0.5)),
        "mobilevlm-v2": VLMSpec(_CLIP, "ldp-v2", TransformerConfig("llama", 768, 12, 12, 2112, 50280, False)),
    },
    "small": {
        "vl-mamba": VLMSpec(_SIGLIP, ConnectorConfig("vss-l2"), _MAMBA),
        "transformer-siglip": VLMSpec(_SIGLIP, "mlp", TransformerConfig("llama", 256, 4, 4, 800, 8192, True)),
        "ml-mamba": VLMSpec(_DINOV2 + _SIGLIP, _ML_CONNECTOR, _MAMBA2),
        "ml-mamba-on-mamba1": VLMSpec(_DINOV2 + _SIGLIP, _ML_CONNECTOR, _MAMBA),
        "transformer-dinov2-siglip": VLMSpec(
            _DINOV2 + _SIGLIP, "mlp", TransformerConfig("llama", 256, 4, 4, 864, 8192, True)
        ),
        "tinyllava": VLMSpec(_SIGLIP, "mlp", TransformerConfig("phi", 256, 4, 4, 1024, 8192, False, 0.5)),
        "mobilevlm-v2": VLMSpec(_CLIP, "ldp-v2", TransformerConfig("llama", 256, 4, 4, 704, 8192, False)),
    },
}  # fmt: skip
"""The models by size and name, in the published proportions: two Mamba layers a Transformer layer. Those of `130m` have
the language models of the smallest published checkpoints, and small encoders."""
SAME_SIZE = {
    "transformer-siglip": "vl-mamba",
    "transformer-dinov2-siglip": "ml-mamba",
    "ml-mamba-on-mamba1": "ml-mamba",
}
"""Models with the encoders of another one and a language model of the same size, to 4 %."""


def spec_of(size: Size, variant: str) -> tuple[VLMSpec, Quantization | None]:
    """The shape of a model, and how it is quantized, by a name such as "vl-mamba" or "vl-mamba int8"."""
    model, _, quantize = variant.partition(" ")
    return SPECS[size][model], cast("Quantization | None", quantize or None)


def grid_tokens(size: Size) -> int:
    """Tokens of an image where the connector does not reduce their number."""
    return SPECS[size]["vl-mamba"].image_tokens
