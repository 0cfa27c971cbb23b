import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.checkpoint.chunks import StepWriter
from jaxlm.checkpoint.fingerprints import fingerprint_of, fingerprints
from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.errors import UserError

STATE = {"step": jnp.int32(1), "params": {"a": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones(5, jnp.bfloat16) / 3},
         "opt_state": {"mu": {"a": jnp.full((8, 4), 0.1)}}}


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def saved(tmp_path, steps=(1, 2), **kw):
    checkpoints = Checkpoints(str(tmp_path / "c"), **{"keep": 2, "keep_every": 0, "keep_best": False, **kw})
    for step in steps:
        checkpoints.save(step, {**STATE, "step": jnp.int32(step)}, {"loss": abs(step - 3.0)}, {"note": step})
    checkpoints.wait()
    return checkpoints


def test_round_trip_is_bitwise_also_onto_another_mesh(tmp_path):
    checkpoints = saved(tmp_path)
    step, state, meta = checkpoints.restore(abstract(STATE))
    assert step == 2 and int(state["step"]) == 2 and meta["note"] == 2
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    other = checkpoints.restore(abstract(STATE, replicated))[1]
    for tree in (state, other):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), tree["params"], STATE["params"])
    params = checkpoints.restore_params(abstract(STATE["params"]))
    np.testing.assert_array_equal(params["b"], STATE["params"]["b"])


def test_retention(tmp_path):
    checkpoints = saved(tmp_path, steps=range(1, 8), keep_every=2, keep_best=True)
    assert checkpoints.steps() == [2, 3, 4, 6, 7]


def test_another_model_is_refused(tmp_path):
    checkpoints = saved(tmp_path)
    wrong = abstract({**STATE, "params": {"a": jnp.zeros((8, 5)), "c": jnp.zeros(3)}})
    with pytest.raises(UserError, match="params/c is missing") as error:
        checkpoints.restore(wrong)
    assert "params/b is not in this model" in str(error.value) and "another --workdir" in str(error.value)
    cast = abstract({**STATE, "params": {**STATE["params"], "a": jnp.zeros((8, 4), jnp.bfloat16)}})
    with pytest.raises(UserError, match="float32"):
        checkpoints.restore(cast)


def write_in_parts(directory, step: int, params: dict) -> None:
    """As `jaxlm convert` does: here row by row, the last one first."""
    writer, leaves = StepWriter(directory, step), {}
    for name, array in params.items():
        array, mark = np.asarray(array), 0
        leaf = writer.leaf(("params", name), array.shape, array.dtype)
        for at in range(len(array))[::-1] if array.ndim else [...]:
            leaf.write(array[at], 0 if at is ... else at * array[at].nbytes)
            starts = () if at is ... else (at, *[0] * (array.ndim - 1))
            mark += fingerprint_of(array[at if at is ... else slice(at, at + 1)], starts)
        leaf.sync()
        leaves[f"params/{name}"] = {"shape": list(array.shape), "dtype": str(array.dtype), "fingerprint": mark % 2**32}
    writer.publish({"step": step, "leaves": leaves})


PLAIN = STATE["params"] | {"c": jnp.float32(3), "d": jnp.array([True, False, True]), "e": jnp.arange(24.0).reshape(2, 3, 4)}


@pytest.mark.parametrize("chunk_bytes", [2**30, 16, 1])
def test_a_checkpoint_that_was_written_in_parts_is_orbaxs_too(tmp_path, monkeypatch, chunk_bytes):
    """Of one chunk for each leaf or of several, whatever the fingerprints were made of."""
    monkeypatch.setattr("jaxlm.checkpoint.chunks.CHUNK_BYTES", chunk_bytes)
    (tmp_path / "c").mkdir()
    write_in_parts(tmp_path / "c", 5, PLAIN)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["5"]
    assert len(list((tmp_path / "c" / "5" / "state" / "params.a").glob("?.?"))) == (1 if chunk_bytes == 2**30 else 8)
    for frugal in (False, True):
        params = Checkpoints(str(tmp_path / "c"), 2, 0, False, frugal=frugal).restore_params(abstract(PLAIN))
        jax.tree.map(np.testing.assert_array_equal, params, PLAIN)
    assert fingerprints(PLAIN) == fingerprints(PLAIN, frugal=True)
    checkpoints = saved(tmp_path, steps=(6, 7))
    assert checkpoints.steps() == [6, 7], "it counts as one of them"


