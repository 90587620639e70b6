"Numbers of released code, computed again by hand or in a few independent lines in double precision."
from dataclasses import replace
from types import SimpleNamespace as Space

import numpy as np
import pytest
import torch
from tiny import OTHERS, TASKS, jitter, opened, train
from torch import nn

from cit_workbench.models.slots import inserted
from cit_workbench.models.tune import Tune
from cit_workbench.models.batch import at
from cit_workbench.core.digests import digest
from cit_workbench.core.errors import CitError
from cit_workbench.contract.memory import join_tree, split_tree
from cit_workbench.contract.registry import get_method
from cit_workbench.methods.llaca import LLaCA
from cit_workbench.methods.mas import answer_norm
from cit_workbench.methods.olora import OLoRA, SumLinear
from cit_workbench.methods.smolora import SMoLinear, SMoLoRA
from cit_workbench.methods.tir import TIR, per_position, relative


# llaca: a step without a gradient, and the one after it

def averaged(path) -> float:
    "The released average of one tensor along (gradient or None, weights after the step), in plain numbers."
    mean = last = None
    for g, p in path:
        mean, a = p if mean is None else mean, .01
        if g is not None and last is not None:
            far, bend = (p - mean).abs().sum(), (g - last).abs().sum()
            found = float(2*(1 + g.abs().sum())/(far*bend)) if far*bend > 0 else 0.
            a = found if 0 < found < 1 else .01
        mean, last = (1 - a)*mean + a*p, g
    return mean


def walked(method, path, names=("w",)):
    "The method's average along the same path."
    net = Space(params={n: torch.zeros(path[0][1].shape, requires_grad=True) for n in names}, first=False)
    method.mem = {"known": [digest(*net.params)]}
    for g, p in path:
        old = {n: q.detach().clone() for n, q in net.params.items()}
        for q in net.params.values():
            q.grad = None if g is None else g.float()
            q.data.copy_(p)
        method.step(net, Space(old=old))
        tree, tensors = split_tree(method.mem)
        method.mem = join_tree(tree, tensors)
    return method.mem["mean"]["w"]


WITHOUT = [(), (0,), (1,), (3,), (3, 4), (7,), (2, 5, 6), range(8)]


@pytest.mark.parametrize("none", WITHOUT, ids=str)
def test_llaca_released_goes_on_where_a_gradient_is_missing(none):
    gen = torch.Generator().manual_seed(1)
    draw = lambda size: size*torch.randn(4, 8, generator=gen, dtype=torch.double)
    place, path = draw(1.), []
    for k in range(8):
        g = draw(1.)
        place = place if k in none else place + draw(3.)
        path.append((None if k in none else g, place))
    got = walked(LLaCA(variant="released"), path)
    torch.testing.assert_close(got.double(), averaged(path), rtol=1e-5, atol=1e-5)


def test_llaca_released_by_hand():
    path = [(-4.8, 2.), (-2.8, 3.), (None, 3.), (-.8, 4.), (1.2, 5.)]
    path = [(None if g is None else torch.tensor([g]), torch.tensor([p])) for g, p in path]
    for n, want in enumerate((2., 2.01, 2.0199, 2.039701, 4.239701), 1):
        assert walked(LLaCA(variant="released"), path[:n]).item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("variant", ["paper", "elementwise"])
def test_llaca_has_no_formula_at_a_step_without_a_gradient_nor_at_the_next(variant):
    g, p = torch.tensor([.5]), [torch.tensor([v]) for v in (1., 1., 1.5)]
    path = [(g, p[0]), (None, p[1]), (2*g, p[2])]
    first = .99*0. + .01*1.
    second = .99*first + .01*1.
    assert walked(LLaCA(variant=variant), path).item() == pytest.approx(.99*second + .01*1.5, abs=1e-6)


@pytest.mark.parametrize("variant", ["paper", "elementwise"])
def test_llaca_raises_for_what_moved_without_a_gradient(variant):
    with pytest.raises(CitError, match="w has none after this step"):
        walked(LLaCA(variant=variant), [(None, torch.ones(1))])


def test_llaca_on_lora_has_a_gradient_at_every_step(finished):
    "So the committed runs, which trained LoRA, keep their numbers: the rule above is never asked."
    for variant in ("paper", "released"):
        run = finished("llaca", method_args={"variant": variant})
        steps = [e for e in run.rec.events("step") if e["task"] != TASKS[0]]
        assert steps and all("in_range" in e["stats"] for e in steps)
    seen = []

    class Look(LLaCA):
        called = "llaca"

        def slope(self, n, p, now, old):
            seen.append(p.grad is not None)
            return super().slope(n, p, now, old)
    net, some = run.net, Look()
    some.mem = {"known": [digest(*net.params)]}
    b = net.rows([(TASKS[0], i) for i in range(4)], task=[TASKS[0]]*4)
    with at(b): net.forward(b).loss.backward()
    some.step(net, Space(old={n: p.detach().clone() for n, p in net.params.items()}))
    net.model.zero_grad(set_to_none=True)
    assert seen and all(seen)


