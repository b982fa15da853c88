"""Evaluate a model of your own on MMEB: any multimodal SentenceTransformer, on some subsets or on all 36.

    MMEB_EVAL_DIR=/data/MMEB-eval python examples/evaluate_mmeb.py --model my-model --subsets OK-VQA MSCOCO_t2i

Without MMEB_EVAL_DIR the subsets are fetched from TIGER-Lab/MMEB-eval.
"""

from __future__ import annotations

import argparse

from sentence_transformers import SentenceTransformer

from mteb_tasks import evaluate, published
from mteb_tasks.mmeb.subsets import SUBSETS


def main(model_name: str, subsets: list[str]) -> None:
    """Print hit@1 in percent, beside what the paper of UniME reports for the subset."""
    model = SentenceTransformer(model_name)
    scores = evaluate(model, [f"MMEB-{name}" for name in subsets], batch_size=32)
    for name in subsets:
        (values,) = scores[f"MMEB-{name}"].values()  # one mteb subset for each task
        reference = published.MMEB_TASKS["unime-v1-llava1.6"].get(name)
        print(f"{name:<20}{100 * values['hit_rate_at_1']:6.1f}   UniME (LLaVA-1.6): {reference}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unime-tiny", help="alias, folder or hub name (default: unime-tiny)")
    names = [subset.name for subset in SUBSETS]
    parser.add_argument("--subsets", nargs="+", default=names, choices=names, metavar="NAME", help="(default: all 36)")
    options = parser.parse_args()
    main(options.model, options.subsets)
