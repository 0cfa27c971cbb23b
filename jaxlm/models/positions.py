"""Positions: what tells the model where a token stands. Each kind may act on the embedding, on queries and keys, or not."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.config import rotated_size
from jaxlm.models.parameter import normal, parameter
from jaxlm.models.rope_scaling import SCALINGS
from jaxlm.registry import Registry

POSITIONS = Registry("position", key="model.position")


def build_position(config, rngs: nnx.Rngs) -> nnx.Module:
    return POSITIONS[config.model.position](config, rngs)


@POSITIONS.register("none")
class NoPosition(nnx.Module):
    def __init__(self, config, rngs):
        del config, rngs

    def embed(self, x_BTD, positions_BT):
        return x_BTD

    def tables(self, positions_BT):
        """What `rotate` needs, computed once for all layers: {name: (cos, sin)}."""
        return {}

    def bias(self, T: int, S: int, first_query, causal: bool):
        """What is added to scores, (N, T, S), or None; the first query is at place first_query among the keys."""
        return None


@POSITIONS.register("learned")
class Learned(NoPosition):
    """A learned vector for each of seq_len positions, added to the embedding (GPT-2)."""

    def __init__(self, config, rngs):
        self.embedding = parameter(rngs, (config.seq_len, config.model.embed_dim), (None, "embed"),
                                   normal(config.model.init_std), config.model.param_dtype)

    def embed(self, x_BTD, positions_BT):
        return x_BTD + self.embedding[...].astype(x_BTD.dtype)[positions_BT]


@POSITIONS.register("relative")
class Relative(NoPosition):
    """A learned number for each head and distance, added to scores; distances share buckets that widen with them (T5, Raffel et
    al., arXiv:1910.10683, 2.1)."""

    def __init__(self, config, rngs):
        m = config.model
        self.buckets, self.max_distance = m.relative_buckets, m.relative_max_distance
        self.embedding = parameter(rngs, (self.buckets, m.num_heads), (None, "heads"), normal(m.init_std), m.param_dtype)

    def bias(self, T, S, first_query, causal):
        bucket_Z = bucket_of(np.arange(1 - S, S), self.buckets, self.max_distance, causal)
        distance_TS = jnp.arange(S) - (first_query + jnp.arange(T)[:, None])
        return self.embedding[...].astype(jnp.float32).T[:, bucket_Z][:, distance_TS + S - 1]


def bucket_of(distance, buckets: int, max_distance: int, causal: bool):
    """distance: of a key after the query. Half of the buckets are of one distance each; those of the other half widen up to
    max_distance. Not causal, keys after the query have as many of their own."""
    offset = 0 if causal else np.where(distance > 0, buckets // 2, 0)
    buckets = buckets if causal else buckets // 2
    distance = np.maximum(-distance, 0) if causal else np.abs(distance)
    exact = buckets // 2
    times = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    wide = np.minimum(exact + (times * np.float32(buckets - exact)).astype(np.int32), buckets - 1)
    return offset + np.where(distance < exact, distance, wide)


@POSITIONS.register("rope")
class Rope(NoPosition):
    """Rotary position embedding, halves form (Su et al., arXiv:2104.09864; as in Llama)."""

    def __init__(self, config, rngs):
        del rngs
        m = config.model
        frequencies = lambda theta: np.float32(theta) ** -(np.arange(0, rotated_size(m), 2, dtype=np.float32) / rotated_size(m))
        waves = {"rope": SCALINGS[m.rope_scaling](config, frequencies(m.rope_theta))}
        if m.rope_theta_local:
            waves["local_rope"] = frequencies(m.rope_theta_local), 1.0
        self.waves = tuple((name, tuple(frequency_R.tolist()), factor) for name, (frequency_R, factor) in waves.items())

    def tables(self, positions_BT):
        """-> {"rope": (cos, sin)[, "local_rope": ...]}, each (B, T, 1, R/2) for R rotated numbers of a head, float32: bfloat16
        would round position 257 to 256.

        Known positions (a numpy array) make constants: XLA would otherwise compute every angle again in each layer.
        """
        xp = np if isinstance(positions_BT, np.ndarray) else jnp

        def table(frequency_R, factor):
            angle = positions_BT[:, :, None, None].astype(np.float32) * np.array(frequency_R, np.float32)
            waves = xp.cos(angle), xp.sin(angle)
            return waves if factor == 1 else tuple(wave * np.float32(factor) for wave in waves)

        return {name: table(*wave) for name, *wave in self.waves}


def rotate(x_BTNH, tables):
    """Apply one of `Rope.tables` to queries or keys, as far as it goes; with None, do nothing."""
    if tables is None:
        return x_BTNH
    cos, sin = tables
    size = 2 * cos.shape[-1]
    a, b = jnp.split(x_BTNH[..., :size].astype(jnp.float32), 2, axis=-1)
    y_BTNR = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
    return y_BTNR if size == x_BTNH.shape[-1] else jnp.concatenate([y_BTNR, x_BTNH[..., size:]], axis=-1)
