"""The localization score against the equations read literally, and the two games on frames with known answers."""
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bcos_nb.data import Frames
from bcos_nb.explainers import EXPLAINERS, register_explainer
from bcos_nb.explainers.baselines import mean_mask
from bcos_nb.games import SCORE_COLUMNS, THRESHOLDS, build_grids, localization_scores, mask_area, play_grid_game, play_mask_game, score_table, specificity
from bcos_nb.models import create_detector


def literal_scores(maps, regions, thresholds):
    "Equations (3) and (4) in loops."
    scores = {"weighted": np.zeros((len(thresholds), len(maps))), "unweighted": np.zeros((len(thresholds), len(maps)))}
    for t, threshold in enumerate(thresholds):
        for n, (attribution, region) in enumerate(zip(maps, regions)):
            kept = attribution.astype(np.float64).copy()
            kept[attribution < attribution.dtype.type(threshold)] = 0
            for name, w in (("weighted", kept), ("unweighted", (kept > 0).astype(float))):
                scores[name][t, n] = (w * region).sum() / w.sum() if w.sum() > 0 else 0
    return scores


@pytest.mark.parametrize("seed", range(40))
def test_scores_equal_the_equations_on_random_cases(seed):
    random = np.random.default_rng(seed)
    n, height, width = random.integers(1, 6), random.integers(1, 20), random.integers(1, 20)
    maps = random.random((n, height, width)).astype(random.choice([np.float32, np.float64]))
    maps = np.where(random.random(maps.shape) < 0.3, np.round(maps, 1), maps).astype(maps.dtype)  # ties with thresholds
    maps = maps * (random.random(maps.shape) < random.random())  # zeros
    maps[random.integers(n)] = random.choice([0, 1, 0.5])  # constant, full or empty
    regions = random.random(maps.shape) < random.random()
    regions[:, random.integers(height), random.integers(width)] = True
    thresholds = [*random.choice(THRESHOLDS, 3), 0.0, 1.0, *random.random(random.integers(0, 30)), *random.choice(maps.ravel(), 3)]
    weights = regions if seed % 2 else regions * random.random(maps.shape)
    scores = localization_scores(torch.tensor(maps), torch.tensor(weights), thresholds)
    oracle = literal_scores(maps, weights, thresholds)
    tolerance = 1e-6 if maps.dtype == np.float32 else 1e-12
    for name in oracle:
        assert scores[name].shape == (len(thresholds), n)
        assert np.abs(scores[name].numpy() - oracle[name]).max() < tolerance


def test_a_value_equal_to_the_threshold_is_kept_and_an_empty_map_scores_0():
    inside = torch.tensor([[[True, False]]])
    for threshold in THRESHOLDS[1:]:
        maps = torch.tensor([[[threshold, 0.0]]])
        below = maps.nextafter(torch.tensor(0.0))
        assert localization_scores(maps, inside, [threshold])["weighted"].item() == 1
        assert localization_scores(below, inside, [threshold])["unweighted"].item() == 0
    assert localization_scores(torch.zeros(1, 1, 2), inside, [0.0, 1.0])["weighted"].tolist() == [[0], [0]]


def test_sums_stay_exact_on_large_maps_and_blocks_do_not_show():
    maps = torch.full((3, 1200, 1200), 0.1)
    regions = torch.zeros(3, 1200, 1200, dtype=torch.bool)
    regions[:, :400, :400] = True
    assert torch.allclose(localization_scores(maps, regions, [0.0])["weighted"], torch.tensor(1 / 9), atol=1e-7)
    maps, regions = torch.rand(70, 200, 100), torch.rand(70, 200, 100) < 0.4
    all_at_once = localization_scores(maps, regions)["weighted"]
    assert torch.equal(all_at_once, torch.cat([localization_scores(maps[n : n + 1], regions[n : n + 1])["weighted"] for n in range(70)], 1))


def test_half_precision_and_non_contiguous_maps_are_scored():
    maps = torch.rand(4, 20, 30).half()
    regions = torch.rand(4, 30, 20).transpose(1, 2) < 0.4
    scores = localization_scores(maps, regions)["weighted"]
    assert scores.dtype == torch.float32
    assert np.abs(scores.numpy() - literal_scores(maps.float().numpy(), regions.numpy(), THRESHOLDS)["weighted"]).max() < 1e-6
    assert torch.allclose(localization_scores(maps.float().transpose(1, 2), regions.transpose(1, 2))["weighted"], scores)


