"Probes of old tasks while a model trains: they change no bit, survive a kill, and say what is so."
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_probes import Keys
from test_resume import Stop, unplug
from tiny import TASKS, Held, final, same_tensors, tiny, train

from cit_workbench import cli
from cit_workbench.models.batch import at
from cit_workbench.training.checkpoint import checkpoints
from cit_workbench.core.errors import CitError
from cit_workbench.live.branch import branch
from cit_workbench.training.asked import watch_of
from cit_workbench.contract.method import Method
from cit_workbench.record.packing import pack
from cit_workbench.record.record import Record
from cit_workbench.training.train import Run, resume
from cit_workbench.measure.watch import Watcher
from cit_workbench.measure.answers import ask

ON = {"watch": {"every": 2, "full": 4, "rows": 3, "share": 0.}}
METHODS = ["finetune", "er+ewc", "smolora", "moelora", "fwd_prompt", "joint", "eproj"]
LAYERED = ("drift", "cka", "angle", "angle_mean")


def bare(folder) -> list:
    "Events but the probes'."
    return [e for e in Record(folder).events() if e["kind"] != "watch"]


def tensors(folder) -> list:
    "Weights, optimiser and memory of every checkpoint by name, and its state without its place in the events."
    out = []
    for path in checkpoints(folder/"checkpoints"):
        files = {f.name: f.read_bytes() for f in sorted(path.iterdir()) if f.suffix == ".safetensors"}
        mem = [n for n in json.loads((path/"manifest.json").read_text()) if "mem-" in n]
        state = {k: v for k, v in json.loads((path/"state.json").read_text()).items() if k != "events"}
        out.append((path.name, files, mem, state))
    return out


# Nothing changes

@pytest.mark.parametrize("method", METHODS)
def test_probes_change_no_bit(tmp_path, finished, method):
    fields = {"compute": {"save_every": 2}, "tune": {"dropout": .2}, "probe_every": 3}
    plain, seen = finished(method, **fields), train(tmp_path/"run", method, **fields, **ON)
    np.testing.assert_array_equal(plain.rec.R, seen.rec.R)
    assert bare(plain.folder) == bare(seen.folder)
    assert tensors(plain.folder) == tensors(seen.folder)
    assert len(seen.rec.events("watch")) >= (4 if method == "joint" else 12)
    assert seen.net.extra_forwards == plain.net.extra_forwards and seen.net.observed == plain.net.observed


@dataclass
class Counting(Method):
    "Counts what it is asked for while it trains, and draws from torch's own generator between hooks."
    def grads(self, net, s): self.mem["drawn"] = torch.rand(2)
    def stats(self, net): return {"drawn": float(self.mem["drawn"].sum()) if "drawn" in self.mem else 0., "spent": net.extra_forwards}


def test_probes_leave_random_numbers_and_costs_alone(tmp_path):
    a, b = train(tmp_path/"a", Counting), train(tmp_path/"b", Counting, **ON)
    assert bare(a.folder) == bare(b.folder)
    assert torch.equal(a.net.method.mem["drawn"], b.net.method.mem["drawn"])
    assert b.rec.events("watch")[-1]["stats"] == pytest.approx(a.rec.events("step")[-1]["stats"], rel=1e-4)


# A run is the same, watched or not

def test_probes_are_no_part_of_what_a_run_is(tmp_path, finished):
    plain, seen = tiny(tmp_path), tiny(tmp_path, **ON)
    assert plain.config() == seen.config() and "watch" not in seen.config()
    assert Run(stream="shapes").folder == Run(stream="shapes", watch={"every": 9}).folder
    done = finished("finetune")
    assert tiny(done.folder, **ON).train().events() == done.rec.events()  # finished: nothing is trained again
    assert plain.probes() == {} and seen.probes() == {"watch": ON["watch"]}


def stopped(folder, nth=6, **fields):
    "A run that breaks off in its second task."
    with pytest.MonkeyPatch.context() as mp:
        unplug(mp, Held, "one_step", nth)
        with pytest.raises(Stop): train(folder, **fields)


PARTS = {"stream_args": {"tasks": TASKS[:3]}, "compute": {"save_every": 2}}


