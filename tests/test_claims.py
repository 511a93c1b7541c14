"""The study's claims: numbers against scikit-learn, NumPy and the games' own tests; verdicts against planted effects; the study's sentences against its printed tables."""
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from bcos_nb.detection.metrics import bootstrap_intervals, video_scores
from bcos_nb.games.statistics import compare_explainers
from bcos_nb.reports.claims import (
    CLAIMS, OTHER_SETS, Claim, Draws, Estimate, OurTables, StudyTables, claim, claim_rows, claims_html, claims_table, drawn_auc, drawn_metric, enumerated, judge, mean_of,
    scenes_of, unknown, wins_by_video,
)
from bcos_nb.reports.page import loads_from_network
from bcos_nb.reports.paper import read_paper
from invented_runs import invent_games, invent_runs, put

METHODS = ("Deepfakes", "Face2Face")


def plant_detection(root, arch, b, separation, *, real=14, fake=28, seed=0, tests=(("FaceForensics++", "c23"),), name=None, **about):
    """A detection run whose fakes lie so many standard deviations above the real frames; what is hard is hard for every detector."""
    rng, shared, parts = np.random.default_rng([seed, 1 + int(100 * (b or 0)), *arch.encode()]), np.random.default_rng([seed, 0]), []
    for dataset, compression in tests:
        label = np.repeat([0] * real + [1] * fake, 4)
        logit = separation * label + np.repeat(shared.normal(0, 0.8, real + fake), 4) + rng.normal(0, 0.6, len(label))
        parts.append(pd.DataFrame({"frame": [f"{k}.png" for k in range(len(label))], "video": [f"video {k // 4}" for k in range(len(label))], "label": label, "method": "all",
                                   "probability": 1 / (1 + np.exp(-logit)), "dataset": dataset, "compression": compression}))
    name = name or f"{arch}-{'ordinary' if b is None else f'b{b:g}'}"
    put(root / "detect" / name, dict(arch=arch, b=b, dataset="FaceForensics++") | about, dict(arch=arch, b=b, c23={"auc": 0.5}), {"scores": pd.concat(parts)})
    return pd.concat(parts)


def plant_game(root, game, arch, b, levels, *, scenes=14, seed=0, thresholds=(0.0, 0.5), spread=0.06):
    """A run of a game with a mean score for each explainer at each threshold; scenes shift all rows alike."""
    rng, shared = np.random.default_rng([seed, 1 + int(100 * (b or 0)), *arch.encode()]), np.random.default_rng([seed, 0]).normal(0, spread, scenes)
    samples = pd.DataFrame([dict(sample=f"{'grid-0000 ' if game == 'grid' else ''}{method}/{scene}.png", video=f"{method}/{scene}", scene=f"scene {scene}", method=method)
                            for method in METHODS for scene in range(scenes)])
    rows = []
    for explainer, level in levels.items():
        for threshold, value in zip(thresholds, level if isinstance(level, tuple) else (level, level)):
            score = value + np.tile(shared, len(METHODS)) + rng.normal(0, 0.02, len(samples))
            rows += [dict(game=game, arch=arch, b=b, explainer=explainer, dataset="FaceForensics++", compression="c23", sample=sample, threshold=threshold, weighting=weighting, score=one)
                     for weighting in ("weighted", "unweighted") for sample, one in zip(samples["sample"], score)]
    name = f"{arch}-{'ordinary' if b is None else f'b{b:g}'}"
    put(root / f"{game}_game" / name, dict(arch=arch, b=b), dict(arch=arch, b=b, n=3), {"scores": pd.DataFrame(rows).astype({"b": float}), "samples": samples})
    return pd.DataFrame(rows).merge(samples, on="sample")


def verdict_of(root, start):
    """The table's row of the claim that begins so."""
    found, = [one for words, one in CLAIMS.items() if words.startswith(start)]
    return claims_table(root, [found]).iloc[0]


def normal(value, spread, seed=0, videos=1000):
    return Estimate(value, value + spread * np.random.default_rng(seed).standard_normal(8000), videos=videos)


