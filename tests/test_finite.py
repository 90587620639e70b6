"A number that is not finite stops a run before it reaches the weights, a checkpoint or the record; as a field it is refused."
import math
from dataclasses import dataclass

import pytest
import torch
from tiny import TASKS, Held, Twins, tiny, train

from cit_workbench.training.checkpoint import checkpoints, read_checkpoint
from cit_workbench.cli import main
from cit_workbench.core.errors import CitError
from cit_workbench.core.fields import check_finite
from cit_workbench.contract.method import Method
from cit_workbench.methods.ewc import EWC
from cit_workbench.record.record import Record
from cit_workbench.training.train import Run

TWO = {"stream_args": {"tasks": TASKS[:2]}}
OVERFLOWS = {
    "rate": dict(optim={"lr": 1e20, "steps": 12, "clip": 0.}),
    "decay": dict(optim={"lr": 1e10, "weight_decay": 1e10, "steps": 12}),
    "float16": dict(optim={"lr": 1e4, "steps": 12, "clip": 0.}, compute={"dtype": "float16"}),
    "strength": dict(method="ewc", method_args={"lam": 1e300}),
    "large strength": dict(method="ewc", method_args={"lam": 1e30}, optim={"lr": 1.}),
    "optimiser": dict(optim={"lr": 1e38}),
}


@dataclass
class Bad(Method):
    "Becomes NaN or infinite in one place, at the third step of the second task."
    where: str = "added"
    value: str = "nan"

    def now(self, net): return net.clock[:1] == (TASKS[1],) and net.clock[2] == 2

    def loss(self, net, batch, out):
        p = next(iter(net.params.values()))
        if not self.now(net): return 0.*p.sum()
        if self.where == "constant": return torch.tensor(float(self.value))
        if self.where == "last micro-batch" and net.clock[3] == 0: return 0.*p.sum()
        return float(self.value)*p.sum() if self.where in ("added", "last micro-batch") else 0.*p.sum()

    def grads(self, net, s):
        if self.where == "gradient" and self.now(net): next(iter(net.params.values())).grad.view(-1)[0] = float(self.value)

    def update(self, net, s):
        if self.where == "weights" and self.now(net):
            with torch.no_grad(): next(iter(net.params.values())).view(-1)[0] = float(self.value)

    def end(self, net, task):
        if task.name != TASKS[1]: return
        if self.where == "memory": self.mem["importance"] = torch.tensor([1., float(self.value)])
        if self.where == "plain memory": self.mem["scale"] = float(self.value)


@dataclass
class Lonely(Method):
    "An added term that is NaN on the last process only, and reaches no gradient."
    def loss(self, net, batch, out):
        return torch.tensor(math.nan) if net.rank == net.world - 1 and net.clock[2] == 1 else 0.


def all_finite(folder):
    "Every checkpoint and every line of the record holds finite numbers only."
    for path in checkpoints(folder/"checkpoints"):
        state = read_checkpoint(path)
        for what in ("weights", "optim", "tensors"):
            assert all(bool(t.isfinite().all()) for t in state[what].values() if t.is_floating_point()), (path, what)
    for e in Record(folder).events("step"):
        assert all(e[k] is not None and math.isfinite(e[k]) for k in ("loss", "added", "grad_norm"))


def stops(out, method="finetune", **fields):
    "The sentence with which a run stops; it is not finished, and what it left is finite."
    run = tiny(out, method, **{**TWO, **fields})
    with pytest.raises(CitError) as e: run.train()
    assert not Record(run.folder).finished and not (run.folder/"result.json").exists()
    all_finite(run.folder)
    return run, str(e.value)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_overflow_stops_the_run_in_one_sentence(tmp_path, name):
    fields = dict(OVERFLOWS[name])
    run, said = stops(tmp_path/"run", **fields)
    assert "so the run stops unfinished: lower optim lr" in said and "task 'col-word'" in said or "task 'shp-mcq'" in said
    assert ("float16" in said) == (name == "float16")
    if "method" in fields: assert f"lam of ewc ({fields['method_args']['lam']:g})" in said
    with pytest.raises(CitError): tiny(tmp_path/"run", **{**TWO, **fields}).train()  # again, from the checkpoint


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["added", "constant", "gradient", "weights", "memory", "plain memory"])
def test_wherever_it_arises(tmp_path, where, value):
    run, said = stops(tmp_path/"run", Bad(where, value))
    assert f"task {TASKS[1]!r}" in said
    last = checkpoints(run.folder/"checkpoints")[-1].name
    assert last == ("002-y-trained" if "memory" in where else "001-z-end")


def test_micro_batches(tmp_path):
    _, said = stops(tmp_path/"run", Bad("last micro-batch"), optim={"accum": 2})
    assert "the added term is nan at step 2 of task 'shp-mcq'" in said


def test_the_weights_are_those_before_the_step(tmp_path, monkeypatch):
    "On a CPU the step is not taken."
    kept, step = [], Held.one_step

    def noted(self, net, *args):
        kept.append({n: p.detach().clone() for n, p in net.params.items()})
        return step(self, net, *args)
    monkeypatch.setattr(Held, "one_step", noted)
    run, _ = stops(tmp_path/"run", Bad("added"))
    assert all(torch.equal(p, kept[-1][n]) for n, p in run.net.params.items())


