"""Threads of the package neither import nor parse: the main thread of a notebook does both at any time.

Each scenario is a script in a fresh process, where nothing is imported yet. `WATCH` notes every look for a module and every
call of `ast.parse` that does not come from the main thread."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import HALF

from cit_workbench.views.fields import comments
from cit_workbench.views.launcher import method_classes
from cit_workbench.models.tune import Tune
from cit_workbench.training.config import Compute, Optim, Spec
from cit_workbench.views.toy import toy_run
from cit_workbench.measure.schedule import Watch

WATCH = """
import os, sys, threading, time, traceback
found = []
def note(what):
    if threading.current_thread() is threading.main_thread(): return
    found.append(f"{what} in " + " < ".join(f"{f.name}:{f.lineno}" for f in traceback.extract_stack()[-8:-2]))
def hook(event, args):
    if event == "compile" and sys._getframe(1).f_code.co_filename.endswith("/ast.py"): note("parse")
    if event in ("os.chdir", "os.putenv"): note(event)
class Finder:
    def find_spec(self, name, path=None, target=None): note(f"import {name}")
sys.addaudithook(hook)
sys.meta_path.insert(0, Finder())

def until(what, seconds=300):
    end = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(.05)
    return got
"""
SMALL = {"tasks": ["col-word", "shp-mcq"], "n_train": 32, "n_val": 8, "n_test": 4}


def script(text, *args, seconds=500):
    "Run a script in a fresh process; what it printed last, as JSON."
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", text, *map(str, args)], capture_output=True, text=True, timeout=seconds,
                          env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder of toy runs, one real run with checkpoints, and what was collected for its tasks."
    from cit_workbench.measure.collect import collect
    from cit_workbench.training.train import Run
    folder = tmp_path_factory.mktemp("threads")/"runs"
    for name in ("ewc", "er"): toy_run(folder/name, name)
    Run("finetune", stream="shapes", stream_args=SMALL, optim={"steps": 3, "batch": 4}, out=str(folder/"real")).train()
    collect("tiny-instruct", "shapes", SMALL, n=8, layers=[1], gradients=True, folder=folder/"collected")
    return folder


# --- What is right in any thread: fields and their comments ----------------------------------------------------------

def test_comments_read_by_tokens_are_those_of_docments():
    from fastcore.docments import docments
    for cls in (*method_classes().values(), Spec, Optim, Compute, Watch, Tune):
        assert comments(cls) == {k: v for k, v in docments(cls).items() if v}, cls


# --- The whole workbench ---------------------------------------------------------------------------------------------

WORKBENCH = WATCH + """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
def cell(text): shell.run_cell(text).raise_error()

cell(f"from cit_workbench.dashboard import Workbench; bench = Workbench({sys.argv[1]!r}, dark=False)")
bench, said, small = shell.user_ns["bench"], [], sys.argv[2]
cell(sys.argv[3])
until(lambda: "half" in [v for _, v in bench.form.method.options])
bench.run.value = "real"
for k in range(7):
    bench.tabs.selected_index = k
    time.sleep(.6)
    said.append(bench.note.value)
views = sorted(bench.views)
bench.asked.go.click() # The last checkpoint answers
until(lambda: "answered by the last checkpoint" in bench.asked.answer.value)

def launched(form, go, **fields):
    for k, v in fields.items(): form.plain[k.replace("_", ".") if "." not in k else k].value = v
    go.click()
    until(lambda: f"{fields['out']} trains" in bench.note.value or "error" in bench.note.value)
    assert "error" not in bench.note.value, bench.note.value
    return bench.rec.wait("finished")

