"""Checkpoints: Orbax saves and restores, we check.

Orbax is atomic under kill -9, but it restores a flipped bit without complaint and casts a wrong dtype silently. So each
checkpoint carries, per leaf, its shape, dtype and a fingerprint that does not depend on the mesh; restore checks them.
"""

import functools
import json
import logging
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp

from jaxlm.errors import UserError


class Checkpoints:
    """`<directory>/<step>/`, saved asynchronously.

    Args:
        keep: newest checkpoints kept; keep_every: also keep each multiple of it (0: none); keep_best: also the one with
            the lowest metrics["loss"].
        create: make the directory; False to open another run's.
    """

    def __init__(self, directory: str, keep: int, keep_every: int, keep_best: bool, create: bool = True):
        self.directory = pathlib.Path(os.path.abspath(directory)) if "://" not in directory else directory
        self.keep, self.keep_every, self.keep_best = keep, keep_every, keep_best
        if create:
            try:
                os.makedirs(self.directory, exist_ok=True)
            except OSError as error:
                raise UserError(f"{directory}: cannot be made ({error.strerror}); choose another --workdir") from error
        self._manager = None

    @property
    def manager(self):
        """Orbax's manager, imported and made at first use: a run that only resumes nothing starts sooner."""
        if self._manager is None:
            logging.getLogger("absl").setLevel(logging.ERROR)
            import orbax.checkpoint as ocp

            policy = ocp.checkpoint_managers
            policies = [policy.LatestN(max(1, self.keep))]
            if self.keep_every:
                policies.append(policy.EveryNSteps(self.keep_every))
            if self.keep_best:
                policies.append(policy.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(policies), create=False, cleanup_tmp_directories=True,
                enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        if not os.path.isdir(self.directory):
            return []
        return sorted(int(name) for name in os.listdir(self.directory) if name.isdigit())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state, metrics: dict | None, meta: dict) -> None:
        """Starts the save and returns once the state may be donated. A step already saved is left as it is."""
        import orbax.checkpoint as ocp

        if step in self.steps():
            return
        leaves = describe(state, fingerprints(state))
        try:
            self.manager.save(step, metrics=metrics and {"loss": float(metrics["loss"])}, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave({**meta, "leaves": leaves})))
        except OSError as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Until all saves are on disk."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, abstract_state):
        """-> (step, state, meta) of the newest checkpoint that is whole.

        abstract_state: tree of ShapeDtypeStruct with shardings, of any mesh. A damaged checkpoint is named, moved to
        `checkpoints_damaged/` beside the directory, and the one before it used. Raises UserError if it belongs to
        another model, or if none is whole.
        """
        return self._newest_whole(lambda step, leaves: self._read(step, leaves, abstract_state, partial=False))

    def restore_params(self, abstract_params, name: str = "params"):
        """Only the subtree `name` (params or ema) of the newest whole checkpoint."""
        read = lambda step, leaves: self._read(step, leaves, {name: abstract_params}, partial=True)
        return self._newest_whole(read)[1][name]

    def _newest_whole(self, read):
        for step in reversed(self.steps()):
            try:
                meta = json.loads(next((pathlib.Path(self.directory) / str(step) / "meta").glob("metadata")).read_text())
                return step, read(step, meta["leaves"]), meta
            except UserError:
                raise
            except Exception as error:  # Orbax raises many kinds for damaged files
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                aside = pathlib.Path(str(self.directory) + "_damaged") / str(step)
                self.close()
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                shutil.move(pathlib.Path(self.directory) / str(step), aside)
                print(f"jaxlm: checkpoint {step} is damaged ({reason}); moved to {aside}", file=sys.stderr)
        raise UserError(f"{self.directory}: no whole checkpoint is left; start again with another --workdir")

    def _read(self, step, leaves, abstract, partial: bool):
        import orbax.checkpoint as ocp

        self._check_same_model(step, leaves, describe(abstract), partial)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)
        tree = self.manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        for name, value in describe(tree, fingerprints(tree)).items():
            if value["fingerprint"] != leaves[name]["fingerprint"]:
                raise ValueError(f"the numbers of {name} are not those that were saved")
        return tree

    def _check_same_model(self, step, saved, wanted, partial):
        problems = [f"{n} is missing" for n in wanted if n not in saved]
        problems += [f"{n} is not in this model" for n in saved if n not in wanted and not partial]
        problems += [f"{n} is {saved[n]['dtype']}{saved[n]['shape']}, here {w['dtype']}{w['shape']}"
                     for n, w in wanted.items()
                     if n in saved and (saved[n]["shape"], saved[n]["dtype"]) != (w["shape"], w["dtype"])]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{self.directory}/{step}: belongs to another model: {'; '.join(problems[:3])}{more}; "
                            "use another --workdir, or the config it was trained with")

    def _unwritable(self, error) -> UserError:
        return UserError(f"{self.directory}: saving failed ({error.strerror or error}); free space or choose another "
                         "--workdir, then run the same command again")


def describe(tree, prints=None) -> dict:
    """{path: {"shape", "dtype"[, "fingerprint"]}} for the leaves."""
    out = {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        out[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if prints is not None:
            out[name]["fingerprint"] = int(prints[i])
    return out


def fingerprints(tree) -> list[int]:
    """A uint32 per leaf: the sum of its words, each weighted by an odd number that depends on its place. Integer sums
    do not depend on their order, so every mesh gives the same; one flipped bit always changes it."""
    leaves = jax.tree.leaves(tree)
    return [int(x) for x in jax.device_get(_fingerprint(leaves))]


@functools.partial(jax.jit)
def _fingerprint(leaves):
    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jnp.dtype(x.dtype).itemsize * 8
        words = jax.lax.bitcast_convert_type(x, {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]).astype(jnp.uint32)
        weight = jnp.uint32(1)
        for axis, size in enumerate(words.shape):  # mixed radix by broadcasting: no flattening, so shards stay in place
            shape = [1] * words.ndim
            shape[axis] = size
            place = jnp.arange(size, dtype=jnp.uint32).reshape(shape)
            weight = weight * (2 * (place * jnp.uint32(2654435761 >> axis)) + 1)
        return jnp.sum(words * weight, dtype=jnp.uint32)

    return [one(x) for x in leaves]
