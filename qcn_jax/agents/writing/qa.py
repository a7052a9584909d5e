"""Questions on documents, answered from a quotation or not at all: a second reading must come to the same answer."""

from collections.abc import Mapping
from typing import Any

from qcn_jax.agents.writing.kind import Item, Made
from qcn_jax.agents.writing.page import joined, read_page, tokens
from qcn_jax.chat.asking import Ask, asked_for_json

ABSTAINED = "The document does not say."
SHOWN = 60_000  # characters of a document
BESIDE = 30  # words that a second reading may have beside the answer's: who repeats the document, answers all questions
_WRITE = """You write questions about a document for people who will read it: some that it answers, and some that sound
as if it did and that it does not answer. Answer with one JSON object:
{"questions": [{"question": "...", "answer": "short answer", "quote": "the sentence that says it, exactly"},
{"question": "...", "answer": null}]}"""
_READ = f"""Answer the question from the document alone, as shortly as it can be said. If the document does not say it,
answer exactly: {ABSTAINED}"""


class QuestionsAnswered:
    """Conversations about documents."""

    name, fields = "qa", {"text": str}

    def check(self, fields: Mapping[str, Any]) -> str:
        """See Kind."""
        return ""

    def make(self, item: Item, ask: Ask, seed: int) -> Made:
        """See Kind."""
        text = item.fields["text"]
        if len(text) > SHOWN:
            return Made(dropped={"too long": 1})
        found = asked_for_json(ask, _WRITE, text, seed, lambda value: isinstance(value.get("questions"), list))
        if found is None:
            return Made(dropped={"unreadable": 1})
        rows, dropped, seen = [], {}, set()
        for one in found["questions"]:
            problem = _malformed(one) or _ungrounded(one, text) or (
                "repeated" if one["question"] in seen else "") or _disagreed(one, text, ask, seed)
            if problem:
                dropped[problem] = dropped.get(problem, 0) + 1
                continue
            seen.add(one["question"])
            rows.append({"id": f"{item.name}#{len(rows)}", "answerable": one["answer"] is not None,
                         "quote": one.get("quote"), "messages": [
                             {"role": "user", "content": f"{text.strip()}\n\n{one['question'].strip()}"},
                             {"role": "assistant", "content": one["answer"] or ABSTAINED}]})
        return Made(rows, dropped)


def _malformed(one: Any) -> str:
    if not isinstance(one, dict) or not isinstance(one.get("question"), str) or not one["question"].strip():
        return "malformed"
    answer = one.get("answer", 0)
    answered = isinstance(answer, str) and bool(tokens(answer)) and isinstance(one.get("quote"), str)
    return "" if answer is None or answered else "malformed"


def _ungrounded(one: Mapping[str, Any], text: str) -> str:
    """Whether the quotation does not stand there, or the answer says more than quotation and question."""
    if one["answer"] is None:
        return ""
    quoted = tokens(one["quote"])
    if len(quoted) < 2 or joined(quoted) not in read_page(text).said:
        return "quotation"
    return "" if set(_content(one["answer"])) <= {*quoted, *tokens(one["question"])} else "ungrounded"


def _disagreed(one: Mapping[str, Any], text: str, ask: Ask, seed: int) -> str:
    """Whether somebody who knows neither answer nor quotation answers something else."""
    read = ask([{"role": "system", "content": _READ},
                {"role": "user", "content": f"{text.strip()}\n\nQuestion: {one['question'].strip()}"}], seed)
    abstains = tokens(read) == tokens(ABSTAINED)
    if one["answer"] is None:
        return "" if abstains else "answerable"
    said = tokens(read)
    agrees = set(_content(one["answer"])) <= set(said) and len(said) <= len(tokens(one["answer"])) + BESIDE
    return "" if agrees and not abstains else "disagreed"


def _content(answer: str) -> list[str]:
    """The tokens of an answer that say something: numbers, and words of more than three letters."""
    found = tokens(answer)
    return [token for token in found if len(token) > 3 or not token.isalpha()] or found
