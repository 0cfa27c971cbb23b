"""Log-likelihoods of texts after others, and texts written on: what evaluations ask a language model for.

Text is cut into tokens, and tokens into windows, as lm-evaluation-harness does it (EleutherAI, lm_eval/api/model.py and
lm_eval/models/huggingface.py, 0.4.13), so that scores are the same to rounding.
"""

import collections
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.data.feed import Feed
from jaxlm.errors import UserError
from jaxlm.generate.decoding import Generator, Request, Session
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.write import Written, stop_ids
from jaxlm.kernels.cross_entropy import token_losses
from jaxlm.kernels.matmul import dense
from jaxlm.models.transformer import softcap
from jaxlm.parallel.compile import jit
from jaxlm.parallel.rules import batch_sharding, constrain, replicated

SHORTEST = 32  # tokens of a row, at least; longer rows have a power of two, so that few programs are compiled
HEAD_TOKENS = 32  # of a row, whose logits are in memory at a time
GREEDY = Sampling(temperature=0.0)


class Item(NamedTuple):
    """A text to score: all its tokens from the place `first` on."""

    ids: list
    first: int  # at least 1: a token is scored after another


class Score(NamedTuple):
    log_likelihood: float  # nats, the sum over `tokens`
    greedy: bool  # each of them is the likeliest one there
    tokens: int
    cut: bool  # the text did not fit the model's context as a whole


