"""Execute notebooks from top to bottom, each in a process of its own, and only those whose outputs could have become others.

A page's outputs are taken from where they were made last, this build's work or the committed notebook, while everything that making them
read (the page, modules, records, start models, this file) is as it was. For the committed ones, `nbs/outputs.json` tells what that was.
"""
import hashlib
import json
import multiprocessing as mp
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from configparser import ConfigParser
from itertools import takewhile
from pathlib import Path

WARM = ("torch", "transformers.models.llava.modeling_llava", "transformers.models.clip.image_processing_pil_clip", "peft",
        "matplotlib.pyplot", "matplotlib_inline.backend_inline", "pandas", "scipy.stats", "sklearn.datasets", "plotly.graph_objects",
        "anywidget", "ipywidgets", "papermill", "nbclient", "execnb.shell", "nbdev.test", "fastcore.test")
SKIP = {".venv", ".git", "runs", "_site", "_proc", "__pycache__", ".ipynb_checkpoints"}
HELD = "nbs/outputs.json"
FIGURE = "application/vnd.plotly.v1+json"
settings = ConfigParser(interpolation=None)
settings.read(Path(__file__).resolve().parents[1]/"settings.ini")
LEFT_OUT = {*settings["DEFAULT"]["tst_flags"].split()}
SPAWN = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


def notebooks(nbs):
    "The pages below `nbs`, by path."
    return [p for p in sorted(nbs.rglob("*.ipynb")) if not SKIP & set(p.relative_to(nbs).parts)]


def read(path):
    "A JSON file; {} where there is none, or where a merge or an interruption has left something else."
    try: return json.loads(path.read_text())
    except (FileNotFoundError, ValueError): return {}


def write(path, text):
    "The whole file or none of it."
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".tmp-{path.name}"); new.write_text(text); os.replace(new, path)


# --- what a page reads ---------------------------------------------------------------------------------------------

def ours(name):
    "Is a file of the project, not of an editor or the desktop?"
    return name not in SKIP and name[0] not in ".#" and not name.endswith(("~", ".tmp", ".egg-info"))


def flags(source):
    "The `#|` lines on top of a cell, each as its words."
    return [ln[2:].split() for ln in takewhile(lambda ln: ln.startswith("#|"), source.splitlines())]


def left_out(cell):
    "Is a cell never executed here: text, or code for a GPU, a long time or a kernel?"
    if cell["cell_type"] != "code": return True
    return any(f and (f[0] in LEFT_OUT or f[:2] == ["eval:", "false"]) for f in flags("".join(cell["source"])))


def hashed(x): return hashlib.sha256(x if isinstance(x, bytes) else json.dumps(x).encode()).hexdigest()[:16]


