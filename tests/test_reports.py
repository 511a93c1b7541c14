import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from bcos_nb.reports import (
    b_colour, detection_table, findings, grid_examples, heat_overlay, hero_figure, load_runs, localization_table, maps_across_b,
    mask_illustration, mean_scores, method_table, paper_detection, paper_localization, post_hoc_panel, read_paper, threshold_curves,
    training_curves, write_report,
)
from bcos_nb.reports.page import loads_from_network
from bcos_nb.reports.tables import detection_html, localization_html
from invented_runs import MASK_AREA, METHODS, invent_runs, mask_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return invent_runs(tmp_path_factory.mktemp("runs"), size=48)


@pytest.fixture(scope="module")
def runs(folder):
    return load_runs(folder)


# The study's numbers, read off its pages.
@pytest.mark.parametrize("table, arch, b, metric, value", [
    ("VII", "resnet34", None, "auc", 0.88), ("VII", "vitc_ti", 1.25, "auc", 0.72), ("VIII", "xception", 2.5, "recall", 0.98),
    ("I", "xception", None, "auc", 0.97), ("VII", "xception", None, "auc", 0.98),
])
def test_study_detection(table, arch, b, metric, value):
    rows = read_paper("detection").query("table == @table and arch == @arch and metric == @metric")
    rows = rows[rows.b.isna()] if b is None else rows[rows.b == b]
    assert rows.value.item() == value


def test_study_misprints_are_noted():
    noted = read_paper("detection").query("note != ''")
    assert set(noted.table) == {"I", "VII", "VIII", "X"} and len(noted) == 6
    assert "0.98 in Table VII" in noted[(noted.table == "I") & (noted.arch == "xception")].note.item()
    missing = read_paper("detection").query("table == 'I' and arch == 'resnet34' and b == 1.25 and metric == 'f1'")
    assert missing.empty and "not printed in Table I" in set(noted.note)


def test_study_games():
    assert paper_localization("grid").query("arch == 'xception' and explainer == 'layercam'").weighted.item() == 0.5858
    assert paper_localization("mask").query("arch == 'vitc_ti' and b == 2.5").weighted.item() == 0.8675
    assert len(paper_detection("c40")) == 12
    with pytest.raises(ValueError, match="raw"):
        paper_detection("raw")
    with pytest.raises(ValueError, match="choose one of"):
        read_paper("recall")


def test_nothing_is_missing(runs):
    assert runs.missing.empty and runs.mask_area == pytest.approx(MASK_AREA) and runs.cells == 9
    assert [one.b for one in runs.examples["mask"]][1:] == [1.25, 1.75, 2.0, 2.5] and math.isnan(runs.examples["mask"][0].b)
    assert runs.examples["mask"][0].methods == list(METHODS)


def test_detection_table(runs):
    table = detection_table(runs, "c23")
    assert table.auc.tolist() == pytest.approx([0.98, 0.97, 0.96, 0.95, 0.94])
    assert table["study auc"].tolist() == [0.88, 0.78, 0.82, 0.84, 0.84] and "study eer" not in table
    assert detection_table(runs, "c40").auc.tolist() == pytest.approx([0.88, 0.87, 0.86, 0.85, 0.84])


def test_method_auc_is_sklearns(runs):
    frames = runs.frames[(runs.frames.compression == "c23") & (runs.frames.b == 2)]
    for method in METHODS:
        some = frames[frames.method.isin(["real", method])]
        ours = method_table(runs).query("b == 2")[method].item()
        assert ours == pytest.approx(roc_auc_score(some.label, some.probability))


def test_localization_table(runs):
    table = localization_table(runs, "mask").set_index(["explainer", "b"])
    for b in (1.25, 2.5):
        row = table.loc[("bcos", b)]
        assert row["weighted@0"] == pytest.approx(mask_score(b, "bcos", 0.0, "weighted"))
        assert row["ratio@0.5"] == pytest.approx(mask_score(b, "bcos", 0.5, "weighted") / MASK_AREA)
    assert table.loc[("bcos", 1.25)]["study weighted"] == 0.7497
    controls = localization_table(runs, "mask").query("kind == 3")
    assert controls.explainer.tolist() == ["uniform", "mean mask"] and controls["weighted@0.5"].tolist() == pytest.approx([0.18, 0.65])
    assert localization_table(runs, "grid").kind.isin([0, 1, 2]).all()


def test_interval_counts_videos():
    """Sixteen frames that are copies of four videos know no more than the four."""
    rng = np.random.default_rng(0)
    videos = rng.normal(0.5, 0.1, 12)
    base = dict(game="mask", arch="a", b=2.0, explainer="bcos", weighting="weighted", threshold=0.0)
    few = pd.DataFrame([{**base, "sample": f"{v}/0.png", "score": score} for v, score in enumerate(videos)])
    many = pd.DataFrame([{**base, "sample": f"{v}/{f}.png", "score": score} for v, score in enumerate(videos) for f in range(4)])
    assert mean_scores(many).interval.item() == pytest.approx(mean_scores(few).interval.item())
    assert mean_scores(few).interval.item() == pytest.approx(1.96 * videos.std(ddof=1) / math.sqrt(12))


