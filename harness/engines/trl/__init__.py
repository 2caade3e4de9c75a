"""Cells trained by `trl.GRPOTrainer` with klab's objective as its loss. Nothing here is imported by other cells."""
