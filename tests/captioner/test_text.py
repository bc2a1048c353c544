"""Every rule for captions, and hypothesis against all of them together."""

import dataclasses
import re
import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from captioner.questions import class_noun, plainer_question, question
from captioner.text import (
    Caption,
    Rejected,
    Room,
    Rules,
    check,
    estimate_tokens,
    from_model,
    from_template,
    from_user,
    table,
)
from captioner.words import MARK, find_word

SUBJECT = Rules(
    trigger_word="TOK",
    lora_type="subject",
    prefix="",
    suffix="",
    class_noun="dog",
    t5=Room(estimate_tokens, 512),
    clip=Room(estimate_tokens, 77),
)
STYLE = dataclasses.replace(SUBJECT, lora_type="style", class_noun=None)
UNNAMED = dataclasses.replace(SUBJECT, class_noun=None)
ODD_WORDS = [
    "TOK",
    "<|image_pad|>",
    "</s>",
    '"quoted"',
    "it's",
    "Mr. X",
    "the image shows",
    "🐕",
    "👩🏽‍🚀",
    "כלב",
    "كلب صغير",
    "小狗",
    "ネコ",
    "หมา",
    "e\u0301te\u0301",
    "a" * 60,
    "a phrase of many words, with a comma, which is long enough.",
    "_x_",
    "*",
    "[trigger]",
]


# --- rule by rule


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("<think>A dog. What now?</think>A dog runs on sand.", "TOK dog runs on sand."),
        ("A dog runs<|im_end|> on </s>sand.", "TOK dog runs on sand."),
        ("A dog runs on sa\u0301nd.", "TOK dog runs on sánd."),
        ("**A dog** runs on `sand`.", "TOK dog runs on sand."),
        ("# Caption\n\n- A dog runs on sand.", "TOK dog runs on sand."),
        ('"A dog runs on sand."', "TOK dog runs on sand."),
        ("“A dog runs on sand.”", "TOK dog runs on sand."),
        ("A   dog\n runs\ton sand.", "TOK dog runs on sand."),
        ("A dog\u200b runs\x07 on sand\ue000.", "TOK dog runs on sand."),
    ],
)
def test_rule_1_normalises(raw: str, caption: str) -> None:
    assert from_model(raw, SUBJECT) == caption


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("I'm sorry, but I can't help with that.", "a refusal"),
        ("I’m so sorry, I can’t describe this.", "a refusal"),
        ("Please provide the image so I can describe it.", "a refusal"),
        ("As an AI, I have no eyes for dogs.", "a refusal"),
        ("A dog on a mat on a mat on a mat on a mat on a mat on a mat.", "repeats"),
        ("dog " * 30, "repeats"),
        ("一只小狗在草地上奔跑。", "Latin"),
        ("A dog, собака, on grass.", "Latin"),
        ("A dog on s\ufffd\ufffdnd.", "broken text"),
        ("A dog: [1] {2} (3) /4/ |5| =6= +7+ ~8~", "broken text"),
        ("", "fewer than three words"),
        ("A dog.", "fewer than three words"),
        ("The image shows a dog.", "fewer than three words"),
        ("<think>A dog runs on sand and never stops", "fewer than three words"),
        ("\U0010fffd" * 9, "fewer than three words"),
    ],
)
def test_rule_2_rejects_and_says_why(raw: str, reason: str) -> None:
    for rules in (SUBJECT, STYLE):
        made = from_model(raw, rules)
        assert isinstance(made, Rejected)
        assert reason in made.reason


def test_another_case_of_the_trigger_word_in_a_users_caption_is_written_as_typed() -> None:
    made = from_user("a tok on a Tok, not in a token", SUBJECT)
    assert made.text == "a TOK on a TOK, not in a token"
    assert made.note == "TOK was written in another case, and now as you typed it"
    assert from_user("TOK beside another tok", SUBJECT).text == "TOK beside another tok", "one stands there as typed"


def test_another_case_is_found_behind_a_longer_word_too() -> None:
    rules = dataclasses.replace(UNNAMED, trigger_word="Art")
    assert from_model("PARTY hats hang beside ART on a wall.", rules) == "PARTY hats hang beside Art on a wall."


