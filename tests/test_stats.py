"Tables and tuning: the unit is the task order, nothing is called best by chance, and nothing is tuned on what it is tested on."
import csv
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from cit_workbench import cli
from cit_workbench.commands.training import again
from cit_workbench.experiments import search
from cit_workbench.core.digests import digest
from cit_workbench.core.errors import CitError
from cit_workbench.metrics import holm, tost
from cit_workbench.metrics import order_means, paired, t_interval
from cit_workbench.metrics import ap_norm
from cit_workbench.record.compare import table
from cit_workbench.record.packing import pack
from cit_workbench.record.record import Record
from cit_workbench.record.writer import RecordWriter

TASKS = ("a", "b", "c")
ORDERS = [list(o) for o in itertools.permutations(TASKS)]
CHANCE = {"a": 10., "b": 20., "c": 0.}


def write(path, method="finetune", score=50., order=TASKS, seed=0, args=(), optim=(), joint=False, leaks=(), trainable=9,
          protocol=(("steps", 20),), wobble=0., **config):
    "A finished run whose every score is `score`, a little less on tasks learned earlier."
    asked = {"method": method, "method_args": dict(args), "stream": "toy", "seed": seed, "order": None,
             "optim": {"steps": 20, "lr": .003, **dict(optim)}, **config}
    fields, rows = dict(protocol), ["start", "joint"] if joint else ["start", *order]
    w = RecordWriter(path).open({"config": asked, "rows": rows, "columns": [(t, "stream") for t in order], "chance": CHANCE,
                                 "protocol": digest(fields), "protocol_fields": fields, "leaks": list(leaks)})
    for t, name in enumerate(rows):
        w.row(t, name, {c: {"formatted": score + wobble + i, "valid": 100., "content": score, "n": 9} for i, c in enumerate(TASKS)})
    w.event("end", task=rows[-1], trainable=trainable, stored_bytes=0, extra_forwards=0)
    return w.finish()


def runs(folder, method, score, wobbles=(0., 3., -2., 1.), seeds=(0, 1), name="", **kw):
    "One run per task order and seed."
    return [write(folder/f"{name or method}-{k}-{s}", method, score, ORDERS[k], s, wobble=x + .5*s, **kw)
            for k, x in enumerate(wobbles) for s in seeds]


def line(t, method):
    found, = [r for r in t.rows if r["method"] == method]
    return found


def bold(text):
    return re.findall(r"\\textbf\{(.*?)\}", text)


# statistics

def test_order_means_average_seeds_first():
    values = {("abc", 0): 1., ("abc", 1): 3., ("bca", 0): 8.}
    assert order_means(values) == {"abc": 2., "bca": 8.}
    assert t_interval(order_means(values)).mean == 5.


@pytest.mark.parametrize("n, factor", [(8, .836), (3, 2.484)])
def test_half_the_interval_in_standard_deviations(n, factor):
    x = np.random.default_rng(n).normal(size=n)
    i = t_interval(x)
    assert (i.high - i.low)/2/x.std(ddof=1) == pytest.approx(factor, abs=5e-4)
    assert (i.low, i.high) == pytest.approx(stats.ttest_1samp(x, 0).confidence_interval(.95))


def test_no_interval_below_two_values():
    assert np.isnan(t_interval([3.])).tolist() == [False, True, True]
    assert np.isnan(t_interval([])).all()


def test_paired_agrees_with_scipy_and_matches_orders():
    x, y = np.random.default_rng(0).normal(size=(2, 6))
    d, theirs = paired(dict(zip("abcdef", x)), dict(zip("fedcba", y[::-1]))), stats.ttest_rel(x, y)
    assert (d.mean, d.p, d.n) == pytest.approx(((x - y).mean(), theirs.pvalue, 6))
    assert (d.low, d.high) == pytest.approx(theirs.confidence_interval())
    with pytest.raises(CitError, match="'g' is on one side only"): paired({"a": 1., "g": 2.}, {"a": 1.})


def test_differences_without_spread():
    assert paired([1., 2.], [1., 2.]).p == 1. and paired([2., 3.], [1., 2.]).p == 0.


