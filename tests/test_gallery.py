"""The pictures of maps: the frames' rule and the numbers against NumPy, maps against `explain`, and what is said where data, detectors or games are missing."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import rgb_to_hsv

from bcos_nb.data import Frames, forge_dataset, read_catalog
from bcos_nb.explainers import explain
from bcos_nb.games import localization_scores
from bcos_nb.games.grid import Grids
from bcos_nb.models import create_detector, load_detector, save_detector
from bcos_nb.reports import gallery as module
from bcos_nb.reports.figures import figure_png
from bcos_nb.reports.gallery import (
    Cell, Gallery, GridMaps, called, compact, explain_grids, faces_figure, fakes_box, fractions, gallery_figures, grid_figure, heat_tile, image_html, mask_game_figure, median_frames,
    read_arrays, resized, sheet, trained_detectors, two_colours, write_arrays,
)
from bcos_nb.reports.page import loads_from_network
from invented_runs import invent_games, invent_runs

TINY = dict(identities=6, frames_per_video=3, size=48, compressions=("c23",), methods=("Deepfakes", "FaceSwap"), workers=0, progress=False)


def train_nothing(root, arch, b, data, *, seed=0, name=None, dataset="FaceForensics++"):
    """A folder of a training with untrained weights."""
    torch.manual_seed(seed)
    folder = root / "train" / (name or f"{arch}-{'ordinary' if b is None else f'b{b:g}'}")
    folder.mkdir(parents=True)
    save_detector(create_detector(arch, b=b, width=0.125, stem="fine").eval(), folder / "detector.safetensors")
    (folder / "params.json").write_text(json.dumps(dict(arch=arch, b=b, data=data, dataset=dataset, compression="c23", image_size=48, frames_per_video=3)))
    (folder / "metrics.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small dataset and four untrained detectors of one family, and one of another."""
    home = tmp_path_factory.mktemp("home")
    forge_dataset(home / "data" / "mini", **TINY)
    for seed, b in enumerate((None, 1.25, 2.0, 2.5)):
        train_nothing(home / "runs", "resnet10", b, "data/mini", seed=seed)
    return home


# ---- which detectors, which frames


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_frame_shown_is_the_lower_median_of_its_method(count):
    rng = np.random.default_rng(count)
    catalog = pd.DataFrame({"label": [1] * count + [1] * 3 + [0] * 4, "method": ["swap"] * count + ["other"] * 3 + ["real"] * 4})
    probability = rng.random(len(catalog))
    rows = median_frames(catalog, probability)
    assert [catalog.loc[row, "method"] for row in rows] == ["other", "swap", "real"]
    for row, method in zip(rows, ("other", "swap", "real")):
        assert probability[row] == pytest.approx(np.quantile(probability[catalog["method"] == method], 0.5, method="lower"))


def test_the_very_backbone_stands_before_its_relatives_and_other_datasets_are_left_out(tmp_path):
    train_nothing(tmp_path, "resnet10", None, "data", name="a")
    train_nothing(tmp_path, "resnet34", None, "data", name="z")
    train_nothing(tmp_path, "resnet10", 2.0, "data", name="c")
    train_nothing(tmp_path, "resnet10", 2.5, "data", name="other", dataset="df-tp-ffhq")
    (train_nothing(tmp_path, "resnet10", 1.5, "data", name="running") / "metrics.json").unlink()
    assert [(one.arch, one.b, one.folder.name) for one in trained_detectors(tmp_path)] == [("resnet34", None, "z"), ("resnet10", 2.0, "c")]


# ---- from a dataset