@pytest.mark.parametrize("before, after", [({}, ON), (ON, {"watch": {"every": 0}}), (ON, {"watch": {"every": 1, "rows": 3}})])
def test_a_stopped_run_goes_on_with_other_probes(tmp_path, before, after):
    "Its bits are those of a run that nobody watched, and run.json says how it is watched now."
    stopped(tmp_path/"run", **PARTS, **before)
    got, plain = train(tmp_path/"run", **PARTS, **after), train(tmp_path/"plain", **PARTS)
    assert bare(got.folder) == bare(plain.folder) and tensors(got.folder) == tensors(plain.folder)
    np.testing.assert_array_equal(got.rec.R, plain.rec.R)
    run = json.loads((got.folder/"run.json").read_text())
    assert run.get("watch", {}).get("every", 0) == after["watch"]["every"]
    assert run["asked"] == json.loads((plain.folder/"run.json").read_text())["asked"]


def test_what_was_not_probed_is_not_known(tmp_path):
    "Watched from the second task on: how far the first has moved is not known, how far the second has is."
    stopped(tmp_path/"run", **PARTS)
    last = train(tmp_path/"run", **PARTS, **ON).rec.events("watch")[-1]["tasks"]
    assert last[TASKS[0]]["drift"] is None and last[TASKS[0]]["nll"] > 0
    assert max(last[TASKS[1]]["drift"]) > 0
    (tmp_path/"run/arrays"/f"watch-{TASKS[1]}.npy").unlink()
    (tmp_path/"run/result.json").unlink()
    with pytest.raises(CitError, match=f"unknown array 'watch-{TASKS[1]}'"): resume(tmp_path/"run")


def test_an_older_folder_goes_on(tmp_path):
    "Probes were part of what was asked and of the configuration."
    stopped(tmp_path/"run", **PARTS, **ON)
    file = tmp_path/"run/run.json"
    run = json.loads(file.read_text())
    watch = run.pop("watch")
    for part in ("asked", "config"): run[part]["watch"] = watch
    file.write_text(json.dumps(run))
    got = resume(tmp_path/"run")
    assert got.finished and got.events() == train(tmp_path/"whole", **PARTS, **ON).rec.events()


def test_a_run_without_a_word_goes_on_as_its_folder_says(tmp_path):
    stopped(tmp_path/"run", **PARTS, **ON)
    assert train(tmp_path/"run", **PARTS).rec.events() == train(tmp_path/"whole", **PARTS, **ON).rec.events()


def test_watched_where_a_run_is_started_to_be_watched(tmp_path, monkeypatch):
    "`launch` and `cit run` probe, unless they are asked not to; `train` does not."
    monkeypatch.setattr("cit_workbench.live.launch.start", lambda folder, prepare: prepare())
    how = lambda name, **fields: (tiny(tmp_path/name, **fields).launch(), watch_of(tmp_path/name))[1]
    assert how("a") == {"every": 10, "full": 200, "rows": 4, "share": .03}
    assert how("b", watch={"every": 0}) == {} and how("c", watch={"rows": 5})["rows"] == 5 and how("d", **ON) == ON["watch"]
    assert how("d") == ON["watch"]  # as its folder says
    assert train(tmp_path/"e").rec.events("watch") == []
    seen = []
    monkeypatch.setattr(Run, "train", lambda run: seen.append(run.probes().get("watch", {}).get("every")) or SimpleNamespace(_repr_markdown_=str, path=""))
    for watch in ({}, {"every": 0}, {"every": 7}): cli.run(watch=watch, out=str(tmp_path/"cli"))
    assert seen == [10, None, 7]


@pytest.mark.parametrize("watch, said", [({"every": -1}, "'every' is -1"), ({"rows": 2}, "at least 3"), ({"step": 1}, "unknown field"), ({"share": 1.}, "below 1"), ({"every": 2.5}, "whole number")])
def test_a_wrong_field_is_one_sentence(watch, said):
    with pytest.raises(CitError, match=said): Run(watch=watch)


def test_probes_within_a_share(tmp_path, finished):
    "Light probes go until the rest fits, the same ones after a stop, and the result is the run's own."
    fields = {"optim": {"steps": 40, "batch": 8}, "stream_args": {"tasks": TASKS[:2]}, "compute": {"save_every": 16}}
    most = {"watch": {"every": 8, "full": 0, "rows": 3, "share": .07}}
    with pytest.MonkeyPatch.context() as mp:
        unplug(mp, Held, "one_step", 60)
        with pytest.raises(Stop): train(tmp_path/"run", **fields, **most)
    got, every = train(tmp_path/"run", **fields, **most), [0, 1, 2, 4, 8, 16, 24, 32, 40]
    steps = {t: [e["step"] for e in got.rec.events("watch") if e["task"] == t] for t in TASKS[:2]}
    assert steps[TASKS[0]] == every and steps[TASKS[1]] == [0, 8, 32, 40]
    assert bare(got.folder) == bare(finished("finetune", **fields).folder)


