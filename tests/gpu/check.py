"""Is the GPU path right, and how fast is it? One command, one GPU, no network, under ten minutes.

    python -m tests.gpu.check --out DIR [--only parity,train] [--seconds 570] [--tiny]

Working directory: the repository. Every result is a line of DIR/results.jsonl as soon as it is known; DIR/results.md
is the page of them, with bars. A part that fails says so and the next one goes on; the exit code is 1 if anything
failed or was beyond its bar. `run` and `fsdp2` need what `pretrain` imports; where a machine lacks it and has no
network, carry wheels: `pip download --no-deps --dest wheels pydantic pydantic-core annotated-types typing-inspection`,
and there `pip install --no-index --no-deps --target site wheels/*.whl` and PYTHONPATH=site:. --tiny: small shapes, on
any device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from model.attention.flex import can_compile
from model.config import MoRConfig
from model.flops import StepFlops, training_flops
from model.hardware import describe, device_here
from model.inference.engine import Engine
from model.inference.sampling import SamplingParams
from model.memory import Placement, training_memory
from model.modeling import MoRForCausalLM
from tests.helpers.tiny import VOCABULARY, tiny_model

# Each tiny variant that is held against fp64 on a CPU, the slow ones last; `--tiny` takes the first few.
VARIANTS = (
    *("vanilla", "expert-shared", "token-recursion_wise", "expert-recursion_wise", "token-shared_update", "recursive"),
    *("token-shared", "expert-shared_update", "recursive-shared", "expert-random", "expert-lora", "expert-aux-mlp"),
    *("mod", "ut", "ut-frozen", "token-z-shared"),
)
MODELS = (
    *("360m_vanilla", "360m_mor_expert_nr3", "360m_mor_token_nr3", "360m_mor_expert_nr3_shared_kv"),
    *("360m_recursive_nr3", "360m_mod"),
)
# Bars: relative errors, and from issue and paper: MFU of vanilla, how many points a routed model may lose, the share of
# the FLOPs saved that must become time, tokens per second at 32 requests.
ERRORS = {"fp32": 1e-4, "bf16": 2e-2, "compiled": 2e-2, "prefix": 1e-5, "cached": 1e-5}
GIB = 2**30
PEAK_FLOPS = 989e12  # of an H100 or H200, dense bf16, by the data sheet
MFU, ROUTED_POINTS, TIME_SAVED, MEMORY = 0.45, 0.05, 0.97, 0.05
TOKENS_PER_SECOND, DEPTH_GAIN = 20_000, 1.33
SMALL = {
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
}


@dataclass
class Check:
    """The options, the clock and the results, for every section."""

    out: Path
    seconds: float
    tiny: bool
    device: torch.device = field(default_factory=device_here)
    start: float = field(default_factory=time.monotonic)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def tell(self, section: str, **facts: Any) -> None:
        """A line of results, on the disk at once."""
        line = {"section": section, "at": round(time.monotonic() - self.start, 1)} | facts
        self.lines.append(line)
        text = json.dumps(line, default=str)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text, flush=True)

    def hold(self, section: str, what: str, value: float, bar: float, least: bool = False, **facts: Any) -> None:
        """A figure against its bar, above which (or with `least` below which) it fails; so does what is no number."""
        within = value >= bar if least else value <= bar
        self.tell(section, what=what, value=value, bar=bar, least=least, within=within, **facts)

    def hold_speed(self, section: str, what: str, value: float, bar: float, **facts: Any) -> None:
        """A bar for the GPUs that it was set for; elsewhere a figure alone."""
        if self.tiny or "H100" not in describe(self.device):
            self.tell(section, what=what, value=value, **facts)
        else:
            self.hold(section, what, value, bar, least=True, **facts)

    @contextlib.contextmanager
    def part(self, section: str, **facts: Any) -> Iterator[None]:
        """What goes wrong within is a line, and ends this part alone."""
        try:
            yield
        except Exception as error:
            trace = traceback.format_exc().splitlines()[-12:]
            self.tell(section, within=False, error=f"{type(error).__name__}: {error}"[:400], trace=trace, **facts)

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("within") is False]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def apart(got: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def median_seconds(check: Check, function: Callable[[], Any], repeats: int) -> float:
    """Of `function`, device included, after two calls that are not counted."""
    times = []
    for _ in range(repeats + 2):
        check.wait()
        start = time.perf_counter()
        function()
        check.wait()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


# Sections -------------------------------------------------------------------------------------------------------------


def environment(check: Check) -> None:
    """Versions, and what the device gives at best: every other figure is read against these."""
    size = 256 if check.tiny else 8192
    x = torch.randn(size, size, device=check.device, dtype=torch.bfloat16)
    check.tell(
        "environment",
        device=describe(check.device),
        torch=torch.__version__,
        cudnn=torch.backends.cudnn.version(),
        product_tflops=2 * size**3 / median_seconds(check, lambda: x @ x, 5) / 1e12,
        copy_terabytes_a_second=2 * x.nbytes / median_seconds(check, x.clone, 5) / 1e12,
    )


TOKENS = torch.randint(1, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.arange(48).ge(20).long().expand(2, -1)


def step(
    model: MoRForCausalLM, documents: Tensor | None, device: torch.device, half: bool = False
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Loss, gradients and depths of one training step."""
    model.zero_grad()
    ids = TOKENS.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        output = model(ids, targets=ids, document_ids=None if documents is None else documents.to(device))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss, gradients, None if output.routing is None else output.routing.depth


