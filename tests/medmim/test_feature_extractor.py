"""The encoder as a map of features."""

from itertools import product

import pytest
import torch

from medmim.networks import FeatureExtractor


@pytest.mark.parametrize(("channels", "img_size", "patch_size"), [(2, (16, 24, 8), 8), (1, (12, 8, 6), (4, 4, 3))])
def test_features_are_the_normed_tokens_at_their_place(tiny_vit, channels, img_size, patch_size):
    extractor = FeatureExtractor(tiny_vit(channels, img_size, patch_size), img_size).eval()
    image = torch.rand(2, channels, *img_size)
    features, tokens = extractor(image), extractor.encoder(image)[0]
    assert features.shape == (2, 24, *extractor.grid)
    for index, cell in enumerate(product(*map(range, extractor.grid))):
        assert torch.equal(features[(slice(None), slice(None), *cell)], tokens[:, index])


def test_two_dimensions(tiny_vit):
    assert FeatureExtractor(tiny_vit(3, (16, 24)), (16, 24))(torch.rand(1, 3, 16, 24)).shape == (1, 24, 2, 3)


def test_one_number_stands_for_each_axis(tiny_vit):
    assert FeatureExtractor(tiny_vit(1, (16, 16, 16)), 16).grid == (2, 2, 2)


def test_state_dict_is_the_encoders_behind_a_prefix(tiny_vit):
    vit = tiny_vit()
    assert set(FeatureExtractor(vit, (16, 24, 8)).state_dict()) == {f"encoder.{name}" for name in vit.state_dict()}


def test_unused_parameters_are_frozen(tiny_vit):
    extractor = FeatureExtractor(tiny_vit(), (16, 24, 8))
    extractor(torch.rand(1, 1, 16, 24, 8)).square().sum().backward()
    assert [name for name, p in extractor.named_parameters() if p.requires_grad and p.grad is None] == []


def test_size_that_does_not_divide_is_refused(tiny_vit):
    with pytest.raises(ValueError, match=r"\(16, 20, 8\) is not divisible by \(8, 8, 8\)"):
        FeatureExtractor(tiny_vit(), (16, 20, 8))
