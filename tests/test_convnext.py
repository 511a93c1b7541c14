"""ConvNeXt-Tiny against torchvision's and B-cos-v2's, of any size."""
from functools import partial

import pytest
import torch
import torchvision
from bcos.models import convnext as reference
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import norms as reference_norms
from parity import assert_same_network, give_weights, images, relative

from bcos_nb.explainers import explain_many
from bcos_nb.models import create_detector
from bcos_nb.models.convnext import from_bcos_v2

BNU = reference_norms.NoBias(reference_norms.BatchNormUncentered2d)


def setting(divisor):
    return [(96 // divisor, 192 // divisor, 3), (192 // divisor, 384 // divisor, 3), (384 // divisor, 768 // divisor, 9), (768 // divisor, None, 3)]


def reference_convnext(b, norm=None, divisor=1):
    """B-cos-v2's convnext_tiny, with branches that are heard."""
    return reference.BcosConvNeXt([reference.CNBlockConfig(*row) for row in setting(divisor)], 0.1, layer_scale=1.0, num_classes=2,
                                  conv_layer=partial(ReferenceConv, b=b), norm_layer=norm)


@pytest.mark.parametrize("divisor,side", [(4, 96), pytest.param(1, 224, marks=pytest.mark.slow)])
def test_with_torchvisions_weights_it_is_torchvisions(divisor, side):
    torch.manual_seed(0)
    theirs = torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(*row) for row in setting(divisor)], 0.1, layer_scale=1.0, num_classes=2)
    ours, theirs = give_weights(theirs, create_detector("convnext_tiny", width=1 / divisor))
    batch = images(2, side)
    with torch.no_grad():
        assert relative(ours(batch), theirs(ours.encode(batch))) < 1e-4


@pytest.mark.parametrize("norm,reference_norm", [("DetachablePositionNorm2d", None), ("BatchNormUncentered2d", BNU)])
@pytest.mark.parametrize("b", [1.75, 2])
def test_with_the_packages_weights_it_is_the_packages(b, norm, reference_norm):
    torch.manual_seed(0)
    ours = create_detector("convnext_tiny", b=b, width=0.25, variant="study", norm=norm, logit_temperature=1.0)
    assert_same_network(*give_weights(reference_convnext(b, reference_norm, 4), ours, from_bcos_v2), images(1, 64))


@pytest.mark.slow
@pytest.mark.parametrize("b", [1.75, 2])
def test_with_the_packages_weights_it_is_the_packages_at_full_size(b):
    torch.manual_seed(0)
    ours, theirs = give_weights(reference_convnext(b), create_detector("convnext_tiny", b=b, variant="study", logit_temperature=1.0), from_bcos_v2)
    assert_same_network(ours, theirs, images(1, 224))


def test_the_study_form_has_the_packages_norms_and_layer_scale():
    ours, theirs = create_detector("convnext_tiny", b=2, width=0.125, variant="study"), reference_convnext(2, None, 8)
    kinds = [{type(m).__name__: m.eps for m in network.modules() if "Norm" in type(m).__name__ and hasattr(m, "eps")} for network in (ours, theirs)]
    assert kinds[0] == {"DetachablePositionNorm2d": 1e-6} and set(kinds[1].values()) == {1e-6}
    assert {float(value.detach().max()) for name, value in ours.named_parameters() if "layer_scale" in name} == {float(torch.tensor(1e-6))}


def test_layer_scale_is_a_constant_factor():
    torch.manual_seed(0)
    detector = create_detector("convnext_tiny", b=2, width=0.125, end_norms=False).eval()
    block, x = detector.features[1][0], torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        branch = block(x) - x
        block.layer_scale *= 2
        assert torch.allclose(block(x) - x, 2 * branch, rtol=1e-3, atol=1e-6)


def test_stochastic_depth_is_of_training_only_and_rises_with_depth():
    detector = create_detector("convnext_tiny", b=2, width=0.125, stochastic_depth=0.5)
    shares = [module.p for module in detector.modules() if isinstance(module, torchvision.ops.StochasticDepth)]
    assert len(shares) == 18 and shares[0] == 0 and shares[-1] == 0.5 and shares == sorted(shares)
    detector(images(4)), detector.eval()
    with torch.no_grad():
        assert torch.equal(detector(images()), detector(images()))


def test_width_and_stems():
    for stem in ("imagenet", "fine"):
        for b in (None, 2):
            detector = create_detector("convnext_tiny", b=b, width=0.25, stem=stem).eval()
            with torch.no_grad():
                assert detector.features(detector.encode(images(1, 96))).shape == (1, 192, 3, 3)
    with pytest.raises(ValueError, match="stem='coarse' is unknown. Choose one of: imagenet, fine"):
        create_detector("convnext_tiny", stem="coarse")


@pytest.mark.parametrize("b", [None, 2])
def test_cam_maps_are_those_of_the_last_stage(b):
    torch.manual_seed(0)
    detector = create_detector("convnext_tiny", b=b, width=0.125).eval()
    assert detector.cam_layer is detector.features[-1] and len(detector.cam_layer) == 3
    for name, answer in explain_many(detector, images(2, 96), ["gradcam", "layercam"]).items():
        assert bool(answer.maps.isfinite().all()), name
