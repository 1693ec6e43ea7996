"""Training: the recipe of a run, optimizers, checkpoints, callbacks and curves around transformers' Trainer."""
