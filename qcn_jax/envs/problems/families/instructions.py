"""Texts, and functions, under constraints that can be decided without a judge."""

import json
import random
from typing import Any

_TOPICS = ("sorting", "caching", "recursion", "testing", "hashing", "logging")
_FILL = ("code", "should", "be", "clear", "and", "short", "so", "that", "others", "can", "read", "it")


def listing(rng: random.Random, language: str) -> dict[str, Any]:
    """Bullets with words that must and must not occur."""
    del language
    topic, count, least = rng.choice(_TOPICS), rng.randint(2, 5), rng.randint(10, 20)
    words, end = rng.sample(["because", "example", "memory", "speed"], 2), rng.choice(["Done.", "That is all."])
    avoid = rng.choice(["very", "just", "simply"])
    rules = [{"bullets": count}, {"contains": [topic, *words]}, {"avoids": [avoid]}, {"words_at_least": least},
             {"ends_with": end}, {"without_characters": ";"}]
    lines = [f"- {topic} {' '.join(words)} {' '.join(_FILL)}" for _ in range(count)]
    solution = "\n".join([*lines[:-1], f"{lines[-1]}. {end}"])
    prompt = (f"Write about {topic} as a list of exactly {count} lines, each of which begins with a hyphen and a blank, and "
              f"nothing else. Use the words {' and '.join(words)}; do not use the word {avoid} or a semicolon; write at least "
              f"{least} words; end with: {end}")
    return {"prompt": prompt, "rules": rules, "solution": solution}


def record(rng: random.Random, language: str) -> dict[str, Any]:
    """A JSON object with given keys, in lower case."""
    del language
    topic = rng.choice(_TOPICS)
    keys = rng.sample(["title", "summary", "level", "tags", "year"], 3)
    solution = json.dumps({key: topic for key in keys})
    prompt = (f"Describe {topic} as one JSON object, and nothing around it, with exactly the keys {', '.join(keys)}. Write "
              f"everything in lower case, with the word {topic}, in at most 30 words.")
    return {"prompt": prompt, "solution": solution,
            "rules": [{"json_keys": keys}, {"lower_case": True}, {"contains": [topic]}, {"words_at_most": 30}]}


def function(rng: random.Random, language: str) -> dict[str, Any] | None:
    """A small function without loops, in few lines."""
    if language != "python":
        return None
    step, most = rng.randint(2, 9), rng.randint(4, 7)
    tests = [{"call": {"function": "total", "args": [n]}, "returns": sum(range(0, n + 1, step))}
             for n in (0, 1, step, 10, 57, 1000, 10**6)]
    prompt = (f"Write a function `total(n)` that returns the sum of all multiples of {step} from 0 to n (n included). Use no "
              f"loop, comprehension, sum or range, and at most {most} lines.")
    return {"language": "python", "prompt": prompt, "tests": tests,
            "rules": [{"forbids": ["loop", "sum", "range", "reduce"]}, {"lines_at_most": most}],
            "solution": f"def total(n):\n    count = n // {step}\n    return {step} * count * (count + 1) // 2\n"}


FAMILIES = (listing, record, function)
