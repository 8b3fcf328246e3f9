"""Mamba, Mamba-2 and Mamba-3 language models, with the parameter names of the `state-spaces` checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_kernels import StateSlots, add_rms_norm, has_readable_values
from ssm_kernels.modules import (
    LayerState,
    Mamba,
    Mamba2,
    Mamba3,
    MixerState,
    QuantizedEmbedding,
    RMSNorm,
    fuse_step,
    is_plain,
    obstacle_to_fusing,
)

from .config import LMConfig
from .formats import detect_format
from .formats.language import NEOX_VOCABULARY, open_language_model
from .generation.config import GenerationConfig
from .generation.generate import generate_texts, stream_text
from .generation.interface import LMOutput, LMState
from .generation.speculative import DraftStats
from .hub import TOKENIZER, HubModel, fetch
from .tokenizer import Tokenizer
from .transformers_files import save_tokenizer
from .weights import Weights

logger = logging.getLogger(__name__)

NEOX = "EleutherAI/gpt-neox-20b"
"""Repository of the tokenizer of `state-spaces/*`, which have none of their own."""


class MambaLM(HubModel, library_name="vl-mamba", pipeline_tag="text-generation"):
    """Causal language model of Mamba (arXiv 2312.00752), Mamba-2 (2405.21060) or Mamba-3 (2603.15569) layers.

    `from_pretrained` reads this library's own format and those of `formats.language`: `state-spaces/mamba-130m`,
    `state-spaces/mamba-130m-hf`, `tiiuae/falcon-mamba-7b`, `mistralai/Mamba-Codestral-7B-v0.1` and their like. It sets
    `tokenizer` where there is one.

    Letters: B batch, L length, D width, V rows of the embedding, S packed sequences.

    >>> lm = MambaLM(LMConfig(d_model=64, n_layer=2, vocab_size=100))
    >>> lm(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 104])

    Args:
        config: architecture.
        tokenizer: for text in and text out.
    """

    config_class = LMConfig

    def __init__(self, config: LMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.backbone = _Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.apply(lambda module: _init_weights(module, config.n_layer))
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
        return_state: bool = False,
        slots: StateSlots | None = None,
    ) -> LMOutput:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L) tokens; or `inputs_embeds` (B, L, D) in their place.
            inputs_embeds: (B, L, D) embeddings.
            state: from `new_state`, or a result of this function: the state of the sequences before this call. Without
                `return_state` it is updated in place, without gradients.
            cu_seqlens: (S + 1,) bounds of packed sequences, with B = 1; `state` then has S entries.
            logits_at: (n,) positions along L for which logits are wanted; all by default.
            return_state: return the final state too, with gradients, and leave `state` as it is.
            slots: take this call as a decoding step of a few tokens a sequence on slots of `state`, which is then a
                pool: `new_state(n_slots)`. Call it within `torch.no_grad()`.

        Returns:
            Logits (B, L or n, V), the hidden states that they are computed from, and the final state or None.

        Raises:
            TypeError: a part of `state` is not what `new_state` returns, or its dtype is narrower than the layer's.
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, a token outside the vocabulary, a `state`
                of other layers or another number of sequences, or slots that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if slots is not None and return_state:
            raise ValueError("return_state must be False with slots, which update the pool in place; got True")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids)  # (B, L, D)
        hidden, final = self.backbone(inputs_embeds, state, cu_seqlens, return_state, slots)  # (B, L, D)
        if logits_at is not None:
            hidden = hidden.index_select(1, logits_at.to(hidden.device))  # (B, n, D)
        hidden = hidden.to(self.device)
        logits = self.lm_head(hidden)  # (B, L or n, V)
        return LMOutput(logits.to(torch.promote_types(logits.dtype, torch.float32)), hidden, final)

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        # A dynamically quantized layer has no parameters, and runs on a CPU only.
        return next((p.device for p in self.lm_head.parameters()), torch.device("cpu"))

    @property
    def input_device(self) -> torch.device:
        """Device of the embeddings."""
        return next(self.backbone.embedding.parameters()).device

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens.

        Args:
            input_ids: integer tokens of any shape.

        Returns:
            (*shape, D).

        Raises:
            ValueError: a token outside the vocabulary. Checked on a CPU only, and not in a traced graph; a GPU reports
                it by itself.
        """
        rows = self.config.padded_vocab_size
        # Reading values would synchronize a GPU, and break a traced graph.
        if has_readable_values(input_ids) and input_ids.numel():
            low, high = input_ids.aminmax()
            if low < 0 or high >= rows:
                raise ValueError(f"input_ids must be in [0, {rows}), got values from {low} to {high}")
        embeddings = self.backbone.embedding(input_ids.to(self.input_device))
        if isinstance(self.backbone.embedding, QuantizedEmbedding):  # float32
            return embeddings.to(self.backbone.norm_f.weight.dtype)
        return embeddings

    def quantizable(self) -> dict[str, int]:
        # The embedding and the head make or read every token; x_proj makes the inputs of the scan.
        least: dict[str, int] = {"backbone.embedding": 8, "lm_head": 8}
        for i, layer in enumerate(self.backbone.layers):
            for name, bits in (("in_proj", 4), ("x_proj", 8), ("out_proj", 4)):
                if hasattr(layer.mixer, name):
                    least[f"backbone.layers.{i}.mixer.{name}"] = bits
        return least

    def new_state(self, batch: int, dtype: torch.dtype | None = None) -> LMState:
        """Return the zero state of `batch` sequences.

        Args:
            batch: number of sequences.
            dtype: of the scans' part: bfloat16, float16 or int8, rounded stochastically at every write; float32, or
                float64 in a model of that dtype, by default.

        Raises:
            TypeError: another dtype.
        """
        return [layer.mixer.new_state(batch, dtype) for layer in self.backbone.layers]

    def obstacle_to_fusing(self) -> str | None:
        """Return the reason why `fuse_step` cannot take this model, or None."""
        backbone = self.backbone
        if not (is_plain(self, MambaLM) and is_plain(backbone, _Backbone)):
            return "the model is adapted or hooked"
        if not all(is_plain(layer, _Layer) for layer in backbone.layers):
            return "a layer is adapted or hooked"
        layers = [(layer.norm, layer.mixer) for layer in backbone.layers]
        obstacle = obstacle_to_fusing(layers, backbone.norm_f, self.lm_head)
        if obstacle is None and not backbone.residual_in_fp32 and backbone.norm_f.weight.dtype != torch.float32:
            return "its residual stream is not float32"
        return obstacle

    def fuse_step(self, state: LMState, tokens: int = 1) -> Callable[[Tensor], Tensor | None]:
        """Return the function of embeddings (B, D) and `state` that `ssm_kernels.modules.fuse_step` makes.

        Args:
            state: from `new_state`; the function updates it in place.
            tokens: see there.

        Raises:
            ValueError: there is an obstacle to fusing.
        """
        layers = [(x.norm, x.mixer) for x in self.backbone.layers if isinstance(x.mixer, Mamba | Mamba2)]
        states = [x for x in state if isinstance(x, MixerState)]
        return fuse_step(layers, self.backbone.norm_f, self.lm_head, states, tokens)

    @classmethod
    def open_checkpoint(cls, folder: Path, **hub: Any) -> tuple[LMConfig, Weights]:
        """Open a checkpoint in any format that this class reads.

        Args:
            folder, hub: see `HubModel.open_checkpoint`.

        Returns:
            The config, and the weights under the names of this class, unread.
        """
        return open_language_model(folder)

    def save_extras(self, folder: Path) -> None:
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    def load_extras(self, folder: Path, **hub: Any) -> None:
        if (folder / TOKENIZER).exists():
            self.tokenizer = Tokenizer.from_file(folder / TOKENIZER)
        # Their repositories have no tokenizer.
        elif detect_format(folder) == "state-spaces" and self.config.vocab_size == NEOX_VOCABULARY:
            self.tokenizer = neox_tokenizer(**hub)
        elif detect_format(folder) != "own":
            logger.warning("no tokenizer: %s has no %s", folder, TOKENIZER)

    def generate(
        self,
        prompts: Sequence[str],
        config: GenerationConfig | None = None,
        *,
        draft_model: MambaLM | None = None,
        draft_stats: DraftStats | None = None,
    ) -> list[str]:
        """Continue several texts in one batch. Each continuation is the one that its text would get alone.

        Args:
            prompts: texts.
            config: generation settings; greedy by default.
            draft_model: smaller model with the same tokenizer, which proposes `config.draft_tokens` tokens a step; the
                distribution of the result stays the same (arXiv 2211.17192).
            draft_stats: takes the counts of proposed and accepted tokens.

        Returns:
            The continuations.

        Raises:
            ValueError: the model has no tokenizer, or `draft_model` does not fit.
        """
        # A string is a sequence of strings, and would be read as one prompt per character.
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, got the text {prompts!r}")
        *_, completions = generate_texts(self, prompts, config, draft_model, draft_stats)
        return [c.text for c in completions]

    def stream(
        self,
        prompt: str,
        config: GenerationConfig | None = None,
        *,
        draft_model: MambaLM | None = None,
        draft_stats: DraftStats | None = None,
    ) -> Iterator[str]:
        """Continue one text, yielding new text as it is generated.

        Args:
            prompt: the text.
            config: generation settings; greedy by default.
            draft_model, draft_stats: as in `generate`.

        Yields:
            Parts of the continuation.
        """
        return stream_text(generate_texts(self, [prompt], config, draft_model, draft_stats))


