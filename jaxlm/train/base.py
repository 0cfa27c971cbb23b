"""What the checkpoints of a run with adapters leave out: the weights of `model.from_pretrained`, which do not train.

They are read there again at each restore. A checkpoint holds their fingerprints, which tell that they are still the same.
"""

from typing import Any, NamedTuple

import jax

from jaxlm.checkpoint.fingerprints import describe, fingerprints
from jaxlm.errors import UserError
from jaxlm.kernels.attention import choose_backend
from jaxlm.parallel import target
from jaxlm.train.pretrained import shared_params, starts_fresh
from jaxlm.train.restore import config_of_run
from jaxlm.train.state import build_model, flatten_paths, without


class Reader(NamedTuple):
    """What `shared_params` asks of a program."""

    model: Any
    mesh: Any
    backend: str


def left_out(config, model) -> set[str]:
    """Paths of the parameters that are not saved."""
    if not (config.model.lora_rank and config.model.from_pretrained):
        return set()
    return {path for path in flatten_paths(model.specs) if path not in flatten_paths(model.trained)
            and not starts_fresh(config, path)}


def describe_base(params: dict, paths: set[str]) -> dict:
    """{"params/embedding": {"shape", "dtype", "fingerprint"}} of these paths, for `Checkpoints`."""
    base = {"params": without(params, set(flatten_paths(params)) - paths)}
    return describe(base, fingerprints(base)) if paths else {}


def read_base(workdir: str, abstract: dict, base: dict, vocab_size: int) -> dict:
    """Those parameters of the run `workdir` that `base` tells of, as `describe_base` does, in the places that `abstract` tells.
    Raises UserError: they are gone, or no longer what they were."""
    config, places = config_of_run(workdir), flatten_paths(abstract)
    folder, others = config.model.from_pretrained, {path for path in places if f"params/{path}" not in base}
    backend, _ = choose_backend(config, target.platform())
    model, mesh = build_model(config, vocab_size, backend), next(iter(places.values())).sharding.mesh
    skipped = others | (set(flatten_paths(model.specs)) - set(places))
    try:
        params, _ = shared_params(Reader(model, mesh, backend), config, skipped)
    except UserError as error:
        raise UserError(f"{workdir}: has adapters of model.from_pretrained={folder} and not its weights, which cannot be read; "
                        "put it back", *error.problems) from error
    params = without(params, others)  # adapters of another run with adapters
    found = describe_base(params, set(flatten_paths(params)))
    if changed := [name for name, leaf in base.items() if name not in found or found[name] != leaf]:
        raise UserError(f"{folder}: is no longer what it was when {workdir} began, which has adapters of it and not its weights "
                        f"({changed[0].removeprefix('params/')} differs); put it back, or use another --workdir")
    return jax.tree.map(lambda array, place: jax.device_put(array, place.sharding), params, without(abstract, others))
