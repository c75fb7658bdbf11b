"""The network: sizes, what its outputs depend on and what not, gradients, precision, files."""

import copy
import math

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.vpog import PRESETS, VIEW_ENCODINGS, VPOGModel, save_tiny_croco, save_tiny_dino
from pipelines.vpog.attention import FrameBlock, from_windows, to_windows
from pipelines.vpog.encoders import ENCODERS
from pipelines.vpog.heads import MIN_SCALE

SIDE, PATCHES = 32, 16


def rotations(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = Rotation.random(math.prod(shape), random_state=seed).as_matrix()
    return torch.from_numpy(drawn).float().view(*shape, 3, 3)


def create(seed: int = 0, preset: str = "tiny", source=None, **config) -> VPOGModel:
    torch.manual_seed(seed)
    return VPOGModel.from_preset(preset, source, **{"image_size": SIDE} | config)


def inputs(batch: int = 2, templates: int = 3, side: int = SIDE) -> dict[str, torch.Tensor]:
    images = torch.rand(batch, 1 + templates, 3, side, side, generator=torch.Generator().manual_seed(0))
    poses = rotations(batch, templates)
    return {"images": images, "rotations": poses, "d_ref": -poses[:, 0, 2], "reference_rotation": poses[:, 0]}


def difference(first, second) -> float:
    """The largest relative change of an output."""
    keys = [key for key in first if key != "buddies"]
    return max(((first[key] - second[key]).norm() / first[key].norm()).item() for key in keys)


def sharpen(model: VPOGModel) -> VPOGModel:
    """A flow that depends on the tokens from the start: its last layers are nearly 0 before training."""
    for layer in (model.flow.dense, model.flow.center):
        torch.nn.init.xavier_normal_(layer.weight)
    return model


def source_of(kind: str, folder):
    return save_tiny_croco(folder / "croco.pth") if kind == "vit" else save_tiny_dino(folder / kind, kind)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("preset", "config", "total", "encoder"),
    [
        ("tiny", {}, 0.42, 0.112),
        ("small", {}, None, 21.59),
        ("base", {"num_pairs": 4, "center_flow": False}, 144.1, 85.65),
        ("base", {"num_pairs": 12}, 257.6, 85.65),
        ("large", {}, 607.6, 303.10),
    ],
)
def test_presets_have_their_sizes(preset, config, total, encoder):
    """In millions, to the digits that are given."""
    with torch.device("meta"):
        model = VPOGModel.from_preset(preset, **config)
    assert abs(count(model.encoder) / 1e6 - encoder) < 5e-3
    if total is not None:
        assert abs(count(model) / 1e6 - total) < (5e-3 if preset == "tiny" else 0.05)
    width, pairs = model.encoder.hidden_size, model.config.num_pairs
    assert count(model.alternating.blocks) == pairs * (24 * width**2 + 30 * width)
    if preset == "large":
        assert abs(count(model.classification) / 1e6 - 1.31) < 5e-3
        assert abs((count(model.flow) - count(model.flow.center)) / 1e6 - 0.855) < 5e-4


@pytest.mark.parametrize("encoding", VIEW_ENCODINGS)
def test_nothing_reads_a_value(encoding):
    """Fake tensors have no values: whatever waited for one would raise."""
    batch, templates, n = 8, 6, 196
    encoder = PRESETS["tiny"]["encoder_config"] | {"patch_size": 16}
    model = create(encoder_config=encoder, image_size=224, view_encoding=encoding, window_size=7)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = model(
            torch.rand(batch, 1 + templates, 3, 224, 224),
            torch.rand(batch, templates, 3, 3),
            torch.rand(batch, 3),
            torch.rand(batch, 3, 3),
        )
    assert output.logits.shape == (batch, templates, n, n + 1)
    assert output.buddies.shape == (batch, templates, n)
    assert output.flow.shape == (batch, templates, n, 16, 16, 2)
    assert output.scale.shape == (batch, templates, n, 16, 16)
    assert output.center_flow.shape == (batch, templates, n, 2)


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_every_encoder_runs(tmp_path, kind):
    model = create(source=source_of(kind, tmp_path), image_size=112)
    grid = 112 // {"vit": 8, "dinov3_vit": 16}.get(kind, 14)
    assert (model.grid_size, model.num_patches) == (grid, grid**2)
    output = model(**inputs(side=112))
    assert output.logits.shape == (2, 3, grid**2, grid**2 + 1)
    assert output.flow.shape == (2, 3, grid**2, model.patch_size, model.patch_size, 2)
    assert output.scale.min() >= MIN_SCALE