def test_read_one_step_later_nothing_is_written(tmp_path, monkeypatch):
    "As on a GPU, where the numbers are read when the next step counts its tokens."
    verify, waiting = Run.verify, []

    def late(self):
        "Not directly after the gradient, as on a CPU."
        if self.unread is not None and not waiting:
            waiting.append(1)
            return None
        waiting.clear()
        return verify(self)
    monkeypatch.setattr(Run, "verify", late)
    for where in ("added", "gradient"):
        for every in (0, 1):
            out = tmp_path/f"{where}-{every}"
            monkeypatch.setattr(Run, "verify", late)
            waiting.clear()
            run, said = stops(out, Bad(where), compute={"save_every": every}, probe_every=1, watch={"every": 1, "share": 0.})
            assert "at step 2 of task 'shp-mcq'" in said
            assert max(e["global"] for e in run_events(run)) <= 6


def run_events(run): return [e for e in Record(run.folder).events() if "global" in e]


def lonely(out, name):
    "What one process of two says."
    torch.set_num_threads(1)
    try: tiny(out, {"lonely": Lonely(), "added": Bad("added"), "memory": Bad("memory")}[name], **TWO).train()
    except CitError as e: return str(e)


@pytest.mark.parametrize("name, said", [
    ("lonely", "the added term is nan at step 1 of task 'col-word'"),
    ("added", "the added term is nan at step 2 of task 'shp-mcq'"),
    ("memory", "mem 'importance' holds a number that is not finite in task 'shp-mcq'")])
def test_all_processes_stop(tmp_path, fork, name, said):
    got = fork.world(2, lonely, tmp_path/"run", name)
    assert [said in g for g in got] == [True, True]
    all_finite(tmp_path/"run")
    assert not (tmp_path/"run"/"result.json").exists()


def test_bits_of_a_finite_run_are_those_of_before(tmp_path, monkeypatch):
    "Looking changes nothing."
    seen = train(tmp_path/"seen", Twins(), **TWO)
    monkeypatch.setattr(Run, "verify", lambda self: None)
    blind = train(tmp_path/"blind", Twins(), **TWO)
    assert (seen.folder/"events.jsonl").read_bytes() == (blind.folder/"events.jsonl").read_bytes()


# Fields

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
FIELDS = [("method", "lam"), ("optim", "lr"), ("optim", "clip"), ("optim", "weight_decay"), ("optim", "warmup"),
          ("tune", "alpha"), ("tune", "dropout"), ("watch", "share"), ("stream_args", "n_train")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("table, name", FIELDS)
def test_a_field_that_is_not_finite_is_refused(table, name, value):
    fields = {"method_args" if table == "method" else table: {name: value}}
    with pytest.raises(CitError, match=f"{name}' is -?(nan|inf), but must be a finite number"): Run("ewc", **fields)


@pytest.mark.parametrize("value", NOT_FINITE[:2])
def test_an_instance_and_a_list_are_looked_into(value):
    with pytest.raises(CitError, match="method 'ewc': field 'lam' is"): Run(EWC(lam=value))
    with pytest.raises(CitError, match="field 'lam' is"): Run(Twins() + EWC(lam=value))
    with pytest.raises(CitError, match="field 'a.b' is"): check_finite({"a": {"b": [1., (2., value)]}}, "x")
    check_finite({"a": {"b": [1e308, "nan", None, True, 10**300]}}, "x")


@pytest.mark.parametrize("table, name", FIELDS[:4])
def test_a_whole_number_that_no_float_holds_is_refused(table, name):
    fields = {"method_args" if table == "method" else table: {name: -10**400}}
    with pytest.raises(CitError, match=f"{name}' is -inf, but must be a finite number"): Run("ewc", **fields)


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999", "-1e999"])
def test_the_command_line_refuses_them(tmp_path, capsys, word):
    with pytest.raises(SystemExit) as e: main(["run", "--optim", f"lr={word}", "--out", str(tmp_path/"run")])
    assert e.value.code == 2 and "lr' is" in capsys.readouterr().err
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_sweep_file_is_refused_before_it_starts(tmp_path, word):
    from cit_workbench.experiments.cells import plan
    (tmp_path/"s.toml").write_text(f"[sweep]\npages = ['finetune']\n[set]\noptim = {{lr = {word}}}\n")
    with pytest.raises(CitError, match="page 'finetune': field 'optim.lr' is -?(nan|inf), but must be a finite"):
        plan(tmp_path/"s.toml", tmp_path/"out")
    (tmp_path/"s.toml").write_text(f"[sweep]\npages = ['ewc']\n[grid]\nlam = [1.0, {word}]\n")
    with pytest.raises(CitError, match="page 'ewc': field 'lam' is"): plan(tmp_path/"s.toml", tmp_path/"out")
    assert not (tmp_path/"out").exists()
