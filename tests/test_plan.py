"""Plans of grids: the simulated schedule against closed forms, brute force and a real grid; work and disk against what they are made of."""
import itertools
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from bcos_nb.batch import plan_jobs, run_jobs
from bcos_nb.batch import plan as plans
from bcos_nb.batch.plan import (
    Pace, bench_pace, by_experiment, calibrate, count_frames, gantt, grid_work, long_clock, measured_pace, network_of, plan_grid, shortest, simulate, size, stated_pace, work_of, write_plan,
)
from bcos_nb.batch.presets import load_preset, preset_jobs
from bcos_nb.batch.runs import clock, write_json

grids = st.integers(1, 6).flatmap(lambda n: st.tuples(
    st.lists(st.integers(1, 6), min_size=n, max_size=n), st.lists(st.sampled_from(list(itertools.combinations(range(n), 2)) or [(0, 0)]), max_size=6, unique=True), st.integers(1, 3),
))


def as_grid(drawn):
    seconds, pairs, slots = drawn
    after = [[] for _ in seconds]
    for first, second in pairs:
        if first < second:
            after[second].append(first)
    return seconds, after, slots


def end_of(seconds, after, slots):
    return max((end for _, _, end in simulate(seconds, after, slots)), default=0)


def best_of_all(seconds, after, slots):
    """The optimum: every order that dependencies allow, each run as early as a slot is free for all of its time (which makes every active schedule)."""
    best = math.inf
    for order in itertools.permutations(range(len(seconds))):
        if any(order.index(other) > order.index(run) for run in order for other in after[run]):
            continue
        busy, ends = [0] * (sum(seconds) + 1), {}
        for run in order:
            start = max((ends[other] for other in after[run]), default=0)
            while any(busy[t] >= slots for t in range(start, start + seconds[run])):
                start += 1
            for t in range(start, start + seconds[run]):
                busy[t] += 1
            ends[run] = start + seconds[run]
        best = min(best, max(ends.values()))
    return best


# The schedule


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 50))
def test_equal_runs_that_need_nothing(n, slots, t):
    assert end_of([t] * n, [[]] * n, slots) == math.ceil(n / slots) * t


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 9))
def test_a_chain_takes_its_sum_on_any_number_of_slots(seconds, slots):
    assert end_of(seconds, [[]] + [[k] for k in range(len(seconds) - 1)], slots) == sum(seconds)


@settings(max_examples=80, deadline=None)
@given(grids)
def test_within_grahams_bound_of_the_optimum(drawn):
    seconds, after, slots = as_grid(drawn)
    best, ours = best_of_all(seconds, after, slots), end_of(seconds, after, slots)
    assert shortest(seconds, after, slots) - 1e-9 <= best <= ours <= (2 - 1 / slots) * best + 1e-9


@settings(max_examples=200, deadline=None)
@given(grids)
def test_a_schedule_is_one(drawn):
    """No slot does two at once, nothing starts before what it needs has ended, no slot idles while a run could start."""
    seconds, after, slots = as_grid(drawn)
    when = simulate(seconds, after, slots)
    for run, (slot, start, end) in enumerate(when):
        assert 0 <= slot < slots and end - start == seconds[run] and all(when[other][2] <= start for other in after[run])
        assert not any(slot == other[0] and start < other[2] and other[1] < end for k, other in enumerate(when) if k != run)
        ready = max((when[other][2] for other in after[run]), default=0)
        for t in range(int(ready), int(start)):
            assert sum(begin <= t < finish for _, begin, finish in when) == slots


def test_of_runs_that_may_start_the_first_does():
    assert [start for _, start, _ in simulate([4, 1, 1, 1], [[], [], [0], []], 2)] == [0, 0, 4, 1]


@pytest.mark.parametrize("after, slots, said", [([[1], [0]], 1, "wait for each other"), ([[], [7]], 2, "not in the grid"), ([[], []], 0, "at least 1")])
def test_what_cannot_be_scheduled_is_said(after, slots, said):
    with pytest.raises(ValueError, match=said):
        simulate([1, 1], after, slots)


