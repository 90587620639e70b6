"Throwaway methods that ask of the contract what real ones will: inner routes, phases without the model, projections."
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import (ONE, OTHERS, TASKS, Anchor, Halves, Twins, batch_of, descend, final, furthest, opened, same_tensors,
                  train)
from torch import nn

from cit_workbench.models.slots import swap_linears
from cit_workbench.models.backbone import Backbone
from cit_workbench.models.batch import at, current
from cit_workbench.core.digests import rng
from cit_workbench.core.errors import CitError
from cit_workbench.contract.method import Method, Phase
from cit_workbench.training.rows import rate
from cit_workbench.training.gradients import token_totals
from cit_workbench.training.train import Run


REFS = [(t, i) for i in range(2) for t in [*TASKS, *OTHERS]]


# A route found inside a layer

class Experts(nn.Module):
    "A frozen linear layer and two low-rank experts; which one a row takes is decided where it is first read."
    def __init__(self, base, name, soft):
        super().__init__()
        g = torch.Generator().manual_seed(len(name))
        d, o = base.in_features, base.out_features
        self.base, self.name, self.soft, self.decided = base, name, soft, 0
        self.A = nn.Parameter(torch.randn(2, 2, d, generator=g)*.1)
        self.B = nn.Parameter(torch.randn(2, o, 2, generator=g)*.1)
        self.router = nn.Linear(d, 2, bias=False)
        with torch.no_grad(): self.router.weight.copy_(torch.randn(2, d, generator=g))

    def pooled(self, x, prompt): return torch.where(prompt[..., None], x, 0).sum(1)/prompt.sum(1, keepdim=True)

    def weights(self, x, b):  # [B, 2]
        if self.name not in b.ctx:
            self.decided += 1
            with torch.no_grad(): b.ctx[self.name] = self.decide(self.router(self.pooled(x, b.prompt)))
        if not self.soft or not torch.is_grad_enabled(): return b.ctx[self.name]
        return b.ctx[self.name].ceil()*self.router(self.pooled(x, b.prompt)).softmax(-1)

    def decide(self, score):
        choice = (score[:, 0]*40).floor().long() % 2
        hard = nn.functional.one_hot(choice, 2).to(score)
        return hard*score.softmax(-1) if self.soft else hard

    def forward(self, x):
        w = self.weights(x, current())
        return self.base(x) + torch.einsum("btd,erd,eor,be->bto", x, self.A, self.B, w)


@dataclass
class LayerRoute(Method):
    soft: bool = False

    def wrap(self, net):
        names = iter(range(99))
        swap_linears(net.model, r".*language_model.*down_proj", lambda l: Experts(l, f"layer{next(names)}", self.soft))
        return net


def experts(net): return [m for m in net.model.modules() if isinstance(m, Experts)]


@pytest.fixture(scope="module", params=[False, True], ids=["hard", "soft"])
def routed(request, tmp_path_factory):
    run = opened(tmp_path_factory.mktemp("routed"), LayerRoute, method_args={"soft": request.param})
    run.net.model.eval()
    return run.net


def test_layer_route_mixed_batches_are_batches_of_one(routed):
    with at(routed.rows(REFS, "test")) as b, torch.no_grad(): mixed = routed.forward(b).answer_logits
    routes = torch.stack(list(b.ctx.values()))  # layers b 2
    assert len(routes) == len(experts(routed))
    assert all({0, 1} == set(r.argmax(-1).tolist()) for r in routes)
    for k, ref in enumerate(REFS):
        with at(routed.rows([ref], "test")) as one, torch.no_grad(): alone = routed.forward(one).answer_logits
        torch.testing.assert_close(alone[0], mixed[k], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.stack(list(one.ctx.values()))[:, 0], routes[:, k])


def grads_of(net, b):
    with at(replace(b, ctx={})) as b: loss = net.forward(b).loss; loss.backward()
    got = {n: p.grad.clone() for n, p in net.params.items() if p.grad is not None}
    net.model.zero_grad(set_to_none=True)
    return float(loss.detach()), got


