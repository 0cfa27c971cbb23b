"""LoRA adapters in the form of Hugging Face's PEFT, read and written.

    <folder>/adapter_config.json         r, lora_alpha, target_modules; target_parameters: the kernels of routed experts
    <folder>/adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, in) and .lora_B.weight (out, r);
                                         of an embedding .lora_embedding_A (r, V) and .lora_embedding_B (D, r)

transformers keeps a layer's experts as two parameters, mlp.experts.gate_up_proj and .down_proj, and PEFT has one adapter of each:
A (experts * rank, in) and B (out, rank * experts). Gate and up have adapters of their own here, so theirs is written with twice
the rank, A one above the other and B in blocks; one of PEFT's own, whose A they share, is read as the same A for both.
"""

import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.checkpoint.files import sync
from jaxlm.errors import UserError
from jaxlm.huggingface.layout import Layout, sizes_of
from jaxlm.huggingface.mapping import places_of
from jaxlm.huggingface.save import check_free
from jaxlm.huggingface.tensors import Planned, parse_json, read_safetensors, write_file
from jaxlm.models.dense import adapter_scale, add_adapter
from jaxlm.parallel.rules import rules_of_parameters, sharding_of
from jaxlm.train.rundir import write_json
from jaxlm.train.state import ADAPTER, build_model, flatten_paths, is_spec, part_of, without

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EXPERTS = "layers/feedforward/experts"
FUSED = {"mlp.experts.gate_up_proj": ("gate", "up"), "mlp.experts.down_proj": ("down",)}  # in the order in which PEFT wraps them
# Fields of adapter_config.json that would change what the model computes, and the values at which they do not.
PLAIN = {"bias": ("none", None), "use_dora": (False, None), "modules_to_save": (None, []), "layers_to_transform": (None, []),
         "trainable_token_indices": (None, []), "use_qalora": (False, None), "lora_bias": (False, None),
         "exclude_modules": (None, [])}


class Stored(NamedTuple):
    """A tensor of PEFT's."""

    paths: list[str]  # of the adapters that it holds
    shapes: list[tuple[int, ...]]  # that it may have; the first is written
    write: Callable  # {path: numbers} -> its numbers
    read: Callable  # (its numbers, {path: numbers}) -> None; False: they are not what we have


def adapter_of(path: str) -> str:
    """Of a kernel or the embedding."""
    return "embedding_adapter" if path == "embedding" else path.removesuffix("/kernel")


def module_of(path: str) -> str:
    """As `model.lora_modules` names it."""
    if path == "embedding":
        return path
    *parent, leaf = path.removesuffix("/kernel").split("/")[-2:]
    names = {"cross": "attention", "shared": "feedforward", "experts": "feedforward.experts"}
    return ".".join([*(names.get(name, name) for name in parent), leaf])


def tensors(family, model, config) -> dict[str, Stored]:
    """{name of the PEFT tensor: Stored}. Raises UserError: an adapter that PEFT has no form for."""
    specs, out, m = flatten_paths(model.specs), {}, config.model
    base = {path: spec for path, spec in specs.items() if not re.fullmatch(ADAPTER, path)}
    places = places_of(family, base, config, specs["embedding"].shape[0])
    texts = {path: text for t in family.tensors for path, text in t.parts
             if path in places and places[path].name.endswith(t.name)}
    sizes = sizes_of(config, specs["embedding"].shape[0]) | {"R": m.lora_rank}
    for path, place in places.items():
        module = adapter_of(path)
        if f"{module}/lora_a" not in specs or path.startswith(EXPERTS):
            continue
        if sum((other.name, other.first_layer) == (place.name, place.first_layer) for other in places.values()) > 1:
            raise UserError(f"{module}: {family.model_type} has it in one tensor with others ({place.name}), which PEFT "
                            "adapts as one; merge the adapters instead (without --adapter)")
        if path == "embedding" and m.family != "decoder":
            raise UserError("embedding: an encoder and a decoder look it up by modules of their own, which PEFT adapts by "
                            "themselves; merge the adapters instead (without --adapter)")
        if "/feedforward/" in path and m.feedforward == "moe":
            raise UserError(f"{module}: PEFT takes a feed-forward of this name for the routed experts; merge the adapters "
                            "instead (without --adapter)")
        letters = re.findall(r"\w", texts[path].partition("->")[2])
        inputs = letters[: base[path].num_inputs] or letters[:1]  # of an embedding, the words
        outputs = letters[len(inputs) :]
        there = lambda letters, text=texts[path]: " ".join(c + "~" * (f"{c}~" in text) for c in letters)
        layouts = {"lora_a": Layout(f"R ({there(inputs)}) -> {' '.join(inputs)} R", sizes),
                   "lora_b": Layout(f"({there(outputs)}) R -> R {' '.join(outputs)}", sizes)}
        for index in np.ndindex(*specs[path].shape[: place.num_named]):
            name = PREFIX + place.name_of(index).removesuffix("weight")
            for part, layout in layouts.items():
                letter = part[-1].upper()
                ending = f"lora_embedding_{letter}" if path == "embedding" else f"lora_{letter}.weight"
                out[name + ending] = stored(f"{module}/{part}", index, layout)
    return out | expert_tensors(family, specs, m)


