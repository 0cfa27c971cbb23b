"""The members of an ensemble: runs that differ in numbers and not in shapes, so that one compiled step trains them all.

What differs is traced: the step's own learning rate, weight decay and seed, and any other key whose value the optimizer, the
schedule, the objective or the initialisation takes as a number (betas, momentum, dropout, `init_std`, a loss's weight, ...).
They are built once more while the step is traced, from a view of the config in which those keys have the member's values;
a key that such code must know before (a width, a number of iterations, the name of a part) is refused by its name.

Two executions with one interface. `together`: the step `vmap`ped over the member axis M, which is cut up over the devices
there are. `in_turn`: the one compiled step, member after member. A CPU that small members already fill gains nothing by the
first: batched products are slower there than plain ones, so it is chosen where there is an accelerator.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import Tracked, View, flatten, settle_class_weights
from jaxlm.data.loader import Batches, build_data
from jaxlm.errors import UserError
from jaxlm.kernels.attention import choose_backend
from jaxlm.objectives.build import build_objective
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel import target
from jaxlm.parallel.mesh import AXES
from jaxlm.parallel.rules import MEMBER
from jaxlm.train.bench import build
from jaxlm.train.state import build_init, build_model
from jaxlm.train.step import build_eval_step, build_train_step

OWN = {"optimizer.learning_rate": "learning_rate", "optimizer.weight_decay": "weight_decay", "seed": "seed"}  # of every step
STRUCTURE_TAKES_NUMBER = ("model.dropout", "model.init_std")  # the model is built with them, and each member has its own
OFF_AT_ZERO = ("optimizer.clip_norm", "optimizer.ema_decay")  # 0 is another program


def varied(configs) -> dict[str, list]:
    """{key: its value in each config}, of the keys that are not the same in all."""
    flat = [flatten(config) for config in configs]
    columns = {key: [of[key] if key in of else None for of in flat] for key in dict.fromkeys(k for of in flat for k in of)}
    return {key: values for key, values in columns.items() if any(v != values[0] for v in values)}


class Members:
    """Several runs and the program that trains them. States go in and come out whole (`init`, `join`, `member`); between, they
    are whatever `step` takes.

    Raises UserError: keys that differ and are no numbers of the step, each by its name; a mesh; fewer than one config.
    """

    def __init__(self, configs, overrides=(), execution: str = "auto", devices=None):
        if not configs:
            raise UserError("an ensemble needs at least one member")
        devices = jax.local_devices() if devices is None else devices
        self.configs, self.overrides, self.devices = list(configs), overrides, devices
        self.together = devices[0].platform != "cpu" if execution == "auto" else execution == "together"
        self.varied = varied(configs)
        base = configs[0].copy_and_resolve_references()
        check_numbers(self.varied, base)
        if "model.dropout" in self.varied:
            base.model.dropout = max(self.varied["model.dropout"])  # on, in what is built before members differ
        self.data, self.program, self.base = build(base, overrides, devices[:1])
        for config in self.configs:
            settle_class_weights(config, self.data.class_counts)
        if self.program.frozen:
            raise UserError(f"objective.name={base.objective.name}: looks at a second model, which an ensemble has no place for; "
                            "train each run by itself")
        self.dynamic = [key for key in self.varied if key not in OWN]
        check_traceable(self)
        self.hyper = [self.numbers_of(config) for config in configs]
        # A member's rows are those of its own run: only members of one seed share a batch.
        self.own_batches = "seed" in self.varied
        number = next(n for n in range(min(len(devices), len(configs)), 0, -1) if len(configs) % n == 0)
        self.mesh = Mesh(np.array(devices[: number if self.together else 1]), (MEMBER,))
        self.over_members, self.everywhere = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((MEMBER,), ()))
        self.eval_step = jax.jit(self._over(build_eval_step(self.program.model, self.program.objective), (0, None)))

    def __len__(self) -> int:
        return len(self.configs)

    def numbers_of(self, config) -> dict:
        flat = flatten(config)
        values = {name: flat[key] for key, name in OWN.items()} | {key: flat[key] for key in self.dynamic}
        return {name: np.int32(v) if isinstance(v, int) else np.float32(v) for name, v in values.items()}

    def about(self) -> list[str]:
        how = f"at once, on {self.mesh.size} device{'s' * (self.mesh.size > 1)}" if self.together else "in turn"
        rows = "each on the rows of its own seed" if self.own_batches else "all on the same rows"
        return [f"ensemble: {len(self)} members {how}, {rows}; they differ in {', '.join(self.varied) or 'nothing'}"]

    # ---- The step -----------------------------------------------------------------------------------------------------------

    def member_step(self, keys, reads: set | None = None):
        """The pure step of one member, (state, batch, hyper) -> (state, metrics), with the config's `keys` taken from hyper."""
        if not keys:
            return self.program.train_step
        model, config = self.program.model, self.base._config

        def step(state, batch, hyper):
            # As weakly typed as the numbers of a config are: bfloat16 stays bfloat16.
            values = {key: jax.lax.convert_element_type(hyper[key], float if hyper[key].dtype == jnp.float32 else int)
                      for key in keys}
            dropout = values.pop("model.dropout", None)
            view = View(config, values, reads=reads)
            objective = build_objective(view)
            if dropout is not None:
                objective = with_dropout(objective, dropout)
            optimizer, schedule = build_optimizer(view, model.trained), build_schedule(view)
            return build_train_step(view, model, objective, optimizer, schedule)(state, batch, hyper)

        return step

    def _over(self, function, axes):
        """`function` over the member axis of those arguments whose `axes` is 0, on the devices of the mesh."""
        if not self.together:
            return function
        function = jax.vmap(function, in_axes=axes)
        if self.mesh.size == 1:
            return function
        specs = tuple(PartitionSpec(MEMBER) if axis == 0 else PartitionSpec() for axis in axes)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(MEMBER), check_vma=False)

    def compile(self):
        """-> (step, seconds): step(states, batch) -> (states, metrics), to be read with `read`."""
        began, program = time.time(), self.program
        state, batch, *_ = program.inputs
        hyper = {name: jax.ShapeDtypeStruct((), a.dtype) for name, a in self.hyper[0].items()}
        with target.building_for(self.mesh.devices.flat[0]):
            if not self.together:
                jitted = jax.jit(self.member_step(self.dynamic), donate_argnums=0)
                compiled = jitted.lower(state, batch, hyper).compile(compiler_options=program.compiler_options)
                numbers = [jax.device_put(h, self.devices[0]) for h in self.hyper]

                def in_turn(states, batch):
                    outs = [compiled(state, batch[m] if self.own_batches else batch, numbers[m])
                            for m, state in enumerate(states)]
                    return [state for state, _ in outs], [metrics for _, metrics in outs]

                return in_turn, time.time() - began
            stacked = lambda tree, sharding: jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((len(self), *a.shape), a.dtype, sharding=sharding), tree)
            step = self._over(self.member_step(self.dynamic), (0, 0 if self.own_batches else None, 0))
            batch = stacked(batch, self.over_members) if self.own_batches else jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.everywhere), batch)
            jitted = jax.jit(step, donate_argnums=0, out_shardings=self.over_members)
            lowered = jitted.lower(stacked(state, self.over_members), batch, stacked(hyper, self.over_members))
            compiled = lowered.compile(compiler_options=program.compiler_options)
        numbers = {name: jax.device_put(np.stack([h[name] for h in self.hyper]), self.over_members) for name in hyper}
        return lambda states, batch: compiled(states, batch, numbers), time.time() - began

    def read(self, metrics) -> list[dict]:
        """What `step` gave out, on the host: a dict of numbers for each member."""
        metrics = jax.device_get(metrics)
        if self.together:
            metrics = [{name: a[m] for name, a in metrics.items()} for m in range(len(self))]
        return [{name: a.item() for name, a in of.items()} for of in metrics]

    def evaluate(self, params, batch):
        """-> {name: sums_M} (`build_eval_step`) of one batch on the device, which all members share; params as of `params`."""
        if self.together:
            return self.eval_step(params, batch)
        each = [self.eval_step(of, batch) for of in params]
        return {name: [one[name] for one in each] for name in each[0]}

    def params(self, states):
        """Of states, what is evaluated."""
        of = lambda state: state["ema" if "ema" in state else "params"]
        return of(states) if self.together else [of(state) for state in states]

    # ---- States -------------------------------------------------------------------------------------------------------------

    def init(self):
        """-> the state that each member's own run would begin with, in a list."""
        if "model.init_std" not in self.varied:
            first = jax.jit(self.program.init)
            return [first(int(config.seed)) for config in self.configs]

        def init(seed, std):
            view = View(self.base._config, {"model.init_std": std})
            model = build_model(view, self.data.vocab_size, self.program.backend)
            return build_init(view, model, build_optimizer(view, model.trained))(seed)

        first = jax.jit(init)
        return [first(int(config.seed), config.model.init_std) for config in self.configs]

    def join(self, states: list):
        """A state for each member -> what `step` takes."""
        if not self.together:
            return states
        return jax.tree.map(lambda *leaves: jax.device_put(jnp.stack(leaves), self.over_members), *states)

    def member(self, states, m: int):
        """The state of member `m`, as its own run has it."""
        if not self.together:
            return states[m]
        return jax.tree.map(lambda a: jax.device_put(a[m], self.devices[0]), states)

    def keep(self, states, chosen: list[int]):
        """-> (Members, states) of some alone: a smaller program."""
        members = Members([self.configs[m] for m in chosen], self.overrides, "together" if self.together else "in_turn",
                          self.devices)
        return members, members.join([self.member(states, m) for m in chosen])

    # ---- Batches ------------------------------------------------------------------------------------------------------------

    def batches(self, start: int):
        """Of `step`, from the state after `start` steps on; prepared ahead as a run's are. Close it to end its thread."""
        if not self.own_batches:
            return self.data.train.prefetched(start, self.put)
        of_seed = {config.seed: config for config in self.configs}
        rows = {seed: build_data(config).train for seed, config in of_seed.items()}
        return MemberBatches([rows[config.seed] for config in self.configs], self.together).prefetched(start, self.put)

    def put(self, batch):
        """A batch of the host -> on the devices; one that all members share in full on each."""
        if not self.own_batches or not self.together:
            return self.put_shared(batch)
        return jax.device_put(batch, self.over_members)

    def put_shared(self, batch):
        return jax.device_put(batch, self.everywhere)


