"""zconvert: turns autoregressive Mixture-of-Experts checkpoints into block-diffusion models by the TiDAR recipe."""

__version__ = "0.1.0"