def test_layer_route_under_gradient_checkpointing(routed):
    net, b = routed, batch_of(routed, "shp-mcq", 8)
    layers, calls = experts(net), []
    hook = layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        plain, want = grads_of(net, b)
        once = len(calls)
        net.model.gradient_checkpointing_enable({"use_reentrant": False})
        net.model.train()
        before = [l.decided for l in layers]
        loss, got = grads_of(net, b)
    finally:
        hook.remove()
        net.model.gradient_checkpointing_disable()
        net.model.eval()
    assert once == 1 and len(calls) == 3                                    # recomputed in the backward
    assert [l.decided for l in layers] == [n + 1 for n in before]           # but decided once
    assert any("router" in n for n in got) == layers[0].soft
    assert loss == plain and furthest(got, want) < 1e-6


def slow_answer(net, ref, max_new):
    "Greedy tokens of one row, everything computed again for every token; ends before an image token."
    bb, b = net.backbone, net.rows([ref], "test", answers=False)
    out = []
    while len(out) < max_new:
        more = torch.tensor([out], dtype=torch.long)
        wide = {k: torch.cat([getattr(b, k), v], 1) for k, v in (("ids", more), ("mask", more*0 + 1), ("labels", more))}
        with at(net.method.route(net, replace(b, **wide, ctx={}))) as whole, torch.no_grad():
            tok = int(bb.head(bb.hidden(whole)[0][:, -1]).argmax())
        if tok in (bb.eos, bb.image_id): break
        out.append(tok)
    return out


def test_layer_route_token_by_token(routed):
    before, b = [l.decided for l in experts(routed)], routed.rows(REFS, "test", answers=False)
    got, _ = routed.answer(b, 6)
    assert b.ctx == {}
    assert [l.decided for l in experts(routed)] == [n + 1 for n in before]
    image = routed.backbone.image_id
    assert [g[:g.index(image)] if image in g else g for g in got] == [slow_answer(routed, r, 6) for r in REFS]


def test_layer_route_forced_choice(routed):
    "Choices continue the prefill, so they take its routes."
    bb = routed.backbone
    b = routed.rows(REFS, "test", answers=False)
    choices = [[bb.encode(e.question, c)[1][:-1] for c in e.choices] for e in b.examples]
    _, lls = routed.answer(b, 1, choices)
    for e, ll in zip(b.examples, lls):
        whole = bb.collate([replace(e, answer=c) for c in e.choices])
        with at(whole), torch.no_grad(): out = routed.forward(whole)
        each = out.logits.log_softmax(-1).gather(1, out.labels[:, None])[:, 0]*(out.labels != bb.eos)
        want = torch.zeros(len(whole)).index_add(0, out.row, each)
        torch.testing.assert_close(ll, want, rtol=1e-4, atol=1e-4)


def test_layer_route_trains_the_same_with_checkpointing(tmp_path):
    a = train(tmp_path/"a", LayerRoute, method_args={"soft": True}, **ONE)
    b = train(tmp_path/"b", LayerRoute, method_args={"soft": True}, compute={"checkpointing": True}, **ONE)
    assert furthest(final(a.folder), final(b.folder)) < 1e-6


# A phase without the language model

@dataclass
class Keys(Method):
    "First moves a key to the task's pictures by a loss of its own, then tunes LoRA."
    def phases(self, task): return [Phase("keys", steps=3, lm=False, train={"keys": {"lr": .5}}), Phase("tune")]

    def wrap(self, net):
        net.lora()
        net.model.keys = nn.Parameter(torch.zeros(net.backbone.projector.linear_1.in_features))
        return net

    def loss(self, net, batch, out):
        if net.clock[1] != "keys": return 0.
        return ((net.model.keys - net.features(batch, "image").mean(0))**2).sum()

    def end(self, net, task): self.mem[task.name] = net.model.keys.detach().clone()


