"""The language model: Qwen3 from transformers, its attention switched to ours."""

from __future__ import annotations

from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from infimed.models.attention import PACKED


def qwen3(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    rope_theta: float = 1_000_000.0,
    max_position_embeddings: int = 40_960,
    initializer_range: float = 0.02,
) -> PreTrainedModel:
    """Build Qwen3 with tied embeddings at random init; `initializer_range` is the standard deviation of its matrices.

    Source: arXiv 2505.09388; transformers `models/qwen3/modeling_qwen3.py`.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation(PACKED)
    return model
