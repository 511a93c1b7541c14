"""Attention and ViT-C: closed forms in float64, parity with the reference package, completeness, and what is refused."""
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import bcos.modules as reference_modules
import numpy as np
import pandas as pd
import pytest
import torch
from bcos.models import vit as reference
from torch import nn

from bcos_nb.explainers import explain_many
from bcos_nb.explainers.bcos import alpha_maps, colour_images
from bcos_nb.layers.attention import Attention
from bcos_nb.layers.bcos import BcosConv2d, BcosLinear
from bcos_nb.layers.dynamic_linear import dynamic_linear, explanation_mode
from bcos_nb.models.detector import create_detector
from bcos_nb.models.vitc import SIZES, from_bcos_v2, scaled_size, sines_and_cosines, stem_strides
from bcos_nb.resources import resource_path

norms = reference_modules.norms
EXPONENTS = [1, 1.25, 1.75, 2, 2.5]


def images(count=2, height=48, width=64, seed=0, dtype=torch.float32):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(b=2, seed=0, arch="vitc_ti", **options):
    torch.manual_seed(seed)
    return create_detector(arch, b=b, **(dict(width=0.25, depth=2) | options)).eval()


def difference(got, expected):
    """Largest difference, relative to the largest value."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


# ---- attention

def closed_form(layer, tokens, frozen=False):
    """[N, T, dim] head by head, softmax written out; frozen: what depends on the input in the weight is constant."""
    fixed = torch.Tensor.detach if frozen else lambda x: x
    w_q, w_k, w_v = layer.to_qkv.weight.chunk(3)
    heads = []
    for q, k, v in zip(*(w.chunk(layer.heads) for w in (w_q, w_k, w_v))):
        weights = (fixed(tokens @ q.T) @ fixed(tokens @ k.T).mT / math.sqrt(len(q))).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ (tokens @ v.T))
    mixed, out = torch.cat(heads, -1), layer.to_out
    response = (mixed @ (out.weight / out.weight.norm(dim=1, keepdim=True)).T).unflatten(-1, (-1, out.max_out)).amax(-1)
    if out.b == 1:
        return response
    cosine = fixed(response).abs() / (fixed(mixed).norm(dim=-1, keepdim=True) + 1e-12)
    return response * (cosine if out.b == 2 else (cosine + 1e-6) ** (out.b - 1))


def with_gradients(function, layer, tokens, direction):
    tokens = tokens.clone().requires_grad_()
    out = function(tokens)
    return out, *torch.autograd.grad((out * direction).sum(), [tokens, *layer.parameters()])


@pytest.mark.parametrize("b", EXPONENTS)
@pytest.mark.parametrize("heads,max_out", [(1, 1), (2, 2), (4, 1)])
def test_attention_is_its_closed_form_in_both_modes(b, heads, max_out):
    torch.manual_seed(heads)
    layer = Attention(16, heads, BcosLinear(16, 16, b=b, max_out=max_out)).double()
    tokens, direction = torch.randn(2, 3, 5, 16).double(), torch.randn(2, 3, 5, 16).double()
    flat = lambda grid: grid.flatten(1, 2)
    for frozen in (False, True):
        expected = with_gradients(lambda x: closed_form(layer, flat(x), frozen).view(x.shape), layer, tokens, direction)
        if frozen:
            with explanation_mode(layer):
                got = with_gradients(layer, layer, tokens, direction)
        else:
            got = with_gradients(layer, layer, tokens, direction)
        assert max(difference(a, e) for a, e in zip(got, expected)) < 1e-10


@pytest.mark.parametrize("b", EXPONENTS)
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("max_out", [1, 2])
def test_attention_is_the_reference_packages(b, heads, max_out):
    torch.manual_seed(0)
    theirs = reference.Attention(32, heads, 32 // heads, partial(reference_modules.BcosLinear, b=b, max_out=max_out), norms.NoBias(norms.DetachableLayerNorm))
    ours = Attention(32, heads, BcosLinear(32, 32, b=b, max_out=max_out), norms.NoBias(norms.DetachableLayerNorm)(32))
    ours.load_state_dict({name.replace(".linear.weight", ".weight"): value for name, value in theirs.state_dict().items()})
    tokens, direction = torch.randn(2, 10, 32), torch.randn(2, 10, 32)
    got, expected = (with_gradients(layer, layer, tokens, direction) for layer in (ours, theirs))
    assert max(difference(a, e) for a, e in zip(got, expected)) < 1e-5
    for part in (*theirs.modules(), ours.norm):
        if hasattr(part, "set_explanation_mode"):
            part.set_explanation_mode(True)
    with explanation_mode(ours):
        got, expected = (with_gradients(layer, layer, tokens, direction)[:2] for layer in (ours, theirs))
    assert max(difference(a, e) for a, e in zip(got, expected)) < 1e-5


def test_queries_and_keys_get_no_gradient_in_explanation_mode():
    layer = Attention(16, 2, BcosLinear(16, 16, b=2))
    tokens = torch.randn(1, 7, 16)
    with explanation_mode(layer):
        layer(tokens).sum().backward()
    of_queries, of_keys, of_values = layer.to_qkv.weight.grad.chunk(3)
    assert not of_queries.any() and not of_keys.any() and of_values.any()


@pytest.mark.parametrize("heads", [0, -1, 3, 32])
def test_heads_that_do_not_divide_a_token_are_refused(heads):
    with pytest.raises(ValueError, match=f"heads={heads} must divide the 16"):
        Attention(16, heads, nn.Identity())


# ---- positions

@pytest.mark.parametrize("height,width,dim", [(14, 14, 192), (3, 7, 8), (1, 1, 64), (24, 24, 384)])
def test_positions_are_the_reference_packages_and_the_formula(height, width, dim):
    got = sines_and_cosines(height, width, dim)
    expected = reference.PosEmbSinCos2d()(torch.zeros(height, width, dim)).view(height, width, dim)
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=2e-5)
    angles = np.arange(max(height, width))[:, None] / 10_000 ** (np.arange(dim // 4) / (dim // 4 - 1))
    row, column = height - 1, width // 2
    formula = np.concatenate([np.sin(angles[column]), np.cos(angles[column]), np.sin(angles[row]), np.cos(angles[row])])
    assert np.allclose(sines_and_cosines(height, width, dim, dtype=torch.float64)[row, column], formula, atol=1e-10)


@pytest.mark.parametrize("dim", [0, 4, 10])
def test_positions_need_whole_frequencies(dim):
    with pytest.raises(ValueError, match=f"dim={dim}.*multiple of 4"):
        sines_and_cosines(2, 2, dim)


# ---- the network against the reference package

def reference_vitc(size, b, max_out, norm_bias, norm_2d, norm_2d_bias, seed=0):
    """The package's network, wrapped as its `explain` needs it: norms with random weights, statistics of some batch, class 1 likely."""
    torch.manual_seed(seed)
    maybe = lambda norm, bias: norm if bias else norms.NoBias(norm)
    if b is None:
        layers = dict(linear_layer=nn.Linear, conv2d_layer=nn.Conv2d, act_layer=nn.GELU, norm_layer=nn.LayerNorm, channels=3,
                      norm2d_layer=norms.DetachableGNLayerNorm2d)
    else:
        layers = dict(linear_layer=partial(reference_modules.BcosLinear, b=b, max_out=max_out), act_layer=nn.Identity, channels=6,
                      conv2d_layer=partial(reference_modules.BcosConv2d, b=b, max_out=max_out),
                      norm_layer=maybe(norms.DetachableLayerNorm, norm_bias), norm2d_layer=maybe(getattr(norms, norm_2d), norm_2d_bias))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = size(num_classes=2, **layers) if callable(size) else reference.SimpleViT(image_size=14, patch_size=1, num_classes=2, **size, **layers)
    for name, part in network.named_modules():
        if "Norm" in type(part).__name__ and getattr(part, "weight", None) is not None:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.2)
            part.momentum = 1.0
    latents = []
    network.linear_head.norm.register_forward_hook(lambda module, inputs, output: latents.append(output))
    with torch.no_grad():
        network.train()(torch.rand(4, layers["channels"], 64, 64))
        head = network.linear_head.linear if b is None else network.linear_head.linear.linear
        head.weight += latents[0].mean(0) * torch.tensor([-0.3, 0.3]).repeat_interleave(max_out)[:, None]
    return reference_modules.common.BcosSequential(network, reference_modules.LogitLayer(logit_bias=-0.5)).eval()


