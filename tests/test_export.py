"A method that is plain LoRA in the end leaves an adapter that peft loads and that answers the same tokens."
import json

import pytest
import torch
from peft import PeftModel
from tiny import final, same_tensors

from cit_workbench.models.backbone import get_backbone
from cit_workbench.contract.method import overrides
from cit_workbench.contract.registry import all_methods, get_method

PLAIN = [n for n in all_methods() if n != "zero_shot" and not overrides(get_method(n), "wrap")]


CASES = [*((n, {}) for n in [*PLAIN, "er+ewc", "er+llaca"]), ("finetune_part", {"part": "o_proj"})]


@pytest.mark.parametrize("name, args", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_the_saved_adapter_answers_as_the_run_did(name, args, finished):
    "peft and Hugging Face alone: load, generate, compare with the answers on file."
    run = finished(name, **({"method_args": args} if args else {}), stream_args={"tasks": ["col-word", "col-night"], "n_test": 6})
    last = run.plan.tasks[-1].name
    bb = get_backbone("tiny-instruct")
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/last).eval()
    said = [json.loads(l) for l in (run.folder/"answers"/str(len(run.plan.tasks))/"col-night.jsonl").read_text().splitlines()]
    for i, line in enumerate(said):
        e = run.data.task("col-night").example("test", i)
        ids = torch.tensor([bb.encode(e.question)[0]])
        room = run.data.task("col-night").format.max_new_tokens
        got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=bb.pixels([e.image]),
                             max_new_tokens=room, do_sample=False, pad_token_id=bb.pad)[0, ids.shape[1]:].tolist()
        assert bb.decode(got[:got.index(bb.eos)] if bb.eos in got else got) == line["text"]
    held = {n.replace(".default", ""): v for n, v in final(run.folder).items()}
    ours = {n.removeprefix("base_model.model.").replace(".default", ""): p.detach()
            for n, p in model.named_parameters() if "lora_" in n}
    same_tensors(ours, held)
