"""Benchmark workloads: random models and synthetic inputs, without downloads."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

from unime_st import UniMEReranker

SIZES = {
    "small": {"hidden": 128, "layers": 2, "vision": 64, "depth": 2},
    "mid": {"hidden": 384, "layers": 8, "vision": 256, "depth": 6},
    "2b": {"hidden": 1536, "layers": 28, "vision": 1280, "depth": 32, "heads": 12, "inner": 8960, "vocab": 151936},
    "7b": {
        **{"hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "inner": 18944, "vocab": 152064},
        **{"vision": 1280, "depth": 32, "vision_inner": 3420},
    },
}


def random_qwen2_vl(folder: Path, size: str = "mid", *, pixels: int = 336 * 336, device: str = "cpu") -> Path:
    """Write a random Qwen2-VL embedding model with the processor and chat template of ``unime-tiny``.

    Args:
        folder: Output folder.
        size: Key of :data:`SIZES`. Defaults to "mid".
        pixels: Maximum number of pixels of a processed image or frame. Defaults to 336 x 336.
        device: Device on which weights are drawn; bfloat16 on CUDA. Defaults to "cpu".
    """
    tiny: Any = SentenceTransformer("unime-tiny", device="cpu")
    processor, config = tiny.processor, tiny.config
    processor.tokenizer.model_max_length = 32768  # that of unime-tiny is 1024
    for media in (processor.image_processor, processor.video_processor):
        media.size = {"shortest_edge": 56 * 56, "longest_edge": pixels}
    row = SIZES[size]
    heads = row.get("heads", row["hidden"] // 64)
    part = row["hidden"] // heads // 8
    text = {
        "vocab_size": row.get("vocab", config.text_config.vocab_size),
        "hidden_size": row["hidden"],
        "intermediate_size": row.get("inner", row["hidden"] * 8 // 3),
        "num_hidden_layers": row["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": row.get("kv", 2),
        "rope_parameters": {"rope_type": "default", "mrope_section": [part, part, 2 * part], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {name: getattr(config.vision_config, name) for name in ("patch_size", "spatial_merge_size")}
    vision |= {name: getattr(config.vision_config, name) for name in ("temporal_patch_size", "in_channels")}
    vision |= {"depth": row["depth"], "embed_dim": row["vision"], "hidden_size": row["hidden"]}
    vision |= {"num_heads": row["vision"] // 64 if row["vision"] % 80 else row["vision"] // 80, "mlp_ratio": 4}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    torch.manual_seed(0)
    ids = {name: getattr(config, name) for name in names}
    with torch.device(device):
        made: Any = AutoModel.from_config(
            Qwen2VLConfig(text_config=text, vision_config=vision, **ids), dtype=_precision(device)
        )
    made.save_pretrained(folder / "backbone")
    processor.save_pretrained(folder / "backbone")
    transformer = Transformer(str(folder / "backbone"), unpad_inputs=False)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save_pretrained(str(folder / "st"))
    return folder / "st"


def random_qwen2_5_vl(folder: Path, size: str, device: str) -> Path:
    """Write a random generative Qwen2.5-VL with the processor of ``unime-tiny``.

    Args:
        folder: Output folder.
        size: Key of :data:`SIZES`.
        device: Device on which weights are drawn; bfloat16 on CUDA.
    """
    tiny: Any = UniMEReranker("unime-tiny", template="tiny", device="cpu")[0]
    processor, vision_config = tiny.processor, tiny.model.config.vision_config
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 400 * 400}
    tokenizer, row = processor.tokenizer, SIZES[size]
    tokenizer.model_max_length = 32768  # that of unime-tiny is 1024
    heads = row.get("heads", row["hidden"] // 64)
    inner, part = row.get("inner", row["hidden"] * 8 // 3), row["hidden"] // heads // 8
    text: dict[str, Any] = {
        "vocab_size": row.get("vocab", len(tokenizer)),
        "hidden_size": row["hidden"],
        "intermediate_size": inner,
    }
    text |= {"num_hidden_layers": row["layers"], "num_attention_heads": heads}
    text |= {"num_key_value_heads": row.get("kv", 2)}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [part, part, 2 * part], "rope_theta": 1e6}}
    text |= {"bos_token_id": None, "eos_token_id": None}
    vision: dict[str, Any] = {"depth": row["depth"], "hidden_size": row["vision"], "out_hidden_size": row["hidden"]}
    vision |= {"num_heads": row["vision"] // (64 if row["vision"] % 80 else 80)}
    shape = ("patch_size", "spatial_merge_size", "temporal_patch_size", "in_channels")
    vision |= {name: getattr(vision_config, name) for name in shape}
    vision |= {
        "intermediate_size": row.get("vision_inner", row["vision"] * 8 // 3),
        "window_size": 4 * vision_config.patch_size * vision_config.spatial_merge_size,
    }
    vision |= {"fullatt_block_indexes": list(range(row["depth"] // 4 - 1, row["depth"], max(1, row["depth"] // 4)))}
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens: dict[str, Any] = dict(zip(keys, ids, strict=True))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=_precision(device))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def random_qwen3_vl(folder: Path, size: str = "mid", device: str = "cpu") -> Path:
    """Write a random generative Qwen3-VL (DeepStack, interleaved rotary positions) with the tokenizer of ``unime-tiny``.

    Args:
        folder: Output folder.
        size: Key of :data:`SIZES`. Defaults to "mid".
        device: Device on which weights are drawn; bfloat16 on CUDA. Defaults to "cpu".
    """
    tiny: Any = UniMEReranker("unime-tiny", template="tiny", device="cpu")[0].processor
    media = (tiny.image_processor, tiny.video_processor)
    for part in media:
        part.patch_size, part.size = 16, {"shortest_edge": 64 * 64, "longest_edge": 400 * 400}
    processor = Qwen3VLProcessor(media[0], tiny.tokenizer, media[1], chat_template=tiny.chat_template)
    row, tokenizer = SIZES[size], tiny.tokenizer
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": row["hidden"],
        "intermediate_size": row["hidden"] * 8 // 3,
        "num_hidden_layers": row["layers"],
        "num_attention_heads": row["hidden"] // 64,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 5e6},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    text["rope_parameters"]["mrope_interleaved"] = True
    vision: dict[str, Any] = {"depth": row["depth"], "hidden_size": row["vision"], "out_hidden_size": row["hidden"]}
    vision |= {"num_heads": row["vision"] // 64, "intermediate_size": row["vision"] * 4, "patch_size": 16}
    vision |= {"num_position_embeddings": 24 * 24, "deepstack_visual_indexes": list(range(1, row["depth"], 2))}
    vision |= {"temporal_patch_size": media[0].temporal_patch_size}
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens: dict[str, Any] = dict(zip(keys, map(tokenizer.convert_tokens_to_ids, names), strict=True))
    torch.manual_seed(0)
    with torch.device(device):
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=_precision(device))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _precision(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def images(folder: Path, count: int, *, shortest: int = 200, longest: int = 1600) -> list[str]:
    """Write JPEG files of smooth noise, with file sizes similar to photographs.

    Args:
        folder: Output folder.
        count: Number of files.
        shortest: Minimum side in pixels. Defaults to 200.
        longest: Maximum side in pixels. Defaults to 1600.
    """
    rng, paths = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)

    def write(path: str, grain: np.ndarray, size: tuple[int, int]) -> None:
        Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC).save(path, quality=85)

    with ThreadPoolExecutor() as pool:
        written = []
        for number in range(count):
            width, height = (int(side) for side in rng.integers(shortest, longest + 1, 2))
            grain = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            paths.append(str(folder / f"{number}.jpg"))
            written.append(pool.submit(write, paths[-1], grain, (width, height)))
        for future in written:
            future.result()
    return paths


def sentences(count: int, *, least: int = 5, most: int = 400) -> list[str]:
    """Generate texts of random words.

    Args:
        count: Number of texts.
        least: Minimum number of words. Defaults to 5.
        most: Maximum number of words. Defaults to 400.
    """
    words, rng = "a red blue circle square above the of left large small and".split(), random.Random(0)
    return [f"{number} " + " ".join(rng.choices(words, k=rng.randint(least, most))) for number in range(count)]


def mixed(folder: Path, count: int, *, repeats: float) -> list[Any]:
    """Generate a mixed workload in random order: a third images, a third texts, a third image with text.

    Args:
        folder: Output folder for the images.
        count: Number of inputs.
        repeats: Fraction of inputs that are duplicates.
    """
    rng = random.Random(1)
    fresh = max(3, round(count * (1 - repeats)))
    paths, texts = images(folder, fresh), sentences(fresh)
    rows: list[Any] = []
    for number in range(fresh):
        path = paths[number]
        rows.append(({"image": path}, {"text": texts[number]}, {"image": path, "text": texts[number]})[number % 3])
    rows += [rng.choice(rows) for _ in range(count - fresh)]
    rng.shuffle(rows)
    return rows
