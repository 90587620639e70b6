"`~` is the home folder everywhere; a run is found and goes on from any working directory; text survives any terminal."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TASKS, same_files
from twin import make_coin, make_twin

from cit_workbench.cli import main
from cit_workbench.core.errors import CitError
from cit_workbench.core.paths import cache_dir, expanded, placed
from cit_workbench.live.branch import branch
from cit_workbench.live.remake import run_of
from cit_workbench.record.packing import find_runs
from cit_workbench.record.record import Record
from cit_workbench.training.train import Run, resume
from cit_workbench.views.story import stream_of

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; from cit_workbench import main; sys.exit(main())"
TINY = dict(stream_args={"tasks": TASKS[:1], "n_train": 8, "n_val": 2, "n_test": 2}, optim={"steps": 1, "batch": 4},
            compute={"threads": 1})
WORDS = ["--stream-args", f"tasks={TASKS[:1]}", "n_train=8", "n_val=2", "n_test=2", "--optim", "steps=1", "batch=4"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder of its own; the working directory is another one."
    (tmp_path/"home").mkdir()
    (tmp_path/"work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    monkeypatch.chdir(tmp_path/"work")
    return tmp_path/"home"


def nothing_here(): return sorted(p.name for p in Path(".").iterdir()) == []


def test_home_is_home_for_a_run_and_all_that_reads_it(home, capsys):
    rec = Run("finetune", **TINY, out="~/runs/a").train()
    assert rec.path == home/"runs"/"a" and (home/"runs"/"a"/"result.json").is_file()
    main(["run", *WORDS, "--out=~/runs/b"])
    assert str(home/"runs"/"b") in capsys.readouterr().out
    main(["table", "~/runs"])
    main(["resume", "~/runs/b"])
    assert Record("~/runs/a").finished and len(find_runs("~/runs")) == 2 and resume("~/runs/a").finished
    child = branch(Record("~/runs/a"), out="~/runs/c", seed=1)
    assert child.folder == home/"runs"/"c"
    assert nothing_here()


def test_home_is_home_for_sweeps_figures_exports_and_the_workbench(home, capsys):
    from cit_workbench.dashboard import Workbench
    from cit_workbench.experiments.cells import plan
    (home/"s.toml").write_text("[sweep]\npages = ['finetune']\nrecords = '~/kept'\n")
    cell, = plan("~/s.toml", "~/sweeps")
    assert cell.folder == home/"sweeps" and cell.records == home/"kept"
    main(["export-stream", "shapes", "~/exported", "--stream-args", f"tasks={TASKS[:1]}", "n_train=4", "n_val=2", "n_test=2"])
    assert (home/"exported").is_dir()
    main(["figures", str(ROOT/"records"/"demo"), "--out=~/figures", "--only", "costs"])
    assert list((home/"figures").glob("*.png"))
    assert Workbench("~/more").where == home/"more" and (home/"more").is_dir()
    assert nothing_here()


def test_the_cache_too(home, monkeypatch):
    monkeypatch.setenv("CIT_CACHE", "~/answers")
    assert cache_dir() == home/"answers"
    monkeypatch.delenv("CIT_CACHE")
    assert cache_dir() == home/".cache"/"cit_workbench"


def test_an_unknown_home_is_one_sentence(home, capsys):
    with pytest.raises(CitError, match="home folder of a user who has none here"): Run(out="~nobody-of-that-name/x")
    with pytest.raises(SystemExit) as e: main(["table", "~nobody-of-that-name/x"])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert expanded("./~/x") == Path("~/x") and nothing_here()


# From another working directory

@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "A checkpoint and a stream, named by relative paths from the folder that holds them."
    at = tmp_path_factory.mktemp("given")
    make_twin(at/"bb")
    make_coin(at/"mine")
    return at


FIELDS = dict(stream="coin:mine", backbone="bb", optim={"steps": 2, "batch": 4}, compute={"threads": 1, "save_every": 1})


def unfinished(out, **fields):
    "A run that stops after its first step."
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(Run, "log", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): Run("finetune", **fields, out=str(out)).train()
    assert not Record(out).finished


@pytest.mark.parametrize("how", ["resume", "command"])
def test_a_run_goes_on_from_anywhere(given, tmp_path, monkeypatch, capsys, how):
    fields = {**FIELDS, "stream_args": {"tasks": ["ScienceQA"], "limit": 8, "eval_limit": 2}}
    monkeypatch.chdir(given)
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"cache"))
    Run("finetune", **fields, out=str(tmp_path/"whole")).train()
    unfinished(tmp_path/"run", **fields)
    monkeypatch.chdir(tmp_path)
    assert run_of("run").config() == run_of("whole").config() and run_of("run").config()["stream"] == "coin:mine"
    if how == "resume": assert resume("run").finished
    else: main(["resume", "run"])
    same_files(tmp_path/"run", tmp_path/"whole")
    rec = Record("run")
    assert rec.config["stream"] == "coin:mine" and rec.config["backbone"] == "bb" and rec.run["cwd"] == str(given)
    assert [t.name for t in stream_of(rec)] == ["ScienceQA"]
    child = branch(rec, seed=1)
    assert child.config()["backbone"] == "bb" and child.config()["seed"] == 1
    monkeypatch.chdir("/")
    assert run_of(child.folder if child.folder.is_absolute() else tmp_path/child.folder).config() == child.config()
    monkeypatch.chdir(given)
    assert Run("finetune", **fields, out=str(tmp_path/"run")).train().finished  # the same command, where it was given


