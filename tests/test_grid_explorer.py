"""The grid instrument without a browser: what it shows is what the game scores, of grids by hand, by chance and of a run."""
import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from bcos_nb.data import Frames, forge_dataset, load_frames, read_catalog
from bcos_nb.explainers import explain, explain_windows
from bcos_nb.games import build_grids, play_grid_game
from bcos_nb.models import create_detector, save_detector
from bcos_nb.widgets.canvas import stored_attribution
from bcos_nb.widgets.grids import STEPS, GridExplorer, cell_scores, deal_cells, find_grid_runs, open_grid_run, pool_of


@pytest.fixture(scope="module")
def detectors():
    torch.manual_seed(0)
    return {"ordinary": create_detector("resnet10", width=0.25).eval(), "B = 2": create_detector("resnet10", b=2, width=0.25).eval()}


@pytest.fixture(scope="module")
def frames():
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 20 + [1] * 10)
    catalog = pd.DataFrame({"frame": [f"{k}.png" for k in range(30)], "mask": None, "video": [f"v{k}" for k in range(30)], "label": labels.numpy(), "method": ["real"] * 20 + ["FaceSwap"] * 10})
    return Frames(torch.randint(0, 256, (30, 3, 32, 32), generator=generator, dtype=torch.uint8), None, labels, catalog.video.tolist(), catalog)


@pytest.fixture
def explorer(detectors, frames, tmp_path):
    return GridExplorer(detectors, frames, ("bcos", "gradcam"), folder=tmp_path / "saved")


@pytest.fixture(scope="module")
def runs(detectors, tmp_path_factory):
    """A folder of runs with one finished grid game, made by the functions that the run's notebook calls."""
    root = tmp_path_factory.mktemp("work")
    forge_dataset(root / "data", identities=6, frames_per_video=2, size=64, compressions=("c23",), progress=False)
    train, game = root / "runs" / "demo" / "train" / "one", root / "runs" / "demo" / "grid_game" / "one"
    train.mkdir(parents=True), game.mkdir(parents=True)
    save_detector(detectors["B = 2"], train / "detector.safetensors")
    params = {"detector": "../../train/one", "arch": "resnet10", "b": 2.0, "data": "data", "dataset": "FaceForensics++", "compression": "c23", "image_size": 32, "frames_per_video": 2,
              "explainers": ["bcos", "gradcam"], "n": 2, "grids": 5, "fakes": 1, "cell_size": None, "common": [], "windows": "auto", "min_confidence": 0.0, "seed": 3}
    loaded = load_frames(read_catalog(root / "data", "FaceForensics++", "test", "c23", frames_per_video=2), 32, with_mask=False)
    grids = build_grids(detectors["B = 2"], loaded, n=2, count=5, seed=3, min_confidence=0.0)
    scores = play_grid_game(detectors["B = 2"], loaded, ["bcos", "gradcam", "centre"], thresholds=(0.0, 0.5), grids=grids)
    scores.attrs.clear()
    scores.to_parquet(game / "scores.parquet")
    (game / "params.json").write_text(json.dumps(params)), (game / "metrics.json").write_text("{}")
    return root / "runs" / "demo"


def test_shares_of_cells_are_localization_scores():
    torch.manual_seed(0)
    attribution = torch.rand(12, 12) ** 3
    table = cell_scores(attribution, 2)
    assert table["weighted"].shape == table["unweighted"].shape == (101, 4) and len(STEPS) == 101
    for at in (0, 7, 50, 99):
        kept = np.where(attribution.numpy() < np.float32(STEPS[at]), 0, attribution.numpy().astype(np.float64))
        parts = [kept[r:r + 6, c:c + 6] for r in (0, 6) for c in (0, 6)]
        assert np.allclose(table["weighted"][at], [part.sum() / kept.sum() for part in parts], atol=1e-6)
        assert np.allclose(table["unweighted"][at], [(part > 0).sum() / (kept > 0).sum() for part in parts], atol=1e-6)
    assert not cell_scores(torch.zeros(8, 8), 2)["weighted"].any()