def parity(check: Check) -> None:
    """fp32, bf16 and compiled layers on the device against fp64 on the CPU; then nothing looks ahead, and the cache.

    In bf16 a router may decide otherwise, so only the loss is held there; the share of equal depths is told.
    """
    for variant in VARIANTS[:3] if check.tiny else VARIANTS:
        if check.left < check.seconds * 0.6:
            check.tell("parity", left_out=variant)
            continue
        for documents in (None, DOCUMENTS):
            facts = {"variant": variant, "documents": documents is not None}
            with check.part("parity", **facts):
                _parity(check, tiny_model(variant).train(), tiny_model(variant), documents, facts)
        with check.part("causality", variant=variant), torch.no_grad():
            _causality(check, tiny_model(variant).float().to(check.device), variant)


def _parity(check: Check, reference: MoRForCausalLM, model: MoRForCausalLM, documents, facts: dict[str, Any]) -> None:
    wanted, gradients, depth = step(reference, documents, torch.device("cpu"))
    model = model.float().to(check.device).train()
    got, found, got_depth = step(model, documents, check.device)
    worst = (
        max(apart(found[name], value) for name, value in gradients.items()) if found.keys() == gradients.keys() else 1
    )
    check.hold("parity", "fp32, loss", apart(got, wanted), ERRORS["fp32"], **facts)
    check.hold("parity", "fp32, worst gradient", worst, ERRORS["fp32"], **facts)
    got, _, half_depth = step(model, documents, check.device, half=True)
    same = None if depth is None or half_depth is None else float((half_depth.cpu() == depth).float().mean())
    check.hold("parity", "bf16, loss", apart(got, wanted), ERRORS["bf16"], same_depth=same, **facts)
    if depth is not None and got_depth is not None:
        check.hold("parity", "fp32, other depths", float((got_depth.cpu() != depth).float().mean()), 0.0, **facts)
    if check.device.type == "cuda" and can_compile() and documents is not None and facts["variant"] in VARIANTS[:3]:
        model.compile_layers()
        got, _, _ = step(model, documents, check.device)
        check.hold("parity", "compiled, loss", apart(got, wanted), ERRORS["compiled"], **facts)


def _causality(check: Check, model: MoRForCausalLM, variant: str) -> None:
    ids = TOKENS.to(check.device)
    whole = model(ids).logits
    check.hold(
        "causality", "prefix", apart(model(ids[:, :30]).logits, whole[:, :30]), ERRORS["prefix"], variant=variant
    )
    first = model(ids[:, :30], use_cache=True)
    rest = model(ids[:, 30:], past_key_values=first.past_key_values).logits
    check.hold("causality", "cached", apart(rest, whole[:, 30:]), ERRORS["cached"], variant=variant)


def waits(check: Check) -> None:
    """No operation of a training micro-batch may make the host wait; torch raises at one that does."""
    if check.device.type != "cuda":
        return check.tell("waits", left_out="only a GPU can be waited for")
    for variant in VARIANTS:
        if variant == "ut-frozen":  # who halts is known as each step ends, and decides what the next one computes
            continue
        with check.part("waits", variant=variant):
            model = tiny_model(variant).float().to(check.device).train()
            ids, documents = TOKENS.to(check.device), DOCUMENTS.to(check.device).contiguous()

            def one(model=model, ids=ids, documents=documents) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    model(ids, targets=ids, document_ids=documents, num_documents=4, step=0).loss.backward()

            one()
            torch.cuda.set_sync_debug_mode("error")
            try:
                one()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            check.tell("waits", variant=variant, within=True)


