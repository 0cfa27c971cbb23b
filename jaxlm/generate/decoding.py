"""Text from a model: each text is a row with its own key/value cache; prompts are read at once, those of about the same length
together, then one token of every row is written at a time. Rows come and go while the others go on."""

import collections
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.errors import UserError
from jaxlm.generate.sampling import Sampling, pick
from jaxlm.models.cross import Memory

SHORTEST = 64  # tokens that a cache has room for, at least; it grows by doubling
READ_AT_ONCE = 2048  # tokens of prompts, filled up, at most: more are read no faster, and take memory


class Request(NamedTuple):
    """One text to go on with."""

    prompt: list  # token ids, at least one
    num_tokens: int  # to add, at most
    options: Sampling = Sampling()
    seed: int = 0
    stop: frozenset = frozenset()  # ids that end the text
    source: list | None = None  # of an encoder-decoder, the text it is about


class Token(NamedTuple):
    request: int  # which of them
    id: int
    log_probability: float  # under the model, before any sampling option
    last: bool


class Generator:
    """The compiled programs of a model, for any number of texts and any parameters.

    model: `jaxlm.train.state.Model`. vocab_size: of the tokenizer; padding ids of the model are never sampled. seq_len: tokens of
    context; a text that outgrows it goes on from its last half. source_len: of an encoder-decoder's source; 0: seq_len.
    """

    def __init__(self, model, vocab_size: int, seq_len: int, source_len: int = 0):
        self.model, self.vocab_size, self.seq_len, self.has_source = model, vocab_size, seq_len, "encoder_layers" in model.specs
        self.source_len = (source_len or seq_len) if self.has_source else 0
        self.stacks = [name for name in ("first_layers", "layers") if name in model.specs]
        self.loosen = jax.jit(self._apart)
        self.prefill = jax.jit(self._prefill, static_argnames="full")
        self.decode = jax.jit(self._decode, static_argnames="full", donate_argnums=2)
        self.insert = jax.jit(self._insert, donate_argnums=0)
        self.grow = jax.jit(self._grow, static_argnums=1)

    def stream(self, params, requests: list[Request], rows: int = 8) -> Iterator[Token]:
        """Tokens as they come, of at most `rows` texts at a time. What a request gets does not depend on the others.

        Raises UserError: an empty prompt, or one that leaves no room in the context.
        """
        for request in requests:
            self.check(request)
        session, waiting = Session(self, params, min(rows, len(requests))), iter(enumerate(requests))
        while (new := list(itertools.islice(waiting, session.free))) or session.busy:
            yield from session.add(new) if new else session.step()

    def check(self, request: Request, room_for_all: bool = False) -> None:
        """Raises UserError: an empty prompt, or one that leaves no room; room_for_all: for all tokens that it asks for."""
        request.options.check()
        if not len(request.prompt):
            raise UserError("the prompt is empty; give at least one token")
        if len(request.prompt) >= self.seq_len:
            raise UserError(f"the prompt has {len(request.prompt)} tokens, and the model's context is {self.seq_len}; shorten "
                            "it, or set --config.seq_len if the model can take more")
        if room_for_all and len(request.prompt) + request.num_tokens > self.seq_len:
            raise UserError(f"a prompt of {len(request.prompt)} tokens and {request.num_tokens} more are above the model's "
                            f"context of {self.seq_len}; ask for fewer")
        if self.has_source != (request.source is not None):
            raise UserError("model.family=encoder_decoder writes about a source text, and no other family does")
        if self.has_source and not request.source:
            raise UserError("the prompt is empty; give a text to write about")
        if len(request.source or ()) > self.source_len:
            raise UserError(f"the source has {len(request.source)} tokens, and the encoder takes {self.source_len}; shorten it, "
                            "or set --config.data.source_len if the model can take more")

    # ---- Programs: a row has no axis of rows; `prefill` and `decode` go over all by `vmap` -------------------------------------

    def _apart(self, tree):
        """The layers of a stacked tree one by one: a layer cut out of a stack would be copied for every token."""
        apart = lambda stack: [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(len(jax.tree.leaves(stack)[0]))]
        return {name: apart(part) if name in self.stacks else part for name, part in tree.items()}

    def _together(self, tree):
        together = lambda layers: jax.tree.map(lambda *a: jnp.stack(a), *layers)  # XLA sees that they are cut apart again
        return {name: together(part) if name in self.stacks else part for name, part in tree.items()}

    def module(self, params):
        module = nnx.merge(self.model.graph, self._together(params))
        module.scan, module.remat = False, "none"
        return module

    def forward(self, module, tokens_1T, row, index, prompt_length=None):
        """prompt_length: of a prompt that is read now, whose tokens a model with prefix attention lets see one another."""
        memory = Memory(None, row["source"]) if self.has_source else None
        with_prefix = module.prefix_attention and prompt_length is not None
        prefix_1S = jnp.arange(row["history"].shape[1])[None] < prompt_length if with_prefix else None
        x_1TD, (history, layers), _ = module.hidden(
            tokens_1T, cache=(row["history"], self._together(row["layers"])), cache_index=index, memory=memory,
            prefix_BS=prefix_1S)
        return x_1TD, {**row, "history": history, "layers": self._apart(layers)}

    def _pick(self, module, x_D, row, options, seed, index, full):
        logits_V = module.logits(x_D[None, None])[0, 0]
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < self.vocab_size, logits_V, -jnp.inf)
        key = jax.random.fold_in(jax.random.key(seed), index)
        token, log_probability = pick(logits_V, options, row["seen"] if full else None, key)
        return token, log_probability, {**row, "seen": row["seen"].at[token].set(True)}

    def read(self, params, tokens_1T, length, source_1S, source_length):
        """A prompt of `length`, filled up to T -> (module, x_D after it, row with a cache for T tokens)."""
        module, row, memory = self.module(params), {}, ()
        if self.has_source:
            row["source"] = (jnp.arange(source_1S.shape[1]) < source_length).astype(jnp.int32)[None]
            memory = (module.encode(source_1S, segment_ids_BS=row["source"]),)
        row["history"], layers = module.init_cache(1, tokens_1T.shape[1], *memory)
        row["layers"] = self._apart(layers)
        x_1TD, row = self.forward(module, tokens_1T, row, 0, length)
        return module, x_1TD[0, length - 1], row

    def _prefill(self, params, prompts_P, seen_PV, options_P, seeds_P, *, full):
        """prompts_P: of each prompt what `read` takes -> (tokens_P, log-probabilities_P, rows)."""

        def one(prompt, seen_V, options, seed):
            module, x_D, row = self.read(params, *prompt)
            return self._pick(module, x_D, {**row, "seen": seen_V}, options, seed, prompt[1], full)

        return jax.vmap(one)(prompts_P, seen_PV, options_P, seeds_P)

    def _insert(self, rows, new_P, at_P):
        """Each of the new rows in its place; one whose place there is not is left out."""
        new_P = self._grow(new_P, rows["history"].shape[-1])
        return jax.tree.map(lambda a, b: a.at[at_P].set(b, mode="drop"), rows, new_P)

    def _decode(self, params, tokens_R, rows, index_R, options_R, seeds_R, *, full):
        """One more token of every row -> (tokens_R, log-probabilities_R, rows)."""
        module = self.module(params)

        def one(token, row, index, options, seed):
            x_1TD, row = self.forward(module, token.reshape(1, 1), row, index)
            return self._pick(module, x_1TD[0, 0], row, options, seed, index + 1, full)

        return jax.vmap(one)(tokens_R, rows, index_R, options_R, seeds_R)

    def _grow(self, rows, room: int):
        """Room for `room` tokens."""
        return self.with_cache(rows, lambda a: jnp.pad(a, [*[(0, 0)] * (a.ndim - 2), (0, room - a.shape[-2]), (0, 0)]))

    def with_cache(self, row, change):
        """`change` of each array (..., tokens, features) that is kept of a text; what is known of a source stays as it is."""
        of = lambda cache: jax.tree.map(change, cache)
        layers = {name: [(of(layer[0]), layer[1]) if self.has_source else of(layer) for layer in part]
                  for name, part in row["layers"].items()}
        return {**row, "history": change(row["history"][..., None])[..., 0], "layers": layers}


