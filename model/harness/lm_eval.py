"""Language models in EleutherAI's `lm-eval` (extra `lm-eval`), as `--model vlmamba`.

    python -m vlmamba.model.harness.lm_eval --model vlmamba --batch_size 16 \
        --model_args pretrained=state-spaces/mamba-130m,dtype=bfloat16 \
        --tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande,openbookqa

All arguments are `lm-eval run`'s own. Up to release 0.4.13 `lm-eval` finds no models in other packages, hence the
module; later ones read the entry points of `lm_eval.models`, where this one is, and `lm-eval run` does as well.

Differences from the harness's `hf` and `mamba_ssm` models: sequences are packed instead of padded, and no context is
truncated. The state has one size for any length, so `loglikelihood_rolling` conditions on the entire document, where
those models see windows of 2,048 tokens; and the start token that some tokenizers add is not counted there, as `hf`
does. For such texts and tokenizers, perplexities are not comparable with theirs. All other results are equal up to
rounding.
"""

from __future__ import annotations

from itertools import chain, groupby
from typing import Any

from tqdm import tqdm

from ..extras import install_command
from ..generation.generate import generate_packed
from ..generation.prefill import packed_tokens
from ..lm import MambaLM
from ..score import batches, score
from ..tokenizer import require_tokenizer
from . import generation_batches, load, parse_batch_size

try:
    import lm_eval.models  # noqa: F401  (the harness registers its own models only while there are no others)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"this adapter needs lm-eval: {install_command('lm-eval')}", name=e.name) from e


@register_model("vlmamba")
class HarnessLM(TemplateLM):
    """`MambaLM` for the harness.

    Args:
        pretrained: name or folder for `MambaLM.from_pretrained`; or a model.
        revision: of the repository.
        dtype: name of the dtype; the checkpoint's own by default.
        device: a GPU by default, where there is one.
        batch_size: requests per batch.
        max_gen_toks: default number of tokens to generate.

    Raises:
        ValueError: see `load`; or `batch_size` is not a positive integer.
    """

    def __init__(
        self,
        pretrained: str | MambaLM,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        self.batch_size = parse_batch_size(batch_size)
        self.max_gen_toks = max_gen_toks
        self.model = load(MambaLM, pretrained, revision, dtype, device)
        self.tokenizer = require_tokenizer(self.model)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context: the tokenizer's start token, or else the end-of-text token."""
        return (self.tok_encode("") or [self.eot_token_id])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Encode a text, with the special tokens that the tokenizer's file adds, unless they are turned off."""
        return self.tokenizer.inner.encode(string, add_special_tokens=add_special_tokens is not False).ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        results = []
        # Answers to one context stay together, so that it is run once.
        groups = [list(group) for _, group in groupby(requests, lambda request: request[1])]
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in batches([len(group) for group in groups], self.batch_size):
                texts, contexts, continuations = zip(*chain(*groups[batch]), strict=True)
                # The harness moves trailing spaces to the continuation, so a context of spaces is empty.
                prompts = [context or [self.prefix_token_id] for context in contexts]
                scores = score(self.model, prompts, continuations, self.batch_size)
                for text, found in zip(texts, scores, strict=True):
                    results.append((found.logprob, found.greedy))
                    self.cache_hook.add_partial("loglikelihood", text, results[-1])
                bar.update(len(texts))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-likelihood of each entire text, after `prefix_token_id`."""
        results = []
        with tqdm(total=len(requests), desc="loglikelihood_rolling", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), self.batch_size):
                args = [request.args for request in requests[start : start + self.batch_size]]
                texts = [self.tok_encode(text, add_special_tokens=False) for (text,) in args]
                written = [text for text in texts if text]
                scores = iter(score(self.model, [[self.prefix_token_id]] * len(written), written, self.batch_size))
                for one, text in zip(args, texts, strict=True):
                    results.append(next(scores).logprob if text else 0.0)
                    self.cache_hook.add_partial("loglikelihood_rolling", one, results[-1])
                bar.update(len(args))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a string of `until` or the end-of-text token."""
        results = [""] * len(requests)
        args: list[Any] = [request.args for request in requests]
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for config, indices in generation_batches(args, self.max_gen_toks, self.batch_size):
                prompts = [self.tok_encode(args[i][0]) or [self.prefix_token_id] for i in indices]
                embed, bounds = packed_tokens(self.model, prompts)
                *_, answers = generate_packed(self.model, embed, bounds, prompts, self.tokenizer, config)
                for i, answer in zip(indices, answers, strict=True):
                    results[i] = answer.text
                    self.cache_hook.add_partial("generate_until", args[i], answer.text)
                bar.update(len(indices))
        return results


def main() -> None:
    """Run `lm-eval`'s command line with this model registered."""
    cli_evaluate()


if __name__ == "__main__":
    main()