def test_incomplete_runs(folder, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(folder, copy)
    (copy / "detect" / "resnet10-b2-c23" / "metrics.json").unlink()
    (copy / "mask_game" / "resnet10-b2.5-c23" / "scores.parquet").write_bytes(b"cut off")
    shutil.rmtree(copy / "grid_game")
    runs = load_runs(copy)
    reasons = runs.missing.groupby("experiment").reason.agg(" ".join)
    assert "no metrics.json" in reasons["detect"] and "cannot be read" in reasons["mask_game"]
    assert (runs.missing.experiment == "grid_game").sum() == 5
    assert 2.0 not in set(detection_table(runs).b) and 2.5 not in set(runs.mask.b)
    assert not any("grids" in sentence for sentence in findings(runs))


@pytest.mark.parametrize("make", ["nowhere", "empty"])
def test_no_runs(tmp_path, make):
    target = tmp_path / make
    if make == "empty":
        target.mkdir()
    with pytest.raises(FileNotFoundError, match="bcos-nb demo"):
        load_runs(target)


def test_findings_are_computed(runs):
    text = " ".join(findings(runs))
    assert "AUC of 0.98 at c23, the B-cos detectors 0.94 to 0.97" in text and "−0.10" in text
    assert "cover 18% of the image" in text and "mean mask" in text and "2e-06" in text


def test_table_markup(runs):
    assert detection_html(runs).count('class="study"') == 5 * 5
    markup = localization_html(runs, "mask")
    assert markup.count("every detector") == 2 and "± " not in markup and 'title="study, FaceForensics++' in markup


def test_curves(runs):
    figure = threshold_curves(runs, "mask")
    names = [line.name for line in figure.data]
    assert names[:4] == ["B-cos, B = 1.25", "B-cos, B = 1.75", "B-cos, B = 2", "B-cos, B = 2.5"] and names[-2:] == ["uniform map", "mean mask"]
    line = figure.data[names.index("B-cos, B = 2")]
    assert np.allclose(line.y, [mask_score(2.0, "bcos", t / 10, "weighted") for t in range(11)])
    unweighted = figure.layout.updatemenus[0].buttons[1].args[0]["y"]
    assert np.allclose(unweighted[2], [mask_score(2.0, "bcos", t / 10, "unweighted") for t in range(11)])
    assert len(training_curves(runs).data) == 2 * 5
    assert len({b_colour(b) for b in (None, 1.25, 1.75, 2.0, 2.5)}) == 5


def test_overlay_keeps_what_is_above():
    image = np.full((4, 4, 3), 100, np.uint8)
    attribution = np.array([[0.0, 0.49, 0.5, 1.0]] * 4, np.float32)
    painted = heat_overlay(image, attribution, 0.5)
    assert (painted[:, :2] == painted[0, 0]).all() and (painted[:, 2] != painted[:, 0]).any() and painted[0, 3, 0] > 200


def test_panels(runs, tmp_path):
    assert len(maps_across_b(runs).axes) == 4 * (2 + 4)
    assert len(maps_across_b(runs, "colour", 0.5, faces=2).axes) == 2 * (2 + 4)
    assert len(post_hoc_panel(runs).axes) == 4 * (1 + 4 + 5)
    assert len(mask_illustration(runs).axes) == 8 and len(grid_examples(runs).axes) == (1 + 4) + (1 + 5)
    path = tmp_path / "images" / "maps.png"
    assert hero_figure(runs, path) == path.read_bytes()


def test_report(folder, tmp_path, capsys):
    """The page reads offline, holds plotly once, shows no code, and is written whole or not at all."""
    out = write_report(folder, tmp_path / "page" / "report.html")
    assert f"The report is at {out}" in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert not loads_from_network(page) and "require.js" not in page.replace("plotly.js", "") and len(page) < 12e6
    assert page.count("Plotly.newPlot(") - page.split("</head>")[0].count("Plotly.newPlot(") == 4
    assert "load_runs(" not in page and "Table VIII" in page and "another dataset" in page and 'href="#The-mask-game"' in page
    tables = [f"detection_{number}.csv" for number in ("I", "II", "VII", "VIII", "IX", "X", "XI")]
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(["report.html", "report.ipynb", "detection.html", *tables])
    assert "The study’s Table IX" in page and "The study’s Table XI:" not in page  # of FFHQ there is no run
    outputs = [output for cell in json.loads(out.with_suffix(".ipynb").read_text())["cells"] for output in cell.get("outputs", [])]
    assert not any(output["output_type"] == "error" for output in outputs)


@pytest.mark.slow
def test_report_of_little(folder, tmp_path):
    """A folder with one training and nothing else makes a report that says what is missing."""
    shutil.copytree(folder / "train" / "resnet10-b2-c23", tmp_path / "runs" / "train" / "resnet10-b2-c23")
    page = write_report(tmp_path / "runs").read_text(encoding="utf-8")
    assert "trained, but not seen in the mask game yet" in page and 'class="warning"' in page