class Sleeper(Executor):
    """Does runs by sleeping as long as their parameter says."""

    def __init__(self):
        self.began = {}

    def submit(self, fn, /, request):
        future, run = Future(), Path(request["run_dir"])
        future.set_running_or_notify_cancel()
        self.began[request["label"]] = time.monotonic()

        def sleep():
            time.sleep(request["params"]["seconds"])
            run.mkdir(parents=True, exist_ok=True)
            write_json(run / "metrics.json", {})
            future.set_result({"status": "done", "seconds": 0.0, "error": ""})

        threading.Thread(target=sleep).start()
        return future


def test_a_real_grid_starts_its_runs_when_the_plan_says(tmp_path):
    """The same order as run_jobs, which takes times apart by as much as a loaded machine may delay them."""
    import nbformat

    cell = nbformat.v4.new_code_cell("run_dir = ''\nseconds = 0.0\nnumber = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "sleep.ipynb")
    seconds, after = [2.0, 1.0, 1.0, 0.5, 1.5], [[], [], [], [1], [0]]
    jobs = []
    for number, length in enumerate(seconds):
        jobs += plan_jobs(tmp_path / "sleep.ipynb", [{"seconds": length, "number": number}], tmp_path / "runs", after=[jobs[other].run_dir for other in after[number]])
    sleeper = Sleeper()
    assert run_jobs(jobs, executor=sleeper, kernels=["a", "b"], progress=False).status.tolist() == ["done"] * 5
    first = min(sleeper.began.values())
    began = [sleeper.began[job.label] - first for job in jobs]
    said = [start for _, start, _ in simulate(seconds, after, 2)]
    assert sorted(range(5), key=began.__getitem__) == sorted(range(5), key=lambda run: (said[run], run))
    assert all(one > other - 0.1 for one, other in zip(began, said)), (began, said)


# Work


def test_operations_of_a_network_are_its_layers():
    """A convolution's by hand: outputs times the weights behind each, a multiplication and an addition."""
    import torch
    from torch import nn

    from bcos_nb.models import create_detector

    detector, total = create_detector("resnet34", b=None, width=0.25, image_size=64).eval(), []
    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, _, out: total.append(2 * out[0].numel() * module.weight[0].numel()))
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, _, out: total.append(2 * module.weight.numel()))
    with torch.no_grad():
        detector(torch.rand(1, 3, 64, 64))
    flops, parameters = network_of({"arch": "resnet34", "b": None, "width": 0.25}, 64)
    assert flops == sum(total) and parameters == sum(parameter.numel() for parameter in detector.parameters())


def test_a_training_is_its_epochs(tmp_path):
    """FaceForensics++'s 720 real and 2880 forged videos of 32 frames, three passes each, and 700 videos to validate with."""
    preset = load_preset("study")
    job = next(job for job in preset_jobs(preset, tmp_path, experiments=["train"]) if job.params["arch"] == "resnet34" and job.params["b"] == 2)
    work, (forward, parameters) = work_of(job), network_of(job.params)
    assert work.flops == 20 * (3600 * 32 * 3 + 700 * 32) * forward and work.frames == 4300 * 32 and not work.counted
    assert work.disk["checkpoints"] == work.disk["training states"] == 4 * parameters
    assert work.passing == (2 * 5 - 1) * 4 * parameters, "amsgrad keeps a third moment; of two states, one network stays"


def test_pairs_are_two_frames_for_each_fake(tmp_path):
    pairs, all_frames = [work_of(job) for balance in ("pairs", "none") for job in plan_jobs(plans_notebook("train"), [{
        "data": str(tmp_path), "image_size": 64, "b": None, "training": {"epochs": 1, "balance": balance}}], tmp_path / balance)]
    forward = network_of({"arch": "resnet10", "b": None, "width": 0.5}, 64)[0]
    assert pairs.flops - all_frames.flops == pytest.approx(3 * forward * 32 * (2 * 2880 - 3600))


