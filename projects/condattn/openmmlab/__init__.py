"""Everything that depends on OpenMMLab; importing this package imports none of its modules."""