@pytest.mark.parametrize("encoding", ["s2_smooth", "so3", "none"])
@torch.no_grad()
def test_outputs_do_not_depend_on_the_cad_frame(encoding):
    model, batch = sharpen(create(view_encoding=encoding)), inputs()
    gauge = rotations(1, seed=7)[0]
    turned = {key: value if key == "images" else value @ gauge for key, value in batch.items()}
    first, again = model(**batch), model(**turned)
    assert (first.logits - again.logits).abs().max() < 1e-4
    assert (first.flow - again.flow).abs().max() < 1e-4
    assert (first.scale - again.scale).abs().max() < 1e-4


@torch.no_grad()
def test_with_faces_outputs_depend_on_the_cad_frame():
    model, batch = create(view_encoding="s2_face"), inputs()
    gauge = rotations(1, seed=7)[0]
    turned = {key: value if key == "images" else value @ gauge for key, value in batch.items()}
    assert (model(**batch).logits - model(**turned).logits).abs().max() > 1e-2


@torch.no_grad()
def test_opposite_views_give_other_outputs():
    model, batch = create(), inputs()
    mirrored = {**batch, "rotations": torch.diag(torch.tensor([1.0, -1, -1])) @ batch["rotations"]}
    assert (model(**batch).logits - model(**mirrored).logits).abs().max() > 1e-2


@pytest.mark.parametrize("encoding", VIEW_ENCODINGS)
@torch.no_grad()
def test_the_place_of_a_template_s_patch_counts_in_the_group_too(encoding):
    """Frame blocks aside: their attention adds nothing here."""
    model, batch = create(view_encoding=encoding), inputs()
    for block in model.alternating.blocks:
        if isinstance(block, FrameBlock):
            torch.nn.init.zeros_(block.attention.proj.weight)
    query = model(batch["images"][:, 0], encode_only=True)
    templates = model(batch["images"][:, 1:], encode_only=True)
    views = {key: batch[key] for key in ("rotations", "d_ref", "reference_rotation")}
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(0))
    first = model(**views, query_tokens=query, template_tokens=templates).logits
    moved = model(**views, query_tokens=query, template_tokens=templates[:, :, order]).logits
    assert (first[..., -1] - moved[..., -1]).abs().max() > 1e-3
    assert (first[..., :-1][..., order] - moved[..., :-1]).abs().max() > 1e-2


@torch.no_grad()
def test_templates_have_no_order():
    model, batch, order = sharpen(create()), inputs(), torch.tensor([2, 0, 1])
    moved = {**batch, "rotations": batch["rotations"][:, order]}
    moved["images"] = torch.cat([batch["images"][:, :1], batch["images"][:, 1:][:, order]], dim=1)
    first = model(**batch)
    assert difference({key: value[:, order] for key, value in first.items()}, model(**moved)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"window_size": 2, "separate_streams": True, "view_encoding": "so3"}])
@torch.no_grad()
def test_a_batch_gives_what_its_items_give(options):
    model, batch = sharpen(create(**options)), inputs(batch=3)
    together = model(**batch)
    for item in range(3):
        single = model(**{key: value[item : item + 1] for key, value in batch.items()})
        assert difference({key: value[item : item + 1] for key, value in together.items()}, single) < 1e-5


@pytest.mark.parametrize("templates", [1, 5])
@torch.no_grad()
def test_a_group_may_have_any_size(templates):
    assert create()(**inputs(templates=templates)).logits.shape == (2, templates, PATCHES, PATCHES + 1)