def test_holm_numbers():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert holm({"b": .9, "a": .8}) == {"b": 1., "a": 1.} and [*holm({"b": .9, "a": .8})] == ["b", "a"]
    p = holm({"a": .01, "none": float("nan")})
    assert p["a"] == .01 and np.isnan(p["none"])


def test_holm_adjusted_values_rise_with_the_raw_ones_and_never_shrink():
    ps = np.random.default_rng(1).uniform(size=30)
    adjusted = np.array(holm(list(ps)))
    assert (adjusted >= ps).all() and (np.diff(adjusted[ps.argsort()]) >= 0).all() and adjusted.max() <= 1


def test_tost_is_the_90_percent_interval_inside_the_margin():
    g = np.random.default_rng(2)
    for _ in range(200):
        a, b, m = g.normal(size=5), g.normal(size=5), g.uniform(.1, 3)
        inside = max(map(abs, paired(a, b, level=.9)[1:3])) < m
        assert (tost(a, b, m).verdict == "equivalent") == inside
    assert tost([1.], [1.], 1.).verdict == "not shown"


# tables

def test_a_run_in_the_streams_own_order_and_one_asked_for_it_are_one_unit(tmp_path):
    write(tmp_path/"0", score=40., seed=0)
    write(tmp_path/"1", score=44., seed=1, **{"order": list(TASKS)} | {})
    row, = table(tmp_path).rows
    assert (row["orders"], row["seeds"], row["runs"]) == (1, "2", 2) and list(row["units"]["average_accuracy"]) == ["a b c"]


def test_the_mean_is_over_orders_and_not_over_runs(tmp_path):
    for s in range(4): write(tmp_path/f"abc{s}", score=40., seed=s)
    for k in (1, 2): write(tmp_path/f"o{k}", score=70., order=ORDERS[k])
    row, = table(tmp_path).rows
    assert row["average_accuracy"] == pytest.approx(60. + 1) and row["seeds"] == "1–4"
    assert row["average_accuracy_high"] - row["average_accuracy"] == pytest.approx(4.302653*np.std([40, 70, 70], ddof=1)/3**.5)


def test_too_few_orders_have_no_interval_and_the_table_says_so(tmp_path):
    runs(tmp_path, "finetune", 40., wobbles=(0.,))
    runs(tmp_path, "er", 60., wobbles=(0., 1.))
    t = table(tmp_path)
    assert "average_accuracy_high" not in line(t, "er") and "±" not in t.text().split("No interval")[0]
    assert "No interval for finetune (n = 1); er (n = 2): it needs at least 3 task orders." in t.notes
    assert bold(t.latex()) == []
    assert table(tmp_path/"finetune-0-0").notes[0] == "No interval for all lines (n = 1): it needs at least 3 task orders."


def test_bold_only_if_the_paired_interval_excludes_the_runner_up(tmp_path):
    runs(tmp_path, "finetune", 40.)
    clear = runs(tmp_path, "er", 60., wobbles=(.5, 3., -2.5, 1.))
    t = table(tmp_path)
    assert any(s.startswith(f"{line(t, 'er')['average_accuracy']:.1f}") for s in bold(t.latex()))
    close = runs(tmp_path/"close", "ewc", 60.4, wobbles=(3., -2., .5, -1.))
    d = paired(*({o: line(table([*clear, *close]), m)["units"]["average_accuracy"][o] for o in ("a b c", "a c b", "b a c", "b c a")}
                 for m in ("ewc", "er")))
    assert d.mean > 0 and d.low < 0
    assert "average_accuracy" not in {k for _, k in best(table(tmp_path))}


def best(t):
    from cit_workbench.record.orders import find_leaders
    return find_leaders(t.rows)


def test_forgetting_leads_when_it_is_least():
    from cit_workbench.record.orders import find_leaders, SHOWN
    rows = [{**dict.fromkeys(SHOWN, np.nan), "ranked": True, "forgetting": f, "units": {"forgetting": dict(zip("abc", (f, f + 1, f - 1)))}}
            for f in (20., 5.)]
    rows[1]["units"]["forgetting"]["a"] += .1
    assert find_leaders(rows) == {(1, "forgetting")}


