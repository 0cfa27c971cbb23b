"""`mesh=auto`: a mesh from the sizes of model, batch and devices, and the reason for it."""

import os

import jax
import jax.numpy as jnp

from jaxlm.parallel.distributed import share

SHARE_FOR_STATE = 0.5  # of a device's memory; the rest is for activations


def choose_axes(config, num_parameters: int, devices) -> tuple[dict[str, int], str]:
    """-> ({"data": 4, ...}, why). As few devices share a row as the batch allows, as few share the state as memory allows:
    data before fsdp before context before tensor, in the order of what each costs to talk about."""
    count, m = len(devices), config.model
    micro = config.batch_size // config.grad_accum_steps
    rows = max(d for d in range(1, count + 1) if count % d == 0 and micro % d == 0 and config.eval.batch_size % d == 0)
    rest = count // rows
    context = rest if config.seq_len % (2 * rest) == 0 else 1
    tensor = rest // context
    need, limit = num_parameters * bytes_per_parameter(config) / tensor, memory_limit(devices)
    choices = [d for d in range(1, rows + 1) if rows % d == 0 and m.embed_dim % d == 0]
    fsdp = next((d for d in choices if need / d <= SHARE_FOR_STATE * limit), choices[-1])
    sizes = {"data": rows // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": 1, "stage": 1}
    why = (f"parameters, gradients and optimizer state are {need / 2**30:.2f} GiB, half of a device's memory is "
           f"{SHARE_FOR_STATE * limit / 2**30:.2f} GiB")
    if need / fsdp > SHARE_FOR_STATE * limit:
        why += "; more than that even when cut up: it may not fit"
    if rest > 1:
        why += f"; {micro} rows divide among {rows} of {count} devices, so {rest} share each"
    return sizes, why


def bytes_per_parameter(config) -> int:
    """Parameter, its gradient, and Adam's two moments (other optimizers keep fewer), and the average where kept."""
    size = lambda dtype: jnp.dtype(dtype).itemsize
    copies = 3 if config.optimizer.ema_decay else 2
    return copies * size(config.model.param_dtype) + 2 * size(config.optimizer.moment_dtype)


def memory_limit(devices) -> float:
    """Bytes one device may use, as process 0 sees it (all must choose the same); of a CPU, its share of the machine's memory."""
    return share(lambda: memory_limit_here([d for d in devices if d.process_index == jax.process_index()]), "memory limit")


def memory_limit_here(devices) -> float:
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