bench.tabs.selected_index = 0
bench.form.method.value, bench.form.plain["stream_args"].value = "half", small
ended = [launched(bench.form, bench.go, optim_steps="3", optim_batch="4", out="first")]
cell("del Half") # From here on, only the run's own method.py knows the class
bench.tabs.selected_index = 5
ended.append(launched(bench.branch, bench.fork, optim_lr="1e-4", out="second"))
bench.buttons["Resume"].click()
time.sleep(1)
bench.close()
import json
print(json.dumps({"found": found, "views": views, "errors": [s for s in said if "error" in s], "ended": ended}))
"""


def test_no_thread_of_the_workbench_imports_or_parses(runs):
    "Every tab, a question, a launch of the notebook's own class, a branch of it in a kernel that does not know the class."
    got = script(WORKBENCH, runs, json.dumps(SMALL), HALF)
    assert got == {"found": [], "views": ["Compare", "Forgetting", "Similarity", "Spectra"], "errors": [],
                   "ended": ["finished", "finished"]}


FIRST_CLICK = WATCH + """
import asyncio, json
from cit_workbench.dashboard import Workbench

def opened():
    bench = Workbench(sys.argv[1], dark=False)
    bench.run.value = "real"
    return bench

async def page():
    "As in a kernel: the cell has ended, then come clicks while the libraries are imported."
    bench = opened()
    loading = []
    await asyncio.sleep(.35)
    for tab in (3, 2, 1, 4):
        loading.append(bench.go.disabled)
        bench.tabs.selected_index = tab
        await asyncio.sleep(.01)
    while bench.go.disabled: await asyncio.sleep(.02)
    return bench, loading[0]

def at_once():
    "As in a script."
    bench = opened()
    for tab in (3, 2, 1, 4): bench.tabs.selected_index = tab
    return bench, bench.go.disabled

bench, loading = asyncio.run(page()) if sys.argv[2] == "kernel" else at_once()
print(json.dumps({"found": found, "loading": loading, "views": sorted(bench.views), "note": bench.note.value}))
"""


@pytest.mark.parametrize("where, loading", [("kernel", True), ("script", False)])
def test_the_first_click_waits_for_what_is_loading(runs, where, loading):
    got = script(FIRST_CLICK, runs, where)
    assert got == {"found": [], "loading": loading, "views": ["Compare", "Forgetting", "Similarity", "Spectra"], "note": ""}


# --- Threads that open forms and views while the main thread parses ---------------------------------------------------

STRESS = WATCH + """
import ast, gc, inspect, json
from concurrent.futures import ThreadPoolExecutor
import cit_workbench.views.view
from cit_workbench.views.forgetting import Forgetting
from cit_workbench.views.launcher import Form, method_classes, run_fields
from cit_workbench.views.similarity import Similarity
from cit_workbench.views.spectra import Spectra
from cit_workbench.views.compare import Compare
from pathlib import Path
folder = Path(sys.argv[1])
[collected] = (folder/"collected").glob("*.npz")
package, known = method_classes(), run_fields()
names, over, parsed, mistakes = [*package], threading.Event(), 0, []
views = [lambda: Forgetting(folder/"ewc", dark=False), lambda: Similarity(collected, folder/"real", dark=False),
         lambda: Spectra(collected, folder/"real", dark=False), lambda: Compare(folder, dark=False)]
gc.callbacks.append(lambda phase, info: time.sleep(0)) # Whoever parses may lose its turn, as to a finaliser
gc.set_threshold(200)

def opened(k):
    form = Form(k % 2 == 1)
    form.fill(package, known)
    form.method.value = names[k % len(names)]
    view = views[k % len(views)]()
    view.close()

def guarded(k):
    try: opened(k)
    except BaseException as e: mistakes.append(f"{type(e).__name__}: {e}")

text = inspect.getsource(cit_workbench.views.view)
with ThreadPoolExecutor(8) as pool:
    jobs = [pool.submit(guarded, k) for k in range(int(sys.argv[2]))]
    while not all(j.done() for j in jobs):
        try: ast.parse(text)
        except SystemError as e: mistakes.append(str(e))
        parsed += 1
        time.sleep(.01)
print(json.dumps({"mistakes": sorted({*mistakes}), "parses": sorted({f for f in found if f.startswith("parse")}), "busy": parsed > 20}))
"""


def test_eight_threads_open_forms_and_views_while_the_notebook_parses(runs):
    assert script(STRESS, runs, 200) == {"mistakes": [], "parses": [], "busy": True}
