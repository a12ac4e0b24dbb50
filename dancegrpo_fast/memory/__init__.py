"""Predicts, chooses and measures memory: real diffusers models on fake tensors."""
