"""What every method, chain and scorer computes on two tasks and four steps, as `golden.json` keeps it.

`python tests/golden.py` says what has changed; with `--write` it writes the file anew, and refuses where figures have changed but no version
was raised.
"""
import json
import math
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CIT_QUIET", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from tiny import CHAINS, MORE, TASKS, train

from cit_workbench.behaviour import COLUMNS, VERSIONS
from cit_workbench.core.digests import canonical, digest
from cit_workbench.views.fields import fields_of
from cit_workbench.contract.registry import all_methods, method_class
from cit_workbench.data.scorers import scorers
from cit_workbench.data.stream import all_scorers, get_stream
from cit_workbench.data.task import Example

FILE = Path(__file__).with_name("golden.json")
SMALL = {"stream_args": {"tasks": TASKS[:2], "n_train": 32, "n_test": 4}, "optim": {"lr": 2e-2}}
TEXTS = ["", " ", ".", "a", "A", "yes", "Yes.", "no", "cat", "Cat", "cats", "a cat", "the cat sat.", "two", "2", "2.", "B. red",
         "unanswerable", "American coot", "coot", "[0.1, 0.2, 0.3, 0.4]", "[0.11, 0.2, 0.3, 0.42]", "0.1 0.2 0.3 0.4",
         "12, 30, 44, 46", "(7, 9), (20, 30)", "dont", "don't", "what's", "11:30", "1,000", "New-York", "猫", "一只猫。"]
ANSWERS = ["cat", "yes", "B", "2", "American coot", "[0.1, 0.2, 0.3, 0.4]", "don't", "what's", "1000", "unanswerable", "一只猫"]


def machine() -> dict:
    "Return what floating-point results may depend on besides the code."
    lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    about = {key.strip(): value.strip() for key, value in reversed(lines)}
    processor = " ".join(about.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    return {"torch": torch.__version__, "system": platform.machine(), "processor": processor,
            "kernels": torch.backends.cpu.get_cpu_capability()}


def forms() -> dict:
    "Return every method and chain, and the further forms of those that route in several ways: name → (method, fields)."
    found = [(name, {}) for name in [*all_methods(), *CHAINS]]
    found += [(name, {field.name: value}) for name in all_methods() for field in fields_of(method_class(name))
              for value in field.allowed or [] if value != field.default]
    found += [(name, fields) for name, each in MORE.items() for fields in each]
    return {" ".join([name, *(f"{k}={v}" for k, v in fields.items())]): (name, fields) for name, fields in found}


def figures(method:str, fields:dict) -> dict:
    "Train and return losses, added terms, both result matrices and a digest of the answers of each row."
    with tempfile.TemporaryDirectory() as folder:
        record = train(Path(folder)/"run", method, **SMALL, **({"method_args": fields} if fields else {})).rec
        steps = record.events("step")
        answers = [[line["text"] for name, _ in record.columns for line in record.answers(row, name)]
                   for row in range(len(record.rows))]
        return {"loss": [step["loss"] for step in steps], "added": [step["added"] for step in steps],
                "R": record.R.tolist(), "content": [[None if score != score else score for score in row] for row in record.matrix("content").tolist()],
                "answers": [digest(row) for row in answers]}


def examples() -> list:
    "Return one example for each answer, and two drawn captions with their slots."
    plain = [Example(f"golden/{i}", None, "Which?", answer) for i, answer in enumerate(ANSWERS)]
    several = [Example("golden/several", None, "Which?", "cat", meta={"references": ["cat", "a cat"], "answers": ["cat"]*7 + ["cats"]*3})]
    captions = [get_stream("shapes").task("cap-day").example("val", i) for i in range(2)]
    return [*plain, *several, *captions]


def scored(name:str) -> list:
    "Return the score of every text against every example by one scorer; a caption needs slots."
    caption = get_stream("shapes").task("cap-day").format
    def one(example, text):
        if name == "caption" and "slots" not in example.meta: return None
        return round(scorers[name](caption, example, text), 12)
    return [[one(example, text) for text in [*TEXTS, example.answer, example.answer.upper()]] for example in examples()]


def versions() -> dict:
    "Return the versions that may be raised."
    return {"rooms": VERSIONS, "columns": COLUMNS, "methods": {name: method_class(name).version for name in all_methods()},
            "scorers": all_scorers()}


def computed(names=None) -> dict:
    "Return what golden.json holds, as this code computes it; `names` picks some of the runs."
    runs = {}
    for name, (method, fields) in forms().items():
        if names and name not in names: continue
        runs[name] = figures(method, fields)
        print(name, file=sys.stderr)
    return {"machine": machine(), "versions": versions(), "runs": runs, "scorers": {name: digest(scored(name)) for name in all_scorers()}}


def close(now, then, exact:bool) -> bool:
    "Tell whether two lists of numbers agree: to the bit on the machine that wrote the file, to 1e-3 of the largest elsewhere."
    if exact: return now == then
    rounding = max([1e-3*abs(value) for value in then], default=0)  # Four steps of Adam enlarge what other kernels round
    return len(now) == len(then) and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=rounding) for a, b in zip(now, then))


