"""The conformance kit finds nothing in what is right, and finds what is planted."""

import dataclasses

import jax.numpy as jnp
import pytest

from qcn_jax import testing
from qcn_jax.cli import main
from qcn_jax.inference import cache as cache_module
from qcn_jax.inference import conformance, programs
from qcn_jax.layers import gated_delta_net
from qcn_jax.layers.context import document_ids
from tests.inference.test_engine import CONFIG, make_params

FORMS = ["whole rows", "left padding", "packed rows", "pieces", "turns", "copies", "saved states", "used slots",
         "other weights"]  # fmt: skip


@pytest.fixture(scope="module", name="params")
def _params():
    return make_params(CONFIG)


def found(params, config=CONFIG, forms=FORMS):
    return {one.form: one for one in conformance.check(config, params, count=4, length=64) if one.form in forms}


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
    assert not found(params, forms=[form])[form].holds


def test_what_is_planted_is_what_runs():
    assert programs.cache_reset is cache_module.cache_reset and document_ids(jnp.asarray([[1, 2]])).tolist() == [[1, 2]]
