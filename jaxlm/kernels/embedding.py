"""The embedding look-up, and how its table gets its gradient: a row of D numbers for each token, added into V rows.
A backend is (table_VD, ids, cotangent_dtype) -> table_VD[ids], with its own gradient."""

import jax
import jax.numpy as jnp

from jaxlm.kernels.backend import Backend, choose
from jaxlm.parallel.rules import fit, mesh_size, on_a_mesh, spec_of_axes
from jaxlm.registry import Registry

BACKENDS = Registry("embedding gradient", key="kernels.embedding_gradient")
ONEHOT_ENTRIES = 2**27  # of the one-hot matrix made at once

# Scatter everywhere until one of the others has been measured to be faster on a GPU: jaxlib 0.10 and 0.11 make a float32
# scatter-add there a loop of compare-and-swap (jax#38806), at a cost that depends on how often a token repeats.
PREFERRED = ("scatter",)


def choose_embedding_gradient(config, platform: str) -> tuple[str, str]:
    """-> (name, why). Raises UserError where the config names none that there is."""
    return choose(BACKENDS, config.kernels.embedding_gradient, platform, PREFERRED)


def look_up(table_VD, ids, *, backend: str, cotangent_dtype=jnp.float32):
    """table_VD[ids] -> (*ids.shape, D), in the table's type.

    cotangent_dtype: a type that holds the gradient of the result exactly, for the backends that multiply. It is the compute type
    where the result is cast to that at once.
    """
    return BACKENDS[backend].run(table_VD, ids, jnp.dtype(cotangent_dtype))


def scatter(table_VD, ids, cotangent_dtype):
    """JAX's own gradient: scatter-add, in the table's type."""
    return table_VD[ids]


def with_gradient(gradient):
    """A backend from (ids_X, d_XD, V) -> d_VD float32, which sees one device's tokens and skips ids outside 0 ... V-1."""

    def run(table_VD, ids, cotangent_dtype):
        shape, dtype = table_VD.shape, table_VD.dtype

        @jax.custom_vjp
        def rows(table_VD, ids):
            return table_VD[ids]

        def backward(ids, d):
            return on_mesh(gradient, ids, d.astype(cotangent_dtype), shape).astype(dtype), None

        rows.defvjp(lambda table_VD, ids: (table_VD[ids], ids), backward)
        return rows(table_VD, ids)

    return run


def on_mesh(gradient, ids_BT, d_BTD, shape):
    """Each device adds up its own tokens for its share of the vocabulary, and one sum over devices follows."""
    V, D = shape
    if not on_a_mesh():
        return gradient(ids_BT.reshape(-1), d_BTD.reshape(-1, D), V)
    rows, table = spec_of_axes(("batch", "seq")), fit(spec_of_axes(("vocab", None)), shape, jax.sharding.get_abstract_mesh())
    batch_axes, seq_axis = rows
    own_V = V // mesh_size(table[0]) if table[0] else V

    def run(ids, d):
        own = ids.reshape(-1) - (jax.lax.axis_index(table[0]) * own_V if table[0] else 0)
        d_VD = gradient(jnp.where((own >= 0) & (own < own_V), own, own_V), d.reshape(-1, D), own_V)
        return jax.lax.psum(d_VD, (*batch_axes, seq_axis))

    in_specs = (rows, spec_of_axes(("batch", "seq", None)))
    return jax.shard_map(run, in_specs=in_specs, out_specs=table, check_vma=False)(ids_BT, d_BTD)


@with_gradient
def onehot(ids_X, d_XD, V):
    """A matrix product, 2VD FLOP a token, of as many tokens at a time as `ONEHOT_ENTRIES` allows; summed in float32."""
    X, D = d_XD.shape
    chunk = min(X, max(1, ONEHOT_ENTRIES // V))
    pad = -X % chunk
    ids_CX = jnp.pad(ids_X, (0, pad), constant_values=V).reshape(-1, chunk)
    d_CXD = jnp.pad(d_XD, ((0, pad), (0, 0))).reshape(-1, chunk, D)
    # Accelerators would round float32 to fewer bits. The one-hot matrix is exact in any type.
    precision = jax.lax.Precision.HIGHEST if d_XD.dtype == jnp.float32 else None

    def add(total_VD, piece):
        ids, d = piece
        hot_XV = jax.nn.one_hot(ids, V, dtype=d.dtype)
        return total_VD + jnp.einsum("XV,XD->VD", hot_XV, d, precision=precision, preferred_element_type=jnp.float32), None

    return jax.lax.scan(add, jnp.zeros((V, D), jnp.float32), (ids_CX, d_CXD))[0]


@with_gradient
def sort(ids_X, d_XD, V):
    """Tokens in the order of their ids, then a scatter that is told so; in float32."""
    order_X = jnp.argsort(ids_X)
    zeros = jnp.zeros((V, d_XD.shape[1]), jnp.float32)
    return zeros.at[ids_X[order_X]].add(d_XD[order_X].astype(jnp.float32), mode="drop", indices_are_sorted=True)


BACKENDS.register("scatter")(Backend(lambda platform: "", scatter))
BACKENDS.register("onehot")(Backend(lambda platform: "", onehot))
BACKENDS.register("sort")(Backend(lambda platform: "", sort))
