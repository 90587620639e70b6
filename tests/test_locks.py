"Locks: several users of one machine take turns, several sweeps of one file share the work, no notebook takes another's module."
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cit_workbench.core.errors import CitError
from cit_workbench.core.files import shared
from cit_workbench.training.queue import _ahead, _lives, _room, device_queue
from cit_workbench.experiments.sweep import sweep
from cit_workbench.experiments.cells import plan

ROOT = Path(__file__).resolve().parents[1]


def environment(**env): return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests")]), "OMP_NUM_THREADS": "1", **env}


def soon(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(.02)


def test_a_lock_that_is_removed_while_it_is_opened_is_made_again(tmp_path, monkeypatch):
    path, was = tmp_path/"a.lock", os.open
    path.touch()
    def removed_first(*args):
        monkeypatch.setattr(os, "open", was)
        path.unlink()
        return was(*args)
    monkeypatch.setattr(os, "open", removed_first)
    os.close(shared(path))
    assert path.exists()
    path.unlink()
    path.symlink_to(tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError): shared(path)


# Users of one machine

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="two users need root")


class User:
    "A process of another user with its own umask, which does one thing after another."
    def __init__(self, uid, umask):
        self.read, there = os.pipe()
        here, self.write = os.pipe()
        if pid := os.fork():
            self.pid = pid
            os.close(there)
            os.close(here)
            return
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.umask(umask)
            while word := os.read(here, 1): os.write(there, self.does(word).encode()[:200].ljust(200))
        finally: os._exit(0)

    def does(self, word):
        try:
            if word == b"h":
                self.held = device_queue("cuda:0", 1)
                self.held.__enter__()
                return "holds it"
            if word == b"p":
                def tired(place): raise TimeoutError(f"place {place}")
                with device_queue("cuda:0", 2, tired): return "had its turn"
            with device_queue("cuda:0", 3, patient=False): return "went on"
        except TimeoutError as e: return str(e)
        except BaseException as e: return f"{type(e).__name__}: {e}"

    def __call__(self, word):
        os.write(self.write, word)
        return os.read(self.read, 200).decode().strip()

    def gone(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def tmp_for_all(monkeypatch):
    "A folder like /tmp."
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o1777)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield Path(folder)
    shutil.rmtree(folder)


@as_root
@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_another_users_lock_is_waited_for(tmp_for_all, umask):
    a, b, c = User(10001, umask), User(10002, 0o077), User(10003, 0o022)
    try:
        assert a(b"h") == "holds it"
        assert [u(b"p") for u in (b, c)] == ["place 1", "place 1"]
        assert [u(b"i") for u in (b, c)] == ["went on", "went on"]
        a.gone()
        assert [u(w) for u in (b, c) for w in (b"p", b"i")] == ["had its turn", "went on"]*2
    finally:
        for u in (b, c): u.gone()


@as_root
def test_what_an_older_version_left(tmp_for_all):
    "A lock and a ticket that only their owner can open; the owner of the ticket lives, or not."
    room = _room("cuda:0")
    lock, dead, living = room/"lock", room/f"{1:020d}-99999999.ticket", room/f"{1:020d}-{os.getpid()}.ticket"
    for f in (lock, dead, living):
        f.touch(mode=0o600)
        os.chown(f, 10001, 10001)
    b = User(10002, 0o022)
    try:
        assert b(b"i") == "went on"
        assert b(b"p").startswith("CitError:") and "cannot be opened" in b(b"p")
    finally: b.gone()
    got = os.fork()
    if not got:
        os.setuid(10002)
        os._exit(10*_lives(dead) + _lives(living) + 100*(_ahead(room, "2") != 1))
    assert os.waitstatus_to_exitcode(os.waitpid(got, 0)[1]) == 1


@as_root
def test_the_folder_has_its_rights_from_the_first_moment(tmp_for_all, monkeypatch):
    "Its maker dies before it could give them: then there is no folder yet."
    def dies(self, mode): os._exit(9)
    if not (pid := os.fork()):
        os.setuid(10001)
        Path.chmod = dies
        _room("cuda:0")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    b = User(10002, 0o077)
    try: assert b(b"p") == "had its turn"
    finally: b.gone()
    assert _room("cuda:0").stat().st_mode & 0o7777 == 0o1777


def test_a_disk_without_links_has_locks_too(tmp_path, monkeypatch):
    def refuses(a, b): raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuses)
    os.close(shared(tmp_path/"lock"))
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


# Sweeps of one file

