"""Answers in the forms of OpenAI's HTTP interface: whole, and as chunks of a stream."""

from __future__ import annotations

import abc
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from ..model.tokenizer import Tokenizer
from .engine import Event, Request, TokenLogprob


class Form(abc.ABC):
    """Form of the answers of one call.

    Args:
        model: name of the model.
        tokenizer: for the texts of tokens.
        with_logprobs: whether log-probabilities were asked for.
        include_usage: whether chunks have a field for the numbers of tokens, which is null in all but the last.
    """

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    """Name of the kind of a whole response."""
    chunk_object: ClassVar[str]
    """Name of the kind of a chunk."""

    def __init__(self, model: str, tokenizer: Tokenizer, with_logprobs: bool, include_usage: bool):
        self.tokenizer, self.with_logprobs, self.include_usage = tokenizer, with_logprobs, include_usage
        self.head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        # All chunks of a stream start alike.
        self.chunk_head = json.dumps({**self.head, "object": self.chunk_object})[:-1]

    def whole(self, answers: Sequence[Event], requests: Sequence[Request]) -> dict[str, Any]:
        """Return the response with complete answers."""
        choices = [self._choice(i, answer, self._whole_content(answer)) for i, answer in enumerate(answers)]
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": usage(requests)}

    def opening(self, n: int) -> list[bytes]:
        """Return the chunks that open n answers."""
        return []

    def chunk(self, index: int, event: Event) -> bytes:
        """Return the chunk of an event."""
        return self._chunk([self._choice(index, event, self._new_content(event))])

    def usage_chunk(self, requests: Sequence[Request]) -> bytes:
        """Return the chunk with the numbers of tokens, which ends a stream."""
        return self._chunk([], usage(requests))

    def _chunk(self, choices: list[dict[str, Any]], numbers: dict[str, Any] | None = None) -> bytes:
        fields = {"usage": numbers} if self.include_usage else {}
        return f"{self.chunk_head}, {json.dumps({'choices': choices, **fields})[1:]}".encode()

    def _choice(self, index: int, event: Event, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(index, event.logprobs) if self.with_logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": event.finish}

    @abc.abstractmethod
    def _whole_content(self, event: Event) -> dict[str, Any]:
        """Return the fields of a complete answer's text."""

    @abc.abstractmethod
    def _new_content(self, event: Event) -> dict[str, Any]:
        """Return the fields of a chunk's text."""

    @abc.abstractmethod
    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the log-probabilities of an answer's next tokens."""


class ChatForm(Form):
    """Form of `/v1/chat/completions`."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, n: int) -> list[bytes]:
        content = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(i, Event(), content)]) for i in range(n)]

    def _whole_content(self, event: Event) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": event.text, "refusal": None}}

    def _new_content(self, event: Event) -> dict[str, Any]:
        return {"delta": {"content": event.text} if event.text else {}}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {**self._token(p.token, p.logprob), "top_logprobs": [self._token(t, v) for t, v in p.top]} for p in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        # The bytes of half a character are not known.
        known = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}


class CompletionForm(Form):
    """Form of `/v1/completions`."""

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, with_logprobs: bool, include_usage: bool):
        super().__init__(model, tokenizer, with_logprobs, include_usage)
        self.offsets: dict[int, int] = {}
        """Length of the text of each answer that was sent."""

    def _whole_content(self, event: Event) -> dict[str, Any]:
        return {"text": event.text}

    _new_content = _whole_content

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
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