# smolora: layers, counts and choices

def adapted(run) -> set:
    "Names of the layers that have experts."
    return {n.split(".")[-1] for n, m in run.net.model.named_modules() if isinstance(m, SMoLinear)}


def test_smolora_released_layers_are_the_papers(finished):
    ours = {k: adapted(finished("smolora", method_args={"layers": k}, tune={"targets": r".*(proj|linear_.)"}))
            for k in ("paper", "released")}
    assert ours["paper"] == ours["released"] == {"gate_proj", "up_proj", "down_proj", "linear_1", "linear_2"}


def test_smolora_has_187_million_weights_in_experts_on_llava_7b():
    "Counted on the layers themselves, which hold no numbers here."
    d, f, how = 4096, 11008, SMoLoRA(layers="released")
    shapes = 32*[(d, f), (d, f), (f, d)] + [(1024, d), (d, d)]
    experts = beside = 0
    for i, o in shapes:
        layer = SMoLinear(nn.Linear(i, o, device="meta"), "", how, Tune(r=128, alpha=256.), asked=384)
        experts += layer.A.numel() + layer.B.numel()
        beside += layer.u.numel() + sum(p.numel() for p in layer.R.values())
    assert (experts, beside) == (187_301_888, 4_316_160)


POOLS = [{"pool": "released"}, {"pool": "released", "variant": "soft_topk"}, {"pool": "released", "layers": "paper"},
         {"pool": "released", "use": "vu"}, {"pool": "released", "variant": "straight_through", "use": "if"},
         {"pool": "prompt"}]


@pytest.mark.parametrize("args", POOLS, ids=lambda a: "-".join(a.values()))
def test_smolora_choices_do_not_move_each_other(finished, args):
    net = finished("smolora", method_args=args, tune={"targets": r".*language_model.*_proj"}).net
    bb, was = net.backbone, {n: p.detach().clone() for n, p in net.params.items()}
    jitter(net, .1)
    try:
        b = net.rows([(OTHERS[0], 0)], "test", answers=False, task=[None])
        said = ["red square", "a blue circle in the corner", "green", "red circle on the left"]
        choices = [bb.encode(b.examples[0].question, c)[1][:-1] for c in said]
        assert sum(len(c) > 1 for c in choices) > 2
        together = net.answer(b, 1, [choices])[1][0]
        alone = torch.cat([net.answer(b, 1, [[c]])[1][0] for c in choices])
        turned = net.answer(b, 1, [choices[::-1]])[1][0].flip(0)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together, turned, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone, torch.stack([one_by_one(net, b, c) for c in choices]), rtol=1e-4, atol=1e-4)
    finally:
        with torch.no_grad():
            for n, p in net.params.items(): p.copy_(was[n])


def one_by_one(net, b, tokens) -> torch.Tensor:
    "Log-likelihood of a choice whose tokens go through the model one at a time, as in decoding."
    from transformers import DynamicCache
    bb = net.backbone
    cache = DynamicCache(config=bb.lm.config)
    with at(net.method.route(net, replace(b, ctx={}))) as b, torch.no_grad():
        h, _, mask, _ = bb.hidden(b, past_key_values=cache)
        logits, total, place = bb.head(h[:, -1]).float(), 0., mask.sum(1, keepdim=True)
        for k, t in enumerate(tokens):
            total = total + logits.log_softmax(-1)[0, t]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits = bb.speaker.step(torch.tensor([[t]]), mask, place + k, cache)[:, -1]
    return total


# olora: the second strength

def pair(*rows):
    "A layer whose last slot is given."
    layer = SumLinear(nn.Linear(4, 1), r=2, alpha=2.)
    for A, B in rows:
        layer.add()
        layer.A[-1].data[:], layer.B[-1].data[:] = torch.tensor(A), torch.tensor(B)
    return Space(model=nn.Sequential(layer), layer=layer)