@pytest.fixture
def watched(monkeypatch):
    "Counts forwards of the language model and notes parameters at every step."
    seen = {"lm": [], "params": []}
    hidden, one_step = Backbone.hidden, Run.one_step

    def counted(self, b, **kw):
        seen["lm"].append(1)
        return hidden(self, b, **kw)

    def step(self, net, opt, task, phase, *rest):
        before, was = len(seen["lm"]), {n: p.detach().clone() for n, p in net.own().items()}
        got = one_step(self, net, opt, task, phase, *rest)
        moved = {n for n, p in net.own().items() if not torch.equal(p, was[n])}
        assert {*net.params} == {n for n, p in net.model.named_parameters() if p.requires_grad}
        seen["params"].append((phase.name, len(seen["lm"]) - before, moved, len(net.params)))
        return got
    monkeypatch.setattr(Backbone, "hidden", counted)
    monkeypatch.setattr(Run, "one_step", step)
    return seen


def test_phase_without_the_language_model(tmp_path, watched):
    run = train(tmp_path, Keys)
    for name, forwards, moved, trainable in watched["params"]:
        if name == "keys": assert (forwards, moved, trainable) == (0, {"keys"}, 1)
        else: assert forwards == 1 and trainable > 20 and moved and all("lora_" in n for n in moved)
    assert [n for n, *_ in watched["params"]] == (["keys"]*3 + ["tune"]*4)*3
    lrs = [(e["phase"], e["step"], e["lr"]) for e in run.rec.events("step")][:4]
    assert lrs == [("keys", 0, .5), ("keys", 2, .5*rate(2, 3, .03)),
                   ("tune", 0, 3e-3), ("tune", 3, 3e-3*rate(3, 4, .03))]
    assert all(e["loss"] == 0 < e["added"] for e in run.rec.events("step") if e["phase"] == "keys")
    assert run.net.extra_forwards == 0 and set(run.net.params) == {n for n in run.net.own()}
    assert not torch.equal(run.net.method.mem[TASKS[0]], run.net.method.mem[TASKS[2]])


# An update projected after the optimiser

@dataclass
class Projected(Method):
    "Adam's update without its component along fixed directions, in float64."
    needs = {"old"}

    def wrap(self, net):
        net.lora()
        for p in net.params.values(): p.data = p.data.double()
        return net

    def basis(self, p):
        g = torch.Generator().manual_seed(p.shape[1])
        return torch.linalg.qr(torch.randn(p.shape[1], 3, generator=g, dtype=torch.float64))[0]

    @torch.no_grad()
    def update(self, net, s):
        for n, p in net.params.items():
            d, U = p - s.old[n], self.basis(p)
            p.copy_(s.old[n] + d - d @ U @ U.T)


def test_projected_update(tmp_path):
    run = opened(tmp_path/"start", Projected)
    start = {n: p.detach().clone() for n, p in run.net.params.items()}
    got = train(tmp_path/"run", Projected, optim={"weight_decay": .1}, stream_args={"tasks": TASKS[:2]})
    for n, p in got.net.params.items():
        d = p.detach() - start[n]
        assert p.dtype == torch.float64 and d.norm() > 1e-3
        assert (d @ got.net.method.basis(p)).norm() <= 1e-12*d.norm(), n
    free = train(tmp_path/"free", type("Free", (Projected,), {"update": Method.update}), optim={"weight_decay": .1}, **ONE)
    kept = [((p.detach() - start[n]) @ free.net.method.basis(p)).norm() for n, p in free.net.params.items()]
    assert min(kept) > 1e-4


# A soft prefix

@dataclass
class Prompt(Method):
    "Three soft tokens after the first token."
    def wrap(self, net):
        g = torch.Generator().manual_seed(0)
        d = net.backbone.lm.config.hidden_size
        net.model.soft = nn.Parameter(torch.randn(3, d, generator=g)*float(net.backbone.lm.embed_tokens.weight.std()))
        return net

    def route(self, net, batch): return replace(batch, prefix=net.model.soft.expand(len(batch), -1, -1))


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    net = opened(tmp_path_factory.mktemp("prompt"), Prompt).net
    net.model.eval()
    return net


def by_hand(net, b, j):
    "Embeddings of row `j`, soft tokens in place, through the Hugging Face model alone."
    real = b.mask[j].bool()
    ids, model = b.ids[j][real], net.model
    e = model.get_input_embeddings()(ids)
    image = model.model.multi_modal_projector(b.feats[j])
    e = e.masked_scatter((ids == net.backbone.image_id)[:, None], image)
    labels = b.labels[j][real]
    return torch.cat([e[:1], model.soft, e[1:]])[None], torch.cat([labels[:1], torch.full((3,), -100), labels[1:]])