def test_a_mode_says_what_a_caption_tells_and_what_it_leaves_to_the_word() -> None:
    asked = {mode: question(dataclasses.replace(SUBJECT, mode=mode)) for mode in ("character", "product", "general")}
    assert "the expression" in asked["character"]
    assert "what it stands or lies on" in asked["product"]
    assert "lettering or brand" in asked["product"]
    assert "Write a caption of the whole picture" in asked["general"]
    assert "TOK" not in asked["general"], "the word is put in front by code"
    assert "face, age" not in asked["general"]
    assert question(dataclasses.replace(STYLE, mode="style")) == question(STYLE)
    general = dataclasses.replace(STYLE, mode="general")
    said = "A cat sits on a wall. It is a watercolour painting with soft brushwork."
    assert from_model(said, STYLE) == "A cat sits on a wall, in the style of TOK."
    assert from_model(said, general) == said[:-1] + ", in the style of TOK."
    assert from_model(said, dataclasses.replace(UNNAMED, mode="general")) == f"TOK, a{said[1:]}"


def test_foreign_script_in_quotes_is_kept() -> None:
    assert from_model("A dog under a sign “営業中” at night.", SUBJECT) == "TOK dog under a sign “営業中” at night."


@pytest.mark.parametrize(
    "opener",
    [
        "The image shows ",
        "This photo depicts ",
        "In this image, ",
        "In the picture, we see ",
        "Here is a caption for the picture: ",
        "Here's your caption: ",
        "Caption: ",
        "Sure! Here is a short caption: ",
        "There is ",
        "This close-up photo captures ",
    ],
)
def test_rule_3_strips_openers(opener: str) -> None:
    assert from_model(opener + "a cat on a wall.", UNNAMED) == "TOK, a cat on a wall."


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("A dog runs on sand. The sea is calm. It is a", "TOK dog runs on sand. The sea is calm."),
        ("A dog runs on sand", "TOK dog runs on sand."),
        ("A dog runs on sand. A dog runs on sand.", "TOK dog runs on sand."),
        ("A dog runs on sand. The overall mood is serene.", "TOK dog runs on sand."),
        ("A dog runs on sand. The scene evokes joy.", "TOK dog runs on sand."),
        ("The atmosphere around a dog is calm.", "The atmosphere around TOK dog is calm."),
    ],
)
def test_rule_4_keeps_whole_sentences_that_say_something_new(raw: str, caption: str) -> None:
    assert from_model(raw, SUBJECT) == caption


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("A cat sits. It is drawn in flat colors.", "A cat sits."),
        ("A watercolor painting of a cat on a chair.", "A cat on a chair"),
        ("An old, faded photograph showing a ship at sea.", "A ship at sea"),
        ("A cat in a cartoon style sits.", "A cat in a cartoon style sits"),  # all of it names the style: kept
    ],
)
def test_rule_5_leaves_the_medium_out_of_a_style_caption(raw: str, caption: str) -> None:
    raw, caption = raw.replace("A cat sits.", "A cat sits there."), caption.replace("A cat sits.", "A cat sits there")
    assert from_model(raw, STYLE) == f"{caption}, in the style of TOK."


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("A dog runs on sand.", "TOK dog runs on sand."),
        ("The small, very old brown dog runs.", "TOK dog runs."),
        ("On sand, a sleeping dog lies.", "On sand, a sleeping TOK dog lies."),
        ("A man with a dog walks.", "A man with TOK dog walks."),
        ("A cat runs on sand.", "TOK, a cat runs on sand."),
        ("Hotdogs lie on sand.", "TOK, Hotdogs lie on sand."),
        ("TOK dog runs on sand.", "TOK dog runs on sand."),
        ("On sand lies tok.", "On sand lies TOK."),
        ("On sand lies TOKEN.", "TOK, On sand lies TOKEN."),
        ("TOK's ball lies near a dog.", "TOK's ball lies near a dog."),
    ],
)
def test_rule_6_names_the_subject_by_the_trigger_word(raw: str, caption: str) -> None:
    assert from_model(raw, SUBJECT) == caption


