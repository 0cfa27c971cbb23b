"""A compiled step in a file, for `jaxlm plan --save` and `jaxlm train --executable`.

The file is a line of JSON, which says what it is, and JAX's own serialisation, which is a pickle: load only files of your own.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib

import jax
from jax.experimental import serialize_executable

from jaxlm.errors import UserError

FORMAT = "jaxlm executable 1"


def identity(program, lowered) -> dict:
    """What must be the same where it is loaded. The program itself counts as the compiler was given it, so that any change of
    config or code that alters it is seen, and no other."""
    device = program.mesh.devices.flat[0]
    versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")}
    if device.platform == "tpu":
        versions["libtpu"] = importlib.metadata.version("libtpu")
    return {"format": FORMAT, **versions, "device": device.device_kind, "devices": program.mesh.size,
            "mesh": {axis: n for axis, n in program.mesh.shape.items() if n > 1}, "compiler options": program.compiler_options,
            "step": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]}


def save(path: str, program, executable) -> None:
    """Raises UserError: cannot be written, or this backend cannot serialise."""
    try:
        payload = serialize_executable.serialize(executable)[0]
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"--save={path}: {program.mesh.devices.flat[0].device_kind} programs cannot be kept: {error}") from error
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(json.dumps(identity(program, program.lower())).encode() + b"\n" + payload)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--save={path}: cannot be written ({error.strerror})") from error


def load(path: str, program):
    """-> the executable of `program`. Raises UserError: no such file, or one of another program, version or machine, with what
    differs."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--executable={path}: no such file; jaxlm plan --save={path} makes one")
    head, _, payload = file.read_bytes().partition(b"\n")
    try:
        stored = json.loads(head)
        assert stored["format"] == FORMAT
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"--executable={path}: not a file that jaxlm plan --save made") from None
    here = identity(program, program.lower())
    if differs := [f"{key} {stored.get(key)} there, {here[key]} here" for key in here if stored.get(key) != here[key]]:
        raise UserError(f"--executable={path}: made for another program or machine ({'; '.join(differs)}); make it again with "
                        f"jaxlm plan --save, or leave --executable out")
    in_tree = jax.tree.structure((program.inputs, {}))
    out_tree = jax.tree.structure(jax.eval_shape(program.train_step, *program.inputs))
    return serialize_executable.deserialize_and_load(payload, in_tree, out_tree,
                                                     execution_devices=list(program.mesh.devices.flat))
