"""The start of every verb that computes: JAX set up, and the other processes of the run joined."""

import hashlib
import json
import os
import sys

from jaxlm.errors import UserError
from jaxlm.parallel import distributed


def start_jax(config=None, keep_memory: bool = True) -> None:
    """Set JAX up for this process, and join the run's other processes; before anything touches a device."""
    from configs import default
    from jaxlm.train import heap

    config = config or default.get_config()
    compile_cache = config.observe.compile_cache
    if keep_memory:
        heap.keep_freed_memory()
    else:
        heap.one_heap()
    # With several CPU devices in one process, a collective holds a thread of each until all have come. XLA's default, one for
    # each core, can leave two collectives waiting for each other's threads for good. With more that is rare: XLA starts
    # collectives that do not depend on one another in any order, on each device its own.
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1":
        os.environ.setdefault("PJRT_NPROC", "256")
    import jax

    # On a CPU a step that is sent ahead of its predecessor's end only takes a second work space beside the first.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache_dir(), "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    command = hashlib.sha256(json.dumps([sys.argv[1:], config.to_json()]).encode()).hexdigest()[:12]
    distributed.start(config.observe.join_seconds, config.observe.peer_seconds, {"command and config": command})


def start_alone(verb: str, config=None) -> None:
    start_jax(config)
    if distributed.num_processes() > 1:
        raise UserError(f"jaxlm {verb} runs in one process, on all devices that this one has; start it without a launcher")


def cache_dir() -> str:
    return os.environ.get("JAXLM_CACHE") or os.path.expanduser("~/.cache/jaxlm")
