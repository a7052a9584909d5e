"""Assistants' turns in the forms of `call_syntax`, read whole or piece by piece by the same reader."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.chat.call_syntax import IDENTIFIER, Form, content_escape
from qcn_jax.chat.tool_calls import ParsedMessage
from qcn_jax.chat.values import parameter_schemas

LOOKAHEAD = 512  # characters within which calls have begun, or have not: far more than names of tools have


def parse(form: Form, text: str, tools: Sequence[Mapping[str, Any]] | None) -> ParsedMessage:
    """The inverse of `call_syntax.render`, for any text."""
    reader = FormReader(form, tools)
    reader.push(text)
    reader.finish()
    if reader.began:
        reader.message.content = reader.message.content.strip()
    return reader.message


class FormReader:
    """Reads one assistant's turn as it comes; words leave it as soon as nothing that follows can make them a call's.

    A whole text is one piece, so what is streamed and what is read at once cannot differ.

    Attributes:
      message: after `finish`, the turn taken apart; its content is all that `push` and `finish` returned.
    """

    def __init__(self, form: Form, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._form, self._schemas = form, parameter_schemas(tools)
        self._escape = content_escape(form.start.pattern)
        self._text = ""
        self._at = 0  # words up to here have been decided
        self._blanks = ""  # the end of those: only words that more words follow keep theirs
        self._start: int | None = None  # where the calls begin
        self.message = ParsedMessage()

    @property
    def began(self) -> bool:
        """Whether something came that begins calls."""
        return self._start is not None

    def push(self, text: str) -> str:
        """Takes more of the turn; returns the words that are now certain."""
        self._text += text
        return self._words(more=True)

    def finish(self) -> str:
        """Ends the turn; returns the words that were in doubt, among them calls of which none can be read."""
        words = self._words(more=False)
        if self._start is None:
            return words
        end = self._form.read(self._text, self._start, self._schemas, self.message)
        if not self.message.calls:
            rest = self._blanks + self._text[self._start:]
            self.message.content += rest
            return words + rest
        if self._text[end:].strip():
            self.message.problems.append("text after the calls")
        return words

    def _words(self, more: bool) -> str:
        words, text, first = [self._blanks], self._text, self._form.head[0]
        while self._start is None and self._at < len(text):
            at = text.find(first, self._at)
            at = at if at >= 0 else len(text)
            words.append(text[self._at : at])
            self._at = at
            if at == len(text):
                break
            end = min(at + LOOKAHEAD, len(text))
            match = self._form.start.match(text, at, end)
            if not (match and match.end() < len(text)) and more and self._undecided(at):
                break
            # Where a tag that opens a call is the tool's name, only names of known tools open one.
            if match and (not self._schemas or match.groupdict().get("name") in (None, *self._schemas)):
                self._start = at
                break
            words.append(first)
            self._at += 2 if self._escape.marked.match(text, at, end) else 1
        found = "".join(words)
        if more or self._start is not None:
            kept = found.rstrip()
            found, self._blanks = kept, found[len(kept):]
        else:
            self._blanks = ""
        self.message.content += found
        return found

    def _undecided(self, at: int) -> bool:
        """Whether what follows the text can make a call, or a mark, of what stands at `at`."""
        tail, head = self._text[at : at + LOOKAHEAD], self._form.head
        if len(tail) == LOOKAHEAD:
            return False
        tail = tail[0] + tail[1:].lstrip("\\")
        if len(head) == 1:  # the name of a tool follows
            return re.fullmatch(rf"{re.escape(head)}(?:{IDENTIFIER}(?:\(|>[ \t]*)?)?", tail) is not None
        return tail.startswith(head) or head.startswith(tail)
