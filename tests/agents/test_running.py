"""Episodes against an endpoint that plays right, wrong, never, slowly or not at all: each is what it was, and is kept."""

import json
import pathlib
import threading
import time

import pytest

from qcn_jax.agents import records, running
from qcn_jax.agents.acting import Limits
from qcn_jax.agents.arena import Place, open_arena
from qcn_jax.agents.records import Record
from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT
from qcn_jax.chat import endpoint
from qcn_jax.chat.endpoint import Endpoint
from qcn_jax.envs.sandbox import RepositorySpec
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.readers import chat, published
from tests.agents import playing
from tests.pipeline import chain


@pytest.fixture(name="served", scope="module")
def _served():
    with playing.serve() as served:
        yield served


@pytest.fixture(name="arena", scope="module")
def _arena(tmp_path_factory):
    """The three tasks of `playing`, ready."""
    folder = tmp_path_factory.mktemp("arena")
    folder.chmod(0o755)
    chain.write(folder)
    tasks = {name: playing.words(name) for name in playing.DEFECTS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        place = Place("local", "shared", workers=1)
        spec = RepositorySpec("words==1.0", str(folder / "words-1.0"))
        with open_arena(tasks, [spec], place, scaffold=MINI_SWE_AGENT) as arena:
            yield arena


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)


def run(arena, served, folder, model, limits=Limits(turns=4, seconds=60), tasks=("count",), attempts=1, **options):
    """Records of a model's episodes, written into `folder`."""
    place = running.Folder(folder, {"model": model})
    try:
        chosen = [arena.tasks[name] for name in tasks]
        return running.run(chosen, MINI_SWE_AGENT, arena.services, Endpoint(served[0], model, **options), model,
                           running.Plan(attempts, limits=limits, parallel=3), place)
    finally:
        place.close()


@pytest.mark.parametrize("model, outcome, reason", [
    ("gold", "resolved", "submitted"), ("wrong", "unresolved", "submitted"), ("empty", "unresolved", "submitted"),
    ("malformed", "unresolved", "unreadable"), ("silent", "unresolved", "unreadable"), ("looping", "limit", "turn_limit"),
    ("overlong", "limit", "length_limit"), ("cut_off", "unresolved", "unreadable"), ("flaky", "resolved", "submitted")])
def test_what_becomes_of_an_episode(arena, served, tmp_path, model, outcome, reason):
    (record,) = run(arena, served, tmp_path, model)
    assert (record.outcome, record.reason) == (outcome, reason)
    assert record.retries == (3 if model == "flaky" else 0)
    assert record.patch == (arena.tasks["count"].patch if outcome == "resolved" else record.patch)
    trajectory = json.loads((tmp_path / "trajectories/count/0.traj.json").read_text())
    assert trajectory["info"]["exit_status"] == {"submitted": "Submitted", "turn_limit": "LimitsExceeded"}.get(
        reason, trajectory["info"]["exit_status"])
    if model != "silent":  # whose turns hold nothing to learn
        read = chat.conversation(published.normalised(trajectory))
        assert [message["role"] for message in read.messages[:3]] == ["system", "user", "assistant"]


def test_a_slow_answer_is_not_waited_for(arena, served, tmp_path):
    (record,) = run(arena, served, tmp_path, "slow", Limits(turns=4, seconds=0.5))
    assert (record.outcome, record.reason, record.turns) == ("limit", "time_limit", 0)


def test_whole_answers_are_read_as_streams_are(arena, served, tmp_path):
    (record,) = run(arena, served, tmp_path, "gold", stream=False)
    assert record.resolved and (record.prompt_tokens, record.completion_tokens) == (14, 10)


def test_what_the_guard_refuses_is_counted(arena, served, tmp_path):
    (record,) = run(arena, served, tmp_path, "guarded")
    assert record.resolved and record.guard["blocked"] == 1 and record.guard["allowed"] == 2
    assert records.summary(["count"], [record], 1)["guard"] == dict(record.guard)


