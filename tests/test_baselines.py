"""Controls: what a map without a detector, and a detector without knowledge, must be."""
import copy

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from bcos_nb.explainers import explain, randomised
from bcos_nb.explainers.baselines import edge_strength, weighted_layers
from bcos_nb.models import bcosify, create_detector, list_detectors, load_detector, save_detector

SMALL = {"vitc_ti": dict(depth=2, image_size=32), "xception": dict(middle=1)}


class Blind(nn.Module):
    """A detector without weights."""

    def forward(self, images):
        return images.mean((2, 3))[:, :2]


def built(arch="resnet10", b=None, seed=0, **options):
    torch.manual_seed(seed)
    return create_detector(arch, b=b, width=0.125, **SMALL.get(arch, {}), **options).eval()


def tensors(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


# ---- maps that know no detector


@pytest.mark.parametrize("size", [(40, 40), (33, 65)])
@pytest.mark.parametrize("sigma", [0.1, 0.25, 1.0])
def test_the_centre_prior_is_a_gaussian(size, sigma):
    images = torch.rand(2, 3, *size)
    maps = explain(Blind(), images, "centre", sigma=sigma).maps
    y, x = (np.arange(side) - (side - 1) / 2 for side in size)
    literal = np.exp(-((y[:, None] / size[0]) ** 2 + (x / size[1]) ** 2) / (2 * sigma**2))
    assert maps.shape == (2, *size) and torch.equal(maps[0], maps[1])
    assert np.abs(maps[0].numpy() - literal / literal.max()).max() < 1e-5
    assert torch.equal(explain(Blind(), images.flip(3), "centre", sigma=sigma).maps, maps)


@pytest.mark.parametrize("smooth", [1, 5, 15])
def test_edges_are_opencvs(smooth):
    images = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    maps = explain(Blind(), images, "edges", smooth=smooth).maps.numpy()
    for image, strength, found in zip(images.double().numpy(), edge_strength(images).numpy(), maps):
        luminance = np.tensordot([0.299, 0.587, 0.114], image, 1)
        literal = np.hypot(*(cv2.Sobel(luminance, cv2.CV_64F, *axis, ksize=3, borderType=cv2.BORDER_REPLICATE) for axis in ((1, 0), (0, 1))))
        assert np.abs(strength - literal / 8).max() < 1e-6
        literal = cv2.blur(literal, (smooth, smooth), borderType=cv2.BORDER_CONSTANT)
        assert np.abs(found - literal / literal.max()).max() < 1e-5


def test_edges_stand_where_the_image_changes_and_nowhere_in_a_flat_one():
    images = torch.zeros(2, 3, 20, 20)
    images[0, :, :, 10:] = 0.6
    maps = explain(Blind(), images, "edges", smooth=1).maps
    assert torch.equal(maps[0] > 0, torch.isin(torch.arange(20), torch.tensor([9, 10])).expand(20, 20)) and maps[1].abs().max() == 0
    assert edge_strength(images)[0, 5, 9].item() == pytest.approx(0.3)  # of a step of 0.6, per pixel


@pytest.mark.parametrize("name,options,words", [("centre", dict(sigma=0), "sigma=0"), ("edges", dict(smooth=4), "odd number"), ("edges", dict(smooth=0), "odd number")])
def test_bad_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        explain(Blind(), torch.rand(1, 3, 20, 20), name, **options)


# ---- detectors that know nothing


@pytest.mark.parametrize("arch,b", [("resnet34", None), ("resnet34", 2), ("xception", None), ("xception", 1.25), ("vitc_ti", None), ("vitc_ti", 2)])
def test_random_weights_are_those_of_a_newly_built_detector(arch, b):
    detector, images = built(arch, b, seed=5), torch.rand(2, 3, 32, 32)
    before, generator = tensors(detector), torch.get_rng_state()
    control = randomised(detector, seed=3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    fresh = built(arch, b, seed=3)
    assert all(torch.equal(value, tensors(fresh)[name]) for name, value in control.state_dict().items())
    with torch.no_grad():
        assert torch.equal(control(images), fresh(images)) and torch.isfinite(control(images)).all()
        assert not torch.allclose(control(images), detector(images), atol=1e-4)
    assert (control.arch, control.b, control.arguments, control.training) == (arch, b, detector.arguments, False)


@pytest.mark.parametrize("arch,b", [("resnet10", None), ("resnet10", 2), ("xception", 2), ("vitc_ti", None)])
def test_the_cascade_goes_from_the_output_to_the_input(arch, b):
    detector = built(arch, b, seed=5)
    for value in detector.state_dict().values():  # as if trained: norms and running statistics are no longer those of a new network
        if value.is_floating_point():
            value.add_(0.01)
    names, before = weighted_layers(detector), tensors(detector)
    assert {name.rpartition(".")[0] for name, _ in detector.named_parameters()} <= set(names)
    for layers in (0, 1, len(names) // 2, len(names)):
        after = tensors(randomised(detector, layers=layers))
        new = set(names[len(names) - layers :])
        for name, value in after.items():
            if name.rpartition(".")[0] in new and value.is_floating_point():
                assert not torch.equal(value, before[name]), name
            elif name.rpartition(".")[0] not in new:
                assert torch.equal(value, before[name]), name
    assert all(torch.equal(value, after[name]) for name, value in tensors(randomised(detector)).items())


@pytest.mark.parametrize("arch", [arch for arch in ("resnet10", "xception", "vitc_ti", "vgg16", "densenet121", "convnext_tiny", "inception_v3") if arch in list_detectors()])
def test_layers_are_listed_from_input_to_output(arch):
    detector, order = built(arch), []
    names = weighted_layers(detector)
    for name in names:
        detector.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    side = max(32, detector.smallest)
    with torch.no_grad():
        detector(torch.rand(1, 3, side, side))
    assert order[0] == names[0] and order[-1] == names[-1] and set(order) == set(names)
    first = list(dict.fromkeys(order))  # some run more than once
    assert max(abs(names.index(name) - place) for place, name in enumerate(first)) <= 12  # a shortcut may be listed after what it bridges


def test_a_loaded_and_a_bcosified_detector_can_be_randomised(tmp_path):
    images = torch.rand(2, 3, 32, 32)
    save_detector(built(b=2, seed=5), tmp_path / "detector.safetensors")
    loaded = load_detector(tmp_path / "detector.safetensors")
    assert torch.equal(randomised(loaded, seed=3)(images), built(b=2, seed=3)(images))
    converted = bcosify(built(seed=5), 1.5).eval()
    control, again = randomised(converted, seed=1), randomised(converted, seed=1)
    assert torch.equal(control(images), again(images)) and not torch.allclose(control(images), converted(images), atol=1e-4)
    assert torch.equal(control.encode(images), converted.encode(images))
    explain(control, images, "bcos")


def test_the_copy_has_the_mode_and_type_and_may_be_trained():
    detector = built().double().train()
    control = randomised(detector)
    assert control.training and next(control.parameters()).dtype == torch.float64
    control(torch.rand(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is None for parameter in detector.parameters()) and all(parameter.grad is not None for parameter in control.parameters())


def test_a_map_of_the_detector_changes_and_one_of_the_image_does_not():
    detector, images = built(b=2), torch.rand(2, 3, 96, 96)  # the layer of Grad-CAM has 3 × 3 cells then
    for name, follows in (("gradcam", True), ("bcos", True), ("edges", False), ("centre", False), ("uniform", False)):
        same = torch.allclose(explain(detector, images, name).maps, explain(randomised(detector, seed=9), images, name).maps, atol=1e-3)
        assert same != follows, name


def test_what_cannot_be_rebuilt_is_refused():
    with pytest.raises(ValueError, match="does not say how it was built"):
        randomised(Blind())
    with pytest.raises(ValueError, match="layers=1000"):
        randomised(built(), layers=1000)
    nameless = copy.deepcopy(built())
    del nameless.arguments
    with pytest.raises(ValueError, match="create_detector"):
        randomised(nameless)
