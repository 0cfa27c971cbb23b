"""The model: scan equals unrolled, cached equals uncached, causality and isolation by gradients, counts of presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default
from jaxlm.config import load, resolve
from jaxlm.models.ngrams import NgramEmbedding
from jaxlm.train.state import build_model


def tiny(**model):
    config = default.get_config()
    config.seq_len = 12
    config.model.num_layers, config.model.embed_dim, config.model.num_heads = 4, 16, 2
    config.model.update(model)
    resolve(config)
    return config


def noisy(params):
    """Nothing stays zero, so that every part has its say."""
    return jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def hidden(config, tokens, **inputs):
    model = build_model(config, 32, "plain")
    params = noisy(jax.jit(model.init)(jax.random.key(0)))
    return jax.jit(lambda p: nnx.merge(model.graph, p).hidden(tokens, **inputs)[0])(params)


TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)


@pytest.mark.parametrize("options", [
    dict(),
    dict(value_residual=True, window=3, window_pattern="LG", num_kv_heads=1, qk_norm=True),
    dict(norm="layer", position="learned", feedforward="gelu", attention_bias=True, mlp_bias=True, block="parallel"),
    dict(feedforward="moe", num_experts=4, shared_experts=1, window=3, window_pattern="LG", value_residual=True),
    dict(norm_place="both", norm_scale_from_one=True, window=3, window_pattern="LG", rope_theta_local=100.0, rope_pattern="RRRN",
         rope_scaling="yarn", rope_factor=4.0, rope_fraction=0.5, attention_scale_dim=5),
    dict(norm_place="post", qk_norm=True, qk_norm_over="all", attention_bias=True, attention_out_bias=False),
])
def test_scan_equals_unrolled_and_remat(options):
    reference = hidden(tiny(**options), TOKENS)
    for change in (dict(scan_layers=True), dict(remat="full"), dict(scan_layers=True, remat="full")):
        np.testing.assert_allclose(hidden(tiny(**options, **change), TOKENS), reference, atol=2e-5)


@pytest.mark.parametrize("options", [
    dict(), dict(num_kv_heads=1, window=4, window_pattern="LG", value_residual=True, attention_softcap=5.0),
    dict(position="learned", scan_layers=True), dict(ngram_max=3, ngram_buckets=64),
    dict(feedforward="moe", num_experts=4, shared_experts=1, bias_update_rate=0.1),
    dict(norm_place="both", window=3, window_pattern="LG", rope_theta_local=100.0, rope_pattern="RRRN", rope_fraction=0.5),
])
def test_cached_decoding_equals_full_pass(options):
    config = tiny(**options)
    model = build_model(config, 32, "plain")
    params = noisy(jax.jit(model.init)(jax.random.key(1)))
    full = jax.jit(lambda p: nnx.merge(model.graph, p).hidden(TOKENS)[0])(params)

    @jax.jit
    def step(p, tokens, cache, index):
        return nnx.merge(model.graph, p).hidden(tokens, cache=cache, cache_index=index)[:2]

    cache = nnx.merge(model.graph, params).init_cache(2, 12)
    x, cache = step(params, TOKENS[:, :5], cache, 0)
    pieces = [x]
    for t in range(5, 12):
        x, cache = step(params, TOKENS[:, t : t + 1], cache, t)
        pieces.append(x)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=2e-5)


def attention_reach(config, segment_ids=None, loss_mask=None):
    """(T, T) sums of |d hidden[t] / d embedding-row of token s|, by gradients and not by reading the masks."""
    model = build_model(config, 32, "plain")
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]  # token s has a row of its own

    @jax.jit
    @jax.jacrev
    def reach(table):
        module = nnx.merge(model.graph, {**params, "embedding": table})
        given = None if loss_mask is None else module.given({"loss_mask": loss_mask, "positions": POSITIONS})
        return jnp.sum(module.hidden(tokens, segment_ids_BT=segment_ids, prefix_BS=given)[0][0], axis=-1)

    return np.abs(np.asarray(reach(params["embedding"]))).sum(-1)[:, :12]


def test_causal_by_gradients():
    reach = attention_reach(tiny(norm="layer", norm_scale=False, position="learned"))
    reach_sum = attention_reach(tiny(position="rope", norm="none"))
    for matrix in (reach_sum,):
        assert (matrix[np.triu_indices(12, 1)] == 0).all()
        assert (matrix[np.tril_indices(12)] > 0).all()
    assert (reach[np.triu_indices(12, 1)] == 0).all()


def test_window_by_gradients():
    matrix = attention_reach(tiny(num_layers=1, window=3, window_pattern="L", norm="none"))
    t, s = np.indices((12, 12))
    assert ((matrix > 0) == ((s <= t) & (t - s < 3))).all()


def test_packed_documents_are_isolated_by_gradients():
    config = tiny(norm="none")
    config.data.isolate_documents = True
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    matrix = attention_reach(config, segments)
    assert (matrix[5:, :5] == 0).all() and (matrix[5:, 5:][np.tril_indices(7)] > 0).all()


POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]], np.int32)


def test_a_prompt_sees_all_of_itself_and_nothing_of_its_answer_by_gradients():
    """Two documents of 3 + 2 and 4 + 3 tokens; of each the last of the prompt tells the first of the answer."""
    config = tiny(norm="none", prefix_attention=True)
    config.data.isolate_documents = True
    loss_mask = np.array([[0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]], np.float32)
    reach = attention_reach(config, np.array([[1] * 5 + [2] * 7], np.int32), loss_mask) > 0
    t, s = np.indices((12, 12))
    same, prompt = (t < 5) == (s < 5), (s < 3) | (s >= 5) & (s < 9)
    assert (reach == (same & ((s <= t) | prompt))).all()


def test_packed_documents_with_ngrams_equal_the_documents_alone():
    config = tiny(ngram_max=3, ngram_buckets=64)
    config.data.isolate_documents = True
    segments = np.array([[1] * 5 + [2] * 7] * 2, np.int32)
    packed = hidden(config, TOKENS, segment_ids_BT=segments)
    for part in (slice(0, 5), slice(5, 12)):  # rope is relative: where a document stands in the row does not matter
        alone = hidden(config, TOKENS[:, part], segment_ids_BT=np.ones_like(TOKENS[:, part]))
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-5)


def test_ngram_hash_is_free_of_collisions_where_all_fit():
    config = tiny(ngram_max=2, ngram_buckets=33**2, embed_dim=1, num_heads=1, head_dim=2)
    table = NgramEmbedding(config, 32, nnx.Rngs(0))
    table.embedding[...] = jnp.arange(33**2, dtype=jnp.float32).reshape(1, -1, 1)
    pairs = np.stack(np.meshgrid(np.arange(32), np.arange(32)), -1).reshape(-1, 2).astype(np.int32)
    last_BD = np.asarray(table(pairs, 0, 2)[:, 1])
    assert len(np.unique(last_BD)) == 32**2


COUNTS = {"gpt2_124m": 124_439_808, "llama_1b": 1_235_814_400, "llama3_8b": 8_030_261_248}


@pytest.mark.parametrize("preset", COUNTS)
def test_preset_parameter_counts(preset):
    config = load(f"configs/{preset}.py")
    assert build_model(config, config.model.vocab_size, "plain").num_parameters == COUNTS[preset]
