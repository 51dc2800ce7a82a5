#!/usr/bin/env python3
"""Train tiny-story, a Llama-architecture decoder, and export it in Hugging Face form.

usage: train.py --corpus DIR --tokenizer DIR --out DIR [--seconds N] [--smoke]

--corpus holds train.txt and valid.txt, --tokenizer what train_tokenizer.py wrote.
Trains the configurations of RUNS while the time allows, keeps the checkpoint with
the lowest validation loss, rounds it to f16, checks the export against
transformers, and writes reference.json with numbers for other runtimes.
--smoke trains a few steps only (any device): a check of the script itself.
"""

import argparse
import json
import math
import platform
import re
import shutil
import time
from pathlib import Path

import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

BLOCK = 512
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 768, 6, 8, 4
HEAD_DIM = HIDDEN // HEADS
THETA, EPS = 10000.0, 1e-5
BATCH = 32  # windows of BLOCK tokens a step
PEAK_LR, WEIGHT_DECAY, CLIP = 2e-3, 0.1, 1.0
# (epochs, dropout), most promising first: a later one runs only if time is left.
RUNS = [(24, 0.1), (48, 0.2), (40, 0.1)]
SEPARATOR = "\n<|endoftext|>\n"
PROMPTS = [
    "It was a fine morning in the spring, and Emma",
    "In the beginning God created",
    "A hacker is a person who",
]


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return y * self.weight


def rotate(x, cos, sin):
    """Half-split rotary embedding, as transformers lays it out."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.dropout = dropout

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.input_layernorm = Norm()
        self.self_attn = Attention(dropout)
        self.post_attention_layernorm = Norm()
        self.mlp = Mlp()
        self.drop = nn.Dropout(dropout)

    def forward(self, x, cos, sin):
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Module names give the Hugging Face tensor names, less the prefix `model.`."""

    def __init__(self, vocabulary, dropout):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, HIDDEN)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(LAYERS))
        self.norm = Norm()
        self.drop = nn.Dropout(dropout)
        inverse = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = torch.outer(torch.arange(BLOCK).float(), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * LAYERS) if last else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, ids):
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.drop(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def encode(tokenizer, path):
    """One token stream; each document begins with <|endoftext|> (id 0)."""
    ids = []
    documents = path.read_text(encoding="utf-8").split(SEPARATOR)
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids.append(0)
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.long)


def windows(ids):
    """Non-overlapping windows of BLOCK tokens; the rest is dropped."""
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


