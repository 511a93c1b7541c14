"""Hyperparameter search: the study's space, Hyperband, and that no trial is lost or trained twice, whoever is killed on the way."""
import math
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from glob import glob
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import sqlalchemy
import torch
from optuna.trial import TrialState
from scipy.stats import kstest

from bcos_nb.batch.presets import detector_rows, load_preset
from bcos_nb.data import forge_dataset
from bcos_nb.models import create_detector
from bcos_nb.training import fit, make_config
from bcos_nb.training.search import (
    SearchConfig, TrialTraining, best_preset, by_combination, draw_combination, importance_table, load_search, open_search, run_search, search_space,
    search_table, storage_url, trial_settings, write_best,
)

TINY = SearchConfig("resnet10", 1.25, trials=9, epochs=6, width=0.125, image_size=32)

# as printed in the appendix of the study, with the two names that it abbreviates differently written out
PRINTED = {"lr": (2.5e-5, 2.5e-3), "weight_decay": (1e-7, 1e-3), "beta1": (0.85, 0.95), "beta2": (0.8, 0.999), "eps": (1e-8, 1e-5)}
PRINTED_NORMS = """AllNormUncentered2d BatchNormUncentered2d GroupNormUncentered2d GInstanceNormUncentered2d GNLayerNormUncentered2d
    PositionNormUncentered2d AllNorm2d BatchNorm2d DetachableGroupNorm2d DetachableGInstanceNorm2d DetachableGNLayerNorm2d DetachableLayerNorm
    DetachablePositionNorm2d""".replace("GInstance", "GNInstance").split()


def by_rate(config, values, folder, report):
    """Stands for a training: the AUC follows from the learning rate alone and rises with the epochs."""
    height = (math.log10(values["lr"]) - math.log10(2.5e-5)) / 2
    for epoch in range(1, config.epochs + 1):
        report(epoch, 0.5 + 0.4 * height * (1 - 0.5**epoch))
    return 0.5 + 0.4 * height


def quiet(config, folder, train=by_rate, **options):
    return run_search(config, folder, train=train, progress=False, **options)


def states(study):
    return Counter(trial.state for trial in study.get_trials())


@pytest.mark.parametrize("arch, b, own", [
    ("resnet34", None, set()), ("resnet34", 1.25, {"norm", "norm_bias"}), ("vitc_ti", None, set()), ("vitc_ti", 2, {"norm_bias", "norm_2d", "norm_2d_bias"}),
    ("xception", 2.5, {"norm_bias"}),
])
def test_the_space_is_the_studys(arch, b, own):
    space = search_space(arch, b)
    assert set(space) == {*PRINTED, "amsgrad", "augmentation"} | own
    for name, (low, high) in PRINTED.items():
        assert (space[name].low, space[name].high) == (low, high) and space[name].log == (high / low > 50)
    for name in ({"amsgrad", "augmentation", "norm_bias", "norm_2d_bias"} & set(space)):
        assert set(space[name].choices) == {True, False}
    if "norm" in own:
        assert sorted(space["norm"].choices) == sorted(PRINTED_NORMS) and len(PRINTED_NORMS) == 13
    if "norm_2d" in own:
        assert set(space["norm_2d"].choices) == {"BatchNorm2d", "BatchNormUncentered2d"}


@pytest.mark.parametrize("arch, b", [("resnet10", 1.25), ("vitc_ti", 2), ("resnet10", None)])
@pytest.mark.parametrize("form", ["study", "ours"])
def test_every_choice_makes_a_detector(arch, b, form):
    config = SearchConfig(arch, b, form=form, width=0.125 if arch == "resnet10" else 1 / 3, image_size=64, arch_options=dict(depth=1) if arch == "vitc_ti" else {})
    first = draw_combination(config.space, 0, 0)
    for name, given in config.space.items():
        for choice in getattr(given, "choices", []):
            options, training = trial_settings(config, first | {name: choice})
            create_detector(arch, b=b, width=config.width, image_size=64, **options)
    assert trial_settings(config, first | {"augmentation": True})[1].augment == "study"
    plain = trial_settings(config, first | {"augmentation": False})[1]
    assert plain.augment != "study" and plain.lr == first["lr"] and plain.betas == (first["beta1"], first["beta2"]) and plain.eps == first["eps"]
    assert (plain.schedule, plain.balance, plain.clip_norm) == (("none", "none", None) if form == "study" else ("warmup_cosine", "pairs", 1.0))
    assert plain.b_start == (1.25 if form == "ours" and b is not None else None)


