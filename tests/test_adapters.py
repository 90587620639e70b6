"All linear layers are tuned, whatever they are called; an adapter holds all that was trained, or there is none."
import json
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_loading import TEXT, rebuilt
from tiny import Held, tiny
from torch import nn
from transformers import LlavaForConditionalGeneration
from twin import make_twin

from cit_workbench import CitError, get_backbone
from cit_workbench.models.saved import adapter_card
from cit_workbench.models.families.llava import linears
from cit_workbench.models.tune import Tune, block_linears, every_linear, left_out
from cit_workbench.core.paths import assets
from cit_workbench.contract.method import Method
from cit_workbench.protocol import recipe as toy
from cit_workbench.training.config import Optim, fill_recipe
from cit_workbench.training.opening import unsaved

USUAL = {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 2}
SMALL = {"stream_args": {"tasks": ["col-word"], "n_train": 32, "n_val": 2, "n_test": 4},
         "optim": {"steps": 3, "batch": 4, "lr": 3e-2}}


@pytest.fixture(scope="module")
def twin(tmp_path_factory): return make_twin(tmp_path_factory.mktemp("twin")/"llava")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    "A twin with the language model of another family, made once."
    made = {}

    def get(kind, **more):
        if (key := (kind, *sorted(more.items()))) not in made:
            folder = make_twin(tmp_path_factory.mktemp(kind)/"llava")
            made[key] = str(rebuilt(folder, {"model_type": kind, **TEXT, **USUAL, **more}))
        return made[key]
    return get


def trained(out, backbone, train=None, method="finetune", targets=None, **fields) -> Held:
    "A short run of one task, whose net is kept."
    tune = {"r": 4, "alpha": 8., "targets": targets, "train": train}
    run = tiny(out, method, **SMALL, backbone=str(backbone), tune=tune, **fields)
    run.rec = run.train()
    return run


# Which layers are tuned

def test_the_recipe_of_the_embedded_starts_is_the_testbeds():
    for name in ("tiny-instruct", "tiny-base"):
        assert fill_recipe(Optim(), Tune(), get_backbone(name))[1].targets == toy["tune"]["targets"]
        assert every_linear(get_backbone(name).model) == linears


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_families_with_the_names_of_llama_keep_the_usual_expression(kind, family):
    bb = get_backbone(family(kind))
    assert every_linear(bb.model) == linears and left_out(bb.model) == []
    assert fill_recipe(Optim(), Tune(), bb)[1].targets == toy["tune"]["targets"]


def test_fused_layers_of_phi3_are_all_tuned(family, tmp_path):
    run = trained(tmp_path/"run", family("phi3"))
    held = {n.rpartition(".lora_")[0].rpartition(".")[2] for n in run.net.params}
    assert held == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} and len(run.net.params) == 2*4*2


@pytest.mark.parametrize("method", ["ewc", "moelora", "olora", "smolora", "grouping", "single"])
def test_methods_reach_all_linear_layers_of_phi3(method, family, tmp_path):
    args = {"ewc": {"n": 8}, "moelora": {"experts": 2}, "smolora": {"experts": 2}}.get(method, {})
    run = trained(tmp_path/"run", family("phi3"), method=method, method_args=args)
    layer = re.compile(r".*layers\.\d+\.(self_attn|mlp)\.(qkv|o|gate_up|down)_proj")
    assert len({m[0] for n in run.net.own() if (m := layer.match(n))}) == 8


def test_more_blocks_than_the_testbed_knows_are_all_tuned(family):
    bb = get_backbone(family("llama", num_hidden_layers=6))
    targets = fill_recipe(Optim(), Tune(), bb)[1].targets
    names = block_linears(bb.model)
    assert len(names) == 6*7 and all(re.fullmatch(targets, n) for n in names)


