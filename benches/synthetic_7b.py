"""Writes a folder in the shape of Mistral 7B v0.3, 14.5 GB of random bf16 weights in one file a layer:
for what loading, speed and memory are at full size. Needs nothing but Python.

    python3 benches/synthetic_7b.py FOLDER
    hybrid generate --model FOLDER --ids 1,2,3 --quantize q8_0
"""

import array
import json
import os
import random
import struct
import sys

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 4096, 14336, 32, 32, 8, 128, 32768


def weights(count):
    """So many bf16 around 0 with a deviation of 0.02, from a stock of a million; as bytes."""
    if not weights.stock:
        values = array.array("f", (random.gauss(0, 0.02) for _ in range(1 << 20)))
        weights.stock = b"".join(
            struct.pack("<H", bits >> 16) for (bits,) in struct.iter_unpack("<I", values.tobytes())
        )
    start = 2 * random.randrange(1 << 19)
    stock = weights.stock[start:] + weights.stock[:start]
    whole, rest = divmod(2 * count, len(stock))
    for _ in range(whole):
        yield stock
    yield stock[:rest]


weights.stock = b""


def write(path, tensors):
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            if len(shape) == 1:
                file.write(struct.pack("<H", 0x3F80) * shape[0])  # norms of 1
            else:
                file.writelines(weights(shape[0] * shape[1]))
    return end


def main(folder):
    random.seed(7)
    os.makedirs(folder, exist_ok=True)
    shards = [{
        "model.embed_tokens.weight": [VOCAB, HIDDEN],
        "model.norm.weight": [HIDDEN],
        "lm_head.weight": [VOCAB, HIDDEN],
    }]
    for layer in range(LAYERS):
        shapes = {
            "input_layernorm": [HIDDEN],
            "self_attn.q_proj": [HEADS * DIM, HIDDEN],
            "self_attn.k_proj": [KV_HEADS * DIM, HIDDEN],
            "self_attn.v_proj": [KV_HEADS * DIM, HIDDEN],
            "self_attn.o_proj": [HIDDEN, HEADS * DIM],
            "post_attention_layernorm": [HIDDEN],
            "mlp.gate_proj": [INNER, HIDDEN],
            "mlp.up_proj": [INNER, HIDDEN],
            "mlp.down_proj": [HIDDEN, INNER],
        }
        shards.append({f"model.layers.{layer}.{name}.weight": it for name, it in shapes.items()})
    names, total = {}, 0
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        total += write(os.path.join(folder, file), shard)
        names |= dict.fromkeys(shard, file)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": names}, file)
    config = {
        "model_type": "mistral", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": DIM, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    }
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    print(f"{folder}: {total / 1e9:.1f} GB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
