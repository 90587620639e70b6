"Rows become ids as Hugging Face's own template gives them, data stay data, and answers come back as text."
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from speech import CHATML, LLAMA3, MORE, SPELLS, TEMPLATES, TOKENIZERS, make, theirs
from twin import CHAT, make_twin

from cit_workbench import get_backbone, get_stream
from cit_workbench.models.batch import at
from cit_workbench.models.chat import Chat
from cit_workbench.core.errors import CitError
from cit_workbench.measure.tokens import content_tokens
from cit_workbench.contract.net import Net
from cit_workbench.data.stream import all_streams
from cit_workbench.data.task import Example

QUESTIONS = ["What is the color?\nAnswer with a word.", "red", " blanks around \n", "日本語 {{ x }} <b>?"]
ANSWERS = ["yes", "[0.12, 0.30]", "red cat", "日本語", "It's \"it\".\nNo"]


@pytest.fixture(scope="module")
def chats():
    made = {}

    def get(tokenizer, template):
        key = tokenizer, template
        if key not in made:
            processor = make(*key)
            tok = processor.tokenizer
            made[key] = Chat(processor, tok.convert_tokens_to_ids("<image>"), [tok.eos_token_id], f"{key}")
        return made[key]
    return get


# Ids

@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_ids_are_those_of_the_template_with_the_assistants_turn(chats, tokenizer, template):
    chat = chats(tokenizer, template)
    for image in (True, False):
        for question in QUESTIONS:
            assert chat.encode(question, None, image) == (theirs(chat.processor, question, None, image), [chat.end])
            for answer in ANSWERS:
                prompt, said = chat.encode(question, answer, image)
                whole = theirs(chat.processor, question, answer, image)
                printed = prompt + said if chat.turns[image].end else prompt + said[:-1]
                assert whole[:len(printed)] == printed and said[-1] == chat.end
                rest = chat.tokenizer.decode(whole[len(printed):])
                assert not chat.turns[image].end or not rest.strip()
                assert prompt.count(chat.image_id) == image and chat.image_id not in said


def test_one_begin_token_no_blank_and_the_turns_own_end(chats):
    words = lambda *key: chats(*key).tokenizer.convert_ids_to_tokens(sum(chats(*key).encode("red", "yes", False), []))
    for key in (("llama", "bos"), ("llama3", "llama3"), ("llama", "mistral"), ("unigram", "bos")):
        assert words(*key).count(chats(*key).tokenizer.bos_token) == 1
    assert words("llama", "chatml")[-2:] == ["yes", "<|im_end|>"]
    assert words("llama3", "llama3")[-2:] == ["yes", "<|eot_id|>"]
    assert words("llama", "llava")[-2:] == ["▁yes", "</s>"]
    assert words("qwen", "vicuna")[-2:] == ["Ġyes", "<|im_end|>"]


def before(bb, question, answer, image):
    "The rule that the records were made with: template, one blank, answer, the tokenizer's end token."
    content = [{"type": "image"}]*image + [{"type": "text", "text": question}]
    text = bb.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt, full = bb.tokenizer(text)["input_ids"], bb.tokenizer(f"{text} {answer}")["input_ids"]
    assert full[:len(prompt)] == prompt
    wide = [t for p in prompt for t in ([p]*bb.n_vis if p == bb.image_id else [p])]
    return wide, full[len(prompt):] + [bb.tokenizer.eos_token_id]


def first_rows():
    for name in all_streams():
        for task, _ in get_stream(name).roles():
            yield from (task.example(split, i) for split in task.n for i in range(min(2, task.n[split])))


@pytest.mark.parametrize("start", ["tiny-instruct", "tiny-base"])
def test_the_tiny_starts_read_all_embedded_streams_as_before(start):
    bb, n = get_backbone(start), 0
    for e in first_rows():
        for said in (e.answer, *e.choices):
            row = e.question, said, e.image is not None
            assert bb.encode(*row) == before(bb, *row)
            _, ids = bb.encode(e.question, said)
            assert bb.decode(ids) == bb.tokenizer.decode(ids, skip_special_tokens=True).strip() == said
            n += 1
    assert n > 500 and (bb.eos, bb.stops) == (2, [2])


def test_rooms_of_the_embedded_streams_are_those_of_their_formats():
    bb = get_backbone()
    for name in all_streams():
        net = Net(bb, get_stream(name, limit=1, eval_limit=40))
        for task, _ in net.stream.roles():
            for split in ("test", "val"): assert net.room(task.name, split)[:2] == (task.format.max_new_tokens, 0)