def neox_tokenizer(**hub: Any) -> Tokenizer | None:
    """Load GPT-NeoX's tokenizer, which `state-spaces/*` and their descendants use.

    Args:
        hub: as for `hub.fetch`.

    Returns:
        The tokenizer, or None with a warning where it is not available.
    """
    try:
        folder = fetch(NEOX, [TOKENIZER], **hub | {"revision": None, "force_download": False})
        return Tokenizer.from_file(folder / TOKENIZER)
    except OSError as e:
        logger.warning("no tokenizer: that of %s could not be had (%s)", NEOX, e)
        return None


class _Backbone(nn.Module):
    """Embedding, layers and final norm. Layers may be on different devices."""

    layers: Sequence[_Layer]

    def __init__(self, config: LMConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layer))
        self.layers = layers  # pyright: ignore[reportAttributeAccessIssue]  ModuleList is not generic in torch's stubs
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        hidden: Tensor,
        state: LMState | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
        slots: StateSlots | None = None,
    ) -> tuple[Tensor, LMState | None]:
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"state must have an entry for each of {len(self.layers)} layers, got {len(state)}")
        residual, final = None, []
        for i, layer in enumerate(self.layers):
            device = layer.norm.weight.device
            hidden, residual, cu_seqlens = hidden.to(device), _to(device, residual), _to(device, cu_seqlens)
            # Both (B, L, D). The next layer's norm adds them in one kernel.
            start = None if state is None else state[i]
            hidden, residual, end = layer(hidden, residual, start, cu_seqlens, return_state, slots)
            final.append(end)
        device = self.norm_f.weight.device
        hidden, residual = hidden.to(device), _to(device, residual)
        hidden = _add_norm(self.norm_f, hidden, residual, self.residual_in_fp32)[0]  # (B, L, D)
        return hidden, final if return_state else None


