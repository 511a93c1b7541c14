"""Videos, thresholds and intervals against plain loops; the study's tables against its printed text; what preset `mini` would run."""
import json
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score, recall_score, roc_auc_score

from bcos_nb.batch import presets
from bcos_nb.detection import bootstrap_intervals, choose_threshold, detection_metrics, detection_results, video_scores
from bcos_nb.detection.metrics import METRICS, drawn_counts, weighted_metrics
from bcos_nb.reports.detection_tables import DETECTION_TABLES, all_tables, detection_table, read_results, study_table
from bcos_nb.reports.formats import plain_frame, table_html, write_table
from invented_runs import invent_runs


def some_scores(seed=0, videos=40, frames=6, ties=False):
    """Frames of videos that differ from one another, one in three real."""
    rng = np.random.default_rng(seed)
    label = np.repeat((np.arange(videos) % 3 > 0).astype(int), frames)
    logit = np.repeat(rng.normal(0, 1, videos), frames) + rng.normal(0, 1, videos * frames) + 1.5 * label - 0.7
    probability = 1 / (1 + np.exp(-logit))
    method = np.where(label == 0, "real", np.where(np.repeat(np.arange(videos) % 2, frames), "Deepfakes", "FaceSwap"))
    table = pd.DataFrame(dict(video=np.repeat([f"v{k:02d}" for k in range(videos)], frames), label=label, method=method, probability=probability))
    return table.assign(probability=table.probability.round(1)) if ties else table


# ---- videos and thresholds

def test_videos_are_the_mean_of_their_frames():
    scores = some_scores().sample(frac=1, random_state=1)
    videos = video_scores(scores).set_index("video")
    groups = scores.groupby("video")
    assert np.allclose(videos.probability, groups.probability.mean()[videos.index])
    assert (videos.label == groups.label.first()[videos.index]).all() and (videos.method == groups.method.first()[videos.index]).all() and (videos.frames == 6).all()
    with pytest.raises(ValueError, match="v03 has real and fake"):
        video_scores(scores.assign(label=np.where((scores.video == "v03") & (scores.index % 2 == 0), 0, np.where(scores.video == "v03", 1, scores.label))))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_balanced_accuracy(seed, ties):
    scores = some_scores(seed, ties=ties)
    chosen = choose_threshold(scores.label, scores.probability)
    at = lambda cut: balanced_accuracy_score(scores.label, scores.probability >= cut)
    assert 0 <= chosen <= 1 and at(chosen) == pytest.approx(max(at(cut) for cut in [*scores.probability, 0.5]))


def test_thresholds_of_special_cases():
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]) == pytest.approx(0.5)
    assert choose_threshold([0, 1], [0.98, 0.99]) == pytest.approx(0.985)
    a, b = 0.3, np.nextafter(0.3, 1)  # nothing lies between them
    assert a < choose_threshold([0, 1], [a, b]) <= b
    for labels, probabilities in (([1, 1], [0.1, 0.2]), ([0, 1], [0.1, np.nan]), ([], []), ([0, 1], [0.5])):
        with pytest.raises(ValueError):
            choose_threshold(labels, probabilities)


# ---- intervals

@pytest.mark.parametrize("ties", [False, True])
def test_weighted_metrics_are_scikit_learns_on_drawn_frames(ties):
    scores = some_scores(3, ties=ties)
    rng = np.random.default_rng(5)
    counts = drawn_counts(scores.groupby("video").label.first().to_numpy(), 25, rng)
    got = weighted_metrics(scores.label.to_numpy(), scores.probability.to_numpy(), np.repeat(counts, 6, axis=1), 0.4)
    assert list(got) == list(METRICS)
    for k, drawn in enumerate(counts.astype(int)):
        frames = pd.concat([scores[scores.video == f"v{video:02d}"] for video, times in enumerate(drawn) for _ in range(times)])
        called = frames.probability >= 0.4
        plain = dict(auc=roc_auc_score(frames.label, frames.probability), f1=f1_score(frames.label, called), recall=recall_score(frames.label, called),
                     average_precision=average_precision_score(frames.label, frames.probability), accuracy=accuracy_score(frames.label, called))
        assert all(got[name][k] == pytest.approx(value, abs=1e-12) for name, value in plain.items())
        assert got["eer"][k] == pytest.approx(detection_metrics(frames.label, frames.probability)["eer"], abs=1e-9)


