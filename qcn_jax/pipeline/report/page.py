"""The report's page: sections of HTML from the data that pipeline.stages.report collects. All text is escaped here."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from qcn_jax.pipeline.evaluate.baseline import Baseline
from qcn_jax.pipeline.evaluate.comparisons import SIGNIFICANT
from qcn_jax.pipeline.experts import headline
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.report import charts
from qcn_jax.pipeline.report.called_tools import called_tools
from qcn_jax.pipeline.report.conversations import trajectories_section
from qcn_jax.pipeline.report.headroom import headroom_table
from qcn_jax.pipeline.report.parts import section as _section
from qcn_jax.pipeline.report.parts import table
from qcn_jax.pipeline.report.parts import text as _text
from qcn_jax.pipeline.report.style import CSS
from qcn_jax.pipeline.rl import ledger

_EXPERT_COLOURS = (2, 6, 3, 5)  # of the palette, in turn
KEPT = 0.9  # of the best expert in each domain, what the unified model is meant to keep


@dataclasses.dataclass(frozen=True)
class Cast:
    """Who the page is about: titles and colours of models in the order they are shown."""

    experts: Sequence[Expert]
    baseline: Baseline | None

    @property
    def headline(self) -> Expert:
        """See pipeline.experts."""
        return headline(self.experts)

    @functools.cached_property
    def titles(self) -> dict[str, str]:
        """By model."""
        played = {} if self.baseline is None else {
            f"{self.baseline.name}_once": f"{self.baseline.title}, one guess",
            self.baseline.name: f"{self.baseline.title}, guessing on"}
        return played | {
            "base": "base", "midtrain": "mid-trained", "sft": "SFT", "sft_control": "SFT control, equal time",
            **{expert.model: expert.title for expert in self.experts}, "unified": "unified (distilled)"}

    @functools.cached_property
    def colours(self) -> dict[str, int]:
        """By model; what was not trained for the tasks has one colour."""
        own = {expert.model: _EXPERT_COLOURS[number % len(_EXPERT_COLOURS)]
               for number, expert in enumerate(self.experts)}
        return dict.fromkeys(self.titles, 7) | {"sft": 0, "unified": 1, "sft_control": 4} | own


def render(data: dict[str, Any], experts: Sequence[Expert], baseline: Baseline | None) -> str:
    """The whole page. `data` is what `report.collect` returns."""
    evaluation, cast = data["results"].get("evaluate", {}), Cast(experts, baseline)
    body = [
        _header(data), _cards(data, cast), _rates(evaluation, cast),
        _pair(_attempts(evaluation, cast), _rewards(data, cast)),
        _causes(data, cast), _pair(_losses(data), _distillation(data)),
        _tests(evaluation, cast), _kinds(evaluation, cast),
        *(called_tools(evaluation.get("models", {}), expert.name, cast.titles) for expert in cast.experts),
        _pair(_yields(data), _times(data)),
        trajectories_section(data["trajectories"], cast.titles), _footer(data),
    ]
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>qcn_jax: {_text(data['name'])}</title><style>{CSS}</style></head>\n"
            f"<body><main>{''.join(body)}</main></body></html>\n")


def _pair(left: str, right: str) -> str:
    return f"<div class=\"two\">{left}{right}</div>" if left or right else ""


def _header(data: dict[str, Any]) -> str:
    missing = data["missing"]
    note = f"<p class=\"bad\">Not finished: {_text(', '.join(missing))}.</p>" if missing else ""
    return (f"<header><h1>qcn_jax · {_text(data['name'])}</h1><p>Repositories become verifiable tasks, an agent acts "
            "in them, what the tests say becomes reward, and reward becomes better weights. Every rate on this page "
            f"comes from executing tests in a sandbox.</p>{note}</header>")


def _cards(data: dict[str, Any], cast: Cast) -> str:
    tasks, evaluation = data["results"].get("tasks", {}), data["results"].get("evaluate", {})
    models = evaluation.get("models", {})
    cards = []
    if cast.headline.model in models:
        best = models[cast.headline.model]
        cards.append((f"{best['rate']:.1%}", f"resolved by the {_text(cast.headline.title)}, greedy, "
                      f"{best['attempted']} held-out tasks"))
    if "sft" in models:
        cards.append((f"{models['sft']['rate']:.1%}", "resolved by SFT, where reinforcement learning starts"))
    if "unified" in models:
        cards.append((f"{models['unified']['rate']:.1%}", "resolved by the unified model"))
    if tasks:
        cards.append((f"{tasks['train']:,} + {tasks['heldout']:,}",
                      f"tasks for training + held out, from {len(tasks['repos_train'])} + "
                      f"{len(tasks['repos_heldout'])} repositories"))
    seconds = sum(data["seconds"].values())
    cards.append((f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s", "wall time of all stages"))
    kind = evaluation.get("sandbox", tasks.get("sandbox"))
    if kind:
        cards.append((_text(kind), "sandbox in which all code ran"))
    items = "".join(f"<div class=\"card\"><b>{value}</b><span>{_text(label)}</span></div>" for value, label in cards)
    return f"<div class=\"cards\">{items}</div>"


def _rates(evaluation: dict[str, Any], cast: Cast) -> str:
    models = evaluation.get("models", {})
    order, others = [name for name in cast.titles if name in models], [e for e in cast.experts if not e.headline]
    bars = [charts.Bar(cast.titles[name], models[name]["rate"], *models[name]["ci95"],
                       note=f"{models[name]['resolved']}/{models[name]['attempted']}", colour=cast.colours[name],
                       strong=name in (cast.headline.model, "unified")) for name in order]
    rows = []
    for name in order:
        model = models[name]
        low, high = model["ci95"]
        outcomes = model.get("outcomes", {})
        rows.append([
            _text(cast.titles[name]), f"{model['resolved']}/{model['attempted']}", f"{model['rate']:.1%}",
            f"{low:.1%} – {high:.1%}", _rate_or_dash(model.get("pass_at_1")), _rate_or_dash(model.get("pass_at_8")),
            *(_rate_or_dash(expert.rate(model)) for expert in others),
            _number_or_dash(model.get("mean_turns")), str(len(model.get("suspected_exploits", ()))),
            _refused(model.get("guard", {})),
            str(outcomes.get("infrastructure", 0)),
        ])
    head = ["model", "resolved", "greedy", "95 % interval", "sampled pass@1", "pass@8",
            *(_text(expert.column or expert.name) for expert in others), "turns", "exploits", "refused", "infra"]
    return _section(
        "Resolved rate on repositories never seen in training",
        "Multi-turn agent, greedy, one try per task: resolved means every failing test of the task passes and no "
        "passing test breaks. Whiskers are 95 % Wilson intervals. A baseline has no model: it guesses, once or, with "
        "the same tools and turns, until the tests pass. The SFT control had the same minutes of more imitation that "
        f"the {_text(cast.headline.title)} had of reinforcement learning. Format valid: share of turns whose "
        "tool calls parse, over the templates. Exploits: patches that seem to forge a verdict and count as failures. "
        "Refused: calls that reached for the network, by rule, where the agent has a shell. "
        "Infra: episodes without a verdict, left out of rates.",
        charts.interval_bars(bars) + (table(head, rows, [i for i, n in enumerate(order) if n == cast.headline.model])
                                      if rows else ""))


def _attempts(evaluation: dict[str, Any], cast: Cast) -> str:
    models = evaluation.get("models", {})
    series = []
    played = [] if cast.baseline is None else [cast.baseline.name]
    for name in (*played, "sft", "sft_control", cast.headline.model, "unified"):
        rows = models.get(name, {}).get("attempts", [])
        if rows:
            series.append(charts.Series(cast.titles[name], [row["attempts"] for row in rows],
                                        [row["rate"] for row in rows], cast.colours[name]))
    return _section("What test feedback adds", "Share of held-out tasks resolved within so many edits; after each one "
                    "the agent sees what the tests say. Below: after a first edit that failed, whether the next one is "
                    "right, and whether any further one is, beside as many edits on the same tasks by an agent that "
                    "was told nothing; how often an edit was tried that had failed before; and how many "
                    "turns of an episode were drawn again because they came to that (redraws).",
                    charts.line_chart(series, "edits tried", "resolved", percent=True, markers=True, zero=True)
                    + _feedback(models, cast))


def _feedback(models: dict[str, Any], cast: Cast) -> str:
    rows = []
    for name in ("sft", "sft_control", cast.headline.model, "unified"):
        for way, found in (models.get(name, {}).get("feedback") or {}).items():
            if found is not None:
                beside = [f"{pair['told']:.0%} told, {pair['fresh']:.0%} not" if pair else "-"
                          for pair in (found["next"], found["equal"])]
                repeated = "-" if found["repeated"] is None else f"{found['repeated']:.0%}"
                rows.append([f"{_text(cast.titles[name])}, {way}", *beside, repeated,
                             f"{found.get('redrawn', 0):.1f}", f"{100 * found['gain']:+.1f}"])
    columns = ["model", "next edit right", "any further one", "repeated", "drawn again", "points gained"]
    return table(columns, rows) if rows else ""


def _rewards(data: dict[str, Any], cast: Cast) -> str:
    series = [_series(data["curves"].get(f"experts/{expert.name}", []), expert.title, cast.colours[expert.model],
                      ("reward", "solved", "pass_rate")) for expert in cast.experts]
    return _section("Reward during reinforcement learning", "Mean reward of the episodes sampled in each update, on "
                    "training tasks; it comes from executing tests.",
                    charts.line_chart([s for s in series if s], "update", "reward"))


def _causes(data: dict[str, Any], cast: Cast) -> str:
    """The ledger of rewards: what decided, by expert over all updates, and for the headline's over time."""
    rows = []
    head = ["", *(_text(cause.replace("_", " ")) for cause in ledger.CAUSES), "length of episodes without a verdict"]
    for expert in cast.experts:
        found = ledger.over_updates(data["curves"].get(f"experts/{expert.name}", []))
        if found:
            rows.append([_text(expert.title), *(f"{found[f'cause/{cause}']:.1%}" for cause in ledger.CAUSES),
                         f"{found['missing_length']:.2f} of the others'"])
    if not rows:
        return ""
    curve = data["curves"].get(f"experts/{cast.headline.name}", [])
    series = [_series(curve, cause.replace("_", " "), number, (f"cause/{cause}",))
              for number, cause in enumerate(ledger.CAUSES)]
    chart = charts.line_chart([s for s in series if s and any(s.y)], "update", "episodes", percent=True, zero=True)
    return _section("What decided rewards", "Of the episodes sampled for learning. Tests decided on the policy's work, "
                    "or it ran into a limit, or it seemed to forge; where the verifier or the infrastructure failed "
                    "nothing is learned, and what is missing should be as long as the rest.",
                    table(head, rows) + _pair(chart, ""))