def plans_notebook(experiment):
    from bcos_nb.batch.presets import notebook_of

    return notebook_of(experiment)


def test_frames_are_counted_where_the_dataset_is(tmp_path):
    from bcos_nb.data import forge_dataset, read_catalog

    forge_dataset(tmp_path, identities=10, frames_per_video=2, size=48, methods=["Deepfakes"], compressions=["c23"], seed=0)
    label = read_catalog(tmp_path, "FaceForensics++", "train", "c23", frames_per_video=2)["label"]
    assert count_frames(str(tmp_path), "FaceForensics++", "train", "c23", 2) == ((label == 0).sum(), (label == 1).sum(), True)
    assert count_frames(str(tmp_path / "none"), "FaceForensics++", "test", "c23", 32) == (140 * 32, 560 * 32, False)
    with pytest.raises(ValueError, match="neither in .* nor among those whose size is known"):
        count_frames(str(tmp_path), "Made up", "test", None, 1)


def test_a_notebook_of_ones_own_cannot_be_planned(tmp_path):
    import nbformat

    cell = nbformat.v4.new_code_cell("run_dir = ''", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "mine.ipynb")
    with pytest.raises(ValueError, match="none of the experiments"):
        grid_work(plan_jobs(tmp_path / "mine.ipynb", [{}], tmp_path))


# Pace and plan


def test_a_stated_pace_scales_times_and_nothing_else(tmp_path):
    jobs = preset_jobs(load_preset("study"), tmp_path, experiments=["train", "mask_game"])
    one, two = (plan_grid(jobs, Pace({(None, None, None): rate * 1e12}, "", decoding=math.inf, start=0.0), 8) for rate in (5, 10))
    assert one.slot_hours == pytest.approx(2 * two.slot_hours) and one.seconds == pytest.approx(2 * two.seconds)
    assert one.table["bytes"].tolist() == two.table["bytes"].tolist()
    assert one.slot_hours == pytest.approx(one.table["flops"].sum() / 5e12 / 3600)
    assert "Assumed, not measured" in stated_pace(5).said
    with pytest.raises(ValueError, match="above 0"):
        stated_pace(0)


def test_evaluations_start_when_their_training_has_ended(tmp_path):
    jobs = preset_jobs(load_preset("study"), tmp_path)
    table = plan_grid(jobs, stated_pace(10), 8).table.set_index("run")
    for job in jobs:
        for folder in job.after:
            training = next(other.label for other in jobs if other.run_dir == folder)
            assert table.loc[training, "end"] <= table.loc[job.label, "start"]


def test_complete_runs_give_the_pace_and_take_no_time(tmp_path, monkeypatch):
    """Two of three trainings are complete; the third, of the same network, is as long as they were."""
    jobs = preset_jobs(load_preset("study") | {"detectors": [{"arch": "resnet34", "b": [1.25, 2, 2.5]}]}, tmp_path, experiments=["train"])
    with pytest.raises(ValueError, match="None of these runs is complete"):
        measured_pace(jobs)
    for job in jobs[:2]:
        job.run_dir.mkdir(parents=True)
        write_json(job.run_dir / "metrics.json", {})
    monkeypatch.setattr(plans, "seconds_of", lambda folder: 5000.0)
    plan = plan_grid(jobs, measured_pace(jobs), 2)
    assert plan.complete == 2 and plan.table["run"].tolist() == [jobs[2].label] and plan.seconds == pytest.approx(5000)
    assert "2 complete runs" in plan.notes()[0] and "2 more are complete already" in str(plan)


def test_what_is_not_measured_is_said(tmp_path):
    jobs = preset_jobs(load_preset("study"), tmp_path, experiments=["train"])
    pace = Pace(plans.with_means({("train", "resnet34", True): [1e12], ("train", "xception", False): [4e12]}), "two")
    plan = plan_grid(jobs, pace, 1)
    assert any("Not measured themselves" in note and "train of B-cos vitc_ti" in note for note in plan.notes())
    assert plan.pace.rates[("train", None, None)] == pytest.approx(2.5e12)


