"A LLaVA-1.5 checkpoint and a CoIN folder, both in their on-disk formats, from files to a record and back."
import copy
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from twin import edit, make_coin, make_twin, old_name

from cit_workbench import Run, all_methods, get_backbone, get_stream
from cit_workbench.models.backbone import load_image
from cit_workbench.models.batch import at
from cit_workbench.cli import main
from cit_workbench.core.digests import digest
from cit_workbench.core.errors import CitError
from cit_workbench.data.examples import formats
from cit_workbench.data.scorers import iou, scorers
from cit_workbench.data.task import Example, Stream, Task
from cit_workbench.suites import coin

SETS = "playground/Instructions_Original"


@pytest.fixture(scope="module")
def twin(tmp_path_factory): return str(make_twin(tmp_path_factory.mktemp("twin")/"llava"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_coin(tmp_path_factory.mktemp("suite")/"CoIN")


@pytest.fixture
def own(folder, tmp_path): return shutil.copytree(folder, tmp_path/"CoIN")


# The checkpoint

def test_every_weight_of_a_sharded_checkpoint_arrives(twin):
    from safetensors.torch import load_file
    from pathlib import Path
    stored = {}
    for f in sorted(Path(twin).glob("model-*.safetensors")): stored |= load_file(f)
    bb = get_backbone(twin)
    assert len(stored) == len(bb.model.state_dict()) and bb.n_vis == 9
    assert all(torch.equal(v, stored[old_name(k)].float()) for k, v in bb.model.state_dict().items())


def squared(path, color):
    "LLaVA-1.5's padding, written a second time: a square canvas, the image in its middle."
    im = np.asarray(Image.open(path).convert("RGB"))
    h, w, _ = im.shape
    out = np.empty((max(h, w), max(h, w), 3), np.uint8)
    out[:] = color
    y, x = (max(h, w) - h)//2, (max(h, w) - w)//2
    out[y:y+h, x:x+w] = im
    return Image.fromarray(out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batched_answers_are_those_of_generate(twin, folder, dtype):
    bb, stream = get_backbone(twin, image_mode="pad", dtype=dtype), get_stream(f"coin:{folder}")
    exs = [t.example("test", i) for t in stream for i in range(3)]
    assert {e.image is None for e in exs} == {True, False}
    alone = dtype == "bfloat16"  # sums of another order round to other halves: one row at a time there
    ours = []
    for group in [[e] for e in exs] if alone else [exs]:
        with at(bb.collate(group, answers=False)) as b: ours += bb.answer(b, 10)[0]
    color = [int(255*m) for m in bb.image_processor.image_mean]
    for e, row in zip(exs, ours):
        content = [{"type": "image"}]*(e.image is not None) + [{"type": "text", "text": e.question}]
        text = bb.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert text == "USER: " + "<image>\n"*(e.image is not None) + e.question + " ASSISTANT:"
        pic = {} if e.image is None else {"images": squared(e.image, color)}
        given = bb.processor(text=text, **pic, return_tensors="pt")
        assert given["input_ids"][0].tolist() == bb.encode(e.question, None, e.image is not None)[0]
        if "pixel_values" in given: given["pixel_values"] = given["pixel_values"].to(bb.dtype)
        out = bb.model.generate(**given, do_sample=False, max_new_tokens=10)[0, given["input_ids"].shape[1]:].tolist()
        assert row == out[:out.index(bb.eos)] if bb.eos in out else row == out


def test_the_answer_never_merges_with_the_prompt(twin, folder):
    bb = get_backbone(twin)
    for t in get_stream(f"coin:{folder}"):
        for e in (t.example("train", i) for i in range(6)):
            prompt, answer = bb.encode(e.question, e.answer, e.image is not None)
            assert bb.tokenizer.decode(answer[:-1]).strip() == e.answer and answer[-1] == bb.eos
            assert prompt.count(bb.image_id) == 9*(e.image is not None)
    assert len(bb.encode("Why?", "")[1]) <= 2


# Runs

def rescored(task, questions, lines):
    "Percent right by CoIN's rules, from its test file and a result file alone."
    by, right = {q["question_id"]: q for q in questions}, 0
    for line in lines:
        q, said = by[line["question_id"]], line["text"]
        if task == "ScienceQA":
            found = re.findall(r"\b(\w)\b", said)
            letter = said if said in list("ABCDE") else found[0].upper() if found else "FAILED"
            right += letter == q["answer"]
        elif task == "ImageNet": right += q["answer"] in re.findall(r"\w+", said.lower())
        elif task == "Grounding":
            n = [float(x) for x in re.findall(r"\d*\.?\d+", said)] if re.fullmatch(r"\[?[\d., ]+\]?", said) else []
            right += len(n) == 4 and iou(n, json.loads(q["answer_bbox"])) > .5
        else: right += said.upper() == q["answer"].upper()
    return 100*right/len(lines)


@pytest.mark.parametrize("method", ["finetune", "er", "ewc"])
def test_a_run_from_files_to_result_files(twin, folder, tmp_path, method):
    if method not in all_methods(): pytest.skip(f"{method} is not there")
    rec = Run(method, backbone=twin, stream=f"coin:{folder}", stream_args={"limit": 12, "eval_limit": 8},
              optim={"steps": 2, "batch": 4}, compute={"dtype": "bfloat16"}, out=str(tmp_path/"run")).train()
    names, asked = ["ScienceQA", "ImageNet", "Grounding", "VQAv2"], rec.config["protocol_fields"]
    assert rec.finished and rec.R.shape == (5, 4) and [n for n, _ in rec.columns] == names
    assert (asked["image_mode"], asked["dtype"]) == ("pad", "torch.bfloat16")
    for name in names:
        file = folder/SETS/name/("val.json" if name == "VQAv2" else "test.json")
        questions = json.loads(file.read_text())[:8]
        answers = tmp_path/"run"/"answers"/"4"/f"{name}.jsonl"
        lines = [json.loads(x) for x in answers.read_text().splitlines()]
        assert all({*x} == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} for x in lines)
        assert [x["question_id"] for x in lines] == [q["question_id"] for q in questions]
        assert [x["prompt"] for x in lines] == [q["text"] for q in questions]
        assert rec.R[4, names.index(name)] == pytest.approx(rescored(name, questions, lines))


def test_a_stream_and_its_export_give_the_same_run(twin, tmp_path):
    args = {"tasks": ["cap-day", "col-mcq"], "n_train": 20, "n_val": 2, "n_test": 4}
    coin.export(get_stream("shapes", **args), tmp_path/"copy")
    fields = {"backbone": twin, "optim": {"steps": 3, "batch": 4}, "probe_every": 2}
    a = Run(stream="shapes", stream_args=args, out=str(tmp_path/"a"), **fields).train()
    b = Run(stream=f"coin:{tmp_path/'copy'}", out=str(tmp_path/"b"), **fields).train()
    assert a.columns == b.columns and np.array_equal(a.R, b.R, equal_nan=True) and a.events() == b.events()
    files = sorted(p.relative_to(tmp_path/"a") for p in (tmp_path/"a"/"answers").rglob("*.jsonl"))
    assert files and all((tmp_path/"a"/f).read_bytes() == (tmp_path/"b"/f).read_bytes() for f in files)


# Folders

def told(ex): return ex.question, ex.answer, ex.choices, ex.meta, ex.image and load_image(ex.image).tobytes()


def test_a_coin_folder_can_be_exported_and_read_again(folder, tmp_path):
    one = get_stream(f"coin:{folder}")
    two = get_stream(f"coin:{coin.export(one, tmp_path/'copy')}")
    head = lambda s: (s.image_mode, [(t.name, t.n, t.format, t.chance, t.domain, t.skill) for t in s])
    assert head(one) == head(two)
    for t in one:
        for split in t.n:
            for i in range(t.n[split]): assert told(t.example(split, i)) == told(two.task(t.name).example(split, i))
    assert type(two.task("Grounding").example("test", 0).meta["question_id"]) is int


def test_what_the_folder_says_decides_formats_and_closed_sets(folder):
    s = get_stream(f"coin:{folder}", n_val=4)
    assert [(t.name, t.format.name, t.format.scorer) for t in s] == [
        ("ScienceQA", "letter", "letter"), ("ImageNet", "phrase", "contains"), ("Grounding", "box", "box"),
        ("VQAv2", "phrase", "equal")]
    assert [t.example("test", 0).choices for t in s] == [("A", "B", "C"), ("cat", "dog"), (), ("no", "yes")]
    assert [round(t.chance) for t in s] == [33, 50, 0, 50]
    assert s.task("VQAv2").n == {"train": 44, "val": 4, "test": 12} and s.task("ImageNet").n["train"] == 20
    later = s.task("VQAv2").example("train", 1)
    assert later.question == "What is it?\nAnswer the question using a single word or phrase."
    assert later.meta["question_id"] == "0#1"
    assert get_stream(f"coin:{folder}", turns="first", n_val=0).task("VQAv2").n["train"] == 24


def test_order_subset_limit_and_shuffle(folder):
    names = ["VQAv2", "ScienceQA"]
    s = get_stream(f"coin:{folder}", tasks=names, limit=5, eval_limit=3, seed=1)
    assert [t.name for t in s] == names and s.task("VQAv2").n == {"train": 5, "val": 3, "test": 3}
    ids = lambda s: [s.task("VQAv2").example("train", i).meta["question_id"] for i in range(5)]
    again, other, plain = (get_stream(f"coin:{folder}", tasks="VQAv2", **k) for k in ({"seed": 1}, {"seed": 2}, {}))
    assert ids(s) == ids(again) != ids(other) and ids(plain) == [0, "0#1", 1, "1#1", 2]


def test_digests_follow_content_not_place(folder, own):
    same = get_stream(f"coin:{own}").digest()
    assert same == get_stream(f"coin:{folder}").digest()
    edit(own/SETS/"ImageNet"/"train.json", lambda d: d[20]["conversations"][1].update(value="hen"))
    changed = get_stream(f"coin:{own}").digest()
    Image.new("RGB", (9, 9)).save(next((own/"cl_dataset"/"ImageNet_withlabel").rglob("*.jpg")))
    assert len({same, changed, get_stream(f"coin:{own}").digest()}) == 3


def test_layouts_that_others_derived(folder, tmp_path):
    flat = tmp_path/"SEFE"
    for t in ("ScienceQA", "VQAv2"): shutil.copytree(folder/SETS/t, flat/t)
    (flat/"VQAv2"/"val.json").rename(flat/"VQAv2"/"test.json")
    for d in ("ScienceQA", "COCO2014"): shutil.copytree(folder/"cl_dataset"/d, flat/d, dirs_exist_ok=True)
    assert [t.name for t in get_stream(f"coin:{flat}")] == ["ScienceQA", "VQAv2"]
    ucit = tmp_path/"UCIT"
    shutil.copytree(folder/"cl_dataset", ucit/"datasets")
    where = ucit/"instructions"/"ImageNet-R"
    shutil.copytree(folder/SETS/"ImageNet", where)
    (where/"test.json").rename(where/"test_3000.json")

    def talk(r):
        turns = [{"from": "human", "value": "<image>\n" + r.pop("text")}, {"from": "gpt", "value": r.pop("answer")}]
        r.update(question_id=1, conversations=turns)
    edit(where/"test_3000.json", lambda d: [talk(r) for r in d])
    asked = [get_stream(f"coin:{ucit}").task("ImageNet-R").example("test", i) for i in range(3)]
    assert {e.meta["question_id"] for e in asked} == {1} and len({e.id for e in asked}) == 3
    two = shutil.copytree(folder, tmp_path/"two")
    shutil.copytree(two/SETS, two/"playground"/"Instructions_Diverse")
    shutil.rmtree(two/"playground"/"Instructions_Diverse"/"VQAv2")
    assert len(get_stream(f"coin:{two}")) == 4
    assert len(get_stream(f"coin:{two}", instructions="Instructions_Diverse")) == 3


def test_captions_keep_their_references(own):
    def captions(d):
        for i, r in enumerate(d): r["answer"] = [f"a {w} dog runs over the grass ." for w in ("big", "brown")]
    edit(own/SETS/"ImageNet"/"test.json", captions)
    (own/SETS/"ImageNet").rename(own/SETS/"Flickr30k")
    t = get_stream(f"coin:{own}").task("Flickr30k")
    ex = t.example("test", 0)
    assert t.format.kind == "caption" and len(ex.meta["references"]) == 2
    assert t.format.score(ex, "a brown dog runs over the grass") == 1
    from cit_workbench.measure.scores import column_scores, score_line
    lines = [score_line(t, t.example("test", i), "a brown dog runs over the grass .") for i in range(4)]
    assert column_scores(t, lines)["cider"] >= 0 and column_scores(t, lines)["formatted"] == 100


# Bad input

def train(f): return lambda d: edit(d/SETS/"ImageNet"/"train.json", f)
def asked(f, task="ImageNet"): return lambda d: edit(d/SETS/task/"test.json", f)
def put(content, name="train"): return lambda d: (d/SETS/"ImageNet"/f"{name}.json").write_bytes(content)


HARM = [
    (lambda d: shutil.rmtree(d/SETS), "holds no task folder"),
    (lambda d: shutil.rmtree(d), "does not exist; coin:FOLDER needs one"),
    (put(b'[{"id": 1,'), "ImageNet/train.json is not one JSON array"),
    (put(b"\xff\xfe\x00["), "ImageNet/train.json is not one JSON array"),
    (put(b"["*5000), "ImageNet/train.json is not one JSON array"),
    (put(b"{}", "test"), "holds an object, but must be one JSON array"),
    (put(b"[]"), "holds no records"),
    (put(b"[3]"), "record 0 is 3, but must be an object"),
    (train(lambda r: r[3].pop("conversations")), "'conversations' of record 3 is missing"),
    (train(lambda r: r[3]["conversations"].pop()), "a human turn that a gpt turn follows|one human turn"),
    (asked(lambda r: r[2].pop("text")), "'text' of record 2 is missing"),
    (asked(lambda r: r[2].pop("answer")), "'answer' of record 2 is missing"),
    (asked(lambda r: r[2].update(image=[1])), "'image' of record 2 is a list"),
    (asked(lambda r: r[2].update(text="\ud800")), "'text' of record 2 is"),
    (asked(lambda r: r[1].update(answer_bbox="[0.1, 0.2]"), "Grounding"), "must be four numbers"),
    (lambda d: shutil.rmtree(d/"cl_dataset"/"COCO2014"/"train2014"), "0000.jpg of task 'Grounding' does not exist"),
]
WRONG = [
    ({"tasks": ["ImageNot"]}, "unknown task of coin:.*did you mean 'ImageNet'"),
    ({"tasks": []}, "at least one task"),
    ({"tasks": ["VQAv2", "VQAv2"]}, "each once"),
    ({"instructions": "Instructions_Slim"}, "unknown instructions folder"),
    ({"images": "pictures"}, "image folder pictures does not exist"),
    ({"n_vall": 3}, "unknown field of stream 'coin'"),
    ({"n_val": "x"}, "field 'n_val' is 'x'"),
    ({"n_val": -1}, "field 'n_val' is -1"),
    ({"turns": "every"}, "allowed: all, first"),
    ({"image_mode": "square"}, "allowed: pad, plain"),
    ({"scorers": {"VQAv2": "fuzzy"}}, "unknown scorer of task 'VQAv2'"),
]


@pytest.mark.parametrize("says", [says for _, says in HARM])
def test_bad_files_end_in_one_sentence(own, says):
    dict((s, harm) for harm, s in HARM)[says](own)
    with pytest.raises(CitError) as e: get_stream(f"coin:{own}")
    assert re.search(says, str(e.value)) and "\n" not in str(e.value)


@pytest.mark.parametrize("args, says", WRONG)
def test_wrong_arguments_end_in_one_sentence(folder, args, says):
    with pytest.raises(CitError) as e: get_stream(f"coin:{folder}", **args)
    assert re.search(says, str(e.value)) and "\n" not in str(e.value)


def test_images_are_named_when_they_are_drawn(own):
    late = own/"cl_dataset"/"COCO2014"/"val2014"/"COCO_val2014_000000000030.jpg"
    late.write_bytes(late.read_bytes()[:200])
    ex = get_stream(f"coin:{own}").task("VQAv2").example("test", 6)
    with pytest.raises(CitError, match="COCO_val2014_000000000030.jpg cannot be read"): load_image(ex.image)
    late.unlink()
    with pytest.raises(CitError, match="000000000030.jpg of task 'VQAv2' does not exist"): get_stream(f"coin:{own}")
    ex = get_stream(f"coin:{own}", check=3).task("VQAv2").example("test", 6)
    with pytest.raises(CitError, match="does not exist; the `image` field"): load_image(ex.image)


def test_textvqa_without_its_annotations_says_so(own):
    (own/SETS/"ImageNet").rename(own/SETS/"TextVQA")
    with pytest.warns(UserWarning, match="scored by equality"): s = get_stream(f"coin:{own}")
    assert s.task("TextVQA").format.scorer == "equal"
    note = own/"cl_dataset"/"TextVQA"/"TextVQA_0.5.1_val.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"data": [{"question_id": i, "answers": ["cat"]*3 + ["dog"]*7} for i in range(40)]}))
    t = get_stream(f"coin:{own}").task("TextVQA")
    assert t.format.scorer == "textvqa" and t.format.score(t.example("test", 0), "Cat") == pytest.approx(.9)
    note.write_text('{"data": 3}')
    with pytest.raises(CitError, match="must hold `data`"): get_stream(f"coin:{own}")


def test_exports_leave_other_folders_alone(folder, tmp_path):
    s = get_stream("shapes", tasks=["read"], n_train=2, n_val=1, n_test=1)
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.tex").write_text("x")
    with pytest.raises(CitError, match="is not empty and no earlier export"): coin.export(s, tmp_path/"mine")
    with pytest.raises(CitError, match="is a file"): coin.export(s, tmp_path/"mine"/"thesis.tex")
    own = get_stream(f"coin:{folder}")
    with pytest.raises(CitError, match="holds the images that this stream is made of"): coin.export(own, folder)
    out = coin.export(s, tmp_path/"new")
    coin.export(get_stream("shapes", tasks=["col-mcq"], n_train=2, n_val=1, n_test=1), out)
    assert not (out/SETS/"read").exists() and len(get_stream(f"coin:{out}")) == 1
    edit(out/"cit.json", lambda d: d.update(unfinished=True))
    with pytest.raises(CitError, match="was interrupted"): get_stream(f"coin:{out}")
    ask = lambda split, i: Example("a", None, "q", "a")
    bad = Task("a/b", formats["word"], "x", "y", {"train": 1, "val": 0, "test": 1}, ask)
    odd = Stream("odd", [bad])
    with pytest.raises(CitError, match="'a/b' cannot be the name of a folder"): coin.export(odd, tmp_path/"odd")


def test_the_command_line_exports_and_refuses(tmp_path, capsys):
    args = ["--stream-args", "tasks=read", "n_train=3", "n_val=1", "n_test=2"]
    main(["export-stream", "shapes", str(tmp_path/"out"), *args])
    assert get_stream(f"coin:{tmp_path/'out'}").task("read").n == {"train": 3, "val": 1, "test": 2}
    (tmp_path/"out"/"cit.json").unlink()
    with pytest.raises(SystemExit) as e: main(["export-stream", "shapes", str(tmp_path/"out"), *args])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("cit: ") and said.count("\n") == 1


# Damage

JUNK = [None, True, 0, -1, 3.5, float("nan"), 1e400, "", "x", "\ud800", "\0", "a\nb", "a"*5000, "../..",
        [], {}, [None], [[]], ["x", 1], {"a": 1}]


def damaged(tree, r):
    "A JSON value with one place changed."
    tree, paths = copy.deepcopy(tree), []

    def walk(v, path):
        paths.append(path)
        parts = v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ()
        for k, x in parts: walk(x, (*path, k))
    walk(tree, ())
    *path, last = r.choice(paths[1:])
    node = tree
    for k in path: node = node[k]
    kind = r.randrange(3)
    if kind == 0: node[last] = r.choice(JUNK)
    elif kind == 1: del node[last]
    else: node[last] = [node[last]] if r.random() < .5 else {"value": node[last]}
    return tree


FILES = ["cit.json", *[f"{SETS}/{f}.json" for f in ("ScienceQA/train", "Grounding/test", "VQAv2/val", "cap-day/test")]]


def cut(whole, r, how):
    "Bytes that break off, of which one changed, or that lack a piece."
    i, j = r.randrange(len(whole)), r.randrange(1, 40)
    return [whole[:i], whole[:i] + bytes([r.randrange(256)]) + whole[i+1:], whole[:i] + whole[i+j:]][how]


def use(stream):
    "Draw and score everything."
    stream.digest()
    for t, _ in stream.roles():
        for split in t.n:
            for ex in (t.example(split, i) for i in range(t.n[split])):
                digest(ex.id, ex.question, ex.answer, ex.choices)
                assert all(0 <= t.format.score(ex, said) <= 1 for said in (ex.answer, "", "0.1, 0.2"))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_load_or_are_refused(folder, tmp_path, name, n=120):
    shapes = get_stream("shapes", tasks=["cap-day", "col-mcq"], n_train=3, n_val=1, n_test=2)
    if name in (FILES[0], FILES[-1]): root = coin.export(shapes, tmp_path/"out")
    else: root = shutil.copytree(folder, tmp_path/"CoIN")
    tasks = [name.split("/")[-2]] if "/" in name else None
    whole, r, seen = (root/name).read_bytes(), random.Random(name), {"loaded": 0, "refused": 0}
    for k in range(n):
        torn = cut(whole, r, k//4 % 3) if k % 4 == 0 else json.dumps(damaged(json.loads(whole), r)).encode()
        (root/name).write_bytes(torn)
        try:
            use(get_stream(f"coin:{root}", tasks=tasks, check=1))
            seen["loaded"] += 1
        except CitError as e:
            assert str(e).encode().strip() and "\n" not in str(e)
            seen["refused"] += 1
    assert min(seen.values()) > 5, seen


def test_damaged_images_open_or_are_refused(folder, tmp_path):
    r, seen = random.Random(0), {"opened": 0, "refused": 0}
    for f in [*folder.rglob("*.png")][:2] + [*folder.rglob("*.jpg")][:2]:
        whole, path = f.read_bytes(), tmp_path/f.name
        for _ in range(60):
            data = bytearray(whole[:r.randrange(len(whole))] if r.random() < .3 else whole)
            for _ in range(r.randrange(1, 6)):
                if data: data[r.randrange(min(len(data), 120))] = r.randrange(256)
            path.write_bytes(data)
            try: load_image(str(path)); seen["opened"] += 1
            except CitError: seen["refused"] += 1
    assert min(seen.values()) > 5, seen


def test_every_scorer_takes_any_text(folder):
    r, chars = random.Random(0), "aB .,[]0123456789-\n\t'\"\\é猫"
    texts = ["".join(r.choice(chars) for _ in range(r.randrange(12))) for _ in range(200)]
    answers = ("", "[0.1, 0.2, 0.3, 0.4]", "cat")
    ex = [Example("a", None, "q", a, meta=m) for a in answers for m in ({}, {"references": [a, "x"]})]
    for name in set(scorers) - {"caption"}:
        for e in ex: assert all(0 <= scorers[name](formats["word"], e, t) <= 1 for t in texts)
