"""The orchestrator under thousands of schedules: every promise of its text, with a clock that is only told to go on."""

import concurrent.futures
import dataclasses
import itertools

import numpy as np
import pytest

from qcn_jax.pipeline.rl.events import Events
from qcn_jax.pipeline.rl.plan import Plan, host_of
from qcn_jax.pipeline.rl.records import Stopped
from tests.pipeline.rl.fakes import Meeting, Talk, World, number

UPDATES = 4


@pytest.fixture(autouse=True)
def nothing_open():
    Talk.open_.clear()
    yield


def plans():
    for staleness in (0, 1, 4):
        for stale in ("drop", "cut"):
            for caches in ("recompute", "keep"):
                yield Plan(3, 6, max_staleness=staleness, stale=stale, caches=caches, refills=2, burst=3 if staleness else 0)


def told(records):
    """What a record says, comparable."""
    return [(r.prompt, r.sample, r.tokens.tolist(), r.sampled.tolist(), r.logprobs.tolist(), r.versions.tolist(), r.opened,
             r.turns, r.outcome, r.routes.tolist()) for r in records]


def sometimes(share):
    return lambda group, sample: number("fails", group, sample) % 1000 < 1000 * share


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: f"{plan.max_staleness}-{plan.stale}-{plan.caches}")
def test_schedules_keep_every_promise(plan):
    """Over 1,200 schedules in all: full groups once each, versions within bounds, nothing left open."""
    for seed in range(100):
        world = World(plan, seed, slowest=(0.0, 1.0, 30.0)[seed % 3], fails=sometimes((0.0, 0.1, 0.5)[seed // 3 % 3]))
        seen = []
        for version in range(UPDATES):
            records = world.update(version)
            groups = sorted({record.prompt for record in records})
            assert len(groups) == plan.groups and not set(groups) & set(seen)
            seen += groups
            for group in groups:
                mine = [record for record in records if record.prompt == group]
                real = [record for record in mine if not record.outcome.infrastructure]
                assert len(real) in (0, world.size) and len({record.sample for record in mine}) == len(mine)
                assert real or len(mine) > plan.refills * world.size  # given up
            for record in records:
                assert record.tokens.shape == record.versions.shape == record.logprobs.shape
                assert (record.versions[record.sampled] >= record.opened).all() and (record.versions <= version).all()
                assert (record.versions[~record.sampled] == -1).all()
                assert record.routes.shape == (len(record.tokens), 1, 1) and (record.routes >= 0).all()
                if plan.stale == "drop":
                    assert version - record.opened <= plan.max_staleness
        assert seen == sorted(seen) or plan.max_staleness
        world.acting.close()
        assert not Talk.open_


def test_without_staleness_every_update_waits_for_its_own_groups():
    for seed in range(20):
        slow, quick = World(Plan(3, 6), seed, slowest=30.0), World(Plan(3, 6), seed, slowest=0.0)
        for version in range(3):
            records = slow.update(version)
            assert [r.prompt for r in records] == [g for g in range(3 * version, 3 * version + 3) for _ in range(3)]
            assert told(records) == told(quick.update(version))  # whatever the schedule


def test_a_slow_environment_delays_nobody():
    """One group never answers in time: updates go on without it, and it is dropped and counted."""
    plan = Plan(2, 6, max_staleness=2, burst=3)

    class Stuck(World):
        def latency(self, call):
            return 1e6 if getattr(getattr(call, "__self__", None), "number", None) == 1 else 0.0

    world = Stuck(plan, slots=12)
    for version in range(5):
        assert 1 not in {record.prompt for record in world.update(version)}
    assert world.clock.now < 1e3 and world.acting.counts["stale_groups"] >= 1 and 1 not in world.acting._groups


def test_open_episodes_go_on_under_the_new_weights_and_say_so():
    world, mixed = World(Plan(2, 6, max_staleness=3, burst=2), slots=12, slowest=10.0), 0
    for version in range(6):
        for record in world.update(version):
            drawn = record.versions[record.sampled]
            assert (np.diff(drawn) >= 0).all()
            mixed += len(set(drawn.tolist())) > 1
    assert mixed > 3


@pytest.mark.parametrize("caches", ["recompute", "keep"])
def test_caches_after_an_update(caches):
    world = World(Plan(2, 6, max_staleness=2, caches=caches, burst=2), slots=12, slowest=10.0)
    world.update(0)
    held = {slot: list(world.engine.held[slot]) for slot in world.acting._active | world.acting._asked}
    assert held
    world.engine.params = 1
    world.acting.begin(1)
    for slot, tokens in held.items():
        now = world.engine.held[slot]
        assert [token for token, *_ in now] == [token for token, *_ in tokens]
        assert {weights for _, weights, _ in now} == ({1} if caches == "recompute" else {0})


def test_routes_are_those_that_tokens_had_when_they_were_drawn():
    world, looked = World(Plan(2, 6, max_staleness=3, burst=2), slots=12, slowest=10.0), 0
    for version in range(5):
        for record in world.update(version):
            for token, drawn, route in zip(record.tokens, record.versions, record.routes[:, 0, 0]):
                if drawn >= 0:
                    looked += 1
                    assert route == number(int(token), int(drawn)) % 7
    assert looked > 100


def test_turns_that_are_not_taken_are_drawn_again_from_another_stream():
    """What was drawn for nothing is in no record; caches and routes are those of what is."""
    redrawn = 0
    for seed in range(4):
        world = World(Plan(2, 6, max_staleness=seed % 2, burst=2), seed, again=3)
        for version in range(4):
            for record in world.update(version):
                for turn, after in zip(record.turns, (*record.turns[1:], None)):
                    said = record.tokens[turn.start : turn.stop].tolist()
                    place = record.turns.index(turn)
                    assert number("again", (record.prompt, record.sample), place, said) % 3
                    assert after is None or after.start > turn.stop or record.sampled[turn.stop]
                    redrawn += turn.redrawn
                assert record.sampled.sum() == sum(turn.stop - turn.start for turn in record.turns)
                assert len(record.tokens) == len(record.logprobs) == len(record.versions) == len(record.routes)
        told = [tuple(record.tokens.tolist()) for record in World(Plan(2, 6), seed, again=3).update(0)]
        assert told == [tuple(record.tokens.tolist()) for record in World(Plan(2, 6), seed, slowest=0.0, again=3).update(0)]
    assert redrawn > 20


def test_what_has_no_verdict_is_drawn_again_and_changes_no_expectation():
    """Failures that do not depend on the episode: the rewards of full groups are as without them."""
    means = []
    for share in (0.0, 0.1, 0.5, 0.9):
        rewards = []
        for seed in range(60):
            world = World(Plan(4, 6, refills=100), seed, fails=lambda group, sample, seed=seed: number(
                "fail", seed, group, sample) % 1000 < 1000 * share)
            offset = 1000 * seed
            world.acting._group_of = lambda place, world=world, offset=offset: world.group(offset + place)
            real = [r for r in world.update(0) if not r.outcome.infrastructure]
            assert len(real) == 4 * world.size
            rewards += [record.outcome.reward for record in real]
        means.append(np.mean(rewards))
    bound = 4 * 0.5 * np.sqrt(2 / (60 * 12))  # four standard errors of a difference of means of coin tosses
    assert max(means) - min(means) < bound, means


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: f"{plan.max_staleness}-{plan.stale}-{plan.caches}")
def test_killed_at_any_tick_the_run_goes_on_as_if_it_had_not_been(plan, tmp_path):
    """With caches made anew, or without staleness, bit for bit; where they are kept nothing is lost or taken twice."""
    exact = plan.caches == "recompute" or not plan.max_staleness
    for seed in range(2):
        options = {"seed": seed, "slowest": 0.0 if exact else 5.0, "fails": sometimes(0.1), "again": 4 * seed}
        whole = World(plan, **options)
        want = [told(whole.update(version)) for version in range(UPDATES)]
        for kill in range(1, 40, 4):
            folder, ticks = tmp_path / f"{seed}-{kill}", iter(range(kill))
            got, done = {}, 0

            def killed():
                return next(ticks, None) is None

            first = World(plan, events=Events(folder), **options)
            try:
                for version in range(UPDATES):
                    got[version] = told(first.update(version, killed))
                    done = version + 1
            except Stopped:
                pass
            saved = max(0, done - 1)  # the newest checkpoint is one update behind
            second = World(plan, events=Events(folder), **options)
            second.acting.resume(saved)
            for version in range(saved, UPDATES):
                again = told(second.update(version))
                if version in got:
                    assert again == got[version]  # learned from once more, not acted again
                got[version] = again
            if exact:
                assert [got[version] for version in range(UPDATES)] == want, (seed, kill)
            taken = [row[:2] for version in range(UPDATES) for row in got[version]]
            assert len(taken) == len(set(taken))
            if done:
                assert second.engine.generated < whole.engine.generated or not exact


class Hanging(World):
    """With environments of host 1 that never answer."""

    def latency(self, call):
        hangs = self.plan.host == 1 and getattr(call, "__name__", "") in ("ask", "judge")
        return 1e6 if hangs else super().latency(call)


def hosts_run(plan, folder, versions, kill=None, saved=0, world_of=World, **options):
    """Two hosts' records of some updates, and how often each ticked; killed when host 0 asks for the `kill`-th time."""
    meeting, found, ticks = Meeting(2), [{}, {}], [0, 0]

    def host(number):
        asked = itertools.count(1)
        world = world_of(dataclasses.replace(plan, host=number, hosts=2), meeting=meeting,
                         events=Events(folder / str(number)), **options)
        try:
            world.acting.resume(saved)
            for version in versions:
                found[number][version] = told(world.update(version, lambda: number == 0 and next(asked) == kill))
        except Stopped:
            pass
        ticks[number] = world.acting._ticks

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(host, (0, 1)))
    return found, ticks


@pytest.mark.parametrize("staleness", [0, 2])
def test_two_hosts_share_groups_and_a_killed_run_goes_on(staleness, tmp_path):
    plan = Plan(4, 6, max_staleness=staleness, refills=2, burst=3 if staleness else 0)
    whole, ticks = hosts_run(plan, tmp_path / "whole", range(UPDATES), slowest=0.0)
    assert ticks[0] == ticks[1]
    for version in range(UPDATES):
        groups = [{row[0] for row in whole[host][version]} for host in (0, 1)]
        assert len(groups[0] | groups[1]) == 4 and not groups[0] & groups[1]
        assert staleness or all(group % 2 == host for host in (0, 1) for group in groups[host])
    for kill in (3, 11, 17, 23):
        folder = tmp_path / str(kill)
        part, _ = hosts_run(plan, folder, range(UPDATES), kill, slowest=0.0)
        done = min(len(part[0]), len(part[1]))
        saved = max(0, done - 1)
        rest, _ = hosts_run(plan, folder, range(saved, UPDATES), saved=saved, slowest=0.0)
        for host in (0, 1):
            assert part[host] | rest[host] == whole[host]


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("hangs", [False, True])
def test_hosts_agree_on_who_holds_what_whatever_was_lost_where(staleness, hangs, tmp_path):
    """Slow or hanging environments, samples drawn again, groups given up or lost on one host alone; killed at any tick."""
    plan = Plan(4, 6, max_staleness=staleness, refills=2, burst=3)
    uneven = 0
    for seed in range(2):
        options = {"seed": seed, "slowest": 5.0, "fails": sometimes((0.1, 0.5)[seed]),
                   "world_of": Hanging if hangs else World}
        for kill in (5, 29):
            folder = tmp_path / f"{seed}-{kill}"
            part, _ = hosts_run(plan, folder, range(UPDATES), kill, **options)
            saved = max(0, min(map(len, part)) - 1)
            rest, ticks = hosts_run(plan, folder, range(saved, UPDATES), saved=saved, **options)
            assert ticks[0] == ticks[1]
            seen: set[int] = set()
            for version in range(UPDATES):
                groups = []
                for host in (0, 1):
                    ours = rest[host].get(version, part[host].get(version))
                    assert part[host].get(version, ours) == ours  # learned from once more, not acted again
                    groups.append({row[0] for row in ours})
                assert len(groups[0] | groups[1]) == 4 and not groups[0] & groups[1] and not seen & (groups[0] | groups[1])
                seen |= groups[0] | groups[1]
                uneven += len(groups[0]) != len(groups[1])
    assert uneven


def test_all_groups_of_a_rollout_are_where_host_of_says():
    for hosts in (1, 2, 3):
        worlds = [World(Plan(7, 6, host=host, hosts=hosts)) for host in range(hosts)]
        for world in worlds:
            world.acting.begin(0)
        assert [[host_of(number, hosts) == host for number in range(7)] for host in range(hosts)] == [
            [number in world.acting._groups for number in range(7)] for world in worlds]


def test_a_host_whose_environments_hang_delays_no_other():
    """The other gets the groups that an update needs, and waits neither for answers nor for them."""
    plan, seconds = Plan(4, 6, max_staleness=1, burst=3), {}

    def host(number, meeting, world_of):
        world = world_of(dataclasses.replace(plan, host=number, hosts=2), meeting=meeting, slowest=0.0)
        taken = [world.update(version, lambda: world.acting._ticks > 500) for version in range(UPDATES)]
        seconds[world_of, number] = world.acting.seconds_waited, world.clock.now
        return taken

    for world_of in (World, Hanging):
        meeting = Meeting(2)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            taken = list(pool.map(lambda number: host(number, meeting, world_of), (0, 1)))
        for version in range(UPDATES):
            assert len({record.prompt for host in taken for record in host[version]}) == 4
    assert not any(taken[1])
    assert seconds[Hanging, 0][0] == 0.0 and seconds[Hanging, 1][1] < 1e3


def test_an_environment_that_answers_otherwise_begins_again(tmp_path):
    plan = Plan(2, 6, max_staleness=2, burst=2)
    first = World(plan, events=Events(tmp_path), slots=12, slowest=10.0)
    first.update(0)
    assert any(episode.turns for episode in (first.acting._active | first.acting._asked).values())

    class Other(World):
        def group(self, place):
            group = super().group(place)

            def opened(sample):
                talk = Talk(place, sample, self.fails)
                talk._turns = 5  # answers as in later turns
                return talk

            return dataclasses.replace(group, open=opened)

    second = Other(plan, events=Events(tmp_path), slots=12, slowest=10.0)
    second.acting.resume(1)
    assert len(second.update(1)) == 6 and second.acting.counts["put_back"] > 0


def test_another_number_of_slots_goes_on_with_what_has_ended(tmp_path):
    plan = Plan(2, 6, max_staleness=1, burst=2)
    first = World(plan, events=Events(tmp_path), slots=12, slowest=10.0)
    want = [told(first.update(version)) for version in range(3)]
    second = World(plan, events=Events(tmp_path), slots=6, slowest=10.0)
    second.acting.resume(1)
    assert [told(second.update(version)) for version in (1, 2)] == want[1:]
    assert {r.prompt for r in second.update(3)}.isdisjoint({row[0] for rows in want for row in rows})
    second.acting.close()
    third = World(plan, events=Events(tmp_path), slots=6, slowest=10.0)
    third.acting.resume(3)
    assert len(third.update(3)) == 6 and len(third.update(4)) == 6


def test_a_journal_of_other_settings_is_begun_anew(tmp_path):
    World(Plan(2, 6), events=Events(tmp_path)).update(0)
    other = World(Plan(3, 6), events=Events(tmp_path))
    other.acting.resume(1)
    assert [record.prompt for record in other.update(1)] == [3, 3, 3, 4, 4, 4, 5, 5, 5]


def test_what_a_crash_left_half_written_is_cut_off(tmp_path):
    events = Events(tmp_path)
    events.add({"t": 1, "kind": "tick", "tokens": np.arange(5, dtype=np.int32)})
    events.add({"t": 2, "kind": "tick", "tokens": np.arange(3, dtype=np.int16), "empty": np.zeros((0, 2), np.float32)})
    events.close()
    with open(tmp_path / "arrays.bin", "ab") as stream:
        stream.write(b"half of an array")
    events = Events(tmp_path)
    assert [row["t"] for row in events.read()] == [1, 2]
    events.add({"t": 3, "kind": "tick", "tokens": np.arange(2, dtype=np.int64)})
    loaded = [events.load(row) for row in events.read()]
    assert [row["tokens"].tolist() for row in loaded] == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1]]
    assert loaded[1]["empty"].shape == (0, 2) and loaded[2]["tokens"].dtype == np.int64
    events.close()
    (tmp_path / "arrays.bin").write_bytes((tmp_path / "arrays.bin").read_bytes()[:22])  # the disk lost the end
    assert [row["t"] for row in Events(tmp_path).read()] == [1]
