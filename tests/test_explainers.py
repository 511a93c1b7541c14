"""Explainers against the reference packages, and what an explanation must not do to a detector."""
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bcos_nb.explainers import EXPLAINERS, alpha_maps, explain, explain_many, explain_windows, register_explainer, usable_explainers
from bcos_nb.layers import explanation_mode
from bcos_nb.models import create_detector, list_detectors

CAMS = ("gradcam", "gradcam++", "xgradcam", "layercam")
QUICK = {  # options that keep the methods of many passes cheap
    "integrated_gradients": dict(n_steps=4), "smoothgrad": dict(nt_samples=3), "occlusion": dict(sliding_window_shapes=24, strides=24),
    "kernel_shap": dict(cells=3, n_samples=30), "rise": dict(samples=16),
}
DETECTORS = [(arch, b) for arch in ("resnet10", "resnet18") if arch in list_detectors() for b in (None, 1.0, 1.75, 2.5)]


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 80, 96, generator=torch.Generator().manual_seed(0))


def quick(names):
    return {name: QUICK[name] for name in names if name in QUICK}


def detector_of(arch, b, seed=0):
    torch.manual_seed(seed)
    return create_detector(arch, b=b, width=0.25).eval()


@pytest.mark.parametrize("arch,b", DETECTORS)
def test_cams_equal_the_grad_cam_package(arch, b, images):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    reference = dict(zip(CAMS, (pytorch_grad_cam.GradCAM, pytorch_grad_cam.GradCAMPlusPlus, pytorch_grad_cam.XGradCAM, pytorch_grad_cam.LayerCAM)))
    detector, target = detector_of(arch, b), torch.tensor([1, 0, 1])
    answers = explain_many(detector, images, CAMS, target)
    for name, method in reference.items():
        with method(detector, [detector.cam_layer], reshape_transform=detector.cam_to_spatial) as package:
            theirs = package(images, [ClassifierOutputTarget(int(t)) for t in target])
        assert np.abs(answers[name].maps.numpy() - theirs).max() < 1e-4, name


BACKBONES = [("resnet34", {}, 64), ("xception", dict(middle=1), 64), ("vitc_ti", dict(image_size=64, depth=2, token_stride=16), 64), ("vgg16", {}, 64), ("densenet121", {}, 64),
             ("inception_v3", {}, 160), ("convnext_tiny", {}, 64)]


