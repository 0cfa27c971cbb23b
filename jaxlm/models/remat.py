"""Rematerialisation: what the forward pass of a block keeps for the backward pass, and what is computed again instead.

`model.remat` is the name of a policy, or a list of named tensors to keep, "attention,offload:up"; `offload:` keeps a tensor
in the host's memory. It changes memory and time, never the numbers. A block's input is always kept; what is inside routed
experts has no names and is computed again. Unrolled layers on a CPU keep everything whatever is asked: XLA finds there
what is computed twice.

    none            everything that the gradients need
    minimal         the layer's matrix products and the attention kernel's output: what is computed again is cheap
    save_dots       the layer's matrix products; attention is computed again
    save_attention  the attention kernel's output (and its log-sum-exp): flash attention is not run twice
    offload         as minimal, in the host's memory
    full            nothing (Chen et al., arXiv:1604.06174)
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.errors import UserError

KERNEL = "attention"
DOTS = ("query", "key", "value", "attention_out", "gate", "up", "down")
NAMES = (*DOTS, KERNEL)
FUSED_KERNELS = {"dot_product_attention_fwd"}  # cuDNN's, whose residuals have no names

POLICIES = {
    "full": "",
    "save_attention": KERNEL,
    "save_dots": ",".join(DOTS),
    "minimal": ",".join(NAMES),
    "offload": ",".join(f"offload:{name}" for name in NAMES),
}


def named(name: str, x):
    """`x`, known to the policies by `name`."""
    assert name in NAMES, name
    return checkpoint_name(x, name)


def check_remat(remat: str):
    """Raises UserError where `model.remat` is neither a policy nor a list of tensors."""
    wrong = [part for part in remat.split(",") if part.removeprefix("offload:") not in NAMES]
    if wrong and remat != "none" and remat not in POLICIES:
        raise UserError(f"model.remat={remat!r}: {wrong[0]!r} is no policy and no tensor; use none, {', '.join(POLICIES)}, "
                        f"or some of {','.join(NAMES)}, each as it is or as offload:NAME")


def policy_of(remat: str):
    """-> a policy for `jax.checkpoint`."""
    parts = [part for part in POLICIES.get(remat, remat).split(",") if part]
    offloaded = [part.removeprefix("offload:") for part in parts if part.startswith("offload:")]
    saved = [part for part in parts if not part.startswith("offload:")]
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved, names_which_can_be_offloaded=offloaded, offload_src="device", offload_dst="pinned_host")

    def policy(primitive, *args, **parameters):
        return KERNEL in saved and primitive.name in FUSED_KERNELS or by_name(primitive, *args, **parameters)

    return policy


def rematerialise(block, remat: str, **options):
    """`block` with what `remat` does not keep computed again in the backward pass. options: of `jax.checkpoint`."""
    return block if remat == "none" else jax.checkpoint(block, policy=policy_of(remat), **options)
