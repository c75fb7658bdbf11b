"""SceneShortcutTransformer: who sees whom, padding, order, and what a new layer does before it has learnt anything."""

from __future__ import annotations

import pytest
import torch

from pipelines.shortcut_scene import PRESETS, SceneShortcutTransformer
from pipelines.shortcut_scene.picture_embedder import average_points, cut_windows, embed_points, surface_normals
from pipelines.shortcut_scene.transformer import join_tokens, split_tokens
from trainers.common import load_weights

TINY = {
    "shape_tokens": 8,
    "shape_channels": 5,
    "hidden_size": 32,
    "num_layers": 3,  # object, scene, object
    "num_attention_heads": 2,
    "condition": "image",
    "condition_channels": 6,
    "image_size": 16,
}
WIDTHS = {"6drotation_normalized": (1, 6), "scale": (1, 3), "shape": (8, 5), "translation": (1, 3)}
SCENE = [{"scene_attention": "full"}, {"scene_attention": "pose"}, {"scene_attention": "pose", "num_registers": 0}]


def create(trained: bool = True, **config) -> SceneShortcutTransformer:
    """A tiny network; `trained` moves every weight, so that nothing is 0 by initialisation."""
    torch.manual_seed(0)
    network = SceneShortcutTransformer(**TINY | config).eval()
    if trained:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return network


def make(
    batch: int = 3, num_objects: int = 4, seed: int = 1, **widths
) -> tuple[dict, torch.Tensor, torch.Tensor, dict]:
    torch.manual_seed(seed)
    sample = {k: torch.randn(batch, num_objects, *v) for k, v in (WIDTHS | widths).items()}
    picture = {"image": torch.randn(batch, 3, 16, 16), "pointmap": torch.randn(batch, 3, 16, 16)}
    for scene in range(batch):  # of 16 patches 16, 12, 8, ... see something
        picture["pointmap"][scene, :, : 4 * scene] = 0
    return sample, torch.rand(batch) / 2, torch.rand(batch) / 2, picture


def difference(a: dict, b: dict) -> dict[str, float]:
    return {k: float((a[k] - b[k]).abs().max()) for k in a}


def predict(network, sample, t, d, conditions, **others) -> dict:
    with torch.no_grad():
        return network(sample, t, d, **conditions, **others).sample


@pytest.mark.parametrize("modality", WIDTHS)
@pytest.mark.parametrize("scope", [*SCENE, None], ids=["full", "registers", "pose", "object"])
def test_objects_see_one_another_in_scene_scope_only(scope, modality):
    network = create(**(scope or {"attention_scope": ["object"]}))
    assert network.is_scene_level == (scope is not None)
    sample, *given = make()
    edited = {k: v.clone() for k, v in sample.items()}
    edited[modality][:, 2] += 1
    before, after = (predict(network, x, *given) for x in (sample, edited))
    changes = [(before[k] - after[k])[:, 0].abs().max() for k in before]
    if scope is None:
        assert max(changes) == 0.0
    else:
        assert min(changes) > 1e-6


@pytest.mark.parametrize("scope", [*SCENE, {"attention_scope": ["object"]}])
def test_permuting_objects_permutes_the_output(scope):
    network = create(**scope)
    sample, *given = make()
    order = torch.tensor([2, 0, 3, 1])
    straight = predict(network, sample, *given)
    permuted = predict(network, {k: v[:, order] for k, v in sample.items()}, *given)
    for name in straight:
        torch.testing.assert_close(permuted[name], straight[name][:, order], rtol=1e-5, atol=1e-5)


def test_slots_break_the_symmetry_and_are_counted():
    network = create(object_condition="slot", max_slots=4)
    sample, *given = make()
    order = torch.tensor([2, 0, 3, 1])
    straight = predict(network, sample, *given)["translation"]
    permuted = predict(network, {k: v[:, order] for k, v in sample.items()}, *given)["translation"]
    assert (permuted - straight[:, order]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="5 objects, but the network has 4 slots"):
        predict(network, *make(num_objects=5))


