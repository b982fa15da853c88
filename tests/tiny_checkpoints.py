"""Tiny random checkpoints of every supported family, in the layout that their publishers use."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ANSWERS = ("Yes", "No")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_WORDS = "a red blue green big small square circle triangle on the left of right image Query Candidate Ans".split()
_LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLM |= {"num_key_value_heads": 2, "initializer_range": 0.3}
_CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
_CLIP |= {"image_size": 56, "patch_size": 14, "initializer_range": 0.3}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_QWEN: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "Qwen2VL": (14, {}, {"embed_dim": 32, "mlp_ratio": 2, "initializer_range": 0.3}),
    "Qwen2_5_VL": (14, {}, {"out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}),
    "Qwen3VL": (
        16,
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True}, "head_dim": 8},
        {
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
    ),
    "Qwen3_5": (
        16,
        {
            "rope_parameters": {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.25},
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        {"out_hidden_size": 32, "intermediate_size": 48, "num_position_embeddings": 64},
    ),
}
"""Patch size, and what the text and vision configuration add to the common ones."""
_PINPOINTS = [[56, 112], [112, 56], [112, 112]]
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% elif c.type == 'video' %}VIDEO{% elif c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(
    specials: Sequence[str], *, words: Sequence[str] = ANSWERS, bos: str | None = None, **named: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps digits apart, as Qwen's.

    Args:
        specials: Special tokens.
        words: Whole tokens beside a few common ones, here the answers of a judge.
        bos: Special token in front of every text.
        **named: Named special tokens, e.g. `eos_token`.

    Returns:
        The tokenizer of transformers; it pads on the right, as most publishers' do.
    """
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}|\p{L}+|[^\p{L}\p{N}]"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    backend.train_from_iterator([" ".join([*_WORDS, *words])] * 3, trainer)
    backend.add_special_tokens(list(specials))
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, model_max_length=1024, **named)
    made.padding_side = "right"
    return made


