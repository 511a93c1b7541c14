"""Loading frames: broken files, geometry, LMDB, and packed frames."""
import argparse
import errno
import io
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from PIL import ImageCms
from PIL.PngImagePlugin import PngInfo
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from typer.testing import CliRunner

from bcos_nb.cli import app
from bcos_nb.data import FrameDataset, Frames, PackedFrames, forge_dataset, load_frames, open_frames, pack_frames, read_batches, read_catalog
from bcos_nb.data import cache as cache_module
from bcos_nb.data.catalog import opened_lmdb
from bcos_nb.data.frames import Unreadable, as_float, decoded
from bcos_nb.detection import score_frames
from bcos_nb.games.grid import frame_batch
from bcos_nb.models import create_detector
from bcos_nb.training import FitConfig, fit, predict_logits
from bcos_nb.training.loop import batches, epoch_order, pair_up

SIDE = 32


def write_dataset(root, videos=4, frames=8, side=SIDE, seed=0):
    """Real videos and a fake of each with masks, noise on a ramp, written by Pillow; and their catalogue."""
    generator, rows = np.random.default_rng(seed), []
    ramp = np.linspace(0, 200, side)[None, :, None]
    for label in (0, 1):
        for video in range(videos):
            folder = f"rgb/{'fake' if label else 'real'}/frames/{video:03}"
            (root / folder).mkdir(parents=True)
            (root / folder.replace("frames", "masks")).mkdir(parents=True)
            for number in range(frames):
                frame, mask = f"{folder}/{number:03}.png", None
                PIL.Image.fromarray((ramp + generator.integers(0, 55, (side, side, 3))).astype(np.uint8)).save(root / frame)
                if label:
                    mask = frame.replace("frames", "masks")
                    inside = np.zeros((side, side), np.uint8)
                    inside[4 : side // 2, side // 4 : side // 2 + video] = 255
                    PIL.Image.fromarray(inside).save(root / mask)
                source = frame.replace("fake", "real") if label else None
                rows.append((frame, mask, f"{'Deepfakes' if label else 'real'}/{video:03}", label, "Deepfakes" if label else "real", source))
    catalog = pd.DataFrame(rows, columns=["frame", "mask", "video", "label", "method", "source_frame"])
    catalog.attrs.update(root=str(root), dataset="FaceForensics++", split="train", compression="c23")
    return catalog


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("frames"))


@pytest.fixture
def catalog(tmp_path):
    return write_dataset(tmp_path / "data")


def repeated(catalog, count):
    """A catalogue of `count` rows in the same files, the first ones once more under names of their own."""
    root, rows = Path(catalog.attrs["root"]), []
    for k in range(count):
        row = catalog.iloc[k % len(catalog)].to_dict()
        if k >= len(catalog):
            name = row["frame"].replace(".png", f"-{k}.png")
            os.link(root / row["frame"], root / name)
            row["frame"] = name
        rows.append(row)
    out = pd.DataFrame(rows)
    out.attrs = dict(catalog.attrs)
    return out


def spoil(catalog, row, how="cut", column="frame"):
    """Break a file; a link of its own first, so that other rows stay whole."""
    path = Path(catalog.attrs["root"]) / catalog[column][row]
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "last byte": content[:-20], "wrong byte": content[:-200] + bytes(9) + content[-191:], "text": b"404 not found"}[how])
    return path


def in_order(catalog, size=16):
    return list(torch.arange(len(catalog)).split(size))


def tiny():
    torch.manual_seed(0)
    return create_detector("resnet10", b=2.0, width=0.25, stem="fine")


# ---- pictures of every kind

