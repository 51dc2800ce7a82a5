#!/usr/bin/env python3
"""Makes the cases of tests/tests/archs.rs: small decoders of many architectures, with the logits Transformers computes.

    pip install torch==2.6.0 transformers==4.57.6 numpy
    tests/archs/generate.py fixed OUT              # the committed cases: tests/fixtures/archs
    tests/archs/generate.py random OUT N SEED      # N random configurations of every architecture, for a sweep by hand

A case is one JSON file: the configuration, the tensors as (name, type, shape, seed, scale) and the numbers that a float32
model with eager attention computes from them on a CPU. Weights are not stored: both sides make them from the seed with
`numbers` below, whose results are exact in the type they are stored in.
"""

import json
import math
import os
import random
import sys

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96


def numbers(seed, n):
    """n 64-bit numbers: splitmix64 of seed, seed + 1, ..."""
    with np.errstate(over="ignore"):
        z = (np.arange(n, dtype=np.uint64) + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(seed, shape, exponent, center):
    """Uniform in center + [-1, 1) * 2^exponent, with 8 bits, so that bfloat16 holds it without a center."""
    bits = (numbers(seed, math.prod(shape)) >> np.uint64(56)).astype(np.float32)
    return ((bits - np.float32(128)) * np.float32(2.0 ** (exponent - 7)) + np.float32(center)).reshape(shape)


def scales(seed, shape, exponent):
    """Uniform in [1, 2) * 2^exponent with 10 bits, as float16."""
    bits = (numbers(seed, math.prod(shape)) >> np.uint64(54)).astype(np.float32)
    return ((bits + np.float32(1024)) * np.float32(2.0 ** (exponent - 10))).astype(np.float16).reshape(shape)


def words(seed, shape):
    return (numbers(seed, math.prod(shape)) >> np.uint64(32)).astype(np.uint32).reshape(shape)


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_nibbles(packed):
    """(rows, columns * 8) codes of AutoAWQ's gemm layout."""
    rows, columns = packed.shape
    out = np.zeros((rows, columns * 8), dtype=np.int32)
    for place, column in enumerate(AWQ_ORDER):
        out[:, column::8] = (packed >> np.uint32(4 * place)) & np.uint32(15)
    return out


class Tensors:
    """The tensors of a checkpoint, and their values for the model."""

    def __init__(self, seed, dtype, group_size):
        self.seed = seed
        self.dtype = dtype
        self.group_size = group_size
        self.list = []

    def _next(self, n):
        seed = self.seed
        self.seed += n
        return seed

    def add(self, name, shape, exponent, center=0.0):
        seed = self._next(math.prod(shape))
        dtype = self.dtype if len(shape) > 1 else "F32"
        self.list.append([name, dtype, list(shape), seed, exponent, center])
        return uniform(seed, shape, exponent, center)

    def add_packed(self, prefix, n, k, exponent):
        """A linear module in AutoAWQ's gemm layout; its dequantized float16 weights as float32, (n, k)."""
        groups = k // self.group_size
        shapes = {"qweight": (k, n // 8), "qzeros": (groups, n // 8), "scales": (groups, n)}
        values = {}
        for part, shape in shapes.items():
            seed = self._next(math.prod(shape))
            dtype = "F16" if part == "scales" else "I32"
            self.list.append([f"{prefix}.{part}", dtype, list(shape), seed, exponent - 4, 0.0])
            values[part] = scales(seed, shape, exponent - 4) if part == "scales" else words(seed, shape)
        q, z = awq_nibbles(values["qweight"]), awq_nibbles(values["qzeros"])
        z = np.repeat(z, self.group_size, axis=0)
        s = np.repeat(values["scales"].astype(np.float32), self.group_size, axis=0)
        return ((q - z).astype(np.float32) * s).astype(np.float16).astype(np.float32).T.copy()


def continue_greedily(model, ids, new, cache):
    """`new` tokens behind `ids` and the gaps between the two best logits; without a cache every step is one forward pass
    over the whole sequence. (With LongRoPE, Transformers 4.57's own way across the original context forgets the mask.)"""
    if cache:
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                             max_new_tokens=new, min_new_tokens=new, do_sample=False, output_logits=True,
                             return_dict_in_generate=True, use_cache=True, pad_token_id=0, eos_token_id=None)
        rows, new_ids = [row[0] for row in out.logits], out.sequences[0, len(ids):].tolist()
    else:
        rows, new_ids = [], []
        for _ in range(new):
            rows.append(model(torch.tensor([ids + new_ids]), use_cache=False).logits[0, -1])
            new_ids.append(int(rows[-1].argmax()))
    return new_ids, [float(row.topk(2).values.diff().abs()) for row in rows]


def is_norm(name):
    return "norm" in name


def make(case, seed, out_dir):
    """Writes the case; `case` has name, config (what the file says), and optionally model (what Transformers runs),
    rename, packed, dtype, lengths."""
    config = dict(case["config"])
    model_config = dict(case.get("model", config))
    packed = case.get("packed", False)
    if packed:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                                         "version": "gemm", "modules_to_not_convert": case.get("not_converted")}
    model_config.pop("architectures", None)
    hf = AutoConfig.for_model(**model_config)
    hf._attn_implementation = "eager"
    torch.manual_seed(0)
    with transformers.modeling_utils.no_init_weights():
        model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float().eval()
    tied = bool(hf.tie_word_embeddings)
    tensors = Tensors(seed * 1_000_003, case.get("dtype", "F32"), 32)
    rename = case.get("rename", lambda name, value: [(name, None)])
    plus_one = "gemma" in model_config["model_type"]
    state = {}
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        shape = tuple(value.shape)
        file_name = case["rename"](name) if "rename" in case else name
        if is_norm(name) and name.endswith("weight"):
            new = tensors.add(file_name, shape, -2, 0.0 if plus_one else 1.0)
        elif name.endswith("bias"):
            if name in case.get("zero", []) or any(name.endswith(end) for end in case.get("zero", [])):
                new = np.zeros(shape, dtype=np.float32)
            else:
                new = tensors.add(file_name, shape, -2)
        else:
            fan_in = shape[-1]
            # uniform in +-a has a standard deviation of a / sqrt(3)
            exponent = round(math.log2(case.get("gain", 1.6) * math.sqrt(3.0 / fan_in)))
            if "embed" in name or name == "lm_head.weight":
                exponent = case.get("embedding_exponent", 0) if "embed" in name else round(math.log2(5 / math.sqrt(fan_in)))
            in_layer = ".layers." in name
            dense = not in_layer or any(part in name for part in case.get("dense_modules") or [])
            if packed and not dense:
                new = tensors.add_packed(file_name.removesuffix(".weight"), shape[0], shape[1], exponent)
            else:
                new = tensors.add(file_name, shape, exponent)
        if "to_model" in case:
            new = case["to_model"](name, new)
        state[name] = torch.from_numpy(np.ascontiguousarray(new))
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()

    rng = random.Random(seed)
    prompts = []
    with torch.no_grad():
        for length in case.get("lengths", [3, 37, 90]):
            ids = [rng.randrange(VOCAB) for _ in range(length)]
            # One forward pass and no cache.
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            assert torch.isfinite(logits).all()
            prompts.append({"ids": ids, "last_logits": [float(f"{v:.5g}") for v in logits[-1].tolist()]})
        greedy = []
        for length, new in case.get("greedy", [(5, 16)]):
            ids = [rng.randrange(VOCAB) for _ in range(length)]
            new_ids, gaps = continue_greedily(model, ids, new, case.get("cache", True))
            greedy.append({"ids": ids, "new": new_ids, "min_gap": round(min(gaps), 6)})
    scale = max(max(abs(v) for v in p["last_logits"]) for p in prompts)
    assert 0.5 < scale < 200, (case["name"], scale)
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, case["name"] + ".json")
    with open(path, "w") as f:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        body = {"versions": versions, "config": config, "tensors": tensors.list, "prompts": prompts, "greedy": greedy}
        lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in body.items()]
        f.write("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{case['name']}: max |logit| {scale:.3g}, greedy gaps {[g['min_gap'] for g in greedy]}", flush=True)


