"""Which samples make up a step: a function of the seed and the step alone, so that resuming needs no state."""

from __future__ import annotations

import functools

import numpy as np


def samples_of_step(n_samples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the samples of one step. Epochs follow each other without a gap, each in an order of its own.

    Records of all lengths, about images and text alone, lie in one step. ML-Mamba's code groups them by length, each
    batch all with images or all without, because it pads; packed samples have no padding to save, and an order that
    depends on nothing but the seed mixes better.
    """
    begin = step * batch_size
    return [
        int(_order(n_samples, seed, position // n_samples)[position % n_samples])
        for position in range(begin, begin + batch_size)
    ]


@functools.lru_cache(maxsize=2)
def _order(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_samples)