def digest(path, outputs=False):
    "What a file holds; of a notebook its cells, with the outputs that are not made here, or with all; or the names in a folder."
    if path.is_dir(): return hashed(sorted(p.name for p in path.iterdir() if ours(p.name)))
    if not path.is_file(): return "missing"
    if path.suffix != ".ipynb" or not (cells := read(path).get("cells")): return hashed(path.read_bytes())
    shown = lambda c: [(o.get("data"), o.get("text")) for o in c.get("outputs", []) if outputs or left_out(c)]
    return hashed([(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", []), shown(c)) for c in cells])


def files(names, at):
    "Files and folders below `at`; names may be patterns."
    return sorted({p for n in names for p in (at.glob(n) if "*" in n else [at/n]) if all(map(ours, p.relative_to(at).parts))})


def state(names, at):
    "One digest of what was read, as it is now."
    return hashed([(p.relative_to(at).as_posix(), digest(p)) for p in files(names, at)])


class Seen:
    "Files and folders of the tree at `at` that this process opens or lists from now on, and whether it starts others."
    def __init__(self, at):
        self.at, self.paths, self.spawned, self.on = str(at) + os.sep, set(), False, True
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if not self.on: return
        if event in SPAWN: self.spawned = True
        elif event == "subprocess.Popen": self.spawned |= args[0] not in ("git", "uname") # a run notes its commit, which no page shows
        elif event == "os.listdir" and "importlib" in sys._getframe(1).f_code.co_filename: return # looking for a module
        elif event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, os.PathLike)):
            path = os.path.abspath(os.fspath(args[0]))
            if path.startswith(self.at): self.paths.add(path)

    def names(self):
        "What was read, modules included; patterns for folders of records, and for package and records where other processes ran, too."
        self.on, at = False, Path(self.at)
        found = {Path(p) for p in self.paths} | {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
        names = {p.relative_to(at).as_posix() for p in found if p.is_relative_to(at)} | {"constraints.txt", "settings.ini"}
        names = {n for n in names if all(map(ours, Path(n).parts))} - {"tools/docs.py", HELD}
        wide = {"cit_workbench/assets/**/*"} | {f"{n}/**/*" for n in names if n.startswith("records") and (at/n).is_dir()}
        if self.spawned: wide |= {"cit_workbench/**/*.py", "records/**/*"}
        covered = {p.relative_to(at).as_posix() for w in wide for p in at.glob(w)}
        return sorted(names - covered) + sorted(wide)


# --- execute -------------------------------------------------------------------------------------------------------

def cache(at):
    "Where pages keep what they train for each other; another folder for other code."
    return at/"_site/work/cache"/state(["cit_workbench/**/*.py", "constraints.txt"], at)


def execute(path, at, out):
    "Run a notebook from top to bottom as the tests do, with figures that live in a page; seconds, and the error if any."
    from execnb.nbio import nb2str, read_nb
    from execnb.shell import CaptureShell
    os.environ.update(IN_TEST="1", CIT_QUIET="1", PYTHONPATH=str(at), CIT_CACHE=str(cache(at)))
    sys.path.insert(0, str(at)); os.chdir(path.parent)
    start, seen = time.time(), Seen(at)
    nb, shell = read_nb(path), CaptureShell(path, mpl_format="retina")
    cells = [c for c in nb.cells if not left_out(c)]
    for c in cells: c["outputs"] = []
    _show_figures(shell)
    try: shell.run_all(nb, exc_stop=True, preproc=left_out); error = None
    except BaseException: error = shell.prettytb(fname=path)
    took, failed = time.time() - start, lambda o: "Traceback (most recent call last)" in str(o) or o["output_type"] == "error"
    if error := error or next((str(o) for c in cells for o in c["outputs"] if failed(o)), None): return took, error
    for c in cells: c["outputs"] = [o for o in c["outputs"] if o.get("data", True) and o.get("name") != "stderr"]
    write(out, nb2str(nb))
    names = seen.names()
    edited = any(p.is_file() and p.stat().st_mtime > start for p in files(names, at))
    write(out.with_suffix(".json"), json.dumps({"seconds": round(took, 1), "reads": names, "state": "edited meanwhile" if edited else state(names, at)}))
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


def forks(workers):
    "Processes for one task each, forked from one that has imported what all need."
    ctx = mp.get_context("forkserver"); ctx.set_forkserver_preload(list(WARM))
    return ProcessPoolExecutor(workers, ctx, max_tasks_per_child=1)


def run_all(pages, at, out, workers=2):
    "Execute the pages that are not current in `out`, each in a process of its own; seconds by page. Ends with the errors of all that fail."
    todo, took, errors, was = [p for p in pages if not current(out[p], at)], {}, {}, read(at/HELD)
    if not todo: return took
    from tqdm.auto import tqdm
    cost = {p: was.get(p.relative_to(at).as_posix(), {}).get("seconds", 10) for p in todo}
    todo.sort(key=lambda p: -cost[p]) # the long ones first, so that no core waits for one of them at the end
    with forks(workers) as pool, tqdm(total=sum(cost.values()), bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left") as bar:
        for job in as_completed(jobs := {pool.submit(execute, p, at, out[p]): p for p in todo}):
            page = jobs[job]
            took[page], error = job.result()
            if error: errors[page] = error
            bar.set_description_str(f"executed {len(took)} of {len(todo)} pages", refresh=False); bar.update(cost[page])
    if errors: sys.exit("\n\n".join(f"{p.relative_to(at)} fails:\n{e}" for p, e in errors.items()))
    return took


# --- what need not be executed -------------------------------------------------------------------------------------

def current(out, at):
    "Is what `out` holds still what executing its page would give?"
    made = read(out.with_suffix(".json"))
    return out.is_file() and "reads" in made and state(made["reads"], at) == made["state"]


def held(pages, at):
    "{page: what its outputs were made from}, for notebooks that hold what executing them would give."
    was = {at/n: m for n, m in read(at/HELD).items()}
    return {p: was[p] for p in pages if p in was and digest(p, outputs=True) == was[p]["holds"] and state(was[p]["reads"], at) == was[p]["state"]}


def replay(pages, at, out):
    "Take over the outputs that notebooks hold, where none are current; how many."
    todo = {p: m for p, m in held(pages, at).items() if not current(out[p], at)}
    for p, m in todo.items():
        write(out[p], p.read_text())
        write(out[p].with_suffix(".json"), json.dumps({k: m[k] for k in ("seconds", "reads", "state")}))
    return len(todo)


def hold(pages, at, out):
    "Write the outputs into the notebooks, and beside them what they were made from; cells that are not executed here stay."
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb
    if edited := [p.relative_to(at).as_posix() for p in pages if not current(out[p], at)]:
        sys.exit(f"something that {', '.join(edited)} read was edited while it ran; run this again")
    rows = {}
    for p in pages:
        nb = read_nb(p)
        for c, ran in zip(nb.cells, read_nb(out[p]).cells, strict=True):
            if not left_out(c): c["outputs"] = ran["outputs"]
        clean_nb(nb, allowed_cell_metadata_keys=["tags"]); write(p, nb2str(nb))
        rows[p.relative_to(at).as_posix()] = read(out[p].with_suffix(".json")) | {"holds": digest(p, outputs=True)}
    write(at/HELD, "{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(m)}" for n, m in rows.items()) + "\n}\n")
