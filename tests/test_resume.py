"Killed anywhere and resumed, a run ends in the bits of one that never stopped; what is damaged is refused by name."
import json
import errno
import os
import resource
import shutil
import tempfile
import warnings
from dataclasses import dataclass

import pytest
import torch
from kills import Life, Whole, few, methods
from test_probes import Keys
from tiny import TASKS, Held, differing, same_files, tiny, train

import cit_workbench.training.train as train_module
from cit_workbench.training import checkpoint
from cit_workbench.training.checkpoint import checkpoints
from cit_workbench.core.errors import CitError
from cit_workbench.core.paths import assets
from cit_workbench.contract.method import Method
from cit_workbench.contract.registry import get_method, method_class
from cit_workbench.training.train import resume

TWO = {"stream_args": {"tasks": TASKS[:2]}, "compute": {"save_every": 2}, "optim": {"steps": 5}}
FULL = "er+ewc"


class Stop(BaseException): "Somebody pulls the plug."


def unplug(mp, owner, hook, nth):
    "Stop at the `nth` call of a function, before it does what it should."
    f, calls = getattr(owner, hook), []

    def g(*args, **kw):
        calls.append(1)
        if len(calls) == nth: raise Stop
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


# Killed

def test_twenty_kills_over_all_methods(tmp_path, fork):
    "An exit at a named place for each method and four SIGKILLs; `make kills` does more than five hundred."
    exits = max(16, len(methods()))
    kills, differ = fork(few, tmp_path, exits, 4)
    assert not differ
    assert len(kills) == exits + 4 and sum(place == "SIGKILL from outside" for place, _ in kills) == 4
    assert {name for _, name in kills} == {*methods()}


def forgetful(work):
    "What a kill finds when the optimiser's state is not put back."
    train_module.load_optim = lambda opt, tensors: None
    life = Life(work, whole := Whole(work, "finetune"), 1)
    life.leave(whole.marks[whole.by_place()["between a step and its event"][-1]])
    return life.ends()


def test_a_kill_notices_what_is_not_put_back(tmp_path, fork):
    assert any("weights" in name for name in fork(forgetful, tmp_path))


@pytest.mark.parametrize("owner, hook, nth", [(Held, "row", 3), (os, "replace", 40)], ids=["row", "rename"])
def test_a_resume_that_lost_nothing_says_nothing(tmp_path, whole, owner, hook, nth):
    stopped(tmp_path/"run", FULL, hook, nth, owner)
    torch.manual_seed(nth)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = train(tmp_path/"run", FULL, **TWO)
    assert run.rec.finished and differing(run.folder, whole(FULL)) == []


@pytest.mark.parametrize("nth", [3, 4, 11])
def test_resumed_inside_a_phase(tmp_path, whole, nth):
    "Three steps of keys alone, checkpoint after two; five of LoRA and the projector, checkpoints after two and four."
    tune = {"tune": {"train": r"model\.multi_modal_projector\..*"}}
    stopped(tmp_path/"run", Keys, "one_step", nth, **tune)
    same_files(train(tmp_path/"run", Keys, **(TWO | tune)).folder, whole(Keys, **tune))


def test_old_checkpoints_go_later_when_a_kill_came_before(tmp_path, whole):
    "Twice: at the last checkpoint between steps, and at the task's end."
    for nth in (6, 2): stopped(tmp_path/"run", "single", "prune", nth, train_module)
    assert differing(train(tmp_path/"run", "single", **TWO).folder, whole("single")) == []


@pytest.mark.parametrize("hook, steps", [("begin", 5), ("end", 0)])
def test_a_kill_inside_a_hook_repeats_the_hook_alone(tmp_path, monkeypatch, hook, steps):
    "Without checkpoints between steps: the last task is trained once more only if its `begin` was not over."
    seldom = {"compute": {"save_every": 0}}
    stopped(tmp_path/"run", "ewc", hook, 2, method_class("ewc"), **seldom)
    calls, step = [], Held.one_step
    monkeypatch.setattr(Held, "one_step", lambda *args: calls.append(1) or step(*args))
    run = train(tmp_path/"run", "ewc", **(TWO | seldom))
    assert len(calls) == steps
    assert differing(run.folder, train(tmp_path/"whole", "ewc", **(TWO | seldom)).folder) == []


