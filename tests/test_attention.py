"""Attention backends against attention written out in float64, values and gradients, for every mask they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.attention import BACKENDS, Request, attend
from jaxlm.kernels.matmul import dense


def exact(q, k, v, window, softcap, segment_ids):
    """One query at a time, float64."""
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        kv = n // (N // k.shape[2])
        seen = [s for s in range(t + 1) if (not window or t - s < window)
                and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])]
        scores = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("masks", [
    dict(), dict(window=5), dict(window=70, softcap=3.0), dict(segments=True), dict(window=70, segments=True),
])
@pytest.mark.parametrize("T, N, K", [(40, 2, 2), (150, 4, 2), (130, 2, 1)])
def test_backends_equal_float64(masks, T, N, K):
    rng = np.random.default_rng(T + N)
    q, k, v = (rng.standard_normal((2, T, heads, 8)) for heads in (N, K, K))
    segment_ids = np.sort(rng.integers(0, 3, (2, T)), axis=1) if masks.get("segments") else None
    window, softcap = masks.get("window", 0), masks.get("softcap", 0.0)
    reference = exact(q, k, v, window, softcap, segment_ids)
    inputs, weights = [jnp.asarray(a, jnp.float32) for a in (q, k, v)], jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    request, gradients = Request("cpu", "float32", 8, softcap > 0, segment_ids is not None), {}
    for name in BACKENDS:
        if BACKENDS[name].supports(request):
            continue

        def loss(q, k, v, name=name):
            out = attend(q, k, v, backend=name, window=window, softcap=softcap, segment_ids_BT=segment_ids)
            return jnp.vdot(out, weights), out

        gradients[name], out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        np.testing.assert_allclose(out, reference, atol=2e-5)
    assert {"plain", "blockwise"} <= set(gradients)
    for name in gradients:
        for got, want in zip(gradients[name], gradients["plain"], strict=True):
            np.testing.assert_allclose(got, want, atol=5e-5)
    nudge = [rng.standard_normal(a.shape) for a in (q, k, v)]  # the gradient along a random direction, in float64
    steps = [exact(*(a + sign * 1e-5 * d for a, d in zip((q, k, v), nudge, strict=True)), window, softcap, segment_ids)
             for sign in (1, -1)]
    along = np.vdot((steps[0] - steps[1]) / 2e-5, weights)
    np.testing.assert_allclose(sum(np.vdot(g, d) for g, d in zip(gradients["plain"], nudge, strict=True)), along, rtol=1e-3)


@pytest.mark.parametrize("shape, num_inputs", [((6, 4), 1), ((6, 2, 4), 1), ((2, 3, 4), 2)])
def test_dense_equals_float64(shape, num_inputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, *shape[:num_inputs])), rng.standard_normal(shape)
    reference = np.tensordot(x, kernel, num_inputs)
    np.testing.assert_allclose(dense(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), num_inputs), reference,
                               atol=1e-5)
