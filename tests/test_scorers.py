"What a scorer pays for: an answer that says the right thing, and nothing for one that says nothing."

import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.text import Text
from twin import make_coin

from cit_workbench import get_stream
from cit_workbench.figures import style
from cit_workbench.core.errors import CitError
from cit_workbench.measure.scores import column_scores, score_line
from cit_workbench.metrics import caption_words, cider, cider_scores
from cit_workbench.data.stream import all_streams
from cit_workbench.data.scorers import box_in, scorer_version, scorers
from cit_workbench.data.task import Example
from cit_workbench.files.scorers import _short, normalise_answer


def score(rule, text, answer, **meta):
    return scorers[rule](None, Example("a", None, "q", answer, meta=meta), text)


IMAGENET = [
    "American coot",
    "tabby cat",
    "cat",
    "golden retriever",
    "bird of paradise",
    "acorn",
    "ice cream",
    "tench",
    "hen",
    "great white shark",
    "digital watch",
    "electric ray",
    "house finch",
    "junco",
]


# Names


@pytest.mark.parametrize(
    "constant",
    [
        "a",
        "A",
        "e",
        "n",
        "the",
        "of",
        ".",
        "?",
        "",
        " ",
        "-",
        "an",
        "not a cat",
        ", ".join(IMAGENET),
        " or ".join(IMAGENET[:2]),
        "\n".join(IMAGENET),
    ],
)
@pytest.mark.parametrize("rule", ["contains", "places365"])
def test_no_degenerate_answer_is_paid_on_names(rule, constant):
    assert [score(rule, constant, name) for name in IMAGENET] == [0] * len(IMAGENET)


@pytest.mark.parametrize(
    "text, name, right",
    [
        ("American coot", "American coot", 1),
        ("american coot.", "American coot", 1),
        ("Cat", "cat", 1),
        ("coot", "American coot", 1),
        ("It is an American coot", "American coot", 1),
        ("a cat, sitting on a mat", "cat", 1),
        ("Americ", "American coot", 0),
        ("coots", "American coot", 0),
        ("cattle", "cat", 0),
        ("concatenate", "cat", 0),
        ("not an American coot", "American coot", 0),
        ("that isn't a cat", "cat", 0),
        ("cat or dog", "cat", 0),
        ("cat, dog, horse", "cat", 0),
        ("cat | dog | horse", "cat", 0),
        ("cat - dog - horse", "cat", 0),
        ("1. cat 2. dog 3. horse", "cat", 0),
        ("1. cat", "cat", 1),
        ("a cat - or a kitten", "cat", 0),
        ("a cat - sitting", "cat", 1),
        ("paradise", "bird of paradise", 1),
        ("x", "x", 1),
        ("C++", "C++", 1),
        ("黑猫", "黑猫", 1),
        ("一只黑猫", "黑猫", 1),
        ("黑", "黑猫", 0),
        ("?", "?", 1),
        ("", "", 0),
        ("black and white ruffed lemur", "black and white ruffed lemur", 1),
        ("a no entry sign", "no entry sign", 1),
    ],
)
def test_names_are_right_by_whole_words(text, name, right):
    assert score("contains", text, name) == score("places365", text, name) == right


def test_the_released_rules_keep_their_names():
    assert [score("contains, as released", t, "American coot") for t in ("A", "n", "", "american coot")] == [1, 1, 1, 0]
    assert [score("places365, as released", t, "American coot") for t in ("A", "z", "american")] == [1, 0, 1]
    assert [score("gqa, as released", t, "Yes") for t in ("Yes", "yes.")] == [0, 0] and score("gqa", "YES.", "Yes") == 1
    assert score("gqa, as released", "YES.", "yes") == 1 and score("gqa", "YES.", "yes") == 1
    assert score("box, as released", "0.1, 0.2, 0.5, 0.6", "[0.1, 0.2, 0.5, 0.6]") == 0


def test_released_takes_every_released_rule(tmp_path):
    own = make_coin(tmp_path / "CoIN")
    rules = lambda **args: [t.format.scorer for t in get_stream(f"coin:{own}", **args)]
    assert rules() == ["letter", "contains", "box", "equal"]
    assert rules(released=True) == ["letter", "contains, as released", "box, as released", "equal, as released"]
    sets = own / "playground" / "Instructions_Original"
    for name in ("GQA", "Places365", "OCRVQA"):
        shutil.copytree(sets / "ImageNet", sets / name)
    assert rules(tasks="GQA,Places365,OCRVQA") == ["gqa", "places365", "ocrvqa"]
    assert rules(tasks="GQA,Places365,OCRVQA", released=True) == [
        f"{r}, as released" for r in ("gqa", "places365", "ocrvqa")
    ]