def _losses(data: dict[str, Any]) -> str:
    charted = []
    for stage, title, colour in (("midtrain", "mid-training", 0), ("sft", "SFT", 1)):
        one = _series(data["curves"].get(stage, []), title, colour, ("ce", "loss"))
        if one:
            charted.append(f"<h3>{title}</h3>" + charts.line_chart(
                [one], "step", "next-token loss, nats", log=all(y and y > 0 for y in one.y)))
    return _section("Training loss", "Cross-entropy of the next token; in SFT only of what the assistant says.",
                    "".join(charted))


def _distillation(data: dict[str, Any]) -> str:
    rows = data["curves"].get("distill", [])

    def curves(prefix: str) -> list[charts.Series]:
        names = [name for name in (rows[-1] if rows else {}) if name.startswith(f"{prefix}/")] or [prefix]
        found = [_series(rows, name.partition("/")[2].replace("_", " ") or name, index, (name,))
                 for index, name in enumerate(names)]
        return [series for series in found if series]

    content = charts.line_chart(curves("loss"), "update", "divergence, nats a token", zero=True)
    agreement = charts.line_chart(curves("agreement"), "update", "same first choice", percent=True)
    if agreement:
        content += f"<h3>Tokens on which both would choose the same</h3>{agreement}"
    return _section("Distillation into one model", "The student acts, and the expert of that domain says how likely "
                    "each token was.", content)


