"""Beam search: the texts of highest probability that keeping the best few at each token finds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.decoding import Generator, Request, padded_power


class Hypothesis(NamedTuple):
    ids: list  # after the prompt; the id that ended it is left out
    score: float  # log-probability / tokens ** length_penalty, the end counted


class BeamSearch:
    """`beams` texts of each request at a time; ended ones are kept apart, the best `beams` of them, and the search ends when
    no open text can pass the worst (as in transformers with early_stopping=False)."""

    def __init__(self, generator: Generator, beams: int, length_penalty: float = 1.0):
        self.generator, self.beams, self.length_penalty = generator, beams, length_penalty
        self.begin = jax.jit(self._begin, static_argnames="room")
        self.go_on = jax.jit(self._go_on, donate_argnums=2)

    def search(self, params, requests: list[Request]) -> list[list[Hypothesis]]:
        """-> of each request, its hypotheses, best first. All requests are searched side by side; their sampling options and
        seeds count for nothing. Raises UserError as `Generator.check`, and for a text that would outgrow the context."""
        generator, K = self.generator, self.beams
        for request in requests:
            generator.check(request, room_for_all=True)
        params = generator.loosen(params)
        room = min(generator.seq_len, 1 << (max(len(r.prompt) + r.num_tokens for r in requests) - 1).bit_length())
        room = max(room, *(padded_power(r.prompt, generator.seq_len) for r in requests))
        source_room = max(padded_power(r.source or [0], generator.seq_len) for r in requests)
        begun = [self.begin(params, *generator.prompt_arrays(r, r.prompt, source_room), room=room) for r in requests]
        rows = jax.tree.map(lambda *a: jnp.repeat(jnp.stack(a), K, axis=0), *(row for _, row in begun))
        found = np.stack([np.asarray(best) for best, _ in begun])  # (requests, 2, 2K): log-probabilities, ids
        states = [State(request, K, self.length_penalty) for request in requests]
        for state, (log_probabilities, ids) in zip(states, found, strict=True):
            state.extend(log_probabilities[None], ids[None].astype(int))
        index = np.repeat([len(r.prompt) for r in requests], K).astype(np.int32)
        while not all(state.done for state in states):
            parents = np.concatenate([state.parents + i * K for i, state in enumerate(states)]).astype(np.int32)
            tokens = np.concatenate([[text[-1] for text in state.texts] for state in states]).astype(np.int32)
            best, rows = self.go_on(params, tokens, rows, parents, index)
            best, index = np.asarray(best), np.minimum(index + 1, room - 1)
            for i, state in enumerate(states):
                if not state.done:
                    state.extend(best[i * K : i * K + K, 0], best[i * K : i * K + K, 1].astype(int))
        return [state.finish() for state in states]

    def _best(self, module, x_D):
        logits_V = module.logits(x_D[None, None])[0, 0]
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < self.generator.vocab_size, logits_V, -jnp.inf)
        log_probabilities, ids = jax.lax.top_k(jax.nn.log_softmax(logits_V), min(2 * self.beams, self.generator.vocab_size))
        return jnp.stack([log_probabilities, ids.astype(jnp.float32)])

    def _begin(self, params, tokens_1T, length, source_1S, source_length, *, room):
        module, row = self.generator.read(params, tokens_1T, source_1S, source_length)
        x_1TD, row = self.generator.forward(module, tokens_1T, row, 0)
        return self._best(module, x_1TD[0, length - 1]), self.generator.with_room(row, room)

    def _go_on(self, params, tokens_R, rows, parents_R, index_R):
        """Row i goes on from what row parents[i] had."""
        module, rows = self.generator.module(params), jax.tree.map(lambda a: a[parents_R], rows)

        def one(token, row, index):
            x_1TD, row = self.generator.forward(module, token.reshape(1, 1), row, index)
            return self._best(module, x_1TD[0, 0]), row

        return jax.vmap(one)(tokens_R, rows, index_R)


class State:
    """The open and the ended texts of one request."""

    def __init__(self, request: Request, beams: int, length_penalty: float):
        self.request, self.beams, self.length_penalty = request, beams, length_penalty
        self.texts, self.scores = [[]], np.zeros(1)  # open ones, and their log-probabilities
        self.parents = np.zeros(beams, int)  # of the open texts, which of the texts before they go on from
        self.ended: list[Hypothesis] = []
        self.done = False

    def extend(self, log_probabilities_K2: np.ndarray, ids_K2: np.ndarray) -> None:
        """By the likeliest next tokens of each open text."""
        totals = self.scores[:, None] + log_probabilities_K2[: len(self.texts)]
        texts, scores, parents = [], [], []
        for rank, place in enumerate(np.argsort(-totals, axis=None, kind="stable")[: 2 * self.beams]):
            parent, column = np.unravel_index(place, totals.shape)
            token, total = int(ids_K2[parent, column]), float(totals[parent, column])
            if token in self.request.stop:
                if rank < self.beams:
                    self.end(self.texts[parent], total, len(self.texts[parent]) + 1)
            elif len(texts) < self.beams:
                texts.append([*self.texts[parent], token])
                scores.append(total)
                parents.append(parent)
        while len(texts) < self.beams:  # fewer words than beams
            texts.append(texts[-1] if texts else [0])
            scores.append(-np.inf)
            parents.append(parents[-1] if parents else 0)
        self.texts, self.scores, self.parents = texts, np.array(scores), np.array(parents)
        length = len(texts[0])
        attainable = self.scores.max() / length**self.length_penalty
        self.done = length == self.request.num_tokens or (
            len(self.ended) >= self.beams and min(h.score for h in self.ended) >= attainable)

    def end(self, ids: list, total: float, length: int) -> None:
        self.ended.append(Hypothesis(ids, total / length**self.length_penalty))
        self.ended = sorted(self.ended, key=lambda h: -h.score)[: self.beams]

    def finish(self) -> list[Hypothesis]:
        for text, score in zip(self.texts, self.scores, strict=True):
            if np.isfinite(score) and len(text) == self.request.num_tokens:
                self.end(text, float(score), len(text))
        return self.ended
