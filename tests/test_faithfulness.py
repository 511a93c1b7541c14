"""Insertion and deletion curves against closed forms and a loop over single pictures."""
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bcos_nb.data import Frames
from bcos_nb.games import (
    SCORE_COLUMNS, compare_explainers, describe_samples, draw_faithfulness, faithfulness_areas, faithfulness_curves, play_faithfulness, score_intervals,
)
from bcos_nb.games.faithfulness import BASELINES, WARNING, baseline_images, random_orders, removal_ranks
from bcos_nb.models import create_detector


class Linear(nn.Module):
    """logit of fake = Σ weight × red value: the worth of every pixel is known. Counts the pictures it is shown."""
    arch, b, is_bcos = "linear", None, False

    def __init__(self, side):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(side, side, generator=torch.Generator().manual_seed(1)) / side)
        self.shown = []

    def forward(self, images):
        self.shown.append(len(images))
        fake = (images[:, 0] * self.weight).sum((1, 2))
        return torch.stack([torch.zeros_like(fake), fake], 1)


def pictures(count, side, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def some_frames(count=10, side=16):
    images = (pictures(count, side) * 255).byte()
    labels = torch.arange(count) % 2
    catalog = pd.DataFrame({"frame": [f"rgb/{k:03}.png" for k in range(count)], "video": [f"v{k // 4}" for k in range(count)], "label": labels.numpy(), "method": "Deepfakes"})
    return Frames(images, None, labels, catalog["video"].tolist(), catalog)


def by_hand(detector, image, baseline, order, steps, target=1):
    """Deletion and insertion of one image, one picture at a time."""
    curves = {"deletion": [], "insertion": []}
    pixels = image.shape[1] * image.shape[2]
    for step in range(steps + 1):
        changed = order[: int(np.round(step * pixels / steps))]
        for curve, (start, other) in {"deletion": (image, baseline), "insertion": (baseline, image)}.items():
            picture = start.reshape(3, -1).copy()
            picture[:, changed] = other.reshape(3, -1)[:, changed]
            with torch.no_grad():
                logits = detector(torch.from_numpy(picture.reshape(1, *image.shape)))[0].double().numpy()
            curves[curve].append(np.exp(logits[target]) / np.exp(logits).sum())
    return {name: np.array(values) for name, values in curves.items()}


@pytest.mark.parametrize("steps", [1, 3, 7, 25])
@pytest.mark.parametrize("target", [0, 1])
def test_a_linear_detector_has_its_closed_form(steps, target):
    detector, images = Linear(5), pictures(4, 5)
    with torch.no_grad():
        maps = images[:, 0] * detector.weight
    curves = faithfulness_curves(detector, images, maps, steps=steps, baseline="black", target=target)
    worth = maps.flatten(1).double().sort(1, descending=True).values
    for step in range(steps + 1):
        gone = int(np.round(step * 25 / steps))
        for name, logit in (("deletion", worth[:, gone:].sum(1)), ("insertion", worth[:, :gone].sum(1))):
            assert torch.allclose(curves[name][step].double(), torch.sigmoid(logit if target else -logit), atol=1e-6)
    assert curves["deletion"].shape == (steps + 1, 4)
    if steps > 1:  # no order does better for a linear detector
        other = faithfulness_curves(detector, images, torch.rand(4, 5, 5), steps=steps, baseline="black", target=1)
        best = faithfulness_curves(detector, images, maps, steps=steps, baseline="black")
        assert (best["deletion"] <= other["deletion"] + 1e-6).all() and (best["insertion"] >= other["insertion"] - 1e-6).all()


@pytest.mark.parametrize("arch, b", [("resnet10", 2.0), ("resnet10", None)])
@pytest.mark.parametrize("baseline", ["blur", "mean"])
def test_curves_equal_a_loop_over_single_pictures(arch, b, baseline):
    torch.manual_seed(0)
    detector = create_detector(arch, b=b, width=0.25).eval()
    images, maps = pictures(2, 32), torch.rand(2, 32, 32).mul(4).round() / 4  # with many equals
    curves = faithfulness_curves(detector, images, maps, steps=3, baseline=baseline, seed=4)
    drawn = np.random.default_rng(4).random((2, 32 * 32)).argsort(1)
    other = baseline_images(images, baseline).numpy()
    for n in range(2):
        place = np.empty(32 * 32, dtype=int)
        place[drawn[n]] = np.arange(32 * 32)
        expected = by_hand(detector, images[n].numpy(), other[n], np.lexsort((place, -maps[n].numpy().ravel())), 3)
        for name in expected:
            assert np.abs(curves[name][:, n].numpy() - expected[name]).max() < 1e-5


def test_equals_go_in_a_random_order_that_the_seed_decides():
    ranks = removal_ranks(torch.ones(50, 20, 20), random_orders(50, 400, np.random.default_rng(0)))
    assert (ranks.sort(1).values == torch.arange(400)).all()
    early = (ranks < 40).view(50, 20, 20)
    assert abs(early[:, :10].float().mean() - 0.1) < 0.01 and not (early[0] == early[1]).all()  # top and bottom alike, each image its own
    halves = torch.zeros(1, 4, 4)
    halves[0, 2:] = 1
    ranks = removal_ranks(halves, random_orders(1, 16, np.random.default_rng(1)))[0]
    assert sorted(ranks[8:].tolist()) == list(range(8)) and ranks[8:].tolist() != list(range(8))
    detector, images = Linear(6), pictures(3, 6)
    first, again, other = (faithfulness_curves(detector, images, torch.ones(3, 6, 6), steps=6, baseline="black", seed=seed)["deletion"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_pictures_at_once_are_bounded_and_no_more_than_needed():
    detector, images = Linear(6), pictures(5, 6)
    whole = faithfulness_curves(detector, images, torch.rand(5, 6, 6, generator=torch.Generator().manual_seed(0)), steps=6)
    detector.shown.clear()
    split = faithfulness_curves(detector, images, torch.rand(5, 6, 6, generator=torch.Generator().manual_seed(0)), steps=6, batch_size=7)
    assert max(detector.shown) <= 7 and sum(detector.shown) == 5 * (2 + 2 * 5)
    assert all(torch.allclose(whole[name], split[name], atol=1e-6) for name in whole)


def test_the_detector_is_left_as_it_was():
    detector = create_detector("resnet10", b=2, width=0.25).train()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    curves = faithfulness_curves(detector, pictures(2, 32), torch.rand(2, 32, 32), steps=2)
    assert detector.training and not curves["deletion"].requires_grad and all(parameter.grad is None for parameter in detector.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())


def test_baselines():
    images = pictures(2, 32)
    assert baseline_images(images, "black").max() == 0
    assert torch.allclose(baseline_images(images, "mean")[1, 2], images[1, 2].mean())
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(baseline_images(flat, "blur"), flat, atol=1e-6) and baseline_images(images).std() < 0.7 * images.std()
    assert torch.equal(baseline_images(images, images.flip(0)), images.flip(0))
    assert baseline_images(pictures(1, 2)).shape == (1, 3, 2, 2)
    for wrong, words in (("white", "blur, black, mean"), (torch.tensor(2.0), "in .0, 1."), (torch.rand(3), "a colour is"), (torch.tensor(float("nan")), "in .0, 1.")):
        with pytest.raises(ValueError, match=words):
            baseline_images(images, wrong)


def test_wrong_input_is_refused_with_words():
    detector, images, maps = Linear(6), pictures(2, 6), torch.rand(2, 6, 6)
    hole = maps.clone()
    hole[1, 2, 3] = float("nan")
    for arguments, options, words in (
        ((images, maps[:1]), {}, r"\[2, 3, 6, 6\] and \[1, 6, 6\]"), ((images, maps[:, :5]), {}, "same size"), ((images[:0], maps[:0]), {}, "same size"),
        ((images, hole), {}, "Map 1 is not finite"), ((images * 255, maps), {}, r"in \[0, 1\]"), ((images, maps), {"steps": 0}, "1 to the 36 pixels"),
        ((images, maps), {"steps": 37}, "1 to the 36 pixels"), ((images, maps), {"target": 2}, "target must be"),
    ):
        with pytest.raises(ValueError, match=words):
            faithfulness_curves(detector, *arguments, **options)
    frames = some_frames()
    with pytest.raises(ValueError, match="no frame to play with: 5 frames, label=1"):
        play_faithfulness(Linear(16), frames[frames.labels == 0], [])
    with pytest.raises(ValueError, match="'bcos' cannot serve"):
        play_faithfulness(create_detector("resnet10", width=0.25), frames, ["bcos"])
    with pytest.raises(ValueError, match="both explainer and control"):
        play_faithfulness(create_detector("resnet10", width=0.25), frames, ["gradcam"], controls={"gradcam": torch.ones(16, 16)})
    with pytest.raises(ValueError, match="'random' must be one finite map.*got Linear"):  # a detector is a control of the pointing games only
        play_faithfulness(Linear(16), frames, controls={"random": Linear(16)})
    with pytest.raises(ValueError, match="'centre' must be one finite map"):
        play_faithfulness(Linear(16), frames, controls={"centre": torch.ones(8, 8)})


def test_the_game_has_every_curve_whatever_the_batches():
    torch.manual_seed(0)
    frames, detector = some_frames(10, 32), create_detector("resnet10", b=2, width=0.25).eval()
    controls = {"centre": torch.eye(32)}
    table = play_faithfulness(detector, frames, ["bcos", "gradcam"], controls=controls, steps=4)
    assert list(table.columns) == ["arch", "b", "explainer", "dataset", "compression", "sample", "curve", "fraction", "probability"]
    assert len(table) == 4 * 2 * 5 * 5 and table["sample"].unique().tolist() == [f"rgb/{k:03}.png" for k in (1, 3, 5, 7, 9)]
    assert table["explainer"].unique().tolist() == ["bcos", "gradcam", "centre", "uniform"] and table["fraction"].unique().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert table.attrs["warning"] == WARNING and (table["b"] == 2).all()
    assert np.allclose(play_faithfulness(detector, frames, ["bcos", "gradcam"], controls=controls, steps=4, batch_size=2)["probability"], table["probability"], atol=1e-5)
    images = frames.images[1::2].float() / 255
    curves = faithfulness_curves(detector, images, torch.ones(5, 32, 32), steps=4)
    for curve in curves:
        found = table.query("explainer == 'uniform' and curve == @curve").pivot_table(index="fraction", columns="sample", values="probability")
        assert np.allclose(found, curves[curve], atol=1e-5)
    real = play_faithfulness(detector, frames, label=0, steps=2, limit=3)
    assert real["sample"].unique().tolist() == ["rgb/000.png", "rgb/004.png", "rgb/008.png"] and real["explainer"].unique().tolist() == ["uniform"]
    assert play_faithfulness(detector, frames, label=None, steps=2)["sample"].nunique() == 10


def test_areas_are_a_score_table_that_the_statistics_take():
    frames, detector = some_frames(16), Linear(16)
    with torch.no_grad():
        controls = {"weights": detector.weight.clone(), "against": -detector.weight}
    table = play_faithfulness(detector, frames, controls=controls, steps=8, baseline="black")
    areas = faithfulness_areas(table.sample(frac=1, random_state=0))
    assert list(areas.columns) == list(SCORE_COLUMNS) and len(areas) == 3 * 2 * 8 and (areas["game"] == "faithfulness").all()
    for row in areas.itertuples():
        curve = table[(table["explainer"] == row.explainer) & (table["curve"] == row.weighting) & (table["sample"] == row.sample)]
        assert np.isclose(row.score, np.trapezoid(curve["probability"], curve["fraction"]))
    described = describe_samples(areas, frames.catalog)
    means = score_intervals(described).set_index(["explainer", "weighting"])["mean"]
    assert means["weights", "deletion"] < means["uniform", "deletion"] < means["against", "deletion"]
    assert means["weights", "insertion"] > means["uniform", "insertion"] > means["against", "insertion"]
    with pytest.warns(UserWarning, match="smallest p of 4 videos"):
        assert len(compare_explainers(described, against="uniform")) == 4
    with pytest.raises(ValueError, match="in the table twice"):
        faithfulness_areas(pd.concat([table, table]))
    with pytest.raises(ValueError, match="missing: probability"):
        faithfulness_areas(table.drop(columns="probability"))
    with pytest.raises(ValueError, match="missing: rows"):
        faithfulness_areas(table[:0])


def test_the_figure_carries_the_warning():
    table = play_faithfulness(Linear(16), some_frames(), controls={"mean mask": torch.eye(16)}, steps=4)
    figure = draw_faithfulness(table, "linear")
    assert " ".join(figure.get_supxlabel().split()) == " ".join(WARNING.split())
    deletion, insertion = figure.axes
    assert [line.get_linestyle() for line in deletion.lines] == ["--", "--"]
    expected = table.query("curve == 'insertion' and explainer == 'uniform'").groupby("fraction")["probability"].mean()
    line = next(line for line in insertion.lines if line.get_label().startswith("uniform"))
    assert np.allclose(line.get_xdata(), expected.index) and np.allclose(line.get_ydata(), expected)


def test_a_detector_of_edits_is_unmasked_by_the_random_order():
    class Roughness(nn.Module):
        arch, b, is_bcos = "roughness", None, False

        def forward(self, images):
            rough = 60 * (images.diff(dim=3).abs().mean((1, 2, 3)) - 0.1)
            return torch.stack([-rough, rough], 1)

    y, x = torch.meshgrid(torch.linspace(0.2, 0.8, 32), torch.linspace(0.2, 0.8, 32), indexing="ij")
    frames = some_frames(10, 32)
    frames.images = (torch.stack([x, y, 1 - x]) * 255).byte().expand(10, -1, -1, -1)  # smooth: nothing of a fake
    table = play_faithfulness(Roughness(), frames, label=0, steps=4, baseline="black").query("curve == 'deletion'")
    mean = table.groupby("fraction")["probability"].mean()
    assert mean[0.0] < 0.01 and mean[0.5] > 0.99 and mean[1.0] < 0.01
    assert set(BASELINES) == {"blur", "black", "mean"}
