"""Kill runs at named places, resume them, and compare every byte with a run that nobody stopped.

    python tests/kills.py [--exits 480] [--kills 24] [--methods a,b] [--seed 0] [--out FILE.json] [--keep FOLDER]

One process imports everything, trains once and forks: a child trains a short stream and leaves with `os._exit` at a
chosen passing of a named place, or is killed by SIGKILL from outside at a chosen moment. A *life* is one run folder: it
is killed, resumed, killed at a later place, resumed, and so on, and at last it ends. After every exit what lies in the
folder must be a beginning of the run that nobody stopped: events, answers, checkpoints with optimiser and memory. At
the end of a life every file must be the same, the clock excepted, and nothing else may be left.
"""
import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CIT_QUIET", "1")

import torch   # noqa: E402
from peft import PeftModel   # noqa: E402
from tiny import CHAINS, TASKS, differing, train   # noqa: E402
from tqdm import tqdm   # noqa: E402
from transformers.utils.logging import disable_progress_bar   # noqa: E402

import cit_workbench.contract.gradients as gradients_module  # noqa: E402
import cit_workbench.training.checkpoint as checkpoint_module  # noqa: E402
import cit_workbench.record.writer as record_module  # noqa: E402
from cit_workbench.training.checkpoint import checkpoints, read_checkpoint   # noqa: E402
from cit_workbench.core.digests import rng   # noqa: E402
from cit_workbench.contract.method import parts  # noqa: E402
from cit_workbench.contract.net import Net  # noqa: E402
from cit_workbench.contract.registry import all_methods  # noqa: E402
from cit_workbench.record.writer import RecordWriter  # noqa: E402
from cit_workbench.training.about import git_state  # noqa: E402
from cit_workbench.training.train import Run  # noqa: E402
from cit_workbench.measure.watch import Watcher   # noqa: E402

STREAM = {"stream_args": {"tasks": TASKS[:2]}, "compute": {"save_every": 2}, "optim": {"steps": 5, "accum": 2},
          "probe_every": 3}
WATCHED = {"watch": {"every": 2, "full": 4, "rows": 3, "share": 0.}}
SEEN = "@watch"  # after a method's name: with probes of old tasks
LEFT, BROKE, OUTSIDE = 77, 78, "SIGKILL from outside"


def methods() -> list:
    "Every method there is, some chains, and one with probes of old tasks."
    return [*all_methods(), *CHAINS, "er" + SEEN]


def trains(out, method):
    "A run of a method by its name here."
    return train(out, method.removesuffix(SEEN), **STREAM, **(WATCHED if method.endswith(SEEN) else {}))


# Places

class Marks:
    "Counts the passings of named places; leaves the process at a chosen one."
    def __init__(self, run, at=None):
        self.run, self.at, self.seen, self.counts, self.moment = run, at, [], Counter(), ("open",)

    def __call__(self, place, *detail, before=None):
        key = (place, *map(str, self.moment), *map(str, detail))
        self.counts[key] += 1
        mark = [place, "/".join(key[1:]), self.counts[key]]
        self.seen.append(mark)
        if mark == self.at:
            if before: before()
            os._exit(LEFT)

    def moves(self, *moment):
        self.moment = moment
        self.counts.clear()

    @contextmanager
    def during(self, *moment):
        was, self.moment = self.moment, moment
        try: yield
        finally: self.moment = was

    def name(self, path) -> str:
        "A path inside the run folder, without the random part of temporary names."
        path = os.path.relpath(str(path), self.run)
        return re.sub(r"\.tmp-[a-z0-9_]{8}$", ".tmp", path) if not path.startswith("..") else "the store of answers"


def around(owner, hook, before=None, after=None):
    "Look at every call of a function."
    f = getattr(owner, hook)

    def g(*args, **kw):
        if before: before(*args, **kw)
        out = f(*args, **kw)
        if after: after(*args, **kw)
        return out
    setattr(owner, hook, g)


def both(mark, owner, hook, place):
    "Mark both ends of a function."
    def look(*when): return lambda *a, **kw: mark(place, hook, *when)
    around(owner, hook, look(), look("done"))


