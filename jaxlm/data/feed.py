"""From host to device: each process makes only its rows of the global batch, and puts them on its devices."""

import jax
import numpy as np


class Feed:
    """Args:
        sharding: of a batch array (B, T) over the mesh. shape: (B, T), global.

    rows: the rows of the global batch that this process's devices hold, ascending; None where one process holds all.
    Rows may be held by several processes (a mesh whose tensor axis spans hosts), and a device may hold part of T.
    """

    def __init__(self, sharding, shape: tuple[int, int]):
        self.sharding, self.shape = sharding, shape
        self.rows = None
        if not sharding.is_fully_addressable:
            blocks = {index[0].indices(shape[0]) for index in sharding.addressable_devices_indices_map(shape).values()}
            self.rows = np.unique(np.concatenate([np.arange(*block) for block in blocks]))

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Host arrays (len(rows), T) -> global arrays (B, T); another T too (an encoder's text)."""
        if self.rows is None:
            return jax.device_put(batch, self.sharding)
        return {name: self._global(local) for name, local in batch.items()}

    def _global(self, local):
        def block(index):
            start, stop, _ = index[0].indices(self.shape[0])
            first = int(np.searchsorted(self.rows, start))
            return local[first : first + stop - start, index[1]]

        return jax.make_array_from_callback((self.shape[0], local.shape[1]), self.sharding, block)


def put_everywhere(tree, sharding):
    """Host values that are the same in all processes -> replicated device arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_callback(np.shape(a), sharding, lambda index: np.asarray(a)[index]), tree)
