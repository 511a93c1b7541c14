"""Steps away from a single face: geometry, determinism, scores that are known in advance, and what is refused."""
import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from bcos_nb.data import Frames
from bcos_nb.explainers import EXPLAINERS, explain, register_explainer
from bcos_nb.games import SCORE_COLUMNS
from bcos_nb.games.departure import DEPARTURES, departed, play_departure, smaller_masks
from bcos_nb.games.statistics import score_intervals
from bcos_nb.models import create_detector
from bcos_nb.reports.departure_figures import departure_figure, departure_means

SIZE = 32
STEPS = [(family, step) for family, departure in DEPARTURES.items() for step in range(len(departure.values))]


class BrightnessDetector(nn.Module):
    """p(fake) grows with the brightest 4 × 4 block, so that a bright square is a forgery wherever it lies."""

    arch, b, is_bcos = "brightness", None, False

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(6.0))

    def forward(self, images):
        brightest = F.avg_pool2d(images.mean(1, keepdim=True), 4, 1).amax((1, 2, 3))
        return torch.stack([torch.zeros_like(brightest), self.gain * (brightest - 0.5)], 1)


@pytest.fixture
def brightness_explainer():
    """Marks what is brighter than everything a real frame of these tests shows."""
    @register_explainer("bright")
    def bright(question, requests):
        return {"bright": question.answer("bright", (question.images.mean(1) > 0.55).float())}

    yield "bright"
    del EXPLAINERS["bright"]


def planted(count=12, side=12, masked=True):
    """As many fakes as real frames, 32 px: mid grey stripes; each fake has a white square, which is its mask, in a place of its own."""
    random = np.random.default_rng(0)
    images = torch.full((2 * count, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    images += torch.tensor(random.integers(0, 30, (2 * count, 3, 1, SIZE)), dtype=torch.uint8)
    masks = torch.zeros(2 * count, 1, SIZE, SIZE, dtype=torch.uint8)
    for k in range(count):
        top, left = random.integers(1, SIZE - side, 2)  # off the border, whose colour is that of a margin
        images[k, :, top:top + side, left:left + side] = 255
        masks[k, 0, top:top + side, left:left + side] = 255
    labels = torch.tensor([1] * count + [0] * count)
    catalog = pd.DataFrame(dict(frame=[f"f/{k:03d}.png" for k in range(2 * count)], mask=None, video=[f"v{k}" for k in range(2 * count)],
                                label=labels.numpy(), method=["planted"] * count + [None] * count, source_frame=None))
    catalog.attrs.update(root="nowhere", dataset="planted", compression="raw")
    return Frames(images, masks if masked else None, labels, catalog["video"].tolist(), catalog)


def tensors(frames):
    """Images in [0, 1] and masks of the fakes, and images of the real ones."""
    fake = frames.labels == 1
    return frames.images[fake].float() / 255, frames.masks[fake, 0] == 255, frames.images[~fake].float() / 255


# ---- the steps

@pytest.mark.parametrize("family", DEPARTURES)
def test_step_0_is_the_frame_as_it_is(family):
    images, masks, _ = tensors(planted())
    same, regions = departed(images, masks, family, 0, 3)
    assert torch.equal(same, images) and list(regions) == ["mask"] and torch.equal(regions["mask"], masks)
    assert departed(images, None, family, 0)[1] == {}


@pytest.mark.parametrize("family, step", STEPS)
def test_a_planted_square_is_found_in_its_region_at_every_step(family, step):
    """The region covers the square and nothing else, up to what the step itself smears over the edge."""
    images, masks, others = tensors(planted(side=16))
    moved, regions = departed(images, masks, family, step, 1, others=others)
    assert moved.shape[2:] == regions["mask"].shape[1:] and float(moved.min()) >= 0 and float(moved.max()) <= 1
    grey = F.avg_pool2d(moved.mean(1, keepdim=True), 3, 1, 1, count_include_pad=False)[:, 0] if family == "noise" else moved.mean(1)
    for bright, inside in zip(grey, regions["mask"]):
        centre = inside.nonzero().double().mean(0)
        weight = (bright.double() - 0.55).clamp(min=0)
        ys, xs = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in bright.shape), indexing="ij")
        at = torch.stack([(weight * ys).sum(), (weight * xs).sum()]) / weight.sum()
        assert bright[inside].mean() > bright[~inside].mean() + (0.15 if family == "resolution" and step > 3 else 0.3)
        assert (at - centre).abs().max() < (3 if family in ("noise", "resolution") else 1)


