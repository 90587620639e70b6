"""A LLaVA-1.5 checkpoint with random weights, file for file as llava-hf/llava-1.5-7b-hf, and a folder as CoIN's.

`python tests/twin.py FOLDER` makes FOLDER/llava and FOLDER/coin; with --full the checkpoint has the 7B model's shape.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaConfig, LlavaForConditionalGeneration

WORDS = """What is the color of object left right in image ? Answer the question using a single word or phrase. red blue
green cat dog two three yes no Provide bounding box coordinate region this sentence describes: Which of these A. B. C.
option letter from given choices directly. USER: ASSISTANT: [0.12, 0.30, 0.55, 0.98] unanswerable title book? camera?"""

TEXT = "for content in message['content'] | selectattr('type', 'equalto', 'text')"
IMAGE = TEXT.replace("'text'", "'image'")
CHAT = ("{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{# Render all images first #}{% " + IMAGE + " %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
        "{% if message['role'] != 'assistant' %}{% " + TEXT + " %}{{ content['text'] + ' '}}{% endfor %}"
        "{% else %}{% " + TEXT + " %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")


def edit(path, change):
    "Change the content of a JSON file in place."
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _dims(*sizes):
    return dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes))


SMALL = {"vision": {**_dims(32, 64, 3, 2), "image_size": 42}, "text": _dims(64, 128, 2, 4), "vocab": 640, "std": .2}
FULL = {"vision": {**_dims(1024, 4096, 24, 16), "image_size": 336}, "text": _dims(4096, 11008, 32, 32),
        "vocab": 32064, "std": .02}


def _put(folder, name, obj): (folder/name).write_text(json.dumps(obj, indent=2))


def _train_tokenizer(vocab):
    "Llama's kind: byte-pair merges over words that begin with ▁, bytes for what is unknown."
    tok = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    first = [*SPECIAL[:3], *[f"<0x{b:02X}>" for b in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=vocab - 64, special_tokens=first, show_progress=False)
    tok.train_from_iterator([WORDS]*8, trainer)
    tok = Tokenizer.from_str(json.dumps(json.loads(tok.to_str()) | {"pre_tokenizer": None, "added_tokens": []}))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    tok.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tok.add_special_tokens(list(SPECIAL))
    return tok


def _put_processor(folder, tok, side):
    "Tokenizer, image processor and chat template."
    ids = {t: tok.token_to_id(t) for t in SPECIAL}
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tok.save(str(folder/"tokenizer.json"))
    _put(folder, "tokenizer_config.json", {
        "added_tokens_decoder": {str(i): {"content": t, **entry} for t, i in ids.items()}, "add_bos_token": True,
        "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False, "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"}, "model_max_length": 1000000000000000019884624838656,
        "padding_side": "left", "processor_class": "LlavaProcessor", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", **named})
    _put(folder, "special_tokens_map.json", named)
    _put(folder, "added_tokens.json", {t: ids[t] for t in SPECIAL[3:]})
    _put(folder, "chat_template.json", {"chat_template": CHAT})
    _put(folder, "preprocessor_config.json", {
        "crop_size": {"height": side, "width": side}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [.48145466, .4578275, .40821073],
        "image_processor_type": "CLIPImageProcessor", "image_std": [.26862954, .26130258, .27577711],
        "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 1/255, "size": {"shortest_edge": side}})
    _put(folder, "processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"})
    return ids


def old_name(name):
    "The name of a weight in the hub's files, which are older than today's layout of the model."
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                     ("model.vision_tower.", "vision_tower.vision_model."),
                     ("model.multi_modal_projector.", "multi_modal_projector.")):
        if name.startswith(new): return old + name[len(new):]
    return name


def make_twin(folder, full=False, seed=0, shards=3):
    "Write the checkpoint: bfloat16, several safetensors files with an index."
    folder, dims = Path(folder), FULL if full else SMALL
    folder.mkdir(parents=True, exist_ok=True)
    side, vocab = dims["vision"]["image_size"], dims["vocab"]
    ids = _put_processor(folder, _train_tokenizer(vocab), side)
    text = {"model_type": "llama", "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "initializer_range": dims["std"], **dims["text"]}
    vision = {"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
              **dims["vision"]}
    config = {"ignore_index": -100, "image_seq_length": (side//14)**2, "image_token_index": ids["<image>"],
              "pad_token_id": ids["<pad>"], "projector_hidden_act": "gelu", "text_config": text,
              "tie_word_embeddings": False, "vision_config": vision, "vision_feature_layer": -2,
              "vision_feature_select_strategy": "default"}
    about = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "bfloat16"}
    _put(folder, "config.json", config | about | {"transformers_version": "4.36.0.dev0", "vocab_size": vocab})
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": ids["<pad>"]}
    _put(folder, "generation_config.json", {"_from_model_config": True, **ends})
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try: model = LlavaForConditionalGeneration(LlavaConfig(**config))
    finally: torch.set_default_dtype(torch.float32)
    weights, index = {old_name(k): v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}, {}
    for i in range(shards):
        part, file = sorted(weights)[i::shards], f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({k: weights[k] for k in part}, folder/file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    about = {"total_size": sum(2*v.numel() for v in weights.values())}
    _put(folder, "model.safetensors.index.json", {"metadata": about, "weight_map": dict(sorted(index.items()))})
    return folder


PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PLACE = "Please provide the bounding box coordinate of the region this sentence describes:"
SIZES = [(64, 48), (37, 90), (50, 50), (120, 21)]


def _picture(path, i):
    "A noisy image of an odd size; its suffix says how it is stored."
    (w, h), noise = SIZES[i % len(SIZES)], np.random.default_rng(i)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.integers(0, 255, (h, w, 3), np.uint8)).save(path)


def _ask(task, i):
    "Question and answer number `i` of a task, and the path of its image or None."
    color, thing, d = ("red", "blue", "green")[i % 3], ("cat", "dog")[i % 2], i % 10
    if task == "ScienceQA":
        picture = f"./ScienceQA/images/train/{i}/image.png" if i % 2 else None
        return f"Which of these is a {thing}?\nA. cat\nB. dog\nC. book\n{LETTER}", "AB"[i % 2], picture
    if task == "ImageNet":
        return f"What is the object in the image?\n{PHRASE}", thing, f"./ImageNet_withlabel/train/n{i % 2}/{i}.jpg"
    if task == "Grounding":
        box = f"[0.1{d}, 0.2{d}, 0.6{d}, 0.7{d}]"
        return f"{PLACE} {thing} on the left.", box, f"./COCO2014/train2014/COCO_train2014_{i:012}.jpg"
    return f"Is the object {color}?\n{PHRASE}", ("yes", "no")[i % 2], f"COCO2014/val2014/COCO_val2014_{i:012}.jpg"


def _train_record(task, i, question, answer, pic):
    talk = [{"from": "human", "value": "<image>\n"*bool(pic) + question}, {"from": "gpt", "value": answer}]
    if task == "VQAv2": talk += [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "cat"}]
    return {"id": str(i) if task == "ScienceQA" else i, **pic, "conversations": talk}


def _test_record(task, i, question, answer, pic):
    said = {"answer": answer}
    if task == "Grounding": said = {"answer": "", "answer_bbox": answer, "size": list(SIZES[i % 4])}
    return {"question_id": str(i) if task == "ScienceQA" else i, **pic, "text": question, **said}


def make_coin(folder, tasks=("ScienceQA", "ImageNet", "Grounding", "VQAv2"), n_train=24, n_test=12):
    "Write a folder as the authors of CoIN distribute theirs."
    folder = Path(folder)
    for t in tasks:
        asked = [_ask(t, i) for i in range(n_train + n_test)]
        for i, (*_, image) in enumerate(asked):
            if image: _picture(folder/"cl_dataset"/image, i)
        rows = [(t, i, q, a, {"image": image} if image else {}) for i, (q, a, image) in enumerate(asked)]
        where = folder/"playground"/"Instructions_Original"/t
        where.mkdir(parents=True, exist_ok=True)
        _put(where, "train.json", [_train_record(*r) for r in rows[:n_train]])
        _put(where, "val.json" if t == "VQAv2" else "test.json", [_test_record(*r) for r in rows[n_train:]])
    return folder


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__)
    print(make_twin(Path(sys.argv[1])/"llava", full="--full" in sys.argv), make_coin(Path(sys.argv[1])/"coin"))
