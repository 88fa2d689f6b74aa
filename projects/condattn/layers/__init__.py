"""The layers and hooks that implement conditioning; they receive plain values, and do not depend on the methods."""
