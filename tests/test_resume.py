"Killed anywhere and resumed, a run ends in the bits of one that never stopped; what is damaged is refused by name."
import os
import shutil
import signal
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from test_probes import Keys
from tiny import TASKS, Held, same_files, tiny, train

from cit_workbench.core import CitError, assets
from cit_workbench.method import Method, all_methods, get_method
from cit_workbench.record import Record, RecordWriter
from cit_workbench.train import resume

TWO = {"stream_args": {"tasks": TASKS[:2]}, "compute": {"save_every": 2}, "optim": {"steps": 5}}
FULL = "er+ewc"


class Stop(BaseException): "Somebody pulls the plug."


def unplug(mp, owner, hook, nth, how="raise"):
    "Stop at the `nth` call of a function, before it does what it should."
    f, calls = getattr(owner, hook), []

    def g(*args, **kw):
        calls.append(1)
        if len(calls) == nth:
            if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
            raise Stop
        return f(*args, **kw)
    mp.setattr(owner, hook, g)


@pytest.fixture(autouse=True)
def own_answers(tmp_path, monkeypatch):
    "A resumed run answers for itself."
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Runs that nobody stopped."
    runs = {}

    def get(method, **fields):
        key = method if isinstance(method, str) else method.__name__
        if key not in runs: runs[key] = train(tmp_path_factory.mktemp("whole")/"run", method, **(TWO | fields)).folder
        return runs[key]
    return get


def stopped(out, method, hook, nth, owner=Held, **fields):
    "A run that is stopped at the `nth` call of one of its functions."
    with pytest.MonkeyPatch.context() as mp:
        unplug(mp, owner, hook, nth)
        with pytest.raises(Stop): train(out, method, **(TWO | fields))
    assert not (out/"result.json").exists()


PLACES = [*[(Held, "one_step", n) for n in (1, 4, 6, 10)], *[(Held, "row", n) for n in (1, 3)], (Held, "save", 3),
          (PeftModel, "save_pretrained", 1), (os, "replace", 40), (RecordWriter, "event", 5),
          (RecordWriter, "answers", 14), (RecordWriter, "finish", 1)]


@pytest.mark.parametrize("owner, hook, nth", PLACES, ids=[f"{o.__name__}.{h}-{n}" for o, h, n in PLACES])
def test_stopped_and_resumed(tmp_path, whole, owner, hook, nth):
    stopped(tmp_path/"run", FULL, hook, nth, owner)
    torch.manual_seed(nth)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = train(tmp_path/"run", FULL, **TWO)
    same_files(run.folder, whole(FULL))
    kept = [sorted(p.name for p in folder.glob("checkpoints/*")) for folder in (run.folder, whole(FULL))]
    assert run.rec.finished and kept[0] == kept[1]


@pytest.mark.parametrize("name", [n for n in all_methods() if n != "zero_shot"])
def test_every_method_resumes_inside_its_last_task(tmp_path, whole, name):
    stopped(tmp_path/"run", name, "one_step", 9)
    same_files(train(tmp_path/"run", name, **TWO).folder, whole(name))


def test_stopped_again_and_again(tmp_path, whole):
    for nth in (3, 3, 3, 3, 3):
        try: stopped(tmp_path/"run", FULL, "one_step", nth)
        except pytest.fail.Exception: break
    same_files(train(tmp_path/"run", FULL, **TWO).folder, whole(FULL))


@pytest.mark.parametrize("nth", [3, 4, 11])
def test_resumed_inside_a_phase(tmp_path, whole, nth):
    "Three steps of keys alone, checkpoint after two; five of LoRA and the projector, checkpoints after two and four."
    tune = {"tune": {"train": r"model\.multi_modal_projector\..*"}}
    stopped(tmp_path/"run", Keys, "one_step", nth, **tune)
    same_files(train(tmp_path/"run", Keys, **(TWO | tune)).folder, whole(Keys, **tune))


def killed(out, owner, hook, nth):
    with pytest.MonkeyPatch.context() as mp:
        unplug(mp, {"run": Held, "os": os}[owner], hook, nth, "kill")
        train(out, FULL, **TWO)


