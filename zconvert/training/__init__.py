"""Diffusion mid-training: objective, loop, train state, and the stages of the recipe."""
