"The lock names what is there: streams, starts, recipe and the table of gates, judged again from the committed records."
import json
import shutil
from pathlib import Path

import pytest

from cit_workbench.models.backbone import start_hash
from cit_workbench.contract.registry import all_methods
from cit_workbench.record.record import Record
from cit_workbench.data.stream import all_streams
from cit_workbench.data.stream import get_stream
from cit_workbench.experiments.gates import gate_runs, judged, stale
from cit_workbench.experiments.overview import methods_index, overview
from cit_workbench.protocol import balanced_orders, content, drawn, lock_of, read_lock, recipe

RECORDS = Path(__file__).parents[1]/"records/testbed"


def test_every_stream_is_drawn_as_it_was_locked():
    lock = read_lock()
    assert sorted(lock["streams"]) == all_streams()
    streams = {n: get_stream(n) for n in lock["streams"]}
    assert [n for n, s in streams.items() if content(s) != lock["streams"][n]] == []
    tasks = {t.name: t for s in streams.values() for t, _ in s.roles()}
    assert {n: drawn(t) for n, t in tasks.items()} == lock["examples"]


def test_every_start_has_the_weights_that_were_locked():
    assert {n: start_hash(n) for n in read_lock()["starts"]} == read_lock()["starts"]


def test_the_gates_are_those_of_the_records():
    runs = {n: Record(RECORDS/f"{n}.jsonl") for n in gate_runs()}
    assert all(r.finished for r in runs.values()) and stale(runs) == []
    assert judged(runs) == read_lock()["gates"] and all(g["passed"] for g in read_lock()["gates"])
    assert recipe == read_lock()["recipe"]


def test_a_record_of_other_data_is_stale():
    name = "alone-box"
    rec = Record(RECORDS/f"{name}.jsonl")
    rec.run["hashes"]["data"] = "other pixels"
    assert stale({name: rec}) == [name]


def test_a_run_names_the_lock_only_where_it_stands_on_it():
    start, shapes = start_hash("tiny-instruct"), get_stream("shapes")
    order = shapes.reorder([t.name for t in shapes][::-1])
    optim, tune = recipe["optim"], recipe["tune"]
    assert lock_of(shapes, start, optim, tune) == lock_of(order, start, optim | {"lr": 1.}, tune) is not None
    other = [(get_stream("shapes", seed=1), start, optim, tune), (get_stream("shapes", tasks=["box"]), start, optim, tune),
             (shapes, "another start", optim, tune), (shapes, start, optim | {"steps": 20}, tune),
             (shapes, start, optim, tune | {"r": 8})]
    assert [lock_of(*o) for o in other] == [None]*len(other)


@pytest.mark.parametrize("n", [2, 4, 6, 8])
def test_orders_are_balanced(n):
    orders = balanced_orders([*range(n)])
    assert all(sorted(place) == [*range(n)] for place in zip(*orders))
    assert len({(a, b) for o in orders for a, b in zip(o, o[1:])}) == n*(n - 1)


def test_every_method_has_a_line_even_where_nothing_was_run(tmp_path):
    shutil.copytree(RECORDS, tmp_path/"testbed")
    shutil.copy(RECORDS.parent/"bench.json", tmp_path)
    lines = {r["method"]: r for r in overview(tmp_path)}
    assert [*lines] == all_methods()
    assert {n for n, r in lines.items() if r["verdict"] != "not run"} == {"finetune", "er", "single", "joint"}
    assert lines["er"]["verdict"] == "ends above plain tuning" and lines["er"]["ap_norm_low"] > lines["finetune"]["ap_norm_high"]
    assert len(overview(tmp_path)._repr_markdown_().splitlines()) == 2*(2 + len(all_methods())) + 1 # what was shown, what it costs


def test_lines_of_another_protocol_stand_in_a_block_of_their_own(tmp_path):
    (tmp_path/"zoo").mkdir()
    shutil.copytree(RECORDS, tmp_path/"testbed")
    shutil.copy(RECORDS.parent/"bench.json", tmp_path)
    lines = (RECORDS/"er-o0-s0.jsonl").read_text().splitlines(keepends=True)
    run = json.loads(lines[0])
    run["protocol"], run["protocol_fields"]["steps"] = "other", 10
    (tmp_path/"zoo/er-other.jsonl").write_text(json.dumps(run, separators=(",", ":")) + "\n" + "".join(lines[1:]))
    er = [r for r in overview(tmp_path) if r["method"] == "er"]
    assert [r["verdict"] for r in er] == ["ends above plain tuning", "cannot tell from 0 orders"]
    assert len({r["block"] for r in er}) == 2


def test_the_home_page_lists_every_method():
    home = (RECORDS.parents[1]/"README.md").read_text(encoding="utf-8")
    assert [n for n in all_methods() if f"](nbs/methods/{n}.ipynb)" not in home] == []
    assert methods_index().count("](methods/") == len(all_methods())
