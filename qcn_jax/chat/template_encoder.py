"""Conversations as token ids under a chat template of somebody else's, and which of them the loss counts.

What an assistant wrote is found without knowing the template, from what it renders:

  - where it marks that itself ({% generation %}), from its marks;
  - else by rendering the conversation a second time with a letter in place of everything that assistants wrote: what
    both renderings share is the frame, what the first has instead of the letter is the assistant's, together with the
    token that ends its turn;
  - and where the frame depends on what was written, by rendering prefixes: what a prefix that ends with the message
    has beyond one that ends with the opening of its turn.

Whatever fits none of these, and whatever the template leaves out, is refused. What somebody's text spells never
becomes an added token, as in `encoder`.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcn_jax import files
from qcn_jax.chat import rendering, templates
from qcn_jax.chat.encoder import ChatEncoder, Encoder, Message, any_of, broken, map_strings, tool_call, unused_letters
from qcn_jax.chat.folder_template import FolderTemplate
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.errors import UserError

Piece = tuple[str, float]  # a text and its weight, which is 0 where no assistant wrote it
_PROBE: Message = {"role": "user", "content": "?"}
_WORD = "qcnprobe"  # that no template holds
_CALL, _CALL_ID = ToolCall(_WORD, {"text": "a b", "count": 3}), "qcnprobe1"  # nine letters and digits, as some demand
_TOOL = {"type": "function", "function": {"name": _WORD, "description": "?", "parameters": {
    "type": "object", "required": [], "properties": {
        "text": {"type": "string", "description": "?"}, "count": {"type": "integer", "description": "?"}}}}}
_REASONED = "</think>"  # what ends reasoning in templates that show it


class TemplateEncoder(Encoder):
    """Encodes conversations with one tokenizer and one template; messages are ChatEncoder's.

    An assistant's `reasoning_content` goes to the template. Tool calls that name a `template` are written as text.
    """

    def __init__(self, tokenizer: Tokenizer, template: FolderTemplate) -> None:
        super().__init__(tokenizer)
        self._template = template
        end = (self._end or "").strip()
        self.end = self._ids.get(end, -1)
        self._turns = any_of(tokenizer.special_tokens | {end})
        self.stops |= self.ends

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
               ) -> dict[str, np.ndarray]:
        """A whole conversation as a document for packing.

        Returns:
          tokens int32 [T] and weights float32 [T]: the message's weight where the next token is the assistant's own,
          the end of its turn included, else 0.

        Raises:
          UserError: the template refuses the conversation or leaves something of it out, or it cannot be told which
            tokens are the assistants'.
        """
        mark, *letters = unused_letters([*messages, *(tools or ())], 3)
        shown = [self._shown(message, mark) for message in messages]
        listed = [self._listed(tool, mark) for tool in tools] if tools else None
        self._check_places(shown, listed, letters[0])
        tokens: list[int] = []
        own: list[float] = []
        weights = [message.get("weight", 1.0) for message in messages if message["role"] == "assistant"]
        for text, weight in self._pieces(shown, listed, letters, weights):
            ids = self._encode(text, mark)
            tokens += ids
            own += [weight] * len(ids)
        return {"tokens": np.asarray(tokens, np.int32), "weights": np.asarray([*own[1:], 0.0][:len(own)], np.float32)}

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None,
                      trusted: bool = True) -> list[int]:
        """Ids of the conversation so far and the opening of the assistant's next turn.

        Args:
          trusted: whether assistants' turns are the model's own; otherwise what they say is text, whatever it spells.

        Raises:
          UserError: a malformed message; the template refuses the conversation or leaves something of it out.
        """
        for _ in rendering.segments(messages, tools, add_generation_prompt=True):
            pass  # refuses what is malformed under any template
        mark, letter = unused_letters([*messages, *(tools or ())], 2)
        written = [self._written(message, index) for index, message in enumerate(messages)]
        shown = [self._shown(message, mark, self._turns if trusted else self._added) for message in written]
        listed = [self._listed(tool, mark) for tool in tools] if tools else None
        self._check_places(shown, listed, letter)
        return self._encode(self._template.render(shown, listed, add_generation_prompt=True), mark)

    def encode_turn(self, observation: Sequence[Message], closed: bool = True, calls: Sequence[ToolCall] = ()
                    ) -> list[int]:
        """See Encoder.encode_turn: what the template writes behind the end of an assistant's turn.

        Raises:
          UserError: the template refuses the messages or leaves something of them out, or ends no turn with a token.
        """
        mark, letter = unused_letters([*observation, *calls], 2)
        said: dict[str, Any] = {"role": "assistant", "content": _WORD}
        if calls and self._has_tools:
            said["tool_calls"] = [self._called(call, {"id": _CALL_ID}, mark) for call in calls]
        shown = [_PROBE, said, *(self._shown(message, mark) for message in observation)]
        self._check_places(shown, None, letter)
        text = self._template.render(shown, add_generation_prompt=True)
        end = self._any_end.search(text, text.index(_WORD))
        if end is None:
            raise UserError(f"the chat template of {self._template.where} ends no turn with a token")
        ids = self._encode(text[end.end():], mark)
        return ids if closed else [self.end, *ids]

    def spoken(self, text: str) -> str:
        """See Encoder.spoken; reasoning ends with `</think>`, wherever it began."""
        _, ended, rest = text.rpartition(_REASONED)
        return rest.lstrip("\n") if ended else text

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Ids with which an assistant ends its turn: one of words, or one of tool calls."""
        written = filter(None, (self._end, self._called_probe and self._called_probe[1]))
        return frozenset(self._ids[token] for text in written if (token := text.strip()) in self._ids)

    @functools.cached_property
    def calls(self) -> str | None:
        """The form of chat.templates in which this template writes tool calls; None where it is none of them."""
        if self._called_probe is None:
            return None
        for name in templates.TEMPLATES:
            read = templates.parse(name, self._called_probe[0], [_TOOL])
            if read.calls == [_CALL] and not read.problems:
                return name
        return None

    @functools.cached_property
    def _called_probe(self) -> tuple[str, str] | None:
        """How an assistant writes _CALL, and what ends that turn; None where the template has no place for calls."""
        said = {"role": "assistant", "content": "", "tool_calls": [self._called(_CALL, {"id": _CALL_ID}, "")]}
        try:
            text = self._template.render([_PROBE, said], [_TOOL])
            opening = self._template.render([_PROBE], [_TOOL], add_generation_prompt=True)
        except UserError:
            return None
        written = self.spoken(text[len(os.path.commonprefix([text, opening])):])
        found = re.search(rf"({self._added.pattern})\s*$", written)
        return (written[:found.start()], found[1]) if found else None

    @functools.cached_property
    def _any_end(self) -> re.Pattern[str]:
        return any_of(token for token, id_ in self._ids.items() if id_ in self.ends)

    def _written(self, message: Message, index: int) -> Message:
        """An assistant's message in one form of those that it may have; others as they are."""
        if message["role"] != "assistant":
            return message
        calls = rendering.tool_calls_of(message, index)
        named = [{"id": given["id"]} if isinstance(given, Mapping) and "id" in given else {}
                 for given in message.get("tool_calls") or ()]
        return {**message, "content": rendering.text_of(message, index), "tool_calls": [
            {**name, "function": {"name": call.name, "arguments": call.arguments}}
            for name, call in zip(named, calls, strict=True)]}

    def _shown(self, message: Message, mark: str, taboo: re.Pattern[str] | None = None) -> dict[str, Any]:
        """The message as a template expects it, with a mark inside all that is only spelt like an added token.

        `taboo` finds what an assistant's own text cannot mean, by default the tokens that end turns.
        """
        taboo = taboo or self._turns
        kept = {key: message[key] for key in ("role", "tool_call_id", "name") if key in message}
        if message["role"] != "assistant":
            return {**kept, "content": self._untrusted(message, mark).strip(mark)}
        content = message.get("content") or ""
        calls = [tool_call(call) for call in message.get("tool_calls") or ()]
        if calls and "template" in message:
            content, calls = templates.render(message["template"], content, calls), []
        kept["content"] = broken(taboo, content, mark)
        if message.get("reasoning_content"):
            kept["reasoning_content"] = broken(taboo, message["reasoning_content"], mark)
        if calls:
            kept["tool_calls"] = [self._called(call, given, mark)
                                  for given, call in zip(message["tool_calls"], calls, strict=True)]
        return kept

    def _called(self, call: ToolCall, given: Any, mark: str) -> dict[str, Any]:
        named = {"id": given["id"]} if isinstance(given, Mapping) and "id" in given else {}
        function = self._guarded({"name": call.name, "arguments": call.arguments}, mark)
        return {"type": "function", **named, "function": function}

    def _listed(self, tool: Mapping[str, Any], mark: str) -> dict[str, Any]:
        whole = dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        return self._guarded(whole, mark)

    def _guarded(self, value: Any, mark: str) -> Any:
        return map_strings(value, lambda text: broken(self._added, text, mark), keys=True)

    def _pieces(self, shown: list[dict[str, Any]], tools: Any, letters: Sequence[str], weights: list[float]
                ) -> Iterator[Piece]:
        if self._template.marked:
            found = self._by_marks(shown, tools, letters, weights)
        else:
            full = self._template.render(shown, tools)
            found = self._by_letters(full, shown, tools, letters, weights)
            found = self._by_prefixes(full, shown, tools, weights) if found is None else found
        yield from found

    def _by_marks(self, shown: list[dict[str, Any]], tools: Any, letters: Sequence[str], weights: list[float]
                  ) -> list[Piece]:
        opening, closing = letters
        text = self._template.render(shown, tools, marks=(opening, closing))
        parts = re.split(f"{opening}([^{closing}]*){closing}", text)
        spans = len(parts) // 2
        if spans != len(weights) and len(set(weights)) > 1:
            raise UserError(f"the chat template of {self._template.where} marks {spans} parts of {len(weights)} "
                            "messages, whose weights differ")
        each = weights if spans == len(weights) else weights[:1] * spans
        return [(part, each[number // 2] if number % 2 else 0.0) for number, part in enumerate(parts)]

    def _by_letters(self, full: str, shown: list[dict[str, Any]], tools: Any, letters: Sequence[str],
                    weights: list[float]) -> list[Piece] | None:
        """Takes out of `full` what stands where the frame has letters; None where the frame is not the same."""
        thought, said = letters
        bare = [_bare(message, thought, said) if message["role"] == "assistant" else message for message in shown]
        try:
            frame = re.split(f"(?:{thought}[^{thought}{said}]*)?{said}", self._template.render(bare, tools))
        except UserError:
            return None  # tool results may need the calls before them
        end = self._end
        if end is None or len(frame) != len(weights) + 1 or not full.startswith(frame[0]):
            return None
        lead, pieces, at = self._lead, [(frame[0], 0.0)], len(frame[0])
        for weight, following in zip(weights, frame[1:], strict=True):
            stop = full.find(end, at)  # no text spells it
            if (stop < 0 or not pieces[-1][0].endswith(lead) or not following.startswith(end)
                    or not full.startswith(following, stop)):
                return None
            pieces[-1] = (pieces[-1][0].removesuffix(lead), 0.0)
            pieces += [(lead + full[at:stop + len(end)], weight), (following[len(end):], 0.0)]
            at = stop + len(following)
        return pieces if at == len(full) else None

    @functools.cached_property
    def _end(self) -> str | None:
        """What ends an assistant's turn: the added token behind its text, with white space before it."""
        found = re.match(rf"\s*(?:{self._added.pattern})", self._probed[2])
        return found[0] if found else None

    @functools.cached_property
    def _lead(self) -> str:
        """White space before an assistant's text that the opening of its turn does not give: it writes that, too."""
        head, opening = self._probed[0], self._probed[1]
        return head[len(opening):] if head.startswith(opening) and head[len(opening):].isspace() else ""

    @functools.cached_property
    def _probed(self) -> tuple[str, str, str]:
        """(what stands before an assistant's text, what a turn's opening gives of it, what stands behind the text)."""
        try:
            text = self._template.render([_PROBE, {"role": "assistant", "content": _WORD}])
            opening = self._template.render([_PROBE], add_generation_prompt=True)
        except UserError:
            return "", "", ""
        head, _, rest = text.partition(_WORD)
        return head, opening, rest

    def _by_prefixes(self, full: str, shown: list[dict[str, Any]], tools: Any, weights: list[float]) -> list[Piece]:
        pieces: list[Piece] = []
        at, left = 0, iter(weights)
        for number, message in enumerate(shown):
            if message["role"] != "assistant":
                continue
            opening = self._template.render(shown[:number], tools, add_generation_prompt=True)
            closed = self._template.render(shown[:number + 1], tools)
            ending = re.search(rf"(?:{self._added.pattern})(\s*)$", closed)
            closed = closed[:ending.start(1)] if ending else closed
            if not (len(opening) >= at and closed.startswith(opening) and full.startswith(closed)):
                raise UserError(f"messages[{number}]: the chat template of {self._template.where} writes it otherwise "
                                "once others follow, so that its tokens cannot be told apart")
            pieces += [(full[at:len(opening)], 0.0), (full[len(opening):len(closed)], next(left))]
            at = len(closed)
        return [*pieces, (full[at:], 0.0)]

    def _check_places(self, shown: list[dict[str, Any]], tools: Any, letter: str) -> None:
        """Raises UserError where the template leaves out a message, a call, tools or reasoning."""
        where = self._template.where
        if tools and not self._has_tools:
            raise UserError(f"tools: the chat template of {where} has no place for them")
        if any("reasoning_content" in message for message in shown) and not self._has_reasoning:
            raise UserError(f"reasoning_content: the chat template of {where} has no place for it; the source's "
                            "options.reasoning=drop leaves it out")
        named, wanted = [], {}
        for number, message in enumerate(shown):
            probe = dict(message)
            if message["content"]:
                wanted[f"messages[{number}].content"] = probe["content"] = f"{letter}{number}{letter}"
            for index, call in enumerate(message.get("tool_calls", ())):
                said = f"{letter}{number}x{index}{letter}"
                wanted[f"messages[{number}].tool_calls[{index}]"] = said
                probe["tool_calls"] = [*(probe["tool_calls"] if index else ()), {**call, "function": {
                    "name": call["function"]["name"], "arguments": {"value": said}}}]
            named.append(probe)
        text = self._template.render(named, tools)
        missing = next((name for name, said in wanted.items() if said not in text), None)
        if missing is not None:
            raise UserError(f"{missing}: the chat template of {where} leaves it out")

    @functools.cached_property
    def _has_tools(self) -> bool:
        return _WORD in self._template.render([_PROBE], [_TOOL])

    @functools.cached_property
    def _has_reasoning(self) -> bool:
        answer = {"role": "assistant", "content": "?", "reasoning_content": _WORD}
        return _WORD in self._template.render([_PROBE, answer])


def _bare(message: Mapping[str, Any], thought: str, said: str) -> dict[str, Any]:
    """An assistant's message with letters in place of what it wrote, its reasoning apart."""
    reasons = "reasoning_content" in message or _REASONED in message["content"]
    return {"role": "assistant", "content": said} | ({"reasoning_content": thought} if reasons else {})


def encoder_of(folder: files.Path, tokenizer: Tokenizer) -> ChatEncoder | TemplateEncoder:
    """What writes prompts for a model, by the chat template that its folder holds; raises UserError for a bad one."""
    template = FolderTemplate.from_folder(folder)
    return ChatEncoder(tokenizer) if template is None else TemplateEncoder(tokenizer, template)
