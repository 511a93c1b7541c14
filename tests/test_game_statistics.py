"""Intervals, tests and boxes of the games against SciPy, matplotlib, and loops that do the same frame by frame."""
import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import boxplot_stats
from scipy import stats

from bcos_nb.games import SCORE_COLUMNS, box_data, compare_explainers, describe_samples, score_intervals
from bcos_nb.games.statistics import BY, corrected, label_permutation_test, percentile_tail, sign_flip_test


def a_catalog(videos=6, frames=3, methods=("Deepfakes", "FaceSwap")):
    return pd.DataFrame(
        [{"frame": f"rgb/{m}/{v:03}/{f:03}.png", "video": f"{m}/{v:03}", "method": m, "label": 1} for m in methods for v in range(videos) for f in range(frames)]
    )


def played(samples, scores, game="mask", arch="resnet34", b=2.0, explainer="bcos", threshold=0.0, weighting="weighted"):
    fixed = dict(game=game, arch=arch, b=b, explainer=explainer, dataset="FaceForensics++", compression="c23", threshold=threshold, weighting=weighting)
    return pd.DataFrame({"sample": list(samples), "score": np.asarray(scores, dtype=float), **fixed})[list(SCORE_COLUMNS)]


def some_scores(catalog, explainers=("bcos", "gradcam", "layercam"), seed=0, **row):
    random = np.random.default_rng(seed)
    easy = dict(zip(sorted(set(catalog["video"])), random.normal(0, 0.1, catalog["video"].nunique())))
    parts = [played(catalog["frame"], 0.4 + 0.05 * k + catalog["video"].map(easy) + random.normal(0, 0.05, len(catalog)), explainer=name, **row) for k, name in enumerate(explainers)]
    return pd.concat(parts, ignore_index=True)


def test_samples_of_both_games_find_their_video_and_method():
    catalog = a_catalog()
    table = describe_samples(some_scores(catalog), catalog)
    assert table["video"].tolist() == catalog["video"].tolist() * 3 and table["method"].tolist() == catalog["method"].tolist() * 3
    assert list(table.columns) == [*SCORE_COLUMNS, "video", "method"]
    grids = describe_samples(played([f"grid-{n:04} {frame}" for n, frame in enumerate(catalog["frame"])], np.zeros(36)), catalog)
    assert grids["video"].tolist() == catalog["video"].tolist()
    assert describe_samples(table, catalog).equals(table)  # again changes nothing
    spaced = catalog.assign(frame="grid-1 " + catalog["frame"])  # a path that looks like a grid is still a path
    assert describe_samples(played(spaced["frame"], np.zeros(36)), spaced)["video"].tolist() == catalog["video"].tolist()


def test_samples_that_cannot_be_described_are_named():
    catalog = a_catalog()
    with pytest.raises(ValueError, match="'rgb/FaceSwap/003/000.png' is not in the catalogue .3 of 36"):
        describe_samples(some_scores(catalog), catalog[catalog["video"] != "FaceSwap/003"])
    with pytest.raises(ValueError, match="rgb/Deepfakes/000/000.png to several videos"):
        describe_samples(some_scores(catalog), pd.concat([catalog, catalog.head(1).assign(video="other")]))


def test_cluster_bootstrap_equals_a_loop_over_frames_with_the_same_counts():
    catalog = a_catalog(5, 4)
    catalog = catalog.drop(index=[0, 1, 9])  # videos of different length
    scores = describe_samples(pd.concat([some_scores(catalog), some_scores(catalog, seed=1, b=np.nan)], ignore_index=True), catalog)
    table = score_intervals(scores, draws=200, seed=5, expanded=False)
    assert table["explainer"].tolist() == ["bcos", "gradcam", "layercam"] * 2 and table["b"].isna().tolist() == [False] * 3 + [True] * 3
    names = sorted(set(scores["video"]))
    counts = np.random.default_rng(5).multinomial(len(names), np.full(len(names), 1 / len(names)), size=200)
    for row in table.itertuples():
        own = scores[(scores["explainer"] == row.explainer) & (scores["b"].isna() == np.isnan(row.b))]
        means = []
        for count in counts:
            frames = []
            for name, times in zip(names, count):
                for _ in range(times):
                    frames += own.loc[own["video"] == name, "score"].tolist()
            means.append(sum(frames) / len(frames))
        assert np.isclose(row.mean, own["score"].mean()) and (row.videos, row.samples) == (10, 37)
        assert np.allclose([row.low, row.high], np.percentile(means, [2.5, 97.5]), atol=1e-12)