# ---- estimates


def test_formulas_of_estimates_are_those_of_numbers():
    a, b = normal(0.8, 0.02), normal(0.5, 0.03, 1)
    for made, value, draws in ((a - b, 0.3, a.draws - b.draws), (a / b, 1.6, a.draws / b.draws), (2 - a, 1.2, 2 - a.draws), (a * -1, -0.8, -a.draws), (0.1 + a, 0.9, 0.1 + a.draws),
                               (mean_of([a, b, 0.2]), 0.5, (a.draws + b.draws + 0.2) / 3)):
        assert made.value == pytest.approx(value) and np.allclose(made.draws, draws)


def test_an_interval_is_that_of_a_normal_distribution():
    low, high = normal(0.3, 0.05).interval()
    assert (low, high) == pytest.approx((0.3 - 1.96 * 0.05, 0.3 + 1.96 * 0.05), abs=0.005)
    low, high = normal(0.3, 0.05).interval(200)  # further out than 8000 draws reach
    assert (high - low) / 2 == pytest.approx(stats.norm.ppf(1 - 0.025 / 200) * 0.05, rel=0.08)
    few = normal(0.3, 0.05, videos=8).interval()
    assert few[1] - 0.3 == pytest.approx(stats.t.ppf(0.975, 7) * math.sqrt(8 / 7) * 0.05, rel=0.06)  # Hesterberg 2015


def test_rounding_adds_up():
    a, b = Estimate(0.84, rounding=0.005), Estimate(0.82, rounding=0.005)
    assert (a - b).interval() == pytest.approx((0.01, 0.03)) and mean_of([a, b]).interval() == pytest.approx((0.825, 0.835))
    assert (a / b).rounding == pytest.approx(0.005 / 0.82 + 0.84 * (1 / 0.82 - 1 / 0.825), rel=0.01)


def test_what_is_missing_is_carried_along():
    both = normal(1, 1) - unknown("no run: A") + unknown("no run: B") - unknown("no run: A")
    assert math.isnan(both.value) and both.lacks == ("no run: A", "no run: B")
    assert enumerated([f"no run: {k}" for k in "ABCD"] + ["not tested: E"]) == "no run (A; B and 2 more), not tested (E)"


# ---- detection


def test_auc_of_frames_with_ties_and_uneven_videos_is_scikit_learns():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 9, 200)
    scores = pd.DataFrame({"video": [f"v{k}" for k in video], "label": (video > 3).astype(int), "probability": np.round(rng.random(200) * 0.7 + 0.3 * (video > 3), 1)})
    wins, fakes, reals = wins_by_video(scores)
    assert wins.shape == (5, 4) and fakes.sum() + reals.sum() == 200
    once = np.ones((1, 5)), np.ones((1, 4))
    assert drawn_auc(wins, fakes, reals, once)[0] == pytest.approx(roc_auc_score(scores["label"], scores["probability"]))
    counts = rng.integers(0, 4, (20, 5)) + 0.0, rng.integers(1, 4, (20, 4)) + 0.0
    weights = [scores["video"].map(dict(zip([f"v{k}" for k in (4, 5, 6, 7, 8, 0, 1, 2, 3)], [*fake, *real]))) for fake, real in zip(*counts)]
    assert np.allclose(drawn_auc(wins, fakes, reals, counts), [roc_auc_score(scores["label"], scores["probability"], sample_weight=weight) for weight in weights])


def test_intervals_are_those_of_the_detection_tables(tmp_path):
    scores = plant_detection(tmp_path, "resnet34", None, 1.2, real=40, fake=40)
    theirs = bootstrap_intervals(scores["label"], scores["probability"], scores["video"], resamples=4000)
    draws = Draws(4000)
    for metric in ("auc", "recall"):
        ours = drawn_metric(metric, scores, draws)
        assert np.quantile(ours.draws, [0.025, 0.975]) == pytest.approx(theirs[metric], abs=0.008)
    videos = video_scores(scores)
    assert OurTables(tmp_path).auc("resnet34", level="video").value == pytest.approx(roc_auc_score(videos["label"], videos["probability"]))


