"""LoRA adapters in the form of Hugging Face's PEFT, read and written.

    <folder>/adapter_config.json         r, lora_alpha, target_modules
    <folder>/adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight (out, r)
"""

import itertools
import os
import pathlib
import re
import shutil

import jax
import numpy as np

from jaxlm.checkpoint.files import sync
from jaxlm.errors import UserError
from jaxlm.huggingface.layout import Layout, sizes_of
from jaxlm.huggingface.save import check_free
from jaxlm.huggingface.tensors import Planned, parse_json, read_safetensors, write_file
from jaxlm.models.dense import add_adapter
from jaxlm.parallel.rules import rules_of_parameters, sharding_of
from jaxlm.train.rundir import write_json
from jaxlm.train.state import build_model, flatten_paths, is_spec, part_of, without

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields of adapter_config.json that would change what the model computes, and the values at which they do not.
PLAIN = {"bias": ("none", None), "use_dora": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
         "alpha_pattern": ({}, None), "layers_to_transform": (None, []), "trainable_token_indices": (None, []),
         "use_qalora": (False, None), "lora_bias": (False, None), "target_parameters": (None, []), "exclude_modules": (None, [])}


def tensors(family, model, config) -> dict:
    """{name of the PEFT tensor: (path of ours, index in its stacked axes, Layout)}. Raises UserError: an adapter of a parameter
    that shares its tensor with others, which PEFT would adapt together."""
    specs, out = flatten_paths(model.specs), {}
    sizes = sizes_of(config, config.model.vocab_size) | {"R": config.model.lora_rank}
    for tensor in family.tensors:
        for path, text in tensor.parts:
            module = path.removesuffix("/kernel")
            if f"{module}/lora_a" not in specs:
                continue
            if len(tensor.parts) > 1:
                raise UserError(f"{module}: {family.model_type} has it in one tensor with others ({tensor.name}), which PEFT "
                                "adapts as one; merge the adapters instead (without --adapter)")
            spec, letters = specs[path], re.findall(r"\w", text.partition("->")[2])
            inputs, outputs = letters[: spec.num_inputs], letters[spec.num_inputs :]
            there = lambda letters, text=text: " ".join(c + "~" * (f"{c}~" in text) for c in letters)
            layouts = {"lora_a": Layout(f"R ({there(inputs)}) -> {' '.join(inputs)} R", sizes),
                       "lora_b": Layout(f"({there(outputs)}) R -> R {' '.join(outputs)}", sizes)}
            for index in itertools.product(*(range(n) for n in spec.shape[: spec.num_stacked])):
                prefix = PREFIX + ("" if family.is_outside(tensor.name) else family.prefix)
                name = prefix + tensor.name.format(**dict(zip(("layer", "expert"), index, strict=False)))
                for part, layout in layouts.items():
                    letter = part[-1].upper()
                    out[name.removesuffix("weight") + f"lora_{letter}.weight"] = (f"{module}/{part}", index, layout)
    return out


def shape_there(layout: Layout) -> tuple[int, ...]:
    return layout.joined(layout.axes)


def module_names(family) -> dict[str, str]:
    """{last part of the module's name there: its name here}: {"q_proj": "attention.query"}."""
    found = {}
    for tensor in family.tensors:
        for path, _ in tensor.parts:
            if path.endswith("/kernel") and path.startswith("layers/"):
                found[tensor.name.removesuffix(".weight").rpartition(".")[2]] = ".".join(path.split("/")[1:-1])
    return found


def apply_adapter(config, family) -> None:
    """Set the lora keys to what the adapter of `model.adapter` is, in place. Raises UserError: it is of another kind."""
    folder = pathlib.Path(config.model.adapter)
    values = parse_json(folder / CONFIG)
    problems = [f"{folder / CONFIG}: {field}={values[field]!r} is not implemented" for field, plain in PLAIN.items()
                if field in values and values[field] not in plain]
    if values.get("peft_type") != "LORA":
        problems.append(f"{folder / CONFIG}: peft_type={values.get('peft_type')!r}; LORA is read")
    here, targets = module_names(family), values.get("target_modules") or []
    names = [name for name in here if re.fullmatch(targets, name)] if isinstance(targets, str) else targets
    problems += [f"{folder / CONFIG}: target_modules has {name}, {family.model_type} has {', '.join(here)}" for name in names
                 if name not in here]
    if problems or not names:
        raise UserError(*(problems or [f"{folder / CONFIG}: target_modules={targets!r} names no module of {family.model_type}"]))
    rank, alpha = int(values["r"]), float(values["lora_alpha"])
    config.model.lora_rank = rank
    config.model.lora_alpha = alpha * rank**0.5 if values.get("use_rslora") else alpha
    config.model.lora_modules = "|".join(sorted(re.escape(here[name]) for name in names))


