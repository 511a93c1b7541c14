"""Xception against timm's, against a network of the reference package's layers under the study's names, and with other projects' files."""
import copy
import itertools
import re

import pytest
import timm
import torch
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import LogitLayer as ReferenceLogits
from bcos.modules import norms as reference_norms
from parity import images, relative, with_statistics
from torch import nn

from bcos_nb.explainers import explain
from bcos_nb.layers import dynamic_linear
from bcos_nb.models import create_detector
from bcos_nb.models.xception import from_deepfakebench, from_study, smallest_side

EXPONENTS = (1.25, 1.75, 2, 2.5)
SMALL = dict(width=0.125, middle=2)


# ---- the ordinary form

def test_with_timms_weights_it_gives_timms_logits():
    torch.manual_seed(0)
    theirs = with_statistics(timm.create_model("legacy_xception", num_classes=2), 2 * images(2, 64) - 1)
    ours = create_detector("xception").eval()
    ours.load_state_dict({name.replace("fc.", "last_linear."): value for name, value in theirs.state_dict().items()})
    batch = images(1, 299)
    with torch.no_grad():
        assert relative(ours(batch), theirs(2 * batch - 1)) < 1e-4
        ours.train(), theirs.train()
        batch = images(2, 40)
        assert relative(ours(batch), theirs(2 * batch - 1)) < 1e-4
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name.replace("fc.", "last_linear.")], value, atol=1e-5), name


