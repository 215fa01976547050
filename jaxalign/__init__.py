"""Video diffusion transformers, trained while their hidden tokens are aligned with frozen visual teachers."""

__version__ = "0.1.0"
