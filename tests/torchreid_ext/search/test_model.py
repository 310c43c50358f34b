"""A checkpoint alone gives back the network that was trained, and says so where it cannot."""

import threading

import pytest
import torch
import torchreid
import trained

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.networks import add_neck
from torchreid_ext.search.model import load_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def necked(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("necked"), **{"model.bnneck": True})


def by_hand(path, neck):
    """The network, built and loaded with torchreid and torch alone, but for the neck."""
    network = torchreid.models.build_model("osnet_x0_25", 6, loss="triplet", pretrained=False)
    if neck:
        add_neck(network)
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return network.eval()


@pytest.mark.parametrize("neck", [False, True])
def test_a_checkpoint_alone_gives_the_network(plain, necked, neck):
    path = necked if neck else plain
    model = load_model(path, device="cpu")
    images = torch.randn(3, 3, 32, 16)
    with torch.no_grad():
        assert torch.equal(model.features(images), by_hand(path, neck)(images))
    assert (model.config.data.height, model.config.data.width, model.metric) == (32, 16, "cosine")
    assert model.config.data.norm_mean == [0.4, 0.5, 0.6]
    assert not model.network.training


def test_threads_do_not_disturb_each_other(necked):
    """A network with a neck changes its mode while it computes."""
    model = load_model(necked, device="cpu")
    images = torch.randn(2, 3, 32, 16)
    expected, found = model.features(images), []
    threads = [
        threading.Thread(target=lambda: found.extend(model.features(images) for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(torch.equal(features, expected) for features in found)


def test_the_fingerprint_tells_models_apart(plain, necked, tmp_path):
    again = load_model(plain.with_name("model-last.pth.tar"), device="cpu")
    assert again.fingerprint == load_model(plain, device="cpu").fingerprint != load_model(necked).fingerprint
    state = checkpoint.load(plain)
    state["state_dict"]["conv1.conv.weight"][0, 0, 0, 0] += 1e-3
    checkpoint.save(state, tmp_path / "changed.pth")
    state["training"]["config"]["data.height"] = 33
    checkpoint.save(state, tmp_path / "higher.pth")
    marks = {load_model(path, device="cpu").fingerprint for path in (plain, *tmp_path.glob("*.pth"))}
    assert len(marks) == 3


def test_the_whole_configuration_is_loaded_and_keys_of_another_version_are_named(plain, tmp_path, capsys):
    state = checkpoint.load(plain)
    state["training"]["config"] |= {"loss.drsl.forgotten": 1, "test.batch_size": "many", "data.root": "2024"}
    state["training"]["config"] |= {"loss.drsl.miner": {"name": "MultiSimilarityMiner"}, "train.lr": 0.25}
    checkpoint.save(state, tmp_path / "old.pth")
    config = load_model(tmp_path / "old.pth").config
    assert config.data.root == "2024" and config.train.lr == 0.25
    assert config.loss.drsl.miner == {"name": "MultiSimilarityMiner"} and config.sampler.num_instances == 4
    assert "ignored: loss.drsl.forgotten, test.batch_size\n" in capsys.readouterr().err
    state["training"]["config"] = ["no mapping"]
    checkpoint.save(state, tmp_path / "old.pth")
    with pytest.raises(InputError, match="its configuration is no mapping"):
        load_model(tmp_path / "old.pth")


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(plain, tmp_path):
    best = load_model(plain, device="cpu")
    for folder in (plain.parent, plain.parents[1]):
        assert load_model(folder, device="cpu").path == str(plain) == best.path
    (tmp_path / "model").mkdir()
    last = tmp_path / "model" / "model-last.pth.tar"
    last.write_bytes(plain.read_bytes())
    assert load_model(tmp_path, device="cpu").path == str(last)
    last.unlink()
    with pytest.raises(InputError, match="holds no model/model-best"):
        load_model(tmp_path)


@pytest.mark.parametrize(("number", "device"), [(0, "cuda"), (1, "cuda:1")])
def test_a_device_that_is_not_there_is_refused(plain, monkeypatch, number, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    with pytest.raises(InputError, match=f"device '{device}': torch finds {number} CUDA devices"):
        load_model(plain, device=device)


@pytest.mark.parametrize(("name", "size"), [("osnet_x0_25", (256, 128)), ("hacnn", (160, 64))])
def test_weights_of_the_zoo_need_only_the_name_of_the_network(tmp_path, capsys, name, size):
    torch.manual_seed(0)
    network = torchreid.models.build_model(name, 7, pretrained=False, use_gpu=False).eval()
    torch.save(network.state_dict(), tmp_path / "zoo.pth")
    model = load_model(tmp_path / "zoo.pth", device="cpu", model=name)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(model.features(images), network(images))
    assert (model.config.data.height, model.config.data.width, model.metric) == (*size, "cosine")
    assert model.config.data.norm_mean == [0.485, 0.456, 0.406]
    assert f"taking {name} with images of {size[0]} x {size[1]} pixels" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"give --model NAME.*or --config-file FILE"):
        load_model(tmp_path / "zoo.pth")
    with pytest.raises(InputError, match="does not hold the weights of 'resnet18'"):
        load_model(tmp_path / "zoo.pth", model="resnet18")
    assert not capsys.readouterr().err  # What is taken is said of a network that is loaded.


def test_a_checkpoint_of_torchreids_needs_a_config_file(tmp_path):
    torch.manual_seed(0)
    network = torchreid.models.build_model("osnet_x0_25", 6, pretrained=False).eval()
    # As torchreid's DataParallel names weights.
    state = {"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}, "epoch": 1}
    torch.save(state, tmp_path / "host.pth")
    config = tmp_path / "host.yaml"
    config.write_text("model: {name: osnet_x0_25}\ndata: {height: 40, width: 20}\n")
    model = load_model(tmp_path / "host.pth", config, device="cpu")
    images = torch.randn(2, 3, 40, 20)
    with torch.no_grad():
        assert torch.equal(model.features(images), network(images))
    with pytest.raises(InputError, match=r"holds no configuration.*--config-file"):
        load_model(tmp_path / "host.pth")
    config.write_text("model: {name: osnet_x0_5}\n")
    with pytest.raises(InputError, match="does not hold the weights of 'osnet_x0_5'"):
        load_model(tmp_path / "host.pth", config)
    config.write_text("model: {name: osnet_x0_25, bnneck: True}\n")
    with pytest.raises(InputError, match=r"weights are missing.*classifier\.neck"):
        load_model(tmp_path / "host.pth", config)
    torch.save({"epoch": 1}, tmp_path / "host.pth")
    with pytest.raises(InputError, match="holds no weights"):
        load_model(tmp_path / "host.pth", config)


@pytest.mark.parametrize("name", ["pcb_p4", "squeezenet1_0"])
def test_the_number_of_classes_is_found_for_every_kind_of_classifier(tmp_path, name):
    network = torchreid.models.build_model(name, 7, pretrained=False, use_gpu=False)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text(f"model: {{name: {name}}}\n")
    loaded = load_model(tmp_path / "weights.pth", tmp_path / "config.yaml", "cpu").network.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())


def test_torchreids_own_tools_load_a_checkpoint_without_a_neck(plain):
    images = torch.randn(2, 3, 32, 16)
    expected = load_model(plain, device="cpu").features(images)
    extractor = torchreid.utils.FeatureExtractor(
        "osnet_x0_25", str(plain), (32, 16), pixel_mean=[0.4, 0.5, 0.6], device="cpu", verbose=False
    )
    assert torch.equal(extractor(images), expected)
    network = torchreid.models.build_model("osnet_x0_25", 1, pretrained=False)
    torchreid.utils.load_pretrained_weights(network, str(plain))
    with torch.no_grad():
        assert torch.equal(network.eval()(images), expected)
