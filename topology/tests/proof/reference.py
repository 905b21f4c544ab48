"""Computes the toys with transformers and diffusers, and compares.

The proof compares sharded with unsharded models; that its unsharded ones are the models of these names is
shown by

    PROOF_TOYS=/tmp/toys cargo test -p tensorwire-topology --test proof -- --ignored
    python topology/tests/proof/reference.py /tmp/toys

of which the first writes each toy's config.json, its weights and what the proof's executor makes of them.
"""

import glob
import json
import os
import sys

import diffusers
import torch
import transformers

torch.set_default_dtype(torch.float64)
# The toys have one GELU, that of the tanh formula.
gelu = torch.nn.functional.gelu
torch.nn.functional.gelu = lambda x, approximate="tanh": gelu(x, approximate="tanh")

TOKENS = torch.tensor([[3, 141, 59, 26, 189, 0, 97]])
WRITTEN = torch.tensor([[0, 59, 3, 141, 88]])
GRID = [2, 2, 3]
TEXT = 5
TIME = 0.3
MASK = (1 << 64) - 1


def uniform(name, *shape):
    """The numbers of weights.rs."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & MASK
    count = 1
    for size in shape:
        count *= size
    numbers = []
    for i in range(count):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(((z ^ (z >> 31)) >> 11) / (1 << 52) - 1)
    return torch.tensor(numbers).reshape(*shape)


def transformer(config, path):
    model = getattr(transformers, config["architectures"][0])
    quantised = {"ignore_mismatched_sizes": False}
    model, info = model.from_pretrained(path, output_loading_info=True, dtype=torch.float64, **quantised)
    wrong = {k: list(v) for k, v in info.items() if v}
    kind = config["model_type"]
    if kind in ["t5", "umt5"]:
        out = model(input_ids=TOKENS, decoder_input_ids=WRITTEN).logits
    elif kind in ["vit", "siglip_vision_model"]:
        side, patch = config["image_size"] // config["patch_size"], config["patch_size"]
        channels = config["num_channels"]
        pixels = uniform("pixels", side, side, channels, patch, patch).permute(2, 0, 3, 1, 4)
        out = model(pixels.reshape(1, channels, side * patch, side * patch))
        out = out.last_hidden_state if kind == "vit" else out.pooler_output
    elif kind == "bert":
        out = model(TOKENS, token_type_ids=torch.tensor([[0, 0, 0, 0, 1, 1, 1]])).last_hidden_state
    else:
        out = model(TOKENS).logits
    return out, wrong


def picture(config, patch):
    """Latents, of which the proof has a row a patch."""
    channels, (pt, ph, pw) = config["in_channels"], patch
    frames, rows, cols = GRID
    x = uniform("latents", frames, rows, cols, channels, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    return x.reshape(1, channels, frames * pt, rows * ph, cols * pw)


def patches(x, patch):
    """A row a patch again, channels last, as the output matrix makes them."""
    (pt, ph, pw), (frames, rows, cols) = patch, GRID
    x = x.reshape(-1, frames, pt, rows, ph, cols, pw)
    return x, frames * rows * cols


def diffusion(config, path):
    kind = config["_class_name"]
    model, info = getattr(diffusers, kind).from_pretrained(path, output_loading_info=True, torch_dtype=torch.float64)
    wrong = {k: list(v) for k, v in info.items() if v}
    made = []
    model.proj_out.register_forward_hook(lambda module, args, out: made.append(out))
    # Casts to float32 for bfloat16's sake would cost the comparison its digits.
    model = model.double()
    if kind.startswith("Cosmos"):
        text = uniform("text", 1, TEXT, config["text_embed_dim"])
        patch = config["patch_size"]
        mask = torch.zeros(1, 1, GRID[1] * patch[1], GRID[2] * patch[2])
        model(picture(config, patch), torch.tensor([TIME]), text, padding_mask=mask)
    elif kind.startswith("Wan"):
        text = uniform("text", 1, TEXT, config["text_dim"])
        model(picture(config, config["patch_size"]), torch.tensor([TIME]), text)
    else:
        frames, rows, cols = GRID
        tokens = frames * rows * cols
        where = [[i // (rows * cols), i // cols % rows, i % cols] for i in range(tokens)]
        model(
            uniform("latents", 1, tokens, config["in_channels"]),
            uniform("text", 1, TEXT, config["joint_attention_dim"]),
            uniform("pooled", 1, config["pooled_projection_dim"]),
            torch.tensor([TIME]),
            img_ids=torch.tensor(where, dtype=torch.float64),
            txt_ids=torch.zeros(TEXT, 3),
            guidance=torch.tensor([3.5]),
        )
    return made[0], wrong


def main(root):
    worst = 0.0
    for path in sorted(glob.glob(os.path.join(root, "*", "output.json"))):
        path = os.path.dirname(path)
        with open(os.path.join(path, "config.json")) as f:
            config = json.load(f)
        with torch.no_grad():
            out, wrong = (diffusion if "_class_name" in config else transformer)(config, path)
        with open(os.path.join(path, "output.json")) as f:
            ours = torch.tensor(json.load(f))
        out = out.double().flatten()
        apart = float("inf")
        if len(out) == len(ours):
            apart = float((out - ours).abs().max() / out.abs().max())
        worst = max(worst, apart)
        print(f"{os.path.basename(path):24} {len(ours):6} numbers, apart by {apart:.1e} {wrong or ''}")
    sys.exit(worst > 1e-5)


main(sys.argv[1])