def test_orders_that_only_one_has_do_not_count(tmp_path):
    runs(tmp_path, "finetune", 40., wobbles=(0., 3., -2., 1., 0., 2.))
    runs(tmp_path, "er", 60., wobbles=(.5, 3., -2.5))
    wide = line(table(tmp_path).against("finetune"), "er")
    assert wide["difference"] == pytest.approx(20.) and wide["difference_low"] < 20 < wide["difference_high"]
    runs(tmp_path, "ewc", 60., wobbles=(.5, 3.))
    few = line(table(tmp_path).against("finetune"), "ewc")
    assert few["difference"] == pytest.approx(20.25) and np.isnan([few["difference_low"], few["p"]]).all()
    assert (wide["n"], few["n"]) == (3, 2) and "n" in table(tmp_path).against("finetune").head
    assert "No interval: 2 common orders of finetune and ewc." in table(tmp_path).against("finetune").notes


def test_without_common_orders_there_is_no_word_about_p(tmp_path):
    runs(tmp_path, "finetune", 40., wobbles=(0., 3., -2.))
    write(tmp_path/"er", "er", order=ORDERS[5])
    t = table(tmp_path).against("finetune")
    assert line(t, "er")["n"] == 0 and t.notes[-1] == "No interval: 0 common orders of finetune and er."
    assert "p" not in t.head and not [s for s in t.notes if s.startswith("p:")]


def test_a_run_that_is_found_twice_counts_once(tmp_path):
    made = runs(tmp_path/"runs", "er", 60., wobbles=(0., 8., 4.)) + runs(tmp_path/"runs", "finetune", 40.)
    alone = table(tmp_path)
    assert not [s for s in alone.notes if "duplicate" in s]
    shutil.copytree(made[0].path, tmp_path/"copy")
    write(tmp_path/"asked", "er", 60., wobble=0., **{"seed": 0})
    for r in made[:3]: pack(r.path, tmp_path/"packed"/f"{r.path.name}.jsonl")
    twice = table(tmp_path)
    assert twice.notes == [*alone.notes, "Left out: 5 duplicates."]
    assert [r["units"]["average_accuracy"] for r in twice.rows] == [r["units"]["average_accuracy"] for r in alone.rows]
    write(tmp_path/"other", "er", 60., probe_every=4)
    assert line(table(tmp_path), "er")["runs"] == line(alone, "er")["runs"] + 1
    (tmp_path/"copy"/"result.json").unlink()
    assert line(table(tmp_path, keep=["unfinished"]), "er")["runs"] == line(alone, "er")["runs"] + 1


def test_blocks_by_protocol_name_what_differs_and_are_ranked_apart(tmp_path):
    runs(tmp_path, "er", 90., protocol=(("steps", 60),), name="long")
    runs(tmp_path, "er", 60.)
    runs(tmp_path, "finetune", 40., wobbles=(0., 3., -2., 1.5))
    t = table(tmp_path)
    assert [b.split(": ")[1] for b in dict.fromkeys(r["block"] for r in t.rows)] == ["steps = 20", "steps = 60"]
    assert not [s for s in bold(t.latex()) if s.startswith("9")] and [s for s in bold(t.latex()) if s.startswith("6")]


@pytest.mark.parametrize("how", [{"tuned_on": {"stream": "shapes", "trials": 12, "old_val": True}}, {"leaks": ["val_of_old_tasks"]},
                                 {"tuned_on": {"stream": "shapes", "trials": 99}}, {"tuned_on": {"stream": "toy", "trials": 99}},
                                 {"tuned_on": {"stream": "toy", "trials": 99, "old_val": False}},
                                 {"tuned_on": {"stream": "shapes-tune", "trials": 9, "old_val": True}}])
