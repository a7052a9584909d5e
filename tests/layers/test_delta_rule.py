"""The gated delta rule, both forms, against a float64 recurrence written from its definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.delta_rule import gated_delta_rule
from qcn_jax.layers.norm import l2_norm
from tests.rounding import bounds, touched

B, T, H, R, DK, DV, CHUNK = 2, 75, 2, 2, 16, 24, 16
FORMS = ("chunked", "recurrent")
KINDS = ("random", "strong decay", "huge decay", "zero vectors", "repeated keys", "correlated keys")


@functools.cache
def compiled(form):
    return jax.jit(functools.partial(gated_delta_rule, form=form, chunk_size=CHUNK))


def rule(noise, q, k, v, g, beta, state, segment_ids):
    """The definition, token by token, for tests.rounding: (out, final)."""
    touch = lambda x, place: touched(x, noise, place)
    if state is None:
        state = jnp.zeros((*v.shape[:1], *v.shape[2:4], q.shape[-1], v.shape[-1]))
    first = jnp.zeros(v.shape[:2], bool)
    if segment_ids is not None:
        first = first.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    q, k, v, g, beta, state = (touch(x, place) for place, x in enumerate((q, k, v, g, beta, state)))

    def step(s, token):
        q, k, v, g, beta, first, number = token
        place = 4 * number
        s = jnp.where(first[:, None, None, None, None], 0, s * jnp.exp(g)[..., None, None])
        s = touch(s, place)
        delta = touch(beta[..., None] * (v - jnp.einsum("bhk,bhrkv->bhrv", k, s)), place + 1)
        s = touch(s + k[:, :, None, :, None] * delta[..., None, :], place + 2)
        return s, touch(jnp.einsum("bhk,bhrkv->bhrv", q, s), place + 3)

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, first)]
    final, out = jax.lax.scan(step, state, (*tokens, 2 + jnp.arange(q.shape[1])))
    return jnp.moveaxis(out, 0, 1), final


def right(q, k, v, g, beta, state=None, segment_ids=None):
    """tests.rounding.Bounds of (out, final)."""
    return bounds(rule, q, k, v, g, beta, state, segment_ids)


def inputs(kind="random", seed=0, length=T, batch=B, repeats=R):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, v = normal(batch, length, H, DK), normal(batch, length, H, DK), normal(batch, length, H, repeats, DV)
    g = -np.log1p(np.exp(normal(batch, length, H, repeats) - 1))
    beta = 1 / (1 + np.exp(-normal(batch, length, H, repeats)))
    if kind == "strong decay":  # A = 16 and a large time step now and then, next to hardly any decay
        g = g * rng.choice([1e-3, 1.0, 16.0, 400.0], g.shape)
    elif kind == "huge decay":  # sums beyond what float32 holds exactly; each alone empties the state
        g[:, [3, 4, 5, 20, 40]] = -1e5
    elif kind == "zero vectors":
        k[:, ::3], q[:, 1::4], v[:, ::5] = 0, 0, 0
    elif kind == "repeated keys":
        k[:] = k[:, :1]
        beta[:] = 1 - 1e-3
        g = g * 1e-4
    elif kind == "correlated keys":
        k = k[:, :1] + 0.1 * k
        beta = 0.5 + beta / 2
        g = g * 1e-2
    return np.asarray(l2_norm(q)) * DK**-0.5, np.asarray(l2_norm(k)), v, g.astype(np.float32), beta.astype(np.float32)


def cut(arrays, start, stop):
    return tuple(x[:, start:stop] for x in arrays)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64(form, kind):
    data = inputs(kind)
    state = np.random.default_rng(1).standard_normal((B, H, R, DK, DV)).astype(np.float32)
    right(*data, state).check(compiled(form)(*data, state), axis=-1)


@pytest.mark.parametrize("form", FORMS)
def test_documents_begin_with_an_empty_state_at_any_offset(form):
    data, rng = inputs("strong decay", 2), np.random.default_rng(3)
    state = rng.standard_normal((B, H, R, DK, DV)).astype(np.float32)
    boundaries = [[1, 15, 16, 17, 48], [0, 31, 33, 50, T - 1]]  # at, before and after chunk edges; one token long
    segments = np.stack([np.searchsorted(ends, np.arange(T), side="right") for ends in boundaries]).astype(np.int32)
    segments %= 2  # an id that comes again is another document
    right(*data, state, segments).check(compiled(form)(*data, state, segments), axis=-1)


def test_gradients_are_right_and_finite():
    weight = np.random.default_rng(5).standard_normal((B, T, H, R, DV)).astype(np.float32)
    segments = np.sort(np.random.default_rng(6).integers(1, 4, (B, T)), axis=1).astype(np.int32)

    def gradients(rule, q, k, v, g, beta, state):
        def loss(q, k, v, g, beta, state):
            out, final = rule(l2_norm(q), l2_norm(k), v, g, beta, state, segments)
            return jnp.sum(out * weight) + jnp.sum(final**2)

        return jax.grad(loss, argnums=range(6))(q, k, v, g, beta, state)

    definition = lambda noise, *raw: gradients(functools.partial(rule, noise), *raw)
    run = {form: jax.jit(functools.partial(gradients, functools.partial(gated_delta_rule, form=form, chunk_size=CHUNK)))
           for form in FORMS}
    for kind in KINDS:
        raw = (*inputs(kind, 4), np.full((B, H, R, DK, DV), 0.1, np.float32))
        expected = bounds(definition, *raw)
        for form in FORMS:
            expected.check(run[form](*raw), what=(kind, form))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_lose_only_their_own_rounding(form):
    data = inputs("correlated keys", 7)
    rounded = (*(jnp.asarray(x, jnp.bfloat16) for x in data[:3]), *data[3:])
    out, final = compiled(form)(*rounded)
    assert out.dtype == final.dtype == jnp.float32
    right(*rounded).check((out, final), axis=-1)


@pytest.mark.parametrize("form", FORMS)
def test_inert_padding_on_either_side(form):
    data = inputs("random", 8)
    run = compiled(form)
    real = np.arange(T)[None, :, None, None] < np.array([30, 61])[:, None, None, None]
    padded = (*data[:3], np.where(real, data[3], 0), np.where(real, data[4], 0))
    out, final = run(*padded)
    for row, length in enumerate((30, 61)):
        one = slice(row, row + 1)
        right(*(x[one, :length] for x in data)).check((out[one, :length], final[one]), axis=-1)
    shifted = tuple(np.roll(x, 40, axis=1) for x in padded)  # row 0: 40 pads (of which 5 at the end), 30 tokens
    out, _ = run(*shifted, None, np.roll(real[:, :, 0, 0], 40, axis=1).astype(np.int32))
    right(*(x[:1, :30] for x in data)).check((out[:1, 40:70], None), axis=-1)


def test_any_chunking_equals_one_pass():
    data = inputs("random", 9)
    state, outs, start = None, [], 0
    for stop in (1, 2, 16, 16 + 33, 74, T):  # crosses chunk edges; single tokens take the recurrent step
        out, state = compiled("chunked")(*cut(data, start, stop), state)
        outs.append(out)
        start = stop
    right(*data).check((np.concatenate(outs, axis=1), state), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "strong decay", "correlated keys"])
def test_long_sequences(kind):
    length = 32_768
    data = inputs(kind, 10, length, batch=1)
    expected = right(*data)
    for form in FORMS:
        expected.check(compiled(form)(*data), axis=-1, what=form)


def _gradients_of_sin(run, *arguments):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x)[0])), argnums=range(5))(*arguments)


@functools.cache
def _sin_of(form):
    return jax.jit(functools.partial(
        _gradients_of_sin, functools.partial(gated_delta_rule, form=form, chunk_size=64)))


def _sin_of_rule(noise, *arguments):
    return _gradients_of_sin(lambda *x: rule(noise, *x, state=None, segment_ids=None), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [
    # For repeated keys float32 has no digits left of the gradient of g, in any form; float64 has.
    ("repeated keys", "float64"),
    *itertools.product(["random", "strong decay", "zero vectors", "repeated keys", "correlated keys"],
                       ["float32", "bfloat16"])])
def test_gradients_of_long_sequences(kind, dtype):
    q, k, v, g, beta = inputs(kind, 11, 32_768, batch=1)
    q, k, v, g, beta = q[:, :, :1], k[:, :, :1], v[:, :, :1, :1], g[:, :, :1, :1], beta[:, :, :1, :1]
    with jax.enable_x64(dtype == "float64"):
        gates = jnp.promote_types(dtype, jnp.float32)
        data = (*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(g, gates), jnp.asarray(beta, gates))
        expected = bounds(_sin_of_rule, *data)
        for form in FORMS:
            expected.check(_sin_of(form)(*data), what=form)
