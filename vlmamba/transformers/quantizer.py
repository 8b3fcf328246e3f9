"""Quantized folders in `transformers`: their layers are put into a model before its weights are loaded."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ssm_kernels.modules import QuantizedMatrix

from ..model.quantize import check_devices, replace_matrices, stored_bits
from ..model.transformers_files import QUANT_METHOD
from ..model.weights import open_weights


@register_quantization_config(QUANT_METHOD)
class VLMambaQuantizationConfig(QuantizationConfigMixin):
    """The mark of a quantized folder in its `config.json`. The files themselves say which matrices have which bits."""

    def __init__(self, **kwargs: Any):
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]  a name that is registered


@register_quantizer(QUANT_METHOD)
class VLMambaQuantizer(HfQuantizer):
    """Loads the integers and scales of a quantized folder. Nothing is quantized here: `vlmamba convert --quantize`."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize weights in floating point.

        Raises:
            ValueError: the folder's weights are not quantized.
        """
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config is for folders that are quantized already: "
                "vlmamba convert FOLDER LEAN_FOLDER --to own --quantize int4"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        bits: dict[str, int] = {}
        for path in checkpoint_files or ():
            bits |= stored_bits(open_weights(path))
        replace_matrices(model, bits)
        # The two tensors of a tied matrix are tied by their own names.
        if model.config.tie_word_embeddings:
            tied = {
                target.removesuffix("weight") + part: source.removesuffix("weight") + part
                for target, source in type(model)._tied_weights_keys.items()
                for part in ("qdata", "scale")
            }
            model._tied_weights_keys = model.all_tied_weights_keys = tied

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        matrices = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedMatrix)}
        for matrix in matrices.values():
            for p in (matrix.qdata, matrix.scale):
                p.requires_grad_(False)
        check_devices(model, {name: matrix.qdata.device for name, matrix in matrices.items()})

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes the integers: always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the weights: gradients pass the layers."""
        return True
