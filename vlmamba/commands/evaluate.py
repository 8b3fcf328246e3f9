"""`vlmamba evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..model.fields import Interval, Size
from .options import Positional


@dataclass
class Evaluate:
    """Ask a saved model the first question of every record of a LLaVA file, or of easy-VQA's test set."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    data: Path | None = None
    """Conversations in LLaVA's format; easy-VQA's test questions by default."""
    images: Path | None = None
    """Folder or archive that image paths in the data are relative to; the file's own folder by default."""
    batch_size: Size = 256
    max_new_tokens: Annotated[int, Interval("[0, inf)")] = 32
    device: str = "auto"
    """auto is a GPU where there is one."""

    def run(self) -> None:
        from ..model.device import device_named
        from ..model.vlm import VLM
        from ..train import easy_vqa
        from ..train.evaluate import answer_all
        from ..train.records import read_llava

        records = easy_vqa.load("test") if self.data is None else read_llava(self.data, self.images)
        if not len(records):
            raise ValueError(f"no records in {self.data}")
        model = VLM.from_pretrained(self.model, device_map=device_named(self.device))
        answers = answer_all(model, records, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if self.data is None:
            for name, share in easy_vqa.scores(records, answers).items():
                print(f"{name:<8} {share:.2%}")
        else:
            # turns[1] is the answer to the first question.
            correct = sum(a.strip() == r.turns[1].text.strip() for a, r in zip(answers, records, strict=True))
            print(f"exact match {correct / len(records):.2%} of {len(records)}")
