"""What a checkpoint holds of tensors: safetensors, one file per part, or one per part and process where it is sharded.

    model.safetensors                       whole tensors
    model-00000-of-00002.safetensors        rows of tensors, which: metadata {"rows": {name: [first, all]}}

Both are read on any number of processes: a reader takes the rows it needs from whatever files hold them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainers.common.sharding import local, rows, state_tensors

_SHARE = re.compile(r"-(\d{5})-of-(\d{5})$")


class Rows(NamedTuple):
    """Rows `first` to `first + len(tensor)` of a tensor of `total` rows, in host memory."""

    tensor: Tensor
    first: int
    total: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def snapshot(tensors: Mapping[str, Tensor], is_main: bool, memory: dict[str, Tensor] | None = None) -> dict[str, Rows]:
    """Copies in host memory of this process's share: its rows of what is cut, and on the main process what is whole.

    Args:
        memory: where to copy, by name; what is missing or does not fit is made and kept here. Without it the copies are
            new, which takes a CPU several times as long.
    """
    copies, memory = {}, {} if memory is None else memory
    for name, tensor in tensors.items():
        if is_main or isinstance(tensor, DTensor):
            share, first, total = rows(tensor.detach())
            kept = memory.get(name)
            if kept is None or (kept.shape, kept.dtype) != (share.shape, share.dtype):
                memory[name] = kept = torch.empty(share.shape, dtype=share.dtype)
            copies[name] = Rows(kept.copy_(share), first, total)
    return copies


def write(folder: Path, part: str, pieces: dict[str, Rows], rank: int = 0, processes: int = 1) -> None:
    """One file of a part: all of it, or with several `processes` the share of one of them."""
    name = part if processes == 1 else f"{part}-{rank:05d}-of-{processes:05d}"
    known = {"rows": json.dumps({name: [piece.first, piece.total] for name, piece in pieces.items()})}
    save_file({name: piece.tensor for name, piece in pieces.items()}, folder / f"{name}.safetensors", known)


class Part:
    """A part of a checkpoint, open for reading: `with Part(folder, "model") as part: part.read(name)`.

    Raises:
        ValueError: the folder holds no such part, or not all shares of it.
    """

    def __init__(self, folder: Path, part: str):
        self.folder, self.part = folder, part
        found = {path.stem.removeprefix(part): path for path in sorted(folder.glob(f"{part}*.safetensors"))}
        shares = {suffix: path for suffix, path in found.items() if _SHARE.fullmatch(suffix)}
        self.files = [found[""]] if "" in found else list(shares.values())
        if not self.files or (
            shares and "" not in found and len(shares) != int(_SHARE.fullmatch(next(iter(shares)))[2])
        ):
            raise ValueError(f"{folder} holds no {part}, or not all files of it")

    def __enter__(self) -> Part:
        self._stack = ExitStack()
        self._places: dict[str, list[tuple[int, int, int, safe_open]]] = {}
        for path in self.files:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            metadata = handle.metadata() or {}
            where = json.loads(metadata["rows"]) if "rows" in metadata else {}
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                shape = handle.get_slice(name).get_shape()
                count = shape[0] if shape else 1
                first, total = where.get(name, (0, count))
                self._places.setdefault(name, []).append((first, first + count, total, handle))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._places)

    def is_of(self, name: str, shape: torch.Size) -> bool:
        """Whether the whole tensor has this shape."""
        _, _, total, handle = self._places[name][0]
        own = handle.get_slice(name).get_shape()
        return len(own) == len(shape) > 0 and [total, *own[1:]] == list(shape)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` (all by default) of a tensor, from whatever files hold them.

        Raises:
            ValueError: there is no such tensor, or not all of its rows.
        """
        places = self._places.get(name)
        if places is None:
            raise ValueError(f"{self.folder} has no {self.part} {name!r}")
        total = places[0][2]
        last = total if last is None else last
        if len(places) == 1 and (first, last) == (0, total):
            return places[0][3].get_tensor(name)
        pieces = [places[0][3].get_slice(name)[0:0]]
        for begin, end, _, handle in sorted(places, key=lambda place: place[:2]):
            if max(begin, first) < min(end, last):
                pieces.append(handle.get_slice(name)[max(begin, first) - begin : min(end, last) - begin])
        result = torch.cat(pieces)
        if len(result) != max(0, last - first):
            raise ValueError(f"{self.folder} lacks rows of {self.part} {name!r}")
        return result

    @torch.no_grad()
    def fill(self, name: str, target: Tensor) -> None:
        """Copy a tensor, or this process's rows of it, into `target`.

        Raises:
            ValueError: it is missing or has another shape.
        """
        share, first, total = rows(target)
        if name in self._places and self._places[name][0][2] != total:
            raise ValueError(f"{self.part} {name!r} has {self._places[name][0][2]} rows, not {total}")
        values = self.read(name, first, first + len(share)) if share.ndim else self.read(name)
        if values.shape != share.shape:
            raise ValueError(f"{self.part} {name!r} has the shape {tuple(values.shape)}, not {tuple(share.shape)}")
        share.copy_(values)


