"""Run what the gates of the testbed are judged by, and pack each run into records/testbed.

    python tools/testbed.py [--jobs 2] [NAME …]     names as in `cit_workbench.experiments.testbed.gate_runs`; finished runs are not run again
    python tools/testbed.py --lock                  judge the records; where every gate is passed, write testbed.lock
    python tools/testbed.py --starts                the runs of `start_runs`, into records/starts, and the records of the starts themselves;
                                                    first, for S in 0 1 2: python -m cit_workbench.starts starts/S --seed S
"""
import argparse
import os
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CIT_QUIET", "1")
root = Path(__file__).resolve().parents[1]


def one(name):
    "Train one run, pack it, say how long it took."
    import time

    from cit_workbench import Run
    from cit_workbench.record.packing import pack
    from cit_workbench.experiments.gates import gate_runs, start_runs
    began, gates = time.time(), gate_runs()
    os.chdir(root)
    rec = Run(**(gates | start_runs())[name], out=str(root/"runs/testbed"/name)).train()
    pack(rec.path, root/f"records/{'testbed' if name in gates else 'starts'}/{name}.jsonl", steps=40)
    return name, time.time() - began


def made():
    "Pack the records of the starts of three seeds."
    import json

    from cit_workbench.core.files import write_atomic
    (root/"records/starts").mkdir(parents=True, exist_ok=True)
    for s in range(3):
        found = {p.parent.name: json.loads(p.read_text()) for p in sorted((root/f"starts/{s}").glob("*/start.json"))}
        write_atomic(root/f"records/starts/{s}.json", json.dumps(found) + "\n")


def lock():
    "Judge the records and freeze what they stand on; raises `CitError` where a gate failed."
    import json

    from cit_workbench.models.backbone import start_hash
    from cit_workbench.core.errors import CitError
    from cit_workbench.core.files import write_atomic
    from cit_workbench.core.paths import assets
    from cit_workbench.record.record import Record
    from cit_workbench.experiments.testbed import frozen
    from cit_workbench.experiments.gates import gate_runs, judged, stale
    runs = {n: Record(f) for n in gate_runs() if (f := root/f"records/testbed/{n}.jsonl").exists()}
    if old := stale(runs): raise CitError(f"the records {', '.join(old)} are of other data, weights or settings: delete them and run them again")
    gates = judged(runs)
    for g in gates: print("passed" if g["passed"] else "FAILED", g["gate"], "|", g["value"], "|", g["needed"])
    starts = {p.parent.name: start_hash(p.parent.name) for p in sorted(assets().glob("*/config.json"))}
    return write_atomic(assets("testbed.lock"), json.dumps(frozen(starts, gates), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    from cit_workbench.core.paths import progress
    from cit_workbench.experiments.gates import gate_runs, start_runs
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--lock", action="store_true")
    p.add_argument("--starts", action="store_true")
    a = p.parse_args()
    if a.lock: raise SystemExit(print(lock()))
    if a.starts: made()
    wanted, folder = (start_runs(), "starts") if a.starts else (gate_runs(), "testbed")
    names = a.names or [n for n in wanted if not (root/f"records/{folder}/{n}.jsonl").exists()]
    print(f"{len(names)} runs, about {2*len(names)//a.jobs} minutes with {a.jobs} jobs", flush=True)
    with get_context("spawn").Pool(a.jobs) as pool:
        for n, s in progress(pool.imap(one, names), total=len(names), desc="testbed"): print(f"{n} {s:.0f} s", flush=True)