def test_rule_6_closes_a_style_caption_with_the_trigger_word() -> None:
    assert from_model("A cat sits. It sleeps!", STYLE) == "A cat sits. It sleeps, in the style of TOK."


@pytest.mark.parametrize(
    ("prefix", "suffix", "caption"),
    [
        ("A photo of TOK,", "", "A photo of TOK, a dog runs on sand."),
        ("", "as TOK wants.", "a dog runs on sand. as TOK wants."),
        ("", ", 35 mm film", "TOK dog runs on sand, 35 mm film"),
        ("Look:  ", " (end)", "Look:  TOK dog runs on sand. (end)"),
        ("A photo of TOKEN,", "", "A photo of TOKEN, TOK dog runs on sand."),
    ],
)
def test_rule_7_puts_prefix_and_suffix_verbatim(prefix: str, suffix: str, caption: str) -> None:
    rules = dataclasses.replace(SUBJECT, prefix=prefix, suffix=suffix)
    assert from_model("a dog runs on sand.", rules) == caption
    assert from_model(f"{prefix} a dog runs on sand. {suffix}", rules) == caption  # the model said them too


def test_rule_8_drops_sentences_then_clauses_then_words() -> None:
    raw = "A dog runs on sand, far from the sea, under clouds. The sea is calm."
    words = Room(lambda text: len(text.split()), 0)

    def within(limit: int) -> str | Rejected:
        return from_model(raw, dataclasses.replace(SUBJECT, t5=dataclasses.replace(words, limit=limit)))

    assert within(15) == "TOK dog runs on sand, far from the sea, under clouds. The sea is calm."
    assert within(14) == "TOK dog runs on sand, far from the sea, under clouds."
    assert within(10) == "TOK dog runs on sand, far from the sea."
    assert within(8) == "TOK dog runs on sand."
    assert within(4) == "TOK dog runs on."
    assert within(2) == Rejected("fewer than three words: 'A dog.'")


def test_rule_8_keeps_the_trigger_word_where_clip_reads_it() -> None:
    rules = dataclasses.replace(STYLE, clip=Room(lambda text: len(text.split()), 12))
    long = "A cat sits on a red chair. " + "The room has a bed, a lamp, and more. " * 2
    assert from_model(long, rules) == "A cat sits on a red chair, in the style of TOK."


# --- what users write


@pytest.mark.parametrize(
    ("given", "rules", "text", "noted"),
    [
        ("TOK, on Sand", SUBJECT, "TOK, on Sand", False),
        ("a  photo of *TOK*\n", SUBJECT, "a  photo of *TOK*", False),
        ("a photo of [trigger] in [Trigger]'s bed", SUBJECT, "a photo of TOK in TOK's bed", False),
        ("a dog on sand", SUBJECT, "TOK, a dog on sand", True),
        ("a tok on sand", SUBJECT, "a TOK on sand", True),
        ("a dog on sand", STYLE, "in the style of TOK, a dog on sand", True),
        ("一只小狗在草地上", dataclasses.replace(SUBJECT, trigger_word="小狗"), "一只小狗在草地上", False),
    ],
)
def test_a_users_caption_is_kept_and_gets_the_trigger_word(given: str, rules: Rules, text: str, noted: bool) -> None:
    caption = from_user(given, rules)
    assert (caption.text, caption.source) == (text, "yours")
    assert bool(caption.note) == noted


def test_a_users_long_caption_is_not_cut_but_told_of() -> None:
    given = "word " * 600 + "TOK"
    caption = from_user(given, SUBJECT)
    assert caption.text == given
    assert "CLIP" in caption.note
    assert "T5" in caption.note


# --- templates


def test_templates_name_the_trigger_word() -> None:
    assert from_template(UNNAMED) == Caption(text="A photo of TOK", source="template")
    assert from_template(SUBJECT).text == "A photo of TOK dog"
    assert from_template(STYLE).text == "in the style of TOK"
    assert from_template(dataclasses.replace(SUBJECT, prefix="TOK,", suffix="film")).text == "TOK, film"


