"""What holds of every backbone, whatever it is made of: completeness, images of any size, gradients, what the B-cos form leaves out."""
import pytest
import torch
from parity import images, with_statistics
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bcos_nb.layers import BcosConv2d, dynamic_linear
from bcos_nb.models import create_detector, load_detector, save_detector

SMALL = {
    "resnet10": dict(width=0.125), "resnet50": dict(width=0.125), "xception": dict(width=0.125, middle=2), "vgg16": dict(width=0.125),
    "densenet121": dict(width=0.125), "inception_v3": dict(width=0.125), "convnext_tiny": dict(width=0.125, layer_scale=1.0),
}
WITH_FINE_STEM = [arch for arch in SMALL if arch != "vgg16"]
SMALLEST = {"xception": 7, "vgg16": 32, "densenet121": 29, "inception_v3": 75, "convnext_tiny": 32}  # of the published stem
FORMS = [(arch, form) for arch in SMALL for form in ("default", "study", "fine") if form != "fine" or arch in WITH_FINE_STEM]


def built(arch, b, form="default", **options):
    chosen = dict(default={}, study=dict(variant="study"), fine=dict(stem="fine"))[form]
    torch.manual_seed(0)
    return create_detector(arch, b=b, **SMALL[arch], **chosen, **options)


@pytest.mark.parametrize("arch,form", FORMS)
@pytest.mark.parametrize("b", [1.25, 1.75, 2, 2.5])
def test_contributions_account_for_the_logit(arch, form, b):
    detector, batch = built(arch, b, form, logit_bias=-0.5), images(2, 96, 80)
    centred = any(getattr(layer, "centres", False) for layer in detector.modules())
    for trained in (False, True):  # untrained, with nothing known of the scale of its maps, a deep network may answer with zeros
        if trained:
            with_statistics(detector, images(4, 96, seed=5))
        for target in (0, 1):
            row = dynamic_linear(detector, batch, target, check=False)
            assert float(row.error.max()) < 1e-4 and bool(row.weights.isfinite().all())
            assert centred or torch.allclose(row.bias, torch.tensor(-0.5))
            assert not trained or float(row.weights.abs().max()) > 0


@pytest.mark.parametrize("arch", SMALL)
def test_constants_of_centring_norms_are_the_bias_of_the_map(arch):
    detector = built(arch, 2, norm="BatchNorm2d", norm_bias=True)
    for layer in detector.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.normal_(layer.bias)
    batch = images(3, 96, 80)
    row = dynamic_linear(with_statistics(detector, batch), batch)
    total = row.contributions.flatten(1).double().sum(1) + row.bias
    assert bool((row.bias != 0).all()) and float((total - row.logits[:, 1]).abs().max()) < 1e-4 * max(1, float(row.logits.abs().max()))


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("b", [None, 2])
def test_images_of_any_size_and_samples_do_not_mix(arch, b):
    detector = built(arch, b).double()
    side = SMALLEST.get(arch, 1)
    assert detector.image_size is None and detector.smallest == side
    with_statistics(detector, images(8, max(side, 64), seed=5).double())
    for height, width in ((96, 96), (77, 130), (side, side)):
        batch = images(3, height, width).double()
        with torch.no_grad():
            together = detector(batch)
            alone = torch.cat([detector(image[None]) for image in batch])
        assert together.shape == (3, 2) and bool(together.isfinite().all()) and torch.allclose(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", SMALLEST)
@pytest.mark.parametrize("b", [None, 2])
def test_images_that_are_too_small_are_refused(arch, b):
    side = SMALLEST[arch]
    for height, width in ((128, side - 1), (side - 1, 128)):
        with pytest.raises(ValueError, match=f"{arch} as built here takes images of at least {side} × {side} pixels, got {height} × {width}.*stem"):
            built(arch, b)(images(1, height, width))


@pytest.mark.parametrize("arch,form", FORMS)
def test_the_bcos_form_has_no_relu_no_max_pooling_and_no_bias(arch, form):
    for module in built(arch, 2, form).modules():
        assert not isinstance(module, (nn.ReLU, nn.GELU, nn.MaxPool2d, nn.Dropout, nn.Linear)) and getattr(module, "bias", None) is None, module


@pytest.mark.parametrize("arch", SMALL)
def test_the_default_form_sees_energy_and_the_study_form_is_plain(arch):
    default, study = ([layer for layer in built(arch, 2, form).modules() if isinstance(layer, BcosConv2d)] for form in ("default", "study"))
    assert (default[0].max_out, default[0].zero_mean) == (2, 0.5) and default[0].centred > 0
    assert {(layer.max_out, layer.zero_mean) for layer in study} == {(1, 0.0)}


@pytest.mark.parametrize("arch,form", FORMS)
@pytest.mark.parametrize("b", [None, 1.75])
def test_a_saved_detector_comes_back(arch, form, b, tmp_path):
    detector = with_statistics(built(arch, b, form), images(3, 96))
    loaded = load_detector(save_detector(detector, tmp_path / "detector.safetensors"))
    with torch.no_grad():
        assert torch.equal(loaded(images(2, 96)), detector(images(2, 96))) and loaded.arguments == detector.arguments


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("b", [None, 2])
def test_every_parameter_learns(arch, b):
    detector = built(arch, b).train()
    nn.functional.cross_entropy(detector(images(8, 96)), torch.arange(8) % 2).backward()
    still = [name for name, value in detector.named_parameters()
             if value.grad is None or not bool(value.grad.isfinite().all()) or not float(value.grad.abs().max()) > 0]
    assert not still


@pytest.mark.slow
@pytest.mark.parametrize("arch", WITH_FINE_STEM)
@pytest.mark.parametrize("b", [None, 2])
def test_it_learns_a_batch_by_heart(arch, b):
    detector = built(arch, b, "fine").train()
    optimizer = torch.optim.Adam(detector.parameters(), 5e-4)
    batch, labels, losses = images(8, 64), torch.arange(8) % 2, []
    for _ in range(40):
        loss = nn.functional.cross_entropy(detector(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3, losses
