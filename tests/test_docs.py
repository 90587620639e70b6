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


def test_outputs_in_the_notebooks_are_replayed_until_something_that_they_read_changes(tree):
    docs.build(tree, keeping=True)
    outputs = lambda name: [o for c in json.loads((tree/"nbs"/name).read_text())["cells"] for o in c.get("outputs", [])]
    assert outputs("methods/er.ipynb")[0]["data"]["text/plain"] == ["71.25"]
    assert [list(o["data"]) for o in outputs("tutorials/first.ipynb")] == [[execute.FIGURE, "text/plain"]] * 2
    def clone(): shutil.rmtree(tree/"_site"); return docs.build(tree)
    got = clone()
    page = lambda name: (tree/"_site/html"/name).read_text()
    assert (got["executed"], got["replayed from the notebooks"]) == (0, 3)
    assert "71.25" in page("methods/er.html") and page("tutorials/first.html").count('class="figure"') == 2
    assert docs.build(tree)["replayed from the notebooks"] == 0 # they are in the work folder now
    (tree/"records/a.json").write_text('{"score": 71.5}')
    assert list(clone()["slowest"]) == ["methods/er.ipynb"] and "71.5" in page("methods/er.html")
    path = tree/"nbs/tutorials/first.ipynb"
    path.write_text(path.read_text().replace('"Figure"', '"by hand"'))
    assert set(clone()["slowest"]) == {"methods/er.ipynb", "tutorials/first.ipynb"}
    assert docs.build(tree, anew=True)["executed"] == 3


def test_a_cell_that_is_left_out_keeps_its_output(tree):
    path = tree/"nbs/tutorials/first.ipynb"
    notebook(path, "md:# First", "#| eval: false\n1/0", "2")
    nb = json.loads(path.read_text())
    nb["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["from a larger machine\n"]}]
    path.write_text(json.dumps(nb))
    docs.build(tree, keeping=True)
    assert "from a larger machine" in path.read_text() and "from a larger machine" in (tree/"_site/html/tutorials/first.html").read_text()


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