# What is written

@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return train(tmp_path_factory.mktemp("watched")/"run", "er", stream_args={"n_val": 4}, **ON)


def test_when(watched):
    events = watched.rec.events("watch")
    steps = [0, 1, 2, 4]
    assert [(e["task"], e["step"], e["global"]) for e in events] == [(t, s, 4*k + s) for k, t in enumerate(TASKS) for s in steps]
    assert [e["phase"] for e in events] == ["begin", "tune", "tune", "end"]*3
    for e in events: assert [*e["tasks"]] == sorted(TASKS[:TASKS.index(e["task"]) + 1])


def test_what(watched):
    for e in watched.rec.events("watch"):
        for name, t in e["tasks"].items():
            old, full = name != e["task"], e["phase"] == "end"
            assert t["nll"] > 0 and isinstance(t["nll"], float)
            for k in LAYERED: assert (len(t[k]) == 4 if old else t[k] is None), k
            for k in ("valid", "formatted", "answers"): assert (t[k] is not None) == full, k
            assert (t["grad_cos"] is not None) == (old and full)
            if full: assert len(t["answers"]) == 3 and all({*who} <= {*TASKS} for _, who in t["answers"])
            if full and old: assert -1 <= t["grad_cos"] <= 1 and len(t["grad_cos_layers"]) == 4


def test_own_end_is_where_drift_begins(watched):
    "At the begin of the next task nothing has moved; a step later it has."
    begin, step = [e for e in watched.rec.events("watch") if e["task"] == TASKS[1]][:2]
    assert max(begin["tasks"][TASKS[0]]["drift"]) < 1e-5 < 1e-3 < step["tasks"][TASKS[0]]["drift"][-1]
    assert min(begin["tasks"][TASKS[0]]["cka"]) > 1 - 1e-5
    assert watched.rec.array(f"watch-{TASKS[0]}").shape[:2] == (4, 3)


def test_loss_and_gradient_by_hand(tmp_path, watched):
    "Against a row at a time with the model's own loss."
    net, last = watched.net, watched.rec.events("watch")[-1]["tasks"]
    w = Watcher(watched, net, None, {"stage": "end"})
    grads = {}
    net.model.eval()
    for name in TASKS:
        rows = [net.rows([r], "val") for r in w.refs(name)]
        totals = {0: sum(b.counts()[0] for b in rows)}
        loss = 0.
        for b in rows:
            with at(net.method.route(net, replace(b, totals=totals))) as b: loss = loss + net.forward(b).loss
        grads[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.params.values()))])
        assert last[name]["nll"] == pytest.approx(float(loss.detach()), rel=1e-3)
    for name in TASKS[:2]:
        cos = float(torch.nn.functional.cosine_similarity(grads[name], grads[TASKS[2]], dim=0))
        assert last[name]["grad_cos"] == pytest.approx(cos, abs=1e-3)


def test_answers_are_those_of_an_evaluation(watched):
    net, last = watched.net, watched.rec.events("watch")[-1]["tasks"]
    w = Watcher(watched, net, None, {"stage": "end"})
    for name in TASKS:
        lines = [l for _, l in sorted(ask(net, w.refs(name), "val").items())]
        assert [text for text, _ in last[name]["answers"]] == [l["text"] for l in lines]
        for k, of in (("formatted", "formatted"), ("valid", "valid"), ("choice", "content")):
            assert last[name][k] == pytest.approx(100*np.mean([l["metadata"][of] for l in lines]))
        for text, who in last[name]["answers"]: assert (name in who) == watched.data.task(name).format.valid(text)


def test_courses_for_pictures(tmp_path, watched):
    courses, bounds = watched.rec.watched()
    assert [*courses] == TASKS and bounds == {t: (4*k, 4*k + 4) for k, t in enumerate(TASKS)}
    first = courses[TASKS[0]]
    assert first["drift"].shape == (12, 4) and np.isnan(first["drift"][:4]).all() and not np.isnan(first["drift"][4:]).any()
    assert first["nll"].shape == (12,) and np.isfinite(first["grad_cos"]).sum() == 2
    packed = Record(pack(watched.folder, tmp_path/"packed.jsonl")).watched()
    np.testing.assert_equal(packed, (courses, bounds))


def test_numbers_are_short(watched):
    line = json.dumps(watched.rec.events("watch")[-1]["tasks"][TASKS[0]]["drift"])
    assert all(len(x.strip(" []").replace(".", "").lstrip("0")) <= 5 + 4*("e" in x) for x in line.split(","))


