"Signals: SIGTERM and SIGHUP save the step at hand and end in one sentence, an interrupt is one sentence from the first line on."
import json
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import TASKS, same_files

from cit_workbench.live.live import LiveRun
from cit_workbench.training.checkpoint import checkpoints
from cit_workbench.core.signals import Ended, end, heeding
from cit_workbench.record.record import Record
from cit_workbench.training.train import Run

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; from cit_workbench import main; sys.exit(main())"
USUAL = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
         "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGTERM, signal.SIG_DFL); ")  # whoever runs the tests
SMALL = ["--stream-args", f"tasks={TASKS[:2]}", "n_train=64", "n_val=2", "n_test=4", "--optim", "steps=24", "batch=8",
         "--compute", "threads=1"]


def environment(**env):
    paths = os.pathsep.join([str(ROOT), str(ROOT/"tests")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}


def cit(*words, **kw):
    "The program in a process of its own."
    kw = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kw}
    env = environment(**kw.pop("env", {}))
    return subprocess.Popen([sys.executable, "-c", USUAL + PROGRAM, *words], env=env, **kw)


def steps(folder):
    "How many steps the record holds so far."
    f = Path(folder)/"events.jsonl"
    return len(re.findall(rb'"kind":"step"', f.read_bytes())) if f.exists() else 0


def soon(true, seconds=120, dt=.005):
    end_ = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end_, "it does not come"
        time.sleep(dt)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody stopped."
    out = tmp_path_factory.mktemp("whole")/"run"
    p = cit("run", *SMALL, "--out", str(out))
    assert p.wait(600) == 0, p.stderr.read()
    return out


@pytest.mark.parametrize("number, seen", [(signal.SIGTERM, 1), (signal.SIGHUP, 5)])
def test_the_step_at_hand_is_saved(tmp_path, whole, number, seen):
    out = tmp_path/"run"
    p = cit("run", *SMALL, "--out", str(out))
    soon(lambda: steps(out) >= seen)
    p.send_signal(number)
    said = p.communicate(timeout=120)
    assert p.returncode == 128 + number
    line, = said[1].splitlines()
    assert re.fullmatch(rf"cit: ended by {number.name}; step \d+ of '.*' is saved, and the same command goes on from there", line)
    last = checkpoints(out/"checkpoints")[-1]
    state = json.loads((last/"state.json").read_text())
    assert state["stage"] == "steps" and f"step {state['step']} of" in line
    assert LiveRun(out).state() == "stopped" and not Record(out).finished
    p = cit("run", *SMALL, "--out", str(out))
    assert p.wait(600) == 0, p.stderr.read()
    same_files(out, whole)


def test_a_launched_run_too(tmp_path):
    args = dict(stream_args={"tasks": TASKS[:1], "n_train": 64, "n_val": 2, "n_test": 4},
                optim={"steps": 3000, "batch": 8}, compute={"threads": 1})
    rec = Run("finetune", **args, out=str(tmp_path/"run")).launch()
    rec.wait("running")
    os.kill(rec.process_info()["pid"], signal.SIGTERM)
    assert rec.wait("stopped", "dead", "failed") == "stopped"
    assert checkpoints(tmp_path/"run"/"checkpoints") and "is saved, and the same command goes on" in rec.last_log_line()
    at = rec.process_info()["global"]
    rec.resume()
    rec.wait("running")
    soon(lambda: rec.process_info().get("global", 0) > at)
    rec.stop()
    assert rec.wait("stopped") == "stopped"


def test_before_the_first_step_it_ends_at_once(tmp_path):
    out = tmp_path/"run"
    p = cit("run", *SMALL, "--out", str(out), env={"CIT_CACHE": tmp_path/"cache"})
    soon(lambda: out.exists())
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 143 and "Traceback" not in err
    assert err.splitlines()[-1] == "cit: ended by SIGTERM; the same command goes on from what is recorded"


SLOW = USUAL + """
import sys, time
from cit_workbench.training.train import Run
step = Run.one_step
def slow(self, *args):
    got = step(self, *args)
    print("within", flush=True)
    time.sleep(float(sys.argv.pop()) if sys.argv[-1].isdigit() else 0)
    return got
Run.one_step = slow
from cit_workbench.cli import main
main()
"""


