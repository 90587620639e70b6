"Acting on a run while it trains changes no bit of it; a process that dies is seen; a branch goes on from what its parent was."
import json
import os
import signal
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from fastcore.basics import patch
from test_probes import Keys
from tiny import TASKS, Held, final, same_tensors, tiny, train

from cit_workbench.core.digests import canonical
from cit_workbench.core.errors import CitError
from cit_workbench.core.files import read_json, write_atomic
from cit_workbench.live.branch import branch, places
from cit_workbench.live.live import LiveRun
from cit_workbench.live.method_file import method_source, rebuilt
from cit_workbench.live.process import start
from cit_workbench.live.remake import note_asked, run_of
from cit_workbench.training.control import Control, command
from cit_workbench.training.locks import lock_folder
from cit_workbench.training.queue import _room, device_queue
from cit_workbench.contract.identity import code_of
from cit_workbench.contract.method import Method
from cit_workbench.contract.registry import get_method
from cit_workbench.record.compare import table
from cit_workbench.training.train import resume

TWO = {"stream_args": {"tasks": TASKS[:2]}, "optim": {"steps": 6}}
SCALE = .5


def scaled(g, by): return g.mul_(by*SCALE)


@dataclass
class Timid(Method):
    "Smaller gradients."
    by: float = .9


@patch
def grads(self:Timid, net, s):
    for p in net.params.values(): scaled(p.grad, self.by)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "Runs that nobody touched."
    runs = {}

    def get(method="finetune", **fields):
        key = repr((method, sorted(fields.items())))
        if key not in runs: runs[key] = train(tmp_path_factory.mktemp("calm")/"run", method, **(TWO | fields)).rec
        return runs[key]
    return get


def bare(rec):
    "Events but the probes', which a launched run has and which change no bit."
    return [e for e in rec.events() if e["kind"] != "watch"]


def same(a, b):
    "Events, R, answers and last weights."
    assert bare(a) == bare(b)
    assert a.finished and canonical(a.R) == canonical(b.R)
    assert [a.answers(len(a.rows) - 1, c) for c, _ in a.columns] == [b.answers(len(b.rows) - 1, c) for c, _ in b.columns]
    same_tensors(final(a.path), final(b.path))


