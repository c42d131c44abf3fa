"""surf: teach a vision-language model to use retrieved image-caption pairs selectively."""

__version__ = "0.1.0"
