"Answers are those of plain generation in any batch; forced choice is likelihood; nothing is asked twice."
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import OTHERS, TASKS, jitter, opened

from cit_workbench.models.backbone import Backbone
from cit_workbench.models.batch import at
from cit_workbench.metrics import cider
from cit_workbench.data.stream import get_stream
from cit_workbench.measure.answers import ask, evaluate

COLUMNS = [t.name for t, _ in get_stream("shapes").roles()]
ROWS = [(t, i) for i in range(5) for t in COLUMNS]


@pytest.fixture(scope="module", params=["start", "tuned"])
def net(request, tmp_path_factory):
    "The start model, and one whose adapters say something else."
    args = {"tasks": None, "n_test": 5}
    net = opened(tmp_path_factory.mktemp("net"), "finetune", stream_args=args).net
    if request.param == "tuned": jitter(net, .1)
    net.model.eval()
    return net


def generated(net, refs, max_new):
    "What the Hugging Face model generates: pixels in, tokens out, greedily, stopped at the end token."
    bb = net.backbone
    b = net.rows(refs, "test", answers=False)
    pixels = bb.pixels([e.image for e in b.examples])
    out = net.model.generate(input_ids=b.ids, attention_mask=b.mask, pixel_values=pixels, do_sample=False, num_beams=1,
                             max_new_tokens=max_new, pad_token_id=bb.pad, eos_token_id=bb.eos)
    return [r[:r.index(bb.eos)] if bb.eos in r else r for r in out[:, b.ids.shape[1]:].tolist()]


def test_answers_are_those_of_generate(net):
    got, _ = net.answer(net.rows(ROWS, "test", answers=False), 12)
    assert len(ROWS) >= 64 and got == generated(net, ROWS, 12)
    alone = ROWS[::7]
    assert [g for r, g in zip(ROWS, got) if r in alone] == [generated(net, [r], 12)[0] for r in alone]
    assert len({tuple(g) for g in got}) > 1


def test_mixed_batches_answer_like_tasks_alone(net):
    mixed = ask(net, ROWS, "test")
    for t in COLUMNS:
        own = [r for r in ROWS if r[0] == t]
        assert ask(net, own, "test") == {r: mixed[r] for r in own}
    assert ask(net, ROWS, "test", tokens=300) == mixed


def brute(net, ref):
    "Log-likelihood of each choice, one unpadded sequence at a time, by the Hugging Face model alone."
    bb, e = net.backbone, net.stream.task(ref[0]).example("test", ref[1])
    pixels, out = bb.pixels([e.image]), []
    for c in e.choices:
        prompt, answer = bb.encode(e.question, c, True)
        ids = torch.tensor([prompt + answer[:-1]])
        with torch.no_grad(): logits = net.model(input_ids=ids, attention_mask=ids*0 + 1, pixel_values=pixels).logits
        lp = logits[0, len(prompt) - 1:-1].log_softmax(-1)
        out.append(lp.gather(1, torch.tensor(answer[:-1])[:, None]).sum())
    return torch.stack(out)


def test_forced_choice_is_likelihood(net):
    "Single-token choices, several tokens, of one length and of many, in one batch."
    b = net.rows(ROWS, "test", answers=False)
    enc = net.backbone.encode
    choices = [[enc(e.question, c, True)[1][:-1] for c in e.choices] for e in b.examples]
    assert len({len(t) for cs in choices for t in cs} | {1}) > 2
    _, lls = net.answer(b, 2, choices)
    lines = ask(net, ROWS, "test")
    for ref, e, ll in zip(ROWS, b.examples, lls):
        want = brute(net, ref)
        torch.testing.assert_close(ll, want, rtol=1e-4, atol=1e-4)
        best, second = want.topk(2).values
        right = float(e.choices[int(want.argmax())] == e.answer)
        assert lines[ref]["metadata"]["content"] == right or best - second < 1e-3


def test_answers_do_not_depend_on_forced_choice(net):
    b = net.rows(ROWS[:24], "test", answers=False)
    choices = [[net.backbone.encode(e.question, c, True)[1][:-1] for c in e.choices] for e in b.examples]
    assert net.answer(b, 12)[0] == net.answer(b, 12, choices)[0]
    assert net.answer(b, 12, [[] for _ in choices])[1] == [None]*24