def test_olora_adds_norms_that_are_not_squared():
    "‖A‖ = √(4 + 1 + 1), ‖B‖ = 5; rows share 2, −1, 0 and 0 with the old ones."
    old = [[1., 0., 0., 0.], [0., 1., 0., 0.]], [[9., 9.]]
    new = [[2., -1., 0., 0.], [0., 0., 0., 1.]], [[3., 4.]]
    net = pair(old, new)
    added = lambda **args: torch.as_tensor(OLoRA(**args).loss(net, None, None)).item()
    assert added(lam=.5, lam2=0.) == 1.5
    assert added(lam=.5, lam2=.3) == pytest.approx(1.5 + .3*(6**.5 + 5), abs=1e-6)
    assert added(lam=0., lam2=.1) == pytest.approx(.1*(6**.5 + 5), abs=1e-6)
    assert OLoRA(lam2=.3).loss(pair(new), None, None).item() == pytest.approx(.3*(6**.5 + 5), abs=1e-6)
    force = torch.autograd.grad(OLoRA(lam=0., lam2=.1).loss(net, None, None), [net.layer.A[1], net.layer.B[1]])
    torch.testing.assert_close(force[1], .1*torch.tensor([[.6, .8]]))
    assert torch.autograd.grad(OLoRA(lam=0., lam2=.1).smallness(pair((new[0], [[0., 0.]]))), net.layer.A[1],
                               allow_unused=True)[0] is None


def test_olora_has_a_strength_for_each_task(tmp_path):
    one = {"stream_args": {"tasks": TASKS[:2]}, "optim": {"steps": 2}}
    run = train(tmp_path/"run", "olora", method_args={"lam": 0., "lam2": [.3, 0.]}, **one)
    first, second = ([e for e in run.rec.events("step") if e["task"] == t] for t in TASKS[:2])
    begun = opened(tmp_path/"begun", "olora", **one).net
    norms = sum(l.A[0].norm().item() for l in inserted(begun.model, SumLinear))
    assert first[0]["added"] == pytest.approx(.3*norms, rel=1e-5) and {e["added"] for e in second} == {0.}
    assert first[0]["stats"]["penalty"] > 0
    assert second[0]["stats"]["penalty"] == 0. and second[0]["stats"]["overlap"] > 0


@pytest.mark.parametrize("lam2, says", [(-1., "of at least 0"), ([0., -1.], "of at least 0"), ([True], "of at least 0"),
                                        (["a"], "of at least 0"), (float("nan"), "must be a finite number"), ("a", "lam2")])
def test_olora_refuses_other_strengths(lam2, says):
    with pytest.raises(CitError, match=says): get_method("olora", lam2=lam2)


def test_olora_wants_a_number_for_each_task(tmp_path):
    with pytest.raises(CitError, match="lam2 has 2 numbers, but the stream has 3 tasks"):
        train(tmp_path/"run", "olora", method_args={"lam2": [.1, .2]})


# tir: the released form

class Known:
    "Weights whose importances are given, and tasks whose features are."
    def __init__(self, sizes, importance, angle):
        self.importance, self.angle, self.first = importance, angle, True
        self.tasks = {n: Space(name=n, n={"train": k}) for n, k in sizes.items()}
        self.held_in = [self.tasks[n] for n in "AB"]
        self.stream, self.measured = Space(held_in=self.held_in), {}
        self.params = {"w": torch.zeros(3, requires_grad=True), "v": torch.zeros(2, requires_grad=True)}

    def rng(self, owner): return np.random.default_rng(0)
    def rows(self, refs): return refs

    def features(self, batch, what):
        a = torch.deg2rad(torch.tensor([self.angle[t][what] for t, _ in batch], dtype=torch.double))
        return torch.stack([a.cos(), a.sin()], 1)

    def sample_grads(self, task, fn, n, how):
        self.measured[task] = n
        w = torch.tensor(self.importance[task], dtype=torch.double)
        return {"w": w[:3], "v": w[3:]}