def test_an_endpoint_that_is_down_ends_the_run_and_nothing_is_lost(arena, served, tmp_path):
    failing = dict(attempts=running.FAILURES + 2)
    with pytest.raises(UserError, match="503.*in a row") as error:
        run(arena, served, tmp_path, "down", **failing)
    assert "\n" not in str(error.value)
    place = running.Folder(tmp_path, {"model": "down"})
    known = place.records()
    place.close()
    assert known and {record.outcome for record in known.values()} == {"infrastructure"}


@pytest.mark.parametrize("model, words", [("refused", "400: .*no such option"), ("locked", "401")])
def test_an_endpoint_that_refuses_ends_the_run_at_once(arena, served, tmp_path, model, words):
    before = sum(served[1].values())
    with pytest.raises(UserError, match=words):
        run(arena, served, tmp_path, model, attempts=20)
    assert sum(served[1].values()) - before <= 6  # of twenty, those that were under way


def test_a_run_goes_on_where_it_stopped(arena, served, tmp_path):
    first = run(arena, served, tmp_path, "mixed", tasks=("count", "short"))
    asked = dict(served[1])
    again = run(arena, served, tmp_path, "mixed", tasks=("count", "short", "digit"), attempts=2)
    assert [(r.key, r.seconds) for r in again[::2][:2]] == [(r.key, r.seconds) for r in first]
    assert [record.key for record in again] == [
        f"{name}/{n}" for name in ("count", "short", "digit") for n in (0, 1)]
    assert served[1]["mixed", "count"] == 2 * asked["mixed", "count"]  # the second attempt alone
    numbers = records.summary(["count", "short", "digit"], again, 2)
    assert (numbers["resolved"], numbers["attempted"], numbers["limit"], numbers["unresolved"]) == (2, 6, 2, 2)
    assert numbers["pass_at"]["2"]["rate"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="--model=mixed"):
        running.Folder(tmp_path, {"model": "another"})
    with pytest.raises(UserError, match="^--out=/proc/x: cannot be written"):
        running.Folder(pathlib.Path("/proc/x"), {})


def test_failures_of_the_infrastructure_do_not_count():
    made = [Record("a", 0, "resolved"), Record("a", 1, "infrastructure"), Record("b", 0, "infrastructure"),
            Record("b", 1, "infrastructure")]
    numbers = records.summary(["a", "b"], made, 2)
    assert (numbers["resolved"], numbers["attempted"], numbers["rate"]) == (1, 1, 1.0)
    assert numbers["pass_at"]["1"]["tasks"] == 1 and numbers["pass_at"]["2"] == {"rate": None, "ci95": [0.0, 1.0], "tasks": 0}


def test_pass_at_k_is_unbiased_and_has_an_interval():
    made = [Record(name, n, "resolved" if n < good else "unresolved") for name, good in (("a", 1), ("b", 4), ("c", 0))
            for n in range(4)]
    numbers = records.summary(["a", "b", "c"], made, 4)
    assert [round(numbers["pass_at"][k]["rate"], 6) for k in "124"] == [round(5 / 12, 6), 0.5, round(2 / 3, 6)]
    low, high = numbers["ci95"]
    assert 0 <= low < 5 / 12 < high <= 1


def test_an_endpoint_that_is_closed_waits_for_nothing(served, monkeypatch):
    """What a run that is stopped does to requests that wait for their next try."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 600.0)
    model = Endpoint(served[0], "down")
    said, failed, before = [{"role": "user", "content": "Mend count."}], [], served[1]["down", "count"]
    asking = threading.Thread(target=lambda: failed.append(pytest.raises(UserError, model.turn, said, None)))
    asking.start()
    while served[1]["down", "count"] == before:
        time.sleep(0.01)
    model.close()
    asking.join(60)
    assert not asking.is_alive() and "not asked any more" in str(failed[0].value)
