"""The site: pages are executed when what they read changed, mistakes end the build, links work, nothing comes from elsewhere."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/"tools"))
import docs  # noqa: E402
import execute  # noqa: E402


def notebook(path, *cells):
    "Write a notebook; text that starts with `md:` is markdown."
    md = lambda s: {"cell_type": "markdown", "metadata": {}, "source": s[3:]}
    code = lambda s: {"cell_type": "code", "metadata": {}, "source": s, "outputs": [], "execution_count": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [md(c) if c.startswith("md:") else code(c) for c in cells], "nbformat": 4, "nbformat_minor": 5,
                                "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}}))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    "A small project: a home page, a method's page that reads a record, a page beside it."
    monkeypatch.setattr(execute, "WARM", ())
    at = tmp_path/"project"
    notebook(at/"nbs/index.ipynb", "md:# Home\n\n> one line", "md:See [the method](methods/er.ipynb#it-keeps-what-it-learned) and `nbs/tutorials/first.ipynb`.")
    notebook(at/"nbs/methods/er.ipynb", "md:# A method", "md:## It keeps what it learned", "#| hide\nimport json",
             "json.load(open('../../records/a.json'))['score']")
    notebook(at/"nbs/tutorials/first.ipynb", "md:# First", "md:From arXiv 1902.10486: $L = 1$", "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[1, 2]))",
             "import ipywidgets\nipywidgets.VBox([ipywidgets.Button(), go.FigureWidget(go.Scatter(y=[1, 2]))])")
    (at/"records").mkdir(); (at/"records/a.json").write_text('{"score": 71.25}')
    (at/"constraints.txt").write_text("")
    return at


def test_a_site_is_built_and_only_what_changed_is_executed_again(tree):
    assert docs.build(tree)["executed"] == 3
    page = lambda name: (tree/"_site/html"/name).read_text()
    assert "71.25" in page("methods/er.html") and "import json" not in page("methods/er.html")
    assert 'href="tutorials/first.html"' in page("index.html") and re.search(r"caption-text\">Methods<", page("index.html"))
    assert "https://arxiv.org/abs/1902.10486" in page("tutorials/first.html") and page("tutorials/first.html").count('class="figure"') == 2
    assert "plotly.min.js" in page("tutorials/first.html") and "plotly.min.js" not in page("methods/er.html")
    assert docs.build(tree)["executed"] == 0
    assert {p.name for p in tree.iterdir()} == {"nbs", "records", "constraints.txt", "_site"}
    (tree/"records/a.json").write_text('{"score": 71.5}')
    assert list(docs.build(tree)["slowest"]) == ["methods/er.ipynb"] and "71.5" in page("methods/er.html")


def outputs(path): return [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]


def test_outputs_that_notebooks_hold_are_replayed_until_something_that_they_read_changes(tree):
    docs.build(tree, holding=True)
    assert outputs(tree/"nbs/methods/er.ipynb")[0]["data"]["text/plain"] == ["71.25"]
    assert [list(o["data"]) for o in outputs(tree/"nbs/tutorials/first.ipynb")] == [[execute.FIGURE, "text/plain"]] * 2
    def clone(): shutil.rmtree(tree/"_site"); return docs.build(tree)
    got, page = clone(), lambda name: (tree/"_site/html"/name).read_text()
    assert (got["executed"], got["replayed from the notebooks"]) == (0, 3)
    assert "71.25" in page("methods/er.html") and page("tutorials/first.html").count('class="figure"') == 2
    assert docs.build(tree)["replayed from the notebooks"] == 0 # they are in the work folder now
    (tree/"records/a.json").write_text('{"score": 71.5}')
    got = clone()
    assert list(got["slowest"]) == ["methods/er.ipynb"] and "71.5" in page("methods/er.html")
    assert got["notebooks that hold older outputs (make outputs)"] == 1
    assert docs.build(tree, anew=True)["executed"] == 3


READER = ("md:# Reader", "import sys\nsys.path.insert(0, '../lib'); import helper\nhelper.x", "from pathlib import Path\nsorted(p.name for p in Path('../records').iterdir())",
          "try: said = open('../records/late.txt').read()\nexcept FileNotFoundError: said = 'nothing'\nsaid", "#| eval: false\n1/0", "x = 1")
STARTER = ("md:# Starter", "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'], check=True).returncode")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    "A tree whose notebooks hold their outputs: one reads modules, records and a file that is not there, one starts another process."
    at = tmp_path_factory.mktemp("once")/"project"
    notebook(at/"nbs/reader.ipynb", *READER); notebook(at/"nbs/starter.ipynb", *STARTER)
    for name in ("lib/helper.py", "cit_workbench/far.py"): (at/name).parent.mkdir(); (at/name).write_text("x = 1")
    (at/"records/deep").mkdir(parents=True); (at/"records/deep/a.json").write_text("{}")
    for name in ("constraints.txt", "settings.ini"): (at/name).write_text("")
    nb = json.loads((at/"nbs/reader.ipynb").read_text())
    nb["cells"][4]["outputs"] = nb["cells"][5]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["by hand\n"]}]
    (at/"nbs/reader.ipynb").write_text(json.dumps(nb))
    pages = execute.notebooks(at/"nbs")
    out = {p: at/"_site/work/executed"/p.name for p in pages}
    with pytest.MonkeyPatch.context() as m: m.setattr(execute, "WARM", ()); execute.run_all(pages, at, out)
    execute.hold(pages, at, out)
    return at


def edit(name, old, new): return lambda at: (at/name).write_text((at/name).read_text().replace(old, new))
def put(name): return lambda at: (at/name).write_text("new")
def tag(at):
    nb = json.loads((at/"nbs/reader.ipynb").read_text()); nb["cells"][1]["metadata"] = {"tags": ["parameters"]}
    (at/"nbs/reader.ipynb").write_text(json.dumps(nb))


@pytest.mark.parametrize("change, stale", [
    (lambda at: None, ""), (put("records/.DS_Store"), ""), (put("nbs/notes.txt"), ""), (put("cit_workbench/#far.py#"), ""),
    (edit("lib/helper.py", "1", "2"), "reader"), (edit("cit_workbench/far.py", "1", "2"), "starter"),
    (edit("nbs/reader.ipynb", "x = 1", "x = 2"), "reader"),
    (edit("nbs/reader.ipynb", "'deep'", "'shallow'"), "reader"), (edit("nbs/reader.ipynb", "by hand", "by foot"), "reader"), (tag, "reader"),
    (put("records/b.json"), "reader starter"), (edit("records/deep/a.json", "{}", "[]"), "reader starter"), (put("records/late.txt"), "reader starter"),
    (put("constraints.txt"), "reader starter"), (put("settings.ini"), "reader starter"), (put("nbs/outputs.json"), "reader starter"),
])
def test_what_makes_outputs_stale(once, tmp_path, change, stale):
    at = tmp_path/"project"; shutil.copytree(once, at, ignore=shutil.ignore_patterns("_site"))
    change(at)
    pages = execute.notebooks(at/"nbs")
    assert {p.stem for p in pages} - {p.stem for p in execute.held(pages, at)} == set(stale.split())


def test_holding_writes_what_was_executed_and_nothing_else(once, tmp_path):
    at = tmp_path/"project"; shutil.copytree(once, at)
    page = at/"nbs/reader.ipynb"
    assert [o.get("text") or o["data"]["text/plain"] for o in outputs(page)] == [["1"], ["['deep']"], ["'nothing'"], ["by hand\n"]] # the silent cell lost its own
    edit("nbs/reader.ipynb", "by hand", "by foot")(at)
    pages = execute.notebooks(at/"nbs")
    out = {p: at/"_site/work/executed"/p.name for p in pages}
    assert not execute.current(out[page], at)
    with pytest.raises(SystemExit, match="nbs/reader.ipynb read was edited while it ran"): execute.hold(pages, at, out)
    assert "by foot" in page.read_text() and not [p for p in at.glob("**/.tmp-*")]


def test_a_page_that_was_edited_while_it_ran_is_not_current(tree):
    notebook(tree/"nbs/methods/er.ipynb", "md:# A method", "md:## It keeps what it learned", "from pathlib import Path\np = Path('../../records/a.json')",
             "was = p.read_text(); p.write_text(was + ' ')")
    with pytest.raises(SystemExit, match="edited while it ran"): docs.build(tree, holding=True)


@pytest.mark.parametrize("cell, says", [
    ("md:[gone](../methods/nowhere.ipynb)", "nowhere"),
    ("md:[gone](../methods/er.ipynb#not-a-heading)", "not-a-heading"),
    ("1/0", "ZeroDivisionError"),
    ("from IPython.display import HTML\nHTML('<script src=\"https://cdn.example.org/x.js\"></script>')", "cdn.example.org"),
], ids=["page", "anchor", "error", "host"])
def test_a_mistake_ends_the_build_and_is_named(tree, capfd, cell, says):
    notebook(tree/"nbs/tutorials/first.ipynb", "md:# First", cell)
    with pytest.raises(SystemExit) as stop: docs.build(tree)
    assert says in str(stop.value) + capfd.readouterr().err


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path/"a.html").write_text('<a href="b.html#x">1</a><a href="b.html#y">2</a><a href="c.html">3</a><a href="https://arxiv.org">4</a>'
                                   '<script src="//cdn.org/p.js"></script><link rel="stylesheet" href="s.css">')
    (tmp_path/"b.html").write_text('<h1 id="x">b</h1>')
    (tmp_path/"s.css").write_text("@font-face { src: url('https://fonts.org/f.woff') }")
    said = docs.broken(tmp_path)
    assert len(said) == 4, said
    for part in ("b.html#y", "c.html", "//cdn.org/p.js", "fonts.org"): assert any(part in s for s in said)


def test_a_name_links_to_the_one_page_that_explains_it():
    class names: link = staticmethod(lambda n, here: f"[`{n}`](#api)" if n == "Run" else None)
    text = "A `Run`, ``` `Run` ```, [`Run`](x.ipynb)\n# `Run`\n```\n`Run`\n```"
    assert docs.linked(text, root/"nbs/x.ipynb", names, root).count("#api") <= 2
    assert docs.linked("`Run` and `other`", root/"nbs/x.ipynb", names, root) == "[`Run`](#api) and `other`"


def test_a_picture_with_a_dark_twin_stands_as_both(tmp_path):
    for name in ("a-light.png", "a-dark.png", "b-light.png"): (tmp_path/name).write_bytes(b"")
    assert docs.themed("![x y](a-light.png) ![z](b-light.png)", tmp_path/"n.ipynb") == \
        "![x y](a-light.png){.only-light} ![x y](a-dark.png){.only-dark} ![z](b-light.png)"


def test_links_in_outputs_lead_to_pages():
    got = docs.to_html({"output_type": "display_data", "data": {"text/markdown": ["[er](../methods/er.ipynb#x) [y](https://z.org/y.ipynb)"],
                                                               "text/html": "<a href='er.ipynb'>er</a>", "text/plain": "(a.ipynb)"}})["data"]
    assert got["text/markdown"] == "[er](../methods/er.html#x) [y](https://z.org/y.ipynb)"
    assert got["text/html"] == "<a href='er.html'>er</a>" and got["text/plain"] == "(a.ipynb)"


def test_addresses_in_memory_are_left_out():
    said = {"output_type": "execute_result", "data": {"text/plain": "<function f at 0x7f7c12ab34cd>"}}
    assert docs.to_html(said)["data"] == {"text/plain": "<function f>"}
    assert docs.to_html({"output_type": "stream", "name": "stdout", "text": ["a at 0x7f7c12ab34cd\n", "b"]})["text"] == "a\nb"
    assert docs._default(object()) == "<object object>"


def test_directives_are_read_off_the_top():
    assert docs.directives("#| export\n#| echo: false\nx = 1") == ({"export", "echo:"}, "x = 1")
    assert docs.only_imports("import a\nfrom b import c\n_all_ = ['c']") and not docs.only_imports("import a\na.b()")
    assert list(docs.defined("@patch\ndef f(self:A, x): pass\nclass B: pass\nC = 1")) == ["A.f", "B", "C"]