@pytest.mark.parametrize("b", [None, 2])
@pytest.mark.parametrize(("arch", "options", "side"), BACKBONES, ids=[backbone[0] for backbone in BACKBONES])
def test_cams_equal_the_package_on_every_backbone(arch, options, side, b):
    """In float64, where nothing hides in rounding; the package still makes its maps in float32."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    detector = create_detector(arch, b=b, width=0.25, **options).double().train()
    images, target = torch.rand(6, 3, side, side).double(), torch.tensor([1, 0])
    for norm in detector.modules():  # statistics of these images, so that no layer is nearly constant
        if getattr(norm, "momentum", None) is not None:
            norm.momentum = 1.0
    with torch.no_grad():
        detector(images)
    detector, images = detector.eval(), images[:2]
    answers = explain_many(detector, images, CAMS, target)
    methods = (pytorch_grad_cam.GradCAM, pytorch_grad_cam.GradCAMPlusPlus, pytorch_grad_cam.XGradCAM, pytorch_grad_cam.LayerCAM)
    for name, method in zip(CAMS, methods):
        with method(detector, [detector.cam_layer], reshape_transform=detector.cam_to_spatial) as package:
            theirs = package(images, [ClassifierOutputTarget(int(t)) for t in target])
        assert np.abs(answers[name].maps.numpy() - theirs).max() < 1e-4, name
    assert max(float(answers[name].maps.max()) for name in CAMS) > 0.9


def test_four_cams_cost_one_forward_pass_and_touch_nothing_below_the_layer(images):
    detector = detector_of("resnet10", 2)
    forward, backward = [], []
    handles = [detector.register_forward_hook(lambda *_: forward.append(1))]
    for stage in (detector.layer1, detector.layer3):
        handles.append(stage.register_forward_hook(lambda module, inputs, output: backward.append(output.requires_grad)))
    explain_many(detector, images, CAMS)
    for handle in handles:
        handle.remove()
    assert len(forward) == 1 and backward == [False, False]


@pytest.mark.parametrize(("arch", "again"), [("resnet10", False), ("vitc_ti", False), ("vgg16", True)])
def test_cams_beside_a_bcos_map_use_its_forward_pass(arch, again):
    torch.manual_seed(0)
    options = dict(image_size=64, depth=2, token_stride=16) if arch == "vitc_ti" else {}
    detector, images, calls = create_detector(arch, b=2, width=0.25, **options).double().eval(), torch.rand(3, 3, 64, 64).double(), []
    handle = next(module for module in detector.modules() if not list(module.children()) and list(module.parameters())).register_forward_hook(lambda *_: calls.append(1))
    target = torch.tensor([0, 1, 1])
    both = explain_many(detector, images, ["layercam", "gradcam", "bcos"], target)
    assert len(calls) == (2 if again else 1) and list(both) == ["layercam", "gradcam", "bcos"]
    handle.remove()
    alone = explain_many(detector, images, ["layercam", "gradcam"], target)
    for name, answer in alone.items():
        assert (both[name].maps - answer.maps).abs().max() < 1e-6, name


@pytest.mark.parametrize("b", [1.25, 2])
def test_bcos_map_equals_the_reference_picture_of_the_same_weights(b, images):
    import bcos

    detector, target = detector_of("resnet10", b), torch.tensor([0, 1, 1])
    answer = explain(detector, images, "bcos", target)
    with explanation_mode(detector):
        encoded = torch.cat([images, 1 - images], 1).requires_grad_()
        (weights,) = torch.autograd.grad(detector.logits_of(encoded).gather(1, target[:, None]).sum(), encoded)
    signed = (weights * encoded).sum(1)
    assert (answer.contributions - signed).abs().max() < 1e-5 * signed.abs().max()
    for n in range(3):
        theirs = bcos.gradient_to_image(encoded[n], weights[n])
        off = np.abs(answer.rgba[n].numpy() - theirs)  # a colour is a ratio: rounding shows where both its weights are near 0
        assert off[..., 3].max() < 1e-4 and np.quantile(off[..., :3], 0.999) < 1e-4 and off.max() < 1e-2
        assert np.abs(answer.maps[n].numpy() - theirs[..., 3]).max() < 1e-4  # the reference takes its percentile in float32


def test_alpha_is_the_norm_over_its_percentile():
    weights = torch.rand(2, 6, 300, 200, generator=torch.Generator().manual_seed(0))
    alpha = alpha_maps(weights, torch.ones(2, 300, 200), smooth=1)
    norm = weights.norm(dim=1).flatten(1).double().numpy()
    assert np.allclose(alpha.flatten(1).numpy(), np.clip(norm / np.percentile(norm, 99.5, axis=1)[:, None], 0, 1), atol=1e-5)


@pytest.mark.parametrize("arch,b", DETECTORS)
def test_every_usable_explainer_gives_maps_in_the_unit_interval(arch, b, images):
    detector = detector_of(arch, b)
    with torch.no_grad():
        logits = detector(images)
    names = usable_explainers(detector)
    for name, answer in explain_many(detector, images, names, options=quick(names)).items():
        assert answer.method == name and answer.maps.shape == (3, 80, 96) and answer.maps.dtype == torch.float32
        assert answer.maps.min() >= 0 and answer.maps.max() <= 1 and not answer.maps.requires_grad
        assert torch.allclose(answer.logits, logits, atol=1e-4) and not answer.logits.requires_grad


def test_many_equals_one_by_one_and_batches_equal_single_images(images):
    detector, images = detector_of("resnet10", 2).double(), images.double()
    names = usable_explainers(detector)
    together = explain_many(detector, images, names, options=quick(names))
    assert list(together) == names
    for name in names:
        alone = explain(detector, images, name, **QUICK.get(name, {}))
        assert torch.allclose(alone.maps, together[name].maps, atol=1e-4)  # activations are weighted in float32
        for n in range(3):
            assert torch.allclose(explain(detector, images[n : n + 1], name, **QUICK.get(name, {})).maps[0], alone.maps[n], atol=1e-4)


def test_an_explanation_leaves_the_detector_as_it_was(images):
    detector = detector_of("resnet10", 2).train()
    detector.layer2.eval()
    detector.conv1.weight.requires_grad_(False)
    modes = [module.training for module in detector.modules()]
    flags = [parameter.requires_grad for parameter in detector.parameters()]
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    given = images.clone()

    @register_explainer("fails")
    def fails(question, requests):
        raise KeyError("on purpose")

    names = usable_explainers(detector)[:-1]
    explain_many(detector, given, names, options=quick(names))
    with pytest.raises(KeyError):
        explain_many(detector, given, ["bcos", "gradcam", "fails"])
    del EXPLAINERS["fails"]
    assert modes == [module.training for module in detector.modules()]
    assert flags == [parameter.requires_grad for parameter in detector.parameters()]
    assert all(parameter.grad is None for parameter in detector.parameters()) and not given.requires_grad and torch.equal(given, images)
    assert not any(module._forward_hooks or module._backward_hooks for module in detector.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())


@pytest.mark.parametrize("give, words", [
    (lambda question: {"mine": question.images.mean(1)}, r"'mine' gave a Tensor where an Attribution with maps \[\d+, \d+, \d+\] was expected"),
    (lambda question: {"mine": question.answer("mine", question.images)}, r"'mine' gave maps \[\d+, 3, \d+, \d+\]"),
    (lambda question: {"main": question.answer("main", question.images[:, 0])}, "'mine' gave nothing"),
], ids=["a tensor", "of another shape", "under another name"])
def test_an_explainer_of_ones_own_is_told_what_it_should_have_given(give, words, images):
    register_explainer("mine")(lambda question, requests: give(question))
    try:
        with pytest.raises(ValueError, match=words + ".*question.answer"):
            explain(detector_of("resnet10", 2), images, "mine")
    finally:
        del EXPLAINERS["mine"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_explains_inside_no_grad_and_inference_mode(context, images):
    detector = detector_of("resnet10", 2)
    expected = explain_many(detector, images, ["bcos", "gradcam"])
    with context():
        answers = explain_many(detector, images.clone(), ["bcos", "gradcam"])
    for name, answer in answers.items():
        assert torch.equal(answer.maps, expected[name].maps)


def test_colour_images_only_where_wanted(images):
    detector = detector_of("resnet10", 2)
    assert explain_many(detector, images, ["bcos"], need_rgba=False)["bcos"].rgba is None
    assert explain(detector, images, "bcos").rgba.shape == (3, 80, 96, 4)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda x: x[0], r"image\[None\]"),
        (lambda x: x[:, :1], r"\[N, 3, H, W\]"),
        (lambda x: x[:0], r"\[N, 3, H, W\]"),
        (lambda x: (255 * x).byte(), "divide 8-bit"),
        (lambda x: 255 * x, "image 0 runs"),
        (lambda x: x - 0.5, "image 0 runs"),
        (lambda x: torch.where(torch.arange(3)[:, None, None, None] == 2, torch.nan, x), "image 2 runs"),
        (lambda x: x.numpy(), "ndarray"),
    ],
)
def test_bad_images_are_refused(change, words, images):
    with pytest.raises(ValueError, match=words):
        explain(detector_of("resnet10", None), change(images), "gradcam")


@pytest.mark.parametrize(
    "arguments,options,words",
    [
        (("nonsense",), {}, "no explainer 'nonsense'.*gradcam"),
        (("gradcam+",), {}, r"Did you mean 'gradcam\+*'"),
        (("bcos",), {}, "ordinary network.*gradcam"),
        (("gradcam", 2), {}, "0 .real. or 1 .fake., got 2"),
        (("gradcam", 1.0), {}, "target must be"),
        (("gradcam", torch.tensor([0, 1])), {}, "3 images"),
        (("gradcam",), {"smooth": 3}, "has no option 'smooth'"),
    ],
)
def test_bad_requests_are_refused(arguments, options, words, images):
    with pytest.raises(ValueError, match=words):
        explain(detector_of("resnet10", None), images, *arguments, **options)


def test_bad_options_and_broken_weights_are_refused(images):
    detector = detector_of("resnet10", 2)
    for options in ({"smooth": 4}, {"smooth": 0}, {"percentile": 0}, {"percentile": 101}):
        with pytest.raises(ValueError, match="smooth|percentile"):
            explain(detector, images, "bcos", **options)
    with pytest.raises(ValueError, match="not asked for"):
        explain_many(detector, images, ["gradcam"], options={"bcos": {"smooth": 3}})
    with pytest.raises(ValueError, match="No explainer"):
        explain_many(detector, images, [])
    broken = detector_of("resnet10", None)
    broken.fc.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        explain(broken, images, "gradcam")


@pytest.mark.parametrize("target", [None, "fake"])
def test_a_target_that_is_no_number_is_refused_in_words(target, images):
    with pytest.raises(ValueError, match=r"target must be 0 \(real\)"):
        explain(detector_of("resnet10", None), images, "gradcam", target)


# ---- what an explanation must not depend on

@pytest.mark.parametrize("logits", [dict(logit_temperature=1e6), dict(logit_temperature=1e6, logit_bias=3.0)])
def test_cams_beside_a_bcos_map_are_the_same_however_small_the_logits(logits):
    """VGG's head does not read its cam_layer: with the pooling between them left out, the logits differ by their own size, which is tiny here."""
    torch.manual_seed(0)
    detector, images = create_detector("vgg16", b=2, width=0.25, **logits).double().eval(), torch.rand(2, 3, 96, 96).double()
    beside, alone = explain_many(detector, images, [*CAMS, "bcos"]), explain_many(detector, images, CAMS)
    for name, answer in alone.items():
        assert (beside[name].maps - answer.maps).abs().max() < 1e-6, name


