"""Validation loss over the validation split, under causal routing and under the paper's look-ahead top-k.

Shapes: m micro-batch (sequences), T tokens of a sequence, Nr recursions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from model.config import MoRConfig
from model.depth import method_of
from model.flops import gates_of
from model.record import depth_counts
from pretrain.data import fixed_batches
from pretrain.manifest import Manifest, Mixture
from pretrain.metrics import Sums

if TYPE_CHECKING:
    from pretrain.parallel.strategy import Parallel


@dataclass(frozen=True)
class Validation:
    """What is validated on: the first `sequences` (None: all) of the validation split, `micro_size` at a time."""

    config: MoRConfig
    manifest: Manifest
    micro_size: int
    sequences: int | None
    document_masking: bool

    @torch.no_grad()
    def __call__(self, parallel: Parallel, max_recursions: int | None = None) -> dict[str, Any]:
        """Mean loss in nats per token. Every rank takes part and gets the same figures.

        `validation_loss`: causal routing, nothing looks ahead; None where `selection: none` leaves the model without a
        causal decision. `validation_loss_topk`: expert-choice picks the top-k of the whole sequence, as the paper
        evaluates; equal to the former for every other model. `validation_loss_full`: of models with exits,
        teacher-forced at full depth, where `validation_loss` is what decoding under the exit rule would see.
        `validation_tokens`; for routed models
        `validation_depth_shares` [Nr+1] and the routing statistics, of the causal pass where there is one.
        max_recursions: no token executes more (test-time depth, Fig. 5c); None: as many as the model has.
        """
        parallel.model.eval()
        lines = {mode: self._every_source(parallel, mode, max_recursions) for mode in self._modes()}
        parallel.model.train()
        topk = lines.get("topk", lines.get("causal"))
        line = lines.get("causal", topk)
        assert line is not None and topk is not None
        return line | {
            "validation_loss": line["validation_loss"] if "causal" in lines else None,
            "validation_loss_topk": topk["validation_loss"],
            **{f"validation_loss_{mode}": lines[mode]["validation_loss"] for mode in lines if mode == "full"},
        }

    @torch.no_grad()
    def look_ahead(self, parallel: Parallel) -> float | None:
        """What later tokens do to earlier ones: a measurement, not a statement.

        The first half of a batch's positions, causally evaluated once with the text that follows and once with random
        tokens in its place: the change of its loss, in nats per token, or the share of its tokens that take another
        depth, whichever is larger. Rounding, where nothing looks ahead. None where there is no causal decision. Every
        rank takes part and gets the same figure.
        """
        if "causal" not in self._modes():
            return None
        parallel.model.eval()
        sources = self.manifest.sources.values() if isinstance(self.manifest, Mixture) else [self.manifest]
        manifest = next(iter(sources))
        rows = self.micro_size * parallel.world_size
        (batch,) = fixed_batches(
            manifest,
            "validation",
            self.micro_size,
            parallel.rank,
            parallel.world_size,
            samples=rows,
            document_masking=self.document_masking,
        )
        batch = batch.to(parallel.device)
        half = manifest.sequence_length // 2
        random = torch.Generator().manual_seed(0)
        other = torch.randint(manifest.vocab_size, batch.input_ids[:, half:].shape, generator=random)
        changed = torch.cat([batch.input_ids[:, :half], other.to(batch.input_ids)], dim=1)
        targets = batch.targets.clone()
        targets[:, half:] = -100
        sums, depths = Sums(), []
        for name, ids in (("given", batch.input_ids), ("changed", changed)):
            output = parallel.forward(
                input_ids=ids,
                targets=targets,
                document_ids=batch.document_ids,
                routing_mode="causal",
                num_items_in_batch=targets.numel(),
                return_logits=False,
            )
            sums.add(name, output.losses["lm"].double() * targets.numel())
            depths.append(targets if output.routing is None else output.routing.depth)
        sums.add("tokens", (targets != -100).sum())
        sums.add("moved", (depths[0] != depths[1])[:, :half].sum())
        totals = sums.reduce(parallel)
        parallel.model.train()
        return max(abs(totals["given"] - totals["changed"]), totals["moved"]) / max(totals["tokens"], 1.0)

    def _modes(self) -> list[str]:
        return list(method_of(self.config).modes(self.config))

    def _every_source(self, parallel: Parallel, mode: str, max_recursions: int | None) -> dict[str, Any]:
        """The line of the folder; of a mixture, the mean of its sources' lines over its weights, and every loss.

        `validation_loss_sources`: loss by name of the source. The weights are those over the whole budget, so that the
        mean stays comparable where weights change.
        """
        if not isinstance(self.manifest, Mixture):
            return self._evaluate(parallel, mode, max_recursions, self.manifest)
        lines = {n: self._evaluate(parallel, mode, max_recursions, m) for n, m in self.manifest.sources.items()}
        weights = self.manifest.weights
        line: dict[str, Any] = {}
        for key, value in next(iter(lines.values())).items():
            if isinstance(value, list):
                places = range(len(value))
                line[key] = [sum(weights[name] * lines[name][key][place] for name in lines) for place in places]
            else:
                line[key] = sum(weights[name] * lines[name][key] for name in lines)
        line["validation_tokens"] = sum(found["validation_tokens"] for found in lines.values())
        return line | {"validation_loss_sources": {name: found["validation_loss"] for name, found in lines.items()}}

    def _evaluate(
        self, parallel: Parallel, routing_mode: str, max_recursions: int | None, manifest: Manifest
    ) -> dict[str, Any]:
        sums, fault = Sums(), None
        batches = fixed_batches(
            manifest,
            "validation",
            self.micro_size,
            parallel.rank,
            parallel.world_size,
            samples=self.sequences,
            document_masking=self.document_masking,
        )
        for batch in batches:
            batch = batch.to(parallel.device)
            places = batch.targets.numel()
            output = parallel.forward(
                input_ids=batch.input_ids,
                targets=batch.targets,
                document_ids=batch.document_ids,
                num_documents=batch.num_documents,
                routing_mode=routing_mode,
                max_recursions=max_recursions,
                num_items_in_batch=places,  # rows that only fill up the last batch then have loss 0, not 0 / 0
                return_logits=False,
            )
            sums.add("loss", output.losses["lm"].double() * places)
            sums.add("tokens", (batch.targets != -100).sum())
            sums.add("sequences", batch.samples)
            fault = fault or batch.fault
            if output.routing is not None:
                depth = output.routing.depth[: batch.samples].flatten()
                sums.add("depth", depth_counts(depth, gates_of(self.config)))
                for name, value in output.routing.statistics.items():
                    sums.add(name, value.double() * batch.samples)
        sums.add("faults", float(fault is not None))
        totals = sums.reduce(parallel)
        if totals.pop("faults"):
            parallel.fail_together(fault)
        tokens, rows = totals.pop("tokens"), totals.pop("sequences")
        line = {"validation_loss": totals.pop("loss") / tokens, "validation_tokens": round(tokens)}
        if "depth" in totals:
            line["validation_depth_shares"] = [count / tokens for count in totals.pop("depth")]
        return line | {f"validation_{name}": value / rows for name, value in totals.items()}
