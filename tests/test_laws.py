"What every method promises (design: the laws), asked of all methods that the package finds and of a chain."
import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARGS, CHAINS, OTHERS, SOME, SPEC, TASKS, batch_of, descend, files, final, opened, same_files, same_tensors, tiny, train

from cit_workbench.models.lora import fused
from cit_workbench.models.families.llava import linears
from cit_workbench.models.tune import Tune
from cit_workbench.models.backbone import Backbone, get_backbone
from cit_workbench.models.batch import at
from cit_workbench.training.checkpoint import read_checkpoint
from cit_workbench.core.digests import rng, seed_of
from cit_workbench.core.errors import CitError
from cit_workbench.contract.memory import split_tree
from cit_workbench.contract.method import Method, overrides
from cit_workbench.contract.registry import all_methods, get_method
from cit_workbench.data.stream import get_stream

METHODS = all_methods()
EVERY = [*METHODS, *CHAINS]
LEAKS = {"total_T", "task_id_at_test", "template_id_at_test", "batch_selection", "old_data", "pretrain_data",
         "val_of_old_tasks"}
every = pytest.mark.parametrize("name", EVERY)


def lora_names(model, only=("q_proj", "v_proj", "o_proj", "down_proj")) -> dict:
    "Names and sizes of plain LoRA of rank 8 on linear layers of the language model, written out."
    cfg = model.config.text_config
    d, m, kv = cfg.hidden_size, cfg.intermediate_size, cfg.num_key_value_heads*cfg.head_dim
    q = cfg.num_attention_heads*cfg.head_dim
    shapes = {"self_attn.q_proj": (d, q), "self_attn.k_proj": (d, kv), "self_attn.v_proj": (d, kv),
              "self_attn.o_proj": (q, d), "mlp.gate_proj": (d, m), "mlp.up_proj": (d, m), "mlp.down_proj": (m, d)}
    at_ = "model.language_model.layers"
    return {f"{at_}.{i}.{k}.lora_{x}.default.weight": 8*n for i in range(cfg.num_hidden_layers)
            for k, (n_in, n_out) in shapes.items() if k.endswith(only) for x, n in (("A", n_in), ("B", n_out))}


def test_the_arms_are_found():
    assert {"finetune", "zero_shot", "single", "joint", "er", "ewc"} <= {*METHODS}


def given(name): return get_method(name, **ARGS.get(name, {}))


# 1: the empty method is the bare loop

def bare_loop():
    "Sequential tuning with nothing of the workbench around it but the rows, the forward and the keys of its draws."
    bb, stream = get_backbone("tiny-instruct"), get_stream("shapes", **SPEC["stream_args"])
    torch.manual_seed(seed_of(0, "lora"))
    fused(get_peft_model(bb.model, LoraConfig(r=8, lora_alpha=16., target_modules=SOME, task_type="CAUSAL_LM")))
    params = [p for p in bb.model.parameters() if p.requires_grad]
    bb.model.train()
    for task in stream:
        rows = [task.example("train", i) for i in range(96)]
        feats = bb.tower(bb.pixels([e.image for e in rows]))
        opt = torch.optim.AdamW(params, betas=(.9, .999), weight_decay=0., foreach=True)
        order = rng(0, task.name, "epoch", 0).permutation(96)
        for s in range(4):
            opt.param_groups[0]["lr"] = 3e-3*(1. if s == 0 else .5*(1 + math.cos(math.pi*(s - 1)/3)))
            pick = order[8*s:8*s + 8]
            b = bb.collate([rows[i] for i in pick], feats[pick])
            with at(b): loss = bb.forward(b).loss
            yield bb, b, rows, pick, loss
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.)
            opt.step()


@pytest.mark.parametrize("method", ["finetune", Method])
def test_1_the_empty_method_is_the_bare_loop(finished, method):
    for bb, *_ in bare_loop(): pass
    bare = {n: p.detach() for n, p in bb.model.named_parameters() if p.requires_grad}
    same_tensors(final(finished(method).folder), bare)


