"""The Trainer: our order of samples, one log line a step, an end at a signal, checkpoints that say when they are whole."""

import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from surf import checkpoints
from surf.errors import SurfError
from surf.samples import Sample
from surf.training.processes import any_process
from surf.training.speed import Cost, Meter

log = logging.getLogger("surf")


def trainer(
    model: Any, arguments: Any, samples: list[Sample], collator: Any, processor: Any, caught: list[int], cost: Cost
) -> Any:
    """A `transformers.Trainer` for `samples`, which stand in the order of training.

    Args:
        caught: numbers of signals, filled from outside; the training ends after the step in which one arrives.
    """
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainerCallback

    group = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    meter = Meter(samples, group, arguments.world_size, cost)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(samples)

        def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
            # It would look for the model's own parameter names in the checkpoint, where they have their published names, and
            # go on with untrained weights: `network.load` has read them. (DeepSpeed's checkpoints are not read here.)
            pass

        def create_optimizer(self, *args: Any, **keywords: Any) -> Any:
            optimizer = super().create_optimizer(*args, **keywords)
            # DeepSpeed makes the moments before it reads those of a checkpoint: both at once would not fit where training does
            optimizer.register_load_state_dict_pre_hook(lambda own, _: own.state.clear())
            return optimizer

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            # DeepSpeed's checkpoints hold the weights themselves; to gather them as well takes minutes and their room twice.
            if not (_internal_call and self.is_deepspeed_enabled):
                super().save_model(output_dir, _internal_call)

        def get_batch_samples(self, *args: Any, **keywords: Any) -> Any:
            start = time.monotonic()
            batches = super().get_batch_samples(*args, **keywords)
            meter.wait(time.monotonic() - start)
            return batches

        def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
            if "loss" in logs:
                logs |= meter.figures()
            super().log(logs, *args, **keywords)

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            logs = more["logs"]
            if "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                what = f"the loss is {logs['loss']} at step {state.global_step}"
                raise SurfError(what, expected="a number", next="lower finetune.learning_rate, or set lvlm.dtype: float32")
            log.info("step %d/%d  %s", state.global_step, state.max_steps, line(logs, state.max_steps - state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.step(state.global_step)
            if state.global_step >= state.max_steps:
                control.should_save = False  # the model itself comes next; a checkpoint here would be resumed beyond the end
            elif any_process(bool(caught), args.device):
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            any_process(False, args.device)  # every process has written its part
            if not checkpoints.rank():
                checkpoints.mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    made = InOrder(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collator,
        processing_class=processor,
        callbacks=[Watcher()],
    )
    made.remove_callback(PrinterCallback)
    return made


def line(logs: dict[str, float], steps_left: int) -> str:
    """One step in words: loss, learning rate, samples a second, MFU, memory, share of time without data, time left."""
    words = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}", f"{logs['samples_per_second']:.2f} samples/s"]
    if "mfu" in logs:
        words.append(f"{logs['mfu']:.1%} MFU")
    if "memory_gib" in logs:
        words.append(f"{logs['memory_gib']:.1f} GiB")
    words.append(f"{logs['data_wait']:.0%} waiting for data")
    return "  ".join([*words, f"{timedelta(seconds=round(steps_left * logs['seconds_per_step']))} left"])
