"""LIME against the package itself, for the same seeds; and what the package does not promise: batches, memory, threads, errors."""
import contextlib
import io
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from bcos_nb.explainers import EXPLAINERS, explain, local_models, superpixels
from bcos_nb.explainers import lime as module
from bcos_nb.explainers.attribution import Question, undisturbed
from bcos_nb.models import create_detector

DETECTORS = [("resnet10", None), ("resnet10", 2.0), ("vitc_ti", None), ("vitc_ti", 2.0), pytest.param("xception", 1.75, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def images():
    """Three smooth pictures of a few coloured blobs, which quickshift cuts into different numbers of superpixels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=64, mode="bilinear", align_corners=True)
    return (smooth + 0.1 * torch.rand(3, 3, 64, 64, generator=generator)).clamp(0, 1)


def detector_of(arch, b, sharpness=1.0):
    torch.manual_seed(1)
    detector = create_detector(arch, b=b, width=0.25, image_size=64)
    for layer in detector.modules():
        if hasattr(layer, "running_var"):
            layer.momentum = 1.0
    with torch.no_grad():  # statistics of something, without which a deep untrained B-cos network says 1e-30
        detector.train()(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(2)))
    detector.eval()
    return Sharpened(detector, sharpness).eval() if sharpness != 1 else detector


class Sharpened(torch.nn.Module):
    """A detector whose logits are larger, so that an untrained one has opinions."""

    def __init__(self, detector, sharpness):
        super().__init__()
        self.detector, self.sharpness = detector, sharpness
        self.arch, self.b, self.is_bcos = detector.arch, detector.b, detector.is_bcos

    def forward(self, images):
        return self.sharpness * self.detector(images)


def package(detector, image, target, *, seed, output="probability", batch_size=32, kernel_width=0.25, alpha=None, **options):
    """What `lime` says of one image: segments, and the weight of each superpixel."""
    from lime.lime_image import LimeImageExplainer
    from sklearn.linear_model import Ridge

    def classifier(pictures):
        batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(next(detector.parameters()).dtype)
        with torch.no_grad():
            logits = detector(batch)
        return (logits.softmax(1) if output == "probability" else logits).numpy()

    explainer = LimeImageExplainer(random_state=seed, kernel_width=kernel_width, feature_selection=options.pop("feature_selection", "auto"))
    options = dict(hide_color=0, num_samples=64, random_seed=42) | options
    if alpha is not None:
        options["model_regressor"] = Ridge(alpha=alpha)
    picture = image.permute(1, 2, 0).double().numpy()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        found = explainer.explain_instance(picture, classifier, labels=(target,), top_labels=None, batch_size=batch_size, **options)
    weights = np.zeros(found.segments.max() + 1)
    for superpixel, weight in found.local_exp[target]:
        weights[superpixel] = weight
    return found.segments, weights, found


def map_of(segments, weights):
    """The study's map, superpixel by superpixel."""
    painted, largest = np.zeros(segments.shape), max(weights.max(), 0)
    for superpixel, weight in enumerate(weights):
        if weight > 0:
            painted[segments == superpixel] = weight / largest
    return painted


@pytest.mark.parametrize("arch,b", DETECTORS)
def test_maps_and_contributions_equal_the_package(arch, b, images):
    detector, target = detector_of(arch, b), torch.tensor([1, 0, 1])
    answer = explain(detector, images, "lime", target, samples=64, seed=7)
    for n in range(3):
        segments, weights, _ = package(detector, images[n], int(target[n]), seed=7)
        assert len(weights) > 3
        assert np.abs(answer.contributions[n].numpy() - weights[segments]).max() < 1e-6
        assert np.abs(answer.maps[n].numpy() - map_of(segments, weights)).max() < 1e-4
    assert answer.maps.dtype == torch.float32 and answer.maps.amax((1, 2)).tolist() == [1, 1, 1]
    with torch.no_grad():
        assert torch.allclose(answer.logits, detector(images), atol=1e-5)


def test_where_the_answers_agree_so_do_the_weights(images):
    """In float64 the detector's answers are the same to 1e-15, and what is left is the regression."""
    detector = detector_of("resnet10", 2.0, 30.0).double()
    question = Question(detector, images[:2].double(), torch.ones(2, dtype=torch.long))
    with undisturbed(detector):
        models = local_models(question, samples=64, seed=3)
    for n in range(2):
        _, weights, found = package(detector, question.images[n], 1, seed=3)
        assert np.abs(models.weights[n, : len(weights)].numpy() - weights).max() < 1e-9 * np.abs(weights).max()
        assert not models.weights[n, len(weights) :].any()
        assert abs(float(models.intercept[n]) - found.intercept[1]) < 1e-10 and abs(float(models.score[n]) - found.score) < 1e-9


@pytest.mark.parametrize("options,theirs", [
    (dict(hide_color=None), dict(hide_color=None)),
    (dict(hide_color=(0.1, 0.5, 0.9)), dict(hide_color=(0.1, 0.5, 0.9))),
    (dict(kernel_width=1.5, distance_metric="euclidean"), dict(kernel_width=1.5, distance_metric="euclidean")),
    (dict(num_features=3), dict(num_features=3)),
    (dict(num_features=7), dict(num_features=7)),
    (dict(num_features=4, feature_selection="highest_weights"), dict(num_features=4, feature_selection="highest_weights")),
    (dict(num_features=4, feature_selection="lasso_path"), dict(num_features=4, feature_selection="lasso_path")),
    (dict(num_features=2, feature_selection="none"), dict(num_features=2, feature_selection="none")),
    (dict(ridge_alpha=0.1), dict(alpha=0.1)),
    (dict(output="logit"), dict(output="logit")),
    (dict(batch_size=17), dict(batch_size=17)),
    (dict(samples=5), dict(num_samples=5)),
])
def test_options_are_those_of_the_package(options, theirs, images):
    detector = detector_of("resnet10", None, 20.0)
    answer = explain(detector, images[:2], "lime", **dict(samples=64, seed=1) | options)
    for n in range(2):
        segments, weights, _ = package(detector, images[n], 1, seed=1, **theirs)
        assert np.abs(answer.maps[n].numpy() - map_of(segments, weights)).max() < 1e-4
        if theirs.get("num_features") and theirs.get("feature_selection") != "none":
            assert (weights != 0).sum() <= theirs["num_features"]


def test_segmentation_options_reach_quickshift_and_another_cut_is_possible(images):
    from skimage.segmentation import quickshift, slic

    picture = images[0].permute(1, 2, 0).double().numpy()
    finer = superpixels(images[:1], kernel_size=2, max_dist=20, ratio=0.5)[0]
    assert np.array_equal(finer, quickshift(picture, kernel_size=2, max_dist=20, ratio=0.5)) and finer.max() > superpixels(images[:1]).max()

    def blocks(picture):
        return slic(picture, n_segments=6, start_label=0)

    detector = detector_of("resnet10", None, 20.0)
    answer = explain(detector, images[:1], "lime", samples=64, segmentation_fn=blocks)
    segments, weights, _ = package(detector, images[0], 1, seed=0, segmentation_fn=blocks)
    assert np.array_equal(np.unique(segments), np.arange(len(weights)))
    assert np.abs(answer.maps[0].numpy() - map_of(segments, weights)).max() < 1e-4


class Planted(torch.nn.Module):
    """Says fake the more, the brighter one rectangle is; nothing else matters to it."""

    def __init__(self, rows, columns, sign=1.0):
        super().__init__()
        self.rows, self.columns, self.sign = rows, columns, sign
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        light = images[:, :, self.rows, self.columns].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(light), self.sign * 4 * light + self.anchor], 1)