def _series(rows: Sequence[dict[str, Any]], title: str, colour: int, names: Sequence[str]) -> charts.Series | None:
    """The first of `names` that the rows have, over their steps."""
    for name in names:
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        if points:
            return charts.Series(title, [x for x, _ in points], [y for _, y in points], colour)
    return None


def _tests(evaluation: dict[str, Any], cast: Cast) -> str:
    rows = []
    for test in evaluation.get("tests", {}).values():
        verdict = "good" if test["p_value"] < SIGNIFICANT and test["difference"] > 0 else "quiet"
        first, second = (_text(cast.titles.get(test[side], test[side])) for side in ("first", "second"))
        rows.append([f"{first} against {second}",
                     _text(test["domain"]), str(test["tasks"]), str(test["only_first"]), str(test["only_second"]),
                     f"{test['difference'] * 100:+.1f} points",
                     f"<span class={verdict}>{_p_value(test['p_value'])}</span>"])
    content = table(["comparison", "domain", "tasks", "only the first", "only the second", "difference",
                     "p, two-sided"], rows) if rows else ""
    retention = [[_text(domain), f"{row['unified']:.1%}", f"{row['expert']:.1%}",
                  f"{_kept(row['kept'])}"]
                 for domain, row in evaluation.get("retention", {}).items()]
    if retention:
        content += "<h3>What the unified model keeps of each expert</h3>" + table(
            ["domain", "unified", "best expert", "kept"], retention)
    content += headroom_table(evaluation.get("headroom", {}))
    control = evaluation.get("control")
    note = (f" The control: {control['steps']} further SFT steps from the SFT checkpoint, as long as the "
            f"{cast.headline.title}'s {control['target_seconds']:.0f} s of reinforcement learning (it took "
            f"{control['seconds']:.0f} s)."
            if control else "")
    return _section("Paired comparisons", "The same tasks, the exact McNemar test on those that only one of the two "
                    f"resolves.{_text(note)}", content)


