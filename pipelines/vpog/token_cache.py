"""What a network makes of templates: computed once per object, kept in memory and, where asked for, on disk."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from backlot.files import json_sha256, write_file

MEMORY_LIMIT = 2 << 30


def model_sha256(model: nn.Module, config: dict) -> str:
    """Of a network's settings, precision and weights: what its tokens depend on."""
    digest = hashlib.sha256(json_sha256(config).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def pictures_sha256(pictures: np.ndarray, *more: object) -> str:
    """Of pictures (T, H, W, C) and how they are used."""
    digest = hashlib.sha256(repr((pictures.shape, pictures.dtype.str, *more)).encode())
    digest.update(np.ascontiguousarray(pictures))
    return digest.hexdigest()


class TokenCache:
    """Tokens by the hash of the network and that of the templates.

    A file is whole or absent; one that is damaged is computed again.

    Args:
        folder: where files lie; in memory only if left out.
        memory_limit: bytes that stay in memory, the least recently used leave first.
    """

    def __init__(self, folder: str | Path | None = None, memory_limit: int = MEMORY_LIMIT):
        self.folder = None if folder is None else Path(folder)
        self.memory_limit = memory_limit
        self._memory: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def path(self, model_hash: str, templates_hash: str) -> Path | None:
        """Where the tokens of these templates lie."""
        return None if self.folder is None else self.folder / model_hash[:16] / f"{templates_hash}.safetensors"

    def get(
        self, model_hash: str, templates_hash: str, compute: Callable[[], dict[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """Named tensors from memory, else from disk, else computed, and then written.

        Args:
            device: where they are wanted.
        """
        key = f"{model_hash} {templates_hash} {device}"
        tokens = self._memory.pop(key, None)
        if tokens is None:
            path = self.path(model_hash, templates_hash)
            tokens = None if path is None else read_tokens(path)
            if tokens is None:
                tokens = compute()
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    # all of it can be computed again
                    on_disk = {name: value.cpu().contiguous() for name, value in tokens.items()}
                    write_file(path, save(on_disk), durable=False)
            tokens = {name: value.to(device) for name, value in tokens.items()}
        self._memory[key] = tokens
        while len(self._memory) > 1 and self._num_bytes() > self.memory_limit:
            self._memory.popitem(last=False)
        return tokens

    def _num_bytes(self) -> int:
        return sum(value.nbytes for each in self._memory.values() for value in each.values())


def read_tokens(path: Path) -> dict[str, Tensor] | None:
    """The tokens in a file; None where there is none, or a damaged one."""
    try:
        return load(path.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None