def test_what_saw_old_validation_data_is_never_ranked_with_the_rest(tmp_path, how):
    runs(tmp_path, "ewc", 90., **how)
    runs(tmp_path, "lwf", 80., wobbles=(0., 3., -2., 1.5), **how)
    runs(tmp_path, "er", 60.)
    runs(tmp_path, "finetune", 40., wobbles=(0., 3., -2., 1.5))
    t = table(tmp_path).against("finetune")
    assert line(t, "ewc")["block"] == "used validation data of old tasks: not ranked" and line(t, "er")["block"] == ""
    assert [r["ranked"] for r in t.rows] == [True, True, False, False]
    assert "difference" not in line(t, "ewc") and bold(t.latex()) and all(s.startswith("6") for s in bold(t.latex()))


@pytest.mark.parametrize("tuned_on", [{}, {"stream": "shapes-tune", "trials": 9}, {"stream": "shapes", "trials": 9, "old_val": False}])
def test_tuned_elsewhere_and_said_to_be_without_old_validation_data_is_ranked(tmp_path, tuned_on):
    write(tmp_path/"x", tuned_on=tuned_on)
    assert table(tmp_path).rows[0]["ranked"] and "validation data" not in table(tmp_path).text()


def test_a_leak_that_was_only_observed_counts(tmp_path):
    w = RecordWriter(write(tmp_path/"x").path)
    w.event("end", task="c", trainable=9, stored_bytes=0, extra_forwards=0, observed=["val_of_old_tasks"])
    assert not table(tmp_path).rows[0]["ranked"]


def test_bounds_are_not_ranked(tmp_path):
    for m, kw in (("single", {}), ("joint", {"joint": True}), ("zero_shot", {"trainable": 0})):
        runs(tmp_path, m, 95., wobbles=(.1, .2, .3, .1), **kw)
    runs(tmp_path, "er", 60.)
    runs(tmp_path, "finetune", 40., wobbles=(0., 3., -2., 1.5))
    t = table(tmp_path)
    assert "Bounds, not ranked: joint, single, zero_shot." in t.notes
    assert not [s for s in bold(t.latex()) if s.startswith("9")]


def test_tuning_is_marked_where_it_differs(tmp_path):
    how = {"tuned_on": {"stream": "shapes-tune", "trials": 12, "old_val": False}}
    write(tmp_path/"ft", "finetune", **how)
    write(tmp_path/"er", "er", **how)
    assert "All tuned on shapes-tune, 12 trials." in table(tmp_path).notes
    write(tmp_path/"ewc", "ewc", tuned_on={"stream": "shapes-tune", "trials": 30, "old_val": False})
    t = table(tmp_path)
    marks = {r["method"]: r["mark"] for r in t.rows}
    assert marks["er"] == marks["finetune"] != marks["ewc"]
    assert f"[{marks['ewc']}] tuned on shapes-tune, 30 trials." in t.notes and f"ewc [{marks['ewc']}]" in t.markdown()


def test_ap_norm_of_every_order_and_of_joint_from_one_single(tmp_path):
    write(tmp_path/"single", "single", 80.)
    runs(tmp_path, "finetune", 40.)
    write(tmp_path/"joint", "joint", 70., order=ORDERS[3], joint=True)
    write(tmp_path/"oracle", "er", 40., protocol=(("steps", 20), ("oracle", True)))
    t, chance = table(tmp_path), list(CHANCE.values())
    assert line(t, "joint")["ap_norm"] == pytest.approx(ap_norm([70, 71, 72], chance, [80, 81, 82]))
    units = line(t, "finetune")["units"]["ap_norm"]
    assert len(units) == 4 and units["a b c"] == pytest.approx(ap_norm([40.25, 41.25, 42.25], chance, [80, 81, 82]))
    assert line(t, "er")["ap_norm"] == pytest.approx(ap_norm([40, 41, 42], chance, [80, 81, 82]))


def test_settings_are_lines_and_labels_say_what_differs(tmp_path):
    for k, lr in enumerate((.001, .003)): write(tmp_path/f"f{k}", optim={"lr": lr}.items())
    for k, lam in enumerate((1., 10.)):
        write(tmp_path/f"c{k}", "er+ewc", args={"er": {"size": 160, "share": .25}, "ewc": {"lam": lam, "n": 200}}.items())
    for k, s in enumerate((1, 2)): write(tmp_path/f"d{k}", "a+b", args={"a": {"s": s}, "b": {"s": -s}}.items())
    assert {r["method"] for r in table(tmp_path).rows} == {"finetune(lr=0.001)", "finetune(lr=0.003)", "er+ewc(lam=1)", "er+ewc(lam=10)",
                                                           "a+b(a.s=1, b.s=-1)", "a+b(a.s=2, b.s=-2)"}