def slow(out, seconds):
    "A run whose first step lasts."
    words = ["run", *SMALL, "--out", str(out)]
    code = SLOW.replace("main()\n", f"main({words!r})\n")
    p = subprocess.Popen([sys.executable, "-c", code, str(seconds)], env=environment(), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout.readline() == "within\n"
    return p


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(tmp_path):
    p = slow(tmp_path/"one", 2)
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 143
    assert [c.name for c in checkpoints(tmp_path/"one"/"checkpoints")] == ["001-00-0000001"]
    p, began = slow(tmp_path/"two", 300), time.monotonic()
    p.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert p.poll() is None
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 143 and time.monotonic() - began < 100
    assert checkpoints(tmp_path/"two"/"checkpoints") == []


def test_a_terminal_that_goes_takes_nothing_along(tmp_path):
    "Its end is closed: the kernel sends SIGHUP, and nothing can be written any more, progress bars included."
    here, there = pty.openpty()
    out, env = tmp_path/"run", environment()
    env.pop("CIT_QUIET", None)
    code = USUAL + "import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); " + PROGRAM
    p = subprocess.Popen([sys.executable, "-c", code, "run", *SMALL, "--out", str(out)], stdin=there, stdout=there,
                         stderr=there, env=env)
    os.close(there)
    os.set_blocking(here, False)
    soon(lambda: drain(here) and steps(out) >= 1)
    os.close(here)
    assert p.wait(120) == 129
    assert json.loads((checkpoints(out/"checkpoints")[-1]/"state.json").read_text())["stage"] == "steps"


def drain(fd) -> bool:
    "Read what a terminal shows so far."
    try:
        while os.read(fd, 4096): pass
    except BlockingIOError: pass
    return True


def test_what_others_decided_stays(tmp_path):
    "`nohup`: SIGHUP stays ignored. A handler of the person's own stays."
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); " + PROGRAM
    short = [w.replace("steps=24", "steps=20") for w in SMALL]
    p = subprocess.Popen([sys.executable, "-c", code, "run", *short, "--out", str(tmp_path/"run")], env=environment(),
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    soon(lambda: steps(tmp_path/"run") >= 1)
    p.send_signal(signal.SIGHUP)
    assert p.wait(300) == 0 and Record(tmp_path/"run").finished
    heard, was = [], signal.signal(signal.SIGTERM, lambda *a: heard.append(a[0]))
    try:
        with heeding(end): os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally: signal.signal(signal.SIGTERM, was)


def test_handlers_are_put_back_and_threads_leave_them_alone():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    seen = []

    def inside():
        with heeding(end): seen.append({n: signal.getsignal(n) for n in before})
    t = threading.Thread(target=inside)
    t.start()
    t.join()
    assert seen == [before]
    with pytest.raises(Ended), heeding(end): os.kill(os.getpid(), signal.SIGTERM)
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_script_ends_with_the_code_of_the_signal(tmp_path):
    "Without the program `cit`, `train()` says the sentence itself."
    code = (USUAL + "from cit_workbench import Run; Run('finetune', stream_args={'n_train': 64, 'n_val': 2, 'n_test': 2}, "
            f"optim={{'steps': 500, 'batch': 8}}, out={str(tmp_path/'run')!r}).train()")
    p = subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=subprocess.PIPE, text=True)
    soon(lambda: steps(tmp_path/"run") >= 1)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 143 and "Traceback" not in err
    assert len([line for line in err.splitlines() if "ended by SIGTERM; step" in line]) == 1


# An interrupt

@pytest.mark.parametrize("k", range(6))
def test_an_interrupt_is_one_sentence_from_the_first_line_on(tmp_path, k):
    "From when the program begins (Python itself takes longer) until it trains."
    r, w = os.pipe()
    code = USUAL + f"import os; os.write({w}, b'x'); " + PROGRAM
    p = subprocess.Popen([sys.executable, "-c", code, "run", *SMALL, "--out", str(tmp_path/"run")], env=environment(),
                         pass_fds=[w], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(w)
    assert os.read(r, 1) == b"x"
    os.close(r)
    time.sleep(.02 + random.Random(k).random()*(.6 if k < 4 else 4.))
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 130, err
    assert err.splitlines() == ["cit: interrupted; the same command goes on from what is recorded"]


# Several processes

def torchrun(*words, log, **env):
    "Two processes of `cit` under torchrun."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    module = Path(log).with_suffix(".py")
    module.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", str(port), str(module), *words]
    return subprocess.Popen(command, env=environment(**env), stdout=open(log, "wb"), stderr=subprocess.STDOUT)


def test_under_torchrun_every_process_ends_well(tmp_path):
    short = [w.replace("steps=24", "steps=3") for w in SMALL]
    for words in (["run", *short, "--out", str(tmp_path/"run")], ["resume", str(tmp_path/"run")]):
        p = torchrun(*words, log=tmp_path/"log.txt")
        code = p.wait(300)
        text = (tmp_path/"log.txt").read_text()
        assert code == 0, text
        assert text.count(str(tmp_path/"run")) == 1 and "Traceback" not in text
    assert Record(tmp_path/"run").finished


def test_under_torchrun_a_signal_saves_one_step_of_all(tmp_path):
    "Sent to torchrun, which passes it on; then the same command goes on to the end."
    long = [w.replace("steps=24", "steps=400") for w in SMALL]
    p = torchrun("run", *long, "--out", str(tmp_path/"run"), log=tmp_path/"log.txt")
    soon(lambda: steps(tmp_path/"run") >= 2)
    p.send_signal(signal.SIGTERM)
    p.wait(120)
    text = (tmp_path/"log.txt").read_text()
    assert "is saved, and the same command goes on from there" in text, text
    state = json.loads((checkpoints(tmp_path/"run"/"checkpoints")[-1]/"state.json").read_text())
    assert state["stage"] == "steps" and state["step"] > 0
    p = torchrun("run", *long, "--out", str(tmp_path/"run"), log=tmp_path/"log2.txt")
    soon(lambda: steps(tmp_path/"run") > state["step"]//10 + 3)
    p.terminate()
    p.wait(120)
    assert "Traceback (most recent call last):\n  File \"" + str(ROOT) not in (tmp_path/"log2.txt").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all(tmp_path, fork, rank):
    got = fork.world(2, signalled, tmp_path/"run", rank)
    assert [code for code, _ in got] == [143, 143] and got[0][1] == got[1][1]
    assert len(checkpoints(tmp_path/"run"/"checkpoints")) == 1


def signalled(out, rank):
    "One of two processes; the one of that rank gets a signal after its third step."
    import torch
    from tiny import Held, tiny
    torch.set_num_threads(1)
    step = Held.one_step

    def signals(self, net, opt, task, phase, index, refs):
        if index == 2 and net.rank == rank: os.kill(os.getpid(), signal.SIGTERM)
        return step(self, net, opt, task, phase, index, refs)
    Held.one_step = signals
    try: tiny(out).train()
    except Ended as e: return e.code, e.said
