"""Models by name: small ones, timm's, transformers', a user's own; and weights' files."""

from distcl.models.build import create_model

__all__ = ["create_model"]
