"""What the binaries share: configs, data, checkpoints, the training loop."""
