"""What a prepared folder holds, and several of them as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from data_prep.files import fingerprint as fingerprint_of
from data_prep.manifest import read_manifest
from data_prep.settings import Settings, UserError, build
from pretrain.mixture import whole_weights


class Shard(Settings):
    """One tar: `name` is its path inside the folder, `samples` its blocks, `bytes` its size."""

    name: str
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str


class Split(Settings):
    """Train or validation: totals, and the shards in the order of their samples."""

    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    shards: list[Shard]


class Manifest(Settings):
    """What a prepared folder holds (`manifest.json`); get one by `Manifest.read`."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    folder: Path
    fingerprint: str
    sequence_length: int = Field(gt=0)
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(gt=0)
    eos_token_id: int = Field(ge=0)
    tokenizer_fingerprint: str
    corpus: str
    licence: str
    seed: int
    documents: dict[str, int]
    unigram_loss: float
    splits: dict[str, Split]

    @staticmethod
    def read(folder: str | Path) -> Manifest:
        """Read and check `folder/manifest.json`: version, fingerprint, presence of every file, size of shards.

        Raises UserError naming the file and what to do.
        """
        folder = Path(folder)
        content = read_manifest(folder)
        if content is None:
            state = "its preparation has not finished" if folder.is_dir() else "no such folder"
            raise UserError(
                f"{folder}: no prepared data ({state}); prepare it with "
                f"`python data_prep/prepare.py --config configs/data/NAME.yaml folder={folder}`"
            )
        manifest = build(Manifest, {**content, "folder": folder}, str(folder / "manifest.json"))
        manifest._check_presence()
        return manifest

    def split(self, name: str) -> Split:
        """The split `name`; raises UserError if it does not exist or holds no sample."""
        if name not in self.splits or not self.splits[name].samples:
            raise UserError(f"{self.folder}: split {name!r} holds no sample; prepare it from more text")
        return self.splits[name]

    def check_model(self, vocab_size: int, sequence_length: int) -> None:
        """Raise UserError if a model of `vocab_size` tokens cannot be trained on this folder at `sequence_length`."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{self.folder}: prepared with a vocabulary of {self.vocab_size} tokens, larger than the model's "
                f"{vocab_size}; set model.vocab_size={self.vocab_size} or prepare the data with a smaller tokenizer"
            )
        if self.sequence_length != sequence_length:
            raise UserError(
                f"{self.folder}: prepared in sequences of {self.sequence_length} tokens, the run asks for "
                f"{sequence_length}; set batch.sequence_length={self.sequence_length} or prepare the data anew"
            )

    def check_tokenizer(self, tokenizer_fingerprint: str, where: str) -> None:
        """Raise UserError if `where` (a checkpoint, another folder) was made with another tokenizer."""
        if self.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{self.folder}: prepared with tokenizer {self.tokenizer_fingerprint}, but {where} uses tokenizer "
                f"{tokenizer_fingerprint}; use data prepared with the same tokenizer.json"
            )

    def _check_presence(self) -> None:
        if not (self.folder / "tokenizer.json").is_file():
            raise UserError(f"{self.folder}/tokenizer.json: missing; prepare the folder anew")
        for name, split in self.splits.items():
            if split.samples != sum(shard.samples for shard in split.shards):
                raise UserError(f"{self.folder}/manifest.json: split {name!r} does not add up; prepare the folder anew")
            for shard in split.shards:
                path = self.folder / shard.name
                try:
                    size = path.stat().st_size
                except OSError as error:
                    raise UserError(f"{path}: shard is missing ({error.strerror}); prepare the folder anew") from None
                if size != shard.bytes:
                    kind = "truncated" if size < shard.bytes else "altered"
                    raise UserError(f"{path}: shard is {kind}: {size} bytes, manifest says {shard.bytes}")
                if not index_path(path).is_file():
                    raise UserError(f"{index_path(path)}: index is missing; prepare the folder anew")


class Mixture(Manifest):
    """Several prepared folders as one; get one by `Mixture.of`.

    What a run asks of its data it asks of this: `fingerprint` covers every source and its weights, `corpus` and
    `licence` name all, `unigram_loss` is the mean over `weights`, `folder` is that of the first source, whose tokenizer
    is everyone's.

    sources: by name; shares [P]: of the budget, at which phases begin; phases [P][K]: weights of the sources by name.
    """

    sources: dict[str, Manifest]
    shares: list[float]
    phases: list[list[float]]

    @staticmethod
    def of(sources: dict[str, tuple[Manifest, list[tuple[float, float]]]]) -> Mixture:
        """Mix sources, each with its weights from shares of the budget on: [(share, weight), ...], the first at 0.

        Raises UserError for sources of different tokenizers or lengths, and weights that are none.
        """
        names = sorted(sources)
        manifests = {name: sources[name][0] for name in names}
        first = manifests[names[0]]
        for name in names[1:]:
            manifests[name].check_tokenizer(first.tokenizer_fingerprint, f"source {names[0]!r} ({first.folder})")
            for key in ("sequence_length", "eos_token_id", "vocab_size"):
                mine, others = getattr(manifests[name], key), getattr(first, key)
                if mine != others:
                    raise UserError(
                        f"{manifests[name].folder}: {key} {mine}, but {first.folder} has {others}; the sources of a "
                        "mixture must have the same: prepare one of them anew"
                    )
        shares = sorted({share for _, steps in sources.values() for share, _ in steps})
        phases = [[_weight_at(sources[name][1], share) for name in names] for share in shares]
        for share, weights in zip(shares, phases, strict=True):
            if not any(weights):
                raise UserError(f"data.mixture: from {share:g} of the budget on every weight is 0")
            try:
                whole_weights(weights)
            except ValueError as error:
                raise UserError(f"data.mixture: {error}") from None
        mean = _mean_weights(shares, phases)
        content = {name: manifests[name].fingerprint for name in names}
        return Mixture.model_construct(
            **{name: getattr(first, name) for name in Manifest.model_fields},
            sources=manifests,
            shares=shares,
            phases=phases,
        ).model_copy(
            update={
                "fingerprint": fingerprint_of({"sources": content, "shares": shares, "phases": phases}),
                "corpus": " + ".join(f"{w:.4g} {manifests[n].corpus}" for n, w in zip(names, mean, strict=True)),
                "licence": "; ".join(f"{name}: {manifests[name].licence}" for name in names),
                "unigram_loss": sum(manifests[n].unigram_loss * w for n, w in zip(names, mean, strict=True)),
            }
        )

    @property
    def weights(self) -> dict[str, float]:
        """Share of each source over the whole budget; what means over the sources are weighted with."""
        return dict(zip(self.sources, _mean_weights(self.shares, self.phases), strict=True))

    def describe(self) -> dict[str, Any]:
        """What run.json records: fingerprint, folder, samples and weights of each source."""
        return {
            name: {
                "folder": str(manifest.folder),
                "corpus": manifest.corpus,
                "data_fingerprint": manifest.fingerprint,
                "samples": manifest.split("train").samples,
                "unigram_loss": manifest.unigram_loss,
                "weights": [[share, phase[number]] for share, phase in zip(self.shares, self.phases, strict=True)],
            }
            for number, (name, manifest) in enumerate(self.sources.items())
        }


def _weight_at(steps: list[tuple[float, float]], share: float) -> float:
    return [weight for start, weight in steps if start <= share][-1]


def _mean_weights(shares: list[float], phases: list[list[float]]) -> list[float]:
    """Mean share of each source over the budget: [K], summing to 1."""
    lengths = np.diff([*shares, 1.0])
    parts = np.array(phases) / np.array(phases).sum(axis=1, keepdims=True)
    return [float(share) for share in lengths @ parts]


def index_path(shard: Path) -> Path:
    """`shard-000000.idx.npy` beside `shard-000000.tar`: byte offset of each sample's first token."""
    return shard.with_suffix(".idx.npy")