def test_an_unchanged_memory_is_written_once(tmp_path, monkeypatch):
    written, write = [], checkpoint.write_atomic
    monkeypatch.setattr(checkpoint, "write_atomic", lambda path, data: written.append(path) or write(path, data))
    run = train(tmp_path/"run", "ewc", **TWO)
    mems = [p.name for p in written if p.name.startswith("mem-")]
    states = [p for p in written if p.name == "state.json"]
    assert len(mems) == len({*mems}) == 3 and len(states) == 8
    assert {p.name for p in (run.folder/"checkpoints").glob("mem-*")} == {*mems[1:]}


# Damage

@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    "A run stopped in the middle of its second task."
    out = tmp_path_factory.mktemp("broken")/"run"
    stopped(out, FULL, "one_step", 10)
    assert [p.name for p in checkpoints(out/"checkpoints")] == ["001-z-end", "002-00-0000002", "002-00-0000004"]
    return out


def flip(f):
    "One bit, in the middle."
    data = bytearray(f.read_bytes())
    data[len(data)//2] ^= 1
    f.write_bytes(data)


def cut(f): f.write_bytes(f.read_bytes()[:-1])
def lose(f): f.unlink()


FILES = ["weights.safetensors", "optim.safetensors", "state.json", "manifest.json"]
DAMAGE = [(flip, f) for f in FILES] + [(cut, FILES[0]), (lose, FILES[1]), (lose, FILES[3])]


@pytest.mark.parametrize("how, name", DAMAGE, ids=[f"{h.__name__}-{n}" for h, n in DAMAGE])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, whole, broken_off, how, name):
    shutil.copytree(broken_off, tmp_path/"run")
    how(tmp_path/"run"/"checkpoints"/"002-00-0000004"/name)
    with pytest.warns(UserWarning, match=r"checkpoint .*002-00-0000004.*the one before it is used") as said:
        run = train(tmp_path/"run", FULL, **TWO)
    assert len([w for w in said if "one before it" in str(w.message)]) == 1
    assert differing(run.folder, whole(FULL)) == []


@pytest.mark.parametrize("how", [flip, cut, lose])
def test_a_damaged_memory_is_refused_by_name_and_written_anew(tmp_path, whole, broken_off, how):
    "Three checkpoints refer to it, so the run begins anew."
    shutil.copytree(broken_off, tmp_path/"run")
    how(next((tmp_path/"run"/"checkpoints").glob("mem-*")))
    with pytest.warns(UserWarning, match=r"checkpoint .*002-00-0000004 is damaged: mem-.*the one before it is used"):
        run = train(tmp_path/"run", FULL, **TWO)
    assert differing(run.folder, whole(FULL)) == []


def test_every_checkpoint_damaged_begins_anew(tmp_path, whole, broken_off):
    shutil.copytree(broken_off, tmp_path/"run")
    for f in (tmp_path/"run").glob("checkpoints/*/weights.safetensors"): flip(f)
    with pytest.warns(UserWarning) as said: run = train(tmp_path/"run", FULL, **TWO)
    assert sum("is damaged" in str(w.message) for w in said) == 3
    same_files(run.folder, whole(FULL))


def test_what_a_kill_left_of_an_adapter_goes(tmp_path, whole, broken_off):
    "peft reads the README that it finds and writes it again, half or whole."
    shutil.copytree(broken_off, tmp_path/"run")
    for name in ("shp-mcq", ".tmp-shp-mcq"):
        f = tmp_path/"run"/"adapters"/name/"README.md"
        f.parent.mkdir()
        f.write_text((whole(FULL)/"adapters"/"col-word"/"README.md").read_text()[:3000])
    assert differing(train(tmp_path/"run", FULL, **TWO).folder, whole(FULL)) == []


