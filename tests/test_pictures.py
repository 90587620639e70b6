"What a person sees is what the model gets: every way into a picture gives the same pixels, or one sentence."
import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image
from twin import make_coin, make_twin

from cit_workbench import CitError, Run, get_backbone
from cit_workbench.cli import main
from cit_workbench.live.asking import as_array
from cit_workbench.data.pictures import load_image
from cit_workbench.views.pieces import picture
from cit_workbench.measure.store import state_key

TURNED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
          8: lambda a: np.rot90(a)}  # what a viewer does to the pixels of a file, by orientation


@pytest.fixture(scope="module")
def twin(tmp_path_factory): return str(make_twin(tmp_path_factory.mktemp("twin")/"llava"))


@pytest.fixture(scope="module")
def bb(twin): return get_backbone(twin, image_mode="pad")


def short(twin, folder, out, **fields):
    spec = {"method": "zero_shot", "backbone": twin, "stream": f"coin:{folder}",
            "stream_args": {"limit": 8, "eval_limit": 4}, "compute": {"threads": 1}, "out": str(out)}
    return Run(**{**spec, **fields})


def noise(h=40, w=64, bands=3): return np.random.default_rng(0).integers(0, 255, (h, w, bands), np.uint8)


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


# Orientation

@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_a_photo_is_turned_as_its_exif_says(kind, orientation, tmp_path):
    lossless = {"WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(noise()).save(tmp_path/"a", kind, exif=exif_of(orientation), **lossless)
    Image.fromarray(noise()).save(tmp_path/"b", kind, **lossless)
    stored = np.asarray(Image.open(tmp_path/"b").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path/"a")), TURNED[orientation](stored))


def test_the_model_gets_the_turned_photo_unless_the_run_reads_as_published(bb, twin, tmp_path):
    Image.fromarray(noise()).save(tmp_path/"a.png", exif=exif_of(6))
    Image.fromarray(np.rot90(noise(), -1)).save(tmp_path/"b.png")
    Image.fromarray(noise()).save(tmp_path/"stored.png")
    assert (bb.pixels([tmp_path/"a.png"]) == bb.pixels([tmp_path/"b.png"])).all()
    published = get_backbone(twin, image_mode="pad", image_reading="published")
    assert (published.pixels([tmp_path/"a.png"]) == bb.pixels([tmp_path/"stored.png"])).all()
    assert (published.pixels([tmp_path/"a.png"]) != bb.pixels([tmp_path/"a.png"])).any()


def test_a_damaged_exif_block_does_not_keep_a_picture_from_opening(tmp_path):
    good = exif_of(6).tobytes()
    damaged = [b"", b"Exif\0\0", b"Exif\0\0nonsense", good[:12], good[:-4], good.replace(b"\x12\x01", b"\x00\x01")]
    for i, bad in enumerate(damaged):
        path = tmp_path/f"{i}.jpg"
        Image.fromarray(noise()).save(path, exif=bad)
        assert sorted(load_image(path).size) == [40, 64]


# Transparency and deep greys

def letters(half=255):
    "Black letters on fully transparent black."
    a = np.zeros((20, 40, 4), np.uint8)
    a[5:15, 5:15, 3] = half
    return a


def with_alpha(image, alpha):
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("kind", ["RGBA png", "LA png", "palette png", "palette bytes png", "webp", "gif", "PA",
                                  "colour key png", "RGBa", "tiff", "array", "grey array"])
