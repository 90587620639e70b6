"The Samples view: each line shows the answers to its own question, whatever the ids of the questions are."
import json

import pytest

from cit_workbench.views.answers import Samples
from cit_workbench.record.record import Record
from cit_workbench.views.toy import toy_run


def rewritten(run, change):
    "Change every result line of a run."
    for path in run.path.glob("answers/*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(change(k, a)) + "\n" for k, a in enumerate(lines)))
    return Record(run.path)


def numbered(k, a):
    "Each question and its answers carry their number."
    return a | {"prompt": f"Question {k}?", "text": f"answer {k}"}


def shown(view):
    "The cells of each line: question and answers."
    view.filter.value = "all"
    view.page = 100
    view.show(0)
    lines = view.table.value.split("<tr>")[2:]
    return [[cell.split("</td>")[0] for cell in line.split("<td")[1:]] for line in lines]


@pytest.fixture
def run(tmp_path): return rewritten(toy_run(tmp_path/"a"), numbered)


@pytest.mark.parametrize("ids", [lambda k: 1, lambda k: "1", lambda k: [1, "1"][k % 2], lambda k: ["01", "1"][k % 2], str],
                         ids=["one number", "one text", "1 and '1'", "'01' and '1'", "its own"])
def test_each_line_shows_the_answers_to_its_own_question(run, ids):
    rec = rewritten(run, lambda k, a: a | {"question_id": ids(k)})
    lines = shown(Samples(rec))
    assert len(lines) > 1
    for k, (_, question, _, *answers) in enumerate(lines):
        assert f"Question {k}?" in question
        assert answers and all(f"answer {k}" in a for a in answers)


def test_two_runs_are_compared_by_place_and_question(run, tmp_path):
    "A run that asked something else at a place shows a dot there, also where all ids are the same."
    one = rewritten(run, lambda k, a: a | {"question_id": 1})
    other = rewritten(toy_run(tmp_path/"b", "er"), lambda k, a: numbered(k, a) | {"question_id": 1})
    mine = len(shown(Samples(one))[0])
    for k, line in enumerate(shown(Samples(one, other))): assert all(f"answer {k}" in a for a in line[3:])
    strange = rewritten(other, lambda k, a: a | {"prompt": "Something else?"} if k == 0 else a)
    first, second, *_ = shown(Samples(one, strange))
    assert all(a.endswith("·") for a in first[mine:]) and all("answer 1" in a for a in second[mine:])


def test_the_same_words_about_another_picture_are_another_question(run, tmp_path):
    "Many questions of a task have the same words; their targets tell them apart."
    other = rewritten(toy_run(tmp_path/"b", "er"), lambda k, a: numbered(k, a) | {"metadata": a["metadata"] | {"answer": "blue"}})
    mine = len(shown(Samples(run))[0])
    assert all(a.endswith("·") for line in shown(Samples(run, other)) for a in line[mine:])
