"Laws that hold for every view, whoever wrote it: it says what it is, opens on any run, waits in words, and fits the page."
import subprocess
import sys

import numpy as np
import pytest

from cit_workbench.core.errors import CitError
from cit_workbench.measure.collected import Collected, write_collected
from cit_workbench.record.record import Record
from cit_workbench.record.writer import RecordWriter
from cit_workbench.views.found import all_views, checked, needs_known, views_in
from cit_workbench.views.toy import toy_run
from cit_workbench.views.view import View

VIEWS = all_views()
STATES = ("begun", "young", "finished")
PYTHON = ("Traceback", "Error:", "None", "nan", "<class", "KeyError", "IndexError")


def begun(folder):
    "A run that has just begun: it has a configuration and nothing else."
    config = {"method": "finetune", "stream": "toy", "stream_args": {}, "seed": 0}
    columns = [[task, "stream"] for task in ("colour", "shape", "count")]
    RecordWriter(folder).open({"config": config, "method": "finetune", "protocol": "p", "leaks": [], "columns": columns,
                               "chance": {}, "rows": ["start", "colour", "shape", "count"]})
    return Record(folder)


def measured(path):
    "A collected file of the toy run's tasks, with everything that `collect` writes for a place."
    rng, tasks, size, most = np.random.default_rng(0), ["colour", "shape", "count"], 6, 3
    arrays = {"tower/visual/cosine": np.eye(3)}
    bases = np.stack([np.linalg.qr(rng.normal(size=(size, most)))[0] for _ in tasks])
    values = np.sort(rng.random((3, size)), 1)[:, ::-1]
    for rows in ("raw", "centred"):
        arrays |= {f"input/visual/{rows}/values": values, f"input/visual/{rows}/basis": bases,
                   f"input/visual/{rows}/energy": rng.random((3, 3, most)), f"input/visual/{rows}/split": rng.random((3, most)),
                   f"input/visual/{rows}/band": np.stack([.9*values, 1.1*values], 1)}
    write_collected(path, Collected({"backbone": None, "stream": "toy", "tasks": tasks}, arrays))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a run in each state; each state has a separate folder, for views that show all runs."
    folder = tmp_path_factory.mktemp("views")
    return {"begun": begun(folder/"a/run"), "young": toy_run(folder/"b/run", stop=4), "finished": toy_run(folder/"c/run"),
            "collected": measured(folder/"toy.npz")}


def opened(kind, place, state, width=900):
    "A view as the workbench opens it, on a page of some width."
    rec = place[state]
    known = {"collected": place["collected"], "folder": rec.path.parent}
    view = kind.open_run(rec, False, **{name: known[name] for name in kind.needs})
    view.theme.width = width
    return view


def words(view):
    "All that a view says: its note and what stands in its panels."
    if view.frame is None: return [view.note.value]
    return [view.note.value, *(note.text for note in view.fig.layout.annotations)]


@pytest.mark.parametrize("title", VIEWS)
def test_a_view_says_what_it_is(title):
    kind = VIEWS[title]
    assert issubclass(kind, View) and kind.title == title and title[0].isupper() and len(title) <= 16
    assert set(kind.needs) <= set(needs_known) and isinstance(kind.order, int)
    assert kind.__doc__ and kind.__doc__.split()[0] in ("Show", "Draw", "List", "Compare"), "a docstring begins with a verb"


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("title", VIEWS)
def test_a_view_opens_on_any_run_and_speaks_no_python(title, state, place):
    "An empty record, a run that has just begun, a finished run; what is empty says in words what it waits for."
    view = opened(VIEWS[title], place, state)
    try:
        said = " ".join(words(view))
        assert not [word for word in PYTHON if word in said], said
        assert "js-error" not in view.note.value and "jp-error" not in view.note.value, view.note.value
        drawn = any(np.size(trace.y) or np.size(trace.z if trace.type == "heatmap" else ()) for trace in view.fig.data) if view.frame else True
        assert drawn or len(said.split()) > 3, "an empty view says what will come"
        view.safely(lambda: (view.look(), view.paint(), view.draw()))
        assert "jp-error" not in view.note.value
    finally: view.close()


@pytest.mark.parametrize("title", VIEWS)
def test_what_is_empty_says_what_will_come(title, place):
    view = opened(VIEWS[title], place, "begun")
    try:
        said = " ".join(words(view))
        assert any(word in said for word in ("comes", "begins", "needed", "not probed", "when", "adds")), said
    finally: view.close()


@pytest.mark.parametrize("width", [700, 900, 1280, 1900])
@pytest.mark.parametrize("title", VIEWS)
def test_a_view_fits_the_page(title, width, place):
    "The figure is as wide as the page, its panels lie in it and do not overlap."
    view = opened(VIEWS[title], place, "finished", width)
    try:
        if view.frame is None: return
        layout = view.fig.layout.to_plotly_json()
        assert layout["width"] == width and 100 < layout["height"] < 4000
        shown = {axis[5:] for axis in layout if axis.startswith("xaxis") and layout[axis].get("visible", True)}
        boxes = {n: (*layout[f"xaxis{n}"]["domain"], *layout[f"yaxis{n}"]["domain"]) for n in shown}
        boxes = {n: box for n, box in boxes.items() if box != (0, 1, 0, 1)} if len(boxes) > 1 else boxes
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, x1, y0, y1 in boxes.values()), boxes
        over = [(a, b) for a in boxes for b in boxes if a < b and boxes[a][0] < boxes[b][1] and boxes[b][0] < boxes[a][1]
                and boxes[a][2] < boxes[b][3] and boxes[b][2] < boxes[a][3]]
        assert over == []
    finally: view.close()


def test_views_open_without_torch(place):
    "Whoever looks at a record loads no models."
    record = place["finished"].path
    code = f"""
import sys
from cit_workbench.record.record import Record
from cit_workbench.views.found import all_views
known = {{"collected": {str(place["collected"])!r}, "folder": {str(record.parent)!r}}}
for kind in all_views().values():
    kind.open_run(Record({str(record)!r}), False, **{{name: known[name] for name in kind.needs}}).close()
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_views_are_found_by_folder_and_in_order():
    assert [*VIEWS] == sorted(VIEWS, key=lambda title: (VIEWS[title].order, title))
    assert {kind.__module__ for kind in VIEWS.values()} >= {f"cit_workbench.views.{name}" for name in ("forgetting", "compare")}
    assert all(views_in(sys.modules[kind.__module__]) == [kind] for kind in VIEWS.values()), "one view a module"


def test_a_view_that_cannot_be_opened_is_refused():
    class Gold(View): title, needs = "Gold", {"gold"}
    class Silver(View): title = "Silver"
    with pytest.raises(CitError, match="unknown need 'gold' of view Gold; allowed: collected, folder"): checked([Gold])
    with pytest.raises(CitError, match="two views have the title 'Silver'"): checked([Silver, Silver])
