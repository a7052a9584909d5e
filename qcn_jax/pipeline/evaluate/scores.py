"""From episodes to the numbers of the report. Plain data in, plain data out; nothing here runs anything.

An episode row is a JSON object: `instance_id`, `kind` (of the bug), `solved`, `infrastructure` (no verdict, for a
reason that is not the model's), `turns`, `malformed` (how many of them broke the format), `attempts` (how often the
tests were run), `reason` (why the episode ended).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.pipeline.evaluate import statistics

Row = Mapping[str, Any]
MAX_ATTEMPTS = 6  # points of the curve over attempts: view, six edits and submit are nano's eight turns
PASS_K = 8  # the k of summary.json's pass_at_8

# (first, second, domain): which models are compared on the same tasks.
COMPARISONS = (
    ("sft", "midtrain", "swe"), ("expert_swe", "sft", "swe"), ("expert_swe", "sft_control", "swe"),
    ("expert_swe", "heuristic", "swe"), ("unified", "sft", "swe"), ("expert_single_turn", "sft", "single_turn"),
    ("unified", "sft", "single_turn"), ("expert_tool_format", "sft", "tool_format"),
)
EXPERTS = ("expert_swe", "expert_single_turn", "expert_tool_format")


def proportion(successes: int, attempts: int) -> dict[str, Any]:
    """resolved, attempted, rate and its 95 % interval; the rate of nothing is 0."""
    low, high = statistics.wilson_interval(successes, attempts)
    return {"resolved": successes, "attempted": attempts,
            "rate": round(successes / attempts, 6) if attempts else 0.0, "ci95": [round(low, 6), round(high, 6)]}


def greedy(rows: Sequence[Row]) -> dict[str, Any]:
    """Numbers of one greedy episode a task; episodes without a verdict are counted apart and left out of rates."""
    counted = [row for row in rows if not row["infrastructure"]]
    solved = [row for row in counted if row["solved"]]
    turns = sum(row["turns"] for row in counted)
    return proportion(len(solved), len(counted)) | {
        "kinds": _by_kind(counted),
        "attempts": attempts_curve(counted),
        "mean_turns": round(turns / len(counted), 3) if counted else None,
        "valid_turns": round(1 - sum(row["malformed"] for row in counted) / turns, 6) if turns else 0.0,
        "outcomes": dict(Counter(row["reason"] for row in counted)) | {"infrastructure": len(rows) - len(counted)},
        "solved": {row["instance_id"]: bool(row["solved"]) for row in counted},
    }


def attempts_curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Share resolved by episodes that ran the tests at most 1, 2, ... times; a blind submission is one attempt."""
    return [{"attempts": limit} | proportion(sum(row["solved"] and max(row["attempts"], 1) <= limit for row in rows),
                                             len(rows)) for limit in range(1, MAX_ATTEMPTS + 1)]


def sampled(rows: Sequence[Row]) -> dict[str, Any]:
    """pass@k for k = 1, 2, 4, 8 over several sampled episodes a task, each a mean of unbiased estimates.

    Tasks whose episodes without a verdict leave fewer than k samples do not count for that k; `pass_at_8` is None
    where no task has 8. `sampled_solved` holds [solved, samples] of each task.
    """
    by_task: dict[str, list[bool]] = {}
    for row in rows:
        if not row["infrastructure"]:
            by_task.setdefault(row["instance_id"], []).append(bool(row["solved"]))
    result: dict[str, Any] = {"sampled_tasks": len(by_task),
                              "sampled_solved": {task: [sum(found), len(found)] for task, found in by_task.items()}}
    for k in (1, 2, 4, PASS_K):
        values = [statistics.pass_at_k(len(found), sum(found), k) for found in by_task.values() if len(found) >= k]
        result[f"pass_at_{k}"] = round(sum(values) / len(values), 6) if values else None
        if k == PASS_K and values:
            result["pass_at_8_ci95"] = [round(end, 6) for end in statistics.bootstrap_interval(values)]
    return result


