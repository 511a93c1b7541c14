"""The data room: the forged miniature, the catalogue, and loading frames."""
import hashlib
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from bcos_nb.data import METHODS, FrameDataset, forge_dataset, load_frames, read_catalog

TINY = dict(identities=6, frames_per_video=3, size=48, compressions=("raw", "c23"), progress=False)
FACES = "rgb/FaceForensics++"


def contents(root):
    """Every file's hash, by path."""
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".forging.lock" and ".catalog" not in p.parts}


def pixels(path, grey=False):
    return cv2.imread(str(path), cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return forge_dataset(tmp_path_factory.mktemp("data") / "mini", workers=1, **TINY)


@pytest.fixture
def copy(mini, tmp_path):
    return Path(shutil.copytree(mini, tmp_path / "copy"))


def edit(root, change, name="FF-DF"):
    """Rewrite a subset's JSON."""
    path = root / "dataset_json" / f"{name}.json"
    content = json.loads(path.read_text())
    change(content[name])
    path.write_text(json.dumps(content))


def real_video(labels, split="train", compression="c23"):
    return next(iter(labels["FF-real"][split][compression].values()))


# ---- forging

def test_same_seed_same_bytes_whatever_the_workers(mini, tmp_path):
    parallel = contents(forge_dataset(tmp_path / "parallel", workers=2, **TINY))
    assert parallel == contents(mini)
    assert any(path.endswith(".mp4") for path in parallel)


def test_another_seed_is_another_dataset(mini, tmp_path):
    other = forge_dataset(tmp_path / "other", workers=0, seed=1, **{**TINY, "methods": ("FaceSwap",), "compressions": ("c23",)})
    frame = f"{FACES}/original_sequences/youtube/c23/frames/000/000.png"
    assert (other / frame).read_bytes() != (mini / frame).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_uncompressed_fakes_equal_their_source_outside_the_mask_and_differ_inside(mini, method):
    catalog = read_catalog(mini, split="train", compression="raw")
    fakes = catalog[catalog["method"] == method]
    assert len(fakes)
    for row in fakes.itertuples():
        fake, source, mask = pixels(mini / row.frame), pixels(mini / row.source_frame), pixels(mini / row.mask, grey=True)
        assert set(np.unique(mask)) == {0, 255}
        changed = (fake != source).any(-1)
        assert (changed == (mask == 255)).all()
        assert 0.02 < (mask == 255).mean() < 0.35


def test_a_forgery_is_more_than_missing_noise(mini):
    """Smoothed over the scale of sensor noise, fakes still differ from their source by more than that noise would."""
    catalog = read_catalog(mini, split="train", compression="c23")
    for method in METHODS:
        ratios = []
        for row in catalog[catalog["method"] == method].itertuples():
            fake, source = pixels(mini / row.frame).astype(np.float32), pixels(mini / row.source_frame).astype(np.float32)
            mask = pixels(mini / row.mask, grey=True) == 255
            change = cv2.GaussianBlur((fake - source).mean(-1), (0, 0), 1.0)
            outside = cv2.erode((~mask).astype(np.uint8), np.ones((5, 5))) == 1
            ratios.append(change[mask].std() / (change[outside].std() + 0.2))
        assert np.median(ratios) > 2, (method, ratios)


def test_videos_are_real_h264(mini):
    videos = sorted(mini.rglob("*.mp4"))
    assert len(videos) == 6 * 5
    for path in videos[::7]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            frames = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
        stored = path.parents[1] / "frames" / path.stem
        assert len(frames) == 3 and all((pixels(stored / f"{k:03d}.png") == frame).all() for k, frame in enumerate(frames))


def test_layout_is_deepfakebench(mini):
    index = json.loads((mini / "dataset_json" / "FaceForensics++.json").read_text())["FaceForensics++"]
    assert set(index) == {"FF-real", "FF-DF", "FF-F2F", "FF-FS", "FF-NT"}
    for label, splits in index.items():
        for levels in splits.values():
            assert set(levels) == {"raw", "c23"}
            for name, video in levels["c23"].items():
                assert video["label"] == label and ("masks" in video) == (label != "FF-real")
                for frame in video["frames"]:
                    assert (mini / "rgb" / frame).is_file()
                    landmarks = np.load(mini / "rgb" / frame.replace("frames", "landmarks").replace(".png", ".npy"))
                    assert landmarks.shape == (81, 2) and landmarks.dtype.kind == "f" and -20 < landmarks.min() and landmarks.max() < 68
                assert video.get("masks", []) == ([f.replace("/frames/", "/masks/") for f in video["frames"]] if "masks" in video else [])
    subset = json.loads((mini / "dataset_json" / "FF-F2F.json").read_text())["FF-F2F"]
    assert subset == {label: index[label] for label in ("FF-real", "FF-F2F")}


def test_pairs_stay_inside_one_split(mini):
    pairs = {split: json.loads((mini / FACES / f"{split}.json").read_text()) for split in ("train", "val", "test")}
    people = [person for members in pairs.values() for pair in members for person in pair]
    assert sorted(people) == [f"{k:03d}" for k in range(6)]
    for split, members in pairs.items():
        allowed = {f"{a}_{b}" for pair in members for a, b in (pair, pair[::-1])}
        for method in METHODS:
            videos = read_catalog(mini, split=split).query("method == @method")["video"].unique()
            assert {video.split("/")[1] for video in videos} == allowed


def test_a_complete_dataset_is_not_forged_again(mini):
    before = {path: path.stat().st_mtime_ns for path in mini.rglob("*")}
    start = time.perf_counter()
    forge_dataset(mini, **TINY)
    assert time.perf_counter() - start < 0.5
    assert {path: path.stat().st_mtime_ns for path in mini.rglob("*")} == before


def test_an_interrupted_dataset_is_finished_not_taken_for_complete(mini, tmp_path, monkeypatch):
    import bcos_nb.data.forge as forge

    class Stop(Exception):
        pass

    def two_pairs(pairs, *, real=forge.mark_done):
        calls = []

        def mark(root, pair):
            calls.append(pair)
            if len(calls) > pairs:
                raise Stop
            real(root, pair)
        return mark

    root = tmp_path / "half"
    monkeypatch.setattr(forge, "mark_done", two_pairs(1))
    with pytest.raises(Stop):
        forge_dataset(root, workers=0, **TINY)
    monkeypatch.undo()
    assert not (root / "miniature.json").exists()
    with pytest.raises(FileNotFoundError, match="forging has not ended"):
        read_catalog(root)
    with pytest.raises(FileExistsError, match="unfinished miniature of other parameters"):
        forge_dataset(root, workers=0, **{**TINY, "size": 64})
    forge_dataset(root, workers=0, **TINY)
    assert contents(root) == contents(mini)


def test_forging_where_something_else_lies_is_refused(mini, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="thesis.txt.*new or empty folder"):
        forge_dataset(tmp_path, **TINY)
    with pytest.raises(FileExistsError, match="identities: 6 there, 8 asked for"):
        forge_dataset(mini, **{**TINY, "identities": 8})


@pytest.mark.parametrize("wrong", [dict(identities=5), dict(identities=4), dict(size=0), dict(methods=("FaceApp",)), dict(compressions=("c50",)), dict(frames_per_video=0)])
def test_impossible_parameters_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        forge_dataset(tmp_path / "x", **{**TINY, **wrong})
    assert not (tmp_path / "x").exists()


def test_forging_needs_no_torch():
    """Workers start fast because torch is not imported on their way."""
    code = "import sys, bcos_nb.data.forge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- the catalogue

def test_catalogue_of_the_whole(mini):
    catalog = read_catalog(mini, split="train", compression="c23")
    assert list(catalog.columns) == ["frame", "mask", "video", "label", "method", "source_frame"]
    assert len(catalog) == 2 * 5 * 3 and catalog["label"].mean() == 0.8
    assert catalog.attrs["root"] == str(mini) and catalog.attrs["compression"] == "c23"
    fakes = catalog[catalog["label"] == 1]
    for row in fakes.itertuples():
        target = row.video.split("/")[1].split("_")[0]
        assert row.source_frame == f"{FACES}/original_sequences/youtube/c23/frames/{target}/{Path(row.frame).name}"
        assert (mini / row.source_frame).is_file() and (mini / row.mask).is_file()


def test_paths_of_other_machines(copy):
    styles = [lambda p: ".\\datasets\\rgb\\" + p.replace("/", "\\"), lambda p: p.replace("/", "\\"), lambda p: "./" + p,
              lambda p: "/mnt/x/DeepfakeBench/datasets/rgb/" + p, lambda p: "E:\\d\\" + p.replace("/", "\\")]
    expected = read_catalog(copy, "FF-DF", "train")
    for style in styles:
        edit(copy, lambda labels: [video.update(frames=[style(f) for f in video["frames"]]) for splits in labels.values() for video in splits["train"]["c23"].values()])
        assert read_catalog(copy, "FF-DF", "train").equals(expected)
        (copy / "dataset_json" / "FF-DF.json").write_text(json.dumps({"FF-DF": {k: v for k, v in json.loads((copy / "dataset_json" / "FaceForensics++.json").read_text())["FaceForensics++"].items() if k in ("FF-real", "FF-DF")}}))


@pytest.mark.parametrize("path", ["../../etc/passwd", "rgb/../../x.png", "/etc/shadow", "C:\\Windows\\x.png"])
def test_paths_that_leave_the_root_are_refused(copy, path):
    edit(copy, lambda labels: real_video(labels)["frames"].append(path))
    with pytest.raises(ValueError) as caught:
        read_catalog(copy, "FF-DF")
    assert repr(path) in str(caught.value)


def test_frames_below_the_root_itself_and_json_elsewhere(copy):
    expected = read_catalog(copy, "FF-NT")["frame"].str.removeprefix("rgb/").tolist()
    shutil.move(copy / "rgb" / "FaceForensics++", copy / "FaceForensics++")
    shutil.move(copy / "dataset_json", copy.parent / "lists")
    assert read_catalog(copy, "FF-NT", json_dir=copy.parent / "lists")["frame"].tolist() == expected


def test_masks_of_another_compression_serve(copy):
    shutil.rmtree(copy / FACES / "manipulated_sequences/Deepfakes/c23/masks")
    masks = read_catalog(copy, "FF-DF", compression="c23").query("label == 1")["mask"]
    assert masks.str.contains("/raw/masks/").all() and all((copy / mask).is_file() for mask in masks)


def test_frames_are_ordered_by_number_and_sampled_evenly(copy):
    def many(labels):
        video = real_video(labels)
        first = copy / "rgb" / video["frames"][0]
        video["frames"] = [str(Path(video["frames"][0]).with_name(f"{k}.png")) for k in (10, 9, 2, 0, 100, 30, 20, 1)]
        for frame in video["frames"]:
            shutil.copy(first, copy / "rgb" / frame)

    edit(copy, many)
    catalog = read_catalog(copy, "FF-DF", frames_per_video=4).query("label == 0")
    first = catalog["video"].iloc[0]
    assert [Path(f).stem for f in catalog[catalog["video"] == first]["frame"]] == ["0", "2", "10", "30"]


def test_other_datasets_have_no_compression_level(copy):
    index = json.loads((copy / "dataset_json" / "FF-DF.json").read_text())["FF-DF"]
    flat = {new: {split: {name: {**video, "label": new} for name, video in index[old][split]["c23"].items()} for split in index[old]} for old, new in (("FF-real", "CelebDFv2_real"), ("FF-DF", "CelebDFv2_fake"))}
    for splits in flat.values():
        splits["val"] = splits["test"]
    (copy / "dataset_json" / "Celeb-DF-v2.json").write_text(json.dumps({"Celeb-DF-v2": flat}))
    catalog = read_catalog(copy, "Celeb-DF-v2", "test")
    assert set(catalog["method"]) == {"real", "Celeb-DF-v2"} and catalog.attrs["compression"] is None
    with pytest.warns(UserWarning, match="selecting on the test set"):
        read_catalog(copy, "Celeb-DF-v2", "val")
    with pytest.raises(ValueError, match="one compression only"):
        read_catalog(copy, "Celeb-DF-v2", "test", "c23")


def test_no_warning_where_validation_is_its_own(mini):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_catalog(mini, split="val")


def test_empty_folder_and_missing_json(mini, tmp_path):
    with pytest.raises(FileNotFoundError, match="is empty.*bcos-nb forge.*DeepfakeBench"):
        read_catalog(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_catalog(tmp_path / "none")
    with pytest.raises(FileNotFoundError) as caught:
        read_catalog(mini, "UADFV")
    assert str(mini / "dataset_json") in str(caught.value) and "FaceForensics++" in str(caught.value)


def test_unknown_label_split_compression(copy):
    with pytest.raises(ValueError, match="train, val, test"):
        read_catalog(copy, split="dev")
    with pytest.raises(ValueError, match="c40.*it has c23, raw"):
        read_catalog(copy, compression="c40")
    edit(copy, lambda labels: labels.update({"FF-Roop": labels["FF-DF"]}))
    with pytest.raises(ValueError, match="'FF-Roop'.*Known labels"):
        read_catalog(copy, "FF-DF")


def test_missing_frames_are_named_and_counted(copy):
    frames = sorted((copy / FACES / "original_sequences/youtube/c23/frames").glob("*/001.png"))
    for frame in frames:
        frame.unlink()
    with pytest.raises(FileNotFoundError, match=r"001\.png.*2 of 12 frames.*Copy them there; or do without: `bcos-nb data mend") as caught:
        read_catalog(copy, "FF-DF", "train", "c23")
    assert "\n" not in str(caught.value)


def test_damaged_json(copy):
    path = copy / "dataset_json" / "FF-DF.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match="cut short"):
        read_catalog(copy, "FF-DF")
    path.write_text('{"other": {}}')
    with pytest.raises(ValueError, match="no entry 'FF-DF'"):
        read_catalog(copy, "FF-DF")


# ---- frames

def test_items(mini):
    catalog = read_catalog(mini, split="val")
    dataset = FrameDataset(catalog, 32, with_mask=True)
    item = dataset[len(dataset) - 1]
    assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.float32 and 0 <= item["image"].min() and item["image"].max() <= 1
    assert item["mask"].shape == (1, 32, 32) and item["mask"].max() == 1 and item["label"] == 1 and item["video"] == catalog["video"].iloc[-1]
    assert "mask" not in FrameDataset(catalog, 32)[0]


def test_full_size_frames_are_the_files_pixels(mini):
    catalog = read_catalog(mini, split="val")
    frames = load_frames(catalog, 48)
    for k in range(0, len(catalog), 4):
        assert (frames.images[k].permute(1, 2, 0).numpy()[..., ::-1] == pixels(mini / catalog["frame"][k])).all()
        expected = pixels(mini / catalog["mask"][k], grey=True) if catalog["label"][k] else np.zeros((48, 48), np.uint8)
        assert (frames.masks[k, 0].numpy() == expected).all()
    assert frames.labels.tolist() == catalog["label"].tolist() and frames.videos == catalog["video"].tolist()


def test_dataset_and_memory_agree(mini):
    catalog = read_catalog(mini, split="test")
    dataset, frames = FrameDataset(catalog, 24, with_mask=True), load_frames(catalog, 24)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=len(dataset))))
    everything = frames.batch(slice(None))
    for name in ("image", "mask", "label"):
        torch.testing.assert_close(batch[name], everything[name])


def test_truncated_and_vanished_frames_are_named(copy):
    catalog = read_catalog(copy, split="val")
    first, second = (copy / catalog["frame"][k] for k in (0, 1))
    first.write_bytes(first.read_bytes()[:500])
    second.unlink()
    dataset = FrameDataset(catalog, 32)
    for index, kind, path in ((0, ValueError, first), (1, FileNotFoundError, second)):
        with pytest.raises(kind) as caught:
            dataset[index]
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="truncated"):
        load_frames(catalog.iloc[:1], 32)


def test_a_catalogue_without_its_root_says_so(mini):
    catalog = read_catalog(mini, split="val")
    catalog.attrs = {}
    with pytest.raises(ValueError, match="root="):
        FrameDataset(catalog, 32)
    assert len(FrameDataset(catalog, 32, root=mini)[0]["image"]) == 3
    with pytest.raises(ValueError, match="no column 'frame'"):
        FrameDataset(catalog.drop(columns="frame"), 32)
