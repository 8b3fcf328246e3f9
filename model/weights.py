"""Weight files: lazy reading, saving, and loading into a model tensor by tensor."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import write_atomic
from .text_files import read_json

WEIGHTS = "model.safetensors"
INDEX = ".index.json"
SINGLE_FILES = (
    WEIGHTS,
    "consolidated.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
"""Weight files of a folder, in the order of preference; each may be replaced by an index of shards."""

DeviceMap = str | torch.device | Mapping[str, "str | int | torch.device"]
"""A device; `"auto"`, a GPU if there is one; or prefixes of parameter names (complete components) to devices."""

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of a file. Larger weights are saved in several."""

ALWAYS_FLOAT32 = re.compile(
    r"(?:.*\.)?(?:(?:A_logs?|Ds?|dt_bias|dt_projs_bias)(?:_\w+)?|dt_proj\.bias|[BC]_bias|mimo_[xzo])"
)
"""Names of the parameters that are never narrower than float32."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LazyTensor:
    """Tensor whose data is not read yet."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights(Mapping[str, Tensor]):
    """Mapping from names to tensors. `weights[name]` reads one tensor from its file; none is cached.

    A tensor may be a view of the file: copy it before the file changes. Names are in the order of the files, and one
    file is open at a time, so that iterating over all tensors holds one shard.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        self._tensors = dict(tensors)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """Wrap tensors in memory."""
        return cls({name: LazyTensor(t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes, without reading data."""
        return {name: t.shape for name, t in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes, without reading data."""
        return {name: t.dtype for name, t in self._tensors.items()}

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor to be read later, for weights that are derived from others."""
        return self._tensors[name]

    def renamed(self, names: Callable[[str], str | None] | Mapping[str, str | None]) -> Weights:
        """Rename tensors without reading them.

        Args:
            names: from an old name to the new one, or to None to drop the tensor; names that a mapping lacks stay.

        Returns:
            New weights.

        Raises:
            ValueError: two tensors would have the same name.
        """
        if isinstance(names, Mapping):
            # A function decides about every name, a mapping only about those that it has.
            mapping = names
            pairs = [(old, mapping.get(old, old)) for old in self]
        else:
            pairs = [(old, names(old)) for old in self]
        renamed = [(old, new) for old, new in pairs if new is not None]
        # Two names that map to one would silently drop a tensor.
        duplicates = [new for new, n in Counter(new for _, new in renamed).items() if n > 1]
        if duplicates:
            olds = [old for old, new in renamed if new == duplicates[0]]
            raise ValueError(f"{' and '.join(olds)} would both be named {duplicates[0]}")
        return Weights({new: self._tensors[old] for old, new in renamed})


def open_weights(path: str | Path, pick: str | None = None) -> Weights:
    """Open weights without reading them.

    Args:
        path: a `.safetensors` file, a pickle of tensors, or a folder with one of `SINGLE_FILES` or its shards.
        pick: name of the file to open in a folder, if it is none of those or there are several.

    Returns:
        The weights. Names in a pickle of nested dictionaries are joined by dots. Pickles are read with `weights_only`,
        so that none can run code, and memory-mapped as safetensors files are.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a file is damaged, cut short, or holds code; or a shard that the index names is not there. The
            message names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = _find(path, pick)
    elif not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return _open_shards(path) if path.name.endswith(INDEX) else _open_files([path])


def _find(folder: Path, pick: str | None) -> Path:
    names = [pick] if pick else [name for single in SINGLE_FILES for name in (single, single + INDEX)]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(
        f"{folder / pick} does not exist" if pick else f"{folder} has no weights: none of {', '.join(names)}"
    )


def _open_shards(index: Path) -> Weights:
    try:
        shard_of = read_json(index)["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{index} is not an index of shards: {type(e).__name__}: {e}") from e
    # The index is untrusted: a shard must be a file next to it.
    outside = [s for s in shards if not isinstance(s, str) or Path(s).name != s]
    if outside:
        raise ValueError(f"{index} names a shard outside its folder: {outside[0]!r}")
    absent = [s for s in shards if not (index.parent / s).exists()]
    if absent:
        raise ValueError(
            f"{index} names {len(absent)} of {len(shards)} shards that are not there, so the download is incomplete: "
            + ", ".join(absent)
        )
    # Only headers are read here.
    weights = _open_files([index.parent / s for s in shards])
    lost = [f"{name} in {shard}" for name, shard in shard_of.items() if name not in weights]
    if lost:
        raise ValueError(f"{index} names tensors that their shards do not hold:\n  " + "\n  ".join(lost))
    return weights


def _open_files(paths: list[Path]) -> Weights:
    open_file = _OneOpenFile()
    tensors: dict[str, LazyTensor] = {}
    for path in paths:
        for name, (shape, dtype) in _contents(path).items():
            if name in tensors:
                raise ValueError(f"{path} holds {name}, which another shard holds too")
            tensors[name] = LazyTensor(shape, dtype, lambda path=path, name=name: open_file.read(path, name))
    return Weights(tensors)


class _OneOpenFile:
    """Reader that closes a file when another one is read."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.get: Callable[[str], Tensor] | None = None

    def read(self, path: Path, name: str) -> Tensor:
        get = self.get
        if get is None or path != self.path:
            self.path = self.get = get = None  # close the last file before the next one is opened
            get = _safetensors(path).get_tensor if _is_safetensors(path) else _pickled(path, "cpu").__getitem__
            self.path, self.get = path, get
        return get(name)


def _contents(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    # A pickle has no header: it is unpickled onto the meta device.
    if not _is_safetensors(path):
        return {name: (t.shape, t.dtype) for name, t in _pickled(path, "meta").items()}
    file = _safetensors(path)
    # Slices carry shape and dtype without reading data.
    slices = {name: file.get_slice(name) for name in file.keys()}
    unknown = {s.get_dtype() for s in slices.values()} - _DTYPES.keys()
    if unknown:
        raise ValueError(f"{path} holds the dtypes {', '.join(sorted(unknown))}, which are not supported")
    return {name: (torch.Size(s.get_shape()), _DTYPES[s.get_dtype()]) for name, s in slices.items()}


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise _damaged(path, e) from e


def _pickled(path: Path, device: str) -> dict[str, Tensor]:
    with open(path, "rb") as f:
        # The magic number of a zip archive, the pickle format since PyTorch 1.6.
        zipped = f.read(4) == b"PK\x03\x04"
    try:
        # Pickles from before PyTorch 1.6 cannot be mapped.
        data = torch.load(path, map_location=device, weights_only=True, mmap=zipped and device != "meta")
    except Exception as e:  # torch.load raises many kinds for a damaged file
        # PyTorch's wording for a class or function that a pickle calls.
        wanted = re.search(r"[^\n]*\b(?:GLOBAL|[Uu]nsupported (?:class|global))\b[^\n]*", str(e))
        if isinstance(e, pickle.UnpicklingError) and wanted:
            raise ValueError(
                f"{path} is a pickle of more than tensors. Reading it could run code, so it is refused: {wanted[0]}"
            ) from e
        raise _damaged(path, e) from e
    # Other objects, such as step counters, are ignored.
    tensors = dict(_flattened(data, ""))
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors


def _flattened(data: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(data, Tensor):
        yield prefix.removesuffix("."), data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flattened(value, f"{prefix}{key}.")


def _damaged(path: Path, error: Exception) -> ValueError:
    with open(path, "rb") as f:
        # A clone without Git LFS has a text file of some 130 bytes in place of the weights.
        pointer = f.read(32).startswith(b"version https://git-lfs")
    if pointer:
        return ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
    return ValueError(f"{path} is damaged or incomplete ({reason}): delete it and get it again")


def save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `model.safetensors`; or shards and their index, if it would be larger than `MAX_SHARD_SIZE`.

    Args:
        weights: read shard by shard. Tensors must not share memory.
        folder: to write to.

    Raises:
        OSError: a file could not be written.
    """
    shapes, dtypes = _shapes(weights), _dtypes(weights)
    # Meta tensors: the plan of the shards needs no data.
    planned = {name: torch.empty(shapes[name], dtype=dtypes[name], device="meta") for name in weights}
    # The Hub's own splitting, so that shards are named as everywhere else.
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=MAX_SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        save_tensors({name: weights[name].contiguous() for name in names}, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_atomic(folder / (WEIGHTS + INDEX), text)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # also raised for a full disk
        match = re.search(r"os error (\d+)", str(e))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from e


def load_into(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap = "cpu",
) -> None:
    """Load weights into a model, strictly. The model may be on the `meta` device.

    Parameters and buffers are allocated one after the other, directly on their device and in their dtype.

    Args:
        model: its parameters are replaced.
        weights: under the names of the model's state dict. Tied parameters need one name.
        source: origin of the weights, for messages.
        dtype: of floating-point tensors; None keeps the file's. Parameters that a scan is most sensitive to (A_log, D
            and the bias of dt) are at least float32.
        device_map: see `DeviceMap`; the longest matching prefix decides. Tied parameters follow the first of their
            names.

    Raises:
        ValueError: lists every name that is missing, unexpected, of another shape or not a float; or tied parameters
            that differ; or a name that `device_map` does not cover.
    """
    check_placement(dtype, device_map)
    # All mismatches are reported at once, before anything is allocated.
    own, names = check_fit(model, weights, source)
    devices = devices_of(device_map, [same[0] for same in names.values()])
    _check_one_device(model, devices)

    # By the id of the model's own tensor, so that tied parameters are loaded once.
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, tensor in weights.items():
            old = own[name]
            new = torch.empty(
                tensor.shape, dtype=dtype_of(name, tensor.dtype, dtype), device=devices[names[id(old)][0]]
            ).copy_(tensor)
            # The second name of a tied parameter must hold the same values.
            if id(old) not in made:
                made[id(old)] = new
            elif not torch.equal(made[id(old)], new.to(made[id(old)].device)):
                raise ValueError(
                    f"{source} does not fit {type(model).__name__}: {' and '.join(names[id(old)])} are tied in the "
                    "model but differ in the file"
                )
    for key, same in names.items():
        old, new = own[same[0]], made[key]
        if isinstance(old, nn.Parameter):
            # Attributes of parameters are lost with the replaced object.
            marks = vars(old)  # such as `_no_weight_decay`
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            vars(new).update(marks)
        for name in same:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, new)


def check_fit(
    model: nn.Module, weights: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[int, list[str]]]:
    """Compare names, shapes and dtypes of a model and weights, without reading.

    Args:
        model, weights, source: see `load_into`.

    Returns:
        The model's tensors by name, and the names of each by its id.

    Raises:
        ValueError: see `load_into`.
    """
    own = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, old in own.items():
        names.setdefault(id(old), []).append(name)
    shapes, dtypes = _shapes(weights), _dtypes(weights)
    # A tied parameter is missing only if all of its names are.
    problems = [f"missing: {same[0]}" for same in names.values() if not any(name in shapes for name in same)]
    problems += [f"unexpected: {name}" for name in shapes if name not in own]
    known = [name for name in own if name in shapes]
    problems += [
        f"shape of {name}: {tuple(shapes[name])} in the file, {tuple(own[name].shape)} in the model"
        for name in known
        if shapes[name] != own[name].shape
    ]
    problems += [
        f"dtype of {name}: {dtypes[name]} in the file, a {'float' if own[name].is_floating_point() else 'whole number'}"
        " in the model"
        for name in known
        if dtypes[name].is_floating_point != own[name].is_floating_point()
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    return own, names


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return weights.shapes if isinstance(weights, Weights) else {name: t.shape for name, t in weights.items()}


def _dtypes(weights: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return weights.dtypes if isinstance(weights, Weights) else {name: t.dtype for name, t in weights.items()}


def dtype_of(name: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a parameter after loading: the wanted one, but at least float32 where a scan needs it.

    Integers and their scales stay as they are.
    """
    if not stored.is_floating_point or name.endswith(".scale"):
        return stored
    dtype = wanted or stored
    # promote_types keeps float64.
    return torch.promote_types(dtype, torch.float32) if ALWAYS_FLOAT32.fullmatch(name) else dtype


def check_placement(dtype: torch.dtype | None, device_map: DeviceMap) -> None:
    """Check `dtype` and `device_map` before anything is loaded.

    Raises:
        ValueError: `dtype` is not a floating-point dtype, or `device_map` has something that is no device.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating torch.dtype such as torch.bfloat16, or None, got {dtype!r}")
    _by_prefix(device_map)


def _by_prefix(device_map: DeviceMap) -> dict[str, torch.device]:
    if isinstance(device_map, str) and device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    return {prefix: _device(prefix, device) for prefix, device in device_map.items()}


def devices_of(device_map: DeviceMap, names: list[str]) -> dict[str, torch.device]:
    """Return the device of each parameter.

    Args:
        device_map: see `DeviceMap`.
        names: of parameters.

    Raises:
        ValueError: `device_map` does not cover a name, or has something that is no device.
    """
    devices = _by_prefix(device_map)
    placed = {}
    for name in names:
        matching = [p for p in devices if not p or name == p or name.startswith(p + ".")]
        if not matching:
            raise ValueError(f"device_map covers {', '.join(map(repr, devices))}, but not the parameter {name}")
        # The longest prefix is the most specific one.
        placed[name] = devices[max(matching, key=len)]
    return placed


def _check_one_device(model: nn.Module, devices: Mapping[str, torch.device]) -> None:
    """Check that modules with `one_device`, to which inputs are moved, are on one device each."""
    for prefix, module in model.named_modules():
        if getattr(module, "one_device", False):
            # Mixers and norms of a layer run as one fused sequence without moves in between.
            of_module = {str(d) for name, d in devices.items() if name.startswith(prefix + ".")}
            if len(of_module) > 1:
                raise ValueError(f"device_map splits {prefix} over {', '.join(sorted(of_module))}; give it one device")


def _device(prefix: str, device: str | int | torch.device) -> torch.device:
    where = f"device_map[{prefix!r}]" if prefix else "device_map"
    # accelerate's name for offloading.
    if device == "disk":
        raise ValueError(f"{where} is 'disk': offloading to disk is not supported; give a device with enough memory")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"{where} must be a device such as 'cpu' or 'cuda:0', got {device!r}") from e
