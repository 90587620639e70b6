"The command line: whatever a person types, the answer is the work or one sentence; a bug still shows itself."
import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cit_workbench.cli import COMMANDS, main
from cit_workbench.commands.parser import parse
from cit_workbench.commands.training import run
from cit_workbench.experiments.search import nested

SMALL = ["--stream-args", "tasks=['col-mcq', 'col-word']", "n_train=16", "n_val=4", "n_test=4",
         "--optim", "steps=2", "batch=4"]
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "from cit_workbench.cli import main; main()"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIT_QUIET", "1")


def said(capsys, *words):
    "Exit code and what `cit` wrote to stderr: at most one line, never a traceback."
    code = 0
    try: main(words)
    except SystemExit as e: code = e.code
    err = "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("cit: "))
    assert "Traceback" not in err and err.count("\n") == 0
    return code, err


def test_help_is_quick_and_names_every_command():
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", PROGRAM, "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert out.returncode == 0 and all(name in out.stdout for name in COMMANDS)
    assert seconds < 1.5


def test_help_imports_nothing_heavy():
    code = f"import sys; {PROGRAM}; assert not {{'torch', 'pandas', 'papermill'}} & {{*sys.modules}}"
    assert subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as e: main([name, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and COMMANDS[name].__doc__.split()[0] in out
    options = [line.split() for line in out.splitlines() if line.startswith("  --")]
    assert all(len(words) > 1 for words in options)


def test_pairs_reach_into_tables():
    args = parse(run, ["--set", "ewc.lam=100", "er.size=8", "--set", "x=abc", "--optim", "lr=1e-3"])
    assert args["set"] == {"ewc.lam": 100, "er.size": 8, "x": "abc"} and args["optim"] == {"lr": 1e-3}
    assert nested(args["set"]) == {"ewc": {"lam": 100}, "er": {"size": 8}, "x": "abc"}


@pytest.mark.parametrize("words, sentence", [
    (["rnu"], "unknown command 'rnu' (did you mean 'run'?)"),
    (["run", "--metod", "ewc"], "unknown option of `cit run` '--metod' (did you mean '--method'?)"),
    (["run", "--seed", "one"], "invalid int value: 'one'"),
    (["run", "--set", "lam"], "'lam' is not of the form name=value"),
    (["run", "now"], "unrecognized arguments: now"),
    (["run", "--method", "ewcc"], "unknown method 'ewcc' (did you mean 'ewc'?)"),
    (["run", "--method", "ewc", "--set", "lamm=1"], "'lamm' (did you mean 'lam'?)"),
    (["run", "--method", "ewc", "--set", "lam=big"], "field 'lam' is 'big', but must be a number"),
    (["run", "--stream", "shape"], "unknown stream 'shape' (did you mean 'shapes'?)"),
    (["run", "--stream", "coin:nowhere"], "nowhere"),
    (["run", "--stream-args", "n_trian=3"], "'n_trian' (did you mean 'n_train'?)"),
    (["run", "--backbone", "tiny"], "unknown backbone 'tiny'"),
    (["run", "--backbone", "."], "has no config.json"),
    (["run", "--optim", "stepz=3"], "'stepz' (did you mean 'steps'?)"),
    (["run", "--optim", "steps=few"], "'few'"),
    (["run", "--tune", "rank=3"], "'rank'"),
    (["run", "--compute", "device=tpu"], "tpu"),
    (["run", "--order", "col-mcq"], "`order` must hold every task"),
    (["run", "--limit", "0"], "must be at least 1"),
    (["resume", "nowhere"], "nowhere is not a run"),
    (["sweep", "none.toml"], "none.toml does not exist"),
    (["table", "nowhere"], "nowhere"),
    (["figures", "nowhere"], "nowhere"),
    (["figures", str(ROOT/"records/demo"), "--only", "curve"], "unknown picture 'curve' (did you mean 'curves'?)"),
    (["list", "method"], "did you mean 'methods'"),
    (["export-stream", "shape", "x"], "unknown stream 'shape'")])
def test_bad_words_end_in_one_sentence(words, sentence, capsys):
    code, err = said(capsys, *words)
    assert code == 2 and sentence in err
    assert not list(Path().iterdir())


def test_pictures_are_drawn_from_several_folders_and_by_name(capsys):
    dirs = ",".join(str(ROOT/"records"/d) for d in ("demo", "collected"))
    assert said(capsys, "figures", dirs, "--only", "one-task,matrices", "--out", "out") == (0, "")
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(f"shapes-{n}.{f}" for n in ("one-task", "matrices") for f in ("pdf", "svg", "png"))


def test_a_run_from_the_command_line(capsys):
    assert said(capsys, "run", "--method", "finetune", *SMALL, "--out", "a") == (0, "")
    result = json.loads(Path("a/result.json").read_text())
    assert result and said(capsys, "resume", "a") == (0, "") and said(capsys, "table", ".") == (0, "")
    before = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
    code, err = said(capsys, "run", "--method", "finetune", *SMALL, "--seed", "1", "--out", "a")
    assert code == 2 and "another configuration: seed is 0 there and 1 here" in err
    assert {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()} == before


def test_a_folder_that_cannot_be_written(capsys):
    Path("file").write_text("")
    code, err = said(capsys, "run", *SMALL, "--out", "file/x")
    assert code == 2 and "file" in err and "choose another `out` folder" in err


@pytest.mark.parametrize("error, code, sentence", [
    (OSError(errno.ENOSPC, "full", "runs/a/x"), 2, "cit: cannot write runs/a/x: no space is left on the disk"),
    (PermissionError(errno.EACCES, "no", "runs/a/x"), 2, "cit: cannot write runs/a/x: permission is denied"),
    (KeyboardInterrupt(), 130, "cit: interrupted")])
def test_the_machine_says_no(error, code, sentence, capsys, monkeypatch):
    def fail(dir:str="runs", /): raise error
    monkeypatch.setitem(COMMANDS, "table", fail)
    got, err = said(capsys, "table")
    assert got == code and err.startswith(sentence)


def test_a_full_disk_is_recognised_in_the_words_of_safetensors():
    from cit_workbench.core.files import disk_error
    assert "no space is left" in str(disk_error("x", Exception("Error while serializing: I/O error: … (os error 28)")))


def test_a_bug_shows_its_traceback(monkeypatch):
    def fail(dir:str="runs", /): raise ZeroDivisionError("a bug")
    monkeypatch.setitem(COMMANDS, "table", fail)
    with pytest.raises(ZeroDivisionError): main(["table"])


def test_debug_shows_where_a_sentence_came_from():
    from cit_workbench import CitError
    with pytest.raises(CitError): main(["--debug", "table", "nowhere"])


def test_a_closed_pipe_is_no_error():
    code = f"{sys.executable} -c '{PROGRAM}' list methods | head -c 1"
    done = subprocess.run(code, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
