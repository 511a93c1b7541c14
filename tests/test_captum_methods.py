"""captum's methods against closed forms, against captum called directly, and what a seed and a batch size may not change."""
import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from captum import attr
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bcos_nb.explainers import EXPLAINERS, explain, explain_many
from bcos_nb.explainers.captum_methods import CAPTUM, cell_grid
from bcos_nb.models import create_detector, list_detectors

QUICK = {  # options that keep a tiny detector's maps cheap
    "integrated_gradients": dict(n_steps=10),
    "smoothgrad": dict(nt_samples=4),
    "occlusion": dict(sliding_window_shapes=16, strides=8),
    "kernel_shap": dict(n_samples=40, cells=3),
}
DETECTORS = {"ordinary": ("resnet10", None, {}), "B-cos": ("resnet10", 2, {}), "ViT": ("vitc_ti", None, dict(depth=1, image_size=32)),
             "B-cos ViT": ("vitc_ti", 1.5, dict(depth=1, image_size=32))}
TARGET = torch.tensor([1, 0, 1])


class Additive(nn.Module):
    """Each class's logit is a weighted sum of the values, so that every share of it is known."""

    def __init__(self, side=12):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)))

    def forward(self, images):
        return torch.einsum("nchw,kchw->nk", images, self.weight)


def detector_of(kind, side=32):
    arch, b, options = DETECTORS[kind]
    torch.manual_seed(0)
    return create_detector(arch, b=b, width=0.125, **options).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shares():
    """An additive detector, its images, and weight × value of the explained class."""
    detector, images = Additive(), torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    return detector, images, detector.weight.detach()[TARGET]


def positive(signed):
    return signed.clamp(min=0) / signed.clamp(min=0).amax((1, 2), keepdim=True)


# ---- closed forms


@pytest.mark.parametrize("name", ["input_x_gradient", "integrated_gradients"])
def test_an_additive_detector_is_explained_exactly(name, shares):
    detector, images, weight = shares
    answer = explain(detector, images, name, TARGET)
    assert torch.allclose(answer.contributions, (weight * images).sum(1), atol=1e-5)
    assert torch.allclose(answer.maps, positive((weight * images).sum(1)), atol=1e-5)


def test_integrated_gradients_start_from_their_baseline(shares):
    detector, images, weight = shares
    colour = torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    for baseline in (0.5, colour, images.flip(0)):
        answer = explain(detector, images, "integrated_gradients", TARGET, baselines=baseline, n_steps=3)
        assert torch.allclose(answer.contributions, (weight * (images - torch.as_tensor(baseline))).sum(1), atol=1e-5)


def test_sensitivities_of_an_additive_detector_are_its_weights(shares):
    detector, images, weight = shares
    for name, options in (("saliency", {}), ("smoothgrad", dict(nt_samples=3))):
        for channels, magnitude in (("max", weight.abs().amax(1)), ("sum", weight.abs().sum(1))):
            answer = explain(detector, images, name, TARGET, channels=channels, **options)
            assert torch.allclose(answer.maps, positive(magnitude), atol=1e-5)
            assert torch.allclose(answer.contributions, weight.sum(1), atol=1e-5)


def test_occlusion_is_the_drop_of_the_logit(shares):
    detector, images, weight = shares
    answer = explain(detector, images, "occlusion", TARGET, sliding_window_shapes=4, strides=4, baselines=0.25)
    drops = 16 * nn.functional.avg_pool2d((weight * (images - 0.25)).sum(1), 4)
    assert torch.allclose(answer.contributions, drops.repeat_interleave(4, 1).repeat_interleave(4, 2), atol=1e-4)
    overlapping = explain(detector, images, "occlusion", TARGET, sliding_window_shapes=(4, 12), strides=(2, 12))
    rows = (weight * images).sum((1, 3))
    windows = rows.unfold(1, 4, 2).sum(2)  # 5 windows at rows 0, 2, …, 8
    covering = [[k for k in range(5) if 2 * k <= y < 2 * k + 4] for y in range(12)]
    expected = torch.stack([windows[:, covers].mean(1) for covers in covering], 1)
    assert torch.allclose(overlapping.contributions, expected[:, :, None].expand(-1, -1, 12), atol=1e-4)


