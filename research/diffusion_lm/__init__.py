"""Language models by masked diffusion: losses and likelihood."""
