"""What several models' numbers say together: paired tests, and what the unified model keeps of each expert."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import statistics
from qcn_jax.pipeline.experts.expert import BASELINE, OWN, Expert

SIGNIFICANT = 0.05  # two-sided p below which a difference counts as measured
Models = Mapping[str, Mapping[str, Any]]


def comparisons(models: Models, experts: Sequence[Expert], baseline: str = "", start: str = "sft") -> dict[str, Any]:
    """Paired tests on the tasks that both models of a pair have verdicts for.

    Greedy episodes by McNemar's exact test; where tasks were sampled too, the shares of solved samples by a sign-flip
    test: there the `only_` fields count tasks at which that model's share is the higher one.

    Args:
      models: numbers by model, each from `Bench`.
      experts: whose comparisons are made.
      baseline: name of the model that stands for BASELINE.
      start: name of the one that stands for `sft`, from which experts begin.
    """
    tests = {}
    for expert in experts:
        named = {OWN: expert.model, BASELINE: baseline, "sft": start}
        for first, second in ((named.get(a, a), named.get(b, b)) for a, b in expert.comparisons):
            pair, domain = (models.get(first, {}), models.get(second, {})), expert.name
            a, b = map(expert.solved, pair)
            common = sorted(a.keys() & b.keys()) if first != second else []
            if common:
                test = statistics.paired_test([a[key] for key in common], [b[key] for key in common])
                tests[f"{first}_vs_{second}_{domain}"] = {
                    "first": first, "second": second, "domain": domain, "tasks": len(common),
                    "only_first": test.only_first, "only_second": test.only_second,
                    "difference": round(test.difference, 6), "p_value": test.p_value}
            if expert.headline and first != second and (found := _sampled_comparison(*pair)):
                tests[f"{first}_vs_{second}_{domain}_sampled"] = {
                    "first": first, "second": second, "domain": f"{domain}, sampled"} | found
    return tests


def _sampled_comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    a, b = (model.get("sampled_solved") or {} for model in (first, second))
    differences = [a[task][0] / a[task][1] - b[task][0] / b[task][1] for task in sorted(a.keys() & b.keys())]
    if not differences:
        return None
    return {"tasks": len(differences), "only_first": sum(x > 0 for x in differences),
            "only_second": sum(x < 0 for x in differences),
            "difference": round(sum(differences) / len(differences), 6),
            "p_value": statistics.sign_flip_test(differences)}


def headroom(models: Models, experts: Sequence[Expert], start: str = "sft") -> dict[str, Any]:
    """How much of what each expert gains in its own domain the unified model keeps, by domain.

    (unified - start) / (expert - start), over the tasks that all three have verdicts for; of greedy episodes, and as
    `DOMAIN_sampled` of shares of solved samples where there are such. Its interval is a paired bootstrap's over tasks;
    `kept` and `ci95` are None where the expert does not measurably gain (two-sided p of a paired test at least
    SIGNIFICANT, or no gain): there is no headroom then to keep anything of. An end of the interval that is infinite is
    None as well.
    """
    found = {}
    for expert in experts:
        three = [models.get(name, {}) for name in (start, expert.model, "unified")]
        ways = {expert.name: [{task: float(ok) for task, ok in expert.solved(model).items()} for model in three]}
        if expert.headline:
            ways[f"{expert.name}_sampled"] = [{task: solved / samples for task, (solved, samples) in
                                               (model.get("sampled_solved") or {}).items()} for model in three]
        for name, solved in ways.items():
            if common := sorted(solved[0].keys() & solved[1].keys() & solved[2].keys()):
                found[name] = _kept([[shares[task] for task in common] for shares in solved], name == expert.name)
    return found


def _kept(results: Sequence[Sequence[float]], single: bool) -> dict[str, Any]:
    """Numbers of one domain from results [start, expert, unified][tasks]; `single`: of one episode a task."""
    start, best, _ = results
    differences = [b - a for a, b in zip(start, best, strict=True)]
    p_value = (statistics.sign_test(sum(x > 0 for x in differences), sum(x < 0 for x in differences)) if single
               else statistics.sign_flip_test(differences))
    rates = [round(sum(result) / len(result), 6) for result in results]
    found: dict[str, Any] = {"tasks": len(start), "start": rates[0], "expert": rates[1], "unified": rates[2],
                             "gain_ci95": [round(end, 6) for end in statistics.bootstrap_interval(differences)],
                             "p_value": p_value, "kept": None, "ci95": None}
    if sum(differences) > 0 and p_value < SIGNIFICANT:
        kept, ends = statistics.kept_of_gain(*results)
        found |= {"kept": round(kept, 6), "ci95": [round(end, 6) if math.isfinite(end) else None for end in ends]}
    return found


def retention(models: Models, experts: Sequence[Expert]) -> dict[str, Any]:
    """What the unified model keeps of the best expert in each domain; kept is None where no expert has anything."""
    kept = {}
    for domain in experts:
        rates = {expert.model: domain.rate(models[expert.model]) for expert in experts if expert.model in models}
        rates = {name: rate for name, rate in rates.items() if rate is not None}
        unified = domain.rate(models.get("unified", {}))
        if unified is not None and rates:
            best = max(rates, key=lambda name: rates[name])
            kept[domain.name] = {"unified": unified, "expert": rates[best], "best": best,
                                 "kept": round(unified / rates[best], 6) if rates[best] else None}
    return kept