def quarters(picture):
    """Sixteen square superpixels."""
    height, width = picture.shape[:2]
    return (np.arange(height) * 4 // height)[:, None] * 4 + (np.arange(width) * 4 // width)[None]


def test_the_one_superpixel_that_matters_is_found():
    images = torch.full((2, 3, 32, 32), 0.5)
    images[1] = 0.9
    detector = Planted(slice(8, 16), slice(16, 24))
    answer = explain(detector, images, "lime", segmentation_fn=quarters)
    expected = torch.zeros(32, 32)
    expected[8:16, 16:24] = 1
    assert torch.equal((answer.maps == 1).float(), expected.expand(2, -1, -1)) and (answer.maps * (1 - expected)).max() < 0.05
    away = explain(detector, images, "lime", target=0, segmentation_fn=quarters)  # what speaks for fake speaks against real
    assert torch.allclose(away.contributions, -answer.contributions, atol=1e-6)
    assert (away.contributions[:, 12, 20] < 0).all() and (away.maps[:, 12, 20] == 0).all()


def test_a_linear_answer_is_recovered_exactly():
    """The logit is a weighted sum of the superpixels' light, so that the model with hardly any ridge is the detector."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64))

        def forward(self, images):
            light = torch.nn.functional.avg_pool2d(images.mean(1), 8)
            return torch.stack([torch.zeros(len(images), dtype=images.dtype), (self.weight * light).sum((1, 2)) + 0.25], 1)

    images = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    detector = Linear()
    with undisturbed(detector):
        models = local_models(Question(detector, images, torch.tensor([1])), segmentation_fn=quarters, output="logit", ridge_alpha=1e-9)
    assert torch.allclose(models.weights[0], 0.5 * detector.weight.detach().flatten(), atol=1e-7)
    assert torch.allclose(models.intercept, torch.tensor([0.25], dtype=torch.float64), atol=1e-7) and models.score[0] > 1 - 1e-10


def test_no_evidence_gives_an_empty_map():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    constant = explain(Planted(slice(8, 16), slice(16, 24), sign=0.0), images, "lime", segmentation_fn=quarters)
    assert not constant.maps.any()
    one = explain(Planted(slice(0, 32), slice(0, 32), sign=-1.0), images, "lime", segmentation_fn=lambda picture: np.zeros(picture.shape[:2], int))
    assert not one.maps.any() and (one.contributions < 0).any() and torch.isfinite(one.contributions).all()


def test_an_image_does_not_depend_on_its_neighbours_and_repeats(images):
    detector = detector_of("resnet10", 2.0, 20.0)
    together = explain(detector, images, "lime", samples=64)
    again = explain(detector, images, "lime", samples=64)
    assert torch.equal(again.maps, together.maps)
    assert not torch.equal(explain(detector, images, "lime", samples=64, seed=1).maps, together.maps)
    for n in range(3):
        assert torch.allclose(explain(detector, images[n : n + 1], "lime", samples=64).maps[0], together.maps[n], atol=1e-6)


@pytest.mark.parametrize("batch_size,samples", [(10, 24), (64, 24), (7, 7), (1, 3)])
def test_memory_is_flat_and_batches_are_full(batch_size, samples):
    """The detector never sees more than batch_size images, whatever the number of images and samples, and few batches are not full."""
    detector = Planted(slice(0, 8), slice(0, 8))
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    explain(detector, images, "lime", samples=samples, batch_size=batch_size, segmentation_fn=quarters)
    assert max(detector.sizes) <= batch_size and sum(detector.sizes) == 5 * samples  # the images themselves are samples 0
    assert all(size == batch_size for size in detector.sizes[:-1])


def test_superpixels_are_cut_once_for_all_detectors(images, monkeypatch):
    from lime.wrappers import scikit_image

    cuts = []
    original = scikit_image.SegmentationAlgorithm.__call__
    monkeypatch.setattr(scikit_image.SegmentationAlgorithm, "__call__", lambda self, *args: cuts.append(1) or original(self, *args))
    module.SEGMENTS.clear()
    twice = torch.cat([images, images[:1]])
    for detector in (detector_of("resnet10", None), detector_of("resnet10", 2.0)):
        explain(detector, twice, "lime", samples=8)
    assert len(cuts) == 3
    explain(detector, images[:1], "lime", samples=8, kernel_size=3)
    explain(detector, (images[:1] + 0.01).clamp(0, 1), "lime", samples=8)
    assert len(cuts) == 5
    module.SEGMENTS.clear()
    threads = [threading.Thread(target=superpixels, args=(images,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuts) == 8 and module.SEGMENTS.held == sum(future.result().nbytes for future in module.SEGMENTS.kept.values())


def test_a_cut_that_fails_is_not_remembered():
    cache = module.SegmentCache(100)

    def fails():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        cache.get(("a",), fails)
    assert cache.get(("a",), lambda: np.ones(3, np.uint8)).sum() == 3 and cache.held == 3
    assert cache.get(("b",), lambda: np.ones(200, np.uint8)).sum() == 200 and cache.held == 0  # larger than the cache


@pytest.mark.parametrize("options,words", [
    (dict(samples=1), "samples must be"),
    (dict(samples=2.5), "samples must be"),
    (dict(batch_size=0), "batch_size must be"),
    (dict(hide_color=255), "hide_color must be in"),
    (dict(hide_color=(0, 0)), "hide_color must be in"),
    (dict(num_features=0), "num_features must be"),
    (dict(feature_selection="best"), "forward_selection"),
    (dict(output="loss"), "probability"),
    (dict(kernel_width=0), "kernel_width must be"),
    (dict(kernel_width=float("nan")), "kernel_width must be"),
    (dict(ridge_alpha=0), "ridge_alpha must be"),
    (dict(ratio=2), "ratio must be"),
    (dict(kernel_size=0), "kernel_size must be"),
    (dict(seed=-1), "seed must be"),
    (dict(segmentation_fn="slic"), "segmentation_fn must be"),
    (dict(segmentation_fn=lambda picture: picture[..., 0]), "integers"),
    (dict(segmentation_fn=lambda picture: np.zeros((2, 2), int)), "integers"),
    (dict(distance_metric="nearest"), "euclidean"),
    (dict(num_samples=256), "has no option 'num_samples'"),
])
def test_options_that_make_no_sense_are_refused(options, words, images):
    with pytest.raises(ValueError, match=words):
        explain(Planted(slice(0, 8), slice(0, 8)), images[:1], "lime", **options)


def test_the_room_imports_without_lime():
    code = "import sys, bcos_nb.explainers; sys.exit(any(name.split('.')[0] in ('lime', 'skimage') for name in sys.modules))"
    assert "lime" in EXPLAINERS and subprocess.run([sys.executable, "-c", code]).returncode == 0