def test_states_of_trainings_take_room_while_they_run(tmp_path):
    """One at a time, the largest; all at once, their sum; none, nothing."""
    jobs, pace = preset_jobs(load_preset("demo"), tmp_path, experiments=["train"]), stated_pace(10)
    each = [work.passing for work in grid_work(jobs)]
    assert plan_grid(jobs, pace, 1).passing == max(each) and plan_grid(jobs, pace, len(jobs)).passing == sum(each)
    assert "while trainings run" in str(plan_grid(jobs, pace, 2))
    for job in jobs:
        job.run_dir.mkdir(parents=True)
        write_json(job.run_dir / "metrics.json", {})
    played = plan_grid(preset_jobs(load_preset("demo"), tmp_path), pace, 2)
    assert played.complete == len(jobs) < len(played.table) and played.passing == 0 and "while trainings run" not in str(played)


def test_data_bench_is_the_last_resort():
    pace = bench_pace()
    assert "data/bench" in pace.said and all(1e9 < rate < 1e13 for rate in pace.rates.values())


def test_a_calibration_times_the_networks_of_the_grid(tmp_path):
    preset = load_preset("demo") | {"data": {"root": str(tmp_path), "dataset": "FaceForensics++", "image_size": 32, "frames_per_video": 2}}
    preset["detectors"] = {"arch": "resnet10", "b": [None, 2], "options": {"width": 0.125}}
    jobs, said = preset_jobs(preset, tmp_path / "runs"), []
    pace = calibrate(jobs, seconds=0.1, batch=2, tell=said.append)
    assert len(said) == 2 and "Calibrated on this machine" in pace.said and "assumed" in pace.said
    assert {("train", "resnet10", True), ("train", "resnet10", False), ("detect", "resnet10", True), ("mask_game", "resnet10", False)} <= set(pace.rates)
    assert not plan_grid(jobs, pace, 2).pace.guessed


def test_the_page_can_be_read_offline(tmp_path):
    jobs = preset_jobs(load_preset("study"), tmp_path)
    plan = plan_grid(jobs, stated_pace(10), 8)
    page = write_plan(plan, tmp_path / "plan.html", "The study").read_text(encoding="utf-8")
    assert "src=\"http" not in page and "Assumed, not measured" in page and all(job.label in page for job in jobs) and len(page) < 8e6
    figure = gantt(plan)
    bars = [(y - 1, base * 3600, (base + x) * 3600) for trace in figure.data for y, base, x in zip(trace.y, trace.base, trace.x)]
    planned = list(zip(plan.table.slot, plan.table.start, plan.table.end))
    rounded = lambda rows: sorted((int(slot), round(start, 3), round(end, 3)) for slot, start, end in rows)
    assert rounded(bars) == rounded(planned)
    table = by_experiment(plan)
    assert table.loc["all", "runs"] == len(jobs) and table.loc["all", "GPU-hours"] == pytest.approx(plan.slot_hours)


@pytest.mark.parametrize("seconds, said", [(9, "9 s"), (600, "10:00"), (3600 * 7.5, "7.5 hours"), (86400 * 3.25, "3.2 days")])
def test_long_times_as_a_person_says_them(seconds, said):
    assert long_clock(seconds) == said


@pytest.mark.parametrize("seconds, said", [(0.4, "0 s"), (187, "3:07"), (3787, "1:03:07"), (48 * 3600 - 1, "47:59:59"), (48 * 3600, "2.0 days"), (9775 * 3600, "407.3 days")])
def test_clocks_do_not_count_hours_by_the_thousand(seconds, said):
    assert clock(seconds) == said


@pytest.mark.parametrize("count, said", [(2e3, "2 kB"), (3.1e6, "3.1 MB"), (116e9, "116 GB"), (2.5e12, "2.5 TB")])
def test_bytes_as_a_person_says_them(count, said):
    assert size(count) == said


# From the shell