def test_scores_are_means_of_lines(net):
    for name, (scores, lines) in evaluate(net, COLUMNS).items():
        task = net.stream.task(name)
        asked, said = [task.example("test", i) for i in range(5)], [l["metadata"] for l in lines]
        assert [l["question_id"] for l in lines] == [e.id for e in asked] and scores["n"] == 5
        for e, l, m in zip(asked, lines, said):
            assert (l["prompt"], m["answer"]) == (e.question, e.answer)
            assert (m["formatted"], m["valid"]) == (task.format.score(e, l["text"]), task.format.valid(l["text"]))
        for k in ("formatted", "valid", "content"):
            vals = [m[k] for m in said if m[k] is not None]
            assert scores[k] == (pytest.approx(100*sum(vals)/len(vals)) if vals else None)
        if task.format.kind == "caption":
            assert scores["cider"] == cider([l["text"] for l in lines], [m["answer"] for m in said])


# The store of answers

@pytest.fixture
def asked(monkeypatch, tmp_path):
    "How many rows were answered so far, with a store of its own."
    monkeypatch.setenv("CIT_CACHE", str(tmp_path))
    rows, answer = [], Backbone.answer

    def counted(self, b, *args):
        rows.append(len(b))
        return answer(self, b, *args)
    monkeypatch.setattr(Backbone, "answer", counted)
    return lambda: sum(rows)


@pytest.fixture
def own(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("own"), "finetune").net


def test_nothing_is_answered_twice(own, asked):
    first = evaluate(own, TASKS)
    assert asked() == 6
    assert evaluate(own, TASKS) == first and evaluate(own, TASKS[:1]) == {TASKS[0]: first[TASKS[0]]} and asked() == 6
    named = evaluate(own, TASKS[:1], model_id="another name")[TASKS[0]][1]
    assert asked() == 6 and {l["model_id"] for l in named} == {"another name"}
    evaluate(own, [*TASKS, OTHERS[0]])
    assert asked() == 8


def test_whatever_may_change_an_answer_is_asked_anew(own, asked):
    evaluate(own, TASKS[:1])
    p = next(iter(own.params.values()))
    with torch.no_grad(): p.view(-1)[0] += 1e-7 + p.view(-1)[0].abs()*1e-6
    evaluate(own, TASKS[:1])
    assert asked() == 4
    own.method.mem["table"] = torch.zeros(2)
    evaluate(own, TASKS[:1])
    assert asked() == 6
    own.method.mem["table"][0] = 1
    evaluate(own, TASKS[:1])
    assert asked() == 8
    evaluate(own, TASKS[:1], split="val")
    evaluate(own, TASKS[:1], oracle=True)
    assert asked() == 12
    own.examples._feats.clear()
    own.examples.stream = own.examples.plan = replace(own.stream, tasks=[replace(t, n={**t.n, "test": 3}) for t in own.stream.tasks])
    evaluate(own, TASKS[:1])
    assert asked() == 15


def test_the_start_model_is_asked_once_for_all_methods(asked, tmp_path):
    opened(tmp_path/"a", "finetune")
    before = asked()
    assert before > 0
    for name in ("er", "single"): opened(tmp_path/name, name)
    assert asked() == before


DAMAGE = [lambda b: b"", lambda b: b[:len(b)//2], lambda b: b[:-1], lambda b: b"[]\n[]\n", lambda b: b"\xff" + b,
          lambda b: b.replace(b'"valid":', b'"valid":2'), lambda b: b + b"\n{}"]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_broken_store_is_ignored(own, asked, damage):
    first = evaluate(own, TASKS[:1])
    f, = [p for p in Path(os.environ["CIT_CACHE"]).rglob("*") if p.is_file()]
    good = f.read_bytes()
    f.write_bytes(damage(good))
    assert evaluate(own, TASKS[:1]) == first and asked() == 4 and f.read_bytes() == good


# Losses

def test_padding_does_not_matter(net):
    "A row's logits are the same alone and beside longer rows, right-padded for loss and left-padded for answers."
    with at(net.rows(ROWS[:12], "test")) as b, torch.no_grad(): many = net.forward(b).answer_logits
    for k, ref in enumerate(ROWS[:12]):
        with at(net.rows([ref], "test")) as one, torch.no_grad():
            torch.testing.assert_close(net.forward(one).answer_logits[0], many[k], rtol=1e-4, atol=1e-4)


def test_loss_is_the_mean_over_answer_tokens(net):
    "As the Hugging Face model computes it, from pixels."
    b = net.rows(ROWS[:20], "test")
    pixels = net.backbone.pixels([e.image for e in b.examples])
    with torch.no_grad(): want = net.model(input_ids=b.ids, attention_mask=b.mask, labels=b.labels, pixel_values=pixels)
    torch.testing.assert_close(net(b).loss, want.loss, rtol=1e-5, atol=1e-5)