def norm_tensors(name):
    return {f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def test_tensors_have_deepfakebenchs_names_in_both_forms():
    expected = {"conv1.weight", "conv2.weight", "last_linear.weight", "last_linear.bias"} | norm_tensors("bn1") | norm_tensors("bn2")
    for block in range(1, 13):
        if block in (1, 2, 3, 12):
            expected |= {f"block{block}.skip.weight"} | norm_tensors(f"block{block}.skipbn")
        for number in range(2 if block in (1, 2, 3, 12) else 3):
            at = 3 * number + (block > 1)
            expected |= {f"block{block}.rep.{at}.conv1.weight", f"block{block}.rep.{at}.pointwise.weight"} | norm_tensors(f"block{block}.rep.{at + 1}")
    for number in (3, 4):
        expected |= {f"conv{number}.conv1.weight", f"conv{number}.pointwise.weight"} | norm_tensors(f"bn{number}")
    assert set(create_detector("xception", width=0.125).state_dict()) == expected
    assert set(create_detector("xception", b=2, width=0.125).state_dict()) == {name for name in expected if not name.endswith(".bias")}


def test_images_reach_the_ordinary_network_as_minus_one_to_one():
    batch = images()
    assert torch.allclose(create_detector("xception", **SMALL).encode(batch), 2 * batch - 1, atol=1e-6)
    assert torch.equal(create_detector("xception", b=2, **SMALL).encode(batch), torch.cat([batch, 1 - batch], 1))


# ---- the B-cos form, against layers of the reference package

class Separable(nn.Module):
    def __init__(self, before, after, b, max_out):
        super().__init__()
        self.conv1 = ReferenceConv(before, before, 3, padding=1, groups=before, b=b)
        self.pointwise = ReferenceConv(before, after, 1, b=b, max_out=max_out)

    def forward(self, x):
        return self.pointwise(self.conv1(x))


class StudysXception(nn.Module):
    """The study's B-cos Xception of the reference package's layers, under the study's names: no rectifiers are counted."""

    def __init__(self, b, norm, channels, max_out=1, middle=8, head_norm=True, stem=(3, 2, 0), second=0, third=2):
        super().__init__()
        c1, c2, c3, c4, c5, c6, c7, c8 = channels
        norm = reference_norms.NoBias(getattr(reference_norms, norm))

        def block(before, after, convolutions, stride, grow_last=False):
            steps, inside = [], before
            for number in range(convolutions):
                out = after if not grow_last or number == convolutions - 1 else before
                steps += [Separable(inside, out, b, max_out), norm(out)]
                inside = out
            made = nn.Module()
            made.rep = nn.Sequential(*steps, *[nn.AvgPool2d(3, stride, 1)] * (stride > 1))
            if stride > 1 or before != after:
                made.skip, made.skipbn = ReferenceConv(before, after, 1, stride=stride, b=b, max_out=max_out), norm(after)
            return made

        self.conv1, self.bn1 = ReferenceConv(6, c1, stem[0], stride=stem[1], padding=stem[2], b=b, max_out=max_out), norm(c1)
        self.conv2, self.bn2 = ReferenceConv(c1, c2, 3, padding=second, b=b, max_out=max_out), norm(c2)
        self.block1, self.block2, self.block3 = block(c2, c3, 2, 2), block(c3, c4, 2, 2), block(c4, c5, 2, third)
        self.blocks = ["block1", "block2", "block3", *[f"block{number}" for number in range(4, 4 + middle)], "block12"]
        for name in self.blocks[3:-1]:
            setattr(self, name, block(c5, c5, 3, 1))
        self.block12 = block(c5, c6, 2, 2, grow_last=True)
        self.conv3, self.bn3 = Separable(c6, c7, b, max_out), norm(c7)
        self.conv4, self.bn4 = Separable(c7, c8, b, max_out), norm(c8)
        self.classifier_head = nn.Sequential(norm(c8) if head_norm else nn.Identity(), ReferenceConv(c8, 2, 1, b=b))
        self.logit_layer = ReferenceLogits()

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        for name in self.blocks:
            block = getattr(self, name)
            x = block.rep(x) + (block.skipbn(block.skip(x)) if hasattr(block, "skip") else x)
        x = self.bn4(self.conv4(self.bn3(self.conv3(x))))
        return self.logit_layer(self.classifier_head(x).mean((2, 3)))

    def explained(self, encoded, target):
        """Logits and W(x) in explanation mode."""
        for layer in self.eval().modules():
            if hasattr(layer, "set_explanation_mode"):
                layer.set_explanation_mode(True)
        leaf = encoded.clone().requires_grad_()
        logits = self(leaf)
        return logits.detach(), torch.autograd.grad(logits[:, target].sum(), leaf)[0]


EIGHTH = (8, 8, 16, 32, 88, 128, 192, 256)  # channels at width 0.125


def assert_equal_networks(ours, theirs, batch):
    """Logits and W(x): in float64 to 1e-9; in float32 to 1e-4, or to ten times what the reference itself loses by rounding.

    Dozens of layers with random weights amplify rounding: at B = 2.5 the reference's own float32 is up to 4e-4 off its float64.
    """
    ours.eval().load_state_dict(dict(from_study(f"backbone.{name}", value) for name, value in theirs.state_dict().items()))
    with torch.no_grad():
        plain = ours(batch)
    row = dynamic_linear(ours, batch, 0)
    single = theirs.explained(row.encoded, 0)
    exact_row = dynamic_linear(ours.double(), batch.double(), 0)
    exact = theirs.double().explained(exact_row.encoded, 0)
    for mine, my_exact, reference, expected in zip((row.logits, row.weights, plain), (exact_row.logits, exact_row.weights, exact_row.logits),
                                                   (*single, single[0]), (*exact, exact[0])):
        assert relative(my_exact, expected) < 1e-9
        assert relative(mine.double(), expected) < max(1e-4, 10 * relative(reference.double(), expected))


@pytest.mark.parametrize("b,norm", [(b, "AllNorm2d") for b in EXPONENTS] + [(2, "BatchNormUncentered2d")])
def test_the_studys_form_is_the_reference_packages_logits_and_dynamic_weights(b, norm):
    torch.manual_seed(1)
    batch = images(3, 80, 72)
    theirs = with_statistics(StudysXception(b, norm, EIGHTH), torch.cat([batch, 1 - batch], 1))
    options = {} if norm == "AllNorm2d" else dict(norm=norm)
    assert_equal_networks(create_detector("xception", b=b, width=0.125, variant="study", **options), theirs, batch)


@pytest.mark.parametrize("b", [1, 1.75])
def test_the_default_form_with_max_out_and_the_fine_stem_is_the_reference_packages_too(b):
    torch.manual_seed(2)
    batch = images(2, 48)
    theirs = StudysXception(b, "BatchNormUncentered2d", (32, *EIGHTH[1:]), max_out=2, middle=3, head_norm=False, stem=(5, 2, 2), second=1, third=1)
    theirs = with_statistics(theirs, torch.cat([batch, 1 - batch], 1))
    ours = create_detector("xception", b=b, width=0.125, middle=3, stem="fine", max_out=2, zero_mean=0.0, energy_stem=False, logit_temperature=1.0)
    assert_equal_networks(ours, theirs, batch)


@pytest.mark.slow
@pytest.mark.parametrize("b", EXPONENTS)
def test_the_studys_form_at_full_width_and_the_studys_size(b):
    torch.manual_seed(3)
    batch = images(2, 256)
    theirs = with_statistics(StudysXception(b, "AllNorm2d", (32, 64, 128, 256, 728, 1024, 1536, 2048)), torch.cat([batch, 1 - batch], 1))
    assert_equal_networks(create_detector("xception", b=b, variant="study"), theirs, batch)


def test_the_forms_differ_as_described():
    default, study = create_detector("xception", b=2, **SMALL), create_detector("xception", b=2, variant="study", **SMALL)
    for detector in (default, study):
        assert not any(isinstance(layer, (nn.ReLU, nn.MaxPool2d)) for layer in detector.modules())
    assert default.conv1.max_out == 2 and default.conv1.centred > 0 and default.logit_layer.logit_temperature < 1
    assert study.conv1.max_out == 1 and study.conv1.centred == 0 and study.logit_layer.logit_temperature == 1
    kinds = [{type(layer).__name__ for layer in detector.modules() if "Norm" in type(layer).__name__} for detector in (default, study)]
    assert kinds == [{"BatchNormUncentered2d"}, {"AllNorm2d"}]
    assert isinstance(default.head_norm, nn.Identity) and "head_norm.weight" in study.state_dict()
    assert all(layer.conv1.max_out == 1 for layer in default.modules() if hasattr(layer, "pointwise"))
    kept = create_detector("xception", b=2, activation="relu", **SMALL)
    assert any(isinstance(layer, nn.ReLU) for layer in kept.modules())


# ---- sizes and options

@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("stem,smallest,side,positions", [("imagenet", 7, 128, 4), ("fine", 1, 128, 8), ("fine", 1, 80, 5)])
def test_any_size_from_the_smallest_on(b, stem, smallest, side, positions):
    detector = create_detector("xception", b=b, stem=stem, **SMALL).eval()
    assert detector.smallest == smallest
    with torch.no_grad():
        assert detector.features(detector.encode(images(1, side))).shape[2:] == (positions, positions)
        assert detector(images(1, smallest)).isfinite().all() and detector(images(2, 40, 97)).shape == (2, 2)


@pytest.mark.parametrize("windows", list(itertools.product([(3, 2, 0), (5, 2, 1), (4, 3, 2)], [(3, 1, 0), (2, 2, 0)], [(7, 2, 3), (3, 2, 0)])))
def test_the_smallest_side_is_the_smallest(windows):
    network, side = nn.Sequential(*[nn.Conv2d(1, 1, *window) for window in windows]), smallest_side(windows)
    assert min(network(torch.zeros(1, 1, side, side)).shape) == 1
    if side > 1:
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 1, side - 1, side - 1))


