"From an empty folder: Start, and all three views show the run, at every width. Skipped where there is no Chromium."
import os
import time
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from lab import CHROMIUM, Lab, browser, notebook, server  # noqa: E402

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
CELL = "from cit_workbench.dashboard import Workbench\nbench = Workbench('runs')\nbench"
VIEWS = ("Forgetting", "Similarity", "Spectra")
WIDTHS = ((1280, True), (1900, False), (700, False), (700, True))  # of the window; with the file browser?
PLOT = "[...document.querySelectorAll('.cit-figure .js-plotly-plot')].find(p => p.offsetParent)"
KNOWN = "v => v !== null && Number.isFinite(v)"
CURVES = f"({PLOT}?.data ?? []).filter(t => (t.xaxis ?? 'x') === 'x' && [...(t.y ?? [])].filter({KNOWN}).length > 1).length"
CELLS = f"(z => z ? [...z].flatMap(r => [...r]).filter({KNOWN}).length : 0)({PLOT}?.data?.[0]?.z)"
SPECTRA = f"({PLOT}?.data ?? []).filter(t => t.xaxis === 'x1' || t.xaxis === 'x').filter(t => t.showlegend && t.y?.length > 20).length"
LAYERS = f"({PLOT}?.data ?? []).filter(t => t.xaxis === 'x4' && t.y?.length).length"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    notebook(folder/"x.ipynb", CELL)
    with server(folder, CIT_CACHE=folder/"cache") as (at, token), browser() as b:
        lab = Lab(b, at, token, "x.ipynb")
        lab.folder, lab.errors = folder, []
        lab.page.on("pageerror", lambda e: lab.errors.append(str(e)))
        yield lab


def until(lab, what, seconds=900):
    "Wait until an expression of the page is true; its value."
    return lab.page.wait_for_function(what, timeout=1000*seconds, polling=250).json_value()


def keep(lab, name):
    "A picture for whoever wants to look: CIT_SHOTS is a folder."
    if not (folder := os.environ.get("CIT_SHOTS")): return
    lab.page.screenshot(path=str(Path(folder)/f"{name}.png"))


def test_start_shows_all_three_views(lab):
    "Nothing is typed. Whatever is empty says what comes, and never in Python."
    lab.run_all()
    lab.view().wait_for(timeout=240_000)
    until(lab, "[...document.querySelectorAll('.cit-view button')].some(b => b.innerText === 'Start' && !b.disabled)")
    began = time.time()
    lab.button("Start").click()
    until(lab, "/loading weights … [0-9]+ s/.test(document.querySelector('.cit-view').innerText)")
    until(lab, f"{PLOT}?.data?.length > 0")
    axis = lab.page.evaluate(f"{PLOT}._fullLayout.xaxis.range")
    assert axis[0] > -2 and axis[1] >= 20, axis
    soon = f"{PLOT}.textContent.replace(/\\s+/g, ' ').includes('begins with its first step')"
    assert lab.page.evaluate(f"{soon} || {PLOT}.data[0].y.length > 0")
    keep(lab, "soon-forgetting")
    for name in ("Spectra", "Similarity"):
        lab.tab(name)
        until(lab, f"/are measured once for this start model: [a-z]/.test(document.querySelector('.cit-view').innerText) || {PLOT}")
        said = lab.view().inner_text()
        assert "collect(" not in said and "import" not in said
        keep(lab, f"soon-{name.lower()}")
    assert until(lab, CELLS) == 64
    seconds = {"similarity": time.time() - began}
    lab.tab("Spectra")
    assert until(lab, SPECTRA) == 8
    lab.tab("Forgetting")
    assert until(lab, f"{CURVES} > 1 && {CURVES}") == 2
    seconds["two curves"] = time.time() - began
    lab.tab("Spectra")
    assert until(lab, LAYERS) >= 1
    print({k: round(v) for k, v in seconds.items()})


@pytest.mark.parametrize("width, files", WIDTHS)
def test_nothing_overlaps_and_nothing_is_cut(lab, width, files):
    lab.page.set_viewport_size({"width": width, "height": 1400})
    (lab.narrow if files else lab.wide)()
    wrong = {}
    for name in ("New run", *VIEWS, "Compare", "Branch", "Ask"):
        lab.tab(name)
        time.sleep(.5)
        if name in (*VIEWS, "Compare"): until(lab, f"{PLOT}?.data?.length > 0")
        lab.fitted()
        end = time.time() + 30  # a busy machine draws late
        while lab.crowded() and time.time() < end: time.sleep(1)
        keep(lab, f"{width}{'-files' if files else ''}-{name.lower().replace(' ', '-')}")
        if (said := lab.crowded()): wrong[name] = said
    assert wrong == {}


def test_the_second_start_has_them_at_once(lab):
    "What was measured is kept: another run of the stream waits for nothing."
    kept = [*(lab.folder/"cache/collected").glob("*.npz")]
    lab.page.set_viewport_size({"width": 1280, "height": 1000})
    lab.tab("Forgetting")
    lab.button("Stop").click()
    lab.tab("New run")
    lab.type("seed", "1")
    lab.button("Start").click()
    until(lab, "document.querySelectorAll('.cit-view select option').length && /loading weights/.test(document.querySelector('.cit-view').innerText)")
    lab.tab("Similarity")
    assert until(lab, CELLS, 60) == 64
    lab.button("Stop").click()
    until(lab, "/stopped/.test(document.querySelector('.cit-view').innerText)")
    assert len(kept) == 1 and kept == [*(lab.folder/"cache/collected").glob("*.npz")]
    assert [e for e in lab.errors if "Failed to initialize model" not in e] == []
