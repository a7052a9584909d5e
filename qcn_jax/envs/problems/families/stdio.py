"""Programs that read standard input and write standard output, in Python, JavaScript and Go."""

import random
from collections import Counter
from typing import Any

# In Go without the functions min and max, which compilers before 1.21 do not know.
_READ = {
    "python": "import sys\nwords = sys.stdin.read().split()\nn = int(words[0])\nvalues = list(map(int, words[1:n + 1]))\n",
    "javascript": 'const words = require("fs").readFileSync(0, "utf8").split(/\\s+/);\nconst n = Number(words[0]);\n'
                  "const values = words.slice(1, n + 1).map(Number);\n",
    "go": 'package main\n\nimport (\n\t"bufio"\n\t"fmt"\n\t"os"\n)\n\nfunc main() {\n\treader := bufio.NewReader(os.Stdin)\n'
          "\tvar n int\n\tfmt.Fscan(reader, &n)\n\tvalues := make([]int, n)\n\tfor i := range values {\n"
          "\t\tfmt.Fscan(reader, &values[i])\n\t}\n",
}
_FORM = ("The first line holds n (1 <= n <= 100000), the second n integers between -1000 and 1000. "
         "Read them from standard input and print one line: ")


def _numbers(rng: random.Random, reference: Any) -> list[dict[str, str]]:
    """Hidden tests: small cases, edges, and one that only a fast program ends in time."""
    cases = [[rng.randint(-1000, 1000) for _ in range(size)] for size in (1, 2, 5, 9, 30, 200)]
    cases += [[7] * 12, [-1000] * 5, list(range(-20, 20)), [rng.randint(-1000, 1000) for _ in range(60_000)]]
    return [{"input": f"{len(values)}\n{' '.join(map(str, values))}\n", "output": f"{reference(values)}\n"}
            for values in cases]


def _row(rng: random.Random, language: str, ask: str, reference: Any, bodies: dict[str, str]) -> dict[str, Any]:
    tests = _numbers(rng, reference)
    example = tests[2]
    return {"language": language, "timeout": 8.0, "tests": tests, "solution": _READ[language] + bodies[language],
            "prompt": f"{_FORM}{ask}\n\nExample input:\n{example['input']}Example output:\n{example['output']}"}


def best_window(rng: random.Random, language: str) -> dict[str, Any]:
    """The largest sum of at most k neighbours' windows of exactly k."""
    k = rng.randint(2, 6)

    def reference(values: list[int]) -> int:
        width = min(k, len(values))
        total = best = sum(values[:width])
        for index in range(width, len(values)):
            total += values[index] - values[index - width]
            best = max(best, total)
        return best

    bodies = {
        "python": f"k = min({k}, n)\ntotal = best = sum(values[:k])\nfor i in range(k, n):\n"
                  "    total += values[i] - values[i - k]\n    best = max(best, total)\nprint(best)\n",
        "javascript": f"const k = Math.min({k}, n);\nlet total = 0;\nfor (let i = 0; i < k; i++) total += values[i];\n"
                      "let best = total;\nfor (let i = k; i < n; i++) {\n  total += values[i] - values[i - k];\n"
                      "  best = Math.max(best, total);\n}\nconsole.log(best);\n",
        "go": f"\tk := {k}\n\tif n < k {{\n\t\tk = n\n\t}}\n\ttotal := 0\n\tfor _, v := range values[:k] {{\n\t\ttotal += v\n\t}}\n\tbest := total\n"
              "\tfor i := k; i < n; i++ {\n\t\ttotal += values[i] - values[i-k]\n\t\tif total > best {\n\t\t\tbest = total\n\t\t}\n\t}\n"
              "\tfmt.Println(best)\n}\n"}
    ask = f"the largest sum of {k} neighbouring integers (of all of them where n < {k})."
    return _row(rng, language, ask, reference, bodies)


def pairs(rng: random.Random, language: str) -> dict[str, Any]:
    """Pairs of positions whose values add up to a number."""
    target = rng.randint(-50, 50)

    def reference(values: list[int]) -> int:
        seen, found = Counter(), 0
        for value in values:
            found += seen[target - value]
            seen[value] += 1
        return found

    bodies = {
        "python": "from collections import Counter\nseen, found = Counter(), 0\nfor value in values:\n"
                  f"    found += seen[{target} - value]\n    seen[value] += 1\nprint(found)\n",
        "javascript": f"const seen = new Map();\nlet found = 0;\nfor (const v of values) {{\n"
                      f"  found += seen.get({target} - v) || 0;\n  seen.set(v, (seen.get(v) || 0) + 1);\n}}\n"
                      "console.log(found);\n",
        "go": f"\tseen, found := map[int]int{{}}, 0\n\tfor _, v := range values {{\n\t\tfound += seen[{target}-v]\n"
              "\t\tseen[v]++\n\t}\n\tfmt.Println(found)\n}\n"}
    return _row(rng, language, f"how many pairs of different positions hold integers whose sum is {target}.", reference,
                bodies)


def longest_run(rng: random.Random, language: str) -> dict[str, Any]:
    """The longest run of neighbours that differ by at most d."""
    gap = rng.randint(100, 900)

    def reference(values: list[int]) -> int:
        best = run = 1
        for before, value in zip(values, values[1:]):
            run = run + 1 if abs(value - before) <= gap else 1
            best = max(best, run)
        return best

    bodies = {
        "python": "best = run = 1\nfor a, b in zip(values, values[1:]):\n"
                  f"    run = run + 1 if abs(b - a) <= {gap} else 1\n    best = max(best, run)\nprint(best)\n",
        "javascript": "let best = 1, run = 1;\nfor (let i = 1; i < n; i++) {\n"
                      f"  run = Math.abs(values[i] - values[i - 1]) <= {gap} ? run + 1 : 1;\n"
                      "  best = Math.max(best, run);\n}\nconsole.log(best);\n",
        "go": "\tbest, run := 1, 1\n\tfor i := 1; i < n; i++ {\n\t\td := values[i] - values[i-1]\n"
              f"\t\tif d <= {gap} && -d <= {gap} {{\n\t\t\trun++\n\t\t}} else {{\n\t\t\trun = 1\n\t\t}}\n"
              "\t\tif run > best {\n\t\t\tbest = run\n\t\t}\n\t}\n\tfmt.Println(best)\n}\n"}
    ask = f"the length of the longest run of integers of which each differs from the one before it by at most {gap}."
    return _row(rng, language, ask, reference, bodies)


FAMILIES = (best_window, pairs, longest_run)
