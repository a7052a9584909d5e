"""Problem statements from behaviour: what was called, what came, what was expected; never from the diff.

The calls of one failing test are recorded in the defective and in the fixed state (inside/observe.py). The
first call to end that was given equal arguments and gave something else is what the statement tells; because
inner calls end before outer ones, it is the innermost function seen misbehaving.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qcn_jax.chat import endpoint
from qcn_jax.envs import patches

SHORT = 220  # characters: at most about 80 tokens of a small BPE
FULL = 1500
LONGEST = 4000  # of any statement
_ELLIPSIS = "..."


@dataclasses.dataclass(frozen=True)
class Observation:
    """A call that misbehaved, as texts.

    `came` and `expected` are outcomes such as "returned 3", "raised KeyError: 'a'" or "left x as [1]".
    """

    path: str
    function: str
    arguments: tuple[tuple[str, str], ...]
    came: tuple[str, str]  # (verb, text)
    expected: tuple[str, str]
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)  # as it was recorded


def find(
    buggy: Sequence[Mapping[str, Any]], fixed: Sequence[Mapping[str, Any]], only: tuple[str, str] | None = None
) -> Observation | None:
    """The first call in `buggy` whose n-th counterpart in `fixed` (same function and arguments) ended otherwise.

    With `only`, a (path, function), calls of other functions are passed over.
    """
    return next((o for o in differing(buggy, fixed) if only in (None, (o.path, o.function))), None)


def stable(calls: Sequence[Mapping[str, Any]], again: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`calls`, each with `stable`: whether its counterpart in another recording of the same state ended alike.

    Clocks, random numbers, counters and identities differ from process to process; what tells the day of the recording
    (`dated`) differs from day to day.
    """
    known: dict[tuple, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for call in again:
        known[_key(call)].append(call)
    seen: collections.Counter[tuple] = collections.Counter()
    marked = []
    for call in calls:
        key = _key(call)
        others = known.get(key, ())
        alike = seen[key] < len(others) and _difference(call, others[seen[key]]) is None
        marked.append({**call, "stable": alike and not call.get("dated", False)})
        seen[key] += 1
    return marked


def agreed(said: str, again: str) -> str:
    """What two runs of a test say alike, of "error: words | path:line: code": all, error and code, or ""."""
    if said == again:
        return said
    (first, _, place), (second, _, other) = said.partition(" | "), again.partition(" | ")
    kind = first.partition(":")[0]
    return f"{kind} | {place}" if place and place == other and kind == second.partition(":")[0] else ""


def differing(buggy: Sequence[Mapping[str, Any]], fixed: Sequence[Mapping[str, Any]]) -> Iterator[Observation]:
    """All calls in `buggy` that ended otherwise than their counterparts, in the order in which they ended.

    Calls that are marked as not `stable` are passed over.
    """
    known: dict[tuple, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for call in fixed:
        known[_key(call)].append(call)
    seen: collections.Counter[tuple] = collections.Counter()
    for call in buggy:
        key = _key(call)
        counterparts = known.get(key, ())
        if seen[key] < len(counterparts):
            wanted = counterparts[seen[key]]
            difference = _difference(call, wanted)
            if difference is not None and call.get("stable", True) and wanted.get("stable", True):
                arguments = tuple((name, text) for name, text in call["args"])
                yield Observation(call["path"], call["name"], arguments, *difference, call)
        seen[key] += 1


def _key(call: Mapping[str, Any]) -> tuple:
    return call["path"], call["name"], tuple(map(tuple, call["args"]))


def _difference(came: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """How two ends of the same call differ, as (verb, text) each; None where they do not."""
    if came["raised"] != wanted["raised"] or came["result"] != wanted["result"]:
        return _outcome(came), _outcome(wanted)
    before, after = dict(map(tuple, came["after"])), dict(map(tuple, wanted["after"]))
    for name in [*before, *(name for name in after if name not in before)]:
        start = dict(map(tuple, came["args"]))[name]
        if before.get(name, start) != after.get(name, start):
            return (f"left {name} as", before.get(name, start)), ("", after.get(name, start))
    return None


def _outcome(call: Mapping[str, Any]) -> tuple[str, str]:
    if call["raised"]:
        return "raised", call["raised"]
    if call.get("yields"):
        return "yielded", ", ".join(call["result"]) or "nothing"
    return "returned", call["result"][0] if call["result"] else "nothing"


def write(observation: Observation, failing: Sequence[str], message: str = "", limit: int = SHORT) -> str:
    """The statement in at most `limit` characters: the call, what came, what was expected, failing tests.

    Long values are cut so that the first difference stays in sight. `message` (the test's own words) and more
    test names are added where `limit` leaves room for them.
    """
    test = failing[0].split("::")[-1] if failing else ""
    tail = f" Failing test: {test}." if test else ""
    named = [text if limit <= SHORT else f"{name}={text}" for name, text in observation.arguments
             if name not in ("self", "cls")]
    came, wanted = observation.came[0], observation.expected[0]
    turn = f"expected it to {_present(wanted)} " if wanted and wanted != came else "expected "
    frame = f"`{observation.function}()` in {observation.path} {came} ; {turn}."
    if len(frame) + len(tail) > limit - 72:
        tail = ""  # the values say more than the test's name
    share = max((min(limit, FULL) - len(frame) - len(tail)) // 3, 8)
    call = cut(", ".join(named), share)
    got, expected = contrast(observation.came[1], observation.expected[1], share + (share - len(call)) // 2)
    text = f"`{observation.function}({call})` in {observation.path} {came} {got}; {turn}{expected}.{tail}"
    if limit > SHORT:
        names = "".join(f"\n- {name}" for name in failing[:8])
        details = f"\n\nThese tests fail:{names}" + (f"\n\nThe first one says: {message}" if message else "")
        text += details[: max(limit - len(text), 0)]
    return text[:limit]


def from_tests(failing: Sequence[str], message: str = "", limit: int = FULL) -> str:
    """A statement where no call was seen misbehaving: the failing tests, and what the first of them says."""
    said = message.split(" | ")[0]  # without the line of code that follows
    text = f"The test {failing[0]} fails" + (f": {said}" if said else ".")
    if len(failing) > 1:
        text += "\n\nSo do these:" + "".join(f"\n- {name}" for name in failing[1:9])
    return text[:limit]


def _present(verb: str) -> str:
    return {"raised": "raise", "returned": "return", "yielded": "yield"}.get(verb, verb)


def cut(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - len(_ELLIPSIS)] + _ELLIPSIS


def contrast(first: str, second: str, limit: int) -> tuple[str, str]:
    """Both texts in at most `limit` characters each; a long equal beginning gives way to the first difference."""
    first, second = " ".join(first.split()), " ".join(second.split())
    if max(len(first), len(second)) <= limit:
        return first, second
    same = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    skip = max(same - limit // 3, 0)
    if skip:
        first, second = _ELLIPSIS + first[skip:], _ELLIPSIS + second[skip:]
    return cut(first, limit), cut(second, limit)


def contains_fix(text: str, patch: str) -> bool:
    """Whether a statement quotes a line that the gold patch adds or removes (of eight characters and more)."""
    plain = re.sub(r"\s+", "", text)
    for file in patches.parse(patch):
        for hunk in file.hunks:
            for sign, line in hunk.lines:
                line = re.sub(r"\s+", "", line)
                if sign in "+-" and len(line) >= 8 and line in plain:
                    return True
    return False


_WORDING = """Write the text of a bug report for a repository's issue tracker from these observations. Say what was
called, what came and what was expected. Do not guess at the cause, do not propose a fix, do not mention tests. Plain
text only.

{facts}"""


def worded(facts: str, function: str, patch: str, model: endpoint.Endpoint, seed: int = 0) -> str:
    """The statement in a model's words; `facts` as they stand where its answer tells the fix or omits the function.

    Raises:
      UserError: the endpoint cannot be used.
    """
    text = model.ask([{"role": "user", "content": _WORDING.format(facts=facts)}], seed).strip()
    if function.split(".")[-1] not in text or contains_fix(text, patch) or len(text) > LONGEST:
        return facts
    return text
