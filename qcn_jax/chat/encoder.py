"""Conversations as token ids: what the model saw, what it wrote, and which tokens the loss counts.

A conversation is encoded piece by piece: the template's frame and what a scaffold marks as its own may become added
tokens; statements, file contents and test output may not, whatever they spell. Apart from that the ids are those of
the whole rendered text. The assistant's turns are encoded on their own, so a prompt, sampled ids and the encoded
observations, one behind the other, are exactly what `encode` gives for the finished conversation.
"""

import abc
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcn_jax.chat import rendering, templates
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Tokenizer
from qcn_jax.errors import UserError

Message = Mapping[str, Any]

_SHORT = 4096  # characters of a text whose ids are kept: those of a server's long prompts would fill its memory
_TURNS = (END_OF_TEXT, TURN_START, TURN_END)  # the frame's alone: no content, of whatever kind, ends a turn
# Tags of the native tool-call form: the template itself escapes them where a value could be misread.
_CALL_TAGS = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")


class Encoder(abc.ABC):
    """What encoders of conversations share: which text may become added tokens.

    Attributes:
      end: id of the token that ends a turn; -1 where there is none.
      ends: ids with any of which an assistant ends its turn; empty where there is none.
      stops: ids after which nothing more is generated: `ends` and the end of a text.
      calls: the form of tool calls in which an assistant acts (chat.templates); None where none is known.
    """

    end: int
    ends: frozenset[int]
    stops: frozenset[int]
    calls: str | None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids = tokenizer.added_tokens
        self.stops = frozenset(self._ids[token] for token in (END_OF_TEXT,) if token in self._ids)
        self._added = any_of(self._ids)
        self._turns = any_of(_TURNS)  # what no text of a message becomes
        self._encode_short = functools.lru_cache(maxsize=1 << 16)(tokenizer.encode_ordinary)

    @abc.abstractmethod
    def encode(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, np.ndarray]:
        """A whole conversation as a document for packing: tokens int32 [T], weights float32 [T] of the next token."""

    @abc.abstractmethod
    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None,
                      trusted: bool = True) -> list[int]:
        """Ids of the conversation so far and the opening of the assistant's next turn."""

    @abc.abstractmethod
    def encode_turn(self, observation: Sequence[Message], closed: bool = True,
                    calls: Sequence[rendering.ToolCall] = ()) -> list[int]:
        """Ids to append after a sampled turn, up to the opening of the next one.

        Args:
          observation: messages that follow the turn.
          closed: the sampled ids end with one of `ends`; otherwise `end` comes first here (and is not trained on).
          calls: those of the turn, where the template names them once more beside their results.
        """

    def spoken(self, text: str) -> str:
        """What of a sampled turn's text is meant for others: all but reasoning."""
        return text

    def _untrusted(self, message: Message, mark: str) -> str:
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        # A mark between parts, too: what is spelt across them is text.
        return mark.join(["", *(broken(self._turns if part.get("special") else self._added, part["text"], mark)
                                for part in parts), ""])

    def _encode(self, text: str, mark: str) -> list[int]:
        """Ids of `text`, whose added tokens are meant; `mark` is left out."""
        ids: list[int] = []
        position = 0
        for match in self._added.finditer(text):
            ids += self._ordinary(text[position : match.start()], mark)
            ids.append(self._ids[match[0]])
            position = match.end()
        return ids + self._ordinary(text[position:], mark)

    def _ordinary(self, text: str, mark: str) -> list[int]:
        text = text.replace(mark, "") if mark else text
        if not text:
            return []
        return self._encode_short(text) if len(text) <= _SHORT else self.tokenizer.encode_ordinary(text)


