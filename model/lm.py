"""The Mamba and Mamba-2 language models, with the parameter names of the `state-spaces` checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_kernels import add_rms_norm, has_readable_values
from ssm_kernels.modules import Mamba, Mamba2, MixerState, RMSNorm, is_plain

from .config import LMConfig
from .formats import detect_format
from .formats.language import NEOX_VOCABULARY, open_language_model
from .generation.config import GenerationConfig
from .generation.generate import generate_texts, stream_text
from .generation.interface import LMOutput, LMState
from .hub import TOKENIZER, HubModel, fetch
from .tokenizer import Tokenizer
from .weights import Weights

logger = logging.getLogger(__name__)

NEOX = "EleutherAI/gpt-neox-20b"
"""Where the tokenizer of `state-spaces/*` is: those repositories have none of their own."""


class MambaLM(HubModel, library_name="vl-mamba", pipeline_tag="text-generation"):
    """A language model on Mamba or Mamba-2 layers.

    `from_pretrained` reads this library's own format and those of `formats.language`: `state-spaces/mamba-130m`,
    `state-spaces/mamba-130m-hf`, `tiiuae/falcon-mamba-7b`, `mistralai/Mamba-Codestral-7B-v0.1` and their like. It sets
    `tokenizer` where there is one.

    >>> lm = MambaLM(LMConfig(d_model=64, n_layer=2, vocab_size=100))
    >>> lm(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 104])
    """

    config_class = LMConfig

    def __init__(self, config: LMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.backbone = _Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.apply(lambda module: _initialise(module, config.n_layer))
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        state: LMState | None = None,
        cu_seqlens: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> LMOutput:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L) tokens; or `inputs_embeds` (B, L, D) in their place.
            state: from `new_state`; where the sequences stand before, updated in place.
            cu_seqlens: (S + 1,) bounds of packed sequences, with B = 1; `state` then has S entries.
            logits_at: positions along L for which logits are wanted; all by default.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, or a token outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        hidden = self.backbone(inputs_embeds, state, cu_seqlens)
        if logits_at is not None:
            hidden = hidden.index_select(1, logits_at.to(hidden.device))
        hidden = hidden.to(self.device)
        logits = self.lm_head(hidden)
        return LMOutput(logits.to(torch.promote_types(logits.dtype, torch.float32)), hidden)

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        weight = self.lm_head.weight
        # A layer that is quantised dynamically has a method there, and runs on a CPU alone.
        return weight.device if isinstance(weight, Tensor) else torch.device("cpu")

    def embed(self, input_ids: Tensor) -> Tensor:
        """Tokens to vectors.

        Raises:
            ValueError: a token outside the vocabulary (checked on a CPU only, and in no traced graph; a GPU reports it
                by itself).
        """
        rows = self.config.padded_vocab_size
        if has_readable_values(input_ids) and input_ids.numel():
            low, high = input_ids.aminmax()
            if low < 0 or high >= rows:
                raise ValueError(f"input_ids must lie in [0, {rows}), got values from {low} to {high}")
        return self.backbone.embedding(input_ids.to(self.backbone.embedding.weight.device))

    def new_state(self, batch: int) -> LMState:
        """The state of `batch` sequences that have not begun."""
        return [layer.mixer.new_state(batch) for layer in self.backbone.layers]

    @classmethod
    def open_checkpoint(cls, folder: Path, **hub: Any) -> tuple[LMConfig, Weights]:
        return open_language_model(folder)

    def save_extras(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER)

    def load_extras(self, folder: Path, **hub: Any) -> None:
        if (folder / TOKENIZER).exists():
            self.tokenizer = Tokenizer.from_file(folder / TOKENIZER)
        elif detect_format(folder) == "state-spaces" and self.config.vocab_size == NEOX_VOCABULARY:
            self.tokenizer = neox_tokenizer(**hub)
        elif detect_format(folder) != "own":
            logger.warning("no tokenizer: %s has no %s", folder, TOKENIZER)

    def generate(self, prompts: Sequence[str], config: GenerationConfig | None = None) -> list[str]:
        """Go on from several texts together. Each continuation is the one that its text would get alone.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, got the text {prompts!r}")
        *_, answers = generate_texts(self, prompts, config)
        return [a.text for a in answers]

    def stream(self, prompt: str, config: GenerationConfig | None = None) -> Iterator[str]:
        """Go on from one text, giving what comes piece by piece."""
        return stream_text(generate_texts(self, [prompt], config))


def neox_tokenizer(**hub: Any) -> Tokenizer | None:
    """The tokenizer that `state-spaces/*` and what was made of them have in common; None, with a warning, where it
    cannot be had. `hub` is as for `fetch`."""
    try:
        folder = fetch(NEOX, [TOKENIZER], **hub | {"revision": None, "force_download": False})
        return Tokenizer.from_file(folder / TOKENIZER)
    except OSError as e:
        logger.warning("no tokenizer: that of %s could not be had (%s)", NEOX, e)
        return None


class _Backbone(nn.Module):
    def __init__(self, config: LMConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, hidden: Tensor, state: LMState | None, cu_seqlens: Tensor | None) -> Tensor:
        residual = None
        for i, layer in enumerate(self.layers):
            hidden, residual, cu_seqlens = _moved(layer.norm.weight.device, hidden, residual, cu_seqlens)
            hidden, residual = layer(hidden, residual, None if state is None else state[i], cu_seqlens)
        hidden, residual = _moved(self.norm_f.weight.device, hidden, residual)
        return _add_norm(self.norm_f, hidden, residual, self.residual_in_fp32)[0]


def _add_norm(norm: RMSNorm, hidden: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    # float64 models keep a float64 residual.
    dtype = torch.promote_types(hidden.dtype, torch.float32) if residual_in_fp32 else None
    if not is_plain(norm, RMSNorm):  # an adapter, or hooks: what the fused op would pass by
        total = hidden if residual is None else residual + hidden
        total = total.to(dtype or (hidden if residual is None else residual).dtype)
        return norm(total).to(hidden.dtype), total
    return add_rms_norm(hidden, norm.weight, residual, eps=norm.eps, residual_dtype=dtype)


def _moved(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.to(device) for t in tensors)


class _Layer(nn.Module):
    one_device = True

    def __init__(self, config: LMConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = make_mixer(config)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, state: MixerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the mixer gives, and the residual that it is to be added to."""
        normed, residual = _add_norm(self.norm, hidden, residual, self.residual_in_fp32)
        return self.mixer(normed, state, cu_seqlens), residual


def make_mixer(config: LMConfig) -> Mamba | Mamba2:
    """The mixer of one layer."""
    if config.layer == "mamba":
        dt_rank = "auto" if config.dt_rank is None else config.dt_rank
        return Mamba(
            config.d_model,
            config.d_state,
            config.d_conv,
            config.expand,
            dt_rank,
            conv_bias=config.conv_bias,
            bias=config.bias,
            dt_bc_norm_eps=config.dt_bc_norm_eps,
        )
    return Mamba2(
        config.d_model,
        config.d_state,
        config.d_conv,
        config.expand,
        config.headdim,
        config.ngroups,
        dt_limit=config.dt_limit,
        conv_bias=config.conv_bias,
        bias=config.bias,
        norm_eps=config.norm_eps,
        chunk_size=config.chunk_size,
    )


def _initialise(module: nn.Module, n_layer: int) -> None:
    """Embeddings as in GPT-2; output projections scaled down with depth, since each adds to the residual."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, Mamba | Mamba2):
        nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            module.out_proj.weight /= math.sqrt(n_layer)
