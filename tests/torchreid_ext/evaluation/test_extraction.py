"""A test that several processes share gives, bit for bit, the result of one process."""

import contextlib
import io
import json
import random
from pathlib import Path
from unittest import mock

import numpy as np
import processes
import pytest
import torch
from shared_training import Network
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy_data import make_image_manager, make_video_manager

from pml_drsl.evaluation import distances as distance_rows
from pml_drsl.evaluation.ranking import rank_queries
from torchreid_ext.engine.engines import ImageDRSLEngine, VideoDRSLEngine
from torchreid_ext.evaluation import extraction
from torchreid_ext.runtime.signals import Interrupted

# Each case has arguments of the data manager and of `test`. There are 12 queries and 12 gallery images (6 tracklets
# each). Batches of 5 give three batches each. Batches of 100 give one, so that most processes have no batch.
CASES = {
    "three batches": ({"batch_size_test": 5}, {}),
    "one batch": ({"batch_size_test": 100}, {"dist_metric": "cosine", "normalize_feature": True}),
    "twelve batches and workers": ({"batch_size_test": 1, "workers": 1}, {"use_metric_cuhk03": True}),
    "re-ranked": ({"batch_size_test": 5}, {"rerank": True}),
    "tracklets": ({"batch_size_test": 4}, {}),
    "tracklets, random frames": ({"batch_size_test": 4, "sample_method": "random", "seq_len": 1}, {}),
}
RANKINGS = [
    {"protocol": protocol, "ties": ties, "chunk": chunk, "with_cams": with_cams}
    for protocol, ties, chunk, with_cams in [
        ("standard", "mean", 37, True),
        ("standard", "pessimistic", 230, False),
        ("single-gallery-shot", "mean", 37, True),
        ("single-gallery-shot", "optimistic", 100, True),
    ]
]


def make_engine(case, folder, rank=0):
    video = case.startswith("tracklets")
    with contextlib.redirect_stdout(io.StringIO()):
        manager = (make_video_manager if video else make_image_manager)(folder, **CASES[case][0])
    torch.manual_seed(0)
    model = Network(torch.float32, dropout=0.5)  # and so with batch normalisation
    with torch.no_grad():
        for buffer in model.buffers():  # in training each process gathers statistics of its own
            buffer.add_(rank)
    engine = (VideoDRSLEngine if video else ImageDRSLEngine)(
        manager, model, torch.optim.SGD(model.parameters(), lr=0.1), use_gpu=False
    )
    # Each identity has the colours of two persons, so that the search makes mistakes.
    engine.parse_data_for_eval = lambda data: (data["img"], data["pid"] % 3, data["camid"])
    seed(3 + rank)
    return engine


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def run_test(engine, case, save_dir=""):
    result = next(iter(engine.test(save_dir=save_dir, **CASES[case][1]).values()))
    return result.to_dict()


def make_search():
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(size, 48, generator=generator) for size in (230, 900))
    ids, cams = ([torch.randint(0, high, (size,), generator=generator) for size in (230, 900)] for high in (40, 3))
    ids[0][7] = 99  # a query without a match
    return query, gallery, ids, cams


def rank(options, group=None):
    query, gallery, ids, cams = make_search()
    options = dict(options)
    cams = cams if options.pop("with_cams") else (None, None)
    with mock.patch.object(distance_rows, "ELEMENTS_PER_CHUNK", options.pop("chunk") * len(gallery)):
        ranked = rank_queries(distance_rows.FeatureDistances(query, gallery), *ids, *cams, group=group, **options)
    return [ranked.average_precision, ranked.inverse_negative_penalty, ranked.first_places, ranked.num_junk]


def work(rank_, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank_, world_size=world_size)
    pair = dist.new_group([0, 1])
    own = folder / f"process{rank_}"
    own.mkdir()
    found = {"rankings": [rank(options, dist.group.WORLD) for options in RANKINGS]}
    if rank_ < 2:
        found["rankings of two"] = [rank(options, pair) for options in RANKINGS]
    distance_rows.ELEMENTS_PER_CHUNK = 40
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for case in CASES:
            engine = make_engine(case, own, rank_)
            buffers = [buffer.clone() for buffer in engine.model.buffers()]
            found[case] = run_test(engine, case, str(folder / f"{case} {rank_}"))
            left = [torch.equal(a, b) for a, b in zip(buffers, engine.model.buffers(), strict=True)]
            found[f"{case}: left as it was"] = all(left)
    found["printed"] = printed.getvalue()

    engine = make_engine("three batches", own, rank_)
    engine.model.eval()
    if rank_ < 2:
        loader = next(iter(engine.test_loader.values()))["gallery"]
        found["features of two"] = extraction.extract(engine, loader, pair).features
    engine.model = DistributedDataParallel(engine.model)
    found["in DDP"] = run_test(engine, "three batches")

    (folder / "file").touch()
    try:
        run_test(engine, "three batches", str(folder / "file" / "results"))
    except OSError as error:
        found["not written"] = type(error).__name__
    found["raised"] = []
    if rank_ == 2:
        Path(next(iter(engine.datamanager.test_dataset.values()))["gallery"][-1][0]).unlink()
    for asked_to_stop in (False, True):
        if asked_to_stop and rank_ == 1:
            engine.stop.signum = 15
        try:
            run_test(engine, "three batches")
        except (ValueError, OSError, Interrupted) as error:
            found["raised"].append((type(error).__name__, str(error)))
    found["asked to stop"] = engine.stop.signum
    torch.save(found, folder / f"found{rank_}")
    dist.barrier()  # Meanwhile gloo frees the last tensors, for which torch would wait below without end.
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    processes.start(work, (3, folder), 3)
    return folder, [torch.load(folder / f"found{rank_}", weights_only=False) for rank_ in range(3)]


