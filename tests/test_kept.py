"Answers are kept batch by batch: a kill costs the batch at hand, and what it leaves are the answers of a run never stopped."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import TASKS, jitter, opened, same_files, tiny, train

from cit_workbench.models.backbone import Backbone
from cit_workbench.measure import answers
from cit_workbench.measure.answers import evaluate
from cit_workbench.measure.store import put_down, read_down

FEW = {"stream_args": {"tasks": TASKS, "n_train": 16, "n_val": 12, "n_test": 12}, "optim": {"steps": 2}}


class Killed(BaseException): "The process goes."


@pytest.fixture
def asked(monkeypatch, tmp_path):
    "Rows answered so far; a store of its own; small batches; `at` is the batch at which the process goes."
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"cache"))
    rows, answer, ask = [], Backbone.answer, answers.ask
    state = {"at": None}

    def counted(self, b, *args):
        if state["at"] == len(rows): raise Killed
        rows.append(len(b))
        return answer(self, b, *args)
    monkeypatch.setattr(Backbone, "answer", counted)
    monkeypatch.setattr(answers, "ask", lambda *args, **kw: ask(*args, **{"tokens": 300, **kw}))
    return state, rows


def parts(tmp_path): return sorted((tmp_path/"cache").rglob("*.part"))


@pytest.fixture
def net(tmp_path_factory):
    net = opened(tmp_path_factory.mktemp("net"), "finetune", **FEW).net
    jitter(net, .1)
    net.model.eval()
    return net


def test_a_kill_costs_the_batch_at_hand(net, asked, tmp_path, monkeypatch):
    state, rows = asked
    whole = evaluate(net, TASKS)
    total, batches = sum(rows), len(rows)
    assert total == 36 and batches > 4 and parts(tmp_path) == []
    for at in range(batches):
        monkeypatch.setenv("CIT_CACHE", str(tmp_path/f"cache-{at}"))
        rows.clear()
        state["at"] = at
        with pytest.raises(Killed): evaluate(net, TASKS)
        state["at"] = None
        assert evaluate(net, TASKS) == whole
        assert sum(rows) == total
    left = [p for p in tmp_path.rglob("*.part")]
    assert left == []
    names = [sorted((f.name, f.read_bytes()) for f in (tmp_path/d).rglob("*.jsonl")) for d in ("cache", "cache-0", "cache-3")]
    assert names[0] == names[1] == names[2] and len(names[0]) == 3


def test_a_kill_between_the_columns_asks_nothing_again(net, asked, tmp_path, monkeypatch):
    state, rows = asked
    store, calls = answers.keep, []

    def dies(path, lines):
        calls.append(1)
        if len(calls) == 2: raise Killed
        store(path, lines)
    monkeypatch.setattr(answers, "keep", dies)
    with pytest.raises(Killed): evaluate(net, TASKS)
    before = sum(rows)
    got = evaluate(net, TASKS)
    assert sum(rows) == before == 36 and parts(tmp_path) == []
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"other"))
    assert evaluate(net, TASKS) == got


DAMAGE = [lambda b: b"", lambda b: b[:len(b)//2], lambda b: b[:-1], lambda b: b"\xff" + b, lambda b: b + b[:40],
          lambda b: b.replace(b'"valid":', b'"valid":2'), lambda b: b"[]\n[]\n", lambda b: b*2]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_lines_are_asked_again(net, asked, tmp_path, damage):
    state, rows = asked
    state["at"] = 3
    with pytest.raises(Killed): evaluate(net, TASKS)
    state["at"] = None
    for f in parts(tmp_path): f.write_bytes(damage(f.read_bytes()))
    got = evaluate(net, TASKS)
    os.environ["CIT_CACHE"] = str(tmp_path/"other")
    assert evaluate(net, TASKS) == got


def test_torn_line_does_not_spoil_what_follows(tmp_path):
    keep = {"a": tmp_path/"x"/"a.part"}
    put_down(keep, {("a", 0): {"text": "red"}, ("b", 0): {"text": "other"}})
    with open(keep["a"], "ab") as f: f.write(b"0123456789abcdef [1,{\"te")
    put_down(keep, {("a", 2): {"text": "blüe"}})
    assert read_down(keep["a"]) == {0: {"text": "red"}, 2: {"text": "blüe"}}


def test_another_model_finds_nothing_of_it(net, asked, tmp_path):
    state, rows = asked
    state["at"] = 3
    with pytest.raises(Killed): evaluate(net, TASKS)
    state["at"] = None
    jitter(net, .1, seed=1)
    rows.clear()
    evaluate(net, TASKS)
    assert sum(rows) == 36


def test_a_store_that_cannot_be_written_costs_time_only(net, asked, tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"file"))
    with pytest.warns(UserWarning, match="answers are not kept"): got = evaluate(net, TASKS)
    assert {n: len(lines) for n, (_, lines) in got.items()} == dict.fromkeys(TASKS, 12)


