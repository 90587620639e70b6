"What every method that routes or retrieves promises: how often a task is found again is in its record and in tables."
import numpy as np
import pytest
import torch
from tiny import ARGS, MORE, TASKS, final, same_files, same_tensors, tiny, train

from cit_workbench.training.checkpoint import checkpoints
from cit_workbench.core.errors import CitError
from cit_workbench.contract.memory import split_tree
from cit_workbench.contract.method import Method, overrides
from cit_workbench.contract.net import Net
from cit_workbench.contract.registry import all_methods, get_method
from cit_workbench.record.compare import table
from cit_workbench.record.packing import pack
from cit_workbench.record.record import Record

SAYS = [m for m in all_methods() if overrides(get_method(m), "used")]
CASES = [(m, {}) for m in [*SAYS, "er+smolora", "llaca+grouping"]] + [(m, a) for m, more in MORE.items() for a in more]
CASES += [("eproj", {"routing": "random"}), ("smolora", {"pool": "released"})]
routed = pytest.mark.parametrize("name, args", CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v.values()))


CLEAR = {"eproj": {"method_args": ARGS["eproj"] | {"variant": "closed"}}} # Keys that a few steps would not train


def run_of(finished, name, args): return finished(name, **({"method_args": ARGS.get(name, {}) | args} if args else {}))


def chooses(net) -> bool:
    "Do rows take different ways? By what the route gives each, or by a router in a layer."
    told = "task_id_at_test" in net.method.leaks
    refs = [(t, i) for t in TASKS for i in range(2)]
    b = net.rows(refs, "test", answers=False, task=[t if told else None for t, _ in refs])
    out = net.method.route(net, b)
    given = [v for v in [*out.route.values(), out.prefix] if torch.is_tensor(v) and len(v) == len(refs)]
    apart = any(not torch.equal(v[0], row) for v in given for row in v)
    return apart or any(hasattr(m, "R") for m in net.model.modules())


@pytest.mark.parametrize("name", all_methods())
def test_who_chooses_says_where_rows_went(finished, name):
    run = finished(name, **CLEAR.get(name, {}))
    assert chooses(run.net) == (name in SAYS) == ("found" in run.rec.stats)


@routed
def test_the_figure_is_in_every_row_and_in_the_tables(finished, tmp_path, name, args):
    run = run_of(finished, name, args)
    rec, M = run.rec, run.rec.matrix("found")[:, :len(TASKS)]
    for t, row in enumerate(M):
        assert np.isnan(row[t:]).all() and ((0 <= row[:t]) & (row[:t] <= 100 + 1e-4)).all()
    steps, values = rec.series("found")
    assert rec.summary()["found"] == pytest.approx(M[-1].mean()) == values[-1] and len(steps) == len(TASKS)
    packed = Record(pack(run.folder, tmp_path/"packed.jsonl"))
    assert packed.summary()["found"] == rec.summary()["found"]
    shown = table([rec])
    assert "found" in shown.head and "found" in rec._repr_markdown_()


def test_methods_that_send_all_rows_the_same_way_have_no_such_column(finished):
    rec = finished("finetune").rec
    assert "found" not in table([rec]).head and "found" not in rec.stats and not rec.events("home")
    assert np.isnan(rec.summary()["found"])


def test_told_tasks_are_always_found(finished):
    assert finished("single").rec.matrix("found")[-1, :3].tolist() == [100.]*3
    told = finished("eproj", oracle=True)
    assert told.rec.matrix("found")[-1, :3].tolist() == [100.]*3


def counted(run, right) -> list:
    "Percent of all test rows of each task for which `right` holds, asked again with the label hidden."
    net, out = run.net, []
    for k, t in enumerate(TASKS):
        n = net.stream.task(t).n["test"]
        b = net.method.route(net, net.rows([(t, i) for i in range(n)], "test", answers=False, task=[None]*n))
        out.append(100*torch.stack([right(net, b, j, k) for j in range(n)]).float().mean().item())
    return out


def test_found_is_what_a_recount_gives(finished):
    "The projector's number, the group's slot, the share of a block, each written out."
    many = {"stream_args": {"n_test": 8}}
    own = {"eproj": lambda net, b, j, k: b.route["expert"][j] == k,
           "grouping": lambda net, b, j, k: b.route["slot"][j] == net.method.mem["of"][TASKS[k]],
           "continual_llava": lambda net, b, j, k: b.route["pool"][j, 8*k:8*k + 8].sum()}
    for name, right in own.items():
        run = finished(name, **many, **CLEAR.get(name, {}))
        assert run.rec.matrix("found")[-1, :3] == pytest.approx(counted(run, right), abs=1e-3), name
    drawn = {"method_args": CLEAR["eproj"]["method_args"] | {"routing": "random"}}
    lottery = finished("eproj", **drawn, **many)
    assert lottery.rec.matrix("found")[-1, :3] == pytest.approx(counted(lottery, own["eproj"]), abs=1e-3)
    assert lottery.rec.summary()["found"] < 80 < finished("eproj", **CLEAR["eproj"], **many).rec.summary()["found"]


