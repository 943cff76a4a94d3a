import math

import pytest
import torch
from torch import nn

import spade_fast as sf
from spade_fast import presets
from spade_fast.layers import prunable_layers


def test_longest_match_wins():
    plan = sf.SparsityPlan.from_mapping({"layer4": 0.5, "layer4.1": 0.8, "layer4.1.conv2": 0.9})
    assert plan.target("layer4.0.conv1") == 0.5
    assert plan.target("layer4.1.conv1") == 0.8
    assert plan.target("layer4.1.conv2") == 0.9
    assert plan.target("layer3.0.conv1") is None


def test_prefixes_end_at_dots():
    plan = sf.SparsityPlan.from_mapping({"layer1.1": 0.5})
    assert plan.target("layer1.10") is None
    assert plan.target("layer1.1") == 0.5


def test_uniform():
    assert sf.SparsityPlan.uniform(0.3).target("anything") == 0.3
    some = sf.SparsityPlan.uniform(0.3, layers=["a", "b.c"])
    assert (some.target("a"), some.target("b.c.d"), some.target("b")) == (0.3, 0.3, None)
    assert sf.SparsityPlan.uniform(0.3, layers="a").target("a") == 0.3


def test_json_round_trip(tmp_path):
    plan = sf.SparsityPlan(targets={"layer4": 0.5}, default=0.1)
    plan.to_json(tmp_path / "plan.json")
    assert sf.SparsityPlan.from_json(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a sparsity plan"),
        ('{"targets": [1]}', "is not a sparsity plan"),
        ('{"layers": {}}', "is not a sparsity plan"),
        ("{", "cannot read the sparsity plan"),
        ('{"targets": {"fc": 1.5}}', r"plan\.json.*'fc' must lie within"),
        ('{"targets": {"fc": NaN}}', "got nan"),
        (f'{{"default": {10**400}}}', "default sparsity must lie within .* got inf"),
        ("[" * 100_000, "cannot read the sparsity plan"),
    ],
)
def test_bad_json_names_the_file(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(sf.InvalidInputError, match=message) as caught:
        sf.SparsityPlan.from_json(path)
    assert "plan.json" in str(caught.value)


def test_missing_json_names_the_file(tmp_path):
    with pytest.raises(sf.InvalidInputError, match=r"nowhere\.json"):
        sf.SparsityPlan.from_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, "0.5", None, True])
def test_bad_sparsities_name_their_key(value):
    with pytest.raises(sf.InvalidInputError, match=r"sparsity of 'layer4\.1'"):
        sf.SparsityPlan.from_mapping({"layer4.1": value})


def test_unknown_keys_name_the_nearest():
    plan = sf.SparsityPlan.from_mapping({"layer4.2.conv": 0.5})
    with pytest.raises(sf.InvalidInputError, match=r"'layer4\.2\.conv' matches no .*'layer4\.2\.conv1'"):
        plan.check_keys(["layer4.2.conv1", "layer4.2.conv2", "fc"])


def test_plans_are_read_only():
    plan = sf.SparsityPlan.uniform(0.5, layers=["a"])
    with pytest.raises(TypeError):
        plan.targets["a"] = 0.1


def test_last_half_takes_the_later_half_but_no_depthwise_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Linear(8, 2),
    )
    plan = presets.last_half(model)
    assert {name: plan.target(name) for name in prunable_layers(model)} == {
        "0": None, "1": None, "2": 0.8, "3": None, "4": 0.8,
    }  # fmt: skip


def test_resnet50_presets_match_the_network():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet50()
    layers = prunable_layers(model)
    for plan in (presets.resnet50_lrp, presets.resnet50_visualization):
        plan.check_keys(layers)
    assert [name for name in layers if presets.resnet50_lrp.target(name) is None] == ["conv1"]
    assert {name.rpartition(".conv")[0] or name for name in layers if presets.resnet50_visualization.target(name)} == {
        "layer4.1",
        "layer4.2",
        "fc",
    }


def test_shares_of_a_plan():
    assert sf.SparsityPlan({"a": 0.5, "b": 0.2, "c": 0.5}, default=0.9).shares == (0.2, 0.5, 0.9)
    assert sf.SparsityPlan({"a": 0.5}).shares == (0.5,)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(sf.InvalidInputError, match="cannot write"):
        sf.SparsityPlan({}).to_json(tmp_path / "none" / "plan.json")