def test_what_shines_through_is_white(kind, tmp_path):
    image, path = Image.fromarray(letters()), tmp_path/"drawing"
    if kind == "RGBA png": image.save(path, "PNG")
    if kind == "LA png": image.convert("LA").save(path, "PNG")
    if kind == "webp": image.save(path, "WEBP", lossless=True)
    if kind == "tiff": image.save(path, "TIFF")
    if kind == "gif": image.save(path, "GIF")
    if kind.startswith("palette"):
        flat = Image.new("P", (40, 20), 1)
        flat.putpalette([0, 0, 0, 0, 0, 0])
        flat.paste(0, (5, 5, 15, 15))
        flat.save(path, "PNG", transparency=1 if kind == "palette png" else bytes([255, 0]))
    if kind == "colour key png":
        flat = Image.new("RGB", (40, 20), (1, 2, 3))
        flat.paste((0, 0, 0), (5, 5, 15, 15))
        flat.save(path, "PNG", transparency=(1, 2, 3))
    given = {"PA": lambda: with_alpha(Image.new("P", (40, 20)), letters()[..., 3]),
             "RGBa": lambda: image.convert("RGBa"),
             "array": letters, "grey array": lambda: letters()[..., [0, 3]]}.get(kind, lambda: path)()
    seen = np.asarray(load_image(given))
    assert seen.shape == (20, 40, 3) and (seen[0] == 255).all() and (seen[5:15, 5:15] == 0).all()
    assert np.asarray(load_image(given, "published")).max() <= 3


def test_half_transparent_pixels_are_mixed_with_white():
    assert np.asarray(load_image(letters(128)))[10, 10].tolist() == [127]*3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_keep_their_shades(kind, tmp_path):
    Image.fromarray((np.arange(0, 256, 5, dtype=np.uint16)*257)[None]).save(tmp_path/"grey", kind)
    assert np.asarray(load_image(tmp_path/"grey"))[0, :, 0].tolist() == list(range(0, 256, 5))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX", "I", "F"])
def test_every_other_mode_is_read_as_pillow_converts_it(mode):
    image = Image.fromarray(noise()).convert(mode)
    assert load_image(image).tobytes() == image.convert("RGB").tobytes()


def test_floats_up_to_one_are_shades():
    seen = load_image(Image.fromarray(np.array([[0, .5, 1]], np.float32)))
    assert np.asarray(seen)[0, :, 0].tolist() == [0, 127, 255]


# All ways in

def test_view_upload_and_question_show_what_the_model_gets(tmp_path):
    Image.fromarray(letters()).save(tmp_path/"a.png", exif=exif_of(6))
    want = np.asarray(load_image(tmp_path/"a.png"))
    assert want.shape == (40, 20, 3) and want.max() == 255
    with Image.open(tmp_path/"a.png") as opened: np.testing.assert_array_equal(np.asarray(load_image(opened)), want)
    np.testing.assert_array_equal(np.asarray(load_image((tmp_path/"a.png").read_bytes())), want)
    np.testing.assert_array_equal(as_array(str(tmp_path/"a.png")), want)
    Image.fromarray(want).save(tmp_path/"flat.png")
    assert picture(tmp_path/"a.png") == picture(str(tmp_path/"flat.png")) == picture(want)
    assert picture(tmp_path/"a.png", reading="published") != picture(want)


def test_arrays_of_the_embedded_streams_pass_unchanged():
    from cit_workbench import get_stream
    for t, _ in get_stream("shapes").roles():
        image = t.example("test", 0).image
        if image is not None: np.testing.assert_array_equal(np.asarray(load_image(image)), image)


@pytest.mark.parametrize("image, says", [
    (np.zeros((4, 4, 3)), r"image of shape \(4, 4, 3\) and type float64 cannot be read"),
    (np.zeros((4, 4, 7), np.uint8), r"\(4, 4, 7\)"), (np.zeros((3, 0, 3), np.uint8), "holds no pixels"),
    (np.zeros((4, 4, 3)), "float64 cannot be read.*; arrays .* of uint8 are allowed"),
    (b"<svg/>", "image cannot be read: its format is not known; PNG, JPEG"), (b"", "image cannot be read"), (7, "image is int; allowed: a path"), ([[1]], "image is list")])
def test_what_is_no_picture_is_named(image, says):
    for way in (load_image, picture, as_array):
        with pytest.raises(CitError, match=says): way(image)


