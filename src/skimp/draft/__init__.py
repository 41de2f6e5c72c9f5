"""Trained draft heads: their files (``files``), what they begin as (``start``) and how they learn
(``train``, which nothing that serves imports)."""

from skimp.draft.files import read_head, training_record, write_head

__all__ = ["read_head", "training_record", "write_head"]