def test_a_frugal_restore_takes_a_chunk_as_it_is(tmp_path, monkeypatch, capsys):
    """Without Orbax, and its fingerprint is looked at."""
    import orbax.checkpoint as ocp

    (tmp_path / "c").mkdir()
    for step in (1, 2):
        write_in_parts(tmp_path / "c", step, STATE["params"])
    reader = Checkpoints(str(tmp_path / "c"), 2, 0, False, create=False, frugal=True)
    over_devices = NamedSharding(Mesh(np.array(jax.devices()).reshape(8), ("data",)), PartitionSpec("data"))
    with monkeypatch.context() as patch:
        patch.delattr(ocp.PyTreeCheckpointHandler, "restore")
        for sharding in (None, over_devices):
            params = reader.restore_params({"a": abstract(STATE["params"]["a"], sharding), "b": abstract(STATE["params"]["b"])})
            jax.tree.map(np.testing.assert_array_equal, params, STATE["params"])
            assert params["a"].sharding == sharding or sharding is None
        chunk = tmp_path / "c" / "2" / "state" / "params.a" / "0.0"
        numbers = bytearray(chunk.read_bytes())
        numbers[7] ^= 1
        chunk.write_bytes(numbers)
        jax.tree.map(np.testing.assert_array_equal, reader.restore_params(abstract(STATE["params"])), STATE["params"])
        assert "checkpoint 2 is damaged (the numbers of params/a" in capsys.readouterr().err


