"Tiny runs that keep their net, processes for them, and what two runs must have in common."
import json
import os
import socket
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import sklearn.datasets  # noqa: F401  (forked processes find it imported)
import torch

from cit_workbench.models.slots import SlotLinear, swap_linears
from cit_workbench.training.checkpoint import checkpoints, read_checkpoint
from cit_workbench.core.digests import canonical
from cit_workbench.contract.method import Method
from cit_workbench.data.stream import get_stream
from cit_workbench.training.train import Run

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
TASKS = ["col-word", "shp-mcq", "col-night"]
OTHERS = [t.name for t, role in get_stream("shapes", tasks=TASKS).roles() if role != "stream"]
ARGS = {
    "eproj": {"key_steps": 2, "n": 8},
    "er+ewc": {"ewc": {"n": 24}},
    "ewc": {"n": 24},
    "fwd_prompt": {"n": 16},
    "mas": {"n": 24},
    "moelora": {"experts": 4},
    "tir": {"n": 24},
}  # what makes a method small enough here, one line each, by name
CHAINS = ["er+ewc", "er+llaca", "er+smolora", "llaca+grouping"]  # what is tested like a method
MORE = {
    "smolora": [{"variant": "soft_topk", "layers": "paper"}, {"variant": "straight_through", "use": "hash"},
                {"variant": "soft_topk", "use": "vu"}, {"use": "if", "layers": "released"}],
}  # further forms of a method that route in other ways, by name
SOME = r".*language_model\.layers\.\d+\.(self_attn\.(q|v|o)|mlp\.down)_proj"
SPEC = {"stream_args": {"tasks": TASKS, "n_train": 96, "n_val": 2, "n_test": 2}, "compute": {"threads": 1},
        "optim": {"steps": 4, "batch": 8, "lr": 3e-3}, "tune": {"r": 8, "alpha": 16., "targets": SOME}}


class Held(Run):
    "A run that keeps its net and the start model's own parameters by their first names."
    def open(self):
        got = super().open()
        self.net = got[0]
        return got

    def insert(self, net):
        self.born = dict(net.model.named_parameters())
        return super().insert(net)


def tiny(out, method="finetune", **fields) -> Held:
    "A run of three tasks of `shapes`, four steps of eight rows each; `fields` are merged into that."
    base = {**SPEC, "method_args": ARGS.get(method, {}) if isinstance(method, str) else {}}
    spec = {k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in {**base, **fields}.items()}
    return Held(method=method, out=str(out), **spec)


def train(out, method="finetune", **fields) -> Held:
    run = tiny(out, method, **fields)
    run.rec = run.train()
    return run


def descend(mp):
    "Plain gradient descent in AdamW's place: small differences stay small, and a wrong scale shows."
    mp.setattr(torch.optim, "AdamW", lambda groups, **kw: torch.optim.SGD(groups))


ONE = {"stream_args": {"tasks": TASKS[:1]}}


def opened(out, method="finetune", **fields) -> Held:
    "A run whose net stands at the beginning of its first task."
    run = tiny(out, method, **fields)
    net, *_ = run.open()
    run.t, task = 1, run.plan.tasks[0]
    net.task, net.timer.now, net.first = task.name, (task.name, "begin", 0, 0), True
    net.seen.append(task.name)
    net.method.begin(net, task)
    net.first = False
    net.refresh()
    return run


def jitter(net, scale=.02, seed=0):
    "Move every trainable parameter, so that adapters act."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.params.values(): p.add_(torch.randn(p.shape, generator=g).to(p)*scale)


def files(folder) -> dict:
    "What the configuration determines: events, answers, result matrix, final checkpoint; as bytes by name."
    folder = Path(folder)
    last = sorted(checkpoints(folder/"checkpoints")[-1].iterdir())
    said = [f for part in ("answers", "adapters") for f in sorted((folder/part).rglob("*")) if f.is_file()]
    out = {str(f.relative_to(folder)): f.read_bytes() for f in [folder/"events.jsonl", *said, *last]}
    return out | {"R": json.dumps(json.loads((folder/"result.json").read_text())["R"]).encode()}


def same_files(a, b):
    "Assert that two run folders hold the same bytes wherever the configuration determines them."
    a, b = files(a), files(b)
    assert a.keys() == b.keys()
    assert [k for k in a if a[k] != b[k]] == []