def test_draws_keep_the_number_of_each_class_and_are_seeded():
    labels = np.array([0, 1, 1, 0, 1, 0, 1])
    counts = drawn_counts(labels, 500, np.random.default_rng(0))
    assert (counts[:, labels == 0].sum(1) == 3).all() and (counts[:, labels == 1].sum(1) == 4).all()
    assert counts.mean(0) == pytest.approx(1, abs=0.15) and (counts == 0).any(0).all()
    scores = some_scores()
    first, again, other = (bootstrap_intervals(scores.label, scores.probability, scores.video, resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other


def test_intervals_equal_a_plain_loop():
    scores = some_scores(2, videos=24)
    resamples, label = 300, scores.groupby("video").label.first()
    rng, aucs = np.random.default_rng(77), []
    for _ in range(resamples):  # draws videos by name, with another generator's calls
        names = [name for value in (0, 1) for name in rng.choice(label.index[label == value], (label == value).sum())]
        frames = pd.concat([scores[scores.video == name] for name in names])
        aucs.append(roc_auc_score(frames.label, frames.probability))
    low, high = bootstrap_intervals(scores.label, scores.probability, scores.video, resamples=4000)["auc"]
    assert low == pytest.approx(np.quantile(aucs, 0.025), abs=0.03) and high == pytest.approx(np.quantile(aucs, 0.975), abs=0.03)


def test_intervals_cover_what_they_should():
    """Of intervals for 80 samples from one population, most hold its AUC; with 20 real videos a percentile bootstrap is a little too narrow for 95 %."""
    truth = roc_auc_score(*some_scores(999, videos=6000, frames=2)[["label", "probability"]].to_numpy().T)
    held = [low <= truth <= high for seed in range(80) for scores in [some_scores(seed, videos=60, frames=2)]
            for low, high in [bootstrap_intervals(scores.label, scores.probability, scores.video, resamples=300)["auc"]]]
    assert 0.85 <= np.mean(held) <= 1


def test_a_thousand_resamples_of_4000_frames_take_about_a_second():
    rng, times = np.random.default_rng(0), []
    labels, probabilities, videos = np.repeat([0, 1], 2000), rng.random(4000), np.arange(4000) // 8
    for _ in range(3):
        begin = time.process_time()
        bootstrap_intervals(labels, probabilities, videos)
        times.append(time.process_time() - begin)
    assert min(times) < 3


def test_degenerate_input_is_refused_and_a_single_video_has_no_interval():
    for labels, probabilities, videos, said in (
        ([1, 1], [0.1, 0.2], "ab", "only"), ([0, 1], [0.1, np.nan], "ab", "nan"), ([0, 1], [0.1, 0.2], "abc", "do not belong"),
        ([], [], "", "only"), ([0, 1, 1], [0.1, 0.2], "ab", "do not belong"), ([0, 1], [0.1, 0.2], "aa", "real and fake"),
    ):
        with pytest.raises(ValueError, match=said):
            bootstrap_intervals(labels, probabilities, list(videos))
    with pytest.raises(ValueError, match="resamples=0"):
        bootstrap_intervals([0, 1], [0.1, 0.2], ["a", "b"], resamples=0)
    assert np.isnan(bootstrap_intervals([0, 1, 1], [0.1, 0.2, 0.3], ["a", "b", "c"])["auc"]).all()


def test_results_by_method_and_level():
    scores = some_scores()
    results = detection_results(scores, {"0.5": 0.5, "validation": 0.3}, resamples=20).set_index(["method", "level", "threshold", "metric"])
    assert len(results) == 3 * 2 * 2 * 6
    part = scores[scores.method.isin(["real", "FaceSwap"])]
    videos = part.groupby("video").agg(label=("label", "first"), probability=("probability", "mean"))
    assert results.loc[("FaceSwap", "frame", "0.5", "auc"), "value"] == pytest.approx(roc_auc_score(part.label, part.probability))
    assert results.loc[("FaceSwap", "video", "validation", "f1"), "value"] == pytest.approx(f1_score(videos.label, videos.probability >= 0.3))
    assert results.loc[("all", "video", "0.5", "auc"), ["frames", "videos"]].tolist() == [240, 40]
    assert set(detection_results(scores[scores.method != "FaceSwap"], resamples=0).method) == {"all"}


# ---- the study's tables

PRINTED = [  # read off the study's pages
    ("I", "xception", None, "FaceForensics++", "f1", 0.96), ("I", "vitc_ti", 2.5, "FaceForensics++", "auc", 0.78), ("II", "resnet34", 2, "UADFV", "auc", 0.93),
    ("II", "xception", 2.5, "FaceShifter", "auc", 0.67), ("VII", "vitc_ti", None, "FaceForensics++", "recall", 1.0),
    ("VIII", "xception", None, "FaceForensics++", "accuracy", 0.75), ("IX", "resnet34", None, "FF-F2F", "auc", 0.90), ("IX", "resnet34", 1.25, "DeepFakeDetection", "f1", 0.91),
    ("IX", "vitc_ti", None, "FaceShifter", "f1", 0.79), ("IX", "xception", None, "FF-NT", "auc", 0.95), ("X", "resnet34", 1.75, "FF-F2F", "f1", 0.92),
    ("X", "vitc_ti", 2.5, "FF-DF", "auc", 0.79), ("X", "xception", 2.5, "FaceShifter", "auc", 0.65), ("XI", "resnet34", None, "FFHQ", "average_precision", 0.88),
    ("XI", "resnet34", 1.75, "FFHQ", "f1", 0.96),
]


def put_run(root, arch, b, dataset, tests, value, *, name=None, compression="c23", **training):
    """A detection run of which only the results are invented: `value` and what `tests` name."""
    name = name or f"{arch}-{b}"
    rows = [dict(dataset=whose, compression=level, method=method, level=where, threshold="0.5", cut=0.5, metric=metric, value=value + 0.01 * k + 0.001 * (where == "video"),
                 low=value - 0.1, high=value + 0.1, frames=8, videos=2)
            for whose, level, methods in tests for method in ("all", *methods) for where in ("frame", "video") for k, metric in enumerate(METRICS)]
    contents = {"train": dict(arch=arch, b=b, dataset=dataset, compression=compression, **training), "detect": dict(arch=arch, b=b, dataset=dataset, detector=f"../../train/{name}")}
    for experiment, params in contents.items():
        (root / experiment / name).mkdir(parents=True)
        (root / experiment / name / "params.json").write_text(json.dumps(params))
        (root / experiment / name / "metrics.json").write_text(json.dumps(dict(arch=arch, b=b)))
    pd.DataFrame(rows).to_parquet(root / "detect" / name / "results.parquet")


FOUR = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
EVERYWHERE = [("FaceForensics++", "c23", FOUR), ("FaceForensics++", "c40", FOUR), ("FaceShifter", "c23", ()), ("FaceShifter", "c40", ()), ("DeepFakeDetection", "c23", ()),
              ("DeepFakeDetection", "c40", ()), ("DFDCP", "own", ("DFDCP A", "DFDCP B")), ("Celeb-DF-v2", "own", ()), ("UADFV", "own", ())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    for k, (arch, b) in enumerate([("resnet34", None), ("resnet34", 1.25), ("xception", 2.5), ("vitc_ti", 3.0)]):
        put_run(root, arch, b, "FaceForensics++", EVERYWHERE, 0.5 + 0.05 * k, width=0.25, image_size=128)
    put_run(root / "df-tp-ffhq", "resnet34", 1.25, "df-tp-ffhq", [("df-tp-ffhq", "own", ())], 0.9, compression=None)
    return root


@pytest.fixture(scope="module")
def tables(folder):
    return all_tables(folder)


def cell(tables, table, arch, b, test_set, metric):
    rows = tables[table].query("arch == @arch and test_set == @test_set and metric == @metric")
    return rows[rows.b.isna() if b is None else rows.b == b].iloc[0]


@pytest.mark.parametrize("table, arch, b, test_set, metric, value", PRINTED)
def test_the_studys_numbers_stand_where_it_prints_them(tables, table, arch, b, test_set, metric, value):
    assert cell(tables, table, arch, b, test_set, metric).study == value


def test_every_number_of_the_study_has_its_cell(tables):
    assert {number: int(cells.study.notna().sum()) for number, cells in tables.items()} == dict(I=23, II=60, VII=60, VIII=60, IX=216, X=144, XI=25)
    assert all(not cells.duplicated(["arch", "b", "test_set", "metric"]).any() for cells in tables.values())


def test_ours_stand_beside_them(tables):
    assert cell(tables, "I", "resnet34", None, "FaceForensics++", "f1").ours == pytest.approx(0.51)
    one = cell(tables, "II", "resnet34", 1.25, "UADFV", "auc")  # has no compression of its own
    assert (one.ours, one.low, one.high, one.video) == pytest.approx((0.55, 0.45, 0.65, 0.551)) and one.stands_for == "ResNet-34 at width 0.25, 128 px"
    assert cell(tables, "X", "xception", 2.5, "FF-NT", "f1").ours == pytest.approx(0.61)
    assert cell(tables, "XI", "resnet34", 1.25, "FFHQ", "auc").ours == pytest.approx(0.9)  # not that of the detector trained on FaceForensics++
    for where in (("II", "resnet34", 2, "UADFV", "auc"), ("XI", "resnet34", None, "FFHQ", "auc"), ("VII", "xception", None, "FaceForensics++", "auc")):
        assert np.isnan(cell(tables, *where).ours)
    extra = cell(tables, "VIII", "vitc_ti", 3.0, "FaceForensics++", "auc")  # the study has no such B
    assert extra.ours == pytest.approx(0.65) and np.isnan(extra.study)


def test_in_domain_and_across_are_not_mixed(tmp_path):
    put_run(tmp_path, "resnet34", None, "FF-DF", [("FF-DF", "c23", ()), ("UADFV", "own", ())], 0.7)  # trained on another set
    put_run(tmp_path, "resnet34", 2.0, "FaceForensics++", [("FaceForensics++", "c23", FOUR)], 0.6, compression="c40")  # at another compression
    assert all(cells.ours.isna().all() for cells in all_tables(tmp_path).values())


def test_backbones_that_the_study_does_not_have_come_after_its_own(tmp_path):
    """Each in rows of its own, ordinary before B-cos, with no number of the study's beside."""
    for arch, b, value in (("vgg16", 2.0, 0.6), ("densenet121", 1.25, 0.7), ("vgg16", None, 0.8), ("densenet121", 2.0, 0.75)):
        put_run(tmp_path, arch, b, "FaceForensics++", [("FaceForensics++", "c23", FOUR)], value)
    tables = all_tables(tmp_path)
    for number in ("I", "VII", "IX"):
        rows = tables[number][["arch", "b"]].drop_duplicates().astype(object)
        last = [(arch, None if b != b else b) for arch, b in rows.tail(4).itertuples(index=False)]
        assert last == [("densenet121", 1.25), ("densenet121", 2.0), ("vgg16", None), ("vgg16", 2.0)] and rows.head(-4).equals(study_table(read_results(tmp_path).iloc[:0], number)[["arch", "b"]].drop_duplicates().astype(object))
    assert tables["VIII"]["ours"].isna().all() and tables["XI"]["ours"].isna().all()
    ours = tables["I"].dropna(subset="ours")
    assert set(ours["arch"]) == {"vgg16", "densenet121"} and ours["study"].isna().all()
    assert cell(tables, "I", "vgg16", 2.0, "FaceForensics++", "auc").ours == pytest.approx(0.6)
    headings = [heading for heading, _ in detection_table(tables["I"]).groups]
    assert [heading.split(":")[0] for heading in headings[-2:]] == ["DenseNet-121", "VGG-16"] and "no run" in headings[0] and "ours is" in headings[-1]


def test_the_very_backbone_goes_before_its_relative(tmp_path):
    for arch, value in (("resnet10", 0.6), ("resnet34", 0.8)):
        put_run(tmp_path, arch, 2.0, "FaceForensics++", [("FaceForensics++", "c23", ())], value)
    put_run(tmp_path, "resnet34", 2.0, "FaceForensics++", [("FaceForensics++", "c23", ())], 0.7, name="z-another-seed")
    one = cell(all_tables(tmp_path), "I", "resnet34", 2.0, "FaceForensics++", "auc")
    assert one.ours == pytest.approx(0.8) and one.run == "resnet34-2.0" and one.others == 2
    heading, rows = detection_table(all_tables(tmp_path)["I"]).groups[0]
    ours, more = heading.split(". Not shown: ")
    assert "ours is ResNet-34" in ours and "ResNet-10" in more and "ResNet-34" not in more  # the other seed is called as the one that is shown
    assert [name for name, _ in rows if "more" in name] == ["B = 2 (+2 more)"]


def test_a_guided_training_does_not_stand_for_the_studys(tmp_path):
    """Its folder comes first by name; the study's networks saw no masks."""
    for name, guidance, value in (("a-guided", 1.0, 0.9), ("b-free", 0, 0.8), ("c-guided", 0.3, 0.7)):
        put_run(tmp_path, "resnet34", 2.0, "FaceForensics++", [("FaceForensics++", "c23", ())], value, name=name, training=dict(epochs=4, guidance=guidance))
    one = cell(all_tables(tmp_path), "I", "resnet34", 2.0, "FaceForensics++", "auc")
    assert (one.ours, one.run, one.others) == (pytest.approx(0.8), "b-free", 2) and "guided" not in one.stands_for
    for name in ("detect", "train"):
        shutil.rmtree(tmp_path / name / "b-free")
    one = cell(all_tables(tmp_path), "I", "resnet34", 2.0, "FaceForensics++", "auc")
    assert one.run == "c-guided" and one.stands_for.endswith("4 epochs, guided by masks (λ = 0.3)")


def test_runs_from_before_the_intervals_are_read(tmp_path):
    invent_runs(tmp_path, b_values=(None, 2.0), size=16)
    tables = all_tables(tmp_path)
    one = cell(tables, "VIII", "resnet34", 2.0, "FaceForensics++", "auc")
    assert one.ours == pytest.approx(0.97 - 0.1) and np.isnan(one.low) and one.stands_for == "ResNet-10"
    assert "0.870 (0.79)" == plain_frame(detection_table(tables["VIII"])).loc["ResNet-34, B = 2", "AUC"]


def test_html_says_what_is_missing_and_what_stands_for_what(tables):
    nine = detection_table(tables["IX"])
    page = table_html(nine)
    assert page.count("<td ") + page.count("<td>") == 13 * 19 and page.count(">no run<") == int(tables["IX"].ours.isna().sum()) > 0
    assert "ResNet-34: ours is ResNet-34 at width 0.25, 128 px" in page and 'colspan="2">FF-DF</th>' in page
    assert 'title="0.92 among neighbours of 0.89: perhaps a misprint">?' in table_html(detection_table(tables["X"]))
    best = [cell for cell in nine.cells if cell.best]
    assert len(best) == 18 and {round(cell.value, 2) for cell in best} <= {0.65, 0.66}  # the best of each column: ViT's, whose numbers were made the highest


def test_agreement_is_that_of_the_intervals(tables):
    """Intervals are 0.1 to either side: counted here without the module's rule."""
    for cells in tables.values():
        both = cells[cells.ours.notna() & cells.study.notna()]
        inside = (both.study >= both.low - 0.00501) & (both.study <= both.high + 0.00501)
        assert (both.agreement.eq("within") == inside).all() and set(both.agreement[~inside]) <= {"higher", "lower"}
        assert (both.agreement.eq("higher") == (~inside & (both.ours > both.study))).all() and cells.agreement[cells.ours.isna()].eq("").all()


def test_files(folder, tables, tmp_path):
    for cells in tables.values():
        write_table(detection_table(cells), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"table_{number}.{form}" for number in DETECTION_TABLES for form in ("csv", "tex")}
    again = pd.read_csv(tmp_path / "table_II.csv")
    assert len(again) == 65 and again.ours.notna().sum() == 20 and {"arch", "b", "test_set", "metric", "ours", "low", "high", "study", "run", "stands_for", "agreement"} <= set(again)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one of detection"):
        study_table(read_results(folder), "III")


def test_what_cannot_be_read_is_named(tmp_path):
    put_run(tmp_path, "resnet34", 2.0, "FaceForensics++", EVERYWHERE, 0.7)
    put_run(tmp_path, "resnet34", 2.5, "FaceForensics++", EVERYWHERE, 0.7)
    (tmp_path / "detect" / "resnet34-2.0" / "results.parquet").write_bytes(b"cut off")
    results = read_results(tmp_path)
    assert set(results.run) == {"resnet34-2.5"} and [(one["run"], one["experiment"]) for one in results.attrs["missing"]] == [("resnet34-2.0", "detect")]


# ---- preset mini

def test_mini_asks_for_what_the_tables_need(tmp_path):
    mini = presets.load_preset("mini")
    jobs = presets.preset_jobs(mini, tmp_path / "runs", experiments=("detect",))
    trainings, tests = ([job for job in jobs if job.run_dir.parent.name == name] for name in ("train", "detect"))
    assert len({job.run_dir for job in jobs}) == len(jobs) == len(trainings) + len(tests) and len(trainings) == len(tests)
    trained = {(job.params["dataset"], job.params["arch"], job.params["b"]) for job in trainings}
    assert {("FaceForensics++", "resnet34", b) for b in (None, 1.25, 1.75, 2, 2.5)} <= trained and {("df-tp-ffhq", "resnet34", b) for b in (None, 1.25, 1.75, 2, 2.5)} <= trained
    assert {("FaceForensics++", "xception", None), ("FaceForensics++", "xception", 2.5), ("FaceForensics++", "vitc_ti", None), ("FaceForensics++", "vitc_ti", 2)} <= trained
    for job in tests:
        training, = job.after
        assert (job.run_dir / job.params["detector"]).resolve() == training and training in {other.run_dir for other in trainings}
        seen = {(entry["dataset"], entry.get("compression")) for entry in job.params["test_sets"] or []}
        if job.params["dataset"] == "df-tp-ffhq":
            assert job.params["compressions"] == [None] and not seen and job.params["frames_per_video"] == 1
        else:
            assert job.params["compressions"] == ["c23", "c40"]
            assert seen == {("FaceShifter", "c23"), ("FaceShifter", "c40"), ("DeepFakeDetection", "c23"), ("DeepFakeDetection", "c40"), ("DFDCP", None), ("Celeb-DF-v2", None), ("UADFV", None)}
    games = presets.preset_jobs(mini, tmp_path / "runs", experiments=("mask_game", "grid_game"))
    assert {job.run_dir.parent.name for job in games} == {"train", "controls", "mask_game", "grid_game"} and all(job.params["dataset"] == "FaceForensics++" for job in games)


def test_all_data_of_mini_can_be_made():
    needed = presets.preset_datasets(presets.load_preset("mini"))
    assert {(one["root"].as_posix(), one["dataset"]) for one in needed} == {("data/miniature", "FaceForensics++")} | {
        ("data/counterparts", name) for name in ("FaceShifter", "DeepFakeDetection", "DFDCP", "Celeb-DF-v2", "UADFV", "df-tp-ffhq")}
    from bcos_nb.data.forge import make_recipe

    recipes = {one["dataset"]: make_recipe(**({"preset": "mini"} | one["recipe"])) for one in needed}
    assert recipes["FaceShifter"].identities == recipes["FaceForensics++"].identities  # its people are in the same splits