def by_hand(net, order, n):
    "Ω, the task that each weight belongs to, and the discounted Ω of the last task, as released code has them."
    omega = owner = None
    seen, left = [], None
    for k, t in enumerate(order):
        total = net.tasks[t].n["train"]
        unit = {m: torch.tensor([torch.deg2rad(torch.tensor(net.angle[t][m])).cos(),
                                 torch.deg2rad(torch.tensor(net.angle[t][m])).sin()]).double() for m in net.angle[t]}
        s = 1.
        for m in unit:
            rows = [unit[m], *(u[m] for u in seen)]
            pairs = torch.tensor([float(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(i + 1, len(rows))])
            pairs = pairs.double()
            scaled = torch.sigmoid((pairs - pairs.mean())/pairs.std()) if len(pairs) > 1 else pairs
            s = s*scaled[:len(seen)]
        seen.append(unit)
        if omega is not None and t not in "AB":
            omega = omega*(1 - s)[owner]
            left = omega
        w = torch.tensor(net.importance[t], dtype=torch.double)
        w = w/w.sum()/len(range(0, total, max(1, total//n)))
        if omega is None: omega, owner = w, torch.zeros(len(w), dtype=torch.long)
        else: owner, omega = torch.where(w > omega, k, owner), torch.maximum(omega, w)
    return omega, owner, left


def test_tir_released_follows_the_released_code():
    "Two held-in tasks and three of the stream, with unequal numbers of examples."
    angle = {t: {"answer": a, "image": b, "instruction": c}
             for t, a, b, c in (("A", 0., 10., 40.), ("B", 50., 0., 5.), ("C", 20., 130., 60.), ("D", 70., 30., 10.),
                                ("E", 15., 80., 35.))}
    importance = {"A": [4., 1, 0, 2, 3], "B": [0., 5, 1, 1, 1], "C": [1., 1, 9, 1, 0], "D": [2., 0, 1, 6, 1],
                  "E": [1., 2, 3, 4, 5]}
    sizes = {"A": 4, "B": 9, "C": 15, "D": 7, "E": 40}
    net, m = Known(sizes, importance, angle), TIR(variant="released", n=4, importance="mas")
    for t in "CDE":
        m.begin(net, net.tasks[t])
        net.first, during = False, torch.cat([m.mem["now"][k] for k in "wv"])
        m.end(net, net.tasks[t])
        omega, owner, left = by_hand(net, "AB" + "CDE"[:"CDE".index(t) + 1], 4)
        torch.testing.assert_close(during, left, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(torch.cat([m.mem["omega"][k] for k in "wv"]), omega, rtol=1e-6, atol=1e-9)
        assert torch.cat([m.mem["id"][k] for k in "wv"]).tolist() == owner.tolist()
    assert net.measured == {"A": 4, "B": 5, "C": 5, "D": 7, "E": 4}


def test_tir_unequal_iterations_are_not_one_factor():
    "4 and 5 iterations: the quotient of two springs is another than without, whatever λ is."
    flat = {t: {"answer": 0., "image": a, "instruction": 0.} for t, a in (("A", 0.), ("B", 90.), ("C", 90.))}
    sizes, importance = {"A": 4, "B": 9, "C": 4}, {"A": [1., 0, 0, 0, 0], "B": [0., 1, 0, 0, 0], "C": [0., 0, 1, 0, 0]}
    held = {}
    for v in ("compound", "released"):
        net, m = Known(sizes, importance, flat), TIR(variant=v, n=4)
        net.stream.held_in = []
        for t in "AB":
            m.begin(net, net.tasks[t])
            m.end(net, net.tasks[t])
        held[v] = m.mem["omega"]["w"]
    torch.testing.assert_close(held["compound"], torch.tensor([1., 1., 0.], dtype=torch.double))
    torch.testing.assert_close(held["released"], torch.tensor([1/4, 1/5, 0.], dtype=torch.double))


def test_tir_first_pair():
    "A negative cosine tightens the spring in released code; the default cuts it at 0."
    apart = torch.tensor([[1., 0.], [-.6, .8]])
    assert relative(apart).tolist() == [0.]
    assert relative(apart, raw=True).tolist() == pytest.approx([-.6])


def test_tir_released_averages_over_positions():
    z = torch.tensor([[1., 2, 3], [0, 0, 3], [5, 5, 5]])
    out = Space(logits=z, row=torch.tensor([0, 0, 1]))
    assert per_position(lambda o: answer_norm(o, centred=False))(out).tolist() == [(14 + 9)/2, 75.]


def test_tir_released_holds_from_the_first_task_on(finished):
    "Held-in tasks are measured at the first `begin`; the default looks at none and leaves the first task free."
    run, plain = finished("tir", method_args={"n": 8, "variant": "released", "lam": 1e6}), finished("tir")
    first = lambda r: [e for e in r.rec.events("step") if e["task"] == TASKS[0]]
    assert first(run)[-1]["added"] > 0 and {e["added"] for e in first(plain)} == {0.}
    assert run.rec.leaks == ["pretrain_data"] and plain.rec.leaks == []
    held = [t for t in run.data.held_in if t.n["train"]]
    assert held and len(run.net.method.mem["tasks"]) == len(held) + len(TASKS)
    assert len(plain.net.method.mem["tasks"]) == len(TASKS)


# lwf: the start model as the first teacher

def test_lwf_distils_from_the_start_model(finished):
    run, plain = finished("lwf", method_args={"start": True}), finished("lwf")
    first = lambda r: [e["added"] for e in r.rec.events("step") if e["task"] == TASKS[0]]
    assert abs(first(run)[0]) < 1e-6 < first(run)[-1] and {*first(plain)} == {0.}
    steps, batch = run.opt.steps, run.opt.batch
    spent = [r.rec.summary()["extra_forwards"] for r in (run, plain)]
    assert spent == [3*steps*batch, 2*steps*batch]
