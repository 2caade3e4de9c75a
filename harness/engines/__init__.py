"""Engines other than klab's own that train cells; `training.engine` chooses."""