# Architectures: a function of a random number generator gives a configuration.

def base(rng, **more):
    heads, kv = rng.choice([(4, 2), (4, 4), (6, 2), (3, 1), (8, 2), (2, 1)])
    config = dict(
        vocab_size=VOCAB, hidden_size=heads * rng.choice([8, 12, 16]), intermediate_size=rng.choice([36, 64, 90, 112]),
        num_hidden_layers=rng.choice([2, 3, 4]), num_attention_heads=heads, num_key_value_heads=kv,
        max_position_embeddings=rng.choice([64, 256]), rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_theta=rng.choice([10000.0, 500000.0, 1e6]), tie_word_embeddings=rng.random() < 0.5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.update(more)
    return config


def maybe_head_dim(rng, config):
    if rng.random() < 0.6:
        config["head_dim"] = rng.choice([8, 16, 24, 32])
    return config


def rope_scaling(rng):
    kind = rng.choice([None, None, "linear", "dynamic", "yarn", "llama3"])
    key = rng.choice(["type", "rope_type"])
    if kind is None:
        return None
    if kind == "llama3":
        return {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}
    if kind == "yarn":
        return {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    return {key: kind, "factor": rng.choice([2.0, 4.0])}


def llama(rng):
    c = maybe_head_dim(rng, base(rng, architectures=["LlamaForCausalLM"], model_type="llama", rope_scaling=rope_scaling(rng)))
    c.update(attention_bias=rng.random() < 0.4, mlp_bias=rng.random() < 0.4)
    return {"config": c}


def mistral(rng):
    c = maybe_head_dim(rng, base(rng, architectures=["MistralForCausalLM"], model_type="mistral"))
    c.update(sliding_window=rng.choice([None, 7, 24, 33]))
    return {"config": c}


def ministral(rng):
    c = maybe_head_dim(rng, base(rng, architectures=["MinistralForCausalLM"], model_type="ministral"))
    c.update(sliding_window=rng.choice([7, 24, 33]))
    c.setdefault("head_dim", 16)
    if rng.random() < 0.7:
        c["layer_types"] = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(c["num_hidden_layers"])]
    return {"config": c}


def qwen2(rng):
    c = base(rng, architectures=["Qwen2ForCausalLM"], model_type="qwen2", rope_scaling=rope_scaling(rng))
    c.update(use_sliding_window=rng.random() < 0.5, sliding_window=rng.choice([7, 24]), max_window_layers=rng.choice([0, 1, 2]))
    return {"config": c}


def qwen3(rng):
    c = base(rng, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=rng.choice([8, 16, 32]),
             rope_scaling=rope_scaling(rng), attention_bias=rng.random() < 0.3)
    c.update(use_sliding_window=rng.random() < 0.4, sliding_window=rng.choice([7, 24]), max_window_layers=rng.choice([0, 1, 2]))
    return {"config": c}


def gemma(rng):
    c = base(rng, architectures=["GemmaForCausalLM"], model_type="gemma", head_dim=rng.choice([8, 16, 32]),
             hidden_act=rng.choice(["gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu"]), attention_bias=rng.random() < 0.3)
    c["tie_word_embeddings"] = rng.random() < 0.8
    return {"config": c, "embedding_exponent": -3}


def gemma2(rng):
    c = base(rng, architectures=["Gemma2ForCausalLM"], model_type="gemma2", head_dim=rng.choice([8, 16, 32]),
             query_pre_attn_scalar=rng.choice([8, 24, 64]), sliding_window=rng.choice([5, 16, 40]),
             attn_logit_softcapping=rng.choice([2.0, 5.0, 50.0, None]), final_logit_softcapping=rng.choice([4.0, 30.0, None]),
             hidden_activation="gelu_pytorch_tanh", attention_bias=rng.random() < 0.2)
    c["tie_word_embeddings"] = rng.random() < 0.8
    if rng.random() < 0.3:
        c["layer_types"] = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(c["num_hidden_layers"])]
    return {"config": c, "embedding_exponent": -3}