def _add_norm(norm: RMSNorm, hidden: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Return norm(hidden + residual) and hidden + residual, (B, L, D) each."""
    # A float64 model keeps a float64 residual.
    dtype = torch.promote_types(hidden.dtype, torch.float32) if residual_in_fp32 else None
    if not is_plain(norm, RMSNorm):  # an adapter or hooks, which the fused op would bypass
        total = hidden if residual is None else residual + hidden
        total = total.to(dtype or (hidden if residual is None else residual).dtype)
        return norm(total).to(hidden.dtype), total
    return add_rms_norm(hidden, norm.weight, residual, eps=norm.eps, residual_dtype=dtype)


def _to(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


class _Layer(nn.Module):
    """Pre-norm residual block: mixer(norm(hidden + residual)) and the new residual, which are added by the next one."""

    one_device = True

    def __init__(self, config: LMConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = make_mixer(config)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
        slots: StateSlots | None = None,
    ) -> tuple[Tensor, Tensor, LayerState | None]:
        normed, residual = _add_norm(self.norm, hidden, residual, self.residual_in_fp32)  # (B, L, D) each
        if slots is not None:
            return self.mixer(normed, state, cu_seqlens, slots=slots), residual, None
        if not return_state:
            return self.mixer(normed, state, cu_seqlens), residual, None
        y, final = self.mixer(normed, state, cu_seqlens, return_state=True)
        return y, residual, final


def make_mixer(config: LMConfig) -> Mamba | Mamba2 | Mamba3:
    """Build the mixer of one layer."""
    if config.layer == "mamba":
        return Mamba(
            config.d_model,
            config.d_state,
            config.d_conv,
            config.expand,
            "auto" if config.dt_rank is None else config.dt_rank,
            conv_bias=config.conv_bias,
            bias=config.bias,
            dt_bc_norm_eps=config.dt_bc_norm_eps,
        )
    if config.layer == "mamba3":
        return Mamba3(
            config.d_model,
            config.d_state,
            config.expand,
            config.headdim,
            config.ngroups,
            config.rope_fraction,
            A_floor=config.A_floor,
            is_outproj_norm=config.is_outproj_norm,
            is_mimo=config.mimo_rank is not None,
            mimo_rank=config.mimo_rank or 1,
            chunk_size=config.chunk_size,
            norm_eps=config.norm_eps,
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


def _init_weights(module: nn.Module, n_layer: int) -> None:
    """Initialize embeddings as GPT-2 does, and scale output projections down with depth: each adds to the residual."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, Mamba | Mamba2 | Mamba3):
        nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
        with torch.no_grad():
            module.out_proj.weight /= math.sqrt(n_layer)
