"""What concerns OpenMMLab. Importing this package imports nothing."""
