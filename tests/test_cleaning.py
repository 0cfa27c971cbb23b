"""Each step on documents written for it, whose outcome is known."""

import string
from collections import Counter

import numpy as np
import pytest

from configs import default
from jaxlm.data.cleaning.decontamination import write_index
from jaxlm.data.cleaning.gopher import duplicate_ngram_share, top_ngram_share
from jaxlm.data.cleaning.pii import iban, luhn, resident
from jaxlm.data.cleaning.step import STEPS, Context, Removed, register_all
from jaxlm.data.cleaning.words import count_words, hash_ngrams, hash_words, is_han, ngram_size, units
from jaxlm.data.sources import Record
from jaxlm.errors import UserError

PROSE = ("The old man went to the sea with his boat and the net that he had mended. It was cold, and the wind came from the "
         "north. He did not mind it much, for he had been out in worse weather when he was young. ")
CHINESE = ("此开卷第一回也。作者自云：因曾历过一番梦幻之后，故将真事隐去，而借通灵之说，撰此石头记一书也。"
           "在我们看来，这是不可多得的人间奇书。")


def run(name, text, fields=None, **options):
    """-> the record after the step, or Removed; and the step's counts."""
    config = default.get_config()
    register_all(config)
    for key, value in options.items():
        config.prepare[name][key] = value
    context = Context(config, "", Counter())
    return STEPS[name](config.prepare[name], context)(Record(text, fields or {}, "here")), context.counts


def text_of(name, text, **options):
    return run(name, text, **options)[0].text


def reason_of(name, text, fields=None, **options):
    after = run(name, text, fields, **options)[0]
    return after.reason if isinstance(after, Removed) else None


@pytest.mark.parametrize("before, after", [
    ("schÃ¶n â€“ cafÃ©", "schön – café"),  # UTF-8 read as Latin-1
    ("e\u0301", "é"),
    ("a\u200bb\ufeffc\u00add\x00e\x07", "abcde"),
    ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
    ("a\u00a0b  \n\n\n\n\nc\n", "a b\n\nc"),
    ("    indented\n\tcode", "    indented\n\tcode"),
    ("他说：“全角，标点。”ＡＢ", "他说：“全角，标点。”ＡＢ"),  # full width is not repaired away
    ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),  # these joiners are letters
])
def test_unicode(before, after):
    assert text_of("unicode", before) == after


def test_unicode_forms_and_switches():
    assert text_of("unicode", "ＡＢ ﬁ ²", form="NFKC") == "AB fi 2"
    odd = "e\u0301\u00a0\u200b "
    assert text_of("unicode", odd, form="none", tidy_blanks=False, remove_invisible=False) == odd
    assert text_of("unicode", "schÃ¶n", repair=False) == "schÃ¶n"
    with pytest.raises(UserError, match="did you mean NFC"):
        text_of("unicode", "a", form="NFX")


PAGE = """<!DOCTYPE html><html><head><title>News</title><style>p{color:red}</style><script>var x = "a < b";</script></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav><article><h1>The sea</h1><p>The old man went to the sea &amp; came
back with <b>three</b> fish, which he sold on the market of the town for very little money.</p>
<p>Write &lt;p&gt; for a paragraph.</p>
</article><footer>Copyright 2020 Example Ltd. All rights reserved. <a href="/privacy">Privacy</a></footer></body></html>"""


def test_html_keeps_the_text_of_a_page_and_drops_its_boilerplate():
    text = text_of("html", PAGE)
    assert "went to the sea & came back with three fish" in text and "Write &lt;p> for a paragraph." in text
    assert not any(word in text for word in ("Home", "Copyright", "Privacy", "color", "var x", "<b>"))
    assert text_of("html", text) == text
    assert "Copyright" in text_of("html", PAGE, main_content=False)


def test_html_touches_only_markup():
    for text in ("if a < b and c > d: pass", "x <- 3; y<z", "I <3 you", "List<String> names", "AT&T and R&D"):
        assert text_of("html", text) == text
    assert text_of("html", "Great<br /><br />film, <i>really</i>").split() == ["Great", "film,", "really"]
    assert text_of("html", "Tom &amp; Jerry &amp;amp; co &#39;s") == "Tom & Jerry & co 's"
    assert reason_of("html", "<div><script>1</script></div>") == "no text in markup"