@pytest.mark.parametrize("owner, hook, nth", [("run", "one_step", 5), ("run", "row", 2), ("os", "fsync", 40)])
def test_sigkill(tmp_path, whole, fork, owner, hook, nth):
    assert fork(killed, tmp_path/"run", owner, hook, nth) == -signal.SIGKILL
    assert fork(trained, tmp_path/"run") and Record(tmp_path/"run").finished
    same_files(tmp_path/"run", whole(FULL))


def trained(out): return train(out, FULL, **TWO).rec.finished


def test_sigkill_at_any_moment(tmp_path, whole, fork):
    "The process is killed from outside, after some seconds of work, three times."
    out = tmp_path/"run"
    for events in (2, 5, 9):
        p, _ = fork.start(trained, out)
        log = out/"events.jsonl"
        while p.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= events): time.sleep(.005)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
    same_files(train(out, FULL, **TWO).folder, whole(FULL))


# Damage

@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    "A run stopped in the middle of its second task."
    out = tmp_path_factory.mktemp("broken")/"run"
    stopped(out, FULL, "one_step", 10)
    assert [p.name for p in sorted(out.glob("checkpoints/*"))] == ["001-z-end", "002-0-0000002", "002-0-0000004"]
    return out


def flip(f):
    data = bytearray(f.read_bytes())
    data[len(data)//2] ^= 1
    f.write_bytes(data)


def cut(f): f.write_bytes(f.read_bytes()[:-1])
def lose(f): f.unlink()


FILES = ["weights.safetensors", "optim.safetensors", "mem.safetensors", "state.json", "manifest.json"]
DAMAGE = [(flip, f) for f in FILES] + [(cut, FILES[0]), (lose, FILES[2]), (lose, FILES[4])]


@pytest.mark.parametrize("how, name", DAMAGE, ids=[f"{h.__name__}-{n}" for h, n in DAMAGE])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, whole, broken_off, how, name):
    shutil.copytree(broken_off, tmp_path/"run")
    how(tmp_path/"run"/"checkpoints"/"002-0-0000004"/name)
    with pytest.warns(UserWarning, match=r"checkpoint .*002-0-0000004.*the one before it is used"):
        run = train(tmp_path/"run", FULL, **TWO)
    same_files(run.folder, whole(FULL))


def test_every_checkpoint_damaged_begins_anew(tmp_path, whole, broken_off):
    shutil.copytree(broken_off, tmp_path/"run")
    for f in (tmp_path/"run").glob("checkpoints/*/weights.safetensors"): flip(f)
    with pytest.warns(UserWarning) as said: run = train(tmp_path/"run", FULL, **TWO)
    assert sum("is damaged" in str(w.message) for w in said) == 3
    same_files(run.folder, whole(FULL))


def test_a_torn_event_is_cut(tmp_path, whole, broken_off):
    shutil.copytree(broken_off, tmp_path/"run")
    with open(tmp_path/"run"/"events.jsonl", "ab") as f: f.write(b'{"kind": "st')
    with pytest.warns(UserWarning, match="torn"): run = train(tmp_path/"run", FULL, **TWO)
    same_files(run.folder, whole(FULL))


# Which folder

OTHER = [({"seed": 1}, "seed is 0 there and 1 here"),
         ({"optim": {"lr": 1e-3}}, r"optim\.lr is 0\.003 there and 0\.001 here"),
         ({"stream_args": {"n_train": 95}}, r"stream_args\.n_train"), ({"order": TASKS[1::-1]}, "order"),
         ({"method_args": {"ewc": {"lam": 1., "n": 24}}}, r"method_args\.ewc\.lam")]


@pytest.mark.parametrize("fields, said", OTHER, ids=[next(iter(f)) for f, _ in OTHER])
def test_a_folder_of_another_configuration_is_refused(broken_off, fields, said):
    before = {p: p.read_bytes() for p in broken_off.rglob("*") if p.is_file()}
    merged = {k: {**TWO.get(k, {}), **v} if isinstance(v, dict) else v for k, v in {**TWO, **fields}.items()}
    with pytest.raises(CitError, match=f"another configuration: {said}.*choose another `out` folder"):
        train(broken_off, FULL, **merged)
    assert {p: p.read_bytes() for p in broken_off.rglob("*") if p.is_file()} == before


