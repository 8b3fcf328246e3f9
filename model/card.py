"""Model cards: the `README.md` of a saved model, which the Hub shows as its page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ssm_kernels.modules import QuantizedMatrix

from .config import LMConfig, ViTConfig, VLMConfig
from .quantize import count_weights

logger = logging.getLogger("vlmamba.model")

CARD = "README.md"
LIBRARY = "vl-mamba"

PAPERS = {
    "mamba": ("Mamba", "2312.00752"),
    "mamba2": ("Mamba-2", "2405.21060"),
    "mamba3": ("Mamba-3", "2603.15569"),
    "vl-mamba": ("VL-Mamba", "2403.13600"),
    "ml-mamba": ("ML-Mamba", "2407.19832"),
}
"""Name and arXiv number of the papers that a model follows."""


@dataclass(frozen=True)
class Evaluation:
    """Metric of a model on a dataset."""

    dataset: str
    split: str
    metric: str
    value: float
    """A fraction of 1 for shares such as accuracy."""
    n_samples: int


@dataclass(frozen=True)
class CardFacts:
    """Model card entries that a config does not have."""

    base_models: Sequence[str] = ()
    """Names on the Hub."""
    license: str | None = None
    """Identifier of the Hub, such as `apache-2.0`; None where it is not known."""
    evaluations: Sequence[Evaluation] = ()
    sections: Sequence[str] = ()
    """Further sections, in Markdown."""


def model_card(model: nn.Module, config: LMConfig | ViTConfig | VLMConfig, facts: CardFacts) -> ModelCard:
    """Write the card of a model.

    Args:
        model: its parameters are counted.
        config: of the model.
        facts: what else is known about it.

    Returns:
        The card, with metadata that the Hub searches by.
    """
    parameters = _count(model)
    kind, task, usage = _KINDS[type(config)]
    if isinstance(config, ViTConfig) and getattr(model, "processor", None) is None:
        usage = _USE_VIT_ON_PIXELS.format(size=config.image_size)
    title = f"{kind}, {parameters:,} parameters"
    parts = [f"# {title}", _architecture(config, model)]
    if bits := sorted({m.bits for m in model.modules() if isinstance(m, QuantizedMatrix)}):
        parts.append(f"Matrices hold integers of {' and '.join(map(str, bits))} bits, with scales (weight-only).")
    parts.append(f"## Use\n\nWith the package `{LIBRARY}`:\n\n```python\n{usage}\n```")
    # The same results are in the metadata below, where leaderboards look.
    if facts.evaluations:
        head = "## Evaluation\n\n| dataset | split | samples | metric | value |\n|---|---|--:|---|--:|"
        parts.append("\n".join([head, *(_row(e) for e in facts.evaluations)]))
    # Training and conversion come after the model itself.
    parts += facts.sections
    # The Hub links a model to a paper by its tag.
    papers = [PAPERS[key] for key in _papers(config)]
    if papers:
        links = "\n".join(f"- {name}: [arXiv {number}](https://arxiv.org/abs/{number})" for name, number in papers)
        parts.append(f"## Papers\n\n{links}")
    parts.append("## Licence\n\n" + _licence(facts))
    # The Hub refuses a name without results, and results without a name.
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=task,
        license=facts.license,
        base_model=list(facts.base_models) or None,
        tags=["mamba", *(f"arxiv:{number}" for _, number in papers)],
        model_name=title if facts.evaluations else None,
        eval_results=[_result(e, task) for e in facts.evaluations] or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def facts_of(name: str | Path) -> CardFacts:
    """Collect what a model made from another takes over from it: its base models and licence.

    Args:
        name: a folder of a saved model, or a name on the Hub.

    Returns:
        What a folder's own card says, or the name on the Hub. A local path is left out: it means nothing elsewhere.
    """
    if not Path(name).is_dir():
        return CardFacts((str(name),))
    path = Path(name) / CARD
    if not path.exists():
        return CardFacts()
    # Someone else may have edited it.
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (yaml.YAMLError, ValueError) as e:
        logger.warning("%s: its metadata cannot be read, so base models and licence are not taken over: %s", path, e)
        return CardFacts()
    # The Hub takes one name or a list of them.
    base = data.get("base_model") or ()
    return CardFacts((base,) if isinstance(base, str) else tuple(base), data.get("license"))


def _architecture(config: LMConfig | ViTConfig | VLMConfig, model: nn.Module) -> str:
    """Describe a model in a sentence, and its parts in a table."""
    if isinstance(config, VLMConfig):
        encoders = " and ".join(_encoder(v.encoder) for v in config.vision)
        # The MLP alone sees each patch by itself.
        scan = "" if config.connector.kind == "mlp" else f" with {config.connector.scan} scans"
        language = _language(config.language)
        text = (
            f"{encoders}; a `{config.connector.kind}` connector{scan}; {language}; prompt template `{config.template}`"
        )
    elif isinstance(config, LMConfig):
        text = _language(config)
    else:
        text = _encoder(config)
    text = f"{text[0].upper()}{text[1:]}."
    rows = [f"| {name} | {n:,} |" for name, part in model.named_children() if (n := _count(part))]
    return "\n".join([text, "", "| part | parameters |", "|---|--:|", *rows])


def _language(config: LMConfig) -> str:
    layer = PAPERS[config.layer][0]
    return f"a {layer} language model of {config.n_layer} layers, width {config.d_model}, {config.vocab_size:,} tokens"


def _encoder(config: ViTConfig) -> str:
    return (
        f"a vision transformer for images of {config.image_size} pixels, patches of {config.patch_size}, "
        f"{config.depth} blocks of width {config.width}"
    )


def _count(part: nn.Module) -> int:
    n_weights = count_weights(part)
    return sum(n_weights.get(id(p), p.numel()) for p in part.parameters())


def _papers(config: LMConfig | ViTConfig | VLMConfig) -> list[str]:
    if isinstance(config, VLMConfig):
        # ML-Mamba's connectors are the ones that run Mamba-2 over the grid.
        of_connector = "ml-mamba" if config.connector.kind.startswith("mamba2") else "vl-mamba"
        return [config.language.layer, of_connector]
    return [config.layer] if isinstance(config, LMConfig) else []


def _licence(facts: CardFacts) -> str:
    # Guessing a licence would be worse than leaving it to the reader.
    if facts.license is not None:
        return f"`{facts.license}`"
    if facts.base_models:
        return f"Not stated. See the licences of {', '.join(f'`{b}`' for b in facts.base_models)} and of the data."
    return "Not stated."


def _row(e: Evaluation) -> str:
    return f"| {e.dataset} | {e.split} | {e.n_samples:,} | {e.metric} | {e.value:.4f} |"


def _result(e: Evaluation, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        # An identifier for search, unlike the name.
        dataset_type=e.dataset.lower(),
        dataset_name=e.dataset,
        dataset_split=e.split,
        metric_type=e.metric,
        metric_value=e.value,
    )


_USE_VLM = """from vlmamba.model import VLM

model = VLM.from_pretrained(".")  # this folder, or the model's name on the Hub
print(model.generate(["What is this?"], ["picture.png"]))"""
_USE_LM = """import torch
from vlmamba.model import MambaLM

model = MambaLM.from_pretrained(".")  # this folder, or the model's name on the Hub
print(model(torch.tensor([[1, 2, 3]])).logits.shape)"""
_USE_VIT = """from vlmamba.model import ViT

model = ViT.from_pretrained(".")  # this folder, or the model's name on the Hub
print(model(model.processor("picture.png")[None]).shape)"""
_USE_VIT_ON_PIXELS = """import torch
from vlmamba.model import ViT

model = ViT.from_pretrained(".")  # this folder, or the model's name on the Hub
print(model(torch.zeros(1, 3, {size}, {size})).shape)  # normalized pixels"""

_KINDS = {
    VLMConfig: ("Mamba vision-language model", "image-text-to-text", _USE_VLM),
    LMConfig: ("Mamba language model", "text-generation", _USE_LM),
    ViTConfig: ("Vision transformer", "image-feature-extraction", _USE_VIT),
}
"""Name, task on the Hub, and a sample of code, by the class of the config."""