@torch.no_grad()
def test_tokens_take_the_place_of_images():
    model, batch = create(), inputs()
    query = model(batch["images"][:, 0], encode_only=True)
    templates = model(batch["images"][:, 1:], encode_only=True)
    views = {key: batch[key] for key in ("rotations", "d_ref", "reference_rotation")}
    again = model(**views, query_tokens=query, template_tokens=templates)
    assert templates.shape == (2, 3, PATCHES, 64)
    assert difference(model(**batch), again) < 1e-5


@torch.no_grad()
def test_flow_is_that_of_the_given_buddies():
    """What is no patch, background (-1) or unseen (N), has a flow as well, which means nothing."""
    model, batch = sharpen(create()), inputs()
    own = model(**batch)
    assert own.buddies.equal(own.logits.argmax(-1))
    again = model(**batch, buddies=own.buddies)
    assert again.flow.equal(own.flow)
    buddies = own.buddies.clone()
    buddies[:, :, 0], buddies[:, :, 1], buddies[:, :, 2] = -1, PATCHES, (own.buddies[:, :, 2] + 1) % PATCHES
    other = model(**batch, buddies=buddies)
    assert other.buddies is buddies
    assert other.flow.isfinite().all()
    assert other.flow[:, :, 3:].equal(own.flow[:, :, 3:])
    assert not other.flow[:, :, 2].allclose(own.flow[:, :, 2], rtol=1e-3)


def losses(model: VPOGModel, batch: dict) -> torch.Tensor:
    output = model(**batch, buddies=torch.arange(PATCHES).expand(2, 3, -1) if "buddies" not in batch else None)
    parts = [output.logits.log_softmax(-1)[..., 3], output.flow, output.scale, output.center_flow]
    return sum(part.square().mean() for part in parts if part is not None)


@pytest.mark.parametrize(
    "options",
    [
        *({"view_encoding": encoding} for encoding in VIEW_ENCODINGS),
        {"window_size": 2, "separate_streams": True},
        {"center_flow": False},
        {"dense_flow": False},
        {"dense_flow": False, "center_flow": False},
    ],
)
def test_every_weight_learns(options):
    model = create(**options)
    losses(model, inputs()).backward()
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == []
    names = {name for name, _ in model.named_children()}
    assert ("flow" in names) == (options.get("dense_flow", True) or options.get("center_flow", True))


@pytest.mark.parametrize("kind", ENCODERS[1:])
def test_every_weight_learns_with_a_dino_encoder(tmp_path, kind):
    side = 64 if kind == "dinov3_vit" else 56
    model = create(source=source_of(kind, tmp_path), image_size=side).train()
    losses(model, inputs(side=side)).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("kind", ENCODERS)
def test_gradient_checkpointing_changes_nothing(tmp_path, kind):
    side = 56 if kind.startswith("dinov2") else 64 if kind == "dinov3_vit" else SIDE
    found, calls = [], []
    for checkpointing in (False, True):
        model = create(source=source_of(kind, tmp_path), image_size=side).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        blocks = [block for block in model.modules() if type(block).__name__ in model._no_split_modules]
        calls.append([0] * len(blocks))
        for number, block in enumerate(blocks):

            def called(*_, number=number, counts=calls[-1]):
                counts[number] += 1

            next(block.children()).register_forward_pre_hook(called)
        loss = losses(model, inputs(side=side))
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert len(calls[0]) == 2 + 2 * 2
    assert calls[1] == [2 * count for count in calls[0]]  # once more on the way back
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [*ENCODERS, "options"])
@torch.no_grad()
def test_a_saved_network_is_the_same(tmp_path, kind):
    options = {"window_size": 2, "separate_streams": True, "view_encoding": "so3", "center_flow": False}
    side = {"vit": SIDE, "dinov3_vit": 64, "options": SIDE}.get(kind, 56)
    source = None if kind == "options" else source_of(kind, tmp_path)
    model = create(source=source, image_size=side, **(options if kind == "options" else {})).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = VPOGModel.from_pretrained(tmp_path / "saved")
    batch = inputs(side=side)
    first, again = model(**batch), loaded(**batch)
    assert all(first[key].equal(again[key]) for key in dict(first))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_near_full(dtype):
    model, batch = sharpen(create()), inputs()
    batch["buddies"] = torch.arange(PATCHES).expand(2, 3, -1)
    expected = model(**batch)
    with torch.autocast("cpu", dtype):
        mixed = model(**batch)
    half = copy.deepcopy(model).to(dtype)(**{**batch, "images": batch["images"].to(dtype)})
    for found in (mixed, half):
        assert {found[key].dtype for key in ("logits", "flow", "scale", "center_flow")} == {torch.float32}
        assert difference(expected, found) < 0.1
    assert half.logits.unique().numel() > 0.9 * half.logits.numel()  # the cosines were scaled in float32