def test_pii_masks_each_kind_and_counts_it():
    text = ("Write to jane.doe+x@mail.example.co.uk or call +49 (0)30 901820 or (212) 555-0187 or 13812345678. "
            "Card 4111 1111 1111 1111, account DE89 3704 0044 0532 0130 00, SSN 078-05-1120, "
            "身份证11010519491231002X，server 8.8.8.8 and 2001:4860:4860::8888.")
    after, counts = run("pii", text)
    assert after.text == ("Write to [EMAIL] or call [PHONE] or [PHONE] or [PHONE]. Card [CARD], account [IBAN], SSN [SSN], "
                          "身份证[ID]，server [IP] and [IP].")
    assert counts == {"email": 1, "phone": 3, "card": 1, "iban": 1, "ssn": 1, "id": 1, "ip": 2, "changed": 1}
    assert text_of("pii", after.text) == after.text
    assert text_of("pii", text, kinds=("email",)) == text.replace("jane.doe+x@mail.example.co.uk", "[EMAIL]")
    with pytest.raises(UserError, match="did you mean email"):
        text_of("pii", "a", kinds=("emial",))


def test_pii_leaves_other_numbers():
    for text in ("In 1984-1985 they sold 1,234,567 units at 3.14159.", "Card 4111 1111 1111 1112",
                 "version 10.0.0.1, 192.168.1.7", "ISBN 978-3-16-148410-0", "at 12:30:45 on 2024-05-17", "11010519491231002X9",
                 "@property def a(self)", "std::vector"):
        assert text_of("pii", text) == text, text


def test_check_digits():
    assert luhn("4242424242424242") and not luhn("4242424242424241") and not luhn("0000000000000000")
    assert resident("11010519491231002X") and not resident("110105194912310021")
    assert iban("GB82 WEST 1234 5698 7654 32") and not iban("GB82 WEST 1234 5698 7654 33")


def test_punctuation_and_stop_words():
    assert text_of("punctuation", "Don't stop -- it's well-known (really)! 价：5€。") == "Don't stop it's well-known really 价 5"
    assert text_of("punctuation", "don't", keep_inside_words=False) == "don t"
    assert text_of("stop_words", "The cat is on the mat, isn't it? Theme") == "cat mat, ? Theme"
    assert text_of("stop_words", "我们的目标是和平") == "目标平"  # 和 goes out of 和平: the text was not cut
    assert text_of("stop_words", "我们 的 目标 是 和平", whole_words=True) == "目标 和平"
    assert text_of("stop_words", "虽的然大", languages=("zh",)) == "大"
    with pytest.raises(UserError, match="there are en, zh"):
        text_of("stop_words", "a", languages=("fr",))


def test_length():
    assert reason_of("length", " \n ") == "empty"
    assert reason_of("length", "abc", min_characters=4) == "too few characters"
    assert reason_of("length", "abcd", min_characters=4, max_characters=4) is None
    assert reason_of("length", "abcde", max_characters=4) == "too many characters"
    assert reason_of("length", "one two three", min_words=4) == "too few words"
    assert reason_of("length", "一二三四五六", min_words=4) is None
    assert reason_of("length", "one two three", max_words=2) == "too many words"
    assert reason_of("length", "ab\n" + "x" * 50, max_line_characters=49) == "too many characters in a line"


def test_c4_lines_and_documents(tmp_path):
    keep = "This is a good sentence.[1] Here is another one! And is this a third?"
    text = "\n".join(["Home | About", keep, "Please enable Javascript to see this page.", "Too short.",
                      "We have a privacy policy for all you do.", "And so on and so forth..."])
    assert text_of("c4", text) == keep.replace("[1]", "")
    assert text_of("c4", CHINESE + "\n上一页 下一页", min_sentences=3) == CHINESE
    assert reason_of("c4", "One sentence is all that there is here.") == "too few sentences"
    assert reason_of("c4", "no line ends in a mark") == "no line of prose"
    assert reason_of("c4", keep + " Lorem Ipsum dolor") == "lorem ipsum" and reason_of("c4", keep + "{") == "curly bracket"
    bad = tmp_path / "bad.txt"
    bad.write_text("sea\n坏话\n")
    assert reason_of("c4", PROSE.strip(), bad_words_file=str(bad)) == "bad word"
    assert reason_of("c4", "Season after season he was there. Two are here. Three are here.", bad_words_file=str(bad)) is None
    assert reason_of("c4", CHINESE + "说坏话。", bad_words_file=str(bad)) == "bad word"