def test_the_prompts_that_training_used_most(finished):
    "The five of ten that most training rows chose, counted from the selection itself."
    run = finished("l2p")
    net, home = run.net, run.rec.events("home")[-1]
    assert home["task"] == TASKS[-1] and len(home["places"]["prompts"][0]) == 5
    refs = [(TASKS[-1], i*96//32) for i in range(32)]
    chosen = net.method.route(net, net.rows(refs, task=[TASKS[-1]]*32)).route["chosen"]
    counts = torch.bincount(chosen.flatten(), minlength=10)
    assert counts[home["places"]["prompts"][0]].sum() == counts.topk(5).values.sum()


@pytest.mark.parametrize("name", ["smolora", "fwd_prompt"])
def test_measuring_changes_nothing(finished, tmp_path, monkeypatch, name):
    run = finished(name)
    kind = type(run.net.method)
    monkeypatch.delattr(kind, "used")
    bare = train(tmp_path/"run", name)
    same_tensors(final(run.folder), final(bare.folder))
    same_tensors(final(run.folder, "mem"), final(bare.folder, "mem"))
    assert run.rec.events("step") == bare.rec.events("step") and run.rec.events("end") == bare.rec.events("end")
    assert np.array_equal(run.rec.R, bare.rec.R, equal_nan=True) and run.rec.leaks == bare.rec.leaks
    said = [[a["text"] for a in r.rec.answers(3, t)] for r in (run, bare) for t in TASKS]
    assert said[:3] == said[3:]
    assert "found" in run.rec.stats and "found" not in bare.rec.stats


@pytest.mark.parametrize("name", [m for m in SAYS if "task_id_at_test" not in get_method(m).leaks])
def test_the_label_reaches_no_route_at_test(tmp_path, monkeypatch, name):
    seen, went = [], Net.went

    def spied(self, refs, split="test", told=False, training=False):
        seen.append((split, told, training, {t for t, _ in refs}, self.task))
        return went(self, refs, split, told, training)
    monkeypatch.setattr(Net, "went", spied)
    run = train(tmp_path/"run", name, optim={"steps": 2})
    asked = [s for s in seen if s[0] == "test"]
    assert len(asked) == 1 + 2 + 3 and not any(told or training for _, told, training, *_ in asked)
    homes = [s for s in seen if s[0] == "train"]
    assert [(names, now) for *_, names, now in homes] == [({t}, t) for t in TASKS]
    assert "task_id_at_test" not in run.rec.leaks and "val_of_old_tasks" not in run.rec.leaks


@pytest.mark.parametrize("name", SAYS)
def test_running_statistics_are_exact_and_nobody_trains_them(tmp_path, monkeypatch, name):
    "Float32 or whole numbers also where the model is in bfloat16; no parameter, and in no optimiser."
    trained, make = set(), torch.optim.AdamW

    def noted(groups, **kw):
        trained.update(p.data_ptr() for g in groups for p in g["params"])
        return make(groups, **kw)
    monkeypatch.setattr(torch.optim, "AdamW", noted)
    two = {"stream_args": {"tasks": TASKS[:2]}, "optim": {"steps": 2}}
    run = train(tmp_path/"run", name, compute={"dtype": "bfloat16"}, **two)
    net, kept = run.net, split_tree(run.net.method.mem)[1]
    assert net.backbone.dtype == torch.bfloat16 and trained
    parameters = {p.data_ptr() for p in net.model.parameters()}
    for k, v in tensors_of(net.method.mem).items():
        assert v.dtype in (torch.float32, torch.float64, torch.int64, torch.bool), k
        assert not isinstance(v, torch.nn.Parameter) and not v.requires_grad
        assert v.data_ptr() not in parameters | trained, k
    assert len(kept) == len(tensors_of(net.method.mem))
    own = {id(m) for n, m in net.model.named_modules() if any(id(p) not in net.start for p in m.parameters(False))}
    buffers = [b for m in net.model.modules() if id(m) in own for b in m.buffers(False)]
    assert all(b.dtype in (torch.float32, torch.int64) for b in buffers)
    assert ((0 <= run.rec.matrix("found")[2, :2]) & (run.rec.matrix("found")[2, :2] <= 100 + 1e-4)).all()


def tensors_of(tree, at="") -> dict:
    "The tensors of a memory by their place."
    if torch.is_tensor(tree): return {at: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for i, x in pairs for k, v in tensors_of(x, f"{at}/{i}").items()}


@pytest.mark.parametrize("name, after", [("eproj", 5), ("smolora", 3)])
def test_where_tasks_are_at_home_outlives_a_kill(finished, tmp_path, name, after):
    often = {"compute": {"save_every": 2}}
    whole = finished(name, **often)
    run = tiny(tmp_path/"run", name, **often)
    step, seen = type(run).one_step, []

    def stop(net, opt, task, *rest):
        seen.append(task.name)
        if seen.count(TASKS[2]) > after: raise KeyboardInterrupt
        return step(run, net, opt, task, *rest)
    run.one_step = stop
    try: run.train()
    except KeyboardInterrupt: pass
    assert checkpoints(run.folder/"checkpoints")[-1].name.startswith("003-")
    again = train(tmp_path/"run", name, **often)
    same_files(again.folder, whole.folder)
    assert len(again.rec.events("home")) == 3


def test_a_method_of_ones_own_says_it_too(tmp_path):
    "Rows of even number go to one place, of odd number to another; training used both alike, so half is found."
    class Parity(Method):
        def used(self, net, batch):
            place = torch.tensor([i % 2 for _, i in batch.refs])
            return {"place": torch.nn.functional.one_hot(place, 2)[:, None]}
    one = {"stream_args": {"tasks": TASKS[:1], "n_test": 8}, "optim": {"steps": 2}}
    assert train(tmp_path/"run", Parity(), **one).rec.summary()["found"] == 50.


def test_a_score_that_no_row_has_is_named(finished):
    with pytest.raises(CitError, match="found"): finished("finetune").rec.matrix("found")
