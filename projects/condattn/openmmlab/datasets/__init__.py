"""Data sets for OpenMMLab; importing this package imports none of its modules."""