def damage(folder, how):
    files = sorted((f for f in folder.rglob("*") if f.is_file() and f.parent.name == "d"), key=lambda f: f.stat().st_size)
    if how == "delete":
        for f in files:
            f.unlink()
        return
    changed = 0
    for f in files:  # Orbax compresses small arrays, so flip a bit in the middle of each data file
        raw = bytearray(f.read_bytes())
        raw[len(raw) // 2] ^= 4
        f.write_bytes(bytes(raw))
        changed += 1
    assert changed


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_damaged_newest_is_kept_aside_and_the_one_before_used(tmp_path, capsys, how):
    checkpoints = saved(tmp_path)
    damage(tmp_path / "c" / "2", how)
    step, state, _ = checkpoints.restore(abstract(STATE))
    assert step == 1 and "checkpoint 2 is damaged" in capsys.readouterr().err
    assert (tmp_path / "c_damaged" / "2").is_dir() and checkpoints.steps() == [1]
    np.testing.assert_array_equal(state["params"]["a"], STATE["params"]["a"])


def test_wrong_numbers_without_any_error_from_orbax_are_found(tmp_path):
    checkpoints = saved(tmp_path)
    meta = pathlib.Path(tmp_path, "c", "2", "meta", "metadata")
    text = meta.read_text()
    stored = json.loads(text)
    stored["leaves"]["params/a"]["fingerprint"] ^= 1
    meta.write_text(json.dumps(stored))
    assert checkpoints.restore(abstract(STATE))[0] == 1


def test_a_changed_number_that_orbax_restores_without_complaint_is_found(tmp_path, capsys):
    import orbax.checkpoint as ocp

    checkpoints = saved(tmp_path)
    checkpoints.close()
    folder = tmp_path / "c" / "2" / "state"
    tree = ocp.PyTreeCheckpointer().restore(folder)
    tree["params"]["a"] = np.array(tree["params"]["a"])
    tree["params"]["a"][3, 1] = np.nextafter(tree["params"]["a"][3, 1], np.float32(np.inf))  # its last bit
    shutil.rmtree(folder)
    ocp.PyTreeCheckpointer().save(folder, tree)
    whole = ocp.PyTreeCheckpointer().restore(folder)
    np.testing.assert_array_equal(whole["params"]["a"], tree["params"]["a"])  # Orbax sees nothing wrong
    assert saved(tmp_path, steps=()).restore(abstract(STATE))[0] == 1
    assert "the numbers of params/a are not those that were saved" in capsys.readouterr().err


def test_what_one_mesh_saved_sharded_another_restores_sharded(tmp_path):
    devices = np.array(jax.devices())
    fsdp = NamedSharding(Mesh(devices.reshape(8), ("fsdp",)), PartitionSpec("fsdp"))
    both = NamedSharding(Mesh(devices.reshape(4, 2), ("fsdp", "tensor")), PartitionSpec("fsdp", "tensor"))
    values = {"params": {"a": jnp.arange(32.0 * 6).reshape(32, 6)}}
    checkpoints = Checkpoints(str(tmp_path / "c"), 1, 0, False)
    checkpoints.save(1, jax.device_put(values, fsdp), None, {})
    checkpoints.wait()
    restored = checkpoints.restore(abstract(values, both))[1]["params"]["a"]
    assert restored.sharding == both and {s.data.shape for s in restored.addressable_shards} == {(8, 3)}
    np.testing.assert_array_equal(restored, values["params"]["a"])


def test_a_disk_that_cannot_take_a_checkpoint_is_found_at_the_start(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be written"):  # exists, and takes no files from anyone
        Checkpoints("/proc/self/fdinfo", 1, 0, False)
    checkpoints = Checkpoints(str(tmp_path / "c"), 1, 0, False)
    checkpoints.require_room(abstract(STATE))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="are free"):
        checkpoints.require_room(abstract(STATE))


def test_nothing_left(tmp_path):
    checkpoints = saved(tmp_path, steps=(1,))
    damage(tmp_path / "c" / "1", "delete")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoints.restore(abstract(STATE))


def test_a_kill_during_a_save_leaves_the_last_good_one(tmp_path):
    script = f"""
import os, signal, jax.numpy as jnp
from jaxlm.checkpoint.manager import Checkpoints
state = {{"params": {{"a": jnp.ones((3000, 1000))}}}}
checkpoints = Checkpoints({str(tmp_path / "c")!r}, 3, 0, False)
checkpoints.save(1, state, None, {{}})
checkpoints.wait()
rename = os.rename
def kill_before_the_last_rename(source, target, **kw):  # which is what makes a save whole
    if os.path.basename(os.fspath(target)) == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, **kw)
os.rename = os.replace = kill_before_the_last_rename
checkpoints.save(2, state, None, {{}})
checkpoints.wait()
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", script], env=env, timeout=120).returncode == -signal.SIGKILL
    assert any(p.name.startswith("2.") for p in (tmp_path / "c").iterdir())  # all of it but its name
    checkpoints = Checkpoints(str(tmp_path / "c"), 3, 0, False)
    assert checkpoints.steps() == [1]
    step, state, _ = checkpoints.restore(abstract({"params": {"a": jnp.ones((3000, 1000))}}))
    assert step == 1 and (np.asarray(state["params"]["a"]) == 1).all()
    checkpoints.save(2, state, None, {})
    checkpoints.wait()
    assert checkpoints.latest() == 2


def test_a_reader_leaves_a_live_run_alone(tmp_path, capsys):
    saved(tmp_path)
    damage(tmp_path / "c" / "2", "delete")  # as a save that is still being written looks
    unfinished = tmp_path / "c" / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = Checkpoints(str(tmp_path / "c"), 2, 0, False, create=False)
    reader.restore_params(abstract(STATE["params"]))
    assert "left where it is" in capsys.readouterr().err
    assert unfinished.is_dir() and reader.steps() == [1, 2] and not (tmp_path / "c_damaged").exists()


@pytest.mark.parametrize("error", [MemoryError(), ImportError("x"), ValueError("RESOURCE_EXHAUSTED: out of memory")])
def test_trouble_of_the_machine_is_not_damage(tmp_path, monkeypatch, error):
    checkpoints = saved(tmp_path)
    monkeypatch.setattr(Checkpoints, "_read", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        checkpoints.restore(abstract(STATE))
    assert checkpoints.steps() == [1, 2] and not (tmp_path / "c_damaged").exists()


def test_nothing_is_moved_when_none_is_whole(tmp_path):
    checkpoints = saved(tmp_path)
    for step in ("1", "2"):
        damage(tmp_path / "c" / step, "delete")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoints.restore(abstract(STATE))
    assert checkpoints.steps() == [1, 2]


def test_best_is_kept_across_a_restart_and_only_evaluated_steps_can_be_best(tmp_path):
    checkpoints = saved(tmp_path, steps=(1,), keep=1, keep_best=True)
    checkpoints.save(2, STATE, {"loss": 0.5}, {})
    checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(str(tmp_path / "c"), 1, 0, True)
    for step, metrics in ((3, None), (4, {"loss": 0.9}), (5, None), (6, None)):
        again.save(step, STATE, metrics, {})
        again.wait()
    assert again.steps() == [2, 6]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: x")])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    checkpoints = saved(tmp_path)
    monkeypatch.setattr(checkpoints.manager, "wait_until_finished", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="free space"):
        checkpoints.wait()
