"The house: a light import, one source of version and dependencies, pins that cover them, a README that is true."
import gc
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

root = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cfg():
    parser = ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    code = ("import time; t = time.perf_counter(); import cit_workbench; s = time.perf_counter() - t; import sys; "
            "print(s < .3, [m for m in ('torch', 'transformers', 'numpy', 'pandas') if m in sys.modules])")
    assert python(code) == "True []"


def test_public_names_are_there():
    assert python("import cit_workbench as c; print(all(getattr(c, n) is not None for n in c.__all__))") == "True"


def test_unknown_name_is_an_attribute_error():
    import cit_workbench
    with pytest.raises(AttributeError, match="no attribute 'Rum'"): cit_workbench.Rum


def test_record_side_never_imports_torch():
    code = "from cit_workbench import metrics; from cit_workbench.record import record; from cit_workbench.figures import analysis; import sys; print('torch' in sys.modules)"
    assert python(code) == "False"


def test_version_is_said_once(cfg):
    import cit_workbench
    assert cit_workbench.__version__ == cfg["version"]


def test_pins_satisfy_the_ranges(cfg):
    lines = [line for line in (root/"constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in lines)}
    for r in map(Requirement, [*cfg["requirements"].split(), *cfg["dev_requirements"].split()]):
        assert pins[canonicalize_name(r.name)] in r.specifier, r


def test_modules_have_no_list_of_methods():
    names = [p.stem for p in (root/"cit_workbench/methods").glob("[a-z]*.py")]
    for path in (root/"cit_workbench").glob("*.py"):
        if path.name == "_modidx.py": continue
        for line in path.read_text(encoding="utf-8").splitlines():
            assert sum(f'"{n}"' in line for n in names) < 3, f"{path.name}: {line}"


def test_readme_shows_files_that_exist():
    text = (root/"README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text): assert (root/target).exists(), target
    layout = text.split("## Layout")[1].split("### ")[0]
    for target in re.findall(r"^\| `([^`]+)`", layout, re.M): assert (root/target).exists(), target


def test_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIT_QUIET", "1")
    ten, dashboard = re.findall(r"```python\n(.*?)```", (root/"README.md").read_text(encoding="utf-8"), re.S)
    assert len(ten.splitlines()) <= 12
    earlier = {id(o) for o in gc.get_objects() if type(o).__name__ == "Workbench"}
    for source in (ten, dashboard): exec(compile(source, "README.md", "exec"), made := {})
    views = [o for o in gc.get_objects() if type(o) is made["Workbench"] and id(o) not in earlier]
    assert len(views) == 1
    views[0].close()


def test_notebooks_hold_no_errors_and_stay_small():
    import json
    for path in (root/"nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts or "runs" in path.parts: continue
        nb = json.loads(path.read_text(encoding="utf-8"))
        outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
        assert not [o for o in outputs if o["output_type"] == "error"], path
        assert len(json.dumps(outputs)) < 300_000, f"{path}: outputs are large"
