"A start model is known by its whole content; what cannot be used is refused in one sentence, before weights are read."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.auto import image_processing_auto
from twin import make_coin, make_twin

from cit_workbench import CitError, Run, get_backbone
from cit_workbench.models import checkpoint
from cit_workbench.core.paths import assets
from cit_workbench.models.checkpoint import file_digest
from cit_workbench.models.loading import all_backbones, start_hash
from cit_workbench.protocol import read_lock

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 640, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def twin(tmp_path_factory): return make_twin(tmp_path_factory.mktemp("twin")/"llava")


@pytest.fixture
def copy(twin, tmp_path): return shutil.copytree(twin, tmp_path/"copy")


def edit(folder, name="config.json", **fields):
    data = json.loads((folder/name).read_text()) | fields
    (folder/name).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    return folder


def rebuilt(folder, text=None, vision=None, cls=LlavaForConditionalGeneration, config=LlavaConfig):
    "The same processor with a model of another language model or vision tower, random weights."
    about = json.loads((folder/"config.json").read_text())
    for k in ("architectures", "model_type", "torch_dtype", "transformers_version"): about.pop(k, None)
    about["text_config"], about["vision_config"] = text or about["text_config"], vision or about["vision_config"]
    for f in folder.glob("model*"): f.unlink()
    torch.manual_seed(0)
    cls(config(**about)).save_pretrained(folder)
    return folder


def refused(folder, *says):
    "The one sentence of a refusal; weights must not have been read."
    def read(*args, **kw): raise AssertionError("weights were read")
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(LlavaForConditionalGeneration, "from_pretrained", read)
        with pytest.raises(CitError) as e: get_backbone(str(folder))
    said = str(e.value)
    assert "\n" not in said and [s for s in says if s not in said] == [], said


# Identity

def test_the_digests_of_the_embedded_starts_are_the_locked_ones():
    assert {n: start_hash(n) for n in all_backbones()} == read_lock()["starts"]


def large(folder, monkeypatch):
    "Let every weight file count as large."
    monkeypatch.setattr(checkpoint, "_small", 1_000)
    return folder