def test_one_frame_a_video_is_the_ordinary_bootstrap():
    catalog = a_catalog(40, 1)
    scores = describe_samples(some_scores(catalog, ["bcos"]), catalog)
    row = score_intervals(scores, draws=20_000, expanded=False, confidence=0.9).iloc[0]
    package = stats.bootstrap((scores["score"],), np.mean, n_resamples=20_000, method="percentile", confidence_level=0.9, rng=3).confidence_interval
    assert np.allclose([row["low"], row["high"]], package, atol=0.0025)
    wide = score_intervals(scores, draws=20_000, confidence=0.9).iloc[0]
    student = stats.t.interval(0.9, 79, row["mean"], stats.sem(scores["score"]))
    assert wide["low"] < row["low"] and np.allclose([wide["low"], wide["high"]], student, atol=0.0025)
    assert np.isclose(percentile_tail(0.95, 10**6), 0.025, atol=1e-5)


def test_order_blocks_and_company_change_nothing(monkeypatch):
    catalog = a_catalog(4, 3)
    scores = describe_samples(pd.concat([some_scores(catalog), some_scores(catalog[catalog["video"] != "FaceSwap/002"], seed=2, game="grid")], ignore_index=True), catalog)
    keys = [*BY, "method"]
    table = score_intervals(scores, keys, draws=300).set_index(["game", "explainer", "method"])[["mean", "low", "high"]].sort_index()
    shuffled = score_intervals(scores.sample(frac=1, random_state=1), keys, draws=300)
    assert np.allclose(shuffled.set_index(["game", "explainer", "method"])[["mean", "low", "high"]].sort_index(), table)
    alone = score_intervals(scores[(scores["game"] == "grid") & (scores["explainer"] == "gradcam")], keys, draws=300).set_index(["game", "explainer", "method"])
    assert np.allclose(alone[["mean", "low", "high"]], table.loc[alone.index])
    monkeypatch.setattr("bcos_nb.games.statistics._BLOCK", 50)
    assert np.allclose(score_intervals(scores, keys, draws=300).set_index(["game", "explainer", "method"])[["mean", "low", "high"]].sort_index(), table)


def test_one_video_has_a_mean_and_a_reason_but_no_interval():
    catalog = a_catalog(1, 5)
    scores = describe_samples(some_scores(catalog), catalog)
    table = score_intervals(scores, [*BY, "method"])
    assert table[["low", "high"]].isna().all(axis=None) and table["mean"].notna().all() and table["reason"].str.contains("one video").all()
    whole = score_intervals(scores)
    assert whole["reason"].isna().all() and (whole["low"] < whole["high"]).all()
    compared = compare_explainers(scores, by=[*BY, "method"])
    assert compared["p"].isna().all() and compared["p_corrected"].isna().all() and compared["reason"].str.contains("one video").all()


def test_wrong_tables_are_refused_with_words():
    catalog = a_catalog()
    scores = some_scores(catalog)
    with pytest.raises(ValueError, match="no column video.*describe_samples"):
        score_intervals(scores)
    scores = describe_samples(scores, catalog)
    with pytest.raises(ValueError, match="empty"):
        score_intervals(scores[:0])
    with pytest.raises(ValueError, match="rgb/Deepfakes/000/001.png"):
        score_intervals(scores.assign(score=scores["score"].where(scores.index != 1)))
    with pytest.raises(ValueError, match="several times in one row"):
        score_intervals(pd.concat([scores, scores.head(1)]))
    with pytest.raises(ValueError, match="confidence"):
        score_intervals(scores, confidence=95)
    with pytest.raises(ValueError, match="correction"):
        compare_explainers(scores, correction="bonferoni")
    with pytest.raises(ValueError, match="against='lime'.*bcos, gradcam, layercam"):
        compare_explainers(scores, against="lime")
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_explainers(scores, "detector")


@pytest.mark.parametrize("videos", [2, 3, 8, 11])
def test_sign_flips_are_exact_for_few_videos(videos):
    differences = np.random.default_rng(videos).normal(0.4, 1, (4, videos)).round(1)  # with ties
    p = sign_flip_test(differences)
    for k, d in enumerate(differences):
        sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=videos)]
        assert np.isclose(p[k], np.mean(np.array(sums) >= abs(sum(d)) - 1e-9))
        assert np.isclose(p[k], stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True).pvalue)
    assert sign_flip_test(np.zeros((1, videos))) == 1


