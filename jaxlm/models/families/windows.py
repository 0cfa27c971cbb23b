"""The part of config.json that tells which layers have a sliding window."""

from collections.abc import Callable

from jaxlm.models.families.family import Part

LETTERS = {"sliding_attention": "L", "full_attention": "G"}


def shortest_period(letters: str) -> str:
    """LGLGLG -> LG."""
    return next(letters[:p] for p in range(1, len(letters) + 1) if repeat(letters[:p], len(letters)) == letters)


def repeat(pattern: str, num_layers: int) -> str:
    return (pattern * num_layers)[:num_layers]


def window_of_all() -> Part:
    """A window in all layers, or in none (Mistral)."""

    def read(fields):
        window = fields.take("sliding_window", 0)
        return {"model.window": window, "model.window_pattern": "L"} if window else {}

    return Part(read, lambda config: {"sliding_window": config.model.window or None})


def windows(unlisted: Callable, switch: bool = False) -> Part:
    """`layer_types` tells it of each layer; in older files it does not, and `unlisted` does: (fields, number of layers) ->
    "LLG...". switch: `use_sliding_window` turns all off."""

    def read(fields):
        num_layers, window = fields.take("num_hidden_layers"), fields.take("sliding_window", 0)
        types, letters = fields.take("layer_types", None), unlisted(fields, num_layers)
        if switch and not fields.take("use_sliding_window", False):
            window, letters = 0, "G" * num_layers
        if types is not None:
            if unknown := set(types) - set(LETTERS):
                fields.refuse("layer_types", sorted(unknown), f"{' and '.join(LETTERS)} are")
                return {}
            letters = "".join(LETTERS[t] for t in types)
        if len(letters) != num_layers:
            fields.refuse("layer_types", f"{len(letters)} of them", f"num_hidden_layers is {num_layers}")
        if "L" not in letters:
            return {}
        if not window:
            fields.refuse("sliding_window", window, "layers with a window need its length")
        return {"model.window": window, "model.window_pattern": shortest_period(letters)}

    def write(config):
        m = config.model
        names = {letter: name for name, letter in LETTERS.items()}
        types = [names[letter] for letter in repeat(m.window_pattern, m.num_layers)]
        return {"sliding_window": m.window or None, "layer_types": types,
                **({"use_sliding_window": "L" in m.window_pattern} if switch else {})}

    return Part(read, write)