def test_1_the_bare_loop_is_the_hugging_face_loss(finished):
    "Loss and gradient of the same rows by the model's own forward over all positions, picture to loss."
    losses = []
    for bb, b, rows, pick, loss in bare_loop():
        losses.append(float(loss.detach()))
        if len(losses) % 3 != 1: continue
        params = [p for p in bb.model.parameters() if p.requires_grad]
        pixels = bb.pixels([rows[i].image for i in pick])
        theirs = bb.model(input_ids=b.ids, attention_mask=b.mask, labels=b.labels, pixel_values=pixels).loss
        assert float(theirs.detach()) == pytest.approx(losses[-1], abs=1e-5)
        for x, y in zip(*(torch.autograd.grad(l, params, retain_graph=True) for l in (loss, theirs))):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    logged = [e["loss"] for e in finished().rec.events("step")]
    assert logged == [losses[i] for t in range(3) for i in (4*t, 4*t + 3)]


# 2: adding nothing changes nothing

def plain_stats(events):
    "Events without the part's name in front of the names of stats."
    return [e | {"stats": {k.split(".")[-1]: v for k, v in e.get("stats", {}).items()}} for e in events]


@every
def test_2_a_method_plus_nothing_is_the_method(finished, tmp_path, name):
    a, b = finished(name), train(tmp_path/"run", given(name) + Method())
    same_tensors(final(a.folder), final(b.folder))
    assert plain_stats(a.rec.events()) == plain_stats(b.rec.events())
    got, want = (final(r.folder, "mem") for r in (b, a))
    assert [k.rpartition("/")[2] for k in got] == [k.rpartition("/")[2] for k in want]
    assert all(map(torch.equal, got.values(), want.values()))
    said = [{k: v for k, v in files(r.folder).items() if k.startswith("answers") or k == "R"} for r in (a, b)]
    assert said[0] == said[1]


def adding(called, **hooks): return type(called, (Method,), hooks)


def test_2_methods_add_up(tmp_path):
    one, two = (adding(n, loss=lambda self, net, b, out, x=x: x + 0*out.loss) for n, x in (("One", 1.), ("Two", 2.)))
    run = train(tmp_path/"sum", one() + two(), stream_args={"tasks": TASKS[:1]})
    assert {e["added"] for e in run.rec.events("step")} == {3.} and run.m.name == "one+two"
    assert run.net.method.mem == {"one": {}, "two": {}}


@pytest.mark.parametrize("hook", ["wrap", "update", "phases"])
def test_2_what_cannot_be_added_is_refused(tmp_path, hook):
    a, b = (adding(n, **{hook: lambda self, *args: args[0]})() for n in ("One", "Two"))
    with pytest.raises(CitError, match=f"`{hook}`; at most one"): train(tmp_path, a + b)
    with pytest.raises(CitError, match="each method once"): a + a


# 3: the first task has nothing to remember

ACTING = ("plan", "wrap", "batch", "route", "grads", "update")
FIRST = [m for m in METHODS if not any(overrides(get_method(m), h) for h in ACTING)]


def test_3_is_asked_of_someone(): assert {"finetune", "ewc"} <= {*FIRST}


@pytest.mark.parametrize("name", FIRST)
def test_3_the_first_task_is_plain_tuning(finished, name):
    kept = ("step", "loss", "added", "grad_norm", "lr")
    first = lambda run: [[e[k] for k in kept] for e in run.rec.events("step") if e["task"] == TASKS[0]]
    assert first(finished(name)) == first(finished("finetune"))
    assert [added for _, _, added, *_ in first(finished(name))] == [0, 0]


# 4: what is frozen stays; what is trained is known