def test_the_command_says_hours_what_they_rest_on_and_draws_them(tmp_path):
    from typer.testing import CliRunner

    from bcos_nb.cli import app

    done = CliRunner().invoke(app, ["plan", "study", "--gpus", "8", "--tflops", "10", "--only", "detect", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "plan.html")])
    assert done.exit_code == 0, done.output
    jobs = [job for job in preset_jobs(load_preset("study"), tmp_path / "runs") if job.notebook.stem in ("train", "detect")]
    said = " ".join(done.output.split())
    needed = {folder for job in jobs for folder in job.after}
    assert f"{sum(job.notebook.stem == 'detect' or job.run_dir in needed for job in jobs)} runs on 8 GPUs" in said and "Assumed, not measured" in said
    assert (tmp_path / "plan.html").stat().st_size > 1e6 and not (tmp_path / "runs").exists()
    wrong = CliRunner().invoke(app, ["plan", "study", "--tflops", "10", "--calibrate"])
    assert wrong.exit_code == 1 and "Give one of them" in " ".join(wrong.output.split())


def test_runs_are_predicted_from_each_other(tmp_path, monkeypatch):
    """Three trainings of one network that took 900, 1000 and 1100 s: each is predicted as what the others took."""
    jobs = preset_jobs(load_preset("study") | {"detectors": [{"arch": "resnet34", "b": [1.25, 2, 2.5]}]}, tmp_path, experiments=["train"])
    taken = {}
    for job, seconds in zip(jobs, (900.0, 1000.0, 1100.0)):
        job.run_dir.mkdir(parents=True)
        write_json(job.run_dir / "metrics.json", {})
        taken[job.run_dir] = seconds
    monkeypatch.setattr(plans, "seconds_of", taken.get)
    table = plans.hindsight(jobs)
    assert table["seconds"].tolist() == [900, 1000, 1100]
    assert table["predicted"].tolist() == pytest.approx([1050, 1000, 950], rel=0.02)


def test_a_dataset_that_a_grid_would_make_is_not_taken_for_the_real_one(tmp_path, monkeypatch):
    """The miniature has the name of FaceForensics++, and not its size."""
    from typer.testing import CliRunner

    from bcos_nb.cli import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan", "demo", "--tflops", "1"])
    assert done.exit_code == 1 and "forge data/miniature --dataset FaceForensics++ --identities 100" in " ".join(done.output.split())
    assert count_frames("data/miniature", "FaceForensics++", "train", "c23", 8) == (72 * 8, 72 * 8 * 4, True), "100 identities: 72, 14 and 14 real videos, of which four methods make fakes"
    assert count_frames("data/miniature", "FaceForensics++", "test", "c40", 4) == (14 * 4, 14 * 4 * 4, True)
    assert count_frames("data/other", "FaceForensics++", "test", "c40", 4) == (140 * 4, 560 * 4, False)


# A network that was never timed


def test_a_network_of_thin_layers_weighs_more_than_its_operations():
    """On a processor ConvNeXt and DenseNet take several times what ResNets of as many operations take."""
    of = {arch: network_weight(arch, options) for arch, options in (("resnet34", {"stem": "fine", "max_out": 1}), ("convnext_tiny", {"stem": "fine"}), ("densenet121", {"stem": "fine"}))}
    assert of["convnext_tiny"] > 1.5 * of["resnet34"] and of["densenet121"] > 1.5 * of["resnet34"] and of["resnet34"] > 1


def network_weight(arch, options):
    flops, _, weight = plans.counted_network({"arch": arch, "b": 2, "width": 0.125 if arch == "convnext_tiny" else 0.25, "arch_options": options}, 80)
    return weight / flops


def test_networks_that_were_counted_before_are_counted_right():
    """Of data/bench/networks.csv, three rows anew."""
    rows = plans.counted_before()
    small = sorted(rows, key=lambda key: rows[key][0])[:3]
    assert len(rows) > 40 and {"resnet34", "xception", "vitc_ti", "vgg16", "densenet121", "inception_v3", "convnext_tiny"} <= {arch for arch, *_ in rows}
    for key in small:
        assert plans.count_anew(*key) == pytest.approx(rows[key])