def within(owner, hook, manager):
    "Call a function inside a context."
    f = getattr(owner, hook)

    def g(*args, **kw):
        with manager(*args, **kw): return f(*args, **kw)
    setattr(owner, hook, g)


def watch_training(mark):
    "Steps, hooks, services of hooks."
    hooks = dict.fromkeys(("batch", "loss", "grads", "update", "step"), "inside a hook of a step")
    hooks |= {"begin": "inside begin", "end": "inside end"}

    def hooked(when):
        def look(net, f, *args):
            if f.__name__ in hooks: mark(hooks[f.__name__], f.__name__, when)
        return look

    def service(what):
        def look(net, *args, **kw):
            if net.inside and net.clock[1] in ("begin", "end"): mark(hooks[net.clock[1]], what)
        return look

    def forward(net, batch):
        if net.clock[3] > 0 and not net.inside: mark("mid-accumulation")
    around(Net, "tick", after=lambda net, *args, **kw: mark.moves(*net.clock))
    around(Net, "hook", hooked("entered"), hooked("done"))
    for what in ("rows", "grad", "__call__", "carried"): around(Net, what, service(what))
    around(Net, "forward", forward)
    for f in ("linear_gradients", "loop_gradients"): both(mark, gradients_module, f, "mid-importance")
    around(torch.optim.AdamW, "step", after=lambda *a, **kw: mark("between the optimiser and its hooks"))
    around(Run, "one_step", after=lambda *a: mark("between a step and its event"))
    both(mark, Run, "probe", "inside a probe")
    for f in ("probe", "light", "gradient", "answers"): both(mark, Watcher, f, "inside a probe of old tasks")


def watch_chain(run, mark):
    "Between the parts of a chain, inside `begin` and `end`."
    def look(hook): return lambda *a: mark(f"inside {hook}", "between parts")
    for m in parts(run.m)[1:]:
        for hook in ("begin", "end"): around(type(m), hook, look(hook))


def watch_record(mark):
    "Rows, answers, events, the result file."
    def row(run, net, w, t, name):
        if t: mark("between a checkpoint and its row")

    def half(path, line):
        with open(path, "ab") as f: f.write(line[:20])

    def appended(path, row):
        what = mark.name(path), row["kind"]
        mark("half a line written", *what, before=lambda: half(path, record_module.canonical(row).encode()))
        append(path, row)
        mark("after a line of the record", *what)

    def cut(when):
        def look(w, n):
            if n: mark("inside a resume", when)
        return look
    append, record_module.append_jsonl = record_module.append_jsonl, appended
    within(Run, "row", lambda run, net, w, t, name: mark.during("row", t))
    around(Run, "row", row)
    both(mark, Net, "answer", "mid-evaluation")
    around(RecordWriter, "answers", lambda w, t, column, lines: mark("between answer files", column))
    around(RecordWriter, "row", lambda *a: mark("between the answers and their row"))
    around(RecordWriter, "finish", lambda *a: mark("inside finish"))
    within(RecordWriter, "finish", lambda *a: mark.during("finish"))
    around(RecordWriter, "truncate", cut("before the cut"), cut("after the cut"))
    around(Run, "load", lambda *a: mark("inside a resume", "before the load"))


