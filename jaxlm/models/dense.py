"""A layer's product with its bias, and an adapter beside it: what projections, feed-forwards and heads are made of.

With an adapter the product is x W + (x A) B alpha / rank, of which A and B alone train (LoRA, arXiv:2106.09685); they are in
float32 whatever W is in, and B is zero at first.
"""

import math
import re

from flax import nnx

from jaxlm.errors import UserError
from jaxlm.kernels.matmul import dense
from jaxlm.kernels.quantized import MODULES, form_of
from jaxlm.models.parameter import constant, normal, parameter


class Dense(nnx.Module):
    """x (..., *inputs) -> (..., *outputs).

    module: its name, such as "attention.query", by which `kernels.quantized_modules` and `model.lora_modules` choose it.
    axes: logical axes of the kernel (*inputs, *outputs).
    """

    def __init__(self, config, rngs, module: str, inputs: tuple, outputs: tuple, axes: tuple, init, bias: bool = False):
        m, n = config.model, len(inputs)
        self.num_inputs, self.form = n, form_of(config, module)
        self.kernel = parameter(rngs, (*inputs, *outputs), axes, init, m.param_dtype, num_inputs=n)
        if bias:
            self.bias = parameter(rngs, outputs, axes[n:], constant(0.0), m.param_dtype)
        self.adapter_scale = adapter_scale(m)
        for name, part in adapter(m, rngs, module, inputs, outputs, axes).items():
            setattr(self, name, part)

    def __call__(self, x):
        return self.add(x, dense(x, self.kernel[...], self.num_inputs, self.form))

    def add(self, x, y):
        """To the product y of x, bias and adapter."""
        if hasattr(self, "lora_a"):
            y = y + dense(dense(x, self.lora_a[...], self.num_inputs), self.lora_b[...]) * self.adapter_scale
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y

    def weights(self):
        """The kernel with its adapter added to it."""
        if not hasattr(self, "lora_a"):
            return self.kernel[...]
        return add_adapter(self.kernel[...], self.lora_a[...], self.lora_b[...], self.adapter_scale)


def add_adapter(kernel, lora_a, lora_b, scale: float):
    """W + A B scale, summed in float32: (*inputs, *outputs), of (*inputs, rank) and (rank, *outputs)."""
    rank = lora_b.shape[0]
    product = (lora_a.reshape(-1, rank) @ lora_b.reshape(rank, -1)).reshape(kernel.shape)
    return (kernel + product * scale).astype(kernel.dtype)


def adapter(m, rngs, module: str, inputs: tuple, outputs: tuple, axes: tuple, experts: tuple = (), share: float = 1.0) -> dict:
    """{"lora_a": (*experts, *inputs, rank), "lora_b": (*experts, rank, *outputs)} of a module that `model.lora_modules` chooses;
    of another, nothing. axes: logical axes of the kernel (*experts, *inputs, *outputs)."""
    if not is_adapted(m, module):
        return {}
    n, (own, others) = len(inputs), (axes[: len(experts)], axes[len(experts) :])
    std = (3 * math.prod(inputs)) ** -0.5  # as the uniform numbers of PEFT spread
    return {"lora_a": parameter(rngs, (*experts, *inputs, m.lora_rank), (*own, *others[:n], None), normal(std), num_inputs=n,
                                share=share),
            "lora_b": parameter(rngs, (*experts, m.lora_rank, *outputs), (*own, None, *others[n:]), constant(0.0), num_inputs=1,
                                share=share)}


def adapter_scale(m) -> float:
    return m.lora_alpha / m.lora_rank if m.lora_rank else 0.0


# Those that `model.lora_modules` can choose.
ADAPTED = (*MODULES, *(f"feedforward.experts.{name}" for name in ("up", "gate", "down")), "embedding", "head")


def is_adapted(m, module: str) -> bool:
    """Raises UserError: `model.lora_modules` is no regex."""
    if not m.lora_rank:
        return False
    try:
        return bool(re.fullmatch(m.lora_modules, module))
    except re.error as error:
        raise UserError(f"model.lora_modules={m.lora_modules!r} is no regex: {error}") from error
