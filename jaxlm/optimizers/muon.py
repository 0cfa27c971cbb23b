"""Muon: momentum made orthogonal, for hidden matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import math

import jax
import jax.numpy as jnp
import optax

from jaxlm.models.parameter import ParamSpec
from jaxlm.parallel import target

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(m_XIO, steps: int):
    """Newton-Schulz quintic on a stack of matrices (X, I, O): singular values to about 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    tall = m_XIO.shape[-2] > m_XIO.shape[-1]
    x = m_XIO.swapaxes(-1, -2) if tall else m_XIO  # the Gram matrix on the smaller side
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x


def is_hidden_matrix(spec: ParamSpec) -> bool:
    return spec.num_inputs > 0 and "vocab" not in spec.axes


def muon(specs, adam: optax.GradientTransformation, momentum: float, nesterov: bool, steps: int, adam_lr_ratio: float,
         moment_dtype=jnp.float32):
    """Muon for hidden matrices, `adam` times `adam_lr_ratio` for all else (embedding, head, vectors).

    A kernel with several head axes is one matrix: its `num_inputs` leading axes by the rest; each expert has its own. Matrices
    of one shape are orthogonalised together, in one batch. State is keyed by parameter path, by which it is sharded like its
    parameter.
    """
    with_paths, tree = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
    leaves = [spec for _, spec in with_paths]
    hidden = [i for i, spec in enumerate(leaves) if is_hidden_matrix(spec)]
    others = [i for i, spec in enumerate(leaves) if not is_hidden_matrix(spec)]
    compute_dtype = jnp.float32 if target.platform() == "cpu" else jnp.bfloat16

    def matrix_shape(spec):
        dims = spec.shape[spec.num_stacked :]
        return tuple(map(math.prod, (spec.shape[: spec.num_stacked], dims[: spec.num_inputs], dims[spec.num_inputs :])))

    shapes = {i: matrix_shape(leaves[i]) for i in hidden}

    def init(params):
        flat = tree.flatten_up_to(params)
        return {"momentum": {names[i]: jnp.zeros(flat[i].shape, moment_dtype) for i in hidden},
                "adam": adam.init({names[i]: flat[i] for i in others})}

    def update(grads, state, params=None):
        flat = tree.flatten_up_to(grads)
        updates = [None] * len(flat)
        buffers = {names[i]: momentum * state["momentum"][names[i]].astype(jnp.float32) + flat[i] for i in hidden}
        by_shape = {}
        for i in hidden:
            direction = flat[i] + momentum * buffers[names[i]] if nesterov else buffers[names[i]]
            by_shape.setdefault(shapes[i][1:], []).append((i, direction.reshape(shapes[i])))
        for (inputs, outputs), group in by_shape.items():
            ortho = orthogonalize(jnp.concatenate([m for _, m in group]).astype(compute_dtype), steps)
            ortho = ortho.astype(jnp.float32) * max(1.0, outputs / inputs) ** 0.5
            at = 0
            for i, m in group:
                updates[i] = ortho[at : at + len(m)].reshape(flat[i].shape)
                at += len(m)
        small, adam_state = adam.update({names[i]: flat[i] for i in others}, state["adam"])
        for i in others:
            updates[i] = adam_lr_ratio * small[names[i]]
        buffers = {name: buffer.astype(moment_dtype) for name, buffer in buffers.items()}
        return tree.unflatten(updates), {"momentum": buffers, "adam": adam_state}

    return optax.GradientTransformation(init, update)
