"""ConvNeXt-Tiny against torchvision's and B-cos-v2's, of any size, and what holds of every network made of the same parts."""
from functools import partial

import pytest
import torch
import torchvision
from bcos.models import convnext as reference
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import norms as reference_norms
from parity import assert_same_network, differences, give_weights, images, relative
from torch import nn

from bcos_nb.explainers import explain_many
from bcos_nb.layers import BcosConv2d, dynamic_linear
from bcos_nb.models import create_detector, load_detector, save_detector
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


@pytest.mark.parametrize("b", [1.25, 1.75, 2, 2.5])
@pytest.mark.parametrize("options", ({"stem": "fine"}, {"variant": "study", "layer_scale": 1.0}))
def test_contributions_account_for_the_logit(b, options):
    torch.manual_seed(0)
    detector = create_detector("convnext_tiny", b=b, width=0.125, logit_bias=-0.5, **options)
    for trained in (False, True):
        if trained:
            detector.train()(images(4, seed=5))
        batch = images(2, 64, 48)
        answer = dynamic_linear(detector.eval(), batch, check=False)
        assert float(answer.error.max()) < 1e-4 and torch.allclose(answer.bias, torch.tensor(-0.5))
        assert bool(answer.weights.isfinite().all()) and float(answer.weights.abs().max()) > 0


@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("height,width", [(64, 64), (61, 130), (32, 32)])
def test_images_of_any_size_and_samples_do_not_mix(b, height, width):
    torch.manual_seed(0)
    detector = create_detector("convnext_tiny", b=b, width=0.125).train()
    detector(images(8, seed=5))
    batch = images(3, height, width)
    with torch.no_grad():
        together = detector.eval()(batch)
        alone = torch.cat([detector(image[None]) for image in batch])
    assert detector.image_size is None and together.shape == (3, 2) and torch.allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("b", [None, 2])
def test_images_that_are_too_small_are_refused(b):
    with pytest.raises(ValueError, match="convnext_tiny takes images of at least 32 px a side, got \\[64, 31\\]"):
        create_detector("convnext_tiny", b=b, width=0.125)(images(1, 64, 31))


def test_the_bcos_form_has_no_relu_no_max_pooling_and_no_bias():
    for options in ({}, {"stem": "fine"}, {"variant": "study", "layer_scale": 1.0}):
        for module in create_detector("convnext_tiny", b=2, width=0.125, **options).modules():
            assert not isinstance(module, (nn.ReLU, nn.GELU, nn.MaxPool2d, nn.Dropout, nn.Linear)) and getattr(module, "bias", None) is None, module


def test_the_default_form_sees_energy_and_the_study_form_is_plain():
    default, study = (create_detector("convnext_tiny", b=2, width=0.25, variant=variant) for variant in ("default", "study"))
    stem = default.features[0][0]
    assert (stem.max_out, stem.zero_mean) == (2, 0.5)
    assert {(layer.max_out, layer.zero_mean) for layer in study.modules() if isinstance(layer, BcosConv2d)} == {(1, 0.0)}


@pytest.mark.parametrize("b", [None, 1.75])
def test_a_saved_detector_comes_back(b, tmp_path):
    detector = create_detector("convnext_tiny", b=b, width=0.125, stem="fine")
    detector(images(3))
    loaded = load_detector(save_detector(detector, tmp_path / "detector.safetensors"))
    with torch.no_grad():
        assert torch.equal(loaded(images()), detector.eval()(images())) and loaded.arguments == detector.arguments


@pytest.mark.slow
@pytest.mark.parametrize("b", [None, 2])
def test_it_learns_a_batch_by_heart(b):
    torch.manual_seed(0)
    detector = create_detector("convnext_tiny", b=b, width=0.125, stem="fine", stochastic_depth=0.0).train()
    optimizer = torch.optim.Adam(detector.parameters(), 5e-4)
    batch, labels, losses = images(8, 64), torch.arange(8) % 2, []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(detector(batch), labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3, losses


@pytest.mark.parametrize("b", [None, 2])
def test_every_parameter_learns(b):
    torch.manual_seed(0)
    detector = create_detector("convnext_tiny", b=b, width=0.125).train()
    torch.nn.functional.cross_entropy(detector(images(8)), torch.arange(8) % 2).backward()
    still = [name for name, value in detector.named_parameters() if value.grad is None or not float(value.grad.abs().max()) > 0]
    assert not still
