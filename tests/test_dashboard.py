"The workbench in a real browser: start, watch, pause, resume, branch, reload, restart. Skipped where there is no Chromium."
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from cit_workbench.views.toy import toy_run # noqa: E402
from lab import CHROMIUM, HALF, Lab, browser, notebook, server  # noqa: E402

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
CELLS = ("from cit_workbench.dashboard import Workbench", "bench = Workbench('runs')\nbench", HALF)
TOY = {"tasks": ["col-word", "shp-mcq", "col-night"], "n_train": 96, "n_val": 8, "n_test": 4}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    notebook(folder/"x.ipynb", *CELLS)
    with server(folder, CIT_CACHE=folder/"cache") as (at, token), browser() as b:
        lab = Lab(b, at, token, "x.ipynb")
        lab.folder, lab.errors = folder, []
        lab.page.on("pageerror", lambda e: lab.errors.append(str(e)))
        lab.wide()
        yield lab


def until(what, seconds=240):
    "Wait until `what()` is true; its value."
    end = time.time() + seconds
    while not (got := what()):
        assert time.time() < end, f"nothing came of it within {seconds} s"
        time.sleep(.2)
    return got


def points(lab):
    "How many points the curves of the view have, on the screen."
    return lab.page.locator(".cit-view .cartesianlayer .xy .scatterlayer .trace .points path:visible").count()


def state(lab): return lab.page.locator(".cit-view b").first.inner_text()


def events(lab, run):
    path = lab.folder/"runs"/run/"events.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_all(lab):
    "Run the cells and wait for the form."
    lab.run_all()
    lab.view().wait_for(timeout=240_000)
    until(lambda: lab.button("Start").is_enabled())


def ask(lab):
    "A question with an image of one's own; the answer, which comes from the paused run."
    Image.new("RGB", (48, 48), "red").save(lab.folder/"red.png")
    lab.tab("Ask")
    with lab.page.expect_file_chooser() as chooser: lab.button("own image", exact=False).click()
    chooser.value.set_files(lab.folder/"red.png")
    until(lambda: "(1)" in lab.button("own image", exact=False).inner_text())
    until(lambda: "target" not in lab.view().inner_text())
    lab.page.get_by_placeholder("the instruction").fill("What color is it?")
    lab.button("Ask").click()
    lab.page.get_by_text(re.compile("answered by .*, step")).wait_for(timeout=60_000)
    asked = next((lab.folder/"runs/first/asks").glob("*.npy"))
    assert np.load(asked)[0, 0].tolist() == [255, 0, 0]
    lab.tab("Forgetting")


def click(lab, point):
    "On a run in the cloud of accuracy against forgetting."
    dot = lab.page.locator(".x6y6 .scatterlayer path.point:visible").nth(point) # the means come after the runs
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    at = box["x"] + box["width"]/2, box["y"] + box["height"]/2
    lab.page.mouse.move(*at, steps=4)
    lab.page.mouse.click(*at)


def chosen(lab, run, point):
    "Is `run` the chosen one? If not, click on its dot: a click while the figure is still being laid out falls beside it."
    if lab.field("run").input_value() != run:
        click(lab, point)
        time.sleep(2)
    return lab.field("run").input_value() == run


def test_a_run_is_started_watched_paused_branched_and_found_again(lab):
    run_all(lab)
    for name, value in {"stream args": json.dumps(TOY), "learning rate": "fast", "steps": "150", "watch every": "5",
                        "watch full": "20", "watch share": "0", "save every": "25", "folder": "first"}.items(): lab.type(name, value)
    lab.button("Start").click()
    note = lab.page.locator(".cit-view", has_text="must be a number")
    note.wait_for(timeout=120_000)
    text = lab.page.locator(".jp-Notebook").inner_text()
    assert "Traceback" not in text, text[text.index("Traceback"):]

    lab.type("learning rate", "0.003")
    lab.button("Start").click()
    until(lambda: points(lab) > 6)
    early, n = lab.view().screenshot(), points(lab)
    until(lambda: points(lab) > n + 8)
    assert lab.view().screenshot() != early

    lab.button("Pause").click()
    until(lambda: state(lab) == "paused")
    here = events(lab, "first")
    time.sleep(1.5)
    assert events(lab, "first") == here
    ask(lab)
    lab.button("Resume").click()
    until(lambda: events(lab, "first") > here)
    lab.button("Stop").click()
    until(lambda: state(lab) == "stopped")

    lab.tab("Branch")
    until(lambda: re.search(r"step\s[0-9]+", lab.field("from").locator("option").last.inner_text()))
    lab.type("learning rate", "0.001")
    lab.type("folder", "second")
    lab.button("Branch", exact=True).click()
    until(lambda: lab.field("run").input_value() == "second" and state(lab) in ("running", "finished"))
    asked = json.loads((lab.folder/"runs/second/asked.json").read_text())
    assert asked["asked"]["optim"]["lr"] == .001 and asked["parent"]["of"] == "first"

    lab.reload()
    run_all(lab)
    lab.choose("run", "second")
    lab.tab("Forgetting")
    until(lambda: points(lab) > 10)
    until(lambda: state(lab) == "finished")
    last = until(lambda: events(lab, "second") and points(lab))

    lab.restart()
    run_all(lab)
    lab.choose("run", "second")
    lab.tab("Forgetting")
    until(lambda: points(lab) >= last)
    assert [e for e in lab.errors if "Failed to initialize model" not in e] == []  # a busy machine: the figure is sent again


def test_a_class_of_the_notebook_is_launched_and_a_click_chooses_a_run(lab):
    for seed in range(2): toy_run(lab.folder/f"runs/toy{seed}", seed=seed, drop=30. + 10*seed)
    if not lab.view().count(): run_all(lab)
    until(lambda: lab.page.locator("option", has_text="half (this notebook)").count())
    lab.tab("New run")
    lab.choose("method", "half (this notebook)")
    fields = {"share": "0.25", "stream args": json.dumps(TOY), "learning rate": "", "steps": "40", "watch every": "",
              "folder": "own"}
    for name, value in fields.items(): lab.type(name, value)
    lab.button("Start").click()
    until(lambda: (lab.folder/"runs/own/method.py").is_file())
    assert json.loads((lab.folder/"runs/own/asked.json").read_text())["asked"]["method_args"] == {"share": .25}
    until(lambda: lab.field("run").input_value() == "own")
    until(lambda: events(lab, "own") > 8)
    until(lambda: lab.page.get_by_text("what half does: left").count())
    lab.button("Stop").click()
    until(lambda: state(lab) == "stopped")

    lab.tab("Compare")
    until(lambda: lab.page.get_by_text("accuracy against forgetting").count())
    lab.choose("stream", "toy (2 runs, protocol p)")
    until(lambda: lab.page.locator(".x6y6 .scatterlayer path.point:visible").count() == 3) # two runs and their mean
    until(lambda: chosen(lab, "toy1", 1))
