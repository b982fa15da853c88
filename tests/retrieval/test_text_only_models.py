"""A model without images cannot mine records with images: refused before anything is encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_checkpoints import qwen_tokenizer

from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.retrieval import mine


def test_images_need_a_model_that_takes_them(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model = SentenceTransformer(modules=[Transformer(str(tmp_path / "bert")), Pooling(32)], device="cpu")
    records = RecordSet.write(tmp_path / "records", training_records(12), {})
    with pytest.raises(ValueError, match=r"the model takes text only, but items of .*records have images: choose"):
        mine(records, model, tmp_path / "pools")
    assert not (tmp_path / "pools").exists()