@pytest.mark.parametrize("reason, text", [
    (None, PROSE * 2), (None, CHINESE * 3),
    ("too few words", PROSE[:100]),
    ("mean word length", "supercalifragilistic words notwithstanding incomprehensibilities " * 20),
    ("mean word length", "a b c d e f g h i j " * 10),
    ("too many hash signs", PROSE * 2 + "#" * 20), ("too many ellipses", PROSE * 2 + "... " * 20 + "end."),
    ("lines with bullets", "\n".join("- " + line for line in (PROSE * 3).split(". "))),
    ("lines ending in an ellipsis", "\n".join(line + "…" * (i % 2) for i, line in enumerate((PROSE * 3).split(".")))),
    ("words without letters", PROSE * 2 + "12 34 56 78 " * 10),
    ("too few stop words", "Ships sailed across dark waters while sailors sang songs about distant islands. " * 6),
    ("too few stop words", "山水风云天地日月星辰草木鸟兽虫鱼花果" * 8),
])
def test_quality(reason, text):
    assert reason_of("quality", text) == reason


def test_quality_asks_no_stop_words_of_other_languages():
    german = "Der alte Mann ging mit seinem Boot hinaus aufs Meer, weil ihm das Wetter gefiel und niemand auf ihn wartete. " * 4
    assert reason_of("quality", german) == "too few stop words"
    assert reason_of("quality", german, {"language": "de"}) is None