def test_draws_are_uniform_on_their_scale_and_repeat_themselves():
    space = search_space("resnet34", 2)
    drawn = pd.DataFrame([draw_combination(space, 3, number) for number in range(300)])
    for name, (low, high) in PRINTED.items():
        at = (np.log(drawn[name] / low) / np.log(high / low)) if high / low > 50 else (drawn[name] - low) / (high - low)
        assert at.between(0, 1).all() and kstest(at, "uniform").pvalue > 1e-3
    assert drawn["norm"].value_counts().between(8, 42).all()  # 23 ± 4 of each
    assert draw_combination(space, 3, 299) == drawn.loc[299].to_dict() != draw_combination(space, 4, 299)


def test_hyperband_ends_the_worse_at_epoch_two_and_nothing_at_the_last(tmp_path):
    study = quiet(replace(TINY, trials=24, epochs=9), tmp_path)
    table = search_table(study)
    assert isinstance(study.pruner, optuna.pruners.HyperbandPruner) and isinstance(study.sampler, optuna.samplers.RandomSampler)
    assert set(table.loc[table["state"] == "pruned", "epochs"]) <= {2, 6} and (table.loc[table["state"] == "complete", "epochs"] == 9).all()
    pruned, complete = table[table["state"] == "pruned"], table[table["state"] == "complete"]
    assert len(pruned) > 5 and len(pruned) + len(complete) == 24
    assert table.loc[table["lr"].idxmax(), "state"] == "complete" and pruned["lr"].median() < complete["lr"].median()


