"""Functions that are to use a named part of the standard library, in Python and JavaScript."""

import json
import random
from typing import Any

_WORDS = ("ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew")


def _row(language: str, prompt: str, uses: list[str], tests: list[tuple[list[Any], Any]], solution: str,
         function: str) -> dict[str, Any]:
    args, value = tests[0]
    shown = f"\n\nFor example {function}({', '.join(map(json.dumps, args))}) returns {json.dumps(value)}."
    return {"language": language, "prompt": prompt + shown, "solution": solution, "rules": [{"uses": uses}],
            "tests": [{"call": {"function": function, "args": args}, "returns": value} for args, value in tests]}


def totals(rng: random.Random, language: str) -> dict[str, Any] | None:
    """JSON text in, sums by key out."""
    key, amount = rng.choice(["team", "city", "shop"]), rng.choice(["cost", "weight", "score"])

    def case(size: int) -> tuple[list[Any], Any]:
        rows = [{key: rng.choice(_WORDS), amount: rng.randint(-9, 99)} for _ in range(size)]
        sums: dict[str, int] = {}
        for row in rows:
            sums[row[key]] = sums.get(row[key], 0) + row[amount]
        return [json.dumps(rows)], dict(sorted(sums.items()))

    tests = [case(size) for size in (3, 0, 1, 8, 20)]
    prompt = (f"Write a function `totals(text)`. `text` is a JSON list of objects with `{key}` (text) and `{amount}` "
              f"(an integer). Return an object from each `{key}` to the sum of its `{amount}`, ")
    if language == "python":
        code = (f"import json\n\n\ndef totals(text):\n    sums = {{}}\n    for row in json.loads(text):\n"
                f"        sums[row['{key}']] = sums.get(row['{key}'], 0) + row['{amount}']\n    return sums\n")
        return _row(language, prompt + "a dict. Use the module json.", ["json", "loads"], tests, code, "totals")
    if language == "javascript":
        code = (f"function totals(text) {{\n  const sums = {{}};\n  for (const row of JSON.parse(text)) {{\n"
                f"    sums[row.{key}] = (sums[row.{key}] || 0) + row.{amount};\n  }}\n  return sums;\n}}\n")
        return _row(language, prompt + "a plain object. Use JSON.parse.", ["JSON", "parse"], tests, code, "totals")
    return None


def smallest(rng: random.Random, language: str) -> dict[str, Any] | None:
    """The k smallest by a key, with heapq."""
    if language != "python":
        return None
    k = rng.randint(2, 5)
    cases = [[[rng.choice(_WORDS), rng.randint(0, 30)] for _ in range(size)] for size in (4, 0, 1, 9, 25)]
    tests = [([rows], sorted(rows, key=lambda row: (row[1], row[0]))[:k]) for rows in cases]
    code = (f"import heapq\n\n\ndef smallest(rows):\n    return heapq.nsmallest({k}, rows, key=lambda row: (row[1], row[0]))\n")
    prompt = (f"Write a function `smallest(rows)`. `rows` is a list of [name, number]. Return the {k} rows with the "
              "smallest numbers in rising order, those of equal numbers by name. Use the module heapq.")
    return _row(language, prompt, ["heapq"], tests, code, "smallest")


def dates(rng: random.Random, language: str) -> dict[str, Any] | None:
    """Days between dates, with datetime or Date."""
    import datetime

    shift = rng.randint(1, 90)

    def case() -> tuple[list[Any], Any]:
        day = datetime.date(rng.randint(1999, 2030), rng.randint(1, 12), rng.randint(1, 28))
        return [day.isoformat()], (day + datetime.timedelta(days=shift)).isoformat()

    tests = [case() for _ in range(4)] + [
        (["2024-02-28"], (datetime.date(2024, 2, 28) + datetime.timedelta(days=shift)).isoformat()),
        (["2023-12-31"], (datetime.date(2023, 12, 31) + datetime.timedelta(days=shift)).isoformat())]
    prompt = f"Write a function `later(day)` that returns the date {shift} days after `day`; both are texts such as 2024-02-28."
    if language == "python":
        code = ("import datetime\n\n\ndef later(day):\n    found = datetime.date.fromisoformat(day)\n"
                f"    return (found + datetime.timedelta(days={shift})).isoformat()\n")
        return _row(language, prompt + " Use the module datetime.", ["datetime"], tests, code, "later")
    if language == "javascript":
        code = ("function later(day) {\n  const found = new Date(day + 'T00:00:00Z');\n"
                f"  found.setUTCDate(found.getUTCDate() + {shift});\n  return found.toISOString().slice(0, 10);\n}}\n")
        return _row(language, prompt + " Use Date.", ["Date"], tests, code, "later")
    return None


FAMILIES = (totals, smallest, dates)