@pytest.mark.parametrize("fake, real", [
    ("Deepfakes/006_037", "real/006"), ("FaceShifter/123_456", "real/123"), ("Celeb-DF-v2/id2_id34_0000", "real/id2_0000"), ("DFDCP A/115841_A_000_448439", "real/115841_A_000"),
    ("DeepFakeDetection/01_02__exit_phone_room__UPWNWFQA", "real/01__exit_phone_room"), ("UADFV/0000_fake", "real/0000"),
])
def test_a_fake_is_of_the_scene_of_its_real_video(fake, real):
    assert scenes_of([fake, "Deepfakes/999_998", "video 3"], ["real/elsewhere", real]) == [real, "Deepfakes/999_998", "video 3", "real/elsewhere", real]


def test_claims_on_detection_draw_scenes_as_those_on_games_do():
    """Two fakes of each real video that stand and fall with it: draws are those of as many scenes, and wider than those of twice as many videos."""
    rng, rows = np.random.default_rng(0), []
    for scene in range(20):
        shift = rng.normal(0, 0.25)
        rows += [dict(video=f"real/{scene:03d}", label=0, probability=0.4 + rng.normal(0, 0.05))]
        rows += [dict(video=f"{method}/{scene:03d}_{(scene + 1) % 20:03d}", label=1, probability=0.5 + shift + rng.normal(0, 0.01)) for method in METHODS]
    scores, draws = pd.DataFrame(rows), Draws(4000)
    ours = drawn_metric("recall", scores, draws)
    share = scores[scores["label"] == 1].assign(called=lambda rows: rows["probability"] >= 0.5, scene=lambda rows: rows["video"].str.extract(r"/(\d+)_")[0]).groupby("scene")["called"].mean()
    by_scene = share.std(ddof=0) / math.sqrt(len(share))
    assert ours.draws.std() == pytest.approx(by_scene, rel=0.1) and ours.videos == 20
    apart = drawn_metric("recall", scores.assign(video=[f"{name} {k}" for k, name in enumerate(scores["video"])]), draws)  # names that don't tell
    assert apart.draws.std() < 0.8 * ours.draws.std() and apart.videos == 40
    for scenes in (ours, drawn_metric("auc", scores, draws)):
        assert np.isfinite(scenes.draws).all()
    auc = drawn_metric("auc", scores, draws)
    counts = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20), size=600)  # a plain loop, with scikit-learn
    number = scores["video"].str.extract(r"/(\d+)")[0].astype(int)
    loop = [roc_auc_score(scores["label"], scores["probability"], sample_weight=one[number]) for one in counts]
    assert auc.draws.std() == pytest.approx(np.std(loop), rel=0.12)


def test_a_detector_does_not_differ_from_itself(tmp_path):
    plant_detection(tmp_path, "resnet34", None, 1.0)
    plant_detection(tmp_path, "resnet34", 2.0, 1.0)
    tables = OurTables(tmp_path)
    same, other = tables.auc("resnet34") - tables.auc("resnet34"), tables.auc("resnet34", 2.0) - tables.auc("resnet34")
    assert same.interval() == (0, 0)
    alone = [np.diff(tables.auc("resnet34", b).interval())[0] for b in (None, 2.0)]
    assert np.diff(other.interval())[0] < 0.6 * np.hypot(*alone)  # what the videos do to both cancels


def test_the_very_backbone_stands_before_its_relatives_and_other_trainings_are_left_out(tmp_path):
    plant_detection(tmp_path, "resnet10", None, 3.0, name="a")
    plant_detection(tmp_path, "resnet34", None, 1.0, name="b")
    plant_detection(tmp_path, "resnet34", None, 2.0, name="c", seed=1)
    plant_detection(tmp_path / "df-tp-ffhq", "resnet34", 2.0, 2.5, name="d", tests=[("df-tp-ffhq", None)], dataset="df-tp-ffhq")
    tables = OurTables(tmp_path)
    expected = pd.read_parquet(tmp_path / "detect" / "b" / "scores.parquet")
    assert tables.auc("resnet34").value == pytest.approx(roc_auc_score(expected["label"], expected["probability"]))
    assert "no detection run" in tables.auc("resnet34", 2.0).lacks[0] and tables.auc("resnet34", 2.0, "FFHQ", train_set="FFHQ").value > 0.9