@pytest.mark.parametrize("step, n", [(1, 2), (2, 2), (3, 3)])
def test_a_grid_is_the_frames_that_went_in(step, n):
    images, masks, others = tensors(planted(20))
    grids, regions = departed(images, masks, "grid", step, 4, others=others)
    cells = grids.view(len(images), 3, n, SIZE, n, SIZE).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    is_own = (cells == images[:, None]).flatten(2).all(2)
    assert (is_own.sum(1) == 1).all() and len(is_own.int().argmax(1).unique()) > 1
    marked = regions["cell"].view(len(images), n, SIZE, n, SIZE).permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)
    assert (marked.all(2) == is_own).all() and (marked.any(2) == is_own).all()
    assert (regions["mask"].flatten(1).sum(1) == masks.flatten(1).sum(1)).all() and not (regions["mask"] & ~regions["cell"]).any()
    is_other = (cells[:, :, None] == others[None, None]).flatten(3).all(3)  # [N, n·n, M]
    assert (is_other.any(2).sum(1) == (0 if step == 1 else n * n - 1)).all()
    assert (is_other.any(1).sum(1) == is_other.any(2).sum(1)).all()  # nobody twice


def test_from_the_margin_to_2_by_2_only_the_neighbours_change():
    images, masks, others = tensors(planted())
    (margin, at), (grid, also) = (departed(images, masks, "grid", step, 2, others=others) for step in (1, 2))
    assert all(torch.equal(at[name], also[name]) for name in ("mask", "cell"))
    same = (margin == grid).all(1)
    assert same[at["cell"]].all() and same[~at["cell"]].float().mean() < 0.1


def test_noise_has_its_deviation_and_is_one_field_at_every_step():
    grey = torch.full((3, 3, 64, 64), 0.5)
    fields = [departed(grey, None, "noise", step)[0] - grey for step in range(1, 4)]
    for field, sigma in zip(fields, DEPARTURES["noise"].values[1:]):
        assert abs(float(field.std()) - sigma) < 0.02 * sigma and abs(float(field.mean())) < 0.02 * sigma
    assert torch.allclose(fields[0] / 0.02, fields[1] / 0.05, atol=1e-4)
    assert abs(float(torch.corrcoef(torch.stack([fields[0][0].flatten(), fields[0][1].flatten()]))[0, 1])) < 0.05


def test_compression_is_jpeg():
    """Against Pillow, an encoder of its own."""
    images, _, _ = tensors(planted(3))
    for step, quality in list(enumerate(DEPARTURES["compression"].values))[1:]:
        ours = departed(images, None, "compression", step)[0]
        for image, mine in zip(images, ours):
            file = io.BytesIO()
            Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=int(quality))
            theirs = torch.tensor(np.asarray(Image.open(file)).astype(np.float32) / 255).permute(2, 0, 1)
            assert float((mine - theirs).abs().max()) < 3 / 255


def test_resolution_takes_away_what_is_finer_than_its_factor():
    y, x = np.mgrid[:64, :64]
    waves = torch.tensor(np.stack([0.5 + 0.4 * np.sin(2 * np.pi * (x + 0.5) / period) for period in (4, 32)]), dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    kept = [departed(waves, None, "resolution", step)[0].std((1, 2, 3)) / waves.std((1, 2, 3)) for step in range(6)]
    assert kept[0].tolist() == [1, 1] and kept[3][0] < 0.1 and kept[3][1] > 0.85 and all(a[1] >= b[1] for a, b in zip(kept, kept[1:]))


@pytest.mark.parametrize("step", range(1, 5))
def test_a_shrunk_face_has_its_size_and_lies_anywhere(step):
    images, masks, _ = tensors(planted(60, side=16))
    size = round(SIZE * DEPARTURES["scale"].values[step])
    _, regions = departed(images, masks, "scale", step)
    assert (regions["cell"].flatten(1).sum(1) == size**2).all()
    tops = regions["cell"].any(2).int().argmax(1)
    assert int(tops.min()) <= 1 and int(tops.max()) >= SIZE - size - 1
    share = regions["mask"].float().mean() / masks.float().mean()
    assert abs(float(share) - DEPARTURES["scale"].values[step] ** 2) < 0.2 * float(share)


def test_a_mask_never_vanishes_and_an_empty_one_stays_empty():
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, 7, 9], masks[1, :, 5] = True, True
    small = smaller_masks(masks, (8, 8))
    assert small[0, 1, 2] and small[1, :, 1].all() and not small[2].any() and small.sum() <= 20


