"""The report: its formats against other programs' rules, its page in words and files, and folders in which things are missing or broken."""
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from bcos_nb.reports import (
    Cell, Table, agreement, b_colour, dark_colour, detector_name, grid_examples, heat_overlay, hero_figure, list_runs, load_runs, maps_across_b, mask_illustration, missing_runs,
    paper_detection, paper_localization, plain_frame, post_hoc_panel, read_paper, table_html, table_latex, training_curves, write_report, write_table,
)
from bcos_nb.reports.figures import DARK_GROUND, EXPLAINER_COLOURS, contrast
from bcos_nb.reports.formats import latex_text
from bcos_nb.reports.page import PLOTLY_MIME, loads_from_network, write_pictures
from bcos_nb.reports.report_parts import Report, compression_sentence, detection_sentence, named_detectors, short_tables
from bcos_nb.reports.setting_tables import dataset_rows, guidance_rows, setting_table
from bcos_nb.reports.tables import command_for
from invented_runs import METHODS, invent_games, invent_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return invent_runs(tmp_path_factory.mktemp("runs"), size=48)


@pytest.fixture(scope="module")
def runs(folder):
    return load_runs(folder)


@pytest.fixture
def quiet(monkeypatch):
    """Parts that are shown go nowhere."""
    monkeypatch.setattr("IPython.display.display", lambda *given, **more: None)


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


# ---- what a folder holds

def test_a_whole_folder(runs, folder):
    assert runs.missing.empty and missing_runs(runs).empty and runs.mask_area == pytest.approx(0.18) and runs.cells == 9
    assert [one.b for one in runs.examples["mask"]][1:] == [1.25, 1.75, 2.0, 2.5] and math.isnan(runs.examples["mask"][0].b)
    assert runs.examples["mask"][0].methods == list(METHODS) and len(runs.histories) == 5 * 5
    assert len(training_curves(runs).data) == 2 * 5 and len({b_colour(b) for b in (None, 1.25, 1.75, 2.0, 2.5)}) == 5
    assert list_runs(folder).status.eq("complete").all() and len(list_runs(folder)) == 20


def test_incomplete_and_broken_runs_are_named_with_their_remedy(folder, tmp_path):
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(folder, copy)
    (copy / "detect" / "resnet10-b2-c23" / "metrics.json").unlink()  # half a run
    failed = copy / "detect" / "resnet10-b1.75-c23"
    (failed / "metrics.json").unlink()
    (failed / "failure.json").write_text(json.dumps({"error": "RuntimeError: the disk is full", "time": 0}))
    (copy / "mask_game" / "resnet10-b2.5-c23" / "scores.parquet").write_bytes(b"cut off")
    (copy / "train" / "resnet10-b1.25-c23" / "history.parquet").write_bytes(b"cut off")
    shutil.rmtree(copy / "grid_game")
    report = Report(copy)
    lacking = report.missing.set_index(["experiment", "run"])
    assert "was begun and left" in lacking.loc[("detect", "resnet10-b2-c23"), "reason"] and "the disk is full" in lacking.loc[("detect", "resnet10-b1.75-c23"), "reason"]
    assert "cannot be read" in lacking.loc[("mask_game", "resnet10-b2.5-c23"), "reason"] and "cannot be read" in lacking.loc[("train", "resnet10-b1.25-c23"), "reason"]
    assert lacking.loc[("detect", "resnet10-b2-c23"), "command"] == "bcos-nb run demo --only detect"
    assert lacking.loc[("detect", "resnet10-b1.75-c23"), "command"] == "bcos-nb run demo --only detect --retry-failed"
    assert (report.missing.experiment == "grid_game").sum() == 4 and report.missing.run.is_unique is False
    assert not report.detection["I"].query("b == 2").ours.notna().any() and 2.5 not in set(report.games.players.b)
    assert not any("grids" in sentence for sentence in report.sentences())


