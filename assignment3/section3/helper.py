"""The pieces around the pipeline under the names of the handout: weights by name, and the rotary embedding.

The work is done in common/: checkpoint.py reads weights straight into fused tensors, rope.py holds the angles. Here
they can be looked at one by one.

    from helper import WeightManager, extract_model_weights
    manager = WeightManager("embedded")
    weights = extract_model_weights(manager.weight_map, manager.config.num_hidden_layers)
    weights["self_attn.q_proj"][0].shape
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LAYER_WEIGHTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class WeightManager:
    """A model and its weights by Hugging Face's names.

    source: a folder, a hub id, "embedded" or "random:SHAPE"; None as for --model. Raises UserError where there is none.
    """

    def __init__(self, source=None, *, device="auto", dtype="auto", seed=0):
        from common.checkpoint import load

        self.model, self.tokenizer = load(source, device=device, dtype=dtype, seed=seed, quiet=True)
        self._weight_map = None

    @property
    def config(self):
        return self.model.config

    @property
    def weight_map(self):
        """{name: tensor}; q, k, v and gate, up are views of the fused tensors (on a CPU, of a plain copy of them)."""
        if self._weight_map is None:
            from common.peers import hf_state_dict

            self._weight_map = hf_state_dict(self.model)
            self._weight_map.setdefault("lm_head.weight", self._weight_map["model.embed_tokens.weight"])
        return self._weight_map


def extract_model_weights(weight_map, num_layers):
    """{"embed_tokens", "norm", "lm_head": tensor; each of LAYER_WEIGHTS: a list, one tensor a layer}.

    Raises UserError naming the first weight that is not in the map.
    """
    from common.errors import UserError

    def get(name):
        try:
            return weight_map[name]
        except KeyError:
            raise UserError(f"weights: {name} is not there; is num_layers {num_layers} the model's?") from None

    weights = {
        "embed_tokens": get("model.embed_tokens.weight"),
        "norm": get("model.norm.weight"),
        "lm_head": get("lm_head.weight"),
    }
    for part in LAYER_WEIGHTS:
        weights[part] = [get(f"model.layers.{i}.{part}.weight") for i in range(num_layers)]
    return weights


def apply_rope(x, positions, config):
    """Rotate heads x [T, H, d] to integer `positions` [T], in float32, half against half; returns x's dtype."""
    from common.attention import rotary_table
    from common.rope import rotate

    return rotate(x, *rotary_table(config, x.device).at(positions))
