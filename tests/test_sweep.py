"Sweeps: wrong parameters stop before anything starts, finished cells never run again, a failure spoils its own cell."
import json
from pathlib import Path

import pytest

from cit_workbench.cli import main
from cit_workbench.core.errors import CitError
from cit_workbench.experiments.sweep import sweep
from cit_workbench.experiments.cells import plan
from cit_workbench.experiments.pages import code_cells, find_page, page_parameters, pages_dir

COMMON = {"stream", "stream_args", "backbone", "tune", "optim", "compute", "order", "seed", "tuned_on", "plus", "out"}
pages = sorted(p.stem for p in pages_dir().glob("*.ipynb"))


def cell(source, *tags):
    return {"id": f"c{len(source)}", "cell_type": "code", "source": source, "metadata": {"tags": list(tags)},
            "outputs": [], "execution_count": None}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A page that counts how often it ran, and a sweep file over it."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIT_QUIET", "1")
    run = ("import json, pathlib\np = pathlib.Path(out); p.mkdir(parents=True, exist_ok=True)\n"
           "with open('ran.txt', 'a') as f: f.write(f'{lam}\\n')\n"
           "if lam > 9: raise ValueError('lam is too large')\n"
           "(p/'result.json').write_text(json.dumps({'lam': lam}))")
    cells = [cell("seed = 0\nlam = 1.\nout = 'runs/toy'", "parameters"), cell("#| export\ndef f(x): return x"),
             cell("raise RuntimeError('lesson')", "lesson"), cell("#| gpu\nraise RuntimeError('gpu')"), cell(run)]
    nb = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}

    def write(lams, code="def f(x): return x", extra=""):
        cells[1]["source"] = f"#| export\n{code}"
        Path("toy.ipynb").write_text(json.dumps(nb))
        Path("s.toml").write_text(f'[sweep]\npages = ["toy.ipynb"]\n[grid]\nlam = {lams}\n{extra}')
        return "s.toml"
    return write


def ran(): return Path("ran.txt").read_text().split() if Path("ran.txt").exists() else []


def test_finished_cells_never_run_again(toy):
    assert not sweep(toy([1, 2]), workers=2).failed
    assert sorted(ran()) == ["1.0", "2.0"]
    sweep(toy([1, 2, 3]))
    assert sorted(ran()) == ["1.0", "2.0", "3.0"]


def test_stale_cells_wait_for_force(toy, capsys):
    sweep(toy([1]))
    changed = toy([1], code="def f(x): return 2*x")
    assert len(sweep(changed).stale) == 1 and len(ran()) == 1
    assert "stale: toy lam=1" in capsys.readouterr().out
    sweep(changed, force=True)
    assert len(ran()) == 2
    assert len(list(Path("runs/sweeps/s").glob("toy-*/result.json"))) == 2
    sweep(toy([1], code="def f(x):\n    'Doubles.'\n    return 2 * x  # twice"))
    assert len(ran()) == 2


def test_a_failure_is_kept_and_the_sweep_goes_on(toy, capsys):
    with pytest.raises(SystemExit) as e: main(["sweep", toy([10, 2])])
    said = "cit: 1 of 2 cells failed: toy lam=10 failed (ValueError: lam is too large): see runs/sweeps/s/toy-"
    assert str(e.value.code).startswith(said)
    assert ran() == ["10.0", "2.0"]
    notebook, = [p for p in Path("runs/sweeps/s").glob("*.ipynb") if '"exception": true' in p.read_text()]
    assert json.loads(notebook.read_text())["metadata"]["papermill"]["exception"]
    with pytest.raises(SystemExit): main(["sweep", "s.toml"])
    assert ran() == ["10.0", "2.0", "10.0"]


@pytest.mark.parametrize("extra, said", [
    ('[set]\nlamm = 1', "unknown parameter under [set] in s.toml 'lamm' (did you mean 'lam'?)"),
    ('[set]\nseed = "one"', "page 'toy': field 'seed' is 'one', but must be a whole number"),
    ('[set]\nout = "x"', "'out' cannot be set"),
    ('[sets]\nlam = 1', "unknown table of s.toml 'sets' (did you mean 'set'?)"),
    ('seed = 3', "[grid] seed is 3, but must be a list"),
    ('seed = [', "s.toml is not valid TOML")])
def test_mistakes_stop_before_anything_starts(toy, extra, said):
    with pytest.raises(CitError) as e: sweep(toy([1], extra=extra))
    assert said in str(e.value)
    assert ran() == [] and not Path("runs").exists()


def test_a_folder_that_cannot_be_written_ends_the_sweep(toy):
    Path("file").write_text("")
    with pytest.raises(CitError, match="cannot write"): sweep(toy([1, 2]), out="file/x")


def test_unknown_page_and_missing_file(tmp_path):
    with pytest.raises(CitError, match="unknown page 'ewcc'"): find_page("ewcc", tmp_path)
    with pytest.raises(CitError, match="does not exist"): sweep(tmp_path/"none.toml")
    (tmp_path/"s.toml").write_text("[sweep]\nname = 'x'\n")
    with pytest.raises(CitError, match="names no pages"): sweep(tmp_path/"s.toml")


def test_packed_cells_are_finished_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIT_QUIET", "1")
    few = ('stream_args = {tasks = ["col-word"], n_train = 16, n_val = 2, n_test = 2}\n'
           'optim = {steps = 2, batch = 4}\ncompute = {threads = 1}')
    (tmp_path/"s.toml").write_text(f'[sweep]\npages = ["*"]\nrecords = "kept"\nbeside = ["more/*.jsonl"]\n[set]\n{few}\n[grid]\nseed = []\n'
                                   '[grid.finetune]\nseed = [0]\n')
    first = sweep(tmp_path/"s.toml", out=tmp_path/"a")
    assert not first.failed and len(first.cells) == 1
    kept, = (tmp_path/"kept").glob("finetune-*.jsonl")
    (tmp_path/"more").mkdir()
    (tmp_path/"more/other.jsonl").write_text(kept.read_text().replace('"seed":0', '"seed":1'))
    again = sweep(tmp_path/"s.toml", out=tmp_path/"b")
    assert "1 finished, 0 to run" in capsys.readouterr().out
    assert again.runs == [kept, tmp_path/"more/other.jsonl"] and "finetune" in str(again)
    assert not list((tmp_path/"b").glob("finetune-*/result.json"))


def test_demo_is_a_valid_sweep(tmp_path):
    cells = plan(pages_dir().parents[1]/"sweeps/demo.toml", tmp_path)
    assert len({c.key for c in cells}) == 4


@pytest.mark.parametrize("name", pages)
def test_method_pages_keep_the_contract(name):
    "The tagged cell holds the common parameters and one line per field of the method's dataclass."
    from dataclasses import fields

    from cit_workbench import get_method
    known = page_parameters(find_page(name, Path()))
    assert COMMON <= known.keys(), f"missing {COMMON - known.keys()}"
    assert known.keys() - COMMON == {f.name for f in fields(get_method(name)) if f.init}
    assert any("lesson" in tags for _, tags, _ in code_cells(find_page(name, Path())))
