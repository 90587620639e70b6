"What the page of `llaca` and the laws do not show: its adapter outside the workbench, resuming while a group is averaged."
import json

import torch
from peft import PeftModel
from tiny import TASKS, final, same_files, same_tensors, tiny, train

from cit_workbench.backbone import get_backbone
from cit_workbench.checkpoint import checkpoints

PLAIN = {"stream_args": {"tasks": ["col-word", "col-night"], "n_test": 6}}


def test_the_saved_adapter_answers_as_the_run_did(finished):
    "peft and Hugging Face alone: load, generate, compare with the answers on file."
    run, last = finished("llaca", **PLAIN), "col-night"
    bb = get_backbone("tiny-instruct")
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/last).eval()
    said = [json.loads(l) for l in (run.folder/"answers"/"2"/f"{last}.jsonl").read_text().splitlines()]
    for i, line in enumerate(said):
        e = run.data.task(last).example("test", i)
        ids = torch.tensor([bb.encode(e.question)[0]])
        room = run.data.task(last).format.max_new_tokens
        got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=bb.pixels([e.image]),
                             max_new_tokens=room, do_sample=False, pad_token_id=bb.pad)[0, ids.shape[1]:].tolist()
        assert bb.decode(got[:got.index(bb.eos)] if bb.eos in got else got) == line["text"]
    held = {n.replace(".default", ""): v for n, v in final(run.folder).items()}
    ours = {n.removeprefix("base_model.model.").replace(".default", ""): p.detach()
            for n, p in model.named_parameters() if "lora_" in n}
    same_tensors(ours, held)


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
