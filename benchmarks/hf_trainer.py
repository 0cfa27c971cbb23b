"""The arm of Hugging Face's Trainer: its own loop, loader and mixed precision, on the model that the arm `hf` has."""

import itertools
import queue
import threading

import torch
from arms import TorchArm, batches_of
from transformers import Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.IterableDataset):
    """The rows of the batches in order, without end."""

    def __init__(self, batches):
        rows = [row for batch in batches for row in zip(*batch, strict=True)]
        self.rows = [(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long()) for tokens, targets in rows]

    def __iter__(self):
        for tokens, targets in itertools.cycle(self.rows):
            # `labels` alone would be shifted by the model, which would lose the last target of each row.
            yield {"input_ids": tokens, "labels": targets, "shift_labels": targets}


class Turns(TrainerCallback):
    """Holds Trainer.train, which runs in a thread of its own, until steps are asked for; a step ends where the next begins."""

    def __init__(self):
        self.asked, self.done, self.left = queue.SimpleQueue(), queue.SimpleQueue(), 0

    def wait(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.done.put(None)
        self.left = self.asked.get()

    def on_train_begin(self, args, state, control, **_):
        self.wait()

    def on_step_end(self, args, state, control, **_):
        torch._dynamo.config.error_on_recompile = True  # of this thread; as in the other arms, after the first step
        self.left -= 1
        if not self.left:
            self.wait()


class Recorded(Trainer):
    """Keeps loss and gradient norm of each step on the device. Trainer's own log would read them there, and wait."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.losses, self.norms = [], []
        clip = self.accelerator.clip_grad_norm_

        def clip_and_keep(*arguments):
            self.norms.append(clip(*arguments))
            return self.norms[-1]

        self.accelerator.clip_grad_norm_ = clip_and_keep

    def training_step(self, *arguments, **named):
        """-> the loss of a micro-batch, as its share of the batch's."""
        self.losses.append(super().training_step(*arguments, **named))
        return self.losses[-1]


class TrainerArm(TorchArm):
    def prepare(self, device):
        config, self.turns = self.config, Turns()
        arguments = TrainingArguments(
            output_dir=self.folder / "trainer", per_device_train_batch_size=config.batch_size // config.grad_accum_steps,
            gradient_accumulation_steps=config.grad_accum_steps, max_steps=10**9, lr_scheduler_type="constant",
            learning_rate=config.optimizer.learning_rate, max_grad_norm=config.optimizer.clip_norm, bf16=self.autocast,
            torch_compile=True, use_cpu=not self.gpu, logging_strategy="no", logging_nan_inf_filter=False, save_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=self.gpu,
            # One worker keeps the order of the rows. On a CPU it would take a core from the step.
            dataloader_num_workers=int(self.gpu), accelerator_config={"dispatch_batches": False})
        # The optimizer is the other arms', so that it decays the same parameters; fused, as adamw_torch_fused.
        self.trainer = Recorded(model=self.model.model, args=arguments, train_dataset=Rows(batches_of(config)),
                                optimizers=(self.optimizer, None), callbacks=[self.turns])
        threading.Thread(target=self.run, daemon=True).start()
        self.wait()

    def run(self):
        try:
            self.trainer.train()
        except Exception as error:
            self.turns.done.put(error)

    def wait(self):
        error = self.turns.done.get()
        if error is not None:
            raise error

    def train(self, steps):
        trainer, accum = self.trainer, self.config.grad_accum_steps
        trainer.losses, trainer.norms = [], []
        self.turns.asked.put(steps)
        self.wait()
        losses = [sum(trainer.losses[i : i + accum]) for i in range(0, len(trainer.losses), accum)]
        return list(zip(losses, trainer.norms, strict=True))