# ---- games


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    root = tmp_path_factory.mktemp("games")
    ordinary = plant_game(root, "mask", "resnet34", None, {"gradcam": 0.40, "layercam": 0.41, "xgradcam": 0.40, "gradcam++": 0.39, "lime": 0.3})
    bcos = plant_game(root, "mask", "resnet34", 2.0, {"bcos": (0.6, 0.8), "gradcam": 0.35})
    return root, ordinary, bcos


def test_scores_are_means_over_samples(played):
    root, ordinary, bcos = played
    tables = OurTables(root)
    mean = lambda table, explainer, threshold: table.query("explainer == @explainer and threshold == @threshold and weighting == 'weighted'").score.mean()
    assert tables.score("mask", "resnet34", "gradcam").value == pytest.approx(mean(ordinary, "gradcam", 0.0))
    assert tables.score("mask", "resnet34", "bcos", 2.0, threshold=0.5).value == pytest.approx(mean(bcos, "bcos", 0.5))
    assert "played without RISE" in tables.score("mask", "resnet34", "rise").lacks[0]


def test_differences_within_and_between_detectors_are_as_sure_as_the_games_tests_say(played):
    root, ordinary, bcos = played
    tables, both = OurTables(root), pd.concat([ordinary, bcos])
    both = both[(both["threshold"] == 0) & (both["weighting"] == "weighted")]
    for difference, rows in ((tables.score("mask", "resnet34", "bcos", 2.0) - tables.score("mask", "resnet34", "gradcam", 2.0), both[both["b"] == 2.0]),
                             (tables.score("mask", "resnet34", "bcos", 2.0) - tables.score("mask", "resnet34", "gradcam"),
                              both[((both["b"] == 2.0) & (both["explainer"] == "bcos")) | (both["b"].isna() & (both["explainer"] == "gradcam"))])):
        theirs = compare_explainers(rows, "explainer", against="gradcam", by=["explainer"], group="scene", permutations=999).iloc[0]
        assert difference.value == pytest.approx(theirs["difference"])
        assert difference.interval() == pytest.approx((theirs["low"], theirs["high"]), abs=0.004)


# ---- verdicts


@pytest.mark.parametrize("separations, verdict", [((2.5, 1.0, 1.0), "confirmed"), ((1.0, 2.5, 1.0), "refuted"), ((1.2, 1.2, 1.2), "not decidable")])
def test_a_planted_difference_of_detectors_is_found(tmp_path, separations, verdict):
    for arch, exponents in (("resnet34", (None, 1.25, 1.75, 2.0, 2.5)), ("xception", (None, 2.5))):
        for b in exponents:
            plant_detection(tmp_path, arch, b, separations[{None: 0, 1.25: 1}.get(b, 2)])
    found = verdict_of(tmp_path, "B-cosification costs CNNs AUC")
    assert found["verdict"] == verdict and "no detection run (" not in found["why"]
    assert (found["high"] < 0) == (verdict == "confirmed") and (found["low"] > 0) == (verdict == "refuted")
    assert min(abs(found["study"] - printed) for printed in (-0.10, -0.06, -0.04, -0.23)) < 1e-9 and found["study says"] == "supports it"


@pytest.mark.parametrize("separation, verdict", [(1.0, "not decidable"), (2.9, "refuted")])
def test_what_is_said_of_all_waits_for_those_that_are_missing(tmp_path, separation, verdict):
    """One B-cos ResNet-34 of four, and no Xception: that it is worse confirms nothing of all CNNs, that it is better refutes it."""
    plant_detection(tmp_path, "resnet34", None, 2.2 if verdict == "not decidable" else 1.0)
    plant_detection(tmp_path, "resnet34", 1.25, separation)
    found = verdict_of(tmp_path, "B-cosification costs CNNs AUC")
    assert found["verdict"] == verdict and "no detection run (" in found["why"] and found["row"] == "ResNet-34, B = 1.25"
    assert (found["high"] < 0) == (verdict == "not decidable") and (found["low"] > 0) == (verdict == "refuted")
    if verdict == "not decidable":
        assert found["why"].startswith("The one row that there is holds; 4 are missing.")


