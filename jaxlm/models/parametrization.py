"""How initial sizes, multipliers and learning rates follow width and depth, so that what is tuned on a small model holds for a
large one: `model.parametrization`, of which everything here is 1 for "standard".

mup: Yang & Hu, Tensor Programs V (arXiv:2203.03466), table 8, for Adam. With r = width / width of the tuned model,

    input weights (embeddings) and vectors    initial size and learning rate as they are
    hidden matrices                           initial size / sqrt(r), learning rate / r
    logits                                    times 1 / r, their weights as input weights (so embeddings may be tied)
    attention scores                          of 1 / head_dim instead of its root

completep: Dey et al. (arXiv:2505.01618), table 1 with alpha = 1: that, and with l = depth / depth of the tuned model each branch
is added to the residual stream times 1 / l. In both the decoupled weight decay of hidden matrices is multiplied by r, so that its
product with their learning rate stays, and Adam's epsilon follows the size of gradients: / r, and / l in layers.

At the tuned model's own width and depth each is the standard one, number for number.
"""

from typing import NamedTuple

import jax

from jaxlm.models.parameter import ParamSpec

WIDTHS = ("embed", "heads", "mlp")  # logical axes that grow with the model


class Parametrization(NamedTuple):
    width: float = 1.0  # r
    depth: float = 1.0  # l; 1 in mup
    head: float = 1.0  # head_dim / that of the tuned model

    @property
    def logits(self) -> float:
        """What multiplies them."""
        return 1 / self.width

    @property
    def queries(self) -> float:
        """What multiplies queries, beside the 1/sqrt(head_dim) of attention."""
        return self.head**-0.5

    @property
    def branch(self) -> float:
        """What multiplies attention and feed-forward before they are added."""
        return 1 / self.depth

    def learning_rate(self, spec: ParamSpec, optimizer: str) -> float:
        """Muon's update of a hidden matrix has the same spectral norm at any width, which is what is asked (arXiv:2310.17813)."""
        return 1 / self.width if is_hidden(spec) and optimizer != "muon" else 1.0

    def epsilon(self, spec: ParamSpec) -> float:
        return 1 / (self.width * (self.depth if spec.stacked else 1.0))


def is_hidden(spec: ParamSpec) -> bool:
    """A matrix whose inputs and outputs both grow with the model."""
    split = spec.num_stacked + spec.num_inputs
    inputs, outputs = spec.axes[spec.num_stacked : split], spec.axes[split:]
    return any(axis in WIDTHS for axis in inputs) and any(axis in WIDTHS for axis in outputs)


def build_parametrization(m) -> Parametrization:
    """m: config.model."""
    if m.parametrization == "standard":
        return Parametrization()
    depth = m.num_layers / m.base_num_layers if m.parametrization == "completep" else 1.0
    return Parametrization(m.embed_dim / m.base_embed_dim, depth, m.head_dim / (m.base_head_dim or m.head_dim))


def of_parameters(function, specs):
    """A tree of `function(spec)`, like specs."""
    return jax.tree.map(function, specs, is_leaf=lambda x: isinstance(x, ParamSpec))

