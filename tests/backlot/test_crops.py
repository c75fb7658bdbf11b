"""Boxes on the host, and the one crop."""

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, default_collate

from backlot.crops import HostBoxes, Window, crop, crop_window, cut, latent_window, span, standardise


def noise(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TwoBoxes(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        return {"boxes": HostBoxes([[0, 0, 0.5, 0.25 * row], [0, 0, 0, 0]]), "valid": torch.tensor([True, False])}


def test_boxes_stay_on_the_host_through_collation_and_moves():
    batch = default_collate([TwoBoxes()[row] for row in range(3)])
    boxes = send_to_device(batch, torch.device("meta"), non_blocking=True)["boxes"]
    assert isinstance(boxes, HostBoxes)
    assert boxes.values.shape == (3, 2, 4)
    assert boxes.values.dtype == np.float32
    assert boxes.values[2, 0].tolist() == [0, 0, 0.5, 0.5]


def test_boxes_pass_a_loader_process():
    [batch] = DataLoader(TwoBoxes(), batch_size=4, num_workers=1)
    assert batch["boxes"].values.shape == (4, 2, 4)


@pytest.mark.parametrize(
    ("low", "high", "pixels"),
    [(0, 1, (0, 10)), (0.21, 0.29, (2, 3)), (1, 1, (9, 10)), (-3, 7, (0, 10)), (0.3, 0.6, (3, 6)), (0, 0, (0, 1))],
)
def test_a_span_has_at_least_a_pixel_and_stays_inside(low, high, pixels):
    assert span(low, high, 10) == pixels


def test_a_crop_is_the_box_and_a_tenth_of_it_on_each_side():
    assert crop_window((0.2, 0.4, 0.6, 0.6), 100, 100) == Window(38, 62, 16, 64)
    assert crop_window((0.0, 0.0, 1.0, 0.5), 100, 50) == Window(0, 55, 0, 50)


def test_a_long_crop_becomes_square_by_its_own_edges():
    picture = noise(8, 8)
    square = cut(picture, Window(2, 4, 0, 8), 8)
    assert square[:, 3:5].equal(picture[:, 2:4])
    assert square[:, 0].equal(picture[:, 2])
    assert square[:, 7].equal(picture[:, 3])


def test_shrinking_averages_and_does_not_pick():
    picture = noise(64, 64)
    assert cut(picture, Window(0, 64, 0, 64), 8).std() < 0.25 * picture.std()


def test_gradient_reaches_the_pixels_of_the_crop_and_no_others():
    picture = noise(20, 20).requires_grad_()
    crop(picture, (0.2, 0.2, 0.6, 0.4), 14).square().sum().backward()
    window = crop_window((0.2, 0.2, 0.6, 0.4), 20, 20)
    touched = picture.grad.abs().sum(0) > 0
    assert window.of(touched).all()
    assert touched.sum() == window.height * window.width


def test_a_crop_of_a_decoded_part_is_the_crop_of_the_whole():
    """A loss decodes only the latent cells around a box; its crop must be the reference's."""
    picture, factor = noise(64, 96), 8
    for box in [(0.3, 0.2, 0.55, 0.7), (0.9, 0.8, 1.0, 1.0), (0, 0, 1, 1), (0.5, 0.5, 0.501, 0.501)]:
        window = crop_window(box, 64, 96)
        cells = latent_window(window, factor, 1, 8, 12)
        assert 0 <= cells.top < cells.bottom <= 8
        assert 0 <= cells.left < cells.right <= 12
        part = Window(*(edge * factor for edge in cells)).of(picture)
        assert cut(part, window.within(cells, factor), 14).equal(crop(picture, box, 14))


def test_standardised_crops_are_those_of_an_image_processor():
    from transformers import BitImageProcessor

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    processor = BitImageProcessor(
        do_resize=False, do_center_crop=False, do_convert_rgb=False, image_mean=mean, image_std=std
    )
    levels = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = processor(levels, return_tensors="pt").pixel_values[0]
    assert torch.allclose(standardise(levels.float() / 127.5 - 1, mean, std), expected, atol=1e-5)