def test_random_sign_flips_and_wilcoxon_agree():
    differences = np.random.default_rng(0).normal(0.03, 0.1, (5, 60))
    p = sign_flip_test(differences)
    for k, d in enumerate(differences):
        assert abs(p[k] - stats.ttest_1samp(d, 0).pvalue) < 0.02 + 0.1 * p[k]
        assert (p[k] < 0.2) == (stats.wilcoxon(d).pvalue < 0.2) or 0.1 < p[k] < 0.3
    assert np.array_equal(p, sign_flip_test(differences)) and np.isclose(p[3], sign_flip_test(differences[3:4])[0])


def test_p_of_equals_is_uniform():
    differences = np.random.default_rng(0).normal(0, 1, (2000, 9))
    assert stats.kstest(sign_flip_test(differences), "uniform").statistic < 0.04


def test_labels_permuted_are_exact_for_few_videos():
    random = np.random.default_rng(0)
    first, second = random.normal(0.4, 1, (3, 6)), random.normal(0, 1, (3, 5))
    size, other = random.integers(1, 4, (3, 6)).astype(float), random.integers(1, 4, (3, 5)).astype(float)
    p = label_permutation_test((first, size), (second, other))
    for k in range(3):
        s, n = np.concatenate([first[k], second[k]]), np.concatenate([size[k], other[k]])
        values = []
        for chosen in itertools.combinations(range(11), 6):
            rest = [v for v in range(11) if v not in chosen]
            values.append(abs(s[list(chosen)].sum() / n[list(chosen)].sum() - s[rest].sum() / n[rest].sum()))
        assert np.isclose(p[k], np.mean(np.array(values) >= values[0] - 1e-9))
    many = label_permutation_test((random.normal(0.3, 1, (1, 40)), np.ones((1, 40))), (random.normal(0, 1, (1, 50)), np.ones((1, 50))))
    assert 0 < many[0] <= 1


def test_corrections_equal_the_procedures_written_out():
    random = np.random.default_rng(0)
    for _ in range(50):
        p = random.random(random.integers(1, 8)) ** 3
        order, running, holm = np.argsort(p), 0.0, np.empty(len(p))
        for place, k in enumerate(order):
            running = max(running, min(1, (len(p) - place) * p[k]))
            holm[k] = running
        assert np.allclose(corrected(p), holm)
        assert np.allclose(corrected(p, "benjamini-hochberg"), [min(1, min(len(p) * q / (p <= q).sum() for q in p if q >= own)) for own in p])
        with_gap = corrected(np.insert(p, 0, np.nan))
        assert np.isnan(with_gap[0]) and np.allclose(with_gap[1:], holm)
    assert corrected([0.2, 0.3], "none").tolist() == [0.2, 0.3]


def test_comparison_is_of_the_tables_means_and_paired_by_video():
    catalog = a_catalog(6, 3).drop(index=[0, 4])
    scores = describe_samples(pd.concat([some_scores(catalog, threshold=t, seed=s) for s, t in enumerate((0.0, 0.5))], ignore_index=True), catalog)
    table = compare_explainers(scores, draws=400)
    assert len(table) == 6 and table["first"].tolist() == ["bcos", "bcos", "gradcam"] * 2
    means = score_intervals(scores).set_index(["explainer", "threshold"])["mean"]
    wide = scores.pivot_table(index=["threshold", "video", "sample"], columns="explainer", values="score")
    names = sorted(set(scores["video"]))
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=400)
    tail = percentile_tail(0.95, len(names))
    for row in table.itertuples():
        assert np.isclose(row.mean_first, means[row.first, row.threshold]) and np.isclose(row.difference, row.mean_first - row.mean_second)
        d = (wide[row.first] - wide[row.second]).loc[row.threshold].groupby("video").agg(["sum", "size"]).loc[names]
        expected = stats.permutation_test((d["sum"].to_numpy(),), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True).pvalue
        assert np.isclose(row.p, expected)
        drawn = counts @ d["sum"].to_numpy() / (counts @ d["size"].to_numpy())
        assert np.allclose([row.low, row.high], np.quantile(drawn, [tail, 1 - tail]))
        assert (row.videos_first, row.samples_first, row.test) == (12, 34, "sign flips")
    assert np.allclose(table["p_corrected"], corrected(table["p"].to_numpy()))