def distinct(n, seed=0):
    """n words, all different."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(string.ascii_lowercase), 6)) for _ in range(n)]


LONG = "a line that is so much longer than the rest"


@pytest.mark.parametrize("reason, text, options", [
    (None, " ".join(distinct(300)), {}), (None, CHINESE, {}),
    ("duplicate lines", "\n".join([*distinct(7), *["x"] * 5]), {}), (None, "\n".join([*distinct(7), *["x"] * 4]), {}),  # 4 of 12
    ("duplicate paragraphs", "\n\n".join([*distinct(7), *["x"] * 5]), {"max_duplicate_lines": 1.0}),
    ("characters in duplicate lines", "\n".join([*distinct(20), LONG, LONG]), {}),
    ("characters in duplicate paragraphs", "\n\n".join([*distinct(20), LONG, LONG]), {"max_duplicate_line_characters": 1.0}),
    ("characters in the most frequent 2-gram", " ".join(w + " aaaaaa bbbbbb" for w in distinct(50)), {}),
    ("characters in the most frequent 3-gram", " ".join(w + " aa bb cc" for w in distinct(50)), {"max_top_ngrams": (1., .4, 1.)}),
    ("characters in duplicate 5-grams", " ".join([*distinct(60), *distinct(40, 1), *distinct(60, 2), *distinct(40, 1)]), {}),
    (None, " ".join([*distinct(80), *distinct(15, 1), *distinct(80, 2), *distinct(15, 1)]), {}),  # 15 of 190 are 0.08
])
def test_repetition(reason, text, options):
    assert reason_of("repetition", text, **options) == reason


def test_repetition_by_hand():
    """Words of one letter: a b c d e x a b c d e. The 5-gram abcde comes twice: its second coming is 5 of 11 characters."""
    words = list("abcdexabcde")
    hashes, lengths = hash_words(words), np.ones(len(words), int)
    assert duplicate_ngram_share(hashes, lengths, 5) == 5 / 11
    assert duplicate_ngram_share(hashes, lengths, 6) == 0
    assert duplicate_ngram_share(hash_words(list("aaaaaa")), np.ones(6, int), 5) == 5 / 6  # overlaps are counted once
    assert top_ngram_share(hashes, lengths, 2) == 4 / 11  # ab, twice
    assert top_ngram_share(hash_words(list("abcdef")), np.ones(6, int), 2) == 0


def test_language():
    english, chinese = run("language", PROSE)[0], run("language", "我们今天去学校学习中文，老师说我们的进步很快。" * 2)[0]
    assert english.fields["language"] == "en" and english.fields["language_score"] > 0.9 and chinese.fields["language"] == "zh"
    assert reason_of("language", "Der alte Mann ging hinaus aufs Meer und kam nicht wieder.", keep=("en", "zh")) == "language de"
    assert reason_of("language", PROSE, keep=("en",), min_score=1.1) == "language uncertain"
    assert run("language", "12 + 34")[0].fields == {"language": "none", "language_score": 0.0}
    assert run("language", PROSE, {"url": "u"})[0].fields["url"] == "u"
    with pytest.raises(UserError, match="prepare.language.keep: 'english'"):
        run("language", "a", keep=("english",))


def test_decontamination_of_long_short_and_chinese_texts(tmp_path):
    """13 words, or the whole of a shorter text of at least 8; of Chinese 20 characters, or at least 12."""
    words = distinct(40, seed=7)
    english = [" ".join(words[:20]), " ".join(words[20:28]), " ".join(words[30:37])]
    chinese = "一二三四五六七八九十百千"
    (tmp_path / "q.txt").write_text("\n".join([*english, chinese, "山水风云天地日月星辰草木鸟兽虫鱼花果江河湖海"]))
    config = default.get_config()
    config.data.root, config.prepare.decontaminate.paths = str(tmp_path), "q.txt"
    register_all(config)
    write_index(config, tmp_path / "decontaminate.npz")
    step = STEPS["decontaminate"](config.prepare.decontaminate, Context(config, str(tmp_path), Counter()))

    def found(text):
        after = step(Record(text, {}, "here"))
        return after.detail.rpartition(":")[2] if isinstance(after, Removed) else None

    assert found(" ".join(["Before,", *words[5:18], "after."]).upper()) == "1"
    assert found("x " + ", ".join(words[5:17]) + " x") is None
    assert found("x " + "-".join(words[20:28])) == "2" and found(" ".join(words[20:27])) is None
    assert found(" ".join(words[30:37])) is None  # too short to look for
    assert found("前" + "一二三四五六七八九十，百千" + "后") == "4"
    assert found("山水风云天地日月星辰草木鸟兽虫鱼花果江河") == "5" and found("山水风云天地日月星辰草木鸟兽虫鱼花果江") is None


def test_words_of_any_script():
    assert units("Don't stop, it's 3 o’clock_now") == ["don't", "stop", "it's", "3", "o’clock", "now"]
    assert units("我爱GPT-4，ひらがな") == ["我", "爱", "gpt", "4", *"ひらがな"]
    assert count_words(units("我爱你们 hello")) == 1 + 4 / 1.5
    assert is_han(units("我爱 a")) and not is_han(units("我 a b")) and (ngram_size(13, True), ngram_size(13, False)) == (20, 13)


def test_hashes_are_the_same_everywhere():
    """Values written down, so that no machine and no later version may differ: stores of sketches would not fit together."""
    assert hash_words(["a", "爱"]).tolist() == [0x2f42665b399ef840, 0xcb8cbc3f1702d90c]
    assert hash_ngrams(hash_words(["a", "爱"]), 2).tolist() == [0x232e0b024ff9c1af]
    a, b = hash_words(["x", "a", "b", "c"]), hash_words(["a", "b", "c"])
    assert hash_ngrams(a, 3)[1] == hash_ngrams(b, 3)[0] and len(hash_ngrams(b, 4)) == 0


TEXTS = [PROSE, CHINESE, PAGE, "schÃ¶n &amp;lt;b&gt; <b>x</b>", "a\u200b<\u200bp>", "[[1]2] call (212) 555-0187",
         "&amp;amp;lt;br&gt;", "<p>Use &lt;div&gt; and &amp;lt;br&amp;gt;</p>", "ﬁ ＡＢ e\u0301\r\n\r\n\r\n\r\nx\u00a0",
         "8.8.8.8@x.org +49 30 123456 7", "虽的然"]


@pytest.mark.parametrize("name", ["unicode", "html", "pii", "punctuation", "stop_words", "c4"])
def test_a_step_done_twice_changes_nothing(name):
    rng = np.random.default_rng(0)
    mixed = ["".join(TEXTS[i][slice(*sorted(rng.integers(0, len(TEXTS[i]) + 1, 2)))] for i in rng.integers(0, len(TEXTS), 3))
             for _ in range(150)]
    for text in TEXTS + mixed:
        once = run(name, text, **({"min_sentences": 0} if name == "c4" else {}))[0]
        if not isinstance(once, Removed):
            again = run(name, once.text, **({"min_sentences": 0} if name == "c4" else {}))[0]
            assert again.text == once.text, (text, once.text)