@pytest.mark.parametrize("scope", SCENE)
def test_padding_changes_nothing_and_a_batch_equals_its_scenes(scope):
    network = create(**scope)
    sample, t, d, conditions = make()
    counts = [2, 4, 1]
    mask = torch.arange(4) < torch.tensor(counts)[:, None]
    for name in sample:
        sample[name][~mask] = 77.0  # whatever lies there
    together = predict(network, sample, t, d, conditions, object_mask=mask)
    for i, count in enumerate(counts):
        row = slice(i, i + 1)
        alone = predict(
            network, {k: v[row, :count] for k, v in sample.items()}, t[row], d[row],
            {k: v[row] for k, v in conditions.items()},
        )  # fmt: skip
        for name in alone:
            torch.testing.assert_close(together[name][row, :count], alone[name], rtol=1e-5, atol=1e-5)
            assert (together[name][i, count:] == 0).all()


@pytest.mark.parametrize("scope", SCENE)
def test_new_layers_between_objects_leave_an_object_model_unchanged(scope, tmp_path):
    objects = create(attention_scope=["object"], use_shortcut=False)
    objects.save_pretrained(tmp_path)
    scenes = create(trained=False, **scope)
    load_weights(scenes, tmp_path, may_lack=scenes.begins_without_effect)
    sample, *given = make()
    # bit for bit up to the order in which a longer attention adds up
    for name, change in difference(predict(objects, sample, *given), predict(scenes, sample, *given)).items():
        assert change < 1e-5, name


def test_weights_handed_over_name_what_does_not_fit(tmp_path):
    create(hidden_size=64).save_pretrained(tmp_path / "wide")
    create(num_layers=1).save_pretrained(tmp_path / "short")
    create(object_condition="slot").save_pretrained(tmp_path / "slots")
    network = create()
    for folder, message in (("wide", "of another shape"), ("short", "blocks.1"), ("slots", "slots.weight")):
        with pytest.raises(ValueError, match=message):
            load_weights(network, tmp_path / folder, may_lack=network.begins_without_effect)


def test_shape_latents_joined_to_larger_tokens():
    x = torch.arange(64.0).reshape(1, 1, 64, 1)  # a cube of 4^3, z fastest
    joined = join_tokens(x, 2)
    assert joined.shape == (1, 1, 8, 8)
    assert joined[0, 0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    for side, patch_size in ((2, 2), (4, 2), (6, 3), (3, 1)):
        x = torch.randn(2, 3, side**3, 5)
        assert torch.equal(split_tokens(join_tokens(x, patch_size), patch_size), x)
    network = create(shape_patch_size=2)
    assert network.shape_positions.shape == (1, 32)
    sample, *given = make()
    velocity = predict(network, sample, *given)
    assert velocity["shape"].shape == sample["shape"].shape
    edited = sample | {"shape": sample["shape"].clone()}
    edited["shape"][:, 0, 7] += 1
    assert (predict(network, edited, *given)["shape"] - velocity["shape"])[:, 0, 0].abs().min() > 1e-6


@pytest.mark.parametrize("config", [{}, {"num_condition_layers": 1}, {"object_condition": "mask"}])
def test_patches_that_see_nothing_are_left_out(config):
    network = create(**config)
    sample, t, d, conditions = make()
    if config.get("object_condition"):
        conditions["masks"] = torch.rand(3, 4, 16, 16) > 0.5
    lengths = []
    network.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[3].shape[-2]))
    conditions["pointmap"][1, :, :8] = 0  # nothing in its upper half
    before = predict(network, sample, t, d, conditions)
    for row, changes in ((3, False), (4, True)):  # of pixels; a window has one patch more than its own on each side
        edited = conditions | {"image": conditions["image"].clone()}
        edited["image"][1, :, row, 0] += 1
        after = predict(network, sample, t, d, edited)
        assert (difference(before, after)["translation"] > 1e-6) == changes
    few = {name: value[1:] for name, value in conditions.items()}
    predict(network, {name: value[1:] for name, value in sample.items()}, t[1:], d[1:], few)
    nothing = conditions | {"pointmap": torch.zeros(3, 3, 16, 16)}
    assert all(value.isfinite().all() for value in predict(network, sample, t, d, nothing).values())
    assert lengths == [16, 16, 16, 8, 1]


