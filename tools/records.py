"""Make what the README and the home page show: run sweeps/demo.toml, pack its runs into records/demo, measure similarity and
spectra of `shapes` into records/collected, draw figures/. With --figures, only draw."""
import sys
from pathlib import Path

from cit_workbench.figures.analysis import figures
from cit_workbench.measure.collect import collect
from cit_workbench.record.packing import pack
from cit_workbench.record.record import Record
from cit_workbench.measure.collected import only, write_collected
from cit_workbench.experiments.sweep import sweep

root = Path(__file__).resolve().parents[1]

small = r"(tower/visual|features/\w+)/(cosine|null)|layer 3/\w+/cosine|input/\w+/(cap|crowding|raw/(values|band)|centred/(energy|split))"


def measure():
    "Train the demo's methods, look at the tasks of `shapes`."
    done = sweep(root/"sweeps/demo.toml", workers=2, force=True)
    if done.failed: sys.exit(done.sentence)
    for old in root.glob("records/demo/*.jsonl"): old.unlink()
    for run in done.runs: print(pack(run, root/"records/demo"/f"{Record(run).config['method']}.jsonl"))
    print(write_collected(root/"records/collected/shapes.npz", only(collect(n=100, layers=[3]), small)))


if __name__ == "__main__":
    if "--figures" not in sys.argv: measure()
    for path in figures(root/"records/demo", root/"figures", reports=False): print(path)
    for path in figures([root/"records"/d for d in ("testbed", "zoo", "collected")], root/"figures", only=("one-task", "matrices", "likeness", "spectra")): print(path)