class Watch(Method):
    "Notes what is trainable and what is not at the first step of every phase, and looks again at the phase's end."
    def __post_init__(self):
        super().__post_init__()
        self.log, self.at = [], None

    def batch(self, net, batch):
        if net.clock[2:] == (0, 0) and net.clock[:2] != self.at:
            self.at = net.clock[:2]
            if not (self.log and self.log[-1]["task"] == net.task):
                self.log.append({"task": net.task, "trainable": {}, "frozen": {}, "moved": []})
            self.look(net)
            named, seen = dict(net.model.named_parameters()), self.log[-1]
            seen["trainable"] |= {n: p.numel() for n, p in named.items() if p.requires_grad}
            seen["frozen"] = {n: p.detach().clone() for n, p in named.items() if not p.requires_grad}
        return batch

    def look(self, net):
        named = dict(net.model.named_parameters())
        self.log[-1]["moved"] += [n for n, p in self.log[-1]["frozen"].items() if not torch.equal(p, named[n])]

    def end(self, net, task):
        if self.log and self.log[-1]["task"] == task.name: self.look(net)


class Count(Method):
    "Counts the rows the trainer itself ran through the language model."
    def loss(self, net, batch, out):
        out.keep["rows"] = torch.tensor(0 if out.logits is None else len(batch))
        return 0.

    def step(self, net, s): self.mem["rows"] = self.mem.get("rows", 0) + int(sum(k["rows"] for k in s.kept))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    "A run of each method under watch, what was seen, and how many rows went through the model for a loss."
    runs, forward = {}, Backbone.forward

    def get(name):
        if name in runs: return runs[name]
        rows = []
        with pytest.MonkeyPatch.context() as mp:
            mp.setattr(Backbone, "forward", lambda self, b: (rows.append(len(b)), forward(self, b))[1])
            run = train(tmp_path_factory.mktemp("watched")/"run", Watch() + given(name) + Count())
        runs[name] = run, run.net.method.chain[0].log, sum(rows)
        return runs[name]
    return get


@every
def test_4_what_is_frozen_is_bit_identical(watched, name):
    run, log, _ = watched(name)
    for seen in log: assert seen["moved"] == [], seen["task"]
    fresh = dict(get_backbone("tiny-instruct").model.named_parameters())
    same_tensors({n: p.detach() for n, p in run.born.items()}, {n: p.detach() for n, p in fresh.items()})
    assert len(fresh) > 60 and not {*map(id, run.born.values())} & {*map(id, run.net.own().values())}


@every
def test_4_the_trainable_set_is_known(watched, name):
    run, log, _ = watched(name)
    want, begun = lora_names(run.net.model), run.rec.events("begin")
    for seen, event in zip(log, begun):
        assert event["task"] == seen["task"] and not {*seen["trainable"]} & {*run.born}
        assert (event["trainable"], event["tensors"]) == (sum(seen["trainable"].values()), len(seen["trainable"]))
    if not overrides(get_method(name), "wrap"): assert all(seen["trainable"] == want for seen in log)
    assert len(log) == (0 if name == "zero_shot" else len(run.plan.tasks)) and len(begun) == len(run.plan.tasks)


def test_4_all_linear_layers_of_the_language_model_can_be_tuned(tmp_path):
    net = opened(tmp_path, "finetune", tune={"targets": linears}).net
    assert {n: p.numel() for n, p in net.params.items()} == lora_names(net.model, "_proj") and Tune().targets is None


def test_4_by_default_a_tiny_start_keeps_its_first_block(tmp_path):
    net = opened(tmp_path, "finetune", tune={"targets": None}).net
    every = lora_names(net.model, "_proj")
    assert [*net.params] == [n for n in every if ".layers.0." not in n] != [*every]


def test_4_old_slots_are_frozen(watched):
    run, log, _ = watched("single")
    per_task = sum(lora_names(run.net.model).values())
    for t, seen in enumerate(log):
        assert {n.split(".")[-1] for n in seen["trainable"]} == {str(t)}
        assert sum(seen["trainable"].values()) == per_task
        assert {n.split(".")[-1] for n in seen["frozen"] if n.split(".")[-2] in "AB"} == {str(i) for i in range(t)}


