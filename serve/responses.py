"""Answers in the forms of OpenAI's HTTP interface: whole, and as chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..model.tokenizer import Tokenizer
from .engine import Event, FinishReason, Request, TokenLogprob


class Answer:
    """Text, log-probabilities and end of one request, while its events arrive."""

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.finish: FinishReason | None = None

    def add(self, event: Event) -> None:
        """Append an event."""
        self.text += event.text
        self.logprobs += event.logprobs
        self.finish = event.finish


class ChatForm:
    """Form of `/v1/chat/completions`.

    Args:
        model: name of the model.
        tokenizer: for the texts of tokens.
        with_logprobs: whether log-probabilities were asked for.
    """

    def __init__(self, model: str, tokenizer: Tokenizer, with_logprobs: bool):
        self.tokenizer, self.with_logprobs = tokenizer, with_logprobs
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer], requests: Sequence[Request]) -> dict[str, Any]:
        """Return the response with complete answers."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish,
            }
            for i, answer in enumerate(answers)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(requests)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""}, (), None)

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """Return the chunk of an event."""
        return self._chunk(index, {"content": event.text} if event.text else {}, event.logprobs, event.finish)

    def usage_chunk(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens, which ends a stream."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(requests)}

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: Sequence[TokenLogprob], finish: FinishReason | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": finish}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = [
            {**self._token(p.token, p.logprob), "top_logprobs": [self._token(t, v) for t, v in p.top]} for p in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        # The bytes of half a character are not known.
        known = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}


class CompletionForm:
    """Form of `/v1/completions`.

    Args:
        model: name of the model.
        tokenizer: for the texts of tokens.
        with_logprobs: whether log-probabilities were asked for.
    """

    def __init__(self, model: str, tokenizer: Tokenizer, with_logprobs: bool):
        self.tokenizer, self.with_logprobs = tokenizer, with_logprobs
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self.offsets: dict[int, int] = {}
        """Length of the text of each answer that was sent."""

    def whole(self, answers: Sequence[Answer], requests: Sequence[Request]) -> dict[str, Any]:
        """Return the response with complete answers."""
        choices = [self._choice(i, a.text, a.logprobs, a.finish) for i, a in enumerate(answers)]
        return {**self.head, "choices": choices, "usage": usage(requests)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return None: no chunk opens an answer."""
        return None

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """Return the chunk of an event."""
        return {**self.head, "choices": [self._choice(index, event.text, event.logprobs, event.finish)]}

    def usage_chunk(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens, which ends a stream."""
        return {**self.head, "choices": [], "usage": usage(requests)}

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], finish: FinishReason | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, logprobs), "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        texts = [token_text(self.tokenizer, p.token) for p in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self.offsets.get(index, 0))
            self.offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [p.logprob for p in logprobs],
            "top_logprobs": [{token_text(self.tokenizer, t): v for t, v in p.top} for p in logprobs],
            "text_offset": offsets,
        }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of one token; that of the end of text is its name."""
    return tokenizer.eos if token == tokenizer.eos_id else tokenizer.decode([token])


def usage(requests: Sequence[Request]) -> dict[str, Any]:
    """Return the numbers of tokens of requests, together."""
    prompt, new = sum(len(r.prompt.ids) for r in requests), sum(r.new_tokens for r in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in requests)},
    }
