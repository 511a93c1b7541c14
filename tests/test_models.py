"""Detectors: what every one of them promises, parity with torchvision and the reference package, and detectors on disk."""
import json
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from bcos.models import resnet as reference_resnet
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import norms as reference_norms
from scipy.fft import idctn
from torch import nn
from torchvision.ops import StochasticDepth

from bcos_nb.explainers import explain, explain_many
from bcos_nb.layers import BatchNorm2d, BatchNormUncentered2d, BcosConv2d, dynamic_linear, explanation_mode
from bcos_nb.models import Detector, create_detector, list_detectors, load_detector, register_detector, save_detector
from bcos_nb.models.checkpoints import write_atomically
from bcos_nb.models.detector import BUILDERS, study_norms
from bcos_nb.models.parts import cosine_basis, start_with_energy

RESNETS = ["resnet10", "resnet18", "resnet34", "resnet50"]
CAMS = ["gradcam", "gradcam++", "xgradcam", "layercam"]


def images(count=2, height=64, width=64, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def small(arch="resnet10", b=2, seed=0, **options):
    torch.manual_seed(seed)
    return create_detector(arch, b=b, width=0.125, **options).eval()


def with_statistics(network, channels=3):
    """Norm statistics of some batch instead of the initial 0 and 1."""
    network.train()
    with torch.no_grad():
        network(torch.rand(4, channels, 64, 64, generator=torch.Generator().manual_seed(5)))
    return network.eval()


def size_of(detector):
    side = detector.image_size or 96
    return side if isinstance(side, (tuple, list)) else (side, side)


# ---- what every detector promises

@pytest.mark.parametrize("arch", list_detectors())
@pytest.mark.parametrize("b", [None, 1.75])
def test_every_detector_keeps_the_contract(arch, b):
    torch.manual_seed(0)
    detector = create_detector(arch, b=b, width=0.25).eval()
    batch = images(2, *size_of(detector))
    with torch.no_grad():
        logits = detector(batch)
        assert torch.allclose(detector.logits_of(detector.encode(batch)), logits)
    assert isinstance(detector, Detector) and isinstance(detector.cam_layer, nn.Module)
    assert logits.shape == (2, 2) and bool(logits.isfinite().all())
    assert (detector.arch, detector.b, detector.is_bcos) == (arch, b, b is not None)
    assert detector.encode(batch).shape[1] == (6 if b else 3)
    for name, answer in explain_many(detector, batch, CAMS + ["bcos"] * detector.is_bcos, target=1).items():
        assert answer.maps.shape == (2, *batch.shape[2:]), name
        assert bool(answer.maps.isfinite().all()) and answer.maps.min() >= 0 and answer.maps.max() <= 1 + 1e-6, name
    if b:
        with explanation_mode(detector):
            tracked = batch.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(detector(tracked)[:, 1].sum(), tracked)
        assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


@pytest.mark.parametrize("arch", list_detectors())
@pytest.mark.parametrize("b", [None, 2, 1.25])
def test_saved_and_loaded_detectors_are_equal(arch, b, tmp_path):
    torch.manual_seed(0)
    detector = create_detector(arch, b=b, width=0.125, logit_bias=-0.5)
    batch = images(3, *size_of(detector))
    detector(batch)  # training mode: the norms' statistics are saved too
    detector.eval()
    path = save_detector(detector, tmp_path / "run" / "detector.safetensors")
    loaded = load_detector(path)
    assert not loaded.training and loaded.arguments == detector.arguments and (loaded.arch, loaded.b) == (arch, b)
    with torch.no_grad():
        assert torch.equal(loaded(batch), detector(batch)) and torch.equal(load_detector(path.parent)(batch), detector(batch))
    assert sorted(file.name for file in path.parent.iterdir()) == ["detector.json", "detector.safetensors"]


@pytest.mark.parametrize("arch", RESNETS)
@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize("height,width", [(96, 96), (61, 130)])
def test_resnets_take_any_size_and_samples_do_not_mix(arch, b, height, width):
    detector = small(arch, b)
    batch = images(3, height, width)
    with torch.no_grad():
        together = detector(batch)
        alone = torch.cat([detector(image[None]) for image in batch])
    assert detector.image_size is None and torch.allclose(together, alone, atol=1e-5)


def test_a_bcos_detector_is_positively_homogeneous_in_its_encoding():
    detector = small("resnet18", 2)
    encoded = detector.encode(images())
    with torch.no_grad():  # every layer is W(x)x with W of the direction only, but for the stabiliser 1e-6 under the norms
        assert torch.allclose(detector.logits_of(7 * encoded), 7 * detector.logits_of(encoded), rtol=1e-2)
        assert not torch.allclose(small("resnet18", None).logits_of(7 * encoded[:, :3]), 7 * small("resnet18", None).logits_of(encoded[:, :3]), rtol=1e-2)


@pytest.mark.parametrize("width,channels", [(1.0, (64, 512)), (0.5, (32, 256)), (0.01, (8, 64))])
@pytest.mark.parametrize("b", [None, 2])
def test_width_scales_the_channels(width, channels, b):
    detector = create_detector("resnet10", b=b, width=width)
    assert (detector.bn1.num_features, detector.layer4[-1].bn2.num_features) == channels


@pytest.mark.parametrize("arch,blocks", [("resnet10", [1, 1, 1, 1]), ("resnet18", [2, 2, 2, 2]), ("resnet34", [3, 4, 6, 3])])
def test_depths(arch, blocks):
    detector = small(arch)
    assert [len(getattr(detector, f"layer{stage}")) for stage in range(1, 5)] == blocks


def test_both_stems_end_on_positions_of_32_pixels_and_a_last_stride_of_1_on_16():
    spatial = {}
    for stem in ("imagenet", "fine"):
        for last_stride in (1, 2):
            detector = small(stem=stem, last_stride=last_stride)
            with torch.no_grad():
                spatial[stem, last_stride] = detector.features(detector.encode(images(1))).shape[-1]
    assert spatial == {("imagenet", 2): 2, ("imagenet", 1): 4, ("fine", 2): 2, ("fine", 1): 4}


def test_norms_of_the_bcos_form_are_chosen_by_name():
    kinds = {name: {type(m) for m in small(norm=name).modules() if isinstance(m, nn.BatchNorm2d)} for name in ("BatchNormUncentered2d", "BatchNorm2d")}
    assert kinds == {"BatchNormUncentered2d": {BatchNormUncentered2d}, "BatchNorm2d": {BatchNorm2d}}
    assert all(m.bias is None for m in small().modules() if isinstance(m, nn.BatchNorm2d))
    assert all(m.bias is not None for m in small(norm_bias=True).modules() if isinstance(m, nn.BatchNorm2d))


def test_no_relu_and_no_max_pooling_in_the_bcos_form():
    assert not any(isinstance(m, (nn.ReLU, nn.MaxPool2d)) or getattr(m, "bias", None) is not None for m in small("resnet34").modules())


# ---- parity

@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_an_ordinary_resnet_with_torchvisions_weights_is_torchvisions(arch):
    torch.manual_seed(0)
    theirs = with_statistics(getattr(torchvision.models, arch)(weights=None, num_classes=2))
    ours = create_detector(arch).eval()
    ours.load_state_dict(theirs.state_dict())
    batch = images(2, 96, 80)
    standard = (batch - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(ours(batch), theirs(standard), rtol=1e-4, atol=1e-5)
    ours.train(), theirs.train()
    assert torch.allclose(ours(batch), theirs(standard), rtol=1e-4, atol=1e-4)


def reference_of(detector, arch, b, max_out, logit_temperature, logit_bias):
    """The reference package's network with a detector's weights."""
    conv = partial(ReferenceConv, b=b, max_out=max_out)
    theirs = getattr(reference_resnet, arch)(
        num_classes=2, in_chans=6, inplanes=16, conv_layer=conv, norm_layer=reference_norms.NoBias(reference_norms.BatchNormUncentered2d),
        logit_temperature=logit_temperature, logit_bias=logit_bias,
    )
    theirs.fc = ReferenceConv(theirs.num_features, 2, b=b)  # MaxOut is for hidden layers
    state = detector.state_dict()
    theirs.load_state_dict({name: state[name.replace(".linear.weight", ".weight")] for name in theirs.state_dict()})
    return theirs.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
@pytest.mark.parametrize("b,max_out", [(1, 2), (1.25, 1), (1.75, 2), (2, 1), (2.5, 2)])
def test_a_bcos_resnet_equals_the_reference_package(arch, b, max_out):
    torch.manual_seed(0)
    ours = create_detector(arch, b=b, width=0.25, max_out=max_out, zero_mean=0.0, energy_stem=False, logit_temperature=0.3, logit_bias=-0.4)
    with_statistics(ours)
    theirs = reference_of(ours, arch, b, max_out, 0.3, -0.4)
    batch = images(2, 64, 80)
    encoded = torch.cat([batch, 1 - batch], 1)
    with torch.no_grad():
        expected = theirs(encoded)
        assert torch.allclose(ours(batch), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    weights = dynamic_linear(ours, batch, 1).weights
    for n in range(2):
        answer = theirs.explain(encoded[n : n + 1].clone().requires_grad_(), idx=1)["dynamic_linear_weights"][0]
        assert float((weights[n] - answer).abs().max()) < 1e-4 * float(answer.abs().max())


# ---- the stem that starts with energy detectors

@pytest.mark.parametrize("size", [3, 5, 7])
def test_cosine_basis_is_the_transform_of_scipy_without_its_constant(size):
    theirs = []
    for i in range(size):
        for j in range(size):
            unit = np.zeros((size, size))
            unit[i, j] = 1
            theirs.append((i * i + j * j, i, idctn(unit, norm="ortho")))
    theirs = torch.tensor(np.stack([wave for _, _, wave in sorted(theirs, key=lambda entry: entry[:2])][1:]))
    ours = cosine_basis(size)
    overlap = ours.flatten(1).double() @ theirs.flatten(1).T
    assert ours.shape == (size**2 - 1, size, size) and torch.allclose(overlap, torch.eye(size**2 - 1, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("zero_mean", [0.5, 1.0])
def test_the_energy_stem_starts_as_pairs_of_opposite_luminance_filters(max_out, zero_mean):
    def agreement(detector):
        weight = detector.conv1.unit_weight().detach()
        pairs = weight[: detector.conv1.centred].flatten(1).unflatten(0, (-1, 2))
        return (pairs[:, 0] * pairs[:, 1]).sum(1)

    options = dict(width=0.25, max_out=max_out, stem_max_out=max_out, zero_mean=zero_mean)
    torch.manual_seed(0)
    with_energy, without = create_detector("resnet10", b=2, **options), create_detector("resnet10", b=2, energy_stem=False, **options)
    assert with_energy.conv1.centred == round(16 * zero_mean) * max_out
    assert float(agreement(with_energy).max()) < -0.9 and float(agreement(without).abs().max()) < 0.5
    colours = with_energy.conv1.weight.detach()[: with_energy.conv1.centred].flatten(2)
    colours = colours / colours.norm(dim=2, keepdim=True)
    assert float((colours[:, :3] * colours[:, :1]).sum(2).mean()) > 0.8  # red, green and blue look for the same,
    assert float((colours[:, 3:] * colours[:, :1]).sum(2).mean()) < -0.8  # their inverses for the opposite


def test_the_energy_stem_leaves_other_filters_and_the_mean_norm():
    torch.manual_seed(0)
    stem = nn.Conv2d(6, 20, 5, bias=False)
    before = stem.weight.detach().clone()
    start_with_energy(stem, 8, noise=0.0)
    assert torch.equal(stem.weight[8:], before[8:])
    assert torch.allclose(stem.weight[:8].flatten(1).norm(dim=1), before[:8].flatten(1).norm(dim=1).mean().expand(8), rtol=1e-5)
    assert torch.allclose(stem.weight[0:8:2], -stem.weight[1:8:2])
    assert torch.allclose(stem.weight[:8].mean((2, 3)), torch.zeros(8, 6), atol=1e-6)


def test_an_ordinary_detector_has_the_energy_stem_only_when_asked():
    def opposite(detector):
        pairs = detector.conv1.weight.detach().flatten(1)[:8].unflatten(0, (-1, 2))
        return torch.cosine_similarity(pairs[:, 0], pairs[:, 1]).max()

    assert float(opposite(create_detector("resnet10", width=0.25, energy_stem=True))) < -0.9
    assert float(opposite(create_detector("resnet10", width=0.25))) > -0.5


def test_the_stems_share_without_mean_stays_so_while_training():
    detector = small(zero_mean=0.5).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1.0)
    for _ in range(3):
        nn.functional.cross_entropy(detector(images(4)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step(), optimizer.zero_grad()
    means = detector.conv1.unit_weight().detach().mean((2, 3)).abs().amax(1)
    assert float(means[: detector.conv1.centred].max()) < 1e-6 < float(means[detector.conv1.centred :].min())


# ---- refusals

@pytest.mark.parametrize(
    "arguments,options,words",
    [
        (("resnet99",), {}, "resnet99.*resnet10"),
        (("resnet34",), dict(b=0.5), "b=0.5.*at least 1"),
        (("resnet34",), dict(b=math.nan), "at least 1"),
        (("resnet34",), dict(b="2"), "at least 1"),
        (("resnet10",), dict(width=0), "width=0"),
        (("resnet10",), dict(width=-1), "width=-1"),
        (("resnet10",), dict(b=2, norm="GroupNorm"), "GroupNorm.*BatchNormUncentered2d"),
        (("resnet10",), dict(b=2, depth=3, colour=1), "no option colour, depth.*max_out"),
        (("resnet10",), dict(stem="coarse"), "coarse.*imagenet, fine"),
        (("resnet10",), dict(b=2, max_out=0), "max_out=0"),
        (("resnet10",), dict(b=2, zero_mean=2), "zero_mean=2"),
        (("resnet10",), dict(logit_temperature=0), "logit_temperature=0"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(arguments, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        create_detector(*arguments, **options)
    assert 20 < len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 6, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        small()(torch.rand(shape))


def test_explanations_that_an_ordinary_detector_cannot_give_are_refused():
    with pytest.raises(ValueError, match="(?i)ordinary"):
        explain(small(b=None), images(), "bcos")


def test_a_registered_detector_is_listed_and_built():
    @register_detector("tiny", defaults=dict(max_out=3), study=lambda b: dict(max_out=1, depth=7))
    def tiny(parts, width, image_size, logit_bias, logit_temperature, depth=1):
        detector = create_detector("resnet10", b=parts.b, width=width)
        detector.seen = (parts.max_out, depth)
        return detector

    assert "tiny" in list_detectors() and create_detector("tiny", b=2, width=0.125, depth=2).arch == "tiny"
    assert create_detector("tiny", b=2).seen == (3, 1) and create_detector("tiny").seen == (2, 1)
    assert create_detector("tiny", b=2, variant="study").seen == (1, 7) and create_detector("tiny", b=2, variant="study", depth=2, max_out=4).seen == (4, 2)
    with pytest.raises(ValueError, match="no option breadth.*depth"):
        create_detector("tiny", breadth=2)
    del BUILDERS["tiny"]


# ---- the study's form

CHOSEN = {1.25: ("BatchNorm2d", False), 1.75: ("GNInstanceNormUncentered2d", False), 2: ("GNInstanceNormUncentered2d", False), 2.5: ("BatchNormUncentered2d", False)}


@pytest.mark.parametrize("b", CHOSEN)
def test_the_studys_resnet_has_the_norms_of_its_table_and_nothing_of_ours(b):
    detector = create_detector("resnet34", b=b, variant="study", width=0.125)
    assert (type(detector.bn1).__name__, detector.bn1.bias is not None) == CHOSEN[b]
    assert detector.conv1.max_out == 1 and detector.conv1.zero_mean == 0 and detector.conv1.kernel_size == (7, 7)
    assert all(layer.max_out == 1 and layer.unit_norm for layer in detector.modules() if isinstance(layer, BcosConv2d))
    assert detector.logit_layer.logit_temperature == 1 and not detector.logit_layer.logit_bias
    again = create_detector(**detector.arguments)
    assert again.arguments == detector.arguments and str(again) == str(detector)


def test_the_studys_norm_at_another_exponent_is_that_of_the_nearest_searched_one():
    assert study_norms("resnet34", 1.1) == dict(norm="BatchNorm2d", norm_bias=False)
    assert study_norms("vitc_ti", 1.8) == dict(norm="DetachableLayerNorm", norm_bias=False, norm_2d="BatchNorm2d", norm_2d_bias=True)
    assert study_norms("xception", 2) == study_norms("vgg16", 2) == {}


def test_an_option_that_is_given_holds_in_the_studys_form():
    detector = create_detector("resnet10", b=2, variant="study", width=0.125, norm="AllNorm2d", max_out=2)
    assert type(detector.bn1).__name__ == "AllNorm2d" and detector.layer1[0].conv1.max_out == 2


@pytest.mark.parametrize("b", [None, 1.75])
def test_resnet50_and_stochastic_depth(b):
    torch.manual_seed(0)
    detector = create_detector("resnet50", b=b, width=0.125, stochastic_depth=0.4)
    drops = [module.p for module in detector.modules() if isinstance(module, StochasticDepth)]
    assert len(drops) == 15 and drops[-1] == pytest.approx(0.4) and drops == sorted(drops)  # the first block's is 0
    batch = images(4)
    assert not torch.equal(detector.train()(batch), detector(batch))
    plain = create_detector("resnet50", b=b, width=0.125).eval()
    plain.load_state_dict(detector.state_dict())
    assert torch.equal(detector.eval()(batch), plain(batch))


# ---- damaged and missing files

@pytest.fixture
def saved(tmp_path):
    return save_detector(small(), tmp_path / "detector.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -7])
def test_a_truncated_file_of_weights_is_named(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"detector\.safetensors is no whole safetensors file"):
        load_detector(saved)


@pytest.mark.parametrize("missing", ["detector.safetensors", "detector.json"])
def test_a_missing_file_is_named(saved, missing):
    (saved.parent / missing).unlink()
    for path in (saved, saved.parent):
        with pytest.raises(FileNotFoundError, match=missing.replace(".", r"\.")):
            load_detector(path)


@pytest.mark.parametrize("text", ["", "{", '{"arch": "resnet10"', "[]", '{"b": 2}', "nonsense"])
def test_a_damaged_recipe_is_named(saved, text):
    saved.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"detector\.json"):
        load_detector(saved)


@pytest.mark.parametrize("change", [dict(arch="resnet18"), dict(b=None), dict(width=0.25), dict(norm_bias=True)])
def test_weights_of_another_network_are_refused(saved, change):
    recipe = json.loads(saved.with_suffix(".json").read_text()) | change
    saved.with_suffix(".json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"does not fit the network that detector\.json describes"):
        load_detector(saved)


def test_only_what_can_be_loaded_again_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_detector(small(), tmp_path / "detector.pt")
    with pytest.raises(ValueError, match="create_detector"):
        save_detector(nn.Linear(2, 2), tmp_path / "detector.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "a" / "file.txt", lambda place: place.write_text("old"))

    def half(place):
        place.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no rename")))
    with pytest.raises(OSError, match="no rename"):
        write_atomically(path, lambda place: place.write_text("new"))
    assert path.read_text() == "old" and [file.name for file in path.parent.iterdir()] == ["file.txt"]