def test_of_copies_the_latest_version_counts(tmp_path):
    for k in (1, 3, 2):
        rec = write(tmp_path/f"v{k}", "ewc", score=10.*k)
        there = json.loads((rec.path/"run.json").read_text())
        if k > 1: there["behaviour"] = {"rooms": {"training": k}}
        (rec.path/"run.json").write_text(json.dumps(there))
    t = table(tmp_path)
    assert line(t, "ewc")["average_accuracy"] == pytest.approx(31.) and any("2 duplicates" in note for note in t.notes)


def test_labels_name_older_versions_and_values_that_are_nothing(tmp_path):
    for k, n in enumerate((None, 8)): write(tmp_path/f"n{k}", "er", args={"size": n}.items())
    for k in (1, 2, 3):
        rec = write(tmp_path/f"v{k}", "ewc")
        there = json.loads((rec.path/"run.json").read_text())
        (rec.path/"run.json").write_text(json.dumps({**there, "behaviour": {"methods": {"ewc": k}}}))
    assert {r["method"] for r in table(tmp_path).rows} == {"er(size=None)", "er(size=8)", "ewc(version of ewc=1)",
                                                           "ewc(version of ewc=2)", "ewc"}


def test_against_adjusts_over_the_block_and_tests_equivalence(tmp_path):
    scores = {"er": (46., (0., 5., -2., 1.)), "ewc": (42., (1., 1., -2., 3.)), "lwf": (40.2, (.1, 2.9, -2., 1.1))}
    for m, (s, w) in scores.items(): runs(tmp_path, m, s, wobbles=w)
    runs(tmp_path, "finetune", 40.)
    t = table(tmp_path).against("finetune", margin=1.)
    of = lambda m: line(t, m)["units"]["average_accuracy"]
    raw = {m: paired(of(m), of("finetune")).p for m in scores}
    assert {m: line(t, m)["p"] for m in scores} == pytest.approx(holm(raw))
    assert line(t, "lwf")["p_equivalent"] == pytest.approx(holm({m: tost(of(m), of("finetune"), 1.).p for m in scores})["lwf"])
    runs(tmp_path, "joint", 41., wobbles=(.5, 1., 2., -1.), joint=True)
    more = table(tmp_path).against("finetune", margin=1.)
    assert {m: line(more, m)["p"] for m in scores} == {m: line(t, m)["p"] for m in scores}
    assert line(more, "joint")["p"] == pytest.approx(paired(line(more, "joint")["units"]["average_accuracy"], of("finetune")).p)
    assert t.notes[-1].endswith("; intervals are not adjusted.")
    assert more.notes[-1].endswith("; intervals and the p of bounds are not adjusted.")
    assert "AP − finetune's" in t.head and "p (within ±1)" in t.head
    with pytest.raises(CitError, match="unknown method of the table 'err'"): t.against("err")


def test_latex_is_well_formed_and_escaped(tmp_path):
    runs(tmp_path, "a_b%&", 60., protocol=(("steps", 20), ("template", "{x}_#1~")))
    runs(tmp_path, "finetune", 40.)
    text = table(tmp_path).latex()
    body = text[text.index(r"\toprule"):]
    rows = [r for r in body.splitlines() if r.endswith(r"\\") and "multicolumn" not in r]
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1)
    assert {len(re.findall(r"(?<!\\)&", r)) + 1 for r in rows} == {len(columns)}
    assert r"a\_b\%\&" in text and r"\{x\}\_\#1\textasciitilde{}" in text
    bare = re.sub(r"\\[&%$#_{}]", "", body)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and not re.search(r"[±−–·#_%]", bare)