def with_statistics(detector, images):
    for norm in detector.modules():
        if getattr(norm, "momentum", None) is not None:
            norm.momentum = 1.0
    with torch.no_grad():
        detector.train()(images)
    return detector.eval()


@pytest.mark.parametrize("b", [None, 2])
def test_an_explanation_is_the_same_inside_autocast(b, images):
    detector = with_statistics(detector_of("resnet10", b), images)
    names = usable_explainers(detector)
    outside = explain_many(detector, images, names, options=quick(names))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = explain_many(detector, images, names, options=quick(names))
        assert torch.is_autocast_enabled("cpu")
    for name in names:
        assert torch.equal(inside[name].maps, outside[name].maps) and torch.equal(inside[name].logits, outside[name].logits), name


@pytest.mark.parametrize("b", [None, 2])
def test_an_image_of_one_window_has_the_maps_of_the_image(b):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    detector = with_statistics(detector_of("resnet10", b), images)
    names = usable_explainers(detector)
    whole = explain_many(detector, images, names, options=quick(names))
    windows = explain_windows(detector, images, names, options=quick(names), window=64)
    for name in names:
        assert (windows[name].maps - whole[name].maps).abs().max() < 1e-4, name


def test_no_explainer_makes_float64_where_a_device_has_none(monkeypatch, images):
    """As on MPS, which this machine need not have: the widest type is float32 there, and float64 is an error."""
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
            return result

    monkeypatch.setattr(sys.modules["bcos_nb.layers.dynamic_linear"], "widest_float", lambda device: torch.float32)
    detector = with_statistics(detector_of("resnet10", 2), images)
    names = [name for name in usable_explainers(detector) if name != "lime"]  # which solves its regression on the CPU then
    expected = explain_many(detector, images, names, options=quick(names))
    with Refuses():
        answers = explain_many(detector, images, names, options=quick(names))
    assert all(torch.equal(answers[name].maps, expected[name].maps) for name in names)
