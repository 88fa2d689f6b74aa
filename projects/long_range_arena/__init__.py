"""The Long Range Arena (arXiv 2011.04006): five classifications of long sequences, for a conditioned Nystromformer."""