PAGE = """import json, pathlib, time, os
p = pathlib.Path(out); p.mkdir(parents=True, exist_ok=True)
with open('ran.txt', 'a') as f: f.write(f'{lam} {os.getppid()}\\n')
time.sleep(wait)
if lam > 9: raise ValueError('lam is too large')
(p/'result.json').write_text(json.dumps({'lam': lam}))"""
SWEEP = "import sys; from cit_workbench.cli import main; from cit_workbench.experiments.sweep import Sweep; Sweep.__str__ = lambda s: 'the table: ' + ' '.join(sorted(f'{c}={c.finished}' for c in s.cells)); main()"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A page that takes its time, and a sweep file over it."
    monkeypatch.chdir(tmp_path)

    def write(lams, wait=0.):
        cell = lambda k, source, *tags: {"id": f"c{k}", "cell_type": "code", "source": source, "metadata": {"tags": list(tags)}, "outputs": [], "execution_count": None}
        cells = [cell(0, f"lam = 1.\nwait = {wait}\nout = 'runs/toy'", "parameters"), cell(1, PAGE)]
        Path("toy.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        Path("s.toml").write_text(f'[sweep]\npages = ["toy.ipynb"]\n[grid]\nlam = {lams}\n')
    return write


def ran(): return sorted(float(line.split()[0]) for line in Path("ran.txt").read_text().splitlines()) if Path("ran.txt").exists() else []


def start(*more):
    return subprocess.Popen([sys.executable, "-c", SWEEP, "sweep", "s.toml", "--out", "O", *more], env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def table(p): return [line for line in p.communicate(timeout=300)[0].splitlines() if line.startswith("the table")]


@pytest.mark.parametrize("n, more", [(2, []), (3, ["--workers", "2"])])
def test_sweeps_of_one_file_share_the_cells(toy, n, more):
    toy([1, 2, 3], wait=3)
    sweeps = [start(*more) for _ in range(n)]
    tables = [table(p) for p in sweeps]
    assert [p.returncode for p in sweeps] == [0]*n
    assert tables == [["the table: toy lam=1=True toy lam=2=True toy lam=3=True"]]*n
    assert ran() == [1, 2, 3]
    assert not list(Path("O").glob("*.lock"))
    notes = [json.loads(p.read_text()) for p in sorted(Path("O").glob("toy-*.json"))]
    assert len(notes) == 3 and all(n["error"] == "" and n["seconds"] > 0 for n in notes)


def test_a_cell_whose_holder_is_killed_is_taken_over(toy):
    toy([1], wait=20)
    first = start()
    soon(lambda: ran() == [1])
    second = start()
    soon(lambda: "comes last" in second.stdout.readline())
    first.kill()
    first.wait()
    page = json.loads(Path("toy.ipynb").read_text())
    assert page and table(second) == ["the table: toy lam=1=True"] and second.returncode == 0
    assert ran() == [1, 1]


def test_a_failure_is_each_sweeps_own(toy):
    toy([10, 2], wait=2)
    sweeps = [start() for _ in range(2)]
    said = [p.communicate(timeout=300)[0] for p in sweeps]
    assert [p.returncode for p in sweeps] == [1, 1] and all("lam is too large" in s for s in said), said
    assert ran() == [2, 10, 10]


def test_a_cell_that_a_run_trains_is_waited_for(tmp_path, monkeypatch, capsys):
    "`cit run --out` writes the folder of a cell; the sweep waits and finds it finished, whatever the page would do."
    monkeypatch.chdir(tmp_path)
    fields = 'stream_args = {tasks = ["col-word"], n_train = 16, n_val = 2, n_test = 2}\noptim = {steps = 2, batch = 4}\ncompute = {threads = 1}'
    Path("s.toml").write_text(f'[sweep]\npages = ["finetune"]\n[set]\n{fields}\n')
    cell, = plan("s.toml", "O")
    code = ("import sys, time; from cit_workbench import Run\n"
            "one_step = Run.one_step\n"
            "def slow(self, *a):\n    print('step', flush=True); time.sleep(3); return one_step(self, *a)\n"
            "Run.one_step = slow\n"
            "Run('finetune', stream_args={'tasks': ['col-word'], 'n_train': 16, 'n_val': 2, 'n_test': 2}, "
            "optim={'steps': 2, 'batch': 4}, compute={'threads': 1}, out=sys.argv[1]).train()")
    p = subprocess.Popen([sys.executable, "-c", code, str(cell.out)], env=environment(), stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "step\n"
    got = sweep("s.toml", out="O")
    assert p.wait(60) == 0 and not got.failed and got.cells[0].finished
    said = capsys.readouterr().out
    assert "finetune is being executed by another process" in said and "finished elsewhere" in said
    assert not cell.notebook.exists()


# Two notebooks, one module

@pytest.fixture
def tree(tmp_path):
    "A small tree with the project's settings."
    for f in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/f, tmp_path/f)
    (tmp_path/"nbs"/"methods").mkdir(parents=True)
    (tmp_path/"cit_workbench"/"methods").mkdir(parents=True)
    page(tmp_path/"nbs"/"methods"/"finetune.ipynb", "methods.finetune", "class Finetune(Method): pass")
    return tmp_path


def page(path, module, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [f"#| default_exp {module}"] if module else []
    cells = [{"id": f"c{k}", "cell_type": "code", "source": s, "metadata": {}, "outputs": [], "execution_count": None}
             for k, s in enumerate([*head, f"#| export\n{source}"])]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/"tools"))
    sys.modules.pop("sync", None)
    import sync
    yield sync
    sys.modules.pop("sync", None)


@pytest.mark.parametrize("name, module, source, said", [
    ("methods/mine", "methods.finetune", "class Mine(Method): pass", "both write module methods/finetune.py"),
    ("other/deep/copy", "methods.finetune", "x = 1", "both write module methods/finetune.py"),
    ("methods/mine", "methods.Finetune", "class Mine(Method): pass", "both write module methods/finetune.py"),
    ("methods/mine", "methods.mine", "class Finetune(Method): pass", "both write method finetune"),
    ("methods/mine", "", "class Mine(Method): pass", "nbs/methods/mine.ipynb exports cells, but names no module")])
def test_two_sources_of_one_target_stop_before_anything_is_written(tree, tool, name, module, source, said):
    page(tree/"nbs"/f"{name}.ipynb", module, source)
    there = tree/"cit_workbench"/"methods"/"finetune.py"
    there.write_text("# AUTOGENERATED! DO NOT EDIT!\n")
    with pytest.raises(SystemExit) as e: tool.sync(tree)
    assert said in e.value.code and f"nbs/{name}.ipynb" in e.value.code
    if module: assert "nbs/methods/finetune.ipynb" in e.value.code
    assert there.read_text() == "# AUTOGENERATED! DO NOT EDIT!\n" and e.value.code.startswith("Nothing was exported")


def test_scratch_pages_are_no_difference(tmp_path, tool, monkeypatch):
    "A notebook that git does not track and that exports nothing is nobody's business."
    monkeypatch.setattr(tool, "root", tmp_path)
    page(tmp_path/"nbs/kept.ipynb", "", "x = 1")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    page(tmp_path/"nbs/new.ipynb", "methods.new", "x = 1")
    (tmp_path/"nbs/scratch.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    assert tool.scratch() == {"nbs/scratch.ipynb"}


@pytest.mark.parametrize("text", ["{ bad", "[]", '{"cells": 1}', "class"])
def test_a_page_that_cannot_be_read_stops_everything(tree, tool, text):
    mine = tree/"nbs"/"methods"/"mine.ipynb"
    if text == "class": page(mine, "methods.mine", "class Mine(Method:")
    else: mine.write_text(text)
    with pytest.raises(SystemExit) as e: tool.sync(tree)
    assert e.value.code.startswith("Nothing was exported. nbs/methods/mine.ipynb cannot be read: ")


def test_checkpoints_of_jupyter_and_runs_are_no_sources(tree, tool):
    for name in (".ipynb_checkpoints/finetune-checkpoint", "methods/.ipynb_checkpoints/finetune", "runs/finetune"):
        page(tree/"nbs"/f"{name}.ipynb", "methods.finetune", "class Finetune(Method): pass")
    assert tool.collisions(tree)[0] == [] and [p.name for p in tool.pages(tree)] == ["finetune.ipynb"]


def test_a_renamed_page_leaves_no_module_behind(tree, tool, capsys):
    package = tree/"cit_workbench"
    for name in ("methods/old.py", "methods/finetune.py"): (package/name).write_text("# AUTOGENERATED! DO NOT EDIT!\n")
    (package/"methods"/"hand.py").write_text("x = 1\n")
    (package/"methods"/"__init__.py").write_text("")
    tool.drop_orphans(tree, tool.collisions(tree)[1])
    assert sorted(p.name for p in (package/"methods").iterdir()) == ["__init__.py", "finetune.py", "hand.py"]
    assert "cit_workbench/methods/old.py goes" in capsys.readouterr().out


def test_the_project_has_no_collisions(tool): assert tool.collisions(ROOT)[0] == []


def test_a_foreign_lock_is_a_sentence(tmp_path, monkeypatch):
    import cit_workbench.training.queue as queue
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(queue, "shared", lambda path: None)
    with device_queue("cuda:0", 1, patient=False): pass
    with pytest.raises(CitError, match="cannot be opened"), device_queue("cuda:0", 1): pass