class Session:
    """Texts that are being written with one set of parameters."""

    def __init__(self, generator: Generator, params, rows: int):
        self.generator, self.params = generator, generator.loosen(params)
        self.requests: list = [None] * rows  # (number, Request), or None where a row is free
        self.clear()  # sets `rows`, the state of all rows, made like the first
        self.texts, self.left = [None] * rows, [0] * rows
        self.token, self.index, self.seed = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.uint32)
        self.options = Sampling(*(np.full(rows, v, np.float32 if isinstance(v, float) else np.int32) for v in Sampling()))

    @property
    def free(self) -> int:
        return sum(request is None for request in self.requests)

    @property
    def busy(self) -> int:
        return len(self.requests) - self.free

    @property
    def room(self) -> int:
        """Tokens that the caches hold."""
        return self.rows["history"].shape[-1]

    def add(self, texts: list[tuple[int, Request]]) -> list[Token]:
        """Begin texts, each with its number, in free rows -> their first tokens. Where that raises, none has begun, and the other
        texts go on as they were."""
        if not self.busy:
            self.clear()
        rows = [at for at, request in enumerate(self.requests) if request is None][: len(texts)]
        for at, (number, request) in zip(rows, texts, strict=True):
            self.requests[at], self.texts[at], self.left[at] = (number, request), list(request.prompt), request.num_tokens
            self.seed[at] = request.seed % 2**32
            for values, value in zip(self.options, request.options, strict=True):
                values[at] = value
        try:
            return self._begin({at: self.texts[at] for at in rows})
        except BaseException:
            for at in rows:
                self.requests[at] = None
            raise

    def clear(self) -> None:
        """End all texts and give their memory back; also what is left to do once `step` has raised."""
        self.requests, self.rows = [None] * len(self.requests), None

    def cancel(self, number: int) -> None:
        """End a text, if it is still being written."""
        self.requests = [None if request and request[0] == number else request for request in self.requests]

    def step(self) -> list[Token]:
        """One more token of every text."""
        generator, live = self.generator, [at for at, request in enumerate(self.requests) if request]
        over = [at for at in live if self.index[at] == generator.seq_len]
        tokens = self._begin({at: self.texts[at][-(generator.seq_len // 2 + 1):] for at in over})
        live = [at for at in live if at not in over]
        if not live:
            return tokens
        if max(self.index[at] for at in live) >= self.room:
            self.rows = generator.grow(self.rows, min(2 * self.room, generator.seq_len))
        full = any(not self.requests[at][1].options.is_plain for at in live)
        picked, log_probabilities, self.rows = generator.decode(
            self.params, self.token, self.rows, np.minimum(self.index, self.room - 1), self.options, self.seed, full=full)
        picked, log_probabilities = np.array(picked), np.asarray(log_probabilities)
        self.index[live] += 1
        return tokens + [self._took(at, picked[at], log_probabilities[at]) for at in live]

    def _begin(self, contexts: dict[int, list]) -> list[Token]:
        """Read the context of each row -> the tokens after them. Those that are filled up to the same length are read together,
        or else alone, since a program for every number of them would take longer to compile than it saves."""
        seq_len, alike, tokens = self.generator.seq_len, collections.defaultdict(list), []
        for at, context in contexts.items():
            context = context[-(seq_len - 1):] or context[-1:]
            alike[padded_power(context, seq_len)].append((at, context))
        for T, waiting in alike.items():
            together = max(1, min(len(self.requests), READ_AT_ONCE // T))
            while waiting:
                size = together if 2 * len(waiting) > together else 1
                tokens += self._read(dict(waiting[:size]), size, T)
                waiting = waiting[size:]
        return tokens

    def _read(self, contexts: dict[int, list], size: int, T: int) -> list[Token]:
        """`size` contexts or fewer, each filled up to T tokens."""
        generator, rows, requests = self.generator, len(self.requests), [self.requests[at][1] for at in contexts]
        prompts = (*padded_rows(contexts.values(), size, T),
                   *padded_rows([request.source or [] for request in requests], size, generator.source_len))
        seen = np.zeros((size, generator.model.specs["embedding"].shape[0]), bool)
        for of, at in zip(seen, contexts, strict=False):
            of[self.texts[at]] = True
        at_P = np.array([*contexts, *[rows] * (size - len(contexts))])  # where there are fewer contexts, of no row
        options, seeds = jax.tree.map(lambda a: a.take(at_P, mode="clip"), (self.options, self.seed))
        picked, log_probabilities, new = generator.prefill(self.params, prompts, seen, options, seeds,
                                                           full=not all(request.options.is_plain for request in requests))
        if self.rows is None:
            self.rows = jax.tree.map(lambda a: jnp.zeros((rows, *a.shape[1:]), a.dtype), new)
        if self.room < (room := max(T, min(SHORTEST, generator.seq_len))):
            self.rows = generator.grow(self.rows, room)
        self.rows = generator.insert(self.rows, new, at_P)
        tokens = zip(contexts, np.asarray(picked), np.asarray(log_probabilities), strict=False)
        self.index[list(contexts)] = [len(context) for context in contexts.values()]
        return [self._took(*token) for token in tokens]

    def _took(self, at: int, token: int, log_probability: float) -> Token:
        number, request = self.requests[at]
        token = int(token)
        self.texts[at].append(token)
        self.token[at], self.left[at] = token, self.left[at] - 1
        last = self.left[at] == 0 or token in request.stop
        if last:
            self.requests[at] = None
        return Token(number, token, float(log_probability), last)


def padded_power(ids: list, longest: int) -> int:
    """A power of two that is at least len(ids), or `longest`: few lengths, so that few programs are compiled."""
    return min(max(16, 1 << (len(ids) - 1).bit_length()), longest)


def padded_rows(rows, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """-> (size, 1, length), filled up with zeros, and (size,), how many ids there are of each row."""
    filled, lengths = np.zeros((size, 1, length), np.int32), np.zeros(size, np.int32)
    for i, ids in enumerate(rows):
        filled[i, 0, : len(ids)], lengths[i] = ids, len(ids)
    return filled, lengths
