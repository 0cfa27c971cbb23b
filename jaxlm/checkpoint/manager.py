"""Checkpoints: Orbax saves and restores, we check.

Orbax is atomic under kill -9, but it restores a flipped bit without complaint and casts a wrong dtype silently. So each
checkpoint carries, per leaf, its shape, dtype and a fingerprint that does not depend on the mesh; restore checks them.

Several processes save and restore together, each its own shards. Which steps there are, and whether one is damaged, they
agree on; process 0 alone makes and moves directories.
"""

import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import tempfile

import jax

from jaxlm.checkpoint.chunks import read_one_by_one
from jaxlm.checkpoint.fingerprints import describe, fingerprints
from jaxlm.errors import UserError
from jaxlm.parallel.distributed import gather, is_main, share


class Checkpoints:
    """`<directory>/<step>/`, saved asynchronously.

    Args:
        keep: newest checkpoints kept; keep_every: also keep each multiple of it (0: none); keep_best: also the one with
            the best metrics[metric], by `is_better`.
        frugal: of host memory: reading takes one leaf after the other.
        create: make the directory and own it; False to read a run that may still be training: nothing is moved or removed.
    """

    def __init__(self, directory: str, keep: int, keep_every: int, keep_best: bool, create: bool = True,
                 frugal: bool = False, metric: str = "loss"):
        self.directory = pathlib.Path(os.path.abspath(directory)) if "://" not in directory else directory
        self.keep, self.keep_every, self.keep_best, self.create, self.frugal = keep, keep_every, keep_best, create, frugal
        self.metric = metric
        if create:
            share(self._make, "checkpoint directory")
        self._manager = None

    def _make(self):
        try:
            os.makedirs(self.directory, exist_ok=True)
            tempfile.TemporaryFile(dir=self.directory).close()  # now, not after hours at the first save
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be written ({error.strerror}); choose another --workdir") from error

    @property
    def manager(self):
        """Orbax's manager, imported and made at first use: a run that only resumes nothing starts sooner."""
        if self._manager is None:
            logging.getLogger("absl").setLevel(logging.ERROR)
            import orbax.checkpoint as ocp

            # Copies of a leaf on several devices share its writing, by slices, each a program to compile: not of small leaves.
            ocp.type_handlers.register_type_handler(
                jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20), override=True)
            policy = ocp.checkpoint_managers
            policies = [policy.LatestN(max(1, self.keep))]
            if self.keep_every:
                policies.append(policy.EveryNSteps(self.keep_every))
            if self.keep_best:
                # A checkpoint without an evaluation cannot be the best: it is left to the other rules.
                policies.append(policy.BestN(get_metric_fn=self._cost, reverse=True, n=1,
                                             keep_checkpoints_without_metrics=False))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(policies), create=False,
                cleanup_tmp_directories=self.create,  # a reader would delete the save that a live run is writing
                best_fn=self._cost if self.keep_best else None,  # Orbax stores metrics only where this is set
                best_mode="min", enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending, as process 0 sees them: all processes must ask."""
        return share(self._steps, "steps of the checkpoints")

    def _steps(self):
        if not os.path.isdir(self.directory):
            return []
        return sorted(int(name) for name in os.listdir(self.directory) if name.isdigit())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best metric; the first of several. None where no evaluation was kept with a checkpoint."""
        return share(self._best, "best checkpoint")

    def _best(self):
        files = {step: pathlib.Path(self.directory) / str(step) / "metrics" / "metrics" for step in self._steps()}
        costs = {step: self._cost(json.loads(file.read_text())) for step, file in files.items() if file.is_file()}
        return min(costs, key=costs.get, default=None)

    def _cost(self, metrics: dict) -> float:
        """Less is better; a checkpoint of a time when another metric was kept is never the best."""
        value = metrics[self.metric] if self.metric in metrics else math.inf
        return -value if higher_is_better(self.metric) else value

    def require_room(self, abstract_state) -> None:
        """Raises UserError where the disk cannot take one checkpoint of the state: the newest one is kept until the next is
        whole. Compression saves little on trained parameters."""
        need = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise UserError(f"{self.directory}: a checkpoint takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free "
                            "space or choose another --workdir")

    def save(self, step: int, state, metrics: dict | None, meta: dict) -> None:
        """Starts the save and returns once the state may be donated. A step already saved is left as it is."""
        import orbax.checkpoint as ocp

        if step in self.steps():
            return
        leaves = describe(state, fingerprints(state))
        try:
            kept = metrics and {name: float(metrics[name]) for name in ("loss", self.metric)}
            self.manager.save(step, metrics=kept, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave({**meta, "leaves": leaves})))
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None

    def is_saving(self) -> bool:
        """A save is still being written, beside the steps."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Until all saves are on disk."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except (OSError, ValueError) as error:
                raise self._unwritable(error) from None

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, abstract_state, before: float = math.inf):
        """-> (step, state, meta) of the newest checkpoint that is whole, of those of fewer steps than `before`.

        abstract_state: tree of ShapeDtypeStruct with shardings, of any mesh. A damaged checkpoint is named and, if this
        object owns the directory, moved to `checkpoints_damaged/` beside it; the one before it is used.
        Raises UserError if it belongs to another model, or if none is whole.
        """
        return self._newest_whole(abstract_state, [step for step in self.steps() if step < before], partial=False)

    def leaves(self) -> dict:
        """{"params/embedding": {"shape", "dtype", ...}, ...} of the newest checkpoint and of its base. Raises UserError: there is
        none."""
        step = self.latest()
        if step is None:
            raise UserError(f"{self.directory}: no checkpoint there yet; train first")
        meta = self._meta(step)
        return meta["leaves"] | base_of(meta)

    def _meta(self, step: int) -> dict:
        return json.loads((pathlib.Path(self.directory) / str(step) / "meta" / "metadata").read_text())

    def restore_params(self, abstract_params, name: str = "params", step: int | None = None):
        """Only the subtree `name` (params or ema) of the newest whole checkpoint, or of that of `step` and no other."""
        return self._newest_whole({name: abstract_params}, self.steps() if step is None else [step], partial=True)[1][name]

    def _newest_whole(self, abstract, steps: list[int], partial: bool):
        damaged = []  # (step, reason); moved only once an older one is known to be whole
        for step in reversed(steps):
            tree, leaves, reason = None, None, None
            try:
                meta = self._meta(step)
                leaves = meta["leaves"]
                tree = self._read(step, leaves, base_of(meta), abstract, partial)
            except UserError:
                raise
            except Exception as error:  # Orbax raises many kinds for damaged files
                if isinstance(error, MemoryError | ImportError | PermissionError) or is_exhausted(error):
                    raise  # this machine's trouble, not the checkpoint's
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            # A process sees only its own shards: one that finds damage speaks for all. The fingerprints come after
            # that, as they are computed by all together.
            reason = next((r for r in gather(reason, f"reading checkpoint {step}") if r), None)
            reason = reason or differing(tree, leaves, self.frugal)
            if reason:
                damaged.append((step, reason))
                continue
            for bad, reason in damaged:
                aside = share(lambda bad=bad: self._move_aside(bad), "moving") if self.create else None
                where = f"moved to {aside}" if aside else "left where it is"
                if is_main():
                    print(f"jaxlm: checkpoint {bad} is damaged ({reason}); {where}, going on from {step}", file=sys.stderr)
            if damaged:
                self.close()  # Orbax's manager remembers the steps it has seen
            return step, self._with_base(tree, abstract, meta), meta
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged)
        raise UserError(f"{self.directory}: no whole checkpoint is left ({reasons}); start again with another --workdir")

    def _move_aside(self, step: int) -> str:
        """To `<directory>_damaged/`, under a name of its own: an earlier damaged copy of the step is kept too."""
        parent = pathlib.Path(str(self.directory) + "_damaged")
        parent.mkdir(exist_ok=True)
        names = (f"{step}.{i}" if i else str(step) for i in itertools.count())
        aside = next(parent / name for name in names if not (parent / name).exists())
        shutil.move(pathlib.Path(self.directory) / str(step), aside)
        return str(aside)

    def _with_base(self, tree, abstract, meta: dict):
        """The state with those of its parameters that the checkpoint leaves out."""
        base = {name: leaf for name, leaf in base_of(meta).items() if name in describe(abstract)}
        if not base:
            return tree
        from jaxlm.train.base import read_base
        from jaxlm.train.state import with_part

        vocab_size = (meta["leaves"] | base)["params/embedding"]["shape"][0]
        read = read_base(os.path.dirname(self.directory), abstract["params"], base, vocab_size)
        return {**tree, "params": with_part(with_part(abstract["params"], tree["params"]), read)}

    def _read(self, step, leaves, base, abstract, partial: bool):
        self._check_same_model(step, leaves | base, describe(abstract), partial)
        abstract = without_base(abstract, base)
        if not jax.tree.leaves(abstract):
            return abstract

        def read(abstract, partial):
            import orbax.checkpoint as ocp

            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)
            # The handler itself: Orbax's manager waits for all processes at the end of a restore, also for one that failed.
            return ocp.PyTreeCheckpointHandler().restore(folder, args=args)

        folder = pathlib.Path(self.directory) / str(step) / "state"
        return read_one_by_one(read, folder, abstract) if self.frugal else read(abstract, partial)

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

    def _unwritable(self, error) -> Exception:
        """The UserError for a disk that cannot take the save; any other error as it is."""
        if not isinstance(error, OSError) and not is_exhausted(error):
            return error
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        return UserError(f"{self.directory}: saving failed ({reason}); free space or choose another --workdir, then run "
                         "the same command again")


def base_of(meta: dict) -> dict:
    """What `describe` says of the leaves that a checkpoint leaves out, see `jaxlm.train.base`."""
    return meta["base"] if "base" in meta else {}


def without_base(state: dict, base) -> dict:
    """Less those of its parameters that `base` tells of."""
    if not base or "params" not in state:
        return state
    from jaxlm.train.state import without

    return {**state, "params": without(state["params"], {name.removeprefix("params/") for name in base})}


def differing(tree, leaves, frugal: bool = False) -> str | None:
    """The first leaf whose numbers are not those that `leaves` tells of."""
    for name, value in describe(tree, fingerprints(tree, frugal)).items():
        if value["fingerprint"] != leaves[name]["fingerprint"]:
            return f"the numbers of {name} are not those that were saved"
    return None


def higher_is_better(metric: str) -> bool:
    """Of an evaluation's numbers."""
    return metric in ("accuracy",)


def is_exhausted(error: BaseException) -> bool:
    """Out of memory or disk; Orbax's storage layer says so in a ValueError's text."""
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "No space left"))
