"""Hugging Face both ways: for every family the same logits as transformers, and the same bytes after a round trip."""

import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import CASES, PIECES, made, text_rows

from jaxlm.errors import UserError
from jaxlm.huggingface.load import load_params, open_source
from jaxlm.huggingface.save import config_extras, save
from jaxlm.huggingface.tensors import open_tensors
from jaxlm.parallel.mesh import build_mesh
from jaxlm.train.state import build_model, flatten_paths

WITHIN = 1e-4  # absolute, of logits of a few units
ISOLATED = ("--config.data.isolate_documents=True", "--config.mesh.data=1")


def opened(folder, *overrides, devices=1):
    source = open_source(str(folder), (*ISOLATED, *overrides))
    mesh = build_mesh(source.config, jax.devices()[:devices])
    model = build_model(source.config, source.config.model.vocab_size, "plain")
    return source, model, mesh, load_params(source, model, mesh)


def logits_of_rows(model, params):
    tokens, segments, positions = text_rows()

    @jax.jit
    def run(params):
        module = nnx.merge(model.graph, params)
        return module.logits(module.hidden(tokens, positions, segments)[0])

    return np.asarray(run(params))


def logits_by_the_token(model, params, tokens_T):
    """Through the key/value cache, one at a time."""

    @jax.jit
    def run(params):
        module = nnx.merge(model.graph, params)

        def step(carry, token):
            cache, index = carry
            x, cache, _ = module.hidden(token.reshape(1, 1), cache=cache, cache_index=index)
            return (cache, index + 1), module.logits(x)[0, 0]

        return jax.lax.scan(step, (module.init_cache(1, len(tokens_T)), 0), jnp.asarray(tokens_T))[1]

    return np.asarray(run(params))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    """At every position of a text, of two documents packed in a row, of one with padding, and token by token."""
    pytest.importorskip("transformers")
    folder, wanted = made(name)
    _, model, _, params = opened(folder)
    found = logits_of_rows(model, params)
    for (row, begin, end), logits in zip(PIECES, wanted, strict=True):
        np.testing.assert_allclose(found[row, begin:end], logits, atol=WITHIN, rtol=0, err_msg=f"row {row}, from {begin}")
    assert np.abs(wanted[0]).max() > 1
    np.testing.assert_allclose(logits_by_the_token(model, params, text_rows()[0][0]), wanted[0], atol=WITHIN, rtol=0)
