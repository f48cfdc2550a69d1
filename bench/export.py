"""Our checkpoint in the formats of other engines."""

import json

import torch

NAMES = {  # Meta's, Hugging Face's, GGUF's
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}


def export(folder, source):
    """Write the checkpoint in `source` as folder/hf and folder/model.gguf, in bfloat16."""
    params = json.loads((source / "params.json").read_text())
    w = torch.load(source / "consolidated.00.pth", weights_only=True)
    if params.get("use_scaled_rope") or "output.weight" in w:
        raise ValueError("only plain RoPE and tied embeddings are written in the others' formats")
    w = {name.removesuffix(".weight"): weight.bfloat16() for name, weight in w.items()}
    half = params["dim"] // params["n_heads"] // 2
    hf_w = {"embed_tokens": w["tok_embeddings"], "norm": w["norm"]}
    gguf_w = {"token_embd": w["tok_embeddings"], "output_norm": w["norm"]}
    for i in range(params["n_layers"]):
        for name, (hf_name, gguf_name) in NAMES.items():
            weight = w[f"layers.{i}.{name}"]
            gguf_w[f"blk.{i}.{gguf_name}"] = weight
            if name in ("attention.wq", "attention.wk"):  # RoPE's pairs: neighbours, or halves.
                weight = weight.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
            hf_w[f"layers.{i}.{hf_name}"] = weight.contiguous()
    params["vocab"], params["ffn"] = len(w["tok_embeddings"]), len(w["layers.0.feed_forward.w1"])
    (folder / "hf").mkdir()
    write_hf(folder / "hf", params, hf_w)
    write_gguf(folder / "model.gguf", params, gguf_w)


def write_hf(folder, params, w):
    from safetensors.torch import save_file

    tensors = {f"model.{name}.weight": weight for name, weight in w.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": params["dim"], "intermediate_size": params["ffn"],
        "num_hidden_layers": params["n_layers"], "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"], "vocab_size": params["vocab"],
        "rms_norm_eps": params["norm_eps"], "rope_theta": params["rope_theta"],
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_gguf(file, params, w):
    """Its tokenizer takes ids, and each token's text is its id, so that ids can be read again."""
    import gguf

    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(params["n_layers"])
    out.add_context_length(8192)
    out.add_embedding_length(params["dim"])
    out.add_feed_forward_length(params["ffn"])
    out.add_head_count(params["n_heads"])
    out.add_head_count_kv(params["n_kv_heads"])
    out.add_layer_norm_rms_eps(params["norm_eps"])
    out.add_rope_freq_base(params["rope_theta"])
    out.add_rope_dimension_count(params["dim"] // params["n_heads"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list([f"<{i}>" for i in range(params["vocab"])])
    out.add_token_types([gguf.TokenType.NORMAL] * params["vocab"])
    out.add_token_merges(["a b"])
    for name, weight in w.items():
        if weight.dim() == 1:
            out.add_tensor(f"{name}.weight", weight.float().numpy())
        else:
            raw = weight.view(torch.uint8).numpy()
            out.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
