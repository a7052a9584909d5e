"""Fill in the middle: the middle of a document is moved behind its surroundings and predicted there.

Three forms, of code and of any other text. Sentinels (Bavarian et al., arXiv 2207.14255), in prefix-suffix-middle order
and with Qwen's tokens:

  <|fim_prefix|>PREFIX<|fim_suffix|>SUFFIX<|fim_middle|>MIDDLE<|endoftext|>

chat, the same tokens inside ChatML:

  <|im_start|>system\nYou are a code completion assistant.<|im_end|>\n
  <|im_start|>user\n<|fim_prefix|>PREFIX<|fim_suffix|>SUFFIX<|fim_middle|><|im_end|>\n
  <|im_start|>assistant\nMIDDLE<|im_end|>\n

and an edit, a user turn with a marked gap and an answer that is a search-and-replace edit of it, which the report finds
better than sentinels inside ChatML at equal size:

  <|im_start|>user\nFill in <|fim_middle|>.\nPATH\nPREFIX<|fim_middle|>SUFFIX<|im_end|>\n
  <|im_start|>assistant\n<|fim_prefix|>SEARCH<|fim_suffix|>REPLACE<|im_end|>\n

SEARCH is the gap with the shortest context that makes it unique, REPLACE the same context with the gap filled.
Loss weights count every token of the sentinel form and the answer alone of the others.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.documents import Request
from qcn_jax.pipeline.data.texts import Text, TextStore

# Middles end at token or line boundaries; both occur, as cursor positions do.
_LINE_SHARE = 0.5
_MAX_MIDDLE = 0.5  # of the document
_SYSTEM = "You are a code completion assistant."
_CONTEXT_CHARACTERS = 24  # on each side of the gap in SEARCH


class Tokenizer(Protocol):
    """What of chat.tokenizer.Tokenizer is used here."""

    def encode_ordinary(self, text: str) -> list[int]: ...

    def id(self, token: str) -> int: ...


@dataclasses.dataclass(frozen=True)
class Span:
    """A text cut in three: prefix + middle + suffix is the text."""

    prefix: str
    middle: str
    suffix: str


def cut(text: str, rng: np.random.Generator) -> Span:
    """Cuts `text` at two random places, line boundaries half of the time; the middle is never empty."""
    if len(text) < 2:
        raise UserError(f"fill in the middle needs at least two characters, got {text!r}")
    if rng.random() < _LINE_SHARE and text.count("\n") > 2:
        ends = [i + 1 for i, character in enumerate(text) if character == "\n"]
        first = int(rng.integers(len(ends) - 1))
        most = max(1, int(_MAX_MIDDLE * len(ends)))
        last = min(first + 1 + int(rng.integers(most)), len(ends) - 1)
        start, stop = ends[first], ends[last]
    else:
        size = 1 + int(rng.integers(max(1, int(_MAX_MIDDLE * len(text)))))
        start = int(rng.integers(len(text) - size + 1))
        stop = start + size
    return Span(text[:start], text[start:stop], text[stop:])


def sentinel(span: Span, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The sentinel form as tokens int32 [n] and weights float32 [n] (of predicting the next token)."""
    special, encode = tokenizer.id, tokenizer.encode_ordinary
    tokens = [special("<|fim_prefix|>"), *encode(span.prefix), special("<|fim_suffix|>"), *encode(span.suffix),
              special("<|fim_middle|>"), *encode(span.middle), special("<|endoftext|>")]
    return _document(tokens, 0)


def search_and_replace(span: Span) -> tuple[str, str]:
    """(before, after): context around the gap, shared by the two sides of the edit.

    Context is widened by whole words of up to a few dozen characters on each side; `before` leaves the
    middle out.
    """
    left = span.prefix[-_CONTEXT_CHARACTERS:]
    if len(left) < len(span.prefix) and " " in left:
        left = left[left.index(" "):]
    right = span.suffix[:_CONTEXT_CHARACTERS]
    if len(right) < len(span.suffix) and " " in right:
        right = right[: right.rindex(" ") + 1]
    return left, right


