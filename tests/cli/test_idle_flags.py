"""Flags that would say something, and nothing would follow: one line that names them, before any work."""

import pytest

from qcn_jax.cli import main as cli

EVALUATE = ["evaluate", "--tasks=none.jsonl", "--out=o"]
CHECKPOINT, ENDPOINT, RULES = ["--checkpoint=c"], ["--endpoint=u", "--model=m"], ["--baseline=heuristic"]


@pytest.mark.parametrize(("argv", "line"), [
    (["collect", "--tasks=none.jsonl", "--out=o.jsonl", "--baseline=heuristic", "--judge_model=eyes"],
     "--judge_model: nobody is asked without --judge_endpoint; leave it out"),
    *(([*EVALUATE, *CHECKPOINT, flag], f"{flag.split('=')[0].replace('--no', '--')}: only an --endpoint is asked so")
      for flag in ("--model=m", "--request_seconds=9", "--max_seconds=9", "--nostream", "--key_variable=K")),
    ([*EVALUATE, *RULES, "--model=m"], "--model: only an --endpoint is asked so"),
    *(([*EVALUATE, *ENDPOINT, flag], f"{flag.split('=')[0]}: only a --checkpoint is run here")
      for flag in ("--mesh=expert=2", "--redraw_temperature=0.5", "--block_size=64")),
    *(([*EVALUATE, *RULES, flag], f"{flag.split('=')[0]}: a --baseline plays by rules and writes no tokens")
      for flag in ("--temperature=1", "--top_p=0.5", "--top_k=5", "--max_new_tokens=9", "--max_length=99")),
    ([*EVALUATE, *CHECKPOINT, "--redraw_temperature=0.5"], "--redraw_temperature: no turn is drawn again without --redraws"),
    ([*EVALUATE, *RULES, "--network=filtered"], "--network: --scaffold=nano has no shell that could reach it"),
    ([*EVALUATE, *RULES, "--count=3"], "--count: tasks are made of --repo only without --tasks"),
    (["fix", "--test=t", "--baseline=heuristic", "--temperature=1"], "--temperature: a --baseline plays by rules"),
    (["verify", "--tasks=none.jsonl", "--key_variable=K"], "--key_variable: nobody is asked without --endpoint"),
    *((["synthesize", "--repo=r", "--out=o", flag], f"{flag.split('=')[0].replace('--no', '--')}: only strategy {strategy} has a use for it")
      for flag, strategy in (("--issues=i.json", "mine"), ("--noneed_issue", "mine"), ("--mined_per_repo=3", "mine"),
                             ("--combined_per_repo=3", "combine"), ("--rewrites_per_repo=3", "rewrite"))),
    (["synthesize", "--repo=r", "--out=o", "--model=m"], "--model: nobody is asked without --endpoint"),
    (["synthesize", "--repo=r", "--out=o", "--key_variable=K"], "--key_variable: nobody is asked without --endpoint"),
    *((["problems", "--data=none.jsonl", "--out=o", flag], f"{flag.split('=')[0]}: of problems that are made, and with --data none are")
      for flag in ("--count=3", "--kinds=sql", "--languages=go", "--seed=1", "--split=heldout")),
    (["problems", "--out=o", "--share=0.9"], "--share: only rows of --data have several solutions"),
    *((["generate", "--checkpoint=c", "--prompt=a", flag], f"{flag.split('=')[0]}: nothing is drawn without --temperature")
      for flag in ("--top_p=0.5", "--top_k=5")),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_flag_without_the_one_that_gives_it_a_meaning_is_refused(tmp_path, monkeypatch, capsys, argv, line) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert line in said and len(said.strip().splitlines()) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["tests"]


def test_the_address_of_no_cluster_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "core.py").write_text("def f():\n    return 1\n")
    assert cli.main(["fix", "--test=t", "--baseline=heuristic", "--ray_address=a:1"]) == 1
    assert "--ray_address: only --pool=ray has a cluster" in capsys.readouterr().err