def altered(now:dict, then:dict, exact:bool) -> list:
    "Name the kinds of figures in which two results of one run differ."
    numbers = [kind for kind in ("loss", "added") if not close(now[kind], then[kind], exact)]
    return numbers + [kind for kind in ("R", "content", "answers") if now[kind] != then[kind]]


def excused(name:str, kinds:list, now:dict, then:dict) -> bool:
    "Tell whether a version was raised that explains why the figures of a run changed."
    methods = name.split()[0].split("+")
    raised = now["rooms"] != then["rooms"] or any(now["methods"].get(m) != then["methods"].get(m) for m in methods)
    return raised or (kinds == ["content"] and now["columns"] != then["columns"])


def verdicts(found:dict, kept:dict) -> list:
    "Say what has changed against the file: (sentence, was a version raised that explains it?)."
    exact, said = found["machine"] == kept["machine"], []
    for name in sorted({*found["runs"], *kept["runs"]}):
        now, then = found["runs"].get(name), kept["runs"].get(name)
        if not now or not then:
            said.append((f"run {name!r} is {'new' if now else 'gone'}", True))
        elif kinds := altered(now, then, exact):
            said.append((f"{name} computes another {' and '.join(kinds)}", excused(name, kinds, found["versions"], kept["versions"])))
    for name in sorted({*found["scorers"], *kept["scorers"]}):
        if found["scorers"].get(name) != kept["scorers"].get(name):
            same = found["versions"]["scorers"].get(name) == kept["versions"]["scorers"].get(name)
            said.append((f"scorer {name!r} gives other scores", not same))
    if found["versions"] != kept["versions"] and not said: said.append(("a version was raised although no figure changed", True))
    return said


def advice(said:list) -> str:
    "Say what to do about what has changed."
    wrong = [sentence for sentence, right in said if not right]
    if wrong:
        return (f"{'; '.join(wrong)}: raise the version of what changed it (`VERSIONS` or `COLUMNS` in nbs/behaviour.ipynb, `version` "
                "of the method, `scorer_versions` of the scorer) or restore it")
    return f"{'; '.join(sentence for sentence, _ in said)}: write the file anew with `python tests/golden.py --write`"


def written(found:dict) -> str:
    "Return golden.json, a line for each run and scorer."
    lines = lambda table: "{\n" + ",\n".join(f"  {json.dumps(key)}: {canonical(value)}" for key, value in sorted(table.items())) + "\n }"
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {lines(value)}" for key, value in found.items()) + "\n}\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CIT_CACHE"] = cache
        found = computed()
    said = verdicts(found, json.loads(FILE.read_text(encoding="utf-8"))) if FILE.exists() else []
    if "--write" not in sys.argv: sys.exit(advice(said) if said else 0)
    if not all(right for _, right in said): sys.exit(advice(said))
    FILE.write_text(written(found), encoding="utf-8")
