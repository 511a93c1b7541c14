"""Inception v3 against torchvision's, and against a network of the reference package's layers that is wired independently."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import norms as reference_norms
from parity import images, relative, with_statistics
from torch import nn

from bcos_nb.explainers import explain
from bcos_nb.layers import Standardize, dynamic_linear
from bcos_nb.models import create_detector
from bcos_nb.models.inception import CHAIN, InceptionBlock, from_torchvision
from bcos_nb.models.parts import Parts

EXPONENTS = (1.25, 1.75, 2, 2.5)
EIGHTH = dict(width=0.125)


# ---- the ordinary form

def test_with_torchvisions_weights_it_gives_torchvisions_logits():
    torch.manual_seed(0)
    theirs = torchvision.models.inception_v3(num_classes=2, aux_logits=False, transform_input=False, init_weights=False, dropout=0.0)
    ours = create_detector("inception_v3").train()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert relative(ours(images(2, 96)), theirs.train()(2 * images(2, 96) - 1)) < 1e-4
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, atol=1e-5), name
    ours.eval(), theirs.eval()
    batch = images(1, 299)
    with torch.no_grad():
        logits = ours(batch)
        assert relative(logits, theirs(2 * batch - 1)) < 1e-4
        theirs.transform_input = True  # of images with ImageNet's mean and deviation, as torchvision's weights expect them
        assert relative(logits, theirs(Standardize()(batch))) < 1e-4


def test_every_tensor_of_torchvisions_file_but_the_auxiliary_classifiers_has_its_place():
    whole = torchvision.models.inception_v3(num_classes=2, init_weights=False).state_dict()
    names = {name: from_torchvision(name) for name in whole}
    assert {name for name, place in names.items() if place is None} == {name for name in whole if "AuxLogits" in name}
    ours = create_detector("inception_v3").state_dict()
    assert {place: whole[name].shape for name, place in names.items() if place} == {name: value.shape for name, value in ours.items()}


# ---- the B-cos form, against layers of the reference package

class ReferenceInception(nn.Module):
    """A B-cos Inception v3 of the reference package's layers: the forward pass is written out, the layers are made as they are met."""

    def __init__(self, state, b, max_out=1, pad=0, pooled=True):
        super().__init__()
        self.state, self.b, self.max_out, self.pad, self.pooled, self.layers = state, b, max_out, pad, pooled, {}

    def unit(self, x, name, stride=1, padding=0):
        if name not in self.layers:
            weight = self.state[f"{name}.conv.weight"]
            conv = ReferenceConv(weight.shape[1], len(weight) // self.max_out, tuple(weight.shape[2:]), stride=stride, padding=padding, b=self.b, max_out=self.max_out)
            norm = reference_norms.NoBias(reference_norms.BatchNormUncentered2d)(len(weight) // self.max_out, eps=1e-3)
            conv.linear.weight.data, norm.weight.data = weight, self.state[f"{name}.bn.weight"]
            norm.running_var.data = self.state[f"{name}.bn.running_var"]
            self.layers[name] = nn.Sequential(conv, norm).eval().to(weight.dtype)
            for layer in (conv, norm):
                layer.set_explanation_mode(True)
        return self.layers[name](x)

    def forward(self, x):
        p, unit = self.pad, self.unit
        first = self.state["Conv2d_1a_3x3.conv.weight"].shape[-1]
        x = unit(x, "Conv2d_1a_3x3", 2, p * (first // 2))
        x = unit(unit(x, "Conv2d_2a_3x3", 1, p), "Conv2d_2b_3x3", 1, 1)
        if self.pooled:
            x = F.avg_pool2d(x, 3, 2, p)
        x = unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1, p)
        x = F.avg_pool2d(x, 3, 2, p)
        for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = torch.cat([
                unit(x, f"{m}.branch1x1"),
                unit(unit(x, f"{m}.branch5x5_1"), f"{m}.branch5x5_2", 1, 2),
                unit(unit(unit(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1), f"{m}.branch3x3dbl_3", 1, 1),
                unit(F.avg_pool2d(x, 3, 1, 1), f"{m}.branch_pool"),
            ], 1)
        m = "Mixed_6a"
        x = torch.cat([
            unit(x, f"{m}.branch3x3", 2, p),
            unit(unit(unit(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1), f"{m}.branch3x3dbl_3", 2, p),
            F.avg_pool2d(x, 3, 2, p),
        ], 1)
        for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            seven = unit(unit(unit(x, f"{m}.branch7x7_1"), f"{m}.branch7x7_2", 1, (0, 3)), f"{m}.branch7x7_3", 1, (3, 0))
            twice = unit(x, f"{m}.branch7x7dbl_1")
            for number, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
                twice = unit(twice, f"{m}.branch7x7dbl_{number}", 1, padding)
            x = torch.cat([unit(x, f"{m}.branch1x1"), seven, twice, unit(F.avg_pool2d(x, 3, 1, 1), f"{m}.branch_pool")], 1)
        m = "Mixed_7a"
        seven = unit(unit(unit(x, f"{m}.branch7x7x3_1"), f"{m}.branch7x7x3_2", 1, (0, 3)), f"{m}.branch7x7x3_3", 1, (3, 0))
        x = torch.cat([
            unit(unit(x, f"{m}.branch3x3_1"), f"{m}.branch3x3_2", 2, p),
            unit(seven, f"{m}.branch7x7x3_4", 2, p),
            F.avg_pool2d(x, 3, 2, p),
        ], 1)
        for m in ("Mixed_7b", "Mixed_7c"):
            three = unit(x, f"{m}.branch3x3_1")
            twice = unit(unit(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
            x = torch.cat([
                unit(x, f"{m}.branch1x1"),
                unit(three, f"{m}.branch3x3_2a", 1, (0, 1)), unit(three, f"{m}.branch3x3_2b", 1, (1, 0)),
                unit(twice, f"{m}.branch3x3dbl_3a", 1, (0, 1)), unit(twice, f"{m}.branch3x3dbl_3b", 1, (1, 0)),
                unit(F.avg_pool2d(x, 3, 1, 1), f"{m}.branch_pool"),
            ], 1)
        if "fc" not in self.layers:
            head = ReferenceConv(x.shape[1], 2, 1, b=self.b)
            head.linear.weight.data = self.state["fc.weight"]
            head.set_explanation_mode(True)
            self.layers["fc"] = head
        return self.layers["fc"](x).mean((2, 3))


def assert_equal_networks(detector, batch, **wiring):
    """Logits and W(x): in float64 to 1e-9; in float32 to 1e-4, or to ten times what the reference itself loses by rounding."""
    mine, theirs = {}, {}
    for precision in (torch.float32, torch.float64):
        detector, batch = detector.to(precision), batch.to(precision)
        row = dynamic_linear(detector, batch, 0)
        leaf = row.encoded.clone().requires_grad_()
        logits = ReferenceInception(detector.state_dict(), detector.b, **wiring)(leaf)
        weights = torch.autograd.grad(logits[:, 0].sum(), leaf)[0]
        with torch.no_grad():
            mine[precision], theirs[precision] = (row.logits, row.weights, detector(batch)), (logits.detach(), weights, logits.detach())
    for single, exact, reference, expected in zip(mine[torch.float32], mine[torch.float64], theirs[torch.float32], theirs[torch.float64]):
        assert relative(exact, expected) < 1e-9
        assert relative(single.double(), expected) < max(1e-4, 10 * relative(reference.double(), expected))


@pytest.mark.parametrize("b", [1.25, 2.5])
def test_the_published_recipes_form_is_the_reference_packages_logits_and_dynamic_weights(b):
    torch.manual_seed(1)
    batch = images(3, 112, 96)
    assert_equal_networks(with_statistics(create_detector("inception_v3", b=b, variant="study", **EIGHTH), batch), batch)


@pytest.mark.parametrize("b", [1, 2])
def test_the_fine_stem_with_max_out_is_the_reference_packages_too(b):
    torch.manual_seed(2)
    batch = images(2, 48)
    detector = create_detector("inception_v3", b=b, stem="fine", max_out=2, zero_mean=0.0, energy_stem=False, logit_temperature=1.0, **EIGHTH)
    assert_equal_networks(with_statistics(detector, batch), batch, max_out=2, pad=1, pooled=False)


@pytest.mark.slow
@pytest.mark.parametrize("b", EXPONENTS)
def test_the_published_recipes_form_at_full_width_and_size(b):
    torch.manual_seed(3)
    batch = images(1, 299)
    assert_equal_networks(with_statistics(create_detector("inception_v3", b=b, variant="study"), batch), batch)


def test_the_forms_differ_as_described():
    default, study = create_detector("inception_v3", b=2, **EIGHTH), create_detector("inception_v3", b=2, variant="study", **EIGHTH)
    for detector in (default, study):
        assert not any(isinstance(layer, (nn.ReLU, nn.MaxPool2d)) for layer in detector.modules())
        assert {type(layer).__name__ for layer in detector.modules() if "Norm" in type(layer).__name__} - {"ConvNorm"} == {"BatchNormUncentered2d"}
    assert default.Conv2d_1a_3x3.conv.max_out == 2 and default.Conv2d_1a_3x3.conv.centred > 0 and default.logit_layer.logit_temperature < 1
    assert study.Conv2d_1a_3x3.conv.max_out == 1 and study.Conv2d_1a_3x3.conv.centred == 0 and study.logit_layer.logit_temperature == 1
    ordinary = create_detector("inception_v3", **EIGHTH)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in ordinary.modules()) == 4
    assert set(default.state_dict()) == {name for name in ordinary.state_dict() if not name.endswith((".bias", "running_mean"))} | {
        name for name in default.state_dict() if name.endswith("running_mean")}


# ---- sizes and options

@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("stem,smallest,side,positions", [("imagenet", 75, 128, 2), ("fine", 1, 128, 8), ("fine", 1, 80, 5)])
def test_any_size_from_the_smallest_on(b, stem, smallest, side, positions):
    detector = create_detector("inception_v3", b=b, stem=stem, **EIGHTH).eval()
    assert detector.smallest == smallest
    with torch.no_grad():
        assert detector.features(detector.encode(images(1, side))).shape[2:] == (positions, positions)
        assert detector(images(1, smallest)).isfinite().all() and detector(images(2, 76, 97)).shape == (2, 2)


def test_width_scales_every_branch():
    few, many = (sum(p.numel() for p in create_detector("inception_v3", b=2, width=width).parameters()) for width in (0.125, 0.25))
    assert 2.8 * few < many < 4.2 * few
    for name, branches, halve in CHAIN:
        block = InceptionBlock(Parts(2), 24, branches, 0.25, halve=halve)
        assert block(torch.rand(1, 24, 9, 9)).shape == (1, block.out_channels, *((5, 5) if halve else (9, 9))), name


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="coarse.*imagenet, fine"):
        create_detector("inception_v3", stem="coarse")


# ---- as a detector among others

def test_cam_methods_and_the_bcos_map_work_on_it():
    for b, methods in ((None, ("gradcam", "layercam")), (2, ("gradcam", "bcos"))):
        detector = create_detector("inception_v3", b=b, **EIGHTH).eval()
        assert detector.cam_layer is detector.Mixed_7c
        for method in methods:
            assert explain(detector, images(2, 96), method).maps.shape == (2, 96, 96)
