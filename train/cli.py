"""The `vlmamba` command."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro

from ..model.vlm import VLM
from .inference import Chat, Convert, Generate, Inspect
from .loop import Interrupted
from .training import Data, Train

Positional = tyro.conf.Positional
PresetName = Literal["quick", "full"]


@dataclass
class Demo:
    """Train a tiny VL-Mamba and ML-Mamba on easy-VQA, evaluate, plot. Interrupted, it resumes."""

    preset: PresetName = "quick"
    """quick: about ten minutes on two cores; full: about an hour."""
    output: Path | None = None
    """Folder of the run; runs/demo-PRESET by default."""
    device: str = "cpu"

    def run(self) -> None:
        from .demo import run_demo
        from .recipes import DEMOS

        run_demo(DEMOS[self.preset], self.output or Path("runs") / f"demo-{self.preset}", self.device)


@dataclass
class Ablate:
    """Compare connectors and scans on easy-VQA, each with the same seeds; print and plot the table."""

    family: Literal["vl-mamba", "ml-mamba"] = "vl-mamba"
    seeds: int = 3
    """How many seeds."""
    preset: PresetName = "quick"
    shorten: float = 1.0
    """Train so many times fewer epochs than the preset."""
    questions: int = 2000
    """Test questions asked."""
    output: Path | None = None
    """Folder of the run; runs/ablate-FAMILY by default. Given again, it resumes."""
    device: str = "cpu"

    def run(self) -> None:
        from .ablate import run_ablation
        from .recipes import DEMOS

        recipe = DEMOS[self.preset].faster(self.shorten)
        folder = self.output or Path("runs") / f"ablate-{self.family}"
        run_ablation(self.family, recipe, folder, range(self.seeds), self.questions, self.device)


@dataclass
class Evaluate:
    """Ask a saved model the first question of every record of a LLaVA file, or of easy-VQA's test set."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    data: Path | None = None
    """Conversations in LLaVA's format; easy-VQA's test questions by default."""
    images: Path | None = None
    batch_size: int = 256
    max_new_tokens: int = 32
    device: str = "auto"
    """auto is a GPU where there is one."""

    def run(self) -> None:
        from . import easy_vqa
        from .data import read_llava
        from .evaluate import answer_all

        records = easy_vqa.load("test") if self.data is None else read_llava(self.data, self.images)
        model = VLM.from_pretrained(self.model, device_map=self.device)
        answers = answer_all(model, records, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if self.data is None:
            for name, share in easy_vqa.scores(records, answers).items():
                print(f"{name:<8} {share:.2%}")
        else:
            right = sum(a.strip() == r.turns[1].text.strip() for a, r in zip(answers, records, strict=True))
            print(f"exact match {right / max(1, len(records)):.2%} of {len(records)}")


COMMANDS = {
    "demo": Demo,
    "data": Data,
    "train": Train,
    "ablate": Ablate,
    "evaluate": Evaluate,
    "generate": Generate,
    "chat": Chat,
    "inspect": Inspect,
    "convert": Convert,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what goes wrong with its input is one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="vlmamba",
            description=f"VL-Mamba and ML-Mamba {version('vl-mamba')}: train, evaluate, talk, look at checkpoints. "
            "Begin with: vlmamba demo",
            args=arguments,
        ).run()
    except Interrupted:
        print("\nvlmamba: stopped and saved; the same command goes on from here", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("\nvlmamba: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Who read the output has seen enough, as `| head` has. What is still to be written has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as e:
        sys.exit(f"vlmamba: {e}")


if __name__ == "__main__":
    main()
