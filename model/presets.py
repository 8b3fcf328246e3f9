"""Presets: the papers' models as pretrained parts and a connector, the starting point of training."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..connectors import VSS, ConnectorConfig, Kind, Scan
from .config import VLMConfig
from .formats import language
from .formats.vision import VISION_ENCODERS
from .formats.vlm import merged, open_encoders
from .hub import fetch_model
from .image import Resize
from .weights import Weights

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"
DINOV2_SIGLIP = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384")


@dataclass(frozen=True)
class Preset:
    """A language model and encoders by their published names, and a connector."""

    language: str
    """A repository that `MambaLM` loads."""
    encoders: tuple[str, ...]
    """Names in `VISION_ENCODERS`, in the order of their features."""
    connector: ConnectorConfig
    template: str
    resize: Resize | None = None
    """`ImageProcessor.resize`; None is that of each encoder."""

    @property
    def config(self) -> VLMConfig:
        """Config of the published parts. Needs no download."""
        vision = tuple(VISION_ENCODERS[name].config for name in self.encoders)
        if self.resize is not None:
            vision = tuple(replace(v, processor=replace(v.processor, resize=self.resize)) for v in vision)
        return VLMConfig(language.PUBLISHED[self.language].config, vision, self.connector, self.template)

    def open(self, **hub: Any) -> tuple[VLMConfig, Weights]:
        """Open the pretrained parts.

        Args:
            hub: as for `hub.fetch`.

        Returns:
            The config, and the weights of everything but the connector, unread.
        """
        # The file's config rather than the published one, in case the repository differs.
        config, lm = language.open_language_model(fetch_model(self.language, **hub))
        vision, encoders = open_encoders(self.encoders, self.resize, **hub)
        weights = merged({"language_model.": lm, "": encoders})
        return VLMConfig(config, vision, self.connector, self.template), weights


def _vl_mamba(
    language: str = "mamba-2.8b-slimpj",
    encoder: str = SIGLIP,
    kind: Kind = "vss-l2",
    scan: Scan = "bidirectional",
    vss: VSS = "ss2d",
) -> Preset:
    return Preset(f"state-spaces/{language}", (encoder,), ConnectorConfig(kind, scan, vss), "vicuna")


def _ml_mamba(
    size: str = "2.7b",
    kind: Kind = "mamba2-advanced",
    scan: Scan = "bidirectional",
    encoders: tuple[str, ...] = DINOV2_SIGLIP,
) -> Preset:
    connector = ConnectorConfig(kind, scan, chunk_size=256)
    return Preset(f"state-spaces/mamba2-{size}", encoders, connector, "zephyr", resize="naive")


PRESETS = {
    # VL-Mamba (2403.13600, section 4): the best of the paper, then its ablations. The paper leaves open the prompt
    # template (here LLaVA-1.5's, whose recipe it follows) and which of CLIP's and SigLIP's files it took.
    "vl-mamba-2.8b": _vl_mamba(),
    "vl-mamba-2.8b-cross": _vl_mamba(scan="cross"),
    "vl-mamba-2.8b-mamba-layer": _vl_mamba(vss="mamba"),
    "vl-mamba-2.8b-vss-mlp": _vl_mamba(kind="vss-mlp"),
    "vl-mamba-2.8b-mlp": _vl_mamba(kind="mlp"),
    "vl-mamba-2.8b-clip-mlp": _vl_mamba(encoder=CLIP, kind="mlp"),
    "vl-mamba-2.8b-pile-clip-mlp": _vl_mamba("mamba-2.8b", CLIP, "mlp"),
    "vl-mamba-1.4b-clip-mlp": _vl_mamba("mamba-1.4b", CLIP, "mlp"),
    # ML-Mamba (2407.19832, sections 3 and 4.4): DINOv2 before SigLIP, as its code has it.
    "ml-mamba-3b": _ml_mamba(),
    "ml-mamba-3b-cross": _ml_mamba(scan="cross"),
    "ml-mamba-3b-basic": _ml_mamba(kind="mamba2-basic"),
    "ml-mamba-3b-mlp": _ml_mamba(kind="mamba2-mlp"),
    "ml-mamba-3b-dinov2": _ml_mamba(encoders=DINOV2_SIGLIP[:1]),
    "ml-mamba-3b-siglip": _ml_mamba(encoders=DINOV2_SIGLIP[1:]),
    "ml-mamba-1.3b": _ml_mamba("1.3b"),
    "ml-mamba-780m": _ml_mamba("780m"),
}
"""Presets by name, as `VLM.from_preset` and `vlmamba train` take them."""


def is_preset(name: str | Path) -> bool:
    """Return whether a model's name is that of a preset. A folder of that name takes precedence."""
    return str(name) in PRESETS and not Path(name).is_dir()


def get_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ValueError: there is none; the closest name is suggested.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PRESETS)}"
        raise ValueError(f"no preset {name!r}; {hint}")
    return PRESETS[name]