def test_one_weight_in_the_middle_of_a_large_shard_makes_another_start(copy, monkeypatch):
    before, shard = start_hash(str(large(copy, monkeypatch))), sorted(copy.glob("*.safetensors"))[1]
    weights, size = load_file(shard), shard.stat().st_size
    name = sorted(weights)[len(weights)//2]
    save_file(weights | {name: -weights[name]}, shard, metadata={"format": "pt"})
    assert shard.stat().st_size == size and start_hash(str(copy)) != before
    save_file(weights, shard, metadata={"format": "pt"})
    assert start_hash(str(copy)) == before


FILES = ["tokenizer.json", "chat_template.json", "preprocessor_config.json", "generation_config.json",
         "pytorch_model.bin", "merges.txt", "additional_chat_templates/tool.jinja"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_an_answer_depends_on_counts(name, copy):
    path, seen = copy/name, [start_hash(str(copy))]
    path.parent.mkdir(exist_ok=True)
    for text in ("{}", "[]"):
        path.write_text(text)
        seen.append(start_hash(str(copy)))
    assert len({*seen}) == 3


def test_shards_in_a_folder_within_count(copy):
    index = json.loads((copy/"model.safetensors.index.json").read_text())
    (copy/"shards").mkdir()
    for shard in copy.glob("*.safetensors"): shard.rename(copy/"shards"/shard.name)
    edit(copy, "model.safetensors.index.json", weight_map={k: f"shards/{v}" for k, v in index["weight_map"].items()})
    assert get_backbone(str(copy)).hash == (before := start_hash(str(copy)))
    shard = copy/"shards"/"model-00001-of-00003.safetensors"
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert start_hash(str(copy)) != before
    shard.write_bytes(shard.read_bytes()[:5000])
    refused(copy, f"weights {shard} cannot be read")
    (copy/"model.safetensors.index.json").write_text("{")
    refused(copy, "model.safetensors.index.json is not valid JSON")


def test_a_large_file_is_read_once(copy, monkeypatch):
    large(copy, monkeypatch)
    first, real, reads = start_hash(str(copy)), open, []
    def noted(path, *args, **kw):
        reads.append(Path(path).suffix)
        return real(path, *args, **kw)
    monkeypatch.setattr(checkpoint, "open", noted, raising=False)
    assert start_hash(str(copy)) == first and ".safetensors" not in reads


def test_another_file_with_the_size_and_time_of_the_first_is_read_again(tmp_path):
    a = tmp_path/"a.safetensors"
    a.write_bytes(b"one")
    first, when = file_digest(a), a.stat().st_mtime_ns
    (tmp_path/"b").write_bytes(b"two")
    os.replace(tmp_path/"b", a)
    os.utime(a, ns=(when, when))
    assert file_digest(a) != first
    with open(a, "r+b") as f: f.write(b"one")
    os.utime(a, ns=(when, when))
    assert file_digest(a) == first


def test_a_store_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("CIT_CACHE", str(tmp_path/"file"/"below"))
    (tmp_path/"a").write_bytes(b"one")
    with pytest.warns(UserWarning, match="is not kept"): assert len(file_digest(tmp_path/"a")) == 64


def test_answers_of_other_weights_are_not_reported_and_their_runs_do_not_go_on(copy, tmp_path, monkeypatch):
    folder, out = make_coin(tmp_path/"coin", n_train=8, n_test=4), tmp_path/"A"
    large(copy, monkeypatch)
    spec = dict(method="zero_shot", backbone=str(copy), stream=f"coin:{folder}", compute={"threads": 1})
    Run(**spec, out=str(out)).train()
    for shard in copy.glob("*.safetensors"):
        weights = load_file(shard)
        flip = [k for k in weights if "multi_modal_projector" in k or "embed_tokens" in k]
        save_file(weights | {k: -weights[k] for k in flip}, shard, metadata={"format": "pt"})
    Run(**spec, out=str(tmp_path/"B")).train()
    said = {n: [f.read_bytes() for f in sorted((tmp_path/n/"answers").rglob("*.jsonl"))] for n in "AB"}
    assert said["A"] != said["B"]
    (out/"result.json").unlink()
    with pytest.raises(CitError, match="holds a run on other weights"): Run(**spec, out=str(out)).train()


# The configuration is judged first

OTHERS = ["llava_next", "vipllava", "llava_onevision", "video_llava", "mllama", "qwen2_vl", "llama", "nonsense"]


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_type_is_named(kind, copy):
    refused(edit(copy, model_type=kind), f"model_type {kind}", "language model llama", "supported: model_type llava")


def test_architectures_that_disagree_are_named(copy):
    named = "VipLlavaForConditionalGeneration"
    refused(edit(copy, architectures=[named]), named, "do not fit")


def test_a_real_llava_next_is_named(copy):
    rebuilt(copy, cls=LlavaNextForConditionalGeneration, config=LlavaNextConfig)
    refused(copy, "model_type llava_next", "LlavaNextForConditionalGeneration")


@pytest.mark.parametrize("fields", [
    {"architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"},
    {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
    {"architectures": None, "mm_hidden_size": 1024}])
def test_the_original_layout_is_named_with_its_converter(fields, copy):
    edit(copy, text_config=..., vision_config=..., hidden_size=64, **fields)
    refused(copy, "original layout", "convert_llava_weights_to_hf.py")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [..., None, []])
def test_sizes_that_are_missing_are_not_filled_in(part, value, copy):
    refused(edit(copy, **{part: value}), f"without {part}")


def test_quantised_weights_and_remote_code_are_named(copy):
    refused(edit(copy, quantization_config={"quant_method": "awq"}), "quantised (quantization_config: awq)")
    refused(edit(copy, quantization_config=..., auto_map={"AutoModel": "code.Model"}), "auto_map", "never run")
    text = json.loads((copy/"config.json").read_text())["text_config"]
    edit(copy, auto_map=..., text_config=text | {"quantization_config": {}})
    refused(copy, "text_config: quantization_config")


def test_a_configuration_that_is_no_table_is_named(copy):
    (copy/"generation_config.json").write_text("{")
    refused(copy, "generation_config.json is not valid JSON")
    (copy/"config.json").write_text("[]")
    refused(copy, "config.json is list")
    (copy/"config.json").write_text("{")
    refused(copy, "config.json is not valid JSON")


def test_folders_that_are_no_checkpoint_are_named(copy, tmp_path):
    refused(tmp_path, "has no config.json", f"{copy} has one")
    (copy/"adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused(copy, "holds a peft adapter", "(org/base)")
    (copy/"config.json").unlink()
    refused(copy, "holds a peft adapter", "(org/base)")
    (copy/"adapter_config.json").write_text("[]")
    refused(copy, "holds a peft adapter")
    (tmp_path/"gguf").mkdir()
    (tmp_path/"gguf"/"model.gguf").write_bytes(b"GGUF")
    refused(tmp_path/"gguf", "holds GGUF weights")
    refused(tmp_path/"gguf"/"model.gguf", "is a file")


# The shapes are tried

@pytest.mark.parametrize("text, lacks", [
    ({"model_type": "phi", **TEXT, "num_key_value_heads": 4}, "(PhiModel) has no norm"),
    ({"model_type": "opt", **TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}, "language model opt"),
    ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 640}, "gpt2"),
    ({"model_type": "gpt_neox", **TEXT}, "gpt_neox")])
def test_a_language_model_of_another_build_is_named(text, lacks, copy):
    refused(edit(copy, text_config=text), "language model", lacks, "supported")


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "mixtral"])
def test_language_models_built_as_llama_are_loaded(kind, copy):
    bb = get_backbone(str(rebuilt(copy, {"model_type": kind, **TEXT, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 2})))
    assert bb.lm.config.model_type == kind and bb.n_vis == 9