def test_kernel_shap_of_an_additive_detector_is_the_sum_over_each_cell(shares):
    detector, images, weight = shares
    uneven = torch.tensor([0, 0, 7, 7, 7, 3])[:, None].repeat_interleave(2, 0).expand(12, 12)  # numbers with gaps
    for options, groups in ((dict(cells=3), cell_grid(12, 12, 3)[0]), (dict(cells=5), cell_grid(12, 12, 5)[0]), (dict(feature_mask=uneven), uneven)):
        answer = explain(detector, images, "kernel_shap", TARGET, n_samples=120, baselines=0.5, **options)
        values = (weight * (images - 0.5)).sum(1)
        for group in groups.unique():
            inside = groups == group
            found = answer.contributions[:, inside]
            assert (found - found[:, :1]).abs().max() == 0 and torch.allclose(found[:, 0], values[:, inside].sum(1), atol=5e-3)


def test_kernel_shap_approaches_the_definition_where_cells_interact(images):
    detector, groups = detector_of("ordinary"), cell_grid(32, 32, 2)[0]

    @torch.no_grad()
    def value(coalition):
        return detector(images[:1] * sum((groups == k).float() for k in coalition))[0, 1].item() if coalition else detector(torch.zeros_like(images[:1]))[0, 1].item()

    shapley = [sum((value((*others, k)) - value(others)) / (4 * math.comb(3, size)) for size in range(4)
                   for others in itertools.combinations([j for j in range(4) if j != k], size)) for k in range(4)]
    answer = explain(detector, images[:1], "kernel_shap", 1, cells=2, n_samples=2000, perturbations_per_eval=200)
    found = [answer.contributions[0][groups == k].mean().item() for k in range(4)]
    assert np.abs(np.subtract(found, shapley)).max() < 0.05 * np.abs(shapley).max()
    assert sum(found) == pytest.approx(value(range(4)) - value(()), abs=1e-3)


def test_uneven_images_have_cells_of_equal_size_to_a_pixel():
    rows = cell_grid(10, 7, 3)[0]
    assert rows.unique().tolist() == list(range(9)) and torch.bincount(rows.flatten()).min() >= 6 and torch.bincount(rows.flatten()).max() <= 12
    assert cell_grid(2, 2, 8)[0].tolist() == [[0, 1], [2, 3]]


# ---- captum itself


@pytest.mark.parametrize("kind", list(DETECTORS))
def test_maps_are_captums(kind, images):
    detector = detector_of(kind)
    names = [name for name in CAPTUM if EXPLAINERS[name].unable(detector) is None]
    ours = explain_many(detector, images, names, TARGET, options={name: QUICK[name] for name in names if name in QUICK})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signed = {
            "saliency": attr.Saliency(detector).attribute(images, target=TARGET, abs=False),
            "input_x_gradient": attr.InputXGradient(detector).attribute(images, target=TARGET),
            "integrated_gradients": attr.IntegratedGradients(detector).attribute(images, target=TARGET, n_steps=10),
            "guided_backprop": attr.GuidedBackprop(detector).attribute(images, target=TARGET) if "guided_backprop" in names else None,
            "occlusion": attr.Occlusion(detector).attribute(images, (3, 16, 16), strides=(3, 8, 8), target=TARGET) / 3,
        }
        for name in ("smoothgrad", "kernel_shap"):
            found = []
            for n in range(3):
                torch.manual_seed(0)
                if name == "smoothgrad":
                    tunnel = attr.NoiseTunnel(attr.Saliency(detector))
                    found.append(tunnel.attribute(images[n : n + 1], target=TARGET[n], nt_samples=4, stdevs=0.15, nt_type="smoothgrad", abs=False))
                else:
                    found.append(attr.KernelShap(detector).attribute(images[n : n + 1], target=TARGET[n], n_samples=40, feature_mask=cell_grid(32, 32, 3)[None]) / 3)
            signed[name] = torch.cat(found)
    for name in names:
        values = signed[name].detach()
        maps = positive(values.abs().amax(1)) if name in ("saliency", "smoothgrad") else positive(values.sum(1))
        atol = 2e-3 if name == "kernel_shap" else 1e-4  # its regression weighs two rows a million times
        assert torch.allclose(ours[name].maps, maps, atol=atol), name
        assert torch.allclose(ours[name].contributions, values.sum(1), atol=atol * float(values.sum(1).abs().max())), name