def soon(f, seconds=120):
    "What `f` gives as soon as that is something."
    end = time.monotonic() + seconds
    while not (got := f()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(.02)
    return got


def acting(out, at, act, method="finetune", **fields):
    "Train, and act on the run while it takes the step after `at` ones."
    run = tiny(out, method, **(TWO | fields))
    step, kind = Held.one_step, type("Acting", (Held,), {})

    def one_step(self, *args):
        if self.done == at: act(LiveRun(self.folder))
        return step(self, *args)
    kind.one_step = one_step
    run.__class__ = kind
    return LiveRun(run.train().path)


def aside(f):
    "Do something in a thread; what it returns, and what went wrong in it, comes with `join`."
    out = []

    def g():
        try: out.append((True, f()))
        except BaseException as e: out.append((False, e))
    t = threading.Thread(target=g)
    t.start()

    def join():
        t.join(120)
        ok, got = out[0]
        if not ok: raise got
        return got
    return join


# In this process

def test_a_pause_takes_effect_after_the_step_at_hand(tmp_path, calm, monkeypatch):
    joins, took, task = [], [], Held.train_task

    def timed(self, *args):
        tic = time.time()
        task(self, *args)
        took.append(time.time() - tic)
    monkeypatch.setattr(Held, "train_task", timed)

    def watch(rec):
        soon(lambda: rec.state() == "paused")
        where, events = rec.process_info(), rec.path/"events.jsonl"
        before = events.read_bytes()
        time.sleep(.3)
        assert events.read_bytes() == before and rec.state() == "paused"
        rec.checkpoint()
        soon(lambda: (where["task"], where["step"]) in places(rec))
        rec.resume()
        return where

    def act(rec): rec.pause(), joins.append(aside(lambda: watch(rec)))
    rec = acting(tmp_path/"run", 8, act)
    where = joins[0]()
    assert (where["task"], where["step"], where["global"]) == (TASKS[1], 3, 9) and where["pid"] == os.getpid()
    same(rec, calm())
    told = {e["what"]: e for e in rec.clock()}
    assert .3 <= told["resumed"]["waited"] <= took[1] - told["train"]["seconds"]
    assert not (rec.path/"live.json").exists() and rec.state() == "finished"
    assert "interactive" not in rec.run


@pytest.mark.parametrize("at, method", [(1, "er+ewc"), (5, "ewc"), (11, "finetune"), (2, Keys)], ids=["inside", "last of a task", "last of all", "phases"])
def test_stopped_and_started_again(tmp_path, calm, at, method):
    rec = acting(tmp_path/"run", at, LiveRun.stop, method)
    assert rec.state() == "stopped" and not rec.finished
    place = rec.process_info()
    assert place["global"] == at + 1
    assert any(k[:2] == (place["task"], place["step"]) for k in places(rec) if isinstance(k, tuple))
    with pytest.raises(CitError, match="is stopped: there is no process to pause"): rec.pause()
    again = tiny(tmp_path/"run", method, **TWO).train()
    same(again, calm(method))
    assert LiveRun(again.path).state() == "finished"


@pytest.mark.parametrize("method", ["er+ewc", "smolora"])
def test_questions_while_training(tmp_path, calm, method):
    joins = []
    run = tiny(tmp_path/"run", method, **TWO)
    e = run.data.task(TASKS[0]).example("val", 0)
    ask = [lambda rec: rec.ask(e.image, e.question), lambda rec: rec.ask(None, "What is it?")]

    def act(rec): joins.extend(aside(lambda f=f: f(rec)) for f in ask)

    def slow(rec): act(rec), soon(lambda: len(list((rec.path/"asks").glob("*.json"))) == 2 and (rec.path/"control.json").exists())
    rec = acting(tmp_path/"run", 7, slow, method)
    seen, blind = [j() for j in joins]
    assert seen.task == blind.task == TASKS[1] and seen.step >= 2 and isinstance(seen.text, str)
    same(rec, calm(method))
    with pytest.raises(CitError, match="is finished and nobody trains it: `ask.*here=True"): rec.ask(None, "What is it?")


def test_the_last_checkpoint_answers_like_the_last_row(calm):
    rec, said = calm("smolora"), []
    task = run_of(rec.path).data.task(TASKS[1])
    for i in range(2):
        e = task.example("test", i)
        said.append(LiveRun(rec.path).ask(e.image, e.question, here=True).text)
    assert said == [a["text"] for a in rec.answers(2, TASKS[1])] and torch.get_num_threads() == 1


def test_what_is_asked_must_be_an_image(calm):
    with pytest.raises(CitError, match="image nothing.png does not exist"): LiveRun(calm().path).ask("nothing.png", "What?", here=True)


# In a process of its own

def launch(out):
    "Launch and pause a run of a class of this file, and end."
    tiny(out, Timid, **TWO).launch().pause()
    return os.getpid()


def test_a_run_outlives_who_launched_it_and_its_own_death(tmp_path, fork, calm):
    "Paused, killed, resumed, asked, stopped, resumed: three processes, the bits of one that nobody touched."
    out = tmp_path/"run"
    parent = fork(launch, out)
    rec = LiveRun(out)
    assert rec.rows == ["start", *TASKS[:2]] and rec.config["method"] == "timid"
    assert rec.wait("paused", seconds=120) == "paused"
    place = rec.process_info()
    assert place["step"] == 1 and place["pid"] != parent
    with pytest.raises(ProcessLookupError): os.kill(parent, 0)
    with pytest.raises(CitError, match="is being written by another process"): train(out, Timid, **TWO)
    os.kill(place["pid"], signal.SIGKILL)
    soon(lambda: rec.state() == "dead", 20)
    rec.resume().pause()
    rec.wait("paused", seconds=120)
    assert rec.process_info()["step"] == 1 and rec.process_info()["pid"] != place["pid"]
    assert rec.ask(None, "What is it?")[1:] == (TASKS[0], 1)
    rec.stop()
    rec.wait("stopped", seconds=60)
    rec.resume()
    rec.wait("finished", seconds=120)
    same(LiveRun(out), calm(Timid))
    assert rec.last_log_line() == "" or "Error" not in rec.last_log_line()


def test_a_class_goes_along_as_text(tmp_path):
    run = tiny(tmp_path/"run", Timid, **TWO)
    text = method_source(run.m)
    assert "SCALE = 0.5" in text and "def scaled" in text and "import pytest" not in text and "Keys" not in text
    run.folder.mkdir()
    note_asked(run)
    with pytest.raises(CitError, match="was defined outside the package"): resume(run.folder)
    write_atomic(run.folder/"method.py", text)
    assert run_of(run.folder).config() == run.config()
    write_atomic(run.folder/"method.py", text.replace("SCALE = 0.5", "SCALE = 0.25"))
    with pytest.raises(CitError, match="method.py is not the code that the run began with"): resume(run.folder)
    both = Timid() + get_method("er")
    assert code_of(rebuilt(method_source(both), both)) == code_of(both)
    assert method_source(get_method("er+ewc")) is None


class Signed(Method):
    def grads(self, net, s):
        for p in net.params.values(): p.grad.copy_(torch.sign(p.grad))


def test_a_hook_may_call_a_module_that_its_file_imports():
    "Python compiles such a call otherwise where the import is in the same text."
    text = method_source(Signed())
    assert text.count("import torch") == 2 and code_of(rebuilt(text, Signed())) == code_of(Signed())


@dataclass
class Lost(Method):
    def loss(self, net, batch, out): return nowhere(out)  # noqa: F821


ROOM = threading.Lock()


@dataclass
class Bound(Method):
    def loss(self, net, batch, out): return 0. if ROOM else 1.


def test_what_method_py_cannot_hold_is_named(tmp_path):
    @dataclass
    class Inner(Method): pass
    for cls, said in [(Lost, "would lack 'nowhere', which Lost uses"), (Bound, "cannot hold 'ROOM', a lock"),
                      (Inner, "Inner is defined inside a function")]:
        with pytest.raises(CitError, match=said): tiny(tmp_path/"run", cls).launch()
    assert not (tmp_path/"run").exists()


def test_a_helper_is_part_of_the_key(monkeypatch):
    before = code_of(Timid())
    monkeypatch.setattr("test_live.SCALE", .25)
    assert code_of(Timid()) != before


def test_the_configuration_is_checked_before_a_process_starts(tmp_path):
    with pytest.raises(CitError, match="unknown backbone 'tiny-instrct'"): tiny(tmp_path/"run", backbone="tiny-instrct").launch()
    assert not (tmp_path/"run").exists()


# The queue

def test_the_queue_follows_the_launch_and_forgets_the_dead(tmp_path):
    device, order, joins = f"fake-a{os.getpid()}", [], []

    def one(when):
        with device_queue(device, when): order.append(when)
    dead = _room(device)/f"{0:020d}-1.ticket"
    with device_queue(device):
        dead.touch()
        for n, when in enumerate((30, 10, 20), 1):
            joins.append(aside(lambda when=when: one(when)))
            soon(lambda: len(list(_room(device).glob("*.ticket"))) == n + 1)
        assert order == []
    for join in joins: join()
    assert order == [10, 20, 30]


def test_a_launched_run_waits_says_so_and_fails_in_a_sentence(tmp_path):
    "Two processes that never get as far as torch: one is stopped in the queue, the other finds its configuration gone."
    device = f"fake-b{os.getpid()}"
    recs = []
    with device_queue(device):
        for name in ("first", "second"):
            run = tiny(tmp_path/name)
            run.folder.mkdir()
            note_asked(run)
            about = read_json(run.folder/"asked.json")
            about["asked"]["compute"]["device"] = device
            write_atomic(run.folder/"asked.json", json.dumps(about))
            start(run.folder)
            recs.append(LiveRun(run.folder))
            soon(lambda: recs[-1].process_info().get("position") == len(recs))
            assert recs[-1].state() == "queued"
        recs[0].stop()
        assert recs[0].wait("stopped", seconds=20) == "stopped"
        soon(lambda: recs[1].process_info()["position"] == 1)
        (tmp_path/"second"/"asked.json").write_text("{")
    soon(lambda: recs[1].state() == "failed")
    assert "is not valid JSON" in recs[1].last_log_line() and recs[1].process_info()["said"] == recs[1].last_log_line()
    with pytest.raises(CitError, match="is failed, not finished: .*is not valid JSON"): recs[1].wait("finished")


def test_a_lock_that_only_a_glance_holds_is_waited_for(tmp_path):
    fd = lock_folder(tmp_path)
    threading.Timer(.2, os.close, [fd]).start()
    os.close(lock_folder(tmp_path, 5))


# Branches

@pytest.fixture(scope="module")
def parent(calm): return calm("finetune", compute={"save_every": 4})


@pytest.mark.parametrize("at", [TASKS[0], (TASKS[1], 4), None], ids=["end", "inside", "last"])
def test_a_branch_with_nothing_changed_is_its_parent(tmp_path, parent, at):
    rec = branch(parent, at=at, out=str(tmp_path/"run")).train()
    same(rec, parent)
    assert rec.run["interactive"] and rec.run["parent"]["of"] == parent.path.name and rec.run["parent"]["changed"] == []
    assert resume(rec.path).finished


def test_replay_joins_where_finetuning_was(tmp_path, parent):
    run = branch(parent, at=TASKS[0], out=str(tmp_path/"run"), method="er")
    assert run.config()["parent"]["step"] == 6 and run.folder == tmp_path/"run"
    rec = run.train()
    same_tensors(rec_weights(rec, TASKS[0]), rec_weights(parent, TASKS[0]))
    assert canonical(rec.R[:2]) == canonical(parent.R[:2])
    replayed = dict(zip(*rec.series("replayed")))
    assert replayed[0] == 0. or replayed[0] != replayed[0]
    assert replayed[6] == .25 and "old_data" in rec.leaks
    assert read_json(parent.path/"run.json").get("interactive") is None


def rec_weights(rec, at):
    from cit_workbench.training.checkpoint import read_checkpoint
    return read_checkpoint(places(rec)[at])["weights"]


@pytest.mark.parametrize("method", ["ema", "ewc", "tir"])
def test_methods_join_with_an_empty_memory(tmp_path, parent, method):
    from tiny import ARGS
    rec = branch(parent, at=TASKS[0], out=str(tmp_path/"run"), method=method, method_args=ARGS.get(method, {})).train()
    assert rec.finished and rec.config["method"] == method
    assert bool(final(rec.path, "mem")) == (method != "ema")


def test_a_memory_that_stays_is_kept(tmp_path, calm):
    old = calm("ewc")
    new = branch(old, at=TASKS[0], out=str(tmp_path/"run"), method="er+ewc", method_args={"er": {"share": 0.}, "ewc": old.config["method_args"]})
    same_tensors(final(new.train().path), final(old.path))


def test_changed_fields_act(tmp_path, parent):
    rec = branch(parent, at=(TASKS[1], 4), out=str(tmp_path/"run"), optim={"lr": 1e-3}).train()
    assert rec.run["parent"]["changed"] == ["optim"] and rec.config["optim"]["steps"] == 6
    a, b = final(rec.path), final(parent.path)
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert not (rec.path/"answers"/"2").samefile(parent.path/"answers"/"2")


@pytest.mark.parametrize("fields, said", [
    ({"at": "shp"}, "has no checkpoint at 'shp'; there are"),
    ({"stream_args": {"tasks": TASKS}}, "so the stream .field 'stream_args'. cannot change"),
    ({"tune": {"r": 4}}, "so what is trained .field 'tune'. cannot change"),
    ({"compute": {"dtype": "bfloat16"}}, "so compute 'dtype' cannot change"),
    ({"at": TASKS[0], "method": "moelora"}, "finetune inserts, and moelora inserts others"),
    ({"at": TASKS[0], "method": "joint"}, "has trained col-word, in this order; joint would have trained"),
    ({"at": TASKS[0], "order": TASKS[1::-1]}, "has trained col-word, in this order"),
    ({"at": (TASKS[1], 4), "method": "er"}, "another method joins at the end of a task"),
    ({"lam": 2.}, "unknown field of run 'lam'"),
], ids=lambda x: "" if isinstance(x, str) else "-".join(x))
def test_what_a_checkpoint_cannot_carry_is_refused(tmp_path, parent, fields, said):
    with pytest.raises(CitError, match=said): branch(parent, out=str(tmp_path/"run"), **fields)
    assert not list(tmp_path.iterdir())


def test_tables_leave_branches_out(tmp_path, parent):
    rec = branch(parent, at=TASKS[0], out=str(tmp_path/"run"), optim={"lr": 1e-3}).train()
    plain, every = table([parent, rec]), table([parent, rec], keep=["interactive"])
    assert len(plain.rows) == 1 and "Left out: 1 interactive." in plain.notes
    assert len(every.rows) == 2


def test_looking_costs_less_than_a_thousandth_of_a_step(tmp_path):
    c = Control(tmp_path, launched=True)
    command(tmp_path, want="run")

    def share(n=500):
        tic = time.perf_counter()
        for k in range(n): c.beat(step=k), c.changed()
        return (time.perf_counter() - tic)/n/.05
    assert min(share() for _ in range(5)) < .001
