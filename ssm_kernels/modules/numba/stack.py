"""Launch of a fused decoding step. Imports numba."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..._numba.launch import as_array
from ..._numba.stages import new_counters
from ..._numba.threads import run_tiles
from ..mamba import Mamba
from ..norm import RMSNorm
from ..quantized import QuantizedLinear
from ..state import MixerState
from . import mamba, mamba2
from .tensors import N_COLUMNS, PROJECTIONS, Layer, matrix, tensors


class FusedStep:
    """The function that `fused_step.fuse_step` makes."""

    def __init__(
        self,
        layers: Sequence[Layer],
        norm: RMSNorm,
        head: nn.Linear | QuantizedLinear,
        states: Sequence[MixerState],
        tokens: int,
    ):
        table = np.zeros((len(layers), N_COLUMNS), np.int64)
        (first_norm, mixer), batch, vocabulary = layers[0], len(states[0].conv), head.out_features
        (elements, _), (scale, _) = matrix(head, 0, 1, vocabulary, mixer.d_model).values()
        assert elements is not None
        self._tensors: list[Tensor] = [norm.weight, elements] + ([] if scale is None else [scale])
        for row, layer, state in zip(table, layers, states, strict=True):
            for column, (tensor, n_elements) in tensors(*layer, state).items():
                if tensor is not None:
                    if tensor.numel() != n_elements:
                        raise ValueError(
                            f"tensor {column} of a layer must have {n_elements} elements, got {tensor.shape}"
                        )
                    row[column] = tensor.data_ptr()
                    self._tensors.append(tensor)
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._memory = [t.detach() for t in self._tensors]  # alive, whatever becomes of the modules
        self._work = sum(t.numel() for t in self._tensors)

        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            self._residual = torch.empty(batch, mixer.d_model, dtype=torch.float32)  # (B, D)
        self._logits = self._residual.new_empty(batch, vocabulary)  # (B, V)
        projected, y = (self._residual.new_empty(batch, n) for n in (mixer.in_proj.out_features, mixer.d_inner))
        buffers = [self._residual, projected, y, self._logits]
        shape = (batch, tokens, mixer.d_model, mixer.d_inner, vocabulary, mixer.d_conv, mixer.d_state)
        if isinstance(mixer, Mamba):
            kernel = mamba.step_layers
            buffers.append(self._residual.new_empty(batch, mixer.dt_rank + 2 * mixer.d_state))
            options = (mixer.dt_rank, first_norm.eps, -1.0 if mixer.dt_bc_norm_eps is None else mixer.dt_bc_norm_eps)
        else:
            kernel = mamba2.step_layers
            options = (
                mixer.headdim, mixer.ngroups, first_norm.eps, mixer.norm.eps if mixer.rmsnorm else -1.0,
                mixer.norm_before_gate, mixer.D_has_hdim, *map(float, mixer.dt_limit),
            )  # fmt: skip
        self._buffers = buffers
        self._counters = new_counters(4 * len(layers) + 1)
        projections = [getattr(mixer, name) for name in PROJECTIONS[type(mixer)]]
        kinds = [matrix(m, 0, 1, m.out_features, m.in_features)[0][0] for m in projections]
        dtypes = [torch.float32, norm.weight.dtype, mixer.A_log.dtype, torch.bfloat16]
        dtypes += [t.dtype for t in (*kinds, elements) if t is not None]
        kinds = (as_array(None, dtype, 1) for dtype in dtypes)
        addresses = (*self._addresses[:2], 0 if scale is None else scale.data_ptr(), *(t.data_ptr() for t in buffers))
        args = (*kinds, table, self._counters, *addresses, *shape, *options)
        self._run = lambda first, end: kernel(*args)

    def __call__(self, embeddings: Tensor) -> Tensor | None:
        if [t.data_ptr() for t in self._tensors] != self._addresses:
            return None
        self._residual.copy_(embeddings)
        self._counters.fill(0)
        # Each thread takes blocks from all stages: there are as many shares as threads.
        run_tiles(self._run, torch.get_num_threads(), self._work)
        return self._logits