class Evaluator:
    """A model under evaluation, with any parameters.

    Args:
        config: its seq_len is the model's context, eval.batch_size the rows of a batch.
        model: `jaxlm.train.state.Model`. mesh: where the parameters lie.
    Raises UserError: a model that does not tell the next token.
    """

    def __init__(self, config, model, tokenizer, mesh):
        if config.model.family != "decoder":
            raise UserError(f"model.family={config.model.family!r}: tasks ask for the likelihood of a text after another, which "
                            "only model.family=decoder tells; remove eval.tasks and eval.lm_eval")
        self.config, self.model, self.tokenizer, self.mesh = config, model, tokenizer, mesh
        self.seq_len, self.batch_size = config.seq_len, config.eval.batch_size
        self.step = jit(mesh, build_score_step(model), out_shardings=replicated(mesh))
        self.generator = Generator(model, tokenizer.vocab_size, config.seq_len)

    # ---- Text to tokens ----------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> list:
        """The token that a text without a context stands after: what texts begin with, or else what they end with."""
        return list(self.tokenizer.first[:1]) or ([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])

    def encode(self, text: str) -> list:
        """With the tokens that every text begins with: once, also where they stand in the text (as chat templates write them)."""
        ids, first = [int(i) for i in self.tokenizer.encode(text)], list(self.tokenizer.first)
        return ids[len(first):] if first and ids[len(first) : 2 * len(first)] == first else ids

    def encode_pair(self, context: str, continuation: str) -> Item:
        """The blanks at the end of the context go to the continuation; what is scored are the tokens of both together that are
        more than the context's own."""
        blanks = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
        if not context:
            return self.encode_document(continuation)
        ids, whole = self.encode(context), self.encode(context + continuation)
        if continuation and len(whole) <= len(ids):  # became one token with the context's end
            return Item(whole, len(whole) - 1)
        return Item([*ids, *whole[len(ids):]], len(ids))

    def encode_document(self, text: str) -> Item:
        """All of a text, after `prefix`; without such a token, its own first is given."""
        ids = self.encode(text)[len(self.tokenizer.first):]
        return Item(ids if ids[:1] == self.prefix else [*self.prefix, *ids], 1)

    # ---- Scores ------------------------------------------------------------------------------------------------------------

    def lengths(self) -> list[int]:
        """Of rows. One only where devices share a row."""
        lengths = [self.seq_len]
        while self.mesh.shape["context"] == 1 and lengths[0] > SHORTEST:
            lengths.insert(0, 1 << (lengths[0] - 1).bit_length() - 1)
        return lengths

    def score(self, params, items: list[Item]) -> list[Score]:
        """Of each item, in their order. What an item gets does not depend on the others."""
        lengths, rows = self.lengths(), collections.defaultdict(list)
        for number, item in enumerate(items):
            for tokens, targets in windows(item, self.seq_len):
                rows[next(n for n in lengths if n >= len(tokens) - 1)].append((number, tokens, targets))
        on_device, numbers = [], []
        for length, of in sorted(rows.items(), reverse=True):  # what takes the most memory comes first
            of.sort(key=lambda row: row[2])  # with as many targets, of which the head is computed
            feed = Feed(batch_sharding(self.mesh), (self.batch_size, length))
            for start in range(0, len(of), self.batch_size):
                part = of[start : start + self.batch_size]
                on_device.append(self.step(params, feed.put(batch_of(part, feed))))
                numbers.append([number for number, _, _ in part])
        sums, greedy = np.zeros(len(items)), np.ones(len(items), bool)
        for (nll_B, greedy_B), of in zip(jax.device_get(on_device), numbers, strict=True):
            for nll, likeliest, number in zip(nll_B, greedy_B, of, strict=False):
                sums[number] -= float(nll)
                greedy[number] &= bool(likeliest)
        return [Score(float(total), bool(likeliest), max(0, len(item.ids) - item.first), len(item.ids) > self.seq_len + 1)
                for total, likeliest, item in zip(sums, greedy, items, strict=True)]

    def write(self, params, contexts: list[list], num_tokens: int, until: tuple = (), options: Sampling = GREEDY) -> list[str]:
        """What the model writes after each context (ids), up to the end of the text or one of the strings `until`."""
        ends, room = stop_ids(self.tokenizer, []), self.room(num_tokens)
        texts = [Written("", self.tokenizer, tuple(until), ends) for _ in contexts]
        waiting = [(number, Request(ids[-room:], num_tokens, options, number, ends)) for number, ids in enumerate(contexts)]
        for _, request in waiting:
            self.generator.check(request)
        session = Session(self.generator, params, max(1, min(self.batch_size, len(contexts))))
        waiting = iter(waiting)
        while (new := list(itertools.islice(waiting, session.free))) or session.busy:
            for token in session.add(new) if new else session.step():
                text = texts[token.request]
                text.add(token)
                if text.done:  # perhaps by a string that the session does not know of
                    session.cancel(token.request)
        return [text.text for text in texts]

    def room(self, num_tokens: int) -> int:
        """Tokens of a context that fit before `num_tokens` more; at least half of the model's, which then goes on sliding."""
        return max(self.seq_len - num_tokens, self.seq_len // 2)


def windows(item: Item, seq_len: int):
    """-> (tokens, how many of the last are scored), of at most seq_len + 1 tokens: each token that is to be scored once, after as
    many as there is room for (Rae et al.'s rolling windows do not overlap; the last one reaches back)."""
    ids, done = item
    while done < len(ids):
        end = min(len(ids), done + seq_len)
        yield ids[max(0, end - seq_len - 1) : end], end - done
        done = end


def batch_of(rows: list, feed: Feed) -> dict[str, np.ndarray]:
    """Arrays (B, T), filled up with padding, or of them the rows that this process's devices hold."""
    batch = {"tokens": np.zeros(feed.shape, np.int32), "targets": np.zeros(feed.shape, np.int32),
             "segment_ids": np.zeros(feed.shape, np.int32), "mask": np.zeros(feed.shape, np.float32)}
    for row, (_, tokens, targets) in enumerate(rows):
        n = len(tokens) - 1
        batch["tokens"][row, :n], batch["targets"][row, :n], batch["segment_ids"][row, :n] = tokens[:-1], tokens[1:], 1
        batch["mask"][row, n - targets : n] = 1
    return batch if feed.rows is None else {name: a[feed.rows] for name, a in batch.items()}


def build_score_step(model):
    """-> score_step(params, batch) -> (nll_B, greedy_B): the negative log-likelihood of a row's targets together, and whether
    each is the likeliest. The head is computed of a few targets of each row at a time, as long as a row has any."""

    def score_step(params, batch):
        module = nnx.merge(model.graph, params)
        given_BT = module.given({"loss_mask": batch["mask"], "positions": jnp.arange(batch["tokens"].shape[1])[None]})
        x_BTD = module.hidden(batch["tokens"], segment_ids_BT=batch["segment_ids"], prefix_BS=given_BT)[0]
        kernel_DV, cap = module.head_kernel, module.final_softcap
        B, T = batch["tokens"].shape
        size = min(T, HEAD_TOKENS)
        targets_first_BT = (jnp.argmax(batch["mask"] > 0, axis=1)[:, None] + jnp.arange(T)) % T

        def pieces(a):  # (B, T, ...) -> (pieces, B, size, ...)
            a = jnp.take_along_axis(a, targets_first_BT.reshape(B, T, *[1] * (a.ndim - 2)), axis=1)
            a = jnp.pad(a, ((0, 0), (0, -T % size), *[(0, 0)] * (a.ndim - 2)))
            return a.reshape(B, -1, size, *a.shape[2:]).swapaxes(0, 1)

        def look(x_BTD, targets_BT, mask_BT):
            logits_BTV = constrain(softcap(dense(x_BTD, kernel_DV).astype(jnp.float32), cap), "batch", None, "vocab")
            _, nll_BT = token_losses(logits_BTV, targets_BT, 0.0, 0.0)
            wrong_BT = (jnp.argmax(logits_BTV, axis=-1) != targets_BT) & (mask_BT > 0)
            return jnp.sum(nll_BT * mask_BT, axis=1), ~jnp.any(wrong_BT, axis=1)

        nothing = (jnp.zeros(B), jnp.ones(B, bool))

        def add(total, piece):
            nll_B, greedy_B = jax.lax.cond(jnp.any(piece[2] > 0), look, lambda *_: nothing, *piece)
            return (total[0] + nll_B, total[1] & greedy_B), None

        return jax.lax.scan(add, nothing, tuple(map(pieces, (x_BTD, batch["targets"], batch["mask"]))))[0]

    return score_step
