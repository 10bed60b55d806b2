"""Where single weight tensors come from: safetensors shards on disk, or a random generator.

Both offer `shape(name)` and `read(name, rows, columns)`: a rank of a tensor-parallel run reads its slices only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from common.config import ModelConfig
from common.errors import UserError

WHOLE = slice(None)
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


class TensorSource(Protocol):
    bytes_read: int  # what `read` has taken from the disk so far

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError if there is no such tensor."""

    def read(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        """The block [rows, columns] of a matrix, or [rows] of a vector."""

    def names(self) -> Iterable[str]: ...


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Hugging Face Llama checkpoint."""
    d, f = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (d,)
        shapes[layer + "post_attention_layernorm.weight"] = (d,)
        shapes[layer + "self_attn.q_proj.weight"] = (config.q_size, d)
        shapes[layer + "self_attn.k_proj.weight"] = (config.kv_size, d)
        shapes[layer + "self_attn.v_proj.weight"] = (config.kv_size, d)
        shapes[layer + "self_attn.o_proj.weight"] = (d, config.q_size)
        shapes[layer + "mlp.gate_proj.weight"] = (f, d)
        shapes[layer + "mlp.up_proj.weight"] = (f, d)
        shapes[layer + "mlp.down_proj.weight"] = (d, f)
    return shapes


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors that checkpoints carry without adding information: stored tables, a head equal to the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


class SafetensorsSource:
    """One or many safetensors files of a folder, memory-mapped. Every tensor is accounted for before any is read."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files = {name: handle for path in _shard_paths(folder) for name, handle in _open_shard(path)}
        self._check(config)

    def _check(self, config: ModelConfig) -> None:
        expected = expected_shapes(config)
        for name, shape in expected.items():
            if name not in self._files:
                raise UserError(f"{self.folder}: tensor {name} is missing from the safetensors files")
            if self.shape(name) != shape:
                found = list(self.shape(name))
                raise UserError(f"{self.folder}: tensor {name} has shape {found}; config.json asks for {list(shape)}")
            kind = self._files[name].get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise UserError(
                    f"{self.folder}: tensor {name} is stored as {kind}; quantised weights are not supported"
                )
        for name in self._files:
            if name not in expected and not _ignorable(name, config):
                raise UserError(f"{self.folder}: unexpected tensor {name}; this is not a plain Llama checkpoint")

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        view = self._files[name].get_slice(name)
        block = view[rows] if len(view.get_shape()) == 1 else view[rows, columns]
        self.bytes_read += block.nbytes
        if not bool(torch.isfinite(block).all()):
            raise UserError(f"{self.folder}: tensor {name} contains NaN or infinity; download the checkpoint again")
        return block


def _shard_paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise UserError(
                f"{folder}: no model.safetensors and no model.safetensors.index.json; only safetensors load"
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a shard's name must be text")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: cannot be read as an index of shards; download the checkpoint again") from None
    for name in names:
        # A file name only: an index must not lead outside its folder.
        if Path(name).name != name or not (folder / name).exists():
            raise UserError(f"{folder}: shard {name} named by {index.name} is missing; download the checkpoint again")
    return [folder / name for name in names]


def _open_shard(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt", device="cpu")
        return [(name, handle) for name in handle.keys()]  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or corrupt ({error}); download the file again") from None


class RandomSource:
    """Weights that depend only on (seed, tensor name, device type), whatever the dtype and the slice asked for.

    Normal with standard deviation 0.02 (a fresh Llama's) or, in narrow models, 1 / sqrt(hidden_size): with less, their
    attention has no say and greedy text repeats its last token whatever a bug does. Norms are one. "uniform" draws from
    +-1e-3 as vLLM's dummy loader does, since the data set a GPU's power draw and so its clock. Made on the device
    itself: seconds for 8 billion.
    """

    DISTRIBUTIONS = ("normal", "uniform")
    BLOCK_ROWS = 8192  # float32 scratch of one block, so that a bfloat16 model needs little more than itself

    def __init__(self, config: ModelConfig, device: torch.device, seed: int, distribution: str, dtype: torch.dtype):
        self.bytes_read = 0
        self.device, self.seed, self.distribution, self.dtype = device, seed, distribution, dtype
        self.deviation = max(0.02, config.hidden_size**-0.5)
        self._shapes = expected_shapes(config)

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)[rows]
        first, last, _ = rows.indices(shape[0])
        out = torch.empty((last - first, len(range(*columns.indices(shape[1])))), dtype=self.dtype, device=self.device)
        for start in range(0, shape[0], self.BLOCK_ROWS):
            stop = min(start + self.BLOCK_ROWS, shape[0])
            low, high = max(start, first), min(stop, last)
            if low < high:
                block = self._block(name, start, (stop - start, shape[1]))
                out[low - first : high - first] = block[low - start : high - start, columns]
        return out

    def _block(self, name: str, start: int, shape: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator(self.device)
        # All of it is in each half of the digest: a CPU's generator takes the low 32 bits of its seed only.
        digest = hashlib.blake2b(f"{self.seed}:{name}:{start}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        if self.distribution == "uniform":
            return torch.empty(shape, device=self.device).uniform_(-1e-3, 1e-3, generator=generator)
        return torch.empty(shape, device=self.device).normal_(0.0, self.deviation, generator=generator)
