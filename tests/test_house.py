"""The house: the order of its rooms, read from imports alone. The home page lists the rooms in reading order."""
import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
import style  # noqa: E402

ROWS = {row["name"]: row for row in style.survey(ROOT)}

# A room may import late, inside functions, for one of these reasons.
LATE = {
    "commands": "a command imports what it needs, so that `cit --help` is there at once",
    "views": "the form and the workbench open before torch is loaded",
    "training": "whoever follows a run loads no torch",
    "live": "whoever follows a run loads no torch",
    "experiments": "plans and tables of sweeps and of the testbed load no torch",
    "figures": "most pictures need no measures",
}
# These lead to a later room: a run starts the process in which it trains, and gives a record that can be steered.
DOWN = {("training/train", "live/launch"), ("training/train", "live/remake"), ("training/folder", "live/live")}
# Classes that have methods on other pages.
SCATTERED = set()
# Modules that are longer than 300 lines, or have more than 12 public names.
LONG = set()
MANY = set()
# Words that made sentences hard to read; pages say it in the field's words.
RETIRED = re.compile(r"\bbeside\b|\bstands? in\b|\b(?:is|are|was|were) told\b|\bof (?:its|their|his) own\b|\balike\b|\blikeness\b"
                     r"|\bforetell|\bmend(?:s|ed)?\b|\bthe arms\b", re.I)
TORCH_FREE = {"core", "statistics", "metrics", "behaviour", "protocol", "data", "files", "suites", "record", "figures", "views", "dashboard",
              "commands", "cli"}


def rooms() -> list:
    "Read the rooms from the home page, in its order."
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    table = text.split("### The library, in reading order")[1].split("\n\nTo change")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.M)


def room(module:str) -> str: return module.split("/")[0]


# (module, what it imports, names, whether inside a function)
IMPORTED = [(name, *found) for name, row in ROWS.items() for found in row["imports"]]


def test_every_module_is_in_a_room_of_the_home_page():
    assert {room(name) for name in ROWS} == set(rooms())
    assert len(rooms()) == len(set(rooms()))


def test_imports_point_to_earlier_rooms():
    order = rooms()
    down = {(name, target) for name, target, _, _ in IMPORTED if order.index(room(target)) > order.index(room(name))}
    assert down == DOWN


def test_modules_form_no_circle():
    graph = {name: set() for name in ROWS}
    for name, target, _, _ in IMPORTED:
        if (name, target) not in DOWN: graph[name].add(target)
    assert style.circles(graph) == []


def test_imports_inside_functions_have_a_reason():
    late = {room(name) for name, target, _, inside in IMPORTED if inside and (name, target) not in DOWN}
    assert late == set(LATE)


def test_no_private_name_crosses_a_module():
    assert [(name, target, part) for name, target, parts, _ in IMPORTED for part in parts if part.startswith("_")] == []


def test_a_class_is_patched_on_its_own_page():
    away = {(name, cls) for name, row in ROWS.items() for cls in row["patches"] if cls not in row["classes"]}
    assert away == SCATTERED


@pytest.mark.parametrize("library", ["torch", "transformers", "peft"])
def test_rooms_of_records_and_pictures_load_no_models(library):
    "By imports at the top of modules, at any depth."
    direct = {name for name, row in ROWS.items() for node in row["tree"].body if isinstance(node, (ast.Import, ast.ImportFrom))
              if library in re.findall(r"[\w.]+", ast.unparse(node).split(" import ")[0])}
    heavy = set(direct)
    while more := {name for name, target, _, late in IMPORTED if not late and target in heavy} - heavy:
        heavy |= more
    assert sorted(name for name in heavy if room(name) in TORCH_FREE) == []
    assert "training/train" in heavy or library == "peft"


def test_no_line_is_too_wide_and_none_holds_two_statements():
    "But for the list of public names, which is generated."
    assert [(name, row["wide"], row["semicolons"]) for name, row in ROWS.items() if row["wide"] or row["semicolons"]] == []


def test_modules_are_short():
    assert {name for name, row in ROWS.items() if row["lines"] > 300} == LONG
    assert {name for name, row in ROWS.items() if len(row["public"]) > 12} == MANY


def test_pages_are_in_plain_words():
    "In text, code and paths left out."
    found = []
    for page in sorted(ROOT.glob("nbs/**/*.ipynb")):
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        for text in texts:
            plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
            found += [(page.name, match.group()) for match in RETIRED.finditer(plain)]
    assert found == []


HEADINGS = ["Idea", "Configuration", "Diagnostics", "Cost", "Results on the frozen benchmark",
            "Differences from the paper and released code"]


@pytest.mark.parametrize("page", sorted(ROOT.glob("nbs/methods/*.ipynb")), ids=lambda page: page.stem)
def test_a_method_page_has_the_headings_of_all(page):
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    lines = ["".join(cell["source"]).split("\n")[0] for cell in cells if cell["cell_type"] == "markdown"]
    assert [line[3:] for line in lines if line[3:] in HEADINGS and line.startswith("## ")] == HEADINGS
