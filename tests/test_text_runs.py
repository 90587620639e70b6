"Where an answer ends, which choice wins, and what does not fit: on real checkpoints and in runs."
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from twin import make_twin

from cit_workbench import Run, get_backbone, get_stream
from cit_workbench.models.batch import at
from cit_workbench.core.errors import CitError
from cit_workbench.training.replies import answer_asks, reply_of
from cit_workbench.contract.net import Net
from cit_workbench.contract.registry import get_method
from cit_workbench.data.stream import all_streams
from cit_workbench.data.registry import streams
from cit_workbench.data.task import Example, Format, Stream, Task
from cit_workbench.measure.answers import ask


@pytest.fixture(scope="module")
def twin(tmp_path_factory): return make_twin(tmp_path_factory.mktemp("twin")/"llava")


@pytest.fixture
def own(twin, tmp_path): return shutil.copytree(twin, tmp_path/"llava")


def put(file, **fields): file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def asked(n=12):
    "Rows with and without pictures."
    noise = np.random.default_rng(0)
    picture = lambda i: noise.integers(0, 255, (42, 42, 3), np.uint8) if i % 3 else None
    question = lambda i: f"Is the {'abcdefghijkl'[i]} object red?"
    return [Example(f"x/test/{i}", picture(i), question(i), "yes") for i in range(n)]


# Where an answer ends

def generated(bb, e, most):
    "What the Hugging Face model says to one row, stopped where its own generation config says."
    pixels = {} if e.image is None else {"pixel_values": bb.pixels([e.image])}
    ids = torch.tensor([bb.texts(e)[0]])
    out = bb.model.generate(input_ids=ids, attention_mask=ids*0 + 1, **pixels, do_sample=False, max_new_tokens=most)
    return out[0, ids.shape[1]:].tolist()


def said(bb, rows, most=12):
    with at(bb.collate(rows, answers=False)) as b: return bb.answer(b, most)[0]


@pytest.fixture(scope="module")
def third(twin):
    "Tokens that the twin says in the third place."
    return sorted({ids[2] for ids in said(get_backbone(str(twin)), asked()) if len(ids) > 2})


@pytest.mark.parametrize("form", ["list", "alone", "two", "config", "text_config"])
def test_answers_stop_at_every_end_token_of_the_checkpoint(own, third, form):
    ends = {"list": [2, third[1]], "two": [2, third[1], third[2]]}.get(form, third[1])
    if form == "config":
        (own/"generation_config.json").unlink()
        put(own/"config.json", eos_token_id=ends)
    elif form == "text_config":
        (own/"generation_config.json").unlink()
        config = json.loads((own/"config.json").read_text())
        put(own/"config.json", text_config=config["text_config"] | {"eos_token_id": ends})
    else: put(own/"generation_config.json", eos_token_id=ends)
    bb = get_backbone(str(own))
    stops = {*([ends] if isinstance(ends, int) else ends)}
    assert {*bb.stops} == stops and bb.eos == (2 if 2 in stops else ends)
    rows, ours = asked(), said(bb, asked())
    theirs = [generated(bb, e, 12) for e in rows]
    assert ours == [ids[:-1] if ids[-1] in stops else ids for ids in theirs]
    assert not any(stops & {*ids} for ids in ours)
    last = {ids[-1] for ids in theirs if ids[-1] in stops}
    assert last and len({len(ids) for ids in ours}) > 1
    if form == "two": assert len(last) > 1, "rows of one batch stop at different ids"
    assert said(bb, rows, 2) == [ids[:2] for ids in ours], "cut before it ends"


