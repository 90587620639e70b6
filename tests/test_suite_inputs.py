"What the files of a suite hold that cannot be learned or asked as it is: refused by record, or counted in one line."

import json
import re
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from twin import edit, make_coin, make_twin

from cit_workbench import Run, get_stream
from cit_workbench.core.errors import CitError
from cit_workbench.metrics import count_words
from cit_workbench.data.stream import all_streams
from cit_workbench.files import images
from cit_workbench.files.export import export
from cit_workbench.files.formats import guess_scorer, make_format
from cit_workbench.files.records import is_box
from cit_workbench.files.rows import read_rows
from cit_workbench.protocol import content, read_lock

SETS = "playground/Instructions_Original"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return str(make_twin(tmp_path_factory.mktemp("twin") / "llava"))


@pytest.fixture
def own(tmp_path):
    return make_coin(tmp_path / "CoIN")


def heard(f):
    "What `f` gives, and the warnings on the way."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return f(), [str(w.message) for w in said]


def talk(*turns, **more):
    "A training record; turns alternate between human and gpt."
    said = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]
    return {"id": 7, **more, "conversations": said}


def rows_of(tmp_path, *records, split="train"):
    "The rows of one file."
    (tmp_path / "file.json").write_text(json.dumps(records))
    return read_rows(tmp_path / "file.json", split)[0]


# Marks in text

ONE = {"image": "a.jpg"}
KEPT = [
    (
        talk("Which SVG tag embeds a picture?", "Use the <image> tag, not <video>."),
        ("Which SVG tag embeds a picture?", "Use the <image> tag, not <video>."),
    ),
    (talk("<image>\nWhich tag embeds a picture?", "<image>", **ONE), ("Which tag embeds a picture?", "<image>")),
    (talk("<image>\nPaths?", "Picture 1: <img>x.png</img>", **ONE), ("Paths?", "Picture 1: <img>x.png</img>")),
    (talk("Look at <image> and say what it is.", "cat", **ONE), ("Look at and say what it is.", "cat")),
    (talk("What is it?\n<image>", "cat", **ONE), ("What is it?", "cat")),
    (talk("What is it?", "cat", **ONE), ("What is it?", "cat")),
    (
        talk("What does <video> do in HTML?", "It embeds a film."),
        ("What does <video> do in HTML?", "It embeds a film."),
    ),
]


@pytest.mark.parametrize("record, says", KEPT)
def test_only_the_mark_of_a_picture_is_taken_out_of_text(tmp_path, record, says):
    (row,) = rows_of(tmp_path, record)
    assert (row.question, row.answer) == says and row.image == record.get("image")


def test_marks_in_test_records_and_closed_sets(tmp_path):
    record = {
        "question_id": 1,
        "image": "a.jpg",
        "text": "<image>\nWhich tag?",
        "answer": ["<image>", "the <image> tag"],
        "choices": ["<image>", " <img>"],
    }
    (row,) = rows_of(tmp_path, record, split="test")
    assert row.question == "Which tag?" and row.more["references"] == ["<image>", "the <image> tag"]
    assert row.more["choices"] == ("<image>", "<img>")
    qwen = {"question_id": 1, "text": "Picture 1: <img>b.png</img>\nWhat is it?", "answer": "cat"}
    (row,) = rows_of(tmp_path, qwen, split="test")
    assert (row.image, row.question) == ("b.png", "What is it?")