LAYERS = [(-2, True), (3, True), (4, False), (-4, True), (-5, False), ([0, -1, 9], False)]


@pytest.mark.parametrize("layer, allowed", LAYERS)
def test_a_feature_layer_beyond_the_tower_is_named(layer, allowed, copy):
    edit(copy, vision_feature_layer=layer)
    if allowed: get_backbone(str(copy))
    else: refused(copy, "vision_feature_layer", "allowed: -4 to 3")


def test_a_tower_without_one_row_per_picture_is_named(copy):
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
              "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
    refused(rebuilt(copy, vision=vision), "vision tower pixtral", "supported")


def test_an_image_processor_that_does_not_fit_the_tower_is_named(copy):
    edit(copy, "preprocessor_config.json", crop_size={"height": 56, "width": 56})
    refused(copy, "makes one picture [1, 3, 56, 56]", "[1, 3, 42, 42]")
    other = dict(image_processor_type="LlavaNextImageProcessor", image_grid_pinpoints=[[42, 84]])
    edit(copy, "preprocessor_config.json", **other)
    refused(copy, "LlavaNextImageProcessor")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_sizes_that_would_be_those_of_7b_do_not_fill_the_memory(part, copy):
    "Real configurations leave sizes out where they are the usual ones; here the weights are of other sizes."
    kind = json.loads((copy/"config.json").read_text())[part]["model_type"]
    small = {"image_size": 42, "patch_size": 14} if part == "vision_config" else {"vocab_size": 640}
    refused(edit(copy, **{part: {"model_type": kind, **small}}), "describes", "but its files hold 2", part)


