"Laws of suites: they hold for every module of `cit_workbench/suites/`, which no list names."
import ast
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cit_workbench.core.errors import CitError
from cit_workbench.data.pictures import load_image
from cit_workbench.data.stream import all_suites, get_stream, scorers_of
from cit_workbench.training.train import Run

ROLES = {"stream", "held_in", "unseen"}


def suite(name): return import_module(f"cit_workbench.suites.{name}")


@pytest.fixture(scope="module", params=all_suites())
def named(request, tmp_path_factory):
    "A suite's name, and a small folder in its own layout."
    return request.param, suite(request.param).sample(tmp_path_factory.mktemp(request.param)/"folder")


def test_it_says_in_a_line_what_it_is(named):
    about = suite(named[0]).about
    assert isinstance(about, str) and about.strip() == about and "\n" not in about and len(about) > 20


@pytest.mark.parametrize("name", all_suites())
def test_what_it_says_is_a_literal(name):
    tree = ast.parse(Path(suite(name).__file__).read_text(encoding="utf-8"))
    said = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "about"]
    assert [ast.literal_eval(value) for value in said] == [suite(name).about]


def test_a_module_whose_name_begins_with_an_underscore_is_no_suite(tmp_path, monkeypatch):
    (tmp_path/"_helper.py").write_text("about = 'what suites share'\n", encoding="utf-8")
    (tmp_path/"added.py").write_text("about = 'a suite'\ndef load(folder): return folder\n", encoding="utf-8")
    package = import_module("cit_workbench.suites")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "added" in all_suites() and "_helper" not in all_suites()
    with pytest.raises(CitError, match="unknown suite '_helper'.*added:FOLDER"): get_stream(f"_helper:{tmp_path}")


def test_its_sample_is_a_stream(named):
    name, folder = named
    stream = get_stream(f"{name}:{folder}")
    assert len(stream) >= 2 and {role for _, role in stream.roles()} <= ROLES
    names = [task.name for task, _ in stream.roles()]
    assert len({*names}) == len(names)
    assert scorers_of(stream)  # Raises for a scorer that nobody registered


def test_its_rows_can_be_learned_and_asked(named):
    name, folder = named
    for task, _ in get_stream(f"{name}:{folder}").roles():
        seen = set()
        for split, count in task.n.items():
            for example in (task.example(split, index) for index in range(count)):
                assert example.id not in seen and example.question and isinstance(example.answer, str)
                assert not example.choices or example.answer in example.choices
                if isinstance(example.image, str): load_image(example.image)
                seen.add(example.id)
        truths = [task.example("test", index) for index in range(task.n["test"])]
        assert all(task.format.valid(example.answer) for example in truths)
        assert all(task.format.score(example, example.answer) == 1 for example in truths)
        assert 0 <= task.chance <= 100
        with pytest.raises(CitError, match="there is no index"): task.example("train", task.n["train"])


def test_its_digest_depends_on_content_alone(named, tmp_path):
    name, folder = named
    before = get_stream(f"{name}:{folder}").digest()
    shutil.copytree(folder, tmp_path/folder.name)
    assert get_stream(f"{name}:{tmp_path/folder.name}").digest() == before
    picture = next(path for path in sorted((tmp_path/folder.name).rglob("*")) if path.suffix in (".png", ".jpg"))
    picture.write_bytes(picture.read_bytes() + b" ")
    assert get_stream(f"{name}:{tmp_path/folder.name}").digest() != before


def test_bad_input_is_one_sentence(named):
    name, folder = named
    for bad, fields, said in ((f"{name}:/no/such/folder", {}, "/no/such/folder"), (f"{name}:", {}, "does not exist"),
                              (f"{name}:{folder}", {"taks": "x"}, "'taks'"), (f"{name}:{folder}", {"tasks": "x"}, "'x'")):
        with pytest.raises(CitError, match=said) as error: get_stream(bad, **fields)
        assert "\n" not in str(error.value)


def test_some_of_its_tasks_in_any_order(named):
    name, folder = named
    names = [task.name for task in get_stream(f"{name}:{folder}")]
    few = get_stream(f"{name}:{folder}", tasks=names[1::-1])
    assert [task.name for task in few] == names[1::-1]


def test_a_method_learns_it(named, tmp_path):
    name, folder = named
    run = Run("finetune", stream=f"{name}:{folder}", optim={"steps": 1, "batch": 2}, compute={"threads": 1}, out=str(tmp_path/"run"))
    assert run.train().finished


def test_reading_it_loads_no_model(named):
    name, folder = named
    code = ("import sys; from cit_workbench.data.stream import get_stream; get_stream(sys.argv[1]).digest(); "
            "print([m for m in ('torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, f"{name}:{folder}"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.stdout.strip() == "[]", done.stderr