def read_adapter(config, model, mesh, family) -> dict:
    """-> the adapters, a part of the parameters. Raises UserError: tensors that are missing, unknown or misshapen."""
    file = pathlib.Path(config.model.adapter, WEIGHTS)
    if not file.is_file():
        raise UserError(f"{file}: is not there; give the folder of an adapter in PEFT's form, with safetensors")
    found, wanted = read_safetensors(file), tensors(family, model, config)
    problems = [f"{file}: {name} is missing" for name in wanted if name not in found]
    problems += [f"{file}: {name} is unknown" for name in found if name not in wanted]
    problems += [f"{file}: {name} is {t.shape}, the model asks for {shape_there(wanted[name][2])}" for name, t in found.items()
                 if name in wanted and t.shape != shape_there(wanted[name][2])]
    if problems:
        raise UserError(*problems[:20])
    specs = flatten_paths(model.specs)
    arrays = {path: np.empty(specs[path].shape, np.float32) for path, _, _ in wanted.values()}
    for name, (path, index, layout) in wanted.items():
        numbers = found[name].rows(0, found[name].shape[0]).astype(np.float32)
        layout.as_there(arrays[path][index])[layout.places] = numbers.reshape(layout.axes)
    rules, tree = rules_of_parameters(config.mesh.zero_stage), without(model.specs, set(specs) - set(arrays))
    place = lambda path, spec: jax.device_put(arrays[jax.tree_util.keystr(path, simple=True, separator="/")],
                                              sharding_of(mesh, spec.axes, spec.shape, rules))
    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_spec)


def save_adapter(folder: str, family, config, model, params, base: str) -> None:
    """base: the folder of the model that they adapt. Raises UserError: no adapters, the folder is taken, or the disk is full."""
    if not config.model.lora_rank:
        raise UserError("--adapter: the run has no adapters; train it with --config.model.lora_rank=8, or leave --adapter out")
    wanted, arrays = tensors(family, model, config), flatten_paths(params)
    here = {name: there for there, name in module_names(family).items()}
    adapted = sorted({".".join(path.split("/")[1:-1]) for path, _, _ in wanted.values()})
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.model.lora_rank,
              "lora_alpha": config.model.lora_alpha, "lora_dropout": 0.0, "target_modules": [here[name] for name in adapted],
              "bias": "none", "inference_mode": True, "fan_in_fan_out": family.model_type == "gpt2"}
    numbers = lambda path, index, layout: layout.to_there(np.asarray(arrays[path][index], np.float32))
    planned = [Planned(name, np.dtype(np.float32), shape_there(place[2]), lambda place=place: numbers(*place))
               for name, place in wanted.items()]
    target = pathlib.Path(os.path.abspath(folder))
    check_free(folder, target)
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_file(temporary / WEIGHTS, planned, threads=1)
        write_json(temporary / CONFIG, values)
        for path in temporary.iterdir():
            sync(path)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"--to={folder}: writing failed ({error.strerror}); free space or choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merge_adapters(config, model, params):
    """-> (config of the model without adapters, that model, its parameters, to whose kernels they are added)."""
    names = {name for name in flatten_paths(model.specs) if name.endswith(("/lora_a", "/lora_b"))}
    if not names:
        return config, model, params
    plain = config.copy_and_resolve_references()
    plain.model.lora_rank, plain.optimizer.freeze = 0, ""
    specs, scale = flatten_paths(model.specs), config.model.lora_alpha / config.model.lora_rank
    merged = flatten_paths(params)
    for name in (n for n in names if n.endswith("/lora_a")):
        module = name.removesuffix("/lora_a")
        add = lambda kernel, a, b: add_adapter(kernel, a, b, scale)
        for _ in range(specs[name].num_stacked):
            add = jax.vmap(add)
        merged[f"{module}/kernel"] = jax.jit(add)(*(merged[f"{module}/{part}"] for part in ("kernel", "lora_a", "lora_b")))
    base = build_model(plain, specs["embedding"].shape[0], "plain")
    leaves, tree = jax.tree_util.tree_flatten_with_path(part_of(params, base.specs))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return plain, base, tree.unflatten([merged[name(path)] for path, _ in leaves])
