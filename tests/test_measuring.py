"Tasks are measured once, by a process of low priority; what it keeps is what `collect` gives, and fits one start and stream."
import json
from types import SimpleNamespace

import numpy as np
import pytest

from cit_workbench.core.paths import cache_dir
from cit_workbench.contract.examples import Examples
from cit_workbench.measure.collect import collect
from cit_workbench.live.measuring import Measuring, log_of, measured_by
from cit_workbench.views.measured import Measures, collected_for
from cit_workbench.measure.collected import read_collected

ARGS = {"tasks": ["col-word", "cap-day"], "n_train": 96, "n_val": 8, "n_test": 8}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"cache"))
    config = {"backbone": "tiny-instruct", "stream": "shapes", "stream_args": ARGS}
    return SimpleNamespace(config=config, tasks=ARGS["tasks"], run={})


def same(a, b):
    assert a.arrays.keys() == b.arrays.keys()
    for k in a.arrays: np.testing.assert_array_equal(a.arrays[k], b.arrays[k])


def test_two_at_once_measure_once(run, tmp_path):
    "The second waits for the first and finds everything; the numbers are those of `collect`, with all images seen or only the samples'."
    both = [Measuring(run), Measuring(run)]
    for m in both: m.process.wait(600)
    assert [m.failed() for m in both] == ["", ""] and all(m.over() for m in both)
    steps = log_of(measured_by(run)).read_text().splitlines()
    assert steps == ["measuring task 1 of 2", "measuring task 2 of 2"]
    path, = (cache_dir()/"collected").glob("*.npz")
    assert collected_for(run, [path.parent]) == [path]
    kept = read_collected(path)
    same(kept, collect(stream_args=ARGS, folder=tmp_path/"again"))
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(Examples, "__setattr__", lambda net, k, v: None if k == "roomy" else object.__setattr__(net, k, v))
        same(kept, collect(stream_args=ARGS, folder=tmp_path/"all"))


@pytest.mark.parametrize("change, fits", [
    ({}, True), ({"stream_args": {**ARGS, "tasks": ["cap-day"]}}, True), ({"stream_args": {**ARGS, "n_train": 32}}, False),
    ({"stream": "shapes-b1"}, False), ({"backbone": "the same weights elsewhere"}, True), ({"compute": {"four_bit": True}}, True),
    ({"compute": {"four_bit": True}, "backbone": "tiny-base"}, False)])
def test_what_was_measured_fits_one_start_and_stream(run, tmp_path, change, fits):
    about = {"backbone": "tiny-instruct", "start": "a", "stream": "shapes", "stream_args": ARGS, "tasks": ARGS["tasks"]}
    np.savez(tmp_path/"x.npz", about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    config = {**run.config, **change}
    tasks = config["stream_args"]["tasks"]
    other = "b" if "compute" in change else "a"  # held in 4 bits, the same weights have another digest
    rec = SimpleNamespace(config=config, tasks=tasks, run={"hashes": {"weights": other}})
    assert bool(collected_for(rec, [tmp_path])) == fits
    if "compute" in change: return
    changed = SimpleNamespace(config=config, tasks=tasks, run={"hashes": {"weights": "b"}})
    assert collected_for(changed, [tmp_path]) == []


@pytest.mark.parametrize("named", ["content", "place"])
def test_a_run_started_elsewhere_is_measured_where_its_data_are(run, tmp_path, monkeypatch, named):
    "Names of a run hold from where it was started; what was measured under another spelling of them fits it."
    (tmp_path/"there/images").mkdir(parents=True)
    (tmp_path/"there/start").mkdir()
    (tmp_path/"other").mkdir()
    monkeypatch.chdir(tmp_path/"other")
    config = {"backbone": "start", "stream": "coin:images", "stream_args": {}}
    rec = SimpleNamespace(config=config, tasks=["a"], run={"cwd": str(tmp_path/"there"), "hashes": {"data": "d"}})
    what = measured_by(rec)
    assert what == {"backbone": str(tmp_path/"there/start"), "stream": f"coin:{tmp_path}/there/images", "stream_args": {}}
    about = {**what, "tasks": ["a"], "data": "d"}
    if named == "content": about["stream"] = "coin:../there/images"
    else: rec.run["hashes"] = {}
    np.savez(tmp_path/"x.npz", about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    assert collected_for(rec, [tmp_path])
    rec.run["cwd"] = str(tmp_path)
    assert not collected_for(rec, [tmp_path])


def test_measures_of_something_else_do_not_begin_again():
    "A process that ends well and leaves nothing that fits is not started once more."
    over = SimpleNamespace(failed=lambda: "", over=lambda: True)
    measures = SimpleNamespace(begin=lambda rec: over, file=lambda rec: None)
    assert "the same names have changed" in Measures.awaited(measures, None)
    measures.file = lambda rec: "x.npz"
    assert Measures.awaited(measures, None) == ""


def test_what_cannot_be_measured_is_a_sentence(run):
    run.config["stream_args"] = {"tasks": ["col-word"], "n_train": 4}
    few = Measuring(run)
    few.process.wait(600)
    assert "at least 8 are needed" in few.failed()
    run.config["backbone"] = "tiny-instrct"
    lost = Measuring(run)
    lost.process.wait(600)
    assert lost.failed().startswith("unknown backbone 'tiny-instrct'")



def test_measures_of_an_earlier_version_are_not_taken_for_todays(tmp_path, monkeypatch):
    "Code that reads data or models otherwise measures anew; code that trains otherwise does not."
    from cit_workbench import behaviour
    from cit_workbench.measure import collect as module
    asked = []
    monkeypatch.setattr(module, "observe", lambda *args: asked.append(1) or {"x": np.zeros(1)})
    again = lambda: module.collect(stream_args=ARGS, folder=tmp_path)
    again()
    monkeypatch.setitem(behaviour.VERSIONS, "training", behaviour.VERSIONS["training"] + 1)
    assert again().about["made_by"]["rooms"]["models"] == behaviour.VERSIONS["models"] and len(asked) == 1
    monkeypatch.setitem(behaviour.VERSIONS, "models", behaviour.VERSIONS["models"] + 1)
    again()
    assert len(asked) == 2