FORMS = [(b, max_out, norm_bias, norm_2d, norm_2d_bias) for b, max_out, norm_bias, norm_2d, norm_2d_bias in [
    (2, 1, False, "BatchNormUncentered2d", False), (2, 2, True, "BatchNorm2d", False), (1.75, 1, True, "BatchNormUncentered2d", True),
    (1.75, 2, False, "BatchNorm2d", True), (1.25, 2, True, "BatchNorm2d", False), (2.5, 2, False, "DetachableGNLayerNorm2d", False), (1, 1, False, "BatchNorm2d", False),
]]


def copied(theirs, b, form, **options):
    if b is not None:
        names = ("max_out", "norm_bias", "norm_2d", "norm_2d_bias")
        options |= dict(zip(names, form)) | dict(variant="study")
    ours = create_detector("vitc_ti", b=b, logit_bias=-0.5, **options).eval()
    ours.load_state_dict({from_bcos_v2(name): value for name, value in theirs.state_dict().items()})
    return ours


def explanations(network, encoded):
    """The package's W(x) and explanation image of class 1, one image at a time as it does."""
    answers = [network.explain(image[None].detach().requires_grad_(), idx=1) for image in encoded]
    return torch.cat([a["dynamic_linear_weights"] for a in answers]), torch.stack([torch.from_numpy(a["explanation"]) for a in answers])


