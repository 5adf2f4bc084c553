"""Graph passes: each file is one rewrite rule with its algebra, its match and its refusals."""

from padst_compile.passes.pipeline import Pipeline, PipelineReport, run

__all__ = ["Pipeline", "PipelineReport", "run"]