def test_the_turns_end_stops_even_if_the_generation_config_forgets_it(own):
    end = "{% if m['role'] == 'assistant' %}<pad>{% endif %}"
    text = "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    template = "{% for m in messages %}{{ m['role'] }}: " + text + end + " {% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    put(own/"chat_template.json", chat_template=template)
    bb = get_backbone(str(own))
    pad = bb.tokenizer.pad_token_id
    assert bb.encode("red?", "yes")[1][-1] == bb.eos == pad and bb.stops == sorted([2, pad])


@pytest.mark.parametrize("ends", [-1, [2, -1], 640, [2, 640], "</s>", ["</s>"], 2.0, [[2]], True])
def test_an_end_that_is_no_token_is_named(own, ends):
    put(own/"generation_config.json", eos_token_id=ends)
    with pytest.raises(CitError, match="ends its answers at eos_token_id .*; allowed: whole numbers from 0 to 639"):
        get_backbone(str(own))


# Which choice wins

PAIRS = [("1", "10"), ("cat", "cat food"), ("no", "not sure"), ("coot", "coots"), ("A", "A. cat"), ("yes", "no")]


def taught(folder, rows, steps=60):
    "A twin whose language model says exactly the answers of some rows."
    bb = get_backbone(str(folder))
    bb.lm.requires_grad_(True)
    opt = torch.optim.Adam(bb.lm.parameters(), lr=3e-3)
    b = bb.collate(rows)
    for _ in range(steps):
        with at(b): loss = bb.forward(b).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
    bb.lm.requires_grad_(False)
    assert loss.item() < .02
    return bb


def stream_of(rows, room=8):
    "One task whose rows are the same in every split."
    fmt = Format("word", ".*", room)
    n = {s: len(rows) for s in ("train", "val", "test")}
    make = lambda split, i: replace(rows[i], id=f"own/{split}/{i}")
    return Stream("own", [Task("own", fmt, "none", "words", n, make)])


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "|".join(p))
def test_a_choice_can_win_though_another_begins_with_it(twin, pair):
    which = ["Which of these is red?", "Which of these is blue?"]
    rows = [Example(f"own/test/{i}", None, which[i], pair[i], choices=pair) for i in range(2)]
    net = Net(taught(twin, rows), stream_of(rows))
    lines = ask(net, [("own", 0), ("own", 1)], "test")
    assert [line["text"] for line in lines.values()] == list(pair)
    assert [line["metadata"]["content"] for line in lines.values()] == [1., 1.]


def test_the_end_counts_in_sets_in_which_a_choice_begins_another(twin):
    bb, e = get_backbone(str(twin)), asked(1)[0]
    for choices in (*PAIRS, ("", "yes"), ("",), ("cat", "dog", "cat foods"), ("cat", "cat"), ("cat", "CAT")):
        ids = [bb.encode(e.question, c, e.image is not None)[1] for c in choices]
        bare = [i[:-1] for i in ids]
        nested = any(a != b and b[:len(a)] == a for a in bare for b in bare) or [] in bare
        assert bb.options(replace(e, choices=choices)) == (ids if nested else bare)
    assert bb.options(replace(e, choices=())) == []


def test_no_choice_of_the_embedded_streams_begins_another():
    "So the content scores of earlier records keep their meaning."
    bb = get_backbone()
    for name in all_streams():
        for task, _ in get_stream(name).roles():
            for e in (task.example("test", i) for i in range(8)):
                assert bb.options(e) == [bb.encode(e.question, c)[1][:-1] for c in e.choices]


def test_scores_of_choices_are_of_their_tokens_and_the_end(twin):
    bb = get_backbone(str(twin))
    many = ("cat", "cat food", "cat foods", "", "c", "dog", "CAT", "cat")
    rows = [replace(e, choices=many if i % 2 else ("yes", "no")) for i, e in enumerate(asked(4))]
    ids = [[bb.texts(e, c)[1] for c in e.choices] for e in rows]
    with at(bb.collate(rows, answers=False)) as b: _, lls = bb.answer(b, 1, ids)
    for e, ll in zip(rows, lls):
        for choice, got in zip(e.choices, ll):
            one = bb.collate([replace(e, answer=choice)])
            with at(one), torch.no_grad(): out = bb.forward(one)
            assert float(got) == pytest.approx(-float(out.loss)*len(out.labels), rel=1e-4)


