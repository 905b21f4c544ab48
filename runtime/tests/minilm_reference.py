"""Sentence embeddings of a BERT model, computed with numpy alone.

    minilm_reference.py MODEL_DIR < texts.json > embeddings.json

An independent check: it reads the safetensors file by hand, splits words with its own WordPiece, and computes
in float64.
"""

import json
import math
import pathlib
import struct
import sys
import unicodedata

import numpy as np


def read_safetensors(path):
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        start, end = entry["data_offsets"]
        values = np.frombuffer(data[8 + size + start : 8 + size + end], dtype="<f4")
        tensors[name] = values.reshape(entry["shape"]).astype(np.float64)
    return tensors


def is_punctuation(c):
    return not c.isalnum() and 33 <= ord(c) <= 126 or unicodedata.category(c).startswith("P")


def is_cjk(c):
    ranges = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0xF900, 0xFAFF)]
    return any(low <= ord(c) <= high for low, high in ranges)


def words(text):
    """Lower case without accents, cut at spaces, punctuation and CJK characters."""
    text = unicodedata.normalize("NFD", text.lower())
    out = [""]
    for c in text:
        category = unicodedata.category(c)
        if c.isspace():
            out.append("")
        elif category == "Mn" or category in ("Cc", "Cf") or c == "\ufffd":
            continue
        elif is_punctuation(c) or is_cjk(c):
            out += [c, ""]
        else:
            out[-1] += c
    return [word for word in out if word]


def pieces(word, vocab):
    """The longest known piece first; the whole word is unknown if the rest of it is."""
    if len(word) > 100:
        return [vocab["[UNK]"]]
    out, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab:
                out.append(vocab[piece])
                start = end
                break
        else:
            return [vocab["[UNK]"]]
    return out


def layer_norm(x, t, name, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return x * t[name + ".weight"] + t[name + ".bias"]


def linear(x, t, name):
    return x @ t[name + ".weight"].T + t[name + ".bias"]


def gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def embed(ids, t, config):
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    x = t["embeddings.word_embeddings.weight"][ids]
    x = x + t["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + t["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(x, t, "embeddings.LayerNorm", eps)

    def split(y):
        return y.reshape(len(ids), heads, -1).transpose(1, 0, 2)

    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{n}."
        q, k, v = (split(linear(x, t, f"{layer}attention.self.{p}")) for p in ("query", "key", "value"))
        mixed = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(len(ids), -1)
        mixed = linear(mixed, t, layer + "attention.output.dense")
        x = layer_norm(x + mixed, t, layer + "attention.output.LayerNorm", eps)
        fed = linear(gelu(linear(x, t, layer + "intermediate.dense")), t, layer + "output.dense")
        x = layer_norm(x + fed, t, layer + "output.LayerNorm", eps)
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def main():
    directory = pathlib.Path(sys.argv[1])
    config = json.loads((directory / "config.json").read_text())
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = read_safetensors(directory / "model.safetensors")
    out = []
    for text in json.load(sys.stdin):
        ids = [vocab["[CLS]"]] + [i for word in words(text) for i in pieces(word, vocab)] + [vocab["[SEP]"]]
        out.append({"ids": ids, "embedding": embed(ids, tensors, config).tolist()})
    json.dump(out, sys.stdout)


main()