@pytest.mark.parametrize("kind", ["ordinary", "B-cos"])
def test_integrated_gradients_add_up(kind, images):
    detector = detector_of(kind).double()
    answer = explain(detector, images.double(), "integrated_gradients", TARGET, n_steps=300, baselines=0.5)
    with torch.no_grad():
        difference = (detector(images.double()) - detector(torch.full_like(images, 0.5).double())).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(answer.contributions.double().sum((1, 2)), difference, atol=0.02 * float(difference.abs().max()))


# ---- what may not matter


@pytest.mark.parametrize("kind", ["ordinary", "B-cos"])
def test_neither_batches_nor_neighbours_change_a_map(kind, images):
    detector = detector_of(kind)
    names = [name for name in CAPTUM if EXPLAINERS[name].unable(detector) is None]
    usual = explain_many(detector, images, names, TARGET, options={name: QUICK[name] for name in names if name in QUICK})
    for size in (2, 5):
        for name in names:
            setting = "internal_batch_size" if "internal_batch_size" in EXPLAINERS[name].options else "perturbations_per_eval"
            other = explain(detector, images, name, TARGET, **QUICK.get(name, {}), **{setting: size})
            assert torch.allclose(other.maps, usual[name].maps, atol=2e-3 if name == "kernel_shap" else 1e-4), name
    for name in names:
        alone = explain(detector, images[2:], name, TARGET[2:], **QUICK.get(name, {}))
        assert torch.allclose(alone.maps[0], usual[name].maps[2], atol=2e-3 if name == "kernel_shap" else 1e-4), name


def test_no_pass_is_larger_than_asked(images):
    detector, sizes = detector_of("ordinary"), []
    many = images.repeat(3, 1, 1, 1)
    with torch.no_grad():
        question_logits = detector(many)  # the one pass over the batch itself, for its logits
    detector.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    for name in CAPTUM:
        sizes.clear()
        setting = "internal_batch_size" if "internal_batch_size" in EXPLAINERS[name].options else "perturbations_per_eval"
        answer = explain(detector, many, name, **QUICK.get(name, {}), **{setting: 4})
        assert max(sizes[:-1]) <= 4 and sizes[-1] == 9 and torch.allclose(answer.logits, question_logits, atol=1e-5), name


def test_saliency_and_input_x_gradient_share_one_pass(images):
    detector, passes = detector_of("ordinary"), []
    detector.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    together = explain_many(detector, images, ["saliency", "input_x_gradient"], TARGET)
    assert len(passes) == 2  # the gradient's, and the one for the logits
    for name in together:
        assert torch.allclose(together[name].maps, explain(detector, images, name, TARGET).maps, atol=1e-6)


def test_a_seed_decides_and_the_global_generators_do_not_notice(images):
    detector = detector_of("B-cos")
    torch.manual_seed(5), np.random.seed(5)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name in ("smoothgrad", "kernel_shap"):
        first = explain(detector, images, name, **QUICK[name]).maps
        torch.rand(7)
        assert torch.equal(explain(detector, images, name, **QUICK[name]).maps, first)
        assert not torch.allclose(explain(detector, images, name, seed=1, **QUICK[name]).maps, first, atol=1e-3)
    torch.set_rng_state(torch_before)
    explain_many(detector, images, ["smoothgrad", "kernel_shap", "occlusion", "integrated_gradients"], options=QUICK)
    assert torch.equal(torch.get_rng_state(), torch_before) and np.array_equal(np.random.get_state()[1], numpy_before)


