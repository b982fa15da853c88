"""Phi-3.5-Vision's published forward pass, written a second time: plain tensors in float64, loops instead of reshapes.

Takes the tensors of a checkpoint under their published names. Shares no code with the library or with transformers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Tensors = dict[str, torch.Tensor]


def fit(image: Image.Image, num_crops: int, size: int) -> Image.Image:
    """The published HD transform."""
    width, height = image.size
    turned = False
    if width < height:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        turned, (width, height) = True, image.size
    ratio = width / height
    scale = 1
    while scale * np.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    new_width = int(scale * size)
    image = image.resize((new_width, int(new_width / ratio)), Image.Resampling.BILINEAR)
    target = int(np.ceil(image.height / size) * size)
    top = int((target - image.height) / 2)
    array = np.full((target, image.width, 3), 255, np.uint8)
    array[top : top + image.height] = np.asarray(image)
    image = Image.fromarray(array)
    return image.transpose(Image.Transpose.TRANSPOSE) if turned else image


def crops_of(image: Image.Image, num_crops: int, size: int) -> tuple[torch.Tensor, int, int]:
    """Global view first, then the crops row by row; also the number of rows and columns."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    fitted = torch.from_numpy(np.array(fit(image, num_crops, size))).permute(2, 0, 1).float().div(255)
    fitted = (fitted - mean) / std
    rows, columns = fitted.shape[1] // size, fitted.shape[2] // size
    views = [F.interpolate(fitted[None], size=(size, size), mode="bicubic")[0]]
    views += [
        fitted[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(views).double(), rows, columns


def clip_patches(tensors: Tensors, crops: torch.Tensor, heads: int, layers: int) -> torch.Tensor:
    """Hidden states of the tower's last layer but one, without the class token."""
    t = {k.split("img_processor.vision_model.")[1]: v.double() for k, v in tensors.items() if "img_processor" in k}
    kernel = t["embeddings.patch_embedding.weight"]
    x = F.conv2d(crops, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    start = t["embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([start, x], dim=1) + t["embeddings.position_embedding.weight"]
    width = x.shape[-1]
    x = F.layer_norm(x, (width,), t["pre_layrnorm.weight"], t["pre_layrnorm.bias"], 1e-5)
    for layer in range(layers - 1):
        p = f"encoder.layers.{layer}."
        y = F.layer_norm(x, (width,), t[p + "layer_norm1.weight"], t[p + "layer_norm1.bias"], 1e-5)
        q, k, v = (F.linear(y, t[p + f"self_attn.{n}_proj.weight"], t[p + f"self_attn.{n}_proj.bias"]) for n in "qkv")
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, t[p + "self_attn.out_proj.weight"], t[p + "self_attn.out_proj.bias"])
        y = F.layer_norm(x, (width,), t[p + "layer_norm2.weight"], t[p + "layer_norm2.bias"], 1e-5)
        y = F.linear(y, t[p + "mlp.fc1.weight"], t[p + "mlp.fc1.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, t[p + "mlp.fc2.weight"], t[p + "mlp.fc2.bias"])
    return x[:, 1:]


def image_tokens(tensors: Tensors, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Merge patches two by two, lay the crops out, put separators in, project."""
    t = {k.split("vision_embed_tokens.")[1]: v.double() for k, v in tensors.items() if "vision_embed_tokens." in k}
    side = math.isqrt(patches.shape[1])

    def merged(crop: torch.Tensor, row: int, column: int) -> torch.Tensor:
        block = [crop[(2 * row + i) * side + 2 * column + j] for i in (0, 1) for j in (0, 1)]
        return torch.cat(block)

    def sheet(crops: torch.Tensor, rows: int, columns: int) -> list[torch.Tensor]:
        tokens = []
        for row in range(rows * side // 2):
            for column in range(columns * side // 2):
                crop = crops[(row // (side // 2)) * columns + column // (side // 2)]
                tokens.append(merged(crop, row % (side // 2), column % (side // 2)))
            tokens.append(t["sub_GN"].flatten())
        return tokens

    tokens = [*sheet(patches[1:], rows, columns), t["glb_GN"].flatten(), *sheet(patches[:1], 1, 1)]
    x = F.linear(torch.stack(tokens), t["img_projection.0.weight"], t["img_projection.0.bias"])
    return F.linear(F.gelu(x), t["img_projection.2.weight"], t["img_projection.2.bias"])


def language(tensors: Tensors, x: torch.Tensor, config: dict) -> torch.Tensor:
    """Phi-3 with the "su" scaling of rotary positions; returns the states after the final norm."""
    t = {k.removeprefix("model."): v.double() for k, v in tensors.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    length, width = x.shape
    size = width // heads
    original = config["original_max_position_embeddings"]
    factors = config["rope_scaling"]["long_factor" if length > original else "short_factor"]
    base = torch.arange(0, size, 2, dtype=torch.float64) / size
    inverse = 1.0 / (torch.tensor(factors, dtype=torch.float64) * config["rope_theta"] ** base)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    stretch = config["max_position_embeddings"] / original
    scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    cos, sin = (f(torch.cat([angles, angles], -1)) * scale for f in (torch.cos, torch.sin))

    def rms(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + config.get("rms_norm_eps", 1e-5)) * weight

    def turn(y: torch.Tensor) -> torch.Tensor:
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    mask = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
    for layer in range(config["num_hidden_layers"]):
        p = f"layers.{layer}."
        y = rms(x, t[p + "input_layernorm.weight"])
        qkv = F.linear(y, t[p + "self_attn.qkv_proj.weight"])
        q, k, v = qkv.split([heads * size, groups * size, groups * size], -1)
        q, k, v = (z.unflatten(-1, (-1, size)).transpose(0, 1) for z in (q, k, v))
        k, v = (z.repeat_interleave(heads // groups, 0) for z in (turn(k), v))
        weights = (turn(q) @ k.transpose(-1, -2) / math.sqrt(size) + mask).softmax(-1)
        x = x + F.linear((weights @ v).transpose(0, 1).flatten(1), t[p + "self_attn.o_proj.weight"])
        y = rms(x, t[p + "post_attention_layernorm.weight"])
        gate, up = F.linear(y, t[p + "mlp.gate_up_proj.weight"]).chunk(2, -1)
        x = x + F.linear(up * F.silu(gate), t[p + "mlp.down_proj.weight"])
    return rms(x, t["norm.weight"])


def embed(tensors: Tensors, config: dict, ids: list[int], images: list[Image.Image], num_crops: int) -> np.ndarray:
    """Unit vector of one row; negative ids stand for image tokens."""
    vision = config["vision_config"]
    row = torch.tensor(ids)
    x = F.embedding(row.clamp_min(0), tensors["model.embed_tokens.weight"].double())
    tokens = []
    for image in images:
        crops, rows, columns = crops_of(image, num_crops, vision["image_size"])
        patches = clip_patches(tensors, crops, vision["num_attention_heads"], vision["num_hidden_layers"])
        tokens.append(image_tokens(tensors, patches, rows, columns))
    if tokens:
        x[row < 0] = torch.cat(tokens)
    last = language(tensors, x, config)[-1]
    return (last / last.norm()).numpy()
