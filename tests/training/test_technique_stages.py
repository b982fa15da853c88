"""Stages with the options of today's techniques: in-batch terms, clusters, rounding, distillation of a reranker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from small_stage import SMALL, changed
from tiny_checkpoints import llava_next, tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from train_scripts.reranker_distillation import DistillationArguments, run_distillation
from unime_st import stages
from unime_st.data.items import Item
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging.score_store import Scores
from unime_st.options import OptionError
from unime_st.training.rows import judged_rows


@pytest.mark.slow
def test_in_batch_with_todays_options(run: Path, tmp_path: Path) -> None:
    """Directions and hardness weights are Sentence Transformers' own, mask and learned temperature are ours."""
    common = {**SMALL, "data": str(run / "rows"), "logging_steps": 1, "num_negatives": 2}
    directions = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
    losses = {}
    for name, options in {
        "plain": {},
        "stock": {"directions": directions, "hardness_mode": "all_negatives", "hardness_strength": 5.0},
        "unmasked": {"false_negative_margin": 1.99},
        "rounded": {"matryoshka_dims": [128, 32], "quantization_aware": ["int8", "binary"]},
        "rounded_unmasked": {"false_negative_margin": 1.99, "matryoshka_dims": [8], "quantization_aware": ["binary"]},
        "masked": {"false_negative_margin": 0.0, "directions": directions, "learnable_temperature": True},
    }.items():
        folder = stages.train_in_batch(stages.InBatchArguments(**common, **options, output=str(tmp_path / name)))
        losses[name] = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert losses["plain"]["loss"] < losses["stock"]["loss"]
    assert losses["rounded_unmasked"]["masked_candidates"] == losses["unmasked"]["masked_candidates"]
    assert losses["masked"]["masked_candidates"] > losses["unmasked"]["masked_candidates"]


def test_soft_labels_with_a_masked_in_batch_term(run: Path, tmp_path: Path) -> None:
    common = {
        **SMALL,
        "data": str(run / "rows"),
        "logging_steps": 1,
        "num_negatives": 2,
        "output": str(tmp_path / "a"),
    }
    common |= {"in_batch_weight": 1.0, "false_negative_margin": 0.1, "hardness_strength": 9.0}
    folder = stages.train_soft_labels(stages.SoftLabelArguments(**common, cluster_pools=str(run / "pools")))
    assert "masked_candidates" in json.loads((folder / "log.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_a_reranker_is_distilled_and_merged_with_the_contrastive_model(run: Path, tmp_path: Path) -> None:
    options = DistillationArguments(
        records=str(run / "records"), pools=str(run / "pools"), output=str(tmp_path), eval_data=str(run / "records"),
        pair_order="both", num_negatives=2, max_steps=2, per_device_train_batch_size=8, learning_rate=1e-3,
    )  # fmt: skip
    merged = run_distillation(options)
    parts = json.loads((merged / "unime.json").read_text())["merged"]
    assert [Path(part["model"]).name for part in parts] == ["distilled", "contrastive"]
    assert sum(part["weight"] for part in parts) == 1 and changed(merged) > 1e-4
    scores = Scores(tmp_path / "scores")
    rows = judged_rows(RecordSet.load(tmp_path / "rows"), 2, log_odds=True)
    stored = {(pool.query.id, pool.positive.id): pool for pool in scores}
    for row in rows:
        pool = stored[row["query"], row["positive"]]
        odds = dict(zip([item.id for item in pool.candidates], pool.logits, strict=True))
        assert row["label"][0] == pytest.approx(pool.positive_logit)
        expected = [min(pool.positive_logit, odds[row[f"negative_{n}"]]) for n in (1, 2)]
        assert row["label"][1:] == pytest.approx(expected)
    assert run_distillation(options) == merged  # nothing is done again


@pytest.mark.slow
def test_options_of_the_toolbox_that_are_refused(run: Path, tmp_path: Path) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "none")}
    for options, message in (
        ({"directions": ["doc_to_doc"]}, "must contain 'query_to_doc'"),
        ({"directions": ["query_to_doc", "doc_to_doc"], "partition_mode": "per_direction"}, "use 'joint'"),
        ({"directions": ["query_to_document"]}, "did you mean query_to_doc?"),
        ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "set num_negatives"),
        ({"false_negative_margin": -2}, "false_negative_margin: expected a number above -2"),
        ({"cluster_pools": str(run / "pools"), "sub_batch_size": 4}, "leave out sub_batch_size"),
    ):
        with pytest.raises(OptionError, match=message):
            stages.InBatchArguments(**common, **options)
    with pytest.raises(OptionError, match="set in_batch_weight"):
        stages.SoftLabelArguments(**{**common, "data": str(run / "rows")}, false_negative_margin=0.1)
    with pytest.raises(ValueError, match="masks every candidate of this batch"):
        stages.train_in_batch(stages.InBatchArguments(**common, false_negative_margin=-1.9))
    assert not list((tmp_path / "none").glob("checkpoints/checkpoint-*"))
    with pytest.raises(OptionError, match="cluster_pools is for losses that compare the rows"):
        stages.train_soft_labels(
            stages.SoftLabelArguments(
                **{**common, "data": str(run / "rows"), "output": str(tmp_path / "soft"), "num_negatives": 2},
                cluster_pools=str(run / "pools"),
            )
        )
    RecordSet.write(tmp_path / "others", training_records(12, seed=9), {})
    stages.run_mine(stages.MineArguments(data=str(tmp_path / "others"), output=str(tmp_path / "pools")))
    for data, pools in ((run / "records", tmp_path / "pools"), (tmp_path / "others", run / "pools")):
        options = {**common, "data": str(data), "output": str(tmp_path / pools.parent.name / "o"), "overwrite": True}
        with pytest.raises(ValueError, match=r"is not in the records .*: mine these records"):
            stages.train_in_batch(stages.InBatchArguments(**options, cluster_pools=str(pools)))


def test_a_teacher_without_the_modality_of_the_pairs_is_refused(run: Path, tmp_path: Path) -> None:
    """Before anything is judged: a reranker of texts, and a family without videos."""
    bare = tmp_path / "bare"
    tok = tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(tok), num_key_value_heads=2, **size)
    Qwen2ForCausalLM(config).save_pretrained(bare)
    tok.save_pretrained(bare)
    transformer = Transformer(str(bare), transformer_task="text-generation")
    ids = transformer.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    texts = CrossEncoder(modules=[transformer, LogitScore(*ids)], num_labels=1, device="cpu")
    texts.save_pretrained(str(tmp_path / "texts"))
    clips = [[Image.new("RGB", (40, 40), (20 * row, 9 * frame, 0)) for frame in range(2)] for row in range(6)]
    RecordSet.write(
        tmp_path / "clips", [PairRecord(Item(f"clip {n}"), Item(video=c)) for n, c in enumerate(clips)], {}
    )
    mined = {"data": str(tmp_path / "clips"), "output": str(tmp_path / "pools"), "max_similarity": "none"}
    stages.run_mine(stages.MineArguments(**mined, num_candidates=2))
    llava_next(tmp_path / "llava")
    for model, pools, message in (
        ("texts", run / "pools", "has images, and the judge texts takes texts only"),
        ("llava", tmp_path / "pools", r"\(LlavaNext\) takes no video"),
    ):
        options = {"model": str(tmp_path / model), "template": "official", "data": str(pools)}
        paths = {"scores": str(tmp_path / "scores"), "output": str(tmp_path / "rows")}
        with pytest.raises(ValueError, match=message):
            stages.run_judge(stages.JudgeArguments(**options, **paths))
        assert not (tmp_path / "scores").exists()