# ---- the same again

@pytest.mark.parametrize("family, step", STEPS)
def test_what_is_drawn_depends_on_seed_and_frame_alone(family, step):
    images, masks, others = tensors(planted())
    whole, regions = departed(images, masks, family, step, 7, others=others)
    again, _ = departed(images, masks, family, step, 7, others=others)
    part, some = departed(images[4:7], masks[4:7], family, step, 7, numbers=[4, 5, 6], others=others)
    assert torch.equal(whole, again) and torch.allclose(whole[4:7], part, atol=1e-6) and all(torch.equal(regions[name][4:7], some[name]) for name in some)
    if step and family in ("grid", "noise", "scale"):
        assert not torch.equal(departed(images, masks, family, step, 8, others=others)[0], whole)


# ---- the curve

def test_a_map_that_finds_the_forgery_scores_1_wherever_it_goes_and_a_uniform_one_the_chance_level(brightness_explainer):
    frames = planted(side=16)
    control = {"left half": (torch.arange(SIZE) < SIZE // 2).float().expand(SIZE, SIZE).contiguous()}
    table = play_departure(BrightnessDetector(), frames, ["bright", "uniform"], families=["grid", "compression", "scale"], thresholds=(0.0, 0.5), controls=control)
    assert list(table.columns) == [*SCORE_COLUMNS, "video", "family", "step", "value", "region", "chance", "probability", "auc"]
    assert table.attrs["frames"] == table.attrs["reals"] == 12 and set(table["game"]) == {"departure"} and table["b"].isna().all()
    assert set(table["dataset"]) == {"planted"} and set(table["compression"]) == {"raw"}
    steps = {(family, step, region) for family, step, region in zip(table["family"], table["step"], table["region"])}
    assert steps == {("grid", s, r) for s in range(4) for r in ("mask", "cell") if s or r == "mask"} | {("compression", s, "mask") for s in range(7)} \
        | {("scale", s, r) for s in range(5) for r in ("mask", "cell") if s or r == "mask"}
    assert len(table) == len(steps) * 3 * 2 * 2 * 12  # explainers, weightings, thresholds, frames
    bright, uniform = table.query("explainer == 'bright'"), table.query("explainer == 'uniform'")
    grid = bright.query("family == 'grid'")
    assert np.allclose(grid["score"], 1) and np.allclose(bright.query("region == 'cell'")["score"], 1)
    assert (bright.query("family == 'scale'").groupby("step")["score"].mean() > 0.8).all()
    assert np.allclose(uniform["score"], uniform["chance"], atol=1e-6)
    share = 16 * 16 / SIZE**2
    chance = table.groupby(["family", "region", "step"])["chance"].mean()
    assert np.allclose(chance["grid", "cell"], [1 / 4, 1 / 4, 1 / 9]) and np.allclose(chance["grid", "mask"], [share, share / 4, share / 4, share / 9])
    assert np.allclose(chance["scale", "cell"], [(round(SIZE * s) / SIZE) ** 2 for s in DEPARTURES["scale"].values[1:]])
    left = table.query("explainer == 'left half' and threshold == 0 and weighting == 'weighted'")
    assert np.allclose(left.query("region == 'cell' and family == 'grid'")["score"], left.query("region == 'cell' and family == 'grid'")["chance"])
    for frame, rows in left.query("family == 'compression'").groupby("sample"):
        k = int(frame[2:5])
        assert np.allclose(rows["score"], float(frames.masks[k, 0, :, : SIZE // 2].float().sum() / frames.masks[k, 0].float().sum()) * share * 2, atol=1e-5)
    detection = table.groupby(["family", "step"])[["auc", "probability"]].mean()
    assert np.allclose(detection["auc"], 1) and math.isclose(detection["probability"]["grid", 3], detection["probability"]["grid", 0], abs_tol=1e-6)


def test_detection_is_that_of_the_departed_frames():
    """Noise of 0.2 on a faint forgery: the AUC and the probabilities by hand."""
    frames, detector = planted(side=6), BrightnessDetector()
    frames.images = torch.where(frames.images == 255, torch.tensor(130, dtype=torch.uint8), frames.images)
    table = play_departure(detector, frames, ["uniform"], families=["noise"], thresholds=(0.0,), seed=3)
    logits = []
    for label in (1, 0):
        rows = (frames.labels == label).nonzero()[:, 0]
        logits.append(detector(departed(frames.images[rows].float() / 255, None, "noise", 4, 3, numbers=rows.tolist())[0]).detach())
    fake = torch.cat(logits).softmax(1)[:, 1].numpy()
    rows = table.query("step == 4 and weighting == 'weighted'")
    assert np.allclose(rows["probability"], fake[:12], atol=1e-6) and 0.5 < rows["auc"].iloc[0] < 1
    assert math.isclose(rows["auc"].iloc[0], roc_auc_score([1] * 12 + [0] * 12, fake))


def test_scores_do_not_depend_on_the_batch_and_the_detector_is_left_as_it_was():
    frames = planted(9)
    torch.manual_seed(0)
    detector = create_detector("resnet10", b=2, width=0.25, image_size=SIZE).train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    tables = [play_departure(detector, frames, ["bcos", "gradcam"], families=["grid", "noise"], thresholds=(0.0,), batch_size=size) for size in (2, 64)]
    assert list(tables[0]["sample"]) == list(tables[1]["sample"])
    for column in ("score", "probability", "auc", "chance"):
        assert np.allclose(tables[0][column], tables[1][column], atol=2e-3), column
    assert detector.training and all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


def test_of_many_frames_some_are_taken_from_everywhere_and_without_masks_the_cells_are_left():
    frames = planted(30)
    table = play_departure(BrightnessDetector(), frames, ["uniform"], families=["scale"], thresholds=(0.0,), count=4)
    assert sorted(table["sample"].unique()) == [f"f/{k:03d}.png" for k in (0, 10, 19, 29)] and table.attrs["reals"] == 4
    frames.masks[0] = 0
    with pytest.warns(UserWarning, match="1 of 30 fakes"):
        table = play_departure(BrightnessDetector(), frames, ["uniform"], families=["noise"], thresholds=(0.0,))
    assert table["sample"].nunique() == 29
    only_fakes = frames[1:30]
    table = play_departure(BrightnessDetector(), only_fakes, ["uniform"], families=["resolution"], thresholds=(0.0,))
    assert table["auc"].isna().all() and table["probability"].between(0, 1).all()


# ---- mistakes

def test_a_transformer_sees_a_grid_by_windows_and_a_frame_whole():
    torch.manual_seed(0)
    detector = create_detector("vitc_ti", b=2, width=1 / 3, depth=1, image_size=SIZE, token_stride=8, stem="fine")
    frames = planted(9)
    played = play_departure(detector, frames, ["gradcam"], families=["grid", "noise"], thresholds=(0.0,), seed=3)
    whole = play_departure(detector, frames, ["gradcam"], families=["grid", "noise"], thresholds=(0.0,), seed=3, windows=None)
    larger = (played["family"] == "grid") & (played["step"] > 0)
    assert played.attrs["windows"] == (SIZE, SIZE // 2) and whole.attrs["windows"] is None
    assert np.allclose(played["probability"], whole["probability"], atol=1e-6) and np.allclose(played["auc"], whole["auc"])
    assert np.allclose(played["score"][~larger], whole["score"][~larger], atol=1e-6) and not np.allclose(played["score"][larger], whole["score"][larger], atol=1e-3)

    # the step with a margin once more: each window explained by itself, maps added up where they overlap, before any rescaling
    images, masks = frames.images[:9].float() / 255, frames.masks[:9, 0] > 0
    grids, regions = departed(images, masks, "grid", 1, 3, others=frames.images[9:].float() / 255)
    total, times = torch.zeros(9, 2 * SIZE, 2 * SIZE), torch.zeros(2 * SIZE, 2 * SIZE)
    for top in range(0, SIZE + 1, SIZE // 2):
        for left in range(0, SIZE + 1, SIZE // 2):
            cut = (..., slice(top, top + SIZE), slice(left, left + SIZE))
            total[cut] += explain(detector, grids[cut], "gradcam").raw
            times[cut[1:]] += 1
    maps = total / times
    expected = (maps * regions["mask"]).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-12)
    row = played[(played["family"] == "grid") & (played["step"] == 1) & (played["region"] == "mask") & (played["weighting"] == "weighted")]
    assert np.allclose(row["score"], expected, atol=1e-4)


def test_mistakes_are_named():
    images, masks, others = tensors(planted())
    for said, arguments in (
        ("grid, noise", (images, masks, "blur", 1)), ("steps 0 to 4", (images, masks, "noise", 5)), ("steps 0 to 3", (images, masks, "grid", -1)),
        ("at least 9 other faces", (images, masks, "grid", 2)), ("floats", ((images * 255).byte(), masks, "noise", 1)),
        ("masks must be bool", (images, masks[:, ::2], "noise", 1)), ("masks must be bool", (images, masks.float(), "noise", 1)),
    ):
        with pytest.raises(ValueError, match=said):
            departed(*arguments)
    with pytest.raises(ValueError, match="numbers must name each of the 12"):
        departed(images, masks, "noise", 1, numbers=[1])
    with pytest.raises(ValueError, match="at least 9 other faces"):
        departed(images, masks, "grid", 3, others=others[:8])
    frames, detector = planted(), BrightnessDetector()
    for said, change in (
        ("no explainer 'gradcam1'", dict(explainers=["gradcam1"])), ("families=", dict(families=["blur"])), ("each once", dict(families=["noise", "noise"])),
        ("frames' size.*got BrightnessDetector", dict(controls={"mine": BrightnessDetector()})),
        ("frames' size", dict(controls={"mine": torch.ones(8, 8)})), ("both explainer and control", dict(controls={"uniform": torch.ones(SIZE, SIZE)})),
        ("Name an explainer", dict(explainers=[])),
    ):
        with pytest.raises(ValueError, match=said):
            play_departure(detector, frames, **{"explainers": ["uniform"], **change})
    few = frames[:16]
    with pytest.raises(ValueError, match="grid needs 9 real frames.*there are 4"):
        play_departure(detector, few, ["uniform"])
    reals = frames[12:]
    with pytest.raises(ValueError, match="no fake"):
        play_departure(detector, reals, ["uniform"])
    with pytest.raises(ValueError, match="masks"):
        play_departure(detector, planted(masked=False), ["uniform"])


# ---- the figure

def test_the_figure_shows_the_means(brightness_explainer):
    table = play_departure(BrightnessDetector(), planted(), ["bright", "uniform"], families=["grid", "noise"], thresholds=(0.0, 0.5),
                           controls={"left half": (torch.arange(SIZE) < SIZE // 2).float().expand(SIZE, SIZE).contiguous()})
    figure = departure_figure(table, 0.5, region="cell")
    assert [title.text.split("<")[0] for title in figure.layout.annotations] == ["grid"]
    curve = next(trace for trace in figure.data if trace.name == "uniform map" or trace.name == "uniform")
    assert np.allclose(curve.y, [1 / 4, 1 / 4, 1 / 9]) and [label.replace("<br>", " ") for label in figure.layout.xaxis.ticktext] == ["1 in 2 × 2", "2 × 2", "3 × 3"]
    means = departure_means(table, 0.5)
    by_hand = table[(table["threshold"] == 0.5) & (table["weighting"] == "weighted") & (table["family"] == "noise") & (table["step"] == 2) & (table["explainer"] == "bright")]
    assert math.isclose(means.query("explainer == 'bright' and family == 'noise' and step == 2")["score"].iloc[0], by_hand["score"].mean())
    left = table[(table["threshold"] == 0) & (table["weighting"] == "weighted") & (table["family"] == "noise") & (table["step"] == 2) & (table["explainer"] == "left half")]
    by_video = score_intervals(left, ["explainer"]).iloc[0]
    row = departure_means(table).query("explainer == 'left half' and family == 'noise' and step == 2").iloc[0]
    assert np.allclose(row[["low", "high"]].astype(float), by_video[["low", "high"]].astype(float)) and row["low"] < row["score"] < row["high"]
    assert departure_means(table.drop(columns="video"), 0.5)["low"].isna().all()
    with pytest.raises(ValueError, match="thresholds 0, 0.5"):
        departure_means(table, 0.3)