def watch_files(mark):
    "Checkpoints file by file, and what the disk is told."
    def saving(run, net, w, stage, phase=0, step=0, **kw): return mark.during("save", run.t, stage, phase, step)

    def written(when):
        def look(path, data):
            name = "mem" if path.name.startswith("mem-") else path.name
            mark(f"{when} {'the manifest' if name == 'manifest.json' else 'a file of a checkpoint'}", name)
        return look

    def dropped(path):
        if path.exists(): mark("while old checkpoints go", path.name)

    def synced(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        at = mark.name(path)
        if os.path.isfile(path) and not at.endswith(".jsonl"):
            mark("before a file is synced", at)
            mark("half a file written", at, before=lambda: os.truncate(path, os.path.getsize(path)//2))
        else: mark("before a folder or record is synced", at)
        fsync(fd)

    def replaced(a, b):
        mark("before a rename", mark.name(b))
        replace(a, b)
        mark("after a rename", mark.name(b))
    within(Run, "save", saving)
    around(Run, "save", lambda *a, **kw: mark("between the record and a checkpoint"))
    both(mark, PeftModel, "save_pretrained", "around the adapter's files")
    around(checkpoint_module, "write_atomic", written("before"), written("after"))
    around(checkpoint_module, "rename", lambda *a: mark("before a checkpoint gets its name"),
           lambda *a: mark("after a checkpoint got its name"))
    around(checkpoint_module, "_drop", dropped, lambda path: mark("while old checkpoints go", path.name, "done"))
    fsync, replace = os.fsync, os.replace
    os.fsync, os.replace = synced, replaced


# Children

def warm(work):
    "Train once, so that children find everything imported; a process with one thread may fork after that."
    os.environ["CIT_CACHE"] = str(Path(work)/"store"/"warm")
    disable_progress_bar()
    train(Path(work)/"warm", "finetune", **STREAM)


def child(f, *args, log=None) -> int:
    "Process number of a fork that calls `f` and leaves."
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork(): return pid
    try:
        signal.alarm(1800)
        warnings.simplefilter("ignore")
        f(*args)
    except BaseException:
        if log: Path(log).write_text(traceback.format_exc())
        os._exit(BROKE)
    os._exit(0)


def ended(pid) -> int:
    "Exit code; minus the signal that killed it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trained(out, method, store, at=None, marks=None):
    "Train or resume in this process; leave at the mark `at`, or write those passed and every manifest to `marks`."
    os.environ["CIT_CACHE"] = str(store)
    if at or marks:
        mark = Marks(out, at)
        for watch in (watch_training, watch_record, watch_files): watch(mark)
        within(Run, "train", lambda run: watch_chain(run, mark) or mark.during("open"))
    manifests = {}
    if marks:
        f = checkpoint_module.rename
        def noted(tmp, path):
            manifests[path.name] = (tmp/"manifest.json").read_text()
            f(tmp, path)
        checkpoint_module.rename = noted
    trains(out, method)
    if marks: Path(marks).write_text(json.dumps({"marks": mark.seen, "manifests": manifests}))


class Whole:
    "A run that nobody stopped: its files, the marks it passed, the manifests of all its checkpoints."
    def __init__(self, work, method):
        work = Path(work)
        work.mkdir(exist_ok=True)
        self.method, self.folder = method, work/"whole"/method
        tic, marks, log = time.time(), work/f"{method}.marks", work/f"{method}.log"
        done = ended(child(trained, self.folder, method, work/"store"/f"{method}-whole", None, marks, log=log))
        if done: raise SystemExit(f"{method} does not run:\n{log.read_text()}")
        self.seconds = time.time() - tic
        said = json.loads(marks.read_text())
        self.marks, self.manifests = said["marks"], said["manifests"]
        self.events = (self.folder/"events.jsonl").read_bytes()

    def by_place(self) -> dict:
        got = defaultdict(list)
        for i, (place, *_) in enumerate(self.marks): got[place].append(i)
        return got

    def begins_with(self, out) -> list:
        "What in a stopped run is not a beginning of this one."
        out, bad = Path(out), []
        events = (out/"events.jsonl").read_bytes() if (out/"events.jsonl").exists() else b""
        if not self.events.startswith(events[:events.rfind(b"\n") + 1]): bad.append("events.jsonl")
        for f in out.glob("answers/*/*.jsonl"):
            if f.read_bytes() != (self.folder/f.relative_to(out)).read_bytes(): bad.append(str(f.relative_to(out)))
        for path in checkpoints(out/"checkpoints"):
            try: same = read_checkpoint(path) and (path/"manifest.json").read_text() == self.manifests.get(path.name)
            except Exception as e: same = print(e)
            if not same: bad.append(str(path.relative_to(out)))
        return bad


class Life:
    "One run folder that is killed and resumed until it ends."
    def __init__(self, work, whole, number):
        self.whole, self.number, self.work = whole, number, Path(work)
        self.out = self.work/"lives"/f"{whole.method}-{number}"
        self.log = self.out.with_suffix(".log")
        self.out.parent.mkdir(exist_ok=True)
        self.exits, self.bad, self.children = [], [], 0

    def store(self):
        "Every other life keeps one store of answers; in the rest each child answers for itself."
        self.children += 1
        return self.work/"store"/f"{self.whole.method}-{self.number}-{0 if self.number % 2 else self.children}"

    def why(self, code) -> str: return self.log.read_text() if code == BROKE else f"exit code {code}"

    def stopped(self, place):
        self.exits.append(place)
        self.bad += [f"after a kill {place}: {name}" for name in self.whole.begins_with(self.out)]

    def leave(self, at) -> bool:
        "Train on and leave at a mark; False when it was not passed and the run ended."
        code = ended(child(trained, self.out, self.whole.method, self.store(), at, log=self.log))
        if code == LEFT: self.stopped(at[0])
        elif code: self.bad.append(f"on the way to {at}: {self.why(code)}")
        return code == LEFT

    def killed(self, seconds) -> bool:
        "Train on and be killed from outside after some seconds; False when the run had ended."
        pid = child(trained, self.out, self.whole.method, self.store(), log=self.log)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        if (code := ended(pid)) == -signal.SIGKILL: self.stopped(OUTSIDE)
        elif code: self.bad.append(f"before a SIGKILL: {self.why(code)}")
        return code == -signal.SIGKILL

    def ends(self) -> list:
        "Resume to the end; what differs from the run that nobody stopped."
        code = ended(child(trained, self.out, self.whole.method, self.store(), log=self.log))
        if code: self.bad.append(f"on the way to the end: {self.why(code)}")
        else: self.bad += differing(self.out, self.whole.folder)
        if not self.bad: shutil.rmtree(self.out)
        for f in self.work.glob(f"store/{self.whole.method}-{self.number}-*"): shutil.rmtree(f)
        return self.bad


RESUMES = [["inside a resume", at, 1] for at in
           ("open/before the load", *(f"start/wrap/0/-1/{when} the cut" for when in ("before", "after")))]


def chosen(whole, n, g, used) -> list:
    "Marks to leave at, in the order of the run; of places used least by this method, then by all (`used`), at random."
    left = {p: list(g.permutation(at)) for p, at in sorted(whole.by_place().items()) if p != "inside a resume"}
    turn, own, picked = {p: g.random() for p in left}, Counter(), []
    while len(picked) < n and left:
        p = min(left, key=lambda p: (own[p], used[p], turn[p]))
        picked.append(int(left[p].pop()))
        own[p] += 1
        used[p] += 1
        if not left[p]: del left[p]
    return [whole.marks[i] for i in sorted(picked)]


def live(work, whole, targets, number, said, resumes=()):
    "A life through some marks; the marks that could not be reached."
    life, missed, resumes = Life(work, whole, number), [], list(resumes)
    for k, at in enumerate(targets):
        if life.bad: break
        if not life.leave(at): missed.append(at); break
        said(life)
        if resumes and any((life.out/"checkpoints").glob("[0-9]*")) and life.leave(resumes.pop(0)): said(life)
    missed += targets[k + 1:] if missed or life.bad else []
    life.ends()
    return life, missed


def kill_all(work, names, exits, kills, seed=0, said=lambda life: None, length=12, again=True) -> list:
    "All lives of all methods; in `again`, resumes are killed too."
    lives, g, used = [], rng(seed, "kills"), Counter()
    whole = {m: Whole(work, m) for m in names}
    share = {m: 0 for m in names}
    while sum(share.values()) < exits and any(share[m] < len(whole[m].marks) for m in names):
        for m in names: share[m] += share[m] < len(whole[m].marks) and sum(share.values()) < exits
    for m in names:
        todo, number = chosen(whole[m], share[m], g, used), 0
        while todo:
            rest = []
            for k in range(n := -(-len(todo)//length)):
                number += 1
                life, missed = live(work, whole[m], todo[k::n], number, said, RESUMES if k == 0 and again else ())
                lives.append(life)
                rest += missed if len(missed) < len(todo[k::n]) else missed[1:]
            todo = sorted(rest, key=whole[m].marks.index)
    done = 0
    for k in range(10*kills):
        if done >= kills: break
        m = whole[names[k % len(names)]]
        life = Life(work, m, 1000 + k)
        lives.append(life)
        for _ in range(3):
            if done < kills and life.killed(float(g.uniform(.02, m.seconds))): done += 1; said(life)
            else: break
        life.ends()
    return lives


# The table

def table(lives) -> tuple:
    "(counts by place and method, text)"
    names, counts = list(dict.fromkeys(l.whole.method for l in lives)), defaultdict(Counter)
    for l in lives:
        for p in l.exits: counts[p][l.whole.method] += 1
    places = sorted(counts, key=lambda p: (p == OUTSIDE, p))
    row = lambda head, c: [head, *(str(c[m] or "·") for m in names), str(sum(c.values()))]
    rows = [["place", *names, "all"], *(row(p, counts[p]) for p in places), row("all", sum(counts.values(), Counter()))]
    width = [max(map(len, c)) for c in zip(*rows)]
    text = "\n".join("  ".join([r[0].ljust(width[0]), *map(str.rjust, r[1:], width[1:])]) for r in rows)
    return {p: dict(sorted(counts[p].items())) for p in places}, text


def few(work, exits, kills, seed=0) -> list:
    "Some kills over all methods in turn: (place, method) of each, and what did not survive."
    torch.set_num_threads(1)
    warm(work)
    lives = kill_all(work, methods(), exits, kills, seed, again=False)
    return [(p, l.whole.method) for l in lives for p in l.exits], [(l.whole.method, l.bad) for l in lives if l.bad]


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--exits", type=int, default=480, help="exits at named places")
    a.add_argument("--kills", type=int, default=24, help="SIGKILLs from outside")
    a.add_argument("--methods", default="", help="names with commas between; default: every method and some chains")
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--out", default="", help="where the summary is written")
    a.add_argument("--keep", default="", help="folder for the runs; those that survived are removed")
    a = a.parse_args()
    torch.set_num_threads(1)
    names, tic = a.methods.split(",") if a.methods else methods(), time.time()
    work = Path(a.keep or tempfile.mkdtemp(prefix="kills-"))
    work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    warm(work)
    one = Whole(work/"first", names[0]).seconds
    total = a.exits + a.kills
    print(f"{len(names)} methods, {a.exits} exits, {a.kills} SIGKILLs, one process: "
          f"about {(len(names)*1.5*one + total*one*.55)/60:.0f} minutes", flush=True)
    with tqdm(total=total, unit="kill", dynamic_ncols=True, mininterval=1 if sys.stderr.isatty() else 30) as bar:
        def said(life):
            bar.set_postfix_str(life.whole.method, refresh=False)
            bar.update()
        lives = kill_all(work, names, a.exits, a.kills, a.seed, said)
    counts, text = table(lives)
    failed = [l for l in lives if l.bad]
    outside = sum(counts.get(OUTSIDE, {}).values())
    inside = sum(len(l.exits) for l in lives) - outside
    lost = sum(len(l.exits) for l in failed)
    seconds, cpu = time.time() - tic, sum(os.times()[:4])
    print(text)
    for l in failed: print(f"FAILED {l.whole.method}, kept in {l.out}: {l.bad[:4]}")
    print(f"{inside} exits and {outside} SIGKILLs in {len(lives)} lives: {inside + outside - lost} survived, "
          f"{lost} in lives that failed; {seconds:.0f} s, {cpu:.0f} s of them computing")
    if a.out:
        versions = {p: version(p) for p in ("torch", "transformers", "peft", "safetensors", "numpy")}
        said = {"exits": inside, "sigkills": outside, "survived": inside + outside - lost, "lives": len(lives),
                "failed_lives": len(failed), "seconds": round(seconds), "cpu_seconds": round(cpu), "seed": a.seed,
                "threads": 1, "stream": STREAM, "versions": versions, "git": git_state(), "places": counts}
        Path(a.out).parent.mkdir(exist_ok=True)
        Path(a.out).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
    if not failed and not a.keep: shutil.rmtree(work)
    sys.exit(bool(failed) or inside < a.exits or outside < a.kills)


if __name__ == "__main__": main()