def interlaced_png(picture):
    """A PNG in Adam7 order, by hand: no library at hand writes one."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = b"".join(b"\0" + line.tobytes() for x, y, across, down in passes for line in picture[y::down, x::across] if line.size)
    return png_of(picture.shape, lines, interlaced=1)


def png_of(shape, lines, interlaced=0, packed=None):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", shape[1], shape[0], 8, 2, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed or zlib.compress(lines)) + chunk(b"IEND", b"")


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def of_every_kind(side):
    generator = np.random.default_rng(side)
    picture = generator.integers(0, 256, (side, side + 5, 3), np.uint8)
    image, alpha = PIL.Image.fromarray(picture), PIL.Image.fromarray(generator.integers(0, 256, picture.shape[:2], np.uint8))
    grey, clear = image.convert("L"), image.copy()
    clear.putalpha(alpha)
    return {
        "RGB": encoded(image), "grey": encoded(grey), "alpha": encoded(clear), "grey and alpha": encoded(clear.convert("LA")), "palette": encoded(image.quantize(20)),
        "one bit": encoded(grey.convert("1")), "transparent colour": encoded(image, transparency=(1, 2, 3)), "transparent grey": encoded(grey, transparency=5),
        "with text": encoded(image, pnginfo=described()), "gamma": encoded(image, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        "interlaced": interlaced_png(picture), "OpenCV's": cv2.imencode(".png", picture[..., ::-1])[1].tobytes(), "JPEG": encoded(image, format="JPEG"),
        "16 bits": cv2.imencode(".png", picture[..., 0].astype(np.uint16) * 257)[1].tobytes(),
    }


def described():
    information = PngInfo()
    information.add_text("camera", "none")
    return information


@pytest.mark.parametrize("side", [1, 3, 32, 61])
@pytest.mark.parametrize("grey", [False, True])
def test_every_kind_of_picture_is_as_torchvision_decodes_it(side, grey):
    for kind, content in of_every_kind(side).items():
        expected = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.GRAY if grey else ImageReadMode.RGB)
        if kind == "16 bits":
            with pytest.raises(RuntimeError, match="8 bits were expected"):
                decoded(np.frombuffer(bytearray(content), np.uint8), grey)
        else:
            assert torch.equal(decoded(np.frombuffer(bytearray(content), np.uint8), grey), expected), kind


@pytest.mark.parametrize("kind", ["RGB", "palette", "interlaced", "alpha", "OpenCV's"])
def test_a_png_with_wrong_bytes_is_an_error_and_no_crash(kind):
    """libpng as torchvision has it ends the process with a segmentation fault; were it asked, there would be no more tests."""
    content, generator = of_every_kind(32)[kind], np.random.default_rng(1)
    for turn in range(300):
        spoilt, place = bytearray(content), int(generator.integers(8, len(content) - 12))
        if turn % 3 == 0:
            spoilt[place] ^= 1 << int(generator.integers(8))
        elif turn % 3 == 1:
            spoilt[place : place + 64] = generator.bytes(64)
        else:
            del spoilt[place:]
        with pytest.raises(RuntimeError, match="not what was written|ends before its last chunk"):
            decoded(np.frombuffer(spoilt, np.uint8), False)
    lines = generator.integers(0, 5, (8, 25), np.uint8).tobytes()
    unfit = zlib.compress(lines)[:-4] + bytes(4)  # another checksum inside a chunk that is whole
    for wrong in (png_of((8, 8), lines, packed=unfit), b"", content[:8]):
        with pytest.raises((RuntimeError, ValueError)):
            decoded(np.frombuffer(bytearray(wrong), np.uint8), False)


# ---- frames that cannot be read

@pytest.mark.parametrize("workers", [0, 2])
def test_broken_frames_of_a_training_are_skipped_counted_and_named_once(catalog, caplog, workers):
    catalog = repeated(catalog, 300)
    broken = {17: "cut", 120: "missing", 299: "empty"}
    paths = {row: spoil(catalog, row, how) for row, how in broken.items()}
    dataset, whole = FrameDataset(catalog, SIDE), load_frames(catalog.drop(index=list(broken)), SIDE, with_mask=False)
    for _ in range(2):
        found = list(read_batches(dataset, in_order(catalog), skip_unreadable=True, workers=workers))
        assert torch.cat([batch["index"] for batch in found]).tolist() == [row for row in range(300) if row not in broken]
        assert torch.equal(torch.cat([batch["image"] for batch in found]), whole.images)
        assert torch.equal(torch.cat([batch["label"] for batch in found]), whole.labels)
    assert sorted(dataset.unreadable) == sorted(broken) and len(dataset.unreadable) == 3
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(named) == 3 and all(sum(str(path) in message for message in named) == 1 for path in paths.values())


@pytest.mark.parametrize("how", ["cut", "empty", "wrong byte", "last byte", "text", "missing"])
def test_whatever_is_broken_is_found(catalog, how):
    path = spoil(catalog, 3, how)
    with pytest.raises((ValueError, FileNotFoundError), match=path.name):
        FrameDataset(catalog, SIDE)[3]
    assert FrameDataset(catalog, SIDE)[2]["index"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_above_one_percent_the_run_stops(catalog, workers):
    catalog = repeated(catalog, 300)
    rows = [5, 70, 130, 250]
    for row in rows:
        spoil(catalog, row)
    dataset, seen = FrameDataset(catalog, SIDE), []
    with pytest.raises(RuntimeError) as error:
        for batch in read_batches(dataset, in_order(catalog), skip_unreadable=True, workers=workers):
            seen += batch["index"].tolist()
    assert max(seen) == 239  # the batch with the fourth of 300 is the last that was asked for
    for part in ("4 of the 256 frames", "1%", catalog["frame"][5], f"bcos-nb data check {catalog.attrs['root']}"):
        assert part in str(error.value)


def test_the_limit_counts_what_was_tried_but_not_before_it_says_something(caplog):
    def breaks_at(total, rows):
        found = Unreadable([f"{row}.png" for row in range(total)], Path("data"))
        for row in range(total):
            try:
                found.note(torch.tensor([row]), {row: ValueError(f"{row}")} if row in rows else {})
            except RuntimeError:
                return row
        return None

    assert breaks_at(20, {0}) is None  # one broken frame stops nothing
    assert breaks_at(20, {0, 19}) == 19
    assert breaks_at(5000, set(range(10))) is None  # ten of the first ten: 0.2 % of 5000, and 1 % of the thousand that it takes
    assert breaks_at(5000, set(range(11))) == 10
    assert breaks_at(3000, set(range(99, 3000, 100))) is None  # one in a hundred is not above
    assert breaks_at(3000, set(range(94, 3000, 95))) == 1044  # one in 95 is: the 11th, of 1045
    twice = Unreadable(["a", "b"], Path("data"))
    for _ in range(3):
        twice.note(torch.tensor([0]), {0: ValueError("a")})
    assert len(twice) == 1


def test_in_evaluation_a_broken_frame_is_an_error(catalog):
    path = spoil(catalog, 9)
    dataset = FrameDataset(catalog, SIDE, with_mask=True)
    detector = tiny()
    for work in (lambda: dataset[9], lambda: list(read_batches(dataset, in_order(catalog))), lambda: list(read_batches(dataset, in_order(catalog), workers=1)),
                 lambda: load_frames(catalog, SIDE), lambda: predict_logits(detector, dataset), lambda: score_frames(detector, dataset),
                 lambda: frame_batch(dataset, torch.arange(12), with_mask=True), lambda: pack_frames(catalog, SIDE, progress=False)):
        with pytest.raises(ValueError) as error:
            work()
        assert str(error.value).startswith(f"The frame {path} cannot be decoded")
    assert not dataset.unreadable


def test_asked_to_skip_evaluation_says_what_is_missing(catalog, caplog):
    spoil(catalog, 9)
    detector, whole = tiny(), load_frames(catalog.drop(index=9), SIDE, with_mask=False)
    logits = predict_logits(detector, FrameDataset(catalog, SIDE), batch_size=7, skip_unreadable=True)
    assert logits.shape == (len(catalog), 2) and logits.isnan().any(1).nonzero().flatten().tolist() == [9]
    assert torch.allclose(torch.cat([logits[:9], logits[10:]]), predict_logits(detector, whole), atol=1e-5)
    loaded = load_frames(catalog, SIDE, skip_unreadable=True)
    assert torch.equal(loaded.images, whole.images) and loaded.catalog["frame"].tolist() == catalog["frame"].drop(index=9).tolist()
    assert loaded.catalog.attrs["unreadable"] == [catalog["frame"][9]] and loaded.catalog.attrs["root"] == catalog.attrs["root"]
    spoil(catalog, 10)
    with pytest.raises(RuntimeError, match="bcos-nb data check"):
        load_frames(catalog, SIDE, skip_unreadable=True)


@pytest.mark.parametrize("column", ["frame", "mask"])
@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_pair_both_are_left_out(catalog, workers, column):
    config = FitConfig(batch_size=8, balance="pairs", flip=False)
    pairs = pair_up(catalog)
    fake, real = pairs[5].tolist()
    spoil(catalog, fake if column == "mask" else real, column=column)
    dataset = FrameDataset(catalog, SIDE, with_mask=column == "mask")
    order = epoch_order(dataset, 0, config)
    seen, partner = [], dict(pairs.tolist())
    for batch in read_batches(dataset, order, skip_unreadable=True, parts=2, workers=workers):
        fakes, reals = batch["index"].chunk(2)
        assert [partner[row] for row in fakes.tolist()] == reals.tolist() and batch["label"].tolist() == [1] * len(fakes) + [0] * len(reals)
        seen += fakes.tolist()
    assert sorted(seen) == sorted(set(pairs[:, 0].tolist()) - {fake})


def test_training_goes_on_without_a_broken_frame_however_many_read(catalog, tmp_path, capsys):
    val = catalog.iloc[::2].reset_index(drop=True)
    train = catalog.copy()
    spoil(catalog, 3), spoil(catalog, 4)  # rows of train; the second is one of val too
    train = train.drop(index=4).reset_index(drop=True)
    config = dict(epochs=2, batch_size=8, crop=24, eval_batch_size=6)
    histories, weights = [], []
    for workers in (0, 2):
        detector = tiny()
        data = FrameDataset(train, SIDE), FrameDataset(val, SIDE)
        histories.append(fit(detector, *data, FitConfig(num_workers=workers, **config), tmp_path / str(workers), progress=True))
        weights.append((tmp_path / str(workers) / "detector.safetensors").read_bytes())
        assert list(data[0].unreadable) == [3] and list(data[1].unreadable) == [2]
    assert weights[0] == weights[1] and histories[0].drop(columns="seconds").equals(histories[1].drop(columns="seconds"))
    assert histories[0].drop(columns="seconds").notna().all().all() and "2 unreadable frames left out" in "".join(capsys.readouterr())


def test_guidance_and_localization_do_without_a_broken_frame(catalog, tmp_path):
    fake = int((catalog["label"] == 1).to_numpy().nonzero()[0][0])
    spoil(catalog, fake)
    data = [FrameDataset(catalog, SIDE, with_mask=True) for _ in range(2)]
    history = fit(tiny(), *data, FitConfig(epochs=1, batch_size=8, guidance=0.5, select="localization"), tmp_path, progress=False)
    assert history.drop(columns="seconds").notna().all().all() and [list(some.unreadable) for some in data] == [[fake], [fake]]


def test_a_batch_of_which_nothing_is_left_is_passed_over(catalog, tmp_path):
    spoil(catalog, 0)
    data = FrameDataset(catalog, SIDE)
    history = fit(tiny(), data, FrameDataset(catalog.drop(index=0), SIDE), FitConfig(epochs=1, batch_size=1, flip=False), tmp_path, progress=False)
    assert np.isfinite(history["train_loss"][0]) and list(data.unreadable) == [0]


def test_an_error_of_the_augmentation_is_no_broken_frame(whole):
    def wrong(image, mask):
        raise ValueError("not a frame's fault")

    dataset = FrameDataset(whole, SIDE, augment=wrong)
    with pytest.raises(ValueError, match="not a frame's fault"):
        list(read_batches(dataset, in_order(whole), skip_unreadable=True))
    assert not dataset.unreadable


# ---- paths

@pytest.mark.parametrize("path", ["../outside.png", "rgb/../../outside.png", "/etc/hostname", "C:\\frames\\0.png", "..\\outside.png", "\\\\host\\0.png", ".."])
@pytest.mark.parametrize("column", ["frame", "mask"])
def test_paths_that_leave_the_root_are_refused(whole, path, column):
    edited = whole.copy()
    edited.loc[7, column] = path
    for use in (lambda: FrameDataset(edited, SIDE), lambda: load_frames(edited, SIDE), lambda: pack_frames(edited, SIDE)):
        with pytest.raises(ValueError, match="Row 7.*refused"):
            use()


def test_two_dots_in_a_name_are_no_way_out(whole):
    edited = whole.copy()
    edited.loc[0, "frame"] = "rgb/a..b/..0.png"
    with pytest.raises(FileNotFoundError):
        FrameDataset(edited, SIDE)[0]


# ---- geometry

@pytest.mark.parametrize("size", [20, 32, 45])
def test_images_and_masks_are_resized_as_pillow_does(whole, size):
    dataset = FrameDataset(whole, size, with_mask=True)
    for row in (0, 40, 63):
        item = dataset[row]
        image = np.asarray(PIL.Image.open(dataset.root / whole["frame"][row]).resize((size, size), PIL.Image.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(item["image"].numpy() * 255 - image).max() <= 1.01
        if whole["label"][row]:
            mask = np.asarray(PIL.Image.open(dataset.root / whole["mask"][row]).resize((size, size), PIL.Image.BILINEAR))
            assert np.abs(item["mask"][0].numpy() * 255 - mask).max() <= 1.01
        else:
            assert item["mask"].shape == (1, size, size) and not item["mask"].any()


@pytest.mark.parametrize("scale", [1, 2])
def test_masks_follow_images_through_augmentation(tmp_path, scale):
    """The image shows the mask, so after the same geometry it still does; also where the mask file is larger."""
    catalog = write_dataset(tmp_path, videos=1, frames=2, side=64)
    row = 3
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    PIL.Image.fromarray(np.stack([smooth] * 3, -1)).save(tmp_path / catalog["frame"][row])
    PIL.Image.fromarray(smooth).resize((64 * scale, 64 * scale), PIL.Image.BILINEAR).save(tmp_path / catalog["mask"][row])
    geometry = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomResizedCrop(40, scale=(0.5, 0.6), antialias=True)])
    dataset = FrameDataset(catalog, 40, augment=geometry, with_mask=True)
    torch.manual_seed(0)
    item = dataset[row]
    assert item["image"].shape == (3, 40, 40) and (item["image"][0] - item["mask"][0]).abs().max() <= 2.01 / 255
    plain = FrameDataset(catalog, 40, with_mask=True)[row]
    assert (item["image"] - plain["image"]).abs().mean() > 0.05
    torch.manual_seed(0)
    batch = next(read_batches(dataset, [torch.tensor([row])]))
    assert batch["image"].dtype == torch.float32 and torch.equal(batch["mask"][0] > 0.5, item["mask"] > 0.5)


def test_batches_are_bytes_and_the_items_of_the_dataset(whole):
    dataset, order = FrameDataset(whole, 20, with_mask=True), list(torch.randperm(64, generator=torch.Generator().manual_seed(1)).split(10))
    for batch, rows, (images, labels) in zip(read_batches(dataset, order), order, batches(dataset, order, "cpu")):
        assert batch["image"].dtype == batch["mask"].dtype == torch.uint8 and torch.equal(batch["index"], rows)
        for place, row in enumerate(rows.tolist()):
            item = dataset[row]
            assert torch.equal(as_float(batch["image"][place]), item["image"]) and torch.equal(as_float(batch["mask"][place]), item["mask"])
            assert torch.equal(images[place], item["image"]) and labels[place] == item["label"] == batch["label"][place]


# ---- LMDB

def as_lmdb(catalog, folder="lmdb/FaceForensics++_lmdb"):
    """The same frames and masks under keys of their own in an LMDB; its catalogue."""
    root, out = Path(catalog.attrs["root"]), catalog.copy()
    for column in ("frame", "mask"):
        out[column] = [path.removeprefix("rgb/") if isinstance(path, str) else None for path in catalog[column]]
    out.attrs = dict(catalog.attrs, lmdb=folder)
    (root / folder).mkdir(parents=True)
    with lmdb.open(str(root / folder), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for column in ("frame", "mask"):
            for path, key in zip(catalog[column], out[column]):
                if isinstance(path, str):
                    transaction.put(key.encode(), (root / path).read_bytes())
    return out


def test_an_lmdb_is_read_as_the_folder_is(catalog):
    stored = as_lmdb(catalog)
    folder, frames = load_frames(catalog, 20), load_frames(stored, 20)
    shutil.rmtree(Path(catalog.attrs["root"]) / "rgb")
    assert torch.equal(folder.images, frames.images) and torch.equal(folder.masks, frames.masks)
    dataset = FrameDataset(stored, 20, with_mask=True)
    assert torch.equal(dataset[40]["image"], as_float(folder.images[40])) and torch.equal(dataset[40]["mask"], as_float(folder.masks[40]))
    for workers in (0, 2):
        with dataset.opened():  # held open by this process, whose children must open their own
            found = list(read_batches(dataset, in_order(stored), workers=workers))
        assert torch.equal(torch.cat([batch["image"] for batch in found]), folder.images)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3]["image"], dataset[3]["image"])
    packed = pack_frames(stored, 20, with_mask=True, progress=False)
    assert torch.equal(packed.images, folder.images) and torch.equal(packed.masks, folder.masks)
    lmdb.open(str(dataset.lmdb)).close()  # nobody keeps it open between readings


def test_what_an_lmdb_lacks_is_named(catalog):
    stored = as_lmdb(catalog)
    place = Path(catalog.attrs["root"]) / stored.attrs["lmdb"]
    with lmdb.open(str(place), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        transaction.delete(stored["frame"][2].encode())
        transaction.put(stored["frame"][3].encode(), transaction.get(stored["frame"][3].encode())[:300])
        transaction.put(stored["frame"][4].encode(), b"")
    dataset = FrameDataset(stored, SIDE)
    for row, kind, part in ((2, FileNotFoundError, "is not in the LMDB"), (3, ValueError, "truncated"), (4, ValueError, "0 bytes")):
        with pytest.raises(kind, match=part) as error:
            dataset[row]
        assert stored["frame"][row] in str(error.value)
    with pytest.raises(FileNotFoundError, match="is not there"):
        FrameDataset(stored.pipe(lambda table: table.__finalize__(table)), SIDE, root=place.parent)[0]
    outside = stored.copy()
    outside.attrs = dict(stored.attrs, lmdb="../lmdb")
    with pytest.raises(ValueError, match="refused"):
        FrameDataset(outside, SIDE)


def test_without_the_package_the_error_says_what_to_install(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="pip install"), opened_lmdb("somewhere"):
        pass


# ---- packed frames

@pytest.mark.parametrize("size, with_mask", [(32, True), (20, True), (45, False)])
def test_packed_frames_are_the_loaded_ones_bit_for_bit(whole, tmp_path, size, with_mask, monkeypatch):
    monkeypatch.setattr(cache_module, "PIECE", 20_000)  # several pieces
    packed, loaded = pack_frames(whole, size, with_mask=with_mask, folder=tmp_path, progress=False, workers=3), load_frames(whole, size, with_mask=with_mask)
    assert torch.equal(packed.images, loaded.images) and torch.equal(packed.labels, loaded.labels) and packed.videos == loaded.videos
    assert torch.equal(packed.masks, loaded.masks) if with_mask else packed.masks is None
    assert packed.catalog.equals(loaded.catalog) and packed.catalog.attrs == whole.attrs and isinstance(packed, Frames)
    rows = torch.tensor([5, 60, 33])
    assert torch.equal(packed[rows].images, loaded[rows].images) and torch.equal(packed.batch(rows)["image"], loaded.batch(rows)["image"])
    assert torch.equal(frame_batch(packed, rows)[0], frame_batch(FrameDataset(whole, size), rows)[0])
    copy = pickle.loads(pickle.dumps(packed))
    assert len(pickle.dumps(packed)) < 20_000 and isinstance(copy, PackedFrames) and torch.equal(copy.images, loaded.images)
    assert type(packed.to("cpu")) is Frames and packed.damaged() == []


def test_training_and_scoring_are_the_same_in_every_form(whole, tmp_path):
    config, weights, history = FitConfig(epochs=1, batch_size=16, crop=24), {}, {}
    for how in ("memory", "packed", "files"):
        frames, detector = open_frames(whole, SIDE, how=how, folder=tmp_path / "packed frames"), tiny()
        history[how] = fit(detector, frames, frames, config, tmp_path / how, progress=False).drop(columns="seconds")
        weights[how] = (tmp_path / how / "detector.safetensors").read_bytes(), predict_logits(detector, frames).numpy().tobytes()
    assert weights["memory"] == weights["packed"] == weights["files"]
    assert history["memory"].equals(history["packed"]) and history["memory"].equals(history["files"])


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_form_follows_from_what_is_free(catalog, tmp_path, monkeypatch, caplog, with_mask):
    needed = len(catalog) * (3 + with_mask) * SIDE**2
    memory, disk = 4 * needed, 2 * needed
    monkeypatch.setattr(cache_module, "free_memory", lambda: memory)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, disk))

    def form(**options):
        return type(open_frames(catalog, SIDE, with_mask=with_mask, folder=tmp_path / "there" / "packed", **options))

    assert form() is Frames and not (tmp_path / "there").exists()
    memory, disk = memory - 4, disk - 2
    assert form() is FrameDataset and not (tmp_path / "there").exists() and "decoded anew" in caplog.text and "how=\"packed\"" in caplog.text
    assert form(how="memory") is Frames and form(how="files") is FrameDataset
    disk += 2
    assert form() is PackedFrames
    memory, disk = 1 << 40, 0
    assert form() is PackedFrames  # is there already
    with pytest.raises(ValueError, match="how='disk': expected one of auto, memory, packed, files"):
        form(how="disk")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")], ids=["not allowed", "read-only"])
def test_a_disk_that_cannot_be_written_is_no_obstacle_unless_asked_for(catalog, tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(cache_module, "free_memory", lambda: 0)
    real = Path.mkdir

    def refuse(path, *arguments, **options):
        if path == tmp_path / "packed":
            raise type(error)(*error.args, str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert type(open_frames(catalog, SIDE, folder=tmp_path / "packed")) is FrameDataset and "cannot be written" in caplog.text
    with pytest.raises(type(error), match=f"{error.strerror}.*folder=.*bcos-nb data mend"):
        open_frames(catalog, SIDE, how="packed", folder=tmp_path / "packed")
    monkeypatch.undo()
    spoil(catalog, 3)
    monkeypatch.setattr(cache_module, "free_memory", lambda: 0)
    with pytest.raises(ValueError, match="cannot be decoded"):  # a broken frame is not a full disk
        open_frames(catalog, SIDE, folder=tmp_path / "packed")
    os.unlink(Path(catalog.attrs["root"]) / catalog["frame"][3])
    with pytest.raises(FileNotFoundError, match="is not there"):
        open_frames(catalog, SIDE, folder=tmp_path / "packed")
    assert len(open_frames(catalog, SIDE, folder=tmp_path / "packed", skip_unreadable=True)) == len(catalog) - 1


@pytest.mark.parametrize("limits, free", [
    ({"": "max", "job": "5000", "job/step": "max"}, 4300), ({"": "9000", "job": "max", "job/step": "2000"}, 1300), ({"": "max", "job": "max", "job/step": "max"}, 10_000), (None, 10_000)])
def test_memory_that_a_control_group_grants(tmp_path, monkeypatch, limits, free):
    """Of nested groups the tightest counts; pages of files that it holds are as good as free."""
    group = tmp_path / "cgroup"
    for name, limit in (limits or {}).items():
        (group / name).mkdir(parents=True, exist_ok=True)
        for file, content in (("max", limit), ("current", "1000"), ("stat", "anon 600\ninactive_file 300")):
            (group / name / f"memory.{file}").write_text(content + "\n")
    own = tmp_path / "own"
    own.write_text("1:name=systemd:/x\n0::/job/step\n") if limits else None
    monkeypatch.setattr(cache_module, "Path", lambda place: {"/sys/fs/cgroup": group, "/proc/self/cgroup": own}[place])
    monkeypatch.setattr(cache_module.psutil, "virtual_memory", lambda: argparse.Namespace(available=10_000))
    assert cache_module.free_memory() == free


def built(packed):
    return (packed.folder / "images.u8").stat().st_ino


def test_packed_once_and_anew_when_stale(catalog):
    first = pack_frames(catalog, SIDE, progress=False)
    place = Path(catalog.attrs["root"]) / ".cache" / "frames"
    assert first.folder.parent == place
    number = built(first)
    assert built(pack_frames(catalog, SIDE, progress=False)) == built(pack_frames(FrameDataset(catalog, 64), SIDE, verify=True, progress=False)) == number
    # other wishes live beside it
    others = [pack_frames(catalog, 20, progress=False), pack_frames(catalog, SIDE, with_mask=True, progress=False), pack_frames(catalog.iloc[:9], SIDE, progress=False)]
    assert len({other.folder for other in others} | {first.folder}) == 4 and built(pack_frames(catalog, SIDE, progress=False)) == number
    # another file, another time or size: made anew, and the old one is gone
    path = Path(catalog.attrs["root"]) / catalog["frame"][12]
    PIL.Image.new("RGB", (SIDE, SIDE), (9, 8, 7)).save(path)
    second = pack_frames(catalog, SIDE, progress=False)
    assert second.folder != first.folder and not first.folder.exists() and second.images[12, :, 0, 0].tolist() == [9, 8, 7]
    assert torch.equal(first.images[11], second.images[11]) and first.images[12].float().std() > 1  # open ones stay what they were
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    third = pack_frames(catalog, SIDE, progress=False)
    assert third.folder != second.folder and not second.folder.exists() and others[0].folder.exists()
    # another version of the code
    number = built(third)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
        assert built(pack_frames(catalog, SIDE, progress=False)) != number


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_damage_is_found_and_packed_anew(whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "PIECE", 1)  # a piece a row
    loaded = load_frames(whole, SIDE)

    def pack(**options):
        return pack_frames(whole, SIDE, with_mask=True, folder=tmp_path, progress=False, **options)

    packed, row = pack(), 3 * SIDE * SIDE
    flip(packed.folder / "images.u8", 20 * row + 7), flip(packed.folder / "masks.u8", 50 * SIDE * SIDE)
    number = built(packed)
    assert pack().damaged() == [20, 50] and built(pack()) == number  # not among the pieces that opening compares
    assert pack(verify=True).damaged() == [] and built(pack()) != number and torch.equal(pack().images, loaded.images)
    for spoil_it in (lambda place: flip(place / "images.u8", 0), lambda place: os.truncate(place / "images.u8", 5 * row),
                     lambda place: (place / "masks.u8").unlink(), lambda place: (place / "packed.json").write_text("{"),
                     lambda place: (place / "packed.json").write_text("{}"), lambda place: (place / "packed.json").unlink()):
        spoil_it(pack().folder)
        caplog.clear()
        again = pack()
        assert torch.equal(again.images, loaded.images) and torch.equal(again.masks, loaded.masks) and again.damaged() == []
        assert "made anew" in caplog.text


def test_writing_into_packed_frames_changes_no_file(whole, tmp_path):
    packed = pack_frames(whole, SIDE, folder=tmp_path, progress=False)
    packed.images.zero_()
    assert pack_frames(whole, SIDE, folder=tmp_path, verify=True, progress=False).images.float().mean() > 50


def test_skipped_frames_close_up(catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PIECE", 20_000)
    catalog = repeated(catalog, 220)
    rows = [0, 100]
    for row in rows:
        spoil(catalog, row)
    spoil_mask = int(np.flatnonzero(catalog["label"].to_numpy() == 1)[-1])
    with pytest.raises(ValueError, match="cannot be decoded"):
        pack_frames(catalog, SIDE, folder=tmp_path / "p", progress=False)
    assert [path for path in (tmp_path / "p").iterdir() if path.is_dir()] == [] and spoil_mask
    packed, loaded = pack_frames(catalog, SIDE, with_mask=True, folder=tmp_path / "p", skip_unreadable=True, progress=False), load_frames(catalog, SIDE, skip_unreadable=True)
    assert len(packed) == 218 and torch.equal(packed.images, loaded.images) and torch.equal(packed.masks, loaded.masks) and packed.damaged() == []
    assert packed.catalog.equals(loaded.catalog) and packed.catalog.attrs["unreadable"] == [catalog["frame"][row] for row in rows]
    number = built(packed)
    assert built(pack_frames(catalog, SIDE, with_mask=True, folder=tmp_path / "p", skip_unreadable=True, progress=False)) == number
    with pytest.raises(ValueError, match="2 frames could not be read"):
        pack_frames(catalog, SIDE, with_mask=True, folder=tmp_path / "p", progress=False)
    # what is left can be packed itself
    assert len(pack_frames(loaded.catalog, SIDE, folder=tmp_path / "q", progress=False)) == 218
    spoil(catalog, 1)
    with pytest.raises(RuntimeError, match="3 of"):
        pack_frames(catalog, SIDE, folder=tmp_path / "p", skip_unreadable=True, progress=False)


CHILD = """
import sys, time
import pandas as pd
from bcos_nb.data import pack_frames
from bcos_nb.data import frames as module
read = module.read_picture
def slow(*arguments):
    time.sleep(float(sys.argv[4]))
    return read(*arguments)