# 5: a run is what its folder holds

def logits_of(net):
    net.model.eval()
    asked = [net.rows([(t, i) for i in range(2)], "test", answers=False, task=[None]*2) for t in TASKS]
    return [net(batch_of(net, t)).logits.numpy() for t in net.seen], [net.answer(b, 8)[0] for b in asked]


def reopened(folder, out, name):
    "What a run says that is opened from a copy of its folder."
    shutil.copytree(folder, out)
    run = tiny(out, name)
    run.open()
    return *logits_of(run.net), [*run.net.method.mem], sorted(run.net.params)


@every
def test_5_a_fresh_process_loads_the_same_model(finished, fork, tmp_path, name):
    run = finished(name)
    got, said, mem, params = fork(reopened, run.folder, tmp_path/"copy", name)
    logits, answers = logits_of(run.net)
    for a, b in zip(logits, got, strict=True): np.testing.assert_array_equal(a, b)
    assert said == answers and params == sorted(run.net.params) and mem == [*run.net.method.mem]


def test_5_from_the_command_line_too(finished, tmp_path):
    "A process that shares nothing with this one."
    code = ("import sys, numpy as np; from test_laws import reopened; got, *_ = reopened(*sys.argv[1:4]); "
            "np.savez(sys.argv[4], *got)")
    run, out = finished("er+ewc"), tmp_path/"got.npz"
    subprocess.run([sys.executable, "-c", code, str(run.folder), str(tmp_path/"copy"), "er+ewc", str(out)], check=True,
                   cwd=Path(__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for a, b in zip(logits_of(run.net)[0], np.load(out).values(), strict=True): np.testing.assert_array_equal(a, b)


# 6: routes need no task; the future is out of reach

def shot(b) -> dict:
    "A batch, copied field by field; routes may be results of what is trained."
    def copied(v):
        if isinstance(v, dict): return {k: copied(x) for k, x in v.items()}
        return v.clone() if torch.is_tensor(v) else copy.deepcopy(v)
    return {k: copied(v) for k, v in vars(b).items() if k != "examples"}


def same_shot(a, b):
    assert a.keys() == b.keys()
    for k in a:
        if torch.is_tensor(a[k]): assert torch.equal(a[k], b[k]), k
        elif k in ("route", "ctx"): same_tensors(a[k], b[k])
        else: assert a[k] == b[k], k


@every
def test_6_routes_need_no_task_and_are_pure(finished, name):
    net = finished(name).net
    refs = [(t, i) for t in [*TASKS, OTHERS[0]] for i in range(2)]
    b = net.rows(refs, "test", answers=False, task=[None]*8)
    before, state = shot(b), {n: p.detach().clone() for n, p in net.model.named_parameters()}
    tree, tensors = split_tree(net.method.mem)
    tree, tensors = copy.deepcopy(tree), {k: v.clone() for k, v in tensors.items()}
    one, two = net.method.route(net, b), net.method.route(net, b)
    same_shot(shot(b), before)
    same_shot(shot(one), shot(two))
    now, now_tensors = split_tree(net.method.mem)
    assert now == tree
    same_tensors(now_tensors, tensors)
    same_tensors({n: p.detach() for n, p in net.model.named_parameters()}, state)
    ids, _ = net.answer(b, 4)
    assert len(ids) == 8


class Peek(Method):
    "Tries, at every turn, what is forbidden."
    def begin(self, net, task):
        later = {t.name for t in (*net.plan.tasks, *net.stream.tasks, *net.stream.unseen)} - {*net.seen}
        for t in sorted(later):
            with pytest.raises(CitError, match="has not come yet"): net.fetch([(t, 0)])
            with pytest.raises(CitError, match="has not come yet"): net.sample_grads(t, n=1)
        with pytest.raises(CitError, match="test split"): net.fetch([(task.name, 0)], split="test")
        if len(net.seen) > 1:
            with pytest.raises(CitError, match="first `begin` only"): net.held_in
        self.mem["tried"] = self.mem.get("tried", 0) + len(later)

    def end(self, net, task):
        with pytest.raises(CitError, match="first `begin` only"): net.held_in


@pytest.mark.parametrize("name", ["finetune", "joint", "single"])
def test_6_the_future_is_out_of_reach(tmp_path, name):
    net = train(tmp_path, get_method(name) + Peek()).net
    unseen = len(net.stream.unseen)
    assert net.method.mem["peek"]["tried"] == (3 + unseen if name == "joint" else 2 + 1 + 3*unseen)
    assert net.extra_forwards == 0
    assert net.observed == {*get_method(name).leaks}


# 7: a batch is never changed

@every
def test_7_batch_leaves_its_input_alone(finished, name):
    net = finished(name).net
    for micro in range(2):
        net.timer.now = (net.seen[-1], "tune", 3, micro)
        b = batch_of(net, net.seen[-1], 8)
        before = shot(b)
        got, again = net.method.batch(net, b), net.method.batch(net, b)
        same_shot(shot(b), before)
        same_shot(shot(got), shot(again))


# 8: same seed, same record

def moved(a, b): return any(not torch.equal(x, y) for x, y in zip(final(a.folder).values(), final(b.folder).values()))


@every
def test_8_same_seed_same_record(finished, tmp_path, monkeypatch, name):
    a = finished(name)
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"cache"))
    torch.manual_seed(99)
    np.random.seed(99)
    same_files(a.folder, train(tmp_path/"again", name).folder)