def gemma3(rng):
    c = base(rng, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", head_dim=rng.choice([8, 16, 32]),
             query_pre_attn_scalar=rng.choice([8, 24, 64]), sliding_window=rng.choice([5, 16, 40]),
             rope_local_base_freq=rng.choice([10000.0, 500.0]), final_logit_softcapping=rng.choice([None, None, 10.0]),
             hidden_activation="gelu_pytorch_tanh", attention_bias=rng.random() < 0.2,
             rope_scaling=rng.choice([None, {"rope_type": "linear", "factor": 8.0}]))
    c["tie_word_embeddings"] = rng.random() < 0.8
    if rng.random() < 0.5:
        c["sliding_window_pattern"] = rng.choice([2, 3])
    else:
        c["layer_types"] = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(c["num_hidden_layers"])]
    return {"config": c, "embedding_exponent": -3}


def gemma3_multimodal(rng):
    case = gemma3(rng)
    model = dict(case["config"])
    text = {k: v for k, v in model.items() if k not in ("architectures", "tie_word_embeddings")}
    # Of a nested configuration only what differs from the defaults is written.
    defaults = dict(num_attention_heads=8, num_key_value_heads=4)
    model.update(defaults)
    text.update(defaults)
    for key in defaults:
        text.pop(key)
    style = rng.choice(["language_model.model.", "model.language_model."])
    head = "language_model.lm_head" if style == "language_model.model." else "lm_head"
    config = dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", text_config=text,
                  vision_config={"model_type": "siglip_vision_model"}, eos_token_id=2, bos_token_id=1)
    if not model["tie_word_embeddings"]:
        config["tie_word_embeddings"] = False
    def rename(name):
        return head + name.removeprefix("lm_head") if name.startswith("lm_head") else style + name.removeprefix("model.")
    return {"config": config, "model": model, "rename": rename, "embedding_exponent": -3}


