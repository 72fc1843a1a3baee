"""Datasets, symbolic scenes and the texts that the nano core learns."""
