"""Adapters of vLLM."""
