"""Order of the samples: a function of the seed and the step alone, so that a resume needs no state."""

from __future__ import annotations

import functools

import numpy as np


def samples_of_step(n_samples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the samples of one step. Epochs follow each other without a gap, each in an order of its own.

    A step mixes samples of all lengths, with and without images. ML-Mamba's code groups them by length and by having an
    image, because it pads; packed samples have no padding to save, and an order that depends on the seed alone mixes
    better.
    """
    # A step may span two epochs: its samples are consecutive in the concatenation of all epochs.
    start = step * batch_size
    return [
        int(_order(n_samples, seed, position // n_samples)[position % n_samples])
        for position in range(start, start + batch_size)
    ]


@functools.lru_cache(maxsize=2)
def _order(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of the samples in an epoch, (n_samples,). Two are cached for a step that spans two epochs."""
    return np.random.default_rng((seed, epoch)).permutation(n_samples)
