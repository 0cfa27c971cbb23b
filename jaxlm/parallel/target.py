"""The device that a program is built for: one of this machine's, or, when planning, one that is not there.

What depends on the hardware (which kernel, which form of an update) asks here, never `jax.default_backend()`.
"""

import contextlib
import contextvars

import jax

_target = contextvars.ContextVar("target", default=None)


def device():
    """A `jax.Device`, or a device of a `jax.experimental.topologies` description, which says as much of itself."""
    return _target.get() or jax.devices()[0]


def platform() -> str:
    """cpu, gpu or tpu."""
    found = device().platform
    return "gpu" if found in ("cuda", "rocm") else found


@contextlib.contextmanager
def building_for(device):
    """Within, programs are built, traced and compiled for `device`."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)