# Merged tasks, other phases

def test_joint(tmp_path):
    "All tasks of the stream at once: their states become their own at the end, and there is nothing to drift from before."
    rec = train(tmp_path/"run", "joint", **ON).rec
    events = rec.events("watch")
    assert {e["task"] for e in events} == {"joint"} and all(sorted(e["tasks"]) == sorted(TASKS) for e in events)
    assert all(t["drift"] is None for e in events for t in e["tasks"].values())
    assert all(t["grad_cos"] is not None for t in events[-1]["tasks"].values())
    assert [e["step"] for e in events] == [0, 1, 2, 4, 6, 8, 10, 12]
    assert rec.array(f"watch-{TASKS[2]}").shape[:2] == (4, 2)


def test_phase_without_the_language_model(tmp_path):
    "Three steps of keys, four of LoRA: one axis of steps; keys that no forward reaches have no gradient to compare."
    events = train(tmp_path/"run", Keys, **ON).rec.events("watch")
    second = [e for e in events if e["task"] == TASKS[1]]
    assert [(e["phase"], e["step"]) for e in second] == [("begin", 0), ("keys", 1), ("keys", 2), ("tune", 4), ("tune", 6), ("end", 7)]


# A kill

@pytest.mark.parametrize("method, hook, nth", [("er+ewc", "one_step", 4), ("er+ewc", "one_step", 8), ("smolora", "one_step", 10), ("er+ewc", "row", 3), (Keys, "one_step", 11)])
def test_a_resumed_run_sees_the_same(tmp_path, monkeypatch, method, hook, nth):
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"cache"))
    fields = {"compute": {"save_every": 3}, "stream_args": {"tasks": TASKS[:2]}, "optim": {"steps": 5}, **ON}
    with pytest.MonkeyPatch.context() as mp:
        unplug(mp, Held, hook, nth)
        with pytest.raises(Stop): train(tmp_path/"run", method, **fields)
    got, want = train(tmp_path/"run", method, **fields), train(tmp_path/"whole", method, **fields)
    assert got.rec.events() == want.rec.events()
    same_tensors(final(got.folder), final(want.folder))
    for name in TASKS[:2]: np.testing.assert_array_equal(got.rec.array(f"watch-{name}"), want.rec.array(f"watch-{name}"))


def test_states_are_on_the_disk_before_the_checkpoint_that_needs_them(tmp_path, monkeypatch):
    fields = {"stream_args": {"tasks": TASKS[:2]}, **ON}
    with pytest.MonkeyPatch.context() as mp:
        unplug(mp, Held, "row", 2)
        with pytest.raises(Stop): train(tmp_path/"run", **fields)
    file = tmp_path/"run"/"arrays"/f"watch-{TASKS[0]}.npy"
    data = file.read_bytes()
    file.write_bytes(data[:50])
    with pytest.raises(CitError, match=f"watch-{TASKS[0]} of .* cannot be read"): tiny(tmp_path/"run", **fields).train()
    file.write_bytes(data)
    assert resume(tmp_path/"run").finished


# Several processes

def one_of_two(out, method):
    torch.set_num_threads(1)
    rec = tiny(out, method, stream_args={"tasks": TASKS[:2]}, **ON).train()
    return rec is not None


@pytest.mark.parametrize("method", ["er+ewc", "moelora"])
def test_the_first_process_probes(tmp_path, fork, method):
    plain = {"stream_args": {"tasks": TASKS[:2]}}
    assert fork.world(2, one_of_two, tmp_path/"two", method) == [True, False]
    two, one = Record(tmp_path/"two"), train(tmp_path/"one", method, **plain, **ON).rec
    assert [(e["task"], e["step"]) for e in two.events("watch")] == [(e["task"], e["step"]) for e in one.events("watch")]
    assert two.events("watch")[0]["tasks"] == one.events("watch")[0]["tasks"]


@pytest.mark.parametrize("watched", [True, False])
def test_a_branch_goes_on_watching(watched, tmp_path):
    "A branch has the states that its parent kept; of a parent that was not watched there are none, and drift is not known."
    rec = tiny(tmp_path/"parent", "finetune", **({"watch": {"every": 2, "rows": 3, "share": 0.}} if watched else {})).train()
    new = branch(rec, at=TASKS[0], out=str(tmp_path/"branch"), watch={"every": 2, "rows": 3, "share": 0.}, optim={"lr": 1e-3})
    last = new.train().events("watch")[-1]["tasks"]
    assert (last[TASKS[0]]["drift"] is not None) == watched and last[TASKS[1]]["drift"] is not None
