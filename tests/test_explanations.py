"""The cache of explanations: once each, within bounds, right, and nobody waits for what nobody asked for."""
import gc
import threading
import time

import pandas as pd
import pytest
import torch

from bcos_nb.data import Frames
from bcos_nb.explainers import EXPLAINERS, explain, explain_many, explain_windows, register_explainer
from bcos_nb.games.grid import Grids
from bcos_nb.models import create_detector
from bcos_nb.widgets.explanations import ExplanationCache, frozen, memory_of, owned


def made_frames(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    catalog = pd.DataFrame({"frame": [f"{k}.png" for k in range(count)], "mask": "", "video": "a", "label": 1, "method": "Deepfakes"})
    return Frames(torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8), None, torch.ones(count, dtype=torch.long), ["a"] * count, catalog)


def made_detector(b=2.0):
    torch.manual_seed(0)
    return create_detector("resnet10", b=b, width=0.25).eval()


@pytest.fixture(scope="module")
def detector():
    return made_detector()


class Tiny(torch.nn.Module):
    """A detector that costs nothing, and can be slowed down."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.weight, self.seconds = torch.nn.Parameter(torch.ones(2)), seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return images.mean((1, 2, 3))[:, None] * self.weight


@pytest.fixture
def calls():
    """Two explainers that share their work and note each call; `passes` passes through the network."""
    noted, passes = [], {"here": 1}

    @register_explainer("noted", "noted too", scale=1.0, passes=None)
    def function(question, requests):
        for _ in range(next(iter(requests.values()))["passes"] or passes["here"]):
            question.keep(question.detector(question.images))
        noted.append(sorted(requests))
        return {name: question.answer(name, question.images.mean(1) * options["scale"]) for name, options in requests.items()}

    @register_explainer("failing")
    def fails(question, requests):
        question.detector(question.images)
        noted.append(["failing"])
        raise ValueError("this one always fails")

    yield noted
    for name in ("noted", "noted too", "failing"):
        del EXPLAINERS[name]


def test_each_is_computed_once_and_together(calls):
    tiny, frames, cache = Tiny(), made_frames(3), ExplanationCache()
    first = cache.get_many(tiny, frames, 0, ["noted", "noted too"])
    assert calls == [["noted", "noted too"]] and list(first) == ["noted", "noted too"]
    assert cache.get(tiny, frames, 0, "noted") is first["noted"] and len(calls) == 1
    assert cache.get(tiny, frames, 0, "noted", {"scale": 1.0}) is first["noted"] and len(calls) == 1  # the default, spelled out
    halved = cache.get(tiny, frames, 0, "noted", {"scale": 0.5})
    assert len(calls) == 2 and torch.equal(halved.maps, first["noted"].maps / 2)
    cache.get(tiny, frames, 1, "noted too")
    cache.get_many(tiny, frames, 1, ["noted", "noted too"])
    assert calls[2:] == [["noted too"], ["noted"]]  # only what was missing
    cache.get(tiny, frames, 0, "noted", target=0), cache.get(Tiny(), frames, 0, "noted"), cache.get(tiny, made_frames(3), 0, "noted")
    assert len(calls) == 7 and cache.computed == 8


def test_changed_weights_are_other_explanations(calls):
    tiny, frames, cache = Tiny(), made_frames(1), ExplanationCache()
    before = cache.get(tiny, frames, 0, "noted")
    with torch.no_grad():
        tiny.weight.mul_(3)
    after = cache.get(tiny, frames, 0, "noted")
    assert torch.allclose(after.logits, 3 * before.logits)
    tiny.load_state_dict({"weight": torch.ones(2)})
    assert torch.equal(cache.get(tiny, frames, 0, "noted").logits, before.logits) and len(calls) == 3


@pytest.mark.parametrize("explainer", ["bcos", "gradcam", "layercam", "input_x_gradient", "lime"])
def test_alone_it_is_what_explain_gives(detector, explainer):
    frames, options = made_frames(2), {"samples": 32} if explainer == "lime" else {}
    kept, direct = ExplanationCache().get(detector, frames, 1, explainer, options), explain(detector, frames.images[1:].float() / 255, explainer, **options)
    for part in ("maps", "logits", "target", "contributions", "raw", "rgba"):
        ours, theirs = getattr(kept, part), getattr(direct, part)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), part


def test_together_it_is_what_explain_many_gives(detector):
    frames, names = made_frames(1), ["gradcam", "bcos", "gradcam++"]
    kept, direct = ExplanationCache(need_rgba=False).get_many(detector, frames, 0, names), explain_many(detector, frames.images.float() / 255, names, need_rgba=False)
    assert list(kept) == names and all(torch.equal(kept[name].maps, direct[name].maps) for name in names) and kept["bcos"].rgba is None


def test_grids_and_windows(detector):
    frames = made_frames(8)
    grids = Grids(torch.arange(8).view(2, 4), torch.tensor([0, 3]), 2, frames)
    cache = ExplanationCache()
    assert torch.equal(cache.get(detector, grids, 1, "bcos").maps, explain(detector, grids.images([1]), "bcos").maps)
    by_windows = explain_windows(detector, grids.images([1]), ["bcos"], window=32, stride=16)["bcos"]
    assert torch.equal(cache.get(detector, grids, 1, "bcos", windows=(32, 16)).maps, by_windows.maps)


def test_five_hundred_frames_within_bounds(calls):
    tiny, frames, cache = Tiny(), made_frames(500), ExplanationCache(50 * (32 * 32 * 4 + 16))
    for row in range(500):
        cache.get(tiny, frames, row, "noted")
        cache.get(tiny, frames, 0, "noted")  # used again and again, so it stays
        assert cache.bytes <= cache.max_bytes
    kept = [answer for answer, _ in cache.entries.values()]
    assert len(kept) == 50 and cache.bytes == sum(map(memory_of, kept)) == cache.max_bytes
    assert len(calls) == 500
    with pytest.raises(ValueError, match="max_bytes"):
        ExplanationCache(0)


def test_what_is_too_large_is_given_but_not_kept(calls):
    tiny, frames, cache = Tiny(), made_frames(1), ExplanationCache(100)
    assert cache.get(tiny, frames, 0, "noted").maps.shape == (1, 32, 32) and len(cache) == 0 == cache.bytes


def test_memory_is_counted_truly(detector):
    answer = explain(detector, made_frames(4).images.float() / 255, "bcos")
    row = type(answer)(**{name: value[1:2] if isinstance(value, torch.Tensor) else value for name, value in vars(answer).items()})
    alone = owned(row)
    pixels = 32 * 32 * 4
    assert memory_of(alone) == pixels * (1 + 1 + 1 + 4) + 2 * 4 + 8  # maps, contributions, raw, four colours, logits, target
    assert memory_of(row) == 4 * memory_of(alone)
    assert all(torch.equal(getattr(alone, name), value) for name, value in vars(row).items() if isinstance(value, torch.Tensor))


def test_the_dead_are_forgotten(calls):
    tiny, frames, cache = Tiny(), made_frames(2), ExplanationCache()
    cache.get(tiny, frames, 0, "noted"), cache.get(tiny, frames, 1, "noted")
    del frames
    gc.collect()
    others = made_frames(2)
    cache.get(tiny, others, 0, "noted")
    assert len(cache) == 1 and cache.bytes == sum(size for _, size in cache.entries.values())


def test_askers_in_several_threads_share(calls):
    tiny, frames, cache, answers = Tiny(0.05), made_frames(4), ExplanationCache(), []
    ask = lambda row: answers.append((row, cache.get_many(tiny, frames, row, ["noted", "noted too"])["noted"]))
    threads = [threading.Thread(target=ask, args=(row,)) for row in (0, 1, 2, 3) * 3]
    [thread.start() for thread in threads], [thread.join(30) for thread in threads]
    assert len(answers) == 12 and len(calls) == 4
    for row in range(4):
        assert len({id(answer) for asked, answer in answers if asked == row}) == 1
        assert torch.equal(next(answer for asked, answer in answers if asked == row).maps[0], (frames.images[row].float() / 255).mean(0))


def test_detectors_in_several_threads_stay_themselves():
    detectors, frames = [made_detector(), made_detector(None), made_detector(1.5)], made_frames(3)
    names = [["bcos", "gradcam"], ["gradcam", "layercam"], ["bcos", "layercam"]]
    expected = [[explain_many(one, frames.images[row:row + 1].float() / 255, which) for row in range(3)] for one, which in zip(detectors, names)]
    cache, wrong = ExplanationCache(), []

    def ask(k):
        for row in range(3):
            found = cache.get_many(detectors[k], frames, row, names[k])
            wrong.extend((k, row, name) for name in names[k] if not torch.equal(found[name].maps, expected[k][row][name].maps))

    threads = [threading.Thread(target=ask, args=(k,)) for k in (0, 1, 2, 0, 1, 2)]
    [thread.start() for thread in threads], [thread.join(60) for thread in threads]
    assert not wrong and cache.computed == 18
    assert all(parameter.requires_grad for one in detectors for parameter in one.parameters()) and not any(one._forward_pre_hooks for one in detectors)


def test_ahead(calls):
    tiny, frames, cache, steps = Tiny(), made_frames(5), ExplanationCache(), []
    cache.get(tiny, frames, 1, "noted")
    ahead = cache.ahead(tiny, frames, [0, 1, 2], ["noted"], progress=lambda done, of: steps.append((done, of)))
    assert ahead.wait(10) and steps == [(1, 3), (2, 3), (3, 3)]
    assert cache.has(tiny, frames, 2, ["noted"]) and not cache.has(tiny, frames, 3, ["noted"])
    cache.get(tiny, frames, 0, "noted"), cache.get(tiny, frames, 2, "noted")
    assert len(calls) == 3
    assert cache.ahead(tiny, frames, [3], ["noted"]).wait(10) and len(calls) == 4  # the thread begins anew


def test_who_asks_overtakes(calls):
    tiny, frames, cache = Tiny(0.05), made_frames(3), ExplanationCache()
    ahead = cache.ahead(tiny, frames, [0], ["noted"], {"noted": {"passes": 60}})  # three seconds
    time.sleep(0.2)
    begin = time.perf_counter()
    cache.get(tiny, frames, 1, "noted")
    assert time.perf_counter() - begin < 1.5 and not ahead.ended.is_set()
    ahead.cancel()
    time.sleep(0.3)
    assert not cache.has(tiny, frames, 0, ["noted"], {"noted": {"passes": 60}}) and calls == [["noted"]] and cache.running == {}


def test_what_is_under_way_is_waited_for(calls):
    tiny, frames, cache, steps = Tiny(0.03), made_frames(3), ExplanationCache(), []
    ahead = cache.ahead(tiny, frames, [0], ["noted"], {"noted": {"passes": 20}})
    time.sleep(0.15)
    cache.get(tiny, frames, 0, "noted", {"passes": 20}, progress=lambda done, of: steps.append(done))
    assert calls == [["noted"]] and ahead.wait(10) and steps and max(steps) <= 20


def test_nothing_is_computed_ahead_while_a_detector_is_used(calls):
    tiny, frames, cache = Tiny(), made_frames(2), ExplanationCache()
    with cache.using(tiny):
        ahead = cache.ahead(tiny, frames, [0], ["noted"])
        time.sleep(0.2)
        assert calls == []
        cache.get(tiny, frames, 1, "noted")  # the thread that uses it may ask
    assert ahead.wait(10) and len(calls) == 2


def test_ahead_keeps_to_half_of_the_memory(calls):
    tiny, frames, cache = Tiny(), made_frames(40), ExplanationCache(20 * (32 * 32 * 4 + 16))
    for row in range(5):
        cache.get(tiny, frames, row, "noted")
    ahead = cache.ahead(tiny, frames, range(5, 40), ["noted"])
    assert ahead.wait(10) and ahead.done == 11 and ahead.left_out == 24
    assert all(cache.has(tiny, frames, row, ["noted"]) for row in range(16))


def test_errors_reach_the_asker(calls):
    tiny, frames, cache = Tiny(), made_frames(2), ExplanationCache()
    ahead = cache.ahead(tiny, frames, [0, 1], ["failing"])
    with pytest.raises(ValueError, match="always fails"):
        ahead.wait(10)
    assert list(ahead.errors) == [0, 1] and ahead.done == 2
    with pytest.raises(ValueError, match="always fails"):
        cache.get(tiny, frames, 0, "failing")
    with pytest.raises(ValueError, match="no explainer 'nothing'"):
        cache.ahead(tiny, frames, [0], ["nothing"])
    with pytest.raises(ValueError, match="no option"):
        cache.get(tiny, frames, 0, "noted", {"smoth": 3})
    assert cache.running == {} and cache.asking == 0 and cache.get(tiny, frames, 0, "noted").maps.shape == (1, 32, 32)


def test_progress_knows_the_second_time(calls):
    tiny, frames, cache, steps = Tiny(), made_frames(2), ExplanationCache(), []
    for row in range(2):
        cache.get(tiny, frames, row, "noted", {"passes": 3}, progress=lambda done, of: steps.append((done, of)))
    assert steps == [(1, None), (2, None), (3, None), (1, 3), (2, 3), (3, 3)]


def test_options_as_keys():
    assert frozen({"a": torch.ones(2), "b": [1]}) == frozen({"b": (1,), "a": torch.ones(2)}) != frozen({"b": (1,), "a": torch.zeros(2)})
    with pytest.raises(TypeError):
        frozen({"a": {1, 2}})
