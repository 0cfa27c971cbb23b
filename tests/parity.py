"""Parity with a model of `transformers`: the same numbers in both, float32, on random weights where nothing is zero or one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import default
from jaxlm.config import resolve, validate
from jaxlm.train.state import build_model, flatten_paths

LENGTH = 112


def make_config(**model):
    config = default.get_config()
    config.seq_len = LENGTH
    config.model.update(model)
    resolve(config)
    validate(config)
    return config


def randomise(torch_model, std=0.1):
    """In place: noise on every parameter and buffer of floats that a checkpoint holds."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for value in torch_model.state_dict().values():
            if value.is_floating_point():
                value.add_(std * torch.randn(value.shape))
    return torch_model.eval()


def arrays_of(torch_model) -> dict:
    return {name: value.detach().numpy() for name, value in torch_model.state_dict().items()}


def gradients_of(torch_model) -> dict:
    """Of parameters that are used twice, under each name; buffers have zeros."""
    found = {name: np.zeros(value.shape, np.float32) for name, value in torch_model.state_dict().items()}
    names = dict(torch_model.named_parameters(remove_duplicate=False))
    return found | {name: p.grad.numpy().copy() for name, p in names.items() if p.grad is not None}


def stacked(arrays: dict, template: str, layers, form=lambda a: a):
    """The arrays `template.format(i)` of these layers, each brought into `form`, with a leading axis."""
    return np.stack([form(arrays[template.format(i)]) for i in layers])


class Pair:
    """A jaxlm model and what `to_params` makes of the numbers of a `transformers` one."""

    def __init__(self, config, torch_model, to_params, backend="plain"):
        self.config, self.torch, self.to_params = config, torch_model, to_params
        self.model = build_model(config, torch_model.config.vocab_size, backend)
        self.params = jax.tree.map(jnp.asarray, to_params(arrays_of(torch_model)))
        want = {path: spec.shape for path, spec in flatten_paths(self.model.specs).items()}
        assert {path: a.shape for path, a in flatten_paths(self.params).items()} == want

    @functools.cached_property
    def tokens(self):
        return np.random.default_rng(0).integers(0, self.torch.config.vocab_size, (2, LENGTH)).astype(np.int32)

    @functools.cached_property
    def forward(self):
        return jax.jit(lambda p, tokens, **inputs: self.logits(nnx.merge(self.model.graph, p), tokens, **inputs))

    def logits(self, module, tokens, **inputs):
        return module.logits(module.hidden(tokens, **inputs)[0])

    def theirs(self, tokens, **inputs):
        """Logits of `transformers`, a tensor."""
        import torch

        return self.torch(torch.tensor(tokens).long(), **{name: torch.tensor(value) for name, value in inputs.items()}).logits

    def reference(self, tokens, *args, **inputs):
        """As an array."""
        return self.theirs(tokens, *args, **inputs).detach().numpy()

    def beside(self, module) -> dict:
        """What decoding needs besides tokens and a cache."""
        return {}

    def check_logits(self):
        self.close(self.forward(self.params, self.tokens), self.reference(self.tokens))

    def check_padding(self):
        """A row of 70 tokens and padding after them."""
        live = np.arange(LENGTH) < np.array([[LENGTH], [70]])
        got = self.forward(self.params, self.tokens, segment_ids_BT=live.astype(np.int32))
        self.close(got[live], self.reference(self.tokens, attention_mask=live.astype(np.int64))[live])

    def check_packed(self):
        """Two documents in a row, each as it is alone."""
        assert self.config.data.isolate_documents
        segments = np.tile(1 + (np.arange(LENGTH) >= 37).astype(np.int32), (2, 1))
        positions = np.tile(np.r_[:37, : LENGTH - 37].astype(np.int32), (2, 1))
        got = self.forward(self.params, self.tokens, positions_BT=positions, segment_ids_BT=segments)
        alone = [self.reference(self.tokens[:, part]) for part in (slice(0, 37), slice(37, LENGTH))]
        self.close(got, np.concatenate(alone, axis=1))

    def check_decoding(self):
        """Most tokens at once, the others one by one."""

        @jax.jit
        def step(params, tokens, cache, index):
            module = nnx.merge(self.model.graph, params)
            x_BTD, cache, _ = module.hidden(tokens, cache=cache, cache_index=index, **self.beside(module))
            return module.logits(x_BTD), cache

        module = nnx.merge(self.model.graph, self.params)
        begin, cache = LENGTH - 30, module.init_cache(2, LENGTH, **self.beside(module))
        logits, cache = step(self.params, self.tokens[:, :begin], cache, 0)
        pieces = [logits]
        for t in range(begin, LENGTH):
            logits, cache = step(self.params, self.tokens[:, t : t + 1], cache, t)
            pieces.append(logits)
        self.close(np.concatenate(pieces, axis=1), self.reference(self.tokens))

    def check_gradients(self, zero=None):
        """Of every tensor, of the logits weighed at random. zero: end of the path of those that have none but for rounding."""
        import torch

        logits = self.theirs(self.tokens)
        weights = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32) / logits.numel()
        self.torch.zero_grad()
        (logits * torch.tensor(weights)).sum().backward()
        want = flatten_paths(self.to_params(gradients_of(self.torch)))
        got = flatten_paths(jax.jit(jax.grad(lambda p: jnp.sum(self.forward(p, self.tokens) * weights)))(self.params))
        typical = np.median([np.linalg.norm(gradient) for gradient in want.values()])
        for path, gradient in got.items():
            size = typical if zero and path.endswith(zero) else np.linalg.norm(want[path])
            error = np.linalg.norm(gradient - want[path])
            assert error <= 1e-4 * size, (path, error / size)
            assert size or path.endswith("router/bias"), path  # it only chooses experts

    def close(self, got, want):
        error = float(np.max(np.abs(np.asarray(got) - want)))
        assert np.std(want) > 0.1, "nothing is compared"
        assert error < 1e-4, error
        print(f"largest error {error:.1e} of logits with a deviation of {np.std(want):.2f}")