def test_a_torn_event_is_cut(tmp_path, whole, broken_off):
    shutil.copytree(broken_off, tmp_path/"run")
    with open(tmp_path/"run"/"events.jsonl", "ab") as f: f.write(b'{"kind": "st')
    with pytest.warns(UserWarning, match="torn"): run = train(tmp_path/"run", FULL, **TWO)
    same_files(run.folder, whole(FULL))


# A disk that refuses

REFUSED = r"^cannot write \S*run\S*: {}; free space or choose another `out` folder"


def cramped(out, size):
    "Train where no file may grow beyond `size` bytes; the sentence it ends with."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try: train(out, FULL, **TWO)
    except CitError as e: return str(e)


@pytest.mark.parametrize("size, name", [(600, "run.json"), (2000, "events.jsonl"), (20_000, "safetensors")])
def test_a_file_that_may_not_grow(tmp_path, whole, broken_off, fork, size, name):
    if "events" in name: shutil.copytree(broken_off, tmp_path/"run")
    said = fork(cramped, tmp_path/"run", size)
    assert said.startswith("cannot write ") and name in said and "larger than the system allows" in said and "\n" not in said
    assert fork(cramped, tmp_path/"run", size).startswith("cannot write ")
    assert differing(train(tmp_path/"run", FULL, **TWO).folder, whole(FULL)) == []


@pytest.mark.parametrize("nth", [1, 8, 30, 45])
def test_a_full_disk(tmp_path, whole, monkeypatch, nth):
    "It says so when a file is synced; each time the sentence names the file, and nothing that was whole is lost."
    f, calls, out = os.fsync, [], tmp_path/"run"

    def full(fd):
        calls.append(1)
        if len(calls) >= nth: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        f(fd)
    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.raises(CitError, match=REFUSED.format("no space is left on the disk")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(out, FULL, **TWO)
    monkeypatch.setattr(os, "fsync", f)
    assert differing(train(out, FULL, **TWO).folder, whole(FULL)) == []


@pytest.fixture
def unwritable(monkeypatch):
    "Make a folder and what is in it read-only; for root, to whom modes say nothing, the calls that write are refused."
    done = []

    def lock(folder):
        before = {p: p.stat().st_mode for p in [folder, *folder.rglob("*")]}
        done.append(before)
        for p in before: p.chmod(before[p] & 0o555)
        if os.geteuid(): return
        def refuse(f, writes):
            def g(*args, **kw):
                if writes(*args, **kw): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return f(*args, **kw)
            return g
        inside = lambda p, *args, **kw: str(p).startswith(str(folder))
        temporary = refuse(tempfile.NamedTemporaryFile, lambda dir, **kw: inside(dir))
        opened = refuse(open, lambda p, mode="r", *args, **kw: inside(p) and mode not in ("r", "rb"))
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", temporary)
        monkeypatch.setattr("builtins.open", opened)
        calls = [(shutil, "rmtree"), *((os, name) for name in ("replace", "mkdir", "unlink", "rmdir", "truncate"))]
        for owner, name in calls:
            monkeypatch.setattr(owner, name, refuse(getattr(owner, name), inside))

    yield lock
    for before in done:
        for p, mode in before.items(): p.chmod(mode) if p.exists() else None


@pytest.mark.parametrize("half", [False, True], ids=["whole", "with a half-written checkpoint"])
def test_a_read_only_folder(tmp_path, whole, broken_off, unwritable, half):
    out = tmp_path/"run"
    shutil.copytree(broken_off, out)
    if half: shutil.copytree(out/"checkpoints"/"002-00-0000004", out/"checkpoints"/".tmp-002-y-trained")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    unwritable(out)
    with pytest.raises(CitError, match=REFUSED.format("permission is denied")): train(out, FULL, **TWO)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["checkpoints", "adapters", "answers"])
def test_a_file_where_a_folder_must_be(tmp_path, whole, name):
    "One sentence, and the run goes on when the file is gone."
    out = tmp_path/"run"
    out.mkdir()
    (out/name).write_text("")
    with pytest.raises(CitError, match=rf"^cannot write \S*{name}"): train(out, FULL, **TWO)
    (out/name).unlink()
    assert differing(train(out, FULL, **TWO).folder, whole(FULL)) == []


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


