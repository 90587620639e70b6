"""Make what the README shows: run sweeps/demo.toml, pack its runs into records/demo, draw figures/."""
import sys
from pathlib import Path

from cit_workbench.analysis import figures
from cit_workbench.record import Record, pack
from cit_workbench.sweep import sweep

root = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    done = sweep(root/"sweeps/demo.toml", workers=2, force=True)
    if done.failed: sys.exit(done.sentence)
    for old in root.glob("records/demo/*.jsonl"): old.unlink()
    for run in done.runs: print(pack(run, root/"records/demo"/f"{Record(run).config['method']}.jsonl"))
    for path in figures(root/"records/demo", root/"figures", reports=False): print(path)