@pytest.mark.parametrize("name", ["finetune", "joint", "single", "er+ewc"])
def test_8_another_seed_another_record(finished, tmp_path, name):
    a, b = finished(name), train(tmp_path/"run", name, seed=1)
    losses = [[e["loss"] for e in r.rec.events("step")] for r in (a, b)]
    assert all(x != y for x, y in zip(*losses)) and moved(a, b)


# 9: strength

STRONG = [m for m in METHODS if get_method(m).strength]


def test_9_is_asked_of_someone(): assert {"er", "ewc"} <= {*STRONG}


@pytest.mark.parametrize("name", STRONG)
def test_9_strength_zero_is_off(finished, tmp_path, name):
    cls = type(get_method(name))
    hooks = [h for h in ("loss", "grads", "update", "batch") if overrides(get_method(name), h)] or ["step"]  # a mean of weights
    off = type(cls.__name__, (cls,), {h: getattr(Method, h) for h in hooks})
    off.called = name
    zero = train(tmp_path/"zero", name, method_args={cls.strength: 0.})
    without = train(tmp_path/"off", off, method_args=ARGS.get(name, {}))
    same_files(zero.folder, without.folder)
    assert moved(zero, finished(name))


SPRINGS = [("ewc", "separate", "fisher", 1), ("ewc", "online", "fisher", 1), ("mas", "logits", "omega", 2), ("tir", "similarity", "omega", 1)]


@pytest.mark.parametrize("name, variant, importance, pull", SPRINGS)
def test_9_drift_falls_with_strength(tmp_path, monkeypatch, name, variant, importance, pull):
    "Under plain gradient descent, where importance is above zero; `pull` is the slope of a spring over λ, importance and way."
    descend(monkeypatch)
    lr, drifts, lam = .05, [], 0.
    for k in range(4):
        run = train(tmp_path/str(k), name, method_args={"lam": lam, "variant": variant, "n": 48},
                    stream_args={"tasks": TASKS[:2]}, optim={"lr": lr, "clip": 0., "steps": 5})
        mem = read_checkpoint(run.folder/"checkpoints"/"001-z-end")["tensors"]
        F = {n: mem[f"/{importance}/{n}"] for n in run.net.params}
        d = {n: (p.detach() - mem[f"/anchor/{n}"])[F[n] > 0] for n, p in run.net.params.items()}
        drifts.append([sum(float((F[n][F[n] > 0]**power*d[n]**2).sum()) for n in d) for power in (0, 1)])
        lam = [.1, .4, 1.5][min(k, 2)]/(lr*pull*max(float(f.max()) for f in F.values()))
    assert all(x > y for a, b in zip(drifts, drifts[1:]) for x, y in zip(a, b)), drifts


