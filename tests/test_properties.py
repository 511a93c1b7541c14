"""What holds of every B-cos layer, whatever its options and weights: looked for counterexamples by hypothesis."""
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bcos_nb.layers import BcosConv2d, BcosLinear, explanation_mode

settings.register_profile("layers", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("layers")

exponents = st.one_of(st.sampled_from([1, 1.25, 1.75, 2, 2.5]), st.floats(1, 4, allow_nan=False))
seeds = st.integers(0, 2**31)
scales = st.floats(1e-3, 1e3)


@st.composite
def convolutions(draw, **fixed):
    """A B-cos convolution of any geometry in float64, and an input for it."""
    groups, size = draw(st.sampled_from([1, 1, 2, 4])), draw(st.integers(1, 4))
    dilation = draw(st.integers(1, 2))
    options = dict(
        b=draw(exponents), max_out=draw(st.integers(1, 3)), unit_norm=draw(st.booleans()), groups=groups, stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 3)), dilation=dilation, padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    ) | fixed
    generator = torch.Generator().manual_seed(draw(seeds))
    layer = BcosConv2d(4, 4 * draw(st.integers(1, 2)), size, **options).double()
    height, width = draw(st.integers(7, 9)), draw(st.integers(7, 9))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    x = draw(scales) * torch.randn(draw(st.integers(1, 2)), 4, height, width, generator=generator, dtype=torch.float64)
    return layer, x.contiguous(memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))


@st.composite
def linears(draw, **fixed):
    """A B-cos linear layer in float64, and an input for it."""
    options = dict(b=draw(exponents), max_out=draw(st.integers(1, 3)), unit_norm=draw(st.booleans())) | fixed
    generator = torch.Generator().manual_seed(draw(seeds))
    layer = BcosLinear(draw(st.integers(1, 8)), draw(st.integers(1, 5)), **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    return layer, draw(scales) * torch.randn(3, 2, layer.in_features, generator=generator, dtype=torch.float64)


def layers(**fixed):
    return st.one_of(convolutions(**fixed), linears(**fixed))


def close(one, other, tolerance=1e-9):
    one, other = one.detach(), other.detach()
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max()) + 1e-300


def patch_norm(layer, x):
    """‖x‖ under every output, by a convolution with ones; of tokens, over their features."""
    if isinstance(layer, BcosLinear):
        return x.norm(dim=-1, keepdim=True)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x.square(), [layer.padding[1]] * 2 + [layer.padding[0]] * 2, mode)
    ones = torch.ones_like(layer.weight[: len(layer.weight) // layer.max_out])
    return F.conv2d(padded, ones, None, layer.stride, 0, layer.dilation, layer.groups).clamp_min(0).sqrt()


@given(layers(unit_norm=True), seeds)
def test_scaling_a_weight_changes_nothing(drawn, seed):
    layer, x = drawn
    before = layer(x)
    with torch.no_grad():
        factor = torch.empty(len(layer.weight), dtype=torch.float64).uniform_(-9, 9, generator=torch.Generator().manual_seed(seed)).exp()
        layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))  # each by its own, from 1e-4 to 1e4
    assert close(layer(x), before)


@given(layers(unit_norm=False), scales)
def test_without_unit_norm_scaling_the_weights_scales_the_output(drawn, factor):
    layer, x = drawn
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(factor)
    assert close(layer(x), factor * before)


@given(layers(unit_norm=True))
def test_the_gradient_is_orthogonal_to_every_weight_vector(drawn):
    layer, x = drawn
    out = layer(x)
    (gradient,) = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), layer.weight)
    along = (gradient * layer.weight).flatten(1).sum(1).abs()
    lengths = gradient.flatten(1).norm(dim=1) * layer.weight.flatten(1).norm(dim=1)
    assert float(along.detach().max()) <= 1e-9 * float(lengths.detach().max()) + 1e-12 * float(out.detach().abs().max())


@given(layers(b=1))
def test_b_1_is_the_linear_map_of_the_unit_weights(drawn):
    layer, x = drawn
    weight = layer.weight / (layer.weight.flatten(1).norm(dim=1) if layer.unit_norm else torch.ones(len(layer.weight))).view(-1, *[1] * (layer.weight.ndim - 1))
    if isinstance(layer, BcosLinear):
        response, dim = F.linear(x, weight), 2
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, [layer.padding[1]] * 2 + [layer.padding[0]] * 2, mode)
        response, dim = F.conv2d(padded, weight, None, layer.stride, 0, layer.dilation, layer.groups), 1
    assert close(layer(x), response.unflatten(dim, (-1, layer.max_out)).amax(dim + 1))


@given(layers(unit_norm=True))
def test_the_output_is_bounded_by_the_norm_of_the_patch(drawn):
    layer, x = drawn
    # with |cos| + 1e-6 in the power, the bound holds up to (1 + 1e-6) ** (B - 1)
    assert bool((layer(x).abs() <= patch_norm(layer, x) * (1 + 1e-5) + 1e-12 * x.abs().max()).all())


@given(layers(max_out=1))
def test_the_opposite_input_gives_the_opposite_output(drawn):
    layer, x = drawn
    assert close(layer(-x), -layer(x))


@given(layers(), st.floats(10, 1e3))
def test_scaling_the_input_scales_the_output(drawn, factor):
    layer, x = drawn
    assume(float(patch_norm(layer, x).min()) > 0.1)  # below, the 1e-6 beside ‖x‖² begins to show
    assert close(layer(factor * x), factor * layer(x), 1e-3)


@given(layers())
def test_in_explanation_mode_gradient_times_input_is_the_output(drawn):
    layer, x = drawn
    x.requires_grad_()
    ordinary = layer(x)
    with explanation_mode(layer):
        out = layer(x)
        (row,) = torch.autograd.grad(out.sum(), x)
    out, x = out.detach(), x.detach()
    assert close(out, ordinary) and abs(float((row * x).sum() - out.sum())) <= 1e-9 * float(out.abs().sum()) + 1e-300