BLIND = [
    (talk("<image>\nWhat is it?", "cat"), "<image>, but the record has no picture"),
    (talk("<image>\nWhat is it?", "cat", image=None), "<image>, but the record has no picture"),
    (talk("What is it?", "cat", "And in <image>?", "dog"), "'conversations[2].value' of record 1 holds <image>"),
    (talk("<image>\n<image>\nWhich is larger?", "the first", **ONE), "holds <image> 2 times"),
    (talk("<image>\nQ0? and <image>\nQ1?", "yes", **ONE), "holds <image> 2 times"),
    (talk("<video>\nWhat happens?", "a fall", video="a.mp4"), "field 'video' of record 1 is not shown"),
    (talk("<video>\nWhat happens?", "a fall", **ONE), "holds <video>, but only still pictures"),
    (talk("What do you hear?\n<audio>", "rain"), "holds <audio>, but only still pictures"),
    (talk("What do you hear?", "rain", audio=["a.wav"]), "field 'audio' of record 1 is not shown"),
    (talk("What happens?", "a fall", video="a.mp4", **ONE), "field 'video' of record 1 is not shown"),
    (talk("What is it?", "cat", images=["a.jpg"]), "field 'images' of record 1 is not shown"),
    (talk("What is it?", "cat", images=["a.jpg", "b.jpg"], **ONE), "field 'images' of record 1 is not shown"),
    (talk("Are they the same?", "no", image2="b.jpg", **ONE), "field 'image2' of record 1 is not shown"),
    (talk("Are they the same?", "no", image_1="a.jpg", image_2="b.jpg"), "field 'image_1' of record 1 is not shown"),
    *(
        (talk("What is it?", "cat", **{key: "a.jpg"}), f"field '{key}' of record 1 is not shown")
        for key in ("image_path", "img", "image_file", "picture", "image_url")
    ),
    *(
        (talk("What is it?", "cat", **{key: ["a.jpg"]}), f"field '{key}' of record 1 is not shown")
        for key in ("file_name", "filename", "source", "image_1", "image0", "image_file_names", "image_base64")
    ),
    (talk("Which is larger?", "the first", image2="b.jpg", **ONE), "field 'image2' of record 1 is not shown"),
    (talk("What is it?", "cat", images=["b.jpg"], **ONE), "field 'images' of record 1 is not shown"),
    *(
        (talk(f"{mark}What is it?", "cat"), f"begins with {begin}, but the record has no picture")
        for mark, begin in (
            ("<IMAGE>\n", "<IMAGE>"),
            ("<image_0>\n", "<image_0>"),
            ("<image 1> ", "<image 1>"),
            ("<|image_1|>\n", "<|image_1|>"),
            ("<ImageHere>", "<ImageHere>"),
            ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>"),
            ("<img>a.png</img>", "<img>"),
            ("Look.\n<image_0>\n", "<image_0>"),
        )
    ),
    (
        {"conversations": [{"from": "human", "value": "What?", "image": "a.jpg"}, {"from": "gpt", "value": "cat"}]},
        "field 'conversations[0].image' of record 1 is not shown",
    ),
    (
        talk("<image>\nWhat?", "cat", "Which tag, <image> or <img>?", "<img>", **ONE),
        "'conversations[2].value' of record 1 holds <image> as an earlier turn does",
    ),
    (talk("Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nSame?", "no"), "record 1 names several pictures"),
    (talk("Picture 1: <img>b.png</img>\nWhat?", "cat", **ONE), "record 1 names several pictures"),
]


@pytest.mark.parametrize("record, says", BLIND)
def test_what_would_be_learned_blind_is_refused_by_record(tmp_path, record, says):
    with pytest.raises(CitError) as e:
        rows_of(tmp_path, talk("Why?", "so"), record)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "more, says",
    [
        ({"text": "<image>\nWhat is it?"}, "'text' of record 1 holds <image>, but the record has no picture"),
        ({"text": "What is it?", "images": ["a.jpg"]}, "field 'images' of record 1"),
        ({"text": "<video>\nWhat happens?"}, "holds <video>"),
        ({"text": "What happens?", "video": "a.mp4"}, "field 'video' of record 1"),
    ],
)
def test_what_would_be_asked_blind_is_refused_by_record(tmp_path, own, more, says):
    plain = {"question_id": 0, "text": "Why?", "answer": "so"}
    with pytest.raises(CitError, match=re.escape(says)):
        rows_of(tmp_path, plain, {"question_id": 1, "answer": "cat", **more}, split="test")
    out = export(get_stream("shapes", tasks=["read"], n_train=2, n_val=1, n_test=2), tmp_path / "export")
    edit(out / SETS / "read" / "test.json", lambda d: d[1].update(more) or d[1].pop("image"))
    with pytest.raises(CitError, match=re.escape(says)):
        get_stream(f"coin:{out}")


