"""Attention backends against attention written out in float64, values and gradients, for every mask they claim."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from jaxlm.errors import UserError
from jaxlm.kernels import attention
from jaxlm.kernels.attention import BACKENDS, Request, attend, choose_backend, of_whole_sequences
from jaxlm.kernels.backend import Backend
from jaxlm.kernels.matmul import dense
from jaxlm.kernels.splash import block_size, splash, splash_supports
from jaxlm.parallel.compile import jit
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import replicated

BACKENDS.register("splash interpreted")(Backend(lambda request: splash_supports(request._replace(platform="tpu")),
                                                of_whole_sequences(partial(splash, interpret=True))))


def exact(q, k, v, window, softcap, segment_ids, prefix=None):
    """One query at a time, float64."""
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        kv = n // (N // k.shape[2])
        seen = [s for s in range(T) if (s <= t and (not window or t - s < window) or prefix is not None and prefix[b, s])
                and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])]
        scores = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("masks", [
    dict(), dict(window=5), dict(window=70, softcap=3.0), dict(segments=True), dict(window=70, segments=True),
])
@pytest.mark.parametrize("T, N, K, tile", [
    (40, 2, 2, 0), (150, 4, 2, 0), (130, 2, 1, 0), (75, 4, 2, 16), (64, 2, 1, 32), (384, 4, 2, 0),
])
def test_backends_equal_float64(masks, T, N, K, tile, monkeypatch):
    if tile:
        long_from(monkeypatch, tile)
    rng = np.random.default_rng(T + N)
    q, k, v = (rng.standard_normal((2, T, heads, 8)) for heads in (N, K, K))
    segment_ids = np.sort(rng.integers(0, 3, (2, T)), axis=1) if masks.get("segments") else None
    window, softcap = masks.get("window", 0), masks.get("softcap", 0.0)
    reference = exact(q, k, v, window, softcap, segment_ids)
    inputs, weights = [jnp.asarray(a, jnp.float32) for a in (q, k, v)], jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    request, gradients = Request("cpu", "float32", 8, softcap > 0, segment_ids is not None, T), {}
    for name in BACKENDS:
        if BACKENDS[name].supports(request):
            continue

        def loss(q, k, v, name=name):
            out = attend(q, k, v, backend=name, window=window, softcap=softcap, segment_ids_BT=segment_ids)
            return jnp.vdot(out, weights), out

        gradients[name], out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        np.testing.assert_allclose(out, reference, atol=2e-5)
    assert {"plain", "blockwise"} | ({"splash interpreted"} if T % 128 == 0 else set()) == set(gradients)
    for name in gradients:
        for got, want in zip(gradients[name], gradients["plain"], strict=True):
            np.testing.assert_allclose(got, want, atol=5e-5)
    nudge = [rng.standard_normal(a.shape) for a in (q, k, v)]  # the gradient along a random direction, in float64
    steps = [exact(*(a + sign * 1e-5 * d for a, d in zip((q, k, v), nudge, strict=True)), window, softcap, segment_ids)
             for sign in (1, -1)]
    along = np.vdot((steps[0] - steps[1]) / 2e-5, weights)
    np.testing.assert_allclose(sum(np.vdot(g, d) for g, d in zip(gradients["plain"], nudge, strict=True)), along, rtol=1e-3)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("T, N, K", [(40, 2, 2), (150, 4, 2)])
def test_a_prefix_is_seen_by_all_of_its_text(T, N, K, segments):
    rng = np.random.default_rng(T)
    q, k, v = (rng.standard_normal((2, T, heads, 8)) for heads in (N, K, K))
    segment_ids = np.sort(rng.integers(0, 3, (2, T)), axis=1) if segments else None
    prefix = rng.random((2, T)) < 0.4
    reference = exact(q, k, v, 0, 0.0, segment_ids, prefix)
    inputs = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]

    def loss(q, k, v, name):
        out = attend(q, k, v, backend=name, segment_ids_BT=segment_ids, extras=attention.Extras(prefix_BS=jnp.asarray(prefix)))
        return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    found = [jax.jit(jax.grad(partial(loss, name=name), (0, 1, 2), has_aux=True))(*inputs) for name in ("plain", "blockwise")]
    for gradients, out in found:
        np.testing.assert_allclose(out, reference, atol=2e-5)
        for got, want in zip(gradients, found[0][0], strict=True):
            np.testing.assert_allclose(got, want, atol=5e-5)
    request = Request("tpu", "bfloat16", 128, False, segments, 4096, prefix=True)
    assert [bool(BACKENDS[name].supports(request)) for name in ("plain", "blockwise", "splash")] == [False, True, True]


def long_from(monkeypatch, tile):
    """`blockwise` goes by tiles of this size however short the sequence."""
    monkeypatch.setattr(attention, "LONG", 0)
    monkeypatch.setattr(attention, "TILE", tile)


@pytest.mark.parametrize("backend, tile", [("plain", 0), ("blockwise", 0), ("blockwise", 16)])
def test_bfloat16_gradients_are_as_good_as_bfloat16_is(backend, tile, monkeypatch):
    """Products of bfloat16 summed in float32: relative to float32 on the same inputs, an error of about one rounding (2^-9)."""
    if tile:
        long_from(monkeypatch, tile)
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal((2, 64, heads, 16)), jnp.bfloat16) for heads in (4, 2, 2)]
    weights = jnp.asarray(rng.standard_normal(inputs[0].shape), jnp.bfloat16)

    def gradients(*inputs, name):  # jitted: one product by itself, JAX 0.12 sums up in bfloat16 on a CPU
        loss = lambda *qkv: jnp.sum(attend(*qkv, backend=name).astype(jnp.float32) * weights)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)

    wanted = gradients(*(a.astype(jnp.float32) for a in inputs), name="plain")
    for got, want in zip(gradients(*inputs, name=backend), wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        assert jnp.linalg.norm(got.astype(jnp.float32) - want) < 2**-7 * jnp.linalg.norm(want)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("T, first, S", [(1, 30, 40), (21, 12, 40), (5, 0, 16)])
def test_decoding_by_tiles_equals_plain(T, first, S, window, monkeypatch):
    """Fewer queries than keys, from a place known only when it runs."""
    long_from(monkeypatch, 8)
    rng = np.random.default_rng(S)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 8)))

    def loss(q, k, v, first, backend):
        out = attend(q, k, v, backend=backend, window=window, first_query=first)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run(q, k, v, first, "blockwise"),
                 run(q, k, v, first, "plain"))


def temporary_bytes(T, backend, window=0):
    x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
    loss = lambda q, k, v: jnp.sum(attend(q, k, v, backend=backend, window=window))
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_blockwise_is_linear_in_length():
    short, *rest = (temporary_bytes(T, "blockwise") for T in (4096, 8192, 16384))
    assert all(bytes_ < factor * short for bytes_, factor in zip(rest, (2.1, 4.2), strict=True)), (short, rest)
    assert temporary_bytes(16384, "blockwise", window=1024) < 4.2 * short
    assert rest[1] < temporary_bytes(4096, "plain") / 2  # at 4 times the length


@pytest.mark.parametrize("K", [2, 4])  # on each device 2 heads, of one key head and of two
def test_splash_on_a_mesh_equals_plain(K):
    c, rng = default.get_config(), np.random.default_rng(K)
    c.mesh.data, c.mesh.tensor = 4, 2
    q, k, v, d = (rng.standard_normal((4, 384, heads, 8)).astype(np.float32) for heads in (4, K, K, 4))
    segment_ids = np.sort(rng.integers(0, 3, (4, 384)), axis=1).astype(np.int32)

    def loss(q, k, v, backend):
        return jnp.vdot(attend(q, k, v, backend=backend, window=200, softcap=3.0, segment_ids_BT=segment_ids), d)

    mesh = build_mesh(c)
    on_mesh = jit(mesh, jax.value_and_grad(partial(loss, backend="splash interpreted"), (0, 1, 2)))
    found = on_mesh(*jax.device_put((q, k, v), replicated(mesh)))
    expected = jax.jit(jax.value_and_grad(partial(loss, backend="plain"), (0, 1, 2)))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), found, expected)


def test_blocks_of_splash_divide_the_sequence_and_are_large_only_where_it_is_long():
    sizes = {(T, window): block_size(T, window, head_dim=128, itemsize=2)
             for T, window in ((384, 0), (1024, 0), (8192, 0), (8192, 1024), (32768, 16384), (8192 + 128, 0))}
    assert sizes == {(384, 0): 128, (1024, 0): 512, (8192, 0): 1024, (8192, 1024): 512, (32768, 16384): 1024, (8320, 0): 128}
    assert [block_size(8192, 0, H, 4) for H in (64, 256, 512)] == [512, 512, 256]


def test_auto_takes_the_fused_kernel_of_the_device_and_blockwise_off_cpu_only_for_long_sequences():
    c = default.get_config()
    c.model.head_dim = 64
    for seq_len, platform, name in ((1024, "cpu", "blockwise"), (1024, "gpu", "plain"), (8192, "gpu", "blockwise"),
                                    (1000, "tpu", "plain"), (8200, "tpu", "blockwise"), (1024, "tpu", "splash")):
        c.seq_len = seq_len
        found, why = choose_backend(c, platform)
        assert found == name and (name == "splash" or "splash: needs a" in why and "cudnn: needs" in why)
    c.model.compute_dtype = "bfloat16"
    assert choose_backend(c, "gpu")[0] == "cudnn"
    c.kernels.attention = "splash"
    for seq_len, head_dim, platform, why in (
        (1000, 64, "tpu", "multiple of 128, not 1000"), (1024, 640, "tpu", "at most 512, not 640"),
        (1024, 64, "cpu", "needs a TPU, this is cpu"),
    ):
        c.seq_len, c.model.head_dim = seq_len, head_dim
        with pytest.raises(UserError, match=why):
            choose_backend(c, platform)


def test_cudnn_takes_heads_of_256_from_hopper_on():
    request = Request("gpu", "bfloat16", 256, False, False, 1024)
    supports = BACKENDS["cudnn"].supports
    assert not any(supports(request._replace(compute_capability=capability)) for capability in ((9, 0), (12, 0)))
    assert "at most 128, not 256" in supports(request._replace(compute_capability=(8, 9)))
    assert "at most 256, not 264" in supports(request._replace(compute_capability=(9, 0), head_dim=264))


@pytest.mark.parametrize("shape, num_inputs", [((6, 4), 1), ((6, 2, 4), 1), ((2, 3, 4), 2)])
def test_dense_equals_float64(shape, num_inputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, *shape[:num_inputs])), rng.standard_normal(shape)
    reference = np.tensordot(x, kernel, num_inputs)
    np.testing.assert_allclose(dense(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), num_inputs), reference,
                               atol=1e-5)
