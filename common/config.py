"""What a model is made of: `ModelConfig`, read from a Hugging Face folder's config.json and checked.

Only Llama-shaped decoders are accepted. Anything that would silently compute something else (attention biases, other
rope types, mixtures of experts, sliding windows) is refused by name. This file imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM",)
NEEDED_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*NEEDED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling, with the field names of config.json's `rope_scaling` (rope type "llama3").

    Wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those
    shorter than `original_max_position_embeddings / high_freq_factor` are kept, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, under Hugging Face's names. Sizes are in elements, `head_dim` may be any even number."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            _size(getattr(self, name), f"config: {name}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"config: head_dim {self.head_dim} is odd; rotary embeddings rotate pairs")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < _number(getattr(self, name), name) < float("inf"):
                raise UserError(f"config: {name} is {getattr(self, name)}; it must be above 0")
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in ids):
                raise UserError(f"config: {name} is {ids!r}; token ids are whole numbers")

    @property
    def q_size(self) -> int:
        """Width of the queries of one token: Hq * d elements."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys (or of the values) of one token: Hkv * d elements."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_linear_parameters(self) -> int:
        """Weights that a token is multiplied with: all the layers' linears and the head, without the embedding."""
        layer = self.hidden_size * (2 * self.q_size + 2 * self.kv_size + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        norms = self.hidden_size * (2 * self.num_hidden_layers + 1)
        embedding = 0 if self.tie_word_embeddings else self.hidden_size * self.vocab_size
        return self.num_linear_parameters + norms + embedding

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of K and V that one token adds over all layers, with elements of `element_size` bytes."""
        return 2 * self.num_hidden_layers * self.kv_size * element_size

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json (and generation_config.json for the EOS ids).

        Raises UserError naming the file and the field when something is missing, malformed or not supported.
        """
        path = Path(folder) / "config.json"
        raw = _read_json(path)
        _refuse_unsupported(raw, path)
        for name in NEEDED_SIZES:
            if name not in raw:
                raise UserError(f"{path}: field {name!r} is missing; a Llama config needs it")
        sizes = {name: _size(raw[name], f"{path}: {name}") for name in NEEDED_SIZES}
        heads = sizes["num_attention_heads"]
        rope = _rope_parameters(raw, path)
        theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        try:
            return cls(
                **sizes,
                num_key_value_heads=_default(raw.get("num_key_value_heads"), heads),
                head_dim=_default(raw.get("head_dim"), sizes["hidden_size"] // heads),
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=_number(theta, "rope_theta"),
                rope_scaling=_rope_scaling(rope, path),
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                bos_token_id=raw.get("bos_token_id"),
                eos_token_ids=_eos_token_ids(raw, Path(folder)),
            )
        except UserError as error:
            raise UserError(str(error).replace("config: ", f"{path}: ", 1)) from None

    def to_hf_dict(self) -> dict[str, Any]:
        """The config.json that describes this model to Hugging Face transformers (4 and 5)."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rope_scaling", "eos_token_ids")}
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {"rope_type": "llama3", **vars(self.rope_scaling)}
        return {
            "architectures": list(ARCHITECTURES),
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **raw,
            "eos_token_id": list(self.eos_token_ids) or None,
            # transformers 4 reads rope_theta and rope_scaling, transformers 5 reads rope_parameters.
            "rope_scaling": None if self.rope_scaling is None else rope,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
        }

    def with_context(self, context: int) -> ModelConfig:
        """The same shape with another maximum number of positions."""
        return replace(self, max_position_embeddings=context)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; --model needs a Hugging Face folder with config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download the checkpoint again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, not an object of settings")
    return raw


def _size(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what} is {value!r}; it must be a whole number of at least 1")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f"config: {name} is {value!r}; it must be a number")
    return float(value)


def _default(value: Any, default: int) -> Any:
    return default if value is None else value


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    """Refuse by name whatever this decoder would compute wrongly."""
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise UserError(f"{path}: architectures is {architectures!r}; it must be a list of names")
    if architectures and not any(name in ARCHITECTURES for name in architectures):
        raise UserError(f"{path}: architecture {architectures[0]} is not supported; supported: {ARCHITECTURES[0]}")
    if raw.get("model_type", "llama") != "llama":
        raise UserError(f"{path}: model_type {raw['model_type']!r} is not supported; supported: 'llama'")
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field):
            raise UserError(f"{path}: {field} is true; linears with a bias are not supported")
    for field in ("num_local_experts", "num_experts", "sliding_window", "quantization_config"):
        if raw.get(field):
            raise UserError(f"{path}: {field} is {raw[field]!r}; this is not supported")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; supported: 'silu'")
    if (raw.get("pretraining_tp") or 1) != 1:
        raise UserError(f"{path}: pretraining_tp {raw['pretraining_tp']} is not supported; supported: 1")


def _rope_parameters(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters` (theta inside), earlier versions `rope_scaling` (theta outside).

    Where a file has both, as one that was edited by hand may, the earlier one counts, as it does in transformers.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: its rope fields are {rope!r}, not an object of settings")
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if share not in (None, 1.0):
        raise UserError(f"{path}: partial_rotary_factor {share!r} is not supported; supported: 1.0")
    return rope


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path}: rope type {kind!r} is not supported; supported: 'default', 'llama3'")
    try:
        return RopeScaling(
            factor=_number(rope["factor"], "factor"),
            low_freq_factor=_number(rope["low_freq_factor"], "low_freq_factor"),
            high_freq_factor=_number(rope["high_freq_factor"], "high_freq_factor"),
            original_max_position_embeddings=_size(
                rope["original_max_position_embeddings"], "config: original_max_position_embeddings"
            ),
        )
    except KeyError as missing:
        raise UserError(f"{path}: rope type 'llama3' needs the field {missing}") from None


def _eos_token_ids(raw: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """All ids that end a text: generation_config.json's (chat models list several there), else config.json's."""
    generation = folder / "generation_config.json"
    ids = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if ids is None:
        ids = raw.get("eos_token_id")
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


LLAMA3_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)

SHAPES: dict[str, ModelConfig] = {
    "llama2-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, 10000.0, None, 4096, False, 1, (2,)),
    "llama3-8b": ModelConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 500000.0, None, 8192, False, 128000, (128001, 128009)
    ),
    "llama3-70b": ModelConfig(
        128256, 8192, 28672, 80, 64, 8, 128, 1e-5, 500000.0, None, 8192, False, 128000, (128001, 128009)
    ),
    "smollm2-135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 100000.0, None, 8192, True, 1, (2,)),
    "tiny": ModelConfig(512, 64, 176, 2, 4, 2, 16, 1e-5, 10000.0, None, 2048, False, 1, (2,)),
}
