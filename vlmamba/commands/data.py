"""`vlmamba data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import Positional


@dataclass
class Data:
    """Write a dataset in LLaVA's format, to train and evaluate on.

    Examples:
    $ vlmamba data easy-vqa data
    """

    name: Positional[Literal["easy-vqa"]]
    """easy-vqa: 5,000 images of one shape and 48,248 questions, from the package of that name."""
    folder: Positional[Path]
    """Folder for the annotations and images."""

    def run(self) -> None:
        from ..train.easy_vqa import export

        print(f"wrote {', '.join(map(str, export(self.folder)))}; images are in {self.folder / 'images'}")
