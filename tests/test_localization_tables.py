"""The study's localization tables and figures: its numbers against its printed text, ours against pandas and NumPy on invented runs, and what the page holds."""
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from bcos_nb.reports.beyond_tables import departure_rows, faithfulness_rows, read_side_tables
from bcos_nb.reports.claims import OurTables
from bcos_nb.reports.formats import agreement, plain_frame, table_html, write_table
from bcos_nb.reports.localization_tables import (
    LOCALIZATION_TABLES, draw_boxes, draw_curves, figure_boxes, figure_curves, localization_table, localization_table_cells, main_rows, measure_cells, method_cells, read_games, seats,
    spread_table,
)
from bcos_nb.reports.report_parts import Report
from bcos_nb.reports.tables import is_control
from invented_runs import CONSTANT, MASK_AREA, METHODS, POST_HOC, SCENES, game_level, game_samples, game_scores, invent_games, invent_runs, put


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return invent_games(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def games(folder):
    return read_games(folder)


def scores_of(folder, game, name):
    """A run's scores with what its samples are, joined without the module's help."""
    run = folder / f"{game}_game" / name
    return pd.read_parquet(run / "scores.parquet").merge(pd.read_parquet(run / "samples.parquet"), on="sample", validate="many_to_one")


def cell(cells, arch, b, explainer, weighting="weighted", game=None):
    rows = cells[(cells.arch == arch) & (cells.explainer == explainer) & (cells.weighting == weighting) & (cells.b.isna() if b is None else cells.b == b)]
    return (rows if game is None else rows[rows.game == game]).iloc[0]


# ---- the study's numbers

PRINTED = [  # read off the study's pages
    ("III", "resnet34", 1.25, "bcos", "weighted", "grid", 0.1580), ("III", "resnet34", 2.5, "bcos", "unweighted", "grid", 0.1111),
    ("III", "xception", 2.5, "bcos", "weighted", "grid", 0.2826), ("III", "xception", None, "gradcam++", "unweighted", "grid", 0.1078),
    ("III", "resnet34", None, "lime", "weighted", "grid", 0.1184), ("IV", "vitc_ti", 2.0, "bcos", "weighted", "mask", 0.8517),
    ("IV", "vitc_ti", None, "lime", "unweighted", "mask", 0.4184), ("IV", "xception", None, "layercam", "weighted", "mask", 0.8626),
    ("XII", "resnet34", 1.25, "layercam", "weighted", "grid", 0.3548), ("XII", "resnet34", 1.25, "gradcam", "unweighted", "mask", 0.2747),
]


@pytest.mark.parametrize("table, arch, b, explainer, weighting, game, value", PRINTED)
def test_the_studys_numbers_stand_where_it_prints_them(games, table, arch, b, explainer, weighting, game, value):
    assert cell(localization_table_cells(games, table), arch, b, explainer, weighting, game).study == value


def test_every_number_of_the_study_has_one_cell(games):
    tables = {table: localization_table_cells(games, table) for table in ("III", "IV", "XII")}
    assert {table: int(cells.study.notna().sum()) for table, cells in tables.items()} == {"III": 30, "IV": 48, "XII": 20}
    assert not any(cells.duplicated(["game", "arch", "b", "explainer", "weighting"]).any() for cells in tables.values())
    remarks = tables["XII"][tables["XII"].note.str.contains("same two numbers")]
    assert set(remarks.explainer) == {"gradcam", "xgradcam", "gradcam++"} and remarks.study.nunique() == 2
    with pytest.raises(ValueError, match="choose one of III, IV, XII"):
        localization_table_cells(games, "V")


# ---- ours beside them

@pytest.mark.parametrize("table, game, name, arch, b, explainer", [
    ("III", "grid", "resnet34-b1.25-c23", "resnet34", 1.25, "bcos"), ("III", "grid", "vitc_ti-ordinary-c23", "vitc_ti", None, "layercam"),
    ("IV", "mask", "xception-ordinary-c23", "xception", None, "lime"), ("IV", "mask", "resnet34-b2.5-c23", "resnet34", 2.5, "bcos"),
    ("XII", "mask", "resnet34-b1.25-c23", "resnet34", 1.25, "lime"), ("XII", "grid", "vitc_ti-b2-c23", "vitc_ti", 2.0, "gradcam++"),
    ("IV", "mask", "resnet34-ordinary-c23", "resnet34", None, "gradcam, random weights"),
])
def test_ours_are_the_means_of_the_run(folder, games, table, game, name, arch, b, explainer):
    scores = scores_of(folder, game, name)
    at_zero = scores[(scores.explainer == explainer) & (scores.threshold == 0)]
    for weighting in ("weighted", "unweighted"):
        one = cell(localization_table_cells(games, table), arch, b, explainer, weighting, game)
        assert one.ours == pytest.approx(at_zero[at_zero.weighting == weighting].score.mean()) and one.run == name and one.scenes == SCENES
        assert one.specificity == pytest.approx(at_zero[at_zero.weighting == "specificity"].score.mean())
        assert one.specificity_low < one.specificity < one.specificity_high and one.low < one.ours < one.high
        assert one.stands_for.endswith("at width 0.25, 48 px, 4 epochs") and one.chance == pytest.approx(MASK_AREA if game == "mask" else 1 / 9)


def test_intervals_are_those_of_scenes_and_not_of_frames(folder, games):
    """A plain bootstrap of scenes, written out; drawing frames instead would give a third of the width."""
    scores = scores_of(folder, "mask", "xception-b2.5-c23").query("explainer == 'bcos' and weighting == 'weighted' and threshold == 0")
    of_scene, rng = [group.to_numpy() for _, group in scores.groupby("scene").score], np.random.default_rng(5)
    means = [np.concatenate([of_scene[k] for k in rng.integers(0, SCENES, SCENES)]).mean() for _ in range(4000)]
    one = cell(localization_table_cells(games, "IV"), "xception", 2.5, "bcos")
    width, plain = one.high - one.low, np.subtract(*np.quantile(means, [0.975, 0.025]))
    assert plain * 0.95 < width < plain * 1.5  # wider by the correction for eight scenes
    assert width > 3 * 1.96 * scores.score.std() / len(scores) ** 0.5


def test_only_we_have_these_rows(games):
    three, four, twelve = (localization_table_cells(games, table) for table in ("III", "IV", "XII"))
    vit = three[(three.arch == "vitc_ti") & (three.explainer == "bcos")]
    assert vit.ours.notna().all() and vit.study.isna().all() and len(vit) == 2
    lime = twelve[(twelve.explainer == "lime") & (twelve.arch == "resnet34") & (twelve.b == 1.25)]
    assert lime.ours.notna().all() and lime.study.isna().all() and len(lime) == 4
    assert {(2.5, "resnet34"), (2.5, "xception"), (2.0, "vitc_ti")} <= set(zip(twelve.b, twelve.arch))
    for cells in (three, four):
        constant = cells[cells.explainer.isin(CONSTANT)]
        assert len(constant) == 4 * 2 * 3 and constant.b.isna().all()  # once for each backbone
        assert (cells[cells.explainer == "saliency"].b.isna()).all() and not cells[cells.b.notna()].explainer.isin(POST_HOC).any()
    order = four[four.arch == "resnet34"].drop_duplicates(["b", "explainer"])[["explainer", "b"]].values.tolist()
    assert order[:4] == [["bcos", 1.25], ["bcos", 1.75], ["bcos", 2.0], ["bcos", 2.5]] and [name for name, _ in order[4:9]] == ["gradcam", "layercam", "xgradcam", "gradcam++", "lime"]
    assert [is_control(name) for name, _ in order] == sorted(is_control(name) for name, _ in order)


def test_missing_rows_stay_and_have_no_number(games):
    one = cell(localization_table_cells(games, "IV"), "resnet34", 1.75, "bcos")
    assert np.isnan(one.ours) and pd.isna(one.run) and one.study == 0.7940


def test_by_method(folder, games):
    scores = scores_of(folder, "mask", "resnet34-b2.5-c23")
    cells = method_cells(games)
    for weighting in ("weighted", "specificity"):
        some = scores[(scores.explainer == "gradcam") & (scores.weighting == weighting) & (scores.threshold == 0)]
        plain = some.groupby("method").score.mean()
        ours = cells[(cells.game == "mask") & (cells.arch == "resnet34") & (cells.b == 2.5) & (cells.explainer == "gradcam") & (cells.weighting == weighting)].set_index("method")
        assert set(ours.index) == set(METHODS) and np.allclose(ours.ours[plain.index], plain) and (ours.samples == 16).all()
    assert not cells.duplicated(["game", "run", "explainer", "method", "weighting"]).any()


def test_further_measures(folder, games):
    cells = measure_cells(games)
    scores = scores_of(folder, "mask", "vitc_ti-b2-c23").query("explainer == 'lime'")
    for measure, threshold in (("iou", 0.5), ("hit", 0.0), ("strength", 0.0), ("soft", 0.0)):
        plain = scores[(scores.weighting == measure) & (scores.threshold == threshold)].score.mean()
        assert cell(cells, "vitc_ti", 2.0, "lime", measure, "mask").ours == pytest.approx(plain)
    assert set(cells[cells.game == "grid"].weighting) == {"iou", "hit"}


def test_controls_are_differences_of_the_same_samples(folder, games):
    scores = scores_of(folder, "grid", "xception-b2.5-c23").query("weighting == 'weighted' and threshold == 0").pivot(index="sample", columns="explainer", values="score")
    rows = games.against[(games.against.game == "grid") & (games.against.run == "xception-b2.5-c23")].set_index(["explainer", "control"])
    for control, there in (("mean mask", "mean mask"), ("random weights", "bcos, random weights"), ("shuffled labels", "bcos, shuffled labels")):
        one = rows.loc[("bcos", control)]
        assert one.difference == pytest.approx((scores["bcos"] - scores[there]).mean()) and one.low < one.difference < one.high
    assert len(rows) == 7 * 3 and (rows.p_corrected >= rows.p).all() and rows.loc[("bcos", "random weights")].p == pytest.approx(2 / 2**SCENES)


# ---- figures

def test_an_empty_map_of_a_control_detector_is_nothing_to_be_better_than(tmp_path):
    """It scores 0, less than a map that is the same everywhere: the lead over it would be the whole score."""
    samples = game_samples("mask")
    scores = game_scores("mask", "resnet34", 2.0, ("bcos", "gradcam", "bcos, random weights", "gradcam, random weights", "mean mask"), samples, thresholds=(0.0,))
    scores.loc[scores["explainer"] == "bcos, random weights", "score"] = 0.0
    put(tmp_path / "mask_game" / "one", dict(arch="resnet34", b=2.0), dict(arch="resnet34", b=2.0, mask_area=MASK_AREA), {"scores": scores, "samples": samples})
    against = read_games(tmp_path).against.set_index(["explainer", "control"])
    assert ("bcos", "random weights") not in against.index and {("gradcam", "random weights"), ("bcos", "mean mask")} <= set(against.index)


def test_curves(folder, games):
    curves = figure_curves(games, 14)
    scores = scores_of(folder, "mask", "resnet34-ordinary-c23")
    for weighting in ("weighted", "unweighted", "specificity"):
        ours = curves[(curves.explainer == "xgradcam") & (curves.weighting == weighting)].set_index("threshold")
        plain = scores[(scores.explainer == "xgradcam") & (scores.weighting == weighting)].groupby("threshold").score.mean()
        assert np.allclose(ours.score[plain.index], plain) and len(ours) == 11 and (ours.low < ours.score).all() and (ours.score < ours.high).all()
    zero = curves[(curves.weighting == "weighted") & (curves.explainer == "bcos")].set_index(["b", "threshold"]).study
    assert zero[(2.5, 0.0)] == 0.8408 and zero.notna().sum() == 2
    assert set(curves[~curves.control].explainer) == {"bcos", *POST_HOC} and set(curves[curves.control & curves.b.isna()].explainer) >= set(CONSTANT)
    assert set(figure_curves(games, "grid_vit").arch) == {"vitc_ti"} and figure_curves(games, 5).game.eq("grid").all() and figure_curves(games, 16).study.notna().sum() == 12
    with pytest.raises(ValueError, match="no curves; choose one of 4, 5, 6, 14"):
        figure_curves(games, 12)


def test_figure_6_shows_what_the_study_chose(folder, games):
    curves = figure_curves(games, 6)
    rows = curves[["arch", "b", "explainer"]].drop_duplicates()
    mean = lambda name: scores_of(folder, "mask", name).query("explainer == 'bcos' and weighting == 'weighted' and threshold == 0").score.mean()
    best = max((1.25, 2.5), key=lambda b: mean(f"resnet34-b{b:g}-c23"))
    assert set(rows[rows.explainer == "bcos"][["arch", "b"]].itertuples(index=False, name=None)) == {("resnet34", best), ("xception", 2.5), ("vitc_ti", 2.0)}
    assert set(rows.explainer) == {"bcos", "layercam", "lime", *CONSTANT} and rows[rows.explainer.isin(["layercam", "lime"])].b.isna().all()
    assert (rows.explainer == "layercam").sum() == (rows.explainer == "lime").sum() == 3 and rows.explainer.isin(CONSTANT).sum() == 4


def test_boxes_are_numpys_quantiles(folder, games):
    boxes = figure_boxes(games, 12)
    scores = scores_of(folder, "grid", "resnet34-ordinary-c23").query("explainer == 'gradcam' and weighting == 'weighted' and threshold == 0").score.to_numpy()
    one = boxes[(boxes.explainer == "gradcam")].iloc[0]
    q1, median, q3 = np.percentile(scores, [25, 50, 75])
    within = scores[(scores >= q1 - 1.5 * (q3 - q1)) & (scores <= q3 + 1.5 * (q3 - q1))]
    assert (one.q1, one["median"], one.q3, one["mean"]) == pytest.approx((q1, median, q3, scores.mean())) and (one.lowerfence, one.upperfence) == pytest.approx((within.min(), within.max()))
    assert one.study == 0.3613 and len(one.outliers) == len(scores) - len(within) and set(figure_boxes(games, 13).arch) == {"xception"}


def test_drawn_curves_change_with_the_buttons(games):
    curves = figure_curves(games, 4)
    drawn = draw_curves(curves)
    for button, weighting in zip(drawn.layout.updatemenus[0].buttons, ("weighted", "unweighted", "specificity")):
        assert button.label == weighting and len(button.args[0]["y"]) == len(drawn.data)
        ours = curves[(curves.explainer == "bcos") & (curves.b == 2.5) & (curves.weighting == weighting)].score
        place = [trace.name for trace in drawn.data].index("B-cos, B = 2.5")
        assert np.allclose(button.args[0]["y"][place], ours)
    study = next(trace for trace in drawn.data if trace.name == "the study’s, at 0")
    assert set(study.y) == {0.1580, 0.0958, 0.3613, 0.3611, 0.2310, 0.3076, 0.1184}
    assert len([trace for trace in draw_boxes(figure_boxes(games, 13)).data if trace.type == "box"]) == 1 + len(POST_HOC) + len(CONSTANT)
    with pytest.raises(ValueError, match="no curves to draw"):
        draw_curves(curves.iloc[:0])


# ---- tables to look at

def test_html_says_what_is_missing_and_what_beats_its_controls(games):
    cells = localization_table_cells(games, "IV")
    text = table_html(localization_table(cells, games.against))
    shown = cells[[one in CONSTANT or not is_control(one) for one in cells.explainer]]
    assert text.count(">no run<") == shown.ours.isna().sum() > 0
    assert "ResNet-34: ours is ResNet-34 at width 0.25, 48 px, 4 epochs" in text and "random weights</th>" in text
    row = re.search(r"<tr><td class=\"text\">Grad-CAM</td>(.*?)</tr>", text).group(1)
    one = cell(cells, "resnet34", None, "gradcam")
    assert f"<span>{one.ours:.3f}</span>" in row.replace("<b>", "").replace("</b>", "") and "0.5518" in row and row.count("<td") == 6 and "64 fakes of 8 scenes" in row
    assert row.count('title="differs from 0"') == 0 or games.against.p_corrected.min() < 0.05


def test_every_table_has_control_rows_and_specificity(games):
    for number in LOCALIZATION_TABLES:
        made = localization_table(localization_table_cells(games, number), games.against)
        assert made.columns.count("Specificity") == len(made.top) - (made.top[-1][0] == "Weighted, minus that of")
        for heading, rows in made.groups:
            assert {"uniform map", "mean mask", "centre prior", "edges"} <= {name for name, _ in rows} or heading.endswith("no run of ours"), heading
    methods = spread_table(main_rows(method_cells(games).query("game == 'mask'")), "method", "weighting", "methods")
    assert methods.columns == ["Specificity", "Weighted"] * 4 or methods.columns == ["Weighted", "Specificity"] * 4
    assert all("mean mask" in dict(rows) for _, rows in methods.groups) and all(cell.sign for _, rows in methods.groups for _, cells in rows for cell in cells[methods.columns.index("Specificity")::2])


def test_agreement_of_four_digits(games):
    cells = localization_table_cells(games, "IV")
    both = cells[cells.ours.notna() & cells.study.notna()]
    inside = (both.study >= both.low - 0.0000501) & (both.study <= both.high + 0.0000501)
    assert (both.agreement.eq("within") == inside).all() and len(both) > 10 and not both.agreement.eq("").any()
    assert agreement(0.30, 0.29, 0.31, 0.3501, 4) == "higher" or agreement(0.30, 0.29, 0.31, 0.3501, 4) == "lower"


def test_files(games, tmp_path):
    for number in LOCALIZATION_TABLES:
        write_table(localization_table(localization_table_cells(games, number), games.against), tmp_path)
    again = pd.read_csv(tmp_path / "table_III.csv")
    pd.testing.assert_series_equal(again.ours, localization_table_cells(games, "III").ours)
    assert {path.name for path in tmp_path.iterdir()} == {f"table_{number}.{form}" for number in LOCALIZATION_TABLES for form in ("csv", "tex")}


def test_terminal(games):
    table = plain_frame(localization_table(localization_table_cells(games, "IV")))
    assert table.loc["ResNet-34, B-cos, B = 1.75"].tolist() == ["no run (0.2652)", "no run (0.7940)", "–"] and list(table) == ["Unweighted", "Weighted", "Specificity"]
    one = cell(localization_table_cells(games, "IV"), "resnet34", None, "lime")
    assert table.loc["ResNet-34, LIME", "Weighted"] == f"{one.ours:.3f} {one.low:.2f}–{one.high:.2f} (0.4933)" and "shuffled" not in "".join(table.index)
    twelve = plain_frame(localization_table(localization_table_cells(games, "XII")), roomy=False)
    assert twelve.loc["ResNet-34, B = 1.25, Grad-CAM", "Grid pointing game Weighted"].endswith("(0.2982)") and len(twelve.columns) == 6


# ---- other folders

def test_what_cannot_be_read_is_named(tmp_path):
    invent_games(tmp_path, backbones={"resnet10": (2.5,), "resnet34": (2.5,)}, pictures=False)
    first = tmp_path / "mask_game" / "resnet34-b2.5-c23"
    shutil.copytree(first, tmp_path / "mask_game" / "half")
    (tmp_path / "mask_game" / "half" / "metrics.json").unlink()
    shutil.copytree(first, tmp_path / "mask_game" / "lacking")
    samples = pd.read_parquet(first / "samples.parquet")
    samples.iloc[1:].to_parquet(tmp_path / "mask_game" / "lacking" / "samples.parquet")
    shutil.copytree(first, tmp_path / "mask_game" / "hard")
    pd.read_parquet(first / "scores.parquet").assign(compression="c40").to_parquet(tmp_path / "mask_game" / "hard" / "scores.parquet")
    (tmp_path / "mask_game" / "odd").mkdir()
    for name in ("metrics.json", "params.json"):
        (tmp_path / "mask_game" / "odd" / name).write_text("{")
    games = read_games(tmp_path)
    reasons = games.missing.set_index("run").reason
    assert set(reasons.index) == {"half", "lacking", "hard", "odd"} and samples["sample"][0] in reasons["lacking"] and "c40" in reasons["hard"] and "metrics.json" in reasons["half"]
    chosen = seats(games).query("game == 'mask'").iloc[0]
    assert chosen.run == "resnet34-b2.5-c23" and chosen.others == 1  # the very backbone before its relative
    assert localization_table(localization_table_cells(games, "III")).groups[0][0].startswith("ResNet-34: ours is")


def test_a_guided_training_does_not_stand_for_the_studys(tmp_path):
    """Its run comes first by name: in the tables, the claims, and in insertion, deletion and distance."""
    invent_games(tmp_path, backbones={"resnet34": (2.0,)}, pictures=False)
    name = "resnet34-b2-c23"
    for experiment in ("train", "mask_game", "grid_game"):
        shutil.copytree(tmp_path / experiment / name, tmp_path / experiment / "a-guided")
        params = json.loads((tmp_path / experiment / name / "params.json").read_text())
        changed = params | (dict(training=dict(epochs=4, guidance=1.0)) if experiment == "train" else dict(detector="../../train/a-guided"))
        (tmp_path / experiment / "a-guided" / "params.json").write_text(json.dumps(changed))
    for experiment, tables in (("mask_game", {"scores": "score", "faithfulness": "probability"}), ("grid_game", {"scores": "score", "departure": "score"})):
        for file, column in tables.items():
            path = tmp_path / experiment / "a-guided" / f"{file}.parquet"
            pd.read_parquet(path).assign(**{column: 0.0}).to_parquet(path)
    sitting = seats(read_games(tmp_path))
    assert list(sitting["run"]) == [name, name] and list(sitting["others"]) == [1, 1]
    assert OurTables(tmp_path).score("mask", "resnet34", "bcos", 2.0).value > 0.1
    assert set(faithfulness_rows(read_side_tables(tmp_path, "faithfulness"))["run"]) == {name}
    assert departure_rows(read_side_tables(tmp_path, "departure"))["near"].min() > 0.1
    report = Report(tmp_path)
    shown = []
    report.show_figure = lambda name, title, figure, *more: shown.append(figure)
    report.show = lambda markup: None
    report.distance()
    first = next(trace for trace in shown[0].data if trace.name.startswith("B-cos"))
    assert first.y[0] == pytest.approx(0.61), "the mean of the run without guidance, not of both"


def test_runs_from_before_the_scenes_are_read(tmp_path):
    invent_runs(tmp_path, b_values=(None, 2.0), size=16)
    games = read_games(tmp_path)
    one = cell(localization_table_cells(games, "IV"), "resnet34", 2.0, "bcos")
    assert one.ours == pytest.approx(0.4) and one.scenes == 16 and np.isnan(one.specificity)
    assert set(method_cells(games).method) == set(METHODS) and localization_table_cells(games, "III").ours.notna().any()
    assert not localization_table(localization_table_cells(games, "III"), games.against).empty


def test_nothing_to_show(tmp_path):
    with pytest.raises(FileNotFoundError, match="bcos-nb run games --preset mini"):
        read_games(tmp_path)
    (tmp_path / "grid_game" / "begun").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="1 are not complete"):
        localization_table_cells(tmp_path, "III")


def test_another_cell_count_has_another_chance(tmp_path):
    samples = game_samples("grid")
    put(tmp_path / "grid_game" / "two", dict(arch="resnet34", b=2.0, n=2, fakes=2), dict(arch="resnet34", b=2.0, n=2),
        {"scores": game_scores("grid", "resnet34", 2.0, ("bcos",), samples, thresholds=(0.0,)), "samples": samples})
    games = read_games(tmp_path)
    assert games.players.chance.item() == 0.5 and figure_curves(games, 4).chance.eq(0.5).all()
    expected = np.mean([game_level("grid", 2.0, "bcos", "weighted")]) + 0.015
    assert cell(localization_table_cells(games, "III"), "resnet34", 2.0, "bcos").ours == pytest.approx(expected, abs=0.08)
    assert localization_table(localization_table_cells(games, "IV")).empty and not localization_table(localization_table_cells(games, "III"), games.against).empty
