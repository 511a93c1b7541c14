"""Weights of other projects: what loads, what it computes then, and what is refused with which words."""
import argparse
import pickle
import warnings
from functools import partial

import pytest
import torch
import torchvision
from bcos.models import convnext as reference_convnext
from bcos.models import densenet as reference_densenet
from bcos.models import resnet as reference_resnet
from bcos.models import vgg as reference_vgg
from bcos.models import vit as reference_vit
from bcos.modules import BcosConv2d as ReferenceConv
from bcos.modules import BcosLinear as ReferenceLinear
from bcos.modules import LogitLayer as ReferenceLogitLayer
from bcos.modules import common as reference_common
from bcos.modules import norms as reference_norms
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bcos_nb.explainers import explain
from bcos_nb.layers import dynamic_linear
from bcos_nb.models import create_detector, load_detector, save_detector
from bcos_nb.models.checkpoints import SOURCES, CheckpointMismatch, load_checkpoint, recognise, tensors_of, without_prefixes

STUDY = dict(variant="study", norm="BatchNormUncentered2d", norm_bias=False)


def images(count=2, height=64, width=80, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def with_statistics(network, channels, side=64):
    network.train()
    with torch.no_grad():
        network(torch.rand(4, channels, side, side, generator=torch.Generator().manual_seed(5)))
    return network.eval()


def bcos_resnet(arch="resnet18", b=2.0, classes=2, inplanes=16, max_out=1):
    torch.manual_seed(3)
    theirs = getattr(reference_resnet, arch)(
        num_classes=classes, in_chans=6, inplanes=inplanes, conv_layer=partial(ReferenceConv, b=b, max_out=max_out),
        norm_layer=reference_norms.NoBias(reference_norms.BatchNormUncentered2d))
    return with_statistics(theirs, 6)


def torch_resnet(arch="resnet18", classes=2):
    torch.manual_seed(3)
    return with_statistics(getattr(torchvision.models, arch)(num_classes=classes), 3)


def saved(content, path):
    torch.save(content, path)
    return path


def state_of(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


def unchanged(detector, before):
    after = detector.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def standardised(batch, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return (batch - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ---- B-cos-v2

@pytest.mark.parametrize("arch,b,packing", [("resnet18", 2.0, "state_dict"), ("resnet34", 1.25, "safetensors"), ("resnet34", 2.5, "lightning"), ("resnet50", 1.75, "state_dict")])
def test_a_checkpoint_of_the_bcos_package_loads_and_explains_identically(arch, b, packing, tmp_path):
    torch.manual_seed(3)
    theirs = bcos_resnet(arch, b)
    if packing == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(theirs.state_dict(), path)
    else:
        state = theirs.state_dict()
        path = saved(state if packing == "state_dict" else {"epoch": 3, "state_dict": {f"model.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    torch.manual_seed(0)
    ours = load_checkpoint(create_detector(arch, b=b, width=0.25, **STUDY), path).eval()
    batch = images()
    encoded = torch.cat([batch, 1 - batch], 1)
    with torch.no_grad():
        expected = theirs(encoded)
        assert torch.allclose(ours(batch), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    linear, attribution = dynamic_linear(ours, batch, 1), explain(ours, batch, "bcos", target=1)
    for n in range(2):
        answer = theirs.explain(encoded[n : n + 1].clone().requires_grad_(), idx=1)
        weights = answer["dynamic_linear_weights"][0]
        assert float((linear.weights[n] - weights).abs().max()) < 1e-4 * float(weights.abs().max())
        picture = torch.as_tensor(answer["explanation"])
        visible = attribution.rgba[n][..., 3:] * attribution.rgba[n][..., :3]
        assert float((attribution.rgba[n][..., 3] - picture[..., 3]).abs().max()) < 1e-4
        assert float((visible - picture[..., 3:] * picture[..., :3]).abs().max()) < 1e-3


BNU = reference_norms.NoBias(reference_norms.BatchNormUncentered2d)
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
NEXT = [(24, 48, 3), (48, 96, 3), (96, 192, 9), (192, None, 3)]


def bcos_densenet(conv):
    return reference_densenet.densenet121(num_classes=2, conv_layer=conv, norm_layer=BNU, growth_rate=8, num_init_features=16)


def bcos_convnext(conv):
    return reference_convnext.BcosConvNeXt([reference_convnext.CNBlockConfig(*row) for row in NEXT], 0.1, layer_scale=1.0, num_classes=2, conv_layer=conv, norm_layer=None)


def bcos_vgg(conv):
    layers = reference_vgg.make_layers([entry if entry == "M" else entry // 8 for entry in VGG16], norm_layer=BNU, conv_layer=conv)
    with torch.device("meta"):
        network = reference_vgg.BcosVGG(layers, 2, False, conv)
    network.classifier = nn.Sequential(conv(64, 512, 7, padding=3), conv(512, 512), conv(512, 2))
    return network


def bcos_vit(conv, b=1.75):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = reference_vit.SimpleViT(
            image_size=14, patch_size=1, num_classes=2, dim=48, depth=2, heads=1, mlp_dim=192, conv_stem=[8, 16, 24, 48], channels=6, act_layer=nn.Identity,
            linear_layer=partial(ReferenceLinear, b=b, max_out=2), conv2d_layer=partial(ReferenceConv, b=b, max_out=2),
            norm_layer=reference_norms.NoBias(reference_norms.DetachableLayerNorm), norm2d_layer=reference_norms.NoBias(reference_norms.BatchNorm2d))
    return reference_common.BcosSequential(network, ReferenceLogitLayer())


@pytest.mark.parametrize("arch,make,options", [
    ("densenet121", bcos_densenet, dict(width=0.25, norm="BatchNormUncentered2d", norm_bias=False, logit_temperature=1.0)),
    ("convnext_tiny", bcos_convnext, dict(width=0.25, logit_temperature=1.0)),
    ("vgg16", bcos_vgg, dict(width=0.125, logit_temperature=1.0)),
    ("vitc_ti", bcos_vit, dict(width=0.25, depth=2, norm_bias=False, norm_2d_bias=False)),
])
def test_files_of_the_other_backbones(arch, make, options, tmp_path):
    torch.manual_seed(3)
    theirs, ours = make(partial(ReferenceConv, b=1.75)).eval(), create_detector(arch, b=1.75, variant="study", **options)
    batch = images(2, 64, 64)
    for packing in (lambda name: name, lambda name: f"model.{name}", lambda name: f"backbone.{name.removeprefix('0.')}"):
        ours.load_state_dict({name: torch.zeros_like(value) for name, value in ours.state_dict().items()})
        load_checkpoint(ours, saved({packing(name): value for name, value in theirs.state_dict().items()}, tmp_path / "a.pth")).eval()
        with torch.no_grad():
            expected = theirs(ours.encode(batch))
            assert float((ours(batch) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("arch,make", [
    ("vgg16", lambda: torchvision.models.VGG(torchvision.models.vgg.make_layers([e if e == "M" else e // 8 for e in VGG16], True), 2, init_weights=False)),
    ("densenet121", lambda: torchvision.models.DenseNet(8, (6, 12, 24, 16), 16, num_classes=2)),
    ("convnext_tiny", lambda: torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(*row) for row in NEXT], 0.1, layer_scale=1.0, num_classes=2)),
])
def test_files_of_torchvisions_other_backbones(arch, make, tmp_path):
    torch.manual_seed(3)
    with torch.device("meta" if arch == "vgg16" else "cpu"):
        theirs = make()
    if arch == "vgg16":
        theirs.features = torchvision.models.vgg.make_layers([e if e == "M" else e // 8 for e in VGG16], True)
        theirs.classifier[0], theirs.classifier[3], theirs.classifier[6] = nn.Linear(64 * 49, 512), nn.Linear(512, 512), nn.Linear(512, 2)
    theirs.eval()
    ours = load_checkpoint(create_detector(arch, width=0.125 if arch == "vgg16" else 0.25), saved(theirs.state_dict(), tmp_path / "a.pth")).eval()
    with torch.no_grad():
        assert torch.allclose(ours(images()), theirs(standardised(images())), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torchvisions_inception_loads_without_its_second_classifier(tmp_path):
    theirs = torchvision.models.inception_v3(num_classes=2, init_weights=False, transform_input=True).eval()
    ours = load_checkpoint(create_detector("inception_v3"), saved(theirs.state_dict(), tmp_path / "a.pth"), source="torchvision").eval()
    with torch.no_grad():
        assert torch.allclose(ours(images(1, 128, 128)), theirs(standardised(images(1, 128, 128))), rtol=1e-3, atol=1e-5)


def test_the_running_average_is_loaded_when_asked_for(tmp_path):
    theirs = bcos_resnet()
    average = AveragedModel(theirs)  # what B-cos-v2's and torchvision's averages are
    for parameter in theirs.parameters():
        parameter.data *= -1
    lightning = {f"model.{k}": v for k, v in theirs.state_dict().items()} | {f"ema.{k}": v for k, v in average.state_dict().items()}
    files = {"lightning": {"state_dict": lightning}, "torchvision": {"model": theirs.state_dict(), "model_ema": average.state_dict(), "epoch": 1},
             "timm": {"state_dict": theirs.state_dict(), "state_dict_ema": average.module.state_dict()}}
    for name, content in files.items():
        path = saved(content, tmp_path / f"{name}.pth")
        for ema in (False, True):
            ours = load_checkpoint(create_detector("resnet18", b=2, width=0.25, **STUDY), path, ema=ema)
            expected = (average.module if ema else theirs).conv1.linear.weight
            assert torch.equal(ours.conv1.weight, expected), (name, ema)
    with pytest.raises(ValueError, match="no running average"):
        load_checkpoint(ours, saved(theirs.state_dict(), tmp_path / "plain.pth"), ema=True)


def test_max_out_of_the_file_must_be_the_detectors(tmp_path):
    path = saved(bcos_resnet(max_out=2).state_dict(), tmp_path / "a.pth")
    detector = create_detector("resnet18", b=2, width=0.25, **STUDY)
    before = state_of(detector)
    with pytest.raises(CheckpointMismatch, match=r"MaxOut 2 where the detector has 1.*max_out=2") as caught:
        load_checkpoint(detector, path)
    assert unchanged(detector, before) and any(name.startswith("layer1.0.conv1.weight [32, 16, 3, 3] instead of [16, 16, 3, 3]") for name in caught.value.misshapen)
    theirs = bcos_resnet(max_out=2)
    theirs.fc = ReferenceConv(theirs.num_features, 2, b=2)  # MaxOut is for hidden layers
    ours = load_checkpoint(create_detector("resnet18", b=2, width=0.25, **STUDY, max_out=2, stem_max_out=2), saved(theirs.state_dict(), tmp_path / "b.pth")).eval()
    with torch.no_grad():
        expected = theirs.eval()(ours.encode(images()))
        assert torch.allclose(ours(images()), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# ---- torchvision

@pytest.mark.parametrize("arch,prefix", [("resnet18", "module.model."), ("resnet34", "module."), ("resnet50", ""), ("resnet18", "_orig_mod.")])
def test_torchvisions_resnets(arch, prefix, tmp_path):
    theirs = torch_resnet(arch)
    path = saved({prefix + name: value for name, value in theirs.state_dict().items()}, tmp_path / "a.pth")
    ours = load_checkpoint(create_detector(arch), path).eval()
    with torch.no_grad():
        assert torch.allclose(ours(images()), theirs(standardised(images())), rtol=1e-4, atol=1e-5)


def test_a_thousand_classes_are_refused_or_left_out(tmp_path):
    theirs = torch_resnet(classes=1000)
    path, detector = saved(theirs.state_dict(), tmp_path / "imagenet.pth"), create_detector("resnet18")
    before = state_of(detector)
    with pytest.raises(CheckpointMismatch, match=r'1000 classes and the detector\'s 2: head="skip"') as caught:
        load_checkpoint(detector, path)
    assert caught.value.misshapen == ["fc.weight [1000, 512] instead of [2, 512]", "fc.bias [1000] instead of [2]"] and unchanged(detector, before)
    with pytest.warns(UserWarning, match=r"classifier of resnet18 \(fc\) keeps its own weights"):
        assert load_checkpoint(detector, path, head="skip") is detector
    after = detector.state_dict()
    assert torch.equal(after["fc.weight"], before["fc.weight"]) and torch.equal(after["fc.bias"], before["fc.bias"])
    assert torch.equal(after["layer4.1.bn2.running_var"], theirs.state_dict()["layer4.1.bn2.running_var"])
    bcos = create_detector("resnet18", b=2, width=0.25, **STUDY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_checkpoint(bcos, saved(bcos_resnet(classes=1000).state_dict(), tmp_path / "bcos.pth"), head="skip")


def test_stems_of_the_other_form_are_named(tmp_path):
    ordinary, bcos = create_detector("resnet18", width=0.25), create_detector("resnet18", b=2, width=0.25, **STUDY)
    with pytest.raises(CheckpointMismatch, match="reads 3 channels.*reads 6.*bcosify"):
        load_checkpoint(bcos, saved(ordinary.state_dict(), tmp_path / "a.pth"))
    with pytest.raises(CheckpointMismatch, match="reads 6 channels.*reads 3.*b=2"):
        load_checkpoint(ordinary, saved(bcos_resnet().state_dict(), tmp_path / "b.pth"))


def test_norm_biases_are_named(tmp_path):
    with_bias = create_detector("resnet18", b=2, width=0.25, **(STUDY | dict(norm_bias=True)))
    without = create_detector("resnet18", b=2, width=0.25, **STUDY)
    with pytest.raises(CheckpointMismatch, match="norm_bias=True"):
        load_checkpoint(without, saved(with_bias.state_dict(), tmp_path / "a.pth"))
    with pytest.raises(CheckpointMismatch, match="norm_bias=False"):
        load_checkpoint(with_bias, saved(without.state_dict(), tmp_path / "b.pth"))


# ---- DeepfakeBench and the study

def bench_resnet(theirs):
    """A ResNet as DeepfakeBench's ResNet34 names it: torchvision's children but the last two in a Sequential, and its own fc."""
    children = nn.Sequential(*list(theirs.children())[:-2])
    return {f"backbone.resnet.{name}": value for name, value in children.state_dict().items()} | {
        f"backbone.fc.{name}": value for name, value in theirs.fc.state_dict().items()}


def test_deepfakebenchs_resnet34(tmp_path):
    theirs, ours = torch_resnet("resnet34"), create_detector("resnet34")
    for parallel in ("", "module."):
        torch.nn.init.zeros_(ours.conv1.weight)
        load_checkpoint(ours, saved({parallel + name: value for name, value in bench_resnet(theirs).items()}, tmp_path / "ckpt_best.pth")).eval()
        assert torch.equal(ours.conv1.weight, theirs.conv1.weight)
    with torch.no_grad():
        expected = theirs(standardised(images(), (0.5,) * 3, (0.5,) * 3))
        assert torch.allclose(ours(images()), expected, rtol=1e-4, atol=1e-5)
        again = load_detector(save_detector(ours, tmp_path / "detector.safetensors"))
        assert torch.equal(again(images()), ours(images())) and again.arguments == ours.arguments
        load_checkpoint(again, saved(theirs.state_dict(), tmp_path / "torchvision.pth"), source="torchvision")
        assert torch.allclose(again(images()), theirs(standardised(images())), rtol=1e-4, atol=1e-5)


def test_bcos_resnet34_of_the_study(tmp_path):
    theirs = bcos_resnet("resnet34", 2.5)
    for prefix in ("backbone.", "module.backbone."):
        path = saved({prefix + name: value for name, value in theirs.state_dict().items()}, tmp_path / "ckpt_best.pth")
        ours = load_checkpoint(create_detector("resnet34", b=2.5, width=0.25, **STUDY), path).eval()
        with torch.no_grad():
            expected = theirs(ours.encode(images()))
            assert torch.allclose(ours(images()), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    average = {"n_averaged": torch.tensor(3)} | {f"module.backbone.{name}": value for name, value in theirs.state_dict().items()}
    load_checkpoint(ours, saved(average, tmp_path / "swa.pth"))


class TheirSeparable(nn.Module):
    """A separable convolution with DeepfakeBench's names."""

    def __init__(self, before, after):
        super().__init__()
        self.conv1, self.pointwise = nn.Conv2d(before, before, 3, 1, 1, groups=before, bias=False), nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x):
        return self.pointwise(self.conv1(x))


class TheirBlock(nn.Module):
    """A block with DeepfakeBench's names: skip, skipbn, and rep with its rectifiers counted."""

    def __init__(self, before, after, count, stride, relu_first=True, grow_first=True):
        super().__init__()
        self.skip = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 or before != after else None
        self.skipbn = nn.BatchNorm2d(after) if self.skip is not None else None
        layers, channels = [], before
        for number in range(count):
            out = after if grow_first or number == count - 1 else before
            layers += [nn.ReLU(), TheirSeparable(channels, out), nn.BatchNorm2d(out)]
            channels = out
        self.rep = nn.Sequential(*layers[0 if relu_first else 1:], *([nn.MaxPool2d(3, stride, 1)] if stride > 1 else []))

    def forward(self, x):
        return self.rep(x) + (x if self.skip is None else self.skipbn(self.skip(x)))


class TheirXception(nn.Module):
    """Xception at an eighth of its width, with the names that DeepfakeBench's has, among them those that its forward pass never reads."""

    def __init__(self, dropout=False):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.block1, self.block2, self.block3 = TheirBlock(8, 16, 2, 2, relu_first=False), TheirBlock(16, 32, 2, 2), TheirBlock(32, 88, 2, 2)
        for number in range(4, 12):
            setattr(self, f"block{number}", TheirBlock(88, 88, 3, 1))
        self.block12 = TheirBlock(88, 128, 2, 2, grow_first=False)
        self.conv3, self.bn3, self.conv4, self.bn4 = TheirSeparable(128, 192), nn.BatchNorm2d(192), TheirSeparable(192, 256), nn.BatchNorm2d(256)
        self.last_linear = nn.Sequential(nn.Dropout(0.5), nn.Linear(256, 2)) if dropout else nn.Linear(256, 2)
        self.adjust_channel = nn.Sequential(nn.Conv2d(256, 64, 1), nn.BatchNorm2d(64), nn.ReLU())

    def forward(self, x):
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        for number in range(1, 13):
            x = getattr(self, f"block{number}")(x)
        return self.last_linear(torch.relu(self.bn4(self.conv4(torch.relu(self.bn3(self.conv3(x)))))).mean((2, 3)))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("prefix,flat", [("backbone.", False), ("module.backbone.", True), ("", True)])
def test_deepfakebenchs_xception(prefix, flat, dropout, tmp_path):
    torch.manual_seed(0)
    theirs = with_statistics(TheirXception(dropout), 3)
    state = {prefix + name: value[:, :, 0, 0] if flat and name.endswith("pointwise.weight") else value for name, value in theirs.state_dict().items()}
    ours = load_checkpoint(create_detector("xception", width=0.125), saved(state, tmp_path / "ckpt_best.pth")).eval()
    with torch.no_grad():
        assert torch.allclose(ours(images()), theirs(standardised(images(), (0.5,) * 3, (0.5,) * 3)), rtol=1e-4, atol=1e-5)


def test_imagenets_xception_as_deepfakebench_starts_from_it(tmp_path):
    state = TheirXception().state_dict()
    old = {name: value[:, :, 0, 0] if name.endswith("pointwise.weight") else value for name, value in state.items()
           if not name.startswith(("last_linear", "adjust_channel")) and not name.endswith("num_batches_tracked")}
    old |= {"fc.weight": torch.zeros(1000, 256), "fc.bias": torch.zeros(1000)}
    path, detector = saved(old, tmp_path / "xception-b5690688.pth"), create_detector("xception", width=0.125)
    with pytest.raises(CheckpointMismatch, match="1000 classes"):
        load_checkpoint(detector, path)
    with pytest.warns(UserWarning, match="last_linear"):
        load_checkpoint(detector, path, head="skip")
    assert torch.equal(detector.block5.rep[1].pointwise.weight[:, :, 0, 0], old["block5.rep.1.pointwise.weight"])


def test_the_studys_xception(tmp_path):
    """Its B-cos Xception counts layers without rectifiers, and ends in classifier_head."""
    torch.manual_seed(0)
    options = dict(b=2, variant="study", width=0.125)
    source, ours = with_statistics(create_detector("xception", **options), 3), create_detector("xception", **options)
    names = {}
    for name in source.state_dict():
        theirs = name.replace("head_norm.", "classifier_head.0.").replace("last_linear.", "classifier_head.1.")
        if ".rep." in theirs:
            block, index = int(theirs.split(".")[0][5:]), int(theirs.split(".")[2])
            position = index - (block > 1)  # without the rectifier in front: convolution, norm, rectifier, ...
            theirs = theirs.replace(f".rep.{index}.", f".rep.{position // 3 * 2 + position % 3}.")
        value = source.state_dict()[name]
        names[name] = "backbone." + (theirs.removesuffix("weight") + "linear.weight" if value.ndim == 4 else theirs)
    path = saved({theirs: source.state_dict()[name] for name, theirs in names.items()}, tmp_path / "ckpt_best.pth")
    load_checkpoint(ours, path).eval()
    with torch.no_grad():
        assert torch.equal(ours(images()), source(images()))


@pytest.mark.parametrize("tensors,taken,expected,whose", [
    ({"conv1.linear.weight": 4}, (), (), "bcos-v2"),
    ({"to_patch_embedding.linear.linear.weight": 2, "transformer.encoder_0.attn.norm.weight": 1}, ("0.",), (), "bcos-v2"),
    ({"conv1.linear.weight": 4}, ("backbone.",), (), "study"),
    ({"linear_head.linear.weight": 2, "transformer.encoder_0.attn.norm.weight": 1}, ("backbone.",), (), "study"),
    ({"resnet.0.weight": 4, "fc.weight": 2}, ("module.", "backbone."), (), "deepfakebench"),
    ({"block1.rep.0.conv1.weight": 4}, (), (), "deepfakebench"),
    ({"conv1.weight": 4, "fc.weight": 2}, (), (), "torchvision"),
    ({"conv1.weight": 4, "fc.weight": 2}, (), ("conv1.weight", "fc.weight"), "bcos_nb"),
    ({"encoder.weight": 4}, (), (), None),
])
def test_whose_weights_they_are_is_read_off_their_names(tensors, taken, expected, whose):
    assert recognise({name: torch.zeros((1,) * ndim) for name, ndim in tensors.items()}, taken, expected) == whose
    assert whose is None or whose in SOURCES


def test_matrices_and_1_by_1_convolutions_are_the_same(tmp_path):
    theirs = bcos_resnet()
    flat = {name: value.flatten(1) if value.shape[2:] == (1, 1) else value for name, value in theirs.state_dict().items()}
    ours = load_checkpoint(create_detector("resnet18", b=2, width=0.25, **STUDY), saved(flat, tmp_path / "a.pth"))
    assert torch.equal(ours.fc.weight, theirs.fc.linear.weight)
    ordinary = torch_resnet()
    deep = {name: value[..., None, None] if name == "fc.weight" else value for name, value in ordinary.state_dict().items()}
    assert torch.equal(load_checkpoint(create_detector("resnet18"), saved(deep, tmp_path / "b.pth")).fc.weight, ordinary.fc.weight)


# ---- what does not fit

def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    state = torch_resnet().state_dict()
    state["layer9.weight"] = state.pop("layer2.0.conv1.weight")
    state["bn1.running_mean"] = torch.zeros(7)
    detector = create_detector("resnet18")
    before, encode = state_of(detector), detector.encode
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(detector, saved(state, tmp_path / "a.pth"))
    assert caught.value.missing == ["layer2.0.conv1.weight"] and caught.value.unexpected == ["layer9.weight"]
    assert caught.value.misshapen == ["bn1.running_mean [7] instead of [64]"]
    for word in ("nothing was loaded", "those of torchvision", "layer2.0.conv1.weight", "layer9.weight", "bn1.running_mean"):
        assert word in str(caught.value)
    assert unchanged(detector, before) and detector.encode is encode and "\n" not in str(caught.value)


def test_another_network_lists_all_its_tensors(tmp_path):
    detector, other = create_detector("resnet10", width=0.25), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(CheckpointMismatch, match="not recognised") as caught:
        load_checkpoint(detector, saved(other.state_dict(), tmp_path / "a.pth"))
    assert set(caught.value.unexpected) == set(other.state_dict())
    assert set(caught.value.missing) == {name for name in detector.state_dict() if not name.endswith("num_batches_tracked")}
    with pytest.raises(CheckpointMismatch, match="read as source='bcos-v2'"):
        load_checkpoint(detector, tmp_path / "a.pth", source="bcos-v2")


def test_two_tensors_for_one_place_are_refused(tmp_path):
    state = bcos_resnet().state_dict()
    state["conv1.weight"] = state["conv1.linear.weight"]
    with pytest.raises(CheckpointMismatch, match=r"conv1\.weight \(a second conv1\.weight\)"):
        load_checkpoint(create_detector("resnet18", b=2, width=0.25, **STUDY), saved(state, tmp_path / "a.pth"))


def test_counters_of_old_files_may_be_missing(tmp_path):
    theirs = torch_resnet()
    old = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    load_checkpoint(create_detector("resnet18"), saved(old, tmp_path / "a.pth"))


# ---- files that are not read

class Runs:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content,words", [
    (lambda: nn.Conv2d(1, 1, 1), r"torch\.nn\.modules\.conv\.Conv2d"),
    (lambda: {"state_dict": {}, "args": argparse.Namespace(lr=1)}, r"argparse\.Namespace"),
    (lambda: {"weight": torch.zeros(1), "note": Runs()}, "print"),
])
def test_what_needs_unpickling_is_refused_with_what_it_wants(content, words, legacy, tmp_path, capsys):
    detector = create_detector("resnet10", width=0.25)
    before, path = state_of(detector), tmp_path / "a.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=f"is refused.*{words}.*safetensors"):
        load_checkpoint(detector, path)
    assert unchanged(detector, before) and "code ran" not in capsys.readouterr().out


def test_other_files_are_refused(tmp_path):
    detector = create_detector("resnet10", width=0.25)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_checkpoint(detector, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="is a folder.*ckpt_best.pth"):
        load_checkpoint(detector, tmp_path)
    path = saved(detector.state_dict(), tmp_path / "a.pth")
    for name, data, words in (("cut.pth", path.read_bytes()[:5000], "no whole checkpoint|is refused"), ("empty.pth", b"", "no whole checkpoint|is refused"),
                              ("text.pth", b"404: not found", "no whole checkpoint|is refused"), ("cut.safetensors", b"1234", "no whole safetensors"),
                              ("plain.pkl", pickle.dumps({"a": Runs()}), "is refused"), ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS.*git lfs pull"),
                              ("page.safetensors", b"\n<!DOCTYPE html><html>Quota exceeded</html>", "web page")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            load_checkpoint(detector, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
        with pytest.raises(ValueError, match="TorchScript"):
            load_checkpoint(detector, tmp_path / "script.pt")
    for content, words in ((torch.zeros(3), "holds a Tensor"), ({"epoch": 3}, "no named tensors, but epoch"), ([1], "holds a list")):
        with pytest.raises(ValueError, match=words):
            load_checkpoint(detector, saved(content, tmp_path / "b.pth"))


def test_unknown_options_are_refused(tmp_path):
    detector = create_detector("resnet10", width=0.25)
    path = saved(detector.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="source='timm'.*bcos-v2.*deepfakebench"):
        load_checkpoint(detector, path, source="timm")
    with pytest.raises(ValueError, match="head='drop'.*keep or skip"):
        load_checkpoint(detector, path, head="drop")
    assert load_checkpoint(detector, path) is detector


def test_packing_and_prefixes():
    value = torch.zeros(1)
    assert tensors_of({"model": {"state_dict": {"a.b": value, "step": 3}}, "lr": 1}).keys() == {"a.b"}
    for given, left, taken in (({"module.backbone.a.b": value, "n_averaged": value}, {"a.b"}, ("module.", "backbone.")),
                               ({"backbone.a": value, "loss_func.weight": value, "backbone.adjust_channel.0.weight": value}, {"a"}, ("backbone.",)),
                               ({"0.a": value, "1.a": value}, {"0.a", "1.a"}, ()), ({"0.a": value}, {"a"}, ("0.",))):
        tensors, prefixes = without_prefixes(given)
        assert (tensors.keys(), prefixes) == (left, taken)
    assert without_prefixes({"network.a": value}, ["network.a", "network.b"]) == ({"network.a": value}, ())
