"""`mamba_ssm.models.mixer_seq_simple` and `config_mamba`: the language model on Mamba and attention layers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ssm_kernels.compat.mamba_ssm import MHA, Block, GatedMLP, InferenceParams, Mamba, Mamba2, Mamba3
from ssm_kernels.compat.mamba_ssm.layer_norm import RMSNorm
from ssm_kernels.compat.mamba_ssm.modules import add_norm

from ..files import writing_atomic
from ..formats import detect_format, read_json
from ..formats.language import EMBEDDING, GENERIC, LM_HEAD, open_language_model, to_state_spaces
from ..hub import CONFIG, fetch_model
from ..weights import Weights, check_fit, open_weights
from .generation import GenerationMixin

M = TypeVar("M", bound="MambaLMHeadModel")


@dataclass
class MambaConfig:
    """Settings of a `MambaLMHeadModel`, with the keys of its `config.json`."""

    d_model: int = 2560
    d_intermediate: int = 0
    """Width of a gated MLP after each mixer, rounded up to 128s; 0 is none."""
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    """`layer`, `"Mamba1"` (by default), `"Mamba2"` or `"Mamba3"`, and arguments of that mixer."""
    attn_layer_idx: list[int] = field(default_factory=list)
    """Layers that are attention."""
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    """Arguments of `MHA`."""
    rms_norm: bool = True
    """RMS norm; otherwise layer norm."""
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class CausalLMOutput(NamedTuple):
    """Result of the forward pass."""

    logits: Tensor
    """(B, L, V) in the dtype of the head; V is the vocabulary rounded up."""


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """Language model of Mamba, Mamba-2, Mamba-3 and attention layers.

    Args:
        config: settings.
        initializer_cfg: arguments of `_init_weights`, such as `initializer_range`.
        device, dtype: of the parameters. `A_log` and `D` of the mixers are float32 whatever `dtype` is.

    >>> model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=2, vocab_size=100, ssm_cfg={"layer": "Mamba2"}))
    >>> model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_length=8).shape
    torch.Size([1, 8])
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        # Padding rows make the head's matrix product faster; sampling cuts them by `vocab_size`.
        rows = math.ceil(config.vocab_size / config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            rows,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out decoding caches and compiled code, which belong to this object only."""
        # Neither can be pickled or copied.
        own = ("_decoding_cache", "_compiled_call_impl")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def tie_weights(self) -> None:
        """Share the embedding's weight with the head, if the config ties them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L).
            position_ids: not used, as in the original.
            inference_params: see `InferenceParams`; the mixers' caches are filled and updated in place.
            num_last_tokens: number of last positions whose logits are wanted; 0 for all.
            mixer_kwargs: for every mixer, such as `seq_idx` and `cu_seqlens` of Mamba-2. A mixer that does not know one
                raises an error.

        Returns:
            Logits (B, L or num_last_tokens, V).
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)  # (B, L, D)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]  # (B, num_last_tokens, D)
        return CausalLMOutput(self.lm_head(hidden))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor | None, ...]]:
        """Return the empty caches of each layer, for `InferenceParams.key_value_memory_dict`."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> M:
        """Load a model from a folder or the Hub.

        Args:
            pretrained_model_name: a folder, or a repository such as `"state-spaces/mamba2attn-2.7b"`; in `mamba_ssm`'s
                layout, or any that `MambaLM` reads.
            device, dtype: of the parameters; PyTorch's defaults by default, whatever the file's dtype is.
            revision, cache_dir, token, force_download, local_files_only: see `hub.fetch`.
            kwargs: for the constructor.

        Returns:
            The model, in training mode.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see `hub.fetch`.
            ValueError: a file is damaged, a setting is not known, or weights and config do not agree.
        """
        folder = fetch_model(
            pretrained_model_name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        config, weights = _open(folder)
        model = cls(config, device=device, dtype=dtype, **kwargs)
        _copy_into(model, weights, str(folder))
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` and `pytorch_model.bin`, as `mamba_ssm` reads them; each is replaced atomically."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with writing_atomic(folder / "pytorch_model.bin") as partial_file:
            torch.save(self.state_dict(), partial_file)
        with writing_atomic(folder / CONFIG) as partial_file:
            partial_file.write_text(json.dumps(vars(self.config), indent=4) + "\n", encoding="utf-8")


class MixerModel(nn.Module):
    """Language model without its head. Arguments are settings of `MambaConfig`; `vocab_size` counts padding rows."""

    layers: Sequence[Block]

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        # Layers beyond the last one would be ignored without an error.
        outside = [i for i in attn_layer_idx or [] if not 0 <= i < n_layer]
        if outside:
            raise ValueError(f"attn_layer_idx must be in [0, n_layer = {n_layer}), got {outside}")
        self.embedding = nn.Embedding(vocab_size, d_model, **like)
        layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg,
                attn_layer_idx,
                attn_cfg,
                norm_epsilon,
                rms_norm,
                residual_in_fp32,
                fused_add_norm,
                layer_idx,
                **like,
            )
            for layer_idx in range(n_layer)
        )
        self.layers = layers  # pyright: ignore[reportAttributeAccessIssue]  ModuleList is not generic in torch's stubs
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **like)
        # Mixer, and MLP where there is one.
        residuals = 1 if d_intermediate == 0 else 2
        options = {"n_residuals_per_layer": residuals} | (initializer_cfg or {})
        self.apply(partial(_init_weights, n_layer=n_layer, **options))

    def forward(
        self, input_ids: Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs: Any
    ) -> Tensor:
        """Run all layers.

        Args:
            input_ids: (B, L).
            inference_params, mixer_kwargs: see `MambaLMHeadModel.forward`.

        Returns:
            (B, L, D) after the final norm.
        """
        hidden, residual = self.embedding(input_ids), None  # (B, L, D)
        # Pre-norm blocks: the residual is added by the next block's norm.
        for layer in self.layers:
            hidden, residual = layer(
                hidden, residual, inference_params=inference_params, **mixer_kwargs
            )  # (B, L, D) each
        return add_norm(self.norm_f, hidden, residual, self.residual_in_fp32, self.fused_add_norm)[0]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor | None, ...]]:
        """Return the empty caches of each layer."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Build one layer; the arguments are settings of `MambaConfig`.

    Raises:
        ValueError: `ssm_cfg["layer"]` is not a known mixer.
        TypeError: `ssm_cfg` or `attn_cfg` has a name that the mixer does not know.
    """
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    if layer_idx in (attn_layer_idx or []):
        mixer = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **like)
    else:
        # `layer` is removed below; the config keeps it.
        options = copy.deepcopy(ssm_cfg or {})
        kind = options.pop("layer", "Mamba1")
        mixers = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}
        if kind not in list(mixers):
            raise ValueError(f"ssm_cfg: layer must be 'Mamba1', 'Mamba2' or 'Mamba3', got {kind!r}")
        mixer = partial(mixers[kind], layer_idx=layer_idx, **options, **like)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **like)
    # Block adds no MLP for nn.Identity.
    mlp = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **like)
    block = Block(d_model, mixer, mlp, norm, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx  # pyright: ignore[reportArgumentType]  torch's stub takes tensors and modules
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialize embeddings and biases, and scale projections into the residual stream down with depth (as GPT-2 does).

    Args:
        module: a module of the model, from `nn.Module.apply`.
        n_layer: layers of the model.
        initializer_range: standard deviation of embeddings.
        rescale_prenorm_residual: initialize `out_proj.weight` and `fc2.weight` again, divided by the root of their
            number. The original counts the MLPs in the backbone only, and then initializes again without.
        n_residuals_per_layer: projections into the residual stream per layer: 2 with MLPs.

    Biases marked `_no_reinit` (of the step sizes) are left as they are.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    # GPT-2, section 2.3: each projection into the residual stream is scaled by 1 / sqrt(their number).
    if rescale_prenorm_residual:
        for name, p in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                with torch.no_grad():
                    p /= math.sqrt(n_residuals_per_layer * n_layer)


def _open(folder: Path) -> tuple[MambaConfig, Weights]:
    """Return the config of a checkpoint and its weights under the names of the model, unread."""
    if detect_format(folder) != "state-spaces":
        # Any other layout is converted to the settings of `mamba_ssm`.
        other, weights = open_language_model(folder)
        return MambaConfig(**to_state_spaces(other)), weights
    data = {name: value for name, value in read_json(folder / CONFIG).items() if name not in GENERIC}
    known = {f.name for f in fields(MambaConfig)}
    if data.keys() - known:
        raise ValueError(f"{folder / CONFIG} has settings that are not known: {', '.join(sorted(data.keys() - known))}")
    # Old releases of flash-attn saved the frequencies of rotary embeddings, which follow from the config.
    weights = open_weights(folder).renamed(lambda name: None if name.endswith("rotary_emb.inv_freq") else name)
    return MambaConfig(**data), weights


@torch.no_grad()
def _copy_into(model: MambaLMHeadModel, weights: Weights, source: str) -> None:
    # Shapes first, so that a mismatch lists every parameter.
    own, _ = check_fit(model, weights, source)
    if model.config.tie_embeddings and LM_HEAD in weights and EMBEDDING in weights:
        # Loading either one would silently change the model.
        if not torch.equal(weights[LM_HEAD], weights[EMBEDDING]):
            raise ValueError(f"{source}: tie_embeddings is true, but {LM_HEAD} and {EMBEDDING} differ")
    for name, tensor in weights.items():
        own[name].copy_(tensor)
