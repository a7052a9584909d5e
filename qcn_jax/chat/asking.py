"""Asking a model for a JSON object, and again where the answer is none."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax.chat.values import read_json

Ask = Callable[[Sequence[Mapping[str, Any]], int], str]
"""Messages and a seed to an answer; `chat.endpoint.Endpoint.ask` is one."""

TRIES = 3  # of an answer that cannot be read
REMINDER = "That is not the JSON object that was asked for; give it alone."


def answered_object(answer: str) -> dict[str, Any] | None:
    """The JSON object of an answer, be it within words or a fence; None where there is none."""
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        value = read_json(found[0]) if found else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def asked_for_json(ask: Ask, system: str, user: str | Sequence[Mapping[str, Any]], seed: int,
                   accept: Callable[[dict[str, Any]], bool], reminder: str = REMINDER) -> dict[str, Any] | None:
    """Asks until the answer is a JSON object that `accept` takes; None where it never is.

    `user` is a text, or OpenAI's content parts, as images are.

    Raises:
      UserError: the endpoint cannot be used.
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    for number in range(TRIES):
        answer = ask(messages, seed + number)
        found = answered_object(answer)
        if found is not None and accept(found):
            return found
        messages = [*messages[:2], {"role": "assistant", "content": answer}, {"role": "user", "content": reminder}]
    return None
