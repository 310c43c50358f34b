"""The neck and the last stride, put into networks that know nothing of them."""

import copy

import processes
import pytest
import torch
import torchreid
from torch.nn import functional as F

from pml_drsl.checks import InputError
from torchreid_ext import config, get_default_config, networks
from torchreid_ext.checkpoint import checkpoint


def build(name="osnet_x0_25", loss="triplet", num_classes=5):
    torch.manual_seed(0)
    return torchreid.models.build_model(name, num_classes, loss=loss, pretrained=False, use_gpu=False)


def images(height=64, width=32, size=4):
    return torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(1))


def normalised(x, eps=1e-5):
    """Batch normalisation by its formula, without scale and shift."""
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + eps).sqrt()


def test_metric_loss_before_the_neck_and_cross_entropy_after_it():
    model = build()
    plain = copy.deepcopy(model).train()
    networks.add_neck(model)
    logits, features = model.train()(images())
    _, wanted = plain(images())
    torch.testing.assert_close(features, wanted)
    torch.testing.assert_close(logits, normalised(wanted) @ model.classifier.weight.T, atol=1e-4, rtol=1e-3)


def test_retrieval_is_after_the_neck():
    model = build()
    plain = copy.deepcopy(model).eval()
    networks.add_neck(model)
    neck = model.classifier.neck
    neck.running_mean.uniform_(-1, 1), neck.running_var.uniform_(1, 2), torch.nn.init.uniform_(neck.weight)
    features = plain(images())
    wanted = (features - neck.running_mean) / (neck.running_var + neck.eps).sqrt() * neck.weight
    torch.testing.assert_close(model.eval()(images()), wanted)
    assert not model.training and not any(module.training for module in model.modules())


def test_neither_shift_nor_bias_is_ever_learned():
    model = build()
    networks.add_neck(model)
    torchreid.utils.open_all_layers(model)
    assert {name for name, _ in model.named_parameters() if name.startswith("classifier")} == {
        "classifier.weight",
        "classifier.neck.weight",
    }


@pytest.mark.parametrize(("name", "size", "sizes"), [("pcb_p4", (64, 32), [256] * 4), ("hacnn", (160, 64), [512, 512])])
def test_networks_with_several_classifiers_have_as_many_necks(name, size, sizes):
    model = build(name)
    networks.add_neck(model)
    logits, features = model.train()(images(*size))
    assert [tuple(y.shape) for y in logits] == [(4, 5)] * len(sizes)
    assert [x.shape[1] for x in features] == sizes
    assert model.eval()(images(*size)).shape == (4, sum(sizes))


@pytest.mark.parametrize("name", ["osnet_x0_25", "hacnn"])
def test_built_for_softmax_it_returns_logits_alone(name):
    model = build(name, loss="softmax")
    networks.add_neck(model)
    output = model.train()(images(160, 64))
    shapes = [tuple(y.shape) for y in (output if isinstance(output, list) else [output])]
    assert shapes == [(4, 5)] * (2 if name == "hacnn" else 1)


def test_weights_of_the_plain_network_load(tmp_path):
    model = build()
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    twin = build()
    torch.nn.init.zeros_(twin.conv1.conv.weight)
    networks.add_neck(twin)
    assert checkpoint.fit_weights(twin, checkpoint.load(path), path).unused == ["classifier.bias"]
    assert torch.equal(twin.conv1.conv.weight, model.conv1.conv.weight)


def test_a_network_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match=r"model\.bnneck: Sequential has no linear layer named classifier"):
        networks.add_neck(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["resnet18", "resnet50_ibn_b", "se_resnet50", "resnet50mid", "pcb_p4"])
def test_last_stride_doubles_the_last_feature_map(name):
    sizes = {}
    for stride in (2, 1):
        model = build(name)
        if stride == 1:
            networks.set_last_stride(model, name)
        model.layer4[-1].register_forward_hook(lambda _, __, output, s=stride: sizes.update({s: output.shape[2:]}))
        model.eval()(images(128, 64, 1))
    assert tuple(sizes[1]) == (8, 4)
    assert tuple(sizes[2]) == ((8, 4) if name.startswith("pcb") else (4, 2))


def test_last_stride_is_refused_where_there_is_no_last_stage_to_change():
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "osnet_x0_25", "model.pretrained", "False", "model.last_stride", "1"])
    with pytest.raises(ValueError, match=r"model\.last_stride 1 .* osnet_x0_25 has none: leave it at 2"):
        config.build_model(cfg, 5)


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [("osnet_x0_25", (64, 32), [512]), ("pcb_p4", (64, 32), [8192]), ("hacnn", (160, 64), [512, 512])],
)
def test_feature_sizes_leave_the_network_as_it_was(name, size, sizes):
    model = build(name)
    model.train()
    first = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    first.eval()
    before = copy.deepcopy(model.state_dict())
    assert networks.feature_sizes(model, *size) == sizes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not first.training


