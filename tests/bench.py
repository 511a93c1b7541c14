"""How fast this is beside what one would use otherwise, as ratios measured in one run on this machine.

    python tests/bench.py                   ResNet-34, 224 px, batch 8; under eight minutes on 2 cores
    python tests/bench.py --quick           ResNet-18, 128 px
    python tests/bench.py --only forward    the rows of some rooms
    python tests/bench.py --device cuda     where there is a GPU (then the default); bfloat16 and B = 1.75 besides

What is compared takes turns, with the same weights where it has any, after a check that both give the same. A ratio is the median over
the turns, of ours / theirs where less is better, of theirs / ours ("times") where more is. Seconds are medians too. A table from a
machine that did something else besides is marked as disturbed: threads that wait for each other make such seconds meaningless. The table
is also written to data/bench/<device>.csv, one row a measurement, unless --no-write.
"""
import argparse
import csv
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import bcos
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from bcos.models import resnet as reference_resnet
from bcos.modules import norms as reference_norms

from bcos_nb.data import Frames
from bcos_nb.explainers import explain, explain_many
from bcos_nb.games import build_grids, localization_scores, play_grid_game
from bcos_nb.layers import BcosConv2d
from bcos_nb.layers.dynamic_linear import without_weight_gradients
from bcos_nb.models import create_detector
from bcos_nb.training import FitConfig, fit

ROOT = Path(__file__).resolve().parent.parent
CAMS = ("gradcam", "gradcam++", "xgradcam", "layercam")


# ---- measuring

def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work):
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def turns(works, repeats, *, warm_up=1):
    """Seconds of each of some works, {name: [repeats]}, taken in turns; who begins changes."""
    names, taken = list(works), {name: [] for name in works}
    for _ in range(warm_up):
        for work in works.values():
            work()
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds(works[name]))
    return taken


def row(work, ours, theirs, *, beside, at_most=None, at_least=None, times=False, note="", **about):
    """A row of the table from the seconds of both, turn by turn. `times`: theirs / ours instead of ours / theirs."""
    ratios = sorted(b / a if times else a / b for a, b in zip(ours, theirs))
    ratio = statistics.median(ratios)
    return dict(
        work=work, beside=beside, ours_s=statistics.median(ours), theirs_s=statistics.median(theirs), ratio=ratio, lowest=ratios[0], highest=ratios[-1],
        ratio_is="theirs / ours" if times else "ours / theirs", repeats=len(ratios), note=note, **goal(ratio, at_most, at_least), **about,
    )


def goal(ratio, at_most, at_least):
    """The target in words and whether it is reached, both empty where there is none."""
    if at_most is not None:
        return dict(target=f"<= {at_most:.2f}", reached=ratio <= at_most)
    if at_least is not None:
        return dict(target=f">= {at_least:.2f}", reached=ratio >= at_least)
    return dict(target="", reached="")


def measured(work, ours, theirs, repeats, *, beside, share=1.0, warm_up=1, **about):
    """A row "times as fast as". `share`: what part of the work `theirs` does."""
    taken = turns(dict(ours=ours, theirs=theirs), repeats, warm_up=warm_up)
    return row(work, taken["ours"], [s / share for s in taken["theirs"]], beside=beside, times=True, **about)


def machine(device):
    """Name of the processor, its cores, the GPU if it is used, and the versions."""
    listed = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.M) if listed.exists() else None
    name = named[1].strip() if named else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return dict(device=device.type, cpu=name, cores=cores, threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__, python=platform.python_version(),
                date=datetime.date.today().isoformat(), disturbed=device.type == "cpu" and load > 0.5)


# ---- the same network twice

def twins(arch, b, device):
    """Our detector and the reference package's network with its weights, both with MaxOut 1 as the package has it."""
    torch.manual_seed(0)
    ours = create_detector(arch, b=b, max_out=1, zero_mean=0.0, energy_stem=False, logit_temperature=0.5)
    norm = reference_norms.NoBias(reference_norms.BatchNormUncentered2d)
    theirs = getattr(reference_resnet, arch)(num_classes=2, in_chans=6, conv_layer=partial(bcos.modules.BcosConv2d, b=b), norm_layer=norm, logit_temperature=0.5)
    state = ours.state_dict()
    theirs.load_state_dict({name: state[name.replace(".linear.weight", ".weight")] for name in theirs.state_dict()})
    return ours.to(device).eval(), theirs.to(device).eval()


def pictures(count, side, device):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def encoded(images):
    return torch.cat([images, 1 - images], 1)


def agree(name, ours, theirs, tolerance=1e-3):
    """Refuses to compare the speed of two things that do not give the same."""
    ours, theirs = torch.as_tensor(ours).float().cpu(), torch.as_tensor(theirs).float().cpu()
    worst = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-12)
    if not worst <= tolerance:
        raise SystemExit(f"{name}: ours and theirs differ by {worst:.1e} of the largest value, so their speeds are no comparison.")


def step_of(network, prepare, images, labels, precision="float32"):
    """One training step as everybody writes it."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(network(prepare(images)), labels)
        loss.backward()
        optimizer.step()

    return step


def same(images):
    return images


def trio(settings, b, device, memory_format=torch.channels_last):
    """The ordinary network, ours and the reference's, the latter two with the same weights, and what each does to images."""
    torch.manual_seed(0)
    ordinary = create_detector(settings.arch).to(device)
    ours, theirs = twins(settings.arch, b, device)
    networks = dict(ordinary=ordinary, ours=ours, reference=theirs)
    return {name: network.to(memory_format=memory_format) for name, network in networks.items()}, dict(ordinary=same, ours=same, reference=encoded)