def test_experts_that_are_no_linear_layers_are_named(family, tmp_path):
    says = r"LoRA leaves .* no linear layers: .*mlp\.experts\.gate_up_proj, mlp\.experts\.down_proj;"
    with pytest.warns(UserWarning, match=says):
        trained(tmp_path/"run", family("mixtral"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(tmp_path/"named", family("mixtral"), targets=r".*language_model.*self_attn\.q_proj")
        trained(tmp_path/"start", family("mixtral"), method="zero_shot")


# Names in the vision tower

@pytest.mark.parametrize("method", ["finetune", "olora", "moelora", "eproj"])
@pytest.mark.parametrize("train", [".*vision_tower.*", ".*", r".*layers\.0\..*"])
def test_the_vision_tower_is_not_trained_in_name_only(method, train, twin, tmp_path):
    with pytest.raises(CitError, match=r"train .* names \d+ parts of the vision tower .* computed without gradient"):
        trained(tmp_path/"run", twin, train, method)


@pytest.mark.parametrize("targets", [r".*multi_modal_projector.*", r"(?!.*vision_tower).*"])
def test_targets_that_name_a_whole_module_tune_its_linear_layers(targets, twin, tmp_path):
    "peft refuses a module that is no layer; a part of the name of one is what people write."
    run = trained(tmp_path/"run", twin, targets=targets)
    want = {n for n, m in get_backbone(str(twin)).model.named_modules()
            if isinstance(m, nn.Linear) and re.fullmatch(targets, n)}
    tuned = {n.split(".lora_")[0].removeprefix("base_model.model.") for n, p in run.net.model.named_parameters()
             if p.requires_grad}
    assert tuned == want and len(want) > 1
    bb = get_backbone(str(twin))
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/"col-word")
    same_logits(model.eval(), bb, run)


def test_targets_that_match_nothing_are_told_a_name_that_is_allowed(twin, tmp_path):
    with pytest.raises(CitError, match=r"names look like 'model\.language_model\.layers\.0\."):
        trained(tmp_path/"run", twin, targets="nothing_at_all")


@pytest.mark.parametrize("method", ["finetune", "olora", "grouping", "moelora"])
def test_no_adapter_is_put_into_the_vision_tower(method, twin, tmp_path):
    with pytest.raises(CitError, match="targets .* parts of the vision tower"):
        trained(tmp_path/"run", twin, None, method, targets=r".*q_proj")


# Adapters

def logits(model, bb, run):
    "What Hugging Face's own forward gives for a few questions."
    out = []
    for i in range(4):
        e = run.data.task("col-word").example("test", i)
        ids = torch.tensor([bb.encode(e.question)[0]])
        pixels = bb.pixels([e.image]).to(model.dtype)
        with torch.no_grad(): out.append(model(input_ids=ids, pixel_values=pixels).logits[0, -1].float())
    return torch.stack(out)


def same_logits(model, bb, run):
    torch.testing.assert_close(logits(model, bb, run), logits(run.net.model.eval(), bb, run), rtol=1e-4, atol=1e-4)


def said(run):
    lines = (run.folder/"answers"/"1"/"col-word.jsonl").read_text().splitlines()
    return [json.loads(l)["text"] for l in lines]


def greedy(model, bb, run):
    out, task = [], run.data.task("col-word")
    for i in range(task.n["test"]):
        e = task.example("test", i)
        ids = torch.tensor([bb.encode(e.question)[0]])
        pixels = bb.pixels([e.image]).to(model.dtype)
        got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                             max_new_tokens=run.net.room("col-word", "test")[0], pad_token_id=bb.pad)
        got = got[0, ids.shape[1]:].tolist()
        out.append(bb.decode(got[:got.index(bb.eos)] if bb.eos in got else got))
    return out


PARTS = {"nothing": None, "projector": r".*multi_modal_projector.*",
         "one bias": r".*multi_modal_projector\.linear_2\.bias",
         "last norm": r".*language_model\.norm\.weight", "norms": r".*language_model.*norm.*",
         "embeddings": r".*embed_tokens.*",
         "head": r"lm_head\..*", "several": r"lm_head\..*|.*embed_tokens.*|.*multi_modal_projector.*"}


@pytest.mark.parametrize("part", PARTS)
def test_peft_gives_back_all_that_was_trained(part, twin, tmp_path):
    run = trained(tmp_path/"run", twin, PARTS[part])
    bb, own = get_backbone(str(twin)), run.net.backbone
    before = logits(bb.model, bb, run)
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/"col-word").eval()
    got, want = logits(model, bb, run), logits(run.net.model.eval(), own, run)
    assert (want - before).abs().max() > .1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert greedy(model, bb, run) == said(run)
    beside = {n for n in run.net.own() if ".lora_" not in n}
    assert bool(beside) == (part != "nothing")


def test_tied_embeddings_are_kept_in_both_places(family, tmp_path):
    folder = family("llama", tie_word_embeddings=True)
    about = json.loads((config := assets().joinpath(folder, "config.json")).read_text())
    config.write_text(json.dumps(about | {"tie_word_embeddings": True}))
    bb = get_backbone(folder)
    assert bb.head.weight is bb.lm.embed_tokens.weight
    run = trained(tmp_path/"run", folder, r".*embed_tokens.*")
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/"col-word").eval()
    same_logits(model, bb, run)


