"""Twenty thousand events through an open view: memory of kernel and page, and what the view takes of the time.

python tools/soak.py [EVENTS] [SECONDS]
"""
import json
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/"tests"))
from lab import Lab, browser, notebook, server  # noqa: E402

TASKS, LAYERS = [f"task-{i}" for i in range(8)], 4
CELL = """import psutil
from cit_workbench.dashboard import Forgetting
v = Forgetting({run!r})
me = psutil.Process()
v"""
ASK = "me.memory_info().rss, sum(me.cpu_times()[:2]), v.story.step"


def event(i, n):
    "A step, or every tenth time a frame of the watcher."
    t = i*len(TASKS)//n; task = TASKS[t]
    if i % 10: return {"kind": "step", "task": task, "phase": "tune", "step": i, "global": i, "loss": 2/(i % 100 + 1), "added": 0., "lr": 1e-3, "grad_norm": 1., "stats": {"penalty": i/n}}
    old = {"nll": i/n, "choice": 80., "valid": 90., "formatted": 100 - 90*i/n, "drift": [.1]*LAYERS, "cka": [.9]*LAYERS, "angle": [20.]*LAYERS, "angle_mean": [9.]*LAYERS, "grad_cos": .1, "grad_cos_layers": [.1]*LAYERS, "answers": [["red", [task]]]*4}
    return {"kind": "watch", "task": task, "phase": "tune", "step": i, "global": i, "tasks": {k: old for k in TASKS[:t + 1]}, "stats": {}}


def main(n=20_000, seconds=100.):
    with tempfile.TemporaryDirectory() as d, browser() as b:
        d = Path(d); run = d/"run"; run.mkdir()
        (run/"run.json").write_text(json.dumps({"config": {"method": "finetune", "stream": "shapes", "stream_args": {}, "seed": 0}, "columns": [[t, "stream"] for t in TASKS], "rows": ["start", *TASKS]}))
        notebook(d/"x.ipynb", CELL.format(run=str(run)), "json_ = __import__('json')")
        with server(d) as (at, token):
            lab = Lab(b, at, token, "x.ipynb"); lab.run_all()
            lab.view().wait_for(timeout=240_000)
            cdp = lab.page.context.new_cdp_session(lab.page); cdp.send("Performance.enable")
            def measure():
                got = lab.page.evaluate("""async code => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; let out = '';
                    const f = k.requestExecute({code, silent: false, store_history: false}); f.onIOPub = m => { if (m.header.msg_type === 'execute_result') out = m.content.data['text/plain']; }; await f.done; return out }""", ASK)
                cdp.send("HeapProfiler.collectGarbage")
                page = {m["name"]: m["value"] for m in cdp.send("Performance.getMetrics")["metrics"]}
                rss, cpu, step = eval(got, {})
                return {"kernel_MB": rss/1e6, "page_MB": page["JSHeapUsedSize"]/1e6, "cpu_s": cpu, "step": step, "wall": time.time()}
            parts, out = 10, []
            with open(run/"events.jsonl", "a") as f:
                for k in range(parts):
                    for i in range(k*n//parts, (k + 1)*n//parts):
                        f.write(json.dumps(event(i, n)) + "\n")
                        if i % 50 == 49: f.flush(); time.sleep(seconds*50/n)
                    f.flush()
                    end = time.time() + 120
                    while (m := measure())["step"] < (k + 1)*n//parts - 10 and time.time() < end: time.sleep(1)
                    out.append(m); print({a: round(x, 1) for a, x in m.items() if a != "wall"}, flush=True)
            settled, last = out[parts//5 - 1], out[-1]
            wall = last["wall"] - settled["wall"]
            print({"events": n, "kernel": f"{100*(last['kernel_MB']/settled['kernel_MB'] - 1):+.1f} %", "page": f"{100*(last['page_MB']/settled['page_MB'] - 1):+.1f} %",
                   "kernel CPU": f"{100*(last['cpu_s'] - settled['cpu_s'])/wall:.1f} % of {wall:.0f} s", "CPU per event": f"{1e3*(last['cpu_s'] - settled['cpu_s'])/(last['step'] - settled['step']):.2f} ms"})


if __name__ == "__main__": main(*(f(a) for f, a in zip((int, float), sys.argv[1:])))
