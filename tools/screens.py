"""Pictures of the live views in JupyterLab, light and dark: figures/dashboard-VIEW-light.png. Needs Chromium and playwright.

python tools/screens.py RUNS COLLECTED [VIEW …]   RUNS: a folder with runs `eight`, `finetune` and `er`; COLLECTED: what `collect` wrote
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


def cells(runs, collected):
    "What makes each view."
    return {"forgetting": f"Forgetting('{runs}/finetune', '{runs}/er')",
            "similarity": f"v = Similarity('{collected}', '{runs}/eight', '{root}/records/testbed'); v.pick('col-word', 'col-night'); v",
            "spectra": f"v = Spectra('{collected}', '{runs}/eight'); v.task.value = 'col-word'; v",
            "compare": f"Compare('{root}/records/testbed')",
            "workbench": f"v = Workbench('{runs}'); v",
            "branch": f"v = Workbench('{runs}'); v.tabs.selected_index = 5; v",
            "ask": f"v = Workbench('{runs}'); v.tabs.selected_index = 6; v"}


def save(png, path):
    "With few enough colours for 250 kB."
    im = Image.open(io.BytesIO(png)).convert("RGB")
    for n in (256, 128, 64):
        im.quantize(n, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
        if path.stat().st_size <= 250_000: return


def main(runs, collected, *wanted):
    made = {k: v for k, v in cells(Path(runs).resolve(), Path(collected).resolve()).items() if k in wanted or not wanted}
    with tempfile.TemporaryDirectory() as d, browser() as b:
        for name, cell in made.items(): notebook(Path(d)/f"{name}.ipynb", f"from cit_workbench.dashboard import *\n{cell}")
        with server(d) as (at, token):
            for name in made:
                lab = Lab(b, at, token, f"{name}.ipynb", height=1900)
                lab.wide(); lab.run_all()
                lab.view().wait_for(timeout=180_000)
                lab.page.wait_for_function("!document.querySelector('.cit-view')?.innerText.includes('loading the methods')", timeout=180_000)
                lab.page.wait_for_function("[...document.querySelectorAll('.cit-figure')].every(f => f.querySelector('.js-plotly-plot')?.data?.length)", timeout=180_000)
                time.sleep(6)
                if name == "forgetting": lab.page.locator(".cit-view .jupyter-widget-Collapse-header").first.click()
                for dark in (False, True):
                    lab.dark(dark); time.sleep(5)
                    save(lab.view().screenshot(), root/f"figures/dashboard-{name}-{'dark' if dark else 'light'}.png")
                lab.dark(False)
                lab.page.close()
                print(name, flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
