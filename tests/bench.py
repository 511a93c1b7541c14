"""How fast this is beside what one would use otherwise, as ratios measured in one run on this machine.

    python tests/bench.py                ResNet-34, 224 px, batch 8; under six minutes on 2 cores
    python tests/bench.py --quick        ResNet-18, 128 px
    python tests/bench.py --only games   the rows whose name contains a word
    python tests/bench.py --device cuda  where there is a GPU (then the default)

Ours and theirs take turns, with the same weights where they have any. A ratio is the median over the turns of theirs / ours:
above 1 we are faster. Seconds are medians too. A table from a machine that did something else besides is marked as disturbed: threads that wait for
each other make such seconds meaningless. The table is also written to data/bench/<machine>.json, unless --no-write.
"""
import argparse
import json
import os
import platform
import re
import statistics
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
from bcos_nb.games import localization_scores
from bcos_nb.layers import BcosConv2d
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


def measured(name, ours, theirs, repeats, *, share=1.0, shared_by="", warm_up=1):
    """A row: `repeats` turns of both, the one that begins alternating. `share`: what part of the work `theirs` does."""
    for _ in range(warm_up):
        ours(), theirs()
    turns = []
    for turn in range(repeats):
        if turn % 2:
            b, a = seconds(theirs), seconds(ours)
        else:
            a, b = seconds(ours), seconds(theirs)
        turns.append((a, b / share))
    ratios = sorted(b / a for a, b in turns)
    return dict(
        name=name, ratio=statistics.median(ratios), lowest=ratios[0], highest=ratios[-1], repeats=repeats,
        ours_s=statistics.median(a for a, _ in turns), theirs_s=statistics.median(b for _, b in turns), note=shared_by,
    )


def machine(device):
    """Name of the processor, its cores, the GPU if it is used, and the versions."""
    listed = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.M) if listed.exists() else None
    name = named[1].strip() if named else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return dict(cpu=name, cores=cores, threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__, python=platform.python_version(), load_before=load)


# ---- the same network twice

def twins(arch, b, device):
    """Our detector and the reference package's network with its weights, both with MaxOut 1 as the package has it."""
    torch.manual_seed(0)
    ours = create_detector(arch, b=b, max_out=1, zero_mean=0.0, logit_temperature=0.5)
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