def test_sixteen_bits_of_grey_with_a_transparent_shade_keep_their_shades(tmp_path):
    shades = (np.arange(64*64).reshape(64, 64)*16).astype(np.uint16)
    Image.fromarray(shades).save(tmp_path/"clear.png", transparency=int(shades[5, 5]))
    Image.fromarray(shades).save(tmp_path/"plain.png")
    clear, plain = (np.asarray(load_image(tmp_path/f"{n}.png")) for n in ("clear", "plain"))
    assert (clear[5, 5] == 255).all() and (plain[5, 5] < 100).all()
    clear = clear.copy()
    clear[5, 5] = plain[5, 5]
    np.testing.assert_array_equal(clear, plain)


# Damaged and huge files

def png(w, h):
    "A PNG of one colour, a row at a time."
    pack, row = zlib.compressobj(), b"\0"*(w + 1)
    body = b"".join(pack.compress(row) for _ in range(h)) + pack.flush()
    chunk = lambda k, d: struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
    head = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_huge_picture_is_named_with_the_limit(tmp_path):
    huge = tmp_path/"huge.png"
    huge.write_bytes(png(14_000, 14_000))
    for way in (load_image, picture, as_array, lambda p: load_image(p, "published")):
        with pytest.raises(CitError, match=r"huge\.png has more than 178,956,970 pixels"): way(str(huge))
    with pytest.raises(CitError, match="image own.png has more than"): load_image(huge.read_bytes(), name="own.png")


def test_a_warning_of_pillow_turned_into_an_error_is_one_sentence(tmp_path):
    (tmp_path/"large.png").write_bytes(png(9_600, 9_600))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CitError, match=r"large\.png cannot be read"): load_image(tmp_path/"large.png")


@pytest.mark.parametrize("error", [MemoryError(), struct.error("unpack"), EOFError(), IndexError("range"), KeyError(7),
                                   OverflowError("big"), TypeError("none"), zlib.error("bad"), RuntimeError("codec")])
def test_whatever_pillow_raises_becomes_one_sentence(error, tmp_path, monkeypatch):
    Image.fromarray(noise()).save(tmp_path/"a.png")
    def fail(*args, **kw): raise error
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(CitError, match=r"a\.png cannot be read: \S"): load_image(tmp_path/"a.png")


KINDS = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "PCX", "AVIF", "JPEG2000"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_opens_or_is_named(kind, tmp_path):
    "Bytes are changed and cut all over the file: never another exception than `CitError`."
    buf, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(noise(16, 24)).save(buf, kind)
    good, refused = buf.getvalue(), 0
    for i in range(60):
        bad = bytearray(good)
        for j in rng.integers(0, min(len(bad), 200), 3): bad[j] = rng.integers(0, 256)
        if i % 3 == 0: bad = bad[:int(rng.integers(0, len(bad)))]
        (tmp_path/"bad").write_bytes(bytes(bad))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: load_image(tmp_path/"bad")
            except CitError as e:
                refused += 1
                assert str(tmp_path/"bad") in str(e)
    assert refused


