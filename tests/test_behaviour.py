"Results are known by versions: what must raise one, what a raised one makes older, and what never counts."
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import golden
import pytest

from cit_workbench import behaviour as module
from cit_workbench.experiments import keys
from cit_workbench.behaviour import ROOMS, VERSIONS, changed_source, modules_of, raised
from cit_workbench.core.source import package
from cit_workbench.core.digests import digest
from cit_workbench.core.errors import CitError
from cit_workbench.contract.identity import code_of
from cit_workbench.contract.net import Net
from cit_workbench.contract.registry import all_methods, method_class
from cit_workbench.record.compare import table
from cit_workbench.record.record import Record
from cit_workbench.data.scorers import scorer_versions, scorers
from cit_workbench.data.stream import get_stream
from cit_workbench.measure.answers import evaluate
from cit_workbench.experiments.cells import plan
from cit_workbench.experiments.keys import data_digest
from cit_workbench.experiments.pages import code_cells, pages_dir

RECORDS = Path(__file__).parents[1]/"records"
sys.path.insert(0, str(RECORDS.parent/"tools"))
import style  # noqa: E402

IMPORTS = {row["name"]: row["imports"] for row in style.survey(RECORDS.parent)}
# A run passes through these, and its bits depend on none of them: they write, read, watch or steer.
PASSED = {"behaviour", "core/source", "training/checkpoint", "measure/listening",
          "measure/moments", "measure/moves", "measure/overlap", "measure/schedule", "measure/similarity", "measure/spectra", "measure/watch"}
PASSED |= {"record/blocks", "record/compare", "record/configuration", "record/copies", "record/curves",
           "record/files", "record/notes", "record/orders", "record/packing", "record/queries", "record/record",
           "record/settings", "record/summary", "record/tables", "record/text", "record/writer", "training/asked",
           "training/control", "training/locks", "training/queue", "training/replies"}


@pytest.fixture(scope="module")
def found(): return golden.computed()


@pytest.fixture(scope="module")
def kept(): return json.loads(golden.FILE.read_text(encoding="utf-8"))


# what every method, chain and scorer computes

def test_nothing_is_computed_otherwise_without_a_version(found, kept):
    said = golden.verdicts(found, kept)
    assert not said, golden.advice(said)


def test_a_changed_figure_needs_a_raised_version(kept):
    now = json.loads(json.dumps(kept))
    now["runs"]["ewc"]["loss"][-1] += 1e-2
    (sentence, excused), = golden.verdicts(now, kept)
    assert sentence == "ewc computes another loss" and not excused
    assert "raise the version" in golden.advice([(sentence, excused)])
    now["versions"]["methods"]["ewc"] += 1
    assert golden.verdicts(now, kept) == [("ewc computes another loss", True)]


def test_a_version_of_another_method_excuses_nothing(kept):
    now = json.loads(json.dumps(kept))
    now["runs"]["ewc"]["answers"][-1] = "others"
    now["versions"]["methods"]["er"] += 1
    assert golden.verdicts(now, kept) == [("ewc computes another answers", False)]


def test_elsewhere_numbers_may_differ_by_rounding(kept):
    now = json.loads(json.dumps(kept))
    now["machine"]["processor"] = "another"
    now["runs"]["ewc"]["loss"][0] *= 1 + 1e-5
    assert golden.verdicts(now, kept) == []
    now["runs"]["ewc"]["loss"][0] *= 1 + 1e-2
    assert len(golden.verdicts(now, kept)) == 1


# rooms

def imported(name:str, seen:set) -> set:
    "Modules of the package that a module imports at its top, at any depth."
    if name in seen: return seen
    seen.add(name)
    for target, _, late in IMPORTS[name]:
        if not late: imported(target, seen)
    return seen


def test_every_module_that_a_run_imports_has_a_room():
    roomed = {str(file.relative_to(package()).with_suffix("")) for room in ROOMS for file in modules_of(room)}
    assert imported("training/train", set()) - roomed - PASSED == set()


def test_a_module_that_is_named_and_missing_is_an_error(tmp_path):
    (tmp_path/"stream.py").write_text("")
    with pytest.raises(CitError, match="room 'data' names the module 'core/errors', which the package does not have"):
        modules_of("data", tmp_path)