class MemberBatches(Batches):
    """The batches of several runs at a step: stacked to (M, B, T), or in a dict by member."""

    def __init__(self, runs: list[Batches], stacked: bool):
        self.runs, self.stacked, self.prefetch = runs, stacked, runs[0].prefetch

    def batch(self, step, rows=None):
        each = [run.batch(step, rows) for run in self.runs]
        return {name: np.stack([of[name] for of in each]) for name in each[0]} if self.stacked else dict(enumerate(each))


def with_dropout(objective, rate):
    """`objective` of a model that drops so much; the model was built with a rate that is not 0."""

    def of_member(model, batch, keys_B=None):
        model.dropout = rate
        return objective(model, batch, keys_B=keys_B)

    return of_member


# ---- What may differ ----------------------------------------------------------------------------------------------------------


def may_differ(key: str, value) -> bool:
    """Whether members of one ensemble may differ in this key, as far as it tells: of the model's numbers, most are built in."""
    if key in OFF_AT_ZERO and value == 0 or key.startswith("model.") and key not in STRUCTURE_TAKES_NUMBER:
        return False
    return key == "seed" or isinstance(value, float)


def check_numbers(differing: dict[str, list], base) -> None:
    """What can be said before anything is built."""
    problems = []
    for key, values in differing.items():
        shown = ", ".join(map(str, list(dict.fromkeys(map(str, values)))[:4]))
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            problems.append(f"{key} differs between members of one ensemble ({shown}) and is no number; put them in groups "
                            "that agree on it")
        elif key in OFF_AT_ZERO and 0 in values:
            problems.append(f"{key} is off (0) in some members of one ensemble and on in others, which is another program; put "
                            "those with 0 in a group of their own")
    for axis in AXES:
        if base.mesh[axis] > 1:
            problems.append(f"mesh.{axis}={base.mesh[axis]}: a member of an ensemble has one device; leave mesh.{axis} out")
    if base.stages:
        problems.append("stages: members of an ensemble have one step for the whole run; train such runs one by one")
    if base.model.from_pretrained:
        problems.append("model.from_pretrained: members of an ensemble start from scratch; train such runs one by one")
    if problems:
        raise UserError(*problems)


