"""Execute notebooks from top to bottom, each in a process of its own, and only those whose outputs could have become others.

A page's outputs are taken from where they were made last: this build's work, or the committed notebook, when everything that making
them read (the page, modules, records, starts) is as it was; `nbs/outputs.json` says it for the committed ones.
"""
import hashlib
import json
import multiprocessing as mp
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

WARM = ("torch", "transformers.models.llava.modeling_llava", "transformers.models.clip.image_processing_pil_clip", "peft",
        "matplotlib.pyplot", "matplotlib_inline.backend_inline", "pandas", "scipy.stats", "sklearn.datasets", "plotly.graph_objects",
        "anywidget", "ipywidgets", "papermill", "nbclient", "execnb.shell", "nbdev.test", "fastcore.test")
SKIP = {".venv", ".git", "runs", "_site", "_proc", "__pycache__", ".ipynb_checkpoints"}
KEPT = "nbs/outputs.json"
FIGURE = "application/vnd.plotly.v1+json"


def notebooks(nbs):
    "The pages below `nbs`, by path."
    return [p for p in sorted(nbs.rglob("*.ipynb")) if not SKIP & set(p.relative_to(nbs).parts)]


# --- what a page reads ---------------------------------------------------------------------------------------------

def digest(path):
    "What a file holds, of a notebook its cells without outputs; or the names in a folder."
    if path.is_dir(): data = "\n".join(sorted(p.name for p in path.iterdir() if p.name not in SKIP)).encode()
    elif path.suffix == ".ipynb" and path.is_file():
        cells = json.loads(path.read_text())["cells"]
        data = json.dumps([(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in cells]).encode()
    else: data = path.read_bytes() if path.is_file() else b"missing"
    return hashlib.sha256(data).hexdigest()[:16]


def state(names, at):
    "One digest of files, folders and patterns below `at` as they are now."
    found = sorted({p for n in names for p in (at.glob(n) if "*" in n else [at/n]) if not SKIP & set(p.relative_to(at).parts)})
    return hashlib.sha256(json.dumps([(p.relative_to(at).as_posix(), digest(p)) for p in found]).encode()).hexdigest()[:16]


def whole(path):
    "What a notebook holds, outputs included."
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def note(out, **made):
    "Beside the outputs: what they were made from."
    out.with_suffix(".json").write_text(json.dumps(made))


class Seen:
    "Files and folders of the tree at `at` that this process reads from now on, and whether it starts others that may read, too."
    def __init__(self, at):
        self.at, self.paths, self.spawned, self.on = str(at) + os.sep, set(), False, True
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if not self.on: return
        if event in ("os.fork", "os.posix_spawn"): self.spawned = True
        elif event == "subprocess.Popen": self.spawned |= args[0] not in ("git", "uname") # a run asks these where it is
        elif event == "os.listdir" and "importlib" in sys._getframe(1).f_code.co_filename: return # looking for a module
        elif event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, os.PathLike)):
            path = os.path.abspath(os.fspath(args[0]))
            if path.startswith(self.at): self.paths.add(path)

    def names(self):
        "What was read, modules included; patterns for folders of records, and for the whole package where other processes ran."
        self.on, at = False, Path(self.at)
        found = {Path(p) for p in self.paths} | {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
        names = {p.relative_to(at).as_posix() for p in found if p.is_relative_to(at) and p.exists()} | {"constraints.txt"}
        names = {n for n in names if not SKIP & set(Path(n).parts) and ".egg-info" not in n} - {"tools/docs.py", KEPT}
        wide = {"cit_workbench/assets/**/*"} | {f"{n}/**/*" for n in names if n.startswith("records") and (at/n).is_dir()}
        if self.spawned: wide |= {"cit_workbench/**/*.py", "records/**/*"}
        covered = {p.relative_to(at).as_posix() for w in wide for p in at.glob(w)}
        return sorted(names - covered) + sorted(wide)


# --- execute -------------------------------------------------------------------------------------------------------

def execute(path, at, out):
    "Run a notebook from top to bottom as the tests do, with figures that live in a page; seconds, and the error if any."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import extract_directives
    os.environ.update(IN_TEST="1", CIT_QUIET="1", PYTHONPATH=str(at), CIT_CACHE=str(at/"_site/work/cache")); sys.path.insert(0, str(at)); os.chdir(path.parent)
    left_out = set(get_config().tst_flags.split())
    start, nb, shell, seen = time.time(), read_nb(path), CaptureShell(path, mpl_format="retina"), Seen(at)
    _show_figures(shell)
    def skipped(cell):
        if cell.cell_type != "code": return True
        flags = extract_directives(cell, remove=False)
        return flags.keys() & left_out or flags.get("eval:", [""])[0] == "false"
    for c in nb.cells:
        if not skipped(c): c["outputs"] = []
    try: shell.run_all(nb, exc_stop=True, preproc=skipped); error = None
    except BaseException: error = shell.prettytb(fname=path)
    said = [str(o) for c in nb.cells for o in c.get("outputs", []) if "Traceback (most recent call last)" in str(o) or o["output_type"] == "error"]
    for c in nb.cells:
        if "outputs" in c: c["outputs"] = [o for o in c["outputs"] if o.get("data", True) and o.get("name") != "stderr"]
    if error or said: return time.time() - start, error or said[0]
    seen.paths.add(str(path)); took = time.time() - start
    out.parent.mkdir(parents=True, exist_ok=True); write_nb(nb, out)
    names = seen.names()
    note(out, seconds=round(took, 1), reads=names, state=state(names, at))
    return took, None


def _show_figures(shell):
    "Let a Plotly figure, or a view of the dashboard, leave its data, which needs no kernel."
    import ipywidgets
    import plotly.graph_objects as go
    import plotly.io as pio
    def bundle(fig, name): return {FIGURE: json.loads(fig.to_json()), "text/plain": name}
    class Drawn(pio.base_renderers.MimetypeRenderer):
        def to_mimebundle(self, fig): return bundle(go.Figure(fig), "Figure")
    pio.renderers["site"], pio.renderers.default = Drawn(), "site"
    mime = shell.display_formatter.mimebundle_formatter
    def figures(w):
        if isinstance(w, go.FigureWidget): return [w]
        return [f for c in getattr(w, "children", ()) if w.layout.display != "none" for f in figures(c)]
    def drawn(w):
        if len(found := figures(w)) > 1: raise ValueError(f"{type(w).__name__} shows {len(found)} figures; a view in a page shows one at most")
        return bundle(found[0], type(w).__name__) if found else {"text/plain": repr(w)}
    for base in (go.FigureWidget, ipywidgets.Box): mime.for_type(base, drawn)


# --- what need not be executed -------------------------------------------------------------------------------------

def current(out, at):
    "Is what `out` holds still what executing its page would give?"
    side = out.with_suffix(".json")
    if not (out.is_file() and side.is_file()): return False
    made = json.loads(side.read_text())
    return state(made.get("reads", []), at) == made.get("state")


def said(at):
    "{page: seconds, what it read, the state of that, the file that it left}, of the outputs that are committed."
    path = at/KEPT
    return {at/n: m for n, m in json.loads(path.read_text()).items() if (at/n).is_file()} if path.is_file() else {}


def replay(pages, at, out):
    "Take the outputs that a notebook holds where they were made from what the tree holds now; how many."
    was = said(at)
    todo = [p for p in pages if p in was and not current(out[p], at) and whole(p) == was[p]["holds"] and state(was[p]["reads"], at) == was[p]["state"]]
    for p in todo:
        out[p].parent.mkdir(parents=True, exist_ok=True); shutil.copy(p, out[p])
        note(out[p], **{k: was[p][k] for k in ("seconds", "reads", "state")})
    return len(todo)


def keep(pages, at, out):
    "Write the outputs into the notebooks, and what they were made from beside them."
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    rows = {}
    for p in pages:
        nb, ran = read_nb(p), read_nb(out[p])
        for c, r in zip(nb.cells, ran.cells, strict=True):
            if c.cell_type == "code": c["outputs"] = r.get("outputs", [])
        clean_nb(nb, allowed_cell_metadata_keys=["tags"]); write_nb(nb, p)
        rows[p.relative_to(at).as_posix()] = json.loads(out[p].with_suffix(".json").read_text()) | {"holds": whole(p)}
    lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(m)}" for n, m in rows.items())
    (at/KEPT).write_text(f"{{\n{lines}\n}}\n")


