"""What an open Forgetting view takes from training: the same run with and without one in a kernel beside it, in turn.

python tools/overhead.py [PAIRS]

Printed are, with their spread over pairs: seconds of training with the view over those without; CPU time of the kernel
while the view was open, over CPU time of the trainer and over wall clock, which are the same where the trainer has a
core of its own; and the CPU time it takes to open. The page that draws is not counted: it is a browser's.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from jupyter_client.manager import start_new_kernel

from cit_workbench.record.record import Record

TRAIN = """from cit_workbench import Run
tasks = {{"tasks": ["col-word", "col-mcq", "col-night"], "n_val": 16, "n_test": 8}}
Run(method="ewc", stream="shapes", stream_args=tasks, optim={{"steps": 40}}, watch={{"every": 10, "full": 20, "share": 0.}},
    compute={{"threads": 1}}, out={out!r}).train()"""
VIEW = "v = Forgetting({run!r}, dark=False)"


class Kernel:
    "A kernel that is asked to run cells, and its CPU time."
    def __init__(self):
        self.manager, self.client = start_new_kernel()
        self.process = psutil.Process(self.manager.provisioner.pid)
        self.do("from cit_workbench.dashboard import Forgetting")
    def do(self, code):
        reply = self.client.execute_interactive(code, timeout=120, output_hook=lambda m: None)
        assert reply["content"]["status"] == "ok", reply["content"]
    def close(self): self.client.stop_channels(); self.manager.shutdown_kernel(now=True)


def cpu(process): return sum(process.cpu_times()[:2])


def run(out, kernel=None):
    "Train; seconds of training, and with a kernel the CPU time of opening the view and its share while it was open."
    p = psutil.Popen([sys.executable, "-c", TRAIN.format(out=str(out))], stderr=subprocess.DEVNULL)
    while not (out/"run.json").is_file(): assert p.poll() is None, "the run has failed"; time.sleep(.1)
    if not kernel: assert p.wait() == 0; return {"train_s": Record(out).seconds("train")}
    before = cpu(kernel.process); kernel.do(VIEW.format(run=str(out)))
    now = lambda: np.array([cpu(kernel.process), cpu(p), time.time()])
    opened = got = now()
    while p.poll() is None:
        try: got = now()
        except (psutil.NoSuchProcess, psutil.ZombieProcess): break
        time.sleep(.2)
    assert p.wait() == 0
    kernel.do("assert v.story.step == 120, v.story.step; v.close()")
    took, of, wall = got - opened
    seconds = Record(out).seconds("train")
    return {"train_s": seconds, "open_cpu_s": opened[0] - before, "share": took/of, "of_wall": took/wall}


def main(pairs=3):
    kernel, found = Kernel(), []
    try:
        with tempfile.TemporaryDirectory() as d:
            for k in range(pairs):
                pair = {}
                for view in ((True, False) if k % 2 else (False, True)):
                    pair[view] = run(Path(d)/f"{k}-{view}", kernel if view else None)
                found.append(pair)
                print(json.dumps({"with": pair[True], "without": pair[False]}), flush=True)
    finally: kernel.close()
    spread = lambda x: f"{np.mean(x):.4f} ({min(x):.4f} to {max(x):.4f})"
    print({"pairs": pairs, "seconds with / without": spread([p[True]["train_s"]/p[False]["train_s"] for p in found]),
           "kernel CPU / trainer CPU": spread([p[True]["share"] for p in found]),
           "kernel CPU / wall": spread([p[True]["of_wall"] for p in found]),
           "CPU seconds to open": spread([p[True]["open_cpu_s"] for p in found])})


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