def test_images_and_detector_are_left_alone(images):
    detector, given = detector_of("ordinary").train(), images.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain_many(detector, given, CAPTUM, options=QUICK)
    assert torch.equal(given, images) and not given.requires_grad and detector.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in detector.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in detector.modules())


def test_importing_the_explainers_imports_no_captum():
    code = "import sys, bcos_nb.explainers; sys.exit('captum' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


# ---- who can be served


@pytest.mark.parametrize("kind", list(DETECTORS))
@pytest.mark.parametrize("name", CAPTUM)
def test_each_method_works_or_says_why(kind, name, images):
    detector = detector_of(kind)
    if name == "guided_backprop" and kind != "ordinary":
        with pytest.raises(ValueError, match="activations are GELU.*nn.ReLU" if kind == "ViT" else "has no activations.*nn.ReLU"):
            explain(detector, images, name)
        return
    answer = explain(detector, images, name, TARGET, **QUICK.get(name, {}))
    assert answer.method == name and answer.maps.shape == answer.contributions.shape == (3, 32, 32) and answer.maps.dtype == torch.float32
    assert answer.maps.min() >= 0 and answer.maps.max() <= 1 and torch.equal(answer.maps.amax((1, 2)).round(decimals=5), torch.ones(3))


class Rectifiers(TorchDispatchMode):
    """Counts ReLU operations, however they were called."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "relu" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", [arch for arch in list_detectors() if arch not in ("vitc_s", "vitc_b", "resnet34", "resnet18")])
def test_every_relu_of_a_detector_is_a_module_that_captum_finds(arch):
    side, called = (64 if arch == "inception_v3" else 32), []
    for b, options in ((None, {}), (2, dict(activation="relu")), (2, {})):
        detector = create_detector(arch, b=b, width=0.125, **options, **(dict(image_size=32, depth=1) if arch.startswith("vitc") else {})).eval()
        called.clear()
        for module in detector.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda *_: called.append(1))
        with torch.no_grad(), Rectifiers() as rectifiers:
            detector(torch.rand(1, 3, max(side, detector.smallest), max(side, detector.smallest)))
        assert rectifiers.count == len(called)
        assert (EXPLAINERS["guided_backprop"].unable(detector) is None) == bool(called)


# ---- errors and zeros


@pytest.mark.parametrize("name,options,words", [
    ("saliency", dict(channels="mean"), "'max' or 'sum'"),
    ("saliency", dict(internal_batch_size=0), "internal_batch_size must be a whole number"),
    ("integrated_gradients", dict(n_steps=0), "n_steps must be a whole number"),
    ("integrated_gradients", dict(baselines=torch.zeros(4, 3, 32, 32)), "broadcast to"),
    ("integrated_gradients", dict(baselines=255.0), r"in \[0, 1\]"),
    ("smoothgrad", dict(nt_samples=0), "nt_samples"),
    ("smoothgrad", dict(stdevs=-1.0), "stdevs"),
    ("occlusion", dict(sliding_window_shapes=33), "sliding_window_shapes=33"),
    ("occlusion", dict(sliding_window_shapes=8, strides=9), "strides=9"),
    ("occlusion", dict(strides=0), "strides=0"),
    ("kernel_shap", dict(cells=8, n_samples=60), "64 groups and n_samples=60"),
    ("kernel_shap", dict(cells=1), "at least 2 groups"),
    ("kernel_shap", dict(feature_mask=torch.zeros(32, 32)), "integers"),
    ("kernel_shap", dict(feature_mask=torch.zeros(2, 32, 32, dtype=torch.long)), r"\[3, 32, 32\]"),
])
def test_bad_options_are_refused(name, options, words, images):
    with pytest.raises(ValueError, match=words):
        explain(detector_of("ordinary"), images, name, **options)


def test_a_detector_that_sees_nothing_has_maps_of_zeros(images):
    detector = Additive(32)
    detector.weight.data.zero_()
    for name, answer in explain_many(detector, images, [name for name in CAPTUM if name != "guided_backprop"], options=QUICK).items():
        assert answer.maps.abs().max() == 0, name
