"""Pretrained weights of any naming, warm starts, and files that are whole or not there."""
