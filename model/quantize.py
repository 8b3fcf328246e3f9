"""Weight-only quantization: the matrices of language model and encoders in integers of 8 or 4 bits, by `torchao`.

`torchao` chooses scales and integers; the layers that compute with them are those of `ssm_kernels.modules`, so that a
quantized model is loaded without it. Norms, convolutions, A, D, the projection of dt, position tables, connectors and
states stay in floating point.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ssm_kernels.modules import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from ssm_kernels.modules.quantized import GROUP, OFFSET

from .extras import NOISY_LOGGERS, install_command
from .weights import DeviceMap, LazyTensor, Weights, devices_of

logger = logging.getLogger("vlmamba.model")

Quantization = Literal["int8", "int4"]
"""`"int8"` has a scale for each row of a matrix, `"int4"` one for each 32 weights of a row."""
_QDATA, _SCALE, _WEIGHT = ".qdata", ".scale", ".weight"
_BITS: dict[torch.dtype, int] = {torch.int8: 8, torch.uint8: 4}


def check_quantization(quantize: Quantization | None) -> None:
    """Check a quantization before anything is loaded.

    Raises:
        ValueError: it is not one of `Quantization`.
        ModuleNotFoundError: `torchao` is not installed.
    """
    if quantize is None:
        return
    # Before the import, which takes seconds.
    if quantize not in get_args(Quantization):
        raise ValueError(f"quantize must be one of {', '.join(map(repr, get_args(Quantization)))}; got {quantize!r}")
    _torchao()


def choose_bits(
    model: nn.Module, least: Mapping[str, int], quantize: Quantization, weights: Mapping[str, Any], source: str
) -> dict[str, int]:
    """Choose the bits of each matrix that is to be quantized.

    Args:
        model: may be on the meta device.
        least: names of modules to quantize, each with the least bits that it may have; see `HubModel.quantizable`.
        quantize: bits of most of them. A matrix whose rows 4 bits cannot divide into groups has 8.
        weights: of the model, which are not read.
        source: origin of the weights, for messages.

    Returns:
        Names of modules to bits.

    Raises:
        ValueError: the weights are quantized already.
    """
    # Integers of integers would add their errors.
    if stored_bits(weights):
        raise ValueError(
            f"{source} is quantized already: load it without `quantize`, or quantize the model that it was made from"
        )
    wanted: int = 4 if quantize == "int4" else 8
    bits: dict[str, int] = {name: max(wanted, fewest) for name, fewest in least.items()}
    # in_features of a linear layer, embedding_dim of an embedding
    odd = [name for name, n in bits.items() if n == 4 and _shape(model.get_submodule(name))[1] % GROUP]
    if odd:
        logger.warning("%d matrices have rows that groups of %d do not divide, and 8 bits: %s", len(odd), GROUP, odd)
    return bits | dict.fromkeys(odd, 8)


def stored_bits(weights: Mapping[str, Any]) -> dict[str, int]:
    """Return the names of quantized modules, and their bits, from the names and dtypes of weights; none is read."""
    dtypes = weights.dtypes if isinstance(weights, Weights) else {n: t.dtype for n, t in weights.items()}
    return {n.removesuffix(_QDATA): _BITS[d] for n, d in dtypes.items() if n.endswith(_QDATA) and d in _BITS}


def check_devices(model: nn.Module, device_map: DeviceMap) -> None:
    """Check that quantized matrices can be on their devices, and warn, once a device, where they only save memory.

    Args:
        model: with its quantized layers; may be on the meta device.
        device_map: placement of its weights.

    Raises:
        ValueError: a device cannot hold integers of so many bits, or make weights from them; or as `devices_of`.
    """
    bits = {name: m.bits for name, m in model.named_modules() if isinstance(m, QuantizedMatrix)}
    places = devices_of(device_map, [name + _QDATA for name in bits])
    for device, n in dict.fromkeys((places[name + _QDATA], n) for name, n in bits.items()):
        # By doing it with one row, since a device may lack a dtype or an operation on it.
        try:
            with torch.device(device):
                QuantizedLinear(GROUP, 1, n).product(torch.zeros(1, GROUP, dtype=torch.bfloat16))
        except (RuntimeError, TypeError, AssertionError) as e:
            reason = str(e).strip().split("\n")[0]
            raise ValueError(f"device {device} cannot run weights of {n} bits: {reason}") from e
        # A CPU has the kernel of `fuse_step`, and on meta nothing is computed.
        if device.type not in ("cpu", "meta"):
            _warn_of_time(device)


@functools.cache
def _warn_of_time(device: torch.device) -> None:
    logger.warning(
        "quantized weights on %s save memory, not time: a layer makes floating-point weights of its integers at each "
        "call, since no kernel multiplies the integers there",
        device,
    )


def replace_matrices(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Replace modules by quantized ones of the same sizes, in place, without values. Tied ones stay tied.

    Args:
        model: may be on the meta device.
        bits: names of linear layers and embeddings to bits. Others are left alone.
    """
    made: dict[int, QuantizedMatrix] = {}
    plain = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    # By the weight, of which weights have one name where two layers share it. `load_into` names what no layer has.
    bits_of = {id(plain[name].weight): n for name, n in bits.items() if name in plain}
    for name, old in plain.items():
        n = bits_of.get(id(old.weight))
        if n is None:
            continue
        owner, _, attribute = name.rpartition(".")
        rows, columns = _shape(old)
        # On the device of the weight that it replaces, which may be meta.
        with torch.device(old.weight.device):
            if isinstance(old, nn.Linear):
                new = QuantizedLinear(columns, rows, n, old.bias is not None)
                if old.bias is not None:
                    new.bias = old.bias
            else:
                new = QuantizedEmbedding(rows, columns, n)
        # The integers of a tied matrix are there once.
        tied = made.setdefault(id(old.weight), new)
        new.qdata, new.scale = tied.qdata, tied.scale
        setattr(model.get_submodule(owner), attribute, new)


