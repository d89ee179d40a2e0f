"""Adapters: read, identified, kept in host memory, placed on the device. Knows nothing of layers."""