def forks(workers):
    "Processes for one task each, forked from one that has imported what all need."
    ctx = mp.get_context("forkserver"); ctx.set_forkserver_preload(list(WARM))
    return ProcessPoolExecutor(workers, ctx, max_tasks_per_child=1)


def run_all(pages, at, out, workers=2):
    "Execute the pages that are not current in `out`, each in a process of its own; seconds by page. Ends with the errors of all that fail."
    todo, took, errors, was = [p for p in pages if not current(out[p], at)], {}, {}, said(at)
    if not todo: return took
    from tqdm.auto import tqdm
    cost = {p: was[p]["seconds"] if p in was else 10 for p in todo}
    todo.sort(key=lambda p: -cost[p]) # the long ones first, so that no core waits for one of them at the end
    with forks(workers) as pool, tqdm(total=sum(cost.values()), bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left") as bar:
        for job in as_completed(jobs := {pool.submit(execute, p, at, out[p]): p for p in todo}):
            page = jobs[job]
            took[page], error = job.result()
            if error: errors[page] = error
            bar.set_description_str(f"executed {len(took)} of {len(todo)} pages", refresh=False); bar.update(cost[page])
    if errors: sys.exit("\n\n".join(f"{p.relative_to(at)} fails:\n{e}" for p, e in errors.items()))
    return took