module.read_picture = slow
catalog = pd.read_parquet(sys.argv[1])
print("begun", flush=True)
packed = pack_frames(catalog, 32, root=sys.argv[2], folder=sys.argv[3], progress=False, workers=1)
print((packed.folder / "images.u8").stat().st_ino, len(packed.damaged()), int(packed.images.long().sum()), flush=True)
"""


def child(catalog, place, folder, pause):
    catalog.to_parquet(place / "catalog.parquet")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])))
    return subprocess.Popen([sys.executable, "-c", CHILD, str(place / "catalog.parquet"), catalog.attrs["root"], str(folder), str(pause)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_build_that_is_killed_leaves_nothing_half_valid(whole, tmp_path):
    folder = tmp_path / "packed"
    process = child(whole, tmp_path, folder, 0.05)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*/images.u8")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(folder.glob(".*/images.u8")) and not list(folder.glob("*/packed.json"))  # it was cut off in the middle
    packed = pack_frames(whole, SIDE, folder=folder, verify=True, progress=False)
    assert torch.equal(packed.images, load_frames(whole, SIDE).images) and packed.damaged() == []
    assert [path for path in folder.iterdir() if path.is_dir()] == [packed.folder]  # what was left is cleared away


def test_of_two_processes_one_packs_and_both_have_it(whole, tmp_path):
    processes = [child(whole, tmp_path, tmp_path / "packed", 0.02) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    lines = [out.strip().splitlines()[-1] for out, _ in answers]
    total = int(load_frames(whole, SIDE).images.long().sum())
    assert lines[0] == lines[1] and lines[0].split()[1:] == ["0", str(total)], answers
    assert len([path for path in (tmp_path / "packed").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("how", ["too little is free", "full when space is taken", "full while writing", "file too large"])
def test_a_full_disk_is_said_and_leaves_nothing(whole, tmp_path, monkeypatch, how):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "too little is free":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    elif how == "full when space is taken":
        monkeypatch.setattr(os, "posix_fallocate", full)
    elif how == "full while writing":
        monkeypatch.setattr(os, "pwrite", full)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        with pytest.raises(OSError, match="no room") as error:
            pack_frames(whole, SIDE, folder=tmp_path / "p", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG) and str(tmp_path / "p") in str(error.value) and "folder=" in str(error.value)
    assert [path for path in (tmp_path / "p").iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    assert pack_frames(whole, SIDE, folder=tmp_path / "p", verify=True, progress=False).damaged() == []


MEASURE = """
import json, re, sys
import pandas as pd, torch
from bcos_nb.data import pack_frames
torch.set_num_threads(1)
catalog = pd.read_parquet(sys.argv[1])
def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def epoch(rows):
    table = pd.concat([catalog] * (rows // len(catalog)), ignore_index=True)
    packed = pack_frames(table, 64, root=sys.argv[2], folder=sys.argv[3], progress=False, workers=2)
    highest = own()
    for indices in torch.randperm(len(packed)).split(32):
        packed.images[indices].float().mean()
        highest = max(highest, own())
    return packed.images.nbytes / 2**20, highest
epoch(512)
print(json.dumps([epoch(512), epoch(6144)]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists() or "RssAnon" not in Path("/proc/self/status").read_text(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_number_of_frames(whole, tmp_path):
    whole.to_parquet(tmp_path / "catalog.parquet")
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "catalog.parquet"), whole.attrs["root"], str(tmp_path / "packed")],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (few_mb, few), (many_mb, many) = json.loads(done.stdout.splitlines()[-1])
    assert many_mb - few_mb > 60 and many - few < 25, (few_mb, few, many_mb, many)


def test_the_command_packs_once_and_says_so(tmp_path):
    """What the command packs is what `open_frames` finds; a mistake is told before anything is packed."""
    root = forge_dataset(tmp_path / "mini", dataset="DFDCP", identities=6, frames_per_video=3, size=48, workers=0, progress=False)
    arguments = ["data", "pack", str(root), "--dataset", "DFDCP", "--size", "32"]
    first, second = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert re.findall(r"(\w+): (packed|current)", first.output) == [(split, "packed") for split in ("train", "val", "test")]
    assert re.findall(r"(\w+): (packed|current): ([\d,]+) frames", second.output) == [("train", "current", "36"), ("val", "current", "18"), ("test", "current", "18")]
    catalog = read_catalog(root, "DFDCP", "train")
    assert isinstance(open_frames(catalog, 32), PackedFrames) and torch.equal(open_frames(catalog, 32).images, load_frames(catalog, 32).images)
    assert isinstance(open_frames(catalog, 48), Frames) and not isinstance(open_frames(catalog, 48), PackedFrames)
    wrong = CliRunner().invoke(app, [*arguments[:-1], "24", "--split", "train", "--split", "tst"])
    assert wrong.exit_code == 1 and "split='tst'" in wrong.output and len(list((root / ".cache/frames").iterdir())) == 3 + 3  # with their locks
    spoiled = Path(root) / catalog["frame"][0]
    spoiled.write_bytes(spoiled.read_bytes()[:50])
    broken = CliRunner().invoke(app, [*arguments, "--split", "train"])
    assert broken.exit_code == 1 and "cannot be decoded" in broken.output and catalog["frame"][0] in broken.output
    skipped = CliRunner().invoke(app, [*arguments, "--split", "train", "--skip-unreadable"])
    assert skipped.exit_code == 0 and "35 frames of 32 px, 1 unreadable ones left out" in skipped.output