def test_a_hundred_thresholds_cost_about_as_much_as_eleven():
    maps, regions = torch.rand(40, 256, 256), torch.rand(40, 256, 256) < 0.2

    def seconds(count):
        best = np.inf
        for _ in range(5):
            begin = time.perf_counter()
            localization_scores(maps, regions, np.linspace(0, 1, count).tolist())
            best = min(best, time.perf_counter() - begin)
        return best

    assert seconds(101) < 3 * seconds(11)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda m, r, t: (m[:, :3], r, t), "one shape"),
        (lambda m, r, t: (m[0], r[0], t), "one shape"),
        (lambda m, r, t: (m[:0], r[:0], t), "no maps"),
        (lambda m, r, t: (m, r, [0.0, 1.1]), "thresholds"),
        (lambda m, r, t: (m, r, [-0.1]), "thresholds"),
        (lambda m, r, t: (m, r, [float("nan")]), "thresholds"),
        (lambda m, r, t: (m, r, []), "thresholds"),
        (lambda m, r, t: (m.index_fill(0, torch.tensor([2]), torch.nan), r, t), "map 2"),
        (lambda m, r, t: (m - 0.5, r, t), "map 0"),
        (lambda m, r, t: (m * 255, r, t), "map 0"),
        (lambda m, r, t: (m, r & (torch.arange(3) != 1)[:, None, None], t), "Region 1 has no pixel"),
        (lambda m, r, t: (m, r * 255.0, t), "region 0"),
    ],
)
def test_bad_input_is_refused(change, words):
    maps, regions = torch.rand(3, 6, 6) * 0.9 + 0.1, torch.ones(3, 6, 6, dtype=torch.bool)
    for score in (localization_scores, specificity):
        with pytest.raises(ValueError, match=words):
            score(*change(maps, regions, THRESHOLDS))


@pytest.mark.parametrize("grouped", [False, True])
def test_specificity_equals_all_pairs(grouped):
    generator = torch.Generator().manual_seed(0)
    maps, regions = torch.rand(9, 8, 7, generator=generator).double(), torch.rand(9, 8, 7, generator=generator) < 0.4
    groups = ["a", "a", "b", "c", "c", "c", "d", "e", "f"] if grouped else list("abcdefghi")
    oracle = np.zeros((len(THRESHOLDS), 9))
    for i in range(9):
        on = [literal_scores(maps[i : i + 1].numpy(), regions[j : j + 1].numpy(), THRESHOLDS)["weighted"][:, 0] for j in range(9)]
        oracle[:, i] = on[i] - np.mean([on[j] for j in range(9) if groups[j] != groups[i]], 0)
    ours = specificity(maps, regions, groups=groups) if grouped else specificity(maps, regions)
    assert np.abs(ours.numpy() - oracle).max() < 1e-12
    with pytest.raises(ValueError, match="other"):
        specificity(maps, regions, groups=["same"] * 9)
    with pytest.raises(ValueError, match="groups"):
        specificity(maps, regions, groups=["same"] * 8)


class PatchDetector(nn.Module):
    "Fake by the share of pure red pixels."

    arch, b, is_bcos, image_size = "patches", None, False, None

    def __init__(self):
        super().__init__()
        self.cam_layer = nn.Conv2d(3, 1, 1, bias=False)
        self.cam_layer.weight.data[:] = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None]

    def cam_to_spatial(self, activations):
        return activations

    def forward(self, images):
        evidence = 100 * self.cam_layer(images).clamp(min=0).mean((2, 3)) - 1
        return torch.cat([-evidence, evidence], 1)


