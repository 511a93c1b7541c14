"""VGG-16 against torchvision's and B-cos-v2's, of any size."""
from functools import partial

import pytest
import torch
import torchvision
from bcos.models import vgg as reference
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import norms as reference_norms
from parity import assert_same_network, differences, give_weights, images, relative
from torch import nn

from bcos_nb.explainers import explain_many
from bcos_nb.models import create_detector
from bcos_nb.models.vgg import VGG16, from_bcos_v2

BNU = reference_norms.NoBias(reference_norms.BatchNormUncentered2d)


def reference_vgg(b, divisor=1):
    """B-cos-v2's vgg16_bnu at a share of its width."""
    conv = partial(ReferenceConv, b=b)
    plan = [entry if entry == "M" else entry // divisor for entry in VGG16]
    layers = reference.make_layers(plan, norm_layer=BNU, conv_layer=conv)
    with torch.device("meta" if divisor > 1 else "cpu"):
        network = reference.BcosVGG(layers, 2, False, conv, logit_temperature=1e-5)
    if divisor > 1:
        wide, hidden = 512 // divisor, 4096 // divisor
        network.classifier = nn.Sequential(conv(wide, hidden, 7, padding=3), conv(hidden, hidden), conv(hidden, 2))
    return network


def torchvision_vgg(batch_norm, divisor=1):
    """torchvision's vgg16 or vgg16_bn at a share of its width."""
    plan = [entry if entry == "M" else entry // divisor for entry in VGG16]
    layers = torchvision.models.vgg.make_layers(plan, batch_norm)
    with torch.device("meta" if divisor > 1 else "cpu"):
        network = torchvision.models.VGG(layers, 2, init_weights=False)
    if divisor > 1:
        hidden = 4096 // divisor
        network.classifier[0], network.classifier[3], network.classifier[6] = nn.Linear(512 // divisor * 49, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)
    return network


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("divisor,sides", [(8, (64,)), pytest.param(1, (224,), marks=pytest.mark.slow)])
def test_with_torchvisions_weights_it_is_torchvisions(batch_norm, divisor, sides):
    torch.manual_seed(0)
    ours, theirs = give_weights(torchvision_vgg(batch_norm, divisor), create_detector("vgg16", width=1 / divisor, batch_norm=batch_norm))
    for side in sides:
        batch = images(1, side)
        with torch.no_grad():
            assert relative(ours(batch), theirs(ours.encode(batch))) < 1e-4


@pytest.mark.parametrize("b", [1.75, 2])
def test_with_the_packages_weights_it_is_the_packages(b):
    torch.manual_seed(0)
    ours, theirs = give_weights(reference_vgg(b, 8), create_detector("vgg16", b=b, width=0.125, variant="study", logit_temperature=1e-5), from_bcos_v2)
    assert_same_network(ours, theirs, images(1, 64))


@pytest.mark.slow
@pytest.mark.parametrize("b", [1.75, 2])
def test_with_the_packages_weights_it_is_the_packages_at_full_size(b):
    torch.manual_seed(0)
    ours, theirs = give_weights(reference_vgg(b), create_detector("vgg16", b=b, variant="study", logit_temperature=1e-5), from_bcos_v2)
    found = differences(ours, theirs, images(1, 224))
    assert all(found[name] < 1e-4 for name in ("logits", "weights", "mean_alpha", "mean_colour")), found


@pytest.mark.parametrize("batch_norm", [True, False])
def test_names_of_bcos_v2(batch_norm):
    conv = partial(ReferenceConv, b=2)
    norm = BNU if batch_norm else nn.Identity  # the package's vgg16 has one nn.Identity for each norm
    theirs = [f"features.{name}" for name in reference.make_layers([e if e == "M" else 8 for e in VGG16], norm_layer=norm, conv_layer=conv).state_dict()]
    ours = create_detector("vgg16", b=2, width=0.125, variant="study", batch_norm=batch_norm)
    names = [from_bcos_v2(name, batch_norm) for name in theirs + [f"classifier.{i}.linear.weight" for i in range(3)]]
    assert len(set(names)) == len(names) and set(names) == set(ours.state_dict())
    with pytest.raises(ValueError, match="features.60.weight is no tensor of a VGG-16"):
        from_bcos_v2("features.60.weight", batch_norm)


def test_width_and_classifier():
    assert [layer.out_channels for layer in create_detector("vgg16", width=0.25).features if isinstance(layer, nn.Conv2d)] == \
        [16, 16, 32, 32, 64, 64, 64] + [128] * 6
    assert create_detector("vgg16", width=0.125).classifier[0].weight.shape == (512, 64 * 49)
    assert create_detector("vgg16", width=0.125, classifier_channels=512, classifier_window=1).classifier[0].weight.shape == (64, 64)
    assert create_detector("vgg16", b=2, width=0.125, max_out=1).classifier[0].weight.shape == (64, 64, 1, 1)
    assert create_detector("vgg16", b=2, width=0.125, max_out=1, classifier_channels=1024, classifier_window=3).classifier[0].weight.shape == (128, 64, 3, 3)
    assert create_detector("vgg16", b=2, width=0.125, variant="study").classifier[0].weight.shape == (512, 64, 7, 7)
    with pytest.raises(ValueError, match="classifier_window=4"):
        create_detector("vgg16", b=2, classifier_window=4)


def test_an_untrained_bcos_detector_answers():
    for b in (1.25, 2, 2.5):
        torch.manual_seed(0)
        detector = create_detector("vgg16", b=b, width=0.125).eval()
        with torch.no_grad():
            maps = detector.features(detector.encode(images(4)))
        assert 1e-3 < float(maps.std()) < 1e3, b


@pytest.mark.parametrize("b", [None, 2])
def test_cam_maps_are_those_of_the_last_convolution(b):
    torch.manual_seed(0)
    detector = create_detector("vgg16", b=b, width=0.125).eval()
    caught = []
    detector.cam_layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
    detector(images(2, 96))
    assert caught[0].shape == (2, 64, 6, 6)
    for name, answer in explain_many(detector, images(2, 96), ["gradcam", "layercam"]).items():
        assert bool(answer.maps.isfinite().all()) and float(answer.maps.max()) > 0.9, name


@pytest.mark.slow
@pytest.mark.parametrize("b", [None, 2])
def test_it_learns_to_tell_two_kinds_of_noise_apart(b):
    torch.manual_seed(0)
    detector = create_detector("vgg16", b=b, width=0.125, dropout=0.0).train()
    optimizer = torch.optim.Adam(detector.parameters(), 2e-3)
    labels = torch.arange(16) % 2
    losses = []
    for step in range(60):
        batch = 0.5 + 0.1 * images(16, 32, seed=step)
        batch = torch.where(labels.view(-1, 1, 1, 1) == 1, batch, batch.roll(1, 3) / 2 + batch / 2)
        loss = torch.nn.functional.cross_entropy(detector(batch), labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5, losses
