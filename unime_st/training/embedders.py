"""Training stage of an embedding model: every distinct item of a batch is embedded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from torch import nn

from unime_st.data.items import Item
from unime_st.data.records import RecordSet
from unime_st.encoding.model_inputs import Features
from unime_st.encoding.replicas import shared_by_threads
from unime_st.losses.base import CachedEmbeddingLoss
from unime_st.losses.quantization import Precision
from unime_st.model import UniME
from unime_st.options import OptionError
from unime_st.retrieval.mining import Pools
from unime_st.training.adapters import computation_dtype
from unime_st.training.arguments import TrainArguments
from unime_st.training.batches import sampler
from unime_st.training.distinct_items import DistinctItemsLoss, ItemCollator
from unime_st.training.evaluation import RetrievalEvaluator
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.hard_clusters import hard_clusters, mined_edges
from unime_st.training.item_prompts import ItemPrompts
from unime_st.training.item_tokens import counted_costs, stacked_frames, usable_rows
from unime_st.training.passes import Passes
from unime_st.training.planning import count_steps, estimate_training, flops_per_token, peak_matmul_flops
from unime_st.training.prepared_items import PreparedItems
from unime_st.training.processes import partial_state
from unime_st.training.run import TrainingStage, shards_weights
from unime_st.training.trainer import EmbedderTrainer
from unime_st.training.vision_cache import VisionCache, max_cache_bytes, media_keys
from unime_st.training.visual_tokens import check_frozen, is_frozen

MEDIA = "media.npy"
_THREADS = 4  # that decode ahead of a GPU


class EmbedderStage(TrainingStage[TrainArguments, UniME]):
    """Training stage of an embedding model, see :class:`~unime_st.training.run.TrainingStage`."""

    trainer_class = EmbedderTrainer
    loading = 'SentenceTransformer("{}")'

    def __init__(self, name: str, args: TrainArguments) -> None:
        if args.eval_data and shards_weights(args):
            raise OptionError(
                "eval_data: sharded weights (FSDP) cannot be evaluated while training. Leave it out, and evaluate the "
                "trained model."
            )
        super().__init__(name, args)

    @property
    def gathers(self) -> bool:
        """Whether a loss gathers across devices: on one there is nothing to gather, and Sentence Transformers warns."""
        return self.args.gather_across_devices and partial_state().num_processes > 1

    def _load(self, **options: Any) -> UniME:
        model = UniME(self.args.model, **options)
        asked = {"query": self.args.query_prompt, "document": self.args.document_prompt}
        # The trained model keeps them: encode_query and encode_document give what was trained.
        model.prompts.update({name: prompt for name, prompt in asked.items() if prompt is not None})
        return model

    def _evaluator(self, records: RecordSet) -> RetrievalEvaluator:
        return RetrievalEvaluator(records, batch_size=self.args.per_device_eval_batch_size)

    def _inputs(self) -> list[str]:
        return [*super()._inputs(), *([self.args.cluster_pools] if self.args.cluster_pools else [])]

    def train(
        self, model: UniME, rows: Dataset, loss: nn.Module, *, in_batch: bool = True, distinct: bool = True
    ) -> None:
        """Train a model; a dry run ends with the plan.

        Args:
            model: From :meth:`load_model`.
            rows: Columns ``query, positive, negative_1, ...`` of item ids, with optional ``label`` and ``dataset``.
            loss: An embedding loss of the model with ``calculate_loss``, as all cached losses have.
            in_batch: Whether the loss compares rows with each other. If not, it is a mean over rows, and small batches
                accumulated are the large one exactly.
            distinct: No query and no positive comes twice in a batch.
        """
        args, dtype = self.args, computation_dtype(self.args)
        _check_dimensions(model, args.matryoshka_dims)
        tokens, pixels = counted_costs(args, self.records, model)
        rows, indices, set_aside = usable_rows(args, self.records, rows, tokens)
        self.check_rows(len(rows))
        clusters = self._clusters(rows, in_batch and distinct)
        vision = self._vision_cache(model, tokens, pixels, indices)
        # Prepared items are kept by the thread that trains, and a vision cache has one state for all threads.
        ahead = not (args.dataloader_num_workers or args.item_cache or vision)
        threads = _THREADS if model.device.type == "cuda" and ahead else 0
        encoder = shared_by_threads(model) if threads else model
        preprocess, open_item = (
            (vision.preprocess, vision.open_item) if vision else (encoder.preprocess, Item.to_input)
        )
        prompts = ItemPrompts(self.records, model)
        indices = prompts.positions([n for n in rows.column_names if n not in ("label", "dataset")], indices)
        tokens, pixels = prompts.costs(tokens, pixels)
        row_tokens = tokens[indices].sum(axis=1)
        features = ItemFeatures(self.records, preprocess, open_item, prompts.options)
        prepare: Callable[[list[int]], Features] = features
        if args.item_cache:
            prepare = PreparedItems(model, features, args.item_cache << 20, np.unique(indices).tolist(), dtype)
        feed = Feed(prepare, args.dataloader_num_workers, threads)
        passes = Passes.of(
            args,
            model,
            feed,
            indices,
            tokens,
            None if vision else pixels,
            stacked_frames(self.records, model),
            in_batch=in_batch,
            resumes=self.resumes,
            sides=len(prompts.options),
        )
        flops = flops_per_token(model, cached=passes.cached, recomputed=bool(args.gradient_checkpointing))
        plan = estimate_training(
            args,
            model,
            row_tokens,
            passes.measure(model, feed, indices, dtype),
            steps=count_steps(args, len(rows), accumulates=not in_batch),
            # What was measured is a forward and a backward pass; caching adds a forward pass, a third of both.
            unmeasured=1 / 3 if passes.cached else 0.0,
            flops_per_token=flops,
            set_aside=set_aside,
            largest_item=int(tokens[indices].max()),
            mini_batch=passes.description,
            vision_cache=str(vision) if vision else self._vision_cache_size(model, indices % features.count, tokens),
        )
        tower = FrozenTowerCache(model, dtype) if passes.cached and vision is None and is_frozen(model) else None
        gathers = in_batch and args.gather_across_devices
        self.fit(
            model,
            rows.remove_columns("dataset") if "dataset" in rows.column_names else rows,
            DistinctItemsLoss(
                loss,
                feed if passes.cached else None,
                args.matryoshka_dims,
                tower,
                cast("list[Precision] | None", args.quantization_aware),
            ),
            ItemCollator(
                preprocess,
                records=self.records,
                mini_batches=passes.mini_batches,
                item_prompts=prompts,
                lazy=passes.cached,
                prepare=prepare,
                expect=feed.expect,
            ),
            plan,
            rows_per_pass=passes.rows,
            cached=passes.cached,
            make_batches=sampler(
                world_size=partial_state().num_processes,
                datasets=list(rows["dataset"]) if "dataset" in rows.column_names else None,
                temperature=args.dataset_temperature,
                sub_batch_size=args.sub_batch_size,
                distinct=distinct,
                clusters=clusters,
                costs=None if in_batch else row_tokens,
                balanced=1
                if in_batch
                else args.per_device_train_batch_size // passes.rows * args.gradient_accumulation_steps,
                drop_last=args.dataloader_drop_last,
                # Of the losses that gather, ours alone let shards differ in size.
                even=gathers and not isinstance(loss, CachedEmbeddingLoss),
            ),
            flops_per_token=flops,
            peak_matmul_flops=peak_matmul_flops(model.device, dtype),
            # A loss that gathers weighs the rows of all processes itself; without a smaller batch all weigh the same.
            mean_over_rows=not gathers and not args.dataloader_drop_last,
        )

    def _clusters(self, rows: Dataset, compares_rows: bool) -> list[np.ndarray] | None:
        """Clusters of mutual hard negatives, where the options ask for them."""
        args = self.args
        if args.cluster_pools is None:
            return None
        if not compares_rows:
            raise OptionError(
                "cluster_pools is for losses that compare the rows of a batch: use in_batch or hard_negatives, or set "
                "in_batch_weight for soft_labels."
            )
        queries, positives = list(rows["query"]), list(rows["positive"])
        edges = mined_edges(
            Pools(args.cluster_pools),
            self.records,
            queries,
            positives,
            skip=args.cluster_skip,
            count=args.cluster_candidates,
        )
        return hard_clusters(queries, positives, edges, args.cluster_size, seed=args.seed)

    def _vision_cache(
        self, model: UniME, tokens: np.ndarray, pixels: np.ndarray, indices: np.ndarray
    ) -> VisionCache | None:
        args = self.args
        if args.vision_cache is None:
            return None
        check_frozen(model)
        if args.dry_run:
            return None
        with partial_state().main_process_first():  # which leaves the keys to the others
            keys = media_keys(self.records, indices, Path(args.output) / MEDIA)
        cache = VisionCache(model, self.records, keys, args.vision_cache, computation_dtype(args))
        cache.fill(model, tokens, pixels, args.dataloader_num_workers)
        return cache

    def _vision_cache_size(self, model: UniME, indices: np.ndarray, tokens: np.ndarray) -> str | None:
        if self.args.vision_cache is None:
            return None
        return f"at most {max_cache_bytes(model, self.records, indices, tokens) / 2**30:.2f} GiB"


def _check_dimensions(model: UniME, dims: list[int] | None) -> None:
    width = int(model.get_embedding_dimension() or 0)
    for dim in dims or ():
        if not 0 < dim <= width:
            raise ValueError(f"matryoshka_dims must be between 1 and the embedding dimension {width}, got {dim}.")