def stored(path: str, index: tuple, layout: Layout) -> Stored:
    shape = layout.joined(layout.axes)

    def read(numbers, arrays):
        layout.as_there(arrays[path][index])[layout.places] = numbers.reshape(layout.axes)

    return Stored([path], [shape], lambda arrays: layout.to_there(arrays[path][index]).reshape(shape), read)


def expert_tensors(family, specs: dict, m) -> dict[str, Stored]:
    adapted = {name: [part for part in parts if f"{EXPERTS}/{part}/lora_a" in specs] for name, parts in FUSED.items()}
    adapted = {name: parts for name, parts in adapted.items() if parts}
    apart = any(f"{EXPERTS}/gate/kernel" == t.parts[0][0] and len(t.parts) == 1 for t in family.tensors)
    out = {}
    for name, parts in adapted.items():
        halves = (slice(0, m.mlp_dim), slice(m.mlp_dim, None)) if apart else (slice(0, None, 2), slice(1, None, 2))
        rows = {"down": slice(None)} if parts == ["down"] else dict(zip(("gate", "up"), halves, strict=True))
        inner = ".base_layer" if len(adapted) > 1 and name == next(iter(adapted)) else ""
        for layer in range(m.num_layers - m.first_dense_layers):
            module = f"{PREFIX}{family.prefix}layers.{layer + m.first_dense_layers}.mlp.experts{inner}"
            out[f"{module}.lora_A.weight"], out[f"{module}.lora_B.weight"] = fused(specs, parts, rows, layer)
    return out


def fused(specs: dict, parts: list[str], rows: dict[str, slice], layer: int) -> tuple[Stored, Stored]:
    """A and B of a layer's `parts`; rows: of B, which are those of each part."""
    path = lambda part, letter: f"{EXPERTS}/{part}/lora_{letter}"
    _, E, inputs, R = specs[path(parts[0], "a")].shape
    outputs, ranks = specs[path(parts[0], "b")].shape[-1] * len(rows), list(dict.fromkeys((len(parts) * R, R)))

    def write_a(arrays):
        return np.concatenate([arrays[path(p, "a")][layer].swapaxes(1, 2) for p in parts], axis=1).reshape(-1, inputs)

    def read_a(numbers, arrays):
        """Blocks of rows for the parts; or the same for each."""
        a = numbers.reshape(E, -1, R, inputs)
        for i, p in enumerate(parts):
            arrays[path(p, "a")][layer] = a[:, i % a.shape[1]].swapaxes(1, 2)

    def write_b(arrays):
        out = np.zeros((outputs, len(parts), R, E), np.float32)
        for i, p in enumerate(parts):
            out[rows[p], i] = arrays[path(p, "b")][layer].transpose(2, 1, 0)
        return out.reshape(outputs, -1)

    def read_b(numbers, arrays):
        b = numbers.reshape(outputs, -1, R, E)
        for i, p in enumerate(parts):
            arrays[path(p, "b")][layer] = b[rows[p], i % b.shape[1]].transpose(2, 1, 0)
        return b.shape[1] == 1 or np.array_equal(write_b(arrays), numbers)

    return (Stored([path(p, "a") for p in parts], [(E * rank, inputs) for rank in ranks], write_a, read_a),
            Stored([path(p, "b") for p in parts], [(outputs, rank * E) for rank in ranks], write_b, read_b))


