"A name that a page does not have, or a value of another type, ends a page in one sentence under plain papermill."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from cit_workbench.experiments.pages import code_cells, trimmed

PAGES = sorted(p for p in (Path(__file__).parents[1]/"nbs").glob("**/*.ipynb")
               if any("parameters" in tags for _, tags, _ in code_cells(p)))
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_first_line_below_the_parameters_compares_them(page):
    "Nothing lies between the two cells, and what papermill writes is told from the page's own cell."
    cells = code_cells(page)
    at = next(k for k, (_, tags, _) in enumerate(cells) if "parameters" in tags)
    assert cells[at + 1][0].startswith("check_injected()\n")
    assert "lesson" not in cells[at + 1][1]
    assert not cells[at][0].startswith("# Parameters")
    assert sum("check_injected" in source for source, _, _ in cells[:at]) == 1 # It is imported above


def test_there_are_pages(): assert len(PAGES) > 15


@pytest.mark.parametrize("page, given, said", [
    ("ewc", {"lamm": 10}, "unknown field of this page 'lamm' (did you mean 'lam'?); allowed: backbone, compute, gamma, lam, "),
    ("moelora", {"optim": "steps=1"}, "this page: field 'optim' is 'steps=1', but must be a table")])
def test_a_page_stops_at_a_wrong_parameter(tmp_path, page, given, said):
    "Before anything is trained; the notebook shows the sentence, not the way to it."
    nb = nbformat.from_dict(trimmed(ROOT/"nbs/methods"/f"{page}.ipynb"))
    with pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(nb, tmp_path/"out.ipynb", {**given, "out": str(tmp_path/"run")}, kernel_name="python3",
                                   progress_bar=False)
    assert e.value.ename == "CitError" and e.value.evalue.startswith(said)
    assert not (tmp_path/"run").exists()
    cells = json.loads((tmp_path/"out.ipynb").read_text())["cells"]
    [error] = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert error["traceback"] == [f"CitError: {e.value.evalue}"]


def test_the_command_line_of_papermill_says_it(tmp_path):
    "The whole page, lessons included, as somebody types it."
    page = ROOT/"nbs/methods/finetune.ipynb"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "papermill", page, tmp_path/"out.ipynb", "-p", "sed", "3"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("CitError: unknown field of this page 'sed' (did you mean 'seed'?)")