def test_changed_weights_behind_the_same_name_are_refused(tmp_path):
    shutil.copytree(assets("tiny-instruct"), tmp_path/"start")
    fields = TWO | {"backbone": str(tmp_path/"start")}
    stopped(tmp_path/"run", "finetune", "one_step", 8, **fields)
    flip(tmp_path/"start"/"model.safetensors")
    with pytest.raises(CitError, match="other weights .*have changed"): train(tmp_path/"run", "finetune", **fields)


def test_resume_needs_only_the_folder(tmp_path, whole, broken_off, monkeypatch):
    shutil.copytree(broken_off, tmp_path/"run")
    assert resume(tmp_path/"run").finished
    same_files(tmp_path/"run", whole(FULL))
    monkeypatch.setattr(Held, "one_step", None)
    again = tiny(tmp_path/"run", FULL, **TWO)
    assert again.train().finished and again.folder == tmp_path/"run"


def test_the_thread_count_is_kept(tmp_path, whole):
    "A run that named no thread count goes on with the one it began with."
    free = {**TWO, "compute": {"save_every": 2, "threads": None}}
    assert torch.get_num_threads() == 1
    stopped(tmp_path/"run", "finetune", "one_step", 9, **free)
    try:
        torch.set_num_threads(2)
        run = train(tmp_path/"run", "finetune", **free)
        assert torch.get_num_threads() == 1
    finally: torch.set_num_threads(1)
    same_files(run.folder, whole("finetune"))


# What a memory may hold

@dataclass
class Hoard(Method):
    "Fills its memory with all that is allowed and weighs tensors by their place in it."
    def begin(self, net, task):
        seen = self.mem.setdefault("seen", {})
        seen[task.name] = torch.full((3,), float(len(seen)))
        twice = torch.arange(4)
        types = {"b": torch.tensor([True]), "d": torch.tensor(.1).double(), "h": torch.ones(2).bfloat16()}
        odd = [None, True, 3, 2.5, "ünï", float("nan"), [], {}]
        self.mem |= {"odd": odd, "twice": [twice, twice, twice[1:3]], "types": types}

    def loss(self, net, batch, out):
        weight = sum(k*float(v.sum()) for k, v in enumerate(self.mem["seen"].values(), 1))
        return 1e-3*weight*sum((p**2).sum() for p in net.params.values())

    def end(self, net, task): self.mem["order"] = [*self.mem["seen"]]


def test_memory_comes_back_as_it_was(tmp_path, whole):
    "Order of keys included: methods iterate over what they stored."
    tasks = {"stream_args": {"tasks": ["shp-mcq", "col-word", "col-night"]}}
    stopped(tmp_path/"run", Hoard, "one_step", 14, **tasks)
    run = train(tmp_path/"run", Hoard, **(TWO | tasks))
    same_files(run.folder, whole(Hoard, **tasks))
    mem = run.net.method.mem
    assert list(mem["seen"]) == mem["order"] == ["shp-mcq", "col-word", "col-night"]
    assert repr(mem["odd"]) == repr([None, True, 3, 2.5, "ünï", float("nan"), [], {}])
    assert [t.dtype for t in mem["types"].values()] == [torch.bool, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("thing, said", [({1: 2}, "a key that is 1"), ({"at": (1, 2)}, "tuple"), ({"at": {3}}, "set")])
def test_memory_that_would_not_come_back_is_refused(tmp_path, thing, said):
    class Bad(Method):
        def end(self, net, task): self.mem = {"x": thing}
    with pytest.raises(CitError, match=rf"mem/x.*{said}.*allowed: dicts with string keys, lists"):
        train(tmp_path, Bad, stream_args={"tasks": TASKS[:1]})


def test_a_chain_keeps_memories_apart(tmp_path, whole):
    chain = get_method("er") + Hoard()
    stopped(tmp_path/"run", chain, "one_step", 9)
    same_files(train(tmp_path/"run", chain, **TWO).folder, train(tmp_path/"whole", chain, **TWO).folder)