def test_networks_of_the_presets_were_all_counted_before():
    """A preset that has changed without its networks' numbers makes every dry run import torch and count for seconds."""
    assert not plans.known_networks() - set(plans.counted_before())


def test_a_dry_run_of_mini_does_without_torch(tmp_path):
    """It reads YAML and JSON, and adds; PyTorch alone takes longer to import than the rest together."""
    code = "import sys; from bcos_nb.cli import app; app(['run', 'mini', '--dry-run'], standalone_mode=False); sys.exit(sum(name in sys.modules for name in ('torch', 'torchvision', 'sklearn')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Nothing was started" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


def test_a_rate_follows_from_what_a_network_does_elsewhere():
    """Xception trains at half of ResNet-34's rate, so it is taken to explain at half of it, too."""
    rates = {("train", "resnet34", True): 8e9, ("train", "xception", True): 4e9, ("mask_game", "resnet34", True): 2e9, ("mask_game", "resnet34", False): 6e9}
    pace = Pace(plans.with_means({key: [rate] for key, rate in rates.items()}), "")
    assert pace.rate("mask_game", "xception", True) == 1e9 and pace.rate("train", "xception", True) == 4e9
    assert ("mask_game", "xception", True) in pace.guessed and ("train", "xception", True) not in pace.guessed
    assert pace.rate("detect", "resnet34", True) == 5e9, "nobody was tested, so what is known of it is averaged"


def test_backbones_are_predicted_within_a_factor_of_three_without_a_run_of_theirs():
    """Each backbone's runs in data/bench from those of the others alone, all but one in thirty; half of them within a third; operations alone are further off."""
    done = plans.bench_runs()
    assert {"densenet121", "convnext_tiny", "vgg16"} <= {work.arch for work, _ in done}

    def ratios(weigh):
        works = [(work if weigh else replace(work, weight=1.0), seconds) for work, seconds in done]
        for arch in {work.arch for work, _ in works}:
            pace = Pace(plans.rates_of([one for one in works if one[0].arch != arch]), "", weighed=True)
            yield from (pace.seconds(work) / seconds for work, seconds in works if work.arch == arch)

    weighed, plain = (np.exp(np.abs(np.log(list(ratios(weigh))))) for weigh in (True, False))
    assert np.median(weighed) < 1.3 and np.mean(weighed < 3) > 0.97 and np.median(weighed) < np.median(plain)


@pytest.mark.parametrize("grid", ["mini", "study"])
def test_every_run_of_a_grid_has_an_estimate(grid, tmp_path, monkeypatch):
    """Searches, guided trainings, FFHQ and all: on a machine that has neither runs nor data. All of mini has been run."""
    from bcos_nb.batch.status import estimates, grid_states, known_runs, outlook

    monkeypatch.chdir(tmp_path)
    jobs = preset_jobs(load_preset(grid), tmp_path / "runs")
    found = estimates(jobs, known_runs(tmp_path / "runs"), jobs)
    assert all(seconds and seconds > 10 for seconds, _ in found) and {source for _, source in found} <= {"data/bench", "counted"}
    left = outlook(jobs, grid_states(jobs), known_runs(tmp_path / "runs"), 2)
    assert left.sources[""] == 0 and (left.sources["counted"] > 0) == (grid == "study") == ("by counting operations" in str(left)) and left.seconds >= sum(seconds for seconds, _ in found) / 2 - 1
    if grid == "mini":
        of = {job.label: seconds for job, (seconds, _) in zip(jobs, found)}
        games = lambda arch: next(seconds for label, seconds in of.items() if label.startswith(f"mask_game/{arch}-b2-"))
        assert games("densenet121") > 1.5 * games("resnet34") and games("convnext_tiny") > 1.5 * games("resnet34")
        guided, free = ([seconds for job, (seconds, _) in zip(jobs, found) if job.notebook.stem == "train" and job.params["arch"] == "resnet10" and bool(job.params["training"].get("guidance")) == one]
                        for one in (True, False))
        assert len(guided) == 2 and min(guided) > 1.5 * max(free)