@pytest.mark.parametrize("nth", [9, 1], ids=["from a checkpoint", "before the first checkpoint"])
def test_the_thread_count_is_kept(tmp_path, whole, nth):
    "A run that named no thread count goes on with the one it began with."
    free = {**TWO, "compute": {"save_every": 2, "threads": None}}
    assert torch.get_num_threads() == 1
    stopped(tmp_path/"run", "finetune", "one_step", nth, **free)
    try:
        torch.set_num_threads(2)
        run = train(tmp_path/"run", "finetune", **free)
        assert torch.get_num_threads() == 1
    finally: torch.set_num_threads(1)
    same_files(run.folder, whole("finetune"))
    assert run.rec.run["threads"] == 1


def test_another_thread_count_is_refused(tmp_path, broken_off):
    shutil.copytree(broken_off, tmp_path/"run")
    other = {"compute": {"save_every": 2, "threads": 2}}
    with pytest.raises(CitError, match=r"compute\.threads is 1 there and 2 here"):
        train(tmp_path/"run", FULL, **(TWO | other))
    assert torch.get_num_threads() == 1
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(torch, "get_num_threads", lambda: 3)
        with pytest.raises(CitError, match="needs 1 CPU threads, but torch gives 3"): train(tmp_path/"run", FULL, **TWO)


def test_another_library_is_named(tmp_path, whole, broken_off):
    shutil.copytree(broken_off, tmp_path/"run")
    f = tmp_path/"run"/"run.json"
    f.write_text(f.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    with pytest.warns(UserWarning, match="began with versions.torch '1.0' and goes on with"):
        train(tmp_path/"run", FULL, **TWO)
    same_files(tmp_path/"run", whole(FULL))


def test_code_that_computes_something_else_is_named(tmp_path, broken_off):
    shutil.copytree(broken_off, tmp_path/"run")
    f = tmp_path/"run"/"run.json"
    there = json.loads(f.read_text())
    there["behaviour"]["rooms"]["training"] -= 1
    f.write_text(json.dumps(there))
    with pytest.warns(UserWarning, match="began with behaviour.rooms.training 0 and goes on with 1"):
        train(tmp_path/"run", FULL, **TWO)


def deterministic(out, device):
    "Train, stop and resume with deterministic kernels; what differs, and whether the last resume turned them on."
    fields = {**TWO, "compute": {"save_every": 2, "device": device}}
    torch.use_deterministic_algorithms(True)
    train(out/"whole", FULL, **fields)
    for owner, hook, nth in [(Held, "one_step", 4), (method_class("ewc"), "end", 2), (Held, "row", 1)]:
        stopped(out/"run", FULL, hook, nth, owner, **fields)
        torch.use_deterministic_algorithms(False)
    train(out/"run", FULL, **fields)
    return differing(out/"whole", out/"run"), torch.are_deterministic_algorithms_enabled()


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
def test_deterministic_kernels_are_kept(tmp_path, fork, device):
    "The same bits again, on CUDA too; in a process of its own, whose cuBLAS is told before it starts."
    assert fork(deterministic, tmp_path, device, CUBLAS_WORKSPACE_CONFIG=":4096:8") == ([], True)


# What a memory may hold

@dataclass
class Hoard(Method):
    "Fills its memory with all that is allowed and weighs tensors by their place in it."
    def begin(self, net, task):
        seen = self.mem.setdefault("seen", {})
        seen[task.name] = torch.full((3,), float(len(seen)))
        twice = torch.arange(4)
        types = {"b": torch.tensor([True]), "d": torch.tensor(.1).double(), "h": torch.ones(2).bfloat16()}
        odd = [None, True, 3, 2.5, "ünï", -0., [], {}]
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
    assert repr(mem["odd"]) == repr([None, True, 3, 2.5, "ünï", -0., [], {}])
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
