"""What is open on a GPU, in one command of at most nine minutes?

- ``norms``: decorrelated batch norm, IterNorm and the covariance head beside batch norm, in float32, TF32 and bfloat16:
  time and peak memory;
- ``solvers``: every solver at every size and batch: time, error, FLOP/s and their share of the peak; from these, where
  the solver of products becomes faster than the decomposition, and what ``auto`` makes of it;
- ``steps``: training steps of a ResNet-18, treated and not, with one norm and with every norm decorrelated;
- ``waits``: how often layers, functions and steps make the host wait for the device;
- ``graphs``: the same steps as CUDA graphs.

Every section is a process of its own with a time limit. Every case is written when it is measured, to
``OUT/on_a_gpu.json`` and ``OUT/on_a_gpu.md``: a run that is killed loses one case, and ``--resume`` goes on after those
that are there. Times are the least between CUDA events, all contestants of a table in turns after they were warmed up.

    python benchmarks/on_a_gpu.py --out RESULTS
    python benchmarks/on_a_gpu.py --out RESULTS --only norms waits --minutes 4
    python benchmarks/on_a_gpu.py --out RESULTS --device cpu --tiny          # whether it works
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.bench.cases import Case, make_input
from wellcond.bench.contestants import ISQRT, REFERENCE
from wellcond.bench.gauges import Call, Time, count_operations, host_waits, peak_bytes, seconds_of, take_turns
from wellcond.bench.references import exact_root, relative_error, root_by_eigh, root_by_isqrt, with_root
from wellcond.experiments.files import write_atomically, write_json
from wellcond.experiments.run.models import build_model
from wellcond.linalg import SOLVERS, NewtonSchulz, auto_solver, invsqrtm, sqrtm
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d, IterNorm2d, replace_batchnorm
from wellcond.orthogonality import treat

Row = dict[str, Any]
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
# A call that takes longer than this many seconds is timed once.
SLOW = 0.7
# And one that takes longer than this at first is not called again; the first call loads kernels and chooses among them.
VERY_SLOW = 20.0
# Seconds that a process takes to start and to end.
OVERHEAD = 12.0
EXACT = ("eigh", "minimax_or_eigh", "svd")


@dataclass
class Work:
    """One section at work.

    Attributes:
        device: on which is measured.
        tiny: whether the shapes are those for trying it out.
        deadline: of ``time.monotonic()``, after which nothing new is begun.
        write: keeps rows, all that belong to one case at once.
        known: the rows of earlier sections, by section; and of this one, if it was begun before.
        peaks: FLOP/s of a large product in each precision.
        skipped: what there was no time for.
    """

    device: torch.device
    tiny: bool
    deadline: float
    write: Callable[[list[Row]], None]
    known: Mapping[str, list[Row]] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def wants(self, label: str, section: str, **keys: Any) -> bool:
        """Whether this is still to be measured, and there is time for it."""
        if any(all(row.get(key) == value for key, value in keys.items()) for row in self.known.get(section, [])):
            return False
        if time.monotonic() < self.deadline:
            return True
        self.skipped.append(label)
        return False

    def times(self, calls: Mapping[str, Call], seconds: float = 1.0) -> dict[str, Time | str]:
        """The times of all calls in turns, after warming up; of slow ones one; of those that fail, why."""
        found: dict[str, Time | str] = {}
        fast: dict[str, Call] = {}
        for name, call in calls.items():
            try:
                first = seconds_of(call, self.device)
                once = first if first > VERY_SLOW else seconds_of(call, self.device)
            except Exception as error:  # the others go on
                found[name] = reason(error)
                continue
            if once > SLOW:
                found[name] = Time(once, once, 1)
            else:
                fast[name] = call
        if fast:
            rounds = (2, 2) if self.tiny else (5, 60)
            found |= take_turns(fast, self.device, seconds=0.0 if self.tiny else seconds, rounds=rounds)
        return {name: found[name] for name in calls}


def reason(error: BaseException) -> str:
    """An error in one line of moderate length."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Float32 products with TF32 or without; nothing else changes."""
    tf32 = name == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's own settings at its start