def test_windows_come_back_in_place():
    tokens = torch.randn(3, 37, 5)
    windows = to_windows(tokens, 36, 3)
    assert windows.shape == (12, 10, 5)
    assert windows[1, :9].equal(tokens[0, :36].view(6, 6, 5)[:3, 3:].reshape(9, 5))
    assert windows[:, 9].equal(tokens[:, 36].repeat_interleave(4, 0))
    assert from_windows(windows, 36, 3).equal(tokens)
    different = windows.clone()
    different[0, 9] += 4
    assert torch.allclose(from_windows(different, 36, 3)[0, 36], tokens[0, 36] + 1)


@torch.no_grad()
def test_frame_blocks_see_no_further_than_their_window():
    """With group attention off, a change in one corner stays in its window; a query stays a query."""
    model, batch = create(window_size=2), inputs()
    for block in model.alternating.blocks:
        if not isinstance(block, FrameBlock):
            torch.nn.init.zeros_(block.attention.proj.weight)
    query = model(batch["images"][:, 0], encode_only=True)
    templates = model(batch["images"][:, 1:], encode_only=True)
    views = {key: batch[key] for key in ("rotations", "d_ref", "reference_rotation")}
    changed = query.clone()
    changed[:, 0] += 1
    first = model(**views, query_tokens=query, template_tokens=templates).logits
    again = model(**views, query_tokens=changed, template_tokens=templates).logits
    moved = (first - again).abs().amax(dim=(0, 1, 3)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_a_network_does_not_change_its_configuration():
    before = copy.deepcopy(PRESETS)
    create()
    assert before == PRESETS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_size": 30}, r"`image_size` \(30\) must be a multiple of the patch size \(8\)"),
        ({"window_size": 3}, r"`window_size` \(3\) must divide the 4 x 4 patches"),
        ({"window_size": 0}, r"`window_size` \(0\) must divide the 4 x 4 patches"),
        ({"view_encoding": "s2"}, "`view_encoding` must be one of s2_smooth"),
        ({"encoder_type": "vgg"}, "`encoder_type` must be one of vit, dinov2"),
        ({"num_pairs": 0}, "`num_pairs` must be at least 1, got 0"),
        ({"preset": "huge"}, "`preset` must be one of tiny, small, base, large, got 'huge'"),
    ],
)
def test_wrong_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        create(**config)


def test_windows_of_seven_are_refused_on_a_dinov2_grid(tmp_path):
    with pytest.raises(ValueError, match=r"`window_size` \(7\) must divide the 16 x 16 patches"):
        create(source=save_tiny_dino(tmp_path), image_size=224, window_size=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(2, 4, 3, 64, 64)}, r"`images` must be \(..., 3, 32, 32\), got \(2, 4, 3, 64, 64\)"),
        ({"images": torch.rand(4, 3, 32, 32)}, r"`images` must be \(B, S \+ 1, 3, H, W\)"),
        ({"images": None}, "give `images`, or both `query_tokens` and `template_tokens`"),
        ({"query_tokens": torch.rand(2, 16, 64), "template_tokens": torch.rand(2, 3, 16, 64)}, "and not all three"),
        ({"rotations": None}, r"`rotations` must be \(2, 3, 3, 3\), got None"),
        ({"d_ref": torch.rand(3)}, r"`d_ref` must be \(2, 3\), got \(3,\)"),
        ({"reference_rotation": torch.rand(2, 3)}, r"`reference_rotation` must be \(2, 3, 3\), got \(2, 3\)"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        create()(**{**inputs(), **change})