def test_dealing(frames):
    labels = frames.labels.numpy()
    allowed = np.arange(30) % 2 == 0
    for seed in range(30):
        cells = deal_cells(labels, allowed, 3, 2, seed)
        assert len(set(cells)) == 9 and labels[cells].sum() == 2 and allowed[cells].all()
    counts = np.bincount([int(np.flatnonzero(labels[deal_cells(labels, allowed, 2, 1, seed)])[0]) for seed in range(400)], minlength=4)
    assert ((counts - 100) ** 2 / 100).sum() < 16.3  # chi squared with 3 degrees of freedom, p = 0.001
    with pytest.raises(ValueError, match="takes 15 real faces, and there are 10"):
        deal_cells(labels, allowed, 4, 1, 0)


def test_a_pool_is_balanced_and_bounded(frames):
    pool = pool_of(frames, most=12)
    assert len(pool) == 12 and int(pool.labels.sum()) == 6
    assert len(pool_of(frames, most=24)) == 24 and int(pool_of(frames, most=24).labels.sum()) == 10  # all fakes there are
    assert len(pool_of(frames)) == 30
    with pytest.raises(ValueError, match="needs real faces and fakes; there are 20 and 0"):
        pool_of(frames[:20])


def test_what_is_shown_is_what_the_game_scores(explorer, detectors, frames):
    explorer.detector.value = "B = 2"
    explorer.deal_from.value = "all faces"
    assert explorer.message.value == ""
    from bcos_nb.widgets.grids import as_grids
    for threshold in (0.0, 0.25):
        explorer.threshold.value = threshold
        scores = play_grid_game(detectors["B = 2"], frames, ["bcos", "gradcam"], thresholds=(threshold,), grids=as_grids(explorer.frames, explorer.cells))
        for row in scores.itertuples():
            assert explorer.shares(row.explainer, row.weighting)[explorer.fake_cells[0]] == pytest.approx(row.score, abs=2e-5)
    content = explorer.bars.content
    sent = np.frombuffer(content["charts"][0]["weighted"], np.float32).reshape(101, 9)
    assert content["charts"][0]["name"] == "B-cos" and np.array_equal(sent, explorer.tables["bcos"]["weighted"]) and content["fakes"] == explorer.fake_cells
    maps = explain(detectors["B = 2"], explorer.grid[None], "bcos").maps[0]
    assert explorer.canvas.content["panels"][1]["attribution"] == stored_attribution(maps).tobytes()
    table = explorer.score_table()
    assert len(table) == 18 and table.groupby("explainer").winner.sum().tolist() == [1, 1]
    assert table[(table.explainer == "gradcam") & table.winner].iloc[0].weighted == pytest.approx(float(explorer.shares("gradcam").max()))


def test_seed_decides_and_cells_move(explorer):
    explorer.deal_from.value = "all faces"
    first = explorer.cells.copy()
    explorer.reshuffle.click()
    assert explorer.seed.value == 1 and not np.array_equal(first, explorer.cells)
    explorer.seed.value = 0
    assert np.array_equal(first, explorer.cells)
    explorer.move.click()
    assert sorted(first) == sorted(explorer.cells) and not np.array_equal(first, explorer.cells)
    explorer.n.value = 2
    assert len(explorer.cells) == 4 and explorer.board.columns == 2
    explorer.fakes.value = 2
    assert len(explorer.fake_cells) == 2 and explorer.board.marked == explorer.fake_cells