def ms(found: Time | str | None) -> float | None:
    return 1e3 * found.minimum if isinstance(found, Time) else None


def over(found: Time | str | None, reference: Time | str | None) -> float | None:
    """The time in units of that of a reference."""
    both = isinstance(found, Time) and isinstance(reference, Time)
    return found.minimum / reference.minimum if both else None


def failure(found: Any) -> Row:
    return {"failure": found} if isinstance(found, str) else {}


# ------------------------------------------------------------------------------------------------------ machine


def machine(device: torch.device, tiny: bool) -> Row:
    """What it was measured on, and the FLOP/s of a large product in every precision."""
    found: Row = {"torch": torch.__version__, "python": platform.python_version(), "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    size = 128 if tiny else 8192
    peaks = {}
    for name, dtype in PRECISIONS.items():
        a = torch.randn(size, size, device=device).to(dtype)
        with precision(name):
            for _ in range(2):
                a @ a
            peaks[name] = 2 * size**3 / min(seconds_of(lambda a=a: a @ a, device, 5) for _ in range(3))
    return {**found, "peak_flops_per_second": peaks}


# -------------------------------------------------------------------------------------------------------- norms


def training(layer: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """Forward and backward with a given gradient of the output, which is made once."""
    parameters = tuple(layer.parameters()) if isinstance(layer, nn.Module) else ()
    with torch.no_grad():
        grad = torch.randn_like(layer(x.detach()))
    return lambda: torch.autograd.grad(layer(x), (x, *parameters), grad)


def norms(work: Work) -> None:
    """Time and peak memory of layers beside those of batch norm."""
    shapes = [(4, 8, 5, 5)] if work.tiny else [(128, 64, 32, 32), (256, 256, 14, 14), (32, 256, 7, 7), (16, 64, 7, 7)]
    for shape in shapes:
        C, name = shape[1], "×".join(map(str, shape))
        for how, dtype in PRECISIONS.items():
            if not work.wants(f"norms {name} {how}", "norms", shape=name, precision=how):
                continue
            x = torch.randn(shape, device=work.device).to(dtype).requires_grad_()
            layers: dict[str, Any] = {
                "batch norm": nn.BatchNorm2d(C),
                "decorrelated": DecorrelatedBatchNorm2d(C),
                "decorrelated, groups of 16": DecorrelatedBatchNorm2d(C, groups=max(C // 16, 1)),
                "IterNorm": IterNorm2d(C),
                "covariance head": GlobalCovariancePool2d(C),
                "covariance head, newton_schulz": GlobalCovariancePool2d(C, solver=NewtonSchulz(5, tolerance=None)),
            }
            if dtype == torch.float32:  # the published ones have no half precision
                whitening, pooling = Case("whitening_layer", shape), Case("pooling_layer", shape)
                layers |= {
                    f"decorrelated, {REFERENCE}": with_root(whitening, root_by_eigh),
                    f"covariance head, {REFERENCE}": with_root(pooling, root_by_eigh),
                    f"covariance head, {ISQRT}": with_root(pooling, root_by_isqrt),
                }
            layers = {key: layer.to(work.device).train() for key, layer in layers.items()}
            with precision(how):
                calls = made({key: partial(training, layer, x) for key, layer in layers.items()})
                whole = work.times({key: call for key, call in calls.items() if not isinstance(call, str)}, 2.0)
                values = {key: partial(without_graph, layers[key], x) for key in whole}
                forward = work.times(values)
                rows = []
                for key, call in calls.items():
                    found = call if isinstance(call, str) else whole[key]
                    row: Row = {"shape": name, "precision": how, "layer": key, "ms": ms(found)}
                    row |= {"of batch norm": over(found, whole.get("batch norm")), "forward ms": ms(forward.get(key))}
                    if isinstance(found, Time) and not isinstance(call, str):
                        row["peak memory / input"] = peak_bytes(call, work.device) / x.nbytes
                    rows.append(row | failure(found))
                work.write(rows)


@torch.no_grad()
def without_graph(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x)


def made(makers: Mapping[str, Callable[[], Call]]) -> dict[str, Call | str]:
    """What each of them makes, or why it cannot."""

    def one(make: Callable[[], Call]) -> Call | str:
        try:
            return make()
        except Exception as error:  # the others go on
            return reason(error)

    return {name: one(make) for name, make in makers.items()}


# ------------------------------------------------------------------------------------------------------ solvers


def solvers(work: Work) -> None:
    """P^{1/2}, forward and backward, κ = 1e4; then P^{-1/2} and TF32 at one size."""
    sizes, batches = ((4, 8), (1, 3)) if work.tiny else ((64, 256, 128, 32, 512), (64, 256, 8, 1))
    cases = [("sqrt", "float32", d, batch) for d in sizes for batch in batches if batch * d**3 <= 2**32]
    some = [case for case in cases if case[2:] in ((256, 64), (64, 64), (8, 3))]
    cases += [("sqrt", "tf32", *case[2:]) for case in some] + [("invsqrt", "float32", *case[2:]) for case in some]
    for task, how, d, batch in cases:
        keys = {"function": task, "precision": how, "size": d, "batch": batch}
        if not work.wants(f"solvers {' '.join(map(str, keys.values()))}", "solvers", **keys):
            continue
        case = Case(task, (batch, d, d))
        P = make_input(case, torch.float32, work.device)
        few = P[:4].cpu().double()
        truth = exact_root(few, 0.5 if task == "sqrt" else -0.5)
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            REFERENCE: with_root(case, root_by_eigh),
            ISQRT: with_root(case, root_by_isqrt),
        }
        for name, make in SOLVERS.items():
            if name == "svd" and batch * d > 64 * 64 and not work.tiny:  # a second a matrix and more
                continue
            solver = make()
            solver.tolerance = None
            functions[name] = partial(sqrtm if task == "sqrt" else invsqrtm, solver=solver)
        functions["auto"] = sqrtm if task == "sqrt" else invsqrtm
        with precision(how):
            calls = made({name: partial(training, f, P.detach().requires_grad_()) for name, f in functions.items()})
            times = work.times({name: call for name, call in calls.items() if not isinstance(call, str)})
            rows = []
            for name, call in calls.items():
                found = call if isinstance(call, str) else times[name]
                row: Row = {**keys, "solver": name, "ms": ms(found)}
                reference = times.get(REFERENCE)
                row["times as fast as autograd"] = over(reference, found)
                if name == "auto":
                    row["takes"] = auto_solver(P).name
                if isinstance(found, Time) and not isinstance(call, str):
                    row["error"] = relative_error(functions[name](P[:4]), truth)
                    if name == ISQRT or (name in SOLVERS and SOLVERS[name]().traceable and name != "pade"):
                        rate = count_operations(call) / found.minimum
                        row |= {"FLOP/s": rate, "share of the peak": rate / work.peaks[how]}
                rows.append(row | failure(found))
            work.write(rows)


def crossovers(rows: Iterable[Row]) -> list[Row]:
    """For each size the least batch from which on products were faster than the decomposition, what ``auto`` took
    there, and how far it was from the fastest exact solver at worst."""
    times: dict[int, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["function"] == "sqrt" and row["precision"] == "float32" and row["ms"] is not None:
            cell = times.setdefault(row["size"], {}).setdefault(row["batch"], {})
            cell[row["solver"]] = row["ms"]
            if row["solver"] == "auto":
                cell["takes"] = row["takes"]
    found = []
    for size, batches in sorted(times.items()):
        both = {b: c for b, c in sorted(batches.items()) if {"eigh", "minimax_or_eigh"} <= c.keys()}
        faster = [b for b, c in both.items() if c["minimax_or_eigh"] < c["eigh"]]
        first = next((b for b in faster if all(other in faster for other in both if other >= b)), None)
        switched = [b for b, c in both.items() if c.get("takes") == "minimax_or_eigh"]
        # Auto and the solver that it takes are the same code: what they differ by is noise.
        losses = {
            b: min(c["auto"], c[c["takes"]]) / min(c[name] for name in EXACT if name in c)
            for b, c in both.items()
            if "auto" in c and c.get("takes") in c
        }
        worst = max(losses, key=lambda b: losses[b]) if losses else None
        found.append(
            {
                "size": size,
                "batches": " ".join(map(str, both)),
                "eigh / products": " ".join(f"{c['eigh'] / c['minimax_or_eigh']:.2g}" for c in both.values()),
                "products are faster from batch": first,
                "auto takes them from batch": min(switched, default=None),
                "auto / best, worst": None if worst is None else losses[worst],
                "at batch": worst,
            }
        )
    return found


# -------------------------------------------------------------------------------------------------------- steps


NETWORKS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "batch norm": ("batch", None),
    "decorrelated first norm": ("zca", None),
    "IterNorm first": ("iter", None),
    "every norm, groups of 16": ("batch", {"group_size": 16}),
    "every norm, groups of 64": ("batch", {"group_size": 64}),
    "every norm IterNorm, groups of 64": ("batch", {"group_size": 64, "solver": NewtonSchulz(5, tolerance=None)}),
}
TREATED = ("decorrelated first norm", "IterNorm first")


def training_step(work: Work, network: str, treatments: str, how: str) -> Call:
    """A whole step of SGD with momentum on one batch of images."""
    torch.manual_seed(0)
    model, width, size = ("resnet8", 8, (4, 3, 8, 8)) if work.tiny else ("resnet18", 64, (128, 3, 32, 32))
    norm, replaced = NETWORKS[network]
    net = build_model(model, num_classes=100, norm=norm, width=width)
    if replaced is not None:
        replace_batchnorm(net, "all", **replaced)
    net.to(work.device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    treatment = treat(net, optimizer, treatments) if treatments else None
    x = torch.randn(size, device=work.device)
    y = torch.randint(0, 100, (size[0],), device=work.device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(work.device.type, torch.bfloat16, enabled=how == "bfloat16"):
            loss = nn.functional.cross_entropy(net(x), y)
        (loss + treatment.loss() if treatment and "ol" in treatments.split("+") else loss).backward()
        optimizer.step()
        return loss.detach()

    return step


def steps_of(how: str) -> list[tuple[str, str]]:
    """Networks and treatments; the treatments one by one in float32 alone."""
    found = [(network, "") for network in NETWORKS]
    found += [(network, "nog+ow+olr") for network in TREATED]
    return found + ([(TREATED[0], name) for name in ("sn", "ol", "ow", "nog", "olr")] if how == "float32" else [])


def steps(work: Work) -> None:
    """Whole steps in turns, of batch norm's and of the untreated."""
    for how in PRECISIONS:
        if not work.wants(f"steps {how}", "steps", precision=how):
            continue
        with precision(how):
            calls = made({f"{n}|{t}": partial(training_step, work, n, t, how) for n, t in steps_of(how)})
            times = work.times({key: call for key, call in calls.items() if not isinstance(call, str)}, 12.0)
            rows = []
            for key, call in calls.items():
                network, treatments = key.split("|")
                found = call if isinstance(call, str) else times[key]
                row: Row = {"precision": how, "network": network, "treatments": treatments or "none", "ms": ms(found)}
                row["of batch norm"] = over(found, times.get("batch norm|"))
                row["of the untreated"] = over(found, times.get(f"{network}|")) if treatments else None
                if isinstance(found, Time) and not isinstance(call, str):
                    row["peak memory, MiB"] = peak_bytes(call, work.device) / 2**20
                rows.append(row | failure(found))
            work.write(rows)


# -------------------------------------------------------------------------------------------------------- waits


def waits(work: Work) -> None:
    """Times that the host waits in one call, the second one; the backward pass is part of it."""
    d = 4 if work.tiny else 64
    x = torch.randn(16, d, 4, 4, device=work.device, requires_grad=True)
    P = make_input(Case("sqrt", (8, d, d)), torch.float32, work.device).requires_grad_()
    layers: dict[str, Any] = {
        "BatchNorm2d": nn.BatchNorm2d(d),
        "DecorrelatedBatchNorm2d": DecorrelatedBatchNorm2d(d),
        "DecorrelatedBatchNorm2d, minimax": DecorrelatedBatchNorm2d(d, solver="minimax"),
        "IterNorm2d": IterNorm2d(d),
        "GlobalCovariancePool2d": GlobalCovariancePool2d(d),
        "GlobalCovariancePool2d, newton_schulz": GlobalCovariancePool2d(d, solver=NewtonSchulz(5, tolerance=None)),
    }
    makers: dict[str, Callable[[], Call]] = {
        name: partial(training, layer.to(work.device).train(), x) for name, layer in layers.items()
    }
    for name, make in SOLVERS.items():
        solver = make()
        solver.tolerance = None
        makers[f"sqrtm, {name}"] = partial(training, partial(sqrtm, solver=solver), P)
    for network, treatments in steps_of("float32"):
        label = f"step, {network}" + f", {treatments}" * bool(treatments)
        makers[label] = partial(training_step, work, network, treatments, "float32")
    for name, make in makers.items():
        if not work.wants(f"waits {name}", "waits", what=name):
            continue
        found: Any = None
        try:
            call = make()
            call()
            count = host_waits(call, work.device)
        except Exception as error:
            count, found = None, reason(error)
        work.write([{"what": name, "host waits": count} | failure(found)])


# ------------------------------------------------------------------------------------------------------- graphs


def captured(step: Call, device: torch.device) -> Call:
    """The step as a CUDA graph, after three steps that make states and choose kernels."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph, result = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        result.append(step())

    def replay() -> Any:
        graph.replay()
        return result[0]

    return replay


def graphs(work: Work) -> None:
    """Steps launched one kernel after another, and as a graph; what reads a value on the way cannot be captured."""
    # First those that read nothing: a capture that fails may leave the device in no state for another.
    chosen = [("batch norm", ""), ("IterNorm first", ""), ("every norm IterNorm, groups of 64", "")]
    chosen += [("IterNorm first", t) for t in ("sn", "nog", "ow", "olr", "nog+ow+olr")]
    chosen += [("decorrelated first norm", ""), ("decorrelated first norm", "nog+ow+olr")]
    for network, treatments in chosen:
        keys = {"network": network, "treatments": treatments or "none"}
        if not work.wants(f"graphs {network} {treatments}", "graphs", **keys):
            continue
        row: Row = dict(keys)
        try:
            step = training_step(work, network, treatments, "float32")
            if work.device.type != "cuda":
                step()
                row["failure"] = f"no graphs on {work.device.type}"
            else:
                row["ms"] = ms(work.times({"launched": step})["launched"])  # in case that it cannot be captured
                replay = captured(step, work.device)
                both = work.times({"launched": step, "graph": replay}, 2.0)
                row |= {"ms": ms(both["launched"]), "ms as a graph": ms(both["graph"])}
                row["launched / graph"] = over(both["launched"], both["graph"])
                row["loss is finite"] = bool(torch.isfinite(replay()))  # pyright: ignore[reportArgumentType]
        except Exception as error:
            row["failure"] = reason(error)
        work.write([row])


# ---------------------------------------------------------------------------------------------------- the whole


SECTIONS: dict[str, tuple[Callable[[Work], None], float]] = {
    "norms": (norms, 0.22),
    "solvers": (solvers, 0.34),
    "steps": (steps, 0.22),
    "waits": (waits, 0.1),
    "graphs": (graphs, 0.12),
}
"""In their order, with their shares of the time; what one does not use is for those after it."""


class Results:
    """The file of results, rewritten whenever something is known; and the page made of it."""

    def __init__(self, out: Path) -> None:
        self.path, self.page = out / "on_a_gpu.json", out / "on_a_gpu.md"
        self.data: dict[str, Any] = {"machine": None, "tiny": False, "sections": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def section(self, name: str) -> dict[str, Any]:
        return self.data["sections"].setdefault(name, {"state": "not begun", "rows": [], "no time for": []})

    def save(self) -> None:
        write_json(self.path, self.data)
        write_atomically(self.page, page(self.data).encode())


def page(data: Mapping[str, Any]) -> str:
    """All results as Markdown."""
    parts = ["# On a GPU" + " (tiny: no figures)" * bool(data["tiny"])]
    if data["machine"] is not None:
        flat = {key: value for key, value in data["machine"].items() if not isinstance(value, dict)}
        parts.append(", ".join(f"{key} {value}" for key, value in flat.items()))
        peaks = data["machine"]["peak_flops_per_second"]
        parts.append(", ".join(f"{name}: {rate / 1e12:.3g} TFLOP/s" for name, rate in peaks.items()))
    for name, section in data["sections"].items():
        parts += [f"## {name}", f"{SECTIONS[name][0].__doc__} State: {section['state']}.", table(section["rows"])]
        if name == "solvers":
            parts += ["### Crossovers", table(crossovers(section["rows"]))]
        if section["no time for"]:
            parts.append("No time for: " + "; ".join(section["no time for"]) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def table(rows: Iterable[Row]) -> str:
    """Rows with any keys as one table; what a row does not have is a dash."""
    rows = list(rows)
    heads = list(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        return ""
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(shown(row.get(head)) for head in heads) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def shown(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def run_section(name: str, results: Results, device: torch.device, seconds: float) -> None:
    """One section in this process; rows are saved one by one."""
    section = results.section(name)
    rows = section["rows"]

    def write(new: list[Row]) -> None:
        rows.extend(new)
        results.save()

    known = {key: list(value["rows"]) for key, value in results.data["sections"].items()}
    peaks = results.data["machine"]["peak_flops_per_second"]
    work = Work(device, results.data["tiny"], time.monotonic() + seconds, write, known, peaks)
    section["state"] = "begun"
    results.save()
    SECTIONS[name][0](work)
    section["state"], section["no time for"] = ("out of time" if work.skipped else "done"), work.skipped
    results.save()


def run_all(options: argparse.Namespace, began: float) -> bool:
    """Every section in a process of its own; whether all were done."""
    whole = 60.0 * options.minutes
    names = [name for name in SECTIONS if not options.only or name in options.only]
    left = sum(SECTIONS[name][1] for name in names)
    for name in names:
        share = SECTIONS[name][1]
        limit = (whole - (time.monotonic() - began)) * share / left
        left -= share
        state = Results(options.out).section(name)["state"]
        if state == "done" or limit < 2 * OVERHEAD:
            print(f"{name}: {'done before' if state == 'done' else 'no time'}", flush=True)
            continue
        command = [sys.executable, str(Path(__file__)), "--out", str(options.out), "--device", str(options.device)]
        command += ["--section", name, "--seconds", f"{limit - OVERHEAD:.1f}"]
        start = time.monotonic()
        try:
            # Past its deadline a section ends what it is at; that must not take the time of the others.
            status = subprocess.run(command, timeout=limit + OVERHEAD).returncode
            ended = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            ended = "stopped at its time limit"
        results = Results(options.out)
        section = results.section(name)
        if ended:
            section["state"] = ended
            results.save()
        print(
            f"{name}: {section['state']}, {len(section['rows'])} rows, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    print(f"wrote {Results(options.out).page}")
    return all(Results(options.out).section(name)["state"] == "done" for name in names)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.3, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, to see whether it works")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.section:
        run_section(options.section, Results(options.out), device, options.seconds)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out)
    if results.data["machine"] is not None and not options.resume:
        parser.error(f"{options.out} holds results: give --resume to go on with them, or another --out")
    if results.data["machine"] is None:
        results.data |= {"machine": machine(device, options.tiny), "tiny": options.tiny}
        results.save()
    sys.exit(not run_all(options, began))


if __name__ == "__main__":
    main()
