"""`check_data`: each fault planted gives exactly the finding planted, and a clean folder gives none."""
import json
import re
import shutil
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from typer.testing import CliRunner

from bcos_nb import cli
from bcos_nb.data import check_data, forge_dataset, load_frames, mend_data, read_catalog
from test_catalog import FACES, TABLE, copy, pack, synthetic  # copy is a fixture: of this module's mini

TINY = dict(identities=6, frames_per_video=3, size=48, methods=("Deepfakes", "NeuralTextures"), compressions=("c23", "c40"), progress=False)
FAKES, REALS = f"rgb/{FACES}/manipulated_sequences/Deepfakes", f"rgb/{FACES}/original_sequences/youtube"


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return forge_dataset(tmp_path_factory.mktemp("data") / "mini", workers=0, **TINY)


def edit(root, change, name="FF-DF"):
    path = root / "dataset_json" / f"{name}.json"
    content = json.loads(path.read_text())
    change(content[name])
    path.write_text(json.dumps(content))


def videos_of(labels, label="FF-DF", split="train", compression="c23"):
    return labels[label][split][compression]


def video_of(labels, *where):
    return next(iter(videos_of(labels, *where).values()))


def train_video(root, label="FF-DF"):
    """Name of a training video."""
    return next(iter(videos_of(json.loads((root / "dataset_json" / "FF-DF.json").read_text())["FF-DF"], label)))


def found(root, dataset="FF-DF", **options):
    """Findings as (severity, finding, split, compression, count)."""
    table = check_data(root, dataset, **options).findings
    assert (table["dataset"] == dataset).all() and all(remedy.endswith(".") for remedy in table["remedy"]) and (table["example"].str.len() > 0).all()
    return sorted(table[["severity", "finding", "split", "compression", "count"]].itertuples(index=False, name=None), key=repr)


@pytest.mark.parametrize("fast", [False, True])
def test_nothing_is_found_in_a_clean_folder(mini, fast):
    for dataset in (None, FACES, "FF-DF", "FF-NT"):
        result = check_data(mini, dataset, fast=fast)
        assert len(result.findings) == 0 and result.errors == 0
    counts = check_data(mini, fast=fast).counts
    assert len(counts) == 3 * 3 * 2 and set(counts["form"]) == {"folder"}
    for row in counts.itertuples():
        labels = json.loads((mini / "dataset_json" / f"{row.dataset}.json").read_text())[row.dataset]
        videos = {label: videos_of(labels, label, row.split, row.compression) for label in labels}
        assert row.videos == sum(map(len, videos.values())) and row.frames == sum(len(v["frames"]) for each in videos.values() for v in each.values())
        assert row.masks == row.frames - 3 * len(videos["FF-real"]) and row.missing == row.short == 0
    assert counts["unreadable"].isna().all() if fast else (counts["unreadable"] == 0).all()


@pytest.mark.parametrize("dataset", TABLE)
def test_nothing_is_found_in_the_other_datasets(tmp_path, dataset):
    synthetic(tmp_path, dataset, lambda path: "./datasets\\rgb\\" + path.replace("/", "\\"))
    if TABLE[dataset][1]:  # masks for some would be expected for all
        assert found(tmp_path, dataset, frames_per_video=3) == [("warning", "identities shared", f"{a} and {b}", None, 1) for a, b in (("train", "test"), ("train", "val"), ("val", "test")) if dataset != "DeepFakeDetection"]
    else:
        assert found(tmp_path, dataset, frames_per_video=3) == []


# ---- one fault each. `plant` spoils a clean folder; `expected` is all that may be found, in FF-DF.

def wrong_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def grey(path, value, size=48):
    cv2.imwrite(str(path), np.full((size, size), value, np.uint8))


def plant_short(root):
    def change(labels):
        video = video_of(labels)
        video.update(frames=video["frames"][:2], masks=video["masks"][:2])
    edit(root, change)


def plant_shared_identity(root):
    def change(labels):
        for compression in ("c23", "c40"):
            name, video = videos_of(labels, "FF-real", "train", compression).popitem()
            videos_of(labels, "FF-real", "test", compression)[name] = video
    edit(root, change)


def plant_masks_at_c23_only(root):
    shutil.rmtree(root / FAKES / "c40/masks")
    edit(root, lambda labels: [video.pop("masks") for split in labels["FF-DF"].values() for video in split["c40"].values()])


def plant_level_missing(root):
    def change(labels):
        for label in labels:
            labels[label]["val"] = labels[label]["val"]["c23"]
    edit(root, change)