def test_what_is_said_of_some_is_not_refuted_while_some_are_missing():
    of = lambda need, *rows: judge(Claim("", "", lambda tables: {}, need=need), {str(k): row for k, row in enumerate(rows)})
    good, bad, absent = normal(0.2, 0.02), normal(-0.2, 0.02, 1), unknown("no run: A")
    assert [of("any", *rows).verdict for rows in ((bad, bad), (bad, bad, absent), (good, bad, absent))] == ["refuted", "not decidable", "confirmed"]
    assert [of("all", *rows).verdict for rows in ((good, good), (good, good, absent), (good, bad, absent))] == ["confirmed", "not decidable", "refuted"]
    assert "All 2 rows that there are hold, the one with least to spare is shown; 1 is missing. Missing: no run (A)." == of("all", good, good, absent).why
    assert of("mean", good, good, absent).verdict == "confirmed"


@pytest.mark.parametrize("bcos, verdict", [(0.6, "confirmed"), (0.2, "refuted"), (0.4, "not decidable")])
def test_a_planted_lead_in_the_mask_game_is_found(tmp_path, bcos, verdict):
    plant_game(tmp_path, "mask", "resnet34", None, dict.fromkeys(("gradcam", "layercam", "xgradcam", "gradcam++"), 0.4))
    plant_game(tmp_path, "mask", "resnet34", 2.0, {"bcos": bcos})
    found = verdict_of(tmp_path, "B-cos tends to beat the CAMs")
    assert found["verdict"] == verdict and found["n"] == 14 and found["row"] == "mean of 4"
    assert found["effect"] == pytest.approx(bcos - 0.4, abs=0.02) and found["low"] < bcos - 0.4 < found["high"]


@pytest.mark.parametrize("lime, verdict", [(0.12, "confirmed"), (0.4, "refuted"), (0.17, "not decidable")])
def test_near_uniform_means_within_a_margin(tmp_path, lime, verdict):
    for arch in ("resnet34", "xception"):
        plant_game(tmp_path, "grid", arch, None, {"lime": lime}, spread=0.02)
    assert verdict_of(tmp_path, "LIME is near uniform")["verdict"] == verdict


@pytest.mark.parametrize("gain, exception, verdict", [(0.2, -0.2, "confirmed"), (0.2, 0.2, "refuted"), (-0.2, -0.2, "refuted")])
def test_thresholds_help_all_but_the_largest_b(tmp_path, gain, exception, verdict):
    plant_game(tmp_path, "grid", "resnet34", None, {name: (0.3, 0.3 + gain) for name in ("gradcam", "layercam", "xgradcam", "gradcam++", "lime")})
    for b in (1.25, 1.75, 2.0):
        plant_game(tmp_path, "grid", "resnet34", b, {"bcos": (0.3, 0.3 + gain)})
    plant_game(tmp_path, "grid", "resnet34", 2.5, {"bcos": (0.3, 0.3 + exception)})
    found = verdict_of(tmp_path, "On ResNet-34, thresholding helps all")
    assert found["verdict"] == verdict and found["study says"] == "prints no number" and math.isnan(found["study"])