def modules_there(family) -> dict[str, str]:
    """{name of a module there, in its layer: its name here}: {"self_attn.q_proj": "attention.query"}."""
    return {re.sub(r".*\{layer\}\.", "", tensor.name).removesuffix(".weight"): module_of(path)
            for tensor in family.tensors for path, _ in tensor.parts
            if path == "embedding" or path.endswith("/kernel") and "/router/" not in path and not path.startswith(EXPERTS)}


def matches(target: str, name: str) -> bool:
    """Whether one of PEFT's targets means that module or parameter, or those of one layer."""
    return f".{name}".endswith(f".{target}") or f".{target}".endswith(f".{name}")


def apply_adapter(config, family) -> None:
    """Set the lora keys to what the adapter of `model.adapter` is, in place. Raises UserError: it is of another kind."""
    folder = pathlib.Path(config.model.adapter)
    values = parse_json(folder / CONFIG)
    problems = [f"{folder / CONFIG}: {field}={values[field]!r} is not implemented" for field, plain in PLAIN.items()
                if field in values and values[field] not in plain]
    if values.get("peft_type") != "LORA":
        problems.append(f"{folder / CONFIG}: peft_type={values.get('peft_type')!r}; LORA is read")
    here, targets, parameters = modules_there(family), values.get("target_modules") or [], values.get("target_parameters") or []
    if isinstance(targets, str):
        modules = [module for name, module in here.items() if re.fullmatch(targets, f"{family.prefix}layers.0.{name}")
                   or re.fullmatch(targets, name.rpartition(".")[2])]
    else:
        modules = [module for target in targets for name, module in here.items() if matches(target, name)]
        problems += [f"{folder / CONFIG}: target_modules has {target}, {family.model_type} has {', '.join(here)}"
                     for target in targets if not any(matches(target, name) for name in here)]
    has_experts = any(path.startswith(EXPERTS) for tensor in family.tensors for path, _ in tensor.parts)
    for parameter in parameters:
        parts = [part for name, parts in FUSED.items() if has_experts and matches(parameter, name) for part in parts]
        modules += [f"feedforward.experts.{part}" for part in parts]
        if not parts:
            problems.append(f"{folder / CONFIG}: target_parameters has {parameter}; those of routed experts are read, "
                            f"{' and '.join(FUSED)}")
    if problems or not modules:
        raise UserError(*(problems or [f"{folder / CONFIG}: target_modules={targets!r} names no module of {family.model_type}"]))
    rank = int(values["r"])
    scale = lambda alpha, rank: alpha / (rank**0.5 if values.get("use_rslora") else rank)
    config.model.lora_rank = rank
    config.model.lora_alpha = float(values["lora_alpha"]) * (rank**0.5 if values.get("use_rslora") else 1)
    config.model.lora_modules = "|".join(sorted({re.escape(module) for module in modules}))
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    for name in {**ranks, **alphas}:
        other = scale(alphas.get(name, values["lora_alpha"]), ranks.get(name, rank))
        if not name.endswith("gate_up_proj") or not np.isclose(other, adapter_scale(config.model), rtol=1e-6):
            raise UserError(f"{folder / CONFIG}: rank_pattern or alpha_pattern has {name}; here all modules have one rank and "
                            "one scale, but for gate_up_proj of twice the rank")


def read_adapter(config, model, mesh, family, params) -> dict:
    """-> the adapters, a part of the parameters. params: those that they adapt. Raises UserError: tensors that are missing,
    unknown or misshapen, or an embedding or head beside them that is not that of `params`."""
    file = pathlib.Path(config.model.adapter, WEIGHTS)
    if not file.is_file():
        raise UserError(f"{file}: is not there; give the folder of an adapter in PEFT's form, with safetensors")
    found, wanted = read_safetensors(file), tensors(family, model, config)
    check_beside(file, found, family, config, params)
    problems = [f"{file}: {name} is missing" for name in wanted if name not in found]
    problems += [f"{file}: {name} is unknown" for name in found if name not in wanted]
    problems += [f"{file}: {name} is {t.shape}, the model asks for {wanted[name].shapes[0]}" for name, t in found.items()
                 if name in wanted and t.shape not in wanted[name].shapes]
    if problems:
        raise UserError(*problems[:20])
    specs = flatten_paths(model.specs)
    arrays = {path: np.empty(specs[path].shape, np.float32) for tensor in wanted.values() for path in tensor.paths}
    for name, tensor in wanted.items():
        if tensor.read(found[name].rows(0, found[name].shape[0]).astype(np.float32), arrays) is False:
            raise UserError(f"{file}: {name} has twice the rank and mixes gate and up, which have adapters of their own here")
    rules, tree = rules_of_parameters(config.mesh.zero_stage), without(model.specs, set(specs) - set(arrays))
    place = lambda path, spec: jax.device_put(arrays[jax.tree_util.keystr(path, simple=True, separator="/")],
                                              sharding_of(mesh, spec.axes, spec.shape, rules))
    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_spec)


