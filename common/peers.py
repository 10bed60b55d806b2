"""Hugging Face on the same weights and the same ids, for `--compare hf` and as the oracle of the tests.

The peer is built from our own tensors, so nothing is read twice and random models can be compared too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.generation import StepTimes
from common.llama import Llama


def hf_state_dict(model: Llama) -> dict[str, torch.Tensor]:
    """Our fused weights under Hugging Face's names (a head that is tied is left out)."""
    c = model.config
    state = {"model.embed_tokens.weight": model.embed_tokens, "model.norm.weight": model.norm.weight}
    if not c.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight
    for i, w in enumerate(model.layers):
        p = f"model.layers.{i}."
        q, k, v = w.qkv.weight.split([c.q_size, c.kv_size, c.kv_size])
        gate, up = w.gate_up.weight.chunk(2)
        state[p + "input_layernorm.weight"] = w.input_norm.weight
        state[p + "post_attention_layernorm.weight"] = w.post_norm.weight
        state |= {p + f"self_attn.{name}_proj.weight": t for name, t in zip("qkv", (q, k, v))}
        state |= {p + "self_attn.o_proj.weight": w.o_proj.weight, p + "mlp.down_proj.weight": w.down_proj.weight}
        state |= {p + "mlp.gate_proj.weight": gate, p + "mlp.up_proj.weight": up}
    return state


class HuggingFacePeer:
    """`generate` of transformers, greedy, over the same weights: dtype, device and token ids as ours."""

    name = "hf"

    def __init__(self, model: Llama) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        # The architecture's name is ours to write; the class is the one that config.json would choose.
        config = LlamaConfig.from_dict({**model.config.to_hf_dict(), "dtype": model.dtype})
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)
        self.model.load_state_dict(hf_state_dict(model), strict=False, assign=True)
        self.model.tie_weights()
        # What `assign` cannot reach: the rotary table is a buffer that checkpoints do not hold.
        with model.device:
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)
        self.model.eval()
        missing = [name for name, p in self.model.named_parameters() if p.device.type == "meta"]
        if missing:
            raise RuntimeError(f"peer hf: no weights for {missing[:3]}")

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits of one sequence at every position, [T, V] float32."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        return self.model(ids).logits[0].float()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        output_len: int,
        *,
        eos_token_ids: Sequence[int] = (),
        times: StepTimes | None = None,
    ) -> list[list[int]]:
        """Continue all prompts as one left-padded batch; without `eos_token_ids` each gets exactly `output_len` ids.

        EOS is ignored by not naming one to `generate`, so it stays a token like any other and is not masked. `times`
        is stamped at the start and after every token.
        """
        from transformers import GenerationConfig, StoppingCriteriaList

        def stamp(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            if times is not None:
                times.step()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # nothing is stopped

        device, longest = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        config = GenerationConfig(
            max_new_tokens=output_len, do_sample=False, eos_token_id=list(eos_token_ids) or None, pad_token_id=0
        )
        # The model's own generation config would bring its EOS back.
        self.model.generation_config = config
        if times is not None:
            times.start()
        out = self.model.generate(
            ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([stamp])
        )
        return [_until_eos(row, eos_token_ids) for row in out[:, longest:].tolist()]


def _until_eos(row: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """A row up to and including its first EOS; what follows in a batch is padding."""
    end = next((i for i, token in enumerate(row) if token in eos_token_ids), len(row) - 1)
    return row[: end + 1]