def test_what_is_gone_is_named(given, tmp_path, monkeypatch):
    from shutil import copytree, rmtree
    monkeypatch.chdir(tmp_path)
    copytree(given/"mine", tmp_path/"mine")
    fields = {**FIELDS, "backbone": "tiny-instruct", "stream_args": {"tasks": ["ScienceQA"], "limit": 8, "eval_limit": 2}}
    unfinished(tmp_path/"run", **fields)
    rmtree(tmp_path/"mine")
    monkeypatch.chdir("/")
    with pytest.raises(CitError, match=f"'mine' does not exist.*the run was started in {tmp_path}"): resume(tmp_path/"run")


def test_names_of_the_embedded_stay(tmp_path, monkeypatch):
    "A folder called like an embedded start does not take its place; the digest of a configuration knows no directory."
    (tmp_path/"tiny-instruct").mkdir()
    (tmp_path/"elsewhere").mkdir()
    fields = {"stream": "shapes", "backbone": "tiny-instruct", "stream_args": {"n_train": 4}}
    assert placed(fields, str(tmp_path)) == fields
    monkeypatch.chdir(tmp_path)
    here = Run("finetune", **TINY)
    monkeypatch.chdir(tmp_path/"elsewhere")
    assert Run("finetune", **TINY).folder == here.folder and Run("finetune", **TINY).config() == here.config()


def test_packed_records_hold_no_directory(tmp_path, finished):
    from cit_workbench.record.packing import pack
    run = finished()
    assert run.rec.run["cwd"]
    assert "cwd" not in Record(pack(run.folder, tmp_path/"a.jsonl")).run


# Any terminal

PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
TERMINALS = {"ascii": {"PYTHONIOENCODING": "ascii"}, "C": PLAIN, "latin-1": {"PYTHONIOENCODING": "latin-1"},
             "cp1252": {"PYTHONIOENCODING": "cp1252"}}


def cit(*words, cwd, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-c", PROGRAM, *map(str, words)], env=env, cwd=cwd, capture_output=True)


@pytest.mark.parametrize("name", TERMINALS)
def test_a_table_prints_on_any_terminal(tmp_path, name):
    p = cit("table", ROOT/"records"/"demo", cwd=tmp_path, **TERMINALS[name])
    assert p.returncode == 0 and p.stderr == b"" and b"finetune" in p.stdout
    if name in ("ascii", "C"): assert p.stdout.isascii() and b" ? " in p.stdout


def test_a_minus_stays_a_minus_on_any_terminal(tmp_path):
    code = "from cit_workbench.cli import forgiving; import sys; forgiving(sys.stdout); print('−25.0 · 1…')"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).stdout == b"-25.0 ? 1...\n"


def test_errors_and_names_of_files_too(tmp_path):
    p = cit("table", tmp_path/"图表", cwd=tmp_path, **PLAIN)
    assert p.returncode == 2 and p.stderr.startswith(b"cit: no runs at") and p.stderr.count(b"\n") == 1
    p = cit("table", os.fsdecode(bytes(tmp_path/"x") + b"\xff"), cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert p.returncode == 2 and p.stderr.count(b"\n") == 1


@pytest.mark.parametrize("env", [PLAIN, {"PYTHONIOENCODING": "ascii"}], ids=["C", "ascii"])
def test_a_run_in_a_folder_with_any_name(given, tmp_path, env):
    "The files are UTF-8, whatever the locale says."
    from shutil import copytree
    copytree(given/"mine", tmp_path/"mine")
    tasks = sorted(p for p in (tmp_path/"mine").rglob("ScienceQA") if p.is_dir() and (p/"train.json").is_file())
    tasks[0].rename(tasks[0].with_name("图表问答"))
    p = cit("run", "--stream", f"coin:{tmp_path/'mine'}", "--stream-args", "tasks=图表问答", "--limit", "8", "--eval-limit", "2",
            "--optim", "steps=1", "batch=4", "--compute", "threads=1", "--out", tmp_path/"run", cwd=tmp_path, **env)
    assert p.returncode == 0, p.stderr.decode(errors="replace")
    assert b"Traceback" not in p.stderr
    assert json.loads((tmp_path/"run"/"result.json").read_text(encoding="utf-8"))
    assert [e["task"] for e in Record(tmp_path/"run").events("begin")] == ["图表问答"]


def test_a_name_that_is_no_utf8_is_one_sentence(given, tmp_path):
    from shutil import copytree
    copytree(given/"mine", tmp_path/"mine")
    tasks = sorted(p for p in (tmp_path/"mine").rglob("ScienceQA") if p.is_dir() and (p/"train.json").is_file())
    os.rename(bytes(tasks[0]), bytes(tasks[0].parent) + b"/odd\xff")
    p = cit("run", "--stream", f"coin:{tmp_path/'mine'}", "--limit", "8", "--eval-limit", "2", "--optim", "steps=1", "batch=4",
            "--out", tmp_path/"run", cwd=tmp_path)
    said = p.stderr.decode(errors="replace")
    assert p.returncode == 2 and "Traceback" not in said and "is not UTF-8: rename" in said.splitlines()[-1]