def logits_by_hand(net, e):
    return net.model.lm_head(net.model.model.language_model(inputs_embeds=e).last_hidden_state)[0]


def test_prefix_forward_and_gradient(prompted):
    net = prompted
    b = net.rows([("col-word", 0), (OTHERS[0], 1), ("shp-mcq", 1)], "test")
    with at(net.method.route(net, b)) as r: out = net.forward(r)
    got, = torch.autograd.grad(out.loss, [net.model.soft])
    ce = []
    for j in range(3):
        e, labels = by_hand(net, b, j)
        logits = logits_by_hand(net, e)[:-1]
        keep = labels[1:] != -100
        torch.testing.assert_close(out.answer_logits[j], logits[keep], rtol=1e-4, atol=1e-4)
        ce.append(nn.functional.cross_entropy(logits[keep], labels[1:][keep], reduction="none"))
    loss = torch.cat(ce).mean()
    want, = torch.autograd.grad(loss, [net.model.soft])
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_prefix_prefill(prompted):
    net = prompted
    b = net.rows(REFS, "test", answers=False)
    got, _ = net.answer(b, 6)
    for j, row in enumerate(got):
        e, _ = by_hand(net, b, j)
        out = []
        with torch.no_grad():
            while len(out) < 6:
                said = net.model.get_input_embeddings()(torch.tensor([out], dtype=torch.long))
                tok = int(logits_by_hand(net, torch.cat([e, said], 1))[-1].argmax())
                if tok == net.backbone.eos: break
                out.append(tok)
        assert row == out


def test_prefix_is_trained(tmp_path):
    run = train(tmp_path, Prompt)
    start = torch.randn(3, run.net.backbone.lm.config.hidden_size, generator=torch.Generator().manual_seed(0))
    start *= float(run.net.backbone.lm.embed_tokens.weight.std())
    assert set(final(tmp_path)) == {"soft"} and not torch.allclose(final(tmp_path)["soft"], start, atol=1e-3)


# The gradient of the task loss alone, and services that leave no trace

@dataclass
class Split(Method):
    "Adds a penalty and compares what it is given with gradients taken anew."
    needs = {"task_grad"}

    def loss(self, net, batch, out): return sum((p**2).sum() for p in net.params.values())

    def grads(self, net, s):
        given = {n: p.grad.clone() for n, p in net.params.items()}
        totals = token_totals(net, s.batches)
        loss = 0.
        with torch.enable_grad():
            for b in s.batches:
                with at(replace(b, totals=totals, ctx={})) as b: loss = loss + net.forward(b).loss
            task = dict(zip(net.params, torch.autograd.grad(loss, list(net.params.values()))))
        both = {n: g + 2*net.params[n].detach() for n, g in task.items()}
        self.worst = [furthest(s.task_grad, task), furthest(given, both)]
        again = net.grad(s.batches[0])
        self.worst.append(furthest(given, {n: p.grad for n, p in net.params.items()}))
        with at(replace(s.batches[0], ctx={})) as b, torch.enable_grad():
            alone = torch.autograd.grad(net.forward(b).loss, list(net.params.values()))
        self.worst.append(furthest(again, dict(zip(net.params, alone))))
        self.seen = getattr(self, "seen", 0) + 1


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_task_gradient(tmp_path, accum, checkpointing):
    m = train(tmp_path, Split, optim={"accum": accum}, compute={"checkpointing": checkpointing}, **ONE).net.method
    assert m.seen == 4 and m.worst[2] == 0 and max(m.worst) < 1e-5


def test_task_gradient_with_a_constant_penalty_is_the_gradient(tmp_path):
    class Same(Method):
        needs = {"task_grad"}
        def grads(self, net, s): self.same = furthest(s.task_grad, {n: p.grad for n, p in net.params.items()})
    assert train(tmp_path, Same, **ONE).net.method.same == 0