def test_a_moved_module_keeps_counting(tmp_path):
    "Its code counts under its new name, and nothing can leave the key unseen."
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words],
                                        check=True, capture_output=True)
    (tmp_path/"loop.py").write_text("rate = 1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path/"loop.py").rename(tmp_path/"cycle.py")
    with pytest.raises(CitError, match="names the module 'loop'"): changed_source(tmp_path, {"training": ["loop"]})
    moved = changed_source(tmp_path, {"training": ["cycle"]})
    (tmp_path/"cycle.py").write_text("rate = 2\n")
    assert "" != moved != changed_source(tmp_path, {"training": ["cycle"]}) != ""


# keys of cells

@pytest.fixture
def cell(tmp_path):
    def make(text=""):
        (tmp_path/"s.toml").write_text(f'[sweep]\npages = ["ewc"]\n[set]\noptim = {{steps = 2}}\n{text}')
        return plan(tmp_path/"s.toml", tmp_path/"out")[0]
    return make


@pytest.mark.parametrize("room", VERSIONS)
def test_every_room_is_in_the_key_of_a_cell(cell, monkeypatch, room):
    before = cell()
    monkeypatch.setitem(VERSIONS, room, VERSIONS[room] + 1)
    after = cell()
    assert after.key != before.key and after.id == before.id
    assert raised(before.made_by, after.made_by) == [f"{room} {VERSIONS[room] - 1} → {VERSIONS[room]}"]


def test_the_recipe_is_in_the_key_where_a_cell_leaves_it_open(cell, monkeypatch):
    from cit_workbench.protocol import recipe
    optim = {"lr": 1e-3, "steps": 2}
    complete = {"optim": optim, "tune": {"targets": ".*q_proj"}}
    before = [cell().key, data_digest(complete), data_digest({"optim": {**optim, "lr": None}})]
    monkeypatch.setitem(recipe, "optim", {**recipe["optim"], "lr": .5})
    after = [cell().key, data_digest(complete), data_digest({"optim": {**optim, "lr": None}})]
    assert [a == b for a, b in zip(before, after)] == [False, True, False]


def test_scorers_of_the_stream_are_in_the_key(cell, monkeypatch):
    before = cell().key
    monkeypatch.setitem(scorer_versions, "textvqa", 2)
    assert cell().key == before
    monkeypatch.setitem(scorer_versions, "accuracy", 2)
    assert cell().key != before


def test_an_edit_counts_until_it_is_committed(cell, monkeypatch):
    before = cell()
    monkeypatch.setattr(module, "source_now", lambda: "a1b2")
    assert cell().key != before.key
    assert "uncommitted code" in raised(before.made_by, cell().made_by)


def test_suites_and_metrics_belong_to_rooms():
    found = {room: {file.stem for file in modules_of(room)} for room in ROOMS}
    assert "coin" in found["data"] and "metrics" in found["scoring"] and "protocol" in found["training"]


# answers

def test_a_corrected_scorer_scores_anew(tmp_path, monkeypatch):
    from cit_workbench.models.backbone import get_backbone
    monkeypatch.setenv("CIT_CACHE", str(tmp_path))
    stream = get_stream("shapes", tasks=["col-word"], n_train=8, n_val=2, n_test=4)
    net = Net(get_backbone("tiny-instruct"), stream)
    score = lambda: evaluate(net, ["col-word"])["col-word"][0]["formatted"]
    before = score()
    monkeypatch.setitem(scorers, "accuracy", lambda fmt, example, text: 1.)
    assert score() == before < 100
    monkeypatch.setitem(scorer_versions, "accuracy", 2)
    assert score() == 100


def test_answers_do_not_depend_on_the_text_of_the_code(monkeypatch):
    from cit_workbench.measure import answers, store
    before = store.answered_by(method_class("er")())
    monkeypatch.setitem(VERSIONS, "models", 2)
    assert store.answered_by(method_class("er")()) != before
    monkeypatch.undo()
    monkeypatch.setattr(answers, "score_line", None)
    assert store.answered_by(method_class("er")()) == before


# protocols

def raw(path) -> dict: return json.loads(path.read_text(encoding="utf-8").splitlines()[0])


def test_records_from_before_versions_share_a_block_with_new_ones(finished, tmp_path):
    path = sorted((RECORDS/"testbed").glob("finetune-*.jsonl"))[0]
    was = raw(path)
    assert digest(was["protocol_fields"]) == was["protocol"], "the protocol is the digest of its fields"
    now = Record(path).run
    assert now["protocol_fields"]["scorers"] == "scoring 1" and now["protocol"] == digest(now["protocol_fields"])
    new = finished("finetune").rec.run["protocol_fields"]
    assert new["scorers"] == "scoring 1"
    assert {k for k in new} == {k for k in now["protocol_fields"]}


def test_tables_name_scores_of_an_older_scorer(finished, monkeypatch):
    runs = [finished("finetune").rec, finished("er").rec]
    monkeypatch.setitem(scorer_versions, "accuracy", scorer_versions["accuracy"] + 1)
    assert "scores by 'accuracy': version 1 in all runs, today's is 2." in table(runs).notes


def test_tables_name_a_column_of_an_older_version(finished, monkeypatch):
    from cit_workbench.record import notes
    runs = [finished("finetune").rec, finished("er").rec]
    assert not [note for note in table(runs).notes if "version" in note]
    now = notes.COLUMNS["content"]
    monkeypatch.setitem(notes.COLUMNS, "content", now + 1)
    assert f"content: version {now} in all runs, today's is {now + 1}." in table(runs).notes


def test_tables_name_runs_of_an_earlier_version(finished, monkeypatch):
    monkeypatch.setitem(VERSIONS, "training", VERSIONS["training"] + 1)
    notes = table([finished("finetune").rec]).notes
    assert f"Made by an earlier version (training {VERSIONS['training'] - 1} → {VERSIONS['training']}): finetune (1 runs)." in notes


def test_a_start_outside_the_package_is_known_as_a_run_knows_it(tmp_path):
    "By its weights and configurations: notes in its folder are no part of it."
    from cit_workbench.core.paths import assets
    from cit_workbench.models.loading import start_hash
    shutil.copytree(assets("tiny-instruct"), tmp_path/"start")
    before = data_digest({"backbone": str(tmp_path/"start")})
    assert before == digest(start_hash(str(tmp_path/"start")))
    keys._start_digest.cache_clear()
    (tmp_path/"start/notes.md").write_text("trained on Tuesday")
    assert data_digest({"backbone": str(tmp_path/"start")}) == before


def test_a_run_at_the_root_of_the_disk_is_in_no_table(): assert module.admitted("/run.jsonl") is None


# methods

@pytest.mark.parametrize("name", all_methods())
def test_the_class_of_a_page_is_that_of_the_package(name):
    made = {"__name__": "a_page"}
    sources = [source for source, _, flags in code_cells(pages_dir()/f"{name}.ipynb") if "export" in flags]
    sys.modules["a_page"] = type(sys)("a_page")
    try:
        for place, source in enumerate(sources): # As a notebook does: byte code depends on what is compiled together
            exec(compile(source, f"{name}, cell {place}", "exec"), made)
    finally: del sys.modules["a_page"]
    cls = made[method_class(name).__name__]
    assert cls is not method_class(name) and code_of(cls()) == {}
    cls.loss = lambda self, net, batch, out: 2.
    assert code_of(cls()) != {}


@pytest.mark.parametrize("name", all_methods())
def test_a_later_field_has_its_earlier_meaning_by_default(name):
    cls = method_class(name)
    default = {f.name: f.default for f in fields(cls)}
    assert {field: default[field] for field in cls.later} == cls.later
    assert cls.version >= 1


# committed cells

def test_committed_cells_say_what_made_them():
    table_of_versions = json.loads((RECORDS/"keys.json").read_text(encoding="utf-8"))
    for name, made_by in table_of_versions.items():
        run = Record(RECORDS/name).run
        assert run["behaviour"] == made_by, name
        if "methods" not in made_by: continue # No cell of a sweep
        assert "method_code" not in run["config"], name
        assert set(made_by["methods"]) == set(run["method"].split("+")), name


def test_committed_cells_are_finished_where_nothing_was_raised(monkeypatch):
    monkeypatch.setattr(module, "source_now", lambda: "")
    cells = [c for file in sorted((RECORDS.parent/"sweeps").glob("*.toml")) for c in plan(file) if c.records]
    kept = [(c, path) for c in cells for path in [c.packed if c.packed.exists() else None, *c.older] if path]
    assert len({path for _, path in kept}) >= 100
    for c, path in kept:
        made_by = Record(path).run["behaviour"]
        assert c.finished == (not raised(made_by, c.made_by)), f"{c}: {raised(made_by, c.made_by)}"


def test_cells_of_an_older_spine_stay_visibly_older():
    older = [name for name, made_by in json.loads((RECORDS/"keys.json").read_text()).items()
             if 0 in made_by.get("rooms", {}).values()]
    assert len(older) == 11
    assert any(note.startswith("Made by an earlier version (models 0 →") and "(11 runs)" in note
               for note in table(RECORDS/"zoo").notes)