def gradients_agree(name, ours, theirs, images, labels):
    """Refuses to compare training steps that have not the same gradient, at the far end from the loss."""
    F.cross_entropy(ours.train()(images), labels).backward()
    F.cross_entropy(theirs.train()(encoded(images)), labels).backward()
    agree(name, ours.conv1.weight.grad, theirs.conv1.linear.weight.grad, 1e-2)


def peak_of_step(step, device, network):
    """Largest number of bytes in tensors during a training step, those of parameters and optimizer included."""
    step()  # from the second step on the optimizer has its state
    network.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    held = 3 * sum(parameter.nbytes for parameter in network.parameters()) + sum(buffer.nbytes for buffer in network.buffers())  # Adam has two
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return held + max(np.cumsum([size for _, size in changes]))


def compiler_works(device):
    """Whether torch.compile makes something that runs here, forward and backward; if not, says why."""
    x = torch.ones(4, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (x * x).sum())(x).backward()
    except Exception as error:  # no compiler, no Triton, no Python headers: whatever it is, the rows are left out
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"         torch.compile does not work here, so there are no rows for compiled networks: {reason[0][:200]}", flush=True)
        return False
    return bool(torch.equal(x.grad, 2 * x.detach()))


# ---- the rows

def rows_of_layers(settings, device):
    images = torch.rand(settings.batch, 64, settings.side // 4, settings.side // 4, generator=torch.Generator().manual_seed(0)).to(device)
    for b in (1.75, 2):
        ours, theirs = BcosConv2d(64, 64, 3, padding=1, b=b).to(device), bcos.modules.BcosConv2d(64, 64, 3, padding=1, b=b).to(device)
        theirs.linear.weight.data.copy_(ours.weight.data)
        agree("layer", ours(images).detach(), theirs(images).detach())
        about = dict(beside="reference layer", b=b)
        with torch.no_grad():
            yield measured("layer 64 to 64, 3 x 3, forward", lambda: ours(images), lambda: theirs(images), 2 * settings.repeats + 1, **about)
        tracked = images.clone().requires_grad_()
        yield measured("layer 64 to 64, 3 x 3, forward and backward", lambda: ours(tracked).sum().backward(),
                       lambda: theirs(tracked).sum().backward(), 2 * settings.repeats + 1, **about)


def variants(device):
    """Exponents and precisions that are measured; the targets are for all of them on a GPU, for B = 2 on a processor."""
    return [(2, "float32"), (1.75, "float32"), (2, "bfloat16"), (1.75, "bfloat16")] if device.type == "cuda" else [(2, "float32"), (1.75, "float32")]


def rows_of_forward(settings, device):
    images = pictures(settings.batch, settings.side, device)
    for b, precision in variants(device):
        counts, works = b == 2 or device.type == "cuda", {}
        for layout in (torch.contiguous_format, torch.channels_last):
            networks, prepare = trio(settings, b, device, layout)
            batch = images.contiguous(memory_format=layout)
            with torch.no_grad():
                agree("network", networks["ours"](batch), networks["reference"](encoded(batch)))
            for name, network in networks.items():
                works[name, layout] = partial(lambda network, prepare, batch: network.eval()(prepare(batch)), network, prepare[name], batch)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            taken = turns(works, settings.repeats)
        best = {}
        for name in ("ordinary", "ours", "reference"):
            best[name] = min((key for key in works if key[0] == name), key=lambda key: statistics.median(taken[key]))
        layouts = "layouts: " + ", ".join(f"{name} {'channels_last' if key[1] == torch.channels_last else 'contiguous'}" for name, key in best.items())
        about = dict(b=b, precision=precision, note=layouts)
        yield row("forward, both at their best layout", taken[best["ours"]], taken[best["ordinary"]], beside="ordinary", at_most=1.10 if counts else None, **about)
        yield row("forward, both at their best layout", taken[best["ours"]], taken[best["reference"]], beside="reference", **about)


def rows_of_steps(settings, device):
    images = pictures(settings.batch, settings.side, device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(settings.batch, device=device) % 2
    for b, precision in variants(device):
        counts = b == 2 or device.type == "cuda"
        networks, prepare = trio(settings, b, device)
        gradients_agree("training step", networks["ours"], networks["reference"], images, labels)
        taken = turns({name: step_of(network.train(), prepare[name], images, labels, precision) for name, network in networks.items()}, settings.repeats)
        about = dict(b=b, precision=precision)
        yield row("training step, eager, channels_last", taken["ours"], taken["ordinary"], beside="ordinary", at_most=1.35 if counts else None, **about)
        yield row("training step, eager, channels_last", taken["ours"], taken["reference"], beside="reference", at_most=0.80 if counts else None, **about)


def rows_of_compiled(settings, device):
    if not compiler_works(device):
        return
    images = pictures(settings.batch, settings.side, device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(settings.batch, device=device) % 2
    for b, precision in variants(device)[:: 1 if device.type == "cuda" else 2]:
        networks, prepare = trio(settings, b, device)
        compiled = {name: torch.compile(network.train()) for name, network in networks.items()}
        gradients_agree("compiled training step", compiled["ours"], networks["reference"], images, labels)
        works = {name: step_of(network.train(), prepare[name], images, labels, precision) for name, network in compiled.items()}
        works["eager reference"] = step_of(networks["reference"].train(), encoded, images, labels, precision)
        taken = turns(works, settings.repeats, warm_up=2)
        about = dict(b=b, precision=precision)
        yield row("training step, both compiled", taken["ours"], taken["ordinary"], beside="ordinary, compiled", at_most=0.95, **about)
        yield row("training step, both compiled", taken["ours"], taken["reference"], beside="reference, compiled", **about)
        yield row("training step, ours compiled", taken["ours"], taken["eager reference"], beside="reference, eager", at_most=0.65, **about)


def rows_of_memory(settings, device):
    images = pictures(settings.batch, settings.side, device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(settings.batch, device=device) % 2
    for b, precision in variants(device):
        networks, prepare = trio(settings, b, device)
        peaks = {}
        for name in list(networks):
            network = networks.pop(name).train()
            peaks[name] = peak_of_step(step_of(network, prepare[name], images, labels, precision), device, network) / 1e6
            del network
        for beside in ("ordinary", "reference"):
            ratio = peaks["ours"] / peaks[beside]
            yield dict(work="peak memory of a training step", beside=beside, ours_mb=peaks["ours"], theirs_mb=peaks[beside], ratio=ratio, lowest=ratio, highest=ratio,
                       ratio_is="ours / theirs", repeats=1, note=f"{peaks['ours']:.0f} MB / {peaks[beside]:.0f} MB of tensors", b=b, precision=precision,
                       **goal(ratio, 1.25 if beside == "ordinary" else None, None))


def rows_of_explanations(settings, device):
    images, b = pictures(16, settings.side, device), 2
    ours, theirs = twins(settings.arch, b, device)
    singles = [encoded(image[None]) for image in images]

    def one_at_a_time(some):
        return [theirs.explain(single.detach().clone().requires_grad_(), idx=1)["explanation"] for single in some]

    batch = explain(ours, images, "bcos", 1)
    agree("explanation", batch.rgba[0], one_at_a_time(singles[:1])[0], 1e-2)
    ordinary = create_detector(settings.arch).to(device, memory_format=torch.channels_last).eval()

    def gradient_of_ordinary():
        leaf = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        return torch.autograd.grad(ordinary(leaf)[:, 1].sum(), leaf)[0]

    with without_weight_gradients(ordinary):
        taken = turns(dict(ours=lambda: explain(ours, images, "bcos", 1), theirs=lambda: one_at_a_time(singles), gradient=gradient_of_ordinary), settings.repeats)
    yield row("explanations of 16 images, a second", taken["ours"], taken["theirs"], beside="reference, one at a time", b=b, times=True,
              at_least=10 if device.type == "cuda" else 2)
    yield row("explanations of 16 images", taken["ours"], taken["gradient"], beside="ordinary network's input gradient", b=b)
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    methods = dict(zip(CAMS, (pytorch_grad_cam.GradCAM, pytorch_grad_cam.GradCAMPlusPlus, pytorch_grad_cam.XGradCAM, pytorch_grad_cam.LayerCAM)))
    images, network = images[: settings.batch], create_detector(settings.arch).to(device).eval()
    targets = [ClassifierOutputTarget(1)] * settings.batch

    def four_of_theirs():
        maps = {}
        for name, method in methods.items():
            with method(network, [network.cam_layer]) as cam:
                maps[name] = cam(images, targets)
        return maps

    answers, theirs_ = explain_many(network, images, CAMS), four_of_theirs()
    for name in CAMS:
        agree(name, answers[name].maps, theirs_[name], 1e-2)
    with torch.no_grad():
        passes = statistics.median(seconds(lambda: network(images)) for _ in range(3))
    cams = measured(f"four CAMs of {settings.batch} images, a second", lambda: explain_many(network, images, CAMS), four_of_theirs, settings.repeats, beside="grad-cam, batched",
                    at_least=8 if device.type == "cpu" else None)
    yield cams | dict(note=f"in forward passes: {cams['ours_s'] / passes:.1f} / {cams['theirs_s'] / passes:.1f}")


def rows_of_lime(settings, device):
    """Cost is linear in the images, so on a processor, where 32 of them take minutes, both are timed on four."""
    import lime.lime_image

    from bcos_nb.data.faces import make_scene, record
    from bcos_nb.explainers.lime import SEGMENTS

    gpu, whole, samples = device.type == "cuda", 32, 256
    count, theirs_count, batch_size = (whole, 4, 256) if gpu else (4, 4, 32)
    faces = np.stack([record(make_scene(identity, 0, 1, settings.side))[0][0] for identity in range(count)])
    images = torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous().float().to(device) / 255
    pictures_ = list(images[:theirs_count].double().permute(0, 2, 3, 1).cpu().numpy())

    for b in (None, 2) if gpu else (None,):
        torch.manual_seed(0)
        network = create_detector(settings.arch, b=b).to(device).eval()

        def classifier(pictures):
            with torch.no_grad():
                return network(torch.from_numpy(pictures).permute(0, 3, 1, 2).float().to(device)).softmax(1).cpu().numpy()

        def theirs(pictures=pictures_):
            explainer = lime.lime_image.LimeImageExplainer(random_state=0)
            options = dict(labels=(1,), top_labels=None, hide_color=0, num_samples=samples, batch_size=batch_size, random_seed=42)
            return [explainer.explain_instance(picture, classifier, **options) for picture in pictures]

        def ours(images=images):
            return explain(network, images, "lime", samples=samples, batch_size=batch_size)

        def ours_cold():
            SEGMENTS.clear()
            return ours()

        lime.lime_image.tqdm = list  # no progress bars, which only cost it time
        first, answer = theirs(pictures_[:1])[0], ours(images[:1])
        weights = np.array([weight for _, weight in sorted(first.local_exp[1])])
        agree("LIME", answer.contributions[0], weights[first.segments])
        taken = turns(dict(cold=ours_cold, warm=ours, theirs=theirs), settings.repeats if gpu else 2, warm_up=1 if gpu else 0)
        beside, about = [s * whole / theirs_count for s in taken["theirs"]], dict(beside=f"lime, batch size {batch_size} as ours", b=b, times=True)
        on, spread = f"{'ours on all, theirs' if gpu else 'both'} timed on {theirs_count} images and scaled to {whole}", whole / count
        superpixels = int(answer.contributions[0].unique().numel())
        yield row(f"LIME of {whole} images, {samples} samples, a second", [s * spread for s in taken["cold"]], beside, at_least=4 if gpu else 1.1, note=f"superpixels cut anew by both, {superpixels} in the first image; {on}", **about)
        yield row(f"LIME of {whole} images, {samples} samples, superpixels remembered, a second", [s * spread for s in taken["warm"]], beside,
                  note=f"as for every detector after the first that is asked about the same frames; theirs cuts anew; {on}", **about)


def rows_of_games(settings, device):
    generator = torch.Generator().manual_seed(0)
    count, side, share = 1000, settings.side, 0.05
    maps = torch.rand(count, side, side, generator=generator)
    regions = torch.rand(count, side, side, generator=generator) < 0.2
    thresholds = [k / 100 for k in range(101)]
    some = round(count * share)

    def loop():
        scores = np.zeros((len(thresholds), some))
        for n in range(some):
            one, region = maps_[n], regions_[n]
            for t, threshold in enumerate(thresholds):
                kept = np.where(one >= threshold, one, 0)
                total = kept.sum()
                scores[t, n] = kept[region].sum() / total if total > 0 else 0
        return scores

    maps_, regions_ = maps.numpy(), regions.numpy()
    maps, regions = maps.to(device), regions.to(device)
    agree("localization", localization_scores(maps[:some], regions[:some], thresholds)["weighted"], loop(), 1e-3)
    scores = measured(f"localization scores of {count} maps of {side} px, {len(thresholds)} thresholds, a second",
                      lambda: localization_scores(maps, regions, thresholds), loop, 3, share=share, warm_up=0, beside="NumPy loop", at_least=30)
    yield scores | dict(note=f"ours gives both weightings, the loop one; the loop was timed on {some} maps and scaled to {count}")
    few = partial(localization_scores, maps[:200], regions[:200])
    many, eleven = turns(dict(many=partial(few, thresholds), eleven=partial(few, thresholds[::10])), 5).values()
    yield row(f"localization scores of 200 maps of {side} px, 101 thresholds", many, eleven, beside="11 thresholds", at_most=1.3)
    yield whole_grid_game(settings, device)


def whole_grid_game(settings, device):
    """Grids to scores, all CAM methods and B-cos, beside the same work put together from the packages and a loop."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cell, count, share = settings.side // 2, 100, 0.04
    ours, theirs = twins(settings.arch, 2, device)
    generator = torch.Generator().manual_seed(0)
    faces = torch.randint(0, 256, (900, 3, cell, cell), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(900) < count).long()
    names = [str(k) for k in range(900)]
    catalog = pd.DataFrame(dict(frame=names, mask=None, video=names, label=labels.numpy(), method="noise", source_frame=None))
    grids = build_grids(ours, Frames(faces, None, labels, names, catalog), count=count, scores=catalog.assign(probability=0.1 + 0.8 * labels.numpy()))
    methods = dict(zip(CAMS, (pytorch_grad_cam.GradCAM, pytorch_grad_cam.GradCAMPlusPlus, pytorch_grad_cam.XGradCAM, pytorch_grad_cam.LayerCAM)))
    layer, thresholds = theirs.layer4[-1], [k / 10 for k in range(11)]

    class OfImages(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(encoded(images))

    network, some = OfImages(theirs).eval(), round(count * share)

    def loop():
        scores = {}
        for k in range(some):
            image, region = grids.images([k]).to(device), grids.regions([k])[0].numpy()
            maps = {name: None for name in methods}
            for name, method in methods.items():
                with method(network, [layer]) as cam:
                    maps[name] = cam(image, [ClassifierOutputTarget(1)])[0]
            maps["bcos"] = np.asarray(theirs.explain(encoded(image).requires_grad_(), idx=1)["explanation"])[..., 3]
            for name, one in maps.items():
                for threshold in thresholds:
                    kept = np.where(one >= threshold, one, 0)
                    for weighting, weight in (("weighted", kept), ("unweighted", kept > 0)):
                        total = weight.sum()
                        scores[name, weighting, threshold, k] = weight[region].sum() / total if total > 0 else 0
        return scores

    table = play_grid_game(ours, grids.frames, ["bcos", *CAMS], thresholds=thresholds, grids=grids)
    wanted, names_ = loop(), grids.names()
    found = table.set_index(["explainer", "weighting", "threshold", "sample"])["score"]
    for name in ("bcos", "gradcam", "layercam"):
        agree(f"grid game, {name}", found.loc[[(name, "weighted", 0.0, names_[k]) for k in range(some)]].to_numpy(), [wanted[name, "weighted", 0.0, k] for k in range(some)], 2e-2)
    game = measured(f"grid game, {count} grids of 3 x 3 faces of {cell} px, four CAMs and B-cos", lambda: play_grid_game(ours, grids.frames, ["bcos", *CAMS], thresholds=thresholds, grids=grids),
                    loop, 3, share=share, warm_up=0, beside="grad-cam, bcos and a loop over grids", b=2, at_least=5)
    return game | dict(note=f"11 thresholds, both weightings; theirs was timed on {some} grids and scaled to {count}")


def rows_of_training(settings, device):
    side, count, batch = settings.train_side, settings.train_count, 32
    labels = torch.arange(count) % 2
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [str(k) for k in range(count)]
    catalog = pd.DataFrame(dict(frame=names, mask=None, video=names, label=labels.numpy(), method="noise", source_frame=None))
    train = Frames(images, None, labels, names, catalog)
    val = train[:8]
    for b in (None, 2):
        torch.manual_seed(0)
        detector = create_detector("resnet10", b=b, width=0.5, stem="fine").to(device)

        def ours():
            with tempfile.TemporaryDirectory() as place:
                fit(detector, train, val, FitConfig(epochs=1, batch_size=batch, flip=False), place, progress=False)

        def bare():
            optimizer = torch.optim.Adam(detector.parameters(), lr=1e-3)
            detector.train()
            for indices in torch.randperm(count).split(batch):
                loss = F.cross_entropy(detector(images[indices].to(device).float() / 255), labels[indices].to(device))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
                optimizer.step()

        kind = "ordinary" if b is None else "B-cos"
        taken = measured(f"fit, one epoch of {count} frames of {side} px, {kind} resnet10", ours, bare, settings.repeats, beside="bare loop", b=b)
        yield taken | dict(note=f"{count / taken['ours_s']:.0f} frames a second; ours also validates, checks, and writes its state and the detector")


# ---- the catalogue

def forged_index(root, videos, length):
    """A FaceForensics++ of empty files for counting: JSON, and folders that are all links to one; a fifth of the videos are real."""
    names, reals = [f"{k:03d}.png" for k in range(length)], videos // 5
    pool = root / "pool"
    pool.mkdir(parents=True)
    for name in names:
        (pool / name).touch()
    parts = {"FF-real": "original_sequences/youtube"} | {label: f"manipulated_sequences/{method}" for label, method in (
        ("FF-DF", "Deepfakes"), ("FF-F2F", "Face2Face"), ("FF-FS", "FaceSwap"), ("FF-NT", "NeuralTextures"))}
    index = {}
    for label, part in parts.items():
        members = {}
        for k in range(reals):
            video = f"{k:05d}" if label == "FF-real" else f"{k:05d}_{(k + 1) % reals:05d}"
            kinds = ("frames",) if label == "FF-real" else ("frames", "masks")
            members[video] = {"label": label} | {kind: [f"FaceForensics++/{part}/c23/{kind}/{video}/{name}" for name in names] for kind in kinds}
            for kind in kinds:
                folder = root / "rgb" / "FaceForensics++" / part / "c23" / kind / video
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.symlink_to(pool)
        index[label] = {"train": {"c23": members}}
    (root / "dataset_json").mkdir()
    with open(root / "dataset_json" / "FaceForensics++.json", "w", encoding="utf-8") as file:
        json.dump({"FaceForensics++": index}, file)


def in_one_process(root, work="read_catalog(root)"):
    """Rows, wall seconds, processor seconds and peak bytes of `work` in a process of its own, on one core."""
    code = ("import os, resource, sys, time\nfrom bcos_nb.data import check_data, read_catalog\nimport bcos_nb.data.catalog, bcos_nb.data.check\nroot = sys.argv[1]\n"
            "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
            f"begin, used = time.perf_counter(), time.process_time()\nrows = len({work})\n"
            "taken = time.perf_counter() - begin, time.process_time() - used\n"
            "status = '/proc/self/status'  # of this program alone; getrusage counts what its parent had when it started it\n"
            "own = [int(line.split()[1]) * 1024 for line in open(status) if line.startswith('VmHWM')] if os.path.exists(status) else []\n"
            "print(rows, *taken, *own or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)])")
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    rows, *measured_ = done.stdout.split()
    return int(rows), *map(float, measured_)


def rows_of_catalog(settings, device):
    """Against the goal of 60 s and 3 GB on one core, and against parsing the same JSON alone, which nobody can do without."""
    videos = 5_000 if settings.side < 200 else 100_000
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        forged_index(root, videos, 32)
        parsing = "__import__('json').load(open(root + '/dataset_json/FaceForensics++.json'))"
        _, alone, *_ = in_one_process(root, parsing)
        for work, call in (("first time", "read_catalog(root)"), ("from its cache", "read_catalog(root)"), ("check, paths only", "check_data(root, fast=True).counts")):
            _, taken, used, peak = in_one_process(root, call)
            about = row(f"catalogue of {videos:,} videos of 32 frames, {work}", [taken], [alone], beside="parsing the JSON alone")
            limit, memory = 60 * videos / 100_000, 3e9
            yield about | dict(target=f"<= {limit:.0f} s, 3 GB", reached=taken <= limit and peak <= memory, ours_mb=peak / 1e6,
                               note=f"{taken:.1f} s, of these {used:.1f} s of processor; peak {peak / 1e9:.2f} GB, one core")


def rows_of_forging(settings, device):
    from bcos_nb.data.counterparts import COUNTERPARTS
    from bcos_nb.data.faces import make_scene, record
    from bcos_nb.data.forge import encoded, forge_pair, make_recipe

    for dataset, side in (("FaceForensics++", 128), ("FaceForensics++", 256), ("Celeb-DF-v2", 128)):
        form = COUNTERPARTS[dataset]
        recipe = make_recipe("mini", dataset, size=side, compressions=("c23",) if form.levels else None)
        videos, filmed = 2 * (1 + len(recipe.methods)), record(make_scene(0, 0, recipe.frames_per_video, side))[0]
        with tempfile.TemporaryDirectory() as place:
            taken = turns(dict(ours=lambda: list(forge_pair(Path(place), recipe, (0, 1))), theirs=lambda: [encoded(filmed, form.crf or (23,)) for _ in range(videos)]), 2)
        frames = videos * recipe.frames_per_video
        yield row(f"forging {frames} frames of {side} px, {dataset}, one core", taken["ours"], taken["theirs"], beside="compressing as many",
                  note=f"{frames / statistics.median(taken['ours']):.1f} frames per second per core: rendered, forged, compressed, written with masks and landmarks")


def read_as_deepfakebench(catalog, size, augment=None):
    """A dataset as DeepfakeBench reads frames: OpenCV decodes and resizes, albumentations augments, torchvision makes a normalised tensor."""
    import cv2
    from torchvision import transforms

    root, paths, labels = Path(catalog.attrs["root"]), catalog["frame"].tolist(), catalog["label"].tolist()
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    class Plain(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            image = cv2.cvtColor(cv2.imread(str(root / paths[index])), cv2.COLOR_BGR2RGB)
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
            return to_tensor(augment(image=image)["image"] if augment else image), labels[index]

    return Plain()


def augmentation_of_deepfakebench():
    """Its list with its default probabilities and ranges; what it resizes in between it has resized before."""
    import albumentations as A

    colours = [A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1), A.FancyPCA(), A.HueSaturationValue()]
    return A.Compose([A.HorizontalFlip(p=0.5), A.Rotate(limit=(-10, 10), p=0.5), A.GaussianBlur(blur_limit=(3, 7), p=0.5), A.OneOf(colours, p=0.5),
                      A.ImageCompression(quality_range=(40, 100), p=0.5)])


def rows_of_loading(settings, device):
    """An epoch in one process and one thread, from files (in the system's cache, on both sides) to normalised float batches of 32; seconds of the core."""
    import albumentations as A
    import cv2

    from bcos_nb.data import FrameDataset, forge_dataset, load_frames, pack_frames, read_catalog
    from bcos_nb.data.augment import crop_and_flip
    from bcos_nb.training.loop import batches

    batch, threads, cv2_threads = 32, torch.get_num_threads(), cv2.getNumThreads()
    with tempfile.TemporaryDirectory() as place:
        root = forge_dataset(Path(place) / "frames", identities=6, frames_per_video=8, size=256, methods=("Deepfakes",), compressions=("c23",), progress=False)
        catalog = pd.concat([read_catalog(root, split=split) for split in ("train", "val", "test")], ignore_index=True)
        catalog.attrs["root"] = str(root)
        catalog = catalog.head(len(catalog) // batch * batch)
        order = list(torch.arange(len(catalog)).split(batch))
        file_kb = statistics.mean((root / frame).stat().st_size for frame in catalog["frame"]) / 1000

        def ours(source, then=None):
            for images, _ in batches(source, order, "cpu"):
                images = then(images) if then else images
                images.sub_(0.5).div_(0.5)

        def theirs(source):
            for _ in torch.utils.data.DataLoader(source, batch_sampler=[rows.tolist() for rows in order]):
                pass

        def with_theirs(image, mask):
            return torch.from_numpy(whole_list(image=image.permute(1, 2, 0).numpy())["image"]).permute(2, 0, 1), mask

        def row_of(work, one, other, note, **about):
            taken = dict(ours=[], theirs=[])
            for turn in range(2 * settings.repeats):
                for name, run in [("ours", one), ("theirs", other)][:: 1 if turn % 2 else -1]:
                    begin = time.process_time()  # of one core; the files are in memory, so there is nothing to wait for
                    run()
                    taken[name].append(time.process_time() - begin)
            taken = {name: values[1:] for name, values in taken.items()}  # without the first, the warm-up
            found = row(work, taken["ours"], taken["theirs"], beside="OpenCV and albumentations, one at a time", times=True, **about)
            return found | dict(note=f"{len(catalog) / found['ours_s']:.0f} / {len(catalog) / found['theirs_s']:.0f} images a second and core; {note}")

        torch.set_num_threads(1), cv2.setNumThreads(1)
        try:
            whole_list, sizes = augmentation_of_deepfakebench(), {size: FrameDataset(catalog, size) for size in (256, 224)}
            plain, small = read_as_deepfakebench(catalog, 256), read_as_deepfakebench(catalog, 224)
            cut = read_as_deepfakebench(catalog, 256, A.Compose([A.RandomCrop(224, 224), A.HorizontalFlip(p=0.5)]))
            agree("loading", next(iter(batches(sizes[256], order, "cpu")))[0] * 2 - 1, torch.stack([plain[row][0] for row in range(batch)]))
            packed = pack_frames(catalog, 256, folder=Path(place) / "packed", progress=False)
            agree("packed frames", packed.images, load_frames(catalog, 256).images, 0)
            png = f"PNG of {file_kb:.0f} kB, no augmentation on either side"
            cropped = "a random 224 px crop and a flip on both sides, ours by the batch"
            cropping = partial(crop_and_flip, size=224)
            yield row_of("frames of 256 px from PNG, a second", lambda: ours(sizes[256]), lambda: theirs(plain), png, at_least=1.5)
            yield row_of("frames of 256 px from PNG to 224 px, a second", lambda: ours(sizes[224]), lambda: theirs(small), png + "; ours antialiased, theirs not")
            yield row_of("frames of 256 px from PNG, cropped and flipped, a second", lambda: ours(sizes[256], cropping), lambda: theirs(cut), cropped)
            yield row_of("frames of 256 px from PNG, DeepfakeBench's augmentation, a second", lambda: ours(FrameDataset(catalog, 256, augment=with_theirs)),
                         lambda: theirs(read_as_deepfakebench(catalog, 256, whole_list)), "the same albumentations on both sides")
            yield row_of("frames of 256 px from packed frames, a second", lambda: ours(packed), lambda: theirs(plain), "no augmentation; theirs from PNG", at_least=8)
            yield row_of("frames of 256 px from packed frames, cropped and flipped, a second", lambda: ours(packed, cropping), lambda: theirs(cut), cropped + "; theirs from PNG")
        finally:
            torch.set_num_threads(threads), cv2.setNumThreads(cv2_threads)
        few, many = (resident_of_an_epoch(catalog, root, Path(place), times) for times in (1, 8))
        grown = 7 * len(catalog) * 3 * 256**2 / 2**20
        yield dict(work="memory of packing and reading 8 x as many frames, what it grows", beside="what the packed file grows", ours_mb=many - few, theirs_mb=grown, ratio=(many - few) / grown,
                   lowest=(many - few) / grown, highest=(many - few) / grown, ratio_is="ours / theirs", repeats=1, **goal((many - few) / grown, 0.10, None),
                   note=f"from {few:.0f} to {many:.0f} MB, mapped pages of the file not counted; the file grows by {grown:.0f} MB")


def resident_of_an_epoch(catalog, root, place, times):
    """Most memory of its own, MB, that a process has while it packs the frames so many times over and reads them; it does it twice, the first time to warm up."""
    catalog.to_parquet(place / "catalog.parquet")
    code = (
        "import re, sys; import pandas as pd, torch; from bcos_nb.data import pack_frames; torch.set_num_threads(1); most = 0\n"
        "table = pd.concat([pd.read_parquet(sys.argv[1])] * int(sys.argv[4]), ignore_index=True)\n"
        "for size in (255, 256):\n"
        "    packed = pack_frames(table, size, root=sys.argv[2], folder=sys.argv[3], progress=False)\n"
        "    for rows in torch.arange(len(packed)).split(32):\n"
        "        packed.images[rows].float().mean()\n"
        "        most = max(most, int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]))\n"
        "print(most / 1024)"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    done = subprocess.run([sys.executable, "-c", code, str(place / "catalog.parquet"), str(root), str(place / "memory"), str(times)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"The memory of reading could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


# ---- batch runs

def overhead_of_runs(runs):
    """Seconds that each of some runs of a grid took on one kernel, less what its cells took, the grid's start shared among them."""
    import nbformat

    from bcos_nb.batch import install_kernels, run_grid

    with tempfile.TemporaryDirectory() as folder:
        cells = ["run_dir = ''\nk = 0", "import time\ntime.sleep(0.2)", "from bcos_nb.batch.runs import finish_run\nfinish_run(run_dir, {'k': k})"]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(notebook, Path(folder, "trivial.ipynb"))
        begin = time.perf_counter()
        table = run_grid(Path(folder, "trivial.ipynb"), {"k": range(runs)}, Path(folder, "runs"), kernels=install_kernels(gpus=[])[:1], progress=False)
        taken = time.perf_counter() - begin
        if set(table["status"]) != {"done"}:
            raise AssertionError(f"the grid's runs failed: {table['error'].tolist()}")
        executed = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("runs/*/notebook.ipynb")]
        return (taken - sum(cell["metadata"]["papermill"]["duration"] or 0 for content in executed for cell in content["cells"])) / runs


def steps_in_a_kernel(environment, steps=20):
    """Seconds of processor that training steps take in a process with some variables set, and the most memory it had, MB."""
    code = (
        "import resource, time, torch; from bcos_nb.models import create_detector; torch.set_num_threads(1); torch.manual_seed(0)\n"
        "detector = create_detector('resnet34', b=2, width=0.25, stem='fine'); optimizer = torch.optim.Adam(detector.parameters(), lr=1e-3)\n"
        "images, labels = torch.rand(32, 3, 80, 80), torch.arange(32) % 2\n"
        f"for k in range({steps} + 3):\n"
        "    begin = time.process_time() if k == 3 else begin if k > 3 else 0\n"
        "    optimizer.zero_grad(); torch.nn.functional.cross_entropy(detector(images), labels).backward(); optimizer.step()\n"
        "print(time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=others | environment)
    return tuple(map(float, done.stdout.split()))


def rows_of_batch(settings, device):
    """What a grid costs beside its notebooks, and what its kernels' environment saves."""
    from bcos_nb.batch.kernels import MEMORY

    if sys.platform == "linux":
        kept, given = zip(*((steps_in_a_kernel(MEMORY), steps_in_a_kernel({})) for _ in range(settings.repeats)))
        largest = [max(memory for _, memory in side) for side in (kept, given)]
        yield row("20 training steps of a small B-cos ResNet-34 on one core, memory kept", [s for s, _ in kept], [s for s, _ in given], beside="memory given back", b=2,
                  note=f"as kernels on a processor keep it; seconds of processor; at most {largest[0]:.0f} / {largest[1]:.0f} MB")
    runs = 4 if settings.repeats < 5 else 10
    ours = [overhead_of_runs(runs) for _ in range(3)]
    yield row("a run of a grid, less its cells", ours, [3.0] * len(ours), beside="the 3 s that it may take", at_most=1.0,
              note=f"{runs} trivial notebooks one after the other; kernel start and end, papermill, locks, flushing to the disk")


def rows_of_explore(settings, device):
    """The exploring instruments in a browser, beside what is to be reached."""
    from explore_bench import REACH, explore_times

    try:
        for work, value in explore_times():
            yield row(work, [value], [REACH[work]], beside="reach", at_most=1.0, note="" if "MB" not in work else "megabytes, not seconds")
    except (Exception, SystemExit) as error:  # no browser, or one that does not start
        print(f"explore: not measured. {error}")


ROWS = dict(forward=rows_of_forward, steps=rows_of_steps, compiled=rows_of_compiled, memory=rows_of_memory, explanations=rows_of_explanations, lime=rows_of_lime,
            layers=rows_of_layers, games=rows_of_games, training=rows_of_training, catalog=rows_of_catalog, loading=rows_of_loading, forging=rows_of_forging, batch=rows_of_batch,
            explore=rows_of_explore)
COLUMNS = ("room work beside b precision ours_s theirs_s ratio lowest highest ratio_is target reached ours_mb theirs_mb repeats note "
           "arch side batch torch device cpu cores threads gpu python date disturbed").split()


# ---- the table

def shown(row):
    """A row of the table as a line of text, with its note below."""
    verdict = {True: "reached", False: "MISSED", "": ""}[row["reached"]]
    ratio = f"{row['ratio']:.2f}" + (" x" if row["ratio_is"] == "theirs / ours" else "  ")
    options = ", ".join(filter(None, [f"B={row['b']}" if row.get("b") else "", row.get("precision", "").replace("float32", "")]))
    clock = f"{row['ours_s']:8.4f} {row['theirs_s']:8.4f}" if "ours_s" in row else " " * 17
    line = f"{ratio:>9} {row['target']:>8} {verdict:7} {row['lowest']:5.2f} to {row['highest']:5.2f} {clock}  {row['work']}{', ' * bool(options)}{options}; beside: {row['beside']}"
    return line + (f"\n{'':55}  ({row['note']})" if row["note"] else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 at 128 px, fewer turns")
    parser.add_argument("--only", default="", help=f"rows of these rooms, separated by commas: {', '.join(ROWS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-write", action="store_true", help="do not write data/bench/<device>.csv")
    chosen = parser.parse_args()
    rooms = [room for room in chosen.only.split(",") if room] or list(ROWS)
    if set(rooms) - set(ROWS):
        parser.error(f"--only {chosen.only}: choose from {', '.join(ROWS)}")
    size = dict(arch="resnet18", side=128, batch=8, repeats=3, train_side=64, train_count=128) if chosen.quick else \
        dict(arch="resnet34", side=224, batch=8, repeats=5, train_side=96, train_count=1024)
    settings, device = argparse.Namespace(**size), torch.device(chosen.device)
    warnings.filterwarnings("ignore")
    about, begin, rows = machine(device), time.monotonic(), []
    where = about["gpu"] or f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads"
    print(f"{where}, torch {about['torch']}, {settings.arch}, {settings.side} px, batch {settings.batch}, MaxOut 1, {'quick' if chosen.quick else 'full'}")
    if about["disturbed"]:
        print(f"Something else is running here (load {os.getloadavg()[0]:.1f}): the seconds are too long and the ratios uncertain. Run it again on an idle machine.")
    print("\nRatio of ours / theirs, less is better; with x, theirs / ours: how many times as fast. Targets are for the full size.")
    print(f"{'ratio':>9} {'target':>8} {'':7} {'lowest to highest':>14} {'ours, s':>6} {'theirs, s':>8}", flush=True)
    for room in rooms:
        for found in ROWS[room](settings, device):
            rows.append(dict(room=room, arch=settings.arch, side=settings.side, batch=settings.batch) | found | about)
            print(shown(rows[-1]), flush=True)
    held = [r["reached"] for r in rows if r["target"]]
    print(f"\n{sum(held)} of {len(held)} targets reached; {time.monotonic() - begin:.0f} s")
    if chosen.no_write:
        return
    name = re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or f"{about['cpu']} {about['cores']} cores").lower()).strip("-")
    path = ROOT / "data" / "bench" / f"{name}{'-quick' if chosen.quick else ''}.csv"
    write(path, rows, rooms)
    print(f"written to {path.relative_to(ROOT)}")


def write(path, rows, rooms):
    """The table as CSV. Rows of rooms that were not measured this time stay as they were."""
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if r["room"] not in rooms] + rows
    rows = sorted(rows, key=lambda r: list(ROWS).index(r["room"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for r in rows:
            table.writerow({name: f"{value:.5g}" if isinstance(value := r.get(name, ""), float) else "" if value is None else value for name in COLUMNS})


if __name__ == "__main__":
    sys.exit(main())