def _save(folder: Path, config: Any, model: str, processor: Any, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(transformers, model)(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen_tokenizer(words: Sequence[str] = ANSWERS) -> PreTrainedTokenizerFast:
    """The tokenizer of the Qwen families, with the given words as whole tokens."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_VISION_TOKENS.values()]
    return tokenizer(specials, words=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen(
    folder: Path,
    kind: str = "Qwen2VL",
    *,
    words: Sequence[str] = ANSWERS,
    template: str | None = _CHATML.replace("IMAGE", IMAGE).replace("VIDEO", VIDEO),
    sides: tuple[int, int] = (56, 140),
    vision_depth: int = 2,
    seed: int = 0,
) -> Path:
    """Write a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5.

    Args:
        folder: Where to write.
        kind: What the names of transformers' classes begin with.
        words: Whole tokens of the tokenizer.
        template: Chat template; None for none.
        sides: Sides in pixels of the smallest and the largest square that images are fitted to.
        vision_depth: Layers of the vision tower.
        seed: Seed of the weights.

    Returns:
        The folder.
    """
    patch, own_text, own_vision = _QWEN[kind]
    pixels = {"size": dict(zip(("shortest_edge", "longest_edge"), (side**2 for side in sides))), "patch_size": patch}
    third = kind in ("Qwen3VL", "Qwen3_5")
    videos = transformers.Qwen3VLVideoProcessor if third else transformers.Qwen2VLVideoProcessor
    tok = qwen_tokenizer(words)
    processor = getattr(transformers, "Qwen3VLProcessor" if third else f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(**pixels), tok, videos(**pixels), chat_template=template
    )
    config = getattr(transformers, f"{kind}Config")(
        text_config={**_LLM, "vocab_size": len(tok), "rope_parameters": _MROPE, **own_text},
        vision_config={"depth": vision_depth, "hidden_size": 32, "num_heads": 2, **own_vision},
        tie_word_embeddings=kind == "Qwen2VL",
        **{name: tok.convert_tokens_to_ids(token) for name, token in _VISION_TOKENS.items()},
    )
    return _save(folder, config, f"{kind}ForConditionalGeneration", processor, seed)


def llava_next(folder: Path) -> Path:
    tok = tokenizer(["<unk>", "<s>", "</s>", "<image>", "<pad>"], bos="<s>", eos_token="</s>", pad_token="<pad>")
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=_PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        images, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_CHATML.replace("IMAGE", "<image>\n").replace("VIDEO", "").replace("<|im_start|>", "[").replace("<|im_end|>", "]"),
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        text_config={**_LLM, "model_type": "mistral", "vocab_size": len(tok)},
        vision_config={**_CLIP, "model_type": "clip_vision_model"},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )
    return _save(folder, config, "LlavaNextForConditionalGeneration", processor)


def llava_onevision(folder: Path) -> Path:
    tok = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    images = transformers.LlavaOnevisionImageProcessor(
        size={"height": 56, "width": 56}, image_grid_pinpoints=_PINPOINTS
    )
    processor = transformers.LlavaOnevisionProcessor(
        images, tok, transformers.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16, vision_feature_select_strategy="full", chat_template=_CHATML.replace("IMAGE", "<image>").replace("VIDEO", "<video>"),
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        text_config={**_LLM, "model_type": "qwen2", "vocab_size": len(tok)},
        vision_config={**_CLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
    )
    return _save(folder, config, "LlavaOnevisionForConditionalGeneration", processor)


def internvl(folder: Path) -> Path:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    extra = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    extra["video_token"] = "<video>"
    tok = tokenizer(names, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=extra)
    images = transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, min_patches=1, max_patches=4)
    images.crop_to_patches = True
    processor = transformers.InternVLProcessor(
        images, tok, transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}), image_seq_length=4,
        chat_template=_CHATML.replace("IMAGE", "<IMG_CONTEXT>\n").replace("VIDEO", "<video>"),
    )  # fmt: skip
    config = transformers.InternVLConfig(
        text_config={**_LLM, "model_type": "qwen2", "vocab_size": len(tok)},
        vision_config={**_CLIP, "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return _save(folder, config, "InternVLForConditionalGeneration", processor)


def smolvlm(folder: Path) -> Path:
    names = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<video>"]
    names += ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))]
    tok = tokenizer(names, eos_token="<end_of_utterance>", pad_token="<|endoftext|>")
    images = transformers.SmolVLMImageProcessor(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True
    )
    videos = transformers.SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56})
    template = (
        _CHATML.replace("IMAGE", "<image>").replace("VIDEO", "<video>").replace("<|im_end|>", "<end_of_utterance>")
    )
    processor = transformers.SmolVLMProcessor(images, tok, videos, image_seq_len=4, chat_template=template)
    config = transformers.SmolVLMConfig(
        text_config={**_LLM, "model_type": "llama", "vocab_size": len(tok), "pad_token_id": 0},
        vision_config=_CLIP,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return _save(folder, config, "SmolVLMForConditionalGeneration", processor)


def phi3_v(folder: Path) -> Path:
    """Names of tensors and configuration as Microsoft publishes them, which transformers cannot read."""
    from unime_st.backbones.phi3_v import UniMEPhi3VConfig, UniMEPhi3VModel

    tok = tokenizer(["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], bos="<s>",
                    eos_token="</s>", pad_token="<|endoftext|>")  # fmt: skip
    rope = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0]}
    vision = {**_CLIP, "image_size": 56}
    published = {
        "model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"], "auto_map": {"AutoConfig": "x.Phi3VConfig"},
        "vocab_size": len(tok), **_LLM, "max_position_embeddings": 4096, "original_max_position_embeddings": 512,
        "rope_scaling": rope, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096,
        "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
                       "use_hd_transform": True, "with_learnable_separator": True},
        "img_processor": {"image_dim_out": 32, "model_name": "openai/clip-vit-large-patch14-336",
                          "name": "clip_vision_model", "num_img_tokens": 4},
        "vision_config": vision, "torch_dtype": "float32",
    }  # fmt: skip
    tok.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% set ns = namespace(i=0) %}{% for c in m.content %}"
        "{% if c.type == 'image' %}{% set ns.i = ns.i + 1 %}<|image_{{ ns.i }}|>\n{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tok.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(published))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UniMEPhi3VModel(UniMEPhi3VConfig.from_published(folder))
        model.vision_embed_tokens.glb_GN.data.normal_()
        model.vision_embed_tokens.sub_GN.data.normal_()
    named = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("img_processor.", "img_processor.vision_model.")
        named[f"model.{name}"] = tensor.clone()
    named["lm_head.weight"] = named["model.embed_tokens.weight"].clone()
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    preprocessor = {"image_processor_type": "Phi3VImageProcessor", "processor_class": "Phi3VProcessor"}
    preprocessor |= {"auto_map": {"AutoImageProcessor": "x.Phi3VImageProcessor"}, "num_img_tokens": 4, "crop_size": 56}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"num_crops": 4}))
    return folder


def embedding_gemma2(folder: Path) -> Path:
    """EmbeddingGemma 2: a folder of Sentence Transformers. Its chat template could not be read; this one is ours."""
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    specials = ["<pad>", "<eos>", "<bos>", *names.values(), "<|video|>"]
    tok = tokenizer(specials, bos="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=names)
    size = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'text' %}{{ c.text }}{% else %}<|{{ c.type }}|>{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    processor = transformers.EmbeddingGemma2Processor(
        transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4ImageProcessor(**size), tok,
        transformers.EmbeddingGemma2VideoProcessor(**size), chat_template=template,
    )  # fmt: skip
    ids = {name: tok.convert_tokens_to_ids(token) for name, token in names.items()}
    config = transformers.EmbeddingGemma2Config(
        text_config={
            **_LLM, "vocab_size": len(tok), "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
            "embedding_dim": 24, "sliding_window_pattern": 2, "sliding_window": 16,
        },
        vision_config={
            **_LLM, "model_type": "gemma4_vision", "patch_size": 4, "pooling_kernel_size": 2, "head_dim": 8,
            "num_key_value_heads": 4,
        },
        video_token_id=tok.convert_tokens_to_ids("<|video|>"), eoa_token_index=ids.pop("eoa_token"),
        **{f"{name}_id": number for name, number in ids.items()},
    )  # fmt: skip
    config.text_config.pad_token_id, config.text_config.bos_token_id = tok.pad_token_id, tok.bos_token_id
    bare = _save(folder.with_name(f"{folder.name}-bare"), config, "EmbeddingGemma2Model", processor)
    modules = [Transformer(str(bare)), Pooling(24, "mean"), Normalize()]
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(folder))
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2-vl": qwen,
    "qwen2.5-vl": partial(qwen, kind="Qwen2_5_VL"),
    "qwen3-vl": partial(qwen, kind="Qwen3VL"),
    "qwen3.5-vl": partial(qwen, kind="Qwen3_5"),
    "llava-1.6": llava_next,
    "llava-onevision": llava_onevision,
    "internvl3": internvl,
    "smolvlm": smolvlm,
    "phi3.5-v": phi3_v,
}


FAMILY_OF = {
    "unime-v2-2b": "qwen2-vl",
    "unime-v2-7b": "qwen2-vl",
    "unime-v2": "llava-onevision",
    "unime-v1-llava-ov": "llava-onevision",
    "unime-v1-llava1.6": "llava-1.6",
    "unime-v1-phi3.5": "phi3.5-v",
    "unime-v2-reranker": "qwen2.5-vl",
}
"""Family that a released recipe is for."""


def drop_tensor(folder: Path, part: str) -> None:
    """Remove the first tensor whose name contains ``part``."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if part in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
