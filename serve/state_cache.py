"""Cache of recurrent states by the prompt that led to them."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from typing import NamedTuple

from torch import Tensor

from ssm_kernels import states

from ..model.generation.decoding import state_bytes
from ..model.generation.interface import LMState
from .prompts import Prompt


class CachedPrefix(NamedTuple):
    """Prefix of a prompt that was run before."""

    length: int
    """Number of its tokens."""
    state: LMState
    """State after it, of one sequence; not to be written to."""
    logits: Tensor | None
    """Logits after it (V,); None for a prefix that can only be continued."""


class _Entry(NamedTuple):
    owner: bytes
    """Digest of the salt."""
    prefix: CachedPrefix
    n_bytes: int


class StateCache:
    """Least recently used states, by the digest of everything that they depend on.

    A state has a constant size, so an entry costs the same for ten tokens as for ten thousand. Digests are salted by
    the user's secret: a prefix of one user is never found by another, and its presence cannot be timed.

    Args:
        max_bytes: memory of all states and logits.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.n_bytes = 0
        """Memory in use."""
        self.hits = self.misses = self.evictions = 0
        self.tokens = 0
        """Prompt tokens that did not have to be run."""
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lengths: dict[bytes, Counter[int]] = {}
        """Owner -> lengths of its prefixes, with the number of entries of each."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: Prompt) -> CachedPrefix | None:
        """Return the longest known prefix. The entire prompt counts where logits after it are known."""
        owner, n = hashlib.sha256(prompt.salt).digest(), len(prompt.ids)
        lengths = sorted(length for length in self._lengths.get(owner, ()) if length <= n and _is_cut(prompt, length))
        for digest in reversed(prompt.digests(prompt.ids, lengths)):
            entry = self._entries.get(digest)
            if entry is not None and (entry.prefix.length < n or entry.prefix.logits is not None):
                self._entries.move_to_end(digest)
                self.hits += 1
                self.tokens += entry.prefix.length
                return entry.prefix
        self.misses += 1
        return None

    def store(self, prompt: Prompt, tokens: list[int], state: LMState, logits: Tensor | None = None) -> None:
        """Keep a copy of the state after some tokens.

        Args:
            prompt: supplies the salt and the images.
            tokens: a prefix of the prompt's, or all of them followed by generated ones.
            state: of one sequence.
            logits: (V,) after the last token, if they are known.
        """
        size = state_bytes(state) + (logits.numel() * logits.element_size() if logits is not None else 0)
        if not tokens or size > self.max_bytes:
            return
        owner = hashlib.sha256(prompt.salt).digest()
        (digest,) = prompt.digests(tokens, [len(tokens)])
        known = self._entries.get(digest)
        if known is not None and (known.prefix.logits is not None or logits is None):
            self._entries.move_to_end(digest)
            return
        if known is not None:
            self._remove(digest)
        # Clones: a view would keep the memory of the whole batch.
        prefix = CachedPrefix(len(tokens), states.clone(state), None if logits is None else logits.clone())
        self._entries[digest] = _Entry(owner, prefix, size)
        self._lengths.setdefault(owner, Counter())[len(tokens)] += 1
        self.n_bytes += size
        while self.n_bytes > self.max_bytes:
            self._remove(next(iter(self._entries)))
            self.evictions += 1

    def _remove(self, digest: bytes) -> None:
        entry = self._entries.pop(digest)
        self.n_bytes -= entry.n_bytes
        lengths = self._lengths[entry.owner]
        lengths[entry.prefix.length] -= 1
        if not lengths[entry.prefix.length]:
            del lengths[entry.prefix.length]
        if not lengths:
            del self._lengths[entry.owner]


def _is_cut(prompt: Prompt, length: int) -> bool:
    """Whether a prefix of that length ends outside of every image."""
    return not any(span.start < length < span.end for span in prompt.images)
