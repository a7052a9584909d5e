"""Edit documents as an agent's conversation: the defects of data.edits in the native tool form of the nano scaffold.

Mid-training data of the report's "edits" and "chat-FIM" kinds: what SFT shows on a few hundred verified tasks, over
every function of the corpus. Nothing here was executed: an edit that does not restore the function's true text is
called refuted by construction, its turn is read and not learned, and results are the bare words FAILED and ok.
"""

import re
from typing import Any

import numpy as np

from qcn_jax.envs import spans
from qcn_jax.envs.scaffolds import NANO, NANO_SINGLE
from qcn_jax.envs.solver import SpanEdit, mutations, span_edits
from qcn_jax.hub.chat import ToolCall
from qcn_jax.pipeline.data.chat import ChatEncoder, Message, refuted
from qcn_jax.pipeline.data.edits import EditDocuments

SINGLE = 0.35  # share of documents with the function in the prompt and the edit as the only turn
WRONG = (0.35, 0.3, 0.2, 0.15)  # chances of 0, 1, 2 and 3 refuted edits in the others
_NAME = re.compile(r"(?:async )?def (\w+)")


class AgentEditDocuments:
    """Random access to such documents: index i always gives the same one for the same source and seed."""

    def __init__(self, edits: EditDocuments, encoder: ChatEncoder, *, seed: int, max_tokens: int) -> None:
        """Args:
          edits: where functions and defects are drawn from.
          encoder: of conversations.
          seed: of this source's own draws.
          max_tokens: longer documents are drawn again.
        """
        self._edits, self._encoder, self._seed, self._max_tokens = edits, encoder, seed, max_tokens

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Document `index`: `tokens` int32 [T] and `weights` float32 [T], of predicting token t + 1 at t."""
        rng = np.random.default_rng([self._seed, index])
        while True:
            document = self._document(rng)
            if document is not None and len(document["tokens"]) <= self._max_tokens:
                return document

    def _document(self, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        function, index = self._edits.draw(rng)
        defect, lines = function.defects[index], list(function.lines)
        lines[defect.line] = defect.after
        right = span_edits(lines, function.lines)
        named = _NAME.match(function.lines[0])
        if right is None or named is None or len(lines) > spans.MAX_LINE_TOKENS:
            return None
        statement = f"`{named[1]}` in {function.path} does not do what it should."
        shown = "\n".join([function.path, *(spans.line_token(n) + line for n, line in enumerate(lines, 1))])
        if rng.random() < SINGLE:
            parts = [{"type": "text", "text": statement + "\n"}, {"type": "text", "text": shown, "numbered": True}]
            return self._encoder.encode([{"role": "user", "content": parts}, _turn(NANO_SINGLE.template, right[0].call())])
        wrong = _wrong(lines, defect.line + 1, function.lines[defect.line], rng)
        messages: list[Message] = [
            {"role": "user", "content": statement}, _turn(NANO.template, ToolCall("view")),
            {"role": "tool", "content": shown, "numbered": True},
        ]  # fmt: skip
        for number, edit in enumerate([*wrong, right[0]]):
            undo = [ToolCall("undo")] if number else []
            messages.append(_turn(NANO.template, *undo, edit.call(), ToolCall("run_tests")))
            messages.append({"role": "tool", "content": "FAILED" if number < len(wrong) else "ok"})
        messages.append(_turn(NANO.template, ToolCall("submit")))
        document = self._encoder.encode(messages)
        outcomes = [False] * len(wrong) + [True]
        document["weights"] *= ~refuted(messages, outcomes, document["weights"])
        return document


def _wrong(lines: list[str], number: int, truth: str, rng: np.random.Generator) -> list[SpanEdit]:
    """Plausible edits of the defective function that do not restore line `number` to `truth`."""
    pool = sorted({item for item in mutations(lines) if item != (number, truth)})
    chosen = []
    for place in rng.permutation(len(pool))[: rng.choice(len(WRONG), p=WRONG)]:
        line, after = pool[place]
        span = spans.minimal_edit(lines[line - 1], after)
        if span is not None:
            chosen.append(SpanEdit(line, *span))
    return chosen


def _turn(template: str, *calls: ToolCall) -> dict[str, Any]:
    described = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": described, "template": template}