@torch.no_grad()
def mean_nll(logits_of, held_out):
    """Mean over all windows of the BLOCK - 1 next-token losses in each, in nats."""
    total = 0.0
    for batch in held_out.split(16):
        logits = logits_of(batch)[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total += loss.item()
    return total / (held_out.shape[0] * (BLOCK - 1))


def train_one(train_ids, held_out, vocabulary, epochs, dropout, device, deadline, smoke):
    """Train one configuration; return its record and its best weights."""
    torch.manual_seed(1234)
    model = Llama(vocabulary, dropout).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    batch = 2 if smoke else BATCH
    per_epoch = 4 if smoke else len(train_ids) // (batch * BLOCK)
    steps = epochs * per_epoch
    warm_up = min(300, steps // 10 + 1)
    step_model = model
    if device == "cuda" and not smoke:
        try:
            step_model = torch.compile(model)
            with torch.autocast(device, dtype=torch.bfloat16):
                step_model(train_ids[:BLOCK].repeat(batch, 1)).sum().backward()
            optimizer.zero_grad(set_to_none=True)
        except Exception as error:  # any compiler failure: eager training is only slower
            print(f"compile failed, going on without: {error!r}"[:500])
            step_model = model
    record = {"epochs": epochs, "dropout": dropout, "steps": steps, "curve": []}
    best, best_loss = None, math.inf
    offsets = torch.arange(BLOCK, device=device)
    started, running = time.time(), torch.zeros((), device=device)
    for step in range(steps):
        if step < warm_up:
            rate = PEAK_LR * (step + 1) / warm_up
        else:
            done = (step - warm_up) / max(1, steps - warm_up)
            rate = PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(train_ids) - BLOCK - 1, (batch, 1), device=device)
        x = train_ids[starts + offsets]
        y = train_ids[starts + offsets + 1]
        model.train()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = step_model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        if step == 0:
            first = time.time()
        if step == 100:
            projected = (time.time() - first) / 100 * steps
            print(f"projected {projected:.0f} s for {epochs} epochs", flush=True)
            if best is None and time.time() + projected > deadline:
                print("does not fit the time left: skipped")
                return None, None
        if (step + 1) % per_epoch == 0:
            model.eval()
            with torch.autocast(device, dtype=torch.bfloat16):
                valid = mean_nll(model, held_out)
            point = [(step + 1) // per_epoch, round(running.item() / per_epoch, 4), round(valid, 4)]
            running.zero_()
            record["curve"].append(point)
            print(f"epoch {point[0]} train {point[1]} valid {point[2]} {time.time() - started:.0f} s", flush=True)
            if valid < best_loss:
                best_loss = valid
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
    record["seconds"] = round(time.time() - started, 1)
    record["best_valid"] = round(best_loss, 4)
    return record, best


def export(weights, vocabulary, tokenizer_dir, out):
    """Write the Hugging Face folder, weights rounded to f16."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.cpu().to(torch.float16).contiguous() for k, v in weights.items()}
    assert all(torch.isfinite(t).all() for t in tensors.values())
    safetensors.torch.save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": BLOCK,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 3,
        "use_cache": True,
        "torch_dtype": "float16",
    }
    generation = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 3,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
    }
    for name, value in (("config", config), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, out / name)
    return sum(t.numel() for t in tensors.values())


@torch.no_grad()
def greedy(logits_of, ids, count):
    """Greedy continuation, recomputed from the whole sequence; smallest top-2 gap."""
    ids, smallest = list(ids), math.inf
    for _ in range(count):
        top = logits_of(torch.tensor([ids]))[0, -1].topk(2)
        smallest = min(smallest, (top.values[0] - top.values[1]).item())
        ids.append(top.indices[0].item())
    return ids[-count:], smallest


@torch.no_grad()
def sample(logits_of, ids, count, generator):
    ids = list(ids)
    for _ in range(count):
        top = (logits_of(torch.tensor([ids]))[0, -1] / 0.8).topk(40)
        pick = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        ids.append(top.indices[pick].item())
    return ids


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = tokenizers.Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    began = time.time()
    train_ids = encode(tokenizer, arguments.corpus / "train.txt").to(device)
    held_out = windows(encode(tokenizer, arguments.corpus / "valid.txt")).to(device)
    print(f"{len(train_ids)} training tokens, {held_out.shape[0]} held-out windows, {time.time() - began:.0f} s")

    deadline = time.time() + arguments.seconds
    records, best, best_loss = [], None, math.inf
    for epochs, dropout in [(2, 0.1)] if arguments.smoke else RUNS:
        print(f"run: {epochs} epochs, dropout {dropout}", flush=True)
        limit = math.inf if best is None else deadline
        subset = held_out[:2] if arguments.smoke else held_out
        record, weights = train_one(
            train_ids, subset, vocabulary, epochs, dropout, device, limit, arguments.smoke
        )
        if record is None:
            continue
        records.append(record)
        if record["best_valid"] < best_loss:
            best, best_loss = weights, record["best_valid"]

    parameters = export(best, vocabulary, arguments.tokenizer, arguments.out)

    torch.set_num_threads(8)
    reference = transformers.LlamaForCausalLM.from_pretrained(
        str(arguments.out), torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    own = Llama(vocabulary, 0.0)
    own.load_state_dict({k: v.cpu().to(torch.float16).float() for k, v in best.items()})
    own.eval()

    def logits_of(ids):
        return reference(input_ids=ids, use_cache=False).logits

    held_out = held_out.cpu()
    checked = held_out[:2]
    with torch.no_grad():
        difference = (own(checked) - logits_of(checked)).abs().max().item()
    print(f"largest logit difference, own model to transformers: {difference:.2e}")
    assert difference < 2e-3, "the export does not match transformers"

    cases = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        with torch.no_grad():
            last = logits_of(torch.tensor([ids]))[0, -1]
        produced, gap = greedy(logits_of, ids, 48)
        cases.append(
            {
                "prompt": prompt,
                "input_ids": ids,
                "greedy_ids": produced,
                "greedy_text": tokenizer.decode(produced, skip_special_tokens=False),
                "smallest_top2_gap": gap,
                "last_logits": [round(v, 6) for v in last.tolist()],
            }
        )
    nll = mean_nll(logits_of, held_out[:2] if arguments.smoke else held_out)
    result = {
        "made_with": "transformers LlamaForCausalLM in f32 on the CPU over the f16 weights of model.safetensors",
        "parameters": parameters,
        "cases": cases,
        "held_out": {
            "definition": f"non-overlapping windows of {BLOCK} tokens, no token put in front, "
            f"mean of the {BLOCK - 1} next-token losses of each window, natural logarithm",
            "windows": held_out.shape[0],
            "mean_nll": nll,
            "perplexity": math.exp(nll),
            "excerpt": [
                {"window": i, "ids": held_out[i].tolist(), "mean_nll": mean_nll(logits_of, held_out[i : i + 1])}
                for i in (0, held_out.shape[0] // 2)
            ],
        },
        "largest_logit_difference_to_own_model": difference,
        "training": {
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
            "tokens": len(train_ids),
            "batch": BATCH,
            "block": BLOCK,
            "peak_learning_rate": PEAK_LR,
            "weight_decay": WEIGHT_DECAY,
            "curve_columns": ["epoch", "train loss (with dropout)", "valid loss"],
            "runs": records,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    text = json.dumps(result, ensure_ascii=False, indent=1)
    # Number lists on one line each.
    text = re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    (arguments.out / "reference.json").write_text(text + "\n", encoding="utf-8")
    print(f"{parameters} parameters, held-out NLL {nll:.4f}, best valid {best_loss}")

    generator = torch.Generator().manual_seed(7)
    for prompt in [*PROMPTS, "Mr. Darcy looked at her and said"]:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        for _ in range(1 if arguments.smoke else 2):
            print("---", tokenizer.decode(sample(logits_of, ids, 8 if arguments.smoke else 120, generator)))


if __name__ == "__main__":
    main()