def test_verdict_and_interval_never_disagree():
    rng = np.random.default_rng(0)
    for k in range(300):
        made = Claim("", "", lambda tables: {}, holds=("above", "below", "within")[k % 3], bound=(0.0, 0.05)[k % 3 == 2], need=("all", "any", "mean")[k // 3 % 3])
        rows = {str(n): normal(rng.normal(0, 0.08), 0.02, int(rng.integers(1 << 30))) for n in range(rng.integers(1, 6))}
        found, (least, most) = judge(made, rows), made.region
        inside, outside = found.low > least and found.high < most, found.high < least or found.low > most
        assert (found.verdict == "confirmed") == inside and (found.verdict == "refuted") == outside
        assert found.row in set(found.rows["row"]) and found.low <= found.effect <= found.high


def test_all_any_and_mean_need_what_they_say():
    verdict = lambda need, *levels: judge(Claim("", "", lambda tables: {}, need=need), {str(k): normal(level, 0.02, k) for k, level in enumerate(levels)}).verdict
    assert [verdict("all", *levels) for levels in ((0.1, 0.2), (0.1, -0.1), (0.1, 0.0), (-0.1, -0.1))] == ["confirmed", "refuted", "not decidable", "refuted"]
    assert [verdict("any", *levels) for levels in ((0.1, -0.2), (-0.1, -0.1), (-0.1, 0.0))] == ["confirmed", "refuted", "not decidable"]
    assert [verdict("mean", *levels) for levels in ((0.3, -0.1), (-0.3, 0.1), (0.1, -0.1))] == ["confirmed", "refuted", "not decidable"]


def test_one_of_many_rows_is_not_contrary_for_being_so_by_chance():
    rows = {"odd": normal(-0.045, 0.02), **{str(k): normal(0.2, 0.02, k) for k in range(12)}}
    assert judge(Claim("", "", lambda tables: {}), {"odd": rows["odd"]}).verdict == "refuted"
    found = judge(Claim("", "", lambda tables: {}), rows)
    assert found.verdict == "not decidable" and found.row == "odd" and "12 of 13 rows hold, 1 is contrary" in found.why


# ---- what is missing


def test_an_empty_folder_decides_nothing_and_says_why(tmp_path):
    table = claims_table(tmp_path)
    assert len(table) == len(CLAIMS) >= 40 and (table["verdict"] == "not decidable").all()
    assert table["why"].str.contains("no detection run|no run of the|no hyperparameter search|one B only|no run of any").all()
    assert claims_html(tmp_path).count('<div class="one">') == len(CLAIMS) and claim_rows(tmp_path).empty
    with pytest.raises(FileNotFoundError, match="bcos-nb demo"):
        claims_table(tmp_path / "nowhere")


def test_one_class_one_video_one_scene_and_divergence_are_named(tmp_path):
    scores = plant_detection(tmp_path, "resnet34", None, 2.0)
    folder = tmp_path / "detect" / "resnet34-ordinary"
    for kept, words in ((scores[scores["label"] == 1], "28 fake and 0 real"), (scores[(scores["label"] == 1) | (scores["video"] == "video 0")], "28 fake and 1 real"),
                        (scores.assign(probability=np.nan), "diverged"), (scores[:0], "not tested on FaceForensics")):
        kept.to_parquet(folder / "scores.parquet")
        assert words in OurTables(tmp_path).auc("resnet34").lacks[0]
    plant_game(tmp_path, "mask", "resnet34", None, {"gradcam": 0.4}, scenes=1)
    assert "one scene only" in OurTables(tmp_path).score("mask", "resnet34", "gradcam").lacks[0]


def test_broken_and_foreign_runs_are_left_out_by_name(tmp_path):
    plant_game(tmp_path, "mask", "resnet34", None, {"gradcam": 0.4})
    for name, change in (("other", dict(dataset="Celeb-DF-v2")), ("compressed", dict(compression="c40"))):
        scores = pd.read_parquet(tmp_path / "mask_game" / "resnet34-ordinary" / "scores.parquet").assign(**change)
        put(tmp_path / "mask_game" / name, dict(arch="xception", b=None), dict(arch="xception", b=None), {"scores": scores})
    (tmp_path / "grid_game" / "broken").mkdir(parents=True)
    (tmp_path / "grid_game" / "broken" / "metrics.json").write_text("{")
    tables = OurTables(tmp_path)
    assert len(tables.left_out) == 3 and sum("Celeb-DF-v2" in reason for reason in tables.left_out) == 1 and any("broken" in reason for reason in tables.left_out)
    assert tables.score("mask", "xception", "gradcam").lacks and not tables.score("mask", "resnet34", "gradcam").lacks


def test_runs_as_the_experiments_write_them_are_read(tmp_path):
    invent_games(tmp_path / "games", pictures=False, backbones={"resnet34": (None, 2.5), "xception": (None, 2.5)})
    table = claims_table(tmp_path / "games").set_index("claim")
    assert table.loc["B-cos tends to beat the CAMs in the weighted mask game.", "verdict"] == "confirmed"  # invented so
    invent_runs(tmp_path / "demo", b_values=(None, 2.0))
    assert {"confirmed", "refuted"} & set(claims_table(tmp_path / "demo")["verdict"])


# ---- the study


def test_the_studys_effects_are_those_of_its_tables():
    study, printed, games = StudyTables(), read_paper("detection"), read_paper("localization")
    auc = printed[(printed["table"] == "VII") & (printed["metric"] == "auc")].set_index(["arch", "b"])["value"]
    found = judge(CLAIMS["The ViT gains from B-cosification at each B."], CLAIMS["The ViT gains from B-cosification at each B."].rows(study))
    assert found.verdict == "confirmed" and found.effect == pytest.approx(auc["vitc_ti", 1.25] - auc["vitc_ti"].iloc[0])
    elsewhere = printed[(printed["table"] == "IX") & (printed["metric"] == "auc") & printed["test_set"].isin(OTHER_SETS)]
    mean = elsewhere.groupby(["arch", "b"], dropna=False)["value"].mean()
    struggle = CLAIMS["All models struggle with forgeries that they were not trained on."].rows(study)
    drops = {(arch, b): auc.loc[arch][b] - value for (arch, b), value in mean.items() if not math.isnan(b)}
    assert len(struggle) == 12 and struggle["ResNet-34, B = 2"].value == pytest.approx(drops["resnet34", 2.0])
    weighted = games[(games["table"] == "IV") & (games["weighting"] == "weighted")]
    cams, bcos = (weighted[weighted["explainer"].isin(names)] for names in (["gradcam", "layercam", "xgradcam", "gradcam++"], ["bcos"]))
    leads = [own - other for arch in ("resnet34", "xception", "vitc_ti") for own in bcos[bcos["arch"] == arch]["score"] for other in cams[cams["arch"] == arch]["score"]]
    tends = judge(CLAIMS["B-cos tends to beat the CAMs in the weighted mask game."], CLAIMS["B-cos tends to beat the CAMs in the weighted mask game."].rows(study))
    assert len(leads) == 36 and tends.effect == pytest.approx(np.mean(leads)) and (tends.rows["holds"] == -1).sum() == sum(lead < -1e-4 for lead in leads)


def test_which_sentences_the_studys_own_tables_contradict():
    """By hand: Table I rises 0.78, 0.82, 0.84; Table IX has Xception at 0.59 of 0.98; Table IV has B = 2 below the CAMs, Table XII 0.16 beside 0.30, and so on."""
    study = StudyTables()
    against = {one.words for one in CLAIMS.values() if judge(one, one.rows(study)).verdict == "refuted"}
    assert against == {
        "For CNNs, increasing B consistently hurts discrimination.", "On other datasets the AUC drops by up to 0.23.", "B-cos models generalise a little better, by their relative drop.",
        "At c40 the models still perform reasonably.", "For CNNs, increasing B consistently hurts localization.", "All explainers localize better in grids with Xception than with ResNet-34.",
        "B-cos beats the Grad-CAM variants in the weighted mask game.",
        "On one and the same B-cos network, all explainers do alike in the grid game and the unweighted mask game."}


def test_every_claim_has_a_source_a_reading_and_a_heading():
    for words, one in CLAIMS.items():
        assert words == one.words and words.endswith(".") and ("Section" in one.source or "Appendix" in one.source or "not in the study" in one.source)
        assert one.rows.__doc__ and one.about != "Other claims" and one.reading.endswith(".")
    assert sum("not in the study" in one.source for one in CLAIMS.values()) == 1


# ---- registry and page


def test_a_reader_can_add_a_claim(tmp_path):
    plant_detection(tmp_path, "resnet34", None, 2.5)
    try:
        for bound in (0.99, 0.6):  # the second replaces the first
            @claim("A <test> of mine.", source="mine", bound=bound)
            def mine(tables):
                """AUC of the ordinary ResNet-34."""
                return {"it": tables.auc("resnet34")}
        table = claims_table(tmp_path)
        assert (table["claim"] == "A <test> of mine.").sum() == 1 and table.iloc[-1]["verdict"] == "confirmed" and table.iloc[-1]["study"] == 0.88
        page = claims_html(tmp_path)
        assert "A &lt;test&gt; of mine." in page and "<test>" not in page and "Other claims" in page
    finally:
        del CLAIMS["A <test> of mine."]
    for wrong in (dict(holds="over"), dict(need="some")):
        with pytest.raises(ValueError, match="choose one of"):
            claim("It is wrong.", source="mine", **wrong)


def test_the_page_tells_verdicts_by_sign_and_word_and_loads_nothing(played):
    page, table = claims_html(played[0]), claims_table(played[0])
    for verdict, sign in (("confirmed", "✓"), ("refuted", "✗"), ("not decidable", "?")):
        assert page.count(f"<i>{sign}</i>{verdict}</div>") == (table["verdict"] == verdict).sum()
    assert not loads_from_network(page) and "says nothing about real forgeries" in page and "nan" not in page.lower().replace("finance", "")
    rows = claim_rows(played[0])
    assert {"claim", "row", "effect", "low", "high", "videos", "holds", "study"} == set(rows) and rows["effect"].notna().all() and set(rows["claim"]) <= set(CLAIMS)
    json.dumps(table.to_dict("records"))


# ---- how often it is right


@pytest.mark.slow
def test_intervals_cover_the_truth_and_nothing_is_seldom_found(tmp_path):
    """200 invented folders: a true lead of 0.1 lies in its interval, and where there is none, few verdicts say that there is."""
    lead = CLAIMS["B-cos tends to beat the CAMs in the weighted mask game."]
    covered, decided = 0, 0
    for seed in range(200):
        root = tmp_path / str(seed)
        plant_game(root, "mask", "resnet34", None, {"gradcam": 0.4}, seed=seed, scenes=12)
        plant_game(root, "mask", "resnet34", 2.0, {"bcos": 0.5}, seed=seed + 10_000, scenes=12)
        plant_game(root, "mask", "xception", None, {"gradcam": 0.4}, seed=seed + 20_000, scenes=12)
        plant_game(root, "mask", "xception", 2.5, {"bcos": 0.4}, seed=seed + 30_000, scenes=12)
        rows = lead.rows(OurTables(root, draws=1000))
        low, high = rows["ResNet-34, B = 2 over Grad-CAM"].interval()
        covered += low < 0.1 < high
        null = judge(lead, {"null": rows["Xception, B = 2.5 over Grad-CAM"]})
        decided += null.verdict != "not decidable"
    assert 0.91 <= covered / 200 <= 0.99 and decided / 200 <= 0.09


@pytest.mark.slow
def test_a_claim_on_many_rows_is_seldom_refuted_by_chance():
    """20 rows at the bound itself: refuted in at most 5 % of 400 draws, by Bonferroni, and hardly ever confirmed."""
    made, rng, refuted, confirmed = Claim("", "", lambda tables: {}), np.random.default_rng(0), 0, 0
    for _ in range(400):
        noise = rng.normal(0, 0.02, 20)
        rows = {str(k): Estimate(noise[k], noise[k] + rng.normal(0, 0.02, 2000), videos=1000) for k in range(20)}
        verdict = judge(made, rows).verdict
        refuted, confirmed = refuted + (verdict == "refuted"), confirmed + (verdict == "confirmed")
    assert refuted / 400 <= 0.08 and confirmed == 0
