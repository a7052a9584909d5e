"""Packing: every token placed once, nothing leaks, and the methods differ as the report says they do."""

import bisect
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import packing


def _documents(lengths):
    """Documents whose tokens say which document and which position they are."""
    return [{"tokens": 1000 * (d + 1) + np.arange(n), "weights": np.full(n, d + 1.0),
             "advantages": np.arange(n) + 0.5} for d, n in enumerate(lengths)]


def _pieces(arrays):
    """Reads rows back: (tokens, weights, positions, advantages) of every segment, in order."""
    for row in range(arrays["tokens"].shape[0]):
        ids = arrays["segment_ids"][row]
        assert np.all(np.diff(ids[ids > 0]) >= 0)
        for segment in range(1, ids.max(initial=0) + 1):
            at = np.flatnonzero(ids == segment)
            assert len(at) and np.all(np.diff(at) == 1)
            yield tuple(arrays[key][row, at] for key in ("tokens", "weights", "positions", "advantages"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(2, 24),
       st.sampled_from(["best_fit", "pad_last", "concat"]))
def test_every_token_is_placed_exactly_once(lengths, length, method):
    arrays = packing.pack(_documents(lengths), length, method=method)
    seen = np.concatenate([piece[0] for piece in _pieces(arrays)] or [np.zeros(0)])
    want = np.concatenate([document["tokens"] for document in _documents(lengths)])
    assert sorted(seen.tolist()) == sorted(want.tolist())
    assert (arrays["tokens"] > 0).sum() == sum(lengths)
    for tokens, weights, positions, advantages in _pieces(arrays):
        assert np.all(np.diff(tokens) == 1)  # one run of one document
        assert weights[-1] == 0 and np.all(weights[:-1] == tokens[0] // 1000)
        assert positions.tolist() == list(range(len(tokens)))
        np.testing.assert_array_equal(advantages, tokens % 1000 + 0.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=60))
def test_best_fit_keeps_documents_whole_and_never_opens_a_needless_row(lengths):
    length = 24
    planned = packing.plan(lengths, length)
    assert packing.statistics(lengths, length, planned).fragmentation == 0
    filled = np.bincount(planned.row, planned.stop - planned.start)
    assert filled.max() <= length
    # No two rows could be merged: the mark of any fit heuristic.
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > length


def _one_by_one(sizes, length):
    """Best-fit decreasing as it is usually written: the row of each piece."""
    free, rows = [], [0] * len(sizes)  # (room, minus the time at which it came to be, row), sorted
    used = time_ = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(free, (sizes[i],))
        room, _, row = free.pop(at) if at < len(free) else (length, 0, used)
        used, time_, rows[i] = max(used, row + 1), time_ - 1, row
        if room > sizes[i]:
            bisect.insort(free, (room - sizes[i], time_, row))
    return rows


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 24), max_size=120), st.sampled_from([24, 32]))
def test_pieces_of_one_size_go_where_they_would_one_by_one(lengths, length):
    planned = packing.plan(lengths, length)
    rows = np.zeros(len(lengths), int)
    rows[planned.document] = planned.row
    assert rows.tolist() == _one_by_one(lengths, length)


def test_overlong_documents():
    documents = _documents([25])
    windows = lambda **options: [p[0].tolist() for p in _pieces(packing.pack(documents, 10, **options))]
    of = lambda start, stop: list(range(1000 + start, 1000 + stop))
    assert windows() == [of(0, 10), of(10, 20), of(20, 25)]
    assert packing.pack(documents, 10, overlong="drop")["tokens"].shape == (0, 10)
    documents = _documents([23])
    assert windows(overlong="slide") == [of(0, 10), of(5, 15), of(10, 20), of(13, 23)]
    assert windows(overlong="slide_merge") == [of(0, 10), of(5, 15), of(13, 23)]
    documents = _documents([12])  # the first window stays, whatever is behind it
    assert windows(overlong="slide") == windows(overlong="slide_merge") == [of(0, 10), of(2, 12)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.integers(1, 13),
       st.sampled_from(["slide", "slide_merge"]), st.sampled_from(["best_fit", "pad_last"]))
