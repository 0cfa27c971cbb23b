"""Language: which one a document is in, and whether it is wanted."""

import functools
import re

from jaxlm.data.cleaning.step import STEPS, Removed, needed
from jaxlm.errors import UserError
from jaxlm.registry import did_you_mean

LETTERS = re.compile(r"[^\W\d_]")


@functools.lru_cache(maxsize=1)  # once in a process, not once a shard
def load_identifier():
    langid = needed("py3langid.langid", "language")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@STEPS.register("language")
def build(options, context):
    """By py3langid (Lui and Baldwin, ACL 2012; Barbaresi), whose model of 140 languages comes in the package. The language and
    its probability stay with the document, as fields `language` and `language_score`."""
    identifier = load_identifier()
    if wrong := [name for name in options.keep if name not in identifier.labels]:
        raise UserError(*(f"prepare.language.keep: {name!r}: {did_you_mean(name, identifier.labels)}" for name in wrong))
    keep = set(options.keep)

    def step(record):
        if not LETTERS.search(record.text):  # nothing to tell it by
            language, score = "none", 0.0
        else:
            language, score = identifier.classify(record.text[: options.characters])
        language, score = str(language), round(float(score), 4)
        if keep and language not in keep:
            return Removed(f"language {language}", f"{score:.2f}")
        if keep and score < options.min_score:
            return Removed("language uncertain", f"{language} {score:.2f} < {options.min_score}")
        return record._replace(fields=record.fields | {"language": language, "language_score": score})

    return step
