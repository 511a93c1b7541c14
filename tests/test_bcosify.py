"""B-cosification: the same function at B = 1, complete explanations above, and a detector like any other."""
import copy
import json

import pytest
import timm
import torch
import torchvision
from torch import nn

from bcos_nb.explainers import explain_many
from bcos_nb.layers import BatchNorm2d, BatchNormUncentered2d, BcosConv2d, BcosLinear, Standardize, dynamic_linear, explanation_mode
from bcos_nb.layers.bcos import DynamicLinearModule
from bcos_nb.models import Detector, create_detector, list_detectors, load_detector, save_detector
from bcos_nb.models.bcosify import (BcosifiedAttention, Form, GatedActivation, bcosify, biases_of, decay_biases, rebuild, renew_statistics, six_channel_weight,
                                    with_exponent)

SMALL = {"vitc_ti": dict(depth=2), "vitc_s": dict(depth=1), "vitc_b": dict(depth=1)}
FOREIGN = ["torchvision/resnet18", "torchvision/vgg11_bn", "torchvision/densenet121", "torchvision/convnext_tiny", "torchvision/vit_b_16",
           "torchvision/mobilenet_v3_small", "torchvision/efficientnet_b0", "torchvision/googlenet",
           "timm/resnet18", "timm/convnext_atto", "timm/vit_tiny_patch16_224", "timm/deit_tiny_distilled_patch16_224"]
QUICK = ["torchvision/mobilenet_v3_small", "timm/convnext_atto"]  # the others take seconds each