class ChatEncoder(Encoder):
    """Encodes conversations with one tokenizer.

    Messages are chat.rendering's, with further keys: a content part's `special` says that its text is the
    scaffold's own and that added tokens in it are meant; a tool call's `special` lists arguments of which the same
    holds for the whole value; `template` names the tool-call template of an assistant's `tool_calls`. An assistant's
    content without `tool_calls` is what it wrote, byte for byte; its `weight`, by default 1, is that of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.end = tokenizer.id(TURN_END)
        self.ends, self.calls = frozenset({self.end}), templates.NATIVE
        self.stops |= self.ends
        self._added_in_values = any_of(token for token in self._ids if token not in _CALL_TAGS)
        self._special_values = set(self._ids) - {*_TURNS, *_CALL_TAGS}

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, trusted: bool = True
    ) -> list[int]:
        """Ids of the conversation so far and the opening of the assistant's next turn.

        Args:
          trusted: whether assistants' turns are the model's own; otherwise what they say is text, whatever it spells.
        """
        return [id_ for ids, _ in self._pieces(messages, tools, True, trusted) for id_ in ids]

    def encode_turn(self, observation: Sequence[Message], closed: bool = True,
                    calls: Sequence[rendering.ToolCall] = ()) -> list[int]:
        """See Encoder.encode_turn."""
        before: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        pieces = list(self._pieces([*before, *observation], None, prompt=True))
        start = next(i for i, (_, weight) in enumerate(pieces) if weight) + 1
        ids = [id_ for piece, _ in pieces[start:] for id_ in piece]
        return ids if closed else [self.end, *ids]

    def encode_answer(self, message: Message) -> list[int]:
        """Ids of one assistant turn, `<|im_end|>` included."""
        return [*self._encode(*self._assistant(message)), self.end]

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, np.ndarray]:
        """A whole conversation as a document for packing.

        Returns:
          tokens int32 [T] and weights float32 [T]: the message's weight where the next token is the assistant's own
          (its `<|im_end|>` included), else 0.

        Raises:
          UserError: a message that cannot be written; an assistant's reasoning, for which there is no place.
        """
        for number, message in enumerate(messages):
            if message.get("reasoning_content"):
                raise UserError(f"messages[{number}].reasoning_content: Qwen3-Coder's template has no place for it; "
                                "the source's options.reasoning=drop leaves it out")
        tokens: list[int] = []
        own: list[float] = []
        for ids, weight in self._pieces(messages, tools, prompt=False):
            tokens += ids
            own += [weight] * len(ids)
        return {
            "tokens": np.asarray(tokens, np.int32),
            "weights": np.asarray([*own[1:], 0.0][: len(own)], np.float32),
        }

    def _pieces(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, prompt: bool, trusted: bool = True
    ) -> Iterator[tuple[list[int], float]]:
        """(ids, their weight, which is 0 where no assistant wrote them) of maximal runs of one author."""
        own = [isinstance(message, Mapping) and message.get("role") == "assistant" for message in messages]
        assistants = [(index, message) for index, message in enumerate(messages) if own[index]]
        others = [message for index, message in enumerate(messages) if not own[index]]
        bare = [{"role": "assistant", "content": ""} if own[i] else message for i, message in enumerate(messages)]
        (mark,) = unused_letters([*messages, *(tools or ())], 1)
        text = ""
        for segment in rendering.segments(bare, tools, prompt):
            if segment.kind == "generated":
                index, answer = assistants.pop(0)
                yield self._encode(text, mark), 0.0
                yield [*self._encode(*self._assistant(answer, index, trusted)), self.end], answer.get("weight", 1.0)
                text = ""
            elif segment.kind == "tools":
                text += self._guarded(segment.text, mark)
            elif segment.kind == "text":
                text += self._untrusted(others.pop(0), mark)
            else:
                text += segment.text
        yield self._encode(text, mark), 0.0

    def _guarded(self, text: str, mark: str) -> str:
        """`text` with marks, so that no added token is read in it, nor across its ends."""
        return mark + broken(self._added, text, mark) + mark

    def _assistant(self, message: Message, index: int = 0, trusted: bool = True) -> tuple[str, str]:
        """What the assistant wrote, and the mark inside added tokens that are only spelt in it."""
        content, calls = rendering.text_of(message, index), rendering.tool_calls_of(message, index)
        if trusted and not calls:
            return content, ""
        (mark,) = unused_letters([message], 1)
        if not trusted:
            guard = lambda text: self._guarded(text, mark)
            return rendering.render_assistant(content, calls, guard) if calls else guard(content), mark
        guard = lambda value: broken(self._added_in_values, value, mark)
        guarded = []
        for written, call in zip(message["tool_calls"], calls, strict=True):
            special = () if isinstance(written, rendering.ToolCall) else written.get("special", ())
            guarded.append(rendering.ToolCall(call.name, {
                name: value if name in special and isinstance(value, str) and value in self._special_values
                else map_strings(value, guard, keys=True)
                for name, value in call.arguments.items()}))
        return templates.render(message.get("template", templates.NATIVE), content, guarded), mark


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of `tokens`, the longest that begins at a place; those of one character are text like any other."""
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def broken(added: re.Pattern[str], text: str, mark: str) -> str:
    """`text` with `mark` behind the first character of every match, until none is left."""
    while added.search(text):
        text = added.sub(lambda match: match[0][0] + mark + match[0][1:], text)
    return text


def tool_call(call: rendering.ToolCall | Mapping[str, Any]) -> rendering.ToolCall:
    """A call of a message, in either form that messages have it in."""
    if isinstance(call, rendering.ToolCall):
        return call
    function = call.get("function", call)
    return rendering.ToolCall(function["name"], dict(function["arguments"]))


def map_strings(value: Any, change: Callable[[str], str], keys: bool = False) -> Any:
    """`value` with `change` applied to every string in it, and to the keys of mappings where `keys` is true."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if keys and isinstance(key, str) else key: map_strings(item, change, keys)
                for key, item in value.items()}
    return [map_strings(item, change, keys) for item in value] if isinstance(value, list | tuple) else value


def unused_letters(values: Sequence[Any], count: int) -> list[str]:
    """Letters that none of `values` holds: printable, so that no template escapes them.

    Raises:
      UserError: they hold all but fewer than `count` of those that would do.
    """
    texts = [repr(value) for value in values]
    used: set[str] = set().union(*(set(text) for text in texts if not text.isascii()))
    letters = filter(str.isalpha, map(chr, range(0x10380, 0x12400)))
    free = list(itertools.islice((letter for letter in letters if letter not in used), count))
    if len(free) < count:
        raise UserError("messages: hold every letter of the scripts from U+10380 to U+123FF")
    return free