def test_the_fine_stem_keeps_room_for_the_cosine_filters():
    for width, units in ((0.125, 32), (1, 32), (2, 64)):
        stem = create_detector("xception", b=2, width=width, stem="fine", middle=0).conv1
        assert stem.out_channels == 2 * units and stem.centred == units and stem.kernel_size == (5, 5)
    assert create_detector("xception", b=2, width=0.125).conv1.out_channels == 16


def test_width_and_middle_scale_the_network():
    count = {options: sum(p.numel() for p in create_detector("xception", b=2, width=options[0], middle=options[1]).parameters())
             for options in ((0.125, 2), (0.125, 8), (0.25, 2))}
    assert 2.5 * count[0.125, 2] < count[0.25, 2] and 1.5 * count[0.125, 2] < count[0.125, 8]
    assert {f"block{number}" for number in (3, 4, 5, 12)} <= {name.split(".")[0] for name in create_detector("xception", **SMALL).state_dict()}
    assert not hasattr(create_detector("xception", **SMALL), "block6")


@pytest.mark.parametrize("options,words", [(dict(stem="coarse"), "coarse.*imagenet, fine"), (dict(middle=9), "middle=9.*8"), (dict(middle=-1), "middle=-1")])
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        create_detector("xception", **options)


# ---- as a detector among others

def test_cam_methods_and_the_bcos_map_work_on_it():
    for b, methods in ((None, ("gradcam", "layercam")), (2, ("gradcam", "bcos"))):
        detector = create_detector("xception", b=b, **SMALL).eval()
        assert detector.cam_layer is detector.conv4
        for method in methods:
            assert explain(detector, images(2, 64), method).maps.shape == (2, 64, 64)


# ---- other projects' files

@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("classifier", ["last_linear", "last_linear.1", "fc"])
@pytest.mark.parametrize("flat", [True, False])
def test_deepfakebenchs_files_find_their_place(prefix, classifier, flat):
    source = create_detector("xception", **SMALL)
    file = {"adjust_channel.0.weight": torch.zeros(4, 4, 1, 1), "adjust_channel.1.running_mean": torch.zeros(4)}
    for name, value in source.state_dict().items():
        file[re.sub("^last_linear", classifier, name)] = value.flatten(1) if flat and "pointwise" in name else value
    places = [from_deepfakebench(prefix + name, value) for name, value in file.items()]
    assert places.count(None) == 2
    again = create_detector("xception", **SMALL)
    again.load_state_dict(dict(place for place in places if place))
    for name, value in source.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_the_studys_file_with_its_unused_layers_finds_its_place():
    theirs = StudysXception(2, "AllNorm2d", EIGHTH)
    theirs.adjust_channel = nn.Sequential(ReferenceConv(8, 4, 1), reference_norms.NoBias(reference_norms.AllNorm2d)(4))
    file = {f"module.backbone.{name}": value for name, value in copy.deepcopy(theirs).state_dict().items()}
    places = [from_study(name, value) for name, value in file.items()]
    ours = create_detector("xception", b=2, width=0.125, variant="study")
    ours.load_state_dict(dict(place for place in places if place))
    assert places.count(None) == sum("adjust_channel" in name for name in file) > 0
