"Continual LLaVA's other readings, in runs; what its page does not show."
import pytest
import torch
from tiny import TASKS, final, furthest, train

TWO = {"stream_args": {"tasks": TASKS[:2]}}


@pytest.mark.parametrize("context, mixing", [("through", 2), ("none", 0)])
def test_other_readings_train(tmp_path, context, mixing):
    args = {"context": context, "weights": "softmax", "feature": "embedding", "slots": 3, "top": 2}
    run = train(tmp_path, "continual_llava", method_args=args, **TWO)
    own = run.net.own()
    assert (own["mixing"].numel() if "mixing" in own else 0) == mixing
    assert {tuple(p.shape) for n, p in own.items() if "proxies" in n} == {(3, 192)}
    if mixing: assert not torch.equal(own["mixing"], torch.zeros(2))
    used = torch.stack(run.net.method.mem["used"])
    torch.testing.assert_close(used.sum(1), torch.full((2,), 32.))  # four steps of eight rows, one in all per row


def test_checkpointing_and_micro_batches_change_nothing(tmp_path):
    a = train(tmp_path/"a", "continual_llava", **TWO)
    for name, fields in (("b", {"compute": {"checkpointing": True}}), ("c", {"optim": {"accum": 2}})):
        b = train(tmp_path/name, "continual_llava", **TWO, **fields)
        assert furthest(final(a.folder), final(b.folder)) < 2e-3
        assert furthest(final(a.folder, "mem"), final(b.folder, "mem")) < 1e-4


def test_replayed_rows_take_their_own_block(tmp_path):
    run = train(tmp_path, "er+continual_llava", method_args={"er": {"size": 16, "share": .5}}, **TWO)
    net = run.net
    b = net.rows([(t, 0) for t in TASKS[:2]], task=TASKS[:2])
    pool = net.method.route(net, b).route["pool"].view(2, 2, 8).sum(-1)
    assert ((pool > 0) == torch.eye(2, dtype=torch.bool)).all()
    assert float(net.method.mem["continual_llava"]["used"][1].sum()) == pytest.approx(16, abs=1e-3)