def distance(got, expected):
    """Norm of the difference, relative to the norm."""
    return float((got - expected).norm() / expected.norm())


def check_parity(theirs, ours, batch):
    """Logits in float32. W(x) and the image in float64, where rounding does not decide which of two tied MaxOut units answers; and that, without
    MaxOut, the W(x) of float32 is about as near to that of float64 as the package's own."""
    encoded = ours.encode(batch)
    with torch.no_grad():
        assert difference(ours(batch), theirs(encoded)) < 1e-4
    single, single_theirs = dynamic_linear(ours, batch), explanations(theirs, encoded)[0]
    double = dynamic_linear(ours.double(), batch.double())
    expected, picture = explanations(theirs.double(), double.encoded)
    with torch.no_grad():
        assert difference(double.logits, theirs(double.encoded)) < 1e-6
    assert difference(double.weights, expected) < 1e-6
    alpha = alpha_maps(double.weights, double.contributions)
    assert difference(alpha, picture[..., 3]) < 1e-5
    colour = colour_images(double.weights, alpha)[..., :3]
    assert distance(colour, picture[..., :3]) < 1e-5 and difference(colour, picture[..., :3]) < 1e-3  # a ratio, of two small numbers here and there
    if {layer.max_out for layer in ours.modules() if isinstance(layer, (BcosConv2d, BcosLinear))} == {1}:
        assert distance(single.weights, expected) < 3 * distance(single_theirs, expected) + 1e-4


SMALL = dict(dim=48, depth=2, heads=1, mlp_dim=192, conv_stem=[8, 16, 24, 48])


@pytest.mark.parametrize("b,max_out,norm_bias,norm_2d,norm_2d_bias", FORMS)
def test_small_networks_explain_as_the_reference_package(b, max_out, norm_bias, norm_2d, norm_2d_bias):
    form = (max_out, norm_bias, norm_2d, norm_2d_bias)
    theirs = reference_vitc(SMALL, b, *form)
    check_parity(theirs, copied(theirs, b, form, width=0.25, depth=2), images())


