"""Layers that read the step's batch: tensors and pool rows in, never adapter names."""