def load_tensors(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill all `tensors` from a part of a checkpoint that holds just these.

    Raises:
        ValueError: names or shapes differ.
    """
    with Part(folder, part) as stored:
        missing, more = sorted(tensors.keys() - stored.names()), sorted(stored.names() - tensors.keys())
        if missing or more:
            which = ", ".join([*(f"lacks {name}" for name in missing[:3]), *(f"has {name}" for name in more[:3])])
            raise ValueError(f"{part} of {folder} is of another network: it {which}")
        for name, tensor in tensors.items():
            stored.fill(name, tensor)


# ---- the optimiser ----


def optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Tensors by `<parameter>/<key>`, and the rest as JSON values; `names` by id of the parameter."""
    tensors, values = {}, {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


def load_optimizer(folder: Path, optimizer: Optimizer, names: Mapping[int, str], values: dict[str, dict]) -> None:
    """The reverse of `optimizer_state`: what is like its parameter is cut as the parameter is.

    Raises:
        ValueError: it is the state of other parameters.
    """
    with Part(folder, "optimizer") as part:
        keys: dict[str, list[str]] = {}
        for stored in part.names():
            name, _, key = stored.rpartition("/")
            keys.setdefault(name, []).append(key)
        unknown = sorted((keys.keys() | values.keys()) - set(names.values()))
        if unknown:
            raise ValueError(f"{folder} holds the optimiser's state of {unknown[0]}, which does not train")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                state = {key: _like(parameter, part, f"{name}/{key}") for key in sorted(keys.get(name, ()))}
                optimizer.state[parameter] = state | values.get(name, {})


def _like(parameter: Tensor, part: Part, name: str) -> Tensor:
    """A tensor of the state, cut like its parameter where it has the parameter's rows."""
    if isinstance(parameter, DTensor) and part.is_of(name, parameter.shape):
        share, first, _ = rows(parameter)
        values = part.read(name, first, first + len(share)).to(share.device)
        return DTensor.from_local(
            values, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    return part.read(name).to(local([parameter])[0].device)


# ---- what is checked and told apart ----


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no NaN and no infinity in this process's shares. Synchronises."""
    shares = [share for share in local(tensors) if share.is_floating_point() and share.numel()]
    if not shares:
        return True
    # squares of sound values can overflow, but on a CPU they are summed twenty times as fast as the largest is found
    for order in (2, float("inf")):
        norms = torch._foreach_norm([share.detach() for share in shares], order)
        if torch.stack([norm.float() for norm in norms]).isfinite().all():
            return True
    return False


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, types, shapes and bytes; two sums modulo 2^64 per tensor, taken where the tensor is.

    One changed element changes it; a deliberate forgery may not. A bf16 base of 12 B takes seconds.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_sums(tensor)}".encode())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> list[int]:
    if is_traceable_wrapper_subclass(tensor):  # a quantised weight: made of several tensors
        inner, _ = tensor.__tensor_flatten__()
        return [value for name in inner for value in _sums(getattr(tensor, name))]
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    total, odd = torch.zeros(2, dtype=torch.int64, device=raw.device), torch.empty(0, dtype=torch.int64)
    for number, chunk in enumerate(raw.split(2**20)):  # small enough for a processor's cache: ten times as fast
        chunk = nn.functional.pad(chunk, (0, -len(chunk) % 4)) if len(chunk) % 4 else chunk
        words = chunk.view(torch.int32).long()  # 32 bits in words of 64: no factor pushes a bit out of them
        if len(odd) != len(words):
            odd = 2 * torch.arange(len(words), device=raw.device) + 1
        total += torch.stack([words.sum(), (words * odd).sum()]) * (2 * number + 1)
    return total.tolist()


def frozen_tensors(network: nn.Module, trained: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of `network` outside `trained`, by name."""
    own = {id(tensor) for _, tensor in state_tensors(trained)}
    return [(name, tensor) for name, tensor in state_tensors(network) if id(tensor) not in own]