def quantized_weights(weights: Weights, bits: Mapping[str, int]) -> Weights:
    """Quantize weights when they are read, one matrix at a time.

    Args:
        weights: in floating point.
        bits: names of modules to bits.

    Returns:
        The weights, with two tensors in the place of each matrix.
    """
    tensors: dict[str, LazyTensor] = {}
    # Both tensors of a matrix are read one after the other, and made at once.
    make = functools.lru_cache(maxsize=1)(lambda name: quantize_matrix(weights[name + _WEIGHT], bits[name]))
    for name in weights:
        module = name.removesuffix(_WEIGHT)
        if not (name.endswith(_WEIGHT) and module in bits):
            tensors[name] = weights.lazy(name)
            continue
        rows, columns = weights.shapes[name]
        # Shapes and dtypes are known before a value is read.
        with torch.device("meta"):
            like = QuantizedMatrix(rows, columns, bits[module])
        for part, (end, tensor) in enumerate(((_QDATA, like.qdata), (_SCALE, like.scale))):
            tensors[module + end] = LazyTensor(
                tensor.shape, tensor.dtype, lambda module=module, part=part: make(module)[part]
            )
    return Weights(tensors)


def quantize_matrix(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize a matrix, symmetrically around zero.

    Args:
        weight: (rows, columns).
        bits: 8 bits take the largest of a row as 127. 4 bits take the scale of a group that half-quadratic quantization
            (HQQ) finds, whose error is smaller: 0.078 against 0.085 of the norm on trained projections.

    Returns:
        `qdata` and `scale` of a `QuantizedMatrix`.

    Raises:
        ValueError: the weight is not finite.
    """
    torchao = _torchao()
    if not weight.isfinite().all():
        raise ValueError(
            f"a matrix of shape {tuple(weight.shape)} has values that are not finite: nothing is quantized"
        )
    # Scales for the weights in float32, whatever their dtype is.
    make = functools.partial(
        torchao.IntxUnpackedToInt8Tensor.from_hp,
        weight.detach().float(),
        (1, weight.shape[1] if bits == 8 else GROUP),
        getattr(torch, f"int{bits}"),
    )
    scale = make(intx_choose_qparams_algorithm="affine" if bits == 8 else "hqq_scale_only").scale.to(torch.bfloat16)
    # Integers are those for the scales as they are stored, rounded.
    zero = torch.zeros_like(scale, dtype=torch.int8)
    integers = make(intx_choose_qparams_algorithm=None, custom_scale=scale.float(), custom_zero_point=zero).qdata
    return (integers if bits == 8 else pack_halves(integers)), scale


def pack_halves(integers: Tensor) -> Tensor:
    """Pack integers in [-8, 7], two a byte, in the order of `QuantizedMatrix`.

    Args:
        integers: (rows, columns), int8.

    Returns:
        (rows, columns / 2), uint8.
    """
    groups = (integers + OFFSET).to(torch.uint8).unflatten(-1, (-1, 2, GROUP // 2))  # (rows, groups, 2, 16)
    return (groups[:, :, 0] | groups[:, :, 1] << 4).flatten(1)


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace quantized layers by those of floating point with the same values, in place. Tied ones stay tied.

    Args:
        model: of any class.
        dtype: of the matrices; by default that of the first parameter in floating point besides scales, as norms are.
    """
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedMatrix)}
    # Scales are bfloat16 in any model: they say nothing about its dtype.
    if dtype is None and quantized:
        inside = {id(p) for m in quantized.values() for p in (m.qdata, m.scale)}
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in inside)
    made: dict[int, nn.Parameter] = {}
    for name, old in quantized.items():
        assert dtype is not None
        # Tied layers share one parameter again.
        weight = made.get(id(old.qdata))
        if weight is None:
            weight = made[id(old.qdata)] = nn.Parameter(old.dequantize(dtype))
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, floating_layer(old, weight))


def floating_layer(layer: QuantizedMatrix, weight: nn.Parameter) -> nn.Linear | nn.Embedding:
    """Return the layer that computes with another weight, and the same bias, as a quantized one does.

    Args:
        layer: a `QuantizedLinear` or `QuantizedEmbedding`.
        weight: (rows, columns).
    """
    # Without memory for a weight that is replaced at once.
    with torch.device("meta"):
        if isinstance(layer, QuantizedLinear):
            new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            new.register_parameter("bias", layer.bias)
        else:
            new = nn.Embedding(layer.rows, layer.columns)
    new.weight = weight
    return new


def count_weights(model: nn.Module) -> dict[int, int]:
    """Return the number of weights that each parameter of a quantized matrix holds, by its id."""
    # All weights are counted under the integers.
    matrices = [m for m in model.modules() if isinstance(m, QuantizedMatrix)]
    return {id(m.scale): 0 for m in matrices} | {id(m.qdata): m.rows * m.columns for m in matrices}


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has a quantized matrix."""
    return any(isinstance(m, QuantizedMatrix) for m in model.modules())


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear | nn.Embedding)
    rows, columns = module.weight.shape
    return rows, columns


@functools.cache
def _torchao() -> Any:
    """Import `torchao`, without the warnings of `NOISY_LOGGERS`."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        import torchao.quantization
    except ImportError as e:
        raise ModuleNotFoundError(
            f"quantizing a model needs the torchao package, which cannot be imported ({e}): "
            + install_command("quantize")
        ) from e
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)
    return torchao.quantization