def phi3(rng):
    c = base(rng, architectures=["Phi3ForCausalLM"], model_type="phi3", sliding_window=rng.choice([None, 9, 31]))
    dim = c["hidden_size"] // c["num_attention_heads"]
    partial = rng.choice([1.0, 1.0, 0.75, 0.5]) if dim % 8 == 0 else 1.0
    if partial != 1.0:
        c["partial_rotary_factor"] = partial
    half = int(dim * partial) // 2
    original = rng.choice([16, 64])
    c["original_max_position_embeddings"] = original
    case = {"config": c}
    if rng.random() < 0.7:
        c["rope_scaling"] = {"type": rng.choice(["longrope", "su"]),
                             "short_factor": [round(1 + 0.05 * i, 3) for i in range(half)],
                             "long_factor": [round(1 + 0.3 * i * i, 3) for i in range(half)]}
        case["lengths"] = [3, 16, 17, 64, 65, 90]
        case["greedy"] = [(5, 16), (12, 10), (60, 10)]
        case["cache"] = False
    if c.get("rope_scaling", {}).get("type") == "su":
        # Transformers rewrites the old name itself.
        case["model"] = dict(c, rope_scaling=dict(c["rope_scaling"], type="longrope"))
    return case


def olmo2(rng):
    return {"config": base(rng, architectures=["Olmo2ForCausalLM"], model_type="olmo2", attention_bias=rng.random() < 0.2,
                           rope_scaling=rng.choice([None, {"type": "linear", "factor": 2.0}]))}


def granite(rng):
    c = base(rng, architectures=["GraniteForCausalLM"], model_type="granite", attention_bias=rng.random() < 0.3,
             mlp_bias=rng.random() < 0.3, embedding_multiplier=rng.choice([1.0, 3.0, 12.0]),
             residual_multiplier=rng.choice([1.0, 0.22, 0.5]), logits_scaling=rng.choice([1.0, 0.5, 4.0]))
    dim = c["hidden_size"] // c["num_attention_heads"]
    c["attention_multiplier"] = rng.choice([1.0 / dim, 0.1, dim ** -0.5])
    return {"config": c}


def smollm3(rng):
    c = base(rng, architectures=["SmolLM3ForCausalLM"], model_type="smollm3", attention_bias=rng.random() < 0.3,
             mlp_bias=rng.random() < 0.3)
    n = c["num_hidden_layers"]
    how = rng.choice(["list", "interval", "default"])
    if how == "list":
        c["no_rope_layers"] = [rng.choice([0, 1]) for _ in range(n)]
    elif how == "interval":
        c["no_rope_layer_interval"] = rng.choice([2, 3])
    if rng.random() < 0.5:
        c.update(use_sliding_window=True, sliding_window=rng.choice([7, 24]))
    return {"config": c}


