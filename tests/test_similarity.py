"What is measured about tasks: measuring changes nothing, soft prompts and missing images are counted right, branches are exact."
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ARGS, SPEC, TASKS, batch_of, jitter, opened, same_files, tiny, train

from cit_workbench.training.checkpoint import read_checkpoint
from cit_workbench.core.errors import CitError
from cit_workbench.contract.memory import join_tree
from cit_workbench.record.record import Record
from cit_workbench.measure.forgetting import pair_matrices, read_pairs
from cit_workbench.measure.overlap import subspace_overlap
from cit_workbench.experiments.pairs import pairwise
from cit_workbench.measure.crowding import crowding
from cit_workbench.measure.moments import Moments, eigen
from cit_workbench.data.stream import get_stream
from cit_workbench.training.train import Run
from cit_workbench.measure.collect import observe, observe_gradients
from cit_workbench.measure.samples import gather
from cit_workbench.measure.store import state_key
from cit_workbench.measure.tokens import token_states


def test_pictures_of_similarity_never_import_torch():
    code = "from cit_workbench.measure import similarity; from cit_workbench.measure import spectra; import sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_measuring_leaves_a_net_as_it_was(tmp_path):
    net = opened(tmp_path/"x").net
    jitter(net)
    net.model.train()
    before = state_key(net), list(net.seen), set(net.observed), net.extra_forwards, net.clock, {n: p.grad for n, p in net.params.items()}
    got = observe(net, TASKS[:2], 16, [1], gradients=True)
    assert before == (state_key(net), net.seen, net.observed, net.extra_forwards, net.clock, {n: p.grad for n, p in net.params.items()})
    assert net.model.training and not any(m._forward_hooks for m in net.backbone.lm.layers)
    assert got["gradient/all/cosine"].shape == got["importance/overlap"].shape == (2, 2)
    assert all(np.isfinite(a).all() for a in got.values())


def test_a_task_unseen_stays_unseen_after_a_failed_measurement(tmp_path):
    net = opened(tmp_path/"x").net
    seen = list(net.seen)
    with pytest.raises(CitError): observe_gradients(net, ["nothing"], 8)
    assert net.seen == seen


def test_tuning_moves_hidden_layers_and_no_input(tmp_path):
    net = opened(tmp_path/"x").net
    before = observe(net, TASKS[:2], 8, [2])
    jitter(net)
    after = observe(net, TASKS[:2], 8, [2])
    moved = {p for p in ("tower/visual", "input/visual", "input/instruction", "input/answer", "layer 2/visual", "layer 2/answer")
             if not np.allclose(before[f"{p}/raw/values"], after[f"{p}/raw/values"], rtol=1e-4)}
    assert moved == {"layer 2/visual", "layer 2/answer"}


def test_soft_prompts_do_not_shift_what_is_measured(tmp_path):
    net = train(tmp_path/"x", "fwd_prompt").net
    assert net.method.route(net, batch_of(net, TASKS[0], 2)).prefix is not None
    plain = opened(tmp_path/"y").net
    refs = [(TASKS[0], 0), (TASKS[1], 3)]
    with_prompt, without = token_states(net, refs, layers=[1]), token_states(plain, refs, layers=[1])
    for place in ("input/visual", "input/instruction", "input/answer"):
        np.testing.assert_array_equal(with_prompt[place][0], without[place][0])
        np.testing.assert_array_equal(with_prompt[place][1], without[place][1])
    assert np.abs(with_prompt["layer 1/answer"][0] - without["layer 1/answer"][0]).max() > 1e-3


