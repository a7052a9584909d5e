"""The gated delta rule's Pallas kernels, in Pallas' interpreter, against the float64 recurrence and the XLA form.

Form "pallas" is what a TPU runs, "gpu" what an NVIDIA GPU runs: the interpreter is given the latter's kernels instead.
"""

import contextlib
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.delta_rule import gated_delta_rule
from qcn_jax.layers.kernels import delta_rule, delta_rule_gpu
from qcn_jax.layers.kernels.chunk import Products, unit_lower_inverses
from tests.rounding import bounds

_path = pathlib.Path(__file__).parent.parent / "test_delta_rule.py"
_spec = importlib.util.spec_from_file_location("delta_rule_cases", _path)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

B, T, H, R, DK, DV = cases.B, cases.T, cases.H, cases.R, cases.DK, cases.DV
FORMS = ("pallas", "gpu")
CHUNK = 32  # T = 75: two whole chunks and a part; a chunk of two substituted blocks and a merge
KINDS = cases.KINDS
NAMES = ("q", "k", "v", "g", "beta", "state")
# Document starts at, before and after chunk and block edges; documents of one token.
BOUNDARIES = ([1, 15, 16, 17, 48], [0, 31, 33, 50, T - 1])
SEGMENTS = {
    # An id that comes again is another document.
    "packed": np.stack([np.searchsorted(ends, np.arange(T), side="right") % 2 for ends in BOUNDARIES]).astype(np.int32),
    "whole": np.zeros((B, T), np.int32),
}
STATE = np.random.default_rng(1).standard_normal((B, H, R, DK, DV)).astype(np.float32)


def weight(*shape):
    """Of outputs of this shape in the loss."""
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@contextlib.contextmanager
def kernels_of(form):
    """While a program of `form` is traced."""
    if form != "gpu":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_rule, "_forward_call", delta_rule_gpu.forward)
        patch.setattr(delta_rule, "_backward_call", delta_rule_gpu.backward)
        yield


@functools.cache
def rule(form, chunk=CHUNK):
    run = jax.jit(functools.partial(gated_delta_rule, form=form.replace("gpu", "pallas"), chunk_size=chunk))

    def call(*arrays):
        with kernels_of(form):
            return run(*arrays)

    return call


@functools.cache
def with_gradients(form, dtype=jnp.float32):
    """(q, k, v, g, beta, state, segments) -> ((o, final), gradients of a loss of both)."""

    def loss(q, k, v, g, beta, state, segments):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out, final = gated_delta_rule(q, k, v, g, beta, state, segments, form.replace("gpu", "pallas"), CHUNK)
        return jnp.sum(out * weight(*out.shape)) + jnp.sum(final**2), (out, final)

    run = jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))

    def call(*arrays):
        with kernels_of(form):
            (_, outputs), gradients = run(*arrays)
        return outputs, gradients

    return call


def definition(noise, q, k, v, g, beta, state, segments):
    """What `with_gradients` gives, for tests.rounding."""

    def loss(*arrays):
        out, final = cases.rule(noise, *arrays, segments)
        return jnp.sum(out * weight(*out.shape)) + jnp.sum(final**2), (out, final)

    gradients, outputs = jax.grad(loss, argnums=range(6), has_aux=True)(q, k, v, g, beta, state)
    return outputs, gradients


def largest_error(got, expected):
    assert np.isfinite(got).all()
    return np.abs(np.asarray(got) - expected).max()