def test_feature_sizes_of_a_network_inside_another_one():
    model = torch.nn.Sequential(build()).eval()
    assert networks.feature_sizes(model, 64, 32) == [512]
    assert not any(module.training for module in model.modules())
    with pytest.raises(InputError, match=r"must return \(logits, features\) in training, got Tensor"):
        networks.feature_sizes(build(loss="softmax"), 64, 32)


def test_a_head_learns_through_its_neck():
    model = build()
    networks.add_neck(model)
    logits, _ = model.train()(images())
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert model.classifier.neck.weight.grad.abs().max() > 0
    assert model.conv1.conv.weight.grad.abs().max() > 0


def test_a_compiled_network_has_the_same_neck():
    model = build("squeezenet1_1")
    networks.add_neck(model)
    model.train()
    twin = torch.compile(copy.deepcopy(model), backend="eager")
    for mode in (True, False):
        model.train(mode)
        twin.train(mode)
        found, wanted = twin(images()), model(images())
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("name", "size"), [("osnet_x0_25", (64, 32)), ("pcb_p4", (64, 32)), ("resnet18", (64, 32))])
@pytest.mark.parametrize("how", ["file", "copy"])
def test_a_whole_network_with_a_neck_is_saved_and_copied(tmp_path, name, size, how):
    model = build(name)
    networks.add_neck(model)
    if how == "copy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "whole.pth")
        twin = torch.load(tmp_path / "whole.pth", weights_only=False)
    assert type(twin) is type(model) and isinstance(twin, type(build(name)))
    model.train(), twin.train()
    outputs = []
    for either in (twin, model):
        # pcb_p4 has dropout.
        torch.manual_seed(0)
        outputs.append(either(images(*size)))
    torch.testing.assert_close(*outputs)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert twin.eval()(images(*size)).shape == model.eval()(images(*size)).shape


def compare(rank, folder):
    given, wanted = torch.load(folder / "wanted.pth")
    torch.testing.assert_close(torch.load(folder / "whole.pth", weights_only=False)(given), wanted)


def test_another_process_loads_a_whole_network_with_a_neck(tmp_path):
    model = build().eval()
    networks.add_neck(model)
    torch.save(model, tmp_path / "whole.pth")
    torch.save((images(), model(images())), tmp_path / "wanted.pth")
    processes.start(compare, (tmp_path,), 1)


def formats(model):
    """The memory formats of a network's convolutions that look different in them."""
    weights = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] * p.shape[3] > 1]
    return {"last" if p.is_contiguous(memory_format=torch.channels_last) else "first" for p in weights}


@pytest.mark.parametrize("neck", [False, True])
def test_channels_last_changes_nothing_but_the_memory_format(neck):
    model = build()
    if neck:
        networks.add_neck(model)
    model.double().conv2.eval()
    modes = [module.training for module in model.modules()]
    twin = copy.deepcopy(model)
    networks.set_memory_format(twin, False, 64, 32)
    assert formats(twin) == {"first"}
    networks.set_memory_format(twin, "auto", 64, 32)
    assert formats(twin) == {"last"} and [module.training for module in twin.modules()] == modes
    for (name, value), (other, same) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, same)
    for training in (True, False):
        outputs = [network.train(training)(images().double()) for network in (model, twin)]
        torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-10)
    assert twin.conv1(images().double()).is_contiguous(memory_format=torch.channels_last)


def test_a_network_whose_format_was_set_in_inference_mode_still_trains():
    model = torch.nn.Conv2d(3, 4, 3)
    weight = model.weight
    with torch.inference_mode():
        networks.set_memory_format(model, True, 8, 8)
    assert formats(model) == {"last"} and model.weight is weight
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    assert weight.grad is not None


class Grey(torch.nn.Conv2d):
    def forward(self, x):
        assert x.shape[1] == 1, "one channel, please"
        return super().forward(x)


@pytest.mark.parametrize(
    ("name", "size"), [("osnet_ibn_x1_0", (64, 32)), ("pcb_p6", (192, 64)), ("takes other images", (64, 32))]
)
def test_auto_leaves_networks_that_are_slower_or_cannot_take_the_format(name, size):
    model = Grey(4, 2, 3) if name == "takes other images" else build(name)
    networks.set_memory_format(model, "auto", *size)
    assert formats(model) == {"first"}
    if name != "osnet_ibn_x1_0":
        with pytest.raises(InputError, match=r"train\.channels_last True: (PCB|Grey) cannot compute in this memory f"):
            networks.set_memory_format(model, True, *size)
        assert formats(model) == {"first"}
    else:
        networks.set_memory_format(model, True, *size)
        assert formats(model) == {"last"}


def test_a_network_whose_first_forward_pass_makes_a_buffer_can_be_tried():
    class Lazy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            self.register_buffer("positions", torch.arange(x.shape[-1]))
            features = self.norm(self.layer(x)).mean((2, 3))
            return (features, features) if self.training else features

    model = Lazy()
    before = model.norm.running_mean.clone()
    networks.on_black_images(model, 8, 4, training=True, layers_train=True, number=2)
    assert torch.equal(model.norm.running_mean, before) and len(model.positions) == 4
