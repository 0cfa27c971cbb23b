"""Tensors on the way: a traced function is computed again, and those that have a name are told of."""

import jax

CHECKPOINTS = ("checkpoint", "remat2")
CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", *CHECKPOINTS)  # JAX's, with
INNER = ("jaxpr", "call_jaxpr")  # what they call
REMATERIALISED = "rematerialised"


def evaluate(jaxpr, consts, args, seen: list, within: bool = False) -> list:
    """The outputs of a jaxpr. To `seen` goes (name, value) of each tensor with a name (`jax.ad_checkpoint.checkpoint_name`), and
    (REMATERIALISED, first output) at the end of each outermost `jax.checkpoint`. What is inside loops is not looked at."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda v: v.val if isinstance(v, jax.extend.core.Literal) else values[v]
    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        kind, inner = equation.primitive.name, next((equation.params[k] for k in INNER if k in equation.params), None)
        if kind == "name":
            seen.append((equation.params["name"], inputs[0]))
            outputs = inputs
        elif kind in CALLS:
            block = kind in CHECKPOINTS
            outputs = evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, seen, within or block)
            if block and not within:
                seen.append((REMATERIALISED, outputs[0]))
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]
