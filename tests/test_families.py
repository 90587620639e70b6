"""Laws of every family that lies in the folder, on a tiny twin that transformers' own class has written."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cit_workbench import CitError, Run, get_backbone, get_stream
from cit_workbench.core.paths import assets
from cit_workbench.models.batch import at
from cit_workbench.models.family import Family, all_families, family_of, get_family, needed_parts
from cit_workbench.models.twins import make_twin

FAMILIES = sorted(all_families())
SIZES = [(48, 48), (48, 90), (70, 30)]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = get_backbone(make_twin(get_family(kind), tmp_path_factory.mktemp(kind)/"twin"))
        return made[kind]
    return get


@pytest.fixture
def bb(request, twins): return twins(request.param)


every = pytest.mark.parametrize("bb", FAMILIES, indirect=True)


def rows() -> list:
    "Three rows with pictures of other shapes, and answers of other lengths."
    task, draw = get_stream("shapes").task("col-word"), np.random.default_rng(0)
    pictures = [draw.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]
    answers = ["red", "blue circle", "green"]
    made = [task.example("train", row) for row in range(len(SIZES))]
    return [replace(one, image=image, answer=answer) for one, image, answer in zip(made, pictures, answers)]


def asked(bb, example):
    "What the model's own processor makes of a question."
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    text = bb.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return bb.processor(text=text, images=Image.fromarray(example.image), return_tensors="pt")


def own_logits(bb, example):
    "The model's own logits where it predicts the answer."
    prompt, said = bb.texts(example, example.answer)
    inputs = asked(bb, example)
    more = {name: torch.cat([value, value.new_zeros(1, len(said))], 1) for name, value in inputs.items()
            if name.endswith("token_type_ids")}
    inputs |= more | {"input_ids": torch.tensor([prompt + said]), "attention_mask": torch.ones(1, len(prompt + said)).long()}
    with torch.no_grad():
        return bb.model(**inputs).logits[0, len(prompt) - 1:-1].float(), torch.tensor(said)


@every
def test_ids_are_what_template_and_processor_say(bb):
    for example in rows():
        assert bb.texts(example)[0] == asked(bb, example)["input_ids"][0].tolist()
    alone = replace(rows()[0], image=None)
    assert bb.image_id not in bb.texts(alone)[0]


@every
def test_logits_and_loss_are_the_models_own(bb):
    examples = rows()
    batch = bb.collate(examples)
    with torch.no_grad(), at(batch):
        out = bb.forward(batch)
    own = [own_logits(bb, example) for example in examples]
    for logits, (wanted, said), row in zip(out.answer_logits, own, range(3)):
        assert torch.equal(out.labels[out.row == row], said)
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    logits, labels = torch.cat([one for one, _ in own]), torch.cat([said for _, said in own])
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5, atol=1e-5)


@every
def test_rows_with_and_without_pictures_share_a_batch(bb):
    first, second, _ = rows()
    alone = replace(second, image=None)
    batch = bb.collate([first, alone])
    with torch.no_grad(), at(batch):
        mixed = bb.forward(batch)
    one = bb.collate([alone])
    with torch.no_grad(), at(one):
        torch.testing.assert_close(mixed.answer_logits[1], bb.forward(one).logits, rtol=1e-4, atol=1e-5)


@every
def test_greedy_answers_are_those_of_generate(bb):
    examples = rows()
    batch = bb.collate(examples, answers=False)
    with at(batch):
        ours, _ = bb.answer(batch, 6)
    for example, said in zip(examples, ours):
        inputs = asked(bb, example)
        new = bb.model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1]:].tolist()
        ends = [place for place, token in enumerate(new) if token in bb.stops]
        assert said == new[:ends[0] if ends else None]


@every
def test_choices_are_scored_as_the_models_own_forward_scores_them(bb):
    example = replace(rows()[0], choices=("red", "blue circle"))
    batch = bb.collate([example], answers=False)
    with at(batch):
        _, (scores,) = bb.answer(batch, 1, [bb.options(example)])
    for score, ids in zip(scores, bb.options(example)):
        logits, _ = own_logits(bb, replace(example, answer=bb.decode(ids)))
        torch.testing.assert_close(score, sum(log[token] for log, token in zip(logits.log_softmax(-1), ids)), rtol=1e-4, atol=1e-4)


@every
def test_all_named_parts_are_there(bb):
    counts = {part: len(bb.parts(part)) for part in needed_parts}
    assert all(counts.values()), counts
    assert counts["language"] == counts["projector"] == 1 and counts["layers"] == len(bb.lm.layers)
    assert counts["attention_out"] % counts["layers"] == 0
    assert all(isinstance(layer, torch.nn.Linear) for part in ("attention_out", "linears") for layer in bb.parts(part).values())
    assert [*bb.parts("layers").values()] == [*bb.lm.layers]


@every
def test_parts_lie_apart_or_within_each_other(bb):
    weights = {part: {id(weight) for module in bb.parts(part).values() for weight in module.parameters()} for part in needed_parts}
    apart = [("tower", "projector"), ("tower", "language"), ("projector", "language"), ("attention_out", "ffn")]
    assert [(one, other) for one, other in apart if weights[one] & weights[other]] == []
    within = [("layers", "language"), ("attention_out", "linears"), ("linears", "layers"), ("ffn", "layers")]
    assert [(one, other) for one, other in within if not weights[one] <= weights[other]] == []
    named = {name for name, weight in bb.model.named_parameters() if re.fullmatch(bb.inside("projector"), name)}
    assert {id(weight) for name, weight in bb.model.named_parameters() if name in named} == weights["projector"]


@every
def test_features_are_seen_once_and_without_gradient(bb):
    feats = bb.tower(bb.pixels([example.image for example in rows()]))
    assert len(feats) == 3 and not any(one.requires_grad for one in feats)
    assert all(one.shape[-1] == bb.feature_size for one in feats)
    counts = [bb.texts(example)[0].count(bb.image_id) for example in rows()]
    assert bb.family.varies or {*counts} == {bb.n_vis}


class Kept(Run):
    "A run that keeps its net."
    def insert(self, net):
        self.net = net
        return super().insert(net)


@every
@pytest.mark.parametrize("method,args,part", [("finetune", {}, "layers"), ("finetune_part", {"part": "projector"}, "projector"),
                                              ("finetune_part", {"part": "o_proj"}, "attention_out")])
def test_methods_train_what_they_name(bb, method, args, part, tmp_path):
    run = Kept(method=method, method_args=args, backbone=bb.name, out=str(tmp_path/"run"), compute={"threads": 1},
               stream_args={"tasks": ["col-word"], "n_train": 8, "n_val": 2, "n_test": 2}, optim={"steps": 1, "batch": 4, "lr": .1})
    run.train()
    assert run.net.params and all(re.fullmatch(bb.inside(part), name) for name in run.net.params)


# What is no family here

def test_the_folder_is_the_list():
    assert all(type(family).model_type == kind and family.architecture for kind, family in all_families().items())
    pages = {path.stem for path in (assets().parent/"models"/"families").glob("[!_]*.py")}
    assert len(pages) == len(FAMILIES) and "llava" in FAMILIES


@pytest.mark.parametrize("kind", ["nonsense", "llama", None])
def test_an_unknown_type_is_refused_by_name(kind, tmp_path):
    folder = make_twin(get_family("llava"), tmp_path/"twin")
    file = tmp_path/"twin"/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind, "architectures": None}))
    with pytest.raises(CitError) as said: get_backbone(folder)
    assert (str(kind) in str(said.value) or kind is None) and "\n" not in str(said.value)
    assert all(name in str(said.value) for name in FAMILIES)


def test_a_model_of_no_family_has_no_parts():
    layer = torch.nn.Linear(2, 2)
    assert family_of(layer).modules(layer, "projector") == {}
    with pytest.raises(CitError, match="has 0 modules that are its projector"): family_of(layer).one(layer, "projector")


def test_pictures_may_differ_in_their_number_of_visual_tokens(twins):
    class Varied(type(get_family("llava"))):
        "LLaVA that drops the last features of tall pictures."
        varies = True
        def visual_tokens(self, processor, image): return 9 if image.height <= image.width else 6
        def see(self, model, pixels): return [one[:count] for one, count in zip(super().see(model, pixels), counts)]
    plain, examples = twins("llava"), rows()
    counts = [9]
    bb = type(plain)(plain.model, plain.processor, family=Varied())
    counts = [9 if one.image.shape[0] <= one.image.shape[1] else 6 for one in examples]
    batch = bb.collate(examples)
    assert (batch.ids == bb.image_id).sum(1).tolist() == counts == [9, 9, 6]
    with torch.no_grad(), at(batch):
        out = bb.forward(batch)
    with torch.no_grad(), at(batch[1:]) as two:
        assert len(two.feats) == 2
        torch.testing.assert_close(bb.forward(two).answer_logits[1], out.answer_logits[2], rtol=1e-4, atol=1e-5)
    assert isinstance(get_family("llava"), Family) and not get_family("llava").varies
