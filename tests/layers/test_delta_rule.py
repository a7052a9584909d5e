"""The gated delta rule, both forms, against a float64 recurrence written from its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.delta_rule import gated_delta_rule
from qcn_jax.layers.norm import l2_norm

B, T, H, R, DK, DV, CHUNK = 2, 75, 2, 2, 16, 24, 16
FORMS = ("chunked", "recurrent")


@functools.cache
def compiled(form):
    return jax.jit(functools.partial(gated_delta_rule, form=form, chunk_size=CHUNK))


def reference(q, k, v, g, beta, state=None, segment_ids=None):
    """The rule in float64, token by token, value head by value head; the state is reset by assignment."""
    q, k, v, g, beta = (np.asarray(x).astype(np.float64) for x in (q, k, v, g, beta))
    batch, length, heads, repeats, dv = v.shape
    out = np.zeros(v.shape)
    final = np.zeros((batch, heads, repeats, q.shape[-1], dv))
    for b, h, r in np.ndindex(batch, heads, repeats):
        s = np.zeros((q.shape[-1], dv)) if state is None else np.asarray(state, np.float64)[b, h, r].copy()
        for t in range(length):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                s[:] = 0
            s *= np.exp(g[b, t, h, r])
            s += np.outer(k[b, t, h], beta[b, t, h, r] * (v[b, t, h, r] - k[b, t, h] @ s))
            out[b, t, h, r] = q[b, t, h] @ s
        final[b, h, r] = s
    return out, final


def inputs(kind="random", seed=0, length=T, batch=B):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, v = normal(batch, length, H, DK), normal(batch, length, H, DK), normal(batch, length, H, R, DV)
    g = -np.log1p(np.exp(normal(batch, length, H, R) - 1))
    beta = 1 / (1 + np.exp(-normal(batch, length, H, R)))
    if kind == "strong decay":  # A = 16 and a large time step now and then, next to hardly any decay
        g = g * rng.choice([1e-3, 1.0, 16.0, 400.0], g.shape)
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
@pytest.mark.parametrize("kind", ["random", "strong decay", "zero vectors", "repeated keys", "correlated keys"])
def test_agrees_with_float64(form, kind):
    data = inputs(kind)
    state = np.random.default_rng(1).standard_normal((B, H, R, DK, DV)).astype(np.float32)
    out, final = compiled(form)(*data, state)
    expected, expected_final = reference(*data, state)
    assert np.abs(out - expected).max() < 3e-6
    assert np.abs(final - expected_final).max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_documents_begin_with_an_empty_state_at_any_offset(form):
    data, rng = inputs("strong decay", 2), np.random.default_rng(3)
    state = rng.standard_normal((B, H, R, DK, DV)).astype(np.float32)
    run = compiled(form)
    boundaries = [[1, 15, 16, 17, 48], [0, 31, 33, 50, T - 1]]  # at, before and after chunk edges; one token long
    segments = np.stack([np.searchsorted(ends, np.arange(T), side="right") for ends in boundaries]).astype(np.int32)
    out, final = run(*data, state, segments)
    expected, expected_final = reference(*data, state, segments)
    assert np.abs(out - expected).max() < 3e-6
    assert np.abs(final - expected_final).max() < 1e-5


def test_gradients_of_the_forms_agree_and_are_finite():
    weight = np.random.default_rng(5).standard_normal((B, T, H, R, DV)).astype(np.float32)
    segments = np.sort(np.random.default_rng(6).integers(1, 4, (B, T)), axis=1).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form, raw, segments):
        def loss(q, k, v, g, beta, state):
            rule = functools.partial(gated_delta_rule, form=form, chunk_size=CHUNK)
            out, final = rule(l2_norm(q), l2_norm(k), v, g, beta, state, segments)
            return jnp.sum(out * weight) + jnp.sum(final**2)

        return jax.grad(loss, argnums=range(6))(*raw)

    for kind in ("random", "strong decay", "zero vectors", "repeated keys", "correlated keys"):
        raw = (*inputs(kind, 4), np.full((B, H, R, DK, DV), 0.1, np.float32))
        chunked, recurrent = gradients("chunked", raw, segments), gradients("recurrent", raw, segments)
        for name, a, b in zip(("q", "k", "v", "g", "beta", "state"), chunked, recurrent):
            assert np.isfinite(a).all() and np.isfinite(b).all(), (kind, name)
            assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b) + 1e-6, (kind, name)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_lose_only_their_own_rounding(form):
    data = inputs("correlated keys", 7)
    rounded = (*(jnp.asarray(x, jnp.bfloat16) for x in data[:3]), *data[3:])
    out, final = compiled(form)(*rounded)
    assert out.dtype == final.dtype == jnp.float32
    expected, expected_final = reference(*(np.asarray(x.astype(jnp.float32)) for x in rounded[:3]), *data[3:])
    assert np.abs(out - expected).max() < 3e-6
    assert np.abs(final - expected_final).max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_inert_padding_on_either_side(form):
    data = inputs("random", 8)
    run = compiled(form)
    real = np.arange(T)[None, :, None, None] < np.array([30, 61])[:, None, None, None]
    padded = (*data[:3], np.where(real, data[3], 0), np.where(real, data[4], 0))
    out, final = run(*padded)
    for row, length in enumerate((30, 61)):
        expected, expected_final = reference(*(x[row : row + 1, :length] for x in data))
        assert np.abs(out[row, :length] - expected[0]).max() < 3e-6
        assert np.abs(final[row] - expected_final[0]).max() < 1e-5
    shifted = tuple(np.roll(x, 40, axis=1) for x in padded)  # row 0: 40 pads (of which 5 at the end), 30 tokens
    out, _ = run(*shifted, None, np.roll(real[:, :, 0, 0], 40, axis=1).astype(np.int32))
    expected, _ = reference(*(x[:1, :30] for x in data))
    assert np.abs(out[0, 40:70] - expected[0]).max() < 3e-6


def test_any_chunking_equals_one_pass():
    data = inputs("random", 9)
    expected, expected_final = compiled("chunked")(*data)
    state, outs, start = None, [], 0
    for stop in (1, 2, 16, 16 + 33, 74, T):  # crosses chunk edges; single tokens take the recurrent step
        out, state = compiled("chunked")(*cut(data, start, stop), state)
        outs.append(out)
        start = stop
    assert np.abs(np.concatenate(outs, axis=1) - expected).max() < 2e-6
    assert np.abs(state - expected_final).max() < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "strong decay", "correlated keys"])
def test_long_sequences(kind):
    length = 32_768
    data = inputs(kind, 10, length, batch=1)
    expected, expected_final = reference(*data)
    for form in FORMS:
        out, final = compiled(form)(*data)
        assert np.abs(out - expected).max() < 1e-5, form
        assert np.abs(final - expected_final).max() < 3e-5, form


def gradients_in_float64(data):
    """Of sum(sin(out)), one head: the definition as a scan, differentiated in float64."""
    with jax.enable_x64(True):
        def loss(q, k, v, g, beta):
            def step(s, x):
                q, k, v, g, beta = x
                s = s * jnp.exp(g)
                s = s + jnp.outer(k, beta * (v - k @ s))
                return s, q @ s

            _, out = jax.lax.scan(step, jnp.zeros((k.shape[-1], v.shape[-1])), (q, k, v, g, beta))
            return jnp.sum(jnp.sin(out))

        q, k, v, g, beta = (jnp.asarray(x, jnp.float64) for x in data)
        arguments = (q[0, :, 0], k[0, :, 0], v[0, :, 0, 0], g[0, :, 0, 0], beta[0, :, 0, 0])
        return [np.asarray(x) for x in jax.jit(jax.grad(loss, argnums=range(5)))(*arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "strong decay", "zero vectors", "repeated keys", "correlated keys"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_long_sequences(kind, dtype):
    q, k, v, g, beta = inputs(kind, 11, 32_768, batch=1)
    q, k, v, g, beta = q[:, :, :1], k[:, :, :1], v[:, :, :1, :1], g[:, :, :1, :1], beta[:, :, :1, :1]
    data = (*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(g), jnp.asarray(beta))
    expected = gradients_in_float64(data)

    def errors(form):
        loss = lambda *x: jnp.sum(jnp.sin(gated_delta_rule(*x, form=form, chunk_size=64)[0]))
        found = jax.jit(jax.grad(loss, argnums=range(5)))(*data)
        return [np.linalg.norm(np.asarray(x, np.float64).reshape(w.shape) - w) for x, w in zip(found, expected)]

    for name, error, step_by_step, want in zip("q k v g beta".split(), errors("chunked"), errors("recurrent"), expected):
        # The gradients of bfloat16 inputs are bfloat16 themselves: eight bits each. That of g for repeated keys is a
        # difference of terms a thousand times its size, which float32 has no digits for in either form.
        limit = 2e-3 if dtype == "bfloat16" and name in ("q", "k", "v") else 2e-4
        assert error <= max(limit * np.linalg.norm(want), 2 * step_by_step), (name, error, step_by_step)
