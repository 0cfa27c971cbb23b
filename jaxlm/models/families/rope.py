"""The part of config.json that tells of rope: `rope_parameters`, or as transformers 4 wrote it `rope_theta` and `rope_scaling`.
The older form is written: both versions read it."""

from jaxlm.models.families.family import Part
from jaxlm.models.rope_scaling import mscale

# rope_type: (our scaling, {its field: (our key, default)}); the default is what transformers takes.
KINDS = {
    "default": ("none", {}),
    "linear": ("linear", {"factor": ("rope_factor", None)}),
    "llama3": ("llama3", {"factor": ("rope_factor", None), "low_freq_factor": ("rope_low_freq_factor", None),
                          "high_freq_factor": ("rope_high_freq_factor", None)}),
    "yarn": ("yarn", {"factor": ("rope_factor", None), "beta_fast": ("rope_beta_fast", 32.0),
                      "beta_slow": ("rope_beta_slow", 1.0), "attention_factor": ("rope_attention_factor", 0.0),
                      "truncate": ("rope_truncate", True)}),
    "longrope": ("longrope", {"factor": ("rope_factor", None), "short_factor": ("rope_short_factors", ()),
                              "long_factor": ("rope_long_factors", ()), "attention_factor": ("rope_attention_factor", 0.0)}),
}
ORIGINAL = "original_max_position_embeddings"


def read_scaling(fields, values: dict) -> dict:
    """`values` of rope_parameters, what all kinds have left out -> our keys."""
    values = {name: value for name, value in values.items() if value is not None}
    kind = values.pop("rope_type", None) or values.pop("type", "default")
    values.pop("type", None)
    if kind == "su":
        kind = "longrope"  # as Phi-3 first called it
    if kind not in KINDS:
        fields.refuse("rope_scaling", kind, f"{', '.join(KINDS)} are")
        return {}
    scaling, names = KINDS[kind]
    longest = fields.take("max_position_embeddings")
    original = values.pop(ORIGINAL, None)
    original = fields.take(ORIGINAL, original) or longest
    keys = {"model.rope_scaling": scaling}
    if kind in ("llama3", "yarn", "longrope"):
        keys["model.rope_original_len"] = original
    for name, (key, default) in names.items():
        if name == "factor" and kind in ("yarn", "longrope"):
            default = longest / original
        value = values.pop(name, default)
        if value is None:
            fields.refuse(f"rope_scaling.{name}", None, "it must be given")
            continue
        if not isinstance(value, bool):
            value = tuple(map(float, value)) if isinstance(value, (list, tuple)) else float(value)
        keys[f"model.{key}"] = value
    if kind == "yarn":
        above, below = values.pop("mscale", 0), values.pop("mscale_all_dim", 0)
        if above and below and not keys["model.rope_attention_factor"]:
            factor = keys["model.rope_factor"]
            keys["model.rope_attention_factor"] = mscale(factor, above) / mscale(factor, below)
    for name, value in values.items():
        fields.refuse(f"rope_scaling.{name}", value, "it is unknown")
    return keys


def write_scaling(m) -> dict:
    """-> the fields at the top of config.json."""
    kind = next(kind for kind, (scaling, _) in KINDS.items() if scaling == m.rope_scaling)
    if kind == "default":
        return {"rope_scaling": None}
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    values = {"rope_type": kind, **{name: plain(m[key]) for name, (key, _) in KINDS[kind][1].items()}}
    if not m.rope_attention_factor:
        values.pop("attention_factor", None)
    if kind in ("llama3", "yarn"):
        return {"rope_scaling": values | {ORIGINAL: m.rope_original_len}}
    if kind == "longrope":  # transformers 4 takes the factor from these two
        return {"rope_scaling": values, ORIGINAL: m.rope_original_len,
                "max_position_embeddings": round(m.rope_factor * m.rope_original_len)}
    return {"rope_scaling": values}


def rope(default_theta: float = 10_000.0) -> Part:
    def read(fields):
        values = dict(fields.take("rope_parameters", None) or fields.take("rope_scaling", None) or {})
        fields.take("rope_scaling", None)
        theta, fraction = values.pop("rope_theta", None), values.pop("partial_rotary_factor", None)
        theta, fraction = fields.take("rope_theta", theta), fields.take("partial_rotary_factor", fraction)
        return {"model.position": "rope", "model.rope_theta": float(theta or default_theta),
                "model.rope_fraction": float(fraction or 1.0), **read_scaling(fields, values)}

    def write(config):
        m = config.model
        fraction = {"partial_rotary_factor": m.rope_fraction} if m.rope_fraction != 1 else {}
        return {"rope_theta": m.rope_theta, **fraction, **write_scaling(m)}

    return Part(read, write)


def rope_of_two(default_theta: float, default_local: float) -> Part:
    """Gemma 3: layers with a window have a theta of their own, and are not scaled."""

    def read(fields):
        new, old = dict(fields.take("rope_parameters", None) or {}), dict(fields.take("rope_scaling", None) or {})
        local, whole = dict(new.pop("sliding_attention", None) or {}), dict(new.pop("full_attention", None) or new or old)
        theta = fields.take("rope_theta", whole.pop("rope_theta", None) or default_theta)
        local_theta = fields.take("rope_local_base_freq", local.pop("rope_theta", None) or default_local)
        if (kind := local.pop("rope_type", "default")) != "default" or local:
            fields.refuse("rope_parameters.sliding_attention", {"rope_type": kind, **local}, "only an unscaled one is")
        return {"model.position": "rope", "model.rope_theta": float(theta), "model.rope_theta_local": float(local_theta),
                **read_scaling(fields, whole)}

    return Part(read, lambda config: {"rope_theta": config.model.rope_theta,
                                      "rope_local_base_freq": config.model.rope_theta_local, **write_scaling(config.model)})