def test_rows_without_an_image_are_measured_by_their_text(tmp_path):
    net = opened(tmp_path/"x").net
    task, half = net.stream.task(TASKS[0]), lambda make: lambda s, i: (lambda e: e if i//6 % 2 else replace(e, image=None))(make(s, i))
    mixed = replace(task, make=half(task.make), name="mixed")
    blind = replace(task, make=lambda s, i: replace(task.make(s, i), image=None), name="blind")
    net.examples.plan = net.examples.stream = replace(net.stream, tasks=[task, mixed, blind])
    pooled, moments = gather(net, "mixed", 16)
    assert len(pooled["input/instruction"]) == 16 and len(pooled["input/visual"]) == 8
    assert sum(m.n for m in moments["input/visual"][0]) == 8*net.backbone.n_vis
    got = observe(net, [task.name, "mixed", "blind"], 16)
    assert "input/instruction/cosine" in got and "input/visual/cosine" not in got
    assert "input/visual/cosine" in observe(net, [task.name, "mixed"], 16)


@pytest.mark.parametrize("method", ["finetune", "ewc", "fwd_prompt"])
def test_a_branch_ends_with_the_bits_of_a_whole_run(tmp_path, method):
    fields = {**{k: v for k, v in SPEC.items() if k != "stream_args"}, "method": method, "method_args": ARGS.get(method, {})}
    args = {k: v for k, v in SPEC["stream_args"].items() if k != "tasks"}
    got = pairwise("shapes", tmp_path/"p", TASKS, args, say=lambda line: None, **fields)
    _, b, c = TASKS  # the one in the middle is held in elsewhere: only its own pairs share their held-in tasks
    whole = tiny(tmp_path/"whole", method, stream_args={"tasks": [b, c]})
    whole.train()
    same_files(tmp_path/"p"/f"{b}--{c}", whole.folder)
    ends = sorted(f.parent.parent.parent.name for f in tmp_path.glob("p/*/checkpoints/001-y-trained/state.json"))
    assert ends == ([] if method == "finetune" else [f"{i}--{j}" for i, j in sorted(permutations(TASKS, 2)) if (i, j) != (b, c)])
    tasks, scores = read_pairs(tmp_path/"p"/"pairs.json")
    np.testing.assert_equal(pair_matrices(scores, tasks), (got["F"], got["T"]))
    assert scores[b, c] == dict(zip((b, c), whole.train().core()[1]))


def test_pairs_go_on_where_they_stopped(tmp_path, monkeypatch):
    fields = {k: v for k, v in SPEC.items() if k != "stream_args"}
    tasks = ["col-word", "col-mcq", "col-night"]
    args, said = {k: v for k, v in SPEC["stream_args"].items() if k != "tasks"}, []
    real, calls = Run.train, []

    def some(self):
        calls.append(self)
        if len(calls) > 4: raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Run, "train", some)
    with pytest.raises(KeyboardInterrupt): pairwise("shapes", tmp_path, tasks, args, say=said.append, **fields)
    monkeypatch.setattr(Run, "train", real)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")}
    assert 0 < len(kept) < 6
    got = pairwise("shapes", tmp_path, tasks, args, say=said.append, **fields)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()) and np.isfinite(got["F"]).sum() == 6
    assert said[0].startswith("9 of 9 stages") and not said[1].startswith("9 of 9")


def test_conflict_is_what_the_method_itself_records(tmp_path):
    run = train(tmp_path/"x", "fwd_prompt", stream_args={"tasks": TASKS[:2]})
    first = read_checkpoint(Path(run.folder)/"checkpoints"/"001-z-end")
    mem = join_tree(first["mem"], first["tensors"], torch.device("cpu"))
    now = run.net.method.mem
    assert now["conflict"] == pytest.approx(subspace_overlap(mem["old"].numpy(), mem["pre"].numpy()))
    assert now["residual"] == mem["old"].shape[0] - mem["old"].shape[1]


def test_old_space_grows_as_the_method_grows_it():
    g = np.random.default_rng(0)
    ms = [Moments(10).add(g.normal(size=(50, 10))*g.permutation(np.linspace(3, .01, 10))) for _ in range(4)]
    got = crowding(ms, .8)
    assert [c["old"] for c in got] == sorted(c["old"] for c in got) and got[0]["old"] == 0
    for m, c in zip(ms, got):
        values = eigen(m)[0]
        assert c["k"] == int((values.cumsum() < .8*values.sum()).sum()) + 1


def test_pairs_of_record_are_whole():
    "Every task of the stream once, every ordered pair of them, percent."
    tasks, scores = read_pairs(Path(__file__).parents[1]/"records"/"pairs"/"shapes-finetune.json")
    assert sorted(tasks) == sorted(t.name for t in get_stream("shapes"))
    assert {k for k in scores if isinstance(k, tuple)} == {*permutations(tasks, 2)}
    assert all(0 <= v <= 100 for s in scores.values() for v in s.values())
    F, T = pair_matrices(scores, tasks)
    i, j = tasks.index("col-word"), tasks.index("box")
    assert F[i, j] == scores["col-word"]["col-word"] - scores["col-word", "box"]["col-word"]
    assert T[i, j] == scores["col-word", "box"]["box"] - scores["box"]["box"]
    assert np.isfinite(F).sum() == np.isfinite(T).sum() == 56


def test_pairs_may_be_watched(tmp_path):
    "The second stage compares with the states at the end of the first, which it took over."
    fields = {k: v for k, v in SPEC.items() if k != "stream_args"}
    args = {k: v for k, v in SPEC["stream_args"].items() if k != "tasks"}
    pairwise("shapes", tmp_path, TASKS, args, say=lambda line: None, watch={"every": 2, "rows": 3, "share": 0.}, **fields)
    for i, j in permutations(TASKS, 2):
        events = Record(tmp_path/f"{i}--{j}").events("watch")
        assert [e["task"] for e in events] == [i]*4 + [j]*4
        assert max(events[4]["tasks"][i]["drift"]) < 1e-4 < events[-1]["tasks"][i]["drift"][-1]
