"""Fine-tuning a vision-language model on your own images and questions, from Python.

    python examples/finetune_vlm.py

The data and the model are made here, so that it runs anywhere. With files of your own, the command does the same:
vlmamba train MODEL data.json --output runs/mine
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from vlmamba.model import VLM, GenerationConfig, Tokenizer, collate
from vlmamba.train.config import StageConfig
from vlmamba.train.loop import train_stage
from vlmamba.train.recipes import tiny_config
from vlmamba.train.records import read_llava
from vlmamba.train.samples import Conversations

COLORS, QUESTION = ("red", "green", "blue"), "What color is it?"


def write_data(folder: Path) -> Path:
    """Write one image of each color, and conversations about them in LLaVA's format."""
    records = []
    for color in COLORS:
        Image.new("RGB", (48, 48), color).save(folder / f"{color}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": color}]
        records.append({"image": f"{color}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def new_model() -> VLM:
    """Build a tiny VL-Mamba; a pretrained one is `VLM.from_pretrained(folder_or_name)`."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([QUESTION, *COLORS], vocab_size=280)
    return VLM(tiny_config("vl-mamba", tokenizer.vocab_size), tokenizer)


def finetune(folder: Path, epochs: float = 60) -> list[str]:
    """Train on the data, save the model, load it, and return its answer about each image."""
    model, data = new_model(), read_llava(write_data(folder))
    # The prefix "" trains everything. A pretrained encoder stays frozen: ("connector", "language_model").
    stage = StageConfig("finetune", ("",), lr=3e-3, epochs=epochs, batch_size=3)
    train_stage(model, stage, Conversations(data, model), collate, folder / "finetune")  # called again, it resumes
    model.eval().save_pretrained(folder / "model")
    images = [folder / f"{color}.png" for color in COLORS]
    return VLM.from_pretrained(folder / "model").generate([QUESTION] * 3, images, GenerationConfig(max_new_tokens=8))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(*zip(COLORS, finetune(Path(folder)), strict=True))
