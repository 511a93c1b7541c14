"""DenseNet-121 against torchvision's and B-cos-v2's, of any size."""
from functools import partial

import pytest
import torch
import torchvision
from bcos.models import densenet as reference
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import norms as reference_norms
from parity import assert_same_network, give_weights, images, relative

from bcos_nb.explainers import explain_many
from bcos_nb.layers import BcosConv2d
from bcos_nb.models import create_detector
from bcos_nb.models.densenet import from_bcos_v2
from bcos_nb.models.parts import start_size

BNU = reference_norms.NoBias(reference_norms.BatchNormUncentered2d)
POSITION = reference_norms.NoBias(reference_norms.DetachablePositionNorm2d)


def reference_densenet(b, norm=BNU, **options):
    """B-cos-v2's densenet121."""
    return reference.densenet121(num_classes=2, conv_layer=partial(ReferenceConv, b=b), norm_layer=norm, **options)


@pytest.mark.parametrize("width,options,side", [(0.25, dict(growth_rate=8, num_init_features=16), 96), pytest.param(1, {}, 224, marks=pytest.mark.slow)])
def test_with_torchvisions_weights_it_is_torchvisions(width, options, side):
    torch.manual_seed(0)
    options = dict(dict(growth_rate=32, num_init_features=64), **options)
    ours, theirs = give_weights(torchvision.models.DenseNet(**options, num_classes=2), create_detector("densenet121", width=width))
    batch = images(2, side)
    with torch.no_grad():
        assert relative(ours(batch), theirs(ours.encode(batch))) < 1e-4


@pytest.mark.parametrize("norm,reference_norm", [("BatchNormUncentered2d", BNU), ("DetachablePositionNorm2d", POSITION)])
@pytest.mark.parametrize("b", [1.75, 2])
def test_with_the_packages_weights_it_is_the_packages(b, norm, reference_norm):
    torch.manual_seed(2)
    theirs = reference_densenet(b, reference_norm, growth_rate=8, num_init_features=16)
    ours = create_detector("densenet121", b=b, width=0.25, variant="study", norm=norm, logit_temperature=1.0)
    assert_same_network(*give_weights(theirs, ours, from_bcos_v2), images(1, 64))


@pytest.mark.slow
@pytest.mark.parametrize("b", [1.75, 2])
def test_with_the_packages_weights_it_is_the_packages_at_full_size(b):
    torch.manual_seed(0)
    ours, theirs = give_weights(reference_densenet(b), create_detector("densenet121", b=b, variant="study", logit_temperature=1.0), from_bcos_v2)
    assert_same_network(ours, theirs, images(1, 224))


def test_width_and_layers():
    assert create_detector("densenet121", width=0.25).classifier.in_features == 256
    assert create_detector("densenet121", width=0.125).features.denseblock1.denselayer1.conv2.weight.shape == (4, 16, 3, 3)
    assert create_detector("densenet121", width=0.125, layers=(2, 2, 2)).classifier.in_features == 16
    assert create_detector("densenet121").classifier.in_features == 1024


def test_weights_start_at_one_size_and_its_size_changes_no_answer():
    torch.manual_seed(0)
    sizes = {layer.weight.square().mean().sqrt().item() for layer in create_detector("densenet121", b=2, width=0.125).features.modules() if isinstance(layer, BcosConv2d)}
    assert min(sizes) > 0.0299 and max(sizes) < 0.0301
    detector = create_detector("densenet121", b=2, width=0.125, layers=(1, 1), weight_size=None).eval()
    with torch.no_grad():
        before = detector(images())
        start_size(detector, 0.5)
        assert torch.allclose(detector(images()), before, rtol=1e-4)
    kept = create_detector("densenet121", b=2, width=0.125, layers=(1, 1), unit_norm=False)
    before = [value.clone() for value in kept.parameters()]
    start_size(kept, 0.5)  # without unit norm the size is part of what a layer computes
    assert all(torch.equal(old, new) for old, new in zip(before, kept.parameters()))


def test_the_fine_stem_needs_32_pixels():
    assert create_detector("densenet121", b=2, width=0.125, stem="fine")(images(2, 32)).shape == (2, 2)
    with pytest.raises(ValueError, match="at least 32 × 32 pixels"):
        create_detector("densenet121", b=2, width=0.125, stem="fine")(images(2, 31))


def test_both_stems_end_on_positions_of_32_pixels():
    for stem in ("imagenet", "fine"):
        for b in (None, 2):
            detector = create_detector("densenet121", b=b, width=0.125, stem=stem).eval()
            with torch.no_grad():
                assert detector.features(detector.encode(images(1, 96))).shape[2:] == (3, 3)
    with pytest.raises(ValueError, match="stem='coarse' is unknown. Choose one of: imagenet, fine"):
        create_detector("densenet121", stem="coarse")


@pytest.mark.parametrize("b", [None, 2])
def test_cam_maps_are_those_of_the_last_norm(b):
    torch.manual_seed(0)
    detector = create_detector("densenet121", b=b, width=0.125).eval()
    assert detector.cam_layer is detector.features.norm5
    for name, answer in explain_many(detector, images(2, 96), ["gradcam", "layercam"]).items():
        assert bool(answer.maps.isfinite().all()), name