@pytest.mark.parametrize("at", [2, 9, 16])
def test_a_probe_goes_on_too(tmp_path, asked, at):
    "Killed in a probe on validation data or in a row; the run then has the files of one never stopped."
    state, rows = asked
    fields = {**FEW, "probe_every": 2, "compute": {"save_every": 1}}
    whole = train(tmp_path/"whole", **fields)
    total = sum(rows)
    os.environ["CIT_CACHE"] = str(tmp_path/"again")
    rows.clear()
    state["at"] = len(rows) + at + 6
    with pytest.raises(Killed): train(tmp_path/"run", **fields)
    state["at"] = None
    run = train(tmp_path/"run", **fields)
    assert sum(rows) == total
    same_files(run.folder, whole.folder)
    assert list((tmp_path/"again").rglob("*.part")) == []


def shares(out, at):
    "What one process of two answers, when it goes at a batch."
    torch.set_num_threads(1)
    run = tiny(out, "zero_shot", **FEW)
    rows, answer, ask = [], Backbone.answer, answers.ask

    def counted(self, b, *args):
        if len(rows) == at: os._exit(9)
        rows.append(len(b))
        return answer(self, b, *args)
    Backbone.answer, answers.ask = counted, lambda *args, **kw: ask(*args, **{"tokens": 300, **kw})
    run.open()
    return sum(rows)


def test_each_process_finds_its_share(tmp_path, fork):
    whole = fork.world(2, shares, tmp_path/"whole", None, CIT_CACHE=str(tmp_path/"cache-whole"))
    assert min(whole) > 0
    fork.world(2, shares, tmp_path/"two", 3, CIT_CACHE=str(tmp_path/"cache"))
    kept = sum(len(read_down(f)) for f in (tmp_path/"cache").rglob("*.part"))
    assert 0 < kept < sum(whole)
    again = fork.world(2, shares, tmp_path/"two", None, CIT_CACHE=str(tmp_path/"cache"))
    assert sum(again) == sum(whole) - kept
    assert not list((tmp_path/"cache").rglob("*.part"))
    files = [{f.name: f.read_bytes() for f in (tmp_path/d).rglob("*.jsonl")} for d in ("cache", "cache-whole")]
    assert files[0] == files[1] and len(files[0]) == len(TASKS) + 7


SCRIPT = """
import sys
from cit_workbench.measure import answers
from cit_workbench.models.backbone import Backbone
from cit_workbench.training.train import Run
answer, ask = Backbone.answer, answers.ask
def counted(self, b, *args):
    with open(sys.argv[2], "a") as f: print(len(b), file=f)
    return answer(self, b, *args)
Backbone.answer = counted
answers.ask = lambda *args, **kw: ask(*args, **{"tokens": 300, **kw})
Run("finetune", stream_args={"tasks": ["col-word"], "n_train": 8, "n_val": 2, "n_test": 60}, optim={"steps": 1, "batch": 4},
    compute={"threads": 1}, out=sys.argv[1]).train()
"""


def test_sigkill_while_it_answers(tmp_path):
    "A real process, a real kill."
    def start(out, env):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path/out), str(tmp_path/f"{out}.rows")],
                                env={**os.environ, "CIT_CACHE": str(tmp_path/env)}, stderr=subprocess.DEVNULL)

    def rows(out):
        f = tmp_path/f"{out}.rows"
        return [int(n) for n in f.read_text().split()] if f.exists() else []
    assert start("whole", "one").wait(300) == 0
    p = start("run", "two")
    while len(rows("run")) < 20: time.sleep(.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path/"run"/"result.json").exists()
    assert start("run", "two").wait(300) == 0
    assert sum(rows("run")) - sum(rows("whole")) <= 2*max(rows("whole"))
    same_files(tmp_path/"run", tmp_path/"whole")
    R = [json.loads((tmp_path/d/"result.json").read_text())["R"] for d in ("run", "whole")]
    assert R[0] == R[1] and Path(tmp_path/"run"/"answers").is_dir()