def test_a_template_too_long_for_the_encoder_is_the_trigger_word_alone() -> None:
    assert from_template(dataclasses.replace(SUBJECT, t5=Room(lambda text: len(text.split()), 2))).text == "TOK"


# --- what can be refused before


def test_check_tells_all_faults_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)trigger_word is ' TOK'.*") as error:
        check(dataclasses.replace(SUBJECT, trigger_word=" TOK", prefix="a\nb", suffix="\ud800"))
    assert "autocaption_prefix holds '\\n'" in str(error.value)
    assert "autocaption_suffix holds '\\ud800'" in str(error.value)


def test_check_refuses_what_cannot_fit() -> None:
    check(dataclasses.replace(SUBJECT, prefix="TOK " + "word " * 200))
    with pytest.raises(ValueError, match="beyond the 77 tokens that CLIP reads"):
        check(dataclasses.replace(SUBJECT, prefix="word " * 200))
    with pytest.raises(ValueError, match="T5 reads 512"):
        check(dataclasses.replace(SUBJECT, suffix="word " * 600))


# --- the questions


def test_questions_name_the_subject_by_the_trigger_word_and_never_the_style() -> None:
    assert "TOK dog" in question(SUBJECT)
    assert "TOK dog" in plainer_question(SUBJECT)
    assert "TOK" not in question(STYLE) + plainer_question(STYLE)
    assert "behind it, so do not repeat them: , on film" in question(dataclasses.replace(STYLE, suffix=", on film"))


@pytest.mark.parametrize(
    ("answers", "noun"),
    [
        (["Dog", "a dog.", "**dog**", "puppy"], "dog"),
        (["dog", "dog", "puppy", "cat"], None),
        (["golden retriever"], "golden retriever"),
        (["It is a dog that runs", "dog", "dog"], "dog"),
        (["image", "image"], None),
        (["狗", "狗"], None),
        ([], None),
    ],
)
def test_the_class_noun_is_what_more_than_half_say(answers: list[str], noun: str | None) -> None:
    assert class_noun(answers) == noun


def test_the_table_has_a_line_for_each_picture_and_then_the_notes() -> None:
    assert table({"a.jpg": Caption(text="TOK a", source="yours", note="mended"), "bb.jpg": from_template(UNNAMED)}) == [
        "a.jpg   yours     TOK a",
        "bb.jpg  template  A photo of TOK",
        "a.jpg: mended",
    ]


def test_a_note_that_many_captions_share_is_told_once() -> None:
    captions = {f"{number}.jpg": Caption(text="TOK a", source="yours", note="mended") for number in range(5)}
    assert table(captions)[5:] == ["0.jpg, 1.jpg, 2.jpg and 2 more: mended"]


# --- whole words


@pytest.mark.parametrize(
    ("text", "word", "at"),
    [
        ("TOKEN TOK", "TOK", 6),
        ("a_TOK TOK_ éTOK TOK1", "TOK", -1),
        ("(TOK)", "TOK", 1),
        ("TOK-like", "TOK", 0),
        ("tok", "TOK", -1),
        ("TOK\u0301", "TOK", -1),
        ("一只小狗在", "小狗", 2),
        ("TOK狗", "TOK", 0),
        ("한국어로", "한국", -1),
        ("👩‍🚀", "👩", -1),
        ("👩🏽", "👩", -1),
        ("x<|a|>y", "<|a|>", 1),
        ("aaa aa", "aa", 4),
    ],
)
def test_a_whole_word_ends_where_its_letters_end(text: str, word: str, at: int) -> None:
    assert find_word(text, word) == at


# --- everything at once

