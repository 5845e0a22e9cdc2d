"""Models by name: small ones for reference, timm's, transformers', a user's own; and files of weights."""

from distcl.models.build import create_model

__all__ = ["create_model"]