def command(check: Check, section: str, *arguments: str, seconds: float) -> bool:
    """A script of the project by this Python, its output in DIR/SECTION.log; whether it succeeded."""
    log = check.out / f"{section}.log"
    with log.open("ab") as file:
        try:
            limit = max(1.0, min(seconds, check.left))
            code: int | None = subprocess.run(
                [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
    check.tell(section, within=code == 0, exit_code=code, command=" ".join(arguments), tail=None if code == 0 else tail)
    return code == 0


def experiment(check: Check, name: str, flops: str) -> list[str]:
    settings = ["--config", "configs/experiment/smoke.yaml", "tracker.mode=disabled", f"budget.flops={flops}"]
    settings += [f"run_dir={check.out}/{name}", f"data.folder={check.out}/corpus", "precision=auto"]
    return settings


def run(check: Check) -> None:
    """The trainer from a corpus of its own making to the export: two minutes, or with `--tiny` seconds."""
    flops = "1e10" if check.tiny else "3e12"
    if command(check, "run", "-m", "pretrain.main", *experiment(check, "run", flops), seconds=150):
        lines = [json.loads(line) for line in (check.out / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        check.hold("run", "last loss minus first", losses[-1] - losses[0], 0.0, steps=lines[-1]["step"])


def fsdp2(check: Check) -> None:
    """One rank (NCCL on a GPU); a larger budget then goes on from its checkpoint, and exports."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "pretrain.main"]
    parallel = ["parallel.strategy=fsdp2", "parallel.min_unit_parameters=0", "checkpoint.every_steps=5"]
    for flops in ("1e9", "2e9") if check.tiny else ("2e10", "4e10"):
        if not command(check, "fsdp2", *launcher, *experiment(check, "fsdp2", flops), *parallel, seconds=100):
            return


def model_fields(name: str) -> dict[str, Any]:
    """Fields that configs/model/NAME.yaml gives, `extends` followed; without pydantic, which a machine may lack."""
    values = yaml.safe_load(Path(f"configs/model/{name}.yaml").read_text(encoding="utf-8"))
    base = values.pop("extends", None)
    fields = model_fields(Path(base).stem) if base else {}
    return fields | {k: float(v) if isinstance(v, str) and "e-" in v else v for k, v in values.items()}


def build(check: Check, name: str, length: int, **fields: Any) -> MoRForCausalLM:
    chosen = model_fields(name) | {"max_position_embeddings": length} | fields | (SMALL if check.tiny else {})
    with check.device:
        return MoRForCausalLM(MoRConfig(**chosen))


def engine(check: Check) -> None:
    """The tokens that a CPU decodes, and how many a second of 32 requests at once in bf16, once all is compiled.

    Random routers there, for the weights are random.
    """
    prompts, params = [[i + 1, *range(1, 2 * i)] for i in range(9)], SamplingParams(max_tokens=12)
    for variant in ("vanilla", "expert-recursion_wise", "token-shared"):
        with check.part("engine", variant=variant):
            wanted = Engine(tiny_model(variant).float()).generate(prompts, params)
            got = Engine(tiny_model(variant).float().to(check.device), paged=True).generate(prompts, params)
            pairs = zip(wanted, got, strict=True)
            other = sum(one.tokens != two.tokens or one.depths != two.depths for one, two in pairs)
            check.hold("engine", "fp32, other texts", other, 0, variant=variant)
    rates: dict[str, float] = {}
    requests, new = (4, 4) if check.tiny else (32, 128)
    for name in ("360m_vanilla", "360m_mor_expert_nr3"):
        with check.part("engine", model=name):
            model = build(check, name, 2048, **({"router": "random"} if "mor" in name else {})).to(torch.bfloat16)
            served = Engine(model, max_batch=requests, kv_tokens=requests * 512)
            for tokens in (4, new):  # those that compile and record, then those that count
                for _ in range(requests):
                    served.submit(list(range(1, 33)), SamplingParams(max_tokens=tokens))
                before, start = served.statistics.generated_tokens, time.perf_counter()
                while not served.idle and time.perf_counter() - start < 60:
                    served.step()
                check.wait()
            rates[name] = (served.statistics.generated_tokens - before) / (time.perf_counter() - start)
            check.hold_speed("engine", f"{name}, tokens a second", rates[name], TOKENS_PER_SECOND)
    if len(rates) == 2:
        vanilla, routed = rates.values()
        check.hold_speed("engine", "MoR-3 over vanilla", routed / vanilla, DEPTH_GAIN)


def train(check: Check) -> None:
    """Step time, MFU, peak memory and time saved of the 360M models, as they are trained: compiled, with documents."""
    vanilla: tuple[float, float, float] | None = None
    for name in MODELS[:2] if check.tiny else MODELS:
        if vanilla is not None and check.left < 60:
            check.tell("train", left_out=name)
            continue
        with check.part("train", model=name):
            seconds, flops, peak, estimate = measure(check, name)
            mfu = flops / seconds / PEAK_FLOPS
            facts = {
                "model": name,
                "milliseconds": 1e3 * seconds,
                "tflop_exact": flops / 1e12,
                "peak_gib": peak / 2**30,
            }
            if vanilla is None:
                vanilla = seconds, flops, mfu
            check.hold_speed("train", "MFU", mfu, MFU if mfu == vanilla[2] else vanilla[2] - ROUTED_POINTS, **facts)
            if flops < vanilla[1]:
                share = (1 - seconds / vanilla[0]) / (1 - flops / vanilla[1])
                check.hold_speed("train", "time saved over FLOPs saved", share, TIME_SAVED, model=name)
            if check.device.type == "cuda":
                check.hold("train", "peak over estimate, off by", abs(peak / estimate - 1), MEMORY, model=name)


def measure(check: Check, name: str) -> tuple[float, float, float, float]:
    """Seconds and exact FLOPs of a training step (forward, backward, update), peak bytes, and those estimated."""
    rows, length, device = (2, 128, check.device) if check.tiny else (16, 2048, check.device)
    model = build(check, name, length).train()
    compiled = device.type == "cuda" and can_compile()
    if compiled:
        model.compile_layers()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=device)
    documents = torch.arange(length, device=device).div(700, rounding_mode="floor").expand(rows, -1).contiguous()
    routing = None

    def one() -> None:
        nonlocal routing
        with torch.autocast(device.type, torch.bfloat16):
            output = model(ids, targets=ids, document_ids=documents, num_documents=3 * rows, step=0)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        routing = output.routing

    one()
    peak = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(check, one, 1 if check.tiny else 5)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    if routing is None:
        flops = float(training_flops(model.config, length, rows))
    else:
        routed = (getattr(routing, field).sum(0).tolist() for field in ("counts", "pairs", "offered"))
        flops = float(StepFlops(model.config, length)(rows, *routed))
    placement = Placement(on_gpu=True, compiled=compiled)
    return seconds, flops, peak, float(training_memory(model.config, length, rows, placement).total)


SECTIONS = {section.__name__: section for section in (environment, parity, waits, run, fsdp2, train, engine)}


def page(check: Check) -> str:
    """Results as a page: what is beyond its bar first."""
    facts = next((line for line in check.lines if line["section"] == "environment"), {})
    text = "# GPU check\n\n" + "".join(f"- {key}: {value}\n" for key, value in facts.items() if key != "section")
    text += f"\n{len(check.failed)} of {sum('within' in line for line in check.lines)} beyond their bar or failed.\n"
    text += "\n| section | what | value | bar | | of |\n|---|---|---|---|---|---|\n"
    hidden = {"section", "at", "what", "value", "bar", "least", "within", "trace", "tail"}
    for line in sorted(check.lines, key=lambda line: line.get("within") is not False):
        if line["section"] in ("environment", "done"):
            continue
        of = ", ".join(f"{k} {v}" for k, v in line.items() if k not in hidden and v is not None)
        value = f"{line['value']:.4g}" if "value" in line else ""
        bar = f"{'at least' if line.get('least') else 'at most'} {line['bar']:.4g}" if "bar" in line else ""
        mark = {True: "", False: "**beyond**", None: "no bar"}[line.get("within")]
        text += f"| {line['section']} | {line.get('what', '')} | {value} | {bar} | {mark} | {of} |\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, logs and runs")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=570, help="nothing long begins after this")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any device")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - SECTIONS.keys()
    if unknown:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.out.resolve(), options.seconds, options.tiny)
    if check.device.type != "cuda" and not check.tiny:
        parser.error("no GPU is visible; --tiny runs small shapes on the CPU")
    for name in options.only.split(","):
        with check.part(name):
            SECTIONS[name](check)
    check.tell("done", beyond_their_bar=len(check.failed))
    (check.out / "results.md").write_text(page(check), encoding="utf-8")
    return int(bool(check.failed))


if __name__ == "__main__":
    sys.exit(main())
