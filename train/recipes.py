"""What is trained, in plain Python: models and the stages that they go through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..connectors import ConnectorConfig
from ..model.config import LMConfig, VisionConfig, VLMConfig
from ..model.image import ImageProcessor
from ..model.vit import ViTConfig
from .config import StageConfig

Family = Literal["vl-mamba", "ml-mamba"]
FAMILIES: tuple[Family, ...] = ("vl-mamba", "ml-mamba")


@dataclass(frozen=True)
class Recipe:
    """The stages of a model trained from nothing. A published backbone makes the first two needless."""

    vision: StageConfig
    """The encoder learns attributes of the images."""
    language: StageConfig
    """The language model learns from text alone."""
    align: StageConfig
    """The connector learns to caption; encoder and language model are frozen."""
    finetune: StageConfig
    """Connector and language model learn to answer; the encoder is frozen."""

    def faster(self, factor: float) -> Recipe:
        """The same with so many times fewer epochs."""
        stages = (self.vision, self.language, self.align, self.finetune)
        return Recipe(*(replace(s, epochs=s.epochs / factor) for s in stages))


# Features of the last block: this encoder was trained for just what is asked.
TINY_VISION = VisionConfig(ViTConfig(48, 8, 64, 3, 4, 128, feature_layer=-1), ImageProcessor(48))


def tiny_config(family: Family, vocab_size: int, connector: ConnectorConfig | None = None) -> VLMConfig:
    """A VL-Mamba (Mamba-1, VSS-L2) or ML-Mamba (Mamba-2, scan connector) small enough for a laptop."""
    if family == "vl-mamba":
        language = LMConfig(64, 2, vocab_size, "mamba", d_state=8)
        connector = connector or ConnectorConfig("vss-l2", "bidirectional", d_state=4, expand=1)
    else:
        language = LMConfig(80, 2, vocab_size, "mamba2", d_state=32, headdim=32, chunk_size=32)
        connector = connector or ConnectorConfig(
            "mamba2-advanced", "bidirectional", d_state=16, expand=1, headdim=16, n_layer=1, chunk_size=32
        )
    return VLMConfig(language, (TINY_VISION,), connector, template="qa")


# The short memory of squared gradients (0.95) is what lets so few steps do.
BETAS = (0.9, 0.95)
TURNS = 6
"""Questions about an image in one conversation, in the finetune stage: the image's tokens then serve them all."""
QUICK = Recipe(
    vision=StageConfig("vision", ("",), lr=3e-3, epochs=22, batch_size=64, weight_decay=0.05),
    language=StageConfig("language", ("language_model",), lr=3e-3, epochs=0.5, batch_size=128, betas=BETAS),
    align=StageConfig("align", ("connector",), lr=3e-3, epochs=1, batch_size=64, betas=BETAS),
    finetune=StageConfig(
        "finetune", ("connector", "language_model"), lr=2e-3, epochs=4, batch_size=32, betas=BETAS, weight_decay=0.01
    ),
)
FULL = Recipe(
    vision=replace(QUICK.vision, epochs=120),
    language=replace(QUICK.language, epochs=2),
    align=replace(QUICK.align, epochs=8),
    finetune=replace(QUICK.finetune, epochs=10),
)
PRESETS: dict[str, Recipe] = {"quick": QUICK, "full": FULL}