def stablelm(rng):
    c = base(rng, architectures=["StableLmForCausalLM"], model_type="stablelm", layer_norm_eps=rng.choice([1e-5, 1e-4]),
             partial_rotary_factor=rng.choice([0.25, 0.5, 1.0]), use_qkv_bias=rng.random() < 0.5,
             qk_layernorm=rng.random() < 0.5, use_parallel_residual=rng.random() < 0.5)
    c.pop("rms_norm_eps")
    c["hidden_size"] = c["num_attention_heads"] * rng.choice([8, 16, 24])
    return {"config": c}


def internlm2(rng):
    c = base(rng, architectures=["InternLM2ForCausalLM"], model_type="internlm2", bias=rng.random() < 0.5,
             rope_scaling=rng.choice([None, {"type": "dynamic", "factor": 2.0}]))
    model = {k: v for k, v in c.items() if k != "bias"}
    model.update(model_type="llama", attention_bias=c["bias"])
    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
             "post_attention_layernorm": "ffn_norm", "input_layernorm": "attention_norm"}
    return {"config": c, "model": model, "grouped": True, "names": names}


def internlm3(rng):
    c = maybe_head_dim(rng, base(rng, architectures=["InternLM3ForCausalLM"], model_type="internlm3",
                                 rope_scaling=rng.choice([None, {"rope_type": "dynamic", "factor": 6.0}])))
    c.update(qkv_bias=rng.random() < 0.5, bias=rng.random() < 0.4)
    model = {k: v for k, v in c.items() if k not in ("qkv_bias", "bias")}
    model.update(model_type="llama", attention_bias=c["qkv_bias"] or c["bias"], mlp_bias=c["bias"])
    zero = []
    if c["qkv_bias"] and not c["bias"]:
        zero = ["o_proj.bias"]
    if c["bias"] and not c["qkv_bias"]:
        zero = ["q_proj.bias", "k_proj.bias", "v_proj.bias"]
    return {"config": c, "model": model, "zero": zero}


def mixtral(rng):
    experts = rng.choice([3, 4, 8])
    c = base(rng, architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=experts,
             num_experts_per_tok=rng.choice([1, 2, min(3, experts)]), sliding_window=rng.choice([None, 11]))
    return {"config": maybe_head_dim(rng, c), "dense_modules": ["gate."], "not_converted": ["gate"]}


def sparse_layers(rng, c):
    if rng.random() < 0.4:
        c["decoder_sparse_step"] = 2
    if rng.random() < 0.4:
        c["mlp_only_layers"] = [rng.randrange(c["num_hidden_layers"])]


def qwen2_moe(rng):
    c = base(rng, architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe", num_experts=rng.choice([3, 4, 8]),
             num_experts_per_tok=rng.choice([1, 2, 3]), moe_intermediate_size=rng.choice([20, 33, 48]),
             shared_expert_intermediate_size=rng.choice([24, 50]), norm_topk_prob=rng.random() < 0.5,
             qkv_bias=rng.random() < 0.7)
    sparse_layers(rng, c)
    return {"config": c, "dense_modules": ["gate.", "shared_expert_gate"], "not_converted": ["gate"]}


def qwen3_moe(rng):
    c = base(rng, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", head_dim=rng.choice([8, 16, 32]),
             num_experts=rng.choice([4, 8, 16]), num_experts_per_tok=rng.choice([1, 2, 4]),
             moe_intermediate_size=rng.choice([20, 33, 48]), norm_topk_prob=rng.random() < 0.5,
             attention_bias=rng.random() < 0.3, use_sliding_window=rng.random() < 0.3, sliding_window=rng.choice([7, 24]))
    sparse_layers(rng, c)
    return {"config": c, "dense_modules": ["gate."], "not_converted": ["gate"]}


ARCHITECTURES = dict(llama=llama, mistral=mistral, ministral=ministral, qwen2=qwen2, qwen3=qwen3, gemma=gemma,
                     gemma2=gemma2, gemma3=gemma3, gemma3_multimodal=gemma3_multimodal, phi3=phi3, olmo2=olmo2,
                     granite=granite, smollm3=smollm3, stablelm=stablelm, internlm2=internlm2, internlm3=internlm3,
                     mixtral=mixtral, qwen2_moe=qwen2_moe, qwen3_moe=qwen3_moe)