def step_of(network, prepare, images, labels):
    """One training step as everybody writes it."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(network(prepare(images)), labels).backward()
        optimizer.step()

    return step


# ---- the rows

def rows_of_layers(settings, device):
    images = torch.rand(settings.batch, 64, settings.side // 4, settings.side // 4, generator=torch.Generator().manual_seed(0)).to(device)
    for b in (1.75, 2):
        ours, theirs = BcosConv2d(64, 64, 3, padding=1, b=b).to(device), bcos.modules.BcosConv2d(64, 64, 3, padding=1, b=b).to(device)
        theirs.linear.weight.data.copy_(ours.weight.data)
        agree("layer", ours(images).detach(), theirs(images).detach())
        with torch.no_grad():
            yield measured(f"layer 64 to 64, 3 x 3, forward, B={b}", lambda: ours(images), lambda: theirs(images), 2 * settings.repeats + 1)
        tracked = images.clone().requires_grad_()
        yield measured(f"layer 64 to 64, 3 x 3, forward and backward, B={b}", lambda: ours(tracked).sum().backward(),
                       lambda: theirs(tracked).sum().backward(), 2 * settings.repeats + 1)


def rows_of_networks(settings, device):
    images = pictures(settings.batch, settings.side, device)
    labels = torch.arange(settings.batch, device=device) % 2
    for b in (1.75, 2):
        ours, theirs = twins(settings.arch, b, device)
        with torch.no_grad():
            agree("network", ours(images), theirs(encoded(images)))
            yield measured(f"{settings.arch} forward, B={b}", lambda: ours(images), lambda: theirs(encoded(images)), settings.repeats)
        steps = step_of(ours.train(), lambda x: x, images, labels), step_of(theirs.train(), encoded, images, labels)
        yield measured(f"{settings.arch} training step, B={b}", *steps, settings.repeats)


def rows_of_explanations(settings, device):
    images, b = pictures(16, settings.side, device), 2
    ours, theirs = twins(settings.arch, b, device)
    singles = [encoded(image[None]) for image in images]

    def one_at_a_time(some):
        return [theirs.explain(single.detach().clone().requires_grad_(), idx=1)["explanation"] for single in some]

    batch = explain(ours, images, "bcos", 1)
    agree("explanation", batch.rgba[0], one_at_a_time(singles[:1])[0], 1e-2)
    yield measured(f"B-cos explanations of 16 images, {settings.arch}, B=2, as a batch / one at a time",
                   lambda: explain(ours, images, "bcos", 1), lambda: one_at_a_time(singles), settings.repeats)
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
    row = measured(f"four CAMs of {settings.batch} images, {settings.arch}, ordinary / grad-cam, batched", lambda: explain_many(network, images, CAMS), four_of_theirs, settings.repeats)
    yield row | dict(note=f"in forward passes: {row['ours_s'] / passes:.1f} / {row['theirs_s'] / passes:.1f}")


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
    row = measured(f"localization scores of {count} maps of {side} px, {len(thresholds)} thresholds / NumPy loop",
                   lambda: localization_scores(maps, regions, thresholds), loop, 3, share=share, warm_up=0)
    yield row | dict(note=f"ours gives both weightings, the loop one; the loop was timed on {some} maps and scaled to {count}")


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

        kind = "ordinary" if b is None else f"B={b}"
        row = measured(f"fit, one epoch of {count} frames of {side} px, resnet10, {kind} / bare loop", ours, bare, settings.repeats)
        yield row | dict(note=f"{count / row['ours_s']:.0f} frames a second; ours also validates, checks, and writes its state and the detector")


ROWS = dict(layers=rows_of_layers, networks=rows_of_networks, explanations=rows_of_explanations, games=rows_of_games, training=rows_of_training)


# ---- the table

def shown(row):
    spread = f"{row['lowest']:.2f} to {row['highest']:.2f}"
    return f"{row['ratio']:7.2f}  {spread:>16}  {row['ours_s']:9.4f}  {row['theirs_s']:9.4f}  {row['name']}" + (f"\n{'':49}({row['note']})" if row["note"] else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 at 128 px, fewer turns")
    parser.add_argument("--only", default="", help=f"rows of these rooms, separated by commas: {', '.join(ROWS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-write", action="store_true", help="do not write data/bench/<machine>.json")
    chosen = parser.parse_args()
    rooms = [room for room in chosen.only.split(",") if room] or list(ROWS)
    if set(rooms) - set(ROWS):
        parser.error(f"--only {chosen.only}: choose from {', '.join(ROWS)}")
    size = dict(arch="resnet18", side=128, batch=8, repeats=3, train_side=64, train_count=128) if chosen.quick else \
        dict(arch="resnet34", side=224, batch=8, repeats=5, train_side=96, train_count=256)
    settings, device = argparse.Namespace(**size), torch.device(chosen.device)
    warnings.filterwarnings("ignore")
    about, begin, rows = machine(device), time.monotonic(), []
    where = about["gpu"] or f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads"
    print(f"{where}, torch {about['torch']}, batch {settings.batch}, {'quick' if chosen.quick else 'full'}")
    about["disturbed"] = device.type == "cpu" and (about["load_before"] or 0) > 0.5
    if about["disturbed"]:
        print(f"Something else is running here (load {about['load_before']:.1f}): the seconds are too long and the ratios uncertain. Run it again on an idle machine.")
    print(f"\n{'ratio':>7}  {'lowest to highest':>16}  {'ours, s':>9}  {'theirs, s':>9}  theirs / ours, so above 1 ours is faster", flush=True)
    for room in rooms:
        for row in ROWS[room](settings, device):
            rows.append(dict(room=room, **row))
            print(shown(row), flush=True)
    about["seconds"] = round(time.monotonic() - begin)
    print(f"\n{about['seconds']} s")
    if not chosen.no_write:
        name = re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or f"{about['cpu']} {about['cores']} cores").lower()).strip("-")
        path = ROOT / "data" / "bench" / f"{name}{'-quick' if chosen.quick else ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(machine=about, settings=size, rows=rows), indent=1) + "\n", encoding="utf-8")
        print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
