"What the page of `llaca` and the laws do not show: where its average ends up, resuming while a group is averaged."
import torch
from tiny import TASKS, final, same_files, tiny, train

from cit_workbench.training.checkpoint import checkpoints

PLAIN = {"stream_args": {"tasks": ["col-word", "col-night"], "n_test": 6}}


def test_the_average_is_what_is_saved(finished):
    "The same path as plain tuning, another end."
    a, b = finished("llaca", **PLAIN), finished("finetune", stream_args=PLAIN["stream_args"])
    losses = [[e["loss"] for e in r.rec.events("step")] for r in (a, b)]
    assert losses[0] == losses[1]
    assert any(not torch.equal(x, y) for x, y in zip(final(a.folder).values(), final(b.folder).values()))


def test_a_group_that_is_averaged_again_resumes(tmp_path):
    "Killed in the third task, which joins the first one's group: average, gradient and the group's slot come back."
    often = {"compute": {"save_every": 2}, "optim": {"steps": 5}}
    whole = train(tmp_path/"whole", "llaca+grouping", **often)
    assert [whole.net.method.mem["grouping"]["of"][t] for t in TASKS] == [0, 1, 0]
    run = tiny(tmp_path/"run", "llaca+grouping", **often)
    step, seen = type(run).one_step, []

    def stop(net, opt, task, *rest):
        seen.append(task.name)
        if seen.count(TASKS[2]) > 3: raise KeyboardInterrupt
        return step(run, net, opt, task, *rest)
    run.one_step = stop
    try: run.train()
    except KeyboardInterrupt: pass
    assert "mean" in run.net.method.mem["llaca"] and checkpoints(run.folder/"checkpoints")[-1].name == "003-00-0000002"
    same_files(train(tmp_path/"run", "llaca+grouping", **often).folder, whole.folder)
