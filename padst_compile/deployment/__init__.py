"""Sparse models outside of the process that made them: files, exported programs."""

from padst_compile.deployment.export import decompose
from padst_compile.deployment.pretrained import load_pretrained, save_pretrained

__all__ = ["decompose", "load_pretrained", "save_pretrained"]
