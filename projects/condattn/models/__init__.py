"""Conditioned models under registered names; the faces of a toolbox's classes are in one module a toolbox."""