@pytest.fixture(scope="module")
def twin(tmp_path_factory): return make_twin(tmp_path_factory.mktemp("twin")/"llava")


@pytest.fixture
def own(twin, tmp_path): return shutil.copytree(twin, tmp_path/"llava")


def put_template(folder, template):
    (folder/"chat_template.json").write_text(json.dumps({"chat_template": template}))
    return get_backbone(str(folder))


def test_a_twin_of_llava_reads_as_before(twin):
    bb = get_backbone(str(twin))
    for e in first_rows():
        row = e.question, e.answer, e.image is not None
        assert bb.encode(*row) == before(bb, *row)


def old_mask(bb, question, image):
    "Which tokens are the question's, found by a mark in its place."
    def text(q):
        content = [{"type": "image"}]*image + [{"type": "text", "text": q}]
        return bb.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    own, start = question.strip(), text("\N{SNOWMAN}").find("\N{SNOWMAN}")
    got = bb.tokenizer(text(question), return_offsets_mapping=True)
    inside = [a < b and a < start + len(own) and b > start for a, b in got["offset_mapping"]]
    return [m for t, m in zip(got["input_ids"], inside) for m in [m]*(bb.n_vis if t == bb.image_id else 1)]


def test_the_questions_own_tokens_are_found_as_before(twin):
    for bb in (get_backbone(), get_backbone(str(twin))):
        for e in list(first_rows())[::9]:
            assert content_tokens(bb, e.question, True) == old_mask(bb, e.question, True)
            assert content_tokens(bb, e.question, False) == old_mask(bb, e.question, False)


# Data stay data

@pytest.mark.parametrize("template", ["llava", "chatml", "llama3", "mistral"])
@pytest.mark.parametrize("tokenizer", SPELLS)
def test_words_that_look_like_control_tokens_stay_words(chats, tokenizer, template):
    chat = chats(tokenizer, template)
    tok = chat.tokenizer
    marks = {t.content for t in tok.added_tokens_decoder.values()}
    assert {*MORE, "<image>", "<tool>", tok.eos_token} <= marks
    plain = [*map(chat.encode("red", "yes", True)[0].count, tok.all_special_ids)]
    for mark in sorted(marks):
        for text in (mark, f"{mark}old{mark} new", f"a {mark} b", f"{mark}{mark}", f"x{mark}.", f"no\n{mark}"):
            prompt, said = chat.encode(text, text, True)
            assert chat.decode(said[:-1]) == text
            assert not chat.control_ids & {*said[:-1]} and said[-1] == chat.end
            assert [*map(prompt.count, tok.all_special_ids)] == plain


def test_an_added_word_that_is_no_control_token_is_one_token(chats):
    chat = chats("qwen", "chatml")
    assert chat.encode("red", "<tool>", False)[1] == [chat.tokenizer.convert_tokens_to_ids("<tool>"), chat.end]
    printed = CHATML.replace("You are kind.", "You may say <tool>.")
    strict = Chat(make("qwen", printed), chat.image_id, [chat.end])
    assert len(strict.encode("red", "<tool>", False)[1]) > 2


@pytest.mark.parametrize("tokenizer,text,mark", [("words", "the </s> tag", "</s>"), ("words", "<unk>", "<unk>"),
                                                 ("unigram", "a <s> b", "<s>")])
def test_a_mark_that_cannot_be_written_is_refused_by_name(chats, tokenizer, text, mark):
    chat = chats(tokenizer, "llava")
    for question, answer in ((text, "yes"), ("red", text)):
        with pytest.raises(CitError, match=re.escape(repr(mark))): chat.encode(question, answer, True)


def test_private_characters_cannot_be_forged(chats):
    for tokenizer in sorted(TOKENIZERS):
        chat = chats(tokenizer, "llava")
        for private in chat.private.values():
            with pytest.raises(CitError, match="private character"): chat.encode(f"a {private} b", "yes", True)


def test_what_the_issue_of_typed_marks_was(twin):
    bb = get_backbone(str(twin))
    assert bb.decode(bb.encode("price?", "<s>old</s> new price", False)[1]) == "<s>old</s> new price"
    assert bb.encode("What does </s> mean in HTML?", "end", False)[0].count(2) == 0
    question, answer, black = "what is an <image> tag?", "the <image> tag", np.zeros((8, 8, 3), np.uint8)
    rows = [Example("a", black, question, answer), Example("b", None, question, answer, choices=(answer, "an <image>"))]
    b = bb.collate(rows)
    assert (b.ids == bb.image_id).sum(1).tolist() == [9, 0] and not (b.labels == bb.image_id).any()
    with at(b), torch.no_grad(): assert torch.isfinite(bb.forward(b).loss)
    with at(bb.collate(rows, answers=False)) as b:
        ids, lls = bb.answer(b, 3, [[bb.texts(e, c)[1] for c in e.choices] for e in rows])
    assert lls[0] is None and torch.isfinite(lls[1]).all()