def plant_empty_videos_folder(root):
    for file in (root / FAKES / "c23/videos").iterdir():
        file.unlink()


PLANTED = {
    "frame missing": (lambda root: (root / FAKES / "c23/frames" / train_video(root) / "001.png").unlink(), [("error", "frames missing", "train", "c23", 1)], True),
    "folder missing": (lambda root: shutil.rmtree(root / FAKES / "c23/frames" / train_video(root)), [("error", "folder missing", "train", "c23", 1)], True),
    "folder empty": (lambda root: [f.unlink() for f in (root / FAKES / "c40/frames" / train_video(root)).iterdir()], [("error", "folder empty", "train", "c40", 1)], True),
    "videos folder empty": (plant_empty_videos_folder, [("notice", "videos folder empty", None, "c23", 1)], True),
    "frame truncated": (lambda root: truncated(root / FAKES / "c23/frames" / train_video(root) / "001.png"), [("error", "frames unreadable", "train", "c23", 1)], False),
    "frame with a wrong byte": (lambda root: wrong_byte(root / REALS / "c23/frames" / train_video(root, "FF-real") / "001.png"), [("error", "frames unreadable", "train", "c23", 1)], False),
    "frame of 0 bytes": (lambda root: (root / REALS / "c23/frames" / train_video(root, "FF-real") / "001.png").write_bytes(b""), [("error", "frames unreadable", "train", "c23", 1)], False),
    "mask truncated": (lambda root: truncated(root / FAKES / "c23/masks" / train_video(root) / "001.png"), [("error", "masks unreadable", "train", "c23", 1)], False),
    "mask black": (lambda root: grey(root / FAKES / "c23/masks" / train_video(root) / "001.png", 0), [("warning", "masks empty", "train", "c23", 1)], False),
    "mask softened": (lambda root: grey(root / FAKES / "c23/masks" / train_video(root) / "001.png", 251), [("warning", "masks grey", "train", "c23", 1)], False),
    "ending in capitals": (lambda root: (root / FAKES / "c23/frames" / train_video(root) / "001.png").rename(root / FAKES / "c23/frames" / train_video(root) / "001.PNG"),
                           [("error", "case differs", "train", "c23", 1)], True),
    "mask of another size": (lambda root: grey(root / FAKES / "c23/masks" / train_video(root) / "001.png", 255, 40), [("warning", "mask sizes differ", "train", "c23", 1)], False),
    "frame of another size": (lambda root: grey(root / REALS / "c40/frames" / train_video(root, "FF-real") / "002.png", 99, 64), [("warning", "sizes differ", "train", "c40", 1)], False),
    "mask missing everywhere": (lambda root: [(root / FAKES / c / "masks" / train_video(root) / "001.png").unlink() for c in ("c23", "c40")],
                                [("warning", "masks missing", "train", "c23", 1), ("warning", "masks missing", "train", "c40", 1)], True),
    "masks at c23 only": (plant_masks_at_c23_only, [("notice", "masks borrowed", split, "c40", 6) for split in ("test", "train", "val")], True),
    "video too short": (plant_short, [("warning", "too short", "train", "c23", 1)], True),
    "video without frames": (lambda root: edit(root, lambda labels: video_of(labels).update(frames=[], masks=[])), [("warning", "no frames", "train", "c23", 1)], True),
    "split without videos": (lambda root: edit(root, lambda labels: videos_of(labels, "FF-DF", "val").clear()), [("warning", "no videos", "val", "c23", 1)], True),
    "one class": (lambda root: edit(root, lambda labels: labels["FF-DF"].pop("val")), [("warning", "one class", "val", "c23", 1), ("warning", "one class", "val", "c40", 1)], True),
    "unknown label": (lambda root: edit(root, lambda labels: labels.update({"FF-XX": labels.pop("FF-DF")})), [("error", "unknown label", None, None, 1)], True),
    "unknown split": (lambda root: edit(root, lambda labels: [splits.update(validation=splits.pop("val")) for splits in labels.values()]),
                      [("warning", "unknown split", "validation", c, 4) for c in ("c23", "c40")], True),
    "label differs": (lambda root: edit(root, lambda labels: video_of(labels).update(label="FF-real")), [("error", "label differs", "train", "c23", 1)], True),
    "no compression": (plant_level_missing, [("error", "no compression", "val", None, 4)], True),
    "entry damaged": (lambda root: edit(root, lambda labels: videos_of(labels).update({"071_054": ["a.png"]})), [("error", "entry damaged", "train", "c23", 1)], True),
    "frames no text": (lambda root: edit(root, lambda labels: videos_of(labels).update({"071_054": {"label": "FF-DF", "frames": [1, 2]}})), [("error", "entry damaged", "train", "c23", 1)], True),
    "path leaves the root": (lambda root: edit(root, lambda labels: video_of(labels)["frames"].append("../../secret/001.png")), [("error", "path refused", "train", "c23", 1)], True),
    "absolute path": (lambda root: edit(root, lambda labels: video_of(labels)["frames"].append("/etc/001.png")), [("error", "path refused", "train", "c23", 1)], True),
    "val repeats test": (lambda root: edit(root, lambda labels: [splits.update(val=splits["test"]) for splits in labels.values()]), [("warning", "splits repeated", "val and test", None, 4)], True),
    "identity in two splits": (plant_shared_identity, [("warning", "identities shared", "train and test", None, 1)], True),
    "json cut short": (lambda root: truncated(root / "dataset_json" / "FF-DF.json"), [("error", "json damaged", None, None, 1)], True),
    "json of something else": (lambda root: (root / "dataset_json" / "FF-DF.json").write_text('{"names": []}'), [("error", "json damaged", None, None, 1)], True),
    "json missing": (lambda root: (root / "dataset_json" / "FF-DF.json").unlink(), [("error", "json missing", None, None, 1)], True),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_exactly_what_was_planted_is_found(copy, fault):
    plant, expected, by_paths = PLANTED[fault]
    assert found(copy, fast=True) == []
    plant(copy)
    assert found(copy) == sorted(expected, key=repr)
    assert found(copy, fast=True) == (sorted(expected, key=repr) if by_paths else [])


def spelled(style):
    def change(labels):
        for splits in labels.values():
            for levels in splits.values():
                for videos in levels.values():
                    for video in videos.values():
                        video.update({kind: [style(path) for path in video[kind]] for kind in ("frames", "masks") if kind in video})
    return change


@pytest.mark.parametrize("style", [
    lambda path: ".\\datasets\\rgb\\" + path.replace("/", "\\"), lambda path: path.replace("/", "\\"), lambda path: "./" + path,
    lambda path: "/home/somebody/DeepfakeBench/datasets/rgb/" + path, lambda path: "E:\\data\\" + path.replace("/", "\\"),
])
def test_paths_of_other_machines_are_no_fault(copy, style):
    edit(copy, spelled(style))
    assert found(copy) == []


def test_order_by_number_is_no_fault(copy):
    def change(labels):
        for label in labels:
            video = video_of(labels, label)
            for kind in ("frames", "masks") if "masks" in video else ("frames",):
                folder = Path(video[kind][0]).parent
                for old, new in (("000", "9"), ("001", "10"), ("002", "100")):
                    (copy / "rgb" / folder / f"{old}.png").rename(copy / "rgb" / folder / f"{new}.png")
                video[kind] = [str(folder / f"{name}.png") for name in ("100", "10", "9")]
    edit(copy, change)
    assert found(copy) == []


def test_several_faults_at_once_are_each_counted(copy):
    files = sorted((copy / FAKES / "c23/frames").glob("*/*.png"))
    for file in files[:2]:
        truncated(file)
    for file in files[3:6]:
        file.unlink()
    plant_empty_videos_folder(copy)
    result = check_data(copy, "FF-DF")
    sums = result.findings.groupby("finding")["count"].sum().to_dict()
    assert sums == {"frames unreadable": 2, "folder empty": 1, "videos folder empty": 1}
    assert result.counts["missing"].sum() == 3 and result.counts["unreadable"].sum() == 2 and result.errors == 2


def test_identities_of_celeb_df(tmp_path):
    synthetic(tmp_path, "Celeb-DF-v2")

    def change(labels):
        for label, splits in labels.items():
            for k, split in enumerate(("train", "val", "test")):
                name = f"id{k}_000{k}" if label == "CelebDFv2_real" else f"id{k}_id{k + 5}_0001"
                splits[split] = {name: next(iter(splits[split].values()))}
    edit(tmp_path, change, "Celeb-DF-v2")
    assert found(tmp_path, "Celeb-DF-v2", frames_per_video=3) == []
    edit(tmp_path, lambda labels: labels["CelebDFv2_fake"].update(test={"id2_id6_0001": next(iter(labels["CelebDFv2_fake"]["test"].values()))}), "Celeb-DF-v2")
    assert found(tmp_path, "Celeb-DF-v2", frames_per_video=3) == [("warning", "identities shared", "val and test", None, 1)]
    example = check_data(tmp_path, "Celeb-DF-v2", fast=True, frames_per_video=3).findings["example"].iloc[0]
    assert example == "id6 in id1_id6_0001 and id2_id6_0001"


def test_lmdb_is_checked_like_folders(copy):
    expected = check_data(copy, "FF-DF").counts
    truncated(copy / FAKES / "c23/frames" / train_video(copy) / "001.png")
    grey(copy / FAKES / "c40/masks" / train_video(copy) / "000.png", 0)
    (copy / REALS / "c23/frames" / train_video(copy, "FF-real") / "002.png").unlink()
    place = pack(copy)
    assert found(copy) == [("error", "frames missing", "train", "c23", 1), ("error", "frames unreadable", "train", "c23", 1), ("warning", "masks empty", "train", "c40", 1)]
    counts = check_data(copy, "FF-DF").counts
    assert set(counts["form"]) == {"lmdb"} and counts[["split", "compression", "videos", "frames", "masks"]].equals(expected[["split", "compression", "videos", "frames", "masks"]])
    (place / "data.mdb").write_bytes(b"nothing of the kind" * 1000)
    assert found(copy) == [("error", "lmdb damaged", None, None, 1)]


def test_folder_without_json(copy):
    (copy / "rgb" / "UADFV").mkdir()
    table = check_data(copy, fast=True).findings
    assert table[["severity", "finding", "dataset"]].values.tolist() == [["warning", "no json for folder", "UADFV"]]


def test_all_pictures_of_several_datasets_are_decoded_once(mini, monkeypatch):
    import bcos_nb.data.check as module

    paths, real = [], module.look
    monkeypatch.setattr(module, "look", lambda some, *rest: paths.extend(some) or real(some, *rest))
    check_data(mini)
    assert sorted(paths) == sorted(path.relative_to(mini).as_posix() for kind in ("frames", "masks") for path in mini.glob(f"rgb/*/*/*/*/{kind}/*/*.png"))


def test_length_is_the_miniatures_own_or_as_asked_for(copy):
    assert {(f[1], f[4]) for f in found(copy, fast=True, frames_per_video=4)} == {("too short", 4)}
    (copy / "miniature.json").unlink()
    assert {(f[1], f[4]) for f in found(copy, fast=True)} == {("too short", 4)}
    with pytest.raises(ValueError, match="frames_per_video=0"):
        check_data(copy, frames_per_video=0)


# ---- the command

def command(*arguments):
    return CliRunner().invoke(cli.app, ["data", "check", *map(str, arguments)])


# ---- going on without what is broken

def plant_what_is_left_out(root):
    """Spoils five frames and a mask of FF-DF; gives the paths of the six frames below rgb."""
    fakes, reals = root / FAKES, root / REALS
    fake, real = train_video(root), train_video(root, "FF-real")
    (fakes / "c23/frames" / fake / "001.png").unlink()
    truncated(fakes / "c40/frames" / fake / "002.png")
    truncated(fakes / "c23/masks" / fake / "000.png")
    shutil.rmtree(reals / "c23/frames" / real)
    below = lambda place, level, video, k: f"{place.removeprefix('rgb/')}/{level}/frames/{video}/{k:03d}.png"
    return {below(FAKES, "c23", fake, 0), below(FAKES, "c23", fake, 1), below(FAKES, "c40", fake, 2), *(below(REALS, "c23", real, k) for k in range(3))}


def test_mending_lists_all_but_what_is_broken(copy, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (copy / "dataset_json").iterdir()}
    broken = plant_what_is_left_out(copy)
    listed = json.loads((copy / "dataset_json" / "FF-DF.json").read_text())["FF-DF"]
    paths = {frame for label in listed.values() for split in label.values() for level in split.values() for video in level.values() for frame in video["frames"]}
    left_out = mend_data(copy, tmp_path / "new", "FF-DF")
    assert set(left_out["path"]) == broken and len(left_out) == len(broken) == 6 and (left_out["why"] == "its mask can't be decoded").sum() == 1
    kept = set()
    for split in ("train", "val", "test"):
        for level in ("c23", "c40"):
            catalog = read_catalog(tmp_path / "new", "FF-DF", split, level)
            kept |= set(catalog["frame"].str.removeprefix("rgb/"))
            assert catalog.loc[catalog["label"] == 1, "mask"].notna().all() and len(load_frames(catalog, 16)) == len(catalog)
    assert kept == paths - broken and left_out.attrs["frames"] == {"FF-DF": len(kept)}
    assert check_data(tmp_path / "new", frames_per_video=1).errors == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was changed where the data lies
    assert len(mend_data(copy, tmp_path / "new", "FF-DF", fast=True)) == 4  # again, by paths only: what can't be decoded stays listed


def test_mending_an_lmdb(copy, tmp_path):
    pack(copy)
    with lmdb.open(str(copy / "lmdb" / f"{FACES}_lmdb"), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        transaction.delete(f"{REALS}/c23/frames/{train_video(copy, 'FF-real')}/001.png".removeprefix("rgb/").replace("/", "\\").encode())
    left_out = mend_data(copy, tmp_path / "new", "FF-DF")
    assert left_out["why"].tolist() == ["it is not there"]
    catalog = read_catalog(tmp_path / "new", "FF-DF", "train", "c23")
    assert catalog.attrs["lmdb"] and len(load_frames(catalog, 16)) == len(catalog) == 3 * len(catalog["video"].unique()) - 1


def test_mending_overwrites_nothing_and_needs_something(copy, tmp_path):
    with pytest.raises(FileExistsError, match="holds something else"):
        mend_data(copy, copy)
    shutil.rmtree(copy / "rgb")
    with pytest.raises(FileNotFoundError, match="Nothing in .* can be read"):
        mend_data(copy, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_checkout_of_deepfakebench_is_a_root(copy, tmp_path):
    checkout = tmp_path / "DeepfakeBench"
    (checkout / "datasets").mkdir(parents=True)
    (checkout / "preprocessing").mkdir()
    (copy / "rgb").rename(checkout / "datasets" / "rgb")
    (copy / "dataset_json").rename(checkout / "preprocessing" / "dataset_json")
    for root in (checkout, checkout / "datasets", checkout / "datasets" / "rgb"):
        assert check_data(root, frames_per_video=3).errors == 0
        catalog = read_catalog(root, "FF-DF", "train", "c40")
        assert len(load_frames(catalog, 16)) == len(catalog) > 0 and catalog.loc[catalog["label"] == 1, "mask"].notna().all()


def test_the_command_mends(copy, tmp_path):
    plant_what_is_left_out(copy)
    result = CliRunner().invoke(cli.app, ["data", "mend", str(copy), str(tmp_path / "new"), "--dataset", "FF-DF"])
    assert result.exit_code == 0 and "4 because it is not there, 1 because it can't be decoded, 1 because its mask can't be decoded" in result.output and "left_out.csv" in result.output
    assert CliRunner().invoke(cli.app, ["data", "check", str(tmp_path / "new"), "--frames", "1"]).exit_code == 0


def test_the_command_says_what_is_there(mini):
    answer = command(mini)
    assert answer.exit_code == 0 and "Nothing to complain about (paths and pictures" in answer.stdout
    assert re.search(r"FF-DF +train c23 +4 +12 +6 +0 +0 +0\n", answer.stdout)
    assert max(map(len, answer.stdout.splitlines())) < 140


def test_the_command_ends_with_1_for_errors_only(copy):
    plant_empty_videos_folder(copy)
    answer = command(copy, "--dataset", "FF-DF", "--fast")
    assert answer.exit_code == 0 and "1 notice (paths only" in answer.stdout and "Nothing needs to be done" in answer.stdout
    (copy / FAKES / "c23/frames" / train_video(copy) / "001.png").unlink()
    answer = command(copy, "--dataset", "FF-DF", "--fast")
    assert answer.exit_code == 1 and "1 error, 1 notice" in answer.stdout
    line = next(line for line in answer.stdout.splitlines() if line.startswith("error"))
    assert "FF-DF train c23: frames that are not there: 1 (" in line and "001.png" in line and "Copy the frames" in line
    assert command(copy, "--dataset", "FF-NT", "--fast", "--frames", 4).exit_code == 0


def test_the_command_refuses_what_is_no_dataset(tmp_path):
    answer = command(tmp_path / "none")
    assert answer.exit_code == 1 and "is not a folder" in answer.stderr and "Traceback" not in answer.stderr
    answer = command(tmp_path)
    assert answer.exit_code == 1 and "is empty" in answer.stderr and "bcos-nb forge" in answer.stderr


def test_the_command_tells_what_paths_tell_before_it_decodes(copy, monkeypatch):
    monkeypatch.setattr(cli, "MANY_PICTURES", 10)
    (copy / FAKES / "c23/frames" / train_video(copy) / "001.png").unlink()
    shown = command(copy, "--dataset", "FF-DF").stdout
    first, second = shown.index("frames that are not there"), shown.rindex("frames that are not there")
    assert first < shown.index("pictures are decoded") < second