def _kinds(evaluation: dict[str, Any], cast: Cast) -> str:
    models = evaluation.get("models", {})
    order = [name for name in cast.titles if models.get(name, {}).get("kinds")]
    kinds = sorted({kind for name in order for kind in models[name]["kinds"]})
    rows = []
    for kind in kinds:
        cells = [models[name]["kinds"].get(kind) for name in order]
        attempted = max(cell["attempted"] for cell in cells if cell)
        rows.append([_text(kind), str(attempted), *(_shaded(cell) for cell in cells)])
    return _section("Per kind of bug", "Greedy resolved rate by the transformation that made the bug; held-out tasks "
                    "are balanced over kinds as far as they go.",
                    table(["kind", "tasks", *(_text(cast.titles[name]) for name in order)], rows) if rows else "")


def _shaded(cell: dict[str, Any] | None) -> str:
    if not cell or not cell["attempted"]:
        return "<td class=quiet>–</td>"
    share = cell["resolved"] / cell["attempted"]
    counts = f"{cell['resolved']}/{cell['attempted']}"
    return f"<td class=shade style=\"--share:{share:.3f}\" title=\"{counts}\">{share:.0%}</td>"


def _yields(data: dict[str, Any]) -> str:
    yields = data["results"].get("tasks", {}).get("yields", {})
    rows = [(kind, value["candidates"], value["kept"]) for kind, value in yields.items()]
    rows.sort(key=lambda row: (-row[2], row[0]))
    text = ("A candidate bug is kept when tests that passed now fail and the reverse patch makes them pass again; both "
            "are executed.")
    return _section("Task yield per transformation", text + _given_away(data), charts.yield_bars(rows))


def _given_away(data: dict[str, Any]) -> str:
    """What an agent is told and may see of the tasks that were made."""
    made = data["results"].get("tasks", {}).get("made")
    if not made:
        return ""
    shown = "are hidden from the agent" if made["tests_hidden"] else "stay in the agent's tree"
    others = "all" if made["pass_to_pass"] == "all" else f"{made['pass_to_pass']} of the"
    return (f" Statements are of the kind “{_text(made['statement'])}”, and the tests that show a defect {shown}; "
            f"statements give the fix's place away to {made['mean_localisation']:.2f} on a scale from 0 to 1. "
            f"PASS_TO_PASS holds {others} passing tests that do not call the defective function.")


def _times(data: dict[str, Any]) -> str:
    evaluation, tasks = data["results"].get("evaluate", {}), data["results"].get("tasks", {})
    content = charts.time_strip(list(data["seconds"].items()))
    isolation = evaluation.get("isolation") or tasks.get("isolation")
    if isolation:
        content += f"<h3>Sandbox</h3><p class=\"sub\">{_text(isolation)}</p>"
    if tasks:
        content += ("<h3>Repositories</h3><p class=\"sub\">Training: "
                    + " ".join(f"<code>{_text(name)}</code>" for name in tasks["repos_train"])
                    + "<br>Held out: " + " ".join(f"<code>{_text(name)}</code>" for name in tasks["repos_heldout"])
                    + "</p>")
    return _section("Time and place", f"On {_text(data['machine'])}.", content)


def _footer(data: dict[str, Any]) -> str:
    return "<footer>Made by qcn_jax; the numbers are in summary.json beside this page.</footer>"


def _rate_or_dash(value: float | None) -> str:
    return "<span class=quiet>–</span>" if value is None else f"{value:.1%}"


def _refused(guard: dict[str, int]) -> str:
    """Calls that the guard refused, and by which of its rules."""
    rules = {name.removeprefix("blocked/"): count for name, count in guard.items() if name.startswith("blocked/")}
    told = ", ".join(f"{_text(name)} {count}" for name, count in sorted(rules.items()))
    return f"{guard.get('blocked', 0)} ({told})" if rules else "0"


def _number_or_dash(value: float | None) -> str:
    return "<span class=quiet>–</span>" if value is None else f"{value:.1f}"


def _p_value(value: float) -> str:
    return "&lt; 0.0001" if value < 1e-4 else f"{value:.4f}"


def _kept(share: float | None) -> str:
    if share is None:
        return "<span class=quiet>–</span>"
    return f"<span class={'good' if share >= KEPT else 'bad'}>{share:.0%}</span>"