def test_what_a_grid_has_besides_is_missing_and_what_it_has_not_is_not(folder, tmp_path, capsys):
    """The grid asks for two detectors and a search that are not there, and for no grid game of one that is."""
    copy = tmp_path / "runs" / "demo"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "grid_game" / "resnet10-b2-c23")
    there = [path.parent.relative_to(copy).as_posix() for path in sorted(copy.glob("*/*/metrics.json"))]
    wanted = [*there, *(f"{experiment}/vgg16-{b}-c23" for experiment in ("train", "detect", "mask_game") for b in ("b2", "ordinary")), "search/resnet10-b1.25", "df-tp-ffhq/detect/one"]
    (copy / "grid.json").write_text(json.dumps([dict(notebook=f"/x/{run.split('/')[-2]}.ipynb", params={}, run=run, after=[], label=run, asked=run in there) for run in wanted]))
    report, shown = Report(copy), []
    assert len(report.missing) == 8 and set(report.missing["reason"]) == {"in the grid, not done yet"} and set(report.missing["command"]) == {"bcos-nb run demo"}
    assert sorted(report.missing["experiment"]) == ["detect"] * 3 + ["mask_game"] * 2 + ["search"] + ["train"] * 2
    report.show = shown.append
    report.opening()
    assert "19 of 27 runs are complete" in shown[0] and "<b>8</b><span>runs are missing" in shown[0]
    report.table("XI")
    assert "bcos-nb run demo --only detect,dataset=df-tp-ffhq</code> makes it" in " ".join(shown)
    (copy / "grid.json").unlink()
    without = Report(copy)
    assert list(without.missing["run"]) == ["resnet10-b2-c23"] and "not seen in the grid game" in without.missing["reason"].item()


def test_a_run_that_somebody_writes_is_running(folder, tmp_path):
    import os
    import socket

    run = tmp_path / "train" / "one"
    shutil.copytree(folder / "train" / "resnet10-b2-c23", run)
    (run / "metrics.json").unlink()
    (run / "lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    assert list_runs(tmp_path).status.item() == "running" and str(os.getpid()) in list_runs(tmp_path).reason.item()
    (run / "lock").write_text(json.dumps({"pid": 2**22 + 7, "host": socket.gethostname()}))  # no such process
    assert list_runs(tmp_path).status.item() == "not complete"


@pytest.mark.parametrize("make", ["nowhere", "empty", "of something else"])
def test_no_runs(tmp_path, make):
    target = tmp_path / make
    if make != "nowhere":
        target.mkdir()
    if make == "of something else":
        (target / "photos").mkdir()
    for read in (load_runs, Report, write_report):
        with pytest.raises(FileNotFoundError, match="bcos-nb demo"):
            read(target)
    assert not (target / "report").exists()


@pytest.mark.parametrize("name, place, said", [
    ("mini", "runs/mini", "bcos-nb run mini --only detect"), ("mini", "elsewhere/mini", "bcos-nb run mini --only detect --out "), ("other", "runs/other", "bcos-nb run PRESET --only detect --out "),
])
def test_commands_name_preset_and_folder(tmp_path, name, place, said):
    (tmp_path / place).mkdir(parents=True)
    command = command_for(tmp_path / place, "detect")
    assert command.startswith(said) and command.endswith(said if not said.endswith(" ") else str(tmp_path / place))


# ---- formats

class Cells(HTMLParser):
    """What a browser sees in each cell of a table."""

    def __init__(self):
        super().__init__()
        self.rows, self.open = [], False

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        self.open = tag in ("td", "th") or (self.open and tag != "tr")
        if tag in ("td", "th"):
            self.rows[-1].append(["", dict(attributes)])

    def handle_data(self, data):
        if self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1][0] += data


