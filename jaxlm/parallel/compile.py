"""`jit` for a mesh: `jax.jit` with the mesh as the ambient one, and on several CPU devices one defect mended.

JAX gives all collectives of a `shard_map` the same channel (`COLLECTIVE_CHANNEL_ID`). XLA on a CPU runs collectives that do not
wait for one another at once, and tells them apart by channel: two of a kind then mix up their devices, and the program
hangs, aborts ("Id can't be larger than the number of participating threads") or could exchange the wrong data. GPU and TPU
match collectives by their order. So here each is given a channel of its own before XLA sees the program.
"""

import contextlib
import functools
import itertools
import tempfile

import jax
from jax.extend.mlir import ir

from jaxlm.parallel.rules import under_mesh


def jit(mesh: jax.sharding.Mesh, function, **options):
    """`function`, traced under `mesh` and compiled for each set of shapes and shardings it is called with.

    options: of `jax.jit`, static arguments excepted. `.lower(*args)` is that of `jax.jit` too.
    """
    jitted = jax.jit(under_mesh(mesh, function), **options)
    return OwnChannels(jitted) if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else jitted


class OwnChannels:
    def __init__(self, jitted):
        self.jitted, self.compiled = jitted, {}
        functools.update_wrapper(self, jitted)

    def lower(self, *args):
        lowered = self.jitted.lower(*args)
        number_channels(lowered.compiler_ir("stablehlo"))
        return lowered

    def __call__(self, *args):
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)
        if (tree, shapes) not in self.compiled:
            self.compiled[tree, shapes] = self.lower(*args).compile()
        return self.compiled[tree, shapes](*args)


def number_channels(module: ir.Module):
    """Give each operation with a channel one of its own, in place."""
    channels = itertools.count(1)

    def visit(operation):
        if "channel_handle" in operation.attributes:
            operation.attributes["channel_handle"] = ir.Attribute.parse(
                f"#stablehlo.channel_handle<handle = {next(channels)}, type = 1>", operation.context)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)


@contextlib.contextmanager
def empty_compile_cache():
    """A persistent compilation cache of its own for the block: what is compiled first there is compiled cold."""
    from jax.experimental.compilation_cache import compilation_cache

    kept = jax.config.jax_compilation_cache_dir
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            jax.config.update("jax_compilation_cache_dir", folder)
            compilation_cache.reset_cache()  # JAX looks at the setting once
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", kept)
            compilation_cache.reset_cache()