@pytest.fixture
def one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(distance_rows, "ELEMENTS_PER_CHUNK", 40)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_shared_test_has_the_result_of_one_process(outcome, one_thread, tmp_path):
    folder, found = outcome
    for case in CASES:
        wanted = run_test(make_engine(case, tmp_path), case)
        assert 0 < wanted["mAP"] < 1, case
        for of_process in found:
            assert of_process[case] == wanted, case
            assert of_process[f"{case}: left as it was"], case
        written = json.loads((folder / f"{case} 0" / "metrics.json").read_text())
        assert list(written.values()) == [wanted], case
        assert not (folder / f"{case} 1").exists(), case


@pytest.mark.slow
def test_a_shared_ranking_is_equal_to_the_ranking_of_one_process(outcome, one_thread):
    _, found = outcome
    shared = [*(of_process["rankings"] for of_process in found), *(own["rankings of two"] for own in found[:2])]
    for index, options in enumerate(RANKINGS):
        wanted = rank(options)
        for rankings in shared:
            for column, of_one in zip(rankings[index], wanted, strict=True):
                assert column.dtype == of_one.dtype, options
                np.testing.assert_array_equal(column.numpy(), of_one.numpy(), str(options))


@pytest.mark.slow
def test_the_model_may_be_wrapped_in_ddp_and_two_processes_may_share(outcome, one_thread, tmp_path):
    _, found = outcome
    engine = make_engine("three batches", tmp_path)
    engine.model.eval()
    assert [of_process["in DDP"] for of_process in found] == [run_test(engine, "three batches")] * 3
    features = extraction.extract(engine, next(iter(engine.test_loader.values()))["gallery"]).features
    assert all(torch.equal(of_process["features of two"], features) for of_process in found[:2])


@pytest.mark.slow
def test_only_the_first_process_prints(outcome):
    _, found = outcome
    assert found[0]["printed"].count("mAP:") == len(CASES)
    assert "Evaluating" not in found[1]["printed"] + found[2]["printed"]
    assert "mAP" not in found[1]["printed"] + found[2]["printed"]


@pytest.mark.slow
def test_a_failure_on_one_process_ends_the_test_on_all(outcome):
    _, found = outcome
    damage, stop = zip(*(of_process["raised"] for of_process in found), strict=True)
    assert [name for name, _ in damage] == ["InputError"] * 3
    assert damage[2][1].endswith(".png': there is no such file")
    assert damage[0][1] == damage[1][1] == f"process 2 could not test: {damage[2][1]}"
    assert [name for name, _ in stop] == ["Interrupted"] * 3
    assert [of_process["asked to stop"] for of_process in found] == [15] * 3


@pytest.mark.slow
def test_results_that_cannot_be_written_end_the_test_on_all(outcome):
    """Only the first process writes; the others would wait for it."""
    _, found = outcome
    assert found[0]["not written"] == "NotADirectoryError" and all("not written" in of_process for of_process in found)


def test_processes_without_an_image_have_no_samples_as_one_process_has_none(tmp_path):
    """Which images cannot be read, and whether that is an error, is known to the caller alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert extraction.gather_samples(lambda: None, torch.device("cpu"), dist.group.WORLD) is None
    finally:
        dist.destroy_process_group()


def test_shares_are_complete_and_even(monkeypatch):
    for world_size in (1, 2, 3, 7):
        monkeypatch.setattr(dist, "get_world_size", lambda group, size=world_size: size)
        for number in (0, 1, 5, 14):
            parts = []
            for rank_ in range(world_size):
                monkeypatch.setattr(dist, "get_rank", lambda group, rank_=rank_: rank_)
                parts.append(list(range(number))[extraction.share(number, None)])
            assert [thing for part in parts for thing in part] == list(range(number))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
