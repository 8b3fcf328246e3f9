"""Context parallelism: a sequence sharded over the ranks of a process group, rank r holding the r-th run of steps.

A scan is linear in its state: a rank's steps take an incoming state h to `exp(A sum dt) h + e`, e being their final
state from a zero state. One all-gather of W messages, W the number of ranks, distributes every rank's (e, sum dt). Each
rank combines those of the ranks before it into its own initial state and scans its steps from there. A rank scans twice
where one sequence both continues from an earlier rank and continues on a later one, and once elsewhere.

A ring, in which each rank waits for the final state of the one before, sends one state a rank and scans once, but
serializes the scans: it takes the time of W scans, this takes the time of two. (So on two ranks memory, projections and
everything else are halved, but not the time of the scan.) The backward is autograd's: that of the all-gather is one
all-to-all, whose messages are summed in order of rank.

The convolution needs the K - 1 inputs before a rank's first step: a halo exchange, by the same all-gather, from several
ranks where shards are shorter than K - 1.

Bytes that a rank sends, and receives, in a forward, and again in the backward:

- selective scan: (W - 1) * B * D * (N + 1) * itemsize, with itemsize 4, or 8 where the input is float64;
- SSD: (W - 1) * B * H * (P * N + 1) * itemsize, likewise;
- convolution: (W - 1) * B * (K - 1) * D * itemsize of its input.

None depends on the length, nor on the number of packed sequences: at most one of them continues from a rank to the
next. A mixer's `state` costs an all-gather of the state besides.

All ranks must run the same ops in the same order, forward and backward: each calls `backward` on a loss that depends on
its own outputs, with weight zero if need be; the objective is the sum of the losses. Under that condition no rank waits
for another in vain: every exchange is in the graph of every rank, between the inputs and the outputs of its op,
whatever requires gradients.

Under `torch.utils.checkpoint` the exchanges of the forward run again in the backward, which then belongs inside
`context_parallel` too. What the mixers recompute by themselves (`use_mem_eff_path`) needs no exchange. Replicated
tensors (A, D, biases, weights, initial states) get the part of their gradient that comes from the rank's own steps; the
sum over the ranks is the gradient.
"""

from . import ops  # noqa: F401  registers the sharded versions of the ops
from .halo import conv_halo
from .sharding import SequenceSharding, context_parallel, current_sharding
from .states import gather_final_states

__all__ = ["SequenceSharding", "context_parallel", "conv_halo", "current_sharding", "gather_final_states"]
