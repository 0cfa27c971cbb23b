"""WikiText-2, Tiny Shakespeare and two Chinese novels, cleaned: articles, a play and chapters as documents.

    jaxlm data prepare --config=configs/data/wikitext_shakespeare_novels.py --config.data.root=DATA --out=DIR
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.data.path = "wikitext-2/train.txt,tinyshakespeare/input.txt,zh-novels/*.txt"
    c.prepare.steps = ("unicode", "html", "pii", "length", "quality", "repetition", "language", "exact_duplicates",
                       "near_duplicates", "decontaminate")
    c.prepare.split_at = "^ = [^=]|^第.{1,6}回"  # an article of WikiText, a chapter of a novel
    c.prepare.shard_characters = 2**21
    c.prepare.quality.max_words = 0  # the plays are one document
    c.prepare.quality.min_alphabetic_words = 0.7  # in WikiText blanks stand round punctuation: its marks are words
    c.prepare.language.keep = ("en", "zh", "wuu")  # the novels' older Chinese is told as Wu now and then
    c.prepare.language.min_score = 0.5
    c.prepare.decontaminate.paths = "wikitext-2/valid.txt,wikitext-2/test.txt,lambada/lambada_test.jsonl"
    c.prepare.count_tokens = "byte"
    return default.debug(c) if arg == "debug" else c
