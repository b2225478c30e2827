"""The experiment's settings: every key of a `configs/experiment/*.yaml`, its meaning, and what follows from it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from huggingface_hub.errors import StrictDataclassError
from pydantic import BeforeValidator, Field, field_validator, model_validator
from rich.console import Console
from rich.table import Table

from data_prep.settings import Plain, Settings, UserError, describe, load, typed
from model.config import MoRConfig
from model.depth import all_settings, method_of, refuse_foreign
from pretrain.manifest import Manifest, Mixture
from pretrain.parallel.settings import ParallelSettings
from pretrain.schedule import ScheduleKind

# Fields of LlamaConfig that say something about a model to train; the rest of its fields serve the library.
LLAMA_FIELDS = {
    "vocab_size": "tokens in the vocabulary; taken from the manifest, and refused if it differs",
    "hidden_size": "width of the residual stream",
    "intermediate_size": "width of the MLP's inner layer",
    "num_hidden_layers": "effective depth: layers that a token of full depth passes",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key and value heads; fewer than query heads is grouped-query attention",
    "head_dim": "width of a head; hidden_size / num_attention_heads where not given",
    "hidden_act": "activation of the MLP's gate",
    "max_position_embeddings": "longest sequence that the model is meant for",
    "initializer_range": "standard deviation of the initial weights",
    "rms_norm_eps": "epsilon of the norms",
    "eos_token_id": "end-of-text token; taken from the manifest",
    "tie_word_embeddings": "whether the output head shares the embedding's weights",
    "rope_theta": "base of the rotary position embedding",
    "rope_parameters": "the rotary embedding's parameters in full, in place of rope_theta",
    "attention_bias": "biases in the attention projections",
    "attention_dropout": "dropout on attention weights",
    "mlp_bias": "biases in the MLP",
}

# What a run may change when it continues: none of it changes what the run learns, but for rounding. A change of
# NOTED_CHANGES is written into run.json and metrics.jsonl; a larger budget is pretrain/extend.py's.
MAY_CHANGE = (
    "run_dir",
    "data.folder",
    "data.prepare",
    "batch.micro_size",
    "optimizer.max_skipped_steps",
    "recompute",
    "compile",
    "checkpoint",
    "metrics",
    "tracker",
    "parallel",
    "start_from.path",
    "evaluation",
)


NOTED_CHANGES = ("evaluation", "optimizer.max_skipped_steps")


def _whole(value: Any) -> Any:
    """16.5e18 as an integer: pydantic itself refuses floats beyond 64 bits."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Flops = Annotated[int, BeforeValidator(_whole)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class SourceSettings(Settings):
    """One source of a mixture."""

    folder: Path = Field(description="prepared folder")
    weight: float | list[tuple[float, float]] = Field(
        description="share of the samples, relative to the other sources' weights; [[0, 0.7], [0.8, 0.2]]: 0.7, and "
        "0.2 from 0.8 of the budget on"
    )
    prepare: Path | None = Field(
        default=None, description="configs/data/*.yaml that makes the folder when it has no manifest"
    )

    @field_validator("weight")
    @classmethod
    def _rising(cls, weight: float | list[tuple[float, float]]) -> float | list[tuple[float, float]]:
        steps = weight if isinstance(weight, list) else [(0.0, weight)]
        shares = [share for share, _ in steps]
        if not steps or shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] >= 1:
            raise ValueError("give [share of the budget, weight] pairs whose shares rise from 0 and stay below 1")
        if any(not 0 <= value < math.inf for _, value in steps):
            raise ValueError("a weight must be 0 or more")
        return weight

    @property
    def steps(self) -> list[tuple[float, float]]:
        """[(share of the budget, weight from there on), ...]."""
        return self.weight if isinstance(self.weight, list) else [(0.0, self.weight)]