def some_table(words="50 % of A & B_c #1 {x} ~ ^ \\ $"):
    cells = [Cell(0.5, 0.4, 0.6, 0.55), Cell(0.5, 0.49, 0.51, 0.9, note="odd"), Cell(-0.25, -0.3, -0.2, sign=True, star=True), Cell(words)]
    return Table("table_test", "Table 0", f"A caption: {words}", ["one", "two & more", "difference", "words"], [(f"group <{words}>", [("row 1", cells), ("row 2", [Cell(study=0.1), Cell(), Cell(), Cell("x")])])],
                 [("both", 2), ("", 2)])


def test_html_is_what_was_put_in():
    parsed = Cells()
    parsed.feed(table_html(some_table()))
    head, columns, group, first, second = parsed.rows
    assert [text for text, _ in columns] == ["one", "two & more", "difference", "words"] and group[0][0] == "group <50 % of A & B_c #1 {x} ~ ^ \\ $>"
    assert first[1][0].startswith("0.500") and first[1][1]["class"] == "within" and first[2][1]["class"] == "apart" and "▼" in first[2][0] and first[4][0] == "50 % of A & B_c #1 {x} ~ ^ \\ $"
    assert "−0.250*" in first[3][0] and second[1][0].startswith("no run") and len(first) == len(second) == 5


def test_latex_escapes_as_pandas_does():
    words = "50 % of A & B_c #1 {x} $"
    assert latex_text(words) == pd.DataFrame([[words]]).style.format(escape="latex").to_latex().split("0 & ")[1].split(" \\\\")[0]
    assert latex_text("~^\\") == r"\textasciitilde{}\textasciicircum{}\textbackslash{}" and latex_text("2 × 3 − 1 ≈ 5") == r"2 $\times$ 3 $-$ 1 $\approx$ 5"


def test_latex_is_whole():
    """Every environment and brace that is opened is closed in order, and each row has as many cells as the head."""
    text = table_latex(some_table())
    bare = re.sub(r"\\[%&$#_{}]", "", re.sub(r"(?m)^%.*$", "", text))
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{([a-z*]+)\}", bare):
        opened.append(name) if kind == "begin" else None
        assert kind == "begin" or opened.pop() == name
    depth = np.cumsum([(letter == "{") - (letter == "}") for letter in bare])
    assert not opened and depth[-1] == 0 and depth.min() == 0 and bare.count("$") % 2 == 0
    rows = [line for line in bare.splitlines() if line.endswith(r"\\") and "&" in line]
    columns = [1 + line.count("&") + sum(int(count) - 1 for count in re.findall(r"\\multicolumn\{(\d+)\}", line)) for line in rows]
    parts = 1 + 3 + 3 + 2 + 1  # of the first column and the four others: ours, its interval, the study's
    assert columns == [parts] * 4
    assert r"\toprule" in bare and r"\bottomrule" in bare and not re.search(r"[^\x00-\x7f]", text)


def wide_table(count):
    cells = [Cell(0.51, 0.4, 0.6, 0.55) for _ in range(count)]
    return Table(f"table_wide_{count}", "", "As wide as it gets", [f"column {k}" for k in range(count)], [("ResNet-34: ours is at width 0.25 (max_out 1)", [("B = 1.25", cells), ("B = 2", cells)])])


def test_latex_puts_parts_below_each_other_where_the_page_ends():
    narrow, broad, too_broad = (table_latex(wide_table(count)) for count in (2, 6, 18))
    assert r"\begin{table}" in narrow and r"\begin{table*}" in broad and r"\begin{table*}" in too_broad
    assert r"\begin{tabular}[t]" not in narrow + broad and too_broad.count(r"\begin{tabular}[t]") == 2 * 18
    for text in (narrow, too_broad):  # what a heading says beside its name would make the last column as wide as itself
        assert r"{\textit{ResNet-34}} \\" in text and text.index(r"\bottomrule") < text.index(r"at width 0.25 (max\_out 1)")


def long_table(columns, rows):
    cells = [Cell(0.51, 0.4, 0.6, 0.55) for _ in range(columns)]
    groups = [(f"Network {k}: ours is at width 0.25 (max_out 1), 128 px, {k} epochs", [(f"row {k}.{row}", cells) for row in range(count)]) for k, count in enumerate(rows)]
    return Table(f"table_long_{columns}", "", "As long as it gets", [f"column {k}" for k in range(columns)], groups)