# What does not fit

def words(n): return "red "*n


def task(name, question, answer="red", n=40, room=4, choices=()):
    "A task of rows that are all short but the last one of each split."
    def make(split, i):
        asked, said = (question.get(split, "red"), answer) if i == n - 1 else ("red", "red")
        return Example(f"{name}/{split}/{i}", np.zeros((48, 48, 3), np.uint8), asked, said, choices=choices)
    return Task(name, Format("word", ".*", room), "none", "words", dict.fromkeys(("train", "val", "test"), n), make)


@pytest.fixture
def given():
    "Put a stream of two tasks, the first an ordinary one, under a name that runs know."
    def put(**fields): streams["given"] = lambda: Stream("given", [task("plain", {}), task("long", **fields)])
    yield put
    streams.pop("given", None)


def run(tmp_path, method="finetune", **fields):
    base = {"stream": "given", "optim": {"steps": 2, "batch": 40, "lr": 1e-3}, "compute": {"threads": 1}}
    return Run(method, **{**base, "out": str(tmp_path/"run"), **fields})


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_longer_than_the_positions_is_found_before_training(given, tmp_path, split):
    given(question={split: words(600)})
    said = f"long/{split}/39 needs 6.. tokens.*tiny-instruct was made for 512"
    with pytest.raises(CitError, match=said): run(tmp_path).train()
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("method", ["er", "joint", "ewc"])
def test_methods_that_draw_old_rows_are_looked_at_too(given, tmp_path, method):
    given(question={"train": words(600)})
    with pytest.raises(CitError, match="long/train/39 needs"): run(tmp_path, method).train()


def test_only_rows_that_are_drawn_count(given, tmp_path):
    given(question={"train": words(600)})
    few = run(tmp_path, optim={"steps": 1, "batch": 1, "lr": 1e-3})
    assert few.train().finished
    net, *_ = run(tmp_path/"b", optim={"steps": 1, "batch": 1, "lr": 1e-3}).open()
    with pytest.raises(CitError, match="long/train/39 needs 6.. tokens"): net.rows([("long", 39)])


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_last_row_that_fits_and_the_first_that_does_not(given, tmp_path, split):
    "Around a question lie the template's tokens, and an answer of two or room for four."
    bb = get_backbone()
    around = len(bb.encode("", "")[0]) + (2 if split == "train" else 4)
    for n in (512 - around, 513 - around):
        given(question={split: words(n).strip()})
        if n == 512 - around: run(tmp_path/str(n)).open()
        else:
            with pytest.raises(CitError, match=f"long/{split}/39 needs 513 tokens"): run(tmp_path/str(n)).open()


SOFT = [("finetune_part", {"part": "prompt", "length": 20}, 20), ("l2p", {"top": 4, "length": 5}, 20),
        ("fwd_prompt", {"top": 2, "length": 5, "variant": "residual"}, 10)]


@pytest.mark.parametrize("method,args,soft", SOFT)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_soft_prompt_counts(given, tmp_path, method, args, soft, split):
    bb, m = get_backbone(), get_method(method, **args)
    around = len(bb.encode("", "")[0]) + (2 if split == "train" else 4)
    assert m.soft == soft and (get_method("er") + m).soft == soft
    given(question={split: words(513 - around - soft).strip()})
    with pytest.raises(CitError, match=f"long/{split}/39 needs 513 tokens, .* for a soft prompt"):
        run(tmp_path, method, method_args=args).open()
    run(tmp_path/"plain").open()


def test_a_soft_prompt_that_nobody_announced_is_found_at_its_batch():
    bb = get_backbone()
    rows = [Example("a/train/0", None, "red", "red"), Example("a/train/1", None, words(495), "red")]
    b = bb.collate(rows)
    soft = torch.zeros(2, 20, bb.lm.config.hidden_size)
    with pytest.raises(CitError, match="a/train/1 needs 5.. tokens, 20 of them"), at(replace(b, prefix=soft)) as b:
        bb.forward(b)


