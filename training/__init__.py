"""Everything that makes the two models packaged with skimp: `tales` and its draft."""
