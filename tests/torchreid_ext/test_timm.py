"""Networks of timm in the place of networks of torchreid's zoo."""

import copy

import onnxruntime
import pytest
import torch
import trained

from pml_drsl.checks import InputError
from torchreid_ext import Searcher, config, get_default_config, networks
from torchreid_ext.search.export import drawn_images, export

timm = pytest.importorskip("timm")


def images(height=64, width=32, size=4):
    return torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(1))


SMALL = {"resnet10t": (64, 32), "vit_tiny_patch16_224": (64, 32), "mobilenetv3_small_050": (64, 32)}


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_synchronised_batch_normalisation_keeps_the_activations(name):
    torch.manual_seed(0)
    model = networks.TimmNetwork(name, 5, "triplet", False, 64, 32)
    networks.add_neck(model)
    model.eval()
    with torch.no_grad():
        expected = model(images())
        model = networks.with_sync_batchnorm(model)
        torch.testing.assert_close(model(images()), expected)
    kinds = [type(layer) for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    assert kinds and all(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds)


@pytest.mark.parametrize(("name", "size"), SMALL.items())
@pytest.mark.parametrize("neck", [False, True])
def test_a_network_of_timm_returns_what_an_engine_needs(name, size, neck):
    torch.manual_seed(0)
    model = networks.TimmNetwork(name, 5, "triplet", False, *size)
    if neck:
        networks.add_neck(model)
    networks.set_memory_format(model, "auto", *size)
    (dimension,) = networks.feature_sizes(model, *size)
    logits, features = model.train()(images(*size))
    assert logits.shape == (4, 5) and features.shape == (4, dimension)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    # Evaluation returns the pooled features of timm's own network; with a neck, what the neck makes of them.
    model.eval()
    wanted = model.backbone(images(*size))
    assert torch.equal(model(images(*size)), model.classifier.neck(wanted) if neck else wanted)
    # A network with position embeddings has them for another size.
    if name != "vit_tiny_patch16_224":
        plain = timm.create_model(name, num_classes=0)
        plain.load_state_dict(model.backbone.state_dict())
        torch.testing.assert_close(plain.eval()(images(*size)), wanted, rtol=1e-3, atol=1e-4)


def test_a_network_of_timm_has_its_own_size_stride_and_normalisation():
    model = networks.TimmNetwork("resnet10t", 5, height=64, width=32)
    shapes = []
    model.backbone.layer4.register_forward_hook(lambda layer, given, output: shapes.append(output.shape[2:]))
    model.eval()(images())
    networks.set_last_stride(model, "timm/resnet10t")
    model(images())
    assert shapes == [(2, 1), (4, 2)]
    (height, width), mean, _ = networks.timm_images("vit_tiny_patch16_224")
    assert (height, width) == (224, 224) and mean == [0.5] * 3
    with pytest.raises(InputError, match=r"model\.last_stride 1 is for"):
        networks.set_last_stride(networks.TimmNetwork("vit_tiny_patch16_224", 5), "timm/vit_tiny_patch16_224")
    with pytest.raises(InputError, match="timm has no network 'resnet10x'; did you mean 'timm/"):
        networks.TimmNetwork("resnet10x", 5)
    with pytest.raises(InputError, match=r"'resnet50\.a1_in1K'; did you mean 'timm/resnet50\.a1_in1k'"):
        networks.timm_images("resnet50.a1_in1K")


def test_the_last_stride_of_every_kind_of_resnet_is_1_or_refused():
    for name in ("res2net50_26w_4s", "resnetblur50"):
        model = networks.TimmNetwork(name, 3, "softmax", False, 64, 64)
        if name == "resnetblur50":
            with pytest.raises(InputError, match="resnetblur50 blurs where it strides"):
                networks.set_last_stride(model, name)
        else:
            networks.set_last_stride(model, name)
            assert model.eval()(images(64, 64, 1)).shape == (1, 2048)


def test_by_configuration_it_is_built_with_its_name():
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "timm/resnet10t", "model.pretrained", "False", "use_gpu", "False"])
    cfg.merge_from_list(["model.bnneck", "True", "model.last_stride", "1", "data.height", "64", "data.width", "32"])
    model = config.build_model(cfg, 5)
    assert isinstance(model, networks.TimmNetwork) and isinstance(model.classifier, networks.NeckClassifier)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(images()), model.eval()(images()))


def test_an_assigned_size_that_is_the_default_of_other_networks_outlives_a_merge():
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "timm/vit_tiny_patch16_224"])
    assert (cfg.data.height, cfg.data.width) == (224, 224)
    cfg.data.height, cfg.data.width = 256, 128
    cfg.merge_from_list(["train.max_epoch", 3])
    assert (cfg.data.height, cfg.data.width) == (256, 128)


def test_images_have_the_networks_own_size_and_normalisation_unless_others_are_given(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {height: 64}\nmodel: {name: timm/vit_tiny_patch16_224}\n")
    (tmp_path / "zoo.yaml").write_text("base: own.yaml\nmodel: {name: osnet_x0_25}\n")
    cfg, zoo = get_default_config(), get_default_config()
    cfg.merge_from_file(tmp_path / "own.yaml")
    zoo.merge_from_file(tmp_path / "zoo.yaml")
    wanted = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert (cfg.data.height, cfg.data.width) == (64, wanted.input_size[2])
    assert (tuple(cfg.data.norm_mean), tuple(cfg.data.norm_std)) == (wanted.mean, wanted.std)
    # What is given stays, in any order, also when the configuration of a run is read again.
    cfg.merge_from_list(["data.width", "32", "data.norm_mean", "[0.1, 0.2, 0.3]", "model.name", cfg.model.name])
    again = get_default_config()
    again.merge_from_list([word for pair in config.flat(cfg).items() for word in pair])
    assert (again.data.height, again.data.width, again.data.norm_mean) == (64, 32, [0.1, 0.2, 0.3])
    cfg, plain = get_default_config(), get_default_config()
    cfg.merge_from_file(tmp_path / "own.yaml")
    cfg.merge_from_list(["model.name", "osnet_x0_25"])
    for back in (zoo, cfg):
        assert (back.data.height, back.data.width, back.data.norm_mean[0]) == (64, 128, 0.485)
        assert back.data.norm_std == plain.data.norm_std


@pytest.mark.slow  # and torch 2.6 cannot export it
def test_a_vision_transformer_trains_in_chunks_and_half_precision_and_is_exported_and_searched(tmp_path, monkeypatch):
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: make(name, depth=2, **options))  # of 12 blocks
    checkpoint = trained.train(tmp_path, **{
        "model.name": "timm/vit_tiny_patch16_224", "data.height": 64, "data.width": 32, "model.bnneck": True,
        "train.chunk_size": 4, "train.amp": "bf16",
    })  # fmt: skip
    searcher, images = Searcher(checkpoint, device="cpu"), drawn_images(3)
    searcher.add(images, names=["a", "b", "c"])
    assert [found[0].name for found in searcher.search(images, top=1)] == ["a", "b", "c"]
    export(searcher.model, tmp_path / "model.onnx")  # which refuses features that differ from the network's
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 64, 32]
