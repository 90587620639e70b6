"Where a row goes depends on that row alone: in mixed batches, recomputed for the backward, and token by token."
from dataclasses import replace

import pytest
import torch
from tiny import MORE, OTHERS, TASKS, furthest, jitter

from cit_workbench.models.batch import at
from cit_workbench.contract.method import overrides
from cit_workbench.contract.registry import all_methods, get_method

REFS = [(t, i) for i in range(2) for t in [*TASKS, *OTHERS]]
ROUTED = [m for m in all_methods() if any(overrides(get_method(m), h) for h in ("route", "wrap"))]
CASES = [(m, {}) for m in ["finetune", *ROUTED, "er+smolora", "llaca+grouping"]] + [(m, args) for m, more in MORE.items() for args in more]
NEAR = dict(rtol=1e-5, atol=3e-5)


def named(case): return "-".join([case[0], *map(str, case[1].values())])


@pytest.fixture(scope="module", params=CASES, ids=named)
def net(request, finished):
    "A net after three tasks whose every inserted parameter is moved, so that all of them act."
    name, args = request.param
    net = finished(name, **({"method_args": args} if args else {})).net
    was = {n: p.detach().clone() for n, p in net.own().items()}
    params, net.params = net.params, net.own()
    jitter(net, .05)
    net.params = params
    net.model.eval()
    yield net
    with torch.no_grad():
        for n, p in net.own().items(): p.copy_(was[n])


def asked(net, refs, split="test", **kw):
    "Rows with the labels that the method is shown at test."
    told = "task_id_at_test" in net.method.leaks
    return net.rows(refs, split, task=[t if told else None for t, _ in refs], **kw)


def logits(net, b):
    with at(net.method.route(net, replace(b, ctx={}))) as b, torch.no_grad(): return net.forward(b).answer_logits


def test_a_mixed_batch_is_its_rows_one_by_one(net):
    together = logits(net, asked(net, REFS))
    for k, ref in enumerate(REFS):
        torch.testing.assert_close(logits(net, asked(net, [ref]))[0], together[k], **NEAR)


def grads_of(net, b):
    "Loss and gradients of a training batch."
    with at(net.method.route(net, replace(b, ctx={}))) as b:
        loss = net.forward(b).loss
        loss.backward()
    got = {n: p.grad.clone() for n, p in net.params.items() if p.grad is not None}
    net.model.zero_grad(set_to_none=True)
    return float(loss.detach()), got


def test_gradient_checkpointing_changes_no_gradient(net):
    if not net.params: pytest.skip("nothing is trained")
    refs = [(t, i) for t in TASKS for i in range(3)]
    b, part, calls = net.rows(refs, task=[t for t, _ in refs]), net.backbone.lm.layers[0].mlp, []
    net.model.train()
    loss, want = grads_of(net, b)
    hook = part.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        net.model.gradient_checkpointing_enable({"use_reentrant": False})
        again, got = grads_of(net, b)
    finally:
        hook.remove()
        net.model.gradient_checkpointing_disable()
        net.model.eval()
    assert again == pytest.approx(loss, abs=1e-6) and furthest(got, want) < 1e-5
    assert len(calls) == 2 and any(g.abs().max() > 0 for g in want.values())


def slow_answer(net, ref, max_new):
    "Greedy tokens of one row, everything computed again for every token; ends before an image token."
    b, out = asked(net, [ref], answers=False), []
    while len(out) < max_new:
        more = torch.tensor([out], dtype=torch.long)
        wide = {k: torch.cat([getattr(b, k), v], 1) for k, v in (("ids", more), ("mask", more*0 + 1), ("labels", more))}
        with at(net.method.route(net, replace(b, **wide, ctx={}))) as whole, torch.no_grad():
            tok = int(net.backbone.head(net.backbone.hidden(whole)[0][:, -1]).argmax())
        if tok in (net.backbone.eos, net.backbone.image_id): break
        out.append(tok)
    return out


def test_token_by_token_is_the_whole_forward(net):
    image = net.backbone.image_id
    got, _ = net.answer(asked(net, REFS, answers=False), 6)
    assert [g[:g.index(image)] if image in g else g for g in got] == [slow_answer(net, r, 6) for r in REFS]


def test_choices_take_the_routes_of_their_prompt(net):
    "So does the same answer in a training batch: what follows the prompt has no say in the route."
    bb, b = net.backbone, asked(net, REFS, answers=False)
    choices = [[bb.encode(e.question, c)[1][:-1] for c in e.choices] for e in b.examples]
    _, lls = net.answer(b, 1, choices)
    for e, ref, task, ll in zip(b.examples, b.refs, b.task, lls):
        n = len(e.choices)
        whole = bb.collate([replace(e, answer=c) for c in e.choices], refs=[ref]*n, task=[task]*n, split="test")
        with at(net.method.route(net, whole)) as whole, torch.no_grad(): out = net.forward(whole)
        each = out.logits.log_softmax(-1).gather(1, out.labels[:, None])[:, 0]*(out.labels != bb.eos)
        torch.testing.assert_close(ll, torch.zeros(n).index_add(0, out.row, each), rtol=1e-4, atol=1e-4)