def test_a_run_names_a_huge_picture_in_one_sentence(twin, tmp_path, capsys):
    folder = make_coin(tmp_path/"coin", n_train=8, n_test=4)
    victim = sorted(folder.glob("cl_dataset/COCO2014/val2014/*"))[0]
    victim.write_bytes(png(14_000, 14_000))
    with pytest.raises(SystemExit) as end:
        main(["run", "--backbone", twin, "--stream", f"coin:{folder}", "--method", "finetune", "--optim", "steps=2",
              "batch=4", "--out", str(tmp_path/"R")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and victim.name in said and "178,956,970" in said and "Traceback" not in said


# How a run reads, in its record

def test_the_reading_is_in_the_record_only_where_it_is_not_the_usual_one(twin, tmp_path):
    folder = make_coin(tmp_path/"coin", n_train=8, n_test=4)
    for p in folder.glob("cl_dataset/COCO2014/val2014/*"): Image.fromarray(letters()).save(p, "PNG")
    records = {}
    for name in (None, "seen", "published"):
        run = short(twin, folder, tmp_path/str(name), compute={"threads": 1, "image_reading": name})
        run.train()
        records[name] = json.loads((run.folder/"run.json").read_text())
    asked = {n: r["asked"]["compute"].get("image_reading") for n, r in records.items()}
    fields = {n: r["protocol_fields"].get("image_reading") for n, r in records.items()}
    assert asked == fields == {None: None, "seen": None, "published": "published"}
    assert records[None]["protocol"] == records["seen"]["protocol"] != records["published"]["protocol"]


def test_answers_of_one_reading_are_not_taken_for_the_other(twin, tmp_path):
    from cit_workbench.contract.net import Net
    from cit_workbench.data.stream import get_stream
    stream = get_stream("shapes", n_train=8, n_val=2, n_test=2)
    keys = {r: state_key(Net(get_backbone(twin, image_reading=r), stream)) for r in ("seen", "published")}
    assert keys["seen"] != keys["published"]


def test_an_unknown_reading_is_refused(twin):
    with pytest.raises(CitError, match="unknown image_reading 'raw'; allowed: published, seen"):
        get_backbone(twin, image_reading="raw")


# What the dashboard does with them

class Desk:
    "What `Ask` needs of a workbench."
    rec = None
    def safely(self, f):
        try: f()
        except CitError as e: self.note = str(e)
    def later(self, f, text): self.safely(f)
    def say(self, text): self.note = text


def uploads(content):
    from cit_workbench.dashboard import Ask
    desk = Desk()
    asking = Ask(desk)
    asking.upload.value = [{"name": "own.png", "type": "image/png", "size": 0, "last_modified": datetime.now(),
                            "content": content}]
    return asking, desk


def test_an_upload_is_shown_and_asked_about_as_it_is_seen(tmp_path):
    Image.fromarray(letters()).save(tmp_path/"a.png", exif=exif_of(6))
    asking, desk = uploads((tmp_path/"a.png").read_bytes())
    np.testing.assert_array_equal(asking.image, np.asarray(load_image(tmp_path/"a.png")))
    assert desk.note == "" and asking.picture.value == picture(tmp_path/"a.png", 140)


@pytest.mark.parametrize("content, says", [(b"red", "image own.png cannot be read"), (b"", "own.png cannot be read"),
                                           (png(14_000, 14_000), "own.png has more than 178,956,970 pixels")])
def test_an_upload_that_is_no_picture_is_named_in_the_line_of_the_dashboard(content, says):
    asking, desk = uploads(content)
    assert says in desk.note and asking.image is None


def test_a_table_of_answers_says_which_picture_is_broken(tmp_path):
    from cit_workbench.views.answers import Samples
    (tmp_path/"a.png").write_bytes(png(14_000, 14_000))
    example = SimpleNamespace(image=str(tmp_path/"a.png"))
    stream = SimpleNamespace(task=lambda name: SimpleNamespace(example=lambda split, i: example))
    about = SimpleNamespace(stream=stream, task=SimpleNamespace(value="t"), recs=[SimpleNamespace(config={})])
    assert "a.png has more than" in Samples._shown(about, 0)


def test_a_run_of_published_reading_is_asked_and_shown_that_way(tmp_path, monkeypatch):
    from cit_workbench.live import asking, live
    from cit_workbench.views.toy import toy_run
    Image.fromarray(letters()).save(tmp_path/"a.png")
    asked = []
    def kept(at):
        "What a process of its own would be asked."
        asked.append(np.load(at/"image.npy"))
        (at/"reply").write_text('{"text": "", "task": "", "step": 0}')
    monkeypatch.setattr(live, "answer_from_checkpoint", lambda folder, image, text: asked.append(image))
    for reading, most in ((None, 255), ("published", 0)):
        rec = live.LiveRun(toy_run(tmp_path/str(reading)).path)
        rec._run = rec.run | {"config": {**rec.run["config"], "compute": {"image_reading": reading}}}
        rec.ask(str(tmp_path/"a.png"), "What?", here=True)
        assert asked[-1].max() == most
        monkeypatch.setattr(asking.subprocess, "run", lambda words, **kw: kept(Path(words[-1])))
        rec.ask_apart(str(tmp_path/"a.png"), "What?")
        assert asked[-1].max() == most
