"""What a person and other tools see of a run: progress bar, TensorBoard, W&B."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from factorlm.errors import ConfigError
from factorlm.eval.loss import perplexity
from factorlm.measure import matmul_flops_per_second
from factorlm.records import EvalRecord, EventRecord, MonitorRecord, RunRecord, StepRecord
from factorlm.train.callbacks import Callback
from factorlm.train.config import TrackingSection

if TYPE_CHECKING:
    from factorlm.train.trainer import Trainer

LINE_SECONDS = 5.0
"""Where there is no terminal: shortest time between two progress lines."""
REFRESH_SECONDS = 0.25
"""In a terminal: shortest time between two drawings of the bar."""
WINDOW = 50
"""Steps over which the shown loss and speed are averaged."""


class ProgressBar(Callback):
    """Loss, perplexity, tokens/s, model FLOP utilisation and time left.

    A bar in a terminal; elsewhere a line every few seconds. Utilisation is relative to the matmul
    rate that the machine reached just before, in the dtype of the run, times its processes.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._recent: deque[StepRecord] = deque(maxlen=WINDOW)
        self._shown = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._tokens_per_step = 0
        self._peak_tokens_per_second = math.inf

    def on_start(self, trainer: Trainer, run: RunRecord) -> None:
        self._tokens_per_step = run.tokens_per_step
        peak = matmul_flops_per_second(trainer.matmul_dtype, trainer.world.device)
        rate = trainer.world.size * peak / (3 * run.forward_flops_per_token)
        self._peak_tokens_per_second = rate
        self._print(
            f"{run.name}: {run.num_params:,} parameters ({run.num_ffn_params:,} in the FFN), "
            f"{run.num_steps:,} steps of {run.tokens_per_step:,} tokens, "
            f"{run.training_flops:.3g} FLOPs; {trainer.world.device}, "
            f"{str(trainer.matmul_dtype).removeprefix('torch.')}"
        )
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(
            run.name, total=run.num_steps, completed=trainer.state.step, status=""
        )
        self._bar.start()

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._recent.append(record)
        last = record.step == trainer.plan.num_steps
        pause = REFRESH_SECONDS if self._bar else LINE_SECONDS
        if not last and time.monotonic() - self._shown < pause:
            return
        self._shown = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=record.step, status=self._status())
            self._bar.refresh()
        else:
            left = (trainer.plan.num_steps - record.step) * self._mean("step_ms") / 1000
            self._print(
                f"step {record.step}/{trainer.plan.num_steps}  {self._status()}  "
                f"left {_clock(left)}"
            )

    def on_eval_progress(self, trainer: Trainer, done: int, total: int) -> None:
        if self._bar and time.monotonic() - self._shown > REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._bar.update(self._task, status=f"evaluating {done / max(total, 1):.0%}")
            self._bar.refresh()

    def on_eval(self, trainer: Trainer, record: EvalRecord) -> None:
        bits = record.bits_per_byte
        self._print(
            f"step {record.step}  validation loss {record.loss:.4f}  "
            f"perplexity {record.perplexity:.2f}"
            + (f"  bits per byte {bits:.4f}" if bits is not None else "")
        )

    def on_event(self, trainer: Trainer, record: EventRecord) -> None:
        if record.event != "saved":
            detail = ", ".join(f"{key} {_short(value)}" for key, value in record.detail.items())
            self._print(f"step {record.step}  {record.event}" + (f": {detail}" if detail else ""))

    def on_end(self, trainer: Trainer) -> None:
        if self._bar:
            self._bar.stop()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _mean(self, name: str) -> float:
        return sum(getattr(record, name) for record in self._recent) / len(self._recent)

    def _status(self) -> str:
        loss = self._mean("loss")
        speed = self._tokens_per_step * 1000 / self._mean("step_ms")
        # A machine that was busy while its rate was measured shows more now.
        self._peak_tokens_per_second = max(self._peak_tokens_per_second, speed)
        return (
            f"loss {loss:.4f}  ppl {perplexity(loss):.2f}  {speed:,.0f} tok/s  "
            f"MFU {speed / self._peak_tokens_per_second:.1%}"
        )


class Tracker(Callback):
    """Sends the numbers of steps, evaluations and monitors to ``log(values, step)``."""

    def __init__(
        self, log: Callable[[dict[str, float], int], None], close: Callable[[], None]
    ) -> None:
        self._log = log
        self._close = close

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        names = ("loss", "learning_rate", "grad_norm", "step_ms", "num_tokens")
        self._log({f"train/{name}": getattr(record, name) for name in names}, record.step)

    def on_eval(self, trainer: Trainer, record: EvalRecord) -> None:
        names = ("loss", "perplexity", "bits_per_byte")
        values = {f"{record.source}/{name}": getattr(record, name) for name in names}
        self._log({k: v for k, v in values.items() if v is not None}, record.step)

    def on_monitor(self, trainer: Trainer, record: MonitorRecord) -> None:
        alpha = record.guide_alpha
        values = {} if alpha is None else {"monitor/guide_alpha": alpha}
        for name, layer in record.layers.items():
            found = {f"norm_{factor}": norm for factor, norm in layer["factor_norms"].items()}
            found["product_rms"] = layer["product_rms"]
            found["change_rms"] = layer["change_rms"]
            found["grad_norm"] = layer["grad_norm"]
            values |= {f"monitor/{name}/{key}": value for key, value in found.items()}
        self._log(values, record.step)

    def on_end(self, trainer: Trainer) -> None:
        self._close()


def trackers(tracking: TrackingSection, trainer: Trainer) -> list[Callback]:
    """The callbacks that ``tracking`` asks for. Raises ``ConfigError`` if a package is missing."""
    found: list[Callback] = []
    if tracking.tensorboard:
        found.append(_tensorboard(trainer))
    if tracking.wandb_project is not None:
        found.append(_wandb(tracking.wandb_project, trainer))
    return found


def _tensorboard(trainer: Trainer) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tracking.tensorboard=True needs tensorboard: pip install 'factorlm[track]'"
        ) from None
    writer = SummaryWriter(str(trainer.run.path / "tensorboard"), purge_step=trainer.state.step + 1)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(project: str, trainer: Trainer) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"tracking.wandb_project={project!r} needs wandb: pip install 'factorlm[track]'"
        ) from None
    name: str = trainer.config.name
    run: Any = wandb.init(
        project=project, name=name, id=name, resume="allow", config=trainer.config.to_dict()
    )
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def _short(value: object) -> str:
    """A number as a line wants it: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
