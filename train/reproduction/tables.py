"""Rows of the papers' tables, with the figures that the papers report.

VL-Mamba: arXiv 2403.13600, section 4. ML-Mamba: arXiv 2407.19832, section 4. A figure that could not be read in the
paper itself is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ...connectors import ConnectorConfig
from ...model.config import Layer
from ..recipes import Family, nearest, tiny_config


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of `lmms-eval`; docs/evaluation.md says what its figure means."""

    task: str | None
    """Name of the task; None where the harness has none."""
    metric: str = "exact_match"
    scale: float = 100.0
    """Factor from the harness's figure to the paper's."""
    judged: bool = False
    """GPT judges the answers, which needs `OPENAI_API_KEY`."""
    data: tuple[str, str] | None = None
    """Annotations and images under the folder of all data, for `vlmamba evaluate` where the harness has no task."""


BENCHMARKS: dict[str, Benchmark] = {
    "VQAv2": Benchmark("vqav2_val"),
    "GQA": Benchmark("gqa"),
    "SQA-I": Benchmark("scienceqa_img"),
    "TextVQA": Benchmark("textvqa_val"),
    "POPE": Benchmark("pope", "pope_f1_score"),
    "MME": Benchmark("mme", "mme_perception_score", 1.0),
    "MMB": Benchmark("mmbench_en_dev", "gpt_eval_score", 1.0, judged=True),
    "MM-Vet": Benchmark("mmvet", "gpt_eval_score", 1.0, judged=True),
    "VizWiz": Benchmark("vizwiz_vqa_val"),
    "VSR": Benchmark(None, "accuracy", data=("vsr/test.jsonl", "vsr/images")),
}
"""Benchmarks of both papers by the names in their tables."""


@dataclass(frozen=True)
class Miniature:
    """A row at a size for easy-VQA: what the row changes is changed here too."""

    family: Family
    connector: ConnectorConfig
    width: int
    """Width of the language model."""
    layer: Layer
    """Kind of its layers."""
    text: float = 1.0
    """Share of the text that the language model is trained on before it sees images."""
    encoders: tuple[tuple[str, ...], ...] = (("color", "shape"),)
    """Attributes that each encoder was trained to tell."""


@dataclass(frozen=True)
class PaperRow:
    """A row of a table."""

    preset: str | None
    """The model in `vlmamba.model.PRESETS`; None for a row that there is in miniature only."""
    miniature: Miniature
    figures: dict[str, float] = field(default_factory=dict)
    """Benchmark -> the paper's figure."""


@dataclass(frozen=True)
class PaperTable:
    """A table, or several rows of one."""

    title: str
    recipe: str
    """Recipe of `vlmamba train`."""
    benchmarks: tuple[str, ...]
    """Columns, in the paper's order."""
    rows: dict[str, PaperRow]
    """The paper's label -> row."""
    note: str = ""

    def selected(self, labels: Sequence[str]) -> dict[str, PaperRow]:
        """Rows by label; all without one.

        Raises:
            ValueError: there is no such row; the message names those that there are.
        """
        for label in labels:
            if label not in self.rows:
                raise ValueError(f"no row {label!r}{nearest(label, self.rows)}")
        return {label: row for label, row in self.rows.items() if not labels or label in labels}


def _tiny(family: Family, **changes) -> Miniature:
    """The demo's model with a change of the connector or of the rest."""
    # Everything that the row does not change is the demo's; the vocabulary plays no part here.
    config = tiny_config(family, 1)
    connector = {k: changes.pop(k) for k in ("kind", "scan", "vss") if k in changes}
    return Miniature(family, replace(config.connector, **connector), changes.pop("width", config.language.d_model),
                     changes.pop("layer", config.language.layer), **changes)  # fmt: skip


_VL_COLUMNS = ("VQAv2", "GQA", "SQA-I", "TextVQA", "POPE", "MME", "MMB", "MM-Vet")
_ML_COLUMNS = ("VQAv2", "GQA", "TextVQA", "POPE", "VizWiz", "VSR")
_VL_FINAL: dict[str, float] = dict(zip(_VL_COLUMNS, (76.6, 56.2, 65.4, 48.9, 84.4, 1369.6, 57.0, 32.6), strict=True))