@pytest.mark.parametrize("columns, rows", [(2, [5, 5]), (2, [10] * 28), (6, [1, 130, 3]), (18, [10] * 7), (2, [])])
def test_latex_goes_on_on_the_next_page(columns, rows):
    """Every row once and in order, no group cut that a page can hold, one number and one label for all of it."""
    text = table_latex(long_table(columns, rows))
    floats = text.split(r"\begin{table")[1:]
    assert re.findall(r"(?m)^row (\d+\.\d+) ", text) == [f"{k}.{row}" for k, count in enumerate(rows) for row in range(count)]
    assert len(floats) == text.count(r"\caption{") == 1 + text.count(r"\addtocounter{table}{-1}") and text.count(r"\label{") == 1 and r"\label{" in floats[0]
    assert (len(floats) == 1) == (sum(rows) < 20)
    height = 3 if columns == 18 else 1
    for one in floats:
        held = [int(k) for k in re.findall(r"(?m)^row (\d+)\.", one)]
        assert height * len(held) + 2 * len(set(held)) <= 52 and all(held.count(k) == rows[k] or rows[k] * height > 50 for k in held)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles_and_fits(tmp_path):
    """In a document of two columns, with whatever letters: no error, no line that is too wide, no table that is too long."""
    import subprocess

    odd = Table("table_odd", "", "β₁ ↑ ↓ – — ’ “ ” ≈ ▲ ▼ é 漢 ☃", ["±", "≤ ☃"], [("γ: 漢", [("ε", [Cell(0.5, 0.4, 0.6, 0.55), Cell("漢 %")])])])
    tables = [some_table(), odd, *map(wide_table, (2, 4, 6, 9, 18)), long_table(2, [10] * 28), long_table(6, [1, 130, 3]), long_table(18, [10] * 7)]
    text = "\\documentclass[twocolumn]{article}\\usepackage{booktabs,graphicx,xcolor}\\begin{document}" + "\\clearpage".join(map(table_latex, tables)) + "\\end{document}"
    (tmp_path / "a.tex").write_text(text, encoding="utf-8")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"], cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and "Overfull" not in done.stdout and "too large for page" not in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("detectors, said", [
    ([("resnet34", math.nan)], "ResNet-34 (ordinary)"),
    ([("resnet34", 2.0), ("resnet34", math.nan), ("resnet34", 1.25), ("resnet34", 2.0)], "ResNet-34 (ordinary, B = 1.25, 2)"),
    ([(arch, b) for arch in ("vgg16", "resnet34", "xception") for b in (math.nan, 2.5)] + [("resnet10", 2.0)], "VGG-16, ResNet-34 and Xception (ordinary, B = 2.5); ResNet-10 (B = 2)"),
    ([("vgg16", 1.0), ("resnet34", 1.0)], "VGG-16 and ResNet-34 (B = 1)"),
])
def test_detectors_in_a_line(detectors, said):
    assert named_detectors(detectors) == said


def test_agreement():
    cases = {(0.85, 0.80, 0.90, 0.88): "within", (0.85, 0.84, 0.86, 0.865): "within", (0.85, 0.84, 0.86, 0.8651): "near", (0.85, 0.84, 0.86, 0.90): "near", (0.85, 0.84, 0.86, 0.91): "lower",
             (0.85, 0.84, 0.86, 0.70): "higher", (math.nan, 0, 1, 0.7): "", (0.85, 0.84, 0.86, math.nan): ""}
    assert {case: agreement(*case) for case in cases} == cases
    assert Cell("32", study="32").agreement == "within" and Cell("–", study="–").agreement == "" and Cell("32", study="64").agreement == ""