def test_what_is_typed_is_looked_at(tmp_path):
    net = Net(get_backbone(), get_stream("shapes", tasks=["col-word"], n_train=8, n_val=2, n_test=2))
    assert isinstance(reply_of(net, None, words(400)), str)
    for text in (words(600), words(500).strip()):
        with pytest.raises(CitError, match="ask needs .* tokens"): reply_of(net, None, text)
    with pytest.raises(CitError, match="ask: .* holds '<image>'"): reply_of(net, None, "what is an <image> tag?")
    (tmp_path/"asks").mkdir()
    (tmp_path/"asks"/"1.json").write_text(json.dumps({"image": False, "text": words(600)}))
    answer_asks(tmp_path, None, net, {"task": "t", "step": 0})
    assert "was made for 512" in json.loads((tmp_path/"asks"/"1.reply").read_text())["error"]


def test_a_control_token_that_cannot_be_written_is_found_before_training(given, tmp_path):
    given(question={"train": "the </s> tag"})
    with pytest.raises(CitError, match="long/train/39: 'the </s> tag' holds '</s>'"): run(tmp_path).train()
    assert not (tmp_path/"run").exists()


def test_few_rows_are_tokenised_before_training(given, monkeypatch):
    given(question={"train": words(200)}, n=3000)
    net = Net(get_backbone(), get_stream("given"))
    seen = []
    encode = type(net.backbone.chat).encode
    monkeypatch.setattr(type(net.backbone.chat), "encode", lambda self, q, *a: seen.append(q) or encode(self, q, *a))
    net.check_rows("long", "train", range(3000))
    assert len(seen) < 10


# Room for an answer

def test_room_is_what_the_longest_true_answer_needs(twin):
    bb = get_backbone(str(twin))
    title, box = "A very long title of a book by nobody at all", "[0.123456, 0.234567, 0.345678, 0.456789]"
    for answer in (title, "日本語のとても長い答え", box):
        rows = [Example("own/test/0", None, "Which title?", "cat"), Example("own/test/1", None, "What is it?", answer)]
        need = len(bb.encode("q?", answer, False)[1])
        net = Net(bb, stream_of(rows, need//2))
        assert net.room("own", "test") == (need, 0, need) and need > need//2
        perfect = lambda b, most: [bb.texts(e, e.answer)[1][:most] for e in b.examples]
        net.answer = lambda b, most, choices: (perfect(b, most), [None]*len(b))
        lines = ask(net, [("own", 0), ("own", 1)], "test")
        assert [line["metadata"]["formatted"] for line in lines.values()] == [1., 1.]


def test_room_of_choices_and_the_line_for_answers_that_do_not_fit(given, tmp_path):
    given(question={}, answer=words(30).strip(), room=4)
    net = Net(get_backbone(), get_stream("given"))
    assert net.room("plain", "test")[:2] == (4, 0)
    assert net.room("long", "test") == (16, 1, 31)
    said = "1 of 40 true test answers of task 'long' do not fit into its room of 16 tokens .the longest needs 31"
    with pytest.warns(UserWarning, match=said):
        run(tmp_path).open()
    given(question={}, room=4, choices=("red", words(9).strip()))
    assert Net(get_backbone(), get_stream("given")).room("long", "test")[:2] == (10, 0)


def test_a_run_without_long_answers_says_nothing(given, tmp_path):
    given(question={})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path).open()


def test_a_row_that_is_too_long_is_named_by_its_id_in_the_file(twin):
    "A conversation gives several rows, so a row's number is not that of its record."
    example = Example("VQAv2/train/4", None, "red "*9000, "yes", (), {"question_id": "24#1"})
    with pytest.raises(CitError, match=r"VQAv2/train/4 \(id '24#1'\) needs \d+ tokens, but"):
        get_backbone(str(twin)).collate([example])
