"""Moving scenes: a tiny random Qwen2-VL learns in which direction a drawn object moves, which frames tell by their order.

It is trained with soft labels on clips and the captions of four directions, and evaluated on held-out clips as they are,
shuffled and reversed: without the order only the axis can be told.

example: python -m train_scripts.moving_scenes --output runs/motion
"""

from __future__ import annotations

import copy
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import Qwen2VLModel

from unime_st import Item, UniME, stages
from unime_st.data import RecordSet, VideoRef
from unime_st.data.scenes.motion import DIRECTIONS, motion_records, shuffled
from unime_st.options import check_options, option, require_options
from unime_st.stages.command import run_script

_SIDE = 28  # in pixels: one visual token for two frames
_LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.3,
    "temporal_patch_size": 2,
}  # fmt: skip


@dataclass
class MotionArguments:
    """Options of :func:`run_motion`."""

    output: str = option("", "Folder for the records, the model and scores.json.", required=True)
    clips: int = option(400, "Clips to train on.", unit="clips", at_least=1)
    held_out: int = option(200, "Clips to evaluate on.", unit="clips", at_least=1)
    max_steps: int = option(200, "Optimizer steps.", unit="steps", at_least=1)
    per_device_train_batch_size: int = option(24, "Batch size.", unit="rows", at_least=1)
    learning_rate: float = option(3e-3, "Peak learning rate.", above=0)
    seed: int = option(0, "Seed of the clips and the weights.", at_least=0)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)


def write_model(folder: Path, seed: int) -> Path:
    """Write a random Qwen2-VL embedder of two layers, with the tokenizer and the template of ``unime-tiny``.

    Args:
        folder: Where to write.
        seed: Seed of the weights.
    """
    tiny: Any = SentenceTransformer("unime-tiny", device="cpu")
    processor, config = tiny.processor, copy.deepcopy(tiny.config)
    for media in (processor.image_processor, processor.video_processor):
        media.size = {"shortest_edge": _SIDE**2, "longest_edge": _SIDE**2}
        media.temporal_patch_size = 2  # as in the released models: two frames enter the vision tower together
    for part, sizes in ((config.text_config, _LANGUAGE), (config.vision_config, _VISION)):
        for name, value in sizes.items():
            setattr(part, name, value)
    torch.manual_seed(seed)
    Qwen2VLModel(config).save_pretrained(folder / "backbone")
    processor.save_pretrained(folder / "backbone")
    transformer = Transformer(str(folder / "backbone"), unpad_inputs=False)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save_pretrained(
        str(folder / "start")
    )
    return folder / "start"


def evaluate(model: UniME, clips: int, seed: int) -> dict[str, float]:
    """Share of held-out clips that are nearest to their own caption: as they are, shuffled, and reversed.

    Args:
        model: The model.
        clips: Number of clips.
        seed: Seed of the clips and of the shuffling.
    """
    rng = random.Random(seed)
    pairs = list(motion_records(clips, seed=seed))
    captions = [Item(f"it moves {name}") for name in DIRECTIONS]
    right = np.array([captions.index(pair.positive) for pair in pairs])
    versions = {
        "ordered": [pair.query for pair in pairs],
        "shuffled": [shuffled(pair.query, rng) for pair in pairs],
        "reversed": [Item(video=VideoRef.of_frames(p.query.video.frames[::-1])) for p in pairs if p.query.video],
    }
    vectors = model.encode(captions)
    return {
        name: float(((model.encode(queries) @ vectors.T).argmax(1) == right).mean())
        for name, queries in versions.items()
    }


def run_motion(args: MotionArguments) -> dict[str, float]:
    """Draw the clips, train the model and evaluate it.

    Args:
        args: Options.

    Returns:
        dict: See :func:`evaluate`; also in ``scores.json``.
    """
    require_options(args)
    output = Path(args.output)
    RecordSet.write(output / "records", motion_records(args.clips, seed=args.seed), {"source": "moving scenes"})
    chosen = {name: getattr(args, name) for name in ("max_steps", "per_device_train_batch_size", "learning_rate")}
    training = stages.SoftLabelArguments(
        data=str(output / "records"), output=str(output / "model"), model=str(write_model(output, args.seed)),
        num_negatives=len(DIRECTIONS) - 1, labels="log_odds", divergence="kl", temperature=0.05, lora_rank=0,
        save_steps=args.max_steps, **chosen,
    )  # fmt: skip
    model = UniME(stages.train_soft_labels(training))
    scores = evaluate(model, args.held_out, args.seed + 1)
    (output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def _show_motion(args: MotionArguments) -> None:
    sys.stdout.write("".join(f"{name}: {share:.1%}\n" for name, share in run_motion(args).items()))


if __name__ == "__main__":
    raise SystemExit(run_script(_show_motion, MotionArguments, __doc__))