# 10: what is counted

@every
def test_10_extra_forwards_are_those_that_ran(watched, name):
    run, _, rows = watched(name)
    own = run.net.method.mem["count"].get("rows", 0)
    assert own == (0 if name == "zero_shot" else 3*4*8)
    assert run.rec.events("end")[-1]["extra_forwards"] == rows - own == run.rec.summary()["extra_forwards"]


def test_10_costs_of_replay_by_hand(finished):
    run = finished("er", method_args={"size": 10})
    for t, end in enumerate(run.rec.events("end"), 1):
        assert end["extra_forwards"] == 0 and end["trainable"] == sum(lora_names(run.net.model).values())
    refs = run.net.method.mem["refs"]
    assert len(refs) == 10 and {t for t, _ in refs} == {*TASKS}
    ex = [run.data.task(t).example("train", i) for t, i in refs]
    text = sum(len((e.question + e.answer).encode()) for e in ex)
    others = 8*sum(isinstance(v, float) for v in run.net.method.mem.values())
    assert end["stored_bytes"] == 10*48*48*3 + text + others == run.rec.summary()["stored_bytes"]


def test_10_costs_of_anchors_by_hand(finished):
    run, n = finished("ewc"), sum(lora_names(finished().net.model).values())
    assert [e["extra_forwards"] for e in run.rec.events("end")] == [24, 48, 72]
    assert [e["stored_bytes"] for e in run.rec.events("end")] == [2*4*n]*3      # importance and anchor, float32


def test_10_costs_of_slots_by_hand(finished):
    run, n = finished("single"), sum(lora_names(finished().net.model).values())
    names = [sum(len(t) for t in TASKS[:k]) for k in (1, 2, 3)]
    assert [e["stored_bytes"] for e in run.rec.events("end")] == [names[0], 4*n + names[1], 2*4*n + names[2]]


# 12: what a method is told

@every
def test_12_declared_leaks_are_the_ones_observed(finished, name):
    run = finished(name)
    declared = {*get_method(name).leaks}
    observable = LEAKS - {"template_id_at_test", "batch_selection"}
    assert declared <= LEAKS and {*run.rec.run["leaks"]} == declared
    assert {*run.rec.events("end")[-1]["observed"]} == declared & observable


class Spy(Method):
    "Notes which labels reach its route at test."
    def route(self, net, batch):
        if batch.split == "test": self.mem["labels"] = sorted({*self.mem.get("labels", []), *map(str, batch.task)})
        return batch


class Told(Spy):
    leaks = {"task_id_at_test"}


@pytest.mark.parametrize("method, oracle", [(Spy, False), (Told, False), (Spy, True)])
def test_12_the_task_is_shown_at_test_to_those_who_said_so(tmp_path, method, oracle):
    run = train(tmp_path, method, oracle=oracle, stream_args={"tasks": TASKS[:2]})
    shown = method is Told or oracle
    labels = {*run.net.method.mem["labels"]}
    assert labels - {"None"} == {c for c, _ in run.rec.columns} if shown else labels == {"None"}
    assert run.rec.events("end")[-1]["observed"] == ["task_id_at_test"]*shown


class Nosy(Method):
    def begin(self, net, task):
        if net.first: self.mem["knew"] = len(net.held_in)
    def end(self, net, task): net.fetch([(net.seen[0], 0)], split="val")


def test_12_what_is_looked_at_is_noticed(tmp_path):
    run = train(tmp_path, Nosy)
    later = ["pretrain_data", "val_of_old_tasks"]
    assert [e["observed"] for e in run.rec.events("end")] == [["pretrain_data"], later, later]
    assert run.net.method.mem["knew"] == len(run.data.held_in) > 0