def test_a_record_without_a_picture_is_text(tmp_path):
    (row,) = rows_of(tmp_path, talk("Why?", "so", images=[], video=None, image_id=3, frames=0))
    assert row.image is None
    plain = talk("Which tag, <img> or <picture>?", "a.png", choices=["a.png", "b.png"], source="wiki/Tag", file="main.ts")
    (row,) = rows_of(tmp_path, plain)
    assert row.image is None and row.question == "Which tag, <img> or <picture>?"


def test_other_names_of_the_same_picture_are_no_second_one(tmp_path):
    same = talk("<image>\nWhat?", "cat", images=["x/a.jpg"], image_url="http://x/0001.jpg", img_1="./a.jpg", **ONE)
    again = talk("<image>\nWhat?", "cat", "<image>\nOf what color?", "black", "And here?\n<image>", "white", **ONE)
    rows = rows_of(tmp_path, same, again)
    assert [r.question for r in rows] == ["What?", "What?", "Of what color?", "And here?"]
    assert {r.image for r in rows} == {"a.jpg"}


@pytest.mark.parametrize("mark", ["<Image>", "<image_1>", "<image 1>", "<|image_pad|>", "<|vision_start|>"])
def test_marks_that_are_kept_as_text_are_counted(tmp_path, mark):
    _, said = heard(lambda: rows_of(tmp_path, talk(f"What does {mark} mean?", "cat"), talk("Is 2 < image > 1?", "no")))
    assert len(said) == 1 and said[0].endswith(f"1 of 2 rows hold {mark} or the like, which is read as text")


def test_a_stream_is_named_and_not_printed_whole(own, twin, tmp_path):
    fields = dict(backbone=twin, optim={"steps": 1, "batch": 2}, compute={"threads": 1}, out=str(tmp_path / "run"))
    few = dict(tasks="ImageNet", limit=4, eval_limit=2)
    with pytest.raises(CitError, match="^method 'fwd_prompt': stream 'coin:CoIN' has no held-in tasks .{,80}$"):
        Run("fwd_prompt", stream=f"coin:{own}", stream_args=few, **fields).train()


def test_a_folder_is_no_picture(own):
    edit(own / SETS / "ImageNet" / "test.json", lambda d: d[1].update(image="."))
    with pytest.raises(CitError, match="image .*cl_dataset of task 'ImageNet' is no file .'image' of test row 1"):
        get_stream(f"coin:{own}", tasks="ImageNet")


# What loading leaves out


def test_follow_up_turns_are_counted(own, tmp_path):
    stream, said = heard(lambda: get_stream(f"coin:{own}", tasks="VQAv2"))
    assert len(said) == 1 and "VQAv2/train.json: 24 of 48 rows are follow-up turns that are learned alone" in said[0]
    stream, said = heard(lambda: get_stream(f"coin:{own}", tasks="VQAv2", turns="first"))
    assert "24 follow-up turns are left out" in said[0] and stream.tasks[0].n["train"] + stream.tasks[0].n["val"] == 24
    _, said = heard(lambda: get_stream(f"coin:{own}", tasks="ImageNet"))
    assert said == []


def test_turns_that_are_left_out_are_counted(tmp_path):
    record = talk("What?", "cat")
    record["conversations"] = [
        {"from": "system", "value": "Be kind."},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Hm."},
        *record["conversations"],
        {"from": "human", "value": "And?"},
    ]
    rows, said = heard(lambda: rows_of(tmp_path, record))
    assert [(r.question, r.answer) for r in rows] == [("What?", "cat")]
    for count in ("1 system turns", "1 answers without a question", "2 human turns without an answer"):
        assert count in said[0]
    asked = talk("What?", "cat", "And?", "dog")
    rows, said = heard(lambda: rows_of(tmp_path, asked, split="test"))
    assert len(rows) == 1 and "1 follow-up turns are not asked" in said[0]