def test_csv_holds_every_number(tmp_path):
    runs(tmp_path, "er", 60.)
    runs(tmp_path, "finetune", 40.)
    t = table(tmp_path).against("finetune")
    rows = list(csv.DictReader(io.StringIO(t.csv())))
    assert [r["method"] for r in rows] == ["er", "finetune"]
    for k in ("average_accuracy", "average_accuracy_low", "average_accuracy_high", "difference", "p"):
        assert float(rows[0][k]) == pytest.approx(line(t, "er")[k])
    assert rows[1]["difference"] == "" and "units" not in rows[0]


def test_packed_runs_give_the_same_table(tmp_path):
    made = runs(tmp_path/"runs", "er", 60.) + runs(tmp_path/"runs", "finetune", 40.)
    for r in made: pack(r.path, tmp_path/"packed"/f"{r.path.name}.jsonl")
    assert table(tmp_path/"packed").text() == table(tmp_path/"runs").text()


@pytest.mark.parametrize("words, said", [([], "± is half of"), (["--format", "latex"], r"\toprule"), (["--format", "csv"], "block,method"),
                                         (["--format", "markdown", "--against", "finetune"], "| method |")])
def test_cit_table(tmp_path, capsys, words, said):
    runs(tmp_path, "er", 60.)
    runs(tmp_path, "finetune", 40.)
    cli.main(["table", str(tmp_path), *words])
    assert said in capsys.readouterr().out


# tuning

def test_every_arm_gets_its_trials():
    for method, names in (("finetune", ["lr"]), ("ewc", ["lam", "lr"]), ("er", ["share", "lr"])):
        axes = search.axes_of(method, {}, {}, .003, 12)
        assert list(axes) == names and np.prod([len(v) for v in axes.values()]) == 12
        assert all(v == sorted({*v}) for v in axes.values())
    assert max(search.axes_of("er", {}, {}, .003, 12)["share"]) <= 1


@pytest.mark.parametrize("method, grid, trials, said", [
    ("ewc", {"lam": [1, 10]}, 5, "does not make 5 trials"), ("er+ewc", {}, 12, "several strengths"),
    ("finetune", {"lr": [.1, .2]}, 3, "does not make 3 trials")])
def test_a_grid_of_another_size_is_refused(method, grid, trials, said):
    with pytest.raises(CitError, match=said): search.axes_of(method, {}, grid, .003, trials)


@pytest.mark.parametrize("words, said", [
    (["ewc", "--stream", "shapes"], "tuning is on stream 'shapes-tune' only"), (["ewcc"], "unknown method 'ewcc'"),
    (["ewc", "--trials", "0"], "trials is 0"), (["ewc", "--stream-args", "tasks=['col-word']"], "unknown task to tune on 'col-word'"),
    (["ewc", "--grid", "lamm=1,2"], "'lamm' (did you mean 'lam'?)")])
def test_tuning_refuses_before_it_trains(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit): cli.main(["tune", *words])
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_tiny_tuning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIT_QUIET", "1")
    words = ["tune", "finetune", "--trials", "2", "--grid", "lr=.0003,.003", "--stream-args", "tasks=['box-night']", "n_train=400", "n_val=8",
             "--optim", "steps=24", "batch=8", "--compute", "threads=1"]
    cli.main(words)
    out = capsys.readouterr().out
    assert "cit run --method finetune --optim lr=0.003 --tuned-on stream=shapes-tune trials=2 old_val=False" in out
    found, = [json.loads(p.read_text()) for p in (tmp_path/"runs/tune").glob("*.json")]
    trials = [Record(tmp_path/"runs/tune"/t["run"]) for t in found["trials"]]
    single, = [Record(p) for p in (tmp_path/"runs/tune").glob("single-*")]
    assert [r.config["optim"]["lr"] for r in trials] == [.0003, .003]
    assert found["score"] == max(t["score"] for t in found["trials"]) == search._score(trials[1], single)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"runs/tune").glob("*/*") if p.is_file()}
    cli.main(words)
    assert {p: p.stat().st_mtime_ns for p in before} == before and capsys.readouterr().out == out
    used = cli.parse(cli.run, again(found).split()[2:])
    assert (used["tuned_on"], used["optim"]) == (found["tuned_on"], {"lr": .003})
