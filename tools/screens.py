"""Pictures of the live views in JupyterLab, light and dark: figures/dashboard-VIEW-light.png; needs Chromium.

python tools/screens.py RUNS COLLECTED PAIRS [VIEW …]

RUNS: a folder with runs `eight` (shapes, watched), `ewc` and `er` (four tasks, watched); COLLECTED: what `collect`
wrote; PAIRS: what `pairwise` wrote
"""
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/"tests"))
from lab import Lab, browser, notebook, server  # noqa: E402


def cells(runs, collected, pairs):
    "What makes each view."
    similarity = f"v = Similarity('{collected}', '{runs}/eight', '{root}/records/testbed', '{pairs}')"
    return {"forgetting": f"v = Forgetting('{runs}/ewc', '{runs}/er'); v.stat.value = 'penalty'; v",
            "similarity": f"{similarity}; v.pick('col-word', 'col-night'); v",
            "spectra": f"v = Spectra('{collected}', '{runs}/eight'); v.task.value = 'col-word'; v",
            "compare": f"Compare('{root}/records/testbed')",
            "workbench": f"v = Workbench('{runs}'); v",
            "branch": f"v = Workbench('{runs}'); v.tabs.selected_index = 5; v",
            "ask": f"v = Workbench('{runs}'); v.tabs.selected_index = 6; v"}


READY = ("!document.querySelector('.cit-view')?.innerText.includes('loading the methods')",
         "[...document.querySelectorAll('.cit-figure')].every(f => f.querySelector('.js-plotly-plot')?.data?.length)")


def save(png, path):
    "With few enough colours for 250 kB."
    im = Image.open(io.BytesIO(png)).convert("RGB")
    for n in (256, 128, 64):
        im.quantize(n, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
        if path.stat().st_size <= 250_000: return


def main(runs, collected, pairs, *wanted):
    all_ = cells(*(Path(p).resolve() for p in (runs, collected, pairs)))
    made = {k: v for k, v in all_.items() if k in wanted or not wanted}
    with tempfile.TemporaryDirectory() as d, browser() as b:
        for name, cell in made.items():
            notebook(Path(d)/f"{name}.ipynb", f"from cit_workbench.dashboard import *\n{cell}")
        with server(d) as (at, token):
            for name in made:
                lab = Lab(b, at, token, f"{name}.ipynb", height=1900)
                lab.wide(); lab.run_all()
                lab.view().wait_for(timeout=180_000)
                for ready in READY: lab.page.wait_for_function(ready, timeout=180_000)
                time.sleep(6)
                if name == "workbench": lab.choose("method", "ewc"); time.sleep(3)
                if name == "ask":
                    lab.choose("task", "cap-day"); lab.button("Ask").click() # learned two tasks before the last
                    lab.page.get_by_text("answered by").wait_for(timeout=60_000)
                if name == "forgetting": lab.page.locator(".cit-view .jupyter-widget-Collapse-header").first.click()
                for dark in (False, True):
                    lab.dark(dark); time.sleep(5)
                    save(lab.view().screenshot(), root/f"figures/dashboard-{name}-{'dark' if dark else 'light'}.png")
                lab.dark(False)
                lab.page.close()
                print(name, flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