def test_sliding_windows_predict_every_token_once(lengths, length, overlong, method):
    pieces = list(_pieces(packing.pack(_documents(lengths), length, method=method, overlong=overlong)))
    counted = [t + 1 for tokens, weights, *_ in pieces for t in tokens[weights > 0]]
    # Rows of one token predict nothing; else all but a document's first token are predicted.
    assert sorted(counted) == [1000 * (d + 1) + t for d, n in enumerate(lengths) for t in range(1, n) if length > 1]
    long = {1000 * (d + 1) for d, n in enumerate(lengths) if n > length}
    assert all(len(tokens) == length for tokens, *_ in pieces if tokens[0] - tokens[0] % 1000 in long)


def test_fragmentation_counts_documents_and_heads_that_are_cut():
    # Rows of 10: the second document is cut, the third in three parts; the fourth is longer than a row.
    lengths, heads = [6, 8, 30, 2], [3, 5, 4, 0]
    found = packing.statistics(lengths, 10, packing.plan(lengths, 10, "concat"), heads)
    assert (found.documents, found.fragmented, found.overlong, found.fragmentation) == (4, 1, 1, 25.0)
    assert (found.heads, found.cut_heads) == (3, 2)
    restarted = packing.statistics(lengths, 10, packing.plan(lengths, 10, "restart_last"), heads)
    assert restarted.fragmented == 1 and restarted.cut_heads == 2  # 4 of its first 5 tokens end the first row
    kept = packing.statistics(lengths, 10, packing.plan(lengths, 10, overlong="drop"), heads)
    assert (kept.fragmented, kept.cut_heads, kept.dropped, kept.padding) == (0, 0, 1, 20.0)
    split = packing.statistics(lengths, 10, packing.plan(lengths, 10), heads)
    assert (split.fragmented, split.cut_heads, split.dropped) == (0, 1, 0)


def test_restart_last_repeats_the_cut_document_whole():
    pieces = list(_pieces(packing.pack(_documents([6, 7, 3]), 10, method="restart_last")))
    assert [p[0].tolist() for p in pieces] == [
        list(range(1000, 1006)), list(range(2000, 2004)), list(range(2000, 2007)), list(range(3000, 3003))]


def test_statistics_order_the_methods_as_the_report_does():
    lengths = np.random.default_rng(0).lognormal(5, 1, 3000).astype(int) % 1024 + 1
    found = {m: packing.statistics(lengths, 1024, packing.plan(lengths, 1024, m)) for m in packing.METHODS}
    # Of documents, not of pieces: what restarts is cut once and whole once, and there are more rows to cut at.
    assert found["restart_last"].fragmentation > found["concat"].fragmentation > 5
    assert found["concat"].fragmented == found["concat"].pieces - 3000 > 0
    assert found["concat"].padding < 0.2 and found["restart_last"].padding < 0.2
    assert found["pad_last"].fragmentation == 0 and found["pad_last"].padding > 5
    assert found["best_fit"].fragmentation == 0 and found["best_fit"].padding < 0.3
    assert found["restart_last"].tokens > found["concat"].tokens == lengths.sum()
    both = found["concat"] + found["pad_last"]
    assert both.documents == 6000 and both.as_dict()["padding"] == pytest.approx(both.padding, abs=1e-4)


def test_rows_are_padded_to_a_multiple_and_missing_weights_are_ones():
    arrays = packing.pack([{"tokens": [5, 6, 7]}], 4, rows=3)
    assert arrays["tokens"].tolist() == [[5, 6, 7, 0], [0] * 4, [0] * 4]
    assert arrays["weights"].tolist()[0] == [1, 1, 0, 0] and arrays["weights"][1:].sum() == 0
    assert packing.pack([], 4, rows=2)["segment_ids"].tolist() == [[0] * 4] * 2
    assert {v.dtype for v in arrays.values()} == {np.dtype("int32"), np.dtype("float32")}


def test_unknown_method_is_one_line():
    with pytest.raises(UserError, match="first_fit.*best_fit"):
        packing.plan([1], 4, "first_fit")


def test_planning_is_fast():
    lengths = np.random.default_rng(1).integers(1, 1024, 50_000)
    begin = time.process_time()
    for method in packing.METHODS:
        packing.plan(lengths, 1024, method)
    assert time.process_time() - begin < 5


def test_what_is_no_array_is_not_packed():
    assert set(packing.pack([{"tokens": [5, 6], "head": 1}], 4)) == {"tokens", "weights", "segment_ids", "positions"}
