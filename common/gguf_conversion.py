"""A Llama-shaped GGUF file -> an ordinary Hugging Face folder (config.json, model.safetensors, tokenizer.json).

Two traps, each a test: llama.cpp stores the rows of q and k for its interleaved rotation, so they must be put back into
Hugging Face's half-split order; and the tokenizer must split digits one by one before its byte-level merges, which
transformers' own GGUF reading does not do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.config import ModelConfig
from common.embedded import write_hf_folder
from common.errors import UserError

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf_path: Path, folder: Path) -> None:
    """Dequantise `gguf_path` to float32 and write `folder`. Raises UserError if it is not a Llama in GGUF form."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(gguf_path)
    except Exception as error:  # of a damaged file the reader raises whatever its bytes happen to lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{gguf_path}: not a readable GGUF file ({reason}); fetch it again") from None
    facts = _Facts(reader)
    config = read_config(facts, has_head=any(t.name == "output.weight" for t in reader.tensors))
    tensors = {}
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = hf_name(tensor.name)
        if "q_proj" in name:
            weight = to_half_split(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = to_half_split(weight, config.num_key_value_heads)
        tensors[name] = weight
    tokenizer_json, tokenizer_config = build_tokenizer(facts)
    write_hf_folder(folder, {**config.to_hf_dict(), "dtype": "float32"}, tensors, tokenizer_json, tokenizer_config)


class _Facts:
    """A GGUF file's metadata by key."""

    def __init__(self, reader) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str):
        if key not in self._fields:
            raise UserError(f"GGUF file: the field {key} is missing")
        return self._fields[key].contents()


def read_config(facts: _Facts, *, has_head: bool) -> ModelConfig:
    """The GGUF metadata under Hugging Face's names."""
    if facts["general.architecture"] != "llama":
        raise UserError(
            f"GGUF file: architecture {facts['general.architecture']!r} is not supported; supported: 'llama'"
        )
    heads, hidden = facts["llama.attention.head_count"], facts["llama.embedding_length"]
    return ModelConfig(
        vocab_size=facts["llama.vocab_size"],
        hidden_size=hidden,
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        # Stored as float32: 9.999999747378752e-06 is the checkpoint's 1e-5.
        rms_norm_eps=float(np.format_float_positional(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        rope_theta=facts["llama.rope.freq_base"],
        max_position_embeddings=facts["llama.context_length"],
        tie_word_embeddings=not has_head,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_ids=(facts["tokenizer.ggml.eos_token_id"],),
    )


def hf_name(name: str) -> str:
    """GGUF's tensor name -> Hugging Face's: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_TENSORS:
            return f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight"
        case [part, "weight"] if part in TOP_TENSORS:
            return f"{TOP_TENSORS[part]}.weight"
    raise UserError(f"GGUF file: unexpected tensor {name}")


def to_half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k [H d, D] from neighbours-rotate order (0, d/2, 1, d/2 + 1, ...) back to half-split order."""
    out_size, in_size = weight.shape
    pairs = weight.reshape(num_heads, out_size // num_heads // 2, 2, in_size)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(out_size, in_size))


def build_tokenizer(facts: _Facts) -> tuple[str, dict]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE that splits digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    special = [token for token, kind in zip(tokens, kinds) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": facts["tokenizer.chat_template"],
    }
    return tokenizer.to_str(), config