PLAIN = st.sampled_from(
    ["A small dog", "the dog sits", "a woman walking a dog", " on the grass", "Trees stand behind it.", ". ", ", ", " "]
)
TRAPS = st.sampled_from(
    [
        *ODD_WORDS,
        "! ",
        "... ",
        "\n\n",
        "The image shows ",
        "In this image, we see ",
        "Caption: ",
        "there is a ",
        "A watercolor painting of ",
        "in the style of TOK",
        ", in the style of ",
        "The overall mood is calm. ",
        "I'm sorry, ",
        "please provide the image",
        "<|im_end|>",
        "<think>",
        "</think>",
        "<|im<|x|>_end|>",
        "**",
        "`",
        "__",
        "# ",
        '"',
        "“",
        "”",
        "'",
        "一只狗",
        "собака",
        "\u200b",
        "\u200d",
        "\u0301",
        MARK,
        "\ue000",
        "x y z w ",
    ]
)
LATIN = st.text(st.characters(max_codepoint=0x24F), max_size=8)
RAW = st.lists(st.one_of(PLAIN, PLAIN, PLAIN, TRAPS, LATIN), min_size=5, max_size=16).map("".join) | st.text(
    max_size=40
)
LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters=MARK), max_size=20)
WORD = st.one_of(st.sampled_from(ODD_WORDS), LINE.map(str.strip).filter(bool))
END = st.one_of(
    st.just(""),
    st.sampled_from(["A photo of TOK,", ", on film", " ", ".", "A", "TOK", "小狗", "The image shows"]),
    LINE,
)
RULES = st.builds(
    Rules,
    trigger_word=WORD,
    lora_type=st.sampled_from(["subject", "style"]),
    prefix=END,
    suffix=END,
    class_noun=st.sampled_from([None, "dog", "woman"]),
    t5=st.sampled_from([512, 40, 512]).map(lambda limit: Room(estimate_tokens, limit)),
    clip=st.sampled_from([77, 40]).map(lambda limit: Room(estimate_tokens, limit)),
)
BUDGET = settings(max_examples=200, derandomize=True, deadline=None, database=None)


def is_sound(text: str, rules: Rules) -> None:
    """What every caption made for a user holds."""
    word = rules.trigger_word
    assert find_word(text, word) >= 0
    assert text.startswith(rules.prefix)
    assert text.endswith(rules.suffix)
    assert rules.t5.holds(text)
    assert rules.clip.holds(text[: find_word(text, word) + len(word)])
    text.encode()


@BUDGET
@given(RAW, RULES)
def test_any_answer_becomes_a_sound_caption_or_is_rejected(raw: str, rules: Rules) -> None:
    try:
        check(rules)
    except ValueError:
        assume(False)
    is_sound(from_template(rules).text, rules)
    made = from_model(raw, rules)
    if isinstance(made, Rejected):
        assert made.reason
        return
    is_sound(made, rules)
    assert from_model(made, rules) == made
    body = made[len(rules.prefix) : len(made) - len(rules.suffix)].replace(rules.trigger_word, "TOK")
    assert not re.search(r"<\|.*?\|>|</?s>|</?think>", body)
    assert not [c for c in body if c == MARK or (unicodedata.category(c).startswith("C"))]


@BUDGET
@given(RAW.filter(str.strip), RULES)
def test_any_caption_of_a_user_gets_the_trigger_word_and_stays_as_it_is(given: str, rules: Rules) -> None:
    caption = from_user(given, rules)
    assert find_word(caption.text, rules.trigger_word) >= 0
    assert from_user(caption.text, rules).text == caption.text
    if find_word(given, rules.trigger_word) >= 0 and "[trigger]" not in given.lower():
        assert caption.text == given.strip()


@BUDGET
@given(RAW, st.sampled_from(ODD_WORDS), st.sampled_from([SUBJECT, STYLE]))
@example("A dog runs on sand.", "e\u0301te\u0301", SUBJECT)
def test_an_odd_trigger_word_changes_nothing_else(raw: str, word: str, rules: Rules) -> None:
    assume(word.casefold() not in raw.casefold() and "tok" not in raw.casefold())
    roomy = dataclasses.replace(rules, clip=Room(estimate_tokens, 512))
    plain, odd = from_model(raw, roomy), from_model(raw, dataclasses.replace(roomy, trigger_word=word))
    if isinstance(plain, str) and plain.count("TOK") == 1 and find_word(plain, word) < 0:
        assert odd == plain.replace("TOK", word)
