"Tokenizers and chat templates of several families, small, for tests of text."
import json

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from twin import CHAT, WORDS, _train_tokenizer

from cit_workbench.pretraining.tokenizer import make_tokenizer

TEXT = "for c in m['content'] if c['type'] == 'text'"
IMAGES = "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
VICUNA = ("A chat between a human and an assistant. {% for m in messages %}"
          "{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}" + IMAGES
          + "{% " + TEXT + " %}{{ c['text'] }}{% endfor %}"
          "{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}"
          "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
CHATML = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
          "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + IMAGES
          + "{% " + TEXT + " %}{{ c['text'] }}{% endfor %}"
          "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n" + IMAGES
          + "{% " + TEXT + " %}{{ c['text'] | trim }}{% endfor %}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] " + IMAGES + "{% " + TEXT
           + " %}{{ c['text'] }}{% endfor %} [/INST]{% else %}{% " + TEXT + " %}{{ ' ' + c['text'] }}{% endfor %}"
           "{{ eos_token }}{% endif %}{% endfor %}")
TEMPLATES = {"llava": CHAT, "vicuna": VICUNA, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL,
             "bos": "{{ bos_token }}" + CHAT}
MORE = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _fast(tok, **named):
    "As `from_pretrained` gives it: the common marks are special, one further word is an added word like any other."
    tok.add_special_tokens([*named.values(), "<image>", *MORE])
    tok.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=tok, extra_special_tokens={"image_token": "<image>"}, **named)


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA_3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}


def _begun(tok, bos):
    tok.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", [(bos, tok.token_to_id(bos))])


def _llama(): return _fast(_train_tokenizer(640), **LLAMA)


def _metaspace():
    "A blank is put before the first word only, as in newer conversions of Llama's tokenizer."
    tok = json.loads(_train_tokenizer(640).to_str())
    tok["normalizer"] = None
    tok["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return _fast(Tokenizer.from_str(json.dumps(tok)), **LLAMA)


def _bytes(named):
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([WORDS]*8, trainer)
    tok.add_special_tokens([*named.values()])
    if "bos_token" in named: _begun(tok, named["bos_token"])
    return _fast(tok, **named)


def _unigram():
    "Control tokens are words of the model, too, as in sentencepiece."
    letters = sorted({c for c in WORDS + "<>|/_-abcdefghijklmnopqrstuvwxyz▁" if not c.isspace()})
    words = [(f"▁{w}", -3.) for w in sorted({*WORDS.split()})]
    pieces = [("<unk>", 0.), ("<s>", 0.), ("</s>", 0.), *words, *((c, -9.) for c in letters), ("\n", -9.)]
    tok = Tokenizer(models.Unigram([*dict(pieces).items()], unk_id=0))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.add_special_tokens(["<s>"])
    _begun(tok, "<s>")
    return _fast(tok, **LLAMA)


TOKENIZERS = {"words": make_tokenizer, "llama": _llama, "metaspace": _metaspace, "unigram": _unigram,
              "qwen": lambda: _bytes(QWEN), "llama3": lambda: _bytes(LLAMA_3)}
SPELLS = ["llama", "metaspace", "qwen", "llama3"]  # tokenizers that can write any text


def make(tokenizer, template) -> LlavaProcessor:
    "A processor; `template` is a name in `TEMPLATES` or a template itself."
    image = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    return LlavaProcessor(image, TOKENIZERS[tokenizer](), patch_size=14, vision_feature_select_strategy="default",
                          image_token="<image>", num_additional_image_tokens=1,
                          chat_template=TEMPLATES.get(template, template))


def theirs(processor, question, answer, image) -> list:
    "The ids of Hugging Face's own `apply_chat_template`, its nine image tokens written as one."
    picture = [{"type": "image", "image": Image.fromarray(np.zeros((42, 42, 3), np.uint8))}]*image
    turns = [{"role": "user", "content": [*picture, {"type": "text", "text": question}]}]
    if answer is not None: turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    got = processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=answer is None)
    ids, one = list(got[0] if isinstance(got[0], list) else got), processor.tokenizer.convert_tokens_to_ids("<image>")
    return [t for i, t in enumerate(ids) if t != one or ids[i - 1] != one]
