"""Every measure against loops, and the games that ask them on frames with known answers."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies
from test_games import PatchDetector, red_frames

from bcos_nb.data import FrameDataset
from bcos_nb.data.frames import load_frames
from bcos_nb.data.forge import forge_dataset
from bcos_nb.data.catalog import read_catalog
from bcos_nb.explainers import EXPLAINERS, explain, explain_windows, register_explainer
from bcos_nb.games import GRID_MEASURES, MEASURES, OtherRegions, build_grids, forgery_strength, play_grid_game, play_mask_game, score_maps, specificity
from bcos_nb.models import create_detector


def by_pixel(attribution, region, weight, threshold, measure):
    "One measure of one map, in float64, without any function of the project."
    kept = np.where(attribution < threshold, 0, attribution.astype(np.float64))
    if not kept.any():
        return 0.0
    if measure in ("unweighted", "iou"):
        left = kept > 0
        return (left & region).sum() / (left.sum() if measure == "unweighted" else (left | region).sum())
    if measure == "hit":
        return region[kept == kept.max()].mean()
    return (kept * (region if measure == "weighted" else weight)).sum() / kept.sum()


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 2**32 - 1))
def test_measures_equal_loops_over_pixels(seed):
    random = np.random.default_rng(seed)
    shape = (random.integers(1, 5), random.integers(1, 12), random.integers(1, 12))
    maps = np.round(random.random(shape), random.integers(1, 4)) * (random.random(shape) < random.random())
    maps[random.integers(shape[0])] = random.choice([0, 1, 0.5])
    regions = random.random(shape) < 0.4
    regions[:, 0, 0] = True
    weights = {"contrast": random.uniform(-1, 1, shape), "soft": random.random(shape), "strength": random.random(shape)}
    thresholds = [0.0, 1.0, *random.random(4), *random.choice(maps.ravel(), 2)]
    scores = score_maps(torch.tensor(maps), torch.tensor(regions), thresholds, MEASURES, **{name: torch.tensor(value) for name, value in weights.items()})
    assert tuple(scores) == MEASURES
    for measure, values in scores.items():
        weight = weights.get({"specificity": "contrast"}.get(measure, measure), [None] * shape[0])
        oracle = [[by_pixel(maps[n], regions[n], weight[n], t, measure) for n in range(shape[0])] for t in thresholds]
        assert np.abs(values.numpy() - oracle).max() < 1e-12, measure


def test_a_measure_without_what_it_needs_is_refused():
    maps, regions = torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    for measure, words in (("strength", "strength="), ("specificity", "contrast="), ("soft", r"soft= .*\[2, 4, 4\], got nothing")):
        with pytest.raises(ValueError, match=words):
            score_maps(maps, regions, measures=[measure])
    with pytest.raises(ValueError, match="some of weighted"):
        score_maps(maps, regions, measures=["wieghted"])
    with pytest.raises(ValueError, match="some of weighted"):
        score_maps(maps, regions, measures="weighted")


def test_other_regions_in_batches_equal_specificity_of_all_at_once():
    generator = torch.Generator().manual_seed(0)
    maps, regions = torch.rand(20, 6, 5, generator=generator).double(), torch.rand(20, 6, 5, generator=generator) < 0.4
    regions[:, 0, 0] = True
    groups = [f"video {k}" for k in torch.randint(5, (20,), generator=generator).tolist()]
    for given_regions in (regions, torch.rand(20, 6, 5, generator=generator).double()):
        others = OtherRegions()
        for rows in torch.randperm(20, generator=generator).split(6):
            others.add(given_regions[rows], [groups[k] for k in rows.tolist()])
        ours = score_maps(maps, regions, measures=["specificity"], contrast=others.contrast(given_regions, groups))["specificity"]
        assert (ours - specificity(maps, given_regions, groups=groups)).abs().max() < 1e-12
    alone = OtherRegions()
    alone.add(regions, ["a"] * 20)
    with pytest.raises(ValueError, match="all 20 frames are of 'a'"):
        alone.contrast(regions, ["a"] * 20)


def test_strength_is_relative_to_the_strongest_change_inside():
    source = torch.full((1, 3, 10, 10), 0.2, dtype=torch.float64)
    fake, inside = source.clone(), torch.zeros(1, 10, 10, dtype=torch.bool)
    inside[:, :8] = True
    fake[:, :, 0, 0], fake[:, :, 0, 1], fake[:, 0, 0, 2], fake[:, :, 9, 9] = 0.6, 0.4, 0.5, 0.5
    strength, outside = forgery_strength(fake, source, inside, percentile=100)
    assert torch.allclose(strength[0, 0, :4], torch.tensor([1, 0.5, 0.25, 0], dtype=torch.float64)) and strength[0, 9, 9] == 0
    assert abs(float(outside) - 0.3 / (0.4 + 0.2 + 0.1 + 0.3)) < 1e-12
    lower, _ = forgery_strength(fake, source, inside, percentile=98)  # of 80 changes, the second largest is the scale
    assert torch.allclose(lower[0, 0, :3], torch.tensor([1, 1, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="inside"):
        forgery_strength(fake, source, inside[:, :5])


@pytest.fixture(scope="module")
def forged(tmp_path_factory):
    root = tmp_path_factory.mktemp("forged")
    forge_dataset(root, identities=8, frames_per_video=2, size=64, compressions=("raw", "c23"), progress=False)
    return read_catalog(root, split="test", compression="c23")


def test_strength_comes_from_the_uncompressed_pair_where_there_is_one(forged):
    detector = create_detector("resnet10", b=2, width=0.25).eval()
    plain = play_mask_game(detector, load_frames(forged, 64), ["uniform"], measures=["strength"], thresholds=[0.0], empty="skip")
    root, raw = forged.attrs["root"], forged.assign(frame=forged["frame"].str.replace("/c23/", "/raw/"))
    fakes = raw[(raw["label"] == 1) & raw["frame"].isin(plain["sample"].str.replace("/c23/", "/raw/"))]
    expected = []
    for row in fakes.itertuples():
        pair = [FrameDataset(pd.DataFrame([dict(frame=name, mask=row.mask, video="v", label=1)]), 64, root=root, with_mask=True)[0]
                for name in (row.frame, row.source_frame.replace("/c23/", "/raw/"))]
        change = np.abs(pair[0]["image"].numpy() - pair[1]["image"].numpy()).mean(0)
        mask = pair[0]["mask"][0].numpy() == 1
        expected.append(np.where(mask, np.minimum(change / np.percentile(change[mask], 99, method="higher"), 1), 0).mean())
    assert plain.attrs["change_outside"] < 0.01 and plain.attrs["strength_frames"] == len(fakes) == len(plain)
    assert np.abs(plain["score"].to_numpy() - expected).max() < 0.02
    with pytest.warns(UserWarning, match="lies outside the masks"):  # fakes beside frames of somebody else
        strangers = forged.assign(source_frame=forged["source_frame"].dropna().sample(len(forged), replace=True, random_state=0).to_numpy()[::-1])
        strangers.loc[strangers["label"] == 0, "source_frame"] = None
        strangers.attrs = dict(forged.attrs)
        play_mask_game(detector, load_frames(strangers, 64), ["uniform"], measures=["strength"], thresholds=[0.0], empty="skip")
    orphans = forged.assign(source_frame=forged["source_frame"].where(forged["method"] != "FaceSwap"))
    orphans.attrs = dict(forged.attrs)
    with pytest.warns(UserWarning, match="Strength is known of"):
        fewer = play_mask_game(detector, load_frames(orphans, 64), ["uniform"], measures=["weighted", "strength"], thresholds=[0.0], empty="skip")
    counted = fewer.groupby("weighting")["sample"].nunique()
    assert counted["strength"] < counted["weighted"] and not fewer["sample"][fewer["weighting"] == "strength"].str.contains("FaceSwap").any()


def test_the_mask_game_is_the_same_from_disk_and_from_memory(forged):
    torch.manual_seed(0)
    detector = create_detector("resnet10", b=2, width=0.25).eval()
    tables = [play_mask_game(detector, frames, ["bcos", "gradcam"], measures=MEASURES, thresholds=[0.0, 0.5], batch_size=size, empty="skip")
              for frames, size in ((load_frames(forged, 64), 16), (FrameDataset(forged, 64, with_mask=True), 3))]
    order = ["explainer", "sample", "weighting", "threshold"]
    one, other = (table.sort_values(order, ignore_index=True) for table in tables)
    assert one[order].equals(other[order]) and np.abs(one["score"] - other["score"]).max() < 1e-3


def test_control_detectors_are_explained_in_the_same_way(forged):
    torch.manual_seed(0)
    detector, other = (create_detector("resnet10", b=2, width=0.25).eval() for _ in range(2))
    frames = load_frames(forged, 64)
    table = play_mask_game(detector, frames, ["bcos"], controls={"random weights": other}, thresholds=[0.5], empty="skip")
    itself = play_mask_game(other, frames, ["bcos"], thresholds=[0.5], empty="skip")
    assert np.allclose(table.query("explainer == 'bcos, random weights'")["score"], itself["score"], atol=1e-6)
    ordinary = create_detector("resnet10", width=0.25)
    with pytest.raises(ValueError, match="ordinary network"):
        play_mask_game(detector, frames, ["bcos"], controls={"random weights": ordinary}, empty="skip")


@pytest.fixture(scope="module")
def frames():
    return red_frames(fakes=14, reals=40)


def test_several_fakes_in_a_grid(frames):
    detector = PatchDetector().eval()
    grids = build_grids(detector, frames, n=4, fakes=3, count=4)
    assert grids.positions.shape == (4, 3) and all(len(set(cells)) == 3 for cells in grids.positions.tolist())
    assert ((grids.indices < 14).sum(1) == 3).all() and grids.indices[grids.indices < 14].unique().numel() == 12
    assert sorted(grids.positions[:, 0].tolist()) == sorted(set(grids.positions[:, 0].tolist()))
    for k, cells in enumerate(grids.positions.tolist()):
        assert {cell for cell in range(16) if grids.indices[k, cell] < 14} == set(cells)
        assert {cell for cell in range(16) if grids.regions([k])[0].view(4, 24, 4, 24)[cell // 4, 0, cell % 4, 0]} == set(cells)
    table = play_grid_game(detector, frames, ["uniform"], grids=grids, measures=GRID_MEASURES)
    assert table.attrs["chance"] == 3 / 16 and np.allclose(table.query("weighting == 'iou'")["score"], 3 / 16)
    assert abs(table.query("weighting == 'specificity'")["score"]).max() < 1e-6
    with pytest.raises(ValueError, match="n² − 1 fakes"):
        build_grids(detector, frames, n=2, fakes=4)
    with pytest.raises(ValueError, match="Cells have no soft, strength"):
        play_grid_game(detector, frames, ["uniform"], grids=grids, measures=MEASURES)


def test_cells_of_another_size_are_the_resized_frames(frames):
    grids = build_grids(PatchDetector().eval(), frames, n=2, count=3, cell_size=12)
    images = grids.images([0])
    assert images.shape == (1, 3, 24, 24) and grids.regions([0]).sum() == 144
    row, column = divmod(int(grids.positions[0]), 2)
    expected = torch.nn.functional.interpolate(frames.images[grids.indices[0, grids.positions[0]]][None] / 255, size=(12, 12), mode="bilinear", antialias=True)
    assert torch.allclose(images[:, :, 12 * row : 12 * row + 12, 12 * column : 12 * column + 12], expected, atol=1e-6)


def test_a_common_set_has_only_what_all_detectors_are_sure_of(frames):
    strict = PatchDetector().eval()
    strict.cam_layer.weight.data.mul_(0.2)  # sees only the larger patches
    with pytest.warns(UserWarning, match="grids instead"):
        own, common = build_grids(strict, frames), build_grids([PatchDetector().eval(), strict], frames)
    fakes = lambda grids: set(grids.indices[grids.indices < 14].tolist())
    assert fakes(common) == fakes(own) and len(own) < 14
    with pytest.raises(ValueError, match="each of the 2 detectors"):
        build_grids([strict, strict], frames, scores=[frames.catalog.assign(probability=0.9)])


def test_transformers_play_by_windows(frames):
    torch.manual_seed(0)
    detector = create_detector("vitc_ti", b=2, width=0.34, depth=1, image_size=24, token_stride=8, stem="fine").eval()
    scores = frames.catalog.assign(probability=frames.labels.double().numpy() * 0.8 + 0.1)
    grids = build_grids(detector, frames, count=2, scores=scores)
    table = play_grid_game(detector, frames, ["bcos", "gradcam"], grids=grids, thresholds=[0.0])
    assert table.attrs["windows"] == (24, 12)
    maps = explain_windows(detector, grids.images([0, 1]), ["bcos"], window=24, stride=12)["bcos"].maps
    expected = (maps * grids.regions([0, 1])).sum((1, 2)) / maps.sum((1, 2))
    assert np.allclose(table.query("explainer == 'bcos' and weighting == 'weighted'")["score"], expected, atol=1e-5)
    whole = play_grid_game(detector, frames, ["bcos"], grids=grids, thresholds=[0.0], windows=None)
    assert whole.attrs["windows"] is None
    expected = explain(detector, grids.images([0]), "bcos").maps[0]
    assert np.isclose(whole.query("weighting == 'weighted'")["score"].iloc[0], (expected * grids.regions([0])[0]).sum() / expected.sum(), atol=1e-5)


def test_windows_refuse_methods_whose_maps_cannot_be_put_together():
    detector = create_detector("vitc_ti", b=2, width=0.34, depth=1, image_size=24, token_stride=8, stem="fine").eval()

    @register_explainer("scaled only")
    def scaled_only(question, requests):
        return {"scaled only": question.answer("scaled only", torch.ones_like(question.images[:, 0]))}

    try:
        with pytest.raises(ValueError, match="scaled image by image"):
            explain_windows(detector, torch.rand(1, 3, 48, 48), ["scaled only"])
        with pytest.raises(ValueError, match="Nearest side that they cover"):
            explain_windows(detector, torch.rand(1, 3, 50, 50), ["bcos"])
    finally:
        del EXPLAINERS["scaled only"]