def test_files_of_a_table(tmp_path):
    made = some_table()
    assert [path.name for path in write_table(made, tmp_path / "a" / "b")] == ["table_test.csv", "table_test.tex"]
    assert pd.read_csv(tmp_path / "a" / "b" / "table_test.csv", keep_default_na=False).iloc[0, 1] == plain_frame(made).iloc[0, 0] == "0.500 0.40–0.60 (0.55)"


def test_colours_can_be_told_from_their_ground():
    for colour in [*EXPLAINER_COLOURS.values(), *map(b_colour, (None, 1, 1.25, 1.5, 2, 3))]:
        assert contrast(dark_colour(colour), DARK_GROUND) >= 2.8
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # as WCAG's own calculators have it


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


# ---- data and settings

def test_datasets_that_are_gone_are_said_to_be(runs):
    rows = dataset_rows(runs)
    one = rows[rows.data != ""].iloc[0]
    assert one.dataset == "FaceForensics++" and "not on this machine" in one.why and one.total_videos == 5000 and len(rows) == 7


def test_settings_are_those_of_the_training(tmp_path):
    invent_games(tmp_path, backbones={"resnet34": (2.0,), "vitc_ti": (None,)}, pictures=False)
    params = tmp_path / "train" / "resnet34-b2-c23" / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | dict(dataset="FaceForensics++", training=dict(lr=0.00086, betas=[0.95, 0.86], batch_size=16, amsgrad=True))))
    for folder in (tmp_path / "train").iterdir():
        pd.DataFrame(dict(epoch=[1], val_auc=[0.9])).to_parquet(folder / "history.parquet")
        (folder / "metrics.json").write_text(json.dumps(dict(arch=folder.name.split("-")[0], b=None if "ordinary" in folder.name else 2.0, val_auc=0.9)))
    six = plain_frame(setting_table(load_runs(tmp_path)))
    assert six.loc["ResNet-34, B = 2", ["LR", "β1", "Batch", "AMSGrad"]].tolist() == ["0.00086 (0.00086)", "0.95 (0.95)", "16 (32)", "True (True)"]
    assert six.loc["ResNet-34, B = 1.25", "LR"] == "no run (0.00043)" and len(six) == 12


def test_guided_trainings_stand_beside_the_others(tmp_path):
    invent_games(tmp_path, backbones={"resnet34": (2.0,)}, pictures=False)
    own, guided = tmp_path / "train" / "resnet34-b2-c23", tmp_path / "train" / "guided"
    (own / "metrics.json").write_text(json.dumps(dict(arch="resnet34", b=2.0, val_auc=0.9)))
    pd.DataFrame(dict(epoch=[1], val_auc=[0.9])).to_parquet(own / "history.parquet")
    shutil.copytree(own, guided)
    params = json.loads((guided / "params.json").read_text())
    (guided / "params.json").write_text(json.dumps(params | dict(training=dict(guidance=1.0))))
    report = Report(tmp_path)
    rows = guidance_rows(report.found, report.results, report.games).set_index("guidance")
    means = report.games.means.query("game == 'mask' and explainer == 'bcos' and threshold == 0").set_index("weighting")["mean"]
    assert rows.loc[0.0, "weighted"] == pytest.approx(means["weighted"]) and rows.loc[0.0, "specificity"] == pytest.approx(means["specificity"]) and math.isnan(rows.loc[1.0, "weighted"])
    alone = report.found.training[report.found.training.run != "guided"]
    report.found.training = alone
    assert guidance_rows(report.found, report.results, report.games).empty


# ---- the parts, and the whole

def every_part(report):
    """What the report's notebook asks for, without pictures and claims, which have tests of their own."""
    report.opening()
    report.hero()
    report.legend()
    for number in ("I", "VII", "VIII", "XI", "II", "IX", "X", "III", "IV", "XII", "VI", "V"):
        report.table(number)
    for number in (4, 5, "grid_vit", 12, 13, "grid_vit_boxes", 6, 14, 15, 16):
        report.figure(number)
    for name in ("methods", "measures"):
        report.spread(name)
    for part in (report.tradeoff, report.faithful, report.distance, report.trainings, report.search, report.guided, report.agreement, report.lacking):
        part()