def packable(case):
    """Sizes that 4-bit groups of 32 divide."""
    for config in [case["config"], case["config"].get("text_config", {}), case.get("model", {})]:
        if "hidden_size" not in config:
            continue
        if not case["name"].startswith("gemma3_multimodal"):
            kv = config.get("num_key_value_heads", 2)
            config.update(num_attention_heads=4, num_key_value_heads=kv if kv in (1, 2, 4) else 2)
        config.update(hidden_size=96, intermediate_size=64)
        if "head_dim" in config:
            config["head_dim"] = 16 if config["head_dim"] < 32 else 32
        for key in ["moe_intermediate_size", "shared_expert_intermediate_size"]:
            if key in config:
                config[key] = 64
        scaling = config.get("rope_scaling") or {}
        if "long_factor" in scaling:
            half = int(24 * config.get("partial_rotary_factor", 1.0)) // 2
            scaling["short_factor"] = [round(1 + 0.05 * i, 3) for i in range(half)]
            scaling["long_factor"] = [round(1 + 0.3 * i * i, 3) for i in range(half)]
    case["packed"] = True
    return case


def finish_grouped(case):
    """InternLM2's wqkv: the model's q, k and v rows, interleaved by key/value head, under its own names."""
    if not case.get("grouped"):
        return case
    config, names = case["config"], case["names"]
    def rename(name):
        for old, new in names.items():
            name = name.replace(old, new)
        return name
    case["rename"] = rename
    case["wqkv"] = True
    return case


def make_grouped(case, seed, out_dir):
    # The model is Llama; its q, k, v come out of one tensor of the file.
    c = case["config"]
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    dim = c["hidden_size"] // heads
    group = heads // kv
    original_add, original_packed = Tensors.add, Tensors.add_packed
    made = {}
    def split(values):
        rows = values.reshape(kv, group + 2, dim, -1)
        tail = values.shape[1:]
        return {"q": rows[:, :group].reshape(heads * dim, *tail), "k": rows[:, group].reshape(kv * dim, *tail),
                "v": rows[:, group + 1].reshape(kv * dim, *tail)}
    def which(name):
        for p in "qkv":
            if f"self_attn.{p}_proj" in name:
                return p
        return None
    n = (heads + 2 * kv) * dim
    def add(self, name, shape, exponent, center=0.0):
        p = which(name)
        if p is None:
            return original_add(self, name, shape, exponent, center)
        whole = name.replace(f"self_attn.{p}_proj", "attention.wqkv")
        if whole not in made:
            made[whole] = split(original_add(self, whole, (n, *shape[1:]), exponent, center))
        return made[whole][p]
    def add_packed(self, prefix, rows, k, exponent):
        p = which(prefix)
        if p is None:
            return original_packed(self, prefix, rows, k, exponent)
        whole = prefix.replace(f"self_attn.{p}_proj", "attention.wqkv")
        if whole not in made:
            made[whole] = split(original_packed(self, whole, n, k, exponent))
        return made[whole][p]
    Tensors.add, Tensors.add_packed = add, add_packed
    try:
        make(finish_grouped(case), seed, out_dir)
    finally:
        Tensors.add, Tensors.add_packed = original_add, original_packed


def run(case, seed, out_dir):
    case.setdefault("dtype", ["F32", "BF16"][seed % 2])
    (make_grouped if case.get("grouped") else make)(case, seed, out_dir)


def main():
    torch.set_num_threads(1)
    mode, out_dir = sys.argv[1:3]
    only = os.environ.get("ONLY", "").split()
    if mode == "random":
        n, seed = int(sys.argv[3]), int(sys.argv[4])
    else:
        n, seed = 3, 1
    for a, (arch, build) in enumerate(ARCHITECTURES.items()):
        if only and arch not in only:
            continue
        for i in range(n):
            case_seed = seed * 100_000 + a * 1000 + i
            case = dict(build(random.Random(case_seed)), name=f"{arch}-{i}")
            if i % 3 == 2:
                case = packable(case)
            run(case, case_seed, out_dir)


main()
