"""Mosaic BERT, HF BERT, attention and its kernels, checkpoints, export."""
