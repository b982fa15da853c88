"""Recipe: what a released model needs beyond its weights, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

RuleFields = dict[str, Any]
"""Fields of an :class:`ImageRule`, as a processor configuration holds them."""


@dataclass(frozen=True)
class ImageRule:
    """Preparation of an image before the image processor.

    The order is fixed, as in the official code: squash in the mode of the file (palette images with nearest
    neighbour, all others bicubic), then EXIF orientation, then RGB.

    Args:
        official: Side in pixels of the square that the official evaluation squashes images to; None leaves the size
            to the image processor.
        training: The same for the official training runs.
        exif: Turn the image as its EXIF orientation says.
        alpha: Treatment of transparency: ``"drop"`` it, or composite on ``"white"``.
        min_pixels: Fewest pixels after the image processor, None for the value of the checkpoint.
        max_pixels: Most pixels after the image processor, None for the value of the checkpoint.
        backend: Image backend of transformers that the official numbers were made with; ``"torchvision"`` is faster
            and differs by 1/255 in some pixels.
    """

    official: int | None = None
    training: int | None = None
    exif: bool = True
    alpha: Literal["drop", "white"] = "drop"
    min_pixels: int | None = None
    max_pixels: int | None = None
    backend: Literal["pil", "torchvision"] = "pil"

    @property
    def stock(self) -> bool:
        """Whether transformers' own processor does all of it: nothing but limits of the size.

        Example:
            >>> ImageRule(min_pixels=4096, backend="torchvision").stock, ImageRule(training=336).stock
            (True, False)
        """
        return replace(self, min_pixels=None, max_pixels=None) == ImageRule(backend="torchvision")

    def side(self, size: str | int | None) -> int | None:
        """Side in pixels of the square that a user's ``--image-size`` asks for, None for the native size.

        Args:
            size: ``"official"``, ``"training"``, ``"native"``, or a number of pixels; None means official.

        Raises:
            ValueError: The value is none of these.

        Example:
            >>> rule = ImageRule(official=1344, training=672)
            >>> rule.side("official"), rule.side("training"), rule.side("336"), rule.side("native")
            (1344, 672, 336, None)
        """
        named: dict[str | int | None, int | None] = {
            None: self.official,
            "official": self.official,
            "training": self.training,
            "native": None,
        }
        if size in named:
            return named[size]
        if str(size).isdecimal() and int(str(size)) > 0:
            return int(str(size))
        raise ValueError(f"Image size {size!r}: use 'official', 'training', 'native', or a number of pixels above 0.")


@dataclass(frozen=True)
class Demo:
    """A published score that a converted checkpoint must reproduce.

    Args:
        score: Cosine similarity in the authors' demo.
        tolerance: Accepted deviation; published values are bfloat16 or rounded.
        image_text: Text that goes with the image on the image side, None for the image alone.
        text: Text side.
        image: Name of the image in the authors' repository.
    """

    score: float
    tolerance: float
    text: str
    image: str
    image_text: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One released model or bare backbone: where its weights are, and everything needed to use them as the authors did.

    Args:
        name: Alias of a released model, or name of a bare backbone.
        family: Row of :data:`unime_st.backbones.FAMILIES`.
        title: Name of the model in cards and messages.
        hub_id: Repository on the hub, None for a bare backbone that the user brings.
        revision: Pinned commit; None where none is known, ``unime pull`` then records the current one.
        processor_hub_id: Repository of tokenizer and image processor when ``hub_id`` lacks them.
        base_model: Backbone named in the model card.
        task: ``"embedding"`` or ``"reranker"``.
        template: File in ``recipes/templates``, or an absolute path; None keeps the chat template of the checkpoint.
        template_kwargs: Variables of the template that the folder fixes.
        image: Preparation of images; None leaves it to the checkpoint's own processor.
        positions: ``"1d"`` counts every token, image tokens included; ``"native"`` keeps the backbone's scheme.
        pooling: Pooling mode of Sentence Transformers.
        padding_side: Side on which short rows of a batch are padded.
        dtype: Floating point type of the official numbers; a folder loads in the type its weights are stored in unless
            ``unime convert --dtype`` says otherwise.
        max_length: Tokens after which text is truncated; None keeps the tokenizer's limit.
        prompts: Instructions by name, usable as ``prompt_name`` of ``encode``, beside ``query`` and ``document``, which are
            empty.
        yes_no: The two answer words of a reranker.
        demo: Published score to check converted weights with.
        license: License of the weights as stated by their publisher.

    Example:
        >>> from unime_st.recipes import get_recipe
        >>> get_recipe("unime-v2-2b").image.official
        1344
    """

    name: str
    family: str
    title: str
    hub_id: str | None = None
    revision: str | None = None
    processor_hub_id: str | None = None
    base_model: str | None = None
    task: Literal["embedding", "reranker"] = "embedding"
    template: str | None = None
    template_kwargs: dict[str, object] = field(default_factory=dict)
    image: ImageRule | None = None
    positions: Literal["native", "1d"] = "native"
    pooling: str = "lasttoken"
    padding_side: Literal["left", "right"] = "left"
    dtype: str = "auto"
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    yes_no: tuple[str, str] = ("Yes", "No")
    demo: Demo | None = None
    license: str | None = None

    def read_template(self) -> str | None:
        """Return the text of the chat template, None when the checkpoint's own is kept.

        Example:
            >>> from unime_st.recipes import get_recipe
            >>> "image_pad" in get_recipe("unime-v2-2b").read_template()
            True
        """
        if self.template is None:
            return None
        if Path(self.template).is_absolute():
            return Path(self.template).read_text(encoding="utf-8")
        return (files("unime_st.recipes") / "templates" / self.template).read_text(encoding="utf-8")
