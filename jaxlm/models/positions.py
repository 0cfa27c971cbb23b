"""Positions: what tells the model where a token stands. Each kind may act on the embedding, on queries and keys, or not."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.models.parameter import normal, parameter
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
        """What `rotate` needs, computed once for all layers."""
        return None


@POSITIONS.register("learned")
class Learned(NoPosition):
    """A learned vector for each of seq_len positions, added to the embedding (GPT-2)."""

    def __init__(self, config, rngs):
        self.embedding = parameter(rngs, (config.seq_len, config.model.embed_dim), (None, "embed"),
                                   normal(config.model.init_std), config.model.param_dtype)

    def embed(self, x_BTD, positions_BT):
        return x_BTD + self.embedding[...].astype(x_BTD.dtype)[positions_BT]


@POSITIONS.register("rope")
class Rope(NoPosition):
    """Rotary position embedding, halves form (Su et al., arXiv:2104.09864; as in Llama)."""

    def __init__(self, config, rngs):
        del rngs
        self.head_dim, self.theta = config.model.head_dim, config.model.rope_theta

    def tables(self, positions_BT):
        """-> (cos, sin), each (B, T, 1, H/2), float32: bfloat16 would round position 257 to 256.

        Known positions (a numpy array) make constants: XLA would otherwise compute every angle again in each layer.
        """
        xp = np if isinstance(positions_BT, np.ndarray) else jnp
        frequency_H = np.float32(self.theta) ** -(np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim)
        angle = positions_BT[:, :, None, None].astype(np.float32) * frequency_H
        return xp.cos(angle), xp.sin(angle)


def rotate(x_BTNH, tables):
    """Apply `Rope.tables` to queries or keys; with tables=None, do nothing."""
    if tables is None:
        return x_BTNH
    cos, sin = tables
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
