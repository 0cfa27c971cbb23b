"""Rope for contexts longer than those trained on. A scaling is (config, frequencies_R) -> (frequencies_R, factor): the rotated
queries and keys are multiplied by `factor`. Frequencies are radians a token, float32, the highest first."""

import math

import numpy as np

from jaxlm.errors import UserError
from jaxlm.registry import Registry

SCALINGS = Registry("rope scaling", key="model.rope_scaling")


@SCALINGS.register("none")
def none(config, frequencies_R):
    return frequencies_R, 1.0


@SCALINGS.register("linear")
def linear(config, frequencies_R):
    """Positions are divided (Chen et al., arXiv:2306.15595)."""
    return frequencies_R / np.float32(config.model.rope_factor), 1.0


@SCALINGS.register("llama3")
def llama3(config, frequencies_R):
    """Long waves are stretched, short ones are not, and those between in part (Llama 3.1)."""
    m = config.model
    low, high = m.rope_low_freq_factor, m.rope_high_freq_factor
    turns_R = m.rope_original_len * frequencies_R / (2 * np.pi)
    kept_R = np.clip((turns_R - low) / (high - low), 0, 1)
    return (frequencies_R * (kept_R + (1 - kept_R) / m.rope_factor)).astype(np.float32), 1.0


def mscale(factor: float, weight: float = 1.0) -> float:
    """How much YaRN sharpens attention. DeepSeek has two weights: with `mscale`, and over that with `mscale_all_dim`, rotated
    queries and keys are multiplied (model.rope_attention_factor); by the square of that with `mscale_all_dim`, all scores
    (model.attention_score_factor)."""
    return 0.1 * weight * math.log(max(factor, 1)) + 1


@SCALINGS.register("yarn")
def yarn(config, frequencies_R):
    """As llama3, by the place of a wave among all (Peng et al., arXiv:2309.00071)."""
    m, R = config.model, 2 * len(frequencies_R)
    place = lambda turns: R * math.log(m.rope_original_len / (turns * 2 * math.pi)) / (2 * math.log(m.rope_theta))
    down, up = (math.floor, math.ceil) if m.rope_truncate else (float, float)
    first, last = max(down(place(m.rope_beta_fast)), 0), min(up(place(m.rope_beta_slow)), R - 1)
    stretched_R = np.clip((np.arange(R // 2) - first) / max(last - first, 0.001), 0, 1)
    factor = m.rope_attention_factor or mscale(m.rope_factor)
    return (frequencies_R * (1 - stretched_R + stretched_R / m.rope_factor)).astype(np.float32), factor


@SCALINGS.register("longrope")
def longrope(config, frequencies_R):
    """Each wave has a divisor of its own, another for long contexts (Ding et al., arXiv:2402.13753). Which of the two is told by
    seq_len, for all tokens: keys in a cache could not be rotated again once a text has grown long."""
    m = config.model
    name, divisors = "short", m.rope_short_factors
    if config.seq_len > m.rope_original_len:
        name, divisors = "long", m.rope_long_factors
    if len(divisors) != len(frequencies_R):
        raise UserError(f"model.rope_{name}_factors: has {len(divisors)} numbers; give {len(frequencies_R)}, one for two rotated "
                        "numbers of a head")
    factor = m.rope_attention_factor
    if not factor:
        factor = math.sqrt(1 + math.log(m.rope_factor) / math.log(m.rope_original_len)) if m.rope_factor > 1 else 1.0
    return frequencies_R / np.array(divisors, np.float32), factor
