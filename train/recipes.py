"""Recipes in plain Python: models, their training stages, and the data of each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ..connectors import ConnectorConfig
from ..model.config import LMConfig, VisionConfig, ViTConfig, VLMConfig
from ..model.image import ImageProcessor
from .config import StageConfig

Family = Literal["vl-mamba", "ml-mamba"]
FAMILIES: tuple[Family, ...] = ("vl-mamba", "ml-mamba")


@dataclass(frozen=True)
class DataFile:
    """Annotations in LLaVA's format, and their images."""

    annotations: str
    """Path under the folder of all data, like `images`."""
    images: str
    """Folder or archive that the annotations' paths are relative to."""
    n_records: int
    """Approximate number of records."""
    source: str
    """Source to download it from."""


@dataclass(frozen=True)
class Recipe:
    """The stages of a model whose language model and encoders are pretrained."""

    model: str | None
    """Preset in `model.presets` that training starts from; None is any saved model."""
    align: StageConfig
    """Train the connector on captions; encoder and language model are frozen."""
    finetune: StageConfig
    """Train connector and language model on conversations; the encoder is frozen."""
    align_data: tuple[DataFile, ...] = ()
    finetune_data: tuple[DataFile, ...] = ()
    align_template: str | None = None
    """Prompt template of the align stage; None is the model's own."""


# 558,128 captions of LAION, CC3M and SBU by BLIP; file names as published.
LLAVA_558K = DataFile(
    "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images.zip", 558_128,
    "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
)  # fmt: skip
LLAVA_665K = DataFile(
    "LLaVA-Instruct/llava_v1_5_mix665k.json", "LLaVA-Instruct", 665_298,
    "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; the images (coco, gqa, ocr_vqa, textvqa, vg) as "
    "https://github.com/haotian-liu/LLaVA says under 'Visual Instruction Tuning'",
)  # fmt: skip
# LRV-Instruct is published in a format of its own. Prismatic's two scripts convert it and join all three.
LLAVA_LVIS_LRV = DataFile(
    "LLaVA-Instruct/llava_v1_5_lvis4v_lrv_mix1231k.json", "LLaVA-Instruct", 1_231_000,
    "scripts/additional-datasets/lvis_instruct_4v.py, then lrv_instruct.py, of "
    "https://github.com/TRI-ML/prismatic-vlms, on LLaVA-665K, "
    "https://huggingface.co/datasets/X2FD/LVIS-Instruct4V and https://github.com/FuxiaoLiu/LRV-Instruction",
)  # fmt: skip

VL_MAMBA = Recipe(
    # VL-Mamba (2403.13600): LLaVA-1.5's two stages and data. The paper states no settings, so all are LLaVA-1.5's
    # (scripts pretrain.sh and finetune.sh; betas and clip are the defaults of transformers' Trainer, which they use).
    "vl-mamba-2.8b",
    align=StageConfig(
        "align", ("connector",), lr=1e-3, batch_size=256, micro_batch_size=16, precision="bf16",
        gradient_checkpointing=True,
    ),
    finetune=StageConfig(
        "finetune", ("connector", "language_model"), lr=2e-5, batch_size=128, micro_batch_size=8, precision="bf16",
        gradient_checkpointing=True,
    ),
    align_data=(LLAVA_558K,),
    finetune_data=(LLAVA_665K,),
    align_template="caption",
)  # fmt: skip
ML_MAMBA = Recipe(
    # ML-Mamba (2407.19832). Finetune by the paper: AdamW, 2e-5, global batch 64, weight decay 0.1, cosine, warm-up 3 %,
    # two epochs (so its text; its table of settings says one). Its code has a batch of 128. The paper and
    # the command in its repository name LLaVA's 665,000 records, the released model's config 1,231,000: see below. Clip
    # and seed, and all of align, which the paper finally leaves out and has no settings for, are its code's. Betas are
    # PyTorch's.
    # Not followed: batches of images alone or text alone, of like lengths. Packed samples have no padding to save.
    "ml-mamba-3b",
    align=StageConfig(
        "align", ("connector",), lr=1e-3, batch_size=256, micro_batch_size=16, precision="bf16",
        gradient_checkpointing=True, seed=7,
    ),
    finetune=StageConfig(
        "finetune", ("connector", "language_model"), lr=2e-5, epochs=2, batch_size=64, micro_batch_size=8,
        weight_decay=0.1, precision="bf16", gradient_checkpointing=True, seed=7,
    ),
    align_data=(LLAVA_558K,),
    finetune_data=(LLAVA_665K,),
    align_template="caption",
)  # fmt: skip
ML_MAMBA_1231K = replace(ML_MAMBA, finetune_data=(LLAVA_LVIS_LRV,))
"""ML-Mamba on the data that the config of its released model names. Which of the two made its weights is not known."""
SMALL = Recipe(
    None,
    align=StageConfig("align", ("connector",), lr=1e-3, batch_size=64),
    finetune=StageConfig("finetune", ("connector", "language_model"), lr=1e-3, batch_size=64),
)
"""For models as small as the demo's, with learning rates at which a large one would diverge."""
RECIPES: dict[str, Recipe] = {
    "vl-mamba": VL_MAMBA,
    "ml-mamba": ML_MAMBA,
    "ml-mamba-1231k": ML_MAMBA_1231K,
    "small": SMALL,
}
SMALL_WIDTH = 256
"""Largest width of a language model that the recipe `small` is for."""


