"""Beam search: the texts of highest probability that keeping the best few at each token finds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.decoding import Generator, Request, padded_power, padded_rows


class Hypothesis(NamedTuple):
    ids: list  # after the prompt; the id that ended it is left out
    score: float  # log-probability / tokens ** length_penalty, the end counted


class BeamSearch:
    """`beams` texts of each request at a time; ended ones are kept apart, the best `beams` of them, and the search ends when
    no open text can pass the worst (as in transformers with early_stopping=False)."""

    def __init__(self, generator: Generator, beams: int, length_penalty: float = 1.0):
        self.generator, self.beams, self.length_penalty = generator, beams, length_penalty
        self.begin = jax.jit(jax.vmap(self._begin, in_axes=(None, 0)))
        self.go_on = jax.jit(self._go_on, donate_argnums=2)

    def search(self, params, requests: list[Request], at_once: int = 32) -> list[list[Hypothesis]]:
        """-> of each request, its hypotheses, best first. `at_once` requests of about the same length are searched side by
        side; their sampling options and seeds count for nothing. Raises UserError as `Generator.check`, and for a text that
        would outgrow the context."""
        for request in requests:
            self.generator.check(request, room_for_all=True)
        params, at_once = self.generator.loosen(params), min(at_once, len(requests))
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].source or ()), len(requests[i].prompt)))
        found: list = [None] * len(requests)
        for first in range(0, len(order), at_once):
            part = order[first : first + at_once]
            filled = [requests[i] for i in (part + part[-1:] * at_once)[:at_once]]  # the same number: the same program
            for i, hypotheses in zip(part, self._search(params, filled, len(part)), strict=False):
                found[i] = hypotheses
        return found

    def _search(self, params, requests, wanted: int) -> list[list[Hypothesis]]:
        """wanted: of the requests, those that the search goes on for."""
        generator, K = self.generator, self.beams
        T = max(padded_power(r.prompt, generator.seq_len) for r in requests)
        S = max(padded_power(r.source or [0], generator.source_len) for r in requests)
        prompts_N = (*padded_rows([r.prompt for r in requests], len(requests), T),
                     *padded_rows([r.source or [] for r in requests], len(requests), S))
        best, rows = self.begin(params, prompts_N)
        rows, room = jax.tree.map(lambda a: jnp.repeat(a, K, axis=0), rows), T
        best, states = np.asarray(best), [State(request, K, self.length_penalty) for request in requests]
        for state, (log_probabilities, ids) in zip(states, best, strict=True):
            state.extend(log_probabilities[None], ids[None].astype(int))
        index = prompts_N[1]
        while not all(state.done for state in states[:wanted]):
            if max(i for i, state in zip(index, states, strict=True) if not state.done) >= room:
                room = min(2 * room, generator.seq_len)
                rows = generator.grow(rows, room)
            parents = np.concatenate([state.parents + i * K for i, state in enumerate(states)]).astype(np.int32)
            tokens = np.concatenate([[text[-1] for text in state.texts] for state in states]).astype(np.int32)
            best, rows = self.go_on(params, tokens, rows, parents, np.repeat(np.minimum(index, room - 1), K))
            best, index = np.asarray(best), index + 1
            for i, state in enumerate(states):
                if not state.done:
                    state.extend(best[i * K : i * K + K, 0], best[i * K : i * K + K, 1].astype(int))
        return [state.finish() for state in states[:wanted]]

    def _best(self, module, x_D):
        logits_V = module.logits(x_D[None, None])[0, 0]
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < self.generator.vocab_size, logits_V, -jnp.inf)
        log_probabilities, ids = jax.lax.top_k(jax.nn.log_softmax(logits_V), min(2 * self.beams, self.generator.vocab_size))
        return jnp.stack([log_probabilities, ids.astype(jnp.float32)])

    def _begin(self, params, prompt):
        module, x_D, row = self.generator.read(params, *prompt)
        return self._best(module, x_D), row

    def _go_on(self, params, tokens_R, rows, parents_R, index_R):
        """Row i goes on from what row parents[i], of the same request, had."""
        module, rows = self.generator.module(params), self.generator.with_cache(rows, lambda a: a[parents_R])

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
