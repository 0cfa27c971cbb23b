"""The decoder-only Transformer: tokens_BT -> hidden x_BTD -> logits_BTV."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from jaxlm.config import is_off
from jaxlm.errors import UserError
from jaxlm.kernels.embedding import choose_embedding_gradient, look_up
from jaxlm.kernels.matmul import dense
from jaxlm.models.attention import ATTENTIONS
from jaxlm.models.block import Block, Context, drop, fold_in, hide, layer_kinds, residual
from jaxlm.models.dense import Dense, adapter_scale, is_adapted
from jaxlm.models.ngrams import NgramEmbedding
from jaxlm.models.norms import NoNorm, build_norm
from jaxlm.models.parameter import constant, normal, parameter
from jaxlm.models.parametrization import build_parametrization
from jaxlm.models.positions import build_position
from jaxlm.models.remat import check_remat, rematerialise
from jaxlm.parallel import target
from jaxlm.parallel.context import zigzag, zigzag_order
from jaxlm.parallel.pipeline import run_pipeline
from jaxlm.parallel.rules import constrain, mesh_size, on_a_mesh
from jaxlm.registry import Registry

FAMILIES = Registry("model family", key="model.family")


@FAMILIES.register("decoder")
class Transformer(nnx.Module):
    """Layers are always stored stacked (leading axis L), so that a checkpoint does not depend on `scan_layers`."""

    causal = True
    cross = False  # has cross-attention to a `memory`

    def __init__(self, config, vocab_size: int, attention_backend: str, rngs: nnx.Rngs):
        m = config.model
        check_remat(m.remat)
        self.compute_dtype, self.dropout, self.backend = jnp.dtype(m.compute_dtype), m.dropout, attention_backend
        self.embedding_gradient, _ = choose_embedding_gradient(config, target.platform())
        self.isolate, self.token_dropout = config.data.isolate_documents, m.token_dropout
        self.prefix_attention = m.prefix_attention
        self.embed_scale, self.final_softcap = m.embed_scale, m.final_softcap
        self.logit_scale = m.logit_scale * build_parametrization(m).logits
        self.context_method = config.kernels.context
        self.microbatches, self.pipeline_repeats = config.mesh.pipeline_microbatches, config.mesh.pipeline_repeats
        self.scan, self.scan_unroll, self.remat, self.value_residual = m.scan_layers, m.scan_unroll, m.remat, m.value_residual
        self.value_shape, self.cache_shapes = (m.num_kv_heads, m.head_dim), ATTENTIONS[m.attention].cache_shapes(m)
        self.pattern, self.num_layers, self.num_dense = layer_kinds(m), m.num_layers, m.first_dense_layers
        self.vocab_size = vocab_size
        self.embedding = parameter(rngs, (vocab_size, m.embed_dim), ("vocab", "embed"), normal(m.init_std),
                                   m.param_dtype)
        if is_adapted(m, "embedding"):
            if m.tie_embeddings:
                raise UserError("model.lora_modules: the embedding is the head too (model.tie_embeddings), and an adapter would "
                                "change one of them alone; leave it out, or set model.tie_embeddings=False")
            self.embedding_adapter = nnx.Dict(  # which PEFT begins the other way round: A is zero
                lora_a=parameter(rngs, (vocab_size, m.lora_rank), ("vocab", None), constant(0.0)),
                lora_b=parameter(rngs, (m.lora_rank, m.embed_dim), (None, "embed"), normal(1.0), num_inputs=1))
            self.adapter_scale = adapter_scale(m)
        if m.ngram_max > 1:
            self.ngrams = NgramEmbedding(config, vocab_size, rngs)
        if m.token_types:
            self.token_type_embedding = parameter(rngs, (m.token_types, m.embed_dim), (None, "embed"), normal(m.init_std),
                                                  m.param_dtype)
        self.position = build_position(config, rngs)
        if m.embed_norm:
            self.embed_norm = build_norm(config, m.embed_dim, rngs)
        if self.num_dense:
            self.first_layers = stack_blocks(self.num_dense, lambda r: Block(config, r, dense=True), rngs)
        self.layers = stack_blocks(self.num_layers - self.num_dense, lambda r: Block(config, r, cross=self.cross), rngs)
        self.final_norm = NoNorm() if m.norm_place == "sum" else build_norm(config, m.embed_dim, rngs)
        if m.num_classes:
            self.classifier = Dense(config, rngs, "classifier", (m.embed_dim,), (m.num_classes,), ("embed", None),
                                    normal(m.init_std), m.mlp_bias)
        elif not m.tie_embeddings:
            init = constant(0.0) if m.zero_init_proj else normal(m.init_std)
            self.head = Dense(config, rngs, "head", (m.embed_dim,), (vocab_size,), ("embed", "vocab"), init)

    def hidden(self, tokens_BT, positions_BT=None, segment_ids_BT=None, keys_B=None, cache=None, cache_index=0,
               token_types_BT=None, memory=None, prefix_BS=None):
        """-> (x_BTD after the last norm, cache, stats of the feed-forwards stacked over layers or None).

        `keys_B`, one a row, switch dropout on; `cache` is for decoding (`init_cache`); token_types_BT, where the model has any,
        are 0 if not given; memory is what cross-attention looks at; prefix_BS is what `given` says.
        """
        if positions_BT is None:
            positions_BT = np.arange(tokens_BT.shape[1])[None] + cache_index
        x_BTD = self.embed(tokens_BT)
        history_BS, layer_cache = (tokens_BT, None) if cache is None else cache
        if cache is not None:
            history_BS = jax.lax.dynamic_update_slice(history_BS, tokens_BT.astype(history_BS.dtype), (0, cache_index))
        if hasattr(self, "ngrams"):
            x_BTD = x_BTD + self.ngrams(history_BS, cache_index, tokens_BT.shape[1], segment_ids_BT if self.isolate else None)
        if hasattr(self, "token_type_embedding"):
            types_BT = jnp.zeros(tokens_BT.shape, jnp.int32) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + self.token_type_embedding[...][types_BT]
        x_BTD = x_BTD.astype(self.compute_dtype) * self.embed_scale
        keys_BT = self.token_keys(keys_B, tokens_BT.shape[1])
        x_BTD = hide(x_BTD, self.token_dropout, fold_in(keys_BT, self.num_layers + 2))
        x_BTD = self.position.embed(x_BTD, positions_BT)
        if hasattr(self, "embed_norm"):
            x_BTD = self.embed_norm(x_BTD)
        if keys_BT is not None:
            x_BTD = drop(x_BTD, self.dropout, fold_in(keys_BT, self.num_layers))
        live_BT = None if segment_ids_BT is None else jnp.asarray(segment_ids_BT) > 0
        if not self.isolate:  # no query sees padding, which comes last, unless it sees what comes after it
            segment_ids_BT = None if self.causal or live_BT is None else live_BT.astype(jnp.int32)
        order = None
        ring = self.context_method == "ring" and mesh_size("context") > 1
        if ring:
            order = zigzag_order(tokens_BT.shape[1])
            x_BTD, positions_BT = zigzag(x_BTD), positions_BT[:, order]
            keys_BT, segment_ids_BT, live_BT = (None if a is None else a[:, order] for a in (keys_BT, segment_ids_BT, live_BT))
        context = Context(rope=self.position.tables(positions_BT), segment_ids=segment_ids_BT, backend=self.backend,
                          dropout=self.dropout, cache_index=cache_index, context_method=self.context_method,
                          decoding=cache is not None, live=live_BT, order=order, causal=self.causal, memory=memory,
                          prefix=prefix_BS,
                          bias=self.position.bias(tokens_BT.shape[1], history_BS.shape[1], cache_index, self.causal))
        x_BTD, layer_cache, stats = self._run_layers(residual(x_BTD), context, keys_BT, layer_cache)
        x_BTD = constrain(self.final_norm(x_BTD), "batch", "seq", None)
        return zigzag(x_BTD, back=True) if ring else x_BTD, None if cache is None else (history_BS, layer_cache), stats

    def given(self, batch):
        """-> bool (B, T): a batch's tokens of prompts, with model.prefix_attention; else None. Of a segment, what is given comes
        first, and what is to be told (loss_mask is on the token before) last."""
        if not self.prefix_attention:
            return None
        told_BT = jnp.pad(batch["loss_mask"], ((0, 0), (1, 0)))[:, :-1] > 0
        return (batch["positions"] == 0) | ~told_BT

    def embed(self, tokens_BT):
        """-> x_BTD in the parameter type, to be cast after: a bfloat16 scatter-add in the backward pass is slow and inexact."""
        # On a mesh the table is gathered over `embed` first: looking rows up in a table cut that way would move the batch.
        rows = lambda table: look_up(constrain(table[...], "vocab", None), tokens_BT, backend=self.embedding_gradient,
                                     cotangent_dtype=self.compute_dtype)
        x_BTD = rows(self.embedding)
        if hasattr(self, "embedding_adapter"):
            lora_a, lora_b = self.embedding_adapter["lora_a"], self.embedding_adapter["lora_b"][...]
            x_BTD = x_BTD + dense(rows(lora_a), lora_b) * self.adapter_scale
        return x_BTD

    def token_keys(self, keys_B, length: int):
        """-> keys_BT of dropout, one a token; None where it is off."""
        if keys_B is None or is_off(self.dropout) and is_off(self.token_dropout):
            return None
        return jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(length)))(keys_B)

    def _run_layers(self, x_BTD, context, keys_BT, cache):
        """All blocks in order -> (x_BTD, cache, stats), the last two stacked over layers, or None; over the stages of a pipeline
        where the mesh has them. Stats are of `layers` only."""
        if mesh_size("stage") == 1:
            value, caches, first = None, {}, 0
            for name, length in self.stacks.items():
                graph, stacked = nnx.split(getattr(self, name))
                value, x_BTD, caches[name], stats = self._run_some(graph, stacked, first, x_BTD, value, context, keys_BT,
                                                                   None if cache is None else cache[name])
                first += length
            return x_BTD, None if cache is None else caches, stats
        graph, stacked = nnx.split(self.layers)
        value = jnp.zeros((*x_BTD.shape[:2], *self.value_shape), x_BTD.dtype) if self.value_residual else None
        known = all(len(table) == 1 for table in jax.tree.leaves(context.rope))  # the same for every row: not dealt out

        def stage(layers, first_layer, x, rows):
            rope, segment_ids, live, keys = rows
            here = context._replace(rope=context.rope if known else rope, segment_ids=segment_ids, live=live)
            value, x, _, stats = self._run_some(graph, layers, first_layer, *x, here, keys, None)
            return (x, value), stats

        rows = (None if known else context.rope, context.segment_ids, context.live, keys_BT)
        (x_BTD, _), stats = run_pipeline(stage, stacked, (x_BTD, value), rows, asked=self.microbatches,
                                         repeats=self.pipeline_repeats)
        return residual(x_BTD), None, stats

    def _run_some(self, graph, stacked, first_layer, x_BTD, value, context, keys_BT, cache):
        """The stacked blocks, from `first_layer` (traced in a pipeline) on -> (value, x_BTD, cache, stats). `value` is v_BSKH of
        the first layer of all, where value residuals need it. A scan goes over whole periods of the kinds of layers, so that
        they stay static."""
        length, period = len(jax.tree.leaves(stacked)[0]), len(self.pattern)

        def block(x, value, layers, place, kind):
            # `place` in a period is looked up in here: a layer's slice of what a scan goes over would be kept for the backward
            # pass, a second copy of all parameters, where the whole is there anyway.
            state, layer, layer_cache = layers if place is None else jax.tree.map(lambda a: a[place], layers)
            keys = fold_in(keys_BT, layer)
            x, value, *out = nnx.merge(graph, state)(x, context, kind, value, layer == 0, layer_cache, keys)
            return x, value if self.value_residual else None, out

        block = rematerialise(block, self.remat, static_argnums=(3, 4), prevent_cse=not self.scan)
        stack = lambda outs: jax.tree.map(lambda *a: jnp.stack(a), *outs)
        if not self.scan:
            outs = []
            for i, (state, layer_cache) in enumerate(unstack((stacked, cache), length)):
                x_BTD, value, out = block(x_BTD, value, (state, first_layer + i, layer_cache), None, self.pattern[i % period])
                outs.append(out)
            return value, x_BTD, *stack(outs)
        if self.value_residual and value is None:
            value = jnp.zeros((*x_BTD.shape[:2], *self.value_shape), x_BTD.dtype)

        def run_layer(carry, layers):
            x, value, out = block(*carry, layers, None, self.pattern[0])
            return (x, value), out

        def run_period(carry, xs_P):
            (x, value), outs = carry, []
            for i, kind in enumerate(self.pattern):
                x, value, out = block(x, value, xs_P, i, kind)
                outs.append(out)
            return (x, value), stack(outs)

        xs = (stacked, first_layer + jnp.arange(length), cache)
        if period == 1 and on_one_cpu():  # of a bfloat16 stack with one more axis, XLA makes a copy
            (x_BTD, value), out = jax.lax.scan(run_layer, (x_BTD, value), xs, unroll=self.scan_unroll)
            return value, x_BTD, *out
        xs = jax.tree.map(lambda a: row_major(a.reshape(-1, period, *a.shape[1:])), xs)
        (x_BTD, value), out = jax.lax.scan(run_period, (x_BTD, value), xs, unroll=self.scan_unroll)
        return value, x_BTD, *jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)

    @property
    def stacks(self) -> dict:
        """{"layers": number of layers}, and before them "first_layers" where there are any."""
        first = {"first_layers": self.num_dense} if self.num_dense else {}
        return {**first, "layers": self.num_layers - self.num_dense}

    @property
    def head_kernel(self):
        """(D, V): the transposed embedding where tied; with what scales logits in it."""
        kernel = self.head.weights() if hasattr(self, "head") else self.embedding[...].T
        return kernel if self.logit_scale == 1.0 else kernel * self.logit_scale

    def logits(self, x_BTD):
        """-> logits_BTV float32."""
        if hasattr(self, "head") or target.platform() != "cpu":
            logits_BTV = dense(x_BTD, self.head_kernel)
        else:
            # For few tokens XLA on a CPU turns the table round if it is not the product's left side; the barrier keeps it there.
            table_VD = self.embedding[...].astype(x_BTD.dtype)
            logits_VBT = jax.lax.optimization_barrier(jnp.einsum("VD,BTD->VBT", table_VD, x_BTD * self.logit_scale))
            logits_BTV = logits_VBT.transpose(1, 2, 0)
        return softcap(logits_BTV.astype(jnp.float32), self.final_softcap)

    def classes(self, h):
        """h (..., D), each of a text -> logits of its classes (..., num_classes), float32."""
        return self.classifier(h).astype(jnp.float32)

    def init_cache(self, batch: int, length: int):
        """For decoding up to `length` tokens: (tokens (B, S), {"layers": (keys, values)}), each (L, B, K, S, H); or whatever else
        the attention keeps of a text."""
        shapes = [[length if n is None else n for n in shape] for shape in self.cache_shapes]
        zeros = lambda L: tuple(jnp.zeros((L, batch, *shape), self.compute_dtype) for shape in shapes)
        return jnp.zeros((batch, length), jnp.int32), {name: zeros(layers) for name, layers in self.stacks.items()}


def stack_blocks(number: int, build, rngs):
    """`number` blocks, each parameter stacked along a new first axis."""
    return nnx.split_rngs(splits=number)(nnx.vmap(build, in_axes=0, out_axes=0))(rngs)


def unstack(tree, length: int) -> list:
    """A tree of stacked leaves -> one tree per layer. `split` has a concatenation as its gradient; indexing would have
    `length` full-size additions."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [[part[0] for part in jax.lax.split(leaf, [1] * length)] for leaf in leaves]
    return [structure.unflatten(layer) for layer in zip(*columns, strict=True)]


def on_one_cpu() -> bool:
    return target.platform() == "cpu" and not on_a_mesh()


def row_major(x):
    """As it is, for XLA on a CPU, which of itself may copy all layers to give a short axis another place in memory. On a mesh,
    saying so would gather them."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))) if on_one_cpu() else x


def softcap(x, cap: float):
    return cap * jnp.tanh(x / cap) if cap else x