def check_beside(file, found: dict, family, config, params) -> None:
    """PEFT puts the embedding and the head themselves beside their adapters: taken out of `found` where they are those that the
    run starts with."""
    arrays = flatten_paths(params)
    for path, place in places_of(family, {p: a for p, a in arrays.items() if not re.fullmatch(ADAPTER, p)}, config,
                                 arrays["embedding"].shape[0]).items():
        name = PREFIX + place.name.removesuffix("weight") + "base_layer.weight"
        if path in ("embedding", "head/kernel") and name in found:
            tensor = found.pop(name)
            mine = np.asarray(place.layout.to_there(np.asarray(arrays[path])), np.float32)
            if tensor.shape != mine.shape or not np.array_equal(tensor.rows(0, tensor.shape[0]).astype(np.float32), mine):
                raise UserError(f"{file}: {name} is not the {path} that the run starts with; merge the adapter with PEFT first, "
                                "and start with what comes out")


def save_adapter(folder: str, family, config, model, params, base: str) -> None:
    """base: the folder of the model that they adapt. Raises UserError: no adapters, the folder is taken, or the disk is full."""
    m = config.model
    if not m.lora_rank:
        raise UserError("--adapter: the run has no adapters; train it with --config.model.lora_rank=8, or leave --adapter out")
    wanted, specs = tensors(family, model, config), flatten_paths(model.specs)
    arrays = {path: np.asarray(array, np.float32) for path, array in flatten_paths(params).items() if re.fullmatch(ADAPTER, path)}
    there = modules_there(family)
    last = [name.rpartition(".")[2] for name in there]
    adapted = {module_of(path) for path in specs if f"{adapter_of(path)}/lora_a" in specs}
    experts = {name: [p for p in parts if f"feedforward.experts.{p}" in adapted] for name, parts in FUSED.items()}
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": m.lora_rank,
              "lora_alpha": m.lora_alpha, "lora_dropout": 0.0,
              "target_modules": sorted(name if last.count(end) > 1 else end  # as much as tells it from others
                                       for (name, module), end in zip(there.items(), last, strict=True) if module in adapted),
              "target_parameters": [name for name, parts in experts.items() if parts] or None,
              "rank_pattern": {name: len(parts) * m.lora_rank for name, parts in experts.items() if len(parts) > 1},
              "alpha_pattern": {name: len(parts) * m.lora_alpha for name, parts in experts.items() if len(parts) > 1},
              "bias": "none", "inference_mode": True, "fan_in_fan_out": family.model_type == "gpt2"}
    planned = [Planned(name, np.dtype(np.float32), tensor.shapes[0], lambda tensor=tensor: tensor.write(arrays))
               for name, tensor in wanted.items()]
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
    specs, scale = flatten_paths(model.specs), adapter_scale(config.model)
    merged = flatten_paths(params)
    for name in (n for n in names if n.endswith("/lora_a")):
        module = name.removesuffix("/lora_a")
        kernel = "embedding" if module == "embedding_adapter" else f"{module}/kernel"
        add = lambda kernel, a, b: add_adapter(kernel, a, b, scale)
        for _ in range(specs[name].num_stacked):
            add = jax.vmap(add)
        merged[kernel] = jax.jit(add)(*(merged[path] for path in (kernel, f"{module}/lora_a", f"{module}/lora_b")))
    base = build_model(plain, specs["embedding"].shape[0], "plain")
    leaves, tree = jax.tree_util.tree_flatten_with_path(part_of(params, base.specs))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return plain, base, tree.unflatten([merged[name(path)] for path, _ in leaves])