class DataSettings(Settings):
    folder: Path = Field(
        default=Path(), description="prepared folder: manifest.json, train/ and validation/ shards, tokenizer.json"
    )
    mixture: dict[str, SourceSettings] = Field(
        default={}, description="in place of folder: several prepared folders by name, each with folder and weight"
    )
    prepare: Path | None = Field(
        default=None, description="configs/data/*.yaml that makes the folder when it has no manifest"
    )
    document_masking: bool = Field(
        default=True, description="keep attention inside documents; false reproduces the paper"
    )
    order_seed: int | None = Field(
        default=None, ge=0, description="seed of the order of the data alone, to measure what it does; null: `seed`"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        given = self.folder != Path()
        if given == bool(self.mixture):
            raise ValueError("give either folder or mixture")
        if self.mixture and self.prepare:
            raise ValueError("prepare: of a mixture, each source has its own")
        wrong = [name for name in self.mixture if not re.fullmatch(r"\w[\w-]*", name)]
        if wrong:
            raise ValueError(f"mixture: {wrong[0]!r} is no name of a source; use letters, digits, _ and -")
        return self

    @property
    def folders(self) -> list[tuple[Path, Path | None]]:
        """Every prepared folder, with what makes it."""
        if self.mixture:
            return [(source.folder, source.prepare) for source in self.mixture.values()]
        return [(self.folder, self.prepare)]

    @property
    def prepared(self) -> bool:
        """Whether every folder has a manifest."""
        return all((folder / "manifest.json").exists() for folder, _ in self.folders)

    def read(self) -> Manifest:
        """What the folder or the mixture holds. Raises UserError."""
        if not self.mixture:
            return Manifest.read(self.folder)
        return Mixture.of({name: (Manifest.read(item.folder), item.steps) for name, item in self.mixture.items()})


class BudgetSettings(Settings):
    flops: Flops | list[Flops] | None = Field(
        default=None,
        description="training FLOPs after which the run ends; a list trains one trunk and a cool-down branch for each",
    )
    tokens: int | None = Field(
        default=None, gt=0, description="training tokens after which the run ends, in place of flops"
    )
    steps: int | None = Field(
        default=None, gt=0, description="optimizer steps after which the run ends, in place of flops"
    )
    convention: Literal["exact", "paper", "palm", "six_n"] = Field(
        default="exact", description="how FLOPs are counted, here and in the metrics; see model/flops.py"
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        given = [name for name in ("flops", "tokens", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of flops, tokens and steps (given: {', '.join(given) or 'none'})")
        if self.flops == [] or any(total <= 0 for total in self.totals) or self.totals != sorted(set(self.totals)):
            raise ValueError("flops must be positive, and a list of budgets must rise")
        return self

    @property
    def totals(self) -> list[int]:
        """The FLOP budgets, rising; empty where tokens or steps end the run."""
        return self.flops if isinstance(self.flops, list) else [] if self.flops is None else [self.flops]


class BatchSettings(Settings):
    size: int = Field(gt=0, description="sequences in the global batch of one optimizer step")
    micro_size: int | None = Field(
        default=None,
        gt=0,
        description="sequences in one forward pass of one rank; the rest of the batch is accumulated",
    )
    sequence_length: int | None = Field(default=None, gt=0, description="tokens in a sequence; must be the manifest's")


class OptimizerSettings(Settings):
    learning_rate: float = Field(default=3e-3, gt=0, description="peak learning rate of AdamW")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="decay of AdamW's first and second moment")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled decay of matrices; norms and biases do not decay"
    )
    clip_norm: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 does not clip")
    auxiliary_router_factor: float = Field(
        default=10.0,
        gt=0,
        description="learning rate, over the model's, of what learns apart: auxiliary routers (selection: aux_router)",
    )
    max_skipped_steps: int = Field(
        default=0, ge=0, description="steps with a non-finite loss or gradient that are skipped before the run stops"
    )


class ScheduleSettings(Settings):
    kind: ScheduleKind = Field(
        default="trapezoid", description="trapezoid (warm-up, plateau, linear cool-down) or cosine"
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="optimizer steps of warm-up, in place of warmup_share"
    )
    warmup_share: float = Field(
        default=0.05, ge=0, lt=1, description="warm-up as a share of the smallest budget's steps"
    )
    decay_share: float = Field(
        default=0.2, ge=0, le=1, description="share of each budget over which a trapezoid cools down"
    )
    final_share: float = Field(default=0.0, ge=0, le=1, description="share of the peak rate that the decay approaches")


class EvaluationSettings(Settings):
    times: int = Field(
        default=10, ge=0, description="validations, spread evenly over the budget; one at the end in any case"
    )
    every_steps: int | None = Field(default=None, gt=0, description="steps between validations, in place of times")
    at_start: bool = Field(default=False, description="validate before the first step too")
    sequences: int | None = Field(
        default=None, gt=0, description="validate on the first so many sequences; null takes all"
    )
    micro_size: int | None = Field(
        default=None, gt=0, description="sequences in one forward pass; null takes the batch's"
    )
    tasks: list[str] | None = Field(
        default=None, description="tasks of lm-evaluation-harness, at each validation; not with fsdp2 and zero3"
    )
    task_folder: Path | None = Field(default=None, description="task files of one's own, beside the harness's")
    task_limit: int | None = Field(default=None, gt=0, description="first so many questions of each task; null: all")


class CheckpointSettings(Settings):
    every_steps: int | None = Field(
        default=None, gt=0, description="steps between checkpoints; null leaves it to the minutes"
    )
    every_minutes: float | None = Field(
        default=30.0, gt=0, description="minutes between checkpoints; null leaves it to the steps"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints that are kept, beside the milestones")
    milestone_every: int = Field(
        default=0, ge=0, description="steps whose multiples are saved and kept for good; 0 keeps none"
    )
    asynchronous: bool = Field(default=True, description="write in the background while training goes on")


class MetricsSettings(Settings):
    every_steps: int = Field(default=1, gt=0, description="steps between lines of metrics.jsonl")
    peak_flops: float | None = Field(
        default=None, gt=0, description="peak FLOP/s of one device, for MFU; null looks it up by the device's name"
    )
    profile_steps: list[int] = Field(
        default=[], description="steps whose torch profiler trace every rank writes to profile/ in the run's directory"
    )


class TrackerSettings(Settings):
    mode: Literal["online", "offline", "disabled"] = Field(
        default="offline", description="where W&B writes; see its manual"
    )
    project: str = Field(default="mixture-of-recursions", description="W&B project")
    entity: str | None = Field(default=None, description="W&B user or team")
    group: str | None = Field(default=None, description="W&B group, for the runs of one comparison")
    tags: list[str] = Field(default=[], description="W&B tags")


class InitializeSettings(Settings):
    folder: Path = Field(description="folder of a trained vanilla model, as save_pretrained writes it")
    method: Literal["stepwise", "average", "lower", "upper", "random"] = Field(
        default="stepwise", description="which layers of the vanilla model become the shared ones"
    )
    svd: bool = Field(default=False, description="start LoRA or DoRA deltas from what sharing takes away")


class StartSettings(Settings):
    """A run that starts from another one; a path alone stands for `path`. See pretrain/parent.py."""

    path: Path = Field(description="run directory, one of its checkpoints, or an exported model (a run's final/)")
    step: int | None = Field(default=None, ge=0, description="of a run: the checkpoint of this step; null: the newest")
    take: Literal["weights", "optimizer", "run"] = Field(
        default="weights",
        description="weights; optimizer: AdamW's state too; run: all, step, FLOPs, metrics and place in the data too",
    )
    data: Literal["fresh", "continue"] | None = Field(
        default=None,
        description="fresh: the data from its beginning; continue: where the parent stood in it; null: continue with "
        "take: run, else fresh",
    )
    skip_steps: tuple[int, int] | None = Field(
        default=None, description="first and last step of the parent whose batches are left out, as after a loss spike"
    )

    @property
    def data_order(self) -> str:
        """`fresh` or `continue`, settled."""
        return self.data or ("continue" if self.take == "run" else "fresh")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str | Path) else values

    @model_validator(mode="after")
    def _skips_what_continues(self) -> Self:
        if self.skip_steps is None:
            return self
        first, last = self.skip_steps
        if not 1 <= first <= last:
            raise ValueError(f"skip_steps: [{first}, {last}] must be a first and a last step, from 1")
        if self.data_order != "continue":
            raise ValueError("skip_steps needs data: continue, the parent's data in its order")
        return self


class ExperimentSettings(Settings):
    """One training run."""

    name: str = Field(min_length=1, description="the run's name in reports and in W&B")
    run_dir: Path = Field(description="the run's directory: config.yaml, run.json, metrics.jsonl, checkpoints/, final/")
    seed: int = Field(
        default=0, ge=0, lt=2**40, description="seed of the initial weights, the order of the data and every draw"
    )
    model: dict[str, Any] = Field(description="configs/model/*.yaml, or fields of MoRConfig")
    initialize_from: InitializeSettings | None = Field(default=None, description="start from a trained vanilla model")
    start_from: StartSettings | None = Field(
        default=None, description="start from another run, checkpoint or exported model; a path, or its fields"
    )
    data: DataSettings = Field(description="the prepared data")
    budget: BudgetSettings = Field(description="when the run ends")
    batch: BatchSettings = Field(description="how large a step is")
    optimizer: OptimizerSettings = Field(default=OptimizerSettings(), description="AdamW")
    schedule: ScheduleSettings = Field(default=ScheduleSettings(), description="the learning rate over the budget")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="bf16: autocast over fp32 parameters; or fp32; auto: bf16 on GPUs and CPUs that multiply it in "
        "hardware, else fp32. An existing run goes on in its own",
    )
    recompute: Literal["none", "block", "recursion", "selective"] = Field(
        default="none", description="which activations are computed again in the backward pass, to save memory"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="torch.compile each layer: slower to start, faster to run; auto: on a GPU, where a C compiler is "
        "there and the strategy is not DeepSpeed's",
    )
    evaluation: EvaluationSettings = Field(
        default=EvaluationSettings(), description="validation during and after training"
    )
    checkpoint: CheckpointSettings = Field(default=CheckpointSettings(), description="checkpoints and their retention")
    metrics: MetricsSettings = Field(default=MetricsSettings(), description="metrics.jsonl")
    tracker: TrackerSettings = Field(default=TrackerSettings(), description="Weights & Biases")
    parallel: ParallelSettings = Field(
        default=ParallelSettings.model_validate({}), description="configs/parallel/*.yaml, or its fields"
    )

    @field_validator("model")
    @classmethod
    def _known_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        check_model_fields(fields)
        make_model_config(fields)
        return typed_model_fields(fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.budget.totals) > 1 and self.schedule.kind != "trapezoid":
            raise ValueError("schedule.kind: several budgets need a trapezoid, whose plateau they share")
        if self.start_from is not None and self.initialize_from is not None:
            raise ValueError("start_from and initialize_from both say where the weights come from: give one")
        if self.parallel.mixed_precision == "bf16" and self.precision == "fp32":
            raise ValueError(
                "precision is fp32, and parallel.mixed_precision bf16: give both the same, or no to the last"
            )
        return self


def read_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> ExperimentSettings:
    """Read an experiment and its `key=value` overrides. Raises UserError that names the file and the key."""
    return load(ExperimentSettings, path, overrides, sections=("model", "parallel"), alone={"start_from": "path"})


def read_data(given: Sequence[str]) -> Manifest:
    """What `--data` names: a prepared folder, several (a mixture in equal parts) or the data of an experiment's file.

    Raises UserError for what is not prepared, and for folders of different tokenizers.
    """
    if len(given) == 1:
        return read_settings(given[0]).data.read() if given[0].endswith(".yaml") else Manifest.read(Path(given[0]))
    names = [Path(name).name for name in given]
    if len(set(names)) < len(names):
        raise UserError("--data: two folders have one name, by which their losses would be told; rename one")
    return Mixture.of({name: (Manifest.read(Path(at)), [(0.0, 1.0)]) for name, at in zip(names, given, strict=True)})


def check_model_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is no field of a model, with the nearest that are, and for one that someone gave
    though it means nothing for the method, be it the default of another."""
    known = list(dict.fromkeys([*LLAMA_FIELDS, *MoRConfig.__annotations__, *all_settings()]))
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
            raise ValueError(f"unknown key {key!r}; nearest valid: {', '.join(near)}")
    refuse_foreign(fields)


def typed_model_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of MoRConfig as its annotations say: a fraction where a whole number was written, a switch for `yes`."""
    hints: dict[str, Any] = {}
    for cls in reversed(MoRConfig.__mro__):
        hints |= {
            name: hint for name, hint in vars(cls).get("__annotations__", {}).items() if not isinstance(hint, str)
        }
    hints |= {name: setting.kind for name, setting in all_settings().items()}
    return {name: typed(_plain(value), hints.get(name, Any)) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    """A value whose texts may be read as something else."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return Plain(value) if isinstance(value, str) else value


def make_model_config(fields: dict[str, Any]) -> MoRConfig:
    """Build a MoRConfig; ValueError names the field that is wrong."""
    try:
        return MoRConfig(**typed_model_fields(fields))
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error.__cause__ or error).split())) from None


def resolve_model(settings: ExperimentSettings, manifest: Manifest) -> MoRConfig:
    """The model's configuration with the data's vocabulary. Raises UserError where model and data contradict."""
    fields = dict(settings.model)
    for key in ("vocab_size", "eos_token_id"):
        value = getattr(manifest, key)
        if fields.setdefault(key, value) != value:
            raise UserError(f"model.{key} is {fields[key]}, the data in {manifest.folder} has {value}: leave it out")
    longest = fields.setdefault("max_position_embeddings", manifest.sequence_length)
    if longest < manifest.sequence_length:
        raise UserError(
            f"model.max_position_embeddings {longest} is below the sequence length {manifest.sequence_length} of "
            f"{manifest.folder}"
        )
    manifest.check_model(manifest.vocab_size, settings.batch.sequence_length or manifest.sequence_length)
    try:
        return make_model_config(fields)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def micro_size_of(batch: BatchSettings, world_size: int) -> int:
    """Sequences in one forward pass of one rank: as given, or the whole batch at once."""
    return batch.micro_size or max(1, batch.size // world_size)


def differing_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two resolved configurations, but for those that may change."""
    return sorted(key for key in _differences(before, now) if not may_change(key))


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of this key."""
    return key.startswith(MAY_CHANGE) or bool(re.fullmatch(r"data\.mixture\.[\w-]+\.(folder|prepare)", key))


def noted_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Dotted key -> [old value, new value] of what may change and is written down when it does."""
    found = {}
    for key in sorted(_differences(before, now)):
        if key.startswith(NOTED_CHANGES):
            values: list[Any] = [before, now]
            for part in key.split("."):
                values = [value.get(part) if isinstance(value, dict) else None for value in values]
            found[key] = values
    return found


def refusal(folder: Path, keys: Sequence[str]) -> str:
    """Why a run cannot go on with other values of `keys`, and the ways out."""
    return (
        f"{folder}: belongs to a run of another configuration; these keys differ: {', '.join(keys)}. They decide what "
        f"the run learns. Give them as in {folder / 'config.yaml'}, or begin a new run from this one with another "
        f"run_dir and start_from={folder} (start_from.take=weights, optimizer or run)"
    )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in {*before, *now}:
        left, right = before.get(name), now.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            keys.append(f"{prefix}{name}")
    return keys


def print_config(settings: ExperimentSettings) -> None:
    """Print every key, its resolved value and its meaning as a table."""
    config = make_model_config(settings.model)
    meanings = {**LLAMA_FIELDS, **_documented_fields(MoRConfig.__doc__ or "")}
    meanings |= {name: setting.meaning for name, setting in method_of(config).settings.items()}
    table = Table("key", "value", "meaning", title=f"{settings.name} ({config.architecture})")
    for key, value, meaning in describe(settings):
        if key != "model":
            table.add_row(key, value, meaning)
            continue
        for name, text in meanings.items():
            if hasattr(config, name):
                given = "" if name in settings.model else " (default)"
                table.add_row(f"model.{name}", f"{getattr(config, name)!r}{given}", text)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


def _documented_fields(docstring: str) -> dict[str, str]:
    """Read `name, name: meaning` paragraphs of a class's docstring, indented continuation lines included."""
    meanings: dict[str, str] = {}
    for names, text in re.findall(r"^    ([a-z_, ]+): (.+(?:\n {8}.+)*)", docstring, flags=re.MULTILINE):
        for name in names.split(", "):
            meanings[name] = " ".join(text.split()).replace("`", "")
    return meanings
