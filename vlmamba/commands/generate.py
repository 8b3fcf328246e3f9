"""`vlmamba generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..command_line import printable
from ..model.fields import Size
from ..model.generation.config import GenerationConfig
from .options import Group, Loading, Positional, Sampling
from .streaming import hold_first

if TYPE_CHECKING:
    from PIL import Image

    from ..model.generation.speculative import DraftStats
    from ..model.lm import MambaLM
    from ..model.video import Video
    from ..model.vlm import VLM


@dataclass
class Generate:
    """Answer a question, with or without an image, or a file of them in batches. Language models continue a text.

    Examples:
    $ vlmamba generate state-spaces/mamba-130m "The capital of France is" --max-new-tokens 20
    $ vlmamba generate runs/mine/model "what color is it?" --image picture.png
    $ vlmamba generate runs/mine/model --prompts questions.jsonl --output answers.jsonl
    """

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    prompt: Positional[str | None] = None
    """The question, or the text to continue."""
    image: tuple[Path, ...] = ()
    """Images that the question is about, each at its mark <image>; one alone needs no mark. With --prompts: the images
    of each prompt that names none."""
    video: tuple[Path, ...] = ()
    """Videos that the question is about, folders of frames or animated files; their marks follow those of images."""
    prompts: Path | None = None
    """File of prompts, one a line; or JSONL, records with "prompt" and perhaps "image", a path relative to the file or
    a list of them.
    Answers are printed as JSONL; a prompt that cannot be answered has an "error" in place of the "answer"."""
    output: Path | None = None
    """JSONL file that the answers to --prompts are appended to. The same command resumes it."""
    batch_size: Size = 8
    """Prompts of a file that are answered together."""
    draft: str | None = None
    """Smaller model of the same kind and with the same tokenizer, which proposes tokens: the text has the same
    distribution, in fewer steps. How many tokens were accepted is printed to stderr."""
    sampling: Sampling = GenerationConfig()
    loading: Group[Loading] = Loading()

    def run(self) -> None:
        """Answer the prompt, or those of the file. Answers already written stay where a signal ends it."""
        from ..model.generation.speculative import DraftStats
        from ..model.image import open_image
        from ..model.prompt import Turn, mark_images
        from ..model.video import Video
        from .loading import load_with_tokenizer
        from .prompt_file import answer_prompts, check_text

        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either a prompt or --prompts FILE")
        if self.output is not None and self.prompts is None:
            raise ValueError("--output is for the answers to --prompts")
        if self.video and self.prompts is not None:
            raise ValueError("--video is for one prompt, and not for --prompts")
        if self.draft is not None and self.prompts is not None:
            raise ValueError("--draft is for a single prompt, not for --prompts")
        if self.prompts is not None:
            answer_prompts(self, lambda: load_with_tokenizer(self.model, self.loading))
            return
        assert self.prompt is not None
        check_text(self.prompt)
        # Broken images, and those without a place, are reported before the model is loaded.
        if self.image or self.video:
            mark_images([Turn("user", self.prompt)], len(self.image) + len(self.video))
        images: list[Image.Image | Video] = [open_image(image) for image in self.image]
        for path in self.video:
            images.append(Video(path))
            Video(path).frames(1)
        model = load_with_tokenizer(self.model, self.loading)
        draft = None if self.draft is None else load_with_tokenizer(self.draft, self.loading)
        stats = DraftStats()
        for text in hold_first(_stream(model, self.prompt, images, self.sampling, draft, stats)):
            print(printable(text), end="", flush=True)
        print()
        if draft is not None:
            print(f"draft: {stats}", file=sys.stderr)


def _stream(
    model: MambaLM | VLM,
    prompt: str,
    images: list[Image.Image | Video],
    config: GenerationConfig,
    draft: MambaLM | VLM | None,
    stats: DraftStats,
) -> Iterator[str]:
    from ..model.vlm import VLM

    if isinstance(model, VLM) and isinstance(draft, VLM):
        model.share_encoders(draft)
    if isinstance(model, VLM) and (draft is None or isinstance(draft, VLM)):
        return model.stream(prompt, images, config, draft_model=draft, draft_stats=stats)
    if isinstance(model, VLM) or isinstance(draft, VLM):
        raise ValueError("--draft must be a model of the same kind: one takes images, and the other does not")
    if images:
        raise ValueError(f"the model is a language model and takes no image, got {len(images)} of them")
    return model.stream(prompt, config, draft_model=draft, draft_stats=stats)