def test_empty_answers_are_counted_and_empty_references_are_none(tmp_path):
    _, said = heard(lambda: rows_of(tmp_path, talk("What?", ""), talk("What?", "cat")))
    assert "1 of 2 answers are empty, which is learned as saying nothing" in said[0]
    asked = [{"question_id": i, "text": "What?", "answer": a} for i, a in enumerate(["", ["", "a cat"], "cat"])]
    rows, said = heard(lambda: rows_of(tmp_path, *asked, split="test"))
    assert "1 of 3 answers are empty, so that no answer is right" in said[0]
    assert "1 empty answers are left out of lists of references" in said[0] and rows[1].answer == "a cat"
    with pytest.raises(CitError, match="field 'answer' of record 0 is an empty list"):
        rows_of(tmp_path, {"text": "What?", "answer": []}, split="test")


def test_ids_that_come_twice_are_said_and_kept_apart(tmp_path):
    asked = [{"question_id": id, "text": f"What {i}?", "answer": "cat"} for i, id in enumerate((3, 4, "3", 5))]
    rows, said = heard(lambda: rows_of(tmp_path, *asked, split="test"))
    assert "2 of 4 records share their id with another (first: '3', records 0 and 2)" in said[0] and len(rows) == 4
    assert [r.id for r in rows] == [3, 4, "3", 5]
    _, said = heard(lambda: rows_of(tmp_path, *asked[:2], split="test"))
    assert said == []


def test_a_folder_that_is_no_whole_task_is_named(own):
    places = shutil.copytree(own / SETS / "ImageNet", own / SETS / "Places365")
    (places / "train.json").rename(places / "train_5shot.json")
    shutil.copy(places / "train_5shot.json", places / "train_10shot.json")
    (own / SETS / "OCR").mkdir()
    (own / SETS / "OCR" / "train.jsonl").write_text("{}")
    (own / SETS / "pictures").mkdir()
    (own / SETS / "GQA").mkdir()
    for split in ("Train", "gqa_test"):
        (own / SETS / "GQA" / f"{split}.json").write_text("[]")
    (own / SETS / "pictures" / "constraints.json").write_text("[]")
    stream, said = heard(lambda: get_stream(f"coin:{own}", tasks=["ImageNet"]))
    assert [t.name for t in stream] == ["ImageNet"] and len(said) == 1 and "pictures" not in said[0]
    assert "Places365 (it lacks train.json and holds test.json, train_10shot.json, train_5shot.json)" in said[0]
    assert "OCR (it lacks train.json and test.json and holds train.jsonl)" in said[0]
    assert "GQA (it lacks train.json and test.json and holds Train.json, gqa_test.json)" in said[0]
    (places / "train_10shot.json").unlink()
    assert "Places365" in [t.name for t in get_stream(f"coin:{own}")]


# TextVQA


def people(own, data):
    note = own / "cl_dataset" / "TextVQA" / "TextVQA_0.5.1_val.json"
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"data": data}))
    return own


@pytest.fixture
def textvqa(own):
    (own / SETS / "ImageNet").rename(own / SETS / "TextVQA")
    return own


def test_annotations_that_match_no_question_are_as_none(textvqa):
    people(textvqa, [{"question_id": 34602 + i, "answers": ["nokia"] * 10} for i in range(4)])
    edit(
        textvqa / SETS / "TextVQA" / "test.json",
        lambda d: [r.update(question_id=f"003a8ae2ef43b9{i:02}") for i, r in enumerate(d)],
    )
    stream, said = heard(lambda: get_stream(f"coin:{textvqa}", tasks="TextVQA"))
    assert stream.tasks[0].format.scorer == "equal"
    assert any("none of 12 questions has ten answers" in s for s in said)


