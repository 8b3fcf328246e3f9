"""This library's models as models of `transformers`.

Letters: B sequences, L columns of a padded batch, K columns with logits, T tokens of all sequences, D width of the
language model, V rows of its embedding, E encoders.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssm_kernels import states

from ..model.batch import Batch
from ..model.generation.interface import LMState
from ..model.lm import MambaLM
from ..model.prompt import IGNORE, IMAGE_TOKEN
from ..model.tiles import TileGrid
from ..model.transformers_files import write_code
from ..model.vlm import VLM
from ..model.weights import ALWAYS_FLOAT32
from .configs import MambaLMConfig, VLMambaConfig

_MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")


class RecurrentCache:
    """State of the sequences of a batch, for `generate`: one size at any length.

    Args:
        state: from `MambaLM.new_state`.
    """

    is_compileable = False
    # As of keys and values: `generate` leaves out the columns that were run.
    is_linear = (False,)

    def __init__(self, state: LMState):
        self.state = state
        self.length = 0
        """Columns of the batch that were run."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns that were run."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with these rows, as a search over beams does."""
        self.state = states.select(self.state, beam_idx)


class _Model(PreTrainedModel, GenerationMixin):
    """Common part of both models. Parameters have the names that they have in the model that is held."""

    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ["_Layer"]
    _keep_in_fp32_modules_strict = [f"^{ALWAYS_FLOAT32.pattern}$"]

    def _hold(self, name: str, model: nn.Module) -> None:
        """Set an attribute to a model of this library, whose children become this one's."""
        self.__dict__[name] = model
        # One dictionary for both: an adapter that replaces a child replaces it in both.
        self._modules = model._modules
        self.post_init()

    @property
    def _lm(self) -> MambaLM:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model. Scales of quantized weights, which are first, are bfloat16 in any model."""
        return self._lm.backbone.norm_f.weight.dtype

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does, but strictly.

        Args:
            args, output_loading_info, kwargs: as there.

        Returns:
            The model, in evaluation mode; with `output_loading_info`, it and a dictionary.

        Raises:
            ValueError: weights are missing, unexpected, or of another shape; or they are quantized, and the config
                does not say so.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        problems = [f"{kind.removesuffix('_keys')}: {key}" for kind in _MISFITS for key in sorted(map(str, info[kind]))]
        if any(key.endswith(".qdata") for key in info["unexpected_keys"]):
            problems.insert(
                0,
                "matrices are quantized, but config.json has no quantization_config: "
                f"vlmamba convert {model.name_or_path} NEW_FOLDER --to own writes it",
            )
        if problems:
            raise ValueError(f"{model.name_or_path} does not fit {cls.__name__}:\n  " + "\n  ".join(problems))
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save a model as `PreTrainedModel.save_pretrained` does. `vlmamba.model.load_model` reads it too.

        Args:
            save_directory, is_main_process, kwargs: as there.
        """
        # First, so that it is uploaded with the rest.
        if is_main_process:
            write_code(Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: a saved folder names this package, and has no copy of its code."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a RecurrentCache

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as the constructors of this library's modules drew them."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self._lm.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self._lm.backbone.embedding = value  # pyright: ignore[reportAttributeAccessIssue]  an adapter, perhaps

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self._lm.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self._lm.lm_head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]  an adapter, perhaps

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the number of tokens is a part of the architecture.

        Raises:
            ValueError: always.
        """
        raise ValueError("the vocabulary cannot be resized: make a model with another vocab_size in its config")

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # Padding rows of the embedding, and the place of an image, are never chosen.
        padding = list(range(self.config.vocab_size, self._n_logits))
        if padding:
            processors.insert(0, SuppressTokensLogitsProcessor(padding, device=str(self._lm.device)))
        return processors

    @property
    def _n_logits(self) -> int:
        return self._lm.config.padded_vocab_size

    def _predict(
        self,
        packed: Tensor | None,
        mask: Tensor | None,
        tokens: dict[str, Any],
        cache: RecurrentCache | None,
        labels: Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        return_dict: bool | None,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast | tuple:
        """Run the language model.

        Args:
            packed: (1, T, D) embeddings of the tokens that `mask` (B, L) keeps; or None, where nothing is padded.
            mask: (B, L), or None.
            tokens: `input_ids` (B, L) or `inputs_embeds` (B, L, D), which are run if there is no `packed`.
            cache: state before the first column; updated.
            labels, use_cache, logits_to_keep, return_dict, kwargs: of `forward`.
        """
        for name, value in kwargs.items():
            # `generate` hands on the tokenizer of its stop strings.
            if name not in ("num_items_in_batch", "tokenizer") and value is not None and value is not False:
                raise ValueError(f"{name} is not supported by {type(self).__name__}, got {value!r:.60}")
        lm = self._lm
        like = mask if mask is not None else next(t for t in tokens.values() if t is not None)
        n_sequences, length = like.shape[:2]
        if use_cache is None:
            use_cache = cache is not None
        if use_cache and mask is not None and not mask[:, -1].all():
            raise ValueError(
                "sequences with use_cache must be padded on the left, as with padding_side='left' of the tokenizer; "
                "attention_mask ends with padding"
            )
        if use_cache and cache is None:
            cache = RecurrentCache(lm.new_state(n_sequences))
        options: dict[str, Any] = {"state": None if cache is None else cache.state}
        # In place where there are no gradients, else a new state with them.
        options["return_state"] = cache is not None and (not use_cache or torch.is_grad_enabled())
        every = torch.arange(length, device=like.device)
        columns = every[-logits_to_keep:] if isinstance(logits_to_keep, int) else every[logits_to_keep]  # (K,)
        if packed is None or mask is None:
            at = columns if len(columns) < length else None
            out = lm(**tokens, logits_at=at, **options)
            logits = out.logits  # (B, K, V)
        else:
            lengths = mask.sum(1).tolist()
            options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            kept = mask[:, columns]  # (B, K)
            at = (mask.flatten().cumsum(0).view_as(mask) - 1)[:, columns][kept]  # (tokens with logits,)
            out = lm(inputs_embeds=packed, logits_at=at, **options)
            if kept.all():
                logits = out.logits.view(n_sequences, len(columns), -1)  # (B, K, V)
            else:
                logits = out.logits.new_zeros(n_sequences, len(columns), out.logits.shape[-1])
                logits = logits.masked_scatter(kept.unsqueeze(-1), out.logits)  # (B, K, V)
        if cache is not None and use_cache:
            cache.length += length
            if out.state is not None:
                cache.state = out.state
        loss = None
        if labels is not None:
            # Padding is no target, and nothing predicts the first token of a sequence.
            if mask is not None:
                labels = labels.masked_fill(~(mask & F.pad(mask[:, :-1], (1, 0))), IGNORE)
            scale = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **scale)
        if (n_more := self._n_logits - logits.shape[-1]) > 0:
            logits = F.pad(logits, (0, n_more), value=-torch.inf)
        # The third is `past_key_values`, which release 5.24 renamed to `cache`.
        result = CausalLMOutputWithPast(loss, logits, cache if use_cache else None)  # pyright: ignore[reportArgumentType]
        return result if return_dict is not False else result.to_tuple()


def _read_mask(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return the mask (B, L) of a call's columns, True at tokens."""
    if attention_mask is None:
        return None
    # After the first call of a generation, the mask covers the columns before, too.
    if attention_mask.dim() != 2 or len(attention_mask) != shape[0] or attention_mask.shape[1] < shape[1]:
        raise ValueError(
            f"attention_mask must have shape {tuple(shape)}, or more columns for those before, got "
            f"{tuple(attention_mask.shape)}"
        )
    return attention_mask[:, -shape[1] :].bool()


