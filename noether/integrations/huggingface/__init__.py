"""noether's callbacks in the `Trainer` of Hugging Face transformers.

    callback = NoetherCallback(callbacks, directory=open_run("runs/mine"))
    trainer = NoetherTrainer(model, args, train_dataset=dataset, callbacks=[callback])
    trainer.train()

transformers does not pass the loss of a step or its number of samples to callbacks. The documented way to get them is a
subclass that overrides `training_step` and `compute_loss`: `NoetherMixin` does that for any trainer, as in
`class MyTrainer(NoetherMixin, SFTTrainer): ...`; `NoetherTrainer` is `Trainer` with it. With a trainer that does not
report its losses, the callback refuses the first update.

| transformers | noether | with |
|---|---|---|
| `on_train_begin` | `BeforeTraining`, then a missing `AfterEpoch` | `resumed` after `resume_from_checkpoint` |
| `training_step` starts | | ends the wait for data |
| `training_step`, after backward | `AfterAccumulationStep`, if a callback handles it | losses, outputs, samples; before the optimizer steps |
| `on_step_end` | `AfterUpdate` | losses, outputs, samples, learning rates of the step, `grad_norm` and `gradients` before clipping if a callback reads them |
| the same, if a gradient scaler skipped the step | `AfterUpdate(skipped=True)` | |
| `on_epoch_end` | `AfterEpoch` | if all updates of the epoch are counted |
| `on_save`, `resume_from_checkpoint` | `state_dict`, `load_state_dict` | in the checkpoints of transformers, as `noether.safetensors` |
| `on_train_end` | `AfterTraining` | at the end of the run, or if `state.stop` gives a reason |
| `state.stop` | `control.should_training_stop` | right after the event; a stopped run makes no update when it is resumed |

Differences from noether's trainer:

- `losses` has one entry, `total`: the loss of the trainer's backward, with label smoothing and `compute_loss_func`. For
  an update it is the sum of the shares of its micro-batches. If the loss is a mean over each micro-batch, transformers
  divides by their number and not by their samples: the sum is their plain mean, including a short last one.
- If transformers stops for another reason, the run has not ended: it can resume, and `AfterTraining` is not dispatched.
- With `fp16` the gradient scaler is accelerate's; noether's checkpoints hold its scale, and `grad_norm` and `gradients` are
  unscaled.
- The learning rate is the scheduler's times `hyperparams["lr_scale"]`; transformers logs the scheduler's.
- transformers ends a run by `max_steps`, so `run.end` is a number of updates.
- An evaluation by the trainer (`eval_strategy`) dispatches no event. Callbacks evaluate `Run(data={...})` with the loss
  of the model, or with `Run(forward=...)`.
- The order of data is a function of `args.data_seed` and the epoch. Dropout draws from torch's generator, whose state is
  in the checkpoints of transformers and of noether; `to_checkpoint` writes it. Within an epoch, transformers restores it
  after it has read the batches of the next update, so there a dataset that draws random numbers itself draws others.
- On several processes all is as in `Session`: samples are summed, including those that accelerate repeats at the end of an
  epoch, and the loss of an update is the plain mean over processes, as transformers averages the gradients.
- `forward_s`, `backward_s` and `optimizer_s` are missing.
- Models sharded by FSDP or DeepSpeed are not supported, because no process has the whole model; nor is a hyperparameter
  search, whose trials save elsewhere.
"""  # noqa: E501  # a table

from noether.integrations.huggingface.callback import NoetherCallback
from noether.integrations.huggingface.checkpoints import to_checkpoint
from noether.integrations.huggingface.trainer import NoetherMixin, NoetherTrainer

__all__ = ["NoetherCallback", "NoetherMixin", "NoetherTrainer", "to_checkpoint"]
