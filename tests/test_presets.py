"""Detector presets: every number of the study's table, and what a grid makes of them."""
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from bcos_nb.batch.presets import detector_rows, load_preset, preset_jobs
from bcos_nb.cli import read_jobs
from bcos_nb.models import list_detectors
from bcos_nb.training import FitConfig
from bcos_nb.training.presets import preset, preset_files, preset_table

# Table VI as printed: batch size, learning rate, decay, betas, eps, amsgrad, norm, its bias, norm_2d, its bias
PRINTED = {
    ("resnet34", None): (128, 2.7e-4, 8.6e-4, 0.86, 0.86, 4.2e-6, True),
    ("resnet34", 1.25): (32, 4.3e-4, 3.7e-4, 0.92, 0.82, 5.0e-6, True, "BatchNorm2d", False),
    ("resnet34", 1.75): (32, 8.7e-4, 1.0e-4, 0.94, 0.86, 6.0e-6, True, "GNInstanceNormUncentered2d", False),
    ("resnet34", 2): (32, 8.6e-4, 1.0e-4, 0.95, 0.86, 6.1e-6, True, "GNInstanceNormUncentered2d", False),
    ("resnet34", 2.5): (16, 8.9e-4, 4.0e-4, 0.86, 0.88, 8.0e-6, True, "BatchNormUncentered2d", False),
    ("xception", None): (64, 2.0e-4, 5.0e-4, 0.90, 0.99, 1.0e-8, False),
    ("xception", 2.5): (64, 2.0e-4, 5.0e-4, 0.90, 0.99, 1.0e-8, False),
    ("vitc_ti", None): (64, 7.2e-5, 3.5e-4, 0.85, 0.86, 6.5e-5, False),
    ("vitc_ti", 1.25): (16, 1.6e-4, 2.1e-4, 0.93, 0.83, 8.8e-6, True, "DetachableLayerNorm", True, "BatchNorm2d", False),
    ("vitc_ti", 1.75): (16, 5.5e-5, 5.3e-4, 0.89, 0.94, 4.4e-6, False, "DetachableLayerNorm", False, "BatchNorm2d", True),
    ("vitc_ti", 2): (128, 3.2e-4, 3.5e-4, 0.88, 0.92, 4.7e-6, False, "DetachableLayerNorm", True, "BatchNorm2d", False),
    ("vitc_ti", 2.5): (64, 1.2e-4, 7.6e-4, 0.92, 0.95, 2.6e-7, False, "DetachableLayerNorm", False, "BatchNorm2d", False),
}


@pytest.mark.parametrize("arch,b", PRINTED)
def test_study_presets_hold_what_is_printed(arch, b):
    found, (batch_size, lr, decay, beta1, beta2, eps, amsgrad, *norms) = preset(arch, b), PRINTED[arch, b]
    config = found.config()
    assert (config.batch_size, config.lr, config.weight_decay, config.betas, config.eps, config.amsgrad) == (batch_size, lr, decay, (beta1, beta2), eps, amsgrad)
    assert config.epochs == (5 if (arch, b) == ("xception", 2.5) else 20) and config.optimizer == "adam" and config.loss == "cross_entropy"
    assert config.select == "auc" and config.augment == "none" and found.image_size == (224 if arch == "vitc_ti" else 256)
    assert [found.options[name] for name in ("norm", "norm_bias", "norm_2d", "norm_2d_bias") if name in found.options] == norms


@pytest.mark.parametrize("arch,b", PRINTED)
def test_study_presets_build_and_classify(arch, b):
    detector = preset(arch, b).create(width=0.25, **({"depth": 1} if arch == "vitc_ti" else {"middle": 0} if arch == "xception" else {}))
    assert detector.b == b and detector.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 2)
    norm = (preset(arch, b).options.get("norm") or "").replace("Detachable", "")
    kinds = {type(module).__name__ for module in detector.modules()}
    assert not norm or any(norm in kind for kind in kinds), kinds


def test_every_backbone_has_a_preset_of_ours():
    assert {path.stem for path in preset_files("ours")} == set(list_detectors())
    for arch in list_detectors():
        ordinary, bcos = preset(arch, source="ours"), preset(arch, 2.2, source="ours")
        assert ordinary.config().b_start is None and bcos.config().b_start == 1.25 and bcos.b == 2.2
        assert isinstance(bcos.config(epochs=1), FitConfig) and bcos.note and "energy_stem" not in ordinary.options