def test_the_ordinary_form_is_the_reference_packages():
    theirs = reference_vitc(SMALL, None, 1, True, "", True)
    ours = copied(theirs, None, (), width=0.25, depth=2)
    for batch in (images(), images(3, 96, 32)):
        assert difference(ours(batch), theirs(ours.encode(batch))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("b,max_out,norm_bias,norm_2d,norm_2d_bias", FORMS[:4])
def test_vitc_ti_explains_as_the_reference_package_at_224_pixels(b, max_out, norm_bias, norm_2d, norm_2d_bias):
    form = (max_out, norm_bias, norm_2d, norm_2d_bias)
    theirs = reference_vitc(reference.vitc_ti_patch1_14, b, *form)
    check_parity(theirs, copied(theirs, b, form), images(2, 224, 224))


@pytest.mark.slow
def test_the_ordinary_vitc_ti_is_the_reference_packages_at_224_pixels():
    theirs = reference_vitc(reference.vitc_ti_patch1_14, None, 1, True, "", True)
    batch = images(2, 224, 224)
    ours = copied(theirs, None, ())
    with torch.no_grad():
        assert difference(ours(batch), theirs(ours.encode(batch))) < 1e-4


@pytest.mark.parametrize("arch", list(SIZES))
@pytest.mark.parametrize("b", [None, 2])
def test_every_size_has_the_reference_packages_tensors(arch, b):
    with torch.device("meta"):
        layers = dict(linear_layer=nn.Linear, conv2d_layer=nn.Conv2d, norm_layer=nn.LayerNorm, norm2d_layer=norms.DetachableGNLayerNorm2d, act_layer=nn.GELU,
                      channels=3)
        if b is not None:
            layers = dict(linear_layer=partial(reference_modules.BcosLinear, b=b, max_out=2), conv2d_layer=partial(reference_modules.BcosConv2d, b=b, max_out=2),
                          norm_layer=norms.DetachableLayerNorm, norm2d_layer=norms.NoBias(norms.BatchNorm2d), act_layer=nn.Identity, channels=6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(reference, f"{arch}_patch1_14")(num_classes=2, **layers)
        ours = create_detector(arch, b=b, variant="study")
    expected = {from_bcos_v2(name): value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    strides = [layer.stride for layer in theirs.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.stride for layer in ours.modules() if isinstance(layer, nn.Conv2d)] == strides


@pytest.mark.parametrize("name,expected", [
    ("0.to_patch_embedding.conv_stem.0.linear.weight", "to_patch_embedding.conv_stem.0.weight"),
    ("to_patch_embedding.conv_stem.1.running_var", "to_patch_embedding.conv_stem.1.running_var"),
    ("to_patch_embedding.linear.linear.weight", "to_patch_embedding.linear.weight"),
    ("to_patch_embedding.linear.weight", "to_patch_embedding.linear.weight"),
    ("transformer.encoder_10.attn.to_qkv.weight", "transformer.encoder_10.attn.to_qkv.weight"),
    ("transformer.encoder_10.attn.to_out.linear.weight", "transformer.encoder_10.attn.to_out.weight"),
    ("transformer.encoder_10.ff.net.linear2.linear.weight", "transformer.encoder_10.ff.net.linear2.weight"),
    ("linear_head.linear.linear.weight", "linear_head.linear.weight"),
    ("linear_head.linear.bias", "linear_head.linear.bias"),
])
def test_names_of_the_reference_package(name, expected):
    assert from_bcos_v2(name) == expected and from_bcos_v2(expected) == expected


# ---- what a B-cos ViT promises

@pytest.mark.parametrize("b", EXPONENTS)
@pytest.mark.parametrize("options", [{}, dict(variant="study"), dict(stem="fine", norm_bias=True, norm_2d_bias=True, logit_bias=-1.0),
                                     dict(norm_2d="BatchNorm2d", max_out=1, token_stride=8)])
def test_contributions_and_bias_make_the_logit(b, options):
    detector = small(b, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        detector.train()(images(8, 64, 64, seed=2))
    for target in (0, 1):
        row = dynamic_linear(detector, images(), target, check=False)
        assert float(row.error.max()) <= 1e-4
        assert torch.allclose(row.contributions.sum((1, 2)) + row.bias, row.logits[:, target], atol=1e-4)
    assert bool((row.bias != 0).all())  # positions are constants


def test_without_constants_there_is_no_bias():
    detector = small(position_scale=0.0)
    row = dynamic_linear(detector, images())
    assert not row.bias.any() and torch.allclose(row.contributions.sum((1, 2)), row.logits[:, 1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("b", [None, 1.75])
def test_any_grid_of_tokens_and_every_explainer(b):
    detector = small(b)
    for height, width in ((16, 16), (48, 160), (96, 32)):
        batch = images(2, height, width)
        answers = explain_many(detector, batch, ["gradcam", "gradcam++", "xgradcam", "layercam"] + ["bcos"] * (b is not None))
        assert all(answer.maps.shape == (2, height, width) and bool(answer.maps.isfinite().all()) for answer in answers.values())
        with torch.no_grad():
            tokens = detector.features(detector.encode(batch))
            maps = detector.cam_to_spatial(tokens)
            assert torch.allclose(detector(batch)[1:], detector(batch[1:]), atol=1e-4)
        assert maps.shape == (2, 48, height // 16, width // 16)
        assert torch.equal(maps[1, 5, -1, 0], tokens[1, -1, 0, 5])


def test_a_map_lies_where_its_tokens_lie():
    detector = small(None, depth=1)
    with torch.no_grad():
        plain, marked = torch.full((1, 3, 64, 96), 0.5), torch.full((1, 3, 64, 96), 0.5)
        marked[:, :, 28:37, 12:21] = torch.rand(3, 9, 9)  # around (32, 16), the middle of the windows of token (2, 1)
        tokens = [detector.to_patch_embedding(detector.encode(x)) for x in (plain, marked)]
        change = detector.cam_to_spatial(tokens[1] - tokens[0]).abs().sum(1)[0]
    assert divmod(int(change.argmax()), 6) == (2, 1)


def test_threads_with_grids_of_their_own_do_not_mix():
    detector = small(2)
    batches = [images(1, 16 * n, 16 * m, seed=n) for n in (1, 2, 3) for m in (2, 4)]
    expected = [detector.cam_to_spatial(detector.features(detector.encode(batch))).detach() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda batch: detector.cam_to_spatial(detector.features(detector.encode(batch))).detach(), batches * 3))
    assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(got, expected * 3))


@pytest.mark.parametrize("arch", list(SIZES))
@pytest.mark.parametrize("width", [0.05, 0.125, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1, 1.5])
def test_widths_keep_positions_and_heads_whole(arch, width):
    dim, heads = scaled_size(SIZES[arch], width)
    assert heads >= 1 and dim % (4 * heads) == 0 and dim >= 8
    assert abs(dim - SIZES[arch].dim * width) <= 2 * heads or dim == 8
    if width >= 1 / SIZES[arch].heads:
        assert 32 <= dim / heads <= 96
    assert scaled_size(SIZES[arch], width, heads=4)[1] == 4


def test_options_build_what_they_say():
    detector = small(2, width=2 / 3, depth=5, stem="fine", image_size=128)
    stem = [layer for layer in detector.to_patch_embedding.conv_stem if isinstance(layer, BcosConv2d)]
    assert [layer.kernel_size[0] for layer in stem] == [5, 3, 3, 3] and [layer.stride[0] for layer in stem] == [2, 2, 2, 1]
    assert detector.image_size == 128 and len(detector.transformer) == 5 and detector.token_stride == 8
    assert detector.features(detector.encode(images(1, 80, 80))).shape == (1, 10, 10, 128)
    assert [layer.centred > 0 for layer in stem] == [True, False, False, False]
    assert small(2, variant="study").to_patch_embedding.conv_stem[0].centred == 0
    assert small().image_size == 224 and small(heads=2).transformer[0].attn.heads == 2
    assert stem_strides((64, 128, 128, 256, 256, 512), 4) == (2, 2, 1, 1, 1, 1)


@pytest.mark.parametrize("b", [1.25, 1.75, 2, 2.5])
def test_the_studys_form_has_the_norms_of_its_search(b):
    table = pd.read_csv(resource_path("data/paper/hyperparameters.csv"))
    row = table[(table.arch == "vitc_ti") & (table.b == b)].iloc[0]
    detector = small(b, variant="study")
    in_stem, on_tokens = detector.to_patch_embedding.conv_stem[1], detector.transformer[0].attn.norm
    assert type(in_stem).__name__ == row.norm_2d and (in_stem.bias is not None) == (str(row.norm_2d_bias) == "True")
    assert type(on_tokens).__name__ == row.norm and (on_tokens.bias is not None) == (str(row.norm_bias) == "True")
    layers = [layer for layer in detector.modules() if isinstance(layer, (BcosConv2d, BcosLinear))]
    assert {layer.max_out for layer in layers} == {2} and {layer.b for layer in layers} == {b}
    assert detector.positional_embedding.scale == 1 and detector.logit_layer.logit_temperature in (None, 1)


def test_positions_and_image_are_alike_in_size_at_the_start():
    for b in (1.25, 2, 2.5):
        detector = small(b, width=1, depth=1).train()
        with torch.no_grad():
            tokens = detector.to_patch_embedding(detector.encode(images(8, 64, 64)))
            positions = detector.positional_embedding(tokens) - tokens
        assert 0.2 < float(positions.norm(dim=-1).mean() / tokens.norm(dim=-1).mean()) < 5
    assert small(None).positional_embedding.scale == 1


@pytest.mark.parametrize("options,words", [
    (dict(stem="coarse"), "coarse.*imagenet, fine"),
    (dict(depth=0), "depth=0"),
    (dict(heads=0), "heads=0"),
    (dict(token_stride=12), "token_stride=12.*2, 4, 8, 16"),
    (dict(token_stride=32), "token_stride=32.*2, 4, 8, 16"),
    (dict(image_size=100), "100 × 100 pixels.*multiples of 16.*96 × 96"),
    (dict(norm="BatchNorm2d"), "BatchNorm2d.*DetachableLayerNorm"),
    (dict(norm_2d="LayerNorm2d"), "LayerNorm2d.*BatchNormUncentered2d"),
    (dict(patch=16), "no option patch.*token_stride"),
])
def test_what_cannot_be_built_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


@pytest.mark.parametrize("height,width,near", [(100, 64, "96 × 64"), (8, 32, "16 × 32"), (64, 250, "64 × 256"), (0, 16, "16 × 16")])
def test_images_that_are_no_whole_number_of_tokens_are_refused(height, width, near):
    with pytest.raises(ValueError, match=f"{height} × {width} pixels.*multiples of 16; the nearest is {near}"):
        small()(torch.rand(1, 3, height, width))