def test_places_of_objects_and_of_patches_are_embedded_alike():
    network = create(translation_mean=[1.0, 2.0, 3.0], translation_std=[0.5, 0.25, 2.0])
    sample, *given = make()
    seen = []
    network.translation_waves.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predict(network, sample, *given)
    metres = sample["translation"] * torch.tensor([0.5, 0.25, 2.0]) + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(seen[0], embed_points(metres))
    period = embed_points(torch.tensor([[0.3, 0.2, 0.1], [4.3, -3.8, 4.1]]))
    torch.testing.assert_close(period[0], period[1], rtol=0, atol=1e-4)


def test_what_a_patch_is_made_of():
    x = torch.randn(2, 3, 16, 16)
    windows = cut_windows(x, 4).unflatten(-1, (3, 12, 12))
    assert windows.shape == (2, 16, 3, 12, 12)
    assert torch.equal(windows[:, 5], x[:, :, :12, :12])  # patch (1, 1) and its neighbours
    assert (windows[:, 0, :, :4] == 0).all()  # beyond the border
    some = cut_windows(x, 4, torch.tensor([[7, 5], [5, 0]])).unflatten(-1, (3, 12, 12))
    assert torch.equal(some, torch.stack([windows[0, [7, 5]], windows[1, [5, 0]]]))
    is_point = (torch.rand(2, 1, 16, 16) > 0.5).float()
    centre, share = average_points(x * is_point, is_point, 4)
    inside = is_point[0, 0, 4:8, 8:12].bool()  # patch (1, 2)
    torch.testing.assert_close(centre[0, 6], x[0, :, 4:8, 8:12][:, inside].mean(1))
    assert share[0, 6] == inside.float().mean()


def test_normals_of_points():
    along = torch.arange(8) * 0.1
    x, y = torch.meshgrid(along, -along, indexing="xy")  # as a camera above would see them
    ramp = torch.stack([x, y, 0.5 * x])[None].repeat(2, 1, 1, 1)
    ramp[1, 2, :, 4:] += 1  # a step between two surfaces
    is_point = torch.ones(2, 1, 8, 8)
    is_point[0, :, :, 5:] = 0
    normals = surface_normals(ramp, is_point)
    expected = torch.tensor([-0.5, 0, 1]) / 1.25**0.5
    torch.testing.assert_close(normals[0, :, :, :5], expected[:, None, None].expand(3, 8, 5))
    assert (normals[0, :, :, 5:] == 0).all()
    torch.testing.assert_close(normals[1], expected[:, None, None].expand(3, 8, 8))  # each from its own side
    lonely = torch.zeros(1, 1, 8, 8)
    lonely[..., 3, 3:5] = 1  # neighbours along one axis only
    assert (surface_normals(ramp[:1], lonely) == 0).all()


@pytest.mark.parametrize("config", [{}, {"condition_channels": 3}])
def test_moving_the_scene_moves_the_places_and_no_window(config):
    network = create(**config)
    _, _, _, conditions = make()
    picture = torch.cat([conditions["image"], conditions["pointmap"]], dim=1)[:, : network.config.condition_channels]
    seen = []
    network.condition_embedder.windows.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    moved = picture.clone()
    moved[:, 3:][picture[:, 3:] != 0] += 2
    (first, real), (second, _) = (network.condition_embedder(x, None) for x in (picture, moved))
    real = slice(None) if real is None else real  # what fills up rows is of no account
    torch.testing.assert_close(seen[0][real], seen[1][real], rtol=0, atol=1e-4)
    assert ((first - second)[real].abs().max() > 1e-3) == (not config)


