"""Rotations of queries and keys: 2D positions, and views that do not depend on how the CAD frame lies."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from pipelines.vpog.view_encoding import (
    VIEW_ENCODINGS,
    check_head_dim,
    direction_frame,
    face_phases,
    frame_rotary,
    group_rotary,
    rotate,
    smooth_angles,
    split_pairs,
)

SIZE, HEAD_DIM = 3, 64


def rotations(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = Rotation.random(math.prod(shape), random_state=seed).as_matrix()
    return torch.from_numpy(drawn).float().view(*shape, 3, 3)


def views(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two queries of four templates each; the second template gave the direction."""
    templates = rotations(2, 4, seed=seed)
    return {"rotations": templates, "d_ref": -templates[:, 1, 2], "reference_rotation": templates[:, 1]}


def turned(values: dict[str, torch.Tensor], gauge: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same pictures of an object whose frame lies differently: R -> R G, d -> G^T d."""
    return {
        "rotations": values["rotations"] @ gauge,
        "d_ref": values["d_ref"] @ gauge,
        "reference_rotation": values["reference_rotation"] @ gauge,
    }


def products(encoding: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Attention logits of fixed random queries and keys."""
    rotary = group_rotary(encoding, **values, size=SIZE, head_dim=HEAD_DIM, base=100.0)
    generator = torch.Generator().manual_seed(1)
    tokens = SIZE**2 + 4 * (SIZE**2 + 1)
    query, key = (rotate(torch.randn(2, tokens, 2, HEAD_DIM, generator=generator), rotary) for _ in range(2))
    return torch.einsum("bihc,bjhc->bhij", query, key)


def change(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / first.norm()).item()


def naive_croco(heads: torch.Tensor, size: int) -> torch.Tensor:
    """2D rotary positions, channel by channel: y in the first half of a head, x in the second."""
    result, half = heads.clone(), heads.shape[-1] // 2
    for token in range(size**2):
        for block, coordinate in enumerate(divmod(token, size)):
            for i in range(half // 2):
                angle = coordinate * 100 ** (-2 * i / half)
                a, b = (heads[:, token, :, block * half + channel] for channel in (i, i + half // 2))
                result[:, token, :, block * half + i] = a * math.cos(angle) - b * math.sin(angle)
                result[:, token, :, block * half + i + half // 2] = b * math.cos(angle) + a * math.sin(angle)
    return result


def test_positions_are_those_of_croco():
    heads = torch.randn(2, 17, 3, 16, generator=torch.Generator().manual_seed(0))
    found = rotate(heads, frame_rotary(4, 16, 100.0, torch.device("cpu")))
    assert change(naive_croco(heads[:, :16], 4), found[:, :16]) < 1e-6
    assert found[:, 16].equal(heads[:, 16])  # the unseen token has no position


@pytest.mark.parametrize("encoding", VIEW_ENCODINGS)
def test_encodings_rotate(encoding):
    rotary = group_rotary(encoding, **views(), size=SIZE, head_dim=HEAD_DIM, base=100.0)
    heads = torch.randn(2, SIZE**2 + 4 * (SIZE**2 + 1), 2, HEAD_DIM)
    found = rotate(heads, rotary)
    assert torch.allclose(found.norm(dim=-1), heads.norm(dim=-1), rtol=1e-5)
    assert change(heads, found) > 0.1


@pytest.mark.parametrize("encoding", ["s2_smooth", "so3"])
def test_no_encoding_depends_on_the_cad_frame(encoding):
    for seed in range(5):
        again = products(encoding, turned(views(), rotations(1, seed=seed)[0]))
        assert change(products(encoding, views()), again) < 1e-5


def test_the_face_encoding_depends_on_the_cad_frame():
    assert change(products("s2_face", views()), products("s2_face", turned(views(), rotations(1)[0]))) > 0.05


@pytest.mark.parametrize("encoding", ["s2_smooth", "s2_face", "so3"])
def test_views_and_the_reference_count(encoding):
    values = views()
    other = {**values, "rotations": torch.cat([values["rotations"][:, :3], rotations(2, 1, seed=9)], dim=1)}
    assert change(products(encoding, values), products(encoding, other)) > 0.05
    reference = rotations(2, seed=8)
    other = {**values, "d_ref": -reference[:, 2], "reference_rotation": reference}
    assert change(products(encoding, values), products(encoding, other)) > 0.05


def test_without_an_encoding_views_do_not_count():
    assert products("none", views()).equal(products("none", views(seed=3)))


def smooth(directions: torch.Tensor) -> torch.Tensor:
    reference = rotations(1, seed=4)
    angles = smooth_angles(directions[None], direction_frame(-reference[:, 2], reference[:, 0]), 16)[0]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def test_opposite_views_differ():
    reference = rotations(1, seed=4)
    frame = direction_frame(-reference[:, 2], reference[:, 0])[0]
    random = torch.nn.functional.normalize(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    directions = torch.cat([frame, random])
    assert ((smooth(directions) - smooth(-directions)).norm(dim=-1) > 0.5).all()


def jump(encoding: str, step: float) -> float:
    """The largest change of logits when a template's view moves along a great circle by `step` radians."""
    values, reference = views(), views()["reference_rotation"]
    places = torch.linspace(-math.pi + step / 2, math.pi - step / 2, 9)
    steps = []
    for place in places:
        found = []
        for angle in (place - step / 2, place + step / 2):
            spin = torch.from_numpy(Rotation.from_euler("x", angle.item() + math.pi / 2).as_matrix()).float()
            moved = (spin @ reference)[:, None]
            found.append(products(encoding, {**values, "rotations": moved.expand(-1, 4, -1, -1)}))
        steps.append(change(*found))
    return max(steps)


@pytest.mark.parametrize("encoding", ["s2_smooth", "so3"])
def test_small_turns_change_little(encoding):
    assert jump(encoding, 1e-3) < 0.02


def test_the_frame_is_of_the_reference_camera():
    reference = rotations(1, seed=4)
    frame = direction_frame(-3 * reference[:, 2], reference[:, 0])
    expected = torch.stack([-reference[:, 2], reference[:, 0], -reference[:, 1]], dim=1)
    assert torch.allclose(frame, expected, atol=1e-6)
    assert torch.allclose(torch.linalg.det(frame), torch.ones(1), atol=1e-6)


def test_the_query_has_the_reference_s_view():
    """Its own token pairs with those of the template of that view as with its own."""
    found = group_rotary("s2_smooth", **views(), size=SIZE, head_dim=HEAD_DIM, base=100.0)
    start = SIZE**2 + (SIZE**2 + 1)  # the second template
    assert torch.allclose(found.cos[:, : SIZE**2], found.cos[:, start : start + SIZE**2], atol=1e-4)
    unseen = found.cos[:, start + SIZE**2]
    assert (unseen[:, : HEAD_DIM // 4] == 1).all()  # no 2D position
    assert torch.allclose(unseen[:, HEAD_DIM // 4 :], found.cos[:, start, HEAD_DIM // 4 :])  # its template's view


@pytest.mark.parametrize(("head_dim", "expected"), [(16, (1, 1, 6)), (64, (13, 13, 6)), (128, (26, 26, 12))])
def test_the_face_layout_is_the_one_of_the_source(head_dim, expected):
    assert split_pairs("s2_face", head_dim) == expected
    assert 6 * face_phases(head_dim) == expected[2]


def test_directions_keep_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = group_rotary("so3", **views(), size=SIZE, head_dim=HEAD_DIM, base=100.0)
    expected = group_rotary("so3", **views(), size=SIZE, head_dim=HEAD_DIM, base=100.0)
    assert found.turns.equal(expected.turns)


@pytest.mark.parametrize(
    ("encoding", "head_dim", "message"),
    [
        ("s2", 64, "`view_encoding` must be one of s2_smooth, s2_face, so3, none, got 's2'"),
        ("s2_smooth", 20, "s2_smooth needs heads of a multiple of 8 channels, 16 or more, got 20"),
        ("s2_face", 12, "s2_face needs heads of a multiple of 4 channels, 16 or more, got 12"),
        ("none", 6, "none needs heads of a multiple of 4 channels, got 6"),
    ],
)
def test_heads_without_room_are_refused(encoding, head_dim, message):
    with pytest.raises(ValueError, match=message):
        check_head_dim(encoding, head_dim)