def untimed(result) -> dict:
    "A result file without its seconds."
    return {k: untimed(v) if isinstance(v, dict) else v for k, v in result.items() if "seconds" not in k}


def everything(folder) -> dict:
    "All files of a run but the clock, as bytes by name: every checkpoint with its optimiser and memory among them."
    folder = Path(folder)
    every = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    result, run = json.loads(every["result.json"]), json.loads(every["run.json"])
    about = {k: run[k] for k in ("asked", "config", "hashes", "protocol", "threads")}
    said = {"result.json": untimed(result), "run.json": about, "clock.jsonl": None}
    return every | {k: canonical(v).encode() for k, v in said.items()}


def differing(a, b) -> list:
    "Names of the files that two run folders do not both hold with the same bytes."
    a, b = everything(a), everything(b)
    return sorted(k for k in {*a, *b} if a.get(k) != b.get(k))


def final(folder, what="weights") -> dict:
    "Tensors of the last task-end checkpoint."
    last = read_checkpoint(checkpoints(Path(folder)/"checkpoints")[-1])
    return last["tensors" if what == "mem" else what]


def same_tensors(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def furthest(a, b) -> float:
    "Largest absolute difference between two dicts of tensors."
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def batch_of(net, task, n=6, start=0, **kw):
    return net.rows([(task, i) for i in range(start, start + n)], task=[task]*n, **kw)


def _call(end, f, args, env):
    try:
        os.environ.update(env)
        end.send((True, f(*args)))
    except BaseException: end.send((False, traceback.format_exc()))


class Forks:
    "New processes, forked from one that has imported everything and done nothing."
    def __init__(self, ctx): self.ctx = ctx

    def start(self, f, *args, **env):
        here, there = self.ctx.Pipe(False)
        env = {"CIT_CACHE": os.environ["CIT_CACHE"]} | env
        p = self.ctx.Process(target=_call, args=(there, f, args, env))
        p.start()
        there.close()
        return p, here

    def join(self, p, here, seconds=900):
        "What the process sends back (plain values and arrays); its exit code when it was killed."
        assert here.poll(seconds), "the process hangs"
        try: ok, got = here.recv()
        except EOFError:
            p.join(10)
            return p.exitcode
        p.join(10)
        assert ok, got
        return got

    def __call__(self, f, *args, **env): return self.join(*self.start(f, *args, **env))

    def world(self, n, f, *args, **env):
        "What each of `n` processes of one group sends back."
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
        started = [self.start(f, *args, **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(n)]
        return [self.join(*s) for s in started]


@dataclass
class Twins(Method):
    "Replays, for every row, the row of the same number of each old task: the same rows however a batch is split."
    weight: float = .5
    strength = "weight"
    leaks = {"old_data"}

    def batch(self, net, batch):
        for k, old in enumerate(net.seen[:-1], 1):
            batch = batch + net.fetch([(old, i) for _, i in batch.refs], group=k)
        return replace(batch, weights={k: self.weight for k in range(1, len(net.seen))})


@dataclass
class Anchor(Method):
    "Pulls every parameter to where the last task left it."
    lam: float = .1
    strength = "lam"

    def loss(self, net, batch, out):
        if "anchor" not in self.mem: return 0.
        return self.lam/2*sum(((p - self.mem["anchor"][n])**2).sum() for n, p in net.params.items())

    def end(self, net, task): self.mem = {"anchor": {n: p.detach().clone() for n, p in net.params.items()}}
    def stats(self, net): return {"anchored": float(len(self.mem))}


@dataclass
class Halves(Method):
    "Two slots in every layer, chosen by the parity of the row's number; slot −1 is none."
    odd: int = 1

    def wrap(self, net):
        def make(base):
            layer = SlotLinear(base, 2, 4.)
            for _ in range(2): layer.add()
            return layer
        g = torch.Generator().manual_seed(0)
        for layer in swap_linears(net.model, SOME, make):
            for a, b in zip(layer.A, layer.B):
                with torch.no_grad(): a.copy_(torch.randn(a.shape, generator=g)*.1)
                a.requires_grad_(True), b.requires_grad_(True)
        return net

    def route(self, net, batch):
        slot = [self.odd if i % 2 else 0 for _, i in batch.refs]
        return replace(batch, route={**batch.route, "slot": torch.tensor(slot)})
