"""Batches are a function of sources and seed, resume where they stopped, and mix by share of tokens."""

import json

import numpy as np
import pytest

from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import loader


class _Made:
    """An endless source: document i is i % 5 + 3 tokens of marker 9."""

    def __getitem__(self, index):
        return {"tokens": np.full(index % 5 + 3, 9), "weights": np.full(index % 5 + 3, 0.5, np.float32)}


def _documents(marker, count, mean, seed=0):
    sizes = np.random.default_rng(seed).integers(1, 2 * mean, count)
    return [{"tokens": np.full(n, marker, np.int32), "weights": np.ones(n, np.float32)} for n in sizes]


def _sources():
    return [loader.Source("long", _documents(1, 30, 40), 0.5), loader.Source("short", _documents(2, 200, 6), 0.3),
            loader.Source("made", _Made(), 0.2)]


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _same(a, b):
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def _batches(seed=3, **options):
    return loader.batches(_sources(), **{"rows": 4, "length": 64, "seed": seed} | options)


def test_two_runs_and_a_resume_give_the_same_batches_over_many_windows():
    whole = _take(_batches(), 60)  # 240 rows: several windows and epochs
    assert whole[0]["tokens"].shape == (4, 64)
    assert _same(whole, _take(_batches(), 60))
    assert not _same(whole[:3], _take(_batches(seed=4), 3))
    for stop in (0, 1, 17, 41):
        first = _batches()
        _take(first, stop)
        state = json.loads(json.dumps(first.get_state()))  # a checkpoint holds JSON
        resumed = _batches()
        resumed.set_state(state)
        assert _same(whole[stop:stop + 8], _take(resumed, 8))
        _take(first, 8)
        assert loader.summary(resumed) == loader.summary(first)
        unread = _batches()  # as a run that was killed behind its last step
        unread.set_state(json.loads(json.dumps(first.get_state())))
        assert loader.summary(unread) == loader.summary(first)


def test_shares_are_shares_of_tokens():
    tokens = np.concatenate([batch["tokens"].ravel() for batch in _take(_batches(), 120)])
    counts = np.array([(tokens == marker).sum() for marker in (1, 2, 9)])
    np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.3, 0.2], atol=0.05)


def test_padding_is_small_and_reported():
    iterator = _batches()
    batches = _take(iterator, 40)
    padding = np.mean([np.mean(batch["segment_ids"] == 0) for batch in batches])
    assert padding < 0.02
    assert loader.statistics(iterator).padding < 2 and loader.statistics(iterator).fragmentation == 0
    assert loader.statistics(iterator).documents > 100


def test_what_was_read_of_every_source_and_what_other_methods_cost():
    iterator = loader.batches([*_sources(), loader.Source("rare", _Made(), 1e-9)], rows=4, length=64, seed=3,
                              method="pad_last", origins=True)
    first = next(iterator)
    assert set(np.unique(first["source"][first["segment_ids"] > 0])) <= {0, 1, 2}
    assert np.all((first["tokens"] == 9) == (first["source"] == 2))
    found = loader.summary(iterator)
    assert found["sources"]["rare"] == {"documents": 0, "tokens": 0}
    assert sum(of["documents"] for of in found["sources"].values()) == found["documents"]
    assert found["variants"]["pad_last"] == {"fragmentation": 0.0, "padding": found["padding"]}
    assert found["variants"]["concat"]["fragmentation"] > 5 and found["variants"]["best_fit"]["padding"] < 2
    lines = list(loader.lines(found))
    assert lines[0].startswith("packing pad_last: fragmentation 0.00 %, padding ") and "concat: " in lines[1]
    assert lines[-1].startswith("rare: no document of it was read")
    cut = loader.lines(found | {"overlong": 7, "heads": 9, "cut_heads": 3, "dropped": 0, "rule": "slide"})
    assert {"7 documents are longer than a row (slide)", "3 of 9 conversations are cut such that a piece lacks their "
            "tool definitions"} <= set(cut)


def test_documents_that_give_no_row_are_said_to(monkeypatch):
    monkeypatch.setattr(loader, "_FRUITLESS", 500)
    dropped = lambda documents: loader.batches([loader.Source("a", documents, 1.0)], rows=2, length=8, seed=0,
                                               overlong="drop")
    with pytest.raises(UserError, match="none of 5.. documents fits into a row of 8 tokens, and overlong=drop"):
        next(dropped([{"tokens": np.ones(9, int)}]))
    few = dropped([{"tokens": np.ones(9, int)}] * 300 + [{"tokens": np.full(5, 2)}])
    assert (next(few)["tokens"] == 2).sum() == 10
    with pytest.raises(UserError, match="source a: its documents have no tokens"):
        dropped([{"tokens": np.zeros(0, int)}])


def test_a_store_keeps_numbers_of_documents(tmp_path):
    documents = [{"tokens": np.arange(n), "head": n - 1} for n in (3, 5)]
    loader.TokenStore.write(tmp_path, documents)
    again = loader.TokenStore(tmp_path)
    assert [int(again[i]["head"]) for i in (0, 1)] == [2, 4] and again[1]["tokens"].tolist() == [0, 1, 2, 3, 4]


def test_token_store_round_trip(tmp_path):
    documents = _documents(70_000, 5, 9) + _documents(3, 5, 9)
    assert not loader.TokenStore.exists(tmp_path)
    store = loader.TokenStore.write(tmp_path, [*documents, {"tokens": np.zeros(0), "weights": np.zeros(0)}])
    assert len(store) == 10 and store.tokens == sum(len(d["tokens"]) for d in documents)
    again = loader.TokenStore(tmp_path)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(again[i]["tokens"], document["tokens"])
        np.testing.assert_array_equal(again[i]["weights"], document["weights"])
    (tmp_path / "tokens.bin").write_bytes((tmp_path / "tokens.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match="tokens.bin: has .* bytes instead of .*; remove its folder"):
        loader.TokenStore(tmp_path)


def test_bad_mixtures_are_one_line(tmp_path):
    with pytest.raises(UserError, match="every share is 0"):
        loader.batches([loader.Source("a", _Made(), 0.0)], rows=1, length=8, seed=0)
    with pytest.raises(UserError, match="source a: 0 documents"):
        loader.batches([loader.Source("a", [], 1.0)], rows=1, length=8, seed=0)
    with pytest.raises(UserError, match="no documents"):
        loader.TokenStore.write(tmp_path, [])
