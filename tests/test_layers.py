"""Layers against the reference package, literal loops in float64 and numerical derivatives; the network as one linear map."""
import itertools
import json
import threading

import bcos
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bcos.modules.norms import BatchNormUncentered2d as ReferenceNorm
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from bcos_nb.layers import (
    AddInverse,
    BatchNorm2d,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    LogitLayer,
    Standardize,
    dynamic_linear,
    evaluating,
    explanation_mode,
    make_norm,
)
from bcos_nb.layers.bcos import FusedBcosConvolution, FusedMaxOutScale, FusedUnitNorm, complement_of, max_out_units, power
from bcos_nb.layers.dynamic_linear import without_weight_gradients
from bcos_nb.layers.norms import FusedScaleByDeviation
from bcos_nb.models import create_detector

EXPONENTS = (1, 1.25, 1.75, 2, 2.5)


def rand(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def close(ours, theirs, tolerance=1e-5):
    """Whether two tensors differ by less than a share of the largest value."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours.double() - theirs.double()).abs().max()) <= tolerance * float(theirs.double().abs().max())


def outputs_and_gradients(layer, x, weight):
    """Output, gradient of a fixed random projection with respect to the input, and to the weight."""
    x = x.clone().requires_grad_()
    out = layer(x)
    projection = rand(*out.shape, seed=9).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * projection).sum(), [x, weight])


# ---- parity with the reference package

CONVOLUTIONS = [
    dict(kernel_size=1),
    dict(kernel_size=1, stride=2),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1, max_out=2),
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=3, stride=2, padding=1, groups=4, max_out=2),
    dict(kernel_size=3, padding=1, groups=8, max_out=3),
    dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=3, dilation=2, groups=2),
    dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), max_out=3),
    dict(kernel_size=5, padding=2, max_out=2),
]


@pytest.mark.parametrize("b", EXPONENTS)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda o: "-".join(f"{name[0]}{value}" for name, value in o.items()))
@pytest.mark.filterwarnings("ignore:dilation")
def test_convolution_equals_the_reference_forward_and_backward(options, b):
    ours, theirs = BcosConv2d(8, 16, b=b, **options), bcos.modules.BcosConv2d(8, 16, b=b, **options)
    with torch.no_grad():
        ours.weight.copy_(rand(*ours.weight.shape, seed=1))
        theirs.linear.weight.copy_(ours.weight)
    x = rand(2, 8, 11, 9)
    for mine, reference in zip(outputs_and_gradients(ours, x, ours.weight), outputs_and_gradients(theirs, x, theirs.linear.weight)):
        assert close(mine, reference)


@pytest.mark.parametrize("b", EXPONENTS)
@pytest.mark.parametrize("max_out", [1, 2, 3])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12)])
def test_linear_equals_the_reference_forward_and_backward(shape, max_out, b):
    ours, theirs = BcosLinear(12, 5, b=b, max_out=max_out), bcos.modules.BcosLinear(12, 5, b=b, max_out=max_out)
    with torch.no_grad():
        theirs.linear.weight.copy_(ours.weight)
    x = rand(*shape)
    for mine, reference in zip(outputs_and_gradients(ours, x, ours.weight), outputs_and_gradients(theirs, x, theirs.linear.weight)):
        assert close(mine, reference)


@pytest.mark.parametrize("b", [1, 1.75, 2])
@pytest.mark.parametrize("max_out", [1, 2, 3])
def test_explanation_mode_has_the_gradient_of_the_reference(b, max_out):
    ours, theirs = BcosConv2d(4, 6, 3, 2, 1, b=b, max_out=max_out), bcos.modules.BcosConv2d(4, 6, 3, 2, 1, b=b, max_out=max_out)
    with torch.no_grad():
        theirs.linear.weight.copy_(ours.weight)
    theirs.set_explanation_mode()
    x = rand(2, 4, 9, 9)
    with explanation_mode(ours):
        mine = outputs_and_gradients(ours, x, ours.weight)
    for ours_, theirs_ in zip(mine, outputs_and_gradients(theirs, x, theirs.linear.weight)):
        assert close(ours_, theirs_)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_uncentred_norm_equals_the_reference_in_training_and_evaluation(bias, momentum):
    ours, theirs = BatchNormUncentered2d(6, momentum=momentum, bias=bias), ReferenceNorm(6, momentum=momentum)
    with torch.no_grad():
        for layer in (ours, theirs):
            layer.weight.copy_(rand(6, seed=1))
            if bias:
                layer.bias.copy_(rand(6, seed=2))
    for step in range(3):
        x = 2 * rand(4, 6, 5, 7, seed=step) + 3
        for mine, reference in zip(outputs_and_gradients(ours, x, ours.weight), outputs_and_gradients(theirs, x, theirs.weight)):
            assert close(mine, reference)
        assert close(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == step + 1
    ours.eval(), theirs.eval()
    before = ours.running_var.clone()
    for mine, reference in zip(outputs_and_gradients(ours, x, ours.weight), outputs_and_gradients(theirs, x, theirs.weight)):
        assert close(mine, reference)
    assert torch.equal(ours.running_var, before)


@pytest.mark.parametrize("bias", [False, True])
def test_centring_norm_equals_torch(bias):
    ours, theirs = BatchNorm2d(6, bias=bias), nn.BatchNorm2d(6)
    with torch.no_grad():
        ours.weight.copy_(rand(6, seed=1)), theirs.weight.copy_(ours.weight)
        if bias:
            ours.bias.copy_(rand(6, seed=2)), theirs.bias.copy_(ours.bias)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        x = 2 * rand(4, 6, 5, 7, seed=int(training)) + 1
        for mine, reference in zip(outputs_and_gradients(ours, x, ours.weight), outputs_and_gradients(theirs, x, theirs.weight)):
            assert close(mine, reference)
        assert close(ours.running_var, theirs.running_var) and close(ours.running_mean, theirs.running_mean)


# ---- the closed form in float64: every patch a vector, every unit a dot product, differentiated by torch

def closed_form(x, weight, bias, *, b, max_out, unit_norm, kernel_size, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"):
    """B-cos convolution by explicit patches, with the layer's documented stabilisers: ‖x‖² + 1e-6, and |cos| + 1e-6 unless B is 2."""
    x = F.pad(x, (padding,) * 4, mode="constant" if padding_mode == "zeros" else padding_mode)
    rows, columns = ((size - dilation * (kernel_size - 1) - 1) // stride + 1 for size in x.shape[2:])
    patches = F.unfold(x, kernel_size, dilation, 0, stride).unflatten(1, (groups, -1))
    units = []
    per_group = len(weight) // max_out // groups
    for unit in range(len(weight) // max_out):
        patch = patches[:, unit // per_group]  # [N, values, positions]
        filters = weight[unit * max_out : (unit + 1) * max_out].flatten(1)
        norms = (filters * filters).sum(1).sqrt()
        dots = torch.einsum("mv,nvp->nmp", filters, patch)
        dots = dots / norms[:, None] if unit_norm else dots
        best = dots.argmax(1, keepdim=True)
        dot = dots.gather(1, best)[:, 0]
        length = (patch.square().sum(1) + 1e-6).sqrt() * (1 if unit_norm else norms[best[:, 0]])
        cosine = dot.abs() / length
        units.append(dot * (1 if b == 1 else cosine if b == 2 else (cosine + 1e-6) ** (b - 1)) + (0 if bias is None else bias[unit]))
    return torch.stack(units, 1).unflatten(2, (rows, columns))


CLOSED = [
    dict(kernel_size=1),
    dict(kernel_size=1, stride=2, unit_norm=False, bias=True),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, padding=1, max_out=2, bias=True),
    dict(kernel_size=3, padding=1, max_out=3),
    dict(kernel_size=3, padding=1, unit_norm=False),
    dict(kernel_size=3, padding=1, max_out=2, unit_norm=False),
    dict(kernel_size=3, stride=2, padding=2, dilation=2, bias=True),
    dict(kernel_size=5, stride=3, padding=4),
    dict(kernel_size=3, padding=1, groups=4),
    dict(kernel_size=3, stride=2, padding=1, groups=2, max_out=2, unit_norm=False, bias=True),
    dict(kernel_size=3, dilation=2, padding=2, groups=2, max_out=2),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=2, stride=2, padding_mode="reflect", unit_norm=False, bias=True),
    dict(kernel_size=3, padding=1, padding_mode="replicate", max_out=2),
    dict(kernel_size=3, padding=1, padding_mode="replicate", groups=2),
    dict(kernel_size=3, padding=2, dilation=2, padding_mode="circular", bias=True),
    dict(kernel_size=5, padding=2, padding_mode="circular", groups=4, max_out=2, unit_norm=False),
]


def named(options):
    return "-".join(f"{name[:4]}{value}" for name, value in options.items())


@pytest.mark.parametrize("b", EXPONENTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("options", CLOSED, ids=named)
def test_convolution_equals_the_closed_form_forward_and_backward(options, layout, b):
    layer = BcosConv2d(4, 8, b=b, **options).double().to(memory_format=layout)
    with torch.no_grad():
        layer.weight.copy_(rand(*layer.weight.shape, seed=1))
        if layer.bias is not None:
            layer.bias.copy_(rand(8, seed=2))
    geometry = {name: value for name, value in options.items() if name != "bias"}
    x = (rand(2, 4, 9, 8, dtype=torch.float64) + 0.2).to(memory_format=layout).requires_grad_()
    oracle = closed_form(x, layer.weight, layer.bias, **dict(dict(max_out=1, unit_norm=True, b=b), **geometry))
    wanted, projection = [x, *layer.parameters()], rand(*oracle.shape, seed=9, dtype=torch.float64)
    expected = torch.autograd.grad((oracle * projection).sum(), wanted)
    out = layer(x)
    assert close(out, oracle, 1e-10)
    for mine, theirs in zip(torch.autograd.grad((out * projection).sum(), wanted), expected):
        assert close(mine, theirs, 1e-10)
    with torch.no_grad():
        assert close(layer(x), oracle, 1e-10)
    with explanation_mode(layer):
        assert close(layer(x), oracle, 1e-10)  # the same function, other derivatives
        (frozen,) = torch.autograd.grad((layer(x) * projection).sum(), x)
        with without_weight_gradients(layer):
            assert close(torch.autograd.grad((layer(x) * projection).sum(), x)[0], frozen, 1e-10)
    constant = 0 if layer.bias is None else layer.bias.view(-1, 1, 1)
    assert close((frozen * x).sum(), ((oracle - constant) * projection).sum(), 1e-10)  # linear, so gradient · input is the output


@pytest.mark.parametrize("b", EXPONENTS)
@pytest.mark.parametrize("options", [{}, dict(max_out=2), dict(max_out=3), dict(unit_norm=False), dict(bias=True), dict(max_out=2, unit_norm=False, bias=True)], ids=named)
def test_linear_equals_the_closed_form_forward_and_backward(options, b):
    layer = BcosLinear(6, 4, b=b, **options).double()
    with torch.no_grad():
        layer.weight.copy_(rand(*layer.weight.shape, seed=1))
        if layer.bias is not None:
            layer.bias.copy_(rand(4, seed=2))
    max_out, unit_norm = options.get("max_out", 1), options.get("unit_norm", True)
    x = rand(2, 3, 6, dtype=torch.float64).requires_grad_()
    norms = layer.weight.square().sum(1).sqrt()
    dots = (x @ layer.weight.T / (norms if unit_norm else 1)).unflatten(2, (4, max_out))
    best = dots.argmax(3, keepdim=True)
    dot = dots.gather(3, best)[..., 0]
    length = x.square().sum(2, keepdim=True).sqrt() + 1e-12
    if not unit_norm:
        length = length * norms.view(4, max_out).expand(2, 3, 4, max_out).gather(3, best)[..., 0]
    cosine = dot.abs() / length
    oracle = dot * (1 if b == 1 else cosine if b == 2 else (cosine + 1e-6) ** (b - 1)) + (0 if layer.bias is None else layer.bias)
    wanted, projection = [x, *layer.parameters()], rand(*oracle.shape, seed=9, dtype=torch.float64)
    expected = torch.autograd.grad((oracle * projection).sum(), wanted)
    assert close(layer(x), oracle, 1e-10)
    for mine, theirs in zip(torch.autograd.grad((layer(x) * projection).sum(), wanted), expected):
        assert close(mine, theirs, 1e-10)
    with explanation_mode(layer):
        assert close(layer(x), oracle, 1e-10)


def test_the_reference_pads_its_norms_with_zeros_whatever_the_mode():
    """Why parity is asked for zeros only: with reflected edges the package divides by less than the patch's norm."""
    ours, theirs = BcosConv2d(2, 3, 3, padding=1, padding_mode="reflect"), bcos.modules.BcosConv2d(2, 3, 3, padding=1, padding_mode="reflect")
    with torch.no_grad():
        theirs.linear.weight.copy_(ours.weight)
    x = rand(1, 2, 6, 6)
    difference = (ours(x) - theirs(x)).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-5 < 1e-2 < difference.max()


@pytest.mark.parametrize("b", [1, 1.75, 2])
@pytest.mark.parametrize("options", [{}, dict(max_out=2, zero_mean=0.5), dict(unit_norm=False, bias=True), dict(dilation=2)], ids=named)
def test_the_first_layer_sees_the_encoding_as_any_other_input(options, b):
    """It may convolve three channels instead of six, but not so that anybody notices."""
    layer = BcosConv2d(6, 4, 5, 2, 3, b=b, **options).double()
    images = rand(2, 3, 11, 12, dtype=torch.float64)
    encoded = AddInverse()(images)
    assert b == 1 or complement_of(encoded) is images
    answers = []
    for x in (encoded, encoded.clone()):
        out = layer(x)
        projection = rand(*out.shape, seed=9, dtype=torch.float64)
        with torch.no_grad():
            plain = layer(x)
        answers.append((out, plain, *torch.autograd.grad((out * projection).sum(), [*layer.parameters()])))
    for mine, theirs in zip(*answers):
        assert close(mine, theirs, 1e-10)
    images.add_(1)
    assert complement_of(encoded) is None and close(layer(encoded), answers[1][0], 1e-10)
    with torch.inference_mode():
        assert close(layer(AddInverse()(images - 1)), answers[1][0], 1e-10)
    tracked = AddInverse()((images - 1).requires_grad_())
    assert complement_of(tracked) is None and close(layer(tracked), answers[1][0], 1e-10)


@pytest.mark.parametrize("padding,kernel_size", [("same", 3), ("same", 4), ("valid", 3)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.filterwarnings("ignore:Using padding")
def test_padding_by_name(padding, kernel_size, padding_mode):
    layer = BcosConv2d(2, 3, kernel_size, padding=padding, padding_mode=padding_mode, b=2.5).double()
    x = rand(1, 2, 7, 8, dtype=torch.float64)
    around = layer._reversed_padding_repeated_twice if padding == "same" else (0, 0, 0, 0)
    padded = F.pad(x, around, "constant" if padding_mode == "zeros" else padding_mode)
    assert close(layer(x), closed_form(padded, layer.weight, None, b=2.5, max_out=1, unit_norm=True, kernel_size=kernel_size), 1e-10)


def test_the_convolution_of_b_1_without_unit_norm_is_the_plain_one():
    ours, plain = BcosConv2d(4, 6, 3, 2, 1, groups=2, padding_mode="circular", b=1, unit_norm=False, bias=True), nn.Conv2d(4, 6, 3, 2, 1, groups=2, padding_mode="circular")
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(rand(2, 4, 9, 9)), plain(rand(2, 4, 9, 9)))


def test_filters_of_zeros_stay_silent():
    for layer in (BcosConv2d(3, 4, 3), BcosConv2d(3, 4, 3, max_out=2, b=1.5), BcosConv2d(3, 4, 3, unit_norm=False), BcosConv2d(3, 4, 3, b=1)):
        nn.init.zeros_(layer.weight)
        assert bool((layer(rand(1, 3, 5, 5)) == 0).all())


def compiled_equals_eager(options, b, backend):
    layer = BcosConv2d(4, 8, 3, b=b, **options)
    x = rand(2, 4, 10, 10)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for mine, eager in zip(outputs_and_gradients(compiled, x, layer.weight), outputs_and_gradients(layer, x, layer.weight)):
        assert close(mine, eager)


GRAPHS = [dict(padding=1), dict(padding=1, max_out=2), dict(padding=1, groups=2), dict(stride=2, unit_norm=False, bias=True)]


@pytest.mark.parametrize("b", [1.75, 2])
@pytest.mark.parametrize("options", GRAPHS, ids=named)
def test_the_traced_layer_is_one_graph_and_equals_the_eager_one(options, b):
    compiled_equals_eager(options, b, "aot_eager")


@pytest.mark.parametrize("b", [1, 1.75, 2])
@pytest.mark.parametrize("max_out", [1, 2])
def test_a_traced_first_layer_uses_the_encoding_and_equals_the_layer_that_does_not_know_it(b, max_out):
    layer, images = BcosConv2d(6, 8, 5, stride=2, padding=2, b=b, max_out=max_out, zero_mean=0.5), torch.rand(2, 3, 11, 10)
    seen, aten = [], torch.ops.aten.convolution.default

    def backend(graph, inputs):
        def keep(graph, inputs):
            seen.extend(tuple(node.args[0].meta["val"].shape) for node in graph.graph.nodes if node.target is aten)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward))(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(AddInverse(), layer), backend=backend, fullgraph=True)
    out = compiled(images)
    expected = layer(torch.cat([images, 1 - images], 1))
    gradient = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad((value * gradient).sum(), layer.weight)[0] for value in (out, expected))
    assert close(out, expected) and close(mine, theirs) and {shape[1] for shape in seen} == {3, 1}, seen


@pytest.mark.slow
@pytest.mark.parametrize("options", GRAPHS, ids=named)
def test_the_compiled_layer_equals_the_eager_one(options):
    compiled_equals_eager(options, 1.75, "inductor")


def test_a_compiled_layer_may_change_its_exponent():
    layer, x = BcosConv2d(4, 8, 3, b=1.1), rand(2, 4, 10, 10)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for b in (1.1, 1.3, 1.75, 2.0):
        layer.b = b
        assert close(compiled(x), layer(x))


# ---- the equations, read literally

def literal_convolution(x, weight, b, stride, padding, dilation, groups, max_out, zero_mean=0.0):
    """Equations (1) to (3) of Böhle et al. 2022 with loops over every output value, and the layer's documented stabilisers."""
    x, weight = x.double().numpy(), weight.double().numpy().copy()
    filters, depth, height, width = weight.shape
    units = filters // max_out
    for f in range(round(units * zero_mean) * max_out):
        weight[f] -= weight[f].mean(axis=(1, 2), keepdims=True)
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows = (x.shape[2] - dilation * (height - 1) - 1) // stride + 1
    columns = (x.shape[3] - dilation * (width - 1) - 1) // stride + 1
    out = np.zeros((len(x), units, rows, columns))
    for n, unit, i, j in itertools.product(*map(range, out.shape)):
        first = unit // (units // groups) * depth  # the channels of the unit's group
        top, left = i * stride, j * stride
        patch = x[n, first : first + depth, top : top + dilation * (height - 1) + 1 : dilation, left : left + dilation * (width - 1) + 1 : dilation]
        response = max((weight[f] * patch).sum() / np.sqrt((weight[f] ** 2).sum()) for f in range(unit * max_out, (unit + 1) * max_out))
        cosine = abs(response) / np.sqrt((patch**2).sum() + 1e-6)
        out[n, unit, i, j] = response * (cosine + 1e-6 * (b not in (1, 2))) ** (b - 1)
    return torch.tensor(out)


@pytest.mark.parametrize("b", [1, 1.75, 2, 2.5])
@pytest.mark.parametrize(
    "stride,padding,dilation,groups,max_out,zero_mean",
    [(1, 1, 1, 2, 2, 0.0), (2, 1, 1, 4, 3, 0.0), (1, 2, 2, 2, 2, 0.0), (2, 0, 2, 4, 4, 0.0), (1, 1, 1, 1, 2, 0.5), (2, 1, 1, 2, 2, 1.0)],
)
def test_convolution_equals_the_equations_with_groups_max_out_dilation_and_zero_mean(b, stride, padding, dilation, groups, max_out, zero_mean):
    layer = BcosConv2d(4, 8, 3, stride, padding, dilation, groups, b=b, max_out=max_out, zero_mean=zero_mean).double()
    x = rand(2, 4, 7, 6, dtype=torch.float64) + 0.3
    oracle = literal_convolution(x, layer.weight.detach(), b, stride, padding, dilation, groups, max_out, zero_mean)
    assert close(layer(x), oracle, 1e-10)
    with explanation_mode(layer):
        assert close(layer(x), oracle, 1e-10)


@pytest.mark.parametrize("kernel_size,padding", [(1, 1), (3, 2), (3, 3), (5, 4)])
def test_padding_may_exceed_half_the_window(kernel_size, padding):
    layer = BcosConv2d(2, 3, kernel_size, padding=padding).double()
    x = rand(1, 2, 5, 6, dtype=torch.float64)
    norm = F.conv2d(x.square().sum(1, keepdim=True), torch.ones(1, 1, kernel_size, kernel_size, dtype=torch.float64), padding=padding)
    response = F.conv2d(x, layer.unit_weight(), padding=padding)
    assert close(layer(x), response * response.abs() / (norm + 1e-6).sqrt(), 1e-9)


def test_zero_mean_units_do_not_see_a_constant_and_the_others_do():
    layer = BcosConv2d(3, 8, 3, zero_mean=0.5, max_out=2)
    response = F.conv2d(torch.ones(1, 3, 3, 3), layer.unit_weight()).flatten().abs()
    assert response[:8].max() < 1e-6 < 1e-3 < response[8:].max()
    assert torch.allclose(layer.unit_weight().flatten(1).norm(dim=1), torch.ones(16))


def test_an_all_black_patch_gives_zero_and_a_finite_gradient():
    for b, layer in itertools.product(EXPONENTS, (lambda b: BcosConv2d(3, 4, 3, b=b, max_out=2), lambda b: BcosLinear(3, 4, b=b))):
        x = torch.zeros((1, 3, 3, 3) if layer(b).weight.ndim == 4 else (2, 3), requires_grad=True)
        out = layer(b)(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert bool((out == 0).all()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("exponent", [0, 0.25, 0.3, 0.5, 0.75, 1, 1.5, 2.25, 4, 4.25, 5])
def test_power_equals_pow(exponent):
    x = torch.cat([torch.zeros(1), torch.logspace(-6, 1, 200)]).double()
    assert torch.allclose(power(x, exponent), torch.tensor(x.numpy() ** exponent), rtol=1e-12)


@pytest.mark.parametrize("max_out", [1, 2, 3])
@pytest.mark.parametrize("dim", [1, -1])
def test_max_out_keeps_the_largest_of_neighbours(max_out, dim):
    x = rand(2, 6, 6)
    groups = [x.select(dim, start + k) for start in range(0, 6, max_out) for k in range(max_out)]
    expected = torch.stack([torch.stack(groups[u * max_out : (u + 1) * max_out]).amax(0) for u in range(6 // max_out)], dim)
    assert torch.equal(max_out_units(x, max_out, dim), expected)


def test_encodings_and_logits_by_hand():
    image = torch.tensor([0.2, 0.5, 1.0]).view(1, 3, 1, 1)
    assert torch.allclose(AddInverse()(image).flatten(), torch.tensor([0.2, 0.5, 1.0, 0.8, 0.5, 0.0]))
    assert torch.allclose(Standardize((0.5, 0.5, 0.5), (0.1, 0.5, 1.0))(image).flatten(), torch.tensor([-3.0, 0.0, 0.5]))
    assert torch.allclose(LogitLayer(0.5, -1.0)(torch.tensor([[1.0, -2.0]])), torch.tensor([[1.0, -5.0]]))
    assert torch.equal(LogitLayer()(torch.tensor([[1.0, -2.0]])), torch.tensor([[1.0, -2.0]]))


# ---- hand-written derivatives against numerical ones

@pytest.mark.parametrize("b", [1.25, 1.6, 2, 2.5])
@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("norm_channels", [1, 4])
def test_derivative_of_the_fused_scale(b, max_out, norm_channels):
    response = rand(2, 4 * max_out, 2, 3, dtype=torch.float64)
    response = (response + 0.1 * response.sign()).requires_grad_()  # |x|^1.25 has no second derivative at 0
    norm = (rand(2, norm_channels, 2, 3, seed=1, dtype=torch.float64).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, n: FusedMaxOutScale.apply(r, n, b, max_out), (response, norm))


@pytest.mark.parametrize("b", [1.25, 1.6, 2, 2.5])
@pytest.mark.parametrize("max_out,unit_norm", [(1, True), (1, False), (2, True)])
def test_derivative_of_the_fused_convolution(b, max_out, unit_norm):
    x, filters = rand(2, 2, 5, 4, dtype=torch.float64).requires_grad_(), rand(4, 2, 3, 2, seed=1, dtype=torch.float64).requires_grad_()
    if max_out == 2:
        filters = FusedUnitNorm.apply(filters, 2).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: FusedBcosConvolution.apply(x, w, b, max_out, unit_norm, None, (2, 1), (1, 1), (1, 2)), (x, filters))


def test_derivative_of_the_fused_norm_counts_the_variance():
    def normalised(x, weight):
        still = x.detach()
        return FusedScaleByDeviation.apply(x, weight, still.mean((0, 2, 3)), still.var((0, 2, 3), unbiased=False), 1e-3)

    x, weight = rand(3, 2, 2, 3, dtype=torch.float64) + 1, rand(2, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(normalised, (x.requires_grad_(), weight.requires_grad_()))


# ---- reduced precision

@pytest.mark.parametrize("groups,dilation,kernel_size", [(1, 1, 3), (2, 1, 3), (1, 2, 3), (1, 1, 1)])
def test_patch_norm_is_float32_under_autocast(groups, dilation, kernel_size):
    layer = BcosConv2d(64, 8, kernel_size, dilation=dilation, groups=groups)
    x = (rand(1, 64, 9, 9) + 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm = layer.patch_norm(x)
    assert norm.dtype == torch.float32
    window = torch.ones(groups, 64 // groups, kernel_size, kernel_size, dtype=torch.float64)
    exact = F.conv2d(x.double().square(), window, dilation=dilation, groups=groups).sqrt()
    exact = exact.repeat_interleave(norm.shape[1] // groups, 1)
    assert close(norm, exact, 1e-5)  # in bfloat16 it would be off by 4e-3


@pytest.mark.parametrize("b", [1.25, 2])
@pytest.mark.parametrize("layer,shape", [(BcosConv2d, (2, 16, 6, 6)), (BcosLinear, (6, 16))])
def test_autocast_result_is_within_bfloat16_of_float32(layer, shape, b):
    layer = layer(16, 32, b=b, max_out=2)
    x = rand(*shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = layer(x)
    assert not torch.equal(reduced.float(), layer(x)) and close(reduced.float(), layer(x), 0.03)


@pytest.mark.parametrize("kind", [BatchNormUncentered2d, BatchNorm2d])
def test_norms_compute_in_float32_under_autocast(kind):
    norm = kind(4)
    x = (rand(8, 4, 8, 8) + 50).bfloat16()  # a variance of 1 beside squares of 2500 is lost in bfloat16
    exact = x.double()
    variance = exact.var((0, 2, 3), unbiased=False).view(1, -1, 1, 1)
    mean = 0 if kind is BatchNormUncentered2d else exact.mean((0, 2, 3), keepdim=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16 and close(out, (exact - mean) / (variance + 1e-5).sqrt(), 2**-8)
    expected = exact.var((0, 2, 3), unbiased=norm.unbiased)
    assert norm.running_var.dtype == torch.float32 and close(norm.running_var, 0.9 + 0.1 * expected, 1e-5)


def test_half_precision_weights_and_float64_are_kept_apart():
    layer = BcosConv2d(4, 4, 3)
    assert layer.bfloat16().unit_weight().dtype == torch.float32
    layer = layer.double()
    assert layer(rand(1, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64


# ---- the network as one linear map

class TwoLayers(nn.Module):
    """The smallest detector: convolution, norm, convolution, mean, logits."""

    def __init__(self, norm, norm_bias, logit_bias, b=1.75):
        super().__init__()
        self.encode = AddInverse()
        self.first, self.norm = BcosConv2d(6, 4, 3, padding=1, b=b, max_out=2), make_norm(norm, 4, norm_bias)
        self.last, self.logit = BcosConv2d(4, 2, 3, padding=1, b=b), LogitLayer(0.5, logit_bias)

    def logits_of(self, encoded):
        return self.logit(self.last(self.norm(self.first(encoded))).mean((2, 3)))

    def forward(self, images):
        return self.logits_of(self.encode(images))


def randomise(network, seed=0):
    """Random statistics and affine parameters of every norm, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (BatchNormUncentered2d, nn.BatchNorm2d)):
                layer.running_var.uniform_(0.05, 0.3, generator=generator)
                layer.running_mean.normal_(0, 0.1, generator=generator)
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(0, 0.3, generator=generator)
    return network


@pytest.mark.parametrize("norm", ["BatchNormUncentered2d", "BatchNorm2d"])
@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("logit_bias", [None, -0.7])
def test_contributions_and_bias_equal_the_frozen_network_pixel_by_pixel(norm, norm_bias, logit_bias):
    torch.manual_seed(0)
    network = randomise(TwoLayers(norm, norm_bias, logit_bias)).double().eval()
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = network.norm.weight / (network.norm.running_var + network.norm.eps).sqrt()
    shift = (network.norm.bias if norm_bias else 0) - (network.norm.running_mean * scale if norm == "BatchNorm2d" else 0)
    scale, shift = scale.view(1, -1, 1, 1), (shift + torch.zeros(4)).view(1, -1, 1, 1)

    def share(layer, x):
        """|cos|^(B−1) of every unit, and which of its filters won."""
        response = F.conv2d(x, layer.unit_weight(), padding=1).unflatten(1, (-1, layer.max_out))
        best, winner = response.max(2)
        return (best.abs() / layer.patch_norm(x) + 1e-6) ** (layer.b - 1), winner[:, :, None]

    def applied(layer, x, cosine, winner):
        response = F.conv2d(x, layer.unit_weight(), padding=1).unflatten(1, (-1, layer.max_out))
        return response.gather(2, winner.expand(len(x), -1, -1, -1, -1)).squeeze(2) * cosine

    answer = dynamic_linear(network, images, torch.tensor([1, 0]))
    with torch.no_grad():
        encoded = torch.cat([images, 1 - images], 1)
        for n, target in enumerate((1, 0)):
            x = encoded[n : n + 1]
            frozen_first = share(network.first, x)
            middle = applied(network.first, x, *frozen_first) * scale + shift
            frozen_last = share(network.last, middle)

            def logit(z, constant):  # the frozen network on any input
                middle = applied(network.first, z, *frozen_first) * scale + constant * shift
                return 2 * applied(network.last, middle, *frozen_last).mean((2, 3))[:, target] + constant * (logit_bias or 0)

            one_pixel_each = torch.zeros(20, 6, 4, 5, dtype=torch.float64)
            for pixel in range(20):
                one_pixel_each[pixel, :, pixel // 5, pixel % 5] = x[0, :, pixel // 5, pixel % 5]
            assert close(answer.contributions[n].flatten(), logit(one_pixel_each, 0), 1e-9)
            assert torch.allclose(answer.bias[n], logit(torch.zeros_like(x), 1)[0], atol=1e-9)
            assert torch.allclose(answer.logits[n, target], logit(x, 1)[0]) and torch.allclose(answer.logits[n], network(images)[n])


@pytest.mark.parametrize("b", [1, 1.25, 2, 2.5])
@pytest.mark.parametrize("options", [{}, dict(norm_bias=True), dict(norm="BatchNorm2d", norm_bias=True, logit_bias=0.4), dict(logit_bias=-1.5)])
def test_contributions_and_bias_of_a_detector_sum_to_its_logit(b, options):
    torch.manual_seed(0)
    detector = randomise(create_detector("resnet10", b=b, width=0.125, stem="fine", **options)).eval()
    images = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 1, 1])
    answer = dynamic_linear(detector, images, target, tolerance=1e-4)
    with torch.no_grad():
        logits = detector(images)
    total = answer.contributions.double().sum((1, 2)) + answer.bias.double()
    logit = logits.double().gather(1, target[:, None])[:, 0]
    assert torch.allclose(total, logit, rtol=1e-4, atol=1e-4) and torch.allclose(answer.logits, logits, rtol=1e-4, atol=1e-5)  # logits of hundreds, in float32
    assert answer.weights.shape == answer.encoded.shape == (3, 6, 32, 40) and float(answer.error.max()) <= 1e-4
    if set(options) <= {"logit_bias"}:
        assert torch.allclose(answer.bias, torch.full((3,), options.get("logit_bias", 0.0)))
    else:
        assert float(answer.bias.abs().min()) > 1e-4


class Plus(nn.Module):
    def forward(self, x):
        return x + 0.5


def test_a_constant_that_nobody_reports_is_an_error_with_the_image_named():
    detector = create_detector("resnet10", b=2, width=0.125).eval()
    detector.pool = Plus()
    with pytest.raises(RuntimeError, match=r"image \d misses its logit.*add_constant"):
        dynamic_linear(detector, torch.rand(2, 3, 32, 32))
    assert float(dynamic_linear(detector, torch.rand(2, 3, 32, 32), check=False).error.min()) > 1e-4
    assert not any(getattr(layer, "is_explaining", False) for layer in detector.modules())


def test_dynamic_linear_leaves_the_detector_as_it_was_and_works_in_no_grad():
    detector = create_detector("resnet10", b=2, width=0.125).train()
    detector.layer2.eval()
    modes = [layer.training for layer in detector.modules()]
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    with torch.no_grad():
        answer = dynamic_linear(detector, torch.rand(2, 3, 32, 32))
    assert modes == [layer.training for layer in detector.modules()]
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert not any(tensor.requires_grad for tensor in vars(answer).values())


@pytest.mark.parametrize("ambient", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_the_linear_map_is_the_same_in_inference_mode_and_under_autocast(ambient):
    detector = create_detector("resnet10", b=2, width=0.125).train()
    detector(torch.rand(8, 3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    expected = dynamic_linear(detector, images)
    with ambient():
        row = dynamic_linear(detector, images.clone())
    assert torch.equal(row.weights, expected.weights) and torch.equal(row.logits, expected.logits)


def test_the_check_sees_what_is_missing_of_a_small_logit():
    """Completeness by its definition in NumPy: what is missing, over the size of what there is."""
    detector = create_detector("resnet10", b=2, width=0.125, logit_temperature=1e6).eval()
    images = torch.rand(2, 3, 32, 32)
    complete = dynamic_linear(detector, images, tolerance=1e-5)
    assert float(complete.logits.abs().max()) < 1e-4
    detector.pool = Plus()
    with pytest.raises(RuntimeError, match="misses its logit"):
        dynamic_linear(detector, images)
    row = dynamic_linear(detector, images, check=False)
    contributions = row.contributions.double().flatten(1).numpy()
    missing = np.abs(contributions.sum(1) + row.bias.double().numpy() - row.logits[:, 1].double().numpy())
    there = np.maximum(np.abs(row.logits[:, 1].double().numpy()), np.abs(contributions).sum(1))
    assert np.allclose(row.error.double().numpy(), missing / there, rtol=1e-4)


def test_rounding_of_half_precision_is_named_as_such():
    detector = create_detector("resnet10", b=2, width=0.125).train()
    detector(torch.rand(8, 3, 32, 32))
    with pytest.raises(RuntimeError, match=r"bfloat16 has too few digits.*detector\.float\(\)"):
        dynamic_linear(detector.bfloat16(), torch.rand(2, 3, 32, 32).bfloat16(), tolerance=1e-6)


def test_a_logit_of_nothing_is_complete():
    detector = create_detector("resnet10", b=2, width=0.125).eval()
    torch.nn.init.zeros_(detector.fc.weight)
    assert float(dynamic_linear(detector, torch.rand(2, 3, 32, 32)).error.max()) == 0


@pytest.mark.parametrize("target", [2, -1, torch.tensor([0, 1]), torch.tensor([0, 1, 2]), 0.5])
def test_targets_that_are_no_class_are_refused(target):
    with pytest.raises(ValueError, match="target"):
        dynamic_linear(create_detector("resnet10", b=2, width=0.125), torch.rand(3, 3, 32, 32), target)


# ---- explanation mode

def slope(layer, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x).sum(), x)[0]


def test_explanation_mode_nests_and_ends_where_it_began():
    layer, x = BcosConv2d(3, 4, 3), rand(1, 3, 5, 5)
    ordinary = slope(layer, x)
    with explanation_mode(layer):
        frozen = slope(layer, x)
        with explanation_mode(layer):
            assert torch.equal(slope(layer, x), frozen)
        assert torch.equal(slope(layer, x), frozen)
    assert torch.equal(slope(layer, x), ordinary) and not torch.allclose(frozen, ordinary)
    response = F.conv2d(x, layer.unit_weight())
    scaled = response * response.abs() / layer.patch_norm(x)  # B = 2, so y = ŵᵀx · |cos|: by hand
    assert torch.allclose((frozen * x).sum(), scaled.sum(), rtol=1e-4)


def test_inner_mode_keeps_its_constants_apart():
    layer, outer, inner = BatchNormUncentered2d(3, bias=True), [], []
    with explanation_mode(layer, outer):
        with explanation_mode(layer, inner):
            layer(rand(1, 3, 2, 2))
        assert (len(outer), len(inner)) == (0, 1)
        layer(rand(1, 3, 2, 2))
    layer(rand(1, 3, 2, 2))
    assert (len(outer), len(inner)) == (1, 1)


def test_explanation_mode_and_evaluating_end_on_an_error():
    network = nn.Sequential(BcosConv2d(3, 4, 3), BatchNormUncentered2d(4))
    network[0].eval()
    with pytest.raises(KeyError), explanation_mode(network, []), evaluating(network):
        assert network[0].is_explaining and not network[1].training
        raise KeyError("on purpose")
    assert not any(layer.is_explaining or layer.constants is not None for layer in network)
    assert network.training and network[1].training and not network[0].training


def test_two_threads_explain_two_detectors_and_a_third_trains():
    torch.manual_seed(0)
    networks = [create_detector("resnet10", b=b, width=0.125).eval() for b in (1.25, 2, 2)]
    images = torch.rand(2, 3, 32, 32)
    alone = [dynamic_linear(network, images).weights for network in networks[:2]]
    alone.append(slope(networks[2], images))
    together, meeting = [[] for _ in networks], threading.Barrier(3)

    def work(number):
        for _ in range(4):
            meeting.wait(30)
            if number < 2:
                together[number].append(dynamic_linear(networks[number], images).weights)
            else:
                together[number].append(slope(networks[2], images))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, expected in enumerate(alone):
        assert len(together[number]) == 4
        assert all(torch.allclose(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())) for got in together[number])


# ---- refusals

@pytest.mark.parametrize("b", [0.5, 0, -1, float("nan"), float("inf"), "2", True, None])
@pytest.mark.parametrize("layer", [lambda b: BcosConv2d(3, 4, 3, b=b), lambda b: BcosLinear(3, 4, b=b)])
def test_exponents_below_one_are_refused(layer, b):
    with pytest.raises(ValueError, match="at least 1"):
        layer(b)


@pytest.mark.parametrize("b", [np.int64(2), np.float32(1.25), np.float64(1.75)])
def test_an_exponent_out_of_a_table_is_a_python_number(b):
    layers = BcosConv2d(3, 4, 3, b=b), BcosLinear(3, 4, b=b), create_detector("resnet10", b=b, width=0.125)
    assert all(type(layer.b) in (int, float) and layer.b == b for layer in layers)
    assert json.loads(json.dumps(layers[2].arguments))["b"] == float(b)


@pytest.mark.parametrize("max_out", [0, -2])
def test_a_unit_without_filters_is_refused(max_out):
    with pytest.raises(ValueError, match=f"max_out={max_out}"):
        BcosConv2d(3, 4, 3, max_out=max_out)
    with pytest.raises(ValueError, match=f"max_out={max_out}"):
        BcosLinear(3, 4, max_out=max_out)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_outside_0_to_1_are_refused(share):
    with pytest.raises(ValueError, match="zero_mean"):
        BcosConv2d(3, 4, 3, zero_mean=share)


def test_zero_mean_of_a_window_of_one_pixel_is_refused():
    with pytest.raises(ValueError, match="zero_mean"):  # nothing would be left of such a filter but 0 / 0
        BcosConv2d(3, 4, 1, zero_mean=0.5)


def test_an_ordinary_network_has_no_explanation_mode():
    with pytest.raises(ValueError, match="no B-cos layers.*create_detector"), explanation_mode(nn.Sequential(nn.Conv2d(3, 4, 3))):
        pass


def test_an_ordinary_detector_has_no_explanation_mode_and_no_dynamic_linear_map():
    detector = create_detector("resnet10", width=0.125)
    with pytest.raises(ValueError, match="(?i)b-cos"), explanation_mode(detector):
        pass
    with pytest.raises(ValueError, match="(?i)b-cos"):
        dynamic_linear(detector, torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="logit_temperature"):
        LogitLayer(temperature)


def test_an_unknown_norm_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="AllNormUncentered2d, BatchNormUncentered2d"):
        make_norm("LayerNorm", 4)