def check_traceable(members: Members) -> None:
    """Raises UserError, naming the keys that differ and that the program must know before it runs, or never reads."""
    config = members.base._config
    structure = Tracked(config)
    with target.building_for(members.devices[0]):
        build_model(structure, members.data.vocab_size, choose_backend(structure, target.platform())[0])
    fixed = [key for key in members.dynamic if key == "steps" or key in structure.reads and key not in STRUCTURE_TAKES_NUMBER]
    asked = [key for key in members.dynamic if key not in fixed]
    if asked and not is_traceable(members, asked):
        fixed += [key for key in asked if not is_traceable(members, [key])]
    if fixed:
        values = {key: ", ".join(map(str, dict.fromkeys(members.varied[key]))) for key in fixed}
        raise UserError(*(f"{key} differs between members of one ensemble ({values[key]}), and it changes shapes or the program "
                          "itself, not a number in it; put them in groups that agree on it" for key in fixed))


def is_traceable(members: Members, keys: list[str]) -> bool:
    """Whether the step can be traced with these keys as numbers that it learns only when it runs, and reads them."""
    reads, (state, batch, hyper) = {"model.dropout", "model.init_std"}, members.program.inputs
    types = {int: jnp.int32, float: jnp.float32}
    hyper = hyper | {key: jax.ShapeDtypeStruct((), types[type(members.varied[key][0])]) for key in keys}
    try:
        with target.building_for(members.devices[0]):
            jax.eval_shape(members.member_step(keys, reads), state, batch, hyper)
    except (TypeError, ValueError, IndexError, UserError):  # a tracer where Python needs a number; all of JAX's are among these
        return False
    return reads.issuperset(keys)