def _ml_figures(*figures: float) -> dict[str, float]:
    return dict(zip(_ML_COLUMNS, figures, strict=True))


_ML_FINAL = _ml_figures(75.26, 60.68, 52.2, 88.3, 45.17, 51.5)
_UNREAD = "Figures of this ablation were in no copy of the paper that could be read, but for the final model's."

TABLES: dict[str, PaperTable] = {
    "vl-mamba": PaperTable(
        "VL-Mamba, the final model", "vl-mamba", _VL_COLUMNS,
        {"VL-Mamba": PaperRow("vl-mamba-2.8b", _tiny("vl-mamba"), _VL_FINAL)},
        "VQAv2 is of the test-dev server in the paper, of the validation set here.",
    ),
    # Size and pretraining data; in miniature a narrower model, and half of the text.
    "vl-mamba-language": PaperTable(
        "VL-Mamba, language models (CLIP, MLP)", "vl-mamba", _VL_COLUMNS,
        {
            "Mamba-1.4B": PaperRow("vl-mamba-1.4b-clip-mlp", _tiny("vl-mamba", kind="mlp", width=48, text=0.5)),
            "Mamba-2.8B-Pile": PaperRow("vl-mamba-2.8b-pile-clip-mlp", _tiny("vl-mamba", kind="mlp", text=0.5)),
            "Mamba-2.8B-Slimpj": PaperRow("vl-mamba-2.8b-clip-mlp", _tiny("vl-mamba", kind="mlp")),
        },
        _UNREAD,
    ),
    # The miniature of CLIP, which scores lower but on MME, was never told shapes.
    "vl-mamba-encoder": PaperTable(
        "VL-Mamba, image encoders (Mamba-2.8B-Slimpj, MLP)", "vl-mamba", _VL_COLUMNS,
        {
            "CLIP-ViT-L": PaperRow("vl-mamba-2.8b-clip-mlp", _tiny("vl-mamba", kind="mlp", encoders=(("color",),))),
            "SigLIP-SO": PaperRow("vl-mamba-2.8b-mlp", _tiny("vl-mamba", kind="mlp")),
        },
        _UNREAD,
    ),
    # All with the bidirectional scan.
    "vl-mamba-connector": PaperTable(
        "VL-Mamba, multimodal connectors (SigLIP, Mamba-2.8B-Slimpj)", "vl-mamba", _VL_COLUMNS,
        {
            "MLP": PaperRow("vl-mamba-2.8b-mlp", _tiny("vl-mamba", kind="mlp")),
            "VSS-MLP": PaperRow("vl-mamba-2.8b-vss-mlp", _tiny("vl-mamba", kind="vss-mlp")),
            "VSS-L2": PaperRow("vl-mamba-2.8b", _tiny("vl-mamba", kind="vss-l2"), _VL_FINAL),
            "VSS-L2, one Mamba layer": PaperRow(
                "vl-mamba-2.8b-mamba-layer", _tiny("vl-mamba", kind="vss-l2", vss="mamba")
            ),
        },
        _UNREAD + " The last row is not in the paper: its words allow that layer too.",
    ),
    # VQAv2 of the cross scan is in the text of section 4.
    "vl-mamba-scan": PaperTable(
        "VL-Mamba, scans (VSS-L2)", "vl-mamba", _VL_COLUMNS,
        {
            "Bidirectional (BSM)": PaperRow("vl-mamba-2.8b", _tiny("vl-mamba"), _VL_FINAL),
            "Cross (CSM)": PaperRow("vl-mamba-2.8b-cross", _tiny("vl-mamba", scan="cross"), {"VQAv2": 76.6}),
        },
        _UNREAD,
    ),
    "ml-mamba": PaperTable(
        "ML-Mamba, the final model", "ml-mamba", _ML_COLUMNS,
        {"ML-Mamba": PaperRow("ml-mamba-3b", _tiny("ml-mamba"), _ML_FINAL)},
        "POPE is the accuracy of the likelier first token in the paper, F1 here.",
    ),
    # The text says that this study has a plain MLP; its last row equals the final model's.
    "ml-mamba-language": PaperTable(
        "ML-Mamba, language models", "ml-mamba", _ML_COLUMNS,
        {
            "Mamba2-780M": PaperRow(
                "ml-mamba-780m", _tiny("ml-mamba", width=48), _ml_figures(71.7, 51.92, 48.1, 81.6, 41.5, 47.7)
            ),
            "Mamba2-1.3B": PaperRow(
                "ml-mamba-1.3b", _tiny("ml-mamba", width=64), _ml_figures(73.6, 55.41, 50.8, 83.7, 43.7, 49.3)
            ),
            "Mamba2-2.7B": PaperRow("ml-mamba-3b", _tiny("ml-mamba"), _ML_FINAL),
        },
    ),
    # One encoder each for shape and color in miniature, as the two see different things.
    "ml-mamba-encoder": PaperTable(
        "ML-Mamba, image encoders", "ml-mamba", _ML_COLUMNS,
        {
            "DINOv2": PaperRow(
                "ml-mamba-3b-dinov2", _tiny("ml-mamba", encoders=(("shape",),)),
                _ml_figures(73.73, 58.84, 51.13, 86.6, 44.23, 50.73),
            ),
            "SigLIP": PaperRow(
                "ml-mamba-3b-siglip", _tiny("ml-mamba", encoders=(("color",),)),
                _ml_figures(74.61, 59.43, 50.78, 87.4, 45.07, 50.54),
            ),
            "DINOv2 + SigLIP": PaperRow(
                "ml-mamba-3b", _tiny("ml-mamba", encoders=(("shape",), ("color",))), _ML_FINAL
            ),
        },
    ),
    # All with the bidirectional scan.
    "ml-mamba-connector": PaperTable(
        "ML-Mamba, multimodal connectors", "ml-mamba", _ML_COLUMNS,
        {
            "MLP": PaperRow(
                "ml-mamba-3b-mlp", _tiny("ml-mamba", kind="mamba2-mlp"),
                _ml_figures(73.42, 58.87, 50.31, 86.1, 43.87, 50.13),
            ),
            "MSC-MLP Basic": PaperRow(
                "ml-mamba-3b-basic", _tiny("ml-mamba", kind="mamba2-basic"),
                _ml_figures(75.09, 60.14, 51.72, 86.5, 44.57, 50.76),
            ),
            "MSC-MLP Advanced": PaperRow("ml-mamba-3b", _tiny("ml-mamba"), _ML_FINAL),
        },
    ),
    "ml-mamba-scan": PaperTable(
        "ML-Mamba, scans (MSC-MLP Advanced)", "ml-mamba", _ML_COLUMNS,
        {
            "Bidirectional (BSM)": PaperRow("ml-mamba-3b", _tiny("ml-mamba"), _ML_FINAL),
            "Cross (CSM)": PaperRow(
                "ml-mamba-3b-cross", _tiny("ml-mamba", scan="cross"),
                _ml_figures(75.14, 60.13, 52.31, 88.5, 44.89, 51.14),
            ),
        },
    ),
    # Of the same width and states; Mamba-3 has no published weights to start from at full size.
    "ml-mamba-layer": PaperTable(
        "ML-Mamba's language model, of Mamba-2 or Mamba-3", "ml-mamba", _ML_COLUMNS,
        {
            "Mamba-2": PaperRow(None, _tiny("ml-mamba")),
            "Mamba-3": PaperRow(None, _tiny("ml-mamba", layer="mamba3")),
        },
        "Not a table of the paper.",
    ),
}  # fmt: skip
"""Tables by name."""


def table_named(name: str) -> PaperTable:
    """Look up a table.

    Raises:
        ValueError: there is none of that name; the message has the nearest.
    """
    if name not in TABLES:
        raise ValueError(f"no table {name!r}{nearest(name, TABLES)}")
    return TABLES[name]
