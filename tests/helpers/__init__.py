"""What several tests share: problems, optimizers, runs and their bits, pools of worker processes."""