def test_experts_that_were_trained_are_kept(family, tmp_path):
    run = trained(tmp_path/"run", family("mixtral"), r".*mlp\.experts\..*")
    bb = get_backbone(family("mixtral"))
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/"col-word").eval()
    same_logits(model, bb, run)


OTHERS = [("er+ewc", {"ewc": {"n": 8}}), ("finetune_part", {"part": "o_proj"}), ("lwf", {}), ("ema", {})]


@pytest.mark.parametrize("method, args", OTHERS)
def test_other_methods_keep_the_projector_too(method, args, twin, tmp_path):
    run = trained(tmp_path/"run", twin, PARTS["projector"], method, method_args=args)
    bb = get_backbone(str(twin))
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/"col-word").eval()
    same_logits(model, bb, run)


def test_a_trained_projector_of_a_bfloat16_run_is_kept_in_full(twin, tmp_path):
    run = trained(tmp_path/"run", twin, PARTS["projector"], compute={"threads": 1, "dtype": "bfloat16"})
    bb = get_backbone(str(twin), dtype="bfloat16")
    model = PeftModel.from_pretrained(bb.model, run.folder/"adapters"/"col-word").eval()
    from safetensors.torch import load_file
    kept = load_file(run.folder/"adapters"/"col-word"/"adapter_model.safetensors")
    key = "base_model.model.model.multi_modal_projector.linear_1.weight"
    assert torch.equal(kept[key], run.net.backbone.projector.linear_1.weight) and kept[key].dtype == torch.float32
    assert "dtype=torch.bfloat16" in (run.folder/"adapters"/"col-word"/"README.md").read_text()
    with run.net.backbone.cast(): want = logits(run.net.model.eval(), run.net.backbone, run)
    got = logits(model, bb, run)
    assert (got - want).abs().max() < .05*want.abs().max()


def test_the_card_of_an_adapter_says_how_to_load_it(twin, tmp_path, monkeypatch):
    monkeypatch.chdir(twin.parent)
    run = trained(tmp_path/"run", "llava", PARTS["projector"])
    at, bb = run.folder/"adapters"/"col-word", run.net.backbone
    code = re.search(r"```python\n(.*?)```", (at/"README.md").read_text(), re.S)[1].replace("this folder", str(at))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    same_logits(names["model"], bb, run)
    assert json.loads((at/"adapter_config.json").read_text())["base_model_name_or_path"] == str(twin)
    assert "made pictures square first" not in (at/"README.md").read_text()
    assert "made pictures square first" in adapter_card("start", "colour", "float32", [], padded=True)
    assert isinstance(names["model"].get_base_model(), LlavaForConditionalGeneration) and names["processor"].tokenizer


def test_weights_that_peft_has_no_place_for_make_no_adapter(twin, tmp_path):
    with pytest.warns(UserWarning, match="no adapter is written .*q_proj.base_layer.weight"):
        run = trained(tmp_path/"run", twin, r".*language_model.*q_proj\..*")
    assert not (run.folder/"adapters").exists() and run.rec.finished


@dataclass
class Scaled(Method):
    "Plain LoRA and a module of its own."
    def wrap(self, net):
        net.lora()
        net.model.extra = nn.Linear(2, 2)
        net.refresh()
        return net


def test_modules_that_a_method_adds_make_no_adapter(twin, tmp_path):
    with pytest.warns(UserWarning, match="no adapter is written .*extra.weight"):
        run = trained(tmp_path/"run", twin, method=Scaled)
    assert not (run.folder/"adapters").exists()


def test_a_run_goes_on_with_what_it_trained_beside_lora(twin, tmp_path):
    "The checkpoints hold all of it, as before."
    whole = trained(tmp_path/"whole", twin, PARTS["projector"])
    (whole.folder/"result.json").unlink()
    again = trained(tmp_path/"whole", twin, PARTS["projector"])
    for a, b in zip(whole.net.own().values(), again.net.own().values(), strict=True):
        np.testing.assert_array_equal(a.detach(), b.detach())


def test_no_name_is_like_a_module_of_the_start():
    "`unsaved` looks at names alone: those of LoRA's parts and those of the start model."
    own = dict.fromkeys(["a.weight", "b.lora_A.default.weight", "c.weight"])
    assert unsaved(SimpleNamespace(names={"a.weight"}, own=lambda: own)) == ["c.weight"]