def images(count=2, height=96, width=96, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained(network, side=96, seed=0):
    """A network as training leaves it: norm statistics of data, biases and small parameters that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        elif not bool(parameter.abs().max()) or name.endswith(("layer_scale", "gamma")):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.5
    network.train()
    for _ in range(3):
        network(torch.randn(4, 3, side, side, generator=generator) if not isinstance(network, Detector) else torch.rand(4, 3, side, side, generator=generator))
    return network.eval()


def own(arch, width=0.125, **options):
    torch.manual_seed(0)
    return trained(create_detector(arch, width=width, **SMALL.get(arch, {}), **options), 96)


def foreign(name):
    torch.manual_seed(0)
    package, _, kind = name.partition("/")
    network = torchvision.models.get_model(kind, weights=None) if package == "torchvision" else timm.create_model(kind, pretrained=False)
    if hasattr(network, "transform_input"):
        network.transform_input = False
    return trained(network, side_of(name))


def side_of(name):
    return 224 if "vit" in name or "deit" in name else 96


def standard(name):
    cfg = timm.create_model(name.partition("/")[2], pretrained=False).pretrained_cfg if name.startswith("timm") else {}
    return Standardize(tuple(cfg.get("mean", (0.485, 0.456, 0.406))), tuple(cfg.get("std", (0.229, 0.224, 0.225))))


@torch.no_grad()
def difference(network, detector, batch, before=nn.Identity()):
    expected = network(before(batch))
    return float((detector(batch) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def is_complete(detector, batch):
    """Within 1e-4 of the logit; and in float64, so that a logit which is nearly all constant hides nothing, within 1e-4 of what the pixels contribute."""
    fine = copy.deepcopy(detector).double()
    for b in (1, 1.5, 2):
        linear = dynamic_linear(with_exponent(fine, b), batch[:1].double(), 1, check=False)
        shown = linear.contributions.sum((1, 2))
        missed = (shown + linear.bias - linear.logits[:, 1]).abs()
        if not (missed <= 1e-4 * shown.abs() + 1e-15).all() or float(dynamic_linear(with_exponent(detector, b), batch, b != 1, check=False).error.max()) > 1e-4:
            return False
    return True


# ---- the same function

@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.slow if arch in ("resnet50", "vitc_s", "vitc_b") else []) for arch in list_detectors()])
def test_every_backbone_keeps_its_function_at_1_and_is_complete_above(arch):
    network = own(arch)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    detector = bcosify(network, 1)
    assert difference(network, detector, images()) <= 3e-5 and is_complete(detector, images())
    assert difference(network.double(), with_exponent(detector, 1).double(), images().double()) <= 1e-6  # weights were rounded to float32
    network.float()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and not any(isinstance(m, BcosConv2d) for m in network.modules())
    assert isinstance(detector, Detector) and detector.is_bcos and detector.arch == arch and detector.encode(images()).shape[1] == 6


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FOREIGN])
def test_networks_of_torchvision_and_timm(name, tmp_path):
    network, side = foreign(name), side_of(name)
    detector = bcosify(network, 1, constructor=name)
    batch = images(2, side, side)
    assert difference(network, detector, batch, standard(name)) <= 3e-5 and is_complete(detector, batch)
    again = load_detector(save_detector(with_exponent(detector, 1), tmp_path / "detector.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(batch), detector(batch)) and again.arguments == json.loads(json.dumps(detector.arguments))
    answers = explain_many(detector, batch, ["bcos", "gradcam"])
    assert all(answer.maps.shape == (2, side, side) and bool(answer.maps.isfinite().all()) for answer in answers.values())


@pytest.mark.parametrize("padding_mode,padding", [("zeros", 3), ("zeros", "same"), ("reflect", 2), ("circular", 1), ("zeros", 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_first_convolution_is_exact_everywhere(padding_mode, padding, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 7, 1 if padding == "same" else 2, padding, padding_mode=padding_mode, bias=bias).double()
    mean, std = torch.rand(3).double(), 0.1 + torch.rand(3).double()
    x = torch.rand(2, 3, 17, 20).double()
    six = copy.deepcopy(conv)
    six.weight = nn.Parameter(six_channel_weight(conv.weight, mean, std))
    expected = conv((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert torch.allclose(six(torch.cat([x, 1 - x], 1)), expected, rtol=1e-12, atol=1e-12)


def test_standardisation_is_the_detectors_or_as_given():
    network = own("resnet10")
    network.encode = Standardize((0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
    assert difference(network, bcosify(network, 1), images()) <= 1e-5
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval()
    for mean, std in (((0.0,) * 3, (1.0,) * 3), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))):
        assert difference(plain, bcosify(plain, 1, standardize=(mean, std), image_size=32), images(2, 32, 32), Standardize(mean, std)) <= 1e-5


def test_gradients_and_batch_statistics_are_the_ordinary_networks_too():
    network = own("resnet10").train()
    detector = bcosify(network, 1)
    assert detector.training
    a, b = network(images(4)), detector(images(4))
    assert torch.allclose(a, b, atol=1e-5 * float(a.abs().max()))
    nn.functional.cross_entropy(a, torch.tensor([0, 1, 0, 1])).backward(), nn.functional.cross_entropy(b, torch.tensor([0, 1, 0, 1])).backward()
    theirs, ours = network.layer2[0].conv1.weight.grad, detector.network.layer2[0].conv1.weight.grad
    assert float((theirs - ours).abs().max()) <= 1e-4 * float(theirs.abs().max())
    assert torch.allclose(network.bn1.running_var, detector.network.bn1.running_var, rtol=1e-4)


# ---- what is kept

def test_constants_are_reported_and_can_be_dropped():
    network = own("vgg16", batch_norm=False)
    kept, dropped = bcosify(network, 1), bcosify(network, 1, bias="drop")
    assert float(dynamic_linear(kept, images()).bias.abs().min()) > 1e-4 and biases_of(kept)
    assert float(dynamic_linear(dropped, images()).bias.abs().max()) == 0 and not biases_of(dropped)
    without = copy.deepcopy(network)
    for layer in without.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(layer.bias)
    assert difference(without, dropped, images()) <= 1e-5


def test_centring_may_become_a_bias():
    network = own("resnet10")
    kept, uncentred = bcosify(network, 1), bcosify(network, 1, norm="uncentred")
    assert difference(network, uncentred, images()) <= 1e-5 and is_complete(uncentred, images())
    kinds = [{type(layer) for layer in one.modules() if isinstance(layer, nn.BatchNorm2d)} for one in (kept, uncentred)]
    assert kinds == [{BatchNorm2d}, {BatchNormUncentered2d}]
    bare = bcosify(network, 1, norm="uncentred", bias="drop")
    assert float(dynamic_linear(bare, images()).bias.abs().max()) == 0 and not biases_of(bare)


def test_biases_decay_with_training_steps_only():
    detector = bcosify(own("resnet10"), 2, norm="uncentred")
    before = [bias.detach().clone() for bias in biases_of(detector)]
    handle = decay_biases(detector, 0.5)
    with torch.no_grad():
        detector.eval()(images())
        assert all(torch.equal(a, b) for a, b in zip(before, biases_of(detector)))
        detector.train()(images()), detector(images())
        assert all(torch.allclose(a / 4, b) for a, b in zip(before, biases_of(detector))) and len(before) > 10
        handle.remove()
        detector(images())
        assert all(torch.allclose(a / 4, b) for a, b in zip(before, biases_of(detector)))
    with pytest.raises(ValueError, match="rate=2"):
        decay_biases(detector, 2)


def test_statistics_are_renewed_at_the_present_exponent_and_nothing_else_changes():
    detector, batch = bcosify(own("resnet10"), 2), images(12, 64, 64)
    detector.network.layer1.train()
    before, modes = {name: value.clone() for name, value in detector.state_dict().items()}, [layer.training for layer in detector.modules()]
    seen = []
    handle = detector.network.bn1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    assert renew_statistics(detector, batch, batch_size=4) is detector
    handle.remove()
    assert torch.allclose(detector.network.bn1.running_mean, torch.cat(seen).mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert torch.allclose(detector.network.bn1.running_var, torch.stack([one.var((0, 2, 3)) for one in seen]).mean(0), rtol=1e-4)
    changed = {name.rpartition(".")[2] for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"} and [layer.training for layer in detector.modules()] == modes
    assert {layer.momentum for layer in detector.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.5}


def test_activations_and_pooling_may_be_replaced():
    network = own("resnet10")
    plain = bcosify(network, 2, activation="drop", pool="average")
    assert not any(isinstance(layer, (nn.ReLU, nn.MaxPool2d)) for layer in plain.modules()) and any(isinstance(layer, nn.AvgPool2d) for layer in plain.modules())
    assert is_complete(plain, images())
    kept = bcosify(network, 2)
    assert any(isinstance(layer, nn.ReLU) for layer in kept.modules()) and any(isinstance(layer, nn.MaxPool2d) for layer in kept.modules())
    assert not any(getattr(layer, "inplace", False) for layer in kept.modules())


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.ELU(), nn.ReLU6(), nn.Mish(), nn.Tanh()])
def test_gated_activations_are_linear_in_explanation_mode(activation):
    x = torch.cat([torch.zeros(3), 4 * torch.randn(500, generator=torch.Generator().manual_seed(0)), torch.tensor([1e-30, -1e-30, 30.0, -30.0])]).double().requires_grad_()
    layer = GatedActivation(activation)
    assert torch.equal(layer(x), activation(x))
    layer.is_explaining = True
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient * x, activation(x), rtol=1e-12) and bool(gradient.isfinite().all())


def test_a_gate_by_a_sigmoid_is_part_of_the_linear_map():
    gate = torchvision.ops.SqueezeExcitation(8, 4)
    layer, x = GatedActivation(gate), torch.randn(2, 8, 5, 5).requires_grad_()
    layer.is_explaining = True
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(gradient * x, gate(x), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_torchs_and_its_constants_are_counted(bias):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).eval()
    if bias:
        nn.init.normal_(mha.in_proj_bias), nn.init.normal_(mha.out_proj.bias)
    out = BcosLinear(12, 12, b=1, unit_norm=False, bias=bias)
    out.load_state_dict(mha.out_proj.state_dict())
    ours, x = BcosifiedAttention(mha.in_proj_weight, mha.in_proj_bias, out, 3, as_pair=True), torch.randn(2, 7, 12).requires_grad_()
    assert torch.allclose(ours(x, x, x)[0], mha(x, x, x, need_weights=False)[0], atol=1e-6)
    constants = []
    with explanation_mode(ours, constants):
        y = ours(x, x, x)[0]
        gradients = torch.autograd.grad(y[:, 3, 5].sum(), [x, *constants])
    assert torch.allclose(sum((g * v).flatten(1).sum(1) for g, v in zip(gradients, [x, *constants])), y[:, 3, 5], atol=1e-5)
    assert len(constants) == 2 * bias
    for wrong in (dict(need_weights=True), dict(attn_mask=torch.zeros(7, 7))):
        with pytest.raises(ValueError, match="plain self-attention"):
            ours(x, x, x, **wrong)
    with pytest.raises(ValueError, match="plain self-attention"):
        ours(x, x.clone(), x)


# ---- a detector like any other

@pytest.mark.parametrize("form", [{}, dict(norm="uncentred", bias="drop", activation="drop", pool="average")])
@pytest.mark.parametrize("arch", ["resnet10", "vgg16"])
def test_it_is_saved_loaded_and_explained(arch, form, tmp_path):
    detector = bcosify(own(arch, logit_temperature=0.5), 1.5, **form)
    again = load_detector(save_detector(detector, tmp_path / "detector.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images()), detector(images()))
    assert (again.arch, again.b, again.arguments, again.training) == (arch, 1.5, json.loads(json.dumps(detector.arguments)), False)
    for method, answer in explain_many(again, images(), ["bcos", "gradcam", "layercam"]).items():
        assert answer.maps.shape == (2, 96, 96) and bool(answer.maps.isfinite().all()), method


def test_a_detector_that_was_given_another_projects_standardisation_can_be_bcosified(tmp_path):
    network = own("resnet10")
    network.encode = Standardize((0.5,) * 3, (0.5,) * 3)
    detector = bcosify(network, 1)
    again = load_detector(save_detector(detector, tmp_path / "detector.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images()), detector(images()))


def test_positions_are_scored_before_the_average():
    detector = bcosify(own("resnet10"), 2)
    assert isinstance(detector.network.fc, BcosConv2d) and detector.network.fc.kernel_size == (1, 1)
    assert isinstance(bcosify(own("vgg16"), 2).network.classifier[-1], BcosLinear)


def test_samples_do_not_mix_and_foreign_classifiers_can_be_replaced():
    network = foreign("torchvision/resnet18")
    with pytest.warns(UserWarning, match=r"\(fc\) was replaced by a new one of 2 classes"):
        detector = bcosify(network, 2, classes=2, constructor="torchvision/resnet18")
    assert detector(images()).shape == (2, 2) and network.fc.out_features == 1000
    with torch.no_grad():
        assert torch.allclose(detector(images()), torch.cat([detector(one[None]) for one in images()]), atol=1e-5)
    again = rebuild(**json.loads(json.dumps(detector.arguments)))
    assert {name: value.shape for name, value in again.state_dict().items()} == {name: value.shape for name, value in detector.state_dict().items()}
    assert (again.arch, again.cam_name) == ("torchvision/resnet18", "layer4")


def test_it_trains():
    torch.manual_seed(0)
    detector = bcosify(own("resnet10"), 2, norm="uncentred").train()
    optimizer, labels = torch.optim.Adam(detector.parameters(), 1e-3), torch.tensor([0, 1] * 4)
    batch = images(8)
    batch[1::2, :, ::2] *= 0.7
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(detector(batch), labels)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0] and is_complete(detector.eval(), batch)


# ---- refusals

class Functional(nn.Module):
    def __init__(self, function, layer=nn.Identity()):
        super().__init__()
        self.conv, self.fc, self.layer, self.function = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), layer, function

    def forward(self, x):
        return self.fc(self.function(self.layer(self.conv(x))).mean((2, 3)))


def test_activations_that_are_called_as_functions_are_fine_if_linear_and_refused_if_not():
    batch, plain = images(2, 32, 32), Functional(torch.relu).eval()
    detector = bcosify(plain, 1, image_size=32)
    assert difference(plain, detector, batch, Standardize()) <= 1e-5 and is_complete(detector, batch)
    for function in (nn.functional.gelu, torch.sigmoid):
        with pytest.raises(ValueError, match="is no linear map in explanation mode"):
            bcosify(Functional(function), 2, image_size=32)


@pytest.mark.parametrize("make,options,words", [
    (lambda: create_detector("resnet10", b=2, width=0.25), {}, "B-cos network already"),
    (lambda: create_detector("resnet10", width=0.25), dict(classes=2, image_size=64), "classes, image_size.*a detector says all that itself"),
    (lambda: create_detector("resnet10", width=0.25), dict(bias="half"), "bias='half'.*keep, drop"),
    (lambda: create_detector("resnet10", width=0.25), dict(norm="none"), "norm='none'.*keep, uncentred"),
    (lambda: Functional(torch.relu, nn.InstanceNorm2d(8)), dict(image_size=32), "InstanceNorm2d has no B-cos form"),
    (lambda: Functional(torch.relu, nn.BatchNorm2d(8, track_running_stats=False)), dict(image_size=32), "no running statistics"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), dict(image_size=2), "hands its image to no convolution"),
    (lambda: Functional(torch.relu), dict(image_size=32, constructor="torchvision/resnet18"), "torchvision/resnet18 with options.*makes another network"),
    (lambda: Functional(torch.relu), dict(image_size=32, constructor="keras/resnet18"), "keras/resnet18.*torchvision/<name>"),
])
def test_what_cannot_be_bcosified_is_refused(make, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        bcosify(make(), 2, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at least 1"):
        bcosify(nn.Linear(1, 1), 0.5)


@pytest.mark.parametrize("change", [dict(b=0.5), dict(bcosified={}), dict(extra=1), dict(bcosified=dict(base=dict(arch="resnet99"), form={}))])
def test_a_damaged_recipe_is_named(change, tmp_path):
    path = save_detector(bcosify(own("resnet10"), 2), tmp_path / "detector.safetensors")
    recipe = path.with_suffix(".json")
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | change))
    with pytest.raises(ValueError, match=r"detector\.json"):
        load_detector(path)


def test_a_network_without_constructor_works_but_is_not_saved(tmp_path):
    detector = bcosify(Functional(torch.relu), 2, image_size=32)
    assert detector(images(2, 32, 32)).shape == (2, 2)
    with pytest.raises(ValueError, match="constructor="):
        save_detector(detector, tmp_path / "detector.safetensors")


def test_forms_know_whether_they_are_exact():
    assert Form().is_exact and Form(norm="uncentred").is_exact
    assert not any(Form(**{name: value}).is_exact for name, value in (("activation", "drop"), ("bias", "drop"), ("pool", "average")))
    assert all(isinstance(layer, DynamicLinearModule) for layer in (BcosConv2d(1, 1), GatedActivation(nn.GELU())))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(inplace=True)])
def test_a_layer_under_two_names_is_exchanged_under_both(activation):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation, nn.Conv2d(8, 8, 3, padding=1), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    detector = bcosify(network, 1)
    assert detector.network[1] is detector.network[3] and detector.network[1] is not network[1]
    assert not getattr(detector.network[3], "inplace", False) and is_complete(detector, images())


def test_a_network_of_small_outputs_is_checked_as_strictly():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        network[-1].weight *= 1e-5
    with pytest.raises(ValueError, match="no linear map"):
        bcosify(network, 2)
