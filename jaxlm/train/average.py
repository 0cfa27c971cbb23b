"""The mean of the last checkpoints of a run, as a run of its own (Izmailov et al., arXiv:1803.05407; Vaswani et al.,
arXiv:1706.03762, section 6.1)."""

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.config import fingerprint
from jaxlm.data.feed import put_everywhere
from jaxlm.errors import UserError
from jaxlm.parallel.distributed import is_main, share
from jaxlm.parallel.rules import replicated
from jaxlm.train.restore import build_here, config_of_run
from jaxlm.train.rundir import open_run_directory
from jaxlm.train.state import is_spec, parameter_shardings


def average(workdir: str, to: str, last: int, overrides=()) -> None:
    """Of parameters, never of moments or of a moving average, summed in float32: `to` is then what eval, generate and
    model.from_pretrained take. Raises UserError: fewer checkpoints than `last`, a damaged one, a directory that is taken."""
    config = config_of_run(workdir, overrides)
    source = Checkpoints(os.path.join(workdir, "checkpoints"), 1, 0, False, create=False)
    steps = source.steps()[-last:]
    if len(steps) < last:
        raise UserError(f"--last={last}: {workdir} keeps {len(steps)} checkpoints; train with checkpoint.keep={last} or more, "
                        "and a smaller checkpoint.every_steps")
    if os.path.isdir(to) and os.listdir(to):
        raise UserError(f"--to={to}: is not empty; use another")
    config.optimizer.ema_decay = 0.0  # `restore.open_run` would look for the moving average
    data, model, mesh = build_here(config, overrides, text=False)
    abstract = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), model.specs,
                            parameter_shardings(mesh, model, config.mesh.zero_stage), is_leaf=is_spec)
    add = jax.jit(lambda total, params: jax.tree.map(lambda t, p: t + p.astype(jnp.float32), total, params), donate_argnums=0)
    total = None
    for step in steps:
        params = source.restore_params(abstract, step=step)
        total = add(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params) if total is None else total, params)
    mean = jax.jit(lambda total: jax.tree.map(lambda t, s: (t / last).astype(s.dtype), total, abstract))(total)
    share(lambda: begin(workdir, to, config, data.fingerprint), "run directory")
    checkpoints = Checkpoints(os.path.join(to, "checkpoints"), 1, 0, False)
    checkpoints.save(steps[-1], {"step": put_everywhere(np.int32(steps[-1]), replicated(mesh)), "params": mean}, None,
                     {"fingerprint": fingerprint(config), "step": steps[-1]})
    checkpoints.wait()
    checkpoints.close()
    if is_main():
        print(f"{to}: the mean of {last} checkpoints of {workdir}, steps {', '.join(f'{step:,}' for step in steps)}")


def begin(workdir: str, to: str, config, data: str | None) -> None:
    open_run_directory(to, config, False, {}, data)
    if (tokenizer := pathlib.Path(workdir, "tokenizer.json")).is_file():
        shutil.copyfile(tokenizer, pathlib.Path(to, "tokenizer.json"))
