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
import types

import diffusers
import diffusers.models.transformers.transformer_cosmos
import safetensors.torch
import torch
import transformers
from transformers.integrations import mxfp4

torch.set_default_dtype(torch.float64)
# The toys have one GELU, that of the tanh formula.
gelu = torch.nn.functional.gelu
torch.nn.functional.gelu = lambda x, approximate="tanh": gelu(x, approximate="tanh")

# Cosmos resizes its mask with torchvision; the toy's has the right size.
resize = types.SimpleNamespace(
    functional=types.SimpleNamespace(resize=lambda mask, size, interpolation: mask),
    InterpolationMode=types.SimpleNamespace(NEAREST=None),
)
diffusers.models.transformers.transformer_cosmos.transforms = resize

TOKENS = torch.tensor([[3, 141, 59, 26, 189, 0, 97, 150, 33, 72, 111, 165]])
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


def nibbles(words, axis, places=range(8)):
    """The numbers of 4 bits of 32-bit words, along an axis."""
    parts = torch.stack([(words.long() >> (4 * place)) & 15 for place in places], dim=axis + 1)
    return parts.flatten(axis, axis + 1)


def dequantised(config, path):
    """A directory with the same weights, not quantised."""
    quantisation = config.pop("quantization_config", None)
    if quantisation is None:
        return path
    tensors = safetensors.torch.load_file(os.path.join(path, "model.safetensors"))
    plain = {}
    for name, t in tensors.items():
        module, _, kind = name.rpartition(".")
        group = quantisation.get("group_size")
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            plain[name[: -len("_blocks")]] = mxfp4.convert_moe_packed_tensors(t, scales, dtype=torch.float32).double()
        elif f"{module}.weight_scale_inv" in tensors and kind == "weight":
            rows, cols = quantisation["weight_block_size"]
            scales = tensors[f"{module}.weight_scale_inv"].repeat_interleave(rows, 0).repeat_interleave(cols, 1)
            plain[name] = t.to(torch.float32).double() * scales[: t.shape[0], : t.shape[1]]
        elif kind == "qweight" and quantisation["quant_method"] == "gptq":
            groups = tensors[f"{module}.g_idx"].long()
            zeros = nibbles(tensors[f"{module}.qzeros"], 1) + 1
            scales = tensors[f"{module}.scales"]
            plain[f"{module}.weight"] = ((nibbles(t, 0) - zeros[groups]) * scales[groups]).T.contiguous()
        elif kind == "qweight":
            # AutoAWQ packs output order[i] of eight at place i.
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            places = [order.index(i) for i in range(8)]
            zeros, scales = nibbles(tensors[f"{module}.qzeros"], 1, places), tensors[f"{module}.scales"]
            zeros, scales = zeros.repeat_interleave(group, 0), scales.repeat_interleave(group, 0)
            plain[f"{module}.weight"] = ((nibbles(t, 1, places) - zeros) * scales).T.contiguous()
        elif not any(name.endswith(end) for end in ["_scales", ".scales", ".qzeros", ".g_idx", "_scale_inv"]):
            plain[name] = t
    path = os.path.join(path, "dequantised")
    os.makedirs(path, exist_ok=True)
    safetensors.torch.save_file(plain, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f)
    return path


def transformer(config, path):
    model = getattr(transformers, config["architectures"][0])
    path = dequantised(config, path)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, info = model.from_pretrained(path, output_loading_info=True, dtype=torch.float64, **eager)
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
        out = model(TOKENS, token_type_ids=torch.tensor([[0] * 7 + [1] * 5])).last_hidden_state
    else:
        out = model(TOKENS).logits
    return out, wrong


def given(name, *shape):
    """Diffusers casts to f32 in so many places that all may be f32."""
    return uniform(name, *shape).float()


def picture(config, patch):
    """Latents, of which the proof has a row a patch."""
    channels, (pt, ph, pw) = config["in_channels"], patch
    frames, rows, cols = GRID
    x = given("latents", frames, rows, cols, channels, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    return x.reshape(1, channels, frames * pt, rows * ph, cols * pw)


def diffusion(config, path):
    kind = config["_class_name"]
    model = getattr(diffusers, kind).from_config(config).float()
    result = model.load_state_dict(safetensors.torch.load_file(os.path.join(path, "model.safetensors")), strict=False)
    wrong = {k: v for k, v in result._asdict().items() if v}
    made = []
    model.proj_out.register_forward_hook(lambda module, args, out: made.append(out))
    if kind.startswith("Cosmos"):
        text = given("text", 1, TEXT, config["text_embed_dim"])
        patch = config["patch_size"]
        mask = torch.zeros(1, 1, GRID[1] * patch[1], GRID[2] * patch[2]).float()
        model(picture(config, patch), torch.tensor([TIME]).float(), text, padding_mask=mask)
    elif kind.startswith("Wan"):
        text = given("text", 1, TEXT, config["text_dim"])
        model(picture(config, config["patch_size"]), torch.tensor([TIME]).float(), text)
    else:
        frames, rows, cols = GRID
        tokens = frames * rows * cols
        where = [[i // (rows * cols), i // cols % rows, i % cols] for i in range(tokens)]
        model(
            given("latents", 1, tokens, config["in_channels"]),
            given("text", 1, TEXT, config["joint_attention_dim"]),
            given("pooled", 1, config["pooled_projection_dim"]),
            torch.tensor([TIME]).float(),
            img_ids=torch.tensor(where, dtype=torch.float32),
            txt_ids=torch.zeros(TEXT, 3).float(),
            guidance=torch.tensor([3.5]).float(),
        )
    return made[0], wrong


def main(root):
    worst = 0.0
    for path in sorted(glob.glob(os.path.join(root, "*", "output.json"))):
        path = os.path.dirname(path)
        with open(os.path.join(path, "config.json")) as f:
            config = json.load(f)
        try:
            with torch.no_grad():
                out, wrong = (diffusion if "_class_name" in config else transformer)(config, path)
        except Exception as error:
            print(f"{os.path.basename(path):24} can't be compared: {error}"[:300])
            continue
        with open(os.path.join(path, "output.json")) as f:
            ours = torch.tensor(json.load(f))
        out = out.double().flatten()
        apart = float("inf")
        if len(out) == len(ours):
            apart = float((out - ours).abs().max() / out.abs().max())
        worst = max(worst, apart)
        print(f"{os.path.basename(path):24} {len(ours):6} numbers, apart by {apart:.1e} {wrong or ''}")
    sys.exit(worst > 1e-4)


main(sys.argv[1])