def format_validity(rows: Sequence[Row]) -> dict[str, Any]:
    """Share of turns that keep the demanded tool-call format, in all and per template (the rows' `kind`)."""
    templates: dict[str, list[Row]] = {}
    for row in rows:
        templates.setdefault(row["kind"], []).append(row)
    turns, broken = sum(row["turns"] for row in rows), sum(row["malformed"] for row in rows)
    counted = [row for row in rows if not row["infrastructure"]]
    return {
        "format_valid": round(1 - broken / turns, 6) if turns else 0.0,
        "tool_format": proportion(sum(bool(row["solved"]) for row in counted), len(counted)) | {
            "by_template": {name: proportion(sum(row["turns"] - row["malformed"] for row in group),
                                             sum(row["turns"] for row in group))
                            for name, group in sorted(templates.items())},
            "solved": {row["instance_id"]: bool(row["solved"]) for row in counted},
        },
    }


def comparisons(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Paired tests on the tasks that both models of a pair have verdicts for.

    Greedy episodes by McNemar's exact test; where tasks were sampled too, the shares of solved samples by a sign-flip
    test: there the `only_` fields count tasks at which that model's share is the higher one.
    """
    tests = {}
    for first, second, domain in COMPARISONS:
        a, b = (_solved(models.get(name, {}), domain) for name in (first, second))
        common = sorted(a.keys() & b.keys())
        if common:
            test = statistics.paired_test([a[key] for key in common], [b[key] for key in common])
            tests[f"{first}_vs_{second}_{domain}"] = {
                "first": first, "second": second, "domain": domain, "tasks": len(common),
                "only_first": test.only_first, "only_second": test.only_second,
                "difference": round(test.difference, 6), "p_value": test.p_value}
        if domain == "swe" and (found := _sampled_comparison(*(models.get(name, {}) for name in (first, second)))):
            tests[f"{first}_vs_{second}_swe_sampled"] = {"first": first, "second": second} | found
    return tests


def _sampled_comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    a, b = (model.get("sampled_solved") or {} for model in (first, second))
    differences = [a[task][0] / a[task][1] - b[task][0] / b[task][1] for task in sorted(a.keys() & b.keys())]
    if not differences:
        return None
    return {"domain": "swe, sampled", "tasks": len(differences), "only_first": sum(x > 0 for x in differences),
            "only_second": sum(x < 0 for x in differences),
            "difference": round(sum(differences) / len(differences), 6),
            "p_value": statistics.sign_flip_test(differences)}


def retention(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the unified model keeps of the best expert in each domain; kept is None where no expert has anything."""
    kept = {}
    for domain in ("swe", "single_turn", "tool_format"):
        experts = {name: _rate(models[name], domain) for name in EXPERTS if name in models}
        experts = {name: rate for name, rate in experts.items() if rate is not None}
        unified = _rate(models.get("unified", {}), domain)
        if unified is not None and experts:
            best = max(experts, key=lambda name: experts[name])
            kept[domain] = {"unified": unified, "expert": experts[best], "best": best,
                            "kept": round(unified / experts[best], 6) if experts[best] else None}
    return kept


def _by_kind(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    attempted = Counter(row["kind"] for row in rows)
    resolved = Counter(row["kind"] for row in rows if row["solved"])
    return {kind: {"resolved": resolved[kind], "attempted": attempted[kind]} for kind in sorted(attempted)}


def _solved(model: Mapping[str, Any], domain: str) -> Mapping[str, bool]:
    part = model if domain == "swe" else model.get(domain) or {}
    return part.get("solved", {})


def _rate(model: Mapping[str, Any], domain: str) -> float | None:
    if domain == "tool_format":
        return model.get("format_valid")
    part = model if domain == "swe" else model.get(domain) or {}
    return part.get("rate")
