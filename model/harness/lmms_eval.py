"""Vision-language models in `lmms-eval` (extra `lmms-eval`), as `--model vlmamba`.

    lmms-eval --model vlmamba --model_args pretrained=huangwenjun1994/ML-Mamba,dtype=bfloat16 --batch_size 8 \
        --tasks gqa,scienceqa_img,textvqa_val,pope,mme

`docs/evaluation.md` says what each benchmark's figure means, and which of the papers' are comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, groupby
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..extras import install_command
from ..prompt import IMAGE_MARK
from ..score import batches
from ..vlm import VLM
from . import generation_batches, load, parse_batch_size

try:
    from lmms_eval.api.instance import GenerationResult, Instance  # pyright: ignore[reportMissingImports]
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"this adapter needs lmms-eval: {install_command('lmms-eval')}", name=e.name) from e

MAX_NEW_TOKENS = 1024
"""Default number of tokens to generate, that of the harness's LLaVA."""


def manifest() -> ModelManifest:
    """Return the manifest for the entry point in the group `lmms_eval.models`."""
    return ModelManifest("vlmamba", simple_class_path=f"{HarnessVLM.__module__}.{HarnessVLM.__qualname__}")


class HarnessVLM(lmms):
    """`VLM` for the harness, of its kind "simple": the document's images, and a text.

    Images are at the marks `<image>` of the text; without marks they come before it.

    Args:
        pretrained: name or folder for `VLM.from_pretrained`; or a model.
        revision: of the repository.
        dtype: name of the dtype; the checkpoint's own by default.
        device: a GPU by default, where there is one.
        batch_size: requests per batch.

    Raises:
        ValueError: see `load`; or `batch_size` is not a positive integer. While running: a document with more
            marks than images or fewer, or with something other than an image.
    """

    def __init__(
        self,
        pretrained: str | VLM,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
    ):
        super().__init__()
        self.batch_size = parse_batch_size(batch_size)
        self.model = load(VLM, pretrained, revision, dtype, device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each document's question."""
        results = [""] * len(requests)
        args = [request.args for request in requests]
        prompts = [((context, *document_key), kwargs) for context, kwargs, _, *document_key in args]
        with tqdm(total=len(requests), desc="generate_until") as bar:
            for config, indices in generation_batches(prompts, MAX_NEW_TOKENS, self.batch_size):
                texts, images = zip(*(self._prompt(args[i][0], *args[i][2:]) for i in indices), strict=True)
                for i, text in zip(indices, self.model.generate(texts, images, config), strict=True):
                    results[i] = text
                bar.update(len(indices))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer several rounds, each with the text and image that the task makes of the previous answers."""
        results = []
        for request in tqdm(requests, desc="generate_until_multi_round"):
            context, kwargs, doc_to_visual, doc_to_text, *document_key = request.args
            doc = self._document(*document_key)
            ((config, _),) = generation_batches([(context, kwargs)], MAX_NEW_TOKENS, 1)
            visuals, answers, info = doc_to_visual(doc), [], None
            for n in count(1):
                text, images = _place(context, visuals, document_key)
                answers += self.model.generate([text], [images], config)
                visuals, context, ended, answers, info = doc_to_text(
                    doc, previous_output=answers, round_idx=n, previous_round_info=info
                )
                answers = list(answers)
                if ended:
                    break
            results.append(answers)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Compute the negative log-likelihood of each answer, its end included, and whether it is the greedy one.

        Negative, since the harness takes the minimum over the choices. The choices of a document share its image and
        prompt, which are run once.
        """
        if any(len(request.args) != 6 for request in requests):
            raise ValueError("requests must have an image each: acc_mutual_info, whose have none, is not supported")
        results: list[GenerationResult] = []
        questions = [list(group) for _, group in groupby(requests, lambda r: (r.args[0], *r.args[3:]))]
        with tqdm(total=len(requests), desc="loglikelihood") as bar:
            for batch in batches([len(group) for group in questions], self.batch_size):
                firsts = [group[0].args for group in questions[batch]]
                texts, images = zip(*(self._prompt(first[0], *first[2:]) for first in firsts), strict=True)
                answers = [[self._continuation(*request.args) for request in group] for group in questions[batch]]
                for scores in self.model.score(texts, images, answers, self.batch_size):
                    # The evaluator converts a bare pair to text, but passes on the content of a GenerationResult.
                    results += [GenerationResult((-s.logprob, s.greedy)) for s in scores]
                    bar.update(len(scores))
        return results

    def _document(self, doc_id: int, task: str, split: str) -> dict[str, Any]:
        return self.task_dict[task][split][doc_id]

    def _prompt(self, context: str, doc_to_visual: Any, *document_key: Any) -> tuple[str, list[Image.Image]]:
        return _place(context, doc_to_visual(self._document(*document_key)), document_key)

    def _continuation(
        self, context: str, target: str | Callable[[Any], str], doc_to_visual: Any, *document_key: Any
    ) -> str:
        return target(self._document(*document_key)) if callable(target) else target


def _place(context: str, visuals: list | None, document_key: Any) -> tuple[str, list[Image.Image]]:
    """Return a document's text with a mark for each image, and its images."""
    images = visuals or []
    doc_id, task, split = document_key
    if not all(isinstance(image, Image.Image) for image in images):
        kinds = ", ".join(type(image).__name__ for image in images)
        raise ValueError(f"the model reads images, but document {doc_id} of {task} ({split}) has {kinds}")
    marks = context.count(IMAGE_MARK)
    if not marks:
        return f"{IMAGE_MARK}\n" * len(images) + context, images
    if marks != len(images):
        raise ValueError(f"document {doc_id} of {task} ({split}) has {marks} marks <image> for {len(images)} images")
    return context, images