def test_numbers_stand_in_the_files_only():
    code = (Path(__file__).parent.parent / "bcos_nb" / "training" / "presets.py").read_text()
    assert not re.search(r"\d\.\d|e-\d", re.sub(r"#.*", "", code))
    assert len(preset_table("study")) == 12 and len(preset_table("ours")) == 2 * len(list_detectors())
    for source in ("study", "ours"):
        for path in preset_files(source):
            assert path.stem.startswith(yaml.safe_load(path.read_text())["arch"])


@pytest.mark.parametrize("wrong,words", [
    (dict(arch="resnet34", b=3), "resnet34-b1.25"), (dict(arch="resnet35"), "resnet34"), (dict(arch="resnet34", source="paper"), "study, ours"),
    (dict(arch="resnet34", b=0.5, source="ours"), "at least 1"),
])
def test_what_is_not_there_is_answered_with_what_is(wrong, words):
    with pytest.raises(ValueError, match=words):
        preset(**wrong)


@pytest.mark.parametrize("change,words", [
    ({"detectors": {"arch": "resnet43", "b": 2}}, "resnet43 is no backbone. Did you mean resnet34.*vitc_ti"), ({"games": {"explainers": ["gradcamm"]}}, "gradcamm is no explainer. Did you mean gradcam"),
    ({"games": {"mask": {"explainers": ["bcos", "limes"]}}}, "limes is no explainer"), ({"training": {"learning_rate": 1}}, "learning_rate is no training setting.*weight_decay"),
    ({"training": {"bcos": {"lrr": 1}}}, "lrr is no training setting"), ({"detectors": {"arch": "resnet10", "training": {"epoch": 2}}}, "epoch is no training setting. Did you mean epochs"),
    ({"detectors": {"arch": "resnet10", "product": {"training.sed": [0, 1]}}}, "sed is no training setting"), ({"search": [{"arch": "resnet11", "b": 2}]}, "resnet11 is no backbone"),
    ({"detectors": {"arch": "resnet10", "b": -1}}, "b is -1. The exponent"), ({"detectors": {"arch": "resnet10", "b": [None, "two"]}}, "b is 'two'"), ({"search": [{"b": True}]}, "b is True"),
])
def test_a_name_that_nobody_knows_is_refused_before_anything_is_trained(tmp_path, change, words):
    content = {"data": {"root": "data"}, "detectors": {"arch": "resnet10", "b": [None, 1.5, 2]}, "training": {"epochs": 1, "lr": 0.1}, "games": {"explainers": ["bcos", "rise", "saliency"]}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_preset(path)["detectors"]["arch"] == "resnet10"
    path.write_text(yaml.safe_dump(content | change))
    with pytest.raises(ValueError, match=words):
        load_preset(path)


def test_a_yaml_error_names_the_place(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: x\ndata: {root: data\ndetectors: [")
    with pytest.raises(ValueError, match=r"mine.yaml is not YAML: while parsing a flow mapping line 2, column 7.*Correct it there") as told:
        load_preset(tmp_path / "mine.yaml")
    assert "unicode string" not in str(told.value)


def test_a_grid_takes_options_and_training_from_a_detector_preset():
    entry = {"arch": ["resnet34", "vitc_ti"], "b": [1.25], "preset": "study", "options": {"width": 0.25}, "training": {"epochs": 2}}
    rows = {row["arch"]: row for row in detector_rows({"detectors": entry})}
    resnet, vit = rows["resnet34"], rows["vitc_ti"]
    assert resnet["width"] == 0.25 and resnet["arch_options"] == {"variant": "study", "norm": "BatchNorm2d", "norm_bias": False}
    assert resnet["training"]["epochs"] == 2 and resnet["training"]["lr"] == 4.3e-4 and vit["training"]["batch_size"] == 16
    with pytest.raises(ValueError, match="no preset.*resnet34, B = 1.3"):
        detector_rows({"detectors": {"arch": "resnet34", "b": 1.3, "preset": "study"}})


# Grids


def test_the_studys_grid_has_its_detectors_settings_and_test_sets():
    jobs = preset_jobs(load_preset("study"), "runs")
    of = lambda experiment, folder="runs": [job for job in jobs if job.run_dir.parent.name == experiment and job.run_dir.parent.parent.name == folder]
    trained = {(job.params["arch"], job.params["b"]): job.params for job in of("train")}
    assert set(trained) == set(PRINTED)
    for (arch, b), params in trained.items():
        batch_size, lr = PRINTED[arch, b][:2]
        assert (params["training"]["batch_size"], params["training"]["lr"]) == (batch_size, lr) and params["frames_per_video"] == 32
        assert params["image_size"] == (224 if arch == "vitc_ti" else 256) and params["compression"] == "c23"
    detection = pd.read_csv(Path(__file__).parent.parent / "data" / "paper" / "detection.csv")
    tested = {"FaceForensics++", *(entry["dataset"] for job in of("detect") for entry in job.params["test_sets"])}
    assert tested == {name for name in detection["test_set"] if not name.startswith("FF-") and name != "FFHQ"}
    assert {job.params["b"] for job in of("train", "df-tp-ffhq")} == {None, 1.25, 1.75, 2, 2.5} and len(of("detect", "df-tp-ffhq")) == 5
    games = of("mask_game") + of("grid_game")
    assert len(games) == 24 and all(job.params["options"] == {"lime": {"samples": 256}} and "lime" in job.params["explainers"] for job in games)
    assert {job.params["b"] for job in of("search")} == {None, 1.25}


def test_the_mini_grid_has_all_backbones_all_b_and_all_that_a_report_asks_for():
    jobs = preset_jobs(load_preset("mini"), "runs")
    trained = [job.params for job in jobs if job.notebook.stem == "train"]
    assert {params["arch"] for params in trained} >= {"resnet34", "xception", "vitc_ti", "vgg16", "densenet121", "inception_v3", "convnext_tiny"}
    for arch in ("resnet34", "xception", "vitc_ti", "vgg16", "densenet121", "inception_v3", "convnext_tiny"):
        assert {params["b"] for params in trained if params["arch"] == arch} == {None, 1.25, 1.75, 2, 2.5}
    assert {job.notebook.stem for job in jobs} == {"train", "detect", "mask_game", "grid_game", "search"}
    assert any(params["training"].get("guidance") for params in trained)
    folders = {job.run_dir for job in jobs}
    assert len(folders) == len(jobs) and all(set(job.after) <= folders for job in jobs)


def test_exclusions_take_what_needs_them_along():
    preset = load_preset("demo") | {"exclude": [{"experiment": "train", "b": [None, 2]}, {"experiment": "grid_game", "b": 2.5}]}
    left = preset_jobs(preset, "runs")
    assert {job.params["b"] for job in left} == {1.25, 1.75, 2.5} and len(left) == 3 * 4 - 1
    with pytest.raises(ValueError, match="fits no run of the grid"):
        preset_jobs(preset | {"exclude": [{"b": 7}]}, "runs")
    with pytest.raises(ValueError, match="no run has a parameter bb"):
        preset_jobs(preset | {"exclude": [{"bb": 2}]}, "runs")
    with pytest.raises(ValueError, match="nothing is left"):
        preset_jobs(preset | {"exclude": [{"experiment": "train"}]}, "runs")


@pytest.mark.parametrize("experiments", [("detect",), ("mask_game", "grid_game"), ("train",), ("search",)])
@pytest.mark.parametrize("name", ["demo", "mini", "study"])
def test_a_part_of_a_grid_is_a_part_of_the_whole(name, experiments):
    grid = load_preset(name)
    whole, part = ({job.run_dir for job in preset_jobs(grid, "runs", experiments=asked)} for asked in (None, experiments))
    assert part <= whole and bool(part) == (experiments != ("search",) or "search" in grid)


def test_a_task_takes_the_detectors_that_the_preset_names_for_it_with_what_they_need(tmp_path):
    whole, _ = read_jobs("mini", tmp_path, None)
    detectors = lambda jobs, kind: {(job.params["arch"], job.params["b"]) for job in jobs if job.notebook.stem == kind and job.run_dir.parent.parent == tmp_path}
    short = {("resnet34", b) for b in (None, 1.25, 1.75, 2, 2.5)} | {("xception", None), ("xception", 2.5), ("vitc_ti", None), ("vitc_ti", 2)}
    for task, kinds in (("detection", {"detect"}), ("games", {"mask_game", "grid_game"})):
        jobs, _ = read_jobs("mini", tmp_path, None, task)
        folders = {job.run_dir for job in jobs}
        assert {job.notebook.stem for job in jobs} == kinds | {"train"} and folders < {job.run_dir for job in whole}
        assert all(set(job.after) <= folders for job in jobs)
        assert all(detectors(jobs, kind) == short for kind in kinds | {"train"})
        assert detectors(read_jobs("mini", tmp_path, None, task, ["vgg16"])[0], "train") == {("vgg16", b) for b in (None, 1.25, 1.75, 2, 2.5)}  # --only asks for more
    own = tmp_path / "own.yaml"
    own.write_text("data: {root: data}\ndetectors: {arch: resnet10, b: [null, 2]}\ntasks: {games: [{arch: xception}]}\n")
    with pytest.raises(ValueError, match="rules for games fit no run"):
        read_jobs(str(own), tmp_path, None, "games")
    assert len(read_jobs(str(own), tmp_path, None, "detection")[0]) == 4
