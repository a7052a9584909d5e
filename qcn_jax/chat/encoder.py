"""Conversations as token ids: what the model saw, what it wrote, and which tokens the loss counts.

A conversation is encoded piece by piece: the template's frame and line tokens that a scaffold wrote may become added
tokens; statements, file contents and test output may not, whatever they spell. Apart from that the ids are those of
the whole rendered text. The assistant's turns are encoded on their own, so a prompt, sampled ids and the encoded
observations, one behind the other, are exactly what `encode` gives for the finished conversation.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcn_jax.agents.scaffolds import MAX_LINE_TOKENS, line_token
from qcn_jax.chat import rendering, templates
from qcn_jax.chat.tokenizer import TURN_END, Tokenizer

Message = Mapping[str, Any]

# Tags of the native tool-call form: the template itself escapes them where a value could be misread.
_CALL_TAGS = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")


class ChatEncoder:
    """Encodes conversations with one tokenizer.

    Messages are chat.rendering's, with three further keys: `numbered` (or a content part's) says that line tokens at the
    beginning of lines, counted from 1, are the scaffold's; `template` names the tool-call template of an assistant's
    `tool_calls`; an assistant's content without `tool_calls` is what it wrote, byte for byte.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.id(TURN_END)
        self._ids = tokenizer.added_tokens
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)))
        self._added_in_values = re.compile(
            "|".join(re.escape(token) for token in longest_first if token not in _CALL_TAGS)
        )
        self._line_tokens = {line_token(number) for number in range(1, MAX_LINE_TOKENS + 1)} & set(self._ids)
        self._encode_ordinary = functools.lru_cache(maxsize=1 << 16)(tokenizer.encode_ordinary)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Ids of the conversation so far and the opening of the assistant's next turn."""
        return [id_ for ids, _ in self._pieces(messages, tools, prompt=True) for id_ in ids]

    def encode_turn(self, observation: Sequence[Message], closed: bool = True) -> list[int]:
        """Ids to append after a sampled turn, up to the opening of the next one.

        Args:
          observation: messages that follow the turn.
          closed: the sampled ids end with `<|im_end|>`; otherwise it comes first here (and is not trained on).
        """
        before: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        pieces = list(self._pieces([*before, *observation], None, prompt=True))
        start = next(i for i, (_, generated) in enumerate(pieces) if generated) + 1
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
          tokens int32 [T] and weights float32 [T]: 1 where the next token is the assistant's own (its `<|im_end|>`
          included), else 0.
        """
        tokens: list[int] = []
        own: list[bool] = []
        for ids, generated in self._pieces(messages, tools, prompt=False):
            tokens += ids
            own += [generated] * len(ids)
        return {
            "tokens": np.asarray(tokens, np.int32),
            "weights": np.asarray([*own[1:], False][: len(own)], np.float32),
        }

    def _pieces(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, prompt: bool
    ) -> Iterator[tuple[list[int], bool]]:
        """(ids, whether the assistant wrote them) of maximal runs of one author."""
        assistants = [message for message in messages if message["role"] == "assistant"]
        others = [message for message in messages if message["role"] != "assistant"]
        bare = [{"role": "assistant", "content": ""} if m["role"] == "assistant" else m for m in messages]
        mark = _unused_letter(messages)
        text = ""
        for segment in rendering.segments(bare, tools, prompt):
            if segment.kind == "generated":
                yield self._encode(text, mark), False
                yield self.encode_answer(assistants.pop(0)), True
                text = ""
            elif segment.kind == "text":
                text += self._untrusted(others.pop(0), mark)
            else:
                text += segment.text
        yield self._encode(text, mark), False

    def _untrusted(self, message: Message, mark: str) -> str:
        content = message.get("content") or ""
        if isinstance(content, str):
            return self._guard(content, mark, bool(message.get("numbered")))
        return "".join(self._guard(part["text"], mark, bool(part.get("numbered"))) for part in content)

    def _guard(self, text: str, mark: str, numbered: bool) -> str:
        """`text` with `mark` inside everything that spells an added token, but for the scaffold's line tokens."""
        if not numbered:
            return _broken(self._added, text, mark)
        lines, expected = [], 1
        for line in text.split("\n"):
            token = line_token(expected)
            if token in self._line_tokens and line.startswith(token):
                lines.append(token + _broken(self._added, line[len(token) :], mark))
                expected += 1
            else:
                lines.append(_broken(self._added, line, mark))
        return "\n".join(lines)

    def _assistant(self, message: Message) -> tuple[str, str]:
        """What the assistant wrote, and the mark inside added tokens that are only spelt in its calls' values."""
        content = message.get("content") or ""
        if not message.get("tool_calls"):
            return content, ""
        mark = _unused_letter([message])

        def guard(value: str) -> str:
            # A line number is written as its token; in any other value the spelling of a token is text.
            return value if value in self._line_tokens else _broken(self._added_in_values, value, mark)

        calls = [rendering.ToolCall(call.name, _map_strings(call.arguments, guard))
                 for call in map(_tool_call, message["tool_calls"])]
        return templates.render(message.get("template", templates.NATIVE), content, calls), mark

    def _encode(self, text: str, mark: str) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self._added.finditer(text):
            ids += self._ordinary(text[position : match.start()], mark)
            ids.append(self._ids[match[0]])
            position = match.end()
        return ids + self._ordinary(text[position:], mark)

    def _ordinary(self, text: str, mark: str) -> list[int]:
        if not text:
            return []
        return self._encode_ordinary(text.replace(mark, "") if mark else text)


def _broken(added: re.Pattern[str], text: str, mark: str) -> str:
    """`text` with `mark` behind the first character of every match, until none is left."""
    while added.search(text):
        text = added.sub(lambda match: match[0][0] + mark + match[0][1:], text)
    return text


def _tool_call(call: rendering.ToolCall | Mapping[str, Any]) -> rendering.ToolCall:
    if isinstance(call, rendering.ToolCall):
        return call
    function = call.get("function", call)
    return rendering.ToolCall(function["name"], dict(function["arguments"]))


def _map_strings(value: Any, change: Any) -> Any:
    """`value` with `change` applied to every string in it, keys left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, list | tuple) else value


def _unused_letter(messages: Sequence[Message]) -> str:
    """A letter that no message holds: printable, so that no tool-call template escapes it."""
    text = repr(messages) if len(messages) == 1 else "".join(map(repr, messages))
    return next(letter for code in range(0x10380, 0x12400) if (letter := chr(code)).isalpha() and letter not in text)
