"""RerankerLoss: formula, prompts, random lists, the stock trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reranker_worker as worker
import tiny_reranker as tiny
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

from unime_st import Item, UniMEReranker
from unime_st.judging import load_template
from unime_st.losses import RerankerLoss


@pytest.fixture(scope="module")
def model(reranker_folder: str) -> UniMEReranker:
    return UniMEReranker(reranker_folder, device="cpu")


def reference(logits: np.ndarray, answers: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross entropy and its gradient in float64, row by row."""
    value, gradient = 0.0, np.zeros_like(logits)
    for row, answer in enumerate(answers):
        shifted = logits[row] - logits[row].max()
        probabilities = np.exp(shifted) / np.exp(shifted).sum()
        value -= (shifted[answer] - np.log(np.exp(shifted).sum())) / len(logits)
        gradient[row] = (probabilities - np.eye(logits.shape[1])[answer]) / len(logits)
    return value, gradient


@pytest.mark.parametrize("scale", [1.0, 80.0, 0.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 0.5)])
def test_value_and_gradient_equal_the_formula(model: UniMEReranker, weights: tuple[float, float], scale: float):
    """Also with one certain answer (scale 80) and with equal logits (scale 0)."""
    loss = RerankerLoss(model, *weights)
    draw = np.random.default_rng(0)
    logits = [scale * draw.normal(size=(6, len(model.tokenizer))) for _ in range(3)]
    indices = draw.choice([model.tokenizer.encode(digit)[0] for digit in "1234"], 6)
    answers = [np.full(6, loss.yes_id), np.full(6, loss.no_id), indices]
    used = [index for index in range(3) if weights[index // 2]]
    for with_backward in (False, True):
        reps = [[*torch.from_numpy(logits[index].copy()).split(4)] for index in used]
        reps = [[part.requires_grad_() for part in column] for column in reps]
        value = loss.calculate_loss(reps, torch.from_numpy(indices), with_backward=with_backward)
        if not with_backward:
            value.backward()
        expected = [reference(logits[index], answers[index]) for index in used]
        total = sum(weights[index // 2] * part for index, (part, _) in zip(used, expected))
        assert value.item() == pytest.approx(total, rel=1e-6)
        for index, column, (_, gradient) in zip(used, reps, expected):
            found = torch.cat([part.grad for part in column]).numpy()
            assert np.allclose(found, weights[index // 2] * gradient, rtol=1e-6, atol=1e-12)


def by_hand(model: CrossEncoder, columns: list[list[Any]], hardest: list[int], slots: list[int]) -> dict[str, float]:
    """Both terms from prompts that were not rendered from a template."""

    def side(value: Any) -> tuple[str, Any]:
        text, image = (value, None) if isinstance(value, str) else (value.get("text"), value.get("image"))
        return tiny.written(text, image), image

    def cross_entropy(prompt: str, images: list[Any], answer: str) -> float:
        logits = tiny.answer_logits(model, prompt, [image for image in images if image is not None])
        return -float(logits.double().log_softmax(-1)[model.tokenizer.convert_tokens_to_ids(answer)])

    totals = {"pair": 0.0, "list": 0.0}
    for row, (query, positive, *negatives) in enumerate(zip(*columns)):
        (asked, pil_image), count = side(query), len(columns[0])
        for candidate, answer in ((positive, "Yes"), (negatives[hardest[row]], "No")):
            text, image = side(candidate)
            totals["pair"] += cross_entropy(tiny.PAIR.format(asked, text), [pil_image, image], answer) / count
        listed = [*negatives[: slots[row]], positive, *negatives[slots[row] :]]
        parts = [side(candidate) for candidate in listed]
        candidates = "".join(f"({index}) {text}" for index, (text, _) in enumerate(parts, start=1))
        images = [pil_image, *(image for _, image in parts)]
        answer = str(slots[row] + 1)
        totals["list"] += cross_entropy(tiny.LIST.format(asked, candidates), images, answer) / count
    return totals


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_prompts_and_answers_equal_those_by_hand(model: UniMEReranker, labelled: bool, mini_batch_size: int | None):
    """Fails if a text or an image does not reach a prompt, or an answer is read at another token."""
    columns = worker.rows(5)
    labels = worker.scores(5) if labelled else None
    hardest = labels[:, 1:].argmax(1).tolist() if labels is not None else [0] * 5
    assert labels is None or set(hardest) == {0, 1, 2}
    loss = RerankerLoss(model, mini_batch_size=mini_batch_size)
    torch.manual_seed(7)
    slots = [listed.index(0) for listed in loss._draw_lists(5, 4)]
    assert len(set(slots)) > 2
    torch.manual_seed(7)
    parts = loss(columns, None if labels is None else list(labels))
    expected = by_hand(model, columns, hardest, slots)
    assert set(parts) == {"pair", "list"}
    for name, part in parts.items():
        assert part.item() == pytest.approx(expected[name], rel=1e-5)


def test_items_are_decoded_and_placeholders_removed(model: UniMEReranker):
    columns = worker.rows(3)
    as_items = [
        [Item(value) if isinstance(value, str) else Item(value["text"], value["image"]) for value in column]
        for column in columns
    ]
    marked = [[f"<|image_1|>\n{value}" if isinstance(value, str) else value for value in c] for c in columns]
    found = []
    for given in (columns, as_items, marked):
        torch.manual_seed(0)
        found.append(worker.summed(RerankerLoss(model)(given)).item())
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)


def test_a_plain_cross_encoder_trains_alike(model: UniMEReranker, tmp_path: Path):
    model.save_pretrained(str(tmp_path))
    plain = CrossEncoder(str(tmp_path), device="cpu")
    texts = [["a", "b"], ["c", "d"], ["e", "f"]]
    found = []
    for trained in (plain, model):
        torch.manual_seed(0)
        found.append(worker.summed(RerankerLoss(trained)(texts)).item())
    assert found[0] == pytest.approx(found[1])


def trained_lists(loss: RerankerLoss, batches: int, rows: int, count: int) -> list[list[str]]:
    """The lists that reach the model in training: the candidate at each position, "0" being the positive."""
    seen: list[list[str]] = []

    def logits(column: dict[str, Any], begin: int, end: int, random_state: Any = None) -> torch.Tensor:
        seen.extend(column["candidates"][begin:end])
        return torch.zeros(end - begin, len(loss._tokenizer))

    loss._logits = logits  # type: ignore[method-assign]
    for _ in range(batches):
        loss([["query"] * rows, *([str(index)] * rows for index in range(count))])
    return seen


@pytest.mark.parametrize("shortest", [None, 2])
def test_the_position_of_the_positive_in_training_rows_is_uniform(model: UniMEReranker, shortest: int | None):
    """Chi-square over the positions in lists of each length, and of successive lists; batch size of a training."""
    torch.manual_seed(0)
    loss = RerankerLoss(model, pairwise_weight=0, min_list_length=shortest)
    lists = trained_lists(loss, batches=1500, rows=8, count=6)
    # 0.1 % points of chi-square with 1, 2, 3, 4 and 5 degrees of freedom
    for length, bound in zip(range(2, 7), (10.8, 13.8, 16.3, 18.5, 20.5), strict=True):
        slots = torch.tensor([listed.index("0") for listed in lists if len(listed) == length])
        assert (len(slots) > 2000) == (length == 6 or shortest == 2)
        if len(slots):
            counts = torch.bincount(slots, minlength=length).double()
            assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < bound
    assert all(
        len(set(listed)) == len(listed) and listed[: listed.index("0")] == sorted(listed[: listed.index("0")])
        for listed in lists
    )
    if shortest is None:
        slots = torch.tensor([listed.index("0") for listed in lists])
        pairs = torch.bincount(6 * slots[:-1] + slots[1:], minlength=36).double()
        assert ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum() < 66.6  # 35 degrees
    else:
        members = torch.bincount(torch.tensor([int(index) for listed in lists for index in listed]), minlength=6)
        assert members[1:].max() < 1.1 * members[1:].min()


def test_lists_follow_torchs_generator(model: UniMEReranker):
    """Its state is in the trainer's checkpoints, so a resumed training draws the same lists."""
    loss = RerankerLoss(model)
    torch.manual_seed(3)
    loss._draw_lists(50, 6)
    state = torch.get_rng_state()
    later = [loss._draw_lists(50, 6) for _ in range(2)]
    torch.set_rng_state(state)
    assert later == [RerankerLoss(model)._draw_lists(50, 6) for _ in range(2)]
    assert later[0] != later[1]


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_evaluation_does_not_change_the_training(model: UniMEReranker, mini_batch_size: int | None):
    loss = RerankerLoss(model, pairwise_weight=0, min_list_length=2, mini_batch_size=mini_batch_size)
    columns = worker.rows(5)
    torch.manual_seed(3)
    loss(columns)
    state = torch.get_rng_state()
    evaluated = []
    for _ in range(2):
        with torch.no_grad():
            evaluated.append(loss(columns)["list"].item())
        torch.rand(3)
    assert evaluated[0] == evaluated[1]
    torch.set_rng_state(state)
    with torch.no_grad():
        loss(columns)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_lists_depend_on_the_queries_only(model: UniMEReranker):
    """With batches of one row, too, the positive is not always at the same position."""
    loss = RerankerLoss(model, pairwise_weight=0)
    with torch.no_grad():
        texts = [loss._draw_lists(1, 6, [f"query {number}"]) for number in range(60)]
        items = [loss._draw_lists(1, 6, [Item(f"query {number}")]) for number in range(60)]
        dicts = [loss._draw_lists(1, 6, [{"text": f"query {number}", "image": None}]) for number in range(60)]
    assert texts == items == dicts
    assert {listed.index(0) for (listed,) in texts} == set(range(6))


def test_ten_candidates_through_their_digits(model: UniMEReranker):
    """Numbers that begin alike are answered in two tokens: -log P(1) - log P(")" | 1), -log P(1) - log P(0 | 1)."""
    documents = ["red", "blue", "green", "big", "small", "left", "right", "triangle", "square", "circle"]
    columns = [["an image"] * 12, *([document] * 12 for document in documents)]
    plain = RerankerLoss(model, pairwise_weight=0)
    torch.manual_seed(1)
    indices = plain._draw_lists(12, 10)
    expected = 0.0
    for listed in indices:
        prompt = tiny.LIST.format("an image", "".join(f"({n}) {documents[p]}" for n, p in enumerate(listed, start=1)))
        slot = listed.index(0) + 1
        for piece in {1: ["1", ")"], 10: ["1", "0"]}.get(slot, [str(slot)]):
            logits = tiny.answer_logits(model, prompt, []).double().log_softmax(-1)
            expected -= float(logits[model.tokenizer.encode(piece)[0]]) / 12
            prompt += piece
    assert {1, 10} & {listed.index(0) + 1 for listed in indices}
    for size in (None, 5):
        torch.manual_seed(1)
        parts = RerankerLoss(model, pairwise_weight=0, mini_batch_size=size)(columns)
        assert parts["list"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_soft_targets_equal_the_formula(model: UniMEReranker, mini_batch_size: int | None):
    """Cross entropy with softmax(score / temperature) over the list, in its order."""
    columns, labels = worker.rows(4), worker.scores(4)
    loss = RerankerLoss(model, pairwise_weight=0, target_temperature=0.2, mini_batch_size=mini_batch_size)
    torch.manual_seed(5)
    indices = loss._draw_lists(4, 4)
    torch.manual_seed(5)
    found = loss(columns, labels)["list"].item()
    digits = [model.tokenizer.encode(digit)[0] for digit in "1234"]
    expected = 0.0
    for row, listed in enumerate(indices):
        features = model.preprocess_lists([columns[0][row]], [[columns[1 + index][row] for index in listed]])
        with torch.inference_mode():
            logits = model(features)["causal_logits"][0, -1].double().log_softmax(-1)[digits]
        target = (labels[row, listed].double() / 0.2).softmax(0)
        expected -= float((target * logits).sum()) / 4
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="needs the judge's scores"):
        loss(columns)


def test_parts_that_are_none_are_absent(model: UniMEReranker):
    """As rows of a ``datasets`` struct column come: every dict has all keys."""
    columns = worker.rows(4)
    as_dicts = [[value if isinstance(value, dict) else {"text": value} for value in column] for column in columns]
    absent = [[{"text": None, "image": None, **value} for value in column] for column in as_dicts]
    present = [[{k: part for k, part in value.items() if part is not None} for value in column] for column in as_dicts]
    found = []
    for given in (columns, present, absent):
        torch.manual_seed(0)
        found.append(worker.summed(RerankerLoss(model)(given)).item())
    assert found[1:] == [found[0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_stock_trainer_with_lora_learns(reranker_folder: str, mini_batch_size: int | None, tmp_path: Path):
    model = UniMEReranker(reranker_folder, device="cpu")
    model.add_adapter(
        LoraConfig(
            r=8,
            lora_alpha=32,
            target_modules=r".*language_model.*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)",
            task_type=TaskType.CAUSAL_LM,
        )
    )
    shades = worker.SHADES
    others = [[shades[(row + index) % 8] for row in range(8)] for index in (1, 2)]
    data = {"query": [f"a {shade}" for shade in shades], "positive": shades}
    data |= {"negative_1": others[0], "negative_2": others[1], "label": [[0.9, 0.1, 0.4]] * 8}
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=12,
        learning_rate=3e-2,
        logging_steps=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = Dataset.from_dict(data)
    loss = RerankerLoss(model, mini_batch_size=mini_batch_size)
    trainer = CrossEncoderTrainer(model=model, args=args, train_dataset=dataset, eval_dataset=dataset, loss=loss)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logged = [step for step in trainer.state.log_history if "pair" in step and "list" in step]
    assert logged and logged[-1]["pair"] < logged[0]["pair"] and logged[-1]["list"] < logged[0]["list"]
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    assert loss.citation.strip() in {citation.strip() for citation in model.model_card_data.citations.values()}

    model.save_pretrained(str(tmp_path / "trained"))
    again = UniMEReranker(tmp_path / "trained", device="cpu")
    pairs = list(zip(data["query"], data["positive"]))
    assert np.allclose(again.predict(pairs), model.predict(pairs), atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        ([["a"], ["b"]], None, "at least one negative, but got 2 column"),
        ([["a"], ["b"], ["c"]], torch.ones(1, 3), "shape (1, 2), but the labels have shape (1, 3)"),
        ([["a"], ["b"], ["c"]], torch.tensor([[1.0, float("nan")]]), "some are not finite"),
        ([["a"], *[["b"]] * 100], None, "At most 99 can"),
        ([["a"], ["b"], ["red " * 2000]], None, "the model takes at most 1024"),
    ],
)
def test_wrong_rows(model: UniMEReranker, columns: list, labels: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        RerankerLoss(model)(columns, labels)


def test_any_number_of_candidates_trains_pairwise(model: UniMEReranker):
    parts = RerankerLoss(model, listwise_weight=0)([["a"], *[["b"]] * 100])
    assert set(parts) == {"pair"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairwise_weight": 0, "listwise_weight": 0}, "not both 0"),
        ({"listwise_weight": -1}, "at least 0"),
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1"),
        ({"min_list_length": 1}, "min_list_length must be at least 2"),
        ({"target_temperature": 0.0}, "target_temperature must be above 0"),
    ],
)
def test_wrong_options(model: UniMEReranker, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RerankerLoss(model, **options)


def test_wrong_models(model: UniMEReranker):
    with pytest.raises(ValueError, match="trains a generative CrossEncoder"):
        RerankerLoss(CrossEncoder(modules=[model[0]], device="cpu"))
    official = model[0].processor.chat_template
    try:
        model[0].processor.chat_template = load_template("official").replace("'listwise'", "'lists'")
        with pytest.raises(ValueError, match="no listwise prompt"):
            RerankerLoss(model)
        RerankerLoss(model, listwise_weight=0)
    finally:
        model[0].processor.chat_template = official


def test_config_is_complete(model: UniMEReranker):
    config = RerankerLoss(model, 0.5, 2.0, mini_batch_size=3).get_config_dict()
    assert config == {
        "pairwise_weight": 0.5,
        "listwise_weight": 2.0,
        "mini_batch_size": 3,
        "min_list_length": None,
        "target_temperature": None,
    }