def test_against_one_and_between_detectors():
    catalog = a_catalog()
    scores = pd.concat([some_scores(catalog, seed=1), some_scores(catalog, ["gradcam"], seed=2, b=np.nan)], ignore_index=True)
    scores = describe_samples(scores, catalog)
    table = compare_explainers(scores, against="gradcam")
    assert table[["first", "second"]].to_numpy().tolist() == [["bcos", "gradcam"], ["layercam", "gradcam"]]
    assert compare_explainers(scores, "detector")[["first", "second"]].to_numpy().tolist() == [["resnet34 B=2", "resnet34 ordinary"]]
    across = compare_explainers(scores, ("arch", "b", "explainer"), against="gradcam on resnet34 ordinary")
    assert across["first"].tolist() == ["bcos on resnet34 B=2", "gradcam on resnet34 B=2", "layercam on resnet34 B=2"]


def test_other_samples_are_refused_unless_compared_unpaired():
    catalog = a_catalog(7, 3)
    half = catalog["video"].isin(sorted(set(catalog["video"]))[::2])
    scores = pd.concat([some_scores(catalog[half], ["bcos"]), some_scores(catalog[~half], ["bcos"], b=np.nan)], ignore_index=True)
    scores = describe_samples(scores, catalog)
    with pytest.raises(ValueError, match="not scored on the same samples .21 and 21, 0 in common.*paired=False"):
        compare_explainers(scores, "detector")
    row = compare_explainers(scores, "detector", paired=False).iloc[0]
    first, second = (scores[scores["b"].isna() == null].groupby("video")["score"].sum().to_numpy() for null in (False, True))

    def apart(x, y, axis):
        return abs(x.mean(axis) - y.mean(axis))

    expected = stats.permutation_test((first, second), apart, n_resamples=np.inf, vectorized=True, alternative="greater").pvalue
    assert np.isclose(row["p"], expected) and row["test"] == "labels permuted" and row["low"] < row["difference"] < row["high"]


def test_a_correction_that_nothing_can_pass_is_warned_of():
    catalog = a_catalog(2, 3)
    scores = describe_samples(some_scores(catalog), catalog)
    with pytest.warns(UserWarning, match="smallest p of 4 videos"):
        compare_explainers(scores)
    catalog = a_catalog(10, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_explainers(describe_samples(some_scores(catalog), catalog))


@pytest.mark.parametrize("seed", range(20))
def test_boxes_equal_matplotlibs(seed):
    random = np.random.default_rng(seed)
    rows = []
    for number in range(4):
        scores = np.where(random.random(size := random.integers(1, 40)) < 0.2, random.random(size), random.normal(0.5, 0.05, size)).round(random.integers(1, 9))
        rows.append(played([f"{number}-{k}" for k in range(size)], scores, explainer=f"explainer {number}", b=np.nan if number % 2 else 2.0))
    table = pd.concat(rows, ignore_index=True).sample(frac=1, random_state=seed)
    boxes = box_data(table)
    for box in boxes.itertuples():
        own = table.loc[table["explainer"] == box.explainer, "score"].to_numpy()
        (theirs,) = boxplot_stats(own)
        mine = [box.q1, box.median, box.q3, box.lowerfence, box.upperfence, box.mean]
        assert np.allclose(mine, [theirs[key] for key in ("q1", "med", "q3", "whislo", "whishi", "mean")]) and box.samples == len(own)
        assert np.allclose(box.outliers, np.sort(theirs["fliers"])) and np.allclose([box.q1, box.q3], np.percentile(own, [25, 75]))


@pytest.mark.slow
@pytest.mark.parametrize("videos", [8, 30])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(videos):
    hits = {"videos": 0, "frames": 0}
    label = np.repeat([f"{v:02}" for v in range(videos)], 10)
    for trial in range(1500):
        random = np.random.default_rng(trial)
        score = 0.5 + np.repeat(random.normal(0, 0.1, videos), 10) + random.normal(0, 0.05, videos * 10)
        table = pd.DataFrame({"game": "mask", "sample": np.arange(len(score)).astype(str), "video": label, "score": score})
        for name, group in (("videos", "video"), ("frames", "sample")):
            row = score_intervals(table, ["game"], draws=1000, seed=trial, group=group).iloc[0]
            hits[name] += row["low"] <= 0.5 <= row["high"]
    assert 0.93 <= hits["videos"] / 1500 <= 0.97 and hits["frames"] / 1500 < 0.6, hits
