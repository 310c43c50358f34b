"""Checkpoint files are written atomically, are safe to read, and say which weights fit."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch
import torchreid
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import History


def trained(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    for _ in range(3):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def state_of(model, optimizer, scheduler):
    parts = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}
    return {"epoch": 3, "rank1": 0.5, **{name: part.state_dict() for name, part in parts.items()}}


def restored(path, model, optimizer, scheduler):
    parts = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpoint.restore(checkpoint.load(path), parts, path)


def load_weights(model, path):
    return checkpoint.fit_weights(model, checkpoint.load(path), path)


def test_a_saved_checkpoint_is_restored(tmp_path):
    parts = trained()
    checkpoint.save(state_of(*parts), tmp_path / "new" / "a.pth")
    twin = trained(seed=1)
    restored(tmp_path / "new" / "a.pth", *twin)
    for part, other in zip(parts, twin, strict=True):
        torch.testing.assert_close(part.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_torchreids_own_checkpoint_loads(tmp_path):
    state = state_of(*trained()) | {"rank1": np.float32(0.25)}
    torchreid.utils.save_checkpoint(state, str(tmp_path))
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "model.pth.tar-3")
    assert checkpoint.load(tmp_path / "model.pth.tar-3")["rank1"] == 0.25


class Bomb:
    def __reduce__(self):
        return os.system, ("echo exploded > exploded",)


def test_a_pickle_bomb_is_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match=r"refused, because it holds objects \(.*system\), .*: save the weights alone"):
        checkpoint.load("bomb.pth")
    assert os.listdir() == ["bomb.pth"]


def test_truncated_and_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save(state_of(*trained()), path)
    whole = path.read_bytes()
    contents = [whole[:size] for size in (0, 1, 100, 1500)]
    contents += [b"hello world\n", b"..", b"\x80\x02}q\x00.", bytes(range(256)), b"PK\x03\x04" + bytes(60)]
    # What one byte changes in the pickled data of an old checkpoint, which has no checksums.
    torch.save(state_of(*trained()), path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(len(old), size=150):
        contents.append(old[:place] + bytes([old[place] ^ 0x55]) + old[place + 1 :])
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            checkpoint.load(path)
        except InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and str(error).startswith(f"checkpoint '{path}' ")
            assert "weights_only" not in str(error) and "torch.load" not in str(error)
    assert refused > 30


def test_no_message_advises_to_load_unsafely(tmp_path):
    path = tmp_path / "a.pth"
    script = torch.jit.script(nn.Linear(1, 1))
    script.save(path)
    (tmp_path / "numbers.pth").write_bytes(pickle.dumps({"weight": 1.0}, protocol=4))
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "module.pth")
    for name in ("a.pth", "numbers.pth", "module.pth"):
        # torch itself does advise it.
        with pytest.raises(Exception, match="weights_only"):
            torch.load(tmp_path / name, weights_only=True)
        with pytest.raises(InputError) as caught:
            checkpoint.load(tmp_path / name)
        assert "weights_only" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_what_a_crafted_file_names_cannot_reach_the_terminal(tmp_path):
    torch.save({"\x1b[2J\nweight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(InputError) as caught:
        load_weights(nn.Linear(5, 5), tmp_path / "a.pth")
    assert str(caught.value).isprintable()


def test_any_changed_byte_in_our_checkpoints_is_detected(tmp_path):
    path = tmp_path / "a.pth"
    state = state_of(*trained()) | {"training": {}}
    checkpoint.save(state, path)
    whole = path.read_bytes()
    weights = state["state_dict"]["weight"].numpy().tobytes()
    rng = np.random.default_rng(0)
    # Bytes of the weights, which torch does not check, and a sample of all bytes.
    for place in [whole.index(weights) + 5, *rng.integers(len(whole), size=60)]:
        changed = bytearray(whole)
        changed[place] ^= 0x55
        path.write_bytes(changed)
        try:
            loaded = checkpoint.load(path)
        except ValueError as error:
            assert "a.pth' is" in str(error)
            continue
        # The changed byte was padding.
        torch.testing.assert_close(loaded["state_dict"], state["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(loaded["optimizer"], state["optimizer"], rtol=0, atol=0)
        assert place != whole.index(weights) + 5


def test_missing_and_wrong_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.pth' does not exist"):
        checkpoint.load(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a folder; give a file, such as"):
        checkpoint.load(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.load(tmp_path / "list.pth")


def test_load_weights_says_what_does_not_fit(tmp_path):
    saved = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 7))
    # torch.nn.DataParallel adds this prefix to the names.
    torch.save({f"module.{name}": value for name, value in saved.state_dict().items()}, tmp_path / "w.pth")
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5), nn.Linear(5, 1, bias=False))
    head = model[1].weight.clone()
    loaded = load_weights(model, tmp_path / "w.pth")
    assert (loaded.fitting, loaded.unused) == (["0.weight", "0.bias"], ["1.bias", "1.weight"])
    assert str(loaded) == (
        f"Loaded 2 of the model's 5 weights from '{tmp_path / 'w.pth'}'; 3 left unchanged: 1.bias, 1.weight, "
        f"2.weight; 2 of the file, not used: 1.bias, 1.weight"
    )
    assert torch.equal(model[0].weight, saved[0].weight)
    assert torch.equal(model[1].weight, head)


def test_weights_of_another_model_are_refused(tmp_path):
    narrow, wide = (nn.Sequential(nn.Linear(3, n), nn.BatchNorm1d(n), nn.Linear(n, 2)) for n in (4, 8))
    checkpoint.save(narrow.state_dict(), tmp_path / "w.pth")
    # The last bias fits, and so does the counter of the batch normalisation, which fits every other one.
    with pytest.raises(ValueError, match=r"1 of its 8 weights fit the model's 8 .*0.weight \[8, 3\]; check model.name"):
        load_weights(wide, tmp_path / "w.pth")
    # A part of the network is no other network, nor is the whole of which the network is a part.
    deeper = nn.Sequential(*narrow, *(nn.Linear(2, 2) for _ in range(9)))
    assert len(load_weights(deeper, tmp_path / "w.pth").fitting) == 9
    assert len(load_weights(narrow[:1], tmp_path / "w.pth").fitting) == 2
    for held, words in (
        ({"state_dict": [1]}, "holds a list"),
        ({0: torch.zeros(2), "weight": 3}, r"it has 0 \[2\], the"),
        ({"weight": 3}, "holds no weights"),
    ):
        torch.save(held, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=words):
            load_weights(nn.Linear(5, 5), tmp_path / "w.pth")


def test_a_complete_fit_is_demanded_of_a_trained_network(tmp_path):
    torch.manual_seed(0)
    saved, model = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    weights = checkpoint.weights_of({"state_dict": saved.state_dict()}, "w.pth")
    # Versions of torch before 0.4.1 did not count batches.
    del weights["1.num_batches_tracked"]
    loaded = checkpoint.fit_weights(model, weights, "w.pth", complete="tiny")
    assert loaded.untouched == ["1.num_batches_tracked"] and torch.equal(model[0].weight, saved[0].weight)
    for wrong in (
        {**weights, "more": torch.zeros(1)},
        {**weights, "0.bias": torch.zeros(9)},
        dict([*weights.items()][1:]),
    ):
        before = model[0].bias.clone()
        with pytest.raises(InputError, match=r"'w.pth' does not hold .* 'tiny': 1 weights .*(more|0.bias|0.weight)"):
            checkpoint.fit_weights(model, wrong, "w.pth", complete="tiny")
        assert torch.equal(model[0].bias, before)


def test_resuming_another_run_is_refused(tmp_path):
    model, optimizer, scheduler = trained()
    checkpoint.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="has no 'optimizer'"):
        restored(tmp_path / "w.pth", model, optimizer, scheduler)
    with pytest.raises(ValueError, match="does not fit this run's state_dict"):
        restored(tmp_path / "w.pth", nn.Linear(9, 9), None, None)


def test_the_state_of_another_type_of_optimizer_is_refused(tmp_path):
    model, adam, _ = trained()
    sgd = torch.optim.SGD(model.parameters(), lr=1)
    checkpoint.save({"state_dict": model.state_dict(), "optimizer": adam.state_dict(), "epoch": 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth' does not fit this run's optimizer: .*amsgrad, betas, not dampening"):
        restored(tmp_path / "a.pth", model, sgd, None)
    # The Adam of an older torch had fewer settings, and its state has fewer too.
    state = adam.state_dict()
    for setting in ("foreach", "fused", "capturable"):
        state["param_groups"][0].pop(setting, None)
    checkpoint.restore({"optimizer": state}, {"optimizer": adam}, "old")


def test_weights_fit_with_and_without_data_parallel(tmp_path):
    model = nn.Linear(3, 2)
    for one, other in ((model, nn.DataParallel(nn.Linear(3, 2))), (nn.DataParallel(model), nn.Linear(3, 2))):
        checkpoint.restore({"model": one.state_dict()}, {"model": other}, "any")
        assert torch.equal(next(other.parameters()), model.weight)


def test_a_child_named_module_keeps_its_name_in_a_network_that_has_it():
    averaged, resumed, loaded = (AveragedModel(nn.Linear(3, 2)) for _ in range(3))
    for model in (averaged, nn.DataParallel(averaged)):
        nn.init.uniform_(averaged.module.weight)
        checkpoint.restore({"model": model.state_dict()}, {"model": resumed}, "any")
        checkpoint.fit_weights(loaded, model.state_dict(), "any", complete="averaged")
        assert torch.equal(resumed.module.weight, averaged.module.weight)
        assert torch.equal(loaded.module.weight, averaged.module.weight)
    plain = nn.Linear(3, 2)
    assert not checkpoint.fit_weights(plain, averaged.state_dict(), "any").untouched
    assert torch.equal(plain.weight, averaged.module.weight)


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    checkpoint.save({"epoch": 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"state_dict holds what no checkpoint can hold, .*system: give"):
        checkpoint.save({"state_dict": Bomb()}, tmp_path / "a.pth")
    assert checkpoint.load(tmp_path / "a.pth") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


HELD = {
    "counter": collections.Counter([2, 4]), "ordered": collections.OrderedDict(a=1), "numpy": np.float64(0.5),
    "size": torch.Size([2]), "type": torch.float16, "device": torch.device("cpu"), "weight": nn.Linear(1, 1).weight,
    "set": {1, "a", b"b", None, 1j}, "default": collections.defaultdict(list), "array": np.ones(2), "bomb": Bomb(),
    "scheduler": trained()[2], "function": lambda: 0, "iterator": (number for number in ()),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_could_not_be_saved_is_refused_before_it_is_trained(tmp_path, name):
    state = {"epoch": 1, "training": {"best": {}, "part": [{"of it": (HELD[name], torch.ones(2))}]}}
    try:
        torch.save(state, tmp_path / "a.pth")
        checkpoint.load(tmp_path / "a.pth")
    except Exception:
        with pytest.raises(InputError, match=r"the state of the part holds what no checkpoint can hold, .*: give it a"):
            checkpoint.check_saves(state)
    else:
        checkpoint.check_saves(state)
    assert "part" in state["training"]


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    history = History(tmp_path, keep=1)
    history.save({"epoch": 1}, 1, is_best=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    save = torch.save

    def fill(state, file):
        if isinstance(file, io.BytesIO):  # which has no disk
            return save(state, file)
        with open("/dev/full", "wb") as full:
            save(state, full)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*tar-2': .*No space left.*saved before is kept"):
        history.save({"epoch": 2}, 2, is_best=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 3


def test_files_have_the_usual_permissions(tmp_path):
    umask = os.umask(0o022)
    try:
        checkpoint.save({"epoch": 1}, tmp_path / "a.pth")
    finally:
        os.umask(umask)
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o644