class MambaLMForCausalLM(_Model):
    """A `MambaLM`, which is its attribute `lm`.

    Args:
        config: architecture.
    """

    config_class = MambaLMConfig
    config: MambaLMConfig
    lm: MambaLM
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}

    def __init__(self, config: MambaLMConfig):
        super().__init__(config)
        self._hold("lm", MambaLM(config.own))

    @property
    def _lm(self) -> MambaLM:
        return self.lm

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L) tokens; or `inputs_embeds` (B, L, D) in their place.
            attention_mask: (B, L), 0 at padding. Padding is left out: results are those of each sequence alone.
            inputs_embeds: (B, L, D) embeddings.
            cache: state of the sequences before, updated. Releases before 5.24 call it `past_key_values`.
            labels: (B, L) tokens, `-100` where there is no target; the label of a position is its own token.
            use_cache: return the state.
            logits_to_keep: number of last columns with logits, or indices (K,); 0 is all.
            return_dict: False returns a tuple.
            past_key_values: another name of `cache`.
            kwargs: `num_items_in_batch`, by which the sum of the loss is divided; nothing else is supported.

        Returns:
            `loss`, with `labels`; `logits` (B, K, V), zeros at padding; and with `use_cache` the `RecurrentCache`.

        Raises:
            ValueError: an argument that is not supported, padding on the right with `use_cache`, or as
                `MambaLM.forward`.
        """
        tokens: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        mask = packed = None
        cache = past_key_values if cache is None else cache
        # A decoding step has no padding.
        if cache is None or given.shape[1] > 1:
            mask = _read_mask(attention_mask, given.shape[:2])
        if mask is not None:
            packed = (self._lm.embed(given[mask]) if inputs_embeds is None else given[mask]).unsqueeze(0)  # (1, T, D)
        return self._predict(packed, mask, tokens, cache, labels, use_cache, logits_to_keep, return_dict, kwargs)


class VLMambaForConditionalGeneration(_Model):
    """A `VLM`, which is its attribute `vlm`.

    Args:
        config: architecture.
    """

    config_class = VLMambaConfig
    config: VLMambaConfig
    vlm: VLM
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.backbone.embedding.weight"}

    def __init__(self, config: VLMambaConfig):
        super().__init__(config)
        self._hold("vlm", VLM(config.own))

    @property
    def _lm(self) -> MambaLM:
        return self.vlm.language_model

    @property
    def _n_logits(self) -> int:
        # One column more where no padding row has the number of the place of an image.
        return max(self._lm.config.padded_vocab_size, self.config.image_token_id + 1)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_layouts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L) tokens; `config.image_token_id` at the positions of image features.
            pixel_values: (B, views, 3 E, height, width) from the processor; None without images.
            image_layouts: (B, images, 7) from the processor.
            attention_mask, cache, labels, use_cache, logits_to_keep, return_dict, past_key_values, kwargs: as of
                `MambaLMForCausalLM`.

        Returns:
            `loss`, with `labels`; `logits` (B, K, V), zeros at padding; and with `use_cache` the `RecurrentCache`.

        Raises:
            ValueError: see `MambaLMForCausalLM`; or the numbers of image features and of their positions differ.
        """
        tokens = {"input_ids": input_ids}
        mask = packed = None
        cache = past_key_values if cache is None else cache
        # A decoding step has neither padding nor images.
        if cache is None or input_ids.shape[1] > 1:
            mask = _read_mask(attention_mask, input_ids.shape)
            if mask is None:
                mask = torch.ones_like(input_ids, dtype=torch.bool)
            ids = input_ids[mask]  # (T,)
            ids = ids.masked_fill(ids == self.config.image_token_id, IMAGE_TOKEN)
            images, layouts = self._unpack(pixel_values, image_layouts)
            bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
            packed = self.vlm.embed(Batch(ids, ids, bounds, images, layouts))  # (1, T, D)
        return self._predict(packed, mask, tokens, cache, labels, use_cache, logits_to_keep, return_dict, kwargs)

    def _unpack(
        self, pixel_values: Tensor | None, image_layouts: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[tuple[int, TileGrid | None], ...]]:
        """Return the views of all images, (views, 3, height, width) for each encoder, and the images' layouts."""
        if pixel_values is None:
            return (), ()
        if image_layouts is None:
            raise ValueError("pixel_values needs image_layouts: the processor returns both")
        n_views = image_layouts[..., 0].sum(1).to(pixel_values.device)  # (B,)
        there = torch.arange(pixel_values.shape[1], device=pixel_values.device) < n_views[:, None]  # (B, views)
        views = pixel_values[there]  # (views, 3 E, height, width)
        encoder = next(self.vlm.vision.parameters())
        images = tuple(
            views[:, 3 * i : 3 * i + 3, : v.encoder.image_size, : v.encoder.image_size].to(encoder)
            for i, v in enumerate(self.vlm.config.vision)
        )
        # A row of zeros is no image.
        rows = [row for row in image_layouts.flatten(0, 1).tolist() if row[0]]
        return images, tuple((row[0], TileGrid(*row[1:]) if row[1] else None) for row in rows)