@pytest.mark.parametrize("documents", SEGMENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_as_close_to_float64_as_rounding_allows(form, kind, documents):
    data = (*cases.inputs(kind, 4), STATE, SEGMENTS[documents])
    outputs, gradients = with_gradients(form)(*data)
    assert {x.dtype for x in (*outputs, *gradients)} == {jnp.dtype(jnp.float32)}
    bounds(definition, *data).check((*outputs, *gradients), what=NAMES)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_other_numbers_of_value_heads_to_a_key_head(form, repeats):
    state = np.random.default_rng(1).standard_normal((B, H, repeats, DK, DV)).astype(np.float32)
    data = (*cases.inputs("random", 4, repeats=repeats), state, SEGMENTS["packed"])
    outputs, gradients = with_gradients(form)(*data)
    bounds(definition, *data).check((*outputs, *gradients), what=NAMES)


@pytest.mark.parametrize("kind", ["random", "correlated keys", "repeated keys"])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_loses_what_rounding_the_operands_of_products_loses(form, kind):
    q, k, v, g, beta = cases.inputs(kind, 7)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in (q, k, v)]
    data = (*rounded, g, beta, STATE, SEGMENTS["packed"])
    outputs, gradients = with_gradients(form, jnp.bfloat16)(*data)
    _, expected_gradients = with_gradients("recurrent")(*data)
    # A few roundings to 8 bits; the GPU's loop subtracts two products that are rounded already.
    limit = {"pallas": 2**-6, "gpu": 2**-5.5}[form]
    for got, expected in zip(outputs, cases.right(*data).exact):
        assert np.isfinite(got).all()
        assert np.linalg.norm(got - expected) < limit * np.linalg.norm(expected)
    for name, a, b in zip(NAMES, gradients, expected_gradients):
        assert np.isfinite(a).all(), name
        if kind == "repeated keys" and name == "g":
            continue  # with decays near one a difference of equal sums, of which 8 bits leave nothing
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b), name


@pytest.mark.parametrize("dtype, limit", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-5)])
@pytest.mark.parametrize("form, size", [("pallas", 128), ("gpu", 64)])
def test_triangular_inverse_of_the_best_chunk(form, size, dtype, limit):
    """For bfloat16 the error stays far below the 4e-3 of rounding the result."""
    dot = Products(jnp.dtype(dtype), True)
    inverse = {"pallas": lambda xs: unit_lower_inverses(xs, dot),
               "gpu": lambda xs: [delta_rule_gpu.unit_lower_inverse(x, dot) for x in xs]}[form]
    inverse = jax.jit(inverse)
    keys = np.random.default_rng(0).standard_normal((3, size, 64))
    keys[1] = keys[1, :1] + 0.1 * keys[1]  # correlated
    keys[2] = keys[2, :1]  # repeated
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    matrices = np.tril(0.95 * keys @ np.swapaxes(keys, 1, 2), -1)
    got = inverse([jnp.asarray(a, jnp.float32) for a in matrices])
    for x, a in zip(got, matrices):
        assert largest_error(x, np.linalg.inv(np.eye(size) + a)) < limit


@pytest.mark.parametrize("form", FORMS)
def test_inert_padding_and_another_chunk(form):
    data = cases.inputs("correlated keys", 8)
    real = np.arange(T)[None, :, None, None] < np.array([30, 61])[:, None, None, None]
    out, final = rule(form, 16)(*data[:3], np.where(real, data[3], 0), np.where(real, data[4], 0), STATE)
    for row, length in enumerate((30, 61)):
        one = slice(row, row + 1)
        cases.right(*(x[one, :length] for x in data), STATE[one]).check((out[one, :length], final[one]), axis=-1)


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_in_pieces_equals_one_pass(form):
    data = cases.inputs("random", 9)
    state, outs = np.zeros_like(STATE), []
    for start, stop in ((0, 37), (37, 74), (74, T)):  # two of one compiled length; a single token
        out, state = rule(form, 16)(*cases.cut(data, start, stop), state)
        outs.append(out)
    cases.right(*data).check((np.concatenate(outs, axis=1), state), axis=-1)


def test_the_gpu_kernels_are_lowered_for_cuda():
    """At the 80B model's head sizes, without a GPU: Pallas' Triton back end knows every operation in them."""
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    gates = array(1, 256, 2, 2, dtype=jnp.float32)
    arrays = (*[array(1, 256, 2, 128)] * 2, array(1, 256, 2, 2, 128), gates, gates)
    loss = lambda *arrays: jnp.sum(gated_delta_rule(*arrays, form="pallas", chunk_size=64)[0])
    try:
        lowered = jax.jit(jax.grad(loss, argnums=range(5))).trace(*arrays).lower(lowering_platforms=("cuda",))
    except RuntimeError as error:
        if "No supported GPU" not in str(error):
            raise
        pytest.skip("this JAX lowers Triton kernels only where it sees a GPU")
    for name in ("prepare", "scan", "outputs", "revisit", "rescan", "finish"):
        assert f"gated_delta_rule_{name}" in lowered.as_text()