def test_step_size_has_no_say_at_the_start():
    network = create(trained=False)
    sample, t, d, conditions = make()
    first = predict(network, sample, t, d, conditions)
    assert max(difference(first, predict(network, sample, t, 0 * d, conditions)).values()) == 0
    assert max(difference(first, predict(network, sample, 0 * t, d, conditions)).values()) == 0  # gates are 0 as well
    trained = create()
    assert (
        difference(predict(trained, sample, t, d, conditions), predict(trained, sample, t, 0 * d, conditions))["shape"]
        > 1e-4
    )


def test_objects_with_times_of_their_own():
    network = create(independent_t=True)
    sample, t, d, conditions = make()
    shared = predict(network, sample, t, d, conditions)
    expanded = predict(network, sample, t[:, None].expand(3, 4), d[:, None].expand(3, 4), conditions)
    for name in shared:
        torch.testing.assert_close(shared[name], expanded[name], rtol=1e-5, atol=1e-5)
    other = t[:, None].repeat(1, 4)
    other[:, 2] = 1.0
    assert difference(shared, predict(network, sample, other, d[:, None].expand(3, 4), conditions))["scale"] > 1e-4


def test_protected_shapes_ignore_poses():
    network = create(protect_shape=True, attention_scope=["object"])
    sample, *given = make()
    edited = sample | {"translation": sample["translation"] + 1}
    changes = difference(predict(network, sample, *given), predict(network, edited, *given))
    assert changes["shape"] == 0
    assert changes["scale"] > 1e-6
    network.train()
    velocity = network(sample, *given[:2], **given[2]).sample
    (velocity["translation"].sum() + velocity["scale"].sum()).backward()
    assert network.shape_in.weight.grad is None  # keys and values reach pose tokens detached


def test_unconditional_rows_do_not_see_the_condition():
    network = create()
    sample, t, d, conditions = make()
    unknown = torch.tensor([True, False, True])
    other = {k: v * 2 for k, v in conditions.items()}
    a = predict(network, sample, t, d, conditions, unconditional=unknown)
    b = predict(network, sample, t, d, other, unconditional=unknown)
    for name in a:
        assert torch.equal(a[name][unknown], b[name][unknown])
        assert not torch.equal(a[name][~unknown], b[name][~unknown])


