"""Merging: averages in float32 of models and adapters, what is refused, the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st import UniMEReranker
from unime_st.cli import main
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.files import read_json, write_json
from unime_st.paths import PACKAGED
from unime_st.training.evaluation import RetrievalEvaluator
from unime_st.training.model_merge import greedy_soup, merge_models

TARGETS = r".*language_model.*(q_proj|v_proj)"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(folder), device="cpu").transformers_model.state_dict()


def varied(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of unime-tiny with noise in every weight."""
    shutil.copytree(PACKAGED, folder)
    torch.manual_seed(seed)
    (path,) = folder.glob("*.safetensors")
    noisy = {name: (t.float() + 0.1 * torch.randn(t.shape)).to(dtype) for name, t in load_file(path).items()}
    save_file(noisy, path, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    return folder


def average(parts: Mapping[Path, float]) -> dict[str, torch.Tensor]:
    """Average in float64."""
    loaded = [(tensors(folder), weight) for folder, weight in parts.items()]
    return {name: sum(weight * own[name].double() for own, weight in loaded) for name in loaded[0][0]}


def test_three_models(tmp_path: Path):
    parts = {
        varied(tmp_path / name, seed): weight for name, seed, weight in (("a", 1, 0.5), ("b", 2, 0.2), ("c", 3, 0.3))
    }
    merged = merge_models(list(parts), tmp_path / "merged", weights=list(parts.values()))
    expected, found = average(parts), tensors(merged)
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    record = read_json(merged / "unime.json")["merged"]
    assert [entry["weight"] for entry in record] == [0.5, 0.2, 0.3]
    assert len({entry["fingerprint"] for entry in record}) == 3
    vectors = [SentenceTransformer(str(folder), device="cpu").encode(["a star"]) for folder in (merged, *parts)]
    assert all(np.abs(vectors[0] - other).max() > 1e-3 for other in vectors[1:])


def test_equal_weights_in_float32_of_models_in_bfloat16(tmp_path: Path):
    parts = {varied(tmp_path / name, seed, torch.bfloat16): 1 / 3 for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    found = tensors(merge_models(list(parts), tmp_path / "merged"))
    for name, exact in average(parts).items():
        assert found[name].dtype == torch.bfloat16
        error = (found[name].double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 + 1e-7).all(), name  # one rounding


def with_adapter(folder: Path, base: Path, seed: int, rank: int) -> Path:
    model = SentenceTransformer(str(base), device="cpu")
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(str(folder))
    assert (folder / "adapter_config.json").is_file()
    return folder


def test_adapters_are_averaged_in_weight_space(tmp_path: Path):
    base = varied(tmp_path / "base", 0)
    shares = {with_adapter(tmp_path / "a", base, 1, 4): 0.75, with_adapter(tmp_path / "b", base, 2, 8): 0.25}
    found = tensors(merge_models(list(shares), tmp_path / "merged", weights=list(shares.values())))
    changed = 0
    for name, tensor in tensors(base).items():
        expected = tensor.double()
        for folder, share in shares.items():
            adapter = load_file(folder / "adapter_model.safetensors")
            own = {key.removeprefix("base_model.model."): value.double() for key, value in adapter.items()}
            stem = next((key[: -len(".lora_A.weight")] for key in own if key.endswith("lora_A.weight") and
                         name.removesuffix(".weight").endswith(key[: -len(".lora_A.weight")])), None)  # fmt: skip
            if stem is not None:
                changed += 1
                expected = expected + share * 2 * own[f"{stem}.lora_B.weight"] @ own[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
    assert changed > 4
    other = with_adapter(tmp_path / "c", varied(tmp_path / "other", 5), 3, 4)
    with pytest.raises(ValueError, match=r"adapters .*a and .*c have different bases"):
        merge_models([tmp_path / "a", other], tmp_path / "none")
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    merge_models([tmp_path / "a", with_adapter(tmp_path / "d", copy, 3, 4)], tmp_path / "same")


def test_rerankers(tmp_path: Path):
    UniMEReranker("unime-tiny", template="tiny", device="cpu").save_pretrained(str(tmp_path / "a"))
    merged = merge_models([tmp_path / "a", tmp_path / "a"], tmp_path / "merged")
    pairs = [("a star", "a ring")]
    assert CrossEncoder(str(merged), device="cpu").predict(pairs) == pytest.approx(
        CrossEncoder(str(tmp_path / "a"), device="cpu").predict(pairs), abs=1e-6
    )
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_models([tmp_path / "a", "unime-tiny"], tmp_path / "none")


def test_what_is_refused(tmp_path: Path, converted: Callable[[str], Path]):
    for models, weights, message in (
        (["unime-tiny"], None, "at least 2 models"),
        (["unime-tiny"] * 2, [0.5, 0.6], r"must sum to 1, got 0.5 \+ 0.6 = 1.1"),
        (["unime-tiny"] * 2, [float("nan"), 1.0], "must sum to 1"),
        (["unime-tiny"] * 2, [1.0], "one weight for each of the 2 models, got 1"),
        (["unime-tiny", "unime-none"], None, "Unknown model 'unime-none'"),
        (["unime-tiny", str(converted("unime-v2-2b"))], None, "cannot be merged: modules"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            merge_models(models, tmp_path / "none", weights=weights)
    template = varied(tmp_path / "template", 1)
    (template / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}")
    with pytest.raises(ValueError, match=r"chat_template.* in the first and .* in the second"):
        merge_models(["unime-tiny", template], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileExistsError):
        merge_models(["unime-tiny"] * 2, template)


@pytest.mark.slow
def test_models_of_different_bases_are_refused(tmp_path: Path):
    """Also where only the values of the weights tell."""
    other = varied(tmp_path / "other", 1)
    (path,) = other.glob("*.safetensors")
    random = {name: torch.randn(t.shape) * t.std() if t.dim() > 1 else t for name, t in load_file(path).items()}
    save_file(random, path, metadata={"format": "pt"})
    for models in (["unime-tiny", other], [other, "unime-tiny"], ["unime-tiny", "unime-tiny", other]):
        with pytest.raises(ValueError, match=r"have different bases: their weights are unrelated \(cosine"):
            merge_models(models, tmp_path / "none")
    records = RecordSet.write(tmp_path / "records", training_records(20, seed=1), {})
    with pytest.raises(ValueError, match="have different bases"):
        greedy_soup(["unime-tiny", other], tmp_path / "none", records)
    assert not (tmp_path / "none").exists()


def mrr(folder: Path | str, records: RecordSet) -> float:
    return RetrievalEvaluator(records)(SentenceTransformer(str(folder), device="cpu"))["mrr@10"]


@pytest.mark.slow
def test_greedy_soup(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    records = RecordSet.write(tmp_path / "records", training_records(60, seed=1), {})
    tiny = PACKAGED
    spoiled = varied(tmp_path / "spoiled", 3)
    twin = tmp_path / "twin"
    shutil.copytree(tiny, twin)
    models = [spoiled, tiny, twin]
    single = [mrr(folder, records) for folder in models]
    assert single[1] == single[2] > single[0]
    words = ["merge", *map(str, models), "--greedy", "--eval_data", str(records.folder), "--output"]
    assert main([*words, str(tmp_path / "soup")]) == 0
    record = read_json(tmp_path / "soup" / "unime.json")
    assert [entry["mrr@10"] for entry in record["merged"]] == pytest.approx(single)
    shares = [entry["weight"] for entry in record["merged"]]
    worse = merge_models(models, tmp_path / "all")
    expected = [1 / 3] * 3 if mrr(worse, records) >= single[1] else [0, 0.5, 0.5]
    assert shares == pytest.approx(expected) and sum(shares) == pytest.approx(1)
    assert record["greedy"]["mrr@10"] == pytest.approx(mrr(tmp_path / "soup", records), abs=1e-6)
    assert record["greedy"]["mrr@10"] >= max(single)
    expected_weights = average(dict(zip(models, shares)))
    for name, tensor in tensors(tmp_path / "soup").items():
        torch.testing.assert_close(tensor.double(), expected_weights[name], rtol=0, atol=1e-6)
    capsys.readouterr()
    for more, message in (
        (["--greedy"], "--greedy and --eval-data RECORDS go together"),
        (["--eval-data", str(records.folder)], "--greedy and --eval-data RECORDS go together"),
        (["--greedy", "--eval-data", str(records.folder), "--weights", "0.5", "0.5"], "--weights do not apply"),
        (["--greedy", "--eval-data", str(tmp_path / "absent")], "absent"),
    ):
        assert main(["merge", "unime-tiny", "unime-tiny", *more, "--output", str(tmp_path / "none")]) in (1, 2)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_greedy_soup_of_rerankers(tmp_path: Path):
    records = RecordSet.write(tmp_path / "records", training_records(16, seed=1), {})
    UniMEReranker("unime-tiny", template="tiny", device="cpu").save_pretrained(str(tmp_path / "a"))
    record = read_json(greedy_soup([tmp_path / "a"] * 2, tmp_path / "soup", records) / "unime.json")
    assert [entry["weight"] for entry in record["merged"]] == [0.5, 0.5] and 0 < record["greedy"]["mrr@10"] <= 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = str(tmp_path / "merged")
    assert main(["merge", "unime-tiny", "unime-tiny", "--weights", "0.5", "0.5", "--output", output]) == 0
    assert f'Load it: SentenceTransformer("{output}")' in capsys.readouterr().out
    assert main(["merge", "unime-tiny", "unime-tiny", "--output", output]) == 1
    capsys.readouterr()
    assert main(["merge", output, "--output", str(tmp_path / "alone")]) in (1, 2)
    assert "at least 2 models to merge, got 1" in capsys.readouterr().err
    assert main(["merge", "unime-tiny", "unime-tiny", "--weights", "1", "1", "--output", output, "--overwrite"]) == 2
    assert "unime merge: the weights must sum to 1, got 1.0 + 1.0 = 2" in capsys.readouterr().err


def test_the_stage_is_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "merge.yaml"
    config.write_text(f"models: [unime-tiny, unime-tiny]\nweights: [0.5, 0.5]\noutput: {tmp_path / 'merged'}\n")
    assert main(["merge", str(config)]) == 0
    assert [part["weight"] for part in read_json(tmp_path / "merged" / "unime.json")["merged"]] == [0.5, 0.5]
    assert main(["merge", str(config), "--weights", "1", "1", "--overwrite"]) == 2
    assert "unime merge: the weights must sum to 1, got 1.0 + 1.0 = 2" in capsys.readouterr().err
    assert main(["merge", "--models", "unime-tiny", "unime-tiny", "--output", str(tmp_path / "b"), "--greedy"]) == 2
    assert "--greedy and --eval-data RECORDS go together" in capsys.readouterr().err
