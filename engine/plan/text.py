"""Words and numbers of a plan as people read them, in tables, pictures, messages and on command lines."""

from typing import TYPE_CHECKING, Any

from ..config import GIB

if TYPE_CHECKING:
    from .run import PlannedRun


def words(name: str) -> str:
    return name.replace("_", " ")


def seconds_text(seconds: float) -> str:
    """Seconds with three digits: 21.3 s, 840 ms, 12.5 us."""
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def printed_seconds(seconds: float) -> float:
    """The number that `seconds_text` prints, in seconds."""
    return float(round(seconds)) if seconds >= 1000 else float(f"{seconds:.3g}")


def gib_text(size_bytes: float) -> str:
    """Bytes as GiB with one digit behind the point, without the unit."""
    return f"{size_bytes / GIB:,.1f}"


def value_text(value: Any) -> str:
    """A setting's value as it is typed behind its flag; "" for an empty tuple, which is the flag alone."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flag_text(setting: str, value: Any) -> str:
    """What a person types for a setting of this path: --layout.tp 4, --training.fsdp, --training.no-fsdp."""
    path, _, name = setting.replace("_", "-").rpartition(".")
    path = f"{path}." if path else ""
    if isinstance(value, bool):
        return f"--{path}{'' if value else 'no-'}{name}"
    return f"--{path}{name} {value_text(value)}".rstrip()


def layout_text(run: "PlannedRun") -> str:
    """The layout in a few words, axes of one rank left out: "tp 4 sp · pp 8 vpp 4 interleaved · dp 8 · ep 32"."""
    layout = run.layout
    more = {
        "tp": " sp" if layout.sp else "",
        "cp": f" {layout.cp_kind}",
        "pp": (f" vpp {layout.vpp}" if layout.vpp > 1 else "") + f" {layout.schedule}",
    }
    axes = ("tp", "cp", "pp", "dp", "etp", "ep") if run.shape.moe is not None else ("tp", "cp", "pp", "dp")
    sizes = {axis: getattr(layout, axis) for axis in axes}
    return " · ".join(f"{axis} {size}{more.get(axis, '')}" for axis, size in sizes.items() if size > 1) or "one rank"


def states_texts(run: "PlannedRun") -> list[str]:
    """What a trainer keeps of its weights, gradients and optimizer, and where."""
    training, plan = run.training, run.rollout
    return list(
        filter(
            None,
            (
                "FSDP" if training.fsdp else "ZeRO-1",
                "" if training.gradient_dtype_bytes == 4 else f"gradients of {training.gradient_dtype_bytes} bytes",
                "" if training.moment_dtype_bytes == 4 else f"moments of {training.moment_dtype_bytes} bytes",
                "" if training.master_weights else "no master weights",
                "optimizer on the host" if training.offload_optimizer else "",
                "trainer on the host while generating" if plan is not None and plan.offload_training else "",
            ),
        )
    )


def recompute_text(run: "PlannedRun") -> str:
    parts, layers = run.training.recompute, run.training.recompute_layers
    if not parts:
        return "no recompute"
    return f"recompute {', '.join(map(words, parts))}" + (f" in {layers} layers a rank" if layers else "")


def engines_text(run: "PlannedRun") -> str:
    """How a run with a rollout generates: one engine's degrees and share of memory, placement and GPUs."""
    plan = run.rollout
    degrees = {"tp": plan.tp, "pp": plan.pp, "ep": plan.ep}
    engine = " ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1) or "one GPU"
    where = f"on {run.rollout_gpus} of {run.gpus} GPUs, {run.training_gpus} train" if run.placement == "split" else "colocated"
    return f"engines of {engine} with {plan.memory_fraction:.3g} of the memory, {where}"


def settings_text(run: "PlannedRun") -> str:
    """Everything that layouts of one search differ in beside `layout_text`."""
    stages = f"stages of {value_text(run.stage_layers)} layers" if run.stage_layers else ""
    precision = "" if run.training.precision == "bf16" else run.training.precision
    found = [f"micro-batch {run.training.micro_batch_sequences}", precision, recompute_text(run), stages, *states_texts(run)]
    return "; ".join(filter(None, [*found, engines_text(run) if run.rollout is not None else ""]))