def test_composing_by_hand(explorer, frames):
    explorer.deal_from.value = "all faces"
    explorer.board._handle_custom_msg({"event": "chosen", "index": 4}, [])
    assert explorer.chosen_cell == 4 and "row 2, column 2" in explorer.hint.value and len(explorer.candidates.pictures) > 0
    explorer.kind.value = 1
    assert all(frames.labels[row] == 1 for row in explorer.offered) and len(explorer.offered) == 10
    probability = explorer.probabilities()[explorer.offered]
    assert (np.diff(probability) <= 0).all()
    explorer.candidates._handle_custom_msg({"event": "chosen", "index": 3}, [])
    assert explorer.cells[4] == explorer.offered[3] and 4 in explorer.fake_cells
    real = int(np.flatnonzero(frames.labels.numpy() == 0)[0])
    for cell in list(explorer.fake_cells):
        explorer.put(cell, real)
    assert explorer.fake_cells == [] and "here is no fake in this grid" in explorer.verdict.value and explorer.canvas.content["panels"][1]["mask"] == -1
    assert explorer.message.value == ""


def test_too_few_right_ones_are_said(detectors, frames):
    explorer = GridExplorer(detectors, frames, ("gradcam",), n=4)
    labels = explorer.frames.labels.numpy()
    right = (explorer.probabilities() > 0.5) == (labels == 1)
    enough = (right & (labels == 1)).sum() >= 1 and (right & (labels == 0)).sum() >= 15
    assert ("dealt from all faces" in explorer.verdict.value) == (not enough) and explorer.cells is not None


def test_a_small_dataset_gives_a_smaller_grid(detectors, frames):
    explorer = GridExplorer(detectors, frames[torch.tensor([0, 1, 2, 3, 20, 21])], ("gradcam",))
    assert explorer.message.value == "" and explorer.n.value == 2 and "The grid is smaller, since there are 4 real faces only" in explorer.verdict.value


def test_errors_are_shown_and_leave_the_controls_alive(detectors, frames):
    explorer = GridExplorer(detectors, frames, ("bcos",))
    assert "None of the explainers bcos can serve ordinary" in explorer.message.value
    explorer.detector.value = "B = 2"
    assert explorer.message.value == "" and list(explorer.tables) == ["bcos"]
    with pytest.raises(ValueError, match="no detector"):
        GridExplorer({}, frames)


def test_a_vision_transformer_is_explained_by_windows():
    torch.manual_seed(0)
    vit = create_detector("vitc_ti", b=2, width=0.5, image_size=32).eval()
    labels = torch.tensor([0] * 4 + [1] * 2)
    catalog = pd.DataFrame({"frame": list("abcdef"), "mask": None, "video": list("abcdef"), "label": labels.numpy(), "method": "x"})
    frames = Frames(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), None, labels, list("abcdef"), catalog)
    explorer = GridExplorer({"vit": vit}, frames, ("bcos",), n=2)
    expected = explain_windows(vit, explorer.grid[None], ["bcos"], window=32, stride=16)["bcos"]
    assert explorer.message.value == "" and torch.equal(explorer.answers["bcos"].maps, expected.maps)


def test_a_run_is_stepped_through_from_worst_to_best(detectors, frames, runs):
    assert [folder.name for folder in find_grid_runs(runs)] == ["one"] and find_grid_runs(None) == []
    explorer = GridExplorer(detectors, frames, ("gradcam",), runs=runs)
    explorer.source.value = str(find_grid_runs(runs)[0])
    assert explorer.message.value == "" and explorer.stepping.layout.display == "flex" and explorer.detector.disabled
    scores = pd.read_parquet(runs / "grid_game" / "one" / "scores.parquet")
    count, last = scores["sample"].nunique(), -1.0
    for place in range(count):
        explorer.place.value = place
        kept = scores[(scores.explainer == "bcos") & (scores.weighting == "weighted") & (scores.threshold == 0.0)].sort_values("score", kind="stable").score.tolist()
        shown = float(explorer.shares("bcos")[explorer.fake_cells[0]])
        assert shown == pytest.approx(kept[place], abs=2e-5) and shown >= last - 1e-4 and f"score in the run {kept[place]:.4f}" in explorer.verdict.value
        last = shown
    assert "centre" not in explorer.tables and list(explorer.tables) == ["bcos", "gradcam"]
    explorer.rank.value = "gradcam"
    assert explorer.place.value == 0
    saved = explorer.settings()
    explorer.next.click()
    explorer.source.value = "own"
    assert explorer.run is None and explorer.stepping.layout.display == "none" and len(explorer.cells) == 9
    explorer.restore(saved)
    assert explorer.settings() == saved and explorer.message.value == ""


