"""Answers ranked in pairs against a checklist: a model says which points each meets, in both orders; points decide."""

import itertools
from collections.abc import Mapping
from typing import Any

from qcn_jax.agents.writing.kind import Item, Made, shown
from qcn_jax.chat.asking import Ask, asked_for_json

TRIES = 2  # of a pair of which the first is preferred in either order
_SYSTEM = """You compare two answers to a request against a checklist. Say of each answer which points of the list it
meets, by their numbers; judge nothing else. Answer with one JSON object: {"A": [1, 3], "B": [2]}"""


class Rank:
    """Pairs to learn preferences from, and the best answer as a conversation.

    A row's `swayed` counts pairs that the order decided; they are ties.
    """

    name, fields = "rank", {"prompt": str, "answers": list, "checklist": list}

    def check(self, fields: Mapping[str, Any]) -> str:
        """See Kind."""
        for name, least in (("answers", 2), ("checklist", 1)):
            if len(fields[name]) < least or not all(isinstance(text, str) and text for text in fields[name]):
                return f"field {name}: must be a list of {least} or more texts"
        return "field answers: two are the same" if len(set(fields["answers"])) < len(fields["answers"]) else ""

    def make(self, item: Item, ask: Ask, seed: int) -> Made:
        """See Kind."""
        answers = item.fields["answers"]
        score, unreadable, swayed = [0.0] * len(answers), 0, 0
        for first, second in itertools.combinations(range(len(answers)), 2):
            for number in range(TRIES):
                asked = seed + 100 * number  # beyond what is asked for an answer that cannot be read
                forth, back = _compared(item, first, second, ask, asked), _compared(item, second, first, ask, asked)
                if forth is None or back is None or forth == -back:
                    break
            if forth is None or back is None:
                unreadable += 1
                continue
            swayed += forth != -back
            share = 0.5 if forth != -back or forth == 0 else float(forth > 0)
            score[first] += share
            score[second] += 1 - share
        if unreadable:
            return Made(dropped={"unreadable": 1})
        order = sorted(range(len(answers)), key=lambda number: (-score[number], number))
        if score[order[0]] == score[order[-1]]:
            return Made(dropped={"undecided": 1})
        best, worst = answers[order[0]], answers[order[-1]]
        said = lambda text: [{"role": "user", "content": item.fields["prompt"]}, {"role": "assistant", "content": text}]
        return Made([{"id": item.name, "prompt": item.fields["prompt"], "ranking": order, "scores": score,
                      "swayed": swayed, "chosen": best, "rejected": worst, "messages": said(best)}])


def _compared(item: Item, first: int, second: int, ask: Ask, seed: int) -> int | None:
    """1 where the first meets more points, -1 where the second does, else 0; None where the answer cannot be read."""
    points = [f"{number}. {text}" for number, text in enumerate(item.fields["checklist"], 1)]
    answers = item.fields["answers"]
    text = (f"Request:\n{item.fields['prompt']}\n\nChecklist:\n" + "\n".join(points)
            + f"\n\nAnswer A:\n{shown(answers[first])}\n\nAnswer B:\n{shown(answers[second])}")

    def readable(value: Mapping[str, Any]) -> bool:
        return all(isinstance(value.get(name), list) and all(
            type(point) is int and 1 <= point <= len(points) for point in value[name]) for name in "AB")

    found = asked_for_json(ask, _SYSTEM, text, seed, readable)
    if found is None:
        return None
    met = [len(set(found[name])) for name in "AB"]
    return (met[0] > met[1]) - (met[0] < met[1])