def test_teacher_is_swapping_weights(finished):
    net, g = finished().net, torch.Generator().manual_seed(1)
    teacher = {n: p.detach() + .05*torch.randn(p.shape, generator=g) for n, p in net.params.items()}
    b, was = batch_of(net, "shp-mcq"), {n: p.detach().clone() for n, p in net.params.items()}
    counted = net.extra_forwards
    student, taught = net(b), net(b, params=teacher)
    assert net.extra_forwards == counted + 2*len(b)
    same_tensors(net.params, was)
    with torch.no_grad():
        for n, p in net.params.items(): p.copy_(teacher[n])
    swapped = net(b)
    with torch.no_grad():
        for n, p in net.params.items(): p.copy_(was[n])
    assert torch.equal(swapped.logits, taught.logits) and torch.equal(net(b).logits, student.logits)
    assert not torch.allclose(taught.logits, student.logits, atol=1e-3)


def test_teacher_inside_a_checkpointed_step(tmp_path):
    "A forward of other weights between forward and backward changes nothing."
    class Teacher(Method):
        def loss(self, net, batch, out):
            out.keep["taught"] = net(batch, params={n: p.detach()*2 for n, p in net.params.items()}).logits
            return 0.
    a, b = (train(tmp_path/n, m, compute={"checkpointing": True}, **ONE) for n, m in (("a", Teacher), ("b", Method)))
    same_tensors(final(a.folder), final(b.folder))
    assert a.net.extra_forwards == 4*8 and b.net.extra_forwards == 0


def test_per_sample_gradients_equal_a_loop_of_one(finished):
    "Trained projector included: a linear layer whose rows are images, not samples."
    net = finished(tune={"train": r"model\.multi_modal_projector\..*"}).net
    fisher = net.sample_grads("shp-mcq", n=10)
    pick = sorted(rng(net.seed, "shp-mcq", "sample_grads").choice(96, 10, replace=False))
    want = {n: torch.zeros_like(p) for n, p in net.params.items()}
    for i in pick:
        with at(batch_of(net, "shp-mcq", 1, int(i))) as b:
            out = net.forward(b)
            ll = out.logits.log_softmax(-1).gather(1, out.labels[:, None]).sum()
            for n, g in zip(want, torch.autograd.grad(ll, list(net.params.values()))): want[n] += g**2/10
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in want} >= {"default", "linear_1", "linear_2"}
    for n, w in want.items(): torch.testing.assert_close(fisher[n], w, rtol=1e-4, atol=1e-5*float(w.max()))


@dataclass
class Ordered(Method):
    "Writes down what each hook of a step finds."
    needs = {"old"}

    def __post_init__(self):
        super().__post_init__()
        self.log = []

    @torch.no_grad()
    def look(self, net, s, hook):
        norm = float(torch.stack([p.grad.norm() for p in net.params.values()]).norm())
        self.log.append((hook, norm, furthest(net.params, s.old) if s.old else None))

    def grads(self, net, s):
        for p in net.params.values(): p.grad *= 1e3
        self.look(net, s, "grads")

    @torch.no_grad()
    def update(self, net, s):
        self.look(net, s, "update")
        for p in net.params.values(): p += .05

    def step(self, net, s):
        self.look(net, s, "step")
        assert s.lr == 3e-3*rate(s.index, 4, .03) and len(s.batches) == len(s.kept) == 2


def test_hooks_run_in_their_order(tmp_path):
    "Gradients are edited before clipping, weights after the optimiser, and `step` sees both."
    run = train(tmp_path, Ordered, optim={"accum": 2}, **ONE)
    log, first = run.net.method.log, run.rec.events("step")[0]
    assert [h for h, *_ in log] == ["grads", "update", "step"]*4
    for (_, raw, before), (_, clipped, after), (_, _, added) in zip(log[::3], log[1::3], log[2::3]):
        assert raw > 100 and before == 0
        assert clipped == pytest.approx(1, rel=1e-3) and 0 < after < .01
        assert added == pytest.approx(.05, abs=.01)
    assert first["grad_norm"] == pytest.approx(log[0][1], rel=1e-4)


# Gradient checkpointing and accumulation