def test_a_search_goes_on_where_it_was_and_says_when_it_is_finished(tmp_path, capsys):
    calls = []

    def until_the_fifth(config, values, folder, report):
        calls.append(folder.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return by_rate(config, values, folder, report)

    with pytest.raises(KeyboardInterrupt):
        quiet(TINY, tmp_path, until_the_fifth)
    study = load_search(tmp_path / "search.db")
    assert states(study)[TrialState.RUNNING] == 0 and search_table(study).loc[4, "reason"] == "stopped by KeyboardInterrupt"
    study = quiet(TINY, tmp_path, until_the_fifth)
    assert calls == ["0000", "0001", "0002", "0003", "0004", "0004", *(f"{k:04d}" for k in range(5, 9))]
    assert len(search_table(study)) == 9 and states(study)[TrialState.FAIL] == 1 and not states(study)[TrialState.WAITING]
    run_search(TINY, tmp_path, train=until_the_fifth)
    assert "finished" in capsys.readouterr().out and len(calls) == 10
    assert len(search_table(quiet(replace(TINY, trials=11), tmp_path, until_the_fifth))) == 11 == len(set(calls))


def test_a_search_is_not_mixed_with_another(tmp_path):
    quiet(replace(TINY, trials=1), tmp_path)
    with pytest.raises(ValueError, match="batch_size 32 → 16"):
        open_search(replace(TINY, batch_size=16), tmp_path / "search.db")
    for wrong in ("sqlite://", "mysql://root@localhost/x"):
        with pytest.raises(ValueError, match="cannot be shared"):
            storage_url(wrong)
    with pytest.raises(FileNotFoundError, match="Begin one"):
        load_search(tmp_path / "none.db")
    with pytest.raises(ValueError, match=TINY.name):
        load_search(tmp_path / "search.db", "another")
    assert "secret" not in storage_url("postgresql://me:secret@host/base").render_as_string()


def test_a_diverging_trial_is_recorded_and_not_the_end(tmp_path):
    def diverging(config, values, folder, report):
        report(1, 0.55)
        if values["amsgrad"]:
            raise RuntimeError("The loss is no longer a number (batch 3).")
        return 0.6

    table = search_table(quiet(TINY, tmp_path, diverging))
    assert table["amsgrad"].any() and (table["state"] == np.where(table["amsgrad"], "failed", "complete")).all()
    assert (table.loc[table["amsgrad"], "reason"] == "The loss is no longer a number (batch 3).").all() and (table["attempts"] == 1).all()
    assert (table["auc"] == np.where(table["amsgrad"], 0.55, 0.6)).all()


def test_an_error_that_is_not_the_combinations_fault_ends_the_worker(tmp_path):
    def full(config, values, folder, report):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        quiet(TINY, tmp_path, full)
    assert (search_table(quiet(TINY, tmp_path))["state"] != "failed").all()


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch does not tell a GPU's failure from other errors")
def test_a_gpu_that_fails_ends_the_worker_and_not_the_combinations(tmp_path):
    def assertion(config, values, folder, report):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        quiet(TINY, tmp_path, assertion)
    table = search_table(quiet(TINY, tmp_path))
    assert (table["state"] != "failed").all() and table["attempts"].tolist() == [2] + [1] * (len(table) - 1)


def test_importance_finds_the_parameter_that_decides(tmp_path):
    study = quiet(replace(TINY, trials=30, epochs=2), tmp_path)
    table = importance_table(study)
    assert table.index[0] == "lr" and table["importance"].iloc[0] > 0.8 and table.equals(importance_table(study))
    with pytest.raises(ValueError, match="at least 4"):
        importance_table(quiet(replace(TINY, trials=2), tmp_path / "few"))


def test_the_best_trial_is_a_preset(tmp_path):
    study = quiet(TINY, tmp_path)
    table = search_table(study)
    best = table.loc[table["auc"].where(table["state"] == "complete").idxmax()]
    preset = load_preset(write_best(study, tmp_path / "mine.yaml"))
    row, = detector_rows(preset)
    assert (row["arch"], row["b"], row["width"]) == ("resnet10", 1.25, 0.125)
    assert row["arch_options"] == {"variant": "study", "norm": best["norm"], "norm_bias": best["norm_bias"]}
    assert preset["training"]["lr"] == best["lr"] == table["lr"][table["state"] == "complete"].max()
    assert preset["name"] == f"{study.study_name}-best"
    assert best_preset(study, 0)["training"]["lr"] == table["lr"][0]
    with pytest.raises(ValueError, match="no complete trial"):
        write_best(open_search(TINY, tmp_path / "empty.db"), tmp_path / "none.yaml")


WORKER = """
import os, sys, time
from pathlib import Path
from bcos_nb.training.search import SearchConfig, run_search


def train(config, values, folder, report):
    folder.mkdir(parents=True, exist_ok=True)
    done = len(list(folder.glob("epoch-*")))  # of a worker that was killed, as the state that `fit` keeps
    with open(folder / "ran", "a") as log:
        print("begin", os.getpid(), file=log)
    for epoch in range(done + 1, config.epochs + 1):
        time.sleep(SECONDS)
        (folder / f"epoch-{epoch}").touch()
        report(epoch, 0.5 + 0.01 * epoch)
    with open(folder / "ran", "a") as log:
        print("end", os.getpid(), file=log)
    return 0.6


out, storage, trials = sys.argv[1:]
config = SearchConfig("resnet10", 1.25, trials=int(trials), epochs=4, width=0.125, image_size=32)
run_search(config, out, storage, train=train, heartbeat=1, grace=GRACE, progress=False)
"""


def start(count, folder, storage, trials, *, seconds, grace):
    """Worker processes on one search."""
    program = WORKER.replace("SECONDS", str(seconds)).replace("GRACE", str(grace))
    return [subprocess.Popen([sys.executable, "-c", program, folder, storage, str(trials)], stderr=subprocess.PIPE, text=True) for _ in range(count)]


def kill_one_at_work(workers, folder):
    """SIGKILLs the first worker that has reported an epoch of a trial it has not finished; gives that combination."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for log in sorted(Path(folder).glob("trials/*/*/ran")):
            lines = log.read_text().split("\n")
            if lines[-2].startswith("begin") and (log.parent / "epoch-2").exists():
                pid = int(lines[-2].split()[1])
                victim = next(worker for worker in workers if worker.pid == pid)
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                if "end" not in log.read_text():
                    return int(log.parent.name), victim
        time.sleep(0.02)
    raise AssertionError("no worker began: " + " ".join(worker.stderr.read() for worker in workers if worker.poll() is not None))


def all_done_once(study, folder, trials, killed, workers, victim):
    """Every combination has an end, none has two, and only the killed one has a second trial, which went on with its epochs."""
    for worker in workers:
        if worker is not victim:
            assert worker.wait(timeout=240) == 0, worker.stderr.read()
    attempts = by_combination(study)
    assert sorted(attempts) == list(range(trials)) and len(study.get_trials()) == trials + 1
    assert states(study)[TrialState.FAIL] == 1 and states(study)[TrialState.COMPLETE] + states(study)[TrialState.PRUNED] == trials
    assert [trial.state == TrialState.FAIL for trial in attempts[killed]] == [True, False]
    begun = Counter()
    for number in range(trials):
        log = Path(folder, "trials", study.study_name, f"{number:04d}", "ran").read_text().split("\n")
        begun[number] = sum(line.startswith("begin") for line in log)
        assert begun[number] == 1 + (number == killed)
    table = search_table(study)
    assert (table["attempts"] == 1 + (table["combination"] == killed)).all() and table["state"].isin(["complete", "pruned"]).all()
    first, second = attempts[killed]
    assert first.params == second.params and first.intermediate_values.items() <= second.intermediate_values.items()


def test_two_workers_share_a_file_and_one_is_killed(tmp_path):
    workers = start(2, tmp_path, tmp_path / "search.db", 6, seconds=0.15, grace=8)
    try:
        killed, victim = kill_one_at_work(workers, tmp_path)
        study = load_search(tmp_path / "search.db")
        all_done_once(study, tmp_path, 6, killed, workers, victim)
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture
def postgres():
    """URL of a PostgreSQL server of its own, on a free port, in a temporary folder; as another user where tests run as root."""
    found = shutil.which("initdb") or next(iter(sorted(glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)), None)
    if not found:
        pytest.skip("PostgreSQL is not installed (no initdb on the PATH or in /usr/lib/postgresql). On Debian: apt install postgresql")
    pytest.importorskip("psycopg")
    user = {}
    folder = Path(tempfile.mkdtemp(prefix="bcos_nb-postgres-"))
    if os.geteuid() == 0:  # which PostgreSQL refuses
        entry = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
        user = dict(user=entry.pw_uid, group=entry.pw_gid, extra_groups=[])
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base, quiet_output = folder / "base", dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/", text=True)
    made = subprocess.run([found, "-D", base, "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"], **quiet_output, **user)
    assert made.returncode == 0, made.stderr
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([Path(found).with_name("postgres"), "-D", base, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"],
                                  stdout=log, stderr=log, cwd="/", **user)
    try:
        url = f"postgresql://tester@127.0.0.1:{port}/postgres"
        deadline = time.monotonic() + 60
        while True:
            try:
                sqlalchemy.create_engine(storage_url(url)).connect().close()
                break
            except sqlalchemy.exc.OperationalError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_four_workers_share_postgresql_and_one_is_killed(postgres, tmp_path):
    workers = start(4, tmp_path, postgres, 16, seconds=0.1, grace=12)
    try:
        killed, victim = kill_one_at_work(workers, tmp_path)
        study = load_search(postgres)
        all_done_once(study, tmp_path, 16, killed, workers, victim)
        assert len({line.split()[1] for log in tmp_path.glob("trials/*/*/ran") for line in log.read_text().splitlines()}) >= 3, "the workers did not share the work"
    finally:
        for worker in workers:
            worker.kill()


def test_a_real_search_and_its_best_preset_trains_to_the_same_auc(tmp_path):
    forge_dataset(tmp_path / "data", identities=8, frames_per_video=2, size=48, compressions=["c23"], seed=0)
    config = SearchConfig("resnet10", 1.25, "ours", trials=2, epochs=2, batch_size=8, width=0.125, data=str(tmp_path / "data"), image_size=48, frames_per_video=2)
    study = run_search(config, tmp_path / "search", progress=False)
    table = search_table(study)
    assert (table["state"] == "complete").all() and table["auc"].between(0, 1).all() and (table["epochs"] == 2).all()
    kept = tmp_path / "search" / "trials" / study.study_name
    assert [sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) for folder in sorted(kept.iterdir())] == \
        [["detector.json", "detector.safetensors", "history.parquet"]] * 2
    preset = best_preset(study)
    row, = detector_rows(preset)
    settings = {key: value for key, value in preset["training"].items() if key != "compression"}
    torch.manual_seed(settings["seed"])
    detector = create_detector(row["arch"], b=row["b"], width=row["width"], image_size=48, **row["arch_options"])
    history = fit(detector, *TrialTraining(config).frames, make_config(**settings), tmp_path / "again", progress=False)
    best = table["auc"].max()
    assert history.set_index("epoch")["val_auc"][history.attrs["best_epoch"]] == best
