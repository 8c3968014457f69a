"""Print a plan for people: one table, what it is based on and how far off it may be."""

from rich.console import Console
from rich.table import Table

from launchers.plan.clusters import GIB
from launchers.plan.make import RunPlan, first_limit
from launchers.plan.memory import ERRORS, STATE
from launchers.plan.textbook import states_bytes

UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show(plan: RunPlan, best: RunPlan | None, console: Console) -> None:
    """Print the table, the advice and the basis of the figures."""
    console.print(_table(plan, best))
    for line in notes(plan, best):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(plan: RunPlan, best: RunPlan | None) -> Table:
    train, cluster = plan.config.train, plan.cluster
    title = f"{plan.config.run} on {cluster.nodes} x {cluster.per_node} {cluster.device.name}"
    table = Table(title=title, show_header=False, title_justify="left")
    for _ in range(2):
        table.add_column(overflow="fold")  # wrap on a narrow terminal, cut nothing
    table.add_row("model", f"{plan.config.model.kind}, {plan.parameters:,} parameters, {train.precision}")
    if frozen := plan.parameters - plan.traced.trained:
        table.add_row("", f"{plan.traced.trained:,} of them train, {frozen:,} are frozen")
    split = f"{train.global_batch} = {cluster.world} ranks x {plan.micro} x {plan.accumulation} accumulated"
    table.add_row("batch", f"{split}, ZeRO stage {train.zero_stage}")
    table.add_section()
    for item in sorted(plan.memory.items, key=lambda item: -item.bytes):
        table.add_row(f"  {item.what}", f"{gib(item.bytes)}  ({item.kind})")
    table.add_row("memory per device", memory_line(plan))
    table.add_section()
    table.add_row("FLOPs", _flops_line(plan))
    for transfer in (one for one in plan.transfers if one.bytes):
        passed = f"{transfer.kind} of {unit(transfer.bytes, 'B')}, {transfer.times} per step"
        table.add_row(f"  {transfer.what}", passed)
    leaves = f", {unit(plan.sent_per_node, 'B')} sent per node" if cluster.nodes > 1 else ""
    table.add_row("traffic per step", f"{unit(plan.sent_per_rank, 'B')} sent per rank{leaves}")
    table.add_section()
    for name, text in _time_rows(plan):
        table.add_row(name, text)
    table.add_row("first limit", first_limit(plan, best))
    return table


def memory_line(plan: RunPlan) -> str:
    """Return used and available memory, the error and the margin, rather than a bare yes or no."""
    text = f"{gib(plan.memory.used)} of {gib(plan.cluster.memory)}, error at most {gib(plan.memory.error)}"
    if plan.margin >= 0:
        return f"{text}: {gib(plan.margin)} left in the worst case"
    short = plan.memory.used - plan.memory.error - plan.cluster.memory
    return f"{text}: {'more than there is' if short > 0 else 'may or may not be enough'}"


def _flops_line(plan: RunPlan) -> str:
    a_token = f", {unit(plan.sample_flops / plan.tokens, '')} per token" if plan.tokens else ""
    forward = unit(plan.forward_flops, "")
    return (
        f"{unit(plan.sample_flops, '')} per sample (forward {forward}){a_token}, {unit(plan.step_flops, '')} per step"
    )


def _time_rows(plan: RunPlan) -> list[tuple[str, str]]:
    slow, usual, fast = plan.paces
    parts = f"products {usual.products:.3g}, memory {usual.moved + usual.update:.3g}, network {usual.network:.3g}"
    batch = plan.config.train.global_batch
    days = sorted(plan.days)
    return [
        ("step", f"{usual.step:.3g} s, between {fast.step:.3g} and {slow.step:.3g}"),
        ("  of it", f"{parts} ({usual.exposed:.3g} of it exposed)"),
        ("samples/s", f"{batch / usual.step:.4g}, between {batch / slow.step:.4g} and {batch / fast.step:.4g}"),
        ("MFU", " ".join(f"{100 * share:.1f}" for share in plan.mfu) + " % (low, usual, high)"),
        ("days to finish", f"{days[1]:.3g}, between {days[0]:.3g} and {days[2]:.3g}; without saves and stalls"),
    ]


def notes(plan: RunPlan, best: RunPlan | None) -> list[str]:
    """Return the advice, what is not counted, and the basis of the figures."""
    kinds = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in ERRORS.items())
    size, world, stage = plan.parameters, plan.cluster.world, plan.config.train.zero_stage
    own = sum(item.bytes for item in plan.memory.items if item.kind == STATE)
    lines = [
        advice_line(plan, best),
        *not_counted(plan),
        f"States: {gib(own)}, weights in float32, of which autocast makes copies; in bf16 with a float32 master, as "
        f"textbooks have it, {gib(states_bytes(size, world, stage))}.",
        f"Errors of memory: {kinds}; all but the fixed part were measured, on a CPU.",
    ]
    if plan.cluster.device.on_gpu:
        lines.append("Times on GPUs assume the MFU of published runs; this code was never timed on one.")
    else:
        lines.append("This machine's arithmetic and memory were timed just now; give them to its processes alone.")
    return lines


def not_counted(plan: RunPlan) -> list[str]:
    """Return what makes this run's steps differ from the planned one."""
    lines = []
    if getattr(plan.config.task, "packing", False):
        lines.append("Counted with one row per sample; packing needs fewer rows, depending on the captions.")
    if waiting := [one.until_step for one in plan.config.optim.freeze if one.until_step]:
        lines.append(f"Counted as from step {max(waiting)} on; before, less trains.")
    if plan.config.train.batch_warmup:
        sizes = ", ".join(map(str, plan.config.train.batches[:-1]))
        lines.append(
            f"Counted with the whole batch; the first {plan.config.train.warmup} steps have batches of {sizes}."
        )
    if plan.traced.later:
        lines.append(f"Counted at the start of the run; later the {' and the '.join(plan.traced.later)} computes too.")
    return lines


def advice_line(plan: RunPlan, best: RunPlan | None) -> str:
    """Return the advice, as overrides that can be appended to the command."""
    if best is None:
        return "Advice: no ZeRO stage and micro-batch fits with a margin."
    text = f"train.zero_stage={best.config.train.zero_stage} train.micro_batch={best.micro}"
    if best.config.train.recompute != plan.config.train.recompute:
        text += f" train.recompute={str(best.config.train.recompute).lower()}"
    same = best.config.train.zero_stage == plan.config.train.zero_stage and best.micro == plan.micro
    gain = "the current setting" if same else f"{plan.paces[1].step / best.paces[1].step:.2f} times as fast"
    left = f"{gib(best.memory.used)} of memory, {gib(best.margin)} left with the error"
    return f"Advice: {text} ({best.accumulation} accumulated): {gain}, {left}."


def gib(size: float) -> str:
    """Format bytes as GiB, small ones as MiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / GIB * 1024:.1f} MiB"


def unit(value: float, name: str) -> str:
    """Format with an SI prefix: 1.23e9 -> 1.23 G."""
    for factor, letter in UNITS:
        if value >= factor:
            return f"{value / factor:.4g} {letter}{name}"
    return f"{value:.4g} {name}".rstrip()