# Empty answers and references


@pytest.mark.parametrize("rule", sorted({*scorers} - {"accuracy", "caption"}))
@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_answer_is_never_right(rule, text):
    if rule.endswith("as released"):
        return
    for answer in ("", "cat", "the", "[0.1, 0.2, 0.3, 0.4]"):
        for meta in ({}, {"references": []}, {"references": ["", "cat"]}, {"answers": []}, {"answers": ["the"] * 10}):
            assert score(rule, text, answer, **meta) == 0


@pytest.mark.parametrize("rule", sorted({*scorers} - {"accuracy", "caption", "box", "letter", "box, as released"}))
def test_empty_lists_of_references_mean_the_answer(rule):
    for meta in ({"references": []}, {"answers": []}, {"answers": ["dog"] * 3}):
        assert score(rule, "cat", "cat", **meta) == 1


def test_empty_captions_and_references_have_scores(tmp_path):
    own = make_coin(tmp_path / "CoIN", tasks=("ImageNet",))
    task = get_stream(f"coin:{own}", scorers={"ImageNet": "words"}).tasks[0]
    lines = [
        score_line(task, Example(f"{i}", None, "q", "a red cat", meta={"references": []}), t)
        for i, t in enumerate(["", "."])
    ]
    got = column_scores(task, lines)
    assert got["cider"] == 0 and got["formatted"] == 0
    with pytest.raises(CitError, match="at least one reference"):
        cider_scores(["a cat"], [[]])


# Boxes


@pytest.mark.parametrize(
    "text, box",
    [
        ("[0.1, 0.2, 0.5, 0.6]", [0.1, 0.2, 0.5, 0.6]),
        ("0.1,0.2,0.5,0.6", [0.1, 0.2, 0.5, 0.6]),
        ("(0.1 0.2 0.5 0.6).", [0.1, 0.2, 0.5, 0.6]),
        (" [1e-1, .2, 5E-1, 0.6] ", [0.1, 0.2, 0.5, 0.6]),
        ("the box is [0.1, 0.2, 0.5, 0.6]", []),
        ("0.1 of 0.2, or 0.5 of 0.6", []),
        ("[0.1, 0.2, 0.5]", []),
        ("[0.1, 0.2, 0.5, 0.6, 0.7]", []),
        ("", []),
        ("[]", []),
        ("x0.1, 0.2, 0.5, 0.6", []),
        ("10%, 20%, 50%, 60%", []),
        ("[0.1, 0.2], [0.5, 0.6]", []),
        ("one, two, three, four", []),
        ("nan, 0, 1, 1", []),
    ],
)
def test_a_text_is_a_box_or_it_is_none(text, box):
    assert box_in(text) == box and score("box", text, "[0.1, 0.2, 0.5, 0.6]") == float(bool(box))


# TextVQA


def test_the_normaliser_knows_what_the_released_one_knows():
    same = {
        "oclock": "o'clock",
        "whats": "what's",
        "hes": "he's",
        "couldnt've": "couldn't've",
        "couldn'tve": "couldn't've",
        "ow's'at": "ow 's'at",
        "'ows'at": "'ow's'at",
        "y'alldve": "y'alldve",
        "y'all'dve": "y'all'd've",
        "twas": "'twas",
        "somebody'd": "somebodyd",
        "im": "im",
        "ive": "ive",
        "thatd": "thatd",
        "id've": "id've",
        "let's": "let 's",
        "mustntve": "mustntve",
        "shouldn'tve": "shouldn't've",
        "wheres": "where's",
        "dog's": "dog 's",
    }
    assert {w: normalise_answer(w) for w in same} == same
    assert Counter(v.count("'") for v in _short.values()) == {1: 73, 2: 34, 3: 6, 0: 1}
    assert normalise_answer("u.s.a. 3.5 10,000 Two a/b x-y; end") == "usa 3.5 10000 2 b x y end"
    assert normalise_answer("." * 40 + "x") == "." * 8 + "x" and normalise_answer("." * 32) == ""


def test_ten_people_decide_and_fewer_do_not():
    ten = {"answers": ["nokia"] * 2 + ["the Nokia."] + ["phone"] * 7}
    assert (
        score("textvqa", "nokia", "x", **ten) == pytest.approx((3 * 2 / 3 + 7) / 10)
        and score("textvqa", "Phone", "x", **ten) == 1
    )
    assert (
        score("textvqa", "the", "x", answers=["the"] * 10) == 1 and score("textvqa", "", "x", answers=["the"] * 10) == 0
    )
    assert score("textvqa", "x", "x", answers=["y"] * 9) == 1