def chat(span: Span, path: str, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The chat form as tokens int32 [n] and weights float32 [n], zero before the answer; `path` is not shown."""
    special, encode = tokenizer.id, tokenizer.encode_ordinary
    start, end = special("<|im_start|>"), special("<|im_end|>")
    tokens = [start, *encode(f"system\n{_SYSTEM}"), end, *encode("\n"), start, *encode("user\n"),
              special("<|fim_prefix|>"), *encode(span.prefix), special("<|fim_suffix|>"), *encode(span.suffix),
              special("<|fim_middle|>"), end, *encode("\n"), start, *encode("assistant\n")]
    answer = len(tokens)
    return _document([*tokens, *encode(span.middle), end], answer - 1)


def edit(span: Span, path: str, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The edit as tokens int32 [n] and weights float32 [n], zero before the answer."""
    special, encode = tokenizer.id, tokenizer.encode_ordinary
    left, right = search_and_replace(span)
    gap, start, end = special("<|fim_middle|>"), special("<|im_start|>"), special("<|im_end|>")
    tokens = [start, *encode("user\nFill in "), gap, *encode(f".\n{path}\n"), *encode(span.prefix), gap,
              *encode(span.suffix), end, *encode("\n"), start, *encode("assistant\n")]
    answer = len(tokens)
    tokens += [special("<|fim_prefix|>"), *encode(left), gap, *encode(right), special("<|fim_suffix|>"),
               *encode(left + span.middle + right), end]
    return _document(tokens, answer - 1)


def _form(answered: float, answer: Callable[..., dict[str, np.ndarray]]) -> Callable[[Request], "FimDocuments"]:
    def form(request: Request) -> "FimDocuments":
        return FimDocuments(request.texts, request.tokenizer, seed=request.context.config.seed,
                            max_tokens=request.length, answered=answered, answer=answer)

    return form


# The forms of a source: half sentinels and half edits, and one of the three alone.
documents, sentinels, chats, edits = _form(0.5, edit), _form(0.0, edit), _form(1.0, chat), _form(1.0, edit)


class FimDocuments:
    """Random access to FIM documents over texts: index i always gives the same document.

    Documents are windows of at most `max_tokens` of a file, cut at line starts; a share `answered` of them takes the
    form `answer`, chat or edit, the others sentinels.
    """

    def __init__(self, texts: Sequence[Text], tokenizer: Tokenizer, *, seed: int, max_tokens: int,
                 answered: float = 0.5, answer: Callable[..., dict[str, np.ndarray]] = edit) -> None:
        if not any(len(text.text) > 1 for text in texts):
            raise UserError("fill in the middle: there is no text to cut")
        self._texts = texts
        self._tokenizer, self._seed, self._max, self._answered = tokenizer, seed, max_tokens, answered
        self._answer = answer
        self._ends = texts.ends if isinstance(texts, TextStore) else np.cumsum([len(text.text) for text in texts])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self._seed, index])
        # Every part of the corpus is equally likely to be in a window.
        path, text = "", ""
        while len(text) < 2:
            drawn = self._texts[int(np.searchsorted(self._ends, rng.integers(self._ends[-1]), side="right"))]
            path, text = drawn.path, drawn.text
        span_of = self._max * 2  # characters; code has more than two a token, so this mostly fits at once
        begin = int(rng.integers(max(1, len(text) - span_of // 2)))
        begin = text.rfind("\n", 0, begin) + 1
        answered = rng.random() < self._answered
        while True:
            span = cut(_window(text, begin, span_of), rng)
            document = self._answer(span, path, self._tokenizer) if answered else sentinel(span, self._tokenizer)
            if len(document["tokens"]) <= self._max:
                return document
            span_of = span_of * 2 // 3
            if span_of < 8:
                raise UserError(f"fill in the middle: {self._max} tokens hold no document of {path}")


def _window(text: str, begin: int, characters: int) -> str:
    window = text[begin:begin + characters]
    end = window.rfind("\n") + 1
    window = window[:end] if begin + characters < len(text) and end > 1 else window
    return window if len(window) > 1 else text[:max(2, characters)]


def _document(tokens: list[int], first: int) -> dict[str, np.ndarray]:
    weights = np.ones(len(tokens), np.float32)
    weights[:first] = 0.0
    weights[-1] = 0.0
    return {"tokens": np.asarray(tokens, np.int32), "weights": weights}