def test_masks_tell_objects_apart():
    network = create(object_condition="mask")
    sample, t, d, conditions = make()
    sample = {k: v[:, :1].repeat(1, 4, 1, 1) for k, v in sample.items()}
    masks = torch.rand(3, 4, 16, 16) > 0.5
    velocity = predict(network, sample, t, d, conditions, masks=masks)["translation"]
    assert (velocity[:, 0] - velocity[:, 1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`masks` is missing"):
        predict(network, sample, t, d, conditions)


def test_tokens_shared_or_of_each_object():
    network = create(condition="tokens", condition_channels=7)
    sample, t, d, _ = make()
    tokens = torch.randn(3, 5, 7)
    shared = predict(network, sample, t, d, {"cond_tokens": tokens})
    each = predict(network, sample, t, d, {"cond_tokens": tokens[:, None].expand(-1, 4, -1, -1)})
    padded = torch.cat([tokens, torch.randn(3, 2, 7)], dim=1)
    mask = (torch.arange(7) < 5).expand(3, -1)
    masked = predict(network, sample, t, d, {"cond_tokens": padded, "cond_mask": mask})
    for name in shared:
        torch.testing.assert_close(shared[name], each[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shared[name], masked[name], rtol=1e-5, atol=1e-5)
    one = predict(network, {k: v[:1] for k, v in sample.items()}, t[:1], d[:1], {"cond_tokens": tokens[:1]})
    torch.testing.assert_close(one["scale"], shared["scale"][:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"scene_attention": "full", "translation_scale": True},
        {"protect_shape": True},
        {"condition": "none"},
        {"object_condition": "mask", "num_condition_layers": 1},
    ],
)
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(config):
    network = create(**config).train()
    widths = {"translation_scale": (1, 1)} if config.get("translation_scale") else {}
    sample, t, d, conditions = make(**widths)
    if network.config.object_condition == "mask":
        conditions |= {"masks": torch.rand(3, 4, 16, 16) > 0.5}
    conditions |= {"unconditional": torch.tensor([True, False, False])}

    def gradients() -> dict:
        network.zero_grad()
        velocity = network(sample, t, d, **conditions).sample
        sum((v - x).square().mean() for v, x in zip(velocity.values(), sample.values(), strict=True)).backward()
        return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

    plain = gradients()
    assert [name for name, grad in plain.items() if not grad.abs().max() > 0] == []
    network.enable_gradient_checkpointing()
    again = gradients()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_it_is_saved_and_loaded_bit_for_bit(tmp_path):
    network = create()
    network.save_pretrained(tmp_path)
    loaded = SceneShortcutTransformer.from_pretrained(tmp_path)
    given = make()
    assert max(difference(predict(network, *given), predict(loaded, *given)).values()) < 1e-6
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def as_float32(values):
    return {name: value.float() for name, value in values.items()}


def test_bf16_stays_near_float32():
    network = create()
    sample, t, d, conditions = make()
    low, told = ({k: v.bfloat16() for k, v in values.items()} for values in (sample, conditions))
    # the same rounded inputs: what is measured is the network's own arithmetic
    exact = predict(network, as_float32(low), t, d, as_float32(told))
    rough = predict(network.bfloat16(), low, t, d, told)
    for name in exact:
        assert (rough[name].float() - exact[name]).norm() < 0.02 * exact[name].norm(), name


def test_points_are_exact_in_bf16():
    network = create()
    _, _, _, conditions = make()
    conditions["pointmap"][conditions["pointmap"] != 0] += 100  # of which bf16 would leave halves of a metre
    picture = torch.cat([conditions["image"].bfloat16(), conditions["pointmap"]], dim=1)
    seen = []
    network.condition_embedder.windows.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.condition_embedder(picture.float(), None)
    network.bfloat16().condition_embedder(picture, None)
    assert torch.equal(seen[1], seen[0].bfloat16())


def test_sam3d_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = SceneShortcutTransformer.from_preset("sam3d", attention_scope=["object"])
        own = sum(p.numel() for p in network.parameters())
        condition = sum(p.numel() for p in network.condition_embedder.parameters()) + network.null_token.numel()
        assert own - condition == 959_962_133
        sizes = {}
        for name in PRESETS:
            network = SceneShortcutTransformer.from_preset(name)
            sizes[name] = sum(p.numel() for p in network.parameters())
    assert {name: round(size / 1e6, 1) for name, size in sizes.items()} == {
        "tiny": 0.8,
        "small": 21.6,
        "base": 171.7,
        "sam3d": 1011.4,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_scope": []}, "`attention_scope` is empty"),
        ({"attention_scope": ["world"]}, "`attention_scope` must be one of object, scene"),
        ({"scene_attention": "all"}, "`scene_attention` must be one of pose, full"),
        ({"condition": "text"}, "`condition` must be one of none, image, tokens"),
        ({"condition": "tokens", "object_condition": "mask"}, "needs `condition` image, not tokens"),
        ({"hidden_size": 30}, r"`hidden_size` \(30\)"),
        ({"shape_patch_size": 3}, "`shape_patch_size` 3 does not divide 8 tokens as a cube"),
        ({"shape_tokens": 6, "shape_patch_size": 2}, "`shape_patch_size` 2 does not divide 6 tokens as a cube"),
        ({"patch_size": 5}, r"`image_size` \(16\) must be a multiple of `patch_size` \(5\)"),
    ],
)
def test_bad_settings_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        create(**config)


def test_a_picture_of_another_size_is_refused():
    sample, t, d, _ = make()
    with pytest.raises(ValueError, match="the picture is 32 x 16, the network was made for 16 squared"):
        predict(create(), sample, t, d, {"image": torch.zeros(3, 3, 16, 32), "pointmap": torch.zeros(3, 3, 16, 32)})