def test_gradient_checkpointing_changes_nothing(tmp_path, finished):
    plain, saved = finished(), train(tmp_path, compute={"checkpointing": True})
    assert saved.net.model.is_gradient_checkpointing
    assert furthest(final(plain.folder), final(saved.folder)) < 1e-6
    assert plain.rec.events("step")[-1]["loss"] == pytest.approx(saved.rec.events("step")[-1]["loss"], abs=1e-6)


@pytest.fixture
def sgd(monkeypatch):
    descend(monkeypatch)


@pytest.mark.parametrize("method", ["finetune", Twins() + Anchor()], ids=["finetune", "groups and penalty"])
def test_accumulation_is_one_large_batch(tmp_path, sgd, method):
    make = lambda a: train(tmp_path/str(a), method, optim={"accum": a, "lr": .02, "clip": 0.},
                           stream_args={"tasks": TASKS[:2]})
    one = make(1)
    for many in map(make, (3, 8)):
        assert furthest(final(one.folder), final(many.folder)) < 1e-5
        for a, b in zip(one.rec.events("step"), many.rec.events("step")):
            for k in ("loss", "added", "grad_norm"): assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6)


def test_groups_are_weighted_means(finished):
    net = finished().net
    a, b = batch_of(net, "col-word", 3), net.fetch([("shp-mcq", i) for i in range(5)], group=2)
    b = replace(b, weights={2: .25})
    mean = lambda rows: float(net(rows).loss)
    assert float(net(a + b).loss) == pytest.approx(mean(a) + .25*mean(replace(b, weights={})), rel=1e-5)


def test_a_step_without_a_trainable_row(tmp_path):
    "Rows that reach no trainable parameter leave nothing to do, and nothing breaks."
    class Nowhere(Halves):
        def route(self, net, batch): return replace(batch, route={"slot": torch.full((len(batch),), -1)})
    run = train(tmp_path/"run", Nowhere, **ONE)
    same_tensors(final(tmp_path/"run"), {n: p.detach() for n, p in opened(tmp_path/"start", Nowhere).net.own().items()})
    assert run.rec.finished


def test_more_micro_batches_than_rows_is_one_sentence(tmp_path):
    with pytest.raises(CitError, match="accum"): train(tmp_path, optim={"accum": 9})


def test_dropout_is_keyed(tmp_path):
    "Masks of dropout depend on the step alone, not on what was drawn before."
    runs = []
    for k in range(2):
        torch.manual_seed(k)
        runs.append(train(tmp_path/str(k), tune={"dropout": .3}, **ONE))
    same_tensors(*(final(r.folder) for r in runs))


def test_draws_of_hooks_are_keyed(tmp_path):
    class Noisy(Method):
        def begin(self, net, task):
            with torch.no_grad():
                for p in net.params.values(): p.add_(torch.randn_like(p)*.01)
    runs = []
    for k in range(2):
        torch.manual_seed(k)
        runs.append(train(tmp_path/str(k), Noisy, **ONE))
    same_tensors(*(final(r.folder) for r in runs))


@dataclass
class Dice(Method):
    "Throws dice for two owners in every micro-batch and step."
    def throw(self, net, rng=None): self.mem.setdefault("thrown", []).append(float((rng or net.rng(self.name)).random()))

    def batch(self, net, batch):
        self.throw(net)
        self.throw(net, net.rng("somebody else"))
        return batch

    def begin(self, net, task): self.throw(net)
    def step(self, net, s): self.throw(net, s.rng)
    def end(self, net, task): self.throw(net)


def test_every_moment_has_draws_of_its_own(tmp_path):
    class Louder(Dice): "Throws as often, for itself."
    alone, pair = (train(tmp_path/str(k), m, optim={"steps": 2, "accum": 2}, stream_args={"tasks": TASKS[:2]})
                   for k, m in enumerate((Dice(), Louder() + Dice())))
    thrown = alone.net.method.mem["thrown"]
    assert len({*thrown}) == len(thrown) == 2*(2 + 2*(2*2 + 1))
    assert pair.net.method.mem["dice"]["thrown"] == thrown
    assert pair.net.method.mem["louder"]["thrown"][0] not in thrown