def recipe_named(name: str) -> Recipe:
    """Look up a recipe.

    Raises:
        ValueError: there is none of that name; the message has the nearest.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]


def recipe_for(config: VLMConfig) -> str:
    """Name of the recipe for a model: `small`, or that of the paper with its kind of language model."""
    if config.language.d_model <= SMALL_WIDTH:
        return "small"
    return "vl-mamba" if config.language.layer == "mamba" else "ml-mamba"


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggestion to append to an error about an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


@dataclass(frozen=True)
class DemoRecipe:
    """The stages of a tiny model trained from scratch."""

    vision: StageConfig
    """Train the encoder to classify attributes of the images."""
    language: StageConfig
    """Train the language model on text alone."""
    align: StageConfig
    """Train the connector on captions; encoder and language model are frozen."""
    finetune: StageConfig
    """Train connector and language model on conversations; the encoder is frozen."""

    def faster(self, factor: float) -> DemoRecipe:
        """The same stages with epochs divided by `factor`."""
        return DemoRecipe(*(replace(s, epochs=s.epochs / factor) for s in vars(self).values()))

    def with_seed(self, seed: int) -> DemoRecipe:
        """The same stages with another seed of the weights and of the order of the samples."""
        return DemoRecipe(*(replace(s, seed=seed) for s in vars(self).values()))


# Features of the last block, since this encoder is trained for just the attributes that are asked for.
TINY_VISION = VisionConfig(ViTConfig(48, 8, 64, 3, 4, 128, feature_layer=-1), ImageProcessor(48))


def tiny_config(family: Family, vocab_size: int, connector: ConnectorConfig | None = None) -> VLMConfig:
    """Config of a VL-Mamba (Mamba-1, VSS-L2) or ML-Mamba (Mamba-2, scan connector) small enough for a laptop."""
    if family == "vl-mamba":
        language = LMConfig(64, 2, vocab_size, "mamba", d_state=8)
        connector = connector or ConnectorConfig("vss-l2", "bidirectional", d_state=4, expand=1)
    else:
        language = LMConfig(80, 2, vocab_size, "mamba2", d_state=32, headdim=32, chunk_size=32)
        connector = connector or ConnectorConfig(
            "mamba2-advanced", "bidirectional", d_state=16, expand=1, headdim=16, n_layer=1, chunk_size=32
        )
    return VLMConfig(language, (TINY_VISION,), connector, template="qa")


# A faster second moment (0.95): the stages are too short for 0.999.
BETAS = (0.9, 0.95)
TURNS = 6
"""Questions about an image in one conversation of the finetune stage, which share the image's tokens."""
QUICK = DemoRecipe(
    vision=StageConfig("vision", ("",), lr=3e-3, epochs=22, batch_size=64, weight_decay=0.05),
    language=StageConfig("language", ("language_model",), lr=3e-3, epochs=0.5, batch_size=128, betas=BETAS),
    align=StageConfig("align", ("connector",), lr=3e-3, epochs=1, batch_size=64, betas=BETAS),
    finetune=StageConfig(
        "finetune", ("connector", "language_model"), lr=2e-3, epochs=4, batch_size=32, betas=BETAS, weight_decay=0.01
    ),
)
FULL = DemoRecipe(
    vision=replace(QUICK.vision, epochs=120),
    language=replace(QUICK.language, epochs=2),
    align=replace(QUICK.align, epochs=8),
    finetune=replace(QUICK.finetune, epochs=10),
)
DEMOS: dict[str, DemoRecipe] = {"quick": QUICK, "full": FULL}
