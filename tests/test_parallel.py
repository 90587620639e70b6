"Several processes train as one does: gradients summed once, memory the same everywhere, one writer of the record."
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import Stop, unplug
from tiny import CHAINS, SPEC, TASKS, Anchor, Halves, Held, Twins, descend, final, furthest, same_files, tiny, train

from cit_workbench.contract.memory import split_tree
from cit_workbench.contract.method import Method
from cit_workbench.contract.registry import all_methods
from cit_workbench.training.rows import draw
from cit_workbench.measure.answers import evaluate

TWO = {"stream_args": {"tasks": TASKS[:2]}}


@dataclass
class Sides(Halves):
    "Rows at even places of a step take slot 0, all others slot `odd`: with two processes, each reaches its own."
    def route(self, net, batch):
        if batch.split != "train": return super().route(net, replace(batch, refs=[(t, 0) for t, _ in batch.refs]))
        drawn = draw(net.seed, net.find(net.task), SPEC["optim"]["batch"], net.clock[2])
        slot = [0 if drawn.index(r) % 2 == 0 else self.odd for r in batch.refs]
        return replace(batch, route={"slot": torch.tensor(slot)})


@dataclass
class Lopsided(Method):
    "An added term that exists on the last process only, and asks for the gradient of the task loss."
    needs = {"task_grad"}

    def loss(self, net, batch, out):
        return net.world*1e-2*sum((p**2).sum() for p in net.params.values()) if net.rank == net.world - 1 else 0.

    def step(self, net, s): self.mem["norm"] = float(sum((g**2).sum() for g in s.task_grad.values()))


@dataclass
class Drawing(Method):
    "Draws wherever it may; what is drawn outside micro-batches must agree."
    def begin(self, net, task):
        with torch.no_grad():
            for p in net.params.values(): p.add_(torch.randn_like(p)*.01)

    def grads(self, net, s):
        with torch.no_grad():
            for p in net.params.values(): p.grad += float(s.rng.normal())*1e-3 + torch.randn_like(p)*1e-3

    def end(self, net, task): self.mem["kept"] = net.rng(self.name).permutation(96)[:5].tolist()


METHODS = {"own slots": Sides(), "groups and penalty": Twins() + Anchor(), "none on one": Sides(odd=-1),
           "lopsided": Lopsided(), "drawing": Drawing()}  # beside those that have a name in the package
SPLITS = [("finetune", 1), ("groups and penalty", 2), ("own slots", 1), ("none on one", 1)]


def hashes(tensors): return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in sorted(tensors.items())}


def one_of_many(out, name, fields, stop=0, plain=False):
    "What one process of a group ends with."
    torch.set_num_threads(1)
    run = tiny(out, METHODS.get(name, name), **fields)
    with pytest.MonkeyPatch.context() as mp:
        if stop: unplug(mp, Held, "one_step", stop)
        if plain: descend(mp)
        try: rec = run.train()
        except Stop: rec = None
    tree, tensors = split_tree(run.net.method.mem)
    own = {n: p.detach() for n, p in run.net.own().items()}
    return {"writer": rec is not None, "world": run.net.world, "params": hashes(own), "mem": (tree, hashes(tensors))}


def agree(got):
    assert [g["world"] for g in got] == [2, 2]
    assert got[0]["params"] == got[1]["params"] and got[0]["mem"] == got[1]["mem"]
    assert [g["writer"] for g in got] == [True, False]


@pytest.mark.parametrize("name, accum", SPLITS, ids=[n for n, _ in SPLITS])
def test_two_processes_are_one(tmp_path, fork, monkeypatch, name, accum):
    descend(monkeypatch)
    optim = {"lr": .02, "clip": 0., "weight_decay": .1}
    fields = {**TWO, "optim": {**optim, "accum": accum}}
    agree(fork.world(2, one_of_many, tmp_path/"two", name, fields, 0, True))
    one = train(tmp_path/"one", METHODS.get(name, name), **TWO, optim=optim).rec
    two = tiny(tmp_path/"two", METHODS.get(name, name), **fields).train()
    assert furthest(final(one.path), final(two.path)) < 1e-5
    np.testing.assert_array_equal(one.R, two.R)
    assert [e["kind"] for e in one.events()] == [e["kind"] for e in two.events()]
    for a, b in zip(one.events("step"), two.events("step")):
        for k in ("loss", "added", "grad_norm"): assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6)
    for kind in ("begin", "end"): assert one.events(kind) == two.events(kind)


@pytest.mark.parametrize("name", ["lopsided", "drawing", *CHAINS, *all_methods()])
def test_processes_agree(tmp_path, fork, name):
    agree(fork.world(2, one_of_many, tmp_path/"two", name, TWO))
    assert tiny(tmp_path/"two", METHODS.get(name, name), **TWO).train().finished


def test_costs_are_those_of_all_processes(tmp_path, fork, finished):
    fork.world(2, one_of_many, tmp_path/"two", "er+ewc", TWO)
    ends = tiny(tmp_path/"two", "er+ewc", **TWO).train().events("end")
    assert [e["extra_forwards"] for e in ends] == [24, 48]


def test_two_processes_resume(tmp_path, fork):
    fields = {**TWO, "compute": {"save_every": 2}}
    fork.world(2, one_of_many, tmp_path/"whole", "er+ewc", fields)
    fork.world(2, one_of_many, tmp_path/"run", "er+ewc", fields, 8, CIT_CACHE=str(tmp_path/"cache"))
    assert not (tmp_path/"run"/"result.json").exists()
    agree(fork.world(2, one_of_many, tmp_path/"run", "er+ewc", fields, CIT_CACHE=str(tmp_path/"cache")))
    same_files(tmp_path/"run", tmp_path/"whole")


def asked_twice(out):
    "The same questions again, when only the first process finds the answers in its store."
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1": os.environ["CIT_CACHE"] += "-of-the-second"
    run = tiny(out, "zero_shot")
    run.open()
    first, second = (evaluate(run.net, TASKS) for _ in range(2))
    return first == second and sorted(Path(os.environ["CIT_CACHE"]).rglob("*.jsonl")) != []


def test_stores_that_differ_do_not_block(tmp_path, fork):
    assert fork.world(2, asked_twice, tmp_path/"two", CIT_CACHE=str(tmp_path/"cache")) == [True, False]