def test_a_run_that_comes_out_otherwise_is_refused(detectors, frames, runs, tmp_path):
    import shutil

    shutil.copytree(runs.parent.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "runs" / "demo" / "grid_game" / "one"
    params = json.loads((folder / "params.json").read_text())
    scores = pd.read_parquet(folder / "scores.parquet")
    scores["sample"] = scores["sample"].str.replace("grid-0000 ", "grid-0000 other/")
    scores.to_parquet(folder / "scores.parquet")
    with pytest.raises(ValueError, match="1 of its .* samples are not among them.*run the game again"):
        open_grid_run(folder)
    (folder / "params.json").write_text(json.dumps(params | {"data": "gone"}))
    explorer = GridExplorer(detectors, frames, ("gradcam",), runs=tmp_path / "copy" / "runs" / "demo")
    explorer.source.value = str(folder)
    assert "gone" in explorer.message.value and "FileNotFoundError" in explorer.message.value
    (folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a complete run"):
        open_grid_run(folder)


def test_saving_and_restoring(explorer):
    explorer.detector.value, explorer.deal_from.value, explorer.threshold.value = "B = 2", "all faces", 0.3
    explorer.put(2, int(np.setdiff1d(np.arange(20), explorer.cells)[0]))
    saved = json.loads(json.dumps(explorer.settings()))
    for label in ("CSV", "HTML", "settings"):
        explorer.save.buttons[label].click()
    by_kind = {path.suffix: path for path in explorer.save.written}
    assert set(by_kind) == {".csv", ".html", ".json"}
    table = pd.read_csv(by_kind[".csv"])
    assert len(table) == 18 and np.allclose(table.groupby("explainer").unweighted.sum(), 1, atol=1e-5)
    page = by_kind[".html"].read_text()
    assert "A grid of faces" in page and "http" not in page.split("<script")[0]
    explorer.detector.value, explorer.seed.value, explorer.threshold.value = "ordinary", 5, 0.0
    explorer.save.restore_from(by_kind[".json"].read_bytes())
    assert explorer.settings() == saved and explorer.message.value == ""
    with pytest.raises(ValueError, match="the frame gone.png is not here"):
        explorer.restore(saved | {"cells": ["gone.png"]})


def test_lime_is_computed_where_it_is_wanted(detectors, frames, tmp_path):
    explorer = GridExplorer({"B = 2": detectors["B = 2"]}, frames, ("bcos", "gradcam"), n=2, folder=tmp_path)
    assert "lime" not in explorer.answers and len(explorer.canvas.content["panels"]) == 3
    explorer.lime.value = True
    maps = explain(detectors["B = 2"], explorer.grid[None], "lime").maps
    assert torch.allclose(explorer.answers["lime"].maps, maps) and [chart["name"] for chart in explorer.bars.content["charts"]] == ["B-cos", "Grad-CAM", "LIME"]
    assert explorer.settings()["lime"] and set(explorer.score_table().explainer) == {"bcos", "gradcam", "lime"}
    explorer.lime.value = False
    assert len(explorer.canvas.content["panels"]) == 3 and set(explorer.tables) == {"bcos", "gradcam"}


async def until(said):
    for _ in range(600):
        if said():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come")


def in_a_kernel(work):
    """Runs a coroutine in an event loop of its own, as a kernel has one."""
    return ThreadPoolExecutor(1).submit(asyncio.run, work).result()


def test_lime_can_be_given_up(detectors, frames, tmp_path):
    async def kernel():
        explorer = GridExplorer({"B = 2": detectors["B = 2"]}, frames, ("bcos",), folder=tmp_path)
        await until(lambda: explorer.tables)
        computed = explorer.cache.computed
        explorer.lime.value = True
        assert explorer.canvas.content["panels"][-1]["words"] and explorer.stop.layout.visibility == explorer.bar.layout.visibility == "visible"
        before = explorer.cells
        explorer.deal(7)  # the instrument goes on meanwhile
        await until(lambda: explorer.cells is not before)
        assert explorer.canvas.content["panels"][-1]["words"] and "bcos" in explorer.answers
        explorer.stop.click()
        assert not explorer.lime.value and explorer.stop.layout.visibility == "hidden" and len(explorer.canvas.content["panels"]) == 2
        for lane in explorer.background.lanes.values():
            lane.shutdown()  # waits for what is under way
        await asyncio.sleep(0)
        assert explorer.cache.computed == computed + 1 and "lime" not in explorer.answers and explorer.message.value == ""  # B-cos of the other grid

    in_a_kernel(kernel())


def test_controls_answer_while_a_grid_is_explained_and_the_last_grid_counts(detectors, frames, tmp_path):
    async def kernel():
        explorer = GridExplorer({"B = 2": detectors["B = 2"]}, frames, ("bcos", "gradcam"), folder=tmp_path)
        assert explorer.tables == {} and explorer.bar.layout.visibility == "visible"  # who makes one waits for nothing
        for action in (explorer.save.save_scores, explorer.save.save_settings):
            explorer.save.guarded(action)
            assert "Nothing is shown yet" in explorer.save.said.value and "alert" in explorer.save.said.value
        await until(lambda: explorer.tables)
        explorer.deal_from.value = "all faces"
        for _ in range(3):
            explorer.reshuffle.click()
        assert explorer.bar.layout.visibility == "visible"
        explorer.threshold.value = 0.2  # acts on what is still shown, and takes no bar away
        assert explorer.bar.layout.visibility == "visible"
        await until(lambda: explorer.bar.layout.visibility == "hidden")
        expected = deal_cells(explorer.frames.labels.numpy(), np.ones(len(explorer.frames), bool), 3, 1, 3)
        assert explorer.seed.value == 3 and np.array_equal(explorer.cells, expected) and explorer.message.value == ""
        explorer.put(0, int(np.setdiff1d(np.arange(20), explorer.cells)[0]))
        explorer.put(1, int(np.setdiff1d(np.arange(20), [*explorer.cells, *explorer.composed])[0]))  # before the first is there
        wanted = explorer.composed
        await until(lambda: np.array_equal(explorer.cells, wanted))
        assert (explorer.cells != expected).tolist() == [True, True] + 7 * [False]

    in_a_kernel(kernel())


def test_a_run_that_cannot_be_opened_leaves_what_was_there(detectors, frames, runs, tmp_path):
    import shutil

    shutil.copytree(runs.parent.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "runs" / "demo" / "grid_game" / "one"
    params = json.loads((folder / "params.json").read_text())
    (folder / params["detector"] / "detector.safetensors").unlink()
    explorer = GridExplorer(detectors, frames, ("gradcam",), runs=tmp_path / "copy" / "runs" / "demo", folder=tmp_path)
    cells = explorer.cells
    explorer.source.value = str(folder)
    assert "detector.safetensors" in explorer.message.value and "alert" in explorer.message.value
    assert explorer.source.value == "own" and not explorer.detector.disabled and explorer.stepping.layout.display == "none" and np.array_equal(explorer.cells, cells)
    explorer.reshuffle.click()
    assert explorer.message.value == "" and not np.array_equal(explorer.cells, cells)


def test_the_page_has_the_bars_too(explorer, tmp_path):
    page = explorer.page()
    state = json.loads(page.split('id="state">')[1].split("</script>")[0])
    assert len(state) == 2 and state[1]["weighting"] == "weighted" and [chart["name"] for chart in state[1]["content"]["charts"]] == [chart["name"] for chart in explorer.bars.content["charts"]]
    assert ".bcos-bar-fake" in page and "bcos-plot" in page and "The fake is found by" in page