def test_maps_explain_the_predicted_class_of_the_frames_that_the_rule_names(made, tmp_path):
    gallery = Gallery(made / "runs", tmp_path / "cache")
    faces, (arrays, about) = gallery.faces("resnet34"), gallery.chosen()
    assert faces.detectors == [None, 1.25, 2.0, 2.5] and faces.methods == ["Deepfakes", "FaceSwap", "real"] and not faces.masks[2].any() and faces.masks[:2].any((1, 2)).all()
    catalog = read_catalog(made / "data" / "mini", split="test", compression="c23", frames_per_video=3)
    order = catalog.groupby("video")["frame"].apply(list)
    assert all(frame in {frames[len(frames) // 2] for frames in order} for frame in about["frames"])  # from the middle of a video
    images = torch.as_tensor(faces.images).permute(0, 3, 1, 2).float() / 255
    for d, (b, one) in enumerate(zip(faces.detectors, trained_detectors(made / "runs"))):
        detector = load_detector(one.folder / "detector.safetensors").eval()
        with torch.no_grad():
            probability = detector(images).softmax(1)[:, 1]
        assert np.allclose(faces.probabilities[d], probability, atol=2e-3)
        for k in range(3):
            expected = explain(detector, images[[k]], "gradcam" if b is None else "bcos", int(probability[k] >= 0.5)).maps[0]
            assert np.allclose(faces.maps[d][k], expected, atol=2e-3)
    last = explain(load_detector(trained_detectors(made / "runs")[-1].folder / "detector.safetensors").eval(), images, "bcos", 1).maps
    assert np.allclose(faces.forgery, last, atol=2e-3)


def test_a_second_report_computes_nothing_and_a_new_detector_does(made, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    shutil.copytree(made / "runs" / "train", runs / "train")
    shutil.copytree(made / "data", tmp_path / "data")
    first = Gallery(runs).faces("resnet34")
    assert sorted(file.name for file in (runs / "report").iterdir()) == ["gallery-frames.safetensors", "gallery-resnet34-faces.safetensors"]
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(module, "explain_many", lambda *given, **more: pytest.fail("explained again"))
    again = Gallery(runs).faces("resnet34")
    assert all((one == other).all() for one, other in zip(first.maps, again.maps)) and again.rule == first.rule and (again.images == first.images).all()
    names = {picture.name: picture for picture in gallery_figures(runs)}
    assert names["figure_1"].figure is not None and names["figure_3"].figure is not None and names["figure_1_colour"].figure is not None
    assert names["figure_11"].figure is None and "data/mini, which the runs were made with, is not there any more" in names["figure_11"].caption
    train_nothing(runs, "resnet10", 3.0, "data/mini", seed=9)
    assert "not there any more" in gallery_figures(runs)[0].caption  # another detector, other frames


def test_scores_of_detection_runs_are_used_where_they_are_of_these_frames(made, tmp_path, monkeypatch):
    runs, gallery = tmp_path / "runs", Gallery(made / "runs", tmp_path / "cache")
    shutil.copytree(made / "runs" / "train", runs / "train")
    frames = gallery.frames()
    probability = np.random.default_rng(0).random(len(frames))
    for one in trained_detectors(runs):
        folder = runs / "detect" / one.folder.name
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps(dict(detector=f"../../train/{one.folder.name}")))
        table = frames.catalog[["frame", "label"]].assign(probability=probability, logit_real=0.0, logit_fake=1.0)
        table.sample(frac=1, random_state=1).to_parquet(folder / "scores.parquet")
        assert module.known_scores(one, frames) is None  # not complete
        (folder / "metrics.json").write_text("{}")
    monkeypatch.setattr(module, "fake_probabilities", lambda *given: pytest.fail("scored again"))
    again = Gallery(runs, tmp_path / "other")
    again._frames = frames
    assert again.chosen()[1]["frames"] == list(frames.catalog["frame"].iloc[median_frames(frames.catalog, probability)])
    table.iloc[:-1].to_parquet(folder / "scores.parquet")
    assert module.known_scores(one, frames) is None  # one frame is missing


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(made, tmp_path):
    (tmp_path / "file").write_text("")
    faces = Gallery(made / "runs", tmp_path / "file" / "report").faces("resnet34")
    assert len(faces.images) == 3 and faces.maps[1].max() == pytest.approx(1, abs=1e-3)


def test_files_are_read_by_their_key_only_and_damaged_ones_are_made_anew(tmp_path):
    path = tmp_path / "deep" / "one.safetensors"
    write_arrays(path, "key", {"x": np.linspace(0, 1, 5, dtype=np.float32), "inside": np.array([True, False])}, {"words": "für"})
    arrays, about = read_arrays(path, "key")
    assert np.allclose(arrays["x"], [0, 0.25, 0.5, 0.75, 1]) and arrays["inside"].tolist() == [1, 0] and about == {"words": "für"}
    assert read_arrays(path, "other") is None
    path.write_bytes(path.read_bytes()[:40])
    assert read_arrays(path, "key") is None


def test_grids_too_few_faces_for_say_so(made, tmp_path):
    pictures = {picture.name: picture for picture in gallery_figures(made / "runs", cache=tmp_path)}
    assert pictures["figure_11"].figure is None and "cannot" in pictures["figure_11"].caption and "play the grid game" in pictures["figure_11"].caption
    assert pictures["figure_2"].figure is None and pictures["figure_1"].figure is not None


def test_grids_are_those_at_the_quartiles(made, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 48, 48), generator=rng).byte()
    catalog = pd.DataFrame({"frame": [f"{k}" for k in range(12)], "mask": "", "video": [f"{k}" for k in range(12)], "label": [1] * 4 + [0] * 8, "method": "x"})
    frames = Frames(images, None, torch.tensor(catalog["label"].to_numpy()), list(catalog["video"]), catalog)
    indices = torch.stack([torch.cat([torch.tensor([4, 5]), torch.tensor([k]), torch.arange(6, 12)]) for k in range(4)])
    monkeypatch.setattr(module, "build_grids", lambda detectors, frames, count, scores: Grids(indices, torch.full((4,), 2), 3, frames))
    ordinary, bcos = trained_detectors(made / "runs")[0], trained_detectors(made / "runs")[2]
    found = explain_grids(ordinary, bcos, frames, lime=8)
    assert set(found.maps) == {"bcos", "gradcam", "gradcam++", "xgradcam", "layercam", "lime"} and found.images.shape == (2, 144, 144, 3) and found.rgba.shape == (2, 144, 144, 4)
    whole = Grids(indices, torch.full((4,), 2), 3, frames)
    inside, mean = whole.regions(range(4)), torch.zeros(4)
    for name in ("bcos", "gradcam", "gradcam++", "xgradcam", "layercam"):
        detector = load_detector(((bcos if name == "bcos" else ordinary).folder) / "detector.safetensors").eval()
        maps = explain(detector, whole.images(range(4)), name, 1).maps
        mean += (maps * inside).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-9) / 5
    chosen = [sorted(range(4), key=lambda k: mean[k])[k] for k in (0, 2)]
    assert (found.images == (whole.images(chosen) * 255).round().byte().permute(0, 2, 3, 1).numpy()).all()
    picture = grid_figure(found)
    assert len(compact(picture)) < 400_000 and "8 samples" in found.rule


# ---- from what the games kept, and from nothing


def test_without_the_dataset_what_the_games_kept_is_shown(tmp_path):
    runs = invent_runs(tmp_path / "demo", size=64)
    pictures = {picture.name: picture for picture in gallery_figures(runs)}
    assert list(pictures) == ["figure_1", "figure_1_colour", "figure_2", "figure_3", "figure_8", "figure_9", "figure_10", "figure_11"]
    assert [name for name, picture in pictures.items() if picture.figure is None] == ["figure_8", "figure_9", "figure_10"]
    for name, caption, figure, described in pictures.values():
        assert ("Not made: " in caption) if figure is None else (name == "figure_2" or ("that the" in caption and "game" in caption)) and described
        assert figure is None or len(compact(figure)) < 400_000
    assert "no ViT-C Ti is trained on FaceForensics++, and no mask game of ViT-C Ti kept pictures" in pictures["figure_8"].caption


def test_every_backbone_gets_its_figures(tmp_path):
    runs = invent_games(tmp_path / "mini", size=48)
    pictures = {picture.name: picture for picture in gallery_figures(runs)}
    assert all(pictures[name].figure is not None for name in ("figure_1", "figure_2", "figure_3", "figure_8", "figure_9", "figure_10", "figure_11"))


def test_an_empty_folder_says_what_is_missing_and_none_at_all_is_refused(tmp_path):
    pictures = gallery_figures(tmp_path)
    assert len(pictures) == 7 and all(picture.figure is None and "Not made: " in picture.caption for picture in pictures)
    with pytest.raises(FileNotFoundError, match="bcos-nb demo"):
        gallery_figures(tmp_path / "nowhere")


# ---- drawing


def test_fractions_are_equation_4():
    rng = np.random.default_rng(0)
    attribution, mask = rng.random((40, 40)).astype(np.float32), rng.random((40, 40)) > 0.6
    attribution[:8] = 0
    for threshold in (0.0, 0.5, 1.0):
        theirs = localization_scores(torch.as_tensor(attribution)[None], torch.as_tensor(mask)[None], [threshold])
        for weighting, (inside, whole) in fractions(attribution, mask, threshold).items():
            assert (inside / whole if whole else 0) == pytest.approx(float(theirs[weighting][0, 0]), abs=1e-6)


def test_inside_is_blue_outside_orange_and_what_is_removed_grey():
    mask, attribution = np.zeros((128, 128), bool), np.zeros((128, 128), np.float32)
    mask[:, :64], attribution[:64], attribution[64:] = True, 0.9, 0.2
    picture = two_colours(np.full((128, 128, 3), 128, np.uint8), attribution, mask, 0.5)
    side = len(picture)
    hue = rgb_to_hsv(picture / 255)
    parts = {(r, c): hue[side // 10 + r * side // 2:side // 3 + r * side // 2, side // 10 + c * side // 2:side // 3 + c * side // 2] for r in (0, 1) for c in (0, 1)}
    assert abs(parts[0, 0][..., 0].mean() - 0.56) < 0.04 and abs(parts[0, 1][..., 0].mean() - 0.115) < 0.04  # sky blue and orange
    assert parts[1, 0][..., 1].max() == 0 and parts[1, 1][..., 1].max() == 0


def test_a_map_keeps_its_values_at_another_size_and_its_threshold():
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    assert np.allclose(resized(ramp, 128)[:, 2:-2], np.interp((np.arange(128) + 0.5) / 2 - 0.5, np.arange(64), ramp[0])[2:-2], atol=1e-3)
    tile = heat_tile(np.full((64, 64, 3), 90, np.uint8), ramp, 0.5, 128).astype(int)
    coloured = np.ptp(tile, axis=2).max(0) > 0
    assert not coloured[: int(0.49 * len(coloured))].any() and coloured[int(0.52 * len(coloured)):].all()


def test_a_box_surrounds_the_fakes_cell_and_scores_are_its_share():
    region, maps = np.zeros((2, 30, 30), bool), np.zeros((2, 30, 30), np.float32)
    region[0, 20:, 10:20], region[1, :10, :10] = True, True
    maps[0, 20:25, 10:20], maps[0, 0, 0], maps[1, 5, 5] = 0.5, 1.0, 0.8
    grids = GridMaps("resnet34", 2.0, np.zeros((2, 30, 30, 3), np.uint8), region, {"bcos": maps})
    assert fakes_box(region[0]) == pytest.approx((1 / 3, 2 / 3, 1 / 3, 1 / 3)) and fakes_box(region[1]) == pytest.approx((0, 0, 1 / 3, 1 / 3))
    assert grids.scores()["bcos"] == pytest.approx([25 / 26, 1]) and grids.scores(0.6)["bcos"] == pytest.approx([0, 1])


def test_a_sheet_has_the_size_that_its_tiles_make():
    figure = sheet([[Cell(np.zeros((8, 8, 3), np.uint8)), None, Cell(None, "no run")], [Cell(np.zeros((8, 8, 3), np.uint8), below="0.5")] * 3], ["a", "b\nc", "d"], ["x", "y"], side=100, gaps=(1,))
    width, height = figure.get_size_inches() * 100
    assert width == pytest.approx(24 + 3 * 100 + 2 * 5 + 12 + 8) and height == pytest.approx(12 + 30 + 2 * 100 + 18 + 5 + 18 + 8)
    page = image_html(figure, 'a "b" <c>')
    assert not loads_from_network(page) and f'width="{round(width)}"' in page and "&quot;b&quot; &lt;c&gt;" in page
    assert len(figure_png(figure)) > 0 and len(figure.axes) == 4


def test_a_verdict_is_named_with_its_own_probability():
    assert [called(value) for value in (0.5, 0.973, 0.2, 0.0)] == ["fake 0.50", "fake 0.97", "real 0.80", "real 1.00"]


def test_figures_without_b_cos_networks_are_refused_in_words(made, tmp_path):
    faces = Gallery(made / "runs", tmp_path).faces("resnet34")
    faces.detectors, faces.rgba, faces.forgery = [None] * 4, [None] * 4, None
    for make in (faces_figure, mask_game_figure):
        with pytest.raises(ValueError, match="No B-cos"):
            make(faces)
