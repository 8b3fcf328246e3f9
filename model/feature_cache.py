"""Cache of image features by content."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    """Features of the images that were used last, within a bound on memory.

    Keys are digests of preprocessed pixels, so that the same content is found again whatever file it came from, and
    another resolution or normalization is another key. A cache is of one model whose weights do not change.

    Args:
        max_bytes: most memory of all features; features beyond it alone are not kept.
    """

    def __init__(self, max_bytes: int = 256 << 20):
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.max_bytes = max_bytes
        self.n_bytes = 0
        """Memory of the features, in bytes."""
        self.hits = self.misses = 0
        """Numbers of images that were found, and that were not."""
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, digest: bytes) -> Tensor | None:
        """Return the features of an image, (tokens, D), or None.

        Args:
            digest: of its content.
        """
        features = self._features.get(digest)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: Tensor) -> None:
        """Keep a copy of features, and drop those that were used longest ago as far as the bound asks for it.

        Args:
            digest: of the image's content.
            features: (tokens, D).
        """
        size = features.numel() * features.element_size()
        if size > self.max_bytes:
            return
        self._drop(digest)
        while self.n_bytes + size > self.max_bytes:
            self._drop(next(iter(self._features)))
        # A copy: the tensor may be a view of the features of a whole batch.
        self._features[digest] = features.detach().clone()
        self.n_bytes += size

    def _drop(self, digest: bytes) -> None:
        features = self._features.pop(digest, None)
        if features is not None:
            self.n_bytes -= features.numel() * features.element_size()
