"""Images of one's own, as real bytes: what becomes a frame, what is refused and why."""
import io
import struct
import zlib

import av
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage import data

from bcos_nb.data.preprocess import prepare_videos
from bcos_nb.explainers import explain
from bcos_nb.models import create_detector
from bcos_nb.widgets import OwnImagesExplorer, own_images
from bcos_nb.widgets.canvas import stored_attribution
from bcos_nb.widgets.own_images import UNKNOWN, OwnImages, Refused, find_face, make_own, read_own


def saved(picture, form="PNG", mode=None, **more):
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture, mode) if mode else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def header(width, height, kind=2, bits=8):
    """A PNG of some 60 bytes that promises a size."""
    chunk = lambda name, content: struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def landscape(height=300, width=400):
    """Sky, hills and a meadow, without anybody."""
    y, x = np.mgrid[:height, :width] / height
    hills = 0.55 + 0.08 * np.sin(7 * x) + 0.03 * np.sin(19 * x + 1)
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    sky, meadow = np.stack([120 + 80 * y, 160 + 60 * y, 230 + 0 * y], -1), np.stack([60 + 30 * y, 130 - 40 * y, 50 + 0 * y], -1)
    return np.clip(np.where((y < hills)[..., None], sky, meadow) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def astronaut():
    return data.astronaut()


@pytest.fixture(scope="module")
def photograph(astronaut):
    return saved(astronaut)


@pytest.mark.parametrize("name, content, reason", [
    ("letter.png", b"Dear Sir or Madam,\nthis is a letter.", "whatever its name says: its content is a text that begins with “Dear Sir or Madam,"),
    ("empty.jpg", b"", "its content is empty"),
    ("page.png", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "an SVG drawing"),
    ("paper.jpg", b"%PDF-1.7 \x00\x01", "a PDF"),
    ("phone.jpg", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC photograph, which is not read here: export it as a JPEG"),
    ("film.png", b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00", "a video"),
    ("noise.png", bytes(range(256)) * 4, "its content is something else"),
    ("fifty.png", header(10_000, 5_000), "10000 × 5000 pixels, 50.0 megapixels, more than 40"),
    ("bomb.png", header(65_000, 65_000), "megapixels, more than 40"),
    ("tiny.png", header(8, 300), "too small to see a face in"),
    ("cut.png", header(200, 200), "a damaged PNG file"),
    ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "is not an image"),
])
def test_refused_with_a_reason(name, content, reason):
    with pytest.raises(Refused) as refusal:
        read_own(content, name)
    assert str(refusal.value).startswith(name) and reason in str(refusal.value)


def test_what_is_too_large_is_never_opened(monkeypatch):
    monkeypatch.setattr(own_images.Image, "open", lambda *given, **more: pytest.fail("a file of 30 MB was opened"))
    with pytest.raises(Refused, match="30.0 MB, more than 25"):
        read_own(b"\x89PNG\r\n\x1a\n" + bytes(29_999_992), "large.png")


def test_pixels_are_not_decoded_before_their_number_is_known(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *given: pytest.fail("50 megapixels were decoded"))
    for form, more in (("PNG", {}), ("GIF", {})):
        content = header(10_000, 5_000) if form == "PNG" else b"GIF89a" + struct.pack("<HH", 10_000, 5_000) + b"\x00\x00\x00," + struct.pack("<HHHH", 0, 0, 10_000, 5_000) + b"\x00\x08\x00;"
        with pytest.raises(Refused, match="50.0 megapixels"):
            read_own(content, "fifty")


def test_a_damaged_jpeg_is_said_to_be_one(astronaut):
    with pytest.raises(Refused, match="a damaged JPEG file"):
        read_own(saved(astronaut, "JPEG")[:5000], "half.jpg")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_content_decides_and_pixels_are_kept(astronaut, form):
    more = {"lossless": True} if form == "WEBP" else {}
    pixels, notes = read_own(saved(astronaut, form, **more), "a.txt")
    assert np.array_equal(pixels, astronaut) and notes == []


@pytest.mark.parametrize("orientation, view", [(2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a))])
def test_exif_orientation(astronaut, orientation, view):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(astronaut[:300])
    pixels, notes = read_own(saved(stored, "PNG", exif=exif), "phone.png")
    assert np.array_equal(pixels, view(stored)) and notes == ["turned as its EXIF says"]


def test_a_jpeg_on_its_side_has_its_face(astronaut):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, turned = make_own(saved(astronaut, "JPEG", quality=95), "a.jpg", 128), make_own(saved(np.rot90(astronaut).copy(), "JPEG", quality=95, exif=exif), "b.jpg", 128)
    assert turned.face is not None and np.abs(upright.face.astype(int) - turned.face).mean() < 3


def test_cmyk(astronaut):
    content = saved(Image.fromarray(astronaut).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    pixels, notes = read_own(content, "print.jpg")
    assert notes == ["CMYK made RGB"] and np.abs(pixels.astype(int) - astronaut).mean() < 4


def test_sixteen_bits_grey_alpha_and_palettes(astronaut):
    deep = cv2.cvtColor(astronaut, cv2.COLOR_RGB2GRAY).astype(np.uint16) * 257
    pixels, notes = read_own(cv2.imencode(".png", deep)[1].tobytes(), "deep.png")
    assert notes == ["16 bits made 8 bits"] and np.array_equal(pixels[..., 0], deep // 257) and np.array_equal(pixels[..., 0], pixels[..., 2])
    pixels, _ = read_own(cv2.imencode(".tif", deep)[1].tobytes(), "deep.tif")
    assert np.array_equal(pixels[..., 1], deep // 257)
    colour = astronaut.astype(np.uint16) * 257
    pixels, _ = read_own(cv2.imencode(".png", np.ascontiguousarray(colour[..., ::-1]))[1].tobytes(), "colour.png")
    assert np.abs(pixels.astype(int) - astronaut).max() <= 1
    grey = cv2.cvtColor(astronaut, cv2.COLOR_RGB2GRAY)
    pixels, notes = read_own(saved(grey), "grey.png")
    assert notes == ["grey"] and np.array_equal(pixels, np.repeat(grey[..., None], 3, 2))
    alpha = np.zeros(astronaut.shape[:2], np.uint8)
    alpha[:, 256:] = 255
    pixels, notes = read_own(saved(np.dstack([astronaut, alpha])), "cut out.png")
    assert notes == ["transparency laid over white"] and (pixels[:, :256] == 255).all() and np.array_equal(pixels[:, 256:], astronaut[:, 256:])
    palette = Image.fromarray(astronaut).quantize(64)
    pixels, _ = read_own(saved(palette, "GIF"), "palette.gif")
    assert np.array_equal(pixels, np.asarray(palette.convert("RGB")))
    floats = Image.fromarray((deep / 65535).astype(np.float32))
    pixels, notes = read_own(saved(floats, "TIFF"), "floats.tif")
    assert np.array_equal(pixels[..., 0], deep // 257) and notes == ["floating values made 8 bits"]
    with pytest.raises(Refused, match="no brightness"):
        read_own(saved(Image.fromarray((deep / 65535 - 0.5).astype(np.float32)), "TIFF"), "height.tif")


def test_colour_profiles_are_applied(astronaut):
    from PIL import ImageCms

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, _ = read_own(saved(astronaut, "PNG", icc_profile=lab), "srgb.png")
    assert np.abs(pixels.astype(int) - astronaut).max() <= 2  # sRGB to sRGB is nearly nothing
    pixels, _ = read_own(saved(astronaut, "PNG", icc_profile=b"no profile at all"), "broken.png")
    assert np.array_equal(pixels, astronaut)


def test_animations_and_pages_give_their_first_picture(astronaut):
    pages = [Image.fromarray(np.ascontiguousarray(np.roll(astronaut, k * 100, 1))) for k in range(3)]
    for form, name in (("TIFF", "pages.tif"), ("PNG", "moving.png"), ("WEBP", "moving.webp")):
        more = {"lossless": True} if form == "WEBP" else {}
        pixels, notes = read_own(saved(pages[0], form, save_all=True, append_images=pages[1:], **more), name)
        assert np.array_equal(pixels, astronaut) and notes == ["the first of 3 pictures"], form
    pixels, notes = read_own(saved(pages[0], "GIF", save_all=True, append_images=pages[1:]), "moving.gif")
    assert notes == ["the first of 3 pictures"] and np.abs(pixels.astype(int) - astronaut).mean() < 12  # of 256 colours


def test_the_crop_is_that_of_preparation(astronaut, tmp_path):
    still = cv2.resize(astronaut, (400, 400), interpolation=cv2.INTER_AREA)
    (tmp_path / "raw").mkdir()
    with av.open(str(tmp_path / "raw" / "one.mkv"), "w") as container:  # lossless
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 400
        stream.pix_fmt = "bgr0"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "labels.csv").write_text("video,label,split\none.mkv,real,test\n")
    prepare_videos(tmp_path / "raw", tmp_path / "out", frames=1, size=96, labels=tmp_path / "labels.csv", dataset="UADFV", jobs=0, progress=False)
    prepared = next((tmp_path / "out" / "rgb").rglob("*.png"))
    ours = make_own(saved(still), "still.png", 96)
    assert ours.found == "dlib" and np.array_equal(ours.face, cv2.imread(str(prepared))[..., ::-1])


def test_fallback_along_the_face_detectors(astronaut, monkeypatch):
    assert find_face(astronaut)[1:] == ("dlib", 1)
    own_images.opened_face_detector.cache_clear()

    def missing(*names):
        def face_detector(name, model=None):
            if name in names:
                raise ImportError(f"no {name}")
            return real(name, model)
        monkeypatch.setattr(own_images, "face_detector", face_detector)

    real = own_images.face_detector
    try:
        missing("dlib")
        assert find_face(astronaut)[1] == "mtcnn"
        own_images.opened_face_detector.cache_clear()
        missing("dlib", "mtcnn")
        face, found, _ = find_face(astronaut)
        assert found == "cascade" and np.linalg.norm(face.centre - np.array([222, 115])) < 40
        own_images.opened_face_detector.cache_clear()
        missing("dlib", "mtcnn", "cascade")
        with pytest.raises(ImportError, match=r"pip install 'bcos_nb\[faces\]'"):
            find_face(astronaut)
        assert make_own(saved(astronaut), "a.png", 64, whole=True).ready  # nobody is needed for it
    finally:
        own_images.opened_face_detector.cache_clear()


@pytest.mark.parametrize("picture", [landscape(), data.coffee(), data.chelsea()], ids=["landscape", "coffee", "cat"])
def test_no_face_is_offered_whole(picture):
    own = OwnImages(64)
    with pytest.raises(Refused, match="no face was found .by dlib and mtcnn.*use the whole image"):
        own.add("scene.png", saved(picture))
    assert len(own) == 0 and len(own.images) == 1
    with pytest.raises(Refused, match="no image yet"):
        own.frames
    button = own.gallery.children[0].children[-1].children[1].children[1]
    assert button.description == "use the whole image"
    button.value = True
    assert len(own) == 1 and own.frames.images.shape == (1, 3, 64, 64)
    height, width = picture.shape[:2]
    rows = np.flatnonzero(own.images[0].whole.any((1, 2)))
    assert abs(len(rows) - 64 * height / width) < 2  # nothing is cut off, nothing is stretched; a row is touched at each edge


def test_frames_are_what_instruments_take(astronaut, photograph):
    own = OwnImages(96)
    seen = []
    own.observe(lambda change: seen.append(change.new), "version")
    own.add("a.png", photograph), own.add("a.png", photograph), own.add("b.png", photograph, whole=True)
    frames = own.frames
    assert frames.videos == ["a.png", "a.png (2)", "b.png"] == frames.catalog.frame.tolist() and len(frames) == 3
    assert frames.labels.tolist() == [UNKNOWN] * 3 and frames.masks.shape == (3, 1, 96, 96) and not frames.masks.any()
    assert torch.equal(frames.images[0], frames.images[1]) and not torch.equal(frames.images[0], frames.images[2])
    own.gallery.children[0].children[-1].children[1].children[0].value = 1
    assert own.frames.catalog.label.tolist() == [1, UNKNOWN, UNKNOWN]
    own.remove(own.images[1])
    assert own.frames.videos == ["a.png", "b.png"] and seen == [1, 2, 3, 4, 5]


def test_uploads_of_ipywidgets(photograph):
    own = OwnImages(64)
    assert own.add_upload(({"name": "a.png", "content": memoryview(photograph), "size": len(photograph)}, {"name": "b.png", "content": memoryview(b"words")})) != []
    assert own.add_upload({"c.png": {"metadata": {}, "content": photograph}}) == []
    assert [image.name for image in own.images] == ["a.png", "c.png"] and len(own.refusals.children) == 1
    own.refusals.children[0].children[0].click()
    assert own.refusals.children == ()


def test_pieces(photograph):
    own, sent = OwnImages(64), []
    own.drop.send = lambda message, buffers=None: sent.append(message)
    piece = lambda at, part, size=len(photograph): own.drop.hear(None, {"event": "piece", "number": 7, "name": "a.png", "size": size, "at": at}, [memoryview(part)])
    piece(0, photograph[:2000]), piece(2000, photograph[2000:])
    assert sent == [{"do": "go on", "number": 7, "more": True}, {"do": "go on", "number": 7, "more": False}] and len(own) == 1
    own.drop.hear(None, {"event": "too large", "name": "large.png", "size": 30_000_000}, [])
    assert "large.png has 30.0 MB" in own.refusals.children[-1].children[1].value
    own.drop.limit = 1000  # who lies about the size is stopped all the same
    piece(0, photograph[:1500], 10)
    assert sent[-1]["more"] is False and own.drop.pieces == {} and len(own) == 1


def test_names_are_shown_as_text(photograph):
    own = OwnImages(64)
    own.take("<img src=x onerror=alert(1)>.png", photograph)
    own.take("<b>.png", b"text")
    assert "&lt;img src=x" in own.gallery.children[0].children[-1].children[0].value and "<img" not in own.gallery.children[0].children[-1].children[0].value
    assert "&lt;b&gt;" in own.refusals.children[0].children[1].value


def test_a_folder(photograph, tmp_path):
    (tmp_path / "a.png").write_bytes(photograph), (tmp_path / "b.txt").write_bytes(b"notes"), (tmp_path / ".hidden").write_bytes(b""), (tmp_path / "sub").mkdir()
    with open(tmp_path / "c.png", "wb") as file:
        file.truncate(30_000_000)
    own = OwnImages(64)
    reasons = own.add_folder(f" '{tmp_path}' ")
    assert len(own) == 1 and len(reasons) == 2 and reasons[0].startswith("b.txt is not an image") and reasons[1].startswith("c.png has 30.0 MB")
    own.path.value = str(tmp_path / "nowhere")
    own.read.click()
    assert "is not a folder" in own.refusals.children[-1].children[1].value
    with pytest.raises(Refused, match="has no files"):
        own.add_folder(tmp_path / "sub")


@pytest.fixture(scope="module")
def detectors():
    torch.manual_seed(0)
    return {"ordinary": create_detector("resnet10", width=0.25).eval(), "B = 2": create_detector("resnet10", b=2, width=0.25).eval()}


def test_explorer(photograph, detectors):
    explorer = OwnImagesExplorer(detectors, ["bcos", "gradcam"], size=64)
    assert "will be here" in explorer.canvas.content["panels"][0]["words"]
    explorer.own.take("a.png", photograph)
    content = explorer.canvas.content
    assert content["columns"] == ["the frame", "B-cos", "Grad-CAM"] and ["ordinary network" in panel["words"] for panel in content["panels"]] == [False, True, False, False, False]
    image = explorer.own.frames.images.float() / 255
    expected = explain(detectors["B = 2"], image, "bcos")
    assert content["panels"][3]["attribution"] == stored_attribution(expected.maps[0]).tobytes()
    assert f"p(fake) {expected.logits.softmax(1)[0, 1]:.3f}" in content["rows"][1]
    explorer.own.take("b.png", photograph)
    assert "b.png" in explorer.chooser.position.value
    explorer.own.remove(explorer.own.images[1])
    assert "a.png" in explorer.chooser.position.value
    explorer.own.remove(explorer.own.images[0])
    assert "will be here" in explorer.canvas.content["panels"][0]["words"] and explorer.own.cards == {}
    shared = OwnImages(64)
    assert OwnImagesExplorer(detectors, own=shared).own is shared  # though it is empty
    with pytest.raises(ValueError, match="no detector"):
        OwnImagesExplorer({})


def test_nothing_is_explained_again_where_an_image_is_labelled_comes_or_goes(photograph, detectors):
    explorer = OwnImagesExplorer(detectors, ["bcos", "gradcam"], size=64, ahead=0)
    own, cache = explorer.own, explorer.cache
    own.take("a.png", photograph)
    each = cache.computed
    assert each == 3  # B-cos for one of the two detectors
    card = own.gallery.children[0]
    label = card.children[-1].children[1].children[0]
    label.value = 1
    assert "own image, fake" in explorer.chooser.position.value and any("right" in words or "wrong" in words for words in explorer.canvas.content["rows"])
    assert cache.computed == each and own.gallery.children[0] is card  # the menu that was just used stays, with its focus
    own.take("b.png", photograph)
    assert cache.computed == 2 * each
    explorer.chooser.step(1)
    own.remove(own.images[1])
    assert cache.computed == 2 * each and "a.png" in explorer.chooser.position.value
    own.change(own.images[0], use_whole=True)
    assert cache.computed == 3 * each
    own.change(own.images[0], use_whole=False)
    assert cache.computed == 3 * each
    image = own.frames.images.float() / 255
    assert explorer.canvas.content["panels"][3]["attribution"] == stored_attribution(explain(detectors["B = 2"], image, "bcos").maps[0]).tobytes()


def test_what_is_seen_of_an_own_image_is_saved_and_restored(photograph, detectors, tmp_path):
    explorer = OwnImagesExplorer(detectors, ["bcos", "gradcam"], size=64, folder=tmp_path)
    explorer.saving.buttons["settings"].click()
    assert "no image yet" in explorer.saving.said.value and explorer.saving.written == []
    explorer.own.take("a.png", photograph), explorer.own.take("b.png", photograph)
    explorer.own.change(explorer.own.images[1], label=0, use_whole=True)
    explorer.threshold.value, explorer.canvas.brush = 0.3, [4, 5, 40, 50]
    for label in ("HTML", "CSV", "settings"):
        explorer.saving.buttons[label].click()
    page, table, settings = explorer.saving.written
    assert table.name.startswith("own_images-") and "An image of one" in page.read_text() and "b.png, own image, real" in page.read_text()
    table = pd.read_csv(table).set_index(["detector", "explainer"])
    expected = explain(detectors["B = 2"], explorer.own.frames.images[[1]].float() / 255, "gradcam")
    assert table.loc[("B = 2", "gradcam"), "logit_fake"] == pytest.approx(expected.logits[0, 1].item(), abs=1e-5)
    assert table.loc[("B = 2", "gradcam"), "kept"] == pytest.approx((expected.maps[0] >= np.float32(0.3)).float().mean().item(), abs=1e-6)
    other = OwnImagesExplorer(detectors, ["bcos", "gradcam"], size=64)
    with pytest.raises(ValueError, match="b.png, which isn't here: give it in the box above"):
        other.saving.restore_from(settings.read_bytes())
    other.own.take("b.png", photograph), other.own.take("a.png", photograph)
    other.saving.restore_from(settings.read_bytes())
    assert other.chooser.settings()["frame"] == "b.png" and other.threshold.value == 0.3 and other.canvas.brush == [4, 5, 40, 50]
    assert {image.name: (image.label, image.use_whole) for image in other.own.images} == {"a.png": (UNKNOWN, False), "b.png": (0, True)}
    assert other.canvas.content["panels"][3]["attribution"] == explorer.canvas.content["panels"][3]["attribution"]