def red_frames(fakes=14, reals=20, size=24):
    "Grey frames; a fake has a red square, larger from fake to fake, which is its mask."
    count = fakes + reals
    images = torch.full((count, 3, size, size), 90, dtype=torch.uint8) + torch.arange(count, dtype=torch.uint8)[:, None, None, None]
    masks = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for n in range(fakes):
        top, left = torch.randint(size - 6 - n // 2, (2,), generator=generator).tolist()
        side = 5 + n // 2
        images[n, :, top : top + side, left : left + side] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
        masks[n, :, top : top + side, left : left + side] = 255
    names = [f"frames/{n:03}.png" for n in range(count)]
    catalog = pd.DataFrame({"frame": names, "mask": None, "video": names, "label": [1] * fakes + [0] * reals, "method": "red"})
    catalog.attrs.update(dataset="FF-DF", compression="c40")
    return Frames(images=images, masks=masks, labels=torch.tensor([1] * fakes + [0] * reals), videos=names, catalog=catalog)


@pytest.fixture(scope="module")
def frames():
    return red_frames()


@pytest.fixture(scope="module")
def detector():
    return PatchDetector().eval()


@pytest.fixture
def red():
    "An explainer that knows: red is fake."

    @register_explainer("red")
    def red(question, requests):
        pure = (question.images[:, 0] > 0.99) & (question.images[:, 1] < 0.01)
        return {"red": question.answer("red", pure.float())}

    yield "red"
    del EXPLAINERS["red"]


def test_grids_hold_one_sure_fake_among_sure_reals(frames, detector):
    grids = build_grids(detector, frames, count=12)
    with torch.no_grad():
        fake = torch.softmax(detector(frames.images / 255), 1)[:, 1]
    chosen = grids.indices.gather(1, grids.positions[:, None])[:, 0]
    assert len(grids) == 12 and set(chosen.tolist()) == set(fake[:14].topk(12).indices.tolist())
    assert ((grids.indices < 14).sum(1) == 1).all() and (fake[grids.indices[grids.indices >= 14]] < 0.5).all()
    assert all(len(set(row)) == 9 for row in grids.indices.tolist())
    assert sorted(grids.positions[:9].tolist()) == list(range(9))
    images, regions = grids.images(range(12)), grids.regions(range(12))
    assert images.shape == (12, 3, 72, 72) and regions.dtype == torch.bool and (regions.flatten(1).sum(1) == 24 * 24).all()
    for k in range(12):
        for cell in range(9):
            top, left = 24 * (cell // 3), 24 * (cell % 3)
            assert torch.equal(images[k, :, top : top + 24, left : left + 24], frames.images[grids.indices[k, cell]] / 255)
            assert bool(regions[k, top : top + 24, left : left + 24].all()) == (cell == grids.positions[k])


def test_the_same_seed_gives_the_same_grids(frames, detector):
    first, again, other = (build_grids(detector, frames, count=10, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.indices, again.indices) and torch.equal(first.positions, again.positions)
    assert not torch.equal(first.positions, other.positions)
    assert build_grids(detector, frames, n=2, count=3).images([0]).shape == (1, 3, 48, 48)


def test_too_few_sure_images(frames, detector):
    with pytest.warns(UserWarning, match="14 grids instead of 100"):
        assert len(build_grids(detector, frames)) == 14
    blind = PatchDetector()
    blind.cam_layer.weight.data.zero_()
    with pytest.raises(ValueError, match="0 of 14 fakes"):
        build_grids(blind, frames)
    with pytest.raises(ValueError, match="and 7 of 7 real"):
        build_grids(detector, red_frames(reals=7))
    with pytest.raises(ValueError, match="n=1"):
        build_grids(detector, frames, n=1)
    with pytest.raises(ValueError, match="in their order"):
        build_grids(detector, frames, scores=pd.DataFrame({"frame": ["x"], "label": [1], "probability": [0.9]}))


def test_grid_game(frames, detector, red):
    table = play_grid_game(detector, frames, [red, "layercam", "uniform"], count=12, batch_size=5)
    assert tuple(table.columns) == SCORE_COLUMNS and len(table) == 3 * 12 * len(THRESHOLDS) * 2
    assert (table.query("explainer == 'red'")["score"] == 1).all()
    assert np.allclose(table.query("explainer == 'uniform'")["score"], 1 / 9)
    at_0 = table.query("explainer == 'layercam' and threshold == 0.5 and weighting == 'weighted'")["score"]
    assert at_0.min() > 0.9
    assert table["sample"].nunique() == 12 and table["b"].isna().all() and set(table["game"]) == {"grid"}
    assert set(table["dataset"]) == {"FF-DF"} and set(table["compression"]) == {"c40"} and table.attrs["grids"] == 12
    unlike = play_grid_game(detector, frames, ["uniform"], count=12, n=2, dataset="mine", compression="raw")
    assert np.allclose(unlike["score"], 1 / 4) and set(unlike["dataset"]) == {"mine"} and set(unlike["compression"]) == {"raw"}


def test_mask_game(frames, detector, red, tmp_path):
    controls = {"flat": torch.full((24, 24), 0.5), "mean mask": mean_mask(frames)}
    table = play_mask_game(detector, frames, [red, "layercam"], controls=controls, batch_size=4)
    assert tuple(table.columns) == SCORE_COLUMNS and len(table) == 4 * 14 * len(THRESHOLDS) * 2
    assert (table.query("explainer == 'red'")["score"] == 1).all()
    area = table.attrs["mask_area"]
    assert np.isclose(area, float((frames.masks[:14] == 255).float().mean())) and np.isclose(area, mask_area(frames))
    flat = table.query("explainer == 'flat'").groupby("threshold")["score"].mean()
    assert np.allclose(flat[flat.index <= 0.5], area) and (flat[flat.index > 0.5] == 0).all()
    assert table.query("explainer == 'red'")["sample"].unique().tolist() == frames.catalog["frame"][:14].tolist()
    table.to_parquet(tmp_path / "scores.parquet")
    back = pd.read_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert back["b"].dtype == float


def test_mask_game_counts_full_mask_pixels_only_and_names_an_empty_mask(frames, detector):
    soft = red_frames()
    soft.masks[:, :, :, 0] = 254
    assert np.isclose(mask_area(soft), float((soft.masks[:14] == 255).float().mean()))
    soft.masks[3] = soft.masks[3].clamp(max=200)
    with pytest.raises(ValueError, match="frames/003.png"):
        play_mask_game(detector, soft, ["gradcam"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = play_mask_game(detector, soft, ["gradcam"], empty="skip")
    assert table["sample"].nunique() == 13 and any("1 of 14" in str(warning.message) for warning in caught)


def test_mask_game_refuses_what_cannot_be_played(frames, detector):
    without = Frames(images=frames.images, masks=None, labels=frames.labels, videos=frames.videos, catalog=frames.catalog)
    with pytest.raises(ValueError, match="with_mask=True"):
        play_mask_game(detector, without, ["gradcam"])
    with pytest.raises(ValueError, match="no fake"):
        play_mask_game(detector, frames[torch.arange(14, 20)], ["gradcam"])
    with pytest.raises(ValueError, match="ordinary network"):
        play_mask_game(detector, frames, ["bcos"])
    with pytest.raises(ValueError, match="images' size"):
        play_mask_game(detector, frames, [], controls={"flat": torch.ones(8, 8)})
    with pytest.raises(ValueError, match="both explainer and control"):
        play_mask_game(detector, frames, ["uniform"], controls={"uniform": torch.ones(24, 24)})
    with pytest.raises(ValueError, match="Name an explainer"):
        play_mask_game(detector, frames, [])


def test_mask_game_says_where_a_dataset_has_no_masks(frames, detector):
    bare = red_frames()
    bare.masks.zero_()
    with pytest.raises(ValueError, match="14 of 14 fakes have no mask on disk.*FaceForensics"):
        play_mask_game(detector, bare, ["gradcam"])
    black = red_frames()
    black.catalog["mask"] = "masks/0.png"
    black.masks.zero_()
    with pytest.raises(ValueError, match="The mask of frames/000.png has no pixel at 1"):
        play_mask_game(detector, black, ["gradcam"])


def test_a_network_of_ones_own_plays(frames, red):
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, images):
            return self.layer(images.mean((2, 3)))

    table = play_mask_game(Mine().eval(), frames, [red], thresholds=[0.0])
    assert set(table["arch"]) == {"Mine"} and table["b"].isna().all() and (table["score"] == 1).all()


def test_unweighted_bcos_score_is_the_area(frames):
    table = play_mask_game(create_detector("resnet10", b=2, width=0.25), frames, ["bcos"], thresholds=[0.0])
    unweighted = table.query("weighting == 'unweighted'")["score"].mean()
    assert np.isclose(unweighted, table.attrs["mask_area"], atol=1e-6) and (table["b"] == 2).all()


def test_score_table_refuses_scores_of_another_shape(detector):
    with pytest.raises(ValueError, match="2 thresholds, 3 samples"):
        score_table({"weighted": torch.zeros(2, 2)}, [0, 1], ["a", "b", "c"], game="mask", detector=detector, explainer="x")
