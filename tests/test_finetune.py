"Plain tuning of another part than the adapter."
import shutil

import pytest
import torch
from test_laws import Watch, logits_of
from tiny import same_tensors, tiny, train

from cit_workbench.backbone import get_backbone
from cit_workbench.method import get_method

PROJECTOR = [f"model.multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")]
PARTS = {"projector": PROJECTOR, "prompt": ["soft_prompt"]}


@pytest.mark.parametrize("variant", PARTS)
def test_only_the_part_is_trained_and_a_run_comes_back(tmp_path, variant):
    part = lambda: get_method("finetune", variant=variant, length=5)
    run = train(tmp_path/"run", part() + Watch())
    log, own = run.net.method.chain[1].log, run.net.own()
    assert [*own] == PARTS[variant] and len(log) == 3 and all([*seen["trainable"]] == PARTS[variant] for seen in log)
    assert all(seen["moved"] == [] for seen in log)
    start = dict(get_backbone("tiny-instruct").model.named_parameters())
    same_tensors({n: p for n, p in run.net.model.named_parameters() if n not in own}, {n: p for n, p in start.items() if n not in own})
    assert all(n not in start or not torch.equal(p, start[n]) for n, p in own.items())
    shutil.copytree(tmp_path/"run", tmp_path/"copy")
    again = tiny(tmp_path/"copy", part() + Watch())
    again.open()
    for a, b in zip(logits_of(run.net)[0], logits_of(again.net)[0], strict=True): assert (a == b).all()