def test_a_damaged_shard_is_named_before_weights_are_read(copy):
    shard = copy/"model-00002-of-00003.safetensors"
    for content in (shard.read_bytes()[:5000], b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"):
        shard.write_bytes(content)
        refused(copy, f"weights {shard} cannot be read", "a whole safetensors file is needed")


def test_weights_of_another_shape_are_named(copy):
    vision = json.loads((copy/"config.json").read_text())["vision_config"]
    edit(copy, vision_config=vision | {"patch_size": 7})
    with pytest.raises(CitError, match="2 weights are missing or of another shape, the first is .*patch_embedding"):
        get_backbone(str(copy))


@pytest.mark.parametrize("name, fields, says", [
    ("config.json", {"architectures": 5}, "do not fit"),
    ("config.json", {"architectures": "VipLlavaForConditionalGeneration"}, "do not fit"),
    ("config.json", {"quantization_config": ["awq"]}, "quantised"),
    ("config.json", {"vision_feature_layer": []}, "allowed: -4 to 3"),
    ("config.json", {"vision_feature_layer": "-2"}, "vision_feature_layer"),
    ("config.json", {"projector_hidden_act": "swish7"}, "names 'swish7', which transformers does not know")])
def test_odd_values_of_a_configuration_are_one_sentence(name, fields, says, copy):
    refused(edit(copy, name, **fields), says)


def test_the_reason_of_a_library_is_short(copy):
    edit(copy, text_config={"model_type": "nonsense"})
    with pytest.raises(CitError, match="nonsense") as e: get_backbone(str(copy))
    assert len(str(e.value)) < 900 and "supported: language models" in str(e.value)


@pytest.mark.parametrize("value", [[1, 2], "linear", -1, None])
def test_values_that_transformers_refuses_are_one_sentence(value, copy):
    refused(edit(copy, vision_feature_select_strategy=value), "cannot be read as a LLaVA checkpoint")


def test_weights_without_a_place_are_named(copy):
    shard = sorted(copy.glob("*.safetensors"))[0]
    extra = {"multi_modal_projector.projector_layernorm.weight": torch.ones(32)}
    save_file(load_file(shard) | extra, shard, metadata={"format": "pt"})
    index = json.loads((copy/"model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, shard.name)
    (copy/"model.safetensors.index.json").write_text(json.dumps(index))
    says = "holds 1 weights .* no place for, the first is .*projector_layernorm"
    with pytest.raises(CitError, match=says): get_backbone(str(copy))


def test_weights_that_are_missing_are_named(copy):
    for shard in copy.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(shard).items() if "linear_2" not in k}, shard, metadata={"format": "pt"})
    with pytest.raises(CitError, match="2 weights are missing .*linear_2"): get_backbone(str(copy))


@pytest.mark.parametrize("error, says", [
    (ImportError("\nThis processor requires the Torchvision library.\nMore"), "not installed: This .* the Torchvision"),
    (ImportError(""), "not installed: ImportError"), (ValueError("\n \nbad size\n"), "LLaVA checkpoint: bad size")])
def test_the_reason_of_a_library_is_not_lost(error, says, twin, monkeypatch):
    from transformers import AutoProcessor
    def fail(*args, **kw): raise error
    monkeypatch.setattr(AutoProcessor, "from_pretrained", fail)
    with pytest.raises(CitError, match=says): get_backbone(str(twin))


# The image processor

def test_pillow_prepares_pictures_where_torchvision_is_installed(twin, monkeypatch):
    "transformers is made to find torchvision and a class for it, whose pixels are others."
    from transformers import CLIPImageProcessorPil
    picture = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    want = get_backbone(str(twin)).pixels([picture])

    class Torchvision(CLIPImageProcessorPil):
        def __call__(self, *args, **kw): raise AssertionError("pictures went through torchvision")
    real, found = image_processing_auto.get_image_processor_class_from_name, []

    def by_name(name):
        if name != "CLIPImageProcessor": return real(name)
        found.append(name)
        return Torchvision
    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(image_processing_auto, "get_image_processor_class_from_name", by_name)
    bb = get_backbone(str(twin))
    used = {type(bb.image_processor), type(bb.processor.image_processor)}
    assert found and used == {CLIPImageProcessorPil}
    assert (bb.pixels([picture]) == want).all()


def test_what_prepares_pictures_is_in_the_record(twin, tmp_path, monkeypatch):
    from cit_workbench.models.family import Family
    about = {}
    for name in ("pil", "other"):
        if name == "other":
            class Other:
                def __init__(self, ip): self.ip, self.image_mean = ip, ip.image_mean
                def __call__(self, *args, **kw): return self.ip(*args, **kw)
            real = Family.processor

            def other(self, where):
                processor = real(self, where)
                object.__setattr__(processor, "image_processor", Other(processor.image_processor))
                return processor
            monkeypatch.setattr(Family, "processor", other)
        run = Run(method="zero_shot", backbone=str(twin), compute={"threads": 1}, out=str(tmp_path/name),
                  stream_args={"tasks": ["col-word"], "n_train": 8, "n_val": 2, "n_test": 2})
        run.train()
        about[name] = json.loads((run.folder/"run.json").read_text())
    assert about["pil"]["image_processor"] == "CLIPImageProcessorPil"
    assert "image_processor" not in about["pil"]["protocol_fields"]
    assert about["other"]["protocol_fields"]["image_processor"] == about["other"]["image_processor"] == "Other"
    assert "pillow" in about["pil"]["versions"]


def test_other_programs_find_the_start_model(twin, monkeypatch):
    monkeypatch.chdir(twin.parent)
    assert get_backbone("llava").model.name_or_path == str(twin)
    assert get_backbone("tiny-instruct").model.name_or_path == str(assets("tiny-instruct"))


def test_a_hub_id_stays_a_hub_id(twin, tmp_path, monkeypatch):
    from huggingface_hub import constants
    cache = tmp_path/"hub"
    snapshot = cache/"models--org--name"/"snapshots"/"abc"
    shutil.copytree(twin, snapshot)
    (cache/"models--org--name"/"refs").mkdir()
    (cache/"models--org--name"/"refs"/"main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert get_backbone("org/name").model.name_or_path == "org/name"
    assert start_hash("org/name") == start_hash(str(twin))
