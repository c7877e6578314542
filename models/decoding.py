"""How answers are decoded with transformers: inside a grammar, with the log-probability of every token."""

# S answers side by side, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TextStreamer

from omnimri.models import special_tokens as special
from omnimri.models.boxes import entry_spans, whole_entries
from omnimri.models.prompts import ANSWER_TAGS, untagged


@dataclass(frozen=True, kw_only=True)
class TextAnswer:
    """Generated text."""

    text: str
    """As written, with its special tokens; `readable` is for people."""
    token_ids: list[int]
    """What was decoded behind the opening tag, without the token that ended it."""
    logprob: float
    """Mean log-probability per token, among the tokens that the grammar allowed."""
    box_logprobs: tuple[float, ...] = ()
    """Log-probability of the tokens of each box, in the order of a detection answer."""
    finished: bool = True
    """False where `max_new_tokens` cut it."""

    @property
    def readable(self) -> str:
        return untagged(self.text)


class Recorder(LogitsProcessor):
    """Keeps decoding inside a grammar, if there is one, and notes the log-probability of every token that is taken.

    For one call of transformers' `generate`, which puts it before the temperature: what it notes does not depend on
    how tokens are drawn.
    """

    def __init__(self, new_matcher: Callable[[], LLMatcher] | None = None) -> None:
        self._new_matcher = new_matcher
        self._matchers: list[LLMatcher] = []
        self._before: Tensor | None = None
        self._noted: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(S, V)` with forbidden tokens at minus infinity; `input_ids` `(S, tokens so far)`."""
        self._note(input_ids)
        if self._new_matcher is not None:
            self._matchers = self._matchers or [self._new_matcher() for _ in scores]
            scores = scores.masked_fill(~self._allowed(input_ids, scores.shape[1]).to(scores.device), -torch.inf)
        self._before = scores.float().log_softmax(-1)
        return scores

    def logprobs(self, token_ids: Tensor) -> Tensor:
        """Log-probability of each of the tokens `(S, T)` that `generate` returned."""
        self._note(token_ids)
        self._before = None
        return torch.cat(self._noted, dim=1)

    def _note(self, input_ids: Tensor) -> None:
        if self._before is not None:
            self._noted.append(self._before.gather(1, input_ids[:, -1:]))

    def _allowed(self, input_ids: Tensor, num_tokens: int) -> Tensor:
        rows = []
        for matcher, ids in zip(self._matchers, input_ids, strict=True):
            if input_ids.shape[1] and not matcher.is_stopped():
                matcher.consume_token(int(ids[-1]))
            rows.append(torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)[:num_tokens] > 0)
        return torch.stack(rows)


def matcher_of(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A grammar at its start.

    Raises:
        ValueError: If the grammar cannot be read.
    """
    matcher = LLMatcher(tokenizer, grammar)
    if error := matcher.get_error():
        raise ValueError(f"The grammar cannot be used: {error}")
    return matcher


class PieceStreamer(TextStreamer):
    """Calls a function with each piece of the readable text, as whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        """Called by `generate`."""
        if text:
            self._on_text(text)


def grammar_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> LLTokenizer:
    """The vocabulary as grammars see it, padded to the model's; it takes a second for a large one."""
    return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=stop_tokens(tokenizer))


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the end of the turn, and the closing tags."""
    return tokenizer.convert_tokens_to_ids([special.TURN_END, special.BBOX_END, special.RESPONSE_END])


def assemble(
    tokenizer: PreTrainedTokenizerBase, task: str, token_ids: Sequence[int], logprobs: Sequence[float]
) -> TextAnswer:
    """The answer that was decoded behind its opening tag, up to the first token that ends it.

    A detection answer that was cut keeps the boxes that are whole.

    Args:
        tokenizer: That of the model.
        task: Of the prompt.
        token_ids: As decoded.
        logprobs: Of each of them.
    """
    stops, (opening, closing) = stop_tokens(tokenizer), ANSWER_TAGS[task]
    ends = [place for place, token in enumerate(token_ids) if token in stops]
    finished = bool(ends)
    ids = [int(token) for token in token_ids[: ends[0] if finished else None]]
    taken = [float(value) for value in logprobs[: len(ids)]]
    body = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    scores: tuple[float, ...] = ()
    if task == "detect":
        scores = _box_logprobs(tokenizer, ids, taken)
        body = body if finished else whole_entries(body)
    return TextAnswer(
        text=f"{opening}{body}{closing if finished or task == 'detect' else ''}", token_ids=ids,
        logprob=math.fsum(taken) / max(1, len(taken)), box_logprobs=scores, finished=finished,
    )  # fmt: skip


def _box_logprobs(tokenizer: PreTrainedTokenizerBase, ids: list[int], logprobs: list[float]) -> tuple[float, ...]:
    """Sum over the tokens of each box and of what announces it; a byte-level token has one letter per byte."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    ends = list(accumulate(map(len, tokens)))
    return tuple(
        math.fsum(
            p for p, end, token in zip(logprobs, ends, tokens, strict=True) if end > low and end - len(token) < high
        )
        for low, high in entry_spans("".join(tokens))
    )
