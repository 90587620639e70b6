"Tests run the checkout they lie in, one thread each, in their own folders."
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("IN_TEST", "1")
os.environ.setdefault("CIT_QUIET", "1")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    "Answers of earlier sessions are not seen, and this session leaves none behind."
    os.environ["CIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "A finished tiny run by method and fields; each is trained once per session and must not be changed."
    from tiny import train
    runs = {}

    def get(method="finetune", **fields):
        key = repr((method, sorted(fields.items())))
        if key not in runs: runs[key] = train(tmp_path_factory.mktemp("run")/"run", method, **fields)
        return runs[key]
    return get


@pytest.fixture(scope="session")
def fork():
    "Run a function of a test module in a new process, forked from one that has only imported."
    import multiprocessing as mp
    here = str(Path(__file__).parent)
    paths = [here, str(Path(here).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if here not in sys.path: sys.path.insert(0, here)
    from tiny import Forks
    ctx = mp.get_context("forkserver")
    ctx.set_forkserver_preload(["tiny"])
    return Forks(ctx)
