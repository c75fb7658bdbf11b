"""Tokens of templates: computed once, found again, never another network's or another object's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.vpog.token_cache import TokenCache, model_sha256, pictures_sha256, read_tokens

CPU = torch.device("cpu")


@pytest.fixture
def tokens():
    return {"tokens": torch.randn(3, 4, 8).bfloat16(), "patches": torch.rand(3, 4) > 0.5}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


def times(factor, tokens):
    return tokens | {"tokens": factor * tokens["tokens"]}


def never():
    raise AssertionError("computed again")


def test_tokens_are_computed_once_and_found_by_another_process(tmp_path, tokens):
    first = TokenCache(tmp_path)
    assert same(first.get("model", "set", lambda: tokens, CPU), tokens)
    assert same(first.get("model", "set", never, CPU), tokens)
    again = TokenCache(tmp_path).get("model", "set", never, CPU)
    assert same(again, tokens)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def test_another_network_or_object_is_another_entry(tmp_path, tokens):
    cache = TokenCache(tmp_path)
    cache.get("model", "set", lambda: tokens, CPU)
    assert same(cache.get("other", "set", lambda: times(2, tokens), CPU), times(2, tokens))
    assert same(cache.get("model", "other", lambda: times(3, tokens), CPU), times(3, tokens))
    assert same(cache.get("model", "set", never, CPU), tokens)


@pytest.mark.parametrize("damage", [b"", b"not a file of tokens", "half"])
def test_a_damaged_file_is_computed_and_written_again(tmp_path, tokens, damage):
    cache = TokenCache(tmp_path)
    cache.get("model", "set", lambda: tokens, CPU)
    path = cache.path("model", "set")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert read_tokens(path) is None
    assert same(TokenCache(tmp_path).get("model", "set", lambda: tokens, CPU), tokens)
    assert path.read_bytes() == whole


def test_memory_has_a_limit_and_the_oldest_leave(tokens):
    cache = TokenCache(memory_limit=2 * sum(value.nbytes for value in tokens.values()))
    for name in "ab":
        cache.get("model", name, lambda: tokens, CPU)
    cache.get("model", "a", never, CPU)
    cache.get("model", "c", lambda: tokens, CPU)
    cache.get("model", "a", never, CPU)
    with pytest.raises(AssertionError, match="computed again"):
        cache.get("model", "b", never, CPU)


def test_one_object_larger_than_the_limit_still_works(tokens):
    cache = TokenCache(memory_limit=1)
    assert same(cache.get("model", "a", lambda: tokens, CPU), tokens)
    cache.get("model", "a", never, CPU)


def test_the_networks_hash_follows_weights_settings_and_precision():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    base = model_sha256(network, {"size": 1})
    assert model_sha256(network, {"size": 1}) == base
    assert model_sha256(network, {"size": 2}) != base
    with torch.no_grad():
        network.bias[1] += 1e-6
    changed = model_sha256(network, {"size": 1})
    assert changed != base
    assert model_sha256(network.bfloat16(), {"size": 1}) not in (base, changed)


def test_the_templates_hash_follows_pixels_shape_and_use():
    pictures = np.zeros((2, 4, 4, 4), np.uint8)
    base = pictures_sha256(pictures)
    assert pictures_sha256(pictures.copy()) == base
    assert pictures_sha256(pictures.reshape(1, 8, 4, 4)) != base
    assert pictures_sha256(pictures, 12) != base
    pictures[1, 2, 3, 0] = 1
    assert pictures_sha256(pictures) != base