def test_every_part_of_whole_runs(tmp_path, quiet):
    invent_runs(tmp_path / "runs", b_values=(None, 2.0), size=16)
    shutil.rmtree(tmp_path / "runs" / "mask_game")
    shutil.rmtree(tmp_path / "runs" / "grid_game")
    invent_games(tmp_path / "runs", pictures=False)
    report = Report(tmp_path / "runs", tmp_path / "out")
    every_part(report)
    assert not [gap for gap in report.gaps if "could not be made" in gap["why"]]
    assert {gap["what"] for gap in report.gaps} == {"Figure 7", "Guided training", "Table XI", "Table II", "Table IX", "Table X"}
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {f"figure_{number}.{form}" for number in (4, 5, 6, 12, 13, 14, 15, 16, "grid_vit", "training", "tradeoff") for form in ("json", "csv")} - figures == {"figure_tradeoff.csv"}
    tables = {path.name for path in (tmp_path / "out" / "tables").iterdir()}
    assert tables == {f"table_{number}.{form}" for number in ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "methods", "measures", "faithfulness", "departure") for form in ("csv", "tex")}
    assert {f"figure_{kind}_{family}.json" for kind in ("faithfulness", "departure") for family in ("resnet34", "xception", "vitc_ti")} <= figures
    assert all(json.loads((tmp_path / "out" / "figures" / name).read_text())["data"] for name in figures if name.endswith(".json"))


@pytest.mark.parametrize("left", ["trainings", "games", "detection", "broken"])
def test_every_part_of_what_is_left(folder, tmp_path, quiet, left):
    """Whatever a folder lacks, every part is made or said to be missing, with a command."""
    keep = {"trainings": ("train",), "games": ("mask_game", "grid_game"), "detection": ("train", "detect"), "broken": ("train", "detect", "mask_game", "grid_game")}[left]
    for name in keep:
        shutil.copytree(folder / name, tmp_path / "demo" / name)
    if left == "broken":
        for file in (tmp_path / "demo").rglob("*.parquet"):
            file.write_bytes(b"cut off")
        for file in (tmp_path / "demo").rglob("examples.safetensors"):
            file.write_bytes(b"cut off")
    report = Report(tmp_path / "demo", tmp_path / "out")
    every_part(report)
    assert not [gap for gap in report.gaps if "could not be made" in gap["why"]], report.gaps
    assert all(gap["command"].startswith("bcos-nb ") for gap in report.gaps) and report.gaps
    assert all(command.startswith("bcos-nb run demo") for command in report.missing.command) and len(report.missing)
    if left == "broken":
        assert report.missing.reason.str.contains("cannot be read").sum() == 15  # the detection's numbers are in metrics.json and can be


def test_a_part_that_fails_does_not_take_the_others_with_it(folder, quiet, monkeypatch):
    report = Report(folder)
    monkeypatch.setattr("bcos_nb.reports.report_parts.draw_curves", lambda *given: 1 / 0)
    report.figure(4)
    report.table("I")
    assert "ZeroDivisionError" in report.gaps[0]["why"] and [table.name for table in report.tables] == ["table_I"]


def test_sentences_are_computed(folder):
    text = " ".join(Report(folder).sentences())
    assert "an AUC of 0.980, B-cos networks 0.940 to 0.970; the best B-cos network is ResNet-10, B = 1.25" in text and "changes by −0.10 on average" in text
    assert "cover 18% of a frame" in text and "mean mask" in text and "2e-06" in text


@pytest.mark.parametrize("stands_for, name", [("ResNet-10 at width 0.5 (stem fine), 128 px", "ResNet-10"), ("ViT-C Ti (depth 5), 96 px", "ViT-C Ti"), ("Xception, 256 px, 4 epochs", "Xception"),
                                              ("ResNet-10", "ResNet-10"), (None, "ResNet-34")])