def test_annotations_that_match_some_questions_say_how_many(textvqa):
    ids = [r["question_id"] for r in json.loads((textvqa / SETS / "TextVQA" / "test.json").read_text())]
    data = [
        {"question_id": f"00{ids[0]}", "answers": ["cat"] * 10},
        {"question_id": ids[1], "answers": ["cat"] * 9},
        {"question_id": str(ids[2]), "answers": ["nokia"] * 10},
        {"question_id": ids[3]},
    ]
    stream, said = heard(lambda: get_stream(f"coin:{people(textvqa, data)}", tasks="TextVQA"))
    task = stream.tasks[0]
    assert task.format.scorer == "textvqa" and any("2 of 12 questions have ten answers" in s for s in said)
    assert [len(task.example("test", i).meta.get("answers", [])) for i in range(4)] == [10, 0, 10, 0]
    assert task.format.score(task.example("test", 2), "nokia") == 1
    people(textvqa, data + [{"question_id": ids[2], "answers": ["other"] * 10}])
    with pytest.raises(CitError, match=f"answers question {ids[2]} twice, and not the same"):
        get_stream(f"coin:{textvqa}")


def test_people_are_asked_in_one_of_two_ways(textvqa):
    ids = [r["question_id"] for r in json.loads((textvqa / SETS / "TextVQA" / "test.json").read_text())]
    objects = [{"answer": "nokia", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    people(textvqa, [{"question_id": i, "answers": objects} for i in ids])
    task = get_stream(f"coin:{textvqa}", tasks="TextVQA").tasks[0]
    assert task.format.score(task.example("test", 0), "nokia") == 1
    people(textvqa, [{"question_id": "9" * 5000, "answers": ["a"] * 10}, {"question_id": 1, "answers": [None] * 10}])
    with pytest.raises(CitError, match="question 1: an answer is missing, but must be a text"):
        get_stream(f"coin:{textvqa}", tasks="TextVQA")


# Boxes

OUTSIDE = [
    "[12, 30, 44, 46]",
    "[250, 400, 700, 900]",
    "[0.7, 0.2, 0.3, 0.6]",
    "[0.6, 0.5, 0.3, 0.2]",
    "[-0.1, 0.2, 0.3, 0.4]",
    "[0.3, 0.2, 0.3, 0.6]",
    "[10%, 20%, 30%, 40%]",
    "[0.1, 0.2, 0.3, 0.4, 0.5]",
    "[one, two, three, four]",
    [12, 30, 44, 46],
    [0.7, 0.2, 0.3, 0.6],
    {"x0": 0.1, "y0": 0.2, "x1": 0.3, "y1": 0.4},
    None,
]


@pytest.mark.parametrize("box", OUTSIDE, ids=str)
def test_a_box_outside_the_square_is_refused_by_record(own, box):
    edit(own / SETS / "Grounding" / "test.json", lambda d: d[2].update(answer_bbox=box))
    with pytest.raises(
        CitError, match="'answer_bbox' of record 2 is .* each between 0 and 1, with x0 < x1 and y0 < y1"
    ):
        get_stream(f"coin:{own}", tasks="Grounding")
    edit(own / SETS / "Grounding" / "test.json", lambda d: [r.update(answer=r.pop("answer_bbox")) for r in d])
    if not isinstance(box, str):
        return
    with pytest.raises(CitError, match="answer of test row 2 .* scorers={'Grounding': 'equal'}"):
        get_stream(f"coin:{own}", tasks="Grounding")
    assert (
        get_stream(f"coin:{own}", tasks="Grounding", scorers={"Grounding": "equal"}).tasks[0].format.kind == "accuracy"
    )


def test_training_boxes_in_another_space_are_counted(own, tmp_path):
    change = lambda d: [r["conversations"][1].update(value="[12, 30, 44, 46]") for r in d[:3]]
    edit(own / SETS / "Grounding" / "train.json", change)
    stream, said = heard(lambda: get_stream(f"coin:{own}", tasks="Grounding"))
    assert any(
        "3 of 24 training answers are no box inside the square (first: id 0, '[12, 30, 44, 46]')" in s for s in said
    )
    task = stream.tasks[0]
    assert all(
        task.format.score(ex, ex.answer) == 1 and task.format.valid(ex.answer)
        for ex in (task.example("test", i) for i in range(12))
    )
    _, said = heard(lambda: get_stream(f"coin:{own}", tasks="Grounding", image_mode="plain"))
    assert any("parts of the square that image_mode='pad' makes" in s for s in said)
    out = export(stream, tmp_path / "export")
    edit(out / SETS / "Grounding" / "test.json", lambda d: d[1].update(answer_bbox="[12, 30, 44, 46]"))
    with pytest.raises(CitError, match="'answer_bbox' of record 1"):
        get_stream(f"coin:{out}")


# Room and form follow from the answers


def letters(n):
    return " ".join(["unabridged", "history", "of", "everything"] * n)[:n]


@pytest.mark.parametrize(
    "answer",
    [
        letters(233),
        letters(100),
        "一" * 40,
        "一" * 12,
        "棕色",
        "cat",
        "[0.123456789, 0.2, 0.3, 0.4]",
        "two  blanks",
        "a line\nbreak",
        "[0.1 0.2 0.3 0.4]",
        "[1e-05,.2,0.3,1]",
    ],
)
@pytest.mark.parametrize("rule", ["equal", "ocrvqa", "contains", "words", "letter", "box"])
def test_a_true_answer_always_fits_and_is_well_formed(twin, rule, answer):
    from cit_workbench import get_backbone

    fmt = make_format(rule, [answer] * 4)
    assert fmt.max_new_tokens >= len(get_backbone(twin).encode("q?", answer, False)[1])
    assert fmt.valid(answer) or rule in ("letter", "box")
    assert rule != "box" or fmt.valid(answer) == is_box(answer)


def test_the_form_of_the_usual_answers_is_what_it_was():
    rooms = {
        "letter": ("A", 16),
        "box": ("[0.123456, 0.123456, 0.123456, 0.123456]", 48),
        "equal": ("cat", 32),
        "words": ("a red cat sleeps on the mat .", 64),
    }
    for rule, (answer, room) in rooms.items():
        assert make_format(rule, [answer]).max_new_tokens == room
    assert make_format("equal", ["cat", "a cat"]).pattern == r"\S+( \S+){0,1}"
    assert make_format("words", ["a red cat sleeps on the mat ."]).pattern == r"(\S+\s+){4,}\S*\."


def test_answers_that_may_not_fit_are_counted(own, tmp_path):
    edit(own / SETS / "VQAv2" / "val.json", lambda d: [r.update(answer="x " * 200) for r in d[:5]])
    stream, said = heard(lambda: get_stream(f"coin:{own}", tasks="VQAv2", n_val=0))
    assert stream.tasks[0].format.max_new_tokens == 256
    assert any("room for 256 tokens, and 5 of 12 true answers have more bytes" in s for s in said)
    out = export(get_stream("shapes", tasks=["all-day"], n_train=2, n_val=1, n_test=6), tmp_path / "out")
    assert heard(lambda: get_stream(f"coin:{out}"))[1] == []
    edit(out / "cit.json", lambda d: [t["format"].update(max_new_tokens=3) for t in d["tasks"]])
    _, said = heard(lambda: get_stream(f"coin:{out}"))
    assert any("room for 3 tokens, and 6 of 6 true answers have more words" in s for s in said)


def test_texts_without_blanks_are_not_one_word(own):
    caption = "一只棕色的狗在草地上跑。"
    assert guess_scorer("cap", [caption] * 4) == "words" and guess_scorer("color", ["棕色"] * 4) == "equal"
    assert count_words("犬が公園で走っています") >= 5 and count_words("สุนัขสีน้ำตาลวิ่งบนสนามหญ้า") >= 6
    edit(own / SETS / "ImageNet" / "test.json", lambda d: [r.update(answer=caption) for r in d])
    (own / SETS / "ImageNet").rename(own / SETS / "图表问答")
    task = get_stream(f"coin:{own}").task("图表问答")
    ex = task.example("test", 0)
    assert task.format.kind == "caption" and task.format.valid(caption) and not task.format.valid("狗。")
    assert task.format.score(ex, caption) == 1 and 0.8 < task.format.score(ex, caption.replace("棕", "黑")) < 1


# Pictures


def swap(path, color):
    "Another picture in a file of the same size in bytes."
    before = path.read_bytes()
    Image.new("RGB", (9, 9), color).save(path)
    path.write_bytes(path.read_bytes().ljust(len(before), b"\0")[: len(before)])


def asked(own, twin, out, **more):
    return Run(
        "zero_shot", backbone=twin, stream=f"coin:{own}", stream_args={"tasks": "VQAv2", **more}, out=str(out)
    ).train()


def test_a_replaced_picture_is_noticed_wherever_it_stands(tmp_path, twin):
    own = make_coin(tmp_path / "CoIN", tasks=("VQAv2",), n_train=4, n_test=130)
    pic = lambda row: own / "cl_dataset" / "COCO2014" / "val2014" / f"COCO_val2014_{4 + row:012}.jpg"
    digests = [get_stream(f"coin:{own}").digest()]
    size = pic(5).stat().st_size
    for row in (5, 120):
        swap(pic(row), "red")
        digests.append(get_stream(f"coin:{own}").digest())
    assert pic(5).stat().st_size == size and len({*digests}) == 3
    assert get_stream(f"coin:{own}", eval_limit=100).digest() != get_stream(f"coin:{own}", eval_limit=99).digest()
    few = get_stream(f"coin:{own}", eval_limit=100).digest()
    swap(pic(125), "blue")  # Not asked with that limit
    assert get_stream(f"coin:{own}", eval_limit=100).digest() == few


def test_a_model_is_asked_anew_where_a_picture_is_another(tmp_path, twin):
    own = make_coin(tmp_path / "CoIN", tasks=("VQAv2",), n_train=4, n_test=6)
    pic = own / "cl_dataset" / "COCO2014" / "val2014" / "COCO_val2014_000000000005.jpg"
    first = asked(own, twin, tmp_path / "a")
    stored = sorted((tmp_path / "cache" / "answers").glob("*.jsonl"))
    swap(pic, "red")
    second = asked(own, twin, tmp_path / "b")
    assert len(sorted((tmp_path / "cache" / "answers").glob("*.jsonl"))) == 2 * len(stored) > 0
    lines = [(tmp_path / x / "answers" / "0" / "VQAv2.jsonl").read_text().splitlines() for x in "ab"]
    assert [a == b for a, b in zip(*lines)] == [True, False, True, True, True, True]
    assert first.run["hashes"]["data"] != second.run["hashes"]["data"]


def test_data_are_the_same_on_another_disk_and_are_not_read_twice(own, tmp_path, monkeypatch):
    digest = get_stream(f"coin:{own}").digest()
    read, plain = [], images.bytes_of

    def counted(path):
        read.append(path)
        return plain(path)

    counted.__name__ = plain.__name__
    monkeypatch.setattr(images, "bytes_of", counted)
    assert get_stream(f"coin:{own}").digest() == digest and read == []
    moved = own.rename(tmp_path / "elsewhere" / "CoIN") if (tmp_path / "elsewhere").mkdir() is None else None
    assert get_stream(f"coin:{moved}").digest() == digest and read
    for damage in (b"{", b"[]", b'{"a": 1}', b"\xff"):
        for file in (tmp_path / "cache" / "pictures").glob("*.json"):
            file.write_bytes(damage)
        assert get_stream(f"coin:{moved}").digest() == digest


def test_every_image_is_opened_before_anything_is_trained(own, twin, tmp_path):
    pic = sorted((own / "cl_dataset" / "COCO2014" / "val2014").glob("*.jpg"))[7]
    whole = pic.read_bytes()
    pic.write_bytes(whole[:200])
    with pytest.raises(CitError, match=f"{pic.name} cannot be read"):
        get_stream(f"coin:{own}", check=-1)
    pic.write_bytes(whole)
    digest = get_stream(f"coin:{own}", check=-1).digest()
    pixels = np.asarray(Image.open(pic).convert("RGB"))
    Image.fromarray(pixels).save(pic, "PNG")  # The same pixels in another file
    assert get_stream(f"coin:{own}", check=-1).digest() == digest
    Image.fromarray(255 - pixels).save(pic, "PNG")
    assert get_stream(f"coin:{own}", check=-1).digest() != digest


@pytest.mark.parametrize("check, how", [(100, "cut"), (0, "removed")])
@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_a_run_goes_on_once_a_broken_picture_is_whole(tmp_path, twin, monkeypatch, split, check, how):
    import cit_workbench.contract.examples as examples_module

    monkeypatch.setattr(examples_module, "_room", 0)
    own = make_coin(tmp_path / "CoIN", tasks=("VQAv2",), n_train=10, n_test=4)
    number = {"train": 3, "val": 9, "test": 12}[split]
    pic = own / "cl_dataset" / "COCO2014" / "val2014" / f"COCO_val2014_{number:012}.jpg"
    whole, late = pic.read_bytes(), sorted(pic.parent.glob("*.jpg"))[1]
    fields = {
        "backbone": twin,
        "stream": f"coin:{own}",
        "stream_args": {"check": check, "n_val": 2},
        "probe_every": 3,
        "optim": {"steps": 6, "batch": 4},
        "compute": {"save_every": 2},
    }
    if how == "cut":
        pic.write_bytes(whole[:200])
    else:
        pic.unlink()
    with pytest.raises(CitError, match=pic.name):
        Run(out=str(tmp_path / "run"), **fields).train()
    pic.write_bytes(whole)
    rec = Run(out=str(tmp_path / "run"), **fields).train()
    straight = Run(out=str(tmp_path / "straight"), **fields).train()
    assert rec.finished and np.array_equal(rec.R, straight.R, equal_nan=True) and rec.events() == straight.events()
    assert rec.run["hashes"] == straight.run["hashes"] and rec.run["protocol"] == straight.run["protocol"]
    swap(late, "red")  # Replaced without being named
    with pytest.raises(CitError, match="holds a run on other data"):
        Run(out=str(tmp_path / "run"), **fields).train()


def test_the_steps_before_a_broken_picture_are_kept_and_all_broken_ones_are_named(tmp_path, twin, monkeypatch):
    import cit_workbench.contract.examples as examples_module
    from cit_workbench.training.rows import draw

    monkeypatch.setattr(examples_module, "_room", 0)
    own = make_coin(tmp_path / "CoIN", tasks=("VQAv2",), n_train=10, n_test=2)
    stream = get_stream(f"coin:{own}", n_val=0, turns="first")
    order = [draw(0, stream.tasks[0], 1, step)[0][1] for step in range(8)]
    pics = [own / "cl_dataset" / "COCO2014" / "val2014" / f"COCO_val2014_{order[step]:012}.jpg" for step in (5, 7)]
    whole = [p.read_bytes() for p in pics]
    for p in pics:
        p.write_bytes(p.read_bytes()[:200])
    run = lambda: Run(
        backbone=twin,
        stream=f"coin:{own}",
        stream_args={"n_val": 0, "turns": "first"},
        out=str(tmp_path / "run"),
        optim={"steps": 8, "batch": 1},
        compute={"save_every": 2, "workers": 0},
    )
    steps, one_step = [], Run.one_step
    monkeypatch.setattr(Run, "one_step", lambda self, *args: steps.append(0) or one_step(self, *args))
    with pytest.warns(UserWarning, match=f"1 more images cannot be opened .*{pics[1].name}.*broken.json"):
        with pytest.raises(CitError, match=pics[0].name):
            run().train()
    assert len(steps) == 6  # The sixth met the picture
    pics[0].write_bytes(whole[0])
    with pytest.raises(CitError, match=pics[1].name):
        run().train()
    pics[1].write_bytes(whole[1])
    steps.clear()
    assert run().train().finished and len(steps) == 2
    for p in pics:
        p.write_bytes(p.read_bytes()[:200])
    (tmp_path / "run" / "broken.json").unlink()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CitError, match=pics[0].name):
        run().train()
    for p, b in zip(pics, whole):
        p.write_bytes(b)  # Both at once, although the error named one
    steps.clear()
    assert run().train().finished and len(steps) == 4


def test_embedded_streams_have_the_digests_of_the_lock():
    locked = read_lock()["streams"]
    assert locked and all(content(get_stream(name)) == locked[name] for name in all_streams())
