"""The conformance kit finds nothing in what is right, and finds what is planted."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax import testing
from qcn_jax.cli import main
from qcn_jax.errors import UserError
from qcn_jax.inference import cache as cache_module
from qcn_jax.inference import conformance, programs
from qcn_jax.inference.conformance_engine import ADJUSTED, DRAWS
from qcn_jax.inference.conformance_scores import Drawn, Scored, apart
from qcn_jax.inference.generation import NOT_FINITE
from qcn_jax.inference.sampling import History, Sampling, adjusted, adjustments, sample
from qcn_jax.layers import gated_delta_net
from qcn_jax.layers.context import document_ids
from tests.inference.test_engine import CONFIG, make_params

FORMS = ["whole rows", "left padding", "packed rows", "pieces", "turns", "copies", "saved states", "used slots",
         "other weights", "sampling", "served", "growing limits", "few blocks", "scanned layers"]  # fmt: skip


@pytest.fixture(scope="module", name="params")
def _params():
    return make_params(CONFIG)


def found(params, form):
    (one,) = conformance.check(CONFIG, params, count=4, length=64, forms=(form,))
    return one


def test_a_checkpoint_keeps_the_contract_in_every_form(tmp_path, capfd):
    folder = testing.save_tiny(tmp_path / "tiny")
    assert main.main(["check-engine", f"--checkpoint={folder}", "--sequences=4", "--length=64"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split('"')[3] for line in lines] == FORMS and all('"holds": true' in line for line in lines)


def one_short(x, window, lengths):
    """The convolution's window of one token too few."""
    return jnp.roll(right_window(x, window, lengths), 1, axis=1)


def never_cleared(cache, reset):
    return dataclasses.replace(cache, length=jnp.where(reset, 0, cache.length))


def not_by_document(segment_ids):
    return jnp.where(segment_ids == 0, 0, 1)


ROOT = pathlib.Path(__file__).resolve().parents[2]
right_window = gated_delta_net.next_window
PLANTED = {
    "a window that is one token short": (gated_delta_net, "next_window", one_short, "pieces"),
    "slots that keep their states": (programs, "cache_reset", never_cleared, "used slots"),
    "states that leak between documents": ("qcn_jax.model", "document_ids", not_by_document, "packed rows"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(params, monkeypatch, fault):
    module, name, wrong, form = PLANTED[fault]
    target = f"{module if isinstance(module, str) else module.__name__}.{name}"
    monkeypatch.setattr(target, wrong)
    one = found(params, form)
    assert not one.holds and one.refused == (NOT_FINITE if form == "used slots" else "")


def test_a_checkpoint_whose_own_logits_are_not_finite_is_refused(params):
    with pytest.raises(UserError, match="logits are not finite"):
        found(jax.tree.map(lambda leaf: leaf * np.float32(np.nan), params), "whole rows")


@pytest.mark.slow
def test_kernels_keep_the_contract():
    params = jax.tree.map(lambda leaf: leaf * np.float32(0.2), testing.random_params(testing.TINY))
    (one,) = conformance.check(testing.TINY, params, count=4, length=64, forms=(conformance.KERNELS,))
    assert one.holds


def test_unknown_forms_are_named(params):
    with pytest.raises(UserError, match="unknown rows; allowed: whole rows"):
        found(params, "rows")


def test_a_draw_is_what_its_seed_says():
    """Every way to draw agrees with the reference's own; another seed, filter, temperature or position does not."""
    rng = np.random.default_rng(0)
    logits = np.tile(rng.normal(size=40) * 2, (12, 1))
    drawable = np.arange(40) % 8 != 7
    draws = jax.jit(lambda row, at, draw, adjust: sample(
        row, jnp.full(1, 9, jnp.uint32), at, **draw, drawable=drawable, chosen_by=adjusted(row, adjust)))
    for draw in (*DRAWS, *ADJUSTED):
        tokens, told = rng.integers(0, 40, 5).tolist(), []
        for at in range(5, 12):
            settings = {name: np.array([getattr(draw, name)], np.int32 if name == "top_k" else np.float32)
                        for name in ("temperature", "top_p", "top_k", "min_p")}
            token, own, drawn = draws(logits[at - 1 : at].astype(np.float32), np.array([at]), settings,
                                      adjustments([draw], [History(tokens[:5], tokens[5:])], 40))
            tokens.append(int(token[0]))
            told.append((float(own[0]), float(drawn[0])))
        own, drawn = np.array(told).T
        right = Scored(tokens, 5, own, drawn=Drawn(draw, 9, drawn, drawable, 5))
        wrong = lambda **what: dataclasses.replace(right, drawn=dataclasses.replace(right.drawn, **what))
        assert apart(right, logits[:11], 1e-4) < 1e-5 and type(apart(right, logits[:11], 1e-4)) is float
        assert apart(wrong(logprobs=drawn + 0.1), logits[:11], 1e-4) > 0.05
        assert apart(wrong(drawable=np.arange(40) != tokens[7]), logits[:11], 1e-4) == np.inf
        if draw.temperature:
            assert apart(wrong(seed=10), logits[:11], 1e-4) > 1e-3
        if draw.adjusts:
            assert apart(wrong(sampling=Sampling(draw.temperature)), logits[:11], 1e-4) > 1e-3
    assert apart(dataclasses.replace(right, routes=np.zeros((11, 1, 1))), logits[:11], 1e-4) == np.inf


def test_mutants_change_what_is_there():
    """Every fault of benchmarks/mutants.py changes a text that the package has once."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import mutants
    finally:
        sys.path.pop(0)
    assert len({mutant.name for mutant in mutants.MUTANTS}) == 50
    for mutant in mutants.MUTANTS:
        assert mutants.source(mutant) != (mutants.PACKAGE / mutant.file).read_text()
        assert mutant.form in (*conformance.FORMS, conformance.KERNELS)
    with pytest.raises(UserError, match="occurs 0 times in model.py"):
        mutants.source(dataclasses.replace(mutants.MUTANTS[0], file="model.py"))


def test_what_is_planted_is_what_runs():
    assert programs.cache_reset is cache_module.cache_reset and document_ids(jnp.asarray([[1, 2]])).tolist() == [[1, 2]]
