"""Learning-rate schedules: completed steps -> share of the peak learning rate, in [0, 1]. Each begins with a linear
warm-up whose first update is not zero, and ends at `schedule.final_fraction` with the last update."""

import jax.numpy as jnp

from jaxlm.config import steps_of
from jaxlm.registry import Registry

SCHEDULES = Registry("schedule", key="schedule.name")


def build_schedule(config):
    """-> schedule(step): `step` is the number of completed steps (traced), so schedule(0) is for the first update."""
    body = SCHEDULES[config.schedule.name](config)
    warmup = steps_of(config.schedule.warmup_steps, config, "schedule.warmup_steps")
    span = max(1, config.steps - 1 - warmup)

    def schedule(step):
        progress = jnp.clip((step - warmup) / span, 0.0, 1.0)
        return jnp.where(step < warmup, (step + 1) / max(1, warmup), body(progress)).astype(jnp.float32)

    return schedule


@SCHEDULES.register("constant")
def constant(config):
    return lambda progress: jnp.ones_like(progress)


@SCHEDULES.register("linear")
def linear(config):
    final = config.schedule.final_fraction
    return lambda progress: 1 - (1 - final) * progress


@SCHEDULES.register("cosine")
def cosine(config):
    final = config.schedule.final_fraction
    return lambda progress: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


@SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(config):
    """1/sqrt(progress), from 1 to final_fraction; below 0.1, the curve that ends at 0.1 is stretched down to it."""
    final = config.schedule.final_fraction
    floor = max(final, 0.1)
    stretch = (1 - final) / (1 - floor) if final < floor else 1.0
    return lambda progress: 1 - stretch * (1 - 1 / jnp.sqrt(1 + progress * (floor**-2 - 1)))


@SCHEDULES.register("wsd")
def wsd(config):
    """Warm-up, stable, decay (arXiv:2404.06395); the 1-sqrt decay is of arXiv:2405.18392."""
    final, shape = config.schedule.final_fraction, config.schedule.decay_shape
    decay = max(1, steps_of(config.schedule.decay_steps, config, "schedule.decay_steps"))
    warmup = steps_of(config.schedule.warmup_steps, config, "schedule.warmup_steps")
    share = min(1.0, decay / max(1, config.steps - 1 - warmup))

    def body(progress):
        into = jnp.clip((progress - (1 - share)) / share, 0.0, 1.0)
        return 1 - (1 - final) * (jnp.sqrt(into) if shape == "1-sqrt" else into)

    return body