# Words


@pytest.mark.parametrize(
    "text, words",
    [
        ("A red circle, isn't it?", ["a", "red", "circle", "isn't", "it"]),
        ("un café noir", ["un", "café", "noir"]),
        ("снег_идёт", ["снег", "идёт"]),
        ("棕色的狗", ["棕", "色", "的", "狗"]),
        ("犬がいる。", ["犬", "が", "い", "る"]),
        ("iPhone手机", ["iphone", "手", "机"]),
        ("หมา", ["ห", "ม", "า"]),
        ("सफ़ेद कुत्ता", ["सफ़ेद", "कुत्ता"]),
        ("개가 달린다", ["개가", "달린다"]),
        ("cafe\u0301", ["cafe\u0301"]),
        ("…。", []),
    ],
)
def test_words_of_any_script(text, words):
    assert caption_words(text) == words


def test_a_caption_that_is_right_but_for_one_character_keeps_most_of_its_score():
    pairs = [
        ("一只棕色的狗在草地上跑。", "一只黑色的狗在草地上跑。"),
        ("茶色い犬が芝生を走っている。", "黒い犬が芝生を走っている。"),
        ("สุนัขสีดำวิ่งบนหญ้า", "สุนัขสีแดงวิ่งบนหญ้า"),
    ]
    for true, said in pairs:
        assert 0.7 < score("words", said, true) < 1 == score("words", true, true)
        refs = [[true], ["一辆红色的汽车停在路边。"], ["猫がいる。"]]
        assert 0 < cider_scores([said, "x", "x"], refs)[0] < cider_scores([true, "x", "x"], refs)[0]
    assert cider(["a red cat"], ["a red cat"]) == cider(["a red cat"], [["a red cat"]])


# Versions


def test_every_scorer_has_a_version_and_the_embedded_ones_are_the_first():
    used = {t.format.scorer or t.format.kind for name in all_streams() for t, _ in get_stream(name).roles()}
    assert used == {"accuracy", "caption"} and all(scorer_version(rule) == 1 for rule in used)
    changed = {"box", "contains", "equal", "gqa", "letter", "ocrvqa", "places365", "textvqa", "words"}
    assert {rule for rule in scorers if scorer_version(rule) == 2} == changed
    with pytest.raises(CitError, match="unknown scorer"):
        scorer_version("fuzzy")


# Names of tasks in figures


def a_font(path, text):
    "A font file in which every character of `text` is a square."
    font, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    glyphs = {".notdef": pen.glyph(), **{f"u{ord(c):x}": pen.glyph() for c in text}}
    font.setupGlyphOrder([*glyphs])
    font.setupCharacterMap({ord(c): f"u{ord(c):x}" for c in text})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics({g: (800, 0) for g in glyphs})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular", "psName": "Squares"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


def drawn(name):
    "A picture with a task's name at its axis, its files, and the warnings."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        picture = style.Picture(2, 1.5)
        picture.figure.add_subplot().set_xticks([0, 1], [name, "cat"])
        files = [picture.data(f) for f in ("png", "pdf", "svg")]
    return picture, files, [str(w.message) for w in said]


@pytest.fixture
def no_font_known():
    "Nothing is remembered about fonts, before and after."
    forget = lambda: (style._fonts_for.cache_clear(), style._told.clear())
    forget()
    yield
    forget()


def test_a_name_that_no_font_has_is_told_in_one_sentence(no_font_known):
    name = "\U000f1234\U000f1235"  # For private use: no font has them
    _, _, said = drawn(name)
    assert len(said) == 1 and repr(name) in said[0] and "DejaVu Sans" in said[0] and "\n" not in said[0]
    assert drawn(name)[2] == [] and drawn("кот")[2] == []


def test_a_font_that_has_the_name_is_put_behind_ours(no_font_known, tmp_path):
    name = "\U000f1234\U000f1235"
    a_font(tmp_path / "squares.ttf", name)
    entries = font_manager.fontManager.ttflist
    font_manager.fontManager.addfont(tmp_path / "squares.ttf")
    try:
        picture, files, said = drawn(name)
        families = {tuple(t.get_fontfamily()) for t in picture.figure.findobj(Text) if t.get_text() == name}
        assert said == [] and families == {("DejaVu Sans", "Squares")} and b"Squares" in files[2]
    finally:
        entries[:] = [e for e in entries if e.name != "Squares"]


def test_figures_of_latin_names_are_the_same_bytes(no_font_known):
    a, b = drawn("cat")[1], drawn("cat")[1]
    assert a == b and np.frombuffer(a[0], np.uint8).size > 1000