def test_sentences_name_what_was_run_not_what_it_stands_for(stands_for, name):
    cell = {"arch": "resnet34", "b": 2.0, "metric": "auc", "ours": 0.9, "stands_for": stands_for}
    table = pd.DataFrame([cell, cell | {"b": float("nan"), "ours": 0.8}, cell | {"b": 1.25, "ours": 0.7}])
    assert f"the best B-cos network is {name}, B = 2." in detection_sentence({"I": table})
    worse = table.assign(ours=[0.85, 0.4, 0.65])
    assert f"most for {name}, ordinary (−0.40)" in compression_sentence({"VII": table, "VIII": worse, "II": table.iloc[:0]})


def test_short_tables(folder, tmp_path):
    assert [table.title for table in short_tables(folder, "detection")] == ["Table I", "Table II"] and [table.title for table in short_tables(folder, "games")] == ["Table III", "Table IV"]
    with pytest.raises(FileNotFoundError, match="bcos-nb run games"):
        shutil.copytree(folder / "train", tmp_path / "train")
        short_tables(tmp_path, "games")


def test_pictures_want_a_browser_and_say_so(tmp_path, monkeypatch):
    import sys

    (tmp_path / "figure.json").write_text("{}")
    monkeypatch.setattr("bcos_nb.reports.page.DRAW", "raise RuntimeError('no Chrome')")
    assert "no Chrome" in write_pictures(tmp_path) and "complete without" in write_pictures(tmp_path) and sys.version_info


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), reason="no Chrome or Chromium here")
def test_pictures_of_figures(tmp_path):
    import plotly.graph_objects as go

    (tmp_path / "figure.json").write_text(go.Figure(go.Scatter(x=[0, 1], y=[1, 0]), dict(width=300, height=200)).to_json())
    assert write_pictures(tmp_path) == "1 figures as PNG and SVG"
    from PIL import Image

    assert Image.open(tmp_path / "figure.png").size == (600, 400) and "<svg" in (tmp_path / "figure.svg").read_text()[:200]


@pytest.mark.slow
def test_report(folder, tmp_path, capsys):
    """The page reads offline, holds plotly once, shows no code, and is written whole or not at all."""
    out = write_report(folder, tmp_path / "page" / "report.html")
    assert f"The report is at {out}" in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert not loads_from_network(page) and "require.js" not in page.replace("plotly.js", "") and len(page) < 12e6
    figures = len(list((out.parent / "figures").glob("*.json")))
    assert page.count('class="plot"') == figures >= 5 and page.count('id="plotly-source"') == 1
    assert "load_runs(" not in page and "Table VIII" in page and 'href="#The-mask-game"' in page and "could not be made" not in page
    assert sorted(path.name for path in out.parent.iterdir()) == ["figures", "report.html", "report.ipynb", "tables"]
    cells = json.loads(out.with_suffix(".ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not any(output["output_type"] == "error" for output in outputs) and sum(PLOTLY_MIME in output.get("data", {}) for output in outputs) == figures
    before = {path.name for path in (out.parent / "tables").iterdir()}
    (out.parent / "tables" / "old.csv").write_text("of an earlier report")
    with pytest.raises(RuntimeError, match="longer than 0.1 s"):
        write_report(folder, out, timeout=0.1)
    assert out.read_text(encoding="utf-8") == page and (out.parent / "tables" / "old.csv").is_file()
    write_report(folder, out)
    assert {path.name for path in (out.parent / "tables").iterdir()} == before


@pytest.mark.slow
def test_report_of_little(folder, tmp_path):
    """A folder with one training and nothing else makes a report that says what is missing."""
    shutil.copytree(folder / "train" / "resnet10-b2-c23", tmp_path / "runs" / "train" / "resnet10-b2-c23")
    page = write_report(tmp_path / "runs").read_text(encoding="utf-8")
    assert "trained, but not seen in the mask game yet" in page and 'class="warning"' in page and "could not be made" not in page
