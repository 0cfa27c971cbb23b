"""What each mesh's compiled step sends and how much memory it takes, against stored facts: a change that alters them says so by
writing the file anew, `JAXLM_UPDATE_GOLDEN=1 python -m pytest tests/test_collectives.py`."""

import functools
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
import test_moe
from test_mesh import HYPER, MESHES, build, packed_batch, tiny

from jaxlm.parallel.rules import batch_sharding
from jaxlm.plan.collectives import collectives_of, summary
from jaxlm.train.state import flatten_paths

GOLDEN = pathlib.Path(__file__).parent / "golden" / "meshes.json"
VERSION = f"{jax.__version__} {jax.default_backend()}"  # what the compiler does is its own, version by version


CONFIGS = {name: tiny(**changes) for name, changes in MESHES.items()} | {
    "expert=4,fsdp=2": test_moe.tiny(**test_moe.MESHES["expert=4,fsdp=2"])}


@functools.cache
def compiled(mesh_name):
    c = CONFIGS[mesh_name]
    mesh, model, init, shardings, step = build(c)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), jax.eval_shape(init, 0), shardings)
    rows = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for name, a in packed_batch(c, 0).items()}
    program = step.lower(abstract, batch, HYPER).compile()
    return c, mesh, model, abstract, program, collectives_of(program.as_text(), mesh)


def facts(mesh_name):
    _, _, _, _, program, collectives = compiled(mesh_name)
    memory = program.memory_analysis()
    return {"collectives": summary(collectives), "state_and_batch_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes}


@pytest.mark.parametrize("mesh", CONFIGS)
def test_the_compiled_step_is_the_stored_one(mesh):
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("JAXLM_UPDATE_GOLDEN"):
        stored.setdefault(VERSION, {})[mesh] = facts(mesh)
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    if VERSION not in stored:
        pytest.skip(f"no stored facts for JAX {VERSION}; write them with JAXLM_UPDATE_GOLDEN=1")
    found, wanted = facts(mesh), stored[VERSION][mesh]
    assert found["collectives"] == wanted["collectives"]
    assert found["state_and_batch_bytes"] == wanted["state_and_batch_bytes"]
    assert found["temporary_bytes"] <= 1.02 * wanted["temporary_bytes"]


@pytest.mark.parametrize("mesh", CONFIGS)
def test_nothing_whole_is_gathered(mesh):
    """No gather of a stacked parameter outside the layer loop, no gather of the batch, and no axis but the mesh's own."""
    c, axes, _, _, _, collectives = compiled(mesh)
    used = {name for name, size in axes.shape.items() if size > 1}
    if c.mesh.zero_stage == 3:  # of all f32 arrays only stacked parameters begin with the number of layers
        gathers = [x for x in collectives if x.kind == "all-gather" and not x.in_loop]
        assert not [x for x in gathers if f"f32[{c.model.num_layers}," in x.shape]
    rows = f"[{c.batch_size},{c.seq_len}"
    assert not [x for x in collectives if x.kind == "all-gather" and (f"s32{rows}" in x.shape or f"{rows}," in x.shape)]
    assert {a for x in collectives for a in x.axes} <= used


@pytest.mark.parametrize("mesh", CONFIGS)
def test_no_two_collectives_share_a_channel(mesh):
    """On a CPU those that run at once would take each other's data (see jaxlm.parallel.compile)."""
    channels = re.findall(r"channel_id=(\d+)", compiled(mesh)[4].as_text())
    assert channels and len(set(channels)) == len(channels)


def test_fsdp_memory_is_a_share_plus_one_layer():
    c, _, model, abstract, program, _ = compiled("fsdp=8")
    state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract))
    layer = sum(4 * int(np.prod(s.shape[1:])) for s in flatten_paths(model.specs).values() if s.stacked)
    batch = sum(a.nbytes for a in packed_batch(c, 0).values()) / 8
    assert program.memory_analysis().argument_size_in_bytes <= state / 8 + layer + batch


def test_the_reader_of_hlo():
    text = """HloModule m
%body (p: f32[4]) -> f32[4] {
  %ag = f32[8,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[4,2]T(1,0), dimensions={0}
  %cp = f32[4]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}
%one (p: f32[4]) -> f32[4] {
  %a2a = f32[8]{0} all-to-all(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}
%other (p: f32[4]) -> f32[4] {
  %a2a.1 = f32[16]{0} all-to-all(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %c = f32[4] conditional(%i, %a, %a), branch_computations={%one, %other}
  %w = f32[4] while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %ar = (f32[10]{0}, bf16[2]{0}) all-reduce-start(%b, %c), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %rs = f32[5]{0} reduce-scatter(%b), replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'b'}, dimensions={0}
}
"""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("x", "y", "z"))
    collectives = collectives_of(text, mesh)
    assert [c.sent_bytes for c in collectives if c.kind == "all-to-all"] == [16, 32]
    found = {c.kind: c for c in collectives}
    assert found["all-gather"][1:] == (("y",), "f32[8,16]", 3, 256, True)
    assert found["collective-permute"][1:] == (("z",), "f32[4]", 3, 16, True)
    assert found["all-reduce"][1:] == (("y", "z"), "(f32[10], bf16[2])", 1, 66, False)
    assert found["reduce-scatter"][1:] == (("y",), "f32[5]", 1, 20, False)


def test_a_collective_that_only_starts_counts_its_result():
    """Operands first, then results, then flags; in an async one of a TPU several fusions have the same collective."""
    text = """ENTRY %main (a: f32[8,4]) -> f32[64,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[2]{0} parameter(1)
  %g = ((f32[8,4]{1,0}, bf16[2]{0}), (f32[64,4]{1,0}, bf16[16]{0})) all-gather-start(%a, %b), replica_groups=[1,8]<=[8]
  %p = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %r = f32[8,4]{1,0} all-reduce-start(%a), replica_groups=[1,8]<=[8], to_apply=%add
}"""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 8), ("data", "fsdp"))
    found = summary(collectives_of(text, mesh))
    assert found["all-gather fsdp"]["bytes"] == (64 * 4 * 4 + 16 * 2) * 7 / 8
    assert found["collective-permute fsdp"]["bytes"] == 8 * 4 * 4
    assert found["all-reduce fsdp"]["bytes"] == 2 * 8 * 4 * 4 * 7 / 8