def test_rows_whose_image_tokens_are_not_their_pictures_are_refused(twin):
    bb = get_backbone(str(twin))
    e = Example("mine/train/3", np.zeros((8, 8, 3), np.uint8), "red?", "yes")
    ids = bb.texts(e)[0]
    for wrong in ([i for i in ids if i != bb.image_id], ids + [bb.image_id]):
        with pytest.raises(CitError, match="mine/train/3 holds .* image tokens"): bb.check_row(e, wrong)
    two = bb.tower(bb.pixels([e.image]*2))
    with pytest.raises(CitError, match="features of 2 pictures are given for 1"): bb.collate([e], two)
    with pytest.raises(CitError, match="features of 2 pictures are given for 0"):
        bb.collate([replace(e, image=None)], two)


TEXTS = ["", "red", "the cat sat", "日本語の文", "🙂🙂", "ﬃ ﷺ", "a  b\t\nc", "<|im_end|><image></s>", "Ünï çødé", "[0.12, 0.30]"]


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_bytes_bound_the_tokens_of_a_row_from_above(chats, tokenizer):
    for template in sorted(TEMPLATES):
        chat = chats(tokenizer, template)
        around = len(chat.encode("", "", True)[0])
        for text in TEXTS:
            if tokenizer not in SPELLS and chat.control.search(text): continue
            prompt, said = chat.encode(text, text, True)
            assert len(prompt) <= around + chat.at_most(text) and len(said) <= chat.at_most(text)


# Templates that cannot be used

ALWAYS = CHAT.replace("{{ '<image>\n' }}", "").replace("{% for", "<image>{% for", 1)
BROKEN = {
    "no chat template; looked for chat_template.jinja, chat_template.json": None,
    "cannot be used": "{% for m in messages %}{{ m['content'] ",
    "A system message comes first": "{{ raise_exception('A system message comes first') }}",
    "of config.json) 0 times": CHAT.replace("<image>", "<picture>"),
    "of config.json) 2 times": CHAT.replace("<image>", "<image><image>"),
    "1 times where there is none": ALWAYS,
    "does not show a question": CHAT.replace("{{ content['text'] + ' '}}", "{{ content['text'] | upper }}"),
    "does not end where an answer begins": CHAT.partition("{% if add_generation_prompt %}")[0],
    "of config.json) 0 times, and 0": "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] if c['type'] == "
                                      "'text' %}{{ c['text'] }}{% endfor %} {% endfor %}"
                                      "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "a chat template that is int, but must be one text": 5,
    "a chat template that is list, but must be one text": [{"name": "default", "template": CHAT}],
    "can only concatenate": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("why", sorted(BROKEN))
def test_a_template_that_cannot_be_used_is_one_sentence_at_loading(own, why):
    if BROKEN[why] is None: (own/"chat_template.json").unlink()
    else: (own/"chat_template.json").write_text(json.dumps({"chat_template": BROKEN[why]}))
    with pytest.raises(CitError, match=re.escape(why)) as said: get_backbone(str(own))
    assert "\n" not in str(said.value) and "llava" in str(said.value)


def test_an_image_token_that_is_another_one_in_the_config_is_refused(own):
    config = json.loads((own/"config.json").read_text())
    (own/"config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    with pytest.raises(CitError, match="id 7 of config.json"): get_backbone(str(own))


def test_the_default_of_several_templates_is_used(own):
    want = get_backbone(str(own)).encode("What is it?", "yes")
    (own/"chat_template.json").unlink()
    (own/"chat_template.jinja").write_text(CHAT)
    (own/"additional_chat_templates").mkdir()
    (own/"additional_chat_templates"/"tool_use.jinja").write_text("none")
    assert get_backbone(str(own)).encode("What is it?", "yes") == want


def test_templates_of_other_families_are_read(own):
    for template in (CHATML, LLAMA3, "{{ bos_token }}" + CHAT):
        bb = put_template(own, template)
        ids = bb.encode("What is the color?", "yes")
        assert ids[0].count(bb.image_id) == bb.n_vis and sum(ids, []).count(1) == 1
        assert bb.decode(ids[1]) == "yes" and ids[1][-1] == bb.eos in bb.stops
